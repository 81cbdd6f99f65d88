//! The schema of a Close organization: custom fields, lead statuses and users.

use crate::domain::phone::Country;
use crate::domain::record::FieldId;

/// What values are checked against before they are written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schema {
    /// Custom fields of Leads, including shared ones.
    pub lead: Vec<CustomField>,
    /// Custom fields of Contacts, including shared ones.
    pub contact: Vec<CustomField>,
    /// Lead statuses, in the order of the organization. Empty when Close did not send them.
    pub statuses: Vec<Status>,
    /// The users of the organization. Empty when no rule fills a field of type user.
    pub users: Vec<User>,
    /// The country of national phone numbers, if Close says it.
    pub country: Option<Country>,
    /// The id of the organization that has all this.
    pub organization: Option<String>,
    /// What Close sent in a form that cannot be read.
    pub unreadable: Vec<UnreadableItem>,
}

/// The kinds of items in the lists of an organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::Display)]
pub enum Item {
    #[strum(to_string = "Lead custom field")]
    LeadField,
    #[strum(to_string = "Contact custom field")]
    ContactField,
    #[strum(to_string = "lead status")]
    LeadStatus,
    #[strum(to_string = "user")]
    User,
}

/// An item that cannot be read. It is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableItem {
    pub item: Item,
    pub id: Option<String>,
    pub name: Option<String>,
    pub problem: Problem,
}

/// Names the item, but never a user.
impl std::fmt::Display for UnreadableItem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.name.as_ref().filter(|_| self.item != Item::User).or(self.id.as_ref());
        write!(f, "{}", self.item)?;
        if let Some(name) = name {
            write!(f, " \"{name}\"")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// Why an item cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("Close sent no valid id for it")]
    Id,
    #[error("Close sent no type for it")]
    Type,
    #[error("Close sent no list of choices for it")]
    Choices,
}

/// A custom field of Leads or Contacts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomField {
    pub id: FieldId,
    /// The name that users of Close see.
    pub name: String,
    pub kind: FieldKind,
    /// Whether the field has several values.
    pub multiple: bool,
    /// Whether a new record has to have a value. It is not documented whether the API enforces it (close-api.md §15 row 22).
    pub required: bool,
}

/// The types of custom fields (close-api.md §7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldKind {
    Text,
    /// Long text.
    Textarea,
    /// Text that Close does not show.
    Hidden,
    Number,
    Date,
    Datetime,
    /// One of these values.
    Choices(Vec<String>),
    /// A user of the organization, by id.
    User,
    /// A Contact, by id.
    Contact,
    /// A record of a custom object, by id.
    CustomObject,
    /// Any other type. Values are passed on unchanged.
    Other(String),
}

impl FieldKind {
    /// The type with this name in the API of Close.
    pub fn parse(word: &str, choices: Vec<String>) -> Self {
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

    /// The name of the type in the API of Close.
    pub fn as_str(&self) -> &str {
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
    /// `stat_…`, which never changes.
    pub id: String,
    /// Users of Close may change the label (close-api.md §8).
    pub label: String,
}

/// A user of the organization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// `user_…`
    pub id: String,
    /// First and last name.
    pub name: String,
    pub email: String,
}

/// A custom field as the configuration names it, by id or by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FieldRef(String);

/// Why a reference cannot be resolved to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldRefError {
    #[error("no custom field has this id or name")]
    Missing,
    #[error("several custom fields have this name; use the id of one")]
    Ambiguous,
    #[error("the custom field cannot be read: {0}")]
    Unreadable(Problem),
}

impl FieldRef {
    /// An id, `cf_…`, or a name as users of Close see it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The same as [`FieldRef::find`], and says whether the field is one that cannot be read.
    pub fn find_in<'a>(
        &self,
        fields: &'a [CustomField],
        unreadable: &[UnreadableItem],
        item: Item,
    ) -> Result<&'a CustomField, FieldRefError> {
        let is_it = |other: &&UnreadableItem| {
            let names = [other.id.as_deref(), other.name.as_deref().map(str::trim)];
            other.item == item && names.contains(&Some(self.as_str()))
        };
        self.find(fields).map_err(|error| match (error, unreadable.iter().find(is_it)) {
            (FieldRefError::Missing, Some(item)) => FieldRefError::Unreadable(item.problem),
            _ => error,
        })
    }

    /// Resolves the reference. An id takes precedence over a name.
    pub fn find<'a>(&self, fields: &'a [CustomField]) -> Result<&'a CustomField, FieldRefError> {
        if let Some(field) = fields.iter().find(|field| field.id.as_str() == self.0) {
            return Ok(field);
        }
        let mut named = fields.iter().filter(|field| field.name.trim() == self.0);
        match (named.next(), named.next()) {
            (Some(field), None) => Ok(field),
            (Some(_), Some(_)) => Err(FieldRefError::Ambiguous),
            (None, _) => Err(FieldRefError::Missing),
        }
    }
}
