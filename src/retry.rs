//! What to do after a failure: a pure decision, and the arithmetic of waiting.
//!
//! Two layers retry, and nothing else does. *In place*: the delivery is held unacked and the whole
//! sync runs again, from the look-up on, after a jittered pause. Starting over is what makes it safe
//! to repeat: what the failed try already did is found, and not done twice. *Through a delay queue*:
//! when the pauses in place are used up, the message waits in the broker, which costs an attempt.
//! When the attempts are used up too, it is dead-lettered. Later messages that share a key follow it there
//! ([`crate::consumer::scheduler::delayed`]).
//!
//! This is the only module that uses the `backoff` crate (see `.deny.toml`), and it uses only its
//! arithmetic.

use std::time::Duration;

use backoff::Clock;
use backoff::backoff::Backoff as _;
use backoff::exponential::{ExponentialBackoff, ExponentialBackoffBuilder};
use tokio::time::Instant;

use crate::close::{CloseError, Rejection};
use crate::outcome::{DeadLetter, DelayCause, Failure, Outcome, PauseCause, Reason, Stage};

/// How patient we are.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Total time a delivery is held for retries in place.
    pub in_place: Duration,
    /// How far the pauses in place stray from their length, as a part of it: messages that failed together
    /// do not try again together.
    pub jitter: f64,
    /// The delay queues, shortest first: their number is the number of further attempts.
    pub delays: Vec<Duration>,
}

/// How far pauses stray from their length, as a part of it.
pub const JITTER: f64 = 0.5;

/// Jittered pauses that grow.
#[derive(Debug)]
pub struct Backoff(ExponentialBackoff<TokioClock>);

/// The same clock as that of the pauses themselves: tests stop both.
#[derive(Debug, Default)]
struct TokioClock;

impl Clock for TokioClock {
    fn now(&self) -> std::time::Instant {
        Instant::now().into_std()
    }
}

impl Backoff {
    /// Backoff from `first` to `longest`, each ± `jitter` of it, ending after `total` when given.
    fn new(first: Duration, longest: Duration, jitter: f64, total: Option<Duration>) -> Self {
        let mut arithmetic = ExponentialBackoffBuilder::new()
            .with_initial_interval(first)
            .with_max_interval(longest)
            .with_multiplier(2.0)
            .with_randomization_factor(jitter)
            .with_max_elapsed_time(total)
            .build();
        // It begins by the system's clock.
        arithmetic.reset();
        Self(arithmetic)
    }

    /// The pauses between tries in place.
    pub fn in_place(policy: &Policy) -> Self {
        Self::new(Duration::from_millis(250), Duration::from_secs(8), policy.jitter, Some(policy.in_place))
    }

    /// The pauses between connections to the broker: without end (rabbitmq.md §5.2).
    pub fn reconnect() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(30), JITTER, None)
    }

    /// The pauses between probes while consumption is paused: without end.
    pub fn probe() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_mins(1), JITTER, None)
    }

    /// The next pause; `None` when the total is used up.
    pub fn next_delay(&mut self) -> Option<Duration> {
        self.0.next_backoff()
    }

    /// Starts over with the first pause.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

impl Policy {
    /// The delay for a message that has to wait for others until then: the longest that is not too long, as it
    /// can wait again.
    pub fn level_for(&self, wait: Duration) -> usize {
        self.delays.iter().rposition(|delay| *delay <= wait).unwrap_or(0)
    }
}

/// What a delivery has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Attempts before this one, as the header of the message tells.
    pub attempts: u32,
    /// Whether this delivery has already been looked up again after a 404.
    pub looked_again: bool,
}

/// The answer to a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start over, after a pause.
    Retry(Duration),
    /// That's it for this delivery.
    Settle(Outcome),
}

/// Decides what follows a failure. `pause` is the next pause in place, if there is one left.
pub fn settle(failure: &Failure, history: History, pause: Option<Duration>, policy: &Policy) -> Verdict {
    let dead = |reason, field: Option<String>| {
        let error = failure.error.to_string();
        let response = if let CloseError::Rejected(Rejection { response, .. }) = &failure.error {
            response.clone()
        } else {
            None
        };
        let stage = failure.stage;
        Verdict::Settle(Outcome::Dead(DeadLetter {
            reason,
            stage,
            error,
            field,
            decision: None,
            said: response,
        }))
    };
    match &failure.error {
        CloseError::Unauthorized => Verdict::Settle(Outcome::Paused(PauseCause::Unauthorized)),
        CloseError::PlanLimit => Verdict::Settle(Outcome::Paused(PauseCause::PlanLimit)),
        // Nothing a message says decides whether its records may be looked up.
        CloseError::Forbidden if failure.stage == Stage::LookUp => {
            Verdict::Settle(Outcome::Paused(PauseCause::Forbidden))
        }
        CloseError::Forbidden => dead(Reason::Forbidden, None),
        CloseError::Rejected(rejection) => {
            dead(Reason::Rejected, rejection.fields.first().map(|field| field.path.join(".")))
        }
        // Search may still list what was deleted or merged away (close-api.md §9): look once more.
        CloseError::NotFound if history.looked_again => dead(Reason::NotFound, None),
        CloseError::NotFound => Verdict::Retry(Duration::ZERO),
        // Nothing was sent, and the next message would fare no better.
        CloseError::Unreachable(_) => {
            pause.map_or(Verdict::Settle(Outcome::Paused(PauseCause::Unreachable)), Verdict::Retry)
        }
        CloseError::Transient(fault) => match pause {
            Some(pause) => Verdict::Retry(pause),
            None => match usize::try_from(history.attempts) {
                Ok(level) if level < policy.delays.len() => {
                    Verdict::Settle(Outcome::Delayed { level, cause: DelayCause::Failed(fault.to_string()) })
                }
                Ok(_) | Err(_) => dead(Reason::Exhausted, None),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::close::{Fault, Rejection};

    fn policy() -> Policy {
        Policy { in_place: Duration::from_secs(30), jitter: JITTER, delays: vec![Duration::from_secs(30); 4] }
    }

    fn verdict(error: CloseError, attempts: u32, looked_again: bool, pause: bool) -> String {
        let failure = Failure { stage: Stage::Write, error };
        let pause = pause.then_some(Duration::from_secs(1));
        match settle(&failure, History { attempts, looked_again }, pause, &policy()) {
            Verdict::Retry(pause) => format!("again in {}s", pause.as_secs()),
            Verdict::Settle(Outcome::Dead(dead)) => format!("dead {}", dead.reason.label()),
            Verdict::Settle(Outcome::Delayed { level, .. }) => format!("delay {level}"),
            Verdict::Settle(Outcome::Paused(cause)) => format!("pause {}", cause.label()),
            Verdict::Settle(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn each_failure_gets_what_may_help() {
        let rejected =
            CloseError::Rejected(Rejection { status: 400, fields: vec![], message: None, response: None });
        let timeout = CloseError::Transient(Fault::Timeout);
        let cases = [
            (CloseError::Unauthorized, 9, true, false, "pause unauthorized"),
            (CloseError::PlanLimit, 0, false, true, "pause plan_limit"),
            (CloseError::Forbidden, 0, false, true, "dead forbidden"),
            (rejected, 0, false, true, "dead rejected"),
            (CloseError::NotFound, 0, false, false, "again in 0s"),
            (CloseError::NotFound, 0, true, true, "dead not_found"),
            (CloseError::Unreachable(String::new()), 9, false, true, "again in 1s"),
            (CloseError::Unreachable(String::new()), 9, false, false, "pause unreachable"),
            (timeout.clone(), 4, false, true, "again in 1s"),
            (timeout.clone(), 0, false, false, "delay 0"),
            (timeout.clone(), 3, false, false, "delay 3"),
            (timeout.clone(), 4, false, false, "dead exhausted"),
            (timeout, u32::MAX, false, false, "dead exhausted"),
        ];
        for (error, attempts, looked_again, pause, expected) in cases {
            assert_eq!(verdict(error.clone(), attempts, looked_again, pause), expected, "{error:?}");
        }
    }

    /// Every failure there is.
    fn some_error() -> impl Strategy<Value = CloseError> {
        let fault = prop_oneof![
            (500u16..600).prop_map(Fault::Status),
            Just(Fault::Timeout),
            Just(Fault::ConnectionLost),
            Just(Fault::Garbled),
        ];
        prop_oneof![
            Just(CloseError::Unauthorized),
            Just(CloseError::PlanLimit),
            Just(CloseError::Forbidden),
            Just(CloseError::NotFound),
            Just(CloseError::Unreachable(String::new())),
            (400u16..430).prop_map(|status| CloseError::Rejected(Rejection {
                status,
                fields: vec![],
                message: None,
                response: None,
            })),
            fault.prop_map(CloseError::Transient),
        ]
    }

    proptest! {
        /// However a message fails, and keeps failing, it comes to an end: a dead letter after at most
        /// one attempt more than there are delays, or a pause, which charges nothing.
        #[test]
        fn every_sequence_of_failures_ends(errors in proptest::collection::vec(some_error(), 200), delays in 0usize..6) {
            let policy = Policy { in_place: Duration::ZERO, jitter: JITTER, delays: vec![Duration::from_secs(1); delays] };
            let mut history = History::default();
            let mut ended = false;
            for error in errors {
                let looked_again = error == CloseError::NotFound;
                match settle(&Failure { stage: Stage::Write, error }, history, None, &policy) {
                    Verdict::Retry(_) => history.looked_again |= looked_again,
                    Verdict::Settle(Outcome::Delayed { level, cause }) => {
                        prop_assert!(cause.uses_attempt() && level < delays);
                        history = History { attempts: history.attempts + 1, looked_again: false };
                    }
                    Verdict::Settle(Outcome::Paused(_)) => history.looked_again = false,
                    Verdict::Settle(Outcome::Dead(_)) => {
                        ended = true;
                        break;
                    }
                    Verdict::Settle(outcome) => prop_assert!(false, "a failure is no {outcome:?}"),
                }
            }
            prop_assert!(ended);
            prop_assert!(usize::try_from(history.attempts).unwrap() <= delays);
        }

        #[test]
        fn pauses_grow_within_their_window(first in 1u64..1000, longest in 1000u64..60_000) {
            let (first, longest) = (Duration::from_millis(first), Duration::from_millis(longest));
            let mut pauses = Backoff::new(first, longest, JITTER, None);
            for _ in 0..40 {
                let pause = pauses.next_delay().unwrap();
                prop_assert!(pause >= first / 2 && pause <= longest * 3 / 2 + Duration::from_millis(1));
            }
        }
    }
}
