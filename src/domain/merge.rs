//! Several events about one person, one right after the other: decided one by one, written in one go.
//!
//! Each event is planned against what the one before it leaves, so every message has the plan and the outcome
//! it would have had by itself. The steps are then drawn together: what two of them change in one record
//! becomes one write, with the values the last of them wanted. That is what people read in Close afterwards, and
//! what a burst of events about one person costs: one look-up and one write, however many there are.

use crate::domain::mapping::Desired;
use crate::domain::matching::Found;
use crate::domain::plan::{ContactValues, NEW_CONTACT, NEW_LEAD, Plan, Step, plan};
use crate::domain::record::{Contact, ContactId, Lead, LeadId};
use crate::domain::staleness::RecordVersions;
use crate::domain::switches::Switches;

/// What several events want, and the writes that it takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergedPlan {
    /// What follows from each event, in order.
    pub plans: Vec<Plan>,
    /// The writes, drawn together.
    pub steps: Vec<Step>,
}

impl MergedPlan {
    /// Plans an event, and others that go along with it ([`Desired::goes_along`]).
    pub fn plan(
        first: &Desired,
        others: &[&Desired],
        found: &Found,
        switches: Switches,
        ages: &RecordVersions,
    ) -> Self {
        let before = plan(first, found, switches, ages);
        let mut together = Self { steps: before.steps.clone(), plans: vec![before] };
        let (mut found, mut ages, mut before) = (found.clone(), ages.clone(), first);
        for event in others {
            if let Some(plan) = together.plans.last() {
                plan.note_versions(&mut ages, before);
                plan.steps.iter().for_each(|step| found.apply(step, before));
            }
            let plan = plan(event, &found, switches, &ages);
            plan.steps.iter().for_each(|step| draw_in(&mut together.steps, step));
            together.plans.push(plan);
            before = event;
        }
        together
    }

    /// Whether a record would be created: then "not found" has to be beyond doubt.
    pub fn creates(&self) -> bool {
        self.steps.iter().any(Step::creates)
    }

    /// The ids of the records that would be changed.
    pub fn changed(&self) -> Vec<String> {
        self.steps.iter().filter_map(Step::changes).map(str::to_owned).collect()
    }
}

/// Adds a step to those before it: to the one that writes the same record, if there is one.
fn draw_in(steps: &mut Vec<Step>, step: &Step) {
    let drawn = steps.iter_mut().any(|before| match (before, step) {
        (Step::UpdateLead { id, changes }, Step::UpdateLead { id: same, changes: more }) if id == same => {
            changes.extend(more.clone());
            true
        }
        (Step::CreateLead { lead, .. }, Step::UpdateLead { id, changes }) if id.as_str() == NEW_LEAD => {
            lead.extend(changes.clone());
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
            contact.extend(changes);
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
    if !drawn {
        steps.push(step.clone());
    }
}

impl ContactValues {
    /// Later values win; a list that is sent is whole.
    fn extend(&mut self, later: &Self) {
        self.fields.extend(later.fields.clone());
        self.lists.extend(later.lists.clone());
    }

    fn new_contact(&self, lead: &LeadId) -> Contact {
        Contact {
            id: ContactId::new(NEW_CONTACT),
            lead_id: Some(lead.clone()),
            date_created: String::new(),
            fields: self.fields.clone(),
            lists: self.lists.clone(),
        }
    }
}

impl Found {
    /// What there is after a step: what the next event of the same person and company finds.
    fn apply(&mut self, step: &Step, event: &Desired) {
        match step {
            Step::CreateLead { lead, contact } => {
                let id = LeadId::new(NEW_LEAD);
                let contact = contact.as_ref().map(|values| values.new_contact(&id));
                let lead = Lead { id, date_created: String::new(), fields: lead.clone() };
                *self = match contact {
                    // Without a company id it is by the Contact that the Lead is found again.
                    Some(contact) if event.identity.company_id.is_none() => {
                        Self::Anywhere { people: vec![(contact, Some(lead))] }
                    }
                    contact => {
                        let (contacts, elsewhere) =
                            (contact.into_iter().collect(), *self == Self::OtherCompany);
                        Self::InLead { lead, contacts, adopted: false, elsewhere }
                    }
                };
            }
            Step::CreateContact { lead: id, contact } => {
                if let Self::InLead { contacts, .. } = self {
                    contacts.push(contact.new_contact(id));
                }
            }
            Step::UpdateLead { id, changes } => {
                if let Self::InLead { adopted, .. } = self {
                    *adopted = false;
                }
                let leads = self.leads_mut().filter(|lead| lead.id == *id);
                leads.for_each(|lead| lead.fields.extend(changes.clone()));
            }
            Step::UpdateContact { id, changes } => {
                for contact in self.contacts_mut().filter(|contact| contact.id == *id) {
                    contact.fields.extend(changes.fields.clone());
                    contact.lists.extend(changes.lists.clone());
                }
            }
        }
    }

    fn leads_mut(&mut self) -> impl Iterator<Item = &mut Lead> {
        let (inside, anywhere) = match self {
            Self::InLead { lead, .. } => (Some(lead), None),
            Self::Anywhere { people } => {
                (None, Some(people.iter_mut().filter_map(|(_, lead)| lead.as_mut())))
            }
            Self::OtherCompany | Self::Nobody => (None, None),
        };
        inside.into_iter().chain(anywhere.into_iter().flatten())
    }

    fn contacts_mut(&mut self) -> impl Iterator<Item = &mut Contact> {
        let (inside, anywhere) = match self {
            Self::InLead { contacts, .. } => (Some(contacts.iter_mut()), None),
            Self::Anywhere { people } => (None, Some(people.iter_mut().map(|(contact, _)| contact))),
            Self::OtherCompany | Self::Nobody => (None, None),
        };
        inside.into_iter().flatten().chain(anywhere.into_iter().flatten())
    }
}
