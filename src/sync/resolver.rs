//! What Close has for an event: asks as little as possible, and decides by [`crate::domain::matching`].
//!
//! The order is the rules' (`design.md` §2): the company's Lead first, the person inside it; only
//! without such a Lead the person anywhere. Search and memory give ids; the records themselves are
//! then read by id, because search lags behind and reading does not (close-api.md §6).
//!
//! What was asked, what was made of the answers and what follows is noted in a [`Decision`] on the way.

use crate::close::{CloseError, Records};
use crate::domain::decision::{Candidate, Decision, LookUp};
use crate::domain::mapping::{Desired, Identity, Key, KeyFields, WriteRule};
use crate::domain::matching::{
    self, Found, Likeness, MAX_CONTACTS, People, Verdict, company_leads, compare, judge_lead, pick_people,
};
use crate::domain::merge::MergedPlan;
use crate::domain::record::{Contact, ContactId, Lead, LeadId};
use crate::domain::staleness::RecordVersions;
use crate::domain::switches::Switches;
use crate::sync::id_cache::{CreatedIds, IdCache};
use crate::sync::version_cache::VersionCache;

/// Looks records up for one message.
pub(crate) struct Resolver<'a, R> {
    pub(crate) records: &'a R,
    pub(crate) known: &'a IdCache,
    pub(crate) applied: &'a VersionCache,
    pub(crate) keys: &'a KeyFields,
    pub(crate) switches: Switches,
    /// Search cannot have missed a creation: what it finds is all there is.
    pub(crate) trusted: bool,
    pub(crate) decision: &'a mut Decision,
}

/// What was found, and what follows from it.
pub(crate) struct Decided {
    pub(crate) found: Found,
    /// How old that is.
    pub(crate) ages: RecordVersions,
    pub(crate) together: MergedPlan,
}

impl<R: Records> Resolver<'_, R> {
    /// What Close has for an event and those that go along with it, and what has to be done. The decision is
    /// about the first.
    pub(crate) async fn decide(
        &mut self,
        first: &Desired,
        others: &[&Desired],
    ) -> Result<Decided, CloseError> {
        *self.decision = Decision { dropped: first.dropped.clone(), ..Decision::default() };
        let for_leads =
            |event: &&Desired| event.lead.values().any(|wanted| wanted.write != WriteRule::OnCreate);
        let wants_lead = for_leads(&first) || others.iter().any(for_leads);
        let found = self.resolve(&first.identity, wants_lead).await?;
        let ages = self.applied.ages(&found, &first.synced_at);
        let together = MergedPlan::plan(first, others, &found, self.switches, &ages);
        self.decision.case = Some(found.case());
        self.decision.plan = together.plans.first().cloned().unwrap_or_default();
        self.decision.dropped.extend(self.decision.plan.dropped());
        Ok(Decided { found, ages, together })
    }

    async fn resolve(&mut self, person: &Identity, wants_lead: bool) -> Result<Found, CloseError> {
        if let Some(company_id) = &person.company_id
            && let Some((lead, members)) = self.company(company_id).await?
        {
            let inside = pick_people(members, person, self.keys);
            self.judge_people(&inside, false);
            self.remember(&inside.contacts, person);
            // Whether the person is elsewhere too matters only if a duplicate would be forbidden.
            let elsewhere = inside.contacts.is_empty()
                && !self.switches.allow_creating_duplicate_contacts
                && !self.person(person).await?.contacts.is_empty();
            return Ok(Found::InLead { lead, contacts: inside.contacts, adopted: false, elsewhere });
        }

        let people = self.person(person).await?.contacts;
        if people.is_empty() {
            return Ok(Found::Nobody);
        }
        self.remember(&people, person);
        if let Some(company_id) = &person.company_id {
            return self.adopt(&people, company_id, person).await;
        }
        let leads = if wants_lead { self.leads_of(&people).await? } else { Vec::new() };
        let lead_of = |contact: &Contact| {
            let mut leads = leads.iter().map(|(lead, _)| lead);
            leads.find(|lead| Some(&lead.id) == contact.lead_id.as_ref()).cloned()
        };
        let people = people.iter().map(|contact| (contact.clone(), lead_of(contact))).collect();
        Ok(Found::Anywhere { people })
    }

    /// No Lead was found by company id, but the person was: under these, which one is the company's?
    async fn adopt(
        &mut self,
        people: &[Contact],
        company_id: &str,
        person: &Identity,
    ) -> Result<Found, CloseError> {
        let mut leads = self.leads_of(people).await?;
        for (lead, _) in &leads {
            self.judge(lead.id.as_str(), judge_lead(lead, company_id, self.keys));
        }
        let Some(chosen) = matching::adopt(leads.iter().map(|(lead, _)| lead), company_id, self.keys) else {
            return Ok(Found::OtherCompany);
        };
        let (lead, members) = leads.swap_remove(chosen);
        let adopted = judge_lead(&lead, company_id, self.keys) == Verdict::NoCompany;
        if !adopted {
            // The company's Lead, which search does not know yet.
            self.known.learn_lead(company_id, lead.id.clone());
        }
        // All of its members, as they are looked at once the Lead is the company's: the ten who were found
        // may have been elsewhere.
        let inside = pick_people(members, person, self.keys);
        self.judge_people(&inside, false);
        self.remember(&inside.contacts, person);
        Ok(Found::InLead { lead, contacts: inside.contacts, adopted, elsewhere: false })
    }

    /// The company's Lead with its Contacts, by memory, else by search.
    async fn company(&mut self, company_id: &str) -> Result<Option<(Lead, Vec<Contact>)>, CloseError> {
        let Some(field) = &self.keys.company else { return Ok(None) };
        if let Some(id) = self.known.lead(company_id) {
            self.decision.look_ups.push(LookUp::RememberedLead);
            match self.company_lead(&id, company_id).await? {
                Some(found) => return Ok(Some(found)),
                None => self.known.forget_lead(company_id),
            }
        }
        let hits = self.records.find_leads(field, company_id).await?;
        self.decision.look_ups.push(LookUp::SearchedLeads(hits.len()));
        for stranger in hits.iter().filter(|lead| lead.custom(field) != Some(company_id)) {
            self.judge(stranger.id.as_str(), judge_lead(stranger, company_id, self.keys));
        }
        // The oldest of them that is still there and still the company's.
        let mut candidates = company_leads(hits, company_id, self.keys).into_iter();
        while let Some(candidate) = candidates.next() {
            if let Some(found) = self.company_lead(&candidate.id, company_id).await? {
                self.known.learn_lead(company_id, found.0.id.clone());
                candidates.for_each(|younger| self.judge(younger.id.as_str(), Verdict::YoungerLead));
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The Lead with its Contacts, if it is there and the company's.
    async fn company_lead(
        &mut self,
        id: &LeadId,
        company_id: &str,
    ) -> Result<Option<(Lead, Vec<Contact>)>, CloseError> {
        let answer = self.records.lead(id).await;
        self.decision.look_ups.push(LookUp::Read(id.to_string()));
        let verdict = match &answer {
            Ok((lead, _)) => judge_lead(lead, company_id, self.keys),
            Err(CloseError::NotFound) => Verdict::Gone,
            Err(_) => return answer.map(Some),
        };
        self.judge(id.as_str(), verdict);
        Ok(answer.ok().filter(|_| verdict == Verdict::SameCompany))
    }

    /// The person's Contacts, wherever they are: by memory if it is complete, else by search and
    /// memory together.
    async fn person(&mut self, person: &Identity) -> Result<People, CloseError> {
        // The user id decides before the email does, so knowing all of its Contacts is enough.
        let first = person.person().next().map(|key| self.known.contacts(&key)).unwrap_or_default();
        if first.complete {
            self.decision.look_ups.push(LookUp::RememberedContacts(first.ids.len()));
            let people = self.read(first.ids, person).await?;
            if !people.contacts.is_empty() {
                self.judge_people(&people, true);
                return Ok(people);
            }
        }
        let (by_user, by_email) = self.search_person(person).await?;
        // Those with the user id decide; who has only the email is read where none of them is left.
        for (key, found) in [(person.user(), by_user), (person.email(), by_email)] {
            let remembered = key.map(|key| self.known.contacts(&key).ids);
            let mut ids = [found, remembered.unwrap_or_default()].concat();
            ids.sort();
            ids.dedup();
            let people = self.read(ids, person).await?;
            self.judge_people(&people, true);
            if !people.contacts.is_empty() {
                return Ok(people);
            }
        }
        Ok(People::default())
    }

    /// Those of the Contacts that are the person, as they are now.
    async fn read(&mut self, ids: Vec<ContactId>, person: &Identity) -> Result<People, CloseError> {
        let mut current = Vec::with_capacity(ids.len());
        for id in ids {
            let answer = self.records.contact(&id).await;
            self.decision.look_ups.push(LookUp::Read(id.to_string()));
            match answer {
                Ok(contact) => current.push(contact),
                Err(CloseError::NotFound) => {
                    self.judge(id.as_str(), Verdict::Gone);
                    person.person().for_each(|key| self.known.forget_contacts(&key));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pick_people(current, person, self.keys))
    }

    /// Ids of the oldest Contacts that search holds for the person's user id and for the email, remembered
    /// by the key they were found by.
    async fn search_person(
        &mut self,
        person: &Identity,
    ) -> Result<(Vec<ContactId>, Vec<ContactId>), CloseError> {
        let user = self.keys.user.as_ref().zip(person.user_id.as_deref());
        let hits = self.records.find_contacts(user, person.email.as_deref()).await?;
        self.decision.look_ups.push(LookUp::SearchedContacts(hits.contacts.len()));
        let mut candidates = hits.contacts;
        let is_user = |contact: &Contact| compare(contact, person, self.keys) == Likeness::SameUser;
        // An email many people share fills the page; the person may be on the next one.
        if hits.more && user.is_some() && !candidates.iter().any(is_user) {
            let hits = self.records.find_contacts(user, None).await?;
            self.decision.look_ups.push(LookUp::SearchedContacts(hits.contacts.len()));
            candidates.extend(hits.contacts);
        }
        // Who is left alone and who is one too many is told here: not all of them are read.
        let verdicts = pick_people(candidates.clone(), person, self.keys).verdicts;
        let unread = verdicts.into_iter().filter(|(_, verdict)| {
            matches!(
                verdict,
                Verdict::TooMany | Verdict::UserIdDecides | Verdict::SomebodyElse | Verdict::NotThePerson
            )
        });
        for (id, verdict) in unread.collect::<Vec<_>>() {
            self.judge(id.as_str(), verdict);
        }
        candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
        let with = |likeness: Likeness| -> Vec<ContactId> {
            let alike = candidates.iter().filter(|contact| compare(contact, person, self.keys) == likeness);
            alike.map(|contact| contact.id.clone()).take(MAX_CONTACTS).collect()
        };
        let by_user = with(Likeness::SameUser);
        // Someone else's Contact with the email is no match for this person, but may be for an event
        // that names only the email.
        let by_email = [with(Likeness::SameEmail), with(Likeness::Conflict)].concat();
        if let Some(user_id) = &person.user_id {
            self.known.learn_contacts(Key::User(user_id.clone()), by_user.clone(), self.trusted);
        }
        if let Some(email) = &person.email
            && by_user.is_empty()
        {
            self.known.learn_contacts(Key::Email(email.clone()), by_email.clone(), self.trusted);
        }
        Ok((by_user, by_email))
    }

    /// The Leads of Contacts with all their members, in the order of the Contacts, each read once.
    async fn leads_of(&mut self, contacts: &[Contact]) -> Result<Vec<(Lead, Vec<Contact>)>, CloseError> {
        let mut leads: Vec<(Lead, Vec<Contact>)> = Vec::new();
        for id in contacts.iter().filter_map(|contact| contact.lead_id.as_ref()) {
            if !leads.iter().any(|(lead, _)| lead.id == *id) {
                let answer = self.records.lead(id).await;
                self.decision.look_ups.push(LookUp::Read(id.to_string()));
                leads.push(answer?);
            }
        }
        Ok(leads)
    }

    /// Remembers Contacts as the person's. When the answer to a write of ours was lost, memory does not know
    /// that they are, and may believe to have all of them.
    fn remember(&self, contacts: &[Contact], person: &Identity) {
        for contact in contacts {
            let made = CreatedIds { lead: None, contact: Some(contact.id.clone()) };
            self.known.learn_made(person, made, false);
        }
    }

    /// Notes what was made of Contacts. Of a Lead's members, strangers are no candidates.
    fn judge_people(&mut self, people: &People, strangers: bool) {
        for (id, verdict) in &people.verdicts {
            if strangers || *verdict != Verdict::NotThePerson {
                self.judge(id.as_str(), *verdict);
            }
        }
    }

    /// Notes what was made of a record; the last word counts.
    fn judge(&mut self, id: &str, verdict: Verdict) {
        let candidates = &mut self.decision.candidates;
        match candidates.iter_mut().find(|candidate| candidate.id == id) {
            Some(candidate) => candidate.verdict = verdict,
            None => candidates.push(Candidate { id: id.to_owned(), verdict }),
        }
    }
}
