//! The promises, tried on the real thing: a real RabbitMQ, real HTTP to the simulator, and the real
//! program as a process of its own. `tests/run` starts the broker and runs everything.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod admin;
mod broker;
mod cli;
mod dead_letters;
mod model;
mod repo;
mod soak;
mod support;
mod sync;
mod telemetry;
