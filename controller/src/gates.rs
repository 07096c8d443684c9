//! Readiness gates: what the condition `target-health.elbv2.k8s.aws/<binding>` of pods says, and writing it.

use crate::context::Ctx;
use crate::index::{Index, Key};
use crate::kept::{GateState, PodGate};
use crate::reason::Reason;
use futures::StreamExt;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
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
    /// Its status was another one before, or none.
    pub(crate) turns: bool,
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
        let now = pod.gate(&kind)?.state.as_deref();
        let state = state_of(key);
        (now != Some(&state)).then(|| Gate {
            pod: key.clone(),
            uid: pod.uid.to_string(),
            kind: kind.clone(),
            turns: now.is_none_or(|(status, ..)| *status != state.0),
            state,
        })
    })
    .collect()
}

/// The gates that wait for a binding of which nothing can be registered: they say why. One that is open stays so, and one that
/// says the same in other words stays as it is.
pub(crate) fn held_up(index: &Index, binding: &Key, reason: Reason, message: &str) -> Vec<Gate> {
    let state = ("False".to_owned(), reason.as_str().to_owned(), message.to_owned());
    let kind = names::readiness_gate(&binding.name);
    let is_news = |gate: &Gate| {
        let pod = index.pod(&gate.pod);
        let now = pod.and_then(|(_, pod)| pod.gate(&kind)).and_then(|gate| gate.state.as_deref());
        now.is_none_or(|(status, reason, _)| status != "True" && (status, reason) != (&state.0, &state.1))
    };
    outdated(index, binding, |_| state.clone()).into_iter().filter(is_news).collect()
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
        let now = &now;
        async move {
            let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &gate.pod.namespace);
            let patch = Patch::Strategic(patch(&gate, now));
            match api.patch_status(&gate.pod.name, &PatchParams::default(), &patch).await {
                Ok(_) => true,
                Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => true,
                Err(error) => {
                    warn!(pod = %gate.pod, error = %tgb_process::told(&error), "could not write a readiness gate");
                    false
                }
            }
        }
    });
    all_of(writes).await
}

/// Does all of it, some at a time; whether all went well. One that fails keeps no other from being done.
async fn all_of(writes: impl Iterator<Item = impl Future<Output = bool>>) -> bool {
    futures::stream::iter(writes).buffer_unordered(16).fold(true, |all, one| async move { all && one }).await
}

/// The patch of a pod's status for a gate. The time stays where the status does.
fn patch(gate: &Gate, now: &str) -> Value {
    let (status, reason, message) = &gate.state;
    let mut condition = serde_json::Map::new();
    let said = [("type", &gate.kind), ("status", status), ("reason", reason), ("message", message)];
    condition.extend(said.map(|(field, text)| (field.to_owned(), json!(text))));
    condition.extend(gate.turns.then(|| ("lastTransitionTime".to_owned(), json!(now))));
    json!({"metadata": {"uid": gate.uid}, "status": {"conditions": [condition]}})
}

/// Opens gates whose binding has not existed for `--orphaned-gate-grace`.
pub(crate) async fn sweep(ctx: Arc<Ctx>) {
    let patience = ctx.settings.orphaned_gate_grace;
    let period = (patience / 4).clamp(Duration::from_millis(250), Duration::from_secs(15));
    let mut since: BTreeMap<Key, Instant> = BTreeMap::new();
    if ctx.settings.observe {
        return ctx.stop.cancelled().await;
    }
    while !ctx.stop.is_cancelled() {
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

    /// Pods with the gate of binding `web`, and what that says.
    fn gated(pods: &[(&str, Option<GateState>)]) -> Index {
        let mut index = Index::default();
        let kind = names::readiness_gate("web");
        for (name, state) in pods {
            let conditions = state.iter().map(|(status, reason, message)| {
                json!({"type": kind, "status": status, "reason": reason, "message": message})
            });
            let conditions: Vec<Value> = conditions.collect();
            let pod = json!({
                "metadata": {"namespace": "shop", "name": name, "uid": name},
                "spec": {"containers": [], "readinessGates": [{"conditionType": kind}]},
                "status": {"conditions": conditions},
            });
            index.put_pod(&serde_json::from_value(pod).unwrap());
        }
        index
    }

    fn said(status: &str, reason: &str, message: &str) -> GateState {
        (status.to_owned(), reason.to_owned(), message.to_owned())
    }

    #[test]
    fn the_time_of_a_gate_moves_with_its_status_only() {
        let index = gated(&[
            ("new", None),
            ("worse", Some(said("False", "Elb.InitialHealthChecking", ""))),
            ("opens", Some(said("False", "Target.Timeout", ""))),
        ]);
        let state = |pod: &Key| match &*pod.name {
            "opens" => said("True", "", ""),
            _ => said("False", "Target.Timeout", "it does not answer"),
        };
        let gates = outdated(&index, &Key::new("shop", "web"), state);
        let times: Vec<(String, bool)> = gates
            .iter()
            .map(|gate| {
                let patch = patch(gate, "2026-01-02T03:04:05Z");
                (
                    gate.pod.name.to_string(),
                    patch["status"]["conditions"][0]["lastTransitionTime"].is_string(),
                )
            })
            .collect();
        let expected = [("new", true), ("opens", true), ("worse", false)];
        assert_eq!(times, expected.map(|(name, moves)| (name.to_owned(), moves)));
    }

    #[test]
    fn gates_of_a_binding_that_is_held_up_say_why_and_open_ones_stay_open() {
        let index = gated(&[
            ("new", None),
            ("waits", Some(said("False", "Target.NotRegistered", ""))),
            ("told", Some(said("False", "TargetGroupNotFound", "in other words"))),
            ("open", Some(said("True", "", ""))),
        ]);
        let gates = held_up(&index, &Key::new("shop", "web"), Reason::TargetGroupNotFound, "there is none");
        let told: Vec<(&str, &GateState)> = gates.iter().map(|gate| (&*gate.pod.name, &gate.state)).collect();
        let state = said("False", "TargetGroupNotFound", "there is none");
        assert_eq!(told, [("new", &state), ("waits", &state)]);
    }

    #[tokio::test]
    async fn one_pod_whose_gate_cannot_be_written_keeps_no_other_from_being_written() {
        let written = std::cell::Cell::new(0);
        let writes = (0..100).map(|n| {
            let written = &written;
            async move {
                tokio::task::yield_now().await;
                written.set(written.get() + 1);
                n != 0
            }
        });
        assert!(!all_of(writes).await);
        assert_eq!(written.get(), 100);
    }
}
