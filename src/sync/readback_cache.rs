//! Bounded cache of how Close keeps what it is sent: see [`crate::domain::readback`].

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::domain::matching::Found;
use crate::domain::phone::Country;
use crate::domain::readback::{Answers, Difference, Readback};

/// In records with such a value. An entry takes about 300 bytes.
const CAPACITY: u64 = 50_000;

/// Clones share the entries.
#[derive(Clone, Debug)]
pub struct ReadbackCache {
    records: Cache<String, Answers>,
    country: Arc<Mutex<Option<Country>>>,
    /// The fields that were logged. The configuration names them, so there are few.
    logged: Arc<Mutex<HashSet<String>>>,
}

impl Default for ReadbackCache {
    fn default() -> Self {
        let records = Cache::builder().max_capacity(CAPACITY).eviction_policy(EvictionPolicy::lru()).build();
        Self { records, country: Arc::default(), logged: Arc::default() }
    }
}

impl ReadbackCache {
    /// What is known about the records found.
    pub fn about(&self, found: &Found) -> Readback {
        let (leads, contacts) = found.records();
        let ids = leads.map(|lead| lead.id.as_str()).chain(contacts.map(|contact| contact.id.as_str()));
        let records = ids.filter_map(|id| Some((id.to_owned(), self.records.get(id)?))).collect();
        Readback { country: self.country(), records }
    }

    /// Caches what an answer shows about a record.
    pub fn learn(&self, record: &str, differences: &[Difference]) {
        if differences.is_empty() {
            return;
        }
        let mut answers = self.records.get(record).unwrap_or_default();
        answers.learn(differences);
        self.records.insert(record.to_owned(), answers);
    }

    /// Whether a field is reported for the first time.
    pub fn is_first_of(&self, field: &str) -> bool {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).insert(field.to_owned())
    }

    /// The country of the organization, once it is known.
    pub fn country(&self) -> Option<Country> {
        *self.country.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Close says the country of the organization.
    pub fn start_with(&self, country: Option<Country>) {
        if let Some(country) = country {
            self.set_country(country);
        }
    }

    /// Returns whether the country was another before.
    pub fn set_country(&self, country: Country) -> bool {
        self.country.lock().unwrap_or_else(PoisonError::into_inner).replace(country) != Some(country)
    }
}
