//! The HTTP edge: query protocol on `POST /`, control on `/_awsim/…`, on a thread of its own.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use crate::state::{
    Aws, Cluster, Eni, Instance, InstanceState, Probe, Quotas, SecurityGroup, Subnet, TargetId, Timing, Vpc,
};
use crate::wire::{AwsError, Service};
use crate::world::{Call, DEFAULT_ACCOUNT, Fault, Options, Request, Role, Wire, World};

/// A running awsim; it ends when this is dropped.
///
/// It has a thread of its own, so that tests with a paused clock or without a runtime can use it.
pub struct Server {
    world: Arc<World>,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A target with its state, for tables and tests.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct TargetRow {
    /// Address, instance id or ARN.
    pub id: String,
    /// The port.
    pub port: u16,
    /// The zone.
    pub zone: Option<String>,
    /// As in `healthy`.
    pub state: String,
    /// As in `Target.Timeout`.
    pub reason: Option<String>,
}

impl Server {
    /// Binds 127.0.0.1 and answers.
    ///
    /// # Errors
    /// If the port can't be bound or the thread can't be made.
    pub fn start(options: Options) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, options.port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let world = Arc::new(World::new(options));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shared = Arc::clone(&world);
        let thread = std::thread::Builder::new().name("awsim".to_owned()).spawn(move || {
            runtime.block_on(async move {
                match TcpListener::from_std(listener) {
                    Ok(listener) => tokio::select! {
                        () = accept(listener, shared) => {}
                        _ = stopped => {}
                    },
                    Err(error) => tracing::error!(%error, "awsim can't listen"),
                }
            });
        })?;
        Ok(Self { world, address, stop: Some(stop), thread: Some(thread) })
    }

    /// `http://127.0.0.1:PORT`, for `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes or reads the state of an account in a region directly.
    pub fn seed<R>(&self, account: &str, region: &str, f: impl FnOnce(&mut Aws) -> R) -> R {
        self.world.with(account, region, |aws, _| f(aws))
    }

    /// Appends every request with its answer to a file from now on, a JSON object per line, for a later check against
    /// AWS's own model.
    ///
    /// # Errors
    /// If the file can't be opened.
    pub fn record(&self, path: &std::path::Path) -> std::io::Result<()> {
        self.world.record_to(std::fs::File::options().create(true).append(true).open(path)?);
        Ok(())
    }

    /// Makes calls fail.
    pub fn fault(&self, fault: Fault) {
        self.world.add_fault(fault);
    }

    /// The faults that aren't used up.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        self.world.faults()
    }

    /// Takes away all faults.
    pub fn clear_faults(&self) {
        self.world.clear_faults(None, None);
    }

    /// Takes away the faults of an account.
    pub fn clear_faults_of(&self, account: &str) {
        self.world.clear_faults(None, Some(account));
    }

    /// Seeds the generator of faults with a probability.
    pub fn seed_random(&self, seed: u64) {
        self.world.seed_random(seed);
    }

    /// Switches throttling, of an account or of all that have no setting of their own; buckets are full then.
    pub fn throttle(&self, account: Option<&str>, on: bool) {
        self.world.throttle(account, on);
    }

    /// Makes a call as the user `user` of an account, without HTTP: faults, throttling and the journal are as for any
    /// other. A list is given as `Targets.member.1.Id`. Returns the XML of the answer.
    ///
    /// # Errors
    /// What AWS answers; also the faults `reset` and `lost_response`, with these as codes.
    pub fn call(
        &self,
        (account, user): (&str, &str),
        region: &str,
        service: Service,
        action: &str,
        parameters: &[(&str, &str)],
    ) -> Result<String, AwsError> {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("Action", action).append_pair("Version", service.version()).extend_pairs(parameters);
        let scope =
            format!("Credential=AKIA{account}{user}/20260101/{region}/{}/aws4_request", service.name());
        let body = form.finish();
        let reply = self.world.answer(Request { authorization: Some(&scope), body: body.as_bytes() });
        match reply.error {
            Some(error) => Err(error),
            None => Ok(reply.body),
        }
    }

    /// Sets what health checks of a target find, by ARN or name of the group; id `*` is every target. Returns how many
    /// targets there are.
    pub fn set_health(
        &self,
        account: &str,
        region: &str,
        group: &str,
        id: &str,
        port: Option<u16>,
        probe: &Probe,
    ) -> usize {
        self.world.with(account, region, |aws, now| aws.set_health(group, id, port, probe, now))
    }

    /// Changes the state of an instance.
    pub fn set_instance_state(&self, account: &str, region: &str, id: &str, to: InstanceState) {
        self.world.with(account, region, |aws, now| aws.set_instance_state(id, to, now));
    }

    /// The targets of a group, by ARN or name, draining ones included.
    #[must_use]
    pub fn targets(&self, account: &str, region: &str, group: &str) -> Vec<TargetRow> {
        self.world.with(account, region, |aws, now| rows(aws, group, now))
    }

    /// Moves the simulated clock, of an account or of all.
    pub fn advance(&self, account: Option<&str>, by: Duration) {
        self.world.advance(account, by);
    }

    /// Simulated seconds per real second; 0 stops the clock.
    pub fn scale(&self, scale: f64) {
        self.world.scale(scale);
    }

    /// The simulated time of an account, milliseconds since the epoch.
    #[must_use]
    pub fn now(&self, account: &str) -> u64 {
        self.world.now_of(account)
    }

    /// Real time since the server began, as [`Call::real_us`] counts it.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.world.elapsed()
    }

    /// All calls so far, the oldest first.
    #[must_use]
    pub fn journal(&self) -> Vec<Call> {
        self.world.journal(None)
    }

    /// The calls after the first `seen`, for who looks often: to read a long journal takes time, in which no call is
    /// answered.
    #[must_use]
    pub fn journal_after(&self, seen: usize) -> Vec<Call> {
        self.world.journal_after(seen)
    }

    /// The calls of an account.
    #[must_use]
    pub fn journal_of(&self, account: &str) -> Vec<Call> {
        self.world.journal(Some(account))
    }

    /// Forgets the calls, of an account or all.
    pub fn clear_journal(&self, account: Option<&str>) {
        self.world.clear_journal(account);
    }

    /// Adds a role that can be assumed.
    pub fn add_role(&self, role: Role) {
        self.world.add_role(role);
    }

    /// Forgets everything of an account, or of all.
    pub fn reset(&self, account: Option<&str>) {
        self.world.reset(account);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // it may have ended by itself
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn rows(aws: &Aws, group: &str, now: u64) -> Vec<TargetRow> {
    let Some(group) = aws.target_groups.values().find(|g| g.arn == group || g.name == group) else {
        return Vec::new();
    };
    group
        .targets
        .iter()
        .map(|((id, port), target): (&(TargetId, u16), _)| {
            let state = aws.target_state(group, id, target, now);
            TargetRow {
                id: id.to_string(),
                port: *port,
                zone: target.zone.as_deref().map(str::to_owned),
                state: state.state.to_owned(),
                reason: state.reason,
            }
        })
        .filter(|row| row.reason.as_deref() != Some("Target.NotRegistered"))
        .collect()
}

async fn accept(listener: TcpListener, world: Arc<World>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "awsim can't accept");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        // small answers shouldn't wait for more
        let _ = stream.set_nodelay(true);
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let reset = Arc::new(AtomicBool::new(false));
            let io = TokioIo::new(Socket { stream, reset: Arc::clone(&reset) });
            let service = service_fn(|request| serve(Arc::clone(&world), Arc::clone(&reset), request));
            if let Err(error) = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
            {
                tracing::trace!(%error, "connection");
            }
        });
    }
}

/// A socket that is reset, not closed, when `reset` is set.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed) {
            // the peer is gone else
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.reset.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

type Answer = hyper::Response<Full<Bytes>>;

/// The error that makes hyper drop a connection.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut by a fault")
    }
}

impl std::error::Error for Cut {}

impl From<Infallible> for Cut {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

const BODY_LIMIT: usize = 16 * 1024 * 1024;

async fn serve(
    world: Arc<World>,
    reset: Arc<AtomicBool>,
    request: hyper::Request<Incoming>,
) -> Result<Answer, Cut> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_LIMIT).collect().await else { return Err(Cut) };
    let body = body.to_bytes();
    if let Some(path) = head.uri.path().strip_prefix("/_awsim/") {
        let query = head.uri.query().unwrap_or_default();
        return Ok(match control(&world, &head.method, path, query, &body) {
            Ok(value) => respond(StatusCode::OK, "application/json", value.to_string(), None),
            Err((status, text)) => {
                let value = serde_json::json!({ "error": text });
                respond(status, "application/json", value.to_string(), None)
            }
        });
    }
    let form = if body.is_empty() { head.uri.query().unwrap_or_default().as_bytes() } else { &body };
    let authorization = head.headers.get(hyper::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let reply = world.answer(Request { authorization, body: form });
    if !reply.delay.is_zero() {
        tokio::time::sleep(reply.delay).await;
    }
    match reply.wire {
        Wire::Answer => {
            let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Ok(respond(status, "text/xml", reply.body, Some(&reply.request_id)))
        }
        Wire::Close => Err(Cut),
        Wire::Reset => {
            reset.store(true, Ordering::Relaxed);
            Err(Cut)
        }
    }
}

fn respond(status: StatusCode, kind: &'static str, body: String, request_id: Option<&str>) -> Answer {
    let mut response = hyper::Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    if let Some(value) = request_id.and_then(|id| hyper::header::HeaderValue::from_str(id).ok()) {
        headers.insert("x-amzn-requestid", value);
    }
    response
}

#[derive(Deserialize)]
#[serde(default)]
struct Place {
    account: String,
    region: String,
}

impl Default for Place {
    fn default() -> Self {
        Self { account: DEFAULT_ACCOUNT.to_owned(), region: "us-west-2".to_owned() }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Seed {
    #[serde(flatten)]
    place: Place,
    cluster: Option<Cluster>,
    vpcs: Vec<Vpc>,
    subnets: Vec<Subnet>,
    instances: Vec<Instance>,
    enis: Vec<Eni>,
    security_groups: Vec<SecurityGroup>,
    peerings: Vec<(String, String)>,
    prefix_lists: std::collections::BTreeMap<String, usize>,
    shifted_zones: Option<std::collections::BTreeSet<String>>,
    timing: Option<Timing>,
    quotas: Option<Quotas>,
}

#[derive(Deserialize)]
struct SetHealth {
    #[serde(flatten)]
    place: Place,
    target_group: String,
    id: String,
    port: Option<u16>,
    probe: Probe,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ClockChange {
    account: Option<String>,
    advance_ms: u64,
    scale: Option<f64>,
}

#[derive(Deserialize)]
struct Switch {
    account: Option<String>,
    throttle: Option<bool>,
    seed: Option<u64>,
}

type Control = Result<serde_json::Value, (StatusCode, String)>;

fn control(world: &World, method: &Method, path: &str, query: &str, body: &[u8]) -> Control {
    fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, (StatusCode, String)> {
        serde_json::from_slice(body).map_err(|e| (StatusCode::BAD_REQUEST, e.to_string()))
    }
    let argument = |name: &str| {
        form_urlencoded::parse(query.as_bytes()).find(|(k, _)| k == name).map(|(_, v)| v.into_owned())
    };
    let account = argument("account");
    let done = serde_json::json!({});
    match (method, path) {
        (&Method::GET, "ready") => {}
        (&Method::GET, "clock") => return Ok(serde_json::json!({ "now_ms": world.now() })),
        (&Method::POST, "clock") => {
            let change: ClockChange = read(body)?;
            if let Some(scale) = change.scale {
                world.scale(scale);
            }
            let account = change.account.as_deref();
            world.advance(account, Duration::from_millis(change.advance_ms));
            return Ok(
                serde_json::json!({ "now_ms": account.map_or_else(|| world.now(), |a| world.now_of(a)) }),
            );
        }
        (&Method::GET, "journal") => return Ok(serde_json::json!(world.journal(account.as_deref()))),
        (&Method::DELETE, "journal") => world.clear_journal(account.as_deref()),
        (&Method::GET, "faults") => return Ok(serde_json::json!(world.faults())),
        (&Method::POST, "faults") => world.add_fault(read(body)?),
        (&Method::DELETE, "faults") => world.clear_faults(argument("name").as_deref(), account.as_deref()),
        (&Method::POST, "health") => {
            let set: SetHealth = read(body)?;
            let count = world.with(&set.place.account, &set.place.region, |aws, now| {
                aws.set_health(&set.target_group, &set.id, set.port, &set.probe, now)
            });
            return Ok(serde_json::json!({ "targets": count }));
        }
        (&Method::POST, "seed") => {
            let seed: Seed = read(body)?;
            world.with(&seed.place.account, &seed.place.region, |aws, _| {
                aws.timing = seed.timing.unwrap_or(aws.timing);
                aws.quotas = seed.quotas.unwrap_or(aws.quotas);
                if let Some(cluster) = &seed.cluster {
                    aws.seed_cluster(cluster);
                }
                aws.vpcs.extend(seed.vpcs.into_iter().map(|r| (r.id.clone(), r)));
                aws.subnets.extend(seed.subnets.into_iter().map(|r| (r.id.clone(), r)));
                for instance in seed.instances {
                    aws.add_instance(instance, Vec::new(), Vec::new());
                }
                aws.enis.extend(seed.enis.into_iter().map(|r| (r.id.clone(), r)));
                aws.peerings.extend(seed.peerings);
                aws.prefix_lists.extend(seed.prefix_lists);
                aws.shifted_zones = seed.shifted_zones.unwrap_or(std::mem::take(&mut aws.shifted_zones));
                aws.security_groups.extend(seed.security_groups.into_iter().map(|r| (r.id.clone(), r)));
            });
        }
        (&Method::POST, "roles") => {
            let role: Role = read(body)?;
            world.add_role(role);
        }
        (&Method::POST, "options") => {
            let switch: Switch = read(body)?;
            if let Some(on) = switch.throttle {
                world.throttle(switch.account.as_deref(), on);
            }
            if let Some(seed) = switch.seed {
                world.seed_random(seed);
            }
        }
        (&Method::POST, "reset") => world.reset(account.as_deref()),
        (&Method::GET, "targets") => {
            let place = Place::default();
            let account = account.unwrap_or(place.account);
            let region = argument("region").unwrap_or(place.region);
            let all = world.with(&account, &region, |aws, now| {
                let names: Vec<String> = aws.target_groups.values().map(|g| g.name.clone()).collect();
                names
                    .into_iter()
                    .map(|n| (rows(aws, &n, now), n))
                    .map(|(r, n)| (n, r))
                    .collect::<std::collections::BTreeMap<_, _>>()
            });
            return Ok(serde_json::json!(all));
        }
        _ => return Err((StatusCode::NOT_FOUND, format!("no control '{method} {path}'"))),
    }
    Ok(done)
}
