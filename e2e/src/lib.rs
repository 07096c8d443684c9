//! A real control plane, an AWS to talk to, and the product between them, as processes on this machine.
//!
//! # How to add a scenario
//! Write a test in `e2e/tests/scenarios.rs`; its tests share one control plane ([`World`]), so don't make another file
//! lightly. A test is a sentence and gets a namespace of its own, a [`Space`]:
//!
//! ```no_run
//! use tgb_e2e::{World, eventually};
//! # fn main() -> tgb_e2e::Result<()> {
//! let space = World::shared()?.space("scaling")?; // prints everything about it if the test fails
//! let arn = space.target_group("HTTP", 80, "ip")?;
//! space.deploy("web", 4)?;
//! eventually(std::time::Duration::from_secs(20), || {
//!     let targets = space.targets(&arn)?;
//!     if targets.len() == 4 { Ok(()) } else { Err(format!("{targets:?}")) }
//! })?;
//! # Ok(())
//! # }
//! ```
//! - `make e2e` runs all; `cargo test --workspace --test scenarios NAME` one, after `cargo build --workspace --bins`.
//! - Nothing sleeps: [`eventually`] waits for a condition with a deadline and says at the end what was still wrong.
//! - `TGB_KEEP=1` keeps the directory with the logs of all processes.
//! - Any process can be paused, killed and restarted: [`Processes`]; awsim takes faults: [`Aws::server`].
//!
//! Where the programs come from: [`Programs`].

mod aws;
mod cluster;
mod process;
mod product;
mod programs;
pub mod walkthrough;
mod world;

pub use aws::{Aws, Lab};
pub use cluster::{Cluster, Node, Options};
pub use process::{Processes, Spec};
pub use product::{CLUSTER_NAME, NAMESPACE, Product, Settings, get};
pub use programs::Programs;
pub use world::{Space, World};

use std::fmt::Debug;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What went wrong, as one line for people.
pub type Result<T> = std::result::Result<T, String>;

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

    /// The standard error of a command that must fail.
    ///
    /// # Errors
    /// The command and its output if it succeeded.
    pub fn refused(self) -> Result<String> {
        if self.code != 0 {
            return Ok(self.stderr);
        }
        Err(format!("$ {}\n{}: this was to be refused", self.command, self.stdout))
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
