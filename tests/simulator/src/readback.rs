//! The forms in which answers have values: times, numbers, users and lists of one (close-api.md §15 row 10), members that
//! are null (row 11), and values that Close accepts and does not keep.

use jiff::{Timestamp, tz::Offset};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use strum::VariantNames;

use crate::{
    behaviour::Behaviour,
    ids,
    refusal::Object,
    schema::{CustomField, FieldKind, Schema},
};

/// How answers write times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum TimeForm {
    /// `2026-01-31T09:00:00.000000+00:00`, as in most recordings.
    Utc,
    /// `2026-01-31T09:00:00Z`.
    Zulu,
    /// `2026-01-31T11:00:00+02:00`.
    Offset,
    /// `2026-01-31T09:00:00`.
    Naive,
}

/// How answers write the values of fields of type number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum NumberForm {
    /// `5`.
    Number,
    /// `"5"`.
    Text,
}

/// How answers write the values of fields of type user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum UserForm {
    /// `"user_ada"`.
    Id,
    /// `{"id": "user_ada", "name": "Ada Account"}`.
    Object,
}

/// How answers write one value of a field that can have several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ListForm {
    /// A list if the field accepts several values.
    AsDeclared,
    /// A list, also if the field accepts one value.
    AlwaysList,
    /// One value without a list.
    NeverListOfOne,
}

/// Rewrites the values in an answer: in a record, a list of records, or a page of them.
pub(crate) fn rewrite(answer: &mut Value, schema: &Schema) {
    match answer {
        Value::Array(items) => items.iter_mut().for_each(|item| rewrite(item, schema)),
        Value::Object(members) => {
            for (key, value) in members.iter_mut() {
                let field = key.strip_prefix("custom.");
                let field = field.and_then(|id| schema.fields.iter().find(|field| field.id == id));
                if let Some(field) = field {
                    *value = written(field, value, schema);
                } else if key.starts_with("date_") {
                    *value = time(value, schema.behaviour.times);
                } else if ["data", "contacts", "previous_data"].contains(&key.as_str()) {
                    rewrite(value, schema);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn written(field: &CustomField, value: &Value, schema: &Schema) -> Value {
    let Behaviour { times, numbers, users, lists, .. } = schema.behaviour;
    let item = |value: &Value| match (field.kind, value) {
        (FieldKind::Datetime, _) => time(value, times),
        (FieldKind::Number, Value::Number(number)) if numbers == NumberForm::Text => {
            json!(number.to_string())
        }
        (FieldKind::User, _) if users == UserForm::Object => {
            let name = schema.users().find(|user| *value == user.id).map(crate::User::name);
            json!({"id": value, "name": name})
        }
        _ => value.clone(),
    };
    match (value, lists) {
        (Value::Array(items), ListForm::NeverListOfOne) if items.len() == 1 => item(&items[0]),
        (Value::Array(items), _) => items.iter().map(item).collect(),
        (one, ListForm::AlwaysList) if field.kind.may_be_multiple() => json!([item(one)]),
        (one, _) => item(one),
    }
}

fn time(value: &Value, form: TimeForm) -> Value {
    let Some(at) = value.as_str().and_then(ids::parse_timestamp) else { return value.clone() };
    let civil = |at: Timestamp, format: &str| at.strftime(format).to_string();
    match form {
        TimeForm::Utc => value.clone(),
        TimeForm::Zulu => json!(civil(at, "%Y-%m-%dT%H:%M:%S%.fZ")),
        TimeForm::Naive => json!(civil(at, "%Y-%m-%dT%H:%M:%S%.f")),
        TimeForm::Offset => {
            let there = Offset::constant(2).to_datetime(at);
            json!(format!("{}+02:00", there.strftime("%Y-%m-%dT%H:%M:%S%.f")))
        }
    }
}

/// The body without the values that Close accepts and does not keep.
pub(crate) fn kept(body: &Object, lossy_fields: &[String]) -> Object {
    let mut kept = body.clone();
    kept.retain(|key, _| {
        let field = key.strip_suffix(".add").unwrap_or(key);
        !lossy_fields.iter().any(|lossy| lossy == field)
    });
    if let Some(Value::Array(contacts)) = kept.get_mut("contacts") {
        for contact in contacts.iter_mut().filter_map(Value::as_object_mut) {
            *contact = self::kept(contact, lossy_fields);
        }
    }
    kept
}

/// Sets members to null. They are named by the id of the item, `cf_leadplan.choices`.
pub(crate) fn with_nulls(mut item: Value, null_members: &[String]) -> Value {
    let id = item["id"].as_str().unwrap_or_default().to_owned();
    for member in null_members.iter().filter_map(|member| member.strip_prefix(&id)?.strip_prefix('.')) {
        item[member] = Value::Null;
    }
    item
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{ids::Ids, settings::Settings};

    fn shown(change: impl FnOnce(&mut Behaviour)) -> Value {
        let settings = Settings::fast().with(change);
        let schema = Schema::new(&settings, &mut Ids::new(Uuid::nil()), Timestamp::UNIX_EPOCH);
        let mut answer = json!({"data": [{
            "date_created": "2026-01-31T09:00:00.000000+00:00",
            "custom.cf_leadsyncedat": "2026-01-31T09:00:00.500000+00:00",
            "custom.cf_leadseats": 5, "custom.cf_leadowner": "user_adaaccount", "custom.cf_leadtags": ["red"],
            "custom.cf_leadcompanyid": "5", "name": "N",
        }]});
        rewrite(&mut answer, &schema);
        let mut record = answer["data"][0].take();
        record.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        record
    }

    #[test]
    fn values_have_the_form_that_is_set() {
        let plain = shown(|_| ());
        let different = |change: fn(&mut Behaviour)| {
            let mut found = shown(change);
            found.as_object_mut().unwrap().retain(|key, value| plain[key] != *value);
            found
        };
        for (change, expected) in [
            ((|_| ()) as fn(&mut Behaviour), json!({})),
            (
                |behaviour| behaviour.times = TimeForm::Zulu,
                json!({"date_created": "2026-01-31T09:00:00Z", "custom.cf_leadsyncedat": "2026-01-31T09:00:00.5Z"}),
            ),
            (
                |behaviour| behaviour.times = TimeForm::Offset,
                json!({
                    "date_created": "2026-01-31T11:00:00+02:00",
                    "custom.cf_leadsyncedat": "2026-01-31T11:00:00.5+02:00",
                }),
            ),
            (
                |behaviour| behaviour.times = TimeForm::Naive,
                json!({"date_created": "2026-01-31T09:00:00", "custom.cf_leadsyncedat": "2026-01-31T09:00:00.5"}),
            ),
            (|behaviour| behaviour.numbers = NumberForm::Text, json!({"custom.cf_leadseats": "5"})),
            (
                |behaviour| behaviour.users = UserForm::Object,
                json!({"custom.cf_leadowner": {"id": "user_adaaccount", "name": "Ada Account"}}),
            ),
            (
                |behaviour| behaviour.lists = ListForm::AlwaysList,
                json!({"custom.cf_leadowner": ["user_adaaccount"]}),
            ),
            (|behaviour| behaviour.lists = ListForm::NeverListOfOne, json!({"custom.cf_leadtags": "red"})),
        ] {
            assert_eq!(different(change), expected);
        }
    }

    #[test]
    fn lossy_fields_are_left_out_of_a_body() {
        let body: Object = serde_json::from_value(json!({
            "name": "N", "custom.cf_1": 1, "custom.cf_2.add": [2], "contacts": [{"name": "J", "phones": []}],
        }))
        .unwrap();
        let lossy = ["phones", "custom.cf_1", "custom.cf_2"].map(str::to_owned);
        assert_eq!(Value::from(kept(&body, &lossy)), json!({"name": "N", "contacts": [{"name": "J"}]}));
    }

    #[test]
    fn members_are_null_by_name() {
        let item = json!({"id": "cf_1", "type": "text", "name": "F"});
        let null = ["cf_1.type", "cf_12.name", "cf_2.name"].map(str::to_owned);
        assert_eq!(with_nulls(item, &null), json!({"id": "cf_1", "type": null, "name": "F"}));
    }
}
