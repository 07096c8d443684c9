//! Pages of docs/ as tests: the commands of a page are run as they stand there, and what they print is held against what
//! the page says that they print.
//!
//! A [`Desk`] is where a reader sits: bash in the checkout, with the real `helm`, `kubectl`, `aws` and our programs on
//! its `PATH`. Nobody pulls images here; so the programs of the release run as processes of this machine, with the flags
//! that the chart renders and the accounts that it makes, and they are started, restarted and ended as the release is.
//!
//! The webhook is outside of the cluster, at a URL, unless `INSIDE` is set. Then its pods have this machine's address, a
//! process stands for them, and they are ready when that is: so the API server reaches it by Service and endpoints, and
//! `helm install --wait` waits for what it waits for in production.

use crate::cluster::{free_ports, own_address};
use crate::product::{NAMESPACE, built, program_spec};
use crate::programs::source_dir;
use crate::{Aws, Cluster, Output, Result, USER, eventually, get, run};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const START: Duration = Duration::from_secs(60);
const RELEASE: &str = "tgb";
const NAME: &str = "tgb-targetgroupbinding";
/// The annotation of pods that a process of this machine stands for: kwok/stages.yaml.
const STANDS_AT: &str = "tgb.e2e/stands-at";

/// Commands of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The heading above, without its signs.
    pub heading: String,
    /// What a reader types.
    pub commands: String,
    /// What the page says that it prints; a line with `†` is shaped by the fleet, `…` stands for anything.
    pub prints: Option<String>,
}

/// The blocks of commands of a page of docs/, in order.
///
/// # Errors
/// When there is no such page.
pub fn page(name: &str) -> Result<Vec<Block>> {
    let path = source_dir().with_file_name("docs").join(name);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(blocks(&text))
}

fn blocks(text: &str) -> Vec<Block> {
    let mut out: Vec<Block> = Vec::new();
    let (mut heading, mut fence, mut body) = (String::new(), None::<String>, String::new());
    let mut follows = false;
    for line in text.lines() {
        match (&fence, line.strip_prefix("```")) {
            (None, Some(language)) => {
                fence = Some(language.trim().to_owned());
                body.clear();
            }
            (Some(language), Some(_)) => {
                match language.as_str() {
                    "sh" => {
                        let commands = std::mem::take(&mut body);
                        out.push(Block { heading: heading.clone(), commands, prints: None });
                        follows = true;
                    }
                    "" if follows => {
                        if let Some(last) = out.last_mut() {
                            last.prints = Some(std::mem::take(&mut body));
                        }
                        follows = false;
                    }
                    _ => follows = false,
                }
                fence = None;
            }
            (Some(_), None) => {
                body.push_str(line);
                body.push('\n');
            }
            (None, None) if line.starts_with('#') => {
                heading = line.trim_start_matches('#').trim().to_owned();
                follows = false;
            }
            (None, None) => follows &= line.trim().is_empty(),
        }
    }
    out
}

/// Whether what was printed has the lines that a page shows, in order; the first that is missing.
fn missing(prints: &str, printed: &str) -> Option<String> {
    let mut lines = printed.lines();
    let wanted = prints.lines().filter(|line| !line.contains('†') && !line.trim().is_empty());
    for want in wanted {
        let parts: Vec<&str> = want.trim_end().split('…').collect();
        if parts.iter().all(|part| part.trim().is_empty()) {
            continue;
        }
        let has = |line: &str| {
            let mut rest = line;
            parts.iter().all(|part| match rest.find(part.trim()) {
                Some(at) => {
                    rest = rest.get(at + part.trim().len()..).unwrap_or_default();
                    true
                }
                None => false,
            })
        };
        if !lines.by_ref().any(has) {
            return Some(want.to_owned());
        }
    }
    None
}

/// Where a reader of a page sits.
pub struct Desk<'a> {
    cluster: &'a Cluster,
    aws: &'a Aws,
    dir: PathBuf,
    host: IpAddr,
    port: u16,
    http: BTreeMap<&'static str, u16>,
    /// The flags of the programs that run.
    running: Mutex<BTreeMap<&'static str, Vec<String>>>,
    seen: Mutex<BTreeSet<String>>,
}

impl Drop for Desk<'_> {
    /// What it has started ends with it, and does not go on beside the next one's.
    fn drop(&mut self) {
        let _ = self.run_these(BTreeMap::new(), &|_| ());
    }
}

impl<'a> Desk<'a> {
    /// Makes the desk; nothing is installed.
    ///
    /// # Errors
    /// When our programs are not built or no port is free.
    pub fn new(cluster: &'a Cluster, aws: &'a Aws) -> Result<Self> {
        let dir = cluster.dir().join("desk");
        let said = |error: std::io::Error| format!("{}: {error}", dir.display());
        // What another reader left, above all variables, is not this one's.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(said)?;
        }
        fs::create_dir_all(dir.join("bin")).map_err(said)?;
        let [port, webhook, controller] = free_ports()?;
        let host = own_address();
        let programs = cluster.programs();
        let settings = format!("aws: {{region: us-west-2, vpcID: {}}}\n", aws.lab().vpc);
        let outside = format!("webhook: {{url: 'https://{host}:{port}'}}\n{settings}");
        let pods = format!("podAnnotations: {{{STANDS_AT}: '{host}'}}");
        let inside = format!("webhook: {{port: {port}, {pods}}}\ncontroller: {{{pods}}}\n{settings}");
        // Paths of a page are the repository's, and what it writes stays here.
        let checkout = dir.join("checkout");
        fs::create_dir_all(&checkout).map_err(said)?;
        let root = source_dir().parent().unwrap_or_else(|| source_dir());
        for name in ["charts", "controller", "docs", "webhook"] {
            std::os::unix::fs::symlink(root.join(name), checkout.join(name)).map_err(said)?;
        }
        let scripts = [
            ("outside.yaml", outside),
            ("inside.yaml", inside),
            ("bin/docker", wrapper(DOCKER)),
            ("bin/helm", wrapper(&HELM.replace("@helm", &programs.kubernetes("helm").display().to_string()))),
            (
                "bin/kubectl",
                wrapper(&KUBECTL.replace("@kubectl", &programs.kubernetes("kubectl").display().to_string())),
            ),
            ("bin/aws", wrapper(&AWS.replace("@aws", &programs.python("aws").display().to_string()))),
            ("bin/tgb-webhook", wrapper(&format!("exec {} \"$@\"", built("tgb-webhook")?.display()))),
            ("bin/tgb-controller", wrapper(&format!("exec {} \"$@\"", built("tgb-controller")?.display()))),
        ];
        for (name, text) in scripts {
            fs::write(dir.join(name), text).map_err(said)?;
            let mut permissions = fs::metadata(dir.join(name)).map_err(said)?.permissions();
            std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
            fs::set_permissions(dir.join(name), permissions).map_err(said)?;
        }
        let http = BTreeMap::from([("webhook", webhook), ("controller", controller)]);
        Ok(Self { cluster, aws, dir, host, port, http, running: Mutex::default(), seen: Mutex::default() })
    }

    /// Types the commands of a block and compares what they print with what the page says.
    ///
    /// # Errors
    /// A command that failed, or a line that was not printed, with everything that was.
    pub fn follow(&self, block: &Block) -> Result<String> {
        let output = self.types(&block.commands);
        let printed = format!("{}{}", output.stdout, output.stderr);
        let place = format!("below “{}”:\n{}\nprinted:\n{printed}", block.heading, block.commands);
        if let Some(ended) = self.ended() {
            return Err(format!("{ended}\n{place}{}", self.hook_log()));
        }
        if output.code != 0 {
            return Err(format!("exit code {} {place}{}", output.code, self.hook_log()));
        }
        match block.prints.as_deref().and_then(|prints| missing(prints, &printed)) {
            Some(line) => Err(format!("the page says that this is printed: {line}\n{place}")),
            None => Ok(printed),
        }
    }

    /// Types commands. Variables stay for the next ones.
    pub fn types(&self, commands: &str) -> Output {
        let environment = self.dir.join("environment");
        let script = format!(
            "set -aeo pipefail\n[ ! -e {0} ] || . {0}\n{commands}\ndeclare -px >{0}\n",
            environment.display()
        );
        let mut command = Command::new("bash");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["-c", &script])
            .current_dir(self.dir.join("checkout"))
            .env("PATH", format!("{}:{path}", self.dir.join("bin").display()))
            .env("KUBECONFIG", self.cluster.kubeconfig())
            .env("KUBECACHEDIR", self.dir.join("kubectl"))
            .env("DESK", &self.dir)
            .env("LBC", source_dir().join("lbc"))
            .env("HELM_CACHE_HOME", self.dir.join("helm/cache"))
            .env("HELM_CONFIG_HOME", self.dir.join("helm/config"))
            .env("HELM_DATA_HOME", self.dir.join("helm/data"))
            .envs(self.aws.environment(USER));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    self.look();
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
            let output = run(&mut command, commands.to_owned(), "");
            over.store(true, Ordering::Release);
            output
        })
    }

    /// Where the probes of a program (`webhook`, `controller`) are.
    pub fn http(&self, program: &str) -> String {
        format!("127.0.0.1:{}", self.http.get(program).copied().unwrap_or_default())
    }

    /// What the Job of the uninstall hook has said.
    pub fn hook_log(&self) -> String {
        fs::read_to_string(self.dir.join("hook.log")).unwrap_or_default()
    }

    /// What a node would notice: the release has changed, or a Pod of a hook is to be run.
    fn look(&self) {
        let request = self.dir.join("changed");
        if request.exists() {
            if let Err(error) = eventually(START, || self.keep_in_step(&|_| ())) {
                let _ = fs::write(self.dir.join("failed"), error);
            }
            let _ = fs::remove_file(request);
        } else if self.dir.join("helm.running").exists() {
            let pods = self.cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-o", "json"]);
            let Ok(mut pods) = pods.json() else { return };
            let Some(Value::Array(pods)) = pods.get_mut("items").map(Value::take) else { return };
            self.run_hooks(&pods);
            self.run_pods(&pods);
        }
    }

    /// Runs our programs in place of pods, and says when they are ready, as a kubelet does.
    fn run_pods(&self, pods: &[Value]) {
        let annotation = format!("/metadata/annotations/{}", STANDS_AT.replace('/', "~1"));
        let waits = |pod: &&Value| {
            let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
            let is_ready = |condition: &Value| {
                condition.get("type") == Some(&json!("Ready"))
                    && condition.get("status") == Some(&json!("True"))
            };
            pod.pointer(&annotation).is_some()
                && pod.pointer("/metadata/deletionTimestamp").is_none()
                && pod.pointer("/status/phase") == Some(&json!("Running"))
                && !conditions.into_iter().flatten().any(is_ready)
        };
        let waiting: Vec<&Value> = pods.iter().filter(waits).collect();
        if waiting.is_empty() {
            return;
        }
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        let ready =
            json!({"status": {"conditions": [condition("ContainersReady"), condition("Ready")]}}).to_string();
        // Each for itself: the controller is not ready before the API server can ask the webhook to convert.
        let told = |program: &str| {
            let text = |pod: &Value, path: &str| {
                pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let of_it = |pod: &&&Value| text(pod, "/metadata/labels/app.kubernetes.io~1component") == program;
            for pod in waiting.iter().filter(of_it) {
                let name = text(pod, "/metadata/name");
                let args = ["-n", NAMESPACE, "patch", "pod", &name, "--subresource=status", "-p", &ready];
                let _ = self.cluster.kubectl(&args);
            }
        };
        if let Err(error) = self.keep_in_step(&told) {
            self.note(&error);
        }
    }

    fn note(&self, line: &str) {
        let _ = fs::write(self.dir.join("hook.log"), format!("{}{line}\n", self.hook_log()));
    }

    /// A program that has ended though the release wants it: nothing starts it again, and what waits for it waits in vain.
    fn ended(&self) -> Option<String> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let check = |program| self.cluster.processes().check(&format!("desk-{program}")).err();
        running.keys().find_map(check)
    }

    /// Starts, restarts or ends our programs, as the release says; `ready` hears of each that runs and is ready.
    fn keep_in_step(&self, ready: &dyn Fn(&str)) -> Result<()> {
        let mut wanted: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        let values = self.cluster.helm(&["get", "values", RELEASE, "-n", NAMESPACE, "-o", "json"]);
        // Only who was told that there is none may end what runs.
        if let Some(values) = found(values)? {
            let mut values: Value = serde_json::from_str(&values).map_err(|error| error.to_string())?;
            // With a URL the chart renders no Deployment, but the flags are the same.
            if let Some(url) = values.pointer_mut("/webhook/url") {
                *url = json!("");
            }
            let path = self.dir.join("inside.json");
            fs::write(&path, values.to_string()).map_err(|error| error.to_string())?;
            let chart = source_dir().with_file_name("charts").join("targetgroupbinding");
            let chart = chart.display().to_string();
            let path = path.display().to_string();
            for program in ["webhook", "controller"] {
                let template = format!("templates/{program}.yaml");
                let values = ["--values", &path, "--show-only", &template];
                let args = [&["template", RELEASE, &chart, "-n", NAMESPACE], &values[..]].concat();
                let rendered = self.cluster.helm(&args);
                let deployment = format!("deployment/{NAME}-{program}");
                let replicas = ["-n", NAMESPACE, "get", &deployment, "-o", "jsonpath={.spec.replicas}"];
                let replicas = found(self.cluster.kubectl(&replicas))?.unwrap_or_default();
                let runs = program == "webhook" || replicas.trim().parse::<u32>().is_ok_and(|n| n > 0);
                if runs && let Some(rendered) = found(rendered)? {
                    wanted.insert(program, self.args(program, &rendered)?);
                }
            }
        }
        self.run_these(wanted, ready)
    }

    fn run_these(&self, wanted: BTreeMap<&'static str, Vec<String>>, ready: &dyn Fn(&str)) -> Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let processes = self.cluster.processes();
        for program in ["webhook", "controller"] {
            let process = format!("desk-{program}");
            if running.get(program) == wanted.get(program) {
                if running.contains_key(program) {
                    ready(program);
                }
                continue;
            }
            if running.remove(program).is_some()
                && let Err(error) = processes.stop(&process, Duration::from_secs(30))
            {
                self.note(&error);
                let _ = processes.kill(&process);
            }
            if let Some(args) = wanted.get(program) {
                let spec = program_spec(&format!("tgb-{program}"), args.clone(), self.aws, "PRODUCT")?;
                processes.spawn(&process, spec)?;
                eventually(START, || {
                    processes.check(&process)?;
                    let answer = get(&self.http(program), "/readyz?verbose")?;
                    if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
                })
                .inspect_err(|_| {
                    // Another attempt needs its ports.
                    let _ = processes.kill(&process);
                })?;
                running.insert(program, args.clone());
                ready(program);
            }
        }
        Ok(())
    }

    /// The flags as the chart renders them, but for ports and the way to the cluster.
    fn args(&self, program: &'static str, rendered: &str) -> Result<Vec<String>> {
        let object = self.cluster.kubectl_with(
            &["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"],
            rendered.split("\n---").find(|text| text.contains("kind: Deployment")).unwrap_or_default(),
        );
        let object = object.json()?;
        let args = object.pointer("/spec/template/spec/containers/0/args").and_then(Value::as_array);
        let account = object
            .pointer("/spec/template/spec/serviceAccountName")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let mut out: Vec<String> = args
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .filter(|arg| !arg.starts_with("--listen=") && !arg.starts_with("--http-listen="))
            .filter(|arg| !arg.starts_with("--shutdown-delay="))
            .map(str::to_owned)
            .collect();
        let kubeconfig = self.cluster.kubeconfig_of(NAMESPACE, account, self.cluster.server())?;
        out.push(format!("--kubeconfig={}", kubeconfig.display()));
        out.push(format!("--http-listen={}", self.http(program)));
        if program == "webhook" {
            out.push(format!("--listen=0.0.0.0:{}", self.port));
            out.push("--shutdown-delay=0s".to_owned());
            if !rendered.contains(STANDS_AT) {
                out.push(format!("--extra-dns-name={}", self.host));
            }
        }
        Ok(out)
    }

    /// Runs what the Pods of hooks say, as their accounts, and reports how it ended as a kubelet does.
    fn run_hooks(&self, pods: &[Value]) {
        for pod in pods {
            let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let (name, uid) = (text("/metadata/name"), text("/metadata/uid"));
            if !["uninstall", "test"].contains(&text("/metadata/labels/app.kubernetes.io~1component")) {
                continue;
            }
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if text("/status/phase") != "Running" || !seen.insert(uid.to_owned()) {
                continue;
            }
            let ended = self.run_pod(pod, text("/spec/serviceAccountName"));
            let phase = if ended.unwrap_or(false) { "Succeeded" } else { "Failed" };
            let patch = json!({"status": {"phase": phase}}).to_string();
            let args =
                ["-n", NAMESPACE, "patch", "pod", name, "--subresource=status", "--type=merge", "-p", &patch];
            let _ = self.cluster.kubectl(&args);
        }
    }

    fn run_pod(&self, pod: &Value, account: &str) -> Result<bool> {
        // Of this Pod's own account: an earlier one of the same name is gone, and its token with it.
        let kubeconfig =
            self.cluster.kubeconfig_of(NAMESPACE, account, self.cluster.server())?.display().to_string();
        let mut all = true;
        for container in pod.pointer("/spec/containers").and_then(Value::as_array).into_iter().flatten() {
            let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
            let args = container.get("args").and_then(Value::as_array).into_iter().flatten();
            let args = args.filter_map(Value::as_str).map(str::to_owned);
            let program = if image.contains("tgb-controller") {
                built("tgb-controller")?
            } else {
                self.cluster.programs().kubernetes("kubectl")
            };
            let mut command = Command::new(program);
            command.args(args).arg(format!("--kubeconfig={kubeconfig}"));
            let output = run(&mut command, image.to_owned(), "");
            let line = format!("{image}: {}\n{}{}", output.code, output.stdout, output.stderr);
            self.note(&line);
            all &= output.code == 0;
        }
        Ok(all)
    }
}

/// What was asked for, `None` if it does not exist.
fn found(answer: Output) -> Result<Option<String>> {
    let lower = answer.stderr.to_lowercase();
    match ["not found", "could not find template"].iter().any(|said| lower.contains(said)) {
        true => Ok(None),
        false => answer.ok().map(Some),
    }
}

fn wrapper(body: &str) -> String {
    format!("#!/bin/sh\n{body}\n")
}

/// aws; who is no user of EKS keeps the kubeconfig.
const AWS: &str = r#"
case "${1:-} ${2:-}" in
  'eks update-kubeconfig') export KUBECONFIG="$DESK/eks.kubeconfig" ;;
esac
exec @aws "$@""#;

/// docker; there is no daemon here. What would be built has to be there, and only what was built and after a login is pushed.
const DOCKER: &str = r#"
set -e
case $1 in
  login)
    read -r password
    [ -n "$password" ]
    echo "$password" >"$DESK/docker.login"
    echo 'Login Succeeded' ;;
  build)
    while [ $# -gt 0 ]; do
      case $1 in
        --file) [ -s "$2" ]; shift ;;
        --tag) echo "$2" >>"$DESK/docker.built"; shift ;;
      esac
      shift
    done ;;
  push)
    [ -s "$DESK/docker.login" ]
    grep -qxF "$2" "$DESK/docker.built" ;;
  *) exit 1 ;;
esac"#;

/// helm; the webhook is outside of the cluster (unless `INSIDE` is set), LBC's chart is that of e2e/lbc, and nobody goes on before our programs
/// are what the release says.
const HELM: &str = r#"
ours=
for arg; do
  shift
  case $arg in
    charts/targetgroupbinding) ours=1 ;;
    eks/aws-load-balancer-controller) arg=$LBC ;;
  esac
  set -- "$@" "$arg"
done
if [ -n "$ours" ]; then
  if [ -n "${INSIDE:-}" ]; then set -- "$@" --values "$DESK/inside.yaml"; else set -- "$@" --values "$DESK/outside.yaml"; fi
fi
: >"$DESK/helm.running"
@helm "$@"
code=$?
rm -f "$DESK/helm.running"
case $1 in
  install | upgrade | rollback | uninstall)
    : >"$DESK/changed"
    while [ -e "$DESK/changed" ]; do sleep 0.05; done
    if [ -e "$DESK/failed" ]; then cat "$DESK/failed" >&2; rm "$DESK/failed"; exit 1; fi ;;
esac
exit $code"#;

/// kubectl; the CRD of LBC is that of e2e/lbc, nobody waits as long as for a fleet, and after a `scale` nobody goes on before our
/// programs follow.
const KUBECTL: &str = r#"
scales=
for arg; do
  shift
  case $arg in
    -k) arg=-f ;;
    github.com/aws/eks-charts/*) arg=$LBC/crds ;;
    scale) scales=1 ;;
    --timeout=10m) arg=--timeout=3m ;;
  esac
  set -- "$@" "$arg"
done
@kubectl "$@"
code=$?
if [ -n "$scales" ]; then
  : >"$DESK/changed"
  while [ -e "$DESK/changed" ]; do sleep 0.05; done
fi
exit $code"#;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "these are tests")]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_its_commands_and_what_they_print() {
        let text = "# A\n\n```sh\none\n```\n\n```\n1 …\n```\n\n## B\ntext\n```sh\ntwo\n```\nwords\n```\nno output\n```\n```json\n{}\n```\n";
        let found = blocks(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].heading.as_str(), found[0].prints.as_deref()), ("A", Some("1 …\n")));
        assert_eq!((found[1].commands.as_str(), found[1].prints.as_deref()), ("two\n", None));
    }

    #[test]
    fn printed_lines_are_compared_in_order_and_with_gaps() {
        assert_eq!(missing("a … c\nshaped †\n…\n", "x\na b c\n"), None);
        assert_eq!(missing("b\na\n", "a\nb\n"), Some("a".to_owned()));
        assert_eq!(missing("a c", "a b c"), Some("a c".to_owned()));
    }
}
