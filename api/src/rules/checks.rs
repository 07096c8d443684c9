//! The checks behind the table, in the order of the ids.

use super::{Context, Finding, Kind, Lookup, Operation, Rule, Settings, Severity, rule};
use crate::arn::TargetGroupArn;
use crate::names;
use crate::options::{NodePortMismatch, Options};
use crate::service::{Service, ServicePort};
use crate::target_group::{IpAddressType, Protocol, TargetGroup, TargetType};
use crate::v1::{NetworkingPort, Sharing, Spec, TargetGroupBinding, TargetGroupRef, Transport};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::IpAddr;

const ARN: &str = "spec.targetGroup.arn";
const NAME: &str = "spec.targetGroup.name";
const TARGET_TYPE: &str = "spec.targetGroup.targetType";
const PROTOCOL: &str = "spec.targetGroup.protocol";
const IP_ADDRESS_TYPE: &str = "spec.targetGroup.ipAddressType";
const VPC_ID: &str = "spec.targetGroup.vpcID";
const SHARING: &str = "spec.targetGroup.sharing";
const ROLE: &str = "spec.targetGroup.assumeRole";
const ROLE_ARN: &str = "spec.targetGroup.assumeRole.roleARN";
const EXTERNAL_ID: &str = "spec.targetGroup.assumeRole.externalID";
const SERVICE: &str = "spec.serviceRef.name";
const PORT: &str = "spec.serviceRef.port";
const NODE_SELECTOR: &str = "spec.nodeSelector";

/// What the namespace's and ConfigMap's names leave to a binding's.
const LONGEST_GATE: usize = 63;
const LONGEST_SHARED: usize = 237;
/// kube-proxy's health port.
const KUBE_PROXY_HEALTH: u16 = 10256;
/// "Inbound or outbound rules per security group", per address family (VPC quotas).
const RULES_PER_GROUP: usize = 60;

pub(super) struct Look<'a> {
    operation: Operation,
    new: &'a TargetGroupBinding,
    old: Option<&'a TargetGroupBinding>,
    /// `old` with what defaulting fills in: that is no change.
    before: Option<&'a Spec>,
    context: &'a Context<'a>,
    settings: &'a Settings,
    pub(super) found: Vec<Finding>,
}

impl<'a> Look<'a> {
    pub(super) fn new(
        operation: Operation,
        new: &'a TargetGroupBinding,
        old: Option<&'a TargetGroupBinding>,
        before: Option<&'a Spec>,
        context: &'a Context<'a>,
        settings: &'a Settings,
    ) -> Self {
        Self { operation, new, old, before, context, settings, found: Vec::new() }
    }

    pub(super) fn run(&mut self) {
        self.reference();
        self.immutable();
        self.name_length();
        self.target_group();
        self.ownership();
        self.shared_namespace();
        self.service();
        self.shape_of_selector();
        self.networking();
        self.role();
        self.tags();
        self.quic();
    }

    // ---- helpers ----

    fn find(&mut self, id: &'static str, path: impl Into<String>, message: impl Into<String>) {
        let default = rule(id).map_or(Severity::Deny, |rule| rule.severity);
        self.find_as(id, default, path, message);
    }

    /// A finding whose severity differs from the rule's usual one.
    fn find_as(
        &mut self,
        id: &'static str,
        default: Severity,
        path: impl Into<String>,
        message: impl Into<String>,
    ) {
        let Some(rule) = rule(id) else { return };
        self.add(rule, self.settings.severity(rule, default), path.into(), message.into());
    }

    /// A finding on the object's own shape, of a rule that rests on more than that.
    fn find_shape(&mut self, id: &'static str, path: impl Into<String>, message: impl Into<String>) {
        let Some(rule) = rule(id).map(|rule| Rule { kind: Kind::Shape, ..*rule }) else { return };
        self.add(&rule, self.settings.severity(&rule, rule.severity), path.into(), message.into());
    }

    fn add(&mut self, rule: &Rule, severity: Severity, path: String, message: String) {
        if severity != Severity::Off {
            self.found.push(Finding { rule: rule.id, path, message, severity, kind: rule.kind });
        }
    }

    fn creating(&self) -> bool {
        self.operation == Operation::Create
    }

    /// On create, or when what `part` takes out of the spec changed.
    fn changed<T: PartialEq>(&self, part: impl Fn(&'a Spec) -> T) -> bool {
        match (self.operation, self.before) {
            (Operation::Update, Some(before)) => part(before) != part(&self.new.spec),
            _ => true,
        }
    }

    fn group(&self) -> &'a TargetGroupRef {
        &self.new.spec.target_group
    }

    /// What is written, else what AWS says.
    fn target_type(&self) -> Option<TargetType> {
        self.group().target_type.or_else(|| self.aws()?.binding_target_type())
    }

    fn protocol(&self) -> Option<Protocol> {
        self.group().protocol.or_else(|| self.aws()?.binding_protocol())
    }

    fn family(&self) -> Option<IpAddressType> {
        self.group().ip_address_type.or_else(|| Some(self.aws()?.binding_ip_address_type()))
    }

    fn aws(&self) -> Option<&'a TargetGroup> {
        self.context.target_group.found()
    }

    /// The field by which the target group is named.
    fn reference_path(&self) -> &'static str {
        if self.group().arn().is_some() { ARN } else { NAME }
    }

    // ---- TGB101 to TGB105 ----

    fn reference(&mut self) {
        let group = self.group();
        let renamed = self.changed(|spec| (spec.target_group.arn(), spec.target_group.name()));
        if group.arn().is_none() && group.name().is_none() {
            if renamed {
                self.find("TGB101", "spec.targetGroup", "no target group is named; set its ARN or its name");
            }
            return;
        }
        let Some(text) = group.arn() else { return };
        let moved = self.changed(|spec| spec.target_group.arn());
        let arn = match TargetGroupArn::parse(text) {
            Ok(arn) => arn,
            Err(error) => {
                if moved {
                    self.find("TGB102", ARN, format!("{text:?} is {error}"));
                }
                return;
            }
        };
        if moved {
            self.place(&arn);
        }
        if self.changed(|spec| (spec.target_group.arn(), spec.target_group.role().is_some()))
            && let Some(account) = self.settings.account.as_deref().filter(|own| *own != arn.account())
            && group.role().is_none()
        {
            let its = arn.account();
            let message = format!(
                "the target group is in account {its}, the controller in {account}; set assumeRole to a role of account {its}"
            );
            self.find("TGB104", ARN, message);
        }
        if renamed && let Some(name) = group.name() {
            self.name_and_arn(name, &arn);
        }
    }

    fn place(&mut self, arn: &TargetGroupArn) {
        let settings = self.settings;
        if let Some(region) = settings.region.as_deref().filter(|region| *region != arn.region()) {
            let message = format!(
                "the target group is in region {}, the controller in {region}; targets can't be registered across regions",
                arn.region()
            );
            self.find("TGB103", ARN, message);
        } else if let Some(partition) = settings.partition.as_deref().filter(|p| *p != arn.partition()) {
            let message = format!(
                "the target group is in partition {}, the controller in {partition}",
                arn.partition()
            );
            self.find("TGB103", ARN, message);
        }
    }

    fn name_and_arn(&mut self, name: &str, arn: &TargetGroupArn) {
        let message = match self.context.named {
            Lookup::Found(named) if named.arn != *arn => format!(
                "{name} is {}, not the target group of the ARN; remove one of them",
                named.arn.as_str()
            ),
            Lookup::Missing => format!("there is no target group {name}; the ARN names {}", arn.name()),
            Lookup::Unknown if name != arn.name() => format!(
                "{name} is not the target group of the ARN, which is {}; remove one of them",
                arn.name()
            ),
            _ => return,
        };
        self.find("TGB105", NAME, message);
    }

    // ---- TGB106 ----

    fn immutable(&mut self) {
        let (Operation::Update, Some(old)) = (self.operation, self.old) else { return };
        let (was, is) = (&old.spec.target_group, self.group());
        let aws = self.aws();
        let fields = [
            (ARN, was.arn(), is.arn(), self.made_anew()),
            (
                TARGET_TYPE,
                was.target_type.map(TargetType::as_str),
                is.target_type.map(TargetType::as_str),
                aws.map(|g| g.target_type.as_str()),
            ),
            (
                IP_ADDRESS_TYPE,
                was.ip_address_type.map(IpAddressType::as_str),
                is.ip_address_type.map(IpAddressType::as_str),
                aws.map(|g| g.binding_ip_address_type().as_str()),
            ),
            (VPC_ID, was.vpc_id(), is.vpc_id(), aws.and_then(|g| g.vpc_id.as_deref())),
            (
                PROTOCOL,
                was.protocol.map(Protocol::as_str),
                is.protocol.map(Protocol::as_str),
                aws.map(|g| g.protocol.as_str()),
            ),
        ];
        for (path, was, is, right) in fields {
            let Some(was) = was else { continue };
            if is == Some(was) || (is.is_some() && is == right) {
                continue;
            }
            let now = is.unwrap_or("nothing");
            self.find("TGB106", path, format!("can't change from {was} to {now}; make a new binding for another target group, or restore {was}"));
        }
    }

    /// The ARN, if its target group was deleted and made anew: only the id differs, and AWS knows the new one.
    fn made_anew(&self) -> Option<&'a str> {
        let parts = |text| {
            let arn = TargetGroupArn::parse(text).ok()?;
            Some(arn.as_str().rsplit_once('/')?.0.to_owned())
        };
        let (was, is) = (self.old?.spec.target_group.arn()?, self.group().arn()?);
        let right = self.aws()?.arn.as_str();
        (is == right && parts(was)? == parts(is)?).then_some(is)
    }

    // ---- TGB107 ----

    fn name_length(&mut self) {
        if !self.creating() {
            return;
        }
        let length = self.new.name().len();
        if self.target_type() == Some(TargetType::Ip) && length > LONGEST_GATE {
            let (severity, so) = match self.context.injects {
                Some(true) => (
                    Severity::Deny,
                    "readiness gates of its pods, which this namespace asks for, have room for 63",
                ),
                _ => (Severity::Warn, "readiness gates of its pods would have room for 63"),
            };
            self.find_as(
                "TGB107",
                severity,
                "metadata.name",
                format!("the name has {length} characters; {so}"),
            );
        }
        if self.group().sharing() == Sharing::Shared && length > LONGEST_SHARED {
            let message = format!(
                "the name has {length} characters; the ConfigMap of a Shared binding has room for {LONGEST_SHARED}"
            );
            self.find_as("TGB107", Severity::Deny, "metadata.name", message);
        }
    }

    // ---- TGB110 to TGB114, TGB116 ----

    fn target_group(&mut self) {
        let group = self.group();
        let reference = self.reference_path();
        if group.vpc_id().is_some_and(|id| !is_id(id, "vpc-"))
            && self.changed(|spec| spec.target_group.vpc_id())
        {
            let message = format!(
                "{:?} is no VPC id; it is vpc- and 8 or 17 hexadecimal digits",
                group.vpc_id().unwrap_or_default()
            );
            self.find_shape("TGB113", VPC_ID, message);
        }
        let identity = |spec: &'a Spec| {
            (spec.target_group.arn(), spec.target_group.name(), spec.target_group.role().map(|r| r.role_arn))
        };
        let other = self.changed(identity);
        let aws = match self.context.target_group {
            Lookup::Found(aws) => aws,
            Lookup::Missing => {
                if !other {
                    return;
                }
                let named = group.arn().or(group.name()).unwrap_or_default();
                self.find(
                    "TGB110",
                    reference,
                    format!("there is no target group {named} in this account and region"),
                );
                return;
            }
            Lookup::Unknown => return,
        };
        let name = aws.arn.name();
        let type_changed = other || self.changed(|spec| spec.target_group.target_type);
        match aws.binding_target_type() {
            None if !type_changed => return,
            None => {
                let message = format!(
                    "target group {name} has targets of type {}, which can't be bound; it takes instance or ip",
                    aws.target_type
                );
                self.find("TGB111", reference, message);
                return;
            }
            Some(right) if type_changed && group.target_type.is_some_and(|is| is != right) => {
                // What an update leaves out is taken from the stored object.
                let or = if self.creating() { ", or leave it out" } else { "" };
                self.find(
                    "TGB111",
                    TARGET_TYPE,
                    format!(
                        "target group {name} has targets of type {right}, not {}; write targetType: {right}{or}",
                        group.target_type.map_or("", TargetType::as_str)
                    ),
                );
            }
            Some(_) => {}
        }
        let protocol_changed = other || self.changed(|spec| spec.target_group.protocol);
        match aws.binding_protocol() {
            _ if !protocol_changed => {}
            None => {
                let message =
                    format!("target group {name} has the protocol {}, which can't be bound", aws.protocol);
                self.find("TGB111", reference, message);
            }
            Some(right) if group.protocol.is_some_and(|is| is != right) => {
                self.find(
                    "TGB114",
                    PROTOCOL,
                    format!(
                        "target group {name} has the protocol {right}, not {}",
                        group.protocol.map_or("", Protocol::as_str)
                    ),
                );
            }
            Some(_) => {}
        }
        let right = aws.binding_ip_address_type();
        if let Some(is) = group.ip_address_type.filter(|is| *is != right)
            && (other || self.changed(|spec| spec.target_group.ip_address_type))
        {
            self.find("TGB112", IP_ADDRESS_TYPE, format!("target group {name} is {right}, not {is}"));
        }
        if let (Some(is), Some(right)) = (group.vpc_id(), aws.vpc_id.as_deref())
            && is != right
            && is_id(is, "vpc-")
            && (other || self.changed(|spec| spec.target_group.vpc_id()))
        {
            self.find("TGB113", VPC_ID, format!("target group {name} is in {right}, not in {is}"));
        }
        if self.creating() && aws.load_balancer_arns.is_empty() {
            let message = format!(
                "target group {name} is attached to no load balancer; its targets get no traffic until it is"
            );
            self.find("TGB116", reference, message);
        }
    }

    // ---- TGB115, TGB118, TGB119 ----

    fn ownership(&mut self) {
        let sharing = self.group().sharing();
        if let Some(others) = self.context.others
            && !others.is_empty()
            && self.changed(|spec| (spec.target_group.arn(), spec.target_group.sharing()))
        {
            let in_the_way: Vec<String> = others
                .iter()
                .filter(|other| sharing == Sharing::Exclusive || other.sharing == Sharing::Exclusive)
                .map(|other| format!("{}/{}", other.namespace, other.name))
                .collect();
            if !in_the_way.is_empty() {
                let verb = if in_the_way.len() == 1 { "has" } else { "have" };
                let message = format!(
                    "{} {verb} this target group already; use another one, or set sharing: Shared on all of them",
                    list(&in_the_way)
                );
                self.find("TGB115", self.reference_path(), message);
            }
        }
        if self.creating() && sharing == Sharing::Exclusive && self.context.registered.is_some_and(|n| n > 0)
        {
            let n = self.context.registered.unwrap_or_default();
            let message = format!(
                "the target group already has {}; those that this binding does not want are deregistered; if others registered them, set sharing: Shared",
                targets(n)
            );
            self.find("TGB118", SHARING, message);
        }
        let was_shared = self.old.is_some_and(|old| old.spec.target_group.sharing() == Sharing::Shared);
        if self.operation == Operation::Update && was_shared && sharing == Sharing::Exclusive {
            let status =
                self.old.and_then(|old| old.status.as_ref()).and_then(|status| status.targets.as_ref());
            let own = status.and_then(|targets| usize::try_from(targets.registered).ok()).unwrap_or_default();
            let foreign = self.context.registered.unwrap_or_default().saturating_sub(own);
            if foreign > 0 {
                let message = format!(
                    "the target group has {} of others, which would be deregistered; remove them first, or stay Shared",
                    targets(foreign)
                );
                self.find("TGB119", SHARING, message);
            }
        }
    }

    // ---- TGB121 ----

    fn shared_namespace(&mut self) {
        let namespace = self.new.namespace();
        if self.group().sharing() == Sharing::Shared
            && self.changed(|spec| spec.target_group.sharing())
            && !self.settings.may_share(namespace)
        {
            let message = format!(
                "sharing: Shared needs a ConfigMap in namespace {namespace}, which the controller may not write; \
                 ask the administrator to add {namespace} to sharedTargets.namespaces of the chart"
            );
            self.find("TGB121", SHARING, message);
        }
    }

    // ---- TGB117, TGB201 to TGB211 ----

    fn service(&mut self) {
        let spec = &self.new.spec;
        let wanted = spec.service_ref.port();
        let of_service =
            |spec: &'a Spec| (&spec.service_ref, spec.target_group.target_type, spec.target_group.protocol);
        let service = match self.context.service {
            Lookup::Unknown => return,
            Lookup::Found(service) => service,
            Lookup::Missing => {
                let id = format!("{}/{}", self.new.namespace(), spec.service_ref.name);
                if wanted.is_none() && self.changed(of_service) {
                    let message = format!(
                        "Service {id} does not exist, and the port can only be filled in from it; create it first, or write {PORT}"
                    );
                    self.find_as("TGB201", Severity::Deny, SERVICE, message);
                } else if self.creating() {
                    self.find(
                        "TGB201",
                        SERVICE,
                        format!("Service {id} does not exist (yet); targets are registered when it does"),
                    );
                }
                return;
            }
        };
        let id = format!("{}/{}", service.namespace, service.name);
        if service.service_type == "ExternalName" {
            if self.changed(|spec| &spec.service_ref.name) {
                self.find(
                    "TGB202",
                    SERVICE,
                    format!(
                        "Service {id} is an ExternalName and can't have targets; use one with a selector"
                    ),
                );
            }
            return;
        }
        if self.creating() && service.selector.is_none() {
            let message = format!(
                "Service {id} has no selector; its endpoints count only if the controller runs with --endpoints-without-pods"
            );
            self.find("TGB211", SERVICE, message);
        }
        if let Some(family) = self.family()
            && self.changed(|spec| (&spec.service_ref.name, spec.target_group.ip_address_type))
        {
            let word = match family {
                IpAddressType::Ipv4 => "IPv4",
                IpAddressType::Ipv6 => "IPv6",
            };
            let families = &service.ip_families;
            if !families.is_empty() && !families.iter().any(|f| f == word) {
                let message = format!(
                    "Service {id} has ipFamilies {}, the target group is {family}; add {word} to the Service",
                    families.join(", ")
                );
                self.find("TGB210", SERVICE, message);
            }
        }
        let protocol = self.protocol();
        let Some(wanted) = wanted else {
            self.omitted_port(service, &id, protocol);
            return;
        };
        let Some(port) = service.port(wanted, protocol) else {
            if self.changed(|spec| &spec.service_ref) {
                let message =
                    format!("Service {id} has no port {}; it has {}", word(wanted), describe(&service.ports));
                self.find("TGB204", PORT, message);
            }
            return;
        };
        if let Some(protocol) = protocol.filter(|p| !p.fits_service_protocol(&port.protocol))
            && self.changed(of_service)
        {
            let message = format!(
                "port {} of Service {id} is {}, which does not fit the target group's protocol {protocol}",
                port.describe(),
                port.protocol
            );
            self.find("TGB209", PORT, message);
        }
        match self.target_type() {
            Some(TargetType::Instance) => self.node_port(service, port, &id),
            Some(TargetType::Ip) => self.pod_port(port),
            None => {}
        }
    }

    fn omitted_port(&mut self, service: &Service, id: &str, protocol: Option<Protocol>) {
        if !self.changed(|spec| &spec.service_ref) {
            return;
        }
        let fitting: Vec<ServicePort> = service
            .ports
            .iter()
            .filter(|port| protocol.is_none_or(|p| p.fits_service_protocol(&port.protocol)))
            .cloned()
            .collect();
        if fitting.len() > 1 {
            self.find(
                "TGB203",
                PORT,
                format!("Service {id} has several ports; write one of {}", describe(&fitting)),
            );
        } else if fitting.is_empty() {
            let wanted = protocol.map_or("", Protocol::as_str);
            let message = format!(
                "Service {id} has no port that fits the target group's protocol {wanted}; it has {}",
                describe(&service.ports)
            );
            self.find("TGB209", PORT, message);
        }
    }

    fn node_port(&mut self, service: &Service, port: &ServicePort, id: &str) {
        let reference = self.changed(|spec| {
            let group = &spec.target_group;
            (&spec.service_ref, group.arn(), group.name(), group.target_type)
        });
        let Some(node_port) = port.node_port.filter(|_| service.has_node_ports()) else {
            if reference {
                let message = if service.has_node_ports() {
                    format!(
                        "port {} of Service {id} has no nodePort, and instance targets need one",
                        port.describe()
                    )
                } else {
                    format!(
                        "Service {id} is {}, and instance targets need a nodePort; make it NodePort or LoadBalancer",
                        service.service_type
                    )
                };
                self.find("TGB205", PORT, message);
            }
            return;
        };
        let aws = self.aws();
        if let Some(own) = aws.and_then(|aws| aws.port).filter(|own| *own != node_port)
            && reference
        {
            let message = format!(
                "port {} of Service {id} has nodePort {node_port}, the target group port {own}; set nodePort: {own} on the Service, or the annotation {}: ignore on the binding",
                port.describe(),
                names::NODE_PORT_MISMATCH
            );
            match Options::of(self.new).0.node_port_mismatch {
                Some(NodePortMismatch::Ignore) => {}
                choice => {
                    let before = self.found.len();
                    self.find("TGB206", PORT, message);
                    // As `ignore`, it goes before what the operator decided.
                    if choice == Some(NodePortMismatch::Warn) {
                        let found = self.found.iter_mut().skip(before);
                        found.for_each(|finding| finding.severity = Severity::Warn);
                    }
                }
            }
        }
        let check =
            aws.and_then(|aws| aws.health_check_port.as_deref()).and_then(|port| port.parse::<u16>().ok());
        if let Some(check) = check
            && reference
            && check != node_port
            && check != KUBE_PROXY_HEALTH
            && Some(check) != service.health_check_node_port
        {
            let message = format!(
                "the target group's health check asks port {check} of the nodes, which is not nodePort {node_port}; use traffic-port"
            );
            self.find("TGB117", self.reference_path(), message);
        }
        if self.changed(|spec| (&spec.service_ref, &spec.networking))
            && self.opens(port, node_port) == Some(false)
        {
            let message = format!(
                "no rule opens nodePort {node_port} ({}), which the load balancer uses",
                port.protocol
            );
            self.find("TGB207", "spec.networking", message);
        }
    }

    fn pod_port(&mut self, port: &ServicePort) {
        let number = match &port.target_port {
            None => Some(port.port),
            Some(IntOrString::Int(0)) => Some(port.port),
            Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
            Some(IntOrString::String(_)) => None,
        };
        let Some(number) = number else { return };
        if self.changed(|spec| (&spec.service_ref, &spec.networking))
            && self.opens(port, number) == Some(false)
        {
            let message = format!(
                "no rule opens port {number} ({}), which the pods of this Service port listen on",
                port.protocol
            );
            self.find("TGB208", "spec.networking", message);
        }
    }

    /// Whether `networking` opens a number; `None` where it can't be known: it is absent, or names a port.
    fn opens(&self, port: &ServicePort, number: u16) -> Option<bool> {
        let networking = self.new.spec.networking.as_ref()?;
        let fits =
            |opened: &NetworkingPort| opened.protocol.unwrap_or(Transport::Tcp).as_str() == port.protocol;
        let mut named = false;
        for rule in networking.ingress() {
            if rule.ports().is_empty() && port.protocol == "TCP" {
                return Some(true);
            }
            for opened in rule.ports().iter().filter(|opened| fits(opened)) {
                match &opened.port {
                    None => return Some(true),
                    Some(IntOrString::Int(0)) => return Some(true),
                    Some(IntOrString::Int(n)) if *n == i32::from(number) => return Some(true),
                    Some(IntOrString::Int(_)) => {}
                    Some(IntOrString::String(_)) => named = true,
                }
            }
        }
        (!named).then_some(false)
    }

    // ---- TGB301 ----

    fn shape_of_selector(&mut self) {
        let Some(selector) = &self.new.spec.node_selector else { return };
        if !self.changed(|spec| (&spec.node_selector, spec.target_group.target_type)) {
            return;
        }
        if self.target_type() == Some(TargetType::Ip) {
            self.find("TGB301", NODE_SELECTOR, "chooses nodes, and the targets are pods; remove it");
        }
        if let Err(message) = selector_error(selector) {
            self.find("TGB301", NODE_SELECTOR, message);
        }
    }

    // ---- TGB302 to TGB307 ----

    fn networking(&mut self) {
        let Some(networking) = &self.new.spec.networking else { return };
        if !self.changed(|spec| {
            (&spec.networking, spec.target_group.target_type, spec.target_group.ip_address_type)
        }) {
            return;
        }
        let (family, target_type) = (self.family(), self.target_type());
        let (mut rules4, mut rules6) = (0_usize, 0_usize);
        for (i, rule) in networking.ingress().iter().enumerate() {
            // Only what is found needs a path.
            let at = || format!("spec.networking.ingress[{i}]");
            if rule.from().is_empty() {
                self.find("TGB302", at() + ".from", "is empty; name at least one securityGroup or ipBlock");
            }
            let ports = rule.ports().len().max(1);
            for (j, peer) in rule.from().iter().enumerate() {
                let at = || format!("{}.from[{j}]", at());
                match (&peer.security_group, &peer.ip_block) {
                    (Some(group), None) => {
                        rules4 = rules4.saturating_add(ports);
                        rules6 = rules6.saturating_add(ports);
                        if !is_id(&group.group_id, "sg-") {
                            let message = format!(
                                "{:?} is no security group id; it is sg- and 8 or 17 hexadecimal digits",
                                group.group_id
                            );
                            self.find("TGB304", at() + ".securityGroup.groupID", message);
                        }
                    }
                    (None, Some(block)) => {
                        let v6 = self.cidr(&block.cidr, family, || at() + ".ipBlock.cidr");
                        let rules = if v6 { &mut rules6 } else { &mut rules4 };
                        *rules = rules.saturating_add(ports);
                    }
                    (Some(_), Some(_)) => {
                        self.find("TGB302", at(), "has both a securityGroup and an ipBlock; make two entries")
                    }
                    (None, None) => self.find("TGB302", at(), "has neither a securityGroup nor an ipBlock"),
                }
            }
            for (j, port) in rule.ports().iter().enumerate() {
                self.networking_port(port, target_type, || format!("{}.ports[{j}].port", at()));
            }
        }
        let most = rules4.max(rules6);
        if self.creating() && most > RULES_PER_GROUP {
            let message = format!(
                "makes {most} rules of one address family; a security group has room for {RULES_PER_GROUP} unless the quota was raised"
            );
            self.find("TGB307", "spec.networking.ingress", message);
        }
    }

    /// Whether it is IPv6.
    fn cidr(&mut self, text: &str, family: Option<IpAddressType>, path: impl Fn() -> String) -> bool {
        let Ok(net) = text.parse::<ipnet::IpNet>() else {
            let message = match text.parse::<IpAddr>() {
                Ok(IpAddr::V4(_)) => format!("{text} is an address, not a network; write {text}/32"),
                Ok(IpAddr::V6(_)) => format!("{text} is an address, not a network; write {text}/128"),
                Err(_) => format!("{text:?} is no network in CIDR notation such as 10.0.0.0/16"),
            };
            self.find("TGB303", path(), message);
            return text.contains(':');
        };
        let v6 = matches!(net, ipnet::IpNet::V6(_));
        let other = match family {
            Some(IpAddressType::Ipv4) => v6,
            Some(IpAddressType::Ipv6) => !v6,
            None => false,
        };
        if other && let Some(family) = family {
            self.find("TGB303", path(), format!("{text} is not {family}, as the target group is"));
        }
        if net.trunc() != net {
            self.find_as(
                "TGB303",
                Severity::Warn,
                path(),
                format!("{text} has host bits set; {} is used", net.trunc()),
            );
        }
        if self.creating() && net.prefix_len() == 0 {
            self.find("TGB306", path(), format!("{text} opens the targets to the whole internet; name the load balancer's security group or subnets"));
        }
        v6
    }

    fn networking_port(
        &mut self,
        port: &NetworkingPort,
        target_type: Option<TargetType>,
        path: impl Fn() -> String,
    ) {
        match &port.port {
            None | Some(IntOrString::Int(1..=65535)) => {}
            Some(IntOrString::Int(number)) => {
                self.find("TGB305", path(), format!("{number} is no port; it is between 1 and 65535"))
            }
            Some(IntOrString::String(name)) if !is_port_name(name) => {
                let message = format!(
                    "{name:?} is no port name; it has at most 15 of a-z, 0-9 and -, and a letter among them"
                );
                self.find("TGB305", path(), message);
            }
            Some(IntOrString::String(name)) if target_type == Some(TargetType::Instance) => {
                self.find("TGB305", path(), format!("{name:?} is a container port's name, and nodes have none; write the nodePort's number"));
            }
            Some(IntOrString::String(_)) => {}
        }
    }

    // ---- TGB401, TGB402 ----

    fn role(&mut self) {
        let Some(written) = &self.group().assume_role else { return };
        if !self.changed(|spec| (&spec.target_group.assume_role, spec.target_group.target_type)) {
            return;
        }
        let Some(role) = self.group().role() else {
            if written.external_id.as_deref().is_some_and(|id| !id.is_empty()) {
                self.find("TGB401", EXTERNAL_ID, "an external id needs a role; set roleARN");
            }
            return;
        };
        if self.target_type() == Some(TargetType::Instance) {
            self.find(
                "TGB401",
                ROLE,
                "a role of another account can't register this account's instances; use ip targets",
            );
        }
        if !is_role_arn(role.role_arn) {
            let message =
                format!("{:?} is no role ARN such as arn:aws:iam::123456789012:role/name", role.role_arn);
            self.find("TGB401", ROLE_ARN, message);
        }
        if !self.settings.may_assume(role.role_arn) {
            let message = match self.settings.assume_role_allow.as_slice() {
                [] => format!(
                    "{} may not be assumed; the operator allows no role (--assume-role-allow)",
                    role.role_arn
                ),
                allowed => {
                    format!("{} may not be assumed; allowed are {}", role.role_arn, allowed.join(", "))
                }
            };
            self.find("TGB402", ROLE_ARN, message);
        }
    }

    // ---- TGB403, TGB404 ----

    fn tags(&mut self) {
        let Some(tags) = self.context.tags else { return };
        if !self.changed(|spec| (spec.target_group.arn(), spec.target_group.name())) {
            return;
        }
        let path = self.reference_path();
        for (key, value) in &self.settings.required_tags {
            match (tags.get(key), value) {
                (Some(is), Some(right)) if is != right => {
                    self.find(
                        "TGB403",
                        path,
                        format!("the target group's tag {key} is {is:?}, and must be {right:?}"),
                    );
                }
                (None, Some(right)) => {
                    self.find("TGB403", path, format!("the target group lacks the tag {key}={right}"))
                }
                (None, None) => self.find("TGB403", path, format!("the target group lacks the tag {key}")),
                (Some(_), _) => {}
            }
        }
        let Some(key) = &self.settings.namespace_tag else { return };
        let namespace = self.new.namespace();
        let value = tags.get(key).map(String::as_str);
        let listed =
            value.unwrap_or_default().split([' ', ':']).filter(|word| !word.is_empty()).any(|word| {
                word == "@all"
                    || word == namespace
                    || word
                        .strip_suffix('.')
                        .is_some_and(|prefix| !prefix.is_empty() && namespace.starts_with(prefix))
            });
        if !listed {
            let message = match value {
                Some(value) => format!(
                    "the target group is open to {value:?} (its tag {key}), not to namespace {namespace}"
                ),
                None => {
                    format!("the target group is open to no namespace; its tag {key} must list {namespace}")
                }
            };
            self.find("TGB404", path, message);
        }
    }

    // ---- TGB405 ----

    fn quic(&mut self) {
        if self.protocol().is_some_and(Protocol::is_quic)
            && self.target_type() == Some(TargetType::Instance)
            && self.changed(|spec| (spec.target_group.protocol, spec.target_group.target_type))
        {
            let message = format!(
                "{} needs ip targets, since each target has a QUIC server id of its own",
                self.protocol().map_or("", Protocol::as_str)
            );
            self.find("TGB405", TARGET_TYPE, message);
        }
    }
}

/// `80 (http), 9090 (metrics)`.
fn describe(ports: &[ServicePort]) -> String {
    if ports.is_empty() {
        return "none".to_owned();
    }
    ports.iter().map(ServicePort::describe).collect::<Vec<_>>().join(", ")
}

fn word(port: &IntOrString) -> String {
    match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(name) if name.is_empty() => "\"\"".to_owned(),
        IntOrString::String(name) => name.clone(),
    }
}

fn targets(count: usize) -> String {
    if count == 1 { "1 target".to_owned() } else { format!("{count} targets") }
}

/// At most three names, and how many more.
fn list(names: &[String]) -> String {
    let shown = names.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(3) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// `PREFIX` and 8 or 17 hexadecimal digits.
fn is_id(text: &str, prefix: &str) -> bool {
    text.strip_prefix(prefix).is_some_and(|digits| {
        matches!(digits.len(), 8 | 17)
            && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

/// IANA_SVC_NAME, as Kubernetes wants container port names.
fn is_port_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 15
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

fn is_role_arn(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let [arn, partition, iam, region, account, resource] = parts.as_slice() else { return false };
    *arn == "arn"
        && partition.starts_with("aws")
        && *iam == "iam"
        && region.is_empty()
        && account.len() == 12
        && account.bytes().all(|b| b.is_ascii_digit())
        && resource
            .strip_prefix("role/")
            .is_some_and(|name| !name.is_empty() && !name.contains(char::is_whitespace))
}

/// As the API server reads label selectors.
fn selector_error(selector: &LabelSelector) -> Result<(), String> {
    for (key, value) in selector.match_labels.iter().flatten() {
        label_key(key)?;
        label_value(value)?;
    }
    for requirement in selector.match_expressions.iter().flatten() {
        label_key(&requirement.key)?;
        let values = requirement.values.as_deref().unwrap_or_default();
        match requirement.operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                return Err(format!("{} of {:?} needs values", requirement.operator, requirement.key));
            }
            "In" | "NotIn" => values.iter().try_for_each(|value| label_value(value))?,
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                return Err(format!("{} of {:?} takes no values", requirement.operator, requirement.key));
            }
            "Exists" | "DoesNotExist" => {}
            other => {
                return Err(format!("{other:?} is no operator; it is In, NotIn, Exists or DoesNotExist"));
            }
        }
    }
    Ok(())
}

fn label_key(key: &str) -> Result<(), String> {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let prefix_is_right = prefix.is_none_or(|p| {
        !p.is_empty()
            && p.len() <= 253
            && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    });
    if prefix_is_right && !name.is_empty() && is_label_text(name) {
        return Ok(());
    }
    Err(format!("{key:?} is no label key"))
}

fn label_value(value: &str) -> Result<(), String> {
    if value.is_empty() || is_label_text(value) {
        Ok(())
    } else {
        Err(format!("{value:?} is no label value"))
    }
}

fn is_label_text(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
}
