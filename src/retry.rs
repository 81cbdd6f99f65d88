//! What follows a failure (a pure function), and the exponential backoff between retries.
//!
//! There are two layers of retries, and no others.
//!
//! - **In place.** The delivery stays unacked, and after a pause the whole sync runs again, including the look-ups. This
//!   makes a retry safe: it finds what the failed attempt has written and does not write it again.
//! - **Through a delay queue.** When the time for retries in place is used up, the message goes to a delay queue. This
//!   counts as an attempt. After the last attempt the message is dead-lettered. Later messages that share a key with a
//!   delayed message are delayed too ([`crate::consumer::scheduler::delayed`]).
//!
//! **A record that is gone.** Close answers 404 for a record that a look-up has found: search lags, or a person deleted or
//! merged the record between our look-up and our write. The first time in a delivery the message is looked up again at
//! once, which nearly always finds another record or none. A person who merges one Lead after another can do the same
//! again, and the message is not at fault then either. So each later 404 is retried like a timeout: with pauses, then
//! through the delay queues. Only when all attempts ended so is the message dead-lettered as `not_found`.
//!
//! **Failures that are not the message's.** The HTML of a proxy, a redirect or a broken connection says nothing about the
//! message, so it uses no attempt, however long it lasts: the message goes through the delay queues again, each time
//! after about as long as it is old. The circuit breaker alone does not keep this promise. It needs several messages a
//! minute to know an outage from a single bad message. If it also opened after several failures in a row, with few
//! messages, one whose text a firewall blocks would pause all others. The price is that such a message, and those that
//! follow it, wait until it is [`Policy::max_age`] old. Then it uses its attempts, and ends.
//!
//! **Waits.** A message that was held for the longest time that a delivery may be held has not failed. It uses no attempt
//! either, and goes through the delay queues in the same way. When it is older than [`Policy::max_age`], it is
//! dead-lettered with what it waited for.
//!
//! Only this module uses the `backoff` crate (see `.deny.toml`), and only to compute intervals.

use std::time::Duration;

use backoff::Clock;
use backoff::backoff::Backoff as _;
use backoff::exponential::{ExponentialBackoff, ExponentialBackoffBuilder};
use tokio::time::Instant;

use crate::close::{CloseError, Fault, FieldError, Rejection};
use crate::outcome::{DeadLetter, DelayCause, Failure, Held, Outcome, PauseCause, Reason, Stage};

/// The retry policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// How long a delivery is held for retries in place, in total.
    pub in_place: Duration,
    /// The jitter of the pauses in place, as a fraction of their length. It spreads the retries of messages that failed
    /// at the same time.
    pub jitter: f64,
    /// The delays of the delay queues, shortest first. Their number is the number of further attempts.
    pub delays: Vec<Duration>,
    /// The age up to which a failure that cannot be the message's, and a long wait, use no attempt.
    pub max_age: Duration,
}

/// The default jitter, as a fraction of the pause.
pub const JITTER: f64 = 0.5;

/// Exponential backoff with jitter.
#[derive(Debug)]
pub struct Backoff(ExponentialBackoff<TokioClock>);

/// Tokio's clock, so that tests with paused time also control the backoff.
#[derive(Debug, Default)]
struct TokioClock;

impl Clock for TokioClock {
    fn now(&self) -> std::time::Instant {
        Instant::now().into_std()
    }
}

impl Backoff {
    /// Pauses from `first` to `longest`, each ± `jitter` of its length. Without `total` they never end.
    fn new(first: Duration, longest: Duration, jitter: f64, total: Option<Duration>) -> Self {
        let mut backoff = ExponentialBackoffBuilder::new()
            .with_initial_interval(first)
            .with_max_interval(longest)
            .with_multiplier(2.0)
            .with_randomization_factor(jitter)
            .with_max_elapsed_time(total)
            .build();
        // The builder takes the start time from the system clock; `reset` takes it from Tokio's.
        backoff.reset();
        Self(backoff)
    }

    /// The pauses between retries in place.
    pub fn in_place(policy: &Policy) -> Self {
        Self::new(Duration::from_millis(250), Duration::from_secs(8), policy.jitter, Some(policy.in_place))
    }

    /// The pauses between attempts to connect to RabbitMQ. They never end (rabbitmq.md §5.2).
    pub fn reconnect() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(30), JITTER, None)
    }

    /// The pauses between probes of Close while consumption is paused. They never end.
    pub fn probe() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_mins(1), JITTER, None)
    }

    /// The next pause. `None` when the total time is used up.
    pub fn next_delay(&mut self) -> Option<Duration> {
        self.0.next_backoff()
    }

    /// Starts over with the first pause.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

impl Policy {
    /// The delay queue for a message that has to wait for others: the longest delay within `wait`, else the shortest.
    /// The message can be delayed again.
    pub fn level_for(&self, wait: Duration) -> usize {
        self.delays.iter().rposition(|delay| *delay <= wait).unwrap_or(0)
    }
}

/// What has already been tried for a delivery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Attempts before this one, from the header of the message.
    pub attempts: u32,
    /// The time since the message was first received.
    pub age: Duration,
    /// Whether this delivery was already retried after a 404.
    pub retried_after_404: bool,
}

/// What follows a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterFailure {
    /// Run the sync again after this pause.
    Retry(Duration),
    /// Settle the delivery.
    Settle(Outcome),
}

/// Whether a fault may be the message's: Close has received the call, and may fail because of what it says.
fn may_be_the_messages(fault: &Fault) -> bool {
    match fault {
        Fault::Status(_)
        | Fault::Timeout
        | Fault::InvalidResponse
        | Fault::TooLarge
        | Fault::NotYet
        | Fault::ListsUnknown => true,
        Fault::Unexpected(_)
        | Fault::ConnectionLost
        | Fault::Vanished
        | Fault::Foreign { .. }
        | Fault::UnknownUrl
        | Fault::Redirected { .. } => false,
    }
}

/// Decides what follows a failure. `pause` is the next pause in place; `None` when the time for them is used up.
pub fn after_failure(
    failure: &Failure,
    history: History,
    pause: Option<Duration>,
    policy: &Policy,
) -> AfterFailure {
    let dead = |reason, field: Option<String>| {
        let error = failure.error.to_string();
        let response = if let CloseError::Rejected(Rejection { response, .. }) = &failure.error {
            response.clone()
        } else {
            None
        };
        let stage = failure.stage;
        AfterFailure::Settle(Outcome::Dead(DeadLetter {
            reason,
            stage,
            error,
            field,
            decision: None,
            response,
        }))
    };
    let after_attempt = |reason| match usize::try_from(history.attempts) {
        Ok(level) if level < policy.delays.len() => AfterFailure::Settle(Outcome::Delayed {
            level,
            cause: DelayCause::Failed(failure.error.to_string()),
        }),
        Ok(_) | Err(_) => dead(reason, None),
    };
    match &failure.error {
        CloseError::Unauthorized => AfterFailure::Settle(Outcome::Paused(PauseCause::Unauthorized)),
        CloseError::PlanLimit => AfterFailure::Settle(Outcome::Paused(PauseCause::PlanLimit)),
        // Permission to look up records does not depend on the message, so every message would fail.
        CloseError::Forbidden if failure.stage == Stage::LookUp => {
            AfterFailure::Settle(Outcome::Paused(PauseCause::Forbidden))
        }
        CloseError::Forbidden => dead(Reason::Forbidden, None),
        CloseError::Rejected(rejection) => {
            dead(Reason::Rejected, rejection.fields.first().map(FieldError::path))
        }
        // The record was deleted or merged (close-api.md §9), and a look-up shows what there is now.
        CloseError::NotFound if !history.retried_after_404 => AfterFailure::Retry(Duration::ZERO),
        CloseError::NotFound => pause.map_or_else(|| after_attempt(Reason::NotFound), AfterFailure::Retry),
        // Nothing was sent, and the next message would fail too.
        CloseError::Unreachable(_) => {
            pause.map_or(AfterFailure::Settle(Outcome::Paused(PauseCause::Unreachable)), AfterFailure::Retry)
        }
        // A record does not shrink within seconds.
        CloseError::Transient(fault) => match pause.filter(|_| *fault != Fault::TooLarge) {
            Some(pause) => AfterFailure::Retry(pause),
            None if !may_be_the_messages(fault) && history.age < policy.max_age => {
                AfterFailure::Settle(Outcome::Delayed {
                    level: policy.level_for(history.age),
                    cause: DelayCause::NotClose(fault.to_string()),
                })
            }
            None => after_attempt(Reason::Exhausted),
        },
    }
}

/// Decides what follows when a message of this age was held for as long as a delivery may be held.
pub fn after_hold(held: Held, stage: Stage, age: Duration, policy: &Policy) -> Outcome {
    if age < policy.max_age {
        return Outcome::Delayed { level: policy.level_for(age), cause: DelayCause::Held(held) };
    }
    Outcome::Dead(DeadLetter {
        reason: Reason::Exhausted,
        stage,
        error: held.to_string(),
        field: None,
        decision: None,
        response: None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy() -> Policy {
        Policy {
            in_place: Duration::from_secs(30),
            jitter: JITTER,
            delays: [30, 120, 600, 3600].map(Duration::from_secs).into(),
            max_age: Duration::from_hours(24),
        }
    }

    fn verdict(error: CloseError, attempts: u32, retried_after_404: bool, pause: bool) -> String {
        let failure = Failure { stage: Stage::Write, error };
        let pause = pause.then_some(Duration::from_secs(1));
        let history = History { attempts, retried_after_404, ..History::default() };
        described(&after_failure(&failure, history, pause, &policy()))
    }

    fn described(after: &AfterFailure) -> String {
        match after {
            AfterFailure::Retry(pause) => format!("retry in {}s", pause.as_secs()),
            AfterFailure::Settle(Outcome::Dead(dead)) => format!("dead {}", dead.reason.label()),
            AfterFailure::Settle(Outcome::Delayed { level, cause }) if cause.uses_attempt() => {
                format!("delay {level}")
            }
            AfterFailure::Settle(Outcome::Delayed { level, cause }) => format!("{} {level}", cause.label()),
            AfterFailure::Settle(Outcome::Paused(cause)) => format!("pause {}", cause.label()),
            AfterFailure::Settle(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn each_failure_leads_to_the_right_verdict() {
        let rejected =
            CloseError::Rejected(Rejection { status: 400, fields: vec![], message: None, response: None });
        let timeout = CloseError::Transient(Fault::Timeout);
        let cases = [
            (CloseError::Unauthorized, 9, true, false, "pause unauthorized"),
            (CloseError::PlanLimit, 0, false, true, "pause plan_limit"),
            (CloseError::Forbidden, 0, false, true, "dead forbidden"),
            (rejected, 0, false, true, "dead rejected"),
            (CloseError::NotFound, 4, false, false, "retry in 0s"),
            (CloseError::NotFound, 4, true, true, "retry in 1s"),
            (CloseError::NotFound, 0, true, false, "delay 0"),
            (CloseError::NotFound, 3, true, false, "delay 3"),
            (CloseError::NotFound, 4, true, false, "dead not_found"),
            (CloseError::Transient(Fault::TooLarge), 0, false, true, "delay 0"),
            (CloseError::Transient(Fault::TooLarge), 4, false, true, "dead exhausted"),
            (CloseError::Unreachable(String::new()), 9, false, true, "retry in 1s"),
            (CloseError::Unreachable(String::new()), 9, false, false, "pause unreachable"),
            (timeout.clone(), 4, false, true, "retry in 1s"),
            (timeout.clone(), 0, false, false, "delay 0"),
            (timeout.clone(), 3, false, false, "delay 3"),
            (timeout.clone(), 4, false, false, "dead exhausted"),
            (timeout, u32::MAX, false, false, "dead exhausted"),
        ];
        for (error, attempts, retried_after_404, pause, expected) in cases {
            assert_eq!(verdict(error.clone(), attempts, retried_after_404, pause), expected, "{error:?}");
        }
    }

    #[test]
    fn a_failure_that_cannot_be_the_messages_uses_no_attempt_until_a_certain_age() {
        let foreign = Fault::Foreign { status: 403, form: crate::close::Form::Html };
        let redirected = Fault::Redirected { status: 302, host: None };
        let faults = [foreign, redirected, Fault::UnknownUrl, Fault::ConnectionLost, Fault::Unexpected(410)];
        let ages = [
            (0, 0, "not_close 0"),
            (100, 4, "not_close 0"),
            (120, 4, "not_close 1"),
            (7200, 4, "not_close 3"),
            (86_399, 4, "not_close 3"),
            (86_400, 0, "delay 0"),
            (86_400, 3, "delay 3"),
            (u64::MAX, 4, "dead exhausted"),
        ];
        for fault in faults {
            for (age, attempts, expected) in ages {
                let history = History { attempts, age: Duration::from_secs(age), retried_after_404: false };
                let failure = Failure { stage: Stage::Write, error: CloseError::Transient(fault.clone()) };
                let after = after_failure(&failure, history, None, &policy());
                assert_eq!(described(&after), expected, "{fault} {age}");
            }
        }
    }

    #[test]
    fn a_held_message_uses_no_attempt_and_ends_at_a_certain_age() {
        let held = Held {
            cause: crate::waits::WaitCause::Search,
            waited: Duration::from_secs(599),
            held: Duration::from_mins(10),
        };
        let ages = [
            (0, "search 0"),
            (120, "search 1"),
            (660, "search 2"),
            (7200, "search 3"),
            (86_399, "search 3"),
            (86_400, "dead exhausted"),
            (u64::MAX, "dead exhausted"),
        ];
        for (age, expected) in ages {
            let outcome = after_hold(held, Stage::LookUp, Duration::from_secs(age), &policy());
            assert_eq!(described(&AfterFailure::Settle(outcome)), expected, "{age}");
        }
    }

    fn any_error() -> impl Strategy<Value = CloseError> {
        let fault = prop_oneof![
            (500u16..600).prop_map(Fault::Status),
            Just(Fault::Timeout),
            Just(Fault::ConnectionLost),
            Just(Fault::InvalidResponse),
            Just(Fault::TooLarge),
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
        /// A message that keeps failing is eventually dead-lettered, after at most one attempt more than there are
        /// delays. Neither a pause nor a failure that cannot be the message's counts, the latter up to an age.
        #[test]
        fn every_sequence_of_failures_ends(errors in proptest::collection::vec(any_error(), 200), delays in 0usize..6) {
            let policy = Policy {
                in_place: Duration::ZERO,
                jitter: JITTER,
                delays: vec![Duration::from_secs(1); delays],
                max_age: if delays == 0 { Duration::ZERO } else { Duration::from_secs(20) },
            };
            let mut history = History::default();
            let mut ended = false;
            for error in errors {
                let not_found = error == CloseError::NotFound;
                match after_failure(&Failure { stage: Stage::Write, error }, history, None, &policy) {
                    AfterFailure::Retry(_) => history.retried_after_404 |= not_found,
                    AfterFailure::Settle(Outcome::Delayed { level, cause }) => {
                        prop_assert!(level < delays);
                        history = History {
                            attempts: history.attempts + u32::from(cause.uses_attempt()),
                            age: history.age + policy.delays[level],
                            retried_after_404: false,
                        };
                    }
                    AfterFailure::Settle(Outcome::Paused(_)) => history.retried_after_404 = false,
                    AfterFailure::Settle(Outcome::Dead(_)) => {
                        ended = true;
                        break;
                    }
                    AfterFailure::Settle(outcome) => prop_assert!(false, "a failure must not lead to {outcome:?}"),
                }
            }
            prop_assert!(ended);
            prop_assert!(usize::try_from(history.attempts).unwrap() <= delays);
        }

        #[test]
        fn pauses_stay_within_their_bounds(first in 1u64..1000, longest in 1000u64..60_000) {
            let (first, longest) = (Duration::from_millis(first), Duration::from_millis(longest));
            let mut pauses = Backoff::new(first, longest, JITTER, None);
            for _ in 0..40 {
                let pause = pauses.next_delay().unwrap();
                prop_assert!(pause >= first / 2 && pause <= longest * 3 / 2 + Duration::from_millis(1));
            }
        }
    }
}
