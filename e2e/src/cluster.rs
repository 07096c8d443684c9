//! The control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kwok.

use crate::product::exchange;
use crate::programs::source_dir;
use crate::{Output, Processes, Programs, Result, Spec, eventually, run};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const START: Duration = Duration::from_secs(60);
const ADMIN_TOKEN: &str = "admin-token";

/// How a control plane is started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Listen on the machine's own address, too, as production's API servers are not on loopback.
    pub reachable: bool,
    /// Write an audit log of everything that is not the control plane's own: [`Cluster::audit`].
    pub audit: bool,
    /// Let watches be answered by etcd itself, without the API server's cache of recent changes, so that a compaction of
    /// etcd makes them expire at once.
    pub uncached_watches: bool,
}

/// A running control plane. Dropping it ends all its processes.
#[derive(Debug)]
pub struct Cluster {
    pub(crate) processes: Arc<Processes>,
    programs: Programs,
    server: String,
    etcd: String,
    ca_pem: String,
    kubeconfig: PathBuf,
}

impl Cluster {
    /// Starts everything and returns when the API server is ready: about 5 s.
    ///
    /// # Errors
    /// One line about what is missing, or the last lines of the log of the process that ended.
    pub fn start(options: Options) -> Result<Self> {
        let processes = Arc::new(Processes::new()?);
        let programs = Programs::find(&processes)?;
        let dir = processes.dir().to_owned();
        let at = |name: &str| dir.join(name).display().to_string();
        let [etcd, peer, api, kwok] = free_ports()?;
        let own = own_address();
        let host = if options.reachable { own } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };

        processes.spawn(
            "etcd",
            Spec::new(
                programs.kubernetes("etcd"),
                [
                    "--unsafe-no-fsync".to_owned(),
                    "--log-level=warn".to_owned(),
                    format!("--data-dir={}", at("etcd")),
                    format!("--listen-client-urls=http://127.0.0.1:{etcd}"),
                    format!("--advertise-client-urls=http://127.0.0.1:{etcd}"),
                    format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
                ],
            ),
        )?;
        let ca_pem = certificates(&dir, own)?;
        write(&dir.join("tokens.csv"), &format!("{ADMIN_TOKEN},admin,admin,\"system:masters\"\n"))?;
        eventually(START, || {
            processes.check("etcd")?;
            TcpStream::connect(("127.0.0.1", etcd)).map_err(|error| error.to_string())
        })?;

        let mut flags = vec![
            format!("--etcd-servers=http://127.0.0.1:{etcd}"),
            format!("--secure-port={api}"),
            format!("--bind-address={}", if options.reachable { "0.0.0.0" } else { "127.0.0.1" }),
            format!("--advertise-address={own}"),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--tls-cert-file={}", at("server.crt")),
            format!("--tls-private-key-file={}", at("server.key")),
            "--authorization-mode=RBAC".to_owned(),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", at("accounts.pub")),
            format!("--service-account-signing-key-file={}", at("accounts.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            // Nobody routes the addresses of Services here; webhooks behind them are called at their pods' own.
            "--enable-aggregator-routing=true".to_owned(),
        ];
        if options.uncached_watches {
            flags.push("--watch-cache=false".to_owned());
        }
        if options.audit {
            write(&dir.join("audit.yaml"), AUDIT_POLICY)?;
            flags.push(format!("--audit-policy-file={}", at("audit.yaml")));
            flags.push(format!("--audit-log-path={}", at("audit.log")));
        }
        processes.spawn("kube-apiserver", Spec::new(programs.kubernetes("kube-apiserver"), flags))?;
        let server = format!("https://{host}:{api}");
        let kubeconfig = dir.join("kubeconfig");
        let etcd = format!("127.0.0.1:{etcd}");
        let cluster = Self { processes, programs, server, etcd, ca_pem, kubeconfig };
        cluster.write_kubeconfig(&cluster.kubeconfig, &cluster.server, ADMIN_TOKEN)?;
        cluster.until_ready()?;
        cluster.start_the_rest(&dir, kwok)?;
        Ok(cluster)
    }

    fn start_the_rest(&self, dir: &Path, kwok: u16) -> Result<()> {
        let at = |name: &str| dir.join(name).display().to_string();
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig.display());
        let authentication = format!("--authentication-kubeconfig={}", self.kubeconfig.display());
        let authorization = format!("--authorization-kubeconfig={}", self.kubeconfig.display());
        self.processes.spawn(
            "kube-controller-manager",
            Spec::new(
                self.programs.kubernetes("kube-controller-manager"),
                [
                    kubeconfig.clone(),
                    authentication.clone(),
                    authorization.clone(),
                    "--leader-elect=false".to_owned(),
                    "--secure-port=0".to_owned(),
                    format!("--service-account-private-key-file={}", at("accounts.key")),
                    format!("--root-ca-file={}", at("ca.crt")),
                ],
            ),
        )?;
        self.processes.spawn(
            "kube-scheduler",
            Spec::new(
                self.programs.kubernetes("kube-scheduler"),
                [
                    kubeconfig.clone(),
                    authentication,
                    authorization,
                    "--leader-elect=false".to_owned(),
                    "--secure-port=0".to_owned(),
                ],
            ),
        )?;
        self.processes.spawn(
            "kwok",
            Spec::new(
                self.programs.kubernetes("kwok"),
                [
                    kubeconfig,
                    "--manage-all-nodes".to_owned(),
                    "--cidr=10.244.0.0/16".to_owned(),
                    "--node-lease-duration-seconds=40".to_owned(),
                    format!("--server-address=127.0.0.1:{kwok}"),
                    format!("--config={}", source_dir().join("kwok/stages.yaml").display()),
                ],
            )
            .env("KWOK_WORKDIR", at("kwok")),
        )
    }

    /// Waits until the API server is ready, as after a restart.
    ///
    /// # Errors
    /// When it has ended, or isn't ready within a minute, with its last lines.
    pub fn until_ready(&self) -> Result<()> {
        eventually(START, || {
            self.processes.check("kube-apiserver")?;
            self.kubectl(&["get", "--raw", "/readyz"]).ok()
        })
        .map(drop)
    }

    /// The processes, to pause, kill and restart them by name (`etcd`, `kube-apiserver`, …).
    pub fn processes(&self) -> &Processes {
        &self.processes
    }

    /// Where the programs are.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// For files of this run.
    pub fn dir(&self) -> &Path {
        self.processes.dir()
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The API server's URL.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The API server's address.
    ///
    /// # Errors
    /// Never: its URL has an address and a port.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        let address = self.server.strip_prefix("https://").unwrap_or_default().parse();
        address.map_err(|error| format!("{}: {error}", self.server))
    }

    /// The administrator's bearer token.
    pub fn token(&self) -> &'static str {
        ADMIN_TOKEN
    }

    /// etcd's address, for those who need thousands of objects at once.
    pub fn etcd(&self) -> &str {
        &self.etcd
    }

    /// Runs kubectl as the administrator.
    pub fn kubectl(&self, args: &[&str]) -> Output {
        self.kubectl_with(args, "")
    }

    /// Runs kubectl as the administrator with standard input.
    pub fn kubectl_with(&self, args: &[&str], stdin: &str) -> Output {
        let mut command = Command::new(self.programs.kubernetes("kubectl"));
        // its cache of what the server offers must not outlive this server, whose port another one may get
        let cache = self.dir().join("kubectl-cache");
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--cache-dir").arg(cache).args(args);
        run(&mut command, shown("kubectl", args), stdin)
    }

    /// Runs helm as the administrator.
    pub fn helm(&self, args: &[&str]) -> Output {
        let mut command = Command::new(self.programs.kubernetes("helm"));
        command.env("KUBECONFIG", &self.kubeconfig);
        for (name, place) in
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(name, self.dir().join("helm").join(place));
        }
        run(command.args(args), shown("helm", args), "")
    }

    /// Makes a namespace with these labels, ready for pods.
    ///
    /// # Errors
    /// When there is one already, or it isn't ready within a minute.
    pub fn namespace(&self, name: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.kubectl_with(&["create", "-f", "-"], &object.to_string()).ok()?;
        eventually(START, || self.kubectl(&["-n", name, "get", "serviceaccount", "default"]).ok()).map(drop)
    }

    /// Makes nodes and waits until they are ready.
    ///
    /// # Errors
    /// When they are not ready within a minute.
    pub fn nodes(&self, nodes: &[Node]) -> Result<()> {
        let objects: Vec<Value> = nodes.iter().map(Node::object).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
        self.kubectl_with(&["apply", "-f", "-"], &list).ok()?;
        eventually(START, || {
            self.processes.check("kwok")?;
            self.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=1s"]).ok()
        })
        .map(drop)
    }

    /// Writes a kubeconfig that carries the token of a service account, so that RBAC is what a pod of it has, and leads
    /// to `server`: our own URL or a proxy's.
    ///
    /// # Errors
    /// When there is no such account.
    pub fn kubeconfig_of(&self, namespace: &str, account: &str, server: &str) -> Result<PathBuf> {
        let token = self.kubectl(&["-n", namespace, "create", "token", account, "--duration=24h"]).ok()?;
        let path = self.dir().join(format!("kubeconfig.{namespace}.{account}"));
        self.write_kubeconfig(&path, server, token.trim())?;
        Ok(path)
    }

    /// Compacts etcd up to its present revision, as the API server does every five minutes: watches and lists from older
    /// resource versions are refused from then on, once its own cache does not have them. Gives the revision.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn compact_etcd(&self) -> Result<u64> {
        let now = self.ask_etcd("/v3/kv/range", &json!({"key": "AA==", "count_only": true}))?;
        let revision =
            now.pointer("/header/revision").and_then(Value::as_str).and_then(|text| text.parse().ok());
        let revision: u64 = revision.ok_or_else(|| format!("etcd has no revision: {now}"))?;
        self.ask_etcd("/v3/kv/compaction", &json!({"revision": revision.to_string(), "physical": true}))?;
        Ok(revision)
    }

    /// Changes a binding where it is stored, so that neither schema nor webhook see it: as one that was stored before
    /// there were any. It is in the CRD's storage version.
    ///
    /// # Errors
    /// When etcd does not answer, or there is no such binding.
    pub fn change_stored(&self, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let key = format!("/registry/elbv2.k8s.aws/targetgroupbindings/{namespace}/{name}");
        let key = BASE64.encode(key);
        let found = self.ask_etcd("/v3/kv/range", &json!({"key": key}))?;
        let text = |pointer: &str| found.pointer(pointer).and_then(Value::as_str);
        let stored = text("/kvs/0/value").and_then(|value| BASE64.decode(value).ok());
        let stored = stored.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut object: Value = stored.ok_or_else(|| format!("etcd has no binding {namespace}/{name}"))?;
        change(&mut object);
        // As every change of a spec does.
        if let Some(generation) = object.pointer_mut("/metadata/generation") {
            *generation = json!(generation.as_u64().unwrap_or_default() + 1);
        }
        let value = BASE64.encode(object.to_string());
        self.ask_etcd("/v3/kv/put", &json!({"key": key, "value": value})).map(drop)
    }

    fn ask_etcd(&self, path: &str, question: &Value) -> Result<Value> {
        let answer = exchange(&self.etcd, &format!("POST {path}"), &question.to_string())?;
        let body = answer
            .split_once("\r\n\r\n")
            .map(|(_, body)| body)
            .filter(|_| answer.starts_with("HTTP/1.1 200"));
        let body = body.and_then(|body| body.get(body.find('{')?..=body.rfind('}')?));
        body.and_then(|body| serde_json::from_str(body).ok()).ok_or_else(|| format!("etcd{path}: {answer}"))
    }

    /// The audit log so far, one event per line, if it was asked for.
    pub fn audit(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir().join("audit.log")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// What somebody needs who looks for the cause of a failure in some namespaces: objects, events and the last lines
    /// of the logs of `processes`.
    pub fn report(&self, namespaces: &[String], processes: &[String]) -> String {
        let mut text = String::new();
        let kinds = "targetgroupbindings,services,endpointslices,pods,deployments,configmaps";
        for namespace in namespaces {
            for args in [
                vec!["get", kinds, "-o", "wide"],
                vec!["get", "targetgroupbindings", "-o", "yaml"],
                vec!["get", "events", "--sort-by=.lastTimestamp"],
            ] {
                let output = self.kubectl(&[&["-n", namespace], args.as_slice()].concat());
                text.push_str(&format!("$ {}\n{}{}\n", output.command, output.stdout, output.stderr));
            }
        }
        for name in processes {
            let log = self.processes.log(name);
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default();
            text.push_str(&format!("--- the last lines of {name}\n{}\n", tail.join("\n")));
        }
        text
    }

    fn write_kubeconfig(&self, path: &Path, server: &str, token: &str) -> Result<()> {
        let ca = self.dir().join("ca.crt");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tgb", "cluster": {"server": server, "certificate-authority": ca}}],
            "users": [{"name": "tgb", "user": {"token": token}}],
            "contexts": [{"name": "tgb", "context": {"cluster": "tgb", "user": "tgb"}}],
            "current-context": "tgb",
        });
        write(path, &config.to_string())
    }

    /// The certificate of the authority that signed the API server's, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}

/// A node, as EKS makes them.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The id of its instance.
    pub instance: String,
    /// The zone of its instance.
    pub zone: String,
    /// The primary address of its instance.
    pub ip: Ipv4Addr,
    /// Where its pods get their addresses from.
    pub pod_cidr: String,
}

impl Node {
    fn object(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.name,
                "labels": {
                    "kubernetes.io/hostname": self.name,
                    "kubernetes.io/os": "linux",
                    "topology.kubernetes.io/zone": self.zone,
                },
                "annotations": {"tgb.e2e/ip": self.ip},
            },
            "spec": {
                "providerID": format!("aws:///{}/{}", self.zone, self.instance),
                "podCIDR": self.pod_cidr,
                "podCIDRs": [self.pod_cidr],
            },
        })
    }
}

/// Everything but the chatter of the control plane itself.
const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, users: [admin, 'system:apiserver', 'system:anonymous']}
- {level: Metadata}
";

/// A command line as a user would type it.
pub(crate) fn shown(program: &str, args: &[&str]) -> String {
    let mut line = program.to_owned();
    for arg in args {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@%+".contains(c);
        line.push(' ');
        if !arg.is_empty() && arg.chars().all(plain) {
            line.push_str(arg);
        } else {
            line.push_str(&format!("'{}'", arg.replace('\'', r"'\''")));
        }
    }
    line
}

/// Ports that nobody else gets while this process lives, each only once.
///
/// They are below those that a system gives to outgoing connections, so that none of these takes one before the program
/// that it was meant for has started; and in blocks that harnesses side by side lock by a file.
///
/// # Errors
/// When there are not so many.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    const BLOCK: u16 = 64;
    const BLOCKS: u16 = 300;
    const FIRST: u16 = 10_240;
    /// What is left of the newest block, and the files of all of them.
    static MINE: Mutex<(std::ops::Range<u16>, Vec<File>)> = Mutex::new((0..0, Vec::new()));
    let failed = |error: std::io::Error| format!("no ports on this machine can be claimed: {error}");
    let mut mine = MINE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ports = [0; N];
    for port in &mut ports {
        *port = loop {
            if let Some(port) = mine.0.next() {
                if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
                    break port;
                }
                continue;
            }
            let dir = std::env::temp_dir().join("tgb-ports");
            fs::create_dir_all(&dir).map_err(failed)?;
            // Those that ended a moment ago are not begun with.
            let begin = u16::try_from(std::process::id() % u32::from(BLOCKS)).unwrap_or_default();
            let claim = |n: u16| {
                let first = FIRST + (begin + n) % BLOCKS * BLOCK;
                let file = File::create(dir.join(first.to_string())).ok()?;
                file.try_lock().ok().map(|()| (first..first + BLOCK, file))
            };
            let (block, file) = (0..BLOCKS).find_map(claim).ok_or("all blocks of ports are taken")?;
            mine.0 = block;
            mine.1.push(file);
        };
    }
    Ok(ports)
}

/// The machine's own address towards the world, loopback if it has none. Nothing is sent.
pub fn own_address() -> IpAddr {
    let probe = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.connect(("192.0.2.1", 9))?;
        Ok(socket.local_addr()?.ip())
    };
    probe().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{} cannot be written: {error}", path.display()))
}

/// The API server's certificate, the authority's and the key pair of the service accounts; returns the authority's.
fn certificates(dir: &Path, own: IpAddr) -> Result<String> {
    let make = || -> std::result::Result<(String, String, String, KeyPair), rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "tgb test control plane");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let names = [
            "127.0.0.1".to_owned(),
            own.to_string(),
            "kubernetes.default.svc".to_owned(),
            "localhost".to_owned(),
        ];
        let server = CertificateParams::new(names)?.signed_by(&key, &ca)?;
        Ok((ca.pem(), server.pem(), key.serialize_pem(), KeyPair::generate()?))
    };
    let (ca, server, key, accounts) = make().map_err(|error| format!("no certificates: {error}"))?;
    for (name, text) in [
        ("ca.crt", &ca),
        ("server.crt", &server),
        ("server.key", &key),
        ("accounts.key", &accounts.serialize_pem()),
        ("accounts.pub", &accounts.public_key_pem()),
    ] {
        write(&dir.join(name), text)?;
    }
    Ok(ca)
}
