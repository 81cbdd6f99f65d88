//! How long the backlog takes: what it costs of Close's budget, and how fast it has been going.
//!
//! Two bounds, and the slower one counts. By the budget: for each endpoint group, the calls a message has
//! taken lately times the messages that wait, over the calls a second that may be made. By experience: the
//! messages that wait over those settled a second while there was a backlog; without one, the speed says how
//! much came and not how much could be done. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::close::{Endpoint, RateLimitStatus};

/// How much the latest measurement counts.
const WEIGHT: f64 = 0.5;
/// Fewer messages say nothing about the calls one takes.
const LEAST: u64 = 20;
/// Times a speed has to be measured before it counts: the first includes the start.
const WARM: u32 = 2;

/// What was measured so far.
#[derive(Debug, Default)]
pub struct BacklogEta {
    calls: BTreeMap<Endpoint, f64>,
    speed: Option<f64>,
    measured: u32,
}

impl BacklogEta {
    /// Takes in what happened in some time: messages settled, calls made, and whether there was a backlog all
    /// along.
    pub fn note(
        &mut self,
        took: Duration,
        settled: u64,
        calls: impl IntoIterator<Item = (Endpoint, u64)>,
        busy: bool,
    ) {
        #[expect(clippy::cast_precision_loss, reason = "counts of seconds")]
        let ratio = |count: u64, of: f64| count as f64 / of;
        if settled >= LEAST {
            for (endpoint, number) in calls {
                let latest = ratio(number, ratio(settled, 1.0));
                let known = self.calls.entry(endpoint).or_insert(latest);
                *known += WEIGHT * (latest - *known);
            }
        }
        if busy && !took.is_zero() {
            let latest = ratio(settled, took.as_secs_f64());
            self.measured += 1;
            if self.measured >= WARM {
                let known = self.speed.get_or_insert(latest);
                *known += WEIGHT * (latest - *known);
            }
        }
    }

    /// How long so many messages take. `None` when nothing is known that says so.
    pub fn estimate(
        &self,
        backlog: u32,
        standings: impl IntoIterator<Item = (Endpoint, RateLimitStatus)>,
    ) -> Option<Duration> {
        if backlog == 0 {
            return Some(Duration::ZERO);
        }
        let backlog = f64::from(backlog);
        let by_budget = standings
            .into_iter()
            .filter_map(|(endpoint, standing)| Some(backlog * self.calls.get(&endpoint)? / standing.rate));
        let by_speed = self.speed.map(|speed| backlog / speed);
        let seconds = by_budget.chain(by_speed).filter(|seconds| seconds.is_finite()).reduce(f64::max)?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(rate: f64) -> RateLimitStatus {
        RateLimitStatus { limit: 240, remaining: 100, reset: Duration::from_secs(8), rate, others: 0.0 }
    }

    #[test]
    fn the_slower_of_budget_and_experience_counts() {
        let mut drain = BacklogEta::default();
        let second = Duration::from_secs(1);
        let budget = || [(Endpoint::Search, standing(2.0)), (Endpoint::ReadLead, standing(24.0))];
        assert_eq!(drain.estimate(1000, budget()), None, "nothing is known");
        assert_eq!(drain.estimate(0, budget()), Some(Duration::ZERO));

        drain.note(10 * second, 100, [(Endpoint::Search, 10), (Endpoint::ReadLead, 100)], false);
        assert_eq!(
            drain.estimate(1000, budget()),
            Some(50 * second),
            "a tenth of a search each, two a second"
        );
        let loose = [(Endpoint::Search, standing(16.0)), (Endpoint::ReadLead, standing(10.0))];
        assert_eq!(drain.estimate(1000, loose), Some(100 * second), "one read each, ten a second");

        drain.note(10 * second, 20, [(Endpoint::Search, 2), (Endpoint::ReadLead, 20)], true);
        assert_eq!(drain.estimate(1000, budget()), Some(50 * second), "the first speed includes the start");
        drain.note(10 * second, 50, [(Endpoint::Search, 5), (Endpoint::ReadLead, 50)], true);
        assert_eq!(drain.estimate(1000, budget()), Some(200 * second), "it has been five a second");
        drain.note(10 * second, 1, [(Endpoint::Search, 30)], false);
        assert_eq!(drain.estimate(1000, budget()), Some(200 * second), "too few to say anything");
    }

    #[test]
    fn a_standstill_is_no_estimate() {
        let mut drain = BacklogEta::default();
        drain.note(Duration::from_secs(10), 0, [], true);
        drain.note(Duration::from_secs(10), 0, [], true);
        assert_eq!(drain.estimate(5, []), None);
    }
}
