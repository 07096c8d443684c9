//! `awsim`: the emulator as a program.

use std::io::{Read, Write};

use awsim::{Options, Server, Timing};
use clap::Parser;

/// An emulator of the ELBv2, EC2 and STS actions that binding target groups needs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Port on 127.0.0.1; 0 is any
    #[arg(long, default_value_t = 4566)]
    port: u16,
    /// Targets become healthy and drain in fractions of a second
    #[arg(long)]
    fast: bool,
    /// Simulated seconds per real second
    #[arg(long, default_value_t = 1.0)]
    time_scale: f64,
    /// Throttle as AWS does
    #[arg(long)]
    throttle: bool,
    /// Every role exists and trusts everybody
    #[arg(long)]
    any_role: bool,
    /// Targets of a target group at most
    #[arg(long, default_value_t = 1000)]
    targets_per_group: usize,
    /// Append every request with its answer to this file
    #[arg(long)]
    record: Option<std::path::PathBuf>,
    /// End when standard input does, as when the parent is gone
    #[arg(long)]
    end_with_stdin: bool,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let mut options = Options {
        port: arguments.port,
        throttle: arguments.throttle,
        scale: arguments.time_scale,
        any_role: arguments.any_role,
        timing: if arguments.fast { Timing::fast() } else { Timing::default() },
        ..Options::default()
    };
    options.quotas.targets_per_group = arguments.targets_per_group;
    let server = Server::start(options)?;
    if let Some(path) = &arguments.record {
        server.record(path)?;
    }
    let mut out = std::io::stdout();
    writeln!(out, "awsim listening on {}", server.endpoint())?;
    out.flush()?;
    if arguments.end_with_stdin {
        let mut rest = [0; 1024];
        while std::io::stdin().read(&mut rest)? > 0 {}
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}
