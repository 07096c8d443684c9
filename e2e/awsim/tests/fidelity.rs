//! Runs `fidelity.py`: botocore's service model, the `aws` command line and moto against the program.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may say what it means"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The virtual environment with what `e2e/requirements.txt` pins; made once per user, in `~/.cache/tgb/venv` or where
/// `TGB_VENV` says.
fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
    let venv = std::env::var_os("TGB_VENV").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/tgb/venv"),
        PathBuf::from,
    );
    let python = venv.join("bin/python");
    let wanted = std::fs::read_to_string(root.join("requirements.txt")).unwrap();
    let stamp = venv.join("requirements.txt");
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(&wanted) {
        let run = |command: &mut Command| {
            let status = command.status().expect("python3 is installed");
            assert!(status.success(), "{command:?}");
        };
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        run(Command::new(&python)
            .args(["-m", "pip", "install", "-q", "-r"])
            .arg(root.join("requirements.txt")));
        std::fs::write(&stamp, wanted).unwrap();
    }
    python
}

#[test]
fn the_wire_format_is_that_of_botocores_model_and_outcomes_are_those_of_moto() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fidelity.py");
    let done = Command::new(python()).arg(script).arg(env!("CARGO_BIN_EXE_awsim")).output().unwrap();
    let out = String::from_utf8_lossy(&done.stdout);
    let bad: Vec<&str> = out.lines().filter(|l| !l.starts_with("ok ")).collect();
    assert!(done.status.success(), "{}\n{}", bad.join("\n"), String::from_utf8_lossy(&done.stderr));
}
