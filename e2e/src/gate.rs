//! Stands between the controller and the API server, and lets one chosen write go unanswered: it is done, and whoever
//! made it never hears so. Who is killed then stands exactly between two calls.

use crate::{Cluster, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;

/// See above. Leases and events are not counted.
pub struct Gate {
    address: SocketAddr,
    counted: Arc<Mutex<Counted>>,
    /// Ends with us.
    _runtime: Runtime,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("address", &self.address).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Counted {
    /// So many writes are answered before the one that is not.
    left: Option<usize>,
    reached: Option<String>,
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

impl Gate {
    /// Listens on a port of its own and forwards to the API server of the cluster.
    ///
    /// # Errors
    /// When there is no free port.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let said = |error: &dyn std::fmt::Display| format!("no gate: {error}");
        let ca = CertificateDer::from_pem_slice(cluster.ca_pem().as_bytes()).map_err(|e| said(&e))?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca).map_err(|e| said(&e))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| said(&e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (connector, server) = (TlsConnector::from(Arc::new(config)), cluster.address()?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("gate")
            .enable_all()
            .build()
            .map_err(|e| said(&e))?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).map_err(|e| said(&e))?;
        let address = listener.local_addr().map_err(|e| said(&e))?;
        let counted = Arc::new(Mutex::new(Counted::default()));
        let counts = Arc::clone(&counted);
        runtime.spawn(async move {
            loop {
                // an error concerns the one connection, or passes
                let Ok((stream, _)) = listener.accept().await else { continue };
                let (connector, counts) = (connector.clone(), Arc::clone(&counts));
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        forward(request, connector.clone(), server, Arc::clone(&counts))
                    });
                    // the client may be killed at any moment
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { address, counted, _runtime: runtime })
    }

    /// For a kubeconfig.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// After so many more writes, one is done and never answered.
    pub fn stop_after(&self, writes: usize) {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner) =
            Counted { left: Some(writes), reached: None };
    }

    /// The write that was not answered: `PATCH /apis/…`.
    pub fn reached(&self) -> Option<String> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).reached.clone()
    }

    /// Everything is answered again.
    pub fn open(&self) {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner) = Counted::default();
    }
}

async fn forward(
    request: Request<Incoming>,
    connector: TlsConnector,
    server: SocketAddr,
    counted: Arc<Mutex<Counted>>,
) -> std::result::Result<Response<Incoming>, AnyError> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
    let writes = head.method != Method::GET && !path.contains("/leases") && !path.contains("/events");
    let line = format!("{} {path}", head.method);
    let body = Full::<Bytes>::new(body.collect().await?.to_bytes());
    head.uri = path.parse::<Uri>()?;
    head.headers.insert(HOST, server.to_string().parse()?);

    let name = ServerName::IpAddress(server.ip().into());
    let stream = connector.connect(name, TcpStream::connect(server).await?).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let answer = sender.send_request(Request::from_parts(head, body)).await?;
    if writes && is_chosen(&counted, line) {
        std::future::pending::<()>().await;
    }
    Ok(answer)
}

fn is_chosen(counted: &Mutex<Counted>, line: String) -> bool {
    let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
    match counted.left {
        None => false,
        Some(0) => {
            counted.left = None;
            counted.reached = Some(line);
            true
        }
        Some(more) => {
            counted.left = Some(more - 1);
            false
        }
    }
}
