//! The chart and the pages about it, as a new user meets them: helm and kubectl on a real control plane.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "these are tests"
)]

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_e2e::runbook::{Block, Desk, page};
use tgb_e2e::{Aws, Cluster, Options, eventually};

const SOON: Duration = Duration::from_secs(60);
const CRD: &str = "targetgroupbindings.elbv2.k8s.aws";
const FINALIZER: &str = "elbv2.k8s.aws/resources";

struct Stage {
    cluster: Cluster,
    aws: Aws,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let cluster = Cluster::start(Options { reachable: true, audit: true, ..Options::default() }).unwrap();
    let aws = Aws::awsim().unwrap();
    cluster.nodes(&aws.nodes()).unwrap();
    Stage { cluster, aws }
});
/// There is one CustomResourceDefinition: these tests run one after another.
static ALONE: Mutex<()> = Mutex::new(());

/// The stage for one test, swept.
fn stage() -> (&'static Stage, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = &*STAGE;
    for release in ["tgb -n tgb-system", "aws-load-balancer-controller -n kube-system"] {
        let line = format!("uninstall {release} --no-hooks --ignore-not-found");
        stage.cluster.helm(&line.split(' ').collect::<Vec<_>>()).ok().unwrap();
    }
    let kubectl = |args: &[&str]| stage.cluster.kubectl(args);
    if kubectl(&["get", "crd", CRD]).code == 0 {
        // What a failed test may have left: no converter is there to ask, so every version but the stored one goes.
        let mut crd = stage.crd();
        let stored = stage.stored();
        for version in crd["spec"]["versions"].as_array_mut().unwrap() {
            version["served"] = json!(version["name"] == stored.as_str());
        }
        crd["spec"]["conversion"] = json!({"strategy": "None"});
        stage.cluster.kubectl_with(&["replace", "-f", "-"], &crd.to_string()).ok().unwrap();
        // kubectl remembers for hours which versions there are, so it is told.
        let kind = format!("targetgroupbindings.{stored}.elbv2.k8s.aws");
        for object in eventually(SOON, || stage.bindings()).unwrap() {
            let (namespace, name) = (&object["metadata"]["namespace"], &object["metadata"]["name"]);
            let patch = r#"{"metadata": {"finalizers": null}}"#;
            let args = ["-n", namespace.as_str().unwrap(), "patch", &kind, name.as_str().unwrap()];
            kubectl(&[&args[..], &["--type=merge", "-p", patch]].concat()).ok().unwrap();
        }
        kubectl(&["delete", "crd", CRD, "--timeout=60s"]).ok().unwrap();
    }
    kubectl(&["delete", "namespace", "tgb-system", "shop", "--ignore-not-found", "--timeout=60s"])
        .ok()
        .unwrap();
    (stage, alone)
}

impl Stage {
    fn crd(&self) -> Value {
        self.cluster.kubectl(&["get", "crd", CRD, "-o", "json"]).json().unwrap()
    }

    fn stored(&self) -> String {
        let crd = self.crd();
        let versions = crd["spec"]["versions"].as_array().unwrap();
        versions.iter().find(|v| v["storage"] == true).unwrap()["name"].as_str().unwrap().to_owned()
    }

    fn bindings(&self) -> tgb_e2e::Result<Vec<Value>> {
        let kind = format!("targetgroupbindings.{}.elbv2.k8s.aws", self.stored());
        let list = self.cluster.kubectl(&["get", &kind, "-A", "-o", "json"]).json()?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// A namespace `shop` with Deployments and Services `web-0`, `web-1`, … of two pods each and a target group for each.
    fn shop(&self, test: &str, count: usize) -> Vec<String> {
        self.cluster.namespace("shop", &BTreeMap::new()).unwrap();
        let arns = (0..count)
            .map(|n| {
                let name = format!("web-{n}");
                let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
                    {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                     "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]}},
                    {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
                     "spec": {"replicas": 2, "selector": {"matchLabels": {"app": name}}, "template": {
                        "metadata": {"labels": {"app": name}},
                        "spec": {"containers": [{"name": "web", "image": "web"}]}}}},
                ]});
                self.cluster
                    .kubectl_with(&["-n", "shop", "apply", "-f", "-"], &objects.to_string())
                    .ok()
                    .unwrap();
                let line = format!(
                    "elbv2 create-target-group --name {name}-{test} --protocol HTTP --port 80 --target-type ip \
                    --vpc-id {} --query TargetGroups[0].TargetGroupArn --output text",
                    self.aws.lab().vpc
                );
                self.aws(&line).trim().to_owned()
            })
            .collect();
        self.cluster
            .kubectl(&[
                "-n",
                "shop",
                "wait",
                "--for=condition=Available",
                "deployments",
                "--all",
                "--timeout=60s",
            ])
            .ok()
            .unwrap();
        arns
    }

    fn aws(&self, line: &str) -> String {
        self.aws.cli(&self.cluster, &line.split_whitespace().collect::<Vec<_>>()).ok().unwrap()
    }

    fn targets(&self, arn: &str) -> BTreeSet<String> {
        let query = "TargetHealthDescriptions[?TargetHealth.State!='draining'].Target.Id";
        let line =
            format!("elbv2 describe-target-health --target-group-arn {arn} --query {query} --output text");
        self.aws(&line).split_whitespace().map(str::to_owned).collect()
    }

    fn pods(&self, name: &str) -> BTreeSet<String> {
        let args = [
            "-n",
            "shop",
            "get",
            "pods",
            "-l",
            &format!("app={name}"),
            "-o",
            "jsonpath={.items[*].status.podIP}",
        ];
        self.cluster.kubectl(&args).ok().unwrap().split_whitespace().map(str::to_owned).collect()
    }

    /// How often our programs have made this call of AWS since the start.
    fn calls(&self, name: &str) -> usize {
        let call = format!(" PRODUCT {name} ");
        self.aws.journal().lines().filter(|line| line.contains(&call)).count()
    }

    fn report(&self, desk: &Desk<'_>) -> String {
        let report = self
            .cluster
            .report(&["shop".to_owned()], &["desk-webhook", "desk-controller"].map(str::to_owned));
        format!("{}\n{report}", desk.hook_log())
    }
}

/// The blocks below a heading.
fn below<'a>(blocks: &'a [Block], heading: &str) -> Vec<&'a Block> {
    let found: Vec<&Block> = blocks.iter().filter(|block| block.heading == heading).collect();
    assert!(!found.is_empty(), "the page has no commands below {heading}");
    found
}

/// The chart with everything on that there is, for dry runs.
const VARIANTS: [(&str, &str); 6] = [
    ("default", ""),
    (
        "everything",
        "--set networkPolicy.enabled=true,networkPolicy.controlPlaneCIDRs={10.0.0.0/8} \
         --set metrics.podMonitor.enabled=true,metrics.serviceMonitor.enabled=true \
         --set metrics.prometheusRule.enabled=true,metrics.dashboard.enabled=true \
         --set webhook.rules.TGB206=warn,webhook.hostNetwork=true,controller.maxTargetsPerTargetGroup=500 \
         --set sharedTargets.namespaces={shop},watchNamespaces={shop},ruleOwner=a,rbac.aggregateToEdit=true \
         --set logging.otlpEndpoint=http://collector:4318",
    ),
    ("outside", "--set webhook.url=https://192.0.2.1:9443,controller.replicas=0"),
    ("cert-manager", "--set webhook.tls.mode=cert-manager"),
    ("files", "--set webhook.tls.mode=files,webhook.tls.secretName=own"),
    ("beside", "--set controller.enabled=false,crd.storageVersion=v1beta1,sharedTargets.namespaces={*}"),
];

#[test]
fn the_api_server_accepts_every_object_of_the_chart_with_all_its_parts_on() {
    let (stage, _alone) = stage();
    stage.cluster.namespace("tgb-system", &BTreeMap::new()).unwrap();
    stage.cluster.namespace("shop", &BTreeMap::new()).unwrap();
    // A Pod, unlike a Deployment, asks for its account even in a dry run.
    let account = ["-n", "tgb-system", "create", "serviceaccount", "tgb-targetgroupbinding-test"];
    stage.cluster.kubectl(&account).ok().unwrap();
    // Of the operators only the kinds matter: their objects are looked at as unstructured ones.
    for (group, version, kind) in [
        ("monitoring.coreos.com", "v1", "PodMonitor"),
        ("monitoring.coreos.com", "v1", "ServiceMonitor"),
        ("monitoring.coreos.com", "v1", "PrometheusRule"),
        ("cert-manager.io", "v1", "Issuer"),
        ("cert-manager.io", "v1", "Certificate"),
    ] {
        let plural = format!("{}s", kind.to_lowercase());
        let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {"group": group, "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
                "versions": [{"name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}});
        stage.cluster.kubectl_with(&["apply", "-f", "-"], &crd.to_string()).ok().unwrap();
        stage
            .cluster
            .kubectl(&[
                "wait",
                "--for=condition=Established",
                "crd",
                &format!("{plural}.{group}"),
                "--timeout=60s",
            ])
            .ok()
            .unwrap();
    }
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/targetgroupbinding");
    for (name, values) in VARIANTS {
        // As Helm renders it where there is a cluster: with its hooks.
        let cluster = "--api-versions apiregistration.k8s.io/v1/APIService";
        let line = format!("template tgb {chart} -n tgb-system {cluster} --set clusterName=c {values}");
        let rendered = stage.cluster.helm(&line.split_whitespace().collect::<Vec<_>>()).ok().unwrap();
        let args = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        let answer = stage.cluster.kubectl_with(&args, &rendered);
        assert!(answer.code == 0 && answer.stderr.is_empty(), "{name}: {}{}", answer.stdout, answer.stderr);
        assert_eq!(
            answer.stdout.lines().count(),
            rendered.matches("\nkind: ").count(),
            "{name}: {}",
            answer.stdout
        );
    }
}

#[test]
fn restricted_pods_start_helm_test_passes_and_the_release_goes_up_and_back_and_away() {
    let (stage, _alone) = stage();
    let desk = Desk::new(&stage.cluster, &stage.aws).unwrap();
    let type_ = |commands: &str| {
        desk.types(commands).ok().unwrap_or_else(|error| panic!("{error}\n{}", desk.hook_log()))
    };
    stage.cluster.namespace("tgb-system", &BTreeMap::new()).unwrap();
    type_(
        "export INSIDE=1; kubectl label namespace tgb-system pod-security.kubernetes.io/enforce=restricted",
    );
    let chart = "charts/targetgroupbinding --namespace tgb-system --wait --timeout 2m";
    type_(&format!("helm install tgb {chart} --set clusterName=demo"));
    let pods = stage.cluster.kubectl(&["-n", "tgb-system", "get", "pods", "-o", "json"]).json().unwrap();
    assert_eq!(pods["items"].as_array().unwrap().len(), 4, "{pods}");
    // It waited for what answers: the API server asks the Service, and a webhook completes and converts at once.
    let group = "elbv2 create-target-group --name inside --protocol HTTP --port 80 --target-type ip --query \
        TargetGroups[0].TargetGroupArn --output text --vpc-id";
    let arn = stage.aws(&format!("{group} {}", stage.aws.lab().vpc)).trim().to_owned();
    let binding = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "first"},
        "spec": {"targetGroupARN": arn, "serviceRef": {"name": "kubernetes", "port": 443}}});
    let made = ["-n", "default", "create", "--dry-run=server", "-o", "json", "-f", "-"];
    let made = stage.cluster.kubectl_with(&made, &binding.to_string()).json().unwrap();
    assert_eq!(
        (&made["spec"]["targetType"], &made["spec"]["targetGroupProtocol"]),
        (&json!("ip"), &json!("HTTP"))
    );
    let tested = type_("helm test tgb --namespace tgb-system --timeout 2m");
    assert!(tested.contains("Succeeded"), "{tested}");

    let args = |deployment: &str| {
        let path = "jsonpath={.spec.template.spec.containers[0].args}";
        stage
            .cluster
            .kubectl(&["-n", "tgb-system", "get", "deployment", deployment, "-o", path])
            .ok()
            .unwrap()
    };
    let first = args("tgb-targetgroupbinding-controller");
    type_(&format!(
        "helm upgrade tgb {chart} --reuse-values --set controller.resync=20m,crd.storageVersion=v1beta1"
    ));
    assert!(args("tgb-targetgroupbinding-controller").contains("--resync=20m"));
    assert_eq!(stage.stored(), "v1beta1");
    type_("helm rollback tgb 1 --namespace tgb-system --wait --timeout 2m");
    assert_eq!(args("tgb-targetgroupbinding-controller"), first);
    assert_eq!(stage.stored(), "v1");

    type_("helm uninstall tgb --namespace tgb-system --wait --timeout 2m");
    let crd = stage.crd();
    let served = crd["spec"]["versions"].as_array().unwrap().iter().filter(|v| v["served"] == true).count();
    assert_eq!((served, &crd["spec"]["conversion"]["strategy"]), (1, &json!("None")));
    let left = stage.cluster.kubectl(&[
        "get",
        "deployments,services,roles,secrets,serviceaccounts,jobs,pods,poddisruptionbudgets",
        "-n",
        "tgb-system",
        "-o",
        "name",
        "-l",
        "app.kubernetes.io/instance=tgb",
    ]);
    assert_eq!(
        left.ok().unwrap(),
        "secret/tgb-targetgroupbinding-webhook-ca\n",
        "it is kept, as its page says"
    );
    let left = stage.cluster.kubectl(&[
        "get",
        "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,validatingwebhookconfigurations",
        "-o",
        "name",
        "-l",
        "app.kubernetes.io/instance=tgb",
    ]);
    assert_eq!(left.ok().unwrap(), "");
}

#[test]
fn an_uninstall_is_refused_while_bindings_are_held_and_leaves_nothing_behind_as_its_page_says() {
    let (stage, _alone) = stage();
    let desk = Desk::new(&stage.cluster, &stage.aws).unwrap();
    let blocks = page("uninstall.md").unwrap();
    let install = "helm install tgb charts/targetgroupbinding --namespace tgb-system --create-namespace --wait --set clusterName=demo";
    let arns = stage.shop("uninstall", 1);
    let bind = || {
        let object = json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
            "spec": {"targetGroup": {"arn": arns[0]}, "serviceRef": {"name": "web-0"}}});
        eventually(SOON, || {
            stage.cluster.kubectl_with(&["-n", "shop", "apply", "-f", "-"], &object.to_string()).ok()
        })
        .unwrap();
        let pods = stage.pods("web-0");
        eventually(
            SOON,
            || if stage.targets(&arns[0]) == pods { Ok(()) } else { Err(stage.targets(&arns[0])) },
        )
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
        pods
    };
    let follow = |heading: &str| {
        for block in below(&blocks, heading) {
            desk.follow(block).unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
        }
    };
    let needs_no_converter = || {
        let crd = stage.crd();
        let served: Vec<&Value> =
            crd["spec"]["versions"].as_array().unwrap().iter().filter(|v| v["served"] == true).collect();
        assert_eq!((served.len(), &crd["spec"]["conversion"]), (1, &json!({"strategy": "None"})));
        assert_eq!(crd["status"]["storedVersions"], json!(["v1"]));
    };

    desk.types(install).ok().unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    bind();
    let refused = desk.types("helm uninstall tgb --namespace tgb-system --timeout 60s").refused().unwrap();
    assert!(
        desk.hook_log().contains("shop/web") && desk.hook_log().contains("release --all"),
        "{refused}\n{}",
        desk.hook_log()
    );
    assert_eq!(
        stage.crd()["spec"]["conversion"]["strategy"],
        "Webhook",
        "a refused uninstall changes nothing"
    );
    follow("Targets go too");
    needs_no_converter();
    assert_eq!(stage.targets(&arns[0]), BTreeSet::new());
    assert_eq!(stage.bindings().unwrap(), Vec::<Value>::new());

    // The same command as on a new cluster, over the CRD that was kept.
    desk.types(install).ok().unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    let managers =
        stage.cluster.kubectl(&["get", "crd", CRD, "--show-managed-fields", "-o", "json"]).json().unwrap();
    let managers: BTreeSet<String> = managers["metadata"]["managedFields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["manager"].as_str().unwrap().to_owned())
        .collect();
    let known: BTreeSet<String> =
        ["helm", "kube-apiserver", "tgb-controller", "tgb-webhook"].map(str::to_owned).into();
    assert!(managers.is_subset(&known), "{managers:?}");
    let pods = bind();
    let deregistered = stage.calls("DeregisterTargets");
    desk.types(&format!("export NODE_SG={}", stage.aws.lab().node_group)).ok().unwrap();
    follow("Targets stay");
    needs_no_converter();
    assert_eq!((stage.targets(&arns[0]), stage.calls("DeregisterTargets")), (pods, deregistered));
    // A rule as a binding leaves it that was to be retained.
    let rule = "IpProtocol=tcp,FromPort=81,ToPort=81,IpRanges=[{CidrIp=10.9.0.0/16,\
        Description=elbv2.k8s.aws/targetGroupBinding=shared cluster:demo retained:shop/web}]";
    let retained = format!(
        "export NAMESPACE=shop NAME=web; aws ec2 authorize-security-group-ingress --group-id $NODE_SG --ip-permissions '{rule}'"
    );
    desk.types(&retained).ok().unwrap();
    follow("One binding goes, its traffic stays");
    let rules = desk
        .types("aws ec2 describe-security-group-rules --filters Name=group-id,Values=$NODE_SG")
        .ok()
        .unwrap();
    assert!(!rules.contains("retained:shop/web"), "{rules}");
    let kept = stage.bindings().unwrap();
    assert_eq!((kept.len(), kept[0]["metadata"].get("finalizers")), (1, None), "{kept:?}");
    follow("What is left");
    assert_ne!(stage.cluster.kubectl(&["get", "crd", CRD]).code, 0);

    // Helm's hook finds nothing to do where the CRD went first.
    desk.types(install).ok().unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    let gone = "kubectl delete crd targetgroupbindings.elbv2.k8s.aws --timeout=60s
        helm uninstall tgb --namespace tgb-system --timeout 60s";
    desk.types(gone).ok().unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    assert!(desk.hook_log().contains("there is no CustomResourceDefinition"), "{}", desk.hook_log());
    desk.types("kubectl -n tgb-system delete secret tgb-targetgroupbinding-webhook-ca").ok().unwrap();

    // Rendered, and applied by something else: no Job comes along, and nothing happens before somebody says so.
    let rendered =
        "helm template tgb charts/targetgroupbinding --namespace tgb-system --set clusterName=demo";
    let applied = format!("{rendered} | kubectl apply --server-side -f -");
    desk.types(&applied).ok().unwrap();
    stage
        .cluster
        .kubectl(&["wait", "--for=condition=Established", "crd", CRD, "--timeout=30s"])
        .ok()
        .unwrap();
    let jobs = stage.cluster.kubectl(&[
        "get",
        "jobs,pods",
        "-A",
        "-o",
        "name",
        "-l",
        "app.kubernetes.io/component=uninstall",
    ]);
    assert_eq!(jobs.ok().unwrap(), "");
    let before = stage.crd()["spec"].clone();
    let by_accident = "tgb-controller prepare-uninstall --keep-version=v1";
    assert!(desk.types(by_accident).stderr.contains("--yes"), "it asks");
    // What a hook would have said there.
    let hook = "tgb-controller prepare-uninstall --release=tgb-system/tgb --keep-version=v1";
    let said = desk.types(hook);
    assert!(said.code == 0 && said.stderr.contains("no Helm release has installed it"), "{}", said.stderr);
    assert_eq!(stage.crd()["spec"], before);
    follow("Without Helm's hook");
    needs_no_converter();
    desk.types(&format!("{rendered} | kubectl delete --wait=false -f -")).ok().unwrap();
    let followed = [
        "Targets go too",
        "Targets stay",
        "One binding goes, its traffic stays",
        "What is left",
        "Without Helm's hook",
    ];
    for block in &blocks {
        assert!(
            followed.contains(&block.heading.as_str()),
            "nobody runs what stands below {}",
            block.heading
        );
    }
}

#[test]
fn lbc_hands_over_storage_becomes_v1_and_all_goes_back_as_the_page_says() {
    let (stage, _alone) = stage();
    let desk = Desk::new(&stage.cluster, &stage.aws).unwrap();
    let blocks = page("migration.md").unwrap();
    let count = 3;
    let arns = stage.shop("lbc", count);
    let lbc =
        "helm install aws-load-balancer-controller eks/aws-load-balancer-controller --namespace kube-system";
    desk.types(lbc).ok().unwrap();
    stage
        .cluster
        .kubectl(&["wait", "--for=condition=Established", "crd", CRD, "--timeout=60s"])
        .ok()
        .unwrap();
    // As LBC leaves them: complete, with its finalizer, its checkpoint, its status, and its targets registered.
    let specs: Vec<Value> = (0..count)
        .map(|n| json!({"targetGroupARN": arns[n], "targetType": "ip", "ipAddressType": "ipv4", "targetGroupProtocol": "HTTP",
            "vpcID": stage.aws.lab().vpc, "serviceRef": {"name": format!("web-{n}"), "port": 80}}))
        .collect();
    for (n, spec) in specs.iter().enumerate() {
        let name = format!("web-{n}");
        let object = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
            "metadata": {"name": name, "namespace": "shop", "finalizers": [FINALIZER],
                "annotations": {"elbv2.k8s.aws/checkpoint": "x/y", "elbv2.k8s.aws/checkpoint-timestamp": "1"}},
            "spec": spec});
        eventually(SOON, || stage.cluster.kubectl_with(&["create", "-f", "-"], &object.to_string()).ok())
            .unwrap();
        let status = r#"{"status": {"observedGeneration": 1}}"#;
        stage
            .cluster
            .kubectl(&[
                "-n",
                "shop",
                "patch",
                "targetgroupbindings.v1beta1.elbv2.k8s.aws",
                &name,
                "--subresource=status",
                "--type=merge",
                "-p",
                status,
            ])
            .ok()
            .unwrap();
        let targets: String = stage.pods(&name).iter().map(|ip| format!(" Id={ip},Port=80")).collect();
        stage.aws(&format!("elbv2 register-targets --target-group-arn {} --targets{targets}", arns[n]));
    }
    let dir = stage.cluster.dir().join("desk/manifests");
    std::fs::create_dir_all(&dir).unwrap();
    let manifest = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
        "metadata": {"name": "web-0", "namespace": "shop"}, "spec": specs[0]});
    let text = format!("# kept\nkind: ConfigMap\napiVersion: v1\nmetadata: {{name: a}}\n---\n{manifest}\n");
    std::fs::write(dir.join("web.yaml"), &text).unwrap();

    let deregistered = stage.calls("DeregisterTargets");
    let holds = |moment: &str| {
        for (n, arn) in arns.iter().enumerate() {
            assert_eq!(
                stage.targets(arn),
                stage.pods(&format!("web-{n}")),
                "{moment}: {}",
                stage.report(&desk)
            );
        }
        assert_eq!(stage.calls("DeregisterTargets"), deregistered, "{moment}: a target was deregistered");
    };
    let mut followed = BTreeSet::new();
    let mut follow = |heading: &str| {
        followed.insert(heading.to_owned());
        for block in below(&blocks, heading) {
            let mut block = block.clone();
            block.commands = block.commands.replace("manifests/", &format!("{}/", dir.display()));
            desk.follow(&block).unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
        }
        holds(heading);
    };
    let before = stage.bindings().unwrap();
    let registered = stage.calls("RegisterTargets");
    for heading in [
        "From the AWS Load Balancer Controller, and from v1beta1",
        "1. What would be refused",
        "3. Install beside, watching only",
    ] {
        follow(heading);
    }
    assert_eq!(stage.stored(), "v1beta1");
    follow("Back from step 3");
    let crd = stage.crd();
    assert_eq!(crd["spec"]["conversion"], json!({"strategy": "None"}));
    let after = stage.bindings().unwrap();
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(
            (&before["spec"], &before["metadata"]["finalizers"]),
            (&after["spec"], &after["metadata"]["finalizers"])
        );
    }
    follow("3. Install beside, watching only");
    assert_eq!(stage.stored(), "v1beta1");
    assert_eq!(stage.calls("RegisterTargets"), registered, "it only watches: {}", stage.aws.journal());
    // Somebody upgrades LBC's CRD all the same.
    let over =
        "kubectl apply -k github.com/aws/eks-charts/stable/aws-load-balancer-controller/crds?ref=master";
    desk.types(over).ok().unwrap();
    eventually(SOON, || {
        let crd = stage.crd();
        let mut versions = crd["spec"]["versions"].as_array().unwrap().iter();
        let is_back = versions.any(|version| version["name"] == "v1" && version["served"] == true);
        if is_back && crd["spec"]["conversion"]["strategy"] == "Webhook" {
            Ok(())
        } else {
            Err(crd["spec"].clone())
        }
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    let upgrade = "helm upgrade tgb charts/targetgroupbinding -n tgb-system --reuse-values --wait";
    eventually(SOON, || desk.types(upgrade).ok())
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    assert_eq!(stage.stored(), "v1beta1");
    follow("LBC stays for Ingresses and Services");
    follow("4. Look at the plans");
    follow("5. Hand over");
    stage.cluster.kubectl(&["-n", "shop", "scale", "deployment", "web-1", "--replicas=3"]).ok().unwrap();
    eventually(SOON, || match stage.targets(&arns[1]) {
        targets if targets.len() == 3 => Ok(()),
        targets => Err(targets),
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    follow("6. Store v1");
    assert_eq!(stage.crd()["status"]["storedVersions"], json!(["v1"]));
    assert!(stage.bindings().unwrap().iter().all(|b| b["spec"]["targetGroup"]["arn"].is_string()));
    follow("7. Manifests in git");
    let converted = std::fs::read_to_string(dir.join("web.yaml")).unwrap();
    assert!(converted.starts_with("# kept\n") && converted.contains(r#""elbv2.k8s.aws/v1""#), "{converted}");
    follow("8. Refuse");
    follow("Back");
    assert_eq!(stage.stored(), "v1beta1");
    let after = stage.bindings().unwrap();
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before["spec"], after["spec"]);
        assert_eq!(before["metadata"]["annotations"], after["metadata"]["annotations"]);
        assert_eq!(before["metadata"]["finalizers"], after["metadata"]["finalizers"]);
    }
    assert_eq!(before.len(), after.len());
    for block in &blocks {
        assert!(followed.contains(&block.heading), "nobody runs what stands below {}", block.heading);
    }
}

/// EKS, as far as its command line is used by the page: one cluster, and roles for its ServiceAccounts.
struct Eks {
    endpoint: String,
    /// What was asked to be associated.
    associated: std::sync::Arc<Mutex<Vec<Value>>>,
}

impl Eks {
    fn start(vpc: &str, subnets: &[String], server: &str, ca: &str) -> Self {
        use base64::Engine as _;
        use std::io::{BufRead as _, Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let ca = base64::engine::general_purpose::STANDARD.encode(ca);
        let cluster = json!({"cluster": {"name": "my-cluster", "arn": "arn:aws:eks:us-west-2:123456789012:cluster/my-cluster",
            "status": "ACTIVE", "endpoint": server, "certificateAuthority": {"data": ca},
            "resourcesVpcConfig": {"vpcId": vpc, "subnetIds": subnets},
            "identity": {"oidc": {"issuer": "https://oidc.eks.us-west-2.amazonaws.com/id/EXAMPLE"}}}});
        let associated = std::sync::Arc::new(Mutex::new(Vec::new()));
        let asked = std::sync::Arc::clone(&associated);
        // It ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut reader = std::io::BufReader::new(stream);
                let (mut first, mut length) = (String::new(), 0);
                if reader.read_line(&mut first).is_err() {
                    continue;
                }
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line).is_err() || line.trim().is_empty() {
                        break;
                    }
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap_or(0);
                    }
                }
                let mut body = vec![0; length];
                let _ = reader.read_exact(&mut body);
                let (code, answer) = match first.split_whitespace().take(2).collect::<Vec<_>>().as_slice() {
                    ["GET", "/clusters/my-cluster"] => ("200 OK", cluster.clone()),
                    ["POST", "/clusters/my-cluster/pod-identity-associations"] => {
                        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                        asked.lock().unwrap_or_else(PoisonError::into_inner).push(body.clone());
                        ("200 OK", json!({"association": body}))
                    }
                    _ => ("404 Not Found", json!({"message": first})),
                };
                let text = answer.to_string();
                let head = format!(
                    "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    text.len()
                );
                let _ = reader.get_mut().write_all(format!("{head}{text}").as_bytes());
            }
        });
        Self { endpoint, associated }
    }
}

#[test]
fn a_new_cluster_has_its_first_binding_as_the_page_says() {
    let (stage, _alone) = stage();
    let desk = Desk::new(&stage.cluster, &stage.aws).unwrap();
    let blocks = page("install.md").unwrap();
    let lab = stage.aws.lab();
    // IAM and the registry are moto's.
    let moto = Aws::moto(&stage.cluster).unwrap();
    let eks = Eks::start(&lab.vpc, &lab.subnets, stage.cluster.server(), stage.cluster.ca_pem());
    let type_ = |commands: &str| {
        desk.types(commands).ok().unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)))
    };
    type_(&format!(
        "export INSIDE=1 AWS_ENDPOINT_URL_IAM={0} AWS_ENDPOINT_URL_ECR={0} AWS_ENDPOINT_URL_EKS={1} NODE_SG={2} CLUSTER_SG={3}",
        moto.endpoint(),
        eks.endpoint,
        lab.node_group,
        lab.lb_group
    ));
    let follow = |block: &Block| {
        let mut block = block.clone();
        // The region of the account that is there.
        block.commands = block.commands.replace("eu-central-1", "us-west-2");
        desk.follow(&block).unwrap_or_else(|error| panic!("{error}\n{}", stage.report(&desk)));
    };
    let mut left: Vec<&Block> = blocks.iter().collect();
    let mut take = |heading: &str| {
        let (taken, rest): (Vec<&Block>, Vec<&Block>) =
            std::mem::take(&mut left).into_iter().partition(|block| block.heading == heading);
        left = rest;
        assert!(!taken.is_empty(), "the page has no commands below {heading}");
        taken
    };
    take("Install on EKS").into_iter().for_each(follow);
    let kubeconfig = std::fs::read_to_string(stage.cluster.dir().join("desk/eks.kubeconfig")).unwrap();
    assert!(kubeconfig.contains(stage.cluster.server()), "{kubeconfig}");
    take("1. Images").into_iter().for_each(follow);

    let [policies, pod_identity, irsa, roles] = take("2. Permissions in AWS").try_into().unwrap();
    follow(policies);
    let trusted = |role: &str| {
        let line = "aws iam get-role --query Role.AssumeRolePolicyDocument.Statement[0] --role-name";
        serde_json::from_str::<Value>(&type_(&format!("{line} {role}"))).unwrap()
    };
    let attached = |role: &str| {
        let line = "aws iam list-attached-role-policies --query AttachedPolicies[].PolicyName --output text --role-name";
        type_(&format!("{line} {role}")).trim().to_owned()
    };
    follow(irsa);
    for part in ["controller", "webhook"] {
        let role = format!("tgb-{part}");
        assert_eq!(attached(&role), role);
        let subject = format!("system:serviceaccount:tgb-system:tgb-targetgroupbinding-{part}");
        let condition = &trusted(&role)["Condition"]["StringEquals"];
        assert_eq!(condition["oidc.eks.us-west-2.amazonaws.com/id/EXAMPLE:sub"], subject.as_str());
        // The other way is a way of its own.
        type_(&format!(
            "aws iam detach-role-policy --role-name {role} --policy-arn arn:aws:iam::$ACCOUNT:policy/{role}; aws iam delete-role --role-name {role}"
        ));
    }
    follow(roles);
    follow(pod_identity);
    for part in ["controller", "webhook"] {
        let role = format!("tgb-{part}");
        assert_eq!(
            (attached(&role), &trusted(&role)["Principal"]["Service"]),
            (role, &json!("pods.eks.amazonaws.com"))
        );
    }
    let associated = eks.associated.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let accounts: BTreeSet<&str> =
        associated.iter().filter_map(|each| each["serviceAccount"].as_str()).collect();
    assert_eq!(accounts, ["tgb-targetgroupbinding-controller", "tgb-targetgroupbinding-webhook"].into());

    take("3. The way from the control plane to the webhook").into_iter().for_each(follow);
    take("4. The chart").into_iter().for_each(follow);
    // The chart takes the roles of the other way, and its accounts are those that both ways name.
    let rendered = type_(
        "helm template tgb charts/targetgroupbinding --namespace tgb-system --set clusterName=$CLUSTER --values roles.yaml",
    );
    let role = |part: &str| format!("role/tgb-{part}");
    assert!(rendered.contains(&role("controller")) && rendered.contains(&role("webhook")), "{rendered}");
    let account = |part: &str| {
        let path = "jsonpath={.spec.template.spec.serviceAccountName}";
        let name = format!("tgb-targetgroupbinding-{part}");
        stage.cluster.kubectl(&["-n", "tgb-system", "get", "deployment", &name, "-o", path]).ok().unwrap()
    };
    let running: BTreeSet<String> = ["controller", "webhook"].map(account).into();
    assert_eq!(running.iter().map(String::as_str).collect::<BTreeSet<_>>(), accounts);

    take("5. A first binding").into_iter().for_each(follow);
    let bindings = stage.bindings().unwrap();
    let group = &bindings[0]["spec"]["targetGroup"];
    assert_eq!(
        (&group["targetType"], &group["protocol"], &group["vpcID"]),
        (&json!("ip"), &json!("HTTP"), &json!(lab.vpc))
    );
    assert_eq!(bindings[0]["spec"]["serviceRef"]["port"], 80);
    let pods = ["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}"];
    let pods = stage.cluster.kubectl(&pods).ok().unwrap();
    let pods: BTreeSet<String> = pods.split_whitespace().map(str::to_owned).collect();
    assert_eq!((pods.len(), stage.targets(group["arn"].as_str().unwrap())), (2, pods));
    type_("kubectl delete targetgroupbinding/web service/web deployment/web --timeout=60s");
    take("Shared clusters").into_iter().for_each(follow);
    let unread: Vec<&str> = left.iter().map(|block| block.heading.as_str()).collect();
    assert_eq!(unread, [""; 0], "nobody runs what stands below these headings");
}
