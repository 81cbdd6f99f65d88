//! What the broker and its administrators can do.

mod misbehaving;
mod nodes;
mod outcome_events;
mod permissions;
mod restarts;
mod tls;
mod topology;
