//! A worker process: the real [`Session`] on the simulated broker. It pauses between sessions as the supervisor does.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use close_sync::amqp::envelope::{REASON, text};
use close_sync::amqp::publisher::Outgoing;
use close_sync::amqp::{self, BrokerError, JournalState};
use close_sync::close::Client;
use close_sync::consumer::broker::{self, BrokerEvent, Publish, Publishers, ReadFrom, Receipt};
use close_sync::consumer::quarantine::Quarantine;
use close_sync::consumer::scheduler::delayed::DelayedMessages;
use close_sync::consumer::{End, Environment, Session};
use close_sync::domain::mapping::{Mapping, Rules};
use close_sync::sync::{Dependencies, Settings, Worker};
use close_sync::telemetry::metrics::Metrics;
use close_sync::telemetry::status::Status;
use futures_util::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};
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
}

/// A handle to a running process.
pub(super) struct Process {
    world: Arc<World>,
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
        let client = Client::with_transport(transport, TIMEOUT, 1.0, |_| {});
        let WorkerConfig { amqp, settings, rules, mapping, metrics } = config;
        let session = Session {
            destination: Some(format!("process {number}").into()),
            settings: amqp,
            worker: Worker::new(Dependencies {
                settings,
                rules: &rules,
                mapping,
                client,
                metrics: metrics.clone(),
                clock: {
                    let world = Arc::clone(world);
                    Arc::new(move || world.now())
                },
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
            session,
            cut: Arc::clone(&cut),
            channel: Arc::clone(&channel),
        };
        world.log(format_args!("process {number} starts"));
        let task = tokio::spawn(process.run());
        Self { world: Arc::clone(world), alive, cut, channel, task }
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
                    settings: Arc::clone(&self.session.settings),
                    replaced: Mutex::default(),
                }),
                channel,
                deliveries,
                cut: Arc::clone(&self.cut),
                is_cut: false,
                process: self.number,
                journal: JournalState::Ready,
                read_next: None,
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
    /// What is read next in the journal.
    read_next: Option<usize>,
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
            message = world.journal.read(self.read_next) => {
                self.read_next = self.read_next.map(|next| next + 1);
                BrokerEvent::Journal(message)
            }
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
            journal: Arc::new(JournalPublisher(Arc::clone(&self.publisher.world))),
            replays: publisher(),
            producers: publisher(),
        }
    }

    fn stall_limit(&self) -> Duration {
        Duration::from_secs(20)
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

/// Appends to the journal. Whoever is killed meanwhile does not know whether it did.
struct JournalPublisher(Arc<World>);

impl Publish for JournalPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move {
            let travel = || self.0.random(|random| Duration::from_millis(random.u64(0..=20)));
            tokio::time::sleep(travel()).await;
            self.0.journal.append(message.body.to_vec());
            tokio::time::sleep(travel()).await;
            Ok(())
        }
        .boxed()
    }
}

/// Publishes to the simulated delay queues and dead-letter queue.
struct SimulatedPublisher {
    world: Arc<World>,
    settings: Arc<amqp::Settings>,
    /// Unacked messages of which a copy was published.
    replaced: Mutex<HashSet<usize>>,
}

impl Publish for SimulatedPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move {
            let Self { world, settings, replaced } = self;
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
        let SimulatedPublisher { world, replaced, .. } = &*self.publisher;
        if !replaced.lock().unwrap().remove(&self.number) {
            world.mark_settled(self.number);
        }
        world.ack(self.channel, self.tag);
        std::future::ready(Ok(true)).boxed()
    }

    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        panic!("message {}: the simulated broker refuses no message", self.number)
    }
}
