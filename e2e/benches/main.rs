//! `make bench`: starts the release binaries between a real API server and awsim and prints what they cost. One table,
//! ours beside the limit; the same in `target/bench.json`. Absolute times move from machine to machine and with what else
//! runs, so the machine and its load are in the file.
//!
//! - [`webhook`]: admission, conversion, start, memory; [`controller`]: calls, latencies, scale;
//! - [`soak`]: an hour of mixed change with faults (`make soak`);
//! - [`floor`]: a server that does nothing, beside the webhook;
//! - [`fleet`]: thousands of bindings; [`http`]: the client; [`machine`]: CPU and memory of processes; [`table`].
//!
//! `ONLY=webhook|controller|scale` runs one part, `FULL=1` adds 5,000 bindings and the rolling change of 20,000 pods.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::as_conversions)]

mod controller;
mod fleet;
mod floor;
mod http;
mod machine;
mod soak;
mod table;
mod webhook;

use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use table::{Limit, Table};
use tgb_e2e::{Aws, Cluster, Options, Product, Result, Settings};

/// What everything is measured on.
pub(crate) struct Stage {
    /// The control plane.
    pub cluster: Cluster,
    /// awsim.
    pub aws: Aws,
    /// The running programs.
    pub product: Product,
}

impl Stage {
    /// Starts all of it; `controller` are flags of the controller.
    pub(crate) fn start(controller: &[&str]) -> Result<Self> {
        let settings = Settings {
            controller: controller.iter().map(|flag| (*flag).to_owned()).collect(),
            ..Settings::default()
        };
        let start = || {
            let cluster = Cluster::start(Options::default())?;
            let aws = Aws::awsim()?;
            cluster.nodes(&aws.nodes())?;
            let product = Product::start(&cluster, &aws, &settings)?;
            // Nothing stands between the controller and the API server.
            cluster.kubeconfig_of(
                tgb_e2e::NAMESPACE,
                "tgb-targetgroupbinding-controller",
                cluster.server(),
            )?;
            product.controller().stop()?;
            product.controller().restart()?;
            product.controller().until_ready(Duration::from_secs(60))?;
            Ok(Self { cluster, aws, product })
        };
        // The harness has a runtime of its own, which must not be used within ours.
        std::thread::scope(|scope| scope.spawn(start).join())
            .map_err(|_| "the stage was not set".to_owned())?
    }

    /// The id of a process.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        self.cluster.processes().pid(name).unwrap_or_default()
    }
}

fn main() -> ExitCode {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // One thread, so that the client takes no more than one core from what it measures.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let part = std::env::args().nth(1);
    let done = runtime.map_err(|error| error.to_string()).and_then(|runtime| match part.as_deref() {
        Some("soak") => runtime.block_on(soak::run()),
        Some("floor") => runtime.block_on(floor::run()),
        _ => runtime.block_on(bench()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    if cfg!(debug_assertions) && std::env::var_os("ANYWAY").is_none() {
        return Err("figures of a debug build say nothing; run `make bench`".to_owned());
    }
    let wanted = |part: &str| std::env::var("ONLY").map_or(true, |only| only.is_empty() || only == part);
    let machine = machine::describe();
    let mut table = Table::default();
    binaries(&mut table)?;
    if wanted("webhook") {
        webhook::run(&mut table).await?;
    }
    if wanted("controller") || wanted("scale") {
        controller::run(&mut table, wanted("controller")).await?;
    }
    println!("{}", table.text());
    let missed = table.rows.iter().filter(|row| !row.holds()).count();
    println!(
        "{} figures, {missed} missed; {} CPUs, {}, load {}",
        table.rows.len(),
        machine["cpus"],
        machine["model"],
        machine["load"]
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("bench.json");
    let text = format!("{:#}\n", json!({"machine": machine, "figures": table.json()}));
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn binaries(table: &mut Table) -> Result<()> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    for name in ["tgb-webhook", "tgb-controller"] {
        let path = own.with_file_name(name);
        let size = std::fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
        table.add(
            &format!("binary-{name}"),
            &format!("binary {name}"),
            size as f64 / 1e6,
            "MB",
            Limit::Most(20.0),
        );
    }
    Ok(())
}
