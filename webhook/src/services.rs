//! TGB501: warns when a change of a Service leaves bindings without what they need. Never refuses.

use crate::admission::{Answer, Objects, Request};
use crate::lookup::{Bound, Cluster};
use tgb_api::objects;
use tgb_api::rules::{MOST_FINDINGS, Settings, Severity};
use tgb_api::service::{Service, ServicePort};
use tgb_api::target_group::TargetType;
use tgb_api::text::excerpt;

/// Answers a review.
///
/// # Errors
/// A sentence for HTTP 500, if the cluster can't be asked.
pub(crate) async fn review(
    request: &Request<'_>,
    objects: Objects<&str>,
    cluster: &Cluster,
    settings: &Settings,
) -> Result<Answer, String> {
    let mut answer = Answer::default();
    if settings.severities.get("TGB501") == Some(&Severity::Off) || request.is_of_subresource() {
        return Ok(answer);
    }
    let bindings = cluster.bindings_of_service(request.namespace(), request.name()).await;
    let bindings = bindings.map_err(|error| error.to_string())?;
    if bindings.is_empty() {
        return Ok(answer);
    }
    let read = |json: Option<&str>| {
        let service: objects::Service = serde_json::from_str(json?).ok()?;
        Some(Service::read(&service))
    };
    let Some(old) = read(objects.old) else { return Ok(answer) };
    let new = if request.operation() == "DELETE" { None } else { read(objects.new) };
    answer.warnings = bindings.iter().filter_map(|binding| loss(binding, &old, new.as_ref())).collect();
    let more = answer.warnings.len().saturating_sub(MOST_FINDINGS);
    if more > 0 {
        answer.warnings.truncate(MOST_FINDINGS);
        answer.warnings.push(format!("TGB501 and {more} more"));
    }
    Ok(answer)
}

/// A sentence about the loss of a binding, if there is one.
fn loss(binding: &Bound, old: &Service, new: Option<&Service>) -> Option<String> {
    let name = excerpt(&binding.name);
    let Some(new) = new else {
        return Some(format!(
            "metadata.name: TGB501 TargetGroupBinding {name} uses this Service; its targets will be deregistered"
        ));
    };
    if old.selector.is_some() && new.selector.is_none() {
        return Some(format!(
            "spec.selector: TGB501 TargetGroupBinding {name} uses this Service, which will select no pods"
        ));
    }
    if let (Some(was), Some(is)) = (&old.selector, &new.selector)
        && let Some((key, value, other)) = was.iter().find_map(|(key, value)| {
            let (_, other) = is.iter().find(|(other, is)| other == key && is != value)?;
            Some((key, value, other))
        })
    {
        // With a key less or a key more it may still select some of them.
        return Some(format!(
            "spec.selector: TGB501 TargetGroupBinding {name} uses this Service, which will select none of its present \
             pods ({key}={} instead of {key}={})",
            excerpt(other),
            excerpt(value),
            key = excerpt(key)
        ));
    }
    if new.service_type == "ExternalName" && old.service_type != "ExternalName" {
        return Some(format!(
            "spec.type: TGB501 TargetGroupBinding {name} uses this Service, which will have no endpoints"
        ));
    }
    let wanted = binding.port.as_ref()?;
    let was = old.port(wanted, binding.protocol)?;
    let Some(is) = new.port(wanted, binding.protocol) else {
        return Some(format!(
            "spec.ports: TGB501 TargetGroupBinding {name} uses port {}, which goes away",
            was.describe()
        ));
    };
    let fits = |port: &ServicePort| binding.protocol.is_none_or(|p| p.fits_service_protocol(&port.protocol));
    if let Some(protocol) = binding.protocol.filter(|_| fits(was) && !fits(is)) {
        return Some(format!(
            "spec.ports: TGB501 TargetGroupBinding {name} uses port {}, which becomes {} and does not fit the target \
             group's protocol {protocol}",
            was.describe(),
            is.protocol
        ));
    }
    if binding.target_type == Some(TargetType::Instance) {
        let node_port = |service: &Service, port: Option<u16>| port.filter(|_| service.has_node_ports());
        match (node_port(old, was.node_port), node_port(new, is.node_port)) {
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

    fn binding() -> Bound {
        let binding = serde_json::from_value(
            json!({"metadata": {"name": "web"}, "spec": {"targetGroup": {"targetType": "instance", "protocol": "HTTP"},
            "serviceRef": {"name": "web", "port": 80}}}),
        );
        Bound::read(&binding.unwrap()).unwrap()
    }

    #[test]
    fn a_change_that_leaves_a_binding_without_what_it_uses_is_told() {
        let told = |new: Option<&Service>| loss(&binding(), &service(30080), new);
        assert_eq!(told(Some(&service(30080))), None);
        assert!(told(None).unwrap().contains("deregistered"));
        assert!(told(Some(&service(30081))).unwrap().contains("becomes 30081"));
        let inside = Service { service_type: "ClusterIP".into(), ..service(30080) };
        assert!(told(Some(&inside)).unwrap().contains("nodePort 30080, which goes away"));
        assert!(told(Some(&Service { selector: None, ..service(30080) })).unwrap().contains("no pods"));
        assert!(told(Some(&Service { ports: vec![], ..service(30080) })).unwrap().contains("port 80"));
        let mut dns = service(30080);
        dns.ports.iter_mut().for_each(|port| port.protocol = "UDP".into());
        assert!(
            told(Some(&dns))
                .unwrap()
                .contains("becomes UDP and does not fit the target group's protocol HTTP")
        );
    }

    #[test]
    fn a_selector_that_selects_other_pods_is_told_and_one_that_may_select_the_same_is_not() {
        let selecting = |labels: &[(&str, &str)]| Service {
            selector: Some(
                labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ),
            ..service(30080)
        };
        let told = |labels: &[(&str, &str)]| {
            loss(&binding(), &selecting(&[("app", "web"), ("colour", "blue")]), Some(&selecting(labels)))
        };
        assert_eq!(told(&[("colour", "blue"), ("app", "web")]), None);
        assert_eq!(told(&[("app", "web")]), None, "more pods");
        assert_eq!(told(&[("app", "web"), ("colour", "blue"), ("tier", "front")]), None, "perhaps fewer");
        assert_eq!(told(&[("tier", "front")]), None, "perhaps the same");
        let said = told(&[("app", "web"), ("colour", "green")]).unwrap();
        assert!(said.starts_with("spec.selector: TGB501 TargetGroupBinding web"), "{said}");
        assert!(said.contains("colour=green instead of colour=blue"), "{said}");
    }
}
