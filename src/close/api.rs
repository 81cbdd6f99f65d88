//! The calls that syncing a message makes.

use crate::close::error::CloseError;
use crate::close::records::Records;
use crate::domain::plan::Step;
use crate::domain::record::{Contact, ContactId, Lead, LeadId};

/// The records that a step created or gave keys to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreatedIds {
    /// The Lead that has the company id from now on.
    pub lead: Option<LeadId>,
    /// The person's Contact.
    pub contact: Option<ContactId>,
}

/// Close as one message sees it. A trait, so that attempts can be tested on records in memory.
pub trait Api: Records {
    /// Sends a write. Returns the ids of the created records; for a changed Contact its id, because the change may
    /// have given it the user id or the email.
    fn write(&self, step: &Step) -> impl Future<Output = Result<CreatedIds, CloseError>> + Send;

    /// Lists the Leads and Contacts created since a time, from the event log. Unlike search, the event log shows
    /// them at once (close-api.md §11). Returns at most one page of each, so a record that is missing may still exist.
    fn created_since(
        &self,
        since: jiff::Timestamp,
    ) -> impl Future<Output = Result<(Vec<Lead>, Vec<Contact>), CloseError>> + Send;

    /// The number of calls made for this message, including those answered with 429.
    fn calls(&self) -> u32;

    /// Whether another message already counts the last failure. Resets the flag.
    fn take_duplicate_failure(&self) -> bool;
}
