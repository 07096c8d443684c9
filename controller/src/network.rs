//! Which rules the security groups of targets need, and which groups these are. Pure.
//!
//! A binding's wish is a [`Claim`]; [`crate::group`] brings one group to what all claims together want.

use crate::kept::Pod;
use crate::reason::Reason;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::{BTreeMap, BTreeSet};
use tgb_api::names;
use tgb_api::v1::{NetworkingPort, TargetGroupBinding, Transport};
use tgb_aws::values::{NetworkInterface, Permission, RuleProtocol, SecurityGroup, Source};

const LAST_PORT: u16 = u16::MAX;

/// What a binding wants of security groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Not known yet, for want of data: it may need any rule of any group.
    Unknown,
    /// These rules, wherever they are already; nothing new.
    Anywhere(BTreeSet<Permission>),
    /// These rules in these groups.
    Groups(BTreeMap<String, BTreeSet<Permission>>),
    /// These rules in these groups, and others wherever they are already: not all groups could be found, or targets
    /// are still going that are no longer wanted.
    Partly(BTreeMap<String, BTreeSet<Permission>>, BTreeSet<Permission>),
}

impl Claim {
    /// What is wanted, by group.
    pub(crate) fn groups(&self) -> Option<&BTreeMap<String, BTreeSet<Permission>>> {
        match self {
            Self::Groups(groups) | Self::Partly(groups, _) => Some(groups),
            Self::Unknown | Self::Anywhere(_) => None,
        }
    }

    /// What stays wherever it is.
    pub(crate) fn anywhere(&self) -> Option<&BTreeSet<Permission>> {
        match self {
            Self::Anywhere(permissions) | Self::Partly(_, permissions) => Some(permissions),
            Self::Unknown | Self::Groups(_) => None,
        }
    }

    /// The same, with these rules kept wherever they are.
    pub(crate) fn keeping(self, kept: BTreeSet<Permission>) -> Self {
        match self {
            Self::Unknown => Self::Unknown,
            Self::Anywhere(mut permissions) => {
                permissions.extend(kept);
                Self::Anywhere(permissions)
            }
            Self::Groups(groups) => Self::Partly(groups, kept),
            Self::Partly(groups, mut permissions) => {
                permissions.extend(kept);
                Self::Partly(groups, permissions)
            }
        }
    }
}

/// The description of our rules.
pub(crate) fn marker(cluster: &str, owner: Option<&str>) -> String {
    let owner = owner.map(|owner| format!(" owner:{owner}")).unwrap_or_default();
    format!("{} cluster:{cluster}{owner}", names::RULE_DESCRIPTION)
}

/// The rules that a binding asks for at targets, whose pods resolve named ports.
pub(crate) fn permissions(binding: &TargetGroupBinding, pods: &[&Pod]) -> BTreeSet<Permission> {
    let ports_of = |port: &NetworkingPort| match port.port.as_ref() {
        None => vec![(0, LAST_PORT)],
        Some(IntOrString::Int(number)) => {
            u16::try_from(*number).map(|number| (number, number)).into_iter().collect()
        }
        Some(IntOrString::String(name)) => {
            pods.iter().filter_map(|pod| pod.port(name)).map(|number| (number, number)).collect()
        }
    };
    rules(binding, ports_of)
}

/// The rules that a binding may have somewhere: as [`permissions`], where a named port may be any.
pub(crate) fn anywhere(binding: &TargetGroupBinding) -> BTreeSet<Permission> {
    let ports_of = |port: &NetworkingPort| match port.port.as_ref() {
        Some(IntOrString::Int(number)) => {
            u16::try_from(*number).map(|number| (number, number)).into_iter().collect()
        }
        _ => vec![(0, LAST_PORT)],
    };
    rules(binding, ports_of)
}

fn rules(
    binding: &TargetGroupBinding,
    ports_of: impl Fn(&NetworkingPort) -> Vec<(u16, u16)>,
) -> BTreeSet<Permission> {
    let mut found = BTreeSet::new();
    for rule in binding.spec.networking.iter().flat_map(|networking| networking.ingress()) {
        let mut ranges = Vec::new();
        for port in rule.ports() {
            let protocol = match port.protocol {
                Some(Transport::Udp) => RuleProtocol::Udp,
                _ => RuleProtocol::Tcp,
            };
            ranges.extend(ports_of(port).into_iter().map(|(from, to)| (protocol, from, to)));
        }
        if rule.ports().is_empty() {
            ranges.push((RuleProtocol::Tcp, 0, LAST_PORT));
        }
        for peer in rule.from() {
            let source = match (&peer.security_group, &peer.ip_block) {
                (Some(group), _) => Source::SecurityGroup(group.group_id.clone()),
                (None, Some(block)) => match block.cidr.parse::<ipnet::IpNet>() {
                    Ok(network) => Source::Cidr(network.trunc().to_string()),
                    Err(_) => continue,
                },
                (None, None) => continue,
            };
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

/// The group of an interface that gets the rules: its only one, or the only one with one of the tags.
///
/// # Errors
/// Reason and sentence for `NetworkingReady=False`.
pub(crate) fn group_of(
    interface: &NetworkInterface,
    groups: &BTreeMap<String, SecurityGroup>,
    tags: &[(String, Option<String>)],
) -> Result<String, (Reason, String)> {
    if let [only] = interface.security_groups.as_slice() {
        return Ok(only.clone());
    }
    let looked_for = || {
        let one = |(key, value): &(String, Option<String>)| match value {
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        };
        tags.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let tagged: Vec<&String> = interface
        .security_groups
        .iter()
        .filter(|id| {
            groups.get(*id).is_some_and(|group| {
                tags.iter().all(|(key, wanted)| {
                    group
                        .tags
                        .get(key)
                        .is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
                })
            })
        })
        .collect();
    let all = interface.security_groups.join(", ");
    match tagged.as_slice() {
        [only] => Ok((*only).clone()),
        [] => {
            let message = format!(
                "none of the security groups of {} ({all}) has the tag {}",
                interface.id,
                looked_for()
            );
            Err((Reason::SecurityGroupNotFound, message))
        }
        _ => {
            let message = format!(
                "several of the security groups of {} ({all}) have the tag {}",
                interface.id,
                looked_for()
            );
            Err((Reason::SecurityGroupAmbiguous, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kept::Pools;
    use serde_json::json;

    fn tcp(from_port: u16, to_port: u16, source: &str) -> Permission {
        let source = match source.starts_with("sg-") {
            true => Source::SecurityGroup(source.to_owned()),
            false => Source::Cidr(source.to_owned()),
        };
        Permission { protocol: RuleProtocol::Tcp, from_port, to_port, source }
    }

    fn binding(networking: serde_json::Value) -> TargetGroupBinding {
        serde_json::from_value(json!({"spec": {"networking": networking}})).unwrap()
    }

    #[test]
    fn our_description_keeps_the_words_and_is_no_text_of_lbc() {
        assert_eq!(marker("prod", None), "elbv2.k8s.aws/targetGroupBinding=shared cluster:prod");
        assert_eq!(marker("prod", Some("a")), "elbv2.k8s.aws/targetGroupBinding=shared cluster:prod owner:a");
    }

    #[test]
    fn without_ports_all_tcp_ports_are_opened_and_host_bits_are_cut() {
        let all =
            permissions(&binding(json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.7/8"}}]}]})), &[]);
        assert_eq!(all, BTreeSet::from([tcp(0, 65535, "10.0.0.0/8")]));
    }

    #[test]
    fn a_named_port_is_the_pods_own() {
        let named = binding(json!({"ingress": [{
            "from": [{"securityGroup": {"groupID": "sg-a"}}],
            "ports": [{"port": "http"}],
        }]}));
        let pod = json!({"spec": {"containers": [{"name": "web", "ports": [{"name": "http", "containerPort": 8080}]}]}});
        let pod = Pod::read(&serde_json::from_value(pod).unwrap(), &mut Pools::default());
        assert_eq!(permissions(&named, &[&pod]), BTreeSet::from([tcp(8080, 8080, "sg-a")]));
        assert!(permissions(&named, &[&Pod::default()]).is_empty());
    }

    #[test]
    fn of_several_groups_the_tagged_one_is_taken() {
        let tag = "kubernetes.io/cluster/c".to_owned();
        let group = |id: &str, tagged: bool| {
            let tags =
                if tagged { BTreeMap::from([(tag.clone(), "owned".to_owned())]) } else { BTreeMap::new() };
            (id.to_owned(), SecurityGroup { id: id.to_owned(), tags })
        };
        let chosen = |groups: &[(&str, bool)]| {
            let known = groups.iter().map(|(id, tagged)| group(id, *tagged)).collect();
            let interface = NetworkInterface {
                id: "eni-1".to_owned(),
                security_groups: groups.iter().map(|(id, _)| (*id).to_owned()).collect(),
                ..Default::default()
            };
            group_of(&interface, &known, &[(tag.clone(), None)]).map_err(|(reason, _)| reason)
        };
        assert_eq!(chosen(&[("sg-1", false)]), Ok("sg-1".to_owned()));
        assert_eq!(chosen(&[("sg-1", false), ("sg-2", true)]), Ok("sg-2".to_owned()));
        assert_eq!(chosen(&[("sg-1", false), ("sg-2", false)]), Err(Reason::SecurityGroupNotFound));
        assert_eq!(chosen(&[("sg-1", true), ("sg-2", true)]), Err(Reason::SecurityGroupAmbiguous));
        assert_eq!(chosen(&[]), Err(Reason::SecurityGroupNotFound));
    }
}
