//! Which values are stale: an older event never overwrites what a newer one wrote.
//!
//! A message may be late because it waited in a delay queue, or was dead-lettered and replayed after days. The time of
//! its event is then compared, field by field, with the time of the last event that wrote the field. Fields with a newer
//! value are left out; everything else is written as usual. So fields that are always written end as if the events had
//! come in order. Lists only grow and need no comparison.
//!
//! **Where times come from.** The worker remembers per field what it and its predecessors wrote
//! ([`crate::sync::version_cache`]). A custom field can store the time of a record's last event
//! (`close.contact_synced_at_field`). When it says that another process wrote the record, the whole record counts as that
//! new: an older event still fills empty fields but changes none.
//!
//! **What is not remembered.** Memory reaches back to some time. A replayed event can be older ([`Unremembered`]). Unless
//! the record stores a time, or the time of the field is known, such an event changes no field of a record that has
//! changed in Close since. A live event is not held to this: it is late by hours at most, and edits by people would make
//! it lose values that no other event wrote.
//!
//! **The time of an event** comes from its producer, but is never later than the time it was first received. Otherwise
//! a clock that is ahead by a year would freeze the record for a year.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::domain::record::{Field, FieldId, Fields};
use crate::domain::refused::RefusedValues;
use crate::domain::time;

/// The custom fields of type datetime that store the time of the last event applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncedAtFields {
    pub lead: Option<FieldId>,
    pub contact: Option<FieldId>,
}

/// A hash of the key of a field in Close. A record has a few dozen fields, so two with one hash are improbable; the newer
/// time then counts for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FieldHash(u32);

impl FieldHash {
    pub fn of(field: &str) -> Self {
        Self(crc32fast::hash(field.as_bytes()))
    }
}

/// Writes to a record that are not remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unremembered {
    /// Writes by events of this time or later are remembered.
    pub before: Timestamp,
    /// When somebody else may last have changed the record: its `date_updated`, but for what this worker wrote since.
    pub changed: Timestamp,
    /// The `date_updated` that this follows from.
    pub shown: Timestamp,
}

/// How new the values of one record are, and what Close refused for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldVersions {
    /// The time stored in the record.
    pub stored: Option<Timestamp>,
    /// The latest time at which other processes may have written any field.
    pub record: Option<Timestamp>,
    /// The time of the newest event that wrote a field.
    pub fields: BTreeMap<FieldHash, Timestamp>,
    pub unremembered: Option<Unremembered>,
    pub refused: RefusedValues,
}

impl FieldVersions {
    /// Whether an event newer than `at` wrote the field, or may have written it before a replay.
    pub fn is_newer(&self, field: &str, at: Option<Timestamp>, is_replay: bool) -> bool {
        let newest = self.record.max(self.fields.get(&FieldHash::of(field)).copied());
        at.is_some_and(|at| newest.is_some_and(|newest| newest > at)) || self.is_unknown(field, at, is_replay)
    }

    /// Whether an event newer than this replayed one may have written the field. No memory says so or denies it.
    pub fn is_unknown(&self, field: &str, at: Option<Timestamp>, is_replay: bool) -> bool {
        let is_concerned =
            |hidden: Unremembered| at.is_some_and(|at| at < hidden.before && at < hidden.changed);
        is_replay
            && self.unremembered.is_some_and(is_concerned)
            && !self.fields.contains_key(&FieldHash::of(field))
    }

    /// The newest times of both. `other` is the newer one.
    #[must_use]
    pub fn join(mut self, other: Self) -> Self {
        self.stored = self.stored.max(other.stored);
        self.record = self.record.max(other.record);
        for (field, at) in other.fields {
            let newest = self.fields.entry(field).or_insert(at);
            *newest = at.max(*newest);
        }
        self.unremembered = other.unremembered.or(self.unremembered);
        self.refused.extend(other.refused);
        self
    }
}

/// Versions by record id.
pub type RecordVersions = HashMap<String, FieldVersions>;

/// The time stored in a record.
pub fn stored(fields: &Fields, synced_at: Option<&FieldId>) -> Option<Timestamp> {
    time::read_back(fields.get(&Field::Custom(synced_at?.clone()))?.as_str()?)
}

/// The time to store in a record that changes, if it is later than the stored one.
pub fn new_synced_at(
    record: Option<&Fields>,
    synced_at: Option<&FieldId>,
    at: Option<Timestamp>,
) -> Option<(Field, Value)> {
    let is_later = record.and_then(|fields| stored(fields, synced_at)) < at;
    Some((Field::Custom(synced_at?.clone()), time::format_timestamp(at?).into())).filter(|_| is_later)
}
