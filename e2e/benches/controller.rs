//! The controller's figures: calls by awsim's journal, times from the change at the API server to the call at AWS, CPU and
//! memory of the real process.

use crate::fleet::{self, Fleet, NAMESPACE};
use crate::http::{Connection, Place};
use crate::machine;
use crate::stage::{Program, Stage};
use crate::table::{Limit, Side, Table};
use crate::webhook::start;
use awsim::{Call, Effect, Fault, Server};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tgb_e2e::{Result, free_ports};
use tokio::time::sleep;

/// Another controller beside the one that runs.
const STANDBY: &str = "standby";
/// Five times of the changes that AWS grants.
const SCARCE: &str =
    "--aws-limit=elb=400/400,elb-describe=400/400,elb-targets=20/20,ec2-describe=400/400,ec2-change=400/400";
const MERGE: &str = "application/merge-patch+json";
/// How long a process may take to end, and another to take over.
const PATIENCE: Duration = Duration::from_secs(60);
/// Numbers of pods that are put in beyond those of [`Fleet::bindings`].
const EXTRA: usize = 10_100;
/// Between two changes of many.
const OFTEN: Duration = Duration::from_millis(50);
const STRANGERS: usize = 14_000;
const ROLLED: [usize; 2] = [24_000, 44_000];

/// Measures and adds the rows; without `all` only those of many bindings.
pub(crate) async fn run(table: &mut Table, all: bool) -> Result<()> {
    let stage = Stage::start(table.side, &[])?;
    measure(table, &stage, all).await.map_err(|error| stage.explain(error))
}

async fn measure(table: &mut Table, stage: &Stage, all: bool) -> Result<()> {
    let server = stage.aws.server().ok_or("this needs awsim")?;
    let mut fleet = Fleet::new(stage).await?;
    fleet.target_groups(&stage.aws, 101)?;
    fleet.bindings(0..100, 2).await?;
    settled(server, Duration::from_secs(3), Duration::from_secs(180)).await?;

    let ours = table.side == Side::Ours;
    if all {
        few(table, stage, server, &mut fleet).await?;
    }
    if all && ours {
        handover(table, stage, server, &mut fleet, 4).await?;
    }

    let (processes, name) = (stage.cluster.processes(), stage.controller().name);
    let spec = processes.spec(name).ok_or("no controller")?;
    let start = || {
        processes.stop(name, PATIENCE)?;
        processes.spawn(name, spec.flag(stage.no_limits()))?;
        stage.until_ready(stage.controller())
    };
    stage.lead(start).await?;
    let mut bench = Scale {
        stage,
        server,
        api: api(stage).await?,
        fleet,
        // one more than at first, if calls were counted
        count: if all { 101 } else { 100 },
        next: EXTRA,
        extra: BTreeMap::new(),
    };
    if table.beside {
        bench.grow(50).await?;
        bench.latencies(table, Duration::from_millis(200), Limit::None).await?;
    }
    if !ours {
        return if all { handover(table, stage, server, &mut bench.fleet, 1).await } else { Ok(()) };
    }
    match std::env::var("ONLY").as_deref() {
        Ok("rolling") => {
            bench.grow(1_000).await?;
            return bench.rolling(table).await;
        }
        Ok("nodes") => return bench.nodes(table).await,
        Ok("networking") => return bench.networking(table).await,
        _ => {}
    }
    let full = std::env::var("FULL").is_ok_and(|value| !value.is_empty());
    let mut memory = Vec::new();
    for count in [10, 100, 1_000, 5_000].into_iter().filter(|count| full || *count < 5_000) {
        memory.push((count, bench.size(table, count).await?));
    }
    if let Some(((few, small), (many, large))) = memory.get(1).copied().zip(memory.get(2).copied()) {
        let rows = [
            ("binding", "cached, with its Service, slice and 2 pods: controller", Limit::Most(4.0 + 2.0)),
            ("reconciled", "that is worked on, with all of that: controller", Limit::None),
        ];
        for (((id, what, limit), small), large) in rows.into_iter().zip(small).zip(large) {
            let each = (large - small) / (many - few) as f64 / 1e3;
            table.add(
                &format!("memory-controller-{id}"),
                &format!("memory per binding {what}"),
                each,
                "kB",
                limit,
            );
        }
    }
    bench.strangers(table).await?;
    if full {
        bench.rolling(table).await?;
    }
    bench.networking(table).await?;
    bench.nodes(table).await
}

/// What 100 bindings cost.
async fn few(table: &mut Table, stage: &Stage, server: &Server, fleet: &mut Fleet) -> Result<()> {
    let controller = stage.controller();
    start(table, stage, "start-controller", controller, 1_000.0)?;
    stage.lead(|| stage.restart(controller)).await?;
    settled(server, Duration::from_secs(8), Duration::from_secs(180)).await?;
    let memory = stage.memory(controller).0 / 1e6;
    let what = "memory, 100 bindings, 200 pods: controller";
    table.add("memory-controller", what, memory, "MB", Limit::Most(25.0));
    if table.side == Side::Peer {
        let what = "the same, since it is the webhook, too";
        table.add("memory-webhook", what, memory, "MB", Limit::None);
    }
    calls(table, stage, server, fleet).await?;
    comparison(table, stage, server).await
}

async fn api(stage: &Stage) -> Result<Connection> {
    let cluster = &stage.cluster;
    Place::tls(cluster.server(), cluster.ca_pem(), Some(cluster.token()))?.connect().await
}

/// Waits until nothing was called for `quiet`.
pub(crate) async fn settled(server: &Server, quiet: Duration, deadline: Duration) -> Result<()> {
    let begun = Instant::now();
    let (mut seen, mut since) = (server.journal().len(), Instant::now());
    while since.elapsed() < quiet {
        if begun.elapsed() > deadline {
            return Err(format!("AWS is still called after {} s", deadline.as_secs()));
        }
        sleep(Duration::from_millis(250)).await;
        let new = server.journal_after(seen);
        seen += new.len();
        if new.iter().any(|call| call.action != "DescribeTargetHealth") {
            since = Instant::now();
        }
    }
    Ok(())
}

/// The calls that concern a target group or no one in particular, in their order.
fn about(server: &Server, arn: &str) -> Vec<String> {
    let concerns = |call: &Call| {
        let arns: Vec<&String> =
            call.parameters.values().filter(|value| value.contains(":targetgroup/")).collect();
        arns.is_empty() || arns.iter().any(|other| *other == arn)
    };
    server.journal().iter().filter(|call| concerns(call)).map(|call| call.action.clone()).collect()
}

/// How many of these there are, the first RegisterTargets included.
fn until_register(server: &Server, arn: &str) -> usize {
    let mut made = about(server, arn);
    made.truncate(made.iter().position(|action| action == "RegisterTargets").map_or(0, |at| at + 1));
    eprintln!("      {}", made.join(", "));
    made.len()
}

async fn until_registered(server: &Server, arn: &str, count: usize) -> Result<()> {
    let begun = Instant::now();
    let live = || {
        let rows = server.targets(awsim::DEFAULT_ACCOUNT, "us-west-2", arn);
        rows.iter().filter(|row| row.state != "draining").count()
    };
    while live() != count {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!("{} targets, not {count}", live()));
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// How often AWS is called for one thing.
async fn calls(table: &mut Table, stage: &Stage, server: &Server, fleet: &mut Fleet) -> Result<()> {
    let n = 100;
    let arn = fleet.arns[n].clone();
    fleet.backend(n, &[EXTRA - 10, EXTRA - 9]).await?;
    let manifest = fleet.manifest(n).to_string();
    let apply = || -> Result<usize> {
        server.clear_journal(None);
        stage.cluster.kubectl_with(&["create", "-f", "-"], &manifest).ok()?;
        Ok(about(server, &arn).len())
    };
    let mut at_apply = 0;
    if table.side == Side::Ours {
        let (processes, controller) = (stage.cluster.processes(), stage.controller().name);
        // The controller stands still for a moment, so that all calls are the webhook's.
        processes.pause(controller)?;
        at_apply = apply()?;
        let name = format!("web-{n}");
        stage.cluster.kubectl(&["-n", NAMESPACE, "delete", "tgb", &name, "--wait=false"]).ok()?;
        // It has seen the first one come and go, so that no call for that is counted with those of the second.
        processes.resume(controller)?;
        settled(server, Duration::from_secs(1), Duration::from_secs(60)).await?;
        processes.pause(controller)?;
        let warm = apply()?;
        server.clear_journal(None);
        processes.resume(controller)?;
        let what = "AWS calls per apply of a binding with ARN and Service only, one of them for TGB118";
        table.add("calls-apply", what, at_apply as f64, "calls", Limit::Most(2.0));
        let what = "the same, the group known to the webhook";
        table.add("calls-apply-warm", what, warm as f64, "calls", Limit::Most(0.0));
    } else {
        apply()?;
    }

    until_registered(server, &arn, 2).await?;
    let made = until_register(server, &arn);
    if table.side == Side::Ours {
        let what = "AWS calls from create to registered";
        table.add("calls-create", what, made as f64, "calls", Limit::Most(3.0));
    }
    if table.beside {
        let what = "AWS calls from create to registered, with those of the apply";
        table.add("calls-create-all", what, (at_apply + made) as f64, "calls", Limit::None);
    }

    settled(server, Duration::from_secs(3), Duration::from_secs(60)).await?;
    fleet.pod(n, EXTRA - 8).await?;
    fleet.flush().await?;
    sleep(Duration::from_secs(1)).await;
    server.clear_journal(None);
    fleet.endpoints(n, &[EXTRA - 10, EXTRA - 9, EXTRA - 8]).await?;
    fleet.flush().await?;
    until_registered(server, &arn, 3).await?;
    let made = until_register(server, &arn);
    table.add("calls-endpoint", "AWS calls per change of endpoints", made as f64, "calls", Limit::Most(1.0));
    Ok(())
}

/// Waits until the health of so many groups was read since the journal was cleared, or for `most`. How many there were.
async fn compared(server: &Server, groups: usize, most: Duration) -> usize {
    let (begun, mut seen, mut read) = (Instant::now(), 0, BTreeSet::new());
    loop {
        let new = server.journal_after(seen);
        seen += new.len();
        let reads = new.into_iter().filter(|call| call.action == "DescribeTargetHealth");
        read.extend(reads.filter_map(|mut call| call.parameters.remove("TargetGroupArn")));
        if read.len() >= groups || begun.elapsed() > most {
            return read.len();
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn comparison(table: &mut Table, stage: &Stage, server: &Server) -> Result<()> {
    const GROUPS: usize = 101;
    let (processes, controller) = (stage.cluster.processes(), stage.controller().name);
    processes.stop(controller, PATIENCE)?;
    server.clear_journal(None);
    processes.restart(controller)?;
    let begun = Instant::now();
    let groups = compared(server, GROUPS, Duration::from_secs(90)).await;
    let what = "after a restart, groups of 101 compared with AWS";
    table.add("compared", what, groups as f64, "groups", Limit::Least(GROUPS as f64));
    if groups == GROUPS || table.side == Side::Ours {
        let what = "the same, until all are, within AWS's allowance of calls";
        table.add("compared-time", what, begun.elapsed().as_secs_f64(), "s", Limit::None);
    }
    settled(server, Duration::from_secs(3), Duration::from_secs(90)).await
}

/// Stops the leader beside a standby, and changes the endpoints of a binding while nobody leads, so that there is something
/// to do for whoever compares nothing by itself.
async fn handover(
    table: &mut Table,
    stage: &Stage,
    server: &Server,
    fleet: &mut Fleet,
    rounds: usize,
) -> Result<()> {
    let processes = stage.cluster.processes();
    let [port] = free_ports()?;
    let probes = format!("127.0.0.1:{port}");
    let (first, second) = (stage.controller(), Program { name: STANDBY, probes: &probes });
    let mut times = Vec::new();
    for round in 0..rounds {
        // leader and standby change places
        let (leader, standby) = if round % 2 == 0 { (first, second) } else { (second, first) };
        stage.another(standby)?;
        settled(server, Duration::from_secs(2), Duration::from_secs(60)).await?;
        let asked = server.elapsed();
        processes.stop(leader.name, PATIENCE)?;
        let gone = server.elapsed();
        fleet.endpoints(0, if round % 2 == 0 { &[0] } else { &[0, 1] }).await?;
        fleet.flush().await?;
        let first = loop {
            let journal = server.journal();
            let after = journal.iter().map(|call| Duration::from_micros(call.real_us)).find(|at| *at > gone);
            if let Some(at) = after {
                break at;
            }
            if server.elapsed() > asked + PATIENCE {
                return Err("nobody takes over".to_owned());
            }
            sleep(Duration::from_millis(10)).await;
        };
        times.push((first - asked).as_secs_f64());
        settled(server, Duration::from_secs(2), Duration::from_secs(90)).await?;
    }
    table.add(
        "handover",
        "clean stop of the leader to the first AWS call of the next, the worst of 4",
        machine::quantile(&mut times, 1.0),
        "s",
        Limit::Most(2.0),
    );
    Ok(())
}

/// Many bindings.
struct Scale<'a> {
    stage: &'a Stage,
    server: &'a Server,
    api: Connection,
    fleet: Fleet,
    /// How many bindings there are.
    count: usize,
    /// The next pod to add.
    next: usize,
    /// Pods that were added to a binding.
    extra: BTreeMap<usize, Vec<usize>>,
}

impl Scale<'_> {
    /// The memory of a replica that only watches, bytes.
    async fn standby(&self) -> Result<f64> {
        let [port] = free_ports()?;
        let standby = Program { name: STANDBY, probes: &format!("127.0.0.1:{port}") };
        self.stage.another(standby)?;
        sleep(Duration::from_secs(3)).await;
        let (memory, _) = self.stage.memory(standby);
        self.stage.cluster.processes().kill(STANDBY)?;
        Ok(memory)
    }

    /// Grows or shrinks to `count` bindings.
    async fn grow(&mut self, count: usize) -> Result<()> {
        let had = std::mem::replace(&mut self.count, count);
        self.extra.retain(|n, _| *n < count);
        if count < had {
            self.fleet.remove_bindings(count..had).await?;
        } else {
            self.fleet.target_groups(&self.stage.aws, count)?;
            self.fleet.bindings(had..count, 2).await?;
        }
        settled(self.server, Duration::from_secs(3), Duration::from_secs(600)).await
    }

    /// Measures with `count` bindings. Gives the memory of a replica that only watches and that of the leader after a fresh
    /// start, bytes.
    async fn size(&mut self, table: &mut Table, count: usize) -> Result<[f64; 2]> {
        self.grow(count).await?;
        self.server.clear_journal(None);
        let controller = self.stage.controller();
        let pid = |stage: &Stage| stage.pid(controller.name);
        let ready = self.stage.restart(controller)?;
        let begun = Instant::now();
        let groups = compared(self.server, count, Duration::from_secs(600)).await;
        if groups < count {
            return Err(format!("{groups} groups of {count} were compared in 10 minutes"));
        }
        let cold = ready + begun.elapsed();
        settled(self.server, Duration::from_secs(8), Duration::from_secs(600)).await?;
        self.stage.cluster.processes().check(controller.name)?;
        let (memory, peak) = self.stage.memory(controller);
        if count >= 1_000 {
            let what = format!(
                "{count} bindings × 2 pods: cold start until all are compared, at 400 calls a second"
            );
            table.add(&format!("cold-{count}"), &what, cold.as_secs_f64(), "s", Limit::None);
            let what = format!("{count} bindings × 2 pods: memory, and its peak at the start");
            table.add(&format!("memory-{count}"), &what, memory / 1e6, "MB", Limit::None);
            table.add(&format!("peak-{count}"), "its peak", peak / 1e6, "MB", Limit::None);
        }

        let changes = 200;
        // What it costs to poll, before and after: the first polls of many come closer together.
        let first = self.idle().await;
        let before = (machine::cpu(pid(self.stage)), Instant::now());
        self.changes(changes, 10, OFTEN).await?;
        let (used, took) = ((machine::cpu(pid(self.stage)) - before.0).as_secs_f64(), before.1.elapsed());
        let used = used - first.min(self.idle().await) * took.as_secs_f64();
        let what = format!("CPU per change of endpoints at {count} bindings (call, status, event, polls)");
        table.add(&format!("change-cpu-{count}"), &what, used * 1e6 / changes as f64, "µs", Limit::None);
        if count == 1_000 {
            self.latencies(table, OFTEN, Limit::Most(50.0)).await?;
        }
        // What a start leaves behind differs from one to the next.
        let mut standbys = [self.standby().await?, self.standby().await?, self.standby().await?];
        Ok([machine::quantile(&mut standbys, 0.5), memory])
    }

    /// How long a change takes until AWS is called, when AWS answers at once and when it does not: a change of each of up to
    /// 200 bindings in turn, one `every` so often.
    async fn latencies(&mut self, table: &mut Table, every: Duration, limit: Limit) -> Result<()> {
        let changes = 200;
        let (count, few) = if self.count < 1_000 {
            (self.count.to_string(), format!("-{}", self.count))
        } else {
            ("1,000".to_owned(), String::new())
        };
        for latency in [0, 100] {
            self.server.fault(Fault::new(Effect::Latency { ms: latency }));
            let mut times = self.changes(changes, changes.min(self.count), every).await?;
            self.server.clear_faults();
            let what = format!(
                "endpoint change to RegisterTargets at AWS, {count} bindings, AWS latency {latency} ms"
            );
            for (id, share, name, limit) in [("p50", 0.5, "median", Limit::None), ("p99", 0.99, "p99", limit)]
            {
                let time = machine::quantile(&mut times, share);
                table.add(
                    &format!("latency-{latency}{few}-{id}"),
                    &format!("{what}: {name}"),
                    time,
                    "ms",
                    limit,
                );
            }
        }
        Ok(())
    }

    /// What share of a CPU it takes while nothing changes.
    async fn idle(&self) -> f64 {
        let pid = self.stage.pid(self.stage.controller().name);
        let (before, begun) = (machine::cpu(pid), Instant::now());
        sleep(Duration::from_secs(10)).await;
        (machine::cpu(pid) - before).as_secs_f64() / begun.elapsed().as_secs_f64()
    }

    /// Adds an endpoint `every` so often by the API server, to `spread` bindings in turn. The times until AWS was called, ms.
    async fn changes(&mut self, changes: usize, spread: usize, every: Duration) -> Result<Vec<f64>> {
        let step = self.count / spread;
        let picks: Vec<(usize, usize)> = (0..changes).map(|k| (k % spread * step, self.next + k)).collect();
        self.next += changes;
        for (n, serial) in &picks {
            self.fleet.pod(*n, *serial).await?;
        }
        self.fleet.flush().await?;
        sleep(Duration::from_secs(2)).await;
        self.server.clear_journal(None);
        let mut sent: BTreeMap<String, Duration> = BTreeMap::new();
        let begun = Instant::now();
        for (k, (n, serial)) in picks.iter().enumerate() {
            let all = self.extra.entry(*n).or_insert_with(|| vec![2 * n, 2 * n + 1]);
            all.push(*serial);
            let path = format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/web-{n}");
            let patch = json!({"endpoints": fleet::endpoints(*n, all)});
            sent.insert(fleet::ip(*serial), self.server.elapsed());
            self.api.json("PATCH", &path, MERGE, &patch).await?;
            let due = every * (k as u32 + 1);
            sleep(due.saturating_sub(begun.elapsed())).await;
        }
        let (mut times, mut seen, begun) = (Vec::new(), 0, Instant::now());
        while !sent.is_empty() {
            if begun.elapsed() > Duration::from_secs(60) {
                let (processes, controller) = (self.stage.cluster.processes(), self.stage.controller().name);
                processes.check(controller)?;
                let log = processes.log(controller);
                let last: Vec<&str> = log.lines().rev().take(40).collect();
                let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(format!(
                    "{last}\n{} of {changes} changes never reached AWS: {sent:?}",
                    sent.len()
                ));
            }
            let new = self.server.journal_after(seen);
            seen += new.len();
            for call in new.iter().filter(|call| call.action == "RegisterTargets") {
                for ip in call.parameters.values() {
                    if let Some(at) = sent.remove(ip) {
                        times.push(
                            (Duration::from_micros(call.real_us).saturating_sub(at)).as_secs_f64() * 1e3,
                        );
                    }
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
        // with what follows a registration
        settled(self.server, Duration::from_secs(3), Duration::from_secs(60)).await?;
        Ok(times)
    }

    /// 1,000 bindings with `networking`, each with a port of its own in one of 20 security groups.
    async fn networking(&mut self, table: &mut Table) -> Result<()> {
        const BINDINGS: usize = 1_000;
        const GROUPS: usize = 20;
        self.grow(0).await?;
        self.fleet.networking(&self.stage.aws, GROUPS)?;
        let ec2 = |server: &Server| -> BTreeMap<String, usize> {
            let mut calls = BTreeMap::new();
            for call in server.journal().into_iter().filter(|call| call.service == awsim::Service::Ec2) {
                *calls.entry(call.action).or_default() += 1;
            }
            eprintln!("      {calls:?}");
            calls
        };
        let what = format!("{BINDINGS} bindings with networking over {GROUPS} security groups");
        let controller = self.stage.controller();
        self.server.clear_journal(None);
        self.grow(BINDINGS).await?;
        let made = ec2(self.server);
        let writes = made.get("AuthorizeSecurityGroupIngress").copied().unwrap_or_default();
        let words = format!("{what}: calls that open, one per binding if they come one by one");
        table.add("networking-opens", &words, writes as f64, "calls", Limit::Most(BINDINGS as f64));
        let reads = made.values().sum::<usize>() - writes;
        let words = format!("{what}: other EC2 calls while they are made");
        table.add("networking-made", &words, reads as f64, "calls", Limit::Most(3.0 * GROUPS as f64));

        self.server.clear_journal(None);
        self.stage.restart(controller)?;
        let groups = compared(self.server, BINDINGS, Duration::from_secs(600)).await;
        if groups < BINDINGS {
            return Err(format!("{groups} groups of {BINDINGS} were compared in 10 minutes"));
        }
        settled(self.server, Duration::from_secs(8), Duration::from_secs(600)).await?;
        let calls = ec2(self.server).values().sum::<usize>();
        let words = format!("{what}: EC2 calls of a start with nothing to do, subnets and search included");
        table.add("networking-start", &words, calls as f64, "calls", Limit::Most(3.0 * GROUPS as f64));

        let pid = self.stage.pid(controller.name);
        let (cpu, before) = (machine::cpu(pid), self.passes()?);
        // Every binding is touched, and has nothing to do.
        for n in 0..BINDINGS {
            let path = format!(
                "/apis/elbv2.k8s.aws/{}/namespaces/{NAMESPACE}/targetgroupbindings/web-{n}",
                self.fleet.version()
            );
            let patch = json!({"metadata": {"annotations": {"touched": "1"}}});
            self.api.json("PATCH", &path, MERGE, &patch).await?;
        }
        settled(self.server, Duration::from_secs(3), Duration::from_secs(60)).await?;
        let used = (machine::cpu(pid) - cpu).as_secs_f64();
        let count = (self.passes()? - before).max(1.0);
        let words = format!("{what}: CPU per pass that has nothing to do");
        table.add("networking-pass", &words, used * 1e6 / count, "µs", Limit::None);
        self.grow(1).await?;
        self.fleet.networking(&self.stage.aws, 0)
    }

    async fn strangers(&mut self, table: &mut Table) -> Result<()> {
        let mut measured = Vec::new();
        for pods in [0, 10_000] {
            self.fleet.strangers(STRANGERS..STRANGERS + pods).await?;
            sleep(Duration::from_secs(2)).await;
            self.stage.restart(self.stage.controller())?;
            settled(self.server, Duration::from_secs(8), Duration::from_secs(600)).await?;
            measured.push(self.stage.memory(self.stage.controller()).0);
        }
        let each = (measured[1] - measured[0]) / 10_000.0 / 1e3;
        table.add(
            "memory-controller-pod",
            "memory per pod cached (10,000 pods of 6 kB that no binding uses): controller",
            each,
            "kB",
            Limit::Most(1.0),
        );
        Ok(())
    }

    /// Measures a change of one of 1,000 nodes, with 200 bindings that have all of them as targets.
    async fn nodes(&mut self, table: &mut Table) -> Result<()> {
        const NODES: usize = 1_000;
        const BINDINGS: usize = 200;
        self.grow(1).await?;
        // Without polls, which would be most of what is measured.
        let (processes, name) = (self.stage.cluster.processes(), self.stage.controller().name);
        let spec = processes.spec(name).ok_or("no controller")?;
        processes.stop(name, PATIENCE)?;
        processes.spawn(name, spec.flag("--health-poll=1h"))?;
        self.stage.until_ready(self.stage.controller())?;
        self.fleet.instances(&self.stage.aws, NODES, BINDINGS).await?;
        settled(self.server, Duration::from_secs(8), Duration::from_secs(900)).await?;
        let what = format!("{NODES} nodes, {BINDINGS} bindings of instances");
        let (memory, _) = self.stage.memory(self.stage.controller());
        table.add("nodes-memory", &format!("{what}: memory"), memory / 1e6, "MB", Limit::None);
        // What nobody asks for, of every node; then nodes that go and come back, each time long enough for every pass.
        let labels: Vec<_> = (0..NODES).map(|n| (n, true, 1)).collect();
        let flips: Vec<_> = (0..20).map(|k| (k / 2 * 7, k % 2 == 1, 1)).collect();
        for (id, changed, events, every) in [
            ("label", "a label that nobody asks for", labels, Duration::from_millis(5)),
            ("ready", "whether it is ready", flips, Duration::from_secs(5)),
        ] {
            let pid = self.stage.pid(self.stage.controller().name);
            let idle = self.idle().await;
            let (cpu, passes, begun) = (machine::cpu(pid), self.passes()?, Instant::now());
            let count = events.len() as f64;
            for (n, ready, feature) in events {
                self.fleet.node(n, ready, feature).await?;
                self.fleet.flush().await?;
                sleep(every).await;
            }
            settled(self.server, Duration::from_secs(3), Duration::from_secs(120)).await?;
            let (used, took) = ((machine::cpu(pid) - cpu).as_secs_f64(), begun.elapsed().as_secs_f64());
            let passes = (self.passes()? - passes).max(1.0);
            let used = used - idle.min(self.idle().await) * took;
            let of = format!("{what}: CPU per change of a node, {changed}");
            table.add(&format!("nodes-{id}-cpu"), &of, used * 1e6 / count, "µs", Limit::None);
            let of = format!("{what}: passes per change of a node, {changed}");
            table.add(&format!("nodes-{id}-passes"), &of, passes / count, "passes", Limit::None);
            if id == "ready" {
                let of = format!("{what}: CPU per pass");
                table.add("nodes-pass-cpu", &of, used * 1e6 / passes, "µs", Limit::None);
            }
        }
        Ok(())
    }

    /// The number of passes that the controller has done.
    fn passes(&self) -> Result<f64> {
        let text = tgb_e2e::get(self.stage.controller().probes, "/metrics")?;
        let of_passes = text.lines().filter(|line| line.starts_with("tgb_reconcile_total{"));
        Ok(of_passes.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Every pod of 1,000 bindings × 20 is replaced, where AWS's allowance is what bounds it.
    async fn rolling(&mut self, table: &mut Table) -> Result<()> {
        const BINDINGS: usize = 1_000;
        const PODS: usize = 20;
        let (processes, name) = (self.stage.cluster.processes(), self.stage.controller().name);
        let spec = processes.spec(name).ok_or("no controller")?;
        processes.stop(name, PATIENCE)?;
        processes.spawn(name, spec.flag(SCARCE))?;
        let pid = self.stage.pid(self.stage.controller().name);
        let mut old: BTreeMap<usize, Vec<usize>> =
            (0..BINDINGS).map(|n| (n, vec![2 * n, 2 * n + 1])).collect();
        old.extend(std::mem::take(&mut self.extra).into_iter().filter(|(n, _)| *n < BINDINGS));
        for (round, base) in ROLLED.into_iter().enumerate() {
            self.server.clear_journal(None);
            let (cpu, begun) = (machine::cpu(pid), Instant::now());
            for n in 0..BINDINGS {
                let new: Vec<usize> = (0..PODS).map(|k| base + n * PODS + k).collect();
                for serial in &new {
                    self.fleet.pod(n, *serial).await?;
                }
                self.fleet.endpoints(n, &new).await?;
                let gone = old.insert(n, new).unwrap_or_default();
                for serial in gone {
                    self.fleet.remove_pod(n, serial).await?;
                }
            }
            self.fleet.flush().await?;
            settled(self.server, Duration::from_secs(5), Duration::from_secs(900)).await?;
            if round == 0 {
                continue;
            }
            let elapsed = begun.elapsed().saturating_sub(Duration::from_secs(5));
            let journal = self.server.journal();
            let count = |action: &str| journal.iter().filter(|call| call.action == action).count() as f64;
            let (more, fewer) = (count("RegisterTargets"), count("DeregisterTargets"));
            eprintln!("      {more} RegisterTargets, {fewer} DeregisterTargets");
            let calls = more + fewer;
            for n in 0..BINDINGS {
                let rows = self.server.targets(awsim::DEFAULT_ACCOUNT, "us-west-2", &self.fleet.arns[n]);
                let live: BTreeSet<String> =
                    rows.into_iter().filter(|row| row.state != "draining").map(|row| row.id).collect();
                let wanted: BTreeSet<String> = old[&n].iter().map(|serial| fleet::ip(*serial)).collect();
                if live != wanted {
                    return Err(format!("binding {n} has {live:?} and should have {wanted:?}"));
                }
            }
            let what = "1,000 bindings × 20 pods, all replaced";
            table.add(
                "rolling-calls",
                &format!("{what}: calls that change, in the lower bound's (2 per binding)"),
                100.0 * calls / 2_000.0,
                "%",
                Limit::Most(150.0),
            );
            table.add(
                "rolling-time",
                &format!("{what}: until AWS has all, at 20 calls a second that change"),
                elapsed.as_secs_f64(),
                "s",
                Limit::None,
            );
            let used = (machine::cpu(pid) - cpu).as_secs_f64();
            table.add(
                "rolling-cpu",
                &format!("{what}: CPU per pod replaced"),
                used * 1e6 / (BINDINGS * PODS) as f64,
                "µs",
                Limit::None,
            );
            let (memory, peak) = machine::memory(pid);
            table.add(
                "rolling-memory",
                &format!("{what}: memory after it"),
                memory as f64 / 1e6,
                "MB",
                Limit::None,
            );
            table.add("rolling-peak", &format!("{what}: its peak"), peak as f64 / 1e6, "MB", Limit::None);
        }
        Ok(())
    }
}
