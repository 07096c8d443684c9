//! `tgb-webhook serve`: the flags, and how the parts come together.

use crate::admission::{Answer, Request};
use crate::bindings::{Bindings, Connection};
use crate::certificates::Health;
use crate::lookup::{Cluster, TargetGroups};
use crate::metrics::Metrics;
use crate::{certificates, convert, pods, services};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use clap::{Args, ValueEnum};
use futures::FutureExt as _;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tgb_api::rules::Settings;
use tgb_certs::Serving;
use tgb_process::server::{Held, Place, Room, Unread};
use tgb_process::{Logging, Signals, duration, listen, server};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use tracing::field::Empty;

const CONVERT: &str = "/convert";
const MUTATE: &str = "/mutate-elbv2-k8s-aws-targetgroupbinding";
const VALIDATE: &str = "/validate-elbv2-k8s-aws-targetgroupbinding";
const SERVICE: &str = "/validate-v1-service";
const POD: &str = "/mutate-v1-pod";
/// As the AWS Load Balancer Controller's.
const SERVER_ID: &str = "/mutate-v1-pod-server-id";
const PATHS: [&str; 6] = [CONVERT, MUTATE, VALIDATE, SERVICE, POD, SERVER_ID];

/// Bytes of a body.
const ADMISSION_BODY: usize = 8 << 20;
const CONVERSION_BODY: usize = 64 << 20;
/// Bytes of larger bodies at the same time, with what is made of them. The chart's limit is 256 MiB: less than half of it is
/// taken, connections and the program included.
const ADMISSION_ROOM: usize = 24 << 20;
const CONVERSION_ROOM: usize = 72 << 20;
/// Work on more bytes is not done where other requests wait for it.
const LONG_WORK: usize = 256 << 10;
/// Requests at the same time, and those of one address.
const REQUESTS: usize = 2000;
const OF_PEER: usize = 1000;
/// Nothing takes longer: neither the way of a body here nor its answer.
const LONGEST: Duration = Duration::from_secs(30);
/// What the API server waits where the request does not say.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// For the way back.
const RESERVE: Duration = Duration::from_secs(1);

/// One request after another costs a third less with one than with two, and eight at the same time are answered sooner.
const THREADS: usize = 1;

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
    /// Authorities (PEM) to publish in the configurations and the CRD, for the modes cert-manager and files; none given:
    /// somebody else writes them.
    #[arg(long, env = "TGB_TLS_CA_FILE")]
    pub(crate) tls_ca_file: Option<PathBuf>,
    /// Namespace of the Secret with our authority, for the mode self.
    #[arg(long, env = "TGB_SELF_SECRET_NAMESPACE", default_value = "kube-system")]
    pub(crate) self_secret_namespace: String,
    /// Name of the Secret with our authority, for the mode self.
    #[arg(long, env = "TGB_SELF_SECRET_NAME", default_value = "tgb-webhook-ca")]
    pub(crate) self_secret_name: String,
    /// Lifetime of our authority, for the mode self; the next one is made with a third of it left.
    #[arg(long, env = "TGB_CA_LIFETIME", default_value = "8760h", value_parser = duration)]
    pub(crate) ca_lifetime: Duration,
    /// Lifetime of a certificate of it; replaced with a third of it left.
    #[arg(long, env = "TGB_LEAF_LIFETIME", default_value = "168h", value_parser = duration)]
    pub(crate) leaf_lifetime: Duration,
    /// Name of the mutating and of the validating webhook configuration.
    #[arg(long, env = "TGB_WEBHOOK_CONFIG_NAME", default_value = "targetgroupbinding")]
    pub(crate) webhook_config_name: String,
    /// Name of the Service in front of this server.
    #[arg(long, env = "TGB_SERVICE_NAME", default_value = "tgb-webhook")]
    pub(crate) service_name: String,
    /// Namespace of that Service.
    #[arg(long, env = "TGB_SERVICE_NAMESPACE", default_value = "kube-system")]
    pub(crate) service_namespace: String,
    /// Name of the CustomResourceDefinition; empty where it is another installation's.
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
    /// Namespaces that may have Shared bindings, `*` being all; not given: nobody asks (TGB121).
    #[arg(long, env = "TGB_SHARED_TARGETS_NAMESPACES", value_delimiter = ',')]
    pub(crate) shared_targets_namespaces: Option<Vec<String>>,
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
    /// The CRD that this installation looks after.
    pub(crate) fn crd(&self) -> Option<&str> {
        Some(self.crd_name.as_str()).filter(|name| !name.is_empty())
    }

    fn settings(&self) -> Result<Settings, String> {
        let mut settings = Settings {
            region: self.aws_region.clone().filter(|region| !region.is_empty()),
            warn_only: self.enforce == Enforce::Warn,
            shared_namespaces: self.shared_targets_namespaces.clone(),
            ..Settings::of_tenants(
                &self.assume_role_allow,
                &self.require_target_group_tag,
                self.namespace_binding_tag.as_deref(),
            )
        };
        settings.set_rules(&self.rules)?;
        settings.refuse_softened()?;
        Ok(settings)
    }
}

/// Runs until a signal; 0 after an orderly end.
pub(crate) fn main(options: Options) -> ExitCode {
    let settings = match certificates::check(&options).and_then(|()| options.settings()) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let logging = options.logging.clone();
    tgb_process::main("tgb-webhook", THREADS, &logging, run(options, settings))
}

async fn run(options: Options, settings: Settings) -> Result<(), String> {
    let options = Arc::new(options);
    let stop = Signals::listen()?;
    let client = tgb_process::client(options.kubeconfig.as_deref()).await?;
    let https = listen(&options.listen).await?;
    let http = listen(&options.http_listen).await?;
    tracing::info!(https = ?https.local_addr().ok(), http = ?http.local_addr().ok(), "listening");

    let serving = Arc::new(Serving::default());
    let health = Arc::new(Health::default());
    let metrics = Arc::new(Metrics::default());
    let certificates = tokio::spawn(certificates::keep(
        Arc::clone(&options),
        client.clone(),
        Arc::clone(&serving),
        Arc::clone(&health),
        Arc::clone(&metrics),
    ));

    let (told, settings) = tokio::sync::watch::channel(Arc::new(settings));
    let (connected, aws) = tokio::sync::watch::channel(Connection::Looking);
    // Not awaited: conversion is needed before AWS is.
    tokio::spawn(connect(Arc::clone(&options), metrics.aws.clone(), told, connected));
    let cluster = Cluster::watch(client, &options.watch_namespaces);
    let bindings = Bindings {
        cluster,
        aws,
        settings,
        admit_without_aws: options.aws_unavailable == Unavailable::Admit,
        metrics: Arc::clone(&metrics),
    };
    let state = Arc::new(App {
        bindings,
        metrics,
        serving: Arc::clone(&serving),
        health,
        stop: stop.clone(),
        admission: Room::new(ADMISSION_ROOM, ADMISSION_BODY, admission_cost),
        conversion: Room::new(CONVERSION_ROOM, CONVERSION_BODY, convert::cost),
        places: Semaphore::new(REQUESTS),
    });

    let tls = tgb_certs::server_config(serving).map_err(|e| e.to_string())?;
    let over = CancellationToken::new();
    let servers = async {
        tokio::join!(
            server::serve(https, Some(Arc::new(tls)), guarded(&state, answer), over.clone()),
            server::serve(http, None, server::routed(probe_routes(&state)), over.clone()),
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
        ended = certificates => return match ended {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) | Err(_) => Err("nobody keeps the certificates any more".to_owned()),
        },
        () = after_signal => {}
        () = stop.second.cancelled() => tracing::warn!("a second signal; ending at once"),
    }
    Ok(())
}

/// Connects to AWS, and completes the settings with who we are as soon as AWS says it.
async fn connect(
    options: Arc<Options>,
    metrics: tgb_aws::Metrics,
    told: tokio::sync::watch::Sender<Arc<Settings>>,
    connected: tokio::sync::watch::Sender<Connection>,
) {
    let settings = tgb_aws::Settings {
        region: options.aws_region.clone().filter(|region| !region.is_empty()),
        vpc_id: options.aws_vpc_id.clone(),
        cluster_name: options.cluster_name.clone(),
        metrics,
        ..Default::default()
    };
    let mut pause = Duration::from_secs(1);
    let mut patience = async || {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(60));
    };
    let aws = loop {
        match tgb_aws::Aws::connect(settings.clone()).await {
            Ok(aws) => break aws,
            Err(error) => {
                tracing::error!(%error, "AWS can't be asked; objects that need it are refused");
                connected.send_replace(Connection::Failed(error.to_string()));
            }
        }
        patience().await;
    };
    told.send_modify(|settings| Arc::make_mut(settings).region = Some(aws.region().to_owned()));
    connected.send_replace(Connection::Made(Arc::new(TargetGroups::new(&aws))));
    loop {
        match aws.identity().await {
            Ok(identity) => {
                tracing::info!(account = identity.account, region = identity.region, "connected to AWS");
                told.send_modify(|settings| {
                    let settings = Arc::make_mut(settings);
                    settings.account = Some(identity.account.clone());
                    settings.partition = Some(identity.partition.clone());
                });
                return;
            }
            Err(error) => tracing::warn!(%error, "AWS does not say who we are"),
        }
        patience().await;
    }
}

struct App {
    bindings: Bindings,
    metrics: Arc<Metrics>,
    serving: Arc<Serving>,
    health: Arc<Health>,
    stop: Signals,
    /// For larger bodies.
    admission: Room,
    conversion: Room,
    /// For requests whose body is there.
    places: Semaphore,
}

/// Bytes that a review of so many takes, with the objects that are read from it.
fn admission_cost(body: usize) -> usize {
    body.saturating_mul(3)
}

type Asked = hyper::Request<server::Body>;

/// Its path, if it is one of ours.
fn known(request: &Asked) -> Option<&'static str> {
    PATHS.into_iter().find(|known| *known == request.uri().path())
}

/// Answers with `route`, within bounds: counts, and asks clients to leave once the end has begun. A panic in one request is its
/// own 500.
fn guarded<R, F>(app: &Arc<App>, route: R) -> server::Answer
where
    R: Fn(Arc<App>, Asked) -> F + Send + Sync + 'static,
    F: Future<Output = Response> + Send + 'static,
{
    let app = Arc::clone(app);
    Arc::new(move |request| {
        let path = known(&request).unwrap_or("other");
        let version = request.version();
        let (app, answer) = (Arc::clone(&app), route(Arc::clone(&app), request));
        Box::pin(async move {
            let answer = AssertUnwindSafe(answer).catch_unwind();
            let mut response = match tokio::time::timeout(LONGEST, answer).await {
                Ok(Ok(response)) => response,
                Ok(Err(_)) => (StatusCode::INTERNAL_SERVER_ERROR, "the request went wrong").into_response(),
                Err(_) => (StatusCode::REQUEST_TIMEOUT, "the request took too long").into_response(),
            };
            app.metrics.request(path, response.status().as_u16());
            if app.stop.first.is_cancelled() && version < axum::http::Version::HTTP_2 {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        })
    })
}

/// The reviews.
async fn answer(app: Arc<App>, request: Asked) -> Response {
    let Some(path) = known(&request) else { return StatusCode::NOT_FOUND.into_response() };
    if request.method() != Method::POST {
        return (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST")]).into_response();
    }
    let left = time_left(request.uri().query().unwrap_or_default());
    let body = match Body::read(&app, path, request).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    // Boxed, so that each takes the room that it needs and no more is moved.
    let answer: Pin<Box<dyn Future<Output = Result<Response, String>> + Send>> = match path {
        CONVERT => Box::pin(std::future::ready(converted(&app, &body))),
        MUTATE => Box::pin(binding(&app, &body, true, left)),
        VALIDATE => Box::pin(binding(&app, &body, false, left)),
        SERVICE => Box::pin(service(&app, &body, left)),
        POD => Box::pin(pod(&app, &body, left)),
        _ => Box::pin(server_id(&app, &body)),
    };
    // It is no review.
    answer.await.unwrap_or_else(|message| (StatusCode::BAD_REQUEST, message).into_response())
}

/// A whole body, and the place that its request takes.
struct Body<'a> {
    bytes: Bytes,
    held: Held,
    _places: (Place, SemaphorePermit<'a>),
}

impl<'a> Body<'a> {
    /// Reads it.
    ///
    /// # Errors
    /// The answer where it is too large or does not come, or where there are too many requests.
    async fn read(app: &'a App, path: &str, request: Asked) -> Result<Self, Response> {
        let room = if path == CONVERT { &app.conversion } else { &app.admission };
        let whole = request.into_body().read(room).await.map_err(|error| {
            tracing::debug!(%error, path, "a body was not read");
            match error {
                Unread::TooLarge => {
                    let message = format!("the body is larger than {} MiB", room.most() >> 20);
                    (StatusCode::PAYLOAD_TOO_LARGE, message).into_response()
                }
                Unread::Late => (StatusCode::REQUEST_TIMEOUT, error.to_string()).into_response(),
                Unread::Broken => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
            }
        })?;
        let places = whole.place(OF_PEER).zip(app.places.try_acquire().ok());
        let full = || (StatusCode::SERVICE_UNAVAILABLE, "too many requests at the same time").into_response();
        Ok(Self { _places: places.ok_or_else(full)?, bytes: whole.bytes, held: whole.held })
    }
}

fn json(body: impl Into<axum::body::Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

/// The time for a review, by its query: `timeout=10s`, as the API server sends it.
fn time_left(query: &str) -> Duration {
    let asked = query.split('&').find_map(|part| part.strip_prefix("timeout="));
    let asked = asked.and_then(|text| duration(text).ok()).unwrap_or(REVIEW_TIMEOUT);
    let whole = asked.min(LONGEST);
    whole.saturating_sub(RESERVE).max(whole / 2)
}

/// Does work on so many bytes; what takes long, aside: other requests go on. Nothing is waited for there, since each that waits
/// would take a thread.
pub(crate) fn aside<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes <= LONG_WORK { work() } else { tokio::task::block_in_place(work) }
}

fn converted(app: &App, body: &Body<'_>) -> Result<Response, String> {
    let begun = Instant::now();
    let (answer, counts) = aside(body.bytes.len(), || convert::review(&body.bytes))?;
    app.metrics.converted(&counts, begun.elapsed());
    Ok(json(answer.with(body.held.clone())))
}

async fn binding(app: &App, body: &Body<'_>, mutating: bool, left: Duration) -> Result<Response, String> {
    let (request, objects) = aside(body.bytes.len(), || Request::read_bindings(&body.bytes))?;
    let webhook = if mutating { "mtargetgroupbinding" } else { "vtargetgroupbinding" };
    let review = Box::pin(app.bindings.review(&request, objects, mutating, left));
    Ok(reviewed(app, webhook, &request, review).await)
}

async fn service(app: &App, body: &Body<'_>, left: Duration) -> Result<Response, String> {
    let (request, objects) = aside(body.bytes.len(), || Request::read(&body.bytes))?;
    let review = async {
        let settings = Arc::clone(&app.bindings.settings.borrow());
        let review = services::review(&request, objects, &app.bindings.cluster, &settings);
        let answer = in_time(left, review).await?;
        for _ in &answer.warnings {
            app.metrics.finding("TGB501", "warned");
        }
        Ok(answer)
    };
    Ok(reviewed(app, "vservice", &request, review).await)
}

async fn pod(app: &App, body: &Body<'_>, left: Duration) -> Result<Response, String> {
    let (request, objects) = aside(body.bytes.len(), || Request::read(&body.bytes))?;
    let gates = in_time(left, pods::gates(&request, objects, &app.bindings.cluster));
    Ok(reviewed(app, "mpod", &request, gates).await)
}

async fn server_id(app: &App, body: &Body<'_>) -> Result<Response, String> {
    let (request, objects) = aside(body.bytes.len(), || Request::read(&body.bytes))?;
    Ok(reviewed(app, "quicid", &request, async { pods::server_ids(&request, objects) }).await)
}

/// Answers an admission review; what the review itself can't do is HTTP 500.
async fn reviewed(
    app: &App,
    webhook: &'static str,
    request: &Request<'_>,
    review: impl Future<Output = Result<Answer, String>>,
) -> Response {
    let (uid, operation) = (request.uid(), request.operation());
    let (namespace, name) = (request.namespace(), request.name());
    // For traces. The log would format it for every review, so that its lines say themselves what they are about.
    let span = tracing::debug_span!(
        "admission",
        webhook,
        uid,
        operation,
        object = %format_args!("{namespace}/{name}"),
        arn = Empty
    );
    let begun = Instant::now();
    async {
        let answer = review.await;
        app.metrics.reviewed(webhook, request, answer.as_ref().ok(), begun.elapsed());
        match answer.and_then(|answer| answer.review(request)) {
            Ok(review) => json(review),
            Err(message) => {
                tracing::error!(error = message, uid, object = %format_args!("{namespace}/{name}"), "a review failed");
                (StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
            }
        }
    }
    .instrument(span)
    .await
}

async fn in_time(
    left: Duration,
    review: impl Future<Output = Result<Answer, String>>,
) -> Result<Answer, String> {
    let late = |_| Err("the cluster did not answer in time".to_owned());
    tokio::time::timeout(left, review).await.unwrap_or_else(late)
}

fn probe_routes(state: &Arc<App>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(async |State(app): State<Arc<App>>| app.metrics.text()))
        .with_state(Arc::clone(state))
}

#[derive(Debug, serde::Deserialize)]
struct Verbose {
    verbose: Option<String>,
}

async fn readyz(State(app): State<Arc<App>>, Query(query): Query<Verbose>) -> Response {
    let certificate = app.serving.state();
    let (published, problems) = app.health.get();
    let checks = [
        ("certificate", certificate.is_valid(jiff::Timestamp::now())),
        ("authority published", published),
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
    for problem in problems {
        text.push_str(&format!("{problem}\n"));
    }
    (code, text).into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]
mod tests {
    use super::*;
    use hyper::client::conn::{http1, http2};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use rustls::pki_types::ServerName;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Notify;

    const NAME: &str = "tgb-webhook.tgb-system.svc";
    const HOUR: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_secs(60);
    const PANICS: &str = "/panics";
    const WAITS: &str = "/waits";

    /// The server of production with two more routes: one that panics, and one that waits to be told.
    struct Guarded {
        address: std::net::SocketAddr,
        authority: tgb_certs::Authority,
        state: Arc<App>,
        go_on: Arc<Notify>,
        /// AWS is being looked for as long as this is there.
        _connected: tokio::sync::watch::Sender<Connection>,
    }

    async fn guarded_server() -> Guarded {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // Nobody is there; nothing of this asks.
        let client =
            kube::Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
        let metrics = Arc::new(Metrics::default());
        let (now, names) = (jiff::Timestamp::now(), [NAME.to_owned()]);
        let authority = tgb_certs::Authority::make(now, HOUR).unwrap();
        let serving = Arc::new(Serving::default());
        serving.swap(tgb_certs::Leaf::issue(&authority, &names, now, HOUR).unwrap().pair);
        let (_connected, aws) = tokio::sync::watch::channel(Connection::Looking);
        let bindings = Bindings {
            cluster: Cluster::watch(client, &["nowhere".to_owned()]),
            aws,
            settings: tokio::sync::watch::channel(Arc::default()).1,
            admit_without_aws: true,
            metrics: Arc::clone(&metrics),
        };
        let state = Arc::new(App {
            bindings,
            metrics,
            serving: Arc::clone(&serving),
            health: Arc::default(),
            stop: Signals { first: CancellationToken::new(), second: CancellationToken::new() },
            admission: Room::new(ADMISSION_ROOM, ADMISSION_BODY, admission_cost),
            conversion: Room::new(CONVERSION_ROOM, CONVERSION_BODY, convert::cost),
            places: Semaphore::new(2),
        });
        let go_on = Arc::new(Notify::new());
        let waited_for = Arc::clone(&go_on);
        let route = move |app: Arc<App>, request: Asked| {
            let waited_for = Arc::clone(&waited_for);
            async move {
                match request.uri().path() {
                    PANICS => {
                        let _whole = Body::read(&app, PANICS, request).await;
                        panic!("a test asked for it")
                    }
                    WAITS => {
                        let _whole = Body::read(&app, WAITS, request).await;
                        waited_for.notified().await;
                        StatusCode::OK.into_response()
                    }
                    _ => answer(app, request).await,
                }
            }
        };
        let app = guarded(&state, route);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = Arc::new(tgb_certs::server_config(serving).unwrap());
        tokio::spawn(server::serve(listener, Some(tls), app, CancellationToken::new()));
        Guarded { address, authority, state, go_on, _connected }
    }

    impl Guarded {
        async fn connect(&self, protocol: &str) -> TokioIo<tokio_rustls::client::TlsStream<TcpStream>> {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(self.authority.certificate().clone()).unwrap();
            let mut config =
                rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
            config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
            let stream = TcpStream::connect(self.address).await.unwrap();
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            TokioIo::new(connector.connect(ServerName::try_from(NAME).unwrap(), stream).await.unwrap())
        }

        fn request(&self, path: &str) -> hyper::Request<axum::body::Body> {
            let review = r#"{"kind":"ConversionReview","request":{"uid":"u","desiredAPIVersion":"elbv2.k8s.aws/v1","objects":[]}}"#;
            let uri = format!("https://{NAME}{path}");
            hyper::Request::post(uri).header(header::HOST, NAME).body(axum::body::Body::from(review)).unwrap()
        }
    }

    async fn read(response: hyper::Response<hyper::body::Incoming>) -> (u16, String) {
        let code = response.status().as_u16();
        let bytes = axum::body::to_bytes(axum::body::Body::new(response.into_body()), 1 << 20).await.unwrap();
        (code, String::from_utf8_lossy(&bytes).into_owned())
    }

    #[test]
    fn a_review_has_the_time_that_the_api_server_waits_less_a_second() {
        let left = |query: &str| time_left(query).as_secs_f64();
        let asked = ["timeout=10s", "timeout=2s", "dry=1&timeout=3s", "timeout=1m30s"];
        assert_eq!(asked.map(left), [9.0, 1.0, 2.0, 29.0]);
        assert_eq!(left("timeout=1s"), 0.5, "rather than nothing");
        assert_eq!(["", "timeout=soon", "timeout="].map(left), [9.0; 3]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_route_that_panics_is_its_own_500_and_the_connection_and_others_go_on() {
        let server = guarded_server().await;
        let converted = |(code, text): (u16, String)| {
            assert!(code == 200 && text.contains(r#""status":"Success""#), "{code} {text}");
        };
        let work = async {
            // HTTP/1.1, as API servers speak to Services: one connection, more panics than there is room for requests.
            let (mut one, connection) = http1::handshake(server.connect("http/1.1").await).await.unwrap();
            tokio::spawn(connection);
            for _ in 0..5 {
                one.ready().await.unwrap();
                let (code, text) = read(one.send_request(server.request(PANICS)).await.unwrap()).await;
                assert_eq!(code, 500, "{text}");
                assert!(!text.contains("a test asked for it"), "what went wrong inside is nobody's: {text}");
                one.ready().await.unwrap();
                converted(read(one.send_request(server.request(CONVERT)).await.unwrap()).await);
            }
            // HTTP/2: beside a request of the same connection that is under way.
            let io = server.connect("h2").await;
            let (mut many, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            let under_way = tokio::spawn(many.send_request(server.request(WAITS)));
            while server.state.places.available_permits() > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(read(many.send_request(server.request(PANICS)).await.unwrap()).await.0, 500);
            converted(read(many.send_request(server.request(CONVERT)).await.unwrap()).await);
            server.go_on.notify_one();
            assert_eq!(read(under_way.await.unwrap().unwrap()).await.0, 200);
        };
        tokio::time::timeout(SOON, work).await.unwrap();
        assert_eq!(server.state.places.available_permits(), 2, "a request that panicked holds nothing");
        assert!(server.state.metrics.text().contains(r#"code="500"} 6"#), "{}", server.state.metrics.text());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_long_review_does_not_hold_up_others() {
        let (asked, answered) = std::sync::mpsc::channel();
        let long = tokio::spawn(async move {
            // Where the long one stays on the only thread, this one never gets its turn.
            tokio::spawn(async move { asked.send("another review").unwrap() });
            aside(LONG_WORK + 1, || answered.recv_timeout(Duration::from_secs(60)))
        });
        assert_eq!(long.await.unwrap(), Ok("another review"));
    }
    #[test]
    fn large_reviews_that_wait_for_aws_take_no_thread_from_others() {
        // Three threads in all. A review of more than LONG_WORK bytes that waited aside would keep one each.
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).max_blocking_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let server = guarded_server().await;
            let note = "x".repeat(LONG_WORK);
            let body = format!(
                r#"{{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{{"uid":"u","operation":"CREATE","namespace":"shop","object":{{"apiVersion":"elbv2.k8s.aws/v1","kind":"TargetGroupBinding","metadata":{{"name":"web","annotations":{{"note":"{note}"}}}},"spec":{{"targetGroup":{{"arn":"arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb"}},"serviceRef":{{"name":"web","port":80}}}}}}}}}}"#
            );
            let io = server.connect("h2").await;
            let (mut many, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            let uri = format!("https://{NAME}{MUTATE}?timeout=60s");
            let mut waiting = Vec::new();
            for _ in 0..2 {
                let body = axum::body::Body::from(body.clone());
                let request = hyper::Request::post(&uri).header(header::HOST, NAME).body(body).unwrap();
                waiting.push(tokio::spawn(many.send_request(request)));
            }
            // Both are there, and wait for AWS.
            while server.state.places.available_permits() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let (mut one, connection) = http1::handshake(server.connect("http/1.1").await).await.unwrap();
            tokio::spawn(connection);
            let asked = one.send_request(server.request(CONVERT));
            let (code, text) = read(tokio::time::timeout(SOON, asked).await.unwrap().unwrap()).await;
            assert_eq!(code, 503, "it is answered, and there are two places: {text}");
            assert!(waiting.iter().all(|review| !review.is_finished()));
        });
        runtime.shutdown_background();
    }
}
