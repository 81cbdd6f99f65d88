//! Which values are stale: an older event never overwrites what a newer one wrote.
//!
//! A message may be late because it waited in a delay queue, or was dead-lettered and replayed after days. The time of
//! its event is then compared, field by field, with the time of the last event that wrote the field. Fields with a newer
//! value are left out; everything else is written as usual. So fields that are always written end as if the events had
//! come in order. Lists only grow and need no comparison.
//!
//! **Where times come from.** The worker remembers per field what it wrote itself ([`crate::sync::version_cache`]). For
//! writes of other processes, such as a worker before a restart, a record has only the time of its last event, and only
//! if a custom field is configured to store it (`close.contact_synced_at_field`). The whole record then counts as that
//! new: an older event still fills empty fields but changes none.
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

/// How new the values of one record are, and what Close refused for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldVersions {
    /// The time stored in the record.
    pub stored: Option<Timestamp>,
    /// The latest time at which other processes may have written any field.
    pub record: Option<Timestamp>,
    /// The time of the newest event that wrote a field.
    pub fields: BTreeMap<FieldHash, Timestamp>,
    pub refused: RefusedValues,
}

impl FieldVersions {
    /// Whether an event newer than `at` wrote the field.
    pub fn is_newer(&self, field: &str, at: Option<Timestamp>) -> bool {
        let newest = self.record.max(self.fields.get(&FieldHash::of(field)).copied());
        at.is_some_and(|at| newest.is_some_and(|newest| newest > at))
    }

    /// The newest times of both.
    #[must_use]
    pub fn join(mut self, other: Self) -> Self {
        self.stored = self.stored.max(other.stored);
        self.record = self.record.max(other.record);
        for (field, at) in other.fields {
            let newest = self.fields.entry(field).or_insert(at);
            *newest = at.max(*newest);
        }
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
