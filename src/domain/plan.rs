//! The heart: the steps that turn what Close has into what the event wants.
//!
//! [`plan`] is a pure function of the wanted values, the records found and the switches. Applying
//! its steps and planning again yields no steps: that law is what makes a redelivered message
//! harmless, and it is tested with random records below.
//!
//! A switch that is off removes a step and leaves a [`Refusal`] with the reason; it is no failure.
//! The Lead comes before its Contacts, so that a company is claimed before anything else can go
//! wrong.
//!
//! **Why a Lead may be created without its Contact.** When the switches forbid the new Contact but
//! allow the new Lead, the Lead is made alone if it carries a company id. The outcome then does not
//! depend on which event of the company comes first. Without a company id such a Lead could never
//! be found again, and every event would make another one: nothing is created.

use std::collections::BTreeMap;

use serde_json::Value;
use strum::{IntoStaticStr, VariantArray};

use crate::domain::dropped::{DropReason, Dropped};
use crate::domain::mapping::{Desired, Wanted, WriteRule};
use crate::domain::matching::Found;
use crate::domain::record::{Contact, ContactId, Entry, Field, FieldId, Fields, Lead, LeadId, Lists, same};
use crate::domain::staleness::{self, FieldVersions, RecordVersions, SyncedAtFields};
use crate::domain::switches::Switches;

/// Most entries Close keeps in one list of a Contact (close-api.md §5).
const MAX_ENTRIES: usize = 100;

/// Stands for the id of a Lead that is not created yet.
pub const NEW_LEAD: &str = "new lead";
/// Stands for the id of a Contact that is not created yet.
pub const NEW_CONTACT: &str = "new contact";

/// Values for a Contact: all of them when it is new, only what changes when it exists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContactValues {
    /// Fields to set.
    pub fields: Fields,
    /// Lists, whole: Close replaces a list that is sent (close-api.md §5).
    pub lists: Lists,
}

impl ContactValues {
    fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.lists.is_empty()
    }
}

/// One write to Close.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A new Lead, with its Contact in the same call.
    CreateLead {
        /// Values of the Lead.
        lead: Fields,
        /// Values of the Contact; none when the switches forbid it.
        contact: Option<ContactValues>,
    },
    /// A new Contact in a Lead that exists.
    CreateContact {
        /// The Lead.
        lead: LeadId,
        /// Values of the Contact.
        contact: ContactValues,
    },
    /// Changes to a Lead.
    UpdateLead {
        /// The Lead.
        id: LeadId,
        /// What changes.
        changes: Fields,
    },
    /// Changes to a Contact.
    UpdateContact {
        /// The Contact.
        id: ContactId,
        /// What changes.
        changes: ContactValues,
    },
}

/// A step a switch forbade.
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
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// A record the plan is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordRef {
    /// The Lead to be made.
    NewLead,
    /// The Contact to be made, in this Lead or in the one that is made with it.
    NewContact(Option<LeadId>),
    /// A Lead there is.
    Lead(LeadId),
    /// A Contact there is.
    Contact(ContactId),
}

impl RecordRef {
    /// Its id; of a record to be made a name for it.
    pub fn id(&self) -> &str {
        match self {
            Self::NewLead => NEW_LEAD,
            Self::NewContact(_) => NEW_CONTACT,
            Self::Lead(id) => id.as_str(),
            Self::Contact(id) => id.as_str(),
        }
    }

    /// The field that stores the time of the last event.
    pub fn stamp<'a>(&self, stamps: &'a SyncedAtFields) -> Option<&'a FieldId> {
        match self {
            Self::NewLead | Self::Lead(_) => stamps.lead.as_ref(),
            Self::NewContact(_) | Self::Contact(_) => stamps.contact.as_ref(),
        }
    }
}

/// A value Close refused, taken out of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct RejectedField {
    /// The record it was meant for.
    pub record: RecordRef,
    /// The field, by the key Close has for it.
    pub field: String,
}

/// What becomes of one record, field by field.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordPlan {
    /// The record.
    pub record: RecordRef,
    /// Its name in Close, or the one it gets.
    pub name: Option<String>,
    /// The switch that forbids to write any of it.
    pub refused: Option<Refusal>,
    /// Every field the event has a value for.
    pub fields: Vec<FieldPlan>,
}

impl RecordPlan {
    /// The fields that are written, if nothing forbids it.
    pub fn written(&self) -> impl Iterator<Item = &FieldPlan> {
        self.fields.iter().filter(|field| matches!(field.verdict, FieldVerdict::Set | FieldVerdict::Appended))
    }
}

/// What becomes of one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldPlan {
    /// The field, by the key Close has for it.
    pub field: String,
    /// What it holds; a list for emails, phones and urls.
    pub before: Option<Value>,
    /// What the event says.
    pub wanted: Value,
    /// When that may be written.
    pub write: WriteRule,
    /// What is done.
    pub verdict: FieldVerdict,
}

impl FieldPlan {
    fn dropped(&self, reason: DropReason) -> Dropped {
        Dropped { field: self.field.clone(), reason, value: Some(self.wanted.clone()) }
    }
}

/// What is done with one field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum FieldVerdict {
    /// The value is written.
    Set,
    /// The value is added to a list.
    Appended,
    /// Close has it already.
    Same,
    /// The rule is `if_empty`, and there is a value.
    NotEmpty,
    /// The rule is `on_create`, and the record exists.
    OnlyOnCreate,
    /// The list holds as many entries as Close takes.
    ListFull,
    /// A newer event has told about the field ([`crate::domain::staleness`]).
    Stale,
    /// Close refused the value; the rest was written without it.
    #[strum(serialize = "refused_by_close")]
    Refused,
}

impl FieldVerdict {
    /// The label in JSON.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The steps, and how they came about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Writes, in order.
    pub steps: Vec<Step>,
    /// Writes the switches forbade.
    pub refused: Vec<Refusal>,
    /// Every record that was considered, in the order of the steps.
    pub records: Vec<RecordPlan>,
}

impl Plan {
    /// Values that have no room in Close.
    pub fn dropped(&self) -> impl Iterator<Item = Dropped> {
        let fields = self.records.iter().flat_map(|record| &record.fields);
        let full = fields.filter(|field| field.verdict == FieldVerdict::ListFull);
        full.map(|field| field.dropped(DropReason::ListFull))
    }

    /// Values that are older than what Close holds.
    pub fn stale(&self) -> impl Iterator<Item = &str> {
        let fields = self.records.iter().flat_map(|record| &record.fields);
        fields.filter(|field| field.verdict == FieldVerdict::Stale).map(|field| field.field.as_str())
    }

    /// Notes in `versions` what an event wrote to the records of its plan, or found there already.
    pub fn note_versions(&self, versions: &mut RecordVersions, event: &Desired) {
        self.note_versions_of(versions, event, |_| true);
    }

    /// The same, only for records whose id `which` accepts.
    pub fn note_versions_of(
        &self,
        versions: &mut RecordVersions,
        event: &Desired,
        which: impl Fn(&str) -> bool,
    ) {
        let Some(at) = event.at else { return };
        let records = self.records.iter().filter(|plan| plan.refused.is_none() && which(plan.record.id()));
        for plan in records {
            let synced_at =
                plan.record.stamp(&event.synced_at).map(|id| Field::Custom(id.clone()).to_string());
            let record = versions.entry(plan.record.id().to_owned()).or_default();
            for FieldPlan { field, wanted, verdict, write, .. } in &plan.fields {
                match verdict {
                    FieldVerdict::Set if synced_at.as_ref() == Some(field) => {
                        record.stored = wanted.as_str().and_then(|text| text.parse().ok());
                    }
                    // A fallback name is not something the event said.
                    FieldVerdict::Set | FieldVerdict::Same if *write == WriteRule::OnCreate => {}
                    FieldVerdict::Set | FieldVerdict::Same => {
                        let newest = record.fields.entry(field.clone()).or_insert(at);
                        *newest = at.max(*newest);
                    }
                    FieldVerdict::Appended
                    | FieldVerdict::NotEmpty
                    | FieldVerdict::OnlyOnCreate
                    | FieldVerdict::ListFull
                    | FieldVerdict::Stale
                    | FieldVerdict::Refused => {}
                }
            }
        }
    }

    /// Notes that Close refused values, and tells which.
    pub fn refuse(&mut self, spared: &[RejectedField]) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        for RejectedField { record, field } in spared {
            let records = self.records.iter_mut().filter(|plan| plan.record == *record);
            let fields = records.flat_map(|record| &mut record.fields);
            for plan in fields.filter(|plan| plan.field == *field) {
                plan.verdict = FieldVerdict::Refused;
                dropped.push(plan.dropped(DropReason::Refused));
            }
        }
        dropped
    }
}

impl Step {
    /// What it does, for logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::CreateLead { .. } => "create_lead",
            Self::CreateContact { .. } => "create_contact",
            Self::UpdateLead { .. } => "update_lead",
            Self::UpdateContact { .. } => "update_contact",
        }
    }

    /// Whether nothing is left to write.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::CreateLead { .. } | Self::CreateContact { .. } => false,
            Self::UpdateLead { changes, .. } => changes.is_empty(),
            Self::UpdateContact { changes, .. } => changes.is_empty(),
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

    /// Whether the step makes a record, and so must never be repeated blindly.
    pub fn creates(&self) -> bool {
        match self {
            Self::CreateLead { .. } | Self::CreateContact { .. } => true,
            Self::UpdateLead { .. } | Self::UpdateContact { .. } => false,
        }
    }
}

/// The steps that turn `found` into `desired`. Empty when nothing differs. `ages` tell what is newer in what was
/// found.
pub fn plan(desired: &Desired, found: &Found, switches: Switches, ages: &RecordVersions) -> Plan {
    let mut plan = Plan::default();
    match found {
        Found::Nobody => plan.create_lead(desired, false, switches),
        Found::OtherCompany => plan.create_lead(desired, true, switches),
        Found::InLead { lead, contacts, elsewhere, adopted: _ } => {
            plan.update_lead(desired, lead, switches, ages);
            if contacts.is_empty() {
                plan.create_contact(desired, lead, *elsewhere, switches);
            }
            for contact in contacts {
                plan.update_contact(desired, contact, switches, ages);
            }
        }
        Found::Anywhere { people } => {
            let mut leads: Vec<&Lead> = people.iter().filter_map(|(_, lead)| lead.as_ref()).collect();
            leads.sort_by_key(|lead| &lead.id);
            leads.dedup_by_key(|lead| &lead.id);
            for lead in leads {
                plan.update_lead(desired, lead, switches, ages);
            }
            for (contact, _) in people {
                plan.update_contact(desired, contact, switches, ages);
            }
        }
    }
    plan
}

impl Plan {
    fn create_lead(&mut self, desired: &Desired, duplicate: bool, switches: Switches) {
        let no_lead = (!switches.allow_creating_new_leads).then_some(Refusal::CreateLead);
        let no_contact = no_lead.or(refuse_contact(duplicate, switches));
        // Alone, it could never be found again.
        let no_lead = no_lead.or(no_contact.filter(|_| desired.identity.company_id.is_none()));
        let (lead, lead_fields) = lead_changes(desired, None, None);
        let (contact, contact_fields) = contact_changes(desired, None, None);
        self.consider(RecordRef::NewLead, desired.lead_name(), no_lead, lead_fields);
        self.consider(RecordRef::NewContact(None), desired.contact_name(), no_contact, contact_fields);
        if no_lead.is_none() {
            self.steps.push(Step::CreateLead { lead, contact: no_contact.is_none().then_some(contact) });
        }
    }

    fn create_contact(&mut self, desired: &Desired, lead: &Lead, duplicate: bool, switches: Switches) {
        let refused = refuse_contact(duplicate, switches);
        let (contact, fields) = contact_changes(desired, None, None);
        self.consider(RecordRef::NewContact(Some(lead.id.clone())), desired.contact_name(), refused, fields);
        if refused.is_none() {
            self.steps.push(Step::CreateContact { lead: lead.id.clone(), contact });
        }
    }

    fn update_lead(&mut self, desired: &Desired, lead: &Lead, switches: Switches, ages: &RecordVersions) {
        let (changes, fields) = lead_changes(desired, Some(lead), ages.get(lead.id.as_str()));
        let refused =
            (!switches.allow_updating_existing_leads && !changes.is_empty()).then_some(Refusal::UpdateLead);
        self.consider(RecordRef::Lead(lead.id.clone()), name(&lead.fields), refused, fields);
        if refused.is_none() && !changes.is_empty() {
            self.steps.push(Step::UpdateLead { id: lead.id.clone(), changes });
        }
    }

    fn update_contact(
        &mut self,
        desired: &Desired,
        contact: &Contact,
        switches: Switches,
        ages: &RecordVersions,
    ) {
        let (changes, fields) = contact_changes(desired, Some(contact), ages.get(contact.id.as_str()));
        let refused = (!switches.allow_updating_existing_contacts && !changes.is_empty())
            .then_some(Refusal::UpdateContact);
        self.consider(RecordRef::Contact(contact.id.clone()), name(&contact.fields), refused, fields);
        if refused.is_none() && !changes.is_empty() {
            self.steps.push(Step::UpdateContact { id: contact.id.clone(), changes });
        }
    }

    fn consider(
        &mut self,
        record: RecordRef,
        name: Option<String>,
        refused: Option<Refusal>,
        fields: Vec<FieldPlan>,
    ) {
        self.refused.extend(refused.filter(|refusal| !self.refused.contains(refusal)));
        self.records.push(RecordPlan { record, name, refused, fields });
    }
}

fn name(fields: &Fields) -> Option<String> {
    fields.get(&Field::Name).and_then(Value::as_str).map(str::to_owned)
}

fn refuse_contact(duplicate: bool, switches: Switches) -> Option<Refusal> {
    if !switches.allow_creating_new_contacts {
        Some(Refusal::CreateContact)
    } else if duplicate && !switches.allow_creating_duplicate_contacts {
        Some(Refusal::DuplicateContact)
    } else {
        None
    }
}

/// What has to be set, and why each field is or is not. Without a record, everything: every write
/// rule lets a value into a new one.
fn field_changes(
    wanted: &BTreeMap<Field, Wanted>,
    record: Option<&Fields>,
    is_newer: impl Fn(&str) -> bool,
) -> (Fields, Vec<FieldPlan>) {
    let (mut changes, mut plans) = (Fields::new(), Vec::new());
    for (field, wanted) in wanted {
        let (key, before) = (field.to_string(), record.and_then(|fields| fields.get(field)));
        let verdict = match (wanted.write, before) {
            _ if record.is_none() => FieldVerdict::Set,
            (_, Some(before)) if same(before, &wanted.value) => FieldVerdict::Same,
            (WriteRule::OnCreate, _) => FieldVerdict::OnlyOnCreate,
            (WriteRule::IfEmpty, Some(_)) => FieldVerdict::NotEmpty,
            (WriteRule::Always, Some(_)) if is_newer(&key) => FieldVerdict::Stale,
            (WriteRule::IfEmpty, None) | (WriteRule::Always, _) => FieldVerdict::Set,
        };
        if verdict == FieldVerdict::Set {
            changes.insert(field.clone(), wanted.value.clone());
        }
        let Wanted { value, write } = wanted.clone();
        plans.push(FieldPlan { field: key, before: before.cloned(), wanted: value, write, verdict });
    }
    (changes, plans)
}

/// Lets a record that is changed store when the event was.
fn stamp(
    desired: &Desired,
    field: Option<&FieldId>,
    record: Option<&Fields>,
    changes: &mut Fields,
    plans: &mut Vec<FieldPlan>,
) {
    if let Some((field, wanted)) = staleness::news(record, field, desired.at) {
        let before = record.and_then(|fields| fields.get(&field)).cloned();
        plans.push(FieldPlan {
            field: field.to_string(),
            before,
            wanted: wanted.clone(),
            write: WriteRule::Always,
            verdict: FieldVerdict::Set,
        });
        changes.insert(field, wanted);
    }
}

fn lead_changes(
    desired: &Desired,
    lead: Option<&Lead>,
    age: Option<&FieldVersions>,
) -> (Fields, Vec<FieldPlan>) {
    let record = lead.map(|lead| &lead.fields);
    let is_newer = |field: &str| age.is_some_and(|age| age.is_newer(field, desired.at));
    let (mut changes, mut plans) = field_changes(&desired.lead, record, is_newer);
    if record.is_none() || !changes.is_empty() {
        stamp(desired, desired.synced_at.lead.as_ref(), record, &mut changes, &mut plans);
    }
    (changes, plans)
}

/// The same for a Contact, whose lists grow by the wanted entry: existing entries keep their place.
fn contact_changes(
    desired: &Desired,
    contact: Option<&Contact>,
    age: Option<&FieldVersions>,
) -> (ContactValues, Vec<FieldPlan>) {
    let record = contact.map(|contact| &contact.fields);
    let is_newer = |field: &str| age.is_some_and(|age| age.is_newer(field, desired.at));
    let (mut fields, mut plans) = field_changes(&desired.contact, record, is_newer);
    let mut lists = Lists::new();
    for (&channel, wanted) in &desired.channels {
        let Some(value) = wanted.value.as_str() else { continue };
        let current = contact.map_or(&[][..], |contact| contact.list(channel));
        let verdict = match wanted.write {
            _ if contact.is_some_and(|contact| contact.has(channel, value)) => FieldVerdict::Same,
            WriteRule::OnCreate if contact.is_some() => FieldVerdict::OnlyOnCreate,
            WriteRule::IfEmpty if !current.is_empty() => FieldVerdict::NotEmpty,
            WriteRule::OnCreate | WriteRule::IfEmpty | WriteRule::Always if current.len() >= MAX_ENTRIES => {
                FieldVerdict::ListFull
            }
            WriteRule::OnCreate | WriteRule::IfEmpty | WriteRule::Always => FieldVerdict::Appended,
        };
        if verdict == FieldVerdict::Appended {
            let entry = Entry { value: value.to_owned(), kind: channel.default_kind().to_owned() };
            lists.insert(channel, current.iter().cloned().chain([entry]).collect());
        }
        let before: Vec<Value> = current.iter().map(|entry| entry.value.clone().into()).collect();
        plans.push(FieldPlan {
            field: channel.to_string(),
            before: (!before.is_empty()).then_some(before.into()),
            wanted: wanted.value.clone(),
            write: wanted.write,
            verdict,
        });
    }
    if record.is_none() || !fields.is_empty() || !lists.is_empty() {
        stamp(desired, desired.synced_at.contact.as_ref(), record, &mut fields, &mut plans);
    }
    (ContactValues { fields, lists }, plans)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::mapping::tests::desired;
    use crate::domain::matching::tests::{contact, keys, lead};
    use crate::domain::partial_write::without_rejected;
    use crate::domain::record::{Channel, FieldId};

    fn event() -> Desired {
        desired(json!({"userId": "u", "traits": {
            "email": "jane@example.test", "phone": "+493012345", "name": "Jane", "plan": "pro",
            "company": {"id": "acme", "name": "Acme"},
        }}))
    }

    type Case = (Found, fn(&mut Switches), &'static [&'static str], &'static [Refusal]);

    fn plan_of(found: &Found, off: fn(&mut Switches)) -> (Vec<&'static str>, Vec<Refusal>) {
        let mut switches = Switches::default();
        off(&mut switches);
        let plan = plan(&event(), found, switches, &RecordVersions::new());
        let kinds = plan.steps.iter().map(|step| match step {
            Step::CreateLead { contact: Some(_), .. } => "lead+contact",
            Step::CreateLead { contact: None, .. } => "lead",
            Step::CreateContact { .. } => "contact",
            Step::UpdateLead { .. } => "update lead",
            Step::UpdateContact { .. } => "update contact",
        });
        (kinds.collect(), plan.refused)
    }

    #[test]
    fn the_switches_take_steps_away() {
        let in_lead = |contacts: Vec<Contact>, elsewhere| Found::InLead {
            lead: lead("l", Some("acme")),
            contacts,
            adopted: false,
            elsewhere,
        };
        let jane = contact("c", "l", Some("u"), None);
        let cases: Vec<Case> = vec![
            (Found::Nobody, |_| (), &["lead+contact"], &[]),
            (Found::Nobody, |s| s.allow_creating_new_leads = false, &[], &[Refusal::CreateLead]),
            (Found::Nobody, |s| s.allow_creating_new_contacts = false, &["lead"], &[Refusal::CreateContact]),
            (Found::Nobody, |s| s.allow_creating_duplicate_contacts = false, &["lead+contact"], &[]),
            (Found::OtherCompany, |_| (), &["lead+contact"], &[]),
            (
                Found::OtherCompany,
                |s| s.allow_creating_duplicate_contacts = false,
                &["lead"],
                &[Refusal::DuplicateContact],
            ),
            (in_lead(vec![], false), |_| (), &["update lead", "contact"], &[]),
            (in_lead(vec![], true), |_| (), &["update lead", "contact"], &[]),
            (
                in_lead(vec![], true),
                |s| s.allow_creating_duplicate_contacts = false,
                &["update lead"],
                &[Refusal::DuplicateContact],
            ),
            (
                in_lead(vec![], false),
                |s| s.allow_creating_new_contacts = false,
                &["update lead"],
                &[Refusal::CreateContact],
            ),
            (in_lead(vec![jane.clone()], false), |_| (), &["update lead", "update contact"], &[]),
            (
                in_lead(vec![jane.clone()], false),
                |s| s.allow_updating_existing_leads = false,
                &["update contact"],
                &[Refusal::UpdateLead],
            ),
            (
                in_lead(vec![jane.clone()], false),
                |s| s.allow_updating_existing_contacts = false,
                &["update lead"],
                &[Refusal::UpdateContact],
            ),
            (
                Found::Anywhere {
                    people: vec![(jane.clone(), Some(lead("l", None))), (jane, Some(lead("l", None)))],
                },
                |_| (),
                &["update lead", "update contact", "update contact"],
                &[],
            ),
        ];
        for (found, off, steps, refused) in cases {
            assert_eq!(plan_of(&found, off), (steps.to_vec(), refused.to_vec()), "{found:?}");
        }
    }

    #[test]
    fn a_lead_alone_needs_a_company_id() {
        let nameless = desired(json!({"userId": "u"}));
        let switches = Switches { allow_creating_new_contacts: false, ..Switches::default() };
        let plan = plan(&nameless, &Found::Nobody, switches, &RecordVersions::new());
        assert_eq!((plan.steps.len(), plan.refused.as_slice()), (0, [Refusal::CreateContact].as_slice()));
    }

    #[test]
    fn lists_grow_at_the_end_and_only_when_needed() {
        let mut jane = contact("c", "l", Some("u"), Some("JANE@example.test"));
        jane.lists.insert(Channel::Phone, vec![Entry { value: "+441234".into(), kind: "mobile".into() }]);
        let found = Found::Anywhere { people: vec![(jane, None)] };
        let plan = plan(&event(), &found, Switches::default(), &RecordVersions::new());
        let Some(Step::UpdateContact { changes, .. }) = plan.steps.first() else { panic!("{plan:?}") };
        assert!(!changes.lists.contains_key(&Channel::Email));
        let phones: Vec<_> =
            changes.lists[&Channel::Phone].iter().map(|entry| entry.value.as_str()).collect();
        assert_eq!(phones, ["+441234", "+493012345"]);
    }

    #[test]
    fn write_rules_guard_fields_and_lists() {
        let current: Fields = [(Field::Title, json!("CEO"))].into();
        let wanted = |field: Field, write| [(field, Wanted { value: json!("new"), write })].into();
        let changed =
            |field, write| !field_changes(&wanted(field, write), Some(&current), |_| false).0.is_empty();
        assert!(changed(Field::Title, WriteRule::Always));
        assert!(!changed(Field::Title, WriteRule::IfEmpty));
        assert!(!changed(Field::Title, WriteRule::OnCreate));
        assert!(changed(Field::Name, WriteRule::IfEmpty));
        assert!(!changed(Field::Name, WriteRule::OnCreate));

        let grows = |email: Option<&str>, write| {
            let wanted = [(Channel::Email, Wanted { value: json!("n@x.test"), write })].into();
            let desired = Desired { channels: wanted, ..Desired::default() };
            !contact_changes(&desired, Some(&contact("c", "l", None, email)), None).0.lists.is_empty()
        };
        assert!(grows(Some("o@x.test"), WriteRule::Always));
        assert!(!grows(Some("o@x.test"), WriteRule::IfEmpty));
        assert!(grows(None, WriteRule::IfEmpty));
        assert!(!grows(None, WriteRule::OnCreate));

        let mut full = contact("c", "l", None, None);
        let entry = |n| Entry { value: format!("{n}@x.test"), kind: "office".into() };
        full.lists.insert(Channel::Email, (0..MAX_ENTRIES).map(entry).collect());
        let wanted = [(Channel::Email, Wanted { value: json!("n@x.test"), write: WriteRule::Always })].into();
        let desired = Desired { channels: wanted, ..Desired::default() };
        let (values, fields) = contact_changes(&desired, Some(&full), None);
        assert!(values.lists.is_empty());
        assert_eq!(fields[0].verdict, FieldVerdict::ListFull);
    }

    #[test]
    fn a_refused_value_is_spared_unless_it_is_an_identity() {
        let desired = event();
        let create = &plan(&desired, &Found::Nobody, Switches::default(), &RecordVersions::new()).steps[0];
        let without = |create: &Step, desired: &Desired, paths: &[&str]| {
            let paths: Vec<Vec<String>> =
                paths.iter().map(|path| path.split(' ').map(str::to_owned).collect()).collect();
            let (_, spared) = without_rejected(create, paths.iter().map(Vec::as_slice), desired, &keys())?;
            Some(spared.into_iter().map(|spared| spared.field).collect::<Vec<_>>().join(" "))
        };
        let cases: [(&[&str], _); 9] = [
            (&["contacts 0 phones 0 phone"], Some("phones")),
            (&["contacts 0 emails 0 email"], Some("emails")),
            (&["custom.cf_plan"], Some("custom.cf_plan")),
            (&["contacts 0 phones 0 phone", "name", "contacts 0 phones 1 phone"], Some("phones name")),
            (&["name", "contacts 0 name"], Some("name name")),
            (&["name", "custom.cf_company"], None),
            (&["contacts 0 custom.cf_user"], None),
            (&["lead"], None),
            (&[], None),
        ];
        for (paths, spared) in cases {
            assert_eq!(without(create, &desired, paths).as_deref(), spared, "{paths:?}");
        }

        let by_email = self::desired(json!({"traits": {"email": "jane@example.test"}}));
        let create = &plan(&by_email, &Found::Nobody, Switches::default(), &RecordVersions::new()).steps[0];
        assert_eq!(without(create, &by_email, &["contacts 0 emails"]), None);
    }

    /// Carries out a plan the way Close would.
    fn apply(plan: &Plan, found: &Found) -> Found {
        let set = |fields: &mut Fields, changes: &Fields| fields.extend(changes.clone());
        let change = |contact: &mut Contact, values: &ContactValues| {
            set(&mut contact.fields, &values.fields);
            contact.lists.extend(values.lists.clone());
        };
        let made = |values: &ContactValues, lead: &str| {
            let mut made = contact("c_new", lead, None, None);
            change(&mut made, values);
            made
        };
        let mut found = found.clone();
        for step in &plan.steps {
            match (step, &mut found) {
                (Step::CreateLead { lead: fields, contact }, _) => {
                    let lead = Lead { fields: fields.clone(), ..lead("l_new", None) };
                    let contacts = contact.iter().map(|values| made(values, "l_new")).collect();
                    found = Found::InLead { lead, contacts, adopted: false, elsewhere: true };
                }
                (Step::CreateContact { contact, .. }, Found::InLead { contacts, .. }) => {
                    contacts.push(made(contact, "l"));
                }
                (Step::UpdateLead { changes, .. }, Found::InLead { lead, .. }) => {
                    set(&mut lead.fields, changes);
                }
                (Step::UpdateLead { id, changes }, Found::Anywhere { people }) => {
                    for lead in
                        people.iter_mut().filter_map(|(_, lead)| lead.as_mut()).filter(|lead| lead.id == *id)
                    {
                        set(&mut lead.fields, changes);
                    }
                }
                (Step::UpdateContact { id, changes }, Found::InLead { contacts, .. }) => {
                    contacts.iter_mut().filter(|c| c.id == *id).for_each(|c| change(c, changes));
                }
                (Step::UpdateContact { id, changes }, Found::Anywhere { people }) => {
                    people.iter_mut().filter(|(c, _)| c.id == *id).for_each(|(c, _)| change(c, changes));
                }
                (_, Found::OtherCompany | Found::Nobody) => panic!("nothing to change"),
                (Step::CreateContact { .. }, Found::Anywhere { .. }) => panic!("no Lead to add to"),
            }
        }
        found
    }

    fn some_lead() -> impl Strategy<Value = Lead> {
        ("l[12]", proptest::option::of("[ab]"), proptest::option::of("[AB]")).prop_map(
            |(id, company, name)| {
                let mut lead = lead(&id, company.as_deref());
                lead.fields.extend(name.map(|name| (Field::Name, json!(name))));
                lead
            },
        )
    }

    fn some_contact() -> impl Strategy<Value = Contact> {
        (
            "c[1-4]",
            proptest::option::of("[uv]"),
            proptest::option::of("[jk]@x\\.test"),
            proptest::option::of("0?[1-3]{3}"),
        )
            .prop_map(|(id, user, email, phone)| {
                let mut contact = contact(&id, "l1", user.as_deref(), email.as_deref());
                let entry = |value| vec![Entry { value, kind: "office".into() }];
                contact.lists.extend(phone.map(|phone| (Channel::Phone, entry(format!("+49{phone}")))));
                contact
            })
    }

    fn some_found() -> impl Strategy<Value = Found> {
        prop_oneof![
            Just(Found::Nobody),
            Just(Found::OtherCompany),
            (some_lead(), proptest::collection::vec(some_contact(), 0..3), any::<bool>(), any::<bool>())
                .prop_map(|(lead, contacts, adopted, elsewhere)| Found::InLead {
                    lead,
                    contacts,
                    adopted,
                    elsewhere
                }),
            proptest::collection::vec((some_contact(), proptest::option::of(some_lead())), 1..4).prop_map(
                |mut people| {
                    people.sort_by_key(|(contact, _)| contact.id.clone());
                    people.dedup_by_key(|(contact, _)| contact.id.clone());
                    let mut seen: BTreeMap<LeadId, Lead> = BTreeMap::new();
                    for (_, lead) in &mut people {
                        if let Some(lead) = lead {
                            *lead = seen.entry(lead.id.clone()).or_insert_with(|| lead.clone()).clone();
                        }
                    }
                    Found::Anywhere { people }
                }
            ),
        ]
    }

    fn some_event() -> impl Strategy<Value = Value> {
        let traits = (
            proptest::option::of("[JK]@x\\.test"),
            proptest::option::of("[ \\-+]?0?[1-3]{3}"),
            proptest::option::of("[ab]"),
            proptest::option::of("[AB]"),
            proptest::option::of("pro|free"),
        );
        traits.prop_map(|(email, phone, company, name, plan)| {
            json!({"userId": "u", "traits": {
                "email": email, "phone": phone, "plan": plan, "company": {"id": company, "name": name},
            }})
        })
    }

    proptest! {
        #[test]
        fn planning_again_after_applying_yields_nothing(
            event in some_event(), found in some_found(), bits in 0u8..32,
        ) {
            let on = |bit: u8| bits & (1 << bit) != 0;
            let switches = Switches {
                allow_creating_new_leads: on(0),
                allow_updating_existing_leads: on(1),
                allow_creating_new_contacts: on(2),
                allow_updating_existing_contacts: on(3),
                allow_creating_duplicate_contacts: on(4),
            };
            let desired = desired(event);
            let first = plan(&desired, &found, switches, &RecordVersions::new());
            let after = apply(&first, &found);
            let second = plan(&desired, &after, switches, &RecordVersions::new());
            prop_assert!(second.steps.is_empty(), "{first:#?}\n{second:#?}");
        }

        #[test]
        fn existing_entries_are_never_removed_or_reordered(event in some_event(), contact in some_contact()) {
            let lists = contact_changes(&desired(event), Some(&contact), None).0.lists;
            for (channel, grown) in lists {
                prop_assert!(grown.starts_with(contact.list(channel)));
                prop_assert_eq!(grown.len(), contact.list(channel).len() + 1);
            }
        }
    }

    #[test]
    fn an_adopted_lead_gets_the_company_id() {
        let found =
            Found::InLead { lead: lead("l", None), contacts: vec![], adopted: true, elsewhere: false };
        let plan = plan(&event(), &found, Switches::default(), &RecordVersions::new());
        let Some(Step::UpdateLead { changes, .. }) = plan.steps.first() else { panic!("{plan:?}") };
        assert_eq!(changes[&Field::Custom(FieldId::new("cf_company"))], json!("acme"));
    }
}
