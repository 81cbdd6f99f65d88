//! A worker process: the real [`Session`] on the simulated broker. It pauses between sessions as the supervisor does.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use close_sync::amqp::envelope::{REASON, text};
use close_sync::amqp::publisher::Outgoing;
use close_sync::amqp::{self, BrokerError, JournalState};
use close_sync::close::{Client, Clock};
use close_sync::consumer::broker::{
    self, BrokerEvent, JournalMessage, Publish, Publishers, ReadFrom, Receipt,
};
use close_sync::consumer::quarantine::Quarantine;
use close_sync::consumer::scheduler::delayed::DelayedMessages;
use close_sync::consumer::{End, Environment, Session};
use close_sync::domain::journal::Batch;
use close_sync::domain::mapping::{Mapping, Rules};
use close_sync::sync::{Dependencies, Settings, Worker};
use close_sync::telemetry::metrics::Metrics;
use close_sync::telemetry::status::Status;
use futures_util::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::broker::{Channel, Delivery, Message};
use super::world::{SimulatedTransport, TIMEOUT, World};

/// The configuration of all workers.
#[derive(Clone)]
pub(super) struct WorkerConfig {
    pub(super) amqp: Arc<amqp::Settings>,
    pub(super) settings: Settings,
    pub(super) rules: Rules,
    pub(super) mapping: Mapping,
    pub(super) metrics: Metrics,
    /// Leads with more Contacts are read without them.
    pub(super) many_contacts: usize,
}

/// A handle to a running process.
pub(super) struct Process {
    world: Arc<World>,
    pub(super) number: usize,
    alive: Arc<AtomicBool>,
    cut: Arc<Notify>,
    channel: Arc<Mutex<Option<Channel>>>,
    task: tokio::task::JoinHandle<()>,
}

/// The broker detects a lost connection after this time. Everything in flight has arrived by then.
const DETECTION_DELAY: Duration = Duration::from_millis(250);

/// The maximum latency of the last acks of a session.
const LAST_ACKS_DELAY: Duration = Duration::from_millis(200);

impl Process {
    /// Starts a process with empty caches.
    pub(super) fn start(world: &Arc<World>, number: usize, config: WorkerConfig) -> Self {
        let alive = Arc::new(AtomicBool::new(true));
        let transport =
            SimulatedTransport { world: Arc::clone(world), process: number, alive: Arc::clone(&alive) };
        let WorkerConfig { amqp, settings, rules, mapping, metrics, many_contacts } = config;
        let clock = {
            let world = Arc::clone(world);
            Clock::new(move || world.own_time())
        };
        // It has created something before: no clock helps against a first creation without an answer.
        clock.synchronize(world.now(), Duration::ZERO);
        let client = Client::with_transport(transport, TIMEOUT, world.plan.share, |_| {});
        let client = client.with_many_contacts(many_contacts).with_clock(clock);
        let session = Session {
            destination: Some(format!("process {number}").into()),
            settings: amqp,
            worker: Worker::new(Dependencies {
                settings,
                rules: &rules,
                mapping,
                client,
                metrics: metrics.clone(),
            }),
            metrics,
            status: Status::default(),
            concurrency: world.plan.concurrency,
            // There is no graceful shutdown here: a process is killed or disconnected.
            grace: Duration::ZERO,
            quarantine: Quarantine::default(),
            paused_before: None,
        };
        let (cut, channel) = (Arc::<Notify>::default(), Arc::default());
        let process = ProcessTask {
            world: Arc::clone(world),
            number,
            alive: Arc::clone(&alive),
            session,
            cut: Arc::clone(&cut),
            channel: Arc::clone(&channel),
        };
        world.log(format_args!("process {number} starts"));
        let task = tokio::spawn(process.run());
        Self { world: Arc::clone(world), number, alive, cut, channel, task }
    }

    /// Whether it is the active consumer.
    pub(super) fn is_active(&self) -> bool {
        let channel = *self.channel.lock().unwrap();
        channel.is_some() && channel == self.world.broker().active()
    }

    /// Cuts the connection to the broker.
    pub(super) fn disconnect(&self) {
        self.cut.notify_one();
    }

    /// The broker gives the queue to another process. This one notices it later.
    pub(super) fn supersede(&self, noticed_after: Duration) {
        let Some(channel) = *self.channel.lock().unwrap() else { return };
        let acks_arrive = self.world.random(fastrand::Rng::bool);
        self.world.broker().unsubscribe(channel, acks_arrive);
        let cut = Arc::clone(&self.cut);
        tokio::spawn(async move {
            tokio::time::sleep(noticed_after).await;
            cut.notify_one();
        });
    }

    /// The same, in a small world: what is in flight decides when it notices.
    pub(super) fn lose_queue(&self) {
        let channel = *self.channel.lock().unwrap();
        self.world.broker().unsubscribe(channel.expect("a consumer"), false);
    }

    /// Kills the process, in a small world. The broker notices it at once.
    pub(super) fn crash(self) {
        self.alive.store(false, Ordering::Relaxed);
        self.task.abort();
        self.lose_queue();
    }

    /// Kills the process.
    pub(super) async fn kill(self) {
        self.alive.store(false, Ordering::Relaxed);
        self.task.abort();
        let channel = *self.channel.lock().unwrap();
        if let Some(channel) = channel {
            disconnect(&self.world, channel).await;
        }
    }
}

/// The broker detects that a consumer is disconnected.
async fn disconnect(world: &World, channel: Channel) {
    tokio::time::sleep(DETECTION_DELAY).await;
    let acks_arrive = world.random(fastrand::Rng::bool);
    world.broker().unsubscribe(channel, acks_arrive);
}

struct ProcessTask {
    world: Arc<World>,
    number: usize,
    alive: Arc<AtomicBool>,
    session: Session,
    cut: Arc<Notify>,
    channel: Arc<Mutex<Option<Channel>>>,
}

impl ProcessTask {
    /// Runs one session after the other.
    async fn run(mut self) {
        let mut delayed = DelayedMessages::default();
        let environment: Arc<dyn Environment> = Arc::new(SeededEnvironment(Arc::clone(&self.world)));
        loop {
            let (channel, deliveries) = self.world.broker().subscribe();
            *self.channel.lock().unwrap() = Some(channel);
            let broker = SimulatedBroker {
                publisher: Arc::new(SimulatedPublisher {
                    world: Arc::clone(&self.world),
                    process: self.number,
                    alive: Arc::clone(&self.alive),
                    settings: Arc::clone(&self.session.settings),
                    replaced: Mutex::default(),
                }),
                channel,
                deliveries,
                cut: Arc::clone(&self.cut),
                is_cut: false,
                process: self.number,
                journal: match self.world.plan.journal {
                    Some(_) => JournalState::Ready,
                    None => JournalState::Unusable(BrokerError::Lost("no journal".into())),
                },
                journal_session: Arc::default(),
                read_next: None,
                has_started: false,
            };
            let shutdown = CancellationToken::new();
            let session = self.session.run_on(broker, Arc::clone(&environment), &mut delayed, &shutdown);
            let (end, stats) = session.await;
            if stats.breaker_closed {
                self.session.paused_before = None;
            }
            match end {
                End::Paused(cause) => {
                    self.world.log(format_args!("process {} pauses: {}", self.number, cause.label()));
                    let mut wait = Duration::from_secs(1);
                    loop {
                        tokio::time::sleep(wait).await;
                        if self.session.worker.refresh_mapping().await.is_ok() {
                            break;
                        }
                        wait = (wait * 2).min(Duration::from_mins(1));
                    }
                    self.session.worker.half_open_breaker();
                    self.session.paused_before = Some(cause);
                }
                End::Lost(BrokerError::Cancelled) => {}
                End::Lost(BrokerError::TakenOver) => {
                    self.world.log(format_args!("process {} learns that another took over", self.number));
                }
                end @ (End::Lost(_) | End::Stopped) => panic!("{end:?}"),
            }
        }
    }
}

/// Virtual time, and random numbers from the seed.
struct SeededEnvironment(Arc<World>);

impl Environment for SeededEnvironment {
    fn now(&self) -> Timestamp {
        self.0.now()
    }

    fn draw(&self) -> usize {
        self.0.random(|random| random.usize(..1000))
    }

    fn id(&self) -> Uuid {
        self.0.random(|random| Uuid::from_u128(random.u128(..)))
    }
}

/// The connection of one session to the simulated broker.
struct SimulatedBroker {
    publisher: Arc<SimulatedPublisher>,
    channel: Channel,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    cut: Arc<Notify>,
    is_cut: bool,
    process: usize,
    journal: JournalState,
    /// The session, once it has appended its start.
    journal_session: Arc<OnceLock<Uuid>>,
    /// What is read next in the journal.
    read_next: Option<usize>,
    /// It has read its own start.
    has_started: bool,
}

impl SimulatedBroker {
    /// A message of the journal as this worker reads it.
    fn read(&mut self, mut message: JournalMessage) -> JournalMessage {
        let world = &self.publisher.world;
        self.read_next = Some(usize::try_from(message.position).unwrap() + 1);
        if let Some(mutant) = world.plan.mutant {
            let session = self.journal_session.get().copied();
            message.body = mutant.read(&message.body, session, self.has_started, world.now());
            let batch = Batch::decode(&message.body).expect("a message of the journal");
            self.has_started |= Some(batch.session) == session;
        }
        message
    }
}

impl broker::Broker for SimulatedBroker {
    async fn next_event(&mut self) -> BrokerEvent {
        let world = Arc::clone(&self.publisher.world);
        tokio::select! {
            biased;
            () = self.cut.notified() => {
                self.is_cut = true;
                BrokerEvent::Lost(BrokerError::Cancelled)
            }
            Some(Delivery { tag, message }) = self.deliveries.recv() => {
                let Message { number, exchange, body, properties } = message;
                let publisher = Arc::clone(&self.publisher);
                BrokerEvent::Delivery(Box::new(broker::Delivery {
                    properties,
                    exchange,
                    routing_key: "users".into(),
                    redelivered: false,
                    body,
                    receipt: Box::new(SimulatedReceipt { publisher, channel: self.channel, tag, number }),
                }))
            }
            message = world.journal.read(self.read_next) => BrokerEvent::Journal(self.read(message)),
        }
    }

    fn stop_receiving(&mut self) {
        self.deliveries.close();
    }

    fn journal(&self) -> &JournalState {
        &self.journal
    }

    fn read_journal(&mut self, from: ReadFrom) {
        self.read_next = Some(self.publisher.world.journal.position(from));
    }

    fn publishers(&self) -> Publishers {
        let publisher = || Arc::clone(&self.publisher) as Arc<dyn Publish>;
        Publishers {
            successors: publisher(),
            quarantine: publisher(),
            journal: Arc::new(JournalPublisher {
                world: Arc::clone(&self.publisher.world),
                process: self.process,
                alive: Arc::clone(&self.publisher.alive),
                session: Arc::clone(&self.journal_session),
            }),
            replays: publisher(),
            producers: publisher(),
        }
    }

    /// Long, because each heartbeat costs time.
    fn stall_limit(&self) -> Duration {
        Duration::from_hours(1)
    }

    async fn close(self) {
        let world = &self.publisher.world;
        if self.is_cut {
            world.log(format_args!("process {} is disconnected", self.process));
            disconnect(world, self.channel).await;
        } else {
            tokio::time::sleep(LAST_ACKS_DELAY).await;
            world.broker().unsubscribe(self.channel, true);
        }
    }
}

/// Appends to the journal. An entry in flight arrives also after its worker was killed, or is lost.
struct JournalPublisher {
    world: Arc<World>,
    process: usize,
    alive: Arc<AtomicBool>,
    session: Arc<OnceLock<Uuid>>,
}

impl Publish for JournalPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        let world = Arc::clone(&self.world);
        let body = world.plan.mutant.map_or_else(|| message.body.to_vec(), |it| it.appended(message.body));
        if world.plan.mutant.is_some() {
            let batch = Batch::decode(&body).expect("a message of the journal");
            self.session.get_or_init(|| batch.session);
        }
        if let Some(steps) = self.world.steps() {
            return async move {
                steps.append(self.process, &self.alive, body).await;
                Ok(())
            }
            .boxed();
        }
        let latency = world.plan.journal.map_or(Duration::ZERO, |journal| journal.latency);
        let latency = u64::try_from(latency.as_millis()).unwrap();
        let travel = || Duration::from_millis(world.random(|random| random.u64(0..=latency)));
        let (there, back, survives) = (travel(), travel(), world.random(fastrand::Rng::bool));
        let (arrived, is_stored) = oneshot::channel();
        tokio::spawn(async move {
            tokio::time::sleep(there).await;
            if survives || !arrived.is_closed() {
                world.journal.append(body);
                // Its worker may be gone.
                let _ = arrived.send(());
            }
        });
        async move {
            let _ = is_stored.await;
            tokio::time::sleep(back).await;
            Ok(())
        }
        .boxed()
    }
}

/// Publishes to the simulated delay queues and dead-letter queue.
struct SimulatedPublisher {
    world: Arc<World>,
    process: usize,
    alive: Arc<AtomicBool>,
    settings: Arc<amqp::Settings>,
    /// Unacked messages of which a copy was published.
    replaced: Mutex<HashSet<usize>>,
}

impl Publish for SimulatedPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move {
            let Self { world, settings, replaced, .. } = self;
            let Outgoing { exchange, key, body, properties } = message;
            let number: usize = properties.message_id().as_ref().unwrap().as_str().parse().unwrap();
            if exchange == settings.dead_letter_queue() {
                world.dead_letter(number, text(&properties, REASON).unwrap()).await;
            } else {
                assert_eq!(exchange, settings.retry_exchange());
                let delay = settings.delays.iter().find(|delay| delay.name == key).expect("a delay queue");
                let message =
                    Message { number, exchange: exchange.to_owned(), body: body.to_vec(), properties };
                world.delay(message, delay.duration).await;
            }
            replaced.lock().unwrap().insert(number);
            Ok(())
        }
        .boxed()
    }
}

struct SimulatedReceipt {
    publisher: Arc<SimulatedPublisher>,
    channel: Channel,
    tag: u64,
    number: usize,
}

impl Receipt for SimulatedReceipt {
    fn ack(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        let SimulatedPublisher { world, process, alive, replaced, .. } = &*self.publisher;
        if !replaced.lock().unwrap().remove(&self.number) {
            world.mark_settled(self.number);
        }
        match world.steps() {
            Some(steps) => steps.ack(*process, alive, self.channel, self.tag),
            None => world.ack(self.channel, self.tag),
        }
        std::future::ready(Ok(true)).boxed()
    }

    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        panic!("message {}: the simulated broker refuses no message", self.number)
    }
}
