//! Bounded cache of how Close keeps what it is sent: see [`crate::domain::readback`].
//!
//! A value that Close did not keep is tried again after some hours, when the fields in Close have changed, and when an
//! operator replays a message about the record.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::matching::Found;
use crate::domain::phone::Country;
use crate::domain::readback::{Answers, Difference, Readback};
use crate::sync::layered::{Bounds, Layered};

/// In records with such a value. An entry takes about 300 bytes.
const CAPACITY: usize = 50_000;
/// How long a value that Close did not keep is not sent again. What Close keeps may change without a change of the fields.
const LIFETIME: Duration = Duration::from_hours(6);

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct ReadbackCache {
    records: Layered<String, Entry>,
    /// Values that were not kept before this time are tried again.
    not_kept_since: Arc<Mutex<Option<Instant>>>,
    country: Arc<Mutex<Option<Country>>>,
    /// The fields that were logged. The configuration names them, so there are few.
    logged: Arc<Mutex<HashSet<String>>>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    answers: Answers,
    /// When the first value was not kept.
    not_kept_at: Option<Instant>,
}

impl Default for ReadbackCache {
    fn default() -> Self {
        let records = Layered::new(Bounds::entries(CAPACITY));
        Self { records, not_kept_since: Arc::default(), country: Arc::default(), logged: Arc::default() }
    }
}

/// A value of its own.
fn copy<T: Clone>(shared: &Mutex<T>) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(shared.lock().unwrap_or_else(PoisonError::into_inner).clone()))
}

impl ReadbackCache {
    /// A cache for a rehearsal: it knows what this one knows, and keeps what it learns for itself.
    pub(crate) fn for_rehearsal(&self) -> Self {
        Self {
            records: Self::default().records.over(&self.records),
            not_kept_since: copy(&self.not_kept_since),
            country: copy(&self.country),
            logged: copy(&self.logged),
        }
    }

    /// What is known about the records found.
    pub fn about(&self, found: &Found) -> Readback {
        let records = ids(found).filter_map(|id| Some((id.to_owned(), self.get(id)?.answers))).collect();
        Readback { country: self.country(), records }
    }

    /// Caches what an answer shows about a record.
    pub fn learn(&self, record: &str, differences: &[Difference]) {
        if differences.is_empty() {
            return;
        }
        let Entry { mut answers, not_kept_at } = self.get(record).unwrap_or_default();
        answers.learn(differences);
        let not_kept_at = answers.has_not_kept().then(|| not_kept_at.unwrap_or_else(Instant::now));
        self.records.insert(record.to_owned(), Entry { answers, not_kept_at });
    }

    /// Whether Close keeps a value of this record in another form, or does not keep it.
    pub(crate) fn differs(&self, id: &str) -> bool {
        self.get(id).is_some()
    }

    /// All values that were not kept are tried again.
    pub fn forget_not_kept(&self) {
        *self.not_kept_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The same for the records found.
    pub fn forget_not_kept_of(&self, found: &Found) {
        for id in ids(found) {
            if let Some(Entry { mut answers, .. }) = self.records.get(id) {
                answers.forget_not_kept();
                self.records.insert(id.to_owned(), Entry { answers, not_kept_at: None });
            }
        }
    }

    /// The entry of a record, without the answers that no longer count.
    fn get(&self, id: &str) -> Option<Entry> {
        let mut entry = self.records.get(id)?;
        let since = *self.not_kept_since.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = |at: Instant| at.elapsed() < LIFETIME && since.is_none_or(|since| since <= at);
        if !entry.not_kept_at.is_some_and(counts) {
            entry.not_kept_at = None;
            entry.answers.forget_not_kept();
        }
        Some(entry)
    }

    /// Whether a field is reported for the first time.
    pub fn is_first_of(&self, field: &str) -> bool {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).insert(field.to_owned())
    }

    /// The country of the organization, once it is known.
    pub fn country(&self) -> Option<Country> {
        *self.country.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The country that the configuration or Close names. What an answer has shown is better evidence, and stays.
    pub fn start_with(&self, country: Option<Country>) {
        let mut known = self.country.lock().unwrap_or_else(PoisonError::into_inner);
        *known = known.or(country);
    }

    /// Returns whether the country was another before.
    pub fn set_country(&self, country: Country) -> bool {
        self.country.lock().unwrap_or_else(PoisonError::into_inner).replace(country) != Some(country)
    }
}

fn ids(found: &Found) -> impl Iterator<Item = &str> {
    let (leads, contacts) = found.records();
    leads.map(|lead| lead.id.as_str()).chain(contacts.map(|contact| contact.id.as_str()))
}
