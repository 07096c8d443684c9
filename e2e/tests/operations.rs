//! Two replicas of each program behind a Service-like address: what holds while they come, go, stand still, and change
//! certificates; what they may do; and what they tell.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "these are tests"
)]

use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tgb_e2e::{
    Aws, Balancer, Cluster, NAMESPACE, Options, Spec, built, eventually, free_ports, get, run_program,
};

const SOON: Duration = Duration::from_secs(60);
const NAME: &str = "tgb-targetgroupbinding";
const CRD: &str = "targetgroupbindings.elbv2.k8s.aws";

struct Stage {
    cluster: Cluster,
    aws: Aws,
    balancer: Balancer,
    /// Of the webhooks' traces, over HTTP, and of the controllers', over HTTPS.
    collectors: [Collector; 2],
    /// `HOST:PORT` of the probes, by process.
    http: Mutex<BTreeMap<String, String>>,
    /// What the two webhooks had written when both were ready, and how often.
    written: BTreeMap<String, usize>,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| Stage::start().unwrap());
/// Tests that stop or count something run alone.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stage {
    fn start() -> tgb_e2e::Result<Self> {
        let cluster = Cluster::start(Options { reachable: true, audit: true, ..Options::default() })?;
        let aws = Aws::awsim()?;
        cluster.nodes(&aws.nodes())?;
        let balancer = Balancer::start()?;
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/targetgroupbinding");
        let url = format!("webhook.url=https://{}", balancer.address());
        let values = ["clusterName=demo", &url, "controller.replicas=0", "sharedTargets.namespaces={shared}"];
        // The Role for the ConfigMaps of Shared bindings is in their namespace.
        cluster.namespace("shared", &BTreeMap::new())?;
        let mut helm = vec!["install", "tgb", chart, "--namespace", NAMESPACE, "--create-namespace"];
        helm.extend(values.iter().flat_map(|value| ["--set", value]));
        cluster.helm(&helm).ok()?;
        let collectors = [Collector::start(None), Collector::start_secure(&cluster)];
        let mut stage =
            Self { cluster, aws, balancer, collectors, http: Mutex::default(), written: BTreeMap::new() };
        // Both at once: they race to make the authority.
        stage.spawn_webhook("webhook-a", &["--log-format=json"])?;
        stage.spawn_webhook("webhook-b", &[])?;
        stage.spawn_controller("controller-a", &["--log-format=json"])?;
        for name in ["webhook-a", "webhook-b", "controller-a"] {
            stage.ready(name)?;
        }
        for (verb, what, code, _) in stage.asked("webhook") {
            if code < 300 && !["get", "list", "watch"].contains(&verb.as_str()) {
                *stage.written.entry(format!("{verb} {what}")).or_default() += 1;
            }
        }
        stage.spawn_controller("controller-b", &[])?;
        stage.ready("controller-b")?;
        Ok(stage)
    }

    fn http(&self, name: &str) -> String {
        self.http.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned().unwrap_or_default()
    }

    fn spawn(&self, name: &str, program: &str, mut args: Vec<String>, extra: &[&str]) -> tgb_e2e::Result<()> {
        let account = format!("{NAME}-{}", program.trim_start_matches("tgb-"));
        if !extra.iter().any(|arg| arg.starts_with("--kubeconfig=")) {
            let kubeconfig = self.cluster.kubeconfig_of(NAMESPACE, &account, self.cluster.server())?;
            args.push(format!("--kubeconfig={}", kubeconfig.display()));
        }
        args.push(format!("--aws-vpc-id={}", self.aws.lab().vpc));
        args.push("--cluster-name=demo".to_owned());
        let collector = &self.collectors[usize::from(program == "tgb-controller")];
        args.push(format!("--otlp-endpoint={}", collector.url));
        let [port] = free_ports()?;
        let http = format!("127.0.0.1:{port}");
        args.push(format!("--http-listen={http}"));
        self.http.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), http);
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        let authority = self.cluster.dir().join("ca.crt").display().to_string();
        let mut spec = Spec::new(built(program)?, args).env("NO_COLOR", "1").env("SSL_CERT_FILE", authority);
        for (name, value) in self.aws.environment("PRODUCT") {
            spec = spec.env(&name, value);
        }
        self.cluster.processes().spawn(name, spec)
    }

    fn spawn_webhook(&self, name: &str, extra: &[&str]) -> tgb_e2e::Result<()> {
        let [port] = free_ports()?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut args = vec!["serve".to_owned(), format!("--listen={address}")];
        if !extra.iter().any(|arg| arg.starts_with("--cert-mode")) {
            args.push(format!("--self-secret-namespace={NAMESPACE}"));
            args.push(format!("--self-secret-name={NAME}-webhook-ca"));
            args.push(format!("--webhook-config-name={NAME}"));
            args.push(format!("--extra-dns-name={}", self.balancer.address().ip()));
        }
        if !extra.iter().any(|arg| arg.starts_with("--shutdown-delay")) {
            args.push("--shutdown-delay=3s".to_owned());
        }
        self.spawn(name, "tgb-webhook", args, extra)?;
        if !extra.iter().any(|arg| arg.starts_with("--cert-mode")) {
            self.balancer.add(name, address, &self.http(name));
        }
        Ok(())
    }

    fn spawn_controller(&self, name: &str, extra: &[&str]) -> tgb_e2e::Result<()> {
        let mut args = vec!["run".to_owned(), format!("--lease-namespace={NAMESPACE}")];
        if !extra.iter().any(|arg| arg.starts_with("--lease-name=")) {
            args.push(format!("--lease-name={NAME}-controller"));
        }
        self.spawn(name, "tgb-controller", args, extra)
    }

    fn ready(&self, name: &str) -> tgb_e2e::Result<()> {
        eventually(SOON, || {
            self.cluster.processes().check(name)?;
            let answer = get(&self.http(name), "/readyz?verbose")?;
            if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
        })
    }

    fn metric(&self, name: &str, metric: &str) -> Option<f64> {
        let text = get(&self.http(name), "/metrics").ok()?;
        let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(metric))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    fn kubectl(&self, line: &str) -> tgb_e2e::Output {
        self.cluster.kubectl(&line.split_whitespace().collect::<Vec<_>>())
    }

    fn apply(&self, namespace: &str, object: &Value) -> tgb_e2e::Output {
        self.cluster.kubectl_with(&["apply", "-n", namespace, "-f", "-"], &object.to_string())
    }

    /// Waits until it is refused by this rule: after another test the API server may not know a replica again yet.
    fn refused(&self, namespace: &str, object: &Value, rule: &str) {
        eventually(SOON, || {
            let said = self.apply(namespace, object).refused()?;
            if said.contains(rule) { Ok(()) } else { Err(said) }
        })
        .unwrap();
    }

    fn aws(&self, line: &str) -> String {
        let args: Vec<&str> = line.split_whitespace().collect();
        self.aws.cli(&self.cluster, &args).ok().unwrap().trim().to_owned()
    }

    fn target_group(&self, name: &str, port: u16, kind: &str) -> String {
        let line = format!("--name {name} --protocol HTTP --port {port} --target-type {kind}");
        let query = "--query TargetGroups[0].TargetGroupArn --output text";
        self.aws(&format!("elbv2 create-target-group {line} --vpc-id {} {query}", self.aws.lab().vpc))
    }

    fn targets(&self, arn: &str) -> BTreeSet<String> {
        let query = "TargetHealthDescriptions[?TargetHealth.State!='draining'].Target.Id --output text";
        let text =
            self.aws(&format!("elbv2 describe-target-health --target-group-arn {arn} --query {query}"));
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// A Deployment and a Service `web` in a new namespace, or in one that is there.
    fn shop(&self, namespace: &str, replicas: u32) {
        if self.kubectl(&format!("get namespace {namespace}")).code != 0 {
            self.cluster.namespace(namespace, &BTreeMap::new()).unwrap();
        }
        self.apply(namespace, &json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
             "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}},
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
             "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": "web"}]}}}},
        ]})).ok().unwrap();
    }

    fn until_targets(&self, namespace: &str, arn: &str, count: usize) -> BTreeSet<String> {
        eventually(SOON, || match self.targets(arn) {
            targets if targets.len() == count => Ok(targets),
            targets => Err(targets),
        })
        .unwrap_or_else(|error| {
            let processes = ["webhook-a", "webhook-b", "controller-a", "controller-b"].map(str::to_owned);
            panic!("{count} targets: {error}\n{}", self.cluster.report(&[namespace.to_owned()], &processes))
        })
    }

    /// Waits until both replicas serve certificates of one authority that lives for long, and the API server has it.
    fn settled(&self) {
        let long = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
            + 86_400.0;
        eventually(3 * SOON, || {
            let bundles: BTreeSet<String> = self.bundles().iter().map(Value::to_string).collect();
            let ends =
                ["webhook-a", "webhook-b"].map(|name| self.metric(name, "tgb_certificate_not_after_seconds"));
            let lasting = ends.iter().all(|end| end.is_some_and(|end| end > long));
            if bundles.len() == 1 && lasting { Ok(()) } else { Err((bundles, ends)) }
        })
        .unwrap();
    }

    /// Empties the authority's Secret, which the webhook may fill again but not make.
    fn forget_authority(&self) {
        let (secret, empty) = (format!("{NAME}-webhook-ca"), r#"{"data": null}"#);
        let args = ["-n", NAMESPACE, "patch", "secret", &secret, "--type=merge", "-p", empty];
        self.cluster.kubectl(&args).ok().unwrap();
    }

    /// Which of the two controllers leads.
    fn leader(&self) -> (&'static str, &'static str) {
        eventually(SOON, || {
            for (one, other) in [("controller-a", "controller-b"), ("controller-b", "controller-a")] {
                if self.metric(one, "tgb_leader") == Some(1.0) {
                    return Ok((one, other));
                }
            }
            Err("nobody leads")
        })
        .unwrap()
    }

    fn get_json(&self, line: &str) -> Value {
        self.kubectl(&format!("{line} -o json")).json().unwrap()
    }

    /// The caBundles of both webhook configurations and of the CRD.
    fn bundles(&self) -> Vec<Value> {
        let mut out = Vec::new();
        for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
            let object = self.get_json(&format!("get {kind} {NAME}"));
            let webhooks = object["webhooks"].as_array().unwrap();
            out.extend(webhooks.iter().map(|w| w["clientConfig"]["caBundle"].clone()));
        }
        let crd = self.get_json(&format!("get crd {CRD}"));
        out.push(crd["spec"]["conversion"]["webhook"]["clientConfig"]["caBundle"].clone());
        out
    }

    /// What an account of the release has asked of the API server: verb, resource with subresource, code, name.
    fn asked(&self, program: &str) -> Vec<(String, String, u64, String)> {
        let user = format!("system:serviceaccount:{NAMESPACE}:{NAME}-{program}");
        let text = |event: &Value, path: &str| {
            event.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let events =
            self.cluster.audit().into_iter().filter(|event| event["user"]["username"] == user.as_str());
        events
            .map(|event| {
                let mut resource = text(&event, "/objectRef/resource");
                let sub = text(&event, "/objectRef/subresource");
                if !sub.is_empty() {
                    resource = format!("{resource}/{sub}");
                }
                let code = event["responseStatus"]["code"].as_u64().unwrap_or(200);
                (text(&event, "/verb"), resource, code, text(&event, "/objectRef/name"))
            })
            .collect()
    }
}

fn binding(arn: &str) -> Value {
    json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroup": {"arn": arn}, "serviceRef": {"name": "web"}}})
}

/// Requests that go through conversion, defaulting and rules, from `tasks` clients at once, until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(stage: &Stage, namespace: &str, arn: &str, tasks: usize) -> Self {
        let load =
            Self { stop: Arc::default(), done: Arc::default(), failures: Arc::default(), thread: None };
        let (stop, done, failures) =
            (Arc::clone(&load.stop), Arc::clone(&load.done), Arc::clone(&load.failures));
        let (kubeconfig, namespace, arn) =
            (stage.cluster.kubeconfig().to_owned(), namespace.to_owned(), arn.to_owned());
        let work = async move {
            let file = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
            let config =
                kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                    .await
                    .unwrap();
            let client = kube::Client::try_from(config).unwrap();
            let resource = ApiResource {
                group: "elbv2.k8s.aws".into(),
                version: "v1beta1".into(),
                api_version: "elbv2.k8s.aws/v1beta1".into(),
                kind: "TargetGroupBinding".into(),
                plural: "targetgroupbindings".into(),
            };
            let object: DynamicObject = serde_json::from_value(json!({
                "apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "load"},
                "spec": {"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 80}}})).unwrap();
            let params = PostParams { dry_run: true, field_manager: None };
            let running: Vec<_> = (0..tasks)
                .map(|_| {
                    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &namespace, &resource);
                    let (object, params) = (object.clone(), params.clone());
                    let (stop, done, failures) =
                        (Arc::clone(&stop), Arc::clone(&done), Arc::clone(&failures));
                    tokio::spawn(async move {
                        while !stop.load(Ordering::Acquire) {
                            match api.create(&params, &object).await {
                                Ok(_) => {
                                    done.fetch_add(1, Ordering::AcqRel);
                                }
                                Err(error) => failures.lock().unwrap().push(error.to_string()),
                            }
                        }
                    })
                })
                .collect();
            for task in running {
                task.await.unwrap();
            }
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { thread: Some(std::thread::spawn(move || runtime.block_on(work))), ..load }
    }

    fn done(&self) -> usize {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until so many more requests have been answered.
    fn goes_on(&self, more: usize) {
        let goal = self.done() + more;
        eventually(SOON, || {
            if self.done() >= goal { Ok(()) } else { Err(self.failures.lock().unwrap().clone()) }
        })
        .unwrap();
    }

    fn end(mut self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap();
        let failures = self.failures.lock().unwrap().clone();
        (self.done(), failures)
    }
}

/// Something that takes OTLP over HTTP, or over HTTPS, and keeps what it got.
struct Collector {
    url: String,
    got: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    /// Without certificate and key it speaks plain HTTP.
    fn start(tls: Option<rustls::ServerConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let got: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (kept, tls) = (Arc::clone(&got), tls.map(Arc::new));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), kept, tls) = (stream, Arc::clone(&kept), tls.clone()) else { continue };
                std::thread::spawn(move || match tls {
                    Some(tls) => {
                        let connection = rustls::ServerConnection::new(tls).unwrap();
                        Self::converse(rustls::StreamOwned::new(connection, stream), &kept);
                    }
                    None => Self::converse(stream, &kept),
                });
            }
        });
        Self { url, got }
    }

    /// The same with the certificate of the control plane.
    fn start_secure(cluster: &Cluster) -> Self {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let at = |name: &str| cluster.dir().join(name);
        let chain = vec![CertificateDer::from_pem_file(at("server.crt")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(at("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = builder.unwrap().with_no_client_auth().with_single_cert(chain, key);
        Self::start(Some(tls.unwrap()))
    }

    fn converse(mut stream: impl Read + Write, kept: &Mutex<Vec<u8>>) {
        let mut bytes = Vec::new();
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
            let Some(head) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
            let text = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
            let length = text
                .split("content-length: ")
                .nth(1)
                .and_then(|rest| rest.split("\r\n").next()?.parse().ok());
            let length: usize = length.unwrap_or_default();
            if bytes.len() < head + 4 + length {
                continue;
            }
            if text.starts_with("post /v1/traces ") {
                kept.lock().unwrap().extend(bytes.drain(..head + 4 + length));
            }
            bytes.clear();
            let answer =
                "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
            if stream.write_all(answer.as_bytes()).and_then(|()| stream.flush()).is_err() {
                break;
            }
        }
    }

    /// Text stands in protobuf as it is.
    fn has(&self, text: &str) -> bool {
        self.got.lock().unwrap().windows(text.len()).any(|window| window == text.as_bytes())
    }
}

#[test]
fn replicas_that_start_at_once_agree_on_one_authority_and_write_it_once() {
    let _alone = alone();
    let stage = &*STAGE;
    let bundles: BTreeSet<String> = stage.bundles().iter().map(Value::to_string).collect();
    assert_eq!(bundles.len(), 1, "{bundles:?}");
    let versions = || {
        ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"]
            .map(|kind| stage.get_json(&format!("get {kind} {NAME}"))["metadata"]["resourceVersion"].clone())
    };
    // Another replica comes, and reads everything. An authority that another test left may still be on its way out.
    eventually(3 * SOON, || {
        let before = versions();
        stage.spawn_webhook("webhook-c", &["--shutdown-delay=0s"])?;
        stage.ready("webhook-c")?;
        stage.balancer.remove("webhook-c");
        assert!(stage.cluster.processes().stop("webhook-c", SOON)?.success());
        let after = versions();
        if before == after { Ok(()) } else { Err(format!("written anew: {before:?}, {after:?}")) }
    })
    .unwrap();
    let once = [
        "patch customresourcedefinitions",
        "patch mutatingwebhookconfigurations",
        "patch validatingwebhookconfigurations",
        "update secrets",
    ];
    assert_eq!(stage.written, once.map(|what| (what.to_owned(), 1)).into());
}

#[test]
fn a_rolling_restart_of_the_webhook_fails_no_request() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("rolling", 1);
    let arn = stage.target_group("rolling", 80, "ip");
    let load = Load::start(stage, "rolling", &arn, 4);
    load.goes_on(100);
    for name in ["webhook-a", "webhook-b"] {
        // maxSurge 1, maxUnavailable 0: the new one is ready before the old one is asked to end.
        let next = format!("{name}-next");
        stage.spawn_webhook(&next, &[]).unwrap();
        stage.ready(&next).unwrap();
        let status = stage.cluster.processes().stop(name, SOON).unwrap();
        assert!(status.success(), "{status}");
        stage.balancer.remove(name);
        load.goes_on(50);
        stage.spawn_webhook(name, if name == "webhook-a" { &["--log-format=json"] } else { &[] }).unwrap();
        stage.ready(name).unwrap();
        assert!(stage.cluster.processes().stop(&next, SOON).unwrap().success());
        stage.balancer.remove(&next);
        load.goes_on(50);
    }
    let (done, failures) = load.end();
    assert!(failures.is_empty() && done > 300, "{} of {done} requests failed: {failures:?}", failures.len());
}

#[test]
fn an_authority_that_lives_for_seconds_rotates_under_load_and_fails_no_request() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("rotating", 1);
    let arn = stage.target_group("rotating", 80, "ip");
    let short = ["--ca-lifetime=24s", "--leaf-lifetime=8s"];
    for name in ["short-a", "short-b"] {
        stage.spawn_webhook(name, &short).unwrap();
        stage.ready(name).unwrap();
    }
    // Those with the long-lived one give way; what they published is replaced in two phases.
    for name in ["webhook-a", "webhook-b"] {
        stage.cluster.processes().stop(name, SOON).unwrap();
        stage.balancer.remove(name);
    }
    stage.forget_authority();
    let swaps = || {
        let count =
            |name: &str| stage.cluster.processes().log(name).matches("serving a new certificate").count();
        count("short-a").min(count("short-b"))
    };
    let takeovers = || {
        let count =
            |name: &str| stage.cluster.processes().log(name).matches("the next authority takes over").count();
        count("short-a") + count("short-b")
    };
    let load = Load::start(stage, "rotating", &arn, 2);
    let rotated = eventually(Duration::from_secs(150), || {
        let seen = (takeovers(), swaps());
        if seen.0 >= 2 && seen.1 >= 5 { Ok(()) } else { Err(seen) }
    });
    let (done, failures) = load.end();
    for name in ["webhook-a", "webhook-b"] {
        stage.spawn_webhook(name, if name == "webhook-a" { &["--log-format=json"] } else { &[] }).unwrap();
        stage.ready(name).unwrap();
    }
    for name in ["short-a", "short-b"] {
        stage.cluster.processes().stop(name, SOON).unwrap();
        stage.balancer.remove(name);
    }
    stage.forget_authority();
    stage.settled();
    assert!(failures.is_empty(), "{} of {done} requests failed: {failures:?}", failures.len());
    rotated.unwrap_or_else(|error| panic!("{error}\n{}", stage.cluster.processes().log("short-a")));
}

/// A directory as kubelet mounts a Secret: the files are links through `..data`, which is replaced as a whole.
struct Mounted {
    dir: PathBuf,
    count: usize,
}

impl Mounted {
    fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            std::os::unix::fs::symlink(Path::new("..data").join(name), dir.join(name)).unwrap();
        }
        Self { dir, count: 0 }
    }

    fn swap(&mut self, certificate: &str, key: &str) {
        self.swap_with(certificate, key, certificate);
    }

    fn swap_with(&mut self, certificate: &str, key: &str, authority: &str) {
        self.count += 1;
        let fresh = format!("..2026_{}", self.count);
        std::fs::create_dir(self.dir.join(&fresh)).unwrap();
        for (name, text) in [("tls.crt", certificate), ("tls.key", key), ("ca.crt", authority)] {
            std::fs::write(self.dir.join(&fresh).join(name), text).unwrap();
        }
        std::os::unix::fs::symlink(&fresh, self.dir.join("..data_tmp")).unwrap();
        std::fs::rename(self.dir.join("..data_tmp"), self.dir.join("..data")).unwrap();
    }
}

/// An authority of somebody else.
struct Authority {
    pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_der(certificate.der(), key).unwrap();
        Self { pem: certificate.pem(), issuer }
    }

    /// A certificate that is valid from the beginning of one year to that of another, and its key.
    fn pair(&self, from: i32, to: i32) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 1, 1);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// Webhook configurations that call nobody, with this bundle.
fn configurations(stage: &Stage, name: &str, bundle: &str) {
    for kind in ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"] {
        let object = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name},
            "webhooks": [{"name": "nobody.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "failurePolicy": "Ignore",
                "clientConfig": {"url": "https://127.0.0.1:9/nobody", "caBundle": base64(bundle)},
                "rules": [{"apiGroups": ["nobody.example.com"], "apiVersions": ["v1"], "operations": ["CREATE"],
                    "resources": ["nothings"]}]}]});
        stage.cluster.kubectl_with(&["apply", "-f", "-"], &object.to_string()).ok().unwrap();
    }
}

/// Starts a webhook on mounted files, as an administrator, for configurations of this name.
fn spawn_on_files(stage: &Stage, name: &str, mode: &str, dir: &Path, more: &[&str]) {
    let file = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
    let flags = [
        format!("--cert-mode={mode}"),
        file("tls-cert-file", "tls.crt"),
        file("tls-key-file", "tls.key"),
        format!("--webhook-config-name={name}"),
        format!("--kubeconfig={}", stage.cluster.kubeconfig().display()),
        "--shutdown-delay=0s".to_owned(),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    stage.spawn_webhook(name, &flags).unwrap();
}

/// The bundles of the configurations of this name, as text.
fn bundles_of(stage: &Stage, name: &str) -> Vec<String> {
    use base64::Engine as _;
    let kinds = ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"];
    let bundle = |kind: &str| {
        let text =
            stage.get_json(&format!("get {kind} {name}"))["webhooks"][0]["clientConfig"]["caBundle"].clone();
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(text.as_str().unwrap_or_default()).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    kinds.map(bundle).into()
}

#[test]
fn files_that_kubelet_swaps_are_served_within_15_seconds_and_bad_ones_keep_the_old_pair() {
    let stage = &*STAGE;
    let mut files = Mounted::new(stage.cluster.dir().join("mounted"));
    let authority = Authority::new("files");
    let pair = |from, to| authority.pair(from, to);
    let first = pair(2020, 2040);
    files.swap(&first.0, &first.1);
    configurations(stage, "files", &authority.pem);
    spawn_on_files(stage, "files", "files", &files.dir, &["--crd-name="]);
    stage.ready("files").unwrap();
    let year = |year: i32| f64::from(year - 1970) * 365.2425 * 86_400.0;
    let until_served = |served: i32| {
        let begun = Instant::now();
        eventually(SOON, || {
            let end = stage.metric("files", "tgb_certificate_not_after_seconds").unwrap_or_default();
            let refused = stage.metric("files", "tgb_certificate_refused");
            if (end - year(served)).abs() < 3.0 * 86_400.0 && refused == Some(0.0) {
                Ok(())
            } else {
                Err((end, refused))
            }
        })
        .unwrap_or_else(|error| panic!("{served}: {error}\n{}", stage.cluster.processes().log("files")));
        begun.elapsed()
    };
    until_served(2040);
    let mut took = Vec::new();
    for end in [2041, 2042] {
        let next = pair(2020, end);
        files.swap(&next.0, &next.1);
        took.push(until_served(end));
    }
    let (good, other) = (pair(2020, 2050), pair(2020, 2051));
    let expired = pair(2019, 2020);
    let bad: [(&str, &str, &str); 3] = [
        ("no usable", "rubbish", &good.1),
        ("expired", &expired.0, &expired.1),
        ("does not belong", &good.0, &other.1),
    ];
    for (said, certificate, key) in bad {
        files.swap(certificate, key);
        eventually(SOON, || {
            let answer = get(&stage.http("files"), "/readyz?verbose")?;
            let refused = stage.metric("files", "tgb_certificate_refused") == Some(1.0);
            let told = answer.starts_with("HTTP/1.1 200") && answer.contains(said);
            if told && refused { Ok(()) } else { Err(answer) }
        })
        .unwrap();
        let log = stage.cluster.processes().log("files");
        assert!(log.contains(said) && log.contains("the old one stays"), "{log}");
    }
    files.swap(&good.0, &good.1);
    took.push(until_served(2050));
    // On a busy machine a measurement may fail, but not all of them.
    assert!(took.iter().any(|took| *took < Duration::from_secs(15)), "{took:?}");
    assert!(stage.cluster.processes().stop("files", SOON).unwrap().success());
}

#[test]
fn it_is_ready_once_every_configuration_trusts_what_it_serves_and_a_deleted_one_is_told_of() {
    let stage = &*STAGE;
    let (own, other) = (Authority::new("own"), Authority::new("other"));
    let mut files = Mounted::new(stage.cluster.dir().join("cert-manager"));
    let made = own.pair(2020, 2040);
    files.swap(&made.0, &made.1);
    configurations(stage, "injected", &other.pem);
    spawn_on_files(stage, "injected", "cert-manager", &files.dir, &["--crd-name="]);
    let answers = |code: &str, said: &str| {
        eventually(SOON, || {
            let answer = get(&stage.http("injected"), "/readyz?verbose")?;
            if answer.starts_with(&format!("HTTP/1.1 {code}")) && answer.contains(said) {
                Ok(())
            } else {
                Err(answer)
            }
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.cluster.processes().log("injected")));
    };
    answers("503", "not every configuration trusts the served certificate");
    assert_eq!(bundles_of(stage, "injected"), [other.pem.as_str(); 2], "somebody else writes them");
    configurations(stage, "injected", &format!("{}{}", other.pem, own.pem));
    answers("200", "[+] authority published");
    // The usual way out when admission is in the way.
    stage.kubectl("delete validatingwebhookconfiguration injected").ok().unwrap();
    answers("200", "there is no ValidatingWebhookConfiguration injected");
    assert_eq!(stage.metric("injected", "tgb_webhook_configurations_missing"), Some(1.0));
    // A pod that starts meanwhile serves, too: the others are still converted.
    stage.cluster.processes().kill("injected").unwrap();
    stage.cluster.processes().restart("injected").unwrap();
    answers("200", "there is no ValidatingWebhookConfiguration injected");
    assert!(stage.cluster.processes().stop("injected", SOON).unwrap().success());
}

#[test]
fn another_authority_is_published_before_a_certificate_of_it_is_served_and_the_old_one_stays_beside_it() {
    let stage = &*STAGE;
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let mut files = Mounted::new(stage.cluster.dir().join("published"));
    let (first, second) = (old.pair(2020, 2040), new.pair(2020, 2041));
    files.swap_with(&first.0, &first.1, &old.pem);
    let somebody = Authority::new("somebody");
    // As pods of another mode have left it, which still serve.
    configurations(stage, "published", &somebody.pem);
    let ca = format!("--tls-ca-file={}", files.dir.join("ca.crt").display());
    spawn_on_files(stage, "published", "cert-manager", &files.dir, &[&ca, "--crd-name="]);
    stage.ready("published").unwrap();
    let have = |authorities: &[&Authority]| {
        eventually(SOON, || {
            let found = bundles_of(stage, "published");
            let has = |bundle: &String| {
                bundle.matches("BEGIN").count() == authorities.len()
                    && authorities
                        .iter()
                        .all(|authority| bundle.contains(&authority.pem.replace("\r\n", "\n")))
            };
            if found.iter().all(has) { Ok(()) } else { Err(found) }
        })
        .unwrap_or_else(|error| panic!("{error:?}\n{}", stage.cluster.processes().log("published")));
    };
    have(&[&somebody, &old]);
    let managers =
        stage.get_json("get mutatingwebhookconfiguration published --show-managed-fields")["metadata"]["managedFields"]
            .to_string();
    assert!(managers.contains("tgb-webhook") && !managers.contains("unknown"), "{managers}");
    files.swap_with(&second.0, &second.1, &new.pem);
    have(&[&somebody, &old, &new]);
    let year = |year: i32| f64::from(year - 1970) * 365.2425 * 86_400.0;
    eventually(SOON, || match stage.metric("published", "tgb_certificate_not_after_seconds") {
        Some(end) if (end - year(2041)).abs() < 3.0 * 86_400.0 => Ok(()),
        end => Err(end),
    })
    .unwrap();
    stage.ready("published").unwrap();
    // Whoever takes the bundle away is not waited for.
    configurations(stage, "published", &somebody.pem);
    have(&[&somebody, &new]);
    assert!(stage.cluster.processes().stop("published", SOON).unwrap().success());
}

#[test]
fn a_write_that_a_policy_refuses_is_told_of_with_its_cause_and_made_when_it_may_be() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.settled();
    let api = "admissionregistration.k8s.io/v1";
    let policy = json!({"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": "frozen"},
        "spec": {"failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{"apiGroups": ["apiextensions.k8s.io"], "apiVersions": ["*"],
                "operations": ["UPDATE"], "resources": ["customresourcedefinitions"]}]},
            "validations": [{"expression": "!request.userInfo.username.endsWith('-webhook')",
                "message": "definitions are frozen this week"}]}});
    let binding = json!({"apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": "frozen"},
        "spec": {"policyName": "frozen", "validationActions": ["Deny"]}});
    for object in [&policy, &binding] {
        stage.cluster.kubectl_with(&["apply", "-f", "-"], &object.to_string()).ok().unwrap();
    }
    let before = stage.bundles().pop().unwrap();
    let wipe = r#"[{"op": "remove", "path": "/spec/conversion/webhook/clientConfig/caBundle"}]"#;
    let told = |name: &str| {
        let answer = get(&stage.http(name), "/readyz?verbose")?;
        if answer.contains("definitions are frozen this week") { Ok(()) } else { Err(answer) }
    };
    let told = eventually(SOON, || {
        // The policy is at work a moment after it was made.
        if stage.bundles().pop().unwrap() == before {
            stage.cluster.kubectl(&["patch", "crd", CRD, "--type=json", "-p", wipe]).ok()?;
        }
        told("webhook-a").and(told("webhook-b"))
    });
    for kind in ["validatingadmissionpolicybinding", "validatingadmissionpolicy"] {
        stage.kubectl(&format!("delete {kind} frozen")).ok().unwrap();
    }
    told.unwrap();
    for name in ["webhook-a", "webhook-b"] {
        let log = stage.cluster.processes().log(name);
        assert!(log.contains("definitions are frozen this week"), "{log}");
    }
    eventually(SOON, || match stage.bundles().pop().unwrap() {
        bundle if bundle == before => Ok(()),
        bundle => Err(bundle),
    })
    .unwrap();
    for name in ["webhook-a", "webhook-b"] {
        stage.ready(name).unwrap();
    }
}

#[test]
fn two_releases_leave_each_others_converter_alone_and_the_second_one_goes_without_a_trace() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.settled();
    stage.shop("beside", 1);
    let crd = || {
        let crd = stage.get_json(&format!("get crd {CRD}"));
        (crd["metadata"]["resourceVersion"].clone(), crd["spec"]["conversion"].clone())
    };
    let before = crd();
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/targetgroupbinding");
    let [port] = free_ports().unwrap();
    let url = format!("webhook.url=https://127.0.0.1:{port}");
    let (name, space) = ("beside-targetgroupbinding", "beside-system");
    let values = [
        "clusterName=demo",
        &url,
        "controller.replicas=0",
        "crd.enabled=false",
        "watchNamespaces={beside}",
        "ruleOwner=beside",
    ];
    let mut helm = vec!["install", "beside", chart, "--namespace", space, "--create-namespace"];
    helm.extend(values.iter().flat_map(|value| ["--set", value]));
    stage.cluster.helm(&helm).ok().unwrap();
    let kubeconfig =
        stage.cluster.kubeconfig_of(space, &format!("{name}-webhook"), stage.cluster.server()).unwrap();
    let args = vec![
        "serve".to_owned(),
        format!("--listen=127.0.0.1:{port}"),
        "--crd-name=".to_owned(),
        format!("--self-secret-namespace={space}"),
        format!("--self-secret-name={name}-webhook-ca"),
        format!("--webhook-config-name={name}"),
        "--extra-dns-name=127.0.0.1".to_owned(),
        "--watch-namespaces=beside".to_owned(),
        "--shutdown-delay=0s".to_owned(),
    ];
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    stage.spawn("beside", "tgb-webhook", args, &[&kubeconfig]).unwrap();
    stage.ready("beside").unwrap();
    // Both are asked, in this namespace, and conversion is the first one's.
    let arn = stage.target_group("beside", 80, "ip");
    let old = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 80}}});
    eventually(SOON, || stage.apply("beside", &old).ok()).unwrap();
    stage.until_targets("beside", &arn, 1);
    assert!(stage.metric("beside", "tgb_admission_requests_total").is_some_and(|n| n > 0.0));
    for replica in ["webhook-a", "webhook-b", "beside"] {
        stage.ready(replica).unwrap();
    }
    // One that does not know whose the CRD is sees it.
    let (configured, admin) = (
        format!("--webhook-config-name={name}"),
        format!("--kubeconfig={}", stage.cluster.kubeconfig().display()),
    );
    let secret =
        [format!("--self-secret-namespace={space}"), format!("--self-secret-name={name}-webhook-ca")];
    let args = [vec!["serve".to_owned(), "--listen=127.0.0.1:0".to_owned()], secret.into()].concat();
    stage
        .spawn(
            "astray",
            "tgb-webhook",
            args,
            &[&admin, &configured, "--extra-dns-name=127.0.0.1", "--shutdown-delay=0s"],
        )
        .unwrap();
    stage.ready("astray").unwrap();
    assert!(stage.cluster.processes().stop("astray", SOON).unwrap().success());
    assert_eq!(crd(), before, "nobody but the first release has touched the CRD");
    // A binding with a finalizer is no reason to stay: the hook is the first one's.
    let uninstall = ["uninstall", "beside", "--namespace", space, "--timeout", "60s"];
    stage.cluster.helm(&uninstall).ok().unwrap();
    assert!(stage.cluster.processes().stop("beside", SOON).unwrap().success());
    assert_eq!(crd(), before);
    stage
        .kubectl("-n beside delete targetgroupbindings.v1beta1.elbv2.k8s.aws web --timeout=60s")
        .ok()
        .unwrap();
    stage.kubectl(&format!("delete namespace beside {space} --wait=false")).ok().unwrap();
}

#[test]
fn lifetimes_that_leave_no_time_for_a_rotation_end_it_at_once() {
    let output =
        run_program("tgb-webhook", &["serve", "--ca-lifetime=1m", "--leaf-lifetime=0s"], "").unwrap();
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(output.stderr.contains("--ca-lifetime"), "{}", output.stderr);
}

#[test]
fn after_sigterm_it_is_unready_at_once_serves_on_and_a_second_one_ends_it() {
    let _alone = alone();
    let stage = &*STAGE;
    let processes = stage.cluster.processes();
    let terminate = |name: &str| {
        processes.terminate(name).unwrap();
        eventually(SOON, || {
            let answer = get(&stage.http(name), "/readyz?verbose")?;
            if answer.starts_with("HTTP/1.1 503") && answer.contains("[-] not ending") {
                Ok(())
            } else {
                Err(answer)
            }
        })
        .unwrap();
    };
    let [port] = free_ports().unwrap();
    let listen = format!("--listen=127.0.0.1:{port}");
    let config = format!("--webhook-config-name={NAME}");
    let secret = format!("--self-secret-name={NAME}-webhook-ca");
    let space = format!("--self-secret-namespace={NAMESPACE}");
    for (name, delay) in [("ending", "--shutdown-delay=15s"), ("ended", "--shutdown-delay=10m")] {
        let args = vec!["serve".to_owned(), listen.clone(), config.clone(), secret.clone(), space.clone()];
        stage.spawn(name, "tgb-webhook", args, &[delay]).unwrap();
        stage.ready(name).unwrap();
        terminate(name);
        let script = format!(
            "import http.client, ssl, json\n\
             c = http.client.HTTPSConnection('127.0.0.1', {port}, context=ssl._create_unverified_context())\n\
             review = {{'apiVersion': 'apiextensions.k8s.io/v1', 'kind': 'ConversionReview', 'request': {{\n\
             'uid': 'u', 'desiredAPIVersion': 'elbv2.k8s.aws/v1', 'objects': []}}}}\n\
             c.request('POST', '/convert', json.dumps(review), {{'content-type': 'application/json'}})\n\
             a = c.getresponse()\n\
             print(a.status, a.getheader('connection'))\n"
        );
        let output =
            Command::new(stage.cluster.programs().python("python")).args(["-c", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(said, "200 close\n", "{}", String::from_utf8_lossy(&output.stderr));
        if name == "ended" {
            processes.terminate(name).unwrap();
        }
        // Long before the delay of the second one.
        let status = processes.ended(name, SOON).unwrap();
        assert!(status.success(), "{name}: {status}");
    }
}

#[test]
fn an_api_server_that_is_away_for_a_moment_is_no_outage() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("lost", 2);
    let arn = stage.target_group("lost", 80, "ip");
    eventually(SOON, || stage.apply("lost", &binding(&arn)).ok()).unwrap();
    let targets = stage.until_targets("lost", &arn, 2);
    let (leader, _) = stage.leader();
    stage.cluster.processes().kill("kube-apiserver").unwrap();
    for name in ["webhook-a", "webhook-b", leader] {
        let answer = get(&stage.http(name), "/readyz").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
    }
    stage.cluster.processes().restart("kube-apiserver").unwrap();
    eventually(SOON, || stage.kubectl("get --raw /readyz").ok()).unwrap();
    stage.kubectl("-n lost scale deployment web --replicas=3").ok().unwrap();
    let now = stage.until_targets("lost", &arn, 3);
    assert!(targets.is_subset(&now), "{targets:?} {now:?}");
    for name in ["webhook-a", "webhook-b"] {
        stage.ready(name).unwrap();
    }
    // If it took longer than the lease lasts, the leader has ended itself, as it must; it comes back as a pod does.
    for name in ["controller-a", "controller-b"] {
        if stage.cluster.processes().check(name).is_err() {
            stage.cluster.processes().restart(name).unwrap();
            stage.ready(name).unwrap();
        }
    }
}

#[test]
fn a_leader_that_stood_still_finds_another_one_and_ends_without_touching_a_target() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("paused", 2);
    let arn = stage.target_group("paused", 80, "ip");
    eventually(SOON, || stage.apply("paused", &binding(&arn)).ok()).unwrap();
    let targets = stage.until_targets("paused", &arn, 2);
    let (leader, other) = stage.leader();
    let processes = stage.cluster.processes();
    processes.pause(leader).unwrap();
    eventually(SOON, || {
        if stage.metric(other, "tgb_leader") == Some(1.0) { Ok(()) } else { Err("nobody took over") }
    })
    .unwrap();
    stage.kubectl("-n paused scale deployment web --replicas=3").ok().unwrap();
    let now = stage.until_targets("paused", &arn, 3);
    let calls = || {
        stage
            .aws
            .journal()
            .lines()
            .filter(|line| line.contains("DeregisterTargets") && line.contains("paused"))
            .count()
    };
    let before = calls();
    processes.resume(leader).unwrap();
    let status = processes.ended(leader, SOON).unwrap();
    assert_eq!(status.code(), Some(1), "{}", processes.log(leader));
    assert!(processes.log(leader).contains("the lease is lost"), "{}", processes.log(leader));
    assert_eq!((calls(), stage.targets(&arn)), (before, now.clone()));
    assert!(targets.is_subset(&now));
    processes.restart(leader).unwrap();
    stage.ready(leader).unwrap();
}

#[test]
fn a_leader_that_stops_hands_over_at_once_and_does_not_let_its_lease_run_out() {
    let _alone = alone();
    let stage = &*STAGE;
    let processes = stage.cluster.processes();
    let lasts = |flags: &[&str]| {
        for name in ["controller-a", "controller-b"] {
            processes.stop(name, SOON).unwrap();
            let spec = processes.spec(name).unwrap();
            processes.spawn(name, flags.iter().fold(spec, |spec, flag| spec.flag(flag))).unwrap();
            stage.ready(name).unwrap();
        }
    };
    // Whoever waited for its end would wait for a minute.
    lasts(&["--lease-duration=60s", "--lease-renew-deadline=40s", "--lease-retry-period=5s"]);
    let lease = stage.get_json(&format!("-n {NAMESPACE} get lease {NAME}-controller"));
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 60);
    let mut took = Vec::new();
    while took.len() < 5 {
        let (leader, other) = stage.leader();
        let begun = Instant::now();
        processes.terminate(leader).unwrap();
        eventually(SOON, || match stage.metric(other, "tgb_leader") {
            Some(1.0) => Ok(()),
            leads => Err(format!("{leads:?}")),
        })
        .unwrap();
        took.push(begun.elapsed());
        assert_eq!(processes.ended(leader, SOON).unwrap().code(), Some(0));
        processes.restart(leader).unwrap();
        stage.ready(leader).unwrap();
        // On a busy machine a measurement may fail, but not all of them.
        if took.last() < Some(&Duration::from_secs(2)) {
            break;
        }
    }
    eprintln!("another one leads {took:?} after SIGTERM");
    assert!(took.iter().all(|took| *took < Duration::from_secs(40)), "{took:?}");
    assert!(took.iter().any(|took| *took < Duration::from_secs(2)), "{took:?}");
    lasts(&["--lease-duration=15s", "--lease-renew-deadline=10s", "--lease-retry-period=2s"]);
    let wrong = ["run", "--cluster-name=demo", "--lease-duration=10s", "--lease-renew-deadline=10s"];
    let output = run_program("tgb-controller", &wrong, "").unwrap();
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(output.stderr.contains("--lease-renew-deadline (10 s) must be shorter"), "{}", output.stderr);
}

#[test]
fn a_second_installation_of_the_same_name_refuses_to_start() {
    let _alone = alone();
    let stage = &*STAGE;
    let (leader, other) = stage.leader();
    for (name, said) in [(leader, "\nleading\n"), (other, "\nstanding by for the lease\n")] {
        let answer = get(&stage.http(name), "/readyz?verbose").unwrap();
        assert!(answer.contains("[+] the caches are filled") && answer.contains(said), "{name}: {answer}");
    }
    let args =
        vec!["run".to_owned(), format!("--lease-namespace={NAMESPACE}"), "--lease-name=another".to_owned()];
    // The role of the release is for its own lease; another release has one for another.
    let kubeconfig = format!("--kubeconfig={}", stage.cluster.kubeconfig().display());
    stage.spawn("another", "tgb-controller", args, &[&kubeconfig]).unwrap();
    let status = stage.cluster.processes().ended("another", SOON).unwrap();
    let log = stage.cluster.processes().log("another");
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("error: ") && log.contains("demo") && log.contains(&format!("{NAME}-controller")),
        "{log}"
    );
}

#[test]
fn a_converter_that_somebody_took_out_is_put_back_where_it_was_and_otherwise_raises_an_alarm() {
    let _alone = alone();
    let stage = &*STAGE;
    let conversion = || stage.get_json(&format!("get crd {CRD}"))["spec"]["conversion"].clone();
    let before = conversion();
    let mut files = Mounted::new(stage.cluster.dir().join("alarm"));
    let authority = Authority::new("alarm");
    let made = authority.pair(2020, 2040);
    files.swap(&made.0, &made.1);
    configurations(stage, "alarm", &authority.pem);
    spawn_on_files(stage, "alarm", "files", &files.dir, &[]);
    stage.ready("alarm").unwrap();
    for name in ["webhook-a", "webhook-b"] {
        stage.cluster.processes().pause(name).unwrap();
    }
    let patch = r#"{"spec": {"conversion": {"strategy": "None", "webhook": null}}}"#;
    stage.cluster.kubectl(&["patch", "crd", CRD, "--type=merge", "-p", patch]).ok().unwrap();
    let alarm = eventually(SOON, || {
        let answer = get(&stage.http("alarm"), "/readyz?verbose")?;
        if answer.contains("without a conversion webhook") { Ok(()) } else { Err(answer) }
    });
    let still = conversion();
    for name in ["webhook-a", "webhook-b"] {
        stage.cluster.processes().resume(name).unwrap();
    }
    alarm.unwrap();
    assert_eq!(still["strategy"], "None", "only the mode self repairs");
    assert!(
        stage
            .cluster
            .processes()
            .log("alarm")
            .contains("several versions are served without a conversion webhook")
    );
    eventually(SOON, || if conversion() == before { Ok(()) } else { Err(conversion()) }).unwrap();
    assert!(stage.cluster.processes().stop("alarm", SOON).unwrap().success());
}

#[test]
fn traces_and_logs_tell_of_requests_conversions_passes_and_calls_of_aws() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("traced", 1);
    let arn = stage.target_group("traced", 80, "ip");
    let mut old = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 8080}}});
    // Through either replica: one logs JSON, the other text.
    let refused = |name: &str, other: &str| {
        assert!(stage.cluster.processes().stop(other, SOON).unwrap().success());
        stage.balancer.remove(other);
        stage.refused("traced", &old, "TGB204");
        let log = stage.cluster.processes().log(name);
        let line = log.lines().find(|line| line.contains("TGB204") && line.contains("traced/web"));
        stage.spawn_webhook(other, if other == "webhook-a" { &["--log-format=json"] } else { &[] }).unwrap();
        stage.ready(other).unwrap();
        line.unwrap_or_else(|| panic!("{name}: no line about the refusal in\n{log}")).to_owned()
    };
    let line: Value = serde_json::from_str(&refused("webhook-a", "webhook-b")).unwrap();
    let told = &line["fields"];
    assert_eq!((&told["object"], &told["arn"]), (&json!("traced/web"), &json!(arn)), "{line}");
    assert!(told["uid"].as_str().is_some_and(|uid| uid.len() == 36), "{line}");
    let line = refused("webhook-b", "webhook-a");
    assert!(line.contains("uid=") && line.contains(&arn), "{line}");
    old["spec"]["serviceRef"]["port"] = json!(80);
    eventually(SOON, || stage.apply("traced", &old).ok()).unwrap();
    stage.until_targets("traced", &arn, 1);
    let spans = [
        ["admission", "conversion", "tgb-webhook", "traced/web", &arn],
        ["reconcile", "RegisterTargets", "tgb-controller", "traced/web", &arn],
    ];
    for (collector, spans) in stage.collectors.iter().zip(spans) {
        for span in spans {
            eventually(SOON, || if collector.has(span) { Ok(()) } else { Err(span) }).unwrap();
        }
    }
    let (leader, _) = stage.leader();
    let log = stage.cluster.processes().log(leader);
    let told = log
        .lines()
        .any(|line| line.contains("traced/web") && line.contains(&arn) && line.contains("registered"));
    assert!(told, "{log}");
}

#[test]
fn the_roles_allow_what_was_done_and_nothing_else() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.cluster.namespace("everything", &BTreeMap::new()).unwrap();
    stage.kubectl("label namespace everything elbv2.k8s.aws/pod-readiness-gate-inject=enabled").ok().unwrap();
    stage.shop("everything", 0);
    stage.shop("shared", 1);
    // The authority is replaced in two phases: the Secret is written again.
    stage.forget_authority();
    let long = "a".repeat(64);
    // A Service that no cache has is looked for.
    let mut early = binding(&stage.target_group("early", 80, "ip"));
    early["spec"]["serviceRef"] = json!({"name": "later", "port": 80});
    eventually(SOON, || stage.apply("everything", &early).ok()).unwrap();
    stage.kubectl("-n everything delete tgb web --timeout=60s").ok().unwrap();
    let arn = stage.target_group("everything", 80, "ip");
    eventually(SOON, || stage.apply("everything", &binding(&arn)).ok()).unwrap();
    // TGB115 looks at the other binding before it refuses.
    let mut twin = binding(&arn);
    twin["metadata"]["name"] = json!("twin");
    stage.refused("everything", &twin, "TGB115");
    // TGB107 asks the namespace whether it injects, TGB118 whose targets are there already.
    let held = stage.target_group("held", 80, "ip");
    stage.aws(&format!("elbv2 register-targets --target-group-arn {held} --targets Id=10.244.0.200"));
    let mut named = binding(&held);
    named["metadata"]["name"] = json!(long);
    stage.refused("everything", &named, "TGB107");
    eventually(SOON, || {
        stage.kubectl("-n everything delete pods --all --wait=false").ok()?;
        stage.kubectl("-n everything scale deployment web --replicas=1").ok()?;
        let gates =
            stage.kubectl("-n everything get pods -o jsonpath={.items[*].spec.readinessGates}").ok()?;
        if gates.contains("target-health") { Ok(()) } else { Err(gates) }
    })
    .unwrap();
    stage.until_targets("everything", &arn, 1);
    let shared = stage.target_group("shared", 80, "ip");
    let mut object = binding(&shared);
    object["spec"]["targetGroup"]["sharing"] = json!("Shared");
    eventually(SOON, || stage.apply("shared", &object).ok()).unwrap();
    stage.until_targets("shared", &shared, 1);
    stage.kubectl("-n shared scale deployment web --replicas=2").ok().unwrap();
    stage.until_targets("shared", &shared, 2);
    stage.kubectl("-n shared delete service web").ok().unwrap();
    eventually(SOON, || {
        let events = stage.kubectl("-n shared get events.events.k8s.io -o name").ok()?;
        if events.is_empty() { Err("no events".to_owned()) } else { Ok(()) }
    })
    .unwrap();
    stage.kubectl("-n shared delete tgb web --timeout=60s").ok().unwrap();
    stage.kubectl("-n everything delete tgb web --timeout=60s").ok().unwrap();

    for program in ["webhook", "controller"] {
        let asked = stage.asked(program);
        // An API server that has just started again denies everything for a moment; what is denied for good is meant.
        let allowed: BTreeSet<_> =
            asked.iter().filter(|(_, _, code, _)| *code != 403).map(|(v, w, _, n)| (v, w, n)).collect();
        let denied: BTreeSet<_> =
            asked.iter().filter(|(_, _, code, _)| *code == 403).map(|(v, w, _, n)| (v, w, n)).collect();
        let denied: Vec<_> = denied.difference(&allowed).collect();
        assert!(denied.is_empty(), "{program}: {denied:?}");
        let used: BTreeSet<(&str, &str)> =
            asked.iter().map(|(verb, what, _, _)| (verb.as_str(), what.as_str())).collect();
        let mut unused = BTreeSet::new();
        let account = format!("{NAME}-{program}");
        for kind in ["clusterroles", "roles"] {
            let list = stage.get_json(&format!("get {kind} -A -l app.kubernetes.io/component={program}"));
            for role in list["items"].as_array().unwrap() {
                for rule in role["rules"].as_array().unwrap() {
                    let words = |key: &str| -> Vec<String> {
                        rule[key]
                            .as_array()
                            .unwrap()
                            .iter()
                            .map(|word| word.as_str().unwrap().to_owned())
                            .collect()
                    };
                    for resource in words("resources") {
                        for verb in words("verbs") {
                            // An event that repeats is patched; whether one does is a matter of time.
                            let is_chance = (verb.as_str(), resource.as_str()) == ("patch", "events");
                            if !is_chance && !used.contains(&(verb.as_str(), resource.as_str())) {
                                unused.insert(format!("{} {verb} {resource}", role["metadata"]["name"]));
                            }
                        }
                    }
                }
            }
        }
        assert!(unused.is_empty(), "{account} may do what it never did: {unused:#?}\nit did {used:#?}");
    }
}

/// Runs a program on a terminal: its first line is its process id, then comes what it shows.
const ON_A_TERMINAL: &str = "import fcntl, os, pty, struct, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
print(pid, flush=True)
while True:
    try:
        shown = os.read(terminal, 4096)
    except OSError:
        break
    if not shown:
        break
    sys.stdout.buffer.write(shown)
    sys.stdout.flush()
sys.exit(0 if os.waitpid(pid, 0)[1] == 0 else 1)
";

#[test]
fn a_migration_that_is_killed_is_started_again_and_loses_nothing() {
    let _alone = alone();
    let stage = &*STAGE;
    let count: usize = std::env::var("TGB_MIGRATE_OBJECTS").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    stage.shop("stored", 0);
    let arn = stage.target_group("stored", 80, "ip");
    let store = |version: &str| {
        let versions =
            stage.get_json(&format!("get crd {CRD}"))["spec"]["versions"].as_array().cloned().unwrap();
        let patch: Vec<Value> = (0..)
            .zip(&versions)
            .map(|(n, v)| json!({"op": "replace", "path": format!("/spec/versions/{n}/storage"), "value": v["name"] == version}))
            .collect();
        let patch = Value::Array(patch).to_string();
        stage.cluster.kubectl(&["patch", "crd", CRD, "--type=json", "-p", &patch]).ok().unwrap();
    };
    let stored = || {
        let versions = stage.get_json(&format!("get crd {CRD}"))["status"]["storedVersions"].clone();
        serde_json::from_value::<BTreeSet<String>>(versions).unwrap()
    };
    let (both, new) = (["v1", "v1beta1"].map(str::to_owned).into(), ["v1"].map(str::to_owned).into());
    let controller = built("tgb-controller").unwrap().display().to_string();
    let kubeconfig = stage.cluster.kubeconfig().display().to_string();
    let migrate = |more: &[&str]| {
        let args = [&["migrate-storage", "--kubeconfig", &kubeconfig][..], more].concat();
        let output = Command::new(&controller).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    store("v1beta1");
    // LBC's own, so that no controller of ours writes them meanwhile; the annotation says that we make them.
    let items: Vec<Value> = (0..count)
        .map(|n| {
            json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
            "metadata": {"name": format!("web-{n:04}"), "labels": {"ingress.k8s.aws/stack-name": "a"}},
            "spec": {"targetGroupARN": arn, "targetType": "ip", "multiClusterTargetGroup": true,
                "serviceRef": {"name": "web", "port": 80}}})
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
    let made = stage.cluster.kubectl_with(&["-n", "stored", "create", "-f", "-"], &list);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let bindings = || {
        let list = stage.get_json("-n stored get targetgroupbindings.v1.elbv2.k8s.aws");
        let items = list["items"].as_array().cloned().unwrap();
        let of = |object: &Value| {
            (
                object["metadata"]["name"].to_string(),
                (object["metadata"]["resourceVersion"].to_string(), object["spec"].clone()),
            )
        };
        items.iter().map(of).collect::<BTreeMap<_, _>>()
    };
    let before = bindings();
    assert_eq!(before.len(), count);
    store("v1");
    assert_eq!(stored(), both);
    assert!(migrate(&["--dry-run"]).contains("nothing was changed"));
    assert_eq!((stored(), bindings()), (BTreeSet::clone(&both), before.clone()));

    let mut terminal = Command::new(stage.cluster.programs().python("python"))
        .args(["-c", ON_A_TERMINAL, &controller, "migrate-storage", "--kubeconfig", &kubeconfig])
        .env("TERM", "xterm")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = terminal.stdout.take().unwrap();
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    let mut killed = false;
    while let Ok(length @ 1..) = shown.read(&mut buffer) {
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        let begun = (1..count).any(|n| text.contains(&format!(" {n}/")));
        if begun && !killed {
            let pid = text.lines().next().unwrap_or_default().trim().to_owned();
            killed = Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap().success();
        }
    }
    assert!(killed && !terminal.wait().unwrap().success(), "it was over, or showed no progress: {text}");
    assert_eq!(stored(), both, "nothing is dropped before the end");
    let midway = bindings();
    let written =
        midway.iter().filter(|(name, object)| before.get(*name).map(|b| &b.0) != Some(&object.0)).count();
    assert!(written < count, "it was to be killed before the end");
    assert!(migrate(&[]).contains("stored versions: v1"));
    assert_eq!(stored(), new);
    let after = bindings();
    let specs = |all: &BTreeMap<String, (String, Value)>| {
        all.iter().map(|(n, o)| (n.clone(), o.1.clone())).collect::<Vec<_>>()
    };
    assert_eq!(specs(&after), specs(&before));
    let untouched =
        after.iter().filter(|(name, object)| before.get(*name).map(|b| &b.0) == Some(&object.0)).count();
    assert_eq!(untouched, 0, "objects that nobody has written since are stored as before");
    // Once more: nothing is left to do, and no object is written in vain.
    migrate(&[]);
    assert_eq!(bindings(), after);
    stage.kubectl("delete namespace stored --wait=false").ok().unwrap();
}

#[test]
fn every_metric_of_the_alerts_the_dashboard_and_the_pages_is_there() {
    let _alone = alone();
    let stage = &*STAGE;
    stage.shop("measured", 1);
    let arn = stage.target_group("measured", 80, "ip");
    let mut old = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 8080}}});
    stage.refused("measured", &old, "TGB204");
    old["spec"]["serviceRef"]["port"] = json!(80);
    eventually(SOON, || stage.apply("measured", &old).ok()).unwrap();
    stage.until_targets("measured", &arn, 1);
    let names = |text: &str| -> BTreeSet<String> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let starts = text.match_indices("tgb_").filter(|(at, _)| !text[..*at].ends_with(word));
        let found = starts.map(|(at, _)| text[at..].split(|c| !word(c)).next().unwrap_or_default());
        // a log filter, and a name with a gap
        let found =
            found.filter(|name| !["tgb_", "tgb_webhook", "tgb_controller", "tgb_aws_"].contains(name));
        found.map(|name| name.trim_end_matches("_bucket").trim_end_matches("_total").to_owned()).collect()
    };
    let mut there = BTreeSet::new();
    for name in ["webhook-a", "webhook-b", "controller-a", "controller-b"] {
        let text = get(&stage.http(name), "/metrics").unwrap();
        there.extend(
            text.lines()
                .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned)),
        );
    }
    // Of these there is a sample only once it has happened.
    let seldom = ["tgb_aws_call_retries", "tgb_planned_changes", "tgb_readiness_gate_seconds"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for file in [
        "charts/targetgroupbinding/files/alerts.yaml",
        "charts/targetgroupbinding/files/dashboard.json",
        "docs/metrics.md",
        "docs/migration.md",
        "docs/troubleshooting.md",
    ] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let missing: Vec<String> = names(&text)
            .into_iter()
            .filter(|name| !there.contains(name) && !seldom.contains(&name.as_str()))
            .collect();
        assert!(missing.is_empty(), "{file} names what no program tells: {missing:?}\nthere are {there:?}");
    }
    let page = std::fs::read_to_string(root.join("docs/metrics.md")).unwrap();
    let told = names(&page);
    let untold: Vec<_> = there.difference(&told).collect();
    assert!(untold.is_empty(), "docs/metrics.md is silent about {untold:?}");
}
