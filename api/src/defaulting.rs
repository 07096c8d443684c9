//! What admission fills in (D1 to D7), as additions to the object as it was sent.
//!
//! Two steps, since the second one needs lookups for which the first one may supply the ARN: [`from_old`], then
//! [`from_lookups`]. Both are idempotent, and say nothing about fields that are set.

use crate::convert::MOVED;
use crate::crd::Version;
use crate::service::Service;
use crate::target_group::{IpAddressType, Protocol, TargetGroup, TargetType};
use crate::v1::{Parents, Spec, TargetGroupBinding, TargetGroupRef};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

/// A value for a field that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addition {
    /// D1: `targetGroup.arn`.
    Arn(String),
    /// D2: `targetGroup.targetType`.
    TargetType(TargetType),
    /// D3: `targetGroup.ipAddressType`.
    IpAddressType(IpAddressType),
    /// D4: `targetGroup.vpcID`.
    VpcId(String),
    /// D5: `targetGroup.protocol`.
    Protocol(Protocol),
    /// D6: `serviceRef.port`.
    Port(IntOrString),
}

impl Addition {
    /// Where, below `spec`: object and member.
    const fn field(&self) -> (&'static str, &'static str) {
        match self {
            Self::Arn(_) => ("targetGroup", "arn"),
            Self::TargetType(_) => ("targetGroup", "targetType"),
            Self::IpAddressType(_) => ("targetGroup", "ipAddressType"),
            Self::VpcId(_) => ("targetGroup", "vpcID"),
            Self::Protocol(_) => ("targetGroup", "protocol"),
            Self::Port(_) => ("serviceRef", "port"),
        }
    }

    fn value(&self) -> Value {
        match self {
            Self::Arn(text) | Self::VpcId(text) | Self::Port(IntOrString::String(text)) => {
                text.as_str().into()
            }
            Self::TargetType(word) => word.as_str().into(),
            Self::IpAddressType(word) => word.as_str().into(),
            Self::Protocol(word) => word.as_str().into(),
            Self::Port(IntOrString::Int(number)) => (*number).into(),
        }
    }
}

/// D7: what an update leaves out and the stored object has. Not the ARN where another name is given, and not the port
/// where another Service is.
pub fn from_old(new: &TargetGroupBinding, old: &TargetGroupBinding) -> Vec<Addition> {
    let (is, was) = (&new.spec.target_group, &old.spec.target_group);
    let mut out = Vec::new();
    let renamed = is.name().is_some() && is.name() != was.name();
    if let Some(arn) = was.arn().filter(|_| is.arn().is_none() && !renamed) {
        out.push(Addition::Arn(arn.to_owned()));
    }
    out.extend(was.target_type.filter(|_| is.target_type.is_none()).map(Addition::TargetType));
    out.extend(was.ip_address_type.filter(|_| is.ip_address_type.is_none()).map(Addition::IpAddressType));
    out.extend(was.vpc_id().filter(|_| is.vpc_id().is_none()).map(|id| Addition::VpcId(id.to_owned())));
    out.extend(was.protocol.filter(|_| is.protocol.is_none()).map(Addition::Protocol));
    let (is, was) = (&new.spec.service_ref, &old.spec.service_ref);
    if let Some(port) = was.port().filter(|_| is.port().is_none() && is.name == was.name) {
        out.push(Addition::Port(port.clone()));
    }
    out
}

/// D1 to D6: what the target group and the Service say.
pub fn from_lookups(
    new: &TargetGroupBinding,
    target_group: Option<&TargetGroup>,
    service: Option<&Service>,
) -> Vec<Addition> {
    let is = &new.spec.target_group;
    let mut out = Vec::new();
    if let Some(aws) = target_group {
        if is.arn().is_none() {
            out.push(Addition::Arn(aws.arn.as_str().to_owned()));
        }
        out.extend(aws.binding_target_type().filter(|_| is.target_type.is_none()).map(Addition::TargetType));
        if is.ip_address_type.is_none() {
            out.push(Addition::IpAddressType(aws.binding_ip_address_type()));
        }
        out.extend(aws.vpc_id.clone().filter(|_| is.vpc_id().is_none()).map(Addition::VpcId));
        out.extend(aws.binding_protocol().filter(|_| is.protocol.is_none()).map(Addition::Protocol));
    }
    let protocol = is.protocol.or_else(|| target_group?.binding_protocol());
    if new.spec.service_ref.port().is_none()
        && let Some(port) = service.and_then(|service| only_port(service, protocol))
    {
        out.push(Addition::Port(IntOrString::Int(port.into())));
    }
    out
}

/// Whether something is missing that only AWS can say.
pub fn needs_target_group(group: &TargetGroupRef) -> bool {
    group.arn().is_none()
        || group.target_type.is_none()
        || group.ip_address_type.is_none()
        || group.vpc_id().is_none()
        || group.protocol.is_none()
}

fn only_port(service: &Service, protocol: Option<Protocol>) -> Option<u16> {
    let mut fitting =
        service.ports.iter().filter(|port| protocol.is_none_or(|p| p.fits_service_protocol(&port.protocol)));
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first.port)
}

/// Writes additions into a spec.
pub fn apply(spec: &mut Spec, additions: &[Addition]) {
    let group = &mut spec.target_group;
    for addition in additions {
        match addition {
            Addition::Arn(arn) => group.arn = Some(arn.as_str().into()),
            Addition::TargetType(word) => group.target_type = Some(*word),
            Addition::IpAddressType(word) => group.ip_address_type = Some(*word),
            Addition::VpcId(id) => group.vpc_id = Some(id.as_str().into()),
            Addition::Protocol(word) => group.protocol = Some(*word),
            Addition::Port(port) => spec.service_ref.port = Some(port.clone()),
        }
    }
}

/// The additions as a JSON patch (RFC 6902) of the object as it was sent, of which `there` tells, in its version and
/// without its nulls; empty if nothing changes.
pub fn patch(mut there: Parents, additions: &[Addition]) -> Vec<Value> {
    let mut out: Vec<Value> = there.nulls.iter().map(|path| json!({"op": "remove", "path": path})).collect();
    let add = |path: String, value: Value| json!({"op": "add", "path": path, "value": value});
    if !additions.is_empty() && !there.spec {
        out.push(add("/spec".to_owned(), json!({})));
    }
    for addition in additions {
        let (parent, member) = addition.field();
        let in_v1 = format!("{parent}.{member}");
        if let Some((old, _)) = MOVED.iter().find(|(_, path)| *path == in_v1 && there.version != Version::V1)
        {
            out.push(add(format!("/spec/{old}"), addition.value()));
            continue;
        }
        let is_there = if parent == "targetGroup" { &mut there.target_group } else { &mut there.service_ref };
        if !std::mem::replace(is_there, true) {
            out.push(add(format!("/spec/{parent}"), json!({})));
        }
        out.push(add(format!("/spec/{parent}/{member}"), addition.value()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arn::TargetGroupArn;
    use crate::service::ServicePort;

    const ARN: &str = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb";

    fn binding(spec: Value) -> TargetGroupBinding {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}))
            .unwrap()
    }

    fn target_group() -> TargetGroup {
        TargetGroup {
            arn: TargetGroupArn::parse(ARN).unwrap(),
            target_type: "ip".into(),
            protocol: "HTTP".into(),
            ip_address_type: "ipv4".into(),
            vpc_id: Some("vpc-0123456789abcdef0".into()),
            port: Some(80),
            health_check_port: None,
            load_balancer_arns: vec![],
        }
    }

    fn service(ports: &[(u16, &str)]) -> Service {
        let ports = ports.iter().map(|(port, protocol)| ServicePort {
            port: *port,
            protocol: (*protocol).to_owned(),
            ..Default::default()
        });
        Service { ports: ports.collect(), ..Default::default() }
    }

    fn completed(spec: Value, additions: &[Addition]) -> Spec {
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        apply(&mut spec, additions);
        spec
    }

    fn of(spec: Spec) -> TargetGroupBinding {
        TargetGroupBinding { spec, ..TargetGroupBinding::default() }
    }

    #[test]
    fn a_name_and_a_service_are_enough_and_twice_fills_nothing_more() {
        let bare = json!({"targetGroup": {"name": "web"}, "serviceRef": {"name": "web", "port": 0}});
        let service = service(&[(80, "TCP"), (53, "UDP")]);
        let additions = from_lookups(&binding(bare.clone()), Some(&target_group()), Some(&service));
        let full = completed(bare, &additions);
        assert_eq!(
            serde_json::to_value(&full).unwrap(),
            json!({
                "targetGroup": {"name": "web", "arn": ARN, "targetType": "ip", "ipAddressType": "ipv4",
                    "vpcID": "vpc-0123456789abcdef0", "protocol": "HTTP"},
                "serviceRef": {"name": "web", "port": 80}
            })
        );
        assert_eq!(from_lookups(&of(full), Some(&target_group()), Some(&service)), []);
    }

    #[test]
    fn a_choice_of_ports_is_left_to_the_user() {
        let new = binding(json!({"targetGroup": {"name": "web"}, "serviceRef": {"name": "web"}}));
        let additions = from_lookups(&new, None, Some(&service(&[(80, "TCP"), (81, "TCP")])));
        assert_eq!(additions, []);
    }

    #[test]
    fn a_bare_manifest_applied_again_gets_everything_from_the_stored_object() {
        let bare = json!({"targetGroup": {"name": "web"}, "serviceRef": {"name": "web"}});
        let additions =
            from_lookups(&binding(bare.clone()), Some(&target_group()), Some(&service(&[(80, "TCP")])));
        let full = completed(bare.clone(), &additions);
        let additions = from_old(&binding(bare.clone()), &of(full.clone()));
        assert_eq!(completed(bare, &additions), full);
    }

    #[test]
    fn another_name_takes_no_old_arn_and_another_service_no_old_port() {
        let old = binding(
            json!({"targetGroup": {"name": "web", "arn": ARN}, "serviceRef": {"name": "web", "port": 80}}),
        );
        let new = binding(json!({"targetGroup": {"name": "api"}, "serviceRef": {"name": "api"}}));
        assert_eq!(from_old(&new, &old), []);
    }

    #[test]
    fn the_patch_makes_a_missing_parent_once_and_drops_nulls_first() {
        let additions = [Addition::Arn(ARN.to_owned()), Addition::Protocol(Protocol::Http)];
        let nulls = vec!["/spec/targetGroup".to_owned()];
        let there =
            Parents { spec: true, target_group: false, service_ref: true, nulls, ..Parents::default() };
        assert_eq!(
            patch(there, &additions),
            [
                json!({"op": "remove", "path": "/spec/targetGroup"}),
                json!({"op": "add", "path": "/spec/targetGroup", "value": {}}),
                json!({"op": "add", "path": "/spec/targetGroup/arn", "value": ARN}),
                json!({"op": "add", "path": "/spec/targetGroup/protocol", "value": "HTTP"}),
            ]
        );
        assert_eq!(patch(Parents::default(), &[]), Vec::<Value>::new());
        let there = Parents { version: Version::V1Beta1, spec: true, ..Parents::default() };
        let additions = [Addition::Protocol(Protocol::Http), Addition::Port(IntOrString::Int(80))];
        assert_eq!(
            patch(there, &additions),
            [
                json!({"op": "add", "path": "/spec/targetGroupProtocol", "value": "HTTP"}),
                json!({"op": "add", "path": "/spec/serviceRef", "value": {}}),
                json!({"op": "add", "path": "/spec/serviceRef/port", "value": 80}),
            ]
        );
    }
}
