//! What exists on the broker, and why each flag (facts: rabbitmq.md §3 and §5.1).
//!
//! | object | kind |
//! | --- | --- |
//! | `identify` | topic exchange producers publish to |
//! | `close-sync` | work queue, bound to `identify` with `#` and to `close-sync.retry` with `now` |
//! | `close-sync.retry`, `close-sync.retry.<delay>` | direct exchange and delay queues |
//! | `close-sync.dead` | fanout exchange and dead-letter queue |
//!
//! All queues are quorum queues: durable, replicated in a cluster, and the only kind with
//! at-least-once dead-lettering. Whatever must never be missing is an argument, not a policy: a delay
//! queue whose time-to-live got lost would swallow messages for ever.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

use super::{BrokerError, Delay, Settings};

/// The key of the retry exchange that leads back to the work queue at once. Delay queues and replays
/// come in here: through `identify` they would reach every other queue bound to it as well.
pub const NOW: &str = "now";

/// "No limit" that every version understands: -1 drops on the first requeue on 3.10, and the default
/// of 4.x drops messages after 20 lost connections, innocents included (rabbitmq.md §0, 2 and 3).
pub(super) const DELIVERY_LIMIT: i64 = 1_000_000;

/// Declares everything. Idempotent.
///
/// # Errors
/// [`BrokerError::Conflict`] when something exists with other properties.
pub async fn declare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    // A channel of its own: a failed declaration kills the channel and whoever consumes on it.
    let channel = connection.create_channel().await?;
    for (name, kind) in exchanges(settings) {
        exchange(&channel, &name, kind, false).await?;
    }
    for (name, arguments) in queues(settings) {
        queue(&channel, &name, arguments).await?;
    }
    let (retry, dead) = (settings.retry_exchange(), settings.dead());
    bind(&channel, &dead, &dead, "").await?;
    bind(&channel, &settings.queue, &settings.exchange, "#").await?;
    bind(&channel, &settings.queue, &retry, NOW).await?;
    for delay in &settings.delays {
        bind(&channel, &settings.delay_queue(delay), &retry, &delay.name).await?;
    }
    let _ = channel.close(200, "declared".into()).await;
    Ok(())
}

/// Compares what exists with what would be declared. Creates nothing.
///
/// # Errors
/// [`BrokerError::Conflict`] when something exists with other properties.
pub async fn compare(connection: &Connection, settings: &Settings) -> Result<(), BrokerError> {
    for (name, kind) in exchanges(settings) {
        let channel = connection.create_channel().await?;
        match exchange(&channel, &name, kind.clone(), true).await {
            // Declaring again what exists changes nothing, and names what differs.
            Ok(()) => exchange(&channel, &name, kind, false).await?,
            Err(BrokerError::Missing(_)) => {}
            Err(error) => return Err(error),
        }
    }
    for (name, arguments) in queues(settings) {
        if depth(connection, &name).await?.is_some() {
            queue(&connection.create_channel().await?, &name, arguments).await?;
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
    exchange(&channel, &settings.exchange, ExchangeKind::Topic, true).await?;
    let _ = channel.close(200, "looked".into()).await;
    Ok(())
}

fn exchanges(settings: &Settings) -> [(String, ExchangeKind); 3] {
    [
        (settings.exchange.clone(), ExchangeKind::Topic),
        (settings.retry_exchange(), ExchangeKind::Direct),
        (settings.dead(), ExchangeKind::Fanout),
    ]
}

fn queues(settings: &Settings) -> Vec<(String, FieldTable)> {
    let (retry, dead) = (settings.retry_exchange(), settings.dead());
    let work = arguments(&[
        // One worker at a time, the others stand by (design.md §4).
        ("x-single-active-consumer", true.into()),
        ("x-delivery-limit", DELIVERY_LIMIT.into()),
        // A net under the delivery limit; our own dead letters are published with their reason.
        ("x-dead-letter-exchange", dead.as_str().into()),
        ("x-dead-letter-strategy", "at-least-once".into()),
        // Without it, at-least-once silently falls back to at-most-once.
        ("x-overflow", "reject-publish".into()),
    ]);
    let delay = |delay: &Delay| {
        let millis = i64::try_from(delay.duration.as_millis()).unwrap_or(i64::MAX);
        arguments(&[
            ("x-message-ttl", millis.into()),
            ("x-dead-letter-exchange", retry.as_str().into()),
            // Without it the old key is kept and the message runs in circles here.
            ("x-dead-letter-routing-key", NOW.into()),
            ("x-dead-letter-strategy", "at-least-once".into()),
            ("x-overflow", "reject-publish".into()),
        ])
    };
    let delays = settings.delays.iter().map(|each| (settings.delay_queue(each), delay(each)));
    // The dead-letter queue first: nothing may be rejected into nowhere.
    [
        (dead.clone(), arguments(&[("x-delivery-limit", DELIVERY_LIMIT.into())])),
        (settings.queue.clone(), work),
    ]
    .into_iter()
    .chain(delays)
    .collect()
}

/// Messages ready and messages being worked on, and whether a queue has consumers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Messages ready for delivery.
    pub ready: u32,
    /// Consumers, standbys included.
    pub consumers: u32,
}

/// How full a queue is; `None` when it does not exist.
pub async fn depth(connection: &Connection, queue: &str) -> Result<Option<Depth>, BrokerError> {
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(queue.into(), options, FieldTable::default()).await {
        Ok(queue) => {
            let depth = Depth { ready: queue.message_count(), consumers: queue.consumer_count() };
            let _ = channel.close(200, "looked".into()).await;
            Ok(Some(depth))
        }
        Err(error) => {
            let error = BrokerError::from_lapin(&error, &format!("queue `{queue}`"));
            if matches!(error, BrokerError::Missing(_)) { Ok(None) } else { Err(error) }
        }
    }
}

async fn exchange(
    channel: &Channel,
    name: &str,
    kind: ExchangeKind,
    passive: bool,
) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await;
    declared.map_err(|error| BrokerError::from_lapin(&error, &format!("exchange `{name}`")))
}

async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> Result<(), BrokerError> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(name.into(), options, arguments).await;
    declared.map(drop).map_err(|error| BrokerError::from_lapin(&error, &format!("queue `{name}`")))
}

fn arguments(arguments: &[(&str, Argument<'_>)]) -> FieldTable {
    let mut table = FieldTable::default();
    table.insert("x-queue-type".into(), Argument::Text("quorum").into());
    for (key, value) in arguments {
        table.insert((*key).into(), (*value).into());
    }
    table
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> Result<(), BrokerError> {
    let options = QueueBindOptions::default();
    let bound =
        channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await;
    bound.map_err(|error| BrokerError::from_lapin(&error, &format!("the binding of queue `{queue}`")))
}

/// The value of a queue argument.
#[derive(Clone, Copy)]
enum Argument<'a> {
    Text(&'a str),
    Number(i64),
    Flag(bool),
}

impl<'a> From<&'a str> for Argument<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Argument<'_> {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Argument<'_> {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<Argument<'_>> for AMQPValue {
    fn from(argument: Argument<'_>) -> Self {
        match argument {
            Argument::Text(text) => Self::LongString(text.into()),
            Argument::Number(number) => Self::LongLongInt(number),
            Argument::Flag(flag) => Self::Boolean(flag),
        }
    }
}
