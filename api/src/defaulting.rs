//! What admission fills in (D1 to D7), as additions to the object as it was sent.
//!
//! Two steps, since the second one needs lookups for which the first one may supply the ARN: [`from_old`], then
//! [`from_lookups`]. Both are idempotent, and say nothing about fields that are set.

use crate::service::Service;
use crate::target_group::{Protocol, TargetGroup};
use crate::v1::{TargetGroupBinding, TargetGroupRef};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Map, Value, json};

/// A value for a field that is missing.
#[derive(Debug, Clone, PartialEq)]
pub struct Addition {
    /// Where, below `spec`: object and member.
    pub field: (&'static str, &'static str),
    /// What.
    pub value: Value,
}

fn group(member: &'static str, value: impl Into<Value>) -> Addition {
    Addition { field: ("targetGroup", member), value: value.into() }
}

/// D7: what an update leaves out and the stored object has. Not the ARN where another name is given, and not the port
/// where another Service is.
pub fn from_old(new: &TargetGroupBinding, old: &TargetGroupBinding) -> Vec<Addition> {
    let (is, was) = (&new.spec.target_group, &old.spec.target_group);
    let mut out = Vec::new();
    let renamed = is.name().is_some() && is.name() != was.name();
    if let Some(arn) = was.arn().filter(|_| is.arn().is_none() && !renamed) {
        out.push(group("arn", arn));
    }
    if let Some(value) = was.target_type.filter(|_| is.target_type.is_none()) {
        out.push(group("targetType", value.as_str()));
    }
    if let Some(value) = was.ip_address_type.filter(|_| is.ip_address_type.is_none()) {
        out.push(group("ipAddressType", value.as_str()));
    }
    if let Some(value) = was.vpc_id().filter(|_| is.vpc_id().is_none()) {
        out.push(group("vpcID", value));
    }
    if let Some(value) = was.protocol.filter(|_| is.protocol.is_none()) {
        out.push(group("protocol", value.as_str()));
    }
    let (is, was) = (&new.spec.service_ref, &old.spec.service_ref);
    if let Some(port) = was.port().filter(|_| is.port().is_none() && is.name == was.name) {
        out.push(Addition { field: ("serviceRef", "port"), value: port_value(port) });
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
            out.push(group("arn", aws.arn.as_str()));
        }
        if let Some(value) = aws.binding_target_type().filter(|_| is.target_type.is_none()) {
            out.push(group("targetType", value.as_str()));
        }
        if is.ip_address_type.is_none() {
            out.push(group("ipAddressType", aws.binding_ip_address_type().as_str()));
        }
        if let Some(value) = aws.vpc_id.as_deref().filter(|_| is.vpc_id().is_none()) {
            out.push(group("vpcID", value));
        }
        if let Some(value) = aws.binding_protocol().filter(|_| is.protocol.is_none()) {
            out.push(group("protocol", value.as_str()));
        }
    }
    let protocol = is.protocol.or_else(|| target_group?.binding_protocol());
    if new.spec.service_ref.port().is_none()
        && let Some(port) = service.and_then(|service| only_port(service, protocol))
    {
        out.push(Addition { field: ("serviceRef", "port"), value: port.into() });
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

fn port_value(port: &IntOrString) -> Value {
    match port {
        IntOrString::Int(number) => (*number).into(),
        IntOrString::String(name) => name.as_str().into(),
    }
}

/// Writes additions into an object.
pub fn apply(object: &mut Value, additions: &[Addition]) {
    for Addition { field: (parent, member), value } in additions {
        let Some(object) = object.as_object_mut() else { return };
        let Some(spec) = child(object, "spec") else { return };
        if let Some(parent) = child(spec, parent) {
            parent.insert((*member).to_owned(), value.clone());
        }
    }
}

fn child<'a>(object: &'a mut Map<String, Value>, name: &str) -> Option<&'a mut Map<String, Value>> {
    let value = object.entry(name).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

/// The additions as a JSON patch (RFC 6902) of the object as it was sent; empty if there are none.
pub fn patch(object: &Value, additions: &[Addition]) -> Vec<Value> {
    let mut out = Vec::new();
    let mut made: Vec<&str> = Vec::new();
    if !additions.is_empty() && !object.get("spec").is_some_and(Value::is_object) {
        out.push(json!({"op": "add", "path": "/spec", "value": {}}));
    }
    for Addition { field: (parent, member), value } in additions {
        let there = object.get("spec").and_then(|spec| spec.get(parent)).is_some_and(Value::is_object);
        if !there && !made.contains(parent) {
            made.push(parent);
            out.push(json!({"op": "add", "path": format!("/spec/{parent}"), "value": {}}));
        }
        out.push(json!({"op": "add", "path": format!("/spec/{parent}/{member}"), "value": value}));
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

    #[test]
    fn a_name_and_a_service_are_enough_and_twice_fills_nothing_more() {
        let mut object =
            json!({"spec": {"targetGroup": {"name": "web"}, "serviceRef": {"name": "web", "port": 0}}});
        let read = |object: &Value| serde_json::from_value::<TargetGroupBinding>(object.clone()).unwrap();
        let service = service(&[(80, "TCP"), (53, "UDP")]);
        let additions = from_lookups(&read(&object), Some(&target_group()), Some(&service));
        apply(&mut object, &additions);
        assert_eq!(
            object["spec"],
            json!({
                "targetGroup": {"name": "web", "arn": ARN, "targetType": "ip", "ipAddressType": "ipv4",
                    "vpcID": "vpc-0123456789abcdef0", "protocol": "HTTP"},
                "serviceRef": {"name": "web", "port": 80}
            })
        );
        assert_eq!(from_lookups(&read(&object), Some(&target_group()), Some(&service)), []);
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
        let mut full = json!({"spec": bare});
        apply(
            &mut full,
            &from_lookups(&binding(bare.clone()), Some(&target_group()), Some(&service(&[(80, "TCP")]))),
        );
        let old = binding(full["spec"].clone());
        let mut again = json!({"spec": bare});
        apply(&mut again, &from_old(&binding(bare), &old));
        assert_eq!(again, full);
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
    fn the_patch_makes_a_missing_parent_once() {
        let additions = [group("arn", ARN), group("protocol", "HTTP")];
        let patch = patch(&json!({"spec": {"serviceRef": {"name": "web"}}}), &additions);
        assert_eq!(
            patch,
            [
                json!({"op": "add", "path": "/spec/targetGroup", "value": {}}),
                json!({"op": "add", "path": "/spec/targetGroup/arn", "value": ARN}),
                json!({"op": "add", "path": "/spec/targetGroup/protocol", "value": "HTTP"}),
            ]
        );
        assert_eq!(super::patch(&json!({}), &[]), Vec::<Value>::new());
    }
}
