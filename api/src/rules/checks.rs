//! The checks behind the table, in the order of the ids.

use super::{
    Context, Finding, Kind, Lookup, MOST_ENTRIES, MOST_FINDINGS, Operation, Rule, Settings, Severity,
    faulty_names, role_account, rule,
};
use crate::arn::TargetGroupArn;
use crate::names;
use crate::options::{NodePortMismatch, Options};
use crate::service::{Service, ServicePort};
use crate::target_group::{IpAddressType, Protocol, TargetGroup, TargetType};
use crate::text::{excerpt, is_dns_label, listed, quoted};
use crate::v1::{Networking, NetworkingPort, Sharing, Spec, TargetGroupBinding, TargetGroupRef, Transport};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

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

/// The longest name of a binding that a readiness gate takes (63 characters behind the slash), and a ConfigMap's name.
const LONGEST_GATE: usize = 63;
const LONGEST_SHARED: usize = 237;
/// kube-proxy's health port.
const KUBE_PROXY_HEALTH: u16 = 10256;
/// "Inbound or outbound rules per security group", per address family (VPC quotas).
const RULES_PER_GROUP: usize = 60;
/// The API server's `--service-node-port-range`, unless somebody changed it.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// The most ports of a Service, or bindings, that a message names.
const MOST_PORTS: usize = 10;
const MOST_BINDINGS: usize = 3;

pub(super) struct Look<'a> {
    operation: Operation,
    new: &'a TargetGroupBinding,
    old: Option<&'a TargetGroupBinding>,
    /// `old` with what defaulting fills in: that is no change.
    before: Option<&'a Spec>,
    context: &'a Context<'a>,
    settings: &'a Settings,
    /// False if `networking` holds lists that are too long to go through.
    is_bounded: bool,
    pub(super) found: Vec<Finding>,
    /// Number of findings of a severity that are not among `found`, since that has enough.
    pub(super) dropped: BTreeMap<Severity, usize>,
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
        Self {
            operation,
            new,
            old,
            before,
            context,
            settings,
            is_bounded: true,
            found: Vec::new(),
            dropped: BTreeMap::new(),
        }
    }

    pub(super) fn run(&mut self) {
        self.bounds();
        self.forms();
        self.reference();
        self.immutable();
        self.name_length();
        self.target_group();
        self.ownership();
        self.shared_namespace();
        self.service();
        self.shape_of_selector();
        self.role();
        self.tags();
        self.quic();
        self.annotations();
        // Last, since it finds any number of things, none of which the controller enforces.
        self.networking();
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
        if severity == Severity::Off {
            return;
        }
        if self.found.iter().filter(|finding| finding.severity == severity).count() < MOST_FINDINGS {
            self.found.push(Finding { rule: rule.id, path, message, severity, kind: rule.kind });
        } else {
            let dropped = self.dropped.entry(severity).or_default();
            *dropped = dropped.saturating_add(1);
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

    /// The target group's name, as far as it can be known.
    fn group_name(&self) -> &'a str {
        let named = || self.group().name().or(self.group().arn());
        self.aws().map(|aws| aws.arn.name()).or_else(named).unwrap_or_default()
    }

    /// The field by which the target group is named.
    fn reference_path(&self) -> &'static str {
        if self.group().arn().is_some() { ARN } else { NAME }
    }

    // ---- TGB308, TGB212 ----

    /// Looks at how long lists are, before anything goes through them. A list may be as long as the longest of its kind in
    /// the stored object, which another version or an older release let in.
    fn bounds(&mut self) {
        let Some(networking) = &self.new.spec.networking else { return };
        let before = self.before.and_then(|before| before.networking.as_ref());
        let allowed = before.map_or([MOST_ENTRIES; 3], |before| longest(before).map(|n| n.max(MOST_ENTRIES)));
        let [most_rules, most_peers, most_ports] = allowed;
        let rules = networking.ingress();
        let too_long = if rules.len() > most_rules {
            Some(("spec.networking.ingress".to_owned(), rules.len()))
        } else {
            rules.iter().enumerate().find_map(|(i, rule)| {
                let (peers, ports) = (rule.from().len(), rule.ports().len());
                let at = |list: &str| format!("spec.networking.ingress[{i}].{list}");
                (peers > most_peers)
                    .then(|| (at("from"), peers))
                    .or_else(|| (ports > most_ports).then(|| (at("ports"), ports)))
            })
        };
        if let Some((path, length)) = too_long {
            self.is_bounded = false;
            self.find(
                "TGB308",
                path,
                format!("has {length} entries, {MOST_ENTRIES} are allowed; its entries are not looked at"),
            );
        }
    }

    fn forms(&mut self) {
        let service = &*self.new.spec.service_ref.name;
        if !is_dns_label(service) && self.changed(|spec| &spec.service_ref.name) {
            let message = if service.is_empty() {
                "is empty; write the name of a Service in this namespace".to_owned()
            } else {
                format!(
                    "{} is not the name of a Service; it has 1 to 63 of a-z, 0-9 and -, and no - at an end",
                    quoted(service)
                )
            };
            self.find("TGB212", SERVICE, message);
        }
        if self.changed(|spec| (spec.target_group.name(), &spec.target_group.assume_role)) {
            for (path, message) in faulty_names(self.group()) {
                self.find("TGB212", path, message);
            }
        }
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
                    self.find("TGB102", ARN, format!("{} is {error}", quoted(text)));
                }
                return;
            }
        };
        if moved {
            self.place(&arn);
        }
        if self.changed(|spec| (spec.target_group.arn(), spec.target_group.role().map(|role| role.role_arn)))
        {
            self.account(&arn);
        }
        if renamed && let Some(name) = group.name() {
            self.name_and_arn(name, &arn);
        }
    }

    fn account(&mut self, arn: &TargetGroupArn) {
        let its = arn.account();
        let own = self.settings.account.as_deref();
        let message = match self.group().role().map(|role| role_account(role.role_arn)) {
            None if own.is_some_and(|own| own != its) => format!(
                "the target group is in account {its}, the controller in {}; set assumeRole to a role of account {its}",
                own.unwrap_or_default()
            ),
            Some(Some(account)) if account != its => format!(
                "the target group is in account {its}, the role in {account}; set assumeRole to a role of account {its}"
            ),
            _ => return,
        };
        self.find("TGB104", ARN, message);
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
        let shown = excerpt(name);
        let message = match self.context.named {
            Lookup::Found(named) if named.arn != *arn => format!(
                "{shown} is {}, not the target group of the ARN; remove one of them",
                excerpt(named.arn.resource())
            ),
            Lookup::Missing => format!("AWS has no target group {shown}; the ARN names {}", arn.name()),
            Lookup::Unknown if name != arn.name() => format!(
                "{shown} is not the target group of the ARN, which is {}; remove one of them",
                arn.name()
            ),
            _ => return,
        };
        // A manifest by name, whose ARN is the one that was filled in: another target group is meant.
        match self.old.map(|old| &old.spec.target_group).filter(|_| !self.creating()) {
            Some(was) if was.arn() == self.group().arn() && was.name().is_some_and(|was| was != name) => {
                self.find("TGB106", NAME, no_change(was.name().unwrap_or_default(), Some(name)));
            }
            _ => self.find("TGB105", NAME, message),
        }
    }

    // ---- TGB106 ----

    fn immutable(&mut self) {
        let (Operation::Update, Some(old)) = (self.operation, self.old) else { return };
        let (was, is) = (&old.spec.target_group, self.group());
        let aws = self.aws();
        let fields = [
            (ARN, was.arn(), is.arn(), self.recreated()),
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
            match (self.group().name(), old.spec.target_group.name()) {
                (Some(name), Some(old_name)) if path == ARN && is.is_none() && name != old_name => {
                    self.find("TGB106", NAME, no_change(old_name, Some(name)));
                }
                _ => self.find("TGB106", path, no_change(was, is)),
            }
        }
    }

    /// The ARN, if its target group was deleted and made again: only the id differs, and AWS knows the new one.
    fn recreated(&self) -> Option<&'a str> {
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

    /// `AWS has no target group …`, and where it was looked for.
    fn missing(&self) -> String {
        let group = self.group();
        let arn = group.arn().and_then(|arn| TargetGroupArn::parse(arn).ok());
        let named = arn.as_ref().map(TargetGroupArn::resource).or(group.name()).unwrap_or_default();
        let account = match (&arn, group.role()) {
            (Some(arn), _) => Some(arn.account()),
            (None, Some(role)) => role_account(role.role_arn),
            (None, None) => self.settings.account.as_deref(),
        };
        let region = arn.as_ref().map(TargetGroupArn::region).or(self.settings.region.as_deref());
        let place = match (account, region) {
            (Some(account), Some(region)) => format!("account {account}, region {region}"),
            _ => "this account and region".to_owned(),
        };
        format!("AWS has no target group {} in {place}; check for a typo or a deleted group", excerpt(named))
    }

    fn target_group(&mut self) {
        let group = self.group();
        let reference = self.reference_path();
        if group.vpc_id().is_some_and(|id| !is_id(id, "vpc-"))
            && self.changed(|spec| spec.target_group.vpc_id())
        {
            let message = format!(
                "{} is not a VPC ID (vpc- followed by 8 or 17 hex digits)",
                quoted(group.vpc_id().unwrap_or_default())
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
                let message = self.missing();
                self.find("TGB110", reference, message);
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
                "no load balancer uses target group {name} yet; its targets get no traffic until a listener or rule forwards to it"
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
            let conflicting: Vec<String> = others
                .iter()
                .filter(|other| sharing == Sharing::Exclusive || other.sharing == Sharing::Exclusive)
                .map(|other| format!("{}/{}", other.namespace, other.name))
                .collect();
            if !conflicting.is_empty() {
                let bindings =
                    if conflicting.len() == 1 { "TargetGroupBinding" } else { "TargetGroupBindings" };
                let message = format!(
                    "target group {} is already bound by {bindings} {}; bind another target group, or set sharing: Shared on every binding of it",
                    excerpt(self.group_name()),
                    listed(&conflicting, MOST_BINDINGS)
                );
                self.find("TGB115", self.reference_path(), message);
            }
        }
        if let Some(foreign) = self.context.foreign.filter(|foreign| *foreign > 0)
            && self.creating()
            && sharing == Sharing::Exclusive
        {
            let message = format!(
                "target group {} already has {} that this binding does not register; they stay until the annotation {} is \
                 \"true\"; if something else needs them, set sharing: Shared",
                excerpt(self.group_name()),
                targets(foreign),
                names::ADOPT_TARGETS
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
                    "the target group has {} of others, which an Exclusive binding must not have; remove them first, or stay Shared",
                    targets(foreign)
                );
                self.find("TGB119", SHARING, message);
            }
        }
    }

    // ---- TGB120 ----

    fn annotations(&mut self) {
        let of = |binding: &'a TargetGroupBinding| binding.metadata.annotations.as_ref();
        if !self.creating() && self.old.is_some_and(|old| of(old) == of(self.new)) {
            return;
        }
        let (_, unknown) = Options::of(self.new);
        for option in unknown {
            self.find("TGB120", "metadata.annotations", option.to_string());
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
        // TGB212's.
        if !is_dns_label(&spec.service_ref.name) {
            return;
        }
        let wanted = spec.service_ref.port();
        let of_service =
            |spec: &'a Spec| (&spec.service_ref, spec.target_group.target_type, spec.target_group.protocol);
        let service = match self.context.service {
            Lookup::Unknown => return,
            Lookup::Found(service) => service,
            Lookup::Missing => {
                let id = format!("{}/{}", excerpt(self.new.namespace()), spec.service_ref.name);
                if wanted.is_none() && self.changed(of_service) {
                    let message = format!(
                        "Service {id} does not exist, and the port can only be filled in from it; create it first, or write {PORT}"
                    );
                    self.find_as("TGB201", Severity::Deny, SERVICE, message);
                } else if self.creating() {
                    self.find(
                        "TGB201",
                        SERVICE,
                        format!(
                            "Service {id} does not exist yet; no targets are registered until it is created"
                        ),
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
                let guess = meant(service, wanted).map_or_else(String::new, |guess| format!("; {guess}"));
                let message = format!(
                    "Service {id} has no port {}; it has {}{guess}",
                    word(wanted),
                    describe(&service.ports)
                );
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
            Some(TargetType::Ip) => self.pod_port(service, port, &id),
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
                format!(
                    "port is required: Service {id} has several that fit{}; write one of {}",
                    protocol.map_or_else(String::new, |protocol| format!(" {protocol}")),
                    describe(&fitting)
                ),
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
                        "port {} of Service {id} has no nodePort, and instance targets need one; remove allocateLoadBalancerNodePorts: false, or set nodePort",
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
            let message = mismatch(service, port, node_port, own, self.group_name());
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
        self.reachable("TGB207", port, &IntOrString::Int(node_port.into()), "nodePort");
        if let Some(protocol) = self.dual().filter(|_| reference || self.changed(|spec| &spec.service_ref)) {
            let other = service.other_transport(port);
            let message = match other.map(|other| other.node_port) {
                Some(other) if other == Some(node_port) => return,
                Some(Some(other)) => format!(
                    "a target has one port, but Service {id} has nodePort {node_port} for {} and {other} for the other \
                     protocol of {protocol}; give both one nodePort",
                    port.protocol
                ),
                Some(None) | None => format!(
                    "Service {id} has port {} for {} only, so that nodes forward nothing else of {protocol}; add the \
                     other protocol with nodePort {node_port}",
                    port.port, port.protocol
                ),
            };
            self.find("TGB207", PORT, message);
        }
    }

    fn pod_port(&mut self, service: &Service, port: &ServicePort, id: &str) {
        let wanted = port.wanted_target_port();
        self.reachable("TGB208", port, &wanted, "pods' port");
        if let Some(protocol) = self.dual()
            && self.changed(|spec| (&spec.service_ref, spec.target_group.protocol))
            && let Some(other) = service.other_transport(port).map(ServicePort::wanted_target_port)
            && let (IntOrString::Int(one), IntOrString::Int(other)) = (&wanted, &other)
            && one != other
        {
            let message = format!(
                "a target has one port, but Service {id} leads {} to targetPort {one} and the other protocol of {protocol} \
                 to {other}; give both one targetPort",
                port.protocol
            );
            self.find("TGB208", PORT, message);
        }
    }

    /// The protocol, if it is two transports on one port.
    fn dual(&self) -> Option<Protocol> {
        self.protocol().filter(|protocol| protocol.transports().len() > 1)
    }

    /// Looks whether `networking` opens the port of the targets for every transport, and the one of the health check.
    fn reachable(&mut self, id: &'static str, port: &ServicePort, wanted: &IntOrString, what: &str) {
        if !self.changed(|spec| {
            let group = &spec.target_group;
            (&spec.service_ref, &spec.networking, group.protocol, group.target_type)
        }) {
            return;
        }
        let of_port = || Transport::from_word(&port.protocol).into_iter().collect();
        let transports: Vec<Transport> =
            self.protocol().map_or_else(of_port, |protocol| protocol.transports().to_vec());
        let check = self.aws().map(|aws| match aws.health_check_port.as_deref().map(str::parse::<u16>) {
            Some(Ok(number)) => IntOrString::Int(number.into()),
            _ => wanted.clone(),
        });
        let closed =
            |transport: Transport, wanted: &IntOrString| self.opens(transport, wanted) == Some(false);
        let mut messages = Vec::new();
        for transport in transports.iter().copied().filter(|transport| closed(*transport, wanted)) {
            let checked = transport == Transport::Tcp && check.as_ref() == Some(wanted);
            let traffic = if checked { "traffic and health checks" } else { "traffic" };
            let guess = self.service_port_opened(transport, port, wanted);
            messages.push(format!(
                "does not allow {transport} {}, the {what} that the load balancer sends {traffic} to; add it to \
                 ingress[].ports{guess}",
                bare(wanted)
            ));
        }
        if let Some(check) = check.filter(|check| closed(Transport::Tcp, check))
            && !(transports.contains(&Transport::Tcp) && check == *wanted)
        {
            messages.push(format!(
                "does not allow TCP {}, the port that the load balancer sends health checks to; add it to ingress[].ports",
                bare(&check)
            ));
        }
        messages.into_iter().for_each(|message| self.find(id, "spec.networking", message));
    }

    /// A word for somebody who opened the Service's port.
    fn service_port_opened(&self, transport: Transport, port: &ServicePort, wanted: &IntOrString) -> String {
        let number = IntOrString::Int(port.port.into());
        let name = port.name.clone().map(IntOrString::String);
        let opened = |it: &IntOrString| it != wanted && self.names_port(transport, it);
        match std::iter::once(number).chain(name).find(opened) {
            Some(it) => format!("; {}, which it allows, is the Service's port", bare(&it)),
            None => String::new(),
        }
    }

    fn opened(&self, transport: Transport) -> impl Iterator<Item = &'a NetworkingPort> {
        let rules = self.new.spec.networking.iter().flat_map(Networking::ingress);
        rules
            .flat_map(|rule| rule.ports())
            .filter(move |opened| opened.protocol.unwrap_or(Transport::Tcp) == transport)
    }

    fn names_port(&self, transport: Transport, wanted: &IntOrString) -> bool {
        self.is_bounded && self.opened(transport).any(|opened| opened.port.as_ref() == Some(wanted))
    }

    /// True if `networking` opens a port; `None` where it can't be known: it is absent or too long, or one side has a
    /// name and the other a number.
    fn opens(&self, transport: Transport, wanted: &IntOrString) -> Option<bool> {
        let networking = self.new.spec.networking.as_ref().filter(|_| self.is_bounded)?;
        if transport == Transport::Tcp && networking.ingress().iter().any(|rule| rule.ports().is_empty()) {
            return Some(true);
        }
        let mut unknown = false;
        for opened in self.opened(transport) {
            match (&opened.port, wanted) {
                (None | Some(IntOrString::Int(0)), _) => return Some(true),
                (Some(is), wanted) if is == wanted => return Some(true),
                (Some(IntOrString::Int(_)), IntOrString::Int(_))
                | (Some(IntOrString::String(_)), IntOrString::String(_)) => {}
                _ => unknown = true,
            }
        }
        (!unknown).then_some(false)
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
        let Some(networking) = self.new.spec.networking.as_ref().filter(|_| self.is_bounded) else { return };
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
                                "{} is not a security group ID (sg- followed by 8 or 17 hex digits)",
                                quoted(&group.group_id)
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
                Err(_) if text.trim().parse::<ipnet::IpNet>().is_ok() => {
                    format!("{} has blanks around it; remove them", quoted(text))
                }
                Err(_) => format!("{} is not a network in CIDR notation such as 10.0.0.0/16", quoted(text)),
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
                self.find("TGB305", path(), format!("{number} is not a port; ports are 1 to 65535"))
            }
            Some(IntOrString::String(name)) if !is_port_name(name) => {
                let guess = match name.trim().parse::<u16>() {
                    Ok(number) => format!("a port in quotes is a name; write {number} without them"),
                    Err(_) => "it has at most 15 of a-z, 0-9 and -, and a letter among them".to_owned(),
                };
                self.find("TGB305", path(), format!("{} is not a port name; {guess}", quoted(name)));
            }
            Some(IntOrString::String(name)) if target_type == Some(TargetType::Instance) => {
                let message = format!(
                    "{} is a container port's name, and nodes have none; write the nodePort's number",
                    quoted(name)
                );
                self.find("TGB305", path(), message);
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
        if role_account(role.role_arn).is_none() {
            let message = format!(
                "{} is not a role ARN such as arn:aws:iam::123456789012:role/name",
                quoted(role.role_arn)
            );
            self.find("TGB401", ROLE_ARN, message);
        }
        if !self.settings.may_assume(role.role_arn) {
            let allows = match self.settings.assume_role_allow.as_slice() {
                [] => "the operator allows no role",
                _ => "no pattern of the operator's matches it",
            };
            let message = format!(
                "{} may not be assumed: {allows} (--assume-role-allow); ask who runs the controller to allow it",
                excerpt(role.role_arn)
            );
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
                        format!("the target group's tag {key} is {}, and must be {right:?}", quoted(is)),
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
            let (group, namespace) = (excerpt(self.group_name()), excerpt(namespace));
            let tag = match value {
                Some(value) => format!("its AWS tag {key:?} lists {}", quoted(value)),
                None => format!("it has no AWS tag {key:?}"),
            };
            let message = format!(
                "namespace {namespace} may not bind target group {group}: {tag}; ask the owner of the target group to add {namespace} there"
            );
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

/// The length of the longest list of each kind: rules, peers of a rule, ports of a rule.
fn longest(networking: &Networking) -> [usize; 3] {
    let rules = networking.ingress();
    let peers = rules.iter().map(|rule| rule.from().len()).max();
    let ports = rules.iter().map(|rule| rule.ports().len()).max();
    [rules.len(), peers.unwrap_or_default(), ports.unwrap_or_default()]
}

/// TGB106's message.
fn no_change(was: &str, is: Option<&str>) -> String {
    let was = excerpt(was);
    match is {
        Some(is) => format!(
            "can't change from {was} to {}; create a new binding for the other target group and delete this one, or restore {was}",
            excerpt(is)
        ),
        None => format!("can't be removed once set (was {was})"),
    }
}

/// TGB206's message.
fn mismatch(service: &Service, port: &ServicePort, node_port: u16, own: u16, group: &str) -> String {
    let annotation = names::NODE_PORT_MISMATCH;
    let (id, port_shown, group) =
        (format!("{}/{}", service.namespace, service.name), port.describe(), excerpt(group));
    let created = format!(
        "Service {id} exposes port {port_shown} at nodePort {node_port}, but target group {group} was created for port {own}"
    );
    let meant = format!("or, if {node_port} is intended, annotate this binding with {annotation}: ignore");
    match service.ports.iter().find(|other| other.node_port == Some(own)) {
        Some(other) => format!(
            "{created}, which is the nodePort of port {}; write {}, {meant}",
            other.describe(),
            other.port
        ),
        None if NODE_PORTS.contains(&own) => {
            format!("{created}; set nodePort: {own} on that Service port, {meant}")
        }
        None => format!(
            "{created}, which no nodePort can have ({}-{}); recreate the target group with port {node_port}, {meant}",
            NODE_PORTS.start(),
            NODE_PORTS.end()
        ),
    }
}

/// A guess at the port of a Service that somebody means who names one that it lacks.
fn meant(service: &Service, wanted: &IntOrString) -> Option<String> {
    let find = |is: &dyn Fn(&ServicePort) -> bool| service.ports.iter().find(|port| is(port));
    let write = |port: &ServicePort| match &port.name {
        // One number may stand for two protocols.
        Some(name) if service.other_transport(port).is_some() => name.clone(),
        _ => port.port.to_string(),
    };
    let (number, name) = match wanted {
        IntOrString::Int(number) => (u16::try_from(*number).ok(), None),
        // As in `80`, `80/TCP`.
        IntOrString::String(text) => {
            (text.split('/').next().and_then(|number| number.trim().parse().ok()), Some(text.trim()))
        }
    };
    if let Some(number) = number {
        if name.is_some() && find(&|port| port.port == number).is_some() {
            return Some(format!("a port in quotes is a name, so write {number} without quotes"));
        }
        let is_target = |port: &ServicePort| port.wanted_target_port() == IntOrString::Int(number.into());
        if let Some(port) = find(&is_target) {
            return Some(format!(
                "{number} is the targetPort of {}, so write {}",
                port.describe(),
                write(port)
            ));
        }
        let port = find(&|port| port.node_port == Some(number))?;
        return Some(format!("{number} is the nodePort of {}, so write {}", port.describe(), write(port)));
    }
    let name = name.filter(|name| !name.is_empty())?;
    let is_target = |port: &ServicePort| port.target_port == Some(IntOrString::String(name.to_owned()));
    if let Some(port) = find(&is_target) {
        let shown = excerpt(name);
        return Some(format!("{shown} is the targetPort of {}, so write {}", port.describe(), write(port)));
    }
    let alike = find(&|port| port.name.as_deref().is_some_and(|is| is.eq_ignore_ascii_case(name)))?;
    Some(format!("write {}", alike.name.as_deref().unwrap_or_default()))
}

/// `80 (http), 9090 (metrics)`.
fn describe(ports: &[ServicePort]) -> String {
    if ports.is_empty() {
        return "none".to_owned();
    }
    listed(ports.iter().map(ServicePort::describe), MOST_PORTS)
}

/// A port as it is written in a manifest: names in quotes. A number that is too large for a port is kept as a text.
fn word(port: &IntOrString) -> String {
    match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(digits)
            if digits.len() > 5 && digits.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            excerpt(digits).into_owned()
        }
        IntOrString::String(name) => format!("named {}", quoted(name)),
    }
}

/// A port without quotes.
fn bare(port: &IntOrString) -> String {
    match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(name) => excerpt(name).into_owned(),
    }
}

fn targets(count: usize) -> String {
    if count == 1 { "1 target".to_owned() } else { format!("{count} targets") }
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
                return Err(format!("{} of {} needs values", requirement.operator, quoted(&requirement.key)));
            }
            "In" | "NotIn" => values.iter().try_for_each(|value| label_value(value))?,
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                return Err(format!(
                    "{} of {} takes no values",
                    requirement.operator,
                    quoted(&requirement.key)
                ));
            }
            "Exists" | "DoesNotExist" => {}
            other => {
                return Err(format!(
                    "{} is not an operator; it is In, NotIn, Exists or DoesNotExist",
                    quoted(other)
                ));
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
    Err(format!("{} is not a label key", quoted(key)))
}

fn label_value(value: &str) -> Result<(), String> {
    if value.is_empty() || is_label_text(value) {
        Ok(())
    } else {
        Err(format!("{} is not a label value", quoted(value)))
    }
}

fn is_label_text(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
}
