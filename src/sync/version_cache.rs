//! Bounded cache of field versions: for each record, the time of the last event that set each field, and the values that
//! Close refused.
//!
//! [`crate::domain::staleness`] compares these versions with the time of an event. For a record that is not cached, the
//! time stored in the record counts for all its fields, if it stores one. Memory reaches back to a time
//! ([`VersionCache::remembered_from`]): the birth of the journal, or the newest event of a record for which there was no room.
//!
//! A refused value is tried again after some hours, and when the fields in Close have changed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::close::CreatedIds;
use crate::domain::journal::{self, RecordId};
use crate::domain::matching::Found;
use crate::domain::plan::{NEW_CONTACT, NEW_LEAD};
use crate::domain::refused::RefusedValues;
use crate::domain::staleness::{
    self, FieldHash, FieldVersions, RecordVersions, SyncedAtFields, Unremembered,
};
use crate::sync::layered::{Bounds, Layered};

/// In records. An entry takes about 500 bytes.
const CAPACITY: usize = 50_000;
/// How long a refused value is not sent again. What Close accepts may change without a change of the fields.
const REFUSAL_LIFETIME: Duration = Duration::from_hours(6);

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct VersionCache {
    records: Layered<String, Entry>,
    /// Records whose creation was sent, by kind and stored time. Their ids are missing until Close answers.
    creations: Layered<(&'static str, Timestamp), FieldVersions>,
    /// Refusals before this time no longer count.
    refusals_since: Arc<Mutex<Option<Instant>>>,
    /// Writes by events of this time or later are remembered. `None`: it is not known of any that is missing.
    remembered_from: RememberedFrom,
}

type RememberedFrom = Arc<Mutex<Option<Timestamp>>>;

#[derive(Clone, Debug, Default)]
struct Entry {
    versions: FieldVersions,
    /// The versions after a change that was sent and not answered, if it took effect.
    intended: Option<FieldVersions>,
    /// When Close refused the first of the values.
    refused_at: Option<Instant>,
}

impl Default for VersionCache {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl VersionCache {
    fn with_capacity(records: usize) -> Self {
        let remembered_from = RememberedFrom::default();
        let forgets = Arc::clone(&remembered_from);
        let note = move |entry: Entry| raise(&forgets, entry.versions.fields.into_values().max());
        Self {
            records: Layered::with_listener(Bounds::entries(records), Some(Box::new(note))),
            creations: Layered::new(Bounds::entries(records)),
            refusals_since: Arc::default(),
            remembered_from,
        }
    }

    /// Writes by older events than this may be missing.
    pub fn remembers_from(&self, at: Timestamp) {
        raise(&self.remembered_from, Some(at));
    }

    /// Writes by events of this time or later are remembered, if any may be missing.
    pub fn remembered_from(&self) -> Option<Timestamp> {
        *self.remembered_from.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A cache for a rehearsal: it knows what this one knows, and keeps what it learns for itself.
    pub(crate) fn for_rehearsal(&self) -> Self {
        let Self { records, creations, remembered_from, .. } = Self::default();
        raise(&remembered_from, self.remembered_from());
        Self {
            remembered_from,
            records: records.over(&self.records),
            creations: creations.over(&self.creations),
            refusals_since: Arc::new(Mutex::new(self.refusals_since())),
        }
    }

    /// Returns the versions of the records found. If a record stores another time than the cache, another process wrote
    /// to it, and may have written any field.
    pub fn versions_of(&self, found: &Found, synced_at: &SyncedAtFields) -> RecordVersions {
        let (leads, contacts) = found.records();
        let leads = leads.map(|lead| {
            let (id, stored) = (lead.id.as_str(), staleness::stored(&lead.fields, synced_at.lead.as_ref()));
            (id.to_owned(), self.versions(NEW_LEAD, id, stored, lead.date_updated))
        });
        let contacts = contacts.map(|contact| {
            let stored = staleness::stored(&contact.fields, synced_at.contact.as_ref());
            let id = contact.id.as_str();
            (id.to_owned(), self.versions(NEW_CONTACT, id, stored, contact.date_updated))
        });
        leads.chain(contacts).collect()
    }

    /// `stored` and `updated`: what the record shows.
    fn versions(
        &self,
        kind: &'static str,
        id: &str,
        stored: Option<Timestamp>,
        updated: Option<Timestamp>,
    ) -> FieldVersions {
        let is_current = |versions: &FieldVersions| versions.stored == stored;
        let Some(Entry { versions, intended, .. }) = self.get(id) else {
            let created = stored.and_then(|stored| self.creations.get(&(kind, stored)));
            let unknown = FieldVersions { stored, record: stored, ..FieldVersions::default() };
            let unremembered = self.unremembered(None, stored, updated);
            return FieldVersions { unremembered, ..created.unwrap_or(unknown) };
        };
        let unremembered = self.unremembered(versions.unremembered, stored, updated);
        let versions = if is_current(&versions) {
            versions
        } else {
            intended.filter(is_current).unwrap_or(FieldVersions { stored, record: stored, ..versions })
        };
        FieldVersions { unremembered, ..versions }
    }

    /// A record that stores the time of its last event needs no other.
    fn unremembered(
        &self,
        before: Option<Unremembered>,
        stored: Option<Timestamp>,
        updated: Option<Timestamp>,
    ) -> Option<Unremembered> {
        let shown = updated.filter(|_| stored.is_none())?;
        let changed = before.filter(|before| before.shown == shown).map_or(shown, |before| before.changed);
        Some(Unremembered { before: self.remembered_from()?, changed, shown })
    }

    /// Caches the versions that records will have after the changes that are about to be sent. The versions before were read
    /// at `read_at`.
    pub fn intend(&self, versions: &RecordVersions, intended: RecordVersions, read_at: Instant) {
        for (id, mut intended) in intended {
            match (id.as_str(), intended.stored) {
                (NEW_LEAD, Some(stored)) => self.creations.insert((NEW_LEAD, stored), intended),
                (NEW_CONTACT, Some(stored)) => self.creations.insert((NEW_CONTACT, stored), intended),
                (NEW_LEAD | NEW_CONTACT, None) => {}
                _ => {
                    self.drop_forgotten(&mut intended, read_at);
                    let versions = versions.get(&id).cloned().unwrap_or_default();
                    let versions = self.joined(&id, versions, read_at);
                    self.insert(id, versions, Some(intended));
                }
            }
        }
    }

    /// Caches the versions of records, those of new records under their ids in `created`. They continue versions that were
    /// read at `read_at`.
    pub fn remember(&self, versions: RecordVersions, created: &CreatedIds, read_at: Instant) {
        for (id, versions) in versions {
            let id = match id.as_str() {
                NEW_LEAD => created.lead.as_ref().map(ToString::to_string),
                NEW_CONTACT => created.contact.as_ref().map(ToString::to_string),
                _ => Some(id),
            };
            if let Some(id) = id {
                // Close answered the creation, so the record is cached by its id from now on.
                for kind in [NEW_LEAD, NEW_CONTACT] {
                    versions.stored.inspect(|stored| self.creations.remove(&(kind, *stored)));
                }
                let versions = self.joined(&id, versions, read_at);
                self.insert(id, versions, None);
            }
        }
    }

    /// An event of this time says again what is in these fields.
    pub(crate) fn join(&self, record: &RecordId, at: Timestamp, fields: &[FieldHash]) {
        let fields = fields.iter().map(|field| (*field, at)).collect();
        let versions = FieldVersions { fields, ..FieldVersions::default() };
        self.records.update(record.as_str().to_owned(), |entry| {
            let entry = entry.unwrap_or_default();
            Entry { versions: entry.versions.join(versions), ..entry }
        });
    }

    /// Caches what another worker has written.
    pub fn learn(&self, record: &RecordId, at: Timestamp, fields: &[FieldHash], stored: Option<Timestamp>) {
        let fields = fields.iter().map(|field| (*field, at)).collect();
        let versions = FieldVersions { stored, fields, ..FieldVersions::default() };
        // One step: a takeover does this for every entry.
        self.records.update(record.as_str().to_owned(), |entry| {
            let entry = entry.unwrap_or_default();
            Entry { versions: entry.versions.join(versions), intended: None, ..entry }
        });
    }

    /// The entries of the journal for all records. Those of old events come first: where a successor has no room for all, it
    /// forgets these.
    pub fn written(&self) -> impl Iterator<Item = journal::Entry> + use<> {
        let mut records = self.records.filter_map(|id, Entry { versions, .. }| {
            let FieldVersions { fields, stored, .. } = versions;
            Some((fields.values().max().copied(), id.clone(), fields.clone(), *stored))
        });
        records.sort_unstable_by(|one, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
        records.into_iter().flat_map(|(_, id, fields, stored)| {
            let record = RecordId::try_from(id).ok();
            record.into_iter().flat_map(move |record| journal::written(record, fields.clone(), stored, None))
        })
    }

    /// Joins with the cached versions: another message may have found the record unchanged at the same time.
    fn joined(&self, id: &str, mut versions: FieldVersions, read_at: Instant) -> FieldVersions {
        self.drop_forgotten(&mut versions, read_at);
        match self.get(id) {
            Some(entry) => entry.versions.join(versions),
            None => versions,
        }
    }

    /// A message that read the refusals before they were forgotten does not bring them back.
    fn drop_forgotten(&self, versions: &mut FieldVersions, read_at: Instant) {
        if self.refusals_since().is_some_and(|since| since > read_at) {
            versions.refused = RefusedValues::default();
        }
    }

    fn refusals_since(&self) -> Option<Instant> {
        *self.refusals_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All refused values are tried again.
    pub fn forget_refusals(&self) {
        *self.refusals_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The entry of a record, without refusals that no longer count.
    fn get(&self, id: &str) -> Option<Entry> {
        let mut entry = self.records.get(id)?;
        let since = self.refusals_since();
        let counts = |at: Instant| at.elapsed() < REFUSAL_LIFETIME && since.is_none_or(|since| since <= at);
        if !entry.refused_at.is_some_and(counts) {
            entry.refused_at = None;
            entry.versions.refused = RefusedValues::default();
            if let Some(intended) = &mut entry.intended {
                intended.refused = RefusedValues::default();
            }
        }
        Some(entry)
    }

    fn insert(&self, id: String, versions: FieldVersions, intended: Option<FieldVersions>) {
        let before = self.get(&id).and_then(|entry| entry.refused_at);
        let refused_at = (!versions.refused.is_empty()).then(|| before.unwrap_or_else(Instant::now));
        self.records.insert(id, Entry { versions, intended, refused_at });
    }
}

fn raise(from: &RememberedFrom, at: Option<Timestamp>) {
    let mut from = from.lock().unwrap_or_else(PoisonError::into_inner);
    *from = (*from).max(at);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::ContactId;

    #[test]
    fn memory_reaches_back_to_the_newest_event_of_an_evicted_record() {
        let cache = VersionCache::with_capacity(2);
        let at = |second| Timestamp::from_second(second).unwrap();
        let contact = |number| RecordId::Contact(ContactId::new(format!("cont_{number}")));
        let title = FieldHash::of("title");
        assert_eq!(cache.remembered_from(), None);
        for (number, second) in [(1, 30), (2, 10), (3, 20)] {
            cache.learn(&contact(number), at(second), &[title], None);
        }
        assert_eq!(cache.remembered_from(), Some(at(30)));
        cache.remembers_from(at(5));
        assert_eq!(cache.remembered_from(), Some(at(30)), "it never grows");
        assert_eq!(cache.for_rehearsal().remembered_from(), Some(at(30)));
    }

    #[test]
    fn a_checkpoint_repeats_the_records_of_old_events_first() {
        let cache = VersionCache::default();
        let contact = |number| RecordId::Contact(ContactId::new(format!("cont_{number}")));
        for (number, second) in [(1, 30), (2, 10), (3, 20)] {
            cache.learn(
                &contact(number),
                Timestamp::from_second(second).unwrap(),
                &[FieldHash::of("title")],
                None,
            );
        }
        let records = cache.written().filter_map(|entry| {
            let journal::Entry::Written { record, .. } = entry else { return None };
            Some(record)
        });
        assert_eq!(records.collect::<Vec<_>>(), [2, 3, 1].map(contact));
    }
}
