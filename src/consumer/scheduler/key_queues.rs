//! Who may run now: an entry starts only when no earlier unfinished entry shares a key with it.
//!
//! Two messages about one person or one company never run at the same time, whichever of their keys
//! they share; everything else runs in parallel (`design.md` P2, P3). Pure: the caller pushes entries
//! in the order of the queue, asks for what may start, and tells what finished. Of those that may start,
//! live messages go before retries and replays: they are worth more while they are fresh.

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
    /// Adds an entry behind all others. Of those that may run, the smallest rank goes first.
    pub fn push(&mut self, keys: Vec<K>, rank: R, entry: T) {
        let ticket = JobId(self.next);
        self.next += 1;
        for key in &keys {
            let queue = self.queues.entry(key.clone()).or_default();
            if queue.back() != Some(&ticket) {
                queue.push_back(ticket);
            }
        }
        self.places.insert(ticket, (keys, rank));
        self.waiting.insert(ticket, entry);
        self.note_if_ready(ticket);
    }

    /// Takes the first entry that may run: of the smallest rank the oldest.
    pub fn start(&mut self) -> Option<(JobId, T)> {
        let (_, ticket) = self.ready.pop_first()?;
        Some((ticket, self.waiting.remove(&ticket)?))
    }

    /// Takes any entry that may run, by a number that was drawn.
    pub fn start_any(&mut self, drawn: usize) -> Option<(JobId, T)> {
        let place = *self.ready.iter().nth(drawn % self.ready.len().max(1))?;
        self.ready.remove(&place);
        Some((place.1, self.waiting.remove(&place.1)?))
    }

    /// Takes the entry that comes next in all its queues behind those of `run`, which were started together,
    /// if `joins` agrees: it may run with them.
    pub fn start_behind(&mut self, run: &[JobId], joins: impl Fn(&[K], &T) -> bool) -> Option<(JobId, T)> {
        let next = |key| self.queues.get(key)?.iter().find(|ticket| !run.contains(ticket)).copied();
        let ticket = self.keys(*run.first()?).iter().filter_map(next).find(|ticket| {
            let keys = self.keys(*ticket);
            let is_next = keys.iter().all(|key| next(key) == Some(*ticket));
            is_next && self.waiting.get(ticket).is_some_and(|entry| joins(keys, entry))
        })?;
        Some((ticket, self.waiting.remove(&ticket)?))
    }

    /// An entry that was started has to wait again, at the place it had.
    pub fn put_back(&mut self, ticket: JobId, entry: T) {
        self.waiting.insert(ticket, entry);
        self.note_if_ready(ticket);
    }

    /// The keys of an entry that is not finished.
    pub fn keys(&self, ticket: JobId) -> &[K] {
        self.places.get(&ticket).map_or(&[], |(keys, _)| keys)
    }

    /// An entry that was started is done: those behind it may start.
    pub fn finish(&mut self, ticket: JobId) {
        for key in self.places.remove(&ticket).map(|(keys, _)| keys).unwrap_or_default() {
            let Some(queue) = self.queues.get_mut(&key) else { continue };
            queue.retain(|other| *other != ticket);
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

    fn note_if_ready(&mut self, ticket: JobId) {
        let first = |key| self.queues.get(key).and_then(VecDeque::front) == Some(&ticket);
        if let Some((keys, rank)) = self.places.get(&ticket)
            && self.waiting.contains_key(&ticket)
            && keys.iter().all(first)
        {
            self.ready.insert((*rank, ticket));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_waits_for_every_earlier_one_it_shares_a_key_with() {
        let mut lanes = KeyQueues::default();
        lanes.push(vec!["company a", "user 1"], 0, 1);
        lanes.push(vec!["user 1", "email x"], 0, 2);
        lanes.push(vec!["email x"], 0, 3);
        lanes.push(vec!["company b"], 0, 4);
        let first = lanes.start().unwrap();
        assert_eq!((first.1, lanes.start().unwrap().1), (1, 4));
        assert!(lanes.start().is_none());
        lanes.finish(first.0);
        let second = lanes.start().unwrap();
        assert_eq!((second.1, lanes.start(), lanes.waiting()), (2, None, 1));
        lanes.finish(second.0);
        assert_eq!(lanes.start().unwrap().1, 3);
    }

    #[test]
    fn of_those_that_may_run_the_smallest_rank_goes_first() {
        let mut lanes = KeyQueues::default();
        lanes.push(vec!["a"], 2, "replay");
        lanes.push(vec!["b"], 1, "retry");
        lanes.push(vec!["c"], 0, "live");
        lanes.push(vec!["a"], 0, "live, behind the replay");
        let order: Vec<_> = std::iter::from_fn(|| lanes.start()).map(|(_, name)| name).collect();
        assert_eq!(order, ["live", "retry", "replay"]);

        let mut lanes = KeyQueues::default();
        (0..5).for_each(|n| lanes.push(vec![n], 0, n));
        let drawn: Vec<_> = [3, 7, 0, 5, 9, 1].into_iter().map_while(|n| lanes.start_any(n)).collect();
        assert_eq!(drawn.into_iter().map(|(_, n)| n).collect::<Vec<_>>(), [3, 4, 0, 2, 1]);
    }

    #[test]
    fn who_comes_next_in_all_queues_may_run_along() {
        let mut lanes = KeyQueues::default();
        for (name, keys) in [
            ("jane", vec!["acme", "jane"]),
            ("jane again", vec!["acme", "jane"]),
            ("bob", vec!["acme", "bob"]),
            ("jane, behind bob", vec!["acme", "jane"]),
        ] {
            lanes.push(keys, 0, name);
        }
        let first = lanes.start().unwrap();
        let jane = |_: &[&str], name: &&str| name.starts_with("jane");
        assert_eq!(lanes.start_behind(&[first.0], |_, _| false), None);
        let second = lanes.start_behind(&[first.0], jane).unwrap();
        assert_eq!(second.1, "jane again");
        let run = [first.0, second.0];
        assert_eq!(lanes.start_behind(&run, jane), None, "bob is in between");

        // It did not work: one after the other, in the order they had.
        lanes.put_back(second.0, "jane again");
        lanes.put_back(first.0, "jane");
        let mut order = Vec::new();
        while let Some((ticket, name)) = lanes.start() {
            assert_eq!(lanes.start(), None);
            order.push(name);
            lanes.finish(ticket);
        }
        assert_eq!(order, ["jane", "jane again", "bob", "jane, behind bob"]);
    }

    proptest! {
        #[test]
        fn keys_never_overlap_order_per_key_holds_and_all_get_their_turn(
            entries in proptest::collection::vec(proptest::collection::vec(0u8..6, 0..4), 1..40),
            picks in proptest::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut lanes = KeyQueues::default();
            for (n, keys) in entries.iter().enumerate() {
                // Ranks change who goes first, and no order within a key.
                lanes.push(keys.clone(), n % 3, n);
            }
            let (mut running, mut order) = (Vec::new(), Vec::new());
            for pick in picks {
                while let Some((ticket, n)) = lanes.start() {
                    for (_, other) in &running {
                        let other: &Vec<u8> = &entries[*other];
                        prop_assert!(!entries[n].iter().any(|key| other.contains(key)));
                    }
                    running.push((ticket, n));
                    order.push(n);
                }
                if running.is_empty() {
                    break;
                }
                lanes.finish(running.swap_remove(pick.index(running.len())).0);
            }
            prop_assert_eq!(order.len(), entries.len());
            for key in 0..6 {
                let mine: Vec<_> = order.iter().filter(|n| entries[**n].contains(&key)).collect();
                prop_assert!(mine.is_sorted());
            }
            prop_assert!(lanes.queues.is_empty() && lanes.places.is_empty());
        }
    }
}
