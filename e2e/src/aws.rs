//! An AWS to talk to, with a VPC, instances and security groups in it, and the real `aws` command line.

use crate::cluster::{Node, free_ports, shown};
use crate::product::built;
use crate::programs::source_dir;
use crate::{Cluster, Output, Result, Spec, eventually, run};
use serde::Deserialize;
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

/// The region of everything.
pub(crate) const REGION: &str = "us-west-2";

/// An emulator on this machine and what was put there.
#[derive(Debug, Clone)]
pub struct Aws {
    name: &'static str,
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
    /// Starts awsim, ours, and puts the lab there.
    ///
    /// # Errors
    /// When awsim does not start, with its last lines.
    pub fn awsim(cluster: &Cluster) -> Result<Self> {
        let [port] = free_ports()?;
        let args = [format!("--listen=127.0.0.1:{port}")];
        Self::start(cluster, "awsim", Spec::new(built("awsim")?, args), port)
    }

    /// Starts moto, written by others, and puts the lab there.
    ///
    /// # Errors
    /// When moto does not start, with its last lines.
    pub fn moto(cluster: &Cluster) -> Result<Self> {
        let [port] = free_ports()?;
        let args = ["-H".to_owned(), "127.0.0.1".to_owned(), "-p".to_owned(), port.to_string()];
        Self::start(cluster, "moto", Spec::new(cluster.programs().python("moto_server"), args), port)
    }

    fn start(cluster: &Cluster, name: &'static str, spec: Spec, port: u16) -> Result<Self> {
        let processes = cluster.processes();
        processes.spawn(name, spec)?;
        eventually(Duration::from_secs(60), || {
            processes.check(name)?;
            TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())
        })?;
        let endpoint = format!("http://127.0.0.1:{port}");
        let mut seed = Command::new(cluster.programs().python("python"));
        seed.arg(source_dir().join("seed.py")).arg(name).envs(environment(&endpoint));
        let text = run(&mut seed, format!("e2e/seed.py {name}"), "").ok()?;
        let lab = serde_json::from_str(&text).map_err(|error| format!("e2e/seed.py: {error}"))?;
        Ok(Self { name, endpoint, lab })
    }

    /// The name of its process: `awsim` or `moto`.
    pub fn name(&self) -> &'static str {
        self.name
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
            pod_cidr: format!("10.244.{n}.0/24"), // as seed.py has it,
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
