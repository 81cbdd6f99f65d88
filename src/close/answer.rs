//! The part of an answer that close-sync reads, in bounded memory.
//!
//! A Lead in Close has far more than close-sync reads, and a tree of JSON values can take a hundred times the memory of its
//! text. So only the keys that are read are kept, and an answer whose values would take too much counts as one that is
//! not Close's: a proxy, or a defect.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

use crate::domain::footprint::{LIST, MAX_TREE, MEMBER, OBJECT, TEXT, VALUE};

/// The keys that are read, in all kinds of answers. Custom fields have keys `custom.cf_…`.
const KEYS: [&str; 21] = [
    "contact_ids",
    "contacts",
    "cursor",
    "cursor_next",
    "data",
    "date_created",
    "date_updated",
    "description",
    "email",
    "emails",
    "id",
    "lead_id",
    "name",
    "object_id",
    "phone",
    "phones",
    "status_id",
    "title",
    "type",
    "url",
    "urls",
];

/// What a custom field's key starts with.
const CUSTOM: &str = "custom.";

/// A record, a page of a search, or a page of events.
#[derive(Debug)]
pub(crate) struct Answer(pub(crate) Value);

impl<'de> Deserialize<'de> for Answer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A Lead with 10,000 Contacts takes a third of it.
        let mut budget = Budget(MAX_TREE);
        Part { budget: &mut budget, everything: false }.deserialize(deserializer).map(Self)
    }
}

/// The memory that is left.
struct Budget(usize);

impl Budget {
    fn take<E: Error>(&mut self, bytes: usize) -> Result<(), E> {
        self.0 = self.0.checked_sub(bytes).ok_or_else(|| E::custom("too many values"))?;
        Ok(())
    }
}

/// A value of an answer.
struct Part<'a> {
    budget: &'a mut Budget,
    /// It belongs to a custom field, whose members have any key.
    everything: bool,
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Part<'_> {
    fn scalar<E: Error>(self, value: Value) -> Result<Value, E> {
        self.budget.take(VALUE)?;
        Ok(value)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.scalar(Value::Null)
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<Value, E> {
        self.scalar(flag.into())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        self.scalar(number.into())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        self.scalar(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        self.scalar(number.into())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.budget.take(VALUE + text.len().max(TEXT))?;
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let Self { budget, everything } = self;
        budget.take(VALUE)?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Part { budget: &mut *budget, everything })? {
            budget.take(if list.is_empty() { LIST } else { 0 })?;
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let Self { budget, everything } = self;
        budget.take(VALUE)?;
        let mut object = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            let is_custom = key.starts_with(CUSTOM);
            if everything || is_custom || KEYS.contains(&key.as_str()) {
                budget.take(key.len() + if object.is_empty() { OBJECT } else { MEMBER })?;
                let everything = everything || is_custom;
                object.insert(key, members.next_value_seed(Part { budget: &mut *budget, everything })?);
            } else {
                members.next_value::<IgnoredAny>()?;
            }
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: &str) -> Result<Value, serde_json::Error> {
        serde_json::from_str(json).map(|Answer(value)| value)
    }

    #[test]
    fn only_what_is_read_is_kept() {
        let lead = json!({
            "id": "lead_1", "name": "Acme", "status_label": "Potential", "opportunities": [{"id": "oppo_1"}],
            "custom.cf_1": {"a": [1, -1, 1.5, true, null]}, "custom": {"Plan": "pro"}, "contact_ids": ["cont_1"],
            "contacts": [{"id": "cont_1", "emails": [{"email": "a@x.test", "type": "office", "is_unsubscribed": false}]}],
        });
        let kept = json!({
            "id": "lead_1", "name": "Acme", "custom.cf_1": {"a": [1, -1, 1.5, true, null]}, "contact_ids": ["cont_1"],
            "contacts": [{"id": "cont_1", "emails": [{"email": "a@x.test", "type": "office"}]}],
        });
        assert_eq!(read(&lead.to_string()).unwrap(), kept);
    }

    #[test]
    fn an_answer_with_too_many_values_is_invalid() {
        let list =
            |item: &str| format!("[{item}{}]", format!(",{item}").repeat((16 << 20) / (item.len() + 1)));
        for item in [r#"{"id":0}"#, "0", "[0]"] {
            assert!(read(&format!(r#"{{"data":{}}}"#, list(item))).is_err(), "{item}");
            assert!(read(&format!(r#"{{"custom.cf_1":{}}}"#, list(item))).is_err(), "{item}");
            assert_eq!(read(&format!(r#"{{"other":{}}}"#, list(item))).unwrap(), json!({}), "{item}");
        }
    }

    #[test]
    fn a_lead_with_ten_thousand_contacts_fits() {
        let contact = json!({
            "id": format!("cont_{}", "a".repeat(43)), "lead_id": format!("lead_{}", "a".repeat(43)), "name": "Ada Lovelace",
            "display_name": "Ada Lovelace", "title": "Analyst", "date_created": "2026-01-31T10:00:00.000000+00:00",
            "date_updated": "2026-01-31T10:00:00.000000+00:00", "custom.cf_userid": "user-123456",
            "emails": [{"email": "ada@example.test", "type": "office", "email_lower": "ada@example.test", "is_unsubscribed": false}],
            "phones": [{"phone": "+18004445555", "type": "office", "phone_formatted": "+1 800-444-5555", "country": "US"}],
            "urls": [], "created_by": "user_1", "updated_by": "user_1", "organization_id": "orga_1", "integration_links": [],
        });
        let lead = json!({"id": "lead_1", "contacts": vec![contact; 10_000]});
        assert_eq!(read(&lead.to_string()).unwrap()["contacts"].as_array().map(Vec::len), Some(10_000));
    }
}
