//! What keeps replayed events from overwriting newer values ([`crate::domain::staleness`]).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use strum::IntoStaticStr;

use crate::dead_letters::letter::DeadLetter;
use crate::domain::event::Event;
use crate::domain::mapping::Rules;

/// What shows whether a value of an event is older than the value in Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Guard {
    /// The worker knows from the journal when each field was written.
    FieldTimes,
    /// Each record stores the time of its last event.
    StoredTime,
    /// When the record last changed in Close: an event that is older than that changes no field.
    LastChange,
}

/// Dead letters by what guards newer values against them.
pub type GuardCounts = BTreeMap<Guard, usize>;

/// What decides which guard holds for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guards {
    /// Leads and Contacts store the time of their last event.
    pub stores_times: bool,
    /// What events of this time or later have written is in the journal. `None` without a journal.
    pub remembered_from: Option<Timestamp>,
}

impl Guards {
    pub fn new(rules: &Rules, remembered_from: Option<Timestamp>) -> Self {
        let stores_times = rules.lead.synced_at.is_some() && rules.contact.synced_at.is_some();
        Self { stores_times, remembered_from }
    }

    /// `None` if the body is not an event: it writes nothing.
    pub fn of(&self, letter: &DeadLetter) -> Option<Guard> {
        let body = letter.decoded().ok()?;
        let event = Event::read(&*body).ok()?;
        let at = letter.received_at().event_time(event.time());
        Some(match self.remembered_from {
            Some(from) if at >= from => Guard::FieldTimes,
            _ if self.stores_times => Guard::StoredTime,
            _ => Guard::LastChange,
        })
    }

    /// Lines for operators: which guard holds for how many.
    pub fn describe(&self, counts: &GuardCounts) -> Vec<String> {
        let reach = match self.remembered_from {
            Some(from) => format!("older than the journal ({} UTC)", from.strftime("%Y-%m-%d %H:%M")),
            None => "without a journal".to_owned(),
        };
        let line = |(guard, count): (&Guard, &usize)| match guard {
            Guard::FieldTimes => {
                format!("{count} from the time of the journal: fields that a newer event wrote stay")
            }
            Guard::StoredTime => {
                format!("{count} {reach}: fields of a record that stores a newer time stay")
            }
            Guard::LastChange => format!(
                "{count} {reach}: non-empty fields of a record that has changed in Close since the event stay"
            ),
        };
        counts.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use lapin::BasicProperties;

    use super::Guard::{FieldTimes, LastChange, StoredTime};
    use super::*;

    #[test]
    fn the_age_of_the_event_decides_which_guard_holds() {
        let letter = |body: &str| DeadLetter::from_parts(BasicProperties::default(), body.into());
        let old = letter(r#"{"type":"identify","timestamp":"2026-01-31T09:00:00Z"}"#);
        let new = letter(r#"{"type":"identify","timestamp":"2026-02-02T09:00:00Z"}"#);
        let undated = letter(r#"{"type":"identify"}"#);
        let from = Some("2026-02-01T09:00:00Z".parse().unwrap());
        let guards = |stores_times, remembered_from| {
            let guards = Guards { stores_times, remembered_from };
            [&old, &new, &undated].map(|letter| guards.of(letter).unwrap())
        };
        assert_eq!(guards(false, from), [LastChange, FieldTimes, FieldTimes]);
        assert_eq!(guards(true, from), [StoredTime, FieldTimes, FieldTimes]);
        assert_eq!(guards(true, None), [StoredTime; 3]);
        assert_eq!(guards(false, None), [LastChange; 3]);
        let guards = Guards { stores_times: true, remembered_from: from };
        assert_eq!(["hello", "[]"].map(|body| guards.of(&letter(body))), [None; 2]);
    }
}
