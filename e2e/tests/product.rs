//! The product on one control plane, a namespace per test: what holds when parts are stopped, restarted or bypassed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tgb_e2e::{Aws, Cluster, Options, Product, Settings, eventually};

const SOON: Duration = Duration::from_secs(30);

struct Stage {
    cluster: Cluster,
    aws: Aws,
}

/// One for all tests of this file; its processes end with this process.
static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let cluster = Cluster::start(Options::default()).unwrap();
    let aws = Aws::awsim().unwrap();
    cluster.nodes(&aws.nodes()).unwrap();
    Product::start(&cluster, &aws, &Settings::default()).unwrap();
    Stage { cluster, aws }
});
/// Tests that stop the webhook or the controller run alone.
static ALONE: Mutex<()> = Mutex::new(());

impl Stage {
    /// A namespace with a Deployment `web` behind a Service `web`, and a target group of the same name that a load
    /// balancer serves. Gives the target group's ARN.
    fn shop(&self, namespace: &str, labels: &str, replicas: u32) -> String {
        self.cluster.namespace(namespace).unwrap();
        if !labels.is_empty() {
            self.cluster.kubectl(&["label", "namespace", namespace, labels]).ok().unwrap();
        }
        let aws = |args: &[&str]| self.aws.cli(&self.cluster, args).ok().unwrap().trim().to_owned();
        let lab = self.aws.lab();
        let mut make =
            vec!["elbv2", "create-load-balancer", "--name", namespace, "--security-groups", &lab.lb_group];
        make.extend(["--query", "LoadBalancers[0].LoadBalancerArn", "--output", "text", "--subnets"]);
        make.extend(lab.subnets.iter().map(String::as_str));
        let balancer = aws(&make);
        let query = ["--query", "TargetGroups[0].TargetGroupArn", "--output", "text"];
        let mut make =
            vec!["elbv2", "create-target-group", "--name", namespace, "--protocol", "HTTP", "--port", "80"];
        make.extend(["--target-type", "ip", "--vpc-id", &lab.vpc]);
        make.extend(query);
        let arn = aws(&make);
        let forward = format!("Type=forward,TargetGroupArn={arn}");
        let listener = ["--protocol", "HTTP", "--port", "80", "--default-actions", &forward];
        aws(&[&["elbv2", "create-listener", "--load-balancer-arn", &balancer], listener.as_slice()].concat());
        self.apply(
            namespace,
            &json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                "spec": {"ports": [{"name": "http", "port": 80}], "selector": {"app": "web"}},
            }),
        );
        self.deploy(namespace, replicas);
        arn
    }

    fn deploy(&self, namespace: &str, replicas: u32) {
        self.apply(namespace, &json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": "web", "ports": [{"containerPort": 80}]}]},
            }},
        }));
    }

    fn apply(&self, namespace: &str, object: &Value) {
        self.cluster.kubectl_with(&["apply", "-n", namespace, "-f", "-"], &object.to_string()).ok().unwrap();
    }

    /// The registered addresses that are not draining.
    fn targets(&self, arn: &str) -> Vec<String> {
        let query = "TargetHealthDescriptions[?TargetHealth.State!='draining'].Target.Id";
        let args = [
            "elbv2",
            "describe-target-health",
            "--target-group-arn",
            arn,
            "--query",
            query,
            "--output",
            "json",
        ];
        serde_json::from_value(self.aws.cli(&self.cluster, &args).json().unwrap()).unwrap()
    }

    fn until_targets(&self, namespace: &str, arn: &str, count: usize) -> Vec<String> {
        eventually(SOON, || match self.targets(arn) {
            targets if targets.len() == count => Ok(targets),
            targets => Err(targets),
        })
        .unwrap_or_else(|error| {
            let processes = ["tgb-webhook", "tgb-controller"];
            panic!(
                "{count} targets: {error}\n{}\n{}",
                self.aws.journal(),
                self.cluster.report(namespace, &processes)
            )
        })
    }
}

fn binding(arn: &str) -> Value {
    json!({
        "apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroup": {"arn": arn}, "serviceRef": {"name": "web"}},
    })
}

#[test]
fn a_stopped_webhook_holds_up_no_clean_up_and_nobody_else() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = &*STAGE;
    let arn = stage.shop("stopped", "", 1);
    stage.apply("stopped", &binding(&arn));
    stage.until_targets("stopped", &arn, 1);
    let kubectl = |args: &[&str]| stage.cluster.kubectl(&[&["-n", "stopped"], args].concat());
    stage.cluster.processes().kill("tgb-webhook").unwrap();
    kubectl(&["label", "tgb", "web", "team=a"]).ok().unwrap();
    kubectl(&["annotate", "tgb", "web", "note=b"]).ok().unwrap();
    let spec = r#"{"spec": {"serviceRef": {"port": "http"}}}"#;
    kubectl(&["patch", "tgb", "web", "--type=merge", "-p", spec]).refused().unwrap();
    kubectl(&["scale", "deployment", "web", "--replicas=2"]).ok().unwrap();
    stage.until_targets("stopped", &arn, 2);
    kubectl(&["delete", "tgb", "web", "--timeout=30s"]).ok().unwrap();
    stage.cluster.processes().restart("tgb-webhook").unwrap();
    stage.until_targets("stopped", &arn, 0);
    let again = || {
        stage.cluster.kubectl_with(&["apply", "-n", "stopped", "-f", "-"], &binding(&arn).to_string()).ok()
    };
    eventually(SOON, again).unwrap();
}

#[test]
fn what_changed_while_the_controller_was_away_is_made_good_at_its_start() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = &*STAGE;
    let arn = stage.shop("away", "", 2);
    stage.apply("away", &binding(&arn));
    let targets = stage.until_targets("away", &arn, 2);
    stage.cluster.processes().kill("tgb-controller").unwrap();
    let id = format!("Id={},Port=80", targets[0]);
    let stranger = "Id=10.244.200.200,Port=80";
    let change = |action: &str, target: &str| {
        stage
            .aws
            .cli(&stage.cluster, &["elbv2", action, "--target-group-arn", &arn, "--targets", target])
            .ok()
            .unwrap();
    };
    change("deregister-targets", &id);
    change("register-targets", stranger);
    stage.cluster.processes().restart("tgb-controller").unwrap();
    let wanted: BTreeSet<String> = targets.into_iter().collect();
    eventually(SOON, || {
        let now: BTreeSet<String> = stage.targets(&arn).into_iter().collect();
        if now == wanted { Ok(()) } else { Err(now) }
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", stage.cluster.report("away", &["tgb-controller"])));
}

#[test]
fn pods_of_a_labelled_namespace_are_ready_only_when_their_target_is_healthy() {
    let stage = &*STAGE;
    let arn = stage.shop("gated", "elbv2.k8s.aws/pod-readiness-gate-inject=enabled", 0);
    stage.apply("gated", &binding(&arn));
    let kubectl = |args: &[&str]| stage.cluster.kubectl(&[&["-n", "gated"], args].concat());
    eventually(SOON, || {
        stage.deploy("gated", 2);
        let pods = kubectl(&["get", "pods", "-l", "app=web", "-o", "json"]).json().unwrap();
        let gate = json!([{"conditionType": "target-health.elbv2.k8s.aws/web"}]);
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let gated = pods.iter().all(|pod| pod["spec"]["readinessGates"] == gate);
        if pods.len() == 2 && gated { Ok(()) } else { Err(format!("{} pods, gated: {gated}", pods.len())) }
    })
    .unwrap();
    kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])
        .ok()
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.cluster.report("gated", &["tgb-controller"])));
    stage.until_targets("gated", &arn, 2);
}

#[test]
fn everything_that_is_wrong_with_a_manifest_is_said_at_once_in_its_own_version() {
    let stage = &*STAGE;
    let arn = stage.shop("wrong", "", 0);
    let manifest = json!({
        "apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {
            "targetGroupARN": arn, "ipAddressType": "ipv6", "serviceRef": {"name": "web", "port": 8080},
            "networking": {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/40"}}], "ports": [{"port": 80}]}]},
        },
    });
    let said = stage
        .cluster
        .kubectl_with(&["apply", "-n", "wrong", "-f", "-"], &manifest.to_string())
        .refused()
        .unwrap();
    for part in ["spec.ipAddressType", "TGB112", "TGB204", "it has 80 (http)", "TGB303", "cidr"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

#[test]
fn an_edit_in_the_oldest_version_keeps_what_that_version_cannot_say() {
    let stage = &*STAGE;
    let arn = stage.shop("oldest", "", 0);
    stage.apply("oldest", &binding(&arn));
    let old = "targetgroupbindings.v1alpha1.elbv2.k8s.aws";
    let kubectl =
        |args: &[&str], input: &str| stage.cluster.kubectl_with(&[&["-n", "oldest"], args].concat(), input);
    // As a person would: if the controller wrote meanwhile, read, edit and write again.
    eventually(SOON, || {
        let mut object = kubectl(&["get", old, "web", "-o", "json"], "").json()?;
        assert_eq!(object["spec"].get("vpcID"), None);
        object["spec"]["serviceRef"]["port"] = json!("http");
        kubectl(&["replace", "-f", "-"], &object.to_string()).ok()
    })
    .unwrap();
    let new =
        kubectl(&["get", "targetgroupbindings.v1.elbv2.k8s.aws", "web", "-o", "json"], "").json().unwrap();
    assert_eq!(new["spec"]["serviceRef"]["port"], "http");
    assert_eq!(new["spec"]["targetGroup"]["vpcID"], stage.aws.lab().vpc.as_str());
    assert_eq!(new["spec"]["targetGroup"]["protocol"], "HTTP");
    assert_eq!(new["metadata"]["annotations"].get("elbv2.k8s.aws/conversion-data"), None);
}

#[test]
fn storage_goes_to_the_old_version_and_back_and_loses_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = &*STAGE;
    let arn = stage.shop("stored", "", 0);
    stage.apply("stored", &binding(&arn));
    let kubectl = |args: &[&str]| stage.cluster.kubectl(args);
    let spec =
        || kubectl(&["get", "tgb", "-n", "stored", "web", "-o", "json"]).json().unwrap()["spec"].clone();
    let crd = || kubectl(&["get", "crd", "targetgroupbindings.elbv2.k8s.aws", "-o", "json"]).json().unwrap();
    let before = spec();
    let programs = std::env::current_exe().unwrap();
    let controller = programs.ancestors().nth(2).unwrap().join("tgb-controller");
    for version in ["v1beta1", "v1"] {
        let versions = crd()["spec"]["versions"].as_array().cloned().unwrap();
        let patch: Vec<Value> = (versions.iter().enumerate())
            .map(|(n, v)| json!({"op": "replace", "path": format!("/spec/versions/{n}/storage"), "value": v["name"] == version}))
            .collect();
        let patch = Value::Array(patch).to_string();
        kubectl(&["patch", "crd", "targetgroupbindings.elbv2.k8s.aws", "--type=json", "-p", &patch])
            .ok()
            .unwrap();
        assert_eq!(crd()["status"]["storedVersions"].as_array().map(Vec::len), Some(2));
        let mut migrate = std::process::Command::new(&controller);
        migrate.arg("migrate-storage").arg("--kubeconfig").arg(stage.cluster.kubeconfig());
        let counted = migrate.arg("--dry-run").output().unwrap();
        assert!(
            counted.status.success() && crd()["status"]["storedVersions"].as_array().map(Vec::len) == Some(2)
        );
        let mut migrate = std::process::Command::new(&controller);
        migrate.arg("migrate-storage").arg("--kubeconfig").arg(stage.cluster.kubeconfig());
        let migrated = migrate.output().unwrap();
        assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
        assert_eq!(crd()["status"]["storedVersions"], json!([version]));
        assert_eq!(spec(), before);
    }
}
