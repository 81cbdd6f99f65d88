//! A person who adds phones to Contacts in Close while workers change them.
//!
//! Close replaces a list as a whole and has no condition on a version. So a phone that was added between the last read of
//! a worker and its write is lost. No client can prevent this. Any other phone must stay: a worker reads again, right
//! before the write, what is older than a second.

use std::fmt::Write as _;
use std::time::Duration;

use close_sync_simulator::Offline;
use jiff::Timestamp;
use serde_json::{Value, json};

/// The API key of the person's session in Close, with rate limits of its own.
pub(super) const KEY: &str = "api_person.key";

/// What the phones of the person start with. No event has such a phone.
pub(super) const PHONES: &str = "+49309";

/// The time between the last read and the arrival of the write: the age at which a worker reads again, and the latencies.
const WINDOW: Duration = Duration::from_millis(1600);

/// The phones that the person added.
#[derive(Debug, Default)]
pub(super) struct Person {
    added: Vec<Added>,
    problems: String,
    /// How many phones were lost within [`WINDOW`].
    lost: usize,
}

#[derive(Debug)]
struct Added {
    contact: String,
    phone: String,
    at: Duration,
}

impl Person {
    /// Adds a phone to a Contact.
    pub(super) fn add_phone(
        &mut self,
        close: &mut Offline,
        contact: &Value,
        at: Duration,
        now: Timestamp,
    ) -> Option<String> {
        let id = contact["id"].as_str()?.to_owned();
        let phone = format!("{PHONES}{:05}", self.added.len() + self.lost);
        let mut phones = contact["phones"].as_array().cloned().unwrap_or_default();
        phones.push(json!({"phone": phone, "type": "office"}));
        let reply = close.ask(KEY, "PUT", &format!("contact/{id}/"), Some(&json!({"phones": phones})), now);
        if reply.status != 200 {
            return None;
        }
        let added = format!("{phone} to {id}");
        self.added.push(Added { contact: id, phone, at });
        Some(added)
    }

    /// Looks for phones that a write of a worker removed. `staleness` is how old a read by id can be.
    pub(super) fn check(&mut self, contacts: &[Value], at: Duration, staleness: Duration) {
        let has = |added: &Added| {
            let contact = contacts.iter().find(|contact| contact["id"] == added.contact.as_str());
            let phones = contact.and_then(|contact| contact["phones"].as_array()).into_iter().flatten();
            phones.into_iter().any(|entry| entry["phone"] == added.phone.as_str())
        };
        for lost in self.added.extract_if(.., |added| !has(added)) {
            let age = at.saturating_sub(lost.at);
            if age <= WINDOW + staleness {
                self.lost += 1;
            } else {
                let _ = writeln!(self.problems, "{}: lost {} after {age:?}", lost.contact, lost.phone);
            }
        }
    }

    /// How many phones were added, and how many of them were lost within [`WINDOW`].
    pub(super) fn count(&self) -> (usize, usize) {
        (self.added.len() + self.lost, self.lost)
    }

    /// All phones that were lost although a worker could have seen them.
    pub(super) fn problems(&self) -> &str {
        &self.problems
    }
}

/// The same Leads without the phones of the person.
pub(super) fn without_phones(mut leads: Vec<Value>) -> Vec<Value> {
    let contacts = leads.iter_mut().filter_map(|lead| lead["contacts"].as_array_mut()).flatten();
    for contact in contacts {
        if let Some(phones) = contact["phones"].as_array_mut() {
            phones.retain(|entry| !entry["phone"].as_str().is_some_and(|phone| phone.starts_with(PHONES)));
        }
    }
    leads
}
