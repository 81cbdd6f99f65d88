//! One dead letter, as its headers tell it.

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use serde::Serialize;
use uuid::Uuid;

use crate::amqp::headers;
use crate::worker::Arrival;

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
    pub(super) properties: BasicProperties,
}

/// Fingerprints of what the broker put here by itself begin with it; its reason follows.
pub const BY_THE_BROKER: &str = "broker";

impl DeadLetter {
    pub(super) fn read(delivery: &Delivery) -> Self {
        Self::of(delivery.properties.clone(), delivery.data.clone())
    }

    pub(super) fn of(properties: BasicProperties, body: Vec<u8>) -> Self {
        let text = |name| headers::text(&properties, name);
        let time = |name| text(name)?.parse().ok();
        let message_id = properties.message_id().as_ref().map(ToString::to_string);
        let by_the_broker = || {
            let reason = text("x-first-death-reason");
            format!("{BY_THE_BROKER}:{}:-", reason.as_deref().unwrap_or("-"))
        };
        Self {
            id: text(headers::ID).unwrap_or_else(|| by_content(message_id.as_deref(), &body).to_string()),
            reason: text(headers::REASON),
            stage: text(headers::STAGE),
            error: text(headers::ERROR),
            attempts: headers::number(&properties, headers::ATTEMPTS),
            replays: headers::number(&properties, headers::REPLAYS).unwrap_or(0),
            first_seen: time(headers::FIRST_SEEN),
            failed_at: time(headers::FAILED_AT),
            edited_at: time(headers::EDITED_AT),
            exchange: text(headers::EXCHANGE),
            routing_key: text(headers::ROUTING_KEY),
            fingerprint: text(headers::FINGERPRINT).unwrap_or_else(by_the_broker),
            decision: text(headers::DECISION),
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
    pub(super) fn content_alone(&self) -> Uuid {
        let properties = headers::without_replaces(&self.properties);
        Self { properties, ..self.clone() }.content()
    }

    /// Whether it was given its id, which then no other has.
    pub(super) fn has_own_id(&self) -> bool {
        headers::text(&self.properties, headers::ID).is_some()
    }

    /// The contents of those whose place it took.
    pub(super) fn replaces(&self) -> Vec<Uuid> {
        headers::replaces(&self.properties)
    }

    /// The body as its producer sent it, if it was edited since.
    pub fn original(&self) -> Option<Vec<u8>> {
        headers::bytes(&self.properties, headers::ORIGINAL)
    }

    /// When the message came, for want of a better time of its event.
    pub fn arrival(&self) -> Arrival {
        Arrival {
            sent: headers::sent(&self.properties),
            received: self.first_seen.unwrap_or_else(Timestamp::now),
        }
    }

    /// The replay it came from last, if it failed again.
    pub(super) fn replay(&self) -> Option<Uuid> {
        headers::text(&self.properties, headers::REPLAY)?.parse().ok()
    }

    /// What it weighs in memory, in bytes and roughly.
    pub(super) fn size(&self) -> usize {
        self.body.len() + 2048
    }
}

/// A name for a message that came here without any. Producers may give several the same id.
pub(in crate::amqp) fn by_content(message_id: Option<&str>, body: &[u8]) -> Uuid {
    let content = [message_id.unwrap_or_default().as_bytes(), body].concat();
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &content)
}
