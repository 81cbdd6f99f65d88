//! A worker process: the real [`Session`] on a played broker, and the pauses between sessions as the supervisor makes
//! them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use close_sync::amqp::envelope::{REASON, text};
use close_sync::amqp::{self, BrokerError};
use close_sync::close::Client;
use close_sync::consumer::broker::{self, BrokerEvent, Publish, Publishers, Receipt};
use close_sync::consumer::scheduler::delayed::DelayedMessages;
use close_sync::consumer::{End, Environment, Session};
use close_sync::domain::mapping::{Mapping, Rules};
use close_sync::sync::{Dependencies, Settings, Worker};
use close_sync::telemetry::metrics::Metrics;
use close_sync::telemetry::status::Status;
use futures_util::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use lapin::BasicProperties;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::broker::{Channel, Delivery, Message};
use super::world::{Line, TIMEOUT, World};

/// What all workers are made of.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) amqp: Arc<amqp::Settings>,
    pub(super) settings: Settings,
    pub(super) rules: Rules,
    pub(super) mapping: Mapping,
    pub(super) metrics: Metrics,
}

/// A handle on a process that runs.
pub(super) struct Process {
    world: Arc<World>,
    alive: Arc<AtomicBool>,
    cut: Arc<Notify>,
    channel: Arc<Mutex<Option<Channel>>>,
    task: tokio::task::JoinHandle<()>,
}

/// The broker notices a lost connection after this. What was in flight has arrived by then.
const NOTICED: Duration = Duration::from_millis(250);

/// How long the last acks of a session may take.
const LAST_ACKS: Duration = Duration::from_millis(200);

impl Process {
    /// Starts one with empty caches.
    pub(super) fn start(world: &Arc<World>, number: usize, parts: Parts) -> Self {
        let alive = Arc::new(AtomicBool::new(true));
        let line = Line { world: Arc::clone(world), process: number, alive: Arc::clone(&alive) };
        let client = Client::with_transport(line, TIMEOUT, 1.0, |_| {});
        let Parts { amqp, settings, rules, mapping, metrics } = parts;
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
            // None is stopped in order: it is killed or cut off.
            grace: Duration::ZERO,
            paused_before: None,
        };
        let (cut, channel) = (Arc::<Notify>::default(), Arc::default());
        let process = Life {
            world: Arc::clone(world),
            number,
            session,
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
    session: Session,
    cut: Arc<Notify>,
    channel: Arc<Mutex<Option<Channel>>>,
}

impl Life {
    /// One session after the other.
    async fn live(mut self) {
        let mut delayed = DelayedMessages::default();
        let environment: Arc<dyn Environment> = Arc::new(Seeded(Arc::clone(&self.world)));
        loop {
            let (channel, deliveries) = self.world.broker().subscribe();
            *self.channel.lock().unwrap() = Some(channel);
            let broker = PlayedBroker {
                outgoing: Arc::new(Outgoing {
                    world: Arc::clone(&self.world),
                    settings: Arc::clone(&self.session.settings),
                    replaced: Mutex::default(),
                }),
                channel,
                deliveries,
                cut: Arc::clone(&self.cut),
                is_cut: false,
                process: self.number,
            };
            let shutdown = CancellationToken::new();
            let session = self.session.run_on(broker, Arc::clone(&environment), &mut delayed, &shutdown);
            let (end, stats) = session.await;
            if stats.breaker_closed {
                self.session.paused_before = None;
            }
            match end {
                End::Paused(cause) => {
                    self.world.tell(format_args!("process {} pauses: {}", self.number, cause.label()));
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

/// Close's clock, and chance from the seed.
struct Seeded(Arc<World>);

impl Environment for Seeded {
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

/// The connection of one session to the played broker.
struct PlayedBroker {
    outgoing: Arc<Outgoing>,
    channel: Channel,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    cut: Arc<Notify>,
    is_cut: bool,
    process: usize,
}

impl broker::Broker for PlayedBroker {
    async fn next_event(&mut self) -> BrokerEvent {
        tokio::select! {
            biased;
            () = self.cut.notified() => {
                self.is_cut = true;
                BrokerEvent::Lost(BrokerError::Cancelled)
            }
            Some(Delivery { tag, message }) = self.deliveries.recv() => {
                let Message { number, body, properties } = message;
                let outgoing = Arc::clone(&self.outgoing);
                BrokerEvent::Delivery(Box::new(broker::Delivery {
                    properties,
                    exchange: "identify".into(),
                    routing_key: "users".into(),
                    redelivered: false,
                    body,
                    receipt: Box::new(PlayedReceipt { outgoing, channel: self.channel, tag, number }),
                }))
            }
        }
    }

    fn stop_receiving(&mut self) {
        self.deliveries.close();
    }

    fn publishers(&self) -> Publishers {
        let outgoing = || Arc::clone(&self.outgoing) as Arc<dyn Publish>;
        Publishers { successors: outgoing(), replays: outgoing(), producers: outgoing() }
    }

    fn stall_limit(&self) -> Duration {
        Duration::from_secs(20)
    }

    async fn close(self) {
        let world = &self.outgoing.world;
        if self.is_cut {
            world.tell(format_args!("process {} is cut off", self.process));
            lose(world, self.channel).await;
        } else {
            tokio::time::sleep(LAST_ACKS).await;
            world.broker().unsubscribe(self.channel, true);
        }
    }
}

/// Publishes to the played delay queues and dead-letter queue.
struct Outgoing {
    world: Arc<World>,
    settings: Arc<amqp::Settings>,
    /// Messages that have a successor and are not acked.
    replaced: Mutex<HashSet<usize>>,
}

impl Publish for Outgoing {
    fn publish<'a>(
        &'a self,
        exchange: &'a str,
        key: &'a str,
        body: &'a [u8],
        properties: BasicProperties,
    ) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move {
            let Self { world, settings, replaced } = self;
            let number: usize = properties.message_id().as_ref().unwrap().as_str().parse().unwrap();
            if exchange == settings.dead_letter_queue() {
                world.dead_letter(number, text(&properties, REASON).unwrap()).await;
            } else {
                assert_eq!(exchange, settings.retry_exchange());
                let delay = settings.delays.iter().find(|delay| delay.name == key).expect("a delay queue");
                world.delay(Message { number, body: body.to_vec(), properties }, delay.duration).await;
            }
            replaced.lock().unwrap().insert(number);
            Ok(())
        }
        .boxed()
    }
}

struct PlayedReceipt {
    outgoing: Arc<Outgoing>,
    channel: Channel,
    tag: u64,
    number: usize,
}

impl Receipt for PlayedReceipt {
    fn ack(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        let Outgoing { world, replaced, .. } = &*self.outgoing;
        if !replaced.lock().unwrap().remove(&self.number) {
            world.settled(self.number);
        }
        world.ack(self.channel, self.tag);
        std::future::ready(Ok(true)).boxed()
    }

    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        panic!("{}: the played broker accepts messages of any size", self.number)
    }
}
