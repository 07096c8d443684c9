//! The end of a binding: what it did is undone.

use super::resolve::Unresolved;
use super::{Mode, Outcome, Worker};
use crate::apply::Place;
use crate::desired::Desired;
use crate::error::Error;
use crate::events::first_few;
use crate::gates;
use crate::index::resolved_arn;
use crate::ownership;
use crate::reason::{EventReason, Reason};
use crate::security;
use crate::status::Report;
use crate::tracking::Tracking;
use std::sync::Arc;
use tgb_api::options::{OnDelete, Options};
use tgb_api::v1::{Sharing, TargetGroupBinding};
use tgb_aws::values::Target;
use tokio::time::Instant;
use tracing::warn;

impl Worker {
    /// Undoes what the binding did, and lets it go.
    pub(super) async fn clean_up(
        &mut self,
        binding: &TargetGroupBinding,
        report: &mut Report,
    ) -> Result<(), Outcome> {
        let release = Options::of(binding).0.release;
        let undone = match self.mode(binding) {
            // The finalizer may be another controller's.
            Mode::Observes => Err(Error::Held("--observe: nothing is undone")),
            Mode::Paused => Err(Error::Held(
                "paused: nothing is undone until the annotation elbv2.k8s.aws/paused is removed",
            )),
            Mode::Writes => self.undo(binding).await,
        };
        if let Err(error) = undone {
            warn!(binding = %self.key, %error, "clean-up failed");
            let since = *self.memory.cleanup_since.get_or_insert_with(Instant::now);
            let late = self.ctx.settings.cleanup_deadline.is_some_and(|most| since.elapsed() >= most);
            let gives_up = (release || late) && self.mode(binding) != Mode::Observes;
            if !gives_up {
                report.cleanup_failed = Some(error.to_string());
                return Err(Outcome::Failed);
            }
        }
        match self.memory.writes.set_finalizer(&Arc::clone(&self.ctx), binding, false).await {
            Ok(_) => Ok(()),
            Err(error) if self.lets_others_write(&error).await => Err(Outcome::Again),
            Err(error) => {
                report.cleanup_failed = Some(Error::cluster("the finalizer", error).to_string());
                Err(Outcome::Failed)
            }
        }
    }

    /// Targets, ConfigMap, rules, gates; a failure of one does not keep the next from being undone.
    async fn undo(&mut self, binding: &TargetGroupBinding) -> Result<(), Error> {
        let retains = Options::of(binding).0.on_delete == OnDelete::Retain;
        let targets = match retains {
            true => Ok(()),
            false => self.deregister_all(binding).await,
        };
        let rules = self.close(binding, retains).await;
        let gates = gates::outdated(&self.ctx.index(), &self.key, |_| gates::of_a_deleted_binding());
        // Those that could not be written are no reason to hold up the deletion: the sweep opens gates without a binding.
        gates::write(&self.ctx, gates).await;
        targets.and(rules)
    }

    /// Has the rules of security groups taken away, or left for good, and tells of those.
    async fn close(&self, binding: &TargetGroupBinding, retains: bool) -> Result<(), Error> {
        if binding.spec.networking.is_none() {
            return Ok(());
        }
        let dropped = security::drop_claim(&self.ctx, &self.key, binding, retains).await?;
        if let Some((groups, description)) = dropped.retained {
            let note = format!(
                "on-delete: retain: the rules in {} stay. Nothing removes them later but you: those described as \
                 \"{description}\", by aws ec2 revoke-security-group-ingress --security-group-rule-ids",
                first_few(&groups)
            );
            self.ctx.events.normal(binding, EventReason::RulesRetained, note);
        }
        Ok(())
    }

    async fn deregister_all(&mut self, binding: &TargetGroupBinding) -> Result<(), Error> {
        // Whose reference or role is refused must not speak to AWS, now as before.
        match self.find_group(binding).await {
            Ok(_) => {}
            Err(Unresolved::Refused(refusal)) if refusal.reason == Reason::TargetGroupNotFound => {
                return Ok(());
            }
            Err(Unresolved::Refused(refusal)) => {
                let ever_resolved = resolved_arn(binding).is_some();
                match (ever_resolved, refusal.forbids_calls()) {
                    (false, _) => return Ok(()),
                    (true, true) => return Err(Error::Refused(refusal.message)),
                    (true, false) => {}
                }
            }
            Err(Unresolved::Failed(error)) => return Err(error.into()),
        }
        let found = self.memory.group.as_ref().map(|group| group.arn.as_str().to_owned());
        let Some(arn) = ownership::arn_to_clean_up(binding).map(str::to_owned).or(found) else {
            return Ok(());
        };
        let ctx = Arc::clone(&self.ctx);
        let role = binding.spec.target_group.role();
        let seen = match ctx.aws.target_health(role, &arn).await {
            Err(error) if error.is_target_group_not_found() => return Ok(()),
            other => other?,
        };
        let tracking = match binding.spec.target_group.sharing() {
            Sharing::Shared => {
                let read = Tracking::read(ctx.client.clone(), &self.key).await;
                Some(read.map_err(|error| Error::cluster("the ConfigMap of targets", error))?)
            }
            Sharing::Exclusive => None,
        };
        let mut goes: Vec<Target> = {
            // What was foreign at first contact is not ours to take away either.
            self.memory.observed.show(seen.clone(), |_| false, Instant::now());
            let contact = self.contact_left(binding);
            let foreign = self.foreign(contact);
            let index = ctx.index();
            let tracked = tracking.as_ref().map(|tracking| &tracking.targets);
            let switches = &ctx.settings.switches;
            let goes = ownership::to_clean_up(&index, switches, binding, &arn, &seen, tracked, &foreign);
            goes.into_iter().map(|seen| seen.target).collect()
        };
        let place = Place { ctx: &ctx, aws: ctx.aws.clone(), binding, arn: &arn, changed: None };
        // The calls of a pass are limited, those of an end are not.
        while !goes.is_empty() {
            goes = match place.deregister(&goes, &Desired::default(), &mut self.memory.observed).await {
                Err(error) if error.is_target_group_not_found() => break,
                other => other?,
            };
        }
        let untracked = match tracking {
            Some(tracking) if !tracking.exists() => Ok(()),
            Some(_) => Tracking::remove(&ctx.client, &self.key).await,
            None => self.untrack(binding).await,
        };
        untracked.map_err(|error| Error::cluster("the ConfigMap of targets", error))
    }
}
