//! The format of exported dead letters: one JSON object per line, with everything that is needed to restore the message.
//!
//! A header that is text, a 64-bit number, a boolean or void is written as plain JSON. Any other AMQP type is written as an
//! object with its name: `{"ShortInt": 5}`. A body in UTF-8 is written as text, byte for byte, and any other body in
//! base64. A compressed body is in base64, and also as text in `decoded` for people: an import ignores that. To change such a
//! body, write the new one to `body` and remove `body_base64`. The fields at the start (reason, error and so on) are for people and filters, and an import ignores them. Headers
//! that RabbitMQ adds are left out.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, MAX_SHORT_STRING_LENGTH, ShortString};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::amqp::envelope;
use crate::dead_letters::letter::DeadLetter;

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten, skip_deserializing)]
    about: Map<String, Value>,
    properties: Map<String, Value>,
    headers: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
    /// A compressed body as text. For people: an import ignores it.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    decoded: Option<String>,
}

impl DeadLetter {
    /// A line of the file, without the line break.
    pub fn to_line(&self) -> String {
        self.line(None)
    }

    /// A line of the file, with a compressed body also as text.
    pub fn to_readable_line(&self) -> String {
        let decoded = self.decoded().ok().filter(|decoded| **decoded != *self.body);
        self.line(decoded.and_then(|decoded| String::from_utf8(decoded.into_owned()).ok()))
    }

    fn line(&self, decoded: Option<String>) -> String {
        let about = match serde_json::to_value(self) {
            Ok(Value::Object(about)) => about.into_iter().filter(|(_, value)| !value.is_null()).collect(),
            _ => Map::new(),
        };
        let (body, body_base64) = match std::str::from_utf8(&self.body) {
            Ok(text) => (Some(text.to_owned()), None),
            Err(_) => (None, Some(BASE64_STANDARD.encode(&self.body))),
        };
        let (properties, headers) = self.properties_and_headers();
        serde_json::to_string(&Line { about, properties, headers, body, body_base64, decoded })
            .unwrap_or_default()
    }

    /// Parses a line of the file.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn from_line(line: &str) -> Result<Self, String> {
        let line: Line = serde_json::from_str(line).map_err(|error| format!("not a dead letter: {error}"))?;
        let body = match (line.body, line.body_base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => BASE64_STANDARD
                .decode(encoded)
                .map_err(|error| format!("`body_base64` is not valid base64: {error}"))?,
            _ => return Err("either `body` or `body_base64` is required".to_owned()),
        };
        for (name, value) in &line.properties {
            let length = value.as_str().map_or(0, str::len);
            if length > MAX_SHORT_STRING_LENGTH {
                return Err(format!("`properties.{}` {}", start(name), too_long(length)));
            }
        }
        let properties: BasicProperties = serde_json::from_value(Value::Object(line.properties))
            .map_err(|error| format!("`properties` are not valid: {error}"))?;
        let mut table = FieldTable::default();
        for (name, value) in line.headers {
            let value =
                to_amqp(value).map_err(|error| format!("header `{}` is not valid: {error}", start(&name)))?;
            let length = longest_name(&value).max(name.len());
            let key = ShortString::try_new(name.as_str()).ok().filter(|_| length <= MAX_SHORT_STRING_LENGTH);
            let key =
                key.ok_or_else(|| format!("a name in header `{}` {}", start(&name), too_long(length)))?;
            table.insert(key, value);
        }
        Ok(Self::from_parts(properties.with_headers(table), body))
    }

    /// The properties that are set, and the headers, as a restored copy has them.
    pub fn properties_and_headers(&self) -> (Map<String, Value>, Map<String, Value>) {
        let restored = self.restored_properties();
        let headers = restored.headers().iter().flat_map(FieldTable::inner);
        let headers = headers.map(|(name, value)| (name.to_string(), to_json(value))).collect();
        let properties = match serde_json::to_value(&restored) {
            Ok(Value::Object(all)) => {
                all.into_iter().filter(|(name, value)| name != "headers" && !value.is_null()).collect()
            }
            _ => Map::new(),
        };
        (properties, headers)
    }

    /// The properties of a restored copy.
    pub(crate) fn restored_properties(&self) -> BasicProperties {
        envelope::for_restoring(&self.properties, &self.id, &self.fingerprint)
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other AMQP type is written as an object with its name"
)]
fn to_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::LongString(text) => match std::str::from_utf8(text.as_bytes()) {
            Ok(text) => text.into(),
            Err(_) => serde_json::to_value(value).unwrap_or_default(),
        },
        AMQPValue::LongLongInt(number) => (*number).into(),
        AMQPValue::Boolean(flag) => (*flag).into(),
        AMQPValue::Void => Value::Null,
        other => serde_json::to_value(other).unwrap_or_default(),
    }
}

/// The start of a name, for an error.
fn start(name: &str) -> String {
    name.chars().take(40).collect()
}

fn too_long(length: usize) -> String {
    format!("has {length} bytes; AMQP allows at most {MAX_SHORT_STRING_LENGTH}")
}

/// The length of the longest name, or short text, inside a header. The types of AMQP are parsed without a check of it.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other AMQP type has no name inside")]
fn longest_name(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::FieldArray(items) => items.as_slice().iter().map(longest_name).max().unwrap_or(0),
        AMQPValue::FieldTable(table) => table
            .into_iter()
            .map(|(name, value)| longest_name(value).max(name.as_str().len()))
            .max()
            .unwrap_or(0),
        _ => 0,
    }
}

fn to_amqp(value: Value) -> Result<AMQPValue, serde_json::Error> {
    match value {
        Value::String(text) => Ok(AMQPValue::LongString(LongString::from(text))),
        Value::Bool(flag) => Ok(AMQPValue::Boolean(flag)),
        Value::Number(ref number) => match number.as_i64() {
            Some(number) => Ok(AMQPValue::LongLongInt(number)),
            None => serde_json::from_value(value),
        },
        Value::Null => Ok(AMQPValue::Void),
        Value::Array(_) | Value::Object(_) => serde_json::from_value(value),
    }
}

#[cfg(test)]
mod tests {
    use lapin::types::{DecimalValue, FieldArray, ShortString};
    use proptest::collection::{btree_map, vec};
    use proptest::option;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn value() -> impl Strategy<Value = AMQPValue> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i8>().prop_map(AMQPValue::ShortShortInt),
            any::<u8>().prop_map(AMQPValue::ShortShortUInt),
            any::<i16>().prop_map(AMQPValue::ShortInt),
            any::<u16>().prop_map(AMQPValue::ShortUInt),
            any::<i32>().prop_map(AMQPValue::LongInt),
            any::<u32>().prop_map(AMQPValue::LongUInt),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<i16>().prop_map(|number| AMQPValue::Double(f64::from(number) / 8.0)),
            (0..9_u8, any::<u32>())
                .prop_map(|(scale, value)| AMQPValue::DecimalValue(DecimalValue { scale, value })),
            "[a-z]{0,9}".prop_map(|text| AMQPValue::ShortString(ShortString::from(text))),
            any::<String>().prop_map(|text| AMQPValue::LongString(text.into())),
            vec(any::<u8>(), 0..9).prop_map(|bytes| AMQPValue::LongString(bytes.into())),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            Just(AMQPValue::Void),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..3).prop_map(|items| AMQPValue::FieldArray(FieldArray::from(items))),
                table(inner).prop_map(AMQPValue::FieldTable),
            ]
        })
    }

    fn table(value: impl Strategy<Value = AMQPValue>) -> impl Strategy<Value = FieldTable> {
        btree_map("[a-z-]{1,6}", value, 0..4).prop_map(|entries| {
            entries
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect::<std::collections::BTreeMap<ShortString, _>>()
                .into()
        })
    }

    #[test]
    fn a_name_that_is_too_long_for_amqp_is_an_error() {
        let long = "n".repeat(256);
        let names =
            ["content_type", "content_encoding", "correlation_id", "reply_to", "expiration", "message_id"];
        let names = names.into_iter().chain(["type", "kind", "user_id", "app_id", "cluster_id"]);
        let properties = names.map(|name| (json!({name: long}), json!({})));
        let headers = [
            json!({long.clone(): 1}),
            json!({"a": {"FieldTable": {long.clone(): {"ShortInt": 1}}}}),
            json!({"a": {"FieldArray": [{"FieldTable": {long.clone(): {"ShortInt": 1}}}]}}),
            json!({"a": {"ShortString": long}}),
        ];
        for (properties, headers) in properties.chain(headers.map(|headers| (json!({}), headers))) {
            let line = json!({"properties": properties, "headers": headers, "body": "{}"}).to_string();
            let error = DeadLetter::from_line(&line).expect_err(&line);
            assert!(error.contains("256") && error.len() < 200, "{error}");
            let fitting = DeadLetter::from_line(&line.replace(&long, &long[1..]));
            assert!(fitting.is_ok(), "{:?}", fitting.err());
        }
    }

    proptest! {
        #[test]
        fn an_exported_line_restores_the_whole_message(
            headers in table(value()),
            id in option::of("[a-z]{1,5}"),
            priority in option::of(any::<u8>()),
            timestamp in option::of(any::<u64>()),
            body in prop_oneof![vec(any::<u8>(), 0..40), any::<String>().prop_map(String::into_bytes)],
        ) {
            let mut properties = BasicProperties::default().with_headers(headers);
            if let Some(id) = id { properties = properties.with_message_id(id.into()); }
            if let Some(priority) = priority { properties = properties.with_priority(priority); }
            if let Some(timestamp) = timestamp { properties = properties.with_timestamp(timestamp); }
            let letter = DeadLetter::from_parts(properties, body);
            let line = letter.to_line();
            prop_assert!(!line.contains('\n'));
            let read = DeadLetter::from_line(&line).unwrap();
            prop_assert_eq!(&read.body, &letter.body);
            prop_assert_eq!(read.restored_properties(), letter.restored_properties());
            prop_assert_eq!(read.to_line(), line);
        }
    }
}
