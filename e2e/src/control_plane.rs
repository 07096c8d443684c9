//! A real Kubernetes without containers: its own processes on free loopback ports, simulated nodes and kubelets.

use crate::process::{Process, free_port};
use crate::{Failure, Result, eventually, failed};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The programs that make it up, with `kubectl` and `helm`.
pub const PROGRAMS: [&str; 7] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok", "kubectl", "helm"];
const KUBERNETES: &str = "1.37.2";

/// Where the programs are. `KUBEBUILDER_ASSETS` wins for what it holds; the rest is built once, from the modules
/// pinned under `e2e/kubernetes`, into the user's cache directory.
#[derive(Debug, Clone)]
pub struct Programs {
    assets: Option<PathBuf>,
    cache: PathBuf,
}

impl Programs {
    /// Finds them, and builds what is missing; progress goes to standard error.
    ///
    /// # Errors
    /// No Go, or a build that fails; the line says what to do.
    pub fn find() -> Result<Self> {
        let assets = std::env::var_os("KUBEBUILDER_ASSETS")
            .map(PathBuf::from)
            .filter(|dir| !dir.as_os_str().is_empty());
        let found = Self { assets, cache: cache_dir().join("kubernetes").join(KUBERNETES) };
        if PROGRAMS.iter().all(|program| found.path(program).is_file()) {
            return Ok(found);
        }
        let script = repository().join("e2e/kubernetes/build.sh");
        let status = Command::new(&script).arg(&found.cache).stdin(Stdio::null()).status();
        let status = status.map_err(failed("starting e2e/kubernetes/build.sh"))?;
        if status.success() {
            Ok(found)
        } else {
            Err(Failure("the control plane's programs could not be built".to_owned()))
        }
    }

    /// The path of one.
    pub fn path(&self, program: &str) -> PathBuf {
        let given = self.assets.as_ref().map(|dir| dir.join(program)).filter(|path| path.is_file());
        given.unwrap_or_else(|| self.cache.join(program))
    }
}

/// This project's place in the user's cache directory.
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    base.unwrap_or_else(|| repository().join("target")).join("tgb")
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// A running control plane; all of its processes end when it is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    /// The programs, for more processes.
    pub programs: Programs,
    /// A kubeconfig of a cluster administrator.
    pub kubeconfig: PathBuf,
    /// The API server's address.
    pub url: String,
    /// Its processes, in the order of their start, by name.
    pub processes: Vec<Process>,
    /// Where its files and logs are.
    pub dir: tempfile::TempDir,
}

/// A simulated node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its EC2 instance.
    pub instance_id: String,
    /// Its zone.
    pub zone: String,
    /// Its address.
    pub address: String,
}

impl ControlPlane {
    /// Starts one; it answers when this returns.
    ///
    /// # Errors
    /// A program is missing or ends at once; the line has the end of its log.
    pub fn start() -> Result<Self> {
        let programs = Programs::find()?;
        let dir = tempfile::Builder::new().prefix("tgb-").tempdir().map_err(failed("making a directory"))?;
        let at = |name: &str| dir.path().join(name);
        let text = |path: PathBuf| path.display().to_string();
        let write =
            |name: &str, content: &str| std::fs::write(at(name), content).map_err(failed("writing a file"));

        let key = rcgen::KeyPair::generate().map_err(failed("making a key"))?;
        write("service-account.key", &key.serialize_pem())?;
        write("service-account.pub", &key.public_key_pem())?;
        write("tokens.csv", "admin-token,admin,admin,system:masters\n")?;
        let (etcd_port, etcd_peer, api_port) = (free_port()?, free_port()?, free_port()?);
        let (kcm_port, scheduler_port) = (free_port()?, free_port()?);
        let url = format!("https://127.0.0.1:{api_port}");
        let certificates = at("certificates");

        let mut processes = Vec::new();
        let mut start = |name: &str, args: Vec<String>| -> Result<()> {
            processes.push(Process::start(dir.path(), name, &programs.path(name), &args, &[])?);
            Ok(())
        };
        let args = |list: &[String]| list.to_vec();
        start(
            "etcd",
            args(&[
                format!("--data-dir={}", text(at("etcd"))),
                format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{etcd_peer}"),
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
            ]),
        )?;
        start(
            "kube-apiserver",
            args(&[
                format!("--etcd-servers=http://127.0.0.1:{etcd_port}"),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={api_port}"),
                format!("--cert-dir={}", text(certificates.clone())),
                format!("--token-auth-file={}", text(at("tokens.csv"))),
                "--authorization-mode=RBAC".to_owned(),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={}", text(at("service-account.pub"))),
                format!("--service-account-signing-key-file={}", text(at("service-account.key"))),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
                "--allow-privileged=true".to_owned(),
            ]),
        )?;
        let kubeconfig = at("kubeconfig");
        write(
            "kubeconfig",
            &format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: tgb\nclusters:\n- name: tgb\n  cluster:\n    server: {url}\n    \
                 certificate-authority: {}\nusers:\n- name: admin\n  user: {{token: admin-token}}\ncontexts:\n- name: tgb\n  \
                 context: {{cluster: tgb, user: admin}}\n",
                text(certificates.join("apiserver.crt")),
            ),
        )?;
        let config = format!("--kubeconfig={}", text(kubeconfig.clone()));
        let mut plane = Self { programs: programs.clone(), kubeconfig, url, processes: Vec::new(), dir };
        let ready = eventually("kube-apiserver", Duration::from_secs(60), || {
            match plane.kubectl(&["get", "--raw=/readyz"]) {
                output if output.status.success() => Ok(()),
                output => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            }
        });
        if let Err(failure) = ready {
            let logs: Vec<String> = processes.iter().map(|p| format!("{}:\n{}", p.name, p.tail(5))).collect();
            return Err(Failure(format!("{failure}\n{}", logs.join("\n"))));
        }
        let dir = plane.dir.path().to_path_buf();
        let mut start = |name: &str, args: Vec<String>| -> Result<()> {
            processes.push(Process::start(&dir, name, &programs.path(name), &args, &[])?);
            Ok(())
        };
        start(
            "kube-controller-manager",
            vec![
                config.clone(),
                "--leader-elect=false".to_owned(),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={kcm_port}"),
                format!("--cert-dir={}", dir.join("kcm").display()),
                format!("--service-account-private-key-file={}", dir.join("service-account.key").display()),
                format!("--root-ca-file={}", certificates.join("apiserver.crt").display()),
                "--endpointslice-updates-batch-period=0s".to_owned(),
            ],
        )?;
        start(
            "kube-scheduler",
            vec![
                config.clone(),
                "--leader-elect=false".to_owned(),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={scheduler_port}"),
                format!("--cert-dir={}", dir.join("scheduler").display()),
            ],
        )?;
        start(
            "kwok",
            vec![
                config,
                "--manage-all-nodes=true".to_owned(),
                "--cidr=10.244.0.0/16".to_owned(),
                "--node-ip=192.168.0.10".to_owned(),
                format!("--config={}", repository().join("e2e/kwok/stages.yaml").display()),
            ],
        )?;
        plane.processes = processes;
        Ok(plane)
    }

    /// One of its processes.
    pub fn process(&mut self, name: &str) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.name == name)
    }

    /// Makes nodes and waits until they are Ready.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn add_nodes(&self, nodes: &[Node]) -> Result<()> {
        for node in nodes {
            let manifest = serde_json::json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {
                    "name": node.name,
                    "labels": {
                        "kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux",
                        "topology.kubernetes.io/zone": node.zone, "node.kubernetes.io/instance-type": "m5.large",
                    },
                },
                "spec": {"providerID": format!("aws:///{}/{}", node.zone, node.instance_id)},
            });
            self.apply(&manifest.to_string())?;
            let status = serde_json::json!({"status": {"addresses": [
                {"type": "InternalIP", "address": node.address}, {"type": "Hostname", "address": node.name},
            ]}});
            let patch = format!("--patch={status}");
            self.run(&["patch", "node", &node.name, "--subresource=status", &patch])?;
        }
        for node in nodes {
            let node = format!("node/{}", node.name);
            self.run(&["wait", "--for=condition=Ready", &node, "--timeout=30s"])?;
        }
        Ok(())
    }

    /// `kubectl` with these arguments, whatever comes of it.
    pub fn kubectl(&self, args: &[&str]) -> Output {
        self.kubectl_with_input(args, "")
    }

    /// The same with something on standard input.
    pub fn kubectl_with_input(&self, args: &[&str], input: &str) -> Output {
        run(self.command("kubectl").args(args), input)
    }

    /// `kubectl` that must succeed; its standard output.
    ///
    /// # Errors
    /// What it wrote to standard error.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.kubectl(args);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure(format!(
            "kubectl {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }

    /// `kubectl apply -f -` that must succeed.
    ///
    /// # Errors
    /// What it wrote to standard error.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let output = self.kubectl_with_input(&["apply", "-f", "-"], manifest);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure(format!("kubectl apply: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }

    /// One of the programs, set up for this control plane.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.path(program));
        command.env("KUBECONFIG", &self.kubeconfig).env("HELM_CACHE_HOME", self.dir.path().join("helm"));
        command
            .env("HELM_CONFIG_HOME", self.dir.path().join("helm"))
            .env("HELM_DATA_HOME", self.dir.path().join("helm"));
        command.env("HOME", self.dir.path());
        command
    }
}

/// Runs a command to its end with something on standard input.
pub fn run(command: &mut Command, input: &str) -> Output {
    use std::io::Write;
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().unwrap_or_else(|error| panic!("waiting for a command: {error}"))
}
