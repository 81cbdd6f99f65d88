//! Values that are left out of a write, and why.

use serde_json::Value;
use strum::{IntoStaticStr, VariantArray};

/// A value that was left out.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Dropped {
    /// The field in Close that it was meant for, `custom.cf_…`.
    pub field: String,
    pub reason: DropReason,
    /// The value, which may be personal data. `None` when it was an object.
    pub value: Option<Value>,
}

/// Why a value was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DropReason {
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
    /// Not a choice of the field, or not a lead status.
    NotAChoice,
    /// Not a user of the Close organization.
    NoSuchUser,
    /// Not an id of the kind of record that the field refers to.
    NotAnId,
    /// Close does not have the custom field.
    UnknownField,
    /// The list of the Contact has as many entries as Close accepts.
    ListFull,
    /// Close rejected the value.
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
