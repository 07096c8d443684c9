//! The product's main job from a user's seat, with the commands that a user types: `make demo` shows it, a test runs
//! it. Every step checks what it has shown.

use crate::cluster::shown;
use crate::programs::source_dir;
use crate::{Aws, Cluster, Output, Result, eventually};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// For what AWS or the controller need a moment.
const SOON: Duration = Duration::from_secs(60);

/// Who watches.
pub trait Screen {
    /// What the next commands are about.
    fn title(&mut self, text: &str);
    /// A command that was run, and its output.
    fn command(&mut self, output: &Output);
}

/// Watches nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Screen for Silent {
    fn title(&mut self, _: &str) {}
    fn command(&mut self, _: &Output) {}
}

/// What the emulator can express.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fidelity {
    /// States, draining, network interfaces by prefix: everything.
    Full,
    /// moto: a registered target is healthy at once, and pods' addresses belong to no network interface, so that no
    /// rules can be made for them.
    Moto,
}

/// Runs all steps in `namespace`, which is to be there.
///
/// # Errors
/// The first step that did not end as it should, with its last output.
pub fn run(
    cluster: &Cluster,
    aws: &Aws,
    namespace: &str,
    fidelity: Fidelity,
    screen: &mut dyn Screen,
) -> Result<()> {
    let mut user = User { cluster, aws, namespace, fidelity, screen, variables: BTreeMap::new() };
    user.prepares_aws()?;
    user.binds_pod_addresses()?;
    user.binds_instances()?;
    user.opens_ports_to_address_blocks()?;
    user.scales()?;
    user.is_refused()?;
    user.looks_around()?;
    user.deletes()?;
    user.leaves_the_port_out()
}

struct User<'a> {
    cluster: &'a Cluster,
    aws: &'a Aws,
    namespace: &'a str,
    fidelity: Fidelity,
    screen: &'a mut dyn Screen,
    /// What the manifests' `${…}` stand for.
    variables: BTreeMap<&'static str, String>,
}

impl User<'_> {
    fn prepares_aws(&mut self) -> Result<()> {
        self.screen.title("Load balancers and target groups, as somebody makes them in AWS");
        let lab = self.aws.lab().clone();
        let subnets = lab.subnets.join(" ");
        self.variables.extend([
            ("LB_SG", lab.lb_group),
            ("NODE_SG", lab.node_group),
            ("VPC", lab.vpc.clone()),
        ]);
        let exports = self.variables.iter().map(|(name, value)| format!(" {name}={value}"));
        let command = format!("export{}", exports.collect::<String>());
        self.screen.command(&Output { command, code: 0, stdout: String::new(), stderr: String::new() });
        let made = "LoadBalancers[0].LoadBalancerArn";
        let balancer = format!("--subnets {subnets} --security-groups {}", self.variable("LB_SG"));
        self.made("ALB_ARN", &format!("elbv2 create-load-balancer --name test-alb {balancer}"), made)?;
        let balancer = format!("--type network --subnets {subnets}");
        self.made("NLB_ARN", &format!("elbv2 create-load-balancer --name test-nlb {balancer}"), made)?;
        for (group, name, protocol, port, kind, balancer, listener) in [
            ("IP_ARN", "test-tg-ip", "HTTP", 80, "ip", "ALB_ARN", 28080),
            ("INSTANCE_ARN", "test-tg-instance", "HTTP", 30001, "instance", "ALB_ARN", 38080),
            ("CIDR_ARN", "test-tg-cidr", "TCP", 9090, "ip", "NLB_ARN", 9090),
            ("SPARE_ARN", "test-tg-spare", "HTTP", 30005, "instance", "ALB_ARN", 48080),
        ] {
            let line = format!("--name {name} --protocol {protocol} --port {port} --target-type {kind}");
            let line = format!("elbv2 create-target-group {line} --vpc-id {}", lab.vpc);
            self.made(group, &line, "TargetGroups[0].TargetGroupArn")?;
            let (arn, balancer) = (self.variable(group), self.variable(balancer));
            let line = format!("--load-balancer-arn {balancer} --protocol {protocol} --port {listener}");
            let line = format!("{line} --default-actions Type=forward,TargetGroupArn={arn}");
            self.aws(&format!("elbv2 create-listener {line} --query Listeners[0].Port")).ok()?;
            // five minutes otherwise
            let line = "--attributes Key=deregistration_delay.timeout_seconds,Value=5";
            self.ask_aws(&format!("elbv2 modify-target-group-attributes --target-group-arn {arn} {line}"))
                .ok()?;
        }
        Ok(())
    }

    fn binds_pod_addresses(&mut self) -> Result<()> {
        self.screen.title("A Deployment of one replica; its pod becomes a target");
        self.apply("nginx.yaml").ok()?;
        self.kubectl("rollout status deployment/nginx-deployment --timeout=60s").ok()?;
        self.apply("ip.yaml").ok()?;
        self.kubectl("wait --for=condition=Ready tgb/my-tgb-alb-ip --timeout=60s").ok()?;
        self.pods_are_targets("IP_ARN", 80, 1)?;
        self.screen.title("The nodes' security group admits the load balancer to all TCP ports");
        let group = self.aws.lab().lb_group.clone();
        self.rules(&[("0", "65535", &group)])
    }

    fn binds_instances(&mut self) -> Result<()> {
        self.screen.title("A Service of type NodePort; the nodes become targets");
        self.apply("instance.yaml").ok()?;
        self.kubectl("wait --for=condition=Ready tgb/my-tgb-alb-instance --timeout=60s").ok()?;
        let want = self.aws.lab().instances.iter().map(|(id, ..)| (id.clone(), 30001)).collect();
        self.targets_are("INSTANCE_ARN", &want)
    }

    fn opens_ports_to_address_blocks(&mut self) -> Result<()> {
        self.screen.title("A network load balancer, whose clients are admitted by their addresses");
        self.apply("nlb.yaml").ok()?;
        self.pods_are_targets("CIDR_ARN", 9090, 1)?;
        let group = self.aws.lab().lb_group.clone();
        let (blocks, all) = (["192.168.0.0/19", "192.168.32.0/19"], ("0", "65535", group.as_str()));
        self.rules(&[all, ("9090", "9090", blocks[0]), ("9090", "9090", blocks[1])])
    }

    fn scales(&mut self) -> Result<()> {
        self.screen.title("Four replicas, four targets");
        self.kubectl("scale deployment nginx-deployment --replicas 4").ok()?;
        self.kubectl("rollout status deployment/nginx-deployment --timeout=60s").ok()?;
        self.pods_are_targets("IP_ARN", 80, 4)
    }

    fn is_refused(&mut self) -> Result<()> {
        self.screen.title("What cannot work is refused, with the reason");
        for (file, rule) in [("target-type", "TGB111"), ("node-port", "TGB206"), ("port", "TGB204")] {
            let message = self.apply(&format!("refused/{file}.yaml")).refused()?;
            if !message.contains(rule) {
                return Err(format!(
                    "refused/{file}.yaml was refused for another reason than {rule}: {message}"
                ));
            }
        }
        Ok(())
    }

    fn looks_around(&mut self) -> Result<()> {
        self.screen.title("What is bound, and how it is");
        let counted = eventually(SOON, || {
            let output = self.ask_kubectl("get targetgroupbindings");
            let table = output.clone().ok()?;
            let line = table.lines().find(|line| line.starts_with("my-tgb-alb-ip ")).unwrap_or_default();
            let cells: Vec<&str> = line.split_whitespace().collect();
            let head: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
            let columns = ["NAME", "SERVICE-NAME", "SERVICE-PORT", "TARGET-TYPE", "READY", "TARGETS", "AGE"];
            let want = ["my-tgb-alb-ip", "nginx-tgb-svc-alb-ip", "80", "ip", "True", "4/4"];
            if head == columns && cells.get(..6) == Some(&want[..]) { Ok(output) } else { Err(table) }
        })?;
        self.screen.command(&counted);
        self.screen.title("The manifest was v1beta1; v1 of it, with what was filled in");
        let (kind, path) = ("targetgroupbindings.v1.elbv2.k8s.aws", "jsonpath={.spec.targetGroup}{\"\\n\"}");
        let read = self.kubectl(&format!("get {kind} my-tgb-alb-ip -o {path}")).json()?;
        let arn = self.variables.get("IP_ARN").map_or("", String::as_str);
        let (vpc, want) =
            (self.aws.lab().vpc.as_str(), |key: &str| read.get(key).and_then(|value| value.as_str()));
        if (want("arn"), want("protocol"), want("ipAddressType"), want("vpcID"))
            != (Some(arn), Some("HTTP"), Some("ipv4"), Some(vpc))
        {
            return Err(format!("v1 of my-tgb-alb-ip is not what was written: {read}"));
        }
        Ok(())
    }

    fn deletes(&mut self) -> Result<()> {
        self.screen.title("Deleting a binding takes its targets and rules away, nothing else");
        self.kubectl("delete targetgroupbinding my-tgb-alb-ip --timeout=60s").ok()?;
        let draining = self.health("IP_ARN");
        if draining.stdout.contains("draining") {
            self.screen.command(&draining);
        }
        self.targets_are("IP_ARN", &BTreeSet::new())?;
        let group = self.aws.lab().lb_group.clone();
        let (blocks, port) = (["192.168.0.0/19", "192.168.32.0/19"], ("30001", "30001", group.as_str()));
        self.rules(&[port, ("9090", "9090", blocks[0]), ("9090", "9090", blocks[1])])?;
        let query = "--query TargetGroups[].TargetGroupName --output text";
        let groups = self.aws(&format!("elbv2 describe-target-groups {query}")).ok()?;
        let query = "--query LoadBalancers[].LoadBalancerName --output text";
        let balancers = self.aws(&format!("elbv2 describe-load-balancers {query}")).ok()?;
        if groups.contains("test-tg-ip") && balancers.contains("test-alb") {
            return Ok(());
        }
        Err(format!("the target group or the load balancer is gone: {groups} {balancers}"))
    }

    fn leaves_the_port_out(&mut self) -> Result<()> {
        self.screen.title("The same binding without a port: the Service's only one is filled in");
        self.apply("ip-without-port.yaml").ok()?;
        let path = "jsonpath={.spec.serviceRef}{\"\\n\"}";
        let filled = self.kubectl(&format!("get tgb my-tgb-alb-ip -o {path}")).json()?;
        if filled.get("port") != Some(&serde_json::json!(80)) {
            return Err(format!("the port was not filled in: {filled}"));
        }
        self.pods_are_targets("IP_ARN", 80, 4)
    }

    /// Waits until a target group holds the addresses of all pods, with this port.
    fn pods_are_targets(&mut self, group: &str, port: u16, count: usize) -> Result<()> {
        let pods = eventually(SOON, || {
            let path = "jsonpath={.items[*].status.podIP}";
            let ips = self.ask_kubectl(&format!("get pods -l app=nginx -o {path}")).ok()?;
            let ips: BTreeSet<(String, u16)> =
                ips.split_whitespace().map(|ip| (ip.to_owned(), port)).collect();
            if ips.len() == count { Ok(ips) } else { Err(format!("{} pods, not {count}", ips.len())) }
        })?;
        self.targets_are(group, &pods)
    }

    /// Waits until these are the targets, and healthy.
    fn targets_are(&mut self, group: &str, want: &BTreeSet<(String, u16)>) -> Result<()> {
        let output = eventually(SOON, || {
            let output = self.health(group);
            let text = output.clone().ok()?;
            let mut there = BTreeSet::new();
            for line in text.lines() {
                let cells: Vec<&str> = line.split_whitespace().collect();
                let (Some(id), Some(port), Some(state)) = (cells.first(), cells.get(1), cells.get(2)) else {
                    continue;
                };
                if *state != "healthy" {
                    return Err(format!("{id}:{port} is {state}"));
                }
                there.insert(((*id).to_owned(), port.parse().unwrap_or_default()));
            }
            if there == *want { Ok(output) } else { Err(format!("targets are {there:?}, not {want:?}")) }
        })?;
        self.screen.command(&output);
        Ok(())
    }

    fn health(&self, group: &str) -> Output {
        let query = "TargetHealthDescriptions[].[Target.Id,Target.Port,TargetHealth.State]";
        let line = format!("--target-group-arn {} --query {query}", self.variable(group));
        self.ask_aws(&format!("elbv2 describe-target-health {line} --output text"))
    }

    /// Waits until these are the rules of ours in the nodes' security group: from port, to port, source.
    fn rules(&mut self, want: &[(&str, &str, &str)]) -> Result<()> {
        if self.fidelity == Fidelity::Moto {
            return Ok(());
        }
        let query = "SecurityGroupRules[?!IsEgress].[FromPort,ToPort,ReferencedGroupInfo.GroupId||CidrIpv4,Description]";
        let line = format!("--filters Name=group-id,Values={} --query {query}", self.variable("NODE_SG"));
        let line = format!("ec2 describe-security-group-rules {line} --output text");
        let want: BTreeSet<Vec<&str>> =
            want.iter().map(|(from, to, source)| vec![*from, *to, *source]).collect();
        let output = eventually(SOON, || {
            let output = self.ask_aws(&line);
            let text = output.clone().ok()?;
            let mut there = BTreeSet::new();
            for line in text.lines().filter(|line| !line.trim().is_empty()) {
                if !line.contains("elbv2.k8s.aws/targetGroupBinding=shared") {
                    return Err(format!("a rule without our description: {line}"));
                }
                there.insert(line.split_whitespace().take(3).collect::<Vec<_>>());
            }
            if there == want { Ok(output) } else { Err(format!("rules are {there:?}, not {want:?}")) }
        })?;
        self.screen.command(&output);
        Ok(())
    }

    /// Runs an aws command that makes something, and keeps what `query` finds in its answer as a variable.
    fn made(&mut self, variable: &'static str, line: &str, query: &str) -> Result<()> {
        let mut output = self.ask_aws(&format!("{line} --query {query} --output text"));
        output.command = format!("export {variable}=$({}); echo ${variable}", output.command);
        self.screen.command(&output);
        let value = output.ok()?.trim().to_owned();
        self.variables.insert(variable, value);
        Ok(())
    }

    /// Runs an aws command, given as words with blanks between them, and shows it.
    fn aws(&mut self, line: &str) -> Output {
        let output = self.ask_aws(line);
        self.screen.command(&output);
        output
    }

    /// The same, not shown; in its command stand the variables that its user would have typed.
    fn ask_aws(&self, line: &str) -> Output {
        let mut output = self.aws.cli(self.cluster, &line.split_whitespace().collect::<Vec<_>>());
        for (name, value) in &self.variables {
            output.command = output.command.replace(value, &format!("${name}"));
        }
        output
    }

    /// Runs kubectl, given as words with blanks between them, and shows it.
    fn kubectl(&mut self, line: &str) -> Output {
        let output = self.ask_kubectl(line);
        self.screen.command(&output);
        output
    }

    fn ask_kubectl(&self, line: &str) -> Output {
        let args: Vec<&str> = line.split_whitespace().collect();
        let mut output = self.cluster.kubectl(&[&["-n", self.namespace], &args[..]].concat());
        output.command = shown("kubectl", &args);
        output
    }

    fn variable(&self, name: &str) -> String {
        self.variables.get(name).cloned().unwrap_or_default()
    }

    /// Applies a manifest of `e2e/demo` with the variables filled in.
    fn apply(&mut self, file: &str) -> Output {
        let path = source_dir().join("demo").join(file);
        let mut text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => format!("{}: {error}", path.display()),
        };
        for (name, value) in &self.variables {
            text = text.replace(&format!("${{{name}}}"), value);
        }
        if self.fidelity == Fidelity::Moto
            && let Some((before, _)) = text.split_once("  networking:")
        {
            text = before.to_owned();
        }
        let mut output = self.cluster.kubectl_with(&["-n", self.namespace, "apply", "-f", "-"], &text);
        output.command = format!("envsubst < e2e/demo/{file} | kubectl apply -f -");
        self.screen.command(&output);
        output
    }
}
