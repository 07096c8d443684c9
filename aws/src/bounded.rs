//! A map for what users name: as many entries as fit into so many bytes.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Values by key, of at most so many bytes together. Those that were used longest ago go first.
#[derive(Debug)]
pub struct Bounded<K, V> {
    most: usize,
    size: fn(&K, &V) -> usize,
    state: Mutex<State<K, V>>,
}

#[derive(Debug)]
struct State<K, V> {
    entries: HashMap<K, Entry<V>>,
    bytes: usize,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    size: usize,
    used: u64,
}

impl<K: Eq + Hash, V: Clone> Bounded<K, V> {
    /// Starts empty; `size` says how many bytes an entry takes.
    pub fn new(most: usize, size: fn(&K, &V) -> usize) -> Self {
        Self { most, size, state: Mutex::new(State { entries: HashMap::new(), bytes: 0, clock: 0 }) }
    }

    /// The value of a key.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.lock().get(key)
    }

    /// The value of a key, which is made if there is none.
    pub fn get_or_insert_with(&self, key: K, make: impl FnOnce() -> V) -> V {
        let mut state = self.lock();
        if let Some(value) = state.get(&key) {
            return value;
        }
        let value = make();
        self.insert_into(&mut state, key, value.clone());
        value
    }

    /// Keeps a value instead of the key's old one. What is too large by itself is not kept.
    pub fn insert(&self, key: K, value: V) {
        self.insert_into(&mut self.lock(), key, value);
    }

    /// Forgets a key.
    pub fn remove<Q: Eq + Hash + ?Sized>(&self, key: &Q)
    where
        K: Borrow<Q>,
    {
        self.lock().remove(key);
    }

    /// The bytes that there are.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert_into(&self, state: &mut State<K, V>, key: K, value: V) {
        state.remove(&key);
        let size = (self.size)(&key, &value);
        if size > self.most {
            return;
        }
        state.clock += 1;
        state.bytes += size;
        state.entries.insert(key, Entry { value, size, used: state.clock });
        if state.bytes > self.most {
            state.shrink(self.most - self.most / 4);
        }
    }
}

impl<K: Eq + Hash, V: Clone> State<K, V> {
    fn get<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let entry = self.entries.get_mut(key)?;
        self.clock += 1;
        entry.used = self.clock;
        Some(entry.value.clone())
    }

    fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.size;
        }
    }

    /// Drops the oldest until no more than so many bytes are left; the newest stays. A quarter goes at a time, so that it is
    /// seldom looked for.
    fn shrink(&mut self, bytes: usize) {
        let mut uses: Vec<_> = self.entries.values().map(|entry| (entry.used, entry.size)).collect();
        uses.sort_unstable();
        let mut left = self.bytes;
        let gone = uses.into_iter().take_while(|(used, size)| {
            let goes = left > bytes && *used < self.clock;
            left -= if goes { *size } else { 0 };
            goes
        });
        let Some((last, _)) = gone.last() else { return };
        self.entries.retain(|_, entry| entry.used > last);
        self.bytes = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(most: usize) -> Bounded<String, usize> {
        Bounded::new(most, |key, value| key.len() + value)
    }

    #[test]
    fn what_was_used_longest_ago_goes_when_there_is_too_much() {
        let map = map(40);
        for key in ["a", "b", "c", "d"] {
            map.insert(key.to_owned(), 9);
        }
        assert_eq!((map.bytes(), map.get("a")), (40, Some(9)));
        map.insert("e".to_owned(), 9);
        assert_eq!(
            ["a", "b", "c", "d", "e"].map(|key| map.get(key).is_some()),
            [true, false, false, true, true]
        );
        assert_eq!(map.bytes(), 30);
    }

    #[test]
    fn an_entry_is_replaced_and_forgotten_with_its_bytes() {
        let map = map(40);
        map.insert("a".to_owned(), 9);
        map.insert("a".to_owned(), 19);
        assert_eq!((map.get_or_insert_with("a".to_owned(), || 1), map.bytes()), (19, 20));
        map.remove("a");
        assert_eq!((map.get_or_insert_with("a".to_owned(), || 1), map.bytes()), (1, 2));
        assert_eq!((map.bytes(), map.get("a")), (2, Some(1)));
    }

    #[test]
    fn what_is_too_large_by_itself_is_not_kept_and_takes_nothing_from_others() {
        let map = map(40);
        map.insert("a".to_owned(), 9);
        assert_eq!(map.get_or_insert_with("x".repeat(40), || 1), 1);
        assert_eq!((map.bytes(), map.get("a")), (10, Some(9)));
        map.insert("b".to_owned(), 39);
        assert_eq!(["a", "b"].map(|key| map.get(key)), [None, Some(39)]);
    }

    #[test]
    fn the_bound_holds_whatever_comes() {
        let map = map(10_000);
        for n in 0..20_000_usize {
            map.insert(n.to_string(), n * 7919 % 300);
            assert!(map.bytes() <= 10_000);
            map.get(&(n / 2).to_string());
        }
        let state = map.lock();
        assert_eq!(state.entries.values().map(|entry| entry.size).sum::<usize>(), state.bytes);
    }
}
