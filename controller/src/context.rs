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
use ipnet::IpNet;
use kube::Client;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::Role;
use tgb_aws::values::ObservedTarget;
use tgb_aws::{Aws, AwsError};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

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
type LastHealth = Arc<tokio::sync::Mutex<Option<(Instant, Vec<ObservedTarget>)>>>;

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
    health: Mutex<HashMap<String, LastHealth>>,
    /// Since when the watch of a kind is broken.
    broken: Mutex<BTreeMap<&'static str, Instant>>,
    /// Whether this replica may write.
    pub(crate) term: Term,
    unsynced: AtomicUsize,
    synced: Notify,
}

impl Ctx {
    pub(crate) fn new(client: Client, aws: Aws, settings: Settings) -> Self {
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
            broken: Mutex::default(),
            term: Term::default(),
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

    /// Since when the watches of kinds are broken; those that are connected are not there.
    pub(crate) fn broken(&self) -> MutexGuard<'_, BTreeMap<&'static str, Instant>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often a worker polls. A poll compares, too.
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
        let has_several = self.index().bindings_of(arn).nth(1).is_some();
        let cell = {
            let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
            if has_several {
                Some(Arc::clone(health.entry(arn.to_owned()).or_default()))
            } else {
                health.remove(arn);
                None
            }
        };
        let Some(cell) = cell else { return aws.target_health(role, arn).await };
        let mut last = cell.lock().await;
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
    pub(crate) fn unready(&self) -> Option<&'static str> {
        if self.stop.is_cancelled() {
            Some("stopping")
        } else if self.unsynced.load(Ordering::Acquire) > 0 {
            Some("the caches are not filled yet")
        } else {
            None
        }
    }
}
