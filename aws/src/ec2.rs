//! Calls of EC2, always with the cluster's own identity.

use crate::client::{Answer, Aws};
use crate::limits::CallClass;
use crate::values::*;
use aws_sdk_ec2::types as ec2;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// EC2 takes at most 200 filter values in one request; one more is the VPC's.
const FILTER_VALUES: usize = 199;
/// Most results of a page.
const PAGE: i32 = 1000;

/// A network interface, as DescribeInstances and DescribeNetworkInterfaces show it in types of their own.
macro_rules! interface {
    ($eni:expr, $instance_id:expr) => {{
        let parsed = |text: Option<&str>| text.and_then(|text| text.parse().ok());
        NetworkInterface {
            id: $eni.network_interface_id().unwrap_or_default().to_owned(),
            instance_id: $instance_id.map(str::to_owned),
            device_index: $eni.attachment().and_then(|attachment| attachment.device_index()),
            addresses: ($eni.private_ip_addresses().iter().filter_map(|a| parsed(a.private_ip_address())))
                .chain($eni.ipv6_addresses().iter().filter_map(|a| parsed(a.ipv6_address())))
                .collect(),
            prefixes: ($eni.ipv4_prefixes().iter().filter_map(|p| p.ipv4_prefix()))
                .chain($eni.ipv6_prefixes().iter().filter_map(|p| p.ipv6_prefix()))
                .filter_map(|prefix| prefix.parse().ok())
                .collect(),
            vpc_id: $eni.vpc_id().map(str::to_owned),
            security_groups: $eni.groups().iter().filter_map(|g| g.group_id()).map(str::to_owned).collect(),
        }
    }};
}

impl Aws {
    /// DescribeSubnets of a VPC. For AWS, "inside the VPC" means inside one of these.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn subnets(&self, vpc_id: &str) -> Answer<Vec<Subnet>> {
        let mut found = Vec::new();
        let call = self.inner.ec2.describe_subnets().filters(filter("vpc-id", vec![vpc_id.to_owned()]));
        let call = call.max_results(PAGE);
        self.pages(
            "DescribeSubnets",
            |token| call.clone().set_next_token(token).send(),
            |page| {
                found.extend(page.subnets().iter().map(subnet));
                page.next_token
            },
        )
        .await?;
        Ok(found)
    }

    /// DescribeInstances: the network interfaces of instances. Instances that do not exist are simply missing.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn interfaces_of_instances(&self, instance_ids: &[String]) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        // By filter and not by id: one unknown id would fail the whole call.
        for ids in instance_ids.chunks(FILTER_VALUES) {
            let call = self.inner.ec2.describe_instances().filters(filter("instance-id", ids.to_vec()));
            let call = call.max_results(PAGE);
            self.pages(
                "DescribeInstances",
                |token| call.clone().set_next_token(token).send(),
                |page| {
                    for instance in page.reservations().iter().flat_map(|r| r.instances()) {
                        let interfaces = instance.network_interfaces().iter();
                        found.extend(interfaces.map(|eni| interface!(eni, instance.instance_id())));
                    }
                    page.next_token
                },
            )
            .await?;
        }
        Ok(found)
    }

    /// DescribeNetworkInterfaces by id. Those that do not exist are simply missing.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn interfaces(&self, ids: &[String]) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        // By filter, as above.
        for ids in ids.chunks(FILTER_VALUES) {
            found
                .extend(self.described_interfaces(vec![filter("network-interface-id", ids.to_vec())]).await?);
        }
        Ok(found)
    }

    /// DescribeNetworkInterfaces by private address (Fargate). Addresses in delegated prefixes are not found so.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn interfaces_by_address(
        &self,
        vpc_id: &str,
        addresses: &[IpAddr],
    ) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        let (v4, v6): (Vec<&IpAddr>, Vec<&IpAddr>) = addresses.iter().partition(|address| address.is_ipv4());
        for (name, addresses) in [("addresses.private-ip-address", v4), ("ipv6-addresses.ipv6-address", v6)] {
            for chunk in addresses.chunks(FILTER_VALUES) {
                let values = chunk.iter().map(ToString::to_string).collect();
                let filters = vec![filter(name, values), filter("vpc-id", vec![vpc_id.to_owned()])];
                found.extend(self.described_interfaces(filters).await?);
            }
        }
        Ok(found)
    }

    /// DescribeSecurityGroups by id; those that do not exist are simply missing.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn security_groups(&self, ids: &[String]) -> Answer<Vec<SecurityGroup>> {
        let mut found = Vec::new();
        for ids in ids.chunks(FILTER_VALUES) {
            let take = |group: &ec2::SecurityGroup| found.push(security_group(group));
            self.described_groups(filter("group-id", ids.to_vec()), take).await?;
        }
        Ok(found)
    }

    /// DescribeSecurityGroups: the VPC's groups that have inbound rules whose description `is_ours`, and these.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn security_groups_with_rules(
        &self,
        vpc_id: &str,
        is_ours: impl Fn(&str) -> bool,
    ) -> Answer<BTreeMap<String, BTreeSet<Permission>>> {
        let mut found: BTreeMap<String, BTreeSet<Permission>> = BTreeMap::new();
        let take = |group: &ec2::SecurityGroup| {
            let Some(id) = group.group_id() else { return };
            for (permission, description) in group.ip_permissions().iter().flat_map(described_permissions) {
                if is_ours(description) {
                    found.entry(id.to_owned()).or_default().insert(permission);
                }
            }
        };
        self.described_groups(filter("vpc-id", vec![vpc_id.to_owned()]), take).await?;
        Ok(found)
    }

    /// DescribeSecurityGroupRules: the inbound rules of one group, with their ids.
    ///
    /// # Errors
    /// The error of AWS.
    pub async fn security_group_rules(&self, group_id: &str) -> Answer<SecurityGroupRules> {
        let mut found = SecurityGroupRules::default();
        let call = self.inner.ec2.describe_security_group_rules();
        let call = call.filters(filter("group-id", vec![group_id.to_owned()])).max_results(PAGE);
        self.pages(
            "DescribeSecurityGroupRules",
            |token| call.clone().set_next_token(token).send(),
            |page| {
                for rule in page.security_group_rules() {
                    if rule.is_egress() == Some(true) {
                        continue;
                    }
                    match permission(rule) {
                        Some(permission) => found.rules.push(Rule {
                            id: rule.security_group_rule_id().unwrap_or_default().to_owned(),
                            permission,
                            description: rule.description().unwrap_or_default().to_owned(),
                        }),
                        None => found.others += 1,
                    }
                }
                page.next_token
            },
        )
        .await?;
        Ok(found)
    }

    /// AuthorizeSecurityGroupIngress: all of them or none.
    ///
    /// # Errors
    /// The error of AWS; `InvalidPermission.Duplicate` if any is there already, whatever its description.
    pub async fn authorize(
        &self,
        group_id: &str,
        permissions: &[Permission],
        description: &str,
    ) -> Answer<()> {
        let permissions: Vec<_> = permissions.iter().map(|p| ip_permission(p, description)).collect();
        let call = self.inner.ec2.authorize_security_group_ingress().group_id(group_id);
        let call = call.set_ip_permissions(Some(permissions));
        let send = || call.clone().send();
        self.ec2(CallClass::Ec2Change, "AuthorizeSecurityGroupIngress", send).await.map(drop)
    }

    /// RevokeSecurityGroupIngress by rule id, which is exact in every kind of VPC.
    ///
    /// # Errors
    /// The error of AWS; `InvalidSecurityGroupRuleId.NotFound` if any is gone.
    pub async fn revoke(&self, group_id: &str, rule_ids: &[String]) -> Answer<()> {
        let call = self.inner.ec2.revoke_security_group_ingress().group_id(group_id);
        let call = call.set_security_group_rule_ids(Some(rule_ids.to_vec()));
        let send = || call.clone().send();
        self.ec2(CallClass::Ec2Change, "RevokeSecurityGroupIngress", send).await.map(drop)
    }

    /// ModifySecurityGroupRules: gives rules, by id, other ports, another source of the same kind or another description; all
    /// of them or none.
    ///
    /// # Errors
    /// The error of AWS; `InvalidPermission.Duplicate` if another rule is so already, `InvalidSecurityGroupRuleId.NotFound` if
    /// one is gone.
    pub async fn modify_rules(&self, group_id: &str, rules: &[Rule]) -> Answer<()> {
        let updates = rules.iter().map(|Rule { id, permission, description }| {
            let request = ec2::SecurityGroupRuleRequest::builder()
                .ip_protocol(permission.protocol.as_str())
                .from_port(permission.from_port.into())
                .to_port(permission.to_port.into())
                .description(description);
            let request = match &permission.source {
                Source::SecurityGroup(id) => request.referenced_group_id(id),
                Source::Cidr(cidr) if cidr.contains(':') => request.cidr_ipv6(cidr),
                Source::Cidr(cidr) => request.cidr_ipv4(cidr),
            };
            let update = ec2::SecurityGroupRuleUpdate::builder().security_group_rule_id(id);
            update.security_group_rule(request.build()).build()
        });
        let call = self.inner.ec2.modify_security_group_rules().group_id(group_id);
        let call = call.set_security_group_rules(Some(updates.collect()));
        let send = || call.clone().send();
        self.ec2(CallClass::Ec2Change, "ModifySecurityGroupRules", send).await.map(drop)
    }

    // ---- details ----

    /// Asks EC2 for anything; only if it answers matters.
    pub(crate) async fn probe_ec2(&self) {
        let call = self.inner.ec2.describe_security_group_rules().max_results(5);
        // The answer is noted on the way.
        let _ = self.ec2(CallClass::Ec2Describe, "DescribeSecurityGroupRules", || call.clone().send()).await;
    }

    async fn described_groups(
        &self,
        filter: ec2::Filter,
        mut take: impl FnMut(&ec2::SecurityGroup),
    ) -> Answer<()> {
        let call = self.inner.ec2.describe_security_groups().filters(filter).max_results(PAGE);
        self.pages(
            "DescribeSecurityGroups",
            |token| call.clone().set_next_token(token).send(),
            |page| {
                page.security_groups().iter().for_each(&mut take);
                page.next_token
            },
        )
        .await
    }

    async fn described_interfaces(&self, filters: Vec<ec2::Filter>) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        let call = self.inner.ec2.describe_network_interfaces().set_filters(Some(filters)).max_results(PAGE);
        self.pages(
            "DescribeNetworkInterfaces",
            |token| call.clone().set_next_token(token).send(),
            |page| {
                let interfaces = page.network_interfaces().iter();
                found.extend(
                    interfaces.map(|eni| interface!(eni, eni.attachment().and_then(|at| at.instance_id()))),
                );
                page.next_token
            },
        )
        .await?;
        Ok(found)
    }
}

fn subnet(subnet: &ec2::Subnet) -> Subnet {
    let v6 = subnet.ipv6_cidr_block_association_set().iter().filter_map(|block| block.ipv6_cidr_block());
    Subnet {
        id: subnet.subnet_id().unwrap_or_default().to_owned(),
        zone: subnet.availability_zone().unwrap_or_default().to_owned(),
        cidrs: subnet.cidr_block().into_iter().chain(v6).map(str::to_owned).collect(),
    }
}

fn security_group(group: &ec2::SecurityGroup) -> SecurityGroup {
    let tag = |tag: &ec2::Tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or_default().to_owned()));
    SecurityGroup {
        id: group.group_id().unwrap_or_default().to_owned(),
        tags: group.tags().iter().filter_map(tag).collect(),
    }
}

fn filter(name: &str, values: Vec<String>) -> ec2::Filter {
    ec2::Filter::builder().name(name).set_values(Some(values)).build()
}

fn protocol(word: &str) -> Option<RuleProtocol> {
    match word {
        "tcp" | "6" => Some(RuleProtocol::Tcp),
        "udp" | "17" => Some(RuleProtocol::Udp),
        _ => None,
    }
}

fn permission(rule: &ec2::SecurityGroupRule) -> Option<Permission> {
    let source = if let Some(group) = rule.referenced_group_info().and_then(|info| info.group_id()) {
        Source::SecurityGroup(group.to_owned())
    } else {
        Source::Cidr(rule.cidr_ipv4().or_else(|| rule.cidr_ipv6())?.to_owned())
    };
    Some(Permission {
        protocol: protocol(rule.ip_protocol()?)?,
        from_port: u16::try_from(rule.from_port()?).ok()?,
        to_port: u16::try_from(rule.to_port()?).ok()?,
        source,
    })
}

/// The rules of an entry of DescribeSecurityGroups, each with its description.
fn described_permissions(entry: &ec2::IpPermission) -> Vec<(Permission, &str)> {
    let ports = || {
        let (from, to) = (u16::try_from(entry.from_port()?).ok()?, u16::try_from(entry.to_port()?).ok()?);
        Some((protocol(entry.ip_protocol()?)?, from, to))
    };
    let Some((protocol, from_port, to_port)) = ports() else { return Vec::new() };
    let cidr = |cidr: Option<&str>| Some(Source::Cidr(cidr?.to_owned()));
    let pairs = entry.user_id_group_pairs().iter();
    let pairs = pairs
        .map(|pair| (pair.group_id().map(|id| Source::SecurityGroup(id.to_owned())), pair.description()));
    let v4 = entry.ip_ranges().iter().map(|range| (cidr(range.cidr_ip()), range.description()));
    let v6 = entry.ipv6_ranges().iter().map(|range| (cidr(range.cidr_ipv6()), range.description()));
    pairs
        .chain(v4)
        .chain(v6)
        .filter_map(|(source, description)| {
            Some((
                Permission { protocol, from_port, to_port, source: source? },
                description.unwrap_or_default(),
            ))
        })
        .collect()
}

fn ip_permission(permission: &Permission, description: &str) -> ec2::IpPermission {
    let built = ec2::IpPermission::builder()
        .ip_protocol(permission.protocol.as_str())
        .from_port(permission.from_port.into())
        .to_port(permission.to_port.into());
    match &permission.source {
        Source::SecurityGroup(id) => built.user_id_group_pairs(
            ec2::UserIdGroupPair::builder().group_id(id).description(description).build(),
        ),
        Source::Cidr(cidr) if cidr.contains(':') => {
            built.ipv6_ranges(ec2::Ipv6Range::builder().cidr_ipv6(cidr).description(description).build())
        }
        Source::Cidr(cidr) => {
            built.ip_ranges(ec2::IpRange::builder().cidr_ip(cidr).description(description).build())
        }
    }
    .build()
}
