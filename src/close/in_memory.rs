//! Close's records in memory, for tests of what is decided from them: reading as [`crate::close::Client`] does
//! it, search with its harsher readings, and the effect of steps. No HTTP, no clock.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::close::api::CreatedIds;
use crate::close::error::CloseError;
use crate::close::records::{Hits, Records};
use crate::close::wire;
use crate::domain::plan::{ContactValues, Step};
use crate::domain::record::{Channel, Contact, ContactId, Entry, FieldId, Lead, LeadId, Lists, fold_email};

/// All records, and what search shows of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct InMemoryRecords {
    pub(crate) leads: BTreeMap<LeadId, Lead>,
    pub(crate) contacts: BTreeMap<ContactId, Contact>,
    /// Records that are gone and still found.
    gone: (Vec<Lead>, Vec<Contact>),
    /// What search shows instead of all that.
    frozen: Option<(Vec<Lead>, Vec<Contact>)>,
    made: usize,
}

impl InMemoryRecords {
    /// Takes over records in Close's JSON.
    pub(crate) fn read(leads: &[Value], contacts: &[Value]) -> Self {
        let lead = |lead| wire::read_lead(lead).map(|lead| (lead.id.clone(), lead));
        let contact = |contact| wire::read_contact(contact).map(|contact| (contact.id.clone(), contact));
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
    /// The same, with search still showing what was there before.
    pub(crate) fn after(mut self, before: &Self) -> Self {
        let (leads, contacts) = &mut self.gone;
        leads.extend(before.leads.values().filter(|lead| !self.leads.contains_key(&lead.id)).cloned());
        contacts.extend(
            before.contacts.values().filter(|contact| !self.contacts.contains_key(&contact.id)).cloned(),
        );
        self
    }

    /// What a record is called, there or gone.
    pub(crate) fn name(&self, id: &str) -> Option<String> {
        let leads = self.leads.values().chain(&self.gone.0).map(|lead| (lead.id.as_str(), &lead.fields));
        let contacts = self.contacts.values().chain(&self.gone.1);
        let contacts = contacts.map(|contact| (contact.id.as_str(), &contact.fields));
        let (_, fields) = leads.chain(contacts).find(|(other, _)| *other == id)?;
        fields.get(&crate::domain::record::Field::Name)?.as_str().map(str::to_owned)
    }
}

impl InMemoryRecords {
    /// The same, with search showing nothing of what is written from now on.
    pub(crate) fn with_frozen_search(mut self) -> Self {
        self.frozen =
            Some((self.leads.values().cloned().collect(), self.contacts.values().cloned().collect()));
        self
    }

    fn shown_leads(&self) -> Vec<&Lead> {
        match &self.frozen {
            Some((leads, _)) => leads.iter().collect(),
            None => self.leads.values().chain(&self.gone.0).collect(),
        }
    }

    fn shown_contacts(&self) -> Vec<&Contact> {
        match &self.frozen {
            Some((_, contacts)) => contacts.iter().collect(),
            None => self.contacts.values().chain(&self.gone.1).collect(),
        }
    }

    /// Carries out a step. What it refers to has to be there.
    pub(crate) fn apply(&mut self, step: &Step) -> CreatedIds {
        let mut made = CreatedIds::default();
        match step {
            Step::CreateLead { lead, contact } => {
                let (id, date_created) = self.next("lead");
                let id = LeadId::new(id);
                let lead = Lead { id: id.clone(), date_created, fields: lead.clone() };
                self.leads.insert(id.clone(), lead);
                made.contact = contact.as_ref().map(|contact| self.add(id.clone(), contact));
                made.lead = Some(id);
            }
            Step::CreateContact { lead, contact } => made.contact = Some(self.add(lead.clone(), contact)),
            Step::UpdateLead { id, changes } => {
                self.leads.get_mut(id).unwrap().fields.extend(changes.clone());
            }
            Step::UpdateContact { id, changes } => {
                let contact = self.contacts.get_mut(id).unwrap();
                contact.fields.extend(changes.fields.clone());
                contact.lists.extend(kept(&changes.lists));
                made.contact = Some(id.clone());
            }
        }
        made
    }

    fn add(&mut self, lead: LeadId, values: &ContactValues) -> ContactId {
        let (id, date_created) = self.next("cont");
        let id = ContactId::new(id);
        let ContactValues { fields, lists } = values;
        let (fields, lists) = (fields.clone(), kept(lists));
        let contact = Contact { id: id.clone(), lead_id: Some(lead), date_created, fields, lists };
        self.contacts.insert(id.clone(), contact);
        id
    }

    fn next(&mut self, prefix: &str) -> (String, String) {
        self.made += 1;
        (format!("{prefix}_new{}", self.made), format!("2027-01-01T00:00:{:02}.000000+00:00", self.made))
    }
}

/// Lists as Close keeps them: phones and URLs rewritten (close-api.md §5), with the default country US.
fn kept(lists: &Lists) -> Lists {
    let mut kept = lists.clone();
    for (channel, entries) in &mut kept {
        for Entry { value, .. } in entries {
            *value = match channel {
                Channel::Email => value.trim().to_owned(),
                Channel::Phone => international(value),
                Channel::Url if value.contains("://") => value.clone(),
                Channel::Url => format!("http://{value}"),
            };
        }
    }
    kept
}

/// A phone number with its country code. What is not a phone number stays as it is.
fn international(text: &str) -> String {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    if !(1..=14).contains(&digits.len()) {
        return text.to_owned();
    }
    match digits.strip_prefix("00") {
        _ if text.trim().starts_with('+') => format!("+{digits}"),
        Some(international) => format!("+{international}"),
        None if digits.len() == 11 && digits.starts_with('1') => format!("+{digits}"),
        None => format!("+1{digits}"),
    }
}

/// Search folds case and blanks of a text: a hit can still be a different id (close-api.md §6).
fn alike(theirs: Option<&str>, wanted: &str) -> bool {
    theirs.is_some_and(|theirs| theirs.trim().to_lowercase() == wanted.trim().to_lowercase())
}

impl Records for InMemoryRecords {
    async fn find_leads(&self, field: &FieldId, company_id: &str) -> Result<Vec<Lead>, CloseError> {
        let all = self.shown_leads().into_iter();
        let mut hits: Vec<Lead> = all.filter(|lead| alike(lead.custom(field), company_id)).cloned().collect();
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
            user.is_some_and(|(field, id)| alike(contact.custom(field), id))
                || email.is_some_and(|email| {
                    emails.iter().any(|entry| fold_email(&entry.value) == fold_email(email))
                })
        };
        let mut contacts: Vec<Contact> = self.shown_contacts().into_iter().filter(wanted).cloned().collect();
        contacts.sort_by(|a, b| a.date_created.cmp(&b.date_created));
        let more = contacts.len() > wire::PAGE;
        contacts.truncate(wire::PAGE);
        Ok(Hits { contacts, more })
    }

    async fn lead(&self, id: &LeadId) -> Result<(Lead, Vec<Contact>), CloseError> {
        let lead = self.leads.get(id).cloned().ok_or(CloseError::NotFound)?;
        let members = self.contacts.values().filter(|contact| contact.lead_id.as_ref() == Some(id));
        Ok((lead, members.cloned().collect()))
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        self.contacts.get(id).cloned().ok_or(CloseError::NotFound)
    }
}
