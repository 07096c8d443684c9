//! What both programs do as processes: log and trace, end on a signal, reach the cluster, listen and serve.

pub mod server;

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
use std::sync::OnceLock;
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

/// The running program, by whose name the API server knows it and calls it in `managedFields`.
static PROGRAM: OnceLock<&'static str> = OnceLock::new();

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
    PROGRAM.get_or_init(|| program);
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

/// How long the API server's answer to a write or a read may take to begin. A list of everything takes longer than one
/// object.
const WRITE: Duration = Duration::from_secs(20);
const READ: Duration = Duration::from_secs(60);
/// How long an answer that has begun may be silent: a little longer than a watch lasts.
const SILENCE: Duration = Duration::from_secs(295);

/// How objects are listed and watched: in answers of 50 objects. They are whole for a moment, and what they leave between what
/// is kept stays: with 500 it was as much as a thousand bindings take. Fewer would be more requests.
pub fn watching() -> kube::runtime::watcher::Config {
    kube::runtime::watcher::Config::default().page_size(50)
}

/// A client of the cluster: of a kubeconfig, or of what is found in the usual places and then in the pod. It never waits
/// for ever: a connection that died silently would stop whoever uses it.
///
/// # Errors
/// A sentence that says what to give.
pub async fn client(kubeconfig: Option<&Path>) -> Result<kube::Client, String> {
    let mut config = match kubeconfig {
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
    config.read_timeout = Some(SILENCE);
    kube::Client::try_from(config)
        .map(|client| limited(client, WRITE, READ))
        .map_err(|error| error.to_string())
}

/// An error of the cluster in one sentence: what the API server says, or why it could not be asked. `kube` writes the whole
/// answer behind it, in the words of the program.
pub fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let mut sentence = String::new();
    for error in chain {
        if let Some(kube::Error::Api(status)) = error.downcast_ref() {
            return match status.message.as_str() {
                "" => {
                    format!("the API server answered {} {}", status.code, status.reason).trim_end().to_owned()
                }
                message => message.to_owned(),
            };
        }
        let text = error.to_string();
        // Some print their cause themselves.
        if !sentence.contains(&text) {
            sentence.push_str(if sentence.is_empty() { "" } else { ": " });
            sentence.push_str(&text);
        }
    }
    sentence
}

/// The same client, which says by whom it is used, and whose answers begin in time or never.
fn limited(client: kube::Client, write: Duration, read: Duration) -> kube::Client {
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |mut request: http::Request<kube::client::Body>| {
        let client = client.clone();
        let agent = concat!("tgb/", env!("CARGO_PKG_VERSION"));
        let agent = PROGRAM.get().map_or(agent.to_owned(), |program| agent.replace("tgb", program));
        if let Ok(agent) = http::HeaderValue::try_from(agent) {
            request.headers_mut().entry(http::header::USER_AGENT).or_insert(agent);
        }
        async move {
            let patience = if request.method() == http::Method::GET { read } else { write };
            match tokio::time::timeout(patience, client.send(request)).await {
                Ok(answer) => answer,
                Err(_) => Err(kube::Error::Service("the API server did not answer in time".into())),
            }
        }
    });
    kube::Client::new(service, namespace)
}

/// The cause of a failed call of the API server, in the API server's own words.
pub fn cause(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("the API server answered {} {}", status.code, status.reason),
        error => error.to_string(),
    }
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

/// The flags of a program's commands that lack a sentence for `--help` or an environment variable `TGB_…`; for tests.
pub fn undocumented_flags(program: &clap::Command) -> Vec<String> {
    let all = program.get_subcommands().flat_map(|command| {
        let flags = command.get_arguments().filter_map(|flag| Some((flag, flag.get_long()?)));
        flags.map(move |(flag, name)| (flag, format!("{} --{name}", command.get_name())))
    });
    let lacks = |flag: &clap::Arg| {
        let variable = flag.get_env().and_then(std::ffi::OsStr::to_str).unwrap_or_default();
        !variable.starts_with("TGB_") || flag.get_help().is_none()
    };
    all.filter(|(flag, _)| lacks(flag)).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_that_does_not_begin_is_not_waited_for() {
        let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
            std::future::pending::<Result<http::Response<kube::client::Body>, kube::Error>>()
        });
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(3600));
        for (method, write, read) in [("GET", long, short), ("PATCH", short, long)] {
            let client = limited(kube::Client::new(silent, "default"), write, read);
            let request = http::Request::builder().method(method).uri("/version").body(Vec::new()).unwrap();
            let error = client.request_text(request).await.unwrap_err();
            assert!(error.to_string().contains("did not answer in time"), "{method}: {error}");
        }
    }

    #[tokio::test]
    async fn the_api_server_is_told_which_program_writes() {
        let echo = tower::service_fn(|request: http::Request<kube::client::Body>| async move {
            let agent = request.headers().get(http::header::USER_AGENT).cloned();
            let agent = agent.map(|agent| agent.as_bytes().to_vec()).unwrap_or_default();
            Ok::<_, kube::Error>(http::Response::new(kube::client::Body::from(agent)))
        });
        PROGRAM.get_or_init(|| "tgb-tested");
        let client = limited(kube::Client::new(echo, "default"), WRITE, READ);
        let request = http::Request::get("/version").body(Vec::new()).unwrap();
        let agent = client.request_text(request).await.unwrap();
        assert_eq!(agent, format!("tgb-tested/{}", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn an_error_of_the_cluster_is_told_in_one_sentence() {
        let answer = |message: &str| {
            let status = kube::core::Status::failure(message, "Forbidden").with_code(403);
            kube::Error::Api(status.boxed())
        };
        assert_eq!(told(&answer("configmaps \"x\" is forbidden")), "configmaps \"x\" is forbidden");
        assert_eq!(told(&answer("")), "the API server answered 403 Forbidden");
        let listing = kube::runtime::watcher::Error::InitialListFailed(answer("pods is forbidden"));
        assert_eq!(told(&listing), "pods is forbidden");
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "connection refused");
        assert_eq!(told(&kube::Error::Service(refused.into())), "ServiceError: connection refused");
    }

    #[test]
    fn a_flag_without_a_sentence_or_a_variable_is_named() {
        let flag = |name: &'static str| clap::Arg::new(name).long(name);
        let command = clap::Command::new("run").args([
            flag("good").env("TGB_GOOD").help("Does good."),
            flag("mute").env("TGB_MUTE"),
            flag("alone").help("Has no variable."),
        ]);
        let program = clap::Command::new("program").subcommand(command);
        assert_eq!(undocumented_flags(&program), ["run --mute", "run --alone"]);
    }

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
