//! What was applied lately: for each record how old what it holds is.
//!
//! A bounded memory behind [`crate::domain::age`]. A record that fell out of it counts as new as the time it
//! stores, if it stores one.

use jiff::Timestamp;
use moka::sync::Cache;

use crate::domain::age::{self, Age, Ages, Stamps};
use crate::domain::matching::Found;
use crate::domain::plan::Step;
use crate::domain::record::{FieldId, Fields};
use crate::domain::together::{NEW_CONTACT, NEW_LEAD};
use crate::known::Made;

/// How many records are remembered. One takes some 500 bytes.
const CAPACITY: u64 = 50_000;

/// The memory. Clones share it.
#[derive(Clone, Debug)]
pub struct Applied {
    ages: Cache<String, Age>,
    /// Times sent with records to be made: whose answer was lost is known by what it stores.
    sent: Cache<Timestamp, ()>,
}

impl Default for Applied {
    fn default() -> Self {
        Self { ages: Cache::new(CAPACITY), sent: Cache::new(CAPACITY) }
    }
}

impl Applied {
    /// The ages of the records that were found.
    pub fn ages(&self, found: &Found, stamps: &Stamps) -> Ages {
        let age = |id: &str, fields: &Fields, stamp: Option<&FieldId>| {
            let stored = age::stored(fields, stamp);
            let made_by_us = || stored.is_some_and(|stored| self.sent.contains_key(&stored));
            match self.ages.get(id) {
                Some(age) if age.stored == stored => age,
                Some(age) if stored.is_some() && age.sent == stored => Age { stored, ..age },
                // Someone else has written since, nobody knows what.
                Some(age) => Age { stored, record: stored, ..age },
                None if made_by_us() => Age { stored, ..Age::default() },
                None => Age { stored, record: stored, ..Age::default() },
            }
        };
        let (leads, contacts) = found.records();
        let leads = leads.map(|lead| (&lead.id, age(lead.id.as_str(), &lead.fields, stamps.lead.as_ref())));
        let leads = leads.map(|(id, age)| (id.to_string(), age));
        let contacts = contacts.map(|contact| {
            (contact.id.to_string(), age(contact.id.as_str(), &contact.fields, stamps.contact.as_ref()))
        });
        leads.chain(contacts).collect()
    }

    /// These steps are about to be carried out. Also if nobody answers, the times they store are ours.
    pub fn intend(&self, steps: &[Step], ages: &Ages, stamps: &Stamps) {
        let (of_lead, of_contact) = (stamps.lead.as_ref(), stamps.contact.as_ref());
        let change = |id: &str, sent: Option<Timestamp>| {
            if sent.is_some() {
                let age = ages.get(id).cloned().unwrap_or_default();
                self.ages.insert(id.to_owned(), Age { sent, ..age });
            }
        };
        let create = |sent: Option<Timestamp>| sent.into_iter().for_each(|sent| self.sent.insert(sent, ()));
        for step in steps {
            match step {
                Step::CreateLead { lead, contact } => {
                    create(age::stored(lead, of_lead));
                    create(contact.as_ref().and_then(|contact| age::stored(&contact.fields, of_contact)));
                }
                Step::CreateContact { contact, .. } => create(age::stored(&contact.fields, of_contact)),
                Step::UpdateLead { id, changes } => change(id.as_str(), age::stored(changes, of_lead)),
                Step::UpdateContact { id, changes } => {
                    change(id.as_str(), age::stored(&changes.fields, of_contact));
                }
            }
        }
    }

    /// Remembers the ages of records; those that are new have got an id by now.
    pub fn remember(&self, ages: Ages, made: &Made) {
        for (id, age) in ages {
            let id = match id.as_str() {
                NEW_LEAD => made.lead.as_ref().map(ToString::to_string),
                NEW_CONTACT => made.contact.as_ref().map(ToString::to_string),
                _ => Some(id),
            };
            if let Some(id) = id {
                self.ages.insert(id, age);
            }
        }
    }
}
