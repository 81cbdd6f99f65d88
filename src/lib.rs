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
//!   consumer             receives the delivery
//!   Worker::prepare      domain::event      bytes -> Event, or a dead letter
//!                        domain::mapping    Event -> Desired: wanted values, and who the event is about
//!   consumer::scheduler  waits until no earlier unfinished message shares a key (key_queues); follows an
//!                        earlier one that waits in a delay queue (delayed); may be merged with the one before
//!                        (the first message starts nothing before the consumer has read its predecessors' journal)
//!   sync::attempt        sync::resolver     id cache, batched search, read by id -> Found (domain::matching)
//!                        domain::planner    Desired + Found -> steps, or nothing to do; stale values are left
//!                                           out (domain::staleness), several events become one write
//!                                           (domain::merge)
//!                        record_locks       locks the records of the plan against other writes
//!                        attempt::freshness takes the budget of a write, then reads again what a person may have changed
//!                        sync::journal      writes down what is about to be created
//!                        close::client      sends the steps, each through the rate limiter of its group
//!                        retry              after a failure: in place, delay queue, dead letter, or pause
//!   consumer             publishes the successor if there is one, waits for the confirm, then acks
//! ```
//!
//! # Layout
//!
//! Read top down it is one sentence: the cli supervises a consumer that syncs messages to Close. A module uses
//! only what stands below it.
//!
//! - [`cli`]: one file per command.
//! - [`supervisor`]: starts, stops, reloads and pauses destinations, one per Close organization.
//! - [`config`]: raw settings to typed ones. Lower modules own their settings and never import it.
//! - [`http`]: metrics, health and the operator's page.
//! - [`dead_letters`]: scan, filter, edit, replay, import and export.
//! - [`consumer`]: the loop from delivery to ack, with its [`consumer::scheduler`].
//! - [`sync`]: one message against Close: attempts, resolver, caches, locks, circuit breaker.
//! - [`telemetry`]: metrics, status, throughput, traces.
//! - [`amqp`]: connections, topology, publishing and headers, with lapin.
//! - [`retry`]: what follows a failure; [`outcome`]: the closed lists of what can become of a message.
//! - [`close`]: the only place that knows Close's HTTP API, with its rate limiter.
//! - [`domain`]: the decisions, as pure functions of values.
//! - [`spans`]: what code needs to create a span; [`text`]: phrases of commands and of the operator's page; [`waits`]:
//!   what a message waited for.
//! - `scenario`: test files for a mapping, played on `close-sync-simulator`, a stateful fake Close. Only with the
//!   feature `simulator`, which the commands `simulate` and `test` need and the worker does not.
//!
//! # Invariants
//!
//! 1. Nothing in [`domain`], [`consumer::scheduler`] and [`outcome`] does IO, reads a clock or is `async`. The
//!    decision in [`retry`] is pure too; its pauses read the clock inside `backoff`.
//! 2. [`sync`] never sees lapin. [`domain`] never sees HTTP, Close's JSON or raw settings.
//! 3. A delivery is settled once, and only after its successor is confirmed. A crash duplicates a message. It never
//!    loses one.
//! 4. Applying an event twice changes nothing the second time: planning again after applying yields no steps.
//! 5. A POST is never repeated without looking whether it happened. "Not found" counts only when the answer cannot
//!    have missed a creation.
//! 6. Messages that share a key apply in the order they were published. None overwrites what a newer event has set.
//! 7. A fault that is not the message's costs the message nothing: consumption pauses, messages wait.
//! 8. The only global state is the panic hook, the TLS provider, the rules of phone numbers, and the subscribers of
//!    logs and spans. Two workers
//!    run side by side in one process.
//! 9. No personal data in logs, labels, traces, error headers or panic messages.
//!
//! Facts about Close, RabbitMQ and lapin are cited as `close-api.md §n`, `rabbitmq.md §n` and
//! `design.md §n`: the project's collected notes on them, with sources.

/// The version and the commit of this build: `0.1.0 (abc1234)`.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("CLOSE_SYNC_COMMIT"), ")");

// Top down: a module uses only what stands below it.
pub mod cli;
#[cfg(feature = "simulator")]
pub mod scenario;
pub mod supervisor;

pub mod config;
pub mod http;

pub mod dead_letters;

pub mod consumer;
pub mod sync;

pub mod telemetry;

pub mod amqp;

pub mod retry;

pub mod outcome;

pub mod close;

pub mod domain;
pub mod spans;
pub mod text;
pub mod waits;
