//! Which rules the security groups of targets need. Pure; [`crate::security`] applies it.
//!
//! A binding's wish is a [`Claim`]. The rules of a group are the union of all claims, and nothing is revoked that any
//! claim may need.

use crate::index::Pod;
use crate::reason::Reason;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::{BTreeMap, BTreeSet};
use tgb_api::names;
use tgb_api::v1::{NetworkingPort, TargetGroupBinding, Transport};
use tgb_aws::values::{
    NetworkInterface, Permission, RuleProtocol, SecurityGroup, SecurityGroupRules, Source,
};

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
}

/// What is to be changed in one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct GroupPlan {
    pub(crate) authorize: Vec<Permission>,
    /// Ids of rules of ours that nobody wants.
    pub(crate) revoke: Vec<(String, Permission)>,
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
            pods.iter().filter_map(|pod| pod.ports.get(name)).map(|number| (*number, *number)).collect()
        }
    };
    rules(binding, ports_of)
}

/// The rules that a binding may have somewhere: as [`permissions`], where a named port may be any.
pub(crate) fn anywhere(binding: &TargetGroupBinding) -> Claim {
    let ports_of = |port: &NetworkingPort| match port.port.as_ref() {
        Some(IntOrString::Int(number)) => {
            u16::try_from(*number).map(|number| (number, number)).into_iter().collect()
        }
        _ => vec![(0, LAST_PORT)],
    };
    Claim::Anywhere(rules(binding, ports_of))
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

/// The fewest ranges that open exactly what is asked for.
pub(crate) fn union<'a>(asked: impl IntoIterator<Item = &'a Permission>) -> BTreeSet<Permission> {
    let mut by_source: BTreeMap<(RuleProtocol, &Source), Vec<(u16, u16)>> = BTreeMap::new();
    for permission in asked {
        let ranges = by_source.entry((permission.protocol, &permission.source)).or_default();
        ranges.push((permission.from_port, permission.to_port));
    }
    let mut found = BTreeSet::new();
    for ((protocol, source), mut ranges) in by_source {
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (from, to) in ranges {
            match merged.last_mut() {
                Some((_, end)) if u32::from(from) <= u32::from(*end) + 1 => *end = (*end).max(to),
                _ => merged.push((from, to)),
            }
        }
        found.extend(merged.into_iter().map(|(from_port, to_port)| Permission {
            protocol,
            from_port,
            to_port,
            source: source.clone(),
        }));
    }
    found
}

/// Whether everything that `asked` opens is open by one of `there`.
pub(crate) fn covers<'a>(there: impl IntoIterator<Item = &'a Permission>, asked: &Permission) -> bool {
    there.into_iter().any(|rule| {
        rule.protocol == asked.protocol
            && rule.source == asked.source
            && rule.from_port <= asked.from_port
            && rule.to_port >= asked.to_port
    })
}

/// What to change in group `id`, whose rules are `there`. `is_ours` knows our descriptions.
pub(crate) fn group_plan<'a>(
    id: &str,
    claims: impl IntoIterator<Item = &'a Claim>,
    there: &SecurityGroupRules,
    is_ours: impl Fn(&str) -> bool,
) -> GroupPlan {
    let mut asked = BTreeSet::new();
    let mut anywhere = BTreeSet::new();
    let mut all_known = true;
    for claim in claims {
        match claim {
            Claim::Unknown => all_known = false,
            Claim::Anywhere(permissions) => anywhere.extend(permissions),
            Claim::Groups(groups) => asked.extend(groups.get(id).into_iter().flatten()),
        }
    }
    let wanted = union(asked);
    let present: BTreeSet<&Permission> = there.rules.iter().map(|rule| &rule.permission).collect();
    let overlaps = |rule: &Permission| {
        anywhere.iter().any(|kept| {
            kept.protocol == rule.protocol
                && kept.source == rule.source
                && kept.from_port <= rule.to_port
                && rule.from_port <= kept.to_port
        })
    };
    let stale = there
        .rules
        .iter()
        .filter(|rule| all_known && is_ours(&rule.description))
        .filter(|rule| !wanted.contains(&rule.permission) && !overlaps(&rule.permission))
        .map(|rule| (rule.id.clone(), rule.permission.clone()));
    GroupPlan {
        revoke: stale.collect(),
        authorize: wanted.into_iter().filter(|permission| !present.contains(permission)).collect(),
    }
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
    use serde_json::json;
    use tgb_aws::values::Rule;

    fn tcp(from_port: u16, to_port: u16, source: &str) -> Permission {
        let source = match source.starts_with("sg-") {
            true => Source::SecurityGroup(source.to_owned()),
            false => Source::Cidr(source.to_owned()),
        };
        Permission { protocol: RuleProtocol::Tcp, from_port, to_port, source }
    }

    fn there(rules: &[(&str, Permission, &str)]) -> SecurityGroupRules {
        let rule = |(id, permission, description): &(&str, Permission, &str)| Rule {
            id: (*id).to_owned(),
            permission: permission.clone(),
            description: (*description).to_owned(),
        };
        SecurityGroupRules { rules: rules.iter().map(rule).collect(), others: 0 }
    }

    fn claim(permissions: &[Permission]) -> Claim {
        Claim::Groups(BTreeMap::from([("sg-n".to_owned(), permissions.iter().cloned().collect())]))
    }

    fn planned(claims: &[Claim], rules: &SecurityGroupRules) -> (Vec<Permission>, Vec<String>) {
        let ours = marker("c", None);
        let plan = group_plan("sg-n", claims, rules, |description| description == ours);
        (plan.authorize, plan.revoke.into_iter().map(|(id, _)| id).collect())
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
    fn ports_of_several_bindings_are_joined_only_where_no_port_lies_between() {
        let asked = [tcp(80, 80, "sg-a"), tcp(81, 90, "sg-a"), tcp(92, 92, "sg-a"), tcp(80, 80, "sg-b")];
        let expected = BTreeSet::from([tcp(80, 90, "sg-a"), tcp(92, 92, "sg-a"), tcp(80, 80, "sg-b")]);
        assert_eq!(union(&asked), expected);
        let whole = [tcp(0, 65535, "sg-a"), tcp(65535, 65535, "sg-a")];
        assert_eq!(union(&whole), BTreeSet::from([tcp(0, 65535, "sg-a")]));
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
        let pod = Pod { ports: BTreeMap::from([("http".to_owned(), 8080)]).into(), ..Default::default() };
        assert_eq!(permissions(&named, &[&pod]), BTreeSet::from([tcp(8080, 8080, "sg-a")]));
        assert!(permissions(&named, &[&Pod::default()]).is_empty());
    }

    #[test]
    fn what_is_missing_is_authorized_and_what_is_stale_is_revoked() {
        let ours = marker("c", None);
        let rules = there(&[("sgr-1", tcp(80, 80, "sg-a"), &ours), ("sgr-2", tcp(90, 90, "sg-a"), &ours)]);
        let claims = [claim(&[tcp(80, 80, "sg-a"), tcp(85, 85, "sg-a")])];
        assert_eq!(planned(&claims, &rules), (vec![tcp(85, 85, "sg-a")], vec!["sgr-2".to_owned()]));
    }

    #[test]
    fn rules_of_others_count_as_present_and_are_never_revoked() {
        let rules =
            there(&[("sgr-1", tcp(80, 80, "sg-a"), "by hand"), ("sgr-2", tcp(90, 90, "sg-a"), "by hand")]);
        assert_eq!(planned(&[claim(&[tcp(80, 80, "sg-a")])], &rules), (vec![], vec![]));
        let other_cluster = there(&[("sgr-1", tcp(80, 80, "sg-a"), &marker("other", None))]);
        assert_eq!(planned(&[], &other_cluster), (vec![], vec![]));
    }

    #[test]
    fn nothing_is_revoked_while_a_binding_is_not_known() {
        let ours = marker("c", None);
        let rules = there(&[("sgr-1", tcp(90, 90, "sg-a"), &ours)]);
        assert_eq!(planned(&[claim(&[]), Claim::Unknown], &rules), (vec![], vec![]));
    }

    #[test]
    fn a_binding_without_endpoints_keeps_the_rules_that_it_had() {
        let ours = marker("c", None);
        let rules = there(&[("sgr-1", tcp(80, 90, "sg-a"), &ours), ("sgr-2", tcp(95, 95, "sg-a"), &ours)]);
        let claims = [Claim::Anywhere(BTreeSet::from([tcp(85, 85, "sg-a")]))];
        assert_eq!(planned(&claims, &rules), (vec![], vec!["sgr-2".to_owned()]));
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
