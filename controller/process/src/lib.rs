//! What both programs do as processes: log and trace, end on a signal, reach the cluster, listen.

use clap::{Args, ValueEnum};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::runtime::Tokio;
use opentelemetry_sdk::trace::SdkTracerProvider;
use opentelemetry_sdk::trace::span_processor_with_async_runtime::BatchSpanProcessor;
use std::future::Future;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// Requests cost less CPU than with glibc's allocator, let alone with that of musl, which the images are linked with; and what
/// many passes took at once goes back to the system. Without huge pages, with which 20 MB become 36.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For machines.
    Json,
    /// For people.
    Text,
}

/// The flags that say what is logged and traced.
#[derive(Debug, Clone, Args)]
pub struct Logging {
    /// Format of the log.
    #[arg(long, env = "TGB_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Level of the log: error, warn, info, debug, trace, or filters by target as in info,kube=debug.
    #[arg(long, env = "TGB_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Send traces to an OpenTelemetry collector, OTLP over HTTP, as in http://collector:4318 or https://collector:4318.
    #[arg(long, env = "TGB_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
}

/// Runs a program's work to its end: 0 if that is well, otherwise 1 and the sentence on stderr.
///
/// `threads` take turns at all tasks, whatever the node has: each one more makes requests dearer, since one that comes alone
/// wakes several, and costs memory. Long work belongs into `spawn_blocking` or `block_in_place`.
pub fn main(
    program: &'static str,
    threads: usize,
    logging: &Logging,
    work: impl Future<Output = Result<(), String>>,
) -> ExitCode {
    // Two providers in one binary would make rustls panic at the first connection.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let done = || -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
            .map_err(|error| format!("no runtime: {error}"))?;
        let _inside = runtime.enter();
        let _traces = logging.start(program)?;
        runtime.block_on(work)
    };
    match done() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Holds what has to be flushed at the end.
#[derive(Debug)]
struct Traces(Option<SdkTracerProvider>);

impl Drop for Traces {
    fn drop(&mut self) {
        if let Some(provider) = &self.0 {
            // A collector that is away must not hold up the end for long.
            let _ = provider.shutdown_with_timeout(Duration::from_secs(3));
        }
    }
}

impl Logging {
    /// Starts logging to stderr, and tracing if an endpoint is given. What it gives is kept until the end.
    fn start(&self, program: &'static str) -> Result<Traces, String> {
        let filter = EnvFilter::try_new(&self.log_level)
            .map_err(|error| format!("--log-level {}: {error}", self.log_level))?;
        let endpoint = self.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
        let provider = endpoint.map(|endpoint| exporter(program, endpoint)).transpose()?;
        let traces = provider
            .as_ref()
            .map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer(program)))
            // Ours alone, whatever is logged: the exporter's own requests must not become spans.
            .map(|layer| layer.with_filter(Targets::new().with_target("tgb_", LevelFilter::DEBUG)));
        let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
        let lines = match self.log_format {
            LogFormat::Json => lines.json().boxed(),
            LogFormat::Text => lines.boxed(),
        };
        tracing_subscriber::registry().with(traces).with(lines.with_filter(filter)).init();
        Ok(Traces(provider))
    }
}

fn exporter(program: &'static str, endpoint: &str) -> Result<SdkTracerProvider, String> {
    let said = |error: &dyn std::fmt::Display| format!("--otlp-endpoint {endpoint}: {error}");
    let base = endpoint.trim_end_matches('/');
    let secure = base.starts_with("https://");
    if !secure && !base.starts_with("http://") {
        return Err(said(&"expected http://HOST:PORT or https://HOST:PORT of a collector"));
    }
    let url = if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") };
    let timeout = Duration::from_secs(5);
    let mut exporter =
        opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(url).with_timeout(timeout);
    if secure {
        // Trusted is what the system trusts, or SSL_CERT_FILE.
        let connector = hyper_rustls::HttpsConnectorBuilder::new().with_native_roots();
        let connector = connector.map_err(|error| said(&error))?.https_only().enable_http1().build();
        exporter = exporter.with_http_client(HyperClient::new(connector, timeout, None));
    }
    let exporter = exporter.build().map_err(|error| said(&error))?;
    // The exporter's HTTP client needs the runtime, so that the SDK's own thread will not do.
    let batch = BatchSpanProcessor::builder(exporter, Tokio);
    let resource = opentelemetry_sdk::Resource::builder().with_service_name(program).build();
    Ok(SdkTracerProvider::builder().with_span_processor(batch.build()).with_resource(resource).build())
}

/// Two signals: the first asks for an orderly end, the second ends at once.
#[derive(Debug, Clone)]
pub struct Signals {
    /// SIGTERM or SIGINT came.
    pub first: CancellationToken,
    /// It came again.
    pub second: CancellationToken,
}

impl Signals {
    /// Takes the signals from now on.
    ///
    /// # Errors
    /// A sentence, if the system allows no handler.
    pub fn listen() -> Result<Self, String> {
        let handler = |kind| signal(kind).map_err(|error| format!("no signal handler: {error}"));
        let (mut terminate, mut interrupt) =
            (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
        let signals = Self { first: CancellationToken::new(), second: CancellationToken::new() };
        let tokens = signals.clone();
        tokio::spawn(async move {
            for token in [tokens.first, tokens.second] {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                token.cancel();
            }
        });
        Ok(signals)
    }
}

/// A client of the cluster: of a kubeconfig, or of what is found in the usual places and then in the pod.
///
/// # Errors
/// A sentence that says what to give.
pub async fn client(kubeconfig: Option<&Path>) -> Result<kube::Client, String> {
    let config = match kubeconfig {
        Some(path) => {
            let said = |error: &dyn std::fmt::Display| format!("--kubeconfig {}: {error}", path.display());
            let file = kube::config::Kubeconfig::read_from(path).map_err(|error| said(&error))?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .map_err(|error| said(&error))?
        }
        None => kube::Config::infer().await.map_err(|error| {
            format!("no cluster is known ({error}); give --kubeconfig, or run in a pod with a ServiceAccount")
        })?,
    };
    kube::Client::try_from(config).map_err(|error| error.to_string())
}

/// Listens on `HOST:PORT`, or on `:PORT` of every address, with or without IPv6.
///
/// # Errors
/// A sentence with the address.
pub async fn listen(address: &str) -> Result<TcpListener, String> {
    let every = address.strip_prefix(':');
    let first = every.map_or_else(|| address.to_owned(), |port| format!("[::]:{port}"));
    let listened = match (TcpListener::bind(&first).await, every) {
        (Err(_), Some(port)) => TcpListener::bind(format!("0.0.0.0:{port}")).await,
        (listened, _) => listened,
    };
    listened.map_err(|error| format!("can't listen on {address}: {error}"))
}

/// Reads `500ms`, `30s`, `5m`, `1h30m`; a number alone is seconds.
///
/// # Errors
/// A sentence that shows the form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let parsed: jiff::SignedDuration = text.parse().map_err(|error| format!("{error}; write it as 15s"))?;
    Duration::try_from(parsed).map_err(|_| "it can't be negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_with_a_unit_or_are_seconds() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("-1s").is_err() && duration("").is_err() && duration("soon").is_err());
    }
}
