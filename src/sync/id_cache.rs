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
/// In bytes, for each of the three caches: about 50,000 entries, or fewer with long keys. Keys come from messages.
const CAPACITY: u64 = 16 << 20;
/// What an entry takes beside its key and ids, in bytes.
const ENTRY: usize = 200;
/// The most Contacts of one key. Only few are updated, and a page of a search has no more.
const MAX_CONTACTS: usize = 100;

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

fn size(key: &Key) -> usize {
    match key {
        Key::Company(text) | Key::User(text) | Key::Email(text) => text.len(),
    }
}

impl Contacts {
    fn size(&self) -> usize {
        self.ids.iter().map(|id| size_of::<ContactId>() + id.as_str().len()).sum()
    }
}

fn weight(bytes: usize) -> u32 {
    u32::try_from(ENTRY.saturating_add(bytes)).unwrap_or(u32::MAX)
}

impl Default for IdCache {
    fn default() -> Self {
        // The most recent entries matter most, however often the others are read.
        Self {
            leads: Cache::builder()
                .weigher(|company_id: &String, id: &LeadId| weight(company_id.len() + id.as_str().len()))
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(LIFETIME)
                .build(),
            people: Cache::builder()
                .weigher(|key: &Key, contacts: &Contacts| weight(size(key) + contacts.size()))
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(LIFETIME)
                .build(),
            pending_creations: Cache::builder()
                .weigher(|key: &Key, _: &Instant| weight(size(key)))
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
            if contacts.ids.contains(&id) {
                continue;
            }
            if contacts.ids.len() < MAX_CONTACTS {
                contacts.ids.push(id);
            } else {
                contacts.complete = false;
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
    /// find it proves nothing. Returns the keys as they were before, for [`Self::complete_creation`].
    pub fn add_pending_creation(&self, keys: &[Key], until: Instant) -> Vec<(Key, Option<Instant>)> {
        let before = keys.iter().map(|key| (key.clone(), self.pending_creations.get(key))).collect();
        for key in keys {
            self.pending_creations.insert(key.clone(), until);
        }
        before
    }

    /// Close answered the creation. An earlier one with the same key stays pending.
    pub fn complete_creation(&self, before: Vec<(Key, Option<Instant>)>) {
        for (key, until) in before {
            match until {
                Some(until) => self.pending_creations.insert(key, until),
                None => self.pending_creations.invalidate(&key),
            }
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
    fn the_size_does_not_depend_on_what_messages_say() {
        let cache = IdCache::default();
        let key = |number: usize| Key::User(format!("{number:0>255}"));
        let ids =
            |number: usize| (0..number).map(|n| ContactId::new(format!("cont_{n:0>43}"))).collect::<Vec<_>>();
        for number in 0..5000 {
            cache.remember_contacts(key(number), ids(100), true);
            cache.add_pending_creation(&[key(number)], Instant::now());
        }
        cache.people.run_pending_tasks();
        assert!(cache.people.weighted_size() <= CAPACITY && cache.people.entry_count() < 2500);
        cache.pending_creations.run_pending_tasks();
        assert_eq!(cache.pending_creations.entry_count(), 5000);
        cache.remember_contacts(key(0), ids(MAX_CONTACTS + 1), true);
        let contacts = cache.contacts(&key(0));
        assert_eq!((contacts.ids.len(), contacts.complete), (MAX_CONTACTS, false));
    }

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
