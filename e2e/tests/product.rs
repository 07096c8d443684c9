//! What holds when parts of the product are stopped, restarted or bypassed, each test in a space of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use serde_json::{Value, json};
use std::time::Duration;
use tgb_e2e::{Space, World, eventually, run_program};

const SOON: Duration = Duration::from_secs(60);

fn space(name: &str) -> Space<'static> {
    World::shared().unwrap().space(name).unwrap()
}

#[test]
fn a_stopped_webhook_holds_up_no_clean_up_and_nobody_else() {
    let space = space("stopped");
    let arn = space.shop(1).unwrap();
    space.webhook().kill().unwrap();
    space.kubectl("label tgb web team=a").ok().unwrap();
    space.kubectl("annotate tgb web note=b").ok().unwrap();
    let spec = r#"{"spec": {"serviceRef": {"port": "http"}}}"#;
    space.kubectl_with(&["patch", "tgb", "web", "--type=merge", "-p", spec], "").undecided().unwrap();
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    space.webhook().restart().unwrap();
    space.until_targets(&arn, &[].into()).unwrap();
    eventually(SOON, || space.bind("web", &arn, &json!({}))).unwrap();
}

#[test]
fn what_changed_while_the_controller_was_away_is_made_good_at_its_start() {
    let space = space("away");
    let arn = space.shop(2).unwrap();
    let wanted = space.targets(&arn).unwrap();
    space.controller().kill().unwrap();
    space.change_target("DeregisterTargets", &arn, wanted.first().unwrap()).unwrap();
    space.change_target("RegisterTargets", &arn, "10.244.1.200:8080").unwrap();
    space.controller().restart().unwrap();
    space.until_targets(&arn, &wanted).unwrap();
}

#[test]
fn pods_of_a_labelled_namespace_are_ready_only_when_their_target_is_healthy() {
    let space = World::shared().unwrap().prepare("gated").with_readiness_gates().start().unwrap();
    let arn = space.shop(0).unwrap();
    eventually(SOON, || {
        space.deploy("web", 2)?;
        let pods = space.kubectl("get pods -l app=web -o json").json()?;
        let gate = json!([{"conditionType": "target-health.elbv2.k8s.aws/web"}]);
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let gated = pods.iter().all(|pod| pod["spec"]["readinessGates"] == gate);
        if pods.len() == 2 && gated { Ok(()) } else { Err(format!("{} pods, gated: {gated}", pods.len())) }
    })
    .unwrap();
    space.kubectl("rollout status deployment/web --timeout=60s").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    assert!(space.health(&arn).unwrap().iter().all(|target| target.state == "healthy"));
}

#[test]
fn everything_that_is_wrong_with_a_manifest_is_said_at_once_in_its_own_version() {
    let space = space("wrong");
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 0).unwrap();
    let manifest = json!({
        "apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {
            "targetGroupARN": arn, "ipAddressType": "ipv6", "serviceRef": {"name": "web", "port": 8080},
            "networking": {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/40"}}], "ports": [{"port": 80}]}]},
        },
    });
    let said = space.apply(&manifest).refused().unwrap();
    for part in ["spec.ipAddressType", "TGB112", "TGB204", "it has 80 (http)", "TGB303", "cidr"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

#[test]
fn the_oldest_version_says_all_and_an_edit_of_its_annotations_writes_neither_spec_nor_status() {
    let space = space("oldest");
    let arn = space.shop(0).unwrap();
    let status = |version: &str| {
        let object = space.kubectl(&format!("get targetgroupbindings.{version}.elbv2.k8s.aws web -o json"));
        object.json().unwrap()["status"].clone()
    };
    // As a person would: if the controller wrote meanwhile, read, edit and write again.
    eventually(SOON, || {
        let mut object =
            space.kubectl("get targetgroupbindings.v1alpha1.elbv2.k8s.aws web -o json").json()?;
        assert_eq!(object["spec"]["vpcID"], space.aws().lab().vpc.as_str());
        assert_eq!(object["status"]["targetGroupARN"], arn.as_str());
        object["spec"]["serviceRef"]["port"] = json!("http");
        object["status"]["targetGroupARN"] = json!("arn:of:another");
        let kept = json!({"for": [arn, null, "ip"], "spec": {"vpcID": "vpc-00000000"},
            "status": {"targetGroupARN": "arn:of:another"}});
        object["metadata"]["annotations"]["elbv2.k8s.aws/conversion-data"] = kept.to_string().into();
        space.kubectl_with(&["replace", "-f", "-"], &object.to_string()).ok()
    })
    .unwrap();
    let new = space.kubectl("get targetgroupbindings.v1.elbv2.k8s.aws web -o json").json().unwrap();
    assert_eq!(new["spec"]["serviceRef"]["port"], "http");
    assert_eq!(new["spec"]["targetGroup"]["vpcID"], space.aws().lab().vpc.as_str());
    assert_eq!(new["spec"]["targetGroup"]["protocol"], "HTTP");
    for version in ["v1", "v1beta1", "v1alpha1"] {
        assert_eq!(status(version)["targetGroupARN"], arn.as_str(), "{version}");
    }
}

#[test]
fn storage_goes_to_the_old_version_and_back_and_loses_nothing() {
    let space = space("stored");
    space.shop(0).unwrap();
    let spec = || space.kubectl("get tgb web -o json").json().unwrap()["spec"].clone();
    let crd = || space.kubectl("get crd targetgroupbindings.elbv2.k8s.aws -o json").json().unwrap();
    let stored = || crd()["status"]["storedVersions"].clone();
    let kubeconfig = format!("--kubeconfig={}", space.cluster().kubeconfig().display());
    let migrate = |more: &[&str]| {
        let args = [&["migrate-storage", &kubeconfig], more].concat();
        run_program("tgb-controller", &args, "").ok().unwrap();
    };
    let before = spec();
    for version in ["v1beta1", "v1"] {
        let versions = crd()["spec"]["versions"].as_array().cloned().unwrap();
        let patch: Vec<Value> = (versions.iter().enumerate())
            .map(|(n, v)| json!({"op": "replace", "path": format!("/spec/versions/{n}/storage"), "value": v["name"] == version}))
            .collect();
        let patch = Value::Array(patch).to_string();
        let args = ["patch", "crd", "targetgroupbindings.elbv2.k8s.aws", "--type=json", "-p", &patch];
        space.kubectl_with(&args, "").ok().unwrap();
        assert_eq!(stored().as_array().map(Vec::len), Some(2));
        migrate(&["--dry-run"]);
        assert_eq!(stored().as_array().map(Vec::len), Some(2));
        migrate(&[]);
        assert_eq!(stored(), json!([version]));
        assert_eq!(spec(), before);
    }
}
