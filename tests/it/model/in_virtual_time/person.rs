//! A person who changes records in Close while workers write to them, and the law that nothing of it is lost.
//!
//! Close replaces a list as a whole and has no condition on a version. So no client can keep what a person does between its
//! last read of a record and the arrival of its write. A worker reads again, right before the write, what is older than a
//! second. So each write must be right for the record as it was at some moment of the last [`WINDOW`], longer by the lag of
//! reads:
//!
//! - A list is that of the moment, entry by entry in its order, and then values of messages that are not settled. So what a
//!   person added or moved stays, and what a person removed does not come back, unless a message has it.
//! - A field is one that events set. An id was empty at that moment.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt::Write as _;
use std::time::Duration;

use close_sync_simulator::Offline;
use jiff::Timestamp;
use serde_json::{Value, json};

/// The API key of the person's session in Close, with rate limits of its own.
pub(super) const KEY: &str = "api_person.key";

/// What the phones of the person start with. No event has such a phone.
const PHONES: &str = "+49309";

/// What the emails of the person end with. No event has such an email.
const EMAILS: &str = "@person.test";

/// The lists of a Contact, and the key of the value in an entry.
const LISTS: [(&str, &str); 3] = [("emails", "email"), ("phones", "phone"), ("urls", "url")];

const USER: &str = "custom.cf_contactuserid";
const COMPANY: &str = "custom.cf_leadcompanyid";

/// The time between the last read and the arrival of the write: the age at which a worker reads again, and the latencies.
const WINDOW: Duration = Duration::from_millis(1600);

/// What a person dares to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Changes nothing that events write, so that the result is that of the events.
    Careful,
    /// Changes and deletes anything.
    Free,
}

#[derive(Debug, Default)]
pub(super) struct Person {
    /// By record, the states that were replaced, each with the time until which it lasted. The latest is the last.
    past: HashMap<String, VecDeque<(Duration, Value)>>,
    /// By a value of a list in lower case, the messages that have it.
    carried: HashMap<String, BTreeSet<usize>>,
    edits: usize,
    /// Writes that undid an edit within the window.
    undone: usize,
    has_merged: bool,
    /// Contacts whose user id the person has taken away.
    without_user: BTreeSet<String>,
    deletions: u32,
    problems: String,
}

/// A call of the person, and the record that it changes.
struct Edit {
    method: &'static str,
    path: String,
    body: Value,
    record: String,
}

impl Edit {
    fn put(kind: &str, record: &str, body: Value) -> Self {
        let path = format!("{kind}/{record}/");
        Self { method: "PUT", path, body, record: record.to_owned() }
    }
}

fn entries(record: &Value, list: &str) -> Vec<Value> {
    record[list].as_array().cloned().unwrap_or_default()
}

fn is_theirs(entry: &Value) -> bool {
    let starts = |key: &str, start| entry[key].as_str().is_some_and(|text| text.starts_with(start));
    let is_their_email = entry["email"].as_str().is_some_and(|text| text.ends_with(EMAILS));
    is_their_email || starts("phone", PHONES) || starts("url", "http://theirs")
}

impl Person {
    /// A message was published that has these values for lists.
    pub(super) fn published(&mut self, number: usize, values: impl IntoIterator<Item = String>) {
        for value in values {
            self.carried.entry(value.to_lowercase()).or_default().insert(number);
        }
    }

    /// Does something to a Contact or its Lead. Returns the call.
    pub(super) fn act(
        &mut self,
        close: &mut Offline,
        contact: &Value,
        manner: Manner,
        random: &mut fastrand::Rng,
        (at, now): (Duration, Timestamp),
    ) -> Option<String> {
        let edit = self.draw(close, contact, manner, random)?;
        let before = close.record(&edit.record)?;
        let Edit { method, path, body, record } = edit;
        let reply = close.ask(KEY, method, &path, Some(&body), now);
        if reply.status != 200 {
            return None;
        }
        self.edits += 1;
        let merges = path == "lead/merge/";
        self.has_merged |= merges;
        self.deletions += u32::from(merges || method == "DELETE");
        if body.get(USER).is_some() {
            self.without_user.insert(record.clone());
        }
        self.replaced(&record, before, at);
        Some(format!("{method} {path} {body}"))
    }

    fn draw(
        &self,
        close: &Offline,
        contact: &Value,
        manner: Manner,
        random: &mut fastrand::Rng,
    ) -> Option<Edit> {
        let (id, lead) = (contact["id"].as_str()?, contact["lead_id"].as_str()?);
        let (list, key) = LISTS[random.usize(..LISTS.len())];
        let mut entries = entries(contact, list);
        let number = self.edits;
        let text = if random.bool() { json!(format!("theirs {number}")) } else { Value::Null };
        let actions = match manner {
            Manner::Careful => 7,
            Manner::Free => 14,
        };
        match random.u8(..actions) {
            0..2 => {
                let value = match key {
                    "email" => format!("theirs{number}{EMAILS}"),
                    "phone" => format!("{PHONES}{number:05}"),
                    _ => format!("http://theirs{number}.test"),
                };
                entries.push(json!({key: value, "type": "home"}));
            }
            2..4 => {
                let theirs: Vec<usize> = (0..entries.len()).filter(|at| is_theirs(&entries[*at])).collect();
                entries.remove(random.choice(theirs)?);
            }
            4 if !entries.is_empty() => entries.rotate_left(1),
            4 | 5 => return Some(Edit::put("contact", id, json!({"name": text}))),
            6 => return Some(Edit::put("lead", lead, json!({"description": text}))),
            7 | 8 => drop(entries.remove(random.choice(0..entries.len())?)),
            9 => return Some(Edit::put("contact", id, json!({"title": text}))),
            10 => return Some(Edit::put("lead", lead, json!({"name": text}))),
            11 => return Some(Edit::put("contact", id, json!({USER: null}))),
            12 => return Some(Edit::put("lead", lead, json!({COMPANY: null}))),
            _ if random.bool() => {
                let edit = Edit::put("contact", id, json!({}));
                return Some(Edit { method: "DELETE", ..edit });
            }
            _ => {
                let leads = close.leads();
                let others =
                    leads.iter().filter_map(|other| other["id"].as_str()).filter(|other| *other != lead);
                let other = random.choice(others.collect::<Vec<_>>())?;
                let body = json!({"source": lead, "destination": other});
                return Some(Edit {
                    method: "POST",
                    path: "lead/merge/".into(),
                    body,
                    record: lead.to_owned(),
                });
            }
        }
        let entry = |entry: &Value| json!({key: entry[key], "type": entry["type"]});
        let entries: Vec<Value> = entries.iter().map(entry).collect();
        Some(Edit::put("contact", id, json!({list: entries})))
    }

    /// A record was another until now.
    pub(super) fn replaced(&mut self, record: &str, before: Value, at: Duration) {
        self.past.entry(record.to_owned()).or_default().push_back((at, before));
    }

    /// Checks a write of a worker that took effect, after [`Self::replaced`]. `staleness` is how old a read by id can be.
    pub(super) fn check(
        &mut self,
        record: &str,
        body: &Value,
        unsettled: &[usize],
        at: Duration,
        staleness: Duration,
    ) {
        let Some(past) = self.past.get_mut(record) else { return };
        while past.front().is_some_and(|(until, _)| *until + WINDOW + staleness < at) {
            past.pop_front();
        }
        let carried = &self.carried;
        let is_right = |(_, moment): &(Duration, Value)| {
            let mut body = body.as_object().into_iter().flatten();
            body.all(|(key, value)| allows(carried, unsettled, (record, moment), (key, value)))
        };
        if !past.iter().any(is_right) {
            let past: Vec<String> =
                past.iter().map(|(until, record)| format!("until {until:?}: {record}")).collect();
            let _ = writeln!(
                self.problems,
                "{record} at {at:?}: {body} undoes edits; it was\n  {}",
                past.join("\n  ")
            );
        } else if !past.back().is_some_and(is_right) {
            self.undone += 1;
        }
    }

    /// How many edits there were, and how many writes undid one within the window.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.edits, self.undone)
    }

    /// All writes that were not right.
    pub(super) fn problems(&self) -> &str {
        &self.problems
    }

    /// How many records were deleted, also by merging them.
    pub(super) fn deletions(&self) -> u32 {
        self.deletions
    }

    /// The Contacts whose user id the person has taken away.
    pub(super) fn without_user(&self) -> &BTreeSet<String> {
        &self.without_user
    }

    /// Whether Leads were merged. One may then have two Contacts of a person.
    pub(super) fn has_merged(&self) -> bool {
        self.has_merged
    }
}

/// Whether a write may set a key of a record that was so at a moment.
fn allows(
    carried: &HashMap<String, BTreeSet<usize>>,
    unsettled: &[usize],
    (record, moment): (&str, &Value),
    (key, value): (&str, &Value),
) -> bool {
    if let Some((list, item)) = LISTS.into_iter().find(|(list, _)| *list == key) {
        let pairs = |record: &Value| -> Vec<(Value, Value)> {
            entries(record, list).iter().map(|entry| (entry[item].clone(), entry["type"].clone())).collect()
        };
        let (before, written) = (pairs(moment), pairs(&json!({list: value})));
        let is_carried = |value: &Value| {
            let messages = value.as_str().and_then(|value| carried.get(&value.to_lowercase()));
            messages.is_some_and(|messages| unsettled.iter().any(|number| messages.contains(number)))
        };
        let added = written.strip_prefix(&before[..]);
        return added.is_some_and(|added| added.iter().all(|(value, _)| is_carried(value)));
    }
    match key {
        USER | COMPANY => moment[key].is_null() || moment[key] == *value,
        "title" | "custom.cf_contactsyncedat" | "custom.cf_leadsyncedat" => true,
        "name" => record.starts_with("lead_"),
        _ => false,
    }
}

/// The same Leads without the entries of the person.
pub(super) fn without_theirs(mut leads: Vec<Value>) -> Vec<Value> {
    let contacts = leads.iter_mut().filter_map(|lead| lead["contacts"].as_array_mut()).flatten();
    for contact in contacts {
        for (list, _) in LISTS {
            if let Some(entries) = contact[list].as_array_mut() {
                entries.retain(|entry| !is_theirs(entry));
            }
        }
    }
    leads
}
