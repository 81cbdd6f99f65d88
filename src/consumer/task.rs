//! Messages on their way from the desk to being settled.
//!
//! The order within is what nothing is lost by: the successor is published and confirmed, then the delivery is
//! acked.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicRejectOptions};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::VERSION;
use crate::amqp::BrokerError;
use crate::amqp::envelope::{Envelope, TraceParent, id_from_content};
use crate::amqp::publisher::Publisher;
use crate::close::Priority;
use crate::consumer::connections::Publishers;
use crate::consumer::outcome_events::OutcomeEvent;
use crate::consumer::scheduler::Completion;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::{Session, span};
use crate::domain::decision::Decision;
use crate::domain::mapping::Key;
use crate::outcome::{DeadLetter, DelayCause, Outcome, PauseCause, Reason, Stage};
use crate::retry::Backoff;
use crate::sync::{Job, Prepared, ReceivedAt, RunContext, Worker};
use crate::telemetry::panic_hook;

/// A confirm takes milliseconds. A message whose successor has none after this long counts as held.
const PROMPT: Duration = Duration::from_secs(2);

/// A delivery on its way through the session.
pub(crate) struct Incoming {
    pub(crate) delivery: Delivery,
    pub(crate) envelope: Envelope,
    pub(crate) prepared: Prepared,
    /// Worked on with others it failed: the next time it is by itself.
    pub(crate) alone: bool,
    /// Its place in a trace, from the start of the work on it.
    span: Option<Span>,
}

/// How work ended.
pub(crate) enum Ended {
    /// Each message by itself.
    Each(Vec<(JobId, Done)>),
    /// Together they did not succeed: they have to be worked on one by one.
    Apart(Vec<(JobId, Incoming)>),
}

/// How one delivery ended.
pub(crate) enum Done {
    Settled {
        by_close: bool,
        fate: Completion,
        /// The id of the dead letter it became, if it became one.
        dead_letter: Option<Uuid>,
    },
    /// Dropped by the end of the session, or acked too late: it comes again.
    HandedBack,
    Paused(PauseCause),
    Failed(BrokerError),
}

impl Incoming {
    /// Work on it begins, or goes on.
    fn begin(&mut self, session: &Session) {
        if self.span.is_none() {
            self.span = Some(span::begin(self, session));
        }
    }

    fn span(&self) -> Span {
        self.span.clone().unwrap_or_else(Span::none)
    }

    /// What log lines about it have in common.
    fn log_span(&self, session: &Session) -> Span {
        let Envelope { attempts, trace, .. } = &self.envelope;
        tracing::info_span!(
            "message",
            destination = session.destination.as_deref(),
            message_id = self.envelope.message_id(),
            correlation_id = self.envelope.correlation_id(),
            trace_id = span::trace_id(&self.span(), trace.as_ref()),
            parent_span_id = trace.as_ref().map(TraceParent::span_id),
            attempt = attempts + 1,
        )
    }

    /// Receives a delivery: decodes and maps it.
    pub(crate) fn of(delivery: Delivery, session: &Session) -> Self {
        let envelope = Envelope::of(
            delivery.properties.clone(),
            delivery.exchange.as_str(),
            delivery.routing_key.as_str(),
            Timestamp::now(),
        );
        let arrival = ReceivedAt { published: envelope.sent, received: envelope.first_seen };
        let prepare = AssertUnwindSafe(|| session.worker.prepare(&delivery.data, arrival));
        let prepared = std::panic::catch_unwind(prepare)
            .unwrap_or_else(|_| Prepared::Settled(Outcome::Dead(defect(Stage::Map))));
        Self { delivery, envelope, prepared, alone: false, span: None }
    }

    /// It has to follow an earlier message into the delay queue of this level.
    pub(crate) fn behind(self, level: usize) -> Self {
        let yields = Outcome::Delayed { level, cause: DelayCause::BehindEarlier };
        Self { prepared: Prepared::Settled(yields), ..self }
    }

    /// Messages that share one of these run one after the other. None if it needs no Close.
    pub(crate) fn keys(&self) -> Vec<Key> {
        match &self.prepared {
            Prepared::Job(job) => job.keys(),
            Prepared::Settled(_) => Vec::new(),
        }
    }

    /// What becomes of it, if that is known already.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        match &self.prepared {
            Prepared::Job(_) => None,
            Prepared::Settled(outcome) => Some(outcome),
        }
    }

    fn job(&self) -> Option<&Job> {
        match &self.prepared {
            Prepared::Job(job) => Some(job),
            Prepared::Settled(_) => None,
        }
    }

    /// When it was published, if that is known and it comes for the first time. Later it has waited for other things
    /// than its turn in the queue.
    fn sent(&self) -> Option<Timestamp> {
        let came_before = self.delivery.redelivered || self.envelope.priority() != Priority::Live;
        let begins = self.job().is_some() && !self.alone;
        self.envelope.sent.filter(|_| begins && !came_before)
    }

    /// Whether it may be worked on with `first`, right behind which it comes.
    pub(crate) fn goes_along(&self, first: &Self, worker: &Worker) -> bool {
        let jobs = first.job().zip(self.job()).filter(|_| !first.alone && !self.alone);
        jobs.is_some_and(|(first, next)| worker.can_merge(first, next))
    }
}

impl Session {
    /// Works on messages, and settles each.
    pub(crate) async fn work(
        self,
        mut run: Vec<(JobId, Incoming)>,
        out: Publishers,
        turn: RunContext,
        stop: CancellationToken,
    ) -> Ended {
        let started = Instant::now();
        for (_, incoming) in &mut run {
            incoming.begin(&self);
        }
        let Some(((_, first), others)) = run.split_first() else { return Ended::Each(Vec::new()) };
        let (span, log_span) = (first.span(), first.log_span(&self));
        for (_, other) in others {
            // The calls for it are told of there.
            other.span().follows_from(&span);
        }
        run.iter().filter_map(|(_, each)| each.sent()).for_each(|sent| self.metrics.queue_waited(sent));
        let work = async {
            match &first.prepared {
                Prepared::Settled(outcome) => Some(vec![(outcome.clone(), None)]),
                Prepared::Job(job) if run.len() == 1 => Some(vec![self.guarded(job, turn).await]),
                Prepared::Job(_) => self.together(&run, turn).await,
            }
        };
        let outcomes = match stop.run_until_cancelled(work.instrument(span).instrument(log_span)).await {
            Some(Some(outcomes)) => outcomes,
            Some(None) => {
                let alone = |(ticket, incoming)| (ticket, Incoming { alone: true, ..incoming });
                return Ended::Apart(run.into_iter().map(alone).collect());
            }
            None => {
                let back = |(ticket, incoming): (JobId, Incoming)| {
                    span::hand_back(&incoming.span());
                    (ticket, Done::HandedBack)
                };
                return Ended::Each(run.into_iter().map(back).collect());
            }
        };
        let mut ended = Vec::with_capacity(run.len());
        for ((ticket, incoming), (outcome, decision)) in run.into_iter().zip(outcomes) {
            let done = self.end(&incoming, &outcome, decision.as_ref(), started, &out, &stop).await;
            ended.push((ticket, done));
        }
        Ended::Each(ended)
    }

    /// Settles a message whose outcome is known without Close.
    pub(crate) async fn pass(
        self,
        mut incoming: Incoming,
        outcome: Outcome,
        out: Publishers,
        stop: CancellationToken,
    ) -> Done {
        incoming.begin(&self);
        self.end(&incoming, &outcome, None, Instant::now(), &out, &stop).await
    }

    /// Tells what became of a message, and settles it.
    async fn end(
        &self,
        incoming: &Incoming,
        outcome: &Outcome,
        decision: Option<&Decision>,
        started: Instant,
        out: &Publishers,
        stop: &CancellationToken,
    ) -> Done {
        let settle = async {
            let told = || self.log(outcome, decision, started.elapsed());
            let done = self.settle(incoming, outcome, told, &out.successors, stop).await;
            if let Done::Settled { dead_letter, .. } = done {
                self.metrics.settled(outcome, started.elapsed());
                if incoming.envelope.replay.is_some() {
                    self.metrics.replayed(outcome);
                }
                let news = OutcomeEvent { envelope: &incoming.envelope, outcome, decision, dead_letter };
                let _ = stop.run_until_cancelled(self.spread(&news, out)).await;
            }
            span::conclude(&incoming.span(), outcome, &done);
            done
        };
        settle.instrument(incoming.span()).instrument(incoming.log_span(self)).await
    }

    /// Does the work on one message; a panic costs only this one.
    async fn guarded(&self, job: &Job, turn: RunContext) -> (Outcome, Option<Decision>) {
        let work = AssertUnwindSafe(self.worker.run(job, turn));
        let died = |_| (Outcome::Dead(defect(Stage::Write)), Decision::default());
        let (outcome, decision) = work.catch_unwind().await.unwrap_or_else(died);
        (outcome, Some(decision))
    }

    /// Does the work on several. `None` when anything stood in the way, a panic too.
    async fn together(
        &self,
        run: &[(JobId, Incoming)],
        turn: RunContext,
    ) -> Option<Vec<(Outcome, Option<Decision>)>> {
        let jobs: Vec<&Job> = run.iter().filter_map(|(_, incoming)| incoming.job()).collect();
        let work = AssertUnwindSafe(self.worker.run_merged(&jobs, turn));
        let done = work.catch_unwind().await.ok()??;
        Some(done.into_iter().map(|(outcome, decision)| (outcome, Some(decision))).collect())
    }

    /// One line per message, when all is done but the ack.
    fn log(&self, outcome: &Outcome, decision: Option<&Decision>, took: Duration) {
        let decision = decision.map(Decision::summary);
        let delay = |level: usize| self.settings.delays.get(level).map(|delay| delay.name.as_str());
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        match outcome {
            Outcome::Synced(effect) => tracing::info!(outcome = effect.label(), decision, took_ms, "synced"),
            Outcome::Skipped(skip) => tracing::info!(reason = skip.label(), decision, took_ms, "skipped"),
            Outcome::Delayed { level, cause: DelayCause::BehindEarlier } => {
                tracing::debug!(
                    delay = delay(*level),
                    "waits for an earlier message of the same person or company in a delay queue"
                );
            }
            Outcome::Delayed { level, cause } => {
                let charged = cause.uses_attempt();
                tracing::warn!(delay = delay(*level), charged, %cause, took_ms, "failed for now, waiting in a delay queue");
            }
            Outcome::Dead(dead) => tracing::warn!(
                reason = dead.reason.label(),
                stage = dead.stage.label(),
                error = dead.error,
                decision = dead.decision,
                took_ms,
                "dead-lettered"
            ),
            Outcome::Paused(cause) => tracing::debug!(cause = cause.label(), took_ms, "handed back"),
        }
    }

    /// Publishes the successor, if there is one, lets it be told, then acks.
    async fn settle(
        &self,
        Incoming { delivery, envelope, .. }: &Incoming,
        outcome: &Outcome,
        told: impl Fn(),
        publisher: &Publisher,
        stop: &CancellationToken,
    ) -> Done {
        let settings = &self.settings;
        let (mut fate, mut dead_letter) = (Completion::Done, None);
        let succeeded = match outcome {
            Outcome::Synced(_) | Outcome::Skipped(_) => Some(Ok(())),
            Outcome::Delayed { level, cause } => {
                // The configuration asks for one delay at least.
                let Some(delay) = settings.delays.get(*level) else {
                    return Done::Failed(BrokerError::Missing(format!("there is no delay queue {level}")));
                };
                let detour = envelope.delay_id.unwrap_or_else(Uuid::now_v7);
                let attempts = envelope.attempts + u32::from(cause.uses_attempt());
                let properties = envelope.for_delay(attempts, detour);
                let exchange = settings.retry_exchange();
                let sent =
                    self.publish(publisher, &exchange, &delay.name, &delivery.data, properties, stop).await;
                fate = Completion::Delayed { id: detour, due: Instant::now() + delay.duration };
                sent
            }
            Outcome::Dead(dead) => {
                let id = Uuid::now_v7();
                let properties = envelope.for_dead_letter(dead, id, Timestamp::now());
                // A fanout needs no key; the producer's is in a header, where any length fits.
                let sent = self
                    .publish(publisher, &settings.dead_letter_queue(), "", &delivery.data, properties, stop)
                    .await;
                if let Some(Err(BrokerError::TooLarge(_))) = &sent {
                    told();
                    return reject(delivery, envelope, outcome, stop).await;
                }
                dead_letter = Some(id);
                sent
            }
            Outcome::Paused(cause) => {
                told();
                return Done::Paused(*cause);
            }
        };
        match succeeded {
            Some(Ok(())) => told(),
            Some(Err(error)) => return Done::Failed(error),
            None => return Done::HandedBack,
        }
        // Of a connection that says nothing any more, an ack may never return.
        let acked = stop.run_until_cancelled(delivery.ack(BasicAckOptions::default())).await;
        let Some(acked) = acked else { return Done::HandedBack };
        match acked {
            Ok(true) => Done::Settled { by_close: outcome.proves_close(), fate, dead_letter },
            // The channel of the delivery is gone; the broker delivers it again.
            Ok(false) => {
                self.metrics.stale_ack();
                Done::HandedBack
            }
            Err(error) => Done::Failed(error.into()),
        }
    }

    /// Publishes a successor. The original is held for as long as it takes: during an alarm the broker takes
    /// nothing, a full queue refuses, and an exchange without its binding leads nowhere. `None` when the session
    /// ends meanwhile.
    async fn publish(
        &self,
        publisher: &Publisher,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
        stop: &CancellationToken,
    ) -> Option<Result<(), BrokerError>> {
        let mut pauses = Backoff::reconnect();
        let publishing = async {
            let mut held = None;
            let mut note = |error: &BrokerError| {
                held.get_or_insert_with(|| {
                    tracing::warn!(exchange, %error, "held until RabbitMQ takes the successor");
                    self.metrics.hold_successor()
                });
            };
            loop {
                let sent = async {
                    publisher.send(exchange, key, body, properties.clone()).await?.confirmed().await
                };
                tokio::pin!(sent);
                let in_time = tokio::time::timeout(PROMPT, &mut sent).await;
                if in_time.is_err() {
                    note(&BrokerError::Unconfirmed("no answer so far, is an alarm raised?"));
                }
                let settled = if let Ok(settled) = in_time { settled } else { sent.await };
                match settled {
                    Err(error @ (BrokerError::Unconfirmed(_) | BrokerError::Unroutable { .. })) => {
                        note(&error);
                        tokio::time::sleep(pauses.next_delay().unwrap_or_default()).await;
                    }
                    settled => return settled,
                }
            }
        };
        stop.run_until_cancelled(publishing).await
    }
}

/// Lets the broker dead-letter a message that it would not take from us again (its limit was lowered, or is lower
/// since 4.0): the queue's own dead-letter exchange takes it, without the headers that tell why. Otherwise it would
/// come back for ever, and end every session. This one ends when something is published next, whose channel is gone.
async fn reject(
    delivery: &Delivery,
    envelope: &Envelope,
    outcome: &Outcome,
    stop: &CancellationToken,
) -> Done {
    tracing::warn!(
        bytes = delivery.data.len(),
        "too large to be published again: RabbitMQ dead-letters it without headers"
    );
    let options = BasicRejectOptions { requeue: false };
    match stop.run_until_cancelled(delivery.reject(options)).await {
        Some(Ok(true)) => {
            let dead_letter = Some(id_from_content(envelope.own_id(), &delivery.data));
            Done::Settled { by_close: outcome.proves_close(), fate: Completion::Done, dead_letter }
        }
        Some(Ok(false)) | None => Done::HandedBack,
        Some(Err(error)) => Done::Failed(error.into()),
    }
}

/// What a caught panic makes of its message.
fn defect(stage: Stage) -> DeadLetter {
    let error = format!("close-sync {VERSION} panicked at {}", panic_hook::last_location());
    DeadLetter { reason: Reason::Internal, stage, error, field: None, decision: None, said: None }
}
