//! The properties of a message: reading its headers, and copying what a successor may keep.
//!
//! **The trust boundary.** The producer controls every property. A copy therefore keeps:
//!
//! - of the headers of close-sync only those with a known name, as a text or a number, cut to a limit;
//! - no header that RabbitMQ acts on: its own (rabbitmq.md §3.3), and `CC` and `BCC`, which send a copy to each key they
//!   name. AMQP 1.0 producers can send them as text, which makes RabbitMQ close the channel of the successor;
//! - no `reply_to` of RabbitMQ's direct reply-to, which is refused on a channel that did not ask for replies;
//! - no `expiration`, which would expire the message in the dead-letter queue, and no `user_id`, which RabbitMQ compares
//!   with the user of the connection;
//! - the producer's headers if all headers together stay below [`MAX_HEADERS`], and else only `traceparent`.
//!
//! **The limit** counts all headers, those of close-sync included. All headers travel in one frame, 128 KiB by default,
//! with the other properties (2.5 KiB at most) and the headers that the broker adds when it delivers the message. A
//! frame that is too large ends the connection. A test adds up the limits of close-sync's own headers.

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};

use crate::amqp::envelope::{DECISION, ERROR, ORIGINAL, OWN_HEADERS, TRACEPARENT, TraceParent};

/// The prefix of all headers of close-sync.
const PREFIX: &str = "x-close-sync-";

/// The size limit for all headers of a message that close-sync publishes, in bytes.
pub const MAX_HEADERS: usize = 96 * 1024;

/// The largest original body that an edited dead letter keeps in a header, in bytes.
pub const MAX_ORIGINAL: usize = 32 * 1024;

/// The limit for a text about a failure, in bytes.
const MAX_EXPLANATION: usize = 4096;
/// The limit for any other text header of close-sync, in bytes.
const MAX_TEXT: usize = 1024;

/// RabbitMQ adds this header when it dead-letters a message. A client cannot remove it.
const DEATHS: &str = "x-death";

/// Whether RabbitMQ itself dead-lettered the message: it expired, was rejected, or exceeded a limit of the queue.
/// Successors never have the header.
pub fn is_dead_lettered_by_broker(properties: &BasicProperties) -> bool {
    header(properties, DEATHS).is_some()
}

/// How RabbitMQ last dead-lettered a message. A producer on RabbitMQ 3.10 can forge all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub time: Option<Timestamp>,
    /// The exchange and the routing key it was published with.
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
}

/// The newest entry of `x-death` (<https://www.rabbitmq.com/docs/dlx#effects>).
pub fn last_death(properties: &BasicProperties) -> Option<Death> {
    let AMQPValue::FieldArray(deaths) = header(properties, DEATHS)? else { return None };
    let AMQPValue::FieldTable(death) = deaths.as_slice().first()? else { return None };
    let member = |name: &str| death.inner().get(name);
    let time = match member("time") {
        Some(AMQPValue::Timestamp(seconds)) => i64::try_from(*seconds).ok(),
        _ => None,
    };
    let keys = match member("routing-keys") {
        Some(AMQPValue::FieldArray(keys)) => keys.as_slice().first(),
        _ => None,
    };
    Some(Death {
        time: time.and_then(|seconds| Timestamp::from_second(seconds).ok()),
        exchange: member("exchange").and_then(as_text),
        routing_key: keys.and_then(as_text),
    })
}

/// Whether RabbitMQ acts on this header.
fn is_broker_header(name: &str) -> bool {
    [DEATHS, "x-delivery-count", "x-acquired-count", "CC", "BCC"].contains(&name)
        || ["x-first-death-", "x-last-death-", "x-opt-"].iter().any(|prefix| name.starts_with(prefix))
}

/// The producer's headers in a notation that no other headers have.
pub(super) fn producers(properties: &BasicProperties) -> String {
    let all = properties.headers().iter().flat_map(FieldTable::inner);
    let producers =
        all.filter(|(name, _)| !name.as_str().starts_with(PREFIX) && !is_broker_header(name.as_str()));
    format!("{:?}", producers.collect::<Vec<_>>())
}

/// The same properties without any header of close-sync.
pub(super) fn without_own_headers(properties: BasicProperties) -> BasicProperties {
    let Some(headers) = properties.headers() else { return properties };
    if !headers.inner().keys().any(|name| name.as_str().starts_with(PREFIX)) {
        return properties;
    }
    let mut table = FieldTable::default();
    for (name, value) in headers.inner().iter().filter(|(name, _)| !name.as_str().starts_with(PREFIX)) {
        table.insert(name.clone(), value.clone());
    }
    properties.with_headers(table)
}

/// The value of a header that a copy sets.
pub(super) enum Header {
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

impl From<Header> for AMQPValue {
    fn from(header: Header) -> Self {
        match header {
            Header::Text(text) => Self::LongString(text.into()),
            Header::Bytes(bytes) => Self::LongString(bytes.into()),
            Header::Number(number) => Self::LongLongInt(number),
        }
    }
}

/// Copies what a successor may keep of these properties, without the headers that `keep` rejects, and adds `headers`.
pub(super) fn copy(
    properties: &BasicProperties,
    keep: impl Fn(&str) -> bool,
    headers: impl IntoIterator<Item = (&'static str, Header)>,
) -> BasicProperties {
    let all = properties.headers().iter().flat_map(FieldTable::inner);
    let kept = all.filter(|(name, _)| keep(name.as_str()) && !is_broker_header(name.as_str()));
    let (own, producers): (Vec<_>, Vec<_>) = kept.partition(|(name, _)| name.as_str().starts_with(PREFIX));

    let mut table = FieldTable::default();
    for (name, value) in own {
        if let Some((name, value)) = own_header(name.as_str(), value) {
            table.insert(name.into(), value);
        }
    }
    for (name, value) in headers {
        if let Some((name, value)) = own_header(name, &value.into()) {
            table.insert(name.into(), value);
        }
    }
    let used = table_size(&table);
    let fit = used + producers.iter().map(|(name, value)| size(name, value)).sum::<usize>() <= MAX_HEADERS;
    for (name, value) in producers {
        if fit || (name.as_str() == TRACEPARENT && size(name, value) <= MAX_TEXT) {
            table.insert(name.clone(), value.clone());
        }
    }

    // lapin cannot unset a property, so build new ones.
    let mut copy = BasicProperties::default().with_headers(table);
    macro_rules! keep {
        ($($get:ident $set:ident),*) => {
            $(if let Some(value) = properties.$get().clone() { copy = copy.$set(value); })*
        };
    }
    keep!(
        content_type with_content_type, content_encoding with_content_encoding, priority with_priority,
        correlation_id with_correlation_id, message_id with_message_id, timestamp with_timestamp,
        kind with_type, app_id with_app_id
    );
    match properties.reply_to() {
        Some(reply_to) if !reply_to.as_str().starts_with("amq.rabbitmq.reply-to") => {
            copy.with_reply_to(reply_to.clone())
        }
        _ => copy,
    }
}

/// Only what close-sync itself uses: what identifies and decodes the message, and the headers of close-sync.
pub(super) fn bare(properties: &BasicProperties) -> BasicProperties {
    let trace = text(properties, TRACEPARENT).is_some_and(|text| TraceParent::parse(&text).is_some());
    let copy = copy(properties, |name| name.starts_with(PREFIX) || (trace && name == TRACEPARENT), []);
    let mut bare = BasicProperties::default();
    if let Some(headers) = copy.headers().clone() {
        bare = bare.with_headers(headers);
    }
    if let Some(id) = properties.message_id().clone() {
        bare = bare.with_message_id(id);
    }
    if let Some(id) = properties.correlation_id().clone() {
        bare = bare.with_correlation_id(id);
    }
    if let Some(timestamp) = *properties.timestamp() {
        bare = bare.with_timestamp(timestamp);
    }
    match properties.content_encoding().clone() {
        Some(encoding) => bare.with_content_encoding(encoding),
        None => bare,
    }
}

/// A header of close-sync, cut to its limit. `None` if close-sync writes no such header.
#[expect(clippy::wildcard_enum_match_arm, reason = "close-sync writes texts and 64-bit numbers")]
fn own_header(name: &str, value: &AMQPValue) -> Option<(&'static str, AMQPValue)> {
    let name = *OWN_HEADERS.iter().find(|own| **own == name)?;
    let limit = if matches!(name, ERROR | DECISION) { MAX_EXPLANATION } else { MAX_TEXT };
    match value {
        // A part of the original would be of no use.
        AMQPValue::LongString(original) if name == ORIGINAL => {
            (original.as_bytes().len() <= MAX_ORIGINAL).then(|| (name, value.clone()))
        }
        AMQPValue::LongString(text) => Some((name, AMQPValue::LongString(cut(text, limit)))),
        AMQPValue::LongLongInt(number) => Some((name, AMQPValue::LongLongInt(*number))),
        _ => None,
    }
}

fn cut(text: &LongString, limit: usize) -> LongString {
    let bytes = text.as_bytes();
    if bytes.len() <= limit {
        return text.clone();
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => format!("{}…", &text[..text.floor_char_boundary(limit - '…'.len_utf8())]).into(),
        Err(_) => bytes[..limit].to_vec().into(),
    }
}

/// The property `content_encoding`.
pub fn content_encoding(properties: &BasicProperties) -> Option<&str> {
    properties.content_encoding().as_ref().map(ShortString::as_str)
}

/// Reads a text header.
pub fn text(properties: &BasicProperties, name: &str) -> Option<String> {
    as_text(header(properties, name)?)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other AMQP types are not text")]
fn as_text(value: &AMQPValue) -> Option<String> {
    match value {
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

pub(super) fn has_header(properties: &BasicProperties, name: &str) -> bool {
    header(properties, name).is_some()
}

fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

/// An upper bound for the size of all headers in a frame.
fn table_size(table: &FieldTable) -> usize {
    table.inner().iter().map(|(name, value)| size(name, value)).sum()
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
        AMQPValue::FieldTable(table) => table_size(table),
        _ => 0,
    };
    OVERHEAD + name.as_str().len() + inner
}
