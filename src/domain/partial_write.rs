//! A write without the values Close rejected: one bad optional value must not cost the rest.
use strum::VariantArray;

use crate::domain::mapping::{Desired, KeyFields};
use crate::domain::plan::{RecordRef, RejectedField, Step};
use crate::domain::record::{Channel, Field};

/// The step without what Close rejected, and what was removed. `paths` are the paths in Close's `field-errors`,
/// `["contacts", "0", "phones", "0", "phone"]` (close-api.md §3); several may lead to one field.
///
/// Returns `None` when a rejected value cannot be left out: an id that records are found by, the only identity of a
/// new Contact, or a field that is not in the step.
pub fn without_rejected<'a>(
    step: &Step,
    paths: impl IntoIterator<Item = &'a [String]>,
    desired: &Desired,
    keys: &KeyFields,
) -> Option<(Step, Vec<RejectedField>)> {
    let mut rest = step.clone();
    let mut removed: Vec<RejectedField> = Vec::new();
    for path in paths {
        let (record, name) = locate(step, path)?;
        let field = if name == "status" { "status_id" } else { name };
        if removed.iter().any(|removed| removed.record == record && removed.field == field) {
            continue;
        }
        let is_key = [&keys.company, &keys.user]
            .into_iter()
            .flatten()
            .any(|id| Field::Custom(id.clone()).to_string() == field);
        let only_identity =
            step.creates() && field == Channel::Email.list() && desired.identity.user_id.is_none();
        if is_key || only_identity || !remove(&mut rest, &record, field) {
            return None;
        }
        removed.push(RejectedField { record, field: field.to_owned() });
    }
    (!removed.is_empty()).then_some((rest, removed))
}

/// The record and the field in it that a path in Close's error leads to.
fn locate<'a>(step: &Step, path: &'a [String]) -> Option<(RecordRef, &'a str)> {
    let (first, rest) = path.split_first()?;
    let record = match step {
        Step::CreateLead { contact: Some(_), .. } if first == "contacts" => {
            return Some((RecordRef::NewContact(None), rest.get(1)?));
        }
        Step::CreateLead { .. } => RecordRef::NewLead,
        Step::CreateContact { lead, .. } => RecordRef::NewContact(Some(lead.clone())),
        Step::UpdateLead { id, .. } => RecordRef::Lead(id.clone()),
        Step::UpdateContact { id, .. } => RecordRef::Contact(id.clone()),
    };
    Some((record, first))
}

/// Removes a field or list. Returns whether it was there.
fn remove(step: &mut Step, record: &RecordRef, name: &str) -> bool {
    let (fields, lists) = match (step, record) {
        (Step::CreateLead { contact: Some(contact), .. }, RecordRef::NewContact(_))
        | (Step::CreateContact { contact, .. } | Step::UpdateContact { changes: contact, .. }, _) => {
            (&mut contact.fields, Some(&mut contact.lists))
        }
        (Step::CreateLead { lead: fields, .. } | Step::UpdateLead { changes: fields, .. }, _) => {
            (fields, None)
        }
    };
    let channel = Channel::VARIANTS.iter().copied().find(|channel| channel.list() == name);
    if let Some((channel, lists)) = channel.zip(lists) {
        return lists.remove(&channel).is_some();
    }
    let field = fields.keys().find(|field| field.to_string() == name).cloned();
    field.is_some_and(|field| fields.remove(&field).is_some())
}
