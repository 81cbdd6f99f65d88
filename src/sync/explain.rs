//! Explains what an event would do to Close, and why, for people and for scripts. Contains personal data.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::domain::decision::{self, Decision, LookUp};
use crate::domain::dropped::{DropReason, Dropped};
use crate::domain::encoding::Payload;
use crate::domain::mapping::{Key, Mapping};
use crate::domain::matching::Case;
use crate::domain::plan::{RecordPlan, RecordRef, Refusal};
use crate::domain::record::LeadId;
use crate::outcome::{DelayCause, Outcome, PauseCause};
use crate::sync::{Prepared, ReceivedAt, Rehearsal};
use crate::text::choices;

/// The outcome of an event that cannot succeed.
pub const DEAD: &str = "dead-lettered";

/// What the worker would wait for, in words.
pub const WAITS_FOR_SEARCH: &str =
    "would wait until Close's search shows earlier changes, then look up again; the plan may change";

/// The explanation of one event. The fields without `skip` are the JSON of `plan --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// An effect, `skipped` or [`DEAD`].
    pub outcome: &'static str,
    /// Why the event would be skipped or dead-lettered, from a closed list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The label of the matching rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// The description of the rule.
    #[serde(skip)]
    pub rule_in_words: Option<&'static str>,
    /// `search` where the worker would wait until Close's search shows earlier changes, and then look up again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<&'static str>,
    /// The look-ups in order, cached and from Close.
    pub look_ups: Vec<String>,
    /// The records that were considered.
    pub candidates: Vec<Candidate>,
    /// The records that the event is about.
    pub records: Vec<Record>,
    /// The values that would not be written.
    pub left_out: Vec<LeftOut>,
    /// The number of calls to Close that the explanation took.
    pub calls: u32,
    /// Whether anything would be written.
    #[serde(skip)]
    pub writes: bool,
}

/// A record that was considered.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    pub id: String,
    /// The label of the verdict.
    pub verdict: &'static str,
    /// The description of the verdict.
    #[serde(skip)]
    pub in_words: &'static str,
}

/// A value that would not be written.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// The name of the field in Close's API.
    pub field: String,
    /// The reason, from a closed list.
    pub reason: &'static str,
    pub value: Option<Value>,
    /// A line for people with field, value and reason.
    #[serde(skip)]
    pub in_words: String,
}

/// A Lead or Contact, with the planned changes.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// `create lead`, `update contact`, or `lead` if nothing changes.
    pub action: &'static str,
    /// The id of the record. For a new Contact, the id of its Lead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub name: Option<String>,
    /// The switch that forbids the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forbidden: Option<&'static str>,
    /// The fields for which the event has a value.
    pub fields: Vec<Field>,
}

/// A field of a record.
#[derive(Clone, Debug, Serialize)]
pub struct Field {
    /// The name in Close's API.
    #[serde(rename = "field")]
    pub key: String,
    /// The name that Close shows to people.
    #[serde(skip)]
    pub label: String,
    /// The value in Close.
    pub before: Option<Value>,
    /// The value of the event.
    pub event: Value,
    /// The label of the verdict on the field.
    pub verdict: &'static str,
    /// The change as text for people.
    #[serde(skip)]
    pub change: String,
}

/// Why an event could not be planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unplanned {
    /// The look-up failed, also after retries.
    Delayed(DelayCause),
    /// Close cannot be used.
    Paused(PauseCause),
}

impl fmt::Display for Unplanned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delayed(cause) => write!(f, "could not be planned: {cause}"),
            Self::Paused(cause) => write!(
                f,
                "could not be planned, because Close cannot be used: {}\nhint: run `close-sync check` for details",
                cause.label()
            ),
        }
    }
}

/// Plans an event with the code of the worker, without writing. Returns the keys of the event too.
///
/// # Errors
/// When a look-up fails.
pub async fn dry_run(
    rehearsal: &Rehearsal,
    event: Payload<'_>,
    received_at: ReceivedAt,
) -> Result<(Vec<Key>, Explanation), Unplanned> {
    let (keys, outcome, decision) = match rehearsal.prepare(event, received_at) {
        Prepared::Settled(outcome) => (Vec::new(), outcome, Decision::default()),
        Prepared::Job(job) => {
            let (outcome, decision) = rehearsal.run(&job).await;
            (job.keys(), outcome, decision)
        }
    };
    Ok((keys, Explanation::new(outcome, &decision, &rehearsal.mapping())?))
}

impl Explanation {
    fn new(outcome: Outcome, decision: &Decision, mapping: &Mapping) -> Result<Self, Unplanned> {
        let (outcome, reason, error) = match outcome {
            Outcome::Synced(effect) => (effect.label(), None, None),
            Outcome::Skipped(skip) => ("skipped", Some(skip.label()), None),
            Outcome::Dead(dead) => (DEAD, Some(dead.reason.label()), Some(dead.error)),
            Outcome::Delayed { cause, .. } => return Err(Unplanned::Delayed(cause)),
            Outcome::Paused(cause) => return Err(Unplanned::Paused(cause)),
        };
        let candidate = |candidate: &decision::Candidate| Candidate {
            id: candidate.id.clone(),
            verdict: candidate.verdict.label(),
            in_words: candidate.verdict.description(),
        };
        Ok(Self {
            outcome,
            reason,
            error,
            rule: decision.case.map(Case::label),
            rule_in_words: decision.case.map(Case::description),
            waits_for: decision.awaits_search.then_some("search"),
            look_ups: decision.look_ups.iter().map(LookUp::description).collect(),
            candidates: decision.candidates.iter().map(candidate).collect(),
            records: decision.plan.records.iter().map(|record| Record::new(record, mapping)).collect(),
            left_out: decision.dropped.iter().map(|dropped| LeftOut::new(dropped, mapping)).collect(),
            calls: decision.calls,
            writes: !decision.plan.steps.is_empty(),
        })
    }
}

impl LeftOut {
    fn new(dropped: &Dropped, mapping: &Mapping) -> Self {
        let Dropped { field, reason, value } = dropped;
        let shown = value.as_ref().map_or_else(|| "an object".to_owned(), Value::to_string);
        let label = mapping.label(field);
        let of = if label == *field { String::new() } else { format!(" ({field})") };
        let fits = match reason {
            DropReason::NotAChoice | DropReason::NoSuchUser => choices("choices", &mapping.choices(field)),
            DropReason::NotAValue => match value {
                Some(Value::Array(_)) => " (`normalize = [\"join\"]` makes a list one text)".to_owned(),
                _ => String::new(),
            },
            DropReason::Placeholder
            | DropReason::UnreadableTime
            | DropReason::InvalidEmail
            | DropReason::InvalidPhone
            | DropReason::InvalidUrl
            | DropReason::NotANumber
            | DropReason::NotADate
            | DropReason::NotAnId
            | DropReason::UnknownField
            | DropReason::TooLong
            | DropReason::ListFull
            | DropReason::ListUnknown
            | DropReason::Refused
            | DropReason::RefusedBefore
            | DropReason::NotKept
            | DropReason::Rewritten => String::new(),
        };
        let in_words = format!("{label}{of}: {shown}, {}{fits}", reason.description());
        Self { field: field.clone(), reason: reason.label(), value: value.clone(), in_words }
    }
}

impl Record {
    fn new(record: &RecordPlan, mapping: &Mapping) -> Self {
        let writes = record.written().next().is_some();
        let (action, id) = match &record.record {
            RecordRef::NewLead => ("create lead", None),
            RecordRef::NewContact(lead) => ("create contact", lead.as_ref().map(LeadId::to_string)),
            RecordRef::Lead(id) => (if writes { "update lead" } else { "lead" }, Some(id.to_string())),
            RecordRef::Contact(id) => {
                (if writes { "update contact" } else { "contact" }, Some(id.to_string()))
            }
        };
        Self {
            action,
            id,
            name: record.name.clone(),
            forbidden: record.refused.map(Refusal::label),
            fields: record
                .fields
                .iter()
                .map(|field| Field {
                    key: field.field.clone(),
                    label: mapping.label(&field.field),
                    before: field.before.clone(),
                    event: field.wanted.clone(),
                    verdict: field.verdict.label(),
                    change: decision::change(field, mapping),
                })
                .collect(),
        }
    }
}
