//! Lost connections. Most tests here describe a past defect.

use std::time::Duration;

use super::{POLICY, Run, TIMEOUT, created, dead, delayed, lost, times};
use crate::amqp::BrokerError;
use crate::amqp::topology::Depth;
use crate::dead_letters::guard::GuardCounts;
use crate::dead_letters::progress::{End, Stage};
use crate::dead_letters::replay::state::{
    Action, Event, LAST_OUTCOMES, Policy, RECONNECT_TIMEOUT, RESCAN_PAUSE, SCANS,
};

/// A dead letter is deleted only right after the confirm of its message. An error in between sends it again.
#[test]
fn a_message_without_confirm_is_not_counted_as_sent() {
    let mut run = Run::scanned(Policy { limit: Some(3), ..POLICY }, 3);
    run.pass_canary();
    let unconfirmed = run.until_publish();
    run.on(lost());
    assert_eq!(run.counts(), (1, 0, 0));
    run.on(Event::Connected);
    assert!(matches!(run.on(Event::EditsCompleted), Action::Scan { limit: 2, .. }));
    // RabbitMQ had accepted it, so its outcome counts.
    run.on(Event::Scanned {
        failed_at: times(2),
        guards: GuardCounts::new(),
        failed_again: vec![dead(unconfirmed, "a")],
    });
    assert_eq!((run.end(), run.state.progress().failed_again()), (End::SameFailure, 1));
}

/// Past defect: reading the buffered outcomes swallowed the error of the consumer, and the replay ended.
#[test]
fn a_lost_connection_is_reported_although_outcomes_were_buffered() {
    let mut run = Run::scanned(POLICY, 9);
    run.pass_canary();
    let first = run.send();
    run.send();
    run.until_wait();
    run.on(Event::ConnectionLost { error: BrokerError::Lost("test".into()), buffered: vec![created(first)] });
    assert!(matches!(run.action, Action::Connect { .. }), "{:?}", run.action);
    assert_eq!(run.state.progress().stage, Stage::Reconnecting);
    assert_eq!(run.state.progress().finished(), 2);
}

/// Past defect: outcomes that had arrived before the connection was lost were not read.
#[test]
fn a_buffered_failure_ends_the_replay_without_a_new_connection() {
    let mut run = Run::scanned(POLICY, 9);
    let canary = run.send();
    run.until_wait();
    run.on(Event::ConnectionLost {
        error: BrokerError::Lost("test".into()),
        buffered: vec![dead(canary, "a")],
    });
    assert_eq!(run.end(), End::CanaryFailed);
}

/// Past defect: a queue without a leader looked empty after a reconnect, and the replay ended as done.
#[test]
fn too_few_dead_letters_after_a_reconnect_are_scanned_again() {
    let mut run = Run::scanned(POLICY, 9);
    run.pass_canary();
    run.send();
    run.on(lost());
    run.on(Event::Connected);
    run.on(Event::EditsCompleted);
    for _ in 1..SCANS {
        let again = run.on(Event::Scanned {
            failed_at: Vec::new(),
            guards: GuardCounts::new(),
            failed_again: Vec::new(),
        });
        assert!(matches!(again, Action::Scan { pause: RESCAN_PAUSE, .. }), "{again:?}");
    }
    // Other operators replayed, edited or discarded them.
    run.on(Event::Scanned { failed_at: times(2), guards: GuardCounts::new(), failed_again: Vec::new() });
    assert_eq!(run.state.progress().matched, 4);
    run.send();
}

/// Past defect: the reconnect timeout counted from the first loss, although the connection worked in between.
#[test]
fn a_working_connection_restarts_the_reconnect_timeout() {
    for recovers in [false, true] {
        let mut run = Run::scanned(Policy { max_in_flight: 1, ..POLICY }, 9);
        run.pass_canary();
        run.send();
        run.on(lost());
        run.connect(7);
        if recovers {
            run.send();
            run.until_wait();
            run.on(Event::Polled(Some(Depth { ready: 0, consumers: 1 })));
        }
        run.pass(RECONNECT_TIMEOUT + Duration::from_secs(1));
        let action = format!("{:?}", run.on(lost()));
        assert!(action.starts_with(if recovers { "Connect" } else { "Fail" }), "{recovers}: {action}");
    }
}

#[test]
fn a_first_connection_that_fails_is_an_error() {
    let mut run = Run::new(POLICY);
    let event = Event::ConnectionLost { error: BrokerError::Unreachable("x".into()), buffered: Vec::new() };
    assert!(matches!(run.on(event), Action::Fail(BrokerError::Unreachable(_))));
}

/// Past defect: messages whose outcome was missed counted against the limit, and the replay stalled.
#[test]
fn missed_outcomes_do_not_count_against_the_limit() {
    let mut run = Run::scanned(POLICY, 9);
    run.pass_canary();
    run.send();
    run.send();
    run.on(lost());
    run.connect(6);
    assert_eq!(run.counts(), (3, 0, 2));
    run.send();
    assert_eq!(run.counts(), (4, 1, 2));
}

/// Past defect: a message that left its delay queue while the connection was lost counted against the limit.
#[test]
fn a_delay_that_ended_while_disconnected_does_not_count_against_the_limit() {
    for (elapsed, expected) in [(5, (2, 1, 0)), (7, (2, 0, 1))] {
        let mut run = Run::scanned(POLICY, 9);
        run.pass_canary();
        let waiting = run.send();
        run.outcome(delayed(waiting, 6));
        run.on(lost());
        run.pass(Duration::from_secs(elapsed));
        run.on(Event::Connected);
        assert_eq!(run.counts(), expected, "after {elapsed} s");
    }
}

/// Past defect: after a reconnect the outcome timeout counted from before the connection was lost.
#[test]
fn a_reconnect_restarts_the_outcome_timeout() {
    let mut run = Run::scanned(POLICY, 2);
    run.pass_canary();
    run.send();
    run.on(lost());
    run.pass(Duration::from_mins(4));
    run.connect(0);
    for _ in 1..SCANS {
        if matches!(run.action, Action::Scan { .. }) {
            run.on(Event::Scanned {
                failed_at: Vec::new(),
                guards: GuardCounts::new(),
                failed_again: Vec::new(),
            });
        }
    }
    assert_eq!(run.until_wait(), run.now + TIMEOUT);
    run.on(Event::TimedOut);
    assert_eq!((run.end(), run.state.progress().only_missed()), (End::TimedOut, true));
}

/// Past defect: the last outcomes after a reconnect were awaited for 30 s although a later message had not finished.
#[test]
fn missed_outcomes_are_overdue_once_a_later_message_finished() {
    let mut run = Run::scanned(POLICY, 3);
    run.pass_canary();
    run.send();
    run.on(lost());
    run.connect(1);
    let later = run.send();
    assert_eq!(run.until_wait(), run.now + TIMEOUT);
    run.outcome(created(later));
    assert_eq!(run.until_wait(), run.now + LAST_OUTCOMES);
}

/// Past defect: a canary that failed while the connection was lost did not hold back the others.
#[test]
fn a_canary_that_failed_while_disconnected_stops_the_replay() {
    let mut run = Run::scanned(POLICY, 9);
    let canary = run.send();
    run.until_wait();
    run.on(lost());
    run.on(Event::Connected);
    run.on(Event::EditsCompleted);
    run.on(Event::Scanned {
        failed_at: times(8),
        guards: GuardCounts::new(),
        failed_again: vec![dead(canary, "a")],
    });
    assert_eq!((run.end(), run.counts()), (End::CanaryFailed, (1, 0, 0)));
}

/// Past defect: a replay that was reconnecting could not be stopped.
#[test]
fn a_replay_can_be_stopped_while_it_reconnects() {
    let mut run = Run::scanned(POLICY, 9);
    run.send();
    run.on(lost());
    run.on(Event::StopRequested);
    assert_eq!(run.end(), End::Stopped);
}
