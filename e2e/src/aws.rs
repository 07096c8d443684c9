//! An AWS to talk to, with a VPC, instances and security groups in it, and the real `aws` command line.

use crate::cluster::{Node, free_ports, shown};
use crate::programs::source_dir;
use crate::{Cluster, Output, Result, Spec, eventually, run};
use awsim::{DEFAULT_ACCOUNT, Server, Timing};
use serde::Deserialize;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// The region of everything.
pub(crate) const REGION: &str = "us-west-2";

/// An emulator on this machine and what was put there.
#[derive(Clone)]
pub struct Aws {
    server: Option<Arc<Server>>,
    endpoint: String,
    lab: Lab,
}

/// What is in the account before anything else happens.
#[derive(Debug, Clone, Deserialize)]
pub struct Lab {
    /// `vpc-…`
    pub vpc: String,
    /// Two subnets in different zones.
    pub subnets: Vec<String>,
    /// The security group of the nodes, tagged as the cluster's own.
    pub node_group: String,
    /// The security group of load balancers.
    pub lb_group: String,
    /// The nodes' instances: id, zone, address.
    pub instances: Vec<(String, String, std::net::Ipv4Addr)>,
}

impl Aws {
    /// Starts awsim, ours, in this process, and puts the lab there. Targets settle within seconds.
    ///
    /// # Errors
    /// When no port is free.
    pub fn awsim() -> Result<Self> {
        let timing = Timing {
            alb_registration_ms: 300,
            nlb_registration_ms: 1_000,
            check_interval_ms: Some(200),
            provisioning_ms: 0,
            ..Timing::default()
        };
        let options = awsim::Options { port: 0, timing, ..awsim::Options::default() };
        let server = Server::start(options).map_err(|error| format!("awsim does not start: {error}"))?;
        let cluster = awsim::Cluster { nodes: vec![node(0), node(1)], ..awsim::Cluster::default() };
        let lab = server.seed(DEFAULT_ACCOUNT, REGION, |aws| {
            aws.seed_cluster(&cluster);
            let instance = |node: &awsim::Node| {
                let made = aws.instances.get(&node.instance)?;
                Some((made.id.clone(), made.zone.clone(), made.private_ip?))
            };
            Lab {
                vpc: cluster.vpc.clone(),
                subnets: cluster.subnets.iter().take(2).cloned().collect(),
                node_group: cluster.node_group.clone(),
                lb_group: cluster.lb_group.clone(),
                instances: cluster.nodes.iter().filter_map(instance).collect(),
            }
        });
        Ok(Self { endpoint: server.endpoint(), lab, server: Some(Arc::new(server)) })
    }

    /// Starts moto, written by others, and puts the lab there.
    ///
    /// # Errors
    /// When moto does not start, with its last lines.
    pub fn moto(cluster: &Cluster) -> Result<Self> {
        let [port] = free_ports()?;
        let args = ["-H".to_owned(), "127.0.0.1".to_owned(), "-p".to_owned(), port.to_string()];
        let processes = cluster.processes();
        processes.spawn("moto", Spec::new(cluster.programs().python("moto_server"), args))?;
        eventually(Duration::from_secs(60), || {
            processes.check("moto")?;
            TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())
        })?;
        let endpoint = format!("http://127.0.0.1:{port}");
        let mut seed = Command::new(cluster.programs().python("python"));
        seed.arg(source_dir().join("seed_moto.py")).envs(environment(&endpoint));
        let text = run(&mut seed, "e2e/seed_moto.py".to_owned(), "").ok()?;
        let lab = serde_json::from_str(&text).map_err(|error| format!("e2e/seed_moto.py: {error}"))?;
        Ok(Self { endpoint, lab, server: None })
    }

    /// awsim's own side: journal, faults, health of targets. Nothing with moto.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_deref()
    }

    /// What was called since the start, a line per call; nothing with moto.
    pub fn journal(&self) -> String {
        let calls = self.server.iter().flat_map(|server| server.journal());
        calls.map(|call| format!("{call:?}\n")).collect()
    }

    /// The URL for `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What is there from the start.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The environment by which an AWS SDK finds this AWS.
    pub fn environment(&self) -> Vec<(String, String)> {
        environment(&self.endpoint)
    }

    /// The nodes that the instances are to a cluster.
    pub fn nodes(&self) -> Vec<Node> {
        let node = |(n, (instance, zone, ip)): (usize, &(String, String, std::net::Ipv4Addr))| Node {
            name: format!("node-{}", n + 1),
            instance: instance.clone(),
            zone: zone.clone(),
            ip: *ip,
            pod_cidr: format!("10.244.{n}.0/24"), // as the prefixes of its interface,
        };
        self.lab.instances.iter().enumerate().map(node).collect()
    }

    /// Runs the aws command line.
    pub fn cli(&self, cluster: &Cluster, args: &[&str]) -> Output {
        let mut command = Command::new(cluster.programs().python("aws"));
        command.envs(environment(&self.endpoint));
        run(command.args(args), shown("aws", args), "")
    }
}

/// A node with as many prefixes of addresses as it has pods at most.
fn node(n: u8) -> awsim::Node {
    let prefix = |m: u8| ipnet::Ipv4Net::new([10, 244, n, 16 * m].into(), 28).ok();
    awsim::Node {
        instance: format!("i-0a0000000000000{:02x}", n + 1),
        ip: Some([192, 168, 32 * n, 10].into()),
        subnet: usize::from(n),
        pod_prefixes: (0..16).filter_map(prefix).collect(),
        ..awsim::Node::default()
    }
}

fn environment(endpoint: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", REGION),
        ("AWS_DEFAULT_REGION", REGION),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_PAGER", ""),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}
