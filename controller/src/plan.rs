//! The comparison of what is wanted with what is registered. One pure function; [`crate::apply`] does what it says.

use crate::desired::TargetKey;
use crate::observed::Seen;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tgb_aws::values::{ObservedTarget, Target, TargetState};

/// Everything that the comparison looks at.
pub(crate) struct Situation<'a> {
    /// What is wanted, zones included.
    pub(crate) desired: &'a BTreeMap<TargetKey, Target>,
    /// What is registered.
    pub(crate) observed: &'a Seen,
    /// Those of `observed` that AWS acknowledged but has not shown since: they may be healthy by now.
    pub(crate) assumed: &'a BTreeSet<TargetKey>,
    /// Those of `observed` whose pod or node still runs.
    pub(crate) alive: &'a BTreeSet<TargetKey>,
    /// `Some` for a Shared target group: what this binding once registered.
    pub(crate) tracked: Option<&'a BTreeSet<TargetKey>>,
    /// Never to be deregistered now: wanted by others, or foreign at first contact.
    pub(crate) protected: &'a BTreeSet<TargetKey>,
    /// Those that AWS would not take a moment ago, and are not to be tried yet.
    pub(crate) rejected: &'a BTreeSet<TargetKey>,
    /// For how long each target has been unwanted already.
    pub(crate) unwanted_for: &'a BTreeMap<TargetKey, Duration>,
    /// The cluster is not known well enough to take away what seems to run.
    pub(crate) hold: bool,
    /// The Service or port is gone, but may come back: targets that run stay this long.
    pub(crate) grace: Option<Duration>,
    /// No endpoint is ready although pods run, and of these the last targets are to stay.
    pub(crate) keep_last: Option<&'a BTreeSet<TargetKey>>,
    /// How long a healthy target that runs waits for a healthy successor.
    pub(crate) swap_grace: Duration,
    /// `--max-targets-per-target-group`.
    pub(crate) max_targets: Option<usize>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// In order of their keys.
    pub(crate) register: Vec<Target>,
    /// The unhealthy ones first.
    pub(crate) deregister: Vec<Target>,
    /// Unwanted targets that wait for a healthy successor; they go at once where there is no room for it. The unhealthy
    /// ones first.
    pub(crate) spare: Vec<Target>,
    /// How many unwanted targets stay because nothing is ready.
    pub(crate) last: usize,
    /// Wanted targets for which there is no room.
    pub(crate) no_room: usize,
    /// Some of `deregister` are wanted with another QUIC server id, and are to be registered once they are gone.
    pub(crate) reregisters: bool,
    /// Number of unwanted targets that stay because the cluster is not known well enough.
    pub(crate) held: usize,
    /// When to look again even if nothing changes.
    pub(crate) again_in: Option<Duration>,
}

/// Compares.
pub(crate) fn plan(s: &Situation<'_>) -> Plan {
    let present = |key: &TargetKey| s.observed.get(key).filter(|seen| seen.state.is_registered());
    let is_others = |key: &TargetKey| {
        s.protected.contains(key) || s.tracked.is_some_and(|tracked| !tracked.contains(key))
    };
    let mut plan = Plan::default();

    let mut room = s
        .max_targets
        .map(|max| max.saturating_sub(s.desired.keys().filter(|key| present(key).is_some()).count()));
    let mut changed_id = Vec::new();
    for (key, target) in s.desired {
        let seen = present(key);
        // AWS refuses another QUIC server id for a registered target: it has to go first.
        if let Some(seen) = seen.filter(|seen| seen.target.quic_server_id != target.quic_server_id) {
            if target.quic_server_id.is_some() && !is_others(key) {
                changed_id.push(seen.target.clone());
            }
            continue;
        }
        if seen.is_some() || s.rejected.contains(key) {
            continue;
        }
        match &mut room {
            Some(0) => plan.no_room += 1,
            Some(left) => {
                *left -= 1;
                plan.register.push(target.clone());
            }
            None => plan.register.push(target.clone()),
        }
    }

    let remains = |key: &TargetKey| s.desired.contains_key(key) || is_others(key);
    let has_healthy_successor =
        s.observed.iter().any(|(key, seen)| seen.state == TargetState::Healthy && remains(key));
    let last = s.keep_last.filter(|_| s.tracked.is_none() && !has_healthy_successor);
    let mut unwanted = Vec::new();
    let mut spare = Vec::new();
    for (key, seen) in s.observed {
        if !seen.state.is_registered() || remains(key) {
            continue;
        }
        if !s.alive.contains(key) {
            unwanted.push(&**seen);
            continue;
        }
        if s.hold {
            plan.held += 1;
            continue;
        }
        if last.is_some_and(|last| last.contains(key)) {
            plan.last += 1;
            continue;
        }
        let swaps = (seen.state == TargetState::Healthy || s.assumed.contains(key)) && !has_healthy_successor;
        let wait = match s.grace {
            Some(grace) => grace,
            None if swaps => s.swap_grace,
            None => Duration::ZERO,
        };
        let waited = s.unwanted_for.get(key).copied().unwrap_or_default();
        let Some(left) = wait.checked_sub(waited).filter(|left| !left.is_zero()) else {
            unwanted.push(&**seen);
            continue;
        };
        plan.again_in = Some(plan.again_in.map_or(left, |again| again.min(left)));
        if s.grace.is_none() {
            spare.push(&**seen);
        }
    }
    let unhealthy_first =
        |seen: &&ObservedTarget| (seen.state == TargetState::Healthy, TargetKey::of(&seen.target));
    unwanted.sort_by_key(unhealthy_first);
    spare.sort_by_key(unhealthy_first);
    plan.reregisters = !changed_id.is_empty();
    plan.deregister = unwanted.into_iter().map(|seen| seen.target.clone()).chain(changed_id).collect();
    plan.spare = spare.into_iter().map(|seen| seen.target.clone()).collect();
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use TargetState::{Draining, Healthy, Initial, Unhealthy, Unused};
    use tgb_aws::values::TARGET_STATES;

    fn key(id: &str) -> TargetKey {
        TargetKey { id: id.to_owned(), port: 80 }
    }

    fn target(id: &str) -> Target {
        Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None }
    }

    #[derive(Default)]
    struct World {
        desired: BTreeMap<TargetKey, Target>,
        observed: Seen,
        alive: BTreeSet<TargetKey>,
        tracked: Option<BTreeSet<TargetKey>>,
        protected: BTreeSet<TargetKey>,
        unwanted_for: BTreeMap<TargetKey, Duration>,
        hold: bool,
        grace: Option<Duration>,
        keep_last: Option<BTreeSet<TargetKey>>,
        max_targets: Option<usize>,
    }

    impl World {
        fn wants(ids: &[&str]) -> Self {
            Self { desired: ids.iter().map(|id| (key(id), target(id))).collect(), ..Default::default() }
        }

        fn has(mut self, ids: &[(&str, TargetState)]) -> Self {
            for (id, state) in ids {
                let seen =
                    ObservedTarget { target: target(id), state: *state, reason: None, description: None };
                self.observed.insert(key(id), Box::new(seen));
            }
            self
        }

        fn alive(mut self, ids: &[&str]) -> Self {
            self.alive = ids.iter().map(|id| key(id)).collect();
            self
        }

        fn plan(&self) -> Plan {
            plan(&Situation {
                desired: &self.desired,
                observed: &self.observed,
                assumed: &BTreeSet::new(),
                alive: &self.alive,
                tracked: self.tracked.as_ref(),
                protected: &self.protected,
                rejected: &BTreeSet::new(),
                unwanted_for: &self.unwanted_for,
                hold: self.hold,
                grace: self.grace,
                keep_last: self.keep_last.as_ref(),
                swap_grace: Duration::from_secs(300),
                max_targets: self.max_targets,
            })
        }

        fn calls(&self) -> (Vec<String>, Vec<String>) {
            let ids = |targets: Vec<Target>| targets.into_iter().map(|target| target.id).collect();
            let plan = self.plan();
            (ids(plan.register), ids(plan.deregister))
        }
    }

    fn calls(register: &[&str], deregister: &[&str]) -> (Vec<String>, Vec<String>) {
        let owned = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        (owned(register), owned(deregister))
    }

    #[test]
    fn what_is_missing_is_registered_and_what_is_there_is_left_alone() {
        let world = World::wants(&["a", "b"]).has(&[("a", Healthy)]);
        assert_eq!(world.calls(), calls(&["b"], &[]));
    }

    #[test]
    fn a_draining_target_counts_as_absent() {
        assert_eq!(World::wants(&["a"]).has(&[("a", Draining)]).calls(), calls(&["a"], &[]));
        assert_eq!(World::wants(&[]).has(&[("a", Draining)]).calls(), calls(&[], &[]));
    }

    #[test]
    fn a_target_is_registered_in_every_state_but_draining() {
        for (state, word, _) in TARGET_STATES {
            let there = state.is_registered();
            let (absent, gone): (&[&str], &[&str]) = if there { (&[], &["a"]) } else { (&["a"], &[]) };
            let wanted = World::wants(&["a"]).has(&[("a", state)]).alive(&["a"]);
            assert_eq!(wanted.calls(), calls(absent, &[]), "{word}");
            assert_eq!(World::wants(&[]).has(&[("a", state)]).calls(), calls(&[], gone), "{word}");
            let mut limited = World::wants(&["a", "b"]).has(&[("a", state)]);
            limited.max_targets = Some(1);
            assert_eq!(limited.plan().no_room, 1, "{word}");
        }
    }

    #[test]
    fn a_target_whose_pod_is_gone_goes_at_once_in_spite_of_every_grace() {
        let mut world = World::wants(&[]).has(&[("dead", Healthy)]);
        world.grace = Some(Duration::from_secs(30));
        world.keep_last = Some(BTreeSet::from([key("a"), key("dead")]));
        assert_eq!(world.calls(), calls(&[], &["dead"]));
    }

    #[test]
    fn a_healthy_target_that_runs_waits_for_a_healthy_successor() {
        let swap = World::wants(&["new"]).has(&[("old", Healthy), ("new", Initial)]).alive(&["old"]);
        let plan = swap.plan();
        assert_eq!(plan.deregister, []);
        assert_eq!(plan.spare, [target("old")]);
        assert_eq!(plan.again_in, Some(Duration::from_secs(300)));
        let done = World::wants(&["new"]).has(&[("old", Healthy), ("new", Healthy)]).alive(&["old"]);
        assert_eq!(done.calls(), calls(&[], &["old"]));
        let mut late = swap;
        late.unwanted_for.insert(key("old"), Duration::from_secs(300));
        assert_eq!(late.calls(), calls(&[], &["old"]));
    }

    #[test]
    fn in_a_group_without_load_balancer_nothing_waits() {
        let world = World::wants(&["new"]).has(&[("old", Unused)]).alive(&["old"]);
        assert_eq!(world.calls(), calls(&["new"], &["old"]));
    }

    #[test]
    fn while_the_backend_is_missing_targets_that_run_stay_for_the_grace() {
        let mut world = World::wants(&[]).has(&[("a", Healthy)]).alive(&["a"]);
        world.grace = Some(Duration::from_secs(30));
        world.unwanted_for.insert(key("a"), Duration::from_secs(10));
        let plan = world.plan();
        assert_eq!((plan.deregister.len(), plan.again_in), (0, Some(Duration::from_secs(20))));
        world.unwanted_for.insert(key("a"), Duration::from_secs(30));
        assert_eq!(world.calls(), calls(&[], &["a"]));
    }

    #[test]
    fn while_the_cluster_is_not_known_well_enough_only_what_is_gone_goes() {
        let mut world = World::wants(&["new"])
            .has(&[("old", Healthy), ("sick", Unhealthy), ("dead", Healthy), ("new", Healthy)])
            .alive(&["old", "sick"]);
        world.hold = true;
        assert_eq!(world.calls(), calls(&[], &["dead"]));
        assert_eq!(world.plan().held, 2);
        world.hold = false;
        assert_eq!(world.calls(), calls(&[], &["sick", "dead", "old"]));
    }

    #[test]
    fn the_last_targets_stay_while_nothing_is_ready_but_not_beside_other_healthy_ones() {
        let mut world = World::wants(&[]).has(&[("a", Unhealthy)]).alive(&["a"]);
        world.keep_last = Some(BTreeSet::from([key("a"), key("dead")]));
        assert_eq!(world.calls(), calls(&[], &[]));
        assert_eq!(world.plan().last, 1);
        world.protected.insert(key("theirs"));
        let mut others = world.has(&[("theirs", Healthy)]);
        assert_eq!(others.calls(), calls(&[], &["a"]));
        others.tracked = Some(BTreeSet::from([key("a")]));
        assert_eq!(others.calls(), calls(&[], &["a"]));
        let mut beside = World::wants(&["b"]).has(&[("a", Unhealthy), ("b", Healthy)]).alive(&["a"]);
        beside.keep_last = Some(BTreeSet::from([key("a")]));
        assert_eq!(beside.calls(), calls(&[], &["a"]));
    }

    #[test]
    fn in_a_shared_group_only_what_was_tracked_goes() {
        let mut world = World::wants(&[]).has(&[("ours", Healthy), ("theirs", Healthy)]);
        world.tracked = Some(BTreeSet::from([key("ours")]));
        assert_eq!(world.calls(), calls(&[], &["ours"]));
        world.tracked = Some(BTreeSet::new());
        assert_eq!(world.calls(), calls(&[], &[]));
    }

    #[test]
    fn what_others_want_stays() {
        let mut world = World::wants(&[]).has(&[("a", Healthy)]);
        world.protected.insert(key("a"));
        assert_eq!(world.calls(), calls(&[], &[]));
    }

    #[test]
    fn a_limit_of_targets_counts_those_that_are_there() {
        let mut world = World::wants(&["a", "b", "c"]).has(&[("a", Healthy)]);
        world.max_targets = Some(2);
        let plan = world.plan();
        assert_eq!((plan.register.len(), plan.no_room), (1, 1));
    }

    #[test]
    fn unhealthy_targets_are_deregistered_before_healthy_ones() {
        let world = World::wants(&[]).has(&[("a", Healthy), ("b", Unhealthy)]);
        assert_eq!(world.calls(), calls(&[], &["b", "a"]));
    }

    #[test]
    fn another_quic_server_id_means_deregistering_first() {
        let mut world = World::wants(&["a"]).has(&[("a", Healthy)]);
        world.desired.get_mut(&key("a")).unwrap().quic_server_id = Some("0x01".to_owned());
        assert_eq!(world.calls(), calls(&[], &["a"]));
        // That is looked at again when it was done, not when it was planned.
        assert_eq!((world.plan().reregisters, world.plan().again_in), (true, None));
    }

    #[test]
    fn another_clusters_healthy_target_is_a_successor_in_a_shared_group() {
        let mut world = World::wants(&["new"]).has(&[("old", Healthy), ("theirs", Healthy)]).alive(&["old"]);
        world.tracked = Some(BTreeSet::from([key("old")]));
        assert_eq!(world.calls(), calls(&["new"], &["old"]));
    }
}

#[cfg(test)]
mod laws {
    use super::*;
    use proptest::prelude::*;
    use tgb_aws::values::TARGET_STATES;

    /// One target: wanted, its state if it is registered, alive, tracked, protected, refused a moment ago, seconds unwanted.
    type Random = (bool, Option<usize>, bool, bool, bool, bool, u64);

    fn key(n: usize) -> TargetKey {
        TargetKey { id: format!("10.0.0.{n}"), port: 80 }
    }

    fn target(n: usize) -> Target {
        Target { id: format!("10.0.0.{n}"), port: 80, zone: None, quic_server_id: None }
    }

    proptest! {
        #[test]
        fn no_plan_touches_what_it_must_not(
            targets in prop::collection::vec(
                (any::<bool>(), prop::option::of(0..TARGET_STATES.len()), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0u64..400),
                0..12,
            ),
            shared: bool,
            grace in prop::option::of(Just(Duration::from_secs(30))),
            keep: bool,
            hold: bool,
            max_targets in prop::option::of(0usize..6),
        ) {
            let pick = |wanted: fn(&Random) -> bool| -> BTreeSet<TargetKey> {
                let found = targets.iter().enumerate().filter(|(_, random)| wanted(random));
                found.map(|(n, _)| key(n)).collect()
            };
            let desired: BTreeMap<TargetKey, Target> = (0..targets.len())
                .filter(|n| targets[*n].0)
                .map(|n| (key(n), target(n)))
                .collect();
            let observed: Seen = targets
                .iter()
                .enumerate()
                .filter_map(|(n, random)| {
                    let state = TARGET_STATES[random.1?].0;
                    let seen = ObservedTarget { target: target(n), state, reason: None, description: None };
                    Some((key(n), Box::new(seen)))
                })
                .collect();
            let (alive, tracked, protected, rejected) =
                (pick(|random| random.2), pick(|random| random.3), pick(|random| random.4), pick(|random| random.5));
            let unwanted_for =
                targets.iter().enumerate().map(|(n, random)| (key(n), Duration::from_secs(random.6))).collect();
            let unready = pick(|random| !random.0);
            let plan = plan(&Situation {
                desired: &desired,
                observed: &observed,
                assumed: &BTreeSet::new(),
                alive: &alive,
                tracked: shared.then_some(&tracked),
                protected: &protected,
                rejected: &rejected,
                unwanted_for: &unwanted_for,
                hold,
                grace,
                keep_last: keep.then_some(&unready),
                swap_grace: Duration::from_secs(300),
                max_targets,
            });
            let present = |key: &TargetKey| {
                observed.get(key).is_some_and(|seen| seen.state.is_registered())
            };
            for target in &plan.register {
                let key = TargetKey::of(target);
                prop_assert!(desired.contains_key(&key) && !present(&key) && !rejected.contains(&key));
            }
            for target in plan.deregister.iter().chain(&plan.spare) {
                let key = TargetKey::of(target);
                prop_assert!(present(&key) && !desired.contains_key(&key) && !protected.contains(&key));
                prop_assert!(!shared || tracked.contains(&key));
            }
            let goes: BTreeSet<TargetKey> = plan.deregister.iter().map(TargetKey::of).collect();
            // what is dead and may go, goes at once
            for key in observed.keys().filter(|key| present(key) && !alive.contains(*key)) {
                let may = !desired.contains_key(key) && !protected.contains(key) && (!shared || tracked.contains(key));
                prop_assert_eq!(may, goes.contains(key));
            }
            prop_assert!(!hold || goes.is_disjoint(&alive));
            // the last healthy target that runs does not go before its time
            let healthy = |key: &TargetKey| observed.get(key).is_some_and(|seen| seen.state == TargetState::Healthy);
            let remains = observed.keys().any(|key| healthy(key) && !goes.contains(key));
            for key in goes.iter().filter(|key| healthy(key) && alive.contains(*key)) {
                let waited = unwanted_for.get(key).copied().unwrap_or_default();
                let in_time = waited >= grace.unwrap_or(Duration::from_secs(300));
                prop_assert!(remains || in_time);
            }
            if let Some(max) = max_targets {
                let there = desired.keys().filter(|key| present(key)).count();
                prop_assert!(plan.register.len() + there <= max.max(there));
            }
        }
    }
}
