//! Merging: several consecutive events about one person are decided one by one and written merged.
//!
//! Each event is planned against the result of the one before it, so every message has the plan and the outcome that it
//! would have had alone. The steps are then merged: changes to one record become one write, with the latest values. A
//! burst of events about one person costs one look-up and one write, however many there are.

use crate::domain::mapping::Desired;
use crate::domain::matching::Found;
use crate::domain::partial_write;
use crate::domain::plan::{FieldVerdict, NEW_CONTACT, NEW_LEAD, Plan, RejectedField, Step};
use crate::domain::planner::plan;
use crate::domain::readback::Readback;
use crate::domain::record::{Lead, LeadId, apply_changes, merge_changes};
use crate::domain::staleness::RecordVersions;
use crate::domain::switches::Switches;

/// The plans of several events, and the merged writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergedPlan {
    /// One per event, in order.
    pub plans: Vec<Plan>,
    pub steps: Vec<Step>,
}

impl MergedPlan {
    /// Plans an event merged with others for which [`Desired::can_merge_with`] holds.
    pub fn plan(
        first: &Desired,
        others: &[&Desired],
        found: &Found,
        switches: Switches,
        versions: &RecordVersions,
        readback: &Readback,
    ) -> Self {
        let before = plan(first, found, switches, versions, readback);
        let mut merged = Self { steps: before.steps.clone(), plans: vec![before] };
        let (mut found, mut versions, mut before) = (found.clone(), versions.clone(), first);
        for event in others {
            if let Some(plan) = merged.plans.last() {
                plan.note_versions(&mut versions, before);
                plan.steps.iter().for_each(|step| apply(&mut found, step, before));
            }
            let plan = plan(event, &found, switches, &versions, readback);
            plan.steps.iter().for_each(|step| merge_step(&mut merged.steps, step));
            merged.plans.push(plan);
            before = event;
        }
        merged
    }

    /// Leaves out what Close rejected while an earlier plan was executed, where it would be sent again.
    pub fn leave_out(&mut self, refused: &[(RejectedField, FieldVerdict)]) {
        for (rejected, verdict) in refused {
            for plan in &mut self.plans {
                if plan.writes(rejected) {
                    plan.refuse(std::slice::from_ref(rejected), *verdict);
                    plan.steps.iter_mut().for_each(|step| partial_write::leave_out(step, rejected));
                }
            }
            self.steps.iter_mut().for_each(|step| partial_write::leave_out(step, rejected));
        }
    }

    /// Whether a record would be created. "Not found" must then be certain.
    pub fn creates(&self) -> bool {
        self.steps.iter().any(Step::creates)
    }

    /// The ids of the records that would be changed.
    pub fn changed(&self) -> Vec<String> {
        self.steps.iter().filter_map(Step::changes).map(str::to_owned).collect()
    }
}

/// Merges a step into the step that writes the same record, or appends it.
fn merge_step(steps: &mut Vec<Step>, step: &Step) {
    let merged = steps.iter_mut().any(|before| match (before, step) {
        (Step::UpdateLead { id, changes }, Step::UpdateLead { id: same, changes: more }) if id == same => {
            merge_changes(changes, more);
            true
        }
        (Step::CreateLead { lead, .. }, Step::UpdateLead { id, changes }) if id.as_str() == NEW_LEAD => {
            // Close documents `.add` only for updates: a creation has the whole list.
            apply_changes(lead, changes);
            true
        }
        (Step::UpdateContact { id, changes }, Step::UpdateContact { id: same, changes: more })
            if id == same =>
        {
            changes.extend(more);
            true
        }
        (
            Step::CreateContact { contact, .. } | Step::CreateLead { contact: Some(contact), .. },
            Step::UpdateContact { id, changes },
        ) if id.as_str() == NEW_CONTACT => {
            apply_changes(&mut contact.fields, &changes.fields);
            contact.lists.extend(changes.lists.clone());
            true
        }
        (
            Step::CreateLead { .. }
            | Step::CreateContact { .. }
            | Step::UpdateLead { .. }
            | Step::UpdateContact { .. },
            _,
        ) => false,
    });
    if !merged {
        steps.push(step.clone());
    }
}

/// Changes `found` to what the next event of the same person and company finds after a step of `event`.
fn apply(found: &mut Found, step: &Step, event: &Desired) {
    match step {
        Step::CreateLead { lead, contact } => {
            let id = LeadId::placeholder(NEW_LEAD);
            let contact = contact.as_ref().map(|values| values.new_contact(&id));
            let lead = Lead { id, date_created: String::new(), date_updated: None, fields: lead.clone() };
            *found = match contact {
                // Without a company id, the Lead is found through the Contact.
                Some(contact) if event.identity.company_id.is_none() => {
                    Found::Anywhere { people: vec![(contact, Some(lead))] }
                }
                contact => {
                    let (contacts, elsewhere) =
                        (contact.into_iter().collect(), *found == Found::OtherCompany);
                    Found::InLead { lead, contacts, adopted: false, elsewhere }
                }
            };
        }
        Step::CreateContact { lead: id, contact } => {
            if let Found::InLead { contacts, .. } = found {
                contacts.push(contact.new_contact(id));
            }
        }
        Step::UpdateLead { id, changes } => {
            if let Found::InLead { adopted, .. } = found {
                *adopted = false;
            }
            let leads = found.leads_mut().filter(|lead| lead.id == *id);
            leads.for_each(|lead| apply_changes(&mut lead.fields, changes));
        }
        Step::UpdateContact { id, changes } => {
            for contact in found.contacts_mut().filter(|contact| contact.id == *id) {
                apply_changes(&mut contact.fields, &changes.fields);
                contact.lists.extend(changes.lists.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::plan::ContactValues;
    use crate::domain::record::{ContactId, Field, FieldId, Fields};

    #[test]
    fn a_value_that_is_added_to_a_new_record_is_created_with_it() {
        let fields =
            |field: fn(FieldId) -> Field, id: &str| Fields::from([(field(FieldId::new(id)), json!(["a"]))]);
        let values = |fields| ContactValues { fields, ..ContactValues::default() };
        let mut steps =
            vec![Step::CreateLead { lead: Fields::new(), contact: Some(ContactValues::default()) }];
        let lead = LeadId::placeholder(NEW_LEAD);
        merge_step(&mut steps, &Step::UpdateLead { id: lead, changes: fields(Field::Add, "cf_1") });
        let contact = ContactId::placeholder(NEW_CONTACT);
        let changes = values(fields(Field::Add, "cf_2"));
        merge_step(&mut steps, &Step::UpdateContact { id: contact, changes });
        let contact = Some(values(fields(Field::Custom, "cf_2")));
        assert_eq!(steps, [Step::CreateLead { lead: fields(Field::Custom, "cf_1"), contact }]);
    }
}
