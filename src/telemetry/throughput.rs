//! How many messages were settled a second, over the last minute. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// What is looked back on, in seconds.
const SPAN: usize = 60;

/// Messages counted by the second, for as long as they matter.
#[derive(Debug)]
pub struct Throughput {
    began: Instant,
    /// The second of each place, since the beginning, and what was counted in it.
    seconds: [(usize, u32); SPAN],
}

impl Throughput {
    /// Nothing is counted yet.
    pub fn new(now: Instant) -> Self {
        Self { began: now, seconds: [(0, 0); SPAN] }
    }

    /// One more.
    pub fn record(&mut self, now: Instant) {
        let second = self.second(now);
        let (of, count) = &mut self.seconds[second % SPAN];
        if *of != second {
            (*of, *count) = (second, 0);
        }
        *count = count.saturating_add(1);
    }

    /// Messages a second, over the last minute or for as long as there was time.
    pub fn rate(&self, now: Instant) -> f64 {
        let second = self.second(now);
        let recent = self.seconds.iter().filter(|(of, _)| second - of < SPAN);
        let count: u32 = recent.map(|(_, count)| count).sum();
        let span = (now - self.began).clamp(Duration::from_secs(1), Duration::from_secs(SPAN as u64));
        f64::from(count) / span.as_secs_f64()
    }

    fn second(&self, now: Instant) -> usize {
        usize::try_from((now - self.began).as_secs()).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_minute_counts() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut throughput = Throughput::new(began);
        let rate = |throughput: &Throughput, now: u64| format!("{:.2}", throughput.rate(at(now)));
        assert_eq!(rate(&throughput, 0), "0.00");
        for second in 0..10 {
            (0..3).for_each(|_| throughput.record(at(second)));
        }
        assert_eq!(rate(&throughput, 10), "3.00", "ten seconds is all there was");
        assert_eq!(rate(&throughput, 59), "0.51");
        assert_eq!(rate(&throughput, 64), "0.25", "five seconds are left of the ten");
        assert_eq!(rate(&throughput, 70), "0.00");
        throughput.record(at(120));
        assert_eq!(rate(&throughput, 120), "0.02", "the place of the first second is used again");
    }
}
