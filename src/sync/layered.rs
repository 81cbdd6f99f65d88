//! A bounded cache that may lie over another one. What the upper one lacks is read from the lower one, which it never
//! changes: a rehearsal knows what the worker knows, and leaves no trace.
//!
//! The entry that was used longest ago makes room for a new one.

use std::borrow::Borrow;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use tokio::time::Instant;

/// Clones share the entries.
pub(crate) struct Layered<K, V> {
    own: Arc<Bounded<K, V>>,
    below: Option<Arc<Bounded<K, V>>>,
}

/// How much a cache keeps.
pub(crate) struct Bounds<K, V> {
    /// The most that all entries may weigh together.
    pub(crate) capacity: usize,
    pub(crate) weight: fn(&K, &V) -> usize,
    /// Entries that were inserted before this time are gone.
    pub(crate) lifetime: Option<Duration>,
}

impl<K, V> Bounds<K, V> {
    /// This number of entries, without a lifetime.
    pub(crate) fn entries(capacity: usize) -> Self {
        Self { capacity, weight: |_, _| 1, lifetime: None }
    }
}

/// Is called with each entry that makes room for others.
type OnEviction<V> = Box<dyn Fn(V) + Send + Sync>;

struct Bounded<K, V> {
    state: Mutex<State<K, V>>,
    bounds: Bounds<K, V>,
    on_eviction: Option<OnEviction<V>>,
}

struct State<K, V> {
    entries: LruCache<K, Inserted<V>>,
    weight: usize,
}

struct Inserted<V> {
    value: V,
    at: Instant,
}

impl<K, V> Clone for Layered<K, V> {
    fn clone(&self) -> Self {
        Self { own: Arc::clone(&self.own), below: self.below.clone() }
    }
}

impl<K: Hash + Eq, V> Bounded<K, V> {
    fn state(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_alive(&self, at: Instant) -> bool {
        self.bounds.lifetime.is_none_or(|lifetime| at.elapsed() < lifetime)
    }

    fn with<Q: Hash + Eq + ?Sized, T>(&self, key: &Q, read: impl FnOnce(&V) -> T) -> Option<T>
    where
        K: Borrow<Q>,
    {
        let mut state = self.state();
        let entry = state.entries.get(key).filter(|entry| self.is_alive(entry.at))?;
        Some(read(&entry.value))
    }

    /// The same, and the entry does not count as used.
    fn peek<Q: Hash + Eq + ?Sized, T>(&self, key: &Q, read: impl FnOnce(&V) -> T) -> Option<T>
    where
        K: Borrow<Q>,
    {
        let state = self.state();
        let entry = state.entries.peek(key).filter(|entry| self.is_alive(entry.at))?;
        Some(read(&entry.value))
    }

    /// Takes an entry out.
    fn remove<Q: Hash + Eq + ?Sized>(&self, state: &mut State<K, V>, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (key, Inserted { value, at }) = state.entries.pop_entry(key)?;
        state.weight = state.weight.saturating_sub((self.bounds.weight)(&key, &value));
        self.is_alive(at).then_some(value)
    }

    fn insert(&self, mut state: MutexGuard<'_, State<K, V>>, key: K, value: V) {
        self.remove(&mut state, &key);
        state.weight = state.weight.saturating_add((self.bounds.weight)(&key, &value));
        state.entries.push(key, Inserted { value, at: Instant::now() });
        let mut evicted = Vec::new();
        while let Some((_, oldest)) = state.entries.peek_lru() {
            let is_alive = self.is_alive(oldest.at);
            if is_alive && state.weight <= self.bounds.capacity {
                break;
            }
            let Some((key, Inserted { value, .. })) = state.entries.pop_lru() else { break };
            state.weight = state.weight.saturating_sub((self.bounds.weight)(&key, &value));
            evicted.extend(is_alive.then_some(value));
        }
        drop(state);
        if let Some(on_eviction) = &self.on_eviction {
            evicted.into_iter().for_each(on_eviction);
        }
    }
}

impl<K: Hash + Eq, V> Layered<K, V> {
    pub(crate) fn new(bounds: Bounds<K, V>) -> Self {
        Self::with_listener(bounds, None)
    }

    /// The same with a listener.
    pub(crate) fn with_listener(bounds: Bounds<K, V>, on_eviction: Option<OnEviction<V>>) -> Self {
        let state = Mutex::new(State { entries: LruCache::unbounded(), weight: 0 });
        Self { own: Arc::new(Bounded { state, bounds, on_eviction }), below: None }
    }

    /// Lays this cache over another one.
    #[must_use]
    pub(crate) fn over(self, below: &Self) -> Self {
        Self { below: Some(Arc::clone(&below.own)), ..self }
    }

    /// Reads a value in place.
    pub(crate) fn with<Q: Hash + Eq + ?Sized, T>(&self, key: &Q, read: impl Fn(&V) -> T) -> Option<T>
    where
        K: Borrow<Q>,
    {
        self.own.with(key, &read).or_else(|| self.below.as_ref()?.peek(key, &read))
    }

    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        V: Clone,
    {
        self.with(key, V::clone)
    }

    pub(crate) fn insert(&self, key: K, value: V) {
        self.own.insert(self.own.state(), key, value);
    }

    /// Replaces a value, as one step.
    pub(crate) fn update(&self, key: K, with: impl FnOnce(Option<V>) -> V)
    where
        V: Clone,
    {
        let below = self.below.as_ref().and_then(|below| below.peek(&key, V::clone));
        let mut state = self.own.state();
        let value = with(self.own.remove(&mut state, &key).or(below));
        self.own.insert(state, key, value);
    }

    /// Removes an entry of the upper cache.
    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&self, key: &Q)
    where
        K: Borrow<Q>,
    {
        self.own.remove(&mut self.own.state(), key);
    }

    /// Removes all entries of the upper cache.
    pub(crate) fn clear(&self) {
        let mut state = self.own.state();
        state.entries.clear();
        state.weight = 0;
    }

    /// What `select` makes of the entries of the upper cache, in no particular order.
    pub(crate) fn filter_map<T>(&self, mut select: impl FnMut(&K, &V) -> Option<T>) -> Vec<T> {
        let state = self.own.state();
        let alive = state.entries.iter().filter(|(_, entry)| self.own.is_alive(entry.at));
        alive.filter_map(|(key, entry)| select(key, &entry.value)).collect()
    }
}

impl<K: Hash + Eq + fmt::Debug, V: fmt::Debug> fmt::Debug for Layered<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.own.state();
        f.debug_map().entries(state.entries.iter().map(|(key, entry)| (key, &entry.value))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_cache_is_read_and_never_changed() {
        let cache = || Layered::<String, u8>::new(Bounds::entries(10));
        let below = cache();
        below.insert("a".into(), 1);
        let above = cache().over(&below);
        assert_eq!(above.get("a"), Some(1));
        above.update("a".into(), |value| value.unwrap_or_default() + 1);
        above.update("b".into(), |value| value.unwrap_or(7));
        above.insert("c".into(), 3);
        assert_eq!(["a", "b", "c"].map(|key| above.get(key)), [Some(2), Some(7), Some(3)]);
        assert_eq!(["a", "b", "c"].map(|key| below.get(key)), [Some(1), None, None]);
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let evicted = Arc::new(Mutex::new(Vec::new()));
        let note = {
            let evicted = Arc::clone(&evicted);
            move |value| evicted.lock().unwrap().push(value)
        };
        let bounds = Bounds { capacity: 6, weight: |_: &u8, value: &usize| *value, lifetime: None };
        let cache = Layered::with_listener(bounds, Some(Box::new(note)));
        for number in 1..=3_u8 {
            cache.insert(number, usize::from(number));
        }
        assert_eq!(cache.get(&1), Some(1));
        cache.update(4, |value| value.unwrap_or(2));
        assert_eq!(*evicted.lock().unwrap(), [2]);
        assert_eq!([1, 2, 3, 4].map(|key| cache.get(&key)), [Some(1), None, Some(3), Some(2)]);
        cache.insert(3, 4);
        assert_eq!([1, 3, 4].map(|key| cache.get(&key)), [None, Some(4), Some(2)], "the new weight counts");
        cache.insert(5, 7);
        assert_eq!(cache.filter_map(|key, _| Some(*key)), [0_u8; 0], "too large for the cache");
        assert_eq!(*evicted.lock().unwrap(), [2, 1, 4, 2, 7]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_ends_with_its_lifetime() {
        let lifetime = Some(Duration::from_secs(10));
        let cache = Layered::new(Bounds { lifetime, ..Bounds::entries(10) });
        cache.insert(1, 'a');
        tokio::time::advance(Duration::from_secs(6)).await;
        cache.insert(2, 'b');
        assert_eq!([1, 2].map(|key| cache.get(&key)), [Some('a'), Some('b')]);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!([1, 2].map(|key| cache.get(&key)), [None, Some('b')]);
        cache.update(1, |value| value.unwrap_or('c'));
        assert_eq!(cache.get(&1), Some('c'));
        cache.remove(&1);
        assert_eq!(cache.get(&1), None);
        cache.clear();
        assert_eq!(cache.get(&2), None);
    }
}
