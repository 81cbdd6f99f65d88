//! What can come back from Close instead of an answer, in terms of what may help.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A call to Close that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// 401: the key is wrong, revoked, or of another organization.
    #[error("Close does not accept the API key (401)")]
    Unauthorized,
    /// 402: the organization's plan does not allow it.
    #[error("the plan of the Close organization does not allow this (402)")]
    PlanLimit,
    /// 403: the user of the key may not do this, perhaps nothing at all.
    #[error("the user of the API key may not do this (403)")]
    Forbidden,
    /// 404: the record is not, or no longer, there.
    #[error("Close does not have the record (404)")]
    NotFound,
    /// 400 and other refusals that will never pass as they are.
    #[error("{0}")]
    Rejected(Rejection),
    /// No connection to Close could be made; nothing was sent.
    #[error("Close cannot be reached: {0}")]
    Unreachable(String),
    /// May pass by itself.
    #[error("{0}")]
    Transient(Fault),
}

/// A fault of the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// 5xx.
    #[error("Close answered {0}")]
    Status(u16),
    /// No answer in time.
    #[error("Close did not answer in time")]
    Timeout,
    /// The connection broke while the call was under way.
    #[error("the connection to Close broke")]
    ConnectionLost,
    /// A success whose body could not be understood.
    #[error("Close answered something that could not be read")]
    Garbled,
}

impl CloseError {
    /// The label in traces of a call that got no answer, or none that could be read.
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
            Self::Transient(Fault::Garbled) => "garbled",
        }
    }

    /// Whether it may pass by itself, whatever the message says.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Transient(_) => true,
            Self::Unauthorized | Self::PlanLimit | Self::Forbidden | Self::NotFound | Self::Rejected(_) => {
                false
            }
        }
    }

    /// Whether a write may have happened although it failed. Close has no idempotency key, so such a
    /// POST must be looked up before it is repeated (close-api.md §10). A 503 is refused in front of
    /// the application and taken as not done, as Close's own client does (close-api.md §2).
    pub fn may_have_been_applied(&self) -> bool {
        match self {
            Self::Transient(Fault::Status(status)) => *status != 503,
            Self::Transient(Fault::Timeout | Fault::ConnectionLost | Fault::Garbled) => true,
            Self::Unauthorized
            | Self::PlanLimit
            | Self::Forbidden
            | Self::NotFound
            | Self::Rejected(_)
            | Self::Unreachable(_) => false,
        }
    }
}

/// A refusal, with the fields Close named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The status code.
    pub status: u16,
    /// One entry per field named in `field-errors`, at any depth.
    pub fields: Vec<FieldError>,
    /// What Close said in general, without values.
    pub message: Option<&'static str>,
    /// All it said.
    pub response: Option<ResponseExcerpt>,
}

/// The start of Close's answer. It may contain personal data: shown to an operator on request, never logged or put in
/// headers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResponseExcerpt(String);

/// Bytes of them that are kept.
const MOST_SAID: usize = 2048;

impl ResponseExcerpt {
    /// The words.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ResponseExcerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResponseExcerpt(withheld)")
    }
}

/// One field Close refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The way to the field: `["contacts", "0", "custom.cf_X"]`.
    pub path: Vec<String>,
    /// What Close said about it, without values.
    pub message: &'static str,
}

const NO_SUCH_FIELD: &str = "the custom field does not exist";

impl FieldError {
    /// Whether Close says that it does not have the custom field.
    pub fn field_is_missing(&self) -> bool {
        self.message == NO_SUCH_FIELD
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Close refused the request ({})", self.status)?;
        for field in &self.fields {
            write!(f, "; {}: {}", field.path.join("."), field.message)?;
        }
        match self.message {
            Some(message) if self.fields.is_empty() => write!(f, ": {message}"),
            Some(_) | None => Ok(()),
        }
    }
}

/// Beginnings of what Close is known to say (close-api.md §3), and how we repeat it.
///
/// Close quotes values in its messages, and values are people's names, phones and emails, which must
/// not reach logs or headers. Only a known beginning is repeated; the rest of the text is not.
const KNOWN: [(&str, &str); 15] = [
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

/// Stands for text that is not repeated.
const WITHHELD: &str = "refused (Close's own words may quote personal data: a replay shows them)";

fn known(text: &str) -> &'static str {
    let text = text.to_lowercase();
    KNOWN.iter().find(|(start, _)| text.starts_with(start)).map_or(WITHHELD, |(_, ours)| *ours)
}

impl Rejection {
    /// Reads an error body. Any body will do, also none (close-api.md §3: never fail on a body that
    /// is not JSON).
    pub(crate) fn read(status: u16, body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(&body[..body.len().min(MOST_SAID)]).into_owned();
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let mut fields = Vec::new();
        collect(&body, &mut Vec::new(), &mut fields);
        let general = body.get("error").or_else(|| body.get("errors")?.get(0)).and_then(Value::as_str);
        let message = general.map(known);
        let response = (!text.trim().is_empty()).then_some(ResponseExcerpt(text));
        Self { status, fields, message, response }
    }
}

/// Walks `field-errors` and the `errors` inside it, which for nested data is an object by index.
fn collect(node: &Value, path: &mut Vec<String>, into: &mut Vec<FieldError>) {
    let children = ["field-errors", "errors"].iter().filter_map(|key| node.get(key)?.as_object()).flatten();
    for (name, child) in children {
        path.push(name.clone());
        match child {
            Value::String(text) => into.push(FieldError { path: path.clone(), message: known(text) }),
            Value::Array(texts) => {
                let text = texts.first().and_then(Value::as_str).unwrap_or_default();
                into.push(FieldError { path: path.clone(), message: known(text) });
            }
            Value::Object(_) => collect(child, path, into),
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
                "Close refused the request (400); custom.cf_X: the custom field does not exist",
            ),
            (
                json!({"errors": [], "field-errors": {"contacts": {"errors": {
                    "0": {"errors": [], "field-errors": {"emails": {"errors": {
                        "1": {"errors": [], "field-errors": {"email": "Invalid email address."}}}}}}}}}}),
                "Close refused the request (400); contacts.0.emails.1.email: invalid email address",
            ),
            (
                json!({"field-errors": {"status": "Not a valid choice. \"foo\"", "lead": "Object does not exist."}}),
                "Close refused the request (400); lead: the object does not exist; status: not a valid choice",
            ),
            (
                json!({"error": "jane@example.test is silly"}),
                "Close refused the request (400): refused (Close's own words may quote personal data: a replay shows them)",
            ),
            (json!({"errors": ["Invalid request: x"]}), "Close refused the request (400): invalid request"),
            (json!("Forbidden"), "Close refused the request (400)"),
            (json!({"field-errors": {"name": null}}), "Close refused the request (400)"),
        ];
        for (body, text) in cases {
            assert_eq!(Rejection::read(400, body.to_string().as_bytes()).to_string(), text);
        }
        let silly = Rejection::read(400, br#"{"error": "jane@example.test is silly"}"#);
        assert!(
            silly.response.as_ref().unwrap().reveal().contains("jane")
                && !format!("{silly:?}").contains("jane")
        );
        let known = Rejection::read(413, b"<html>");
        let told = (known.to_string(), known.response.as_ref().map(ResponseExcerpt::reveal));
        assert_eq!(told, ("Close refused the request (413)".into(), Some("<html>")));
        assert_eq!(Rejection::read(400, b" ").response, None);
    }

    #[test]
    fn a_write_may_have_happened_unless_it_was_refused_or_never_sent() {
        let unknown = [
            CloseError::Transient(Fault::Timeout),
            CloseError::Transient(Fault::ConnectionLost),
            CloseError::Transient(Fault::Garbled),
            CloseError::Transient(Fault::Status(500)),
            CloseError::Transient(Fault::Status(502)),
            CloseError::Transient(Fault::Status(504)),
        ];
        let known = [
            CloseError::Transient(Fault::Status(503)),
            CloseError::Unreachable(String::new()),
            CloseError::NotFound,
        ];
        assert!(unknown.iter().all(CloseError::may_have_been_applied));
        assert!(!known.iter().any(CloseError::may_have_been_applied));
    }
}
