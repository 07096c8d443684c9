//! Finds the network interfaces of targets, and with them the security groups that need the rules.

use crate::claims::Interfaces;
use crate::context::Ctx;
use crate::desired::{Origin, TargetKey, Wanted};
use crate::index::Index;
use crate::network::{Ports, group_of};
use crate::reason::Reason;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tgb_aws::AwsError;
use tgb_aws::values::NetworkInterface;

/// Interfaces and tags change rarely; what is not found is looked up again sooner.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(600);
/// The greatest age of an answer that did not hold what was looked for.
const LOOKED: Duration = Duration::from_secs(5);

/// The place of a target.
pub(crate) struct Site {
    target: TargetKey,
    ip: Option<IpAddr>,
    /// The named ports of its pod.
    pub(crate) ports: Option<Ports>,
    eni: Option<String>,
    instance: Option<String>,
}

impl Site {
    fn is_at(&self, interface: &NetworkInterface) -> bool {
        match (&self.eni, &self.ip) {
            (Some(eni), _) => interface.id == *eni,
            (None, Some(ip)) => holds(interface, ip),
            (None, None) => interface.device_index == Some(0),
        }
    }

    fn describe(&self) -> String {
        match (&self.eni, &self.instance) {
            (Some(eni), _) => format!("{} ({eni})", self.target),
            (None, Some(instance)) => format!("{} (instance {instance})", self.target),
            (None, None) => self.target.to_string(),
        }
    }
}

/// The places of targets; hybrid nodes have none at EC2.
pub(crate) fn sites(index: &Index, targets: &BTreeMap<TargetKey, Wanted>) -> Vec<Site> {
    targets.iter().filter_map(|(key, wanted)| site(index, key, wanted)).collect()
}

fn site(index: &Index, target: &TargetKey, wanted: &Wanted) -> Option<Site> {
    let (pod, node) = match &wanted.origin {
        Origin::Pod { key, .. } => {
            let pod = index.pod(key).map(|(_, pod)| pod);
            (pod, pod.and_then(|pod| index.nodes.get(pod.node.as_deref()?)))
        }
        Origin::Node(name) => (None, index.nodes.get(name.as_str())),
        Origin::Bare => (None, None),
    };
    let compute = node.and_then(|node| node.labels.get("eks.amazonaws.com/compute-type"));
    if compute.is_some_and(|compute| compute == "hybrid") {
        return None;
    }
    let ip: Option<IpAddr> = target.id.parse().ok();
    let eni = pod.and_then(|pod| pod.eni()).and_then(|text| eni_in(text, ip));
    let instance = node.and_then(|node| node.instance_id()).map(str::to_owned);
    Some(Site { target: target.clone(), ip, ports: pod.map(|pod| Arc::clone(&pod.ports)), eni, instance })
}

/// The interface that the annotation `vpc.amazonaws.com/pod-eni` names for an address. What is not the id of an interface
/// would spoil the call that looks for others, too.
fn eni_in(annotation: &str, ip: Option<IpAddr>) -> Option<String> {
    let all: Vec<serde_json::Value> = serde_json::from_str(annotation).ok()?;
    let has = |entry: &&serde_json::Value| {
        let addresses = ["privateIp", "ipv6Addr"].map(|field| entry.get(field)?.as_str()?.parse().ok());
        ip.is_some() && addresses.contains(&ip)
    };
    let id = all.iter().find(has).or(all.first())?.get("eniId")?.as_str()?;
    let hex = id.strip_prefix("eni-")?;
    let is_id = (1..=32).contains(&hex.len()) && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

fn holds(interface: &NetworkInterface, ip: &IpAddr) -> bool {
    interface.addresses.contains(ip) || interface.prefixes.iter().any(|prefix| prefix.contains(ip))
}

/// The named ports of the pods behind the interfaces of a security group.
type PortsBySecurityGroup = BTreeMap<String, Vec<Ports>>;

/// Finds the security groups of targets, each with the named ports of the pods there. The second part says what could not be
/// found.
pub(crate) async fn security_groups(
    ctx: &Ctx,
    sites: &[Site],
    vpc: Option<&str>,
) -> Result<(PortsBySecurityGroup, Option<(Reason, String)>), AwsError> {
    // By interface: its security groups, and the ports of the pods there.
    let mut at: BTreeMap<String, (Vec<String>, Vec<Ports>)> = BTreeMap::new();
    let mut problem = None;
    let mut left: Vec<&Site> = sites.iter().collect();
    // What is not in a remembered answer is asked for once more.
    for younger in [REMEMBERED, LOOKED] {
        let known = Known::read(ctx, &left, vpc, younger).await?;
        left.retain(|site| {
            let Some(interface) = known.interface(site) else { return true };
            let (_, ports) = at
                .entry(interface.id.clone())
                .or_insert_with(|| (interface.security_groups.clone(), Vec::new()));
            // Pods of one Deployment share the list.
            ports.extend(
                site.ports
                    .iter()
                    .filter(|new| !ports.last().is_some_and(|last| Arc::ptr_eq(last, new)))
                    .cloned()
                    .collect::<Vec<_>>(),
            );
            false
        });
        if left.is_empty() {
            break;
        }
    }
    if let Some(lost) = left.first() {
        let others = if left.len() > 1 { format!(" and {} others", left.len() - 1) } else { String::new() };
        let message = format!("no network interface of {}{others} is found", lost.describe());
        problem = Some((Reason::SecurityGroupNotFound, message));
    }
    let several = at.values().filter(|(groups, _)| groups.len() > 1);
    let several: BTreeSet<String> = several.flat_map(|(groups, _)| groups.iter().cloned()).collect();
    let mut found = chosen(ctx, &at, several.clone(), REMEMBERED).await?;
    if found.iter().any(Result::is_err) {
        found = chosen(ctx, &at, several, LOOKED).await?;
    }
    let mut groups = PortsBySecurityGroup::new();
    for ((_, ports), group) in at.into_values().zip(found) {
        match group {
            Ok(group) => groups.entry(group).or_default().extend(ports),
            Err(why) => problem = problem.or(Some(why)),
        }
    }
    Ok((groups, problem))
}

/// The security group of each interface that gets the rules, or why none does.
async fn chosen(
    ctx: &Ctx,
    at: &BTreeMap<String, (Vec<String>, Vec<Ports>)>,
    several: BTreeSet<String>,
    younger: Duration,
) -> Result<Vec<Result<String, (Reason, String)>>, AwsError> {
    let call = |ids: Vec<String>| async move {
        let found = ctx.aws.security_groups(&ids).await?;
        Ok(found.into_iter().map(|group| (group.id.clone(), Arc::new(group.tags))).collect())
    };
    let tags = ctx.security.tags.get(several, younger, call).await?;
    let sought = &ctx.settings.security_group_tags;
    Ok(at.iter().map(|(id, (groups, _))| group_of(id, groups, &tags, sought)).collect())
}

/// Answers about the interfaces of targets.
struct Known {
    enis: BTreeMap<String, Interfaces>,
    instances: BTreeMap<String, Interfaces>,
    addresses: BTreeMap<(String, IpAddr), Interfaces>,
    vpc: String,
}

impl Known {
    async fn read(
        ctx: &Ctx,
        sites: &[&Site],
        vpc: Option<&str>,
        younger: Duration,
    ) -> Result<Self, AwsError> {
        let (mut enis, mut ids, mut addresses) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for site in sites {
            match (&site.eni, &site.instance, &site.ip, vpc) {
                (Some(eni), ..) => drop(enis.insert(eni.clone())),
                (None, Some(instance), ..) => drop(ids.insert(instance.clone())),
                (None, None, Some(ip), Some(vpc)) => drop(addresses.insert((vpc.to_owned(), *ip))),
                _ => {}
            }
        }
        let security = &ctx.security;
        let by_eni = |ids: Vec<String>| async move {
            Ok(grouped(ctx.aws.interfaces(&ids).await?, |interface| Some(interface.id.clone())))
        };
        let by_address = |wanted: Vec<(String, IpAddr)>| async move {
            let mut by_vpc: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
            for (vpc, ip) in wanted {
                by_vpc.entry(vpc).or_default().push(ip);
            }
            let mut found = HashMap::new();
            for (vpc, ips) in by_vpc {
                for interface in ctx.aws.interfaces_by_address(&vpc, &ips).await? {
                    let addresses: Vec<IpAddr> = interface.addresses.iter().copied().collect();
                    let interface: Interfaces = Arc::from([interface]);
                    let entries = addresses.into_iter().map(|ip| ((vpc.clone(), ip), Arc::clone(&interface)));
                    found.extend(entries);
                }
            }
            Ok(found)
        };
        Ok(Self {
            enis: security.enis.get(enis, younger, by_eni).await?,
            instances: instances(ctx, ids, younger).await?,
            addresses: security.addresses.get(addresses, younger, by_address).await?,
            vpc: vpc.unwrap_or_default().to_owned(),
        })
    }

    fn interface(&self, site: &Site) -> Option<&NetworkInterface> {
        let all = match (&site.eni, &site.instance, &site.ip) {
            (Some(eni), ..) => self.enis.get(eni),
            (None, Some(instance), _) => self.instances.get(instance),
            (None, None, Some(ip)) => self.addresses.get(&(self.vpc.clone(), *ip)),
            (None, None, None) => None,
        };
        all?.iter().find(|interface| site.is_at(interface))
    }
}

/// The interfaces of instances.
pub(crate) async fn instances(
    ctx: &Ctx,
    ids: BTreeSet<String>,
    younger: Duration,
) -> Result<BTreeMap<String, Interfaces>, AwsError> {
    let call = |ids: Vec<String>| async move {
        let found = ctx.aws.interfaces_of_instances(&ids).await?;
        Ok(grouped(found, |interface| interface.instance_id.clone()))
    };
    ctx.security.instances.get(ids, younger, call).await
}

fn grouped(
    interfaces: Vec<NetworkInterface>,
    key: impl Fn(&NetworkInterface) -> Option<String>,
) -> HashMap<String, Interfaces> {
    let mut found: HashMap<String, Vec<NetworkInterface>> = HashMap::new();
    for interface in interfaces {
        if let Some(key) = key(&interface) {
            found.entry(key).or_default().push(interface);
        }
    }
    found.into_iter().map(|(key, all)| (key, all.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_of_a_pod_names_the_interface_of_its_address() {
        let text = r#"[{"eniId":"eni-1","privateIp":"10.0.0.1"},{"eniId":"eni-2","privateIp":"10.0.0.2","ipv6Addr":"fd00::2"}]"#;
        assert_eq!(eni_in(text, "10.0.0.2".parse().ok()).as_deref(), Some("eni-2"));
        assert_eq!(eni_in(text, "fd00::2".parse().ok()).as_deref(), Some("eni-2"));
        assert_eq!(eni_in(text, "10.0.0.9".parse().ok()).as_deref(), Some("eni-1"));
        assert_eq!(eni_in("nonsense", None), None);
    }

    #[test]
    fn an_annotation_that_names_no_interface_is_not_asked_about() {
        for id in ["", "eni-", "i-1", "eni-x", &format!("eni-{}", "1".repeat(10_000))] {
            assert_eq!(eni_in(&serde_json::json!([{"eniId": id}]).to_string(), None), None, "{id}");
        }
    }

    #[test]
    fn an_interface_holds_its_addresses_and_its_prefixes() {
        let interface = NetworkInterface {
            addresses: BTreeSet::from(["192.168.0.10".parse().unwrap()]),
            prefixes: vec!["10.244.0.16/28".parse().unwrap(), "fd00::/80".parse().unwrap()],
            ..Default::default()
        };
        for (ip, held) in [
            ("192.168.0.10", true),
            ("10.244.0.31", true),
            ("10.244.0.32", false),
            ("fd00::7", true),
            ("fd01::7", false),
        ] {
            assert_eq!(holds(&interface, &ip.parse().unwrap()), held, "{ip}");
        }
    }
}
