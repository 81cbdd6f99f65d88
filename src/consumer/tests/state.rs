//! The pure state of a session: how many tasks may run, and when the circuit breaker closes.

use std::time::Duration;

use tokio::time::Instant;

use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::scheduler::{Completion, Next, Scheduler};
use crate::consumer::state::{Processed, Resume, SessionState, Settlement};
use crate::consumer::{End, SessionStats};
use crate::outcome::PauseCause;
use crate::sync::circuit_breaker::HALF_OPEN_PROBES;

type TestState<'a> = SessionState<'a, usize, u8, usize>;

const SECOND: Duration = Duration::from_secs(1);

/// A state with 20 messages about different people.
fn state(delayed: &mut DelayedMessages<usize>, resume: Resume, now: Instant) -> TestState<'_> {
    let mut state = TestState::new(Scheduler::new(delayed), 10, resume, now);
    for n in 0..20 {
        state.received(now);
        state.schedule(vec![n], 0, None, n);
    }
    state
}

/// Starts all that may run.
fn start(state: &mut TestState<'_>, now: Instant) -> Vec<JobId> {
    let next = || state.next(now, || 0, |_, _| false);
    let job = |next| match next {
        Next::Run(run) => run[0].0,
        Next::Defer(job, ..) => job,
    };
    std::iter::from_fn(next).map(job).collect()
}

fn finish(state: &mut TestState<'_>, job: JobId, by_close: bool) {
    let settlement = Settlement::Settled { by_close, completion: Completion::Done, dead_letter: None };
    assert!(state.processed(Processed::Settled(vec![(job, settlement)])).is_none());
}

#[test]
fn without_a_pause_all_tasks_start_at_once() {
    let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
    let mut state = state(&mut delayed, Resume::Normal, now);
    assert_eq!(start(&mut state, now).len(), 10);
    assert!(state.is_consuming() && state.load().saturated && !state.close_breaker(now));
}

#[test]
fn after_a_pause_each_success_adds_a_task() {
    for resume in [Resume::Slowly, Resume::HalfOpen] {
        let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
        let mut state = state(&mut delayed, resume, began);
        let now = began + SECOND;
        let mut running = start(&mut state, now);
        assert_eq!(running.len(), HALF_OPEN_PROBES);
        // Settled without Close: that proves nothing.
        finish(&mut state, running.remove(0), false);
        running.extend(start(&mut state, now));
        assert_eq!(running.len(), HALF_OPEN_PROBES);
        for more in 1..=7 {
            finish(&mut state, running.remove(0), true);
            running.extend(start(&mut state, now));
            assert_eq!(running.len(), HALF_OPEN_PROBES + more);
        }
    }
}

#[test]
fn a_half_open_session_waits_for_more_messages_before_it_draws() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let mut state = state(&mut delayed, Resume::HalfOpen, began);
    assert!(start(&mut state, began).is_empty());
    let draws_at = state.wake_at().unwrap();
    assert!(draws_at > began && draws_at < began + SECOND);
    assert!(start(&mut state, draws_at - Duration::from_nanos(1)).is_empty());
    assert_eq!(start(&mut state, draws_at).len(), HALF_OPEN_PROBES);
}

#[test]
fn one_success_closes_a_half_open_breaker() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let mut state = state(&mut delayed, Resume::HalfOpen, began);
    let now = began + SECOND;
    let running = start(&mut state, now);
    finish(&mut state, running[0], false);
    assert!(!state.close_breaker(now) && !state.is_consuming());
    finish(&mut state, running[1], true);
    assert!(state.close_breaker(now) && state.is_consuming());
    assert!(!state.close_breaker(now), "once");
}

#[test]
fn a_half_open_breaker_closes_when_no_message_comes_to_try() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let mut state = TestState::new(Scheduler::new(&mut delayed), 10, Resume::HalfOpen, began);
    let closes_at = state.wake_at().unwrap();
    assert!(!state.close_breaker(closes_at - Duration::from_nanos(1)));
    assert!(state.close_breaker(closes_at));
    assert_eq!(state.wake_at(), None);
}

#[test]
fn a_half_open_breaker_stays_open_while_a_probe_runs() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let mut state = state(&mut delayed, Resume::HalfOpen, began);
    start(&mut state, began + SECOND);
    assert!(!state.close_breaker(began + SECOND * 1000));
}

#[test]
fn nothing_starts_while_the_journal_is_read() {
    let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
    let mut state = TestState::new(Scheduler::new(&mut delayed), 10, Resume::Normal, now);
    assert!(state.received(now));
    assert!(!state.received(now + SECOND * 5), "not the first");
    state.set_taking_over(true);
    state.schedule(vec![1], 1, None, 1);
    assert!(state.next(now, || 0, |_, _| false).is_none());
    state.set_taking_over(false);
    assert!(state.next(now, || 0, |_, _| false).is_some());
}

#[test]
fn a_pause_ends_the_session_and_the_rest_is_handed_back() {
    let (mut delayed, now) = (DelayedMessages::default(), Instant::now());
    let mut state = state(&mut delayed, Resume::Normal, now);
    let running = start(&mut state, now);
    finish(&mut state, running[0], true);
    let paused = Settlement::Paused(PauseCause::Failing);
    let end = state.processed(Processed::Settled(vec![(running[1], paused)]));
    assert!(matches!(end, Some(End::Paused(PauseCause::Failing))));
    let SessionStats { settled, handed_back, .. } = state.stats();
    assert_eq!((settled, handed_back), (1, 19));
}
