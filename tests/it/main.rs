//! Integration tests: the real program as a process, a real RabbitMQ, and HTTP to the simulator.
//!
//! `tests/run` starts the broker and runs them. `slow::cluster` and `slow::soak` run with `tests/run --all` only.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod admin;
mod broker;
mod cli;
mod dead_letters;
mod model;
mod repo;
mod slow;
mod support;
mod sync;
mod telemetry;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
