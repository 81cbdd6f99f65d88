//! The decisions of a replay, without any IO.
//!
//! [`ReplayState::on`] takes what happened and returns the one thing to do next. The shell ([`super::replay`]) does it
//! and reports what came of it. Each event has exactly one answer, so no event can be lost between two decisions: a
//! lost connection is always answered by connecting again, finishing or failing.
//!
//! ```text
//! Connect -> CompleteEdits -> Scan -> [TakeBatch -> [ReadBuffered -> Publish -> Delete]* -> ReturnBatch]* -> Finish
//!                                              Wait, where no message may be sent
//! ```

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::amqp::topology::Depth;
use crate::consumer::outcome_events::{DeadLetterSummary, ReplayEvent};
use crate::dead_letters::guard::GuardCounts;
use crate::dead_letters::progress::{End, Progress, Stage};
use crate::dead_letters::replay::in_flight::{Deadline, InFlight};
use crate::retry::Backoff;

/// Most dead letters in one batch.
pub(super) const BATCH: usize = 500;
/// A batch goes back to the queue after this time, so that other operators see what is in it.
pub(super) const BATCH_HOLD: Duration = Duration::from_secs(30);
/// How long outstanding outcomes are awaited once nothing more is sent.
pub(super) const LAST_OUTCOMES: Duration = Duration::from_secs(30);
/// Time between two scans while dead letters are missing.
pub(super) const RESCAN_PAUSE: Duration = Duration::from_secs(2);
/// Most scans while dead letters are missing. Then other operators have dealt with them.
pub(super) const SCANS: usize = 4;
/// How long the broker may be gone.
pub(super) const RECONNECT_TIMEOUT: Duration = Duration::from_mins(5);

/// When a dead letter failed. Dead letters are chosen and sent in this order, whatever order the queue has.
pub(super) type FailedAt = Option<Timestamp>;

/// What happened.
#[derive(Debug)]
pub(super) enum Event {
    /// The connection is open, and outcomes are received.
    Connected,
    /// Edits that were interrupted before this replay are complete.
    EditsCompleted,
    Scanned {
        /// The dead letters to replay, oldest first.
        failed_at: Vec<FailedAt>,
        /// What guards newer values against them.
        guards: GuardCounts,
        /// Messages of this replay that are dead letters again.
        failed_again: Vec<ReplayEvent>,
    },
    BatchTaken {
        /// Dead letters chosen from those that were asked for.
        chosen: usize,
        /// Those of them that were deleted because an edited copy replaces them.
        replaced: usize,
        /// The dead letters in the batch, oldest first.
        failed_at: VecDeque<FailedAt>,
    },
    BatchReturned,
    /// RabbitMQ confirmed the message.
    Confirmed {
        /// Fingerprint of its dead letter.
        fingerprint: String,
    },
    /// The dead letter of the confirmed message was deleted.
    Deleted,
    /// The worker reported an outcome.
    Outcome(ReplayEvent),
    /// All outcomes that had arrived were read.
    BufferRead,
    /// No outcome for a while. `None` where the user may not look at the work queue.
    Polled(Option<Depth>),
    /// The time to wait is over.
    TimedOut,
    /// The operator stops the replay.
    StopRequested,
    ConnectionLost {
        error: BrokerError,
        /// Outcomes that had arrived before.
        buffered: Vec<ReplayEvent>,
    },
    /// An error that a new connection does not cure.
    Failed(BrokerError),
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Action {
    Connect {
        /// Time to wait before it.
        pause: Duration,
    },
    CompleteEdits,
    Scan {
        /// Time to wait before it.
        pause: Duration,
        limit: usize,
    },
    TakeBatch {
        /// The dead letters to take, oldest first.
        failed_at: Vec<FailedAt>,
        /// Others may not scan meanwhile. Only for the canary, which is a batch of one.
        exclusive: bool,
    },
    /// Publish the oldest dead letter of the batch.
    Publish {
        /// The id that its outcome will carry.
        replay: Uuid,
    },
    /// Delete the dead letter whose message was confirmed.
    Delete,
    ReturnBatch,
    /// Read the outcomes that have arrived, without waiting.
    ReadBuffered,
    /// Wait for an outcome.
    Wait {
        until: Instant,
    },
    Finish(End),
    Fail(BrokerError),
}

/// The limits of a replay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Most dead letters.
    pub(super) limit: Option<usize>,
    pub(super) max_in_flight: usize,
    /// Continue when messages fail again.
    pub(super) keep_going: bool,
    /// How long to wait for an outcome. `None`: send everything and wait for nothing.
    pub(super) outcome_timeout: Option<Duration>,
}

#[derive(Debug)]
enum Phase {
    Connecting,
    Scanning {
        scans: usize,
        failed_again: Vec<ReplayEvent>,
    },
    Sending,
    /// Nothing more is sent. The last outcomes are awaited.
    Finishing {
        end: End,
        /// Until then at most.
        until: Option<Instant>,
    },
}

#[derive(Debug)]
struct HeldBatch {
    /// Still to send.
    failed_at: VecDeque<FailedAt>,
    /// How many it had.
    size: usize,
    until: Instant,
}

/// How long the broker has been gone, and when to try again.
#[derive(Debug)]
struct Outage {
    since: Option<Instant>,
    backoff: Backoff,
    /// A message was confirmed since the last loss.
    has_recovered: bool,
}

#[derive(Debug)]
pub(super) struct ReplayState {
    policy: Policy,
    phase: Phase,
    progress: Progress,
    /// Dead letters still to take, oldest first.
    remaining: VecDeque<FailedAt>,
    /// Dead letters that were asked for in the last [`Action::TakeBatch`].
    requested: Vec<FailedAt>,
    batch: Option<HeldBatch>,
    /// The size of the next batch: as many as can be sent before it goes back. What goes back is behind the others then.
    batch_size: usize,
    /// The message whose confirm is awaited.
    publishing: Option<Uuid>,
    /// Outcomes that had arrived were read since the last message was sent.
    buffer_read: bool,
    in_flight: InFlight,
    /// Fingerprints of what was sent and of what failed again.
    fingerprints: HashSet<String>,
    /// One message did not fail again, so the others need not wait.
    canary_passed: bool,
    deadline: Deadline,
    outage: Outage,
}

impl ReplayState {
    /// A new replay, and the first thing to do.
    pub(super) fn start(policy: Policy, now: Instant) -> (Self, Action) {
        let state = Self {
            policy,
            phase: Phase::Connecting,
            progress: Progress::default(),
            remaining: VecDeque::new(),
            requested: Vec::new(),
            batch: None,
            batch_size: BATCH,
            publishing: None,
            buffer_read: false,
            in_flight: InFlight::default(),
            fingerprints: HashSet::new(),
            canary_passed: false,
            deadline: Deadline::new(policy.outcome_timeout, now),
            outage: Outage { since: None, backoff: Backoff::reconnect(), has_recovered: false },
        };
        (state, Action::Connect { pause: Duration::ZERO })
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether this replay published a message with this id.
    pub(super) fn is_own(&self, replay: Uuid) -> bool {
        self.in_flight.is_own(replay)
    }

    /// Whether the outcome of this message is still open.
    pub(super) fn is_open(&self, replay: Uuid) -> bool {
        self.in_flight.is_open(replay)
    }

    pub(super) fn on(&mut self, event: Event, now: Instant) -> Action {
        let action = self.decide(event, now);
        self.progress.in_flight = self.in_flight.awaited();
        self.progress.missed = self.in_flight.missed();
        action
    }

    fn decide(&mut self, event: Event, now: Instant) -> Action {
        match event {
            Event::Connected => return self.connected(now),
            Event::EditsCompleted => return self.scan(Duration::ZERO),
            Event::Scanned { failed_at, guards, failed_again } => {
                if self.progress.sent == 0 {
                    self.progress.guards = guards;
                }
                if let Some(again) = self.scanned(failed_at, failed_again, now) {
                    return again;
                }
            }
            Event::BatchTaken { chosen, replaced, failed_at } => {
                self.batch_taken(chosen, replaced, failed_at, now);
            }
            Event::BatchReturned => {
                self.batch = None;
                self.buffer_read = false;
            }
            Event::Confirmed { fingerprint } => return self.confirmed(fingerprint, now),
            Event::Deleted => self.buffer_read = false,
            Event::Outcome(outcome) => self.outcome(outcome, now),
            Event::BufferRead => self.buffer_read = true,
            Event::Polled(depth) => {
                if depth.is_some() {
                    self.outage.since = None;
                }
                self.progress.work = depth;
            }
            Event::TimedOut => match &self.phase {
                Phase::Finishing { end: End::Done, .. } => return self.finish(End::TimedOut),
                Phase::Finishing { end, .. } => return self.finish(end.clone()),
                Phase::Sending => self.stop_sending(End::TimedOut),
                Phase::Connecting | Phase::Scanning { .. } => {}
            },
            Event::StopRequested => {
                let end = self.failure().unwrap_or(End::Stopped);
                return self.finish(end);
            }
            Event::ConnectionLost { error, buffered } => return self.connection_lost(error, buffered, now),
            Event::Failed(error) => {
                return match self.failure() {
                    Some(end) => self.finish(end),
                    None => Action::Fail(error),
                };
            }
        }
        self.next(now)
    }

    /// Why nothing more is sent, unless everything was.
    fn failure(&self) -> Option<End> {
        match &self.phase {
            Phase::Finishing { end, .. } if *end != End::Done => Some(end.clone()),
            Phase::Finishing { .. } | Phase::Connecting | Phase::Scanning { .. } | Phase::Sending => None,
        }
    }

    fn next(&mut self, now: Instant) -> Action {
        match &self.phase {
            Phase::Connecting => Action::Connect { pause: Duration::ZERO },
            Phase::Scanning { .. } => self.scan(Duration::ZERO),
            Phase::Sending => self.send(now),
            Phase::Finishing { .. } => self.await_last(now),
        }
    }

    fn connected(&mut self, now: Instant) -> Action {
        self.in_flight.reconnected(now);
        if !self.in_flight.is_empty() {
            self.deadline.extend(now);
        }
        self.phase = Phase::Scanning { scans: 0, failed_again: Vec::new() };
        self.progress.stage = Stage::Scanning;
        Action::CompleteEdits
    }

    fn scan(&self, pause: Duration) -> Action {
        let limit = self.policy.limit.map_or(usize::MAX, |limit| limit.saturating_sub(self.progress.sent));
        Action::Scan { pause, limit }
    }

    fn scanned(&mut self, failed_at: Vec<FailedAt>, found: Vec<ReplayEvent>, now: Instant) -> Option<Action> {
        let Phase::Scanning { scans, failed_again } = &mut self.phase else { return None };
        *scans += 1;
        failed_again.extend(found);
        // Known from before the connection was lost. A queue without a leader looks empty for a moment, and RabbitMQ
        // returns a batch only when it has noticed that the connection is gone.
        let expected = self.progress.matched.saturating_sub(self.progress.sent);
        if failed_at.len() < expected && *scans < SCANS {
            return Some(self.scan(RESCAN_PAUSE));
        }
        let failed_again = std::mem::take(failed_again);
        self.progress.matched = self.progress.sent + failed_at.len();
        self.remaining = failed_at.into();
        self.phase = Phase::Sending;
        self.buffer_read = false;
        for outcome in failed_again {
            self.outcome(outcome, now);
        }
        None
    }

    fn batch_taken(&mut self, chosen: usize, replaced: usize, failed_at: VecDeque<FailedAt>, now: Instant) {
        let requested = std::mem::take(&mut self.requested);
        // Without any of them, another operator was faster. Otherwise the batch was full before the last one.
        let gone = replaced + if chosen == 0 { requested.len() } else { 0 };
        self.progress.matched = self.progress.matched.saturating_sub(gone);
        if chosen > 0 {
            requested.into_iter().skip(chosen).rev().for_each(|one| self.remaining.push_front(one));
        }
        self.progress.stage = if self.needs_canary() { Stage::Canary } else { Stage::Sending };
        self.batch = Some(HeldBatch { size: failed_at.len(), failed_at, until: now + BATCH_HOLD });
        self.buffer_read = false;
    }

    fn confirmed(&mut self, fingerprint: String, now: Instant) -> Action {
        self.progress.sent += 1;
        self.outage.has_recovered = true;
        self.fingerprints.insert(fingerprint);
        if let Some(replay) = self.publishing.take() {
            self.in_flight.confirm(replay);
        }
        if self.policy.outcome_timeout.is_some() {
            self.deadline.extend(now);
        }
        Action::Delete
    }

    /// Whether the rest waits for the first message.
    fn needs_canary(&self) -> bool {
        self.policy.outcome_timeout.is_some() && !self.canary_passed
    }

    fn has_room(&self) -> bool {
        let most = if self.needs_canary() { 1 } else { self.policy.max_in_flight };
        self.policy.outcome_timeout.is_none() || self.in_flight.awaited() < most
    }

    fn send(&mut self, now: Instant) -> Action {
        let wait = Action::Wait { until: self.deadline.at };
        let has_room = self.has_room();
        if let Some(batch) = &mut self.batch {
            if batch.failed_at.is_empty() {
                self.batch_size = self.batch_size.saturating_mul(2).min(BATCH);
                return Action::ReturnBatch;
            }
            if !self.buffer_read {
                return Action::ReadBuffered;
            }
            if now >= batch.until {
                let unsent = std::mem::take(&mut batch.failed_at);
                self.batch_size = batch.size.saturating_sub(unsent.len()).max(1);
                unsent.into_iter().rev().for_each(|one| self.remaining.push_front(one));
                return Action::ReturnBatch;
            }
            if !has_room {
                return wait;
            }
            batch.failed_at.pop_front();
            let replay = Uuid::now_v7();
            self.in_flight.publish(replay, self.policy.outcome_timeout.is_some());
            self.publishing = Some(replay);
            return Action::Publish { replay };
        }
        let canary_in_flight = self.needs_canary() && self.in_flight.awaited() > 0;
        if self.remaining.is_empty() && !canary_in_flight {
            self.stop_sending(End::Done);
            return self.await_last(now);
        }
        if !self.buffer_read {
            return Action::ReadBuffered;
        }
        if !has_room {
            return wait;
        }
        let exclusive = self.needs_canary();
        let size = self.remaining.len().min(if exclusive { 1 } else { self.batch_size });
        self.requested = self.remaining.drain(..size).collect();
        Action::TakeBatch { failed_at: self.requested.clone(), exclusive }
    }

    fn stop_sending(&mut self, end: End) {
        match &mut self.phase {
            Phase::Finishing { end: current, .. } if *current == End::Done => *current = end,
            // The first failure counts.
            Phase::Finishing { .. } => {}
            Phase::Connecting | Phase::Scanning { .. } | Phase::Sending => {
                if end == End::Done {
                    self.outage.since = None;
                }
                self.progress.stage = Stage::Finishing;
                self.phase = Phase::Finishing { end, until: None };
            }
        }
    }

    fn await_last(&mut self, now: Instant) -> Action {
        if self.batch.is_some() {
            return Action::ReturnBatch;
        }
        let (awaited, missed) = (self.in_flight.awaited(), self.in_flight.missed());
        let Phase::Finishing { end, until } = &mut self.phase else { return Action::ReadBuffered };
        if awaited + missed == 0 {
            let end = end.clone();
            return self.finish(end);
        }
        // Missed messages were in the work queue before one that has finished: their outcomes are overdue.
        let is_overdue = awaited == 0 && self.in_flight.caught_up;
        *until = (is_overdue || *end != End::Done).then(|| until.unwrap_or(now + LAST_OUTCOMES));
        Action::Wait { until: until.map_or(self.deadline.at, |until| until.min(self.deadline.at)) }
    }

    fn finish(&mut self, end: End) -> Action {
        self.progress.stage = Stage::Finished(end.clone());
        Action::Finish(end)
    }

    fn connection_lost(&mut self, error: BrokerError, buffered: Vec<ReplayEvent>, now: Instant) -> Action {
        (self.batch, self.publishing) = (None, None);
        for outcome in buffered {
            self.outcome(outcome, now);
        }
        // A new connection would begin to send again.
        if let Some(end) = self.failure() {
            return self.finish(end);
        }
        if std::mem::take(&mut self.outage.has_recovered) {
            (self.outage.since, self.outage.backoff) = (None, Backoff::reconnect());
        }
        let since = *self.outage.since.get_or_insert(now);
        if !self.in_flight.has_published() || now.duration_since(since) > RECONNECT_TIMEOUT {
            return Action::Fail(error);
        }
        self.phase = Phase::Connecting;
        self.progress.stage = Stage::Reconnecting;
        Action::Connect { pause: self.outage.backoff.next_delay().unwrap_or_default() }
    }

    fn outcome(&mut self, outcome: ReplayEvent, now: Instant) {
        let ReplayEvent { replay, outcome, dead_letter, comes_again_s } = outcome;
        if !self.in_flight.is_open(replay) {
            return;
        }
        if let Some(delay) = comes_again_s {
            let due = now + Duration::from_secs(delay);
            self.deadline.extend(due);
            self.in_flight.delay(replay, due);
            self.progress.delayed += 1;
            return;
        }
        self.deadline.extend(now);
        self.in_flight.finish(replay);
        *self.progress.outcomes.entry(outcome).or_default() += 1;
        match dead_letter.and_then(|again| self.failed_again(again)) {
            Some(end) => self.stop_sending(end),
            None => self.canary_passed = true,
        }
    }

    /// Why this failure ends the replay, if it does.
    fn failed_again(&mut self, again: DeadLetterSummary) -> Option<End> {
        let is_known = !self.fingerprints.insert(again.fingerprint.clone());
        *self.progress.failures.entry(again.fingerprint.clone()).or_default() += 1;
        self.progress.last_failure = Some(again);
        match (self.policy.keep_going, self.canary_passed) {
            (true, _) => None,
            (false, false) => Some(End::CanaryFailed),
            (false, true) => is_known.then_some(End::SameFailure),
        }
    }
}
