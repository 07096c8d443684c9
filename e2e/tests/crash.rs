//! The controller is stopped after any single call of AWS and after any single write to the API server, or hears nothing of
//! a call that was done; it starts again, and all is as it would have been: no target, no rule and no ConfigMap is left over
//! or missing. And random faults over random changes, which end as without faults.
//!
//! `TGB_PROVE_CASES` set: every call is a point, not only those that change something, and more seeds are played.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use awsim::{Effect, Fault, Source};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tgb_e2e::{Gate, Prepare, Space, World, eventually};

const SOON: Duration = Duration::from_secs(60);
/// Calls that tell nothing new.
const READS: [&str; 5] = [
    "DescribeTargetGroups",
    "DescribeTargetHealth",
    "DescribeSubnets",
    "DescribeInstances",
    "DescribeSecurityGroupRules",
];

fn proves() -> bool {
    std::env::var_os("TGB_PROVE_CASES").is_some()
}

/// How the controller comes to harm.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Harm {
    /// It is killed when a call of this action is done and not answered yet.
    KilledAtCall(&'static str),
    /// It is killed when a write to the API server is done and not answered yet.
    KilledAtWrite,
    /// It never hears of a call of this action, however often it tries.
    LostAnswer(&'static str),
}

/// All points of harm on a way, one after the other.
struct Walk {
    harms: Vec<Harm>,
    /// So many calls of the kind go well before.
    at: usize,
}

impl Walk {
    fn new(changes: &[&'static str]) -> Self {
        let mut harms = vec![Harm::KilledAtWrite];
        harms.extend(changes.iter().copied().map(Harm::KilledAtCall));
        harms.extend(changes.iter().copied().map(Harm::LostAnswer));
        if proves() {
            harms.extend(READS.map(Harm::KilledAtCall));
        }
        Self { harms, at: 0 }
    }

    fn next(&self) -> Option<(Harm, usize)> {
        self.harms.last().map(|harm| (*harm, self.at))
    }

    /// Whether the last point was there at all.
    fn heard(&mut self, was_hit: bool) {
        let all = proves() || self.harms.last() == Some(&Harm::KilledAtWrite);
        if was_hit && all {
            self.at += 1;
        } else {
            self.harms.pop();
            self.at = 0;
        }
    }
}

/// A change and what must be in the end.
struct Way<'a> {
    change: &'a dyn Fn(),
    end: End,
    /// What it calls to change something.
    calls: &'a [&'static str],
}

struct Stage {
    space: Space<'static>,
    gate: Gate,
    /// A source of traffic that no binding of another test has: those of other namespaces count as wanting their rules.
    peer: String,
}

/// What must be in the end.
#[derive(Debug, Clone, PartialEq, Default)]
struct End {
    /// Bound target groups and their Deployments.
    bound: Vec<(&'static str, String)>,
    /// `tcp 8080-8080 sg-…`
    rules: BTreeSet<String>,
    /// Names of ConfigMaps.
    tracked: BTreeSet<String>,
    /// Target groups that must be empty.
    empty: Vec<String>,
}

impl Stage {
    fn start(prepare: Prepare<'static>) -> Self {
        let space = prepare.start().unwrap();
        let gate = Gate::start(space.cluster()).unwrap();
        let (namespace, account) =
            (format!("{}-tgb", space.name()), format!("tgb-{}-controller", space.name()));
        space.cluster().kubeconfig_of(&namespace, &account, &gate.url()).unwrap();
        let peer = space.security_group("peer", &[]).unwrap();
        let stage = Self { space, gate, peer };
        stage.revive();
        stage
    }

    /// Starts the controller again, which leads at once, as if the lease of the killed one had run out.
    fn revive(&self) {
        let name = self.space.name();
        self.space.controller().kill().unwrap();
        let (namespace, lease) = (format!("{name}-tgb"), format!("tgb-{name}-controller"));
        let patch = r#"{"spec": {"holderIdentity": ""}}"#;
        let args = ["-n", namespace.as_str(), "patch", "lease", lease.as_str(), "--type=merge", "-p", patch];
        // It may not be there yet.
        let _ = self.space.cluster().kubectl(&args);
        self.space.controller().restart().unwrap();
    }

    /// What is wrong, if anything.
    fn compare(&self, end: &End) -> Result<(), String> {
        let space = &self.space;
        for (name, arn) in &end.bound {
            let (there, pods) = (space.targets(arn)?, space.pods(name, 8080)?);
            if there != pods || pods.is_empty() {
                return Err(format!("{name}: targets {there:?}, pods {pods:?}"));
            }
            match space.condition(&format!("tgb/{name}"), "Ready")? {
                (status, _) if status == "True" => {}
                other => return Err(format!("{name}: {other:?}")),
            }
        }
        for arn in &end.empty {
            let there = space.targets(arn)?;
            if !there.is_empty() {
                return Err(format!("left over: {there:?}"));
            }
        }
        let marker = format!("elbv2.k8s.aws/targetGroupBinding=shared cluster:demo owner:{}", space.name());
        let group = &space.aws().lab().node_group;
        let rules = space.rules(group)?;
        let ours = rules.iter().filter(|rule| rule.description.as_deref() == Some(&marker));
        let ours: BTreeSet<String> = ours
            .map(|rule| {
                let Source::Group(id, _) = &rule.source else { return format!("{:?}", rule.source) };
                format!("{} {}-{} {id}", rule.protocol, rule.from, rule.to)
            })
            .collect();
        if ours != end.rules {
            return Err(format!("rules {ours:?}, not {:?}", end.rules));
        }
        let maps = space.kubectl("get configmaps -o name").ok()?;
        let tracked: BTreeSet<String> = maps
            .lines()
            .filter_map(|line| line.strip_prefix("configmap/aws-lbc-targets-"))
            .map(str::to_owned)
            .collect();
        if tracked != end.tracked {
            return Err(format!("ConfigMaps {tracked:?}, not {:?}", end.tracked));
        }
        let bindings = space.kubectl("get tgb -o name").ok()?.lines().count();
        if bindings != end.bound.len() {
            return Err(format!("{bindings} bindings, not {}", end.bound.len()));
        }
        Ok(())
    }

    fn until(&self, end: &End, what: &str) {
        eventually(SOON, || self.compare(end)).unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    /// There and back again, with harm at every point of both ways.
    fn walk(&self, there: &Way<'_>, back: &Way<'_>) {
        let mut walks = [(there, Walk::new(there.calls)), (back, Walk::new(back.calls))];
        let mut hits = 0;
        while walks.iter().any(|(_, walk)| walk.next().is_some()) {
            for (way, walk) in &mut walks {
                match walk.next() {
                    Some((harm, at)) => {
                        let was_hit = self.harm(harm, at, way);
                        hits += usize::from(was_hit);
                        walk.heard(was_hit);
                    }
                    None => {
                        (way.change)();
                        self.until(&way.end, "without harm");
                    }
                }
            }
        }
        let least = there.calls.len() + back.calls.len();
        assert!(hits > 2 * least, "only {hits} points");
    }

    /// Goes a way with harm at this point; whether there was such a point.
    fn harm(&self, harm: Harm, at: usize, way: &Way<'_>) -> bool {
        let space = &self.space;
        let before = space.calls().len();
        let skip = u64::try_from(at).unwrap();
        let fault = |effect, action| Fault::new(effect).action(action).skip(skip);
        match harm {
            Harm::KilledAtWrite => self.gate.stop_after(at),
            Harm::KilledAtCall(action) => {
                space.fault(fault(Effect::Latency { ms: 60_000 }, action).times(1)).unwrap();
            }
            Harm::LostAnswer(action) => {
                // The controller tries three times in a row.
                space.fault(fault(Effect::LostResponse, action).times(3)).unwrap();
            }
        }
        (way.change)();
        let reached = || match harm {
            Harm::KilledAtWrite => self.gate.reached(),
            Harm::KilledAtCall(action) | Harm::LostAnswer(action) => {
                let calls = space.calls();
                let call = calls.iter().skip(before).filter(|call| call.action == action).nth(at)?;
                // The webhook looks at target groups, too.
                call.caller.ends_with("/CONTROLLER").then(|| call.action.clone())
            }
        };
        let what = format!("{harm:?} at {at}");
        // In this order: what is reached last may be what ends it.
        let hit = eventually(SOON, || match (self.compare(&way.end), reached()) {
            (_, Some(point)) => Ok(Some(point)),
            (Ok(()), None) => Ok(None),
            (Err(error), None) => Err(error),
        })
        .unwrap_or_else(|error| panic!("{what}: {error}"));
        if hit.is_some() && !matches!(harm, Harm::LostAnswer(_)) {
            space.controller().kill().unwrap();
            self.gate.open();
            space.clear_faults().unwrap();
            self.revive();
        }
        self.until(&way.end, &format!("{what} ({hit:?})"));
        self.gate.open();
        space.clear_faults().unwrap();
        hit.is_some()
    }

    fn rule(&self, port: u16) -> String {
        format!("tcp {port}-{port} {}", self.peer)
    }

    fn networking(&self, port: u16) -> Value {
        let peer = json!([{"securityGroup": {"groupID": self.peer}}]);
        json!({"networking": {"ingress": [{"from": peer, "ports": [{"port": port}]}]}})
    }

    /// Gives Deployment `web` so many pods, and waits for them.
    fn scale(&self, replicas: usize) {
        self.space.kubectl(&format!("scale deployment web --replicas={replicas}")).ok().unwrap();
        eventually(SOON, || {
            let pods = self.space.pods("web", 8080)?.len();
            if pods == replicas { Ok(()) } else { Err(format!("{pods} pods, not {replicas}")) }
        })
        .unwrap();
    }

    fn delete(&self, name: &str) {
        self.space.kubectl(&format!("delete tgb {name} --wait=false")).ok().unwrap();
    }
}

fn stage(name: &str) -> Stage {
    Stage::start(World::shared().unwrap().prepare(name))
}

/// As [`stage`], with leave to share target groups.
fn sharing_stage(name: &str) -> Stage {
    let prepare = World::shared().unwrap().prepare(name);
    Stage::start(prepare.value(&format!("sharedTargets.namespaces={{{name}}}")))
}

#[test]
fn a_binding_with_rules_comes_and_goes() {
    let stage = stage("comes");
    let arn = stage.space.served_target_group("HTTP", 80, "ip").unwrap();
    stage.space.deploy("web", 2).unwrap();
    let rules = BTreeSet::from([stage.rule(8080)]);
    let there = Way {
        change: &|| stage.space.bind("web", &arn, &stage.networking(8080)).unwrap(),
        end: End { bound: vec![("web", arn.clone())], rules, ..End::default() },
        calls: &["RegisterTargets", "AuthorizeSecurityGroupIngress"],
    };
    let back = Way {
        change: &|| stage.delete("web"),
        end: End { empty: vec![arn.clone()], ..End::default() },
        calls: &["DeregisterTargets", "RevokeSecurityGroupIngress"],
    };
    stage.walk(&there, &back);
}

#[test]
fn a_shared_binding_comes_and_goes() {
    let stage = sharing_stage("shares");
    let arn = stage.space.served_target_group("HTTP", 80, "ip").unwrap();
    stage.space.deploy("web", 2).unwrap();
    let binding = json!({
        "apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroup": {"arn": arn, "sharing": "Shared"}, "serviceRef": {"name": "web"}},
    });
    let there = Way {
        change: &|| drop(stage.space.apply(&binding).ok().unwrap()),
        end: End {
            bound: vec![("web", arn.clone())],
            tracked: BTreeSet::from(["web".to_owned()]),
            ..End::default()
        },
        calls: &["RegisterTargets"],
    };
    let back = Way {
        change: &|| stage.delete("web"),
        end: End { empty: vec![arn.clone()], ..End::default() },
        calls: &["DeregisterTargets"],
    };
    stage.walk(&there, &back);
}

#[test]
fn gated_pods_become_more_and_fewer() {
    let stage = Stage::start(World::shared().unwrap().prepare("gates").with_readiness_gates());
    let arn = stage.space.served_target_group("HTTP", 80, "ip").unwrap();
    stage.space.deploy("web", 0).unwrap();
    stage.space.bind("web", &arn, &json!({})).unwrap();
    stage.scale(1);
    let end = || End { bound: vec![("web", arn.clone())], ..End::default() };
    stage.until(&end(), "one pod");
    let there = Way { change: &|| stage.scale(3), end: end(), calls: &["RegisterTargets"] };
    let back = Way { change: &|| stage.scale(1), end: end(), calls: &["DeregisterTargets"] };
    stage.walk(&there, &back);
    stage.space.kubectl("wait pod -l app=web --for=condition=Ready --timeout=60s").ok().unwrap();
}

#[test]
fn a_write_that_is_never_answered_holds_up_its_binding_for_seconds_only() {
    let stage = stage("unanswered");
    let arn = stage.space.served_target_group("HTTP", 80, "ip").unwrap();
    stage.space.deploy("web", 1).unwrap();
    stage.space.bind("web", &arn, &json!({})).unwrap();
    let end = End { bound: vec![("web", arn)], ..End::default() };
    stage.until(&end, "one pod");
    stage.gate.stop_after(0);
    stage.space.kubectl("delete service web").ok().unwrap();
    eventually(SOON, || stage.gate.reached().ok_or("no write yet")).unwrap();
    stage.space.deploy("web", 3).unwrap();
    stage.until(&end, "the write still waits");
}

#[test]
fn a_rule_of_a_full_group_becomes_another_and_back() {
    let stage = stage("changes");
    let arn = stage.space.served_target_group("HTTP", 80, "ip").unwrap();
    stage.space.deploy("web", 1).unwrap();
    stage.space.seed(|aws| aws.quotas.rules_per_group = 1).unwrap();
    let to = |port: u16| stage.space.bind("web", &arn, &stage.networking(port)).unwrap();
    let end = |port: u16| End {
        bound: vec![("web", arn.clone())],
        rules: BTreeSet::from([stage.rule(port)]),
        ..End::default()
    };
    to(1000);
    stage.until(&end(1000), "the first rule");
    let calls = &["ModifySecurityGroupRules"];
    let there = Way { change: &|| to(2000), end: end(2000), calls };
    let back = Way { change: &|| to(1000), end: end(1000), calls };
    stage.walk(&there, &back);
}

/// Killed after the first RegisterTargets; what goes while nobody looks is not taken for somebody else's.
#[test]
fn pods_that_go_between_the_first_registration_and_the_next_start_leave_no_target() {
    let stage = stage("first");
    let space = &stage.space;
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 3).unwrap();
    space.fault(Fault::new(Effect::Latency { ms: 60_000 }).action("RegisterTargets").times(1)).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    eventually(SOON, || match space.targets(&arn)?.len() {
        3 => Ok(()),
        n => Err(format!("{n} targets")),
    })
    .unwrap();
    space.controller().kill().unwrap();
    space.clear_faults().unwrap();
    stage.scale(1);
    stage.revive();
    stage.until(&End { bound: vec![("web", arn)], ..End::default() }, "one pod");
}

/// The write that lets the first one go is not answered, so that it is still being worked on when the second one comes.
#[test]
fn a_binding_that_is_made_anew_while_its_predecessor_ends_begins_anew() {
    let stage = sharing_stage("anew");
    let space = &stage.space;
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    let bind =
        || space.bind("web", &arn, &json!({"targetGroup": {"arn": arn, "sharing": "Shared"}})).unwrap();
    let end = || End {
        bound: vec![("web", arn.clone())],
        tracked: BTreeSet::from(["web".to_owned()]),
        ..End::default()
    };
    bind();
    stage.until(&end(), "the first");
    // The status has nothing more to say then.
    eventually(SOON, || match space.kubectl("get tgb web -o jsonpath={.status.targets.summary}").ok()? {
        text if text == "1/1" => Ok(()),
        other => Err(other),
    })
    .unwrap();
    // The first write takes the ConfigMap away.
    stage.gate.stop_after(1);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    let unanswered = eventually(SOON, || stage.gate.reached().ok_or("no write yet")).unwrap();
    assert!(unanswered.contains("/targetgroupbindings/web"), "{unanswered}");
    bind();
    stage.until(&end(), "the second");
}

#[test]
fn random_faults_over_random_changes_end_as_without_faults() {
    let seeds = if proves() { 30 } else { 1 };
    for n in 0..seeds {
        let seed = std::env::var("TGB_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| fastrand::u64(..));
        eprintln!("TGB_SEED={seed} plays this again");
        play(&format!("random-{n}"), seed);
    }
}

/// Random changes under random faults.
fn play(name: &str, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let stage = sharing_stage(name);
    let space = &stage.space;
    space.server().unwrap().seed_random(seed);
    let names = ["a", "b", "c"];
    let mut arns = Vec::new();
    for name in names {
        arns.push(space.served_target_group("HTTP", 80, "ip").unwrap());
        space.deploy(name, 1).unwrap();
    }
    let faults = [
        (Effect::Latency { ms: 300 }, 0.2),
        (Effect::Throttle, 0.05),
        (Effect::Unavailable, 0.1),
        (Effect::Reset, 0.1),
        (Effect::LostResponse, 0.15),
    ];
    for (effect, share) in faults {
        space.fault(Fault::new(effect).probability(share)).unwrap();
    }
    // Port and whether it is Shared. It never becomes so: what is of no use just then would not be its own any more.
    let mut bound: [Option<(u16, bool)>; 3] = [None; 3];
    for _ in 0..15 {
        let n = random.usize(..names.len());
        let name = names[n];
        match random.u8(..9) {
            0..3 => {
                let port = random.u16(8080..8084);
                let shared = bound[n].is_none_or(|(_, shared)| shared) && random.bool();
                let mut spec = stage.networking(port);
                let sharing = if shared { "Shared" } else { "Exclusive" };
                spec["targetGroup"] = json!({"arn": arns[n], "sharing": sharing});
                // The webhook may find no AWS to ask, and says so.
                if space.bind(name, &arns[n], &spec).is_ok() {
                    bound[n] = Some((port, shared));
                }
            }
            3 => {
                if bound[n].take().is_some() {
                    space.kubectl(&format!("delete tgb {name} --timeout=120s")).ok().unwrap();
                }
            }
            4..7 => {
                let replicas = random.usize(1..4);
                space.kubectl(&format!("scale deployment {name} --replicas={replicas}")).ok().unwrap();
            }
            7 => stage.gate.stop_after(random.usize(..4)),
            _ => stage.revive(),
        }
    }
    stage.gate.open();
    space.clear_faults().unwrap();
    let end = End {
        bound: (0..names.len())
            .filter(|n| bound[*n].is_some())
            .map(|n| (names[n], arns[n].clone()))
            .collect(),
        rules: joined(bound.iter().flatten().map(|(port, _)| *port).collect())
            .into_iter()
            .map(|(from, to)| format!("tcp {from}-{to} {}", stage.peer))
            .collect(),
        tracked: (0..names.len())
            .filter(|n| bound[*n].is_some_and(|(_, shared)| shared))
            .map(|n| names[n].to_owned())
            .collect(),
        empty: (0..names.len()).filter(|n| bound[*n].is_none()).map(|n| arns[n].clone()).collect(),
    };
    stage.until(&end, &format!("TGB_SEED={seed}"));
}

/// Neighbouring ports as ranges.
fn joined(ports: BTreeSet<u16>) -> Vec<(u16, u16)> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == port => *end = port,
            _ => ranges.push((port, port)),
        }
    }
    ranges
}
