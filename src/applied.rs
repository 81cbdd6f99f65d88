//! What was applied lately: for each record how old what it holds is.
//!
//! A bounded memory behind [`crate::domain::age`]. A record that fell out of it counts as new as the time it
//! stores, if it stores one.

use moka::sync::Cache;

use crate::domain::age::{self, Age, Ages, Stamps};
use crate::domain::matching::Found;
use crate::domain::record::{FieldId, Fields};
use crate::domain::together::{NEW_CONTACT, NEW_LEAD};
use crate::known::Made;

/// How many records are remembered. One takes some 500 bytes.
const CAPACITY: u64 = 50_000;

/// The memory. Clones share it.
#[derive(Clone, Debug)]
pub struct Applied(Cache<String, Age>);

impl Default for Applied {
    fn default() -> Self {
        Self(Cache::new(CAPACITY))
    }
}

impl Applied {
    /// The ages of the records that were found.
    pub fn ages(&self, found: &Found, stamps: &Stamps) -> Ages {
        let age = |id: &str, fields: &Fields, stamp: Option<&FieldId>| {
            let stored = age::stored(fields, stamp);
            match self.0.get(id) {
                Some(age) if age.stored == stored => age,
                // Someone else has written since, nobody knows what.
                Some(age) => Age { stored, record: stored, ..age },
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

    /// Remembers the ages of records; those that are new have got an id by now.
    pub fn remember(&self, ages: Ages, made: &Made) {
        for (id, age) in ages {
            let id = match id.as_str() {
                NEW_LEAD => made.lead.as_ref().map(ToString::to_string),
                NEW_CONTACT => made.contact.as_ref().map(ToString::to_string),
                _ => Some(id),
            };
            if let Some(id) = id {
                self.0.insert(id, age);
            }
        }
    }
}
