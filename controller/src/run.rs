//! `tgb-controller run`: watches feed the index, the index wakes workers, one per binding.

use crate::Flags;
use crate::desired::Switches;
use crate::events::Events;
use crate::gates;
use crate::index::{Concerned, Index, Key};
use crate::lease::{self, Candidate};
use crate::metrics::{self, Metrics};
use crate::reconcile;
use crate::security::{self, SecurityGroups};
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::{Aws, AwsError};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

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
    pub(crate) fn applies(self, group: Option<&TargetGroup>) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Instance => group.is_some_and(|group| group.target_type == "instance"),
        }
    }
}

/// `--rule-overflow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RuleOverflow {
    /// What has no room is reported.
    Fail,
    /// The closest ranges are merged, which opens ports in between.
    Widen,
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
}

/// What wakes a worker.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    pub(crate) notify: Notify,
    /// When the first change happened that no pass has seen yet.
    changed: Mutex<Option<Instant>>,
}

impl Wake {
    fn wake(&self) {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
        self.notify.notify_one();
    }

    /// Since when something has changed that the last call did not tell.
    pub(crate) fn take_changed(&self) -> Option<Instant> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The networks of a VPC's subnets, and when they were read.
type KnownSubnets = (Instant, Arc<Vec<IpNet>>);

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
    workers: Mutex<HashMap<Key, Arc<Wake>>>,
    subnets: Mutex<BTreeMap<String, KnownSubnets>>,
    leading: AtomicBool,
    unsynced: AtomicUsize,
    synced: Notify,
}

impl Ctx {
    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often a worker polls: `--health-poll`, or less often if there are so many that `--poll-rate` is reached.
    pub(crate) fn poll_period(&self) -> Duration {
        let bindings = u32::try_from(self.index().bindings.len()).unwrap_or(u32::MAX);
        self.settings.health_poll.max(Duration::from_secs_f64(f64::from(bindings) / self.settings.poll_rate))
    }

    /// The subnets of a VPC, read again when an address is in none of them and the answer is a minute old. A VPC that
    /// this account cannot see has none, so that its targets are registered for all zones.
    pub(crate) async fn subnets(&self, vpc: &str, ips: &[IpAddr]) -> Result<Arc<Vec<IpNet>>, AwsError> {
        let known = self.subnets.lock().unwrap_or_else(PoisonError::into_inner).get(vpc).cloned();
        if let Some((read, networks)) = known {
            let covers = |ip: &IpAddr| networks.iter().any(|network| network.contains(ip));
            if ips.iter().all(covers) || read.elapsed() < Duration::from_secs(60) {
                return Ok(networks);
            }
        }
        let networks = match self.aws.subnets(vpc).await {
            Ok(subnets) => Arc::new(reconcile::networks(&subnets)),
            Err(error) if error.code == "InvalidVpcID.NotFound" => Arc::default(),
            Err(error) => return Err(error),
        };
        let entry = (Instant::now(), Arc::clone(&networks));
        self.subnets.lock().unwrap_or_else(PoisonError::into_inner).insert(vpc.to_owned(), entry);
        Ok(networks)
    }

    /// Wakes the workers of these bindings; starts those that are not there yet.
    fn wake(self: &Arc<Self>, concerned: &Concerned) {
        if !self.leading.load(Ordering::Acquire) {
            return;
        }
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for key in concerned {
            if let Some(wake) = workers.get(key) {
                wake.wake();
                continue;
            }
            if !self.index().bindings.contains_key(key) {
                continue;
            }
            let wake = Arc::new(Wake::default());
            workers.insert(key.clone(), Arc::clone(&wake));
            let (ctx, key) = (Arc::clone(self), key.clone());
            tokio::spawn(async move {
                let worker = tokio::spawn(reconcile::work(Arc::clone(&ctx), key.clone(), Arc::clone(&wake)));
                if let Err(error) = worker.await {
                    error!(binding = %key, %error, "a worker broke off");
                }
                ctx.ended(&key, &wake);
            });
        }
    }

    /// Has bindings looked at again without forgetting their backoff.
    pub(crate) fn nudge(&self, concerned: &Concerned) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for wake in concerned.iter().filter_map(|key| workers.get(key)) {
            wake.notify.notify_one();
        }
    }

    /// A worker has ended; if its binding is back, another begins.
    fn ended(self: &Arc<Self>, key: &Key, wake: &Wake) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        if !self.index().bindings.contains_key(key) {
            security::forget(self, key);
        }
        if wake.take_changed().is_some() || self.index().bindings.contains_key(key) {
            self.wake(&Concerned::from([key.clone()]));
        }
    }

    /// Whether this replica may write.
    pub(crate) fn is_leading(&self) -> bool {
        self.leading.load(Ordering::Acquire)
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

    /// No further pass begins; those under way have a moment to end.
    async fn step_down(&self) {
        self.leading.store(false, Ordering::Release);
        self.metrics.leader.set(0);
        self.stop.cancel();
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.workers.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
            && Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts the work: every binding gets its first pass.
    fn lead(self: &Arc<Self>) {
        self.leading.store(true, Ordering::Release);
        self.metrics.leader.set(1);
        let all: Concerned = self.index().bindings.keys().cloned().collect();
        info!(bindings = all.len(), "leading");
        self.wake(&all);
        tokio::spawn(security::search(Arc::clone(self)));
        tokio::spawn(gates::sweep(Arc::clone(self)));
    }
}

/// Runs until a signal.
///
/// # Errors
/// A line for people about what is missing at start.
pub(crate) async fn run(flags: Flags) -> Result<(), String> {
    let signals = tgb_process::Signals::listen()?;
    let client = tgb_process::client(flags.kubeconfig.as_deref()).await?;
    let settings = tgb_aws::Settings {
        region: flags.aws_region.clone(),
        vpc_id: flags.aws_vpc_id.clone(),
        cluster_name: flags.cluster_name.clone(),
        limits: tgb_aws::Limits::default(),
    };
    let aws = Aws::connect(settings).await.map_err(|error| error.message)?;
    let mut settings = flags.settings();
    settings.rules.region = Some(aws.region().to_owned());
    match tokio::time::timeout(Duration::from_secs(10), aws.identity()).await {
        Ok(Ok(identity)) => {
            settings.rules.account = Some(identity.account.clone());
            settings.rules.partition = Some(identity.partition.clone());
        }
        Ok(Err(error)) => warn!(%error, "AWS does not say who we are; the account of ARNs is not checked"),
        Err(_) => warn!("AWS does not say who we are in time; the account of ARNs is not checked"),
    }
    if settings.rule_overflow == RuleOverflow::Widen {
        return Err("--rule-overflow=widen is not supported yet; use fail".to_owned());
    }
    let namespaces = flags.watch_namespaces.clone();
    let ctx = Arc::new(Ctx {
        client: client.clone(),
        aws,
        settings,
        events: Events::new(client.clone()),
        security: SecurityGroups::default(),
        metrics: Metrics::new(),
        stop: CancellationToken::new(),
        index: RwLock::default(),
        workers: Mutex::default(),
        subnets: Mutex::default(),
        leading: AtomicBool::new(false),
        unsynced: AtomicUsize::new(0),
        synced: Notify::new(),
    });
    watch(
        &ctx,
        Api::all(client.clone()),
        |index, node: &Node| index.put_node(node),
        Index::remove_node,
        |i| i.nodes.keys().map(|name| Key::new("", name)).collect(),
    );
    watch_all::<DeserializeGuard<TargetGroupBinding>>(
        &ctx,
        &namespaces,
        put_binding,
        Index::remove_binding,
        |i| i.bindings.keys().cloned().collect(),
    );
    watch_all::<Service>(
        &ctx,
        &namespaces,
        |i, s| i.put_service(s),
        Index::remove_service,
        |i| i.services.keys().cloned().collect(),
    );
    watch_all::<EndpointSlice>(
        &ctx,
        &namespaces,
        |i, s| i.put_slice(s),
        Index::remove_slice,
        |i| i.slice_keys().cloned().collect(),
    );
    watch_all::<Pod>(
        &ctx,
        &namespaces,
        |i, p| i.put_pod(p),
        Index::remove_pod,
        |i| i.pods.keys().cloned().collect(),
    );
    let stop = signals.first.clone();
    tokio::spawn(async move {
        signals.first.cancelled().await;
        info!("stopping");
        signals.second.cancelled().await;
        std::process::exit(1);
    });
    metrics::serve(Arc::clone(&ctx), tgb_process::listen(&flags.http_listen).await?);
    while ctx.unsynced.load(Ordering::Acquire) > 0 {
        tokio::select! {
            () = ctx.synced.notified() => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
    let candidate = Candidate::new(
        client,
        &flags.lease_namespace.clone().unwrap_or_else(lease::own_namespace),
        &flags.lease_name,
    );
    if !candidate.acquire(&stop).await {
        return Ok(());
    }
    ctx.lead();
    let is_clean = candidate.keep(&stop).await;
    ctx.step_down().await;
    if !is_clean {
        return Err("the lease is lost; another replica goes on".to_owned());
    }
    candidate.release().await;
    Ok(())
}

fn put_binding(index: &mut Index, binding: &DeserializeGuard<TargetGroupBinding>) -> Concerned {
    match &binding.0 {
        Ok(binding) => index.put_binding(binding.clone()),
        Err(error) => {
            let key = Key::of(&error.metadata);
            warn!(binding = %key, error = %error.error, "a binding that cannot be read");
            Concerned::new()
        }
    }
}

/// As [`watch`], in every namespace or in each of some.
fn watch_all<K>(
    ctx: &Arc<Ctx>,
    namespaces: &[String],
    put: fn(&mut Index, &K) -> Concerned,
    remove: fn(&mut Index, &Key) -> Concerned,
    keys: fn(&Index) -> Vec<Key>,
) where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static,
{
    if namespaces.is_empty() {
        watch(ctx, Api::<K>::all(ctx.client.clone()), put, remove, keys);
    }
    for namespace in namespaces {
        watch(ctx, Api::<K>::namespaced(ctx.client.clone(), namespace), put, remove, keys);
    }
}

/// Keeps a part of the index like the cluster, for ever.
fn watch<K>(
    ctx: &Arc<Ctx>,
    api: Api<K>,
    put: fn(&mut Index, &K) -> Concerned,
    remove: fn(&mut Index, &Key) -> Concerned,
    keys: fn(&Index) -> Vec<Key>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    ctx.unsynced.fetch_add(1, Ordering::AcqRel);
    let ctx = Arc::clone(ctx);
    tokio::spawn(async move {
        let scope = api.namespace().map(str::to_owned);
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let mut listed = HashSet::new();
        let mut synced = false;
        loop {
            let event = match events.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(error) => {
                    warn!(kind = %K::kind(&()), %error, "watch failed; trying again");
                    continue;
                }
            };
            let concerned = {
                let mut index = ctx.index.write().unwrap_or_else(PoisonError::into_inner);
                match event {
                    watcher::Event::Init => {
                        listed.clear();
                        Concerned::new()
                    }
                    watcher::Event::InitApply(object) => {
                        listed.insert(Key::of(object.meta()));
                        put(&mut index, &object)
                    }
                    watcher::Event::InitDone => {
                        let mut concerned = Concerned::new();
                        for key in keys(&index) {
                            let in_scope = scope.as_deref().is_none_or(|scope| *key.namespace == *scope);
                            if in_scope && !listed.contains(&key) {
                                concerned.extend(remove(&mut index, &key));
                            }
                        }
                        listed = HashSet::new();
                        if !synced {
                            synced = true;
                            ctx.unsynced.fetch_sub(1, Ordering::AcqRel);
                            ctx.synced.notify_one();
                        }
                        concerned
                    }
                    watcher::Event::Apply(object) => put(&mut index, &object),
                    watcher::Event::Delete(object) => remove(&mut index, &Key::of(object.meta())),
                }
            };
            ctx.wake(&concerned);
        }
    });
}
