//! What a Close organization has besides records: custom fields, lead statuses, users.

use crate::domain::record::FieldId;

/// The part of an organization that values are checked against.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schema {
    /// Custom fields of Leads, shared ones included.
    pub lead: Vec<CustomField>,
    /// Custom fields of Contacts, shared ones included.
    pub contact: Vec<CustomField>,
    /// Lead statuses, in the organization's order. Empty when Close did not send them.
    pub statuses: Vec<Status>,
    /// The members of the organization. Empty when no field asks for one.
    pub users: Vec<User>,
}

/// A custom field of Leads or Contacts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomField {
    /// Its id.
    pub id: FieldId,
    /// Its name, as people see it.
    pub name: String,
    /// What it takes.
    pub kind: FieldKind,
    /// Whether it holds a list.
    pub multiple: bool,
}

/// The types of custom fields (close-api.md §7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// Text.
    Text,
    /// Long text.
    Textarea,
    /// Text the application does not show.
    Hidden,
    /// A number.
    Number,
    /// A day.
    Date,
    /// A moment.
    Datetime,
    /// One of these.
    Choices(Vec<String>),
    /// A member of the organization.
    User,
    /// A Contact, by id.
    Contact,
    /// A record of a custom object, by id.
    CustomObject,
    /// A type that was unknown when this was written; values are handed on as they are.
    Other(String),
}

impl FieldKind {
    /// Reads Close's word for a type.
    pub fn read(word: &str, choices: Vec<String>) -> Self {
        match word {
            "text" => Self::Text,
            "textarea" => Self::Textarea,
            "hidden" => Self::Hidden,
            "number" => Self::Number,
            "date" => Self::Date,
            "datetime" => Self::Datetime,
            "choices" => Self::Choices(choices),
            "user" => Self::User,
            "contact" => Self::Contact,
            "custom_object" => Self::CustomObject,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Close's word for the type.
    pub fn word(&self) -> &str {
        match self {
            Self::Text => "text",
            Self::Textarea => "textarea",
            Self::Hidden => "hidden",
            Self::Number => "number",
            Self::Date => "date",
            Self::Datetime => "datetime",
            Self::Choices(_) => "choices",
            Self::User => "user",
            Self::Contact => "contact",
            Self::CustomObject => "custom_object",
            Self::Other(word) => word,
        }
    }
}

/// A lead status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its id, `stat_…`, which never changes.
    pub id: String,
    /// Its label, which people may change (close-api.md §8).
    pub label: String,
}

/// A member of the organization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The id, `user_…`.
    pub id: String,
    /// First and last name.
    pub name: String,
    /// The email address.
    pub email: String,
}

/// How the configuration names a custom field: by id or by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FieldRef(String);

/// Why a reference leads to no field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Dangling {
    /// There is no field with this id or name.
    #[error("no custom field has this id or name")]
    Missing,
    /// Several fields have this name.
    #[error("several custom fields have this name; use the id of one")]
    Ambiguous,
}

impl FieldRef {
    /// Takes an id, `cf_…`, or a name as people see it in Close.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The field that is meant. An id wins over a name.
    pub fn find<'a>(&self, fields: &'a [CustomField]) -> Result<&'a CustomField, Dangling> {
        if let Some(field) = fields.iter().find(|field| field.id.as_str() == self.0) {
            return Ok(field);
        }
        let mut named = fields.iter().filter(|field| field.name.trim() == self.0);
        match (named.next(), named.next()) {
            (Some(field), None) => Ok(field),
            (Some(_), Some(_)) => Err(Dangling::Ambiguous),
            (None, _) => Err(Dangling::Missing),
        }
    }
}
