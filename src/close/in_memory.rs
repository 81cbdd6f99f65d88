//! A test double for [`crate::close::Client`] that keeps records in memory. It reads, searches and applies the steps of a
//! plan without HTTP and without a clock. Its search returns inexact matches and lists deleted records, as that of Close
//! may do.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use strum::VariantArray;

use crate::close::error::{CloseError, Fault};
use crate::close::records::{Hits, LeadWithContacts, LeadWithPerson, Records, Written};
use crate::close::wire;
use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::phone::{self, Country};
use crate::domain::plan::{ContactValues, Step};
use crate::domain::record::{
    Channel, Contact, ContactId, Entry, FieldId, Lead, LeadId, Lists, apply_changes, fold_email,
};
use crate::domain::value::{same_word, trim};

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct InMemoryRecords {
    pub(crate) leads: BTreeMap<LeadId, Lead>,
    pub(crate) contacts: BTreeMap<ContactId, Contact>,
    /// Deleted records that search still lists.
    deleted: (Vec<Lead>, Vec<Contact>),
    /// The records in the search index, if it is frozen.
    frozen: Option<(Vec<Lead>, Vec<Contact>)>,
    /// Contacts that a Lead lists only by id.
    pub(crate) hidden: BTreeSet<ContactId>,
    /// Contacts that answer 404 although nothing shows that they were deleted.
    pub(crate) vanished: BTreeSet<ContactId>,
    /// Contacts whose lists a Lead does not show.
    pub(crate) bare_in_lead: BTreeSet<ContactId>,
    /// Contacts whose lists no answer shows.
    pub(crate) bare: BTreeSet<ContactId>,
    /// The country of national phone numbers. The United States if none.
    pub(crate) country: Option<Country>,
    /// Search may find more than was asked for.
    pub(crate) inexact: bool,
    /// A Lead with more Contacts than this is read without them.
    pub(crate) many_contacts: Option<usize>,
    created: usize,
}

impl InMemoryRecords {
    /// Reads records in the JSON of Close.
    pub(crate) fn read(leads: &[Value], contacts: &[Value]) -> Self {
        let lead = |lead| wire::read_lead(lead).ok().map(|lead| (lead.id.clone(), lead));
        let contact = |contact| {
            let contact = wire::read_contact(contact).ok()?;
            // A fixture leaves out empty lists.
            Some((contact.id.clone(), Contact { unknown_lists: BTreeSet::new(), ..contact }))
        };
        Self {
            leads: leads.iter().filter_map(lead).collect(),
            contacts: contacts.iter().filter_map(contact).collect(),
            ..Self::default()
        }
    }
}

/// For scenarios, whose records come from the simulator.
#[cfg(feature = "simulator")]
impl InMemoryRecords {
    /// The same records. Search also lists those of `before`.
    pub(crate) fn after(mut self, before: &Self) -> Self {
        let (leads, contacts) = &mut self.deleted;
        leads.extend(before.leads.values().filter(|lead| !self.leads.contains_key(&lead.id)).cloned());
        contacts.extend(
            before.contacts.values().filter(|contact| !self.contacts.contains_key(&contact.id)).cloned(),
        );
        self
    }

    /// The name of a record, which may be deleted.
    pub(crate) fn name(&self, id: &str) -> Option<String> {
        let leads = self.leads.values().chain(&self.deleted.0).map(|lead| (lead.id.as_str(), &lead.fields));
        let contacts = self.contacts.values().chain(&self.deleted.1);
        let contacts = contacts.map(|contact| (contact.id.as_str(), &contact.fields));
        let (_, fields) = leads.chain(contacts).find(|(other, _)| *other == id)?;
        fields.get(&crate::domain::record::Field::Name)?.as_str().map(str::to_owned)
    }
}

impl InMemoryRecords {
    /// The same records. Search does not list what is written from now on.
    pub(crate) fn with_frozen_search(mut self) -> Self {
        self.frozen =
            Some((self.leads.values().cloned().collect(), self.contacts.values().cloned().collect()));
        self
    }

    fn indexed_leads(&self) -> Vec<&Lead> {
        match &self.frozen {
            Some((leads, _)) => leads.iter().collect(),
            None => self.leads.values().chain(&self.deleted.0).collect(),
        }
    }

    fn indexed_contacts(&self) -> Vec<&Contact> {
        match &self.frozen {
            Some((_, contacts)) => contacts.iter().collect(),
            None => self.contacts.values().chain(&self.deleted.1).collect(),
        }
    }

    /// Applies a step. The records it refers to must exist. Returns the record like Close.
    pub(crate) fn apply(&mut self, step: &Step) -> Written {
        match step {
            Step::CreateLead { lead, contact } => {
                let (id, date_created) = self.next("lead");
                let id = LeadId::placeholder(id);
                let lead = Lead { id: id.clone(), date_created, date_updated: None, fields: lead.clone() };
                self.leads.insert(id.clone(), lead);
                if let Some(contact) = contact {
                    self.add(id.clone(), contact);
                }
                Written::Lead(self.lead_with_contacts(&id).unwrap())
            }
            Step::CreateContact { lead, contact } => Written::Contact(self.add(lead.clone(), contact)),
            Step::UpdateLead { id, changes } => {
                apply_changes(&mut self.leads.get_mut(id).unwrap().fields, changes);
                Written::Lead(self.lead_with_contacts(id).unwrap())
            }
            Step::UpdateContact { id, changes } => {
                let country = self.country;
                let contact = self.contacts.get_mut(id).unwrap();
                apply_changes(&mut contact.fields, &changes.fields);
                contact.lists.extend(as_stored(&changes.lists, country));
                Written::Contact(contact.clone())
            }
        }
    }

    fn add(&mut self, lead: LeadId, values: &ContactValues) -> Contact {
        let (id, date_created) = self.next("cont");
        let id = ContactId::placeholder(id);
        let contact = Contact {
            id: id.clone(),
            lead_id: Some(lead),
            date_created,
            date_updated: None,
            fields: values.fields.clone(),
            lists: as_stored(&values.lists, self.country),
            unknown_lists: BTreeSet::new(),
        };
        self.contacts.insert(id, contact.clone());
        contact
    }

    fn shown(&self, contact: Contact) -> Contact {
        if self.bare.contains(&contact.id) { without_lists(contact) } else { contact }
    }

    fn lead_with_contacts(&self, id: &LeadId) -> Option<LeadWithContacts> {
        let members = self.contacts.values().filter(|contact| contact.lead_id.as_ref() == Some(id));
        let contacts = members.cloned().collect();
        Some(LeadWithContacts { lead: self.leads.get(id)?.clone(), contacts, missing: Vec::new() })
    }

    fn next(&mut self, prefix: &str) -> (String, String) {
        self.created += 1;
        (
            format!("{prefix}_new{}", self.created),
            format!("2027-01-01T00:00:{:02}.000000+00:00", self.created),
        )
    }
}

/// A Contact in an answer that leaves out its lists.
fn without_lists(contact: Contact) -> Contact {
    Contact { lists: Lists::new(), unknown_lists: Channel::VARIANTS.iter().copied().collect(), ..contact }
}

/// Lists as Close stores them. It rewrites phone numbers and URLs (close-api.md §5).
fn as_stored(lists: &Lists, country: Option<Country>) -> Lists {
    let mut stored = lists.clone();
    for (channel, entries) in &mut stored {
        for Entry { value, .. } in entries {
            *value = match channel {
                Channel::Email => trim(value).to_owned(),
                Channel::Phone => international(value, country),
                Channel::Url if value.contains("://") => value.clone(),
                Channel::Url => format!("http://{value}"),
            };
        }
    }
    stored
}

/// A phone number with its country code. Other text is not changed.
fn international(text: &str, country: Option<Country>) -> String {
    phone::stored_form(text, country.or(Country::parse("US"))).unwrap_or_else(|| text.to_owned())
}

/// Search ignores case and surrounding whitespace, so a hit can have a different id (close-api.md §6).
fn is_hit(stored: Option<&str>, wanted: &str) -> bool {
    stored.is_some_and(|stored| same_word(stored, wanted))
}

impl Records for InMemoryRecords {
    async fn find_leads(&self, field: &FieldId, company_id: &str) -> Result<Vec<Lead>, CloseError> {
        let all = self.indexed_leads().into_iter();
        let mut hits: Vec<Lead> =
            all.filter(|lead| is_hit(lead.custom(field), company_id)).cloned().collect();
        hits.sort_by(|a, b| a.date_created.cmp(&b.date_created));
        Ok(hits)
    }

    async fn find_contacts(
        &self,
        user: Option<(&FieldId, &str)>,
        email: Option<&str>,
    ) -> Result<Hits, CloseError> {
        let wanted = |contact: &&Contact| {
            let emails = contact.list(Channel::Email);
            user.is_some_and(|(field, id)| is_hit(contact.custom(field), id))
                || email.is_some_and(|email| {
                    emails.iter().any(|entry| fold_email(&entry.value) == fold_email(email))
                })
        };
        let shown = |contact: &Contact| self.shown(contact.clone());
        let mut contacts: Vec<Contact> =
            self.indexed_contacts().into_iter().filter(wanted).map(shown).collect();
        contacts.sort_by(|a, b| a.date_created.cmp(&b.date_created));
        let more = contacts.len() > wire::PAGE;
        contacts.truncate(wire::PAGE);
        Ok(Hits { contacts, more, by_both: Vec::new(), exact: !self.inexact })
    }

    async fn lead(
        &self,
        id: &LeadId,
        person: &Identity,
        keys: &KeyFields,
    ) -> Result<LeadWithPerson, CloseError> {
        let mut lead = self.lead_with_contacts(id).ok_or(CloseError::NotFound)?;
        if self.many_contacts.is_some_and(|many| lead.members() > many) {
            return Ok(LeadWithPerson::unlisted(lead.lead));
        }
        let (hidden, shown): (Vec<_>, Vec<_>) =
            lead.contacts.into_iter().partition(|contact| self.hidden.contains(&contact.id));
        lead.missing = hidden.into_iter().map(|contact| contact.id).collect();
        let is_bare = |id: &ContactId| self.bare_in_lead.contains(id) || self.bare.contains(id);
        let shown = shown.into_iter();
        lead.contacts = shown.map(|one| if is_bare(&one.id) { without_lists(one) } else { one }).collect();
        Ok(lead.of_person(person, keys))
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        if self.vanished.contains(id) {
            return Err(CloseError::Transient(Fault::Vanished));
        }
        Ok(self.shown(self.contacts.get(id).cloned().ok_or(CloseError::NotFound)?))
    }
}
