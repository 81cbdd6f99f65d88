//! Replay: sends dead letters through the work queue again and checks what becomes of them.
//!
//! **Canary first.** The oldest dead letter is sent alone. The worker reports its outcome
//! ([`crate::consumer::outcome_events`]). Only if it does not fail again do the others follow, with a limited number in
//! flight: a live message waits behind a few replayed ones, not behind thousands. Close's rate limit serves live messages
//! first in any case ([`crate::close::Priority`]). The replay stops at the first failure of a kind that was seen before:
//! the cause is not fixed.
//!
//! **In batches**, oldest failure first. What cannot be sent soon goes back to the queue and is taken again later.
//! Otherwise RabbitMQ would take it back (`consumer_timeout`, 30 minutes), and other operators could not see it. If the
//! process is killed, the batch goes back to the queue and sent messages stay in the work queue, so running the replay
//! again continues it.
//!
//! **A lost connection** is opened again. Outcomes that were published meanwhile are missed. The messages in question no
//! longer count against the limit, so live messages may wait behind a few more. Those that failed again are found among
//! the dead letters, because a dead letter is published before its outcome. The others are awaited at the end, and the
//! result counts those that never reported. A message that was not confirmed is sent again and may arrive twice.
//!
//! **One replay at a time**: a second one waits. A message that fails again becomes a new dead letter with the id of this
//! replay, and is left for the next replay. The worker's staleness check keeps old values from overwriting newer ones.
//!
//! `state` decides, and has the unit tests. This file does the IO.

mod in_flight;
mod state;
#[cfg(test)]
mod tests;

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicConsumeOptions, QueueBindOptions};
use lapin::types::FieldTable;
use lapin::{Connection, Consumer};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::publisher::{Outgoing, Publisher};
use crate::amqp::topology::{self, NOW, REPLAYED};
use crate::amqp::{BrokerError, Settings, disconnect, envelope, with_timeout};
use crate::consumer::outcome_events::{DeadLetterSummary, ReplayEvent};
use crate::dead_letters::edit;
use crate::dead_letters::filter::Selection;
use crate::dead_letters::guard::{GuardCounts, Guards};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::{End, Progress, Stage};
use crate::dead_letters::replay::state::{Action, Event, FailedAt, Policy, ReplayState};
use crate::dead_letters::scan::{Batch, DeadLetterQueue, Disposition, HeldLetter, ScanStep, acquire_lock};
use crate::outcome::DEAD;

/// What to replay, and how.
#[derive(Clone, Debug)]
pub struct ReplayRequest {
    pub selection: Selection,
    /// Most messages in flight.
    pub max_in_flight: usize,
    /// Continue when messages fail again.
    pub keep_going: bool,
    /// How long to wait for an outcome. `None`: send everything and wait for nothing.
    pub outcome_timeout: Option<Duration>,
    /// To count what guards newer values. `None`: not counted.
    pub guards: Option<Guards>,
}

impl ReplayRequest {
    /// The default of `max_in_flight`.
    pub const MAX_IN_FLIGHT: u16 = 32;
    /// The default of `outcome_timeout`.
    pub const OUTCOME_TIMEOUT: Duration = Duration::from_mins(10);
}

impl From<Selection> for ReplayRequest {
    fn from(selection: Selection) -> Self {
        Self {
            selection,
            max_in_flight: Self::MAX_IN_FLIGHT.into(),
            keep_going: false,
            outcome_timeout: Some(Self::OUTCOME_TIMEOUT),
            guards: None,
        }
    }
}

/// Most bytes in one batch.
const BATCH_BYTES: usize = 32 << 20;
/// How often the work queue is checked while no outcome arrives.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// How long to wait for other operators and other replays.
const LOCK_TIMEOUT: Duration = Duration::from_hours(24);

/// Replays until everything is done or `stop`. Publishes its progress, and returns the last one and how it ended.
///
/// # Errors
/// When the broker is gone for five minutes or does not take a message. Every message that was not confirmed is still,
/// or again, in the dead-letter queue.
pub async fn replay(
    settings: &Settings,
    request: ReplayRequest,
    progress: watch::Sender<Progress>,
    stop: &CancellationToken,
) -> Result<(Progress, End), BrokerError> {
    let policy = Policy {
        limit: request.selection.limit,
        max_in_flight: request.max_in_flight,
        keep_going: request.keep_going,
        outcome_timeout: request.outcome_timeout,
    };
    let (mut state, mut action) = ReplayState::start(policy, Instant::now());
    let mut shell = Shell { settings, request, progress, stop, session: None };
    loop {
        shell.publish(state.progress());
        if let Action::Finish(end) = action {
            shell.disconnect().await;
            return Ok((state.progress().clone(), end));
        }
        if let Action::Fail(error) = action {
            shell.disconnect().await;
            return Err(error);
        }
        let event = shell.perform(action, &state).await.unwrap_or_else(|error| shell.failure(error));
        action = state.on(event, Instant::now());
    }
}

/// Does what the state decides.
struct Shell<'a> {
    settings: &'a Settings,
    request: ReplayRequest,
    progress: watch::Sender<Progress>,
    stop: &'a CancellationToken,
    session: Option<Session<'a>>,
}

/// Everything that ends with the connection.
struct Session<'a> {
    queue: DeadLetterQueue<'a>,
    /// A connection of its own: an alarm of the broker must not hold up returning a batch.
    publishing: Connection,
    publisher: Publisher,
    /// The outcomes of sent messages, if the replay waits for them.
    outcomes: Option<Consumer>,
    batch: Option<Batch>,
    /// Its message is confirmed, so it may be deleted.
    confirmed: Option<HeldLetter>,
}

impl<'a> Shell<'a> {
    fn publish(&self, now: &Progress) {
        self.progress.send_if_modified(|progress| {
            let is_new = progress != now;
            if is_new {
                progress.clone_from(now);
            }
            is_new
        });
    }

    /// Reports that others have to finish first.
    fn observer(&self) -> impl FnMut(ScanStep) + Send + use<> {
        let progress = self.progress.clone();
        move |step| {
            if step == ScanStep::Waiting {
                progress.send_modify(|progress| progress.stage = Stage::Waiting);
            }
        }
    }

    fn failure(&mut self, error: BrokerError) -> Event {
        if matches!(error, BrokerError::Lost(_) | BrokerError::Unreachable(_)) {
            Event::ConnectionLost { error, buffered: self.buffered() }
        } else {
            Event::Failed(error)
        }
    }

    /// Outcomes that arrived before the connection was lost.
    fn buffered(&mut self) -> Vec<ReplayEvent> {
        let Some(consumer) = self.session.as_mut().and_then(|session| session.outcomes.as_mut()) else {
            return Vec::new();
        };
        let mut buffered = Vec::new();
        while let Some(Some(Ok(delivery))) = consumer.next().now_or_never() {
            buffered.extend(serde_json::from_slice::<ReplayEvent>(&delivery.data));
        }
        buffered
    }

    async fn disconnect(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        if let Some(batch) = session.batch.take() {
            batch.close().await;
        }
        session.queue.leave().await;
        disconnect(&session.publishing).await;
    }

    async fn perform(&mut self, action: Action, state: &ReplayState) -> Result<Event, BrokerError> {
        if let Action::Connect { pause } = action {
            self.disconnect().await;
            let connect = async {
                sleep(pause).await;
                self.connect().await
            };
            let Some(session) = self.stop.run_until_cancelled(connect).await else {
                return Ok(Event::StopRequested);
            };
            self.session = Some(session?);
            return Ok(Event::Connected);
        }
        let mut observer = self.observer();
        let Some(session) = &mut self.session else {
            return Err(BrokerError::Lost("the replay is not connected".into()));
        };
        let matches = |letter: &DeadLetter| {
            // What failed again during this replay is left for the next one.
            let is_own = letter.replay_id().is_some_and(|replay| state.is_own(replay));
            !is_own && self.request.selection.filter.matches(letter)
        };
        // A scan that is cut short returns its batch with the connection.
        let until_stopped = self.stop;
        let done = match action {
            Action::CompleteEdits => {
                let edits = edit::complete(&session.queue, &mut observer);
                let done = until_stopped.run_until_cancelled(edits).await.transpose()?;
                done.map(|()| Event::EditsCompleted)
            }
            Action::Scan { pause, limit } => {
                let mut failed_again = Vec::new();
                let scan = async {
                    sleep(pause).await;
                    let guards = self.request.guards;
                    let pick = |letter: &DeadLetter| {
                        failed_again
                            .extend(outcome_of(letter).filter(|outcome| state.is_open(outcome.replay)));
                        matches(letter).then(|| guards.and_then(|guards| guards.of(letter)))
                    };
                    session.queue.oldest(limit, pick, &mut observer).await
                };
                let picked = until_stopped.run_until_cancelled(scan).await.transpose()?;
                picked.map(|picked| {
                    let mut guards = GuardCounts::new();
                    for guard in picked.iter().filter_map(|(_, guard)| *guard) {
                        *guards.entry(guard).or_default() += 1;
                    }
                    let failed_at = picked.into_iter().map(|(failed_at, _)| failed_at).collect();
                    Event::Scanned { failed_at, guards, failed_again }
                })
            }
            Action::TakeBatch { failed_at, exclusive } => {
                let take = session.take_batch(&failed_at, exclusive, matches, &mut observer);
                until_stopped.run_until_cancelled(take).await.transpose()?
            }
            Action::Publish { replay } => Some(session.publish(self.settings, replay).await?),
            Action::Delete => {
                if let Some(letter) = session.confirmed.take() {
                    letter.delete().await?;
                }
                Some(Event::Deleted)
            }
            Action::ReturnBatch => {
                if let Some(batch) = session.batch.take() {
                    batch.close().await;
                }
                Some(Event::BatchReturned)
            }
            Action::ReadBuffered => match session.read_buffered()? {
                Some(outcome) => Some(Event::Outcome(outcome)),
                None => (!self.stop.is_cancelled()).then_some(Event::BufferRead),
            },
            Action::Wait { until } => Some(session.wait(self.settings, until, self.stop).await?),
            Action::Connect { .. } | Action::Finish(_) | Action::Fail(_) => None,
        };
        Ok(done.unwrap_or(Event::StopRequested))
    }

    async fn connect(&self) -> Result<Session<'a>, BrokerError> {
        let queue = DeadLetterQueue::connect(self.settings, "close-sync replay").await?;
        let queue = queue.with_lock_timeout(LOCK_TIMEOUT);
        let publishing = self.settings.connect("close-sync replay publish").await?;
        let publisher = Publisher::new(&publishing).await?;
        let outcomes = self.subscribe(&queue.connection).await?;
        let outcomes = self.request.outcome_timeout.is_some().then_some(outcomes);
        Ok(Session { queue, publishing, publisher, outcomes, batch: None, confirmed: None })
    }

    /// Receives outcomes. The queue for them is exclusive, so it is also the lock that admits one replay at a time.
    async fn subscribe(&self, connection: &Connection) -> Result<Consumer, BrokerError> {
        let name = self.settings.replay_queue();
        let busy = "another replay has been running for a day; stop it and try again";
        let channel = acquire_lock(connection, &name, LOCK_TIMEOUT, busy, &mut || {
            self.progress.send_modify(|progress| progress.stage = Stage::Waiting);
        })
        .await?;
        let (exchange, none) = (self.settings.retry_exchange(), FieldTable::default());
        let (queue, exchange) = (name.as_str(), exchange.as_str());
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.into(), exchange.into(), REPLAYED.into(), options, none).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        Ok(channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?)
    }
}

impl Session<'_> {
    async fn take_batch(
        &mut self,
        requested: &[FailedAt],
        exclusive: bool,
        matches: impl Fn(&DeadLetter) -> bool + Send + Sync,
        observer: &mut (impl FnMut(ScanStep) + Send),
    ) -> Result<Event, BrokerError> {
        let (mut chosen, mut bytes) = (0, 0);
        let mut replaced = edit::Replaced::default();
        let decide = |letter: &DeadLetter| {
            replaced.add(letter);
            let is_next = requested.last().is_some_and(|last| letter.failed_at <= *last);
            if chosen > 0 && bytes > BATCH_BYTES {
                return Disposition::Stop;
            }
            if !is_next || !matches(letter) {
                return Disposition::Return;
            }
            chosen += 1;
            bytes += letter.memory_size();
            Disposition::Keep
        };
        let batch = self.queue.take_at_most(requested.len(), decide, observer).await?;
        let batch = self.batch.insert(batch);
        // An edit that was interrupted since this replay began, if its copy was taken, too.
        let replaced = batch.delete_those(|letter| replaced.contains(letter)).await?;
        if !exclusive {
            batch.return_others().await?;
        }
        Ok(Event::BatchTaken { chosen, replaced, failed_at: batch.failed_at().collect() })
    }

    /// Publishes the oldest dead letter of the batch. What is not confirmed goes back with the rest.
    async fn publish(&mut self, settings: &Settings, replay: Uuid) -> Result<Event, BrokerError> {
        let Some(held) = self.batch.as_mut().and_then(Batch::next) else {
            return Err(BrokerError::Lost("the batch of dead letters went back to the queue".into()));
        };
        let properties = envelope::for_replay(&held.letter.properties, replay);
        let exchange = settings.retry_exchange();
        let message = Outgoing { exchange: &exchange, key: NOW, body: &held.letter.body, properties };
        match self.publisher.publish_with_timeout(message).await {
            Err(BrokerError::Rejected(detail)) => {
                return Err(BrokerError::Rejected(format!("{detail} (dead letter `{}`)", held.letter.id)));
            }
            published => published?,
        }
        let fingerprint = held.letter.fingerprint.clone();
        self.confirmed = Some(held);
        Ok(Event::Confirmed { fingerprint })
    }

    fn read_buffered(&mut self) -> Result<Option<ReplayEvent>, BrokerError> {
        let Some(consumer) = &mut self.outcomes else { return Ok(None) };
        while let Some(delivery) = consumer.next().now_or_never() {
            let delivery = delivery.ok_or(BrokerError::Cancelled)??;
            if let Ok(outcome) = serde_json::from_slice(&delivery.data) {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    async fn wait(
        &mut self,
        settings: &Settings,
        until: Instant,
        stop: &CancellationToken,
    ) -> Result<Event, BrokerError> {
        let Some(consumer) = &mut self.outcomes else { return Ok(Event::TimedOut) };
        let poll = Instant::now() + POLL_INTERVAL;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(Event::StopRequested),
                delivery = consumer.next() => {
                    let delivery = delivery.ok_or(BrokerError::Cancelled)??;
                    if let Ok(outcome) = serde_json::from_slice(&delivery.data) {
                        return Ok(Event::Outcome(outcome));
                    }
                }
                () = sleep_until(until) => return Ok(Event::TimedOut),
                () = sleep_until(poll) => {
                    // The user may lack the permission to look at the work queue.
                    let depth = with_timeout(topology::depth(&self.queue.connection, &settings.queue)).await;
                    return Ok(Event::Polled(depth.ok().flatten()));
                }
            }
        }
    }
}

/// The outcome that the worker reported when it published this dead letter.
fn outcome_of(letter: &DeadLetter) -> Option<ReplayEvent> {
    let again = DeadLetterSummary {
        id: letter.id.parse().ok()?,
        fingerprint: letter.fingerprint.clone(),
        error: letter.error.clone().unwrap_or_default(),
        close_said: None,
    };
    let (outcome, dead_letter) = (DEAD.to_owned(), Some(again));
    Some(ReplayEvent { replay: letter.replay_id()?, outcome, dead_letter, comes_again_s: None })
}
