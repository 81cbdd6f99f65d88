//! What exists on the broker, and why each flag (facts: rabbitmq.md §3 and §5.1).
//!
//! | object | kind |
//! | --- | --- |
//! | `identify` | topic exchange producers publish to |
//! | `close-sync` | work queue, bound to `identify` (with `#`, or the keys configured) and to `close-sync.retry` with `now` |
//! | `close-sync.retry`, `close-sync.retry.<delay>` | direct exchange and delay queues |
//! | `close-sync.dead` | fanout exchange and dead-letter queue |
//! | `amqp.outcomes` | if there is one: topic exchange where it is told what became of messages |
//!
//! All queues are quorum queues: durable, replicated in a cluster, and the only kind with
//! at-least-once dead-lettering. Whatever must never be missing is an argument, not a policy: a delay
//! queue whose time-to-live got lost would swallow messages for ever.
//!
//! [`objects`] and [`bindings`] are the one list of all this. A worker that may configure the broker
//! declares them; one that may not ([`TopologyMode::Check`]) only looks whether they are there, and
//! `deploy/rabbitmq/definitions.json` is what an administrator imports for it.

use std::fmt;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};
use serde::Serialize;

use crate::amqp::error::BrokerError;
use crate::amqp::server_info::DELIVERY_LIMIT;
use crate::amqp::settings::{Delay, Settings, TopologyMode};

/// The key of the retry exchange that leads back to the work queue at once. Delay queues and replays
/// come in here: through `identify` they would reach every other queue bound to it as well.
pub const NOW: &str = "now";

/// The key of the retry exchange by which a worker tells whoever replays what became of a message. There is a
/// queue for it only while somebody replays.
pub(crate) const REPLAYED: &str = "replayed";

/// An exchange or a queue that has to exist. All are durable.
#[derive(Clone, Debug)]
pub enum Object {
    /// An exchange.
    Exchange {
        /// Its name.
        name: String,
        /// Its kind.
        kind: Kind,
    },
    /// A queue.
    Queue {
        /// Its name.
        name: String,
        /// Its arguments.
        arguments: Vec<(&'static str, Argument)>,
    },
}

/// The kind of an exchange, in RabbitMQ's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By patterns of the routing key.
    Topic,
    /// By the routing key.
    Direct,
    /// To every queue.
    Fanout,
}

/// A queue bound to an exchange.
#[derive(Clone, Debug)]
pub struct Binding {
    /// The queue.
    pub queue: String,
    /// The exchange.
    pub exchange: String,
    /// The routing key.
    pub key: String,
}

/// Sees to it that everything is there. Declares it, or only looks: as the settings say.
///
/// # Errors
/// [`BrokerError::Conflict`] when something exists with other properties, [`BrokerError::Incomplete`]
/// when something is not there and must not be declared, [`BrokerError::MayNotDeclare`].
pub async fn prepare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    match settings.topology {
        TopologyMode::Declare => declare(connection, settings).await,
        TopologyMode::Check => match missing(connection, settings).await? {
            missing if missing.is_empty() => Ok(()),
            missing => Err(BrokerError::Incomplete(missing)),
        },
    }
}

/// Declares everything. Idempotent.
async fn declare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    // A channel of its own: a failed declaration kills the channel and whoever consumes on it.
    let channel = connection.create_channel().await?;
    for object in objects(settings) {
        object.declare(&channel).await?;
    }
    for binding in bindings(settings) {
        binding.declare(&channel).await?;
    }
    let _ = channel.close(200, "declared".into()).await;
    Ok(())
}

/// What is not there, and what it has to be. Looking sees neither the kind of an exchange nor the
/// arguments of a queue nor bindings.
///
/// # Errors
/// [`BrokerError::Forbidden`]: from RabbitMQ 4.3.1 on, looking needs some right on the object
/// (rabbitmq.md §3.8).
pub async fn missing(connection: &Connection, settings: &Settings) -> Result<Vec<String>, BrokerError> {
    let mut missing = Vec::new();
    for object in objects(settings) {
        if !object.is_there(connection).await? {
            missing.push(object.to_string());
        }
    }
    Ok(missing)
}

/// Compares what exists with what would be declared. Creates nothing.
///
/// # Errors
/// [`BrokerError::Conflict`] when something exists with other properties,
/// [`BrokerError::MayNotDeclare`].
pub async fn compare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    for object in objects(settings) {
        if object.is_there(connection).await? {
            // Declaring again what exists changes nothing, and names what differs.
            object.declare(&connection.create_channel().await?).await?;
        }
    }
    Ok(())
}

/// Whether the exchange producers publish to is there.
///
/// # Errors
/// [`BrokerError::Missing`] when it is not.
pub async fn expect_exchange(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    let channel = connection.create_channel().await?;
    declare_exchange(&channel, &settings.exchange, Kind::Topic, true).await?;
    let _ = channel.close(200, "looked".into()).await;
    Ok(())
}

/// The exchanges and queues, in the order they are declared in.
pub fn objects(settings: &Settings) -> Vec<Object> {
    let (retry, dead) = (settings.retry_exchange(), settings.dead_letter_queue());
    let exchange = |name: &str, kind| Object::Exchange { name: name.to_owned(), kind };
    let queue = |name: String, arguments: Vec<(&'static str, Argument)>| {
        let kind = ("x-queue-type", Argument::from("quorum"));
        Object::Queue { name, arguments: std::iter::once(kind).chain(arguments).collect() }
    };
    let work = vec![
        // One worker at a time, the others stand by (design.md §4).
        ("x-single-active-consumer", Argument::Flag(true)),
        ("x-delivery-limit", Argument::Number(DELIVERY_LIMIT)),
        // A net under the delivery limit; our own dead letters are published with their reason.
        ("x-dead-letter-exchange", Argument::from(dead.as_str())),
        ("x-dead-letter-strategy", Argument::from("at-least-once")),
        // Without it, at-least-once silently falls back to at-most-once.
        ("x-overflow", Argument::from("reject-publish")),
    ];
    let delay = |delay: &Delay| {
        let millis = i64::try_from(delay.duration.as_millis()).unwrap_or(i64::MAX);
        vec![
            ("x-message-ttl", Argument::Number(millis)),
            ("x-dead-letter-exchange", Argument::from(retry.as_str())),
            // Without it the old key is kept and the message runs in circles here.
            ("x-dead-letter-routing-key", Argument::from(NOW)),
            ("x-dead-letter-strategy", Argument::from("at-least-once")),
            ("x-overflow", Argument::from("reject-publish")),
        ]
    };
    let delays = settings.delays.iter().map(|each| queue(settings.delay_queue(each), delay(each)));
    let outcomes = settings.outcomes.iter().map(|name| exchange(name, Kind::Topic));
    [
        exchange(&settings.exchange, Kind::Topic),
        exchange(&retry, Kind::Direct),
        exchange(&dead, Kind::Fanout),
        // The dead-letter queue before the others: nothing may be rejected into nowhere.
        queue(dead.clone(), vec![("x-delivery-limit", Argument::Number(DELIVERY_LIMIT))]),
        queue(settings.queue.clone(), work),
    ]
    .into_iter()
    .chain(delays)
    .chain(outcomes)
    .collect()
}

/// The bindings, in the order they are declared in.
pub fn bindings(settings: &Settings) -> Vec<Binding> {
    let (retry, dead) = (settings.retry_exchange(), settings.dead_letter_queue());
    let bind = |queue: &str, exchange: &str, key: &str| Binding {
        queue: queue.to_owned(),
        exchange: exchange.to_owned(),
        key: key.to_owned(),
    };
    let work = settings.binding_keys.iter().map(|key| bind(&settings.queue, &settings.exchange, key));
    let delays = settings.delays.iter().map(|each| bind(&settings.delay_queue(each), &retry, &each.name));
    std::iter::once(bind(&dead, &dead, ""))
        .chain(work)
        .chain([bind(&settings.queue, &retry, NOW)])
        .chain(delays)
        .collect()
}

impl Kind {
    /// As RabbitMQ writes it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::Direct => "direct",
            Self::Fanout => "fanout",
        }
    }
}

impl From<Kind> for ExchangeKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Topic => Self::Topic,
            Kind::Direct => Self::Direct,
            Kind::Fanout => Self::Fanout,
        }
    }
}

impl Object {
    async fn declare(&self, channel: &Channel) -> Result<(), BrokerError> {
        let declared = match self {
            Self::Exchange { name, kind } => declare_exchange(channel, name, *kind, false).await,
            Self::Queue { name, arguments } => {
                let mut table = FieldTable::default();
                for (key, value) in arguments {
                    table.insert((*key).into(), value.clone().into());
                }
                let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                let declared = channel.queue_declare(name.as_str().into(), options, table).await;
                declared
                    .map(drop)
                    .map_err(|error| BrokerError::from_lapin(&error, &format!("queue `{name}`")))
            }
        };
        declared.map_err(BrokerError::while_declaring)
    }

    async fn is_there(&self, connection: &Connection) -> Result<bool, BrokerError> {
        match self {
            Self::Exchange { name, kind } => {
                let channel = connection.create_channel().await?;
                match declare_exchange(&channel, name, *kind, true).await {
                    Ok(()) => {
                        let _ = channel.close(200, "looked".into()).await;
                        Ok(true)
                    }
                    Err(BrokerError::Missing(_)) => Ok(false),
                    Err(error) => Err(error),
                }
            }
            Self::Queue { name, .. } => Ok(depth(connection, name).await?.is_some()),
        }
    }
}

/// What it has to be: `queue `close-sync.dead` (durable, x-queue-type=quorum, …)`.
impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange { name, kind } => write!(f, "exchange `{name}` (durable, {})", kind.label()),
            Self::Queue { name, arguments } => {
                write!(f, "queue `{name}` (durable")?;
                for (key, value) in arguments {
                    write!(f, ", {key}={value}")?;
                }
                write!(f, ")")
            }
        }
    }
}

impl Binding {
    async fn declare(&self, channel: &Channel) -> Result<(), BrokerError> {
        let Self { queue, exchange, key } = self;
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        let bound = channel
            .queue_bind(queue.as_str().into(), exchange.as_str().into(), key.as_str().into(), options, none)
            .await;
        bound.map_err(|error| {
            BrokerError::from_lapin(&error, &format!("the binding of queue `{queue}`")).while_declaring()
        })
    }
}

/// What a queue holds, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Messages ready for delivery.
    pub ready: u32,
    /// Consumers, standbys included.
    pub consumers: u32,
}

/// Messages ready in all of our queues, where RabbitMQ tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Depths {
    /// In the work queue.
    pub(crate) work: Option<u32>,
    /// In the dead-letter queue.
    pub(crate) dead: Option<u32>,
    /// In all delay queues together.
    pub(crate) delayed: Option<u32>,
}

/// How full all our queues are. A queue that is missing ends the channel, and those after it are not told.
pub(crate) async fn depths(connection: &Connection, settings: &Settings) -> Depths {
    let Ok(channel) = connection.create_channel().await else { return Depths::default() };
    let ready = async |queue: &str| {
        let depth = depth_by(&channel, queue).await.ok().flatten();
        depth.map(|depth| depth.ready)
    };
    let (work, dead) = (ready(&settings.queue).await, ready(&settings.dead_letter_queue()).await);
    let mut delayed = Some(0_u32);
    for delay in &settings.delays {
        let more = ready(&settings.delay_queue(delay)).await;
        delayed = delayed.zip(more).map(|(sum, more)| sum.saturating_add(more));
    }
    if delayed.is_some() {
        let _ = channel.close(200, "looked".into()).await;
    }
    Depths { work, dead, delayed }
}

/// How full a queue is; `None` when it does not exist.
pub async fn depth(connection: &Connection, queue: &str) -> Result<Option<Depth>, BrokerError> {
    let channel = connection.create_channel().await?;
    let depth = depth_by(&channel, queue).await?;
    if depth.is_some() {
        let _ = channel.close(200, "looked".into()).await;
    }
    Ok(depth)
}

/// The same by a channel, which is gone afterwards where the queue is missing.
async fn depth_by(channel: &Channel, queue: &str) -> Result<Option<Depth>, BrokerError> {
    let options = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(queue.into(), options, FieldTable::default()).await {
        Ok(queue) => Ok(Some(Depth { ready: queue.message_count(), consumers: queue.consumer_count() })),
        Err(error) => {
            let error = BrokerError::from_lapin(&error, &format!("queue `{queue}`"));
            if matches!(error, BrokerError::Missing(_)) { Ok(None) } else { Err(error) }
        }
    }
}

/// Declares an exchange, or only looks at it.
async fn declare_exchange(
    channel: &Channel,
    name: &str,
    kind: Kind,
    passive: bool,
) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(name.into(), kind.into(), options, FieldTable::default()).await;
    declared.map_err(|error| BrokerError::from_lapin(&error, &format!("exchange `{name}`")))
}

/// The value of a queue argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Argument {
    /// Text.
    Text(String),
    /// A number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
            Self::Flag(flag) => write!(f, "{flag}"),
        }
    }
}

impl From<&str> for Argument {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<Argument> for AMQPValue {
    fn from(argument: Argument) -> Self {
        match argument {
            Argument::Text(text) => Self::LongString(text.into()),
            Argument::Number(number) => Self::LongLongInt(number),
            Argument::Flag(flag) => Self::Boolean(flag),
        }
    }
}
