//! Estimates how long the backlog takes to drain. Pure.
//!
//! There are two estimates, and the longer one counts. By rate limit, for each endpoint group: recent calls per message
//! times the backlog, divided by the calls per second that are allowed. By throughput: the backlog divided by the
//! messages settled per second. Throughput is only measured while there is a backlog; without one it shows how much
//! arrived, not how much could be processed.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::close::{Endpoint, RateLimitStatus};

/// The weight of the latest measurement in the moving average.
const WEIGHT: f64 = 0.5;
/// The number of messages needed to measure the calls per message.
const MIN_MESSAGES: u64 = 20;
/// The number of throughput measurements before they count: the first one includes the start.
const WARM_UP: u32 = 2;

#[derive(Debug, Default)]
pub struct BacklogEta {
    calls_per_message: BTreeMap<Endpoint, f64>,
    throughput: Option<f64>,
    measured: u32,
}

impl BacklogEta {
    /// Records an interval: messages settled, calls made, and whether there was a backlog all the time.
    pub fn record(
        &mut self,
        took: Duration,
        settled: u64,
        calls: impl IntoIterator<Item = (Endpoint, u64)>,
        busy: bool,
    ) {
        #[expect(clippy::cast_precision_loss, reason = "counts of seconds")]
        let ratio = |count: u64, of: f64| count as f64 / of;
        if settled >= MIN_MESSAGES {
            for (endpoint, number) in calls {
                let latest = ratio(number, ratio(settled, 1.0));
                let average = self.calls_per_message.entry(endpoint).or_insert(latest);
                *average += WEIGHT * (latest - *average);
            }
        }
        if busy && !took.is_zero() {
            let latest = ratio(settled, took.as_secs_f64());
            self.measured += 1;
            if self.measured >= WARM_UP {
                let average = self.throughput.get_or_insert(latest);
                *average += WEIGHT * (latest - *average);
            }
        }
    }

    /// Estimates the time to process a backlog. `None` without enough measurements.
    pub fn estimate(
        &self,
        backlog: u32,
        rate_limits: impl IntoIterator<Item = (Endpoint, RateLimitStatus)>,
    ) -> Option<Duration> {
        if backlog == 0 {
            return Some(Duration::ZERO);
        }
        let backlog = f64::from(backlog);
        let by_rate_limit = rate_limits.into_iter().filter_map(|(endpoint, status)| {
            Some(backlog * self.calls_per_message.get(&endpoint)? / status.rate)
        });
        let by_throughput = self.throughput.map(|throughput| backlog / throughput);
        let seconds =
            by_rate_limit.chain(by_throughput).filter(|seconds| seconds.is_finite()).reduce(f64::max)?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(rate: f64) -> RateLimitStatus {
        RateLimitStatus { limit: 240, remaining: 100, reset: Duration::from_secs(8), rate, others: 0.0 }
    }

    #[test]
    fn the_longer_of_the_two_estimates_counts() {
        let mut eta = BacklogEta::default();
        let second = Duration::from_secs(1);
        let budget = || [(Endpoint::Search, status(2.0)), (Endpoint::ReadLead, status(24.0))];
        assert_eq!(eta.estimate(1000, budget()), None, "nothing was measured");
        assert_eq!(eta.estimate(0, budget()), Some(Duration::ZERO));

        eta.record(10 * second, 100, [(Endpoint::Search, 10), (Endpoint::ReadLead, 100)], false);
        assert_eq!(eta.estimate(1000, budget()), Some(50 * second), "a tenth of a search each, two a second");
        let loose = [(Endpoint::Search, status(16.0)), (Endpoint::ReadLead, status(10.0))];
        assert_eq!(eta.estimate(1000, loose), Some(100 * second), "one read each, ten a second");

        eta.record(10 * second, 20, [(Endpoint::Search, 2), (Endpoint::ReadLead, 20)], true);
        assert_eq!(
            eta.estimate(1000, budget()),
            Some(50 * second),
            "the first measurement includes the start"
        );
        eta.record(10 * second, 50, [(Endpoint::Search, 5), (Endpoint::ReadLead, 50)], true);
        assert_eq!(eta.estimate(1000, budget()), Some(200 * second), "it has been five a second");
        eta.record(10 * second, 1, [(Endpoint::Search, 30)], false);
        assert_eq!(eta.estimate(1000, budget()), Some(200 * second), "too few messages to measure calls");
    }

    #[test]
    fn a_standstill_yields_no_estimate() {
        let mut eta = BacklogEta::default();
        eta.record(Duration::from_secs(10), 0, [], true);
        eta.record(Duration::from_secs(10), 0, [], true);
        assert_eq!(eta.estimate(5, []), None);
    }
}
