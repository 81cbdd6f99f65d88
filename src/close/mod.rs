//! The only place that knows Close's HTTP API.
//!
//! [`Client`] has one short method per operation and speaks in records of [`crate::domain`].
//! [`CloseError`] says what happened in terms a caller can act on. The rate gate in [`gate`] stands
//! in front of every call; a 429 never leaves this module, the call waits for the window it was told
//! and goes again.

mod client;
mod error;
pub mod gate;
mod wire;

use crate::domain::record::{Contact, FieldId};

pub use client::{Call, Client, Endpoint, Settings, StatusClass};
pub use error::{CloseError, Fault, FieldError, Rejection};

/// The owner of the API key, as `GET /me/` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The name of the organization the key belongs to.
    pub organization: String,
}

/// A custom field of Leads or Contacts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomField {
    /// Its id.
    pub id: FieldId,
    /// Its name, as people see it.
    pub name: String,
    /// Its type: `text`, `number`, `choices` and so on (close-api.md §7).
    pub kind: String,
}

/// What to search for.
#[derive(Clone, Copy, Debug)]
enum Lookup<'a> {
    /// Leads with a company id.
    Lead {
        /// The field that stores it.
        field: &'a FieldId,
        /// The id.
        company_id: &'a str,
    },
    /// Contacts with a user id or an email: either is enough.
    Contact {
        /// The field that stores the user id, and the id.
        user: Option<(&'a FieldId, &'a str)>,
        /// The email.
        email: Option<&'a str>,
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
