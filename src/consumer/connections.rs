//! The connections of a session: how they are opened and closed, and what happens to them by itself.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Event};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::amqp::publisher::Publisher;
use crate::amqp::server_info::ServerInfo;
use crate::amqp::{
    ACK_FLUSH_TIME, BrokerError, OpenConnection, Settings, disconnect, topology, with_timeout,
};
use crate::consumer::outcome_events::LazyPublisher;
use crate::telemetry::backlog_eta::BacklogEta;
use crate::telemetry::metrics::Metrics;

/// How often the queues are looked at.
const LOOKS_APART: Duration = Duration::from_secs(5);
/// How often everything is declared again, which changes nothing where nothing is missing, or only looked at.
const PREPARED_APART: Duration = Duration::from_secs(15);

/// What happens to a connection by itself.
pub(crate) enum ConnectionEvent {
    /// It ended.
    Ended(BrokerError),
    /// The broker raised an alarm for this reason, or cleared it.
    Alarm(Option<String>),
}

/// As it comes.
pub(crate) type ConnectionEvents = stream::BoxStream<'static, ConnectionEvent>;

/// The connections of a session and what comes out of them.
pub(crate) struct Connections {
    /// Cut when they are dropped, which is after they were closed or had their time for it. First, so that what is
    /// dropped with them has nothing to tell the broker any more.
    _cut: [DropGuard; 2],
    pub(crate) broker: ServerInfo,
    pub(crate) consuming: Connection,
    publishing: Arc<Connection>,
    channel: Channel,
    pub(crate) out: Publishers,
    pub(crate) deliveries: lapin::Consumer,
    pub(crate) happenings: ConnectionEvents,
}

/// The ways out of a session. What is told has channels of its own: whatever the broker holds against it, a missing
/// permission or exchange, it answers by closing the channel.
#[derive(Clone)]
pub(crate) struct Publishers {
    /// Successors of messages.
    pub(crate) successors: Publisher,
    /// To whoever replays.
    pub(crate) replays: LazyPublisher,
    /// To producers.
    pub(crate) outcomes: LazyPublisher,
}

impl Publishers {
    async fn open(connection: &Arc<Connection>) -> Result<Self, BrokerError> {
        let voice = || LazyPublisher::new(Arc::clone(connection));
        Ok(Self { successors: Publisher::new(connection).await?, replays: voice(), outcomes: voice() })
    }
}

impl Connections {
    pub(crate) async fn open(settings: &Settings) -> Result<Self, BrokerError> {
        // Listened to at once: what nobody listens to is not kept.
        let consuming = settings.open("close-sync consume").await?;
        let first = happenings(&consuming.connection);
        let publishing = settings.open("close-sync publish").await?;
        let happenings = stream::select(first, happenings(&publishing.connection)).boxed();
        with_timeout(Self::set_up(consuming, publishing, happenings, settings)).await
    }

    async fn set_up(
        consuming: OpenConnection,
        publishing: OpenConnection,
        happenings: ConnectionEvents,
        settings: &Settings,
    ) -> Result<Self, BrokerError> {
        let cut = [consuming.abort, publishing.abort];
        let (broker, consuming, publishing) = (consuming.server, consuming.connection, publishing.connection);
        topology::prepare(&consuming, settings).await?;
        let publishing = Arc::new(publishing);
        let out = Publishers::open(&publishing).await?;
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
        Ok(Self { _cut: cut, broker, consuming, publishing, channel, out, deliveries, happenings })
    }

    /// How long the process may stand still: the broker gives its queue away after three heartbeats.
    pub(crate) fn patience(&self) -> Duration {
        match self.consuming.configuration().heartbeat() {
            0 => Duration::from_secs(20),
            heartbeat => 2 * Duration::from_secs(heartbeat.into()),
        }
    }

    /// Closes both in order. Of a connection that is blocked by an alarm this has no end.
    pub(crate) async fn close(self) {
        tokio::time::sleep(ACK_FLUSH_TIME).await;
        let _ = self.channel.close(200, "bye".into()).await;
        disconnect(&self.consuming).await;
        disconnect(&self.publishing).await;
    }
}

/// What happens to a connection, as events. lapin tells of the end of a channel as well: that is noticed by who uses
/// it, and concerns nobody else.
#[expect(clippy::wildcard_enum_match_arm, reason = "lapin may add events; only these matter here")]
fn happenings(connection: &Connection) -> impl Stream<Item = ConnectionEvent> + Send + 'static {
    let status = connection.status().clone();
    connection.events_listener().filter_map(move |event| {
        let happening = match event {
            Event::Error(error) if !status.connected() => Some(ConnectionEvent::Ended(error.into())),
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(reason, "RabbitMQ raised an alarm: nothing can be published until it clears");
                Some(ConnectionEvent::Alarm(Some(reason)))
            }
            Event::ConnectionUnblocked => {
                tracing::info!("RabbitMQ's alarm cleared");
                Some(ConnectionEvent::Alarm(None))
            }
            _ => None,
        };
        std::future::ready(happening)
    })
}

/// Looks at the queues from time to time, and puts back what somebody deleted: without the exchange or a binding
/// no message comes, and nothing would tell. A broker that does not answer is noticed elsewhere.
///
/// What must not be put back is told to `lacks` when that is news. The session goes on: the next one would wait for
/// all of it, and with it those whose messages need none of it. A message that has to go to a queue that is gone is
/// held, and without the work queue the session ends by itself.
pub(crate) async fn watch(
    connection: &Connection,
    settings: &Settings,
    metrics: &Metrics,
    lacks: impl Fn(Option<BrokerError>),
) -> Infallible {
    let mut drain = BacklogEta::default();
    let mut prepared = Instant::now();
    let mut known = Vec::new();
    let mut tick = tokio::time::interval(LOOKS_APART);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut settled, mut calls) = metrics.totals();
    let (mut then, mut waited) = (Instant::now(), false);
    loop {
        tick.tick().await;
        if prepared.elapsed() > PREPARED_APART {
            prepared = Instant::now();
            // What fails otherwise fails at the next session, and is told then.
            let missing = match topology::prepare(connection, settings).await {
                Ok(()) => Vec::new(),
                Err(BrokerError::Incomplete(missing)) => missing,
                Err(_) => known.clone(),
            };
            if missing != known {
                known.clone_from(&missing);
                lacks((!missing.is_empty()).then_some(BrokerError::Incomplete(missing)));
            }
        }
        let topology::Depths { work, dead, delayed } = topology::depths(connection, settings).await;
        metrics.set_queue_depths(dead, delayed);
        let Some(ready) = work else { continue };
        let (settled_now, calls_now) = metrics.totals();
        let made =
            calls.iter().zip(&calls_now).map(|((endpoint, before), (_, now))| (*endpoint, now - before));
        // A standby's backlog is another's work.
        let waits = ready > 0 && metrics.unsettled() > 0;
        drain.record(then.elapsed(), settled_now - settled, made, waited && waits);
        let backlog = ready.saturating_add(metrics.unsettled());
        metrics.set_backlog(backlog, drain.estimate(backlog, metrics.rate_limits()));
        (settled, calls, then, waited) = (settled_now, calls_now, Instant::now(), waits);
    }
}
