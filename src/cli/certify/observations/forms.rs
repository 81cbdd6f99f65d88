//! The forms of answers: headers, times, lists, pages, and the answers for what does not exist.

use jiff::Timestamp;
use jiff::civil::DateTime;
use reqwest::header::HeaderMap;
use serde_json::Value;
use strum::IntoStaticStr;

/// The form of the rate limit headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(in crate::cli::certify) enum HeaderForm {
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
    pub(in crate::cli::certify) fn of(headers: &HeaderMap) -> Self {
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
pub(in crate::cli::certify) enum TimeForm {
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
    pub(in crate::cli::certify) fn of(text: &str) -> Self {
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
pub(in crate::cli::certify) enum NotFound {
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
    pub(in crate::cli::certify) fn of(status: u16, body: &[u8]) -> Self {
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
pub(in crate::cli::certify) enum ContactsForm {
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
    pub(in crate::cli::certify) fn of(lead: &Value) -> Self {
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
pub(in crate::cli::certify) enum ListForm {
    Missing,
    Null,
    /// There, but without the item that was sent.
    Empty,
    Other,
}

/// The lists of a Contact, of which each had one item, that do not have it.
pub(in crate::cli::certify) fn unknown_lists(
    contact: &Value,
    sent: &[&'static str],
) -> Vec<(&'static str, ListForm)> {
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
pub(in crate::cli::certify) enum Exact {
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

/// The cursor of the last page of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(in crate::cli::certify) enum LastCursor {
    Null,
    Empty,
    Absent,
}

impl LastCursor {
    pub(in crate::cli::certify) fn of(page: &Value) -> Option<Self> {
        match page.get("cursor") {
            None => Some(Self::Absent),
            Some(Value::Null) => Some(Self::Null),
            Some(Value::String(cursor)) if cursor.is_empty() => Some(Self::Empty),
            Some(_) => None,
        }
    }
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
}
