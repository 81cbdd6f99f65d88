//! Values that are left out of a write, and why.

use serde_json::Value;
use strum::{IntoStaticStr, VariantArray};

/// A value that was left out.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Dropped {
    /// The field in Close that it was meant for, `custom.cf_…`.
    pub field: String,
    pub reason: DropReason,
    /// An excerpt of the value, which may be personal data. `None` when it was an object.
    pub value: Option<Value>,
}

/// The most characters of a text in an excerpt.
const EXCERPT_CHARS: usize = 100;
/// The most items of a list, and members of an object, in an excerpt.
const EXCERPT_ITEMS: usize = 3;
/// How deep an excerpt goes into lists and objects.
const EXCERPT_DEPTH: usize = 2;
/// Stands for what an excerpt leaves out.
const ELLIPSIS: char = '…';

/// The start of a value, enough to recognize it. A message waits in memory with its excerpts, so their size does not
/// depend on the size of the value.
pub(crate) fn excerpt(value: &Value) -> Value {
    excerpt_to(value, EXCERPT_DEPTH)
}

fn excerpt_to(value: &Value, depth: usize) -> Value {
    let more = |length: usize| (length > EXCERPT_ITEMS).then(|| Value::from(ELLIPSIS.to_string()));
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        Value::String(text) => excerpt_of_text(text).into(),
        Value::Array(items) if depth > 0 || items.is_empty() => {
            let start =
                items.iter().take(EXCERPT_ITEMS).map(|item| excerpt_to(item, depth.saturating_sub(1)));
            start.chain(more(items.len())).collect()
        }
        Value::Object(members) if depth > 0 || members.is_empty() => {
            let start = members.iter().take(EXCERPT_ITEMS);
            let start =
                start.map(|(key, value)| (excerpt_of_text(key), excerpt_to(value, depth.saturating_sub(1))));
            Value::Object(start.chain(more(members.len()).map(|more| (ELLIPSIS.to_string(), more))).collect())
        }
        Value::Array(_) | Value::Object(_) => ELLIPSIS.to_string().into(),
    }
}

fn excerpt_of_text(text: &str) -> String {
    match text.char_indices().nth(EXCERPT_CHARS) {
        Some((end, _)) => format!("{}{ELLIPSIS}", &text[..end]),
        None => text.to_owned(),
    }
}

/// Why a value was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DropReason {
    /// A word that programs write for nothing, `undefined` for example, or a zero time.
    Placeholder,
    /// A list or an object where a single value is needed.
    NotAValue,
    /// Not a valid email address.
    InvalidEmail,
    /// A phone number without digits, with letters, or too long.
    InvalidPhone,
    /// Not a valid URL, also with a scheme added.
    InvalidUrl,
    /// Not a number.
    NotANumber,
    /// Not a date, or a number that is implausible as a time.
    NotADate,
    /// A time of the event that cannot be read, or that is not plausible.
    UnreadableTime,
    /// Not a choice of the field, or not a lead status.
    NotAChoice,
    /// Not a user of the Close organization.
    NoSuchUser,
    /// Not an id of the kind of record that the field refers to.
    NotAnId,
    /// Close does not have the custom field.
    UnknownField,
    /// Longer than the field may be: an id, a URL, the end of a text, or the last items of a list.
    TooLong,
    /// The list of the Contact has as many entries as Close accepts.
    ListFull,
    /// Close did not show the list of the Contact.
    ListUnknown,
    /// Close rejected the value.
    #[strum(serialize = "refused_by_close")]
    Refused,
    /// Close rejected the value for this record before, so it is not sent again.
    RefusedBefore,
    /// Close accepted the value for this record before and kept what it had, so it is not sent again.
    NotKept,
    /// Close accepted the value for this record before and stored another one for it, so it is not sent again.
    Rewritten,
}

impl DropReason {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::Placeholder => "a placeholder for nothing",
            Self::NotAValue => "expected a single value",
            Self::InvalidEmail => "not a valid email address",
            Self::InvalidPhone => "not a valid phone number",
            Self::InvalidUrl => "not a valid URL",
            Self::NotANumber => "not a number",
            Self::NotADate => "not a date",
            Self::UnreadableTime => "not a readable time of an event",
            Self::NotAChoice => "not one of the choices",
            Self::NoSuchUser => "not a user of the Close organization",
            Self::NotAnId => "not a valid record id",
            Self::UnknownField => "Close has no such field",
            Self::TooLong => "too long",
            Self::ListFull => "the Contact's list is full",
            Self::ListUnknown => "Close did not show the Contact's list",
            Self::Refused => "Close rejected it",
            Self::RefusedBefore => "Close rejected it before",
            Self::NotKept => "Close did not keep it before",
            Self::Rewritten => "Close stores it in another form, which the record has",
        }
    }
}

impl serde::Serialize for DropReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_excerpt_keeps_the_start_of_a_value() {
        let cut = format!("{}…", "é".repeat(EXCERPT_CHARS));
        let cases = [
            (json!("CEO"), json!("CEO")),
            (json!("é".repeat(EXCERPT_CHARS)), json!("é".repeat(EXCERPT_CHARS))),
            (json!("é".repeat(EXCERPT_CHARS + 1)), json!(cut)),
            (json!([1, 2, 3]), json!([1, 2, 3])),
            (json!([1, 2, 3, 4]), json!([1, 2, 3, "…"])),
            (json!([[[]], [[1]], {"a": {"b": 1}}]), json!([[[]], ["…"], {"a": "…"}])),
            (json!({"a": 1, "b": 2, "c": 3, "d": 4}), json!({"a": 1, "b": 2, "c": 3, "…": "…"})),
            (json!({"é".repeat(200): null}), json!({cut: null})),
        ];
        for (value, expected) in cases {
            assert_eq!(excerpt(&value), expected, "{value}");
        }
    }
}
