//! Tells a fault of Close from a fault of a message: when most messages fail, it is not theirs.
//!
//! One error says nothing, and one message that fails again and again says little. So what counts is the
//! share of messages that met a fault of the moment (a 5xx, a time-out, a lost connection) among those that
//! were answered in the last minute; one that fails at first and succeeds later counts as both. Above half of
//! them, consumption pauses and no message pays for it (`design.md` P5). After a pause Close is on trial:
//! the first few messages decide, and one that succeeds acquits it. A single message convicts nobody: it
//! may be the one that always fails, and would come first after every pause. Pure, with the time as input.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How far back it looks.
const WINDOW: Duration = Duration::from_mins(1);
/// Fewer messages than this say nothing.
const LEAST: usize = 10;
/// Memory is bounded also when a minute has many messages.
const MOST: usize = 1000;
/// Messages that are tried at once after a pause; when all of them fail, it was too short.
pub const HALF_OPEN_PROBES: usize = 3;

/// How messages fared lately.
#[derive(Debug, Default)]
pub struct CircuitBreaker {
    /// When, and whether it went well.
    fared: VecDeque<(Instant, bool)>,
    failed: usize,
    on_trial: bool,
}

impl CircuitBreaker {
    /// A message was answered, or failed for the first time. Tells whether it is time to pause.
    pub fn note(&mut self, now: Instant, well: bool) -> bool {
        self.fared.push_back((now, well));
        self.failed += usize::from(!well);
        let too_old = |at: Instant| at + WINDOW < now;
        while self.fared.len() > MOST || self.fared.front().is_some_and(|(at, _)| too_old(*at)) {
            let gone = self.fared.pop_front();
            self.failed -= usize::from(gone.is_some_and(|(_, well)| !well));
        }
        if well {
            self.on_trial = false;
            return false;
        }
        let enough = if self.on_trial { HALF_OPEN_PROBES } else { LEAST };
        self.fared.len() >= enough && self.failed * 2 > self.fared.len()
    }

    /// Consumption goes on after a pause: what was before is forgotten, and the next messages decide.
    pub fn half_open(&mut self) {
        *self = Self { on_trial: true, ..Self::default() };
    }

    /// Nothing has been heard against Close for long enough.
    pub fn acquit(&mut self) {
        self.on_trial = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_of_many_messages_must_fail() {
        let start = Instant::now();
        let mut breaker = CircuitBreaker::default();
        for n in 1..LEAST {
            assert!(!breaker.note(start, false), "{n} failures may be chance");
        }
        assert!(breaker.note(start, false));

        let mut breaker = CircuitBreaker::default();
        for n in 0..100 {
            assert!(!breaker.note(start, n % 2 == 0), "half of them is not most");
        }
        let later = start + WINDOW + Duration::from_secs(1);
        for _ in 1..LEAST {
            assert!(!breaker.note(later, false), "what is long ago does not count");
        }
        assert!(breaker.note(later, false));
        for _ in 0..MOST * 2 {
            breaker.note(later, true);
        }
        assert_eq!((breaker.fared.len(), breaker.failed), (MOST, 0));
    }

    #[test]
    fn after_a_pause_the_first_few_messages_decide() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        breaker.half_open();
        for _ in 1..HALF_OPEN_PROBES {
            assert!(!breaker.note(now, false), "fewer may be those that always fail");
        }
        assert!(breaker.note(now, false));
        breaker.half_open();
        assert!(!breaker.note(now, true));
        breaker.half_open();
        breaker.acquit();
        for _ in 1..LEAST {
            assert!(!breaker.note(now, false), "breaker_closed");
        }
    }
}
