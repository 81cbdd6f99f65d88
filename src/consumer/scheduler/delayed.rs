//! Keeps later messages from overtaking one that waits in a delay queue.
//!
//! A message that failed leaves the work queue and returns later. Until then a later message that shares a key with it
//! must not run: it is deferred into a delay queue as well, without counting an attempt. All other messages go on.
//!
//! **Order.** A message gets a number when it first goes to a delay queue, and keeps it when it goes there again. It is
//! deferred only behind messages with smaller numbers, until the last of them is due
//! ([`DelayedMessages::blocked_until`]). If it returns too early, it is deferred again. It does not go into the queue of
//! the message it follows: after one delay of an hour, every later message of a busy company would take an hour.
//!
//! **Lost messages.** The work queue delivers in order. When a message returns, those that were due well before it and
//! have not returned are lost: an operator purged their queue, or they were settled just as a session ended. They are
//! removed, because otherwise later messages would wait for them forever.
//!
//! Pure. The state ends with the process, or when the configuration is reloaded. After that an older message may run
//! after a newer one. Its time then keeps it from overwriting the newer values ([`crate::domain::staleness`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// The maximum number of messages. One takes about 500 bytes. Beyond it the oldest are removed and may be overtaken.
const CAPACITY: usize = 20_000;
/// A message counts as lost once one that was due this much later has returned. The leader of a queue may be
/// unavailable for a while.
const WELL_BEFORE: Duration = Duration::from_mins(1);

/// Messages in delay queues, by key.
#[derive(Debug)]
pub struct DelayedMessages<K> {
    messages: HashMap<Uuid, DelayedMessage<K>>,
    by_number: BTreeMap<u64, Uuid>,
    /// Those that have not started again, by number.
    by_key: HashMap<K, BTreeSet<(u64, Uuid)>>,
    /// When those that have not returned are due.
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
    /// When a message may return at the earliest, because earlier ones that share a key are delayed.
    pub fn blocked_until(&self, message: Option<Uuid>, keys: &[K]) -> Option<Instant> {
        // A delayed message without a number was removed as the oldest: it comes before all others.
        let number = |id| self.messages.get(&id).map_or(0, |delayed| delayed.number);
        let number = message.map_or(u64::MAX, number);
        let earlier = |key| {
            let mut earlier = self.by_key.get(key)?.range(..(number, Uuid::nil()));
            // The first may be delayed for an hour, those after it follow for a while.
            let (first, last) = (earlier.next()?, earlier.next_back());
            let due = |(_, id): &(u64, Uuid)| self.messages.get(id).map(|delayed| delayed.due);
            due(first).max(last.and_then(due))
        };
        keys.iter().filter_map(earlier).max()
    }

    /// A message left for a delay queue, from which it returns at `due`.
    pub fn add(&mut self, id: Uuid, keys: Vec<K>, due: Instant) {
        self.next += 1;
        let number = self.messages.get(&id).map_or(self.next, |delayed| delayed.number);
        self.remove(id);
        if self.messages.len() >= CAPACITY
            && let Some((_, oldest)) = self.by_number.pop_first()
        {
            self.remove(oldest);
        }
        for key in &keys {
            self.by_key.entry(key.clone()).or_default().insert((number, id));
        }
        self.due.insert((due, id));
        self.by_number.insert(number, id);
        self.messages.insert(id, DelayedMessage { number, keys, due });
    }

    /// A message has returned and waits for its turn. Until it starts it counts as delayed: one that waits before it is
    /// still deferred.
    pub fn returned(&mut self, id: Uuid) {
        let Some(DelayedMessage { due, .. }) = self.messages.get(&id) else { return };
        let due = *due;
        self.due.remove(&(due, id));
        let lost = self.due.iter().take_while(|(before, _)| *before + WELL_BEFORE <= due);
        for id in lost.map(|(_, id)| *id).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    /// A message has started, so later messages need not be deferred behind it.
    pub fn started(&mut self, id: Uuid) {
        let Some(delayed) = self.messages.get(&id) else { return };
        for key in &delayed.keys {
            if let Some(numbers) = self.by_key.get_mut(key) {
                numbers.remove(&(delayed.number, id));
                if numbers.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
    }

    /// A message is settled.
    pub fn remove(&mut self, id: Uuid) {
        self.started(id);
        if let Some(delayed) = self.messages.remove(&id) {
            self.due.remove(&(delayed.due, id));
            self.by_number.remove(&delayed.number);
        }
    }

    /// A new session has started: what had returned and was not settled went back to the work queue in its order, and
    /// will be delivered as if for the first time.
    pub fn session_started(&mut self) {
        for (id, delayed) in &self.messages {
            self.due.insert((delayed.due, *id));
            for key in &delayed.keys {
                self.by_key.entry(key.clone()).or_default().insert((delayed.number, *id));
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
    fn later_messages_are_deferred_and_earlier_ones_are_not() {
        let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
        let at = |minutes| Some(now + Duration::from_mins(minutes));
        let due = |minutes| now + Duration::from_mins(minutes);
        assert_eq!(delayed.blocked_until(None, &["jane"]), None);
        delayed.add(id(1), vec!["jane", "acme"], due(60));
        delayed.add(id(2), vec!["acme", "bob"], due(1));
        delayed.add(id(3), vec!["acme", "bob"], due(2));
        assert_eq!(delayed.blocked_until(None, &["jane"]), at(60));
        assert_eq!(
            delayed.blocked_until(None, &["bob"]),
            at(2),
            "behind those that are themselves behind another"
        );
        assert_eq!(delayed.blocked_until(None, &["acme"]), at(60), "the first of them takes longest");
        assert_eq!(delayed.blocked_until(None, &["kim"]), None);
        assert_eq!(delayed.blocked_until(Some(id(2)), &["acme", "bob"]), at(60), "returned too early");
        delayed.returned(id(2));
        delayed.started(id(2));
        assert_eq!(delayed.blocked_until(None, &["bob"]), at(2));
        delayed.add(id(2), vec!["acme", "bob"], due(59));
        assert_eq!(delayed.blocked_until(Some(id(3)), &["bob"]), at(59), "it has kept its number");

        delayed.returned(id(1));
        assert_eq!(delayed.blocked_until(Some(id(1)), &["jane", "acme"]), None);
        assert_eq!(delayed.blocked_until(None, &["jane"]), at(60), "it has not started yet");
        delayed.started(id(1));
        assert_eq!(
            delayed.blocked_until(None, &["jane"]),
            None,
            "the key queues keep the order from here on"
        );
        delayed.remove(id(1));
        for n in [2, 3] {
            delayed.returned(id(n));
            assert_eq!(delayed.blocked_until(Some(id(n)), &["acme"]), None);
            delayed.started(id(n));
            delayed.remove(id(n));
        }
        assert!(delayed.messages.is_empty() && delayed.by_key.is_empty() && delayed.due.is_empty());
    }

    #[test]
    fn none_waits_for_a_lost_message() {
        let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
        delayed.add(id(1), vec!["jane"], now);
        delayed.add(id(2), vec!["jane"], now + WELL_BEFORE / 2);
        delayed.returned(id(2));
        assert_eq!(delayed.blocked_until(Some(id(2)), &["jane"]), Some(now), "it may be just behind");
        // The queue of the first was purged.
        delayed.started(id(2));
        delayed.add(id(2), vec!["jane"], now + WELL_BEFORE);
        delayed.returned(id(2));
        assert_eq!(delayed.blocked_until(Some(id(2)), &["jane"]), None);

        // The session ends while it runs: it is delivered again, or was settled all the same.
        delayed.started(id(2));
        delayed.session_started();
        assert_eq!(delayed.blocked_until(None, &["jane"]), Some(now + WELL_BEFORE));
        delayed.add(id(3), vec!["jane"], now + 2 * WELL_BEFORE);
        delayed.returned(id(3));
        assert_eq!(delayed.blocked_until(Some(id(3)), &["jane"]), None);
    }

    #[test]
    fn the_oldest_are_removed_at_the_limit() {
        let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
        for n in 0..=CAPACITY {
            delayed.add(id(n as u128), vec![n], now);
        }
        assert_eq!((delayed.messages.len(), delayed.due.len()), (CAPACITY, CAPACITY));
        assert_eq!((delayed.blocked_until(None, &[0]), delayed.blocked_until(None, &[1])), (None, Some(now)));
        // The one that was removed returns. It was before all others, and is not deferred for ever.
        assert_eq!(delayed.blocked_until(Some(id(0)), &[0, 1, 2]), None);
    }
}
