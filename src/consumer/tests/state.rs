//! The pure state of a session: how many tasks may run, and when the circuit breaker closes.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

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

fn finish(state: &mut TestState<'_>, job: JobId, by_close: bool, now: Instant) {
    let settlement = Settlement::Settled { by_close, completion: Completion::Done, dead_letter: None };
    assert!(state.processed(Processed::Settled(vec![(job, settlement)]), now).is_none());
}

/// Ends a message that goes to a delay queue.
fn delay(state: &mut TestState<'_>, job: JobId, now: Instant, due: Instant) {
    let completion = Completion::Delayed { id: Uuid::nil(), due };
    let settlement = Settlement::Settled { by_close: false, completion, dead_letter: None };
    assert!(state.processed(Processed::Settled(vec![(job, settlement)]), now).is_none());
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
        finish(&mut state, running.remove(0), false, now);
        running.extend(start(&mut state, now));
        assert_eq!(running.len(), HALF_OPEN_PROBES);
        for more in 1..=7 {
            finish(&mut state, running.remove(0), true, now);
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
    finish(&mut state, running[0], false, now);
    assert!(!state.close_breaker(now) && !state.is_consuming());
    finish(&mut state, running[1], true, now);
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

/// A state with one message, which is being tried.
fn one_probe(delayed: &mut DelayedMessages<usize>, began: Instant) -> (TestState<'_>, JobId) {
    let mut state = TestState::new(Scheduler::new(delayed), 10, Resume::HalfOpen, began);
    state.received(began);
    state.schedule(vec![1], 0, None, 1);
    let probe = start(&mut state, began + SECOND)[0];
    (state, probe)
}

#[test]
fn a_half_open_breaker_counts_its_idle_time_from_the_end_of_the_last_probe() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let (mut state, probe) = one_probe(&mut delayed, began);
    let ended = began + SECOND * 1000;
    finish(&mut state, probe, false, ended);
    assert!(!state.close_breaker(ended), "it took longer than the idle time");
    let closes_at = state.wake_at().unwrap();
    assert!(closes_at > ended && !state.close_breaker(closes_at - Duration::from_nanos(1)));
    assert!(state.close_breaker(closes_at));
}

#[test]
fn a_failed_probe_keeps_a_half_open_breaker_open_until_it_is_tried_again() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let (mut state, probe) = one_probe(&mut delayed, began);
    let (ended, due) = (began + SECOND * 2, began + SECOND * 1000);
    delay(&mut state, probe, ended, due);
    assert!(!state.close_breaker(due) && state.wake_at().unwrap() > due);
    // Another message says nothing about Close.
    state.schedule(vec![2], 0, None, 2);
    let other = start(&mut state, ended + SECOND)[0];
    finish(&mut state, other, false, ended + SECOND);
    assert!(!state.close_breaker(due));
    state.schedule(vec![1], 0, Some(Uuid::nil()), 1);
    let again = start(&mut state, due + SECOND)[0];
    finish(&mut state, again, true, due + SECOND);
    assert!(state.close_breaker(due + SECOND));
}

#[test]
fn a_half_open_breaker_closes_when_a_failed_probe_does_not_come_back() {
    let (mut delayed, began) = (DelayedMessages::default(), Instant::now());
    let (mut state, probe) = one_probe(&mut delayed, began);
    delay(&mut state, probe, began + SECOND, began + SECOND * 1000);
    let closes_at = state.wake_at().unwrap();
    assert!(state.close_breaker(closes_at));
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
    finish(&mut state, running[0], true, now);
    let paused = Settlement::Paused(PauseCause::Failing);
    let end = state.processed(Processed::Settled(vec![(running[1], paused)]), now);
    assert!(matches!(end, Some(End::Paused(PauseCause::Failing))));
    let SessionStats { settled, handed_back, .. } = state.stats();
    assert_eq!((settled, handed_back), (1, 19));
}
