//! Bounded cache of field versions: for each record, the time of the last event that set each field.
//!
//! [`crate::domain::staleness`] compares these versions with the time of an event. For a record that is not cached, the
//! time stored in the record counts for all its fields, if it stores one.

use jiff::Timestamp;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::close::CreatedIds;
use crate::domain::matching::Found;
use crate::domain::plan::{NEW_CONTACT, NEW_LEAD};
use crate::domain::record::{FieldId, Fields};
use crate::domain::staleness::{self, FieldVersions, RecordVersions, SyncedAtFields};

/// In records. An entry takes about 500 bytes.
const CAPACITY: u64 = 50_000;

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct VersionCache {
    records: Cache<String, Entry>,
    /// Records whose creation was sent, by kind and stored time. Their ids are missing until Close answers.
    creations: Cache<(&'static str, Timestamp), FieldVersions>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    versions: FieldVersions,
    /// The versions after a change that was sent and not answered, if it took effect.
    intended: Option<FieldVersions>,
}

impl Default for VersionCache {
    fn default() -> Self {
        // The most recent entries matter most, however often the others are read.
        let lru = EvictionPolicy::lru;
        Self {
            records: Cache::builder().max_capacity(CAPACITY).eviction_policy(lru()).build(),
            creations: Cache::builder().max_capacity(CAPACITY).eviction_policy(lru()).build(),
        }
    }
}

impl VersionCache {
    /// Returns the versions of the records found. If a record stores another time than the cache, another process wrote
    /// to it, and may have written any field.
    pub fn versions_of(&self, found: &Found, synced_at: &SyncedAtFields) -> RecordVersions {
        let versions = |kind: &'static str, id: &str, fields: &Fields, synced_at: Option<&FieldId>| {
            let stored = staleness::stored(fields, synced_at);
            let is_current = |versions: &FieldVersions| versions.stored == stored;
            let Some(Entry { versions, intended }) = self.records.get(id) else {
                let created = stored.and_then(|stored| self.creations.get(&(kind, stored)));
                return created.unwrap_or(FieldVersions {
                    stored,
                    record: stored,
                    ..FieldVersions::default()
                });
            };
            if is_current(&versions) {
                return versions;
            }
            intended.filter(is_current).unwrap_or(FieldVersions { stored, record: stored, ..versions })
        };
        let (leads, contacts) = found.records();
        let leads = leads.map(|lead| {
            let id = lead.id.as_str();
            (id.to_owned(), versions(NEW_LEAD, id, &lead.fields, synced_at.lead.as_ref()))
        });
        let contacts = contacts.map(|contact| {
            let id = contact.id.as_str();
            (id.to_owned(), versions(NEW_CONTACT, id, &contact.fields, synced_at.contact.as_ref()))
        });
        leads.chain(contacts).collect()
    }

    /// Caches the versions that records will have after the changes that are about to be sent.
    pub fn intend(&self, versions: &RecordVersions, intended: RecordVersions) {
        for (id, intended) in intended {
            match (id.as_str(), intended.stored) {
                (NEW_LEAD, Some(stored)) => self.creations.insert((NEW_LEAD, stored), intended),
                (NEW_CONTACT, Some(stored)) => self.creations.insert((NEW_CONTACT, stored), intended),
                (NEW_LEAD | NEW_CONTACT, None) => {}
                _ => {
                    let versions = self.joined(&id, versions.get(&id).cloned().unwrap_or_default());
                    self.records.insert(id, Entry { versions, intended: Some(intended) });
                }
            }
        }
    }

    /// Caches the versions of records, those of new records under their ids in `created`.
    pub fn remember(&self, versions: RecordVersions, created: &CreatedIds) {
        for (id, versions) in versions {
            let id = match id.as_str() {
                NEW_LEAD => created.lead.as_ref().map(ToString::to_string),
                NEW_CONTACT => created.contact.as_ref().map(ToString::to_string),
                _ => Some(id),
            };
            if let Some(id) = id {
                // Close answered the creation, so the record is cached by its id from now on.
                for kind in [NEW_LEAD, NEW_CONTACT] {
                    versions.stored.inspect(|stored| self.creations.invalidate(&(kind, *stored)));
                }
                let versions = self.joined(&id, versions);
                self.records.insert(id, Entry { versions, intended: None });
            }
        }
    }

    /// Joins with the cached versions: another message may have found the record unchanged at the same time.
    fn joined(&self, id: &str, versions: FieldVersions) -> FieldVersions {
        self.records.get(id).map_or(versions.clone(), |entry| entry.versions.join(versions))
    }
}
