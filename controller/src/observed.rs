//! What is registered in a target group as far as we know: the last DescribeTargetHealth plus our own acknowledged writes
//! since. Beside it, what is remembered of its targets: which are ours, which AWS refuses, which vanish.
//!
//! No calls and no clock: whoever calls AWS tells what it answered, and when.

use crate::desired::{Desired, Origin, TargetKey};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tgb_aws::values::{ObservedTarget, Target, TargetState};
use tokio::time::Instant;

/// AWS's reads may omit what was written so long ago, or show what was taken away.
const STALE: Duration = Duration::from_secs(5);
/// Targets that vanish [`FIGHT`] times within this time were taken away by another controller.
const FIGHT_WINDOW: Duration = Duration::from_secs(600);
const FIGHT: usize = 3;
/// How long vanished targets are left alone then, doubled each time.
const HOLD: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));
/// After how long a refused target is tried again, doubled each time.
const REFUSED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// Registered targets. Boxed, since a tree of two has room for eleven.
pub(crate) type Seen = BTreeMap<TargetKey, Box<ObservedTarget>>;

/// See above.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    known: bool,
    seen: Seen,
    /// Registered by us, and not shown by AWS since.
    assumed: BTreeMap<TargetKey, Instant>,
    /// Deregistered by us not long ago.
    gone: BTreeMap<TargetKey, Instant>,
    ours: BTreeMap<TargetKey, Ours>,
    unwanted_since: BTreeMap<TargetKey, Instant>,
    refused: BTreeMap<TargetKey, Refusal>,
    /// When each target vanished.
    vanished: BTreeMap<TargetKey, Vec<Instant>>,
    /// The group had no room when it was last tried.
    full: bool,
    held: BTreeMap<TargetKey, Instant>,
}

/// A target that we registered or found where we wanted it.
#[derive(Debug)]
struct Ours {
    /// The name and the UID of its pod.
    pod: Option<(Arc<str>, String)>,
    /// When we registered it, unless that was before our time.
    since: Option<Instant>,
}

/// A target that AWS would not take.
#[derive(Debug)]
struct Refusal {
    until: Instant,
    times: u32,
    why: String,
}

impl Observed {
    /// Whether AWS has ever been asked.
    pub(crate) fn is_known(&self) -> bool {
        self.known
    }

    /// Everything, draining targets included.
    pub(crate) fn targets(&self) -> &Seen {
        &self.seen
    }

    /// A registered target that is not draining.
    pub(crate) fn present(&self, key: &TargetKey) -> Option<&ObservedTarget> {
        self.seen.get(key).map(|seen| &**seen).filter(|seen| seen.state.is_registered())
    }

    /// Registered, but not shown since: they may be healthy by now.
    pub(crate) fn assumed(&self) -> BTreeSet<TargetKey> {
        self.assumed.keys().cloned().collect()
    }

    /// Whether we registered a target, or found it where we wanted it.
    pub(crate) fn is_ours(&self, key: &TargetKey) -> bool {
        self.ours.contains_key(key)
    }

    /// The name and the UID of the pod that a target was registered for.
    pub(crate) fn pod(&self, key: &TargetKey) -> Option<(&str, &str)> {
        self.ours.get(key)?.pod.as_ref().map(|(name, uid)| (&**name, uid.as_str()))
    }

    /// True if the group had no room when targets were last sent.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// AWS said that the group has no room.
    pub(crate) fn found_full(&mut self) {
        self.full = true;
    }

    /// When we registered a target.
    pub(crate) fn since(&self, key: &TargetKey) -> Option<Instant> {
        self.ours.get(key)?.since
    }

    /// Takes over what AWS shows. `wanted` says which targets ought to be there: those of ours that vanished are counted.
    pub(crate) fn show(
        &mut self,
        shown: Vec<ObservedTarget>,
        wanted: impl Fn(&TargetKey) -> bool,
        now: Instant,
    ) {
        let mut seen: Seen =
            shown.into_iter().map(|seen| (TargetKey::of(&seen.target), Box::new(seen))).collect();
        let is_fresh = |at: &Instant| now.saturating_duration_since(*at) < STALE;
        self.assumed.retain(|key, at| !seen.contains_key(key) && is_fresh(at));
        for key in self.assumed.keys() {
            if let Some(ours) = self.seen.get(key) {
                seen.insert(key.clone(), ours.clone());
            }
        }
        self.gone.retain(|key, at| is_fresh(at) && seen.contains_key(key));
        for key in self.gone.keys() {
            if let Some(shown) = seen.get_mut(key) {
                shown.state = TargetState::Draining;
            }
        }
        let is_there =
            |all: &Seen, key: &TargetKey| all.get(key).is_some_and(|seen| seen.state.is_registered());
        let vanished: Vec<TargetKey> = self
            .ours
            .keys()
            .filter(|key| is_there(&self.seen, key) && !is_there(&seen, key) && wanted(key))
            .cloned()
            .collect();
        if !vanished.is_empty() {
            self.vanish(vanished, now);
        }
        self.ours.retain(|key, _| is_there(&seen, key));
        self.seen = seen;
        self.known = true;
    }

    /// Counts for each target how often it vanished. One that vanishes once proves nothing: AWS takes away instances that
    /// end before their nodes are seen to be gone.
    fn vanish(&mut self, keys: Vec<TargetKey>, now: Instant) {
        let since = |at: &Instant| now.saturating_duration_since(*at);
        self.vanished.retain(|_, times| times.last().is_some_and(|last| since(last) <= FIGHT_WINDOW * 2));
        for key in keys {
            let times = self.vanished.entry(key.clone()).or_default();
            if times.len() < FIGHT {
                times.retain(|at| since(at) < FIGHT_WINDOW);
            }
            times.push(now);
            if let Some(more) = times.len().checked_sub(FIGHT) {
                let until = now + doubled(HOLD, u32::try_from(more).unwrap_or(u32::MAX));
                self.held.insert(key, until);
            }
        }
    }

    /// True if another controller takes our targets away.
    pub(crate) fn is_fought_over(&self, now: Instant) -> bool {
        self.vanished.values().any(|times| {
            let last = times.last().filter(|_| times.len() >= FIGHT);
            last.is_some_and(|last| now.saturating_duration_since(*last) < FIGHT_WINDOW * 2)
        })
    }

    /// AWS has acknowledged a registration.
    pub(crate) fn registered(&mut self, targets: &[Target], wanted: &Desired, now: Instant) {
        self.full = false;
        for target in targets {
            let key = TargetKey::of(target);
            self.refused.remove(&key);
            self.held.remove(&key);
            self.gone.remove(&key);
            self.assumed.insert(key.clone(), now);
            self.ours.insert(key.clone(), Ours { pod: pod_of(wanted, &key), since: Some(now) });
            let seen = ObservedTarget {
                target: target.clone(),
                state: TargetState::Initial,
                reason: None,
                description: None,
            };
            self.seen.insert(key, Box::new(seen));
        }
    }

    /// AWS has acknowledged a deregistration.
    pub(crate) fn deregistered(&mut self, targets: &[Target], now: Instant) {
        self.full = false;
        for target in targets {
            let key = TargetKey::of(target);
            self.ours.remove(&key);
            self.assumed.remove(&key);
            if let Some(seen) = self.seen.get_mut(&key) {
                seen.state = TargetState::Draining;
            }
            self.gone.insert(key, now);
        }
    }

    /// Targets that are where they are wanted are ours, whoever registered them: their pods are remembered.
    pub(crate) fn adopt(&mut self, wanted: &Desired) {
        for key in wanted.targets.keys() {
            if self.present(key).is_none() {
                continue;
            }
            let pod = pod_of(wanted, key);
            self.ours.entry(key.clone()).or_insert(Ours { pod: None, since: None }).pod = pod;
        }
    }

    /// AWS would not take targets.
    pub(crate) fn refuse(&mut self, refused: Vec<(Target, String)>, now: Instant) {
        for (target, why) in refused {
            let key = TargetKey::of(&target);
            let times = self.refused.get(&key).map_or(0, |before| before.times.saturating_add(1));
            self.refused.insert(key, Refusal { until: now + doubled(REFUSED, times), times, why });
        }
    }

    /// Forgets refusals of what is not wanted any more.
    pub(crate) fn keep_refused(&mut self, wanted: impl Fn(&TargetKey) -> bool, now: Instant) {
        self.refused.retain(|key, _| wanted(key));
        self.held.retain(|key, until| wanted(key) && *until > now);
    }

    /// Those that AWS refuses, and why.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (&TargetKey, &str)> {
        self.refused.iter().map(|(key, refusal)| (key, refusal.why.as_str()))
    }

    /// What is not to be registered now, and in how long the first of them may be tried again.
    pub(crate) fn not_now(&self, now: Instant) -> (BTreeSet<TargetKey>, Option<Duration>) {
        let refused = self.refused.iter().map(|(key, refusal)| (key, refusal.until));
        let held = self.held.iter().map(|(key, until)| (key, *until));
        let waiting: Vec<(&TargetKey, Instant)> =
            refused.chain(held).filter(|(_, until)| *until > now).collect();
        let first = waiting.iter().map(|(_, until)| *until - now).min();
        (waiting.into_iter().map(|(key, _)| key.clone()).collect(), first)
    }

    /// For how long each registered target has been unwanted.
    pub(crate) fn unwanted_for(
        &mut self,
        wanted: impl Fn(&TargetKey) -> bool,
        now: Instant,
    ) -> BTreeMap<TargetKey, Duration> {
        let seen = &self.seen;
        let is_unwanted =
            |key: &TargetKey| seen.get(key).is_some_and(|seen| seen.state.is_registered()) && !wanted(key);
        self.unwanted_since.retain(|key, _| is_unwanted(key));
        for key in seen.keys().filter(|key| is_unwanted(key)) {
            self.unwanted_since.entry(key.clone()).or_insert(now);
        }
        let since = self.unwanted_since.iter();
        since.map(|(key, since)| (key.clone(), now.saturating_duration_since(*since))).collect()
    }
}

fn pod_of(wanted: &Desired, key: &TargetKey) -> Option<(Arc<str>, String)> {
    match &wanted.targets.get(key)?.origin {
        Origin::Pod { key, uid, .. } => Some((Arc::clone(&key.name), uid.clone())),
        Origin::Node(_) | Origin::Bare => None,
    }
}

fn doubled((first, last): (Duration, Duration), times: u32) -> Duration {
    first.saturating_mul(2u32.saturating_pow(times)).min(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tgb_aws::values::TARGET_STATES;

    fn target(id: &str) -> Target {
        Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None }
    }

    fn key(id: &str) -> TargetKey {
        TargetKey { id: id.to_owned(), port: 80 }
    }

    fn shown(ids: &[&str]) -> Vec<ObservedTarget> {
        let one = |id: &&str| ObservedTarget {
            target: target(id),
            state: TargetState::Healthy,
            reason: None,
            description: None,
        };
        ids.iter().map(one).collect()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn register(observed: &mut Observed, id: &str, now: Instant) {
        observed.registered(&[target(id)], &Desired::default(), now);
    }

    #[test]
    fn a_read_that_lags_behind_our_writes_is_no_drift() {
        let (mut observed, begun) = (Observed::default(), Instant::now());
        observed.show(shown(&["old"]), |_| true, begun);
        register(&mut observed, "new", begun);
        observed.deregistered(&[target("old")], begun);
        observed.show(shown(&["old"]), |_| true, begun + seconds(1));
        assert!(observed.present(&key("new")).is_some() && observed.present(&key("old")).is_none());
        observed.show(shown(&["old"]), |_| true, begun + seconds(6));
        assert!(observed.present(&key("new")).is_none() && observed.present(&key("old")).is_some());
    }

    #[test]
    fn a_target_is_there_in_every_state_but_draining() {
        for (state, word, _) in TARGET_STATES {
            let there = state.is_registered();
            let mut seen = shown(&["a"]);
            seen[0].state = state;
            let (mut observed, mut now) = (Observed::default(), Instant::now());
            for _ in 0..FIGHT {
                register(&mut observed, "a", now);
                now += seconds(60);
                observed.show(seen.clone(), |_| true, now);
                assert_eq!(observed.present(&key("a")).is_some(), there, "{word}");
                assert_eq!(observed.is_ours(&key("a")), there, "{word}");
            }
            // One that is there did not vanish.
            assert_eq!(observed.is_fought_over(now), !there, "{word}");
            assert_eq!(observed.unwanted_for(|_| false, now).len(), usize::from(there), "{word}");
        }
    }

    #[test]
    fn targets_that_vanish_three_times_are_fought_over_and_left_alone_for_longer_each_time() {
        let (mut observed, mut now) = (Observed::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..5 {
            register(&mut observed, "a", now);
            observed.show(shown(&["a"]), |_| true, now + seconds(10));
            now += seconds(60);
            observed.show(shown(&[]), |_| true, now);
            waits.push(observed.not_now(now).1.map(|wait| wait.as_secs()));
        }
        assert_eq!(waits, [None, None, Some(60), Some(120), Some(240)]);
        assert!(observed.is_fought_over(now) && !observed.is_fought_over(now + seconds(1200)));
    }

    #[test]
    fn targets_that_vanish_once_each_are_not_fought_over() {
        let (mut observed, mut now) = (Observed::default(), Instant::now());
        let ids = ["i-1", "i-2", "i-3", "i-4"];
        for id in ids {
            register(&mut observed, id, now);
        }
        for ended in 1..=ids.len() {
            now += seconds(60);
            observed.show(shown(&ids[ended..]), |_| true, now);
            assert!(!observed.is_fought_over(now) && observed.not_now(now).0.is_empty());
        }
    }

    #[test]
    fn a_target_that_nobody_wants_any_more_does_not_vanish() {
        let (mut observed, mut now) = (Observed::default(), Instant::now());
        for _ in 0..5 {
            register(&mut observed, "a", now);
            now += seconds(60);
            observed.show(shown(&[]), |_| false, now);
        }
        assert!(!observed.is_fought_over(now));
    }

    #[test]
    fn a_refused_target_is_tried_again_ever_later_until_it_is_taken() {
        let (mut observed, now) = (Observed::default(), Instant::now());
        let wait = |observed: &mut Observed| {
            observed.refuse(vec![(target("a"), "no".to_owned())], now);
            observed.not_now(now).1.map(|wait| wait.as_secs())
        };
        assert_eq!(wait(&mut observed), Some(5));
        assert_eq!(wait(&mut observed), Some(10));
        assert!(observed.not_now(now + seconds(10)).0.is_empty());
        assert_eq!(observed.refused().count(), 1);
        register(&mut observed, "a", now);
        assert_eq!(observed.refused().count(), 0);
    }

    #[test]
    fn how_long_a_target_is_unwanted_begins_anew_when_it_was_wanted_in_between() {
        let (mut observed, now) = (Observed::default(), Instant::now());
        observed.show(shown(&["a"]), |_| true, now);
        assert_eq!(observed.unwanted_for(|_| false, now)[&key("a")], Duration::ZERO);
        assert_eq!(observed.unwanted_for(|_| false, now + seconds(9))[&key("a")], seconds(9));
        assert!(observed.unwanted_for(|_| true, now + seconds(10)).is_empty());
        assert_eq!(observed.unwanted_for(|_| false, now + seconds(11))[&key("a")], Duration::ZERO);
    }
}
