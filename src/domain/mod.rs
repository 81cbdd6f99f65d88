//! The decisions: what an event means, which record it belongs to, what has to change.
//!
//! Everything here is a function of values. There is no IO, no clock, no randomness and no `async`
//! below this module, and nothing in it knows RabbitMQ, HTTP or the shape of Close's JSON. In
//! reading order, as a message meets them: [`event`] decodes it, [`mapping`] turns it into the
//! records we want (by [`source`], where values come from, and [`values`], what fields take),
//! [`matching`] picks the records that are meant, [`plan`] lists the steps between (by [`age`] leaving what is
//! newer), [`together`] draws the steps of several events together, [`spare`] takes out what Close refused, [`decision`] tells all of it. [`record`] and [`schema`] have the words everyone shares.

pub mod age;
pub mod decision;
pub mod event;
pub mod mapping;
pub mod matching;
pub mod plan;
pub mod record;
pub mod schema;
pub mod source;
pub mod spare;
pub mod together;
pub mod values;
