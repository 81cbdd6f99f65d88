//! First in, first out per key, with several keys at once: an entry starts only when no earlier unfinished entry shares
//! a key with it.
//!
//! Two messages about one person or one company never run at the same time, whichever of their keys they share.
//! Everything else runs in parallel (`design.md` P2, P3). Pure: the caller pushes entries in the order of the queue,
//! asks which may start, and reports which finished. Of those that may start, live messages go before retries and
//! replays, as they are worth most while they are fresh.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::Hash;

/// The place of an entry in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// Entries that wait or run, by key.
#[derive(Debug)]
pub struct KeyQueues<K, R, T> {
    next: u64,
    /// For each key the unfinished entries that have it, in order.
    queues: HashMap<K, VecDeque<JobId>>,
    /// Keys and ranks of the unfinished entries.
    places: HashMap<JobId, (Vec<K>, R)>,
    waiting: BTreeMap<JobId, T>,
    /// Waiting entries that are first in all their queues, by rank and then by age.
    ready: BTreeSet<(R, JobId)>,
}

impl<K, R, T> Default for KeyQueues<K, R, T> {
    fn default() -> Self {
        Self {
            next: 0,
            queues: HashMap::new(),
            places: HashMap::new(),
            waiting: BTreeMap::new(),
            ready: BTreeSet::new(),
        }
    }
}

impl<K: Clone + Eq + Hash, R: Copy + Ord, T> KeyQueues<K, R, T> {
    /// Adds an entry behind all others. Of those that may start, the smallest rank goes first.
    pub fn push(&mut self, keys: Vec<K>, rank: R, entry: T) {
        let job = JobId(self.next);
        self.next += 1;
        for key in &keys {
            let queue = self.queues.entry(key.clone()).or_default();
            if queue.back() != Some(&job) {
                queue.push_back(job);
            }
        }
        self.places.insert(job, (keys, rank));
        self.waiting.insert(job, entry);
        self.note_if_ready(job);
    }

    /// Starts the oldest entry of the smallest rank that may run.
    pub fn start(&mut self) -> Option<(JobId, T)> {
        let (_, job) = self.ready.pop_first()?;
        Some((job, self.waiting.remove(&job)?))
    }

    /// Starts one of the entries that may run, chosen by the number `drawn`.
    pub fn start_drawn(&mut self, drawn: usize) -> Option<(JobId, T)> {
        let place = *self.ready.iter().nth(drawn % self.ready.len().max(1))?;
        self.ready.remove(&place);
        Some((place.1, self.waiting.remove(&place.1)?))
    }

    /// Starts an entry to run together with those of `run`: one that directly follows them in all its queues and for
    /// which `joins` is true.
    pub fn start_behind(&mut self, run: &[JobId], joins: impl Fn(&[K], &T) -> bool) -> Option<(JobId, T)> {
        let next = |key| self.queues.get(key)?.iter().find(|job| !run.contains(job)).copied();
        let job = self.keys(*run.first()?).iter().filter_map(next).find(|job| {
            let keys = self.keys(*job);
            let is_next = keys.iter().all(|key| next(key) == Some(*job));
            is_next && self.waiting.get(job).is_some_and(|entry| joins(keys, entry))
        })?;
        Some((job, self.waiting.remove(&job)?))
    }

    /// An entry that was started waits again, in its old place.
    pub fn put_back(&mut self, job: JobId, entry: T) {
        self.waiting.insert(job, entry);
        self.note_if_ready(job);
    }

    /// The keys of an entry that is not finished.
    pub fn keys(&self, job: JobId) -> &[K] {
        self.places.get(&job).map_or(&[], |(keys, _)| keys)
    }

    /// An entry is done: those behind it may start.
    pub fn finish(&mut self, job: JobId) {
        for key in self.places.remove(&job).map(|(keys, _)| keys).unwrap_or_default() {
            let Some(queue) = self.queues.get_mut(&key) else { continue };
            queue.retain(|other| *other != job);
            match queue.front().copied() {
                Some(first) => self.note_if_ready(first),
                None => {
                    self.queues.remove(&key);
                }
            }
        }
    }

    /// How many entries have not been started.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn note_if_ready(&mut self, job: JobId) {
        let first = |key| self.queues.get(key).and_then(VecDeque::front) == Some(&job);
        if let Some((keys, rank)) = self.places.get(&job)
            && self.waiting.contains_key(&job)
            && keys.iter().all(first)
        {
            self.ready.insert((*rank, job));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_waits_for_every_earlier_one_it_shares_a_key_with() {
        let mut queues = KeyQueues::default();
        queues.push(vec!["company a", "user 1"], 0, 1);
        queues.push(vec!["user 1", "email x"], 0, 2);
        queues.push(vec!["email x"], 0, 3);
        queues.push(vec!["company b"], 0, 4);
        let first = queues.start().unwrap();
        assert_eq!((first.1, queues.start().unwrap().1), (1, 4));
        assert!(queues.start().is_none());
        queues.finish(first.0);
        let second = queues.start().unwrap();
        assert_eq!((second.1, queues.start(), queues.waiting()), (2, None, 1));
        queues.finish(second.0);
        assert_eq!(queues.start().unwrap().1, 3);
    }

    #[test]
    fn the_smallest_rank_starts_first() {
        let mut queues = KeyQueues::default();
        queues.push(vec!["a"], 2, "replay");
        queues.push(vec!["b"], 1, "retry");
        queues.push(vec!["c"], 0, "live");
        queues.push(vec!["a"], 0, "live, behind the replay");
        let order: Vec<_> = std::iter::from_fn(|| queues.start()).map(|(_, name)| name).collect();
        assert_eq!(order, ["live", "retry", "replay"]);

        let mut queues = KeyQueues::default();
        (0..5).for_each(|n| queues.push(vec![n], 0, n));
        let drawn: Vec<_> = [3, 7, 0, 5, 9, 1].into_iter().map_while(|n| queues.start_drawn(n)).collect();
        assert_eq!(drawn.into_iter().map(|(_, n)| n).collect::<Vec<_>>(), [3, 4, 0, 2, 1]);
    }

    #[test]
    fn an_entry_that_is_next_in_all_its_queues_may_join() {
        let mut queues = KeyQueues::default();
        for (name, keys) in [
            ("jane", vec!["acme", "jane"]),
            ("jane again", vec!["acme", "jane"]),
            ("bob", vec!["acme", "bob"]),
            ("jane, behind bob", vec!["acme", "jane"]),
        ] {
            queues.push(keys, 0, name);
        }
        let first = queues.start().unwrap();
        let jane = |_: &[&str], name: &&str| name.starts_with("jane");
        assert_eq!(queues.start_behind(&[first.0], |_, _| false), None);
        let second = queues.start_behind(&[first.0], jane).unwrap();
        assert_eq!(second.1, "jane again");
        let run = [first.0, second.0];
        assert_eq!(queues.start_behind(&run, jane), None, "bob is in between");

        // The merged run failed: they run one after the other, in their old order.
        queues.put_back(second.0, "jane again");
        queues.put_back(first.0, "jane");
        let mut order = Vec::new();
        while let Some((job, name)) = queues.start() {
            assert_eq!(queues.start(), None);
            order.push(name);
            queues.finish(job);
        }
        assert_eq!(order, ["jane", "jane again", "bob", "jane, behind bob"]);
    }

    proptest! {
        #[test]
        fn keys_never_overlap_order_per_key_holds_and_every_entry_runs(
            entries in proptest::collection::vec(proptest::collection::vec(0u8..6, 0..4), 1..40),
            picks in proptest::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut queues = KeyQueues::default();
            for (n, keys) in entries.iter().enumerate() {
                // Ranks change who goes first, and no order within a key.
                queues.push(keys.clone(), n % 3, n);
            }
            let (mut running, mut order) = (Vec::new(), Vec::new());
            for pick in picks {
                while let Some((job, n)) = queues.start() {
                    for (_, other) in &running {
                        let other: &Vec<u8> = &entries[*other];
                        prop_assert!(!entries[n].iter().any(|key| other.contains(key)));
                    }
                    running.push((job, n));
                    order.push(n);
                }
                if running.is_empty() {
                    break;
                }
                queues.finish(running.swap_remove(pick.index(running.len())).0);
            }
            prop_assert_eq!(order.len(), entries.len());
            for key in 0..6 {
                let mine: Vec<_> = order.iter().filter(|n| entries[**n].contains(&key)).collect();
                prop_assert!(mine.is_sorted());
            }
            prop_assert!(queues.queues.is_empty() && queues.places.is_empty());
        }
    }
}
