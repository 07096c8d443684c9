//! Which availability zone RegisterTargets wants for an address (notes of RegisterTargets, "AvailabilityZone"): none inside
//! of the VPC's subnets; `all` outside; a real one outside where an ALB's target group has cross-zone balancing switched
//! off. Where AWS contradicts, its word is remembered per target group.

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;
use tgb_api::target_group::{Protocol, TargetGroup};
use tgb_aws::AwsError;
use tgb_aws::values::Target;

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

/// The use of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lesson {
    /// It says nothing new about zones.
    None,
    /// The same targets are worth another try, with the zones that are known now.
    Again,
    /// It is about zones, and smaller batches will tell of which targets.
    Isolate,
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

    /// Learns from a refusal of the targets that were sent. AWS has many sentences for this, of which some name no address
    /// (notes of RegisterTargets, "AvailabilityZone", and what its users report).
    pub(crate) fn learn(&mut self, error: &AwsError, sent: &[Target]) -> Lesson {
        let text = error.message.to_ascii_lowercase();
        if !matches!(error.code.as_str(), "ValidationError" | "InvalidTarget")
            || !text.contains("availability zone")
        {
            return Lesson::None;
        }
        let lesson = |is_news: bool| if is_news { Lesson::Again } else { Lesson::None };
        let named = addresses(&error.message);
        if text.contains("must be 'all'") {
            let bare =
                sent.iter().filter(|target| target.zone.is_none()).flat_map(|target| addresses(&target.id));
            let bare: Vec<IpAddr> = bare.filter(|ip| named.contains(ip)).collect();
            let is_news = self.correct(&bare, true);
            return lesson(self.real.replace(false) == Some(true) || is_news);
        }
        if text.contains("within the vpc") && !text.contains("not within the vpc") {
            return match (named.is_empty(), sent) {
                (false, _) => lesson(self.correct(&named, false)),
                (true, [only]) => lesson(self.correct(&addresses(&only.id), false)),
                (true, _) => Lesson::Isolate,
            };
        }
        let asks =
            ["cross-zone load balancing is disabled", "is required", "must specify", "must be specified"];
        if !asks.iter().any(|words| text.contains(words)) {
            return Lesson::None;
        }
        let wants_real = text.contains("cross-zone load balancing is disabled");
        let meant = match (named.is_empty(), sent) {
            (false, _) => named,
            (true, [only]) => addresses(&only.id),
            // With a zone for each, `all` is not enough for some.
            (true, _) if sent.iter().all(|target| target.zone.is_some()) => Vec::new(),
            (true, _) => return Lesson::Isolate,
        };
        // It is outside, and was sent without a zone, or `all` is not enough.
        let is_news = self.correct(&meant, true);
        if is_news && !wants_real {
            return Lesson::Again;
        }
        lesson(self.real.replace(true) != Some(true) || is_news)
    }

    fn correct(&mut self, ips: &[IpAddr], outside: bool) -> bool {
        let mut is_news = false;
        for ip in ips {
            is_news |= self.corrected.insert(*ip, outside) != Some(outside);
        }
        self.contradicted |= is_news;
        is_news
    }

    fn is_outside(&self, ip: &IpAddr, subnets: &[IpNet]) -> bool {
        self.corrected.get(ip).copied().unwrap_or_else(|| !subnets.iter().any(|subnet| subnet.contains(ip)))
    }
}

/// The IP addresses in a sentence.
fn addresses(text: &str) -> Vec<IpAddr> {
    let words = text.split(|c: char| !(c.is_ascii_hexdigit() || matches!(c, '.' | ':')));
    words.filter_map(|word| word.trim_end_matches(['.', ':']).parse().ok()).collect()
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

    fn sent(all: &[(&str, Option<&str>)]) -> Vec<Target> {
        let one = |(id, zone): &(&str, Option<&str>)| Target {
            id: (*id).to_owned(),
            port: 80,
            zone: zone.map(str::to_owned),
            quic_server_id: None,
        };
        all.iter().map(one).collect()
    }

    /// True if the same targets are worth another try.
    fn learns(zones: &mut Zones, error: &AwsError) -> bool {
        zones.learn(error, &sent(&[("192.168.0.1", None), (OUTSIDE, Some("all"))])) == Lesson::Again
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
        assert!(learns(&mut zones, &off) && !learns(&mut zones, &off));
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("us-west-2a"));
        let on = refusal(
            "The Availability Zone for IP address '10.9.0.1' must be 'all' for Application Load Balancer target \
             groups, when not within the VPC",
        );
        assert!(learns(&mut zones, &on));
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("all"));
        let mut narrow = Zones::default();
        assert_eq!(narrow.learn(&on, &sent(&[(OUTSIDE, None)])), Lesson::Again);
        assert_eq!(narrow.of(&ip(OUTSIDE), &["10.9.0.0/16".parse().unwrap()], None).as_deref(), Some("all"));
    }

    #[test]
    fn an_address_that_is_outside_since_a_subnet_is_gone_gets_a_zone_after_one_refusal() {
        let mut zones = Zones::default();
        let off = refusal(
            "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone \
             for IP target '192.168.0.9' since it is outside of the VPC",
        );
        assert!(learns(&mut zones, &off) && zones.take_contradicted() && !zones.take_contradicted());
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("us-west-2a"));
        assert!(!learns(&mut zones, &off));
    }

    #[test]
    fn aws_knows_better_than_the_subnets_what_is_inside() {
        let mut zones = Zones::default();
        let inside = refusal(
            "The IP address '10.9.0.1' is within the VPC, and cannot have its Availability Zone overridden to 'all' \
             from 'us-east-1b'",
        );
        assert!(learns(&mut zones, &inside) && !learns(&mut zones, &inside));
        assert_eq!(zone(&zones, OUTSIDE), None);
        let outside = refusal(
            "The Availability Zone is required for IP address '192.168.0.9' because it is not in the VPC",
        );
        assert!(learns(&mut zones, &outside));
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("all"));
        assert!(learns(&mut zones, &outside) && !learns(&mut zones, &outside));
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("us-west-2a"));
        assert!(!learns(&mut zones, &refusal("The IP address 'fd00::1' is not a valid IPv4 address")));
    }

    #[test]
    fn a_refusal_that_names_no_address_is_about_the_target_that_was_sent() {
        let words = refusal("You must specify an Availability Zone for IP targets outside of the VPC");
        let mut zones = Zones::default();
        assert_eq!(zones.learn(&words, &sent(&[("192.168.0.9", None)])), Lesson::Again);
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("all"));
        assert_eq!(zones.learn(&words, &sent(&[("192.168.0.9", Some("all"))])), Lesson::Again);
        assert_eq!(zone(&zones, "192.168.0.9").as_deref(), Some("us-west-2a"));
        assert_eq!(zones.learn(&words, &sent(&[("192.168.0.9", Some("us-west-2a"))])), Lesson::None);
        // Of several, smaller batches tell which one, unless all had a zone.
        let mut zones = Zones::default();
        let mixed = sent(&[("192.168.0.9", None), ("192.168.0.10", None), (OUTSIDE, Some("all"))]);
        assert_eq!(zones.learn(&words, &mixed), Lesson::Isolate);
        assert_eq!(zone(&zones, "192.168.0.9"), None);
        let everywhere = sent(&[(OUTSIDE, Some("all")), ("10.9.0.2", Some("all"))]);
        assert_eq!(zones.learn(&words, &everywhere), Lesson::Again);
        assert_eq!(zone(&zones, OUTSIDE).as_deref(), Some("us-west-2a"));
        let inside =
            refusal("An address within the VPC cannot have its Availability Zone overridden to 'all'");
        assert_eq!(zones.learn(&inside, &everywhere), Lesson::Isolate);
        assert_eq!(zones.learn(&inside, &sent(&[(OUTSIDE, Some("all"))])), Lesson::Again);
        assert_eq!(zone(&zones, OUTSIDE), None);
    }

    #[test]
    fn every_known_sentence_about_zones_teaches_something() {
        let about = [
            "The Availability Zone is required for IP address '10.4.40.87' because it is not in the VPC",
            "You must specify a valid Availability Zone or select 'all' for all enabled Availability zones, since the \
             IP address '10.4.40.87' is outside the VPC",
            "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone for \
             IP target '10.4.40.87' since it is outside of the VPC",
            "When cross-zone load balancing is disabled on this target group, you must specify an Availability Zone",
            "you must specify an Availability Zone",
            "An Availability Zone must be specified for IP address 10.4.40.87.",
            "An Availability Zone is required for IP targets outside the VPC",
        ];
        for words in about {
            let (mut zones, mut tries) = (Zones::default(), Vec::new());
            let wide = "10.4.0.0/16".parse().unwrap();
            let address = ip("10.4.40.87");
            loop {
                let zone = zones.of(&address, &[wide], Some("us-west-2a"));
                tries.push(zone.clone());
                if zones.learn(&refusal(words), &sent(&[("10.4.40.87", zone.as_deref())])) != Lesson::Again {
                    break;
                }
            }
            assert_eq!(tries.last().unwrap().as_deref(), Some("us-west-2a"), "{words}: {tries:?}");
        }
    }
}
