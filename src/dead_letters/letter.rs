//! One dead letter, as its headers tell it.

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use serde::Serialize;
use uuid::Uuid;

use crate::amqp::envelope;
use crate::sync::ReceivedAt;

/// One message of the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    /// When it was edited.
    pub edited_at: Option<Timestamp>,
    /// The exchange the producer published to.
    pub exchange: Option<String>,
    /// The producer's routing key.
    pub routing_key: Option<String>,
    /// Equal for messages that failed alike.
    pub fingerprint: String,
    /// How far it came: what was found, which rule decided, what was to be written.
    pub decision: Option<String>,
    /// The producer's id of the message.
    pub message_id: Option<String>,
    /// The body, untouched. Personal data: only `show` prints it.
    #[serde(skip)]
    pub body: Vec<u8>,
    /// What it carries besides.
    #[serde(skip)]
    pub(crate) properties: BasicProperties,
}

/// Fingerprints of what the broker put here by itself begin with it; its reason follows.
pub const BY_THE_BROKER: &str = "broker";

impl DeadLetter {
    pub(crate) fn read(delivery: &Delivery) -> Self {
        Self::of(delivery.properties.clone(), delivery.data.clone())
    }

    pub(crate) fn of(properties: BasicProperties, body: Vec<u8>) -> Self {
        let text = |name| envelope::text(&properties, name);
        let time = |name| text(name)?.parse().ok();
        let message_id = properties.message_id().as_ref().map(ToString::to_string);
        let by_the_broker = || {
            let reason = text("x-first-death-reason");
            format!("{BY_THE_BROKER}:{}:-", reason.as_deref().unwrap_or("-"))
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
            failed_at: time(envelope::FAILED_AT),
            edited_at: time(envelope::EDITED_AT),
            exchange: text(envelope::EXCHANGE),
            routing_key: text(envelope::ROUTING_KEY),
            fingerprint: text(envelope::FINGERPRINT).unwrap_or_else(by_the_broker),
            decision: text(envelope::DECISION),
            message_id,
            body,
            properties,
        }
    }

    /// Without its body: what a list needs.
    #[must_use]
    pub fn without_body(&self) -> Self {
        Self { body: Vec::new(), properties: BasicProperties::default(), ..self.clone() }
    }

    /// Equal for dead letters that would be restored alike.
    pub fn content(&self) -> Uuid {
        Uuid::new_v5(&Uuid::NAMESPACE_OID, self.to_line().as_bytes())
    }

    /// The same, whatever they took the place of.
    pub(crate) fn content_alone(&self) -> Uuid {
        let properties = envelope::without_replaces(&self.properties);
        Self { properties, ..self.clone() }.content()
    }

    /// Whether it was given its id, which then no other has.
    pub(crate) fn has_own_id(&self) -> bool {
        envelope::text(&self.properties, envelope::ID).is_some()
    }

    /// The contents of those whose place it took.
    pub(crate) fn replaces(&self) -> Vec<Uuid> {
        envelope::replaces(&self.properties)
    }

    /// The body as its producer sent it, if it was edited since.
    pub fn original(&self) -> Option<Vec<u8>> {
        envelope::bytes(&self.properties, envelope::ORIGINAL)
    }

    /// When the message came, for want of a better time of its event.
    pub fn arrival(&self) -> ReceivedAt {
        ReceivedAt {
            published: envelope::sent(&self.properties),
            received: self.first_seen.unwrap_or_else(Timestamp::now),
        }
    }

    /// The replay it came from last, if it failed again.
    pub(crate) fn replay(&self) -> Option<Uuid> {
        envelope::text(&self.properties, envelope::REPLAY)?.parse().ok()
    }

    /// What it weighs in memory, in bytes and roughly.
    pub(crate) fn size(&self) -> usize {
        self.body.len() + 2048
    }
}
