//! A person who edits the records of Jane in Close between any two calls of ours.

use super::*;
use crate::domain::record::Entry;

/// What a person does to a Contact of Jane, or to its Lead.
#[derive(Clone, Debug)]
pub(super) enum Edit {
    Add(Channel, &'static str),
    /// Removes the entry at this place, counted around the list.
    Remove(Channel, usize),
    /// Moves the first entry to the end.
    Reorder(Channel),
    Set(Field, &'static str),
    Clear(Field),
    SetLead(Field, &'static str),
    ClearLead(Field),
    DeleteContact,
    /// Merges the Lead into another one. The other one keeps its fields.
    MergeLead,
}

impl State {
    /// Does what was due since the last call.
    pub(super) fn let_the_person_work(&mut self) {
        while let Some((at, number, edit)) = self.edits.pop_front_if(|(at, ..)| *at <= Instant::now()) {
            self.past.push((at, self.records.clone()));
            let now = Some(super::at(1000 * i64::try_from(self.past.len()).unwrap()));
            let InMemoryRecords { leads, contacts, .. } = &mut self.records;
            let count = contacts.len().max(1);
            let Some(jane) = contacts.values_mut().nth(number % count) else { continue };
            let (id, lead) = (jane.id.clone(), jane.lead_id.clone().unwrap());
            let mut edit_lead = |edit: &dyn Fn(&mut Fields)| {
                let lead = leads.get_mut(&lead).unwrap();
                edit(&mut lead.fields);
                lead.date_updated = now;
            };
            jane.date_updated = now;
            match edit {
                Edit::Add(channel, value) => {
                    let entry = Entry { value: value.to_owned(), kind: "home".to_owned() };
                    jane.lists.entry(channel).or_default().push(entry);
                }
                Edit::Remove(channel, place) => {
                    let list = jane.lists.entry(channel).or_default();
                    if !list.is_empty() {
                        list.remove(place % list.len());
                    }
                }
                Edit::Reorder(channel) => {
                    let list = jane.lists.entry(channel).or_default();
                    let first = usize::from(!list.is_empty());
                    list.rotate_left(first);
                }
                Edit::Set(field, value) => drop(jane.fields.insert(field, json!(value))),
                Edit::Clear(field) => drop(jane.fields.remove(&field)),
                Edit::SetLead(field, value) => {
                    edit_lead(&|fields| drop(fields.insert(field.clone(), json!(value))));
                }
                Edit::ClearLead(field) => edit_lead(&|fields| drop(fields.remove(&field))),
                Edit::DeleteContact => drop(contacts.remove(&id)),
                Edit::MergeLead => {
                    let Some(other) = leads.keys().find(|other| **other != lead).cloned() else { continue };
                    for contact in
                        contacts.values_mut().filter(|contact| contact.lead_id.as_ref() == Some(&lead))
                    {
                        contact.lead_id = Some(other.clone());
                    }
                    leads.remove(&lead);
                }
            }
        }
    }
}

impl FakeClose {
    /// A write waits this long for its budget.
    pub(super) fn with_budget_wait(self, wait: Duration) -> Self {
        self.state(|state| state.budget_wait = wait);
        self
    }

    /// A person does this to the first Contact after a time.
    pub(super) fn with_edit(self, after: Duration, edit: Edit) -> Self {
        self.with_edit_of(0, after, edit)
    }

    /// A person does this to the Contact with this number after a time. Edits are in the order of their times.
    pub(super) fn with_edit_of(self, contact: usize, after: Duration, edit: Edit) -> Self {
        self.state(|state| state.edits.push_back((Instant::now() + after, contact, edit)));
        self
    }
}
