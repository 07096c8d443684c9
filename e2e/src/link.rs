//! A TCP connection that can be slowed down, held up and cut: it stands between two parts that run on.

use crate::Result;
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// How bytes get through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// What the client sends comes this much later.
    Slow(Duration),
    /// Connections are taken and kept, but nothing gets through, either way.
    Held,
    /// Connections are reset.
    Cut,
}

/// A proxy of one TCP address on a port of its own. Dropping it ends all its connections.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    way: watch::Sender<Way>,
    accepting: AbortHandle,
}

/// The proxies of this process; they have little to do.
static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("links").enable_all().build()
});

impl Link {
    /// Listens on any port of `host` and forwards to `target`.
    ///
    /// # Errors
    /// When there is no free port.
    pub(crate) fn start(host: IpAddr, target: SocketAddr) -> Result<Self> {
        let failed = |error: &std::io::Error| format!("no proxy of {target}: {error}");
        let runtime = RUNTIME.as_ref().map_err(failed)?;
        let (way, seen) = watch::channel(Way::Open);
        let listener = runtime.block_on(TcpListener::bind((host, 0))).map_err(|error| failed(&error))?;
        let address = listener.local_addr().map_err(|error| failed(&error))?;
        let accepting = runtime.spawn(accept(listener, target, seen)).abort_handle();
        Ok(Self { address, way, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Everything gets through again, also what was held up.
    pub fn open(&self) {
        self.way.send_replace(Way::Open);
    }

    /// What the client sends comes this much later.
    pub fn slow(&self, by: Duration) {
        self.way.send_replace(Way::Slow(by));
    }

    /// Half open: connections stay and new ones are taken, but nothing gets through, either way.
    pub fn hold(&self) {
        self.way.send_replace(Way::Held);
    }

    /// Resets all connections, and new ones at once.
    pub fn cut(&self) {
        self.way.send_replace(Way::Cut);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, way: watch::Receiver<Way>) {
    loop {
        // an error concerns the one connection, or passes
        if let Ok((client, _)) = listener.accept().await {
            tokio::spawn(forward(client, target, way.clone()));
        }
    }
}

/// Forwards until both sides have ended, the way is cut, or the link is gone.
async fn forward(mut client: TcpStream, target: SocketAddr, way: watch::Receiver<Way>) {
    let server = match *way.borrow() {
        Way::Cut => None,
        _ => Some(TcpStream::connect(target)),
    };
    let server = match server {
        Some(connecting) => connecting.await.ok(),
        None => None,
    };
    if let Some(mut server) = server {
        // small messages shouldn't wait for more
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let mut cut = way.clone();
        let both = async {
            tokio::join!(
                pump(from_client, to_server, way.clone(), true),
                pump(from_server, to_client, way.clone(), false)
            )
        };
        tokio::select! {
            ((), ()) = both => return,
            // an error: the link is gone
            _ = cut.wait_for(|way| *way == Way::Cut) => {}
        }
    }
    // the client may be gone already
    let _ = client.set_zero_linger();
}

async fn pump(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut way: watch::Receiver<Way>,
    is_slowed: bool,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await;
        let Ok(now) = way.wait_for(|way| *way != Way::Held).await.map(|way| *way) else { return };
        if let Way::Slow(by) = now
            && is_slowed
        {
            tokio::time::sleep(by).await;
        }
        let chunk = read.ok().and_then(|length| buffer.get(..length)).filter(|chunk| !chunk.is_empty());
        let is_sent = match chunk {
            Some(chunk) => to.write_all(chunk).await.is_ok(),
            None => false,
        };
        if !is_sent {
            // the other side may be gone already
            let _ = to.shutdown().await;
            return;
        }
    }
}
