//! How many targets go out in batches when AWS refuses some of them. Pure; [`crate::apply`] makes the calls.
//!
//! One bad target fails a whole call. Those that the error names are taken out first; if it names none, the batch is
//! halved.

use tgb_aws::values::Target;

/// RegisterTargets takes more, but larger calls fail at times.
const BATCH: usize = 200;
/// Calls that one pass may spend.
const CALLS: usize = 16;

/// What is still to be sent, and what came of the rest.
#[derive(Debug, Default)]
pub(crate) struct Batches {
    /// The next one last.
    waiting: Vec<Vec<Target>>,
    calls: usize,
    /// What AWS would not take, and its words.
    pub(crate) refused: Vec<(Target, String)>,
    /// For these there is no room.
    pub(crate) no_room: Vec<Target>,
}

impl Batches {
    /// Everything is still to be sent.
    pub(crate) fn new(targets: &[Target]) -> Self {
        let mut waiting: Vec<Vec<Target>> = targets.chunks(BATCH).map(<[Target]>::to_vec).collect();
        waiting.reverse();
        Self { waiting, ..Self::default() }
    }

    /// Batches like those of [`Self::new`], with the first target alone: it tells with one call whether there is any room.
    pub(crate) fn probing(targets: &[Target]) -> Self {
        let (first, others) = targets.split_at(1.min(targets.len()));
        let mut batches = Self::new(others);
        batches.waiting.extend(Some(first.to_vec()).filter(|first| !first.is_empty()));
        batches
    }

    /// What to send next; nothing if all is done or the calls of this pass are used up.
    pub(crate) fn next(&mut self) -> Option<Vec<Target>> {
        if self.calls == CALLS {
            return None;
        }
        let batch = self.waiting.pop()?;
        self.calls += 1;
        Some(batch)
    }

    /// The targets that were not sent for want of calls.
    pub(crate) fn left(&self) -> impl Iterator<Item = &Target> {
        self.waiting.iter().rev().flatten()
    }

    /// The batch is to be sent once more.
    pub(crate) fn again(&mut self, batch: Vec<Target>) {
        self.waiting.push(batch);
    }

    /// Changes what was not sent yet.
    pub(crate) fn change(&mut self, mut change: impl FnMut(&mut Target)) {
        self.waiting.iter_mut().flatten().for_each(&mut change);
    }

    /// AWS refused the batch because of targets in it.
    pub(crate) fn refuse(&mut self, batch: Vec<Target>, message: &str) {
        let (named, others): (Vec<Target>, Vec<Target>) =
            batch.into_iter().partition(|target| names_id(message, &target.id));
        if named.is_empty() && others.len() > 1 {
            self.halve(others);
            return;
        }
        let (bad, good) = if named.is_empty() { (others, named) } else { (named, others) };
        self.refused.extend(bad.into_iter().map(|target| (target, message.to_owned())));
        if !good.is_empty() {
            self.waiting.push(good);
        }
    }

    /// AWS has no room for the batch; perhaps for half of it.
    pub(crate) fn full(&mut self, batch: Vec<Target>) {
        if batch.len() > 1 {
            self.halve(batch);
            return;
        }
        self.no_room.extend(batch);
        self.no_room.extend(self.waiting.drain(..).rev().flatten());
    }

    /// Sends the batch in two halves, where AWS does not say which of its targets it means.
    pub(crate) fn halve(&mut self, batch: Vec<Target>) {
        let (left, right) = batch.split_at(batch.len() / 2);
        self.waiting.extend([right.to_vec(), left.to_vec()]);
    }
}

/// Whether AWS's sentence names a target as a whole word.
fn names_id(message: &str, id: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    message.match_indices(id).any(|(at, found)| {
        let before = message.get(..at).and_then(|text| text.chars().next_back());
        let after = message.get(at + found.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(is_part) && !after.is_some_and(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn targets(count: usize) -> Vec<Target> {
        let one = |n: usize| Target { id: format!("i-{n:03}"), port: 80, zone: None, quic_server_id: None };
        (0..count).map(one).collect()
    }

    /// Passes against an AWS that refuses `bad` ids, naming them or not, until nothing is left to try.
    fn passes(count: usize, bad: &BTreeSet<String>, names: bool) -> (BTreeSet<String>, BTreeSet<String>) {
        let (mut taken, mut refused) = (BTreeSet::new(), BTreeSet::new());
        let mut wanted = targets(count);
        while !wanted.is_empty() {
            let mut batches = Batches::new(&wanted);
            let mut calls = 0;
            while let Some(batch) = batches.next() {
                calls += 1;
                let wrong: Vec<String> =
                    batch.iter().map(|t| t.id.clone()).filter(|id| bad.contains(id)).collect();
                if wrong.is_empty() {
                    taken.extend(batch.into_iter().map(|target| target.id));
                } else if names {
                    batches.refuse(batch, &format!("not running: '{}'", wrong.join("', '")));
                } else {
                    batches.refuse(batch, "some are not running");
                }
            }
            assert!(calls <= CALLS && batches.left().count() <= count);
            refused.extend(batches.refused.into_iter().map(|(target, _)| target.id));
            wanted.retain(|target| !taken.contains(&target.id) && !refused.contains(&target.id));
        }
        (taken, refused)
    }

    proptest! {
        #[test]
        fn in_the_end_exactly_the_bad_ones_are_left_out(
            count in 1usize..450,
            bad in prop::collection::btree_set(0usize..450, 0..8),
            names: bool,
        ) {
            let bad: BTreeSet<String> =
                bad.into_iter().filter(|n| *n < count).map(|n| format!("i-{n:03}")).collect();
            let (taken, refused) = passes(count, &bad, names);
            prop_assert_eq!(&refused, &bad);
            prop_assert_eq!(taken.len(), count - bad.len());
        }

        #[test]
        fn as_many_are_registered_as_there_is_room_for(count in 1usize..200, room in 0usize..200) {
            let mut batches = Batches::new(&targets(count));
            let mut taken = 0;
            while let Some(batch) = batches.next() {
                if taken + batch.len() <= room {
                    taken += batch.len();
                } else {
                    batches.full(batch);
                }
            }
            prop_assert_eq!(taken, room.min(count));
            prop_assert_eq!(taken + batches.no_room.len() + batches.left().count(), count);
        }
    }

    #[test]
    fn a_probe_of_a_full_group_costs_one_call() {
        let mut batches = Batches::probing(&targets(450));
        let first = batches.next().unwrap();
        assert_eq!(first, targets(1));
        batches.full(first);
        assert_eq!((batches.next(), batches.no_room.len()), (None, 450));
        let mut roomy = Batches::probing(&targets(450));
        let sizes: Vec<usize> = std::iter::from_fn(|| roomy.next()).map(|batch| batch.len()).collect();
        assert_eq!(sizes, [1, 200, 200, 49]);
        assert_eq!(Batches::probing(&[]).next(), None);
    }

    #[test]
    fn named_targets_are_taken_out_with_one_call() {
        let mut batches = Batches::new(&targets(200));
        let batch = batches.next().unwrap();
        batches.refuse(batch, "The following instances do not exist: 'i-003', 'i-199'");
        assert_eq!(batches.next().unwrap().len(), 198);
        assert!(batches.next().is_none());
    }

    #[test]
    fn a_longer_id_is_not_named_by_a_shorter_one() {
        assert!(names_id("the IP address '10.0.0.1' is", "10.0.0.1"));
        assert!(!names_id("the IP address '10.0.0.11' is", "10.0.0.1"));
        assert!(!names_id("the IP address '110.0.0.1' is", "10.0.0.1"));
        assert!(names_id("Targets {i-1, i-2}.", "i-2"));
    }
}
