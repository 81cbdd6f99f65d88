//! What travels with a message: the headers that are ours, read from a delivery and written to its
//! successor.
//!
//! Attempts are counted in a header of our own: the broker's counts differ between versions and rise
//! for innocents too (rabbitmq.md §0, 2 and 11). A successor keeps the producer's properties and
//! headers; the broker's own marks are stripped, and so is `expiration`, which would make a message
//! vanish from the dead-letter queue. Headers of a size that leaves no room for ours stay behind.

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use crate::close::Priority;
use crate::outcome::{DeadLetter, Reason};

/// How the names of all headers of ours begin.
const OURS: &str = "x-close-sync-";

/// Attempts made so far.
pub const ATTEMPTS: &str = "x-close-sync-attempt";
/// By this a message is known that comes back from a delay queue.
pub const DELAY_ID: &str = "x-close-sync-detour";
/// When close-sync first received the message, RFC 3339.
pub const FIRST_SEEN: &str = "x-close-sync-first-seen";
/// The exchange the producer published to.
pub const EXCHANGE: &str = "x-close-sync-exchange";
/// The producer's routing key.
pub const ROUTING_KEY: &str = "x-close-sync-routing-key";
/// Times the message was replayed from the dead-letter queue.
pub const REPLAYS: &str = "x-close-sync-replays";
/// The replay a message comes from: whoever replays it is told by this what became of it.
pub const REPLAY: &str = "x-close-sync-replay";
/// The body as its producer sent it, of a dead letter that was edited.
pub const ORIGINAL: &str = "x-close-sync-original";
/// When it was edited last, RFC 3339.
pub const EDITED_AT: &str = "x-close-sync-edited-at";
/// What edited copies take the place of, by what `dead_letters::letter` calls their content: there twice, after an edit
/// that was killed, the other one is not to be replayed.
pub const REPLACES: &str = "x-close-sync-replaces";
/// The id of a dead letter.
pub const ID: &str = "x-close-sync-dead-letter-id";
/// Why it was dead-lettered, [`crate::outcome::Reason::label`].
pub const REASON: &str = "x-close-sync-reason";
/// Where it failed, [`crate::outcome::Stage::label`].
pub const STAGE: &str = "x-close-sync-stage";
/// What happened, without personal data.
pub const ERROR: &str = "x-close-sync-error";
/// When it was dead-lettered, RFC 3339.
pub const FAILED_AT: &str = "x-close-sync-failed-at";
/// How far it came: what was found, which rule decided, what was to be written; without personal data.
pub const DECISION: &str = "x-close-sync-decision";
/// Equal for messages that failed alike.
pub const FINGERPRINT: &str = "x-close-sync-fingerprint";

/// What was made of headers that cannot be read (`frames.rs`). Stays behind: nobody could read it either.
pub const QUARANTINED: &str = "x-close-sync-set-aside";

/// The producer's place in a trace, as W3C Trace Context has it.
pub const TRACEPARENT: &str = "traceparent";

/// Headers about one failure: gone when the message is replayed.
const OF_A_FAILURE: [&str; 10] =
    [ATTEMPTS, DELAY_ID, ID, REASON, STAGE, ERROR, DECISION, FAILED_AT, FINGERPRINT, REPLACES];

/// Most bytes of the producer's headers that a successor takes along. All headers travel in one frame, of 128 KiB by
/// default, where ours and the broker's have to fit in too: one that is too large ends the connection, every time.
const MOST_TAKEN_ALONG: usize = 64 * 1024;

/// Headers the broker adds, which must not be sent back to it (rabbitmq.md §3.3).
fn of_the_broker(name: &str) -> bool {
    name == "x-death"
        || name == "x-delivery-count"
        || name == "x-acquired-count"
        || ["x-first-death-", "x-last-death-", "x-opt-"].iter().any(|prefix| name.starts_with(prefix))
}

/// What is known of a message besides its body.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Attempts before this one.
    pub attempts: u32,
    /// By this it is known since it first left for a delay queue.
    pub delay_id: Option<Uuid>,
    /// The replay it comes from, if somebody waits to be told what becomes of it.
    pub replay: Option<Uuid>,
    /// When it was first received.
    pub first_seen: Timestamp,
    /// When it was published, [`sent`].
    pub sent: Option<Timestamp>,
    /// The exchange the producer published to.
    pub exchange: String,
    /// The producer's routing key.
    pub routing_key: String,
    /// The trace it belongs to, if its producer tells.
    pub trace: Option<TraceParent>,
    properties: BasicProperties,
}

/// Where a message stands in a trace: the header `traceparent` of W3C Trace Context, version 00. Successors keep
/// the header as it is, so that a trace goes on through delay queues and replays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParent(String);

impl TraceParent {
    /// Reads the header; whatever has another form is not passed on into logs.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let told = |part: &str, digits| hex(part, digits) && part.bytes().any(|b| b != b'0');
        match parts[..] {
            // A later version may append parts; the four keep their meaning.
            [version, trace, span, flags, ..]
                if hex(version, 2)
                    && version != "ff"
                    && (version != "00" || parts.len() == 4)
                    && told(trace, 32)
                    && told(span, 16)
                    && hex(flags, 2) =>
            {
                Some(Self(text.to_owned()))
            }
            _ => None,
        }
    }

    /// The id of the trace, 32 digits.
    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }

    /// The id of the producer's span, 16 digits.
    pub fn span_id(&self) -> &str {
        &self.0[36..52]
    }

    /// Whether the producer's span is exported.
    pub fn is_sampled(&self) -> bool {
        u8::from_str_radix(&self.0[53..55], 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

impl Envelope {
    /// Reads the properties of a delivery that came by this exchange and routing key and was received at `now`.
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

    /// The producer's id of the message, if it gave it one.
    pub fn own_id(&self) -> Option<&str> {
        self.properties.message_id().as_ref().map(ShortString::as_str)
    }

    /// The same for logs.
    pub fn message_id(&self) -> &str {
        self.own_id().unwrap_or("-")
    }

    /// The producer's id of what the message belongs to, for logs.
    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_ref().map(ShortString::as_str)
    }

    /// Who goes first: who comes for the first time, then who waited in a delay queue, then replays.
    pub fn priority(&self) -> Priority {
        match (number(&self.properties, REPLAYS), text(&self.properties, FIRST_SEEN)) {
            (Some(1..), _) => Priority::Replay,
            (_, None) => Priority::Live,
            // It has been here before.
            (_, Some(_)) => Priority::Retry,
        }
    }

    /// Properties for a delay queue, after `attempts` attempts; by `delay_id` it will be known.
    pub fn for_delay(&self, attempts: u32, delay_id: Uuid) -> BasicProperties {
        self.successor(vec![(ATTEMPTS, i64::from(attempts).into()), (DELAY_ID, delay_id.to_string().into())])
    }

    /// Properties for the dead-letter queue, where it has this id. The last attempt counts.
    pub fn for_dead_letter(&self, dead: &DeadLetter, id: Uuid, now: Timestamp) -> BasicProperties {
        let mut ours: Vec<(_, Header)> = vec![
            (ATTEMPTS, (i64::from(self.attempts) + 1).into()),
            (ID, id.to_string().into()),
            (REASON, dead.reason.label().to_owned().into()),
            (STAGE, dead.stage.label().to_owned().into()),
            (ERROR, self.error(dead, now).into()),
            (FAILED_AT, now.to_string().into()),
            (FINGERPRINT, dead.fingerprint().into()),
        ];
        ours.extend(dead.decision.clone().map(|decision| (DECISION, decision.into())));
        self.successor(ours)
    }

    /// What happened, and how long it was tried where that is why.
    fn error(&self, dead: &DeadLetter, now: Timestamp) -> String {
        if dead.reason != Reason::Exhausted {
            return dead.error.clone();
        }
        let minutes = now.duration_since(self.first_seen).as_mins();
        format!("{}; attempts: {}, in {minutes} minutes", dead.error, self.attempts + 1)
    }

    fn successor(&self, ours: Vec<(&'static str, Header)>) -> BasicProperties {
        let origin = vec![
            (FIRST_SEEN, Header::from(self.first_seen.to_string())),
            (EXCHANGE, self.exchange.clone().into()),
            (ROUTING_KEY, self.routing_key.clone().into()),
        ];
        // Of a delay_id it is told anew.
        with_headers(&self.properties, |name| name != DELAY_ID, origin.into_iter().chain(ours))
    }
}

/// Properties for a replay: as it came, with one more replay and no attempts.
pub fn for_replay(properties: &BasicProperties, replay: Uuid) -> BasicProperties {
    let replays = number(properties, REPLAYS).unwrap_or(0) + 1;
    let ours = [(REPLAYS, replays.into()), (REPLAY, replay.to_string().into())];
    with_headers(properties, |name| !OF_A_FAILURE.contains(&name), ours)
}

/// Properties for a dead letter that goes back to where it was, by the same name. What the broker noted down about it
/// is lost, so that it is told here how it failed.
pub fn for_restoring(properties: &BasicProperties, id: &str, fingerprint: &str) -> BasicProperties {
    let ours = [(ID, id.to_owned().into()), (FINGERPRINT, fingerprint.to_owned().into())];
    with_headers(properties, |_| true, ours)
}

/// The same with another body in place of `original`, which is that of `content`. What its producer sent is kept over
/// several edits.
pub fn for_edited(
    properties: &BasicProperties,
    original: &[u8],
    content: Uuid,
    now: Timestamp,
) -> BasicProperties {
    let first = header(properties, ORIGINAL).is_none();
    let original = first.then(|| (ORIGINAL, Header::Bytes(original.to_vec())));
    let ours = original.into_iter().chain([(EDITED_AT, now.to_string().into())]);
    for_replacing(&with_headers(properties, |_| true, ours), [content])
}

/// The same in place of dead letters with these contents, besides those it took the place of before.
pub fn for_replacing(
    properties: &BasicProperties,
    contents: impl IntoIterator<Item = Uuid>,
) -> BasicProperties {
    const MOST: usize = 8;
    let mut all = replaces(properties);
    all.extend(contents);
    let last = all.split_off(all.len().saturating_sub(MOST));
    let last = last.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" ");
    with_headers(properties, |_| true, [(REPLACES, last.into())])
}

/// The same without a word of what it took the place of.
pub fn without_replaces(properties: &BasicProperties) -> BasicProperties {
    with_headers(properties, |name| name != REPLACES, [])
}

/// What an edited copy takes the place of.
pub fn replaces(properties: &BasicProperties) -> Vec<Uuid> {
    let text = text(properties, REPLACES).unwrap_or_default();
    text.split(' ').filter_map(|content| content.parse().ok()).collect()
}

/// When a message was published, as its producer says: the end of that second.
pub fn sent(properties: &BasicProperties) -> Option<Timestamp> {
    properties.timestamp().and_then(|s| Timestamp::new(i64::try_from(s).ok()?, 999_999_999).ok())
}

/// A text header.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other type of AMQP is no text")]
pub fn text(properties: &BasicProperties, name: &str) -> Option<String> {
    match header(properties, name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// A header of any bytes.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other type of AMQP is something else")]
pub fn bytes(properties: &BasicProperties, name: &str) -> Option<Vec<u8>> {
    match header(properties, name)? {
        AMQPValue::LongString(text) => Some(text.as_bytes().to_vec()),
        _ => None,
    }
}

/// A number header, whatever width a client gave it.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other type of AMQP is no number")]
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

/// The properties with the broker's headers removed, those kept that `keep` names, and ours on top.
fn with_headers(
    properties: &BasicProperties,
    keep: impl Fn(&str) -> bool,
    ours: impl IntoIterator<Item = (&'static str, Header)>,
) -> BasicProperties {
    let mut table = FieldTable::default();
    let all = properties.headers().iter().flat_map(FieldTable::inner);
    let left_behind = |name: &str| of_the_broker(name) || name == QUARANTINED;
    let kept: Vec<_> = all.filter(|(name, _)| keep(name.as_str()) && !left_behind(name.as_str())).collect();
    let theirs = kept.iter().filter(|(name, _)| !name.as_str().starts_with(OURS));
    let fit = theirs.map(|(name, value)| size(name, value)).sum::<usize>() <= MOST_TAKEN_ALONG;
    for (name, value) in kept {
        if fit || name.as_str().starts_with(OURS) || name.as_str() == TRACEPARENT {
            table.insert(name.clone(), value.clone());
        }
    }
    for (name, value) in ours {
        let value = match value {
            Header::Text(text) => AMQPValue::LongString(text.into()),
            Header::Bytes(bytes) => AMQPValue::LongString(bytes.into()),
            Header::Number(number) => AMQPValue::LongLongInt(number),
        };
        table.insert(name.into(), value);
    }
    // There is no way to unset a property: build anew without `expiration`, and without `user_id`,
    // which the broker compares with the user of the connection.
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

/// The id of a dead letter that carries none, from its content: messages with equal content get equal ids.
pub fn id_from_content(message_id: Option<&str>, body: &[u8]) -> Uuid {
    let content = [message_id.unwrap_or_default().as_bytes(), body].concat();
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &content)
}

/// The bytes of a header in a frame, or some more.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other type is small")]
fn size(name: &ShortString, value: &AMQPValue) -> usize {
    // Length of the name, type, and the largest of the small ones or a length.
    const FRAME: usize = 1 + 1 + 8;
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
    FRAME + name.as_str().len() + inner
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
    fn a_trace_is_known_by_its_form() {
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
    fn headers_too_large_to_travel_with_ours_stay_behind() {
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
            let known = |name: &str| properties.headers().as_ref().unwrap().contains_key(name);
            [TRACEPARENT, REPLAYS, ATTEMPTS, "tenant", "baggage"].map(known)
        };
        assert_eq!(successor(60_000), [true; 5]);
        assert_eq!(successor(70_000), [true, true, true, false, false]);
    }

    #[test]
    fn a_dead_letter_tells_its_story_and_a_replay_starts_anew() {
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
            said: None,
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
