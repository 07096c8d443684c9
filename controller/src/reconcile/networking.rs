//! The part of a pass that has to do with security groups.

use super::{Found, Memory, Mode, Outcome, Worker, backoff};
use crate::desired::TargetKey;
use crate::security::{self, Sight};
use crate::status::Report;
use tgb_api::v1::{Sharing, TargetGroupBinding};

impl Worker {
    /// Claims the rules that the targets found need, and says how they stand.
    pub(super) async fn networking(
        &mut self,
        binding: &TargetGroupBinding,
        found: &Result<Found, Outcome>,
        report: &mut Report,
    ) -> Outcome {
        let outcome = match found {
            Ok(found) => found.outcome,
            Err(outcome) => *outcome,
        };
        let sight = match found {
            _ if self.mode(binding) == Mode::Paused => Sight::Paused,
            Ok(found) if !found.wanted.targets.is_empty() => {
                let lingers = self.lingers(binding, found);
                let vpc = self.ctx.aws.vpc_id().or(found.group.vpc_id.as_deref());
                Sight::Targets { wanted: &found.wanted.targets, vpc, lingers }
            }
            // No endpoint, or sick for good: it keeps the rules that it had.
            Ok(_) | Err(Outcome::Done(_)) => Sight::Nothing,
            Err(Outcome::Failed) if self.memory.group_is_gone => Sight::Nothing,
            Err(Outcome::Failed | Outcome::Again) => Sight::Unknown,
        };
        let is_changed = self.changed.is_some();
        let is_done = security::bring(&self.ctx, &self.key, binding, (sight, is_changed), report).await;
        let failures = if is_done || is_changed { 0 } else { self.memory.networking_failures };
        self.memory.networking_failures = failures.saturating_add(u32::from(!is_done));
        match outcome {
            // Polls that somebody waits for are not put off by it.
            Outcome::Done(again) if !is_done => {
                let soon = backoff(self.memory.networking_failures, fastrand::f64());
                Outcome::Done(Some(again.map_or(soon, |again| again.min(soon))))
            }
            outcome => outcome,
        }
    }

    /// Tells if targets of the binding that are not wanted any more still serve or drain: the rules that let traffic through
    /// to them stay as long.
    fn lingers(&mut self, binding: &TargetGroupBinding, found: &Found) -> bool {
        let Memory { observed, tracking, served, .. } = &mut self.memory;
        let there = observed.targets();
        let is_unwanted = |key: &&TargetKey| !found.wanted.targets.contains_key(*key);
        if binding.spec.target_group.sharing() == Sharing::Exclusive {
            served.clear();
            return there.keys().filter(is_unwanted).any(|key| !found.contact.foreign.contains(key));
        }
        // One that drains is not tracked any more, so what was ours is remembered while AWS shows it.
        let tracked =
            |key: &TargetKey| tracking.as_ref().is_some_and(|tracking| tracking.targets.contains(key));
        served.retain(|key| there.contains_key(key));
        served.extend(there.keys().filter(|key| observed.is_ours(key) || tracked(key)).cloned());
        served.iter().any(|key| is_unwanted(&key))
    }
}
