//! A real control plane, an AWS to talk to, and the product between them, as processes on this machine.
//!
//! # How to add a scenario
//! Write a test in `e2e/tests/scenarios.rs`, or in the file of its subject; the tests of a file share one control plane
//! and one awsim ([`World::shared`]), so don't make another file lightly. A test is a sentence and has a [`Space`]: a
//! namespace, an AWS account with a VPC and two nodes, a webhook and a controller of its own, with the roles of the chart.
//! So it may kill, pause, throttle, deny and reconfigure without disturbing others, and runs beside them.
//!
//! ```no_run
//! use awsim::{Effect, Fault, Probe};
//! use serde_json::json;
//! use std::time::Duration;
//! use tgb_e2e::World;
//! # fn main() -> tgb_e2e::Result<()> {
//! let world = World::shared()?;
//! let space = world.space("scaling")?; // prints everything about it if the test fails
//! let arn = space.served_target_group("HTTP", 80, "ip")?; // with a load balancer, so that targets become healthy
//! space.deploy("web", 4)?; // a Deployment and a Service
//! space.bind("web", &arn, &json!({}))?; // `more` of the spec: json!({"networking": …})
//! space.until_pods_are_targets(&arn, "web", 4)?;
//!
//! // AWS: single targets, faults, limits, time; all of this account only
//! space.set_health(&arn, "*", &Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() })?;
//! space.fault(Fault::new(Effect::LostResponse).action("RegisterTargets").times(1))?;
//! space.throttle(true)?;
//! space.attribute(&arn, "deregistration_delay.timeout_seconds", "30")?;
//! space.advance(Duration::from_secs(30))?;
//! assert!(space.count("RegisterTargets") > 0); // what the product called, without this harness
//!
//! // processes: kill, pause, resume, stop, restart, other flags, metrics, logs, the network in between
//! space.controller().restart_with(&["--health-poll=1s"])?;
//! space.webhook().link()?.hold(); // slow, cut, open
//!
//! // adjusted before it starts
//! let gated = world.prepare("gated").with_readiness_gates().controller("--health-poll=1s").start()?;
//! # drop(gated);
//! # Ok(())
//! # }
//! ```
//! - Instance targets: `let port = space.node_port("web")?`, then bind a target group of the type `instance`; the nodes are
//!   `space.aws().lab().instances`. Security groups: [`Space::security_group`], [`Space::rules`], and `seed` for anything
//!   else that an account can hold.
//! - One more namespace under the same controller: `prepare("a").namespace("b")`; a controller that looks after all
//!   namespaces as in production, or a control plane with other flags: [`World::start`], in a file of its own.
//! - Whoever kills or pauses the API server or etcd disturbs all tests of the file: put that into `tests/control_plane.rs`.
//! - `make e2e` runs all; `cargo test --workspace --test scenarios NAME` one, after `cargo build --workspace --bins`.
//! - Nothing sleeps: [`eventually`] waits for a condition with a deadline and says at the end what was still wrong.
//! - `TGB_KEEP=1` keeps the directory with the logs of all processes.
//!
//! Where the programs come from: [`Programs`].

mod aws;
mod balancer;
mod cluster;
mod gate;
mod link;
mod process;
mod product;
mod programs;
pub mod runbook;
pub mod walkthrough;
mod world;

pub use aws::{Aws, Lab, USER};
pub use balancer::Balancer;
pub use cluster::{Cluster, Node, Options, free_ports, own_address};
pub use gate::Gate;
pub use link::Link;
pub use process::{Processes, Spec};
pub use product::{CLUSTER_NAME, NAMESPACE, Part, Product, Scope, Settings, built, get, run_program};
pub use programs::Programs;
pub use world::{Prepare, Setup, Space, World};

use std::fmt::Debug;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What went wrong, as one line for people.
pub type Result<T> = std::result::Result<T, String>;

/// What kubectl says when a server, or the webhook behind it, was not there to decide.
const UNDECIDED: [&str; 7] = [
    "failed calling webhook",
    "conversion webhook for",
    "Unable to connect",
    "was refused - ",
    "request timed out",
    "in the time allotted",
    "context deadline exceeded",
];

/// What a command has printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The command as a user would type it.
    pub command: String,
    /// The exit code; -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that succeeded.
    ///
    /// # Errors
    /// The command and its standard error if it failed.
    pub fn ok(self) -> Result<String> {
        if self.code == 0 { Ok(self.stdout) } else { Err(format!("$ {}\n{}", self.command, self.stderr)) }
    }

    /// The standard error of a command that must be refused: by a decision, not by a server that was away.
    ///
    /// # Errors
    /// The command and its output if it succeeded, or if nobody decided.
    pub fn refused(self) -> Result<String> {
        let undecided = UNDECIDED.iter().any(|said| self.stderr.contains(said));
        self.failed("to be refused", !undecided)
    }

    /// The standard error of a command that must fail because who decides about it is away.
    ///
    /// # Errors
    /// The command and its output if it succeeded, or if somebody decided.
    pub fn undecided(self) -> Result<String> {
        let undecided = UNDECIDED.iter().any(|said| self.stderr.contains(said));
        self.failed("not to be decided", undecided)
    }

    fn failed(self, expected: &str, is_so: bool) -> Result<String> {
        if self.code != 0 && is_so {
            return Ok(self.stderr);
        }
        Err(format!("$ {}\n{}{}: this was {expected}", self.command, self.stdout, self.stderr))
    }

    /// The standard output as JSON.
    ///
    /// # Errors
    /// As [`Self::ok`], or when it is no JSON.
    pub fn json(self) -> Result<serde_json::Value> {
        let command = self.command.clone();
        serde_json::from_str(&self.ok()?).map_err(|error| format!("$ {command}\nno JSON: {error}"))
    }
}

/// Waits until `condition` holds, asking every 50 ms.
///
/// # Errors
/// What the condition said last, when the deadline has passed.
pub fn eventually<T, E: Debug>(
    deadline: Duration,
    mut condition: impl FnMut() -> std::result::Result<T, E>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => {
                return Err(format!("not within {:.1} s: {error:?}", deadline.as_secs_f64()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Runs a command to its end with `stdin`; `shown` is how a user would type it.
fn run(command: &mut Command, shown: String, stdin: &str) -> Output {
    let attempt = || -> std::io::Result<std::process::Output> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut pipe) = child.stdin.take() {
            // a program that does not read its input closes the pipe
            let _ = pipe.write_all(stdin.as_bytes());
        }
        child.wait_with_output()
    };
    let mut attempt = attempt;
    match attempt() {
        Ok(output) => Output {
            command: shown,
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        },
        Err(error) => Output { command: shown, code: -1, stdout: String::new(), stderr: error.to_string() },
    }
}
