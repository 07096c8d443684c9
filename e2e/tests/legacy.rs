//! A cluster that has bindings of the AWS Load Balancer Controller from before: its own definition, no rules, anything
//! that its schema takes. Ours comes over it, storage goes to v1 and back, and the API server restarts in between.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tgb_e2e::{Aws, Cluster, Options, Output, Product, Settings, eventually, run_program};

const SOON: Duration = Duration::from_secs(120);
const AT_ONCE: usize = 10;

/// Number of bindings: `TGB_PROVE_OBJECTS`, as `make prove` sets it; a multiple of [`AT_ONCE`].
fn count() -> usize {
    std::env::var("TGB_PROVE_OBJECTS").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

/// What the controller of before ships: two versions, no conversion, no rules of ours.
fn definition() -> Value {
    fn plain(schema: &mut Value) {
        match schema {
            Value::Object(members) => {
                members.retain(|key, _| {
                    !["x-kubernetes-validations", "maxLength", "maxItems", "maxProperties"]
                        .contains(&key.as_str())
                });
                members.values_mut().for_each(plain);
            }
            Value::Array(items) => items.iter_mut().for_each(plain),
            _ => {}
        }
    }
    let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/targetgroupbinding/files/crd.yaml");
    let mut crd: Value = serde_json::from_str(&std::fs::read_to_string(ours).unwrap()).unwrap();
    let versions = crd["spec"]["versions"].as_array_mut().unwrap();
    versions.retain(|version| version["name"] != "v1");
    for version in versions {
        plain(&mut version["schema"]);
        version["storage"] = (version["name"] == "v1beta1").into();
    }
    crd["spec"]["conversion"] = json!({"strategy": "None"});
    crd["spec"]["names"].as_object_mut().unwrap().remove("shortNames");
    // So that helm takes it over.
    crd["metadata"]["labels"] = json!({"app.kubernetes.io/managed-by": "Helm"});
    crd["metadata"]["annotations"] =
        json!({"meta.helm.sh/release-name": "tgb", "meta.helm.sh/release-namespace": "tgb-system"});
    crd
}

/// The release lines of LBC whose manifests are in `lbc/manifests`, and the fields that each added to the definition: to
/// v1beta1 alone, and to both versions. What none of them names was there from the first.
const RELEASES: [(&str, &[&str], &[&str]); 9] = [
    ("2.0", &[], &[]),
    ("2.2", &["nodeSelector"], &[]),
    ("2.4", &["ipAddressType"], &[]),
    ("2.8", &["vpcID"], &[]),
    ("2.10", &[], &["multiClusterTargetGroup"]),
    ("2.11", &[], &["targetGroupName"]),
    ("2.12", &[], &["iamRoleArnToAssume", "assumeRoleExternalId"]),
    ("2.17", &["targetGroupProtocol"], &[]),
    ("3.0", &[], &[]),
];

/// LBC's newest definition as it was in a release line.
fn as_of(newest: &Value, release: usize) -> Value {
    let mut crd = newest.clone();
    for version in crd["spec"]["versions"].as_array_mut().unwrap() {
        let schema = version["schema"]["openAPIV3Schema"]["properties"].as_object_mut().unwrap();
        let spec = schema["spec"].as_object_mut().unwrap();
        let fields = spec["properties"].as_object_mut().unwrap();
        for (_, beta, both) in &RELEASES[release + 1..] {
            beta.iter().chain(*both).for_each(|field| drop(fields.remove(*field)));
        }
        if !fields.contains_key("targetGroupName") {
            spec["required"].as_array_mut().unwrap().push("targetGroupARN".into());
        }
        if release + 1 < RELEASES.len() {
            schema["status"]["properties"].as_object_mut().unwrap().remove("conditions");
        }
    }
    crd["metadata"] = definition()["metadata"].take();
    crd
}

/// A cluster that has been there since LBC's first release: each definition over the one before, and bindings of each
/// release. Gives their number.
fn grow(cluster: &Cluster) -> usize {
    // As JSON, without any look at the cluster.
    let parsed = |path: String| -> Vec<Value> {
        let path = format!("{}/lbc/{path}", env!("CARGO_MANIFEST_DIR"));
        let args = ["-n", "old", "create", "--dry-run=client", "--validate=false", "-o", "json", "-f", &path];
        let said = cluster.kubectl(&args).ok().unwrap();
        serde_json::Deserializer::from_str(&said).into_iter::<Value>().map(Result::unwrap).collect()
    };
    let apply = |crd: &Value| {
        let args = ["apply", "--server-side", "--field-manager=helm", "-f", "-"];
        cluster.kubectl_with(&args, &crd.to_string()).ok().unwrap();
    };
    let newest = parsed("crds/crds.yaml".to_owned()).remove(0);
    let mut count = 0;
    for (n, (release, ..)) in RELEASES.iter().enumerate() {
        apply(&as_of(&newest, n));
        for manifest in parsed(format!("manifests/{release}.yaml")) {
            // A field that is dropped shows that the API server still serves the definition before.
            let create = |more: &[&str]| {
                let args = [&["-n", "old", "create", "-o", "json", "-f", "-"], more].concat();
                let made = cluster.kubectl_with(&args, &manifest.to_string()).json()?;
                if made["spec"] == manifest["spec"] { Ok(()) } else { Err(made.to_string()) }
            };
            eventually(SOON, || create(&["--dry-run=server"])).unwrap();
            create(&[]).unwrap();
            count += 1;
        }
    }
    apply(&definition());
    count
}

/// Specs that its schema takes, good ones and such that no rule would let pass today.
fn specs() -> Vec<Value> {
    let arn = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1ce5b7da835c9ffb";
    let service = json!({"name": "web", "port": 80});
    let peer = json!({"securityGroup": {"groupID": "sg-0123456789abcdef0"}});
    vec![
        json!({"targetGroupARN": arn, "targetType": "instance", "serviceRef": service}),
        json!({"targetGroupARN": arn, "targetType": "ip", "serviceRef": {"name": "web", "port": "http"}, "multiClusterTargetGroup": true,
            "targetGroupProtocol": "TCP", "ipAddressType": "ipv4", "vpcID": "vpc-0123456789abcdef0",
            "networking": {"ingress": [{"from": [peer], "ports": [{"protocol": "TCP", "port": 8080}]}]}}),
        json!({"targetGroupARN": arn, "serviceRef": service, "networking": {"ingress": [{"from": [peer], "ports": null}]}}),
        json!({"targetGroupARN": arn, "targetType": "ip", "serviceRef": service, "nodeSelector": {"matchLabels": {"a": "b"}}}),
        json!({"targetGroupARN": arn, "targetType": "instance", "serviceRef": service, "iamRoleArnToAssume": "admin", "assumeRoleExternalId": "x"}),
        json!({"serviceRef": service}),
        json!({"targetGroupARN": "", "targetGroupName": "", "vpcID": "", "serviceRef": {"name": "", "port": 0}, "multiClusterTargetGroup": false}),
        json!({"targetGroupARN": "nonsense".repeat(50), "targetType": "instance", "serviceRef": {"name": "w".repeat(300), "port": 3_000_000_000_u64}}),
        json!({"targetGroupARN": arn, "targetGroupProtocol": "QUIC", "targetType": "instance", "serviceRef": service, "assumeRoleExternalId": "alone"}),
        json!({"targetGroupARN": arn, "targetType": "instance", "serviceRef": service, "networking": {"ingress": [
            {"from": [], "ports": []}, {"from": [{}], "ports": [{"port": 0}]},
            {"from": [{"ipBlock": {"cidr": "everything"}, "securityGroup": {"groupID": "web"}}], "ports": [{"port": "http", "protocol": "UDP"}]},
            {"from": vec![peer.clone(); 60], "ports": vec![json!({"port": 80}); 60]}]}}),
        json!({"targetGroupARN": arn, "targetType": "ip", "serviceRef": service, "networking": {"ingress": [{"from": peers(60)}]}}),
    ]
}

/// Different networks.
fn peers(count: u8) -> Value {
    (0..count).map(|n| json!({"ipBlock": {"cidr": format!("198.51.{n}.0/24")}})).collect()
}

fn name(n: usize) -> String {
    format!("old-{n:04}")
}

/// All bindings by name, as a version shows them, without what every write moves; a null member is an absent one.
fn all(cluster: &Cluster, version: &str) -> BTreeMap<String, Value> {
    fn without_null(value: &mut Value) {
        match value {
            Value::Object(members) => {
                members.retain(|_, member| !member.is_null());
                members.values_mut().for_each(without_null);
            }
            Value::Array(items) => items.iter_mut().for_each(without_null),
            _ => {}
        }
    }
    let list = cluster
        .kubectl(&["get", &format!("targetgroupbindings.{version}.elbv2.k8s.aws"), "-n", "old", "-o", "json"])
        .json()
        .unwrap();
    let items = list["items"].as_array().cloned().unwrap();
    let whole = |mut item: Value| {
        let metadata = item["metadata"].as_object_mut().unwrap();
        metadata.remove("resourceVersion");
        metadata.remove("managedFields");
        without_null(&mut item);
        (item["metadata"]["name"].as_str().unwrap().to_owned(), item)
    };
    items.into_iter().map(whole).collect()
}

fn same(what: &str, now: &BTreeMap<String, Value>, before: &BTreeMap<String, Value>) {
    assert_eq!(now.len(), before.len(), "{what}");
    for (name, object) in before {
        assert_eq!(now.get(name), Some(object), "{what}: {name}");
    }
}

/// Makes a version the stored one, and rewrites every object in it.
fn store(cluster: &Cluster, version: &str) {
    let crd = || {
        cluster.kubectl(&["get", "crd", "targetgroupbindings.elbv2.k8s.aws", "-o", "json"]).json().unwrap()
    };
    let kubeconfig = format!("--kubeconfig={}", cluster.kubeconfig().display());
    let versions = crd()["spec"]["versions"].as_array().cloned().unwrap();
    let set = |(n, each): (usize, &Value)| json!({"op": "replace", "path": format!("/spec/versions/{n}/storage"), "value": each["name"] == version});
    let patch: Value = versions.iter().enumerate().map(set).collect();
    let args = ["patch", "crd", "targetgroupbindings.elbv2.k8s.aws", "--type=json", "-p", &patch.to_string()];
    cluster.kubectl(&args).ok().unwrap();
    // The API server takes the change up a moment later.
    eventually(SOON, || {
        run_program("tgb-controller", &["migrate-storage", &kubeconfig], "")?.ok()?;
        let stored = crd()["status"]["storedVersions"].clone();
        if stored == json!([version]) { Ok(()) } else { Err(stored.to_string()) }
    })
    .unwrap();
}

#[test]
fn what_is_stored_from_before_stays_usable_and_storage_moves_there_and_back_without_loss() {
    let cluster = Cluster::start(Options::default()).unwrap();
    let aws = Aws::awsim().unwrap();
    cluster.namespace("old", &BTreeMap::new()).unwrap();
    let (specs, count, grown) = (specs(), count(), grow(&cluster));
    std::thread::scope(|scope| {
        for part in 0..AT_ONCE {
            let (cluster, specs) = (&cluster, &specs);
            scope.spawn(move || {
                let each = count / AT_ONCE;
                let items: Vec<Value> = (part * each..(part + 1) * each)
                    .map(|n| {
                        let version = if n % specs.len() == 0 { "v1alpha1" } else { "v1beta1" };
                        json!({"apiVersion": format!("elbv2.k8s.aws/{version}"), "kind": "TargetGroupBinding",
                            "metadata": {"name": name(n), "namespace": "old", "labels": {"n": n.to_string()}, "annotations": {"note": "kept"}},
                            "spec": specs[n % specs.len()]})
                    })
                    .collect();
                let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
                eventually(SOON, || cluster.kubectl_with(&["create", "-f", "-"], &list).ok()).unwrap();
            });
        }
    });
    let status = r#"{"status": {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "False", "reason": "FailedCleanup", "message": "m", "lastTransitionTime": "2026-01-02T03:04:05Z"}]}}"#;
    cluster
        .kubectl(&[
            "-n",
            "old",
            "patch",
            "targetgroupbinding",
            &name(1),
            "--subresource=status",
            "--type=merge",
            "-p",
            status,
        ])
        .ok()
        .unwrap();
    let before = all(&cluster, "v1beta1");
    assert_eq!(before.len(), count + grown);

    // Ours over it; storage stays what it was. The controller looks elsewhere.
    let settings = Settings {
        values: vec!["crd.storageVersion=v1beta1".to_owned()],
        controller: vec!["--watch-namespaces=tgb-nowhere".to_owned(), "--rule-owner=nobody".to_owned()],
        ..Settings::default()
    };
    let product = Product::start(&cluster, &aws, &settings).unwrap();
    same("the new definition", &all(&cluster, "v1beta1"), &before);
    let as_v1 = all(&cluster, "v1");
    assert_eq!((as_v1.len(), all(&cluster, "v1alpha1").len()), (count + grown, count + grown));
    assert_eq!(as_v1[&name(1)]["spec"]["targetGroup"]["sharing"], "Shared");

    // One of each kind can be labelled, annotated and held by a finalizer, in every version …
    let kinds: Vec<String> = (0..specs.len()).map(name).collect();
    for version in ["v1", "v1beta1", "v1alpha1"] {
        let objects: Vec<String> =
            kinds.iter().map(|name| format!("targetgroupbindings.{version}.elbv2.k8s.aws/{name}")).collect();
        let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
        let label = format!("seen-{version}=yes");
        cluster.kubectl(&[&["-n", "old", "label"], &objects[..], &[&label]].concat()).ok().unwrap();
        cluster.kubectl(&[&["-n", "old", "annotate"], &objects[..], &[&label]].concat()).ok().unwrap();
    }
    let finalizers = |value: Value| {
        let patch = json!({"metadata": {"finalizers": value}}).to_string();
        for name in &kinds {
            cluster.kubectl(&["-n", "old", "patch", "tgb", name, "--type=merge", "-p", &patch]).ok().unwrap();
        }
    };
    finalizers(json!(["elbv2.k8s.aws/resources"]));
    // … and what breaks a rule is told where it is touched.
    let port = r#"{"spec": {"serviceRef": {"port": "other"}}}"#;
    let refused = cluster.kubectl(&[
        "-n",
        "old",
        "patch",
        "targetgroupbindings.v1beta1.elbv2.k8s.aws",
        &name(3),
        "--type=merge",
        "-p",
        r#"{"spec": {"targetGroupARN": "web"}}"#,
    ]);
    let said = refused.refused().unwrap();
    assert!(said.contains("spec.targetGroupARN: TGB102") || said.contains("TGB102"), "{said}");
    cluster
        .kubectl(&[
            "-n",
            "old",
            "patch",
            "targetgroupbindings.v1beta1.elbv2.k8s.aws",
            &name(3),
            "--type=merge",
            "-p",
            port,
        ])
        .ok()
        .unwrap();

    // More peers than a new object may have can become fewer in every version.
    for version in VERSIONS {
        let kind = format!("targetgroupbindings.{version}.elbv2.k8s.aws");
        let fewer = r#"[{"op": "remove", "path": "/spec/networking/ingress/0/from/0"}]"#;
        let name = name(specs.len() - 1);
        cluster.kubectl(&["-n", "old", "patch", &kind, &name, "--type=json", "-p", fewer]).ok().unwrap();
    }

    // Storage to v1 and back, every object rewritten each time.
    let before = all(&cluster, "v1beta1");
    let store = |version: &str| {
        store(&cluster, version);
        same(version, &all(&cluster, "v1beta1"), &before);
    };
    store("v1");
    store("v1beta1");

    // The API server, which has to convert all of them to start, and the webhook start at the same moment.
    product.webhook().kill().unwrap();
    cluster.processes().restart("kube-apiserver").unwrap();
    product.webhook().restart().unwrap();
    eventually(SOON, || cluster.kubectl(&["get", "--raw", "/readyz"]).ok()).unwrap();
    eventually(SOON, || cluster.kubectl(&["get", "tgb", "-n", "old", &name(7)]).ok()).unwrap();
    same("a restart", &all(&cluster, "v1beta1"), &before);

    // And they can go.
    let kinds_: Vec<&str> = kinds.iter().map(String::as_str).collect();
    cluster.kubectl(&[&["-n", "old", "delete", "tgb", "--wait=false"], &kinds_[..]].concat()).ok().unwrap();
    finalizers(Value::Null);
    eventually(SOON, || {
        let left = all(&cluster, "v1beta1").len();
        if left == count + grown - kinds.len() { Ok(()) } else { Err(left) }
    })
    .unwrap();
}

const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];
/// Requests on an object that is there, by what they do, and whether they change its `spec`.
const CHANGES: [(&str, bool); 5] =
    [("label", false), ("finalizer", false), ("status", false), ("delete", false), ("spec", true)];

/// A request in a version, on an object that was made in a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Request {
    verb: &'static str,
    version: &'static str,
    made: &'static str,
}

impl Request {
    /// All of the table.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for version in VERSIONS {
            all.extend(["get", "list", "create"].map(|verb| Self { verb, version, made: version }));
            for made in ["v1", "v1beta1"] {
                all.extend(CHANGES.map(|(verb, _)| Self { verb, version, made }));
            }
        }
        all
    }

    fn name(&self) -> String {
        format!("{}-{}-{}", self.verb, self.version, self.made)
    }

    fn object(&self, version: &str) -> Value {
        let arn = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1ce5b7da835c9ffb";
        let service = json!({"name": "web", "port": 80});
        let spec = if version == "v1" {
            json!({"serviceRef": service, "targetGroup": {"arn": arn, "targetType": "ip", "protocol": "HTTP",
                "ipAddressType": "ipv4", "vpcID": "vpc-0123456789abcdef0", "sharing": "Shared"}})
        } else {
            json!({"serviceRef": service, "targetGroupARN": arn, "targetType": "ip", "targetGroupProtocol": "HTTP",
                "ipAddressType": "ipv4", "vpcID": "vpc-0123456789abcdef0", "multiClusterTargetGroup": true})
        };
        json!({"apiVersion": format!("elbv2.k8s.aws/{version}"), "kind": "TargetGroupBinding", "spec": spec,
            "metadata": {"name": self.name(), "namespace": "table", "finalizers": ["example.com/held"]}})
    }

    /// Sends it as kubectl does.
    fn send(&self, cluster: &Cluster) -> Output {
        let kind = format!("targetgroupbindings.{}.elbv2.k8s.aws", self.version);
        let name = self.name();
        let on = |args: &[&str]| cluster.kubectl(&[&["-n", "table"], args].concat());
        let patch = |patch: &str, more: &[&str]| {
            on(&[&["patch", &kind, &name, "--type=merge", "-p", patch], more].concat())
        };
        match self.verb {
            "get" => on(&["get", &kind, "label-v1-v1", "-o", "name"]),
            "list" => on(&["get", &kind, "-o", "name"]),
            "create" => cluster.kubectl_with(&["create", "-f", "-"], &self.object(self.version).to_string()),
            "label" => on(&["label", &kind, &name, "a=b"]),
            "finalizer" => patch(r#"{"metadata": {"finalizers": null}}"#, &[]),
            "status" => patch(r#"{"status": {"observedGeneration": 7}}"#, &["--subresource=status"]),
            "delete" => on(&["delete", &kind, &name, "--wait=false"]),
            _ => patch(r#"{"spec": {"serviceRef": {"port": 81}}}"#, &[]),
        }
    }

    /// True if it needs neither `/convert` nor admission. Nothing is promised of a list in another version: the API server
    /// may have one in its cache that was converted before.
    fn is_served(&self, stored: &str) -> Option<bool> {
        let changes_spec = self.verb == "create" || CHANGES.contains(&(self.verb, true));
        let is_served = self.version == stored && !changes_spec;
        (is_served || self.verb != "list").then_some(is_served)
    }
}

/// Sends all requests at once; tells which were served. Any other answer than that somebody is away is a failure.
fn answers(cluster: &Cluster) -> BTreeMap<Request, bool> {
    std::thread::scope(|scope| {
        let sent: Vec<_> =
            Request::all().into_iter().map(|each| (each, scope.spawn(move || each.send(cluster)))).collect();
        sent.into_iter()
            .map(|(each, answer)| {
                let answer = answer.join().unwrap();
                let served = answer.code == 0;
                if !served {
                    answer.undecided().unwrap();
                }
                (each, served)
            })
            .collect()
    })
}

/// The table of docs/troubleshooting.md: which requests are served while the webhook is down, or hangs.
#[test]
fn while_the_webhook_is_away_requests_in_the_stored_version_are_served_but_for_changes_of_the_spec() {
    let cluster = Cluster::start(Options::default()).unwrap();
    let aws = Aws::awsim().unwrap();
    cluster.namespace("table", &BTreeMap::new()).unwrap();
    let settings = Settings {
        values: vec!["webhook.enforce=warn".to_owned(), "webhook.bindings.timeoutSeconds=2".to_owned()],
        webhook: vec!["--enforce=warn".to_owned()],
        controller: vec!["--watch-namespaces=tgb-nowhere".to_owned(), "--rule-owner=nobody".to_owned()],
        ..Settings::default()
    };
    let product = Product::start(&cluster, &aws, &settings).unwrap();
    for stored in ["v1", "v1beta1"] {
        store(&cluster, stored);
        for away in ["down", "hanging"] {
            let make = |each: &Request| {
                let object = each.object(each.made).to_string();
                eventually(SOON, || cluster.kubectl_with(&["create", "-f", "-"], &object).ok()).unwrap();
            };
            Request::all().iter().filter(|each| each.verb != "create").for_each(make);
            match away {
                "down" => product.webhook().kill().unwrap(),
                _ => product.webhook().link().unwrap().hold(),
            }
            let found = answers(&cluster);
            match away {
                "down" => product.webhook().restart().unwrap(),
                _ => product.webhook().link().unwrap().open(),
            }
            let wrong: Vec<_> = found
                .iter()
                .filter(|(each, served)| each.is_served(stored).is_some_and(|wanted| wanted != **served))
                .collect();
            assert!(
                wrong.is_empty(),
                "stored as {stored}, webhook {away}: served or not, against the table: {wrong:#?}"
            );
            eventually(SOON, || {
                let free = r#"{"metadata": {"finalizers": null}}"#;
                let list = cluster.kubectl(&["-n", "table", "get", "tgb", "-o", "name"]).ok()?;
                for name in list.lines() {
                    cluster.kubectl(&["-n", "table", "patch", name, "--type=merge", "-p", free]).ok()?;
                }
                cluster.kubectl(&["-n", "table", "delete", "tgb", "--all", "--timeout=20s"]).ok()
            })
            .unwrap();
        }
    }
}

/// The webhook only converts here: nobody but the API server holds objects against rules.
#[test]
fn rules_that_need_only_the_object_hold_without_a_review_and_alike_in_every_version() {
    let cluster = Cluster::start(Options::default()).unwrap();
    let aws = Aws::awsim().unwrap();
    cluster.namespace("bare", &BTreeMap::new()).unwrap();
    let settings = Settings { scope: tgb_e2e::Scope::Conversion, ..Settings::default() };
    let _product = Product::start(&cluster, &aws, &settings).unwrap();
    let arn = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1ce5b7da835c9ffb";
    let service = json!({"name": "web", "port": 80});
    let ingress =
        |from: Value, ports: Value| ("networking", json!({"ingress": [{"from": from, "ports": ports}]}));
    let from = |peer: Value| ingress(json!([peer]), json!([]));
    let port = |port: Value| ingress(peers(1), json!([{"port": port}]));
    let selector = |key: &str, operator: &str, values: Value| {
        ("nodeSelector", json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}))
    };
    // A field of v1beta1, and the rule that refuses it; none for what is in order.
    let cases = [
        (("targetGroupARN", json!(arn.replace("targetgroup/", "loadbalancer/app/"))), "TGB102"),
        (("targetGroupARN", json!("")), "TGB101"),
        (("targetGroupName", json!("a_b")), "TGB212"),
        (("vpcID", json!("vpc-1")), "TGB113"),
        (("iamRoleArnToAssume", json!("admin")), "TGB401"),
        (("iamRoleArnToAssume", json!("arn:aws:iam::123456789012:role/a/b")), ""),
        (("assumeRoleExternalId", json!("x")), "TGB401"),
        (("serviceRef", json!({"name": "web?watch=true"})), "TGB212"),
        (("serviceRef", json!({"name": ""})), "TGB212"),
        (from(json!({})), "TGB302"),
        (ingress(json!([]), json!([])), "TGB302"),
        (
            from(
                json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "securityGroup": {"groupID": "sg-0123456789abcdef0"}}),
            ),
            "TGB302",
        ),
        (from(json!({"ipBlock": {"cidr": "10.0.0.0/40"}})), "TGB303"),
        (from(json!({"ipBlock": {"cidr": "2001:db8::/32"}})), "TGB303"),
        (from(json!({"ipBlock": {"cidr": "10.0.0.1/8"}})), ""),
        (from(json!({"securityGroup": {"groupID": "sg-1"}})), "TGB304"),
        (from(json!({"securityGroup": {"groupID": "sg-0123abcd"}})), ""),
        (port(json!(0)), "TGB305"),
        (port(json!(65_536)), "TGB305"),
        (port(json!("a--b")), "TGB305"),
        (port(json!("http")), ""),
        (ingress(peers(51), json!([])), "TGB308"),
        (ingress(peers(50), json!([])), ""),
        (ingress(peers(1), (1..52).map(|n| json!({"port": n})).collect()), "TGB308"),
        (selector("a", "In", json!(["b"])), "TGB301"),
    ];
    // Of instance targets.
    let of_nodes = [
        (port(json!("http")), "TGB305"),
        (selector("example.com/a", "In", json!(["b", ""])), ""),
        (selector("a", "Exists", json!(["b"])), "TGB301"),
        (selector("a", "In", json!([])), "TGB301"),
        (selector("a", "Gt", json!(["1"])), "TGB301"),
        (selector("a b", "In", json!(["1"])), "TGB301"),
        (selector("a", "In", json!(["-"])), "TGB301"),
        (("nodeSelector", json!({"matchLabels": {"a": "b c"}})), "TGB301"),
        (("targetGroupProtocol", json!("QUIC")), "TGB405"),
    ];
    let cases =
        cases.into_iter().map(|case| (case, "ip")).chain(of_nodes.into_iter().map(|case| (case, "instance")));
    for (((field, value), rule), target_type) in cases {
        let mut beta = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
            "metadata": {"name": "case", "namespace": "bare"},
            "spec": {"targetGroupARN": arn, "targetType": target_type, "ipAddressType": "ipv4", "serviceRef": service}});
        beta["spec"][field] = value.clone();
        for version in VERSIONS {
            let mut object = beta.clone();
            if version == "v1" {
                let file = cluster.dir().join("case.json");
                std::fs::write(&file, object.to_string()).unwrap();
                let file = file.display().to_string();
                run_program("tgb-webhook", &["convert", "--to=v1", "--in-place", &file], "")
                    .unwrap()
                    .ok()
                    .unwrap();
                object = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
            }
            object["apiVersion"] = format!("elbv2.k8s.aws/{version}").into();
            let answer =
                cluster.kubectl_with(&["create", "--dry-run=server", "-f", "-"], &object.to_string());
            if rule.is_empty() {
                answer.ok().unwrap();
            } else {
                let said = answer.refused().unwrap();
                assert!(said.contains(rule), "{version}, {field}: {value}: not {rule}, but {said}");
            }
        }
    }
}
