//! HTTP/1.1 with TLS as the API server speaks it to webhooks, and as a client of the API server and of etcd.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use std::sync::Arc;
use tgb_e2e::Result;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Where to connect to and how.
#[derive(Clone)]
pub(crate) struct Place {
    address: String,
    tls: Option<Arc<ClientConfig>>,
    token: Option<String>,
}

impl Place {
    /// `http://HOST:PORT`
    pub(crate) fn plain(url: &str) -> Self {
        Self { address: url.trim_start_matches("http://").to_owned(), tls: None, token: None }
    }

    /// `https://HOST:PORT`, whose certificate one of `authorities` (PEM) has signed.
    pub(crate) fn tls(url: &str, authorities: &str, token: Option<&str>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
            roots.add(certificate.map_err(said)?).map_err(said)?;
        }
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let address = url.trim_start_matches("https://").to_owned();
        Ok(Self { address, tls: Some(Arc::new(config)), token: token.map(str::to_owned) })
    }

    /// A connection of its own.
    pub(crate) async fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(&self.address).await.map_err(|e| format!("{}: {e}", self.address))?;
        stream.set_nodelay(true).map_err(said)?;
        let sender = match &self.tls {
            None => {
                let (sender, driver) = handshake(TokioIo::new(stream)).await.map_err(said)?;
                tokio::spawn(driver);
                sender
            }
            Some(config) => {
                let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
                let name = ServerName::try_from(host.to_owned()).map_err(said)?;
                let stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await;
                let (sender, driver) = handshake(TokioIo::new(stream.map_err(said)?)).await.map_err(said)?;
                tokio::spawn(driver);
                sender
            }
        };
        Ok(Connection { sender, place: self.clone() })
    }
}

/// One connection; one request at a time.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    place: Place,
}

impl Connection {
    /// Sends a request and reads the whole answer: HTTP status and body.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> Result<(u16, Bytes)> {
        let mut request =
            hyper::Request::builder().method(method).uri(path).header("host", &self.place.address);
        if let Some(token) = &self.place.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if !body.is_empty() {
            request = request.header("content-type", kind);
        }
        let request = request.body(Full::new(body)).map_err(said)?;
        if self.sender.ready().await.is_err() {
            // A server may close a connection that was quiet for long.
            *self = self.place.connect().await?;
        }
        let answer = self.sender.send_request(request).await.map_err(said)?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(said)?.to_bytes();
        Ok((status, body))
    }

    /// As [`Self::send`] with JSON both ways; anything but 2xx is an error.
    pub(crate) async fn json(&mut self, method: &str, path: &str, kind: &str, body: &Value) -> Result<Value> {
        let bytes = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let (status, answer) = self.send(method, path, kind, bytes).await?;
        if !(200..300).contains(&status) {
            let text = String::from_utf8_lossy(&answer);
            return Err(format!(
                "{method} {path}: HTTP {status}: {}",
                text.chars().take(400).collect::<String>()
            ));
        }
        serde_json::from_slice(&answer).map_err(|error| format!("{method} {path}: {error}"))
    }
}
