//! Which rules the security groups of targets need, and which groups these are. Pure.
//!
//! A binding's wish is a [`Claim`]; [`crate::group`] brings one group to what all claims together want.

use crate::events::first_few;
use crate::kept::PodPort;
use crate::reason::Reason;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tgb_api::names;
use tgb_api::v1::{NetworkingPort, Spec, Transport};
use tgb_aws::values::{Permission, RuleProtocol, Source};

const LAST_PORT: u16 = u16::MAX;

/// The wishes of a binding about security groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The rules to have, by security group.
    pub(crate) rules: BTreeMap<String, BTreeSet<Permission>>,
    /// The rules that stay wherever they are: the binding was not looked at yet, not all targets were found, or some that are
    /// not wanted any more still serve.
    pub(crate) keep: BTreeSet<Permission>,
    /// Set where the binding was deleted with `on-delete: retain`: nothing is added any more, and the rules of ours that it
    /// uses get this description.
    pub(crate) retained_as: Option<String>,
}

impl Claim {
    /// A claim that adds nothing.
    pub(crate) fn keeping(keep: BTreeSet<Permission>) -> Self {
        Self { keep, ..Self::default() }
    }

    /// The rules to have in a security group.
    pub(crate) fn wanted(&self, group: &str) -> impl Iterator<Item = &Permission> {
        self.rules.get(group).filter(|_| self.retained_as.is_none()).into_iter().flatten()
    }

    /// The rules that the binding may use in a security group.
    pub(crate) fn used(&self, group: &str) -> impl Iterator<Item = &Permission> {
        self.rules.get(group).into_iter().flatten().chain(&self.keep)
    }

    /// The part of the claim that concerns a security group, if there is one.
    pub(crate) fn within(&self, group: &str) -> Option<Self> {
        let here = self.rules.get_key_value(group);
        (here.is_some() || !self.keep.is_empty()).then(|| Self {
            rules: here.map(|(id, rules)| (id.clone(), rules.clone())).into_iter().collect(),
            keep: self.keep.clone(),
            retained_as: self.retained_as.clone(),
        })
    }
}

/// The longest description that EC2 takes.
const LONGEST_DESCRIPTION: usize = 255;

/// The description of our rules.
pub(crate) fn marker(cluster: &str, owner: Option<&str>) -> String {
    let owner = owner.map(|owner| format!(" owner:{owner}")).unwrap_or_default();
    format!("{} cluster:{cluster}{owner}", names::RULE_DESCRIPTION)
}

/// The description of rules that stay when their binding is deleted with `on-delete: retain`. It differs from [`marker`], so
/// that they count as somebody else's from then on.
pub(crate) fn retained_marker(marker: &str, binding: &str) -> String {
    let text = format!("{marker} retained:{binding}");
    text.chars().take(LONGEST_DESCRIPTION).collect()
}

/// Tells a description that [`retained_marker`] made.
pub(crate) fn is_retained(description: &str) -> bool {
    description.starts_with(names::RULE_DESCRIPTION) && description.contains(" retained:")
}

/// The named ports of a pod.
pub(crate) type Ports = Arc<[PodPort]>;

/// The rules that a binding asks for at targets, whose pods resolve named ports.
pub(crate) fn permissions<'a>(
    spec: &Spec,
    pods: impl Iterator<Item = &'a Ports> + Clone,
) -> BTreeSet<Permission> {
    let ports_of = |port: &NetworkingPort| match port.port.as_ref() {
        None => vec![(0, LAST_PORT)],
        Some(IntOrString::Int(number)) => single(*number),
        Some(IntOrString::String(name)) => pods
            .clone()
            .filter_map(|ports| resolved(ports, name, transport(port)))
            .map(|number| (number, number))
            .collect(),
    };
    rules(spec, ports_of)
}

/// The rules that a binding may have somewhere: as [`permissions`], where a named port may be any.
pub(crate) fn anywhere(spec: &Spec) -> BTreeSet<Permission> {
    let ports_of = |port: &NetworkingPort| match port.port.as_ref() {
        Some(IntOrString::Int(number)) => single(*number),
        _ => vec![(0, LAST_PORT)],
    };
    rules(spec, ports_of)
}

/// The rules that a binding which cannot be read may have somewhere: all ports for every source that its `spec.networking`
/// names in any way.
pub(crate) fn anywhere_of_unreadable(networking: &serde_json::Value) -> BTreeSet<Permission> {
    use serde_json::Value;
    let (mut found, mut left) = (BTreeSet::new(), vec![networking]);
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                let cidr = fields.get("cidr").and_then(Value::as_str).and_then(block);
                let group = fields.get("groupID").and_then(Value::as_str);
                let sources = cidr.into_iter().chain(group.map(|id| Source::SecurityGroup(id.to_owned())));
                for source in sources {
                    for protocol in [RuleProtocol::Tcp, RuleProtocol::Udp] {
                        found.insert(Permission {
                            protocol,
                            from_port: 0,
                            to_port: LAST_PORT,
                            source: source.clone(),
                        });
                    }
                }
                left.extend(fields.values());
            }
            Value::Array(items) => left.extend(items),
            _ => {}
        }
    }
    found
}

/// A sentence about the named ports of a binding that none of these pods has, if there are any, with the names that there
/// are.
pub(crate) fn unresolved<'a>(spec: &Spec, pods: impl Iterator<Item = &'a Ports> + Clone) -> Option<String> {
    let rules = spec.networking.iter().flat_map(|networking| networking.ingress());
    let mut missing = BTreeSet::new();
    for port in rules.flat_map(|rule| rule.ports()) {
        let Some(IntOrString::String(name)) = &port.port else { continue };
        if pods.clone().all(|ports| resolved(ports, name, transport(port)).is_none()) {
            missing.insert(format!("{name:?} ({})", transport(port)));
        }
    }
    if missing.is_empty() {
        return None;
    }
    let there: BTreeSet<String> = pods
        .flat_map(|ports| ports.iter())
        .map(|port| format!("{:?} ({})", port.name, port.protocol))
        .collect();
    let there = match there.is_empty() {
        true => "they name none".to_owned(),
        false => format!("there are {}", first_few(&there.into_iter().collect::<Vec<_>>())),
    };
    let missing = first_few(&missing.into_iter().collect::<Vec<_>>());
    Some(format!("no container of the targets has a port named {missing}; {there}"))
}

// ---- details ----

fn transport(port: &NetworkingPort) -> Transport {
    port.protocol.unwrap_or(Transport::Tcp)
}

/// The number of a named port: that of the first container that has it.
pub(crate) fn resolved(ports: &[PodPort], name: &str, protocol: Transport) -> Option<u16> {
    ports.iter().find(|port| *port.name == *name && port.protocol == protocol).map(|port| port.number)
}

fn single(number: i32) -> Vec<(u16, u16)> {
    u16::try_from(number).map(|number| (number, number)).into_iter().collect()
}

fn block(cidr: &str) -> Option<Source> {
    cidr.parse::<ipnet::IpNet>().ok().map(|network| Source::Cidr(network.trunc().to_string()))
}

fn rules(spec: &Spec, ports_of: impl Fn(&NetworkingPort) -> Vec<(u16, u16)>) -> BTreeSet<Permission> {
    let mut found = BTreeSet::new();
    for rule in spec.networking.iter().flat_map(|networking| networking.ingress()) {
        let mut ranges = Vec::new();
        for port in rule.ports() {
            let protocol = match transport(port) {
                Transport::Udp => RuleProtocol::Udp,
                Transport::Tcp => RuleProtocol::Tcp,
            };
            ranges.extend(ports_of(port).into_iter().map(|(from, to)| (protocol, from, to)));
        }
        if rule.ports().is_empty() {
            ranges.push((RuleProtocol::Tcp, 0, LAST_PORT));
        }
        for peer in rule.from() {
            let source = match (&peer.security_group, &peer.ip_block) {
                (Some(group), _) => Some(Source::SecurityGroup(group.group_id.clone())),
                (None, Some(network)) => block(&network.cidr),
                (None, None) => None,
            };
            let Some(source) = source else { continue };
            found.extend(ranges.iter().map(|&(protocol, from_port, to_port)| Permission {
                protocol,
                from_port,
                to_port,
                source: source.clone(),
            }));
        }
    }
    found
}

/// The one of an interface's security groups that gets the rules: the only one, or the only one with the tags.
///
/// # Errors
/// Reason and sentence for `NetworkingReady=False`.
pub(crate) fn group_of(
    interface: &str,
    groups: &[String],
    known: &BTreeMap<String, Arc<BTreeMap<String, String>>>,
    tags: &[(String, Option<String>)],
) -> Result<String, (Reason, String)> {
    if let [only] = groups {
        return Ok(only.clone());
    }
    let looked_for = || {
        let one = |(key, value): &(String, Option<String>)| match value {
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        };
        tags.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let has_all = |of_group: &BTreeMap<String, String>| {
        tags.iter().all(|(key, wanted)| {
            of_group.get(key).is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
        })
    };
    let tagged: Vec<&String> =
        groups.iter().filter(|id| known.get(*id).is_some_and(|of_group| has_all(of_group))).collect();
    let all = groups.join(", ");
    match tagged.as_slice() {
        [only] => Ok((*only).clone()),
        [] => {
            let message =
                format!("none of the security groups of {} ({all}) has the tag {}", interface, looked_for());
            Err((Reason::SecurityGroupNotFound, message))
        }
        _ => {
            let message = format!(
                "several of the security groups of {} ({all}) have the tag {}",
                interface,
                looked_for()
            );
            Err((Reason::SecurityGroupAmbiguous, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kept::{Pod, Pools};
    use serde_json::json;

    fn tcp(from_port: u16, to_port: u16, source: &str) -> Permission {
        let source = match source.starts_with("sg-") {
            true => Source::SecurityGroup(source.to_owned()),
            false => Source::Cidr(source.to_owned()),
        };
        Permission { protocol: RuleProtocol::Tcp, from_port, to_port, source }
    }

    fn spec(networking: serde_json::Value) -> Spec {
        serde_json::from_value(json!({"networking": networking})).unwrap()
    }

    /// The named ports of a pod with these containers and init containers.
    fn pod(containers: serde_json::Value, init: serde_json::Value) -> Ports {
        let pod = json!({"spec": {"containers": containers, "initContainers": init}});
        Pod::read(&serde_json::from_value(pod).unwrap(), &mut Pools::default()).ports
    }

    fn at(port: &str, protocol: &str) -> Spec {
        spec(json!({"ingress": [{
            "from": [{"securityGroup": {"groupID": "sg-a"}}],
            "ports": [{"port": port, "protocol": protocol}],
        }]}))
    }

    #[test]
    fn our_description_keeps_the_words_and_is_no_text_of_lbc() {
        assert_eq!(marker("prod", None), "elbv2.k8s.aws/targetGroupBinding=shared cluster:prod");
        assert_eq!(marker("prod", Some("a")), "elbv2.k8s.aws/targetGroupBinding=shared cluster:prod owner:a");
        let retained = retained_marker(&marker("prod", None), "shop/web");
        assert_eq!(retained, "elbv2.k8s.aws/targetGroupBinding=shared cluster:prod retained:shop/web");
        let long =
            retained_marker(&marker(&"c".repeat(100), Some("owner")), &format!("shop/{}", "n".repeat(253)));
        assert_eq!(long.len(), LONGEST_DESCRIPTION);
        assert!(is_retained(&retained) && is_retained(&long) && !is_retained(&marker("prod", Some("a"))));
    }

    #[test]
    fn without_ports_all_tcp_ports_are_opened_and_host_bits_are_cut() {
        let spec = spec(json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.7/8"}}]}]}));
        assert_eq!(permissions(&spec, [].iter()), BTreeSet::from([tcp(0, 65535, "10.0.0.0/8")]));
    }

    #[test]
    fn a_named_port_is_that_of_the_first_container_with_its_name_and_protocol() {
        let port = |name: &str, number: u16, protocol: &str| json!({"name": name, "containerPort": number, "protocol": protocol});
        let containers = json!([
            {"ports": [port("dns", 53, "UDP"), port("dns", 5353, "TCP")]},
            {"ports": [{"name": "http", "containerPort": 8080}]},
            {"ports": [port("http", 9100, "TCP"), port("dns", 54, "UDP")]},
        ]);
        let init = json!([
            {"ports": [port("setup", 1000, "TCP")]},
            {"restartPolicy": "Always", "ports": [port("http", 15001, "TCP"), port("admin", 15000, "TCP")]},
        ]);
        let pods = [pod(containers, init)];
        let opened = |name: &str, protocol: &str| -> Vec<u16> {
            permissions(&at(name, protocol), pods.iter()).iter().map(|rule| rule.from_port).collect()
        };
        assert_eq!(opened("http", "TCP"), [8080]);
        assert_eq!((opened("dns", "UDP"), opened("dns", "TCP")), (vec![53], vec![5353]));
        assert_eq!(opened("admin", "TCP"), [15000], "a native sidecar runs beside the containers");
        for (name, protocol) in [("setup", "TCP"), ("http", "UDP"), ("web", "TCP")] {
            assert!(opened(name, protocol).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_port_name_that_no_pod_has_is_told_with_those_that_there_are() {
        let containers = json!([{"ports": [
            {"name": "http", "containerPort": 8080},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        ]}]);
        let pods = [pod(json!([{}]), json!(null)), pod(containers, json!(null))];
        let said = |spec: &Spec| unresolved(spec, pods.iter());
        assert_eq!(said(&at("http", "TCP")), None, "one pod that has it is enough");
        let expected = "no container of the targets has a port named \"htpp\" (TCP); there are \"dns\" (UDP), \"http\" (TCP)";
        assert_eq!(said(&at("htpp", "TCP")).as_deref(), Some(expected));
        assert!(said(&at("dns", "TCP")).is_some_and(|said| said.contains("\"dns\" (TCP)")));
        assert!(said(&at("8080", "TCP")).is_some(), "a number in quotes is a name");
        let none = unresolved(&at("http", "TCP"), [].iter());
        assert!(none.is_some_and(|said| said.ends_with("they name none")));
    }

    #[test]
    fn what_an_unreadable_binding_may_have_is_bounded_by_the_sources_that_it_names() {
        let networking = json!({"ingress": [
            {"from": [{"securityGroup": {"groupID": "sg-a"}}, {"ipBlock": {"cidr": "10.0.0.7/8"}}], "ports": [{"port": {}}]},
            {"from": {"new": [{"ipBlock": {"cidr": "fd00::1/8", "but": [{"cidr": "nonsense"}]}}]}},
        ]});
        let found = anywhere_of_unreadable(&networking);
        let all = |source: &str| {
            let tcp = tcp(0, 65535, source);
            [Permission { protocol: RuleProtocol::Udp, ..tcp.clone() }, tcp]
        };
        let expected: BTreeSet<Permission> =
            ["sg-a", "10.0.0.0/8", "fd00::/8"].iter().flat_map(|source| all(source)).collect();
        assert_eq!(found, expected);
        assert!(anywhere_of_unreadable(&json!(null)).is_empty());
    }

    #[test]
    fn of_several_groups_the_tagged_one_is_taken() {
        let tag = "kubernetes.io/cluster/c".to_owned();
        let chosen = |groups: &[(&str, bool)]| {
            let tags = |tagged: bool| tagged.then(|| (tag.clone(), "owned".to_owned())).into_iter().collect();
            let known =
                groups.iter().map(|(id, tagged)| ((*id).to_owned(), Arc::new(tags(*tagged)))).collect();
            let groups: Vec<String> = groups.iter().map(|(id, _)| (*id).to_owned()).collect();
            group_of("eni-1", &groups, &known, &[(tag.clone(), None)]).map_err(|(reason, _)| reason)
        };
        assert_eq!(chosen(&[("sg-1", false)]), Ok("sg-1".to_owned()));
        assert_eq!(chosen(&[("sg-1", false), ("sg-2", true)]), Ok("sg-2".to_owned()));
        assert_eq!(chosen(&[("sg-1", false), ("sg-2", false)]), Err(Reason::SecurityGroupNotFound));
        assert_eq!(chosen(&[("sg-1", true), ("sg-2", true)]), Err(Reason::SecurityGroupAmbiguous));
        assert_eq!(chosen(&[]), Err(Reason::SecurityGroupNotFound));
    }
}
