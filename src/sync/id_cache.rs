//! What earlier messages taught us about ids: a bounded memory that spares searches and, above all,
//! remembers the records just created while search does not list them yet (`design.md` P2). It also
//! remembers which creations were never answered, whatever became of the message that asked for them.
//!
//! Nothing in here is believed without reading the record: a Contact may have been moved, a Lead
//! merged. An entry lives ten minutes at most, so that a record somebody made by hand in Close is
//! found by the search that follows.

use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::time::Instant;

use crate::domain::mapping::{Identity, Key};
use crate::domain::record::{ContactId, LeadId};

/// How long an entry is used.
const LIFETIME: Duration = Duration::from_mins(10);
/// How many companies and how many people are remembered. An entry takes about 200 bytes.
const CAPACITY: u64 = 50_000;

/// The memory. Clones share it.
#[derive(Clone, Debug)]
pub struct IdCache {
    leads: Cache<String, LeadId>,
    people: Cache<Key, Contacts>,
    pending_creations: Cache<Key, Instant>,
}

/// The Contacts remembered for a user id or an email.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contacts {
    /// Their ids.
    pub ids: Vec<ContactId>,
    /// Whether a search has found that these are all: then another search can be spared.
    pub complete: bool,
}

/// The records a step made, or gave the keys of a person or a company.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreatedIds {
    /// The Lead that is the company's from now on.
    pub lead: Option<LeadId>,
    /// The person's Contact.
    pub contact: Option<ContactId>,
}

impl Default for IdCache {
    fn default() -> Self {
        // What was learnt last matters most, however often the rest was asked for.
        Self {
            leads: Cache::builder()
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(LIFETIME)
                .build(),
            people: Cache::builder()
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(LIFETIME)
                .build(),
            pending_creations: Cache::builder()
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .build(),
        }
    }
}

impl IdCache {
    /// The Lead of a company.
    pub fn lead(&self, company_id: &str) -> Option<LeadId> {
        self.leads.get(company_id)
    }

    /// Remembers the Lead of a company.
    pub fn remember_lead(&self, company_id: &str, id: LeadId) {
        self.leads.insert(company_id.to_owned(), id);
    }

    /// Forgets the Lead of a company: it turned out wrong.
    pub fn forget_lead(&self, company_id: &str) {
        self.leads.invalidate(company_id);
    }

    /// The Contacts of a person.
    pub fn contacts(&self, key: &Key) -> Contacts {
        self.people.get(key).unwrap_or_default()
    }

    /// Remembers what a search found for a person, beside what is remembered already: search does not
    /// list what was made a moment ago. An empty answer is not remembered: it proves nothing
    /// (close-api.md §6).
    /// `all`: it cannot have missed one.
    pub fn remember_contacts(&self, key: Key, ids: Vec<ContactId>, all: bool) {
        if !ids.is_empty() {
            self.add(key, ids, all);
        }
    }

    fn add(&self, key: Key, ids: Vec<ContactId>, complete: bool) {
        let mut contacts = self.contacts(&key);
        contacts.complete |= complete;
        for id in ids {
            if !contacts.ids.contains(&id) {
                contacts.ids.push(id);
            }
        }
        self.people.insert(key, contacts);
    }

    /// Remembers what was just made for a person. `only`: no Contact has their keys but this one.
    pub fn remember_created(&self, person: &Identity, made: CreatedIds, only: bool) {
        if let Some((company_id, lead)) = person.company_id.as_ref().zip(made.lead) {
            self.remember_lead(company_id, lead);
        }
        if let Some(contact) = made.contact {
            person.person().for_each(|key| self.add(key, vec![contact.clone()], only));
        }
    }

    /// Forgets all records: somebody else may have made more of them meanwhile. Doubts stay.
    pub fn forget_records(&self) {
        self.leads.invalidate_all();
        self.people.invalidate_all();
    }

    /// A record with these keys may have been created without our knowing: until then, nothing found
    /// by search is proof that it was not.
    pub fn add_pending_creation(&self, keys: &[Key], until: Instant) {
        for key in keys {
            self.pending_creations.insert(key.clone(), until);
        }
    }

    /// The creation was answered: what there is, is known.
    pub fn complete_creation(&self, keys: &[Key]) {
        for key in keys {
            self.pending_creations.invalidate(key);
        }
    }

    /// Until when records with these keys are in doubt.
    pub fn pending_until(&self, keys: &[Key]) -> Option<Instant> {
        keys.iter().filter_map(|key| self.pending_creations.get(key)).max()
    }

    /// Forgets the Contacts of a person: one turned out wrong.
    pub fn forget_contacts(&self, key: &Key) {
        self.people.invalidate(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_contact_joins_what_is_known_and_an_empty_answer_is_no_knowledge() {
        let known = IdCache::default();
        let key = || Key::Email("j@x.test".into());
        let person = Identity { email: Some("j@x.test".into()), ..Identity::default() };
        let id = |id: &str| ContactId::new(id);
        let made = |contact: &str| CreatedIds { lead: None, contact: Some(id(contact)) };
        known.remember_contacts(key(), vec![], true);
        assert_eq!(known.contacts(&key()), Contacts::default());
        known.remember_created(&person, made("cont_1"), false);
        assert_eq!(known.contacts(&key()), Contacts { ids: vec![id("cont_1")], complete: false });
        known.remember_contacts(key(), vec![id("cont_0")], true);
        known.remember_created(&person, made("cont_2"), false);
        known.remember_created(&person, made("cont_1"), false);
        let ids = vec![id("cont_1"), id("cont_0"), id("cont_2")];
        assert_eq!(
            known.contacts(&key()),
            Contacts { ids, complete: true },
            "search may not list cont_1 yet"
        );
        known.forget_contacts(&key());
        assert_eq!(known.contacts(&key()), Contacts::default());
    }
}
