//! Unit tests of [`ReplayState`]. This file holds the harness.

#![expect(clippy::wildcard_enum_match_arm, reason = "any other action fails the test")]

mod properties;
mod reconnect;
mod sending;

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::consumer::outcome_events::{DeadLetterSummary, ReplayEvent};
use crate::dead_letters::guard::GuardCounts;
use crate::dead_letters::progress::End;
use crate::dead_letters::replay::state::{Action, Event, FailedAt, Policy, ReplayState};

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

/// A replay, and a clock that the test advances.
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

    /// A replay that has found this many dead letters.
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
        self.on(Event::Scanned {
            failed_at: times(count),
            guards: GuardCounts::new(),
            failed_again: Vec::new(),
        });
    }

    /// Performs the actions that need no outcome, up to the next publish.
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

    /// Performs the actions that need no outcome, up to taking a batch.
    fn until_take(&mut self) {
        while !matches!(self.action, Action::TakeBatch { .. }) {
            match self.action {
                Action::ReadBuffered => _ = self.on(Event::BufferRead),
                Action::ReturnBatch => _ = self.on(Event::BatchReturned),
                ref other => panic!("expected to take a batch, got {other:?}"),
            }
        }
    }

    /// Publishes the next message and deletes its dead letter.
    fn send(&mut self) -> Uuid {
        let replay = self.until_publish();
        assert!(matches!(self.on(Event::Confirmed { fingerprint: "a".into() }), Action::Delete));
        self.on(Event::Deleted);
        replay
    }

    /// Performs the actions that need no outcome, until the replay waits for one. Returns the end of the wait.
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
