//! Bounded memory of records as Close last showed them: in the answers to our own writes, and in reads by id.
//!
//! A read by id may be stale (close-api.md §15, 2). A record that was created a moment ago may not be there yet, and one
//! that was changed may come back as it was before. Planning on such an answer creates a second record, or replaces a
//! list without its newest entries. `date_updated` decides which of two states is newer, not our clock.
//!
//! - A state that is older than the one in memory is stale: the one in memory is used instead, and stays. Where only the
//!   time of the newer one is known, because another worker wrote it, the record must be read again.
//! - A 404 on a record that was created a moment ago and was not read since means "not yet", unless the event log shows
//!   its deletion. Such a failure says nothing of Close, so it does not count for the circuit breaker.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::close::{CloseError, Fault, LeadWithContacts, MOMENT, Written};
use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::matching::compare;
use crate::domain::plan::Step;
use crate::domain::record::{Channel, Contact, ContactId, Fields, Lead, LeadId};
use crate::sync::layered::{Bounds, Layered};

/// How long a state is remembered. No replica of a database should lag that much.
pub(crate) const REMEMBERED: Duration = Duration::from_mins(2);
/// In bytes.
const CAPACITY: usize = 16 << 20;
/// What a record takes beside its values, in bytes.
const RECORD: usize = 500;
/// What a value takes beside its text, in bytes.
const VALUE: usize = 150;

/// Clones share the memory.
#[derive(Clone, Debug)]
pub struct RecentRecords {
    records: Layered<String, Arc<Recent>>,
}

/// A record as it was last seen.
#[derive(Debug)]
struct Recent {
    state: State,
    seen: Instant,
    /// Close has shown or changed the record, and has not only answered its creation.
    was_read: bool,
}

#[derive(Debug)]
enum State {
    Lead(Lead),
    Contact(Contact),
    /// A Contact that was created in this Lead. The answer did not have its values.
    ContactIn(LeadId),
    /// Another worker wrote the record, and Close then showed this `date_updated`.
    Elsewhere(Option<Timestamp>),
}

/// A record in its newest known state.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Newest<R> {
    pub(crate) record: R,
    /// Close answered with an older state.
    pub(crate) stale: bool,
}

/// Another worker has changed the record, and Close still shows it as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outdated;

impl From<Outdated> for CloseError {
    fn from(Outdated: Outdated) -> Self {
        Self::Transient(Fault::NotYet)
    }
}

impl State {
    fn is_newer_than(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Lead(_), Self::Lead(_) | Self::Elsewhere(Some(_)))
            | (Self::Contact(_), Self::Contact(_) | Self::Elsewhere(Some(_)))
            | (Self::Elsewhere(_), Self::Lead(_) | Self::Contact(_))
            | (Self::Elsewhere(Some(_)), Self::Elsewhere(Some(_))) => {
                let (known, other) = (self.updated(), other.updated());
                is_newer(known, other) && !is_cut(known, other)
            }
            // The other says nothing new, or the values of the Contact are known.
            (
                Self::Lead(_) | Self::Contact(_) | Self::ContactIn(_) | Self::Elsewhere(Some(_)),
                Self::Elsewhere(None),
            )
            | (Self::Contact(_), Self::ContactIn(_)) => true,
            (Self::Lead(_) | Self::Contact(_) | Self::ContactIn(_) | Self::Elsewhere(_), _) => false,
        }
    }

    fn updated(&self) -> Option<Timestamp> {
        match self {
            Self::Lead(lead) => lead.date_updated,
            Self::Contact(contact) => contact.date_updated,
            Self::ContactIn(_) => None,
            Self::Elsewhere(updated) => *updated,
        }
    }

    fn bytes(&self) -> usize {
        let fields = |fields: &Fields| -> usize {
            fields.values().map(|value| VALUE.saturating_add(value.to_string().len())).sum()
        };
        match self {
            Self::Lead(lead) => fields(&lead.fields),
            Self::Contact(contact) => {
                let entries = contact.lists.values().flatten();
                let lists: usize = entries.map(|entry| VALUE + entry.value.len() + entry.kind.len()).sum();
                fields(&contact.fields) + lists
            }
            Self::ContactIn(_) | Self::Elsewhere(_) => 0,
        }
    }
}

impl Default for RecentRecords {
    fn default() -> Self {
        let weight = |id: &String, recent: &Arc<Recent>| {
            RECORD.saturating_add(id.len()).saturating_add(recent.state.bytes())
        };
        let records = Bounds { capacity: CAPACITY, weight, lifetime: Some(REMEMBERED) };
        Self { records: Layered::new(records) }
    }
}

fn is_newer(known: Option<Timestamp>, read: Option<Timestamp>) -> bool {
    known.zip(read).is_some_and(|(known, read)| known > read)
}

fn has_fraction(time: Timestamp) -> bool {
    time.subsec_nanosecond() != 0
}

/// Whether the time of an answer may be the known one without its fraction: a proxy may cut that. Then only another value shows
/// that the state is an older one. Where no value is known, such a state counts as older.
fn is_cut(known: Option<Timestamp>, read: Option<Timestamp>) -> bool {
    known.zip(read).is_some_and(|(known, read)| !has_fraction(read) && known.as_second() == read.as_second())
}

impl RecentRecords {
    /// A memory for a rehearsal: it knows what this one knows, and keeps what it learns for itself.
    pub(crate) fn for_rehearsal(&self) -> Self {
        Self { records: Self::default().records.over(&self.records) }
    }

    /// Remembers the answer to a step.
    pub(crate) fn written(&self, step: &Step, answer: &Written) {
        let existed = !step.creates();
        match answer {
            Written::Lead(LeadWithContacts { lead, contacts, missing }) => {
                self.insert(lead.id.as_str(), State::Lead(lead.clone()), existed);
                if step.creates() {
                    for contact in contacts {
                        self.insert(contact.id.as_str(), State::Contact(contact.clone()), false);
                    }
                    for id in missing {
                        self.insert(id.as_str(), State::ContactIn(lead.id.clone()), false);
                    }
                }
            }
            Written::Contact(contact) => {
                self.insert(contact.id.as_str(), State::Contact(contact.clone()), existed);
            }
            Written::Unread => {}
        }
    }

    /// Another worker wrote a record a moment ago, and Close then showed this `date_updated`. Reads may lag behind it.
    pub(crate) fn written_elsewhere(&self, id: &str, updated: Option<Timestamp>) {
        self.insert(id, State::Elsewhere(updated), false);
    }

    /// The `date_updated` of the newest known state of a record.
    pub(crate) fn updated(&self, id: &str) -> Option<Timestamp> {
        self.get(id)?.state.updated()
    }

    /// The newest known state of a Lead that was read.
    pub(crate) fn lead(&self, read: Lead) -> Result<Newest<Lead>, Outdated> {
        let newest = match self.get(read.id.as_str()).as_deref() {
            Some(Recent { state: State::Lead(known), .. })
                if is_newer(known.date_updated, read.date_updated) =>
            {
                let is_same = is_cut(known.date_updated, read.date_updated) && read.fields == known.fields;
                Newest { record: known.clone(), stale: !is_same }
            }
            Some(Recent { state: State::Elsewhere(known), .. }) if is_newer(*known, read.date_updated) => {
                return Err(Outdated);
            }
            Some(_) | None => Newest { record: read, stale: false },
        };
        // A state that Close did not show must expire.
        if !newest.stale {
            self.insert(newest.record.id.as_str(), State::Lead(newest.record.clone()), true);
        }
        Ok(newest)
    }

    /// The newest known state of a Contact that was read.
    pub(crate) fn contact(&self, read: Contact) -> Result<Newest<Contact>, Outdated> {
        Ok(match self.get(read.id.as_str()).as_deref() {
            Some(Recent { state: State::Contact(known), .. })
                if is_newer(known.date_updated, read.date_updated) =>
            {
                let is_cut = is_cut(known.date_updated, read.date_updated);
                // The other time is cut as well.
                let read = Contact {
                    date_created: known.date_created.clone(),
                    date_updated: known.date_updated,
                    ..with_lists_of(read, known)
                };
                Newest { record: known.clone(), stale: !is_cut || read != *known }
            }
            Some(Recent { state: State::Contact(known), .. })
                if known.date_updated == read.date_updated
                    && known.date_updated.is_some_and(has_fraction) =>
            {
                Newest { record: with_lists_of(read, known), stale: false }
            }
            Some(Recent { state: State::Elsewhere(known), .. }) if is_newer(*known, read.date_updated) => {
                return Err(Outdated);
            }
            Some(_) | None => Newest { record: read, stale: false },
        })
    }

    /// Remembers that Close has shown this Contact, not an older state of it.
    pub(crate) fn remember(&self, contact: &Contact) {
        self.insert(contact.id.as_str(), State::Contact(contact.clone()), true);
    }

    /// Whether the Contact was in this Lead and the person's when it was last seen.
    pub(crate) fn is_in_lead(
        &self,
        contact: &ContactId,
        lead: &LeadId,
        person: &Identity,
        keys: &KeyFields,
    ) -> bool {
        match self.get(contact.as_str()).as_deref() {
            Some(Recent { state: State::Contact(contact), .. }) => {
                let likeness = compare(contact, person, keys);
                contact.lead_id.as_ref() == Some(lead) && likeness.is_person()
            }
            Some(Recent { state: State::ContactIn(id), .. }) => id == lead,
            // Reading it shows whether it is.
            Some(Recent { state: State::Elsewhere(_), .. }) => true,
            Some(Recent { state: State::Lead(_), .. }) | None => false,
        }
    }

    /// The error of a call about a record: a record that was created a moment ago has not vanished.
    pub(crate) fn or_not_yet(&self, error: CloseError, id: &str) -> CloseError {
        let is_new = || self.get(id).is_some_and(|recent| !recent.was_read && recent.seen.elapsed() < MOMENT);
        let is_not_yet = error == CloseError::Transient(Fault::Vanished) && is_new();
        if is_not_yet { CloseError::Transient(Fault::NotYet) } else { error }
    }

    fn get(&self, id: &str) -> Option<Arc<Recent>> {
        self.records.get(id).filter(|recent| recent.seen.elapsed() < REMEMBERED)
    }

    /// Remembers a state, unless a newer one is known. The caller may have waited since Close answered, and another message
    /// may have written the record meanwhile.
    fn insert(&self, id: &str, state: State, was_read: bool) {
        self.records.update(id.to_owned(), |known| {
            let known = known.filter(|known| known.seen.elapsed() < REMEMBERED);
            match known {
                Some(known) if known.state.is_newer_than(&state) => known,
                known => {
                    let was_read = was_read || known.is_some_and(|known| known.was_read);
                    Arc::new(Recent { state, seen: Instant::now(), was_read })
                }
            }
        });
    }
}

/// A Contact with the lists that the answer lacks, from the same state.
fn with_lists_of(mut contact: Contact, known: &Contact) -> Contact {
    let lacks = std::mem::take(&mut contact.unknown_lists);
    let (unknown, filled) = lacks.into_iter().partition(|channel| known.unknown_lists.contains(channel));
    contact.unknown_lists = unknown;
    let filled: BTreeSet<Channel> = filled;
    let lists = known.lists.iter().filter(|(channel, _)| filled.contains(channel));
    contact.lists.extend(lists.map(|(channel, list)| (*channel, list.clone())));
    contact
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::matching::tests::{contact, keys, lead};
    use crate::domain::plan::ContactValues;
    use crate::domain::record::{Entry, Field, Lists};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn acme(name: &str, updated: Option<Timestamp>) -> Lead {
        let fields = [(Field::Name, json!(name))].into_iter().collect();
        Lead { date_updated: updated, fields, ..lead("lead_1", None) }
    }

    fn jane(updated: Option<Timestamp>) -> Contact {
        Contact { date_updated: updated, ..contact("cont_1", "lead_1", None, Some("jane@acme.test")) }
    }

    fn update() -> Step {
        Step::UpdateLead { id: LeadId::new("lead_1"), changes: Fields::new() }
    }

    fn answer(lead: Lead) -> Written {
        Written::Lead(LeadWithContacts { lead, contacts: Vec::new(), missing: Vec::new() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_lags_behind_what_another_worker_wrote_is_stale() {
        let recent = RecentRecords::default();
        recent.written_elsewhere("lead_1", Some(at(5)));
        recent.written_elsewhere("cont_1", Some(at(5)));
        // The entries of two workers may be mixed.
        recent.written_elsewhere("lead_1", Some(at(3)));
        let read =
            |second| (recent.lead(acme("a", Some(at(second)))), recent.contact(jane(Some(at(second)))));
        assert_eq!(read(4), (Err(Outdated), Err(Outdated)));
        assert_eq!(recent.updated("lead_1"), Some(at(5)), "stays");
        // A checkpoint repeats that the record got keys.
        recent.written_elsewhere("lead_1", None);
        assert_eq!(recent.updated("lead_1"), Some(at(5)));
        let vanished = CloseError::Transient(Fault::Vanished);
        assert_eq!(recent.or_not_yet(vanished, "lead_1"), CloseError::Transient(Fault::NotYet));
        let (contact, lead) = (ContactId::new("cont_1"), LeadId::new("lead_1"));
        assert!(recent.is_in_lead(&contact, &lead, &Identity::default(), &keys()), "it is read to see");
        let (lead, contact) = read(5);
        assert_eq!((lead.unwrap().stale, contact.unwrap().stale), (false, false));
        assert_eq!(read(4).0.unwrap().record, acme("a", Some(at(5))), "its values are known now");
    }

    #[tokio::test(start_paused = true)]
    async fn the_newer_of_two_states_is_used_whatever_our_clock_says() {
        let recent = RecentRecords::default();
        recent.written(&update(), &answer(acme("ours", Some(at(5)))));
        let read = |name: &str, updated| {
            let Newest { record, stale } = recent.lead(acme(name, updated)).unwrap();
            (record.fields[&Field::Name].as_str().unwrap().to_owned(), stale)
        };
        assert_eq!(read("before", Some(at(4))), ("ours".into(), true));
        assert_eq!(read("same", Some(at(5))), ("same".into(), false));
        assert_eq!(read("undated", None), ("undated".into(), false));
        recent.written(&update(), &answer(acme("ours", Some(at(5)))));
        assert_eq!(read("theirs", Some(at(6))), ("theirs".into(), false));
        assert_eq!(read("ours", Some(at(5))), ("theirs".into(), true), "a read is remembered too");
        tokio::time::sleep(REMEMBERED).await;
        assert_eq!(read("ours", Some(at(5))), ("ours".into(), false), "for a while");
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_state_does_not_replace_a_newer_one() {
        let recent = RecentRecords::default();
        let phones: Lists = [(Channel::Phone, vec![Entry { value: "1".into(), kind: "home".into() }])].into();
        let written = Contact { lists: phones, ..jane(Some(at(5))) };
        let step = Step::UpdateContact { id: written.id.clone(), changes: ContactValues::default() };
        let newest = || recent.contact(jane(Some(at(4)))).unwrap();
        let known = Newest { record: written.clone(), stale: true };
        recent.remember(&jane(Some(at(4))));
        recent.written(&step, &Written::Contact(written));
        assert_eq!(newest(), known);
        recent.remember(&jane(Some(at(4))));
        assert_eq!(newest(), known, "read before the write, and remembered after it");
        recent.written(&step, &Written::Contact(jane(Some(at(3)))));
        assert_eq!(newest(), known, "an answer that was delayed");
        let lead = Lead { id: LeadId::new("lead_1"), ..acme("Acme", Some(at(5))) };
        let missing = vec![ContactId::new("cont_1")];
        let created = LeadWithContacts { lead, contacts: Vec::new(), missing };
        let step = Step::CreateLead { lead: Fields::new(), contact: None };
        recent.written(&step, &Written::Lead(created));
        assert_eq!(newest(), known, "an answer without the values of the Contact");
        recent.written(&update(), &answer(acme("older", Some(at(4)))));
        assert!(recent.lead(acme("older", Some(at(4)))).unwrap().stale);
        recent.remember(&jane(Some(at(6))));
        assert!(!recent.contact(jane(Some(at(6)))).unwrap().stale);
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_without_the_fraction_of_its_time_is_older_if_it_differs() {
        let time = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        let recent = RecentRecords::default();
        let phones: Lists = [(Channel::Phone, vec![Entry { value: "1".into(), kind: "home".into() }])].into();
        let known = "2026-01-31T09:00:05.25Z";
        recent.written(&update(), &answer(acme("ours", time(known))));
        recent.remember(&Contact { lists: phones.clone(), ..jane(time(known)) });
        for (name, updated, stale) in [
            ("ours", "2026-01-31T09:00:05Z", false),
            ("before", "2026-01-31T09:00:05Z", true),
            ("ours", "2026-01-31T09:00:05.2Z", true),
            ("ours", "2026-01-31T09:00:04Z", true),
        ] {
            let newest = Newest { record: acme("ours", time(known)), stale };
            assert_eq!(recent.lead(acme(name, time(updated))), Ok(newest), "{name} {updated}");

            let lists = if name == "ours" { phones.clone() } else { Lists::new() };
            let read = Contact { lists, date_created: updated.into(), ..jane(time(updated)) };
            let newest = Newest { record: Contact { lists: phones.clone(), ..jane(time(known)) }, stale };
            assert_eq!(recent.contact(read), Ok(newest), "{name} {updated}");
        }
        let theirs = Newest { record: acme("theirs", time("2026-01-31T09:00:06Z")), stale: false };
        assert_eq!(recent.lead(theirs.record.clone()), Ok(theirs));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_record_that_vanishes_is_not_there_yet() {
        let recent = RecentRecords::default();
        let (not_yet, vanished) =
            (CloseError::Transient(Fault::NotYet), CloseError::Transient(Fault::Vanished));
        let of = |error: &CloseError| recent.or_not_yet(error.clone(), "lead_1");
        assert_eq!(of(&vanished), vanished, "never seen");
        let create = || {
            let step = Step::CreateLead { lead: Fields::new(), contact: None };
            recent.written(&step, &answer(acme("new", None)));
        };
        create();
        tokio::time::sleep(MOMENT.saturating_sub(Duration::from_secs(1))).await;
        assert_eq!(of(&vanished), not_yet);
        for other in [CloseError::NotFound, CloseError::Transient(Fault::Timeout)] {
            assert_eq!(of(&other), other, "a deletion is proven");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(of(&vanished), vanished, "a 404 does not count as seen");
        create();
        recent.lead(acme("Acme", None)).unwrap();
        assert_eq!(of(&vanished), vanished, "it was there");
    }

    #[test]
    fn a_list_that_an_answer_lacks_is_taken_from_the_same_state() {
        let recent = RecentRecords::default();
        let time = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        let exact = time("2026-01-31T09:00:05.25Z");
        let bare = |updated| {
            let unknown_lists = [Channel::Email, Channel::Phone].into_iter().collect();
            let bare = Contact { lists: Lists::new(), unknown_lists, ..jane(updated) };
            recent.contact(bare).unwrap().record
        };
        recent.remember(&jane(exact));
        assert_eq!(bare(exact), jane(exact));
        let a_person_may_have_changed_them = |updated| bare(updated).unknown_lists.len() == 2;
        assert!(a_person_may_have_changed_them(time("2026-01-31T09:00:05.5Z")));
        assert!(a_person_may_have_changed_them(None));
        recent.remember(&jane(Some(at(2_000_000_000))));
        assert!(a_person_may_have_changed_them(Some(at(2_000_000_000))), "within the second");
    }

    #[test]
    fn a_created_contact_belongs_to_its_lead_also_without_its_values() {
        let recent = RecentRecords::default();
        let (lead, contact) = (LeadId::new("lead_1"), ContactId::new("cont_1"));
        let step = Step::CreateLead { lead: Fields::new(), contact: None };
        let missing = vec![contact.clone()];
        let written = LeadWithContacts { lead: acme("Acme", None), contacts: Vec::new(), missing };
        recent.written(&step, &Written::Lead(written));
        let is_in = |lead: &LeadId| recent.is_in_lead(&contact, lead, &Identity::default(), &keys());
        assert!(is_in(&lead) && !is_in(&LeadId::new("lead_2")));
        recent.remember(&jane(None));
        assert!(!is_in(&lead), "another person");
    }

    #[test]
    fn the_size_is_bounded() {
        let recent = RecentRecords::default();
        for number in 0..1000 {
            let fields = [(Field::Description, json!("x".repeat(100_000)))].into_iter().collect();
            recent
                .lead(Lead { id: LeadId::new(format!("lead_{number}")), fields, ..acme("", None) })
                .unwrap();
        }
        let sizes = recent.records.filter_map(|_, recent| Some(recent.state.bytes()));
        assert!(sizes.iter().sum::<usize>() <= CAPACITY && sizes.len() > 100, "{sizes:?}");
    }
}
