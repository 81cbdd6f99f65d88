//! Finds the custom fields the rules name, and what is wrong with the rules.

use serde_json::Value;

use crate::domain::dropped::DropReason;
use crate::domain::mapping::{KeyFields, Mapping, RecordRules, Rules, Takes, Target};
use crate::domain::record::{Field, FieldId};
use crate::domain::schema::{CustomField, Dangling, FieldKind, FieldRef, Schema};
use crate::domain::staleness::SyncedAtFields;

/// A lookup field that cannot serve, which no message can be worked on without.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// It does not exist.
    #[error(
        "no {records} custom field has the id or name `{field}`{}: create one of type text in Close (Settings > \
         Custom Fields) and set `{setting}` to its id",
        suggest(.similar)
    )]
    Missing {
        /// The key of the configuration.
        setting: &'static str,
        /// What it says.
        field: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        /// Text fields that do exist.
        similar: Vec<String>,
    },
    /// Several fields have this name.
    #[error("several {records} custom fields have the name `{field}`: set `{setting}` to the id of one")]
    Ambiguous {
        /// The key of the configuration.
        setting: &'static str,
        /// What it says.
        field: String,
        /// `Lead` or `Contact`.
        records: &'static str,
    },
    /// It has a type that cannot hold any id.
    #[error(
        "the {records} custom field `{id}` (\"{name}\") is of type {kind}, but ids are looked up as text: create \
         one of type text in Close (Settings > Custom Fields) and set `{setting}` to its id"
    )]
    WrongType {
        /// The key of the configuration.
        setting: &'static str,
        /// Its id.
        id: FieldId,
        /// Its name in Close.
        name: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        /// The type it has.
        kind: String,
    },
    /// A mapping rule fills it with something else.
    #[error(
        "`{rule}` is the lookup field `{setting}`, which is filled from `mapping.company_id` or `mapping.user_id`: \
         remove the rule"
    )]
    AlsoMapped {
        /// The key of the configuration.
        setting: &'static str,
        /// The key of the rule.
        rule: String,
    },
}

impl BadKey {
    /// The key of the configuration it is about.
    pub fn setting(&self) -> &'static str {
        match self {
            Self::Missing { setting, .. }
            | Self::Ambiguous { setting, .. }
            | Self::WrongType { setting, .. }
            | Self::AlsoMapped { setting, .. } => setting,
        }
    }
}

fn suggest(similar: &[String]) -> String {
    if similar.is_empty() { String::new() } else { format!(" (text fields: {})", similar.join(", ")) }
}

/// A rule with a constant its field does not take.
#[derive(Clone, Debug, PartialEq)]
pub struct Misfit {
    /// The key of the configuration.
    pub setting: String,
    /// The constant.
    pub value: Value,
    /// Why.
    pub reason: DropReason,
    /// What the field takes, if that can be listed.
    pub choices: Vec<String>,
}

/// A rule that has no custom field of its own: its values are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The key of the configuration, `mapping.lead.custom.Plan`.
    pub setting: String,
    /// Why.
    pub reason: NoField,
}

impl Unknown {
    /// What is wrong and what it causes.
    pub fn description(&self) -> String {
        let follows = if self.setting == LEAD.stamp || self.setting == CONTACT.stamp {
            "until this is fixed, an older event may overwrite a newer one after a restart"
        } else {
            "its values are left out until the field exists (create it in Close or correct the setting)"
        };
        format!("{}: {follows}", self.reason)
    }
}

/// Why a rule has no custom field of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoField {
    /// Its name leads to none.
    #[error(transparent)]
    Dangling(#[from] Dangling),
    /// Two rules name one field, by its id and by its name.
    #[error("another rule fills the same custom field; remove one of them")]
    Taken,
    /// It cannot store a time.
    #[error("the custom field is not of type datetime")]
    NoTime,
}

/// The words of the configuration for one kind of record.
pub(crate) struct Words {
    records: &'static str,
    setting: &'static str,
    stamp: &'static str,
    pub(crate) table: &'static str,
}

pub(crate) const LEAD: Words = Words {
    records: "Lead",
    setting: "close.lead_company_id_field",
    stamp: "close.lead_synced_at_field",
    table: "mapping.lead.custom",
};
pub(crate) const CONTACT: Words = Words {
    records: "Contact",
    setting: "close.contact_user_id_field",
    stamp: "close.contact_synced_at_field",
    table: "mapping.contact.custom",
};

impl Mapping {
    /// Finds the custom fields the rules name.
    ///
    /// # Errors
    /// Every lookup field that cannot serve; the list is never empty.
    pub fn resolve(rules: &Rules, schema: &Schema) -> Result<Self, Vec<BadKey>> {
        let (mut unknown, mut bad) = (Vec::new(), Vec::new());
        let company = rules.lead.key(&schema.lead, &LEAD, &mut bad);
        let user = rules.contact.key(&schema.contact, &CONTACT, &mut bad);
        if !bad.is_empty() {
            return Err(bad);
        }
        let lead = rules.lead.targets(schema, &schema.lead, &LEAD, &mut unknown);
        let contact = rules.contact.targets(schema, &schema.contact, &CONTACT, &mut unknown);
        let stamps = SyncedAtFields {
            lead: rules.lead.stamp(&schema.lead, &lead, &LEAD, &mut unknown),
            contact: rules.contact.stamp(&schema.contact, &contact, &CONTACT, &mut unknown),
        };
        Ok(Self {
            lead,
            contact,
            stamps,
            keys: KeyFields { company, user },
            users: schema.users.clone(),
            names: schema
                .lead
                .iter()
                .chain(&schema.contact)
                .map(|f| (f.id.clone(), f.name.clone()))
                .collect(),
            unknown,
            rules: rules.clone(),
        })
    }
}

impl Rules {
    /// The same rules with the lookup fields named by id. They are not to change while we run: another
    /// field of the same name holds no ids, and everyone would be created again.
    #[must_use]
    pub fn pinned(&self, keys: &KeyFields) -> Self {
        let by_id = |id: &Option<FieldId>| id.as_ref().map(|id| FieldRef::new(id.as_str()));
        let mut rules = self.clone();
        (rules.lead.key, rules.contact.key) = (by_id(&keys.company), by_id(&keys.user));
        rules
    }

    /// Whether a custom field is filled that holds members of the organization.
    pub fn wants_users(&self, schema: &Schema) -> bool {
        let wants = |rules: &RecordRules, fields: &[CustomField]| {
            rules.custom.keys().any(|rule| rule.find(fields).is_ok_and(|field| field.kind == FieldKind::User))
        };
        wants(&self.lead, &schema.lead) || wants(&self.contact, &schema.contact)
    }

    /// Whether custom fields of Leads are needed, and of Contacts.
    pub fn needs(&self) -> (bool, bool) {
        let needs =
            |rules: &RecordRules| rules.key.is_some() || rules.stamp.is_some() || !rules.custom.is_empty();
        (needs(&self.lead), needs(&self.contact))
    }
}

impl RecordRules {
    fn key(&self, fields: &[CustomField], words: &Words, bad: &mut Vec<BadKey>) -> Option<FieldId> {
        let Words { records, setting, table, stamp: _ } = *words;
        let reference = self.key.as_ref()?;
        let field = || reference.as_str().to_owned();
        match reference.find(fields) {
            Err(Dangling::Missing) => {
                let similar = fields.iter().filter(|field| field.kind == FieldKind::Text);
                let similar = similar.map(|field| format!("`{}` \"{}\"", field.id, field.name)).collect();
                bad.push(BadKey::Missing { setting, field: field(), records, similar });
            }
            Err(Dangling::Ambiguous) => bad.push(BadKey::Ambiguous { setting, field: field(), records }),
            Ok(CustomField { id, name, kind, multiple: _ }) if *kind != FieldKind::Text => {
                let kind = kind.word().to_owned();
                bad.push(BadKey::WrongType { setting, id: id.clone(), name: name.clone(), records, kind });
            }
            Ok(key) => {
                let is_key = |rule: &&FieldRef| rule.find(fields).is_ok_and(|field| field.id == key.id);
                if let Some(rule) = self.custom.keys().find(is_key) {
                    bad.push(BadKey::AlsoMapped { setting, rule: format!("{table}.{}", rule.as_str()) });
                }
                return Some(key.id.clone());
            }
        }
        None
    }

    /// The field for the time. Without it the sync goes on; only what others applied cannot be told apart.
    fn stamp(
        &self,
        fields: &[CustomField],
        targets: &[Target],
        words: &Words,
        unknown: &mut Vec<Unknown>,
    ) -> Option<FieldId> {
        let found = self.stamp.as_ref()?.find(fields).map_err(NoField::from);
        let found = found.and_then(|field| {
            let id = Field::Custom(field.id.clone());
            if targets.iter().any(|target| target.field == id) {
                Err(NoField::Taken)
            } else if field.kind == FieldKind::Datetime && !field.multiple {
                Ok(field.id.clone())
            } else {
                Err(NoField::NoTime)
            }
        });
        found.map_err(|reason| unknown.push(Unknown { setting: words.stamp.into(), reason })).ok()
    }

    fn targets(
        &self,
        schema: &Schema,
        fields: &[CustomField],
        words: &Words,
        unknown: &mut Vec<Unknown>,
    ) -> Vec<Target> {
        let plain = self.fields.iter().map(|(field, rule)| {
            let takes = match field {
                Field::Name | Field::Title | Field::Custom(_) => Takes::Line,
                Field::Description => Takes::Text,
                Field::Status => Takes::Status(schema.statuses.clone()),
            };
            Target { field: field.clone(), takes, rule: rule.clone() }
        });
        let mut targets: Vec<Target> = plain.collect();
        for (reference, rule) in &self.custom {
            let mut leads_nowhere = |reason: NoField| {
                let setting = format!("{}.{}", words.table, reference.as_str());
                unknown.push(Unknown { setting, reason });
                (FieldId::new(reference.as_str()), Takes::Nothing)
            };
            let (id, takes) = match reference.find(fields) {
                Ok(field) if targets.iter().any(|target| target.field == Field::Custom(field.id.clone())) => {
                    leads_nowhere(NoField::Taken)
                }
                Ok(field) => (field.id.clone(), Takes::Custom(field.clone())),
                Err(dangling) => leads_nowhere(dangling.into()),
            };
            targets.push(Target { field: Field::Custom(id), takes, rule: rule.clone() });
        }
        targets
    }
}
