//! One session: from connecting to the first thing that ends it.
//!
//! A delivery is received, prepared, laid on the [`Scheduler`] and, when its turn has come, worked on in a
//! task of its own, perhaps with others about the same person. The task (`task.rs`) also settles it: the
//! successor (delay queue, dead-letter queue) is published and confirmed first, then the delivery is acked.
//! A crash between the two duplicates a message, it never loses one; and because a message that changes
//! nothing sends nothing, a duplicate does no harm.
//!
//! **How a session ends.** Never by `basic.cancel`: under single active consumer that would start
//! the standby while we still hold messages (rabbitmq.md §0, 6). Reading stops, what runs is finished
//! or dropped, a moment passes so that the last acks arrive (rabbitmq.md §0, 5), and the channel is
//! closed: everything unacked goes back to the front of the queue in its order.
//!
//! When the connection is lost, work stops at once: the standby may already have the same messages.
//!
//! **A message that kills the process all the same** (by an abort, or out of memory; panics are caught, and `frames.rs`
//! knows what kills lapin) kills the standbys one after the other. The broker counts each death for all messages in
//! hand, its neighbours included (rabbitmq.md §0, 2): they stay, as the limit is a million. Working one by one from
//! some count on, to find out which it is (rabbitmq.md §5.2, 7), is not built: each pause and each lost connection
//! raises the same counts.

mod connections;
pub mod outcome_events;
pub mod scheduler;
mod span;
mod task;

use std::ops::AddAssign;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::amqp::{BrokerError, Settings};
use crate::close::Priority;
use crate::close::stall_guard::StallGuard;
use crate::consumer::connections::{ConnectionEvent, ConnectionEvents, Connections, Publishers, watch};
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::scheduler::{Next, Scheduler};
use crate::consumer::task::{Done, Ended, Incoming};
use crate::domain::mapping::Key;
use crate::outcome::PauseCause;
use crate::sync::circuit_breaker::HALF_OPEN_PROBES;
use crate::sync::{RunContext, Worker};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::{State, Status};

/// What a session works with.
#[derive(Clone)]
pub struct Session {
    /// The destination's name, where there are several.
    pub destination: Option<Arc<str>>,
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
/// What a session did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Deliveries settled.
    pub settled: u64,
    /// Those of them that Close had a part in: it can be worked with.
    pub by_close: u64,
    /// Nothing is known against Close any more.
    pub breaker_closed: bool,
    /// Deliveries received but not settled: they went back to the queue.
    pub handed_back: u64,
}

impl AddAssign for SessionStats {
    fn add_assign(&mut self, more: Self) {
        let Self { settled, by_close, breaker_closed, handed_back } = self;
        *settled += more.settled;
        *by_close += more.by_close;
        *breaker_closed |= more.breaker_closed;
        *handed_back += more.handed_back;
    }
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

impl Session {
    /// Runs until something ends it. `shutdown` asks for a graceful end; `detours` are those of the sessions
    /// before.
    pub async fn run(
        &self,
        detours: &mut DelayedMessages<Key>,
        shutdown: &CancellationToken,
    ) -> (End, SessionStats) {
        let link = match shutdown.run_until_cancelled(Connections::open(&self.settings)).await {
            Some(Ok(link)) => link,
            Some(Err(error)) => return (End::Lost(error), SessionStats::default()),
            None => return (End::Stopped, SessionStats::default()),
        };
        self.metrics.connected(true);
        if self.metrics.set_broker_version(&link.broker.version) {
            let Connections { broker, .. } = &link;
            tracing::info!("{broker}: {}", broker.describe());
        }
        if let Some(cause) = self.unproven() {
            tracing::debug!(cause = cause.label(), "trying whether Close can be worked with");
        } else {
            self.acquit();
        }
        let ended = self.consume(link, detours, shutdown).await;
        self.metrics.connected(false);
        if let End::Lost(error) = &ended.0 {
            self.metrics.connection_lost(error.trouble());
        }
        ended
    }

    async fn consume(
        &self,
        mut link: Connections,
        detours: &mut DelayedMessages<Key>,
        shutdown: &CancellationToken,
    ) -> (End, SessionStats) {
        // A predecessor may have worked until our first delivery: what it created can be missing from
        // search for this long after it. A standby may have waited for hours before.
        let mut search_complete_from = None;
        let stop = CancellationToken::new();
        let mut in_hand = InHand::new(Scheduler::new(detours));
        let mut received = 0;
        let mut on_trial = self.unproven().is_some();
        in_hand.report.breaker_closed = !on_trial;
        let nothing_in_hand = tokio::time::sleep(LONGEST_TRIAL);
        tokio::pin!(nothing_in_hand);
        // After a pause the messages that are tried are drawn from those in hand: the first in line may be
        // those that always fail, and would be the first every time.
        let mut drawing = on_trial;
        let time_to_draw = tokio::time::sleep(TIME_TO_DRAW);
        tokio::pin!(time_to_draw);
        let pulse = self.worker.stall_guard();
        pulse.arm(link.patience());
        let mut beat = tokio::time::interval(StallGuard::HEARTBEAT_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watch = watch(&link.consuming, &self.settings, &self.metrics, |what| self.lacks(what.as_ref()));
        let mut watch = Box::pin(watch);

        let end = loop {
            let at_once = self.at_once(&in_hand.report);
            if on_trial && in_hand.report.by_close > 0 {
                (on_trial, in_hand.report.breaker_closed) = (false, true);
                self.acquit();
            }
            if !on_trial && received > 0 {
                self.status.set(State::Consuming, None);
            }
            while !drawing
                && in_hand.tasks.len() < at_once
                && let Some(run) = in_hand.next(at_once < self.concurrency, self)
            {
                let turn = RunContext {
                    attempts: run[0].1.envelope.attempts,
                    priority: run[0].1.envelope.priority(),
                    search_complete_from: search_complete_from.unwrap_or_else(Instant::now),
                };
                let out = link.out.clone();
                nothing_in_hand.as_mut().reset(Instant::now() + LONGEST_TRIAL);
                in_hand.tasks.spawn(self.clone().work(run, out, turn, stop.clone()));
            }
            let (busy, waiting) = (in_hand.tasks.len() == self.concurrency, in_hand.desk.waiting());
            self.metrics.set_load(in_hand.messages + in_hand.passing.len(), waiting);
            self.worker.set_backlog(busy && waiting >= self.concurrency);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break End::Stopped,
                _ = beat.tick() => if let Some(gap) = pulse.heartbeat() {
                    break End::Lost(BrokerError::StoodStill(gap));
                },
                Some(ended) = in_hand.next_end() => if let Some(end) = ended {
                    break end;
                },
                Some(happened) = link.happenings.next() => match happened {
                    ConnectionEvent::Ended(error) => break End::Lost(error),
                    ConnectionEvent::Alarm(reason) => self.alarm(reason),
                },
                never = &mut watch => match never {},
                () = &mut time_to_draw, if drawing && received > 0 => drawing = false,
                () = &mut nothing_in_hand, if on_trial && in_hand.tasks.is_empty() => {
                    (on_trial, in_hand.report.breaker_closed) = (false, true);
                    self.acquit();
                }
                // Never polled again after the end: it would hang (rabbitmq.md §0, 8).
                delivery = link.deliveries.next() => match delivery {
                    Some(Ok(delivery)) => {
                        received += 1;
                        if received == 1 {
                            time_to_draw.as_mut().reset(Instant::now() + TIME_TO_DRAW);
                            self.worker.forget_records();
                        }
                        search_complete_from.get_or_insert_with(|| Instant::now() + self.worker.settings().search_lag);
                        in_hand.receive(Incoming::of(delivery, self), self, &link.out, &stop);
                    }
                    Some(Err(error)) => break End::Lost(error.into()),
                    None => break End::Lost(BrokerError::Cancelled),
                },
            }
        };

        if matches!(end, End::Stopped) {
            self.wind_down(&mut in_hand, &mut link.happenings, &mut beat).await;
        }
        drop(watch);
        stop.cancel();
        in_hand.finish().await;
        pulse.disarm();
        let mut report = in_hand.report;
        report.handed_back = received - report.settled;
        self.metrics.set_load(0, 0);
        self.metrics.handed_back(report.handed_back);
        // Of the next connection the broker tells anew, and the next session looks.
        self.alarm(None);
        self.show_lack(None);
        // Closed, not dropped, also when only half of it is lost: dropping a consumer cancels it. A
        // broker that says nothing any more, or to which lapin says nothing during an alarm, is not waited for.
        let _ = tokio::time::timeout(Duration::from_secs(5), link.close()).await;
        (end, report)
    }

    /// Finishes what is worked on, as far as the grace period and the connection allow.
    async fn wind_down(
        &self,
        in_hand: &mut InHand<'_>,
        happenings: &mut ConnectionEvents,
        beat: &mut Interval,
    ) {
        self.status.set(State::Stopping, None);
        let grace_s = self.grace.as_secs();
        tracing::info!(in_hand = in_hand.messages, grace_s, "stopping: finishing what is in hand");
        let stands_still = async {
            while self.worker.stall_guard().heartbeat().is_none() {
                beat.tick().await;
            }
        };
        let ends = async {
            while let Some(ConnectionEvent::Alarm(reason)) = happenings.next().await {
                self.alarm(reason);
            }
        };
        // Without a connection the standby is at work already.
        tokio::select! {
            _ = tokio::time::timeout(self.grace, in_hand.finish()) => {}
            () = ends => {}
            () = stands_still => {}
        }
    }

    /// The broker takes no messages for a reason, or takes them again. What needs no successor goes on.
    fn alarm(&self, reason: Option<String>) {
        self.metrics.set_broker_alarm(reason.is_some());
        self.status.set_alarm(reason);
    }

    /// Something that has to exist was deleted, or all of it is there again. What does not need it goes on.
    fn lacks(&self, what: Option<&BrokerError>) {
        if let Some(error) = what {
            tracing::error!(%error, "going on with what can be done without it");
        } else {
            tracing::info!("RabbitMQ has everything again");
        }
        self.show_lack(what);
    }

    fn show_lack(&self, what: Option<&BrokerError>) {
        self.metrics.set_broker_trouble(what.map(BrokerError::trouble));
        self.status.set_missing(what.map(ToString::to_string));
    }

    /// How many messages may be worked on now: after a pause with one more for each that succeeds.
    fn at_once(&self, report: &SessionStats) -> usize {
        let restarted =
            usize::try_from(report.by_close).unwrap_or(usize::MAX).saturating_add(HALF_OPEN_PROBES);
        if self.on_trial.is_some() { self.concurrency.min(restarted) } else { self.concurrency }
    }

    /// The cause of the last pause, if only a message that succeeds proves that it is gone.
    fn unproven(&self) -> Option<PauseCause> {
        self.on_trial.filter(|cause| !cause.ends_with_probe())
    }

    /// Nothing is known against Close any more.
    fn acquit(&self) {
        if self.unproven().is_some() {
            self.worker.close_breaker();
        }
        self.metrics.paused(None);
        self.status.set(State::StandingBy, None);
        if self.on_trial.is_some() {
            tracing::info!("Close can be worked with again: going on, slowly at first");
        } else {
            tracing::info!(queue = self.settings.queue, "connected to RabbitMQ, waiting for messages");
        }
    }
}

/// What a session has received and not settled.
struct InHand<'a> {
    desk: Scheduler<'a, Key, Priority, Incoming>,
    tasks: JoinSet<Ended>,
    /// Those that are worked on.
    messages: usize,
    /// Messages that need no Close. They take no place from those that do, and do not stay in memory until one is
    /// free.
    passing: JoinSet<Done>,
    report: SessionStats,
}

impl<'a> InHand<'a> {
    fn new(desk: Scheduler<'a, Key, Priority, Incoming>) -> Self {
        let (tasks, passing) = (JoinSet::new(), JoinSet::new());
        Self { desk, tasks, messages: 0, passing, report: SessionStats::default() }
    }

    fn receive(&mut self, incoming: Incoming, session: &Session, out: &Publishers, stop: &CancellationToken) {
        if let Some(outcome) = incoming.outcome().cloned() {
            self.desk.pass(incoming.envelope.delay_id);
            self.passing.spawn(session.clone().pass(incoming, outcome, out.clone(), stop.clone()));
            return;
        }
        let (keys, rank, id) = (incoming.keys(), incoming.envelope.priority(), incoming.envelope.delay_id);
        self.desk.receive(keys, rank, id, incoming);
    }

    /// What is to be worked on next, one message at least; with `draw`, any one.
    fn next(&mut self, draw: bool, session: &Session) -> Option<Vec<(JobId, Incoming)>> {
        let along = |first: &Incoming, next: &Incoming| next.goes_along(first, &session.worker);
        let next = if draw { self.desk.any(random()) } else { self.desk.next(along) }?;
        let run = match next {
            Next::Run(run) => run,
            Next::Defer(ticket, incoming, until) => {
                session.metrics.yielded();
                let wait = until.saturating_duration_since(Instant::now());
                let level = session.worker.settings().retry.level_for(wait);
                vec![(ticket, incoming.behind(level))]
            }
        };
        self.messages += run.len();
        Some(run)
    }

    /// Waits for work to end, and for what it means: `Some` inside when the session has to end for it.
    async fn next_end(&mut self) -> Option<Option<End>> {
        tokio::select! {
            Some(ended) = self.tasks.join_next() => Some(self.book(ended)),
            Some(ended) = self.passing.join_next() => {
                Some(ended.map_or_else(|_| Some(panicked()), |done| self.count(done)))
            }
            else => None,
        }
    }

    /// Waits until nothing is worked on any more.
    async fn finish(&mut self) {
        while self.next_end().await.is_some() {}
    }

    /// Books what became of messages; `Some` when the session has to end for it. Those that were not settled
    /// keep their place, so that nobody behind them goes on.
    fn book(&mut self, ended: Result<Ended, JoinError>) -> Option<End> {
        let each = match ended {
            Ok(Ended::Each(each)) => each,
            Ok(Ended::Apart(run)) => {
                self.messages -= run.len();
                for (ticket, incoming) in run {
                    self.desk.put_back(ticket, incoming);
                }
                return None;
            }
            Err(_) => return Some(panicked()),
        };
        self.messages -= each.len();
        let mut end = None;
        for (ticket, done) in each {
            if let Done::Settled { fate, .. } = done {
                self.desk.finish(ticket, fate);
            }
            end = end.or(self.count(done));
        }
        end
    }

    fn count(&mut self, done: Done) -> Option<End> {
        match done {
            Done::Settled { by_close, .. } => {
                self.report.settled += 1;
                self.report.by_close += u64::from(by_close);
                None
            }
            Done::HandedBack => None,
            Done::Paused(cause) => Some(End::Paused(cause)),
            Done::Failed(error) => Some(End::Lost(error)),
        }
    }
}

/// Work on a message is guarded against panics; this one was in settling it.
fn panicked() -> End {
    End::Lost(BrokerError::Lost("settling a message panicked".into()))
}

/// A number nobody foresees.
fn random() -> usize {
    // The lower half of such an id is random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    usize::try_from(random >> 8).unwrap_or_default()
}
