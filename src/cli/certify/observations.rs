//! What `certify` sees in the answers of Close. Pure: answers in, observations out.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use reqwest::header::HeaderMap;
use serde_json::Value;
use strum::IntoStaticStr;

/// What was seen. What was not looked at, or could not be seen, is `None` or empty.
#[derive(Debug, Default)]
pub(super) struct Observations {
    pub(super) headers: BTreeSet<HeaderForm>,
    pub(super) times: BTreeSet<TimeForm>,
    pub(super) missing_record: Option<NotFound>,
    pub(super) unknown_url: Option<NotFound>,
    /// The status of a path without its trailing slash.
    pub(super) missing_slash: Option<u16>,
    /// The lists of Contacts in the answer that created a Lead.
    pub(super) created_lists: Option<ContactsForm>,
    /// The lists of Contacts in a Lead that was read.
    pub(super) read_lists: Option<ContactsForm>,
    /// The lists of a Contact that were missing or null, of `emails`, `phones` and `urls`.
    pub(super) unknown_lists: Option<Vec<(&'static str, ListForm)>>,
    /// A list endpoint shows a Lead right after its creation.
    pub(super) list_shows_new: Option<bool>,
    /// Until a created record can be read by its id.
    pub(super) read_created: Option<Delay>,
    /// Until a read shows a change.
    pub(super) read_changed: Option<Delay>,
    /// Until a deleted record can no longer be read.
    pub(super) read_deleted: Option<Delay>,
    /// Until search shows a created record.
    pub(super) search_created: Option<Delay>,
    /// Until search finds a record by the custom field with which it was created.
    pub(super) search_key: Option<Delay>,
    /// Until search finds a record by a changed custom field.
    pub(super) search_changed: Option<Delay>,
    /// Until the event log shows a creation.
    pub(super) event: Option<Delay>,
    /// Whether the events have the record.
    pub(super) event_has_data: Option<bool>,
    /// The data of an event that is more than an hour old.
    pub(super) old_event_has_data: Option<bool>,
    pub(super) exact: Option<Exact>,
    /// Search finds a Contact by its email address in another case.
    pub(super) email_search: Option<bool>,
    /// A descending search with a cursor returns every row.
    pub(super) descending: Option<bool>,
    /// A change of one field left the others as they were.
    pub(super) is_patch: Option<bool>,
    /// Phone numbers as they were sent and as Close kept them.
    pub(super) phones: Vec<(&'static str, Option<String>)>,
    pub(super) bad_phone: Option<Refusal>,
    pub(super) bad_email: Option<Refusal>,
    pub(super) error_texts: Option<ErrorTexts>,
    pub(super) unknown_key_refused: Option<bool>,
    /// A search for a custom field in `_fields` that does not exist is refused.
    pub(super) unknown_selector_refused: Option<bool>,
    pub(super) last_cursor: Option<LastCursor>,
    /// The rows of a search have the fields that were asked for.
    pub(super) rows_have_fields: Option<bool>,
    pub(super) fields: Vec<FieldObservation>,
}

/// How long until something was visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delay {
    /// At the first look.
    None,
    Within(Duration),
    /// Not within this time.
    Longer(Duration),
}

/// The form of the rate limit headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum HeaderForm {
    /// `ratelimit: limit=…, remaining=…, reset=…`.
    Comma,
    /// The same with `;`.
    Semicolon,
    /// The same beside a `ratelimit-*` triple.
    SemicolonAndTriple,
    /// A `ratelimit` header in another notation.
    Unreadable,
    /// The same beside a triple.
    UnreadableAndTriple,
    /// Only `ratelimit-limit`, `-remaining` and `-reset`.
    Triple,
    /// Only `x-rate-limit-limit`, `-remaining` and `-reset`.
    Legacy,
    /// The last two.
    Proxy,
    /// No header.
    Absent,
}

impl HeaderForm {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let triple = |prefix: &str| header(&format!("{prefix}-remaining")).is_some();
        match (header("ratelimit"), triple("ratelimit"), triple("x-rate-limit")) {
            (Some(text), is_beside, _) => {
                let has = |part: &str| text.split([',', ';']).any(|item| item.trim().starts_with(part));
                let is_readable = ["limit=", "remaining=", "reset="].into_iter().all(has);
                match (is_readable, text.contains(';'), is_beside) {
                    (true, true, false) => Self::Semicolon,
                    (true, true, true) => Self::SemicolonAndTriple,
                    (true, false, _) => Self::Comma,
                    (false, _, false) => Self::Unreadable,
                    (false, _, true) => Self::UnreadableAndTriple,
                }
            }
            (None, true, true) => Self::Proxy,
            (None, true, false) => Self::Triple,
            (None, false, true) => Self::Legacy,
            (None, false, false) => Self::Absent,
        }
    }
}

/// The notation of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum TimeForm {
    /// `+00:00`.
    Utc,
    /// `Z`.
    Zulu,
    OtherOffset,
    /// Without an offset.
    Naive,
    Unreadable,
}

impl TimeForm {
    pub(super) fn of(text: &str) -> Self {
        match (text.parse::<Timestamp>().is_ok(), text.parse::<DateTime>().is_ok()) {
            (true, _) if text.ends_with('Z') => Self::Zulu,
            (true, _) if text.ends_with("+00:00") => Self::Utc,
            (true, _) => Self::OtherOffset,
            (false, true) => Self::Naive,
            (false, false) => Self::Unreadable,
        }
    }
}

/// The answer to a request for something that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum NotFound {
    /// `{"error": "Empty query: Lead matching query does not exist."}`.
    Record,
    /// `{"error": "The requested URL was not found on the server. …"}`.
    Url,
    /// Other JSON.
    OtherJson,
    /// HTML or plain text: a proxy answered.
    NotJson,
    /// Not a 404.
    OtherStatus,
}

impl NotFound {
    pub(super) fn of(status: u16, body: &[u8]) -> Self {
        let body: Option<Value> = serde_json::from_slice(body).ok();
        let text =
            body.as_ref().and_then(|body| body.get("error")).and_then(Value::as_str).unwrap_or_default();
        match (status, &body) {
            (404, Some(_)) if text.contains("does not exist") => Self::Record,
            (404, Some(_)) if text.starts_with("The requested URL was not found") => Self::Url,
            (404, Some(_)) => Self::OtherJson,
            (404, None) => Self::NotJson,
            _ => Self::OtherStatus,
        }
    }
}

/// The lists of Contacts of a Lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum ContactsForm {
    /// `contacts` and `contact_ids`, with the same Contacts.
    Whole,
    WithoutContactIds,
    WithoutContacts,
    /// `contacts` lacks some of `contact_ids`.
    Partial,
    /// Neither.
    Neither,
}

impl ContactsForm {
    pub(super) fn of(lead: &Value) -> Self {
        let list = |key: &str| lead.get(key).and_then(Value::as_array);
        match (list("contacts"), list("contact_ids")) {
            (Some(contacts), Some(ids)) => {
                let has = |id: &Value| contacts.iter().any(|contact| contact.get("id") == Some(id));
                if ids.iter().all(has) { Self::Whole } else { Self::Partial }
            }
            (Some(_), None) => Self::WithoutContactIds,
            (None, Some(_)) => Self::WithoutContacts,
            (None, None) => Self::Neither,
        }
    }
}

/// A list of a Contact that is not a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum ListForm {
    Missing,
    Null,
    /// There, but without the item that was sent.
    Empty,
    Other,
}

/// The lists of a Contact, of which each had one item, that do not have it.
pub(super) fn unknown_lists(contact: &Value, sent: &[&'static str]) -> Vec<(&'static str, ListForm)> {
    let form = |list: &str| match contact.get(list) {
        None => Some(ListForm::Missing),
        Some(Value::Null) => Some(ListForm::Null),
        Some(Value::Array(items)) => items.is_empty().then_some(ListForm::Empty),
        Some(_) => Some(ListForm::Other),
    };
    sent.iter().filter_map(|list| Some((*list, form(list)?))).collect()
}

/// How search compares with `exact_value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Exact {
    /// Whole values, ignoring case.
    FoldsCase,
    /// Whole values.
    #[strum(serialize = "exact")]
    KeepsCase,
    /// Also values that only contain the words.
    Words,
    /// 400.
    Refused,
    /// Does not find the value that it is given.
    FindsNothing,
}

/// The answer to a write with one invalid value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Refusal {
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
    pub(super) fn of(status: u16, body: &[u8], list: &str, invalid: &str) -> Self {
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
pub(super) enum ErrorTexts {
    /// Those of Close's own validator.
    Cleancat,
    Pydantic,
}

impl ErrorTexts {
    /// The words of a refusal of an email address.
    pub(super) fn of(body: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(body).to_lowercase();
        let known = [("invalid email", Self::Cleancat), ("value is not a valid email", Self::Pydantic)];
        known.into_iter().find(|(words, _)| text.contains(words)).map(|(_, form)| form)
    }
}

/// The cursor of the last page of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(super) enum LastCursor {
    Null,
    Empty,
    Absent,
}

impl LastCursor {
    pub(super) fn of(page: &Value) -> Option<Self> {
        match page.get("cursor") {
            None => Some(Self::Absent),
            Some(Value::Null) => Some(Self::Null),
            Some(Value::String(cursor)) if cursor.is_empty() => Some(Self::Empty),
            Some(_) => None,
        }
    }
}

/// A configured field: the value that was sent and the one that came back.
#[derive(Debug, PartialEq)]
pub(super) struct FieldObservation {
    /// The setting that names the field.
    pub(super) setting: String,
    /// `custom.cf_…`.
    pub(super) key: String,
    pub(super) kind: String,
    pub(super) sent: Value,
    pub(super) kept: Kept,
}

#[derive(Debug, PartialEq)]
pub(super) enum Kept {
    /// As it was sent.
    Same,
    /// In another notation of the same value.
    OtherNotation(Value),
    Different(Value),
    Missing,
    /// Close refused the value.
    Refused,
}

impl Kept {
    pub(super) fn of(sent: &Value, kept: Option<&Value>) -> Self {
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
    use reqwest::header::{HeaderName, HeaderValue};
    use serde_json::json;

    use super::*;

    #[test]
    fn headers_have_a_form() {
        for (headers, form) in [
            (&[("ratelimit", "limit=100, remaining=50, reset=5")][..], HeaderForm::Comma),
            (
                &[("ratelimit", "limit=100; remaining=50; reset=5"), ("ratelimit-remaining", "9")],
                HeaderForm::SemicolonAndTriple,
            ),
            (&[("ratelimit", "limit=100; remaining=50; reset=5")], HeaderForm::Semicolon),
            (&[("ratelimit", "\"default\";r=50;t=30")], HeaderForm::Unreadable),
            (
                &[("ratelimit", "\"default\";r=50;t=30"), ("ratelimit-remaining", "9")],
                HeaderForm::UnreadableAndTriple,
            ),
            (&[("ratelimit-remaining", "9")], HeaderForm::Triple),
            (&[("x-rate-limit-remaining", "9")], HeaderForm::Legacy),
            (&[("x-rate-limit-remaining", "9"), ("ratelimit-remaining", "9")], HeaderForm::Proxy),
            (&[("content-type", "application/json")], HeaderForm::Absent),
        ] {
            let header = |(name, value): &(&'static str, &'static str)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            };
            assert_eq!(HeaderForm::of(&headers.iter().map(header).collect()), form, "{headers:?}");
        }
    }

    #[test]
    fn times_have_a_form() {
        for (text, form) in [
            ("2026-01-31T10:00:00.844000+00:00", TimeForm::Utc),
            ("2026-01-31T10:00:00Z", TimeForm::Zulu),
            ("2026-01-31T12:00:00+02:00", TimeForm::OtherOffset),
            ("2026-01-31T10:00:00.844000", TimeForm::Naive),
            ("yesterday", TimeForm::Unreadable),
        ] {
            assert_eq!(TimeForm::of(text), form, "{text}");
        }
    }

    #[test]
    fn a_404_has_a_form() {
        for (status, body, form) in [
            (404, r#"{"error": "Empty query: Lead matching query does not exist."}"#, NotFound::Record),
            (404, r#"{"error": "The requested URL was not found on the server. If"}"#, NotFound::Url),
            (404, r#"{"message": "no route"}"#, NotFound::OtherJson),
            (404, "<html>", NotFound::NotJson),
            (404, "", NotFound::NotJson),
            (200, "{}", NotFound::OtherStatus),
        ] {
            assert_eq!(NotFound::of(status, body.as_bytes()), form, "{body}");
        }
    }

    #[test]
    fn a_lead_has_its_contacts_in_two_lists() {
        for (lead, form) in [
            (json!({"contacts": [{"id": "a"}], "contact_ids": ["a"]}), ContactsForm::Whole),
            (json!({"contacts": [{"id": "a"}], "contact_ids": ["a", "b"]}), ContactsForm::Partial),
            (json!({"contacts": [{"id": "a"}]}), ContactsForm::WithoutContactIds),
            (json!({"contacts": null, "contact_ids": ["a"]}), ContactsForm::WithoutContacts),
            (json!({}), ContactsForm::Neither),
        ] {
            assert_eq!(ContactsForm::of(&lead), form, "{lead}");
        }
        let contact = json!({"emails": [], "phones": null});
        assert_eq!(
            unknown_lists(&contact, &["emails", "phones", "urls"]),
            [("emails", ListForm::Empty), ("phones", ListForm::Null), ("urls", ListForm::Missing)]
        );
    }

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
