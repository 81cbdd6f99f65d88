//! Access to records for the resolver: asks the id cache and Close, and notes each look-up and each candidate in
//! the [`Decision`]. Which look-up comes next is the resolver's decision. Each answer is checked against the memory of
//! recent records, because reads may be stale.

use std::collections::{HashMap, HashSet};

use tokio::time::Instant;

use crate::close::{CloseError, CreatedIds, Fault, LeadWithPerson, Records};
use crate::domain::decision::{Candidate, Decision, LookUp};
use crate::domain::journal::RecordId;
use crate::domain::mapping::{Identity, Key, KeyFields};
use crate::domain::matching::{
    ContactMatch, MAX_CONTACTS, MatchedContacts, Verdict, company_leads, compare, match_contacts, match_lead,
    may_be, user_of,
};
use crate::domain::plan::Step;
use crate::domain::record::{Channel, Contact, ContactId, Entry, FieldId, Lead, LeadId};
use crate::sync::id_cache::IdCache;
use crate::sync::lag_guard::LagGuard;
use crate::sync::recent_records::{Newest, RecentRecords};

/// The most Contacts that are read one by one because the answer with their Lead lacks them.
pub(crate) const MAX_MISSING: usize = 20;

pub(crate) struct Lookups<'a, R> {
    pub(crate) records: &'a R,
    pub(crate) id_cache: &'a IdCache,
    pub(crate) lag_guard: &'a LagGuard,
    pub(crate) keys: &'a KeyFields,
    pub(crate) recent: &'a RecentRecords,
    /// How each record was last read.
    pub(crate) reads: Reads,
    /// Search shows every record created so far.
    pub(crate) search_is_complete: bool,
    pub(crate) decision: &'a mut Decision,
}

/// How records were last read, by id.
pub(crate) type Reads = HashMap<String, Read>;

/// A read of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    /// When the call was sent. The answer may show the record as it was then.
    pub(crate) at: Instant,
    /// The answer was older than what is known of the record.
    pub(crate) stale: bool,
}

/// A record that was read right before it is written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fresh {
    Lead(Lead),
    Contact(Contact),
}

/// Ids of the oldest Contacts that search shows for a person.
pub(crate) struct ContactHits {
    pub(crate) by_user: Vec<ContactId>,
    pub(crate) by_email: Vec<ContactId>,
    /// Those that may have the email: Close does not show their emails, and the search may find more than was asked for.
    pub(crate) unclear: Vec<ContactId>,
    /// All of a page that may be the person, oldest first, as search shows them.
    rows: Vec<Contact>,
}

impl<R: Records> Lookups<'_, R> {
    pub(crate) fn cached_lead(&mut self, company_id: &str) -> Option<LeadId> {
        let id = self.id_cache.lead(company_id)?;
        self.note(LookUp::CachedLead);
        Some(id)
    }

    /// The company's Leads that search shows, oldest first.
    pub(crate) async fn search_leads(
        &mut self,
        field: &FieldId,
        company_id: &str,
    ) -> Result<Vec<Lead>, CloseError> {
        let hits = self.records.find_leads(field, company_id).await?;
        let answered = Instant::now();
        self.note(LookUp::SearchedLeads(hits.len()));
        let key = Key::Company(company_id.to_owned());
        for lead in &hits {
            self.seen(&key, RecordId::Lead(lead.id.clone()), answered, true);
        }
        for lead in hits.iter().filter(|lead| lead.custom(field) != Some(company_id)) {
            self.note_candidate(lead.id.as_str(), match_lead(lead, company_id, self.keys));
        }
        Ok(company_leads(hits, company_id, self.keys))
    }

    async fn read_lead(&mut self, id: &LeadId, person: &Identity) -> Result<LeadWithPerson, CloseError> {
        let before = Instant::now();
        let answer = self.records.lead(id, person, self.keys).await;
        self.note(LookUp::Read(id.to_string()));
        let answer = answer.map_err(|error| self.recent.or_not_yet(error, id.as_str()))?;
        let Newest { record: lead, stale } = self.recent.lead(answer.lead)?;
        self.note_read(id.as_str(), before, stale);
        Ok(LeadWithPerson { lead, ..answer })
    }

    /// The person's Contacts in a Lead that was just read. Reads those that the answer lacks: without them a person in the
    /// Lead would get a second Contact.
    pub(crate) async fn people_of(
        &mut self,
        answer: LeadWithPerson,
        person: &Identity,
    ) -> Result<MatchedContacts, CloseError> {
        let LeadWithPerson { lead, people, missing, unlisted } = answer;
        if unlisted {
            return self.people_of_large(&lead.id, person).await;
        }
        self.note_people(&people, false);
        let read = self.reads.get(lead.id.as_str()).copied();
        let mut contacts = Vec::with_capacity(people.contacts.len());
        for contact in people.contacts {
            let Newest { record, stale } = self.recent.contact(contact)?;
            if let Some(read) = read {
                self.reads.insert(record.id.to_string(), Read { stale, ..read });
            }
            contacts.push(record);
        }
        let mut ids = self.worth_reading(missing, person).await?;
        // The answer may be older than a Contact that was added to the Lead a moment ago.
        let known = person.person().flat_map(|key| self.id_cache.contacts(&key).ids);
        ids.extend(known.filter(|contact| self.recent.is_in_lead(contact, &lead.id, person, self.keys)));
        ids.sort();
        ids.dedup();
        ids.retain(|id| !contacts.iter().any(|contact| contact.id == *id));
        let is_known =
            |id: &ContactId| person.person().any(|key| self.id_cache.contacts(&key).ids.contains(id));
        let unknown: HashSet<ContactId> = ids.iter().filter(|id| !is_known(id)).cloned().collect();
        let mut vanished = Vec::new();
        for id in ids {
            match self.read_contact(&id, person).await {
                Ok(contact) if contact.lead_id.as_ref().is_none_or(|id| *id == lead.id) => {
                    contacts.push(contact);
                }
                // The Lead was just read. It may list for ever what was deleted long ago.
                Err(CloseError::Transient(Fault::Vanished)) if unknown.contains(&id) => vanished.push(id),
                // Moved or deleted since, and the Lead still lists it.
                Ok(_) | Err(CloseError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        let people = match_contacts(contacts.clone(), person, self.keys);
        if !people.contacts.is_empty() {
            return Ok(people);
        }
        if vanished.is_empty() && !people.are_uncertain() {
            return Ok(people);
        }
        let ContactHits { by_user, by_email, unclear, .. } = self.search_contacts(person).await?;
        if vanished.iter().any(|id| by_user.contains(id) || by_email.contains(id)) {
            return Err(CloseError::Transient(Fault::Vanished));
        }
        if !people.are_uncertain() {
            return Ok(people);
        }
        // Search knows the emails that Close does not show. A Contact that it does not find is another person.
        let contacts = contacts.into_iter().map(|contact| self.with_email(contact, person, &by_email));
        let people = match_contacts(contacts.collect(), person, self.keys);
        if people.contacts.is_empty() && people.are_uncertain_about(&unclear) {
            return Err(CloseError::Transient(Fault::ListsUnknown));
        }
        Ok(people)
    }

    /// A Contact with the person's email if Close does not show its emails and it was found under exactly this one. Its list
    /// remains unknown, so it is not written.
    fn with_email(&self, mut contact: Contact, person: &Identity, found: &[ContactId]) -> Contact {
        if let Some(email) = person.email.clone().filter(|_| may_be(&contact, person, self.keys))
            && found.contains(&contact.id)
        {
            let kind = Channel::Email.default_kind().to_owned();
            contact.lists.insert(Channel::Email, vec![Entry { value: email, kind }]);
        }
        contact
    }

    /// The Contacts among those that a Lead's answer lacks that may be the person. Of a few, all are read. A Lead can have
    /// thousands, and then search and the id cache tell which.
    async fn worth_reading(
        &mut self,
        missing: Vec<ContactId>,
        person: &Identity,
    ) -> Result<Vec<ContactId>, CloseError> {
        if missing.len() <= MAX_MISSING {
            return Ok(missing);
        }
        let ContactHits { by_user, by_email, unclear, .. } = self.search_contacts(person).await?;
        let ids = self.with_cached(person.user(), by_user);
        let ids = [ids, self.with_cached(person.email(), by_email), unclear].concat();
        let missing: HashSet<ContactId> = missing.into_iter().collect();
        Ok(ids.into_iter().filter(|id| missing.contains(id)).collect())
    }

    /// The person's Contacts in a Lead that was read without its Contacts: search and the id cache show which may be in it.
    async fn people_of_large(
        &mut self,
        lead: &LeadId,
        person: &Identity,
    ) -> Result<MatchedContacts, CloseError> {
        let is_in_lead = |contact: &Contact| contact.lead_id.as_ref().is_none_or(|id| id == lead);
        // Of more than these the cache has only the oldest, wherever they are.
        if let Some(cached) = self.cached_contacts(person).filter(|cached| cached.len() < MAX_CONTACTS) {
            let mut people = self.read_contacts(cached, person).await?;
            people.contacts.retain(is_in_lead);
            if !people.contacts.is_empty() {
                return Ok(people);
            }
        }
        // What search shows of a Contact's Lead may be old, so those elsewhere are read as well.
        let hits = self.search_contacts(person).await?;
        let keys = self.keys;
        let members: Vec<&Contact> = hits.rows.iter().filter(|contact| is_in_lead(contact)).collect();
        // Those without a match may have the email: Close does not show it.
        let each = [ContactMatch::SameUser, ContactMatch::SameEmail, ContactMatch::NoMatch].into_iter();
        let oldest = each.flat_map(|likeness| {
            let alike = members.iter().filter(move |row| compare(row, person, keys) == likeness);
            alike.map(|row| row.id.clone()).take(MAX_CONTACTS)
        });
        let oldest: Vec<ContactId> = oldest.collect();
        let ids = [oldest, hits.by_user, hits.by_email, hits.unclear].concat();
        let mut ids = self.with_cached(person.email(), ids);
        ids.retain(|id| !self.is_somebody_else(id, person));
        let ids = self.with_cached(person.user(), ids);
        let mut members = Vec::new();
        for id in ids {
            match self.read_contact(&id, person).await {
                Ok(contact) if is_in_lead(&contact) => members.push(contact),
                Ok(_) => {}
                Err(CloseError::NotFound) => self.forget_contact(&id, person),
                Err(error) => return Err(error),
            }
        }
        let people = match_contacts(members, person, self.keys);
        if people.contacts.is_empty() && people.are_uncertain() {
            return Err(CloseError::Transient(Fault::ListsUnknown));
        }
        Ok(people)
    }

    fn forget_contact(&mut self, id: &ContactId, person: &Identity) {
        self.note_candidate(id.as_str(), Verdict::Gone);
        person.person().for_each(|key| self.id_cache.forget_contact(&key, id));
    }

    /// Reads a record again that is about to be written. Fails when Close shows an older state than before: writing a list of
    /// it would undo what is newer.
    pub(crate) async fn read_again(
        &mut self,
        step: &Step,
        person: &Identity,
    ) -> Result<Option<Fresh>, CloseError> {
        let (fresh, stale) = match step {
            Step::CreateLead { .. } | Step::CreateContact { .. } => return Ok(None),
            Step::UpdateLead { id, .. } => {
                let before = Instant::now();
                let answer = self.records.lead(id, person, self.keys).await;
                self.note(LookUp::Read(id.to_string()));
                let lead = answer.map_err(|error| self.recent.or_not_yet(error, id.as_str()))?.lead;
                let Newest { record, stale } = self.recent.lead(lead)?;
                self.note_read(id.as_str(), before, stale);
                (Fresh::Lead(record), stale)
            }
            Step::UpdateContact { id, .. } => {
                let contact = self.read_contact(id, person).await?;
                let stale = self.reads.get(id.as_str()).is_some_and(|read| read.stale);
                (Fresh::Contact(contact), stale)
            }
        };
        if stale { Err(CloseError::Transient(Fault::NotYet)) } else { Ok(Some(fresh)) }
    }

    async fn read_contact(&mut self, id: &ContactId, person: &Identity) -> Result<Contact, CloseError> {
        let before = Instant::now();
        let answer = self.records.contact(id).await;
        self.note(LookUp::Read(id.to_string()));
        let answer = answer.map_err(|error| self.recent.or_not_yet(error, id.as_str()))?;
        let Newest { record, stale } = self.recent.contact(answer)?;
        self.note_read(id.as_str(), before, stale);
        if !stale {
            self.recent.remember(&record);
        }
        let cached = self.with_cached(person.email(), Vec::new());
        let record = self.with_email(record, person, &cached);
        // The keys that the record does not show, and may have.
        let hidden: Vec<Key> = match compare(&record, person, self.keys) {
            ContactMatch::SameUser | ContactMatch::SameEmail => Vec::new(),
            ContactMatch::Conflict => person.user().into_iter().collect(),
            ContactMatch::NoMatch => person.person().collect(),
        };
        if self.id_cache.has_just_got(&hidden, id.as_str()) {
            // It may have become the person.
            return Err(CloseError::Transient(Fault::NotYet));
        }
        self.note_user(&record, person);
        Ok(record)
    }

    /// Remembers who a Contact is that was read, if it has the person's email and is somebody else.
    fn note_user(&self, contact: &Contact, person: &Identity) {
        let theirs = user_of(contact, self.keys);
        if theirs.is_none() || compare(contact, person, self.keys) == ContactMatch::Conflict {
            self.id_cache.shown_with(&contact.id, theirs);
        }
    }

    /// Whether the Contact need not be read, because it has the person's email and is known to be somebody else.
    pub(crate) fn is_somebody_else(&mut self, id: &ContactId, person: &Identity) -> bool {
        let is_else = self.id_cache.is_somebody_else(id, person);
        if is_else {
            self.note_candidate(id.as_str(), Verdict::DifferentPerson);
        }
        is_else
    }

    /// Notes a read that began at this time, and was sent when there was budget for it.
    fn note_read(&mut self, id: &str, before: Instant, stale: bool) {
        let at = self.records.last_sent().map_or(before, |sent| sent.max(before));
        self.reads.insert(id.to_owned(), Read { at, stale });
    }

    /// The Lead, if it still exists and still has this company id.
    pub(crate) async fn read_company_lead(
        &mut self,
        id: &LeadId,
        company_id: &str,
        person: &Identity,
    ) -> Result<Option<LeadWithPerson>, CloseError> {
        let answer = self.read_lead(id, person).await;
        let verdict = match &answer {
            Ok(LeadWithPerson { lead, .. }) => match_lead(lead, company_id, self.keys),
            Err(CloseError::NotFound) => Verdict::Gone,
            Err(_) => return answer.map(Some),
        };
        self.note_candidate(id.as_str(), verdict);
        if verdict != Verdict::SameCompany {
            let is_stale = self.reads.get(id.as_str()).is_some_and(|read| read.stale);
            if is_stale || self.id_cache.has_just_got(&[Key::Company(company_id.to_owned())], id.as_str()) {
                // It may have got the company id since.
                return Err(CloseError::Transient(Fault::NotYet));
            }
        }
        Ok(answer.ok().filter(|_| verdict == Verdict::SameCompany))
    }

    /// The Leads of Contacts, in the order of the Contacts, each read once.
    pub(crate) async fn read_leads_of(
        &mut self,
        contacts: &[Contact],
        person: &Identity,
    ) -> Result<Vec<LeadWithPerson>, CloseError> {
        let mut leads: Vec<LeadWithPerson> = Vec::new();
        for id in contacts.iter().filter_map(|contact| contact.lead_id.as_ref()) {
            if !leads.iter().any(|read| read.lead.id == *id) {
                leads.push(self.read_lead(id, person).await?);
            }
        }
        Ok(leads)
    }

    /// All Contacts of the person, if the cache is complete. The user id decides before the email, so all its
    /// Contacts are enough.
    pub(crate) fn cached_contacts(&mut self, person: &Identity) -> Option<Vec<ContactId>> {
        let cached = self.id_cache.contacts(&person.person().next()?);
        if !cached.complete {
            return None;
        }
        self.note(LookUp::CachedContacts(cached.ids.len()));
        Some(cached.ids)
    }

    /// Searches the person's Contacts and caches their ids.
    pub(crate) async fn search_contacts(&mut self, person: &Identity) -> Result<ContactHits, CloseError> {
        let user = self.keys.user.as_ref().zip(person.user_id.as_deref());
        let hits = self.records.find_contacts(user, person.email.as_deref()).await?;
        self.note(LookUp::SearchedContacts(hits.contacts.len()));
        let (mut candidates, mut by_both) = (hits.contacts, hits.by_both);
        if hits.exact {
            let ids: Vec<ContactId> = candidates.iter().map(|contact| contact.id.clone()).collect();
            let known = candidates.into_iter().map(|contact| self.with_email(contact, person, &ids));
            candidates = known.collect();
        }
        let is_user = |contact: &Contact| compare(contact, person, self.keys) == ContactMatch::SameUser;
        // A shared email can fill the whole page; the person may be on the next one.
        if hits.more && user.is_some() && !candidates.iter().any(is_user) {
            let hits = self.records.find_contacts(user, None).await?;
            self.note(LookUp::SearchedContacts(hits.contacts.len()));
            candidates.extend(hits.contacts);
            by_both.extend(hits.by_both);
        }
        for contact in candidates.iter().filter(|contact| user_of(contact, self.keys).is_none()) {
            self.id_cache.shown_with(&contact.id, None);
        }
        let answered = Instant::now();
        // Where there is a user id, showing the email alone proves nothing: custom fields may lag more.
        if let Some(key) = person.person().next() {
            let found = match_contacts(candidates.clone(), person, self.keys).contacts;
            let is_found = |contact: &Contact| {
                person.user_id.is_none() || compare(contact, person, self.keys) == ContactMatch::SameUser
            };
            for contact in found.into_iter().filter(is_found) {
                let (certain, id) = (!by_both.contains(&contact.id), RecordId::Contact(contact.id));
                // A new record is in the index with all its keys.
                for key in person.person().skip(1) {
                    self.id_cache.seen(&key, &id, false);
                }
                self.seen(&key, id, answered, certain);
            }
        }
        // Not all candidates are read, so note here which ones are left alone.
        for (id, verdict) in match_contacts(candidates.clone(), person, self.keys).verdicts {
            if matches!(
                verdict,
                Verdict::TooMany
                    | Verdict::UserIdDecides
                    | Verdict::DifferentPerson
                    | Verdict::EmailsUnknown
                    | Verdict::NoMatch
            ) {
                self.note_candidate(id.as_str(), verdict);
            }
        }
        candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
        let with = |likeness: ContactMatch| -> Vec<ContactId> {
            let alike = candidates.iter().filter(|contact| compare(contact, person, self.keys) == likeness);
            alike.map(|contact| contact.id.clone()).take(MAX_CONTACTS).collect()
        };
        let by_user = with(ContactMatch::SameUser);
        let unclear = candidates.iter().filter(|contact| may_be(contact, person, self.keys));
        let unclear: Vec<ContactId> = unclear.map(|contact| contact.id.clone()).take(MAX_CONTACTS).collect();
        // A Contact with the email and another user id does not match this person, but may match an event that
        // has only the email.
        let by_email = [with(ContactMatch::SameEmail), with(ContactMatch::Conflict)].concat();
        let complete = self.search_is_complete && unclear.is_empty();
        if let Some(user_id) = &person.user_id {
            self.id_cache.remember_contacts(Key::User(user_id.clone()), by_user.clone(), complete);
        }
        if let Some(email) = &person.email
            && by_user.is_empty()
        {
            self.id_cache.remember_contacts(Key::Email(email.clone()), by_email.clone(), complete);
        }
        candidates.retain(|contact| {
            compare(contact, person, self.keys).is_person() || may_be(contact, person, self.keys)
        });
        Ok(ContactHits { by_user, by_email, unclear, rows: candidates })
    }

    /// Adds the cached ids of a key: search may not show them yet.
    pub(crate) fn with_cached(&self, key: Option<Key>, found: Vec<ContactId>) -> Vec<ContactId> {
        let cached = key.map(|key| self.id_cache.contacts(&key).ids).unwrap_or_default();
        let mut ids = [found, cached].concat();
        ids.sort();
        ids.dedup();
        ids
    }

    /// Reads Contacts and returns those that are the person. Forgets the person's Contacts if one is gone.
    pub(crate) async fn read_contacts(
        &mut self,
        ids: Vec<ContactId>,
        person: &Identity,
    ) -> Result<MatchedContacts, CloseError> {
        let mut contacts = Vec::with_capacity(ids.len());
        for id in ids {
            match self.read_contact(&id, person).await {
                Ok(contact) => contacts.push(contact),
                Err(CloseError::NotFound) => self.forget_contact(&id, person),
                Err(error) => return Err(error),
            }
        }
        Ok(match_contacts(contacts, person, self.keys))
    }

    /// Caches Contacts as the person's. After a write whose answer was lost, the cache lacks them and may count
    /// as complete.
    pub(crate) fn remember_contacts(&self, contacts: &[Contact], person: &Identity) {
        for contact in contacts {
            if !self.reads.get(contact.id.as_str()).is_some_and(|read| read.stale) {
                self.recent.remember(contact);
            }
            let ids = CreatedIds { lead: None, contact: Some(contact.id.clone()) };
            self.id_cache.remember_created(person, ids, false);
        }
    }

    /// Search has shown a record that has this key. `certain`: it has found the record by it.
    fn seen(&self, key: &Key, id: RecordId, answered: Instant, certain: bool) {
        if let Some(change) = self.id_cache.seen(key, &id, certain).filter(|change| change.shows_lag(key)) {
            self.lag_guard.shown(change.kind, change.at, answered);
        }
    }

    fn note(&mut self, look_up: LookUp) {
        self.decision.look_ups.push(look_up);
    }

    /// Notes what Contacts were judged to be. Of a Lead's members, other people are not candidates.
    pub(crate) fn note_people(&mut self, people: &MatchedContacts, others_too: bool) {
        for (id, verdict) in &people.verdicts {
            if others_too || *verdict != Verdict::NoMatch {
                self.note_candidate(id.as_str(), *verdict);
            }
        }
    }

    /// Notes the verdict on a record; the last one counts.
    pub(crate) fn note_candidate(&mut self, id: &str, verdict: Verdict) {
        let candidates = &mut self.decision.candidates;
        match candidates.iter_mut().find(|candidate| candidate.id == id) {
            Some(candidate) => candidate.verdict = verdict,
            None => candidates.push(Candidate { id: id.to_owned(), verdict }),
        }
    }
}
