//! What `/metrics` tells.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Labels = [(&'static str, &'static str); 2];

/// The metrics of the process.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    findings: Family<Labels, Counter>,
    requests: Family<Labels, Counter>,
    /// End of the served certificate, seconds since the epoch.
    pub(crate) certificate_not_after: Gauge,
    /// 1 while a newer certificate is there that can't be served.
    pub(crate) certificate_refused: Gauge,
    /// 1 while several versions are served and the CRD has no conversion webhook.
    pub(crate) conversion_missing: Gauge,
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
        let aws = tgb_aws::Metrics::default();
        aws.register(&mut registry);
        Self {
            registry,
            findings,
            requests,
            certificate_not_after,
            certificate_refused,
            conversion_missing,
            aws,
        }
    }
}

impl Metrics {
    /// Counts a finding.
    pub(crate) fn finding(&self, rule: &'static str, outcome: &'static str) {
        self.findings.get_or_create(&[("rule", rule), ("outcome", outcome)]).inc();
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
