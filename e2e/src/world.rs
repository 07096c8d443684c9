//! One control plane, AWS and product for all tests of a binary, and a namespace with its own target groups per test.

use crate::cluster::shown;
use crate::{Aws, Cluster, Options, Output, Product, Result, Settings, eventually};
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// What the tests of a binary share.
pub struct World {
    /// The control plane.
    pub cluster: Cluster,
    /// awsim.
    pub aws: Aws,
    /// The running product.
    pub product: Product,
}

impl World {
    /// The world of this process, started by whoever asks first.
    ///
    /// # Errors
    /// What kept it from starting, for everybody who asks.
    pub fn shared() -> Result<&'static Self> {
        static WORLD: OnceLock<Result<World>> = OnceLock::new();
        WORLD.get_or_init(Self::start).as_ref().map_err(Clone::clone)
    }

    fn start() -> Result<Self> {
        let cluster = Cluster::start(Options { audit: true, ..Options::default() })?;
        let aws = Aws::awsim()?;
        cluster.nodes(&aws.nodes())?;
        let product = Product::start(&cluster, &aws, &Settings::default())?;
        Ok(Self { cluster, aws, product })
    }

    /// A namespace of this name, for one test. If the test fails, everything about it is printed.
    ///
    /// # Errors
    /// When there is one already, or it does not become ready.
    pub fn space(&self, name: &str) -> Result<Space<'_>> {
        self.cluster.namespace(name)?;
        Ok(Space { world: self, name: name.to_owned() })
    }
}

/// A namespace of a test.
pub struct Space<'a> {
    world: &'a World,
    name: String,
}

impl Space<'_> {
    /// Runs kubectl in the namespace; words with blanks between them.
    pub fn kubectl(&self, line: &str) -> Output {
        let args: Vec<&str> = line.split_whitespace().collect();
        self.world.cluster.kubectl(&[&["-n", &self.name], &args[..]].concat())
    }

    /// Applies a manifest.
    pub fn apply(&self, yaml: &str) -> Output {
        let mut output = self.world.cluster.kubectl_with(&["-n", &self.name, "apply", "-f", "-"], yaml);
        output.command = format!("{} <<'EOF'\n{yaml}\nEOF", shown("kubectl", &["apply", "-f", "-"]));
        output
    }

    /// Makes a target group, named after the namespace, and gives its ARN. It is attached to no load balancer.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn target_group(&self, protocol: &str, port: u16, target_type: &str) -> Result<String> {
        let line = format!("--name {}-{port} --protocol {protocol} --port {port}", self.name);
        let line = format!("{line} --target-type {target_type} --vpc-id {}", self.world.aws.lab().vpc);
        let query = "--query TargetGroups[0].TargetGroupArn --output text";
        let line = format!("elbv2 create-target-group {line} {query}");
        Ok(self.aws(&line).ok()?.trim().to_owned())
    }

    /// Runs aws; words with blanks between them.
    pub fn aws(&self, line: &str) -> Output {
        self.world.aws.cli(&self.world.cluster, &line.split_whitespace().collect::<Vec<_>>())
    }

    /// What a target group holds, without what is draining: `ID:PORT`.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn targets(&self, arn: &str) -> Result<BTreeSet<String>> {
        let query = "TargetHealthDescriptions[?TargetHealth.State!='draining'].[Target.Id,Target.Port]";
        let line = format!("elbv2 describe-target-health --target-group-arn {arn} --query {query}");
        let text = self.aws(&format!("{line} --output text")).ok()?;
        Ok(text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(":")).collect())
    }

    /// A Deployment and a Service of it, both `name`, whose port 80 leads to the pods' 8080; waits for the pods.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn deploy(&self, name: &str, replicas: usize) -> Result<()> {
        self.apply(&format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: {name}}}, spec: {{replicas: {replicas}, \
             selector: {{matchLabels: {{app: {name}}}}}, template: {{metadata: {{labels: {{app: {name}}}}}, \
             spec: {{containers: [{{name: web, image: web}}]}}}}}}}}\n---\n\
             {{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{selector: {{app: {name}}}, \
             ports: [{{port: 80, targetPort: 8080}}]}}}}"
        ))
        .ok()?;
        eventually(SOON, || {
            let ready = self
                .kubectl(&format!("get deployment {name} -o jsonpath={{.status.updatedReplicas}}"))
                .ok()?;
            if ready == replicas.to_string() {
                Ok(())
            } else {
                Err(format!("{ready:?} of {replicas} replicas"))
            }
        })
    }

    /// The addresses of the pods of `name` that are not going, with a port: `IP:PORT`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn pods(&self, name: &str, port: u16) -> Result<BTreeSet<String>> {
        let pods =
            self.kubectl(&format!("get pods -l app={name} -o jsonpath={{.items[*].status.podIP}}")).ok()?;
        Ok(pods.split_whitespace().map(|ip| format!("{ip}:{port}")).collect())
    }

    /// The status of a condition of an object (`tgb/web`): `True`, `False`, `Unknown` or nothing, and its reason.
    ///
    /// # Errors
    /// When there is no such object.
    pub fn condition(&self, object: &str, kind: &str) -> Result<(String, String)> {
        let path = format!(
            "jsonpath={{range.status.conditions[?(@.type==\"{kind}\")]}}{{.status}}/{{.reason}}{{end}}"
        );
        let text = self.kubectl(&format!("get {object} -o {path}")).ok()?;
        let (status, reason) = text.split_once('/').unwrap_or_default();
        Ok((status.to_owned(), reason.to_owned()))
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let of_this_test = |line: &&str| line.contains(&self.name);
            let journal = self.world.aws.journal();
            let calls: Vec<&str> = journal.lines().filter(of_this_test).collect();
            let report = self.world.cluster.report(&self.name, &["tgb-webhook", "tgb-controller"]);
            eprintln!("{report}--- calls of AWS that name {}\n{}", self.name, calls.join("\n"));
        }
    }
}
