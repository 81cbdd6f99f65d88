//! Who may not overtake a message that waits in a delay queue.
//!
//! A message that failed for now leaves the work queue and comes back later. Until then, a later one that
//! shares a key with it must not run: it leaves as well, and is charged nothing. Everybody else goes on.
//!
//! **Order.** Messages away are numbered as they first left; one that leaves again keeps its number. A message
//! yields to those with a smaller number only, for as long as the last of them takes ([`DelayedMessages::behind`]), and
//! leaves again if it is back too early. It does not go into the same queue behind them: a company that is
//! never quiet would then stay late by an hour for ever because of one message, each following the one before it.
//!
//! **What is lost.** The work queue gives in the order it took. When a message comes back, those that were due
//! well before it and are still away will not come: someone purged their queue, or they were settled in the
//! moment a session ended. They are forgotten; nobody waits for them for ever.
//!
//! Pure. The memory ends with the process, or when the configuration is read again: after that an older
//! message may come after a newer one, and is then kept from overwriting it by its time ([`crate::domain::staleness`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// Most messages that are remembered. One takes some 500 bytes; with more away, the oldest are forgotten and may be
/// overtaken.
const CAPACITY: usize = 20_000;
/// So much later has one to be due that shows another to be lost: queues have leaders of their own, which may be
/// away for a while.
const WELL_BEFORE: Duration = Duration::from_mins(1);

/// Messages in delay queues, by key.
#[derive(Debug)]
pub struct DelayedMessages<K> {
    messages: HashMap<Uuid, DelayedMessage<K>>,
    by_number: BTreeMap<u64, Uuid>,
    /// Of those whose turn has not come again, by number.
    by_key: HashMap<K, BTreeSet<(u64, Uuid)>>,
    /// When those that are away are due.
    due: BTreeSet<(Instant, Uuid)>,
    next: u64,
}

#[derive(Debug)]
struct DelayedMessage<K> {
    number: u64,
    keys: Vec<K>,
    due: Instant,
}

impl<K> Default for DelayedMessages<K> {
    fn default() -> Self {
        Self {
            messages: HashMap::new(),
            by_number: BTreeMap::new(),
            by_key: HashMap::new(),
            due: BTreeSet::new(),
            next: 0,
        }
    }
}

impl<K: Clone + Eq + Hash> DelayedMessages<K> {
    /// When a message may be back at the earliest, because earlier ones that share a key are away.
    pub fn behind(&self, message: Option<Uuid>, keys: &[K]) -> Option<Instant> {
        // One that was away and is forgotten left before all that are remembered.
        let known = |id| self.messages.get(&id).map_or(0, |detour| detour.number);
        let number = message.map_or(u64::MAX, known);
        let earlier = |key| {
            let mut earlier = self.by_key.get(key)?.range(..(number, Uuid::nil()));
            // The first may be away for an hour, those after it follow for a while.
            let (first, last) = (earlier.next()?, earlier.next_back());
            let due = |(_, id): &(u64, Uuid)| self.messages.get(id).map(|detour| detour.due);
            due(first).max(last.and_then(due))
        };
        keys.iter().filter_map(earlier).max()
    }

    /// A message has left for a delay queue, which gives it back at `due`.
    pub fn leave(&mut self, id: Uuid, keys: Vec<K>, due: Instant) {
        self.next += 1;
        let number = self.messages.get(&id).map_or(self.next, |detour| detour.number);
        self.forget(id);
        if self.messages.len() >= CAPACITY
            && let Some((_, oldest)) = self.by_number.pop_first()
        {
            self.forget(oldest);
        }
        for key in &keys {
            self.by_key.entry(key.clone()).or_default().insert((number, id));
        }
        self.due.insert((due, id));
        self.by_number.insert(number, id);
        self.messages.insert(id, DelayedMessage { number, keys, due });
    }

    /// A message has come back, and waits for its turn. Until then it is as good as away: one that waits
    /// before it still has to yield.
    pub fn come_back(&mut self, id: Uuid) {
        let Some(DelayedMessage { due, .. }) = self.messages.get(&id) else { return };
        let due = *due;
        self.due.remove(&(due, id));
        let lost = self.due.iter().take_while(|(before, _)| *before + WELL_BEFORE <= due);
        for id in lost.map(|(_, id)| *id).collect::<Vec<_>>() {
            self.forget(id);
        }
    }

    /// Its turn has come: nobody yields to it any more.
    pub fn begin(&mut self, id: Uuid) {
        let Some(detour) = self.messages.get(&id) else { return };
        for key in &detour.keys {
            if let Some(away) = self.by_key.get_mut(key) {
                away.remove(&(detour.number, id));
                if away.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
    }

    /// It is settled.
    pub fn forget(&mut self, id: Uuid) {
        self.begin(id);
        if let Some(detour) = self.messages.remove(&id) {
            self.due.remove(&(detour.due, id));
            self.by_number.remove(&detour.number);
        }
    }

    /// The session is over: what had come back and is not settled goes back to the work queue, in its order,
    /// and will come as if for the first time.
    pub fn start_over(&mut self) {
        for (id, detour) in &self.messages {
            self.due.insert((detour.due, *id));
            for key in &detour.keys {
                self.by_key.entry(key.clone()).or_default().insert((detour.number, *id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    #[test]
    fn later_messages_yield_and_earlier_ones_do_not() {
        let (mut detours, now) = (DelayedMessages::default(), Instant::now());
        let at = |minutes| Some(now + Duration::from_mins(minutes));
        let due = |minutes| now + Duration::from_mins(minutes);
        assert_eq!(detours.behind(None, &["jane"]), None);
        detours.leave(id(1), vec!["jane", "acme"], due(60));
        detours.leave(id(2), vec!["acme", "bob"], due(1));
        detours.leave(id(3), vec!["acme", "bob"], due(2));
        assert_eq!(detours.behind(None, &["jane"]), at(60));
        assert_eq!(detours.behind(None, &["bob"]), at(2), "behind those that are themselves behind another");
        assert_eq!(detours.behind(None, &["acme"]), at(60), "the first of them takes longest");
        assert_eq!(detours.behind(None, &["kim"]), None);
        assert_eq!(detours.behind(Some(id(2)), &["acme", "bob"]), at(60), "back too early");
        detours.come_back(id(2));
        detours.begin(id(2));
        assert_eq!(detours.behind(None, &["bob"]), at(2));
        detours.leave(id(2), vec!["acme", "bob"], due(59));
        assert_eq!(detours.behind(Some(id(3)), &["bob"]), at(59), "it has kept its number");

        detours.come_back(id(1));
        assert_eq!(detours.behind(Some(id(1)), &["jane", "acme"]), None);
        assert_eq!(detours.behind(None, &["jane"]), at(60), "its turn has not come yet");
        detours.begin(id(1));
        assert_eq!(detours.behind(None, &["jane"]), None, "lanes keep them in order from here on");
        detours.forget(id(1));
        for n in [2, 3] {
            detours.come_back(id(n));
            assert_eq!(detours.behind(Some(id(n)), &["acme"]), None);
            detours.begin(id(n));
            detours.forget(id(n));
        }
        assert!(detours.messages.is_empty() && detours.by_key.is_empty() && detours.due.is_empty());
    }

    #[test]
    fn nobody_waits_for_what_is_lost() {
        let (mut detours, now) = (DelayedMessages::default(), Instant::now());
        detours.leave(id(1), vec!["jane"], now);
        detours.leave(id(2), vec!["jane"], now + WELL_BEFORE / 2);
        detours.come_back(id(2));
        assert_eq!(detours.behind(Some(id(2)), &["jane"]), Some(now), "it may be just behind");
        // The queue of the first was purged.
        detours.begin(id(2));
        detours.leave(id(2), vec!["jane"], now + WELL_BEFORE);
        detours.come_back(id(2));
        assert_eq!(detours.behind(Some(id(2)), &["jane"]), None);

        // The session ends while it is worked on: it comes again, or was settled all the same.
        detours.begin(id(2));
        detours.start_over();
        assert_eq!(detours.behind(None, &["jane"]), Some(now + WELL_BEFORE));
        detours.leave(id(3), vec!["jane"], now + 2 * WELL_BEFORE);
        detours.come_back(id(3));
        assert_eq!(detours.behind(Some(id(3)), &["jane"]), None);
    }

    #[test]
    fn there_is_a_limit() {
        let (mut detours, now) = (DelayedMessages::default(), Instant::now());
        for n in 0..=CAPACITY {
            detours.leave(id(n as u128), vec![n], now);
        }
        assert_eq!((detours.messages.len(), detours.due.len()), (CAPACITY, CAPACITY));
        assert_eq!((detours.behind(None, &[0]), detours.behind(None, &[1])), (None, Some(now)));
        // The one that was forgotten is back: it was before all others, and does not go round for ever.
        assert_eq!(detours.behind(Some(id(0)), &[0, 1, 2]), None);
    }
}
