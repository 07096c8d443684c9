//! `tgb-controller run`: watches feed the index, the index wakes workers, one per binding.

use crate::Flags;
use crate::context::{Ctx, Wake};
use crate::gates;
use crate::http;
use crate::index::{Concerned, Index, Key};
use crate::kept::Listed;
use crate::lease::{self, Candidate};
use crate::reconcile;
use crate::security;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use tgb_api::objects::{EndpointSlice, Namespace, Node, Pod, Service};
use tgb_aws::Aws;
use tokio::time::Instant;
use tracing::{error, info, warn};

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
        limits: flags.limits()?,
        metrics: tgb_aws::Metrics::default(),
    };
    let aws = Aws::connect(settings).await.map_err(|error| error.message)?;
    let mut settings = flags.settings();
    settings.rules.region = Some(aws.region().to_owned());
    // The VPC is looked for meanwhile; where there is no metadata service, its nodes tell it later.
    let asked = tokio::time::timeout(Duration::from_secs(10), aws.identity());
    match tokio::join!(asked, aws.find_vpc_id()).0 {
        Ok(Ok(identity)) => {
            settings.rules.account = Some(identity.account.clone());
            settings.rules.partition = Some(identity.partition.clone());
        }
        Ok(Err(error)) if error.code == "NoCredentials" => {
            return Err("no AWS credentials are found; give the ServiceAccount a role by IRSA or EKS Pod Identity, or \
                        set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                .to_owned());
        }
        Ok(Err(error)) if error.is_access_denied() => {
            return Err(format!("AWS refuses our credentials: {error}"));
        }
        Ok(Err(error)) => warn!(%error, "AWS does not say who we are; the account of ARNs is not checked"),
        Err(_) => warn!("AWS does not say who we are in time; the account of ARNs is not checked"),
    }
    let namespaces = flags.watch_namespaces.clone();
    // Nothing is written to AWS or to the cluster but while the lease is ours, by our own clock.
    let leader = Arc::new(OnceLock::<Weak<Ctx>>::new());
    let known = Arc::clone(&leader);
    let may_write = move || known.get().and_then(Weak::upgrade).is_some_and(|ctx| ctx.term.lasts());
    aws.fence(may_write.clone());
    let ctx = Arc::new(Ctx::new(lease::fenced(client.clone(), may_write), aws, settings));
    // It is set here only.
    let _ = leader.set(Arc::downgrade(&ctx));
    watch(
        &ctx,
        "nodes",
        Api::all(client.clone()),
        |index, node: Node| index.put_node(&node),
        Index::remove_node,
        |i| i.nodes.keys().map(|name| Key::new("", name)).collect(),
    );
    watch(
        &ctx,
        "namespaces",
        Api::all(client.clone()),
        |index, namespace: Namespace| index.put_namespace(&namespace),
        Index::remove_namespace,
        |i| i.namespaces.keys().map(|name| Key::new("", name)).collect(),
    );
    watch_all::<Listed>(&ctx, "bindings", &namespaces, put_binding, Index::remove_binding, |i| {
        i.binding_keys().cloned().collect()
    });
    watch_all::<Service>(
        &ctx,
        "services",
        &namespaces,
        |i, s| i.put_service(&s),
        Index::remove_service,
        |i| i.services().cloned().collect(),
    );
    watch_all::<EndpointSlice>(
        &ctx,
        "endpointslices",
        &namespaces,
        |i, s| i.put_slice(&s),
        Index::remove_slice,
        |i| i.slice_keys().cloned().collect(),
    );
    watch_all::<Pod>(
        &ctx,
        "pods",
        &namespaces,
        |i, p| i.put_pod(&p),
        Index::remove_pod,
        |i| i.pods().map(|(key, _)| key.clone()).collect(),
    );
    let stop = signals.first.clone();
    tokio::spawn(async move {
        signals.first.cancelled().await;
        info!("stopping");
        signals.second.cancelled().await;
        std::process::exit(1);
    });
    http::serve(Arc::clone(&ctx), tgb_process::listen(&flags.http_listen).await?);
    tokio::select! {
        () = ctx.caches_filled() => {}
        () = stop.cancelled() => return Ok(()),
    }
    if let Some(vpc) = ctx.aws.vpc_id().map(str::to_owned) {
        // So that the first registration does not wait for it.
        let ctx = Arc::clone(&ctx);
        tokio::spawn(async move {
            if let Err(error) = ctx.subnets(&vpc, &[]).await {
                warn!(%error, "the subnets of the VPC are not known yet");
            }
        });
    }
    let candidate = Candidate::new(
        client,
        &flags.lease_namespace.clone().unwrap_or_else(lease::own_namespace),
        &flags.lease_name,
        (&flags.cluster_name, flags.rule_owner.as_deref().unwrap_or_default()),
        flags.lease,
    );
    let Some(until) = candidate.acquire(&stop).await else { return Ok(()) };
    candidate.alone().await?;
    ctx.term.until(until);
    lead(&ctx);
    let holds = |until| {
        if ctx.term.until(until) {
            info!("the lease was renewed late, and is still ours");
            wake_all(&ctx);
        }
    };
    let is_clean = candidate.keep(&stop, holds).await;
    step_down(&ctx).await;
    if !is_clean {
        return Err("the lease is lost; another replica goes on".to_owned());
    }
    candidate.release().await;
    Ok(())
}

/// Starts the work: every binding gets its first pass.
fn lead(ctx: &Arc<Ctx>) {
    info!(bindings = ctx.index().bindings().len(), "leading");
    wake_all(ctx);
    tokio::spawn(security::search(Arc::clone(ctx)));
    tokio::spawn(recover(Arc::clone(ctx)));
    tokio::spawn(gates::sweep(Arc::clone(ctx)));
}

/// When AWS answers again after an outage, nobody waits for the end of a backoff.
async fn recover(ctx: Arc<Ctx>) {
    let mut recoveries = ctx.aws.recoveries();
    loop {
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            () = recoveries.next() => {}
        }
        info!("AWS answers again");
        wake_all(&ctx);
        security::retry(&ctx);
    }
}

/// No further pass begins; those under way have a moment to end.
async fn step_down(ctx: &Ctx) {
    ctx.term.end();
    ctx.stop.cancel();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !ctx.workers().is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// As [`wake`], all of them.
fn wake_all(ctx: &Arc<Ctx>) {
    let all: Concerned = ctx.index().bindings().map(|(key, _)| key.clone()).collect();
    wake(ctx, &all);
}

/// Wakes the workers of these bindings; starts those that are not there yet.
fn wake(ctx: &Arc<Ctx>, concerned: &Concerned) {
    if !ctx.term.serves() {
        return;
    }
    let mut workers = ctx.workers();
    for key in concerned {
        if let Some(wake) = workers.get(key) {
            wake.wake();
            continue;
        }
        if !ctx.index().has_binding(key) {
            continue;
        }
        let wake = Arc::new(Wake::default());
        workers.insert(key.clone(), Arc::clone(&wake));
        let (ctx, key) = (Arc::clone(ctx), key.clone());
        tokio::spawn(async move {
            let worker = tokio::spawn(reconcile::work(Arc::clone(&ctx), key.clone(), Arc::clone(&wake)));
            if let Err(error) = worker.await {
                error!(binding = %key, %error, "a worker broke off");
            }
            ended(&ctx, &key, &wake);
        });
    }
}

/// A worker has ended; if its binding is back, another begins.
fn ended(ctx: &Arc<Ctx>, key: &Key, wake: &Wake) {
    ctx.workers().remove(key);
    let is_there = ctx.index().has_binding(key);
    if !is_there {
        security::forget(ctx, key);
        ctx.standings().remove(key);
    }
    if wake.take_changed().is_some() || is_there {
        self::wake(ctx, &Concerned::from([key.clone()]));
    }
}

fn put_binding(index: &mut Index, binding: Listed) -> Concerned {
    match binding {
        Listed::Read(binding) => index.put_binding(*binding),
        Listed::Unreadable { metadata, error, keeps } => {
            let key = Key::of(&metadata);
            warn!(binding = %key, error, "a binding that cannot be read");
            index.put_unreadable(key, keeps);
            Concerned::new()
        }
    }
}

/// As [`watch`], in every namespace or in each of some.
fn watch_all<K>(
    ctx: &Arc<Ctx>,
    cache: &'static str,
    namespaces: &[String],
    put: fn(&mut Index, K) -> Concerned,
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
        watch(ctx, cache, Api::<K>::all(ctx.client.clone()), put, remove, keys);
    }
    for namespace in namespaces {
        watch(ctx, cache, Api::<K>::namespaced(ctx.client.clone(), namespace), put, remove, keys);
    }
}

/// Keeps a part of the index like the cluster, for ever.
fn watch<K>(
    ctx: &Arc<Ctx>,
    cache: &'static str,
    api: Api<K>,
    put: fn(&mut Index, K) -> Concerned,
    remove: fn(&mut Index, &Key) -> Concerned,
    keys: fn(&Index) -> Vec<Key>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    ctx.expect_cache();
    let ctx = Arc::clone(ctx);
    tokio::spawn(async move {
        let scope = api.namespace().map(str::to_owned);
        let mut events = watcher(api, tgb_process::watching()).default_backoff().boxed();
        // Keys would be as large as what is kept of some objects. That two have the same hash, of which one is gone, is as likely
        // as a flipped bit.
        let (hasher, mut listed) = (RandomState::new(), HashSet::new());
        let mut synced = false;
        loop {
            let event = match events.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(error) => {
                    warn!(cache, %error, "watch failed; trying again");
                    ctx.broken().entry(cache).or_insert_with(Instant::now);
                    continue;
                }
            };
            ctx.broken().remove(cache);
            let concerned = {
                let mut index = ctx.index_mut();
                match event {
                    watcher::Event::Init => {
                        listed.clear();
                        Concerned::new()
                    }
                    watcher::Event::InitApply(object) => {
                        listed.insert(hasher.hash_one(Key::of(object.meta())));
                        put(&mut index, object)
                    }
                    watcher::Event::InitDone => {
                        let mut concerned = Concerned::new();
                        for key in keys(&index) {
                            let in_scope = scope.as_deref().is_none_or(|scope| *key.namespace == *scope);
                            if in_scope && !listed.contains(&hasher.hash_one(&key)) {
                                concerned.extend(remove(&mut index, &key));
                            }
                        }
                        listed = HashSet::new();
                        if !synced {
                            synced = true;
                            ctx.cache_filled();
                        }
                        concerned
                    }
                    watcher::Event::Apply(object) => put(&mut index, object),
                    watcher::Event::Delete(object) => remove(&mut index, &Key::of(object.meta())),
                }
            };
            wake(&ctx, &concerned);
        }
    });
}
