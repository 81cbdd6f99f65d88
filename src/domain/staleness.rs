//! Which values are older than what a record holds: an older message never overwrites what a newer one wrote.
//!
//! A message may be late: it waited in a delay queue, or was dead-lettered and replayed after days. Its values
//! are then compared by the time of their event with what was applied since, field by field: what a newer event
//! has said about a field stays, everything else is written as if it came in time. So fields that are always
//! written end as they would have in the order of the events. Lists only grow, and do not need this.
//!
//! **What is known.** What this process has applied, it remembers per field ([`crate::sync::version_cache`]). Of what others
//! applied, a predecessor before a restart say, a record tells only when the last event was, and only if a custom
//! field is configured to store that (`close.contact_synced_at_field`). Then everything in the record counts as
//! new as that: an older value still fills an empty field, and changes none.
//!
//! **The time of an event** is what its producer says, but never later than when it was first received: a clock
//! that is ahead by a year would otherwise freeze the record for a year.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde_json::Value;

use crate::domain::record::{Field, FieldId, Fields};
use crate::domain::value;

/// The custom fields, both of type datetime, that store the time of the last event applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncedAtFields {
    /// Of Leads.
    pub lead: Option<FieldId>,
    /// Of Contacts.
    pub contact: Option<FieldId>,
}

/// How old what a record holds is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldVersions {
    /// The time the record stores.
    pub stored: Option<Timestamp>,
    /// What others wrote is at most as new as this, and all of it may be.
    pub record: Option<Timestamp>,
    /// The newest event that told about a field, by the key Close has for it.
    pub fields: BTreeMap<String, Timestamp>,
}

impl FieldVersions {
    /// Whether a newer event than one of `at` has told about a field.
    pub fn is_newer(&self, field: &str, at: Option<Timestamp>) -> bool {
        let newest = self.record.max(self.fields.get(field).copied());
        at.is_some_and(|at| newest.is_some_and(|newest| newest > at))
    }

    /// What two know of a record together.
    #[must_use]
    pub fn join(mut self, other: Self) -> Self {
        self.stored = self.stored.max(other.stored);
        self.record = self.record.max(other.record);
        for (field, at) in other.fields {
            let newest = self.fields.entry(field).or_insert(at);
            *newest = at.max(*newest);
        }
        self
    }
}

/// The ages of records, by id. Nothing is known of those it does not have.
pub type RecordVersions = HashMap<String, FieldVersions>;

/// The time a record stores.
pub fn stored(fields: &Fields, stamp: Option<&FieldId>) -> Option<Timestamp> {
    fields.get(&Field::Custom(stamp?.clone()))?.as_str()?.parse().ok()
}

/// What to store in a record that is changed, if that is news.
pub fn news(
    record: Option<&Fields>,
    stamp: Option<&FieldId>,
    at: Option<Timestamp>,
) -> Option<(Field, Value)> {
    let is_news = record.and_then(|fields| stored(fields, stamp)) < at;
    Some((Field::Custom(stamp?.clone()), value::notation(at?).into())).filter(|_| is_news)
}
