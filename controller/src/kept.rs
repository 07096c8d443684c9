//! Objects of the cluster as the index keeps them: what decisions read, and small, since there are tens of thousands of some.

use crate::index::Key;
use crate::network::{anywhere, anywhere_of_unreadable};
use base64::Engine;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;
use tgb_api::names;
use tgb_api::objects;
use tgb_api::v1::{Said, Spec, Status, TargetGroupBinding, Transport};
use tgb_aws::values::Permission;

/// Values that many hold, each kept once.
#[derive(Debug)]
pub(crate) struct Pool<T: ?Sized> {
    all: BTreeSet<Arc<T>>,
    /// How many there may be until those that nobody holds any more are looked for.
    most: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { all: BTreeSet::new(), most: Self::FEW }
    }
}

impl<T: ?Sized> Pool<T> {
    const FEW: usize = 16;

    /// How many are kept.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }
}

impl<T: ?Sized + Ord> Pool<T> {
    /// The one that is kept of equal values.
    pub(crate) fn share(&mut self, value: Arc<T>) -> Arc<T> {
        if let Some(known) = self.all.get(&*value) {
            return Arc::clone(known);
        }
        if self.all.len() >= self.most {
            self.all.retain(|known| Arc::strong_count(known) > 1);
            self.most = (2 * self.all.len()).max(Self::FEW);
        }
        self.all.insert(Arc::clone(&value));
        value
    }
}

/// The labels of a pod, sorted.
type Labels = [(Arc<str>, Arc<str>)];

/// What objects say alike.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    pub(crate) words: Pool<str>,
    pub(crate) lists: Pool<[Arc<str>]>,
    pub(crate) labels: Pool<Labels>,
    ports: Pool<[PodPort]>,
    slice_ports: Pool<[SlicePort]>,
    said: Pool<Said>,
    gates: Pool<GateState>,
}

impl Pools {
    fn word(&mut self, text: &Arc<str>) -> Arc<str> {
        self.words.share(Arc::clone(text))
    }

    fn said(&mut self, said: &Arc<Said>) -> Arc<Said> {
        if let Some(known) = self.said.all.get(said) {
            return Arc::clone(known);
        }
        let Said { type_, status, reason, message } = &**said;
        let [type_, status, reason, message] = [type_, status, reason, message].map(|text| self.word(text));
        self.said.share(Arc::new(Said { type_, status, reason, message }))
    }

    fn labels(&mut self, labels: Arc<Labels>) -> Arc<Labels> {
        if let Some(known) = self.labels.all.get(&*labels) {
            return Arc::clone(known);
        }
        let shared = labels.iter().map(|(name, value)| (self.word(name), self.word(value))).collect();
        self.labels.share(shared)
    }
}

/// A binding without what nobody reads. [`Binding::whole`] gives it back.
#[derive(Debug)]
pub(crate) struct Binding {
    uid: Box<str>,
    version: Box<str>,
    generation: Option<i64>,
    pub(crate) created: Option<Timestamp>,
    deleted: Option<Timestamp>,
    finalizers: Arc<[Arc<str>]>,
    notes: Option<Box<Notes>>,
    /// A hash of all labels and annotations: who touches a binding wants it to be looked at.
    touched: u64,
    pub(crate) spec: Spec,
    status: Option<Box<Status>>,
}

/// Labels and annotations that somebody reads; most bindings have none.
#[derive(Debug, PartialEq)]
struct Notes {
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Binding {
    /// Takes away what nobody reads, and shares what many bindings say.
    pub(crate) fn read(binding: TargetGroupBinding, pools: &mut Pools) -> Self {
        fn kept(
            texts: Option<BTreeMap<String, String>>,
            is_read: impl Fn(&str) -> bool,
        ) -> Option<BTreeMap<String, String>> {
            // A tree stays as large as it was.
            let kept = texts.into_iter().flatten().filter(|(key, _)| is_read(key));
            Some(kept.collect::<BTreeMap<_, _>>()).filter(|kept| !kept.is_empty())
        }
        let TargetGroupBinding { metadata, mut spec, mut status } = binding;
        let mut touched = DefaultHasher::new();
        (&metadata.labels, &metadata.annotations).hash(&mut touched);
        let notes = Notes {
            labels: kept(metadata.labels, names::is_of_lbc),
            annotations: kept(metadata.annotations, tgb_api::options::is_ours),
        };
        let group = &mut spec.target_group;
        for text in [&mut group.arn, &mut group.vpc_id].into_iter().flatten() {
            *text = pools.word(text);
        }
        if let Some(status) = &mut status {
            status.target_group_arn = status.target_group_arn.take().map(|arn| pools.words.share(arn));
            if let Some(contact) = &mut status.first_contact {
                contact.cluster = pools.word(&contact.cluster);
                contact.target_group_arn = pools.word(&contact.target_group_arn);
                contact.foreign_targets.shrink_to_fit();
            }
            if let Some(targets) = &mut status.targets {
                targets.summary = pools.word(&targets.summary);
            }
            // Shrinking in place leaves the block as large as it was.
            let mut conditions = Vec::with_capacity(status.conditions.len());
            conditions.append(&mut status.conditions);
            for condition in &mut conditions {
                condition.said = pools.said(&condition.said);
            }
            status.conditions = conditions;
        }
        let finalizers = metadata.finalizers.iter().flatten().map(|entry| Arc::from(entry.as_str()));
        Self {
            uid: metadata.uid.unwrap_or_default().into(),
            version: metadata.resource_version.unwrap_or_default().into(),
            generation: metadata.generation,
            created: metadata.creation_timestamp.map(|time| time.0),
            deleted: metadata.deletion_timestamp.map(|time| time.0),
            finalizers: pools.lists.share(finalizers.collect()),
            notes: Some(Box::new(notes))
                .filter(|notes| notes.labels.is_some() || notes.annotations.is_some()),
            touched: touched.finish(),
            spec,
            status: status.map(Box::new),
        }
    }

    /// The binding as it was read, but for what nobody reads.
    pub(crate) fn whole(&self, key: &Key) -> TargetGroupBinding {
        let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let finalizers: Vec<String> = self.finalizers.iter().map(ToString::to_string).collect();
        TargetGroupBinding {
            metadata: ObjectMeta {
                name: text(&key.name),
                namespace: text(&key.namespace),
                uid: text(&self.uid),
                resource_version: text(&self.version),
                generation: self.generation,
                creation_timestamp: self.created.map(Time),
                deletion_timestamp: self.deleted.map(Time),
                finalizers: Some(finalizers).filter(|all| !all.is_empty()),
                labels: self.notes.as_ref().and_then(|notes| notes.labels.clone()),
                annotations: self.notes.as_ref().and_then(|notes| notes.annotations.clone()),
                ..ObjectMeta::default()
            },
            spec: self.spec.clone(),
            status: self.status.as_deref().cloned(),
        }
    }

    /// Whether deletion has begun.
    pub(crate) fn is_terminating(&self) -> bool {
        self.deleted.is_some()
    }

    /// The ARN that the binding names or that was resolved for it. What was resolved goes first where the target group was
    /// made anew and the binding follows its name.
    pub(crate) fn claimed_arn(&self) -> Option<&Arc<str>> {
        let group = &self.spec.target_group;
        let named = group.arn.as_ref().filter(|_| group.arn().is_some());
        let resolved = self.status.as_ref().and_then(|status| status.target_group_arn.as_ref());
        let replaced = resolved.filter(|resolved| group.is_replaced_by(resolved));
        replaced.or(named).or(resolved)
    }

    /// Whether another state of the binding differs in more than its status.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        self.generation != other.generation
            || self.is_terminating() != other.is_terminating()
            || self.uid != other.uid
            || self.finalizers != other.finalizers
            || self.notes != other.notes
            || self.touched != other.touched
            || self.spec != other.spec
    }
}

/// A binding as it comes from the API server. One that can't be read hides no other, and its rules stay.
#[derive(Debug, Clone)]
pub(crate) enum Listed {
    Read(Box<TargetGroupBinding>),
    Unreadable {
        metadata: Box<ObjectMeta>,
        error: String,
        /// The rules that it may have in security groups.
        keeps: BTreeSet<Permission>,
    },
}

impl Listed {
    pub(crate) fn key(&self) -> Key {
        Key::of(self.meta())
    }

    /// The rules that it may have in security groups, whoever manages it.
    pub(crate) fn keeps(&self) -> BTreeSet<Permission> {
        match self {
            Self::Read(binding) => anywhere(&binding.spec),
            Self::Unreadable { keeps, .. } => keeps.clone(),
        }
    }
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        TargetGroupBinding::deserialize(&object).map(|binding| Self::Read(Box::new(binding))).or_else(
            |error| {
                let metadata = object.get("metadata").unwrap_or(&Value::Null);
                let networking = object.pointer("/spec/networking").unwrap_or(&Value::Null);
                Ok(Self::Unreadable {
                    metadata: Box::new(objects::metadata(metadata).unwrap_or_default()),
                    error: error.to_string(),
                    keeps: anywhere_of_unreadable(networking),
                })
            },
        )
    }
}

impl Resource for Listed {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(unit: &()) -> Cow<'_, str> {
        TargetGroupBinding::kind(unit)
    }
    fn group(unit: &()) -> Cow<'_, str> {
        TargetGroupBinding::group(unit)
    }
    fn version(unit: &()) -> Cow<'_, str> {
        TargetGroupBinding::version(unit)
    }
    fn plural(unit: &()) -> Cow<'_, str> {
        TargetGroupBinding::plural(unit)
    }
    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Read(binding) => &binding.metadata,
            Self::Unreadable { metadata, .. } => metadata,
        }
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Read(binding) => &mut binding.metadata,
            Self::Unreadable { metadata, .. } => metadata,
        }
    }
}

/// An EndpointSlice.
#[derive(Debug, PartialEq)]
pub(crate) struct Slice {
    /// The Service that it is of.
    pub(crate) service: Arc<str>,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub(crate) address_type: Arc<str>,
    pub(crate) ports: Arc<[SlicePort]>,
    pub(crate) endpoints: Box<[Endpoint]>,
}

impl Slice {
    pub(crate) fn read(slice: &objects::EndpointSlice, service: &Arc<str>, pools: &mut Pools) -> Self {
        let ports = slice.ports.as_deref().unwrap_or_default().iter().filter_map(|entry| {
            Some(SlicePort {
                name: entry.name.clone().unwrap_or_default(),
                protocol: entry.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port: port(entry.port)?,
            })
        });
        let ports = pools.slice_ports.share(ports.collect());
        let given = slice.endpoints.as_deref().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(given.len());
        for endpoint in given {
            let reference = endpoint.target_ref.as_ref();
            let named = reference.filter(|reference| reference.kind.as_deref() == Some("Pod"));
            let one = Endpoint {
                address: None,
                ready: endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true),
                pod: named.and_then(|reference| reference.name.as_deref()).map(Arc::from),
                node: endpoint.node_name.as_deref().map(|node| pools.words.share(node.into())),
            };
            let addresses = endpoint.addresses.iter().flatten().filter_map(|text| text.parse().ok());
            let had = endpoints.len();
            endpoints.extend(addresses.map(|address| Endpoint { address: Some(address), ..one.clone() }));
            if endpoints.len() == had {
                endpoints.push(one);
            }
        }
        Self {
            service: Arc::clone(service),
            address_type: pools.words.share(slice.address_type.as_str().into()),
            ports,
            endpoints: endpoints.into(),
        }
    }

    /// The nodes of its endpoints that are of no pod, as often as there are some.
    pub(crate) fn bare(&self) -> impl Iterator<Item = &Arc<str>> {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.pod.is_none())
            .filter_map(|endpoint| endpoint.node.as_ref())
    }

    /// The pods that it names.
    pub(crate) fn pods(&self) -> BTreeSet<Arc<str>> {
        self.endpoints.iter().filter_map(|endpoint| endpoint.pod.clone()).collect()
    }
}

/// A port of a slice: the Service port's name (empty where it has none) and what the pods listen on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlicePort {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) port: u16,
}

/// An address of an endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Absent where the endpoint has none that is an IP address.
    pub(crate) address: Option<IpAddr>,
    pub(crate) ready: bool,
    /// The pod of the slice's namespace that `targetRef` names.
    pub(crate) pod: Option<Arc<str>>,
    pub(crate) node: Option<Arc<str>>,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Pod {
    pub(crate) uid: Box<str>,
    pub(crate) ips: Box<[IpAddr]>,
    /// Neither finished nor terminating.
    pub(crate) running: bool,
    pub(crate) containers_ready: bool,
    pub(crate) node: Option<Arc<str>>,
    /// Sorted.
    labels: Arc<Labels>,
    /// Readiness gates of ours.
    pub(crate) gates: Box<[PodGate]>,
    /// Named container ports that rules can open, in the order in which Kubernetes looks for a name.
    pub(crate) ports: Arc<[PodPort]>,
    rare: Option<Box<Rare>>,
}

/// A named port of a container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodPort {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Transport,
    pub(crate) number: u16,
}

/// A readiness gate of a pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PodGate {
    /// `target-health.elbv2.k8s.aws/…`.
    pub(crate) kind: Arc<str>,
    /// Status, reason and message of its condition, if that is set.
    pub(crate) state: Option<Arc<GateState>>,
}

/// Status, reason and message of a readiness gate's condition.
pub(crate) type GateState = (String, String, String);

/// What few pods have.
#[derive(Debug, Clone, PartialEq)]
struct Rare {
    /// The annotation `vpc.amazonaws.com/pod-eni`.
    eni: Option<String>,
    /// QUIC server ids by container port, as AWS writes them; port 0 stands for all that are not declared.
    quic: BTreeMap<u16, String>,
}

impl Pod {
    pub(crate) fn read(pod: &objects::Pod, pools: &mut Pools) -> Self {
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let condition = |kind: &str| conditions.iter().find(|condition| condition.type_ == kind);
        let finished =
            matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"));
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
                    Arc::new((
                        condition.status.clone(),
                        condition.reason.clone().unwrap_or_default(),
                        condition.message.clone().unwrap_or_default(),
                    ))
                });
                PodGate {
                    kind: pools.words.share(kind.as_str().into()),
                    state: state.map(|state| pools.gates.share(state)),
                }
            });
        let gates = gates.collect();
        let mut ports = Vec::new();
        let mut quic = BTreeMap::new();
        for container in spec.iter().flat_map(|spec| spec.running_containers()) {
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
                let protocol = entry.protocol.as_deref().map_or(Some(Transport::Tcp), Transport::from_word);
                if let (Some(name), Some(protocol)) = (&entry.name, protocol) {
                    ports.push(PodPort { name: pools.words.share(name.as_str().into()), protocol, number });
                }
                if let Some(id) = &id {
                    quic.entry(number).or_insert_with(|| id.clone());
                }
            }
        }
        let labels = pod.metadata.labels.iter().flatten();
        let labels: Arc<Labels> =
            labels.map(|(name, value)| (Arc::from(name.as_str()), Arc::from(value.as_str()))).collect();
        let labels = pools.labels(labels);
        let eni =
            pod.metadata.annotations.as_ref().and_then(|all| all.get("vpc.amazonaws.com/pod-eni")).cloned();
        Self {
            uid: pod.metadata.uid.clone().unwrap_or_default().into(),
            ips: ips.into(),
            running: !finished && pod.metadata.deletion_timestamp.is_none(),
            containers_ready: condition("ContainersReady")
                .is_some_and(|condition| condition.status == "True"),
            node: spec.and_then(|spec| spec.node_name.as_deref()).map(|node| pools.words.share(node.into())),
            labels,
            gates,
            ports: pools.ports.share(ports.into()),
            rare: Some(Rare { eni, quic })
                .filter(|rare| rare.eni.is_some() || !rare.quic.is_empty())
                .map(Box::new),
        }
    }

    /// The value of a label.
    pub(crate) fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(other, _)| **other == *name).map(|(_, value)| &**value)
    }

    /// The labels.
    pub(crate) fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Its readiness gate of this type.
    pub(crate) fn gate(&self, kind: &str) -> Option<&PodGate> {
        self.gates.iter().find(|gate| *gate.kind == *kind)
    }

    /// The annotation `vpc.amazonaws.com/pod-eni`.
    pub(crate) fn eni(&self) -> Option<&str> {
        self.rare.as_ref()?.eni.as_deref()
    }

    /// The QUIC server id of what listens on a port.
    pub(crate) fn quic_server_id(&self, port: u16) -> Option<&String> {
        let ids = &self.rare.as_ref()?.quic;
        ids.get(&port).or_else(|| ids.get(&0))
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
    /// All of them: a `nodeSelector` that comes later may name any.
    pub(crate) labels: BTreeMap<String, String>,
    /// Its labels do not exclude it from load balancers.
    pub(crate) usual: bool,
    /// About to be taken away by cluster-autoscaler or Karpenter.
    pub(crate) leaving: bool,
    pub(crate) provider_id: String,
}

impl Node {
    pub(crate) fn read(node: &objects::Node) -> Self {
        let conditions =
            node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
        let spec = node.spec.as_ref();
        let leaving = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default().iter().any(|taint| {
            taint.key == "ToBeDeletedByClusterAutoscaler"
                || (taint.key == "karpenter.sh/disrupted" && taint.effect == "NoSchedule")
        });
        let labels = node.metadata.labels.clone().unwrap_or_default();
        Self {
            ready: match ready.map(|condition| condition.status.as_str()) {
                Some("True") => NodeReady::Yes,
                Some("False") => NodeReady::No,
                _ => NodeReady::Unknown,
            },
            usual: is_usual(&labels),
            labels,
            leaving,
            provider_id: spec.and_then(|spec| spec.provider_id.clone()).unwrap_or_default(),
        }
    }

    /// The EC2 instance, if the provider id names one (`aws:///eu-west-1a/i-0123`).
    pub(crate) fn instance_id(&self) -> Option<&str> {
        let (scheme, rest) = self.provider_id.split_once("://")?;
        let id = rest.rsplit('/').next()?;
        let digits = id.strip_prefix("i-")?;
        (scheme == "aws" && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_alphanumeric()))
            .then_some(id)
    }

    /// `fargate`, `hybrid` and the like.
    pub(crate) fn compute_type(&self) -> Option<&str> {
        self.labels.get(COMPUTE_TYPE).map(String::as_str)
    }

    /// The zone label.
    pub(crate) fn zone(&self) -> Option<&str> {
        self.labels.get("topology.kubernetes.io/zone").map(String::as_str)
    }
}

const COMPUTE_TYPE: &str = "eks.amazonaws.com/compute-type";

/// True if labels let a node be a target.
fn is_usual(labels: &BTreeMap<String, String>) -> bool {
    const EXCLUDING: [&str; 3] = [
        "node-role.kubernetes.io/master",
        "node.kubernetes.io/exclude-from-external-load-balancers",
        "alpha.service-controller.kubernetes.io/exclude-balancer",
    ];
    !EXCLUDING.iter().any(|label| labels.contains_key(*label))
        && !matches!(labels.get(COMPUTE_TYPE).map(String::as_str), Some("fargate" | "hybrid"))
}

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Namespace {
    /// Its pods are to get readiness gates.
    pub(crate) injects: bool,
    pub(crate) terminating: bool,
}

fn port(number: Option<i32>) -> Option<u16> {
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_binding_that_cannot_be_read_is_known_by_its_name_and_the_sources_that_it_names() {
        let object = |port: Value| {
            json!({
                "metadata": {"namespace": "shop", "name": "web", "uid": "u"},
                "spec": {
                    "targetGroup": {"arn": "arn:1"}, "serviceRef": {"name": "web"},
                    "networking": {"ingress": [{"from": [{"securityGroup": {"groupID": "sg-1"}}], "ports": [{"port": port}]}]},
                },
            })
        };
        let keeps = |port: Value| -> (bool, Vec<(u16, u16)>) {
            let listed: Listed = serde_json::from_value(object(port)).unwrap();
            assert_eq!(listed.key(), Key::new("shop", "web"));
            let ranges = listed.keeps().iter().map(|rule| (rule.from_port, rule.to_port)).collect();
            (matches!(listed, Listed::Read(_)), ranges)
        };
        assert_eq!(keeps(json!(80)), (true, vec![(80, 80)]));
        // TCP and UDP.
        assert_eq!(keeps(json!({"from": 80, "to": 90})), (false, vec![(0, 65535), (0, 65535)]));
    }

    #[test]
    fn a_binding_is_given_back_as_it_was() {
        let condition = |kind: &str| {
            json!({"type": kind, "status": "True", "reason": "Reconciled", "message": "as it says", "observedGeneration": 3,
                   "lastTransitionTime": "2026-01-02T03:04:05Z"})
        };
        let object = json!({
            "metadata": {
                "namespace": "shop", "name": "web", "uid": "u", "resourceVersion": "7", "generation": 3,
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-03T00:00:00Z",
                "finalizers": ["elbv2.k8s.aws/resources", "other"],
                "labels": {"service.k8s.aws/stack": "s"}, "annotations": {"elbv2.k8s.aws/paused": "true"},
            },
            "spec": {
                "targetGroup": {"arn": "arn:1", "name": "web", "targetType": "ip", "protocol": "HTTP", "ipAddressType": "ipv6",
                                "vpcID": "vpc-1", "sharing": "Shared", "assumeRole": {"roleARN": "arn:r", "externalID": "e"}},
                "serviceRef": {"name": "web", "port": "http"},
                "networking": {"ingress": [{
                    "from": [{"securityGroup": {"groupID": "sg-1"}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}],
                    "ports": [{"port": 80, "protocol": "TCP"}, {"port": "http"}],
                }]},
                "nodeSelector": {"matchLabels": {"role": "web"}},
            },
            "status": {
                "observedGeneration": 3, "targetGroupARN": "arn:1", "conditions": [condition("Ready"), condition("Other")],
                "targets": {"desired": 2, "registered": 2, "healthy": 1, "unhealthy": 1, "draining": 0, "summary": "1/2",
                            "observedAt": "2026-01-02T03:04:05Z", "more": {"of": "it"}},
            },
        });
        let whole: TargetGroupBinding = serde_json::from_value(object).unwrap();
        let (key, mut pools) = (Key::new("shop", "web"), Pools::default());
        let kept = Binding::read(whole.clone(), &mut pools);
        assert_eq!(kept.whole(&key), whole);
        let bare = TargetGroupBinding { status: None, ..TargetGroupBinding::default() };
        assert_eq!(Binding::read(bare.clone(), &mut pools).whole(&Key::default()), bare);
    }

    #[test]
    fn a_quic_server_id_is_read_from_lbcs_base64_and_from_aws_s_own_form() {
        assert_eq!(quic_server_id("AQIDBAUGBwg=").as_deref(), Some("0x0102030405060708"));
        assert_eq!(quic_server_id("0x0102030405060708").as_deref(), Some("0x0102030405060708"));
        assert_eq!(quic_server_id("0x01"), None);
        assert_eq!(quic_server_id("nonsense"), None);
    }
}
