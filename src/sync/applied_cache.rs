//! Bounded cache of what was last applied for each company and person, so that an event which repeats it needs no call to
//! Close ([`crate::domain::repeat`]).
//!
//! A repeat is settled from memory only while nothing can have come in between:
//!
//! - Each event forgets the entries of its keys before it runs, and is remembered after it was applied as a whole. Messages
//!   with a common key run one after the other.
//! - Another event may have found a record by other keys. So none may have written the record since, nor while this one ran
//!   ([`WriteLog`]).
//! - A person may have moved the company to another Lead, and another event may have followed. So what was applied for the person
//!   and for the company must have been in one Lead.
//! - Other workers may have been active before: a session begins with an empty cache.
//!
//! A person in Close may have changed what was applied. That is left alone for `worker.recheck`, counted from the last event
//! that was compared with Close.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::domain::decision::Decision;
use crate::domain::journal::{Entry, KeyHash, RecordId};
use crate::domain::mapping::Desired;
use crate::domain::record::LeadId;
use crate::domain::repeat::{AppliedFields, ContentHash, Part};
use crate::sync::layered::{Bounds, Layered};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::version_cache::VersionCache;
use crate::sync::write_log::{Stamp, WriteLog};

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
    /// The last write of each record then.
    stamps: Vec<Stamp>,
    /// The Lead of the company.
    lead: Option<LeadId>,
    /// When it was compared with Close.
    checked: Instant,
    /// The time of the last event that said this.
    at: Mutex<Timestamp>,
}

impl Applied {
    /// Whether no other event has written the records since.
    fn is_current(&self, writes: &WriteLog) -> bool {
        let mut records = self.fields.iter().zip(&self.stamps);
        records.all(|((record, _), stamp)| writes.is_last(record.as_str(), *stamp))
    }

    fn weight(&self) -> usize {
        let records = self.fields.iter().map(|(id, fields)| {
            RECORD.saturating_add(id.as_str().len()).saturating_add(size_of_val(fields.as_slice()))
        });
        ENTRY.saturating_add(records.sum())
    }
}

/// An event that repeats what was applied.
pub(crate) struct Repeat {
    /// The records that it is about.
    pub(crate) records: Vec<RecordId>,
    /// For the journal: the fields count as set by this event.
    pub(crate) entries: Vec<Entry>,
}

/// An event that was applied.
pub(crate) struct AppliedEvent<'a> {
    pub(crate) event: &'a Desired,
    pub(crate) decision: &'a Decision,
    /// Before its records were read.
    pub(crate) since: Stamp,
    /// What it wrote itself.
    pub(crate) own: &'a [Stamp],
    pub(crate) checked: Instant,
}

impl Default for AppliedCache {
    fn default() -> Self {
        let weight = |_: &KeyHash, applied: &Arc<Applied>| applied.weight();
        let entries = Layered::new(Bounds { capacity: CAPACITY, weight, lifetime: None });
        Self { entries }
    }
}

impl AppliedCache {
    /// If an event repeats what was last applied, the fields count as set by it. An event of which a value was dropped does not
    /// count: that has to be reported.
    pub(crate) fn repeat(
        &self,
        event: &Desired,
        parts: &[Part],
        (versions, writes): (&VersionCache, &WriteLog),
        recheck: Duration,
    ) -> Option<Repeat> {
        let at = event.at.filter(|_| event.dropped.is_empty())?;
        let mut repeated: Vec<Arc<Applied>> = Vec::new();
        for part in parts {
            for key in &part.keys {
                let applied = self.entries.get(key).filter(|applied| {
                    applied.content == part.content
                        && applied.checked.elapsed() < recheck
                        && applied.is_current(writes)
                        && repeated.iter().all(|other| other.lead == applied.lead)
                })?;
                repeated.push(applied);
            }
        }
        let mut repeat = Repeat { records: Vec::new(), entries: Vec::new() };
        for applied in repeated {
            let mut last = applied.at.lock().unwrap_or_else(PoisonError::into_inner);
            let is_newer = *last < at;
            *last = at.max(*last);
            for (record, fields) in &applied.fields {
                if !repeat.records.contains(record) {
                    repeat.records.push(record.clone());
                }
                if is_newer && !fields.is_empty() {
                    versions.join(record, at, fields);
                    let (record, fields) = (record.clone(), fields.clone());
                    repeat.entries.push(Entry::Written { record, at, fields, stored: None, updated: None });
                }
            }
        }
        Some(repeat)
    }

    /// Another event with these keys is about to be applied.
    pub(crate) fn forget<'a>(&self, parts: impl Iterator<Item = &'a Part>) {
        parts.flat_map(|part| &part.keys).for_each(|key| self.entries.remove(key));
    }

    /// Nothing is known any more.
    pub(crate) fn forget_all(&self) {
        self.entries.clear();
    }

    /// An event was applied. It is compared again if another one wrote a record meanwhile, or if Close did not keep all as it was
    /// sent.
    pub(crate) fn remember(&self, applied: &AppliedEvent<'_>, writes: &WriteLog, readback: &ReadbackCache) {
        let AppliedEvent { event, decision, since, own, checked } = *applied;
        let Some(at) = event.at else { return };
        let lead = decision.lead();
        for part in Part::of(event) {
            let Some(fields) = part.applied(event, decision) else { return };
            let differs = fields.iter().any(|(record, _)| readback.differs(record.as_str()));
            let stamps: Option<Vec<Stamp>> =
                fields.iter().map(|(record, _)| writes.unwritten(record.as_str(), since, own)).collect();
            let Some(stamps) = stamps.filter(|_| !differs) else { continue };
            let (content, lead) = (part.content, lead.clone());
            let applied = Arc::new(Applied { content, fields, stamps, lead, checked, at: Mutex::new(at) });
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

    const RECHECK: Duration = Duration::from_hours(24);

    #[derive(Default)]
    struct Caches {
        applied: AppliedCache,
        versions: VersionCache,
        writes: WriteLog,
        readback: ReadbackCache,
    }

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
    fn caches() -> Caches {
        let caches = Caches::default();
        apply(&caches, "CEO", 1);
        caches
    }

    /// Jane's title is found set. Meanwhile another event may write it.
    fn apply_while(caches: &Caches, title: &str, second: i64, other: impl FnOnce()) {
        let (event, decision) = event(title, second);
        let since = caches.writes.now();
        other();
        let (event, decision) = (&event, &decision);
        let applied = AppliedEvent { event, decision, since, own: &[], checked: Instant::now() };
        caches.applied.remember(&applied, &caches.writes, &caches.readback);
    }

    fn apply(caches: &Caches, title: &str, second: i64) {
        apply_while(caches, title, second, || ());
    }

    /// How many entries the journal gets.
    fn repeats(caches: &Caches, title: &str, second: i64) -> Option<usize> {
        let (event, _) = event(title, second);
        let memories = (&caches.versions, &caches.writes);
        let repeat = caches.applied.repeat(&event, &Part::of(&event), memories, RECHECK)?;
        assert_eq!(repeat.records.iter().map(RecordId::as_str).collect::<Vec<_>>(), ["cont_1"]);
        Some(repeat.entries.len())
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
    fn another_event_that_writes_the_record_comes_in_between() {
        let write = |caches: &Caches| caches.writes.ends("cont_1", caches.writes.begins("cont_1"));
        let caches = caches();
        write(&caches);
        assert_eq!(repeats(&caches, "CEO", 2), None);
        apply_while(&caches, "CEO", 3, || write(&caches));
        assert_eq!(repeats(&caches, "CEO", 4), None, "it found the title, and then it was changed");
        apply(&caches, "CEO", 5);
        assert_eq!(repeats(&caches, "CEO", 6), Some(1));
        let lost = caches.writes.begins("cont_1");
        assert_eq!(repeats(&caches, "CEO", 7), None);
        apply(&caches, "CEO", 8);
        assert_eq!(repeats(&caches, "CEO", 9), None, "the other write may still take effect");
        caches.writes.ends("cont_1", lost);
        apply(&caches, "CEO", 10);
        caches.applied.forget(Part::of(&event("CTO", 11).0).iter());
        assert_eq!(repeats(&caches, "CEO", 12), None, "an event of the person failed half-way");
    }

    #[test]
    fn what_close_did_not_keep_was_not_applied() {
        let caches = caches();
        let title = |title: &str| [(Field::Title, json!(title))].into();
        caches.readback.learn("cont_1", &readback::differences(&title("CEO"), None, &title("Chief")));
        apply(&caches, "CEO", 2);
        assert_eq!(repeats(&caches, "CEO", 3), Some(1), "nothing has changed since the first one");
        caches.applied.forget_all();
        apply(&caches, "CEO", 4);
        assert_eq!(repeats(&caches, "CEO", 5), None);
    }
}
