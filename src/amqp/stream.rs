//! Reading a stream: a log of messages that stay after they were read (rabbitmq.md, last section).

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, Consumer};
use tokio::time::Instant;

use crate::amqp::error::BrokerError;

/// The broker sends this many messages ahead.
const PREFETCH: u16 = 1000;
/// Messages are acked in groups of this size. To ack a message of a stream asks for more, and removes nothing.
const ACK_AFTER: u16 = 200;

/// A node that has just started has no running replica of the stream for some seconds, and refuses to read from it.
const REPLICA_STARTS_WITHIN: Duration = Duration::from_secs(30);
/// The wait before it is tried again.
pub(super) const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Where reading begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offset {
    /// The last messages that were published together.
    Last,
    /// The message at this position, or the first one after it that still exists.
    Position(u64),
}

/// A message of a stream.
#[derive(Debug)]
pub(crate) struct StreamMessage {
    /// Counts the messages of the stream, from 0.
    pub(crate) position: u64,
    pub(crate) body: Vec<u8>,
}

/// Reads a stream from an offset, and then what is published from now on. Ends after an error.
pub(crate) fn read(
    connection: Arc<Connection>,
    name: String,
    offset: Offset,
) -> impl Stream<Item = Result<StreamMessage, BrokerError>> + Send + 'static {
    let open = async move { Reader::open(&connection, &name, offset).await };
    stream::once(open).flat_map(|reader| match reader {
        Ok(reader) => stream::unfold(Some(reader), Reader::next).boxed(),
        Err(error) => stream::iter([Err(error)]).boxed(),
    })
}

struct Reader {
    /// Kept open for the consumer.
    _channel: Channel,
    consumer: Consumer,
    unacked: u16,
}

impl Reader {
    async fn open(connection: &Connection, name: &str, offset: Offset) -> Result<Self, BrokerError> {
        let start = Instant::now();
        loop {
            match Self::try_open(connection, name, offset).await {
                Err(BrokerError::Conflict { .. }) if start.elapsed() < REPLICA_STARTS_WITHIN => {
                    tokio::time::sleep(TRY_AGAIN_AFTER).await;
                }
                opened => return opened,
            }
        }
    }

    async fn try_open(connection: &Connection, name: &str, offset: Offset) -> Result<Self, BrokerError> {
        let channel = connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let offset = match offset {
            Offset::Last => AMQPValue::LongString("last".into()),
            Offset::Position(position) => AMQPValue::LongLongInt(i64::try_from(position).unwrap_or(i64::MAX)),
        };
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), offset);
        let consumer =
            channel.basic_consume(name.into(), "".into(), BasicConsumeOptions::default(), arguments).await;
        let consumer =
            consumer.map_err(|error| BrokerError::from_lapin(&error, &format!("queue `{name}`")))?;
        Ok(Self { _channel: channel, consumer, unacked: 0 })
    }

    async fn next(reader: Option<Self>) -> Option<(Result<StreamMessage, BrokerError>, Option<Self>)> {
        let mut reader = reader?;
        // Not polled again after the end: it would hang (rabbitmq.md §0, 8).
        let delivery = match reader.consumer.next().await {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => return Some((Err(error.into()), None)),
            None => return Some((Err(BrokerError::Cancelled), None)),
        };
        reader.unacked += 1;
        if reader.unacked >= ACK_AFTER {
            reader.unacked = 0;
            if let Err(error) = delivery.acker.ack(BasicAckOptions { multiple: true }).await {
                return Some((Err(error.into()), None));
            }
        }
        let Some(position) = position(&delivery) else {
            return Some((Err(BrokerError::Lost("a message of a stream has no position".into())), None));
        };
        Some((Ok(StreamMessage { position, body: delivery.data }), Some(reader)))
    }
}

fn position(delivery: &Delivery) -> Option<u64> {
    let offset = delivery.properties.headers().as_ref()?.inner().get("x-stream-offset")?;
    u64::try_from(offset.as_long_long_int()?).ok()
}
