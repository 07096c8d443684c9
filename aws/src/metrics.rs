//! How calls of AWS fare, for Prometheus.

use crate::limits::CallClass;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    service: &'static str,
    operation: &'static str,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Operation {
    service: &'static str,
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    class: &'static str,
}

const SECONDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

/// Metrics of calls; clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    calls: Family<Call, Counter>,
    durations: Family<Operation, Histogram, fn() -> Histogram>,
    retries: Family<Operation, Counter>,
    waits: Family<Class, Histogram, fn() -> Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            calls: Family::default(),
            durations: Family::new_with_constructor(histogram),
            retries: Family::default(),
            waits: Family::new_with_constructor(histogram),
        }
    }
}

impl Metrics {
    /// Has them told by `registry`: `aws_calls_total{service,operation,code}`, `aws_call_duration_seconds` and
    /// `aws_call_retries_total` by service and operation, `aws_wait_seconds{class}`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("aws_calls", "Calls of AWS, by code; ok is success", self.calls.clone());
        registry.register(
            "aws_call_duration_seconds",
            "Duration of a call of AWS, without the wait before it",
            self.durations.clone(),
        );
        registry.register(
            "aws_call_retries",
            "Calls of AWS that were repeated at once",
            self.retries.clone(),
        );
        registry.register(
            "aws_wait_seconds",
            "How long calls waited for our own rate limit",
            self.waits.clone(),
        );
    }

    pub(crate) fn called(
        &self,
        class: CallClass,
        operation: &'static str,
        code: Option<&str>,
        took: Duration,
    ) {
        let service = class.service();
        let call = Call { service, operation, code: code.unwrap_or("ok").to_owned() };
        self.calls.get_or_create(&call).inc();
        self.durations.get_or_create(&Operation { service, operation }).observe(took.as_secs_f64());
    }

    pub(crate) fn repeated(&self, class: CallClass, operation: &'static str) {
        self.retries.get_or_create(&Operation { service: class.service(), operation }).inc();
    }

    pub(crate) fn waited(&self, class: CallClass, wait: Duration) {
        self.waits.get_or_create(&Class { class: class.as_str() }).observe(wait.as_secs_f64());
    }
}
