//! What a worker learns from the journal entries of its predecessors, and what it records for its successor.

use std::time::Duration;

use jiff::Timestamp;

use crate::domain::journal::Entry;
use crate::sync::context::Context;
use crate::sync::id_cache::Change;
use crate::sync::lag_guard::{LONGEST_SEARCH_LAG, Pending};
use crate::sync::recent_records::REMEMBERED;

impl Context {
    /// Learns what another worker has written down. A message that sees from the write log that nothing is new must know it
    /// all, so that comes last.
    pub(crate) fn learn(&self, entry: Entry) {
        match entry {
            Entry::Creating { operation, keys, lead, at } => {
                self.lag_guard.begin(operation, keys, lead, self.past(at));
            }
            Entry::Settled { operation } => self.lag_guard.settle(operation),
            Entry::Keys { record, keys, change: kind, at } => {
                let at = self.past(at);
                if self.age(at) < REMEMBERED {
                    self.recent.written_elsewhere(record.as_str(), None);
                }
                if self.age(at) < LONGEST_SEARCH_LAG {
                    self.id_cache.changed(&keys, &record, Change { kind, at });
                }
                self.write_log.written_elsewhere(record.as_str());
            }
            Entry::Written { record, at, fields, stored, updated } => {
                if updated.is_some_and(|updated| self.age(updated) < REMEMBERED) {
                    self.recent.written_elsewhere(record.as_str(), updated);
                }
                self.version_cache.learn(&record, self.past(at), &fields, stored);
                self.write_log.written_elsewhere(record.as_str());
            }
            Entry::Forgotten { change, at, until } => {
                let rest = Duration::try_from(until.duration_since(self.now())).unwrap_or_default();
                self.lag_guard.forget(change, self.past(at), rest.min(LONGEST_SEARCH_LAG));
            }
            Entry::Start { .. } | Entry::CheckpointBegin { .. } | Entry::CheckpointEnd { .. } => {}
        }
    }

    /// A time by the clock of another worker, which may be ahead.
    fn past(&self, at: Timestamp) -> Timestamp {
        at.min(self.now())
    }

    /// How long ago that was. Zero if it is in the future.
    fn age(&self, at: Timestamp) -> Duration {
        Duration::try_from(self.now().duration_since(at)).unwrap_or_default()
    }

    /// Changes for which there was no room are forgotten.
    pub(crate) fn forget_evicted(&self) {
        for Change { kind, at } in self.id_cache.evicted() {
            self.lag_guard.forget_up_to(kind, at);
        }
    }

    /// All that is remembered, as entries for the next worker.
    pub(crate) fn checkpoint(&self) -> impl Iterator<Item = Entry> {
        let pending = self.lag_guard.pending().into_iter();
        let creating = pending.map(|(operation, Pending { keys, creates_lead, sent, .. })| Entry::Creating {
            operation,
            keys,
            lead: creates_lead,
            at: sent,
        });
        let is_shown =
            |change: &Change| self.lag_guard.shows_up_to(change.kind).is_some_and(|shown| change.at <= shown);
        // The oldest first: where a successor has no room for all, it forgets those that search shows first.
        let unseen = self.id_cache.unseen().filter(|(change, ..)| !is_shown(change)).collect::<Vec<_>>();
        let keys = unseen.into_iter().map(|(Change { kind, at }, record, keys)| Entry::Keys {
            record,
            keys,
            change: kind,
            at,
        });
        // After the above, so that what is evicted meanwhile is in one of both.
        self.forget_evicted();
        let forgotten = self.lag_guard.forgotten().into_iter();
        let now = self.now();
        let forgotten = forgotten.map(move |(change, at, rest)| Entry::Forgotten {
            change,
            at,
            until: now.saturating_add(rest).unwrap_or(Timestamp::MAX),
        });
        forgotten.chain(creating).chain(keys).chain(self.version_cache.written())
    }
}
