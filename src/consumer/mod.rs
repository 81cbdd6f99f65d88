//! One session: from connecting to the first thing that ends it.
//!
//! A delivery is decoded and mapped (`delivery`), scheduled ([`scheduler`]) and, when its turn has come, processed in a
//! task of its own, perhaps merged with others about the same person (`process`). The task also settles it (`settle`):
//! the successor (delay queue, dead-letter queue) is published and confirmed first, then the delivery is acked. A crash
//! between the two duplicates a message and never loses one. A duplicate does no
//! harm, because an event that is applied twice changes nothing the second time.
//!
//! The loop runs over a [`Broker`] and keeps its state in a pure `SessionState`, so that tests run the same loop without
//! RabbitMQ. A file imports only what stands to its right: this file, `connections`, `topology_monitor`,
//! `process`, [`outcome_events`], `span`, `settle`, `delivery`, `context`, [`quarantine`], `state`, [`scheduler`], `broker`
//! (the port).
//!
//! **How a session ends.** Never by `basic.cancel`: under single active consumer that would start the standby while
//! messages are still in progress here (rabbitmq.md §0, 6). Receiving stops, what runs is finished or dropped, a moment
//! passes so that the last acks arrive (rabbitmq.md §0, 5), and the channel is closed: everything unacked returns to the
//! front of the queue in its order.
//!
//! When the connection is lost, work stops at once: the standby may already have the same messages.
//!
//! **A message that kills the process** (by an abort, or out of memory) kills the standbys one after the other. Panics
//! are caught, and the frame sanitizer removes what crashes lapin. The broker counts each death for all
//! unacked messages, also for its neighbours (rabbitmq.md §0, 2): they stay in the queue, as the limit is a
//! million. Processing messages one by one above some count, to find the one that kills (rabbitmq.md §5.2, 7), is not
//! built: each pause and each lost connection raises the same counts.

pub mod broker;
mod connections;
mod context;
mod delivery;
pub(crate) mod journal;
pub mod outcome_events;
mod process;
pub mod quarantine;
pub mod scheduler;
mod settle;
mod span;
mod state;
#[cfg(test)]
mod tests;
mod topology_monitor;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use strum::VariantArray;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::amqp::{BrokerError, JournalState, Settings};
use crate::close::Priority;
use crate::close::stall_guard::StallGuard;
use crate::consumer::broker::{Broker, BrokerEvent, JournalMessage, ReadFrom};
use crate::consumer::connections::Connections;
use crate::consumer::context::Context;
pub use crate::consumer::context::{Environment, System};
use crate::consumer::delivery::ReceivedMessage;
use crate::consumer::journal::{Absence, Instruction, SessionJournal};
use crate::consumer::process::{process, skip};
use crate::consumer::quarantine::{Evidence, Quarantine};
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::scheduler::{Next, Scheduler};
pub use crate::consumer::state::{End, SessionStats};
use crate::consumer::state::{Processed, Resume, SessionState, Settlement};
use crate::domain::journal::ChangeKind;
use crate::domain::mapping::Key;
use crate::outcome::PauseCause;
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
    /// Makes Close agree with messages.
    pub worker: Worker,
    /// The metrics.
    pub metrics: Metrics,
    /// The state for operators.
    pub status: Status,
    /// How many tasks may run at the same time.
    pub concurrency: usize,
    /// How long messages in progress may take to finish on shutdown.
    pub grace: Duration,
    /// What earlier sessions learnt about messages that cannot be published again.
    pub quarantine: Quarantine,
    /// The pause that ended before this session: it starts with a few messages, and with one more for each that
    /// succeeds.
    pub paused_before: Option<PauseCause>,
}

/// How long closing may take. It can hang when the broker no longer answers, or when an alarm blocks the connection.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

impl Session {
    /// Runs until something ends it. `shutdown` asks for a graceful end. `delayed` lasts from session to session.
    pub async fn run(
        &self,
        delayed: &mut DelayedMessages<Key>,
        shutdown: &CancellationToken,
    ) -> (End, SessionStats) {
        let opening = Connections::open(&self.settings, &self.metrics);
        let connections = match shutdown.run_until_cancelled(opening).await {
            Some(Ok(connections)) => connections,
            Some(Err(error)) => return (End::Lost(error), SessionStats::default()),
            None => return (End::Stopped, SessionStats::default()),
        };
        self.metrics.connected(true);
        if self.metrics.set_broker_version(&connections.server.version) {
            let server = &connections.server;
            tracing::info!(event = "broker_version", "{server}: {}", server.describe());
        }
        let ended = self.run_on(connections, Arc::new(System), delayed, shutdown).await;
        self.metrics.connected(false);
        if let End::Lost(error) = &ended.0 {
            self.metrics.connection_lost(error.trouble());
        }
        ended
    }

    /// The same on a broker that is connected.
    pub async fn run_on(
        &self,
        mut broker: impl Broker,
        environment: Arc<dyn Environment>,
        delayed: &mut DelayedMessages<Key>,
        shutdown: &CancellationToken,
    ) -> (End, SessionStats) {
        let context = Context {
            destination: self.destination.clone(),
            settings: Arc::clone(&self.settings),
            worker: self.worker.clone(),
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            environment,
            publishers: broker.publishers(),
            quarantine: self.quarantine.clone(),
            evidence: OnceLock::new(),
            stop: CancellationToken::new(),
            outcome_events_fail: AtomicBool::new(false),
        };
        let stall_limit = broker.stall_limit();
        let mut consumer = Consumer::new(Arc::new(context), self, delayed, stall_limit);
        let end = consumer.run(&mut broker, shutdown).await;
        if matches!(end, End::Stopped) {
            consumer.wind_down(&mut broker, self.grace).await;
        }
        let stats = consumer.hand_back().await;
        let _ = tokio::time::timeout(CLOSE_PATIENCE, broker.close()).await;
        (end, stats)
    }
}

/// The loop of a session: feeds its state with events, and starts the tasks that the state allows.
struct Consumer<'a> {
    context: Arc<Context>,
    state: SessionState<'a, Key, Priority, ReceivedMessage>,
    resume: Resume,
    paused_before: Option<PauseCause>,
    tasks: JoinSet<Processed<ReceivedMessage>>,
    /// Messages that need no call to Close. They take no concurrency from those that do, and do not stay in memory
    /// until there is some.
    skips: JoinSet<Settlement>,
    heartbeat: Interval,
    /// If there is one that can be read.
    journal: Option<SessionJournal>,
    journal_failures: (mpsc::UnboundedSender<BrokerError>, mpsc::UnboundedReceiver<BrokerError>),
    /// If there is one, and this session works without it.
    absence: Option<Absence>,
}

impl<'a> Consumer<'a> {
    /// `stall_limit`: after a gap this long in the heartbeats another worker may be at work.
    fn new(
        context: Arc<Context>,
        session: &Session,
        delayed: &'a mut DelayedMessages<Key>,
        stall_limit: Duration,
    ) -> Self {
        let resume = Resume::after(session.paused_before);
        context.worker.stall_guard().arm(stall_limit);
        let mut heartbeat = tokio::time::interval(StallGuard::heartbeat_interval(stall_limit));
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            context,
            state: SessionState::new(Scheduler::new(delayed), session.concurrency, resume, Instant::now()),
            resume,
            paused_before: session.paused_before,
            tasks: JoinSet::new(),
            skips: JoinSet::new(),
            heartbeat,
            journal: None,
            journal_failures: mpsc::unbounded_channel(),
            absence: None,
        }
    }

    /// Runs until something ends the session.
    async fn run(&mut self, broker: &mut impl Broker, shutdown: &CancellationToken) -> End {
        let context = Arc::clone(&self.context);
        let stall_guard = context.worker.stall_guard();
        match self.next_end(broker, shutdown).await {
            // A process that was suspended may notice the lost connection first.
            End::Lost(error) => {
                let error = stall_guard.heartbeat().map_or(error, BrokerError::StoodStill);
                if let Some(evidence) = Evidence::of(&error) {
                    let _ = context.evidence.set(evidence);
                }
                End::Lost(error)
            }
            end @ (End::Stopped | End::Paused(_)) => end,
        }
    }

    /// The first thing that ends the session.
    async fn next_end(&mut self, broker: &mut impl Broker, shutdown: &CancellationToken) -> End {
        let context = Arc::clone(&self.context);
        match self.paused_before {
            Some(cause) if self.resume == Resume::HalfOpen => {
                tracing::debug!(cause = cause.label(), "circuit breaker half-open, trying a few messages");
            }
            _ => self.breaker_closed(),
        }
        context.metrics.set_journal(None);
        self.follow_journal(broker);
        loop {
            if self.state.close_breaker(Instant::now()) {
                self.breaker_closed();
            }
            if self.state.is_consuming() {
                context.status.set(State::Consuming, None);
            }
            self.start_tasks();
            self.report_load();
            let wake_at = self.state.wake_at();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return End::Stopped,
                _ = self.heartbeat.tick() => {
                    if let Some(gap) = context.worker.stall_guard().heartbeat() {
                        return End::Lost(BrokerError::StoodStill(gap));
                    }
                    if self.state.is_consuming() {
                        // A standby learns of them only later.
                        context.metrics.set_unanswered_creations(context.worker.unanswered_creations());
                    }
                    if self.journal.as_ref().is_some_and(SessionJournal::is_stuck) {
                        let error = BrokerError::Unconfirmed("the journal is not read");
                        if let Some(end) = self.journal_failed(error) {
                            return end;
                        }
                    }
                }
                Some(task) = self.tasks.join_next() => if let Some(end) = self.processed(task) {
                    return end;
                },
                Some(skip) = self.skips.join_next() => if let Some(end) = self.skipped(skip) {
                    return end;
                },
                () = sleep_until(wake_at) => {}
                Some(error) = self.journal_failures.1.recv() => if let Some(end) = self.journal_failed(error) {
                    return end;
                },
                event = broker.next_event() => match event {
                    BrokerEvent::Delivery(delivery) => {
                        if self.state.received(Instant::now()) {
                            self.become_active(broker);
                        }
                        self.receive(ReceivedMessage::prepare(*delivery, &context));
                    }
                    BrokerEvent::Journal(message) => if let Some(end) = self.journal_message(&message, broker) {
                        return end;
                    },
                    BrokerEvent::JournalFailed(error) => if let Some(end) = self.journal_failed(error) {
                        return end;
                    },
                    BrokerEvent::Lost(error) => return End::Lost(error),
                    BrokerEvent::Alarm(reason) => self.alarm(reason),
                    BrokerEvent::Missing(missing) => self.missing(missing.as_ref()),
                },
            }
        }
    }

    /// Finishes what is in progress, as far as the grace period and the connection allow.
    async fn wind_down(&mut self, broker: &mut impl Broker, grace: Duration) {
        let context = Arc::clone(&self.context);
        context.status.set(State::Stopping, None);
        let in_progress = self.state.load().in_progress;
        tracing::info!(
            in_hand = in_progress,
            grace_s = grace.as_secs(),
            "stopping, finishing messages in progress"
        );
        broker.stop_receiving();
        let grace = tokio::time::sleep(grace);
        tokio::pin!(grace);
        // Without a connection, or after a stall, the standby is at work already.
        while !(self.tasks.is_empty() && self.skips.is_empty()) {
            tokio::select! {
                biased;
                () = &mut grace => return,
                _ = self.heartbeat.tick() => if context.worker.stall_guard().heartbeat().is_some() {
                    return;
                },
                Some(task) = self.tasks.join_next() => drop(self.processed(task)),
                Some(skip) = self.skips.join_next() => drop(self.skipped(skip)),
                Some(error) = self.journal_failures.1.recv() => if self.journal_failed(error).is_some() {
                    return;
                },
                event = broker.next_event() => match event {
                    BrokerEvent::Lost(_) => return,
                    BrokerEvent::JournalFailed(error) => if self.journal_failed(error).is_some() {
                        return;
                    },
                    BrokerEvent::Alarm(reason) => self.alarm(reason),
                    BrokerEvent::Journal(message) => if self.journal_message(&message, broker).is_some() {
                        return;
                    },
                    BrokerEvent::Delivery(_) | BrokerEvent::Missing(_) => {}
                },
            }
        }
    }

    /// A standby learns what the active worker does, so that it can take over at once.
    fn follow_journal(&mut self, broker: &mut impl Broker) {
        let Context { worker, environment, settings, .. } = &*self.context;
        if matches!(broker.journal(), JournalState::Ready) {
            self.journal = Some(SessionJournal::follow(worker, environment.id(), settings));
            broker.read_journal(ReadFrom::Last);
        }
    }

    /// The first delivery: this is the active worker from now on. Another one may have been active until now.
    fn become_active(&mut self, broker: &mut impl Broker) {
        if self.journal.is_none() {
            self.follow_journal(broker);
        }
        let Context { worker, settings, status, publishers, .. } = &*self.context;
        worker.search_again();
        tracing::info!(event = "worker_active", "received a message, this worker is the active one");
        let state = broker.journal();
        let Some(journal) = &mut self.journal else {
            let state = state.clone();
            return self.work_without_journal(&state);
        };
        let worked_without = status.journal().is_some_and(|before| before != state.label());
        journal.set_blocked(status.is_alarmed());
        journal.set_worked_without(worked_without);
        journal.take_over(Arc::clone(&publishers.journal), settings, self.journal_failures.0.clone());
        self.state.set_taking_over(true);
    }

    fn work_without_journal(&mut self, state: &JournalState) {
        let Context { worker, environment, settings, metrics, status, publishers, .. } = &*self.context;
        status.set_journal(state.label());
        metrics.set_journal(Some(state));
        worker.forget();
        if let JournalState::Unusable(error) = state {
            tracing::warn!(
                event = "journal_unusable",
                %error,
                "working without a journal, creations wait for search after each start"
            );
            let publish = Arc::clone(&publishers.journal);
            self.absence = Some(Absence::report(worker.clone(), environment.id(), publish, settings));
        }
    }

    /// The journal cannot be written or read. That it exists does not tell whether the user may use it, and whether the
    /// node has a replica of it. Before messages have started, the session can do without it.
    fn journal_failed(&mut self, error: BrokerError) -> Option<End> {
        let is_refused = matches!(
            error,
            BrokerError::Forbidden(_)
                | BrokerError::Conflict { .. }
                | BrokerError::Missing(_)
                | BrokerError::Unroutable { .. }
                | BrokerError::Unconfirmed(_)
        );
        if self.journal.as_ref().is_some_and(|journal| !journal.is_active()) {
            tracing::debug!(%error, "the journal cannot be followed, trying it again at the first delivery");
            self.journal = None;
            return None;
        }
        if self.journal.is_some() && !(is_refused && self.state.is_taking_over()) {
            return Some(End::Lost(error));
        }
        // Reading and writing may both be refused.
        if self.journal.take().is_some() {
            self.state.set_taking_over(false);
            self.work_without_journal(&JournalState::Unusable(error));
        }
        None
    }

    fn journal_message(&mut self, message: &JournalMessage, broker: &mut impl Broker) -> Option<End> {
        match self.journal.as_mut()?.received(message) {
            Instruction::Nothing => {}
            Instruction::Read(from) => broker.read_journal(from),
            Instruction::Ready => {
                self.state.set_taking_over(false);
                self.context.status.set_journal(JournalState::Ready.label());
                self.context.metrics.set_journal(Some(&JournalState::Ready));
            }
            Instruction::TakenOver => return Some(End::Lost(BrokerError::TakenOver)),
        }
        None
    }

    /// Ends the session: messages that were not settled return to the queue when the channel is closed.
    async fn hand_back(mut self) -> SessionStats {
        self.context.stop.cancel();
        while let Some(task) = self.tasks.join_next().await {
            self.processed(task);
        }
        while let Some(skip) = self.skips.join_next().await {
            self.skipped(skip);
        }
        let Context { metrics, status, worker, .. } = &*self.context;
        worker.stall_guard().disarm();
        let stats = self.state.stats();
        metrics.set_load(0, 0);
        metrics.set_journal(None);
        metrics.set_unanswered_creations(0);
        metrics.handed_back(stats.handed_back);
        // The broker announces an alarm on the next connection again, and the next session checks what is missing.
        metrics.set_broker_alarm(false);
        status.set_alarm(None);
        metrics.set_broker_trouble(None);
        status.set_missing(None);
        stats
    }

    fn receive(&mut self, message: ReceivedMessage) {
        let id = message.envelope.delay_id;
        if let Some(outcome) = message.outcome().cloned() {
            self.state.skip(id);
            self.skips.spawn(skip(Arc::clone(&self.context), message, outcome));
            return;
        }
        let (keys, priority) = (message.keys(), message.envelope.priority());
        self.state.schedule(keys, priority, id, message);
    }

    /// Starts everything that may run now.
    fn start_tasks(&mut self) {
        let Context { worker, environment, .. } = &*self.context;
        let can_merge = |first: &ReceivedMessage, next: &ReceivedMessage| next.can_merge_with(first, worker);
        while let Some(next) = self.state.next(Instant::now(), || environment.draw(), can_merge) {
            let run = match next {
                Next::Run(run) => run,
                Next::Defer(job, message, until) => vec![self.defer(job, message, until)],
            };
            let Some((_, first)) = run.first() else { continue };
            let run_context = RunContext {
                attempts: first.envelope.attempts,
                age: first.envelope.age(environment.now()),
                priority: first.envelope.priority(),
                journal: self.journal.as_ref().map(SessionJournal::handle).unwrap_or_default(),
            };
            // tokio copies a future several times before it runs, and this one is large.
            self.tasks.spawn(Box::pin(process(Arc::clone(&self.context), run, run_context)));
        }
    }

    fn defer(&self, job: JobId, message: ReceivedMessage, until: Instant) -> (JobId, ReceivedMessage) {
        self.context.metrics.yielded();
        let wait = until.saturating_duration_since(Instant::now());
        (job, message.deferred(self.context.worker.settings().retry.level_for(wait)))
    }

    fn processed(&mut self, task: Result<Processed<ReceivedMessage>, JoinError>) -> Option<End> {
        let now = Instant::now();
        task.map_or_else(|_| Some(panicked()), |processed| self.state.processed(processed, now))
    }

    fn skipped(&mut self, skip: Result<Settlement, JoinError>) -> Option<End> {
        skip.map_or_else(|_| Some(panicked()), |settlement| self.state.settled(settlement))
    }

    fn report_load(&self) {
        let load = self.state.load();
        self.context.metrics.set_load(load.in_progress + self.skips.len(), load.waiting);
        let Context { worker, metrics, status, .. } = &*self.context;
        worker.set_backlog(load.saturated);
        for kind in ChangeKind::VARIANTS {
            // Of a standby it is old.
            let lag = worker.search_lag(*kind).filter(|_| self.state.is_consuming());
            metrics.set_search_lag(*kind, lag);
            status.set_search_lag(*kind, lag);
        }
    }

    /// Close works, or there was no pause.
    fn breaker_closed(&self) {
        let Context { settings, worker, metrics, status, .. } = &*self.context;
        if self.resume == Resume::HalfOpen {
            worker.close_breaker();
        }
        metrics.paused(None);
        status.set(State::StandingBy, None);
        if self.resume == Resume::Normal {
            tracing::info!(
                event = "broker_connected",
                queue = settings.queue,
                "connected to RabbitMQ, waiting for messages"
            );
        } else {
            tracing::info!(event = "close_recovered", "Close recovered; resuming with reduced concurrency");
        }
    }

    /// During an alarm only messages that need no successor are settled.
    fn alarm(&self, reason: Option<String>) {
        if let Some(reason) = &reason {
            tracing::warn!(
                event = "alarm_raised",
                reason,
                "RabbitMQ raised an alarm, publishing is blocked until it clears"
            );
        } else {
            tracing::info!(event = "alarm_cleared", "RabbitMQ cleared the alarm");
        }
        if let Some(journal) = &self.journal {
            journal.set_blocked(reason.is_some());
        }
        self.context.metrics.set_broker_alarm(reason.is_some());
        self.context.status.set_alarm(reason);
    }

    /// Messages that do not need what is missing go on.
    fn missing(&self, missing: Option<&BrokerError>) {
        if let Some(error) = missing {
            tracing::error!(event = "topology_incomplete", %error, "exchange or queue missing, continuing without it");
        } else {
            tracing::info!(event = "topology_complete", "all exchanges and queues exist again");
        }
        self.context.metrics.set_broker_trouble(missing.map(BrokerError::trouble));
        self.context.status.set_missing(missing.map(ToString::to_string));
    }
}

/// Work on a message and its settlement are guarded against panics. This one was around them.
fn panicked() -> End {
    End::Lost(BrokerError::Lost("a task panicked".into()))
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
