//! What the worker exports.

mod traces;
