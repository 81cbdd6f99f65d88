//! The decision about a message: what was looked up, which rule applied and what follows (`design.md` P7).
//!
//! The log line and the dead-letter header contain the [`Decision::summary`], which has no personal data. `close-sync
//! plan` shows the whole decision.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::domain::dropped::Dropped;
use crate::domain::journal::RecordId;
use crate::domain::mapping::{Desired, Mapping};
use crate::domain::matching::{Case, Verdict};
use crate::domain::plan::{FieldPlan, FieldVerdict, Plan, RecordPlan, RecordRef};
use crate::domain::record::{ContactId, LeadId};

/// The maximum length of a summary in characters. It must fit a header.
const MAX_SUMMARY: usize = 1000;
/// The maximum number of candidates in a summary.
const MAX_CANDIDATES: usize = 5;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The look-ups with their results, in order.
    pub look_ups: Vec<LookUp>,
    /// The records that the look-ups found.
    pub candidates: Vec<Candidate>,
    /// The rule that applied. `None` when a look-up failed.
    pub case: Option<Case>,
    pub plan: Plan,
    /// Values that were left out.
    pub dropped: Vec<Dropped>,
    /// Calls to Close, in all attempts.
    pub calls: u32,
    /// The message was looked up and written together with an earlier one.
    pub merged: bool,
    /// The message says what was last applied, so nothing was looked up.
    pub repeats: bool,
    /// Of a dry run: the worker would wait until search shows earlier changes, and look up again.
    pub awaits_search: bool,
    /// The created Lead.
    pub new_lead: Option<LeadId>,
    /// The created Contact.
    pub new_contact: Option<ContactId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookUp {
    /// The id cache had the Lead of the company.
    CachedLead,
    /// The id cache had all Contacts of the person: how many.
    CachedContacts(usize),
    /// Leads were searched by company id: how many were found.
    SearchedLeads(usize),
    /// Contacts were searched by user id and email: how many were found.
    SearchedContacts(usize),
    /// A record was read by its id, a Lead with its Contacts.
    Read(String),
}

impl LookUp {
    pub fn description(&self) -> String {
        match self {
            Self::CachedLead => "used the cached Lead of the company".into(),
            Self::CachedContacts(found) => format!("used the cached Contacts of the person: {found}"),
            Self::SearchedLeads(found) => format!("searched Leads by company id: {found} found"),
            Self::SearchedContacts(found) => {
                format!("searched Contacts by user id and email: {found} found")
            }
            Self::Read(id) => format!("read {id}"),
        }
    }
}

/// A record that a look-up found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub id: String,
    /// Whether it matches, and why.
    pub verdict: Verdict,
}

impl Decision {
    /// The decision about another event that was merged with this one.
    #[must_use]
    pub fn for_merged_event(&self, event: &Desired, plan: Plan) -> Self {
        let dropped = event.dropped.iter().cloned().chain(plan.dropped()).collect();
        let (new_lead, new_contact) = (self.new_lead.clone(), self.new_contact.clone());
        Self { case: self.case, plan, dropped, merged: true, new_lead, new_contact, ..Self::default() }
    }

    /// The ids of the Leads and of the Contacts in the plan, including new ones.
    pub fn records(&self) -> (BTreeSet<&str>, BTreeSet<&str>) {
        let (mut leads, mut contacts) = (BTreeSet::new(), BTreeSet::new());
        for record in &self.plan.records {
            match &record.record {
                RecordRef::Lead(id) | RecordRef::NewContact(Some(id)) => leads.insert(id.as_str()),
                RecordRef::Contact(id) => contacts.insert(id.as_str()),
                RecordRef::NewLead | RecordRef::NewContact(None) => false,
            };
        }
        leads.extend(self.new_lead.as_ref().map(LeadId::as_str));
        contacts.extend(self.new_contact.as_ref().map(ContactId::as_str));
        (leads, contacts)
    }

    /// The Lead of the event's company, or of a new Contact.
    pub fn lead(&self) -> Option<LeadId> {
        let of_plan = self.plan.records.iter().find_map(|record| match &record.record {
            RecordRef::Lead(id) | RecordRef::NewContact(Some(id)) => Some(id.clone()),
            RecordRef::NewLead | RecordRef::NewContact(None) | RecordRef::Contact(_) => None,
        });
        of_plan.or_else(|| self.new_lead.clone())
    }

    /// The decision about an event that repeats what was applied to these records.
    pub fn repeat(records: impl IntoIterator<Item = RecordId>) -> Self {
        let records = records.into_iter().map(|record| RecordPlan {
            record: match record {
                RecordId::Lead(id) => RecordRef::Lead(id),
                RecordId::Contact(id) => RecordRef::Contact(id),
            },
            name: None,
            refused: None,
            fields: Vec::new(),
        });
        let plan = Plan { records: records.collect(), ..Plan::default() };
        Self { plan, repeats: true, ..Self::default() }
    }

    /// The number of Contacts that have the email of the event but belong to a different person.
    pub fn conflicts(&self) -> usize {
        self.candidates.iter().filter(|candidate| candidate.verdict == Verdict::DifferentPerson).count()
    }

    /// Whether no Contact has a key of the person.
    pub fn is_new_person(&self) -> bool {
        self.case == Some(Case::NoMatch) && self.conflicts() == 0
    }

    /// The decision in one line without personal data. It has record ids and field names but no values.
    pub fn summary(&self) -> String {
        let undecided = if self.repeats { "says what was applied before" } else { "undecided" };
        let mut parts = vec![self.case.map_or(undecided, Case::label).to_owned()];
        parts.extend(self.merged.then(|| "with the message before it".to_owned()));
        let mut part = |title: &str, items: Vec<String>| {
            if !items.is_empty() {
                parts.push(format!("{title}: {}", items.join(", ")));
            }
        };
        part("steps", self.plan.records.iter().filter_map(step).collect());
        part("stale", self.plan.stale().map(str::to_owned).collect());
        part("refused", self.plan.refused.iter().map(|refusal| refusal.label().to_owned()).collect());
        part("dropped", self.dropped.iter().map(|d| format!("{} {}", d.field, d.reason.label())).collect());
        parts.push(format!("calls: {}", self.calls));
        // Last, because there may be many and the end of a long summary is cut off.
        let mut candidates: Vec<String> =
            self.candidates.iter().map(|c| format!("{} {}", c.id, c.verdict.label())).collect();
        let more = candidates.len().saturating_sub(MAX_CANDIDATES);
        candidates.truncate(MAX_CANDIDATES);
        candidates.extend((more > 0).then(|| format!("and {more} more")));
        if !candidates.is_empty() {
            parts.push(format!("candidates: {}", candidates.join(", ")));
        }
        parts.join("; ").chars().take(MAX_SUMMARY).collect()
    }
}

/// Describes the change of a field with its values, which may be personal data.
pub fn change(field: &FieldPlan, mapping: &Mapping) -> String {
    let shown = |value: &Value| mapping.shown(&field.field, value).to_string();
    let wanted = shown(&field.wanted);
    let before = field.before.as_ref().map(shown);
    match (field.verdict, before) {
        (FieldVerdict::Set, Some(before)) => format!("{before} -> {wanted}"),
        (FieldVerdict::Set, None) => wanted,
        (FieldVerdict::Appended, Some(before)) => format!("{before} + {wanted}"),
        (FieldVerdict::Appended, None) => format!("+ {wanted}"),
        (FieldVerdict::Same, _) => format!("{wanted} (unchanged)"),
        (FieldVerdict::NotEmpty, before) => {
            format!("keeps {}, not {wanted} (if_empty)", before.unwrap_or_default())
        }
        (FieldVerdict::OnlyOnCreate, before) => {
            format!(
                "{}, not {wanted} (on_create)",
                before.map_or_else(|| "stays empty".into(), |before| format!("keeps {before}"))
            )
        }
        (FieldVerdict::Stale, before) => {
            format!("keeps {}, set by a newer event, not {wanted}", before.unwrap_or_default())
        }
        (FieldVerdict::ListFull, _) => format!("{wanted} not added: the list is full"),
        (FieldVerdict::ListUnknown, _) => format!("{wanted} not added: Close did not show the list"),
        (FieldVerdict::Rewritten, before) => {
            format!("keeps {}, the form in which Close stores {wanted}", before.unwrap_or_default())
        }
        (FieldVerdict::NotKept, Some(before)) => format!("{before}, because Close does not keep {wanted}"),
        (FieldVerdict::NotKept, None) => format!("{wanted} not written: Close does not keep it"),
        (FieldVerdict::Refused, _) => format!("{wanted} rejected by Close"),
        (FieldVerdict::RefusedTogether, _) => {
            format!("{wanted} not written: Close rejected the write without naming a field")
        }
        (FieldVerdict::RefusedBefore, _) => format!("{wanted} not sent: Close rejected it before"),
    }
}

fn step(record: &RecordPlan) -> Option<String> {
    let fields: Vec<&str> = record.written().map(|field: &FieldPlan| field.field.as_str()).collect();
    let fields = fields.join(" ");
    if record.refused.is_some() {
        return None;
    }
    match &record.record {
        RecordRef::NewLead => Some(format!("create lead ({fields})")),
        RecordRef::NewContact(None) => Some(format!("with contact ({fields})")),
        RecordRef::NewContact(Some(lead)) => Some(format!("add contact to {lead} ({fields})")),
        RecordRef::Lead(_) | RecordRef::Contact(_) if fields.is_empty() => None,
        RecordRef::Lead(id) => Some(format!("update {id} ({fields})")),
        RecordRef::Contact(id) => Some(format!("update {id} ({fields})")),
    }
}
