//! What a message waited for while it was worked on.
//!
//! Every place where a message may wait for long notes its cause in the [`Waits`] of the message. When the message was
//! held for the longest allowed time, the longest of them is the cause of its delay.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use strum::{IntoStaticStr, VariantArray};
use tokio::time::Instant;

/// What a message waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum WaitCause {
    /// Close's rate limits.
    RateLimited,
    /// Search: a change that it may not show yet, or a shared search.
    Search,
    /// Another message that writes to the same record.
    RecordLock,
    /// The answers of Close.
    SlowClose,
    /// The pauses between retries in place.
    Backoff,
    /// The journal.
    Journal,
}

const CAUSES: usize = WaitCause::VARIANTS.len();

impl WaitCause {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// What was waited for, in words.
    pub fn description(self) -> &'static str {
        match self {
            Self::RateLimited => "Close's rate limits",
            Self::Search => "Close's search to show recent changes",
            Self::RecordLock => "another message that writes to the same record",
            Self::SlowClose => "answers of Close",
            Self::Backoff => "the next retry",
            Self::Journal => "the journal in RabbitMQ",
        }
    }
}

/// The waits of one message, or of a search that several messages share. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Waits(Arc<Mutex<Tally>>);

#[derive(Debug, Default)]
struct Tally {
    waited: [Duration; CAUSES],
    /// The number of waits under way.
    under_way: [u32; CAUSES],
    /// Up to when waits under way are added.
    until: Option<Instant>,
}

/// A wait under way. It ends when this is dropped, also because the message is dropped.
#[derive(Debug)]
#[must_use = "a wait lasts until this is dropped"]
pub struct Waiting<'a> {
    waits: &'a Waits,
    cause: WaitCause,
}

/// A wait for work that several messages share. What the work waits for meanwhile is what the message waits for.
#[derive(Debug)]
#[must_use = "a wait lasts until this is dropped"]
pub(crate) struct Sharing<'a> {
    waits: &'a Waits,
    shared: &'a Waits,
    before: [Duration; CAUSES],
}

impl Waits {
    /// A wait begins.
    pub fn start(&self, cause: WaitCause) -> Waiting<'_> {
        self.with(|tally| tally.under_way[cause as usize] += 1);
        Waiting { waits: self, cause }
    }

    /// Waits for a future.
    pub async fn during<T>(&self, cause: WaitCause, future: impl Future<Output = T>) -> T {
        let _waiting = self.start(cause);
        future.await
    }

    /// A wait for work begins that notes its own waits.
    pub(crate) fn share<'a>(&'a self, shared: &'a Self) -> Sharing<'a> {
        Sharing { waits: self, shared, before: shared.with(|tally| tally.waited) }
    }

    /// The cause of the longest wait, and how long it took in total.
    pub fn longest(&self) -> (WaitCause, Duration) {
        let waited = self.with(|tally| tally.waited);
        let all = WaitCause::VARIANTS.iter().map(|cause| (*cause, waited[*cause as usize]));
        all.max_by_key(|(_, waited)| *waited).unwrap_or((WaitCause::SlowClose, Duration::ZERO))
    }

    /// The tally up to now.
    fn with<T>(&self, with: impl FnOnce(&mut Tally) -> T) -> T {
        let mut tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = tally.until.replace(now).map_or(Duration::ZERO, |until| now - until);
        let Tally { waited, under_way, .. } = &mut *tally;
        for (waited, _) in waited.iter_mut().zip(under_way).filter(|(_, number)| **number > 0) {
            *waited += passed;
        }
        with(&mut tally)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waits.with(|tally| tally.under_way[self.cause as usize] -= 1);
    }
}

impl Drop for Sharing<'_> {
    fn drop(&mut self) {
        let after = self.shared.with(|tally| tally.waited);
        self.waits.with(|tally| {
            for (waited, (after, before)) in tally.waited.iter_mut().zip(after.into_iter().zip(self.before)) {
                *waited += after.saturating_sub(before);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_longest_wait_is_the_cause_also_while_it_is_under_way_or_was_dropped() {
        let waits = Waits::default();
        assert_eq!(waits.longest().1, Duration::ZERO);
        waits.during(WaitCause::Backoff, tokio::time::sleep(3 * SECOND)).await;
        assert_eq!(waits.longest(), (WaitCause::Backoff, 3 * SECOND));
        let dropped = waits.during(WaitCause::Search, std::future::pending::<()>());
        assert!(tokio::time::timeout(2 * SECOND, dropped).await.is_err());
        assert_eq!(waits.longest(), (WaitCause::Backoff, 3 * SECOND));
        // Nothing waits.
        tokio::time::advance(60 * SECOND).await;
        let waiting = waits.start(WaitCause::Search);
        tokio::time::advance(2 * SECOND).await;
        assert_eq!(waits.longest(), (WaitCause::Search, 4 * SECOND));
        drop(waiting);
    }

    #[tokio::test(start_paused = true)]
    async fn two_waits_at_once_take_the_time_once() {
        let waits = Waits::default();
        let (one, other) = (waits.start(WaitCause::SlowClose), waits.start(WaitCause::SlowClose));
        tokio::time::advance(SECOND).await;
        drop(one);
        tokio::time::advance(SECOND).await;
        drop(other);
        assert_eq!(waits.longest(), (WaitCause::SlowClose, 2 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_waits_for_what_shared_work_waits_for_meanwhile() {
        let (search, message) = (Waits::default(), Waits::default());
        let limited = search.start(WaitCause::RateLimited);
        tokio::time::advance(60 * SECOND).await;
        let sharing = message.share(&search);
        tokio::time::advance(2 * SECOND).await;
        drop(limited);
        search.during(WaitCause::SlowClose, tokio::time::sleep(SECOND)).await;
        drop(sharing);
        tokio::time::advance(60 * SECOND).await;
        assert_eq!(message.longest(), (WaitCause::RateLimited, 2 * SECOND));
    }
}
