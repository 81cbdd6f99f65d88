//! What Close refused, taken out of a step: one bad optional value must not cost the rest.

use crate::domain::mapping::{Desired, KeyFields};
use crate::domain::plan::{RecordRef, Step};
use crate::domain::record::{Channel, Field};

/// A value Close refused, taken out of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct RejectedField {
    /// The record it was meant for.
    pub record: RecordRef,
    /// The field, by the key Close has for it.
    pub field: String,
}

impl Step {
    /// Takes out what Close refused, so that the rest can still be written. `paths` are the ways to it in
    /// Close's `field-errors`, `["contacts", "0", "phones", "0", "phone"]` (close-api.md §3); several may
    /// lead to one field. `None` when something cannot be spared: an id records are found by, the only
    /// identity of a new Contact, or nothing of ours.
    pub fn spare<'a>(
        &self,
        paths: impl IntoIterator<Item = &'a [String]>,
        desired: &Desired,
        keys: &KeyFields,
    ) -> Option<(Self, Vec<RejectedField>)> {
        let mut step = self.clone();
        let mut spared: Vec<RejectedField> = Vec::new();
        for path in paths {
            let (record, name) = self.refers(path)?;
            let field = if name == "status" { "status_id" } else { name };
            if spared.iter().any(|spared| spared.record == record && spared.field == field) {
                continue;
            }
            let is_key = [&keys.company, &keys.user]
                .into_iter()
                .flatten()
                .any(|id| Field::Custom(id.clone()).to_string() == field);
            let only_identity =
                self.creates() && field == Channel::Email.list() && desired.identity.user_id.is_none();
            if is_key || only_identity || !step.remove(&record, field) {
                return None;
            }
            spared.push(RejectedField { record, field: field.to_owned() });
        }
        (!spared.is_empty()).then_some((step, spared))
    }

    /// The record and the name in it that a path of Close's leads to.
    fn refers<'a>(&self, path: &'a [String]) -> Option<(RecordRef, &'a str)> {
        let (first, rest) = path.split_first()?;
        let record = match self {
            Self::CreateLead { contact: Some(_), .. } if first == "contacts" => {
                return Some((RecordRef::NewContact(None), rest.get(1)?));
            }
            Self::CreateLead { .. } => RecordRef::NewLead,
            Self::CreateContact { lead, .. } => RecordRef::NewContact(Some(lead.clone())),
            Self::UpdateLead { id, .. } => RecordRef::Lead(id.clone()),
            Self::UpdateContact { id, .. } => RecordRef::Contact(id.clone()),
        };
        Some((record, first))
    }

    /// Removes a field or list; tells whether it was there.
    fn remove(&mut self, record: &RecordRef, name: &str) -> bool {
        let (fields, lists) = match (self, record) {
            (Self::CreateLead { contact: Some(contact), .. }, RecordRef::NewContact(_))
            | (Self::CreateContact { contact, .. } | Self::UpdateContact { changes: contact, .. }, _) => {
                (&mut contact.fields, Some(&mut contact.lists))
            }
            (Self::CreateLead { lead: fields, .. } | Self::UpdateLead { changes: fields, .. }, _) => {
                (fields, None)
            }
        };
        let channel = Channel::ALL.into_iter().find(|channel| channel.list() == name);
        if let Some((channel, lists)) = channel.zip(lists) {
            return lists.remove(&channel).is_some();
        }
        let field = fields.keys().find(|field| field.to_string() == name).cloned();
        field.is_some_and(|field| fields.remove(&field).is_some())
    }
}
