//! The headers of close-sync that travel with a message: read from a delivery and written to its successor.
//!
//! A header of close-sync counts the attempts: the broker's counts differ between versions, and also rise for messages
//! that did not fail (rabbitmq.md §0, 2 and 11). A successor keeps the producer's properties and headers, within limits
//! (`properties`).
//!
//! **Forged headers.** Producers can write to their exchange and to nothing else. So headers of close-sync count only on
//! a delivery that came through close-sync's own retry exchange ([`Route::is_own`]). On any other delivery they are
//! removed before anything reads them, and no successor has them. In the dead-letter queue they count unless RabbitMQ
//! itself put the message there ([`trusted_dead_letter`]).

mod properties;
#[cfg(test)]
mod tests;
mod trace_parent;

use std::time::Duration;

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::ShortString;
use uuid::Uuid;

pub use crate::amqp::envelope::properties::{
    Death, MAX_HEADERS, MAX_ORIGINAL, bytes, content_encoding, is_dead_lettered_by_broker, last_death,
    number, text,
};
use crate::amqp::envelope::properties::{Header, bare, copy, has_header, producers, without_own_headers};
pub use crate::amqp::envelope::trace_parent::TraceParent;
use crate::close::Priority;
use crate::domain::time::is_event_time;
use crate::outcome::{DeadLetter, Reason};

/// The number of attempts so far.
pub const ATTEMPTS: &str = "x-close-sync-attempt";
/// Identifies a message that returns from a delay queue.
pub const DELAY_ID: &str = "x-close-sync-detour";
/// When close-sync first received the message, RFC 3339.
pub const FIRST_SEEN: &str = "x-close-sync-first-seen";
/// The exchange the producer published to.
pub const EXCHANGE: &str = "x-close-sync-exchange";
/// The producer's routing key.
pub const ROUTING_KEY: &str = "x-close-sync-routing-key";
/// How many times the message was replayed from the dead-letter queue.
pub const REPLAYS: &str = "x-close-sync-replays";
/// The id of a replayed message. The worker reports its outcome to the replay under this id.
pub const REPLAY: &str = "x-close-sync-replay";
/// The original body of an edited dead letter.
pub const ORIGINAL: &str = "x-close-sync-original";
/// When the dead letter was last edited, RFC 3339.
pub const EDITED_AT: &str = "x-close-sync-edited-at";
/// The content ids of the dead letters that this copy replaces. If an edit was interrupted, both exist, and the replaced
/// one must not be replayed.
pub const REPLACES: &str = "x-close-sync-replaces";
/// The id of the dead letter.
pub const ID: &str = "x-close-sync-dead-letter-id";
/// Why the message was dead-lettered, [`crate::outcome::Reason::label`].
pub const REASON: &str = "x-close-sync-reason";
/// The stage that failed, [`crate::outcome::Stage::label`].
pub const STAGE: &str = "x-close-sync-stage";
/// The error, without personal data.
pub const ERROR: &str = "x-close-sync-error";
/// When the message was dead-lettered, RFC 3339.
pub const FAILED_AT: &str = "x-close-sync-failed-at";
/// How far processing came: the records found, the rule that decided, the planned writes; without personal data.
pub const DECISION: &str = "x-close-sync-decision";
/// Equal for messages that failed in the same way.
pub const FINGERPRINT: &str = "x-close-sync-fingerprint";

/// Takes the place of headers that cannot be read (`compat/frame_sanitizer`). Successors do not keep it.
pub const QUARANTINED: &str = "x-close-sync-set-aside";

/// The header of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// All headers that close-sync writes.
const OWN_HEADERS: [&str; 17] = [
    ATTEMPTS,
    DELAY_ID,
    FIRST_SEEN,
    EXCHANGE,
    ROUTING_KEY,
    REPLAYS,
    REPLAY,
    ORIGINAL,
    EDITED_AT,
    REPLACES,
    ID,
    REASON,
    STAGE,
    ERROR,
    FAILED_AT,
    DECISION,
    FINGERPRINT,
];

/// Headers about one failure. A replay removes them.
const FAILURE_HEADERS: [&str; 10] =
    [ATTEMPTS, DELAY_ID, ID, REASON, STAGE, ERROR, DECISION, FAILED_AT, FINGERPRINT, REPLACES];

/// The way of a delivery to the work queue.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// The exchange it was published to.
    pub exchange: &'a str,
    /// Its routing key.
    pub routing_key: &'a str,
    /// It came through close-sync's own retry exchange, to which producers cannot write.
    pub is_own: bool,
}

/// The properties and headers of a delivery.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// The number of earlier attempts.
    pub attempts: u32,
    /// Set when the message first went to a delay queue.
    pub delay_id: Option<Uuid>,
    /// The id of a replayed message, if a replay waits for its outcome.
    pub replay: Option<Uuid>,
    /// When the message was first received.
    pub first_seen: Timestamp,
    /// When the message was published, [`sent`].
    pub sent: Option<Timestamp>,
    /// The exchange the producer published to.
    pub exchange: String,
    /// The producer's routing key.
    pub routing_key: String,
    /// The trace the message belongs to, if its producer sent one.
    pub trace: Option<TraceParent>,
    /// Its headers could not be read.
    pub without_headers: bool,
    properties: BasicProperties,
}

impl Envelope {
    /// Reads the properties of a delivery, received at `now`.
    pub fn of(properties: BasicProperties, route: Route<'_>, now: Timestamp) -> Self {
        let without_headers = has_header(&properties, QUARANTINED);
        let properties = if route.is_own { properties } else { without_own_headers(properties) };
        let number = number(&properties, ATTEMPTS);
        let id = |name| text(&properties, name).and_then(|text| text.parse().ok());
        Self {
            attempts: u32::try_from(number.unwrap_or(0)).unwrap_or(0),
            delay_id: id(DELAY_ID),
            replay: id(REPLAY),
            first_seen: text(&properties, FIRST_SEEN)
                .and_then(|text| text.parse().ok())
                .map_or(now, |first_seen: Timestamp| first_seen.min(now)),
            sent: sent(&properties),
            exchange: text(&properties, EXCHANGE).unwrap_or_else(|| route.exchange.to_owned()),
            routing_key: text(&properties, ROUTING_KEY).unwrap_or_else(|| route.routing_key.to_owned()),
            trace: text(&properties, TRACEPARENT).and_then(|text| TraceParent::parse(&text)),
            without_headers,
            properties,
        }
    }

    /// The same message without anything of its producer's that its successor does not need.
    #[must_use]
    pub fn bare(&self) -> Self {
        Self { properties: bare(&self.properties), ..self.clone() }
    }

    /// The message id the producer set.
    pub fn own_id(&self) -> Option<&str> {
        self.properties.message_id().as_ref().map(ShortString::as_str)
    }

    /// A hash of what its producer sent. Equal at each delivery.
    pub fn content_hash(&self, body: &[u8]) -> Uuid {
        let content = [producers(&self.properties).as_bytes(), self.message_id().as_bytes(), body].concat();
        Uuid::new_v5(&Uuid::NAMESPACE_OID, &content)
    }

    /// The message id for logs.
    pub fn message_id(&self) -> &str {
        self.own_id().unwrap_or("-")
    }

    /// The correlation id the producer set, for logs.
    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_ref().map(ShortString::as_str)
    }

    /// The encoding of the body, such as `gzip`.
    pub fn content_encoding(&self) -> Option<&str> {
        content_encoding(&self.properties)
    }

    /// First deliveries go before returns from a delay queue, and these before replays.
    pub fn priority(&self) -> Priority {
        match (number(&self.properties, REPLAYS), text(&self.properties, FIRST_SEEN)) {
            (Some(1..), _) => Priority::Replay,
            (_, None) => Priority::Live,
            // It returned from a delay queue.
            (_, Some(_)) => Priority::Retry,
        }
    }

    /// The time since the message was first received.
    pub fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.first_seen)).unwrap_or_default()
    }

    /// Properties for a delay queue, after `attempts` attempts.
    pub fn for_delay(&self, attempts: u32, delay_id: Uuid) -> BasicProperties {
        self.successor(vec![(ATTEMPTS, i64::from(attempts).into()), (DELAY_ID, delay_id.to_string().into())])
    }

    /// Properties for the dead-letter queue. The attempt that just failed counts.
    pub fn for_dead_letter(&self, dead: &DeadLetter, id: Uuid, now: Timestamp) -> BasicProperties {
        let mut headers: Vec<(_, Header)> = vec![
            (ATTEMPTS, (i64::from(self.attempts) + 1).into()),
            (ID, id.to_string().into()),
            (REASON, dead.reason.label().to_owned().into()),
            (STAGE, dead.stage.label().to_owned().into()),
            (ERROR, self.error(dead, now).into()),
            (FAILED_AT, now.to_string().into()),
            (FINGERPRINT, dead.fingerprint().into()),
        ];
        headers.extend(dead.decision.clone().map(|decision| (DECISION, decision.into())));
        self.successor(headers)
    }

    /// The error. If the message is exhausted, with the number of attempts and their duration.
    fn error(&self, dead: &DeadLetter, now: Timestamp) -> String {
        if dead.reason != Reason::Exhausted {
            return dead.error.clone();
        }
        let minutes = now.duration_since(self.first_seen).as_mins();
        format!("{}; attempts: {}, in {minutes} minutes", dead.error, self.attempts.saturating_add(1))
    }

    fn successor(&self, headers: Vec<(&'static str, Header)>) -> BasicProperties {
        let origin = vec![
            (FIRST_SEEN, Header::from(self.first_seen.to_string())),
            (EXCHANGE, self.exchange.clone().into()),
            (ROUTING_KEY, self.routing_key.clone().into()),
        ];
        // The caller sets a new one.
        copy(&self.properties, |name| name != DELAY_ID, origin.into_iter().chain(headers))
    }
}

/// The properties of a message of the dead-letter queue. If RabbitMQ itself dead-lettered it, any header of close-sync on
/// it is the producer's, and is removed.
pub fn trusted_dead_letter(properties: BasicProperties) -> BasicProperties {
    if is_dead_lettered_by_broker(&properties) { without_own_headers(properties) } else { properties }
}

/// Properties for a replay: one replay more, and no attempts.
pub fn for_replay(properties: &BasicProperties, replay: Uuid) -> BasicProperties {
    let replays = number(properties, REPLAYS).unwrap_or(0).saturating_add(1);
    let headers = [(REPLAYS, replays.into()), (REPLAY, replay.to_string().into())];
    copy(properties, |name| !FAILURE_HEADERS.contains(&name), headers)
}

/// Properties for an imported dead letter, which keeps its id. It lost the broker's own headers, so its fingerprint is
/// stored explicitly.
pub fn for_restoring(properties: &BasicProperties, id: &str, fingerprint: &str) -> BasicProperties {
    let headers = [(ID, id.to_owned().into()), (FINGERPRINT, fingerprint.to_owned().into())];
    copy(properties, |_| true, headers)
}

/// Properties for an edited copy of a dead letter with the body `original` and this content id. Several edits keep the
/// first original.
pub fn for_edited(
    properties: &BasicProperties,
    original: &[u8],
    content: Uuid,
    now: Timestamp,
) -> BasicProperties {
    let first = bytes(properties, ORIGINAL).is_none();
    let original = first.then(|| (ORIGINAL, Header::Bytes(original.to_vec())));
    let headers = original.into_iter().chain([(EDITED_AT, now.to_string().into())]);
    for_replacing(&copy(properties, |_| true, headers), [content])
}

/// Properties for a copy that replaces the dead letters with these content ids, and those it already replaces.
pub fn for_replacing(
    properties: &BasicProperties,
    contents: impl IntoIterator<Item = Uuid>,
) -> BasicProperties {
    const MAX_REPLACED: usize = 8;
    let mut all = replaces(properties);
    all.extend(contents);
    let last = all.split_off(all.len().saturating_sub(MAX_REPLACED));
    let last = last.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" ");
    copy(properties, |_| true, [(REPLACES, last.into())])
}

/// Removes the list of replaced dead letters.
pub fn without_replaces(properties: &BasicProperties) -> BasicProperties {
    copy(properties, |name| name != REPLACES, [])
}

/// The content ids of the dead letters that this copy replaces.
pub fn replaces(properties: &BasicProperties) -> Vec<Uuid> {
    let text = text(properties, REPLACES).unwrap_or_default();
    text.split(' ').filter_map(|content| content.parse().ok()).collect()
}

/// When the message was published according to its producer: the end of that second. `None` also for a time that no
/// message can have, such as 0.
pub fn sent(properties: &BasicProperties) -> Option<Timestamp> {
    let end = |second: u64| Timestamp::new(i64::try_from(second).ok()?, 999_999_999).ok();
    properties.timestamp().and_then(end).filter(|at| is_event_time(*at))
}

/// Derives the id of a dead letter without one. Messages with equal content get equal ids.
pub fn id_from_content(message_id: Option<&str>, body: &[u8]) -> Uuid {
    let content = [message_id.unwrap_or_default().as_bytes(), body].concat();
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &content)
}
