//! The decisions: what an event means, which records it is about, and what to change in them.
//!
//! All functions here are pure: no IO, no clock, no randomness and no `async`. They do not depend on RabbitMQ, HTTP or the
//! JSON of Close. In the order in which a message passes them:
//!
//! - [`encoding`] decompresses the body, [`event`] decodes it;
//! - [`mapping`] turns it into the wanted records;
//! - [`matching`] selects the records in Close that the event is about;
//! - [`planner`] makes the [`plan`]: the steps from those to the wanted records, without stale values ([`staleness`]);
//! - [`merge`] combines the steps of several events;
//! - [`partial_write`] removes what Close rejected, and [`refused`] remembers it;
//! - [`readback`] learns from Close's answers how it keeps what it was sent;
//! - [`decision`] explains all of it;
//! - [`journal`] hands what was learnt to the next worker.
//!
//! [`record`], [`phone`], [`schema`], [`switches`] and [`dropped`] are shared types. No two files import each other.

pub mod decision;
pub mod dropped;
pub mod encoding;
pub mod event;
pub(crate) mod footprint;
pub mod journal;
pub mod mapping;
pub mod matching;
pub mod merge;
pub mod partial_write;
pub mod phone;
pub mod plan;
pub mod planner;
pub mod readback;
pub mod record;
pub mod refused;
pub mod repeat;
pub mod schema;
pub mod staleness;
pub mod switches;
pub mod time;
pub(crate) mod value;
mod web_address;
