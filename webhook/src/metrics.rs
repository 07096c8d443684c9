//! What `/metrics` tells.

use crate::admission::{Answer, Request};
use crate::convert::Converted;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

type Labels = [(&'static str, &'static str); 2];
type Histograms = Family<[(&'static str, &'static str); 1], Histogram, fn() -> Histogram>;

/// Most reviews take less than a millisecond; one that waits for AWS takes as long as that.
const SECONDS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

/// The metrics of the process.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    findings: Family<Labels, Counter>,
    requests: Family<Labels, Counter>,
    reviews: Family<[(&'static str, &'static str); 4], Counter>,
    review_durations: Histograms,
    conversions: Family<Labels, Counter>,
    conversion_duration: Histogram,
    /// End of the served certificate, seconds since the epoch.
    pub(crate) certificate_not_after: Gauge,
    /// 1 while a newer certificate is there that can't be served.
    pub(crate) certificate_refused: Gauge,
    /// 1 while several versions are served and the CRD has no conversion webhook.
    pub(crate) conversion_missing: Gauge,
    /// Webhook configurations and CRD that should be there and are not.
    pub(crate) configurations_missing: Gauge,
    /// Calls of AWS.
    pub(crate) aws: tgb_aws::Metrics,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tgb");
        let (findings, requests) =
            (Family::<Labels, Counter>::default(), Family::<Labels, Counter>::default());
        let (certificate_not_after, conversion_missing) = (Gauge::default(), Gauge::default());
        registry.register("findings", "Findings by rule and outcome", findings.clone());
        registry.register("webhook_requests", "Requests by path and HTTP status", requests.clone());
        registry.register(
            "certificate_not_after_seconds",
            "End of the served certificate, since the epoch",
            certificate_not_after.clone(),
        );
        let reviews = Family::default();
        let review_durations = Histograms::new_with_constructor(histogram);
        let (conversions, conversion_duration) = (Family::default(), histogram());
        let help = "Admission requests by webhook, operation, the rule that decided, and result";
        registry.register("admission_requests", help, Family::clone(&reviews));
        let help = "Duration of an admission request";
        registry.register("admission_duration_seconds", help, review_durations.clone());
        registry.register(
            "conversion_objects",
            "Objects converted, by versions",
            Family::clone(&conversions),
        );
        let help = "Duration of a conversion review";
        registry.register("conversion_duration_seconds", help, conversion_duration.clone());
        let certificate_refused = Gauge::default();
        registry.register(
            "certificate_refused",
            "1 while the newest certificate can't be served and an older one is",
            certificate_refused.clone(),
        );
        registry.register(
            "conversion_missing",
            "1 while several versions are served without a conversion webhook",
            conversion_missing.clone(),
        );
        let configurations_missing = Gauge::default();
        registry.register(
            "webhook_configurations_missing",
            "Webhook configurations and CustomResourceDefinition that do not exist",
            configurations_missing.clone(),
        );
        let aws = tgb_aws::Metrics::default();
        aws.register(&mut registry);
        Self {
            registry,
            findings,
            requests,
            reviews,
            review_durations,
            conversions,
            conversion_duration,
            certificate_not_after,
            certificate_refused,
            conversion_missing,
            configurations_missing,
            aws,
        }
    }
}

impl Metrics {
    /// Counts a finding.
    pub(crate) fn finding(&self, rule: &'static str, outcome: &'static str) {
        self.findings.get_or_create(&[("rule", rule), ("outcome", outcome)]).inc();
    }

    /// Counts a review; no answer is our own failure.
    pub(crate) fn reviewed(
        &self,
        webhook: &'static str,
        request: &Request<'_>,
        answer: Option<&Answer>,
        took: Duration,
    ) {
        let operation = match request.operation() {
            "CREATE" => "CREATE",
            "UPDATE" => "UPDATE",
            "DELETE" => "DELETE",
            _ => "other",
        };
        let result = match answer {
            Some(Answer { refusal: None, .. }) => "allowed",
            Some(_) => "denied",
            None => "failed",
        };
        let rule = answer.map_or("", |answer| answer.rule);
        let labels = [("webhook", webhook), ("operation", operation), ("rule", rule), ("result", result)];
        self.reviews.get_or_create(&labels).inc();
        self.review_durations.get_or_create(&[("webhook", webhook)]).observe(took.as_secs_f64());
    }

    /// Counts a conversion review.
    pub(crate) fn converted(&self, converted: &Converted, took: Duration) {
        for (from, to, count) in converted.pairs() {
            self.conversions.get_or_create(&[("from", from.name()), ("to", to.name())]).inc_by(count);
        }
        self.conversion_duration.observe(took.as_secs_f64());
    }

    /// Counts a request.
    pub(crate) fn request(&self, path: &'static str, code: u16) {
        let code = match code {
            200 => "200",
            400 => "400",
            404 => "404",
            405 => "405",
            408 => "408",
            413 => "413",
            500 => "500",
            503 => "503",
            _ => "other",
        };
        self.requests.get_or_create(&[("path", path), ("code", code)]).inc();
    }

    /// The text for Prometheus.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        if let Err(error) = encode(&mut out, &self.registry) {
            tracing::error!(%error, "metrics can't be written");
        }
        out
    }
}
