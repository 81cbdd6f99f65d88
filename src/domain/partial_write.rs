//! A write without the values Close rejected: one bad optional value must not cost the rest.

use strum::VariantArray;

use crate::domain::mapping::{Desired, KeyFields};
use crate::domain::plan::{RecordRef, RejectedField, Step};
use crate::domain::record::{Channel, Field, FieldId};

/// What remains of a step after a rejection.
#[derive(Clone, Debug, PartialEq)]
pub enum Remainder {
    /// The step without the named fields, and which these are.
    Without(Step, Vec<RejectedField>),
    /// A rejected value cannot be left out: an id that records are found by, or the only identity of a new Contact.
    Required,
    /// Close named no field of the step.
    Unnamed,
}

/// The step without what Close rejected. `paths` are the paths in Close's error, `["contacts", "0", "phones", "0", "phone"]`
/// (close-api.md §3); several may lead to one field.
pub fn without_rejected<'a>(
    step: &Step,
    paths: impl IntoIterator<Item = &'a [String]>,
    desired: &Desired,
    keys: &KeyFields,
) -> Remainder {
    let mut rest = step.clone();
    let mut removed: Vec<RejectedField> = Vec::new();
    for path in paths {
        let Some((record, name)) = locate(step, path) else { continue };
        let field = if name == "status" { "status_id" } else { name };
        if removed.iter().any(|removed| removed.record == record && removed.field == field) {
            continue;
        }
        let only_identity =
            step.creates() && field == Channel::Email.list() && desired.identity.user_id.is_none();
        if is_key(field, keys) || only_identity {
            return Remainder::Required;
        }
        // Without a path, a custom field may be that of either record.
        let is_custom = step.creates() && field.starts_with("custom.");
        let records = [Some(record), is_custom.then_some(RecordRef::NewContact(None))];
        if let Some(record) = records.into_iter().flatten().find(|record| remove(&mut rest, record, field)) {
            removed.push(RejectedField { record, field: field.to_owned() });
        }
    }
    if removed.is_empty() { Remainder::Unnamed } else { Remainder::Without(rest, removed) }
}

/// What is left out together, in this order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    Lists,
    Fields,
    Names,
}

impl Tier {
    fn of(field: &str) -> Self {
        if Channel::VARIANTS.iter().any(|channel| channel.list() == field) {
            Self::Lists
        } else if field == Field::Name.to_string() {
            Self::Names
        } else {
            Self::Fields
        }
    }
}

/// The step with less, for a rejection that names no field: without lists, else without fields, else without names. Ids and
/// the email of a new Contact stay. An update may have nothing left. `None` if nothing can be left out.
pub fn without_optional(
    step: &Step,
    desired: &Desired,
    keys: &KeyFields,
) -> Option<(Step, Vec<RejectedField>)> {
    let is_email =
        |field: &str| step.creates() && field == Channel::Email.list() && desired.identity.email.is_some();
    let mut optional = fields(step);
    optional.retain(|(_, field)| !is_key(field, keys) && !is_email(field));
    let first = optional.iter().map(|(_, field)| Tier::of(field)).min()?;
    let (mut rest, mut removed) = (step.clone(), Vec::new());
    for (record, field) in optional.into_iter().filter(|(_, field)| Tier::of(field) == first) {
        if remove(&mut rest, &record, &field) {
            removed.push(RejectedField { record, field });
        }
    }
    (!removed.is_empty()).then_some((rest, removed))
}

/// Removes a field from the step that changes its record.
pub fn leave_out(step: &mut Step, rejected: &RejectedField) {
    if step.changes() == Some(rejected.record.id()) {
        remove(step, &rejected.record, &rejected.field);
    }
}

/// The paths of custom fields of the step that Close does not have.
pub fn unknown_fields(step: &Step, has: impl Fn(&FieldId) -> bool) -> Vec<Vec<String>> {
    let is_unknown =
        |field: &str| field.strip_prefix("custom.").and_then(FieldId::parse).is_some_and(|id| !has(&id));
    let path = |(record, field): (RecordRef, String)| match record {
        RecordRef::NewContact(None) => vec!["contacts".to_owned(), "0".to_owned(), field],
        RecordRef::NewLead | RecordRef::NewContact(Some(_)) | RecordRef::Lead(_) | RecordRef::Contact(_) => {
            vec![field]
        }
    };
    fields(step).into_iter().filter(|(_, field)| is_unknown(field)).map(path).collect()
}

fn is_key(field: &str, keys: &KeyFields) -> bool {
    let keys = [&keys.company, &keys.user].into_iter().flatten();
    keys.map(|id| Field::Custom(id.clone()).to_string()).any(|key| key == field)
}

/// The record and the field in it that a path in Close's error leads to.
fn locate<'a>(step: &Step, path: &'a [String]) -> Option<(RecordRef, &'a str)> {
    let (first, rest) = path.split_first()?;
    let is_list = || Channel::VARIANTS.iter().any(|channel| channel.list() == first);
    let record = match step {
        Step::CreateLead { contact: Some(_), .. } if first == "contacts" => {
            return Some((RecordRef::NewContact(None), rest.get(1)?));
        }
        // A Lead has no such list.
        Step::CreateLead { contact: Some(_), .. } if is_list() => RecordRef::NewContact(None),
        Step::CreateLead { .. } => RecordRef::NewLead,
        Step::CreateContact { lead, .. } => RecordRef::NewContact(Some(lead.clone())),
        Step::UpdateLead { id, .. } => RecordRef::Lead(id.clone()),
        Step::UpdateContact { id, .. } => RecordRef::Contact(id.clone()),
    };
    Some((record, first))
}

/// The fields and lists of a step.
fn fields(step: &Step) -> Vec<(RecordRef, String)> {
    let (lead, contact) = match step {
        Step::CreateLead { lead, contact } => (
            Some((RecordRef::NewLead, lead)),
            contact.as_ref().map(|contact| (RecordRef::NewContact(None), contact)),
        ),
        Step::CreateContact { lead, contact } => {
            (None, Some((RecordRef::NewContact(Some(lead.clone())), contact)))
        }
        Step::UpdateLead { id, changes } => (Some((RecordRef::Lead(id.clone()), changes)), None),
        Step::UpdateContact { id, changes } => (None, Some((RecordRef::Contact(id.clone()), changes))),
    };
    let lead = lead.into_iter().flat_map(|(record, fields)| {
        fields.keys().map(move |field| (record.clone(), field.to_string())).collect::<Vec<_>>()
    });
    let contact = contact.into_iter().flat_map(|(record, values)| {
        let names = values.fields.keys().map(ToString::to_string);
        let names = names.chain(values.lists.keys().map(ToString::to_string));
        names.map(|name| (record.clone(), name)).collect::<Vec<_>>()
    });
    lead.chain(contact).collect()
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
    let field = fields.keys().find(|field| field.to_string() == name || field.key() == name).cloned();
    field.is_some_and(|field| fields.remove(&field).is_some())
}
