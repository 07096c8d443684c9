//! Version v1, the hub: every rule and the controller work on it.
//!
//! These types are for reading. They drop what they don't know, so nothing is ever written back from them but
//! `status`; conversion works on JSON ([`crate::convert`]).

use crate::names;
use crate::target_group::{IpAddressType, Protocol, TargetType, words};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Binds a Kubernetes Service to an existing target group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetGroupBinding {
    /// `elbv2.k8s.aws/v1`.
    #[serde(default = "api_version")]
    pub api_version: String,
    /// `TargetGroupBinding`.
    #[serde(default = "kind")]
    pub kind: String,
    /// Name, namespace, labels, …
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What the user wants.
    #[serde(default)]
    pub spec: Spec,
    /// What the controller saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

fn api_version() -> String {
    format!("{}/v1", names::GROUP)
}

fn kind() -> String {
    names::KIND.to_owned()
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

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata.annotations.as_ref().and_then(|all| all.get(key)).map(String::as_str)
    }

    /// Whether the AWS Load Balancer Controller made this binding for an Ingress, Service or Gateway of its own.
    pub fn is_owned_by_lbc(&self) -> bool {
        self.metadata.labels.as_ref().is_some_and(|labels| {
            labels.keys().any(|key| names::LBC_OWNED_LABEL_PREFIXES.iter().any(|p| key.starts_with(p)))
        })
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
    pub node_selector: Option<LabelSelector>,
}

/// `spec.targetGroup`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetGroupRef {
    /// The ARN; wins over `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arn: Option<String>,
    /// The name, unique per account and region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
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
    pub vpc_id: Option<String>,
    /// Whether others register targets there too; absent: `Exclusive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing: Option<Sharing>,
    /// The role for a target group of another account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assume_role: Option<AssumeRole>,
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
    pub name: String,
    /// The Service's port, by number or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    pub ingress: Option<Vec<IngressRule>>,
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
    pub from: Option<Vec<Peer>>,
    /// At which ports; absent or empty: all TCP ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<NetworkingPort>>,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<IntOrString>,
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
    pub target_group_arn: Option<String>,
    /// What is true of the binding, by type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Counts of this binding's targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<TargetCounts>,
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
    pub summary: String,
    /// When AWS was last asked, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<String>,
    /// What this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}
