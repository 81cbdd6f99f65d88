//! Who may not overtake a message that waits in a delay queue.
//!
//! A message that failed for now leaves the work queue and comes back later. Until then, a later one that
//! shares a key with it must not run: it goes the same way, behind it, and is charged nothing. Everybody
//! else goes on. A message away holds up one person and one company, for as long as the delays last at
//! most: then it is synced or dead-lettered, and those behind it follow.
//!
//! **Order.** Messages away are numbered as they first left; one that leaves again keeps its number. A message
//! yields to those with a smaller number only, and joins the queue of the last of them. So whoever follows is
//! behind all it has to be behind, though it may come back before the others and have to leave again.
//!
//! **What is lost.** A delay queue gives back in the order it took. When a message comes back, those that left
//! for the same queue well before it and are still away will not come: someone purged the queue, or they were
//! settled in the moment a session ended. They are forgotten; nobody waits for them for ever. *Well* before, as
//! messages that leave at the same time are not known to leave in the order in which the queue takes them.
//!
//! Pure. The memory ends with the process, or when the configuration is read again: after that an older message may come after a newer one, and is
//! then kept from overwriting it by its time ([`crate::domain::age`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// Most messages that are remembered. One takes some 500 bytes; with more away, the oldest may be overtaken.
const CAPACITY: usize = 20_000;
/// So much later has one to have left that shows another to be lost. The broker confirms within moments.
const WELL_BEFORE: Duration = Duration::from_secs(10);

/// Messages in delay queues, by key. A queue is known by its level, the place among the configured delays.
#[derive(Debug)]
pub struct Detours<K> {
    messages: HashMap<Uuid, Detour<K>>,
    /// Of those that are away, by number.
    by_key: HashMap<K, BTreeSet<(u64, Uuid)>>,
    /// What each queue holds, in the order it took it.
    queues: HashMap<usize, BTreeMap<u64, (Uuid, Instant)>>,
    next: u64,
}

#[derive(Debug)]
struct Detour<K> {
    number: u64,
    keys: Vec<K>,
    level: usize,
    /// Its place in the queue.
    place: u64,
    left: Instant,
}

impl<K> Default for Detours<K> {
    fn default() -> Self {
        Self { messages: HashMap::new(), by_key: HashMap::new(), queues: HashMap::new(), next: 0 }
    }
}

impl<K: Clone + Eq + Hash> Detours<K> {
    /// The delay queue a message has to wait in, because an earlier one that shares a key is away.
    pub fn behind(&self, message: Option<Uuid>, keys: &[K]) -> Option<usize> {
        let number = message.and_then(|id| self.messages.get(&id)).map_or(u64::MAX, |detour| detour.number);
        let last = |key| self.by_key.get(key)?.range(..(number, Uuid::nil())).next_back();
        let (_, id) = keys.iter().filter_map(last).max()?;
        self.messages.get(id).map(|detour| detour.level)
    }

    /// A message has left for a delay queue, now.
    pub fn leave(&mut self, id: Uuid, keys: Vec<K>, level: usize, now: Instant) {
        self.next += 1;
        let place = self.next;
        let number = self.messages.get(&id).map_or(place, |detour| detour.number);
        self.forget(id);
        if self.messages.len() >= CAPACITY
            && let Some(oldest) = self.messages.iter().min_by_key(|(_, detour)| detour.number)
        {
            let oldest = *oldest.0;
            self.forget(oldest);
        }
        for key in &keys {
            self.by_key.entry(key.clone()).or_default().insert((number, id));
        }
        self.queues.entry(level).or_default().insert(place, (id, now));
        self.messages.insert(id, Detour { number, keys, level, place, left: now });
    }

    /// A message has come back, and waits for its turn. Until then it is as good as away: one that waits
    /// before it still has to yield.
    pub fn come_back(&mut self, id: Uuid) {
        let Some(Detour { level, place, left, .. }) = self.messages.get(&id) else { return };
        let Some(queue) = self.queues.get_mut(level) else { return };
        queue.remove(place);
        let lost = queue.values().take_while(|(_, before)| *before + WELL_BEFORE <= *left);
        for id in lost.map(|(id, _)| *id).collect::<Vec<_>>() {
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
        if let Some(detour) = self.messages.remove(&id)
            && let Some(queue) = self.queues.get_mut(&detour.level)
        {
            queue.remove(&detour.place);
        }
    }

    /// The session is over: what had come back and is not settled goes back to the work queue, in its order,
    /// and will come as if for the first time.
    pub fn start_over(&mut self) {
        for (id, detour) in &self.messages {
            self.queues.entry(detour.level).or_default().insert(detour.place, (*id, detour.left));
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
        let (mut detours, now) = (Detours::default(), Instant::now());
        assert_eq!(detours.behind(None, &["jane"]), None);
        detours.leave(id(1), vec!["jane", "acme"], 0, now);
        detours.leave(id(2), vec!["acme", "bob"], 0, now);
        assert_eq!(detours.behind(None, &["jane"]), Some(0));
        assert_eq!(detours.behind(None, &["bob"]), Some(0), "behind one that is itself behind another");
        assert_eq!(detours.behind(None, &["kim"]), None);

        // The first is back, fails again, and leaves for longer; the second still has to be behind it.
        detours.come_back(id(1));
        assert_eq!(detours.behind(Some(id(1)), &["jane", "acme"]), None);
        assert_eq!(detours.behind(None, &["jane"]), Some(0), "its turn has not come yet");
        detours.begin(id(1));
        assert_eq!(detours.behind(None, &["jane"]), None, "lanes keep them in order from here on");
        detours.leave(id(1), vec!["jane", "acme"], 1, now);
        assert_eq!(detours.behind(Some(id(2)), &["acme", "bob"]), Some(1));
        assert_eq!(detours.behind(None, &["acme"]), Some(0), "behind the second, wherever the first is");
        detours.come_back(id(2));
        detours.begin(id(2));
        detours.leave(id(2), vec!["acme", "bob"], 1, now);
        assert_eq!(detours.behind(None, &["bob"]), Some(1));
        for n in [1, 2] {
            detours.come_back(id(n));
            assert_eq!(detours.behind(Some(id(n)), &["acme"]), None);
            detours.begin(id(n));
            detours.forget(id(n));
        }
        assert!(detours.messages.is_empty() && detours.by_key.is_empty());
    }

    #[test]
    fn nobody_waits_for_what_is_lost() {
        let (mut detours, now) = (Detours::default(), Instant::now());
        detours.leave(id(1), vec!["jane"], 0, now);
        detours.leave(id(2), vec!["jane"], 0, now + WELL_BEFORE / 2);
        detours.leave(id(3), vec!["jane"], 1, now);
        detours.come_back(id(2));
        assert_eq!(detours.behind(Some(id(2)), &["jane"]), Some(0), "they may have left in another order");
        // The queue was purged after the first.
        detours.begin(id(2));
        detours.leave(id(2), vec!["jane"], 0, now + WELL_BEFORE);
        detours.come_back(id(2));
        assert_eq!(detours.behind(Some(id(2)), &["jane"]), None);
        detours.begin(id(2));
        detours.forget(id(2));
        assert_eq!(detours.behind(None, &["jane"]), Some(1), "another queue is another matter");

        // The session ends while it is worked on: it comes again, or was settled all the same.
        detours.come_back(id(3));
        detours.begin(id(3));
        detours.start_over();
        assert_eq!(detours.behind(None, &["jane"]), Some(1));
        detours.leave(id(4), vec!["jane"], 1, now + WELL_BEFORE);
        detours.come_back(id(4));
        assert_eq!(detours.behind(Some(id(4)), &["jane"]), None);
    }

    #[test]
    fn there_is_a_limit() {
        let (mut detours, now) = (Detours::default(), Instant::now());
        for n in 0..=CAPACITY {
            detours.leave(id(n as u128), vec![n], 0, now);
        }
        assert_eq!((detours.messages.len(), detours.queues[&0].len()), (CAPACITY, CAPACITY));
        assert_eq!((detours.behind(None, &[0]), detours.behind(None, &[1])), (None, Some(0)));
    }
}
