//! Finds the records of an event with as few calls as possible, and decides by [`crate::domain::matching`].
//!
//! The order of look-ups is that of the rules (`design.md` §2): the company's Lead first, then the person in it;
//! without such a Lead, the person anywhere. The id cache and search give ids. The records are then read by id,
//! because search lags more than reading (close-api.md §6). How records are looked up is in
//! [`crate::sync::lookups`].

#[cfg(test)]
mod tests;

use crate::close::{CloseError, Fault, LeadWithPerson, Records};
use crate::domain::decision::Decision;
use crate::domain::mapping::{Desired, Identity, WriteRule};
use crate::domain::matching::{self, ContactMatch, Found, Verdict, compare, match_contacts, match_lead};
use crate::domain::merge::MergedPlan;
use crate::domain::plan::Step;
use crate::domain::record::{Contact, Lead, LeadId};
use crate::domain::refused::RefusedValues;
use crate::domain::staleness::RecordVersions;
use crate::domain::switches::Switches;
use crate::sync::lookups::{ContactHits, Lookups, Reads};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::version_cache::VersionCache;

pub(crate) struct Resolver<'a, R> {
    pub(crate) lookups: Lookups<'a, R>,
    pub(crate) version_cache: &'a VersionCache,
    pub(crate) readback_cache: &'a ReadbackCache,
    pub(crate) switches: Switches,
    /// Send again what Close refused or did not keep before: an operator replays the message.
    pub(crate) retry_refused: bool,
}

/// The records found, and the plan that follows.
pub(crate) struct Decided {
    pub(crate) found: Found,
    pub(crate) versions: RecordVersions,
    pub(crate) reads: Reads,
    pub(crate) merged: MergedPlan,
}

impl Decided {
    /// The step that changes this record, or the one that creates records.
    pub(crate) fn step(&self, changes: Option<&str>) -> Option<Step> {
        self.merged.steps.iter().find(|step| step.changes() == changes).cloned()
    }
}

impl<R: Records> Resolver<'_, R> {
    /// Looks up and plans an event and those merged into it. The decision is about the first.
    pub(crate) async fn decide(
        &mut self,
        first: &Desired,
        others: &[&Desired],
    ) -> Result<Decided, CloseError> {
        *self.lookups.decision = Decision { dropped: first.dropped.clone(), ..Decision::default() };
        let changes_leads =
            |event: &&Desired| event.lead.values().any(|wanted| wanted.write != WriteRule::OnCreate);
        let needs_leads = changes_leads(&first) || others.iter().any(changes_leads);
        let found = self.find(&first.identity, needs_leads).await?;
        let mut versions = self.version_cache.versions_of(&found, &first.synced_at);
        if self.retry_refused {
            for versions in versions.values_mut() {
                versions.refused = RefusedValues::default();
            }
            self.readback_cache.forget_not_kept_of(&found);
        }
        let readback = self.readback_cache.about(&found);
        let merged = MergedPlan::plan(first, others, &found, self.switches, &versions, &readback);
        let decision = &mut *self.lookups.decision;
        decision.case = Some(found.case());
        decision.plan = merged.plans.first().cloned().unwrap_or_default();
        decision.dropped.extend(decision.plan.dropped());
        let reads = std::mem::take(&mut self.lookups.reads);
        Ok(Decided { found, versions, reads, merged })
    }

    async fn find(&mut self, person: &Identity, needs_leads: bool) -> Result<Found, CloseError> {
        if let Some(company_id) = &person.company_id
            && let Some(found) = self.find_company_lead(company_id, person).await?
        {
            let lead = found.lead.clone();
            let contacts = self.people_of(found, person).await?;
            // A Contact elsewhere matters only if duplicates are forbidden.
            let elsewhere = contacts.is_empty()
                && !self.switches.allow_creating_duplicate_contacts
                && !self.find_contacts(person).await?.is_empty();
            return Ok(Found::InLead { lead, contacts, adopted: false, elsewhere });
        }

        let contacts = self.find_contacts(person).await?;
        if contacts.is_empty() {
            return Ok(Found::NoMatch);
        }
        self.lookups.remember_contacts(&contacts, person);
        if let Some(company_id) = &person.company_id {
            return self.adopt_lead(&contacts, company_id, person).await;
        }
        let leads =
            if needs_leads { self.lookups.read_leads_of(&contacts, person).await? } else { Vec::new() };
        let lead_of = |contact: &Contact| -> Option<Lead> {
            let mut leads = leads.iter().map(|found| &found.lead);
            leads.find(|lead| Some(&lead.id) == contact.lead_id.as_ref()).cloned()
        };
        let people = contacts.iter().map(|contact| (contact.clone(), lead_of(contact))).collect();
        Ok(Found::Anywhere { people })
    }

    /// The company's Lead: the cached one if it is still right, else the oldest that search shows and that is
    /// still right.
    async fn find_company_lead(
        &mut self,
        company_id: &str,
        person: &Identity,
    ) -> Result<Option<LeadWithPerson>, CloseError> {
        let Some(field) = &self.lookups.keys.company else { return Ok(None) };
        if let Some(id) = self.lookups.cached_lead(company_id) {
            match self.lookups.read_company_lead(&id, company_id, person).await? {
                Some(lead) => return Ok(Some(lead)),
                None => self.lookups.id_cache.forget_lead(company_id, &id),
            }
        }
        let found = self.lookups.search_leads(field, company_id).await?;
        let mut candidates: Vec<LeadId> = found.into_iter().map(|lead| lead.id).collect();
        // Search may not show yet what we created.
        let known = self.lookups.id_cache.known_leads(company_id);
        let unseen: Vec<LeadId> = known.into_iter().filter(|id| !candidates.contains(id)).collect();
        candidates.extend(unseen);
        let mut candidates = candidates.into_iter();
        while let Some(candidate) = candidates.next() {
            if let Some(lead) = self.lookups.read_company_lead(&candidate, company_id, person).await? {
                self.lookups.id_cache.remember_lead(company_id, lead.lead.id.clone());
                for younger in candidates {
                    self.lookups.note_candidate(younger.as_str(), Verdict::YoungerLead);
                }
                return Ok(Some(lead));
            }
            self.lookups.id_cache.forget_lead(company_id, &candidate);
        }
        Ok(None)
    }

    /// The person was found, but not the company's Lead: chooses the company's among the Leads of the person.
    async fn adopt_lead(
        &mut self,
        contacts: &[Contact],
        company_id: &str,
        person: &Identity,
    ) -> Result<Found, CloseError> {
        let keys = self.lookups.keys;
        let mut leads = self.lookups.read_leads_of(contacts, person).await?;
        for LeadWithPerson { lead, .. } in &leads {
            self.lookups.note_candidate(lead.id.as_str(), match_lead(lead, company_id, keys));
        }
        let Some(chosen) = matching::adopt(leads.iter().map(|found| &found.lead), company_id, keys) else {
            return Ok(Found::OtherCompany);
        };
        let chosen = leads.swap_remove(chosen);
        let lead = chosen.lead.clone();
        let adopted = match_lead(&lead, company_id, keys) == Verdict::NoCompany;
        if !adopted {
            // It is the company's already, but search does not show that yet.
            self.lookups.id_cache.remember_lead(company_id, lead.id.clone());
        }
        // All of the person's Contacts in the Lead, not only those found: those are limited to ten, anywhere.
        let contacts = self.people_of(chosen, person).await?;
        Ok(Found::InLead { lead, contacts, adopted, elsewhere: false })
    }

    /// The person's Contacts in a Lead, noted and cached.
    async fn people_of(
        &mut self,
        found: LeadWithPerson,
        person: &Identity,
    ) -> Result<Vec<Contact>, CloseError> {
        let people = self.lookups.people_of(found, person).await?;
        self.lookups.note_people(&people, false);
        self.lookups.remember_contacts(&people.contacts, person);
        Ok(people.contacts)
    }

    /// The person's Contacts, wherever they are: from the cache if it is complete, else from search and cache.
    async fn find_contacts(&mut self, person: &Identity) -> Result<Vec<Contact>, CloseError> {
        if let Some(ids) = self.lookups.cached_contacts(person) {
            let people = self.lookups.read_contacts(ids, person).await?;
            if !people.contacts.is_empty() {
                self.lookups.note_people(&people, true);
                return Ok(people.contacts);
            }
        }
        let ContactHits { by_user, by_email, unclear, .. } = self.lookups.search_contacts(person).await?;
        // The user id decides. Contacts with only the email are read when none has the user id.
        let read = self.lookups.with_cached(person.user(), by_user);
        let people = self.lookups.read_contacts(read.clone(), person).await?;
        self.lookups.note_people(&people, true);
        let has_user_id =
            |contact: &Contact| compare(contact, person, self.lookups.keys) == ContactMatch::SameUser;
        if people.contacts.iter().any(has_user_id) {
            return Ok(people.contacts);
        }
        // One that is cached under the user id may have only the email, because a switch forbids to write the user id. It
        // counts also if neither search nor the cache has it under the email.
        // The record may show the emails that the search leaves out.
        let mut ids = self.lookups.with_cached(person.email(), by_email);
        ids.retain(|id| !self.lookups.is_somebody_else(id, person));
        ids.extend(unclear);
        ids.sort();
        ids.dedup();
        ids.retain(|id| !read.contains(id));
        let others = self.lookups.read_contacts(ids, person).await?;
        self.lookups.note_people(&others, true);
        let are_uncertain = people.are_uncertain() || others.are_uncertain();
        let all = match_contacts([people.contacts, others.contacts].concat(), person, self.lookups.keys);
        self.lookups.note_people(&all, true);
        if all.contacts.is_empty() && are_uncertain {
            return Err(CloseError::Transient(Fault::ListsUnknown));
        }
        Ok(all.contacts)
    }
}
