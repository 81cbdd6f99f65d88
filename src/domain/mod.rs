//! The decisions: what an event means, which record it belongs to, what has to change.
//!
//! Everything here is a function of values. There is no IO, no clock, no randomness and no `async`
//! below this module, and nothing in it knows RabbitMQ, HTTP or the shape of Close's JSON. In
//! reading order, as a message meets them: [`event`] decodes it, [`mapping`] turns it into the
//! records we want (by [`mapping::source`], where values come from, and [`mapping::coerce`], what fields take),
//! [`matching`] picks the records that are meant, [`plan`] lists the steps between (by [`staleness`] leaving what is
//! newer), [`merge`] draws the steps of several events together, [`partial_write`] takes out what Close refused, [`decision`] tells all of it. [`record`] and [`schema`] have the words everyone shares.

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
