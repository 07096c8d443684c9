//! The HTTPS server: limits on everything a stranger can spend, and an end that loses no request.
//!
//! API servers speak HTTP/1.1 to Services and keep their connections for minutes. So a replica that is told to stop says
//! `Connection: close` on every answer and goes on serving until its peers have gone elsewhere.

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// A client that has not finished its TLS handshake by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A client that has not sent its headers by then is dropped.
const HEADERS: Duration = Duration::from_secs(5);
/// At most this many bytes of headers.
const HEADER_BYTES: usize = 64 * 1024;
/// At most this many connections; API servers keep a few dozen.
const CONNECTIONS: usize = 2048;
/// At most this many requests at once on one HTTP/2 connection.
const STREAMS: u32 = 256;
/// What is in flight when serving ends gets this long.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// Set once the process was told to stop; from then on every answer closes its connection.
pub(crate) type Draining = Arc<AtomicBool>;

/// Listens at an address such as `:9443`, where an absent host means every address.
///
/// # Errors
/// The address can't be read or is taken; the text says which.
pub(crate) async fn listen(address: &str) -> io::Result<TcpListener> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot listen at {address}: {error}"));
    match address.strip_prefix(':') {
        // Where the machine has no IPv6, the unspecified IPv4 address is every address.
        Some(port) => match TcpListener::bind(format!("[::]:{port}")).await {
            Ok(listener) => Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(named(error)),
            Err(_) => TcpListener::bind(format!("0.0.0.0:{port}")).await.map_err(named),
        },
        None => TcpListener::bind(address).await.map_err(named),
    }
}

/// Serves until `stop`, then finishes what is in flight.
pub(crate) async fn serve_tls(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    router: Router,
    draining: Draining,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let router = router.layer(axum::middleware::from_fn(move |request: Request, next: Next| {
        let draining = draining.clone();
        async move { close_when_draining(&draining, next.run(request).await) }
    }));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(HEADER_BYTES);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS).max_header_list_size(64 * 1024);
    let builder = Arc::new(builder);
    loop {
        // A place first: who finds none waits in the listener's queue and costs nothing.
        let place = tokio::select! {
            () = stop.cancelled() => break,
            place = connections.clone().acquire_owned() => match place { Ok(place) => place, Err(_) => break },
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            // Out of file descriptors, most likely; the next attempt may find one.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (acceptor, builder, service) = (acceptor.clone(), builder.clone(), router.clone());
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let _place = place;
            let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
            };
            let service = TowerToHyperService::new(service);
            let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%peer, %error, "connection ended");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(LAST_ANSWERS, graceful.shutdown()).await.is_err() {
        tracing::warn!("connections that were still busy are dropped");
    }
}

/// Plain HTTP for probes and metrics.
pub(crate) async fn serve_plain(listener: TcpListener, router: Router, stop: CancellationToken) {
    let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
    if let Err(error) = served.await {
        tracing::error!(%error, "the server for probes and metrics ended");
    }
}

/// Where a listener listens.
pub(crate) fn address(listener: &TcpListener) -> Option<SocketAddr> {
    listener.local_addr().ok()
}

fn close_when_draining(draining: &AtomicBool, mut response: Response) -> Response {
    if draining.load(Ordering::Relaxed) && response.version() < axum::http::Version::HTTP_2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
