//! What users and operators meet, each in a namespace of its own on one control plane with awsim.
#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeSet;
use std::time::Duration;
use tgb_e2e::{Space, World, eventually};

const SOON: Duration = Duration::from_secs(30);

fn space(name: &str) -> Space<'static> {
    World::shared().unwrap().space(name).unwrap()
}

/// Waits until the target group holds the pods of `web`, `count` of them.
fn holds(space: &Space<'_>, arn: &str, count: usize) {
    eventually(SOON, || {
        let (there, pods) = (space.targets(arn)?, space.pods("web", 8080)?);
        if there == pods && pods.len() == count { Ok(()) } else { Err(format!("{there:?}, pods {pods:?}")) }
    })
    .unwrap();
}

fn binding(arn: &str) -> String {
    format!(
        "{{apiVersion: elbv2.k8s.aws/v1, kind: TargetGroupBinding, metadata: {{name: web}}, \
         spec: {{targetGroup: {{arn: '{arn}'}}, serviceRef: {{name: web}}}}}}"
    )
}

#[test]
fn a_bare_arn_and_a_service_name_are_enough_and_pods_come_and_go() {
    let space = space("bare");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    space.apply(&binding(&arn)).ok().unwrap();
    holds(&space, &arn, 2);
    space.kubectl("scale deployment web --replicas=5").ok().unwrap();
    holds(&space, &arn, 5);
    space.kubectl("scale deployment web --replicas=1").ok().unwrap();
    holds(&space, &arn, 1);
}

#[test]
fn a_target_group_has_one_binding() {
    let space = space("single");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    space.apply(&binding(&arn)).ok().unwrap();
    let second = binding(&arn).replace("{name: web}, spec", "{name: second}, spec");
    let message = eventually(SOON, || space.apply(&second).refused()).unwrap();
    assert!(message.contains("TGB115") && message.contains("single/web"), "{message}");
}

#[test]
fn all_versions_show_the_same_binding() {
    let space = space("versions");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    let old = format!(
        "{{apiVersion: elbv2.k8s.aws/v1alpha1, kind: TargetGroupBinding, metadata: {{name: web}}, \
         spec: {{targetGroupARN: '{arn}', serviceRef: {{name: web, port: 80}}}}}}"
    );
    space.apply(&old).ok().unwrap();
    for (version, path) in
        [("v1", "targetGroup.arn"), ("v1beta1", "targetGroupARN"), ("v1alpha1", "targetGroupARN")]
    {
        let line =
            format!("get targetgroupbindings.{version}.elbv2.k8s.aws web -o jsonpath={{.spec.{path}}}");
        assert_eq!(space.kubectl(&line).ok().unwrap(), arn, "{version}");
    }
    holds(&space, &arn, 1);
}

#[test]
fn a_crash_of_the_controller_and_a_change_meanwhile_end_in_the_right_targets() {
    let world = World::shared().unwrap();
    let space = space("crash");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    space.apply(&binding(&arn)).ok().unwrap();
    holds(&space, &arn, 1);
    world.cluster.processes().kill("tgb-controller").unwrap();
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    world.cluster.processes().restart("tgb-controller").unwrap();
    // its own lease has to run out first
    eventually(Duration::from_secs(60), || {
        let there = space.targets(&arn)?;
        if there.len() == 3 { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
    holds(&space, &arn, 3);
}

#[test]
fn a_deleted_binding_leaves_an_empty_target_group() {
    let space = space("deleted");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    space.apply(&binding(&arn)).ok().unwrap();
    holds(&space, &arn, 2);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), BTreeSet::new());
    space.aws(&format!("elbv2 describe-target-groups --target-group-arns {arn}")).ok().unwrap();
}
