//! The client for Close's HTTP API. No other module uses the API.
//!
//! [`Client`] has one short method per operation and returns records of [`crate::domain`]. [`CloseError`] classifies
//! failures by what the caller can do. Every call passes the rate limiter of its endpoint group. A 429 never leaves this
//! module: the call waits for the window that Close reported and is sent again.

mod answer;
mod api;
mod client;
mod clock;
mod deletion;
mod endpoint;
mod error;
mod event_log;
#[cfg(test)]
pub(crate) mod in_memory;
mod organization;
mod rate_limit;
mod raw;
mod records;
mod rejection;
mod requests;
mod search;
mod search_batch;
mod settings;
pub mod stall_guard;
mod transport;
mod wire;

pub use api::{Api, Created, CreatedIds, WritePermit};
pub use client::Client;
pub use clock::Clock;
pub(crate) use deletion::MOMENT;
pub use endpoint::{Call, Endpoint, StatusClass};
pub use error::{CloseError, Fault, Form};
pub use organization::{Listed, Organization};
pub use rate_limit::Priority;
pub use rate_limit::window::RateLimitStatus;
pub use raw::{RawClient, RawError};
pub(crate) use records::Lookup;
pub use records::{Hits, LeadWithContacts, LeadWithPerson, Records, Written};
pub use rejection::{FieldError, Rejection, ResponseExcerpt};
pub use settings::Settings;
pub use transport::{Response, Transport};
