//! The connections of a session with lapin: the [`Broker`] in production.
//!
//! Two connections, as the broker blocks one that publishes during an alarm, and acks on it would be blocked too.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::{Stream, StreamExt, stream};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::FieldTable;
use lapin::{Acker, Channel, Connection, Event};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::amqp::publisher::{Outgoing, Publisher, UNANSWERED};
use crate::amqp::server_info::ServerInfo;
use crate::amqp::stream::{Offset, StreamMessage};
use crate::amqp::{
    self, ACK_FLUSH_TIME, BrokerError, JournalState, OpenConnection, Settings, disconnect, topology,
    with_timeout,
};
use crate::consumer::broker::{
    Broker, BrokerEvent, Delivery, JournalMessage, Publish, Publishers, ReadFrom, Receipt,
};
use crate::consumer::topology_monitor;
use crate::telemetry::metrics::Metrics;

/// How long publishing an outcome event may take: the next message about the same person waits for it.
const EVENT_PATIENCE: Duration = Duration::from_secs(2);
/// A channel for outcome events that the broker closed is not opened again before this.
const REOPEN_AFTER: Duration = Duration::from_secs(1);

/// The connections of a session and the events on them.
pub(crate) struct Connections {
    /// Aborts the connections when dropped, which is after closing them has succeeded or timed out. The first field, so
    /// that fields dropped later can no longer send anything.
    _cut: [DropGuard; 2],
    pub(crate) server: ServerInfo,
    consuming: Arc<Connection>,
    publishing: Arc<Connection>,
    channel: Channel,
    publishers: Publishers,
    deliveries: lapin::Consumer,
    events: stream::BoxStream<'static, BrokerEvent>,
    missing: stream::BoxStream<'static, Option<BrokerError>>,
    receiving: bool,
    journal_state: JournalState,
    journal_name: String,
    journal: Option<stream::BoxStream<'static, BrokerEvent>>,
}

impl Connections {
    pub(crate) async fn open(settings: &Arc<Settings>, metrics: &Metrics) -> Result<Self, BrokerError> {
        // Events are not kept for a later listener, so each connection gets one at once.
        let consuming = settings.open("close-sync consume").await?;
        let first = events(&consuming.connection).map(|event| match event {
            BrokerEvent::Lost(error) => BrokerEvent::Lost(not_rejected(error)),
            event @ (BrokerEvent::Delivery(_)
            | BrokerEvent::Journal(_)
            | BrokerEvent::JournalFailed(_)
            | BrokerEvent::Alarm(_)
            | BrokerEvent::Missing(_)) => event,
        });
        let publishing = settings.open("close-sync publish").await?;
        let events = stream::select(first, events(&publishing.connection)).boxed();
        with_timeout(Self::set_up(consuming, publishing, events, settings, metrics)).await
    }

    async fn set_up(
        consuming: OpenConnection,
        publishing: OpenConnection,
        events: stream::BoxStream<'static, BrokerEvent>,
        settings: &Arc<Settings>,
        metrics: &Metrics,
    ) -> Result<Self, BrokerError> {
        let cut = [consuming.abort, publishing.abort];
        let server = consuming.server;
        let (consuming, publishing) = (Arc::new(consuming.connection), Arc::new(publishing.connection));
        topology::prepare(&consuming, settings).await?;
        let journal_state = topology::prepare_journal(&consuming, settings).await?;
        let lazy = || Arc::new(LazyPublisher::new(Arc::clone(&publishing)));
        let successors = Arc::new(Publisher::new(&publishing).await?);
        let quarantine =
            Arc::new(IsolatedPublisher { settings: Arc::clone(settings), turn: Mutex::default() });
        let journal = Arc::new(Publisher::new(&publishing).await?);
        let publishers = Publishers { successors, quarantine, journal, replays: lazy(), producers: lazy() };
        let channel = consuming.create_channel().await?;
        channel.basic_qos(settings.prefetch, BasicQosOptions::default()).await?;
        let deliveries = channel
            .basic_consume(
                settings.queue.as_str().into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        let cut = cut.map(CancellationToken::drop_guard);
        let missing =
            topology_monitor::watch(Arc::clone(&consuming), Arc::clone(settings), metrics.clone()).boxed();
        Ok(Self {
            _cut: cut,
            server,
            consuming,
            publishing,
            channel,
            publishers,
            deliveries,
            events,
            missing,
            receiving: true,
            journal_state,
            journal_name: settings.journal_queue(),
            journal: None,
        })
    }
}

impl Broker for Connections {
    async fn next_event(&mut self) -> BrokerEvent {
        let Self { deliveries, events, missing, receiving, journal, .. } = self;
        tokio::select! {
            biased;
            Some(event) = events.next() => event,
            Some(missing) = missing.next(), if *receiving => BrokerEvent::Missing(missing),
            Some(event) = next_of(journal) => event,
            // Not polled again after the end: it would hang (rabbitmq.md §0, 8).
            delivery = deliveries.next(), if *receiving => match delivery {
                Some(Ok(delivery)) => BrokerEvent::Delivery(Box::new(delivery.into())),
                Some(Err(error)) => BrokerEvent::Lost(not_rejected(error.into())),
                None => BrokerEvent::Lost(BrokerError::Cancelled),
            },
            else => BrokerEvent::Lost(BrokerError::Lost("no more events of the connections".into())),
        }
    }

    fn stop_receiving(&mut self) {
        // The consumer is kept: dropping it would cancel it.
        self.receiving = false;
    }

    fn publishers(&self) -> Publishers {
        self.publishers.clone()
    }

    fn journal(&self) -> &JournalState {
        &self.journal_state
    }

    fn read_journal(&mut self, from: ReadFrom) {
        let from = match from {
            ReadFrom::Last => Offset::Last,
            ReadFrom::Position(position) => Offset::Position(position),
        };
        let messages = amqp::stream::read(Arc::clone(&self.consuming), self.journal_name.clone(), from);
        let event = |message| match message {
            Ok(StreamMessage { position, body }) => BrokerEvent::Journal(JournalMessage { position, body }),
            Err(error) => BrokerEvent::JournalFailed(not_rejected(error)),
        };
        self.journal = Some(messages.map(event).boxed());
    }

    fn stall_limit(&self) -> Duration {
        // The broker gives the queue to the standby two to three intervals after the last frame it received. lapin sends
        // one every half interval, so the last one may be that old when the process is suspended.
        match self.consuming.configuration().heartbeat() {
            0 => Duration::from_secs(20),
            heartbeat => 3 * Duration::from_secs(heartbeat.into()) / 2,
        }
    }

    /// Closes, and does not drop, also when only one connection is lost: dropping a consumer cancels it. A connection
    /// that is blocked by an alarm does not close before the alarm ends.
    async fn close(self) {
        tokio::time::sleep(ACK_FLUSH_TIME).await;
        let _ = self.channel.close(200, "bye".into()).await;
        disconnect(&self.consuming).await;
        disconnect(&self.publishing).await;
    }
}

async fn next_of(stream: &mut Option<stream::BoxStream<'static, BrokerEvent>>) -> Option<BrokerEvent> {
    match stream {
        Some(stream) => stream.next().await,
        None => None,
    }
}

/// What happens to a connection. The end of a channel is left out: its user notices.
#[expect(clippy::wildcard_enum_match_arm, reason = "lapin may add events; only these matter here")]
fn events(connection: &Connection) -> impl Stream<Item = BrokerEvent> + Send + 'static {
    let status = connection.status().clone();
    connection.events_listener().filter_map(move |event| {
        let event = match event {
            Event::Error(error) if !status.connected() => Some(BrokerEvent::Lost(error.into())),
            Event::ConnectionBlocked(reason) => Some(BrokerEvent::Alarm(Some(reason))),
            Event::ConnectionUnblocked => Some(BrokerEvent::Alarm(None)),
            _ => None,
        };
        std::future::ready(event)
    })
}

impl From<lapin::message::Delivery> for Delivery {
    fn from(delivery: lapin::message::Delivery) -> Self {
        Self {
            properties: delivery.properties,
            exchange: delivery.exchange.to_string(),
            routing_key: delivery.routing_key.to_string(),
            redelivered: delivery.redelivered,
            body: delivery.data,
            receipt: Box::new(delivery.acker),
        }
    }
}

impl Receipt for Acker {
    fn ack(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        async {
            Self::ack(self, BasicAckOptions::default()).await.map_err(|error| not_rejected(error.into()))
        }
        .boxed()
    }

    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        async {
            let options = BasicRejectOptions { requeue: false };
            Self::reject(self, options).await.map_err(|error| not_rejected(error.into()))
        }
        .boxed()
    }
}

/// Without a timeout: a successor is held for as long as it takes.
impl Publish for Publisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move { self.send(message).confirmed().await }.boxed()
    }
}

/// Nothing is published on the connection that consumes. RabbitMQ may end it for other reasons.
fn not_rejected(error: BrokerError) -> BrokerError {
    if let BrokerError::Rejected(detail) = error { BrokerError::Lost(detail) } else { error }
}

/// Opens a connection for each message, one at a time, so that a message that ends it harms no other.
struct IsolatedPublisher {
    settings: Arc<Settings>,
    turn: Mutex<()>,
}

impl Publish for IsolatedPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        async move {
            let _turn = self.turn.lock().await;
            // What fails before the message is sent says nothing about it.
            let no_connection = |_| BrokerError::Unconfirmed("there is no connection to try it on");
            let opened = self.settings.open("close-sync quarantine").await;
            let OpenConnection { connection, abort, .. } = opened.map_err(no_connection)?;
            let _abort = abort.drop_guard();
            let published = async {
                let publisher = with_timeout(Publisher::new(&connection)).await.map_err(no_connection)?;
                publisher.publish_with_timeout(message).await
            };
            let published = published.await;
            disconnect(&connection).await;
            published
        }
        .boxed()
    }
}

/// A channel that is opened for the first event, and again after the broker has closed it.
struct LazyPublisher {
    connection: Arc<Connection>,
    channel: Mutex<Option<(Publisher, Instant)>>,
}

impl LazyPublisher {
    fn new(connection: Arc<Connection>) -> Self {
        Self { connection, channel: Mutex::default() }
    }

    async fn channel(&self) -> Result<Publisher, BrokerError> {
        let mut channel = self.channel.lock().await;
        if let Some((publisher, opened)) = &*channel {
            if publisher.is_open() {
                return Ok(publisher.clone());
            }
            if opened.elapsed() < REOPEN_AFTER {
                return Err(BrokerError::Lost("the channel was closed".into()));
            }
        }
        let publisher = Publisher::new(&self.connection).await?;
        *channel = Some((publisher.clone(), Instant::now()));
        Ok(publisher)
    }
}

impl Publish for LazyPublisher {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        let publish = async move { self.channel().await?.publish_with_timeout(message).await };
        tokio::time::timeout(EVENT_PATIENCE, publish)
            .map(|published| published.unwrap_or(Err(UNANSWERED)))
            .boxed()
    }
}
