//! Which dead letters are meant, and what they have in common. Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::dead_letters::letter::{BY_THE_BROKER, DeadLetter};
use crate::domain::mapping::Rules;
use crate::domain::record::fold_email;
use crate::outcome::Reason;

/// Which dead letters are meant. By default, all of them.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Those it matches,
    pub filter: Filter,
    /// and of these so many at most, those first that failed first.
    pub limit: Option<usize>,
}

/// What dead letters have to be like: all of it holds. Empty, it matches all of them.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Any of these reasons.
    pub reasons: Vec<Reason>,
    /// Any of these fingerprints, or of what begins with one of them.
    pub fingerprints: Vec<String>,
    /// Exactly this fingerprint.
    pub group: Option<String>,
    /// Any of these ids.
    pub ids: BTreeSet<String>,
    /// Any of these ids of producers.
    pub message_ids: BTreeSet<String>,
    /// Exactly this content.
    pub content: Option<Uuid>,
    /// Dead-lettered at this time or later.
    pub since: Option<Timestamp>,
    /// Dead-lettered at this time or before.
    pub until: Option<Timestamp>,
    /// About this person or company.
    pub identity: Option<IdentityFilter>,
}

/// The ids in an event, as its mapping reads them.
#[derive(Clone, Debug)]
pub struct IdentityFilter {
    /// How that is found out.
    pub rules: Rules,
    /// The user id.
    pub user_id: Option<String>,
    /// The company id.
    pub company_id: Option<String>,
    /// The email, in any case.
    pub email: Option<String>,
}

impl From<Filter> for Selection {
    fn from(filter: Filter) -> Self {
        Self { filter, limit: None }
    }
}

impl Filter {
    /// Whether it matches a dead letter.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let reason = || self.reasons.iter().any(|reason| Some(reason.label()) == letter.reason.as_deref());
        let alike = |wanted: &String| {
            letter
                .fingerprint
                .strip_prefix(wanted)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        };
        (self.reasons.is_empty() || reason())
            && (self.fingerprints.is_empty() || self.fingerprints.iter().any(alike))
            && self.group.as_ref().is_none_or(|group| *group == letter.fingerprint)
            && (self.ids.is_empty() || self.ids.contains(&letter.id))
            && (self.message_ids.is_empty()
                || letter.message_id.as_ref().is_some_and(|id| self.message_ids.contains(id)))
            && self.since.is_none_or(|since| letter.failed_at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.failed_at.is_some_and(|at| at <= until))
            && self.identity.as_ref().is_none_or(|identity| identity.matches(&letter.body))
            && self.content.is_none_or(|content| letter.content() == content)
    }
}

impl IdentityFilter {
    fn matches(&self, body: &[u8]) -> bool {
        let Some(whom) = self.rules.event_ids(body) else { return false };
        let same = |wanted: &Option<String>, is: &Option<String>| wanted.is_none() || wanted == is;
        let email = self.email.as_deref().map(fold_email);
        same(&self.user_id, &whom.user_id)
            && same(&self.company_id, &whom.company_id)
            && same(&email, &whom.email)
    }
}

/// Dead letters that failed alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// `reason:stage:field`.
    pub fingerprint: String,
    /// The reason, unless the broker put them here by itself.
    pub reason: Option<&'static str>,
    /// How many.
    pub count: usize,
    /// How many of them were replayed before, and failed again.
    pub failed_again: usize,
    /// When the first was dead-lettered.
    pub first: Option<Timestamp>,
    /// When the last was.
    pub last: Option<Timestamp>,
    /// The id of the last.
    pub example: String,
    /// What happened to it.
    pub error: Option<String>,
    /// What to do about them.
    pub remedy: &'static str,
}

/// Dead letters, by what they have in common.
#[derive(Default)]
pub struct Groups(BTreeMap<String, Group>);

impl Groups {
    /// Counts one.
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

    /// The most frequent first.
    pub fn sorted(self) -> Vec<Group> {
        let mut groups: Vec<_> = self.0.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.count));
        groups
    }
}

/// What to do about dead letters that failed like this.
pub fn remedy(fingerprint: &str) -> &'static str {
    match reason_of(fingerprint) {
        Some(reason) => reason.remedy(),
        None if fingerprint.starts_with(BY_THE_BROKER) => {
            "RabbitMQ gave up on them (its reason is the middle part of the name): look at the queue's limits \
             and policies, and replay"
        }
        None => "another version of close-sync wrote this reason: look at one, and replay",
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

/// The reason a fingerprint begins with.
fn reason_of(fingerprint: &str) -> Option<Reason> {
    fingerprint.split(':').next()?.parse().ok()
}
