//! EC2: VPCs, subnets, instances, network interfaces, security groups and their rules, tags, zones.

use std::borrow::Cow;
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::elb::unknown_action;
use crate::state::{Aws, Eni, Instance, InstanceState, Rule, SecurityGroup, Source, Subnet, Tags, Vpc};
use crate::wire::{AwsError, Params, Xml, glob};

type Answer = Result<Xml, AwsError>;

impl Aws {
    /// An EC2 call.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn ec2(&mut self, action: &str, p: &Params, now: u64) -> Answer {
        if p.get("DryRun") == Some("true") {
            return Err(AwsError::with_status(
                412,
                "DryRunOperation",
                "Request would have succeeded, but DryRun flag is set.",
            ));
        }
        if let Some(mut past) = self.stale(action, now) {
            return past.ec2(action, p, now);
        }
        match action {
            "CreateVpc" => self.create_vpc(p),
            "DescribeVpcs" => self.describe_vpcs(p),
            "DeleteVpc" => self.delete_vpc(p),
            "AssociateVpcCidrBlock" => self.associate_vpc_cidr(p),
            "CreateSubnet" => self.create_subnet(p),
            "DescribeSubnets" => self.describe_subnets(p),
            "DeleteSubnet" => self.delete_subnet(p),
            "RunInstances" => self.run_instances(p, now),
            "DescribeInstances" => self.describe_instances(p),
            "StopInstances" => self.change_instances(p, InstanceState::Stopped, now),
            "StartInstances" => self.change_instances(p, InstanceState::Running, now),
            "TerminateInstances" => self.change_instances(p, InstanceState::Terminated, now),
            "CreateNetworkInterface" => self.create_eni(p),
            "DescribeNetworkInterfaces" => self.describe_enis(p),
            "DeleteNetworkInterface" => self.delete_eni(p),
            "AttachNetworkInterface" => self.attach_eni(p),
            "AssignPrivateIpAddresses" => self.assign_ipv4(p),
            "UnassignPrivateIpAddresses" => self.unassign_ipv4(p),
            "AssignIpv6Addresses" => self.assign_ipv6(p),
            "ModifyNetworkInterfaceAttribute" => self.modify_eni(p),
            "CreateSecurityGroup" => self.create_group(p),
            "DeleteSecurityGroup" => self.delete_group(p),
            "DescribeSecurityGroups" => self.describe_groups(p),
            "DescribeSecurityGroupRules" => self.describe_rules_of_groups(p),
            "AuthorizeSecurityGroupIngress" => self.authorize(p, false),
            "AuthorizeSecurityGroupEgress" => self.authorize(p, true),
            "RevokeSecurityGroupIngress" => self.revoke(p, false),
            "RevokeSecurityGroupEgress" => self.revoke(p, true),
            "ModifySecurityGroupRules" => self.modify_rules(p),
            "CreateTags" => self.change_tags(p, true),
            "DeleteTags" => self.change_tags(p, false),
            "DescribeTags" => self.describe_tags(p),
            "DescribeAvailabilityZones" => self.describe_zones(p),
            "DescribeRegions" => Ok(self.describe_regions()),
            _ => Err(unknown_action(action)),
        }
    }

    fn create_vpc(&mut self, p: &Params) -> Answer {
        let cidr: Ipv4Net = p.need("CidrBlock")?.parse().map_err(|_| {
            AwsError::value(format!(
                "Value ({}) for parameter cidrBlock is invalid.",
                p.raw("CidrBlock").unwrap_or("")
            ))
        })?;
        if !(16..=28).contains(&cidr.prefix_len()) {
            return Err(AwsError::new("InvalidVpc.Range", format!("The CIDR '{cidr}' is invalid.")));
        }
        let id = self.new_id("vpc");
        let mut vpc = Vpc {
            id: id.clone(),
            cidrs: vec![cidr.trunc()],
            tags: tag_specification(p, "vpc")?,
            ..Vpc::default()
        };
        if p.get("AmazonProvidedIpv6CidrBlock") == Some("true") {
            let number = u16::try_from(self.next() & 0xff).unwrap_or(0);
            let address = std::net::Ipv6Addr::new(0x2600, 0x1f14, 0xabc, number << 8, 0, 0, 0, 0);
            vpc.ipv6_cidrs.extend(Ipv6Net::new(address, 56));
        }
        let group = self.new_id("sg");
        self.add_security_group(&group, &id, "default", Tags::new());
        let own = Rule {
            id: self.new_id("sgr"),
            egress: false,
            protocol: "-1".to_owned(),
            from: -1,
            to: -1,
            source: Source::Group(group.clone(), self.account.clone()),
            description: None,
            tags: Tags::new(),
        };
        if let Some(group) = self.security_groups.get_mut(&group) {
            group.description = "default VPC security group".to_owned();
            group.rules.push(own);
        }
        let mut x = Xml::default();
        x.el("vpc", |x| self.vpc_xml(x, &vpc));
        self.vpcs.insert(id, vpc);
        Ok(x)
    }

    fn associate_vpc_cidr(&mut self, p: &Params) -> Answer {
        let id = p.need("VpcId")?;
        let cidr = p.need("CidrBlock")?;
        let net: Ipv4Net = cidr
            .parse()
            .map_err(|_| AwsError::new("InvalidVpc.Range", format!("The CIDR '{cidr}' is invalid.")))?;
        let vpc = self.vpcs.get_mut(id).ok_or_else(|| no_vpc(id))?;
        vpc.cidrs.push(net.trunc());
        let mut x = Xml::default();
        x.el("cidrBlockAssociation", |x| {
            x.text("associationId", &association(id, vpc.cidrs.len() - 1));
            x.val("cidrBlock", net.trunc());
            x.el("cidrBlockState", |x| x.text("state", "associating"));
        });
        x.text("vpcId", id);
        Ok(x)
    }

    fn describe_vpcs(&self, p: &Params) -> Answer {
        let all = self.select(
            p,
            "VpcId",
            &self.vpcs,
            |id| no_vpc(&id.join(", ")),
            |v, name| match name {
                "vpc-id" => one(&v.id),
                "state" => one("available"),
                "is-default" | "isDefault" => one(if v.is_default { "true" } else { "false" }),
                "cidr" | "cidr-block" | "cidrBlock" => texts(v.cidrs.iter().take(1)),
                "cidr-block-association.cidr-block" => texts(&v.cidrs),
                "ipv6-cidr-block-association.ipv6-cidr-block" => texts(&v.ipv6_cidrs),
                "owner-id" => one(&self.account),
                _ => by_tag(&v.tags, name),
            },
        )?;
        paged(p, "VpcId", "vpcSet", &all, |x, v| self.vpc_xml(x, v))
    }

    fn vpc_xml(&self, x: &mut Xml, v: &Vpc) {
        x.text("vpcId", &v.id);
        x.text("ownerId", &self.account);
        x.text("state", "available");
        if let Some(cidr) = v.cidrs.first() {
            x.val("cidrBlock", cidr);
        }
        x.each("cidrBlockAssociationSet", "item", v.cidrs.iter().enumerate(), |x, (n, cidr)| {
            x.val("cidrBlock", cidr);
            x.text("associationId", &association(&v.id, n));
            x.el("cidrBlockState", |x| x.text("state", "associated"));
        });
        if !v.ipv6_cidrs.is_empty() {
            x.each("ipv6CidrBlockAssociationSet", "item", v.ipv6_cidrs.iter().enumerate(), |x, (n, cidr)| {
                x.val("ipv6CidrBlock", cidr);
                x.text("associationId", &association(&v.id, 100 + n));
                x.el("ipv6CidrBlockState", |x| x.text("state", "associated"));
                x.text("networkBorderGroup", &self.region);
                x.text("ipv6Pool", "Amazon");
            });
        }
        x.text("dhcpOptionsId", "dopt-00000000000000001");
        x.text("instanceTenancy", "default");
        x.val("isDefault", v.is_default);
        tags_xml(x, &v.tags);
    }

    fn delete_vpc(&mut self, p: &Params) -> Answer {
        let id = p.need("VpcId")?;
        if !self.vpcs.contains_key(id) {
            return Err(no_vpc(id));
        }
        let used = self.subnets.values().any(|s| s.vpc == id)
            || self.security_groups.values().any(|g| g.vpc == id && g.name != "default");
        if used {
            return Err(AwsError::new(
                "DependencyViolation",
                format!("The vpc '{id}' has dependencies and cannot be deleted."),
            ));
        }
        self.security_groups.retain(|_, g| g.vpc != id);
        self.vpcs.remove(id);
        Ok(done())
    }

    fn create_subnet(&mut self, p: &Params) -> Answer {
        let vpc_id = p.need("VpcId")?;
        let vpc = self.vpcs.get(vpc_id).ok_or_else(|| no_vpc(vpc_id))?;
        let zone = p.get("AvailabilityZone").map_or_else(|| format!("{}a", self.region), str::to_owned);
        if !self.zones().contains(&zone) {
            return Err(AwsError::value(format!(
                "Value ({zone}) for parameter availabilityZone is invalid. Subnets can currently only be created in the following availability zones: {}.",
                self.zones().join(", ")
            )));
        }
        let range =
            |text: &str| AwsError::new("InvalidSubnet.Range", format!("The CIDR '{text}' is invalid."));
        let cidr = match p.get("CidrBlock") {
            None => None,
            Some(text) => {
                let net: Ipv4Net = text.parse().map_err(|_| range(text))?;
                let net = net.trunc();
                if !(16..=28).contains(&net.prefix_len()) || !vpc.cidrs.iter().any(|c| c.contains(&net)) {
                    return Err(range(text));
                }
                let conflict = self
                    .subnets
                    .values()
                    .any(|s| s.vpc == vpc_id && s.cidr.is_some_and(|c| c.contains(&net) || net.contains(&c)));
                if conflict {
                    return Err(AwsError::new(
                        "InvalidSubnet.Conflict",
                        format!("The CIDR '{text}' conflicts with another subnet"),
                    ));
                }
                Some(net)
            }
        };
        let ipv6_cidr = match p.get("Ipv6CidrBlock") {
            None => None,
            Some(text) => Some(text.parse::<Ipv6Net>().map_err(|_| range(text))?.trunc()),
        };
        if cidr.is_none() && ipv6_cidr.is_none() {
            return Err(AwsError::missing("cidrBlock"));
        }
        let id = self.new_id("subnet");
        let subnet = Subnet {
            id: id.clone(),
            vpc: vpc_id.to_owned(),
            cidr,
            ipv6_cidr,
            zone,
            tags: tag_specification(p, "subnet")?,
        };
        let mut x = Xml::default();
        x.el("subnet", |x| self.subnet_xml(x, &subnet));
        self.subnets.insert(id, subnet);
        Ok(x)
    }

    fn describe_subnets(&self, p: &Params) -> Answer {
        let missing = |ids: &[&str]| match ids {
            [id] => AwsError::new("InvalidSubnetID.NotFound", format!("The subnet ID '{id}' does not exist")),
            ids => AwsError::new(
                "InvalidSubnetID.NotFound",
                format!("The subnet IDs '{}' do not exist", ids.join(", ")),
            ),
        };
        let all = self.select(p, "SubnetId", &self.subnets, missing, |s, name| match name {
            "subnet-id" => one(&s.id),
            "vpc-id" => one(&s.vpc),
            "state" => one("available"),
            "availability-zone" | "availabilityZone" => one(&s.zone),
            "availability-zone-id" => Some(vec![self.zone_id(&s.zone).into()]),
            "cidr-block" | "cidr" | "cidrBlock" => texts(s.cidr),
            "ipv6-cidr-block-association.ipv6-cidr-block" => texts(s.ipv6_cidr),
            "owner-id" => one(&self.account),
            _ => by_tag(&s.tags, name),
        })?;
        paged(p, "SubnetId", "subnetSet", &all, |x, s| self.subnet_xml(x, s))
    }

    fn subnet_xml(&self, x: &mut Xml, s: &Subnet) {
        x.text("subnetId", &s.id);
        x.text(
            "subnetArn",
            &format!("arn:{}:ec2:{}:{}:subnet/{}", self.partition(), self.region, self.account, s.id),
        );
        x.text("state", "available");
        x.text("ownerId", &self.account);
        x.text("vpcId", &s.vpc);
        if let Some(cidr) = s.cidr {
            x.val("cidrBlock", cidr);
        }
        x.each("ipv6CidrBlockAssociationSet", "item", &s.ipv6_cidr, |x, cidr| {
            x.text("associationId", &s.id.replacen("subnet-", "subnet-cidr-assoc-", 1));
            x.val("ipv6CidrBlock", cidr);
            x.el("ipv6CidrBlockState", |x| x.text("state", "associated"));
        });
        x.val(
            "availableIpAddressCount",
            s.cidr.map_or(0, |c| (1u64 << (32 - c.prefix_len())).saturating_sub(5)),
        );
        x.text("availabilityZone", &s.zone);
        x.text("availabilityZoneId", &self.zone_id(&s.zone));
        x.text("defaultForAz", "false");
        x.text("mapPublicIpOnLaunch", "false");
        x.text("assignIpv6AddressOnCreation", "false");
        tags_xml(x, &s.tags);
    }

    fn delete_subnet(&mut self, p: &Params) -> Answer {
        let id = p.need("SubnetId")?;
        if !self.subnets.contains_key(id) {
            return Err(AwsError::new(
                "InvalidSubnetID.NotFound",
                format!("The subnet ID '{id}' does not exist"),
            ));
        }
        if self.enis.values().any(|e| e.subnet == id) {
            return Err(AwsError::new(
                "DependencyViolation",
                format!("The subnet '{id}' has dependencies and cannot be deleted."),
            ));
        }
        self.subnets.remove(id);
        Ok(done())
    }

    /// As in `usw2-az1` for `us-west-2a`.
    fn zone_id(&self, zone: &str) -> String {
        let short: String = self
            .region
            .split('-')
            .map(|part| match part {
                "north" | "south" | "east" | "west" | "central" => part.get(..1).unwrap_or_default(),
                "northeast" => "ne",
                "southeast" => "se",
                "northwest" => "nw",
                "southwest" => "sw",
                other => other,
            })
            .collect();
        let number = zone.bytes().last().map_or(1, |b| b.saturating_sub(b'a') + 1);
        format!("{short}-az{number}")
    }

    fn free_ip(&self, subnet: &Subnet) -> Result<Ipv4Addr, AwsError> {
        let used: HashSet<Ipv4Addr> = self
            .enis
            .values()
            .filter(|e| e.subnet == subnet.id)
            .flat_map(|e| e.private_ips.iter().copied())
            .collect();
        let prefixes: Vec<Ipv4Net> = self
            .enis
            .values()
            .filter(|e| e.subnet == subnet.id)
            .flat_map(|e| e.prefixes.iter().copied())
            .collect();
        subnet
            .cidr
            .and_then(|c| {
                c.hosts().skip(3).find(|a| !used.contains(a) && !prefixes.iter().any(|p| p.contains(a)))
            })
            .ok_or_else(|| {
                AwsError::new(
                    "InsufficientFreeAddressesInSubnet",
                    format!("There are not enough free addresses in subnet '{}'", subnet.id),
                )
            })
    }

    fn taken(&self, subnet: &Subnet, ip: Ipv4Addr) -> Result<(), AwsError> {
        if !subnet.cidr.is_some_and(|c| c.contains(&ip)) {
            return Err(AwsError::value(format!(
                "Address does not fall within the subnet's address range: {ip}"
            )));
        }
        if self.enis.values().any(|e| e.subnet == subnet.id && e.private_ips.contains(&ip)) {
            return Err(AwsError::new("InvalidIPAddress.InUse", format!("Address {ip} is in use.")));
        }
        Ok(())
    }

    fn run_instances(&mut self, p: &Params, now: u64) -> Answer {
        let count = p.number("MinCount")?.ok_or_else(|| AwsError::missing("MinCount"))?;
        p.number("MaxCount")?.ok_or_else(|| AwsError::missing("MaxCount"))?;
        if let Some(ids) = p.get("ClientToken").and_then(|t| self.tokens.get(t)) {
            let all: Vec<&Instance> = ids.iter().filter_map(|id| self.instances.get(id)).collect();
            let mut x = Xml::default();
            self.reservation_xml(&mut x, &all);
            return Ok(x);
        }
        let interfaces = p.list("NetworkInterface");
        let first = interfaces.first();
        let subnet_id = p.get("SubnetId").or_else(|| first.and_then(|n| n.get("SubnetId")));
        let subnet = match subnet_id {
            Some(id) => self.subnets.get(id).cloned().ok_or_else(|| {
                AwsError::new("InvalidSubnetID.NotFound", format!("The subnet ID '{id}' does not exist"))
            })?,
            None => self.subnets.values().next().cloned().ok_or_else(|| {
                AwsError::new(
                    "MissingInput",
                    "No subnets found for the default VPC. Please specify a subnet.",
                )
            })?,
        };
        let mut groups: Vec<String> = p.strings("SecurityGroupId").into_iter().map(str::to_owned).collect();
        if let Some(first) = first {
            groups.extend(first.strings("SecurityGroupId").into_iter().map(str::to_owned));
        }
        for id in &groups {
            if !self.security_groups.contains_key(id) {
                return Err(no_group(id));
            }
        }
        if groups.is_empty() {
            let default = self.security_groups.values().find(|g| g.vpc == subnet.vpc && g.name == "default");
            groups.extend(default.map(|g| g.id.clone()));
        }
        let tags = tag_specification(p, "instance")?;
        let wanted_ip = p.get("PrivateIpAddress").or_else(|| first.and_then(|n| n.get("PrivateIpAddress")));
        let prefixes: Vec<Ipv4Net> = first
            .map(|n| n.list("Ipv4Prefix"))
            .unwrap_or_default()
            .iter()
            .filter_map(|n| n.get("Ipv4Prefix").and_then(|t| t.parse().ok()))
            .collect();
        let ipv6_count = p.number("Ipv6AddressCount")?.unwrap_or(0);
        let mut ids = Vec::new();
        for _ in 0..count.clamp(1, 1_000) {
            let ip = match wanted_ip {
                Some(text) => {
                    let ip =
                        text.parse().map_err(|_| AwsError::value(format!("Invalid IPv4 address: {text}")))?;
                    self.taken(&subnet, ip)?;
                    ip
                }
                None => self.free_ip(&subnet)?,
            };
            let id = self.new_id("i");
            let eni = self.add_instance(
                Instance {
                    id: id.clone(),
                    vpc: subnet.vpc.clone(),
                    subnet: subnet.id.clone(),
                    zone: subnet.zone.clone(),
                    state: InstanceState::Running,
                    instance_type: p.get("InstanceType").unwrap_or("m5.large").to_owned(),
                    private_ip: Some(ip),
                    groups: groups.clone(),
                    changed_ms: now,
                    tags: tags.clone(),
                    ..Instance::default()
                },
                Vec::new(),
                prefixes.clone(),
            );
            for _ in 0..ipv6_count {
                self.add_ipv6(&eni, &subnet)?;
            }
            ids.push(id);
        }
        if let Some(token) = p.get("ClientToken") {
            self.tokens.insert(token.to_owned(), ids.clone());
        }
        let mut x = Xml::default();
        let all: Vec<&Instance> = ids.iter().filter_map(|id| self.instances.get(id)).collect();
        self.reservation_xml(&mut x, &all);
        Ok(x)
    }

    fn add_ipv6(&mut self, eni: &str, subnet: &Subnet) -> Result<std::net::Ipv6Addr, AwsError> {
        let net = subnet
            .ipv6_cidr
            .ok_or_else(|| AwsError::value(format!("The subnet '{}' has no IPv6 CIDR block", subnet.id)))?;
        let address = std::net::Ipv6Addr::from(u128::from(net.network()) | u128::from(self.next()));
        if let Some(eni) = self.enis.get_mut(eni) {
            eni.ipv6.push(address);
        }
        Ok(address)
    }

    fn reservation_xml(&self, x: &mut Xml, instances: &[&Instance]) {
        let id = instances.first().map_or("r-0", |i| i.id.as_str()).replacen("i-", "r-", 1);
        x.text("reservationId", &id);
        x.text("ownerId", &self.account);
        x.el("groupSet", |_| {});
        x.each("instancesSet", "item", instances, |x, i| self.instance_xml(x, i));
    }

    fn instance_xml(&self, x: &mut Xml, i: &Instance) {
        let (name, code) = i.state.name();
        x.text("instanceId", &i.id);
        x.text("imageId", "ami-00000000000000001");
        x.el("instanceState", |x| {
            x.val("code", code);
            x.text("name", name);
        });
        x.text("privateDnsName", &i.private_dns);
        x.text("instanceType", if i.instance_type.is_empty() { "m5.large" } else { &i.instance_type });
        x.text("launchTime", &crate::wire::timestamp(i.changed_ms));
        x.el("placement", |x| {
            x.text("availabilityZone", &i.zone);
            x.text("tenancy", "default");
        });
        if i.state != InstanceState::Terminated {
            x.text("subnetId", &i.subnet);
            x.text("vpcId", &i.vpc);
            if let Some(ip) = i.private_ip {
                x.val("privateIpAddress", ip);
            }
        }
        x.text("architecture", "x86_64");
        self.groups_xml(x, &i.groups);
        let mut enis: Vec<&Eni> = self.enis_of(&i.id).collect();
        enis.sort_by_key(|e| e.device_index);
        x.each("networkInterfaceSet", "item", enis, |x, e| self.eni_xml(x, e, true));
        tags_xml(x, &i.tags);
    }

    fn enis_of<'a>(&'a self, instance: &'a str) -> impl Iterator<Item = &'a Eni> {
        self.enis.values().filter(move |e| e.instance.as_deref() == Some(instance))
    }

    fn groups_xml(&self, x: &mut Xml, groups: &[String]) {
        x.each("groupSet", "item", groups, |x, id| {
            x.text("groupId", id);
            x.text("groupName", self.security_groups.get(id).map_or("", |g| g.name.as_str()));
        });
    }

    fn describe_instances(&self, p: &Params) -> Answer {
        let all = self.select(p, "InstanceId", &self.instances, no_instance, |i, name| match name {
            "instance-id" => one(&i.id),
            "vpc-id" | "network-interface.vpc-id" => one(&i.vpc),
            "subnet-id" | "network-interface.subnet-id" => one(&i.subnet),
            "availability-zone" => one(&i.zone),
            "instance-type" => one(&i.instance_type),
            "instance-state-name" => one(i.state.name().0),
            "instance-state-code" => Some(vec![i.state.name().1.to_string().into()]),
            "private-dns-name" | "network-interface.private-dns-name" => one(&i.private_dns),
            "private-ip-address" => texts(i.private_ip),
            "instance.group-id" | "network-interface.group-id" => {
                Some(i.groups.iter().map(|g| g.as_str().into()).collect())
            }
            "network-interface.network-interface-id" => {
                Some(self.enis_of(&i.id).map(|e| e.id.as_str().into()).collect())
            }
            "network-interface.addresses.private-ip-address" => {
                texts(self.enis_of(&i.id).flat_map(|e| &e.private_ips))
            }
            "network-interface.ipv6-addresses.ipv6-address" => {
                texts(self.enis_of(&i.id).flat_map(|e| &e.ipv6))
            }
            "network-interface.ipv4-prefixes.ipv4-prefix" => {
                texts(self.enis_of(&i.id).flat_map(|e| &e.prefixes))
            }
            "network-interface.ipv6-prefixes.ipv6-prefix" => {
                texts(self.enis_of(&i.id).flat_map(|e| &e.ipv6_prefixes))
            }
            _ => by_tag(&i.tags, name),
        })?;
        paged(p, "InstanceId", "reservationSet", &all, |x, i| self.reservation_xml(x, &[i]))
    }

    fn change_instances(&mut self, p: &Params, to: InstanceState, now: u64) -> Answer {
        let ids = p.strings("InstanceId");
        let missing: Vec<&str> = ids.iter().copied().filter(|id| !self.instances.contains_key(*id)).collect();
        if !missing.is_empty() {
            return Err(no_instance(&missing));
        }
        if to != InstanceState::Terminated
            && let Some(dead) = ids
                .iter()
                .find(|id| self.instances.get(**id).is_some_and(|i| i.state == InstanceState::Terminated))
        {
            return Err(AwsError::new(
                "IncorrectInstanceState",
                format!("The instance '{dead}' is not in a state from which it can be changed."),
            ));
        }
        let mut x = Xml::default();
        x.each("instancesSet", "item", ids, |x, id| {
            let before = self.set_instance_state(id, to, now).unwrap_or(to);
            x.text("instanceId", id);
            for (name, (state, code)) in [("currentState", to.name()), ("previousState", before.name())] {
                x.el(name, |x| {
                    x.val("code", code);
                    x.text("name", state);
                });
            }
        });
        Ok(x)
    }

    /// Changes an instance and returns the state before; its interfaces go when it ends.
    pub fn set_instance_state(&mut self, id: &str, to: InstanceState, now: u64) -> Option<InstanceState> {
        let instance = self.instances.get_mut(id)?;
        let before = instance.state;
        if before != to {
            instance.state = to;
            instance.changed_ms = now;
        }
        if to == InstanceState::Terminated {
            self.enis.retain(|_, e| e.instance.as_deref() != Some(id));
        }
        Some(before)
    }

    fn create_eni(&mut self, p: &Params) -> Answer {
        let subnet_id = p.need("SubnetId")?;
        let subnet = self.subnets.get(subnet_id).cloned().ok_or_else(|| {
            AwsError::new("InvalidSubnetID.NotFound", format!("The subnet ID '{subnet_id}' does not exist"))
        })?;
        let groups: Vec<String> = p.strings("SecurityGroupId").into_iter().map(str::to_owned).collect();
        if let Some(bad) = groups.iter().find(|g| !self.security_groups.contains_key(*g)) {
            return Err(no_group(bad));
        }
        self.interface_quota(&groups)?;
        let mut ips = Vec::new();
        if let Some(text) = p.get("PrivateIpAddress") {
            let ip = text.parse().map_err(|_| AwsError::value(format!("Invalid IPv4 address: {text}")))?;
            self.taken(&subnet, ip)?;
            ips.push(ip);
        }
        for item in p.list("PrivateIpAddresses") {
            let text = item.need("PrivateIpAddress")?;
            let ip = text.parse().map_err(|_| AwsError::value(format!("Invalid IPv4 address: {text}")))?;
            self.taken(&subnet, ip)?;
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
        if ips.is_empty() {
            ips.push(self.free_ip(&subnet)?);
        }
        let id = self.new_id("eni");
        let mut eni = Eni {
            id: id.clone(),
            subnet: subnet.id.clone(),
            vpc: subnet.vpc.clone(),
            zone: subnet.zone.clone(),
            groups,
            private_ips: ips,
            description: p.raw("Description").unwrap_or_default().to_owned(),
            tags: tag_specification(p, "network-interface")?,
            ..Eni::default()
        };
        for item in p.list("Ipv4Prefix") {
            eni.prefixes.push(prefix_28(item.need("Ipv4Prefix")?)?);
        }
        for item in p.list("Ipv6Prefix") {
            eni.ipv6_prefixes.push(prefix_80(item.need("Ipv6Prefix")?)?);
        }
        for item in p.list("Ipv6Addresses") {
            let text = item.need("Ipv6Address")?;
            eni.ipv6
                .push(text.parse().map_err(|_| AwsError::value(format!("Invalid IPv6 address: {text}")))?);
        }
        let mut x = Xml::default();
        x.el("networkInterface", |x| self.eni_xml(x, &eni, false));
        self.enis.insert(id, eni);
        Ok(x)
    }

    fn interface_quota(&self, groups: &[String]) -> Result<(), AwsError> {
        if groups.len() > self.quotas.groups_per_interface {
            return Err(AwsError::new(
                "SecurityGroupsPerInterfaceLimitExceeded",
                "The maximum number of security groups per interface has been reached.",
            ));
        }
        Ok(())
    }

    fn describe_enis(&self, p: &Params) -> Answer {
        let all = self.select(p, "NetworkInterfaceId", &self.enis, no_eni, |e, name| match name {
            "network-interface-id" => one(&e.id),
            "vpc-id" => one(&e.vpc),
            "subnet-id" => one(&e.subnet),
            "availability-zone" => one(&e.zone),
            "status" => one(if e.instance.is_some() { "in-use" } else { "available" }),
            "interface-type" => one("interface"),
            "description" => one(&e.description),
            "group-id" => Some(e.groups.iter().map(|g| g.as_str().into()).collect()),
            "attachment.instance-id" => Some(e.instance.iter().map(|i| i.as_str().into()).collect()),
            "attachment.status" => Some(e.instance.iter().map(|_| "attached".into()).collect()),
            "attachment.device-index" => {
                Some(e.instance.iter().map(|_| e.device_index.to_string().into()).collect())
            }
            "private-ip-address" => texts(e.private_ips.first()),
            "addresses.private-ip-address" => texts(&e.private_ips),
            "ipv6-addresses.ipv6-address" => texts(&e.ipv6),
            _ => by_tag(&e.tags, name),
        })?;
        paged(p, "NetworkInterfaceId", "networkInterfaceSet", &all, |x, e| self.eni_xml(x, e, false))
    }

    fn eni_xml(&self, x: &mut Xml, e: &Eni, of_instance: bool) {
        x.text("networkInterfaceId", &e.id);
        x.text("subnetId", &e.subnet);
        x.text("vpcId", &e.vpc);
        if !of_instance {
            x.text("availabilityZone", &e.zone);
        }
        x.text("description", &e.description);
        x.text("ownerId", &self.account);
        x.text("status", if e.instance.is_some() { "in-use" } else { "available" });
        x.text("interfaceType", "interface");
        x.text("macAddress", "02:00:00:00:00:01");
        if let Some(ip) = e.private_ips.first() {
            x.val("privateIpAddress", ip);
        }
        x.text("sourceDestCheck", "true");
        self.groups_xml(x, &e.groups);
        if let Some(instance) = &e.instance {
            x.el("attachment", |x| {
                x.text("attachmentId", &e.id.replacen("eni-", "eni-attach-", 1));
                if !of_instance {
                    x.text("instanceId", instance);
                    x.text("instanceOwnerId", &self.account);
                }
                x.val("deviceIndex", e.device_index);
                x.text("status", "attached");
                x.text("deleteOnTermination", "true");
            });
        }
        x.each("privateIpAddressesSet", "item", e.private_ips.iter().enumerate(), |x, (n, ip)| {
            x.val("privateIpAddress", ip);
            x.val("primary", n == 0);
        });
        x.each("ipv6AddressesSet", "item", e.ipv6.iter().enumerate(), |x, (n, ip)| {
            x.val("ipv6Address", ip);
            x.val("isPrimaryIpv6", n == 0);
        });
        if !e.prefixes.is_empty() {
            x.each("ipv4PrefixSet", "item", &e.prefixes, |x, p| x.val("ipv4Prefix", p));
        }
        if !e.ipv6_prefixes.is_empty() {
            x.each("ipv6PrefixSet", "item", &e.ipv6_prefixes, |x, p| x.val("ipv6Prefix", p));
        }
        if !of_instance {
            tags_xml(x, &e.tags);
        }
    }

    fn delete_eni(&mut self, p: &Params) -> Answer {
        let id = p.need("NetworkInterfaceId")?;
        let eni = self.enis.get(id).ok_or_else(|| no_eni(&[id]))?;
        if eni.instance.is_some() {
            return Err(AwsError::new(
                "InvalidParameterValue",
                format!("Network interface '{id}' is currently in use."),
            ));
        }
        self.enis.remove(id);
        Ok(done())
    }

    fn attach_eni(&mut self, p: &Params) -> Answer {
        let (id, instance) = (p.need("NetworkInterfaceId")?, p.need("InstanceId")?);
        let index = p.number("DeviceIndex")?.and_then(|n| u16::try_from(n).ok()).unwrap_or(1);
        if !self.instances.contains_key(instance) {
            return Err(no_instance(&[instance]));
        }
        let eni = self.enis.get_mut(id).ok_or_else(|| no_eni(&[id]))?;
        eni.instance = Some(instance.to_owned());
        eni.device_index = index;
        let mut x = Xml::default();
        x.text("attachmentId", &id.replacen("eni-", "eni-attach-", 1));
        Ok(x)
    }

    fn assign_ipv4(&mut self, p: &Params) -> Answer {
        let id = p.need("NetworkInterfaceId")?;
        let eni = self.enis.get(id).ok_or_else(|| no_eni(&[id]))?;
        let subnet = self.subnets.get(&eni.subnet).cloned().unwrap_or_default();
        let (mut ips, mut prefixes) = (Vec::new(), Vec::new());
        for text in p.strings("PrivateIpAddress") {
            let ip: Ipv4Addr =
                text.parse().map_err(|_| AwsError::value(format!("Invalid IPv4 address: {text}")))?;
            if !eni.private_ips.contains(&ip) {
                self.taken(&subnet, ip)?;
                ips.push(ip);
            }
        }
        for text in p.strings("Ipv4Prefix") {
            prefixes.push(prefix_28(text)?);
        }
        let count = p.number("SecondaryPrivateIpAddressCount")?.unwrap_or(0);
        if let Some(eni) = self.enis.get_mut(id) {
            eni.private_ips.extend(&ips);
            eni.prefixes.extend(&prefixes);
        }
        for _ in 0..count.clamp(0, 256) {
            let ip = self.free_ip(&subnet)?;
            ips.push(ip);
            if let Some(eni) = self.enis.get_mut(id) {
                eni.private_ips.push(ip);
            }
        }
        let mut x = done();
        x.text("networkInterfaceId", id);
        x.each("assignedPrivateIpAddressesSet", "item", &ips, |x, ip| x.val("privateIpAddress", ip));
        x.each("assignedIpv4PrefixSet", "item", &prefixes, |x, p| x.val("ipv4Prefix", p));
        Ok(x)
    }

    fn unassign_ipv4(&mut self, p: &Params) -> Answer {
        let id = p.need("NetworkInterfaceId")?;
        let ips = p.strings("PrivateIpAddress");
        let prefixes = p.strings("Ipv4Prefix");
        let eni = self.enis.get_mut(id).ok_or_else(|| no_eni(&[id]))?;
        eni.private_ips.retain(|ip| !ips.contains(&ip.to_string().as_str()));
        eni.prefixes.retain(|net| !prefixes.contains(&net.to_string().as_str()));
        Ok(done())
    }

    fn assign_ipv6(&mut self, p: &Params) -> Answer {
        let id = p.need("NetworkInterfaceId")?;
        let eni = self.enis.get(id).ok_or_else(|| no_eni(&[id]))?;
        let subnet = self.subnets.get(&eni.subnet).cloned().unwrap_or_default();
        let (mut ips, mut prefixes) = (Vec::new(), Vec::new());
        for text in p.strings("Ipv6Addresses") {
            ips.push(text.parse().map_err(|_| AwsError::value(format!("Invalid IPv6 address: {text}")))?);
        }
        for text in p.strings("Ipv6Prefix") {
            prefixes.push(prefix_80(text)?);
        }
        if let Some(eni) = self.enis.get_mut(id) {
            eni.ipv6.extend(&ips);
            eni.ipv6_prefixes.extend(&prefixes);
        }
        for _ in 0..p.number("Ipv6AddressCount")?.unwrap_or(0).clamp(0, 256) {
            ips.push(self.add_ipv6(id, &subnet)?);
        }
        let mut x = Xml::default();
        x.text("networkInterfaceId", id);
        x.each("assignedIpv6Addresses", "item", &ips, |x, ip| x.escape(&ip.to_string()));
        x.each("assignedIpv6PrefixSet", "item", &prefixes, |x, p| x.escape(&p.to_string()));
        Ok(x)
    }

    fn modify_eni(&mut self, p: &Params) -> Answer {
        let id = p.need("NetworkInterfaceId")?;
        let groups: Vec<String> = p.strings("SecurityGroupId").into_iter().map(str::to_owned).collect();
        if let Some(bad) = groups.iter().find(|g| !self.security_groups.contains_key(*g)) {
            return Err(no_group(bad));
        }
        self.interface_quota(&groups)?;
        let eni = self.enis.get_mut(id).ok_or_else(|| no_eni(&[id]))?;
        if !groups.is_empty() {
            eni.groups = groups;
        }
        Ok(done())
    }

    fn create_group(&mut self, p: &Params) -> Answer {
        let name = p.need("GroupName")?;
        let description = p.need("GroupDescription")?;
        if name.starts_with("sg-") || name.len() > 255 {
            return Err(AwsError::value(format!(
                "Value ({name}) for parameter GroupName is invalid. Group names may not be in the format sg-*"
            )));
        }
        check_description(description)?;
        let vpc = match p.get("VpcId") {
            Some(id) if self.vpcs.contains_key(id) => id.to_owned(),
            Some(id) => return Err(no_vpc(id)),
            None => self
                .vpcs
                .values()
                .find(|v| v.is_default)
                .map(|v| v.id.clone())
                .ok_or_else(|| AwsError::new("VPCIdNotSpecified", "No default VPC for this user"))?,
        };
        if self.security_groups.values().any(|g| g.vpc == vpc && g.name.eq_ignore_ascii_case(name)) {
            return Err(AwsError::new(
                "InvalidGroup.Duplicate",
                format!("The security group '{name}' already exists for VPC '{vpc}'"),
            ));
        }
        if self.security_groups.len() >= self.quotas.security_groups {
            return Err(AwsError::new(
                "SecurityGroupLimitExceeded",
                "The maximum number of security groups has been reached.",
            ));
        }
        let tags = tag_specification(p, "security-group")?;
        let id = self.new_id("sg");
        self.add_security_group(&id, &vpc, name, tags.clone());
        if let Some(group) = self.security_groups.get_mut(&id) {
            group.description = description.to_owned();
        }
        let mut x = done();
        x.text("groupId", &id);
        tags_xml(&mut x, &tags);
        x.text("securityGroupArn", &self.group_arn_of(&id));
        Ok(x)
    }

    fn group_arn_of(&self, id: &str) -> String {
        format!("arn:{}:ec2:{}:{}:security-group/{id}", self.partition(), self.region, self.account)
    }

    fn delete_group(&mut self, p: &Params) -> Answer {
        let id = p.get("GroupId").ok_or_else(|| AwsError::missing("groupId"))?;
        let group = self.security_groups.get(id).ok_or_else(|| no_group(id))?;
        if group.name == "default" {
            return Err(AwsError::new(
                "CannotDelete",
                format!("the specified group: \"{id}\" name: \"default\" cannot be deleted by a user"),
            ));
        }
        let referenced = self
            .security_groups
            .values()
            .filter(|g| g.id != id)
            .any(|g| g.rules.iter().any(|r| matches!(&r.source, Source::Group(other, _) if other == id)));
        let used = self.enis.values().any(|e| e.groups.iter().any(|g| g == id))
            || self.load_balancers.values().any(|l| l.groups.iter().any(|g| g == id));
        if referenced || used {
            return Err(AwsError::new(
                "DependencyViolation",
                format!("resource {id} has a dependent object"),
            ));
        }
        self.security_groups.remove(id);
        let mut x = done();
        x.text("groupId", id);
        Ok(x)
    }

    fn describe_groups(&self, p: &Params) -> Answer {
        let missing = |ids: &[&str]| match ids {
            [id] => no_group(id),
            ids => AwsError::new(
                "InvalidGroup.NotFound",
                format!("The security groups '{}' do not exist", ids.join(", ")),
            ),
        };
        let names = p.strings("GroupName");
        let mut all = self.select(p, "GroupId", &self.security_groups, missing, |g, name| {
            let rules = |f: fn(&Rule) -> Option<String>| {
                Some(g.rules.iter().filter(|r| !r.egress).filter_map(f).map(Cow::Owned).collect())
            };
            match name {
                "group-id" => one(&g.id),
                "group-name" => one(&g.name),
                "description" => one(&g.description),
                "vpc-id" => one(&g.vpc),
                "owner-id" => one(&self.account),
                "ip-permission.cidr" => rules(|r| match &r.source {
                    Source::Ipv4(net) => Some(net.to_string()),
                    _ => None,
                }),
                "ip-permission.ipv6-cidr" => rules(|r| match &r.source {
                    Source::Ipv6(net) => Some(net.to_string()),
                    _ => None,
                }),
                "ip-permission.group-id" => rules(|r| match &r.source {
                    Source::Group(id, _) => Some(id.clone()),
                    _ => None,
                }),
                "ip-permission.prefix-list-id" => rules(|r| match &r.source {
                    Source::PrefixList(id) => Some(id.clone()),
                    _ => None,
                }),
                "ip-permission.protocol" => rules(|r| Some(r.protocol.clone())),
                "ip-permission.from-port" => rules(|r| Some(r.from.to_string())),
                "ip-permission.to-port" => rules(|r| Some(r.to.to_string())),
                _ => by_tag(&g.tags, name),
            }
        })?;
        all.retain(|g| names.is_empty() || names.contains(&g.name.as_str()));
        if all.is_empty()
            && let Some(name) = names.first()
        {
            return Err(no_group(name));
        }
        paged(p, "GroupId", "securityGroupInfo", &all, |x, g| {
            x.text("ownerId", &self.account);
            x.text("groupId", &g.id);
            x.text("groupName", &g.name);
            x.text("groupDescription", &g.description);
            x.text("vpcId", &g.vpc);
            x.text("securityGroupArn", &self.group_arn_of(&g.id));
            for (name, egress) in [("ipPermissions", false), ("ipPermissionsEgress", true)] {
                let rules: Vec<&Rule> = g.rules.iter().filter(|r| r.egress == egress).collect();
                permissions_xml(x, name, &rules);
            }
            tags_xml(x, &g.tags);
        })
    }

    fn describe_rules_of_groups(&self, p: &Params) -> Answer {
        let mut rules: std::collections::BTreeMap<String, (&SecurityGroup, &Rule)> =
            std::collections::BTreeMap::new();
        for group in self.security_groups.values() {
            for rule in &group.rules {
                rules.insert(rule.id.clone(), (group, rule));
            }
        }
        for id in p.strings("SecurityGroupRuleId") {
            check_rule_id(id)?;
        }
        let all = self.select(p, "SecurityGroupRuleId", &rules, no_rule, |(g, r), name| match name {
            "group-id" => one(&g.id),
            "security-group-rule-id" => one(&r.id),
            _ => by_tag(&r.tags, name),
        })?;
        paged(p, "SecurityGroupRuleId", "securityGroupRuleSet", &all, |x, (g, r)| self.rule_xml(x, &g.id, r))
    }

    fn rule_xml(&self, x: &mut Xml, group: &str, r: &Rule) {
        x.text("securityGroupRuleId", &r.id);
        x.text(
            "securityGroupRuleArn",
            &format!(
                "arn:{}:ec2:{}:{}:security-group-rule/{}",
                self.partition(),
                self.region,
                self.account,
                r.id
            ),
        );
        x.text("groupId", group);
        x.text("groupOwnerId", &self.account);
        x.val("isEgress", r.egress);
        x.text("ipProtocol", &r.protocol);
        x.val("fromPort", r.from);
        x.val("toPort", r.to);
        match &r.source {
            Source::Ipv4(net) => x.val("cidrIpv4", net),
            Source::Ipv6(net) => x.val("cidrIpv6", net),
            Source::PrefixList(id) => x.text("prefixListId", id),
            Source::Group(id, owner) => x.el("referencedGroupInfo", |x| {
                x.text("groupId", id);
                x.text("userId", owner);
                if let Some(g) = self.security_groups.get(id) {
                    x.text("vpcId", &g.vpc);
                }
            }),
        }
        x.opt("description", r.description.as_deref());
        tags_xml(x, &r.tags);
    }

    /// The rules of `IpPermissions`, and of the flat parameters of the default way.
    fn permissions(&self, p: &Params, egress: bool) -> Result<Vec<Rule>, AwsError> {
        let mut rules: Vec<Rule> = Vec::new();
        let flat = (p.get("IpProtocol").is_some() || p.get("CidrIp").is_some()).then_some(p);
        for permission in p.list("IpPermissions").into_iter().chain(flat) {
            let protocol =
                protocol_name(permission.get("IpProtocol").ok_or_else(|| AwsError::missing("ipProtocol"))?)?;
            let (from, to) = ports(permission, &protocol)?;
            let mut sources: Vec<(Source, Option<String>)> = Vec::new();
            let described = |item: &Params| -> Result<Option<String>, AwsError> {
                let text = item.get("Description");
                text.map(|t| check_description(t).map(|()| t.to_owned())).transpose()
            };
            for item in permission.list("IpRanges") {
                sources.push((Source::Ipv4(ipv4_block(item.need("CidrIp")?)?), described(item)?));
            }
            if let Some(cidr) = permission.get("CidrIp") {
                sources.push((Source::Ipv4(ipv4_block(cidr)?), None));
            }
            for item in permission.list("Ipv6Ranges") {
                sources.push((Source::Ipv6(ipv6_block(item.need("CidrIpv6")?)?), described(item)?));
            }
            for item in permission.list("PrefixListIds") {
                let id = item.need("PrefixListId")?;
                if !self.prefix_lists.contains_key(id) {
                    return Err(AwsError::new(
                        "InvalidPrefixListID.NotFound",
                        format!("The prefix list ID '{id}' does not exist"),
                    ));
                }
                sources.push((Source::PrefixList(id.to_owned()), described(item)?));
            }
            for item in permission.list("Groups") {
                let owner = item.get("UserId").unwrap_or(&self.account).to_owned();
                let id = match (item.get("GroupId"), item.get("GroupName")) {
                    (Some(id), _) => id.to_owned(),
                    (None, Some(name)) => self
                        .security_groups
                        .values()
                        .find(|g| g.name == name)
                        .map(|g| g.id.clone())
                        .ok_or_else(|| no_group(name))?,
                    (None, None) => return Err(AwsError::missing("groupId")),
                };
                sources.push((Source::Group(id, owner), described(item)?));
            }
            if sources.is_empty() {
                return Err(AwsError::new(
                    "InvalidPermission.Malformed",
                    "The permission must contain at least one source",
                ));
            }
            for (source, description) in sources {
                let rule = Rule {
                    id: String::new(),
                    egress,
                    protocol: protocol.clone(),
                    from,
                    to,
                    source,
                    description,
                    tags: Tags::new(),
                };
                if rules.iter().any(|r| r.same(&rule)) {
                    return Err(AwsError::value("The same permission must not appear multiple times"));
                }
                rules.push(rule);
            }
        }
        Ok(rules)
    }

    fn rule_group<'a>(&self, p: &'a Params) -> Result<&'a str, AwsError> {
        let id = p.get("GroupId").ok_or_else(|| AwsError::missing("groupId"))?;
        if !id.starts_with("sg-") {
            return Err(AwsError::new(
                "InvalidGroupId.Malformed",
                format!("Invalid id: \"{id}\" (expecting \"sg-...\")"),
            ));
        }
        if self.security_groups.contains_key(id) { Ok(id) } else { Err(no_group(id)) }
    }

    fn authorize(&mut self, p: &Params, egress: bool) -> Answer {
        let id = self.rule_group(p)?;
        let mut rules = self.permissions(p, egress)?;
        if rules.is_empty() {
            return Err(AwsError::missing("ipPermissions"));
        }
        let tags = tag_specification(p, "security-group-rule")?;
        let group = self.security_groups.get(id).ok_or_else(|| no_group(id))?;
        for rule in &rules {
            if let Source::Group(other, owner) = &rule.source
                && *owner == self.account
            {
                let there = self.security_groups.get(other).ok_or_else(|| no_group(other))?;
                let is_peer = |(a, b): &(String, String)| {
                    (*a == there.vpc && *b == group.vpc) || (*b == there.vpc && *a == group.vpc)
                };
                if there.vpc != group.vpc && !self.peerings.iter().any(is_peer) {
                    return Err(AwsError::new(
                        "InvalidGroup.NotFound",
                        "You have specified two resources that belong to different networks.",
                    ));
                }
            }
            if group.rules.iter().any(|r| r.same(rule)) {
                return Err(AwsError::new(
                    "InvalidPermission.Duplicate",
                    format!("the specified rule \"{}\" already exists", peer(rule)),
                ));
            }
        }
        self.rule_quota(group, &rules, egress)?;
        for rule in &mut rules {
            rule.id = self.new_id("sgr");
            rule.tags.clone_from(&tags);
        }
        let mut x = done();
        x.each("securityGroupRuleSet", "item", &rules, |x, r| self.rule_xml(x, id, r));
        if let Some(group) = self.security_groups.get_mut(id) {
            group.rules.extend(rules);
        }
        Ok(x)
    }

    /// How many rules of each family there are: references count in both, prefix lists with their size.
    fn rule_quota(&self, group: &SecurityGroup, new: &[Rule], egress: bool) -> Result<(), AwsError> {
        let (mut ipv4, mut ipv6) = (0, 0);
        for rule in group.rules.iter().chain(new).filter(|r| r.egress == egress) {
            let weight = match &rule.source {
                Source::PrefixList(id) => self.prefix_lists.get(id).copied().unwrap_or(1),
                _ => 1,
            };
            ipv4 += if matches!(rule.source, Source::Ipv6(_)) { 0 } else { weight };
            ipv6 += if matches!(rule.source, Source::Ipv4(_)) { 0 } else { weight };
        }
        if ipv4.max(ipv6) > self.quotas.rules_per_group {
            return Err(AwsError::new(
                "RulesPerSecurityGroupLimitExceeded",
                "The maximum number of rules per security group has been reached.",
            ));
        }
        Ok(())
    }

    fn revoke(&mut self, p: &Params, egress: bool) -> Answer {
        let id = self.rule_group(p)?;
        let ids = p.strings("SecurityGroupRuleId");
        let wanted = self.permissions(p, egress)?;
        let group = self.security_groups.get(id).ok_or_else(|| no_group(id))?;
        let lenient = self.vpcs.get(&group.vpc).is_some_and(|v| v.is_default);
        let mut gone: Vec<&str> = Vec::new();
        for rule in ids {
            check_rule_id(rule)?;
            let found = group.rules.iter().find(|r| r.id == rule && r.egress == egress);
            gone.push(&found.ok_or_else(|| no_rule(&[rule]))?.id);
        }
        let mut unknown: Vec<&Rule> = Vec::new();
        for rule in &wanted {
            let found = group.rules.iter().find(|r| {
                r.same(rule) && rule.description.as_ref().is_none_or(|d| Some(d) == r.description.as_ref())
            });
            match found {
                Some(found) => gone.push(&found.id),
                None => unknown.push(rule),
            }
        }
        if !unknown.is_empty() && !lenient {
            return Err(AwsError::new(
                "InvalidPermission.NotFound",
                "The specified rule does not exist in this security group.",
            ));
        }
        let mut x = done();
        if !unknown.is_empty() {
            permissions_xml(&mut x, "unknownIpPermissionSet", &unknown);
        }
        let revoked: Vec<&Rule> = group.rules.iter().filter(|r| gone.contains(&r.id.as_str())).collect();
        x.each("revokedSecurityGroupRuleSet", "item", &revoked, |x, r| {
            x.text("securityGroupRuleId", &r.id);
            x.text("groupId", id);
            x.val("isEgress", r.egress);
            x.text("ipProtocol", &r.protocol);
            x.val("fromPort", r.from);
            x.val("toPort", r.to);
            match &r.source {
                Source::Ipv4(net) => x.val("cidrIpv4", net),
                Source::Ipv6(net) => x.val("cidrIpv6", net),
                Source::PrefixList(id) => x.text("prefixListId", id),
                Source::Group(id, _) => x.text("referencedGroupId", id),
            }
            x.opt("description", r.description.as_deref());
        });
        let gone: Vec<String> = gone.into_iter().map(str::to_owned).collect();
        if let Some(group) = self.security_groups.get_mut(id) {
            group.rules.retain(|r| !gone.contains(&r.id));
        }
        Ok(x)
    }

    fn modify_rules(&mut self, p: &Params) -> Answer {
        let id = self.rule_group(p)?;
        let group = self.security_groups.get(id).ok_or_else(|| no_group(id))?;
        let mut rules = group.rules.clone();
        for item in p.list("SecurityGroupRule") {
            let rule_id = item.need("SecurityGroupRuleId")?;
            check_rule_id(rule_id)?;
            let new =
                item.child("SecurityGroupRule").ok_or_else(|| AwsError::missing("SecurityGroupRule"))?;
            let at = rules.iter().position(|r| r.id == rule_id).ok_or_else(|| no_rule(&[rule_id]))?;
            let Some(old) = rules.get(at).cloned() else { continue };
            let mut rule = old.clone();
            let protocol =
                protocol_name(new.get("IpProtocol").ok_or_else(|| AwsError::missing("IpProtocol"))?)?;
            (rule.from, rule.to) = ports(new, &protocol)?;
            rule.protocol = protocol;
            let sources = [
                new.get("CidrIpv4").map(|c| ipv4_block(c).map(Source::Ipv4)),
                new.get("CidrIpv6").map(|c| ipv6_block(c).map(Source::Ipv6)),
                new.get("PrefixListId").map(|c| Ok(Source::PrefixList(c.to_owned()))),
                new.get("ReferencedGroupId").map(|c| Ok(Source::Group(c.to_owned(), self.account.clone()))),
            ];
            let mut sources = sources.into_iter().flatten();
            rule.source = match (sources.next(), sources.next()) {
                (Some(source), None) => source?,
                _ => {
                    return Err(AwsError::new(
                        "InvalidParameterCombination",
                        "Exactly one of CidrIpv4, CidrIpv6, PrefixListId and ReferencedGroupId must be specified",
                    ));
                }
            };
            if std::mem::discriminant(&rule.source) != std::mem::discriminant(&old.source) {
                return Err(AwsError::value(
                    "You cannot change the type of the source of a security group rule",
                ));
            }
            if let Source::Group(other, _) = &rule.source
                && !self.security_groups.contains_key(other)
            {
                return Err(no_group(other));
            }
            if let Some(text) = new.raw("Description") {
                check_description(text)?;
                rule.description = Some(text.to_owned()).filter(|t| !t.is_empty());
            } else {
                rule.description = None;
            }
            if rules.iter().any(|r| r.id != rule_id && r.same(&rule)) {
                return Err(AwsError::new(
                    "InvalidPermission.Duplicate",
                    format!("the specified rule \"{}\" already exists", peer(&rule)),
                ));
            }
            if let Some(place) = rules.get_mut(at) {
                *place = rule;
            }
        }
        if let Some(group) = self.security_groups.get_mut(id) {
            group.rules = rules;
        }
        Ok(done())
    }

    fn tags_of_mut(&mut self, id: &str) -> Option<&mut Tags> {
        match id.split('-').next()? {
            "vpc" => self.vpcs.get_mut(id).map(|r| &mut r.tags),
            "subnet" => self.subnets.get_mut(id).map(|r| &mut r.tags),
            "i" => self.instances.get_mut(id).map(|r| &mut r.tags),
            "eni" => self.enis.get_mut(id).map(|r| &mut r.tags),
            "sg" => self.security_groups.get_mut(id).map(|r| &mut r.tags),
            "sgr" => self
                .security_groups
                .values_mut()
                .flat_map(|g| g.rules.iter_mut())
                .find(|r| r.id == id)
                .map(|r| &mut r.tags),
            _ => None,
        }
    }

    fn change_tags(&mut self, p: &Params, add: bool) -> Answer {
        let ids = p.strings("ResourceId");
        let tags = p.list("Tag");
        for id in &ids {
            if self.tags_of_mut(id).is_none() {
                return Err(AwsError::new("InvalidID", format!("The ID '{id}' is not valid")));
            }
        }
        for id in ids {
            let Some(there) = self.tags_of_mut(id) else { continue };
            if !add && tags.is_empty() {
                there.clear();
            }
            for tag in &tags {
                let key = tag.need("Key")?;
                match (add, tag.raw("Value")) {
                    (true, value) => {
                        there.insert(key.to_owned(), value.unwrap_or_default().to_owned());
                    }
                    (false, None) => {
                        there.remove(key);
                    }
                    (false, Some(value)) => {
                        if there.get(key).is_some_and(|v| v == value) {
                            there.remove(key);
                        }
                    }
                }
            }
        }
        Ok(done())
    }

    fn describe_tags(&self, p: &Params) -> Answer {
        type Row<'a> = (&'a str, &'static str, &'a str, &'a str);
        let mut rows: std::collections::BTreeMap<String, Row<'_>> = std::collections::BTreeMap::new();
        fn rows_of<'a>(
            rows: &mut std::collections::BTreeMap<String, (&'a str, &'static str, &'a str, &'a str)>,
            id: &'a str,
            kind: &'static str,
            tags: &'a Tags,
        ) {
            for (k, v) in tags {
                rows.insert(format!("{id}/{k}"), (id, kind, k, v));
            }
        }
        self.vpcs.values().for_each(|r| rows_of(&mut rows, &r.id, "vpc", &r.tags));
        self.subnets.values().for_each(|r| rows_of(&mut rows, &r.id, "subnet", &r.tags));
        self.instances.values().for_each(|r| rows_of(&mut rows, &r.id, "instance", &r.tags));
        self.enis.values().for_each(|r| rows_of(&mut rows, &r.id, "network-interface", &r.tags));
        for group in self.security_groups.values() {
            rows_of(&mut rows, &group.id, "security-group", &group.tags);
            group.rules.iter().for_each(|r| rows_of(&mut rows, &r.id, "security-group-rule", &r.tags));
        }
        let all = self.select(p, "NoId", &rows, no_rule, |(id, kind, key, value), name| match name {
            "resource-id" => one(id),
            "resource-type" => one(kind),
            "key" => one(key),
            "value" => one(value),
            _ => None,
        })?;
        paged(p, "NoId", "tagSet", &all, |x, (id, kind, key, value)| {
            x.text("resourceId", id);
            x.text("resourceType", kind);
            x.text("key", key);
            x.text("value", value);
        })
    }

    fn describe_zones(&self, p: &Params) -> Answer {
        let names = p.strings("ZoneName");
        let ids = p.strings("ZoneId");
        let zones = self.zones();
        if let Some(bad) = names.iter().find(|n| !zones.iter().any(|z| z == *n)) {
            return Err(AwsError::value(format!("Invalid availability zone: [{bad}]")));
        }
        let rows: std::collections::BTreeMap<String, String> = zones
            .into_iter()
            .map(|z| (z.clone(), self.zone_id(&z)))
            .filter(|(z, id)| names.is_empty() || names.contains(&z.as_str()) || ids.contains(&id.as_str()))
            .filter(|(_, id)| ids.is_empty() || ids.contains(&id.as_str()))
            .collect();
        let all = self.select(p, "NoId", &rows, no_rule, |id, name| match name {
            "state" => one("available"),
            "zone-type" => one("availability-zone"),
            "region-name" => one(&self.region),
            "opt-in-status" => one("opt-in-not-required"),
            "zone-id" => one(id),
            "zone-name" => rows.iter().find(|(_, i)| *i == id).and_then(|(z, _)| one(z)),
            _ => None,
        })?;
        let mut x = Xml::default();
        x.each("availabilityZoneInfo", "item", all, |x, id| {
            let zone = rows.iter().find(|(_, i)| *i == id).map_or("", |(z, _)| z.as_str());
            x.text("optInStatus", "opt-in-not-required");
            x.text("groupName", &format!("{}-zg-1", self.region));
            x.text("networkBorderGroup", &self.region);
            x.text("zoneType", "availability-zone");
            x.text("zoneName", zone);
            x.text("zoneId", id);
            x.text("zoneState", "available");
            x.text("regionName", &self.region);
        });
        Ok(x)
    }

    fn describe_regions(&self) -> Xml {
        let mut x = Xml::default();
        x.each("regionInfo", "item", [&self.region], |x, region| {
            x.text("regionName", region);
            x.text("regionEndpoint", &format!("ec2.{region}.amazonaws.com"));
            x.text("optInStatus", "opt-in-not-required");
        });
        x
    }

    /// The resources of the ids, or all, that pass the filters.
    fn select<'a, T>(
        &self,
        p: &Params,
        id_name: &str,
        all: &'a std::collections::BTreeMap<String, T>,
        missing: impl Fn(&[&str]) -> AwsError,
        field: impl Fn(&'a T, &str) -> Option<Vec<Cow<'a, str>>>,
    ) -> Result<Vec<&'a T>, AwsError> {
        let filters = Filters::of(p)?;
        let ids = p.strings(id_name);
        if !ids.is_empty() {
            if p.get("MaxResults").is_some() {
                return Err(AwsError::new(
                    "InvalidParameterCombination",
                    "The parameter MaxResults cannot be used with the parameter ids",
                ));
            }
            let absent: Vec<&str> = ids.iter().copied().filter(|id| !all.contains_key(*id)).collect();
            if !absent.is_empty() {
                return Err(missing(&absent));
            }
        }
        let mut found = Vec::new();
        for (id, item) in all {
            if (ids.is_empty() || ids.contains(&id.as_str())) && filters.pass(|name| field(item, name))? {
                found.push(item);
            }
        }
        Ok(found)
    }
}

/// The filters of a request: OR within, AND across.
struct Filters<'a>(Vec<(&'a str, HashSet<&'a str>, Vec<&'a str>)>);

impl<'a> Filters<'a> {
    fn of(p: &'a Params) -> Result<Self, AwsError> {
        let list = p.list("Filter");
        let mut count = 0;
        let mut filters = Vec::new();
        if list.len() > 50 {
            return Err(AwsError::new("FilterLimitExceeded", "The maximum number of filters is 50"));
        }
        for filter in list {
            let name = filter.need("Name")?;
            let values = filter.strings("Value");
            count += values.len();
            if values.is_empty() {
                return Err(AwsError::value(format!("The filter '{name}' has no values")));
            }
            if name == "vpc-id" && values.contains(&"") {
                return Err(AwsError::value("vpc-id"));
            }
            if values.iter().any(|v| v.chars().count() > 255) {
                return Err(AwsError::value(format!(
                    "A value of the filter '{name}' is longer than 255 characters"
                )));
            }
            let (patterns, plain): (Vec<&str>, Vec<&str>) =
                values.into_iter().partition(|v| v.contains(['*', '?']));
            filters.push((name, plain.into_iter().collect(), patterns));
        }
        if count > 200 {
            return Err(AwsError::new(
                "FilterLimitExceeded",
                "The maximum number of filter values specified on a single call is 200",
            ));
        }
        Ok(Self(filters))
    }

    fn pass<'b>(&self, field: impl Fn(&str) -> Option<Vec<Cow<'b, str>>>) -> Result<bool, AwsError> {
        for (name, plain, patterns) in &self.0 {
            let values =
                field(name).ok_or_else(|| AwsError::value(format!("The filter '{name}' is invalid")))?;
            let hit = values
                .iter()
                .any(|v| plain.contains(v.as_ref()) || patterns.iter().any(|pattern| glob(pattern, v)));
            if !hit {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn one<'a>(text: &'a str) -> Option<Vec<Cow<'a, str>>> {
    Some(vec![text.into()])
}

fn texts<'a, T: ToString>(items: impl IntoIterator<Item = T>) -> Option<Vec<Cow<'a, str>>> {
    Some(items.into_iter().map(|i| Cow::Owned(i.to_string())).collect())
}

fn by_tag<'a>(tags: &'a Tags, name: &str) -> Option<Vec<Cow<'a, str>>> {
    match name {
        "tag-key" => Some(tags.keys().map(|k| k.as_str().into()).collect()),
        "tag-value" => Some(tags.values().map(|v| v.as_str().into()).collect()),
        _ => {
            let key = name.strip_prefix("tag:")?;
            Some(tags.get(key).map(|v| v.as_str().into()).into_iter().collect())
        }
    }
}

/// One page by `MaxResults` and `NextToken`.
fn paged<T>(p: &Params, _ids: &str, set: &str, all: &[T], mut item: impl FnMut(&mut Xml, &T)) -> Answer {
    let start: usize = match p.get("NextToken") {
        None => 0,
        Some(token) => token
            .strip_prefix("awsim-")
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| AwsError::new("InvalidNextToken", "The token is not valid"))?,
    };
    let rest = all.get(start..).unwrap_or_default();
    let size = match p.number("MaxResults")? {
        None => rest.len(),
        Some(n) => usize::try_from(n).ok().filter(|n| (5..=1000).contains(n)).ok_or_else(|| {
            AwsError::value(format!(
                "Value ( {n} ) for parameter maxResults is invalid. Expecting a value between 5 and 1000."
            ))
        })?,
    };
    let page = rest.get(..size).unwrap_or(rest);
    let mut x = Xml::default();
    x.each(set, "item", page, |x, i| item(x, i));
    if page.len() < rest.len() {
        x.text("nextToken", &format!("awsim-{}", start + page.len()));
    }
    Ok(x)
}

fn done() -> Xml {
    let mut x = Xml::default();
    x.text("return", "true");
    x
}

fn association(vpc: &str, n: usize) -> String {
    format!("{}{n}", vpc.replacen("vpc-", "vpc-cidr-assoc-", 1))
}

fn tags_xml(x: &mut Xml, tags: &Tags) {
    if tags.is_empty() {
        return;
    }
    x.each("tagSet", "item", tags, |x, (k, v)| {
        x.text("key", k);
        x.text("value", v);
    });
}

fn tag_specification(p: &Params, kind: &str) -> Result<Tags, AwsError> {
    let mut tags = Tags::new();
    for spec in p.list("TagSpecification") {
        if spec.get("ResourceType") != Some(kind) {
            continue;
        }
        for tag in spec.list("Tag") {
            let key = tag.need("Key")?;
            if tags.insert(key.to_owned(), tag.raw("Value").unwrap_or_default().to_owned()).is_some() {
                return Err(AwsError::value(format!("Duplicate tag key '{key}' specified.")));
            }
        }
    }
    Ok(tags)
}

fn no_vpc(id: &str) -> AwsError {
    AwsError::new("InvalidVpcID.NotFound", format!("The vpc ID '{id}' does not exist"))
}

fn no_group(id: &str) -> AwsError {
    AwsError::new("InvalidGroup.NotFound", format!("The security group '{id}' does not exist"))
}

fn no_instance(ids: &[&str]) -> AwsError {
    let text = match ids {
        [id] => format!("The instance ID '{id}' does not exist"),
        ids => format!("The instance IDs '{}' do not exist", ids.join(", ")),
    };
    AwsError::new("InvalidInstanceID.NotFound", text)
}

fn no_eni(ids: &[&str]) -> AwsError {
    AwsError::new(
        "InvalidNetworkInterfaceID.NotFound",
        format!("The networkInterface ID '{}' does not exist", ids.join(", ")),
    )
}

fn no_rule(ids: &[&str]) -> AwsError {
    AwsError::new(
        "InvalidSecurityGroupRuleId.NotFound",
        format!("The security group rule ID '{}' does not exist", ids.join(", ")),
    )
}

fn check_rule_id(id: &str) -> Result<(), AwsError> {
    if id.strip_prefix("sgr-").is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Ok(());
    }
    Err(AwsError::new(
        "InvalidSecurityGroupRuleId.Malformed",
        format!("Invalid id: \"{id}\" (expecting \"sgr-...\")"),
    ))
}

fn check_description(text: &str) -> Result<(), AwsError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || " ._-:/()#,@[]+=&;{}!$*".contains(c);
    if text.len() <= 255 && text.chars().all(fine) {
        return Ok(());
    }
    Err(AwsError::value(
        "Invalid rule description. Valid descriptions are strings less than 256 characters from the following set:  a-zA-Z0-9. _-:/()#,@[]+=&;{}!$*",
    ))
}

fn protocol_name(text: &str) -> Result<String, AwsError> {
    Ok(match text {
        "6" => "tcp".to_owned(),
        "17" => "udp".to_owned(),
        "1" => "icmp".to_owned(),
        "58" => "icmpv6".to_owned(),
        "all" => "-1".to_owned(),
        "tcp" | "udp" | "icmp" | "icmpv6" | "-1" => text.to_owned(),
        other => match other.parse::<u8>() {
            Ok(n) => n.to_string(),
            Err(_) => {
                return Err(AwsError::new(
                    "InvalidPermission.Malformed",
                    format!("Unsupported IP protocol \"{other}\" - supported: [tcp, udp, icmp, icmpv6]"),
                ));
            }
        },
    })
}

fn ports(p: &Params, protocol: &str) -> Result<(i64, i64), AwsError> {
    let (from, to) = (p.number("FromPort")?, p.number("ToPort")?);
    match protocol {
        "tcp" | "udp" => {
            let (Some(from), Some(to)) = (from, to) else {
                return Err(AwsError::value(
                    "Invalid value 'Must specify both from and to ports with TCP/UDP.' for portRange.",
                ));
            };
            if from > to || !(0..=65_535).contains(&from) || !(0..=65_535).contains(&to) {
                return Err(AwsError::value(format!(
                    "Invalid TCP range: {from} to {to}. Valid TCP port numbers are 0 - 65535"
                )));
            }
            Ok((from, to))
        }
        "icmp" | "icmpv6" => Ok((from.unwrap_or(-1), to.unwrap_or(-1))),
        _ => Ok((-1, -1)),
    }
}

fn ipv4_block(text: &str) -> Result<Ipv4Net, AwsError> {
    text.parse::<Ipv4Net>()
        .map(|n| n.trunc())
        .map_err(|_| AwsError::value(format!("CIDR block {text} is malformed")))
}

fn ipv6_block(text: &str) -> Result<Ipv6Net, AwsError> {
    text.parse::<Ipv6Net>()
        .map(|n| n.trunc())
        .map_err(|_| AwsError::value(format!("CIDR block {text} is malformed")))
}

fn prefix_28(text: &str) -> Result<Ipv4Net, AwsError> {
    text.parse::<Ipv4Net>()
        .ok()
        .filter(|n| n.prefix_len() == 28)
        .ok_or_else(|| AwsError::value(format!("The prefix '{text}' must be a /28 block")))
}

fn prefix_80(text: &str) -> Result<Ipv6Net, AwsError> {
    text.parse::<Ipv6Net>()
        .ok()
        .filter(|n| n.prefix_len() == 80)
        .ok_or_else(|| AwsError::value(format!("The prefix '{text}' must be a /80 block")))
}

/// A rule in the words of AWS's duplicate error.
fn peer(rule: &Rule) -> String {
    let source = match &rule.source {
        Source::Ipv4(net) => net.to_string(),
        Source::Ipv6(net) => net.to_string(),
        Source::PrefixList(id) | Source::Group(id, _) => id.clone(),
    };
    match rule.protocol.as_str() {
        "-1" => format!("peer: {source}, ALL, ALLOW"),
        protocol => format!(
            "peer: {source}, {}, from port: {}, to port: {}, ALLOW",
            protocol.to_ascii_uppercase(),
            rule.from,
            rule.to
        ),
    }
}

/// Rules merged per protocol and ports.
fn permissions_xml(x: &mut Xml, name: &str, rules: &[&Rule]) {
    let mut merged: Vec<(&Rule, Vec<&Rule>)> = Vec::new();
    for rule in rules {
        match merged
            .iter_mut()
            .find(|(r, _)| r.protocol == rule.protocol && r.from == rule.from && r.to == rule.to)
        {
            Some((_, list)) => list.push(rule),
            None => merged.push((rule, vec![rule])),
        }
    }
    x.each(name, "item", merged, |x, (first, list)| {
        x.text("ipProtocol", &first.protocol);
        if first.protocol != "-1" {
            x.val("fromPort", first.from);
            x.val("toPort", first.to);
        }
        let mut each = |name: &str, item: fn(&mut Xml, &Source) -> bool| {
            x.el(name, |x| {
                for r in &list {
                    let mut inside = Xml::default();
                    if item(&mut inside, &r.source) {
                        inside.opt("description", r.description.as_deref());
                        x.el("item", |x| x.push(inside));
                    }
                }
            });
        };
        each("groups", |x, source| {
            let Source::Group(id, owner) = source else { return false };
            x.text("groupId", id);
            x.text("userId", owner);
            true
        });
        each("ipRanges", |x, source| {
            let Source::Ipv4(net) = source else { return false };
            x.val("cidrIp", net);
            true
        });
        each("ipv6Ranges", |x, source| {
            let Source::Ipv6(net) = source else { return false };
            x.val("cidrIpv6", net);
            true
        });
        each("prefixListIds", |x, source| {
            let Source::PrefixList(id) = source else { return false };
            x.text("prefixListId", id);
            true
        });
    });
}

/// Whether an address is on a network interface of the VPC, or in one of its prefixes.
#[must_use]
pub fn eni_of(aws: &Aws, vpc: &str, ip: IpAddr) -> Option<String> {
    aws.enis
        .values()
        .filter(|e| e.vpc == vpc)
        .find(|e| match ip {
            IpAddr::V4(ip) => e.private_ips.contains(&ip) || e.prefixes.iter().any(|p| p.contains(&ip)),
            IpAddr::V6(ip) => e.ipv6.contains(&ip) || e.ipv6_prefixes.iter().any(|p| p.contains(&ip)),
        })
        .map(|e| e.id.clone())
}
