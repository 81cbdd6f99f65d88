//! What operators see of the work: metrics, state, traces.

pub mod backlog_eta;
pub mod metrics;
pub mod otel;
pub mod panic_hook;
pub mod status;
pub mod throughput;
