//! An AWS to talk to, with a VPC, instances and security groups in it, and the real `aws` command line.

use crate::cluster::{Node, free_ports, shown};
use crate::programs::source_dir;
use crate::{Cluster, Output, Result, Spec, eventually, run};
use awsim::{Call, DEFAULT_ACCOUNT, Server, Timing};
use serde::Deserialize;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// The region of everything.
pub(crate) const REGION: &str = "us-west-2";
/// Who calls for tests and people, in contrast to the product.
pub const USER: &str = "USER";

/// An emulator on this machine and what was put there.
#[derive(Clone)]
pub struct Aws {
    server: Option<Arc<Server>>,
    endpoint: String,
    account: String,
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
    /// Starts awsim, ours, in this process, and puts the lab there. Targets settle within seconds. With `TGB_RECORD`, the
    /// name of a directory, every request and its answer is recorded there.
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
        if let Some(dir) = std::env::var_os("TGB_RECORD").map(std::path::PathBuf::from) {
            let name = std::env::current_exe()
                .ok()
                .and_then(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
            let port = server.address().port(); // a process may have several
            let path = dir.join(format!("{}-{port}.jsonl", name.unwrap_or_default()));
            let made = std::fs::create_dir_all(&dir).and_then(|()| server.record(&path));
            made.map_err(|error| format!("{}: no recording: {error}", path.display()))?;
        }
        Ok(Self::with_lab(Arc::new(server), DEFAULT_ACCOUNT))
    }

    /// Another account of the same awsim, with a lab of its own; nothing is shared with others.
    ///
    /// # Errors
    /// When this is moto, which has one account only.
    pub fn account_of(&self, number: u32) -> Result<Self> {
        let server = self.server.as_ref().ok_or("only awsim has accounts for single tests")?;
        Ok(Self::with_lab(Arc::clone(server), &format!("2{number:011}")))
    }

    fn with_lab(server: Arc<Server>, account: &str) -> Self {
        let cluster = awsim::Cluster { nodes: vec![node(0), node(1)], ..awsim::Cluster::default() };
        let lab = server.seed(account, REGION, |aws| {
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
        Self { endpoint: server.endpoint(), lab, server: Some(server), account: account.to_owned() }
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
        seed.arg(source_dir().join("seed_moto.py")).envs(environment(&endpoint, DEFAULT_ACCOUNT, USER));
        let text = run(&mut seed, "e2e/seed_moto.py".to_owned(), "").ok()?;
        let lab = serde_json::from_str(&text).map_err(|error| format!("e2e/seed_moto.py: {error}"))?;
        Ok(Self { endpoint, lab, server: None, account: DEFAULT_ACCOUNT.to_owned() })
    }

    /// awsim's own side: journal, faults, health of targets. Nothing with moto.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_deref()
    }

    /// The account: twelve digits.
    pub fn account(&self) -> &str {
        &self.account
    }

    /// What was called in this account since the start, the oldest first; nothing with moto.
    pub fn calls(&self) -> Vec<Call> {
        self.server.iter().flat_map(|server| server.journal_of(&self.account)).collect()
    }

    /// The same, a line per call, for people.
    pub fn journal(&self) -> String {
        let line = |call: &Call| {
            let (what, code) = (&call.action, call.code.as_deref().unwrap_or("ok"));
            let who = call.caller.rsplit('/').next().unwrap_or_default();
            let parameters = call.parameters.iter().map(|(name, value)| format!(" {name}={value}"));
            format!(
                "{:9.3} s {who} {what}{} -> {} {code}\n",
                Duration::from_micros(call.real_us).as_secs_f64(),
                parameters.collect::<String>(),
                call.status
            )
        };
        self.calls().iter().map(line).collect()
    }

    /// The URL for `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What is there from the start.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The environment by which an AWS SDK finds this AWS and account, as this user (capital letters); the journal of
    /// awsim has the user's name.
    pub fn environment(&self, user: &str) -> Vec<(String, String)> {
        environment(&self.endpoint, &self.account, user)
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
        command.envs(self.environment(USER));
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

fn environment(endpoint: &str, account: &str, user: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", REGION),
        ("AWS_DEFAULT_REGION", REGION),
        ("AWS_ACCESS_KEY_ID", &format!("AKIA{account}{user}")),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_PAGER", ""),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}
