//! What Close says about a call that it rejects: which fields, and why.
//!
//! Errors come in several shapes (close-api.md §3 and §15, 6), and which one Close uses for a nested list is not known.
//! So all of them are read: `field-errors` with nested `errors`, keys with dots, plain objects and lists, `errors` alone, a
//! general `error`, and `detail` with `loc`. Close quotes values in its texts, so only known texts are repeated, in our
//! words.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::domain::record::{Field, FieldId};
use crate::text::block;

/// A rejected call, with the fields that Close named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub status: u16,
    /// One entry per field that Close named, at any depth.
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

/// The maximum size of the body of an error response in bytes. A longer one says nothing more.
pub(crate) const MAX_ERROR_BODY: usize = 256 << 10;
/// The maximum size of an excerpt in bytes.
const MAX_EXCERPT: usize = 2048;
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
const NO_SUCH_OBJECT: &str = "the object does not exist";
const UNKNOWN_NAME: &str = "the name is not known";
const INVALID_EMAIL: &str = "invalid email address";
const INVALID_PHONE: &str = "invalid phone number";
const INVALID_URL: &str = "invalid URL";
const WRONG_TYPE: &str = "the value has the wrong type";
const NOT_PARSED: &str = "the value could not be parsed";
const NOT_A_CHOICE: &str = "not a valid choice";
const OUT_OF_RANGE: &str = "the number is out of range";
const TOO_LONG: &str = "the value is too long";
const LIST_TOO_LONG: &str = "the list is too long";
const LIST_EMPTY: &str = "the list must not be empty";
const REQUIRED: &str = "this field is required";

impl FieldError {
    /// The path as text: `contacts.0.custom.cf_X`.
    pub fn path(&self) -> String {
        self.path.join(".").chars().take(MAX_PATH).collect()
    }

    /// Whether it says what the call lacks, not what is wrong in it.
    pub fn is_about_something_absent(&self) -> bool {
        matches!(self.message, REQUIRED | NO_SUCH_OBJECT)
    }

    /// Whether the custom field does not exist.
    pub fn field_is_missing(&self) -> bool {
        let is_custom = || self.path.last().is_some_and(|name| name.starts_with("custom."));
        self.message == NO_SUCH_FIELD || (self.message == UNKNOWN_NAME && is_custom())
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

/// How error messages of Close start, and what close-sync logs for them. The first that fits counts. The texts are those
/// of Close's own validator (close-api.md §3) and of pydantic, which Close uses since 2026 (close-api.md §15, 6).
///
/// Close quotes values in its messages: names, phone numbers and emails, which must not get into logs or headers. So only
/// these texts are used, never the message itself.
const KNOWN_MESSAGES: [(&str, &str); 41] = [
    ("this field is required", REQUIRED),
    ("field required", REQUIRED),
    ("value must be of", WRONG_TYPE),
    ("the value must be no longer", TOO_LONG),
    ("string should have at most", TOO_LONG),
    ("string should have at least", "the value is too short"),
    ("invalid email", INVALID_EMAIL),
    ("value is not a valid email", INVALID_EMAIL),
    ("invalid phone", INVALID_PHONE),
    ("phone number is not valid", INVALID_PHONE),
    ("value is not a valid phone", INVALID_PHONE),
    ("invalid url", INVALID_URL),
    ("input should be a valid url", INVALID_URL),
    ("url scheme should be", INVALID_URL),
    ("list is too long", LIST_TOO_LONG),
    ("list should have at most", LIST_TOO_LONG),
    ("list must not be empty", LIST_EMPTY),
    ("list should have at least", LIST_EMPTY),
    ("not a valid choice", NOT_A_CHOICE),
    ("value cannot be changed", "the value cannot be changed"),
    ("object does not exist", NO_SUCH_OBJECT),
    ("could not parse", NOT_PARSED),
    ("input should be a valid date", NOT_PARSED),
    ("input should be a valid integer", WRONG_TYPE),
    ("input should be a valid", WRONG_TYPE),
    ("input should be less than", OUT_OF_RANGE),
    ("input should be greater than", OUT_OF_RANGE),
    ("input should be a multiple", OUT_OF_RANGE),
    ("input should be an instance", WRONG_TYPE),
    ("input should be none", WRONG_TYPE),
    ("input should be", NOT_A_CHOICE),
    ("extra inputs are not permitted", UNKNOWN_NAME),
    ("unknown field", UNKNOWN_NAME),
    ("unknown custom field", NO_SUCH_FIELD),
    ("custom field does not exist", NO_SUCH_FIELD),
    ("expired cursor", "the cursor has expired"),
    ("assertion failed", "the value is not valid"),
    ("value error", "the value is not valid"),
    ("invalid request", "invalid request"),
    ("json data must be", "invalid request"),
    ("the request contains invalid json", "the request contains invalid JSON"),
];

/// What pydantic writes before the text of a validator.
const VALIDATOR_PREFIXES: [&str; 2] = ["value error, ", "assertion failed, "];

/// Replaces any other message.
const WITHHELD: &str = "rejected (the message of Close may contain personal data; a replay shows it)";

fn safe_message(text: &str) -> &'static str {
    let text = text.to_lowercase();
    // It quotes the name of the field.
    if text.starts_with("the custom field") && text.contains("does not exist") {
        return NO_SUCH_FIELD;
    }
    let known = |text: &str| KNOWN_MESSAGES.iter().find(|(start, _)| text.starts_with(start));
    let inner = VALIDATOR_PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix));
    inner.and_then(known).or_else(|| known(&text)).map_or(WITHHELD, |(_, ours)| *ours)
}

/// The list that a text is about.
fn subject(message: &str) -> Option<&'static str> {
    match message {
        INVALID_EMAIL => Some("emails"),
        INVALID_PHONE => Some("phones"),
        INVALID_URL => Some("urls"),
        _ => None,
    }
}

impl Rejection {
    /// Reads the body of an error response. It may be empty or not JSON (close-api.md §3).
    pub(crate) fn read(status: u16, body: &[u8]) -> Self {
        let body = &body[..body.len().min(MAX_ERROR_BODY)];
        let response = ResponseExcerpt::new(body);
        let mut errors = Errors::default();
        errors.read_body(&serde_json::from_slice(body).unwrap_or_default());
        let message = errors.message();
        let Errors { mut fields, general } = errors;
        if fields.is_empty() {
            let named = |text: General| Some(FieldError { path: vec![text.field?], message: text.message });
            fields.extend(general.into_iter().filter_map(named));
        }
        Self { status, fields, message, response }
    }

    /// Whether a custom field that the call names does not exist.
    pub fn field_is_missing(&self) -> bool {
        self.message == Some(NO_SUCH_FIELD) || self.fields.iter().any(FieldError::field_is_missing)
    }

    /// Whether a query in other words may be accepted.
    pub(crate) fn may_be_about_the_query(&self) -> bool {
        self.status == 400 && !self.field_is_missing() && !self.is_about_selected_fields()
    }

    /// Whether the selection of fields to return is rejected.
    pub fn is_about_selected_fields(&self) -> bool {
        self.fields.iter().any(|field| field.path.first().is_some_and(|name| name == "_fields"))
    }
}

/// Keys that hold errors and are not names of fields.
const WRAPPERS: [&str; 5] = ["field-errors", "field_errors", "errors", "error", "detail"];
/// The keys of the text of one error.
const TEXTS: [&str; 3] = ["msg", "message", "text"];
/// Names of fields, for errors without a wrapper around them.
const NAMES: [&str; 11] = [
    "contacts",
    "emails",
    "phones",
    "urls",
    "name",
    "title",
    "description",
    "status",
    "status_id",
    "lead",
    "lead_id",
];

#[derive(Default)]
struct Errors {
    fields: Vec<FieldError>,
    general: Vec<General>,
}

/// A text without a path.
struct General {
    message: &'static str,
    /// The list that the text is about, or the custom field that it says does not exist.
    field: Option<String>,
}

impl Errors {
    fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.general.is_empty()
    }

    /// The general text that says most.
    fn message(&self) -> Option<&'static str> {
        let rank = |message: &&str| match *message {
            NO_SUCH_FIELD => 0,
            WITHHELD => 2,
            _ => 1,
        };
        self.general.iter().map(|text| text.message).min_by_key(rank)
    }

    fn read_body(&mut self, body: &Value) {
        let Some(object) = body.as_object() else { return };
        self.read_wrapped(object, &[]);
        if self.is_empty() {
            let is_name = |name: &str| {
                let first = names(name).first().cloned().unwrap_or_default();
                NAMES.contains(&first.as_str()) || first.starts_with("custom")
            };
            self.read_members(object.iter().filter(|(name, _)| is_name(name)), &[]);
        }
        if self.is_empty()
            && let Some(text) = text_of(object)
        {
            self.add(text, &[]);
        }
    }

    /// The errors in an object's wrappers.
    fn read_wrapped(&mut self, object: &Map<String, Value>, path: &[String]) {
        for errors in WRAPPERS.iter().filter_map(|key| object.get(*key)) {
            self.read(errors, path);
        }
    }

    fn read(&mut self, node: &Value, path: &[String]) {
        match node {
            Value::String(text) => self.add(text, path),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate().take(MAX_FIELDS) {
                    match item.as_object().and_then(located) {
                        Some((location, text)) => self.add(text, &[path, &location].concat()),
                        None if item.is_string() => self.read(item, path),
                        None => self.read(item, &[path, &[index.to_string()]].concat()),
                    }
                }
            }
            Value::Object(object) => {
                if let Some((location, text)) = located(object) {
                    self.add(text, &[path, &location].concat());
                } else if let Some(text) = text_of(object) {
                    // Next to a text, other keys are about the error.
                    let before = self.fields.len();
                    self.read_wrapped(object, path);
                    if self.fields.len() == before {
                        self.add(text, path);
                    }
                } else {
                    self.read_wrapped(object, path);
                    self.read_members(
                        object.iter().filter(|(name, _)| !WRAPPERS.contains(&name.as_str())),
                        path,
                    );
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn read_members<'a>(&mut self, members: impl Iterator<Item = (&'a String, &'a Value)>, path: &[String]) {
        for (name, child) in members {
            let path = [path, &names(name)].concat();
            if path.len() > MAX_DEPTH || self.fields.len() >= MAX_FIELDS {
                return;
            }
            self.read(child, &path);
        }
    }

    fn add(&mut self, text: &str, path: &[String]) {
        let message = safe_message(text);
        let path = joined(path);
        if path.is_empty() {
            let field = match message {
                NO_SUCH_FIELD => quoted_field(text),
                _ => subject(message).map(str::to_owned),
            };
            let is_known = |known: &General| known.message == message && known.field == field;
            if self.general.len() < MAX_FIELDS && !self.general.iter().any(is_known) {
                self.general.push(General { message, field });
            }
        } else if path.len() <= MAX_DEPTH && self.fields.len() < MAX_FIELDS {
            let error = FieldError { path, message };
            if !self.fields.contains(&error) {
                self.fields.push(error);
            }
        }
    }
}

/// The key of the custom field whose id a text quotes.
fn quoted_field(text: &str) -> Option<String> {
    let is_id = |text: &&str| text.starts_with("cf_") || text.starts_with("lcf_");
    let id = text.split(['"', '\'', '`']).filter(is_id).find_map(FieldId::parse)?;
    Some(Field::Custom(id).to_string())
}

/// The text of an error that is an object.
fn text_of(object: &Map<String, Value>) -> Option<&str> {
    TEXTS.iter().find_map(|key| object.get(*key)?.as_str())
}

/// The path and the text of an error that is an object with a location.
fn located(object: &Map<String, Value>) -> Option<(Vec<String>, &str)> {
    let location = ["loc", "field", "path"].iter().find_map(|key| object.get(*key))?;
    let part = |value: &Value| match value {
        Value::String(name) => names(name),
        Value::Number(index) => vec![index.to_string()],
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => Vec::new(),
    };
    let mut path: Vec<String> = match location.as_array() {
        Some(parts) => parts.iter().take(MAX_DEPTH * 2).flat_map(part).collect(),
        None => part(location),
    };
    // Where the input was found.
    if path.first().is_some_and(|name| ["body", "query"].contains(&name.as_str())) {
        path.remove(0);
    }
    Some((path, text_of(object)?))
}

/// The names in a key: `contacts.0.phones[1]` has four.
fn names(key: &str) -> Vec<String> {
    let parts = key.split(['.', '[', ']']).filter(|part| !part.is_empty());
    parts.take(MAX_DEPTH * 2).map(safe_name).collect()
}

/// The path with `custom` and the id of the field as one name, as Close writes it.
fn joined(path: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::with_capacity(path.len());
    for name in path {
        match names.last_mut() {
            Some(last) if last == "custom" => {
                last.push('.');
                last.push_str(name);
            }
            Some(_) | None => names.push(name.clone()),
        }
    }
    names
}

/// The name of a field or an index, as Close has them. Anything else could be a text of a person, or forge a log line or
/// a header.
fn safe_name(name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '?' };
    name.chars().take(MAX_NAME).map(safe).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> String {
        Rejection::read(400, body.to_string().as_bytes()).to_string()
    }

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
            assert_eq!(read(&body), text);
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

    /// The shapes in which Close may name one phone of a Contact in a Lead.
    #[test]
    fn every_shape_names_the_field() {
        let text = "Phone number is not valid. Please use the international format like +16505551234";
        let nested = json!({"errors": [], "field-errors": {"phone": text}});
        let nested = json!({"errors": [], "field-errors": {"phones": {"errors": {"0": nested}}}});
        let shapes = [
            json!({"errors": [], "field-errors": {"contacts": {"errors": {"0": nested}}}}),
            json!({"errors": [], "field-errors": {"contacts.0.phones.0.phone": text}}),
            json!({"field-errors": {"contacts[0].phones[0].phone": [text]}}),
            json!({"field-errors": {"contacts": {"0": {"phones": {"0": {"phone": text}}}}}}),
            json!({"field-errors": {"contacts": [{"phones": [{"phone": [text]}]}]}}),
            json!({"contacts": [{"phones": [{"phone": [text]}]}]}),
            json!({"errors": {"contacts": {"0": {"phones": {"0": {"phone": text}}}}}}),
            json!({"errors": [{"field": "contacts.0.phones.0.phone", "message": text}]}),
            json!({"error": {"message": text, "path": ["contacts", 0, "phones", 0, "phone"]}}),
            json!({"error": {"message": "Validation failed", "code": "invalid", "errors": {"contacts.0.phones.0.phone": text}}}),
            json!({"detail": [{"loc": ["body", "contacts", 0, "phones", 0, "phone"], "msg": format!("Value error, {text}"), "type": "value_error"}]}),
        ];
        for body in shapes {
            assert_eq!(
                read(&body),
                "Close rejected the request (400); contacts.0.phones.0.phone: invalid phone number",
                "{body}"
            );
        }
        // Without a path, the text says which list it is about.
        for body in [
            json!({"errors": [text]}),
            json!({"error": text}),
            json!({"error": {"message": text}}),
            json!({"detail": text}),
        ] {
            assert_eq!(
                read(&body),
                "Close rejected the request (400); phones: invalid phone number",
                "{body}"
            );
        }
    }

    #[test]
    fn every_text_of_a_list_is_read() {
        let phone = "Phone number is not valid.";
        let gone = "The Custom Field \"cf_X\" does not exist.";
        let cases = [
            (json!({"errors": ["jane is odd", gone, phone]}), &["custom.cf_X", "phones"][..]),
            (json!({"error": ["Validation failed", "Invalid URL.", phone]}), &["urls", "phones"]),
            (json!({"errors": [phone, phone]}), &["phones"]),
            (json!({"field-errors": {"custom.cf_X": ["Not a valid choice.", gone]}}), &["custom.cf_X"; 2]),
        ];
        for (body, expected) in cases {
            let rejection = Rejection::read(400, body.to_string().as_bytes());
            let paths: Vec<_> = rejection.fields.iter().map(FieldError::path).collect();
            assert_eq!(paths, expected, "{body}");
            assert_eq!(rejection.field_is_missing(), body.to_string().contains("does not exist"), "{body}");
        }
        let unnamed = json!({"errors": ["Validation failed", "The Custom Field \"Plan\" does not exist."]});
        let rejection = Rejection::read(400, unnamed.to_string().as_bytes());
        assert!(rejection.fields.is_empty() && rejection.field_is_missing());
    }

    #[test]
    fn a_custom_field_is_one_name_in_every_shape() {
        let text = "Extra inputs are not permitted";
        for body in [
            json!({"field-errors": {"custom.cf_X": text}}),
            json!({"field-errors": {"custom": {"cf_X": text}}}),
            json!({"detail": [{"loc": ["body", "custom", "cf_X"], "msg": text}]}),
            json!({"detail": [{"loc": ["body", "custom.cf_X"], "msg": text}]}),
            json!({"custom.cf_X": [text]}),
        ] {
            let rejection = Rejection::read(422, body.to_string().as_bytes());
            let path = vec!["custom.cf_X".to_owned()];
            assert_eq!(rejection.fields, [FieldError { path, message: UNKNOWN_NAME }], "{body}");
            assert!(rejection.field_is_missing(), "{body}");
        }
        let missing = |body: Value| Rejection::read(400, body.to_string().as_bytes()).field_is_missing();
        assert!(missing(json!({"error": "The Custom Field \"Plan\" does not exist."})));
        let named = Rejection::read(400, br#"{"error": "The Custom Field \"cf_X\" does not exist."}"#);
        assert_eq!(named.fields[0].path, ["custom.cf_X"]);
        assert!(!missing(json!({"error": "The Custom Field \"Plan\" is required."})));
        assert!(!missing(json!({"field-errors": {"nickname": text}})));
        let selected =
            Rejection::read(400, br#"{"field-errors": {"_fields": {"lead": "Input should be 'id'"}}}"#);
        assert!(selected.is_about_selected_fields() && !selected.field_is_missing());
    }

    #[test]
    fn pydantics_texts_are_repeated_without_values() {
        let cases = [
            ("Input should be less than or equal to 200", OUT_OF_RANGE),
            ("Input should be a valid string", WRONG_TYPE),
            ("Input should be a valid integer, unable to parse string as an integer", WRONG_TYPE),
            ("Input should be a valid datetime, invalid character in year", NOT_PARSED),
            ("Input should be 'jane@example.test' or 'b'", NOT_A_CHOICE),
            ("String should have at most 100 characters", TOO_LONG),
            ("List should have at most 100 items after validation, not 101", LIST_TOO_LONG),
            ("value is not a valid email address: jane@ has no domain", INVALID_EMAIL),
            ("Input should be a valid URL, relative URL without a base", INVALID_URL),
            ("Value error, Invalid email address.", INVALID_EMAIL),
            ("Value error, jane@example.test is odd", "the value is not valid"),
            ("Field required", REQUIRED),
            ("jane@example.test", WITHHELD),
        ];
        for (text, expected) in cases {
            assert_eq!(safe_message(text), expected, "{text}");
        }
    }

    #[test]
    fn an_error_has_a_bounded_length_and_plain_names() {
        let keys = |number: usize, length: usize| -> Value {
            let member = |n: usize| (format!("{n:04}{}", "k".repeat(length)), json!("Invalid URL."));
            json!({"field-errors": (0..number).map(member).collect::<Map<_, _>>()})
        };
        let nested =
            (0..100).fold(json!("Invalid URL."), |inner, _| json!({"errors": {"k".repeat(90): inner}}));
        let dotted = json!({"field-errors": {"k.".repeat(1000): "Invalid URL."}});
        let list = json!({"field-errors": {"a": vec![json!({"b": "Invalid URL."}); 1000]}});
        for body in [keys(1000, 150), keys(1, 200_000), keys(5000, 10), nested, dotted, list] {
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
        assert_eq!(rejection.fields[0].path(), "a???.2J?31m??????");
        let raw = Rejection::read(400, hostile.as_bytes()).response.unwrap();
        assert!(
            raw.reveal().chars().all(|c| c == '\n' || "a[2J31m é\u{fffd}".contains(c)),
            "{:?}",
            raw.reveal()
        );
        assert!(raw.reveal().contains('\n'));
    }
}
