//! Bounded cache of what was last applied for each company and person, so that an event which repeats it needs no call to
//! Close ([`crate::domain::repeat`]).
//!
//! A repeat is settled from memory only while nothing can have come in between:
//!
//! - Each event forgets the entries of its keys before it runs, and is remembered after it was applied as a whole. Messages
//!   with a common key run one after the other.
//! - Another event may have found a record by other keys. So what is known of the times of its fields must be as the entry left
//!   it behind ([`VersionCache::revision`]). What was evicted counts as changed.
//! - Other workers may have been active before: a session begins with an empty cache.
//!
//! A person in Close may have changed what was applied. That is left alone for `worker.recheck`, counted from the last event
//! that was compared with Close.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::domain::decision::Decision;
use crate::domain::journal::{Entry, KeyHash};
use crate::domain::mapping::Desired;
use crate::domain::repeat::{AppliedFields, ContentHash, Part};
use crate::sync::layered::{Bounds, Layered};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::version_cache::{Revision, VersionCache};

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
    /// When it was compared with Close.
    checked: Instant,
    last: Mutex<Last>,
}

/// The last event that said this.
#[derive(Debug)]
struct Last {
    at: Timestamp,
    /// What it left behind, for each record.
    revisions: Vec<Option<Revision>>,
}

impl Applied {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn revisions(fields: &AppliedFields, versions: &VersionCache) -> Vec<Option<Revision>> {
        fields.iter().map(|(record, _)| versions.revision(record)).collect()
    }

    /// Whether nothing has changed the records since.
    fn is_current(&self, versions: &VersionCache) -> bool {
        let is_same = |(now, then): (&Option<Revision>, &Option<Revision>)| now.is_some() && now == then;
        let now = Self::revisions(&self.fields, versions);
        now.iter().zip(&self.last().revisions).all(is_same)
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
                        && applied.is_current(versions)
                })?;
                repeated.push(applied);
            }
        }
        let mut entries = Vec::new();
        for applied in repeated {
            let mut last = applied.last();
            if last.at < at {
                last.at = at;
                for (record, fields) in applied.fields.iter().filter(|(_, fields)| !fields.is_empty()) {
                    versions.learn(record, at, fields, None);
                    let (record, fields) = (record.clone(), fields.clone());
                    entries.push(Entry::Written { record, at, fields, stored: None, updated: None });
                }
                last.revisions = Applied::revisions(&applied.fields, versions);
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

    /// An event was applied after its records were read, and nothing else has changed them. If Close did not keep all as it was
    /// sent, the next event is compared again.
    pub(crate) fn remember(
        &self,
        event: &Desired,
        decision: &Decision,
        versions: &VersionCache,
        readback: &ReadbackCache,
        checked: Instant,
    ) {
        let Some(at) = event.at else { return };
        for part in Part::of(event) {
            let Some(fields) = part.applied(event, decision) else { return };
            if fields.iter().any(|(record, _)| readback.differs(record.as_str())) {
                continue;
            }
            let last = Mutex::new(Last { at, revisions: Applied::revisions(&fields, versions) });
            let applied = Arc::new(Applied { content: part.content, fields, checked, last });
            part.keys.iter().for_each(|key| self.entries.insert(*key, Arc::clone(&applied)));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::mapping::{Identity, Wanted, WriteRule};
    use crate::domain::plan::{FieldPlan, FieldVerdict, Plan, RecordPlan, RecordRef};
    use crate::domain::readback;
    use crate::domain::record::{ContactId, Field};
    use crate::domain::staleness::FieldHash;

    const RECHECK: Duration = Duration::from_hours(24);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Jane's title, and the decision that set it.
    fn event(title: &str, second: i64) -> (Desired, Decision) {
        let wanted = Wanted { value: json!(title), write: WriteRule::Always };
        let identity = Identity { user_id: Some("u1".into()), ..Identity::default() };
        let contact = [(Field::Title, wanted)].into();
        let event = Desired { identity, contact, at: Some(at(second)), ..Desired::default() };
        let field = FieldPlan {
            field: "title".into(),
            before: None,
            wanted: json!(title),
            write: WriteRule::Always,
            verdict: FieldVerdict::Set,
        };
        let record = RecordRef::Contact(ContactId::new("cont_1"));
        let record = RecordPlan { record, name: None, refused: None, fields: vec![field] };
        (event, Decision { plan: Plan { records: vec![record], ..Plan::default() }, ..Decision::default() })
    }

    /// The caches after Jane's title was set at second 1.
    fn caches() -> (AppliedCache, VersionCache, ReadbackCache) {
        let caches = (AppliedCache::default(), VersionCache::default(), ReadbackCache::default());
        apply(&caches, "CEO", 1);
        caches
    }

    fn apply(
        (applied, versions, readback): &(AppliedCache, VersionCache, ReadbackCache),
        title: &str,
        second: i64,
    ) {
        let (event, decision) = event(title, second);
        versions.learn(&contact(), at(second), &[FieldHash::of("title")], None);
        applied.remember(&event, &decision, versions, readback, Instant::now());
    }

    fn contact() -> crate::domain::journal::RecordId {
        crate::domain::journal::RecordId::Contact(ContactId::new("cont_1"))
    }

    fn repeats(
        (applied, versions, _): &(AppliedCache, VersionCache, ReadbackCache),
        title: &str,
        second: i64,
    ) -> Option<usize> {
        let (event, _) = event(title, second);
        applied.repeat(&event, &Part::of(&event), versions, RECHECK).map(|entries| entries.len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeat_is_known_until_it_is_compared_again() {
        let caches = caches();
        assert_eq!(repeats(&caches, "CTO", 2), None);
        assert_eq!(repeats(&caches, "CEO", 5), Some(1));
        assert_eq!(repeats(&caches, "CEO", 3), Some(0), "the field counts as set at second 5");
        tokio::time::advance(RECHECK).await;
        assert_eq!(repeats(&caches, "CEO", 6), None, "counted from the last comparison");
    }

    #[test]
    fn another_event_about_the_field_or_the_person_comes_in_between() {
        let caches = caches();
        caches.1.learn(&contact(), at(1), &[FieldHash::of("title")], None);
        assert_eq!(repeats(&caches, "CEO", 5), None, "an event of the same time");
        apply(&caches, "CEO", 5);
        caches.0.forget(Part::of(&event("CTO", 6).0).iter());
        assert_eq!(repeats(&caches, "CEO", 7), None, "the other event may have failed half-way");
    }

    #[test]
    fn what_close_did_not_keep_was_not_applied() {
        let caches = caches();
        let title = |title: &str| [(Field::Title, json!(title))].into();
        caches.2.learn("cont_1", &readback::differences(&title("CEO"), None, &title("Chief")));
        apply(&caches, "CEO", 2);
        assert_eq!(repeats(&caches, "CEO", 3), None);
    }
}
