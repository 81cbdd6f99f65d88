//! Unit tests of [`ReplayState`]: single decisions, defects of the past, and laws that hold in any order of events.

#![expect(clippy::wildcard_enum_match_arm, reason = "any other action fails the test")]

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::amqp::topology::Depth;
use crate::consumer::outcome_events::{DeadLetterSummary, ReplayEvent};
use crate::dead_letters::progress::{End, Stage};
use crate::dead_letters::replay::state::{
    Action, BATCH_HOLD, Event, FailedAt, LAST_OUTCOMES, Policy, RECONNECT_TIMEOUT, RESCAN_PAUSE, ReplayState,
    SCANS,
};

const TIMEOUT: Duration = Duration::from_mins(10);
const POLICY: Policy =
    Policy { limit: None, max_in_flight: 2, keep_going: false, outcome_timeout: Some(TIMEOUT) };

fn times(count: usize) -> Vec<FailedAt> {
    (0..count).map(|n| Timestamp::from_second(i64::try_from(n).unwrap()).ok()).collect()
}

fn created(replay: Uuid) -> ReplayEvent {
    ReplayEvent { replay, outcome: "created".into(), dead_letter: None, comes_again_s: None }
}

fn dead(replay: Uuid, fingerprint: &str) -> ReplayEvent {
    let again = DeadLetterSummary {
        id: replay,
        fingerprint: fingerprint.into(),
        error: String::new(),
        close_said: None,
    };
    ReplayEvent { replay, outcome: "dead".into(), dead_letter: Some(again), comes_again_s: None }
}

fn delayed(replay: Uuid, seconds: u64) -> ReplayEvent {
    ReplayEvent { replay, outcome: "delayed".into(), dead_letter: None, comes_again_s: Some(seconds) }
}

fn lost() -> Event {
    Event::ConnectionLost { error: BrokerError::Lost("test".into()), buffered: Vec::new() }
}

/// A replay with a clock that only the test moves.
struct Run {
    state: ReplayState,
    action: Action,
    now: Instant,
}

impl Run {
    fn new(policy: Policy) -> Self {
        let now = Instant::now();
        let (state, action) = ReplayState::start(policy, now);
        Self { state, action, now }
    }

    /// A replay that has scanned this many dead letters.
    fn scanned(policy: Policy, count: usize) -> Self {
        let mut run = Self::new(policy);
        run.connect(count);
        run
    }

    fn on(&mut self, event: Event) -> &Action {
        self.action = self.state.on(event, self.now);
        &self.action
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn connect(&mut self, count: usize) {
        assert!(matches!(self.action, Action::Connect { .. }), "{:?}", self.action);
        assert!(matches!(self.on(Event::Connected), Action::CompleteEdits));
        assert!(matches!(self.on(Event::EditsCompleted), Action::Scan { .. }));
        self.on(Event::Scanned { failed_at: times(count), failed_again: Vec::new() });
    }

    /// Does what needs no outcome, until a message is to be published. Panics when the replay does something else.
    fn until_publish(&mut self) -> Uuid {
        for _ in 0..20 {
            match &self.action {
                Action::Publish { replay } => return *replay,
                Action::ReadBuffered => _ = self.on(Event::BufferRead),
                Action::ReturnBatch => _ = self.on(Event::BatchReturned),
                Action::TakeBatch { failed_at, .. } => {
                    let failed_at: VecDeque<_> = failed_at.clone().into();
                    self.on(Event::BatchTaken { chosen: failed_at.len(), replaced: 0, failed_at });
                }
                other => panic!("expected to publish, got {other:?}"),
            }
        }
        panic!("never published");
    }

    /// Does what needs no outcome, until a batch is to be taken.
    fn until_take(&mut self) {
        while !matches!(self.action, Action::TakeBatch { .. }) {
            match self.action {
                Action::ReadBuffered => _ = self.on(Event::BufferRead),
                Action::ReturnBatch => _ = self.on(Event::BatchReturned),
                ref other => panic!("expected to take a batch, got {other:?}"),
            }
        }
    }

    /// Publishes the next message, and stops before the decision that follows.
    fn send(&mut self) -> Uuid {
        let replay = self.until_publish();
        assert!(matches!(self.on(Event::Confirmed { fingerprint: "a".into() }), Action::Delete));
        self.on(Event::Deleted);
        replay
    }

    /// Does what needs no outcome, until the replay waits for one. Returns until when.
    fn until_wait(&mut self) -> Instant {
        for _ in 0..20 {
            match self.action {
                Action::Wait { until } => return until,
                Action::ReadBuffered => _ = self.on(Event::BufferRead),
                Action::ReturnBatch => _ = self.on(Event::BatchReturned),
                ref other => panic!("expected to wait, got {other:?}"),
            }
        }
        panic!("never waited");
    }

    fn end(&mut self) -> End {
        for _ in 0..20 {
            match &self.action {
                Action::Finish(end) => return end.clone(),
                Action::ReadBuffered => _ = self.on(Event::BufferRead),
                Action::ReturnBatch => _ = self.on(Event::BatchReturned),
                other => panic!("expected the end, got {other:?}"),
            }
        }
        panic!("never ended");
    }

    fn outcome(&mut self, outcome: ReplayEvent) {
        self.on(Event::Outcome(outcome));
    }

    /// The canary succeeds.
    fn pass_canary(&mut self) {
        let canary = self.send();
        self.until_wait();
        self.outcome(created(canary));
    }

    fn counts(&self) -> (usize, usize, usize) {
        let progress = self.state.progress();
        (progress.sent, progress.in_flight, progress.missed)
    }
}

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

/// What a failed message means: by `--keep-going`, by whether the canary passed, and by its fingerprint.
#[test]
fn a_failure_ends_the_replay_or_not() {
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

/// What each event means while messages are in flight and more are to be sent.
#[test]
fn an_interruption_is_answered() {
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

/// The first failure decides how the replay ends, whatever happens while the last outcomes are awaited.
#[test]
fn the_first_failure_is_the_end() {
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
fn no_worker_means_a_timeout_after_the_canary() {
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
fn an_outcome_counts_once() {
    let mut run = Run::scanned(POLICY, 3);
    let canary = run.send();
    run.until_wait();
    for _ in 0..3 {
        run.outcome(created(canary));
    }
    assert_eq!(run.state.progress().finished(), 1);
}

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
    // RabbitMQ has it after all: its outcome counts.
    run.on(Event::Scanned { failed_at: times(2), failed_again: vec![dead(unconfirmed, "a")] });
    assert_eq!((run.end(), run.state.progress().failed_again()), (End::SameFailure, 1));
}

/// Past defect: reading the buffered outcomes swallowed the error of the consumer, and the replay ended.
#[test]
fn a_lost_connection_is_never_swallowed() {
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
        let again = run.on(Event::Scanned { failed_at: Vec::new(), failed_again: Vec::new() });
        assert!(matches!(again, Action::Scan { pause: RESCAN_PAUSE, .. }), "{again:?}");
    }
    // Others have dealt with them.
    run.on(Event::Scanned { failed_at: times(2), failed_again: Vec::new() });
    assert_eq!(run.state.progress().matched, 4);
    run.send();
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

/// Past defect: the five minutes without a broker counted from the first loss, however well it worked in between.
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

/// Past defect: messages whose outcome was missed kept their places, and the replay stood still.
#[test]
fn missed_outcomes_free_their_places() {
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

/// Past defect: a message that left its delay queue while the connection was lost kept its place.
#[test]
fn a_delay_that_ended_while_disconnected_frees_its_place() {
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

/// Past defect: after a reconnect the time to wait had begun long ago.
#[test]
fn a_reconnect_restarts_the_time_to_wait() {
    let mut run = Run::scanned(POLICY, 2);
    run.pass_canary();
    run.send();
    run.on(lost());
    run.pass(Duration::from_mins(4));
    run.connect(0);
    for _ in 1..SCANS {
        if matches!(run.action, Action::Scan { .. }) {
            run.on(Event::Scanned { failed_at: Vec::new(), failed_again: Vec::new() });
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
    run.on(Event::Scanned { failed_at: times(8), failed_again: vec![dead(canary, "a")] });
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

/// Past defect: the replay ended when another operator had taken its first dead letter.
#[test]
fn a_dead_letter_that_others_took_is_skipped() {
    let mut run = Run::scanned(POLICY, 3);
    run.until_take();
    run.on(Event::BatchTaken { chosen: 0, replaced: 0, failed_at: VecDeque::new() });
    assert_eq!(run.state.progress().matched, 2);
    run.send();
    run.until_wait();
    assert_eq!(run.state.progress().stage, Stage::Canary);
}

/// Past defect: what an interrupted edit had replaced was sent, too.
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

/// Past defect: a batch that could not be sent was kept from other operators for as long as a message was delayed.
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

/// What becomes of a message in the world of the property test.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Created,
    Dead(u8),
    DelayedThenCreated,
    Silent,
}

#[derive(Clone, Debug)]
struct World {
    fates: Vec<Fate>,
    policy: Policy,
    /// The connection is lost at these actions.
    losses: Vec<usize>,
    stop: Option<usize>,
    /// Actions that other operators are faster than.
    stolen: Vec<usize>,
}

fn world() -> impl Strategy<Value = World> {
    let fate = prop_oneof![
        6 => Just(Fate::Created),
        1 => (0..3_u8).prop_map(Fate::Dead),
        1 => Just(Fate::DelayedThenCreated),
        1 => Just(Fate::Silent),
    ];
    let policy =
        (proptest::option::of(0..30_usize), 1..6_usize, any::<bool>(), proptest::bool::weighted(0.9))
            .prop_map(|(limit, max_in_flight, keep_going, waits)| {
                let outcome_timeout = waits.then_some(TIMEOUT);
                Policy { limit, max_in_flight, keep_going, outcome_timeout }
            });
    let stop = proptest::option::weighted(0.1, 0..200_usize);
    (vec(fate, 0..25), policy, vec(0..200_usize, 0..6), stop, vec(0..200_usize, 0..2))
        .prop_map(|(fates, policy, losses, stop, stolen)| World { fates, policy, losses, stop, stolen })
}

proptest! {
    /// For any outcomes, lost connections and interruptions.
    #[test]
    fn the_laws_of_a_replay(world in world()) {
        play(&world)?;
    }
}

/// Plays a replay against a broker and a worker that behave as `world` says, and checks the laws at each step.
#[expect(clippy::too_many_lines, reason = "one world, step by step")]
fn play(world: &World) -> Result<(), TestCaseError> {
    let World { fates, policy, losses, stop, stolen } = world;
    let mut run = Run::new(*policy);
    let mut queue: VecDeque<usize> = (0..fates.len()).collect();
    let mut batch: VecDeque<usize> = VecDeque::new();
    let mut publishing = 0;
    // Outcomes on their way: when, and what. Without a connection they are lost.
    let mut coming: Vec<(Instant, ReplayEvent)> = Vec::new();
    let mut dead_again: Vec<ReplayEvent> = Vec::new();
    let (mut finished, mut sent, mut delivered) = (Vec::new(), Vec::new(), std::collections::HashSet::new());
    // Sent over this connection, without a final outcome.
    let mut open: Vec<Uuid> = Vec::new();
    let (mut any_passed, mut was_confirmed) = (false, false);
    for step in 0.. {
        prop_assert!(step < 20_000, "it never ends: {:?}", run.action);
        let confirmed = std::mem::take(&mut was_confirmed);
        prop_assert_eq!(matches!(run.action, Action::Delete), confirmed, "only what is confirmed is deleted");
        let is_connected = !matches!(run.action, Action::Connect { .. });
        let over = matches!(run.action, Action::Finish(_) | Action::Fail(_));
        if *stop == Some(step) && !over {
            run.on(Event::StopRequested);
            prop_assert!(matches!(run.action, Action::Finish(_)), "{:?}", run.action);
            continue;
        }
        if losses.contains(&step) && !over {
            if let Action::Publish { replay } = run.action
                && step % 2 == 0
            {
                // RabbitMQ has it, although its confirm is lost.
                sent.push(replay);
                dead_again.push(dead(replay, "lost"));
            }
            // Those that are due have arrived, the others find no connection.
            let (arrived, lost): (Vec<_>, Vec<_>) =
                std::mem::take(&mut coming).into_iter().partition(|(at, _)| *at <= run.now && is_connected);
            dead_again
                .extend(lost.into_iter().map(|(_, outcome)| outcome).filter(|o| o.dead_letter.is_some()));
            let buffered: Vec<_> = arrived.into_iter().map(|(_, outcome)| outcome).collect();
            for outcome in buffered.iter().filter(|outcome| outcome.comes_again_s.is_none()) {
                delivered.insert(outcome.replay);
                any_passed |= outcome.dead_letter.is_none() || policy.keep_going;
            }
            batch.drain(..).rev().for_each(|letter| queue.push_front(letter));
            open.clear();
            run.on(Event::ConnectionLost { error: BrokerError::Lost("test".into()), buffered });
            prop_assert!(
                matches!(run.action, Action::Connect { .. } | Action::Finish(_) | Action::Fail(_)),
                "a lost connection is reported: {:?}",
                run.action
            );
            continue;
        }
        let now = run.now;
        let arrived = |coming: &mut Vec<(Instant, ReplayEvent)>, until: Instant| {
            let first = (0..coming.len()).filter(|n| coming[*n].0 <= until).min_by_key(|n| coming[*n].0)?;
            Some(coming.remove(first))
        };
        let next = match &run.action {
            Action::Connect { pause } => {
                run.now += *pause + Duration::from_secs(1);
                Event::Connected
            }
            Action::CompleteEdits => Event::EditsCompleted,
            Action::Scan { pause, limit } => {
                run.now += *pause;
                queue.make_contiguous().sort_unstable();
                let all = times(fates.len());
                let failed_again = std::mem::take(&mut dead_again);
                for outcome in &failed_again {
                    delivered.insert(outcome.replay);
                }
                any_passed |= policy.keep_going && !failed_again.is_empty();
                Event::Scanned {
                    failed_at: queue.iter().take(*limit).map(|n| all[*n]).collect(),
                    failed_again,
                }
            }
            Action::TakeBatch { failed_at, exclusive } => {
                prop_assert!(!exclusive || failed_at.len() == 1);
                if stolen.contains(&step) {
                    queue.drain(..failed_at.len().min(queue.len()));
                    Event::BatchTaken { chosen: 0, replaced: 0, failed_at: VecDeque::new() }
                } else {
                    let chosen = failed_at.len().min(3);
                    batch = queue.drain(..chosen.min(queue.len())).collect();
                    let all = times(fates.len());
                    let failed_at = batch.iter().map(|n| all[*n]).collect();
                    Event::BatchTaken { chosen: batch.len(), replaced: 0, failed_at }
                }
            }
            Action::Publish { replay } => {
                let most = if any_passed { policy.max_in_flight } else { 1 };
                prop_assert!(
                    policy.outcome_timeout.is_none() || open.len() < most,
                    "more than allowed in flight"
                );
                prop_assert!(!sent.contains(replay), "each message has an id of its own");
                publishing = batch.pop_front().unwrap();
                sent.push(*replay);
                open.push(*replay);
                let soon = now + Duration::from_secs(1);
                match fates[publishing] {
                    Fate::Created => coming.push((soon, created(*replay))),
                    Fate::Dead(kind) => coming.push((soon, dead(*replay, &format!("kind-{kind}")))),
                    Fate::DelayedThenCreated => {
                        coming.push((soon, delayed(*replay, 60)));
                        coming.push((now + Duration::from_secs(61), created(*replay)));
                    }
                    Fate::Silent => {}
                }
                was_confirmed = true;
                Event::Confirmed { fingerprint: format!("kind-{}", publishing % 2) }
            }
            Action::Delete => {
                finished.push(publishing);
                Event::Deleted
            }
            Action::ReturnBatch => {
                batch.drain(..).rev().for_each(|letter| queue.push_front(letter));
                Event::BatchReturned
            }
            Action::ReadBuffered => {
                arrived(&mut coming, now).map_or(Event::BufferRead, |(_, o)| Event::Outcome(o))
            }
            Action::Wait { until } => {
                let (until, poll) = (*until, now + Duration::from_secs(2));
                match arrived(&mut coming, until.min(poll)) {
                    Some((at, outcome)) => {
                        run.now = now.max(at);
                        Event::Outcome(outcome)
                    }
                    None if until <= poll => {
                        run.now = now.max(until);
                        Event::TimedOut
                    }
                    None => {
                        run.now = poll;
                        Event::Polled(None)
                    }
                }
            }
            Action::Finish(end) => {
                let progress = run.state.progress();
                prop_assert!(*end != End::Done || progress.sent == progress.matched, "{progress:?}");
                prop_assert!(*end != End::Done || progress.in_flight + progress.missed == 0, "{progress:?}");
                prop_assert_eq!(&progress.stage, &Stage::Finished(end.clone()));
                break;
            }
            Action::Fail(_) => break,
        };
        if let Event::Outcome(outcome) = &next
            && outcome.comes_again_s.is_none()
        {
            delivered.insert(outcome.replay);
            open.retain(|replay| *replay != outcome.replay);
            any_passed |= outcome.dead_letter.is_none() || policy.keep_going;
        }
        run.on(next);
        let progress = run.state.progress();
        prop_assert!(progress.finished() <= delivered.len(), "each outcome counts once");
        prop_assert!(
            progress.finished() + progress.in_flight + progress.missed <= sent.len(),
            "each message counts once"
        );
    }
    let mut once = finished.clone();
    once.sort_unstable();
    once.dedup();
    prop_assert_eq!(once.len(), finished.len(), "each dead letter is deleted once");
    prop_assert!(run.state.progress().sent >= finished.len());
    Ok(())
}
