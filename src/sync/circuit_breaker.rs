//! Opens when most messages fail: the fault is then in Close, not in the messages.
//!
//! Counts the share of messages with a transient failure (a 5xx, a time-out, a lost connection) among those of the
//! last minute. A message that fails first and succeeds later counts as both. Above half, the breaker opens:
//! consumption pauses and no message uses up an attempt (`design.md` P5). After the pause the breaker is half-open:
//! the first few messages are probes. One success closes it; if all probes fail, it opens again. A single failing
//! message never opens the breaker, because it may always fail and be first after every pause.
//!
//! Pure: the time is an input.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

const WINDOW: Duration = Duration::from_mins(1);
/// With fewer results the breaker stays closed.
const MIN_RESULTS: usize = 10;
/// Bounds memory.
const MAX_RESULTS: usize = 1000;
/// Messages that run at once while the breaker is half-open. It opens again when all of them fail.
pub const HALF_OPEN_PROBES: usize = 3;

#[derive(Debug, Default)]
pub struct CircuitBreaker {
    /// When, and whether it succeeded.
    results: VecDeque<(Instant, bool)>,
    failures: usize,
    half_open: bool,
}

impl CircuitBreaker {
    /// Records a message that Close accepted or answered for good. Closes a half-open breaker.
    pub fn record_success(&mut self, now: Instant) {
        self.record(now, true);
        self.close();
    }

    /// Records the first failure of a message. Returns whether the breaker opens.
    pub fn record_failure(&mut self, now: Instant) -> bool {
        self.record(now, false);
        let min_results = if self.half_open { HALF_OPEN_PROBES } else { MIN_RESULTS };
        self.results.len() >= min_results && self.failures * 2 > self.results.len()
    }

    fn record(&mut self, now: Instant, succeeded: bool) {
        self.results.push_back((now, succeeded));
        self.failures += usize::from(!succeeded);
        let expired = |at: Instant| at + WINDOW < now;
        while self.results.len() > MAX_RESULTS || self.results.front().is_some_and(|(at, _)| expired(*at)) {
            let removed = self.results.pop_front();
            self.failures -= usize::from(removed.is_some_and(|(_, succeeded)| !succeeded));
        }
    }

    /// Consumption resumes after a pause: earlier results no longer count.
    pub fn half_open(&mut self) {
        *self = Self { half_open: true, ..Self::default() };
    }

    pub fn close(&mut self) {
        self.half_open = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_when_more_than_half_of_enough_messages_fail() {
        let start = Instant::now();
        let mut breaker = CircuitBreaker::default();
        for n in 1..MIN_RESULTS {
            assert!(!breaker.record_failure(start), "{n} failures are too few");
        }
        assert!(breaker.record_failure(start));
    }

    #[test]
    fn stays_closed_at_half() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        for _ in 0..50 {
            breaker.record_success(now);
            assert!(!breaker.record_failure(now));
        }
    }

    #[test]
    fn results_expire_after_the_window_and_are_bounded() {
        let start = Instant::now();
        let mut breaker = CircuitBreaker::default();
        (0..100).for_each(|_| breaker.record_success(start));
        let later = start + WINDOW + Duration::from_secs(1);
        for _ in 1..MIN_RESULTS {
            assert!(!breaker.record_failure(later));
        }
        assert!(breaker.record_failure(later), "the earlier successes have expired");
        (0..MAX_RESULTS * 2).for_each(|_| breaker.record_success(later));
        assert_eq!((breaker.results.len(), breaker.failures), (MAX_RESULTS, 0));
    }

    #[test]
    fn half_open_opens_again_when_all_probes_fail() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        breaker.half_open();
        for _ in 1..HALF_OPEN_PROBES {
            assert!(!breaker.record_failure(now));
        }
        assert!(breaker.record_failure(now));
    }

    #[test]
    fn half_open_closes_on_one_success_or_by_request() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        breaker.half_open();
        breaker.record_success(now);
        assert!(!breaker.half_open);
        breaker.half_open();
        breaker.close();
        for _ in 1..MIN_RESULTS {
            assert!(!breaker.record_failure(now), "the closed breaker's limit applies");
        }
    }
}
