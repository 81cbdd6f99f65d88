//! Bounded cache of ids from earlier messages. It saves searches and, above all, holds the records just created
//! while search does not show them yet (`design.md` P2). It also holds pending creations: those whose answer was
//! lost, whatever happened to their message.
//!
//! The caller reads a record before it relies on a cached id: a Contact may have been moved, a Lead merged. An
//! entry lives ten minutes at most; then a search finds records that people created in Close.

use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::time::Instant;

use crate::close::CreatedIds;
use crate::domain::mapping::{Identity, Key};
use crate::domain::record::{ContactId, LeadId};

const LIFETIME: Duration = Duration::from_mins(10);
/// In companies, and in people. An entry takes about 200 bytes.
const CAPACITY: u64 = 50_000;

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct IdCache {
    leads: Cache<String, LeadId>,
    people: Cache<Key, Contacts>,
    pending_creations: Cache<Key, Instant>,
}

/// The Contacts cached for a user id or an email.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contacts {
    pub ids: Vec<ContactId>,
    /// A search has shown that these are all, so another search is not needed.
    pub complete: bool,
}

impl Default for IdCache {
    fn default() -> Self {
        // The most recent entries matter most, however often the others are read.
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
    pub fn lead(&self, company_id: &str) -> Option<LeadId> {
        self.leads.get(company_id)
    }

    pub fn remember_lead(&self, company_id: &str, id: LeadId) {
        self.leads.insert(company_id.to_owned(), id);
    }

    pub fn forget_lead(&self, company_id: &str) {
        self.leads.invalidate(company_id);
    }

    pub fn contacts(&self, key: &Key) -> Contacts {
        self.people.get(key).unwrap_or_default()
    }

    /// Adds what a search found to what is cached: search does not show what was created a moment ago. Does not
    /// cache an empty answer, which proves nothing (close-api.md §6). `all`: the search cannot have missed one.
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

    /// Caches the records just created for a person. `only`: no other Contact has the person's keys.
    pub fn remember_created(&self, person: &Identity, created: CreatedIds, only: bool) {
        if let Some((company_id, lead)) = person.company_id.as_ref().zip(created.lead) {
            self.remember_lead(company_id, lead);
        }
        if let Some(contact) = created.contact {
            person.person().for_each(|key| self.add(key, vec![contact.clone()], only));
        }
    }

    /// Forgets all records: another worker may have created more of them. Pending creations stay.
    pub fn forget_records(&self) {
        self.leads.invalidate_all();
        self.people.invalidate_all();
    }

    /// A record with these keys may have been created without an answer. Until then, a search that does not
    /// find it proves nothing.
    pub fn add_pending_creation(&self, keys: &[Key], until: Instant) {
        for key in keys {
            self.pending_creations.insert(key.clone(), until);
        }
    }

    /// Close answered the creation.
    pub fn complete_creation(&self, keys: &[Key]) {
        for key in keys {
            self.pending_creations.invalidate(key);
        }
    }

    /// Until when search may miss a record with these keys.
    pub fn pending_until(&self, keys: &[Key]) -> Option<Instant> {
        keys.iter().filter_map(|key| self.pending_creations.get(key)).max()
    }

    pub fn forget_contacts(&self, key: &Key) {
        self.people.invalidate(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn created_contacts_add_to_the_cache_and_empty_answers_do_not() {
        let cache = IdCache::default();
        let key = || Key::Email("j@x.test".into());
        let person = Identity { email: Some("j@x.test".into()), ..Identity::default() };
        let id = |id: &str| ContactId::new(id);
        let created = |contact: &str| CreatedIds { lead: None, contact: Some(id(contact)) };
        cache.remember_contacts(key(), vec![], true);
        assert_eq!(cache.contacts(&key()), Contacts::default());
        cache.remember_created(&person, created("cont_1"), false);
        assert_eq!(cache.contacts(&key()), Contacts { ids: vec![id("cont_1")], complete: false });
        cache.remember_contacts(key(), vec![id("cont_0")], true);
        cache.remember_created(&person, created("cont_2"), false);
        cache.remember_created(&person, created("cont_1"), false);
        let ids = vec![id("cont_1"), id("cont_0"), id("cont_2")];
        assert_eq!(
            cache.contacts(&key()),
            Contacts { ids, complete: true },
            "search may not list cont_1 yet"
        );
        cache.forget_contacts(&key());
        assert_eq!(cache.contacts(&key()), Contacts::default());
    }
}
