//! Repeated looks at something that appears after a while.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::cli::certify::observations::Delay;

/// The first pause between two looks.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Repeated looks with growing pauses, so that few calls cover a long time.
pub(super) struct Looks {
    start: Instant,
    max_wait: Duration,
    is_first: bool,
}

impl Looks {
    pub(super) fn new(start: Instant, max_wait: Duration) -> Self {
        Self { start, max_wait, is_first: true }
    }

    /// What was looked for is there now.
    pub(super) fn seen(&self) -> Delay {
        let elapsed = self.start.elapsed();
        if self.is_first { Delay::Below(elapsed) } else { Delay::Within(elapsed) }
    }

    pub(super) fn longer(&self) -> Delay {
        Delay::Longer(self.max_wait)
    }

    /// Waits for the next look. Returns whether there is one.
    pub(super) async fn next(&mut self) -> bool {
        self.is_first = false;
        let elapsed = self.start.elapsed();
        if elapsed >= self.max_wait {
            return false;
        }
        let pause = elapsed.mul_f64(0.35).max(FIRST_PAUSE).min(self.max_wait.saturating_sub(elapsed));
        sleep(pause).await;
        true
    }
}

pub(super) fn progress(text: &str, max_wait: Duration) {
    anstream::eprintln!("{text}, at most {} s", max_wait.as_secs());
}
