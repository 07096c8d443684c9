//! A model of one security group that two clusters write, and a person or another controller beside them, over random
//! steps: bindings change, go, and have their rules retained, calls are lost, throttled or refused, readings lag behind, the
//! group refuses one kind of call for a while, controllers start again.

use super::*;
use proptest::prelude::*;

const BINDINGS: usize = 4;
const SOURCES: [&str; 4] = ["sg-a", "10.0.0.0/8", "fd00::/8", "sg-bad"];

/// The fate of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Answered,
    /// Done, and nobody hears of it.
    Lost,
    /// Not done.
    Failed(&'static str),
    /// A reading shows what stood there some writes ago.
    Behind(usize),
}

#[derive(Debug, Clone)]
enum Op {
    /// One more call of a cluster's controller.
    Go(usize, Fate),
    /// A binding asks for other ports.
    Wish(usize, usize, Vec<(u16, u16, usize)>),
    /// Only the spec of a binding is known for now.
    Forget(usize, usize),
    /// A binding has no endpoints.
    Empty(usize, usize),
    /// A binding is deleted, and its rules are to stay; the next binding of that number is another one.
    Retain(usize, usize),
    /// The clean-up of the binding whose rules are to stay has ended, if they do.
    Retained(usize, usize),
    /// The group refuses this kind of call from now on, or none.
    Deny(usize),
    /// A controller starts again.
    Restart(usize),
    /// Somebody else adds a rule of their own.
    Add(u16, usize),
    /// Somebody else takes a rule away, whoever's it is.
    Take(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let fate = prop_oneof![
        12 => Just(Fate::Answered),
        2 => Just(Fate::Lost),
        1 => Just(Fate::Failed("Unreachable")),
        1 => Just(Fate::Failed("RequestLimitExceeded")),
        1 => Just(Fate::Failed("UnauthorizedOperation")),
        2 => (1usize..4).prop_map(Fate::Behind),
    ];
    let ports = (1u16..14, 0u16..4, 0usize..SOURCES.len());
    prop_oneof![
        40 => (0usize..2, fate).prop_map(|(cluster, fate)| Op::Go(cluster, fate)),
        4 => (0usize..2, 0..BINDINGS, prop::collection::vec(ports, 0..4)).prop_map(|(c, b, p)| Op::Wish(c, b, p)),
        1 => (0usize..2, 0..BINDINGS).prop_map(|(c, b)| Op::Forget(c, b)),
        1 => (0usize..2, 0..BINDINGS).prop_map(|(c, b)| Op::Empty(c, b)),
        1 => (0usize..2, 0..BINDINGS).prop_map(|(c, b)| Op::Retain(c, b)),
        2 => (0usize..2, 0..BINDINGS).prop_map(|(c, b)| Op::Retained(c, b)),
        1 => (0usize..8).prop_map(Op::Deny),
        1 => (0usize..2).prop_map(Op::Restart),
        1 => (1u16..14, 0usize..3).prop_map(|(port, source)| Op::Add(port, source)),
        1 => any::<usize>().prop_map(Op::Take),
    ]
}

struct Cluster {
    marker: String,
    overflow: RuleOverflow,
    /// The claims of its bindings.
    claims: Vec<Claim>,
    /// The claims as its controller knows them.
    seen: Vec<Claim>,
    known: Known,
    pass: Pass,
    /// The last reading that was confirmed showed the truth, and nobody wrote since.
    accurate: bool,
    /// The end of the last pass that began after a binding was deleted.
    last: Option<State>,
}

/// The end of the description of retained rules.
const RETAINED_SUFFIX: &str = " retained:shop/web";

struct World {
    /// The kind of call that the group refuses.
    denied: usize,
    room: usize,
    rules: Vec<Rule>,
    others: usize,
    next: usize,
    history: Vec<Vec<Rule>>,
    clusters: Vec<Cluster>,
}

impl Cluster {
    /// Only the spec of a binding is known, which might ask for any port of its sources.
    fn forget(&mut self, binding: usize) {
        let wanted = self.claims[binding].used("sg-n");
        let keep =
            wanted.map(|wanted| Permission { from_port: 0, to_port: 65535, ..wanted.clone() }).collect();
        let retained_as = self.claims[binding].retained_as.clone();
        self.seen[binding] = Claim { keep, retained_as, ..Claim::default() };
    }
}

impl World {
    fn new(room: usize, overflow: RuleOverflow) -> Self {
        let cluster = |name: &str| Cluster {
            marker: marker(name, None),
            overflow,
            claims: vec![claim(&[]); BINDINGS],
            seen: vec![claim(&[]); BINDINGS],
            known: Known::default(),
            pass: Pass::default(),
            accurate: false,
            last: None,
        };
        let clusters = vec![cluster("a"), cluster("b")];
        Self { denied: 0, room, rules: Vec::new(), others: 0, next: 0, history: Vec::new(), clusters }
    }

    fn is_full(&self, rules: &[Rule]) -> bool {
        let mut counts = [self.others, self.others];
        rules.iter().for_each(|rule| counted(&mut counts, &rule.permission.source));
        counts.iter().any(|count| *count > self.room)
    }

    /// The rules that bindings of the cluster need and have.
    fn met(&self, cluster: usize) -> BTreeSet<Permission> {
        let open: Vec<&Permission> = self.rules.iter().map(|rule| &rule.permission).collect();
        let asked = self.clusters[cluster].claims.iter().flat_map(|claim| claim.used("sg-n"));
        asked.filter(|asked| is_open(asked, open.iter().copied())).cloned().collect()
    }

    /// Does with a call what AWS does; invariants that hold at every single one are checked here.
    fn perform(&mut self, cluster: usize, step: &Step) -> Result<(), String> {
        let ours = self.clusters[cluster].marker.clone();
        let (before, met) = (self.rules.clone(), self.met(cluster));
        let mut after = self.rules.clone();
        let kind = match step {
            Step::Authorize(_) => 1,
            Step::Modify(..) => 2,
            Step::Revoke(_) => 3,
            Step::Retain(_) => 4,
            Step::Read | Step::Confirm | Step::Done => 0,
        };
        if kind > 0 && kind == self.denied {
            return Err("UnauthorizedOperation".to_owned());
        }
        match step {
            Step::Authorize(added) => {
                if added.iter().any(|p| p.source == Source::SecurityGroup("sg-bad".to_owned())) {
                    return Err("InvalidGroup.NotFound".to_owned());
                }
                for permission in added {
                    if after.iter().any(|rule| rule.permission == *permission) {
                        return Err(DUPLICATE.to_owned());
                    }
                    self.next += 1;
                    let id = format!("sgr-{}", self.next);
                    after.push(Rule { id, permission: permission.clone(), description: ours.clone() });
                }
                if self.is_full(&after) {
                    return Err(FULL.to_owned());
                }
            }
            Step::Modify(id, to) => {
                if after.iter().any(|rule| rule.permission == *to) {
                    return Err(DUPLICATE.to_owned());
                }
                let Some(rule) = after.iter_mut().find(|rule| rule.id == *id) else {
                    return Err(NO_SUCH_RULE.to_owned());
                };
                assert_eq!(rule.description, ours, "a rule of somebody else's is changed");
                rule.permission = to.clone();
            }
            Step::Retain(retained) => {
                if retained.iter().any(|new| after.iter().all(|rule| rule.id != new.id)) {
                    return Err(NO_SUCH_RULE.to_owned());
                }
                for Retained { id, permission, description } in retained {
                    for rule in after.iter_mut().filter(|rule| rule.id == *id) {
                        // A reading that lags behind may show one as ours that is retained already.
                        let is_ours = rule.description.starts_with(&ours);
                        assert!(is_ours, "a rule of somebody else's is retained: {rule:?}");
                        rule.permission.clone_from(permission);
                        rule.description.clone_from(description);
                    }
                }
            }
            Step::Revoke(ids) => {
                if ids.iter().any(|id| after.iter().all(|rule| rule.id != *id)) {
                    return Err(NO_SUCH_RULE.to_owned());
                }
                for rule in after.iter().filter(|rule| ids.contains(&rule.id)) {
                    assert_eq!(rule.description, ours, "a rule of somebody else's is taken away");
                }
                after.retain(|rule| !ids.contains(&rule.id));
            }
            Step::Read | Step::Confirm | Step::Done => return Ok(()),
        }
        self.rules = after;
        if self.clusters[cluster].accurate {
            let lost: Vec<_> = met.difference(&self.met(cluster)).cloned().collect();
            assert!(lost.is_empty(), "{step:?} takes {lost:?} from a living binding");
        }
        self.wrote(before);
        Ok(())
    }

    fn wrote(&mut self, before: Vec<Rule>) {
        self.history.push(before);
        self.clusters.iter_mut().for_each(|cluster| cluster.accurate = false);
    }

    /// One call of a controller; whether its pass is over.
    fn go(&mut self, at: usize, fate: Fate) -> Option<State> {
        let cluster = &mut self.clusters[at];
        let (claims, marker) = (cluster.seen.clone(), cluster.marker.clone());
        let overflow = cluster.overflow;
        let wish = Wish { group: "sg-n", claims: &claims, marker: &marker, adopt: false, overflow };
        let step = cluster.pass.next(&wish, &mut cluster.known);
        if step == Step::Done {
            let state = cluster.pass.state(&wish, &mut cluster.known);
            assert!(state.error.is_some() || state.stale.is_empty(), "stale rules without a word: {state:?}");
            cluster.pass = match fate {
                Fate::Answered => Pass::remembering(&cluster.known),
                _ => Pass::default(),
            };
            cluster.last = Some(state.clone());
            return Some(state);
        }
        let answer = match (&step, fate) {
            (_, Fate::Failed(code)) => Answer::Failed(error(code)),
            (Step::Read | Step::Confirm, fate) => {
                let mut rules = self.rules.clone();
                if let Fate::Behind(writes) = fate
                    && let Some(old) = self.history.iter().rev().nth(writes - 1)
                {
                    rules = old.clone();
                }
                self.clusters[at].accurate = step == Step::Confirm && rules == self.rules;
                match fate {
                    Fate::Lost => Answer::Failed(error("Unreachable")),
                    _ => Answer::Rules(SecurityGroupRules { rules, others: self.others }),
                }
            }
            (_, fate) => match (self.perform(at, &step), fate) {
                (_, Fate::Lost) => Answer::Failed(error("Unreachable")),
                (Ok(()), _) => Answer::Done,
                (Err(code), _) => Answer::Failed(error(&code)),
            },
        };
        let cluster = &mut self.clusters[at];
        cluster.pass.answered(&wish, &mut cluster.known, &step, answer);
        None
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Go(cluster, fate) => drop(self.go(cluster, fate)),
            // A binding that is being deleted asks for nothing else.
            Op::Wish(cluster, binding, _) if self.clusters[cluster].claims[binding].retained_as.is_some() => {
            }
            Op::Wish(cluster, binding, ports) => {
                let permissions: Vec<Permission> = ports
                    .into_iter()
                    .map(|(from, more, source)| rule(from, from + more, SOURCES[source]))
                    .collect();
                self.clusters[cluster].claims[binding] = claim(&permissions);
                self.clusters[cluster].seen[binding] = claim(&permissions);
                self.clusters[cluster].accurate = false;
            }
            Op::Forget(cluster, binding) => self.clusters[cluster].forget(binding),
            Op::Retain(cluster, binding) => {
                let cluster = &mut self.clusters[cluster];
                let description = format!("{}{RETAINED_SUFFIX}", cluster.marker);
                cluster.claims[binding].retained_as = Some(description);
                cluster.seen[binding] = cluster.claims[binding].clone();
                (cluster.pass, cluster.last) = (Pass::default(), None);
            }
            Op::Retained(cluster, binding) => self.end_retained(cluster, binding),
            Op::Deny(kind) => self.denied = kind,
            Op::Empty(cluster, binding) => {
                let cluster = &mut self.clusters[cluster];
                if cluster.claims[binding].retained_as.is_none() {
                    let kept = cluster.claims[binding].used("sg-n").cloned().collect();
                    cluster.seen[binding] = Claim::keeping(kept);
                }
            }
            Op::Restart(cluster) => {
                // Readings do not lag behind for as long as a start takes.
                self.history.clear();
                let cluster = &mut self.clusters[cluster];
                (cluster.known, cluster.pass, cluster.last) = (Known::default(), Pass::default(), None);
                (0..BINDINGS).for_each(|binding| cluster.forget(binding));
            }
            Op::Add(port, source) => {
                let permission = rule(port, port, SOURCES[source]);
                let mut after = self.rules.clone();
                if after.iter().any(|rule| rule.permission == permission) {
                    return;
                }
                self.next += 1;
                let id = format!("sgr-{}", self.next);
                after.push(Rule { id, permission, description: "by hand".to_owned() });
                if !self.is_full(&after) {
                    let before = std::mem::replace(&mut self.rules, after);
                    self.wrote(before);
                }
            }
            Op::Take(which) => {
                if !self.rules.is_empty() {
                    let before = self.rules.clone();
                    self.rules.remove(which % before.len());
                    self.wrote(before);
                }
            }
        }
    }

    /// The binding goes whose rules are to stay, once none of ours is left that it uses; another one may take its place.
    fn end_retained(&mut self, cluster: usize, binding: usize) {
        let Cluster { claims, seen, last, .. } = &mut self.clusters[cluster];
        let ours = last.as_ref().filter(|state| state.error.is_none()).and_then(|state| state.ours.as_ref());
        let is_done = ours.is_some_and(|ours| !overlap(claims[binding].used("sg-n"), ours));
        if claims[binding].retained_as.is_some() && is_done {
            (claims[binding], seen[binding]) = (claim(&[]), claim(&[]));
        }
    }

    /// Without faults, until neither controller has anything left to do.
    fn settle(&mut self) -> Vec<State> {
        self.denied = 0;
        for cluster in &mut self.clusters {
            cluster.seen = cluster.claims.clone();
        }
        let mut last = Vec::new();
        for _ in 0..6 {
            for cluster in &mut self.clusters {
                cluster.known.forget_quota();
                cluster.pass = Pass::default();
            }
            for binding in 0..BINDINGS {
                (0..2).for_each(|cluster| self.end_retained(cluster, binding));
            }
            last.clear();
            for at in 0..2 {
                let state = (0..2 * MOST_CALLS).find_map(|_| self.go(at, Fate::Answered));
                last.push(state.unwrap());
            }
        }
        last
    }

    /// Checks what must hold once all is settled.
    fn check(&self, states: &[State]) {
        for (at, state) in states.iter().enumerate() {
            let cluster = &self.clusters[at];
            assert_eq!(state.error, None);
            assert_eq!(state.unretained, None);
            assert!(
                cluster.claims.iter().all(|claim| claim.retained_as.is_none()),
                "a clean-up does not end"
            );
            let asked: Vec<_> = cluster.claims.iter().flat_map(|claim| claim.wanted("sg-n")).collect();
            let open: Vec<&Permission> = self.rules.iter().map(|rule| &rule.permission).collect();
            for asked in asked.iter().copied().filter(|asked| !is_open(asked, open.iter().copied())) {
                let why = state.failed.iter().find(|(failed, _)| is_open(asked, [*failed]));
                let Some((_, why)) = why else { panic!("{asked:?} is missing without a word: {state:?}") };
                let bad = asked.source == Source::SecurityGroup("sg-bad".to_owned());
                assert!(bad || why.code == FULL, "{asked:?}: {why}");
                if !bad && cluster.overflow == RuleOverflow::Fail {
                    let mut more = self.rules.clone();
                    more.push(unnumbered(asked, ""));
                    assert!(self.is_full(&more), "{asked:?} would have room");
                }
            }
            let used = union(asked);
            for rule in self.rules.iter().filter(|rule| rule.description == cluster.marker) {
                let in_use = used.iter().any(|used| common(used, &rule.permission).is_some());
                assert!(in_use, "{rule:?} is of no use to anybody");
            }
        }
    }
}

fn play(room: usize, overflow: RuleOverflow, ops: Vec<Op>) {
    let mut world = World::new(room, overflow);
    for op in ops {
        world.run(op);
    }
    let stays = |rule: &&Rule| rule.description == "by hand" || rule.description.ends_with(RETAINED_SUFFIX);
    let others: Vec<Rule> = world.rules.iter().filter(stays).cloned().collect();
    let states = world.settle();
    world.check(&states);
    for other in others {
        assert!(world.rules.contains(&other), "{other:?} was somebody else's");
    }
    // All is quiet now.
    let all = |world: &World| -> BTreeSet<(Permission, String)> {
        world.rules.iter().map(|rule| (rule.permission.clone(), rule.description.clone())).collect()
    };
    let before = all(&world);
    world.settle();
    assert_eq!(all(&world), before, "it does not come to rest");
}

/// `TGB_PROVE_CASES` plays so many more.
fn cases() -> ProptestConfig {
    let cases = std::env::var("TGB_PROVE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn two_clusters_and_a_stranger_share_a_group_with_room(ops in prop::collection::vec(op(), 200..400)) {
        play(60, RuleOverflow::Fail, ops);
    }

    #[test]
    fn two_clusters_and_a_stranger_share_a_full_group(
        room in 3usize..9,
        ops in prop::collection::vec(op(), 200..400),
    ) {
        play(room, RuleOverflow::Fail, ops);
    }

    #[test]
    fn two_clusters_and_a_stranger_share_a_full_group_that_may_be_widened(
        room in 3usize..9,
        ops in prop::collection::vec(op(), 200..400),
    ) {
        play(room, RuleOverflow::Widen, ops);
    }
}
