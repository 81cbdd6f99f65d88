//! What was applied lately: for each record how old what it holds is.
//!
//! A bounded memory behind [`crate::domain::staleness`]. A record that fell out of it counts as new as the time it
//! stores, if it stores one.

use jiff::Timestamp;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::close::CreatedIds;
use crate::domain::matching::Found;
use crate::domain::plan::{NEW_CONTACT, NEW_LEAD};
use crate::domain::record::{FieldId, Fields};
use crate::domain::staleness::{self, FieldVersions, RecordVersions, SyncedAtFields};

/// How many records are remembered. One takes some 500 bytes.
const CAPACITY: u64 = 50_000;

/// The memory. Clones share it.
#[derive(Clone, Debug)]
pub struct VersionCache {
    records: Cache<String, Memory>,
    /// Records that were to be made, by their kind and the time they store: if nobody answered, they are known by it.
    made: Cache<(&'static str, Timestamp), FieldVersions>,
}

/// What is remembered of a record.
#[derive(Clone, Debug, Default)]
struct Memory {
    age: FieldVersions,
    /// How old it is if a change happened that was never answered.
    intended: Option<FieldVersions>,
}

impl Default for VersionCache {
    fn default() -> Self {
        // The newest matter, however often the others were asked for.
        let lru = EvictionPolicy::lru;
        Self {
            records: Cache::builder().max_capacity(CAPACITY).eviction_policy(lru()).build(),
            made: Cache::builder().max_capacity(CAPACITY).eviction_policy(lru()).build(),
        }
    }
}

impl VersionCache {
    /// The ages of the records that were found. A record that stores another time than is remembered was written
    /// to by someone else, nobody knows what.
    pub fn versions_of(&self, found: &Found, stamps: &SyncedAtFields) -> RecordVersions {
        let age = |kind: &'static str, id: &str, fields: &Fields, stamp: Option<&FieldId>| {
            let stored = staleness::stored(fields, stamp);
            let is_it = |age: &FieldVersions| age.stored == stored;
            let Some(Memory { age, intended }) = self.records.get(id) else {
                let made = stored.and_then(|stored| self.made.get(&(kind, stored)));
                return made.unwrap_or(FieldVersions { stored, record: stored, ..FieldVersions::default() });
            };
            if is_it(&age) {
                return age;
            }
            intended.filter(is_it).unwrap_or(FieldVersions { stored, record: stored, ..age })
        };
        let (leads, contacts) = found.records();
        let leads = leads.map(|lead| {
            let id = lead.id.as_str();
            (id.to_owned(), age(NEW_LEAD, id, &lead.fields, stamps.lead.as_ref()))
        });
        let contacts = contacts.map(|contact| {
            let id = contact.id.as_str();
            (id.to_owned(), age(NEW_CONTACT, id, &contact.fields, stamps.contact.as_ref()))
        });
        leads.chain(contacts).collect()
    }

    /// The records are about to be changed, after which their ages are `intended`.
    pub fn intend(&self, ages: &RecordVersions, intended: RecordVersions) {
        for (id, intended) in intended {
            match (id.as_str(), intended.stored) {
                (NEW_LEAD, Some(stored)) => self.made.insert((NEW_LEAD, stored), intended),
                (NEW_CONTACT, Some(stored)) => self.made.insert((NEW_CONTACT, stored), intended),
                (NEW_LEAD | NEW_CONTACT, None) => {}
                _ => {
                    let age = self.joined(&id, ages.get(&id).cloned().unwrap_or_default());
                    self.records.insert(id, Memory { age, intended: Some(intended) });
                }
            }
        }
    }

    /// Remembers the ages of records; those that are new have got an id by now.
    pub fn remember(&self, ages: RecordVersions, made: &CreatedIds) {
        for (id, age) in ages {
            let id = match id.as_str() {
                NEW_LEAD => made.lead.as_ref().map(ToString::to_string),
                NEW_CONTACT => made.contact.as_ref().map(ToString::to_string),
                _ => Some(id),
            };
            if let Some(id) = id {
                // Answered: it is known by its id.
                for kind in [NEW_LEAD, NEW_CONTACT] {
                    age.stored.inspect(|stored| self.made.invalidate(&(kind, *stored)));
                }
                let age = self.joined(&id, age);
                self.records.insert(id, Memory { age, intended: None });
            }
        }
    }

    /// Others who changed nothing may have looked at the record at the same time.
    fn joined(&self, id: &str, age: FieldVersions) -> FieldVersions {
        self.records.get(id).map_or(age.clone(), |memory| memory.age.join(age))
    }
}
