//! close-sync keeps the Close CRM in step with a company's customer data.
//!
//! # Bird's-eye view
//!
//! Producers publish `identify` events to a RabbitMQ exchange. One worker per Close organization
//! consumes them, finds the Lead (a company) and the Contact (a person) each event is about, and makes
//! Close agree with it. What cannot succeed ends in a dead-letter queue with a reason, where operators
//! look at it and replay it.
//!
//! The scarce thing is Close's rate budget, and it belongs to the organization: more consumers would
//! buy nothing and race each other. So a work queue has a single active consumer, with plenty of
//! concurrency inside; further workers stand by and take over in moments.
//!
//! # A message's life
//!
//! ```text
//! exchange -> queue
//!   amqp::session     receives the delivery
//!   worker::prepare   domain::event    bytes -> Event, or a dead letter
//!                     domain::mapping  Event -> Desired: wanted values, and who it is about
//!   desk              it waits until no earlier unfinished message shares a key with it (lanes), follows one
//!                     that waits in a delay queue (detours), or is worked on together with the one before it
//!   worker::run       resolve          memory, search, reading by id -> Found  (domain::matching)
//!                     domain::plan     Desired + Found -> steps, or nothing to do; older values stay out
//!                                      (domain::age), several events become one write (domain::together)
//!                     claims           the records of the plan, so that nobody else writes to them
//!                     close::client    the steps, each through the rate gate of its endpoint group
//!                     retry            after a failure: again, later, dead letter, or pause
//!   amqp::session     publishes the successor if there is one, waits for the confirm, then acks
//! ```
//!
//! # Layout
//!
//! In reading order; a module uses those above it, `app` and `cli` use them all.
//!
//! - [`domain`]: the decisions, as pure functions of values.
//! - [`outcome`]: the closed lists of what can become of a message; [`retry`]: what follows a failure.
//! - [`lanes`], [`detours`], [`desk`]: who may run now, and with whom. Pure.
//! - [`close`]: the only place that knows Close's HTTP API, with the rate gate in front of it.
//! - [`known`], `resolve`, [`preflight`]: what Close has; [`applied`]: how old that is; [`claims`]: records
//!   being written to; [`breaker`]: whether it is Close that fails; [`pulse`]: whether it was us who stood still;
//!   [`worker`]: one message, the spine; [`report`]: what it would do, told in [`words`].
//! - [`metrics`], [`traces`], [`state`], [`pace`], [`drain`], [`panics`]: what is known of the work.
//! - [`amqp`]: the only place that knows lapin.
//! - [`board`], [`http`], [`page`]: what operators see, and what they can do about it.
//! - [`config`]: raw settings to typed ones; lower modules own their settings and never import it.
//! - [`app`]: supervision and shutdown of one destination or several; [`cli`]: the commands.
//! - [`simulator`]: a stateful fake Close; [`scenario`]: events played on it. Test equipment: nothing in
//!   the worker knows that it exists.
//!
//! # Invariants
//!
//! 1. Nothing in [`domain`], [`desk`] and what it is made of, and [`outcome`] does IO, reads a clock or is `async`. [`retry`]'s
//!    decision is pure too; its pauses read the clock inside `backoff`.
//! 2. [`worker`] never sees lapin; [`domain`] never sees HTTP, Close's JSON or raw settings.
//! 3. A delivery is settled once, and only after its successor is confirmed. A crash duplicates a
//!    message, it never loses one.
//! 4. Applying an event twice changes nothing the second time: planning again after applying yields no
//!    steps.
//! 5. A POST is never repeated without looking whether it happened. "Not found" is believed only when
//!    the answer cannot have missed a creation.
//! 6. Messages that share a key apply in the order they were published, and none writes over what a newer event
//!    has told.
//! 7. What is not the message's fault costs the message nothing: consumption pauses, messages wait.
//! 8. No global state but the panic hook, the TLS provider and who listens to logs and spans: two workers run side by side in one
//!    process.
//! 9. No personal data in logs, labels, traces, error headers or panic messages.
//!
//! Facts about Close, RabbitMQ and lapin are cited as `close-api.md §n`, `rabbitmq.md §n` and
//! `design.md §n`: the project's collected notes on them, with sources.

/// The version and the commit of this build: `0.1.0 (abc1234)`.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("CLOSE_SYNC_COMMIT"), ")");

pub mod desk;
pub mod detours;
pub mod domain;
pub mod lanes;
pub mod outcome;

pub mod applied;
pub mod breaker;
pub mod claims;
pub mod close;
pub mod known;
pub mod preflight;
pub mod pulse;
mod resolve;
pub mod retry;

pub mod drain;
pub mod metrics;
pub mod pace;
pub mod panics;
pub mod state;
pub mod traces;
pub mod worker;

pub mod report;
pub mod words;

pub mod amqp;
pub mod board;
pub mod http;
pub mod page;

pub mod app;
pub mod cli;
pub mod config;
pub mod scenario;
pub mod simulator;
#[cfg(test)]
mod worlds;
