//! What admission looks up: Services and bindings from watched caches, target groups from a short memory.

use futures::TryStreamExt as _;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, ListParams};
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Event, watcher};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};
use tgb_api::rules::Other;
use tgb_api::service::Service;
use tgb_api::target_group::{Protocol, TargetGroup, TargetType};
use tgb_api::v1::{Role, Sharing, TargetGroupBinding};
use tgb_api::{names, objects};
use tgb_aws::{Aws, AwsError, Bounded, TargetGroupQuery};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

// ---- the cluster ----

/// Namespace and name.
type Key = (String, String);
/// By namespace, then by name.
type Namespaced<T> = HashMap<String, BTreeMap<String, Arc<T>>>;

/// A binding, as far as reviews of other objects ask for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bound {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// The Service's name.
    pub(crate) service: String,
    /// The Service's port.
    pub(crate) port: Option<IntOrString>,
    /// What it registers.
    pub(crate) target_type: Option<TargetType>,
    /// The target group's protocol.
    pub(crate) protocol: Option<Protocol>,
    /// The target group, as written or as the controller found it.
    arn: Option<String>,
    sharing: Sharing,
}

impl Bound {
    /// Nothing of one whose deletion has begun: nobody has to look out for it any more.
    pub(crate) fn read(binding: &TargetGroupBinding) -> Option<Self> {
        let group = &binding.spec.target_group;
        let found = || binding.status.as_ref()?.target_group_arn.as_deref();
        (!binding.is_terminating()).then(|| Self {
            namespace: binding.namespace().to_owned(),
            name: binding.name().to_owned(),
            service: binding.spec.service_ref.name.to_string(),
            port: binding.spec.service_ref.port().cloned(),
            target_type: group.target_type,
            protocol: group.protocol,
            arn: group.arn().or_else(found).map(str::to_owned),
            sharing: group.sharing(),
        })
    }
}

/// What is kept of watched objects.
trait Store: Default + Send + Sync + 'static {
    type Source: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static;
    fn insert(&mut self, source: &Self::Source);
    fn remove(&mut self, namespace: &str, name: &str);
    fn keys(&self) -> Vec<Key>;
}

fn keys_of<T>(all: &Namespaced<T>) -> Vec<Key> {
    let names = |(namespace, names): (&String, &BTreeMap<String, Arc<T>>)| {
        names.keys().map(|name| (namespace.clone(), name.clone())).collect::<Vec<_>>()
    };
    all.iter().flat_map(names).collect()
}

fn take<T>(all: &mut Namespaced<T>, namespace: &str, name: &str) -> Option<Arc<T>> {
    let names = all.get_mut(namespace)?;
    let taken = names.remove(name);
    if names.is_empty() {
        all.remove(namespace);
    }
    taken
}

#[derive(Default)]
struct Services(Namespaced<Service>);

impl Store for Services {
    type Source = objects::Service;

    fn insert(&mut self, source: &objects::Service) {
        let service = Arc::new(Service::read(source));
        self.0.entry(service.namespace.clone()).or_default().insert(service.name.clone(), service);
    }

    fn remove(&mut self, namespace: &str, name: &str) {
        take(&mut self.0, namespace, name);
    }

    fn keys(&self) -> Vec<Key> {
        keys_of(&self.0)
    }
}

#[derive(Default)]
struct BindingStore {
    all: Namespaced<Bound>,
    by_arn: HashMap<String, BTreeSet<Key>>,
    /// By the Service's namespace and name.
    by_service: HashMap<Key, BTreeSet<String>>,
}

impl Store for BindingStore {
    type Source = TargetGroupBinding;

    fn insert(&mut self, source: &TargetGroupBinding) {
        self.remove(source.namespace(), source.name());
        let Some(bound) = Bound::read(source) else { return };
        let key = (bound.namespace.clone(), bound.name.clone());
        if let Some(arn) = &bound.arn {
            self.by_arn.entry(arn.clone()).or_default().insert(key.clone());
        }
        let service = (bound.namespace.clone(), bound.service.clone());
        self.by_service.entry(service).or_default().insert(bound.name.clone());
        self.all.entry(key.0).or_default().insert(key.1, Arc::new(bound));
    }

    fn remove(&mut self, namespace: &str, name: &str) {
        let Some(bound) = take(&mut self.all, namespace, name) else { return };
        if let Some(arn) = &bound.arn
            && let Some(keys) = self.by_arn.get_mut(arn)
        {
            keys.remove(&(namespace.to_owned(), name.to_owned()));
            if keys.is_empty() {
                self.by_arn.remove(arn);
            }
        }
        let service = (namespace.to_owned(), bound.service.clone());
        if let Some(names) = self.by_service.get_mut(&service) {
            names.remove(name);
            if names.is_empty() {
                self.by_service.remove(&service);
            }
        }
    }

    fn keys(&self) -> Vec<Key> {
        keys_of(&self.all)
    }
}

impl BindingStore {
    fn get(&self, namespace: &str, name: &str) -> Option<&Arc<Bound>> {
        self.all.get(namespace)?.get(name)
    }

    /// Those that keep a binding of this sharing from having the target group, by namespace and name.
    fn in_the_way(&self, arn: &str, own: (&str, &str), sharing: Sharing) -> Vec<Other> {
        let keys = self.by_arn.get(arn).into_iter().flatten();
        keys.filter(|(namespace, name)| (namespace.as_str(), name.as_str()) != own)
            .filter_map(|(namespace, name)| self.get(namespace, name))
            .filter(|bound| sharing == Sharing::Exclusive || bound.sharing == Sharing::Exclusive)
            .map(|bound| Other {
                namespace: bound.namespace.clone(),
                name: bound.name.clone(),
                sharing: bound.sharing,
            })
            .collect()
    }

    fn of_service(&self, namespace: &str, service: &str) -> Vec<Arc<Bound>> {
        let names = self.by_service.get(&(namespace.to_owned(), service.to_owned())).into_iter().flatten();
        names.filter_map(|name| self.get(namespace, name).cloned()).collect()
    }

    fn of_namespace(&self, namespace: &str) -> Vec<Arc<Bound>> {
        self.all.get(namespace).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }
}

/// A watched store. `missing` counts the scopes (namespaces, or all) whose first listing is not there yet.
struct Cache<S> {
    store: S,
    missing: usize,
    /// When a watch was interrupted, unless something came since.
    interrupted: Option<Instant>,
}

/// A watch that can't be resumed fails again within this; one that was resumed may have nothing to tell for long.
const DOUBTFUL: Duration = Duration::from_secs(60);

impl<S> Cache<S> {
    /// True if something may have changed unseen.
    fn is_doubtful(&self) -> bool {
        self.interrupted.is_some_and(|at| at.elapsed() < DOUBTFUL)
    }
}

struct Watched<S>(Arc<RwLock<Cache<S>>>);

impl<S> Clone for Watched<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Store> Watched<S> {
    fn start(client: &Client, namespaces: &[String]) -> Self {
        let cache = Cache { store: S::default(), missing: namespaces.len().max(1), interrupted: None };
        let watched = Self(Arc::new(RwLock::new(cache)));
        if namespaces.is_empty() {
            tokio::spawn(follow(Api::all(client.clone()), None, watched.clone()));
        }
        for namespace in namespaces {
            let api = Api::namespaced(client.clone(), namespace);
            tokio::spawn(follow(api, Some(namespace.clone()), watched.clone()));
        }
        watched
    }

    fn read(&self) -> RwLockReadGuard<'_, Cache<S>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Cache<S>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up an object. One that can't be read takes the place of what was known of it, which holds no longer, and keeps no
    /// other from being seen.
    fn apply(&self, object: DeserializeGuard<S::Source>) {
        match object.0 {
            Ok(object) => self.write().store.insert(&object),
            Err(error) => {
                let meta = error.metadata;
                let (namespace, name) = (meta.namespace.as_deref(), meta.name.as_deref());
                self.write().store.remove(namespace.unwrap_or_default(), name.unwrap_or_default());
                tracing::warn!(namespace = ?meta.namespace, name = ?meta.name, error = error.error, "an object can't be read");
            }
        }
    }
}

async fn follow<S: Store>(api: Api<DeserializeGuard<S::Source>>, scope: Option<String>, cache: Watched<S>) {
    let key = |object: &DeserializeGuard<S::Source>| -> Key {
        (object.namespace().unwrap_or_default(), object.name_any())
    };
    let mut listed = HashSet::new();
    let mut first = true;
    let mut events = std::pin::pin!(watcher(api, tgb_process::watching()).default_backoff());
    loop {
        let event = events.try_next().await;
        match &event {
            Err(_) => cache.write().interrupted = Some(Instant::now()),
            Ok(_) if cache.read().interrupted.is_some() => cache.write().interrupted = None,
            Ok(_) => {}
        }
        match event {
            Ok(Some(Event::Init)) => listed.clear(),
            Ok(Some(Event::InitApply(object))) => {
                listed.insert(key(&object));
                cache.apply(object);
            }
            Ok(Some(Event::InitDone)) => {
                let mut cache = cache.write();
                let is_of_scope =
                    |(namespace, _): &Key| scope.as_ref().is_none_or(|scope| scope == namespace);
                for gone in cache.store.keys() {
                    if is_of_scope(&gone) && !listed.contains(&gone) {
                        cache.store.remove(&gone.0, &gone.1);
                    }
                }
                listed = HashSet::new();
                if std::mem::take(&mut first) {
                    cache.missing = cache.missing.saturating_sub(1);
                }
            }
            Ok(Some(Event::Apply(object))) => cache.apply(object),
            Ok(Some(Event::Delete(object))) => {
                let (namespace, name) = key(&object);
                cache.write().store.remove(&namespace, &name);
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(error = %tgb_process::told(&error), "a watch was interrupted"),
        }
    }
}

/// Everything that can be looked up in the cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    services: Watched<Services>,
    bindings: Watched<BindingStore>,
    /// The namespaces that are watched; none: all.
    namespaces: Arc<[String]>,
}

impl Cluster {
    /// Starts to watch; an empty list means all namespaces.
    pub(crate) fn watch(client: Client, namespaces: &[String]) -> Self {
        let (services, bindings) = (Watched::start(&client, namespaces), Watched::start(&client, namespaces));
        Self { client, services, bindings, namespaces: namespaces.into() }
    }

    fn watches(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.iter().any(|watched| watched == namespace)
    }

    /// A Service as last seen; none while it may have changed unseen.
    pub(crate) fn cached_service(&self, namespace: &str, name: &str) -> Option<Arc<Service>> {
        let cache = self.services.read();
        if cache.is_doubtful() {
            return None;
        }
        cache.store.0.get(namespace)?.get(name).cloned()
    }

    /// A Service as it is now.
    ///
    /// # Errors
    /// The API server's.
    pub(crate) async fn live_service(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<Service>>, kube::Error> {
        let api: Api<objects::Service> = Api::namespaced(self.client.clone(), namespace);
        Ok(Box::pin(api.get_opt(name)).await?.as_ref().map(Service::read).map(Arc::new))
    }

    /// The addresses of a Service's endpoints, ready or not; `None` where they can't be read.
    pub(crate) async fn endpoints(&self, namespace: &str, service: &str) -> Option<BTreeSet<IpAddr>> {
        let api: Api<objects::EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        let of_service = ListParams::default().labels(&format!("{}={service}", names::SERVICE_NAME_LABEL));
        let slices = Box::pin(api.list(&of_service)).await.ok()?.items;
        let endpoints = slices.into_iter().flat_map(|slice| slice.endpoints.unwrap_or_default());
        let addresses = endpoints.flat_map(|endpoint| endpoint.addresses.unwrap_or_default());
        Some(addresses.filter_map(|address| address.parse().ok()).collect())
    }

    /// True if a binding has this target group now; `None` where it can't be read.
    pub(crate) async fn has_target_group(&self, namespace: &str, name: &str, arn: &str) -> Option<bool> {
        let api: Api<DeserializeGuard<TargetGroupBinding>> = Api::namespaced(self.client.clone(), namespace);
        let found = Box::pin(api.get_opt(name)).await.ok()?;
        let bound = found.and_then(|guard| Bound::read(&guard.0.ok()?));
        Some(bound.is_some_and(|bound| bound.arn.as_deref() == Some(arn)))
    }

    /// Whether a namespace asks for readiness gates; `None` where it can't be read.
    pub(crate) async fn injects(&self, namespace: &str) -> Option<bool> {
        let api: Api<objects::Namespace> = Api::all(self.client.clone());
        let found = Box::pin(api.get_metadata_opt(namespace)).await.ok()??;
        let label = found.metadata.labels.unwrap_or_default().remove(names::INJECT_LABEL);
        Some(label.as_deref() == Some(names::INJECT_ENABLED))
    }

    /// Other bindings that keep one of this sharing from having the target group; `None` while the list of bindings is
    /// not complete, or names none and may have changed unseen.
    pub(crate) fn in_the_way(
        &self,
        arn: &str,
        namespace: &str,
        name: &str,
        sharing: Sharing,
    ) -> Option<Vec<Other>> {
        let cache = self.bindings.read();
        let others = cache.store.in_the_way(arn, (namespace, name), sharing);
        (cache.missing == 0 && !(others.is_empty() && cache.is_doubtful())).then_some(others)
    }

    /// The bindings of a Service, by name; read live while the cache still fills.
    ///
    /// # Errors
    /// The API server's.
    pub(crate) async fn bindings_of_service(
        &self,
        namespace: &str,
        service: &str,
    ) -> Result<Vec<Arc<Bound>>, kube::Error> {
        if let Some(found) = self.complete(namespace, |store| store.of_service(namespace, service)) {
            return Ok(found);
        }
        let mut found = self.live_bindings(namespace).await?;
        found.retain(|bound| bound.service == service);
        Ok(found)
    }

    /// The bindings of a namespace, by name; read live while the cache still fills.
    ///
    /// # Errors
    /// The API server's.
    pub(crate) async fn bindings_of(&self, namespace: &str) -> Result<Vec<Arc<Bound>>, kube::Error> {
        match self.complete(namespace, |store| store.of_namespace(namespace)) {
            Some(found) => Ok(found),
            None => self.live_bindings(namespace).await,
        }
    }

    fn complete<T>(&self, namespace: &str, look: impl Fn(&BindingStore) -> T) -> Option<T> {
        let cache = self.bindings.read();
        (cache.missing == 0 && !cache.is_doubtful() && self.watches(namespace)).then(|| look(&cache.store))
    }

    async fn live_bindings(&self, namespace: &str) -> Result<Vec<Arc<Bound>>, kube::Error> {
        let api: Api<DeserializeGuard<TargetGroupBinding>> = Api::namespaced(self.client.clone(), namespace);
        let list = Box::pin(api.list(&ListParams::default())).await?.items.into_iter();
        let mut found: Vec<_> = list.filter_map(|guard| Bound::read(&guard.0.ok()?)).map(Arc::new).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

// ---- AWS ----

/// How old a description of a target group may be for a new binding.
pub(crate) const FRESH: Duration = Duration::from_secs(30);
/// And for the change of one that is there: what rules look at can't change in AWS.
pub(crate) const KNOWN: Duration = Duration::from_secs(600);
/// How old what can change at any time may be: both reviews of one `apply` see the same, and who repaired it is not
/// refused out of memory.
const MOMENT: Duration = Duration::from_secs(5);
/// Bytes of what is remembered of each kind. Names, roles and external ids are the user's words, of any length.
const BYTES: usize = 4 << 20;
/// Bytes of an entry beside its text.
const ENTRY: usize = 200;
/// Calls of one namespace at the same time: others come in between.
const OF_NAMESPACE: usize = 4;

/// What is asked: ARN or name, role, external id.
type Question = (String, Option<String>, Option<String>);

/// Answers by question, of bounded size; one call at a time for each. That something does not exist is never remembered.
struct Memory<T> {
    answers: Bounded<Question, Answered<T>>,
    /// Calls that are under way.
    asking: Mutex<HashMap<Question, Arc<tokio::sync::Mutex<()>>>>,
}

/// An answer, when it came, and its size.
#[derive(Clone)]
struct Answered<T> {
    value: T,
    at: Instant,
    size: usize,
}

/// A turn to ask, that goes with the last who waits for it.
struct Turn<'a, T> {
    memory: &'a Memory<T>,
    question: &'a Question,
    one: Arc<tokio::sync::Mutex<()>>,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        let mut asking = self.memory.asking.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own, and this.
        if Arc::strong_count(&self.one) <= 2 {
            asking.remove(self.question);
        }
    }
}

impl<T: Clone> Memory<T> {
    fn new() -> Self {
        let size = |(what, role, id): &Question, answer: &Answered<T>| {
            let lengths =
                [what.len(), role.as_ref().map_or(0, String::len), id.as_ref().map_or(0, String::len)];
            ENTRY + lengths.iter().sum::<usize>() + answer.size
        };
        Self { answers: Bounded::new(BYTES, size), asking: Mutex::default() }
    }

    /// The answer, which is remembered as one of `size`, and not older than `most`. One that is too old for this stays for others
    /// until there is a newer one.
    async fn get(
        &self,
        question: Question,
        most: Duration,
        size: impl Fn(&T) -> usize,
        ask: impl Future<Output = Result<Option<T>, AwsError>>,
    ) -> Result<Option<T>, AwsError> {
        if let Some(value) = self.known(&question, most) {
            return Ok(Some(value));
        }
        let one = {
            let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(asking.entry(question.clone()).or_default())
        };
        let turn = Turn { memory: self, question: &question, one };
        let _alone = turn.one.lock().await;
        // Whoever was before may have got it.
        if let Some(value) = self.known(&question, most) {
            return Ok(Some(value));
        }
        let value = ask.await?;
        match &value {
            Some(value) => self.put(question.clone(), value.clone(), size(value)),
            None => self.answers.remove(&question),
        }
        Ok(value)
    }

    fn put(&self, question: Question, value: T, size: usize) {
        self.answers.insert(question, Answered { value, at: Instant::now(), size });
    }

    /// The remembered answer, if it is young enough.
    fn known(&self, question: &Question, most: Duration) -> Option<T> {
        self.answers.get(question).filter(|answer| answer.at.elapsed() < most).map(|answer| answer.value)
    }
}

fn question(what: &str, role: Option<Role<'_>>) -> Question {
    (
        what.to_owned(),
        role.map(|role| role.role_arn.to_owned()),
        role.and_then(|role| role.external_id).map(str::to_owned),
    )
}

/// A registered target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registered {
    /// An IP address or an instance id.
    pub(crate) id: String,
    /// Its port.
    pub(crate) port: u16,
}

/// Target groups as AWS describes them.
pub(crate) struct TargetGroups {
    aws: Aws,
    groups: Memory<Arc<TargetGroup>>,
    tags: Memory<Arc<BTreeMap<String, String>>>,
    targets: Memory<Arc<[Registered]>>,
    /// What AWS lately failed to describe, and how.
    failures: Memory<String>,
    /// The calls of each namespace.
    lines: Bounded<String, Arc<Semaphore>>,
}

/// The asker: the binding's namespace, and its role.
#[derive(Clone, Copy)]
pub(crate) struct Asker<'a> {
    /// The namespace, whose calls wait for each other.
    pub(crate) namespace: &'a str,
    /// The role.
    pub(crate) role: Option<Role<'a>>,
}

impl TargetGroups {
    /// Starts empty. Calls are urgent: a user is waiting.
    pub(crate) fn new(aws: &Aws) -> Self {
        Self {
            aws: aws.urgent(),
            groups: Memory::new(),
            tags: Memory::new(),
            targets: Memory::new(),
            failures: Memory::new(),
            lines: Bounded::new(BYTES, |namespace: &String, _| ENTRY + namespace.len()),
        }
    }

    /// Waits until this namespace may call.
    async fn turn(&self, namespace: &str) -> Option<OwnedSemaphorePermit> {
        let line = || Arc::new(Semaphore::new(OF_NAMESPACE));
        self.lines.get_or_insert_with(namespace.to_owned(), line).acquire_owned().await.ok()
    }

    /// The target group with this ARN or this name, as it was at most `most` ago.
    ///
    /// # Errors
    /// AWS's, but for "not found", which is `None`.
    pub(crate) async fn describe(
        &self,
        Asker { namespace, role }: Asker<'_>,
        query: TargetGroupQuery<'_>,
        most: Duration,
    ) -> Result<Option<Arc<TargetGroup>>, AwsError> {
        let (what, by_name) = match query {
            TargetGroupQuery::Arn(arn) => (arn, false),
            TargetGroupQuery::Name(name) => (name, true),
            TargetGroupQuery::Arns(_) => return Ok(None),
        };
        // Calls of the SDK are large futures; the usual review makes none.
        let ask = Box::pin(async {
            let _turn = self.turn(namespace).await;
            match self.aws.target_groups(role, query).await {
                Ok(found) => Ok(found.into_iter().next().map(Arc::new)),
                Err(error) if error.is_target_group_not_found() => Ok(None),
                Err(error) => Err(error),
            }
        });
        let found = self.groups.get(question(what, role), most, group_size, ask).await?;
        if let Some(found) = found.as_ref().filter(|_| by_name) {
            // The validating request of the same `apply` asks by ARN.
            self.groups.put(question(found.arn.as_str(), role), Arc::clone(found), group_size(found));
        }
        Ok(found)
    }

    /// Its tags.
    ///
    /// # Errors
    /// AWS's.
    pub(crate) async fn tags(
        &self,
        Asker { namespace, role }: Asker<'_>,
        arn: &str,
    ) -> Result<Option<Arc<BTreeMap<String, String>>>, AwsError> {
        let ask = Box::pin(async {
            let _turn = self.turn(namespace).await;
            self.aws.tags(role, arn).await.map(|tags| Some(Arc::new(tags)))
        });
        let size = |tags: &Arc<BTreeMap<String, String>>| {
            tags.iter().map(|(key, value)| key.len() + value.len() + 80).sum()
        };
        self.tags.get(question(arn, role), MOMENT, size, ask).await
    }

    /// The targets that are registered and not draining.
    ///
    /// # Errors
    /// AWS's.
    pub(crate) async fn registered(
        &self,
        Asker { namespace, role }: Asker<'_>,
        arn: &str,
    ) -> Result<Option<Arc<[Registered]>>, AwsError> {
        let ask = Box::pin(async {
            let _turn = self.turn(namespace).await;
            let targets = self.aws.target_health(role, arn).await?;
            let registered = targets.into_iter().filter(|target| target.state.is_registered());
            Ok(Some(registered.map(|it| Registered { id: it.target.id, port: it.target.port }).collect()))
        });
        let size = |all: &Arc<[Registered]>| all.iter().map(|target| target.id.len() + 40).sum();
        self.targets.get(question(arn, role), MOMENT, size, ask).await
    }

    /// Remembers that AWS failed, for the other review of the same `apply`.
    pub(crate) fn failed(&self, role: Option<Role<'_>>, group: &str, reason: &str) {
        self.failures.put(question(group, role), reason.to_owned(), reason.len());
    }

    /// How AWS failed a moment ago, if it did.
    pub(crate) fn failure(&self, role: Option<Role<'_>>, group: &str) -> Option<String> {
        self.failures.known(&question(group, role), MOMENT)
    }
}

fn group_size(group: &Arc<TargetGroup>) -> usize {
    400 + group.arn.as_str().len() + group.load_balancer_arns.iter().map(String::len).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn binding(name: &str, arn: &str, service: &str, sharing: &str) -> TargetGroupBinding {
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {
            "targetGroup": {"arn": arn, "sharing": sharing}, "serviceRef": {"name": service}}}))
        .unwrap()
    }

    fn names(bounds: &[Arc<Bound>]) -> Vec<&str> {
        bounds.iter().map(|bound| bound.name.as_str()).collect()
    }

    #[test]
    fn indexes_follow_every_change() {
        let mut store = BindingStore::default();
        store.insert(&binding("a", "arn:1", "web", "Exclusive"));
        store.insert(&binding("b", "arn:2", "web", "Exclusive"));
        assert_eq!(names(&store.of_service("shop", "web")), ["a", "b"]);
        store.insert(&binding("b", "arn:1", "api", "Exclusive"));
        assert_eq!(names(&store.of_service("shop", "web")), ["a"]);
        assert_eq!(names(&store.of_service("shop", "api")), ["b"]);
        assert_eq!(store.in_the_way("arn:1", ("shop", "a"), Sharing::Exclusive).len(), 1);
        assert!(store.in_the_way("arn:2", ("shop", "c"), Sharing::Exclusive).is_empty());
        assert_eq!(names(&store.of_namespace("shop")), ["a", "b"]);
        store.remove("shop", "a");
        store.remove("shop", "b");
        assert!(store.all.is_empty() && store.by_arn.is_empty() && store.by_service.is_empty());
    }

    #[test]
    fn shared_bindings_are_not_in_the_way_of_shared_ones_and_terminating_ones_of_nobody() {
        let mut store = BindingStore::default();
        store.insert(&binding("a", "arn:1", "web", "Shared"));
        let mut going = binding("b", "arn:1", "web", "Exclusive");
        going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-02T03:04:05Z")).unwrap();
        store.insert(&going);
        assert!(store.in_the_way("arn:1", ("shop", "c"), Sharing::Shared).is_empty());
        assert_eq!(store.in_the_way("arn:1", ("shop", "c"), Sharing::Exclusive).len(), 1);
        assert_eq!(names(&store.of_namespace("shop")), ["a"]);
    }

    #[tokio::test]
    async fn one_call_answers_all_who_ask_and_a_miss_is_not_remembered() {
        let memory = Memory::<u8>::new();
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let ask = async |answer: Option<u8>| {
            memory
                .get(question("arn", None), FRESH, |_| 0, async {
                    calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    Ok(answer)
                })
                .await
                .unwrap()
        };
        assert_eq!(ask(None).await, None);
        assert_eq!(tokio::join!(ask(Some(1)), ask(Some(2)), ask(Some(3))), (Some(1), Some(1), Some(1)));
        assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 2);
        assert!(memory.asking.lock().unwrap().is_empty());
    }
    fn failed() -> AwsError {
        AwsError { operation: "DescribeTargetGroups", code: "Timeout".to_owned(), message: String::new() }
    }

    #[tokio::test]
    async fn what_is_too_old_for_one_stays_for_others_when_no_newer_answer_comes() {
        let memory = Memory::<u8>::new();
        let old = Duration::ZERO;
        let get = async |most, answer| {
            memory.get(question("arn", None), most, |_| 0, std::future::ready(answer)).await
        };
        assert_eq!(get(FRESH, Ok(Some(1))).await, Ok(Some(1)));
        assert_eq!(get(old, Err(failed())).await, Err(failed()));
        assert_eq!(get(FRESH, Ok(Some(2))).await, Ok(Some(1)), "a call that failed");
        let never = memory.get(question("arn", None), old, |_| 0, std::future::pending());
        assert!(tokio::time::timeout(Duration::from_millis(1), never).await.is_err());
        assert_eq!(get(FRESH, Ok(Some(2))).await, Ok(Some(1)), "a call that was given up");
        assert_eq!(get(old, Ok(Some(3))).await, Ok(Some(3)));
        assert_eq!(get(FRESH, Ok(Some(2))).await, Ok(Some(3)));
        assert_eq!(get(old, Ok(None)).await, Ok(None));
        assert_eq!(get(FRESH, Ok(Some(4))).await, Ok(Some(4)), "it was gone meanwhile");
    }

    #[tokio::test]
    async fn names_of_a_megabyte_leave_no_more_than_the_bound_behind() {
        let (groups, failures) = (Memory::<u8>::new(), Memory::<String>::new());
        for n in 0..30 {
            let name = format!("{n}{}", "x".repeat(1 << 20));
            let asked =
                groups.get(question(&name, None), FRESH, |_| 0, std::future::ready(Ok(Some(1)))).await;
            assert_eq!(asked, Ok(Some(1)));
            failures.put(question("web", None), name.clone(), name.len());
            failures.put(question(&name, None), name.clone(), name.len());
            assert!(groups.answers.bytes() <= BYTES && failures.answers.bytes() <= BYTES);
        }
        assert!(groups.asking.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn one_namespace_does_not_take_the_turns_of_others() {
        let aws =
            Aws::connect(tgb_aws::Settings { region: Some("eu-west-1".to_owned()), ..Default::default() });
        let groups = TargetGroups::new(&aws.await.unwrap());
        let mut turns = Vec::new();
        for _ in 0..OF_NAMESPACE {
            turns.push(groups.turn("shop").await);
        }
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, groups.turn("shop")).await.is_err(), "its fifth waits");
        assert!(groups.turn("other").await.is_some());
        turns.pop();
        assert!(groups.turn("shop").await.is_some());
    }

    fn unreadable() -> DeserializeGuard<TargetGroupBinding> {
        let object = json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding",
            "metadata": {"name": "a", "namespace": "shop"}, "spec": {"serviceRef": 3}});
        serde_json::from_value(object).unwrap()
    }

    fn watched() -> Watched<BindingStore> {
        let cache = Cache { store: BindingStore::default(), missing: 0, interrupted: None };
        Watched(Arc::new(RwLock::new(cache)))
    }

    #[test]
    fn an_object_that_can_not_be_read_any_more_is_not_what_it_was() {
        let watched = watched();
        watched.apply(DeserializeGuard(Ok(binding("a", "arn:1", "web", "Exclusive"))));
        assert_eq!(names(&watched.read().store.of_namespace("shop")), ["a"]);
        let object = unreadable();
        assert!(object.0.is_err());
        watched.apply(object);
        assert!(watched.read().store.of_namespace("shop").is_empty());
    }

    #[tokio::test]
    async fn while_a_watch_is_interrupted_nothing_rests_on_what_is_not_known() {
        let client =
            kube::Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
        let services = Watched(Arc::new(RwLock::new(Cache {
            store: Services::default(),
            missing: 0,
            interrupted: None,
        })));
        let cluster = Cluster { client, services, bindings: watched(), namespaces: Arc::new([]) };
        let service = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {}});
        cluster.services.apply(DeserializeGuard(Ok(serde_json::from_value(service).unwrap())));
        cluster.bindings.apply(DeserializeGuard(Ok(binding("a", "arn:1", "web", "Exclusive"))));
        let others =
            |arn| cluster.in_the_way(arn, "shop", "b", Sharing::Exclusive).map(|others| others.len());
        let interrupt = |at| {
            cluster.services.write().interrupted = at;
            cluster.bindings.write().interrupted = at;
        };
        for (interrupted, known, one, none) in [
            (None, true, Some(1), Some(0)),
            (Some(Instant::now()), false, Some(1), None),
            (Instant::now().checked_sub(2 * DOUBTFUL), true, Some(1), Some(0)),
        ] {
            interrupt(interrupted);
            assert_eq!(cluster.cached_service("shop", "web").is_some(), known, "{interrupted:?}");
            assert_eq!((others("arn:1"), others("arn:2")), (one, none), "{interrupted:?}");
            assert_eq!(cluster.complete("shop", |_| ()).is_some(), known, "{interrupted:?}");
        }
    }
}
