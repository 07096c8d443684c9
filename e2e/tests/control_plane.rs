//! The harness itself: what scenarios rely on, and what becomes of the product when parts of the control plane are killed,
//! paused or forget.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_e2e::{Aws, Cluster, Options, Scope, Settings, Setup, World, eventually};

const SOON: Duration = Duration::from_secs(60);

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
    cluster.until_ready().unwrap();
    cluster.kubectl(&["-n", "shop", "delete", "pod", "plain", "--wait", "--timeout=20s"]).ok().unwrap();
}

/// Tests that stop parts of the shared control plane run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills some process, lets AWS and the cluster change, and expects the product to make it good. The controller may have
/// ended meanwhile: a kubelet would start it again.
fn comes_back_after(name: &str, processes: &[&str]) {
    let _alone = alone();
    let space = World::shared().unwrap().space(name).unwrap();
    let arn = space.shop(2).unwrap();
    let target = space.targets(&arn).unwrap().first().cloned().unwrap();
    for process in processes {
        space.cluster().processes().kill(process).unwrap();
    }
    space.change_target("DeregisterTargets", &arn, &target).unwrap();
    for process in processes {
        space.cluster().processes().restart(process).unwrap();
    }
    space.cluster().until_ready().unwrap();
    eventually(SOON, || space.kubectl("scale deployment web --replicas=3").ok()).unwrap();
    eventually(SOON, || {
        space.controller().revive()?;
        let (there, pods) = (space.targets(&arn)?, space.pods("web", 8080)?);
        if there == pods && pods.len() == 3 { Ok(()) } else { Err(format!("{there:?}, pods {pods:?}")) }
    })
    .unwrap();
}

#[test]
fn a_killed_api_server_comes_back_and_the_controller_goes_on() {
    comes_back_after("api-server", &["kube-apiserver"]);
}

#[test]
fn a_killed_etcd_comes_back_and_the_controller_goes_on() {
    comes_back_after("etcd", &["etcd"]);
}

#[test]
fn the_other_parts_of_the_control_plane_come_back_and_pods_become_targets() {
    comes_back_after("others", &["kube-controller-manager", "kube-scheduler", "kwok"]);
}

#[test]
fn while_etcd_is_paused_nothing_is_written_and_afterwards_everything_goes_on() {
    let _alone = alone();
    let space = World::shared().unwrap().space("paused").unwrap();
    let arn = space.shop(2).unwrap();
    let etcd = |what: fn(&tgb_e2e::Processes, &str) -> tgb_e2e::Result<()>| {
        what(space.cluster().processes(), "etcd").unwrap();
    };
    etcd(tgb_e2e::Processes::pause);
    assert_ne!(space.kubectl("scale deployment web --replicas=3 --request-timeout=2s").code, 0);
    etcd(tgb_e2e::Processes::resume);
    eventually(SOON, || space.kubectl("scale deployment web --replicas=4").ok()).unwrap();
    eventually(SOON, || {
        space.controller().revive()?;
        let there = space.targets(&arn)?;
        if there.len() == 4 { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
}

#[test]
fn a_watch_that_expires_by_a_compaction_is_begun_anew_and_misses_nothing() {
    let product = Settings { scope: Scope::Conversion, ..Settings::default() };
    let cluster = Options { uncached_watches: true, ..Options::default() };
    let world = World::start(&Setup { cluster, product: &product, aws: |_| Aws::awsim() }).unwrap();
    let space = world.space("expired").unwrap();
    let arn = space.shop(2).unwrap();
    space.controller().link().unwrap().cut();
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    eventually(SOON, || match space.pods("web", 8080)? {
        pods if pods.len() == 3 => Ok(()),
        pods => Err(format!("{pods:?}")),
    })
    .unwrap();
    world.cluster.compact_etcd().unwrap();
    space.controller().link().unwrap().open();
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
    let log = space.controller().log();
    assert!(log.contains("watch is too old"), "{log}");
}
