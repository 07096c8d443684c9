//! What every part of the running controller shares: the adapters to the cluster and to AWS, the settings, the index, and
//! who works on which binding. The parts use this file; it uses none of them.

use crate::claims::SecurityGroups;
use crate::desired::Switches;
use crate::events::Events;
use crate::group::RuleOverflow;
use crate::index::{Concerned, Index, Key};
use crate::lease::Term;
use crate::lookup::Lookups;
use crate::metrics::Metrics;
use crate::polling;
use crate::reason::Reason;
use crate::security::interfaces::REMEMBERED;
use futures::FutureExt as _;
use ipnet::IpNet;
use kube::Client;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::Role;
use tgb_aws::values::ObservedTarget;
use tgb_aws::{Aws, AwsError};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// `--keep-last-targets`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KeepLast {
    /// Where targets are instances.
    Instance,
    /// Everywhere.
    All,
    /// Nowhere.
    None,
}

impl KeepLast {
    pub(crate) fn applies(self, group: &TargetGroup) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Instance => group.target_type == "instance",
        }
    }
}

/// How the controller behaves; the flags, read.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) observe: bool,
    pub(crate) switches: Switches,
    pub(crate) keep_last: KeepLast,
    pub(crate) missing_backend_grace: Duration,
    pub(crate) swap_grace: Duration,
    pub(crate) max_targets: Option<usize>,
    pub(crate) health_poll: Duration,
    pub(crate) poll_rate: f64,
    pub(crate) resync: Duration,
    /// What the operator allows; the region and account are filled in at start.
    pub(crate) rules: tgb_api::rules::Settings,
    pub(crate) cleanup_deadline: Option<Duration>,
    /// After how long targets that were there before a binding, and are not this cluster's, go all the same.
    pub(crate) foreign_targets_grace: Option<Duration>,
    pub(crate) rule_overflow: RuleOverflow,
    pub(crate) cluster_name: String,
    pub(crate) rule_owner: Option<String>,
    pub(crate) adopt_unmarked_rules: bool,
    /// Tags that mark the security group of an interface that has several.
    pub(crate) security_group_tags: Vec<(String, Option<String>)>,
    /// Only some namespaces are watched.
    pub(crate) watches_some: bool,
    pub(crate) manage_lbc_bindings: bool,
    /// After how long a readiness gate of a binding that does not exist opens.
    pub(crate) orphaned_gate_grace: Duration,
}

/// What wakes a worker.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    pub(crate) notify: Notify,
    /// When the first change happened that no pass has seen yet.
    changed: Mutex<Option<Instant>>,
}

impl Wake {
    pub(crate) fn wake(&self) {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
        self.notify.notify_one();
    }

    /// Whether something has changed that no pass has seen yet.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Since when something has changed that the last call did not tell.
    pub(crate) fn take_changed(&self) -> Option<Instant> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The last answer of DescribeTargetHealth, and when it was asked for.
type Health = Arc<tokio::sync::Mutex<Option<(Instant, Vec<ObservedTarget>)>>>;

/// The shared health of a target group, if it has several bindings. The health of other groups is forgotten.
fn shared_health(
    all: &mut HashMap<String, Health>,
    arn: &str,
    has_several: impl Fn(&str) -> bool,
) -> Option<Health> {
    if !has_several(arn) {
        all.remove(arn);
        return None;
    }
    if !all.contains_key(arn) {
        all.retain(|other, _| has_several(other));
    }
    Some(Arc::clone(all.entry(arn.to_owned()).or_default()))
}

/// Who works on which binding.
type Workers = HashMap<Key, Arc<Wake>>;

/// How a binding fares, for metrics.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// The reason of `Ready`.
    pub(crate) reason: Option<Reason>,
    /// Its targets by state, and those that are missing.
    pub(crate) targets: BTreeMap<&'static str, usize>,
    /// What would be registered and deregistered.
    pub(crate) planned: (usize, usize),
    pub(crate) pods_without_gate: usize,
    /// Pods wait for their gates, or old targets for new ones.
    pub(crate) waits: bool,
}

/// A watch: the kind of object, and the namespace if it sees one only.
pub(crate) type Watched = (&'static str, Option<Arc<str>>);

/// Since when watches are broken.
#[derive(Debug, Default)]
pub(crate) struct Watches(BTreeMap<Watched, Break>);

/// A break of a watch.
#[derive(Debug)]
struct Break {
    since: Instant,
    /// When the API server answered it again.
    mended: Option<Instant>,
}

impl Watches {
    /// A watch that fails again so soon after it was answered has not been mended.
    const STEADY: Duration = Duration::from_secs(10);

    /// Notes that a watch failed.
    pub(crate) fn fail(&mut self, watch: &Watched, now: Instant) {
        let unsteady = |broken: &Break| {
            broken.mended.is_none_or(|mended| now.saturating_duration_since(mended) < Self::STEADY)
        };
        match self.0.get_mut(watch) {
            Some(broken) if unsteady(broken) => broken.mended = None,
            _ => drop(self.0.insert(watch.clone(), Break { since: now, mended: None })),
        }
    }

    /// Notes that the API server answers a watch; for how long it had not, if it was broken.
    pub(crate) fn mend(&mut self, watch: &Watched, now: Instant) -> Option<Duration> {
        let broken = self.0.get_mut(watch).filter(|broken| broken.mended.is_none())?;
        broken.mended = Some(now);
        Some(now.saturating_duration_since(broken.since))
    }

    /// The watches that are broken, and for how long.
    pub(crate) fn broken(&self, now: Instant) -> impl Iterator<Item = (&Watched, Duration)> {
        let broken = self.0.iter().filter(|(_, broken)| broken.mended.is_none());
        broken.map(move |(watch, broken)| (watch, now.saturating_duration_since(broken.since)))
    }

    /// The broken watch of a namespace that has been so for longest: its kind, and for how long.
    pub(crate) fn blind(&self, namespace: &str, now: Instant) -> Option<(&'static str, Duration)> {
        let sees = |watch: &Watched| watch.1.as_deref().is_none_or(|scope| scope == namespace);
        let broken = self.broken(now).filter(|(watch, _)| sees(watch));
        broken.map(|(watch, age)| (watch.0, age)).max_by_key(|(_, age)| *age)
    }
}

/// The work that goes on as long as the process does.
#[derive(Debug, Clone)]
pub(crate) struct Vital {
    halt: CancellationToken,
    broken_off: Arc<OnceLock<String>>,
}

impl Vital {
    /// Begins for a process that comes to an orderly end when `halt` is cancelled.
    pub(crate) fn new(halt: CancellationToken) -> Self {
        Self { halt, broken_off: Arc::default() }
    }

    /// Does work on the side. Should it end or panic, the process ends: without it the rest would go on with what was true then.
    pub(crate) fn keep_up(&self, what: String, work: impl Future<Output = ()> + Send + 'static) {
        let vital = self.clone();
        tokio::spawn(async move {
            let panicked = AssertUnwindSafe(work).catch_unwind().await.is_err();
            if vital.halt.is_cancelled() {
                return;
            }
            let how = if panicked { "panicked" } else { "ended" };
            let message = format!("{what} {how}, without which nothing is known to be true; see the log");
            error!("{message}");
            // The first one is the cause.
            let _ = vital.broken_off.set(message);
            vital.halt.cancel();
        });
    }

    /// Lets the work end: the process does, too.
    pub(crate) fn halt(&self) {
        self.halt.cancel();
    }

    /// Why the process ends, if not by a signal.
    pub(crate) fn broken_off(&self) -> Option<&str> {
        self.broken_off.get().map(String::as_str)
    }
}

/// What all workers share.
pub(crate) struct Ctx {
    pub(crate) client: Client,
    pub(crate) aws: Aws,
    pub(crate) settings: Settings,
    pub(crate) security: SecurityGroups,
    pub(crate) metrics: Metrics,
    pub(crate) events: Events,
    /// Ends everything.
    pub(crate) stop: CancellationToken,
    index: RwLock<Index>,
    workers: Mutex<Workers>,
    standings: Mutex<HashMap<Key, Standing>>,
    /// The networks of a VPC's subnets.
    subnets: Lookups<String, Arc<Vec<IpNet>>>,
    /// Of target groups with several bindings.
    health: Mutex<HashMap<String, Health>>,
    watches: Mutex<Watches>,
    /// The work that ends the process when it ends.
    pub(crate) vital: Vital,
    /// Whether this replica may write.
    pub(crate) term: Arc<Term>,
    unsynced: AtomicUsize,
    synced: Notify,
}

impl Ctx {
    pub(crate) fn new(
        client: Client,
        aws: Aws,
        settings: Settings,
        (term, vital): (Arc<Term>, Vital),
    ) -> Self {
        Self {
            events: Events::new(client.clone()),
            client,
            metrics: Metrics::new(aws.metrics()),
            aws,
            settings,
            security: SecurityGroups::new(REMEMBERED),
            stop: CancellationToken::new(),
            index: RwLock::default(),
            workers: Mutex::default(),
            standings: Mutex::default(),
            subnets: Lookups::new(Duration::MAX),
            health: Mutex::default(),
            watches: Mutex::default(),
            vital,
            term,
            unsynced: AtomicUsize::new(0),
            synced: Notify::new(),
        }
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the watches.
    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// For [`crate::run`], which starts and ends workers.
    pub(crate) fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the bindings fare that have been looked at.
    pub(crate) fn standings(&self) -> MutexGuard<'_, HashMap<Key, Standing>> {
        self.standings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the watches.
    pub(crate) fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kind of object whose watch, of all that see a namespace, has been broken for longest, and for how long: what is known
    /// of it may not be true any more.
    pub(crate) fn blind(&self, namespace: &str) -> Option<(&'static str, Duration)> {
        self.watches().blind(namespace, Instant::now())
    }

    /// The period of a worker's polls. A poll compares, too.
    pub(crate) fn poll_period(&self) -> Duration {
        let Settings { health_poll, resync, poll_rate, .. } = &self.settings;
        polling::period(*health_poll, *resync, self.index().bindings().len(), *poll_rate)
    }

    /// The subnets of a VPC, read again when an address is in none of them and the answer is a minute old. A VPC that
    /// this account cannot see has none, so that its targets are registered for all zones.
    pub(crate) async fn subnets(&self, vpc: &str, ips: &[IpAddr]) -> Result<Arc<Vec<IpNet>>, AwsError> {
        let read = |vpcs: Vec<String>| async move {
            let mut found = HashMap::new();
            for vpc in vpcs {
                let networks: Vec<IpNet> = match self.aws.subnets(&vpc).await {
                    Ok(subnets) => {
                        let cidrs = subnets.iter().flat_map(|subnet| &subnet.cidrs);
                        cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
                    }
                    Err(error) if error.code == "InvalidVpcID.NotFound" => Vec::new(),
                    Err(error) => return Err(error),
                };
                found.insert(vpc, Arc::new(networks));
            }
            Ok(found)
        };
        let keys = || BTreeSet::from([vpc.to_owned()]);
        let known = self.subnets.get(keys(), Duration::MAX, read).await?;
        let networks = known.into_values().next().unwrap_or_default();
        if ips.iter().all(|ip| networks.iter().any(|network| network.contains(ip))) {
            return Ok(networks);
        }
        let known = self.subnets.get(keys(), Duration::from_secs(60), read).await?;
        Ok(known.into_values().next().unwrap_or_default())
    }

    /// DescribeTargetHealth. Where several bindings share a target group, they share an answer that is younger than the
    /// shortest tick, so that it is asked once per tick.
    pub(crate) async fn target_health(
        &self,
        aws: &Aws,
        role: Option<Role<'_>>,
        arn: &str,
    ) -> Result<Vec<ObservedTarget>, AwsError> {
        const TICK: Duration = Duration::from_secs(1);
        let shared = {
            let index = self.index();
            let mut all = self.health.lock().unwrap_or_else(PoisonError::into_inner);
            shared_health(&mut all, arn, |arn| index.bindings_of(arn).nth(1).is_some())
        };
        let Some(shared) = shared else { return aws.target_health(role, arn).await };
        let mut last = shared.lock().await;
        if let Some((_, answer)) = last.as_ref().filter(|(asked, _)| asked.elapsed() < TICK) {
            return Ok(answer.clone());
        }
        let asked = Instant::now();
        let answer = aws.target_health(role, arn).await?;
        *last = Some((asked, answer.clone()));
        Ok(answer)
    }

    /// AWS has contradicted what is known of a VPC's subnets: they are read anew when they are needed next.
    pub(crate) fn forget_subnets(&self, vpc: &str) {
        self.subnets.forget(&vpc.to_owned());
    }

    /// Has bindings looked at again without forgetting their backoff.
    pub(crate) fn nudge(&self, concerned: &Concerned) {
        let workers = self.workers();
        for wake in concerned.iter().filter_map(|key| workers.get(key)) {
            wake.notify.notify_one();
        }
    }

    /// One more cache has to be filled.
    pub(crate) fn expect_cache(&self) {
        self.unsynced.fetch_add(1, Ordering::AcqRel);
    }

    /// A cache is filled.
    pub(crate) fn cache_filled(&self) {
        self.unsynced.fetch_sub(1, Ordering::AcqRel);
        self.synced.notify_one();
    }

    /// Waits until all caches are filled. Nothing may be decided before.
    pub(crate) async fn caches_filled(&self) {
        while self.unsynced.load(Ordering::Acquire) > 0 {
            self.synced.notified().await;
        }
    }

    /// Why `/readyz` is not well, if so.
    pub(crate) fn unready(&self) -> Option<&str> {
        if let Some(why) = self.vital.broken_off() {
            Some(why)
        } else if self.stop.is_cancelled() {
            Some("stopping")
        } else if self.unsynced.load(Ordering::Acquire) > 0 {
            Some("the caches are not filled yet")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_health_of_groups_that_several_bindings_share_is_kept_and_no_other() {
        let mut all = HashMap::new();
        for n in 0..100 {
            let arn = format!("arn{n}");
            // As where each in turn has two bindings for a while.
            assert!(shared_health(&mut all, &arn, |other| other == arn).is_some());
            assert_eq!(all.len(), 1);
        }
        assert!(shared_health(&mut all, "arn1", |_| false).is_none());
        let two = |arn: &str| ["a", "b"].contains(&arn);
        for arn in ["a", "b", "a"] {
            assert!(shared_health(&mut all, arn, two).is_some());
        }
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn a_watch_counts_as_broken_until_it_is_answered_and_stays_so() {
        let (mut watches, begun) = (Watches::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let pods = ("pods", Some(Arc::from("shop")));
        watches.fail(&pods, at(0));
        watches.fail(&pods, at(5));
        assert_eq!(watches.blind("shop", at(20)), Some(("pods", Duration::from_secs(20))));
        assert_eq!(watches.mend(&pods, at(20)), Some(Duration::from_secs(20)));
        assert_eq!((watches.blind("shop", at(20)), watches.mend(&pods, at(21))), (None, None));
        // It broke again at once: it was never well.
        watches.fail(&pods, at(22));
        assert_eq!(watches.blind("shop", at(30)), Some(("pods", Duration::from_secs(30))));
        watches.mend(&pods, at(30));
        watches.fail(&pods, at(50));
        assert_eq!(watches.blind("shop", at(51)), Some(("pods", Duration::from_secs(1))));
    }

    #[test]
    fn a_namespace_whose_watch_is_well_does_not_speak_for_another() {
        let (mut watches, now) = (Watches::default(), Instant::now());
        let pods = |namespace: &str| ("pods", Some(Arc::from(namespace)));
        let later = now + Duration::from_secs(9);
        watches.fail(&pods("shop"), now);
        watches.fail(&pods("bank"), now);
        watches.mend(&pods("bank"), later);
        assert_eq!(watches.blind("bank", later), None);
        assert_eq!(watches.blind("shop", later), Some(("pods", Duration::from_secs(9))));
        watches.fail(&("nodes", None), later);
        assert_eq!(watches.blind("bank", later).map(|(kind, _)| kind), Some("nodes"));
    }

    #[tokio::test]
    async fn work_that_has_to_go_on_and_ends_or_panics_ends_the_process() {
        let panics = || async { panic!("as a test does") };
        let works: [(&str, futures::future::BoxFuture<'static, ()>); 2] =
            [("ended", Box::pin(async {})), ("panicked", Box::pin(panics()))];
        for (how, work) in works {
            let halt = CancellationToken::new();
            let vital = Vital::new(halt.clone());
            vital.keep_up("the watch of pods".to_owned(), work);
            halt.cancelled().await;
            let why = vital.broken_off().unwrap();
            assert!(why.starts_with(&format!("the watch of pods {how}")), "{why}");
        }
    }

    #[tokio::test]
    async fn work_that_ends_with_the_process_is_not_why_it_ends() {
        let halt = CancellationToken::new();
        let (vital, (done, ended)) = (Vital::new(halt.clone()), tokio::sync::oneshot::channel::<()>());
        vital.keep_up("a search".to_owned(), async move { drop(ended.await) });
        halt.cancel();
        drop(done);
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert_eq!(vital.broken_off(), None);
    }
}
