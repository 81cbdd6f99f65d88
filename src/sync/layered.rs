//! A bounded cache that may lie over another one. What the upper one lacks is read from the lower one, which it never
//! changes: a rehearsal knows what the worker knows, and leaves no trace.

use std::borrow::Borrow;
use std::hash::Hash;

use moka::ops::compute::Op;
use moka::sync::Cache;

/// Clones share the entries.
#[derive(Clone, Debug)]
pub(crate) struct Layered<K: Hash + Eq + Send + Sync + 'static, V: Clone + Send + Sync + 'static> {
    own: Cache<K, V>,
    below: Option<Cache<K, V>>,
}

impl<K: Hash + Eq + Send + Sync + 'static, V: Clone + Send + Sync + 'static> Layered<K, V> {
    pub(crate) fn new(own: Cache<K, V>) -> Self {
        Self { own, below: None }
    }

    /// Lays an empty cache over this one.
    pub(crate) fn covered_by(&self, own: Cache<K, V>) -> Self {
        Self { own, below: Some(self.own.clone()) }
    }

    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.own.get(key).or_else(|| self.below.as_ref()?.get(key))
    }

    pub(crate) fn insert(&self, key: K, value: V) {
        self.own.insert(key, value);
    }

    /// Replaces a value, as one step. `None` leaves it as it is.
    pub(crate) fn update<Q>(&self, key: &Q, with: impl FnOnce(Option<V>) -> Option<V>)
    where
        K: Borrow<Q>,
        Q: ToOwned<Owned = K> + Hash + Eq + ?Sized,
    {
        self.own.entry_by_ref(key).and_compute_with(|entry| {
            let below = || self.below.as_ref()?.get(key);
            with(entry.map(moka::Entry::into_value).or_else(below)).map_or(Op::Nop, Op::Put)
        });
    }

    /// The entries of the upper cache.
    pub(crate) fn own(&self) -> &Cache<K, V> {
        &self.own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_cache_is_read_and_never_changed() {
        let cache = || Cache::new(10);
        let below: Layered<String, u8> = Layered::new(cache());
        below.insert("a".into(), 1);
        let above = below.covered_by(cache());
        assert_eq!(above.get("a"), Some(1));
        above.update("a", |value| value.map(|value| value + 1));
        above.update("b", |value| value);
        above.insert("c".into(), 3);
        assert_eq!(["a", "b", "c"].map(|key| above.get(key)), [Some(2), None, Some(3)]);
        assert_eq!(["a", "b", "c"].map(|key| below.get(key)), [Some(1), None, None]);
    }
}
