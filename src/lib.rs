//! x
pub mod amqp;
pub mod app;
pub mod cli;
pub mod close;
pub mod config;
pub mod domain;
pub mod http;
pub mod known;
pub mod lanes;
pub mod metrics;
pub mod outcome;
pub mod panics;
pub mod preflight;
mod resolve;
pub mod retry;
pub mod simulator;
pub mod state;
pub mod worker;
