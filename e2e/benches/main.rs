//! `make bench`: starts the release binaries between a real API server and awsim and prints what they cost. One table,
//! ours beside the limit; the same in `target/bench.json`. Absolute times move from machine to machine and with what else
//! runs, so the machine and its load are in the file.
//!
//! - [`webhook`]: admission, conversion, start, memory; [`controller`]: calls, latencies, scale;
//! - [`soak`]: an hour of mixed change with faults (`make soak`);
//! - [`floor`]: a server that does nothing, beside the webhook;
//! - [`stage`]: what everything is measured on; [`peer`]: the AWS Load Balancer Controller in our place;
//! - [`fleet`]: thousands of bindings; [`http`]: the client; [`machine`]: CPU and memory of processes; [`table`].
//!
//! `ONLY=webhook|controller|scale|rolling|nodes|networking` runs one part, `FULL=1` adds 5,000 bindings and the rolling change of 20,000 pods,
//! `PEER=<path of an AWS Load Balancer Controller>` measures that one, too, each part after ours, where it does the same.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::as_conversions)]

mod controller;
mod fleet;
mod floor;
mod http;
mod machine;
mod peer;
mod soak;
mod stage;
mod table;
mod webhook;

use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use table::{Limit, Side, Table};
use tgb_e2e::Result;

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
    let peer = peer::path();
    let sides: &[Side] = if peer.is_some() { &[Side::Ours, Side::Peer] } else { &[Side::Ours] };
    let mut table = Table { beside: peer.is_some(), ..Table::default() };
    binaries(&mut table, peer.as_deref())?;
    let parts = [
        ("webhook", wanted("webhook")),
        ("controller", ["controller", "scale", "rolling", "nodes", "networking"].into_iter().any(wanted)),
    ];
    for (part, _) in parts.iter().filter(|(_, wanted)| *wanted) {
        for side in sides {
            table.side = *side;
            eprintln!("== {part}{}", if *side == Side::Peer { " of the peer" } else { "" });
            match *part {
                "webhook" => webhook::run(&mut table).await?,
                _ => controller::run(&mut table, wanted(part)).await?,
            }
        }
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

fn binaries(table: &mut Table, peer: Option<&Path>) -> Result<()> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    for name in ["tgb-webhook", "tgb-controller"] {
        let ours = own.with_file_name(name);
        let paths = [(Side::Ours, Some(ours.as_path())), (Side::Peer, peer)];
        for (side, path) in paths.into_iter().filter_map(|(side, path)| Some((side, path?))) {
            let found = std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
            table.side = side;
            let size = found.len() as f64 / 1e6;
            table.add(&format!("binary-{name}"), &format!("binary {name}"), size, "MB", Limit::Most(20.0));
        }
    }
    Ok(())
}
