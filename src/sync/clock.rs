//! The time of day. Tests in virtual time have one of their own.

use std::sync::Arc;

use jiff::Timestamp;

/// Tells the time. Clones share it.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The clock of the system.
pub fn system_clock() -> Clock {
    Arc::new(Timestamp::now)
}
