//! Why a request is refused, in the status codes and texts of Close (close-api.md §3).

use serde_json::{Value, json};

/// A JSON object.
pub(crate) type Object = serde_json::Map<String, Value>;

pub(crate) const REQUIRED: &str = "This field is required.";
pub(crate) const NOT_A_PHONE: &str =
    "Phone number is not valid. Please use the international format like +16505551234";
pub(crate) const NOT_TEXT: &str = "Value must be of str type.";
pub(crate) const NOT_A_CHOICE: &str = "Not a valid choice.";
pub(crate) const NO_SUCH_OBJECT: &str = "Object does not exist.";
pub(crate) const NOT_A_DATETIME: &str = "Could not parse datetime";

/// The reason why a request is refused.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Refusal {
    /// The object of the path, such as a `Lead`, does not exist: 404.
    Missing(&'static str),
    /// One of the leads of a merge does not exist: 404. The text names the source in both cases.
    NoMergeSource,
    /// The request is malformed: 400.
    Malformed(String),
    /// Some fields are invalid: 400.
    Invalid(FieldErrors),
}

impl Refusal {
    /// The refusal of a `_limit` above the maximum.
    pub(crate) fn too_many(max_limit: usize) -> Self {
        let text = "The limit you set is larger than the maximum limit for this resource";
        Self::Malformed(format!("{text} (max_limit = {max_limit})."))
    }

    pub(crate) fn status(&self) -> u16 {
        match self {
            Self::Missing(_) | Self::NoMergeSource => 404,
            Self::Malformed(_) | Self::Invalid(_) => 400,
        }
    }

    pub(crate) fn body(&self) -> Value {
        match self {
            Self::Missing(title) => {
                json!({"error": format!("Empty query: {title} matching query does not exist.")})
            }
            Self::NoMergeSource => json!({"errors": ["Source lead does not exist."]}),
            Self::Malformed(text) => json!({"error": text}),
            Self::Invalid(errors) => errors.body(),
        }
    }
}

/// Errors by field name; errors of nested items also by index.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct FieldErrors {
    pub(crate) general: Vec<&'static str>,
    pub(crate) fields: Object,
}

impl FieldErrors {
    pub(crate) fn one(field: &str, text: &str) -> Self {
        let mut errors = Self::default();
        errors.add(field, text);
        errors
    }

    pub(crate) fn add(&mut self, field: &str, text: &str) {
        self.fields.insert(field.to_owned(), text.into());
    }

    pub(crate) fn add_nested(&mut self, field: &str, index: usize, errors: &Self) {
        let nested = self.fields.entry(field).or_insert_with(|| json!({"errors": {}}));
        nested["errors"][index.to_string()] = errors.body();
    }

    pub(crate) fn into_result<T>(self, good: T) -> Result<T, Self> {
        if self.general.is_empty() && self.fields.is_empty() { Ok(good) } else { Err(self) }
    }

    /// The body of the 400. `errors` is nearly always empty; the texts are in `field-errors`.
    pub(crate) fn body(&self) -> Value {
        json!({"errors": self.general, "field-errors": self.fields})
    }
}
