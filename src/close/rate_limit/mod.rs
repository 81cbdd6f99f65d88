//! The rate limiter: calls wait for budget instead of running into 429.
//!
//! Each endpoint group has one. Its [`Window`] decides how many calls may be sent; this module decides the order: live
//! traffic before retries, retries before replays, and first in first out within each.

pub(crate) mod headers;
pub(crate) mod window;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::close::rate_limit::headers::RateLimit;
use crate::close::rate_limit::window::{RateLimitStatus, Window};

/// The wait after a 429 that does not say how long (close-api.md §2, Close's own client).
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(2);
/// The shortest wait after a 429.
pub(crate) const SHORTEST_WAIT: Duration = Duration::from_millis(250);

/// The longest wait after a 503, whatever it says: it may come from a proxy.
pub(crate) const LONGEST_UNAVAILABLE: Duration = Duration::from_mins(1);

/// The order of calls when budget is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// A message delivered for the first time.
    #[default]
    Live,
    /// A message that was in a delay queue.
    Retry,
    /// A message that an operator replays.
    Replay,
}

/// Limits the calls of one endpoint group. Clones share its state.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Notified when the budget or the queue changed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    window: Window,
    waiting: BTreeSet<(Priority, u64)>,
    next: u64,
}

impl RateLimiter {
    /// A limiter that uses `share` of Close's budget.
    pub(crate) fn new(share: f64) -> Self {
        let state = State { window: Window::new(share), waiting: BTreeSet::new(), next: 0 };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new() }))
    }

    /// Waits until the budget allows one more call. Also returns how long that took.
    pub(crate) async fn acquire(&self, priority: Priority) -> (Permit, Duration) {
        let start = Instant::now();
        let ticket = self.queue(priority);
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            // Enabled before the check, so that no change is missed.
            changed.as_mut().enable();
            match self.with(|state| state.admit(&ticket.position, Instant::now())) {
                Admission::Granted => {
                    let permit = Permit {
                        limiter: self.clone(),
                        sent: Instant::now(),
                        limit: None,
                        answered: false,
                        used: true,
                    };
                    return (permit, start.elapsed());
                }
                Admission::NotYet(at) => {
                    tokio::select! {
                        biased;
                        () = tokio::time::sleep_until(at) => {}
                        () = changed => {}
                    }
                }
                Admission::NotFirst => changed.await,
            }
        }
    }

    /// What Close last reported about the budget.
    pub(crate) fn status(&self) -> Option<RateLimitStatus> {
        self.with(|state| state.window.status(Instant::now()))
    }

    fn queue(&self, priority: Priority) -> Ticket {
        let position = self.with(|state| {
            state.next += 1;
            let position = (priority, state.next);
            state.waiting.insert(position);
            position
        });
        Ticket { limiter: self.clone(), position }
    }

    fn with<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        // A panic while the lock is held leaves numbers, not half-written structures.
        with(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, with: impl FnOnce(&mut State)) {
        self.with(with);
        self.0.changed.notify_waiters();
    }
}

enum Admission {
    Granted,
    NotYet(Instant),
    NotFirst,
}

impl State {
    fn admit(&mut self, position: &(Priority, u64), now: Instant) -> Admission {
        if self.waiting.first() != Some(position) {
            return Admission::NotFirst;
        }
        match self.window.admit(now) {
            Ok(()) => Admission::Granted,
            Err(at) => Admission::NotYet(at),
        }
    }
}

/// A position in the queue. Dropping it, with a permit or not, lets the next call proceed.
struct Ticket {
    limiter: RateLimiter,
    position: (Priority, u64),
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.limiter.change(|state| {
            state.waiting.remove(&self.position);
        });
    }
}

/// One call taken out of the budget. Dropping it ends the call.
#[derive(Debug)]
pub(crate) struct Permit {
    limiter: RateLimiter,
    sent: Instant,
    limit: Option<RateLimit>,
    answered: bool,
    used: bool,
}

impl Permit {
    /// Returns the permit: no call is made.
    pub(crate) fn give_back(mut self) {
        self.used = false;
    }

    /// The call is sent now.
    pub(crate) fn send(&mut self) {
        self.sent = Instant::now();
    }

    /// Records that Close answered, and what it reported about the budget.
    pub(crate) fn answered(&mut self, limit: Option<RateLimit>) {
        self.answered = true;
        self.limit = limit;
    }

    /// Records a 429, or a 503 that says how long to wait. `explained`: a used-up window or an outage explains it.
    pub(crate) fn refused(&self, wait: Duration, explained: bool) {
        self.limiter.change(|state| state.window.refused(self.sent, Instant::now(), wait, explained));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limiter.change(|state| {
            if self.used {
                state.window.done(self.sent, Instant::now(), self.answered, self.limit);
            } else {
                state.window.give_back();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn live_traffic_goes_first_and_cancelled_calls_leave_the_queue() {
        let limiter = RateLimiter::new(1.0);
        let (mut first, _) = limiter.acquire(Priority::Live).await;
        first.answered(Some(RateLimit { limit: 8, remaining: 0, reset: Duration::from_millis(200) }));
        drop(first);

        let order = Arc::new(Mutex::new(Vec::new()));
        let acquire = |priority, name: &'static str| {
            let (limiter, order) = (limiter.clone(), Arc::clone(&order));
            tokio::spawn(async move {
                let _permit = limiter.acquire(priority).await;
                order.lock().unwrap().push(name);
            })
        };
        let replay = acquire(Priority::Replay, "replay");
        let given_up = acquire(Priority::Live, "given up");
        let retry = acquire(Priority::Retry, "retry");
        let live = acquire(Priority::Live, "live");
        let second = acquire(Priority::Live, "second live");
        // All are in the queue now.
        tokio::task::yield_now().await;
        given_up.abort();
        for task in [replay, retry, live, second] {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["live", "second live", "retry", "replay"]);
    }
}
