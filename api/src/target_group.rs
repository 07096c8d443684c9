//! A target group as AWS describes it, and the words that bindings and AWS share for it.

use crate::arn::TargetGroupArn;
use crate::v1::Transport;
use serde::{Deserialize, Serialize};

/// An enum whose members are written as AWS writes them.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$member_doc])* #[serde(rename = $word)] $member),*
        }

        impl $name {
            /// Every member, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$member),*];

            /// The word that stands in manifests and in AWS's answers.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$member => $word),* }
            }

            /// Reads such a word; `None` for any other.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$member),)* _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use words;

words! {
    /// What a binding can register: `spec.targetGroup.targetType`.
    TargetType {
        /// EC2 instances, at the Service's nodePort.
        Instance = "instance",
        /// Pod addresses.
        Ip = "ip",
    }
}

words! {
    /// A target group's protocol, as bindings support it.
    Protocol {
        /// Application Load Balancer.
        Http = "HTTP",
        /// Application Load Balancer.
        Https = "HTTPS",
        /// Network Load Balancer.
        Tcp = "TCP",
        /// Network Load Balancer.
        Tls = "TLS",
        /// Network Load Balancer.
        Udp = "UDP",
        /// Network Load Balancer.
        TcpUdp = "TCP_UDP",
        /// Network Load Balancer; targets carry a QUIC server id.
        Quic = "QUIC",
        /// Network Load Balancer; targets carry a QUIC server id.
        TcpQuic = "TCP_QUIC",
    }
}

words! {
    /// The address family of a target group.
    IpAddressType {
        /// IPv4 targets.
        Ipv4 = "ipv4",
        /// IPv6 targets.
        Ipv6 = "ipv6",
    }
}

impl Protocol {
    /// Whether targets of this protocol need a QUIC server id (RegisterTargets, `QuicServerId`).
    pub const fn is_quic(self) -> bool {
        matches!(self, Self::Quic | Self::TcpQuic)
    }

    /// The transports of its listeners, all of which go to a target's one port.
    pub const fn transports(self) -> &'static [Transport] {
        match self {
            Self::Http | Self::Https | Self::Tcp | Self::Tls => &[Transport::Tcp],
            Self::Udp | Self::Quic => &[Transport::Udp],
            Self::TcpUdp | Self::TcpQuic => &[Transport::Tcp, Transport::Udp],
        }
    }

    /// Whether a Service port of this transport (`TCP`, `UDP`, `SCTP`) can be behind such a target group (TGB209).
    pub fn fits_service_protocol(self, service_protocol: &str) -> bool {
        self.transports().iter().any(|transport| transport.as_str() == service_protocol)
    }
}

/// What DescribeTargetGroups says of a target group, as far as bindings care.
///
/// `target_type`, `protocol` and `ip_address_type` are AWS's own words, since AWS knows some that a binding cannot
/// use (`lambda`, `alb`, `GENEVE`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetGroup {
    /// Its ARN.
    pub arn: TargetGroupArn,
    /// `instance`, `ip`, `lambda` or `alb`.
    pub target_type: String,
    /// `HTTP`, …, `GENEVE`; empty for lambda.
    pub protocol: String,
    /// `ipv4` or `ipv6`; AWS leaves it out for some old groups, which are `ipv4`.
    pub ip_address_type: String,
    /// The VPC; absent for lambda.
    pub vpc_id: Option<String>,
    /// The port that targets get when they are registered without one; absent for lambda.
    pub port: Option<u16>,
    /// `traffic-port` or a number in decimal.
    pub health_check_port: Option<String>,
    /// The load balancer that it is attached to, if any (AWS allows one).
    pub load_balancer_arns: Vec<String>,
}

impl TargetGroup {
    /// The target type, if a binding can use it.
    pub fn binding_target_type(&self) -> Option<TargetType> {
        TargetType::from_word(&self.target_type)
    }

    /// The protocol, if a binding can use it.
    pub fn binding_protocol(&self) -> Option<Protocol> {
        Protocol::from_word(&self.protocol)
    }

    /// The address family; absent means `ipv4`.
    pub fn binding_ip_address_type(&self) -> IpAddressType {
        IpAddressType::from_word(&self.ip_address_type).unwrap_or(IpAddressType::Ipv4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_fits_the_transports_of_its_listeners() {
        let fitting = |transport: &str| {
            Protocol::ALL
                .iter()
                .filter(|p| p.fits_service_protocol(transport))
                .map(|p| p.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(fitting("TCP"), ["HTTP", "HTTPS", "TCP", "TLS", "TCP_UDP", "TCP_QUIC"]);
        assert_eq!(fitting("UDP"), ["UDP", "TCP_UDP", "QUIC", "TCP_QUIC"]);
        assert!(fitting("SCTP").is_empty());
    }
}
