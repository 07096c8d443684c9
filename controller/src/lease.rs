//! One leader at a time, by a Lease that is read and replaced with its resourceVersion, so that two never both win.
//!
//! Whether another's lease has run out is judged by how long *we* have seen it unchanged: clocks of other machines don't
//! matter. The lease is given back at a clean stop.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tgb_process::duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Short, so that a lease that is given back is taken within a second.
const LOOKS: Duration = Duration::from_secs(1);
/// How long a single call about the lease may take at most.
const CALL: Duration = Duration::from_secs(4);
/// Writes at the same time. Each takes a connection, which is kept for a minute and a half with 60 kB of buffers: without a limit a
/// thousand bindings that are looked at for the first time took a thousand.
const WRITES: usize = 32;

/// How the lease is held: names and defaults as Kubernetes' own components have them behind `--leader-elect-…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Args)]
pub(crate) struct Periods {
    /// How long the lease of a leader that died holds; whole seconds.
    #[arg(long, env = "TGB_LEASE_DURATION", default_value = "15s", value_parser = duration)]
    lease_duration: Duration,
    /// A leader that could not renew its lease for so long writes nothing until it has; shorter than --lease-duration.
    #[arg(long, env = "TGB_LEASE_RENEW_DEADLINE", default_value = "10s", value_parser = duration)]
    lease_renew_deadline: Duration,
    /// How often the leader renews its lease; twice and more within --lease-renew-deadline.
    #[arg(long, env = "TGB_LEASE_RETRY_PERIOD", default_value = "2s", value_parser = duration)]
    lease_retry_period: Duration,
}

impl Periods {
    /// Checks them against each other.
    ///
    /// # Errors
    /// A sentence that names the flag.
    pub(crate) fn check(self) -> Result<(), String> {
        let shown = |period: Duration| format!("{} s", period.as_secs_f64());
        if self.lease_duration.subsec_nanos() > 0 || i32::try_from(self.lease_duration.as_secs()).is_err() {
            return Err(format!(
                "--lease-duration is {}; a Lease holds for whole seconds",
                shown(self.lease_duration)
            ));
        }
        if self.lease_renew_deadline >= self.lease_duration {
            return Err(format!(
                "--lease-renew-deadline ({}) must be shorter than --lease-duration ({}): a leader has to stop before \
                 another one begins",
                shown(self.lease_renew_deadline),
                shown(self.lease_duration)
            ));
        }
        if self.lease_retry_period < Duration::from_millis(100)
            || self.lease_retry_period * 2 > self.lease_renew_deadline
        {
            return Err(format!(
                "--lease-retry-period ({}) must be 0.1 s or longer, and go twice into --lease-renew-deadline ({})",
                shown(self.lease_retry_period),
                shown(self.lease_renew_deadline)
            ));
        }
        Ok(())
    }

    /// How long a call about the lease may take: another one is tried before the deadline.
    fn call(self) -> Duration {
        CALL.min((self.lease_renew_deadline - self.lease_retry_period) / 2)
    }

    /// How often a standby looks at the lease.
    fn looks(self) -> Duration {
        LOOKS.min(self.lease_retry_period)
    }
}

/// Every lease of this program carries this label, so that they are found among those of nodes and others.
const LABEL: (&str, &str) = ("elbv2.k8s.aws/leader", "tgb-controller");
const CLUSTER: &str = "elbv2.k8s.aws/cluster-name";
const OWNER: &str = "elbv2.k8s.aws/rule-owner";

/// The Lease and who we are.
pub(crate) struct Candidate {
    client: Client,
    api: Api<Lease>,
    namespace: String,
    name: String,
    me: String,
    cluster: String,
    owner: String,
    periods: Periods,
}

/// The time for which the lease is ours, by our own clock. A process that stood still for a while finds by it that its time is
/// over, before it has heard of another leader.
#[derive(Debug, Default)]
pub(crate) struct Term {
    end: Mutex<Option<Instant>>,
    /// Something was left undone because it was over.
    missed: AtomicBool,
}

impl Term {
    /// Whether this replica may write.
    pub(crate) fn lasts(&self) -> bool {
        let end = *self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.is_some_and(|end| Instant::now() < end)
    }

    /// As [`Self::lasts`], asked by work that is left undone otherwise: the next [`Self::until`] tells of it.
    pub(crate) fn serves(&self) -> bool {
        if self.lasts() {
            return true;
        }
        self.missed.store(true, Ordering::SeqCst);
        // It may have been renewed before anybody could see that.
        self.lasts()
    }

    /// This replica may write until then. Whether something was left undone.
    pub(crate) fn until(&self, end: Instant) -> bool {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.missed.swap(false, Ordering::SeqCst)
    }

    /// This replica writes nothing any more.
    pub(crate) fn end(&self) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What is to be done about the lease as it stands.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    Take,
    Wait,
}

/// Takes a lease that is ours, nobody's, or that we have seen unchanged for longer than it lasts; `own` where it does not
/// say how long that is.
fn decide(spec: Option<&LeaseSpec>, me: &str, unchanged_for: Duration, own: Duration) -> Move {
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    let lasts =
        spec.and_then(|spec| spec.lease_duration_seconds).and_then(|seconds| u64::try_from(seconds).ok());
    // What another one wrote counts.
    let lasts = lasts.map_or(own, Duration::from_secs);
    if holder.is_empty() || holder == me || unchanged_for > lasts { Move::Take } else { Move::Wait }
}

impl Candidate {
    /// For this lease, on behalf of an installation: a cluster's name and an owner of rules, which may be empty.
    pub(crate) fn new(
        client: Client,
        namespace: &str,
        name: &str,
        (cluster, owner): (&str, &str),
        periods: Periods,
    ) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "tgb-controller".to_owned());
        let me = format!("{host}_{:016x}", fastrand::u64(..));
        Self {
            api: Api::namespaced(client.clone(), namespace),
            client,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            me,
            cluster: cluster.to_owned(),
            owner: owner.to_owned(),
            periods,
        }
    }

    /// Waits until the lease is ours; until when we may write. `None` if `stop` came first.
    pub(crate) async fn acquire(&self, stop: &CancellationToken) -> Option<Instant> {
        let mut seen: Option<(Option<String>, Instant)> = None;
        loop {
            let begun = Instant::now();
            match timeout(self.periods.call(), self.try_acquire(&mut seen)).await {
                Ok(Ok(true)) => {
                    info!(lease = self.name, identity = self.me, "the lease is ours");
                    return Some(begun + self.periods.lease_renew_deadline);
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(%error, "could not read or take the lease"),
                Err(_) => warn!("the API server does not answer in time about the lease"),
            }
            tokio::select! {
                () = stop.cancelled() => return None,
                () = sleep(self.periods.looks().mul_f64(0.8 + fastrand::f64() * 0.2)) => {}
            }
        }
    }

    /// Renews until `stop` (`true`) or until another one has the lease (`false`); `holds` hears until when we may write.
    /// Where the API server does not answer for long, nothing is written any more; but nobody else is told anything
    /// either, and if nobody has taken the lease when it answers again, it is still ours.
    pub(crate) async fn keep(&self, stop: &CancellationToken, holds: impl Fn(Instant)) -> bool {
        loop {
            tokio::select! {
                () = stop.cancelled() => return true,
                () = sleep(self.periods.lease_retry_period) => {}
            }
            let begun = Instant::now();
            match timeout(self.periods.call(), self.renew()).await {
                Ok(Ok(true)) => holds(begun + self.periods.lease_renew_deadline),
                Ok(Ok(false)) => {
                    warn!("another one holds the lease, or it was deleted");
                    return false;
                }
                Ok(Err(error)) => warn!(%error, "could not renew the lease"),
                Err(_) => warn!("the API server does not answer in time about the lease"),
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

    /// Another lease of the same installation whose holder is alive: two leaders would take each other's rules and
    /// targets away. Of two that begin at once, the one whose lease was taken first stays.
    ///
    /// # Errors
    /// The sentence to end with.
    pub(crate) async fn alone(&self) -> Result<(), String> {
        let rivals = match timeout(CALL * 2, self.rivals()).await {
            Ok(Ok(rivals)) => rivals,
            Ok(Err(error)) => {
                warn!(%error, "can't see whether another installation of the same name is at work");
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        if rivals.is_empty() {
            return Ok(());
        }
        // Clocks of others don't matter: who is alive renews.
        sleep(self.periods.lease_retry_period * 2).await;
        let Ok(Ok(later)) = timeout(CALL * 2, self.rivals()).await else { return Ok(()) };
        let alive =
            later.into_iter().find(|(id, version)| rivals.get(id).is_some_and(|before| before != version));
        match alive {
            None => Ok(()),
            Some((id, _)) => {
                self.release().await;
                let owner =
                    if self.owner.is_empty() { String::new() } else { format!(", owner {}", self.owner) };
                Err(format!(
                    "another installation for cluster {}{owner} is at work (lease {id}); remove one of them, or give \
                     each its --watch-namespaces and --rule-owner",
                    self.cluster
                ))
            }
        }
    }

    /// Held leases of the same installation that were taken before ours, with their versions.
    async fn rivals(&self) -> Result<BTreeMap<String, String>, kube::Error> {
        let all: Api<Lease> = Api::all(self.client.clone());
        let list = all.list(&ListParams::default().labels(&format!("{}={}", LABEL.0, LABEL.1))).await?;
        let is_ours = |lease: &Lease| {
            lease.metadata.namespace.as_deref() == Some(&self.namespace)
                && lease.metadata.name.as_deref() == Some(&self.name)
        };
        let taken = |lease: &Lease| {
            let at = lease.spec.as_ref().and_then(|spec| spec.acquire_time.as_ref()).map(|time| time.0);
            (at, lease.metadata.namespace.clone(), lease.metadata.name.clone())
        };
        let own = list.items.iter().find(|lease| is_ours(lease)).map(taken);
        let note = |lease: &Lease, key: &str| {
            lease.metadata.annotations.as_ref().and_then(|notes| notes.get(key)).cloned().unwrap_or_default()
        };
        let rivals = list.items.iter().filter(|lease| {
            let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
            !is_ours(lease)
                && holder.is_some_and(|holder| !holder.is_empty())
                && note(lease, CLUSTER) == self.cluster
                && note(lease, OWNER) == self.owner
                && own.as_ref().is_none_or(|own| taken(lease) < *own)
        });
        Ok(rivals
            .map(|lease| {
                let text = |text: &Option<String>| text.clone().unwrap_or_default();
                let metadata = &lease.metadata;
                let id = format!("{}/{}", text(&metadata.namespace), text(&metadata.name));
                (id, text(&metadata.resource_version))
            })
            .collect())
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
        if decide(lease.spec.as_ref(), &self.me, since.elapsed(), self.periods.lease_duration) == Move::Wait {
            return Ok(false);
        }
        self.mark(&mut lease);
        won(self.api.replace(&self.name, &PostParams::default(), &lease).await)
    }

    async fn renew(&self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await? else { return Ok(false) };
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        if holder != Some(&self.me) {
            return Ok(false);
        }
        lease.spec.get_or_insert_default().renew_time = Some(MicroTime(Timestamp::now()));
        self.api.replace(&self.name, &PostParams::default(), &lease).await.map(|_| true)
    }

    fn mark(&self, lease: &mut Lease) {
        let labels = lease.metadata.labels.get_or_insert_default();
        labels.insert(LABEL.0.to_owned(), LABEL.1.to_owned());
        let notes = lease.metadata.annotations.get_or_insert_default();
        notes.insert(CLUSTER.to_owned(), self.cluster.clone());
        notes.insert(OWNER.to_owned(), self.owner.clone());
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_default();
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count.saturating_add(1)));
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = i32::try_from(self.periods.lease_duration.as_secs()).ok();
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

/// The same client, which writes nothing unless `may_write` says so at that moment: a process that stood still must not
/// go on with what it had begun.
pub(crate) fn fenced(client: Client, may_write: impl Fn() -> bool + Clone + Send + 'static) -> Client {
    let namespace = client.default_namespace().to_owned();
    let places = Arc::new(Semaphore::new(WRITES));
    let service = tower::service_fn(move |request: ::http::Request<kube::client::Body>| {
        let writes = request.method() != ::http::Method::GET;
        let (client, may_write, places) = (client.clone(), may_write.clone(), Arc::clone(&places));
        async move {
            let _place = if writes { places.acquire_owned().await.ok() } else { None };
            match writes && !may_write() {
                true => Err(kube::Error::Service("this replica may not write now".into())),
                false => client.send(request).await,
            }
        }
    });
    Client::new(service, namespace)
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
        let own = Duration::from_secs(15);
        let decided =
            |spec: Option<LeaseSpec>, seconds| decide(spec.as_ref(), "me", Duration::from_secs(seconds), own);
        assert_eq!(decided(None, 0), Move::Take);
        assert_eq!(decided(Some(held("", 1)), 0), Move::Take);
        assert_eq!(decided(Some(held("me", 15)), 0), Move::Take);
        assert_eq!(decided(Some(held("other", 15)), 15), Move::Wait);
        assert_eq!(decided(Some(held("other", 15)), 16), Move::Take);
        assert_eq!(decided(Some(held("other", 3)), 4), Move::Take);
        assert_eq!(decided(Some(held("other", 60)), 16), Move::Wait);
    }

    #[test]
    fn periods_that_would_allow_two_leaders_are_refused() {
        let periods = |lasts: u64, deadline: u64, renews: u64| {
            let ms = Duration::from_millis;
            Periods {
                lease_duration: ms(lasts),
                lease_renew_deadline: ms(deadline),
                lease_retry_period: ms(renews),
            }
            .check()
            .err()
        };
        assert_eq!(periods(15_000, 10_000, 2_000), None);
        assert_eq!(periods(1_000, 800, 100), None);
        for (wrong, flag) in [
            (periods(1_500, 1_000, 100), "--lease-duration is 1.5 s"),
            (periods(10_000, 10_000, 2_000), "--lease-renew-deadline (10 s) must be shorter"),
            (periods(15_000, 10_000, 6_000), "--lease-retry-period (6 s)"),
            (periods(15_000, 10_000, 0), "--lease-retry-period (0 s)"),
        ] {
            assert!(wrong.as_ref().is_some_and(|text| text.contains(flag)), "{wrong:?}, not {flag}");
        }
    }

    #[test]
    fn what_came_while_the_lease_was_late_is_told_of_when_it_is_renewed() {
        let (term, later) = (Term::default(), || Instant::now() + Duration::from_secs(60));
        assert!(!term.serves());
        assert!(term.until(later()), "what came before the first term");
        assert!(term.serves() && term.lasts());
        assert!(!term.until(Instant::now()), "nothing came meanwhile");
        assert!(!term.lasts());
        assert!(!term.until(Instant::now()), "nobody was turned away");
        assert!(!term.serves());
        assert!(term.until(later()));
        assert!(!term.until(later()), "it is told once");
        term.end();
        assert!(!term.lasts());
    }

    #[tokio::test]
    async fn a_thousand_writes_take_few_connections() {
        use kube::client::Body;
        use std::sync::atomic::AtomicUsize;

        let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0), Semaphore::new(0)));
        let server = Arc::clone(&counts);
        let service = tower::service_fn(move |_: ::http::Request<Body>| {
            let server = Arc::clone(&server);
            async move {
                let (now, most, answers) = &*server;
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                answers.acquire().await.unwrap().forget();
                now.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, tower::BoxError>(::http::Response::new(Body::empty()))
            }
        });
        let client = fenced(Client::new(service, "default"), || true);
        let write = || {
            let request = ::http::Request::post("/").body(Body::empty()).unwrap();
            let client = client.clone();
            tokio::spawn(async move { client.send(request).await.map(drop) })
        };
        let writes: Vec<_> = (0..1_000).map(|_| write()).collect();
        while counts.0.load(Ordering::SeqCst) < WRITES {
            tokio::task::yield_now().await;
        }
        counts.2.add_permits(writes.len());
        for write in writes {
            write.await.unwrap().unwrap();
        }
        assert_eq!(counts.1.load(Ordering::SeqCst), WRITES);
    }
}
