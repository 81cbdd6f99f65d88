//! The decisions: what an event means, which record it is about, what has to change.
//!
//! Everything here is a function of values: no IO, no clock, no randomness, no `async`, and nothing that knows RabbitMQ,
//! HTTP or Close's JSON. In the order in which a message meets them:
//!
//! - [`event`] decodes the message;
//! - [`mapping`] turns it into the wanted records;
//! - [`matching`] picks the records in Close that are meant;
//! - [`planner`] makes the [`plan`]: the steps between the two, without what [`staleness`] leaves out;
//! - [`merge`] combines the steps of several events;
//! - [`partial_write`] removes what Close rejected;
//! - [`decision`] explains all of it.
//!
//! [`record`], [`schema`], [`switches`] and [`dropped`] are the vocabulary. A file imports only files below it.

pub mod decision;
pub mod dropped;
pub mod event;
pub mod mapping;
pub mod matching;
pub mod merge;
pub mod partial_write;
pub mod plan;
pub mod planner;
pub mod record;
pub mod schema;
pub mod staleness;
pub mod switches;
mod value;
