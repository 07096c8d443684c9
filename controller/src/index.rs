//! What the cluster looks like, stripped to what decisions need, and which bindings a change concerns.
//!
//! Nothing here waits or calls: watches put objects in ([`Index::put_pod`], …) and get back the keys of the bindings
//! to look at; [`crate::desired`] reads it.

use base64::Engine;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;
use tgb_api::names;
use tgb_api::objects;
use tgb_api::service::Service;
use tgb_api::target_group::TargetType;
use tgb_api::v1::{Condition, TargetGroupBinding};

#[cfg(test)]
#[path = "index_tests.rs"]
mod lookups;

/// Namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: Arc::from(namespace), name: Arc::from(name) }
    }

    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        Self::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
    }

    /// Another name in the same namespace.
    pub(crate) fn beside(&self, name: &str) -> Self {
        Self { namespace: Arc::clone(&self.namespace), name: Arc::from(name) }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Values that many hold, each kept once.
#[derive(Debug)]
struct Pool<T: ?Sized>(HashSet<Arc<T>>);

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self(HashSet::new())
    }
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    fn share(&mut self, value: Arc<T>) -> Arc<T> {
        if let Some(known) = self.0.get(&*value) {
            return Arc::clone(known);
        }
        if self.0.len() == self.0.capacity() {
            self.0.retain(|known| Arc::strong_count(known) > 1);
            // Where all are in use, this look through them is not worth while soon again.
            if self.0.len() > self.0.capacity() / 2 {
                self.0.reserve(self.0.len() + 1);
            }
        }
        self.0.insert(Arc::clone(&value));
        value
    }
}

/// The bindings that a change concerns.
pub(crate) type Concerned = BTreeSet<Key>;

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Slice {
    /// `IPv4`, `IPv6` or `FQDN`.
    pub(crate) address_type: String,
    pub(crate) ports: Box<[SlicePort]>,
    pub(crate) endpoints: Box<[Endpoint]>,
}

/// A port of a slice: the Service port's name (empty where it has none) and what the pods listen on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct SlicePort {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) port: u16,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Endpoint {
    pub(crate) addresses: Box<[IpAddr]>,
    pub(crate) ready: bool,
    /// The pod of the slice's namespace that `targetRef` names.
    pub(crate) pod: Option<Arc<str>>,
    pub(crate) node: Option<Arc<str>>,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) ips: Box<[IpAddr]>,
    /// Neither finished nor terminating.
    pub(crate) running: bool,
    pub(crate) containers_ready: bool,
    pub(crate) node: Option<Arc<str>>,
    /// Sorted.
    pub(crate) labels: Arc<[(Arc<str>, Arc<str>)]>,
    /// Readiness gates of ours with the condition's (status, reason, message), if it is set.
    pub(crate) gates: BTreeMap<String, Option<(String, String, String)>>,
    /// Container ports by name.
    pub(crate) ports: Arc<BTreeMap<String, u16>>,
    /// The annotation `vpc.amazonaws.com/pod-eni`.
    pub(crate) eni: Option<String>,
    /// QUIC server ids by container port, as AWS writes them; port 0 stands for all that are not declared.
    pub(crate) quic: BTreeMap<u16, String>,
}

impl Pod {
    /// The value of a label.
    pub(crate) fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(other, _)| **other == *name).map(|(_, value)| &**value)
    }

    /// The QUIC server id of what listens on a port.
    pub(crate) fn quic_server_id(&self, port: u16) -> Option<&String> {
        self.quic.get(&port).or_else(|| self.quic.get(&0))
    }
}

/// Whether a node is ready, as its condition says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum NodeReady {
    Yes,
    No,
    #[default]
    Unknown,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Node {
    pub(crate) ready: NodeReady,
    pub(crate) labels: BTreeMap<String, String>,
    /// About to be taken away by cluster-autoscaler or Karpenter.
    pub(crate) leaving: bool,
    pub(crate) provider_id: String,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Node {
    /// The EC2 instance, if the provider id names one (`aws:///eu-west-1a/i-0123`).
    pub(crate) fn instance_id(&self) -> Option<&str> {
        let (scheme, rest) = self.provider_id.split_once("://")?;
        let id = rest.rsplit('/').next()?;
        let digits = id.strip_prefix("i-")?;
        (scheme == "aws" && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_alphanumeric()))
            .then_some(id)
    }

    /// The zone label.
    pub(crate) fn zone(&self) -> Option<&str> {
        self.labels.get("topology.kubernetes.io/zone").map(String::as_str)
    }
}

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Namespace {
    /// Its pods are to get readiness gates.
    pub(crate) injects: bool,
    pub(crate) terminating: bool,
}

/// Everything that is watched.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) bindings: BTreeMap<Key, Arc<TargetGroupBinding>>,
    /// Bindings that can't be read, and were not before.
    pub(crate) unreadable: BTreeSet<Key>,
    // Half of a table is empty: what is large is not in it.
    pub(crate) services: HashMap<Key, Box<Service>>,
    pub(crate) pods: HashMap<Key, Box<Pod>>,
    pub(crate) nodes: BTreeMap<Arc<str>, Node>,
    pub(crate) namespaces: HashMap<Arc<str>, Namespace>,
    // Of these there is almost always one: a vector of one is a tenth of a set of one.
    /// Slices by Service, with their names.
    slices: HashMap<Key, Vec<(Arc<str>, Slice)>>,
    slice_owner: HashMap<Key, Key>,
    by_service: HashMap<Key, Vec<Key>>,
    /// Bindings by the ARN of their target group, the oldest first.
    by_arn: HashMap<Arc<str>, Vec<(Option<Timestamp>, Key)>>,
    /// The pods of an address.
    by_ip: HashMap<IpAddr, Vec<Key>>,
    /// The Services whose slices name a pod.
    by_endpoint: HashMap<Key, Vec<Key>>,
    /// The Services with a selector, by its first label.
    by_label: HashMap<Key, Vec<Key>>,
    /// How many nodes say that they are an instance.
    by_instance: HashMap<String, usize>,
    /// The pods with a readiness gate of a binding, whether or not that exists.
    gated: BTreeMap<Key, BTreeSet<Key>>,
    words: Pool<str>,
    labels: Pool<[(Arc<str>, Arc<str>)]>,
    ports: Pool<BTreeMap<String, u16>>,
}

impl Index {
    /// The slices of a Service.
    pub(crate) fn slices(&self, service: &Key) -> impl Iterator<Item = &Slice> {
        self.slices.get(service).into_iter().flatten().map(|(_, slice)| slice)
    }

    /// Every slice.
    pub(crate) fn slice_keys(&self) -> impl Iterator<Item = &Key> {
        self.slice_owner.keys()
    }

    /// A pod, with the key that is kept.
    pub(crate) fn pod(&self, key: &Key) -> Option<(&Key, &Pod)> {
        self.pods.get_key_value(key).map(|(key, pod)| (key, &**pod))
    }

    /// The pods that have an address.
    pub(crate) fn pods_at(&self, ip: &IpAddr) -> impl Iterator<Item = (&Key, &Pod)> {
        self.by_ip.get(ip).into_iter().flatten().filter_map(|key| self.pod(key))
    }

    /// The bindings that pods have readiness gates of, whether or not they exist, and those pods.
    pub(crate) fn gated(&self) -> &BTreeMap<Key, BTreeSet<Key>> {
        &self.gated
    }

    /// The running pods with a readiness gate of a binding.
    pub(crate) fn gated_pods(&self, binding: &Key) -> impl Iterator<Item = (&Key, &Pod)> {
        let pods = self.gated.get(binding).into_iter().flatten();
        pods.filter_map(|key| self.pod(key)).filter(|(_, pod)| pod.running)
    }

    /// The pods that a Service's slices name.
    pub(crate) fn pods_of(&self, service: &Key) -> impl Iterator<Item = (&Key, &Pod)> {
        let endpoints = self.slices(service).flat_map(|slice| &slice.endpoints);
        endpoints.filter_map(|endpoint| {
            let name = endpoint.pod.clone()?;
            self.pod(&Key { namespace: Arc::clone(&service.namespace), name })
        })
    }

    /// Whether a node is this instance.
    pub(crate) fn has_instance(&self, id: &str) -> bool {
        self.by_instance.contains_key(id)
    }

    /// The bindings that name a target group, the oldest first.
    pub(crate) fn bindings_of(&self, arn: &str) -> Vec<&Arc<TargetGroupBinding>> {
        let all = self.by_arn.get(arn).into_iter().flatten();
        all.filter_map(|(_, key)| self.bindings.get(key)).collect()
    }

    /// Notes a binding that can't be read: what it wants is not known.
    pub(crate) fn put_unreadable(&mut self, key: Key) {
        self.unreadable.insert(key);
    }

    pub(crate) fn put_binding(&mut self, mut binding: TargetGroupBinding) -> Concerned {
        let key = self.key(&binding.metadata);
        self.unreadable.remove(&key);
        self.strip(&mut binding);
        let mut concerned = Concerned::new();
        // Our own writes of the status are no change that a pass has to look at.
        if self.bindings.get(&key).is_none_or(|old| differs(old, &binding)) {
            concerned.insert(key.clone());
        }
        if let Some(old) = self.bindings.get(&key).cloned() {
            let service = key.beside(&old.spec.service_ref.name);
            take_out(&mut self.by_service, &service, &key);
            if !old.is_terminating() && binding.is_terminating() {
                concerned.extend(self.companions(&old));
            }
            self.unlink_arn(&key, &old);
        }
        if let Some(arn) = claimed_arn(&binding) {
            let arn = self.words.share(arn.into());
            let all = self.by_arn.entry(arn).or_insert_with(one);
            all.push((created(&binding), key.clone()));
            all.sort_unstable();
        }
        let service = key.beside(&binding.spec.service_ref.name);
        self.by_service.entry(service).or_insert_with(one).push(key.clone());
        self.bindings.insert(key, Arc::new(binding));
        concerned
    }

    pub(crate) fn remove_binding(&mut self, key: &Key) -> Concerned {
        self.unreadable.remove(key);
        let mut concerned = Concerned::from([key.clone()]);
        if let Some(old) = self.bindings.remove(key) {
            let service = Key::new(&key.namespace, &old.spec.service_ref.name);
            take_out(&mut self.by_service, &service, key);
            concerned.extend(self.companions(&old));
            self.unlink_arn(key, &old);
        }
        concerned
    }

    pub(crate) fn put_service(&mut self, service: &objects::Service) -> Concerned {
        let key = self.key(&service.metadata);
        let read = Box::new(Service::read(service));
        self.unlink_service(&key);
        if let Some(label) = first_label(&key.namespace, &read) {
            self.by_label.entry(label).or_insert_with(one).push(key.clone());
        }
        self.services.insert(key.clone(), read);
        self.users(&key)
    }

    pub(crate) fn remove_service(&mut self, key: &Key) -> Concerned {
        self.unlink_service(key);
        self.services.remove(key);
        self.users(key)
    }

    pub(crate) fn put_slice(&mut self, slice: &objects::EndpointSlice) -> Concerned {
        let key = self.key(&slice.metadata);
        let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(names::SERVICE_NAME_LABEL));
        let Some(service) = label.map(|name| key.beside(name)) else {
            return self.remove_slice(&key);
        };
        let mut concerned = Concerned::new();
        if self.slice_owner.get(&key).is_some_and(|owner| *owner != service) {
            concerned.extend(self.remove_slice(&key));
        }
        let mut read = read_slice(slice);
        for endpoint in &mut read.endpoints {
            endpoint.node = endpoint.node.take().map(|node| self.words.share(node));
        }
        self.slice_owner.insert(key.clone(), service.clone());
        let slices = self.slices.entry(service.clone()).or_insert_with(one);
        let old = slices.iter_mut().find(|(name, _)| *name == key.name).map(|(_, slice)| slice);
        if old.as_deref() != Some(&read) {
            let before = old.as_deref().map(endpoint_pods).unwrap_or_default();
            let after = endpoint_pods(&read);
            match old {
                Some(old) => *old = read,
                None => slices.push((key.name, read)),
            }
            self.relink_endpoints(&service, &before, &after);
            concerned.extend(self.users(&service));
        }
        concerned
    }

    pub(crate) fn remove_slice(&mut self, key: &Key) -> Concerned {
        let Some(service) = self.slice_owner.remove(key) else { return Concerned::new() };
        if let Some(slices) = self.slices.get_mut(&service) {
            let at = slices.iter().position(|(name, _)| *name == key.name);
            let old = at.map(|at| slices.swap_remove(at).1);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
            let before = old.as_ref().map(endpoint_pods).unwrap_or_default();
            self.relink_endpoints(&service, &before, &BTreeSet::new());
        }
        self.users(&service)
    }

    pub(crate) fn put_pod(&mut self, pod: &objects::Pod) -> Concerned {
        let key = self.key(&pod.metadata);
        let mut read = Box::new(read_pod(pod));
        if self.pods.get(&key) == Some(&read) {
            return Concerned::new();
        }
        read.node = read.node.map(|node| self.words.share(node));
        read.labels = match self.labels.0.get(&*read.labels) {
            Some(known) => Arc::clone(known),
            None => {
                let mut share = |text: &Arc<str>| self.words.share(Arc::clone(text));
                let shared = read.labels.iter().map(|(name, value)| (share(name), share(value)));
                self.labels.share(shared.collect())
            }
        };
        read.ports = self.ports.share(read.ports);
        self.unlink(&key);
        for ip in &read.ips {
            self.by_ip.entry(*ip).or_insert_with(one).push(key.clone());
        }
        for binding in gate_bindings(&key, &read) {
            self.gated.entry(binding).or_default().insert(key.clone());
        }
        self.pods.insert(key.clone(), read);
        self.users_of_pod(&key)
    }

    pub(crate) fn remove_pod(&mut self, key: &Key) -> Concerned {
        let concerned = self.users_of_pod(key);
        self.unlink(key);
        self.pods.remove(key);
        concerned
    }

    pub(crate) fn put_namespace(&mut self, namespace: &objects::Namespace) -> Concerned {
        let name: Arc<str> = Arc::from(namespace.metadata.name.as_deref().unwrap_or_default());
        let label = namespace.metadata.labels.as_ref().and_then(|labels| labels.get(names::INJECT_LABEL));
        let read = Namespace {
            injects: label.is_some_and(|value| value == names::INJECT_ENABLED),
            terminating: namespace.metadata.deletion_timestamp.is_some(),
        };
        if self.namespaces.insert(Arc::clone(&name), read) == Some(read) {
            return Concerned::new();
        }
        self.bindings.keys().filter(|key| key.namespace == name).cloned().collect()
    }

    pub(crate) fn remove_namespace(&mut self, key: &Key) -> Concerned {
        self.namespaces.remove(&key.name);
        Concerned::new()
    }

    pub(crate) fn put_node(&mut self, node: &objects::Node) -> Concerned {
        let name: Arc<str> = Arc::from(node.metadata.name.as_deref().unwrap_or_default());
        let read = read_node(node);
        if self.nodes.get(&name) == Some(&read) {
            return Concerned::new();
        }
        self.unlink_node(&name);
        if let Some(id) = read.instance_id() {
            *self.by_instance.entry(id.to_owned()).or_default() += 1;
        }
        self.nodes.insert(Arc::clone(&name), read);
        self.users_of_node(&name)
    }

    pub(crate) fn remove_node(&mut self, key: &Key) -> Concerned {
        self.unlink_node(&key.name);
        self.nodes.remove(&key.name);
        self.users_of_node(&key.name)
    }

    // ---- details ----

    /// The key of an object; of its namespace there is one text.
    fn key(&mut self, meta: &ObjectMeta) -> Key {
        let Key { namespace, name } = Key::of(meta);
        Key { namespace: self.words.share(namespace), name }
    }

    /// Takes away what nobody reads, and shares what many bindings say.
    fn strip(&mut self, binding: &mut TargetGroupBinding) {
        fn keep(texts: &mut Option<BTreeMap<String, String>>, is_read: impl Fn(&str) -> bool) {
            // A tree stays as large as it was.
            let kept = texts.take().into_iter().flatten().filter(|(key, _)| is_read(key));
            *texts = Some(kept.collect::<BTreeMap<_, _>>()).filter(|kept| !kept.is_empty());
        }
        let meta = &mut binding.metadata;
        keep(&mut meta.annotations, |key| {
            key.split_once('/').is_some_and(|(group, _)| group == names::GROUP)
        });
        keep(&mut meta.labels, names::is_of_lbc);
        meta.generate_name = None;
        let Some(status) = &mut binding.status else { return };
        status.target_group_arn = status.target_group_arn.take().map(|arn| self.words.share(arn));
        if let Some(targets) = &mut status.targets {
            targets.summary = self.words.share(Arc::clone(&targets.summary));
        }
        // Shrinking in place leaves the block as large as it was.
        let mut conditions = Vec::with_capacity(status.conditions.len());
        conditions.append(&mut status.conditions);
        for condition in &mut conditions {
            let Condition { type_, status, reason, message, .. } = condition;
            for text in [type_, status, reason, message] {
                *text = self.words.share(Arc::clone(text));
            }
        }
        status.conditions = conditions;
    }

    fn companions(&self, binding: &TargetGroupBinding) -> Concerned {
        claimed_arn(binding)
            .map(|arn| self.bindings_of(arn).iter().map(|other| Key::of(&other.metadata)).collect())
            .unwrap_or_default()
    }

    fn users(&self, service: &Key) -> Concerned {
        self.by_service.get(service).into_iter().flatten().cloned().collect()
    }

    /// The bindings whose Service has the pod in a slice or selects it.
    fn users_of_pod(&self, key: &Key) -> Concerned {
        let by_slice = self.by_endpoint.get(key).into_iter().flatten();
        let mut users: Concerned =
            by_slice.filter_map(|service| self.by_service.get(service)).flatten().cloned().collect();
        let Some(pod) = self.pods.get(key) else { return users };
        for (name, value) in pod.labels.iter() {
            let services = self.by_label.get(&label(&key.namespace, name, value)).into_iter().flatten();
            let selecting = services.filter(|service| {
                self.services.get(service).is_some_and(|service| service.selects(|name| pod.label(name)))
            });
            users.extend(selecting.filter_map(|service| self.by_service.get(service)).flatten().cloned());
        }
        users
    }

    /// The bindings whose targets a node is or may hold: those of instances, and those with an endpoint or pod there. Nodes
    /// change rarely, once they are stripped, so that looking through all pods is cheaper than to remember who is where.
    fn users_of_node(&self, name: &str) -> Concerned {
        let is_there = |service: &Key| {
            let mut endpoints = self.slices(service).flat_map(|slice| &slice.endpoints);
            endpoints.any(|endpoint| endpoint.node.as_deref() == Some(name))
        };
        let of_ips = |key: &Key| {
            let binding = self.bindings.get(key);
            binding.is_some_and(|binding| binding.spec.target_group.target_type == Some(TargetType::Ip))
        };
        let mut users = Concerned::new();
        for (service, all) in &self.by_service {
            let there = is_there(service);
            users.extend(all.iter().filter(|key| there || !of_ips(key)).cloned());
        }
        let pods = self.pods.iter().filter(|(_, pod)| pod.node.as_deref() == Some(name));
        users.extend(pods.flat_map(|(key, _)| self.users_of_pod(key)));
        users
    }

    fn unlink_arn(&mut self, key: &Key, old: &TargetGroupBinding) {
        let Some(arn) = claimed_arn(old) else { return };
        if let Some(all) = self.by_arn.get_mut(arn) {
            all.retain(|(_, other)| other != key);
            if all.is_empty() {
                self.by_arn.remove(arn);
            }
        }
    }

    fn unlink_service(&mut self, key: &Key) {
        let label = self.services.get(key).and_then(|old| first_label(&key.namespace, old));
        if let Some(label) = label {
            take_out(&mut self.by_label, &label, key);
        }
    }

    fn unlink_node(&mut self, name: &Arc<str>) {
        let Some(id) = self.nodes.get(name).and_then(Node::instance_id) else { return };
        if let Some(count) = self.by_instance.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                self.by_instance.remove(id);
            }
        }
    }

    /// The slices of a Service named `before` and name `after`; other slices of it may name the same pods.
    fn relink_endpoints(&mut self, service: &Key, before: &BTreeSet<Arc<str>>, after: &BTreeSet<Arc<str>>) {
        let pod = |name: &Arc<str>| Key { namespace: Arc::clone(&service.namespace), name: Arc::clone(name) };
        for name in after.difference(before) {
            let services = self.by_endpoint.entry(pod(name)).or_insert_with(one);
            if !services.contains(service) {
                services.push(service.clone());
            }
        }
        let elsewhere: BTreeSet<Arc<str>> = self.slices(service).flat_map(endpoint_pods).collect();
        for name in before.difference(&elsewhere) {
            take_out(&mut self.by_endpoint, &pod(name), service);
        }
    }

    /// Takes a pod out of what is looked up by its address and its gates.
    fn unlink(&mut self, key: &Key) {
        let Some(old) = self.pods.get(key) else { return };
        for ip in &old.ips {
            take_out(&mut self.by_ip, ip, key);
        }
        for binding in gate_bindings(key, old) {
            if let Some(keys) = self.gated.get_mut(&binding) {
                keys.remove(key);
                if keys.is_empty() {
                    self.gated.remove(&binding);
                }
            }
        }
    }
}

/// The bindings that a pod has readiness gates of.
fn gate_bindings(key: &Key, pod: &Pod) -> Vec<Key> {
    let names = pod.gates.keys().filter_map(|kind| kind.split_once('/'));
    names.map(|(_, name)| key.beside(name)).collect()
}

/// Whether a binding changed in more than its status.
fn differs(old: &TargetGroupBinding, new: &TargetGroupBinding) -> bool {
    let rest = |binding: &TargetGroupBinding| {
        let meta = &binding.metadata;
        (meta.uid.clone(), meta.generation, meta.deletion_timestamp.is_some(), meta.finalizers.clone())
    };
    rest(old) != rest(new)
        || old.spec != new.spec
        || old.metadata.annotations != new.metadata.annotations
        || old.metadata.labels != new.metadata.labels
}

/// Room for one.
fn one<T>() -> Vec<T> {
    Vec::with_capacity(1)
}

fn take_out<K: Eq + Hash>(lists: &mut HashMap<K, Vec<Key>>, of: &K, key: &Key) {
    if let Some(list) = lists.get_mut(of) {
        list.retain(|other| other != key);
        if list.is_empty() {
            lists.remove(of);
        }
    }
}

/// A label as a key.
fn label(namespace: &Arc<str>, name: &str, value: &str) -> Key {
    Key { namespace: Arc::clone(namespace), name: format!("{name}={value}").into() }
}

fn first_label(namespace: &Arc<str>, service: &Service) -> Option<Key> {
    let (name, value) = service.selector.as_ref()?.first()?;
    Some(label(namespace, name, value))
}

fn endpoint_pods(slice: &Slice) -> BTreeSet<Arc<str>> {
    slice.endpoints.iter().filter_map(|endpoint| endpoint.pod.clone()).collect()
}

fn created(binding: &TargetGroupBinding) -> Option<Timestamp> {
    binding.metadata.creation_timestamp.as_ref().map(|time| time.0)
}

/// The ARN that a binding names or that was resolved for it.
fn claimed_arn(binding: &TargetGroupBinding) -> Option<&str> {
    binding.spec.target_group.arn().or_else(|| resolved_arn(binding))
}

/// The ARN that an earlier pass resolved.
pub(crate) fn resolved_arn(binding: &TargetGroupBinding) -> Option<&str> {
    binding.status.as_ref().and_then(|status| status.target_group_arn.as_deref())
}

fn port(number: Option<i32>) -> Option<u16> {
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0)
}

fn read_slice(slice: &objects::EndpointSlice) -> Slice {
    let ports = slice.ports.as_deref().unwrap_or_default().iter().filter_map(|entry| {
        Some(SlicePort {
            name: entry.name.clone().unwrap_or_default(),
            protocol: entry.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            port: port(entry.port)?,
        })
    });
    let endpoints = slice.endpoints.as_deref().unwrap_or_default().iter().map(|endpoint| Endpoint {
        addresses: endpoint.addresses.iter().flatten().filter_map(|text| text.parse().ok()).collect(),
        ready: endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true),
        pod: endpoint
            .target_ref
            .as_ref()
            .filter(|reference| reference.kind.as_deref() == Some("Pod"))
            .and_then(|reference| reference.name.as_deref())
            .map(Arc::from),
        node: endpoint.node_name.as_deref().map(Arc::from),
    });
    Slice { address_type: slice.address_type.clone(), ports: ports.collect(), endpoints: endpoints.collect() }
}

fn read_pod(pod: &objects::Pod) -> Pod {
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|condition| condition.type_ == kind);
    let finished = matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"));
    let mut ips: Vec<IpAddr> = status
        .and_then(|status| status.pod_ips.as_deref())
        .unwrap_or_default()
        .iter()
        .filter_map(|entry| entry.ip.as_deref()?.parse().ok())
        .collect();
    if let (true, Some(ip)) = (ips.is_empty(), status.and_then(|status| status.pod_ip.as_deref())) {
        ips.extend(ip.parse::<IpAddr>());
    }
    let gates = spec.and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let gates = gates
        .iter()
        .map(|gate| &gate.condition_type)
        .filter(|kind| kind.starts_with(names::READINESS_GATE_PREFIX))
        .map(|kind| {
            let state = condition(kind).map(|condition| {
                (
                    condition.status.clone(),
                    condition.reason.clone().unwrap_or_default(),
                    condition.message.clone().unwrap_or_default(),
                )
            });
            (kind.clone(), state)
        });
    let containers = spec.and_then(|spec| spec.containers.as_deref()).unwrap_or_default();
    let mut ports = BTreeMap::new();
    let mut quic = BTreeMap::new();
    for container in containers {
        let id = container
            .env
            .iter()
            .flatten()
            .find(|variable| variable.name == names::QUIC_ENVIRONMENT_VARIABLE)
            .and_then(|variable| quic_server_id(variable.value.as_deref()?));
        if let Some(id) = &id {
            quic.entry(0).or_insert_with(|| id.clone());
        }
        for entry in container.ports.iter().flatten() {
            let Some(number) = port(entry.container_port) else { continue };
            if let Some(name) = &entry.name {
                ports.insert(name.clone(), number);
            }
            if let Some(id) = &id {
                quic.insert(number, id.clone());
            }
        }
    }
    Pod {
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        ips: ips.into(),
        running: !finished && pod.metadata.deletion_timestamp.is_none(),
        containers_ready: condition("ContainersReady").is_some_and(|condition| condition.status == "True"),
        node: spec.and_then(|spec| spec.node_name.as_deref()).map(Arc::from),
        labels: pod
            .metadata
            .labels
            .iter()
            .flatten()
            .map(|(name, value)| (Arc::from(name.as_str()), Arc::from(value.as_str())))
            .collect(),
        gates: gates.collect(),
        ports: Arc::new(ports),
        eni: pod.metadata.annotations.as_ref().and_then(|all| all.get("vpc.amazonaws.com/pod-eni")).cloned(),
        quic,
    }
}

/// As AWS writes it, `0x` and 16 hexadecimal digits; LBC's environment variable holds the 8 bytes in base64.
fn quic_server_id(value: &str) -> Option<String> {
    let is_hex = |digits: &str| {
        digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    if value.strip_prefix("0x").is_some_and(is_hex) {
        return Some(value.to_owned());
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(value).ok()?;
    (bytes.len() == 8).then(|| bytes.iter().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}")))
}

fn read_node(node: &objects::Node) -> Node {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    let spec = node.spec.as_ref();
    let leaving = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default().iter().any(|taint| {
        taint.key == "ToBeDeletedByClusterAutoscaler"
            || (taint.key == "karpenter.sh/disrupted" && taint.effect == "NoSchedule")
    });
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    Node {
        ready: match ready.map(|condition| condition.status.as_str()) {
            Some("True") => NodeReady::Yes,
            Some("False") => NodeReady::No,
            _ => NodeReady::Unknown,
        },
        labels: node.metadata.labels.clone().unwrap_or_default(),
        leaving,
        provider_id: spec.and_then(|spec| spec.provider_id.clone()).unwrap_or_default(),
        addresses: addresses
            .iter()
            .filter(|entry| entry.type_ == "InternalIP")
            .filter_map(|entry| entry.address.parse().ok())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn binding(more: Value) -> TargetGroupBinding {
        let mut object = json!({
            "metadata": {"namespace": "shop", "name": "web", "generation": 1},
            "spec": {"serviceRef": {"name": "web"}},
        });
        for (key, value) in more.as_object().unwrap() {
            object[key] = value.clone();
        }
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_status_that_is_written_wakes_nobody_and_an_annotation_does() {
        let mut index = Index::default();
        assert_eq!(index.put_binding(binding(json!({}))).len(), 1);
        assert!(index.put_binding(binding(json!({"status": {"observedGeneration": 1}}))).is_empty());
        let annotated = json!({"metadata": {
            "namespace": "shop", "name": "web", "generation": 1, "annotations": {"elbv2.k8s.aws/paused": "true"},
        }});
        assert_eq!(index.put_binding(binding(annotated)).len(), 1);
    }

    #[test]
    fn what_nobody_reads_is_not_kept_and_what_bindings_say_alike_is_kept_once() {
        let mut index = Index::default();
        let made = |name: &str, note: &str| {
            let condition = json!({"type": "Ready", "status": "True", "reason": "Reconciled", "message": "as it says",
                                   "lastTransitionTime": "2026-01-02T03:04:05Z"});
            binding(json!({
                "metadata": {
                    "namespace": "shop", "name": name, "generation": 1, "labels": {"app": note, "service.k8s.aws/stack": "s"},
                    "annotations": {"elbv2.k8s.aws/paused": "true", "kubectl.kubernetes.io/last-applied-configuration": note},
                },
                "status": {"conditions": [condition]},
            }))
        };
        index.put_binding(made("a", "1"));
        assert!(index.put_binding(made("a", "2")).is_empty(), "a label that nobody reads is no change");
        index.put_binding(made("b", "1"));
        let all: Vec<_> = index.bindings.values().collect();
        assert_eq!(all[0].annotation("elbv2.k8s.aws/paused"), Some("true"));
        assert_eq!(all[0].metadata.annotations.as_ref().unwrap().len(), 1);
        assert!(all[0].is_owned_by_lbc() && all[0].metadata.labels.as_ref().unwrap().len() == 1);
        let message = |at: usize| &all[at].status.as_ref().unwrap().conditions[0].message;
        assert!(Arc::ptr_eq(message(0), message(1)));
    }

    #[test]
    fn a_quic_server_id_is_read_from_lbcs_base64_and_from_aws_s_own_form() {
        assert_eq!(quic_server_id("AQIDBAUGBwg=").as_deref(), Some("0x0102030405060708"));
        assert_eq!(quic_server_id("0x0102030405060708").as_deref(), Some("0x0102030405060708"));
        assert_eq!(quic_server_id("0x01"), None);
        assert_eq!(quic_server_id("nonsense"), None);
    }

    fn pod(gates: &[&str], ip: &str) -> objects::Pod {
        let gates: Vec<Value> = gates.iter().map(|name| json!({"conditionType": name})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": "web-1", "uid": "u"},
            "spec": {"containers": [], "readinessGates": gates},
            "status": {"podIPs": [{"ip": ip}]},
        }))
        .unwrap()
    }

    #[test]
    fn pods_are_found_by_their_gates_and_addresses_until_these_are_gone() {
        let mut index = Index::default();
        let (binding, key) = (Key::new("shop", "web"), Key::new("shop", "web-1"));
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        index.put_pod(&pod(&["target-health.elbv2.k8s.aws/web", "other"], "10.0.0.1"));
        assert_eq!((index.gated_pods(&binding).count(), index.pods_at(&ip).count()), (1, 1));
        index.put_pod(&pod(&["target-health.elbv2.k8s.aws/web"], "10.0.0.2"));
        assert_eq!((index.gated_pods(&binding).count(), index.pods_at(&ip).count()), (1, 0));
        index.remove_pod(&key);
        assert_eq!((index.gated_pods(&binding).count(), index.gated().len(), index.by_ip.len()), (0, 0, 0));
    }
}
