//! TGB501: warns when a change of a Service leaves bindings without what they need. Never refuses.

use crate::admission::{Answer, Request};
use crate::lookup::Cluster;
use k8s_openapi::api::core::v1 as core;
use tgb_api::rules::{Settings, Severity};
use tgb_api::service::Service;
use tgb_api::target_group::TargetType;
use tgb_api::v1::TargetGroupBinding;

/// Answers a review.
pub(crate) async fn review(request: &Request, cluster: &Cluster, settings: &Settings) -> Answer {
    let mut answer = Answer::default();
    if settings.severities.get("TGB501") == Some(&Severity::Off) {
        return answer;
    }
    let read = |value: Option<&serde_json::Value>| {
        let service: core::Service = serde_json::from_value(value?.clone()).ok()?;
        Some(Service::read(&service))
    };
    let Some(old) = read(request.old_object()) else { return answer };
    let new = if request.operation() == "DELETE" { None } else { read(request.object()) };
    let bindings = cluster.bindings_of(request.namespace()).await;
    let using = bindings.iter().filter(|b| !b.is_terminating() && b.spec.service_ref.name == request.name());
    answer.warnings = using.filter_map(|binding| loss(binding, &old, new.as_ref())).collect();
    answer
}

/// What a binding would lose, if anything.
fn loss(binding: &TargetGroupBinding, old: &Service, new: Option<&Service>) -> Option<String> {
    let name = binding.name();
    let Some(new) = new else {
        return Some(format!(
            "TGB501 TargetGroupBinding {name} uses this Service; its targets will be deregistered"
        ));
    };
    if old.selector.is_some() && new.selector.is_none() {
        return Some(format!(
            "spec.selector: TGB501 TargetGroupBinding {name} uses this Service, which will select no pods"
        ));
    }
    if new.service_type == "ExternalName" && old.service_type != "ExternalName" {
        return Some(format!(
            "spec.type: TGB501 TargetGroupBinding {name} uses this Service, which will have no endpoints"
        ));
    }
    let group = &binding.spec.target_group;
    let wanted = binding.spec.service_ref.port()?;
    let was = old.port(wanted, group.protocol)?;
    let Some(is) = new.port(wanted, group.protocol) else {
        return Some(format!(
            "spec.ports: TGB501 TargetGroupBinding {name} uses port {}, which goes away",
            was.describe()
        ));
    };
    if group.target_type == Some(TargetType::Instance) {
        match (was.node_port, is.node_port) {
            (Some(was), None) => {
                return Some(format!(
                    "spec.ports: TGB501 TargetGroupBinding {name} uses nodePort {was}, which goes away"
                ));
            }
            (Some(was), Some(is)) if was != is => {
                return Some(format!(
                    "spec.ports: TGB501 TargetGroupBinding {name} uses nodePort {was}, which becomes {is}"
                ));
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tgb_api::service::ServicePort;

    fn service(node_port: u16) -> Service {
        Service {
            service_type: "NodePort".into(),
            selector: Some([("app".to_owned(), "web".to_owned())].into()),
            ports: vec![ServicePort {
                port: 80,
                protocol: "TCP".into(),
                node_port: Some(node_port),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn binding() -> TargetGroupBinding {
        serde_json::from_value(
            json!({"metadata": {"name": "web"}, "spec": {"targetGroup": {"targetType": "instance"},
            "serviceRef": {"name": "web", "port": 80}}}),
        )
        .unwrap()
    }

    #[test]
    fn a_change_that_leaves_a_binding_without_what_it_uses_is_told() {
        let told = |new: Option<&Service>| loss(&binding(), &service(30080), new);
        assert_eq!(told(Some(&service(30080))), None);
        assert!(told(None).unwrap().contains("deregistered"));
        assert!(told(Some(&service(30081))).unwrap().contains("becomes 30081"));
        assert!(told(Some(&Service { selector: None, ..service(30080) })).unwrap().contains("no pods"));
        assert!(told(Some(&Service { ports: vec![], ..service(30080) })).unwrap().contains("port 80"));
    }
}
