//! What we write of a binding: its status and our finalizer, by merge patch with resourceVersion, and only what changed.

use crate::context::Ctx;
use crate::reconcile::backoff;
use crate::status::{self, Report};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use std::time::Duration;
use tgb_api::names;
use tgb_api::v1::{Status, TargetGroupBinding};
use tokio::time::Instant;
use tracing::warn;

/// Counts are written at most this often, and other words about the same reason.
const COUNTS_EVERY: Duration = Duration::from_secs(15);
const WORDS_EVERY: Duration = Duration::from_secs(2);
/// After how long a write is tried again when somebody else wrote.
pub(crate) const CONFLICT: Duration = Duration::from_millis(200);

/// What we wrote last, which the watch may not have shown yet.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    last: Option<Last>,
    status: Option<(Status, Instant)>,
    health: Option<Awaited>,
    refusals: Refusals,
}

/// Failures in a row of writing a status, and the time until which it is not tried again.
#[derive(Debug, Default)]
struct Refusals {
    count: u32,
    until: Option<Instant>,
}

impl Refusals {
    /// The time for which nothing is to be tried any more.
    fn left(&self, now: Instant) -> Option<Duration> {
        self.until?.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// One more; in how long to try again. `random` of 0 to 1 keeps apart those that failed together.
    fn add(&mut self, now: Instant, random: f64) -> Duration {
        self.count = self.count.saturating_add(1);
        let pause = backoff(self.count, random);
        self.until = Some(now + pause);
        pause
    }
}

/// The change that people wait for after targets were changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// That the number of healthy targets changes.
    Change,
    /// That all are healthy.
    All,
}

impl Awaited {
    /// True if the new counts are what people wait for.
    fn is_met(self, old: Option<&Status>, new: &Status) -> bool {
        is_other_health(old, new) && (self == Self::Change || is_all_healthy(new))
    }
}

fn is_other_health(old: Option<&Status>, new: &Status) -> bool {
    let healthy = |status: &Status| status.targets.as_ref().map(|targets| targets.healthy);
    old.and_then(healthy) != healthy(new)
}

fn is_all_healthy(new: &Status) -> bool {
    new.targets.as_ref().is_some_and(|targets| targets.healthy == targets.desired)
}

#[derive(Debug)]
struct Last {
    /// The resourceVersions that our writes have overtaken since the watch was last up to date, and what became of them.
    seen: Vec<Option<String>>,
    now: Option<String>,
}

impl Writes {
    /// What we wrote last, if the watch has not shown it yet.
    fn ahead(&self, binding: &TargetGroupBinding) -> Option<&Last> {
        self.last.as_ref().filter(|last| last.seen.contains(&binding.metadata.resource_version))
    }

    /// The newest status that is known: our own last one, until the watch has shown it.
    pub(crate) fn status<'a>(&'a self, binding: &'a TargetGroupBinding) -> Option<&'a Status> {
        match (self.ahead(binding), &self.status) {
            (Some(_), Some((status, _))) => Some(status),
            _ => binding.status.as_ref(),
        }
    }

    fn version(&self, binding: &TargetGroupBinding) -> Option<String> {
        match self.ahead(binding) {
            Some(last) => last.now.clone(),
            None => binding.metadata.resource_version.clone(),
        }
    }

    fn wrote(&mut self, binding: &TargetGroupBinding, answer: &TargetGroupBinding) {
        let now = answer.metadata.resource_version.clone();
        let overtaken = self.version(binding);
        let mut seen = match self.ahead(binding) {
            Some(_) => self.last.take().map(|last| last.seen).unwrap_or_default(),
            None => Vec::new(),
        };
        // A write that changes nothing overtakes nothing.
        if overtaken != now {
            seen.push(overtaken);
        }
        self.last = Some(Last { seen, now });
        self.refusals = Refusals::default();
    }

    /// Targets were changed: the next change of how many are healthy is written at once, and that all are.
    pub(crate) fn expect_health(&mut self) {
        self.health = Some(Awaited::Change);
    }

    /// Sets our finalizer or takes it away. Whether the binding is there: one that is gone needs neither.
    ///
    /// # Errors
    /// What the API server answered; a conflict when somebody else wrote.
    pub(crate) async fn set_finalizer(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        wanted: bool,
    ) -> Result<bool, kube::Error> {
        let mut finalizers = binding.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|entry| entry != names::FINALIZER);
        if wanted {
            finalizers.push(names::FINALIZER.to_owned());
        }
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": self.version(binding)}});
        match api(ctx, binding).patch(binding.name(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(answer) => {
                self.wrote(binding, &answer);
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
            Err(error) => {
                self.last = None;
                Err(error)
            }
        }
    }

    /// Writes the status if it differs from what is there; `Some` if that must be tried again, and in how long.
    pub(crate) async fn set_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        report: &Report,
        generation: Option<i64>,
    ) -> Option<Duration> {
        let old = self.status(binding);
        let new = status::status(report, old, generation, Time(Timestamp::now()));
        let patience = match status::difference(old, &new) {
            status::Difference::None => return None,
            status::Difference::Counts if self.health.is_some_and(|health| health.is_met(old, &new)) => {
                Duration::ZERO
            }
            status::Difference::Counts => COUNTS_EVERY,
            status::Difference::Words => WORDS_EVERY,
            status::Difference::Substance => Duration::ZERO,
        };
        let since = self.status.as_ref().map(|(_, at)| at.elapsed());
        if let Some(left) = since.and_then(|since| patience.checked_sub(since)).filter(|left| !left.is_zero())
        {
            return Some(left);
        }
        if let Some(left) = self.refusals.left(Instant::now()) {
            return Some(left);
        }
        match self.write_status(ctx, binding, new).await {
            Ok(()) => None,
            Err(error) if is_conflict(&error) => Some(CONFLICT),
            Err(error) => {
                warn!(binding = %format!("{}/{}", binding.namespace(), binding.name()), error = %tgb_process::told(&error), "could not write the status");
                Some(self.refusals.add(Instant::now(), fastrand::f64()))
            }
        }
    }

    /// Writes the status now, whatever was there. A binding that is gone needs none.
    ///
    /// # Errors
    /// What the API server answered; a conflict when somebody else wrote.
    pub(crate) async fn put_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        report: &Report,
    ) -> Result<(), kube::Error> {
        let generation = binding.metadata.generation;
        let new = status::status(report, self.status(binding), generation, Time(Timestamp::now()));
        self.write_status(ctx, binding, new).await
    }

    async fn write_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        new: Status,
    ) -> Result<(), kube::Error> {
        let patch = json!({"metadata": {"resourceVersion": self.version(binding)}, "status": new});
        let answer = api(ctx, binding)
            .patch_status(binding.name(), &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        match answer {
            Ok(answer) => {
                if is_other_health(self.status(binding), &new) {
                    self.health = self.health.map(|_| Awaited::All).filter(|_| !is_all_healthy(&new));
                }
                self.wrote(binding, &answer);
                self.status = Some((new, Instant::now()));
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => {
                if is_conflict(&error) {
                    self.last = None;
                }
                Err(error)
            }
        }
    }
}

/// Whether a binding has our finalizer.
pub(crate) fn has_finalizer(binding: &TargetGroupBinding) -> bool {
    binding.metadata.finalizers.iter().flatten().any(|entry| entry == names::FINALIZER)
}

/// Whether a write failed since somebody else wrote.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

fn api(ctx: &Ctx, binding: &TargetGroupBinding) -> Api<TargetGroupBinding> {
    Api::namespaced(ctx.client.clone(), binding.namespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(version: &str) -> TargetGroupBinding {
        let metadata = json!({"namespace": "shop", "name": "web", "resourceVersion": version});
        serde_json::from_value(json!({"metadata": metadata, "spec": {"serviceRef": {"name": "web"}}}))
            .unwrap()
    }

    #[test]
    fn the_first_change_of_health_is_urgent_and_that_all_are_healthy() {
        let counted = |healthy: u32| Status {
            targets: Some(tgb_api::v1::TargetCounts { desired: 3, healthy, ..Default::default() }),
            ..Default::default()
        };
        let met = |awaited: Awaited, old: u32, new: u32| awaited.is_met(Some(&counted(old)), &counted(new));
        assert!(met(Awaited::Change, 0, 1) && met(Awaited::Change, 3, 2) && !met(Awaited::Change, 1, 1));
        assert!(met(Awaited::All, 1, 3) && !met(Awaited::All, 1, 2) && !met(Awaited::All, 3, 3));
    }

    #[test]
    fn a_write_builds_on_the_last_one_also_while_the_watch_shows_those_before() {
        let mut writes = Writes::default();
        let version = |writes: &Writes, seen: &str| writes.version(&at(seen)).unwrap();
        writes.wrote(&at("1"), &at("2"));
        writes.wrote(&at("1"), &at("3"));
        assert_eq!(["1", "2", "3"].map(|seen| version(&writes, seen)), ["3", "3", "3"]);
        writes.wrote(&at("2"), &at("4"));
        assert_eq!(["1", "2", "3", "4"].map(|seen| version(&writes, seen)), ["4", "4", "4", "4"]);
        // Somebody else wrote.
        assert_eq!(version(&writes, "5"), "5");
        writes.wrote(&at("5"), &at("5"));
        assert_eq!((version(&writes, "5").as_str(), writes.ahead(&at("5")).is_some()), ("5", false));
        writes.wrote(&at("5"), &at("6"));
        assert_eq!(["4", "5", "7"].map(|seen| version(&writes, seen)), ["4", "6", "7"]);
    }

    #[test]
    fn a_status_that_cannot_be_written_is_tried_again_ever_later_until_a_write_succeeds() {
        let (mut writes, mut now) = (Writes::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let pause = writes.refusals.add(now, 0.0);
            assert_eq!(writes.refusals.left(now), Some(pause));
            assert_eq!(writes.refusals.left(now + pause), None);
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        writes.wrote(&at("1"), &at("2"));
        assert_eq!(writes.refusals.add(now, 0.0), Duration::from_secs(1));
    }
}
