//! What a Service is to the API server: an address whose connections go to the endpoints that are ready.

use crate::cluster::own_address;
use crate::{Result, get};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long it takes until everybody knows that an endpoint is ready no more, as it takes kubelet and kube-proxy.
const LAG: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Endpoint {
    address: SocketAddr,
    probes: String,
    was_ready: bool,
    unready_since: Option<Instant>,
}

type Endpoints = Arc<Mutex<BTreeMap<String, Endpoint>>>;

/// A Service on this machine's own address, which API servers speak HTTP/1.1 to.
#[derive(Debug)]
pub struct Balancer {
    address: SocketAddr,
    endpoints: Endpoints,
}

fn lock(endpoints: &Endpoints) -> MutexGuard<'_, BTreeMap<String, Endpoint>> {
    endpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Balancer {
    /// Listens; there is no endpoint yet. It ends with the process.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start() -> Result<Self> {
        let failed = |error: std::io::Error| format!("the balancer does not start: {error}");
        let listener = TcpListener::bind((own_address(), 0)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let endpoints = Endpoints::default();
        let known = Arc::clone(&endpoints);
        std::thread::spawn(move || {
            for (turn, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { continue };
                let addresses: Vec<SocketAddr> =
                    lock(&known).values().filter(|e| serves(e)).map(|e| e.address).collect();
                let chosen = addresses.get(turn % addresses.len().max(1)).copied();
                std::thread::spawn(move || chosen.map(|address| join(stream, address)));
            }
        });
        let known = Arc::clone(&endpoints);
        std::thread::spawn(move || {
            loop {
                let probed: Vec<(String, String)> =
                    lock(&known).iter().map(|(name, e)| (name.clone(), e.probes.clone())).collect();
                for (name, probes) in probed {
                    let ready =
                        get(&probes, "/readyz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"));
                    if let Some(endpoint) = lock(&known).get_mut(&name) {
                        endpoint.was_ready |= ready;
                        endpoint.unready_since = if ready {
                            None
                        } else {
                            endpoint.unready_since.or_else(|| Some(Instant::now()))
                        };
                    }
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Ok(Self { address, endpoints })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Adds an endpoint, which gets connections once it is ready; `probes` is where its `/readyz` is.
    pub fn add(&self, name: &str, address: SocketAddr, probes: &str) {
        let endpoint = Endpoint { address, probes: probes.to_owned(), was_ready: false, unready_since: None };
        lock(&self.endpoints).insert(name.to_owned(), endpoint);
    }

    /// Takes an endpoint out.
    pub fn remove(&self, name: &str) {
        lock(&self.endpoints).remove(name);
    }
}

fn serves(endpoint: &Endpoint) -> bool {
    endpoint.was_ready && endpoint.unready_since.is_none_or(|since| since.elapsed() < LAG)
}

/// Carries bytes both ways until either side ends.
fn join(client: TcpStream, address: SocketAddr) -> std::io::Result<()> {
    let server = TcpStream::connect(address)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    let back = std::thread::spawn(move || carry(server, client));
    carry(from, to);
    let _ = back.join();
    Ok(())
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if buffer.get(..count).is_none_or(|bytes| to.write_all(bytes).is_err()) {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
