//! Bounded cache of what was last applied for each company and person, so that an event which repeats it needs no call to
//! Close ([`crate::domain::repeat`]).
//!
//! A repeat is settled from memory only while nothing can have come in between:
//!
//! - Each event forgets the entries of its keys before it runs, and is remembered after it was applied as a whole. Messages
//!   with a common key run one after the other.
//! - Another event may have set the same fields by other keys. So the times of all fields must still be those that the entry
//!   left behind ([`VersionCache`]). A field whose time was evicted counts as set by another event.
//! - Other workers may have been active before: a session begins with an empty cache.
//!
//! A person in Close may have changed what was applied. That is left alone for `worker.recheck`, counted from the last event
//! that was compared with Close.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::domain::decision::Decision;
use crate::domain::journal::{Entry, KeyHash};
use crate::domain::mapping::Desired;
use crate::domain::repeat::{AppliedFields, ContentHash, Part};
use crate::sync::layered::{Bounds, Layered};
use crate::sync::version_cache::VersionCache;

/// In bytes: about 60,000 keys.
const CAPACITY: usize = 16 << 20;
/// What an entry takes beside its records, in bytes.
const ENTRY: usize = 150;
/// What a record takes beside its id and its fields, in bytes.
const RECORD: usize = 60;

#[derive(Debug)]
pub(crate) struct AppliedCache {
    entries: Layered<KeyHash, Arc<Applied>>,
}

#[derive(Debug)]
struct Applied {
    content: ContentHash,
    fields: AppliedFields,
    /// The time of the last event that said this.
    at: Mutex<Timestamp>,
    /// When it was compared with Close.
    checked: Instant,
}

impl Applied {
    fn at(&self) -> Timestamp {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn weight(&self) -> usize {
        let records = self.fields.iter().map(|(id, fields)| {
            RECORD.saturating_add(id.as_str().len()).saturating_add(size_of_val(fields.as_slice()))
        });
        ENTRY.saturating_add(records.sum())
    }
}

impl Default for AppliedCache {
    fn default() -> Self {
        let weight = |_: &KeyHash, applied: &Arc<Applied>| applied.weight();
        let entries = Layered::new(Bounds { capacity: CAPACITY, weight, lifetime: None });
        Self { entries }
    }
}

impl AppliedCache {
    /// If an event repeats what was last applied, the fields count as set by it. Returns the entries for the journal. An event
    /// of which a value was dropped is none: it has to be reported.
    pub(crate) fn repeat(
        &self,
        event: &Desired,
        parts: &[Part],
        versions: &VersionCache,
        recheck: Duration,
    ) -> Option<Vec<Entry>> {
        let at = event.at.filter(|_| event.dropped.is_empty())?;
        let mut repeated = Vec::new();
        for part in parts {
            for key in &part.keys {
                let applied = self.entries.get(key).filter(|applied| {
                    applied.content == part.content
                        && applied.checked.elapsed() < recheck
                        && versions.are_of(&applied.fields, applied.at())
                })?;
                repeated.push(applied);
            }
        }
        let mut entries = Vec::new();
        for applied in repeated {
            let mut last = applied.at.lock().unwrap_or_else(PoisonError::into_inner);
            if *last < at {
                *last = at;
                for (record, fields) in applied.fields.iter().filter(|(_, fields)| !fields.is_empty()) {
                    versions.learn(record, at, fields, None);
                    let (record, fields) = (record.clone(), fields.clone());
                    entries.push(Entry::Written { record, at, fields, stored: None, updated: None });
                }
            }
        }
        Some(entries)
    }

    /// Another event with these keys is about to be applied.
    pub(crate) fn forget<'a>(&self, parts: impl Iterator<Item = &'a Part>) {
        parts.flat_map(|part| &part.keys).for_each(|key| self.entries.remove(key));
    }

    /// Nothing is known any more.
    pub(crate) fn forget_all(&self) {
        self.entries.clear();
    }

    /// An event was applied after its records were read.
    pub(crate) fn remember(&self, parts: Vec<Part>, event: &Desired, decision: &Decision, checked: Instant) {
        let Some(at) = event.at else { return };
        for part in parts {
            let Some(fields) = part.applied(event, decision) else { return };
            let applied = Applied { content: part.content, fields, at: Mutex::new(at), checked };
            let applied = Arc::new(applied);
            part.keys.iter().for_each(|key| self.entries.insert(*key, Arc::clone(&applied)));
        }
    }
}
