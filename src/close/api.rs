//! The calls that syncing a message makes.

use jiff::Timestamp;

use crate::close::error::CloseError;
use crate::close::records::{LeadWithContacts, Records, Written};
use crate::close::requests::Acquired;
use crate::domain::plan::Step;
use crate::domain::record::{Contact, ContactId, Lead, LeadId};
use crate::waits::Waits;

/// The records that a step created or gave keys to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreatedIds {
    /// The Lead that has the company id from now on.
    pub lead: Option<LeadId>,
    /// The person's Contact.
    pub contact: Option<ContactId>,
}

impl CreatedIds {
    /// The ids in the answer to a step. A changed Contact is among them, because the change may have given it the user id
    /// or the email.
    pub fn of(step: &Step, written: &Written) -> Self {
        match (step, written) {
            (Step::CreateLead { .. }, Written::Lead(LeadWithContacts { lead, contacts, missing })) => Self {
                lead: Some(lead.id.clone()),
                contact: contacts.first().map(|contact| &contact.id).or(missing.first()).cloned(),
            },
            (Step::CreateContact { .. } | Step::UpdateContact { .. }, Written::Contact(contact)) => {
                Self { lead: None, contact: Some(contact.id.clone()) }
            }
            (
                Step::CreateLead { .. }
                | Step::CreateContact { .. }
                | Step::UpdateLead { .. }
                | Step::UpdateContact { .. },
                Written::Lead(_) | Written::Contact(_) | Written::Unread,
            ) => Self::default(),
        }
    }
}

/// The budget for one write. Dropping it returns the budget.
#[derive(Debug)]
pub struct WritePermit(Option<Acquired>);

impl WritePermit {
    pub(crate) fn new(acquired: Acquired) -> Self {
        Self(Some(acquired))
    }

    pub(crate) fn take(mut self) -> Option<Acquired> {
        self.0.take()
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        if let Some((permit, _)) = self.0.take() {
            permit.give_back();
        }
    }
}

/// Records that the event log lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Created {
    pub leads: Vec<Lead>,
    pub contacts: Vec<Contact>,
    /// These are all. A limited number of pages is read.
    pub complete: bool,
}

/// Close as one message sees it. A trait, so that attempts can be tested on records in memory.
pub trait Api: Records {
    /// The budget for one write.
    type Permit: Send;

    /// Waits until the rate limiter allows the write.
    fn acquire(&self, step: &Step) -> impl Future<Output = Self::Permit> + Send;

    /// Sends a write. Returns the record as Close stored it. `None` after a 429: nothing has happened, and the caller may
    /// have to read again before the next try.
    fn write(
        &self,
        step: &Step,
        permit: Self::Permit,
    ) -> impl Future<Output = Result<Option<Written>, CloseError>> + Send;

    /// Lists the Leads and Contacts created in a span of time, from the event log. It shows them sooner than search
    /// (close-api.md §11).
    fn created_between(
        &self,
        since: Timestamp,
        until: Timestamp,
    ) -> impl Future<Output = Result<Created, CloseError>> + Send;

    /// The number of calls made for this message, including those answered with 429.
    fn calls(&self) -> u32;

    /// What the message has waited for.
    fn waits(&self) -> &Waits;

    /// Whether another message already counts the last failure. Resets the flag.
    fn take_duplicate_failure(&self) -> bool;
}
