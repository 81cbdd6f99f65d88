//! The exchanges, queues and bindings on the broker, and why each has its arguments (rabbitmq.md §3 and §5.1).
//!
//! | object | kind |
//! | --- | --- |
//! | `identify` | topic exchange producers publish to |
//! | `close-sync` | work queue, bound to `identify` (with `#`, or the keys configured) and to `close-sync.retry` with `now` |
//! | `close-sync.retry`, `close-sync.retry.<delay>` | direct exchange and delay queues |
//! | `close-sync.dead` | fanout exchange and dead-letter queue |
//! | `close-sync.journal` | fanout exchange and stream: what a worker records for its successor |
//! | `amqp.outcomes` | if configured: topic exchange for outcome events |
//!
//! All queues but the journal are quorum queues: durable, replicated in a cluster, and the only kind with
//! at-least-once dead-lettering. The worker can do without the journal, see [`prepare_journal`]. Everything essential is
//! an argument, not a policy: a delay queue that lost its time-to-live would keep its messages for ever.
//!
//! [`objects`] and [`bindings`] list all of this. A worker with the configure permission declares them. A worker
//! without it ([`TopologyMode::Check`]) only checks that they exist; an administrator imports
//! `deploy/rabbitmq/definitions.json` for it.
//!
//! **Readiness.** A worker is ready after the broker has confirmed each declaration and binding, one after the other, so
//! a message that is published afterwards is routed. Bindings that are deleted later are declared again within 20 s
//! (`consumer/topology_monitor.rs`), and until then the broker returns messages as unroutable, although the worker is
//! ready. [`TopologyMode::Check`] cannot see bindings at all. A producer must also expect a nack: a quorum queue refuses
//! the first message of a channel when its leader does not answer in time (`reject_publish` in `rabbit_fifo_client`).

use std::fmt;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, ExchangeUnbindOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};
use serde::Serialize;
use strum::IntoStaticStr;
use tokio::time::Instant;

use crate::amqp::connection::{OpenConnection, disconnect};
use crate::amqp::error::BrokerError;
use crate::amqp::server_info::DELIVERY_LIMIT;
use crate::amqp::settings::{Delay, JournalSettings, Settings, TopologyMode};
use crate::amqp::stream::TRY_AGAIN_AFTER;

/// The key of the retry exchange that routes to the work queue without delay. Delay queues and replays publish with
/// it. Through the exchange of the producers, every other queue bound to that would receive a copy.
pub const NOW: &str = "now";

/// The key of the retry exchange for the outcomes of replayed messages. A queue is bound to it only while a replay
/// runs.
pub(crate) const REPLAYED: &str = "replayed";

/// A broker that has just started may answer before a stream runs: "home node is down or inaccessible". The stream starts some
/// seconds later. Where its nodes are gone, the worker goes on without it.
const STREAM_STARTS_WITHIN: Duration = Duration::from_secs(15);

/// The size of a segment of the journal, in bytes. Larger than what is written between two checkpoints of a small journal.
const JOURNAL_SEGMENT: i64 = 16 << 20;

/// An exchange or a queue that has to exist. All of them are durable.
#[derive(Clone, Debug)]
pub enum Object {
    Exchange { name: String, kind: Kind },
    Queue { name: String, arguments: Vec<(&'static str, Argument)> },
}

/// The kind of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Kind {
    /// Routes by patterns of the routing key.
    Topic,
    /// Routes by the exact routing key.
    Direct,
    /// Routes to every queue.
    Fanout,
}

/// A queue bound to an exchange.
#[derive(Clone, Debug)]
pub struct Binding {
    pub queue: String,
    pub exchange: String,
    pub key: String,
}

/// Declares everything, or only checks that it exists, as configured.
///
/// # Errors
/// [`BrokerError::Conflict`] when an object exists with different properties, [`BrokerError::Incomplete`]
/// when an object is missing and may not be declared, [`BrokerError::MayNotDeclare`].
pub async fn prepare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    match settings.topology {
        TopologyMode::Declare => declare(connection, settings).await,
        TopologyMode::Check => match missing(connection, settings).await? {
            missing if missing.is_empty() => Ok(()),
            missing => Err(BrokerError::Incomplete(missing)),
        },
    }
}

/// Whether a worker has a journal.
#[derive(Clone, Debug)]
pub enum JournalState {
    Ready,
    /// The settings say so.
    Disabled,
    /// An administrator did not make it, or the broker has no streams.
    Unusable(BrokerError),
}

impl JournalState {
    pub fn label(&self) -> &'static str {
        match self {
            Self::Ready => "in_use",
            Self::Disabled => "disabled",
            Self::Unusable(_) => "unusable",
        }
    }
}

/// What `check` finds out about the journal.
#[derive(Clone, Debug)]
pub enum JournalCheck {
    /// A worker will declare it.
    Absent,
    /// It is used as it was declared, which differs from the settings. Holds the broker's message, which names both values.
    /// Whether RabbitMQ compares ages depends on its version.
    Differs(String),
    Exists(JournalState),
}

/// Whether the journal can be used, without declaring or changing it.
///
/// # Errors
/// When the connection is lost.
pub async fn check_journal(
    connection: &Connection,
    settings: &Settings,
) -> Result<JournalCheck, BrokerError> {
    match compare_journal(connection, settings).await {
        Err(error) if error.is_about_object() => Ok(JournalCheck::Exists(JournalState::Unusable(error))),
        found => found,
    }
}

async fn compare_journal(connection: &Connection, settings: &Settings) -> Result<JournalCheck, BrokerError> {
    let declares = settings.topology == TopologyMode::Declare;
    if !settings.journal.enabled {
        return Ok(JournalCheck::Exists(JournalState::Disabled));
    }
    let missing = missing_for_journal(connection, settings).await?;
    if !missing.is_empty() && declares {
        return Ok(JournalCheck::Absent);
    }
    if !missing.is_empty() {
        let incomplete = BrokerError::Incomplete(missing.iter().map(Object::to_string).collect());
        return Ok(JournalCheck::Exists(JournalState::Unusable(incomplete)));
    }
    journal_binding(settings).try_permissions(&connection.create_channel().await?).await?;
    for object in declares.then(|| journal_objects(settings)).into_iter().flatten() {
        // Declaring an existing object changes nothing.
        match object.declare(&connection.create_channel().await?).await {
            Err(BrokerError::Conflict { detail, .. }) if matches!(object, Object::Queue { .. }) => {
                return Ok(JournalCheck::Differs(detail));
            }
            other => other?,
        }
    }
    Ok(JournalCheck::Exists(JournalState::Ready))
}

/// Declares the journal, or only checks that it exists, as configured.
///
/// # Errors
/// When the connection is lost.
pub async fn prepare_journal(
    connection: &Connection,
    settings: &Settings,
) -> Result<JournalState, BrokerError> {
    if !settings.journal.enabled {
        return Ok(JournalState::Disabled);
    }
    match find_journal(connection, settings).await {
        Err(error) if error.is_about_object() => Ok(JournalState::Unusable(error)),
        found => found,
    }
}

async fn find_journal(connection: &Connection, settings: &Settings) -> Result<JournalState, BrokerError> {
    let declares = settings.topology == TopologyMode::Declare;
    let (start, mut is_logged) = (Instant::now(), false);
    let (missing, trouble) = loop {
        let (mut missing, mut trouble) = (missing_for_journal(connection, settings).await?, None);
        if declares && !missing.is_empty() {
            trouble = Box::pin(declare_for_journal(settings, &missing)).await.err();
            missing = missing_for_journal(connection, settings).await?;
        }
        // Only the stream is missing: it is there and does not run yet, or an administrator has not made it.
        let may_start = matches!(missing.as_slice(), [Object::Queue { .. }])
            && matches!(trouble, None | Some(BrokerError::Missing(_)));
        if !may_start || start.elapsed() >= STREAM_STARTS_WITHIN {
            break (missing, trouble);
        }
        if !std::mem::replace(&mut is_logged, true) {
            tracing::info!(
                event = "journal_awaited",
                "the stream of the journal is missing; waiting up to {} s, because it may start later than RabbitMQ",
                STREAM_STARTS_WITHIN.as_secs()
            );
        }
        tokio::time::sleep(TRY_AGAIN_AFTER).await;
    };
    if !missing.is_empty() {
        let missing = missing.iter().map(Object::to_string).collect();
        return Ok(JournalState::Unusable(trouble.unwrap_or(BrokerError::Incomplete(missing))));
    }
    if declares {
        journal_binding(settings).declare(&connection.create_channel().await?).await?;
    }
    Ok(JournalState::Ready)
}

async fn missing_for_journal(
    connection: &Connection,
    settings: &Settings,
) -> Result<Vec<Object>, BrokerError> {
    let mut missing = Vec::new();
    for object in journal_objects(settings) {
        if !object.exists(connection).await? {
            missing.push(object);
        }
    }
    Ok(missing)
}

/// Declares on a connection of its own: a broker without streams closes it.
async fn declare_for_journal(settings: &Settings, objects: &[Object]) -> Result<(), BrokerError> {
    let OpenConnection { connection, abort, .. } = settings.open("close-sync journal").await?;
    let _abort = abort.drop_guard();
    let declared = async {
        for object in objects {
            object.declare(&connection.create_channel().await?).await?;
        }
        Ok(())
    };
    let declared = declared.await;
    disconnect(&connection).await;
    declared
}

/// Declares everything. Idempotent.
async fn declare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    // A failed declaration closes the channel, so no consumer may share it.
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

/// Lists the objects that do not exist, with the properties they need. The check sees neither the kind of an exchange
/// nor the arguments of a queue nor bindings.
///
/// # Errors
/// [`BrokerError::Forbidden`]: since RabbitMQ 4.3.1 a passive declaration needs a permission on the object
/// (rabbitmq.md §3.8).
pub async fn missing(connection: &Connection, settings: &Settings) -> Result<Vec<String>, BrokerError> {
    let mut missing = Vec::new();
    for object in objects(settings) {
        if !object.exists(connection).await? {
            missing.push(object.to_string());
        }
    }
    Ok(missing)
}

/// Compares existing objects with those that would be declared. Creates nothing.
///
/// # Errors
/// [`BrokerError::Conflict`] when an object exists with different properties,
/// [`BrokerError::MayNotDeclare`].
pub async fn compare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    for object in objects(settings) {
        if object.exists(connection).await? {
            // Declaring an existing object changes nothing, and the error names the differences.
            object.declare(&connection.create_channel().await?).await?;
        }
    }
    Ok(())
}

/// Checks that the exchange of the producers exists.
///
/// # Errors
/// [`BrokerError::Missing`] if it does not.
pub async fn expect_exchange(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    let channel = connection.create_channel().await?;
    declare_exchange(&channel, &settings.exchange, Kind::Topic, true).await?;
    let _ = channel.close(200, "checked".into()).await;
    Ok(())
}

/// The exchanges and queues in the order of declaration.
pub fn objects(settings: &Settings) -> Vec<Object> {
    let (retry, dead) = (settings.retry_exchange(), settings.dead_letter_queue());
    let exchange = |name: &str, kind| Object::Exchange { name: name.to_owned(), kind };
    let queue = |name: String, arguments: Vec<(&'static str, Argument)>| {
        let kind = ("x-queue-type", Argument::from("quorum"));
        Object::Queue { name, arguments: std::iter::once(kind).chain(arguments).collect() }
    };
    let work = vec![
        // One worker is active, the others stand by (design.md §4).
        ("x-single-active-consumer", Argument::Flag(true)),
        ("x-delivery-limit", Argument::Number(DELIVERY_LIMIT)),
        // A safety net for the delivery limit. The worker publishes its own dead letters, with their reason.
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
            // Without it the message keeps its key and returns to this queue in a loop.
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
        // The dead-letter queue comes first, so that no rejected message gets lost.
        queue(dead.clone(), vec![("x-delivery-limit", Argument::Number(DELIVERY_LIMIT))]),
        queue(settings.queue.clone(), work),
    ]
    .into_iter()
    .chain(delays)
    .chain(outcomes)
    .collect()
}

/// The exchange and the stream of the journal.
pub fn journal_objects(settings: &Settings) -> [Object; 2] {
    let name = settings.journal_queue();
    let JournalSettings { max_age, max_bytes, .. } = settings.journal;
    let arguments = vec![
        ("x-queue-type", Argument::from("stream")),
        ("x-max-age", Argument::Text(format!("{}s", max_age.as_secs()))),
        ("x-max-length-bytes", Argument::Number(i64::try_from(max_bytes).unwrap_or(i64::MAX))),
        // The broker deletes whole segments. With its default of 500 MB a small journal would keep everything.
        ("x-stream-max-segment-size-bytes", Argument::Number(JOURNAL_SEGMENT)),
    ];
    [Object::Exchange { name: name.clone(), kind: Kind::Fanout }, Object::Queue { name, arguments }]
}

/// The binding of the journal.
pub fn journal_binding(settings: &Settings) -> Binding {
    let name = settings.journal_queue();
    Binding { queue: name.clone(), exchange: name, key: String::new() }
}

/// The bindings in the order of declaration.
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
    /// The name RabbitMQ uses.
    pub fn label(self) -> &'static str {
        self.into()
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

    async fn exists(&self, connection: &Connection) -> Result<bool, BrokerError> {
        match self {
            Self::Exchange { name, kind } => {
                let channel = connection.create_channel().await?;
                match declare_exchange(&channel, name, *kind, true).await {
                    Ok(()) => {
                        let _ = channel.close(200, "checked".into()).await;
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

/// With its properties: `queue `close-sync.dead` (durable, x-queue-type=quorum, …)`.
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

    /// Whether the user may read and write what has the exchange's name. Removes a binding of the exchange to itself, which
    /// does not exist: RabbitMQ checks both permissions first, and then changes nothing.
    async fn try_permissions(&self, channel: &Channel) -> Result<(), BrokerError> {
        let exchange = self.exchange.as_str();
        let (options, none) = (ExchangeUnbindOptions::default(), FieldTable::default());
        let removed = channel
            .exchange_unbind(exchange.into(), exchange.into(), self.key.as_str().into(), options, none)
            .await;
        removed.map_err(|error| BrokerError::from_lapin(&error, &format!("exchange `{exchange}`")))
    }
}

/// The size of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Messages ready for delivery.
    pub ready: u32,
    /// Consumers, standbys included.
    pub consumers: u32,
}

/// Ready messages in all queues of a destination; `None` where RabbitMQ did not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Depths {
    pub(crate) work: Option<u32>,
    pub(crate) dead: Option<u32>,
    /// The sum over all delay queues.
    pub(crate) delayed: Option<u32>,
}

/// Reads the depths of all queues. A missing queue closes the channel, so the queues after it stay `None`.
pub(crate) async fn depths(connection: &Connection, settings: &Settings) -> Depths {
    let Ok(channel) = connection.create_channel().await else { return Depths::default() };
    let ready = async |queue: &str| {
        let depth = depth_on(&channel, queue).await.ok().flatten();
        depth.map(|depth| depth.ready)
    };
    let (work, dead) = (ready(&settings.queue).await, ready(&settings.dead_letter_queue()).await);
    let mut delayed = Some(0_u32);
    for delay in &settings.delays {
        let more = ready(&settings.delay_queue(delay)).await;
        delayed = delayed.zip(more).map(|(sum, more)| sum.saturating_add(more));
    }
    if delayed.is_some() {
        let _ = channel.close(200, "checked".into()).await;
    }
    Depths { work, dead, delayed }
}

/// Reads the depth of a queue; `None` if it does not exist.
pub async fn depth(connection: &Connection, queue: &str) -> Result<Option<Depth>, BrokerError> {
    let channel = connection.create_channel().await?;
    let depth = depth_on(&channel, queue).await?;
    if depth.is_some() {
        let _ = channel.close(200, "checked".into()).await;
    }
    Ok(depth)
}

/// Reads the depth of a queue over this channel. RabbitMQ closes the channel if the queue does not exist.
pub(crate) async fn depth_on(channel: &Channel, queue: &str) -> Result<Option<Depth>, BrokerError> {
    let options = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(queue.into(), options, FieldTable::default()).await {
        Ok(queue) => Ok(Some(Depth { ready: queue.message_count(), consumers: queue.consumer_count() })),
        Err(error) => {
            let error = BrokerError::from_lapin(&error, &format!("queue `{queue}`"));
            if matches!(error, BrokerError::Missing(_)) { Ok(None) } else { Err(error) }
        }
    }
}

/// Declares an exchange, or with `passive` only checks that it exists.
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
    Text(String),
    Number(i64),
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
