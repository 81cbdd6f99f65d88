//! Groups dead letters that failed with the same error.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use crate::dead_letters::letter::{BROKER_FINGERPRINT, DeadLetter};
use crate::outcome::Reason;

/// Dead letters with the same fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    pub fingerprint: String,
    /// `None` if RabbitMQ dead-lettered them.
    pub reason: Option<&'static str>,
    pub count: usize,
    /// Those that were replayed before.
    pub failed_again: usize,
    /// When the oldest was dead-lettered.
    pub first: Option<Timestamp>,
    /// When the newest was dead-lettered.
    pub last: Option<Timestamp>,
    /// The id of the newest.
    pub example: String,
    /// The error of the newest.
    pub error: Option<String>,
    pub remedy: &'static str,
}

/// Groups by fingerprint.
#[derive(Default)]
pub struct Groups(BTreeMap<String, Group>);

impl Groups {
    pub fn add(&mut self, letter: &DeadLetter) {
        let fingerprint = &letter.fingerprint;
        let group = self.0.entry(fingerprint.clone()).or_insert_with(|| Group::of(fingerprint));
        group.count += 1;
        group.failed_again += usize::from(letter.replays > 0);
        if let Some(at) = letter.failed_at {
            group.first = Some(group.first.map_or(at, |first| first.min(at)));
        }
        if letter.failed_at >= group.last {
            group.last = letter.failed_at;
            group.example.clone_from(&letter.id);
            group.error.clone_from(&letter.error);
        }
    }

    /// The largest group first.
    pub fn sorted(self) -> Vec<Group> {
        let mut groups: Vec<_> = self.0.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.count));
        groups
    }
}

/// What the operator can do about dead letters with this fingerprint.
pub fn remedy(fingerprint: &str) -> &'static str {
    match reason_of(fingerprint) {
        Some(reason) => reason.remedy(),
        None if fingerprint.starts_with(BROKER_FINGERPRINT) => {
            "RabbitMQ dead-lettered them; its reason is the middle part of the fingerprint. Check the limits and \
             policies of the queue, then replay"
        }
        None => "another version of close-sync wrote this reason; look at one of them, then replay",
    }
}

impl Group {
    fn of(fingerprint: &str) -> Self {
        Self {
            fingerprint: fingerprint.to_owned(),
            reason: reason_of(fingerprint).map(Reason::label),
            count: 0,
            failed_again: 0,
            first: None,
            last: None,
            example: String::new(),
            error: None,
            remedy: remedy(fingerprint),
        }
    }
}

fn reason_of(fingerprint: &str) -> Option<Reason> {
    fingerprint.split(':').next()?.parse().ok()
}
