//! The end of a binding: what it did is undone.

use super::resolve::Unresolved;
use super::{Mode, Outcome, Worker};
use crate::apply::Place;
use crate::desired::{Desired, TargetKey, is_of_cluster};
use crate::error::Error;
use crate::events::{first_few, listed};
use crate::gates;
use crate::observed::Observed;
use crate::ownership::{self, Owner, Refusal, Rest, Right, Tracked};
use crate::reason::{EventReason, Kind, Reason};
use crate::security;
use crate::status::Report;
use crate::tracking::Tracking;
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tgb_api::options::{OnDelete, Options};
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{FirstContact, Sharing, Status, TargetGroupBinding};
use tgb_aws::TargetGroupQuery;
use tgb_aws::values::Target;
use tokio::time::Instant;
use tracing::warn;

/// The records that a clean-up rests on.
struct Records {
    /// The owner of what the status tells of targets.
    owner: Option<Owner>,
    /// The record of the first contact, if it is ours.
    contact: Option<FirstContact>,
    /// The ConfigMap of a binding that is Shared, or was.
    tracked: Option<Tracked>,
    /// The binding is Shared, and we may not read its ConfigMap.
    is_forbidden: bool,
}

impl Worker {
    /// Undoes what the binding did, and lets it go.
    pub(super) async fn clean_up(
        &mut self,
        binding: &TargetGroupBinding,
        report: &mut Report,
    ) -> Result<(), Outcome> {
        let writes = self.mode(binding) == Mode::Writes;
        let undone = match writes {
            true => self.undo(binding).await,
            false => Err(Error::Held(
                "paused: nothing is undone until the annotation elbv2.k8s.aws/paused is removed",
            )),
        };
        if let Err(error) = undone {
            warn!(binding = %self.key, %error, "clean-up failed");
            let now = Timestamp::now();
            let failing = failing_since(self.memory.writes.status(binding)).or(self.memory.cleanup_since);
            let since = *self.memory.cleanup_since.insert(failing.unwrap_or(now));
            let lasted = Duration::try_from(now.duration_since(since)).unwrap_or_default();
            let late = self.ctx.settings.cleanup_deadline.is_some_and(|most| lasted >= most);
            if !Options::of(binding).0.release && !late {
                report.cleanup_failed = Some(error.to_string());
                // A pause is not a failure, and ends with a change of the binding.
                return Err(if writes { Outcome::Failed } else { Outcome::Done(None) });
            }
            self.leaves(binding, format!("the clean-up is given up: {error}"));
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

    /// Tells what the binding leaves behind.
    fn leaves(&self, binding: &TargetGroupBinding, what: String) {
        self.ctx.events.warning(binding, EventReason::CleanupIncomplete, what);
    }

    /// Targets, ConfigMap, rules, gates; a failure of one does not keep the next from being undone.
    async fn undo(&mut self, binding: &TargetGroupBinding) -> Result<(), Error> {
        let retains = Options::of(binding).0.on_delete == OnDelete::Retain;
        let targets = match retains {
            true => Ok(()),
            false => self.deregister_all(binding).await,
        };
        // Without a binding nobody reads it, and where the targets could not go it is still needed.
        let targets = match targets {
            Ok(()) => self.untrack(binding).await,
            Err(error) => Err(error),
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

    /// Deletes the ConfigMap of a binding that is Shared, or may have been.
    async fn untrack(&mut self, binding: &TargetGroupBinding) -> Result<(), Error> {
        let mark = self.mark(binding);
        let is_shared = binding.spec.target_group.sharing() == Sharing::Shared;
        if is_shared || self.memory.tracking.is_some() || ownership::may_have_been_shared(binding, &mark) {
            Tracking::remove(&self.ctx.client, &self.key).await.map_err(Error::tracking)?;
        }
        self.memory.tracking = None;
        Ok(())
    }

    /// Deregisters what is the binding's own, in every target group that it worked on.
    async fn deregister_all(&mut self, binding: &TargetGroupBinding) -> Result<(), Error> {
        let records = self.records(binding).await?;
        if let (Some(Owner::Others), Some(status)) = (records.owner, &binding.status)
            && let Some(contact) = &status.first_contact
        {
            let note = format!(
                "nothing is deregistered by this binding's status, which is of cluster {} and of the binding with the UID {}",
                contact.cluster, contact.binding_uid
            );
            self.leaves(binding, note);
        }
        for arn in self.worked_on(binding, &records).await? {
            self.deregister(binding, &arn, &records).await?;
        }
        Ok(())
    }

    async fn records(&mut self, binding: &TargetGroupBinding) -> Result<Records, Error> {
        let mark = self.mark(binding);
        let is_shared = binding.spec.target_group.sharing() == Sharing::Shared;
        let status = self.memory.writes.status(binding);
        let (owner, contact) = (mark.owner_of(status), mark.record(status).cloned());
        let (mut tracked, mut is_forbidden) = (None, false);
        if is_shared || ownership::may_have_been_shared(binding, &mark) {
            match Tracking::read(self.ctx.client.clone(), &self.key, mark).await {
                Ok(read) => tracked = read.tracked(),
                // Of a binding that is not Shared we have made none where we may not.
                Err(kube::Error::Api(status)) if status.is_forbidden() => is_forbidden = is_shared,
                Err(error) => return Err(Error::tracking(error)),
            }
        }
        if Options::of(binding).0.adopt_targets
            && let Some(tracked) = &mut tracked
        {
            tracked.owner = Owner::Us;
        }
        Ok(Records { owner, contact, tracked, is_forbidden })
    }

    /// The target groups in which the records say that something is this binding's; none, and no call of AWS, for a binding
    /// that never registered anything.
    async fn worked_on(
        &mut self,
        binding: &TargetGroupBinding,
        records: &Records,
    ) -> Result<BTreeSet<String>, Error> {
        let mut all: BTreeSet<String> =
            records.contact.iter().map(|contact| contact.target_group_arn.to_string()).collect();
        let is_tracked = records.tracked.as_ref().is_some_and(|tracked| tracked.owner != Owner::Others);
        if !is_tracked && records.owner != Some(Owner::Unmarked) {
            return Ok(all);
        }
        if records.owner == Some(Owner::Unmarked) {
            all.extend(resolved(binding).map(str::to_owned));
        }
        match self.find_group(binding).await {
            Ok(group) => all.extend([group.arn.as_str().to_owned()]),
            // AWS knows it, and what of the rules may be done there is seen to below.
            Err(Unresolved::Refused(refusal)) if !refusal.forbids_calls() => {
                all.extend(self.memory.group.as_ref().map(|group| group.arn.as_str().to_owned()));
            }
            Err(Unresolved::Refused(_)) => {}
            Err(Unresolved::Failed(error)) => return Err(error.into()),
        }
        Ok(all)
    }

    /// Deregisters what is the binding's own in one target group, held against the same rules as the spec's.
    async fn deregister(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        records: &Records,
    ) -> Result<(), Error> {
        let ctx = Arc::clone(&self.ctx);
        let role = binding.spec.target_group.role();
        let contact = records.contact.as_ref().filter(|contact| *contact.target_group_arn == *arn);
        let (group, refusal) = match self.look_up(binding, arn).await {
            Ok(found) => found,
            Err(Unresolved::Refused(refusal)) if refusal.reason == Reason::TargetGroupNotFound => {
                return Ok(());
            }
            // Something of ours may be there, and a person has to decide.
            Err(Unresolved::Refused(refusal)) if contact.is_some() || resolved(binding) == Some(arn) => {
                return Err(Error::Refused(refusal.message));
            }
            Err(Unresolved::Refused(_)) => return Ok(()),
            Err(Unresolved::Failed(error)) => return Err(error.into()),
        };
        let seen = match ctx.aws.target_health(role, arn).await {
            Err(error) if error.is_target_group_not_found() => return Ok(()),
            other => other?,
        };
        let mut observed = Observed::default();
        observed.show(seen.clone(), |_| false, Instant::now());
        let right = self.right(binding, records, contact, &observed);
        let narrow = (refusal.is_some() || records.is_forbidden).then(|| self.narrow_right(arn, &right));
        let (mut goes, stays): (Vec<Target>, Vec<TargetKey>) = {
            let index = ctx.index();
            let switches = &ctx.settings.switches;
            let take = |right: &Right| -> Vec<Target> {
                let goes = ownership::to_clean_up(&index, switches, binding, &group, &seen, right);
                goes.into_iter().map(|seen| seen.target).collect()
            };
            let (all, goes) = (take(&right), narrow.as_ref().map(take));
            match goes {
                Some(goes) => {
                    let gone: BTreeSet<TargetKey> = goes.iter().map(TargetKey::of).collect();
                    let stays = all.iter().map(TargetKey::of).filter(|key| !gone.contains(key));
                    (goes, stays.collect())
                }
                None => (all, Vec::new()),
            }
        };
        let place = Place { ctx: &ctx, aws: ctx.aws.clone(), binding, arn, changed: None };
        // The calls of a pass are limited, those of an end are not.
        while !goes.is_empty() {
            goes = match place.deregister(&goes, &Desired::default(), &mut observed).await {
                Err(error) if error.is_target_group_not_found() => return Ok(()),
                other => other?,
            };
        }
        if !stays.is_empty() {
            let why =
                refusal.map_or_else(|| "its ConfigMap may not be read".to_owned(), |refusal| refusal.message);
            self.leaves(
                binding,
                format!("left in target group {}: {}; {why}", group.arn.name(), listed("target", &stays)),
            );
        }
        Ok(())
    }

    /// The right to take targets away by what the records say.
    fn right(
        &self,
        binding: &TargetGroupBinding,
        records: &Records,
        contact: Option<&FirstContact>,
        observed: &Observed,
    ) -> Right {
        let index = self.ctx.index();
        if binding.spec.target_group.sharing() == Sharing::Shared {
            if records.is_forbidden && matches!(records.owner, Some(Owner::Us | Owner::Unmarked)) {
                return Right { rest: Rest::OfCluster, ..Right::default() };
            }
            return Right::shared(contact, records.tracked.as_ref(), &index);
        }
        let foreign = match contact {
            Some(contact) if !Options::of(binding).0.adopt_targets => {
                ownership::foreign(contact, observed, |key| is_of_cluster(&index, key))
            }
            _ => BTreeSet::new(),
        };
        Right::exclusive(records.owner, contact, foreign, records.tracked.as_ref())
    }

    /// The part of a right that is left where the target group's tags close it to this namespace by now, or the ConfigMap can't be
    /// read: targets that this process registered, and the addresses of the namespace's own pods. No record is trusted for
    /// the rest, so that the targets of others are safe whatever it says; and nobody has to wait for a right.
    fn narrow_right(&self, arn: &str, right: &Right) -> Right {
        if right.is_nothing() {
            return Right::default();
        }
        let observed = &self.memory.observed;
        let is_known = self.memory.arn.as_deref() == Some(arn);
        let keys = observed.targets().keys().filter(|key| is_known && observed.is_ours(key));
        Right { these: keys.cloned().collect(), rest: Rest::OfNamespace }
    }

    /// The target group of an ARN, held against the rules as if the binding named it. A refusal that comes with it is by the
    /// tags of the group.
    async fn look_up(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
    ) -> Result<(TargetGroup, Option<Refusal>), Unresolved> {
        let ctx = Arc::clone(&self.ctx);
        let mut named = binding.clone();
        (named.spec.target_group.arn, named.spec.target_group.name) = (Some(arn.into()), None);
        let refused = |group: Option<&TargetGroup>, tags: Option<&BTreeMap<String, String>>| {
            ownership::refused(&ctx.settings.rules, &named, group, tags)
        };
        if let Some(refusal) = refused(None, None) {
            return Err(Unresolved::Refused(refusal));
        }
        let role = named.spec.target_group.role();
        let known = self.memory.group.clone().filter(|group| group.arn.as_str() == arn);
        let (group, tags) = match known {
            Some(group) => (Some(group), self.memory.tags.clone()),
            None => match ctx.aws.target_groups(role, TargetGroupQuery::Arn(arn)).await {
                Ok(groups) => (groups.into_iter().next(), None),
                Err(error) if error.is_target_group_not_found() => (None, None),
                Err(error) => return Err(Unresolved::Failed(error)),
            },
        };
        let Some(group) = group else { return Err(Unresolved::Refused(Refusal::not_found(arn))) };
        let tags = match tags {
            None if ctx.settings.rules.wants_tags() => {
                Some(ctx.aws.tags(role, arn).await.map_err(Unresolved::Failed)?)
            }
            tags => tags,
        };
        // Of what type the group is does not matter any more.
        let refusal = refused(Some(&group), tags.as_ref()).filter(Refusal::is_by_tags);
        Ok((group, refusal))
    }
}

/// The ARN that an earlier pass resolved, by a status that names nobody else.
fn resolved(binding: &TargetGroupBinding) -> Option<&str> {
    let status = binding.status.as_ref().filter(|status| status.first_contact.is_none())?;
    status.target_group_arn.as_deref()
}

/// Since when the clean-up fails, as the status tells, also over a restart.
fn failing_since(status: Option<&Status>) -> Option<Timestamp> {
    let mut conditions = status?.conditions.iter();
    let failed = conditions.find(|condition| *condition.type_ == *Kind::CleanupFailed.as_str());
    failed.map(|condition| condition.last_transition_time.0)
}
