//! Metrics, status and traces of the worker.

pub mod backlog_eta;
pub mod metrics;
pub mod otel;
pub mod panic_hook;
pub mod status;
pub mod throughput;
