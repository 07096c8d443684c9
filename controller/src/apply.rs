//! Does what a plan says: the calls that register and deregister targets. What AWS acknowledges becomes part of what is
//! observed at once.

use crate::batches::Batches;
use crate::context::Ctx;
use crate::desired::{Desired, TargetKey, why_unwanted};
use crate::events::{LISTED, listed};
use crate::metrics::Change;
use crate::observed::Observed;
use crate::plan::Plan;
use crate::reason::EventReason;
use crate::zones::{Lesson, Zones};
use std::fmt::Display;
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::Target;
use tgb_aws::{Aws, AwsError, Class};
use tokio::time::Instant;
use tracing::{debug, info};

/// The zone of a target, as far as is known now.
pub(crate) type ZoneOf<'a> = &'a (dyn Fn(&Zones, &Target) -> Option<String> + Send + Sync);

/// A target group, for a binding.
pub(crate) struct Place<'a> {
    pub(crate) ctx: &'a Ctx,
    /// Its first change of targets need not wait.
    pub(crate) aws: Aws,
    pub(crate) binding: &'a TargetGroupBinding,
    pub(crate) arn: &'a str,
    /// The change that this pass is about.
    pub(crate) changed: Option<Instant>,
}

/// What came of a plan.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// A call failed, and not because of targets.
    pub(crate) failed: Option<AwsError>,
    /// For so many AWS has no room, and its words.
    pub(crate) no_room: Option<(usize, String)>,
    /// So many were not tried, since the calls of a pass are limited.
    pub(crate) left: usize,
    /// Targets went that are to be registered again at once.
    pub(crate) reregisters: bool,
    /// What is to be deregistered has to wait for its turn, after which there may be more of it.
    pub(crate) waits: bool,
}

/// Registers, then deregisters. Where AWS has no room, what is not wanted goes first, and as much of what waits for a
/// successor as there are targets to register.
pub(crate) async fn apply(
    mut place: Place<'_>,
    plan: &Plan,
    wanted: &Desired,
    observed: &mut Observed,
    zones: &mut Zones,
    zone_of: ZoneOf<'_>,
) -> Applied {
    let may_make_room = !plan.deregister.is_empty() || !plan.spare.is_empty();
    let mut applied = place.register(&plan.register, wanted, observed, zones, zone_of, !may_make_room).await;
    let is_full = applied.no_room.is_some() && may_make_room;
    let mut goes = plan.deregister.clone();
    if is_full {
        let missing =
            plan.register.iter().filter(|target| observed.present(&TargetKey::of(target)).is_none());
        let needed = missing.count().saturating_sub(goes.len());
        goes.extend(plan.spare.iter().take(needed).cloned());
    }
    // The turn was for what is registered. Where AWS throttled that, another pass would begin with it again.
    let is_throttled = applied.failed.as_ref().is_some_and(|error| error.class() == Class::Throttled);
    if !plan.register.is_empty() && !goes.is_empty() && !is_full && !is_throttled {
        match place.aws.try_turn(place.binding.spec.target_group.role()) {
            Some(turn) => place.aws = turn,
            None => {
                applied.waits = true;
                return applied;
            }
        }
    }
    match place.deregister(&goes, wanted, observed).await {
        Ok(rest) => applied.left += rest.len(),
        Err(error) => {
            applied.failed.get_or_insert(error);
            return applied;
        }
    }
    applied.reregisters = plan.reregisters;
    if is_full {
        let left: Vec<Target> = plan
            .register
            .iter()
            .filter(|target| observed.present(&TargetKey::of(target)).is_none())
            .cloned()
            .collect();
        let more = place.register(&left, wanted, observed, zones, zone_of, true).await;
        return Applied { left: applied.left + more.left, reregisters: applied.reregisters, ..more };
    }
    applied
}

impl Place<'_> {
    /// `halve`: where AWS has no room for a batch, it may have some for a part of it.
    async fn register(
        &self,
        targets: &[Target],
        wanted: &Desired,
        observed: &mut Observed,
        zones: &mut Zones,
        zone_of: ZoneOf<'_>,
        halve: bool,
    ) -> Applied {
        let role = self.binding.spec.target_group.role();
        let mut batches = if observed.is_full() { Batches::probing(targets) } else { Batches::new(targets) };
        let mut applied = Applied::default();
        let mut full = None;
        while let Some(mut batch) = batches.next() {
            let error = match self.aws.register(role, self.arn, &batch).await {
                Ok(()) => {
                    observed.registered(&batch, wanted, Instant::now());
                    let keys: Vec<TargetKey> = batch.iter().map(TargetKey::of).collect();
                    self.tell(EventReason::Registered, &keys);
                    if let Some(changed) = self.changed {
                        self.ctx.metrics.endpoint_to_register.observe(changed.elapsed().as_secs_f64());
                    }
                    continue;
                }
                Err(error) => error,
            };
            debug!(arn = self.arn, targets = batch.len(), %error, "not registered");
            if error.is_target_limit() {
                full = Some(error.to_string());
                observed.found_full();
                if !halve {
                    batches.again(batch);
                    break;
                }
                batches.full(batch);
                continue;
            }
            match zones.learn(&error, &batch) {
                Lesson::Again => {
                    let known = &*zones;
                    let correct = |target: &mut Target| target.zone = zone_of(known, target);
                    batch.iter_mut().for_each(correct);
                    batches.change(correct);
                    batches.again(batch);
                }
                Lesson::Isolate => batches.halve(batch),
                Lesson::None if error.is_about_targets(self.arn) => batches.refuse(batch, &error.message),
                Lesson::None => {
                    applied.failed = Some(error);
                    break;
                }
            }
        }
        let left = batches.left().count();
        observed.refuse(batches.refused, Instant::now());
        match full {
            Some(words) => applied.no_room = Some((batches.no_room.len() + left, words)),
            None => applied.left = left,
        }
        applied
    }

    /// Deregisters; targets that AWS names as unknown are as good as gone. Those that were not sent, since the calls of a
    /// pass are limited.
    ///
    /// # Errors
    /// AWS's answer; the other targets are gone where it was about targets, and the batches before otherwise.
    pub(crate) async fn deregister(
        &self,
        targets: &[Target],
        wanted: &Desired,
        observed: &mut Observed,
    ) -> Result<Vec<Target>, AwsError> {
        let role = self.binding.spec.target_group.role();
        let mut batches = Batches::new(targets);
        let mut refused = None;
        while let Some(batch) = batches.next() {
            match self.aws.deregister(role, self.arn, &batch).await {
                Ok(()) => {
                    let told = self.reasons(&batch, wanted, observed);
                    observed.deregistered(&batch, Instant::now());
                    self.tell(EventReason::Deregistered, &told);
                }
                Err(error) if error.is_about_targets(self.arn) => {
                    batches.refuse(batch, &error.message);
                    let named: Vec<Target> = batches.refused.drain(..).map(|(target, _)| target).collect();
                    if error.code == "InvalidTarget" {
                        observed.deregistered(&named, Instant::now());
                    } else if !named.is_empty() {
                        refused = Some(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) => Err(error),
            None => Ok(batches.left().cloned().collect()),
        }
    }

    /// The targets of a batch, and why the first of them go.
    fn reasons(&self, batch: &[Target], wanted: &Desired, observed: &Observed) -> Vec<String> {
        let index = self.ctx.index();
        let one = |(n, target): (usize, &Target)| {
            let key = TargetKey::of(target);
            if n >= LISTED {
                return key.to_string();
            }
            let why = match self.binding.is_terminating() {
                true => "the binding is deleted".to_owned(),
                false => why_unwanted(&index, self.binding, wanted, &key, observed.pod(&key)),
            };
            format!("{key} ({why})")
        };
        batch.iter().enumerate().map(one).collect()
    }

    fn tell<T: Display>(&self, event: EventReason, targets: &[T]) {
        let change = match event {
            EventReason::Registered => "registered",
            _ => "deregistered",
        };
        let (namespace, name) = (self.binding.namespace(), self.binding.name());
        info!(namespace, name, targets = targets.len(), "{change}");
        let counter = self.ctx.metrics.changes.get_or_create(&Change { change }).clone();
        counter.inc_by(u64::try_from(targets.len()).unwrap_or(u64::MAX));
        self.ctx.events.normal(self.binding, event, listed("target", targets));
    }
}
