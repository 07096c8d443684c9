//! Processes that never outlive us: they end when the harness ends, also when it is killed with SIGKILL.
//!
//! All of them share one process group. A guard, a shell in a group of its own, waits for the end of a pipe that only
//! we hold open; then it kills the group and removes the directory with its data.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Result, eventually};

/// What to start: program, arguments, environment.
#[derive(Debug, Clone)]
pub struct Spec {
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Spec {
    /// A program and its arguments.
    pub fn new(program: impl Into<PathBuf>, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { program: program.into(), args: args.into_iter().map(Into::into).collect(), env: Vec::new() }
    }

    /// The value of a flag.
    pub fn value(&self, flag: &str) -> Option<&str> {
        self.args.iter().find_map(|arg| arg.strip_prefix(flag)?.strip_prefix('='))
    }

    /// Replaces a flag (`--name=value`), or adds it.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        crate::product::override_flags(&mut self.args, &[flag.to_owned()]);
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }
}

/// The processes of one harness and the directory for their data and logs. Dropping it ends all of them.
#[derive(Debug)]
pub struct Processes {
    guard: Child,
    holder: Child,
    dir: PathBuf,
    running: Mutex<BTreeMap<String, (Spec, Child)>>,
}

impl Processes {
    /// Starts the guard and makes the directory.
    ///
    /// # Errors
    /// When there is no shell or no place for the directory.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("tgb-")
            .tempdir()
            .map_err(|error| format!("no directory for the control plane's data: {error}; set TMPDIR"))?
            .keep();
        let failed = |error: std::io::Error| format!("the guard of the processes does not start: {error}");
        // The group lives as long as its first member; `cat` ends with our end of the pipe.
        let holder = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let guard = Command::new("sh")
            .args([
                "-c",
                r#"trap "" INT TERM HUP; cat; kill -s KILL -- "-$1" 2>/dev/null; rm -rf "$2" || rm -rf "$2""#,
            ])
            .args(["guard", &holder.id().to_string()])
            .arg(if std::env::var_os("TGB_KEEP").is_some() { Path::new("") } else { &dir })
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        Ok(Self { guard, holder, dir, running: Mutex::default() })
    }

    /// For data and logs; gone after the end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a process; its output goes to [`Self::log`].
    ///
    /// # Errors
    /// When the program cannot be started, with its path.
    pub fn spawn(&self, name: &str, spec: Spec) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(name))
            .map_err(|error| format!("{name}: no log file: {error}"))?;
        let stderr = log.try_clone().map_err(|error| format!("{name}: no log file: {error}"))?;
        let child = self
            .command(&spec)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(stderr)
            .spawn()
            .map_err(|error| format!("{name}: {} does not start: {error}", spec.program.display()))?;
        self.table().insert(name.to_owned(), (spec, child));
        Ok(())
    }

    /// Runs a program to its end with our own output, as a build script.
    ///
    /// # Errors
    /// When it cannot be started or fails; it has said why itself.
    pub fn run(&self, name: &str, spec: &Spec) -> Result<()> {
        let status = self
            .command(spec)
            .stdin(Stdio::null())
            .status()
            .map_err(|error| format!("{name}: {} does not start: {error}", spec.program.display()))?;
        if status.success() { Ok(()) } else { Err(format!("{name}: failed, see above")) }
    }

    /// Everything that a process has printed, over all its starts.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    /// An error with the last lines of its log if the process has ended.
    ///
    /// # Errors
    /// See above.
    pub fn check(&self, name: &str) -> Result<()> {
        let ended = match self.table().get_mut(name) {
            Some((_, child)) => child.try_wait().ok().flatten(),
            None => return Err(format!("{name} was not started")),
        };
        let Some(status) = ended else { return Ok(()) };
        let log = self.log(name);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n");
        Err(format!("{tail}\n{name} ended ({status})"))
    }

    /// Stops it in its tracks (SIGSTOP).
    ///
    /// # Errors
    /// When it isn't running.
    pub fn pause(&self, name: &str) -> Result<()> {
        self.signal(name, "STOP")
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When it isn't running.
    pub fn resume(&self, name: &str) -> Result<()> {
        self.signal(name, "CONT")
    }

    /// Kills it (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// When it was never started.
    pub fn kill(&self, name: &str) -> Result<()> {
        let mut table = self.table();
        let (_, child) = table.get_mut(name).ok_or_else(|| format!("{name} was not started"))?;
        let _ = child.kill();
        child.wait().map(drop).map_err(|error| format!("{name}: {error}"))
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// When it isn't running, or still runs at the deadline.
    pub fn stop(&self, name: &str, deadline: Duration) -> Result<ExitStatus> {
        self.terminate(name)?;
        self.ended(name, deadline)
    }

    /// Asks it to stop (SIGTERM).
    ///
    /// # Errors
    /// When it isn't running.
    pub fn terminate(&self, name: &str) -> Result<()> {
        self.signal(name, "TERM")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it was never started, or still runs at the deadline.
    pub fn ended(&self, name: &str, deadline: Duration) -> Result<ExitStatus> {
        let mut status = None;
        eventually(deadline, || {
            if let Some((_, child)) = self.table().get_mut(name) {
                status = child.try_wait().ok().flatten();
            }
            if status.is_some() { Ok(()) } else { Err(format!("{name} still runs")) }
        })?;
        status.ok_or_else(|| format!("{name} was not started"))
    }

    /// Starts it again as it was started, killing it first if it still runs.
    ///
    /// # Errors
    /// When it was never started, or does not start again.
    pub fn restart(&self, name: &str) -> Result<()> {
        self.restart_with(name, |_| ())
    }

    /// The same with other arguments.
    pub(crate) fn restart_with(&self, name: &str, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        self.kill(name)?;
        let spec = self.table().get(name).map(|(spec, _)| spec.clone());
        let mut spec = spec.ok_or_else(|| format!("{name} was not started"))?;
        change(&mut spec.args);
        self.spawn(name, spec)
    }

    /// The id of a process, to look at what it needs.
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.table().get(name).map(|(_, child)| child.id())
    }

    /// How a process was started, to start another like it.
    pub fn spec(&self, name: &str) -> Option<Spec> {
        self.table().get(name).map(|(spec, _)| spec.clone())
    }

    /// The names of all processes that were started.
    pub fn names(&self) -> Vec<String> {
        self.table().keys().cloned().collect()
    }

    fn command(&self, spec: &Spec) -> Command {
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).envs(spec.env.iter().map(|(name, value)| (name, value)));
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            command.env_remove(name);
        }
        command.process_group(self.holder.id().try_into().unwrap_or_default());
        command
    }

    fn signal(&self, name: &str, signal: &str) -> Result<()> {
        let pid = self.table().get(name).map(|(_, child)| child.id());
        let pid = pid.ok_or_else(|| format!("{name} was not started"))?.to_string();
        self.check(name)?;
        let status = Command::new("kill").args(["-s", signal, &pid]).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            _ => Err(format!("{name}: signal {signal} was not delivered")),
        }
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, (Spec, Child)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
        let _ = self.holder.wait();
        for (_, child) in self.table().values_mut() {
            let _ = child.wait();
        }
    }
}
