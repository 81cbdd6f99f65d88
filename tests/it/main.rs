//! The promises, tried on the real thing: a real RabbitMQ, real HTTP to the simulator, and the real
//! program as a process of its own. `tests/run` starts the broker and runs everything.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod archive;
mod broker;
mod budget;
mod check;
mod cluster;
mod contract;
mod dead_letters;
mod deploy;
mod destinations;
mod docs;
mod duplicates;
mod failures;
mod faults;
mod fuzz;
mod mending;
mod model;
mod nodes;
mod order;
mod outcomes;
mod page;
mod pauses;
mod payloads;
mod permissions;
mod plan;
mod publish;
mod replays;
mod restarts;
mod rules;
mod scenarios;
mod schema;
mod service;
mod soak;
mod support;
mod tls;
mod topology;
mod traces;
