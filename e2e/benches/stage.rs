//! What everything is measured on: a real control plane, awsim, and between them our programs or the peer.

use crate::machine;
use crate::peer::{self, Peer};
use crate::table::Side;
use std::time::{Duration, Instant};
use tgb_e2e::{Aws, Cluster, Options, Product, Result, Settings, free_ports, get};
use tokio::time::sleep;

/// How long a program may take to get ready, to end, and to lead.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program<'a> {
    /// Its name among the processes.
    pub name: &'a str,
    /// Where `/readyz` is, `HOST:PORT`.
    pub probes: &'a str,
}

/// Who is measured.
#[derive(Debug)]
enum Subject {
    Ours(Product),
    /// One program with both jobs.
    Peer(Peer),
}

/// See above.
pub(crate) struct Stage {
    /// The control plane.
    pub cluster: Cluster,
    /// awsim.
    pub aws: Aws,
    subject: Subject,
}

impl Stage {
    /// Starts all of it; `controller` are flags of our controller.
    pub(crate) fn start(side: Side, controller: &[&str]) -> Result<Self> {
        let settings = Settings {
            controller: controller.iter().map(|flag| (*flag).to_owned()).collect(),
            ..Settings::default()
        };
        let start = || {
            let cluster = Cluster::start(Options::default())?;
            let aws = Aws::awsim()?;
            cluster.nodes(&aws.nodes())?;
            if side == Side::Peer {
                let subject = Subject::Peer(Peer::start(&cluster, &aws)?);
                let stage = Self { cluster, aws, subject };
                stage.until_ready(stage.controller()).map_err(|error| stage.explain(error))?;
                return Ok(stage);
            }
            let product = Product::start(&cluster, &aws, &settings)?;
            // Nothing stands between the controller and the API server.
            cluster.kubeconfig_of(
                tgb_e2e::NAMESPACE,
                "tgb-targetgroupbinding-controller",
                cluster.server(),
            )?;
            product.controller().stop()?;
            product.controller().restart()?;
            product.controller().until_ready(PATIENCE)?;
            Ok(Self { cluster, aws, subject: Subject::Ours(product) })
        };
        // The harness has a runtime of its own, which must not be used within ours.
        std::thread::scope(|scope| scope.spawn(start).join())
            .map_err(|_| "the stage was not set".to_owned())?
    }

    /// Whose it is.
    pub(crate) fn side(&self) -> Side {
        if self.peer().is_some() { Side::Peer } else { Side::Ours }
    }

    /// The peer, if it is measured here.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match &self.subject {
            Subject::Ours(_) => None,
            Subject::Peer(peer) => Some(peer),
        }
    }

    /// What answers admission reviews.
    pub(crate) fn webhook(&self) -> Program<'_> {
        match &self.subject {
            Subject::Ours(product) => {
                Program { name: product.webhook().name(), probes: product.webhook().http() }
            }
            Subject::Peer(peer) => peer.program(),
        }
    }

    /// What calls AWS.
    pub(crate) fn controller(&self) -> Program<'_> {
        match &self.subject {
            Subject::Ours(product) => {
                Program { name: product.controller().name(), probes: product.controller().http() }
            }
            Subject::Peer(peer) => peer.program(),
        }
    }

    /// The id of a process.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        self.cluster.processes().pid(name).unwrap_or_default()
    }

    /// The resident memory of a program and its highest so far, bytes.
    pub(crate) fn memory(&self, program: Program<'_>) -> (f64, f64) {
        let (now, peak) = machine::memory(self.pid(program.name));
        (now as f64, peak as f64)
    }

    /// The controller's flag with which a change never waits for AWS's allowance: what is measured is the program.
    pub(crate) fn no_limits(&self) -> &'static str {
        match self.side() {
            Side::Ours => {
                "--aws-limit=elb=400/400,elb-describe=400/400,elb-targets=400/400,ec2-describe=400/400,ec2-change=400/400"
            }
            Side::Peer => peer::NO_LIMITS,
        }
    }

    /// Waits until `/readyz` of a program says so.
    pub(crate) fn until_ready(&self, program: Program<'_>) -> Result<()> {
        let begun = Instant::now();
        // as quick as can be: what is measured is some milliseconds
        while !get(program.probes, "/readyz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            self.cluster.processes().check(program.name)?;
            if begun.elapsed() > PATIENCE {
                return Err(format!("{} is not ready after a minute", program.name));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Starts a program again and waits until it is ready: how long that took.
    pub(crate) fn restart(&self, program: Program<'_>) -> Result<Duration> {
        let processes = self.cluster.processes();
        processes.stop(program.name, PATIENCE)?;
        let begun = Instant::now();
        processes.restart(program.name)?;
        self.until_ready(program)?;
        Ok(begun.elapsed())
    }

    /// Starts another controller beside the one that runs, and waits until it is ready.
    pub(crate) fn another(&self, other: Program<'_>) -> Result<()> {
        let processes = self.cluster.processes();
        let spec = processes.spec(self.controller().name).ok_or("no controller")?;
        match &self.subject {
            Subject::Ours(_) => {
                processes.spawn(other.name, spec.flag(&format!("--http-listen={}", other.probes)))?;
                self.until_ready(other)
            }
            Subject::Peer(peer) => {
                let [webhook, metrics] = free_ports()?;
                processes.spawn(other.name, peer.flags(spec, other.probes, webhook, metrics))?;
                self.until_ready(other)?;
                // as the Service in front of both, once the first is gone
                peer.publish(&self.cluster, webhook)
            }
        }
    }

    /// Starts the controller by `start` and waits until it leads. Ours does so once it is ready; the peer waits until the
    /// lease has run out that another did not give back.
    pub(crate) async fn lead<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(peer) = self.peer() else { return start() };
        let before = peer.leader(&self.cluster);
        let started = start()?;
        let begun = Instant::now();
        while [String::new(), before.clone()].contains(&peer.leader(&self.cluster)) {
            self.cluster.processes().check(peer.program().name)?;
            if begun.elapsed() > PATIENCE {
                return Err("it does not lead after a minute".to_owned());
            }
            sleep(Duration::from_millis(250)).await;
        }
        Ok(started)
    }

    /// An error, after what the peer said last if it is measured.
    pub(crate) fn explain(&self, error: String) -> String {
        let Some(peer) = self.peer() else { return error };
        let log = self.cluster.processes().log(peer.program().name);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(15)..].join("\n");
        let last = if error.contains(&last) { String::new() } else { format!("{last}\n") };
        format!("{last}{error}\nthe peer's figures could not be taken: PEER={}", peer.path.display())
    }
}
