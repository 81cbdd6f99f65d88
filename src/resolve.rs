//! What Close has for an event: asks as little as possible, and decides by [`crate::domain::matching`].
//!
//! The order is the rules' (`design.md` §2): the company's Lead first, the person inside it; only
//! without such a Lead the person anywhere. Search and memory give ids; the records themselves are
//! then read by id, because search lags behind and reading does not (close-api.md §6).

use std::collections::BTreeMap;

use crate::close::{Client, CloseError};
use crate::domain::mapping::{Desired, Identity, Key, KeyFields, WriteRule};
use crate::domain::matching::{self, Found, Likeness, MAX_CONTACTS, compare, pick_people};
use crate::domain::plan::Switches;
use crate::domain::record::{Contact, ContactId, Lead, LeadId};
use crate::known::Known;

/// Looks records up.
#[derive(Clone, Copy)]
pub(crate) struct Resolver<'a> {
    pub(crate) client: &'a Client,
    pub(crate) known: &'a Known,
    pub(crate) keys: &'a KeyFields,
    pub(crate) switches: &'a Switches,
}

/// The records found, and how many Contacts were left alone because they are someone else's.
pub(crate) struct Resolved {
    pub(crate) found: Found,
    pub(crate) conflicts: usize,
}

impl Resolver<'_> {
    pub(crate) async fn resolve(self, desired: &Desired) -> Result<Resolved, CloseError> {
        let person = &desired.identity;
        if let Some(company_id) = &person.company_id
            && let Some((lead, members)) = self.company(company_id).await?
        {
            let inside = pick_people(members, person, self.keys);
            // Whether the person is elsewhere too matters only if a duplicate would be forbidden.
            let elsewhere = inside.contacts.is_empty()
                && !self.switches.allow_creating_duplicate_contacts
                && !self.person(person).await?.contacts.is_empty();
            let found = Found::InLead { lead, contacts: inside.contacts, adopted: false, elsewhere };
            return Ok(Resolved { found, conflicts: inside.conflicts });
        }

        let people = self.person(person).await?;
        let conflicts = people.conflicts;
        let found = match &person.company_id {
            _ if people.contacts.is_empty() => Found::Nobody,
            Some(company_id) => {
                let found = matching::adopt(self.with_leads(people.contacts).await?, company_id, self.keys);
                // The company's Lead, which search does not know yet.
                if let Found::InLead { lead, adopted: false, .. } = &found {
                    self.known.learn_lead(company_id, lead.id.clone());
                }
                found
            }
            None if desired.lead.values().any(|wanted| wanted.write != WriteRule::OnCreate) => {
                Found::Anywhere { people: self.with_leads(people.contacts).await? }
            }
            None => Found::Anywhere {
                people: people.contacts.into_iter().map(|contact| (contact, None)).collect(),
            },
        };
        Ok(Resolved { found, conflicts })
    }

    /// The company's Lead with its Contacts, by memory, else by search.
    async fn company(self, company_id: &str) -> Result<Option<(Lead, Vec<Contact>)>, CloseError> {
        let Some(field) = &self.keys.company else { return Ok(None) };
        if let Some(id) = self.known.lead(company_id) {
            match self.client.lead(&id).await {
                Ok((lead, members)) if lead.custom(field) == Some(company_id) => {
                    return Ok(Some((lead, members)));
                }
                Ok(_) | Err(CloseError::NotFound) => self.known.forget_lead(company_id),
                Err(error) => return Err(error),
            }
        }
        let mut candidates = self.client.find_leads(field, company_id).await?;
        // The oldest of them that is still there and still the company's.
        while let Some(candidate) = matching::pick_lead(candidates.clone(), company_id, self.keys) {
            match self.client.lead(&candidate.id).await {
                Ok((lead, members)) if lead.custom(field) == Some(company_id) => {
                    self.known.learn_lead(company_id, lead.id.clone());
                    return Ok(Some((lead, members)));
                }
                Ok(_) | Err(CloseError::NotFound) => candidates.retain(|other| other.id != candidate.id),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The person's Contacts, wherever they are: by memory if it is complete, else by search and
    /// memory together.
    async fn person(self, person: &Identity) -> Result<matching::People, CloseError> {
        // The user id decides before the email does, so knowing all of its Contacts is enough.
        let first = person.person().next().map(|key| self.known.contacts(&key)).unwrap_or_default();
        if first.complete {
            let people = self.read(first.ids, person).await?;
            if !people.contacts.is_empty() {
                return Ok(people);
            }
        }
        let mut ids: Vec<_> = person.person().flat_map(|key| self.known.contacts(&key).ids).collect();
        ids.extend(self.search_person(person).await?);
        ids.sort();
        ids.dedup();
        self.read(ids, person).await
    }

    /// Those of the Contacts that are the person, as they are now.
    async fn read(self, ids: Vec<ContactId>, person: &Identity) -> Result<matching::People, CloseError> {
        let mut current = Vec::with_capacity(ids.len());
        for id in ids {
            match self.client.contact(&id).await {
                Ok(contact) => current.push(contact),
                Err(CloseError::NotFound) => person.person().for_each(|key| self.known.forget_contacts(&key)),
                Err(error) => return Err(error),
            }
        }
        Ok(pick_people(current, person, self.keys))
    }

    /// Ids of the oldest Contacts that search holds for the person, remembered by the key they were
    /// found by.
    async fn search_person(self, person: &Identity) -> Result<Vec<ContactId>, CloseError> {
        let user = self.keys.user.as_ref().zip(person.user_id.as_deref());
        let hits = self.client.find_contacts(user, person.email.as_deref()).await?;
        let mut candidates = hits.contacts;
        let is_user = |contact: &Contact| compare(contact, person, self.keys) == Likeness::SameUser;
        // An email many people share fills the page; the person may be on the next one.
        if hits.more && user.is_some() && !candidates.iter().any(is_user) {
            candidates.extend(self.client.find_contacts(user, None).await?.contacts);
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
            self.known.learn_contacts(Key::User(user_id.clone()), by_user.clone());
        }
        if let Some(email) = &person.email
            && by_user.is_empty()
        {
            self.known.learn_contacts(Key::Email(email.clone()), by_email.clone());
        }
        Ok([by_user, by_email].concat())
    }

    /// Each Contact with its Lead, every Lead read once.
    async fn with_leads(self, contacts: Vec<Contact>) -> Result<Vec<(Contact, Option<Lead>)>, CloseError> {
        let mut leads: BTreeMap<LeadId, Lead> = BTreeMap::new();
        for id in contacts.iter().filter_map(|contact| contact.lead_id.as_ref()) {
            if !leads.contains_key(id) {
                leads.insert(id.clone(), self.client.lead(id).await?.0);
            }
        }
        let lead_of = |contact: &Contact| contact.lead_id.as_ref().and_then(|id| leads.get(id)).cloned();
        Ok(contacts
            .into_iter()
            .map(|contact| {
                let lead = lead_of(&contact);
                (contact, lead)
            })
            .collect())
    }
}
