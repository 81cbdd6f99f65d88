//! Messages settled per second over the last minute. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// The length of the window in seconds.
const WINDOW: usize = 60;

/// Counts messages per second in a ring of one minute.
#[derive(Debug)]
pub struct Throughput {
    began: Instant,
    /// For each slot of the ring: its second since the start, and the count.
    seconds: [(usize, u32); WINDOW],
}

impl Throughput {
    pub fn new(now: Instant) -> Self {
        Self { began: now, seconds: [(0, 0); WINDOW] }
    }

    /// Counts a message.
    pub fn record(&mut self, now: Instant) {
        let second = self.second(now);
        let (of, count) = &mut self.seconds[second % WINDOW];
        if *of != second {
            (*of, *count) = (second, 0);
        }
        *count = count.saturating_add(1);
    }

    /// Messages per second, over the last minute or since the start.
    pub fn rate(&self, now: Instant) -> f64 {
        let second = self.second(now);
        let recent = self.seconds.iter().filter(|(of, _)| second - of < WINDOW);
        let count: u32 = recent.map(|(_, count)| count).sum();
        let span = (now - self.began).clamp(Duration::from_secs(1), Duration::from_secs(WINDOW as u64));
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
        assert_eq!(rate(&throughput, 64), "0.25", "five of the ten seconds remain");
        assert_eq!(rate(&throughput, 70), "0.00");
        throughput.record(at(120));
        assert_eq!(rate(&throughput, 120), "0.02", "the slot of the first second is reused");
    }
}
