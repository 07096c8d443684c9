//! The product on a control plane: the chart is installed, both programs run on this machine as the service accounts
//! that the chart made, so that they may do what their roles say and no more.

use crate::cluster::{free_ports, own_address};
use crate::programs::source_dir;
use crate::{Aws, Cluster, Link, Output, Processes, Result, Spec, eventually};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// Namespace of the release.
pub const NAMESPACE: &str = "tgb-system";
/// Name of the cluster, as in tags and rule descriptions.
pub const CLUSTER_NAME: &str = "demo";
const START: Duration = Duration::from_secs(60);

/// What an installation looks after.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scope {
    /// All namespaces.
    #[default]
    Everywhere,
    /// Only conversion between the versions; beside it, others look after namespaces. No controller runs.
    Conversion,
    /// Some namespaces, beside other installations.
    Namespaces {
        /// Name of the installation and owner of its rules.
        name: String,
        /// Namespaces to look at.
        namespaces: Vec<String>,
    },
}

/// How the product is started; flags are added to the harness's own and win over them.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What it looks after.
    pub scope: Scope,
    /// Flags of `tgb-webhook serve`.
    pub webhook: Vec<String>,
    /// Flags of `tgb-controller run`.
    pub controller: Vec<String>,
    /// `--set` values of the chart.
    pub values: Vec<String>,
    /// The API server calls the webhook by this machine's own address: HTTP/1.1, as in production. Otherwise by
    /// loopback, which is HTTP/2.
    pub by_own_address: bool,
}

/// The running product.
#[derive(Debug)]
pub struct Product {
    webhook: Option<Running>,
    controller: Option<Running>,
    processes: Arc<Processes>,
}

/// A process and what stands around it.
#[derive(Debug)]
struct Running {
    name: String,
    http: String,
    link: Link,
}

impl Product {
    /// Installs the chart, starts both programs and returns when they are ready.
    ///
    /// # Errors
    /// When a program is not built, the chart is refused, or a program is not ready in time, with its last lines.
    pub fn start(cluster: &Cluster, aws: &Aws, settings: &Settings) -> Result<Self> {
        let installation = Installation::of(&settings.scope);
        let [port, webhook_http, controller_http] = free_ports()?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let host = if settings.by_own_address { own_address() } else { loopback };
        let to_webhook = Link::start(host, (loopback, port).into())?;
        installation.helm(cluster, to_webhook.address(), &settings.values)?;

        let from_controller = Link::start(cluster.address()?.ip(), cluster.address()?)?;
        let mut product = Self { webhook: None, controller: None, processes: Arc::clone(&cluster.processes) };
        let own = installation.webhook_flags(cluster, host, port);
        let program = Started { part: "webhook", command: "serve", http: webhook_http, link: to_webhook };
        let server = cluster.server().to_owned();
        product.webhook =
            Some(program.start(cluster, aws, &installation, &server, own, &settings.webhook)?);
        if settings.scope != Scope::Conversion {
            let server = format!("https://{}", from_controller.address());
            let own = vec![
                format!("--lease-namespace={}", installation.namespace),
                format!("--lease-name={}-controller", installation.full_name),
            ];
            let program =
                Started { part: "controller", command: "run", http: controller_http, link: from_controller };
            product.controller =
                Some(program.start(cluster, aws, &installation, &server, own, &settings.controller)?);
        }
        for part in product.parts() {
            part.until_ready(START)?;
        }
        Ok(product)
    }

    /// The webhook.
    pub fn webhook(&self) -> Part<'_> {
        Part { running: self.webhook.as_ref(), processes: &self.processes }
    }

    /// The controller.
    pub fn controller(&self) -> Part<'_> {
        Part { running: self.controller.as_ref(), processes: &self.processes }
    }

    /// What runs of it.
    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        [self.webhook(), self.controller()].into_iter().filter(|part| part.running.is_some())
    }

    /// The names of its processes.
    pub fn names(&self) -> Vec<String> {
        self.parts().map(|part| part.name().to_owned()).collect()
    }
}

/// Names of one installation, and its flags that follow from them.
struct Installation {
    release: String,
    namespace: String,
    full_name: String,
    /// Appended to the names of the processes.
    suffix: String,
    scope: Scope,
}

impl Installation {
    fn of(scope: &Scope) -> Self {
        let (release, namespace, full_name, suffix) = match scope {
            Scope::Everywhere | Scope::Conversion => {
                ("tgb".to_owned(), NAMESPACE.to_owned(), "tgb-targetgroupbinding".to_owned(), String::new())
            }
            Scope::Namespaces { name, .. } => {
                (name.clone(), format!("{name}-tgb"), format!("tgb-{name}"), format!(".{name}"))
            }
        };
        Self { release, namespace, full_name, suffix, scope: scope.clone() }
    }

    /// Installs the chart with a webhook at this address.
    fn helm(&self, cluster: &Cluster, webhook: SocketAddr, more: &[String]) -> Result<()> {
        let chart = source_dir().with_file_name("charts").join("targetgroupbinding").display().to_string();
        let ca = format!("webhook.tls.caBundle={}", cluster.dir().join("ca.crt").display());
        let mut values = vec![
            format!("clusterName={CLUSTER_NAME}"),
            format!("webhook.url=https://{webhook}"),
            "controller.replicas=0".to_owned(),
        ];
        let mut helm = vec!["upgrade", "--install", &self.release, &chart, "--namespace", &self.namespace];
        helm.push("--create-namespace");
        match &self.scope {
            Scope::Everywhere => {}
            Scope::Conversion => {
                values.extend(["watchNamespaces={tgb-nowhere}".to_owned(), "ruleOwner=nobody".to_owned()]);
            }
            Scope::Namespaces { name, namespaces } => {
                values.extend([
                    format!("watchNamespaces={{{}}}", namespaces.join(",")),
                    format!("ruleOwner={name}"),
                    format!("fullnameOverride={}", self.full_name),
                    "crd.enabled=false".to_owned(),
                    "webhook.tls.mode=files".to_owned(),
                ]);
                helm.extend(["--set-file", &ca]);
            }
        }
        values.extend_from_slice(more);
        for value in &values {
            helm.extend(["--set", value]);
        }
        cluster.helm(&helm).ok().map(drop)
    }

    fn webhook_flags(&self, cluster: &Cluster, host: IpAddr, port: u16) -> Vec<String> {
        let mut flags = vec![
            format!("--listen=127.0.0.1:{port}"),
            format!("--webhook-config-name={}", self.full_name),
            "--shutdown-delay=0s".to_owned(),
        ];
        match &self.scope {
            // The CRD is the conversion's. Our own certificates need no start of an authority for each space.
            Scope::Namespaces { .. } => flags.extend([
                "--crd-name=".to_owned(),
                "--cert-mode=files".to_owned(),
                format!("--tls-cert-file={}", cluster.dir().join("server.crt").display()),
                format!("--tls-key-file={}", cluster.dir().join("server.key").display()),
            ]),
            Scope::Everywhere | Scope::Conversion => flags.extend([
                "--cert-mode=self".to_owned(),
                format!("--self-secret-namespace={}", self.namespace),
                format!("--self-secret-name={}-webhook-ca", self.full_name),
                format!("--extra-dns-name={host}"),
            ]),
        }
        flags
    }
}

/// A program that is about to run.
struct Started {
    part: &'static str,
    command: &'static str,
    http: u16,
    link: Link,
}

impl Started {
    fn start(
        self,
        cluster: &Cluster,
        aws: &Aws,
        installation: &Installation,
        server: &str,
        own: Vec<String>,
        more: &[String],
    ) -> Result<Running> {
        let (program, http) = (format!("tgb-{}", self.part), format!("127.0.0.1:{}", self.http));
        let account = format!("{}-{}", installation.full_name, self.part);
        let kubeconfig = cluster.kubeconfig_of(&installation.namespace, &account, server)?;
        let mut flags = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--cluster-name={CLUSTER_NAME}"),
            format!("--aws-vpc-id={}", aws.lab().vpc),
            format!("--http-listen={http}"),
            "--log-format=text".to_owned(),
        ];
        flags.extend(own);
        match &installation.scope {
            Scope::Namespaces { name, namespaces } => {
                flags.push(format!("--watch-namespaces={}", namespaces.join(",")));
                if self.part == "controller" {
                    flags.push(format!("--rule-owner={name}"));
                }
            }
            Scope::Conversion => flags.push("--watch-namespaces=tgb-nowhere".to_owned()),
            Scope::Everywhere => {}
        }
        override_flags(&mut flags, more);
        let args = [vec![self.command.to_owned()], flags].concat();
        let spec = program_spec(&program, args, aws, &self.part.to_uppercase())?;
        let name = format!("{program}{}", installation.suffix);
        cluster.processes().spawn(&name, spec)?;
        Ok(Running { name, http, link: self.link })
    }
}

/// One of our programs, as this user of AWS, with the environment of its image.
pub(crate) fn program_spec(name: &str, args: Vec<String>, aws: &Aws, user: &str) -> Result<Spec> {
    let spec = Spec::new(built(name)?, args).env("NO_COLOR", "1").env("MIMALLOC_PURGE_DELAY", "0");
    Ok(aws.environment(user).into_iter().fold(spec, |spec, (name, value)| spec.env(&name, value)))
}

/// Adds flags; one that is there already is replaced.
pub(crate) fn override_flags(args: &mut Vec<String>, more: &[String]) {
    let name = |flag: &str| flag.split('=').next().unwrap_or_default().to_owned();
    args.retain(|arg| !more.iter().any(|flag| name(flag) == name(arg)));
    args.extend_from_slice(more);
}

/// One of the product's processes. One that was not started has no name, and nothing can be done to it.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    running: Option<&'a Running>,
    processes: &'a Processes,
}

impl<'a> Part<'a> {
    /// Its name among the [`Processes`].
    pub fn name(&self) -> &'a str {
        self.running.map_or("", |running| &running.name)
    }

    /// Where `/livez`, `/readyz` and `/metrics` are, `127.0.0.1:PORT`.
    pub fn http(&self) -> &'a str {
        self.running.map_or("", |running| &running.http)
    }

    /// Of the webhook: its connections from the API server. Of the controller: its connections to the API server.
    ///
    /// # Errors
    /// When it was not started.
    pub fn link(&self) -> Result<&'a Link> {
        self.running.map(|running| &running.link).ok_or_else(|| "this part was not started".to_owned())
    }

    /// Kills it (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// When it was never started.
    pub fn kill(&self) -> Result<()> {
        self.processes.kill(self.name())
    }

    /// Stops it in its tracks (SIGSTOP).
    ///
    /// # Errors
    /// When it isn't running.
    pub fn pause(&self) -> Result<()> {
        self.processes.pause(self.name())
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When it isn't running.
    pub fn resume(&self) -> Result<()> {
        self.processes.resume(self.name())
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// When it isn't running, or still runs after a minute.
    pub fn stop(&self) -> Result<ExitStatus> {
        self.processes.stop(self.name(), START)
    }

    /// Starts it again as it was started, killing it first if it still runs. It isn't ready yet.
    ///
    /// # Errors
    /// When it was never started, or does not start again.
    pub fn restart(&self) -> Result<()> {
        self.restart_with(&[])
    }

    /// The same with more flags (`--name=value`); those that it has already are replaced.
    ///
    /// # Errors
    /// As [`Self::restart`].
    pub fn restart_with(&self, flags: &[&str]) -> Result<()> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        self.processes.restart_with(self.name(), |args| override_flags(args, &flags))
    }

    /// Starts it again if it has ended by itself, as a kubelet does; says whether it had.
    ///
    /// # Errors
    /// When it was never started, or does not start again.
    pub fn revive(&self) -> Result<bool> {
        let has_ended = self.processes.check(self.name()).is_err();
        if has_ended {
            self.restart()?;
        }
        Ok(has_ended)
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// When it has ended, or isn't ready in time, with the answer.
    pub fn until_ready(&self, deadline: Duration) -> Result<()> {
        eventually(deadline, || {
            self.processes.check(self.name())?;
            let answer =
                get(self.http(), "/readyz?verbose").map_err(|error| format!("{}: {error}", self.name()))?;
            if answer.starts_with("HTTP/1.1 200") {
                Ok(())
            } else {
                Err(format!("{}: {answer}", self.name()))
            }
        })
    }

    /// Everything that it has printed, over all its starts.
    pub fn log(&self) -> String {
        self.processes.log(self.name())
    }

    /// The sum of the samples of a metric whose labels hold all these texts (`action="RegisterTargets"`); 0 if there are none.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let text = get(self.http(), "/metrics")?;
        let samples = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (metric, given) = series.split_once('{').unwrap_or((series, ""));
            let fits = metric == name && labels.iter().all(|label| given.contains(label));
            fits.then(|| value.parse::<f64>().ok()).flatten()
        });
        Ok(samples.sum())
    }
}

/// Runs a command of a program of this workspace that ends by itself, as an administrator's `tgb-webhook lint …`.
///
/// # Errors
/// When the program is not built.
pub fn run_program(name: &str, args: &[&str], stdin: &str) -> Result<Output> {
    let mut command = std::process::Command::new(built(name)?);
    Ok(crate::run(command.args(args).env("NO_COLOR", "1"), crate::cluster::shown(name, args), stdin))
}

/// What plain HTTP answers, head and body.
///
/// # Errors
/// When nobody answers.
pub fn get(address: &str, path: &str) -> Result<String> {
    exchange(address, &format!("GET {path}"), "")
}

/// One request, `METHOD PATH` and a JSON body or nothing, and its answer.
pub(crate) fn exchange(address: &str, line: &str, body: &str) -> Result<String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let head =
            format!("Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close", body.len());
        write!(stream, "{line} HTTP/1.1\r\nHost: {address}\r\n{head}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    exchange().map_err(|error| format!("{line} of {address}: {error}"))
}

/// A program of this workspace, beside the one that is running: `target/debug` for the demo and for tests.
///
/// # Errors
/// When it is not built, with what to do.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.ok_or_else(|| format!("{name} is not built: run `cargo build --workspace --bins` first"))
}
