//! Failed calls to Close, classified by what the caller can do.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::text::block;

/// A call to Close that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// 401: the API key is wrong or was revoked.
    #[error("Close does not accept the API key (401)")]
    Unauthorized,
    /// 402: the plan of the organization does not allow the call.
    #[error("the plan of the Close organization does not allow this (402)")]
    PlanLimit,
    /// 403: the user of the API key lacks the permission.
    #[error("the user of the API key may not do this (403)")]
    Forbidden,
    /// 404: the record does not exist.
    #[error("Close does not have the record (404)")]
    NotFound,
    /// 400 and other rejections. The same call would be rejected again.
    #[error("{0}")]
    Rejected(Rejection),
    /// No connection could be made, so nothing was sent.
    #[error("Close cannot be reached: {0}")]
    Unreachable(String),
    /// A later call may succeed.
    #[error("{0}")]
    Transient(Fault),
}

/// A transient fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// 5xx.
    #[error("Close answered {0}")]
    Status(u16),
    #[error("Close did not answer in time")]
    Timeout,
    /// The connection broke during the call.
    #[error("the connection to Close broke")]
    ConnectionLost,
    /// A successful response whose body is not valid.
    #[error("Close sent a response that could not be parsed")]
    InvalidResponse,
    /// A record is larger than [`crate::close::Endpoint`] allows. Close works, and this record stays large.
    #[error("the Lead or Contact in Close is larger than close-sync reads")]
    TooLarge,
    /// 404 for a record that Close has shown or created a moment ago. It may not be there yet, or be deleted.
    #[error("Close does not have a record that it had a moment ago (404)")]
    NotYet,
    /// 404 for several different records in a row. The way to Close is at fault.
    #[error("Close answers 404 for one record after another")]
    Vanished,
}

impl CloseError {
    /// The error type in traces.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::PlanLimit => "plan_limit",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Rejected(_) => "rejected",
            Self::Unreachable(_) => "unreachable",
            Self::Transient(Fault::Status(_)) => "server_error",
            Self::Transient(Fault::Timeout) => "timeout",
            Self::Transient(Fault::ConnectionLost) => "connection_lost",
            Self::Transient(Fault::InvalidResponse) => "garbled",
            Self::Transient(Fault::TooLarge) => "too_large",
            Self::Transient(Fault::NotYet) => "not_yet",
            Self::Transient(Fault::Vanished) => "vanished",
        }
    }

    /// Whether a retry may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Transient(_) => true,
            Self::Unauthorized | Self::PlanLimit | Self::Forbidden | Self::NotFound | Self::Rejected(_) => {
                false
            }
        }
    }

    /// Whether other messages may fail in the same way, because Close or the way to it does not work. A record of any size
    /// is what producers and people made of it, so it says nothing about other messages.
    pub fn may_be_an_outage(&self) -> bool {
        self.is_retryable() && !matches!(self, Self::Transient(Fault::TooLarge | Fault::NotYet))
    }

    /// Whether a write may have been applied although the call failed. Close has no idempotency keys, so the record must
    /// be looked up before such a POST is repeated (close-api.md §10). A 503 comes from in front of the application and
    /// counts as not applied, as in Close's own client (close-api.md §2).
    pub fn may_have_been_applied(&self) -> bool {
        match self {
            Self::Transient(Fault::Status(status)) => *status != 503,
            Self::Transient(
                Fault::Timeout | Fault::ConnectionLost | Fault::InvalidResponse | Fault::TooLarge,
            ) => true,
            Self::Unauthorized
            | Self::PlanLimit
            | Self::Forbidden
            | Self::NotFound
            | Self::Rejected(_)
            | Self::Unreachable(_)
            | Self::Transient(Fault::NotYet | Fault::Vanished) => false,
        }
    }
}

/// A rejected call, with the fields that Close named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub status: u16,
    /// One entry per field named in `field-errors`, at any depth.
    pub fields: Vec<FieldError>,
    /// The general error message, without values.
    pub message: Option<&'static str>,
    pub response: Option<ResponseExcerpt>,
}

/// The start of a response. It may contain personal data, so it is shown to an operator on request and is never logged
/// or written to headers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResponseExcerpt(String);

/// The maximum size of an excerpt in bytes.
const MAX_EXCERPT: usize = 2048;
/// The maximum size of the body of an error response in bytes. A longer one says nothing more.
pub(crate) const MAX_ERROR_BODY: usize = 256 << 10;
/// The most fields that are read from an error response.
const MAX_FIELDS: usize = 100;
/// The most fields that an error names. The others are counted.
const MAX_NAMED: usize = 10;
/// The maximum length of a path, in names.
const MAX_DEPTH: usize = 8;
/// The maximum length of a name in a path, in characters. The names of Close are shorter.
const MAX_NAME: usize = 64;
/// The maximum length of a path as text, in characters.
const MAX_PATH: usize = 200;

impl ResponseExcerpt {
    /// Without characters that control a terminal or hide text. There may be line breaks.
    fn new(body: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(&body[..body.len().min(MAX_EXCERPT)]);
        let text = block(&text);
        (!text.trim().is_empty()).then_some(Self(text))
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ResponseExcerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResponseExcerpt(withheld)")
    }
}

/// A field that Close rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The path to the field: `["contacts", "0", "custom.cf_X"]`.
    pub path: Vec<String>,
    /// The error message, without values.
    pub message: &'static str,
}

const NO_SUCH_FIELD: &str = "the custom field does not exist";

impl FieldError {
    /// The path as text: `contacts.0.custom.cf_X`.
    pub fn path(&self) -> String {
        self.path.join(".").chars().take(MAX_PATH).collect()
    }

    /// Whether the custom field does not exist.
    pub fn field_is_missing(&self) -> bool {
        self.message == NO_SUCH_FIELD
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Close rejected the request ({})", self.status)?;
        for field in self.fields.iter().take(MAX_NAMED) {
            write!(f, "; {}: {}", field.path(), field.message)?;
        }
        if let Some(more @ 1..) = self.fields.len().checked_sub(MAX_NAMED) {
            write!(f, "; and {more} more fields")?;
        }
        match self.message {
            Some(message) if self.fields.is_empty() => write!(f, ": {message}"),
            Some(_) | None => Ok(()),
        }
    }
}

/// How error messages of Close start (close-api.md §3), and what close-sync logs for them.
///
/// Close quotes values in its messages: names, phone numbers and emails, which must not get into logs or headers. So only
/// these texts are used, never the message itself.
const KNOWN_MESSAGES: [(&str, &str); 15] = [
    ("this field is required", "this field is required"),
    ("value must be of", "the value has the wrong type"),
    ("the value must be no longer", "the value is too long"),
    ("invalid email", "invalid email address"),
    ("invalid phone", "invalid phone number"),
    ("invalid url", "invalid URL"),
    ("list is too long", "the list is too long"),
    ("list must not be empty", "the list must not be empty"),
    ("not a valid choice", "not a valid choice"),
    ("value cannot be changed", "the value cannot be changed"),
    ("object does not exist", "the object does not exist"),
    ("could not parse", "the value could not be parsed"),
    ("the custom field", NO_SUCH_FIELD),
    ("invalid request", "invalid request"),
    ("the request contains invalid json", "the request contains invalid JSON"),
];

/// Replaces any other message.
const WITHHELD: &str = "rejected (the message of Close may contain personal data; a replay shows it)";

fn safe_message(text: &str) -> &'static str {
    let text = text.to_lowercase();
    KNOWN_MESSAGES.iter().find(|(start, _)| text.starts_with(start)).map_or(WITHHELD, |(_, ours)| *ours)
}

impl Rejection {
    /// Reads the body of an error response. It may be empty or not JSON (close-api.md §3).
    pub(crate) fn read(status: u16, body: &[u8]) -> Self {
        let body = &body[..body.len().min(MAX_ERROR_BODY)];
        let response = ResponseExcerpt::new(body);
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let mut fields = Vec::new();
        collect_field_errors(&body, &mut Vec::new(), &mut fields);
        let general = body.get("error").or_else(|| body.get("errors")?.get(0)).and_then(Value::as_str);
        let message = general.map(safe_message);
        Self { status, fields, message, response }
    }
}

/// The name of a field or an index, as Close has them. Anything else could be a text of a person, or forge a log line or
/// a header.
fn safe_name(name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '?' };
    name.chars().take(MAX_NAME).map(safe).collect()
}

/// Collects `field-errors` and the `errors` in it. For nested data, `errors` is an object by index.
fn collect_field_errors(node: &Value, path: &mut Vec<String>, into: &mut Vec<FieldError>) {
    let children = ["field-errors", "errors"].iter().filter_map(|key| node.get(key)?.as_object()).flatten();
    for (name, child) in children {
        if path.len() == MAX_DEPTH || into.len() == MAX_FIELDS {
            return;
        }
        path.push(safe_name(name));
        match child {
            Value::String(text) => into.push(FieldError { path: path.clone(), message: safe_message(text) }),
            Value::Array(texts) => {
                let text = texts.first().and_then(Value::as_str).unwrap_or_default();
                into.push(FieldError { path: path.clone(), message: safe_message(text) });
            }
            Value::Object(_) => collect_field_errors(child, path, into),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        path.pop();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rejections_name_fields_and_withhold_values() {
        let cases = [
            (
                json!({"errors": [], "field-errors": {"custom.cf_X": "The Custom Field \"Jane\" does not exist."}}),
                "Close rejected the request (400); custom.cf_X: the custom field does not exist",
            ),
            (
                json!({"errors": [], "field-errors": {"contacts": {"errors": {
                    "0": {"errors": [], "field-errors": {"emails": {"errors": {
                        "1": {"errors": [], "field-errors": {"email": "Invalid email address."}}}}}}}}}}),
                "Close rejected the request (400); contacts.0.emails.1.email: invalid email address",
            ),
            (
                json!({"field-errors": {"status": "Not a valid choice. \"foo\"", "lead": "Object does not exist."}}),
                "Close rejected the request (400); lead: the object does not exist; status: not a valid choice",
            ),
            (
                json!({"error": "jane@example.test is odd"}),
                "Close rejected the request (400): rejected (the message of Close may contain personal data; a replay shows it)",
            ),
            (json!({"errors": ["Invalid request: x"]}), "Close rejected the request (400): invalid request"),
            (json!("Forbidden"), "Close rejected the request (400)"),
            (json!({"field-errors": {"name": null}}), "Close rejected the request (400)"),
        ];
        for (body, text) in cases {
            assert_eq!(Rejection::read(400, body.to_string().as_bytes()).to_string(), text);
        }
        let withheld = Rejection::read(400, br#"{"error": "jane@example.test is odd"}"#);
        assert!(
            withheld.response.as_ref().unwrap().reveal().contains("jane")
                && !format!("{withheld:?}").contains("jane")
        );
        let rejection = Rejection::read(413, b"<html>");
        let parts = (rejection.to_string(), rejection.response.as_ref().map(ResponseExcerpt::reveal));
        assert_eq!(parts, ("Close rejected the request (413)".into(), Some("<html>")));
        assert_eq!(Rejection::read(400, b" ").response, None);
    }

    #[test]
    fn an_error_has_a_bounded_length_and_plain_names() {
        let keys = |number: usize, length: usize| -> Value {
            let member = |n: usize| (format!("{n:04}{}", "k".repeat(length)), json!("Invalid URL."));
            json!({"field-errors": (0..number).map(member).collect::<serde_json::Map<_, _>>()})
        };
        let nested =
            (0..100).fold(json!("Invalid URL."), |inner, _| json!({"errors": {"k".repeat(90): inner}}));
        for body in [keys(1000, 150), keys(1, 200_000), keys(5000, 10), nested] {
            let rejection = Rejection::read(400, body.to_string().as_bytes());
            assert!(
                rejection.fields.len() <= MAX_FIELDS && rejection.to_string().len() < 4000,
                "{rejection}"
            );
            assert!(rejection.fields.iter().all(|field| field.path().len() <= MAX_PATH));
            assert!(rejection.response.unwrap().reveal().len() <= MAX_EXCERPT);
        }
        assert!(
            Rejection::read(400, keys(12, 0).to_string().as_bytes())
                .to_string()
                .ends_with("; and 2 more fields")
        );
        assert!(!Rejection::read(400, keys(10, 0).to_string().as_bytes()).to_string().contains("more"));

        let hostile = "a\r\n\u{1b}[2J\u{9b}31m\u{202e}\u{2066}\u{200b}\u{feff} é";
        let rejection = Rejection::read(400, json!({"field-errors": {hostile: "x"}}).to_string().as_bytes());
        assert_eq!(rejection.fields[0].path(), "a????2J?31m??????");
        let raw = Rejection::read(400, hostile.as_bytes()).response.unwrap();
        assert!(
            raw.reveal().chars().all(|c| c == '\n' || "a[2J31m é\u{fffd}".contains(c)),
            "{:?}",
            raw.reveal()
        );
        assert!(raw.reveal().contains('\n'));
    }

    #[test]
    fn a_failed_write_may_have_been_applied_unless_it_was_rejected_or_not_sent() {
        let maybe_applied = [
            CloseError::Transient(Fault::Timeout),
            CloseError::Transient(Fault::ConnectionLost),
            CloseError::Transient(Fault::InvalidResponse),
            CloseError::Transient(Fault::Status(500)),
            CloseError::Transient(Fault::Status(502)),
            CloseError::Transient(Fault::Status(504)),
        ];
        let not_applied = [
            CloseError::Transient(Fault::Status(503)),
            CloseError::Unreachable(String::new()),
            CloseError::NotFound,
        ];
        assert!(maybe_applied.iter().all(CloseError::may_have_been_applied));
        assert!(!not_applied.iter().any(CloseError::may_have_been_applied));
    }
}
