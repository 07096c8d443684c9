//! `tgb-webhook`: admission and conversion for TargetGroupBindings, and the same rules for files.

mod admission;
mod bindings;
mod certificates;
mod convert;
#[cfg(test)]
mod fuzz;
mod kustomize;
mod lint;
mod lookup;
mod metrics;
mod pods;
mod rewrite;
mod serve;
mod services;
mod surroundings;

use clap::{Parser, Subcommand, ValueEnum};
use std::process::ExitCode;
use tgb_api::crd::Version;

const EXIT_CODES: &str = "Exit codes: 0 fine, or an orderly end after SIGTERM; 1 findings (lint) or a failure that \
    stderr names; 2 wrong flags or unusable input.";

/// Admission and conversion webhook of TargetGroupBinding.
///
/// Every flag can be given by its environment variable as well.
#[derive(Debug, Parser)]
#[command(name = "tgb-webhook", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve admission and conversion over HTTPS, and probes and metrics over HTTP.
    Serve(Box<serve::Options>),
    /// Hold manifests against the rules of admission, without a cluster.
    Lint(lint::Options),
    /// Rewrite manifests to another version: a diff, or the files with --in-place.
    Convert(rewrite::Options),
    /// Print the CustomResourceDefinition (JSON, which kubectl takes as YAML).
    Crd {
        /// The version that is stored.
        #[arg(long, env = "TGB_STORAGE_VERSION", value_enum, default_value_t = Storage::V1)]
        storage_version: Storage,
    },
    /// Print the documentation of all rules (docs/rules.md).
    Rules,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Storage {
    V1,
    V1beta1,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(options) => serve::main(*options),
        Command::Lint(options) => lint::main(&options),
        Command::Convert(options) => rewrite::main(&options),
        Command::Crd { storage_version } => {
            let storage = match storage_version {
                Storage::V1 => Version::V1,
                Storage::V1beta1 => Version::V1Beta1,
            };
            let crd = tgb_api::crd::crd(storage);
            print(&format!("{crd:#}\n"))
        }
        Command::Rules => print(&tgb_api::rules::document()),
    }
}

/// To stdout; a reader that went away is no failure of ours.
fn print(text: &str) -> ExitCode {
    use std::io::{ErrorKind, Write as _};
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("error: can't write: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn every_flag_has_a_sentence_and_an_environment_variable() {
        assert_eq!(tgb_process::undocumented_flags(&Cli::command()), Vec::<String>::new());
    }
}
