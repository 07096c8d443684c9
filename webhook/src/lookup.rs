//! What admission looks up: Services and bindings from watched caches, target groups from a short memory.

use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1 as core;
use kube::api::{Api, ListParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tgb_api::rules::Other;
use tgb_api::service::Service;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{Role, TargetGroupBinding};
use tgb_aws::{Aws, AwsError, TargetGroupQuery};

/// Namespace and name.
type Key = (String, String);

/// What is kept of watched objects.
trait Kept: Clone + Send + Sync + 'static {
    type Source: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static;
    fn keep(source: Self::Source) -> Self;
}

impl Kept for Service {
    type Source = core::Service;
    fn keep(source: core::Service) -> Self {
        Self::read(&source)
    }
}

impl Kept for Arc<TargetGroupBinding> {
    type Source = TargetGroupBinding;
    fn keep(mut source: TargetGroupBinding) -> Self {
        source.metadata.managed_fields = None;
        source.metadata.annotations = None;
        if let Some(status) = &mut source.status {
            status.conditions = Vec::new();
        }
        Self::new(source)
    }
}

/// A watched cache. `scopes` counts those (namespaces, or all) whose first listing is still missing.
struct Cache<T> {
    objects: HashMap<Key, T>,
    missing_scopes: usize,
}

type Shared<T> = Arc<RwLock<Cache<T>>>;

fn read<T>(cache: &Shared<T>) -> std::sync::RwLockReadGuard<'_, Cache<T>> {
    cache.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(cache: &Shared<T>) -> std::sync::RwLockWriteGuard<'_, Cache<T>> {
    cache.write().unwrap_or_else(PoisonError::into_inner)
}

fn watch<T>(client: &Client, namespaces: &[String]) -> Shared<T>
where
    T: Kept,
    T::Source: Resource<Scope = kube::core::NamespaceResourceScope>,
{
    let cache =
        Arc::new(RwLock::new(Cache { objects: HashMap::new(), missing_scopes: namespaces.len().max(1) }));
    if namespaces.is_empty() {
        tokio::spawn(follow(Api::all(client.clone()), None, Arc::clone(&cache)));
    }
    for namespace in namespaces {
        let api = Api::namespaced(client.clone(), namespace);
        tokio::spawn(follow(api, Some(namespace.clone()), Arc::clone(&cache)));
    }
    cache
}

async fn follow<T: Kept>(api: Api<T::Source>, scope: Option<String>, cache: Shared<T>) {
    let key = |object: &T::Source| {
        let meta = object.meta();
        (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    };
    let mut listed = HashMap::new();
    let mut first = true;
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    loop {
        match events.try_next().await {
            Ok(Some(Event::Init)) => listed = HashMap::new(),
            Ok(Some(Event::InitApply(object))) => {
                listed.insert(key(&object), T::keep(object));
            }
            Ok(Some(Event::InitDone)) => {
                let mut cache = write(&cache);
                cache
                    .objects
                    .retain(|(namespace, _), _| scope.as_ref().is_some_and(|scope| scope != namespace));
                cache.objects.extend(std::mem::take(&mut listed));
                if std::mem::take(&mut first) {
                    cache.missing_scopes = cache.missing_scopes.saturating_sub(1);
                }
            }
            Ok(Some(Event::Apply(object))) => {
                write(&cache).objects.insert(key(&object), T::keep(object));
            }
            Ok(Some(Event::Delete(object))) => {
                write(&cache).objects.remove(&key(&object));
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "a watch was interrupted"),
        }
    }
}

/// Everything that can be looked up in the cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    services: Shared<Service>,
    bindings: Shared<Arc<TargetGroupBinding>>,
    partial: bool,
}

impl Cluster {
    /// Starts to watch; an empty list means all namespaces.
    pub(crate) fn watch(client: Client, namespaces: &[String]) -> Self {
        let (services, bindings) = (watch(&client, namespaces), watch(&client, namespaces));
        Self { client, services, bindings, partial: !namespaces.is_empty() }
    }

    /// A Service as last seen.
    pub(crate) fn cached_service(&self, namespace: &str, name: &str) -> Option<Service> {
        read(&self.services).objects.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// A Service as it is now.
    ///
    /// # Errors
    /// The API server's.
    pub(crate) async fn live_service(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Service>, kube::Error> {
        let api: Api<core::Service> = Api::namespaced(self.client.clone(), namespace);
        Ok(api.get_opt(name).await?.as_ref().map(Service::read))
    }

    /// Whether a namespace asks for readiness gates; `None` where it can't be read.
    pub(crate) async fn injects(&self, namespace: &str) -> Option<bool> {
        use tgb_api::names;
        let api: Api<core::Namespace> = Api::all(self.client.clone());
        let found = api.get_metadata_opt(namespace).await.ok()??;
        let label = found.metadata.labels.unwrap_or_default().remove(names::INJECT_LABEL);
        Some(label.as_deref() == Some(names::INJECT_ENABLED))
    }

    /// Other bindings of a target group that are not terminating; `None` while the list is not complete.
    pub(crate) fn others(&self, arn: &str, namespace: &str, name: &str) -> Option<Vec<Other>> {
        let cache = read(&self.bindings);
        if cache.missing_scopes > 0 {
            return None;
        }
        let is_other = |binding: &&Arc<TargetGroupBinding>| {
            let of_status = || binding.status.as_ref()?.target_group_arn.as_deref();
            let its = binding.spec.target_group.arn().or_else(of_status);
            its == Some(arn)
                && !binding.is_terminating()
                && (binding.namespace(), binding.name()) != (namespace, name)
        };
        let mut found: Vec<Other> = cache
            .objects
            .values()
            .filter(is_other)
            .map(|binding| Other {
                namespace: binding.namespace().to_owned(),
                name: binding.name().to_owned(),
                sharing: binding.spec.target_group.sharing(),
            })
            .collect();
        found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Some(found)
    }

    /// The bindings of a namespace, by name; read live while the cache still fills.
    pub(crate) async fn bindings_of(&self, namespace: &str) -> Vec<Arc<TargetGroupBinding>> {
        let complete = {
            let cache = read(&self.bindings);
            (cache.missing_scopes == 0 && !self.partial).then(|| {
                cache.objects.values().filter(|b| b.namespace() == namespace).cloned().collect::<Vec<_>>()
            })
        };
        let mut found = match complete {
            Some(found) => found,
            None => {
                let api: Api<TargetGroupBinding> = Api::namespaced(self.client.clone(), namespace);
                let list = api.list(&ListParams::default()).await;
                list.map(|list| list.items.into_iter().map(Arc::new).collect()).unwrap_or_default()
            }
        };
        found.sort_by(|a, b| a.name().cmp(b.name()));
        found
    }
}

/// How old a description of a target group may be.
const FRESH: Duration = Duration::from_secs(30);
/// When this many are remembered, the old ones are forgotten.
const MANY: usize = 4096;

/// What is asked: ARN or name, role, external id.
type Question = (String, Option<String>, Option<String>);
type Slot<T> = Arc<tokio::sync::Mutex<Option<(Instant, T)>>>;
type Memory<T> = Mutex<HashMap<Question, Slot<T>>>;

/// Target groups: one call at a time for each, remembered for 30 s. That something does not exist is never remembered.
pub(crate) struct TargetGroups {
    aws: Aws,
    groups: Memory<TargetGroup>,
    tags: Memory<Arc<BTreeMap<String, String>>>,
    counts: Memory<usize>,
}

fn slot<T>(memory: &Memory<T>, question: Question) -> Slot<T> {
    let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
    if memory.len() >= MANY {
        memory.retain(|_, slot| {
            slot.try_lock().map_or(true, |slot| slot.as_ref().is_some_and(|(at, _)| at.elapsed() < FRESH))
        });
    }
    Arc::clone(memory.entry(question).or_default())
}

async fn remembered<T: Clone>(
    memory: &Memory<T>,
    question: Question,
    ask: impl Future<Output = Result<Option<T>, AwsError>>,
) -> Result<Option<T>, AwsError> {
    let slot = slot(memory, question);
    let mut slot = slot.lock().await;
    if let Some((_, value)) = slot.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
        return Ok(Some(value.clone()));
    }
    let value = ask.await?;
    *slot = value.clone().map(|value| (Instant::now(), value));
    Ok(value)
}

fn question(what: &str, role: Option<Role<'_>>) -> Question {
    (
        what.to_owned(),
        role.map(|role| role.role_arn.to_owned()),
        role.and_then(|role| role.external_id).map(str::to_owned),
    )
}

impl TargetGroups {
    /// Remembers nothing yet.
    pub(crate) fn new(aws: Aws) -> Self {
        Self { aws, groups: Mutex::default(), tags: Mutex::default(), counts: Mutex::default() }
    }

    /// The target group with this ARN or this name.
    ///
    /// # Errors
    /// AWS's, but for "not found", which is `None`.
    pub(crate) async fn describe(
        &self,
        role: Option<Role<'_>>,
        query: TargetGroupQuery<'_>,
    ) -> Result<Option<TargetGroup>, AwsError> {
        let (what, by_name) = match query {
            TargetGroupQuery::Arn(arn) => (arn, false),
            TargetGroupQuery::Name(name) => (name, true),
            TargetGroupQuery::Arns(_) => return Ok(None),
        };
        let ask = async {
            match self.aws.target_groups(role, query).await {
                Ok(found) => Ok(found.into_iter().next()),
                Err(error) if error.is_target_group_not_found() => Ok(None),
                Err(error) => Err(error),
            }
        };
        let found = remembered(&self.groups, question(what, role), ask).await?;
        if let Some(found) = found.as_ref().filter(|_| by_name) {
            // The validating request of the same `apply` asks by ARN.
            let slot = slot(&self.groups, question(found.arn.as_str(), role));
            if let Ok(mut slot) = slot.try_lock() {
                *slot = Some((Instant::now(), found.clone()));
            }
        }
        Ok(found)
    }

    /// Its tags.
    ///
    /// # Errors
    /// AWS's.
    pub(crate) async fn tags(
        &self,
        role: Option<Role<'_>>,
        arn: &str,
    ) -> Result<Option<Arc<BTreeMap<String, String>>>, AwsError> {
        let ask = async { self.aws.tags(role, arn).await.map(|tags| Some(Arc::new(tags))) };
        remembered(&self.tags, question(arn, role), ask).await
    }

    /// How many targets are registered and not draining.
    ///
    /// # Errors
    /// AWS's.
    pub(crate) async fn registered(
        &self,
        role: Option<Role<'_>>,
        arn: &str,
    ) -> Result<Option<usize>, AwsError> {
        use tgb_aws::values::TargetState;
        let ask = async {
            let targets = self.aws.target_health(role, arn).await?;
            Ok(Some(targets.iter().filter(|target| target.state != TargetState::Draining).count()))
        };
        remembered(&self.counts, question(arn, role), ask).await
    }
}
