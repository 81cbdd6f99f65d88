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

pub use client::{Call, Client, CustomField, Endpoint, Hits, Settings, StatusClass, User};
pub use error::{CloseError, Fault, FieldError, Rejection};
