//! What a binding wants registered, from what the cluster looks like. No clock, no calls.

use crate::index::{Index, Key, NodeReady, Pod, Slice};
use crate::reason::Reason;
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tgb_api::service::{Service, ServicePort};
use tgb_api::target_group::{IpAddressType, TargetGroup, TargetType};
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::Target;

/// What a target is to AWS within one target group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct TargetKey {
    pub(crate) id: String,
    pub(crate) port: u16,
}

impl TargetKey {
    pub(crate) fn of(target: &Target) -> Self {
        Self { id: target.id.clone(), port: target.port }
    }
}

impl std::fmt::Display for TargetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.id.contains(':') {
            write!(f, "[{}]:{}", self.id, self.port)
        } else {
            write!(f, "{}:{}", self.id, self.port)
        }
    }
}

/// The switches that decide what counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Switches {
    /// Endpoints on nodes of unknown state count when nothing else does.
    pub(crate) endpoints_fail_open: bool,
    /// Endpoints without `targetRef` count.
    pub(crate) endpoints_without_pods: bool,
}

/// Where a wanted target comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A pod: its key, its UID and its node's zone.
    Pod { key: Key, uid: String, zone: Option<String> },
    /// A node.
    Node(String),
    /// An endpoint of nobody we know.
    Bare,
}

/// A wanted target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) target: Target,
    pub(crate) origin: Origin,
}

/// Why there is no backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    /// The condition's reason.
    pub(crate) reason: Reason,
    /// For people.
    pub(crate) message: String,
    /// Whether delete-and-recreate may end it, so that the grace for a missing backend applies.
    pub(crate) is_gone: bool,
}

/// What a binding wants.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Desired {
    pub(crate) targets: BTreeMap<TargetKey, Wanted>,
    pub(crate) missing: Option<Missing>,
    /// Endpoints whose pod runs but is not ready, by address.
    pub(crate) unready: BTreeSet<TargetKey>,
    /// What was left out, for the status.
    pub(crate) left_out: Vec<String>,
}

/// What the binding wants registered in `group`, zones still unset.
pub(crate) fn desired(
    index: &Index,
    binding: &TargetGroupBinding,
    group: &TargetGroup,
    switches: &Switches,
) -> Desired {
    let service_key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let Some(service) = index.services.get(&service_key) else {
        return missing(Reason::ServiceNotFound, format!("Service {service_key} does not exist"), true);
    };
    if service.service_type == "ExternalName" {
        let message = format!("TGB202 Service {service_key} is of type ExternalName, which has no endpoints");
        return missing(Reason::UnsupportedServiceType, message, false);
    }
    let Some(port) = service_port(service, binding, group) else {
        let has: Vec<_> = service.ports.iter().map(ServicePort::describe).collect();
        let wanted = match binding.spec.service_ref.port() {
            Some(IntOrString::Int(number)) => number.to_string(),
            Some(IntOrString::String(name)) => name.clone(),
            None => "to take by default".to_owned(),
        };
        let message = format!("Service {service_key} has no port {wanted}; it has {}", has.join(", "));
        return missing(Reason::PortNotFound, message, true);
    };
    if !group.binding_protocol().is_none_or(|protocol| protocol.fits_service_protocol(&port.protocol)) {
        let message = format!(
            "TGB209 port {} of Service {service_key} is {}, which does not fit a {} target group",
            port.describe(),
            port.protocol,
            group.protocol
        );
        return missing(Reason::PortNotFound, message, false);
    }
    match group.binding_target_type() {
        Some(TargetType::Instance) => instance_targets(index, binding, &service_key, service, port),
        _ => ip_targets(index, &service_key, port, group, switches),
    }
}

/// The Service's port that the binding means; without one, the only one that fits the target group's protocol.
pub(crate) fn service_port<'a>(
    service: &'a Service,
    binding: &TargetGroupBinding,
    group: &TargetGroup,
) -> Option<&'a ServicePort> {
    let protocol = group.binding_protocol();
    match binding.spec.service_ref.port() {
        Some(port) => service.port(port, protocol),
        None => {
            let fits = |port: &&ServicePort| protocol.is_none_or(|p| p.fits_service_protocol(&port.protocol));
            let mut fitting = service.ports.iter().filter(fits);
            fitting.next().filter(|_| fitting.next().is_none())
        }
    }
}

/// Whether the pod or node behind a registered target still runs. `uid` is the pod that it was registered for, where
/// that is remembered.
pub(crate) fn is_alive(
    index: &Index,
    binding: &TargetGroupBinding,
    key: &TargetKey,
    uid: Option<&str>,
) -> bool {
    let Ok(ip) = key.id.parse::<IpAddr>() else {
        return index.nodes.values().any(|node| node.instance_id() == Some(&key.id));
    };
    let service_key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let service = index.services.get(&service_key);
    index.pods_at(&ip).any(|(pod_key, pod)| {
        *pod_key.namespace == *binding.namespace()
            && pod.running
            && match (uid, service) {
                (Some(uid), _) => pod.uid == uid,
                (None, Some(service)) => {
                    service.selects(&pod.labels)
                        || index.slices(&service_key).flat_map(|slice| &slice.endpoints).any(|endpoint| {
                            endpoint.pod.as_deref() == Some(&*pod_key.name)
                                && endpoint.addresses.contains(&ip)
                        })
                }
                (None, None) => true,
            }
    })
}

/// Whether a registered target could be of this cluster at all: a pod's address, or a node's instance.
pub(crate) fn is_of_cluster(index: &Index, key: &TargetKey) -> bool {
    match key.id.parse::<IpAddr>() {
        Ok(ip) => index.pods_at(&ip).next().is_some(),
        Err(_) => index.nodes.values().any(|node| node.instance_id() == Some(&key.id)),
    }
}

/// `all` for an address that is in no subnet of the target group's VPC (RegisterTargets, "AvailabilityZone").
pub(crate) fn zone(ip: &IpAddr, subnets: &[IpNet]) -> Option<String> {
    (!subnets.iter().any(|subnet| subnet.contains(ip))).then(|| "all".to_owned())
}

/// Whether labels match a selector; one that does not parse matches nothing.
pub(crate) fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let by_label = selector
        .match_labels
        .as_ref()
        .is_none_or(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value)));
    by_label
        && selector.match_expressions.iter().flatten().all(|expression| {
            let value = labels.get(&expression.key);
            let listed = |value: &String| expression.values.as_ref().is_some_and(|all| all.contains(value));
            match expression.operator.as_str() {
                "In" => value.is_some_and(listed),
                "NotIn" => !value.is_some_and(listed),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

// ---- details ----

fn missing(reason: Reason, message: String, is_gone: bool) -> Desired {
    Desired { missing: Some(Missing { reason, message, is_gone }), ..Default::default() }
}

fn family_of(group: &TargetGroup) -> &'static str {
    match group.binding_ip_address_type() {
        IpAddressType::Ipv4 => "IPv4",
        IpAddressType::Ipv6 => "IPv6",
    }
}

/// One address of one endpoint at one port.
struct Candidate<'a> {
    ip: IpAddr,
    port: u16,
    ready: bool,
    pod: Option<(&'a Key, &'a Pod)>,
    has_reference: bool,
    node: Option<&'a str>,
}

fn candidates<'a>(
    index: &'a Index,
    namespace: &'a str,
    slice: &'a Slice,
    port: &'a ServicePort,
) -> impl Iterator<Item = Candidate<'a>> {
    let name = port.name.as_deref().unwrap_or_default();
    let ports = slice.ports.iter().filter(move |p| p.name == name && p.protocol == port.protocol);
    ports.flat_map(move |slice_port| {
        slice.endpoints.iter().flat_map(move |endpoint| {
            let pod = endpoint.pod.as_deref().map(|name| Key::new(namespace, name));
            let pod = pod.and_then(|key| index.pods.get_key_value(&key));
            endpoint.addresses.iter().map(move |ip| Candidate {
                ip: *ip,
                port: slice_port.port,
                ready: endpoint.ready,
                pod,
                has_reference: endpoint.pod.is_some(),
                node: endpoint.node.as_deref().or_else(|| pod.and_then(|(_, pod)| pod.node.as_deref())),
            })
        })
    })
}

fn ip_targets(
    index: &Index,
    service: &Key,
    port: &ServicePort,
    group: &TargetGroup,
    switches: &Switches,
) -> Desired {
    let mut found = Desired::default();
    let mut on_unknown_nodes = BTreeMap::new();
    let needs_quic = group.binding_protocol().is_some_and(tgb_api::target_group::Protocol::is_quic);
    let family = family_of(group);
    let slices = index.slices(service).filter(|slice| slice.address_type == family);
    for candidate in slices.flat_map(|slice| candidates(index, &service.namespace, slice, port)) {
        let node = candidate.node.and_then(|name| index.nodes.get(name));
        let node_ready = node.map(|node| node.ready).unwrap_or_default();
        let (origin, quic_server_id, qualifies) = match candidate.pod {
            Some((key, pod)) if pod.running && pod.ips.contains(&candidate.ip) => {
                let zone = node.and_then(|node| node.zone()).map(str::to_owned);
                let origin = Origin::Pod { key: key.clone(), uid: pod.uid.clone(), zone };
                let waits_for_gate = pod.containers_ready && node_ready == NodeReady::Yes;
                (origin, pod.quic.get(&candidate.port).cloned(), candidate.ready || waits_for_gate)
            }
            Some(_) => continue,
            None if candidate.has_reference || !switches.endpoints_without_pods => continue,
            None => (Origin::Bare, None, candidate.ready),
        };
        if needs_quic && quic_server_id.is_none() {
            found.left_out.push(format!("{} has no QUIC server id", candidate.ip));
            continue;
        }
        let target = Target {
            id: candidate.ip.to_string(),
            port: candidate.port,
            zone: None,
            quic_server_id: quic_server_id.filter(|_| needs_quic),
        };
        let key = TargetKey::of(&target);
        let wanted = Wanted { target, origin };
        if qualifies {
            found.unready.remove(&key);
            found.targets.insert(key, wanted);
        } else if !found.targets.contains_key(&key) {
            if node_ready == NodeReady::Unknown && node.is_some() {
                on_unknown_nodes.insert(key.clone(), wanted);
            }
            found.unready.insert(key);
        }
    }
    if found.targets.is_empty() && switches.endpoints_fail_open {
        found.targets = on_unknown_nodes;
        found.unready.retain(|key| !found.targets.contains_key(key));
    }
    found
}

fn instance_targets(
    index: &Index,
    binding: &TargetGroupBinding,
    service_key: &Key,
    service: &Service,
    port: &ServicePort,
) -> Desired {
    if !service.has_node_ports() {
        let message = format!(
            "TGB205 instance targets need a Service of type NodePort or LoadBalancer; {service_key} is {}",
            service.service_type
        );
        return missing(Reason::UnsupportedServiceType, message, false);
    }
    let Some(node_port) = port.node_port else {
        let message = format!("TGB205 port {} of Service {service_key} has no nodePort", port.describe());
        return missing(Reason::NodePortMissing, message, false);
    };
    let mut found = Desired::default();
    let mut on_unknown_nodes = BTreeMap::new();
    let mut some_known = false;
    let selector = binding.spec.node_selector.as_ref();
    for (name, node) in &index.nodes {
        if !is_usual(&node.labels) || selector.is_some_and(|selector| !matches(selector, &node.labels)) {
            continue;
        }
        some_known |= node.ready != NodeReady::Unknown;
        if node.leaving {
            continue;
        }
        let Some(instance) = node.instance_id() else {
            found
                .left_out
                .push(format!("node {name} has no EC2 instance in its providerID \"{}\"", node.provider_id));
            continue;
        };
        let target = Target { id: instance.to_owned(), port: node_port, zone: None, quic_server_id: None };
        let wanted = Wanted { origin: Origin::Node(name.to_string()), target };
        match node.ready {
            NodeReady::Yes => found.targets.insert(TargetKey::of(&wanted.target), wanted),
            NodeReady::No => {
                found.unready.insert(TargetKey::of(&wanted.target));
                None
            }
            NodeReady::Unknown => on_unknown_nodes.insert(TargetKey::of(&wanted.target), wanted),
        };
    }
    if !some_known {
        found.targets = on_unknown_nodes;
    } else {
        found.unready.extend(on_unknown_nodes.into_keys());
    }
    found
}

fn is_usual(labels: &BTreeMap<String, String>) -> bool {
    const EXCLUDING: [&str; 3] = [
        "node-role.kubernetes.io/master",
        "node.kubernetes.io/exclude-from-external-load-balancers",
        "alpha.service-controller.kubernetes.io/exclude-balancer",
    ];
    !EXCLUDING.iter().any(|label| labels.contains_key(*label))
        && !matches!(
            labels.get("eks.amazonaws.com/compute-type").map(String::as_str),
            Some("fargate" | "hybrid")
        )
}
