//! One leader at a time, by a Lease that is read and replaced with its resourceVersion, so that two never both win.
//!
//! Whether another's lease has run out is judged by how long *we* have seen it unchanged: clocks of other machines don't
//! matter. The lease is given back at a clean stop.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How long a lease holds without renewal.
const LASTS: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long stops before another can begin.
const GIVES_UP: Duration = Duration::from_secs(10);
const RENEWS: Duration = Duration::from_secs(2);
/// Short, so that a lease that is given back is taken within a second.
const LOOKS: Duration = Duration::from_secs(1);
const CALL: Duration = Duration::from_secs(4);

/// The Lease and who we are.
pub(crate) struct Candidate {
    api: Api<Lease>,
    name: String,
    me: String,
}

/// What is to be done about the lease as it stands.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    Take,
    Wait,
}

/// Takes a lease that is ours, nobody's, or that we have seen unchanged for longer than it lasts.
fn decide(spec: Option<&LeaseSpec>, me: &str, unchanged_for: Duration) -> Move {
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    let lasts =
        spec.and_then(|spec| spec.lease_duration_seconds).and_then(|seconds| u64::try_from(seconds).ok());
    let lasts = lasts.map_or(LASTS, Duration::from_secs);
    if holder.is_empty() || holder == me || unchanged_for > lasts { Move::Take } else { Move::Wait }
}

impl Candidate {
    pub(crate) fn new(client: Client, namespace: &str, name: &str) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "tgb-controller".to_owned());
        let me = format!("{host}_{:016x}", fastrand::u64(..));
        Self { api: Api::namespaced(client, namespace), name: name.to_owned(), me }
    }

    /// Waits until the lease is ours; `false` if `stop` came first.
    pub(crate) async fn acquire(&self, stop: &CancellationToken) -> bool {
        let mut seen: Option<(Option<String>, Instant)> = None;
        loop {
            match timeout(CALL, self.try_acquire(&mut seen)).await {
                Ok(Ok(true)) => {
                    info!(lease = self.name, identity = self.me, "the lease is ours");
                    return true;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(%error, "could not read or take the lease"),
                Err(_) => warn!("the API server does not answer in time about the lease"),
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = sleep(LOOKS.mul_f64(0.8 + fastrand::f64() * 0.2)) => {}
            }
        }
    }

    /// Renews until `stop` (`true`) or until the lease is lost (`false`).
    pub(crate) async fn keep(&self, stop: &CancellationToken) -> bool {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return true,
                () = sleep(RENEWS) => {}
            }
            match timeout(CALL, self.renew()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => {
                    warn!("another one holds the lease");
                    return false;
                }
                Ok(Err(error)) => warn!(%error, "could not renew the lease"),
                Err(_) => warn!("the API server does not answer in time about the lease"),
            }
            if renewed.elapsed() + RENEWS > GIVES_UP {
                return false;
            }
        }
    }

    /// Gives the lease back.
    pub(crate) async fn release(&self) {
        let release = async {
            let mut lease = self.api.get(&self.name).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(&self.me) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
        };
        match timeout(CALL, release).await {
            Ok(Ok(())) => info!("the lease is given back"),
            Ok(Err(error)) => warn!(%error, "could not give the lease back"),
            Err(_) => warn!("could not give the lease back in time"),
        }
    }

    async fn try_acquire(&self, seen: &mut Option<(Option<String>, Instant)>) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..Default::default() };
            let mut lease = Lease { metadata, ..Default::default() };
            self.mark(&mut lease);
            return won(self.api.create(&PostParams::default(), &lease).await);
        };
        let version = lease.metadata.resource_version.clone();
        let since = match seen {
            Some((before, since)) if *before == version => *since,
            _ => {
                let now = Instant::now();
                *seen = Some((version, now));
                now
            }
        };
        if decide(lease.spec.as_ref(), &self.me, since.elapsed()) == Move::Wait {
            return Ok(false);
        }
        self.mark(&mut lease);
        won(self.api.replace(&self.name, &PostParams::default(), &lease).await)
    }

    async fn renew(&self) -> Result<bool, kube::Error> {
        let mut lease = self.api.get(&self.name).await?;
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        if holder != Some(&self.me) {
            return Ok(false);
        }
        lease.spec.get_or_insert_default().renew_time = Some(MicroTime(Timestamp::now()));
        self.api.replace(&self.name, &PostParams::default(), &lease).await.map(|_| true)
    }

    fn mark(&self, lease: &mut Lease) {
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_default();
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count.saturating_add(1)));
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = i32::try_from(LASTS.as_secs()).ok();
        spec.acquire_time = Some(now.clone());
        spec.renew_time = Some(now);
    }
}

/// A conflict means that somebody else was faster.
fn won(answer: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match answer {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The namespace of the pod that we run in.
pub(crate) fn own_namespace() -> String {
    std::fs::read_to_string("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| "default".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: &str, seconds: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(by.to_owned()),
            lease_duration_seconds: Some(seconds),
            ..Default::default()
        }
    }

    #[test]
    fn a_lease_is_taken_when_it_is_nobodys_ours_or_seen_unchanged_for_too_long() {
        let decided =
            |spec: Option<LeaseSpec>, seconds| decide(spec.as_ref(), "me", Duration::from_secs(seconds));
        assert_eq!(decided(None, 0), Move::Take);
        assert_eq!(decided(Some(held("", 1)), 0), Move::Take);
        assert_eq!(decided(Some(held("me", 15)), 0), Move::Take);
        assert_eq!(decided(Some(held("other", 15)), 15), Move::Wait);
        assert_eq!(decided(Some(held("other", 15)), 16), Move::Take);
    }
}
