//! Elastic Load Balancing v2: target groups, targets and their states, load balancers, listeners, tags.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use crate::state::{
    Aws, Forwards, Health, HealthCheck, InstanceState, Listener, ListenerRule, LoadBalancer, Probe, Settled,
    Tags, Target, TargetGroup, TargetId, Timing,
};
use crate::wire::{AwsError, Params, Xml, timestamp};

type Answer = Result<Xml, AwsError>;

/// What a target looks like at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetState {
    /// As in `healthy`.
    pub state: &'static str,
    /// As in `Elb.RegistrationInProgress`.
    pub reason: Option<String>,
    /// AWS's text.
    pub description: Option<String>,
}

impl TargetState {
    fn new(state: &'static str, reason: &str, description: &str) -> Self {
        Self { state, reason: Some(reason.to_owned()), description: Some(description.to_owned()) }
    }
}

impl Aws {
    /// An ELBv2 call.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn elb(&mut self, action: &str, p: &Params, now: u64) -> Answer {
        if let Some(mut past) = self.stale(action, now) {
            return past.elb(action, p, now);
        }
        match action {
            "CreateTargetGroup" => self.create_target_group(p),
            "DescribeTargetGroups" => self.describe_target_groups(p),
            "DeleteTargetGroup" => self.delete_target_group(p),
            "ModifyTargetGroup" => self.modify_target_group(p),
            "DescribeTargetGroupAttributes" => self.describe_target_group_attributes(p),
            "ModifyTargetGroupAttributes" => self.modify_target_group_attributes(p),
            "RegisterTargets" => self.register_targets(p, now),
            "DeregisterTargets" => self.deregister_targets(p, now),
            "DescribeTargetHealth" => self.describe_target_health(p, now),
            "CreateLoadBalancer" => self.create_load_balancer(p, now),
            "DescribeLoadBalancers" => self.describe_load_balancers(p, now),
            "DeleteLoadBalancer" => self.delete_load_balancer(p),
            "DescribeLoadBalancerAttributes" => self.load_balancer_attributes(p, false),
            "ModifyLoadBalancerAttributes" => self.load_balancer_attributes(p, true),
            "CreateListener" => self.create_listener(p, now),
            "ModifyListener" => self.modify_listener(p, now),
            "SetSubnets" => self.set_subnets(p),
            "SetSecurityGroups" => self.set_security_groups(p),
            "DescribeListeners" => self.describe_listeners(p),
            "DeleteListener" => self.delete_listener(p),
            "CreateRule" => self.create_rule(p, now),
            "ModifyRule" => self.modify_rule(p, now),
            "DeleteRule" => self.delete_rule(p),
            "DescribeRules" => self.describe_rules(p),
            "AddTags" => self.add_tags(p),
            "RemoveTags" => self.remove_tags(p),
            "DescribeTags" => self.describe_elb_tags(p),
            _ => Err(unknown_action(action)),
        }
    }

    fn own_arn(&self, arn: &str, kind: &str) -> bool {
        arn.strip_prefix(&format!(
            "arn:{}:elasticloadbalancing:{}:{}:{kind}/",
            self.partition(),
            self.region,
            self.account
        ))
        .is_some_and(|rest| rest.contains('/'))
    }

    /// Checks the ownership of an ARN, then that the target group is there.
    fn group_arn<'a>(&self, p: &'a Params) -> Result<&'a str, AwsError> {
        let arn = p.need("TargetGroupArn")?;
        if !self.own_arn(arn, "targetgroup") {
            return Err(AwsError::validation(format!("'{arn}' is not a valid target group ARN")));
        }
        if !self.target_groups.contains_key(arn) {
            return Err(AwsError::new("TargetGroupNotFound", "One or more target groups not found"));
        }
        Ok(arn)
    }

    fn load_balancer_arn<'a>(&self, arn: &'a str) -> Result<&'a str, AwsError> {
        if !self.own_arn(arn, "loadbalancer") {
            return Err(AwsError::validation(format!("'{arn}' is not a valid load balancer ARN")));
        }
        if !self.load_balancers.contains_key(arn) {
            return Err(AwsError::new("LoadBalancerNotFound", "One or more load balancers not found"));
        }
        Ok(arn)
    }

    fn create_target_group(&mut self, p: &Params) -> Answer {
        let name = p.need("Name")?;
        check_name("Target group name", name)?;
        let target_type = p.get("TargetType").unwrap_or("instance");
        one_of("targetType", target_type, &["instance", "ip", "lambda", "alb"])?;
        let lambda = target_type == "lambda";
        let protocol = p.get("Protocol");
        if let Some(protocol) = protocol {
            one_of("protocol", protocol, PROTOCOLS)?;
        }
        let port = port_number(p, "Port")?;
        let vpc = p.get("VpcId");
        if lambda {
            if protocol.is_some() || port.is_some() || vpc.is_some() {
                return Err(AwsError::validation(
                    "Protocol, port and VPC ID cannot be specified for target groups with target type 'lambda'",
                ));
            }
        } else {
            if protocol.is_none() {
                return Err(AwsError::validation("A protocol must be specified"));
            }
            if port.is_none() {
                return Err(AwsError::validation("A port must be specified"));
            }
            let Some(vpc) = vpc else {
                return Err(AwsError::validation("A VPC ID must be specified"));
            };
            if !self.vpcs.contains_key(vpc) {
                return Err(AwsError::validation(format!("The VPC ID '{vpc}' is not found")));
            }
        }
        if target_type == "alb" && protocol != Some("TCP") {
            return Err(AwsError::new(
                "InvalidConfigurationRequest",
                "The protocol of a target group with target type 'alb' must be TCP",
            ));
        }
        let web = matches!(protocol, Some("HTTP" | "HTTPS"));
        let version = match (p.get("ProtocolVersion"), web) {
            (Some(v), true) => {
                one_of("protocolVersion", v, &["HTTP1", "HTTP2", "GRPC"])?;
                Some(v)
            }
            (Some(_), false) => {
                return Err(AwsError::new(
                    "InvalidConfigurationRequest",
                    "Protocol version can only be specified for target groups with protocol HTTP or HTTPS",
                ));
            }
            (None, true) => Some("HTTP1"),
            (None, false) => None,
        };
        let ip_type = p.get("IpAddressType").unwrap_or("ipv4");
        one_of("ipAddressType", ip_type, &["ipv4", "ipv6"])?;
        if ip_type == "ipv6" && (target_type == "alb" || matches!(protocol, Some("QUIC" | "TCP_QUIC"))) {
            return Err(AwsError::new("InvalidConfigurationRequest", "The IP address type must be ipv4"));
        }
        let check = health_check(p, None, protocol, target_type, version)?;
        let tags = tags_of(p)?;
        if let Some(old) = self.target_groups.values().find(|g| g.name == name) {
            let same = old.protocol.as_deref() == protocol
                && old.port == port
                && old.vpc.as_deref() == vpc
                && old.target_type == target_type
                && old.ip_type == ip_type
                && old.version.as_deref() == version
                && old.check == check
                && (tags.is_empty() || old.tags == tags);
            if !same {
                return Err(AwsError::new(
                    "DuplicateTargetGroupName",
                    format!("A target group with the same name '{name}' exists, but with different settings"),
                ));
            }
            let mut x = Xml::default();
            x.el("TargetGroups", |x| x.el("member", |x| group_xml(x, old)));
            return Ok(x);
        }
        if self.target_groups.len() >= self.quotas.target_groups {
            return Err(AwsError::new(
                "TooManyTargetGroups",
                format!(
                    "The maximum number of target groups has been reached: {}",
                    self.quotas.target_groups
                ),
            ));
        }
        let id = self.next();
        let arn = format!(
            "arn:{}:elasticloadbalancing:{}:{}:targetgroup/{name}/{id:016x}",
            self.partition(),
            self.region,
            self.account
        );
        let group = TargetGroup {
            arn: arn.clone(),
            name: name.to_owned(),
            protocol: protocol.map(str::to_owned),
            version: version.map(str::to_owned),
            port,
            vpc: vpc.map(str::to_owned),
            target_type: target_type.to_owned(),
            ip_type: ip_type.to_owned(),
            check,
            attributes: group_attributes(protocol, target_type),
            tags,
            targets: BTreeMap::new(),
            load_balancer: None,
            attached_ms: 0,
        };
        let mut x = Xml::default();
        x.el("TargetGroups", |x| x.el("member", |x| group_xml(x, &group)));
        self.target_groups.insert(arn, group);
        Ok(x)
    }

    fn describe_target_groups(&self, p: &Params) -> Answer {
        let arns = p.strings("TargetGroupArns");
        let names = p.strings("Names");
        let lb = p.get("LoadBalancerArn");
        if usize::from(!arns.is_empty()) + usize::from(!names.is_empty()) + usize::from(lb.is_some()) > 1 {
            return Err(AwsError::validation(
                "Target group ARNs, names and a load balancer ARN cannot be specified at the same time",
            ));
        }
        if arns.len() > 20 || names.len() > 20 {
            return Err(AwsError::validation("You cannot describe more than '20' target groups at a time"));
        }
        let missing = || AwsError::new("TargetGroupNotFound", "One or more target groups not found");
        let mut found: Vec<&TargetGroup> = Vec::new();
        if !arns.is_empty() {
            for arn in arns {
                if !self.own_arn(arn, "targetgroup") {
                    return Err(AwsError::validation(format!("'{arn}' is not a valid target group ARN")));
                }
                let group = self.target_groups.get(arn).ok_or_else(missing)?;
                if !found.iter().any(|f| f.arn == group.arn) {
                    found.push(group);
                }
            }
        } else if !names.is_empty() {
            for name in names {
                found.push(self.target_groups.values().find(|g| g.name == name).ok_or_else(missing)?);
            }
        } else if let Some(lb) = lb {
            self.load_balancer_arn(lb)?;
            found.extend(self.target_groups.values().filter(|g| g.load_balancer.as_deref() == Some(lb)));
        } else {
            found.extend(self.target_groups.values());
        }
        let (page, next) = page(&found, p)?;
        let mut x = Xml::default();
        x.each("TargetGroups", "member", page, |x, g| group_xml(x, g));
        x.opt("NextMarker", next.as_deref());
        Ok(x)
    }

    fn delete_target_group(&mut self, p: &Params) -> Answer {
        let arn = p.need("TargetGroupArn")?;
        if !self.own_arn(arn, "targetgroup") {
            return Err(AwsError::validation(format!("'{arn}' is not a valid target group ARN")));
        }
        if self.target_groups.get(arn).is_some_and(|g| g.load_balancer.is_some()) {
            return Err(AwsError::new(
                "ResourceInUse",
                format!("Target group '{arn}' is currently in use by a listener or a rule"),
            ));
        }
        self.target_groups.remove(arn);
        Ok(Xml::default())
    }

    fn modify_target_group(&mut self, p: &Params) -> Answer {
        let arn = self.group_arn(p)?;
        let missing = || AwsError::new("TargetGroupNotFound", "One or more target groups not found");
        let group = self.target_groups.get_mut(arn).ok_or_else(missing)?;
        let check = health_check(
            p,
            Some(&group.check),
            group.protocol.as_deref(),
            &group.target_type,
            group.version.as_deref(),
        )?;
        group.check = check;
        let mut x = Xml::default();
        x.el("TargetGroups", |x| x.el("member", |x| group_xml(x, group)));
        Ok(x)
    }

    fn describe_target_group_attributes(&self, p: &Params) -> Answer {
        let arn = self.group_arn(p)?;
        let mut x = Xml::default();
        if let Some(group) = self.target_groups.get(arn) {
            attributes_xml(&mut x, &group.attributes);
        }
        Ok(x)
    }

    fn modify_target_group_attributes(&mut self, p: &Params) -> Answer {
        let arn = self.group_arn(p)?;
        let mut x = Xml::default();
        let Some(group) = self.target_groups.get_mut(arn) else { return Ok(x) };
        let mut wanted = group.attributes.clone();
        for a in p.list("Attributes") {
            let (key, value) = (a.need("Key")?, a.raw("Value").unwrap_or_default());
            if !group.attributes.contains_key(key) {
                return Err(AwsError::validation(format!(
                    "Target group attribute key '{key}' is not recognized"
                )));
            }
            let range = match key {
                "deregistration_delay.timeout_seconds" => Some((0, 3600)),
                "target_health_state.unhealthy.draining_interval_seconds" => Some((0, 360_000)),
                "slow_start.duration_seconds" if value != "0" => Some((30, 900)),
                _ => None,
            };
            if let Some((low, high)) = range
                && !value.parse::<u64>().is_ok_and(|v| (low..=high).contains(&v))
            {
                return Err(AwsError::validation(format!(
                    "'{key}' value '{value}' must be between '{low}-{high}' inclusive"
                )));
            }
            let choice: Option<&[&str]> = match key {
                "load_balancing.cross_zone.enabled" => {
                    Some(&["true", "false", "use_load_balancer_configuration"])
                }
                _ if key.ends_with(".enabled") => Some(&["true", "false"]),
                _ => None,
            };
            if let Some(choice) = choice
                && !choice.contains(&value)
            {
                return Err(AwsError::validation(format!(
                    "'{key}' value '{value}' must be one of [{}]",
                    choice.join(", ")
                )));
            }
            if key == "load_balancing.cross_zone.enabled"
                && value == "false"
                && is_web(group)
                && group.targets.values().any(|t| t.zone.as_deref() == Some("all"))
            {
                return Err(AwsError::new(
                    "InvalidConfigurationRequest",
                    "Cross-zone load balancing cannot be disabled while a target is registered with Availability Zone 'all'",
                ));
            }
            wanted.insert(key.to_owned(), value.to_owned());
        }
        group.attributes = wanted;
        attributes_xml(&mut x, &group.attributes);
        Ok(x)
    }

    fn register_targets(&mut self, p: &Params, now: u64) -> Answer {
        let arn = self.group_arn(p)?;
        self.sweep(arn, now);
        let specs = p.list("Targets");
        if specs.is_empty() {
            return Err(AwsError::validation("Targets cannot be empty"));
        }
        let missing = || AwsError::new("TargetGroupNotFound", "One or more target groups not found");
        let group = self.target_groups.get(arn).ok_or_else(missing)?;
        let mut wanted = Vec::with_capacity(specs.len());
        let (mut absent, mut halted, mut foreign, mut old) = (vec![], vec![], vec![], vec![]);
        for spec in specs {
            let text = spec.get("Id").ok_or_else(|| AwsError::missing("Targets.member.1.Id"))?;
            let port = match port_number(spec, "Port")? {
                Some(_) if group.target_type == "lambda" => {
                    return Err(AwsError::validation("You cannot specify a port for a lambda target"));
                }
                Some(port) => port,
                None => group.port.unwrap_or(0),
            };
            let id = TargetId::parse(text);
            let zone = spec.get("AvailabilityZone");
            let zone = match group.target_type.as_str() {
                "ip" => Some(self.ip_zone(group, &id, text, zone)?),
                "instance" => {
                    if zone.is_some() {
                        return Err(AwsError::validation(
                            "You cannot specify an Availability Zone for a target of type 'instance'",
                        ));
                    }
                    if !is_instance_id(text) {
                        return Err(AwsError::validation(format!("Instance ID '{text}' is not valid")));
                    }
                    match self.instances.get(text) {
                        None => absent.push(text),
                        Some(i) if i.state != InstanceState::Running => halted.push(text),
                        Some(i) if Some(&i.vpc) != group.vpc.as_ref() => foreign.push(text),
                        Some(i) => {
                            if is_network(group) && is_old_type(&i.instance_type) {
                                old.push(text);
                            }
                            if group.ip_type == "ipv6"
                                && !self
                                    .enis
                                    .values()
                                    .any(|e| e.instance.as_deref() == Some(text) && !e.ipv6.is_empty())
                            {
                                return Err(AwsError::new(
                                    "InvalidTarget",
                                    format!("The instance '{text}' does not have a primary IPv6 address"),
                                ));
                            }
                        }
                    }
                    None
                }
                "lambda" => {
                    if zone.is_some_and(|z| z != "all") {
                        return Err(AwsError::validation(
                            "The Availability Zone of a lambda target can only be 'all'",
                        ));
                    }
                    if !text.starts_with("arn:") || !text.contains(":lambda:") {
                        return Err(AwsError::validation(format!(
                            "'{text}' is not a valid Lambda function ARN"
                        )));
                    }
                    if group.targets.keys().any(|(other, _)| *other != id) {
                        return Err(AwsError::new(
                            "TooManyTargets",
                            format!(
                                "The maximum number of targets per target group '1' has been reached on target group '{arn}'"
                            ),
                        ));
                    }
                    zone.map(str::to_owned)
                }
                _ => {
                    if zone.is_some() {
                        return Err(AwsError::validation(
                            "You cannot specify an Availability Zone for a target of type 'alb'",
                        ));
                    }
                    self.alb_target(group, text, port)?;
                    if group.targets.keys().any(|(other, _)| *other != id) {
                        return Err(AwsError::new(
                            "TooManyTargets",
                            format!(
                                "The maximum number of targets per target group '1' has been reached on target group '{arn}'"
                            ),
                        ));
                    }
                    None
                }
            };
            let quic = self.quic_server_id(group, spec, &id, port, now)?;
            wanted.push(((id, port), zone, quic));
        }
        let quoted = |ids: &[&str]| ids.iter().map(|i| format!("'{i}'")).collect::<Vec<_>>().join(", ");
        if !absent.is_empty() {
            return Err(invalid_target(format!("The following instances do not exist: {}", quoted(&absent))));
        }
        if !halted.is_empty() {
            return Err(invalid_target(format!(
                "The following targets are not in a running state and cannot be registered: {}",
                quoted(&halted)
            )));
        }
        if !foreign.is_empty() {
            return Err(invalid_target(format!(
                "The following targets are not in the target group VPC '{}': {}",
                group.vpc.as_deref().unwrap_or_default(),
                quoted(&foreign)
            )));
        }
        if !old.is_empty() {
            return Err(invalid_target(format!("Targets {{{}}} are not supported", old.join(", "))));
        }
        let new: BTreeSet<_> = wanted
            .iter()
            .map(|(key, ..)| key)
            .filter(|key| group.targets.get(key).is_none_or(|t| t.draining_ms.is_some()))
            .collect();
        let active = group.targets.values().filter(|t| t.draining_ms.is_none()).count();
        let limit = self.quotas.targets_per_group;
        if active + new.len() > limit && matches!(group.target_type.as_str(), "ip" | "instance") {
            let text = format!(
                "The maximum number of targets per target group '{limit}' has been reached on target group '{arn}'"
            );
            return Err(AwsError::new("TooManyTargets", text));
        }
        if let Some(balancer) = group.load_balancer.as_ref().and_then(|lb| self.load_balancers.get(lb)) {
            let more = wanted.iter().filter(|(key, ..)| new.contains(key));
            let more = more.map(|((id, _), zone, _)| (group, id, self.zone_of(id, zone.as_deref())));
            self.balancer_quotas(balancer, &more.collect::<Vec<_>>())?;
        }
        if self.timing.refuse_draining
            && let Some(((id, _), ..)) = wanted
                .iter()
                .find(|(key, ..)| group.targets.get(key).is_some_and(|t| t.draining_ms.is_some()))
        {
            return Err(invalid_target(format!("The target '{id}' is draining and cannot be registered")));
        }
        let keys: Vec<(TargetId, u16)> = wanted.iter().map(|(key, ..)| key.clone()).collect();
        if let Some(group) = self.target_groups.get_mut(arn) {
            for (key, zone, quic) in wanted {
                if group.targets.get(&key).is_some_and(|t| t.draining_ms.is_none()) {
                    continue;
                }
                // a probe result is the world's, not the registration's: it outlives the draining
                let health = group.targets.get(&key).and_then(|t| t.health.clone()).map(|mut h| {
                    h.before = Settled::Initial;
                    h.since_ms = h.since_ms.min(now);
                    h
                });
                group.targets.insert(
                    key,
                    Target {
                        zone: zone.map(String::into_boxed_str),
                        quic_server_id: quic.map(String::into_boxed_str),
                        registered_ms: now,
                        draining_ms: None,
                        health,
                    },
                );
            }
        }
        self.remember_quic(arn, &keys, now);
        Ok(Xml::default())
    }

    /// The zone of an ip target, or why it is refused.
    fn ip_zone(
        &self,
        group: &TargetGroup,
        id: &TargetId,
        text: &str,
        zone: Option<&str>,
    ) -> Result<String, AwsError> {
        let family = if group.ip_type == "ipv6" { "IPv6" } else { "IPv4" };
        let ip = match id {
            TargetId::Ip(ip) if ip.is_ipv6() == (family == "IPv6") => *ip,
            _ => {
                return Err(AwsError::validation(format!(
                    "The IP address '{text}' is not a valid {family} address"
                )));
            }
        };
        let vpc = group.vpc.as_deref().unwrap_or_default();
        if let Some(subnet) = self.subnet_of(vpc, ip) {
            return match zone {
                None => Ok(subnet.zone.clone()),
                Some(z) if z == subnet.zone => Ok(subnet.zone.clone()),
                Some(z) => Err(AwsError::validation(format!(
                    "The IP address '{text}' is within the VPC, and cannot have its Availability Zone overridden to '{z}' from '{}'",
                    subnet.zone
                ))),
            };
        }
        // outside
        match ip {
            IpAddr::V4(ip) if !is_private(ip) => {
                return Err(AwsError::validation(format!(
                    "The IP address '{text}' is not within a supported range; publicly routable addresses cannot be registered"
                )));
            }
            IpAddr::V6(ip)
                if (ip.segments().first().copied().unwrap_or(0) & 0xe000) != 0x2000
                    && (ip.segments().first().copied().unwrap_or(0) & 0xfe00) != 0xfc00 =>
            {
                return Err(AwsError::validation(format!(
                    "The IP address '{text}' is not a valid IPv6 address"
                )));
            }
            _ => {}
        }
        if matches!(group.protocol.as_deref(), Some("UDP" | "TCP_UDP" | "QUIC" | "TCP_QUIC")) {
            return Err(AwsError::validation(format!(
                "The IP address '{text}' is outside the VPC, which is not supported for protocol {}",
                group.protocol.as_deref().unwrap_or_default()
            )));
        }
        let alb = is_web(group);
        let cross_zone_off =
            alb && group.attributes.get("load_balancing.cross_zone.enabled").is_some_and(|v| v == "false");
        match zone {
            None if cross_zone_off => Err(cross_zone(text)),
            Some("all") if cross_zone_off => Err(cross_zone(text)),
            None => Err(AwsError::validation(format!(
                "The Availability Zone is required for IP address '{text}' because it is not in the VPC"
            ))),
            Some("all") => Ok("all".to_owned()),
            Some(_) if alb && !cross_zone_off => Err(AwsError::validation(format!(
                "The Availability Zone for IP address '{text}' must be 'all' for Application Load Balancer target groups, when not within the VPC"
            ))),
            Some(z) if self.subnets.values().any(|s| s.vpc == vpc && s.zone == z) => Ok(z.to_owned()),
            Some(_) => Err(AwsError::validation(format!(
                "You must specify a valid Availability Zone or select 'all' for all enabled Availability zones, since the IP address '{text}' is outside the VPC"
            ))),
        }
    }

    fn alb_target(&self, group: &TargetGroup, arn: &str, port: u16) -> Result<(), AwsError> {
        if !self.own_arn(arn, "loadbalancer/app") {
            return Err(AwsError::validation(format!("'{arn}' is not a valid load balancer ARN")));
        }
        let Some(lb) = self.load_balancers.get(arn) else {
            return Err(invalid_target(format!("The load balancer '{arn}' does not exist")));
        };
        if Some(&lb.vpc) != group.vpc.as_ref() {
            return Err(invalid_target(format!(
                "The load balancer '{arn}' is not in the VPC of the target group"
            )));
        }
        if Some(port) != group.port {
            return Err(AwsError::validation(
                "The port of a target of type 'alb' must match the port of the target group",
            ));
        }
        let id = TargetId::Other(arn.into());
        let elsewhere = self
            .target_groups
            .values()
            .filter(|g| g.arn != group.arn && g.targets.contains_key(&(id.clone(), port)));
        if elsewhere.count() >= 2 {
            return Err(AwsError::new(
                "TooManyRegistrationsForTargetId",
                format!("The load balancer '{arn}' is registered with two target groups already"),
            ));
        }
        if !self.listeners.values().any(|l| l.load_balancer == arn && l.port == Some(port)) {
            return Err(invalid_target(format!(
                "The load balancer '{arn}' does not have a listener on port '{port}'"
            )));
        }
        Ok(())
    }

    fn quic_server_id(
        &self,
        group: &TargetGroup,
        spec: &Params,
        id: &TargetId,
        port: u16,
        now: u64,
    ) -> Result<Option<String>, AwsError> {
        let quic = matches!(group.protocol.as_deref(), Some("QUIC" | "TCP_QUIC"));
        let Some(server) = spec.get("QuicServerId") else {
            return if quic {
                Err(AwsError::validation(format!("A QUIC server ID is required for target '{id}'")))
            } else {
                Ok(None)
            };
        };
        if !quic {
            return Err(AwsError::validation(
                "A QUIC server ID can only be specified for target groups with protocol QUIC or TCP_QUIC",
            ));
        }
        let hex = server.strip_prefix("0x").is_some_and(|h| {
            h.len() == 16 && h.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        if !hex {
            return Err(AwsError::validation(format!(
                "The QUIC server ID '{server}' is not valid; it must be 0x followed by 16 hexadecimal digits"
            )));
        }
        for other in self.target_groups.values() {
            for ((other_id, other_port), target) in &other.targets {
                let Some(theirs) = target.quic_server_id.as_deref() else { continue };
                let same_target = other_id == id && *other_port == port;
                if same_target && theirs != server {
                    return Err(AwsError::validation(format!(
                        "The QUIC server ID of target '{id}:{port}' cannot be changed from '{theirs}' while it is registered"
                    )));
                }
                if !same_target && theirs == server && other.vpc == group.vpc {
                    return Err(AwsError::validation(format!(
                        "The QUIC server ID '{server}' is already in use by another target"
                    )));
                }
            }
        }
        let place = (group.vpc.clone().unwrap_or_default(), server.to_owned());
        if self.quic_ids.get(&place).is_some_and(|((other, other_port), last)| {
            (other != id || *other_port != port) && now < last + QUIC_REUSE_MS
        }) {
            return Err(AwsError::validation(format!(
                "The QUIC server ID '{server}' was in use by another target less than 6 hours ago"
            )));
        }
        Ok(Some(server.to_owned()))
    }

    /// Takes down that QUIC server ids are in use now, so that no other target gets them soon.
    fn remember_quic(&mut self, arn: &str, keys: &[(TargetId, u16)], now: u64) {
        let Some(group) = self.target_groups.get(arn) else { return };
        let vpc = group.vpc.clone().unwrap_or_default();
        for key in keys {
            if let Some(server) = group.targets.get(key).and_then(|t| t.quic_server_id.as_deref()) {
                self.quic_ids.insert((vpc.clone(), server.to_owned()), (key.clone(), now));
            }
        }
    }

    /// The zone of a target: its own or its instance's.
    fn zone_of<'a>(&'a self, id: &TargetId, zone: Option<&'a str>) -> Option<&'a str> {
        match id {
            TargetId::Other(id) if zone.is_none() => self.instances.get(id.as_ref()).map(|i| i.zone.as_str()),
            _ => zone,
        }
    }

    /// Whether a load balancer may have the targets that it has and `more` ones: group, id, zone.
    fn balancer_quotas<'a>(
        &'a self,
        balancer: &'a LoadBalancer,
        more: &[(&'a TargetGroup, &'a TargetId, Option<&'a str>)],
    ) -> Result<(), AwsError> {
        let quotas = &self.quotas;
        let groups = self.target_groups.values().filter(|g| g.load_balancer.as_ref() == Some(&balancer.arn));
        let there = groups
            .flat_map(|g| g.targets.iter().map(move |((id, _), target)| (g, id, target)))
            .filter(|(_, _, target)| target.draining_ms.is_none())
            .map(|(g, id, target)| (g, id, self.zone_of(id, target.zone.as_deref())));
        let default =
            balancer.attributes.get("load_balancing.cross_zone.enabled").is_some_and(|v| v == "true");
        let (mut all, mut crossing) = (0, 0);
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        let mut times: HashMap<&TargetId, usize> = more.iter().map(|(_, id, _)| (*id, 0)).collect();
        for (group, id, zone) in there.chain(more.iter().copied()) {
            let crosses = match group.attributes.get("load_balancing.cross_zone.enabled").map(String::as_str)
            {
                Some("true") => true,
                Some("false") => false,
                _ => default,
            };
            let weight = match (group.target_type.as_str(), crosses) {
                ("alb", true) => 100,
                ("alb", false) => 50,
                _ => 1,
            };
            all += weight;
            if let Some(count) = times.get_mut(id) {
                *count += 1;
            }
            match zone {
                _ if crosses => crossing += weight,
                Some(zone) if zone != "all" => *zones.entry(zone).or_default() += weight,
                _ => balancer.zones.iter().for_each(|(zone, _)| *zones.entry(zone).or_default() += weight),
            }
        }
        let arn = &balancer.arn;
        let reached = |what: &str, limit: usize| {
            let text =
                format!("The maximum number of {what} '{limit}' has been reached on load balancer '{arn}'");
            Err(AwsError::new("TooManyTargets", text))
        };
        match balancer.kind.as_str() {
            "application" if all > quotas.targets_per_alb => {
                reached("targets per load balancer", quotas.targets_per_alb)
            }
            "application" => match times.iter().find(|(_, count)| **count > quotas.registrations_per_alb) {
                Some((id, _)) => Err(AwsError::new(
                    "TooManyRegistrationsForTargetId",
                    format!(
                        "The target '{id}' cannot be registered more than {} times on load balancer '{arn}'",
                        quotas.registrations_per_alb
                    ),
                )),
                None => Ok(()),
            },
            "network" if crossing > quotas.targets_per_nlb_cross_zone => Err(AwsError::new(
                "TooManyTargets",
                format!(
                    "You cannot have more than {} targets per network load balancer with cross-zone load balancing enabled.",
                    quotas.targets_per_nlb_cross_zone
                ),
            )),
            "network" if zones.values().any(|count| *count > quotas.targets_per_nlb_zone) => {
                reached("targets per Availability Zone per load balancer", quotas.targets_per_nlb_zone)
            }
            "network" if all > quotas.targets_per_nlb => {
                reached("targets per load balancer", quotas.targets_per_nlb)
            }
            _ => Ok(()),
        }
    }

    fn deregister_targets(&mut self, p: &Params, now: u64) -> Answer {
        let arn = self.group_arn(p)?;
        self.sweep(arn, now);
        let specs = p.list("Targets");
        if specs.is_empty() {
            return Err(AwsError::validation("Targets cannot be empty"));
        }
        let mut gone = Vec::new();
        if let Some(group) = self.target_groups.get(arn) {
            for spec in specs {
                let text = spec.get("Id").ok_or_else(|| AwsError::missing("Targets.member.1.Id"))?;
                let port = port_number(spec, "Port")?.or(group.port).unwrap_or(0);
                let key = (TargetId::parse(text), port);
                if let Some(target) = group.targets.get(&key)
                    && target.draining_ms.is_none()
                {
                    let unused = self.target_state(group, &key.0, target, now).state == "unused";
                    gone.push((key, unused || group.target_type == "lambda"));
                }
            }
        }
        self.remember_quic(arn, &gone.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(), now);
        if let Some(group) = self.target_groups.get_mut(arn) {
            for (key, at_once) in gone {
                if at_once {
                    group.targets.remove(&key);
                } else if let Some(target) = group.targets.get_mut(&key) {
                    target.draining_ms = Some(now);
                }
            }
        }
        self.sweep(arn, now);
        Ok(Xml::default())
    }

    /// Removes what has drained and what ended long enough ago.
    fn sweep(&mut self, arn: &str, now: u64) {
        let timing = self.timing;
        let instances = &self.instances;
        if let Some(group) = self.target_groups.get_mut(arn) {
            let delay = delay_ms(&timing, group);
            let by_instance = group.target_type == "instance";
            group.targets.retain(|(id, _), t| {
                if t.draining_ms.is_some_and(|since| now >= since + delay) {
                    return false;
                }
                if !by_instance {
                    return true;
                }
                let TargetId::Other(id) = id else { return true };
                instances.get(id.as_ref()).is_some_and(|i| {
                    i.state != InstanceState::Terminated || now < i.changed_ms + timing.terminated_ms
                })
            });
        }
    }

    /// The state of a target at a moment.
    #[must_use]
    pub fn target_state(&self, group: &TargetGroup, id: &TargetId, target: &Target, now: u64) -> TargetState {
        let context = Context::of(self, group);
        context.state(self, id, target, now)
    }

    /// Sets what health checks of a target find, by target group ARN or name; `port` none is every port of the id.
    /// Returns how many targets there are.
    pub fn set_health(&mut self, group: &str, id: &str, port: Option<u16>, probe: &Probe, now: u64) -> usize {
        let key = TargetId::parse(id);
        let Some(arn) =
            self.target_groups.values().find(|g| g.arn == group || g.name == group).map(|g| g.arn.clone())
        else {
            return 0;
        };
        let mut changes = Vec::new();
        if let Some(group) = self.target_groups.get(&arn) {
            let context = Context::of(self, group);
            for (target_key, target) in &group.targets {
                if (target_key.0 == key || id == "*") && port.is_none_or(|p| p == target_key.1) {
                    let before = match context.state(self, &target_key.0, target, now).state {
                        "healthy" => Settled::Healthy,
                        "unhealthy" | "unhealthy.draining" => Settled::Unhealthy,
                        _ => Settled::Initial,
                    };
                    changes.push((target_key.clone(), before));
                }
            }
        }
        let count = changes.len();
        if let Some(group) = self.target_groups.get_mut(&arn) {
            for (key, before) in changes {
                if let Some(target) = group.targets.get_mut(&key) {
                    target.health = Some(Box::new(Health { probe: probe.clone(), since_ms: now, before }));
                }
            }
        }
        count
    }

    fn describe_target_health(&mut self, p: &Params, now: u64) -> Answer {
        let arn = self.group_arn(p)?;
        self.sweep(arn, now);
        let missing = || AwsError::new("TargetGroupNotFound", "One or more target groups not found");
        let group = self.target_groups.get(arn).ok_or_else(missing)?;
        let context = Context::of(self, group);
        let check_port = group.check.port.as_deref().filter(|p| *p != "traffic-port");
        let wanted = p.strings("Include");
        let healthy = |(key, target): (&(TargetId, u16), &Target)| {
            context.state(self, &key.0, target, now).state == "healthy"
        };
        let detects = wanted.iter().any(|what| matches!(*what, "AnomalyDetection" | "All"))
            && context.balancer.is_some_and(|b| b.kind == "application")
            && group.targets.iter().filter(|target| healthy(*target)).take(3).count() == 3;
        let mut x = Xml::default();
        let one = |x: &mut Xml, (id, port): &(TargetId, u16), target: Option<&Target>| {
            let state = match target {
                Some(target) => context.state(self, id, target, now),
                None => TargetState::new(
                    "unused",
                    "Target.NotRegistered",
                    "Target is not registered to the target group",
                ),
            };
            x.el("member", |x| {
                x.el("Target", |x| {
                    x.val("Id", id);
                    if group.target_type != "lambda" {
                        x.val("Port", port);
                    }
                    if let Some(target) = target {
                        x.opt("AvailabilityZone", target.zone.as_deref());
                        x.opt("QuicServerId", target.quic_server_id.as_deref());
                    }
                });
                match check_port {
                    _ if group.target_type == "lambda" => {}
                    Some(port) => x.text("HealthCheckPort", port),
                    None => x.val("HealthCheckPort", port),
                }
                x.el("TargetHealth", |x| {
                    x.text("State", state.state);
                    x.opt("Reason", state.reason.as_deref());
                    x.opt("Description", state.description.as_deref());
                });
                if detects {
                    x.el("AnomalyDetection", |x| {
                        x.text("Result", "normal");
                        x.text("MitigationInEffect", "no");
                    });
                }
                if context.balancer.is_some() && !self.shifted_zones.is_empty() {
                    let zone = self.zone_of(id, target.and_then(|t| t.zone.as_deref()));
                    let is_away = zone.is_some_and(|zone| self.shifted_zones.contains(zone));
                    let (state, reason, text) = match is_away {
                        true => (
                            "zonal_shift_active",
                            "AdministrativeOverride.ZonalShiftActive",
                            "Zonal shift is active",
                        ),
                        false => (
                            "no_override",
                            "AdministrativeOverride.NoOverride",
                            "No override is currently active",
                        ),
                    };
                    x.el("AdministrativeOverride", |x| {
                        x.text("State", state);
                        x.text("Reason", reason);
                        x.text("Description", text);
                    });
                }
            });
        };
        let asked = p.list("Targets");
        x.el("TargetHealthDescriptions", |x| {
            for (key, target) in group.targets.iter().filter(|_| asked.is_empty()) {
                one(x, key, Some(target));
            }
            for spec in &asked {
                let Some(id) = spec.get("Id") else { continue };
                let port = spec.get("Port").and_then(|p| p.parse().ok()).or(group.port).unwrap_or(0);
                let key = (TargetId::parse(id), port);
                one(x, &key, group.targets.get(&key));
            }
        });
        Ok(x)
    }

    /// The VPC and the zones with their subnets that a request names for a load balancer.
    fn enabled_zones(&self, kind: &str, p: &Params) -> Result<(String, Vec<(String, String)>), AwsError> {
        let mut ids: Vec<String> = p.strings("Subnets").into_iter().map(str::to_owned).collect();
        ids.extend(p.list("SubnetMappings").iter().filter_map(|m| m.get("SubnetId")).map(str::to_owned));
        if ids.is_empty() {
            return Err(AwsError::validation("You must specify subnets"));
        }
        let mut zones: Vec<(String, String)> = Vec::new();
        let mut vpc = None;
        for id in ids {
            let subnet = self.subnets.get(&id).ok_or_else(|| {
                AwsError::new("SubnetNotFound", format!("The subnet ID '{id}' does not exist"))
            })?;
            if zones.iter().any(|(z, _)| *z == subnet.zone) {
                return Err(AwsError::new(
                    "InvalidConfigurationRequest",
                    "A load balancer cannot be attached to multiple subnets in the same Availability Zone",
                ));
            }
            if *vpc.get_or_insert(&subnet.vpc) != &subnet.vpc {
                return Err(AwsError::new("InvalidSubnet", "All subnets must belong to the same VPC"));
            }
            zones.push((subnet.zone.clone(), id));
        }
        if kind == "application" && zones.len() < 2 {
            return Err(AwsError::validation(
                "At least two subnets in two different Availability Zones must be specified",
            ));
        }
        Ok((vpc.cloned().unwrap_or_default(), zones))
    }

    fn known_groups(&self, vpc: &str, p: &Params) -> Result<Vec<String>, AwsError> {
        let groups: Vec<String> = p.strings("SecurityGroups").into_iter().map(str::to_owned).collect();
        match groups.iter().find(|g| self.security_groups.get(*g).is_none_or(|g| g.vpc != vpc)) {
            Some(bad) => Err(AwsError::new(
                "InvalidSecurityGroup",
                format!("One or more security groups are invalid: {bad}"),
            )),
            None => Ok(groups),
        }
    }

    fn set_subnets(&mut self, p: &Params) -> Answer {
        let arn = self.load_balancer_arn(p.need("LoadBalancerArn")?)?;
        let mut x = Xml::default();
        let Some(balancer) = self.load_balancers.get(arn) else { return Ok(x) };
        let (vpc, zones) = self.enabled_zones(&balancer.kind, p)?;
        if vpc != balancer.vpc {
            return Err(AwsError::new(
                "InvalidSubnet",
                "The subnets do not belong to the VPC of the load balancer",
            ));
        }
        if let Some(balancer) = self.load_balancers.get_mut(arn) {
            balancer.zones = zones;
            zones_xml(&mut x, balancer);
            x.text("IpAddressType", &balancer.ip_type);
        }
        Ok(x)
    }

    fn set_security_groups(&mut self, p: &Params) -> Answer {
        let arn = self.load_balancer_arn(p.need("LoadBalancerArn")?)?;
        let mut x = Xml::default();
        let Some(balancer) = self.load_balancers.get(arn) else { return Ok(x) };
        let groups = self.known_groups(&balancer.vpc, p)?;
        if groups.is_empty() {
            return Err(AwsError::missing("SecurityGroups"));
        }
        if balancer.kind == "network" && balancer.groups.is_empty() {
            return Err(AwsError::new(
                "InvalidConfigurationRequest",
                "Security groups cannot be added to a network load balancer that was made without any",
            ));
        }
        x.each("SecurityGroupIds", "member", &groups, |x, g| x.escape(g));
        if let Some(balancer) = self.load_balancers.get_mut(arn) {
            balancer.groups = groups;
        }
        Ok(x)
    }

    fn create_load_balancer(&mut self, p: &Params, now: u64) -> Answer {
        let name = p.need("Name")?;
        check_name("Load balancer name", name)?;
        if name.starts_with("internal-") {
            return Err(AwsError::validation(format!(
                "Load balancer name '{name}' cannot begin with 'internal-'"
            )));
        }
        let kind = p.get("Type").unwrap_or("application");
        one_of("type", kind, &["application", "network", "gateway"])?;
        let scheme = p.get("Scheme").unwrap_or("internet-facing");
        if !matches!(scheme, "internet-facing" | "internal") {
            return Err(AwsError::new("InvalidScheme", format!("The scheme '{scheme}' is not valid")));
        }
        let (vpc, zones) = self.enabled_zones(kind, p)?;
        let mut groups = self.known_groups(&vpc, p)?;
        if groups.is_empty() && kind == "application" {
            groups.extend(
                self.security_groups
                    .values()
                    .find(|g| g.vpc == vpc && g.name == "default")
                    .map(|g| g.id.clone()),
            );
        }
        let ip_type = p.get("IpAddressType").unwrap_or("ipv4");
        one_of("ipAddressType", ip_type, &["ipv4", "dualstack", "dualstack-without-public-ipv4"])?;
        let tags = tags_of(p)?;
        let state_at = now.saturating_sub(self.timing.provisioning_ms);
        if let Some(old) = self.load_balancers.values().find(|l| l.name == name) {
            if old.kind == kind && old.scheme == scheme && old.zones == zones && old.ip_type == ip_type {
                let mut x = Xml::default();
                x.el("LoadBalancers", |x| x.el("member", |x| balancer_xml(x, old, state_at)));
                return Ok(x);
            }
            return Err(AwsError::new(
                "DuplicateLoadBalancerName",
                format!("A load balancer with the same name '{name}' exists, but with different settings"),
            ));
        }
        if self.load_balancers.values().filter(|l| l.kind == kind).count() >= self.quotas.load_balancers {
            return Err(AwsError::new(
                "TooManyLoadBalancers",
                "The maximum number of load balancers has been reached",
            ));
        }
        let id = format!("{:016x}", self.next());
        let short = match kind {
            "application" => "app",
            "network" => "net",
            _ => "gwy",
        };
        let arn = format!(
            "arn:{}:elasticloadbalancing:{}:{}:loadbalancer/{short}/{name}/{id}",
            self.partition(),
            self.region,
            self.account
        );
        let internal = if scheme == "internal" { "internal-" } else { "" };
        let suffix = if self.partition() == "aws-cn" { "amazonaws.com.cn" } else { "amazonaws.com" };
        let dns = match kind {
            "application" => {
                let number = self.next() % 10_000_000_000;
                format!("{internal}{name}-{number}.{}.elb.{suffix}", self.region)
            }
            _ => format!("{name}-{id}.elb.{}.{suffix}", self.region),
        };
        let cross_zone = if kind == "application" { "true" } else { "false" };
        let attributes = [
            ("deletion_protection.enabled", "false"),
            ("load_balancing.cross_zone.enabled", cross_zone),
            ("access_logs.s3.enabled", "false"),
            ("access_logs.s3.bucket", ""),
            ("access_logs.s3.prefix", ""),
        ]
        .into_iter()
        .chain(
            [
                ("idle_timeout.timeout_seconds", "60"),
                ("routing.http2.enabled", "true"),
                ("routing.http.drop_invalid_header_fields.enabled", "false"),
                ("client_keep_alive.seconds", "3600"),
            ]
            .into_iter()
            .filter(|_| kind == "application"),
        )
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
        let lb = LoadBalancer {
            arn: arn.clone(),
            name: name.to_owned(),
            dns,
            scheme: scheme.to_owned(),
            vpc,
            kind: kind.to_owned(),
            zones,
            groups,
            ip_type: ip_type.to_owned(),
            attributes,
            tags,
            created_ms: now,
        };
        let mut x = Xml::default();
        x.el("LoadBalancers", |x| x.el("member", |x| balancer_xml(x, &lb, state_at)));
        self.load_balancers.insert(arn, lb);
        Ok(x)
    }

    fn describe_load_balancers(&self, p: &Params, now: u64) -> Answer {
        let arns = p.strings("LoadBalancerArns");
        let names = p.strings("Names");
        if arns.len() > 20 {
            return Err(AwsError::validation("Only 20 load balancers can be described at a time"));
        }
        let missing =
            |n: &str| AwsError::new("LoadBalancerNotFound", format!("Load balancers '[{n}]' not found"));
        let mut found = Vec::new();
        if !arns.is_empty() {
            for arn in arns {
                self.load_balancer_arn(arn)?;
                found.extend(self.load_balancers.get(arn));
            }
        } else if !names.is_empty() {
            for name in names {
                found.push(
                    self.load_balancers.values().find(|l| l.name == name).ok_or_else(|| missing(name))?,
                );
            }
        } else {
            found.extend(self.load_balancers.values());
        }
        let (page, next) = page(&found, p)?;
        let state_at = now.saturating_sub(self.timing.provisioning_ms);
        let mut x = Xml::default();
        x.each("LoadBalancers", "member", page, |x, l| balancer_xml(x, l, state_at));
        x.opt("NextMarker", next.as_deref());
        Ok(x)
    }

    fn delete_load_balancer(&mut self, p: &Params) -> Answer {
        let arn = p.need("LoadBalancerArn")?;
        if !self.own_arn(arn, "loadbalancer") {
            return Err(AwsError::validation(format!("'{arn}' is not a valid load balancer ARN")));
        }
        let Some(lb) = self.load_balancers.get(arn) else { return Ok(Xml::default()) };
        if lb.attributes.get("deletion_protection.enabled").is_some_and(|v| v == "true") {
            return Err(AwsError::new(
                "OperationNotPermitted",
                format!("Load balancer '{arn}' cannot be deleted because deletion protection is enabled"),
            ));
        }
        let id = TargetId::Other(arn.into());
        if self.target_groups.values().any(|g| g.targets.keys().any(|(t, _)| *t == id)) {
            return Err(AwsError::new(
                "ResourceInUse",
                format!("Load balancer '{arn}' is in use by a target group"),
            ));
        }
        self.listeners.retain(|_, l| l.load_balancer != arn);
        self.load_balancers.remove(arn);
        self.detach_unused();
        Ok(Xml::default())
    }

    fn load_balancer_attributes(&mut self, p: &Params, modify: bool) -> Answer {
        let arn = self.load_balancer_arn(p.need("LoadBalancerArn")?)?;
        let mut x = Xml::default();
        let Some(lb) = self.load_balancers.get_mut(arn) else { return Ok(x) };
        if modify {
            let mut wanted = lb.attributes.clone();
            for a in p.list("Attributes") {
                let key = a.need("Key")?;
                if !lb.attributes.contains_key(key) {
                    return Err(AwsError::validation(format!(
                        "Load balancer attribute key '{key}' is not recognized"
                    )));
                }
                wanted.insert(key.to_owned(), a.raw("Value").unwrap_or_default().to_owned());
            }
            lb.attributes = wanted;
        }
        attributes_xml(&mut x, &lb.attributes);
        Ok(x)
    }

    fn create_listener(&mut self, p: &Params, now: u64) -> Answer {
        let lb_arn = self.load_balancer_arn(p.need("LoadBalancerArn")?)?;
        let Some(balancer) = self.load_balancers.get(lb_arn) else { return Ok(Xml::default()) };
        let (short, lb_path) = lb_arn
            .split_once(":loadbalancer/")
            .and_then(|(_, rest)| rest.split_once('/'))
            .unwrap_or_default();
        let mut listener = Listener {
            arn: String::new(),
            load_balancer: lb_arn.to_owned(),
            protocol: None,
            port: None,
            forwards: Vec::new(),
            action: String::new(),
            certificate: None,
            ssl_policy: None,
            rules: Vec::new(),
            tags: tags_of(p)?,
        };
        if p.list("DefaultActions").is_empty() {
            return Err(AwsError::missing("DefaultActions"));
        }
        set_listener(&mut listener, balancer, p)?;
        if let Some(old) =
            self.listeners.values().find(|l| l.load_balancer == lb_arn && l.port == listener.port)
        {
            let same = old.protocol == listener.protocol
                && old.forwards == listener.forwards
                && old.action == listener.action
                && old.certificate == listener.certificate;
            if same {
                let mut x = Xml::default();
                x.el("Listeners", |x| x.el("member", |x| listener_xml(x, old)));
                return Ok(x);
            }
            return Err(duplicate_listener());
        }
        if self.listeners.values().filter(|l| l.load_balancer == lb_arn).count() >= self.quotas.listeners {
            return Err(AwsError::new(
                "TooManyListeners",
                format!("The maximum number of listeners has been reached on load balancer '{lb_arn}'"),
            ));
        }
        self.check_forwards(balancer, listener.protocol.as_deref(), &listener.forwards)?;
        let id = self.next();
        listener.arn = format!(
            "arn:{}:elasticloadbalancing:{}:{}:listener/{short}/{lb_path}/{id:016x}",
            self.partition(),
            self.region,
            self.account,
        );
        Ok(self.put_listener(listener, now))
    }

    fn modify_listener(&mut self, p: &Params, now: u64) -> Answer {
        let arn = p.need("ListenerArn")?;
        let mut listener = self.listeners.get(arn).ok_or_else(no_listener)?.clone();
        let Some(balancer) = self.load_balancers.get(&listener.load_balancer) else {
            return Err(no_listener());
        };
        set_listener(&mut listener, balancer, p)?;
        let is_taken = |l: &Listener| {
            l.arn != arn && l.load_balancer == listener.load_balancer && l.port == listener.port
        };
        if self.listeners.values().any(is_taken) {
            return Err(duplicate_listener());
        }
        self.check_forwards(balancer, listener.protocol.as_deref(), &listener.forwards)?;
        Ok(self.put_listener(listener, now))
    }

    /// Whether a load balancer may forward to target groups from a listener with this protocol.
    fn check_forwards(
        &self,
        balancer: &LoadBalancer,
        protocol: Option<&str>,
        forwards: &[(String, Option<u64>)],
    ) -> Result<(), AwsError> {
        let lb_arn = &balancer.arn;
        let mut added = Vec::new();
        for (arn, _) in forwards {
            if !self.own_arn(arn, "targetgroup") {
                return Err(AwsError::validation(format!("'{arn}' is not a valid target group ARN")));
            }
            let group = self.target_groups.get(arn).ok_or_else(|| {
                AwsError::new("TargetGroupNotFound", format!("Target groups '{arn}' not found"))
            })?;
            if group.load_balancer.as_ref().is_some_and(|other| other != lb_arn) {
                return Err(AwsError::new(
                    "TargetGroupAssociationLimit",
                    format!(
                        "The following target groups cannot be associated with more than one load balancer: {arn}"
                    ),
                ));
            }
            if !compatible(&balancer.kind, protocol, group) {
                return Err(AwsError::new(
                    "IncompatibleProtocols",
                    format!(
                        "The protocol '{}' is not compatible with the protocol of target group '{arn}'",
                        protocol.unwrap_or_default()
                    ),
                ));
            }
            if group.ip_type == "ipv6" && balancer.ip_type == "ipv4" {
                return Err(AwsError::new(
                    "InvalidConfigurationRequest",
                    "A target group with IP address type ipv6 requires a dualstack load balancer",
                ));
            }
            if group.ip_type == "ipv4"
                && balancer.ip_type != "ipv4"
                && matches!(protocol, Some("UDP" | "TCP_UDP"))
            {
                return Err(AwsError::new(
                    "InvalidConfigurationRequest",
                    "A UDP listener of a dualstack load balancer requires a target group with IP address type ipv6",
                ));
            }
            if group.load_balancer.is_none() && !added.iter().any(|g: &&TargetGroup| g.arn == *arn) {
                added.push(group);
            }
        }
        let there = self.target_groups.values().filter(|g| g.load_balancer.as_ref() == Some(lb_arn)).count();
        if balancer.kind == "application" && there + added.len() > self.quotas.groups_per_alb {
            return Err(AwsError::new(
                "TooManyUniqueTargetGroupsPerLoadBalancer",
                format!("The maximum number of target groups has been reached on load balancer '{lb_arn}'"),
            ));
        }
        if forwards.len() > self.quotas.groups_per_action {
            return Err(AwsError::new(
                "TooManyTargetGroups",
                format!(
                    "The maximum number of target groups of an action is {}",
                    self.quotas.groups_per_action
                ),
            ));
        }
        let targets =
            added.iter().flat_map(|g| g.targets.iter().map(move |((id, _), target)| (*g, id, target)));
        let more = targets.map(|(g, id, target)| (g, id, self.zone_of(id, target.zone.as_deref())));
        self.balancer_quotas(balancer, &more.collect::<Vec<_>>())
    }

    /// Puts a listener there and attaches its target groups.
    fn put_listener(&mut self, listener: Listener, now: u64) -> Xml {
        let rules = listener.rules.iter().flat_map(|rule| &rule.forwards);
        for (group, _) in listener.forwards.iter().chain(rules) {
            if let Some(group) = self.target_groups.get_mut(group)
                && group.load_balancer.is_none()
            {
                group.load_balancer = Some(listener.load_balancer.clone());
                group.attached_ms = now;
            }
        }
        let mut x = Xml::default();
        x.el("Listeners", |x| x.el("member", |x| listener_xml(x, &listener)));
        self.listeners.insert(listener.arn.clone(), listener);
        self.detach_unused();
        x
    }

    fn describe_listeners(&self, p: &Params) -> Answer {
        let arns = p.strings("ListenerArns");
        let mut found = Vec::new();
        if !arns.is_empty() {
            for arn in arns {
                found.push(self.listeners.get(arn).ok_or_else(no_listener)?);
            }
        } else if let Some(lb) = p.get("LoadBalancerArn") {
            self.load_balancer_arn(lb)?;
            found.extend(self.listeners.values().filter(|l| l.load_balancer == lb));
        } else {
            return Err(AwsError::validation("You must specify either listener ARNs or a load balancer ARN"));
        }
        let (page, next) = page(&found, p)?;
        let mut x = Xml::default();
        x.each("Listeners", "member", page, |x, l| listener_xml(x, l));
        x.opt("NextMarker", next.as_deref());
        Ok(x)
    }

    fn delete_listener(&mut self, p: &Params) -> Answer {
        let arn = p.need("ListenerArn")?;
        let listener = self.listeners.get(arn).ok_or_else(no_listener)?;
        if let Some(port) = listener.port {
            let id = TargetId::Other(listener.load_balancer.as_str().into());
            if let Some(group) =
                self.target_groups.values().find(|g| g.targets.contains_key(&(id.clone(), port)))
            {
                return Err(AwsError::new(
                    "ResourceInUse",
                    format!(
                        "Listener port '{port}' is in use by registered target '{}' and cannot be removed.",
                        group.targets.keys().next().map(|(t, _)| t.to_string()).unwrap_or_default()
                    ),
                ));
            }
        }
        self.listeners.remove(arn);
        self.detach_unused();
        Ok(Xml::default())
    }

    /// Takes the load balancer from groups that no listener forwards to; what drained there is gone.
    fn detach_unused(&mut self) {
        let forwards = self
            .listeners
            .values()
            .flat_map(|l| l.forwards.iter().chain(l.rules.iter().flat_map(|rule| &rule.forwards)));
        let used: BTreeSet<&String> = forwards.map(|(group, _)| group).collect();
        for group in self.target_groups.values_mut() {
            if group.load_balancer.is_some() && !used.contains(&group.arn) {
                group.load_balancer = None;
                group.targets.retain(|_, t| t.draining_ms.is_none());
            }
        }
    }

    /// The listener of a rule, and which of its rules it is; none for the default rule.
    fn rule_of(&self, arn: &str) -> Result<(&Listener, Option<usize>), AwsError> {
        let missing = || AwsError::new("RuleNotFound", "One or more rules not found");
        let listener = arn.replacen(":listener-rule/", ":listener/", 1);
        let (listener, id) = listener.rsplit_once('/').ok_or_else(missing)?;
        let listener = self.listeners.get(listener).ok_or_else(missing)?;
        match listener.rules.iter().position(|rule| rule.arn == arn) {
            None if listener.arn.rsplit('/').next() != Some(id) => Err(missing()),
            at => Ok((listener, at)),
        }
    }

    fn create_rule(&mut self, p: &Params, now: u64) -> Answer {
        let arn = p.need("ListenerArn")?;
        let mut listener = self.listeners.get(arn).ok_or_else(no_listener)?.clone();
        let Some(balancer) = self.load_balancers.get(&listener.load_balancer) else {
            return Err(no_listener());
        };
        if balancer.kind != "application" {
            return Err(AwsError::new(
                "InvalidConfigurationRequest",
                "Rules are supported on listeners of application load balancers only",
            ));
        }
        let priority = p.number("Priority")?.ok_or_else(|| AwsError::missing("Priority"))?;
        if !(1..=50_000).contains(&priority) {
            return Err(AwsError::validation(format!(
                "Priority '{priority}' must be between '1-50000' inclusive"
            )));
        }
        if listener.rules.iter().any(|rule| rule.priority == priority) {
            return Err(AwsError::new("PriorityInUse", format!("Priority '{priority}' is currently in use")));
        }
        let of_balancer = self.listeners.values().filter(|l| l.load_balancer == listener.load_balancer);
        if of_balancer.map(|l| l.rules.len()).sum::<usize>() >= self.quotas.listener_rules {
            return Err(AwsError::new("TooManyRules", "The maximum number of rules has been reached"));
        }
        let conditions = p.child("Conditions").cloned().ok_or_else(|| AwsError::missing("Conditions"))?;
        let action = *p.list("Actions").first().ok_or_else(|| AwsError::missing("Actions"))?;
        let (action, forwards) = action_of(action)?;
        self.check_forwards(balancer, listener.protocol.as_deref(), &forwards)?;
        let id = self.next();
        let arn = format!("{}/{id:016x}", arn.replacen(":listener/", ":listener-rule/", 1));
        let rule = ListenerRule { arn, priority, conditions, forwards, action, tags: tags_of(p)? };
        let mut x = Xml::default();
        x.el("Rules", |x| x.el("member", |x| rule_xml(x, &rule)));
        listener.rules.push(rule);
        listener.rules.sort_by_key(|rule| rule.priority);
        self.put_listener(listener, now);
        Ok(x)
    }

    fn modify_rule(&mut self, p: &Params, now: u64) -> Answer {
        let (listener, at) = self.rule_of(p.need("RuleArn")?)?;
        let mut listener = listener.clone();
        let Some(rule) = at.and_then(|at| listener.rules.get_mut(at)) else {
            return Err(AwsError::new(
                "OperationNotPermitted",
                "The default rule is modified by its listener",
            ));
        };
        if let Some(conditions) = p.child("Conditions") {
            rule.conditions = conditions.clone();
        }
        if let Some(action) = p.list("Actions").first() {
            (rule.action, rule.forwards) = action_of(action)?;
        }
        if let Some(balancer) = self.load_balancers.get(&listener.load_balancer) {
            self.check_forwards(balancer, listener.protocol.as_deref(), &rule.forwards)?;
        }
        let mut x = Xml::default();
        x.el("Rules", |x| x.el("member", |x| rule_xml(x, rule)));
        self.put_listener(listener, now);
        Ok(x)
    }

    fn delete_rule(&mut self, p: &Params) -> Answer {
        let (listener, at) = self.rule_of(p.need("RuleArn")?)?;
        let arn = listener.arn.clone();
        let Some(at) = at else {
            return Err(AwsError::new("OperationNotPermitted", "Default rule cannot be deleted"));
        };
        if let Some(listener) = self.listeners.get_mut(&arn) {
            listener.rules.remove(at);
        }
        self.detach_unused();
        Ok(Xml::default())
    }

    fn describe_rules(&self, p: &Params) -> Answer {
        let mut found = Vec::new();
        if let Some(arn) = p.get("ListenerArn") {
            let listener = self.listeners.get(arn).ok_or_else(no_listener)?;
            found.extend(listener.rules.iter().map(|rule| (listener, Some(rule))));
            found.push((listener, None));
        } else {
            for arn in p.strings("RuleArns") {
                let (listener, at) = self.rule_of(arn)?;
                found.push((listener, at.and_then(|at| listener.rules.get(at))));
            }
        }
        let (page, next) = page(&found, p)?;
        let mut x = Xml::default();
        x.each("Rules", "member", page, |x, (l, rule)| match rule {
            Some(rule) => rule_xml(x, rule),
            None => {
                let id = l.arn.rsplit('/').next().unwrap_or_default();
                x.text("RuleArn", &format!("{}/{id}", l.arn.replacen(":listener/", ":listener-rule/", 1)));
                x.text("Priority", "default");
                x.el("Conditions", |_| {});
                actions_xml(x, "Actions", &l.action, &l.forwards);
                x.text("IsDefault", "true");
            }
        });
        x.opt("NextMarker", next.as_deref());
        Ok(x)
    }

    fn tags_mut(&mut self, arn: &str) -> Result<&mut Tags, AwsError> {
        let kind = arn.split(':').nth(5).and_then(|r| r.split('/').next()).unwrap_or_default();
        let kind = kind.to_owned();
        if !self.own_arn(arn, &kind) {
            return Err(AwsError::validation(format!("'{arn}' must be in ARN format")));
        }
        match kind.as_str() {
            "targetgroup" => {
                self.target_groups.get_mut(arn).map(|g| &mut g.tags).ok_or_else(|| {
                    AwsError::new("TargetGroupNotFound", "One or more target groups not found")
                })
            }
            "loadbalancer" => {
                self.load_balancers.get_mut(arn).map(|l| &mut l.tags).ok_or_else(|| {
                    AwsError::new("LoadBalancerNotFound", "One or more load balancers not found")
                })
            }
            "listener" => self.listeners.get_mut(arn).map(|l| &mut l.tags).ok_or_else(no_listener),
            "listener-rule" => {
                let mut rules = self.listeners.values_mut().flat_map(|listener| &mut listener.rules);
                rules
                    .find(|rule| rule.arn == arn)
                    .map(|rule| &mut rule.tags)
                    .ok_or_else(|| AwsError::new("RuleNotFound", "One or more rules not found"))
            }
            _ => Err(AwsError::validation(format!("'{arn}' must be in ARN format"))),
        }
    }

    fn resources(p: &Params) -> Result<Vec<&str>, AwsError> {
        let arns = p.strings("ResourceArns");
        if arns.is_empty() {
            return Err(AwsError::missing("ResourceArns"));
        }
        if arns.len() > 20 {
            return Err(AwsError::validation("You can only specify up to 20 resources"));
        }
        Ok(arns)
    }

    fn add_tags(&mut self, p: &Params) -> Answer {
        let tags = tags_of(p)?;
        let arns = Self::resources(p)?;
        for arn in &arns {
            let there = self.tags_mut(arn)?;
            let new = tags.keys().filter(|k| !there.contains_key(*k)).count();
            if there.len() + new > 50 {
                return Err(AwsError::new("TooManyTags", "The maximum number of tags per resource is 50"));
            }
        }
        for arn in arns {
            self.tags_mut(arn)?.extend(tags.clone());
        }
        Ok(Xml::default())
    }

    fn remove_tags(&mut self, p: &Params) -> Answer {
        let keys = p.strings("TagKeys");
        let arns = Self::resources(p)?;
        for arn in &arns {
            self.tags_mut(arn)?;
        }
        for arn in arns {
            self.tags_mut(arn)?.retain(|k, _| !keys.contains(&k.as_str()));
        }
        Ok(Xml::default())
    }

    fn describe_elb_tags(&mut self, p: &Params) -> Answer {
        let mut x = Xml::default();
        let mut all = Vec::new();
        for arn in Self::resources(p)? {
            all.push((arn, self.tags_mut(arn)?.clone()));
        }
        x.each("TagDescriptions", "member", all, |x, (arn, tags)| {
            x.text("ResourceArn", arn);
            x.each("Tags", "member", tags, |x, (k, v)| {
                x.text("Key", &k);
                x.text("Value", &v);
            });
        });
        Ok(x)
    }
}

/// What all targets of a group share when their states are worked out.
struct Context<'a> {
    group: &'a TargetGroup,
    balancer: Option<&'a LoadBalancer>,
    registration: u64,
    interval: u64,
    delay: u64,
    /// How long an unhealthy target keeps its connections.
    grace: u64,
    /// Addresses of load balancers.
    unusable: BTreeSet<Ipv4Addr>,
}

impl<'a> Context<'a> {
    fn of(aws: &'a Aws, group: &'a TargetGroup) -> Self {
        let balancer = group.load_balancer.as_ref().and_then(|arn| aws.load_balancers.get(arn));
        let registration =
            if is_network(group) { aws.timing.nlb_registration_ms } else { aws.timing.alb_registration_ms };
        let interval = aws.timing.check_interval_ms.unwrap_or(group.check.interval * 1_000);
        let unusable = aws
            .enis
            .values()
            .filter(|e| e.description.starts_with("ELB app/"))
            .flat_map(|e| e.private_ips.iter().copied())
            .collect();
        let attribute = |name: &str| {
            group.attributes.get(&format!("target_health_state.unhealthy.{name}")).map_or("", String::as_str)
        };
        let grace = match attribute("connection_termination.enabled") {
            "false" => attribute("draining_interval_seconds").parse::<u64>().unwrap_or(0) * 1_000,
            _ => 0,
        };
        Self { group, balancer, registration, interval, delay: delay_ms(&aws.timing, group), grace, unusable }
    }

    fn state(&self, aws: &Aws, id: &TargetId, target: &Target, now: u64) -> TargetState {
        let none = |state| TargetState { state, reason: None, description: None };
        if let Some(since) = target.draining_ms {
            return if now < since + self.delay {
                TargetState::new(
                    "draining",
                    "Target.DeregistrationInProgress",
                    "Target deregistration is in progress",
                )
            } else {
                TargetState::new(
                    "unused",
                    "Target.NotRegistered",
                    "Target is not registered to the target group",
                )
            };
        }
        let instance = match id {
            TargetId::Other(id) if self.group.target_type == "instance" => aws.instances.get(id.as_ref()),
            _ => None,
        };
        if let Some(instance) = instance
            && instance.state != InstanceState::Running
        {
            let (name, _) = instance.state.name();
            return TargetState::new(
                "unused",
                "Target.InvalidState",
                &format!("Target is in the {name} state"),
            );
        }
        let Some(balancer) = self.balancer else {
            return TargetState::new(
                "unused",
                "Target.NotInUse",
                "Target group is not configured to receive traffic from the load balancer",
            );
        };
        let zone = target.zone.as_deref().or(instance.map(|i| i.zone.as_str())).filter(|z| *z != "all");
        if let Some(zone) = zone
            && !balancer.zones.iter().any(|(z, _)| z == zone)
        {
            return TargetState::new(
                "unused",
                "Target.NotInUse",
                "Target is in an Availability Zone that is not enabled for the load balancer",
            );
        }
        if !self.group.check.enabled {
            return TargetState::new(
                "unavailable",
                "Target.HealthCheckDisabled",
                "Health checks are disabled",
            );
        }
        if let TargetId::Ip(IpAddr::V4(ip)) = id
            && self.unusable.contains(ip)
        {
            return TargetState::new(
                "unused",
                "Target.IpUnusable",
                "The IP address cannot be used as a target, as it is in use by a load balancer",
            );
        }
        let start = target.registered_ms.max(self.group.attached_ms) + self.registration;
        if now < start {
            return TargetState::new(
                "initial",
                "Elb.RegistrationInProgress",
                "Target registration is in progress",
            );
        }
        let initial =
            || TargetState::new("initial", "Elb.InitialHealthChecking", "Initial health checks in progress");
        let (probe, since, before) = match target.health.as_deref() {
            None => (&Probe::Passing, 0, Settled::Initial),
            Some(h) if h.since_ms <= start => (&h.probe, h.since_ms, Settled::Initial),
            Some(h) => (&h.probe, h.since_ms, h.before),
        };
        let from = since.max(start);
        match probe {
            Probe::Passing => {
                let due = match before {
                    Settled::Initial => from + self.interval,
                    Settled::Healthy => from,
                    Settled::Unhealthy => from + self.interval * self.group.check.healthy,
                };
                match before {
                    _ if now >= due => none("healthy"),
                    Settled::Unhealthy => {
                        TargetState::new("unhealthy", "Target.FailedHealthChecks", "Health checks failed")
                    }
                    _ => initial(),
                }
            }
            Probe::Failing { reason, description } => {
                let due = match before {
                    Settled::Unhealthy => from,
                    _ => from + self.interval * self.group.check.unhealthy,
                };
                match before {
                    Settled::Initial | Settled::Healthy if now >= due && now < due + self.grace => {
                        TargetState::new(
                            "unhealthy.draining",
                            "Target.FailedHealthChecks",
                            "Health checks failed",
                        )
                    }
                    _ if now >= due => TargetState::new("unhealthy", reason, description),
                    Settled::Healthy => none("healthy"),
                    _ => initial(),
                }
            }
        }
    }
}

/// A QUIC server id goes to no other target for so long.
const QUIC_REUSE_MS: u64 = 6 * 3_600_000;

const PROTOCOLS: &[&str] = &["HTTP", "HTTPS", "TCP", "TLS", "UDP", "TCP_UDP", "GENEVE", "QUIC", "TCP_QUIC"];

fn is_web(group: &TargetGroup) -> bool {
    matches!(group.protocol.as_deref(), Some("HTTP" | "HTTPS"))
}

fn is_network(group: &TargetGroup) -> bool {
    matches!(group.protocol.as_deref(), Some("TCP" | "TLS" | "UDP" | "TCP_UDP" | "QUIC" | "TCP_QUIC"))
}

fn delay_ms(timing: &Timing, group: &TargetGroup) -> u64 {
    timing.deregistration_delay_ms.unwrap_or_else(|| {
        let seconds = group
            .attributes
            .get("deregistration_delay.timeout_seconds")
            .and_then(|v| v.parse::<u64>().ok())
            .unwrap_or(300);
        seconds * 1_000
    })
}

/// Ranges besides the VPC's own subnets that AWS takes.
fn is_private(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    ip.is_private() || (a == 100 && (64..128).contains(&b))
}

fn is_instance_id(text: &str) -> bool {
    text.strip_prefix("i-").is_some_and(|h| {
        matches!(h.len(), 8 | 17) && h.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

/// Instance types that NLBs refuse.
fn is_old_type(kind: &str) -> bool {
    let family = kind.split('.').next().unwrap_or_default();
    ["c1", "cc1", "cc2", "cg1", "cg2", "cr1", "g1", "g2", "hi1", "hs1", "m1", "m2", "m3", "t1"]
        .contains(&family)
}

fn cross_zone(ip: &str) -> AwsError {
    AwsError::validation(format!(
        "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone for IP target '{ip}' since it is outside of the VPC"
    ))
}

fn invalid_target(text: String) -> AwsError {
    AwsError::new("InvalidTarget", text)
}

fn no_listener() -> AwsError {
    AwsError::new("ListenerNotFound", "One or more listeners not found")
}

fn duplicate_listener() -> AwsError {
    AwsError::new("DuplicateListener", "A listener already exists on this port for this load balancer")
}

/// Takes what a request says about a listener, all of it for a new one.
fn set_listener(listener: &mut Listener, balancer: &LoadBalancer, p: &Params) -> Result<(), AwsError> {
    let kind = balancer.kind.as_str();
    let allowed: &[&str] = match kind {
        "application" => &["HTTP", "HTTPS"],
        "network" => &["TCP", "TLS", "UDP", "TCP_UDP", "QUIC", "TCP_QUIC"],
        _ => &[],
    };
    if let Some(protocol) = p.get("Protocol") {
        if !allowed.contains(&protocol) {
            return Err(AwsError::validation(format!(
                "Listener protocol '{protocol}' must be one of '{}'",
                allowed.join(", ")
            )));
        }
        listener.protocol = Some(protocol.to_owned());
    }
    listener.port = port_number(p, "Port")?.or(listener.port);
    if kind != "gateway" && listener.protocol.is_none() {
        return Err(AwsError::validation("A listener protocol must be specified"));
    }
    if kind != "gateway" && listener.port.is_none() {
        return Err(AwsError::validation("A listener port must be specified"));
    }
    let protocol = listener.protocol.as_deref();
    if matches!(protocol, Some("QUIC" | "TCP_QUIC")) && !balancer.groups.is_empty() {
        return Err(AwsError::new(
            "InvalidConfigurationRequest",
            "QUIC listeners are not supported on load balancers with security groups",
        ));
    }
    if let Some(certificate) = p.list("Certificates").first().and_then(|c| c.get("CertificateArn")) {
        listener.certificate = Some(certificate.to_owned());
    }
    let tls = matches!(protocol, Some("HTTPS" | "TLS"));
    if tls && listener.certificate.is_none() {
        return Err(AwsError::new(
            "CertificateNotFound",
            format!("A certificate must be specified for {} listeners", protocol.unwrap_or_default()),
        ));
    }
    let policy = p.get("SslPolicy").map(str::to_owned).or(listener.ssl_policy.take());
    listener.ssl_policy = tls.then(|| policy.unwrap_or_else(|| "ELBSecurityPolicy-2016-08".to_owned()));
    let Some(action) = p.list("DefaultActions").first().copied() else { return Ok(()) };
    (listener.action, listener.forwards) = action_of(action)?;
    Ok(())
}

/// The type of an action, and the target groups that it forwards to with their weights.
fn action_of(action: &Params) -> Result<(String, Forwards), AwsError> {
    let kind = action.get("Type").unwrap_or("forward");
    let mut forwards = Vec::new();
    if kind == "forward" {
        for tuple in action.child("ForwardConfig").map(|c| c.list("TargetGroups")).unwrap_or_default() {
            let weight = tuple.get("Weight").and_then(|w| w.parse().ok());
            forwards.push((tuple.need("TargetGroupArn")?.to_owned(), weight));
        }
        if forwards.is_empty() {
            forwards.push((action.need("TargetGroupArn")?.to_owned(), None));
        }
    }
    Ok((kind.to_owned(), forwards))
}

/// The error for actions that aren't there.
pub(crate) fn unknown_action(action: &str) -> AwsError {
    AwsError::new("InvalidAction", format!("The action {action} is not valid for this endpoint."))
}

fn compatible(kind: &str, listener: Option<&str>, group: &TargetGroup) -> bool {
    let protocol = group.protocol.as_deref();
    let allowed: &[&str] = match (kind, listener) {
        ("application", Some(listener)) => {
            return group.target_type == "lambda"
                || (is_web(group) && (group.version.as_deref() != Some("GRPC") || listener == "HTTPS"));
        }
        ("network", Some("TCP")) if group.target_type == "alb" => &["TCP"],
        ("network", Some("TCP")) => &["TCP", "TCP_UDP", "TCP_QUIC"],
        ("network", Some("TLS")) => &["TCP", "TLS"],
        ("network", Some("UDP")) => &["UDP", "TCP_UDP"],
        ("network", Some("TCP_UDP")) => &["TCP_UDP"],
        ("network", Some("QUIC")) => &["QUIC", "TCP_QUIC"],
        ("network", Some("TCP_QUIC")) => &["TCP_QUIC"],
        ("gateway", _) => &["GENEVE"],
        _ => &[],
    };
    protocol.is_some_and(|p| allowed.contains(&p))
}

fn check_name(what: &str, name: &str) -> Result<(), AwsError> {
    if name.len() > 32 {
        return Err(AwsError::validation(format!("{what} '{name}' cannot be longer than '32' characters")));
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(AwsError::validation(format!(
            "{what} '{name}' can only contain characters that are alphanumeric characters or hyphens(-)"
        )));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(AwsError::validation(format!("{what} '{name}' cannot begin or end with '-'")));
    }
    Ok(())
}

fn one_of(what: &str, value: &str, allowed: &[&str]) -> Result<(), AwsError> {
    if allowed.contains(&value) {
        return Ok(());
    }
    Err(AwsError::validation(format!(
        "1 validation error detected: Value '{value}' at '{what}' failed to satisfy constraint: Member must satisfy enum value set: [{}]",
        allowed.join(", ")
    )))
}

fn port_number(p: &Params, name: &str) -> Result<Option<u16>, AwsError> {
    match p.number(name)? {
        None => Ok(None),
        Some(n) => match u16::try_from(n) {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(AwsError::validation(format!("Port '{n}' must be between '1-65535' inclusive"))),
        },
    }
}

fn tags_of(p: &Params) -> Result<Tags, AwsError> {
    let mut tags = Tags::new();
    for tag in p.list("Tags") {
        let key = tag.need("Key")?;
        if tags.insert(key.to_owned(), tag.raw("Value").unwrap_or_default().to_owned()).is_some() {
            return Err(AwsError::new("DuplicateTagKeys", format!("Tag keys must be unique: '{key}'")));
        }
        if key.chars().count() > 128 {
            return Err(AwsError::validation("The tag key is too long"));
        }
    }
    if tags.len() > 50 {
        return Err(AwsError::new("TooManyTags", "The maximum number of tags per resource is 50"));
    }
    Ok(tags)
}

fn health_check(
    p: &Params,
    old: Option<&HealthCheck>,
    protocol: Option<&str>,
    target_type: &str,
    version: Option<&str>,
) -> Result<HealthCheck, AwsError> {
    let web = matches!(protocol, Some("HTTP" | "HTTPS"));
    let lambda = target_type == "lambda";
    let check_protocol = match (p.get("HealthCheckProtocol"), old) {
        (Some(c), _) => {
            one_of("healthCheckProtocol", c, PROTOCOLS)?;
            Some(c.to_owned())
        }
        (None, Some(old)) => old.protocol.clone(),
        (None, None) if lambda => None,
        (None, None) if web || target_type == "alb" => Some("HTTP".to_owned()),
        (None, None) => Some("TCP".to_owned()),
    };
    let http = lambda || matches!(check_protocol.as_deref(), Some("HTTP" | "HTTPS"));
    if !lambda && ((web || target_type == "alb") && !http) {
        return Err(AwsError::new(
            "InvalidConfigurationRequest",
            format!("Health check protocol '{}' is not supported", check_protocol.unwrap_or_default()),
        ));
    }
    let grpc = version == Some("GRPC");
    let number =
        |name: &str, low: i64, high: i64, before: Option<u64>, default: u64| -> Result<u64, AwsError> {
            match p.number(name)? {
                None => Ok(before.unwrap_or(default)),
                Some(n) if (low..=high).contains(&n) => Ok(n.unsigned_abs()),
                Some(n) => Err(AwsError::validation(format!(
                    "{name} '{n}' must be between '{low}-{high}' inclusive"
                ))),
            }
        };
    let geneve = protocol == Some("GENEVE");
    let (interval, timeout, unhealthy) = match () {
        () if lambda => (35, 30, 2),
        () if geneve => (10, 5, 2),
        () if web => (30, 5, 2),
        () if target_type == "alb" || http => (30, 6, 2),
        () => (30, 10, 2),
    };
    let interval = number("HealthCheckIntervalSeconds", 5, 300, old.map(|o| o.interval), interval)?;
    let timeout =
        number("HealthCheckTimeoutSeconds", 2, 120, old.map(|o| o.timeout), timeout.min(interval - 1))?;
    if timeout >= interval {
        return Err(AwsError::validation(format!(
            "Health check timeout '{timeout}' must be smaller than the interval '{interval}'"
        )));
    }
    let healthy = number("HealthyThresholdCount", 2, 10, old.map(|o| o.healthy), 5)?;
    let unhealthy = number("UnhealthyThresholdCount", 2, 10, old.map(|o| o.unhealthy), unhealthy)?;
    let enabled = match p.get("HealthCheckEnabled") {
        Some("false") if !lambda => {
            return Err(AwsError::new(
                "InvalidConfigurationRequest",
                format!(
                    "Health checks cannot be disabled for target groups with target type '{target_type}'"
                ),
            ));
        }
        Some(v) => v == "true",
        None => old.map_or(!lambda, |o| o.enabled),
    };
    let matcher = p.child("Matcher");
    let http_code = matcher.and_then(|m| m.get("HttpCode")).map(str::to_owned);
    let grpc_code = matcher.and_then(|m| m.get("GrpcCode")).map(str::to_owned);
    let path = p.get("HealthCheckPath").map(str::to_owned);
    Ok(HealthCheck {
        enabled,
        protocol: check_protocol,
        port: p
            .get("HealthCheckPort")
            .map(str::to_owned)
            .or_else(|| old.and_then(|o| o.port.clone()))
            .or_else(|| match () {
                () if lambda => None,
                () if geneve => Some("80".to_owned()),
                () => Some("traffic-port".to_owned()),
            }),
        path: path.or_else(|| old.and_then(|o| o.path.clone())).or_else(|| match () {
            () if !http => None,
            () if grpc => Some("/AWS.ALB/healthcheck".to_owned()),
            () => Some("/".to_owned()),
        }),
        interval,
        timeout,
        healthy,
        unhealthy,
        http_code: http_code.or_else(|| old.and_then(|o| o.http_code.clone())).or_else(|| match () {
            () if !http || grpc => None,
            () if web || lambda => Some("200".to_owned()),
            () => Some("200-399".to_owned()),
        }),
        grpc_code: grpc_code
            .or_else(|| old.and_then(|o| o.grpc_code.clone()))
            .or_else(|| (grpc && http).then(|| "12".to_owned())),
    })
}

fn group_attributes(protocol: Option<&str>, target_type: &str) -> BTreeMap<String, String> {
    let web = matches!(protocol, Some("HTTP" | "HTTPS"));
    let udp = matches!(protocol, Some("UDP" | "TCP_UDP"));
    let quic = matches!(protocol, Some("QUIC" | "TCP_QUIC"));
    let mut list: Vec<(&str, &str)> = Vec::new();
    if target_type == "lambda" {
        list.push(("lambda.multi_value_headers.enabled", "false"));
    } else {
        list.push(("deregistration_delay.timeout_seconds", "300"));
        list.push(("stickiness.enabled", "false"));
        list.push(("load_balancing.cross_zone.enabled", "use_load_balancer_configuration"));
        list.push(("target_group_health.dns_failover.minimum_healthy_targets.count", "1"));
        list.push(("target_group_health.dns_failover.minimum_healthy_targets.percentage", "off"));
        list.push(("target_group_health.unhealthy_state_routing.minimum_healthy_targets.count", "1"));
        list.push(("target_group_health.unhealthy_state_routing.minimum_healthy_targets.percentage", "off"));
    }
    if web {
        list.push(("slow_start.duration_seconds", "0"));
        list.push(("load_balancing.algorithm.type", "round_robin"));
        list.push(("load_balancing.algorithm.anomaly_mitigation", "off"));
        list.push(("stickiness.type", "lb_cookie"));
        list.push(("stickiness.lb_cookie.duration_seconds", "86400"));
        list.push(("stickiness.app_cookie.cookie_name", ""));
        list.push(("stickiness.app_cookie.duration_seconds", "86400"));
    } else if target_type != "lambda" {
        list.push(("stickiness.type", "source_ip"));
        if protocol == Some("GENEVE") {
            list.push(("target_failover.on_deregistration", "no_rebalance"));
            list.push(("target_failover.on_unhealthy", "no_rebalance"));
        } else {
            let preserve = udp || quic || target_type != "ip";
            list.push((
                "deregistration_delay.connection_termination.enabled",
                if udp { "true" } else { "false" },
            ));
            list.push(("preserve_client_ip.enabled", if preserve { "true" } else { "false" }));
            list.push(("proxy_protocol_v2.enabled", "false"));
            list.push(("target_health_state.unhealthy.connection_termination.enabled", "true"));
            list.push(("target_health_state.unhealthy.draining_interval_seconds", "0"));
        }
    }
    list.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn attributes_xml(x: &mut Xml, attributes: &BTreeMap<String, String>) {
    x.each("Attributes", "member", attributes, |x, (k, v)| {
        x.text("Key", k);
        x.text("Value", v);
    });
}

fn group_xml(x: &mut Xml, g: &TargetGroup) {
    x.text("TargetGroupArn", &g.arn);
    x.text("TargetGroupName", &g.name);
    x.opt("Protocol", g.protocol.as_deref());
    if let Some(port) = g.port {
        x.val("Port", port);
    }
    x.opt("VpcId", g.vpc.as_deref());
    x.opt("HealthCheckProtocol", g.check.protocol.as_deref());
    x.opt("HealthCheckPort", g.check.port.as_deref());
    x.val("HealthCheckEnabled", g.check.enabled);
    x.val("HealthCheckIntervalSeconds", g.check.interval);
    x.val("HealthCheckTimeoutSeconds", g.check.timeout);
    x.val("HealthyThresholdCount", g.check.healthy);
    x.val("UnhealthyThresholdCount", g.check.unhealthy);
    x.opt("HealthCheckPath", g.check.path.as_deref());
    if g.check.http_code.is_some() || g.check.grpc_code.is_some() {
        x.el("Matcher", |x| {
            x.opt("HttpCode", g.check.http_code.as_deref());
            x.opt("GrpcCode", g.check.grpc_code.as_deref());
        });
    }
    x.each("LoadBalancerArns", "member", &g.load_balancer, |x, arn| x.escape(arn));
    x.text("TargetType", &g.target_type);
    x.opt("ProtocolVersion", g.version.as_deref());
    if g.target_type != "lambda" {
        x.text("IpAddressType", &g.ip_type);
    }
}

fn zones_xml(x: &mut Xml, l: &LoadBalancer) {
    x.each("AvailabilityZones", "member", &l.zones, |x, (zone, subnet)| {
        x.text("ZoneName", zone);
        x.text("SubnetId", subnet);
        x.el("LoadBalancerAddresses", |_| {});
    });
}

fn balancer_xml(x: &mut Xml, l: &LoadBalancer, active_before: u64) {
    x.text("LoadBalancerArn", &l.arn);
    x.text("DNSName", &l.dns);
    x.text("CanonicalHostedZoneId", "Z1H1FL5HABSF5");
    x.text("CreatedTime", &timestamp(l.created_ms));
    x.text("LoadBalancerName", &l.name);
    x.text("Scheme", &l.scheme);
    x.text("VpcId", &l.vpc);
    let state = if l.created_ms <= active_before { "active" } else { "provisioning" };
    x.el("State", |x| x.text("Code", state));
    x.text("Type", &l.kind);
    zones_xml(x, l);
    if !l.groups.is_empty() {
        x.each("SecurityGroups", "member", &l.groups, |x, g| x.escape(g));
    }
    x.text("IpAddressType", &l.ip_type);
}

fn rule_xml(x: &mut Xml, rule: &ListenerRule) {
    x.text("RuleArn", &rule.arn);
    x.val("Priority", rule.priority);
    x.el("Conditions", |x| rule.conditions.echo(x));
    actions_xml(x, "Actions", &rule.action, &rule.forwards);
    x.text("IsDefault", "false");
}

fn actions_xml(x: &mut Xml, name: &str, action: &str, forwards: &[(String, Option<u64>)]) {
    x.el(name, |x| {
        x.el("member", |x| {
            x.text("Type", action);
            if action != "forward" {
                return;
            }
            if let [(arn, _)] = forwards {
                x.text("TargetGroupArn", arn);
            }
            x.text("Order", "1");
            x.el("ForwardConfig", |x| {
                x.each("TargetGroups", "member", forwards, |x, (arn, weight)| {
                    x.text("TargetGroupArn", arn);
                    x.val("Weight", weight.unwrap_or(1));
                });
                x.el("TargetGroupStickinessConfig", |x| x.text("Enabled", "false"));
            });
        });
    });
}

fn listener_xml(x: &mut Xml, l: &Listener) {
    x.text("ListenerArn", &l.arn);
    x.text("LoadBalancerArn", &l.load_balancer);
    if let Some(port) = l.port {
        x.val("Port", port);
    }
    x.opt("Protocol", l.protocol.as_deref());
    if let Some(certificate) = &l.certificate {
        x.el("Certificates", |x| x.el("member", |x| x.text("CertificateArn", certificate)));
    }
    x.opt("SslPolicy", l.ssl_policy.as_deref());
    actions_xml(x, "DefaultActions", &l.action, &l.forwards);
}

/// One page by `Marker` and `PageSize`, and the marker of the next.
fn page<'a, T>(all: &'a [T], p: &Params) -> Result<(&'a [T], Option<String>), AwsError> {
    let size = match p.number("PageSize")? {
        None => 400,
        Some(n) => usize::try_from(n).ok().filter(|n| (1..=400).contains(n)).ok_or_else(|| {
            AwsError::validation(format!("PageSize '{n}' must be between '1-400' inclusive"))
        })?,
    };
    let start = match p.get("Marker") {
        None => 0,
        Some(m) => m
            .strip_prefix("awsim-")
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| AwsError::validation(format!("The marker '{m}' is not valid")))?,
    };
    let rest = all.get(start..).unwrap_or_default();
    Ok(match rest.get(..size) {
        Some(page) if rest.len() > size => (page, Some(format!("awsim-{}", start + size))),
        _ => (rest, None),
    })
}
