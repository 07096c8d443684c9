//! The product on a control plane: the chart is installed, both programs run on this machine as the service accounts
//! that the chart made, so that they may do what their roles say and no more.

use crate::cluster::{free_ports, own_address};
use crate::programs::source_dir;
use crate::{Aws, Cluster, Result, Spec, eventually};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

/// Namespace of the release.
pub const NAMESPACE: &str = "tgb-system";
/// Name of the cluster, as in tags and rule descriptions.
pub const CLUSTER_NAME: &str = "demo";
const NAME: &str = "tgb-targetgroupbinding";
const START: Duration = Duration::from_secs(30);

/// How the product is started; flags are added to the harness's own.
#[derive(Debug, Clone, Default)]
pub struct Settings {
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

/// The running product: the processes `tgb-webhook` and `tgb-controller` of the cluster.
#[derive(Debug, Clone)]
pub struct Product {
    /// Where the webhook's `/readyz` and `/metrics` are, `127.0.0.1:PORT`.
    pub webhook_http: String,
    /// Where the controller's are.
    pub controller_http: String,
}

impl Product {
    /// Installs the chart, starts both programs and returns when they are ready.
    ///
    /// # Errors
    /// When a program is not built, the chart is refused, or a program is not ready in time, with its last lines.
    pub fn start(cluster: &Cluster, aws: &Aws, settings: &Settings) -> Result<Self> {
        let webhook = built("tgb-webhook")?;
        let controller = built("tgb-controller")?;
        let [port, webhook_http, controller_http] = free_ports()?;
        let host = if settings.by_own_address { own_address() } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };

        let chart = source_dir().with_file_name("charts").join("targetgroupbinding").display().to_string();
        let mut values = vec![
            format!("clusterName={CLUSTER_NAME}"),
            format!("webhook.url=https://{host}:{port}"),
            "controller.replicas=0".to_owned(),
        ];
        values.extend_from_slice(&settings.values);
        let mut helm =
            vec!["upgrade", "--install", "tgb", &chart, "--namespace", NAMESPACE, "--create-namespace"];
        for value in &values {
            helm.extend(["--set", value]);
        }
        cluster.helm(&helm).ok()?;

        let http = |port: u16| format!("127.0.0.1:{port}");
        let flags = |account: &str, command: &str, port: u16| -> Result<Vec<String>> {
            let kubeconfig = cluster.kubeconfig_of(NAMESPACE, account)?;
            Ok(vec![
                command.to_owned(),
                format!("--kubeconfig={}", kubeconfig.display()),
                format!("--cluster-name={CLUSTER_NAME}"),
                format!("--aws-vpc-id={}", aws.lab().vpc),
                format!("--http-listen=127.0.0.1:{port}"),
            ])
        };
        let mut args = flags(&format!("{NAME}-webhook"), "serve", webhook_http)?;
        args.extend([
            format!("--listen={}:{port}", if settings.by_own_address { "0.0.0.0" } else { "127.0.0.1" }),
            "--cert-mode=self".to_owned(),
            format!("--self-secret-namespace={NAMESPACE}"),
            format!("--self-secret-name={NAME}-webhook-ca"),
            format!("--webhook-config-name={NAME}"),
            format!("--extra-dns-name={host}"),
            "--log-format=text".to_owned(),
            "--shutdown-delay=0s".to_owned(),
        ]);
        args.extend_from_slice(&settings.webhook);
        start(cluster, aws, "tgb-webhook", webhook, args)?;

        let mut args = flags(&format!("{NAME}-controller"), "run", controller_http)?;
        args.extend([format!("--lease-namespace={NAMESPACE}"), format!("--lease-name={NAME}-controller")]);
        args.extend_from_slice(&settings.controller);
        start(cluster, aws, "tgb-controller", controller, args)?;

        let product = Self { webhook_http: http(webhook_http), controller_http: http(controller_http) };
        for (name, address) in
            [("tgb-webhook", &product.webhook_http), ("tgb-controller", &product.controller_http)]
        {
            eventually(START, || {
                cluster.processes().check(name)?;
                let answer = get(address, "/readyz?verbose").map_err(|error| format!("{name}: {error}"))?;
                if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(format!("{name}: {answer}")) }
            })?;
        }
        Ok(product)
    }
}

/// What plain HTTP answers, head and body.
///
/// # Errors
/// When nobody answers.
pub fn get(address: &str, path: &str) -> Result<String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    exchange().map_err(|error| format!("http://{address}{path}: {error}"))
}

fn start(cluster: &Cluster, aws: &Aws, name: &str, program: PathBuf, args: Vec<String>) -> Result<()> {
    let mut spec = Spec::new(program, args).env("NO_COLOR", "1");
    for (name, value) in aws.environment() {
        spec = spec.env(&name, value);
    }
    cluster.processes().spawn(name, spec)
}

/// A program of this workspace, beside the one that is running: `target/debug` for the demo and for tests.
fn built(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.ok_or_else(|| format!("{name} is not built: run `cargo build --workspace --bins` first"))
}
