//! What Prometheus reads; `docs/metrics.md` explains it. [`crate::http`] fills in the gauges when it is asked.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;

/// How a pass ended: `ok` or `error`, and the reason of `Ready`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Pass {
    pub(crate) result: &'static str,
    pub(crate) reason: &'static str,
}

/// How a pass ended: `ok` or `error`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Result {
    pub(crate) result: &'static str,
}

/// What happens to a target.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Change {
    pub(crate) change: &'static str,
}

/// A target's state, as AWS says it, or `missing`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct State {
    pub(crate) state: &'static str,
}

/// The reason of a binding's `Ready`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Why {
    pub(crate) reason: &'static str,
}

/// What is watched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Cache {
    pub(crate) cache: &'static str,
}

/// A histogram per label set.
type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The metrics.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) leader: Gauge,
    pub(crate) passes: Family<Pass, Counter>,
    pub(crate) pass_duration: Histograms<Result>,
    pub(crate) endpoint_to_register: Histogram,
    pub(crate) changes: Family<Change, Counter>,
    pub(crate) targets: Family<State, Gauge>,
    pub(crate) bindings: Family<Why, Gauge>,
    pub(crate) planned: Family<Change, Gauge>,
    pub(crate) gate_seconds: Histogram,
    pub(crate) pods_without_gate: Gauge,
    pub(crate) queue_depth: Gauge,
    pub(crate) stale_rules: Gauge,
    pub(crate) unreadable_bindings: Gauge,
    pub(crate) broken_off: Counter,
    pub(crate) cache_objects: Family<Cache, Gauge>,
    pub(crate) cache_age: Family<Cache, Gauge<f64, AtomicU64>>,
}

const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const LONG_SECONDS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 600.0];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    pub(crate) fn new(aws: &tgb_aws::Metrics) -> Self {
        let new = Self {
            registry: Registry::default(),
            leader: Gauge::default(),
            passes: Family::default(),
            pass_duration: Family::new_with_constructor(histogram),
            endpoint_to_register: histogram(),
            changes: Family::default(),
            targets: Family::default(),
            bindings: Family::default(),
            planned: Family::default(),
            gate_seconds: Histogram::new(LONG_SECONDS),
            pods_without_gate: Gauge::default(),
            queue_depth: Gauge::default(),
            stale_rules: Gauge::default(),
            unreadable_bindings: Gauge::default(),
            broken_off: Counter::default(),
            cache_objects: Family::default(),
            cache_age: Family::default(),
        };
        let mut r = Registry::with_prefix("tgb");
        aws.register(&mut r);
        r.register("leader", "1 while this replica leads", new.leader.clone());
        r.register("reconcile", "Passes over bindings, by result and reason of Ready", new.passes.clone());
        let help = "Duration of a pass, AWS's answers included";
        r.register_with_unit("reconcile_duration", help, Unit::Seconds, new.pass_duration.clone());
        let help = "From the change of an endpoint to AWS's answer to RegisterTargets";
        r.register_with_unit("endpoint_to_register", help, Unit::Seconds, new.endpoint_to_register.clone());
        r.register("target_changes", "Targets registered and deregistered", new.changes.clone());
        r.register("targets", "Targets of all bindings, by state", new.targets.clone());
        r.register("bindings", "Bindings by the reason of Ready", new.bindings.clone());
        let help = "Targets that paused bindings, or all with --observe, would change";
        r.register("planned_changes", help, new.planned.clone());
        let help = "From the registration of a pod's target to its gate's turning True";
        r.register_with_unit("readiness_gate", help, Unit::Seconds, new.gate_seconds.clone());
        let help = "Running pods that lack a readiness gate which their namespace asks for";
        r.register("pods_without_gate", help, new.pods_without_gate.clone());
        let help = "Bindings with a change that no pass has looked at yet";
        r.register("queue_depth", help, new.queue_depth.clone());
        let help = "Security group rules that no binding asks for and AWS does not take away";
        r.register("stale_rules", help, new.stale_rules.clone());
        let help = "Bindings that can't be read, so that nothing is done for them";
        r.register("unreadable_bindings", help, new.unreadable_bindings.clone());
        let help = "Workers that broke off and began anew, which is a defect";
        r.register("workers_broken_off", help, new.broken_off.clone());
        r.register("cache_objects", "Objects held", new.cache_objects.clone());
        let help = "For how long the watch has not been connected; 0 while it is";
        r.register_with_unit("cache_age", help, Unit::Seconds, new.cache_age.clone());
        Self { registry: r, ..new }
    }

    /// The text for Prometheus.
    pub(crate) fn text(&self) -> std::result::Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What users look metrics up in.
    const PAGE: &str = include_str!("../../docs/metrics.md");

    #[test]
    fn every_metric_is_explained() {
        let metrics = Metrics::new(&tgb_aws::Metrics::default());
        metrics.passes.get_or_create(&Pass { result: "ok", reason: "Reconciled" }).inc();
        metrics.pass_duration.get_or_create(&Result { result: "ok" }).observe(0.1);
        metrics.changes.get_or_create(&Change { change: "registered" }).inc();
        metrics.planned.get_or_create(&Change { change: "register" }).inc();
        metrics.targets.get_or_create(&State { state: "healthy" }).inc();
        metrics.bindings.get_or_create(&Why { reason: "Reconciled" }).inc();
        metrics.cache_objects.get_or_create(&Cache { cache: "pods" }).inc();
        metrics.cache_age.get_or_create(&Cache { cache: "pods" }).set(0.0);
        let text = metrics.text().unwrap();
        let names: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert!(names.len() > 10, "{text}");
        for name in names {
            let is_named = [name.to_owned(), format!("{name}_total")]
                .iter()
                .any(|name| PAGE.contains(&format!("| `{name}` |")));
            assert!(is_named, "docs/metrics.md does not name {name}");
        }
        assert!(text.contains("tgb_reconcile_total{result=\"ok\",reason=\"Reconciled\"} 1"), "{text}");
        assert!(text.contains("tgb_reconcile_duration_seconds_bucket"), "{text}");
    }
}
