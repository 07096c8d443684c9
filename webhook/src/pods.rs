//! What new pods get: readiness gates, and QUIC server ids. The namespace selectors of the two webhook entries say which
//! pods come here.

use crate::admission::{Answer, Objects, Request};
use crate::lookup::{Bound, Cluster};
use base64::Engine as _;
use futures::{StreamExt as _, stream};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tgb_api::names;
use tgb_api::target_group::TargetType;
use tgb_api::text::{is_dns_label, listed};

/// Services that are read at a time, and the time for all of them: those that are not there cost a call each.
const AT_A_TIME: usize = 8;
const FOR_SERVICES: Duration = Duration::from_secs(1);
/// The most containers or bindings that a warning names.
const MOST_NAMES: usize = 5;

/// A pod, as far as it is read here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pod {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    readiness_gates: Option<Vec<Gate>>,
    containers: Vec<Container>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Gate {
    #[serde(default)]
    condition_type: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    name: String,
    env: Option<Vec<Variable>>,
}

#[derive(Debug, Deserialize)]
struct Variable {
    #[serde(default)]
    name: String,
}

fn read(request: &Request<'_>, object: Option<&str>) -> Option<Pod> {
    if request.is_of_subresource() {
        return None;
    }
    // What can't be read is refused by the API server itself.
    serde_json::from_str(object?).ok()
}

/// Answers a review: a gate for each binding with ip targets whose Service selects the pod.
///
/// # Errors
/// A sentence for HTTP 500, if the cluster can't be asked.
pub(crate) async fn gates(
    request: &Request<'_>,
    objects: Objects<&str>,
    cluster: &Cluster,
) -> Result<Answer, String> {
    let Some(pod) = read(request, objects.new) else { return Ok(Answer::default()) };
    let labels = pod.metadata.labels.unwrap_or_default();
    let namespace = request.namespace();
    let bindings = cluster.bindings_of(namespace).await.map_err(|error| error.to_string())?;
    let bindings: Vec<_> = bindings.iter().filter(|binding| wants_gate(binding)).collect();
    let mut services = BTreeMap::new();
    for binding in &bindings {
        let known = cluster.cached_service(namespace, &binding.service).map(Some);
        services.entry(binding.service.clone()).or_insert(known);
    }
    // It may have been made a moment ago, by the manifest that has the pod as well.
    let unknown = services.iter().filter(|(name, known)| known.is_none() && is_dns_label(name));
    let unknown: Vec<String> = unknown.map(|(name, _)| name.clone()).collect();
    let looked_up = stream::iter(unknown)
        .map(|name| async move {
            let found = cluster.live_service(namespace, &name).await;
            (name, found)
        })
        .buffer_unordered(AT_A_TIME)
        .take_until(tokio::time::sleep(FOR_SERVICES));
    let mut looked_up = std::pin::pin!(looked_up);
    while let Some((name, found)) = looked_up.next().await {
        match found {
            Ok(found) => drop(services.insert(name, Some(found))),
            Err(error) => tracing::warn!(%error, namespace, service = name, "a Service can't be read"),
        }
    }
    let (mut gates, mut unread) = (Vec::new(), Vec::new());
    for binding in bindings {
        match services.get(&binding.service) {
            Some(Some(Some(service))) => {
                if service.selects(|name| labels.get(name).map(String::as_str)) {
                    gates.push(names::readiness_gate(&binding.name));
                }
            }
            Some(Some(None)) => {}
            // No Service can have that name.
            _ if !is_dns_label(&binding.service) => {}
            _ => unread.push(binding.name.as_str()),
        }
    }
    let mut answer =
        Answer { patch: gate_patch(pod.spec.readiness_gates.as_deref(), gates), ..Answer::default() };
    if !unread.is_empty() {
        let bindings = listed(unread, MOST_NAMES);
        answer.warnings.push(format!(
            "spec.readinessGates: not checked for TargetGroupBinding {bindings}, whose Service can't be read"
        ));
    }
    Ok(answer)
}

fn wants_gate(binding: &Bound) -> bool {
    binding.target_type == Some(TargetType::Ip) && binding.name.len() <= 63
}

/// Adds the gates that are missing; those that are there stay as they are.
fn gate_patch(existing: Option<&[Gate]>, gates: Vec<String>) -> Vec<Value> {
    let there = existing.unwrap_or_default();
    let missing: Vec<Value> = gates
        .into_iter()
        .filter(|gate| !there.iter().any(|it| it.condition_type == *gate))
        .map(|gate| json!({"conditionType": gate}))
        .collect();
    match existing {
        _ if missing.is_empty() => Vec::new(),
        None => vec![json!({"op": "add", "path": "/spec/readinessGates", "value": missing})],
        Some(_) => missing
            .into_iter()
            .map(|gate| json!({"op": "add", "path": "/spec/readinessGates/-", "value": gate}))
            .collect(),
    }
}

/// Answers a review: a QUIC server id of its own, 8 random bytes in base64, for each container that the pod's annotation
/// names and that has none.
///
/// # Errors
/// A sentence for HTTP 500, if the system has no random bytes.
pub(crate) fn server_ids(request: &Request<'_>, objects: Objects<&str>) -> Result<Answer, String> {
    let Some(pod) = read(request, objects.new) else { return Ok(Answer::default()) };
    let annotations = pod.metadata.annotations.unwrap_or_default();
    let Some(named) = annotations.get(names::QUIC_CONTAINERS_ANNOTATION) else {
        return Ok(Answer::default());
    };
    let mut answer = Answer::default();
    let lists = [
        ("containers", pod.spec.containers.as_slice()),
        ("initContainers", pod.spec.init_containers.as_deref().unwrap_or_default()),
    ];
    let named: BTreeSet<&str> = named.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let mut found = BTreeSet::new();
    for (list, containers) in lists {
        for (index, container) in containers.iter().enumerate() {
            let name = container.name.as_str();
            if named.contains(name) {
                found.insert(name);
                answer.patch.extend(id_patch(&format!("/spec/{list}/{index}/env"), container, &random_id()?));
            }
        }
    }
    let missing: Vec<&str> = named.difference(&found).copied().collect();
    if !missing.is_empty() {
        answer.warnings.push(format!(
            "metadata.annotations: {} names container {}, which the pod lacks; it has {}",
            names::QUIC_CONTAINERS_ANNOTATION,
            listed(missing, MOST_NAMES),
            listed(pod.spec.containers.iter().map(|it| it.name.as_str()), MOST_NAMES)
        ));
    }
    Ok(answer)
}

fn id_patch(path: &str, container: &Container, id: &str) -> Option<Value> {
    let variable = json!({"name": names::QUIC_ENVIRONMENT_VARIABLE, "value": id});
    match &container.env {
        Some(env) if env.iter().any(|it| it.name == names::QUIC_ENVIRONMENT_VARIABLE) => None,
        Some(_) => Some(json!({"op": "add", "path": format!("{path}/-"), "value": variable})),
        None => Some(json!({"op": "add", "path": path, "value": [variable]})),
    }
}

fn random_id() -> Result<String, String> {
    let mut bytes = [0; 8];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| "no random bytes for a QUIC server id".to_owned())?;
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(value: &Value) -> String {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "u", "operation": "CREATE", "namespace": "shop", "object": value}})
        .to_string()
    }

    fn injected(value: &Value) -> Answer {
        let body = pod(value);
        let (request, objects) = Request::read(body.as_bytes()).unwrap();
        server_ids(&request, objects).unwrap()
    }

    #[test]
    fn gates_are_added_once_and_others_stay() {
        let gate = || vec!["target-health.elbv2.k8s.aws/web".to_owned()];
        let existing = |name: &str| Some(vec![Gate { condition_type: name.to_owned() }]);
        assert_eq!(
            gate_patch(None, gate()),
            [json!({"op": "add", "path": "/spec/readinessGates", "value": [{"conditionType": gate()[0]}]})]
        );
        assert_eq!(gate_patch(existing("other").as_deref(), gate())[0]["path"], "/spec/readinessGates/-");
        assert!(gate_patch(existing(&gate()[0]).as_deref(), gate()).is_empty());
    }

    #[test]
    fn each_named_container_gets_an_id_of_its_own_once() {
        let annotations = json!({names::QUIC_CONTAINERS_ANNOTATION: "web, side,init,gone"});
        let variable = |name: &str| json!({"name": name, "value": "x"});
        let has = json!([variable(names::QUIC_ENVIRONMENT_VARIABLE)]);
        let answer = injected(&json!({"metadata": {"annotations": annotations}, "spec": {
            "containers": [{"name": "web"}, {"name": "other"}, {"name": "side", "env": [variable("A")]}],
            "initContainers": [{"name": "init", "env": has}]}}));
        let paths: Vec<_> = answer.patch.iter().map(|op| op["path"].as_str().unwrap()).collect();
        assert_eq!(paths, ["/spec/containers/0/env", "/spec/containers/2/env/-"]);
        let ids = [&answer.patch[0]["value"][0]["value"], &answer.patch[1]["value"]["value"]];
        assert_ne!(ids[0], ids[1]);
        for id in ids {
            let id = id.as_str().unwrap();
            assert_eq!(base64::engine::general_purpose::STANDARD.decode(id).unwrap().len(), 8);
        }
        assert_eq!(answer.warnings.len(), 1);
        assert!(answer.warnings[0].contains("names container gone"), "{:?}", answer.warnings);
    }

    #[test]
    fn a_container_that_is_named_again_and_again_gets_one_id_and_unknown_ones_one_warning() {
        let names =
            format!("web,{}{}", "web,".repeat(1000), (0..1000).map(|n| format!("c{n},")).collect::<String>());
        let answer =
            injected(&json!({"metadata": {"annotations": {names::QUIC_CONTAINERS_ANNOTATION: names}},
            "spec": {"containers": [{"name": "web"}]}}));
        assert_eq!(answer.patch.len(), 1);
        assert_eq!(answer.warnings.len(), 1);
        assert!(answer.warnings[0].contains("and 995 more, which the pod lacks"), "{:?}", answer.warnings);
    }

    #[test]
    fn a_pod_without_the_annotation_is_left_alone() {
        assert!(
            injected(&json!({"metadata": {}, "spec": {"containers": [{"name": "web"}]}})).patch.is_empty()
        );
    }
}
