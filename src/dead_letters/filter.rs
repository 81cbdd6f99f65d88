//! Selects dead letters.

use std::collections::BTreeSet;

use jiff::Timestamp;
use uuid::Uuid;

use crate::dead_letters::letter::DeadLetter;
use crate::domain::encoding::Payload;
use crate::domain::mapping::Rules;
use crate::domain::record::fold_email;
use crate::outcome::Reason;

/// The dead letters of an operation. By default, all of them.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    pub filter: Filter,
    /// The maximum number of dead letters, oldest failure first.
    pub limit: Option<usize>,
}

/// A dead letter matches if all conditions hold. An empty condition always holds.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Any of these reasons.
    pub reasons: Vec<Reason>,
    /// Any of these fingerprints, or of these first parts of one: `rejected`, `rejected:write`.
    pub fingerprints: Vec<String>,
    /// Exactly this fingerprint.
    pub group: Option<String>,
    /// Any of these ids.
    pub ids: BTreeSet<String>,
    /// Any of these ids of the producer.
    pub message_ids: BTreeSet<String>,
    /// [`DeadLetter::content_id`].
    pub content: Option<Uuid>,
    /// Dead-lettered at this time or later.
    pub since: Option<Timestamp>,
    /// Dead-lettered at this time or earlier.
    pub until: Option<Timestamp>,
    /// About this person or company.
    pub identity: Option<IdentityFilter>,
}

/// Matches the ids in the event of a dead letter.
#[derive(Clone, Debug)]
pub struct IdentityFilter {
    /// Find the ids in the event.
    pub rules: Rules,
    pub user_id: Option<String>,
    pub company_id: Option<String>,
    /// Compared without regard to case.
    pub email: Option<String>,
}

impl From<Filter> for Selection {
    fn from(filter: Filter) -> Self {
        Self { filter, limit: None }
    }
}

impl Filter {
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let has_reason = |reason: &Reason| Some(reason.label()) == letter.reason.as_deref();
        let has_fingerprint = |prefix: &String| {
            letter
                .fingerprint
                .strip_prefix(prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        };
        (self.reasons.is_empty() || self.reasons.iter().any(has_reason))
            && (self.fingerprints.is_empty() || self.fingerprints.iter().any(has_fingerprint))
            && self.group.as_ref().is_none_or(|group| *group == letter.fingerprint)
            && (self.ids.is_empty() || self.ids.contains(&letter.id))
            && (self.message_ids.is_empty()
                || letter.message_id.as_ref().is_some_and(|id| self.message_ids.contains(id)))
            && self.since.is_none_or(|since| letter.failed_at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.failed_at.is_some_and(|at| at <= until))
            && self.identity.as_ref().is_none_or(|identity| identity.matches(letter.payload()))
            && self.content.is_none_or(|content| letter.content_id() == content)
    }
}

impl IdentityFilter {
    fn matches(&self, payload: Payload<'_>) -> bool {
        let Some(ids) = self.rules.event_ids(payload) else { return false };
        let is_equal =
            |wanted: &Option<String>, actual: &Option<String>| wanted.is_none() || wanted == actual;
        let email = self.email.as_deref().map(fold_email);
        is_equal(&self.user_id, &ids.user_id)
            && is_equal(&self.company_id, &ids.company_id)
            && is_equal(&email, &ids.email)
    }
}
