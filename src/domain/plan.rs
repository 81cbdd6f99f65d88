//! What an event does to Close: the steps, and for each record and field what happens and why.

use std::collections::BTreeSet;

use serde_json::Value;
use strum::{IntoStaticStr, VariantArray};

use crate::domain::dropped::{DropReason, Dropped, excerpt};
use crate::domain::mapping::{Desired, KeyFields, WriteRule};
use crate::domain::record::{Contact, ContactId, Field, FieldId, Fields, LeadId, Lists, merge_changes};
use crate::domain::refused::RefusedValues;
use crate::domain::staleness::{FieldHash, RecordVersions, SyncedAtFields};

/// Stands for the id of a Lead that is not created yet.
pub const NEW_LEAD: &str = "new lead";
/// Stands for the id of a Contact that is not created yet.
pub const NEW_CONTACT: &str = "new contact";

/// Values for a Contact: all of them for a new one, only the changes for an existing one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContactValues {
    pub fields: Fields,
    /// Complete lists: Close replaces a list that is sent (close-api.md §5).
    pub lists: Lists,
}

impl ContactValues {
    pub(crate) fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.lists.is_empty()
    }

    /// Adds later changes. Later values win; a list in a change is complete.
    pub(crate) fn extend(&mut self, later: &Self) {
        merge_changes(&mut self.fields, &later.fields);
        self.lists.extend(later.lists.clone());
    }

    /// The Contact that a step with these values creates.
    pub(crate) fn new_contact(&self, lead: &LeadId) -> Contact {
        Contact {
            id: ContactId::placeholder(NEW_CONTACT),
            lead_id: Some(lead.clone()),
            date_created: String::new(),
            date_updated: None,
            fields: self.fields.clone(),
            lists: self.lists.clone(),
            unknown_lists: BTreeSet::new(),
        }
    }
}

/// One write to Close.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Creates a Lead and its Contact in one call.
    CreateLead {
        lead: Fields,
        /// `None` when the switches forbid it.
        contact: Option<ContactValues>,
    },
    /// Creates a Contact in an existing Lead.
    CreateContact {
        lead: LeadId,
        contact: ContactValues,
    },
    UpdateLead {
        id: LeadId,
        changes: Fields,
    },
    UpdateContact {
        id: ContactId,
        changes: ContactValues,
    },
}

/// A step that a switch forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Refusal {
    /// `allow_creating_new_leads` is off.
    #[strum(serialize = "creating_leads_is_off")]
    CreateLead,
    /// `allow_updating_existing_leads` is off.
    #[strum(serialize = "updating_leads_is_off")]
    UpdateLead,
    /// `allow_creating_new_contacts` is off.
    #[strum(serialize = "creating_contacts_is_off")]
    CreateContact,
    /// `allow_updating_existing_contacts` is off.
    #[strum(serialize = "updating_contacts_is_off")]
    UpdateContact,
    /// `allow_creating_duplicate_contacts` is off.
    #[strum(serialize = "duplicate_contacts_are_off")]
    DuplicateContact,
}

impl Refusal {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// A record the plan is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordRef {
    NewLead,
    /// In this existing Lead, or in the Lead that is created with it.
    NewContact(Option<LeadId>),
    Lead(LeadId),
    Contact(ContactId),
}

impl RecordRef {
    /// Its id, or a stand-in for a record that is not created yet.
    pub fn id(&self) -> &str {
        match self {
            Self::NewLead => NEW_LEAD,
            Self::NewContact(_) => NEW_CONTACT,
            Self::Lead(id) => id.as_str(),
            Self::Contact(id) => id.as_str(),
        }
    }

    /// The field in which the record stores the time of the last event.
    pub fn synced_at<'a>(&self, fields: &'a SyncedAtFields) -> Option<&'a FieldId> {
        match self {
            Self::NewLead | Self::Lead(_) => fields.lead.as_ref(),
            Self::NewContact(_) | Self::Contact(_) => fields.contact.as_ref(),
        }
    }
}

/// A value that Close rejected and that was removed from a step.
#[derive(Clone, Debug, PartialEq)]
pub struct RejectedField {
    pub record: RecordRef,
    /// The key of the field in Close.
    pub field: String,
}

/// What happens to one record, field by field.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordPlan {
    pub record: RecordRef,
    /// Its name in Close, or the name it gets.
    pub name: Option<String>,
    /// The switch that forbids writing it.
    pub refused: Option<Refusal>,
    /// Every field that the event has a value for.
    pub fields: Vec<FieldPlan>,
}

impl RecordPlan {
    /// The fields to write, unless a switch forbids it.
    pub fn written(&self) -> impl Iterator<Item = &FieldPlan> {
        self.fields.iter().filter(|field| matches!(field.verdict, FieldVerdict::Set | FieldVerdict::Appended))
    }

    /// Remembers what Close refused. The time in `synced_at` is another one with each event.
    fn note_refused(&self, refused: &mut RefusedValues, synced_at: Option<&str>) {
        let fields = self.fields.iter().filter(|plan| Some(plan.field.as_str()) != synced_at);
        let of = |verdict| {
            let refused = fields.clone().filter(move |plan| plan.verdict == verdict);
            refused.map(|plan| (plan.field.as_str(), &plan.wanted))
        };
        of(FieldVerdict::Refused).for_each(|value| refused.insert([value]));
        refused.insert(of(FieldVerdict::RefusedTogether));
    }
}

/// What happens to one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldPlan {
    /// The key of the field in Close.
    pub field: String,
    /// The value in Close; a list for emails, phones and urls.
    pub before: Option<Value>,
    pub wanted: Value,
    pub write: WriteRule,
    pub verdict: FieldVerdict,
}

impl FieldPlan {
    fn dropped(&self, reason: DropReason) -> Dropped {
        Dropped { field: self.field.clone(), reason, value: Some(excerpt(&self.wanted)) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum FieldVerdict {
    /// The value is written.
    Set,
    /// The value is added to a list.
    Appended,
    /// Close already has the value.
    Same,
    /// The rule is `if_empty`, and there is a value.
    NotEmpty,
    /// The rule is `on_create`, and the record exists.
    OnlyOnCreate,
    /// The list has as many entries as Close accepts.
    ListFull,
    /// Close did not show the list, so writing it could delete entries.
    ListUnknown,
    /// Close was sent this value before, and kept what it had.
    NotKept,
    /// Close was sent this value before, and stores it in the form that it has.
    Rewritten,
    /// A newer event wrote the field ([`crate::domain::staleness`]).
    Stale,
    /// Close rejected the value; the rest was written without it.
    #[strum(serialize = "refused_by_close")]
    Refused,
    /// Close rejected the write without naming a field, so all values that can be left out were.
    RefusedTogether,
    /// Close rejected the value for this record before ([`crate::domain::refused`]).
    RefusedBefore,
}

impl FieldVerdict {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The steps and the reasons for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Writes, in order.
    pub steps: Vec<Step>,
    /// Writes that the switches forbid.
    pub refused: Vec<Refusal>,
    /// Every record considered, in the order of the steps.
    pub records: Vec<RecordPlan>,
}

impl Plan {
    /// Whether writing a record could undo what a person entered since it was read: a value is added to a list that is
    /// written as a whole, or is set only because the field was empty, or is an id that decides whose record it is.
    pub fn could_undo_edits(&self, record: &str, keys: &KeyFields) -> bool {
        let is_key = |name: &str| {
            let mut keys = [&keys.company, &keys.user].into_iter().flatten();
            keys.any(|key| name.strip_prefix("custom.") == Some(key.as_str()))
        };
        let records = self.records.iter().filter(|plan| plan.record.id() == record);
        records.flat_map(|plan| &plan.fields).any(|field| {
            let is_conditional = !matches!(field.write, WriteRule::Always | WriteRule::OnCreate);
            field.verdict == FieldVerdict::Appended
                || field.verdict == FieldVerdict::Set && (is_conditional || is_key(&field.field))
        })
    }

    /// Takes over the plan for one record.
    pub fn replace(&mut self, record: &str, by: &Self) {
        let is_about = |plan: &&RecordPlan| plan.record.id() == record;
        let mut plans = by.records.iter().filter(is_about);
        for plan in self.records.iter_mut().filter(|plan| plan.record.id() == record) {
            if let Some(by) = plans.next() {
                *plan = by.clone();
            }
        }
        self.steps.retain(|step| step.changes() != Some(record));
        self.steps.extend(by.steps.iter().filter(|step| step.changes() == Some(record)).cloned());
    }

    /// Values for lists that are full or unknown, and values that Close rejected or did not keep before.
    pub fn dropped(&self) -> impl Iterator<Item = Dropped> {
        let fields = self.records.iter().flat_map(|record| &record.fields);
        fields.filter_map(|field| match field.verdict {
            FieldVerdict::ListFull => Some(field.dropped(DropReason::ListFull)),
            FieldVerdict::ListUnknown => Some(field.dropped(DropReason::ListUnknown)),
            FieldVerdict::NotKept => Some(field.dropped(DropReason::NotKept)),
            FieldVerdict::Rewritten => Some(field.dropped(DropReason::Rewritten)),
            FieldVerdict::RefusedBefore => Some(field.dropped(DropReason::RefusedBefore)),
            FieldVerdict::Set
            | FieldVerdict::Appended
            | FieldVerdict::Same
            | FieldVerdict::NotEmpty
            | FieldVerdict::OnlyOnCreate
            | FieldVerdict::Stale
            | FieldVerdict::Refused
            | FieldVerdict::RefusedTogether => None,
        })
    }

    /// Fields whose value is older than what Close has.
    pub fn stale(&self) -> impl Iterator<Item = &str> {
        let fields = self.records.iter().flat_map(|record| &record.fields);
        fields.filter(|field| field.verdict == FieldVerdict::Stale).map(|field| field.field.as_str())
    }

    /// Records in `versions` which fields the event set, or found set to its values.
    pub fn note_versions(&self, versions: &mut RecordVersions, event: &Desired) {
        self.note_versions_of(versions, event, |_| true);
    }

    /// The same for the records whose id `which` accepts.
    pub fn note_versions_of(
        &self,
        versions: &mut RecordVersions,
        event: &Desired,
        which: impl Fn(&str) -> bool,
    ) {
        let records = self.records.iter().filter(|plan| plan.refused.is_none() && which(plan.record.id()));
        for plan in records {
            let synced_at =
                plan.record.synced_at(&event.synced_at).map(|id| Field::Custom(id.clone()).to_string());
            let record = versions.entry(plan.record.id().to_owned()).or_default();
            plan.note_refused(&mut record.refused, synced_at.as_deref());
            let Some(at) = event.at else { continue };
            for FieldPlan { field, wanted, verdict, write, .. } in &plan.fields {
                match verdict {
                    FieldVerdict::Set if synced_at.as_ref() == Some(field) => {
                        record.stored = wanted.as_str().and_then(|text| text.parse().ok());
                    }
                    // A fallback name is not a value of the event.
                    FieldVerdict::Set | FieldVerdict::Same if *write == WriteRule::OnCreate => {}
                    // A newer event may have set the same value.
                    FieldVerdict::Same if record.is_unknown(field, event.at, event.is_replay) => {}
                    FieldVerdict::Set | FieldVerdict::Same => {
                        let newest = record.fields.entry(FieldHash::of(field)).or_insert(at);
                        *newest = at.max(*newest);
                    }
                    FieldVerdict::Appended
                    | FieldVerdict::NotEmpty
                    | FieldVerdict::OnlyOnCreate
                    | FieldVerdict::ListFull
                    | FieldVerdict::ListUnknown
                    | FieldVerdict::NotKept
                    | FieldVerdict::Rewritten
                    | FieldVerdict::Stale
                    | FieldVerdict::Refused
                    | FieldVerdict::RefusedTogether
                    | FieldVerdict::RefusedBefore => {}
                }
            }
        }
    }

    /// The fields of a record that Close rejected while the plan was executed.
    pub fn refused_of(&self, record: &str) -> Vec<(RejectedField, FieldVerdict)> {
        let records = self.records.iter().filter(|plan| plan.record.id() == record);
        let fields = records.flat_map(|plan| plan.fields.iter().map(|field| (plan.record.clone(), field)));
        let refused = fields.filter(|(_, field)| {
            matches!(field.verdict, FieldVerdict::Refused | FieldVerdict::RefusedTogether)
        });
        let rejected = |record, field: &FieldPlan| RejectedField { record, field: field.field.clone() };
        refused.map(|(record, field)| (rejected(record, field), field.verdict)).collect()
    }

    /// Whether the plan writes a field.
    pub fn writes(&self, RejectedField { record, field }: &RejectedField) -> bool {
        let mut records = self.records.iter().filter(|plan| plan.record == *record);
        records.any(|plan| plan.written().any(|written| written.field == *field))
    }

    /// Marks fields as rejected by Close. Returns their values.
    pub fn refuse(&mut self, rejected: &[RejectedField], verdict: FieldVerdict) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        for RejectedField { record, field } in rejected {
            let records = self.records.iter_mut().filter(|plan| plan.record == *record);
            let fields = records.flat_map(|record| &mut record.fields);
            let key = field.strip_suffix(".add").unwrap_or(field);
            for plan in fields.filter(|plan| plan.field == key) {
                plan.verdict = verdict;
                dropped.push(plan.dropped(DropReason::Refused));
            }
        }
        dropped
    }
}

impl Step {
    pub fn label(&self) -> &'static str {
        match self {
            Self::CreateLead { .. } => "create_lead",
            Self::CreateContact { .. } => "create_contact",
            Self::UpdateLead { .. } => "update_lead",
            Self::UpdateContact { .. } => "update_contact",
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::CreateLead { .. } | Self::CreateContact { .. } => false,
            Self::UpdateLead { changes, .. } => changes.is_empty(),
            Self::UpdateContact { changes, .. } => changes.is_empty(),
        }
    }

    /// Whether all that it would change is the time of the last event.
    pub fn is_only_time(&self, synced_at: &SyncedAtFields) -> bool {
        let is_time = |fields: &Fields, time: Option<&FieldId>| {
            fields.keys().all(|field| matches!(field, Field::Custom(id) if Some(id) == time))
        };
        match self {
            Self::CreateLead { .. } | Self::CreateContact { .. } => false,
            Self::UpdateLead { changes, .. } => is_time(changes, synced_at.lead.as_ref()),
            Self::UpdateContact { changes, .. } => {
                changes.lists.is_empty() && is_time(&changes.fields, synced_at.contact.as_ref())
            }
        }
    }

    /// The id of the record it changes.
    pub fn changes(&self) -> Option<&str> {
        match self {
            Self::UpdateLead { id, .. } => Some(id.as_str()),
            Self::UpdateContact { id, .. } => Some(id.as_str()),
            Self::CreateLead { .. } | Self::CreateContact { .. } => None,
        }
    }

    /// The id of the record that must exist for the step: the one it changes, or the Lead of a new Contact.
    pub fn needs(&self) -> Option<&str> {
        match self {
            Self::CreateLead { .. } => None,
            Self::CreateContact { lead: id, .. } | Self::UpdateLead { id, .. } => Some(id.as_str()),
            Self::UpdateContact { id, .. } => Some(id.as_str()),
        }
    }

    /// Whether the step creates a record. Such a step is never repeated without looking the record up first.
    pub fn creates(&self) -> bool {
        match self {
            Self::CreateLead { .. } | Self::CreateContact { .. } => true,
            Self::UpdateLead { .. } | Self::UpdateContact { .. } => false,
        }
    }
}
