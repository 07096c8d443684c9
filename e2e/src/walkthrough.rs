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
        self.screen.title("A load balancer and three target groups, as somebody made them in AWS");
        let lab = self.aws.lab().clone();
        let mut balancer =
            vec!["elbv2", "create-load-balancer", "--name", "test-alb", "--security-groups", &lab.lb_group];
        balancer.push("--subnets");
        balancer.extend(lab.subnets.iter().map(String::as_str));
        let balancer = self.made(&balancer, "LoadBalancers[0].LoadBalancerArn")?;
        let mut network =
            vec!["elbv2", "create-load-balancer", "--name", "test-nlb", "--type", "network", "--subnets"];
        network.extend(lab.subnets.iter().map(String::as_str));
        let network = self.made(&network, "LoadBalancers[0].LoadBalancerArn")?;
        self.variables.insert("LB_SG", lab.lb_group.clone());
        self.variables.insert("LB_ARN", balancer.clone());
        for (variable, name, protocol, port, kind, listener) in [
            ("IP_ARN", "test-tg-ip", "HTTP", "80", "ip", Some((&balancer, "28080"))),
            ("INSTANCE_ARN", "test-tg-instance", "HTTP", "30001", "instance", Some((&balancer, "38080"))),
            ("NLB_ARN", "test-tg-nlb", "TCP", "9090", "ip", Some((&network, "9090"))),
            ("SPARE_ARN", "test-tg-spare", "HTTP", "30005", "instance", None),
        ] {
            let args =
                ["elbv2", "create-target-group", "--name", name, "--protocol", protocol, "--port", port];
            let args = [&args[..], &["--target-type", kind, "--vpc-id", &lab.vpc]].concat();
            let group = self.made(&args, "TargetGroups[0].TargetGroupArn")?;
            if let Some((balancer, port)) = listener {
                let forward = format!("Type=forward,TargetGroupArn={group}");
                let args =
                    ["elbv2", "create-listener", "--load-balancer-arn", balancer, "--protocol", protocol];
                let args = [&args[..], &["--port", port, "--default-actions", &forward]].concat();
                self.made(&args, "Listeners[0].[Protocol,Port]")?;
                // the default is five minutes
                let attribute = "Key=deregistration_delay.timeout_seconds,Value=5";
                let args = [
                    "elbv2",
                    "modify-target-group-attributes",
                    "--target-group-arn",
                    &group,
                    "--attributes",
                    attribute,
                ];
                self.made(&args, "Attributes[?Key=='deregistration_delay.timeout_seconds'].Value")?;
            }
            self.variables.insert(variable, group);
        }
        Ok(())
    }

    fn binds_pod_addresses(&mut self) -> Result<()> {
        self.screen.title("A Deployment of one replica; its pod becomes a target");
        self.apply("nginx.yaml").ok()?;
        self.kubectl(&["rollout", "status", "deployment/nginx-deployment", "--timeout=60s"]).ok()?;
        self.apply("ip.yaml").ok()?;
        self.kubectl(&["wait", "--for=condition=Ready", "tgb/my-tgb-alb-ip", "--timeout=60s"]).ok()?;
        self.pods_are_targets("IP_ARN", 80, 1)?;
        self.screen.title("The nodes' security group admits the load balancer to all TCP ports");
        let group = self.aws.lab().lb_group.clone();
        self.rules(&[("0", "65535", &group)])
    }

    fn binds_instances(&mut self) -> Result<()> {
        self.screen.title("A Service of type NodePort; the nodes become targets");
        self.apply("instance.yaml").ok()?;
        self.kubectl(&["wait", "--for=condition=Ready", "tgb/my-tgb-alb-instance", "--timeout=60s"]).ok()?;
        let want = self.aws.lab().instances.iter().map(|(id, ..)| (id.clone(), 30001)).collect();
        self.targets_are("INSTANCE_ARN", &want)
    }

    fn opens_ports_to_address_blocks(&mut self) -> Result<()> {
        self.screen.title("A network load balancer, whose clients are admitted by their addresses");
        self.apply("nlb.yaml").ok()?;
        self.pods_are_targets("NLB_ARN", 9090, 1)?;
        let group = self.aws.lab().lb_group.clone();
        let (blocks, all) = (["192.168.0.0/19", "192.168.32.0/19"], ("0", "65535", group.as_str()));
        self.rules(&[all, ("9090", "9090", blocks[0]), ("9090", "9090", blocks[1])])
    }

    fn scales(&mut self) -> Result<()> {
        self.screen.title("Four replicas, four targets");
        self.kubectl(&["scale", "deployment", "nginx-deployment", "--replicas", "4"]).ok()?;
        self.kubectl(&["rollout", "status", "deployment/nginx-deployment", "--timeout=60s"]).ok()?;
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
            let output = self.silent_kubectl(&["get", "targetgroupbindings"]);
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
        let kind = "targetgroupbindings.v1.elbv2.k8s.aws";
        let read =
            self.kubectl(&["get", kind, "my-tgb-alb-ip", "-o", "jsonpath={.spec.targetGroup}"]).json()?;
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
        self.kubectl(&["delete", "targetgroupbinding", "my-tgb-alb-ip", "--timeout=60s"]).ok()?;
        if self.fidelity == Fidelity::Full {
            let query = self.health("IP_ARN");
            let draining = self.silent_aws(&query);
            if draining.stdout.contains("draining") {
                self.screen.command(&draining);
            }
        }
        self.targets_are("IP_ARN", &BTreeSet::new())?;
        let group = self.aws.lab().lb_group.clone();
        let (blocks, port) = (["192.168.0.0/19", "192.168.32.0/19"], ("30001", "30001", group.as_str()));
        self.rules(&[port, ("9090", "9090", blocks[0]), ("9090", "9090", blocks[1])])?;
        let names = ["--query", "TargetGroups[].TargetGroupName", "--output", "text"];
        let groups =
            self.aws_command(&[&["elbv2", "describe-target-groups"][..], &names[..]].concat()).ok()?;
        let names = ["--query", "LoadBalancers[].LoadBalancerName", "--output", "text"];
        let balancers =
            self.aws_command(&[&["elbv2", "describe-load-balancers"][..], &names[..]].concat()).ok()?;
        if groups.contains("test-tg-ip") && balancers.contains("test-alb") {
            return Ok(());
        }
        Err(format!("the target group or the load balancer is gone: {groups} {balancers}"))
    }

    fn leaves_the_port_out(&mut self) -> Result<()> {
        self.screen.title("The same binding without a port: the Service's only one is filled in");
        self.apply("ip-without-port.yaml").ok()?;
        let path = "jsonpath={.spec.serviceRef}{\"\\n\"}";
        let filled = self.kubectl(&["get", "tgb", "my-tgb-alb-ip", "-o", path]).json()?;
        if filled.get("port") != Some(&serde_json::json!(80)) {
            return Err(format!("the port was not filled in: {filled}"));
        }
        self.pods_are_targets("IP_ARN", 80, 4)
    }

    /// Waits until a target group holds the addresses of all pods, with this port.
    fn pods_are_targets(&mut self, group: &str, port: u16, count: usize) -> Result<()> {
        let pods = eventually(SOON, || {
            let path = "jsonpath={.items[*].status.podIP}";
            let ips = self.silent_kubectl(&["get", "pods", "-l", "app=nginx", "-o", path]).ok()?;
            let ips: BTreeSet<(String, u16)> =
                ips.split_whitespace().map(|ip| (ip.to_owned(), port)).collect();
            if ips.len() == count { Ok(ips) } else { Err(format!("{} pods, not {count}", ips.len())) }
        })?;
        self.targets_are(group, &pods)
    }

    /// Waits until these are the targets, and healthy.
    fn targets_are(&mut self, group: &str, want: &BTreeSet<(String, u16)>) -> Result<()> {
        let query = self.health(group);
        let output = eventually(SOON, || {
            let output = self.silent_aws(&query);
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

    fn health(&self, group: &str) -> Vec<String> {
        let arn = self.variables.get(group).cloned().unwrap_or_default();
        let query = "TargetHealthDescriptions[].[Target.Id,Target.Port,TargetHealth.State]";
        ["elbv2", "describe-target-health", "--target-group-arn", &arn, "--query", query, "--output", "text"]
            .map(str::to_owned)
            .into()
    }

    /// Waits until these are the rules of ours in the nodes' security group: from port, to port, source.
    fn rules(&mut self, want: &[(&str, &str, &str)]) -> Result<()> {
        if self.fidelity == Fidelity::Moto {
            return Ok(());
        }
        let filter = format!("Name=group-id,Values={}", self.aws.lab().node_group);
        let query = "SecurityGroupRules[?!IsEgress].[FromPort,ToPort,ReferencedGroupInfo.GroupId||CidrIpv4,Description]";
        let args = [
            "ec2",
            "describe-security-group-rules",
            "--filters",
            &filter,
            "--query",
            query,
            "--output",
            "text",
        ];
        let args: Vec<String> = args.map(str::to_owned).into();
        let want: BTreeSet<Vec<&str>> =
            want.iter().map(|(from, to, source)| vec![*from, *to, *source]).collect();
        let output = eventually(SOON, || {
            let output = self.silent_aws(&args);
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

    /// Runs an aws command that makes something, and gives the text of what `query` finds in its answer.
    fn made(&mut self, args: &[&str], query: &str) -> Result<String> {
        let output = self.aws_command(&[args, &["--query", query, "--output", "text"]].concat());
        output.ok().map(|text| text.trim().to_owned())
    }

    fn aws_command(&mut self, args: &[&str]) -> Output {
        let output = self.aws.cli(self.cluster, args);
        self.screen.command(&output);
        output
    }

    fn silent_aws(&self, args: &[String]) -> Output {
        self.aws.cli(self.cluster, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn kubectl(&mut self, args: &[&str]) -> Output {
        let output = self.silent_kubectl(args);
        self.screen.command(&output);
        output
    }

    fn silent_kubectl(&self, args: &[&str]) -> Output {
        let mut output = self.cluster.kubectl(&[&["-n", self.namespace], args].concat());
        if self.namespace == "default" {
            output.command = shown("kubectl", args);
        }
        output
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
