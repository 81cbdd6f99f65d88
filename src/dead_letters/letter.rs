//! One dead letter, read from the headers of its message.

use std::borrow::Cow;

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use serde::Serialize;
use uuid::Uuid;

use crate::amqp::envelope::{self, Death};
use crate::domain::encoding::{EncodingError, Payload, TOOL_LIMIT};
use crate::sync::ReceivedAt;

/// A message of the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeadLetter {
    pub id: String,
    /// [`crate::outcome::Reason::label`]. Absent if RabbitMQ dead-lettered the message.
    pub reason: Option<String>,
    /// [`crate::outcome::Stage::label`].
    pub stage: Option<String>,
    pub error: Option<String>,
    pub attempts: Option<i64>,
    pub replays: i64,
    /// When close-sync first received it.
    pub first_seen: Option<Timestamp>,
    /// When it was dead-lettered.
    pub failed_at: Option<Timestamp>,
    pub edited_at: Option<Timestamp>,
    /// The exchange the producer published to.
    pub exchange: Option<String>,
    /// The producer's routing key.
    pub routing_key: Option<String>,
    /// `reason:stage:field`. Equal for messages that failed with the same error.
    pub fingerprint: String,
    /// What was found, which rule decided, and what was to be written.
    pub decision: Option<String>,
    /// The producer's id of the message.
    pub message_id: Option<String>,
    /// Personal data: only `show` prints it.
    #[serde(skip)]
    pub body: Vec<u8>,
    #[serde(skip)]
    pub(crate) properties: BasicProperties,
}

/// The first part of the fingerprint if RabbitMQ dead-lettered the message. RabbitMQ's reason follows.
pub const BROKER_FINGERPRINT: &str = "broker";

/// Why RabbitMQ dead-letters a message, in its own words.
const BROKER_REASONS: [&str; 4] = ["rejected", "expired", "maxlen", "delivery_limit"];

impl DeadLetter {
    pub(crate) fn from_delivery(delivery: &Delivery) -> Self {
        Self::from_parts(delivery.properties.clone(), delivery.data.clone())
    }

    pub(crate) fn from_parts(properties: BasicProperties, body: Vec<u8>) -> Self {
        let properties = envelope::trusted_dead_letter(properties);
        let text = |name| envelope::text(&properties, name);
        let time = |name| text(name)?.parse().ok();
        // A time in the future would hide the letter from a filter until then.
        let death = envelope::last_death(&properties);
        let died = |member: fn(&Death) -> Option<String>| death.as_ref().and_then(member);
        let died_at = death.as_ref().and_then(|death| death.time).map(|time| time.min(Timestamp::now()));
        let message_id = properties.message_id().as_ref().map(ToString::to_string);
        let broker_fingerprint = || {
            // A client can set this header on RabbitMQ 3.10.
            let reason =
                text("x-first-death-reason").filter(|reason| BROKER_REASONS.contains(&reason.as_str()));
            format!("{BROKER_FINGERPRINT}:{}:-", reason.as_deref().unwrap_or("-"))
        };
        Self {
            id: text(envelope::ID)
                .unwrap_or_else(|| envelope::id_from_content(message_id.as_deref(), &body).to_string()),
            reason: text(envelope::REASON),
            stage: text(envelope::STAGE),
            error: text(envelope::ERROR),
            attempts: envelope::number(&properties, envelope::ATTEMPTS),
            replays: envelope::number(&properties, envelope::REPLAYS).unwrap_or(0),
            first_seen: time(envelope::FIRST_SEEN),
            failed_at: time(envelope::FAILED_AT).or(died_at),
            edited_at: time(envelope::EDITED_AT),
            exchange: text(envelope::EXCHANGE).or_else(|| died(|death| death.exchange.clone())),
            routing_key: text(envelope::ROUTING_KEY).or_else(|| died(|death| death.routing_key.clone())),
            fingerprint: text(envelope::FINGERPRINT).unwrap_or_else(broker_fingerprint),
            decision: text(envelope::DECISION),
            message_id,
            body,
            properties,
        }
    }

    /// A copy without the body and the properties, for lists.
    #[must_use]
    pub fn without_body(&self) -> Self {
        Self { body: Vec::new(), properties: BasicProperties::default(), ..self.clone() }
    }

    /// A hash of everything that a restored copy contains.
    pub fn content_id(&self) -> Uuid {
        Uuid::new_v5(&Uuid::NAMESPACE_OID, self.to_line().as_bytes())
    }

    /// Like [`Self::content_id`], but ignores which dead letters this one replaces.
    pub(crate) fn content_id_without_replaces(&self) -> Uuid {
        let properties = envelope::without_replaces(&self.properties);
        Self { properties, ..self.clone() }.content_id()
    }

    /// Whether close-sync gave it an id. Only such an id is unique.
    pub(crate) fn has_own_id(&self) -> bool {
        envelope::text(&self.properties, envelope::ID).is_some()
    }

    /// The content ids of the dead letters that this one replaces.
    pub(crate) fn replaces(&self) -> Vec<Uuid> {
        envelope::replaces(&self.properties)
    }

    /// The body with its encoding. An edited body is plain JSON, which is decoded whatever the encoding is.
    pub fn payload(&self) -> Payload<'_> {
        Payload { bytes: &self.body, encoding: envelope::content_encoding(&self.properties) }
    }

    /// The body without its compression.
    ///
    /// # Errors
    /// Why it cannot be decompressed.
    pub fn decoded(&self) -> Result<Cow<'_, [u8]>, EncodingError> {
        self.payload().decode(TOOL_LIMIT)
    }

    /// The body without its compression, or as it is.
    pub fn readable(&self) -> Cow<'_, [u8]> {
        self.decoded().unwrap_or(Cow::Borrowed(&self.body))
    }

    /// The body that the producer sent, if it was edited, without its compression.
    pub fn original(&self) -> Option<Vec<u8>> {
        let bytes = envelope::bytes(&self.properties, envelope::ORIGINAL)?;
        let decoded = Payload { bytes: &bytes, ..self.payload() }.decode(TOOL_LIMIT).map(Cow::into_owned);
        Some(decoded.unwrap_or(bytes))
    }

    /// The time of the event, for events that do not contain one.
    pub fn received_at(&self) -> ReceivedAt {
        ReceivedAt {
            published: envelope::sent(&self.properties),
            received: self.first_seen.unwrap_or_else(Timestamp::now),
            is_replay: true,
        }
    }

    /// The last replay of the message, if it failed again.
    pub(crate) fn replay_id(&self) -> Option<Uuid> {
        envelope::text(&self.properties, envelope::REPLAY)?.parse().ok()
    }

    /// An estimate of its size in memory, in bytes.
    pub(crate) fn memory_size(&self) -> usize {
        self.body.len() + 2048
    }
}
