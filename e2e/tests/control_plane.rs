//! The harness itself: what scenarios rely on.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::collections::BTreeMap;
use std::time::Duration;
use tgb_e2e::{Aws, Cluster, Options, eventually};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn pods_run_become_ready_and_wait_for_their_readiness_gates() {
    let cluster = Cluster::start(Options { audit: true, ..Options::default() }).unwrap();
    let aws = Aws::moto(&cluster).unwrap();
    cluster.nodes(&aws.nodes()).unwrap();
    cluster.namespace("shop", &BTreeMap::new()).unwrap();
    let pod = |name: &str, gates: &str| {
        let pod = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, \
             spec: {{readinessGates: {gates}, containers: [{{name: web, image: nginx}}]}}}}"
        );
        cluster.kubectl_with(&["-n", "shop", "apply", "-f", "-"], &pod).ok().unwrap();
    };
    pod("plain", "[]");
    pod("gated", "[{conditionType: example.com/gate}]");
    let condition = |pod: &str, kind: &str| {
        let path = format!("jsonpath={{.status.conditions[?(@.type==\"{kind}\")].status}}");
        cluster.kubectl(&["-n", "shop", "get", "pod", pod, "-o", &path]).ok().unwrap()
    };
    let is = |pod: &str, kind: &str, want: &str| {
        eventually(SOON, || {
            let status = condition(pod, kind);
            if status == want { Ok(()) } else { Err(format!("{pod} {kind} is {status:?}, not {want}")) }
        })
        .unwrap();
    };
    is("plain", "Ready", "True");
    is("gated", "ContainersReady", "True");
    assert_eq!(condition("gated", "Ready"), "False");
    assert_eq!(condition("gated", "example.com/gate"), "");

    let gate = |status: &str| {
        let patch =
            format!(r#"{{"status":{{"conditions":[{{"type":"example.com/gate","status":"{status}"}}]}}}}"#);
        let args = ["-n", "shop", "patch", "pod", "gated", "--subresource=status", "-p", &patch];
        cluster.kubectl(&args).ok().unwrap();
    };
    gate("True");
    is("gated", "Ready", "True");
    gate("False");
    is("gated", "Ready", "False");
    cluster.kubectl(&["-n", "shop", "annotate", "pod", "plain", "tgb.e2e/unready=true"]).ok().unwrap();
    is("plain", "Ready", "False");
    cluster.kubectl(&["-n", "shop", "annotate", "pod", "plain", "tgb.e2e/unready-"]).ok().unwrap();
    is("plain", "Ready", "True");

    let instances =
        aws.cli(&cluster, &["ec2", "describe-instances", "--query", "Reservations[].Instances[].InstanceId"]);
    assert_eq!(instances.json().unwrap().as_array().unwrap().len(), 2);

    cluster.processes().restart("kube-apiserver").unwrap();
    eventually(SOON, || cluster.kubectl(&["get", "--raw", "/readyz"]).ok()).unwrap();
    cluster.kubectl(&["-n", "shop", "delete", "pod", "plain", "--wait", "--timeout=20s"]).ok().unwrap();
}
