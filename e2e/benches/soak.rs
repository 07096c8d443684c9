//! `make soak`: mixed change with faults for an hour (`MINUTES=`). At every settled moment AWS holds exactly what the
//! cluster wants; memory stays flat; no log line repeats without end. `SEED=` repeats a run's choices.

use crate::machine;
use crate::stage::Stage;
use crate::table::Side;
use awsim::{Effect, Fault};
use fastrand::Rng;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tgb_e2e::{Result, eventually};

const NAMESPACE: &str = "soak";
const SHOPS: usize = 8;
const WEBHOOK: &str = "tgb-webhook";
const CONTROLLER: &str = "tgb-controller";
/// From the end of all faults to the settled state.
const SETTLES: Duration = Duration::from_secs(150);
/// A line of the log is printed at most that often in a run.
const MOST_OF_A_LINE: usize = 1_000;

/// Runs to its end, or to the first thing that is wrong.
pub(crate) async fn run() -> Result<()> {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (minutes, seed) = (number("MINUTES", 60), number("SEED", u64::from(std::process::id())));
    println!("soak: {minutes} minutes, SEED={seed}");
    let mut soak = Soak::start(seed)?;
    let begun = Instant::now();
    let all = Duration::from_secs(60 * minutes);
    let mut memory = Vec::new();
    while begun.elapsed() < all {
        // Crashes come in the first third; after that the same processes live on, or a leak would be hidden.
        let crashes = begun.elapsed() < all / 3;
        let round = Instant::now();
        while round.elapsed() < Duration::from_secs(40) {
            soak.act(crashes)?;
            std::thread::sleep(Duration::from_millis(soak.random.u64(100..1_500)));
        }
        let settled = soak.settle().map_err(|error| soak.report(&error))?;
        let now = [WEBHOOK, CONTROLLER].map(|name| machine::memory(soak.stage.pid(name)).0 as f64 / 1e6);
        println!(
            "{:>5.1} min: {} actions, settled after {:.1} s, webhook {:.1} MB, controller {:.1} MB",
            begun.elapsed().as_secs_f64() / 60.0,
            soak.actions.values().sum::<usize>(),
            settled.as_secs_f64(),
            now[0],
            now[1]
        );
        if !crashes {
            memory.push(now);
        }
    }
    println!("actions: {:?}", soak.actions);
    soak.logs()?;
    flat(&memory)
}

/// The median of the last third beside that of the first.
fn flat(memory: &[[f64; 2]]) -> Result<()> {
    let third = memory.len() / 3;
    if third == 0 {
        println!("too short to say whether memory is flat");
        return Ok(());
    }
    for (at, name) in [WEBHOOK, CONTROLLER].into_iter().enumerate() {
        let median = |part: &[[f64; 2]]| {
            let mut values: Vec<f64> = part.iter().map(|now| now[at]).collect();
            machine::quantile(&mut values, 0.5)
        };
        let (first, last) = (median(&memory[..third]), median(&memory[memory.len() - third..]));
        println!("memory of {name}: {first:.1} MB, later {last:.1} MB");
        if last > first * 1.1 + 2.0 {
            return Err(format!("the memory of {name} grows: {first:.1} MB, later {last:.1} MB"));
        }
    }
    Ok(())
}

struct Soak {
    stage: Stage,
    random: Rng,
    arns: Vec<String>,
    actions: BTreeMap<&'static str, usize>,
}

impl Soak {
    fn start(seed: u64) -> Result<Self> {
        let stage =
            Stage::start(Side::Ours, &["--health-poll=10s", "--missing-backend-grace=5s", "--resync=30s"])?;
        stage.cluster.namespace(NAMESPACE, &BTreeMap::new())?;
        let server = stage.aws.server().ok_or("this needs awsim")?;
        server.seed_random(seed);
        let lab = stage.aws.lab();
        let mut arns = Vec::new();
        for n in 0..SHOPS {
            let line = format!(
                "elbv2 create-target-group --name soak-{n} --protocol HTTP --port 80 --target-type ip --vpc-id {} \
                 --query TargetGroups[0].TargetGroupArn --output text",
                lab.vpc
            );
            let args: Vec<&str> = line.split_whitespace().collect();
            arns.push(stage.aws.cli(&stage.cluster, &args).ok()?.trim().to_owned());
        }
        let soak = Self { stage, random: Rng::with_seed(seed), arns, actions: BTreeMap::new() };
        for n in 0..SHOPS {
            let deployment = json!({
                "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": format!("web-{n}")},
                "spec": {"replicas": 3, "selector": {"matchLabels": {"app": format!("web-{n}")}}, "template": {
                    "metadata": {"labels": {"app": format!("web-{n}")}},
                    "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "web", "image": "web", "ports": [{"containerPort": 8080}]}]},
                }},
            });
            for object in [deployment, soak.service(n), soak.binding(n)] {
                soak.apply(&object)?;
            }
        }
        Ok(soak)
    }

    fn service(&self, n: usize) -> serde_json::Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("web-{n}")},
               "spec": {"selector": {"app": format!("web-{n}")}, "ports": [{"port": 80, "targetPort": 8080}]}})
    }

    fn binding(&self, n: usize) -> serde_json::Value {
        json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": format!("web-{n}")},
               "spec": {"targetGroup": {"arn": self.arns[n]}, "serviceRef": {"name": format!("web-{n}"), "port": 80},
                        "networking": {"ingress": [{"from": [{"securityGroup": {"groupID": self.stage.aws.lab().lb_group}}],
                                                    "ports": [{"protocol": "TCP", "port": 8080}]}]}}})
    }

    fn apply(&self, object: &serde_json::Value) -> Result<()> {
        // While a webhook or the API server restarts, a user tries again.
        let try_it = || {
            self.stage.cluster.kubectl_with(&["-n", NAMESPACE, "apply", "-f", "-"], &object.to_string()).ok()
        };
        eventually(SETTLES, try_it).map(drop)
    }

    /// Runs kubectl; what fails because something is being restarted is left to the next time.
    fn kubectl(&self, line: &str) -> String {
        let args: Vec<&str> = ["-n", NAMESPACE].into_iter().chain(line.split_whitespace()).collect();
        self.stage.cluster.kubectl(&args).ok().unwrap_or_default()
    }

    fn act(&mut self, crashes: bool) -> Result<()> {
        let n = self.random.usize(..SHOPS);
        let processes = self.stage.cluster.processes();
        let server = self.stage.aws.server().ok_or("this needs awsim")?;
        let aws = |line: &str| {
            let args: Vec<&str> = line.split_whitespace().collect();
            self.stage.aws.cli(&self.stage.cluster, &args).ok().unwrap_or_default()
        };
        let what = match self.random.u32(..100) {
            0..30 => {
                let replicas = self.random.u32(0..7);
                self.kubectl(&format!("scale deployment web-{n} --replicas={replicas}"));
                "scale"
            }
            30..40 => {
                self.kubectl(&format!("rollout restart deployment web-{n}"));
                "rollout"
            }
            40..55 => {
                let pods = self.kubectl(&format!("get pods -l app=web-{n} -o name"));
                if let Some(pod) = pods.lines().next() {
                    self.kubectl(&format!("delete {pod} --wait=false"));
                }
                "delete a pod"
            }
            55..63 => {
                self.kubectl(&format!("delete service web-{n}"));
                self.apply(&self.service(n))?;
                "replace a Service"
            }
            63..71 => {
                self.kubectl(&format!("delete tgb web-{n} --wait=false"));
                // What is applied to one that is still being cleaned up goes with it.
                eventually(SETTLES, || {
                    let line = ["-n", NAMESPACE, "get", "tgb", &format!("web-{n}"), "--ignore-not-found"];
                    let found = self.stage.cluster.kubectl(&line).ok()?;
                    if found.trim().is_empty() { Ok(()) } else { Err(found) }
                })?;
                self.apply(&self.binding(n))?;
                "replace a binding"
            }
            71..75 => {
                let rows = server.targets(awsim::DEFAULT_ACCOUNT, "us-west-2", &self.arns[n]);
                if let Some(row) = rows.iter().find(|row| row.state != "draining") {
                    let target = format!("--targets Id={},Port={}", row.id, row.port);
                    aws(&format!("elbv2 deregister-targets --target-group-arn {} {target}", self.arns[n]));
                }
                "take a target away by hand"
            }
            75..78 => {
                let target = format!("--targets Id=10.244.250.{},Port=8080", self.random.u8(2..250));
                aws(&format!("elbv2 register-targets --target-group-arn {} {target}", self.arns[n]));
                "add a target by hand"
            }
            78..93 => {
                let effect = match self.random.u32(..5) {
                    0 => Effect::Throttle,
                    1 => Effect::Unavailable,
                    2 => Effect::LostResponse,
                    3 => Effect::Reset,
                    _ => Effect::Latency { ms: self.random.u64(10..500) },
                };
                server.fault(Fault::new(effect).probability(0.3).times(self.random.u64(1..20)));
                "a fault of AWS"
            }
            93..95 if crashes => {
                processes.restart(CONTROLLER)?;
                "kill the controller"
            }
            95..97 if crashes => {
                processes.restart(WEBHOOK)?;
                "kill the webhook"
            }
            97 if crashes => {
                processes.restart("kube-apiserver")?;
                "kill the API server"
            }
            _ => {
                let note = self.random.u32(..);
                self.kubectl(&format!("annotate tgb web-{n} note={note} --overwrite"));
                "annotate"
            }
        };
        *self.actions.entry(what).or_default() += 1;
        Ok(())
    }

    /// Ends all faults and waits until every target group holds the ready pods of its Deployment and nothing else.
    fn settle(&mut self) -> Result<Duration> {
        let server = self.stage.aws.server().ok_or("this needs awsim")?;
        server.clear_faults();
        let begun = Instant::now();
        eventually(SETTLES, || {
            let deployments =
                self.stage.cluster.kubectl(&["-n", NAMESPACE, "get", "deployments", "-o", "json"]).json()?;
            for deployment in deployments["items"].as_array().into_iter().flatten() {
                let (spec, status) = (&deployment["spec"], &deployment["status"]);
                let count = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
                if count(&spec["replicas"]) != count(&status["readyReplicas"])
                    || count(&status["replicas"]) != count(&spec["replicas"])
                {
                    return Err(format!("{} is not done: {status}", deployment["metadata"]["name"]));
                }
            }
            let pods = self.stage.cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-o", "json"]).json()?;
            for n in 0..SHOPS {
                let wanted: BTreeSet<String> = pods["items"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter(|pod| {
                        pod["metadata"]["labels"]["app"] == format!("web-{n}")
                            && pod["metadata"]["deletionTimestamp"].is_null()
                    })
                    .filter_map(|pod| pod["status"]["podIP"].as_str().map(str::to_owned))
                    .collect();
                let rows = server.targets(awsim::DEFAULT_ACCOUNT, "us-west-2", &self.arns[n]);
                let live: BTreeSet<String> =
                    rows.into_iter().filter(|row| row.state != "draining").map(|row| row.id).collect();
                if live != wanted {
                    return Err(format!("target group {n} has {live:?}, the cluster wants {wanted:?}"));
                }
            }
            Ok(())
        })?;
        Ok(begun.elapsed())
    }

    /// The lines of the logs without their numbers, and how often they came.
    fn logs(&self) -> Result<()> {
        let mut most = 0;
        for name in [WEBHOOK, CONTROLLER] {
            let mut lines: BTreeMap<String, usize> = BTreeMap::new();
            for line in self.stage.cluster.processes().log(name).lines() {
                let shape: String = line.chars().filter(|c| !c.is_ascii_digit()).collect();
                let shape = shape.split_once("Z ").map_or(shape.as_str(), |(_, rest)| rest);
                *lines.entry(shape.chars().take(160).collect()).or_default() += 1;
            }
            let mut lines: Vec<(usize, String)> =
                lines.into_iter().map(|(line, count)| (count, line)).collect();
            lines.sort_by(|a, b| b.cmp(a));
            println!(
                "{name}: {} lines, the most frequent:",
                lines.iter().map(|(count, _)| count).sum::<usize>()
            );
            for (count, line) in lines.iter().take(4) {
                println!("  {count:>6} × {}", line.trim());
            }
            // What tells of work that was done comes as often as the work.
            let complaints = lines.iter().filter(|(_, line)| !line.trim_start().starts_with("INFO"));
            most = complaints.map(|(count, _)| *count).max().unwrap_or(0).max(most);
        }
        if most > MOST_OF_A_LINE {
            Err(format!("a line of the log was printed {most} times"))
        } else {
            Ok(())
        }
    }

    fn report(&self, error: &str) -> String {
        let report =
            self.stage.cluster.report(&[NAMESPACE.to_owned()], &[WEBHOOK.to_owned(), CONTROLLER.to_owned()]);
        format!("{report}\n{error}")
    }
}
