//! Which availability zone RegisterTargets wants for an address (notes of RegisterTargets, "AvailabilityZone"): none inside
//! of the VPC's subnets; `all` outside; a real one outside where an ALB's target group has cross-zone balancing switched
//! off. Where AWS contradicts, its word is remembered per target group.

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;
use tgb_api::target_group::{Protocol, TargetGroup};
use tgb_aws::AwsError;

/// What is known of a target group's wishes.
#[derive(Debug, Default)]
pub(crate) struct Zones {
    /// Addresses outside of the VPC get a real zone; `None`: nobody has asked.
    real: Option<bool>,
    /// Whether an address is outside, where AWS knows better than the subnets tell.
    corrected: BTreeMap<IpAddr, bool>,
    /// AWS has contradicted the subnets: they have changed.
    contradicted: bool,
}

impl Zones {
    /// Whether the target group's attributes decide, and were not read yet.
    pub(crate) fn wants_attributes(&self, group: &TargetGroup, ips: &[IpAddr], subnets: &[IpNet]) -> bool {
        self.real.is_none()
            && matches!(group.binding_protocol(), Some(Protocol::Http | Protocol::Https))
            && ips.iter().any(|ip| self.is_outside(ip, subnets))
    }

    /// The target group's attributes were read.
    pub(crate) fn read_attributes(&mut self, attributes: &BTreeMap<String, String>) {
        let cross_zone = attributes.get("load_balancing.cross_zone.enabled");
        self.real = Some(cross_zone.is_some_and(|value| value == "false"));
    }

    /// The zone to send for an address, `node` being the zone of its node.
    pub(crate) fn of(&self, ip: &IpAddr, subnets: &[IpNet], node: Option<&str>) -> Option<String> {
        if !self.is_outside(ip, subnets) {
            return None;
        }
        let real = node.filter(|_| self.real == Some(true));
        Some(real.unwrap_or("all").to_owned())
    }

    /// Whether AWS has contradicted the subnets since this was asked last, so that they should be read again.
    pub(crate) fn take_contradicted(&mut self) -> bool {
        std::mem::take(&mut self.contradicted)
    }

    /// Learns from a refusal; whether the same targets are worth another try.
    pub(crate) fn learn(&mut self, error: &AwsError) -> bool {
        if error.code != "ValidationError" {
            return false;
        }
        let text = error.message.to_ascii_lowercase();
        if !text.contains("availability zone") {
            return false;
        }
        if text.contains("must be 'all'") {
            return self.real.replace(false) == Some(true);
        }
        let Some(ip) = error.message.split('\'').find_map(|word| word.parse::<IpAddr>().ok()) else {
            return false;
        };
        if text.contains("within the vpc") {
            return self.correct(ip, false);
        }
        let wants_real = text.contains("cross-zone load balancing is disabled");
        if !wants_real && !text.contains("is required") && !text.contains("must specify") {
            return false;
        }
        // It is outside, and was sent without a zone, or `all` is not enough.
        let is_news = self.correct(ip, true);
        if is_news && !wants_real {
            return true;
        }
        self.real.replace(true) != Some(true) || is_news
    }

    fn correct(&mut self, ip: IpAddr, outside: bool) -> bool {
        let is_news = self.corrected.insert(ip, outside) != Some(outside);
        self.contradicted |= is_news;
        is_news
    }

    fn is_outside(&self, ip: &IpAddr, subnets: &[IpNet]) -> bool {
        self.corrected.get(ip).copied().unwrap_or_else(|| !subnets.iter().any(|subnet| subnet.contains(ip)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTSIDE: &str = "10.9.0.1";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn subnets() -> Vec<IpNet> {
        vec!["192.168.0.0/19".parse().unwrap(), "fd00:1::/64".parse().unwrap()]
    }

    fn zone(zones: &Zones, address: &str) -> Option<String> {
        zones.of(&ip(address), &subnets(), Some("us-west-2a"))
    }

    fn refusal(message: &str) -> AwsError {
        AwsError {
            operation: "RegisterTargets",
            code: "ValidationError".to_owned(),
            message: message.to_owned(),
        }
    }

    #[test]
    fn inside_means_inside_of_a_subnet_for_both_families() {
        let zones = Zones::default();
        assert_eq!(zone(&zones, "192.168.31.1"), None);
        assert_eq!(zone(&zones, "192.168.32.1").as_deref(), Some("all"));
        assert_eq!(zone(&zones, "fd00:1::7"), None);
        assert_eq!(zone(&zones, "fd00:2::7").as_deref(), Some("all"));
    }

    #[test]
    fn without_cross_zone_balancing_the_nodes_zone_is_sent() {
        let mut zones = Zones::default();
        zones.read_attributes(&BTreeMap::from([(
            "load_balancing.cross_zone.enabled".to_owned(),
            "false".to_owned(),
        )]));
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("us-west-2a"));
        assert_eq!(zones.of(&ip(OUTSIDE), &subnets(), None).as_deref(), Some("all"));
    }

    #[test]
    fn what_aws_says_about_zones_is_learned_once() {
        let mut zones = Zones::default();
        let off = refusal(
            "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone \
             for IP target '10.9.0.1' since it is outside of the VPC",
        );
        assert!(zones.learn(&off) && !zones.learn(&off));
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("us-west-2a"));
        let on = refusal(
            "The Availability Zone for IP address '10.9.0.1' must be 'all' for Application Load Balancer target \
             groups, when not within the VPC",
        );
        assert!(zones.learn(&on));
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("all"));
    }

    #[test]
    fn an_address_that_is_outside_since_a_subnet_is_gone_gets_a_zone_after_one_refusal() {
        let mut zones = Zones::default();
        let off = refusal(
            "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone \
             for IP target '192.168.0.9' since it is outside of the VPC",
        );
        assert!(zones.learn(&off) && zones.take_contradicted() && !zones.take_contradicted());
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("us-west-2a"));
        assert!(!zones.learn(&off));
    }

    #[test]
    fn aws_knows_better_than_the_subnets_what_is_inside() {
        let mut zones = Zones::default();
        let inside = refusal(
            "The IP address '10.9.0.1' is within the VPC, and cannot have its Availability Zone overridden to 'all' \
             from 'us-east-1b'",
        );
        assert!(zones.learn(&inside) && !zones.learn(&inside));
        assert_eq!(zone(&zones, OUTSIDE), None);
        let outside = refusal(
            "The Availability Zone is required for IP address '192.168.0.9' because it is not in the VPC",
        );
        assert!(zones.learn(&outside));
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("all"));
        assert!(zones.learn(&outside) && !zones.learn(&outside));
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("us-west-2a"));
        assert!(!zones.learn(&refusal("The IP address 'fd00::1' is not a valid IPv4 address")));
    }
}
