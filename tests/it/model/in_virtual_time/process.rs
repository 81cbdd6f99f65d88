//! A worker process as `amqp::session` and `app` make one of a [`Scheduler`] and a [`Worker`]: it consumes, works,
//! settles, and pauses when Close cannot be worked with. It is a copy of that loop, without its grace period, its
//! pulse and what it shows to operators: these are tried with real parts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use close_sync::close::{Client, Priority};
use close_sync::consumer::scheduler::delayed::DelayedMessages;
use close_sync::consumer::scheduler::key_queues::JobId;
use close_sync::consumer::scheduler::{Completion, Next, Scheduler};
use close_sync::domain::decision::Decision;
use close_sync::domain::mapping::{Key, Mapping};
use close_sync::outcome::{DelayCause, Outcome, PauseCause};
use close_sync::sync::circuit_breaker::HALF_OPEN_PROBES;
use close_sync::sync::{Job, Prepared, ReceivedAt, RunContext, Settings, Worker};
use close_sync::telemetry::metrics::Metrics;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::broker::{Channel, Delivery, Message};
use super::world::{Line, TIMEOUT, World};

/// What all workers are made of.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) settings: Settings,
    pub(super) rules: close_sync::domain::mapping::Rules,
    pub(super) mapping: Mapping,
    pub(super) metrics: Metrics,
}

/// A handle on a process that runs.
pub(super) struct Process {
    world: Arc<World>,
    alive: Arc<AtomicBool>,
    cut: Arc<Notify>,
    channel: Arc<std::sync::Mutex<Option<Channel>>>,
    task: tokio::task::JoinHandle<()>,
}

/// A connection that is lost is noticed by the broker after this. What was under way has arrived by then.
const NOTICED: Duration = Duration::from_millis(250);

impl Process {
    /// Starts one that knows nothing.
    pub(super) fn start(world: &Arc<World>, number: usize, parts: Parts) -> Self {
        let alive = Arc::new(AtomicBool::new(true));
        let line = Line { world: Arc::clone(world), process: number, alive: Arc::clone(&alive) };
        let client = Client::with_transport(line, TIMEOUT, 1.0, |_| {});
        let Parts { settings, rules, mapping, metrics } = parts;
        let worker = Worker::new(settings, &rules, mapping, client, metrics);
        let (cut, channel) = (Arc::<Notify>::default(), Arc::default());
        let process = Life {
            world: Arc::clone(world),
            number,
            worker,
            cut: Arc::clone(&cut),
            channel: Arc::clone(&channel),
        };
        world.tell(format_args!("process {number} starts"));
        let task = tokio::spawn(process.live());
        Self { world: Arc::clone(world), alive, cut, channel, task }
    }

    /// Whether it is the active consumer.
    pub(super) fn is_active(&self) -> bool {
        let channel = *self.channel.lock().unwrap();
        channel.is_some() && channel == self.world.broker().active()
    }

    /// It loses its connection to the broker.
    pub(super) fn cut_off(&self) {
        self.cut.notify_one();
    }

    /// It is gone at once.
    pub(super) async fn kill(self) {
        self.alive.store(false, Ordering::Relaxed);
        self.task.abort();
        let channel = *self.channel.lock().unwrap();
        if let Some(channel) = channel {
            lose(&self.world, channel).await;
        }
    }
}

/// The broker notices that a consumer is gone.
async fn lose(world: &World, channel: Channel) {
    tokio::time::sleep(NOTICED).await;
    let acks_arrive = world.random(fastrand::Rng::bool);
    world.broker().unsubscribe(channel, acks_arrive);
}

struct Life {
    world: Arc<World>,
    number: usize,
    worker: Worker,
    cut: Arc<Notify>,
    channel: Arc<std::sync::Mutex<Option<Channel>>>,
}

struct Incoming {
    delivery: Delivery,
    prepared: Prepared,
    alone: bool,
}

enum Ended {
    Each(Vec<(JobId, Done)>),
    Apart(Vec<(JobId, Incoming)>),
}

enum Done {
    Settled { by_close: bool, fate: Completion },
    Paused(PauseCause),
}

impl Life {
    async fn live(self) {
        let mut on_trial = false;
        let mut detours = DelayedMessages::default();
        loop {
            let (channel, deliveries) = self.world.broker().subscribe();
            *self.channel.lock().unwrap() = Some(channel);
            let (paused, breaker_closed) = self.session(channel, deliveries, &mut detours, on_trial).await;
            on_trial &= !breaker_closed;
            if let Some(cause) = paused {
                self.world.tell(format_args!("process {} pauses: {}", self.number, cause.label()));
                // As long as the last acks of a session are waited for.
                tokio::time::sleep(Duration::from_millis(200)).await;
                self.world.broker().unsubscribe(channel, true);
                let mut wait = Duration::from_secs(1);
                loop {
                    tokio::time::sleep(wait).await;
                    if self.worker.refresh_mapping().await.is_ok() {
                        break;
                    }
                    wait = (wait * 2).min(Duration::from_mins(1));
                }
                self.worker.half_open_breaker();
                on_trial = true;
            } else {
                self.world.tell(format_args!("process {} is cut off", self.number));
                lose(&self.world, channel).await;
            }
        }
    }

    /// Consumes until the connection is lost, or there is a reason to pause. Tells whether Close did its part.
    async fn session(
        &self,
        channel: Channel,
        mut deliveries: mpsc::UnboundedReceiver<Delivery>,
        detours: &mut DelayedMessages<Key>,
        on_trial: bool,
    ) -> (Option<PauseCause>, bool) {
        let concurrency = self.world.plan.concurrency;
        let mut search_complete_from = None;
        let mut desk = Scheduler::new(detours);
        let mut tasks = JoinSet::new();
        let mut by_close = 0;
        loop {
            let at_once = if on_trial { concurrency.min(by_close + HALF_OPEN_PROBES) } else { concurrency };
            while tasks.len() < at_once {
                let along = |first: &Incoming, next: &Incoming| next.goes_along(first, &self.worker);
                let next = if at_once < concurrency {
                    desk.any(self.world.random(|random| random.usize(..1000)))
                } else {
                    desk.next(along)
                };
                let run = match next {
                    None => break,
                    Some(Next::Run(run)) => run,
                    Some(Next::Defer(ticket, incoming, until)) => {
                        let wait = until.saturating_duration_since(Instant::now());
                        let level = self.worker.settings().retry.level_for(wait);
                        vec![(ticket, incoming.behind(level))]
                    }
                };
                let message = &run[0].1.delivery.message;
                let turn = RunContext {
                    attempts: message.attempts,
                    priority: priority(message),
                    search_complete_from: search_complete_from.unwrap_or_else(Instant::now),
                };
                let around = (Arc::clone(&self.world), self.worker.clone(), channel, self.number);
                tasks.spawn(work(around, run, turn));
            }
            self.worker.set_backlog(tasks.len() == concurrency && desk.waiting() >= concurrency);
            tokio::select! {
                biased;
                () = self.cut.notified() => return (None, by_close > 0),
                Some(ended) = tasks.join_next() => {
                    let each = match ended.unwrap() {
                        Ended::Each(each) => each,
                        Ended::Apart(run) => {
                            for (ticket, incoming) in run {
                                desk.put_back(ticket, incoming);
                            }
                            continue;
                        }
                    };
                    for (ticket, done) in each {
                        match done {
                            Done::Settled { by_close: yes, fate } => {
                                if yes && by_close == 0 && on_trial {
                                    self.worker.close_breaker();
                                }
                                by_close += usize::from(yes);
                                desk.finish(ticket, fate);
                            }
                            Done::Paused(cause) => return (Some(cause), by_close > 0),
                        }
                    }
                }
                Some(delivery) = deliveries.recv() => {
                    let lag = self.worker.settings().search_lag;
                    search_complete_from.get_or_insert_with(|| {
                        self.worker.forget_records();
                        Instant::now() + lag
                    });
                    let arrival = ReceivedAt { published: None, received: self.world.now() };
                    let prepared = self.worker.prepare(&delivery.message.body, arrival);
                    let keys = match &prepared {
                        Prepared::Job(job) => job.keys(),
                        Prepared::Settled(_) => Vec::new(),
                    };
                    let (rank, detour) = (priority(&delivery.message), delivery.message.detour);
                    desk.receive(keys, rank, detour, Incoming { delivery, prepared, alone: false });
                }
            }
        }
    }
}

impl Incoming {
    fn job(&self) -> Option<&Job> {
        match &self.prepared {
            Prepared::Job(job) => Some(job),
            Prepared::Settled(_) => None,
        }
    }

    fn goes_along(&self, first: &Self, worker: &Worker) -> bool {
        let jobs = first.job().zip(self.job()).filter(|_| !first.alone && !self.alone);
        jobs.is_some_and(|(first, next)| worker.can_merge(first, next))
    }

    fn behind(self, level: usize) -> Self {
        let yields = Outcome::Delayed { level, cause: DelayCause::BehindEarlier };
        Self { prepared: Prepared::Settled(yields), ..self }
    }
}

fn priority(message: &Message) -> Priority {
    if message.attempts == 0 { Priority::Live } else { Priority::Retry }
}

/// Works on deliveries, and settles each.
async fn work(
    (world, worker, channel, process): (Arc<World>, Worker, Channel, usize),
    run: Vec<(JobId, Incoming)>,
    turn: RunContext,
) -> Ended {
    let numbers: Vec<_> = run.iter().map(|(_, incoming)| incoming.delivery.message.number).collect();
    world.tell(format_args!("process {process}: {numbers:?} begin"));
    let outcomes = match &run[0].1.prepared {
        Prepared::Settled(outcome) => vec![(outcome.clone(), Decision::default())],
        Prepared::Job(job) if run.len() == 1 => vec![worker.run(job, turn).await],
        Prepared::Job(_) => {
            let jobs: Vec<_> = run.iter().filter_map(|(_, incoming)| incoming.job()).collect();
            let Some(outcomes) = worker.run_merged(&jobs, turn).await else {
                world.tell(format_args!("process {process}: {numbers:?} failed together"));
                let alone = |(ticket, incoming)| (ticket, Incoming { alone: true, ..incoming });
                return Ended::Apart(run.into_iter().map(alone).collect());
            };
            outcomes
        }
    };
    let mut each = Vec::with_capacity(run.len());
    for ((ticket, incoming), (outcome, decision)) in run.into_iter().zip(outcomes) {
        let Delivery { tag, message } = incoming.delivery;
        let number = message.number;
        world.tell(format_args!("process {process}: {number} ends: {outcome:?}, {}", decision.summary()));
        let mut fate = Completion::Done;
        match &outcome {
            Outcome::Synced(_) | Outcome::Skipped(_) => world.settled(number),
            Outcome::Delayed { level, cause } => {
                let delay = worker.settings().retry.delays[*level];
                let attempts = message.attempts + u32::from(cause.uses_attempt());
                let id = message.detour.unwrap_or_else(|| world.random(|r| Uuid::from_u128(r.u128(..))));
                world.delay(Message { attempts, detour: Some(id), ..message }, delay).await;
                fate = Completion::Delayed { id, due: Instant::now() + delay };
            }
            Outcome::Dead(dead) => {
                world.travel().await;
                world.broker().dead.push((number, dead.reason.label()));
                world.travel().await;
            }
            Outcome::Paused(cause) => {
                each.push((ticket, Done::Paused(*cause)));
                continue;
            }
        }
        world.ack(channel, tag);
        each.push((ticket, Done::Settled { by_close: outcome.proves_close(), fate }));
    }
    Ended::Each(each)
}
