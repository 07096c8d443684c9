//! One control plane and one awsim for all tests of a binary; each test has a namespace, an AWS account with a VPC and
//! nodes, a webhook and a controller of its own.

use crate::aws::{REGION, USER};
use crate::cluster::shown;
use crate::product::Part;
use crate::{Aws, Cluster, Options, Output, Product, Result, Scope, Settings, eventually};
use awsim::{Call, Fault, Probe, Rule, Server, Service, TargetRow, Timing};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

/// What the tests of a binary share.
pub struct World {
    /// The control plane.
    pub cluster: Cluster,
    /// The AWS, with the account that the product of this world uses.
    pub aws: Aws,
    /// The running product. In [`World::shared`] it only converts.
    pub product: Product,
    scope: Scope,
}

/// How a world is started.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// The control plane.
    pub cluster: Options,
    /// The product.
    pub product: &'a Settings,
    /// Starts the AWS: `|_| Aws::awsim()` or [`Aws::moto`].
    pub aws: fn(&Cluster) -> Result<Aws>,
}

impl World {
    /// The world of this process, started by whoever asks first: nothing but conversion is shared, tests have their own
    /// spaces.
    ///
    /// # Errors
    /// What kept it from starting, for everybody who asks.
    pub fn shared() -> Result<&'static Self> {
        static WORLD: OnceLock<Result<World>> = OnceLock::new();
        let start = || {
            let product = Settings { scope: Scope::Conversion, ..Settings::default() };
            let cluster = Options { audit: true, ..Options::default() };
            Self::start(&Setup { cluster, product: &product, aws: |_| Aws::awsim() })
        };
        WORLD.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    /// A control plane with two nodes, an AWS and a product with these settings.
    ///
    /// # Errors
    /// What does not start.
    pub fn start(setup: &Setup<'_>) -> Result<Self> {
        let reachable = setup.cluster.reachable || setup.product.by_own_address;
        let cluster = Cluster::start(Options { reachable, ..setup.cluster })?;
        let aws = (setup.aws)(&cluster)?;
        cluster.nodes(&aws.nodes())?;
        let product = Product::start(&cluster, &aws, setup.product)?;
        Ok(Self { cluster, aws, product, scope: setup.product.scope.clone() })
    }

    /// A namespace of this name (at most 20 characters) for one test, with an account, a webhook and a controller. If the
    /// test fails, everything about it is printed.
    ///
    /// # Errors
    /// When there is one already, or something does not start.
    pub fn space(&self, name: &str) -> Result<Space<'_>> {
        self.prepare(name).start()
    }

    /// The same, to be adjusted first.
    pub fn prepare(&self, name: &str) -> Prepare<'_> {
        Prepare {
            world: self,
            name: name.to_owned(),
            namespaces: vec![name.to_owned()],
            labels: BTreeMap::new(),
            settings: Settings::default(),
            account: None,
        }
    }

    /// Everything about namespaces, the processes and an account, for whoever looks for the cause of a failure.
    pub fn report(&self, namespaces: &[String], processes: &[String], aws: &Aws) -> String {
        let mut report = self.cluster.report(namespaces, processes);
        let journal = aws.journal();
        let calls: Vec<&str> = journal.lines().collect();
        let skipped = calls.len().saturating_sub(200);
        report.push_str(&format!("--- calls of AWS, {skipped} older ones left out\n"));
        report.push_str(&calls.get(skipped..).unwrap_or_default().join("\n"));
        if let Some(server) = aws.server() {
            let of_this =
                |fault: &Fault| fault.account.as_deref().is_none_or(|account| account == aws.account());
            for fault in server.faults().iter().filter(|fault| of_this(fault)) {
                report.push_str(&format!("\n--- a fault that goes on: {fault:?}"));
            }
            let groups: Vec<String> =
                server.seed(aws.account(), REGION, |aws| aws.target_groups.keys().cloned().collect());
            for group in groups {
                report.push_str(&format!("\n--- {group}"));
                for target in server.targets(aws.account(), REGION, &group) {
                    report.push_str(&format!("\n{target:?}"));
                }
            }
        }
        report.push('\n');
        report
    }
}

/// A [`Space`] that isn't there yet.
#[derive(Clone)]
pub struct Prepare<'a> {
    world: &'a World,
    name: String,
    namespaces: Vec<String>,
    labels: BTreeMap<String, String>,
    settings: Settings,
    account: Option<Aws>,
}

impl<'a> Prepare<'a> {
    /// A flag of the controller, `--name=value`; it wins over the harness's.
    #[must_use]
    pub fn controller(mut self, flag: &str) -> Self {
        self.settings.controller.push(flag.to_owned());
        self
    }

    /// A flag of the webhook.
    #[must_use]
    pub fn webhook(mut self, flag: &str) -> Self {
        self.settings.webhook.push(flag.to_owned());
        self
    }

    /// A `--set` value of the chart, `name=value`.
    #[must_use]
    pub fn value(mut self, value: &str) -> Self {
        self.settings.values.push(value.to_owned());
        self
    }

    /// A label of its namespaces.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Pods get readiness gates for the bindings of their Services.
    #[must_use]
    pub fn with_readiness_gates(self) -> Self {
        self.label("elbv2.k8s.aws/pod-readiness-gate-inject", "enabled")
    }

    /// An account that others use, too, instead of one of its own.
    #[must_use]
    pub fn account(mut self, aws: &Aws) -> Self {
        self.account = Some(aws.clone());
        self
    }

    /// One more namespace that this test's controller and webhook look after.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespaces.push(name.to_owned());
        self
    }

    /// Makes it.
    ///
    /// # Errors
    /// When there is one already, or something does not start.
    pub fn start(mut self) -> Result<Space<'a>> {
        static ACCOUNTS: AtomicU32 = AtomicU32::new(1);
        let world = self.world;
        let is_adjusted = self.namespaces.len() > 1
            || [&self.settings.controller, &self.settings.webhook, &self.settings.values]
                .iter()
                .any(|settings| !settings.is_empty());
        if world.scope == Scope::Everywhere && is_adjusted {
            return Err(format!(
                "{}: the product of this world looks after everything; use World::shared",
                self.name
            ));
        }
        for namespace in &self.namespaces {
            world.cluster.namespace(namespace, &self.labels)?;
        }
        let (aws, product) = if world.scope == Scope::Everywhere {
            (world.aws.clone(), None)
        } else {
            let own = || world.aws.account_of(ACCOUNTS.fetch_add(1, Ordering::Relaxed));
            let aws = self.account.take().map_or_else(own, Ok)?;
            self.settings.scope =
                Scope::Namespaces { name: self.name.clone(), namespaces: self.namespaces.clone() };
            let product = Product::start(&world.cluster, &aws, &self.settings)?;
            (aws, Some(product))
        };
        Ok(Space {
            world,
            name: self.name,
            namespaces: self.namespaces,
            aws,
            product,
            groups: AtomicU32::new(0),
        })
    }
}

/// A namespace of a test, its account and its processes. They end with it.
pub struct Space<'a> {
    world: &'a World,
    name: String,
    namespaces: Vec<String>,
    aws: Aws,
    product: Option<Product>,
    groups: AtomicU32,
}

impl Space<'_> {
    /// Its namespace, the first if there are several.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its account.
    pub fn aws(&self) -> &Aws {
        &self.aws
    }

    /// What it runs in.
    pub fn cluster(&self) -> &Cluster {
        &self.world.cluster
    }

    fn product(&self) -> &Product {
        self.product.as_ref().unwrap_or(&self.world.product)
    }

    /// Its webhook.
    pub fn webhook(&self) -> Part<'_> {
        self.product().webhook()
    }

    /// Its controller.
    pub fn controller(&self) -> Part<'_> {
        self.product().controller()
    }

    /// Runs kubectl in the namespace; words with blanks between them.
    pub fn kubectl(&self, line: &str) -> Output {
        self.kubectl_with(&line.split_whitespace().collect::<Vec<_>>(), "")
    }

    /// Runs kubectl in the namespace with arguments that may hold blanks, and standard input.
    pub fn kubectl_with(&self, args: &[&str], stdin: &str) -> Output {
        self.world.cluster.kubectl_with(&[&["-n", &self.name], args].concat(), stdin)
    }

    /// Applies a manifest, YAML or JSON.
    pub fn apply(&self, manifest: &(impl Display + ?Sized)) -> Output {
        let text = manifest.to_string();
        let mut output = self.kubectl_with(&["apply", "-f", "-"], &text);
        output.command = format!("{} <<'EOF'\n{text}\nEOF", shown("kubectl", &["apply", "-f", "-"]));
        output
    }

    /// A binding `name` (v1) to the Service of the same name; `more` is added to its spec. It isn't applied.
    pub fn binding(&self, name: &str, arn: &str, more: &Value) -> Value {
        let mut spec = json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": name}});
        if let (Some(spec), Some(more)) = (spec.as_object_mut(), more.as_object()) {
            spec.extend(more.clone());
        }
        json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": name}, "spec": spec})
    }

    /// Applies [`Self::binding`].
    ///
    /// # Errors
    /// When it is refused.
    pub fn bind(&self, name: &str, arn: &str, more: &Value) -> Result<()> {
        self.apply(&self.binding(name, arn, more)).ok().map(drop)
    }

    /// A Deployment and a Service of it, both `name`, whose port 80 leads to the pods' 8080; waits for the pods' addresses.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn deploy(&self, name: &str, replicas: usize) -> Result<()> {
        self.apply(&format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: {name}}}, spec: {{replicas: {replicas}, \
             selector: {{matchLabels: {{app: {name}}}}}, template: {{metadata: {{labels: {{app: {name}}}}}, \
             spec: {{containers: [{{name: web, image: web}}]}}}}}}}}\n---\n\
             {{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{selector: {{app: {name}}}, \
             ports: [{{name: http, port: 80, targetPort: 8080}}]}}}}"
        ))
        .ok()?;
        // All of what the product will look at: the pods, and the slices that tell of them.
        eventually(SOON, || {
            let pods = self.pods(name, 8080)?;
            let listed = self.listed(name)?;
            let all = pods.len() == replicas && listed.len() == replicas;
            if all { Ok(()) } else { Err(format!("{pods:?}, in slices {listed:?}, not {replicas} pods")) }
        })
    }

    /// The addresses of a Service in its endpoint slices, those that are not ready, too.
    fn listed(&self, service: &str) -> Result<BTreeSet<String>> {
        let line = format!("get endpointslices -l kubernetes.io/service-name={service} -o json");
        let slices = self.kubectl(&line).json()?;
        let list = |value: &Value, path: &str| {
            value.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default()
        };
        let endpoints = list(&slices, "/items").into_iter().flat_map(|slice| list(&slice, "/endpoints"));
        let addresses = endpoints.flat_map(|endpoint| list(&endpoint, "/addresses"));
        Ok(addresses.filter_map(|address| address.as_str().map(str::to_owned)).collect())
    }

    /// A Deployment of so many pods and a Service, both `web`, bound to a target group (HTTP, ip) that a load balancer
    /// serves, and waits until the pods are its targets; gives the target group's ARN. Where most tests begin.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn shop(&self, replicas: usize) -> Result<String> {
        let arn = self.target_group("HTTP", 80, "ip")?;
        self.attach(&arn)?;
        self.deploy("web", replicas)?;
        self.bind("web", &arn, &json!({}))?;
        self.until_pods_are_targets(&arn, "web", replicas)?;
        Ok(arn)
    }

    /// Makes the Service `name` a NodePort one and gives the port of the nodes.
    ///
    /// # Errors
    /// When there is no such Service.
    pub fn node_port(&self, name: &str) -> Result<u16> {
        self.kubectl_with(&["patch", "service", name, "-p", r#"{"spec": {"type": "NodePort"}}"#], "").ok()?;
        let port =
            self.kubectl(&format!("get service {name} -o jsonpath={{.spec.ports[0].nodePort}}")).ok()?;
        port.parse().map_err(|error| format!("nodePort {port:?}: {error}"))
    }

    /// The addresses of the pods of `name` that are not going, with a port: `IP:PORT`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn pods(&self, name: &str, port: u16) -> Result<BTreeSet<String>> {
        let pods = self.kubectl(&format!("get pods -l app={name} -o json")).json()?;
        let items = pods.get("items").and_then(Value::as_array).into_iter().flatten();
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let ips = items
            .filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none())
            .filter_map(|pod| text(pod.pointer("/status/podIP")));
        Ok(ips.map(|ip| format!("{ip}:{port}")).collect())
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

    /// Waits until a condition of an object has this status, and gives its reason.
    ///
    /// # Errors
    /// What it is at the end.
    pub fn until_condition(&self, object: &str, kind: &str, want: &str) -> Result<String> {
        eventually(SOON, || match self.condition(object, kind)? {
            (status, reason) if status == want => Ok(reason),
            other => Err(format!("{object} {kind}: {other:?}, not {want}")),
        })
    }

    /// Runs aws; words with blanks between them. It takes a second: most of what a test needs is below, in microseconds.
    pub fn aws_cli(&self, line: &str) -> Output {
        self.aws.cli(&self.world.cluster, &line.split_whitespace().collect::<Vec<_>>())
    }

    /// awsim itself.
    ///
    /// # Errors
    /// When this is moto.
    pub fn server(&self) -> Result<&Server> {
        self.aws.server().ok_or_else(|| "moto can't do this".to_owned())
    }

    /// Makes an ELBv2 or EC2 call as a user of the account; gives the XML. Its calls are not among [`Self::calls`].
    ///
    /// # Errors
    /// What AWS answers.
    pub fn call(&self, action: &str, parameters: &[(&str, &str)]) -> Result<String> {
        let is_ec2 =
            ["Security", "Instance", "NetworkInterface", "Vpc", "Subnet"].iter().any(|w| action.contains(w));
        let service = if is_ec2 { Service::Ec2 } else { Service::Elb };
        let answer = self.server()?.call((self.aws.account(), USER), REGION, service, action, parameters);
        answer.map_err(|error| format!("{action}: {} {}: {}", error.status, error.code, error.message))
    }

    /// Makes a target group that is attached to no load balancer, so that its targets are `unused`; gives its ARN.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn target_group(&self, protocol: &str, port: u16, target_type: &str) -> Result<String> {
        self.target_group_with(protocol, port, target_type, &[])
    }

    /// The same with more parameters of `CreateTargetGroup`, as `("IpAddressType", "ipv6")`.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn target_group_with(
        &self,
        protocol: &str,
        port: u16,
        target_type: &str,
        more: &[(&str, &str)],
    ) -> Result<String> {
        let name = format!("{}-{}", self.name, self.groups.fetch_add(1, Ordering::Relaxed));
        let port = port.to_string();
        let mut parameters = vec![
            ("Name", name.as_str()),
            ("Protocol", protocol),
            ("Port", &port),
            ("TargetType", target_type),
            ("VpcId", &self.aws.lab().vpc),
        ];
        parameters.extend(more);
        element(&self.call("CreateTargetGroup", &parameters)?, "TargetGroupArn")
    }

    /// Makes a load balancer with a listener that forwards to the target group, so that checks of its targets begin;
    /// gives the load balancer's ARN. Its kind follows from the target group's protocol.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn attach(&self, arn: &str) -> Result<String> {
        let found = self.server()?.seed(self.aws.account(), REGION, |aws| {
            let group = aws.target_groups.get(arn)?;
            Some((group.name.clone(), group.protocol.clone()?, group.ip_type.clone(), group.port?))
        });
        let (name, protocol, ip_type, port) =
            found.ok_or_else(|| format!("there is no target group {arn}"))?;
        let is_web = protocol.starts_with("HTTP");
        let lab = self.aws.lab();
        let subnets: Vec<(String, &String)> =
            lab.subnets.iter().enumerate().map(|(n, id)| (format!("Subnets.member.{}", n + 1), id)).collect();
        let mut parameters = vec![
            ("Name", name.as_str()),
            ("Type", if is_web { "application" } else { "network" }),
            ("IpAddressType", if ip_type == "ipv6" { "dualstack" } else { "ipv4" }),
        ];
        parameters.extend(subnets.iter().map(|(name, id)| (name.as_str(), id.as_str())));
        if is_web {
            parameters.push(("SecurityGroups.member.1", &lab.lb_group));
        }
        let balancer = element(&self.call("CreateLoadBalancer", &parameters)?, "LoadBalancerArn")?;
        let (port, protocol) =
            (port.to_string(), if protocol == "HTTPS" { "HTTP" } else { protocol.as_str() });
        let mut listener = vec![
            ("LoadBalancerArn", balancer.as_str()),
            ("Protocol", protocol),
            ("Port", &port),
            ("DefaultActions.member.1.Type", "forward"),
            ("DefaultActions.member.1.TargetGroupArn", arn),
        ];
        if protocol == "TLS" {
            listener.push((
                "Certificates.member.1.CertificateArn",
                "arn:aws:acm:us-west-2:123456789012:certificate/1",
            ));
        }
        self.call("CreateListener", &listener)?;
        Ok(balancer)
    }

    /// [`Self::target_group`] and [`Self::attach`]: what most tests need.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn served_target_group(&self, protocol: &str, port: u16, target_type: &str) -> Result<String> {
        let arn = self.target_group(protocol, port, target_type)?;
        self.attach(&arn)?;
        Ok(arn)
    }

    /// Sets an attribute of a target group, as `deregistration_delay.timeout_seconds`.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn attribute(&self, arn: &str, key: &str, value: &str) -> Result<()> {
        let parameters =
            [("TargetGroupArn", arn), ("Attributes.member.1.Key", key), ("Attributes.member.1.Value", value)];
        self.call("ModifyTargetGroupAttributes", &parameters).map(drop)
    }

    /// Registers a target (or with `DeregisterTargets` takes it away), as somebody else would: `ID:PORT`.
    ///
    /// # Errors
    /// What AWS answers.
    pub fn change_target(&self, action: &str, arn: &str, target: &str) -> Result<()> {
        let (id, port) = target.rsplit_once(':').ok_or_else(|| format!("{target} is not ID:PORT"))?;
        let parameters =
            [("TargetGroupArn", arn), ("Targets.member.1.Id", id), ("Targets.member.1.Port", port)];
        self.call(action, &parameters).map(drop)
    }

    /// All targets of a target group with their states, the draining ones, too.
    ///
    /// # Errors
    /// When this is moto.
    pub fn health(&self, arn: &str) -> Result<Vec<TargetRow>> {
        Ok(self.server()?.targets(self.aws.account(), REGION, arn))
    }

    /// What a target group holds, without what is draining: `ID:PORT`.
    ///
    /// # Errors
    /// When this is moto.
    pub fn targets(&self, arn: &str) -> Result<BTreeSet<String>> {
        let there = self.health(arn)?.into_iter().filter(|target| target.state != "draining");
        Ok(there.map(|target| format!("{}:{}", target.id, target.port)).collect())
    }

    /// Waits until a target group holds these, beside what is draining.
    ///
    /// # Errors
    /// What it holds at the end.
    pub fn until_targets(&self, arn: &str, want: &BTreeSet<String>) -> Result<()> {
        eventually(SOON, || {
            let there = self.targets(arn)?;
            if there == *want { Ok(()) } else { Err(format!("targets {there:?}, not {want:?}")) }
        })
    }

    /// Waits until a target group holds `count` pods of `name` on port 8080 and nothing else.
    ///
    /// # Errors
    /// What it holds at the end.
    pub fn until_pods_are_targets(&self, arn: &str, name: &str, count: usize) -> Result<()> {
        eventually(SOON, || {
            let (there, pods) = (self.targets(arn)?, self.pods(name, 8080)?);
            if there == pods && pods.len() == count {
                Ok(())
            } else {
                Err(format!("{there:?}, pods {pods:?}"))
            }
        })
    }

    /// Sets what health checks of a target find; id `*` is every target there is. Gives how many targets there are.
    ///
    /// # Errors
    /// When this is moto.
    pub fn set_health(&self, arn: &str, id: &str, probe: &Probe) -> Result<usize> {
        Ok(self.server()?.set_health(self.aws.account(), REGION, arn, id, None, probe))
    }

    /// Reads or changes what is in the account directly: instances, interfaces, security groups with chosen ids.
    ///
    /// # Errors
    /// When this is moto.
    pub fn seed<R>(&self, change: impl FnOnce(&mut awsim::Aws) -> R) -> Result<R> {
        Ok(self.server()?.seed(self.aws.account(), REGION, change))
    }

    /// How long things take in this account.
    ///
    /// # Errors
    /// When this is moto.
    pub fn timing(&self, change: impl FnOnce(&mut Timing)) -> Result<()> {
        self.seed(|aws| change(&mut aws.timing))
    }

    /// Moves the simulated clock of this account: health checks, draining and token buckets go by it.
    ///
    /// # Errors
    /// When this is moto.
    pub fn advance(&self, by: Duration) -> Result<()> {
        self.server()?.advance(Some(self.aws.account()), by);
        Ok(())
    }

    /// Makes calls of this account fail.
    ///
    /// # Errors
    /// When this is moto.
    pub fn fault(&self, fault: Fault) -> Result<()> {
        self.server()?.fault(fault.account(self.aws.account()));
        Ok(())
    }

    /// Takes the faults of this account away.
    ///
    /// # Errors
    /// When this is moto.
    pub fn clear_faults(&self) -> Result<()> {
        self.server()?.clear_faults_of(self.aws.account());
        Ok(())
    }

    /// Throttles this account as AWS does, or no longer; its buckets are full then.
    ///
    /// # Errors
    /// When this is moto.
    pub fn throttle(&self, on: bool) -> Result<()> {
        self.server()?.throttle(Some(self.aws.account()), on);
        Ok(())
    }

    /// Makes a security group in the VPC with these tags; gives its id.
    ///
    /// # Errors
    /// When this is moto.
    pub fn security_group(&self, name: &str, tags: &[(&str, &str)]) -> Result<String> {
        let vpc = self.aws.lab().vpc.clone();
        let tags = tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.seed(|aws| {
            let id = aws.new_id("sg");
            aws.add_security_group(&id, &vpc, name, tags);
            id
        })
    }

    /// The inbound rules of a security group.
    ///
    /// # Errors
    /// When this is moto.
    pub fn rules(&self, group: &str) -> Result<Vec<Rule>> {
        self.seed(|aws| {
            let rules = aws.security_groups.get(group).into_iter().flat_map(|group| &group.rules);
            rules.filter(|rule| !rule.egress).cloned().collect()
        })
    }

    /// What the product has called in this account, the oldest first: neither this harness nor the command line.
    pub fn calls(&self) -> Vec<Call> {
        let mut calls = self.aws.calls();
        calls.retain(|call| !call.caller.ends_with(&format!("/{USER}")));
        calls
    }

    /// How many of [`Self::calls`] are of this action.
    pub fn count(&self, action: &str) -> usize {
        self.calls().iter().filter(|call| call.action == action).count()
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.world.report(&self.namespaces, &self.product().names(), &self.aws));
        }
        for name in self.product.iter().flat_map(Product::names) {
            // it may have ended already
            let _ = self.world.cluster.processes().kill(&name);
        }
    }
}

/// The text of the first element of this name.
fn element(xml: &str, name: &str) -> Result<String> {
    let inside = xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once('<'));
    inside.map(|(text, _)| text.to_owned()).ok_or_else(|| format!("no {name} in {xml}"))
}
