//! What the cluster looks like, stripped to what decisions need, and which bindings a change concerns.
//!
//! Nothing here waits or calls: watches put objects in ([`Index::put_pod`], …) and get back the keys of the bindings
//! to look at; [`crate::desired`] reads it. How objects are kept: [`crate::kept`].

use crate::desired;
use crate::kept::{Binding, Namespace, Node, NodeReady, Pod, Pools, Slice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use tgb_api::names;
use tgb_api::objects;
use tgb_api::service::Service;
use tgb_api::target_group::TargetType;
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::Permission;

#[cfg(test)]
#[path = "index_tests.rs"]
mod lookups;

/// Namespace and name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
        self.sibling(&Arc::from(name))
    }

    /// As [`Self::beside`], of a text that is kept.
    pub(crate) fn sibling(&self, name: &Arc<str>) -> Self {
        Self { namespace: Arc::clone(&self.namespace), name: Arc::clone(name) }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The bindings that a change concerns.
pub(crate) type Concerned = BTreeSet<Key>;

/// What there is of a Service's name. Of slices and bindings there is almost always one: a vector of one is a tenth of a set
/// of one.
#[derive(Debug, Default)]
struct Backend {
    service: Option<Service>,
    /// The names of its slices.
    slices: Vec<Arc<str>>,
    /// The names of the bindings that refer to it.
    bindings: Vec<Arc<str>>,
}

/// What there is of a pod's name.
#[derive(Debug, Default)]
struct Named {
    pod: Option<Box<Pod>>,
    /// The names of the Services whose slices name it.
    services: Option<Arc<[Arc<str>]>>,
}

/// Everything that is watched. Large tables are trees: they grow by a node, where a hash table is half empty and leaves as
/// much behind whenever it doubles. For the same reason what is large is not in their nodes.
#[derive(Debug, Default)]
pub(crate) struct Index {
    bindings: BTreeMap<Key, Box<Binding>>,
    /// Bindings that can't be read as they are now, and the rules that they may have in security groups.
    pub(crate) unreadable: BTreeMap<Key, BTreeSet<Permission>>,
    pub(crate) nodes: BTreeMap<Arc<str>, Node>,
    pub(crate) namespaces: HashMap<Arc<str>, Namespace>,
    backends: BTreeMap<Key, Box<Backend>>,
    slices: BTreeMap<Key, Box<Slice>>,
    pods: BTreeMap<Key, Named>,
    /// Bindings by the ARN of their target group, the oldest first.
    by_arn: BTreeSet<(Arc<str>, Option<Timestamp>, Key)>,
    /// The bindings whose targets are, or may be, instances.
    of_instances: BTreeSet<Key>,
    /// The pods of an address.
    by_ip: BTreeSet<(IpAddr, Key)>,
    /// The pods of a node.
    by_node: BTreeMap<Arc<str>, BTreeSet<Key>>,
    /// The Services with an endpoint on a node that is of no pod, and how many there are.
    bare: BTreeMap<Arc<str>, BTreeMap<Key, usize>>,
    /// The Services with a selector, by its first label.
    by_label: BTreeSet<(Arc<str>, Key)>,
    /// How many nodes say that they are an instance.
    by_instance: HashMap<String, usize>,
    /// The pods with a readiness gate of a binding, whether or not that exists.
    gated: BTreeMap<Key, BTreeSet<Key>>,
    pools: Pools,
}

impl Index {
    /// A binding.
    pub(crate) fn binding(&self, key: &Key) -> Option<TargetGroupBinding> {
        self.bindings.get(key).map(|binding| binding.whole(key))
    }

    /// Whether there is a binding.
    pub(crate) fn has_binding(&self, key: &Key) -> bool {
        self.bindings.contains_key(key)
    }

    /// Every binding.
    pub(crate) fn bindings(&self) -> impl ExactSizeIterator<Item = (&Key, &Binding)> {
        self.bindings.iter().map(|(key, binding)| (key, &**binding))
    }

    /// A Service.
    pub(crate) fn service(&self, key: &Key) -> Option<&Service> {
        self.backends.get(key)?.service.as_ref()
    }

    /// Every Service.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Key> {
        self.backends.iter().filter(|(_, backend)| backend.service.is_some()).map(|(key, _)| key)
    }

    /// The slices of a Service.
    pub(crate) fn slices(&self, service: &Key) -> impl Iterator<Item = &Slice> {
        let names = self.backends.get(service).into_iter().flat_map(|backend| &backend.slices);
        names.filter_map(|name| self.slices.get(&service.sibling(name))).map(|slice| &**slice)
    }

    /// Every slice.
    pub(crate) fn slice_keys(&self) -> impl ExactSizeIterator<Item = &Key> {
        self.slices.keys()
    }

    /// A pod, with the key that is kept.
    pub(crate) fn pod(&self, key: &Key) -> Option<(&Key, &Pod)> {
        let (key, named) = self.pods.get_key_value(key)?;
        named.pod.as_deref().map(|pod| (key, pod))
    }

    /// Every pod.
    pub(crate) fn pods(&self) -> impl Iterator<Item = (&Key, &Pod)> {
        self.pods.iter().filter_map(|(key, named)| named.pod.as_deref().map(|pod| (key, pod)))
    }

    /// The running pods that a Service selects.
    pub(crate) fn selected_pods<'a>(
        &'a self,
        key: &'a Key,
        service: &'a Service,
    ) -> impl Iterator<Item = (&'a Key, &'a Pod)> {
        let first = Key { namespace: Arc::clone(&key.namespace), name: Arc::default() };
        let all = self.pods.range(first..).take_while(|(pod, _)| pod.namespace == key.namespace);
        let pods = all.filter_map(|(pod, named)| named.pod.as_deref().map(|kept| (pod, kept)));
        pods.filter(|(_, pod)| pod.running && service.selects(|name| pod.label(name)))
    }

    /// The pods that have an address.
    pub(crate) fn pods_at(&self, ip: &IpAddr) -> impl Iterator<Item = (&Key, &Pod)> {
        let of_ip = self.by_ip.range((*ip, Key::default())..).take_while(move |(other, _)| other == ip);
        of_ip.filter_map(|(_, key)| self.pod(key))
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
        endpoints.filter_map(|endpoint| self.pod(&service.sibling(endpoint.pod.as_ref()?)))
    }

    /// Whether a node is this instance.
    pub(crate) fn has_instance(&self, id: &str) -> bool {
        self.by_instance.contains_key(id)
    }

    /// The bindings that name a target group, the oldest first.
    pub(crate) fn bindings_of(&self, arn: &str) -> impl Iterator<Item = (&Key, &Binding)> {
        let first = (Arc::from(arn), None, Key::default());
        let all = self.by_arn.range(first..).take_while(move |(other, ..)| **other == *arn);
        all.filter_map(|(_, _, key)| self.bindings.get(key).map(|binding| (key, &**binding)))
    }

    /// Every binding, also those that can't be read.
    pub(crate) fn binding_keys(&self) -> impl Iterator<Item = &Key> {
        self.bindings.keys().chain(self.unreadable.keys())
    }

    /// Notes a binding that can't be read: of what it wants, only the rules are known that it may have.
    pub(crate) fn put_unreadable(&mut self, key: Key, keeps: BTreeSet<Permission>) {
        self.unreadable.insert(key, keeps);
    }

    pub(crate) fn put_binding(&mut self, binding: TargetGroupBinding) -> Concerned {
        let key = self.key(&binding.metadata);
        self.unreadable.remove(&key);
        let mut read = Binding::read(binding, &mut self.pools);
        let service = known(&self.backends, key.sibling(&read.spec.service_ref.name));
        read.spec.service_ref.name = Arc::clone(&service.name);
        let mut concerned = Concerned::new();
        let old = self.bindings.get(&key);
        // Our own writes of the status are no change that a pass has to look at.
        if old.is_none_or(|old| old.differs(&read)) {
            concerned.insert(key.clone());
        }
        let stake = |binding: &Binding| {
            let sharing = binding.spec.target_group.sharing();
            (binding.claimed_arn().cloned(), sharing, binding.is_terminating())
        };
        let changes_stake = old.is_some_and(|old| stake(old) != stake(&read));
        if changes_stake {
            concerned.extend(self.companions(&key));
        }
        self.unlink_binding(&key);
        if let Some(arn) = read.claimed_arn() {
            if changes_stake {
                concerned.extend(self.bindings_of(arn).map(|(key, _)| key.clone()));
            }
            self.by_arn.insert((Arc::clone(arn), read.created, key.clone()));
        }
        if read.spec.target_group.target_type != Some(TargetType::Ip) {
            self.of_instances.insert(key.clone());
        }
        self.change_backend(&service, |backend| put_in(&mut backend.bindings, &key.name));
        self.bindings.insert(key, Box::new(read));
        concerned
    }

    pub(crate) fn remove_binding(&mut self, key: &Key) -> Concerned {
        self.unreadable.remove(key);
        let mut concerned = Concerned::from([key.clone()]);
        concerned.extend(self.companions(key));
        self.unlink_binding(key);
        self.bindings.remove(key);
        concerned
    }

    pub(crate) fn put_service(&mut self, service: &objects::Service) -> Concerned {
        let key = self.key(&service.metadata);
        let read = Service::read(service);
        if self.service(&key) == Some(&read) {
            return Concerned::new();
        }
        self.unlink_service(&key);
        if let Some(label) = first_label(&read) {
            self.by_label.insert((label, key.clone()));
        }
        self.change_backend(&key, |backend| backend.service = Some(read));
        self.users(&key)
    }

    pub(crate) fn remove_service(&mut self, key: &Key) -> Concerned {
        self.unlink_service(key);
        self.change_backend(key, |backend| backend.service = None);
        self.users(key)
    }

    pub(crate) fn put_slice(&mut self, slice: &objects::EndpointSlice) -> Concerned {
        let key = self.key(&slice.metadata);
        let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(names::SERVICE_NAME_LABEL));
        let Some(service) = label.map(|name| key.beside(name)) else {
            return self.remove_slice(&key);
        };
        let mut concerned = Concerned::new();
        if self.slices.get(&key).is_some_and(|old| old.service != service.name) {
            concerned.extend(self.remove_slice(&key));
        }
        let service = known(&self.backends, service);
        let mut read = Slice::read(slice, &service.name, &mut self.pools);
        for pod in read.endpoints.iter_mut().filter_map(|endpoint| endpoint.pod.as_mut()) {
            *pod = known(&self.pods, key.sibling(pod)).name;
        }
        if self.slices.get(&key).is_none_or(|old| **old != read) {
            let old = self.slices.remove(&key);
            let before = old.as_ref().map(|old| old.pods()).unwrap_or_default();
            let after = read.pods();
            self.count_bare(&service, old.as_deref(), Some(&read));
            self.change_backend(&service, |backend| put_in(&mut backend.slices, &key.name));
            self.slices.insert(key, Box::new(read));
            self.relink_endpoints(&service, &before, &after);
            concerned.extend(self.users(&service));
        }
        concerned
    }

    pub(crate) fn remove_slice(&mut self, key: &Key) -> Concerned {
        let Some(old) = self.slices.remove(key) else { return Concerned::new() };
        let service = key.sibling(&old.service);
        self.change_backend(&service, |backend| backend.slices.retain(|name| *name != key.name));
        self.count_bare(&service, Some(&old), None);
        self.relink_endpoints(&service, &old.pods(), &BTreeSet::new());
        self.users(&service)
    }

    pub(crate) fn put_pod(&mut self, pod: &objects::Pod) -> Concerned {
        let key = self.key(&pod.metadata);
        let read = Pod::read(pod, &mut self.pools);
        if self.pod(&key).is_some_and(|(_, old)| *old == read) {
            return Concerned::new();
        }
        self.unlink_pod(&key);
        let key = known(&self.pods, key);
        self.by_ip.extend(read.ips.iter().map(|ip| (*ip, key.clone())));
        if let Some(node) = &read.node {
            self.by_node.entry(Arc::clone(node)).or_default().insert(key.clone());
        }
        for binding in gate_bindings(&key, &read) {
            self.gated.entry(binding).or_default().insert(key.clone());
        }
        self.pods.entry(key.clone()).or_default().pod = Some(Box::new(read));
        self.users_of_pod(&key)
    }

    pub(crate) fn remove_pod(&mut self, key: &Key) -> Concerned {
        let concerned = self.users_of_pod(key);
        self.unlink_pod(key);
        self.change_named(key, |named| named.pod = None);
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
        let read = Node::read(node);
        let old = self.nodes.get(&name);
        if old == Some(&read) {
            return Concerned::new();
        }
        let concerned = self.users_of_node(&name, old, Some(&read));
        self.unlink_node(&name);
        if let Some(id) = read.instance_id() {
            *self.by_instance.entry(id.to_owned()).or_default() += 1;
        }
        self.nodes.insert(name, read);
        concerned
    }

    pub(crate) fn remove_node(&mut self, key: &Key) -> Concerned {
        let Some(old) = self.nodes.get(&key.name) else { return Concerned::new() };
        let concerned = self.users_of_node(&key.name, Some(old), None);
        self.unlink_node(&key.name);
        self.nodes.remove(&key.name);
        concerned
    }

    // ---- details ----

    /// The key of an object; of its namespace there is one text.
    fn key(&mut self, meta: &ObjectMeta) -> Key {
        let Key { namespace, name } = Key::of(meta);
        Key { namespace: self.pools.words.share(namespace), name }
    }

    /// Changes what there is of a Service's name, and forgets it where nothing is left.
    fn change_backend(&mut self, service: &Key, change: impl FnOnce(&mut Backend)) {
        let backend = self.backends.entry(service.clone()).or_default();
        change(backend);
        if backend.service.is_none() && backend.slices.is_empty() && backend.bindings.is_empty() {
            self.backends.remove(service);
        }
    }

    /// As [`Self::change_backend`], of a pod's name.
    fn change_named(&mut self, pod: &Key, change: impl FnOnce(&mut Named)) {
        let named = self.pods.entry(pod.clone()).or_default();
        change(named);
        if named.pod.is_none() && named.services.is_none() {
            self.pods.remove(pod);
        }
    }

    /// The bindings of the target group that a binding names.
    fn companions(&self, key: &Key) -> Concerned {
        let arn = self.bindings.get(key).and_then(|binding| binding.claimed_arn());
        arn.into_iter().flat_map(|arn| self.bindings_of(arn)).map(|(key, _)| key.clone()).collect()
    }

    fn users(&self, service: &Key) -> Concerned {
        let names = self.backends.get(service).into_iter().flat_map(|backend| &backend.bindings);
        names.map(|name| service.sibling(name)).collect()
    }

    /// The bindings whose Service has the pod in a slice or selects it.
    fn users_of_pod(&self, key: &Key) -> Concerned {
        let Some(named) = self.pods.get(key) else { return Concerned::new() };
        let by_slice = named.services.iter().flat_map(|services| services.iter());
        let mut users: Concerned = by_slice.flat_map(|name| self.users(&key.sibling(name))).collect();
        let Some(pod) = &named.pod else { return users };
        let before_all = key.beside("");
        for (name, value) in pod.labels() {
            let first = (label(name, value), before_all.clone());
            let is_alike =
                |(label, service): &&(Arc<str>, Key)| *label == first.0 && service.namespace == key.namespace;
            for (_, service) in self.by_label.range(&first..).take_while(is_alike) {
                if self.service(service).is_some_and(|service| service.selects(|name| pod.label(name))) {
                    users.extend(self.users(service));
                }
            }
        }
        users
    }

    /// The bindings to which a change of a node makes a difference.
    fn users_of_node(&self, name: &str, before: Option<&Node>, after: Option<&Node>) -> Concerned {
        let mut users = Concerned::new();
        if before.map(place) != after.map(place) {
            let pods = self.by_node.get(name).into_iter().flatten();
            users.extend(pods.flat_map(|pod| self.users_of_pod(pod)));
            let bare = self.bare.get(name).into_iter().flat_map(BTreeMap::keys);
            users.extend(bare.flat_map(|service| self.users(service)));
        }
        // An instance that is gone is no target of anybody's any more, whether it was selected at the end or not.
        let is_gone = before.is_some_and(|before| {
            before.instance_id().is_some() && before.instance_id() != after.and_then(Node::instance_id)
        });
        let differs = |key: &&Key| {
            let binding = self.bindings.get(*key);
            let selector = binding.and_then(|binding| binding.spec.node_selector.as_ref());
            let is_selected = |node: &&Node| {
                node.usual && selector.is_none_or(|selector| desired::matches(selector, &node.labels))
            };
            is_gone || before.filter(is_selected).map(target) != after.filter(is_selected).map(target)
        };
        users.extend(self.of_instances.iter().filter(differs).cloned());
        users
    }

    /// Counts the endpoints of no pod by node, of a slice that was and is.
    fn count_bare(&mut self, service: &Key, before: Option<&Slice>, after: Option<&Slice>) {
        for node in after.into_iter().flat_map(Slice::bare) {
            let services = self.bare.entry(Arc::clone(node)).or_default();
            *services.entry(service.clone()).or_default() += 1;
        }
        for node in before.into_iter().flat_map(Slice::bare) {
            let Some(services) = self.bare.get_mut(node) else { continue };
            if let Some(count) = services.get_mut(service) {
                *count -= 1;
                if *count == 0 {
                    services.remove(service);
                }
            }
            if services.is_empty() {
                self.bare.remove(node);
            }
        }
    }

    /// Takes a binding out of what is looked up by its Service and its target group.
    fn unlink_binding(&mut self, key: &Key) {
        let Some(old) = self.bindings.get(key) else { return };
        let service = key.sibling(&old.spec.service_ref.name);
        if let Some(arn) = old.claimed_arn() {
            self.by_arn.remove(&(Arc::clone(arn), old.created, key.clone()));
        }
        self.of_instances.remove(key);
        self.change_backend(&service, |backend| backend.bindings.retain(|name| *name != key.name));
    }

    fn unlink_service(&mut self, key: &Key) {
        if let Some(label) = self.service(key).and_then(first_label) {
            self.by_label.remove(&(label, key.clone()));
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
        for name in after.difference(before) {
            self.relink_endpoint(&service.sibling(name), &service.name, true);
        }
        let elsewhere: BTreeSet<Arc<str>> = self.slices(service).flat_map(Slice::pods).collect();
        for name in before.difference(&elsewhere) {
            self.relink_endpoint(&service.sibling(name), &service.name, false);
        }
    }

    /// Notes that a Service's slices name a pod, or that they don't.
    fn relink_endpoint(&mut self, pod: &Key, service: &Arc<str>, is_named: bool) {
        let known = self.pods.get(pod).and_then(|named| named.services.clone());
        let others = known.iter().flat_map(|all| all.iter()).filter(|name| *name != service).cloned();
        let all: Vec<Arc<str>> = others.chain(is_named.then(|| Arc::clone(service))).collect();
        let all = Some(all).filter(|all| !all.is_empty()).map(|all| self.pools.lists.share(all.into()));
        self.change_named(pod, |named| named.services = all);
    }

    /// Takes a pod out of what is looked up by its address and its gates.
    fn unlink_pod(&mut self, key: &Key) {
        let Some(old) = self.pods.get(key).and_then(|named| named.pod.as_deref()) else { return };
        for ip in &old.ips {
            self.by_ip.remove(&(*ip, key.clone()));
        }
        if let Some(node) = &old.node
            && let Some(keys) = self.by_node.get_mut(node)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.by_node.remove(node);
            }
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

/// The part of a node that targets depend on which are pods on it.
fn place(node: &Node) -> (NodeReady, Option<&str>, Option<&str>, Option<&str>) {
    (node.ready, node.zone(), node.instance_id(), node.compute_type())
}

/// The part of a node that decides over it as a target.
fn target(node: &Node) -> (NodeReady, bool, &str) {
    (node.ready, node.leaving, &node.provider_id)
}

/// The same key in the words that a table keeps, if it is there.
fn known<T>(table: &BTreeMap<Key, T>, key: Key) -> Key {
    table.get_key_value(&key).map(|(known, _)| known.clone()).unwrap_or(key)
}

/// The bindings that a pod has readiness gates of.
fn gate_bindings(key: &Key, pod: &Pod) -> Vec<Key> {
    let names = pod.gates.iter().filter_map(|gate| gate.kind.split_once('/'));
    names.map(|(_, name)| key.beside(name)).collect()
}

/// Puts a name in once, in room for one.
fn put_in(names: &mut Vec<Arc<str>>, name: &Arc<str>) {
    if !names.contains(name) {
        names.reserve_exact(1);
        names.push(Arc::clone(name));
    }
}

/// A label as one text.
fn label(name: &str, value: &str) -> Arc<str> {
    format!("{name}={value}").into()
}

fn first_label(service: &Service) -> Option<Arc<str>> {
    let (name, value) = service.selector.as_ref()?.first()?;
    Some(label(name, value))
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
        let mut annotate = |key: &str, value: &str, generation: i64| {
            let annotations = json!({key: value});
            let metadata =
                json!({"namespace": "shop", "name": "web", "generation": 1, "annotations": annotations});
            let status = json!({"observedGeneration": generation});
            index.put_binding(binding(json!({"metadata": metadata, "status": status}))).len()
        };
        assert_eq!(annotate("elbv2.k8s.aws/paused", "true", 1), 1);
        // One that nobody reads, too: who touches a binding wants it to be looked at.
        assert_eq!(annotate("touched", "1", 1), 1);
        assert_eq!(annotate("touched", "1", 2), 0);
        assert_eq!(annotate("touched", "2", 2), 1);
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
        index.put_binding(made("b", "1"));
        let all: Vec<_> = index.bindings().map(|(key, binding)| binding.whole(key)).collect();
        assert!(tgb_api::options::Options::of(&all[0]).0.paused);
        assert_eq!(all[0].metadata.annotations.as_ref().unwrap().len(), 1);
        assert!(all[0].is_owned_by_lbc() && all[0].metadata.labels.as_ref().unwrap().len() == 1);
        let said = |at: usize| &all[at].status.as_ref().unwrap().conditions[0].said;
        assert!(Arc::ptr_eq(said(0), said(1)));
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
