//! What the worker exports.

mod secrets;
mod traces;
