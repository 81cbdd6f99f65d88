//! What answers with a lead or a contact leave out (close-api.md §15 row 9).

use serde_json::Value;

use crate::behaviour::{Behaviour, ContactLists, LeadContacts};
use crate::refusal::Object;

/// Removes from a record what its answer does not have.
pub(crate) fn apply(record: &mut Value, behaviour: &Behaviour) {
    let Some(record) = record.as_object_mut() else { return };
    let lists = behaviour.contact_lists;
    if !record.contains_key("contact_ids") && !record.contains_key("contacts") {
        match lists {
            ContactLists::Whole | ContactLists::NullInLeads | ContactLists::MissingInLeads => {}
            ContactLists::Null => nullify(record),
            ContactLists::Missing => remove(record),
        }
        return;
    }
    let Some(Value::Array(contacts)) = record.get_mut("contacts") else { return };
    for contact in contacts.iter_mut().filter_map(Value::as_object_mut) {
        match lists {
            ContactLists::Whole => {}
            ContactLists::NullInLeads | ContactLists::Null => nullify(contact),
            ContactLists::MissingInLeads | ContactLists::Missing => remove(contact),
        }
    }
    match behaviour.lead_contacts {
        LeadContacts::Whole => {}
        LeadContacts::WithoutNewest => drop(contacts.pop()),
        LeadContacts::Empty => contacts.clear(),
        LeadContacts::Absent => drop(record.remove("contacts")),
    }
}

const LISTS: [&str; 3] = ["emails", "phones", "urls"];

fn nullify(contact: &mut Object) {
    for list in LISTS {
        contact.insert(list.to_owned(), Value::Null);
    }
}

fn remove(contact: &mut Object) {
    for list in LISTS {
        contact.remove(list);
    }
}
