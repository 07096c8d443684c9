//! Plain data that AWS takes and answers.

use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What RegisterTargets takes. Its key in a target group is (id, port).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// An IP address or an instance id.
    pub id: String,
    /// The port.
    pub port: u16,
    /// `all` or a zone; only for addresses outside of the VPC.
    pub zone: Option<String>,
    /// `0x` and 16 hexadecimal digits; only for QUIC protocols.
    pub quic_server_id: Option<String>,
}

/// A target as DescribeTargetHealth shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedTarget {
    /// What is registered; send it as it stands here to deregister it.
    pub target: Target,
    /// How it fares.
    pub state: TargetState,
    /// AWS's machine reason, as in `Target.FailedHealthChecks`.
    pub reason: Option<String>,
    /// AWS's sentence for people.
    pub description: Option<String>,
}

/// The states of DescribeTargetHealth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetState {
    /// Being registered or checked for the first time.
    Initial,
    /// Gets traffic.
    Healthy,
    /// Fails its health checks.
    Unhealthy,
    /// Fails its health checks, and the NLB lets its connections end. It is still registered.
    UnhealthyDraining,
    /// Being deregistered.
    Draining,
    /// Gets no traffic: not attached, zone not enabled, stopped.
    Unused,
    /// No health to speak of.
    Unavailable,
}

/// The reason that AWS gives for a target that was asked for and is not registered.
pub const NOT_REGISTERED: &str = "Target.NotRegistered";

/// Every state of DescribeTargetHealth (API reference, TargetHealth), AWS's word for it and the reasons that AWS gives.
pub const TARGET_STATES: [(TargetState, &str, &[&str]); 7] = [
    (TargetState::Initial, "initial", &["Elb.RegistrationInProgress", "Elb.InitialHealthChecking"]),
    (TargetState::Healthy, "healthy", &[]),
    (
        TargetState::Unhealthy,
        "unhealthy",
        &["Target.ResponseCodeMismatch", "Target.Timeout", "Target.FailedHealthChecks", "Elb.InternalError"],
    ),
    (TargetState::UnhealthyDraining, "unhealthy.draining", &["Target.FailedHealthChecks"]),
    (TargetState::Draining, "draining", &["Target.DeregistrationInProgress"]),
    (
        TargetState::Unused,
        "unused",
        &["Target.NotInUse", "Target.InvalidState", "Target.IpUnusable", NOT_REGISTERED],
    ),
    (TargetState::Unavailable, "unavailable", &["Target.HealthCheckDisabled", "Elb.InternalError"]),
];

impl TargetState {
    /// The state of AWS's word; one that is not known says nothing about health.
    pub fn parse(word: &str) -> Self {
        let known = TARGET_STATES.iter().find(|(_, known, _)| *known == word);
        known.map_or(Self::Unavailable, |(state, ..)| *state)
    }

    /// AWS's word.
    pub fn as_str(self) -> &'static str {
        let row = TARGET_STATES.iter().find(|(state, ..)| *state == self);
        row.map_or("unavailable", |(_, word, _)| word)
    }

    /// True if the target is registered: in every state but the one that a deregistration leaves behind.
    pub const fn is_registered(self) -> bool {
        !matches!(self, Self::Draining)
    }

    /// True if the target fails its health checks.
    pub const fn is_unhealthy(self) -> bool {
        matches!(self, Self::Unhealthy | Self::UnhealthyDraining)
    }
}

/// A subnet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Subnet {
    /// `subnet-…`.
    pub id: String,
    /// Its zone.
    pub zone: String,
    /// IPv4 and IPv6 blocks.
    pub cidrs: Vec<String>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkInterface {
    /// `eni-…`.
    pub id: String,
    /// The instance that it is attached to.
    pub instance_id: Option<String>,
    /// Its VPC.
    pub vpc_id: Option<String>,
    /// 0 is the primary one.
    pub device_index: Option<i32>,
    /// Single addresses, IPv4 and IPv6.
    pub addresses: BTreeSet<IpAddr>,
    /// Delegated prefixes, IPv4 and IPv6.
    pub prefixes: Vec<IpNet>,
    /// Its security groups.
    pub security_groups: Vec<String>,
}

/// A security group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SecurityGroup {
    /// `sg-…`.
    pub id: String,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

/// Transport protocol of a rule, as EC2 writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleProtocol {
    /// `tcp`.
    Tcp,
    /// `udp`.
    Udp,
}

impl RuleProtocol {
    /// EC2's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Where a rule admits traffic from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The members of a security group.
    SecurityGroup(String),
    /// A network in canonical CIDR notation (no host bits), IPv4 or IPv6.
    Cidr(String),
}

/// What makes a rule for EC2: its identity. The description is no part of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Permission {
    /// Transport.
    pub protocol: RuleProtocol,
    /// The first port.
    pub from_port: u16,
    /// The last port.
    pub to_port: u16,
    /// From where.
    pub source: Source,
}

/// An inbound rule of a security group that a [`Permission`] can say. Others (all protocols, prefix lists, ICMP) are
/// never ours and are left out, but counted by [`SecurityGroupRules::others`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `sgr-…`.
    pub id: String,
    /// Its identity.
    pub permission: Permission,
    /// Its description; empty if there is none.
    pub description: String,
}

/// The inbound rules of one security group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SecurityGroupRules {
    /// Those that a permission can say.
    pub rules: Vec<Rule>,
    /// How many more there are.
    pub others: usize,
}
