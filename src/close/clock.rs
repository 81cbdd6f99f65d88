//! The time of day at Close. Its records and its event log say when something was created, and what is compared with that
//! must not depend on the clock of this machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use jiff::{SignedDuration, Timestamp};

/// A smaller difference does not matter: answers say the second, and take a while.
const TOLERANCE: SignedDuration = SignedDuration::from_secs(5);
/// A greater difference is a mistake in the set-up of the machine.
const LARGE: SignedDuration = SignedDuration::from_secs(30);

/// Tells the time. Clones share it.
#[derive(Clone)]
pub struct Clock {
    own: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    /// How far Close's clock is ahead, in milliseconds.
    ahead: Arc<AtomicI64>,
}

impl Clock {
    /// The clock of the system.
    pub fn system() -> Self {
        Self::new(Timestamp::now)
    }

    /// Another clock in place of that of the system.
    pub fn new(own: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { own: Arc::new(own), ahead: Arc::default() }
    }

    /// The time at Close, as far as its answers have shown it.
    pub fn now(&self) -> Timestamp {
        let ahead = SignedDuration::from_millis(self.ahead.load(Ordering::Relaxed));
        (self.own)().saturating_add(ahead).unwrap_or(Timestamp::MAX)
    }

    /// An answer that was made now shows this time.
    pub fn shown(&self, time: Timestamp) {
        let ahead = time.duration_since((self.own)());
        let before = SignedDuration::from_millis(self.ahead.load(Ordering::Relaxed));
        if ahead.saturating_sub(before).abs() < TOLERANCE {
            return;
        }
        // A time is within some ten thousand years.
        self.ahead.store(i64::try_from(ahead.as_millis()).unwrap_or_default(), Ordering::Relaxed);
        if ahead.abs() >= LARGE {
            tracing::warn!(
                event = "clock_differs",
                seconds = ahead.as_secs(),
                "the clock of this machine differs from that of Close, using Close's"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_that_of_the_answers() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let clock = Clock::new(move || at(1000));
        let shared = clock.clone();
        for (shown, now) in [(1004, 1000), (1700, 1700), (1696, 1700), (400, 400), (1000, 1000)] {
            clock.shown(at(shown));
            assert_eq!(shared.now(), at(now), "{shown}");
        }
        clock.shown(Timestamp::MAX);
        assert!(clock.now() > at(1_000_000));
    }
}
