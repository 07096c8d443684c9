//! The listeners: TLS for the API server and plain HTTP for probes, with limits on everything that a client can hold up.
//!
//! A connection has to bring its first request soon, and later ones at once when they have begun; a body comes at a least rate.
//! There is room for [`Limits::connections`], and for some of each address. Where one more comes, the one that is worth least is
//! closed ([`Worth`]): those that are late first, those that had requests answered last.
//!
//! It is here and not in one of the programs since they are compiled to be small: the code of hyper that runs for each request
//! is generic, and is compiled like the crate that asks for it.

use axum::Router;
use axum::body::Bytes;
use axum::response::Response;
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Bounds on what clients hold up.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections at the same time; below the 1,024 files that a process may open by default.
    connections: usize,
    /// Connections of one address.
    of_peer: usize,
    /// Requests whose body is not there yet. HTTP/1.1 has one for each connection.
    arriving: usize,
    /// From the connection to its first request, TLS handshake included; and from a request's first byte to the end of
    /// its headers (HTTP/1.1).
    headers: Duration,
    /// Without a request. Go's clients leave after 90 s; whoever closes first must be the client, or a request that is
    /// on its way is lost.
    idle: Duration,
}

const LIMITS: Limits = Limits {
    connections: 900,
    of_peer: 300,
    arriving: 1000,
    headers: Duration::from_secs(10),
    idle: Duration::from_secs(150),
};
/// Bytes of a request's headers; an API server sends less than one KiB.
const HEADER_BYTES: u32 = 16 << 10;
/// Requests at the same time on one HTTP/2 connection; RFC 9113 recommends no fewer.
const STREAMS: u32 = 100;
/// Bytes that an HTTP/2 client may send before they are read, on one stream and on the connection.
const WINDOW: u32 = 64 << 10;
/// Handshakes that are computed in turn: with hundreds at once, requests would wait for all of them.
const HANDSHAKES: usize = 4;
/// The time for which something may lack before its connection is late, and goes first where room is needed.
const PATIENCE: Duration = Duration::from_secs(1);
/// The time that a body may take, and a millisecond more for each so many bytes that came.
const BODY: Duration = Duration::from_secs(3);
const BYTES_PER_MS: usize = 4 << 10;
/// The time for which a client may leave an answer untaken.
const ANSWER: Duration = Duration::from_secs(30);
/// Bodies that are larger than [`SMALL_BODY`] at the same time, of one address.
const LARGE_OF_PEER: usize = 2;
/// How often connections are looked at.
const SWEEP: Duration = Duration::from_millis(500);
/// How long a connection that has to go may take to say so.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long requests in flight may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(30);
/// Bytes of a body that takes nothing of a [`Room`]: as many as requests that may arrive at once are bound by their number.
pub const SMALL_BODY: usize = 32 << 10;

/// Answers a request. A function and no axum router, which costs as much as a tenth of a review.
pub type Answer = Arc<dyn Fn(Request<Body>) -> Answering + Send + Sync>;
/// The answer on its way.
pub type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

/// Answers by an axum router, whose routes read no body.
pub fn routed(routes: Router) -> Answer {
    Arc::new(move |request| {
        let routes = routes.clone();
        let request = request.map(|_| axum::body::Body::empty());
        Box::pin(async move {
            let Ok(response) = routes.oneshot(request).await;
            response
        })
    })
}

/// Serves until `stop`, then lets requests in flight finish.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    app: Answer,
    stop: CancellationToken,
) {
    serve_within(listener, tls, app, stop, LIMITS).await;
}

async fn serve_within(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    app: Answer,
    stop: CancellationToken,
    limits: Limits,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let ending = CancellationToken::new();
    let table = Arc::new(Table::new(limits));
    let connections = tokio_util::task::TaskTracker::new();
    let sweeping = {
        let table = Arc::clone(&table);
        let sweep = async move {
            let mut ticks = tokio::time::interval(SWEEP);
            loop {
                ticks.tick().await;
                table.sweep();
            }
        };
        tokio::spawn(sweep)
    };
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok((stream, peer)) => (stream, peer.ip().to_canonical()),
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                // Out of file descriptors, most likely.
                table.make_room();
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        if !table.make_room_for(peer) {
            tracing::debug!(%peer, "a connection was refused: too many of its address are in use");
            continue;
        }
        let permit = loop {
            match Arc::clone(&permits).try_acquire_owned() {
                Ok(permit) => break Some(permit),
                Err(_) => table.make_room(),
            }
            tokio::select! {
                () = stop.cancelled() => break None,
                permit = Arc::clone(&permits).acquire_owned() => break permit.ok(),
                // Those that were told to go may all be busy.
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        };
        let Some(permit) = permit else { break };
        let _ = stream.set_nodelay(true);
        let row = table.enter(peer, &ending);
        let (tls, app) = (tls.clone().map(|tls| (tls, Arc::clone(&handshakes))), app.clone());
        connections.spawn(async move {
            let _permit = permit;
            let gone = row.seen.gone.clone();
            tokio::select! {
                () = connection(stream, tls, app, Arc::clone(&row.seen)) => {}
                () = gone.cancelled() => tracing::debug!(%peer, "a connection of no use was closed"),
            }
        });
    }
    drop(listener);
    connections.close();
    ending.cancel();
    let _ = tokio::time::timeout(LAST_REQUESTS, connections.wait()).await;
    sweeping.abort();
}

async fn connection(
    stream: TcpStream,
    tls: Option<(Arc<ServerConfig>, Arc<Semaphore>)>,
    app: Answer,
    seen: Arc<Seen>,
) {
    let Some((config, handshakes)) = tls else { return converse(stream, app, seen, false).await };
    let shaken = async {
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let answering = {
            let _turn = handshakes.acquire().await;
            let answering = hello.into_stream(config);
            // With the turn in hand: others that are ready go between.
            tokio::task::yield_now().await;
            answering
        };
        answering.await
    };
    match shaken.await {
        Ok(stream) => {
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            converse(stream, app, seen, http2).await;
        }
        Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: Answer,
    seen: Arc<Seen>,
    http2: bool,
) {
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut builder = if http2 { builder.http2_only() } else { builder.http1_only() };
    builder
        .http1()
        .timer(TokioTimer::new())
        // It would also run while a connection is idle; `Table::sweep` tells the two apart.
        .header_read_timeout(None)
        .max_buf_size(usize::try_from(HEADER_BYTES).unwrap_or(usize::MAX));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .max_header_list_size(HEADER_BYTES)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buf_size(usize::try_from(WINDOW).unwrap_or(usize::MAX))
        .max_concurrent_streams(STREAMS);
    let at = Arc::clone(&seen);
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = Busy::begin(&at);
        let answer = app(request.map(|incoming| Body::begin(incoming, &at)));
        async move {
            let answer = answer.await;
            drop(busy);
            Ok::<_, Infallible>(answer)
        }
    });
    let io = TokioIo::new(Watched { stream, seen: Arc::clone(&seen), heads: !http2 });
    let mut connection = pin!(builder.serve_connection(io, service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = seen.leave.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let patience = if seen.is_told_to_go() { FAREWELL } else { LAST_REQUESTS };
            match tokio::time::timeout(patience, connection).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "a connection ended");
    }
}

// ---- bodies ----

/// Memory for bodies that are larger than [`SMALL_BODY`], and for what is made of them.
#[derive(Debug)]
pub struct Room {
    /// In KiB.
    free: Arc<Semaphore>,
    whole: u32,
    most: usize,
    cost: fn(usize) -> usize,
}

impl Room {
    /// Has place for so many bytes. A body of at most `most` takes as much as `cost` says; the largest ones come one after
    /// the other, whatever they take.
    pub fn new(bytes: usize, most: usize, cost: fn(usize) -> usize) -> Self {
        let whole = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
        let permits = usize::try_from(whole).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(permits)), whole, most, cost }
    }

    /// Bytes of the largest body.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Waits for the memory of a body. Those of one address wait for each other first.
    async fn hold(&self, body: usize, peer: &Peer) -> Option<Held> {
        let turn = Arc::clone(&peer.large).acquire_owned().await.ok()?;
        let kib = u32::try_from((self.cost)(body) >> 10).unwrap_or(u32::MAX).clamp(1, self.whole);
        let memory = Arc::clone(&self.free).acquire_many_owned(kib).await.ok()?;
        Some(Held(Some(Arc::new([turn, memory]))))
    }
}

/// A part of a [`Room`], given back with the last clone; a small body's is nothing.
#[derive(Debug, Clone, Default)]
pub struct Held(Option<Arc<[OwnedSemaphorePermit; 2]>>);

impl Held {
    /// Bytes that are part of what is held.
    pub fn keep(self, bytes: Vec<u8>) -> Bytes {
        struct Kept(Vec<u8>, #[allow(dead_code, reason = "it is dropped with the bytes")] Held);
        impl AsRef<[u8]> for Kept {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        if self.0.is_some() { Bytes::from_owner(Kept(bytes, self)) } else { Bytes::from(bytes) }
    }
}

/// The reason why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It is larger than the room takes.
    #[error("the body is too large")]
    TooLarge,
    /// It comes too slowly.
    #[error("the body did not come in time")]
    Late,
    /// The client broke off.
    #[error("the body did not come as a whole")]
    Broken,
}

/// A whole body.
#[derive(Debug)]
pub struct Whole {
    /// Its bytes.
    pub bytes: Bytes,
    /// The memory that it takes.
    pub held: Held,
    peer: Arc<Peer>,
}

impl Whole {
    /// A place among the `most` requests of this address that are answered at the same time; none if they are taken.
    pub fn place(&self, most: usize) -> Option<Place> {
        let place = Place(Arc::clone(&self.peer));
        (self.peer.places.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }
}

/// A request that is being answered, among those of its address.
#[derive(Debug)]
pub struct Place(Arc<Peer>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request's body on its way.
#[derive(Debug)]
pub struct Body {
    incoming: Incoming,
    arriving: Option<Arriving>,
    seen: Arc<Seen>,
}

impl Body {
    fn begin(incoming: Incoming, seen: &Arc<Seen>) -> Self {
        let arriving = Arriving::begin(seen);
        if incoming.is_end_stream() {
            arriving.whole();
            return Self { incoming, arriving: None, seen: Arc::clone(seen) };
        }
        Self { incoming, arriving: Some(arriving), seen: Arc::clone(seen) }
    }

    /// Reads it whole, within the bounds of `room`.
    ///
    /// # Errors
    /// The reason why it is not read; the connection is then of no use any more.
    pub async fn read(mut self, room: &Room) -> Result<Whole, Unread> {
        let length = self.incoming.size_hint().exact().map(usize::try_from);
        // Without a length it may be of any.
        let expected = length.map_or(room.most, |length| length.unwrap_or(usize::MAX));
        if expected > room.most {
            return Err(Unread::TooLarge);
        }
        let mut begun = tokio::time::Instant::now();
        let (mut bytes, mut rest, mut held) = (Bytes::new(), Vec::new(), None);
        loop {
            let got = bytes.len() + rest.len();
            let rate = Duration::from_millis(u64::try_from(got / BYTES_PER_MS).unwrap_or(u64::MAX));
            let frame = std::future::poll_fn(|context| Pin::new(&mut self.incoming).poll_frame(context));
            let frame =
                tokio::time::timeout_at(begun + BODY + rate, frame).await.map_err(|_| Unread::Late)?;
            let Some(frame) = frame else { break };
            // What is not data are trailers.
            let Ok(data) = frame.map_err(|_| Unread::Broken)?.into_data() else { continue };
            if got + data.len() > room.most {
                return Err(Unread::TooLarge);
            }
            if got == 0 {
                bytes = data;
            } else {
                if rest.is_empty() {
                    rest.reserve_exact(expected.min(SMALL_BODY).max(bytes.len()));
                    rest.extend_from_slice(&bytes);
                    bytes = Bytes::new();
                }
                rest.extend_from_slice(&data);
            }
            if held.is_none() && bytes.len() + rest.len() > SMALL_BODY {
                // It is not the client that keeps us waiting.
                self.arriving = None;
                let waiting = tokio::time::Instant::now();
                held = Some(room.hold(expected, &self.seen.peer).await.ok_or(Unread::Broken)?);
                begun += waiting.elapsed();
                self.arriving = Some(Arriving::begin(&self.seen));
                rest.reserve_exact(expected.saturating_sub(rest.len()));
            }
        }
        if let Some(arriving) = self.arriving.take() {
            arriving.whole();
        }
        let bytes = if rest.is_empty() { bytes } else { Bytes::from(rest) };
        Ok(Whole { bytes, held: held.unwrap_or_default(), peer: Arc::clone(&self.seen.peer) })
    }
}

// ---- who is there ----

/// An address, and what it has of ours.
#[derive(Debug)]
struct Peer {
    address: IpAddr,
    connections: AtomicUsize,
    places: AtomicUsize,
    /// For large bodies.
    large: Arc<Semaphore>,
}

/// State of a connection, for those who may have to close it. Times are milliseconds of [`Table::clock`]; 0 is none.
#[derive(Debug)]
struct Seen {
    table: Arc<Table>,
    peer: Arc<Peer>,
    /// Requests that are being answered.
    busy: AtomicUsize,
    /// Those of them whose body is not there yet.
    arriving: AtomicUsize,
    /// Since when bodies are waited for, and none became whole.
    lacking: AtomicU64,
    /// It had a whole request.
    used: AtomicBool,
    /// Since when there is no request.
    since: AtomicU64,
    /// When the first byte of a request came whose headers are not complete.
    head: AtomicU64,
    /// Since when the client does not take what is written.
    stuck: AtomicU64,
    /// It was told to go by [`Table`], not by the end of everything.
    told: AtomicBool,
    /// It has to end after what is in flight.
    leave: CancellationToken,
    /// It has to end now.
    gone: CancellationToken,
}

/// Worth of a connection that may be closed where room is needed, the least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    /// Its handshake, headers, body or answer should have passed by now.
    Late,
    /// It had no whole request yet.
    New,
    /// Its next request is on its way.
    Arriving,
    /// It had requests, and waits for the next.
    Idle,
}

impl Seen {
    fn now(&self) -> u64 {
        self.table.now()
    }

    fn is_told_to_go(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    fn tell_to_go(&self, now: bool) {
        self.told.store(true, Ordering::Relaxed);
        if now { self.gone.cancel() } else { self.leave.cancel() }
    }

    /// Its worth; none if it must not be closed, or goes already.
    fn worth(&self, now: u64) -> Option<Worth> {
        if self.is_told_to_go() || self.gone.is_cancelled() {
            return None;
        }
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let [head, lacking, stuck, since] =
            [&self.head, &self.lacking, &self.stuck, &self.since].map(|at| at.load(Ordering::Relaxed));
        let (busy, arriving) = (read(&self.busy), read(&self.arriving));
        let is_used = self.used.load(Ordering::Relaxed);
        let unused = if is_used || busy > 0 { 0 } else { since };
        let is_late = |at: u64| at != 0 && passed(now, at) > PATIENCE;
        if [head, lacking, stuck, unused].into_iter().any(is_late) && busy <= arriving {
            Some(Worth::Late)
        } else if busy > arriving || stuck != 0 {
            None
        } else if !is_used {
            Some(Worth::New)
        } else if arriving > 0 || head != 0 {
            Some(Worth::Arriving)
        } else {
            Some(Worth::Idle)
        }
    }
}

fn passed(now: u64, since: u64) -> Duration {
    Duration::from_millis(now.saturating_sub(since))
}

/// A request that is being answered.
struct Busy(Arc<Seen>);

impl Busy {
    fn begin(seen: &Arc<Seen>) -> Self {
        seen.busy.fetch_add(1, Ordering::Relaxed);
        seen.head.store(0, Ordering::Relaxed);
        Self(Arc::clone(seen))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.since.store(self.0.now(), Ordering::Relaxed);
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request whose body is not there yet.
#[derive(Debug)]
struct Arriving(Arc<Seen>);

impl Arriving {
    fn begin(seen: &Arc<Seen>) -> Self {
        if seen.arriving.fetch_add(1, Ordering::Relaxed) == 0 {
            seen.lacking.store(seen.now(), Ordering::Relaxed);
        }
        let table = &seen.table;
        if table.arriving.fetch_add(1, Ordering::Relaxed) >= table.limits.arriving {
            table.relieve();
        }
        Self(Arc::clone(seen))
    }

    /// The body is there.
    fn whole(self) {
        self.0.used.store(true, Ordering::Relaxed);
        self.0.lacking.store(self.0.now(), Ordering::Relaxed);
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.0.arriving.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.lacking.store(0, Ordering::Relaxed);
        }
        self.0.table.arriving.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All connections of a listener.
#[derive(Debug)]
struct Table {
    limits: Limits,
    clock: Instant,
    /// Requests whose body is not there yet.
    arriving: AtomicUsize,
    rows: Mutex<Rows>,
}

#[derive(Debug, Default)]
struct Rows {
    next: u64,
    seen: HashMap<u64, Arc<Seen>>,
    peers: HashMap<IpAddr, Arc<Peer>>,
}

/// A connection's entry; it goes with the connection.
struct Row {
    id: u64,
    seen: Arc<Seen>,
}

impl Drop for Row {
    fn drop(&mut self) {
        let mut rows = self.seen.table.rows();
        rows.seen.remove(&self.id);
        let peer = &self.seen.peer;
        if peer.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
            rows.peers.remove(&peer.address);
        }
    }
}

impl Rows {
    /// The connection that is worth least: of the address with the most connections, the one that has been so longest.
    fn least(&self, now: u64, may_go: impl Fn(&Seen) -> bool) -> Option<&Arc<Seen>> {
        let all = self.seen.values().filter(|seen| may_go(seen));
        let worths = all.filter_map(|seen| seen.worth(now).map(|worth| (worth, seen)));
        let least = worths.min_by_key(|(worth, seen)| {
            let connections = seen.peer.connections.load(Ordering::Relaxed);
            (*worth, Reverse(connections), seen.since.load(Ordering::Relaxed))
        });
        least.map(|(worth, seen)| {
            // One that idles is told, so that its client sends no request into the void.
            seen.tell_to_go(worth != Worth::Idle);
            seen
        })
    }
}

impl Table {
    fn new(limits: Limits) -> Self {
        Self { limits, clock: Instant::now(), arriving: AtomicUsize::new(0), rows: Mutex::default() }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, address: IpAddr, ending: &CancellationToken) -> Row {
        let mut rows = self.rows();
        let peer = rows.peers.entry(address).or_insert_with(|| {
            let (connections, places) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Arc::new(Peer { address, connections, places, large: Arc::new(Semaphore::new(LARGE_OF_PEER)) })
        });
        peer.connections.fetch_add(1, Ordering::Relaxed);
        let seen = Arc::new(Seen {
            table: Arc::clone(self),
            peer: Arc::clone(peer),
            busy: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
            lacking: AtomicU64::new(0),
            used: AtomicBool::new(false),
            since: AtomicU64::new(self.now()),
            head: AtomicU64::new(0),
            stuck: AtomicU64::new(0),
            told: AtomicBool::new(false),
            leave: ending.child_token(),
            gone: CancellationToken::new(),
        });
        let id = rows.next;
        rows.next += 1;
        rows.seen.insert(id, Arc::clone(&seen));
        Row { id, seen }
    }

    /// Closes those that have been quiet, or slow, for too long.
    fn sweep(&self) {
        let (limits, now) = (self.limits, self.now());
        for seen in self.rows().seen.values() {
            let since = |at: &AtomicU64| match at.load(Ordering::Relaxed) {
                0 => Duration::ZERO,
                at => passed(now, at),
            };
            if since(&seen.stuck) > ANSWER {
                seen.tell_to_go(true);
            }
            if seen.busy.load(Ordering::Relaxed) > 0 {
                continue;
            }
            let is_unused = !seen.used.load(Ordering::Relaxed);
            if since(&seen.head) > limits.headers || (is_unused && since(&seen.since) > limits.headers) {
                seen.tell_to_go(true);
            } else if since(&seen.since) > limits.idle {
                seen.tell_to_go(false);
            }
        }
    }

    /// Closes the connection that is worth least.
    fn make_room(&self) {
        self.rows().least(self.now(), |_| true);
    }

    /// Closes one of this address's own where it has all that it may have; false if all of them are in use.
    fn make_room_for(&self, address: IpAddr) -> bool {
        let rows = self.rows();
        let connections = rows.peers.get(&address).map(|peer| peer.connections.load(Ordering::Relaxed));
        connections.is_none_or(|count| count < self.limits.of_peer)
            || rows.least(self.now(), |seen| seen.peer.address == address).is_some()
    }

    /// Closes the connection with the most requests whose body does not come.
    fn relieve(&self) {
        let rows = self.rows();
        let arriving = |seen: &Seen| seen.arriving.load(Ordering::Relaxed);
        // Those that were told to go end in a moment.
        let open: Vec<_> = rows.seen.values().filter(|seen| !seen.gone.is_cancelled()).collect();
        let most = open.iter().max_by_key(|seen| arriving(seen));
        if let Some(most) =
            most.filter(|_| open.iter().map(|seen| arriving(seen)).sum::<usize>() > self.limits.arriving)
        {
            most.tell_to_go(true);
        }
    }
}

/// A stream that notes when a request begins, and when an answer is not taken.
struct Watched<S> {
    stream: S,
    seen: Arc<Seen>,
    /// Every byte that comes while nothing is answered belongs to a request's head, unlike HTTP/2's.
    heads: bool,
}

impl<S> Watched<S> {
    fn note(&self, is_taken: bool) {
        let stuck = &self.seen.stuck;
        if !is_taken {
            let _ = stuck.compare_exchange(0, self.seen.now(), Ordering::Relaxed, Ordering::Relaxed);
        } else if stuck.load(Ordering::Relaxed) != 0 {
            stuck.store(0, Ordering::Relaxed);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let seen = &self.seen;
        if self.heads && buffer.filled().len() > before && seen.busy.load(Ordering::Relaxed) == 0 {
            let _ = seen.head.compare_exchange(0, seen.now(), Ordering::Relaxed, Ordering::Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if polled.is_pending() {
            self.note(false);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.note(polled.is_ready());
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        if polled.is_pending() {
            self.note(false);
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "these are tests")]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const SOON: Duration = Duration::from_secs(20);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    async fn server(limits: Limits) -> (std::net::SocketAddr, CancellationToken) {
        serving(limits, routed(Router::new().route("/", get(async || "ok")))).await
    }

    async fn serving(limits: Limits, app: Answer) -> (std::net::SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve_within(listener, None, app, stop.clone(), limits));
        (address, stop)
    }

    /// Answers how long a body is.
    fn reading(room: Room) -> Answer {
        let room = Arc::new(room);
        Arc::new(move |request| {
            let room = Arc::clone(&room);
            Box::pin(async move {
                use axum::response::IntoResponse as _;
                match request.into_body().read(&room).await {
                    Ok(whole) => format!("{} bytes", whole.bytes.len()).into_response(),
                    Err(Unread::TooLarge) => http::StatusCode::PAYLOAD_TOO_LARGE.into_response(),
                    Err(_) => http::StatusCode::REQUEST_TIMEOUT.into_response(),
                }
            })
        })
    }

    fn room() -> Room {
        Room::new(1 << 20, 600 << 10, |body| body)
    }

    async fn connect_from(own: [u8; 4], address: std::net::SocketAddr) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((own, 0).into()).unwrap();
        socket.connect(address).await.unwrap()
    }

    fn head(length: usize) -> Vec<u8> {
        format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n").into_bytes()
    }

    async fn post(stream: &mut TcpStream, body: &[u8]) -> String {
        stream.write_all(&[head(body.len()), body.to_vec()].concat()).await.unwrap();
        let mut answer = vec![0; 4096];
        let n = tokio::time::timeout(SOON, stream.read(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(answer.get(..n).unwrap()).into_owned()
    }

    /// A connection of a table.
    fn row(table: &Arc<Table>, peer: u8) -> Row {
        table.enter([10, 0, 0, peer].into(), &CancellationToken::new())
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(REQUEST).await.unwrap();
        let mut answer = vec![0; 4096];
        let n = tokio::time::timeout(SOON, stream.read(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(answer.get(..n).unwrap()).into_owned()
    }

    /// Waits until the other side has closed the connection.
    async fn closed(mut stream: TcpStream) {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    }

    #[tokio::test]
    async fn connections_that_say_nothing_give_way_to_those_that_ask() {
        let (address, _stop) = server(Limits { connections: 4, ..LIMITS }).await;
        let mut used = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut used).await.starts_with("HTTP/1.1 200"));
        let mut silent = Vec::new();
        for _ in 0..40 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut new).await.starts_with("HTTP/1.1 200"));
        assert!(ask(&mut used).await.starts_with("HTTP/1.1 200"), "one that is in use stays");
    }

    #[tokio::test]
    async fn slow_headers_are_cut_off_and_a_quiet_connection_is_kept() {
        let limits = Limits { headers: Duration::from_secs(1), ..LIMITS };
        let (address, _stop) = server(limits).await;
        let mut quiet = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut quiet).await.starts_with("HTTP/1.1 200"));
        let mut slow = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut slow).await.starts_with("HTTP/1.1 200"));
        slow.write_all(b"GET / HT").await.unwrap();
        let silent = TcpStream::connect(address).await.unwrap();
        closed(slow).await;
        closed(silent).await;
        assert!(ask(&mut quiet).await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn a_connection_that_has_been_idle_for_too_long_is_closed() {
        let (address, _stop) = server(Limits { idle: Duration::from_secs(1), ..LIMITS }).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut idle).await.starts_with("HTTP/1.1 200"));
        closed(idle).await;
    }

    #[tokio::test]
    async fn headers_without_end_are_refused() {
        let (address, _stop) = server(LIMITS).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nX: ").await.unwrap();
        let _ = stream.write_all(&vec![b'a'; 200 << 10]).await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }

    #[tokio::test]
    async fn idle_connections_do_not_hold_up_the_end() {
        let (address, stop) = server(LIMITS).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut idle).await.starts_with("HTTP/1.1 200"));
        stop.cancel();
        closed(idle).await;
    }
    #[tokio::test]
    async fn a_body_is_read_whole_in_pieces_and_without_a_length() {
        let (address, _stop) = serving(LIMITS, reading(room())).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        for length in [0, 1, SMALL_BODY, SMALL_BODY + 1, 600 << 10] {
            let answer = post(&mut stream, &vec![b'x'; length]).await;
            assert!(answer.ends_with(&format!("{length} bytes")), "{answer}");
        }
        let chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        let pieces = [&chunked[..], b"2\r\nab\r\n", &b"1\r\nc\r\n".repeat(40_000), b"0\r\n\r\n"].concat();
        stream.write_all(&pieces).await.unwrap();
        let mut answer = vec![0; 4096];
        let n = stream.read(&mut answer).await.unwrap();
        assert!(answer.get(..n).unwrap().ends_with(b"40002 bytes"));
        let answer = post(&mut stream, &vec![b'x'; (600 << 10) + 1]).await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    }

    #[tokio::test]
    async fn bodies_that_trickle_give_way_and_are_cut_off_and_a_kept_connection_stays() {
        let (address, _stop) = serving(Limits { connections: 4, ..LIMITS }, reading(room())).await;
        let mut kept = TcpStream::connect(address).await.unwrap();
        assert!(post(&mut kept, b"x").await.ends_with("1 bytes"));
        let mut slow = Vec::new();
        for _ in 0..40 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream.write_all(&[head(60_000), b"{".to_vec()].concat()).await;
            slow.push(stream);
        }
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(post(&mut new, b"xx").await.ends_with("2 bytes"));
        assert!(post(&mut kept, b"x").await.ends_with("1 bytes"), "it was answered before, and stays");
        for stream in slow {
            closed(stream).await;
        }
    }

    #[tokio::test]
    async fn one_address_has_its_share_and_others_keep_theirs() {
        let limits = Limits { connections: 8, of_peer: 3, ..LIMITS };
        let (address, _stop) = serving(limits, reading(room())).await;
        let mut kept = Vec::new();
        for _ in 0..3 {
            let mut stream = connect_from([127, 0, 0, 1], address).await;
            assert!(post(&mut stream, b"x").await.ends_with("1 bytes"));
            kept.push(stream);
        }
        let mut others = Vec::new();
        for _ in 0..20 {
            // Used ones are worth as much as those that are kept.
            let mut stream = connect_from([127, 0, 0, 2], address).await;
            assert!(post(&mut stream, b"x").await.ends_with("1 bytes"));
            others.push(stream);
        }
        // Any 17 of them: those that were answered within the same millisecond are worth the same.
        let (tell, mut told) = tokio::sync::mpsc::channel(others.len());
        for mut stream in others {
            let tell = tell.clone();
            tokio::spawn(async move {
                let _ = stream.read_to_end(&mut Vec::new()).await;
                let _ = tell.send(()).await;
            });
        }
        for _ in 0..17 {
            tokio::time::timeout(SOON, told.recv()).await.unwrap().unwrap();
        }
        for stream in &mut kept {
            assert!(post(stream, b"x").await.ends_with("1 bytes"));
        }
    }

    #[test]
    fn connections_are_worth_what_they_bring() {
        const NOW: u64 = 100_000;
        let table = Arc::new(Table::new(LIMITS));
        // Requests, bodies on their way, since when they lack; had a request; since when there is none; head; untaken answer.
        for (busy, arriving, lacking, used, since, head, stuck, worth) in [
            (0, 0, 0, false, NOW - 5_000, 0, 0, Some(Worth::Late)),
            (0, 0, 0, false, NOW - 500, 0, 0, Some(Worth::New)),
            (1, 1, NOW - 500, false, NOW - 5_000, 0, 0, Some(Worth::New)),
            (1, 1, NOW - 2_000, false, NOW - 5_000, 0, 0, Some(Worth::Late)),
            (1, 1, NOW - 2_000, true, NOW - 5_000, 0, 0, Some(Worth::Late)),
            (1, 1, NOW - 500, true, NOW - 5_000, 0, 0, Some(Worth::Arriving)),
            (0, 0, 0, true, NOW - 5_000, NOW - 500, 0, Some(Worth::Arriving)),
            (0, 0, 0, true, NOW - 5_000, NOW - 2_000, 0, Some(Worth::Late)),
            (0, 0, 0, true, NOW - 99_000, 0, 0, Some(Worth::Idle)),
            (0, 0, 0, true, NOW - 5_000, 0, NOW - 2_000, Some(Worth::Late)),
            (0, 0, 0, true, NOW - 5_000, 0, NOW - 500, None),
            (1, 0, 0, true, NOW - 5_000, 0, 0, None),
            (3, 2, NOW - 2_000, true, NOW - 5_000, 0, 0, None),
        ] {
            let row = row(&table, 1);
            let seen = &row.seen;
            for (place, value) in [(&seen.busy, busy), (&seen.arriving, arriving)] {
                place.store(value, Ordering::Relaxed);
            }
            for (place, at) in
                [(&seen.lacking, lacking), (&seen.since, since), (&seen.head, head), (&seen.stuck, stuck)]
            {
                place.store(at, Ordering::Relaxed);
            }
            seen.used.store(used, Ordering::Relaxed);
            let shown = (busy, arriving, lacking, used, since, head, stuck);
            assert_eq!(seen.worth(NOW), worth, "{shown:?}");
            seen.tell_to_go(true);
            assert_eq!(seen.worth(NOW), None, "it goes already");
        }
        assert!(Worth::Late < Worth::New && Worth::New < Worth::Arriving && Worth::Arriving < Worth::Idle);
    }

    #[test]
    fn room_is_made_by_the_address_with_the_most_connections_and_the_oldest_of_them() {
        let table = Arc::new(Table::new(LIMITS));
        let rows: Vec<Row> = [1, 2, 2, 3].into_iter().map(|peer| row(&table, peer)).collect();
        for (row, since) in rows.iter().zip([1, 9, 8, 2]) {
            row.seen.used.store(true, Ordering::Relaxed);
            row.seen.since.store(since, Ordering::Relaxed);
        }
        let told = || rows.iter().map(|row| row.seen.is_told_to_go()).collect::<Vec<_>>();
        table.make_room();
        assert_eq!(told(), [false, false, true, false]);
        assert!(!rows[2].seen.gone.is_cancelled(), "it idles, and may say goodbye");
    }

    #[test]
    fn the_connection_with_the_most_bodies_that_do_not_come_is_closed_and_no_other() {
        let table = Arc::new(Table::new(Limits { arriving: 20, ..LIMITS }));
        let (one, many) = (row(&table, 1), row(&table, 2));
        let mut bodies: Vec<_> = (0..19).map(|_| Arriving::begin(&many.seen)).collect();
        bodies.extend((0..5).map(|_| Arriving::begin(&one.seen)));
        assert!(many.seen.gone.is_cancelled() && !one.seen.gone.is_cancelled());
        drop(bodies);
        assert_eq!(table.arriving.load(Ordering::Relaxed), 0);
        assert_eq!(many.seen.lacking.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_answer_that_is_not_taken_ends_the_connection() {
        let table =
            Arc::new(Table { clock: Instant::now() - Duration::from_secs(3600), ..Table::new(LIMITS) });
        let (taken, untaken) = (row(&table, 1), row(&table, 1));
        let ago = |passed: Duration| table.now() - u64::try_from(passed.as_millis()).unwrap();
        taken.seen.stuck.store(ago(ANSWER / 2), Ordering::Relaxed);
        untaken.seen.stuck.store(ago(ANSWER + SWEEP), Ordering::Relaxed);
        table.sweep();
        assert!(!taken.seen.gone.is_cancelled() && untaken.seen.gone.is_cancelled());
    }

    #[tokio::test]
    async fn large_bodies_wait_for_memory_and_give_it_back_with_their_answers() {
        let table = Arc::new(Table::new(LIMITS));
        let (one, other) = (row(&table, 1), row(&table, 2));
        let room = Room::new(1 << 20, 1 << 20, |body| 2 * body);
        let hold = async |body, of: &Row| {
            let holding = room.hold(body, &of.seen.peer);
            tokio::time::timeout(Duration::from_millis(20), holding).await.ok().flatten()
        };
        let held = hold(300 << 10, &one).await.unwrap();
        assert!(hold(300 << 10, &other).await.is_none(), "both take more than there is");
        let small = hold(100 << 10, &one).await.unwrap();
        assert!(hold(1 << 10, &one).await.is_none(), "an address has two at a time");
        assert!(hold(1 << 10, &other).await.is_some());
        let answer = held.clone().keep(vec![0; 10]);
        let part = answer.slice(3..5);
        drop((held, answer, small));
        assert!(hold(300 << 10, &other).await.is_none(), "a part of the answer is not sent yet");
        drop(part);
        // What takes more than all of it comes alone.
        let held = hold(1 << 20, &other).await.unwrap();
        assert!(hold(1 << 10, &one).await.is_none());
        drop(held);
        assert!(hold(1 << 10, &one).await.is_some());
    }

    #[test]
    fn an_address_has_its_places() {
        let table = Arc::new(Table::new(LIMITS));
        let row = row(&table, 1);
        let whole = || Whole { bytes: Bytes::new(), held: Held::default(), peer: Arc::clone(&row.seen.peer) };
        let first = whole().place(1);
        assert!(first.is_some() && whole().place(1).is_none());
        drop(first);
        assert!(whole().place(1).is_some());
    }
}
