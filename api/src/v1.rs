//! Version v1, the hub: every rule and the controller work on it.
//!
//! These types are for reading. They drop what they don't know, so nothing is ever written back from them but
//! `status`; conversion works on JSON ([`crate::convert`]). For reviews less of them is read, and faster ([`crate::review`]).

use crate::arn::TargetGroupArn;
use crate::convert::convert_text;
use crate::crd::Version;
use crate::names;
use crate::options;
use crate::scan::Cursor;
pub use crate::scan::Unreadable;
use crate::target_group::{IpAddressType, Protocol, TargetType, words};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Binds a Kubernetes Service to an existing target group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetGroupBinding {
    /// Name, namespace, labels, …
    #[serde(default, deserialize_with = "crate::objects::metadata")]
    pub metadata: ObjectMeta,
    /// What the user wants.
    #[serde(default)]
    pub spec: Spec,
    /// What the controller saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

impl TargetGroupBinding {
    /// The name; empty if the object has none (yet).
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The namespace; empty if the object has none.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Whether deletion has begun.
    pub fn is_terminating(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// Reads an object of an admission review: all of `spec`, but of `metadata` and `status` only what rules look at,
    /// since the rest (`managedFields` above all) costs more than everything else. An object of another version is converted
    /// first. Tells what is there, for a patch.
    ///
    /// # Errors
    /// Where a value is of another type than the schema's.
    pub(crate) fn of_review(object: &mut Cursor<'_>) -> Result<(Self, Parents), Unreadable> {
        match review::version(object) {
            None | Some(Version::V1) => review::read(object),
            Some(version) => review::read_old(object, version),
        }
    }

    /// Whether the AWS Load Balancer Controller made this binding for an Ingress, Service or Gateway of its own.
    pub fn is_owned_by_lbc(&self) -> bool {
        self.metadata.labels.iter().flatten().any(|(label, _)| names::is_of_lbc(label))
    }
}

impl kube_core::Resource for TargetGroupBinding {
    type DynamicType = ();
    type Scope = kube_core::NamespaceResourceScope;

    fn kind(&(): &()) -> Cow<'_, str> {
        names::KIND.into()
    }
    fn group(&(): &()) -> Cow<'_, str> {
        names::GROUP.into()
    }
    fn version(&(): &()) -> Cow<'_, str> {
        "v1".into()
    }
    fn plural(&(): &()) -> Cow<'_, str> {
        names::PLURAL.into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The form of a binding as it was sent: its version, the objects that it has, and where it says null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parents {
    /// The version.
    pub version: Version,
    /// `spec`.
    pub spec: bool,
    /// `spec.targetGroup`.
    pub target_group: bool,
    /// `spec.serviceRef`.
    pub service_ref: bool,
    /// Members below `spec` that are null, as JSON pointers into what was sent. Server-side apply sends the keys that a chart leaves empty
    /// so; to everybody else they are absent, and the schema refuses them.
    pub nulls: Vec<String>,
}

/// `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// The target group and how targets are registered there.
    #[serde(default)]
    pub target_group: TargetGroupRef,
    /// The Service whose endpoints are registered.
    #[serde(default)]
    pub service_ref: ServiceRef,
    /// What may reach the targets; absent: security groups are left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networking: Option<Networking>,
    /// Which nodes are registered; instance targets only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<Box<LabelSelector>>,
}

/// `spec.targetGroup`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetGroupRef {
    /// The ARN; wins over `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arn: Option<Arc<str>>,
    /// The name, unique per account and region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    /// Defaulted from AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_type: Option<TargetType>,
    /// Defaulted from AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Defaulted from AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_address_type: Option<IpAddressType>,
    /// Defaulted from AWS.
    #[serde(default, rename = "vpcID", skip_serializing_if = "Option::is_none")]
    pub vpc_id: Option<Arc<str>>,
    /// Whether others register targets there too; absent: `Exclusive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing: Option<Sharing>,
    /// The role for a target group of another account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assume_role: Option<Box<AssumeRole>>,
}

impl TargetGroupRef {
    /// The ARN, where an empty text counts as absent.
    pub fn arn(&self) -> Option<&str> {
        self.arn.as_deref().filter(|text| !text.is_empty())
    }

    /// The name, where an empty text counts as absent.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref().filter(|text| !text.is_empty())
    }

    /// True for the ARN of a target group that was made in place of the one that the binding names by ARN and name: it has
    /// the same name, account and region.
    pub fn is_replaced_by(&self, arn: &str) -> bool {
        let (Some(was), Some(name)) = (self.arn(), self.name()) else { return false };
        let parsed = TargetGroupArn::parse(was).and_then(|was| Ok((was, TargetGroupArn::parse(arn)?)));
        parsed.is_ok_and(|(was, is)| is.replaces(&was) && is.name() == name)
    }

    /// The VPC, where an empty text counts as absent.
    pub fn vpc_id(&self) -> Option<&str> {
        self.vpc_id.as_deref().filter(|text| !text.is_empty())
    }

    /// `Exclusive` unless said otherwise.
    pub fn sharing(&self) -> Sharing {
        self.sharing.unwrap_or(Sharing::Exclusive)
    }

    /// The role to assume, if one is named.
    pub fn role(&self) -> Option<Role<'_>> {
        let role = self.assume_role.as_ref()?;
        let role_arn = role.role_arn.as_deref().filter(|text| !text.is_empty())?;
        Some(Role { role_arn, external_id: role.external_id.as_deref().filter(|text| !text.is_empty()) })
    }
}

words! {
    /// `spec.targetGroup.sharing`.
    Sharing {
        /// The binding owns the target group: what it does not want there is deregistered.
        Exclusive = "Exclusive",
        /// Others register targets there too: only what the binding once registered is deregistered.
        Shared = "Shared",
    }
}

/// `spec.targetGroup.assumeRole`.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AssumeRole {
    /// The role's ARN.
    #[serde(default, rename = "roleARN", skip_serializing_if = "Option::is_none")]
    pub role_arn: Option<String>,
    /// The external id that the role's trust policy asks for. Never logged.
    #[serde(default, rename = "externalID", skip_serializing_if = "Option::is_none")]
    pub external_id: Option<String>,
}

impl std::fmt::Debug for AssumeRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let external_id = self.external_id.as_ref().map(|_| "…");
        f.debug_struct("AssumeRole")
            .field("role_arn", &self.role_arn)
            .field("external_id", &external_id)
            .finish()
    }
}

/// A role to assume: an ARN that is not empty, and the external id if one is given.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Role<'a> {
    /// The role's ARN.
    pub role_arn: &'a str,
    /// The external id. Never logged.
    pub external_id: Option<&'a str>,
}

/// `spec.serviceRef`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceRef {
    /// The Service's name, in the binding's namespace.
    #[serde(default)]
    pub name: Arc<str>,
    /// The Service's port, by number or name.
    #[serde(default, deserialize_with = "port", skip_serializing_if = "Option::is_none")]
    pub port: Option<IntOrString>,
}

impl ServiceRef {
    /// The port; `0`, as the AWS Load Balancer Controller's types write it, counts as absent.
    pub fn port(&self) -> Option<&IntOrString> {
        self.port.as_ref().filter(|port| !matches!(port, IntOrString::Int(0)))
    }
}

/// `spec.networking`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Networking {
    /// What may reach the targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Box<[IngressRule]>>,
}

impl Networking {
    /// The rules; none if absent.
    pub fn ingress(&self) -> &[IngressRule] {
        self.ingress.as_deref().unwrap_or_default()
    }
}

/// `spec.networking.ingress[]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IngressRule {
    /// Who may reach the targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Box<[Peer]>>,
    /// At which ports; absent or empty: all TCP ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Box<[NetworkingPort]>>,
}

impl IngressRule {
    /// The peers; none if absent.
    pub fn from(&self) -> &[Peer] {
        self.from.as_deref().unwrap_or_default()
    }

    /// The ports; none if absent, which means all TCP ports.
    pub fn ports(&self) -> &[NetworkingPort] {
        self.ports.as_deref().unwrap_or_default()
    }
}

/// `spec.networking.ingress[].from[]`: exactly one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// The members of a security group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_group: Option<SecurityGroupPeer>,
    /// A network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_block: Option<IpBlock>,
}

/// `securityGroup` of a peer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SecurityGroupPeer {
    /// `sg-…`.
    #[serde(default, rename = "groupID")]
    pub group_id: String,
}

/// `ipBlock` of a peer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IpBlock {
    /// A network in CIDR notation, IPv4 or IPv6.
    #[serde(default)]
    pub cidr: String,
}

/// `spec.networking.ingress[].ports[]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NetworkingPort {
    /// TCP if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Transport>,
    /// A number, or the name of a container port; absent: all ports.
    #[serde(default, deserialize_with = "port", skip_serializing_if = "Option::is_none")]
    pub port: Option<IntOrString>,
}

/// A port as the schema admits it. A number that is too large for any port is kept as its digits, so that a rule can
/// tell of it; a failure to read would hide the whole object.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IntOrString>, D::Error> {
    struct Port;
    impl<'de> Visitor<'de> for Port {
        type Value = Option<IntOrString>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number or a text")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Self::Value, D::Error> {
            inner.deserialize_any(self)
        }
        fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
            let digits = || IntOrString::String(number.to_string());
            Ok(Some(i32::try_from(number).map_or_else(|_| digits(), IntOrString::Int)))
        }
        fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
            let digits = || IntOrString::String(number.to_string());
            Ok(Some(i32::try_from(number).map_or_else(|_| digits(), IntOrString::Int)))
        }
        fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
            // 80.0 prints as 80.
            let digits = number.to_string();
            Ok(Some(digits.parse().map_or(IntOrString::String(digits), IntOrString::Int)))
        }
        fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
            Ok(Some(IntOrString::String(name.to_owned())))
        }
    }
    deserializer.deserialize_any(Port)
}

words! {
    /// Transport protocol of a networking port.
    Transport {
        /// The default.
        Tcp = "TCP",
        /// UDP.
        Udp = "UDP",
    }
}

/// `status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The generation that the last pass looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The ARN that was resolved; clean-up uses it.
    #[serde(default, rename = "targetGroupARN", skip_serializing_if = "Option::is_none")]
    pub target_group_arn: Option<Arc<str>>,
    /// What is true of the binding, by type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Counts of this binding's targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<TargetCounts>,
    /// The first contact with the target group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_contact: Option<Box<FirstContact>>,
}

/// `status.firstContact`: since when a binding works on a target group, and the targets of others that were there. Clean-up
/// rests on it, so it names its owner: a copy of it, in another cluster or on another binding, gives no right to anything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FirstContact {
    /// The name of the cluster whose controller wrote it.
    #[serde(default)]
    pub cluster: Arc<str>,
    /// The UID of the binding that it is about.
    #[serde(default, rename = "bindingUID")]
    pub binding_uid: String,
    /// The target group that it is about.
    #[serde(default, rename = "targetGroupARN")]
    pub target_group_arn: Arc<str>,
    /// The sharing of the target group at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing: Option<Sharing>,
    /// The time of the first pass that could write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Targets, as `10.0.0.1:80`, that are not this cluster's and stay until somebody agrees that they go; `*` stands for
    /// all, where there are more than fit. Written also where it is empty: the status is merged into the one that is there.
    #[serde(default)]
    pub foreign_targets: Vec<String>,
}

impl FirstContact {
    /// More foreign targets than this are not listed one by one.
    pub const MOST_LISTED: usize = 1000;
    /// The entry that stands for every foreign target.
    pub const ALL: &'static str = "*";
}

/// An entry of `status.conditions`, as Kubernetes' `metav1.Condition`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it says.
    #[serde(flatten)]
    pub said: Arc<Said>,
    /// The generation that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` changed.
    pub last_transition_time: Time,
}

impl std::ops::Deref for Condition {
    type Target = Said;

    fn deref(&self) -> &Said {
        &self.said
    }
}

/// The words of a condition. Thousands of bindings say the same, which can be kept once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Said {
    /// What it is about.
    #[serde(rename = "type")]
    pub type_: Arc<str>,
    /// `True`, `False` or `Unknown`.
    pub status: Arc<str>,
    /// Why, for machines.
    #[serde(default)]
    pub reason: Arc<str>,
    /// Why, for people.
    #[serde(default)]
    pub message: Arc<str>,
}

/// `status.targets`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetCounts {
    /// How many the cluster wants.
    #[serde(default)]
    pub desired: u32,
    /// How many of these are registered.
    #[serde(default)]
    pub registered: u32,
    /// How many of these are healthy.
    #[serde(default)]
    pub healthy: u32,
    /// How many of these are unhealthy.
    #[serde(default)]
    pub unhealthy: u32,
    /// How many targets of the group are draining.
    #[serde(default)]
    pub draining: u32,
    /// `healthy/desired`, for people.
    #[serde(default)]
    pub summary: Arc<str>,
    /// When AWS was last asked, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<Arc<str>>,
    /// What this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// What [`TargetGroupBinding::of_review`] reads.
mod review {
    use super::*;

    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Sent {
        target_group: Option<TargetGroupRef>,
        service_ref: Option<ServiceRef>,
        networking: Option<Networking>,
        node_selector: Option<Box<LabelSelector>>,
    }

    pub(super) fn read(object: &mut Cursor<'_>) -> Result<(TargetGroupBinding, Parents), Unreadable> {
        let (mut metadata, mut spec, mut status) = (ObjectMeta::default(), None, None);
        let mut nulls = Vec::new();
        let read = object.object(|key, value| {
            match key {
                "metadata" => read_metadata(value, &mut metadata)?,
                "spec" => {
                    let begin = value.clone();
                    spec = value.read::<Option<Sent>>()?;
                    nulls = nulls_of(value.since(&begin))?;
                }
                "status" => status = if_readable(value, read_status)?,
                _ => value.skip()?,
            }
            Ok(())
        })?;
        read.ok_or(Unreadable::NoObject)?;
        let mut parents = Parents { spec: spec.is_some(), nulls, ..Parents::default() };
        let spec = spec.map_or_else(Spec::default, |spec| {
            parents.target_group = spec.target_group.is_some();
            parents.service_ref = spec.service_ref.is_some();
            Spec {
                target_group: spec.target_group.unwrap_or_default(),
                service_ref: spec.service_ref.unwrap_or_default(),
                networking: spec.networking,
                node_selector: spec.node_selector,
            }
        });
        Ok((TargetGroupBinding { metadata, spec, status }, parents))
    }

    /// A part that switches no rule off by being of another type: it counts as absent then.
    fn if_readable<'a, T: Default>(
        value: &mut Cursor<'a>,
        read: impl FnOnce(&mut Cursor<'a>) -> Result<T, Unreadable>,
    ) -> Result<T, Unreadable> {
        let mut reading = value.clone();
        match read(&mut reading) {
            Ok(part) => {
                *value = reading;
                Ok(part)
            }
            Err(_) => value.skip().map(|()| T::default()),
        }
    }

    /// The version that an object says it has; API servers write it first.
    pub(super) fn version(object: &Cursor<'_>) -> Option<Version> {
        let mut found = None;
        let end = object.clone().object(|key, value| {
            if key != "apiVersion" {
                return value.skip();
            }
            found = Version::of_api_version(&value.string()?);
            // The rest is not looked at.
            Err(Unreadable::NoJson)
        });
        found.filter(|_| end.is_err())
    }

    /// An object of an old version, by way of its conversion.
    pub(super) fn read_old(
        object: &mut Cursor<'_>,
        version: Version,
    ) -> Result<(TargetGroupBinding, Parents), Unreadable> {
        let mut reading = object.clone();
        let text = reading.value()?;
        let mut converted = Vec::with_capacity(text.len() + 64);
        convert_text(text, Version::V1, &mut converted)?;
        let converted = std::str::from_utf8(&converted).map_err(|_| Unreadable::NoJson)?;
        let (binding, parents) = read(&mut Cursor::of(converted))?;
        let spec = Cursor::of(text).member("spec", Cursor::value)?.flatten().unwrap_or_default();
        *object = reading;
        Ok((binding, Parents { version, nulls: nulls_of(spec)?, ..parents }))
    }

    /// The most nulls that are looked for: nobody writes so many keys.
    const MOST_NULLS: usize = 100;
    /// A spec that is longer is not searched: as values it takes many times its length.
    const LONGEST_SEARCHED: usize = 64 * 1024;

    /// Where a spec says null. Most have nothing that looks like it, and are not read a second time.
    fn nulls_of(spec: &str) -> Result<Vec<String>, Unreadable> {
        fn walk(value: &serde_json::Value, path: &str, found: &mut Vec<String>) {
            let mut below = |step: &str, value: &serde_json::Value, is_member: bool| {
                let path = format!("{path}/{step}");
                match value {
                    serde_json::Value::Null if is_member && found.len() < MOST_NULLS => found.push(path),
                    _ => walk(value, &path, found),
                }
            };
            match value {
                serde_json::Value::Object(members) => members.iter().for_each(|(key, member)| {
                    below(&key.replace('~', "~0").replace('/', "~1"), member, true);
                }),
                serde_json::Value::Array(items) => {
                    items.iter().enumerate().for_each(|(n, item)| below(&n.to_string(), item, false));
                }
                _ => {}
            }
        }
        let mut found = Vec::new();
        if spec.len() <= LONGEST_SEARCHED && spec.contains("null") {
            walk(&serde_json::from_str(spec)?, "/spec", &mut found);
        }
        Ok(found)
    }

    fn read_metadata(metadata: &mut Cursor<'_>, read: &mut ObjectMeta) -> Result<(), Unreadable> {
        let there = metadata.object(|key, value| {
            match key {
                "name" => read.name = value.read()?,
                "generateName" => read.generate_name = value.read()?,
                "namespace" => read.namespace = value.read()?,
                "deletionTimestamp" => read.deletion_timestamp = if_readable(value, Cursor::read)?,
                "annotations" => read.annotations = if_readable(value, read_annotations)?,
                _ => value.skip()?,
            }
            Ok(())
        })?;
        there.ok_or(Unreadable::NoObject)
    }

    /// Those of ours.
    fn read_annotations(
        annotations: &mut Cursor<'_>,
    ) -> Result<Option<BTreeMap<String, String>>, Unreadable> {
        let mut kept = BTreeMap::new();
        let there = annotations.object(|key, value| {
            if !options::is_ours(key) {
                return value.skip();
            }
            if !value.takes_null() {
                kept.insert(key.to_owned(), value.string()?.into_owned());
            }
            Ok(())
        })?;
        Ok(there.map(|()| kept))
    }

    /// How many targets are registered, if it says so.
    fn read_status(status: &mut Cursor<'_>) -> Result<Option<Status>, Unreadable> {
        let targets =
            status.member("targets", |targets| targets.member("registered", Cursor::read::<u64>))?;
        Ok(targets.flatten().flatten().map(|registered| {
            let registered = u32::try_from(registered.unwrap_or_default()).unwrap_or(u32::MAX);
            let targets = Some(TargetCounts { registered, ..TargetCounts::default() });
            Status { targets, ..Status::default() }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn full() -> serde_json::Value {
        json!({
            "apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding",
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u", "labels": {"a": "b"},
                "annotations": {names::NODE_PORT_MISMATCH: "warn", "other": "x\"y"},
                "deletionTimestamp": "2026-01-02T03:04:05Z",
                "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {
                "targetGroup": {"arn": "a", "sharing": "Shared"}, "serviceRef": {"name": "web", "port": "http"},
                "networking": {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 80}]}]},
                "nodeSelector": {"matchLabels": {"a": "b"}},
            },
            "status": {"observedGeneration": 3, "targets": {"registered": 4, "summary": "4/4"}, "conditions": []},
        })
    }

    #[test]
    fn a_review_is_read_as_far_as_rules_look() {
        let whole: TargetGroupBinding = serde_json::from_value(full()).unwrap();
        let (read, parents) = TargetGroupBinding::of_review(&mut Cursor::of(&full().to_string())).unwrap();
        assert_eq!(read.spec, whole.spec);
        assert_eq!((read.name(), read.namespace()), ("web", "shop"));
        assert!(read.is_terminating());
        let (read_options, _) = options::Options::of(&read);
        assert_eq!(read_options.node_port_mismatch, Some(options::NodePortMismatch::Warn));
        assert_eq!(read.metadata.annotations.as_ref().unwrap().len(), 1);
        assert_eq!(read.status.unwrap().targets.unwrap().registered, 4);
        let all = Parents { spec: true, target_group: true, service_ref: true, ..Parents::default() };
        assert_eq!(parents, all);
        let mut bare = Cursor::of(r#"{"spec": {"targetGroup": null}}"#);
        let (_, parents) = TargetGroupBinding::of_review(&mut bare).unwrap();
        let nulls = vec!["/spec/targetGroup".to_owned()];
        assert_eq!(parents, Parents { spec: true, nulls, ..Parents::default() });
    }

    #[test]
    fn a_review_of_an_old_version_is_read_as_v1() {
        let text = r#"{"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
            "spec": {"targetGroupARN": "a", "vpcID": null, "multiClusterTargetGroup": true}, "status": null} ,"#;
        let mut cursor = Cursor::of(text);
        let (read, parents) = TargetGroupBinding::of_review(&mut cursor).unwrap();
        let group = &read.spec.target_group;
        assert_eq!((read.name(), group.arn(), group.sharing()), ("web", Some("a"), Sharing::Shared));
        assert_eq!((parents.version, parents.nulls), (Version::V1Beta1, vec!["/spec/vpcID".to_owned()]));
        assert_eq!(cursor.since(&Cursor::of(text)), text.trim_end_matches([' ', ',']));
        let pod = text.replace("TargetGroupBinding", "Pod");
        assert!(TargetGroupBinding::of_review(&mut Cursor::of(&pod)).is_err());
    }

    #[test]
    fn nulls_are_found_wherever_they_stand_below_spec_but_as_items() {
        let text = r#"{"metadata": {"creationTimestamp": null}, "spec": {
            "serviceRef": {"name": "null", "port": null}, "nodeSelector": {"matchLabels": {"a/b~c": null}},
            "networking": {"ingress": [{"from": [{"ipBlock": null, "securityGroup": {"groupID": "sg-1"}}], "ports": null}]}}}"#;
        // A label's value is no text there, so the typed reading stops at it.
        assert!(TargetGroupBinding::of_review(&mut Cursor::of(text)).is_err());
        let text = text.replace(r#"{"a/b~c": null}"#, r#"{"a/b~c": "x"}, "matchExpressions": null"#);
        let (_, parents) = TargetGroupBinding::of_review(&mut Cursor::of(&text)).unwrap();
        assert_eq!(
            parents.nulls,
            [
                "/spec/networking/ingress/0/from/0/ipBlock",
                "/spec/networking/ingress/0/ports",
                "/spec/nodeSelector/matchExpressions",
                "/spec/serviceRef/port",
            ]
        );
        let many = format!(
            r#"{{"spec": {{"networking": {{"ingress": [{}{{}}]}}}}}}"#,
            r#"{"ports": null},"#.repeat(300)
        );
        let (_, parents) = TargetGroupBinding::of_review(&mut Cursor::of(&many)).unwrap();
        assert_eq!(parents.nulls.len(), 100);
    }

    #[test]
    fn a_status_or_an_annotation_of_another_type_does_not_hide_the_spec() {
        for (pointer, wrong) in [
            ("/status/targets/registered", json!("x")),
            ("/status/targets", json!([1])),
            ("/status", json!(7)),
            ("/metadata/annotations", json!("x")),
            ("/metadata/deletionTimestamp", json!("never")),
        ] {
            let mut object = full();
            *object.pointer_mut(pointer).unwrap() = wrong;
            let text = object.to_string();
            let (read, _) = TargetGroupBinding::of_review(&mut Cursor::of(&text)).unwrap();
            assert_eq!(read.spec.target_group.arn(), Some("a"), "{pointer}");
            assert_eq!(read.spec.service_ref.name.as_ref(), "web", "{pointer}");
        }
    }

    #[test]
    fn a_number_that_no_port_can_have_does_not_hide_the_object() {
        let port = |value: serde_json::Value| {
            serde_json::from_value::<ServiceRef>(json!({"name": "web", "port": value})).unwrap().port
        };
        assert_eq!(port(json!(80)), Some(IntOrString::Int(80)));
        assert_eq!(port(json!(80.0)), Some(IntOrString::Int(80)));
        assert_eq!(port(json!(3_000_000_000_u32)), Some(IntOrString::String("3000000000".into())));
        assert_eq!(port(json!("http")), Some(IntOrString::String("http".into())));
        assert_eq!(port(json!(null)), None);
    }
}
