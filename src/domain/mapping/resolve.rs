//! Looking up the custom fields that the rules name, and what can be wrong with the rules.

use serde_json::Value;

use crate::domain::dropped::DropReason;
use crate::domain::mapping::desired::WriteRule;
use crate::domain::mapping::rules::{RecordRules, Rule};
use crate::domain::mapping::target::{Accepts, Target};
use crate::domain::record::{Field, FieldId};
use crate::domain::schema::{CustomField, FieldKind, FieldRef, FieldRefError, Item, Problem, Schema};

/// Why a lookup field cannot be used. Without it no message can be processed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupFieldError {
    #[error(
        "no {records} custom field has the id or name `{field}`{}: create one of type text in Close (Settings > \
         Custom Fields) and set `{setting}` to its id",
        suggest(.similar)
    )]
    Missing {
        setting: &'static str,
        /// The value of the setting.
        field: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        /// Text fields that do exist.
        similar: Vec<String>,
    },
    /// Several fields have this name.
    #[error("several {records} custom fields have the name `{field}`: set `{setting}` to the id of one")]
    Ambiguous {
        setting: &'static str,
        /// The value of the setting.
        field: String,
        /// `Lead` or `Contact`.
        records: &'static str,
    },
    /// Close sent it in a form that cannot be read.
    #[error("the {records} custom field `{field}` of `{setting}` cannot be read: {problem}")]
    Unreadable {
        setting: &'static str,
        /// The value of the setting.
        field: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        problem: Problem,
    },
    #[error(
        "the {records} custom field `{id}` (\"{name}\") is of type {kind}, but ids are looked up as text: create \
         one of type text in Close (Settings > Custom Fields) and set `{setting}` to its id"
    )]
    WrongType {
        setting: &'static str,
        id: FieldId,
        name: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        kind: String,
    },
    #[error(
        "`{rule}` is the lookup field `{setting}`, which is filled from `mapping.company_id` or `mapping.user_id`: \
         remove the rule"
    )]
    AlsoMapped { setting: &'static str, rule: String },
}

impl LookupFieldError {
    pub fn setting(&self) -> &'static str {
        match self {
            Self::Missing { setting, .. }
            | Self::Ambiguous { setting, .. }
            | Self::Unreadable { setting, .. }
            | Self::WrongType { setting, .. }
            | Self::AlsoMapped { setting, .. } => setting,
        }
    }
}

fn suggest(similar: &[String]) -> String {
    if similar.is_empty() { String::new() } else { format!(" (text fields: {})", similar.join(", ")) }
}

/// A rule with a constant that its field does not accept.
#[derive(Clone, Debug, PartialEq)]
pub struct InvalidConstant {
    /// The key in the configuration.
    pub setting: String,
    pub value: Value,
    pub reason: DropReason,
    /// What the field accepts, if that can be listed.
    pub choices: Vec<String>,
}

/// A rule that has no custom field of its own: its values are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnresolvedField {
    /// The key in the configuration, `mapping.lead.custom.Plan`.
    pub setting: String,
    pub reason: UnresolvedReason,
}

impl UnresolvedField {
    /// What is wrong and what it causes.
    pub fn description(&self) -> String {
        if let UnresolvedReason::SingleValue = self.reason {
            return self.reason.to_string();
        }
        let effect = if self.setting == LEAD.synced_at || self.setting == CONTACT.synced_at {
            "until this is fixed, an older event may overwrite a newer one after a restart"
        } else {
            "its values are left out until the field exists (create it in Close or correct the setting)"
        };
        format!("{}: {effect}", self.reason)
    }
}

/// Why a rule has no custom field of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnresolvedReason {
    #[error(transparent)]
    Reference(#[from] FieldRefError),
    /// Two rules name one field, by its id and by its name.
    #[error("another rule fills the same custom field; remove one of them")]
    AlsoFilled,
    /// The rule adds to the values of a field that holds one.
    #[error("`write = \"add\"` needs a custom field with several values, and this one holds one value")]
    SingleValue,
    /// It cannot store a time.
    #[error("the custom field is not of type datetime")]
    NotDatetime,
}

impl UnresolvedField {
    /// Whether only a change of the configuration, or in Close, helps. The start then fails.
    pub fn stops_start(&self) -> bool {
        match self.reason {
            UnresolvedReason::Reference(FieldRefError::Unreadable(_)) | UnresolvedReason::SingleValue => true,
            UnresolvedReason::Reference(FieldRefError::Missing | FieldRefError::Ambiguous)
            | UnresolvedReason::AlsoFilled
            | UnresolvedReason::NotDatetime => false,
        }
    }
}

/// How the configuration names the settings of one kind of record.
pub(super) struct SettingNames {
    item: Item,
    records: &'static str,
    key: &'static str,
    synced_at: &'static str,
    pub(super) table: &'static str,
}

pub(super) const LEAD: SettingNames = SettingNames {
    item: Item::LeadField,
    records: "Lead",
    key: "close.lead_company_id_field",
    synced_at: "close.lead_synced_at_field",
    table: "mapping.lead.custom",
};
pub(super) const CONTACT: SettingNames = SettingNames {
    item: Item::ContactField,
    records: "Contact",
    key: "close.contact_user_id_field",
    synced_at: "close.contact_synced_at_field",
    table: "mapping.contact.custom",
};

/// The lookup field of a kind of record, if one is configured and can be used.
pub(super) fn key_field(
    rules: &RecordRules,
    schema: &Schema,
    fields: &[CustomField],
    names: &SettingNames,
    bad: &mut Vec<LookupFieldError>,
) -> Option<FieldId> {
    let SettingNames { item, records, key: setting, table, synced_at: _ } = *names;
    let reference = rules.key.as_ref()?;
    let field = || reference.as_str().to_owned();
    match reference.find_in(fields, &schema.unreadable, item) {
        Err(FieldRefError::Unreadable(problem)) => {
            bad.push(LookupFieldError::Unreadable { setting, field: field(), records, problem });
        }
        Err(FieldRefError::Missing) => {
            let similar = fields.iter().filter(|field| field.kind == FieldKind::Text);
            let similar = similar.map(|field| format!("`{}` \"{}\"", field.id, field.name)).collect();
            bad.push(LookupFieldError::Missing { setting, field: field(), records, similar });
        }
        Err(FieldRefError::Ambiguous) => {
            bad.push(LookupFieldError::Ambiguous { setting, field: field(), records });
        }
        Ok(CustomField { id, name, kind, multiple: _, required: _ }) if *kind != FieldKind::Text => {
            let kind = kind.as_str().to_owned();
            bad.push(LookupFieldError::WrongType {
                setting,
                id: id.clone(),
                name: name.clone(),
                records,
                kind,
            });
        }
        Ok(key) => {
            let is_key = |rule: &&FieldRef| rule.find(fields).is_ok_and(|field| field.id == key.id);
            if let Some(rule) = rules.custom.keys().find(is_key) {
                bad.push(LookupFieldError::AlsoMapped {
                    setting,
                    rule: format!("{table}.{}", rule.as_str()),
                });
            }
            return Some(key.id.clone());
        }
    }
    None
}

/// The field that stores the time of the last event. The sync works without it, but cannot date what other processes
/// wrote.
pub(super) fn synced_at_field(
    rules: &RecordRules,
    schema: &Schema,
    fields: &[CustomField],
    targets: &[Target],
    names: &SettingNames,
    unresolved_fields: &mut Vec<UnresolvedField>,
) -> Option<FieldId> {
    let found = rules.synced_at.as_ref()?.find_in(fields, &schema.unreadable, names.item);
    let found = found.map_err(UnresolvedReason::from);
    let found = found.and_then(|field| {
        let id = Field::Custom(field.id.clone());
        if targets.iter().any(|target| target.field == id) {
            Err(UnresolvedReason::AlsoFilled)
        } else if field.kind == FieldKind::Datetime && !field.multiple {
            Ok(field.id.clone())
        } else {
            Err(UnresolvedReason::NotDatetime)
        }
    });
    found
        .map_err(|reason| unresolved_fields.push(UnresolvedField { setting: names.synced_at.into(), reason }))
        .ok()
}

/// The fields that the rules of one kind of record fill.
pub(super) fn targets(
    rules: &RecordRules,
    schema: &Schema,
    fields: &[CustomField],
    names: &SettingNames,
    unresolved_fields: &mut Vec<UnresolvedField>,
) -> Vec<Target> {
    let plain = rules.fields.iter().map(|(field, rule)| {
        let accepts = match field {
            Field::Name | Field::Title | Field::Custom(_) | Field::Add(_) => Accepts::Line,
            Field::Description => Accepts::Text,
            Field::Status => Accepts::Status(schema.statuses.clone()),
        };
        target(field.clone(), accepts, rule)
    });
    let mut targets: Vec<Target> = plain.collect();
    for (reference, rule) in &rules.custom {
        let mut unresolved = |reason: UnresolvedReason| {
            let setting = format!("{}.{}", names.table, reference.as_str());
            unresolved_fields.push(UnresolvedField { setting, reason });
            (FieldId::placeholder(reference.as_str()), Accepts::Nothing)
        };
        let (id, accepts) = match reference.find_in(fields, &schema.unreadable, names.item) {
            Ok(field) if rule.write == WriteRule::Add && !field.multiple => {
                unresolved(UnresolvedReason::SingleValue)
            }
            Ok(field) if targets.iter().any(|target| target.field == Field::Custom(field.id.clone())) => {
                unresolved(UnresolvedReason::AlsoFilled)
            }
            Ok(field) => (field.id.clone(), Accepts::Custom(field.clone())),
            Err(error) => unresolved(error.into()),
        };
        targets.push(target(Field::Custom(id), accepts, rule));
    }
    targets
}

/// A choice of the field is a value, whatever its name: a plan can be called None.
fn target(field: Field, accepts: Accepts, rule: &Rule) -> Target {
    let choices = accepts.choices(&[]);
    Target { field, accepts, rule: rule.clone().accepting(&choices) }
}
