//! The journal as messages use it: what they write down before and after they change Close, and what the worker learns
//! from the entries of its predecessors (`design.md` §9).
//!
//! - A creation is written down before it is sent, and what came of it after Close has answered. A creation without the
//!   second entry is pending for every later worker ([`crate::sync::lag_guard`]).
//! - Keys that an existing record gets are written down before they are sent. Reading the record shows whether it got them.
//! - The times of the events that set fields are written down after the write, and before the message is acked.
//!
//! **Two workers at once.** A worker that lost the queue may not know it yet. Both read the journal while they append to
//! it, so they see the same order of entries: a creation waits until its own entry has come back ([`Journal::read_back`]),
//! and is given up when an earlier one has the same keys.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::domain::journal::{Entry, KeyHash, RecordId};
use crate::sync::id_cache::Change;

/// Appends entries. When the broker does not take them, the session ends, and callers that wait are dropped with it.
pub trait Journal: Send + Sync {
    /// Appends entries in the background, after all that were appended before.
    fn append(&self, entries: Vec<Entry>);

    /// Returns once the broker has stored all entries that were appended so far.
    fn stored(&self) -> BoxFuture<'_, ()>;

    /// Returns once this worker has read all entries that were appended so far, and those of others before them.
    fn read_back(&self) -> BoxFuture<'_, ()>;
}

/// The journal of a session, if there is one.
#[derive(Clone, Default)]
pub struct JournalHandle(Option<Arc<dyn Journal>>);

impl JournalHandle {
    pub fn new(journal: Arc<dyn Journal>) -> Self {
        Self(Some(journal))
    }

    pub(crate) fn append(&self, entries: Vec<Entry>) {
        if let Some(journal) = &self.0
            && !entries.is_empty()
        {
            journal.append(entries);
        }
    }

    pub(crate) async fn stored(&self) {
        if let Some(journal) = &self.0 {
            journal.stored().await;
        }
    }

    pub(crate) async fn read_back(&self) {
        if let Some(journal) = &self.0 {
            journal.read_back().await;
        }
    }
}

/// The entries for keys that records got from a creation or a change.
pub(crate) fn keys(record: RecordId, keys: Vec<KeyHash>, Change { kind, at }: Change) -> Entry {
    Entry::Keys { record, keys, change: kind, at }
}
