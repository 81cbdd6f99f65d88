//! Canary, limits, batches, and how failures end a replay.

use std::collections::VecDeque;
use std::time::Duration;

use uuid::Uuid;

use super::{POLICY, Run, TIMEOUT, created, dead, delayed, lost, times};
use crate::amqp::BrokerError;
use crate::dead_letters::progress::{End, Stage};
use crate::dead_letters::replay::state::{Action, BATCH_HOLD, Event, Policy};

#[test]
fn nothing_to_replay_ends_at_once() {
    let mut run = Run::scanned(POLICY, 0);
    assert_eq!(run.end(), End::Done);
}

#[test]
fn the_canary_is_taken_and_sent_alone() {
    let mut run = Run::scanned(POLICY, 5);
    run.on(Event::BufferRead);
    assert!(matches!(&run.action, Action::TakeBatch { failed_at, exclusive: true } if failed_at.len() == 1));
    let canary = run.send();
    run.until_wait();
    assert_eq!(run.state.progress().stage, Stage::Canary);
    assert_eq!(run.counts(), (1, 1, 0));
    run.outcome(created(canary));
    assert!(matches!(run.action, Action::ReadBuffered | Action::TakeBatch { exclusive: false, .. }));
}

#[test]
fn sending_stops_at_the_limit_and_continues_with_an_outcome() {
    let mut run = Run::scanned(POLICY, 9);
    run.pass_canary();
    let first = run.send();
    run.send();
    run.until_wait();
    assert_eq!(run.counts(), (3, 2, 0));
    run.outcome(created(first));
    run.send();
    assert_eq!(run.counts(), (4, 2, 0));
}

#[test]
fn without_waiting_everything_is_sent_and_nothing_awaited() {
    let mut run = Run::scanned(Policy { outcome_timeout: None, ..POLICY }, 5);
    for _ in 0..5 {
        run.send();
    }
    assert_eq!((run.end(), run.counts()), (End::Done, (5, 0, 0)));
}

/// `--keep-going` ignores every failure. Before the canary passed, any failure ends the replay. After that, only one with
/// a fingerprint that was seen before.
#[test]
fn the_canary_and_the_fingerprint_decide_whether_a_failure_ends_the_replay() {
    for (keep_going, canary_passes, fingerprint, expected) in [
        (false, false, "a", Some(End::CanaryFailed)),
        (false, false, "new", Some(End::CanaryFailed)),
        (false, true, "a", Some(End::SameFailure)),
        (false, true, "new", None),
        (true, false, "a", None),
        (true, true, "a", None),
        (true, true, "new", None),
    ] {
        let mut run = Run::scanned(Policy { keep_going, ..POLICY }, 4);
        if canary_passes {
            run.pass_canary();
        }
        let failing = run.send();
        if !canary_passes {
            run.until_wait();
        }
        run.outcome(dead(failing, fingerprint));
        let case = format!("{keep_going} {canary_passes} {fingerprint}");
        match expected {
            Some(end) => assert_eq!(run.end(), end, "{case}"),
            None => _ = run.send(),
        }
        assert_eq!(run.state.progress().failed_again(), 1, "{case}");
    }
}

/// While messages are in flight and more are to be sent.
#[test]
fn each_interruption_leads_to_one_action() {
    for (event, expected) in [
        (Event::StopRequested, "Finish(Stopped)"),
        (Event::Failed(BrokerError::Cancelled), "Fail"),
        (lost(), "Connect"),
        (Event::TimedOut, "ReturnBatch"),
        (Event::Polled(None), "Wait"),
        (Event::Outcome(created(Uuid::nil())), "Wait"),
    ] {
        let mut run = Run::scanned(POLICY, 9);
        run.pass_canary();
        run.send();
        run.send();
        run.until_wait();
        let case = format!("{event:?}");
        let action = format!("{:?}", run.on(event));
        assert!(action.starts_with(expected), "{case}: {action}");
    }
}

/// Other events while the last outcomes are awaited change nothing.
#[test]
fn the_first_failure_decides_how_the_replay_ends() {
    for event in [Event::StopRequested, Event::Failed(BrokerError::Cancelled), lost(), Event::TimedOut] {
        let mut run = Run::scanned(POLICY, 9);
        run.pass_canary();
        let failing = run.send();
        run.send();
        run.outcome(dead(failing, "a"));
        run.until_wait();
        run.on(event);
        assert_eq!(run.end(), End::SameFailure);
    }
}

#[test]
fn without_a_worker_the_replay_times_out_after_the_canary() {
    let mut run = Run::scanned(POLICY, 3);
    run.send();
    let until = run.until_wait();
    assert_eq!(until, run.now + TIMEOUT);
    run.pass(TIMEOUT);
    run.on(Event::TimedOut);
    run.until_wait();
    run.on(Event::TimedOut);
    assert_eq!((run.end(), run.counts()), (End::TimedOut, (1, 1, 0)));
    assert!(!run.state.progress().only_missed());
}

#[test]
fn a_delayed_message_extends_the_time_to_wait() {
    let mut run = Run::scanned(POLICY, 1);
    let canary = run.send();
    run.until_wait();
    run.outcome(delayed(canary, 3600));
    assert_eq!(run.until_wait(), run.now + Duration::from_hours(1) + TIMEOUT);
    assert_eq!((run.counts(), run.state.progress().delayed), ((1, 1, 0), 1));
}

#[test]
fn a_repeated_outcome_counts_once() {
    let mut run = Run::scanned(POLICY, 3);
    let canary = run.send();
    run.until_wait();
    for _ in 0..3 {
        run.outcome(created(canary));
    }
    assert_eq!(run.state.progress().finished(), 1);
}

/// Past defect: outcomes that had arrived before sending were read only after it.
#[test]
fn arrived_outcomes_are_read_before_each_message() {
    let mut run = Run::scanned(Policy { max_in_flight: 100, ..POLICY }, 9);
    run.pass_canary();
    run.send();
    for _ in 0..5 {
        assert!(matches!(run.action, Action::ReadBuffered), "{:?}", run.action);
        run.send();
    }
}

/// Past defect: the replay ended when another operator had taken its first dead letter.
#[test]
fn a_dead_letter_that_another_operator_took_is_skipped() {
    let mut run = Run::scanned(POLICY, 3);
    run.until_take();
    run.on(Event::BatchTaken { chosen: 0, replaced: 0, failed_at: VecDeque::new() });
    assert_eq!(run.state.progress().matched, 2);
    run.send();
    run.until_wait();
    assert_eq!(run.state.progress().stage, Stage::Canary);
}

/// Past defect: dead letters that an interrupted edit had replaced were sent.
#[test]
fn replaced_dead_letters_are_not_sent() {
    let mut run = Run::scanned(POLICY, 3);
    run.pass_canary();
    run.until_take();
    run.on(Event::BatchTaken { chosen: 2, replaced: 1, failed_at: times(1).into() });
    assert_eq!(run.state.progress().matched, 2);
    let last = run.send();
    run.outcome(created(last));
    assert_eq!((run.end(), run.counts()), (End::Done, (2, 0, 0)));
}

/// Past defect: while a message was delayed, other operators did not see the batch that waited for it.
#[test]
fn a_batch_that_cannot_be_sent_goes_back_and_is_taken_again() {
    let mut run = Run::scanned(POLICY, 5);
    run.pass_canary();
    run.send();
    run.send();
    run.until_wait();
    run.pass(BATCH_HOLD);
    assert!(matches!(run.on(Event::Polled(None)), Action::ReturnBatch));
    assert_eq!(run.until_wait(), run.now - BATCH_HOLD + TIMEOUT);
    let in_flight = run.state.progress().in_flight;
    assert_eq!((in_flight, run.state.progress().matched), (2, 5));
}

/// A batch that was full before its last dead letter leaves the rest for the next one.
#[test]
fn the_rest_of_a_full_batch_is_taken_next() {
    let mut run = Run::scanned(POLICY, 4);
    run.pass_canary();
    run.until_take();
    run.on(Event::BatchTaken { chosen: 1, replaced: 0, failed_at: times(1).into() });
    let one = run.send();
    run.outcome(created(one));
    run.until_take();
    assert!(matches!(&run.action, Action::TakeBatch { failed_at, .. } if failed_at.len() == 2));
}
