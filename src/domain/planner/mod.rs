//! Planning: the steps that turn what Close has into what the event wants.
//!
//! [`plan`] is a pure function of the wanted values, the records found and the switches. Applying its steps and planning
//! again yields no steps. This makes a redelivered message harmless, and is tested with random records.
//!
//! A switch that is off removes a step and leaves a [`Refusal`] with the reason; this is not a failure. The Lead is
//! written before its Contacts, so that the company has its Lead even if a later write fails.
//!
//! **Why a Lead may be created without its Contact.** When the switches forbid the new Contact but allow the new Lead,
//! the Lead is created alone if it has a company id. The outcome then does not depend on which event of the company
//! comes first. Without a company id such a Lead could never be found again, and every event would create another one,
//! so nothing is created.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::domain::mapping::{Desired, Wanted, WriteRule};
use crate::domain::matching::Found;
use crate::domain::plan::{
    ContactValues, FieldPlan, FieldVerdict, NEW_CONTACT, NEW_LEAD, Plan, RecordPlan, RecordRef, Refusal, Step,
};
use crate::domain::readback::{DifferenceEffect, InList, Readback};
use crate::domain::record::{Contact, Entry, Field, FieldId, Fields, Lead, Lists, missing_items, same};
use crate::domain::staleness::{self, FieldVersions, RecordVersions};
use crate::domain::switches::Switches;

/// The most entries Close keeps in one list of a Contact (close-api.md §5).
const MAX_ENTRIES: usize = 100;

/// The steps that turn `found` into `desired`. Empty when nothing differs. `versions` tell which values in `found` are
/// newer than the event, `readback` which wanted values Close does not keep.
pub fn plan(
    desired: &Desired,
    found: &Found,
    switches: Switches,
    versions: &RecordVersions,
    readback: &Readback,
) -> Plan {
    let mut planner = Planner { desired, switches, versions, readback, plan: Plan::default() };
    match found {
        Found::NoMatch => planner.create_lead(false),
        Found::OtherCompany => planner.create_lead(true),
        Found::InLead { lead, contacts, elsewhere, adopted: _ } => {
            planner.update_lead(lead);
            if contacts.is_empty() {
                planner.create_contact(lead, *elsewhere);
            }
            for contact in contacts {
                planner.update_contact(contact);
            }
        }
        Found::Anywhere { people } => {
            let mut leads: Vec<&Lead> = people.iter().filter_map(|(_, lead)| lead.as_ref()).collect();
            leads.sort_by_key(|lead| &lead.id);
            leads.dedup_by_key(|lead| &lead.id);
            for lead in leads {
                planner.update_lead(lead);
            }
            for (contact, _) in people {
                planner.update_contact(contact);
            }
        }
    }
    planner.plan
}

/// One plan in the making.
struct Planner<'a> {
    desired: &'a Desired,
    switches: Switches,
    versions: &'a RecordVersions,
    readback: &'a Readback,
    plan: Plan,
}

impl Planner<'_> {
    fn create_lead(&mut self, duplicate: bool) {
        let no_lead = (!self.switches.allow_creating_new_leads).then_some(Refusal::CreateLead);
        let no_contact = no_lead.or(refuse_contact(duplicate, self.switches));
        // A Lead without company id and Contact could never be found again.
        let no_lead = no_lead.or(no_contact.filter(|_| self.desired.identity.company_id.is_none()));
        let (lead, lead_fields) = self.lead_changes(None);
        let (contact, contact_fields) = self.contact_changes(None);
        self.consider(RecordRef::NewLead, self.desired.lead_name(), no_lead, lead_fields);
        self.consider(RecordRef::NewContact(None), self.desired.contact_name(), no_contact, contact_fields);
        if no_lead.is_none() {
            self.plan.steps.push(Step::CreateLead { lead, contact: no_contact.is_none().then_some(contact) });
        }
    }

    fn create_contact(&mut self, lead: &Lead, duplicate: bool) {
        let refused = refuse_contact(duplicate, self.switches);
        let (contact, fields) = self.contact_changes(None);
        self.consider(
            RecordRef::NewContact(Some(lead.id.clone())),
            self.desired.contact_name(),
            refused,
            fields,
        );
        if refused.is_none() {
            self.plan.steps.push(Step::CreateContact { lead: lead.id.clone(), contact });
        }
    }

    fn update_lead(&mut self, lead: &Lead) {
        let (changes, fields) = self.lead_changes(Some(lead));
        let refused = (!self.switches.allow_updating_existing_leads && !changes.is_empty())
            .then_some(Refusal::UpdateLead);
        self.consider(RecordRef::Lead(lead.id.clone()), name(&lead.fields), refused, fields);
        if refused.is_none() && !changes.is_empty() {
            self.plan.steps.push(Step::UpdateLead { id: lead.id.clone(), changes });
        }
    }

    fn update_contact(&mut self, contact: &Contact) {
        let (changes, fields) = self.contact_changes(Some(contact));
        let refused = (!self.switches.allow_updating_existing_contacts && !changes.is_empty())
            .then_some(Refusal::UpdateContact);
        self.consider(RecordRef::Contact(contact.id.clone()), name(&contact.fields), refused, fields);
        if refused.is_none() && !changes.is_empty() {
            self.plan.steps.push(Step::UpdateContact { id: contact.id.clone(), changes });
        }
    }

    fn consider(
        &mut self,
        record: RecordRef,
        name: Option<String>,
        refused: Option<Refusal>,
        fields: Vec<FieldPlan>,
    ) {
        self.plan.refused.extend(refused.filter(|refusal| !self.plan.refused.contains(refusal)));
        self.plan.records.push(RecordPlan { record, name, refused, fields });
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

/// What to set, and the verdict on each field. Without a record everything is set: every write rule allows a value in a
/// new record. `is_newer` and `futile` are about a field that the record has and the value that is wanted.
fn field_changes(
    wanted: &BTreeMap<Field, Wanted>,
    record: Option<&Fields>,
    is_newer: impl Fn(&str) -> bool,
    futile: impl Fn(&str, Option<&Value>, &Value) -> Option<DifferenceEffect>,
) -> (Fields, Vec<FieldPlan>) {
    let (mut changes, mut plans) = (Fields::new(), Vec::new());
    for (field, wanted) in wanted {
        let (key, before) = (field.key(), record.and_then(|fields| fields.get(field)));
        let (change, value) = match (field, wanted.write, record) {
            (Field::Custom(id), WriteRule::Add, Some(_)) => {
                (Field::Add(id.clone()), missing_items(before, &wanted.value).into())
            }
            _ => (field.clone(), wanted.value.clone()),
        };
        let verdict = match (wanted.write, before) {
            _ if record.is_none() => FieldVerdict::Set,
            (WriteRule::Add, _) if value.as_array().is_some_and(Vec::is_empty) => FieldVerdict::Same,
            (_, Some(before)) if same(before, &wanted.value) => FieldVerdict::Same,
            (WriteRule::OnCreate, _) => FieldVerdict::OnlyOnCreate,
            (WriteRule::IfEmpty, Some(_)) => FieldVerdict::NotEmpty,
            (WriteRule::Always, Some(_)) if is_newer(&key) => FieldVerdict::Stale,
            (WriteRule::IfEmpty | WriteRule::Always | WriteRule::Add, before) => {
                match (futile(&key, before, &value), wanted.write) {
                    (Some(DifferenceEffect::Lost), _) => FieldVerdict::NotKept,
                    (Some(DifferenceEffect::Rewritten), _) => FieldVerdict::Rewritten,
                    (None, WriteRule::Add) => FieldVerdict::Appended,
                    (None, _) => FieldVerdict::Set,
                }
            }
        };
        let is_written = matches!(verdict, FieldVerdict::Set | FieldVerdict::Appended);
        let wanted_value = if is_written { value.clone() } else { wanted.value.clone() };
        if is_written {
            changes.insert(change, value);
        }
        plans.push(FieldPlan {
            field: key,
            before: before.cloned(),
            wanted: wanted_value,
            write: wanted.write,
            verdict,
        });
    }
    (changes, plans)
}

/// Leaves out what Close refused for the record before. Returns the keys of these fields.
fn leave_out_refused(plans: &mut [FieldPlan], versions: Option<&FieldVersions>) -> Vec<String> {
    let Some(refused) = versions.map(|versions| &versions.refused).filter(|refused| !refused.is_empty())
    else {
        return Vec::new();
    };
    let is_written =
        |plan: &&mut FieldPlan| matches!(plan.verdict, FieldVerdict::Set | FieldVerdict::Appended);
    let mut left_out = Vec::new();
    for plan in plans.iter_mut().filter(is_written) {
        if refused.contains([(plan.field.as_str(), &plan.wanted)]) {
            plan.verdict = FieldVerdict::RefusedBefore;
            left_out.push(plan.field.clone());
        }
    }
    let mut rest: Vec<&mut FieldPlan> = plans.iter_mut().filter(is_written).collect();
    if refused.contains(rest.iter().map(|plan| (plan.field.as_str(), &plan.wanted))) {
        for plan in &mut rest {
            plan.verdict = FieldVerdict::RefusedBefore;
            left_out.push(plan.field.clone());
        }
    }
    left_out
}

/// Makes a record that changes store the time of the event.
fn set_synced_at(
    desired: &Desired,
    field: Option<&FieldId>,
    record: Option<&Fields>,
    changes: &mut Fields,
    plans: &mut Vec<FieldPlan>,
) {
    if let Some((field, wanted)) = staleness::new_synced_at(record, field, desired.at) {
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

impl Planner<'_> {
    fn changes_to(
        &self,
        id: &str,
        wanted: &BTreeMap<Field, Wanted>,
        record: Option<&Fields>,
    ) -> (Fields, Vec<FieldPlan>) {
        let versions = self.versions.get(id);
        let is_newer = |field: &str| {
            versions.is_some_and(|versions| versions.is_newer(field, self.desired.at, self.desired.is_replay))
        };
        let futile = |field: &str, before: Option<&Value>, wanted: &Value| {
            self.readback.futile(id, field, before, wanted)
        };
        field_changes(wanted, record, is_newer, futile)
    }

    fn lead_changes(&self, lead: Option<&Lead>) -> (Fields, Vec<FieldPlan>) {
        let (desired, record) = (self.desired, lead.map(|lead| &lead.fields));
        let id = lead.map_or(NEW_LEAD, |lead| lead.id.as_str());
        let (mut changes, mut plans) = self.changes_to(id, &desired.lead, record);
        let refused = leave_out_refused(&mut plans, self.versions.get(id));
        changes.retain(|field, _| !refused.contains(&field.key()));
        if record.is_none() || !changes.is_empty() {
            set_synced_at(desired, desired.synced_at.lead.as_ref(), record, &mut changes, &mut plans);
        }
        (changes, plans)
    }

    /// The same for a Contact. The wanted entry is appended to its list; existing entries keep their place.
    fn contact_changes(&self, contact: Option<&Contact>) -> (ContactValues, Vec<FieldPlan>) {
        let (desired, record) = (self.desired, contact.map(|contact| &contact.fields));
        let id = contact.map_or(NEW_CONTACT, |contact| contact.id.as_str());
        let (mut fields, mut plans) = self.changes_to(id, &desired.contact, record);
        let mut lists = Lists::new();
        for (&channel, wanted) in &desired.channels {
            let Some(value) = wanted.value.as_str() else { continue };
            let current = contact.map_or(&[][..], |contact| contact.list(channel));
            let verdict = match (wanted.write, self.readback.find(id, channel, current, value)) {
                (_, Some(InList::Present)) => FieldVerdict::Same,
                (WriteRule::OnCreate, _) if contact.is_some() => FieldVerdict::OnlyOnCreate,
                _ if contact.is_some_and(|contact| contact.unknown_lists.contains(&channel)) => {
                    FieldVerdict::ListUnknown
                }
                (WriteRule::IfEmpty, _) if !current.is_empty() => FieldVerdict::NotEmpty,
                (_, Some(InList::Refused)) => FieldVerdict::NotKept,
                (_, None) if current.len() >= MAX_ENTRIES => FieldVerdict::ListFull,
                (_, None) => FieldVerdict::Appended,
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
        let refused = leave_out_refused(&mut plans, self.versions.get(id));
        fields.retain(|field, _| !refused.contains(&field.key()));
        lists.retain(|channel, _| !refused.contains(&channel.to_string()));
        if record.is_none() || !fields.is_empty() || !lists.is_empty() {
            set_synced_at(desired, desired.synced_at.contact.as_ref(), record, &mut fields, &mut plans);
        }
        (ContactValues { fields, lists }, plans)
    }
}
