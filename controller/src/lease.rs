//! One leader at a time, by a Lease that is read and replaced with its resourceVersion, so that two never both win.
//!
//! Whether another's lease has run out is judged by how long *we* have seen it unchanged: clocks of other machines don't
//! matter. The lease is given back at a clean stop.
//!
//! A thread of its own renews the lease, with a client and connections of its own: however much the rest computes, it is not late.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_process::duration;
use tokio::sync::{Semaphore, mpsc};
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

    /// The time after the end of a term in which no other replica writes.
    pub(crate) fn margin(self) -> Duration {
        self.lease_duration.saturating_sub(self.lease_renew_deadline)
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
struct Candidate {
    client: Client,
    api: Api<Lease>,
    namespace: String,
    name: String,
    me: String,
    cluster: String,
    owner: String,
    periods: Periods,
}

/// A moment by two clocks: one stands still while the machine is suspended, the other goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    awake: Instant,
    /// Since the machine started; `None` where the system does not tell.
    uptime: Option<Duration>,
}

impl Moment {
    /// Now.
    pub(crate) fn now() -> Self {
        let uptime = std::fs::read_to_string("/proc/uptime").ok();
        Self { awake: Instant::now(), uptime: uptime.as_deref().and_then(seconds_in) }
    }

    fn after(self, period: Duration) -> Self {
        Self { awake: self.awake + period, uptime: self.uptime.map(|uptime| uptime + period) }
    }

    /// The time until a later moment, by the clock that has less of it left.
    fn until(self, end: Self) -> Duration {
        let awake = end.awake.saturating_duration_since(self.awake);
        let left = end.uptime.zip(self.uptime).map(|(end, now)| end.saturating_sub(now));
        left.map_or(awake, |left| left.min(awake))
    }
}

/// The first number of `/proc/uptime`.
fn seconds_in(uptime: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(uptime.split_whitespace().next()?.parse().ok()?).ok()
}

/// The time for which this replica may write, by its own clock. A process or a machine that stood still sees that its term is over
/// before it has heard of another leader.
#[derive(Debug)]
pub(crate) struct Term {
    /// The time after the end in which no other replica writes.
    margin: Duration,
    end: Mutex<End>,
    /// Something was left undone because it was over.
    missed: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// It has not begun.
    Unknown,
    At(Moment),
    /// It is over for good.
    Past,
}

impl Term {
    /// A term that has not begun.
    pub(crate) fn new(margin: Duration) -> Self {
        Self { margin, end: Mutex::new(End::Unknown), missed: AtomicBool::new(false) }
    }

    fn end_now(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if this replica may write.
    pub(crate) fn lasts(&self) -> bool {
        self.allows().is_some()
    }

    /// The longest that a write may take which begins now, so that it has ended before another replica writes. `None`: none
    /// may begin.
    pub(crate) fn allows(&self) -> Option<Duration> {
        let End::At(end) = *self.end_now() else { return None };
        let left = Moment::now().until(end);
        (!left.is_zero()).then(|| left + self.margin)
    }

    /// True if this replica may write; asked by work that is left undone otherwise: the next [`Self::until`] tells of it.
    pub(crate) fn serves(&self) -> bool {
        if self.lasts() {
            return true;
        }
        self.missed.store(true, Ordering::SeqCst);
        // It may have been renewed before anybody could see that.
        self.lasts()
    }

    /// Lets this replica write until then, unless its term is over for good. Whether something was left undone.
    pub(crate) fn until(&self, end: Moment) -> bool {
        let mut known = self.end_now();
        if matches!(*known, End::Past) {
            return false;
        }
        *known = End::At(end);
        self.missed.swap(false, Ordering::SeqCst)
    }

    /// Lets this replica write nothing any more.
    pub(crate) fn end(&self) {
        *self.end_now() = End::Past;
    }
}

/// News from the lease's thread.
#[derive(Debug)]
pub(crate) enum News {
    /// The lease is ours: work may begin.
    Leads,
    /// It was renewed late, is still ours, and something was left undone meanwhile.
    Late,
    /// It is over: after a stop, or for this reason.
    Over(Result<(), String>),
}

/// The Lease, for whom it is held, and how.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    /// The kubeconfig, as every other client of the cluster has it.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The Lease's namespace and name.
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// The installation: a cluster's name and an owner of rules, which may be empty.
    pub(crate) cluster: String,
    pub(crate) owner: String,
    pub(crate) periods: Periods,
}

/// The thread that gets the lease and renews it.
pub(crate) struct Keeper {
    news: mpsc::UnboundedReceiver<News>,
    done: CancellationToken,
}

impl Keeper {
    /// Starts the thread. It ends when it was told to [`Self::give_back`] after `stop`, or when the lease is lost.
    ///
    /// # Errors
    /// A sentence, if the system gives no thread.
    pub(crate) fn start(post: Post, term: Arc<Term>, stop: CancellationToken) -> Result<Self, String> {
        let ((tell, news), done) = (mpsc::unbounded_channel(), CancellationToken::new());
        let given_back = done.clone();
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let end =
                runtime.map_err(|error| format!("no runtime for the lease: {error}")).and_then(|runtime| {
                    runtime.block_on(post.hold(&term, &stop, &given_back, |news| drop(tell.send(news))))
                });
            term.end();
            drop(tell.send(News::Over(end)));
        };
        let thread = std::thread::Builder::new().name("lease".to_owned()).spawn(run);
        thread.map(|_| Self { news, done }).map_err(|error| format!("no thread for the lease: {error}"))
    }

    /// Waits for what there is to tell next.
    pub(crate) async fn news(&mut self) -> News {
        let lost = || News::Over(Err("the lease's thread broke off".to_owned()));
        self.news.recv().await.unwrap_or_else(lost)
    }

    /// Gives the lease back, after a stop, when nothing is written any more.
    pub(crate) async fn give_back(&mut self) -> Result<(), String> {
        self.done.cancel();
        loop {
            if let News::Over(end) = self.news().await {
                return end;
            }
        }
    }
}

impl Post {
    /// Gets the lease, renews it until `stop`, and gives it back when `done`.
    async fn hold(
        self,
        term: &Term,
        stop: &CancellationToken,
        done: &CancellationToken,
        tell: impl Fn(News),
    ) -> Result<(), String> {
        // Its connections belong to the runtime in which it is made.
        let client = tgb_process::client(self.kubeconfig.as_deref()).await?;
        let candidate =
            Candidate::new(client, &self.namespace, &self.name, (&self.cluster, &self.owner), self.periods);
        let Some(until) = candidate.acquire(stop).await else { return Ok(()) };
        candidate.alone().await?;
        term.until(until);
        tell(News::Leads);
        let holds = |until| {
            if term.until(until) {
                tell(News::Late);
            }
        };
        if !candidate.keep(stop, holds).await {
            return Err("the lease is lost; another replica goes on".to_owned());
        }
        done.cancelled().await;
        candidate.release().await;
        Ok(())
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
    fn new(
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
    async fn acquire(&self, stop: &CancellationToken) -> Option<Moment> {
        let mut seen: Option<(Option<String>, Instant)> = None;
        loop {
            let begun = Moment::now();
            match timeout(self.periods.call(), self.try_acquire(&mut seen)).await {
                Ok(Ok(true)) => {
                    info!(lease = self.name, identity = self.me, "the lease is ours");
                    return Some(begun.after(self.periods.lease_renew_deadline));
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    warn!(error = %tgb_process::told(&error), "could not read or take the lease")
                }
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
    async fn keep(&self, stop: &CancellationToken, holds: impl Fn(Moment)) -> bool {
        loop {
            tokio::select! {
                () = stop.cancelled() => return true,
                () = sleep(self.periods.lease_retry_period) => {}
            }
            let begun = Moment::now();
            match timeout(self.periods.call(), self.renew()).await {
                Ok(Ok(true)) => holds(begun.after(self.periods.lease_renew_deadline)),
                Ok(Ok(false)) => {
                    warn!("another one holds the lease, or it was deleted");
                    return false;
                }
                Ok(Err(error)) => warn!(error = %tgb_process::told(&error), "could not renew the lease"),
                Err(_) => warn!("the API server does not answer in time about the lease"),
            }
        }
    }

    /// Gives the lease back.
    async fn release(&self) {
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
            Ok(Err(error)) => warn!(error = %tgb_process::told(&error), "could not give the lease back"),
            Err(_) => warn!("could not give the lease back in time"),
        }
    }

    /// Another lease of the same installation whose holder is alive: two leaders would take each other's rules and
    /// targets away. Of two that begin at once, the one whose lease was taken first stays.
    ///
    /// # Errors
    /// The sentence to end with.
    async fn alone(&self) -> Result<(), String> {
        let rivals = match timeout(CALL * 2, self.rivals()).await {
            Ok(Ok(rivals)) => rivals,
            Ok(Err(error)) => {
                warn!(error = %tgb_process::told(&error), "can't see whether another installation of the same name is at work");
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

/// The same client, which writes nothing unless `may_take` allows it at that moment, and gives up a write that takes longer
/// than that: a process that stood still must not go on with what it had begun, nor repeat it when another replica leads.
pub(crate) fn fenced(
    client: Client,
    may_take: impl Fn() -> Option<Duration> + Clone + Send + 'static,
) -> Client {
    let namespace = client.default_namespace().to_owned();
    let places = Arc::new(Semaphore::new(WRITES));
    let service = tower::service_fn(move |request: ::http::Request<kube::client::Body>| {
        let writes = request.method() != ::http::Method::GET;
        let (client, may_take, places) = (client.clone(), may_take.clone(), Arc::clone(&places));
        async move {
            if !writes {
                return client.send(request).await;
            }
            let _place = places.acquire_owned().await.ok();
            let refused = |why: &'static str| kube::Error::Service(why.into());
            let Some(most) = may_take() else { return Err(refused("this replica may not write now")) };
            timeout(most, client.send(request))
                .await
                .unwrap_or_else(|_| Err(refused("the term ended before the API server answered")))
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
    use serde_json::json;

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
        let term = Term::new(Duration::from_secs(5));
        let later = || Moment::now().after(Duration::from_secs(60));
        assert!(!term.serves());
        assert!(term.until(later()), "what came before the first term");
        assert!(term.serves() && term.lasts());
        assert!(!term.until(Moment::now()), "nothing came meanwhile");
        assert!(!term.lasts());
        assert!(!term.until(Moment::now()), "nobody was turned away");
        assert!(!term.serves());
        assert!(term.until(later()));
        assert!(!term.until(later()), "it is told once");
        term.end();
        assert!(!term.until(later()) && !term.lasts(), "a renewal that was under way does not bring it back");
    }

    #[test]
    fn a_term_ends_while_the_machine_is_suspended() {
        let (awake, seconds) = (Instant::now(), Duration::from_secs);
        let at = |awake_for: u64, up_for: Option<u64>| Moment {
            awake: awake + seconds(awake_for),
            uptime: up_for.map(seconds),
        };
        let end = at(0, Some(1_000)).after(seconds(10));
        assert_eq!(at(4, Some(1_004)).until(end), seconds(6));
        assert_eq!(at(1, Some(5_000)).until(end), Duration::ZERO, "it slept for over an hour");
        assert_eq!(at(4, None).until(end), seconds(6), "the system does not tell");
        assert_eq!(seconds_in("12345.67 4444.00\n"), Some(Duration::from_millis(12_345_670)));
        assert_eq!((seconds_in(""), seconds_in("soon 1")), (None, None));
    }

    #[test]
    fn a_write_has_ended_before_another_replica_writes() {
        let term = Term::new(Duration::from_secs(5));
        assert_eq!(term.allows(), None);
        term.until(Moment::now().after(Duration::from_secs(60)));
        let most = term.allows().unwrap();
        assert!(most > Duration::from_secs(5) && most <= Duration::from_secs(65), "{most:?}");
    }

    #[tokio::test]
    async fn a_write_that_is_not_answered_by_the_end_of_the_term_is_given_up_and_a_read_is_not() {
        use kube::client::Body;

        let (read, mut reads) = mpsc::unbounded_channel();
        let service = tower::service_fn(move |request: ::http::Request<Body>| {
            let read = read.clone();
            async move {
                if request.method() == ::http::Method::GET {
                    let _ = read.send(());
                }
                std::future::pending::<Result<::http::Response<Body>, tower::BoxError>>().await
            }
        });
        let client = fenced(Client::new(service, "default"), || Some(Duration::from_millis(20)));
        let send = |method: &str| {
            let request = ::http::Request::builder().method(method).uri("/").body(Body::empty()).unwrap();
            let client = client.clone();
            async move { client.send(request).await }
        };
        let reading = tokio::spawn(send("GET"));
        reads.recv().await.unwrap();
        assert!(send("PATCH").await.unwrap_err().to_string().contains("the term ended"));
        assert!(!reading.is_finished());
    }

    /// An API server that keeps one Lease, on a thread of its own; its kubeconfig, and a line for each write.
    fn lease_server(dir: &std::path::Path) -> (PathBuf, std::sync::mpsc::Receiver<Lease>) {
        use axum::Json;
        use axum::http::StatusCode;

        let (tell, told) = std::sync::mpsc::channel();
        let kept: Arc<Mutex<Option<Lease>>> = Arc::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let get = {
            let kept = Arc::clone(&kept);
            move || async move {
                let missing = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404});
                match &*kept.lock().unwrap() {
                    Some(lease) => (StatusCode::OK, Json(serde_json::to_value(lease).unwrap())),
                    None => (StatusCode::NOT_FOUND, Json(missing)),
                }
            }
        };
        let put = move |Json(mut lease): Json<Lease>| async move {
            let mut kept = kept.lock().unwrap();
            let version = kept.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
            let version = version.and_then(|version| version.parse().ok()).unwrap_or(0) + 1;
            lease.metadata.resource_version = Some(version.to_string());
            *kept = Some(lease.clone());
            let _ = tell.send(lease.clone());
            Json(lease)
        };
        let list = || async {
            Json(
                json!({"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "metadata": {}, "items": []}),
            )
        };
        let base = "/apis/coordination.k8s.io/v1";
        let router = axum::Router::new()
            .route(
                &format!("{base}/namespaces/kube-system/leases/tgb"),
                axum::routing::get(get).put(put.clone()),
            )
            .route(&format!("{base}/namespaces/kube-system/leases"), axum::routing::post(put))
            .route(&format!("{base}/leases"), axum::routing::get(list));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        let path = dir.join("kubeconfig");
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        (path, told)
    }

    /// The test's own thread is the whole runtime of everything else, and it is never given to it.
    #[tokio::test]
    async fn the_lease_is_renewed_and_given_back_however_busy_the_rest_is() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let (kubeconfig, writes) = lease_server(dir.path());
        let periods = Periods {
            lease_duration: Duration::from_secs(60),
            lease_renew_deadline: Duration::from_secs(50),
            lease_retry_period: Duration::from_millis(100),
        };
        let text = |text: &str| text.to_owned();
        let (namespace, name, cluster) = (text("kube-system"), text("tgb"), text("main"));
        let post =
            Post { kubeconfig: Some(kubeconfig), namespace, name, cluster, owner: String::new(), periods };
        let (term, stop) = (Arc::new(Term::new(periods.margin())), CancellationToken::new());
        let mut keeper = Keeper::start(post, Arc::clone(&term), stop.clone()).unwrap();
        let next = || writes.recv_timeout(Duration::from_secs(60)).unwrap().spec.unwrap();
        let taken = next();
        for renewed in [next(), next(), next()] {
            assert_eq!(renewed.holder_identity, taken.holder_identity);
            assert!(renewed.renew_time > taken.renew_time, "{renewed:?}");
        }
        assert!(term.lasts());
        assert!(matches!(keeper.news().await, News::Leads));
        stop.cancel();
        keeper.give_back().await.unwrap();
        let last = std::iter::from_fn(|| writes.try_recv().ok()).last().unwrap();
        assert_eq!(last.spec.unwrap().holder_identity.as_deref(), Some(""));
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
        let client = fenced(Client::new(service, "default"), || Some(Duration::from_secs(3_600)));
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
