//! The only place that knows Close's HTTP API.
//!
//! [`Client`] has one short method per operation and speaks in records of [`crate::domain`].
//! [`CloseError`] says what happened in terms a caller can act on. A rate gate stands in front of every
//! call; a 429 never leaves this module, the call waits for the window it was told and goes again.

mod client;
mod endpoint;
mod error;
#[cfg(test)]
pub(crate) mod in_memory;
mod rate_limit;
mod search;
mod search_batch;
pub mod stall_guard;
mod transport;
mod wire;

use crate::domain::record::{Contact, ContactId, FieldId, Lead, LeadId};
use crate::domain::schema::Status;

pub use client::{Client, Settings};
pub use endpoint::{Call, Endpoint, StatusClass};
pub use error::{CloseError, Fault, FieldError, Rejection, ResponseExcerpt};
pub use rate_limit::Priority;
pub use rate_limit::window::RateLimitStatus;
pub use transport::{Response, Transport};

/// Reading of Leads and Contacts. Behind a trait, so that the decisions that depend on what is read
/// can be tried on records in memory as well.
pub trait Records: Sync {
    /// Leads that may have the company id: candidates, to be compared again.
    fn find_leads(
        &self,
        field: &FieldId,
        company_id: &str,
    ) -> impl Future<Output = Result<Vec<Lead>, CloseError>> + Send;

    /// Contacts that may be the person: candidates, to be compared again.
    fn find_contacts(
        &self,
        user: Option<(&FieldId, &str)>,
        email: Option<&str>,
    ) -> impl Future<Output = Result<Hits, CloseError>> + Send;

    /// A Lead with all its Contacts, as they are now.
    fn lead(&self, id: &LeadId) -> impl Future<Output = Result<(Lead, Vec<Contact>), CloseError>> + Send;

    /// A Contact as it is now.
    fn contact(&self, id: &ContactId) -> impl Future<Output = Result<Contact, CloseError>> + Send;
}

/// The organization of the API key, as `GET /me/` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Organization {
    /// Its name.
    pub name: String,
    /// Its lead statuses, in its own order. Empty when Close did not tell.
    pub statuses: Vec<Status>,
}

/// What to search for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Leads with a company id.
    Lead {
        /// The field that stores it.
        field: FieldId,
        /// The id.
        company_id: String,
    },
    /// Contacts with a user id or an email: either is enough.
    Contact {
        /// The field that stores the user id, and the id.
        user: Option<(FieldId, String)>,
        /// The email.
        email: Option<String>,
    },
}

/// What a search for Contacts found.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    /// The oldest, at most a page of them.
    pub contacts: Vec<Contact>,
    /// Whether there are more than fit the page.
    pub more: bool,
}
