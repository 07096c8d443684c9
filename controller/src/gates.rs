//! Readiness gates: what the condition `target-health.elbv2.k8s.aws/<binding>` of pods says, and writing it.

use crate::context::Ctx;
use crate::index::{Index, Key};
use crate::kept::{GateState, PodGate};
use futures::StreamExt;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tgb_api::names;
use tgb_api::objects::Pod;
use tgb_aws::values::{ObservedTarget, TargetState};
use tokio::time::Instant;
use tracing::warn;

/// The reason of a gate that is open since no load balancer is there.
pub(crate) const NOT_IN_USE: &str = "TargetGroupNotInUse";
/// A condition type has room for the name of a binding of this length (TGB107).
const LONGEST_NAME: usize = 63;

/// A condition of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gate {
    pub(crate) pod: Key,
    pub(crate) uid: String,
    pub(crate) kind: String,
    /// It was not `True` before.
    pub(crate) opens: bool,
    /// Status, reason, message.
    pub(crate) state: GateState,
}

/// What the gate of a registered, or not yet registered, pod says. `in_use`: the target group has a load balancer.
pub(crate) fn state(seen: Option<&ObservedTarget>, in_use: bool) -> GateState {
    let says = |status: &str, reason: &str, message: &str| {
        (status.to_owned(), reason.to_owned(), message.to_owned())
    };
    let Some(seen) = seen.filter(|seen| seen.state.is_registered()) else {
        return says("False", "Target.NotRegistered", "Target is not registered yet");
    };
    let described = |fallback: &str| {
        let reason = seen.reason.as_deref().unwrap_or(fallback);
        says("False", reason, seen.description.as_deref().unwrap_or_default())
    };
    match seen.state {
        TargetState::Healthy => says("True", "", ""),
        TargetState::Unused if !in_use => {
            says("True", NOT_IN_USE, "The target group is attached to no load balancer")
        }
        TargetState::Initial if seen.reason.is_none() => {
            says("False", "Elb.RegistrationInProgress", "Target registration is in progress")
        }
        other => described(other.as_str()),
    }
}

/// The gates of a binding's pods that say something else than they should.
pub(crate) fn outdated(index: &Index, binding: &Key, state_of: impl Fn(&Key) -> GateState) -> Vec<Gate> {
    let kind = names::readiness_gate(&binding.name);
    let pods = index.gated_pods(binding);
    pods.filter_map(|(key, pod)| {
        let now = &pod.gate(&kind)?.state;
        let state = state_of(key);
        (now.as_deref() != Some(&state)).then(|| Gate {
            pod: key.clone(),
            uid: pod.uid.to_string(),
            kind: kind.clone(),
            opens: state.0 == "True" && now.as_deref().is_none_or(|(status, ..)| status != "True"),
            state,
        })
    })
    .collect()
}

/// Whether a running pod of the binding waits for its gate.
pub(crate) fn waits(index: &Index, binding: &Key) -> bool {
    let kind = names::readiness_gate(&binding.name);
    index.gated_pods(binding).any(|(_, pod)| {
        let is_shut = |gate: &PodGate| gate.state.as_deref().is_none_or(|(status, ..)| status != "True");
        pod.containers_ready && pod.gate(&kind).is_some_and(is_shut)
    })
}

/// Running pods of a Service that lack the gate of a binding with ip targets although their namespace asks for gates: they
/// were made before the binding. By key, with their UIDs.
pub(crate) fn lacking(index: &Index, binding: &Key, service: &Key) -> BTreeMap<Key, String> {
    let injects = index.namespaces.get(&binding.namespace).is_some_and(|namespace| namespace.injects);
    if !injects || binding.name.len() > LONGEST_NAME {
        return BTreeMap::new();
    }
    let kind = names::readiness_gate(&binding.name);
    let pods = index.pods_of(service).filter(|(_, pod)| pod.running && pod.gate(&kind).is_none());
    pods.map(|(key, pod)| (key.clone(), pod.uid.to_string())).collect()
}

/// The state of gates whose binding is gone.
pub(crate) fn of_a_deleted_binding() -> GateState {
    ("True".to_owned(), "TargetGroupBindingDeleted".to_owned(), "Target Group Binding is deleted".to_owned())
}

/// Writes gates side by side; whether all were written. A pod that is gone or replaced needs none.
pub(crate) async fn write(ctx: &Ctx, gates: Vec<Gate>) -> bool {
    let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let writes = gates.into_iter().map(|gate| {
        let now = now.clone();
        async move {
            let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &gate.pod.namespace);
            let (status, reason, message) = &gate.state;
            let patch = json!({
                "metadata": {"uid": gate.uid},
                "status": {"conditions": [{
                    "type": gate.kind,
                    "status": status,
                    "reason": reason,
                    "message": message,
                    "lastTransitionTime": now,
                }]},
            });
            let answer =
                api.patch_status(&gate.pod.name, &PatchParams::default(), &Patch::Strategic(&patch)).await;
            match answer {
                Ok(_) => true,
                Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => true,
                Err(error) => {
                    warn!(pod = %gate.pod, %error, "could not write a readiness gate");
                    false
                }
            }
        }
    });
    futures::stream::iter(writes).buffer_unordered(16).all(|written| async move { written }).await
}

/// Opens gates whose binding has not existed for `--orphaned-gate-grace`.
pub(crate) async fn sweep(ctx: Arc<Ctx>) {
    let patience = ctx.settings.orphaned_gate_grace;
    let period = (patience / 4).clamp(Duration::from_millis(250), Duration::from_secs(15));
    let mut since: BTreeMap<Key, Instant> = BTreeMap::new();
    while !ctx.stop.is_cancelled() && !ctx.settings.observe {
        let orphans: BTreeSet<Key> = {
            let index = ctx.index();
            index.gated().keys().filter(|key| !index.has_binding(key)).cloned().collect()
        };
        since.retain(|binding, _| orphans.contains(binding));
        for binding in orphans {
            if since.entry(binding.clone()).or_insert_with(Instant::now).elapsed() >= patience {
                let gates = outdated(&ctx.index(), &binding, |_| of_a_deleted_binding());
                write(&ctx, gates).await;
            }
        }
        tokio::time::sleep(period).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tgb_aws::values::{TARGET_STATES, Target};

    fn seen(state: TargetState, reason: &str) -> ObservedTarget {
        ObservedTarget {
            target: Target { id: "10.0.0.1".to_owned(), port: 80, zone: None, quic_server_id: None },
            state,
            reason: Some(reason.to_owned()),
            description: Some("why".to_owned()),
        }
    }

    fn short(seen: Option<&ObservedTarget>, in_use: bool) -> (String, String) {
        let (status, reason, _) = state(seen, in_use);
        (status, reason)
    }

    fn pair(status: &str, reason: &str) -> (String, String) {
        (status.to_owned(), reason.to_owned())
    }

    #[test]
    fn a_gate_opens_for_a_healthy_target_only() {
        assert_eq!(short(Some(&seen(TargetState::Healthy, "")), true), pair("True", ""));
        let failing = seen(TargetState::Unhealthy, "Target.Timeout");
        assert_eq!(short(Some(&failing), true), pair("False", "Target.Timeout"));
        assert_eq!(short(None, true), pair("False", "Target.NotRegistered"));
    }

    #[test]
    fn a_gate_says_what_aws_says_of_every_registered_target() {
        for (target, _, reasons) in TARGET_STATES {
            for reason in reasons {
                let want = if target.is_registered() { *reason } else { "Target.NotRegistered" };
                assert_eq!(short(Some(&seen(target, reason)), true), pair("False", want));
            }
        }
    }

    #[test]
    fn an_unused_target_opens_its_gate_only_where_no_load_balancer_is() {
        let unused = seen(TargetState::Unused, "Target.NotInUse");
        assert_eq!(short(Some(&unused), false), pair("True", "TargetGroupNotInUse"));
        assert_eq!(short(Some(&unused), true), pair("False", "Target.NotInUse"));
    }
}
