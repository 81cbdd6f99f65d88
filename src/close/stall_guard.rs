//! Whether this process has stood still.
//!
//! A worker that cannot reach the broker notices, and stops. One that is frozen (a suspended machine, SIGSTOP, a
//! node without memory) notices nothing: the broker hands its queue to the standby after three heartbeats
//! (rabbitmq.md §2.2), and when it wakes up it would go on with what it decided long ago, before it hears that its
//! connection is gone. So a session beats, and every change to Close looks at the pulse before it is sent. After a
//! gap none is sent any more, whoever wakes up first: the call that looks, or the beat that ends the session.
//!
//! Two clocks, as the monotonic one stands still while a machine is suspended.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// The pulse of a worker. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct StallGuard(Arc<Mutex<Option<Beat>>>);

#[derive(Clone, Copy, Debug)]
struct Beat {
    at: Instant,
    on_the_wall: SystemTime,
    /// A longer gap means that the process stood still.
    limit: Duration,
    stood_still: Option<Duration>,
}

impl StallGuard {
    /// How far apart beats are.
    pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

    /// Watches from now on; gaps up to `limit` are believed to be a busy machine.
    pub fn arm(&self, limit: Duration) {
        let (at, on_the_wall) = (Instant::now(), SystemTime::now());
        self.with(|beat| *beat = Some(Beat { at, on_the_wall, limit, stood_still: None }));
    }

    /// Nobody beats any more, and changes need no pulse.
    pub fn disarm(&self) {
        self.with(|beat| *beat = None);
    }

    /// Beats. Tells for how long the process stood still, if it did.
    pub fn heartbeat(&self) -> Option<Duration> {
        self.with(|beat| {
            let beat = beat.as_mut()?;
            beat.look();
            (beat.at, beat.on_the_wall) = (Instant::now(), SystemTime::now());
            beat.stood_still
        })
    }

    /// Whether a change may be sent.
    pub fn allows_writes(&self) -> bool {
        self.with(|beat| beat.as_mut().is_none_or(|beat| beat.look().is_none()))
    }

    fn with<T>(&self, with: impl FnOnce(&mut Option<Beat>) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Beat {
    /// Notes a gap, for good.
    fn look(&mut self) -> Option<Duration> {
        let on_the_wall = self.on_the_wall.elapsed().unwrap_or_default();
        let gap = self.at.elapsed().max(on_the_wall);
        if gap > self.limit {
            self.stood_still = self.stood_still.max(Some(gap));
        }
        self.stood_still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn after_a_gap_nothing_is_sent_whoever_wakes_up_first() {
        let pulse = StallGuard::default();
        assert!(pulse.allows_writes(), "nobody watches");
        let limit = Duration::from_secs(20);
        for beats_first in [true, false] {
            pulse.arm(limit);
            tokio::time::advance(limit).await;
            assert!(pulse.allows_writes() && pulse.heartbeat().is_none(), "a busy machine");
            tokio::time::advance(limit * 2).await;
            if beats_first {
                assert_eq!(pulse.heartbeat(), Some(limit * 2));
                assert!(!pulse.allows_writes(), "a beat does not heal it");
            } else {
                assert!(!pulse.allows_writes());
                assert_eq!(pulse.heartbeat(), Some(limit * 2));
            }
        }
        pulse.disarm();
        assert!(pulse.allows_writes());
    }
}
