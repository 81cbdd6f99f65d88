//! What Close makes of a write: a refusal, or a value in some notation.

use jiff::Timestamp;
use jiff::civil::DateTime;
use serde_json::Value;
use strum::IntoStaticStr;

/// The answer to a write with one invalid value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(in crate::cli::certify) enum Refusal {
    /// `field-errors`, with `errors` by index at each level.
    Nested,
    /// `field-errors` with keys such as `phones.0.phone`.
    Dotted,
    /// `field-errors` with objects and no `errors` between them.
    Plain,
    /// `field-errors` that name only the list.
    OnlyList,
    /// `errors` with a text about the value, and no name of a field.
    List,
    /// `error` with a text about the value.
    General,
    /// A text that is not about the value.
    Vague,
    /// `detail` with `loc`, as pydantic writes it.
    Detail,
    /// HTML, plain text or nothing.
    NotJson,
    /// Not a refusal: the value was kept.
    Kept,
    /// Not a refusal: the value was left out.
    LeftOut,
    /// Another status than 400 and 422.
    OtherStatus,
}

impl Refusal {
    /// `list` is the list with the invalid item, and `invalid` its value.
    pub(in crate::cli::certify) fn of(status: u16, body: &[u8], list: &str, invalid: &str) -> Self {
        let Ok(body) = serde_json::from_slice::<Value>(body) else {
            return if matches!(status, 200..=299) { Self::LeftOut } else { Self::NotJson };
        };
        match status {
            200..=299 if body.get(list).is_some_and(|list| list.to_string().contains(invalid)) => Self::Kept,
            200..=299 => Self::LeftOut,
            400 | 422 => Self::of_body(&body, list),
            _ => Self::OtherStatus,
        }
    }

    fn of_body(body: &Value, list: &str) -> Self {
        let is_located = |detail: &Value| detail.get("loc").is_some();
        if body.get("detail").and_then(Value::as_array).is_some_and(|detail| detail.iter().any(is_located)) {
            return Self::Detail;
        }
        let Some(fields) = body.get("field-errors").and_then(Value::as_object).filter(|map| !map.is_empty())
        else {
            let word = list.trim_end_matches('s');
            let is_about =
                |text: &Value| text.as_str().is_some_and(|text| text.to_lowercase().contains(word));
            let texts = body.get("errors").and_then(Value::as_array);
            return if texts.is_some_and(|texts| texts.iter().any(is_about)) {
                Self::List
            } else if body.get("error").is_some_and(is_about) {
                Self::General
            } else {
                Self::Vague
            };
        };
        match fields.get(list) {
            Some(Value::Object(inner)) if inner.contains_key("errors") => Self::Nested,
            Some(Value::Object(_)) => Self::Plain,
            Some(_) => Self::OnlyList,
            None if fields.keys().any(|key| key.starts_with(&format!("{list}."))) => Self::Dotted,
            None => Self::Vague,
        }
    }
}

/// The words of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(in crate::cli::certify) enum ErrorTexts {
    /// Those of Close's own validator.
    Cleancat,
    Pydantic,
}

impl ErrorTexts {
    /// The words of a refusal of an email address.
    pub(in crate::cli::certify) fn of(body: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(body).to_lowercase();
        let known = [("invalid email", Self::Cleancat), ("value is not a valid email", Self::Pydantic)];
        known.into_iter().find(|(words, _)| text.contains(words)).map(|(_, form)| form)
    }
}

/// A configured field: the value that was sent and the one that came back.
#[derive(Debug, PartialEq)]
pub(in crate::cli::certify) struct FieldObservation {
    /// The setting that names the field.
    pub(in crate::cli::certify) setting: String,
    /// `custom.cf_…`.
    pub(in crate::cli::certify) key: String,
    pub(in crate::cli::certify) kind: String,
    pub(in crate::cli::certify) sent: Value,
    pub(in crate::cli::certify) kept: Kept,
}

#[derive(Debug, PartialEq)]
pub(in crate::cli::certify) enum Kept {
    /// As it was sent.
    Same,
    /// In another notation of the same value.
    OtherNotation(Value),
    Different(Value),
    Missing,
    /// Close refused the value.
    Refused,
    /// No value was sent, for this reason.
    NotTried(&'static str),
}

impl Kept {
    pub(in crate::cli::certify) fn of(sent: &Value, kept: Option<&Value>) -> Self {
        match kept {
            None | Some(Value::Null) => Self::Missing,
            Some(kept) if kept == sent => Self::Same,
            Some(kept) if means_same(sent, kept) => Self::OtherNotation(kept.clone()),
            Some(kept) => Self::Different(kept.clone()),
        }
    }
}

/// Whether two notations mean the same value (close-api.md §15, 10).
fn means_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| means_same(one, other))
        }
        (Value::Array(list), single) | (single, Value::Array(list)) => {
            matches!(list.as_slice(), [item] if means_same(item, single))
        }
        (Value::Object(object), Value::String(id)) | (Value::String(id), Value::Object(object)) => {
            object.get("id").and_then(Value::as_str) == Some(id)
        }
        (Value::Number(number), Value::String(text)) | (Value::String(text), Value::Number(number)) => {
            text.trim().parse::<f64>().ok() == number.as_f64()
        }
        (Value::Number(one), Value::Number(other)) => one.as_f64() == other.as_f64(),
        (Value::String(one), Value::String(other)) => {
            one == other || instant(one).is_some_and(|at| instant(other) == Some(at))
        }
        _ => one == other,
    }
}

fn instant(text: &str) -> Option<Timestamp> {
    let naive = || jiff::tz::TimeZone::UTC.to_timestamp(text.parse::<DateTime>().ok()?).ok();
    text.parse().ok().or_else(naive)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_refusal_has_a_form() {
        let text = "Invalid phone number.";
        for (status, body, form) in [
            (
                400,
                json!({"errors": [], "field-errors": {"phones": {"errors": {"1": {"errors": [],
                    "field-errors": {"phone": text}}}}}}),
                Refusal::Nested,
            ),
            (400, json!({"field-errors": {"phones.1.phone": text}}), Refusal::Dotted),
            (400, json!({"field-errors": {"phones": {"1": {"phone": text}}}}), Refusal::Plain),
            (400, json!({"field-errors": {"phones": text}}), Refusal::OnlyList),
            (400, json!({"errors": [text], "field-errors": {}}), Refusal::List),
            (400, json!({"error": text}), Refusal::General),
            (400, json!({"error": "The request is not valid."}), Refusal::Vague),
            (422, json!({"detail": [{"loc": ["body", "phones", 1, "phone"], "msg": text}]}), Refusal::Detail),
            (200, json!({"phones": [{"phone": "call me"}]}), Refusal::Kept),
            (200, json!({"phones": []}), Refusal::LeftOut),
            (500, json!({}), Refusal::OtherStatus),
        ] {
            assert_eq!(Refusal::of(status, body.to_string().as_bytes(), "phones", "call me"), form, "{body}");
        }
        assert_eq!(Refusal::of(400, b"<html>", "phones", "call me"), Refusal::NotJson);
    }

    #[test]
    fn a_value_comes_back_in_one_of_several_notations() {
        let (same, other) = (Kept::Same, |value: &Value| Kept::OtherNotation(value.clone()));
        for (sent, kept, expected) in [
            (json!("a"), json!("a"), same),
            (json!(5), json!("5"), other(&json!("5"))),
            (json!(5), json!(5.0), other(&json!(5.0))),
            (json!("user_1"), json!({"id": "user_1"}), other(&json!({"id": "user_1"}))),
            (json!("a"), json!(["a"]), other(&json!(["a"]))),
            (json!(["a"]), json!("a"), other(&json!("a"))),
            (
                json!("2026-01-31T10:00:00.000000+00:00"),
                json!("2026-01-31T11:00:00+01:00"),
                other(&json!("2026-01-31T11:00:00+01:00")),
            ),
            (
                json!("2026-01-31T10:00:00.000000+00:00"),
                json!("2026-01-31T10:00:00"),
                other(&json!("2026-01-31T10:00:00")),
            ),
            (json!("a"), json!("b"), Kept::Different(json!("b"))),
            (json!("a"), json!(null), Kept::Missing),
        ] {
            assert_eq!(Kept::of(&sent, Some(&kept)), expected, "{sent} {kept}");
        }
        assert_eq!(Kept::of(&json!("a"), None), Kept::Missing);
    }
}
