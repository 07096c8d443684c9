//! What a pass has to do with security groups.

use super::{Found, Mode, Outcome, Worker};
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
            Ok(Found { wanted, group, .. }) if !wanted.targets.is_empty() => {
                let exclusive = binding.spec.target_group.sharing() == Sharing::Exclusive;
                let mut observed = self.memory.observed.targets().keys();
                let lingers = exclusive && observed.any(|key| !wanted.targets.contains_key(key));
                let vpc = self.ctx.aws.vpc_id().or(group.vpc_id.as_deref());
                Sight::Targets { wanted: &wanted.targets, vpc, lingers }
            }
            // No endpoint, or sick for good: it keeps the rules that it had.
            Ok(_) | Err(Outcome::Done(_)) => Sight::Nothing,
            Err(Outcome::Failed) if self.memory.group_is_gone => Sight::Nothing,
            Err(Outcome::Failed | Outcome::Again) => Sight::Unknown,
        };
        let sight = (sight, self.changed.is_some());
        match security::bring(&self.ctx, &self.key, binding, sight, report).await {
            true => outcome,
            false => Outcome::Failed,
        }
    }
}
