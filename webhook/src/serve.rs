//! `tgb-webhook serve`: the flags, and how the parts come together.

use crate::admission::{Answer, Request};
use crate::bindings::Bindings;
use crate::lookup::{Cluster, TargetGroups};
use crate::metrics::Metrics;
use crate::{certificates, convert, pods, server, services};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tgb_api::rules::Settings;
use tgb_certs::Serving;
use tgb_process::{Logging, Signals, duration, listen};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

const ADMISSION_BODY: usize = 8 << 20;
const CONVERSION_BODY: usize = 64 << 20;
/// What the API server waits where the request does not say.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// For the way back.
const RESERVE: Duration = Duration::from_secs(1);

/// Flags of `serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Where the certificate comes from.
    #[arg(long, env = "TGB_CERT_MODE", value_enum, default_value_t = CertMode::SelfSigned)]
    pub(crate) cert_mode: CertMode,
    /// Certificate chain (PEM), for the modes cert-manager and files.
    #[arg(long, env = "TGB_TLS_CERT_FILE", required_if_eq_any([("cert_mode", "files"), ("cert_mode", "cert-manager")]))]
    pub(crate) tls_cert_file: Option<PathBuf>,
    /// Private key (PEM), for the modes cert-manager and files.
    #[arg(long, env = "TGB_TLS_KEY_FILE", required_if_eq_any([("cert_mode", "files"), ("cert_mode", "cert-manager")]))]
    pub(crate) tls_key_file: Option<PathBuf>,
    /// Namespace of the Secret with our authority, for the mode self.
    #[arg(long, env = "TGB_SELF_SECRET_NAMESPACE", default_value = "kube-system")]
    pub(crate) self_secret_namespace: String,
    /// Name of the Secret with our authority, for the mode self.
    #[arg(long, env = "TGB_SELF_SECRET_NAME", default_value = "tgb-webhook-ca")]
    pub(crate) self_secret_name: String,
    /// Name of the mutating and of the validating webhook configuration.
    #[arg(long, env = "TGB_WEBHOOK_CONFIG_NAME", default_value = "targetgroupbinding")]
    pub(crate) webhook_config_name: String,
    /// Name of the Service in front of this server.
    #[arg(long, env = "TGB_SERVICE_NAME", default_value = "tgb-webhook")]
    pub(crate) service_name: String,
    /// Namespace of that Service.
    #[arg(long, env = "TGB_SERVICE_NAMESPACE", default_value = "kube-system")]
    pub(crate) service_namespace: String,
    /// Name of the CustomResourceDefinition.
    #[arg(long, env = "TGB_CRD_NAME", default_value = tgb_api::names::CRD)]
    pub(crate) crd_name: String,
    /// Address of the HTTPS server.
    #[arg(long, env = "TGB_LISTEN", default_value = ":9443")]
    pub(crate) listen: String,
    /// Address of the HTTP server with probes and metrics.
    #[arg(long, env = "TGB_HTTP_LISTEN", default_value = ":8080")]
    pub(crate) http_listen: String,
    /// Name of the cluster; names the sessions of assumed roles.
    #[arg(long, env = "TGB_CLUSTER_NAME", default_value = "")]
    pub(crate) cluster_name: String,
    /// AWS region; otherwise from the environment or the instance's metadata.
    #[arg(long, env = "TGB_AWS_REGION")]
    pub(crate) aws_region: Option<String>,
    /// The cluster's VPC.
    #[arg(long, env = "TGB_AWS_VPC_ID")]
    pub(crate) aws_vpc_id: Option<String>,
    /// Severities that differ from docs/rules.md, as in TGB206=warn,TGB306=off.
    #[arg(long, env = "TGB_RULES", value_delimiter = ',')]
    pub(crate) rules: Vec<String>,
    /// Whether findings of policy refuse or warn.
    #[arg(long, env = "TGB_ENFORCE", value_enum, default_value_t = Enforce::Deny)]
    pub(crate) enforce: Enforce,
    /// What becomes of complete objects while AWS does not answer.
    #[arg(long, env = "TGB_AWS_UNAVAILABLE", value_enum, default_value_t = Unavailable::Admit)]
    pub(crate) aws_unavailable: Unavailable,
    /// Globs of roles that bindings may assume; none given: no role.
    #[arg(long, env = "TGB_ASSUME_ROLE_ALLOW", value_delimiter = ',')]
    pub(crate) assume_role_allow: Vec<String>,
    /// Tags that a target group must carry, as KEY or KEY=VALUE.
    #[arg(long, env = "TGB_REQUIRE_TARGET_GROUP_TAG", value_delimiter = ',')]
    pub(crate) require_target_group_tag: Vec<String>,
    /// The tag of a target group that lists the namespaces which may bind it.
    #[arg(long, env = "TGB_NAMESPACE_BINDING_TAG")]
    pub(crate) namespace_binding_tag: Option<String>,
    /// How long to go on serving after SIGTERM, as in 15s.
    #[arg(long, env = "TGB_SHUTDOWN_DELAY", default_value = "15s", value_parser = duration)]
    pub(crate) shutdown_delay: Duration,
    #[command(flatten)]
    pub(crate) logging: Logging,
    /// Namespaces to look at; none given: all.
    #[arg(long, env = "TGB_WATCH_NAMESPACES", value_delimiter = ',')]
    pub(crate) watch_namespaces: Vec<String>,
    /// Kubeconfig; otherwise the usual places, then the pod's ServiceAccount.
    #[arg(long, env = "TGB_KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// More DNS names or IP addresses for the certificate of the mode self.
    #[arg(
        long = "extra-dns-name",
        visible_alias = "tls-san",
        env = "TGB_EXTRA_DNS_NAME",
        value_delimiter = ','
    )]
    pub(crate) extra_dns_names: Vec<String>,
}

/// `--cert-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CertMode {
    /// An authority of our own in a Secret.
    #[value(name = "self")]
    SelfSigned,
    /// Files that cert-manager writes.
    CertManager,
    /// Any files.
    Files,
}

/// `--enforce`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Enforce {
    /// Refuse.
    Deny,
    /// Warn.
    Warn,
}

/// `--aws-unavailable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Unavailable {
    /// Admit with a warning.
    Admit,
    /// Refuse.
    Deny,
}

impl Options {
    fn settings(&self) -> Result<Settings, String> {
        let given =
            |texts: &[String]| -> Vec<String> { texts.iter().filter(|t| !t.is_empty()).cloned().collect() };
        let mut settings = Settings {
            region: self.aws_region.clone().filter(|region| !region.is_empty()),
            assume_role_allow: given(&self.assume_role_allow),
            namespace_tag: self.namespace_binding_tag.clone().filter(|tag| !tag.is_empty()),
            warn_only: self.enforce == Enforce::Warn,
            ..Default::default()
        };
        for text in given(&self.rules) {
            settings.set_rule(&text)?;
        }
        for text in given(&self.require_target_group_tag) {
            settings.require_tag(&text);
        }
        Ok(settings)
    }
}

/// Runs until a signal; 0 after an orderly end.
pub(crate) fn main(options: Options) -> ExitCode {
    let logging = options.logging.clone();
    tgb_process::main("tgb-webhook", &logging, run(options))
}

async fn run(options: Options) -> Result<(), String> {
    let settings = options.settings()?;
    let options = Arc::new(options);
    let stop = Signals::listen()?;
    let client = tgb_process::client(options.kubeconfig.as_deref()).await?;
    let https = listen(&options.listen).await?;
    let http = listen(&options.http_listen).await?;
    tracing::info!(https = ?https.local_addr().ok(), http = ?http.local_addr().ok(), "listening");

    let serving = Arc::new(Serving::default());
    let published = Arc::new(AtomicBool::new(false));
    let metrics = Arc::new(Metrics::default());
    tokio::spawn(certificates::keep(
        Arc::clone(&options),
        client.clone(),
        Arc::clone(&serving),
        Arc::clone(&published),
        Arc::clone(&metrics),
    ));

    let (told, settings) = tokio::sync::watch::channel(Arc::new(settings));
    let target_groups = connect(&options, told, metrics.aws.clone()).await;
    let cluster = Cluster::watch(client, &options.watch_namespaces);
    let bindings = Bindings {
        cluster,
        target_groups,
        settings,
        admit_without_aws: options.aws_unavailable == Unavailable::Admit,
        metrics: Arc::clone(&metrics),
    };
    let state =
        Arc::new(App { bindings, metrics, serving: Arc::clone(&serving), published, stop: stop.clone() });

    let tls = tgb_certs::server_config(serving).map_err(|e| e.to_string())?;
    let over = CancellationToken::new();
    let servers = async {
        tokio::join!(
            server::serve(https, Some(Arc::new(tls)), admission_routes(&state), over.clone()),
            server::serve(http, None, probe_routes(&state), over.clone()),
        )
    };
    let after_signal = async {
        stop.first.cancelled().await;
        tracing::info!(delay = ?options.shutdown_delay, "ending; still serving");
        tokio::time::sleep(options.shutdown_delay).await;
        over.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = servers => {}
        () = after_signal => {}
        () = stop.second.cancelled() => tracing::warn!("a second signal; ending at once"),
    }
    Ok(())
}

/// Connects to AWS, and completes the settings with who we are as soon as AWS says it.
async fn connect(
    options: &Options,
    told: tokio::sync::watch::Sender<Arc<Settings>>,
    metrics: tgb_aws::Metrics,
) -> Option<TargetGroups> {
    let settings = tgb_aws::Settings {
        region: options.aws_region.clone().filter(|region| !region.is_empty()),
        vpc_id: options.aws_vpc_id.clone(),
        cluster_name: options.cluster_name.clone(),
        metrics,
        ..Default::default()
    };
    let aws = match tgb_aws::Aws::connect(settings).await {
        Ok(aws) => aws,
        Err(error) => {
            tracing::error!(%error, "AWS can't be asked; objects that need it are refused");
            return None;
        }
    };
    told.send_modify(|settings| Arc::make_mut(settings).region = Some(aws.region().to_owned()));
    let asking = aws.clone();
    tokio::spawn(async move {
        let mut pause = Duration::from_secs(1);
        loop {
            match asking.identity().await {
                Ok(identity) => {
                    tracing::info!(account = identity.account, region = identity.region, "connected to AWS");
                    told.send_modify(|settings| {
                        let settings = Arc::make_mut(settings);
                        settings.account = Some(identity.account.clone());
                        settings.partition = Some(identity.partition.clone());
                    });
                    // Dropping the sender would be fine too: the last value stays.
                    return;
                }
                Err(error) => tracing::warn!(%error, "AWS does not say who we are"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(60));
        }
    });
    Some(TargetGroups::new(aws))
}

struct App {
    bindings: Bindings,
    metrics: Arc<Metrics>,
    serving: Arc<Serving>,
    published: Arc<AtomicBool>,
    stop: Signals,
}

type Shared = State<Arc<App>>;

fn admission_routes(state: &Arc<App>) -> Router {
    Router::new()
        .route("/convert", post(convert_review).layer(DefaultBodyLimit::max(CONVERSION_BODY)))
        .route("/mutate-elbv2-k8s-aws-targetgroupbinding", post(mutate))
        .route("/validate-elbv2-k8s-aws-targetgroupbinding", post(validate))
        .route("/validate-v1-service", post(service))
        .route("/mutate-v1-pod", post(pod))
        .layer(DefaultBodyLimit::max(ADMISSION_BODY))
        .layer(CatchPanicLayer::new())
        .layer(middleware::from_fn_with_state(Arc::clone(state), around))
        .with_state(Arc::clone(state))
}

/// Counts, and asks clients to leave once the end has begun.
async fn around(State(app): Shared, request: axum::extract::Request, next: Next) -> Response {
    let path = match request.uri().path() {
        "/convert" => "/convert",
        "/mutate-elbv2-k8s-aws-targetgroupbinding" => "/mutate-elbv2-k8s-aws-targetgroupbinding",
        "/validate-elbv2-k8s-aws-targetgroupbinding" => "/validate-elbv2-k8s-aws-targetgroupbinding",
        "/validate-v1-service" => "/validate-v1-service",
        "/mutate-v1-pod" => "/mutate-v1-pod",
        _ => "other",
    };
    let version = request.version();
    let mut response = match tokio::time::timeout(Duration::from_secs(30), next.run(request)).await {
        Ok(response) => response,
        Err(_) => (StatusCode::REQUEST_TIMEOUT, "the request took too long").into_response(),
    };
    app.metrics.request(path, response.status().as_u16());
    if app.stop.first.is_cancelled() && version < axum::http::Version::HTTP_2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn json(value: &serde_json::Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn bad(message: String) -> Response {
    (StatusCode::BAD_REQUEST, message).into_response()
}

/// `?timeout=10s`, as the API server sends it.
#[derive(Debug, serde::Deserialize)]
struct Timeout {
    timeout: Option<String>,
}

impl Timeout {
    fn left(&self) -> Duration {
        let whole = self.timeout.as_deref().and_then(|text| duration(text).ok()).unwrap_or(REVIEW_TIMEOUT);
        whole.saturating_sub(RESERVE).max(whole / 2)
    }
}

async fn convert_review(body: Bytes) -> Response {
    match convert::review(&body) {
        Ok(review) => json(&review),
        Err(message) => bad(message),
    }
}

async fn mutate(State(app): Shared, Query(timeout): Query<Timeout>, body: Bytes) -> Response {
    binding(&app, &timeout, &body, true).await
}

async fn validate(State(app): Shared, Query(timeout): Query<Timeout>, body: Bytes) -> Response {
    binding(&app, &timeout, &body, false).await
}

async fn binding(app: &App, timeout: &Timeout, body: &[u8], mutating: bool) -> Response {
    let request = match Request::read(body) {
        Ok(request) => request,
        Err(message) => return bad(message),
    };
    match app.bindings.review(&request, mutating, timeout.left()).await {
        Ok(answer) => json(&answer.review(&request)),
        Err(message) => {
            tracing::error!(message, "a review failed");
            (StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
        }
    }
}

async fn service(State(app): Shared, Query(timeout): Query<Timeout>, body: Bytes) -> Response {
    let request = match Request::read(&body) {
        Ok(request) => request,
        Err(message) => return bad(message),
    };
    let settings = Arc::clone(&app.bindings.settings.borrow());
    let review = services::review(&request, &app.bindings.cluster, &settings);
    let answer: Answer = tokio::time::timeout(timeout.left(), review).await.unwrap_or_default();
    for _ in &answer.warnings {
        app.metrics.finding("TGB501", "warned");
    }
    json(&answer.review(&request))
}

async fn pod(State(app): Shared, Query(timeout): Query<Timeout>, body: Bytes) -> Response {
    let request = match Request::read(&body) {
        Ok(request) => request,
        Err(message) => return bad(message),
    };
    match tokio::time::timeout(timeout.left(), pods::review(&request, &app.bindings.cluster)).await {
        Ok(answer) => json(&answer.review(&request)),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the cluster did not answer in time").into_response(),
    }
}

fn probe_routes(state: &Arc<App>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(async |State(app): Shared| app.metrics.text()))
        .with_state(Arc::clone(state))
}

#[derive(Debug, serde::Deserialize)]
struct Verbose {
    verbose: Option<String>,
}

async fn readyz(State(app): Shared, Query(query): Query<Verbose>) -> Response {
    let certificate = app.serving.state();
    let checks = [
        ("certificate", certificate.is_valid(jiff::Timestamp::now())),
        ("authority published", app.published.load(Ordering::Relaxed)),
        ("not ending", !app.stop.first.is_cancelled()),
    ];
    let ready = checks.iter().all(|(_, fine)| *fine);
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.verbose.is_none() {
        return (code, if ready { "ok" } else { "not ready" }).into_response();
    }
    let mut text = String::new();
    for (name, fine) in checks {
        text.push_str(&format!("[{}] {name}\n", if fine { "+" } else { "-" }));
    }
    if let Some(end) = certificate.not_after {
        text.push_str(&format!("certificate valid until {end}\n"));
    }
    if let Some(error) = certificate.last_error {
        text.push_str(&format!("the newest certificate is not served: {error}\n"));
    }
    (code, text).into_response()
}
