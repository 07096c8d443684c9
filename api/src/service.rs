//! A Service and its ports, as bindings refer to them.

use crate::objects;
use crate::target_group::Protocol;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// What bindings need to know of a Service; small, since every Service of a cluster is held like this.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Service {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
    pub service_type: String,
    /// Whether `clusterIP` is `None`.
    pub headless: bool,
    /// The ports, in the Service's order.
    pub ports: Vec<ServicePort>,
    /// The pod selector, sorted; `None` if there is none, or an empty one.
    pub selector: Option<Box<[(String, String)]>>,
    /// `IPv4`, `IPv6`; empty when the API server has not filled it (an object that was never stored).
    pub ip_families: Vec<String>,
    /// `spec.healthCheckNodePort`, if any.
    pub health_check_node_port: Option<u16>,
    /// When it was made, in seconds since the epoch.
    pub created: Option<i64>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServicePort {
    /// The name; absent only where there is just one port.
    pub name: Option<String>,
    /// The number.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The pods' port, by number or name.
    pub target_port: Option<IntOrString>,
    /// The nodes' port; absent unless the Service is NodePort or LoadBalancer.
    pub node_port: Option<u16>,
}

impl Service {
    /// Reads a Service. Numbers outside of 1–65535 are left out; the API server admits none.
    pub fn read(service: &objects::Service) -> Self {
        let spec = service.spec.as_ref();
        let given = spec.and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
        let mut ports = Vec::with_capacity(given.len());
        ports.extend(given.iter().filter_map(|port| {
            Some(ServicePort {
                name: port.name.clone().filter(|name| !name.is_empty()),
                port: number(port.port)?,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                target_port: port.target_port.clone(),
                node_port: number(port.node_port),
            })
        }));
        Self {
            namespace: service.metadata.namespace.clone().unwrap_or_default(),
            name: service.metadata.name.clone().unwrap_or_default(),
            service_type: spec.and_then(|spec| spec.type_.clone()).unwrap_or_else(|| "ClusterIP".to_owned()),
            headless: spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None"),
            ports,
            selector: spec
                .and_then(|spec| spec.selector.clone())
                .filter(|selector| !selector.is_empty())
                .map(|selector| selector.into_iter().collect()),
            ip_families: spec.and_then(|spec| spec.ip_families.clone()).unwrap_or_default(),
            health_check_node_port: number(spec.and_then(|spec| spec.health_check_node_port)),
            created: service.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        }
    }

    /// The port that a binding's `serviceRef.port` means: by `name` or by `port`, never by nodePort or targetPort.
    /// Where one number stands for several protocols, the one that fits the target group's is taken.
    pub fn port(&self, wanted: &IntOrString, protocol: Option<Protocol>) -> Option<&ServicePort> {
        let is_wanted = |port: &&ServicePort| match wanted {
            IntOrString::Int(number) => i32::from(port.port) == *number,
            IntOrString::String(name) => port.name.as_deref() == Some(name.as_str()),
        };
        let fits = |port: &&ServicePort| protocol.is_none_or(|p| p.fits_service_protocol(&port.protocol));
        self.ports.iter().filter(is_wanted).find(fits).or_else(|| self.ports.iter().find(is_wanted))
    }

    /// The port of the same number and the other transport, if there is one.
    pub fn other_transport(&self, port: &ServicePort) -> Option<&ServicePort> {
        self.ports.iter().find(|other| other.port == port.port && other.protocol != port.protocol)
    }

    /// Whether the Service selects a pod, whose labels `label` looks up. A Service without selector selects none.
    pub fn selects<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        let fits = |(name, value): &(String, String)| label(name) == Some(value.as_str());
        self.selector.as_ref().is_some_and(|selector| selector.iter().all(fits))
    }

    /// Whether its ports can have nodePorts.
    pub fn has_node_ports(&self) -> bool {
        matches!(self.service_type.as_str(), "NodePort" | "LoadBalancer")
    }
}

impl ServicePort {
    /// The pods' port; the Service port's own number unless one is written.
    pub fn wanted_target_port(&self) -> IntOrString {
        match &self.target_port {
            None | Some(IntOrString::Int(0)) => IntOrString::Int(self.port.into()),
            Some(port) => port.clone(),
        }
    }

    /// The port as people write it: `80 (http)`, or `80` without a name.
    pub fn describe(&self) -> String {
        match &self.name {
            Some(name) => format!("{} ({name})", self.port),
            None => self.port.to_string(),
        }
    }
}

fn number(port: Option<i32>) -> Option<u16> {
    port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns() -> Service {
        let port = |protocol: &str, name: &str| ServicePort {
            name: Some(name.to_owned()),
            port: 53,
            protocol: protocol.to_owned(),
            ..Default::default()
        };
        Service { ports: vec![port("TCP", "dns-tcp"), port("UDP", "dns")], ..Default::default() }
    }

    #[test]
    fn one_number_for_two_transports_means_the_one_that_fits() {
        let found = |protocol| dns().port(&IntOrString::Int(53), protocol).map(|port| port.protocol.clone());
        assert_eq!(found(Some(Protocol::Udp)).as_deref(), Some("UDP"));
        assert_eq!(found(Some(Protocol::Http)).as_deref(), Some("TCP"));
        assert_eq!(found(None).as_deref(), Some("TCP"));
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let service = dns();
        assert_eq!(service.port(&IntOrString::String("dns".into()), None).unwrap().protocol, "UDP");
        assert_eq!(service.port(&IntOrString::String("http".into()), None), None);
    }

    #[test]
    fn a_service_without_selector_selects_no_pod() {
        assert!(!dns().selects(|_| None));
    }
}
