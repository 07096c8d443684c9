//! What a request costs that does nothing: hyper and rustls as the webhook uses them, one thread, and an answer of as many
//! bytes. It is another process on the same machine at the same time, so that the share that is the webhook's own can be
//! told from what system calls and the machine cost.

use crate::http::Place;
use crate::machine;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use std::convert::Infallible;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tgb_e2e::Result;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// The name of its certificate.
const HOST: &str = "127.0.0.1";

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The running server; it ends with this.
pub(crate) struct Floor {
    process: Child,
    /// Where it is. The path says how many bytes to answer, as in `/200`.
    pub place: Place,
}

impl Floor {
    /// Starts this program again as that server.
    pub(crate) fn start() -> Result<Self> {
        let own = std::env::current_exe().map_err(said)?;
        let mut command = Command::new(own);
        let mut process = command.arg("floor").stdout(Stdio::piped()).spawn().map_err(said)?;
        let mut output = BufReader::new(process.stdout.take().ok_or("no output")?);
        let (mut address, mut certificate) = (String::new(), String::new());
        output.read_line(&mut address).map_err(said)?;
        // an empty line ends it
        while output.read_line(&mut certificate).map_err(said)? > 1 {}
        let place = Place::tls(address.trim(), &certificate, None)?;
        Ok(Self { process, place })
    }

    /// The CPU time that it has taken.
    pub(crate) fn cpu(&self) -> Duration {
        machine::cpu(self.process.id())
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The server: tells its address and its certificate, and serves until it is killed.
pub(crate) async fn run() -> Result<()> {
    let pair = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).map_err(said)?;
    let key = PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der());
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key.into())
        .map_err(said)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((HOST, 0)).await.map_err(said)?;
    println!("https://{}\n{}\n", listener.local_addr().map_err(said)?, pair.cert.pem().trim_end());
    loop {
        let (stream, _) = listener.accept().await.map_err(said)?;
        stream.set_nodelay(true).map_err(said)?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let server = hyper::server::conn::http1::Builder::new();
            let _ = server.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
        });
    }
}

async fn answer(request: Request<Incoming>) -> std::result::Result<Response<Full<Bytes>>, Infallible> {
    let bytes = request.uri().path().trim_start_matches('/').parse().unwrap_or(0);
    if let Ok(body) = request.into_body().collect().await {
        std::hint::black_box(body.to_bytes());
    }
    let answer = Response::new(Full::new(Bytes::from(vec![b' '; bytes])));
    Ok(answer)
}
