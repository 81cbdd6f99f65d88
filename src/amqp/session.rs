//! One session: from connecting to the first thing that ends it.
//!
//! A delivery is received, prepared, put into its lanes and, when its turn has come, worked on in a
//! task of its own. The task also settles it: the successor (delay queue, dead-letter queue) is
//! published and confirmed first, then the delivery is acked. A crash between the two duplicates a
//! message, it never loses one; and because a message that changes nothing sends nothing, a
//! duplicate does no harm.
//!
//! **How a session ends.** Never by `basic.cancel`: under single active consumer that would start
//! the standby while we still hold messages (rabbitmq.md §0, 6). Reading stops, what runs is finished
//! or dropped, a moment passes so that the last acks arrive (rabbitmq.md §0, 5), and the channel is
//! closed: everything unacked goes back to the front of the queue in its order.
//!
//! When the connection is lost, work stops at once: the standby may already have the same messages.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{FutureExt, Stream, StreamExt, stream};
use jiff::Timestamp;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, Event};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::headers::Envelope;
use super::publisher::Publisher;
use super::{BrokerError, LAST_ACKS, Settings, close, topology};
use crate::breaker::JURY;
use crate::close::Priority;
use crate::domain::decision::Decision;
use crate::domain::mapping::Key;
use crate::drain::Drain;
use crate::lanes::{Lanes, Ticket};
use crate::metrics::Metrics;
use crate::outcome::{DeadLetter, Outcome, PauseCause, Reason, Stage};
use crate::panics;
use crate::retry::Pauses;
use crate::state::{State, Status};
use crate::worker::{Job, Prepared, Turn, Worker};

/// What a session works with.
#[derive(Clone)]
pub struct Session {
    /// The broker.
    pub settings: Arc<Settings>,
    /// Who does the work.
    pub worker: Worker,
    /// Where it is counted.
    pub metrics: Metrics,
    /// Where the state is shown.
    pub status: Status,
    /// Messages worked on at the same time.
    pub concurrency: usize,
    /// How long messages in hand may take to finish on shutdown.
    pub grace: Duration,
    /// Close could not be worked with before: begin with a few messages at a time, and with one more for each
    /// that succeeds.
    pub on_trial: Option<PauseCause>,
}

/// Where no message comes that could prove that Close works again, it is believed after this long without any.
const LONGEST_TRIAL: Duration = Duration::from_mins(1);

/// How long messages are received before some are drawn.
const TIME_TO_DRAW: Duration = Duration::from_millis(200);
/// How often the backlog is looked at.
const LOOKS_APART: Duration = Duration::from_secs(5);

/// What a session did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Deliveries settled.
    pub settled: u64,
    /// Those of them that Close had a part in: it can be worked with.
    pub by_close: u64,
    /// Nothing is known against Close any more.
    pub acquitted: bool,
    /// Deliveries received but not settled: they went back to the queue.
    pub handed_back: u64,
}

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// It was asked to.
    Stopped,
    /// Close cannot be worked with.
    Paused(PauseCause),
    /// The broker is gone, or does not want us.
    Lost(BrokerError),
}

/// A delivery on its way through the session.
struct Incoming {
    delivery: Delivery,
    envelope: Envelope,
    prepared: Prepared,
}

/// How a task ended.
enum Done {
    Settled {
        by_close: bool,
    },
    /// Dropped by the end of the session, or acked too late: it comes again.
    HandedBack,
    Paused(PauseCause),
    Failed(BrokerError),
}

impl Session {
    /// Runs until something ends it. `shutdown` asks for a graceful end.
    pub async fn run(&self, shutdown: &CancellationToken) -> (End, Report) {
        let link = match shutdown.run_until_cancelled(Link::open(&self.settings)).await {
            Some(Ok(link)) => link,
            Some(Err(error)) => return (End::Lost(error), Report::default()),
            None => return (End::Stopped, Report::default()),
        };
        self.metrics.connected(true);
        if let Some(cause) = self.unproven() {
            tracing::debug!(cause = cause.label(), "trying whether Close can be worked with");
        } else {
            self.acquit();
        }
        let ended = self.consume(link, shutdown).await;
        self.metrics.connected(false);
        if matches!(ended.0, End::Lost(_)) {
            self.metrics.connection_lost();
        }
        ended
    }

    async fn consume(&self, mut link: Link, shutdown: &CancellationToken) -> (End, Report) {
        // A predecessor may have worked until our first delivery: what it created can be missing from
        // search for this long after it. A standby may have waited for hours before.
        let mut trusted_from = None;
        let stop = CancellationToken::new();
        let mut lanes: Lanes<Key, Priority, Incoming> = Lanes::default();
        let mut tasks = JoinSet::new();
        let mut report = Report::default();
        let mut received = 0;
        let mut on_trial = self.unproven().is_some();
        report.acquitted = !on_trial;
        let nothing_in_hand = tokio::time::sleep(LONGEST_TRIAL);
        tokio::pin!(nothing_in_hand);
        // After a pause the messages that are tried are drawn from those in hand: the first in line may be
        // those that always fail, and would be the first every time.
        let mut drawing = on_trial;
        let in_hand = tokio::time::sleep(TIME_TO_DRAW);
        tokio::pin!(in_hand);
        let mut watch = Box::pin(watch(&link.consuming, &self.settings.queue, &self.metrics));

        let end = loop {
            let restarted = usize::try_from(report.by_close).unwrap_or(usize::MAX).saturating_add(JURY);
            let at_once =
                if self.on_trial.is_some() { self.concurrency.min(restarted) } else { self.concurrency };
            if on_trial && report.by_close > 0 {
                (on_trial, report.acquitted) = (false, true);
                self.acquit();
            }
            if !on_trial && received > 0 {
                self.status.set(State::Consuming);
            }
            while !drawing
                && tasks.len() < at_once
                && let Some((ticket, incoming)) =
                    if at_once < self.concurrency { lanes.start_any(draw()) } else { lanes.start() }
            {
                let turn = Turn {
                    attempts: incoming.envelope.attempts,
                    priority: incoming.envelope.priority(),
                    trusted_from: trusted_from.unwrap_or_else(Instant::now),
                };
                let publisher = link.publisher.clone();
                nothing_in_hand.as_mut().reset(tokio::time::Instant::now() + LONGEST_TRIAL);
                tasks.spawn(self.clone().task(ticket, incoming, publisher, turn, stop.clone()));
            }
            self.metrics.load(tasks.len(), lanes.waiting());
            self.worker.backlog(tasks.len() == self.concurrency && lanes.waiting() >= self.concurrency);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break End::Stopped,
                Some(done) = tasks.join_next() => match finished(done, &mut lanes, &mut report) {
                    None => {}
                    Some(end) => break end,
                },
                Some(error) = link.trouble.next() => break End::Lost(error),
                never = &mut watch => match never {},
                () = &mut in_hand, if drawing && received > 0 => drawing = false,
                () = &mut nothing_in_hand, if on_trial && tasks.is_empty() => {
                    (on_trial, report.acquitted) = (false, true);
                    self.acquit();
                }
                // Never polled again after the end: it would hang (rabbitmq.md §0, 8).
                delivery = link.deliveries.next() => match delivery {
                    Some(Ok(delivery)) => {
                        received += 1;
                        if received == 1 {
                            in_hand.as_mut().reset(tokio::time::Instant::now() + TIME_TO_DRAW);
                        }
                        trusted_from.get_or_insert_with(|| Instant::now() + self.worker.settings().search_lag);
                        self.receive(delivery, &mut lanes);
                    }
                    Some(Err(error)) => break End::Lost(error.into()),
                    None => break End::Lost(BrokerError::Cancelled),
                },
            }
        };

        if matches!(end, End::Stopped) {
            self.status.set(State::Stopping);
            tracing::info!(
                in_hand = tasks.len(),
                grace_s = self.grace.as_secs(),
                "stopping: finishing what is in hand"
            );
            let finish = async {
                while let Some(done) = tasks.join_next().await {
                    let _ = finished(done, &mut lanes, &mut report);
                }
            };
            let finish = tokio::time::timeout(self.grace, finish);
            // Without a connection the standby is at work already.
            tokio::select! {
                _ = finish => {}
                _ = link.trouble.next() => {}
            }
        }
        drop(watch);
        stop.cancel();
        while let Some(done) = tasks.join_next().await {
            let _ = finished(done, &mut lanes, &mut report);
        }
        report.handed_back = received - report.settled;
        self.metrics.load(0, 0);
        self.metrics.handed_back(report.handed_back);
        // Closed, not dropped, also when only half of it is lost: dropping a consumer cancels it. A
        // broker that says nothing any more is not waited for.
        let _ = tokio::time::timeout(Duration::from_secs(5), link.close()).await;
        (end, report)
    }

    /// The cause of the last pause, if only a message that succeeds proves that it is gone.
    fn unproven(&self) -> Option<PauseCause> {
        self.on_trial.filter(|cause| !cause.ends_with_probe())
    }

    /// Nothing is known against Close any more.
    fn acquit(&self) {
        if self.unproven().is_some() {
            self.worker.acquit_close();
        }
        self.metrics.paused(None);
        self.status.set(State::StandingBy);
        if self.on_trial.is_some() {
            tracing::info!("Close can be worked with again: going on, slowly at first");
        } else {
            tracing::info!(queue = self.settings.queue, "connected to RabbitMQ, waiting for messages");
        }
    }

    fn receive(&self, delivery: Delivery, lanes: &mut Lanes<Key, Priority, Incoming>) {
        let envelope = Envelope::of(&delivery, Timestamp::now());
        let prepare = AssertUnwindSafe(|| self.worker.prepare(&delivery.data));
        let prepared = std::panic::catch_unwind(prepare)
            .unwrap_or_else(|_| Prepared::Settled(Outcome::Dead(defect(Stage::Map))));
        let keys = match &prepared {
            Prepared::Job(job) => job.keys(),
            Prepared::Settled(_) => Vec::new(),
        };
        let rank = envelope.priority();
        lanes.push(keys, rank, Incoming { delivery, envelope, prepared });
    }

    /// Works on one delivery and settles it.
    async fn task(
        self,
        ticket: Ticket,
        incoming: Incoming,
        publisher: Publisher,
        turn: Turn,
        stop: CancellationToken,
    ) -> (Ticket, Done) {
        let Incoming { delivery, envelope, prepared } = incoming;
        let span = tracing::info_span!(
            "message",
            message_id = envelope.message_id(),
            attempt = envelope.attempts + 1
        );
        let work = async {
            let started = Instant::now();
            let (outcome, decision) = match prepared {
                Prepared::Settled(outcome) => (outcome, None),
                Prepared::Job(job) => {
                    let work = self.guarded(&job, turn);
                    match stop.run_until_cancelled(work).await {
                        Some((outcome, decision)) => (outcome, Some(decision)),
                        None => return Done::HandedBack,
                    }
                }
            };
            log(&outcome, decision.as_ref(), started.elapsed());
            let done = self.settle(&delivery, &envelope, &outcome, &publisher, &stop).await;
            if matches!(done, Done::Settled { .. }) {
                self.metrics.settled(&outcome, started.elapsed());
            }
            done
        };
        let done = work.instrument(span).await;
        (ticket, done)
    }

    /// Does the work; a panic costs only this message.
    async fn guarded(&self, job: &Job, turn: Turn) -> (Outcome, Decision) {
        let work = AssertUnwindSafe(self.worker.run(job, turn));
        let died = |_| (Outcome::Dead(defect(Stage::Write)), Decision::default());
        work.catch_unwind().await.unwrap_or_else(died)
    }

    /// Publishes the successor, if there is one, then acks.
    async fn settle(
        &self,
        delivery: &Delivery,
        envelope: &Envelope,
        outcome: &Outcome,
        publisher: &Publisher,
        stop: &CancellationToken,
    ) -> Done {
        let settings = &self.settings;
        let succeeded = match outcome {
            Outcome::Synced(_) | Outcome::Skipped(_) => Some(Ok(())),
            Outcome::Delayed { level, charged, .. } => {
                // The configuration asks for one delay at least.
                let Some(delay) = settings.delays.get(*level) else { return Done::HandedBack };
                let properties = envelope.for_delay(envelope.attempts + u32::from(*charged));
                let exchange = settings.retry_exchange();
                self.publish(publisher, &exchange, &delay.name, &delivery.data, properties, stop).await
            }
            Outcome::Dead(dead) => {
                let properties = envelope.for_dead_letter(dead, Timestamp::now());
                // A fanout needs no key; the producer's is in a header, where any length fits.
                self.publish(publisher, &settings.dead(), "", &delivery.data, properties, stop).await
            }
            Outcome::Paused(cause) => return Done::Paused(*cause),
        };
        match succeeded {
            Some(Ok(())) => {}
            Some(Err(error)) => return Done::Failed(error),
            None => return Done::HandedBack,
        }
        match delivery.ack(BasicAckOptions::default()).await {
            Ok(true) => Done::Settled { by_close: outcome.proves_close() },
            // The channel of the delivery is gone; the broker delivers it again.
            Ok(false) => {
                self.metrics.stale_ack();
                Done::HandedBack
            }
            Err(error) => Done::Failed(error.into()),
        }
    }

    /// Publishes a successor. The original is held for as long as it takes: during an alarm the broker
    /// takes nothing, and a full queue refuses. `None` when the session ends meanwhile.
    async fn publish(
        &self,
        publisher: &Publisher,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
        stop: &CancellationToken,
    ) -> Option<Result<(), BrokerError>> {
        let mut pauses = Pauses::reconnect();
        let held = async {
            loop {
                let sent = publisher.send(exchange, key, body, properties.clone()).await?;
                match sent.confirmed().await {
                    Err(BrokerError::Unconfirmed(why)) => {
                        tracing::warn!(exchange, why, "a message is held until RabbitMQ takes its successor");
                        tokio::time::sleep(pauses.next_pause().unwrap_or_default()).await;
                    }
                    settled => return settled,
                }
            }
        };
        stop.run_until_cancelled(held).await
    }
}

/// Books a finished task; `Some` when the session has to end for it.
fn finished(
    done: Result<(Ticket, Done), tokio::task::JoinError>,
    lanes: &mut Lanes<Key, Priority, Incoming>,
    report: &mut Report,
) -> Option<End> {
    let Ok((ticket, done)) = done else {
        // Work on a message is guarded against panics; this one was in settling it.
        return Some(End::Lost(BrokerError::Lost("settling a message panicked".into())));
    };
    lanes.finish(ticket);
    match done {
        Done::Settled { by_close } => {
            report.settled += 1;
            report.by_close += u64::from(by_close);
            None
        }
        Done::HandedBack => None,
        Done::Paused(cause) => Some(End::Paused(cause)),
        Done::Failed(error) => Some(End::Lost(error)),
    }
}

/// Looks at the backlog from time to time. A broker that does not answer is noticed elsewhere.
async fn watch(connection: &Connection, queue: &str, metrics: &Metrics) -> Infallible {
    let mut drain = Drain::default();
    let mut tick = tokio::time::interval(LOOKS_APART);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut settled, mut calls) = metrics.totals();
    let (mut then, mut waited) = (Instant::now(), false);
    loop {
        tick.tick().await;
        let Ok(Some(depth)) = topology::depth(connection, queue).await else { continue };
        let (settled_now, calls_now) = metrics.totals();
        let made =
            calls.iter().zip(&calls_now).map(|((endpoint, before), (_, now))| (*endpoint, now - before));
        // A standby's backlog is another's work.
        let waits = depth.ready > 0 && metrics.in_hand() > 0;
        drain.note(then.elapsed(), settled_now - settled, made, waited && waits);
        let backlog = depth.ready.saturating_add(metrics.in_hand());
        metrics.backlog(backlog, drain.estimate(backlog, metrics.standings()));
        (settled, calls, then, waited) = (settled_now, calls_now, Instant::now(), waits);
    }
}

/// A number nobody foresees.
fn draw() -> usize {
    // The lower half of such an id is random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    usize::try_from(random >> 8).unwrap_or_default()
}

/// What a caught panic makes of its message.
fn defect(stage: Stage) -> DeadLetter {
    let error = format!("close-sync {} panicked at {}", env!("CARGO_PKG_VERSION"), panics::last_location());
    DeadLetter { reason: Reason::Internal, stage, error, field: None, decision: None }
}

/// One line per message, where it is settled.
fn log(outcome: &Outcome, decision: Option<&Decision>, took: Duration) {
    let decision = decision.map(Decision::summary);
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    match outcome {
        Outcome::Synced(effect) => tracing::info!(outcome = effect.label(), decision, took_ms, "synced"),
        Outcome::Skipped(skip) => tracing::info!(reason = skip.label(), decision, took_ms, "skipped"),
        Outcome::Delayed { level, charged, cause } => {
            tracing::warn!(level, charged, cause, took_ms, "failed for now, waiting in a delay queue");
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

/// The connections of a session and what comes out of them.
struct Link {
    consuming: Connection,
    publishing: Connection,
    channel: Channel,
    publisher: Publisher,
    deliveries: lapin::Consumer,
    trouble: stream::BoxStream<'static, BrokerError>,
}

impl Link {
    async fn open(settings: &Settings) -> Result<Self, BrokerError> {
        let consuming = settings.connect("close-sync consume").await?;
        let publishing = settings.connect("close-sync publish").await?;
        topology::declare(&consuming, settings).await?;
        let publisher = Publisher::new(&publishing).await?;
        let channel = consuming.create_channel().await?;
        channel.basic_qos(settings.prefetch, BasicQosOptions::default()).await?;
        let trouble = stream::select(trouble(&consuming), trouble(&publishing)).boxed();
        let deliveries = channel
            .basic_consume(
                settings.queue.as_str().into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok(Self { consuming, publishing, channel, publisher, deliveries, trouble })
    }

    async fn close(self) {
        tokio::time::sleep(LAST_ACKS).await;
        let _ = self.channel.close(200, "bye".into()).await;
        close(&self.consuming).await;
        close(&self.publishing).await;
    }
}

/// The end of a connection, as an event. Alarms are logged and waited out.
#[expect(clippy::wildcard_enum_match_arm, reason = "lapin may add events; only the end matters here")]
fn trouble(connection: &Connection) -> impl Stream<Item = BrokerError> + Send + 'static {
    connection.events_listener().filter_map(|event| {
        let error = match event {
            Event::Error(error) => Some(error.into()),
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(reason, "RabbitMQ raised an alarm: nothing can be published until it clears");
                None
            }
            Event::ConnectionUnblocked => {
                tracing::info!("RabbitMQ's alarm cleared");
                None
            }
            _ => None,
        };
        std::future::ready(error)
    })
}
