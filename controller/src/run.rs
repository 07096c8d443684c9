//! `tgb-controller run`: watches feed the index, the index wakes workers, one per binding.

use crate::Flags;
use crate::context::{Ctx, Vital, Wake, Watched};
use crate::gates;
use crate::http;
use crate::index::{Concerned, Index, Key};
use crate::kept::Listed;
use crate::lease::{self, Keeper, News, Term};
use crate::reason::EventReason;
use crate::reconcile::{self, BACKOFF_FIRST, BACKOFF_LAST, backoff};
use crate::security;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tgb_api::objects::{EndpointSlice, Namespace, Node, Pod, Service};
use tgb_aws::Aws;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
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
        // One that begins at the end of a term has ended before another leader writes.
        write_timeout: Some(flags.lease.margin()),
        ..Default::default()
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
    let term = Arc::new(Term::new(flags.lease.margin()));
    let (may_write, may_take) = (Arc::clone(&term), Arc::clone(&term));
    aws.fence(move || may_write.lasts());
    let fenced = lease::fenced(client, move || may_take.allows());
    let vital = Vital::new(signals.first.clone());
    let ctx = Arc::new(Ctx::new(fenced, aws, settings, (Arc::clone(&term), vital)));
    watch(
        &ctx,
        ("nodes", None),
        Api::all,
        |index, node: Node| index.put_node(&node),
        Index::remove_node,
        |i| i.nodes.keys().map(|name| Key::new("", name)).collect(),
    );
    watch(
        &ctx,
        ("namespaces", None),
        Api::all,
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
        () = stop.cancelled() => return ended(&ctx),
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
    let post = lease::Post {
        kubeconfig: flags.kubeconfig.clone(),
        namespace: flags.lease_namespace.clone().unwrap_or_else(lease::own_namespace),
        name: flags.lease_name.clone(),
        cluster: flags.cluster_name.clone(),
        owner: flags.rule_owner.clone().unwrap_or_default(),
        periods: flags.lease,
    };
    let mut lease = Keeper::start(post, term, stop.clone())?;
    loop {
        let news = tokio::select! {
            () = stop.cancelled() => break,
            news = lease.news() => news,
        };
        match news {
            News::Leads => lead(&ctx),
            News::Late => {
                info!("the lease was renewed late, and is still ours");
                wake_all(&ctx);
            }
            News::Over(end) => {
                step_down(&ctx).await;
                return end.and(ended(&ctx));
            }
        }
    }
    step_down(&ctx).await;
    ended(&ctx).and(lease.give_back().await)
}

/// The end of the process: well after a signal, else with the reason.
fn ended(ctx: &Ctx) -> Result<(), String> {
    ctx.vital.broken_off().map_or(Ok(()), |why| Err(why.to_owned()))
}

/// Starts the work: every binding gets its first pass.
fn lead(ctx: &Arc<Ctx>) {
    info!(bindings = ctx.index().bindings().len(), "leading");
    wake_all(ctx);
    ctx.vital.keep_up("the search for security group rules".to_owned(), security::search(Arc::clone(ctx)));
    ctx.vital.keep_up("the look-out for AWS".to_owned(), recover(Arc::clone(ctx)));
    ctx.vital.keep_up("the sweep of readiness gates".to_owned(), gates::sweep(Arc::clone(ctx)));
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
    ctx.vital.halt();
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
            let work = || reconcile::work(Arc::clone(&ctx), key.clone(), Arc::clone(&wake));
            let pause = |failures| backoff(failures, fastrand::f64());
            again(work, pause, &ctx.stop, |error| broke_off(&ctx, &key, error)).await;
            worker_ended(&ctx, &key, &wake);
        });
    }
}

/// Does work to its end, after a panic once more: each time later, so that what makes it panic takes no CPU from the rest.
async fn again<F>(
    work: impl Fn() -> F,
    pause: impl Fn(u32) -> Duration,
    stop: &CancellationToken,
    broke_off: impl Fn(JoinError),
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut failures = 0;
    loop {
        let begun = Instant::now();
        let Err(error) = tokio::spawn(work()).await else { return };
        broke_off(error);
        failures = if begun.elapsed() > BACKOFF_LAST { 1 } else { failures + 1 };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause(failures)) => {}
        }
    }
}

/// A worker has panicked.
fn broke_off(ctx: &Ctx, key: &Key, error: JoinError) {
    error!(binding = %key, %error, "a worker broke off; it begins anew after a backoff");
    ctx.metrics.broken_off.inc();
    if let Some(binding) = ctx.index().binding(key) {
        let note = "the controller failed over this binding; its log says where. It tries again".to_owned();
        ctx.events.warning(&binding, EventReason::ReconcileFailed, note);
    }
}

/// A worker has ended; if its binding is back, another begins.
fn worker_ended(ctx: &Arc<Ctx>, key: &Key, wake: &Wake) {
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
        watch(ctx, (cache, None), Api::<K>::all, put, remove, keys);
    }
    for namespace in namespaces {
        let api = |client| Api::<K>::namespaced(client, namespace);
        watch(ctx, (cache, Some(Arc::from(namespace.as_str()))), api, put, remove, keys);
    }
}

/// Keeps a part of the index like the cluster, for ever.
fn watch<K>(
    ctx: &Arc<Ctx>,
    watched: Watched,
    api: impl FnOnce(Client) -> Api<K>,
    put: fn(&mut Index, K) -> Concerned,
    remove: fn(&mut Index, &Key) -> Concerned,
    keys: fn(&Index) -> Vec<Key>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    ctx.expect_cache();
    let (cache, scope) = watched.clone();
    let mended = {
        let (ctx, watched) = (Arc::downgrade(ctx), watched.clone());
        move || {
            if let Some(ctx) = ctx.upgrade() {
                mend(&ctx, &watched);
            }
        }
    };
    let api = api(heard(ctx.client.clone(), mended));
    let place = scope.as_ref().map(|namespace| format!(" in {namespace}")).unwrap_or_default();
    let vital = ctx.vital.clone();
    let ctx = Arc::clone(ctx);
    vital.keep_up(format!("the watch of {cache}{place}"), async move {
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
                    warn!(cache, error = %tgb_process::told(&error), "watch failed; trying again");
                    ctx.watches().fail(&watched, Instant::now());
                    continue;
                }
            };
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

/// The same client, which tells of every answer that is not an error. A watch that is answered again says nothing itself until
/// something changes.
fn heard(client: Client, answered: impl Fn() + Clone + Send + 'static) -> Client {
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request: ::http::Request<kube::client::Body>| {
        let (client, answered) = (client.clone(), answered.clone());
        async move {
            let answer = client.send(request).await?;
            if answer.status().is_success() {
                answered();
            }
            Ok::<_, kube::Error>(answer)
        }
    });
    Client::new(service, namespace)
}

/// A watch is answered again. Where it was not for a while, passes may have put off what they could not be sure of.
fn mend(ctx: &Ctx, watched: &Watched) {
    let broken = ctx.watches().mend(watched, Instant::now());
    if broken.is_some_and(|broken| broken > BACKOFF_FIRST) {
        info!(
            cache = watched.0,
            seconds = broken.unwrap_or_default().as_secs(),
            "the watch is answered again"
        );
        let all: Concerned = ctx.index().bindings().map(|(key, _)| key.clone()).collect();
        ctx.nudge(&all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[tokio::test]
    async fn a_worker_that_panics_begins_anew_ever_later_until_it_ends() {
        let starts = Arc::new(Mutex::new(0));
        let work = || {
            let starts = Arc::clone(&starts);
            async move {
                let count = {
                    let mut starts = starts.lock().unwrap();
                    *starts += 1;
                    *starts
                };
                assert!(count >= 5, "as a worker does that fails over its binding");
            }
        };
        let (panics, pauses) = (Mutex::new(0), Mutex::new(Vec::new()));
        let pause = |failures| {
            pauses.lock().unwrap().push(failures);
            Duration::ZERO
        };
        again(work, pause, &CancellationToken::new(), |_| *panics.lock().unwrap() += 1).await;
        let (panics, pauses) = (*panics.lock().unwrap(), pauses.lock().unwrap().clone());
        assert_eq!((panics, pauses), (4, vec![1, 2, 3, 4]));
    }

    #[tokio::test]
    async fn a_worker_that_panics_does_not_hold_up_the_end() {
        let stop = CancellationToken::new();
        stop.cancel();
        let work = || async { panic!("as a worker does that fails over its binding") };
        again(work, |_| Duration::from_secs(3_600), &stop, drop).await;
    }

    #[tokio::test]
    async fn a_watch_hears_of_answers_and_not_of_refusals() {
        for (code, heard_of) in [(200, 1), (403, 0), (500, 0)] {
            let service = tower::service_fn(move |_: ::http::Request<kube::client::Body>| async move {
                let answer = ::http::Response::builder().status(code).body(kube::client::Body::empty());
                Ok::<_, tower::BoxError>(answer.unwrap())
            });
            let count = Arc::new(Mutex::new(0));
            let counted = Arc::clone(&count);
            let client = heard(Client::new(service, "default"), move || *counted.lock().unwrap() += 1);
            let request = ::http::Request::get("/").body(kube::client::Body::empty()).unwrap();
            // Whether the client makes an error of it is its own business.
            let _ = client.send(request).await;
            assert_eq!(*count.lock().unwrap(), heard_of, "{code}");
        }
    }
}
