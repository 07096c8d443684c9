//! The listeners: TLS for the API server and plain HTTP for probes, with limits on everything that a client can hold up.
//!
//! A connection has to bring its first request soon, and later ones at once when they have begun. There is room for
//! [`Limits::connections`]; where one more comes, the one that was of least use is closed: whoever opens a thousand and
//! says nothing only closes their own.
//!
//! It is here and not in one of the programs since they are compiled to be small: what a connection does for each request
//! is generic code of hyper, which is compiled like the crate that asks for it.

use axum::Router;
use axum::response::Response;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// What a client may hold up.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections at the same time; below the 1,024 files that a process may open by default.
    connections: usize,
    /// From the connection to its first request, TLS handshake included; and from a request's first byte to the end of
    /// its headers (HTTP/1.1).
    headers: Duration,
    /// Without a request. Go's clients leave after 90 s; whoever closes first must be the client, or a request that is
    /// on its way is lost.
    idle: Duration,
}

const LIMITS: Limits =
    Limits { connections: 900, headers: Duration::from_secs(10), idle: Duration::from_secs(150) };
/// Bytes of a request's headers.
const HEADER_BYTES: u32 = 64 << 10;
/// Requests at the same time on one HTTP/2 connection.
const STREAMS: u32 = 250;
/// How often connections are looked at.
const SWEEP: Duration = Duration::from_millis(500);
/// How long a connection that has to go may take to say so.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long requests in flight may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(30);

/// Answers a request. A function and no axum router, which costs as much as a tenth of a review.
pub type Answer = Arc<dyn Fn(Request<Incoming>) -> Answering + Send + Sync>;
/// The answer on its way.
pub type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

/// Answers by an axum router.
pub fn routed(routes: Router) -> Answer {
    Arc::new(move |request| {
        let routes = routes.clone();
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
    let acceptor = tls.map(TlsAcceptor::from);
    let permits = Arc::new(Semaphore::new(limits.connections));
    let ending = CancellationToken::new();
    let table = Arc::new(Table { clock: Instant::now(), next: AtomicU64::new(0), rows: Mutex::default() });
    let connections = tokio_util::task::TaskTracker::new();
    let sweeping = {
        let table = Arc::clone(&table);
        let sweep = async move {
            let mut ticks = tokio::time::interval(SWEEP);
            loop {
                ticks.tick().await;
                table.sweep(limits);
            }
        };
        tokio::spawn(sweep)
    };
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                // Out of file descriptors, most likely.
                table.make_room();
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
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
        let row = table.enter(&ending);
        let (acceptor, app) = (acceptor.clone(), app.clone());
        connections.spawn(async move {
            let _permit = permit;
            let gone = row.seen.gone.clone();
            tokio::select! {
                () = connection(stream, acceptor, app, Arc::clone(&row.seen)) => {}
                () = gone.cancelled() => tracing::debug!("a connection of no use was closed"),
            }
        });
    }
    drop(listener);
    connections.close();
    ending.cancel();
    let _ = tokio::time::timeout(LAST_REQUESTS, connections.wait()).await;
    sweeping.abort();
}

async fn connection(stream: TcpStream, acceptor: Option<TlsAcceptor>, app: Answer, seen: Arc<Seen>) {
    let Some(acceptor) = acceptor else { return converse(stream, app, seen, false).await };
    match acceptor.accept(stream).await {
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
        .max_concurrent_streams(STREAMS);
    let busy = Arc::clone(&seen);
    let service = service_fn(move |request| {
        let busy = Busy::begin(&busy);
        let answer = app(request);
        async move {
            let answer = answer.await;
            drop(busy);
            Ok::<_, Infallible>(answer)
        }
    });
    let io = TokioIo::new(Watched { stream, seen: (!http2).then(|| Arc::clone(&seen)) });
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

// ---- who is there ----

/// What is known of a connection by those who may have to close it.
#[derive(Debug)]
struct Seen {
    /// What the times are counted from.
    clock: Instant,
    /// Requests that are being answered.
    busy: AtomicUsize,
    /// Whether there ever was one.
    used: AtomicBool,
    /// Since when there is none, in milliseconds.
    since: AtomicU64,
    /// When the first byte of a request came whose headers are not complete, in milliseconds; 0: there is none.
    head: AtomicU64,
    /// It was told to go by [`Table`], not by the end of everything.
    told: AtomicBool,
    /// It has to end after what is in flight.
    leave: CancellationToken,
    /// It has to end now.
    gone: CancellationToken,
}

impl Seen {
    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn is_told_to_go(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    fn tell_to_go(&self, now: bool) {
        self.told.store(true, Ordering::Relaxed);
        if now { self.gone.cancel() } else { self.leave.cancel() }
    }
}

/// A request that is being answered.
struct Busy(Arc<Seen>);

impl Busy {
    fn begin(seen: &Arc<Seen>) -> Self {
        seen.busy.fetch_add(1, Ordering::Relaxed);
        seen.used.store(true, Ordering::Relaxed);
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

/// All connections of a listener.
#[derive(Debug)]
struct Table {
    clock: Instant,
    next: AtomicU64,
    rows: Mutex<HashMap<u64, Arc<Seen>>>,
}

/// A connection's entry; it goes with the connection.
struct Row {
    table: Arc<Table>,
    id: u64,
    seen: Arc<Seen>,
}

impl Drop for Row {
    fn drop(&mut self) {
        self.table.rows().remove(&self.id);
    }
}

impl Table {
    fn rows(&self) -> MutexGuard<'_, HashMap<u64, Arc<Seen>>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, ending: &CancellationToken) -> Row {
        let seen = Seen {
            clock: self.clock,
            busy: AtomicUsize::new(0),
            used: AtomicBool::new(false),
            since: AtomicU64::new(0),
            head: AtomicU64::new(0),
            told: AtomicBool::new(false),
            leave: ending.child_token(),
            gone: CancellationToken::new(),
        };
        seen.since.store(seen.now(), Ordering::Relaxed);
        let seen = Arc::new(seen);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.rows().insert(id, Arc::clone(&seen));
        Row { table: Arc::clone(self), id, seen }
    }

    /// Closes what has been quiet, or slow, for too long.
    fn sweep(&self, limits: Limits) {
        for seen in self.rows().values() {
            if seen.busy.load(Ordering::Relaxed) > 0 {
                continue;
            }
            let now = seen.now();
            let passed = |since: u64| Duration::from_millis(now.saturating_sub(since));
            let (head, since) = (seen.head.load(Ordering::Relaxed), seen.since.load(Ordering::Relaxed));
            let unused = !seen.used.load(Ordering::Relaxed);
            if (head != 0 && passed(head) > limits.headers) || (unused && passed(since) > limits.headers) {
                seen.tell_to_go(true);
            } else if passed(since) > limits.idle {
                seen.tell_to_go(false);
            }
        }
    }

    /// Closes the connection that is of least use: one that never had a request before one that had, the one that has
    /// been quiet longest first. Those with a request in flight stay.
    fn make_room(&self) {
        let rows = self.rows();
        let idle = rows.values().filter(|seen| {
            seen.busy.load(Ordering::Relaxed) == 0 && !seen.is_told_to_go() && !seen.gone.is_cancelled()
        });
        let least =
            idle.min_by_key(|seen| (seen.used.load(Ordering::Relaxed), seen.since.load(Ordering::Relaxed)));
        if let Some(seen) = least {
            seen.tell_to_go(!seen.used.load(Ordering::Relaxed));
        }
    }
}

/// A stream that notes when a request begins.
struct Watched<S> {
    stream: S,
    /// Absent for HTTP/2, where not every byte belongs to a request.
    seen: Option<Arc<Seen>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Some(seen) = &self.seen
            && buffer.filled().len() > before
            && seen.busy.load(Ordering::Relaxed) == 0
        {
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
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "these are tests")]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const SOON: Duration = Duration::from_secs(20);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    async fn server(limits: Limits) -> (std::net::SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let app = routed(Router::new().route("/", get(async || "ok")));
        tokio::spawn(serve_within(listener, None, app, stop.clone(), limits));
        (address, stop)
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
}
