//! What users and operators meet, each in a namespace and an account of its own on one control plane with awsim.
#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use awsim::{Effect, Fault};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;
use tgb_e2e::{Space, World, eventually};

const SOON: Duration = Duration::from_secs(60);

fn space(name: &str) -> Space<'static> {
    World::shared().unwrap().space(name).unwrap()
}

#[test]
fn a_bare_arn_and_a_service_name_are_enough_and_pods_come_and_go() {
    let space = space("bare");
    let arn = space.shop(2).unwrap();
    space.kubectl("scale deployment web --replicas=5").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 5).unwrap();
    space.kubectl("scale deployment web --replicas=1").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
}

#[test]
fn a_target_group_has_one_binding() {
    let space = space("single");
    let arn = space.shop(1).unwrap();
    let second = json!({"serviceRef": {"name": "web"}});
    let message =
        eventually(SOON, || space.apply(&space.binding("second", &arn, &second)).refused()).unwrap();
    assert!(message.contains("TGB115") && message.contains("single/web"), "{message}");
}

#[test]
fn all_versions_show_the_same_binding() {
    let space = space("versions");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    let old = json!({
        "apiVersion": "elbv2.k8s.aws/v1alpha1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 80}},
    });
    space.apply(&old).ok().unwrap();
    for (version, path) in
        [("v1", "targetGroup.arn"), ("v1beta1", "targetGroupARN"), ("v1alpha1", "targetGroupARN")]
    {
        let line =
            format!("get targetgroupbindings.{version}.elbv2.k8s.aws web -o jsonpath={{.spec.{path}}}");
        assert_eq!(space.kubectl(&line).ok().unwrap(), arn, "{version}");
    }
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
}

#[test]
fn a_crash_of_the_controller_and_a_change_meanwhile_end_in_the_right_targets() {
    let space = space("crash");
    let arn = space.shop(1).unwrap();
    space.controller().kill().unwrap();
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    space.controller().restart().unwrap();
    // its own lease has to run out first
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
}

#[test]
fn a_deleted_binding_leaves_an_empty_target_group() {
    let space = space("deleted");
    let arn = space.shop(2).unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), BTreeSet::new());
    space.call("DescribeTargetGroups", &[("TargetGroupArns.member.1", &arn)]).unwrap();
}

#[test]
fn nodes_are_targets_on_the_node_port() {
    let space = space("instances");
    space.deploy("web", 2).unwrap();
    let port = space.node_port("web").unwrap();
    let arn = space.served_target_group("HTTP", port, "instance").unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let instances = &space.aws().lab().instances;
    space.until_targets(&arn, &instances.iter().map(|(id, ..)| format!("{id}:{port}")).collect()).unwrap();
}

#[test]
fn a_registration_whose_answer_is_lost_is_made_good() {
    let space = space("lost");
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    space.fault(Fault::new(Effect::LostResponse).action("RegisterTargets").times(1)).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    let lost = space.calls().iter().filter(|call| call.code.as_deref() == Some("LostResponse")).count();
    assert_eq!(lost, 1);
}

#[test]
fn a_webhook_that_is_cut_off_or_hangs_refuses_a_new_spec_and_nothing_else() {
    let world = World::shared().unwrap();
    let space = world.prepare("cut").value("webhook.bindings.timeoutSeconds=2").start().unwrap();
    let arn = space.shop(1).unwrap();
    let link = space.webhook().link().unwrap();
    let by_name = json!({"serviceRef": {"name": "web", "port": "http"}});
    let is_refused = |said: &str| {
        let message = space.bind("web", &arn, &by_name).unwrap_err();
        assert!(message.contains(said), "{message}");
        space.kubectl("annotate tgb web note=a --overwrite").ok().unwrap();
    };
    link.cut();
    is_refused("failed calling webhook");
    link.hold();
    is_refused("deadline exceeded");
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    link.slow(Duration::from_millis(200));
    eventually(SOON, || space.bind("web", &arn, &by_name)).unwrap();
}

/// `TGB_SEEDS=N` for more than one schedule.
#[test]
fn whatever_aws_does_for_a_while_the_right_targets_are_there_afterwards() {
    let seeds = std::env::var("TGB_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let space = space("chaos");
    let arn = space.shop(2).unwrap();
    space.attribute(&arn, "deregistration_delay.timeout_seconds", "1").unwrap();
    for seed in 1..=seeds {
        let length = Duration::from_secs(8);
        for fault in Fault::schedule(seed, space.aws().account(), 12, length) {
            space.fault(fault).unwrap();
        }
        // One that certainly meets a call.
        space.fault(Fault::new(Effect::Unavailable).action("RegisterTargets").times(1)).unwrap();
        let account = space.aws().account();
        let end = space.server().unwrap().now(account) + 8_000;
        let mut replicas = 2;
        while space.server().unwrap().now(account) < end {
            replicas = replicas % 5 + 1;
            space.kubectl(&format!("scale deployment web --replicas={replicas}")).ok().unwrap();
        }
        space
            .until_pods_are_targets(&arn, "web", replicas)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let failed = space.calls().iter().filter(|call| call.code.is_some()).count();
        assert!(failed > 0, "seed {seed}: no call failed");
    }
}
