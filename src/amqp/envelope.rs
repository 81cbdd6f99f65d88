//! The headers of close-sync that travel with a message: read from a delivery and written to its successor.
//!
//! A header of close-sync counts the attempts: the broker's counts differ between versions, and also rise for messages
//! that did not fail (rabbitmq.md §0, 2 and 11). A successor keeps the producer's properties and headers. It loses the
//! broker's own headers, and `expiration`, which would expire it in the dead-letter queue. If the producer's headers are
//! too large to leave room for those of close-sync, they are dropped.

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use crate::close::Priority;
use crate::domain::time::is_event_time;
use crate::outcome::{DeadLetter, Reason};

/// The prefix of all headers of close-sync.
const OURS: &str = "x-close-sync-";

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

/// Holds the bytes of unreadable headers (`compat/frame_sanitizer.rs`). Successors do not keep it.
pub const QUARANTINED: &str = "x-close-sync-set-aside";

/// The header of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// Headers about one failure. A replay removes them.
const FAILURE_HEADERS: [&str; 10] =
    [ATTEMPTS, DELAY_ID, ID, REASON, STAGE, ERROR, DECISION, FAILED_AT, FINGERPRINT, REPLACES];

/// The size limit for the producer's headers on a successor. All headers travel in one frame, 128 KiB by default, which
/// also holds those of close-sync and of the broker. A frame that is too large ends the connection.
const MAX_PRODUCER_HEADERS: usize = 64 * 1024;

/// Whether the broker adds this header. Such headers must not be published again (rabbitmq.md §3.3).
fn is_broker_header(name: &str) -> bool {
    name == "x-death"
        || name == "x-delivery-count"
        || name == "x-acquired-count"
        || ["x-first-death-", "x-last-death-", "x-opt-"].iter().any(|prefix| name.starts_with(prefix))
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
    properties: BasicProperties,
}

/// The header `traceparent` of W3C Trace Context, version 00. Successors keep the header unchanged, so that a trace
/// continues through delay queues and replays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParent(String);

impl TraceParent {
    /// Parses the header. A malformed one is ignored and never reaches the logs.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let nonzero = |part: &str, digits| hex(part, digits) && part.bytes().any(|b| b != b'0');
        match parts[..] {
            // A later version may append parts; the four keep their meaning.
            [version, trace, span, flags, ..]
                if hex(version, 2)
                    && version != "ff"
                    && (version != "00" || parts.len() == 4)
                    && nonzero(trace, 32)
                    && nonzero(span, 16)
                    && hex(flags, 2) =>
            {
                Some(Self(text.to_owned()))
            }
            _ => None,
        }
    }

    /// 32 hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }

    /// The producer's span, 16 hexadecimal digits.
    pub fn span_id(&self) -> &str {
        &self.0[36..52]
    }

    /// Whether the producer's span is exported.
    pub fn is_sampled(&self) -> bool {
        u8::from_str_radix(&self.0[53..55], 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

impl Envelope {
    /// Reads the properties of a delivery with this exchange and routing key, received at `now`.
    pub fn of(properties: BasicProperties, exchange: &str, routing_key: &str, now: Timestamp) -> Self {
        let number = number(&properties, ATTEMPTS);
        let id = |name| text(&properties, name).and_then(|text| text.parse().ok());
        Self {
            attempts: u32::try_from(number.unwrap_or(0)).unwrap_or(0),
            delay_id: id(DELAY_ID),
            replay: id(REPLAY),
            first_seen: text(&properties, FIRST_SEEN).and_then(|text| text.parse().ok()).unwrap_or(now),
            sent: sent(&properties),
            exchange: text(&properties, EXCHANGE).unwrap_or_else(|| exchange.to_owned()),
            routing_key: text(&properties, ROUTING_KEY).unwrap_or_else(|| routing_key.to_owned()),
            trace: text(&properties, TRACEPARENT).and_then(|text| TraceParent::parse(&text)),
            properties,
        }
    }

    /// The message id the producer set.
    pub fn own_id(&self) -> Option<&str> {
        self.properties.message_id().as_ref().map(ShortString::as_str)
    }

    /// The message id for logs.
    pub fn message_id(&self) -> &str {
        self.own_id().unwrap_or("-")
    }

    /// The correlation id the producer set, for logs.
    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_ref().map(ShortString::as_str)
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
        with_headers(&self.properties, |name| name != DELAY_ID, origin.into_iter().chain(headers))
    }
}

/// Properties for a replay: one replay more, and no attempts.
pub fn for_replay(properties: &BasicProperties, replay: Uuid) -> BasicProperties {
    let replays = number(properties, REPLAYS).unwrap_or(0).saturating_add(1);
    let headers = [(REPLAYS, replays.into()), (REPLAY, replay.to_string().into())];
    with_headers(properties, |name| !FAILURE_HEADERS.contains(&name), headers)
}

/// Properties for an imported dead letter, which keeps its id. It lost the broker's own headers, so its fingerprint is
/// stored explicitly.
pub fn for_restoring(properties: &BasicProperties, id: &str, fingerprint: &str) -> BasicProperties {
    let headers = [(ID, id.to_owned().into()), (FINGERPRINT, fingerprint.to_owned().into())];
    with_headers(properties, |_| true, headers)
}

/// Properties for an edited copy of a dead letter with the body `original` and this content id. Several edits keep the
/// first original.
pub fn for_edited(
    properties: &BasicProperties,
    original: &[u8],
    content: Uuid,
    now: Timestamp,
) -> BasicProperties {
    let first = header(properties, ORIGINAL).is_none();
    let original = first.then(|| (ORIGINAL, Header::Bytes(original.to_vec())));
    let headers = original.into_iter().chain([(EDITED_AT, now.to_string().into())]);
    for_replacing(&with_headers(properties, |_| true, headers), [content])
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
    with_headers(properties, |_| true, [(REPLACES, last.into())])
}

/// Removes the list of replaced dead letters.
pub fn without_replaces(properties: &BasicProperties) -> BasicProperties {
    with_headers(properties, |name| name != REPLACES, [])
}

/// The content ids of the dead letters that this copy replaces.
pub fn replaces(properties: &BasicProperties) -> Vec<Uuid> {
    let text = text(properties, REPLACES).unwrap_or_default();
    text.split(' ').filter_map(|content| content.parse().ok()).collect()
}

/// When the message was published according to its producer: the end of that second. A time that no message can have,
/// such as 0, is no time.
pub fn sent(properties: &BasicProperties) -> Option<Timestamp> {
    let end = |second: u64| Timestamp::new(i64::try_from(second).ok()?, 999_999_999).ok();
    properties.timestamp().and_then(end).filter(|at| is_event_time(*at))
}

/// Reads a text header.
#[expect(clippy::wildcard_enum_match_arm, reason = "all other AMQP types are not text")]
pub fn text(properties: &BasicProperties, name: &str) -> Option<String> {
    match header(properties, name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Reads a header of arbitrary bytes.
#[expect(clippy::wildcard_enum_match_arm, reason = "all other AMQP types are not strings")]
pub fn bytes(properties: &BasicProperties, name: &str) -> Option<Vec<u8>> {
    match header(properties, name)? {
        AMQPValue::LongString(text) => Some(text.as_bytes().to_vec()),
        _ => None,
    }
}

/// Reads a number header of any integer type.
#[expect(clippy::wildcard_enum_match_arm, reason = "all other AMQP types are not integers")]
pub fn number(properties: &BasicProperties, name: &str) -> Option<i64> {
    match header(properties, name)? {
        AMQPValue::ShortShortInt(number) => Some((*number).into()),
        AMQPValue::ShortShortUInt(number) => Some((*number).into()),
        AMQPValue::ShortInt(number) => Some((*number).into()),
        AMQPValue::ShortUInt(number) => Some((*number).into()),
        AMQPValue::LongInt(number) => Some((*number).into()),
        AMQPValue::LongUInt(number) => Some((*number).into()),
        AMQPValue::LongLongInt(number) => Some(*number),
        _ => None,
    }
}

fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

enum Header {
    Text(String),
    Bytes(Vec<u8>),
    Number(i64),
}

impl From<String> for Header {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Header {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

/// Copies properties without the broker's headers and those that `keep` rejects, and adds `headers`.
fn with_headers(
    properties: &BasicProperties,
    keep: impl Fn(&str) -> bool,
    headers: impl IntoIterator<Item = (&'static str, Header)>,
) -> BasicProperties {
    let mut table = FieldTable::default();
    let all = properties.headers().iter().flat_map(FieldTable::inner);
    let is_dropped = |name: &str| is_broker_header(name) || name == QUARANTINED;
    let kept: Vec<_> = all.filter(|(name, _)| keep(name.as_str()) && !is_dropped(name.as_str())).collect();
    let producer = kept.iter().filter(|(name, _)| !name.as_str().starts_with(OURS));
    let fit = producer.map(|(name, value)| size(name, value)).sum::<usize>() <= MAX_PRODUCER_HEADERS;
    for (name, value) in kept {
        if fit || name.as_str().starts_with(OURS) || name.as_str() == TRACEPARENT {
            table.insert(name.clone(), value.clone());
        }
    }
    for (name, value) in headers {
        let value = match value {
            Header::Text(text) => AMQPValue::LongString(text.into()),
            Header::Bytes(bytes) => AMQPValue::LongString(bytes.into()),
            Header::Number(number) => AMQPValue::LongLongInt(number),
        };
        table.insert(name.into(), value);
    }
    // lapin cannot unset a property, so build new ones without `expiration`, and without `user_id`, which the broker
    // compares with the user of the connection.
    let mut kept = BasicProperties::default().with_headers(table);
    macro_rules! keep {
        ($($get:ident $set:ident),*) => {
            $(if let Some(value) = properties.$get().clone() { kept = kept.$set(value); })*
        };
    }
    keep!(
        content_type with_content_type, content_encoding with_content_encoding, priority with_priority,
        correlation_id with_correlation_id, reply_to with_reply_to, message_id with_message_id,
        timestamp with_timestamp, kind with_type, app_id with_app_id
    );
    kept
}

/// Derives the id of a dead letter without one. Messages with equal content get equal ids.
pub fn id_from_content(message_id: Option<&str>, body: &[u8]) -> Uuid {
    let content = [message_id.unwrap_or_default().as_bytes(), body].concat();
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &content)
}

/// An upper bound for the size of a header in a frame.
#[expect(clippy::wildcard_enum_match_arm, reason = "all other types are small")]
fn size(name: &ShortString, value: &AMQPValue) -> usize {
    // The length of the name, the type, and a length or the largest of the small values.
    const OVERHEAD: usize = 1 + 1 + 8;
    let inner = match value {
        AMQPValue::LongString(text) => text.as_bytes().len(),
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::ByteArray(bytes) => bytes.len(),
        AMQPValue::FieldArray(values) => {
            values.as_slice().iter().map(|value| size(&ShortString::default(), value)).sum()
        }
        AMQPValue::FieldTable(table) => table.inner().iter().map(|(name, value)| size(name, value)).sum(),
        _ => 0,
    };
    OVERHEAD + name.as_str().len() + inner
}

#[cfg(test)]
mod tests {
    use lapin::message::Delivery;

    use super::*;
    use crate::outcome::{Reason, Stage};

    fn received(delivery: Delivery, now: Timestamp) -> Envelope {
        let Delivery { properties, exchange, routing_key, .. } = delivery;
        Envelope::of(properties, exchange.as_str(), routing_key.as_str(), now)
    }

    fn delivery(headers: &[(&'static str, AMQPValue)]) -> Delivery {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert((*name).into(), value.clone());
        }
        let mut delivery = Delivery::mock(1, "identify".into(), "users".into(), false, vec![]);
        delivery.properties = BasicProperties::default()
            .with_headers(table)
            .with_message_id("m-1".into())
            .with_expiration("1000".into());
        delivery
    }

    #[test]
    fn a_message_cannot_have_been_sent_in_1970() {
        let sent =
            |second| sent(&BasicProperties::default().with_timestamp(second)).map(Timestamp::as_second);
        assert_eq!([0, 1, 31_535_999, u64::MAX].map(sent), [None; 4]);
        assert_eq!(sent(1_634_400_027), Some(1_634_400_027));
    }

    #[test]
    fn only_a_well_formed_traceparent_is_accepted() {
        let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        for good in [format!("00-{trace}-{span}-01"), format!("cc-{trace}-{span}-00-later")] {
            let parsed = TraceParent::parse(&good).unwrap();
            assert_eq!((parsed.trace_id(), parsed.span_id()), (trace, span));
            assert_eq!(parsed.is_sampled(), good.ends_with("01"));
        }
        let zeros = "0".repeat(32);
        for bad in [
            String::new(),
            format!("00-{trace}-{span}"),
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-{zeros}-{span}-01"),
            format!("00-{trace}-{}-01", &zeros[..16]),
            format!("00-{trace}-jane@example.com-01"),
        ] {
            assert_eq!(TraceParent::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn producer_headers_that_are_too_large_are_dropped() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let successor = |bulk: usize| {
            let bulk = AMQPValue::LongString("x".repeat(bulk).into());
            let mut inner = FieldTable::default();
            inner.insert("inner".into(), bulk);
            let delivery = delivery(&[
                (TRACEPARENT, AMQPValue::LongString("00-1".into())),
                (REPLAYS, AMQPValue::LongLongInt(2)),
                ("tenant", AMQPValue::LongString("a".into())),
                ("baggage", AMQPValue::FieldTable(inner)),
            ]);
            let properties = received(delivery, now).for_delay(1, Uuid::now_v7());
            let has = |name: &str| properties.headers().as_ref().unwrap().contains_key(name);
            [TRACEPARENT, REPLAYS, ATTEMPTS, "tenant", "baggage"].map(has)
        };
        assert_eq!(successor(60_000), [true; 5]);
        assert_eq!(successor(70_000), [true, true, true, false, false]);
    }

    #[test]
    fn a_dead_letter_records_its_failure_and_a_replay_starts_over() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let first = delivery(&[
            ("traceparent", AMQPValue::LongString("00-1".into())),
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            ("x-first-death-queue", AMQPValue::LongString("q".into())),
        ]);
        let delay_id = Uuid::now_v7();
        let delayed = received(first, now).for_delay(1, delay_id);
        let mut second = Delivery::mock(2, "close-sync.retry".into(), "now".into(), true, vec![]);
        second.properties = delayed;
        let envelope = received(second, "2030-01-01T00:00:00Z".parse().unwrap());
        assert_eq!((envelope.attempts, envelope.first_seen, envelope.delay_id), (1, now, Some(delay_id)));
        assert_eq!((envelope.exchange.as_str(), envelope.routing_key.as_str()), ("identify", "users"));

        let dead = DeadLetter {
            reason: Reason::Rejected,
            stage: Stage::Write,
            error: "no".into(),
            field: Some("phones".into()),
            decision: Some("nobody_known; calls: 3".into()),
            response: None,
        };
        let properties = envelope.for_dead_letter(&dead, Uuid::now_v7(), now);
        assert_eq!(text(&properties, REASON).as_deref(), Some("rejected"));
        assert_eq!(text(&properties, FINGERPRINT).as_deref(), Some("rejected:write:phones"));
        assert_eq!(number(&properties, ATTEMPTS), Some(2));
        assert_eq!(text(&properties, "traceparent").as_deref(), Some("00-1"));
        assert_eq!(number(&properties, "x-delivery-count"), None);
        assert_eq!(properties.expiration(), &None);

        let again = Uuid::now_v7();
        let replay = for_replay(&properties, again);
        assert_eq!(text(&replay, REPLAY), Some(again.to_string()));
        assert_eq!((number(&replay, ATTEMPTS), text(&replay, REASON), text(&replay, ID)), (None, None, None));
        assert_eq!(text(&replay, DELAY_ID), None);
        assert_eq!(
            (number(&replay, REPLAYS), text(&replay, EXCHANGE).as_deref()),
            (Some(1), Some("identify"))
        );
        assert_eq!(number(&for_replay(&replay, Uuid::now_v7()), REPLAYS), Some(2));
        assert_eq!(replay.message_id().as_ref().map(ShortString::as_str), Some("m-1"));
    }
}
