//! The stall guard: blocks writes after the process was suspended.
//!
//! A worker that loses the broker notices and stops. A suspended worker (a suspended machine, SIGSTOP, a node
//! without memory) does not notice. RabbitMQ gives its queue to the standby after two to three heartbeat intervals
//! (rabbitmq.md §2.2). When the worker resumes, it would execute old decisions before it notices that its connection is lost. So each
//! session sends heartbeats to this guard, and every write checks the guard first. After a gap no write is sent,
//! whichever comes first: the write, or the heartbeat that ends the session.
//!
//! It compares two clocks, because the monotonic clock stops while a machine is suspended.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct StallGuard(Arc<Mutex<Option<Heartbeat>>>);

#[derive(Clone, Copy, Debug)]
struct Heartbeat {
    at: Instant,
    wall_clock: SystemTime,
    /// A longer gap between heartbeats means that the process was suspended.
    limit: Duration,
    stalled_for: Option<Duration>,
}

impl StallGuard {
    /// The time between heartbeats for a limit.
    pub fn heartbeat_interval(limit: Duration) -> Duration {
        limit / 40
    }

    /// Starts guarding. A gap up to `limit` counts as a busy machine.
    pub fn arm(&self, limit: Duration) {
        let (at, wall_clock) = (Instant::now(), SystemTime::now());
        self.with(|heartbeat| *heartbeat = Some(Heartbeat { at, wall_clock, limit, stalled_for: None }));
    }

    /// Disarms the guard: no session is running.
    pub fn disarm(&self) {
        self.with(|heartbeat| *heartbeat = None);
    }

    /// Records a heartbeat. Returns the longest gap so far if the process was suspended.
    pub fn heartbeat(&self) -> Option<Duration> {
        self.with(|heartbeat| {
            let heartbeat = heartbeat.as_mut()?;
            heartbeat.check();
            (heartbeat.at, heartbeat.wall_clock) = (Instant::now(), SystemTime::now());
            heartbeat.stalled_for
        })
    }

    pub fn allows_writes(&self) -> bool {
        self.with(|heartbeat| heartbeat.as_mut().is_none_or(|heartbeat| heartbeat.check().is_none()))
    }

    fn with<T>(&self, with: impl FnOnce(&mut Option<Heartbeat>) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Heartbeat {
    /// Records a gap. It is never cleared.
    fn check(&mut self) -> Option<Duration> {
        let wall_clock = self.wall_clock.elapsed().unwrap_or_default();
        let gap = self.at.elapsed().max(wall_clock);
        if gap > self.limit {
            self.stalled_for = self.stalled_for.max(Some(gap));
        }
        self.stalled_for
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn after_a_gap_no_write_is_allowed() {
        let guard = StallGuard::default();
        assert!(guard.allows_writes(), "not armed");
        let limit = Duration::from_secs(20);
        for heartbeat_first in [true, false] {
            guard.arm(limit);
            tokio::time::advance(limit).await;
            assert!(guard.allows_writes() && guard.heartbeat().is_none(), "a busy machine");
            tokio::time::advance(limit * 2).await;
            if heartbeat_first {
                assert_eq!(guard.heartbeat(), Some(limit * 2));
                assert!(!guard.allows_writes(), "a heartbeat does not clear the gap");
            } else {
                assert!(!guard.allows_writes());
                assert_eq!(guard.heartbeat(), Some(limit * 2));
            }
        }
        guard.disarm();
        assert!(guard.allows_writes());
    }
}
