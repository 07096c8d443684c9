//! What a binding wants registered, from what the cluster looks like. No clock, no calls.

use crate::events::{counted, first_few};
use crate::index::{Index, Key};
use crate::kept::{NodeReady, Pod, Slice};
use crate::network::resolved;
use crate::reason::Reason;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tgb_api::service::{Service, ServicePort};
use tgb_api::target_group::{IpAddressType, TargetGroup, TargetType};
use tgb_api::v1::{TargetGroupBinding, Transport};
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

/// Why there is nothing to register although the backend is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nothing {
    /// The condition's reason.
    pub(crate) reason: Reason,
    /// For people.
    pub(crate) message: String,
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
    /// Ready endpoints whose pods are not in the cache: they may be wanted.
    pub(crate) unknown: BTreeSet<TargetKey>,
    pub(crate) nothing: Option<Nothing>,
}

/// What the binding wants registered in `group`, zones still unset.
pub(crate) fn desired(
    index: &Index,
    binding: &TargetGroupBinding,
    group: &TargetGroup,
    switches: &Switches,
) -> Desired {
    let service_key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let Some(service) = index.service(&service_key) else {
        return missing(Reason::ServiceNotFound, format!("Service {service_key} does not exist"), true);
    };
    if service.service_type == "ExternalName" {
        let message = format!("TGB202 Service {service_key} is of type ExternalName, which has no endpoints");
        return missing(Reason::UnsupportedServiceType, message, true);
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
        Some(TargetType::Instance) => {
            instance_targets(index, binding, (&service_key, service, port), switches)
        }
        _ => ip_targets(index, &service_key, service, port, group, switches),
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
        return index.has_instance(&key.id);
    };
    let service_key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let service = index.service(&service_key);
    index.pods_at(&ip).any(|(pod_key, pod)| {
        *pod_key.namespace == *binding.namespace()
            && pod.running
            && pod.node.as_deref().is_none_or(|node| index.nodes.contains_key(node))
            && match (uid, service) {
                (Some(uid), _) => *pod.uid == *uid,
                (None, Some(service)) => {
                    service.selects(|name| pod.label(name))
                        || index.slices(&service_key).flat_map(|slice| &slice.endpoints).any(|endpoint| {
                            endpoint.pod.as_deref() == Some(&*pod_key.name) && endpoint.address == Some(ip)
                        })
                }
                (None, None) => true,
            }
    })
}

/// Why a registered target of a binding goes, for an event. `pod` is the name and UID of the pod that it was registered for.
pub(crate) fn why_unwanted(
    index: &Index,
    binding: &TargetGroupBinding,
    wanted: &Desired,
    key: &TargetKey,
    pod: Option<(&str, &str)>,
) -> String {
    if wanted.targets.contains_key(key) {
        return "its QUIC server id has changed".to_owned();
    }
    let Ok(ip) = key.id.parse::<IpAddr>() else { return why_no_instance(index, binding, wanted, key) };
    let service_key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let at_address = || {
        let mut pods = index.pods_at(&ip).filter(|(pod, _)| pod.namespace == service_key.namespace);
        pods.next().map(|(key, pod)| (&*key.name, Some(pod)))
    };
    let remembered = pod.map(|(name, uid)| {
        let known = index.pod(&service_key.beside(name)).map(|(_, pod)| pod);
        (name, known.filter(|known| *known.uid == *uid))
    });
    let (name, pod) = match remembered.or_else(at_address) {
        None => return "no pod of the namespace has this address".to_owned(),
        Some((name, None)) => return format!("pod {name} is gone"),
        Some((name, Some(pod))) => (name, pod),
    };
    if !pod.running {
        return format!("pod {name} is terminating or has finished");
    }
    if !pod.ips.contains(&ip) {
        return format!("pod {name} has another address");
    }
    if let Some(node) = pod.node.as_deref().filter(|node| !index.nodes.contains_key(*node)) {
        return format!("node {node} of pod {name} is gone");
    }
    if let Some(missing) = &wanted.missing {
        return missing.message.clone();
    }
    if wanted.unready.contains(key) {
        return format!("pod {name} is not ready");
    }
    match index.service(&service_key) {
        Some(service) if service.selector.is_some() && !service.selects(|label| pod.label(label)) => {
            format!("Service {service_key} does not select pod {name}")
        }
        _ => format!("pod {name} is no endpoint of Service {service_key} at this port"),
    }
}

fn why_no_instance(index: &Index, binding: &TargetGroupBinding, wanted: &Desired, key: &TargetKey) -> String {
    let Some((name, node)) = index.nodes.iter().find(|(_, node)| node.instance_id() == Some(key.id.as_str()))
    else {
        return "no node is this instance".to_owned();
    };
    if let Some(missing) = &wanted.missing {
        return missing.message.clone();
    }
    let selector = binding.spec.node_selector.as_ref();
    if node.leaving {
        format!("node {name} is about to go")
    } else if !node.usual {
        format!("node {name} has a label that excludes it from load balancers")
    } else if selector.is_some_and(|selector| !matches(selector, &node.labels)) {
        format!("nodeSelector does not take node {name}")
    } else if wanted.unready.contains(key) {
        format!("node {name} is not ready")
    } else {
        format!("node {name} is wanted at another port")
    }
}

/// Whether a registered target could be of this cluster at all: a pod's address, or a node's instance.
pub(crate) fn is_of_cluster(index: &Index, key: &TargetKey) -> bool {
    match key.id.parse::<IpAddr>() {
        Ok(ip) => index.pods_at(&ip).next().is_some(),
        Err(_) => index.has_instance(&key.id),
    }
}

/// How much longer a Service without slices counts as missing instead of empty: its slices are still to come, since pods
/// match its selector and it is younger than `grace`. `now` is in seconds since the epoch.
pub(crate) fn not_there_yet(
    index: &Index,
    binding: &TargetGroupBinding,
    grace: Duration,
    now: i64,
) -> Option<Duration> {
    let key = Key::new(binding.namespace(), &binding.spec.service_ref.name);
    let service = index.service(&key)?;
    let age = u64::try_from(now - service.created?).unwrap_or_default();
    let left = grace.checked_sub(Duration::from_secs(age)).filter(|left| !left.is_zero())?;
    if index.slices(&key).next().is_some() {
        return None;
    }
    index.selected_pods(&key, service).next().is_some().then_some(left)
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

/// The endpoints of a slice at a Service's port. While one of the two has the port under another name already, the port is
/// the one that pods listen on: a port that gets a name moves nothing.
fn candidates<'a>(
    index: &'a Index,
    namespace: &'a str,
    slice: &'a Slice,
    port: &'a ServicePort,
) -> impl Iterator<Item = Candidate<'a>> {
    let name = port.name.as_deref().unwrap_or_default();
    let of_protocol = slice.ports.iter().filter(|entry| entry.protocol == port.protocol);
    let named = of_protocol.clone().find(|entry| entry.name == name).map(|entry| entry.port);
    slice.endpoints.iter().filter_map(move |endpoint| {
        let pod = endpoint.pod.as_deref().map(|name| Key::new(namespace, name));
        let pod = pod.and_then(|key| index.pod(&key));
        let renamed = || {
            let number = target_port(port, pod.map(|(_, pod)| pod))?;
            of_protocol.clone().any(|entry| entry.port == number).then_some(number)
        };
        Some(Candidate {
            ip: endpoint.address?,
            port: named.or_else(renamed)?,
            ready: endpoint.ready,
            pod,
            has_reference: endpoint.pod.is_some(),
            node: pod.map_or(endpoint.node.as_deref(), |(_, pod)| pod.node.as_deref()),
        })
    })
}

/// The port of a pod that a Service's port leads to, as Kubernetes finds it.
fn target_port(port: &ServicePort, pod: Option<&Pod>) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::String(name)) => resolved(&pod?.ports, name, Transport::from_word(&port.protocol)?),
    }
}

fn ip_targets(
    index: &Index,
    service_key: &Key,
    service: &Service,
    port: &ServicePort,
    group: &TargetGroup,
    switches: &Switches,
) -> Desired {
    let mut found = Desired::default();
    let mut on_unknown_nodes = BTreeMap::new();
    let needs_quic = group.binding_protocol().is_some_and(tgb_api::target_group::Protocol::is_quic);
    let family = family_of(group);
    let slices = index.slices(service_key).filter(|slice| *slice.address_type == *family);
    let mut without_pods = 0;
    for candidate in slices.flat_map(|slice| candidates(index, &service_key.namespace, slice, port)) {
        let node = candidate.node.and_then(|name| index.nodes.get(name));
        let node_ready = node.map(|node| node.ready).unwrap_or_default();
        let (origin, quic_server_id, qualifies) = match candidate.pod {
            Some((key, pod)) if pod.running && pod.ips.contains(&candidate.ip) => {
                let zone = node.and_then(|node| node.zone()).map(str::to_owned);
                let origin = Origin::Pod { key: key.clone(), uid: pod.uid.to_string(), zone };
                let waits_for_gate = pod.containers_ready && node_ready == NodeReady::Yes;
                (origin, pod.quic_server_id(candidate.port).cloned(), candidate.ready || waits_for_gate)
            }
            Some(_) => continue,
            None if candidate.has_reference => {
                if candidate.ready {
                    found.unknown.insert(TargetKey { id: candidate.ip.to_string(), port: candidate.port });
                }
                continue;
            }
            None if !switches.endpoints_without_pods => {
                without_pods += 1;
                continue;
            }
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
    if without_pods > 0 {
        let endpoints = counted(without_pods, "endpoint");
        found.left_out.push(format!("{endpoints} without a pod, for want of --endpoints-without-pods"));
    }
    if found.targets.is_empty() && found.unready.is_empty() && found.unknown.is_empty() {
        let why = why_no_pods(index, service_key, service, port, group.binding_ip_address_type());
        found.nothing = Some(or_left_out(why, &found));
    }
    found
}

/// The reasons for what was left out explain more than that nothing is there.
fn or_left_out(why: (Reason, String), found: &Desired) -> Nothing {
    let (reason, message) = match found.left_out.as_slice() {
        [] => why,
        all => (Reason::NoEndpoints, format!("all were left out: {}", first_few(all))),
    };
    Nothing { reason, message }
}

/// Why a Service leads to no pod.
fn why_no_pods(
    index: &Index,
    service_key: &Key,
    service: &Service,
    port: &ServicePort,
    family: IpAddressType,
) -> (Reason, String) {
    let Some(selector) = &service.selector else {
        let message = format!("Service {service_key} has no selector, and no endpoint that runs");
        return (Reason::NoEndpoints, message);
    };
    let pods: Vec<&Pod> = index.selected_pods(service_key, service).map(|(_, pod)| pod).collect();
    if pods.is_empty() {
        let labels: Vec<String> = selector.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let message = format!("Service {service_key} selects no running pod by {}", labels.join(","));
        return (Reason::NoMatchingPods, message);
    }
    if let Some(IntOrString::String(name)) = &port.target_port
        && !pods.iter().any(|pod| target_port(port, Some(pod)).is_some())
    {
        let there: BTreeSet<&str> =
            pods.iter().flat_map(|pod| pod.ports.iter()).map(|port| &*port.name).collect();
        let there: Vec<&str> = there.into_iter().collect();
        let there = if there.is_empty() { "no named ports".to_owned() } else { first_few(&there) };
        let message = format!(
            "no pod that Service {service_key} selects has a {} port {name}, its targetPort; they have {there}",
            port.protocol
        );
        return (Reason::NoMatchingPort, message);
    }
    let (family, is_of_family): (_, fn(&IpAddr) -> bool) = match family {
        IpAddressType::Ipv4 => ("IPv4", IpAddr::is_ipv4),
        IpAddressType::Ipv6 => ("IPv6", IpAddr::is_ipv6),
    };
    let mut addresses = pods.iter().flat_map(|pod| pod.ips.iter()).peekable();
    if addresses.peek().is_some() && !addresses.any(is_of_family) {
        let message = format!("no pod that Service {service_key} selects has an {family} address");
        return (Reason::NoEndpoints, message);
    }
    let pods = counted(pods.len(), "pod");
    (Reason::BackendUnready, format!("Service {service_key} selects {pods}, and none has an endpoint yet"))
}

/// Why a binding takes no node.
fn why_no_nodes(index: &Index, selector: Option<&LabelSelector>) -> (Reason, String) {
    let taken = |labels: &BTreeMap<String, String>| selector.is_none_or(|selector| matches(selector, labels));
    let message = if !index.nodes.values().any(|node| taken(&node.labels)) {
        match selector {
            Some(_) => "spec.nodeSelector takes no node",
            None => "there are no nodes",
        }
    } else if !index.nodes.values().any(|node| taken(&node.labels) && node.usual) {
        "all nodes that could be taken have labels that exclude them from load balancers"
    } else {
        "all nodes that could be taken are about to go"
    };
    (Reason::NoMatchingNodes, message.to_owned())
}

fn instance_targets(
    index: &Index,
    binding: &TargetGroupBinding,
    (service_key, service, port): (&Key, &Service, &ServicePort),
    switches: &Switches,
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
    let selector = binding.spec.node_selector.as_ref();
    for (name, node) in &index.nodes {
        if !node.usual || selector.is_some_and(|selector| !matches(selector, &node.labels)) {
            continue;
        }
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
    if found.targets.is_empty() && switches.endpoints_fail_open {
        found.targets = on_unknown_nodes;
    } else {
        found.unready.extend(on_unknown_nodes.into_keys());
    }
    if found.targets.is_empty() && found.unready.is_empty() {
        found.nothing = Some(or_left_out(why_no_nodes(index, selector.map(|selector| &**selector)), &found));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};
    use tgb_api::arn::TargetGroupArn;

    const ARN: &str = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1234567890abcdef";

    fn read<T: DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    /// A cluster with Service `web` (80 to 8080), nodes `n1` (ready), `n2` (unknown) and `n3` (not ready).
    fn cluster() -> Index {
        let mut index = Index::default();
        index.put_service(&read(service(json!({}))));
        for (name, ready) in [("n1", "True"), ("n2", "Unknown"), ("n3", "False")] {
            index.put_node(&read(node(name, ready, &format!("aws:///us-west-2a/i-{name}"), json!({}))));
        }
        index
    }

    fn service(spec: Value) -> Value {
        let mut object = json!({
            "metadata": {"namespace": "shop", "name": "web", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {
                "type": "ClusterIP",
                "selector": {"app": "web"},
                "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}],
            },
        });
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        object
    }

    fn node(name: &str, ready: &str, provider: &str, labels: Value) -> Value {
        json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"providerID": provider},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        })
    }

    /// A pod on a node with these addresses; its containers are ready.
    fn pod(name: &str, node: &str, ips: &[&str]) -> Value {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": {"app": "web"}},
            "spec": {"nodeName": node, "containers": [{"name": "web", "ports": [{"containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": ips, "conditions": [{"type": "ContainersReady", "status": "True"}]},
        })
    }

    /// A slice with an endpoint per (address, pod, ready).
    fn slice(name: &str, family: &str, endpoints: &[(&str, Option<&str>, Option<bool>)]) -> Value {
        let one = |(ip, pod, ready): &(&str, Option<&str>, Option<bool>)| {
            let mut endpoint = json!({"addresses": [ip], "conditions": {}});
            if let Some(ready) = ready {
                endpoint["conditions"]["ready"] = json!(ready);
            }
            if let Some(pod) = pod {
                endpoint["targetRef"] = json!({"kind": "Pod", "name": pod, "namespace": "shop"});
            }
            endpoint
        };
        json!({
            "metadata": {
                "namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": family,
            "endpoints": endpoints.iter().map(one).collect::<Vec<_>>(),
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        })
    }

    fn group(target_type: &str, family: &str, protocol: &str) -> TargetGroup {
        TargetGroup {
            arn: TargetGroupArn::parse(ARN).unwrap(),
            target_type: target_type.to_owned(),
            protocol: protocol.to_owned(),
            ip_address_type: family.to_owned(),
            vpc_id: None,
            port: Some(80),
            health_check_port: None,
            load_balancer_arns: Vec::new(),
        }
    }

    fn binding(spec: Value) -> TargetGroupBinding {
        let mut object = json!({
            "metadata": {"namespace": "shop", "name": "web"},
            "spec": {"serviceRef": {"name": "web", "port": 80}},
        });
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        read(object)
    }

    fn switches(without_pods: bool) -> Switches {
        Switches { endpoints_fail_open: true, endpoints_without_pods: without_pods }
    }

    fn ips_with(index: &Index, family: &str, without_pods: bool) -> Vec<String> {
        let group = group("ip", family, "HTTP");
        let found = desired(index, &binding(json!({})), &group, &switches(without_pods));
        found.targets.keys().map(ToString::to_string).collect()
    }

    fn ips(index: &Index) -> Vec<String> {
        ips_with(index, "ipv4", false)
    }

    fn with_pods(pods: &[Value], slices: &[Value]) -> Index {
        let mut index = cluster();
        for pod in pods {
            index.put_pod(&read(pod.clone()));
        }
        for slice in slices {
            index.put_slice(&read(slice.clone()));
        }
        index
    }

    #[test]
    fn an_endpoint_counts_if_it_is_ready_or_says_nothing_about_it() {
        let pods = [pod("a", "n1", &["10.0.0.1"]), pod("b", "n1", &["10.0.0.2"])];
        let endpoints = [("10.0.0.1", Some("a"), Some(true)), ("10.0.0.2", Some("b"), None)];
        let index = with_pods(&pods, &[slice("s", "IPv4", &endpoints)]);
        assert_eq!(ips(&index), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    }

    #[test]
    fn a_pod_that_waits_only_for_its_gate_counts_on_a_ready_node_alone() {
        let pods = [pod("a", "n1", &["10.0.0.1"]), pod("b", "n3", &["10.0.0.2"])];
        let endpoints = [("10.0.0.1", Some("a"), Some(false)), ("10.0.0.2", Some("b"), Some(false))];
        let index = with_pods(&pods, &[slice("s", "IPv4", &endpoints)]);
        assert_eq!(ips(&index), ["10.0.0.1:8080"]);
    }

    #[test]
    fn nothing_else_being_left_endpoints_on_nodes_of_unknown_state_count() {
        let mut sick = pod("a", "n2", &["10.0.0.1"]);
        sick["status"]["conditions"] = json!([]);
        let index =
            with_pods(&[sick.clone()], &[slice("s", "IPv4", &[("10.0.0.1", Some("a"), Some(false))])]);
        assert_eq!(ips(&index), ["10.0.0.1:8080"]);
        let closed = Switches { endpoints_fail_open: false, ..Switches::default() };
        let found = desired(&index, &binding(json!({})), &group("ip", "ipv4", "HTTP"), &closed);
        assert!(found.targets.is_empty() && found.unready.len() == 1);
        let endpoints = [("10.0.0.1", Some("a"), Some(false)), ("10.0.0.2", Some("b"), Some(true))];
        let both = with_pods(&[sick, pod("b", "n1", &["10.0.0.2"])], &[slice("s", "IPv4", &endpoints)]);
        assert_eq!(ips(&both), ["10.0.0.2:8080"]);
    }

    #[test]
    fn pods_that_are_finished_terminating_gone_or_elsewhere_do_not_count() {
        let (mut finished, mut terminating) = (pod("f", "n1", &["10.0.0.1"]), pod("t", "n1", &["10.0.0.2"]));
        finished["status"]["phase"] = json!("Succeeded");
        terminating["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let moved = pod("m", "n1", &["10.0.0.9"]);
        let endpoints = [
            ("10.0.0.1", Some("f"), Some(true)),
            ("10.0.0.2", Some("t"), Some(true)),
            ("10.0.0.3", Some("m"), Some(true)),
            ("10.0.0.4", Some("gone"), Some(true)),
        ];
        let index = with_pods(&[finished, terminating, moved], &[slice("s", "IPv4", &endpoints)]);
        assert!(ips(&index).is_empty());
    }

    #[test]
    fn an_address_in_several_slices_counts_once() {
        let endpoint = [("10.0.0.1", Some("a"), Some(true))];
        let unready = [("10.0.0.1", Some("a"), Some(false))];
        let slices = [
            slice("s1", "IPv4", &endpoint),
            slice("s2", "IPv4", &unready),
            slice("s3", "FQDN", &[("web.example", None, Some(true))]),
        ];
        let index = with_pods(&[pod("a", "n1", &["10.0.0.1"])], &slices);
        assert_eq!(ips(&index), ["10.0.0.1:8080"]);
    }

    #[test]
    fn of_a_pod_with_both_families_the_target_groups_is_taken() {
        let slices = [
            slice("s4", "IPv4", &[("10.0.0.1", Some("a"), Some(true))]),
            slice("s6", "IPv6", &[("fd00::1", Some("a"), Some(true))]),
        ];
        let index = with_pods(&[pod("a", "n1", &["10.0.0.1", "fd00::1"])], &slices);
        assert_eq!(ips(&index), ["10.0.0.1:8080"]);
        assert_eq!(ips_with(&index, "ipv6", false), ["[fd00::1]:8080"]);
    }

    #[test]
    fn endpoints_without_a_pod_count_only_if_the_operator_says_so() {
        let endpoints = [("10.0.0.1", None, Some(true)), ("10.0.0.2", None, Some(false))];
        let index = with_pods(&[], &[slice("s", "IPv4", &endpoints)]);
        assert!(ips(&index).is_empty());
        assert_eq!(ips_with(&index, "ipv4", true), ["10.0.0.1:8080"]);
    }

    #[test]
    fn a_quic_target_needs_a_server_id_and_the_status_names_who_has_none() {
        let mut with = pod("a", "n1", &["10.0.0.1"]);
        with["spec"]["containers"][0]["env"] =
            json!([{"name": "AWS_LBC_QUIC_SERVER_ID", "value": "AQIDBAUGBwg="}]);
        let endpoints = [("10.0.0.1", Some("a"), Some(true)), ("10.0.0.2", Some("b"), Some(true))];
        let mut index = with_pods(&[with, pod("b", "n1", &["10.0.0.2"])], &[slice("s", "IPv4", &endpoints)]);
        index.put_service(&read(service(json!({"ports": [{"port": 80, "protocol": "TCP"}]}))));
        let group = group("ip", "ipv4", "TCP_QUIC");
        let found = desired(&index, &binding(json!({})), &group, &switches(false));
        let ids: Vec<_> = found.targets.values().map(|w| w.target.quic_server_id.clone()).collect();
        assert_eq!(ids, [Some("0x0102030405060708".to_owned())]);
        assert_eq!(found.left_out, ["10.0.0.2 has no QUIC server id"]);
    }

    fn instances(index: &Index, spec: Value) -> Desired {
        desired(index, &binding(spec), &group("instance", "ipv4", "HTTP"), &switches(false))
    }

    fn ids(found: &Desired) -> Vec<String> {
        found.targets.keys().map(ToString::to_string).collect()
    }

    fn node_port_service() -> tgb_api::objects::Service {
        read(service(
            json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}),
        ))
    }

    #[test]
    fn instance_targets_are_ready_nodes_that_the_selectors_take() {
        let mut index = cluster();
        index.put_service(&node_port_service());
        assert_eq!(ids(&instances(&index, json!({}))), ["i-n1:30080"]);
        let labels = [
            json!({"node-role.kubernetes.io/master": ""}),
            json!({"node.kubernetes.io/exclude-from-external-load-balancers": ""}),
            json!({"alpha.service-controller.kubernetes.io/exclude-balancer": ""}),
            json!({"eks.amazonaws.com/compute-type": "fargate"}),
            json!({"eks.amazonaws.com/compute-type": "hybrid"}),
        ];
        for (n, labels) in labels.into_iter().enumerate() {
            index.put_node(&read(node(&format!("x{n}"), "True", &format!("aws:///a/i-x{n}"), labels)));
        }
        assert_eq!(ids(&instances(&index, json!({}))), ["i-n1:30080"]);
        index.put_node(&read(node("w", "True", "aws:///a/i-w", json!({"role": "web"}))));
        let chosen = json!({"nodeSelector": {"matchLabels": {"role": "web"}}});
        assert_eq!(ids(&instances(&index, chosen)), ["i-w:30080"]);
    }

    #[test]
    fn a_node_that_is_about_to_go_or_has_no_instance_is_left_out_and_blocks_nobody() {
        let mut index = cluster();
        index.put_service(&node_port_service());
        let mut leaving = node("l", "True", "aws:///a/i-l", json!({}));
        leaving["spec"]["taints"] = json!([{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]);
        index.put_node(&read(leaving));
        index.put_node(&read(node("k", "True", "kind://k", json!({}))));
        let found = instances(&index, json!({}));
        assert_eq!(ids(&found), ["i-n1:30080"]);
        assert_eq!(found.left_out, ["node k has no EC2 instance in its providerID \"kind://k\""]);
    }

    #[test]
    fn where_no_node_is_ready_those_of_unknown_state_are_registered_unless_the_operator_says_no() {
        let mut index = cluster();
        index.put_service(&node_port_service());
        index.remove_node(&Key::new("", "n1"));
        let found = instances(&index, json!({}));
        assert_eq!((ids(&found), found.unready.len()), (vec!["i-n2:30080".to_owned()], 1));
        let closed = Switches::default();
        let group = group("instance", "ipv4", "HTTP");
        let found = desired(&index, &binding(json!({})), &group, &closed);
        assert_eq!((found.targets.len(), found.unready.len()), (0, 2));
        index.remove_node(&Key::new("", "n3"));
        assert_eq!(ids(&instances(&index, json!({}))), ["i-n2:30080"]);
    }

    #[test]
    fn an_endpoint_whose_pod_is_not_in_the_cache_is_not_known_rather_than_absent() {
        let endpoints = [("10.0.0.1", Some("a"), Some(true)), ("10.0.0.2", Some("b"), Some(false))];
        let index = with_pods(&[], &[slice("s", "IPv4", &endpoints)]);
        let found = desired(&index, &binding(json!({})), &group("ip", "ipv4", "HTTP"), &switches(false));
        let unknown: Vec<String> = found.unknown.iter().map(ToString::to_string).collect();
        assert_eq!((unknown, found.nothing), (vec!["10.0.0.1:8080".to_owned()], None));
    }

    /// The Service's only port.
    fn with_port(port: Value) -> tgb_api::objects::Service {
        read(service(json!({"ports": [port]})))
    }

    #[test]
    fn targets_stay_the_same_whatever_their_port_is_called() {
        let mut a = pod("a", "n1", &["10.0.0.1"]);
        a["spec"]["containers"][0]["ports"] = json!([{"name": "web", "containerPort": 8080}]);
        let named = |name: &str| {
            let mut one = slice("s", "IPv4", &[("10.0.0.1", Some("a"), Some(false))]);
            one["ports"][0]["name"] = json!(name);
            one
        };
        // The watches of Services and of slices are not in step: either may be ahead.
        for service_name in ["", "http", "other"] {
            for slice_name in ["", "http", "older"] {
                for target_port in [json!(8080), json!("web"), Value::Null] {
                    let number = if target_port.is_null() { 8080 } else { 80 };
                    let mut index = with_pods(std::slice::from_ref(&a), &[named(slice_name)]);
                    index.put_service(&with_port(json!({
                        "name": service_name, "port": number, "targetPort": target_port, "protocol": "TCP",
                    })));
                    let binding = binding(json!({"serviceRef": {"name": "web", "port": number}}));
                    let found = desired(&index, &binding, &group("ip", "ipv4", "HTTP"), &switches(false));
                    let case = format!("{service_name:?} {slice_name:?} {target_port}");
                    assert_eq!(ids(&found), ["10.0.0.1:8080"], "{case}");
                }
            }
        }
    }

    #[test]
    fn a_port_of_another_name_is_taken_only_where_pods_listen_there() {
        let mut one = slice("s", "IPv4", &[("10.0.0.1", Some("a"), Some(true))]);
        one["ports"] = json!([{"name": "x", "port": 9090, "protocol": "TCP"},
                              {"name": "y", "port": 8080, "protocol": "UDP"}]);
        let index = with_pods(&[pod("a", "n1", &["10.0.0.1"])], &[one]);
        assert!(ips(&index).is_empty());
    }

    #[test]
    fn where_nothing_is_there_the_reason_says_why() {
        let why = |index: &Index, spec: Value, target_type: &str, family: &str| {
            let group = group(target_type, family, "HTTP");
            let found = desired(index, &binding(spec), &group, &switches(false));
            found.nothing.map(|nothing| (nothing.reason, nothing.message)).unwrap()
        };
        let ip = |index: &Index| why(index, json!({}), "ip", "ipv4");
        let mut index = cluster();
        let (reason, message) = ip(&index);
        assert_eq!(reason, Reason::NoMatchingPods);
        assert_eq!(message, "Service shop/web selects no running pod by app=web");
        let mut a = pod("a", "n1", &[]);
        a["spec"]["containers"][0]["ports"] = json!([{"name": "http", "containerPort": 8080},
                                                     {"name": "htpp", "containerPort": 8080, "protocol": "UDP"}]);
        index.put_pod(&read(a.clone()));
        assert_eq!(ip(&index).0, Reason::BackendUnready);
        a["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}]);
        index.put_pod(&read(a.clone()));
        let (reason, message) = why(&index, json!({}), "ip", "ipv6");
        assert_eq!((reason, message.contains("IPv6")), (Reason::NoEndpoints, true));
        index.put_service(&with_port(json!({"port": 80, "targetPort": "htpp", "protocol": "TCP"})));
        let (reason, message) = ip(&index);
        assert_eq!(reason, Reason::NoMatchingPort);
        assert!(message.contains("TCP port htpp") && message.ends_with("they have htpp, http"), "{message}");
        let mut bare = service(json!({}));
        bare["spec"].as_object_mut().unwrap().remove("selector");
        index.put_service(&read(bare));
        assert_eq!(ip(&index).0, Reason::NoEndpoints);
        index.put_slice(&read(slice("s", "IPv4", &[("10.0.0.7", None, Some(true))])));
        let (reason, message) = ip(&index);
        assert_eq!((reason, message.contains("--endpoints-without-pods")), (Reason::NoEndpoints, true));

        let mut index = cluster();
        index.put_service(&node_port_service());
        let nosuch = json!({"nodeSelector": {"matchLabels": {"pool": "nosuch"}}});
        let (reason, message) = why(&index, nosuch, "instance", "ipv4");
        assert_eq!((reason, message.as_str()), (Reason::NoMatchingNodes, "spec.nodeSelector takes no node"));
        for name in ["n1", "n2", "n3"] {
            index.put_node(&read(node(name, "True", "kind://k", json!({}))));
        }
        let (reason, message) = why(&index, json!({}), "instance", "ipv4");
        assert_eq!((reason, message.contains("all were left out")), (Reason::NoEndpoints, true));
    }

    #[test]
    fn a_target_that_goes_is_told_with_its_pod_or_node_and_why() {
        let mut index = with_pods(
            &[pod("a", "n1", &["10.0.0.1"]), pod("b", "n1", &["10.0.0.2"])],
            &[slice("s", "IPv4", &[("10.0.0.1", Some("a"), Some(true))])],
        );
        let key = |id: &str| TargetKey { id: id.to_owned(), port: 8080 };
        let of = |index: &Index, id: &str, pod: Option<(&str, &str)>, kind: &str| {
            let wanted = desired(index, &binding(json!({})), &group(kind, "ipv4", "HTTP"), &switches(false));
            why_unwanted(index, &binding(json!({})), &wanted, &key(id), pod)
        };
        let why = |index: &Index, id: &str, pod: Option<(&str, &str)>| of(index, id, pod, "ip");
        assert_eq!(why(&index, "10.0.0.9", None), "no pod of the namespace has this address");
        assert_eq!(why(&index, "10.0.0.9", Some(("z", "uid-z"))), "pod z is gone");
        assert_eq!(why(&index, "10.0.0.2", Some(("b", "uid-old"))), "pod b is gone");
        assert_eq!(why(&index, "10.0.0.9", Some(("b", "uid-b"))), "pod b has another address");
        let elsewhere = "pod b is no endpoint of Service shop/web at this port";
        assert_eq!(why(&index, "10.0.0.2", None), elsewhere);
        let mut b = pod("b", "n1", &["10.0.0.2"]);
        b["metadata"]["labels"] = json!({"app": "other"});
        index.put_pod(&read(b.clone()));
        assert_eq!(why(&index, "10.0.0.2", None), "Service shop/web does not select pod b");
        b["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        index.put_pod(&read(b));
        assert_eq!(why(&index, "10.0.0.2", None), "pod b is terminating or has finished");
        let mut a = pod("a", "n3", &["10.0.0.1"]);
        a["status"]["conditions"] = json!([]);
        index.put_pod(&read(a));
        index.put_slice(&read(slice("s", "IPv4", &[("10.0.0.1", Some("a"), Some(false))])));
        assert_eq!(why(&index, "10.0.0.1", Some(("a", "uid-a"))), "pod a is not ready");
        index.remove_node(&Key::new("", "n3"));
        assert_eq!(why(&index, "10.0.0.1", Some(("a", "uid-a"))), "node n3 of pod a is gone");
        index.put_service(&node_port_service());
        index.put_node(&read(node("n3", "False", "aws:///us-west-2a/i-n3", json!({}))));
        let node = |id: &str| of(&index, id, None, "instance");
        assert_eq!(node("i-gone"), "no node is this instance");
        assert_eq!(node("i-n1"), "node n1 is wanted at another port");
    }

    #[test]
    fn what_is_missing_says_so_in_words() {
        let reason = |index: &Index, spec: Value, target_type: &str| {
            let group = group(target_type, "ipv4", "HTTP");
            let found = desired(index, &binding(spec), &group, &switches(false));
            found.missing.map(|missing| (missing.reason, missing.is_gone))
        };
        let mut index = cluster();
        assert_eq!(reason(&index, json!({}), "ip"), None);
        let wrong = json!({"serviceRef": {"name": "web", "port": 81}});
        assert_eq!(reason(&index, wrong, "ip"), Some((Reason::PortNotFound, true)));
        let other = json!({"serviceRef": {"name": "other", "port": 80}});
        assert_eq!(reason(&index, other, "ip"), Some((Reason::ServiceNotFound, true)));
        assert_eq!(reason(&index, json!({}), "instance"), Some((Reason::UnsupportedServiceType, false)));
        index.put_service(&read(service(json!({"type": "LoadBalancer"}))));
        assert_eq!(reason(&index, json!({}), "instance"), Some((Reason::NodePortMissing, false)));
        index.put_service(&read(service(json!({"type": "ExternalName"}))));
        assert_eq!(reason(&index, json!({}), "ip"), Some((Reason::UnsupportedServiceType, true)));
        index.put_service(&read(service(json!({"ports": [{"port": 80, "protocol": "UDP"}]}))));
        assert_eq!(reason(&index, json!({}), "ip"), Some((Reason::PortNotFound, false)));
    }

    #[test]
    fn a_young_service_without_slices_counts_as_missing_while_pods_match_it() {
        let created = 1_767_225_600; // 2026-01-01T00:00:00Z
        let left = |index: &Index, age: i64| {
            not_there_yet(index, &binding(json!({})), Duration::from_secs(30), created + age)
        };
        let mut index = cluster();
        assert_eq!(left(&index, 1), None);
        index.put_pod(&read(pod("a", "n1", &["10.0.0.1"])));
        assert_eq!(left(&index, 1), Some(Duration::from_secs(29)));
        assert_eq!(left(&index, 30), None);
        index.put_slice(&read(slice("s", "IPv4", &[])));
        assert_eq!(left(&index, 1), None);
    }

    #[test]
    fn an_address_that_another_pod_has_now_is_not_alive() {
        let key = TargetKey { id: "10.0.0.1".to_owned(), port: 8080 };
        let endpoint = [("10.0.0.1", Some("a"), Some(true))];
        let mut index = with_pods(&[pod("a", "n1", &["10.0.0.1"])], &[slice("s", "IPv4", &endpoint)]);
        let alive = |index: &Index, uid| is_alive(index, &binding(json!({})), &key, uid);
        assert!(alive(&index, Some("uid-a")) && alive(&index, None) && !alive(&index, Some("uid-b")));
        index.remove_node(&Key::new("", "n1"));
        assert!(!alive(&index, Some("uid-a")));
        index.put_node(&read(node("n1", "True", "aws:///a/i-n1", json!({}))));
        let mut other = pod("x", "n1", &["10.0.0.1"]);
        other["metadata"]["labels"] = json!({"app": "other"});
        index.put_pod(&read(other));
        index.remove_pod(&Key::new("shop", "a"));
        assert!(!alive(&index, None));
    }
}
