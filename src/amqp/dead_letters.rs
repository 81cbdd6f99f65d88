//! The operator's side of the dead-letter queue: look, replay, discard.
//!
//! Messages are fetched one by one without acking them, decided on, and the keepers given back in
//! their order. Closing the channel instead would scramble the queue (rabbitmq.md §5.4). While one
//! operator looks, others do not see the same messages; what a crash leaves unacked comes back.
//! A replay is published and confirmed before its dead letter is acked: a crash in between
//! duplicates a message, it never loses one.

use std::time::Duration;

use jiff::Timestamp;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Connection};
use serde::Serialize;

use super::publisher::Publisher;
use super::topology::NOW;
use super::{BrokerError, LAST_ACKS, Settings, close, headers, topology};

/// One message of the dead-letter queue.
#[derive(Clone, Debug, Serialize)]
pub struct DeadLetter {
    /// Its id, to name it by.
    pub id: String,
    /// Why, from the closed list; absent when the broker put it here by itself.
    pub reason: Option<String>,
    /// Where it failed.
    pub stage: Option<String>,
    /// What happened.
    pub error: Option<String>,
    /// Attempts made.
    pub attempts: Option<i64>,
    /// Times it was replayed before.
    pub replays: i64,
    /// When close-sync first received it.
    pub first_seen: Option<Timestamp>,
    /// When it was dead-lettered.
    pub failed_at: Option<Timestamp>,
    /// The exchange the producer published to.
    pub exchange: Option<String>,
    /// The producer's routing key.
    pub routing_key: Option<String>,
    /// Equal for messages that failed alike.
    pub fingerprint: Option<String>,
    /// The producer's id of the message.
    pub message_id: Option<String>,
    /// The body, untouched. Personal data: only `show` prints it.
    #[serde(skip)]
    pub body: Vec<u8>,
}

impl DeadLetter {
    fn read(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let text = |name| headers::text(properties, name);
        let time = |name| text(name)?.parse().ok();
        let message_id = properties.message_id().as_ref().map(ToString::to_string);
        Self {
            id: text(headers::ID)
                .or_else(|| message_id.clone())
                .unwrap_or_else(|| by_content(&delivery.data)),
            reason: text(headers::REASON),
            stage: text(headers::STAGE),
            error: text(headers::ERROR),
            attempts: headers::number(properties, headers::ATTEMPTS),
            replays: headers::number(properties, headers::REPLAYS).unwrap_or(0),
            first_seen: time(headers::FIRST_SEEN),
            failed_at: time(headers::FAILED_AT),
            exchange: text(headers::EXCHANGE),
            routing_key: text(headers::ROUTING_KEY),
            fingerprint: text(headers::FINGERPRINT),
            message_id,
            body: delivery.data.clone(),
        }
    }
}

/// A name for a message that came here without any.
fn by_content(body: &[u8]) -> String {
    uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, body).to_string()
}

/// What to do with one dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Give it back.
    Keep,
    /// Give it back and look no further.
    Stop,
    /// Send it through the work queue again.
    Replay,
    /// Delete it.
    Discard,
}

/// What a walk did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Walked {
    /// In the queue at the start.
    pub found: usize,
    /// Sent through the work queue again.
    pub replayed: usize,
    /// Deleted.
    pub discarded: usize,
}

impl Walked {
    /// What is left of the messages found.
    pub fn remaining(&self) -> usize {
        self.found - self.replayed - self.discarded
    }
}

/// Goes through the dead-letter queue once, oldest first, and does what `decide` says of each.
/// `progress` is told after each how many messages were in the queue at the start.
///
/// # Errors
/// On an error, messages not yet acted on go back to the queue.
pub async fn walk(
    settings: &Settings,
    decide: impl FnMut(&DeadLetter) -> Verb,
    progress: impl FnMut(u32),
) -> Result<Walked, BrokerError> {
    let connection = settings.connect("close-sync dlq").await?;
    // Of its own: an alarm of the broker must not hold up giving back what was looked at.
    let publishing = settings.connect("close-sync dlq replay").await?;
    let walked = walk_on(&connection, &publishing, settings, decide, progress).await;
    close(&connection).await;
    // Closing a blocked connection waits for the end of the alarm.
    let _ = tokio::time::timeout(Duration::from_secs(5), close(&publishing)).await;
    walked
}

async fn walk_on(
    connection: &Connection,
    publishing: &Connection,
    settings: &Settings,
    mut decide: impl FnMut(&DeadLetter) -> Verb,
    mut progress: impl FnMut(u32),
) -> Result<Walked, BrokerError> {
    let Some(depth) = topology::depth(connection, &settings.dead()).await? else {
        return Ok(Walked::default());
    };
    let channel = connection.create_channel().await?;
    let publisher = Publisher::new(publishing).await?;
    let mut walked =
        Walked { found: usize::try_from(depth.ready).unwrap_or(usize::MAX), ..Walked::default() };
    let mut kept = Vec::new();
    let mut result = Ok(());
    // As many as there were at the start: what arrives or fails again meanwhile is for the next walk.
    for _ in 0..depth.ready {
        let Some(delivery) = get(&channel, &settings.dead()).await? else { break };
        let done = match decide(&DeadLetter::read(&delivery)) {
            Verb::Keep => {
                kept.push(delivery);
                Ok(())
            }
            Verb::Stop => {
                kept.push(delivery);
                break;
            }
            Verb::Discard => {
                walked.discarded += 1;
                delivery.ack(BasicAckOptions::default()).await.map(drop).map_err(BrokerError::from)
            }
            Verb::Replay => {
                let properties = headers::for_replay(&delivery.properties);
                match replay(&publisher, settings, &delivery, properties).await {
                    Ok(()) => {
                        walked.replayed += 1;
                        Ok(())
                    }
                    Err(error) => {
                        kept.push(delivery);
                        Err(error)
                    }
                }
            }
        };
        progress(depth.ready);
        if done.is_err() {
            result = done;
            break;
        }
    }
    for delivery in kept {
        delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
    }
    tokio::time::sleep(LAST_ACKS).await;
    let _ = channel.close(200, ShortString::from("done")).await;
    result.map(|()| walked)
}

async fn replay(
    publisher: &Publisher,
    settings: &Settings,
    delivery: &Delivery,
    properties: BasicProperties,
) -> Result<(), BrokerError> {
    publisher.publish(&settings.retry_exchange(), NOW, &delivery.data, properties).await?;
    delivery.ack(BasicAckOptions::default()).await?;
    Ok(())
}

async fn get(channel: &Channel, queue: &str) -> Result<Option<Delivery>, BrokerError> {
    let got = channel.basic_get(queue.into(), BasicGetOptions::default()).await?;
    Ok(got.map(|message| message.delivery))
}
