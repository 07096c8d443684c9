//! Does what a plan says: the calls that register and deregister targets. What AWS acknowledges becomes part of what is
//! observed at once.

use crate::batches::{BATCH, Batches};
use crate::context::Ctx;
use crate::desired::{Desired, TargetKey};
use crate::events::listed;
use crate::metrics::Change;
use crate::observed::Observed;
use crate::plan::Plan;
use crate::reason::EventReason;
use crate::zones::Zones;
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
    // Both kinds of calls share a budget.
    if applied.failed.as_ref().is_some_and(|error| error.class() == Class::Throttled) {
        return applied;
    }
    let mut goes = plan.deregister.clone();
    if is_full {
        let missing =
            plan.register.iter().filter(|target| observed.present(&TargetKey::of(target)).is_none());
        let needed = missing.count().saturating_sub(goes.len());
        goes.extend(plan.spare.iter().take(needed).cloned());
    }
    // The turn was for what is registered.
    if !plan.register.is_empty() && !goes.is_empty() && !is_full {
        match place.aws.try_turn(place.binding.spec.target_group.role()) {
            Some(turn) => place.aws = turn,
            None => {
                applied.waits = true;
                return applied;
            }
        }
    }
    if let Err(error) = place.deregister(&goes, observed).await {
        applied.failed.get_or_insert(error);
        return applied;
    }
    if is_full {
        let left: Vec<Target> = plan
            .register
            .iter()
            .filter(|target| observed.present(&TargetKey::of(target)).is_none())
            .cloned()
            .collect();
        return place.register(&left, wanted, observed, zones, zone_of, true).await;
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
        let mut batches = Batches::new(targets);
        let mut applied = Applied::default();
        let mut full = None;
        while let Some(mut batch) = batches.next() {
            let error = match self.aws.register(role, self.arn, &batch).await {
                Ok(()) => {
                    observed.registered(&batch, wanted, Instant::now());
                    self.tell(EventReason::Registered, &batch);
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
                if !halve {
                    batches.again(batch);
                    break;
                }
                batches.full(batch);
            } else if zones.learn(&error) {
                let known = &*zones;
                let correct = |target: &mut Target| target.zone = zone_of(known, target);
                batch.iter_mut().for_each(correct);
                batches.change(correct);
                batches.again(batch);
            } else if is_about_targets(&error, self.arn) {
                batches.refuse(batch, &error.message);
            } else {
                applied.failed = Some(error);
                break;
            }
        }
        let left = batches.left();
        observed.refuse(batches.refused, Instant::now());
        match full {
            Some(words) => applied.no_room = Some((batches.no_room.len() + left, words)),
            None => applied.left = left,
        }
        applied
    }

    /// Deregisters; targets that AWS doesn't know are as good as gone.
    ///
    /// # Errors
    /// What AWS answered; the batches before are gone.
    pub(crate) async fn deregister(
        &self,
        targets: &[Target],
        observed: &mut Observed,
    ) -> Result<(), AwsError> {
        let role = self.binding.spec.target_group.role();
        for batch in targets.chunks(BATCH) {
            match self.aws.deregister(role, self.arn, batch).await {
                Err(error) if error.code == "InvalidTarget" => {}
                other => other?,
            }
            observed.deregistered(batch, Instant::now());
            self.tell(EventReason::Deregistered, batch);
        }
        Ok(())
    }

    fn tell(&self, event: EventReason, batch: &[Target]) {
        let keys: Vec<TargetKey> = batch.iter().map(TargetKey::of).collect();
        let change = match event {
            EventReason::Registered => "registered",
            _ => "deregistered",
        };
        let (namespace, name) = (self.binding.namespace(), self.binding.name());
        info!(namespace, name, targets = keys.len(), "{change}");
        let counter = self.ctx.metrics.changes.get_or_create(&Change { change }).clone();
        counter.inc_by(u64::try_from(keys.len()).unwrap_or(u64::MAX));
        self.ctx.events.normal(self.binding, event, listed("target", &keys));
    }
}

/// Whether AWS refuses targets, and not the call as such.
fn is_about_targets(error: &AwsError, arn: &str) -> bool {
    matches!(error.code.as_str(), "InvalidTarget" | "ValidationError") && !error.message.contains(arn)
}
