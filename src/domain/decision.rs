//! Why a message had its effect: one value with the whole decision (`design.md` P7).
//!
//! The same record feeds the log line and the dead-letter header, as [`Decision::summary`], which has
//! nothing personal in it, and `close-sync plan`, which shows it whole.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::domain::dropped::Dropped;
use crate::domain::mapping::{Desired, Mapping};
use crate::domain::matching::{Case, Verdict};
use crate::domain::plan::{FieldPlan, FieldVerdict, Plan, RecordPlan, RecordRef};
use crate::domain::record::{ContactId, LeadId};

/// Longest summary, in characters: it travels in a header.
const MAX_SUMMARY: usize = 1000;
/// Most candidates in it.
const MAX_CANDIDATES: usize = 5;

/// The decision about one message: what was looked up, which rule applied, what follows from it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// What was asked, in order, and what came back.
    pub look_ups: Vec<LookUp>,
    /// The records that came into question.
    pub candidates: Vec<Candidate>,
    /// The rule that decided. None when the look-up failed before that.
    pub case: Option<Case>,
    /// What follows from it.
    pub plan: Plan,
    /// Values left out.
    pub dropped: Vec<Dropped>,
    /// Calls to Close, all tries together.
    pub calls: u32,
    /// It was looked up and written together with an earlier message.
    pub merged: bool,
    /// The Lead that was created.
    pub new_lead: Option<LeadId>,
    /// The Contact that was created.
    pub new_contact: Option<ContactId>,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookUp {
    /// The company's Lead was remembered from an earlier message.
    RememberedLead,
    /// All of the person's Contacts were remembered.
    RememberedContacts(usize),
    /// Leads were searched for by company id.
    SearchedLeads(usize),
    /// Contacts were searched for by user id and email.
    SearchedContacts(usize),
    /// A record was read by its id; a Lead comes with its Contacts.
    Read(String),
}

impl LookUp {
    pub fn description(&self) -> String {
        match self {
            Self::RememberedLead => "used the cached Lead of the company".into(),
            Self::RememberedContacts(found) => format!("used the cached Contacts of the person: {found}"),
            Self::SearchedLeads(found) => format!("searched Leads by company id: {found} found"),
            Self::SearchedContacts(found) => {
                format!("searched Contacts by user id and email: {found} found")
            }
            Self::Read(id) => format!("read {id}"),
        }
    }
}

/// A record that came into question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: String,
    /// What was made of it.
    pub verdict: Verdict,
}

impl Decision {
    /// The decision about another event, which was looked up together with this one.
    #[must_use]
    pub fn of_another(&self, event: &Desired, plan: Plan) -> Self {
        let dropped = event.dropped.iter().cloned().chain(plan.dropped()).collect();
        let (new_lead, new_contact) = (self.new_lead.clone(), self.new_contact.clone());
        Self { case: self.case, plan, dropped, merged: true, new_lead, new_contact, ..Self::default() }
    }

    /// The ids of the Leads and of the Contacts it is about, new ones included.
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

    /// Contacts with the event's email that were left alone.
    pub fn conflicts(&self) -> usize {
        self.candidates.iter().filter(|candidate| candidate.verdict == Verdict::SomebodyElse).count()
    }

    /// Whether no Contact has one of the person's keys.
    pub fn nobody_else(&self) -> bool {
        self.case == Some(Case::Nobody) && self.conflicts() == 0
    }

    /// All of it in one line without personal data: ids of records and names of fields, no values.
    pub fn summary(&self) -> String {
        let mut parts = vec![self.case.map_or("undecided", Case::label).to_owned()];
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
        // Last: there may be many, and what does not fit is cut.
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

/// What becomes of a field, in words with its values: for eyes that may see them.
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
        (FieldVerdict::Refused, _) => format!("{wanted} rejected by Close"),
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
