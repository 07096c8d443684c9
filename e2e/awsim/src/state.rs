//! What one account has in one region: the resources as plain values, made by AWS calls or seeded with chosen ids.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::wire::Params;

/// Tags by key.
pub type Tags = BTreeMap<String, String>;

/// A VPC.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Vpc {
    /// `vpc-…`
    pub id: String,
    /// The associated IPv4 blocks, the primary one first.
    pub cidrs: Vec<Ipv4Net>,
    /// The associated IPv6 blocks.
    pub ipv6_cidrs: Vec<Ipv6Net>,
    /// Whether it is the default VPC: revoking unknown rules is a success there.
    pub is_default: bool,
    /// Tags.
    pub tags: Tags,
}

/// A subnet.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Subnet {
    /// `subnet-…`
    pub id: String,
    /// Its VPC.
    pub vpc: String,
    /// IPv4 block.
    pub cidr: Option<Ipv4Net>,
    /// IPv6 block.
    pub ipv6_cidr: Option<Ipv6Net>,
    /// The zone, as in `us-west-2a`.
    pub zone: String,
    /// Tags.
    pub tags: Tags,
}

/// The state of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Starting.
    Pending,
    /// Up.
    #[default]
    Running,
    /// Halted; can be started again.
    Stopped,
    /// Gone, still visible for a while.
    Terminated,
}

impl InstanceState {
    /// AWS's name and number of it.
    #[must_use]
    pub fn name(self) -> (&'static str, u16) {
        match self {
            Self::Pending => ("pending", 0),
            Self::Running => ("running", 16),
            Self::Stopped => ("stopped", 80),
            Self::Terminated => ("terminated", 48),
        }
    }
}

/// An instance; its addresses are those of its network interfaces.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// `i-…`
    pub id: String,
    /// Its VPC.
    pub vpc: String,
    /// The subnet of the first network interface.
    pub subnet: String,
    /// The zone.
    pub zone: String,
    /// The state.
    pub state: InstanceState,
    /// As in `m5.large`.
    pub instance_type: String,
    /// `ip-10-0-0-1.us-west-2.compute.internal`
    pub private_dns: String,
    /// The first IPv4 address.
    pub private_ip: Option<Ipv4Addr>,
    /// Security groups of the first network interface.
    pub groups: Vec<String>,
    /// Since when it has the state, milliseconds.
    pub changed_ms: u64,
    /// Tags.
    pub tags: Tags,
}

/// A network interface.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Eni {
    /// `eni-…`
    pub id: String,
    /// The subnet.
    pub subnet: String,
    /// The VPC.
    pub vpc: String,
    /// The zone.
    pub zone: String,
    /// Security groups.
    pub groups: Vec<String>,
    /// The instance it is attached to.
    pub instance: Option<String>,
    /// 0 for the first of an instance.
    pub device_index: u16,
    /// IPv4 addresses, the primary one first.
    pub private_ips: Vec<Ipv4Addr>,
    /// IPv6 addresses.
    pub ipv6: Vec<Ipv6Addr>,
    /// Delegated IPv4 prefixes (`/28`; seeding takes any size).
    pub prefixes: Vec<Ipv4Net>,
    /// Delegated IPv6 prefixes (`/80`).
    pub ipv6_prefixes: Vec<Ipv6Net>,
    /// Text.
    pub description: String,
    /// Tags.
    pub tags: Tags,
}

/// Where a rule lets traffic come from or go to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An IPv4 block.
    Ipv4(Ipv4Net),
    /// An IPv6 block.
    Ipv6(Ipv6Net),
    /// A security group and the account that owns it.
    Group(String, String),
    /// A prefix list.
    PrefixList(String),
}

/// One rule: one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `sgr-…`
    #[serde(default)]
    pub id: String,
    /// Outbound.
    #[serde(default)]
    pub egress: bool,
    /// `tcp`, `udp`, `icmp`, `-1` or a number.
    pub protocol: String,
    /// First port, −1 for all.
    pub from: i64,
    /// Last port, −1 for all.
    pub to: i64,
    /// The other side.
    pub source: Source,
    /// Text, no part of the identity.
    #[serde(default)]
    pub description: Option<String>,
    /// Tags.
    #[serde(default)]
    pub tags: Tags,
}

impl Rule {
    /// Whether AWS takes both for the same rule: everything but the description.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.egress == other.egress
            && self.protocol == other.protocol
            && self.from == other.from
            && self.to == other.to
            && self.source == other.source
    }
}

/// A security group.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SecurityGroup {
    /// `sg-…`
    pub id: String,
    /// Unique in the VPC, ignoring case.
    pub name: String,
    /// Text.
    pub description: String,
    /// The VPC.
    pub vpc: String,
    /// Rules of both directions.
    pub rules: Vec<Rule>,
    /// Tags.
    pub tags: Tags,
}

/// A target's id: an address, else an instance id or ARN.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetId {
    /// An address.
    Ip(IpAddr),
    /// Anything else.
    Other(Box<str>),
}

impl TargetId {
    /// From the text of a request.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Other(text.into()), Self::Ip)
    }
}

impl std::fmt::Display for TargetId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// What a health check finds, set from outside.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Checks pass.
    #[default]
    Passing,
    /// Checks fail with AWS's reason, as in `Target.Timeout`, and description.
    Failing {
        /// As in `Target.ResponseCodeMismatch`.
        reason: String,
        /// As in `Health checks failed with these codes: [503]`.
        description: String,
    },
}

/// A health set from outside and what was before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What checks find.
    pub probe: Probe,
    /// Since when, milliseconds.
    pub since_ms: u64,
    /// The state at that moment.
    pub before: Settled,
}

/// A state without the events under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// No check has decided.
    Initial,
    /// Good.
    Healthy,
    /// Bad.
    Unhealthy,
}

/// A registered target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The zone: of the subnet, as given, or none (instances).
    pub zone: Option<Box<str>>,
    /// `0x…`
    pub quic_server_id: Option<Box<str>>,
    /// When, milliseconds.
    pub registered_ms: u64,
    /// When it was deregistered while in use.
    pub draining_ms: Option<u64>,
    /// Health set from outside.
    pub health: Option<Box<Health>>,
}

/// How a target group checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// Always but for lambda.
    pub enabled: bool,
    /// `HTTP`, `HTTPS` or `TCP`.
    pub protocol: Option<String>,
    /// `traffic-port` or a number.
    pub port: Option<String>,
    /// For HTTP and HTTPS.
    pub path: Option<String>,
    /// Seconds.
    pub interval: u64,
    /// Seconds.
    pub timeout: u64,
    /// Passes until healthy again.
    pub healthy: u64,
    /// Failures until unhealthy.
    pub unhealthy: u64,
    /// `HttpCode` of the matcher.
    pub http_code: Option<String>,
    /// `GrpcCode` of the matcher.
    pub grpc_code: Option<String>,
}

/// A target group.
#[derive(Debug, Clone)]
pub struct TargetGroup {
    /// The ARN.
    pub arn: String,
    /// The name.
    pub name: String,
    /// `HTTP` … `TCP_QUIC`; none for lambda.
    pub protocol: Option<String>,
    /// `HTTP1`, `HTTP2`, `GRPC`; for HTTP and HTTPS.
    pub version: Option<String>,
    /// The default port.
    pub port: Option<u16>,
    /// The VPC.
    pub vpc: Option<String>,
    /// `instance`, `ip`, `lambda`, `alb`.
    pub target_type: String,
    /// `ipv4` or `ipv6`.
    pub ip_type: String,
    /// Checks.
    pub check: HealthCheck,
    /// Attributes.
    pub attributes: BTreeMap<String, String>,
    /// Tags.
    pub tags: Tags,
    /// Targets by id and port (0 for lambda).
    pub targets: BTreeMap<(TargetId, u16), Target>,
    /// The load balancer whose listener forwards here.
    pub load_balancer: Option<String>,
    /// Since when.
    pub attached_ms: u64,
}

/// A load balancer.
#[derive(Debug, Clone)]
pub struct LoadBalancer {
    /// The ARN.
    pub arn: String,
    /// The name.
    pub name: String,
    /// Host name.
    pub dns: String,
    /// `internet-facing` or `internal`.
    pub scheme: String,
    /// The VPC.
    pub vpc: String,
    /// `application`, `network`, `gateway`.
    pub kind: String,
    /// Enabled zones and their subnets.
    pub zones: Vec<(String, String)>,
    /// Security groups.
    pub groups: Vec<String>,
    /// `ipv4`, `dualstack`, …
    pub ip_type: String,
    /// Attributes.
    pub attributes: BTreeMap<String, String>,
    /// Tags.
    pub tags: Tags,
    /// When it was made.
    pub created_ms: u64,
}

/// Target groups that an action forwards to, with their weights.
pub type Forwards = Vec<(String, Option<u64>)>;

/// A listener.
#[derive(Debug, Clone)]
pub struct Listener {
    /// The ARN.
    pub arn: String,
    /// Its load balancer.
    pub load_balancer: String,
    /// `HTTP` … `TCP_QUIC`; none for gateways.
    pub protocol: Option<String>,
    /// The port; none for gateways.
    pub port: Option<u16>,
    /// Target groups of the default action with their weights; empty for other actions.
    pub forwards: Forwards,
    /// The type of the default action.
    pub action: String,
    /// The certificate of a TLS listener.
    pub certificate: Option<String>,
    /// The TLS policy.
    pub ssl_policy: Option<String>,
    /// Rules besides the default one.
    pub rules: Vec<ListenerRule>,
    /// Tags.
    pub tags: Tags,
}

/// A rule of a listener.
#[derive(Debug, Clone)]
pub struct ListenerRule {
    /// The ARN.
    pub arn: String,
    /// The lower, the earlier.
    pub priority: i64,
    /// As they were given; nothing is matched against them.
    pub conditions: Params,
    /// Target groups of the action with their weights; empty for other actions.
    pub forwards: Forwards,
    /// The type of the action.
    pub action: String,
    /// Tags.
    pub tags: Tags,
}

/// How long things take, milliseconds of simulated time. The default is AWS's; [`Timing::fast`] is for tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timing {
    /// Registration with an ALB until its checks begin.
    pub alb_registration_ms: u64,
    /// Registration with an NLB until its checks begin.
    pub nlb_registration_ms: u64,
    /// In place of every group's check interval.
    pub check_interval_ms: Option<u64>,
    /// In place of every group's deregistration delay.
    pub deregistration_delay_ms: Option<u64>,
    /// A new load balancer until it is active.
    pub provisioning_ms: u64,
    /// A terminated instance's stay in its groups.
    pub terminated_ms: u64,
    /// Reads see everything as it was this long ago (eventual consistency); 0 is off.
    pub stale_ms: u64,
    /// Whether a draining target may be registered again.
    pub refuse_draining: bool,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            alb_registration_ms: 1_000,
            nlb_registration_ms: 180_000,
            check_interval_ms: None,
            deregistration_delay_ms: None,
            provisioning_ms: 120_000,
            terminated_ms: 60_000,
            stale_ms: 0,
            refuse_draining: false,
        }
    }
}

impl Timing {
    /// Fractions of a second for everything.
    #[must_use]
    pub fn fast() -> Self {
        Self {
            alb_registration_ms: 20,
            nlb_registration_ms: 60,
            check_interval_ms: Some(30),
            deregistration_delay_ms: Some(200),
            provisioning_ms: 0,
            terminated_ms: 100,
            ..Self::default()
        }
    }
}

/// Quotas of an account and region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quotas {
    /// Instance and ip targets of a target group.
    pub targets_per_group: usize,
    /// Targets of an application load balancer; one in two of its target groups counts twice.
    pub targets_per_alb: usize,
    /// Target groups of an application load balancer.
    pub groups_per_alb: usize,
    /// Target groups of an action.
    pub groups_per_action: usize,
    /// How often a target may be registered with an application load balancer.
    pub registrations_per_alb: usize,
    /// Targets of a network load balancer in a zone, in target groups without cross-zone balancing.
    pub targets_per_nlb_zone: usize,
    /// Targets of a network load balancer in target groups with cross-zone balancing.
    pub targets_per_nlb_cross_zone: usize,
    /// Targets of a network load balancer.
    pub targets_per_nlb: usize,
    /// Target groups.
    pub target_groups: usize,
    /// Load balancers.
    pub load_balancers: usize,
    /// Listeners of a load balancer.
    pub listeners: usize,
    /// Rules of a load balancer besides the default ones.
    pub listener_rules: usize,
    /// Rules of a security group per direction and IP family.
    pub rules_per_group: usize,
    /// Security groups.
    pub security_groups: usize,
    /// Security groups of a network interface.
    pub groups_per_interface: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            targets_per_group: 1_000,
            targets_per_alb: 1_000,
            groups_per_alb: 100,
            groups_per_action: 5,
            registrations_per_alb: 100,
            targets_per_nlb_zone: 500,
            targets_per_nlb_cross_zone: 1_000,
            targets_per_nlb: 3_000,
            target_groups: 3_000,
            load_balancers: 50,
            listeners: 50,
            listener_rules: 100,
            rules_per_group: 60,
            security_groups: 2_500,
            groups_per_interface: 5,
        }
    }
}

/// Everything of one account in one region: a state machine from calls and a clock to answers.
#[derive(Debug, Clone)]
pub struct Aws {
    /// Twelve digits.
    pub account: String,
    /// As in `us-west-2`.
    pub region: String,
    /// Timers.
    pub timing: Timing,
    /// Quotas.
    pub quotas: Quotas,
    /// VPCs by id.
    pub vpcs: BTreeMap<String, Vpc>,
    /// Subnets by id.
    pub subnets: BTreeMap<String, Subnet>,
    /// Instances by id.
    pub instances: BTreeMap<String, Instance>,
    /// Network interfaces by id.
    pub enis: BTreeMap<String, Eni>,
    /// Security groups by id.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// Target groups by ARN.
    pub target_groups: BTreeMap<String, TargetGroup>,
    /// Load balancers by ARN.
    pub load_balancers: BTreeMap<String, LoadBalancer>,
    /// Listeners by ARN.
    pub listeners: BTreeMap<String, Listener>,
    /// VPCs that are peered.
    pub peerings: BTreeSet<(String, String)>,
    /// How many entries each prefix list has at most: so many rules it counts for.
    pub prefix_lists: BTreeMap<String, usize>,
    /// Zones that a zonal shift takes traffic away from.
    pub shifted_zones: BTreeSet<String>,
    /// QUIC server ids by VPC and id: whose, and when it was last registered or deregistered.
    pub(crate) quic_ids: BTreeMap<(String, String), ((TargetId, u16), u64)>,
    /// Answers by client token of RunInstances.
    pub(crate) tokens: HashMap<String, Vec<String>>,
    /// What was there before each of the last changes, and when that was, if reads are stale.
    history: VecDeque<(u64, Aws)>,
    serial: u64,
}

/// The partition of a region.
#[must_use]
pub fn partition(region: &str) -> &'static str {
    [
        ("cn-", "aws-cn"),
        ("us-gov-", "aws-us-gov"),
        ("us-isob-", "aws-iso-b"),
        ("us-isof-", "aws-iso-f"),
        ("us-iso-", "aws-iso"),
        ("eu-isoe-", "aws-iso-e"),
        ("eusc-", "aws-eusc"),
    ]
    .iter()
    .find(|(prefix, _)| region.starts_with(prefix))
    .map_or("aws", |(_, partition)| partition)
}

impl Aws {
    /// An empty account.
    #[must_use]
    pub fn new(account: &str, region: &str, timing: Timing, quotas: Quotas) -> Self {
        Self {
            account: account.to_owned(),
            region: region.to_owned(),
            timing,
            quotas,
            vpcs: BTreeMap::new(),
            subnets: BTreeMap::new(),
            instances: BTreeMap::new(),
            enis: BTreeMap::new(),
            security_groups: BTreeMap::new(),
            target_groups: BTreeMap::new(),
            load_balancers: BTreeMap::new(),
            listeners: BTreeMap::new(),
            peerings: BTreeSet::new(),
            prefix_lists: BTreeMap::new(),
            shifted_zones: BTreeSet::new(),
            quic_ids: BTreeMap::new(),
            tokens: HashMap::new(),
            history: VecDeque::new(),
            serial: 0,
        }
    }

    /// What a read sees where reads are stale: everything as it was then. Remembers what a change is about to change.
    pub(crate) fn stale(&mut self, action: &str, now: u64) -> Option<Self> {
        let then = now.saturating_sub(Some(self.timing.stale_ms).filter(|ms| *ms > 0)?);
        while self.history.front().is_some_and(|(at, _)| *at <= then) {
            self.history.pop_front();
        }
        if !action.starts_with("Describe") {
            let history = std::mem::take(&mut self.history);
            let before = self.clone();
            self.history = history;
            self.history.push_back((now, before));
            return None;
        }
        let (_, past) = self.history.front()?;
        Some(Self { timing: Timing { stale_ms: 0, ..self.timing }, ..past.clone() })
    }

    /// The partition, as in `aws-cn`.
    #[must_use]
    pub fn partition(&self) -> &'static str {
        partition(&self.region)
    }

    /// The zones of the region.
    #[must_use]
    pub fn zones(&self) -> [String; 4] {
        ["a", "b", "c", "d"].map(|z| format!("{}{z}", self.region))
    }

    /// A fresh id: the prefix and 17 hex digits, the same in every run.
    pub fn new_id(&mut self, prefix: &str) -> String {
        format!("{prefix}-0{:016x}", self.next())
    }

    /// 16 hex digits, the same in every run.
    pub(crate) fn next(&mut self) -> u64 {
        self.serial += 1;
        let start = self
            .account
            .bytes()
            .chain(self.region.bytes())
            .fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(u64::from(b)));
        // splitmix64
        let mut z = start.wrapping_add(self.serial.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The subnet of a VPC that holds the address.
    #[must_use]
    pub fn subnet_of(&self, vpc: &str, ip: IpAddr) -> Option<&Subnet> {
        self.subnets.values().find(|s| {
            s.vpc == vpc
                && match ip {
                    IpAddr::V4(ip) => s.cidr.is_some_and(|c| c.contains(&ip)),
                    IpAddr::V6(ip) => s.ipv6_cidr.is_some_and(|c| c.contains(&ip)),
                }
        })
    }

    /// Adds a security group with AWS's allow-all outbound rule.
    pub fn add_security_group(&mut self, id: &str, vpc: &str, name: &str, tags: Tags) {
        let egress = Rule {
            id: self.new_id("sgr"),
            egress: true,
            protocol: "-1".to_owned(),
            from: -1,
            to: -1,
            source: Source::Ipv4(Ipv4Net::default()),
            description: None,
            tags: Tags::new(),
        };
        self.security_groups.insert(
            id.to_owned(),
            SecurityGroup {
                id: id.to_owned(),
                name: name.to_owned(),
                description: name.to_owned(),
                vpc: vpc.to_owned(),
                rules: vec![egress],
                tags,
            },
        );
    }
}

/// A Kubernetes cluster in a VPC, to be seeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// For the tag `kubernetes.io/cluster/NAME`.
    pub name: String,
    /// The VPC's id.
    pub vpc: String,
    /// The VPC's primary block; node subnets are cut from it.
    pub cidr: Ipv4Net,
    /// A secondary block with one subnet, for addresses of pods.
    pub pod_cidr: Option<Ipv4Net>,
    /// Subnets of the nodes, one per zone from `a` on.
    pub subnets: Vec<String>,
    /// The security group of the nodes.
    pub node_group: String,
    /// The security group of the load balancer.
    pub lb_group: String,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// A node of a [`Cluster`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// `i-…`
    pub instance: String,
    /// The address; an address of the zone's subnet if absent.
    pub ip: Option<Ipv4Addr>,
    /// Which subnet, modulo their number.
    pub subnet: usize,
    /// Prefixes on the network interface that hold the node's pods.
    pub pod_prefixes: Vec<Ipv4Net>,
    /// Single secondary addresses on the network interface.
    pub pod_ips: Vec<Ipv4Addr>,
}

impl Default for Cluster {
    /// `192.168.0.0/16` with three subnets, pods in `10.244.0.0/16`, no nodes.
    fn default() -> Self {
        let net = |a, b, c, d, len| Ipv4Net::new(Ipv4Addr::new(a, b, c, d), len).unwrap_or_default();
        Self {
            name: "demo".to_owned(),
            vpc: "vpc-0a1b2c3d4e5f60718".to_owned(),
            cidr: net(192, 168, 0, 0, 16),
            pod_cidr: Some(net(10, 244, 0, 0, 16)),
            subnets: vec![
                "subnet-0a000000000000001".to_owned(),
                "subnet-0b000000000000002".to_owned(),
                "subnet-0c000000000000003".to_owned(),
            ],
            node_group: "sg-0a0000000000000a1".to_owned(),
            lb_group: "sg-0b0000000000000b1".to_owned(),
            nodes: Vec::new(),
        }
    }
}

impl Aws {
    /// Puts a whole cluster there: VPC, subnets, running instances with their network interfaces and security groups.
    /// What is there under the same id is replaced.
    pub fn seed_cluster(&mut self, cluster: &Cluster) {
        let tag = format!("kubernetes.io/cluster/{}", cluster.name);
        let tags = |name: &str, owned: Option<&str>| -> Tags {
            std::iter::once(("Name".to_owned(), name.to_owned()))
                .chain(owned.map(|v| (tag.clone(), v.to_owned())))
                .collect()
        };
        self.vpcs.insert(
            cluster.vpc.clone(),
            Vpc {
                id: cluster.vpc.clone(),
                cidrs: std::iter::once(cluster.cidr).chain(cluster.pod_cidr).collect(),
                tags: tags(&cluster.name, Some("shared")),
                ..Vpc::default()
            },
        );
        let zones = self.zones();
        // room for eight subnets at most, four zones
        let len = (cluster.cidr.prefix_len() + 3).min(28);
        let nets: Vec<Ipv4Net> = cluster.cidr.subnets(len).map(Iterator::collect).unwrap_or_default();
        for (n, (id, net)) in cluster.subnets.iter().zip(&nets).enumerate() {
            let zone = zones.get(n % zones.len()).cloned().unwrap_or_default();
            let subnet = Subnet {
                id: id.clone(),
                vpc: cluster.vpc.clone(),
                cidr: Some(*net),
                ipv6_cidr: None,
                zone,
                tags: tags(id, Some("shared")),
            };
            self.subnets.insert(id.clone(), subnet);
        }
        if let Some(pods) = cluster.pod_cidr {
            let id = format!(
                "{}9",
                cluster.subnets.first().map_or("subnet-0a00000000000000", |s| {
                    s.get(..s.len().saturating_sub(1)).unwrap_or(s)
                })
            );
            let zone = zones.first().cloned().unwrap_or_default();
            self.subnets.insert(
                id.clone(),
                Subnet {
                    id,
                    vpc: cluster.vpc.clone(),
                    cidr: Some(pods),
                    ipv6_cidr: None,
                    zone,
                    tags: tags("pods", None),
                },
            );
        }
        self.add_security_group(&cluster.node_group, &cluster.vpc, "nodes", tags("nodes", Some("owned")));
        self.add_security_group(
            &cluster.lb_group,
            &cluster.vpc,
            "load-balancer",
            tags("load-balancer", None),
        );
        for (n, node) in cluster.nodes.iter().enumerate() {
            let at = node.subnet % cluster.subnets.len().max(1);
            let Some(subnet) = cluster.subnets.get(at).and_then(|id| self.subnets.get(id)).cloned() else {
                continue;
            };
            let ip = node.ip.or_else(|| subnet.cidr.and_then(|c| c.hosts().nth(n + 9)));
            self.add_instance(
                Instance {
                    id: node.instance.clone(),
                    vpc: cluster.vpc.clone(),
                    subnet: subnet.id,
                    zone: subnet.zone,
                    instance_type: "m5.large".to_owned(),
                    private_ip: ip,
                    groups: vec![cluster.node_group.clone()],
                    tags: tags(&node.instance, Some("owned")),
                    ..Instance::default()
                },
                node.pod_ips.clone(),
                node.pod_prefixes.clone(),
            );
        }
    }

    /// Adds an instance and its first network interface with secondary addresses and prefixes; returns the id of the
    /// interface.
    pub fn add_instance(
        &mut self,
        mut instance: Instance,
        secondary: Vec<Ipv4Addr>,
        prefixes: Vec<Ipv4Net>,
    ) -> String {
        let eni_id = self.new_id("eni");
        if instance.private_dns.is_empty()
            && let Some(ip) = instance.private_ip
        {
            let host = ip.to_string().replace('.', "-");
            let domain = if self.region == "us-east-1" {
                "ec2.internal".to_owned()
            } else {
                format!("{}.compute.internal", self.region)
            };
            instance.private_dns = format!("ip-{host}.{domain}");
        }
        self.enis.retain(|_, e| e.instance.as_deref() != Some(&instance.id));
        self.enis.insert(
            eni_id.clone(),
            Eni {
                id: eni_id.clone(),
                subnet: instance.subnet.clone(),
                vpc: instance.vpc.clone(),
                zone: instance.zone.clone(),
                groups: instance.groups.clone(),
                instance: Some(instance.id.clone()),
                device_index: 0,
                private_ips: instance.private_ip.into_iter().chain(secondary).collect(),
                prefixes,
                ..Eni::default()
            },
        );
        self.instances.insert(instance.id.clone(), instance);
        eni_id
    }
}
