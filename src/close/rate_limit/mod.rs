//! The rate gate: calls wait for budget instead of running into 429.
//!
//! One gate stands in front of each endpoint group. How many calls may go is decided by its [`Window`];
//! who goes first is decided here: live traffic before retries, retries before replays, and each in the
//! order they came.

pub(crate) mod headers;
pub(crate) mod window;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::close::rate_limit::headers::RateLimit;
use crate::close::rate_limit::window::{RateLimitStatus, Window};

/// Wait this long after a 429 that does not say how long (close-api.md §2, Close's own client).
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(2);
/// Wait at least this long after a 429.
pub(crate) const SHORTEST_WAIT: Duration = Duration::from_millis(250);

/// Who goes first when budget is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// A message that came for the first time.
    #[default]
    Live,
    /// One that was in a delay queue.
    Retry,
    /// One that an operator replays.
    Replay,
}

/// The wait in front of the calls of one endpoint group. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Budget, or the order of those who wait, has changed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    window: Window,
    waiting: BTreeSet<(Priority, u64)>,
    next: u64,
}

impl RateLimiter {
    /// A gate that lets `share` of Close's budget through.
    pub(crate) fn new(share: f64) -> Self {
        let state = State { window: Window::new(share), waiting: BTreeSet::new(), next: 0 };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new() }))
    }

    /// Waits until the budget allows one more call. Tells how long it took, for the metrics.
    pub(crate) async fn enter(&self, priority: Priority) -> (Permit, Duration) {
        let start = Instant::now();
        let place = self.queue(priority);
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            match self.with(|state| state.ask(&place.at, Instant::now())) {
                Answer::Go => {
                    let permit = Permit {
                        gate: self.clone(),
                        sent: Instant::now(),
                        told: None,
                        answered: false,
                        used: true,
                    };
                    return (permit, start.elapsed());
                }
                Answer::NotYet(at) => {
                    tokio::select! {
                        biased;
                        () = tokio::time::sleep_until(at) => {}
                        () = changed => {}
                    }
                }
                Answer::NotFirst => changed.await,
            }
        }
    }

    /// What is left of the budget, if Close told.
    pub(crate) fn standing(&self) -> Option<RateLimitStatus> {
        self.with(|state| state.window.standing(Instant::now()))
    }

    fn queue(&self, priority: Priority) -> Place {
        let at = self.with(|state| {
            state.next += 1;
            let at = (priority, state.next);
            state.waiting.insert(at);
            at
        });
        Place { gate: self.clone(), at }
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

enum Answer {
    Go,
    NotYet(Instant),
    NotFirst,
}

impl State {
    fn ask(&mut self, place: &(Priority, u64), now: Instant) -> Answer {
        if self.waiting.first() != Some(place) {
            return Answer::NotFirst;
        }
        match self.window.admit(now) {
            Ok(()) => Answer::Go,
            Err(at) => Answer::NotYet(at),
        }
    }
}

/// A place among those who wait. Whoever leaves it, admitted or not, makes room for the next.
struct Place {
    gate: RateLimiter,
    at: (Priority, u64),
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.change(|state| {
            state.waiting.remove(&self.at);
        });
    }
}

/// One call taken out of the budget. Dropping it ends the call.
#[derive(Debug)]
pub(crate) struct Permit {
    gate: RateLimiter,
    sent: Instant,
    told: Option<RateLimit>,
    answered: bool,
    used: bool,
}

impl Permit {
    /// No call is made after all.
    pub(crate) fn give_back(mut self) {
        self.used = false;
    }

    /// Notes that Close answered, and what the answer said about the budget.
    pub(crate) fn answered(&mut self, limit: Option<RateLimit>) {
        self.answered = true;
        self.told = limit;
    }

    /// Closes the gate: Close answered 429. `explained`: the window was used up.
    pub(crate) fn refused(&self, wait: Duration, explained: bool) {
        self.gate.change(|state| state.window.refused(self.sent, Instant::now(), wait, explained));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.change(|state| {
            if self.used {
                state.window.done(self.sent, Instant::now(), self.answered, self.told);
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
    async fn live_traffic_goes_first_and_who_gives_up_makes_room() {
        let gate = RateLimiter::new(1.0);
        let (mut first, _) = gate.enter(Priority::Live).await;
        first.answered(Some(RateLimit { limit: 8, remaining: 0, reset: Duration::from_millis(200) }));
        drop(first);

        let order = Arc::new(Mutex::new(Vec::new()));
        let enter = |priority, name: &'static str| {
            let (gate, order) = (gate.clone(), Arc::clone(&order));
            tokio::spawn(async move {
                let _permit = gate.enter(priority).await;
                order.lock().unwrap().push(name);
            })
        };
        let replay = enter(Priority::Replay, "replay");
        let given_up = enter(Priority::Live, "given up");
        let retry = enter(Priority::Retry, "retry");
        let live = enter(Priority::Live, "live");
        let second = enter(Priority::Live, "second live");
        // All of them wait in their places now.
        tokio::task::yield_now().await;
        given_up.abort();
        for task in [replay, retry, live, second] {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["live", "second live", "retry", "replay"]);
    }
}
