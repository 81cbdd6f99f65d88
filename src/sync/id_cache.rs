//! Bounded cache of ids by key. It saves searches and, above all, holds the records that we created or gave keys to while
//! search does not show them yet (`design.md` P2).
//!
//! An id is a candidate: the caller reads the record before it relies on it, because a Contact may have been moved, a Lead
//! merged. What a search has shown saves the next search for ten minutes; then another one finds records that people
//! created in Close. An id stays until the memory is full, or for [`LONGEST_SEARCH_LAG`]: after that, search
//! shows the record without it, and a deletion of the record may no longer be in the event log, which keeps 30 days
//! (`crate::close::deletion`). When a change that search has not shown yet is evicted, [`IdCache::evicted`] says so, and
//! "not found" proves nothing until search has shown something younger ([`crate::sync::lag_guard`]).

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use strum::VariantArray;
use tokio::time::Instant;

use crate::close::{CreatedIds, MOMENT};
use crate::domain::journal::{ChangeKind, KeyHash, RecordId};
use crate::domain::mapping::{Identity, Key};
use crate::domain::record::{ContactId, LeadId};
use crate::sync::lag_guard::LONGEST_SEARCH_LAG;
use crate::sync::layered::{Bounds, Layered};

/// How long a search need not be repeated.
const LIFETIME: Duration = Duration::from_mins(10);
/// In bytes: about 120,000 keys.
const CAPACITY: usize = 32 << 20;
/// What an entry takes beside its ids, in bytes.
const ENTRY: usize = 150;
/// What an id takes beside its text, in bytes.
const ID: usize = 80;
/// In bytes, of Contacts that are somebody else's: about 40,000.
const OTHERS_CAPACITY: usize = 8 << 20;
/// The most Contacts of one key. Only few are updated, and a page of a search has no more.
const MAX_CONTACTS: usize = 100;

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct IdCache {
    entries: Layered<KeyHash, Entry>,
    /// The user ids of Contacts that have an email of an event and another user id than the event. `None`: the Contact no
    /// longer has one, which in a rehearsal covers what the worker knows.
    others: Layered<ContactId, Option<KeyHash>>,
    /// What searches have shown before this no longer saves one.
    searched_since: Arc<Mutex<Option<Instant>>>,
    evicted: Arc<Mutex<Evicted>>,
}

/// By kind, the youngest change that was evicted before search had shown it.
type Evicted = [Option<Timestamp>; ChangeKind::VARIANTS.len()];

/// The Contacts cached for a user id or an email.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contacts {
    pub ids: Vec<ContactId>,
    /// A search has shown that these are all, so another search is not needed.
    pub complete: bool,
}

/// A record got keys from us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    pub kind: ChangeKind,
    pub at: Timestamp,
}

impl Change {
    /// Whether search, when it shows the change by this key, shows older changes of its kind. It shows emails sooner than
    /// custom fields.
    pub fn shows_lag(self, key: &Key) -> bool {
        self.kind == ChangeKind::Creation || !matches!(key, Key::Email(_))
    }
}

#[derive(Clone, Debug, Default)]
struct Entry {
    known: Vec<Known>,
    /// When a search has shown that these are all.
    complete: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Known {
    id: RecordId,
    /// The change that search has not shown yet.
    unseen: Option<Change>,
    /// When the record last was one with the key.
    since: Instant,
}

impl Known {
    fn new(id: RecordId) -> Self {
        Self { id, unseen: None, since: Instant::now() }
    }
}

impl Entry {
    fn without_expired(mut self) -> Self {
        self.known.retain(|known| known.since.elapsed() < LONGEST_SEARCH_LAG);
        self
    }

    fn weight(&self) -> usize {
        let ids: usize = self.known.iter().map(|known| ID.saturating_add(known.id.as_str().len())).sum();
        ENTRY.saturating_add(ids)
    }

    /// Puts a record that search does not show yet before the others. Returns whether there is room for it.
    fn put_first(&mut self, id: &RecordId, change: Change) -> bool {
        self.known.retain(|known| known.id != *id);
        if self.known.len() >= MAX_CONTACTS {
            self.complete = None;
            let Some(shown) = self.known.iter().rposition(|known| known.unseen.is_none()) else {
                return false;
            };
            self.known.remove(shown);
        }
        self.known.insert(0, Known { unseen: Some(change), ..Known::new(id.clone()) });
        true
    }

    fn unseen(&self) -> impl Iterator<Item = Change> {
        self.known.iter().filter_map(|known| known.unseen)
    }
}

impl Default for IdCache {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl IdCache {
    fn with_capacity(bytes: usize) -> Self {
        let evicted = Arc::<Mutex<Evicted>>::default();
        let changes = Arc::clone(&evicted);
        let note = move |entry: Entry| evict(&changes, entry.unseen());
        let bounds =
            Bounds { capacity: bytes, weight: |_: &KeyHash, entry: &Entry| entry.weight(), lifetime: None };
        let entries = Layered::with_listener(bounds, Some(Box::new(note)));
        let others = Layered::new(Bounds {
            capacity: OTHERS_CAPACITY,
            weight: |id: &ContactId, _| ENTRY.saturating_add(id.as_str().len()),
            lifetime: Some(LONGEST_SEARCH_LAG),
        });
        Self { entries, others, searched_since: Arc::default(), evicted }
    }

    /// A cache for a rehearsal: it knows what this one knows, and keeps what it learns for itself.
    pub(crate) fn for_rehearsal(&self) -> Self {
        let copy = Self::default();
        copy.searched_since.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.searched_since());
        *copy.evicted.lock().unwrap_or_else(PoisonError::into_inner) =
            *self.evicted.lock().unwrap_or_else(PoisonError::into_inner);
        Self { entries: copy.entries.over(&self.entries), others: copy.others.over(&self.others), ..copy }
    }

    fn searched_since(&self) -> Option<Instant> {
        *self.searched_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_fresh(&self, at: Option<Instant>) -> bool {
        let since = self.searched_since();
        at.is_some_and(|at| at.elapsed() < LIFETIME && since.is_none_or(|since| since < at))
    }

    fn entry(&self, key: KeyHash) -> Entry {
        self.entries.get(&key).unwrap_or_default().without_expired()
    }

    /// Changes the entry of a key, created if there is none.
    fn update(&self, key: KeyHash, with: impl FnOnce(&mut Entry)) {
        self.entries.update(key, |entry| {
            let mut entry = entry.unwrap_or_default().without_expired();
            with(&mut entry);
            entry
        });
    }

    /// The company's Lead, if no search for it is needed.
    pub fn lead(&self, company_id: &str) -> Option<LeadId> {
        let entry = self.entry(company(company_id));
        self.is_fresh(entry.complete).then(|| leads(&entry).next()).flatten()
    }

    /// The Leads that were the company's. Search may not show them yet.
    pub fn known_leads(&self, company_id: &str) -> Vec<LeadId> {
        leads(&self.entry(company(company_id))).collect()
    }

    /// The ids of the records that have one of the keys, or had it.
    pub fn known(&self, keys: &[KeyHash]) -> HashSet<String> {
        let known = keys.iter().flat_map(|key| self.entry(*key).known);
        known.map(|known| known.id.into()).collect()
    }

    /// Whether a record was given one of these keys, or was last seen with it, a moment ago. A read need not show that yet.
    pub(crate) fn has_just_got(&self, keys: &[Key], id: &str) -> bool {
        let is_new = |known: &Known| {
            known.id.as_str() == id && known.unseen.is_some() && known.since.elapsed() < MOMENT
        };
        let has_new = |key| self.entries.with(&KeyHash::of(key), |entry| entry.known.iter().any(is_new));
        keys.iter().filter_map(has_new).any(|has_new| has_new)
    }

    pub fn remember_lead(&self, company_id: &str, id: LeadId) {
        let id = RecordId::Lead(id);
        self.update(company(company_id), |entry| {
            let before = entry.known.iter().position(|known| known.id == id);
            let unseen = before.and_then(|at| entry.known.remove(at).unseen);
            entry.known.insert(0, Known { unseen, ..Known::new(id) });
            entry.complete = Some(Instant::now());
        });
    }

    /// The Lead is gone, or no longer the company's.
    pub fn forget_lead(&self, company_id: &str, id: &LeadId) {
        self.update(company(company_id), |entry| {
            entry.known.retain(|known| !matches!(&known.id, RecordId::Lead(known) if known == id));
            entry.complete = None;
        });
    }

    pub fn contacts(&self, key: &Key) -> Contacts {
        let entry = self.entry(KeyHash::of(key));
        let ids = entry.known.iter().filter_map(|known| match &known.id {
            RecordId::Contact(id) => Some(id.clone()),
            RecordId::Lead(_) => None,
        });
        Contacts { ids: ids.collect(), complete: self.is_fresh(entry.complete) }
    }

    /// Adds what a search found to what is cached: search does not show what was created a moment ago. Does not
    /// cache an empty answer, which proves nothing (close-api.md §6). `all`: the search cannot have missed one.
    pub fn remember_contacts(&self, key: Key, ids: Vec<ContactId>, all: bool) {
        if !ids.is_empty() {
            self.add(KeyHash::of(&key), ids.into_iter().map(RecordId::Contact), all);
        }
    }

    fn add(&self, key: KeyHash, ids: impl IntoIterator<Item = RecordId>, complete: bool) {
        self.update(key, |entry| {
            if complete {
                entry.complete = Some(Instant::now());
            }
            for id in ids {
                if let Some(known) = entry.known.iter_mut().find(|known| known.id == id) {
                    known.since = Instant::now();
                } else if entry.known.len() < MAX_CONTACTS {
                    entry.known.push(Known::new(id));
                } else {
                    entry.complete = None;
                }
            }
        });
    }

    /// Caches the records just created for a person. `only`: no other Contact has the person's keys.
    pub fn remember_created(&self, person: &Identity, created: CreatedIds, only: bool) {
        if let Some((company_id, lead)) = person.company_id.as_ref().zip(created.lead) {
            self.remember_lead(company_id, lead);
        }
        if let Some(contact) = created.contact {
            let id = RecordId::Contact(contact);
            person.person().for_each(|key| self.add(KeyHash::of(&key), [id.clone()], only));
        }
    }

    /// A record got these keys, or is about to get them. Search may not show it yet. Own changes matter more than what search
    /// shows.
    ///
    /// A key with many of them has no room for the record, which is found by its other keys: a shared email does not identify
    /// it. A new record that no key has room for is evicted. One that existed before has no need of the email. What is lost
    /// is that an event with nothing but the email may not see the record for a while, and sees only the others.
    pub fn changed(&self, keys: &[KeyHash], id: &RecordId, change: Change) {
        let mut has_room = keys.is_empty();
        for key in keys {
            self.update(*key, |entry| has_room |= entry.put_first(id, change));
        }
        if !has_room && change.kind == ChangeKind::Creation {
            evict(&self.evicted, [change].into_iter());
        }
    }

    /// A search for this key has shown the record. Returns the change that it had not shown before. Unless it is `certain` that
    /// search has found it by this key, only a creation counts: a new record is in the index with all its keys.
    pub fn seen(&self, key: &Key, id: &RecordId, certain: bool) -> Option<Change> {
        let key = KeyHash::of(key);
        let counts = |change: Change| certain || change.kind == ChangeKind::Creation;
        // Most records have nothing to note, and an update of the entry costs more.
        let is_seen = |known: &Known| known.id == *id && known.unseen.is_some_and(counts);
        if !self.entries.with(&key, |entry| entry.known.iter().any(is_seen)).unwrap_or_default() {
            return None;
        }
        let mut change = None;
        self.update(key, |entry| {
            let known = entry.known.iter_mut().find(|known| known.id == *id);
            change = known.and_then(|known| known.unseen.take_if(|change| counts(*change)));
        });
        change
    }

    /// The youngest change of each kind that was evicted before search had shown it, since the last call.
    pub fn evicted(&self) -> Vec<Change> {
        let evicted = std::mem::take(&mut *self.evicted.lock().unwrap_or_else(PoisonError::into_inner));
        let changes = ChangeKind::VARIANTS.iter().zip(evicted);
        changes.filter_map(|(kind, at)| Some(Change { kind: *kind, at: at? })).collect()
    }

    /// All changes that search has not shown yet, oldest first, with the keys that records got.
    pub fn unseen(&self) -> impl Iterator<Item = (Change, RecordId, Vec<KeyHash>)> + use<> {
        let mut unseen = BTreeMap::<(Timestamp, ChangeKind, RecordId), Vec<KeyHash>>::new();
        let entries = self.entries.filter_map(|key, entry| {
            let has_unseen = entry.unseen().next().is_some();
            has_unseen.then(|| (*key, entry.clone()))
        });
        for (key, entry) in entries {
            for Known { id, unseen: change, .. } in entry.without_expired().known {
                if let Some(Change { kind, at }) = change {
                    unseen.entry((at, kind, id)).or_default().push(key);
                }
            }
        }
        unseen.into_iter().map(|((at, kind, id), keys)| (Change { kind, at }, id, keys))
    }

    /// Another worker may have created records: what searches have shown so far may not be all.
    pub fn search_again(&self) {
        *self.searched_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The Contact is gone.
    pub fn forget_contact(&self, key: &Key, id: &ContactId) {
        self.update(KeyHash::of(key), |entry| {
            entry.known.retain(|known| !matches!(&known.id, RecordId::Contact(known) if known == id));
            entry.complete = None;
        });
    }

    /// Close shows a Contact that has the email of an event with this user id, or without one.
    pub(crate) fn shown_with(&self, id: &ContactId, user: Option<&str>) {
        let user = user.map(|user| KeyHash::of(&Key::User(user.to_owned())));
        let known = self.others.get(id);
        if known.flatten() != user {
            self.others.insert(id.clone(), user);
        }
    }

    /// Whether the Contact has another user id than the person, as far as is known. Then its email alone does not count, and it
    /// need not be read for each person with this email. A person who removes its user id is noticed when search shows that.
    pub(crate) fn is_somebody_else(&self, id: &ContactId, person: &Identity) -> bool {
        let known = self.others.get(id).flatten();
        known.zip(person.user()).is_some_and(|(known, user)| known != KeyHash::of(&user))
    }

    /// There may be more Contacts with the key than are cached.
    pub fn search_again_for(&self, key: &Key) {
        self.update(KeyHash::of(key), |entry| entry.complete = None);
    }
}

fn evict(evicted: &Mutex<Evicted>, changes: impl Iterator<Item = Change>) {
    for Change { kind, at } in changes {
        let youngest = &mut evicted.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize];
        *youngest = (*youngest).max(Some(at));
    }
}

fn company(id: &str) -> KeyHash {
    KeyHash::of(&Key::Company(id.to_owned()))
}

fn leads(entry: &Entry) -> impl Iterator<Item = LeadId> {
    entry.known.iter().filter_map(|known| match &known.id {
        RecordId::Lead(id) => Some(id.clone()),
        RecordId::Contact(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn creation(second: i64) -> Change {
        Change { kind: ChangeKind::Creation, at: at(second) }
    }

    #[test]
    fn the_size_does_not_depend_on_what_messages_say() {
        let cache = IdCache::with_capacity(1 << 20);
        let key = |number: usize| Key::User(format!("{number:0>255}"));
        let ids =
            |number: usize| (0..number).map(|n| ContactId::new(format!("cont_{n:0>43}"))).collect::<Vec<_>>();
        for number in 0..5000 {
            cache.remember_contacts(key(number), ids(100), true);
        }
        let weights = cache.entries.filter_map(|_, entry| Some(entry.weight()));
        assert!(weights.iter().sum::<usize>() <= 1 << 20 && weights.len() < 100);
        assert_eq!(cache.evicted(), [], "search shows them");
        cache.remember_contacts(key(0), ids(MAX_CONTACTS + 1), true);
        let contacts = cache.contacts(&key(0));
        assert_eq!((contacts.ids.len(), contacts.complete), (MAX_CONTACTS, false));
    }

    #[test]
    fn what_is_evicted_before_search_has_shown_it_is_reported() {
        let cache = IdCache::with_capacity(100 << 10);
        let key = |number: i64| Key::User(number.to_string());
        let id = RecordId::Contact(ContactId::new("cont_1"));
        for number in 0..1000 {
            cache.changed(&[KeyHash::of(&key(number))], &id, creation(number));
            if number % 2 == 0 {
                assert_eq!(cache.seen(&key(number), &id, false), Some(creation(number)));
                assert_eq!(cache.seen(&key(number), &id, true), None, "seen before");
            }
        }
        let (oldest, ..) = cache.unseen().next().unwrap();
        let Change { at, .. } = oldest;
        assert!(at > creation(1).at);
        assert_eq!(cache.evicted(), [Change { at: at - SignedDuration::from_secs(2), ..oldest }]);
        assert_eq!(cache.evicted(), [], "once");
    }

    #[test]
    fn a_record_that_one_key_has_no_room_for_is_found_by_another() {
        let (cache, shared) = (IdCache::default(), Key::Email("info@x.test".into()));
        let id = |number: usize| RecordId::Contact(ContactId::new(format!("cont_{number}")));
        cache.remember_contacts(shared.clone(), vec![ContactId::new("cont_0")], true);
        let change = |number, keys: &[Key]| cache.changed(&KeyHash::of_all(keys), &id(number), creation(5));
        for number in 1..=MAX_CONTACTS + 1 {
            change(number, &[Key::User(number.to_string()), shared.clone()]);
        }
        let last = Key::User((MAX_CONTACTS + 1).to_string());
        assert_eq!(cache.contacts(&last).ids, [ContactId::new("cont_101")]);
        let of_all = cache.contacts(&shared);
        assert_eq!((of_all.ids.len(), of_all.complete), (MAX_CONTACTS, false));
        let is_listed = |id: &str| of_all.ids.contains(&ContactId::new(id));
        assert_eq!(["cont_0", "cont_1", "cont_101"].map(is_listed), [false, true, false]);
        assert_eq!((cache.evicted(), cache.unseen().count()), (vec![], MAX_CONTACTS + 1));

        change(MAX_CONTACTS + 2, std::slice::from_ref(&shared));
        assert_eq!(cache.evicted(), [creation(5)], "it has no other key");
        let change = Change { kind: ChangeKind::KeyChange, at: at(6) };
        cache.changed(&[KeyHash::of(&shared)], &id(1000), change);
        assert_eq!(cache.evicted(), [], "it is known by its user id");
    }

    #[test]
    fn a_key_that_a_record_got_later_is_shown_only_by_a_search_that_found_it_by_this_key() {
        let cache = IdCache::default();
        let (key, id) = (Key::User("u1".into()), RecordId::Contact(ContactId::new("cont_1")));
        let got = Change { kind: ChangeKind::KeyChange, at: at(5) };
        cache.changed(&[KeyHash::of(&key)], &id, got);
        assert_eq!(cache.seen(&key, &id, false), None);
        assert_eq!(cache.unseen().count(), 1);
        assert_eq!(cache.seen(&key, &id, true), Some(got));
        assert_eq!(cache.unseen().count(), 0);
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
        cache.forget_contact(&key(), &id("cont_0"));
        let ids = vec![id("cont_1"), id("cont_2")];
        assert_eq!(cache.contacts(&key()), Contacts { ids, complete: false });
    }

    /// Search shows the record by then. If it was deleted more than 30 days ago, nothing in Close shows it.
    #[tokio::test(start_paused = true)]
    async fn an_id_is_forgotten_when_search_must_show_the_record() {
        let (cache, id) = (IdCache::default(), || LeadId::new("lead_1"));
        cache.changed(&[company("acme")], &RecordId::Lead(id()), creation(1));
        tokio::time::advance(LONGEST_SEARCH_LAG.saturating_sub(Duration::from_secs(1))).await;
        assert_eq!((cache.known_leads("acme"), cache.unseen().count()), (vec![id()], 1));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((cache.known_leads("acme"), cache.unseen().count()), (vec![], 0));
        assert_eq!(cache.evicted(), [], "nothing is evicted");
        let (jane, contact) = (|| Key::User("jane".into()), || ContactId::new("cont_1"));
        for _ in 0..3 {
            cache.remember_contacts(jane(), vec![contact()], true);
            tokio::time::advance(LONGEST_SEARCH_LAG / 2).await;
        }
        assert_eq!(cache.contacts(&jane()).ids, [contact()], "found again meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn ids_outlive_the_search_that_showed_them() {
        let cache = IdCache::default();
        let key = || Key::User("u1".into());
        let both = |cache: &IdCache| (cache.lead("acme"), cache.contacts(&key()).complete);
        let remember = || {
            cache.remember_lead("acme", LeadId::new("lead_1"));
            cache.remember_contacts(key(), vec![ContactId::new("cont_1")], true);
        };
        remember();
        assert_eq!(both(&cache), (Some(LeadId::new("lead_1")), true));
        tokio::time::advance(LIFETIME).await;
        assert_eq!(both(&cache), (None, false));
        remember();
        tokio::time::advance(Duration::from_secs(1)).await;
        cache.search_again();
        assert_eq!(both(&cache), (None, false));
        assert_eq!(cache.known_leads("acme"), [LeadId::new("lead_1")]);
        assert_eq!(cache.contacts(&key()).ids, [ContactId::new("cont_1")]);
    }
}
