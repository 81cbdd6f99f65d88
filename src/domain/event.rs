//! Decoding a message: an `identify` event as in the specification of Segment and Customer.io.
//!
//! [`Event::decode`] checks what every event must have: it is a JSON object of limited size, and its envelope has the
//! specified types. Everything else stays in [`Event::body`] for the mapping. A message that is rejected here can never
//! succeed. [`Malformed`] says why, without content of the message.
//!
//! Three errors are repaired, because public SDKs produce them and the rest of such an event is valid: a lone surrogate,
//! which remains when a program cuts text in the middle of an emoji, a byte-order mark, and an empty list for an empty
//! object, as PHP writes it. `NaN`, which the Python SDKs
//! send for an empty cell of a data frame, is not JSON and is rejected.

use jiff::Timestamp;
use serde_json::{Map, Value};
use strum::{IntoStaticStr, VariantArray};

use crate::domain::dropped::DropReason;
use crate::domain::encoding::{EncodingError, Payload, TOOL_LIMIT};
use crate::domain::footprint;
use crate::domain::time;
use crate::domain::value::trim;

/// A decoded event. The mapping decides what it means.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The whole event, to which the paths of the mapping are applied. Always an object.
    pub body: Value,
}

/// Why a message is not an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// More bytes than `worker.max_message_bytes`.
    #[error("the message has {size} bytes, more than the {limit} allowed")]
    TooLarge { size: usize, limit: usize },
    /// The body cannot be decompressed.
    #[error(transparent)]
    Encoding(#[from] EncodingError),
    /// Not JSON, or truncated JSON.
    #[error("not JSON: line {line}, column {column}")]
    NotJson {
        /// From 1.
        line: usize,
        /// From 1, or 0 at the start of a line.
        column: usize,
    },
    /// So many values that reading them would take too much memory.
    #[error("the message has too many values: reading them would take more than {limit} bytes of memory")]
    TooManyValues { limit: usize },
    /// JSON, but for example a list or a number.
    #[error("not a JSON object but {found}")]
    NotAnObject { found: &'static str },
    /// The format in which an SDK sends several events to its server.
    #[error("a batch of events: publish each of them as a message of its own")]
    Batch,
    /// A key of the envelope has the wrong type.
    #[error("`{key}` must be {expected}, not {found}")]
    WrongType { key: &'static str, expected: &'static str, found: &'static str },
}

impl Malformed {
    /// The label in the fingerprint of a dead letter.
    pub fn label(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::Encoding(error) => error.label(),
            Self::NotJson { .. } => "not_json",
            Self::TooManyValues { .. } => "too_many_values",
            Self::NotAnObject { .. } => "not_an_object",
            Self::Batch => "batch",
            Self::WrongType { key, .. } => key,
        }
    }
}

/// Why an event is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum NotForClose {
    /// The trigger does not hold: by default, `type` is not `identify`.
    Trigger,
    /// `integrations` excludes Close.
    Integrations,
}

impl NotForClose {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

impl Event {
    /// Decodes a body. The limit applies to the body as it was sent, and to what it decompresses to.
    ///
    /// # Errors
    /// Why it is not an event.
    pub fn decode<'a>(payload: impl Into<Payload<'a>>, limit: usize) -> Result<Self, Malformed> {
        let payload = payload.into();
        if payload.bytes.len() > limit {
            return Err(Malformed::TooLarge { size: payload.bytes.len(), limit });
        }
        Self::from_json(&payload.decode(limit)?, limit.saturating_mul(MEMORY_PER_BYTE))
    }

    /// `limit` is that of the memory for the values.
    fn from_json(text: &[u8], limit: usize) -> Result<Self, Malformed> {
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
        let mut body =
            parse(text, limit).or_else(|invalid| match parse(&replace_lone_surrogates(text), limit) {
                Err(Malformed::NotJson { .. }) => Err(invalid),
                repaired => repaired,
            })?;
        let Value::Object(envelope) = &mut body else {
            return Err(Malformed::NotAnObject { found: kind(&body) });
        };
        for key in OBJECTS {
            fill_empty_list(envelope, key);
        }
        if envelope.get("batch").is_some_and(Value::is_array) && !envelope.contains_key("type") {
            return Err(Malformed::Batch);
        }
        expect(envelope, "type", "text", Value::is_string)?;
        expect(envelope, "traits", "an object", Value::is_object)?;
        expect(envelope, "integrations", "an object", Value::is_object)?;
        // A boolean is a placeholder, and says as little about the person as none.
        expect(envelope, "userId", "text or a number", |value| !value.is_array() && !value.is_object())?;
        Ok(Self { body })
    }

    /// Decodes a body of any size, for tools. They read many bodies, so the values of one take at most 64 MiB: twice what
    /// the largest message may take by default.
    ///
    /// # Errors
    /// Why it is not an event.
    pub fn read<'a>(payload: impl Into<Payload<'a>>) -> Result<Self, Malformed> {
        Self::from_json(&payload.into().decode(TOOL_LIMIT)?, footprint::MAX_TREE)
    }

    /// The text of an envelope key, if it is present and not blank.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.body.get(key).and_then(Value::as_str).map(str::trim).filter(|text| !text.is_empty())
    }

    /// The id that the producer gave the event, for logs.
    pub fn message_id(&self) -> Option<&str> {
        self.text("messageId")
    }

    /// The time of the event according to its producer: `timestamp`, else `receivedAt`, else `sentAt`. A zero time is no
    /// time.
    pub fn time(&self) -> Option<Timestamp> {
        self.times().find_map(|(_, _, read)| read.ok())
    }

    /// The times that could not be read before [`Event::time`] was found, each with its key.
    pub fn unreadable_times(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        let before = self.times().take_while(|(.., read)| read.is_err());
        before
            .filter(|(.., read)| *read == Err(DropReason::UnreadableTime))
            .map(|(key, value, _)| (key, value))
    }

    fn times(&self) -> impl Iterator<Item = (&'static str, &Value, Result<Timestamp, DropReason>)> {
        let keys = ["timestamp", "receivedAt", "sentAt"].into_iter();
        let present = keys.filter_map(|key| Some((key, self.body.get(key)?)));
        let present = present.filter(|(_, value)| {
            !value.is_null() && value.as_str().is_none_or(|text| !trim(text).is_empty())
        });
        present.map(|(key, value)| (key, value, time::of_event(value)))
    }

    /// Whether `integrations` excludes Close (`design.md` §2, rule 9). Without it, the event is for every integration.
    pub fn excludes_close(&self) -> bool {
        let Some(integrations) = self.body.get("integrations") else { return false };
        // An object with options, `"Close": {…}`, means that the integration is enabled.
        let switch = |name: &str| match integrations.get(name) {
            None | Some(Value::Null) => None,
            Some(Value::Bool(on)) => Some(*on),
            Some(_) => Some(true),
        };
        !switch("Close").or(switch("All")).unwrap_or(true)
    }
}

/// How much memory a message may take while it is mapped, for each byte that a message may have. A message of the largest
/// size has room for a list of numbers, but not for a list of objects with one short member each.
const MEMORY_PER_BYTE: usize = 32;

fn parse(json: &[u8], limit: usize) -> Result<Value, Malformed> {
    let not_json =
        |error: serde_json::Error| Malformed::NotJson { line: error.line(), column: error.column() };
    if !footprint::fits(json, limit).map_err(not_json)? {
        return Err(Malformed::TooManyValues { limit });
    }
    serde_json::from_slice(json).map_err(not_json)
}

/// The objects of the specification, apart from the company.
const OBJECTS: [&str; 3] = ["traits", "integrations", "context"];

/// PHP writes an object without members as an empty list.
fn fill_empty_list(envelope: &mut Map<String, Value>, key: &str) {
    if let Some(value) = envelope.get_mut(key)
        && value.as_array().is_some_and(Vec::is_empty)
    {
        *value = Value::Object(Map::new());
    }
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Replaces every escaped surrogate that is not part of a pair by U+FFFD, as browsers do.
fn replace_lone_surrogates(json: &[u8]) -> Vec<u8> {
    let unit = |at: usize| -> Option<u16> {
        let digits = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let mut whole = Vec::with_capacity(json.len());
    let mut at = 0;
    while at < json.len() {
        let length = match (unit(at), unit(at + 6)) {
            (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => 12,
            (Some(0xD800..=0xDFFF), _) => {
                whole.extend_from_slice(b"\\ufffd");
                at += 6;
                continue;
            }
            // An escape: the byte after the backslash is copied with it.
            _ if json[at] == b'\\' => 2,
            _ => 1,
        };
        let end = json.len().min(at + length);
        whole.extend_from_slice(&json[at..end]);
        at = end;
    }
    whole
}

/// Rejects a key that is present, not null, and of another type than expected.
fn expect(
    envelope: &Map<String, Value>,
    key: &'static str,
    expected: &'static str,
    fits: impl Fn(&Value) -> bool,
) -> Result<(), Malformed> {
    match envelope.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if fits(value) => Ok(()),
        Some(value) => Err(Malformed::WrongType { key, expected, found: kind(value) }),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Splits input into events: one event, a JSON list of events, or one event per line.
pub fn split(text: &[u8]) -> Vec<Vec<u8>> {
    match serde_json::from_slice(text) {
        Ok(Value::Array(events)) => events.iter().map(|event| event.to_string().into_bytes()).collect(),
        Ok(_) => vec![text.to_vec()],
        // One event per line. A line that is not JSON is later reported as malformed.
        Err(_) => {
            let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
            let lines: Vec<&[u8]> = lines.filter(|line| !line.is_empty()).collect();
            let is_object = |line: &&[u8]| serde_json::from_slice::<Map<String, Value>>(line).is_ok();
            // If no line is an object, this is one event on several lines, with a syntax error.
            let whole = lines.len() > 1 && !lines.iter().any(is_object);
            if whole { vec![text.to_vec()] } else { lines.into_iter().map(<[u8]>::to_vec).collect() }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn event(body: Value) -> Event {
        Event::decode(body.to_string().as_bytes(), 1 << 20).unwrap()
    }

    #[test]
    fn input_is_split_into_one_event_a_list_or_lines() {
        let cases: [(&str, &[&str]); 6] = [
            ("{\"a\":1}", &["{\"a\":1}"]),
            ("[{\"a\":1}, {}]", &["{\"a\":1}", "{}"]),
            ("{}\n\n{\"a\":1}\n", &["{}", "{\"a\":1}"]),
            ("{}\nnonsense\n", &["{}", "nonsense"]),
            ("{\n  \"a\": 1,\n}\n", &["{\n  \"a\": 1,\n}\n"]),
            ("\n", &[]),
        ];
        for (text, events) in cases {
            let split: Vec<String> =
                split(text.as_bytes()).into_iter().map(|event| String::from_utf8(event).unwrap()).collect();
            assert_eq!(split, events, "{text}");
        }
    }

    #[test]
    fn a_malformed_event_is_rejected_with_the_reason() {
        let cases: [(&[u8], &str); 10] = [
            (
                b"{\"batch\":[],\"sentAt\":\"\"}",
                "a batch of events: publish each of them as a message of its own",
            ),
            (b"", "not JSON: line 1, column 0"),
            (b"{\"type\":", "not JSON: line 1, column 8"),
            (b"\xff\xfe", "not JSON: line 1, column 1"),
            (b"[]", "not a JSON object but a list"),
            (b"null", "not a JSON object but null"),
            (b"{\"traits\":[1]}", "`traits` must be an object, not a list"),
            (b"{\"type\":7}", "`type` must be text, not a number"),
            (b"{\"userId\":{}}", "`userId` must be text or a number, not an object"),
            (b"{\"integrations\":true}", "`integrations` must be an object, not a boolean"),
        ];
        for (bytes, message) in cases {
            assert_eq!(Event::decode(bytes, 100).unwrap_err().to_string(), message);
        }
        assert_eq!(
            Event::decode(b"{  }".as_slice(), 3).unwrap_err(),
            Malformed::TooLarge { size: 4, limit: 3 }
        );
        let objects = |tail: &str| format!(r#"{{"n":[{}0{tail}]}}"#, r#"{"":0},"#.repeat(1000));
        for json in [objects(""), objects(r#","\ud83c""#)] {
            let decoded = Event::decode(json.as_bytes(), json.len());
            assert_eq!(decoded, Err(Malformed::TooManyValues { limit: 32 * json.len() }));
            assert!(Event::decode(json.as_bytes(), 10 * json.len()).is_ok());
        }
    }

    #[test]
    fn tools_read_values_of_a_bounded_size() {
        let body = |bytes: usize| format!(r#"{{"n":[{}0]}}"#, r#"{"":0},"#.repeat(bytes / 7));
        assert!(Event::read(body(400_000).as_bytes()).is_ok());
        // In proportion to its size, this body could take 64 MiB and more.
        let large = body(3 << 20);
        assert_eq!(
            Event::read(large.as_bytes()),
            Err(Malformed::TooManyValues { limit: footprint::MAX_TREE })
        );
        let text = format!(r#"{{"n":"{}"}}"#, "a".repeat(3 << 20));
        assert!(Event::read(text.as_bytes()).is_ok());
    }

    #[test]
    fn integrations_can_exclude_close() {
        let cases = [
            (json!({}), false),
            (json!({"integrations": {}}), false),
            (json!({"integrations": {"All": true}}), false),
            (json!({"integrations": {"All": false}}), true),
            (json!({"integrations": {"Close": false}}), true),
            (json!({"integrations": {"All": true, "Close": false}}), true),
            (json!({"integrations": {"All": false, "Close": true}}), false),
            (json!({"integrations": {"All": false, "Close": {"status": "x"}}}), false),
            (json!({"integrations": {"All": false, "Close": null}}), true),
            (json!({"integrations": {"Salesforce": false}}), false),
        ];
        for (body, excluded) in cases {
            assert_eq!(event(body.clone()).excludes_close(), excluded, "{body}");
        }
    }

    #[test]
    fn the_first_valid_time_is_used() {
        let cases = [
            (
                json!({"timestamp": "2026-01-02T03:04:05Z", "sentAt": "2025-01-01T00:00:00Z"}),
                Some("2026-01-02T03:04:05Z"),
            ),
            (
                json!({"timestamp": "yesterday", "receivedAt": "2026-01-02T04:04:05+01:00"}),
                Some("2026-01-02T03:04:05Z"),
            ),
            (json!({"timestamp": 5}), None),
        ];
        for (body, expected) in cases {
            assert_eq!(event(body).time().map(|time| time.to_string()).as_deref(), expected);
        }
    }

    #[test]
    fn a_zero_time_is_passed_over_and_an_unreadable_one_is_reported() {
        let zero = "0001-01-01T00:00:00Z";
        let sent = "2026-01-02T03:04:05Z";
        let cases = [
            (json!({"timestamp": zero, "sentAt": sent}), Some(sent), vec![]),
            (
                json!({"timestamp": "1970-01-01T00:00:00Z", "receivedAt": 0, "sentAt": sent}),
                Some(sent),
                vec![],
            ),
            (json!({"timestamp": "soon", "receivedAt": zero, "sentAt": sent}), Some(sent), vec!["timestamp"]),
            (json!({"timestamp": sent, "sentAt": "soon"}), Some(sent), vec![]),
            (json!({"timestamp": "soon", "sentAt": {}}), None, vec!["timestamp", "sentAt"]),
            (json!({"timestamp": null, "receivedAt": " \u{200b}"}), None, vec![]),
        ];
        for (body, time, unreadable) in cases {
            let event = event(body.clone());
            assert_eq!(event.time().map(|time| time.to_string()).as_deref(), time, "{body}");
            assert_eq!(
                event.unreadable_times().map(|(key, _)| key).collect::<Vec<_>>(),
                unreadable,
                "{body}"
            );
        }
    }

    #[test]
    fn an_empty_list_is_an_empty_object() {
        for key in OBJECTS {
            let decoded = event(json!({key: [], "userId": "u"}));
            assert_eq!(decoded.body, json!({key: {}, "userId": "u"}));
            assert!(!decoded.excludes_close());
        }
        // Other keys are the producer's own.
        let other = json!({"tags": [], "traits": {"tags": []}});
        assert_eq!(event(other.clone()).body, other);
    }

    #[test]
    fn only_the_errors_of_sdks_are_repaired() {
        let name = |json: &str| Event::decode(json.as_bytes(), 100).map(|event| event.body["n"].clone());
        let cases = [
            (r#"{"n":"Hal \ud83c"}"#, "Hal \u{fffd}"),
            (r#"{"n":"\udf4e Hal"}"#, "\u{fffd} Hal"),
            (r#"{"n":"\ud83c\ud83c\udf4e"}"#, "\u{fffd}\u{1f34e}"),
            (r#"{"n":"\\ud83c \ud83c"}"#, "\\ud83c \u{fffd}"),
            ("\u{feff}{\"n\":\"a\"}", "a"),
        ];
        for (json, expected) in cases {
            assert_eq!(name(json), Ok(expected.into()), "{json}");
        }
        for json in [r#"{"n":"\ud83c"#, r#"{"n":"\ud8"}"#, r#"{"n":NaN}"#] {
            assert!(matches!(name(json), Err(Malformed::NotJson { .. })), "{json}");
        }
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::decode(&bytes, 150).map(|event| (event.excludes_close(), event.time()));
        }
    }
}
