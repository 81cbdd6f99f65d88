//! A field that a rule fills, and what the field accepts.

use serde_json::Value;

use crate::domain::dropped::{DropReason, excerpt};
use crate::domain::mapping::coerce::{self, Unusable};
use crate::domain::mapping::rules::Rule;
use crate::domain::record::Field;
use crate::domain::schema::{CustomField, FieldKind, Status, User};

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) field: Field,
    pub(super) accepts: Accepts,
    pub(super) rule: Rule,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Accepts {
    Line,
    Text,
    Status(Vec<Status>),
    Custom(CustomField),
    /// Close does not have the field.
    Nothing,
}

impl Accepts {
    /// The value to write and what had to be left out: both when only part of a list fits.
    pub(super) fn coerce(&self, found: &[Value], users: &[User]) -> (Option<Value>, Option<Unusable>) {
        let whole = match self {
            Self::Line => coerce::line(found),
            Self::Text => return coerce::long_text(found),
            Self::Status(statuses) => coerce::status(found, statuses),
            Self::Nothing => Err(DropReason::UnknownField),
            Self::Custom(field) => return coerce::custom(found, field, users),
        };
        match whole {
            Ok(value) => (Some(value), None),
            Err(reason) => (None, Some((reason, found.first().map(excerpt)))),
        }
    }

    /// Every accepted value, if they can be listed.
    pub(super) fn choices(&self, users: &[User]) -> Vec<String> {
        match self {
            Self::Status(statuses) => statuses.iter().map(|status| status.label.clone()).collect(),
            Self::Custom(CustomField { kind: FieldKind::Choices(choices), .. }) => choices.clone(),
            Self::Custom(CustomField { kind: FieldKind::User, .. }) => {
                users.iter().map(|user| user.name.clone()).collect()
            }
            Self::Custom(_) | Self::Line | Self::Text | Self::Nothing => Vec::new(),
        }
    }
}
