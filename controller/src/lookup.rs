//! Look-ups at AWS that are remembered, and joined: what several workers look for at the same time is asked for in one call.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_aws::AwsError;
use tokio::time::Instant;

/// Answers by key. A key that AWS does not show has the default answer.
pub(crate) struct Lookups<K, V> {
    kept_for: Duration,
    answers: Mutex<HashMap<K, Answer<V>>>,
    /// Keys that are looked for by those that wait for their turn.
    waiting: Mutex<BTreeSet<K>>,
    /// Held during a call.
    turn: tokio::sync::Mutex<()>,
}

struct Answer<V> {
    /// The time at which the call began that gave it.
    asked: Instant,
    answer: Result<V, AwsError>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Clone + Ord + Hash, V: Clone + Default> Lookups<K, V> {
    /// Answers are kept for so long.
    pub(crate) fn new(kept_for: Duration) -> Self {
        Self {
            kept_for,
            answers: Mutex::default(),
            waiting: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// The answers about `keys`, none of them older than `younger`. `call` asks for those that are not remembered, and for what
    /// others wait for.
    ///
    /// # Errors
    /// The error of AWS.
    pub(crate) async fn get<F>(
        &self,
        keys: BTreeSet<K>,
        younger: Duration,
        call: impl FnOnce(Vec<K>) -> F,
    ) -> Result<BTreeMap<K, V>, AwsError>
    where
        F: Future<Output = Result<HashMap<K, V>, AwsError>>,
    {
        let begun = Instant::now();
        let mut found = BTreeMap::new();
        let mut left = self.known(keys, (begun, younger), &mut found)?;
        if left.is_empty() {
            return Ok(found);
        }
        lock(&self.waiting).extend(left.iter().cloned());
        let _turn = self.turn.lock().await;
        left = self.known(left, (begun, younger), &mut found)?;
        if left.is_empty() {
            return Ok(found);
        }
        // Whoever was asked for in vain, since the one that asked went away, is in `left` of its own turn.
        let mut all = std::mem::take(&mut *lock(&self.waiting));
        all.extend(left.iter().cloned());
        let asked = Instant::now();
        let answer = call(all.iter().cloned().collect()).await;
        let mut answers = lock(&self.answers);
        answers.retain(|_, known| known.answer.is_ok() && known.asked.elapsed() < self.kept_for);
        let of = |key: &K| match &answer {
            Ok(values) => Ok(values.get(key).cloned().unwrap_or_default()),
            Err(error) => Err(error.clone()),
        };
        for key in all {
            let answer = of(&key);
            answers.insert(key, Answer { asked, answer });
        }
        for key in left {
            let value = of(&key)?;
            found.insert(key, value);
        }
        Ok(found)
    }

    /// Forgets an answer.
    pub(crate) fn forget(&self, key: &K) {
        lock(&self.answers).remove(key);
    }

    /// Takes over what is known well enough, and gives back the rest. A failure counts for those only that were waiting when
    /// the call began.
    fn known(
        &self,
        keys: BTreeSet<K>,
        (begun, younger): (Instant, Duration),
        found: &mut BTreeMap<K, V>,
    ) -> Result<BTreeSet<K>, AwsError> {
        let answers = lock(&self.answers);
        let mut left = BTreeSet::new();
        for key in keys {
            match answers.get(&key) {
                Some(Answer { asked, answer: Ok(value) })
                    if begun.saturating_duration_since(*asked) < younger =>
                {
                    found.insert(key, value.clone());
                }
                Some(Answer { asked, answer: Err(error) }) if *asked > begun => return Err(error.clone()),
                _ => drop(left.insert(key)),
            }
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::task::{JoinHandle, yield_now};

    const LONG: Duration = Duration::from_secs(600);

    /// An AWS that knows everything but 99, answers while it is `open`, and fails the first calls.
    struct Fake {
        lookups: Lookups<u32, String>,
        calls: Mutex<Vec<Vec<u32>>>,
        failing: usize,
        open: tokio::sync::watch::Sender<bool>,
    }

    type Found = Result<Vec<String>, AwsError>;

    impl Fake {
        fn new(failing: usize) -> Arc<Self> {
            let open = tokio::sync::watch::Sender::new(false);
            Arc::new(Self { lookups: Lookups::new(LONG), calls: Mutex::default(), failing, open })
        }

        async fn get(&self, keys: impl IntoIterator<Item = u32>, younger: Duration) -> Found {
            let call = |keys: Vec<u32>| async move {
                let count = {
                    let mut calls = lock(&self.calls);
                    calls.push(keys.clone());
                    calls.len()
                };
                self.open.subscribe().wait_for(|open| *open).await.unwrap();
                let error =
                    AwsError { operation: "Test", code: "Unreachable".to_owned(), message: String::new() };
                let there = keys.into_iter().filter(|key| *key != 99);
                let found = there.map(|key| (key, format!("n{key}"))).collect();
                if count <= self.failing { Err(error) } else { Ok(found) }
            };
            let found = self.lookups.get(keys.into_iter().collect(), younger, call).await?;
            Ok(found.into_values().collect())
        }

        /// Has each of these sets looked for by a task of its own, the first of which is in its call when the others come, and
        /// gives the tasks when all of them wait.
        async fn start(self: &Arc<Self>, all: impl IntoIterator<Item = Vec<u32>>) -> Vec<JoinHandle<Found>> {
            let (mut tasks, mut waiting) = (Vec::new(), BTreeSet::new());
            for keys in all {
                if !tasks.is_empty() {
                    waiting.extend(keys.iter().copied());
                }
                let fake = Arc::clone(self);
                tasks.push(tokio::spawn(async move { fake.get(keys, LONG).await }));
                while lock(&self.calls).is_empty() {
                    yield_now().await;
                }
            }
            while *lock(&self.lookups.waiting) != waiting {
                yield_now().await;
            }
            tasks
        }

        fn calls(&self) -> Vec<usize> {
            lock(&self.calls).iter().map(Vec::len).collect()
        }
    }

    #[tokio::test]
    async fn the_first_goes_at_once_and_those_that_come_meanwhile_go_together() {
        let fake = Fake::new(0);
        let tasks = fake.start((0..50).map(|n| vec![n, n + 1])).await;
        fake.open.send_replace(true);
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap().len(), 2);
        }
        // One of the two that the first has asked for was not known yet when the second one came.
        assert_eq!(fake.calls(), [2, 50]);
        assert_eq!(fake.get(0..51, LONG).await.unwrap().len(), 51);
        assert_eq!(fake.calls(), [2, 50], "what is remembered is not asked for");
        fake.get([7], Duration::ZERO).await.unwrap();
        assert_eq!(fake.calls(), [2, 50, 1], "unless it is too old");
    }

    #[tokio::test]
    async fn what_is_not_there_is_remembered_too() {
        let fake = Fake::new(0);
        fake.open.send_replace(true);
        assert_eq!(fake.get([99], LONG).await.unwrap(), [""]);
        assert_eq!(fake.get([99], LONG).await.unwrap(), [""]);
        assert_eq!(fake.calls(), [1]);
    }

    #[tokio::test]
    async fn a_failure_is_told_to_all_that_waited_for_it_and_to_nobody_who_comes_later() {
        let fake = Fake::new(2);
        let tasks = fake.start((0..50).map(|n| vec![n])).await;
        fake.open.send_replace(true);
        for task in tasks {
            assert!(task.await.unwrap().is_err());
        }
        assert_eq!(fake.calls(), [1, 49]);
        assert_eq!(fake.get([7], LONG).await.unwrap(), ["n7"]);
    }

    #[tokio::test]
    async fn whoever_asks_first_may_go_away() {
        let fake = Fake::new(0);
        let tasks = fake.start([vec![1], vec![1]]).await;
        tasks[0].abort();
        fake.open.send_replace(true);
        let second = tasks.into_iter().nth(1).unwrap().await.unwrap();
        assert_eq!(second.unwrap(), ["n1"]);
    }
}
