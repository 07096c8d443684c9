//! Readiness gates of new pods. QUIC server ids are not injected yet.

use crate::admission::{Answer, Request};
use crate::lookup::Cluster;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tgb_api::names;
use tgb_api::target_group::TargetType;
use tgb_api::v1::TargetGroupBinding;

/// Answers a review: a gate for each binding with ip targets whose Service selects the pod, if the namespace asks.
pub(crate) async fn review(request: &Request, cluster: &Cluster) -> Answer {
    let mut answer = Answer::default();
    let Some(pod) = request.object() else { return answer };
    let labels: BTreeMap<String, String> = pod
        .pointer("/metadata/labels")
        .and_then(|labels| serde_json::from_value(labels.clone()).ok())
        .unwrap_or_default();
    let gated = cluster.injects(request.namespace()).await;
    if gated != Some(false) {
        let mut gates = Vec::new();
        for binding in cluster.bindings_of(request.namespace()).await {
            if wants_gate(&binding) {
                let name = &binding.spec.service_ref.name;
                let service = cluster.cached_service(request.namespace(), name);
                if service.is_some_and(|service| service.selects(&labels)) {
                    gates.push(names::readiness_gate(binding.name()));
                }
            }
        }
        answer.patch = gate_patch(pod, &gates);
    }
    answer
}

fn wants_gate(binding: &TargetGroupBinding) -> bool {
    !binding.is_terminating()
        && binding.spec.target_group.target_type == Some(TargetType::Ip)
        && binding.name().len() <= 63
}

/// Adds the gates that are missing; those that are there stay as they are.
fn gate_patch(pod: &Value, gates: &[String]) -> Vec<Value> {
    let existing = pod.pointer("/spec/readinessGates").and_then(Value::as_array);
    let has = |gate: &str| {
        existing.is_some_and(|all| {
            all.iter().any(|g| g.get("conditionType").and_then(Value::as_str) == Some(gate))
        })
    };
    let missing: Vec<Value> =
        gates.iter().filter(|gate| !has(gate)).map(|gate| json!({"conditionType": gate})).collect();
    match existing {
        _ if missing.is_empty() => Vec::new(),
        None => vec![json!({"op": "add", "path": "/spec/readinessGates", "value": missing})],
        Some(_) => missing
            .into_iter()
            .map(|gate| json!({"op": "add", "path": "/spec/readinessGates/-", "value": gate}))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_added_once_and_others_stay() {
        let gate = "target-health.elbv2.k8s.aws/web".to_owned();
        let added = gate_patch(&json!({"spec": {}}), std::slice::from_ref(&gate));
        assert_eq!(
            added,
            [json!({"op": "add", "path": "/spec/readinessGates", "value": [{"conditionType": gate}]})]
        );
        let pod = json!({"spec": {"readinessGates": [{"conditionType": "other"}]}});
        assert_eq!(gate_patch(&pod, std::slice::from_ref(&gate))[0]["path"], "/spec/readinessGates/-");
        let pod = json!({"spec": {"readinessGates": [{"conditionType": gate}]}});
        assert!(gate_patch(&pod, &[gate]).is_empty());
    }
}
