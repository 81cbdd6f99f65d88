//! Mapped values that are left out of a write, and why.

use serde_json::Value;
use strum::{IntoStaticStr, VariantArray};

/// A mapped value that was left out.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Dropped {
    /// The field of Close it was meant for, `custom.cf_…`.
    pub field: String,
    /// Why.
    pub reason: DropReason,
    /// What was left out, for eyes that may see it. None when it was an object.
    pub value: Option<Value>,
}

/// Why a value was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DropReason {
    /// A list or object where one value is needed.
    NotAValue,
    /// No email address.
    InvalidEmail,
    /// A phone without a digit, with letters, or too long.
    InvalidPhone,
    /// Nothing a URL can be made of.
    InvalidUrl,
    /// No number.
    NotANumber,
    /// No date, or a number too far from today to be one.
    NotADate,
    /// None of the field's choices, or no lead status.
    NotAChoice,
    /// No member of the Close organization.
    NoSuchUser,
    /// No id of the kind of record the field refers to.
    NotAnId,
    /// Close does not have the custom field.
    UnknownField,
    /// The Contact's list holds as many entries as Close takes.
    ListFull,
    /// Close refused it.
    #[strum(serialize = "refused_by_close")]
    Refused,
}

impl DropReason {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::NotAValue => "expected a single value",
            Self::InvalidEmail => "not a valid email address",
            Self::InvalidPhone => "not a valid phone number",
            Self::InvalidUrl => "not a valid URL",
            Self::NotANumber => "not a number",
            Self::NotADate => "not a date",
            Self::NotAChoice => "not one of the choices",
            Self::NoSuchUser => "not a user of the Close organization",
            Self::NotAnId => "not a valid record id",
            Self::UnknownField => "Close has no such field",
            Self::ListFull => "the Contact's list is full",
            Self::Refused => "Close rejected it",
        }
    }
}

impl serde::Serialize for DropReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.label())
    }
}
