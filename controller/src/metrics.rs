//! What Prometheus reads.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// How a pass ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Result {
    pub(crate) result: &'static str,
}

/// The metrics.
pub(crate) struct Metrics {
    registry: Registry,
    /// Passes by how they ended.
    pub(crate) passes: Family<Result, Counter>,
    /// How long they took, seconds.
    pub(crate) pass_duration: Histogram,
    /// From the change in the index to AWS's answer to RegisterTargets, seconds.
    pub(crate) change_to_register: Histogram,
    /// Targets registered and deregistered.
    pub(crate) changes: Family<Result, Counter>,
    /// 1 while leading.
    pub(crate) leader: Gauge,
    pub(crate) bindings: Gauge,
    pub(crate) pods: Gauge,
}

const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("tgb");
        let passes = Family::<Result, Counter>::default();
        registry.register("reconciles", "Passes over bindings, by result", passes.clone());
        let pass_duration = Histogram::new(SECONDS);
        registry.register("reconcile_duration_seconds", "Duration of a pass", pass_duration.clone());
        let change_to_register = Histogram::new(SECONDS);
        registry.register(
            "change_to_register_seconds",
            "From a change in the cluster to AWS's answer to RegisterTargets",
            change_to_register.clone(),
        );
        let changes = Family::<Result, Counter>::default();
        registry.register("target_changes", "Targets registered and deregistered", changes.clone());
        let leader = Gauge::default();
        registry.register("leader", "1 while this replica leads", leader.clone());
        let bindings = Gauge::default();
        registry.register("bindings", "Bindings in the cache", bindings.clone());
        let pods = Gauge::default();
        registry.register("cached_pods", "Pods in the cache", pods.clone());
        Self { registry, passes, pass_duration, change_to_register, changes, leader, bindings, pods }
    }

    /// The text for Prometheus.
    pub(crate) fn text(&self) -> std::result::Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
