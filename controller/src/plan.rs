//! The comparison of what is wanted with what is registered. One pure function; [`crate::reconcile`] applies what it
//! says.

use crate::desired::TargetKey;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tgb_aws::values::{ObservedTarget, Target, TargetState};

/// Everything that the comparison looks at.
pub(crate) struct Situation<'a> {
    /// What is wanted, zones included.
    pub(crate) desired: &'a BTreeMap<TargetKey, Target>,
    /// What is registered.
    pub(crate) observed: &'a BTreeMap<TargetKey, ObservedTarget>,
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
    /// The Service or port is gone, but may come back: targets that run stay this long.
    pub(crate) grace: Option<Duration>,
    /// No endpoint is ready although pods run, and the last targets are to stay.
    pub(crate) keep_last: bool,
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
    /// Unwanted targets that stay for now.
    pub(crate) kept: BTreeSet<TargetKey>,
    /// All of [`Plan::kept`] stay because nothing is ready.
    pub(crate) keeps_last: bool,
    /// Wanted targets for which there is no room.
    pub(crate) no_room: usize,
    /// When to look again even if nothing changes.
    pub(crate) again_in: Option<Duration>,
}

/// Compares.
pub(crate) fn plan(s: &Situation<'_>) -> Plan {
    let present = |key: &TargetKey| s.observed.get(key).filter(|seen| seen.state != TargetState::Draining);
    let mut plan = Plan::default();

    let mut room = s
        .max_targets
        .map(|max| max.saturating_sub(s.desired.keys().filter(|key| present(key).is_some()).count()));
    let mut changed_id = Vec::new();
    for (key, target) in s.desired {
        let seen = present(key);
        // AWS refuses another QUIC server id for a registered target: it has to go first.
        if let Some(seen) = seen.filter(|seen| seen.target.quic_server_id != target.quic_server_id) {
            if target.quic_server_id.is_some() {
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

    let has_healthy_successor =
        s.desired.keys().any(|key| present(key).is_some_and(|seen| seen.state == TargetState::Healthy));
    let keeps_last = s.keep_last && s.tracked.is_none() && !has_healthy_successor;
    let mut unwanted = Vec::new();
    for (key, seen) in s.observed {
        if seen.state == TargetState::Draining || s.desired.contains_key(key) || s.protected.contains(key) {
            continue;
        }
        if s.tracked.is_some_and(|tracked| !tracked.contains(key)) {
            continue;
        }
        if !s.alive.contains(key) {
            unwanted.push(seen);
            continue;
        }
        let waited = s.unwanted_for.get(key).copied().unwrap_or_default();
        let wait = match s.grace {
            Some(grace) => grace,
            None if keeps_last => {
                plan.kept.insert(key.clone());
                plan.keeps_last = true;
                continue;
            }
            None if (seen.state == TargetState::Healthy || s.assumed.contains(key))
                && !has_healthy_successor =>
            {
                s.swap_grace
            }
            None => Duration::ZERO,
        };
        if waited >= wait {
            unwanted.push(seen);
        } else {
            plan.kept.insert(key.clone());
            let left = wait - waited;
            plan.again_in = Some(plan.again_in.map_or(left, |again| again.min(left)));
        }
    }
    unwanted.sort_by_key(|seen| (seen.state == TargetState::Healthy, TargetKey::of(&seen.target)));
    plan.deregister = unwanted.into_iter().map(|seen| seen.target.clone()).chain(changed_id).collect();
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use TargetState::{Draining, Healthy, Initial, Unhealthy, Unused};

    fn key(id: &str) -> TargetKey {
        TargetKey { id: id.to_owned(), port: 80 }
    }

    fn target(id: &str) -> Target {
        Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None }
    }

    #[derive(Default)]
    struct World {
        desired: BTreeMap<TargetKey, Target>,
        observed: BTreeMap<TargetKey, ObservedTarget>,
        alive: BTreeSet<TargetKey>,
        tracked: Option<BTreeSet<TargetKey>>,
        protected: BTreeSet<TargetKey>,
        unwanted_for: BTreeMap<TargetKey, Duration>,
        grace: Option<Duration>,
        keep_last: bool,
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
                self.observed.insert(key(id), seen);
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
                grace: self.grace,
                keep_last: self.keep_last,
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
    fn a_target_whose_pod_is_gone_goes_at_once_in_spite_of_every_grace() {
        let mut world = World::wants(&[]).has(&[("dead", Healthy)]);
        world.grace = Some(Duration::from_secs(30));
        world.keep_last = true;
        assert_eq!(world.calls(), calls(&[], &["dead"]));
    }

    #[test]
    fn a_healthy_target_that_runs_waits_for_a_healthy_successor() {
        let swap = World::wants(&["new"]).has(&[("old", Healthy), ("new", Initial)]).alive(&["old"]);
        let plan = swap.plan();
        assert_eq!(plan.deregister, []);
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
    fn the_last_targets_stay_while_nothing_is_ready_but_not_beside_other_healthy_ones() {
        let mut world = World::wants(&[]).has(&[("a", Unhealthy)]).alive(&["a"]);
        world.keep_last = true;
        assert_eq!(world.calls(), calls(&[], &[]));
        assert!(world.plan().keeps_last);
        let mut beside = World::wants(&["b"]).has(&[("a", Unhealthy), ("b", Healthy)]).alive(&["a"]);
        beside.keep_last = true;
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
    }
}
