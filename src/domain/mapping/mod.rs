//! Mapping an event to the fields of Close: which value each field gets, and which person and company the event is about.
//!
//! [`Rules`] come from the configuration. They name custom fields by id or by name, and what a field accepts depends on
//! its type. So the rules are resolved against the organization's [`Schema`] to a [`Mapping`] before the first event,
//! and again when the schema may have changed. Applying a mapping fails only when the event identifies no person. A value
//! that cannot be used is left out and reported in [`Desired::dropped`], and the rest of the event is still used.
//!
//! **Identity.** Ids are trimmed and then compared exactly. A number equals its digits as text. Emails are trimmed and
//! compared without case. An address with a plus tag is a different address. A company is found by its id only, so a `company` that is plain text
//! is just a name. An event without user id and email is anonymous: dead-lettered or skipped, as configured. An event
//! whose only identity is an invalid email, a user id that is a list or a [placeholder](Placeholders) such as `undefined` is
//! always dead-lettered, because its producer has a bug. If the company id is unusable, values about the company are written to new Leads only, because it is unclear
//! which company they belong to.
//!
//! **A field that Close does not have** loses its values, reported as `unknown_field`, but the sync continues, because a
//! user of Close may delete a field while the worker runs. Only the lookup fields are required.
//!
//! **A Lead created for an event without a company name** is named after the person, else after the domain of the email
//! unless it belongs to a free-mail provider, else after the email. An existing Lead is never renamed to such a name.

pub mod coerce;
mod desired;
mod jsonpath;
mod placeholders;
mod resolve;
mod rules;
pub mod source;
mod target;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::domain::dropped::{DropReason, Dropped, excerpt};
use crate::domain::event::{Event, NotForClose};
use crate::domain::phone::Country;
use crate::domain::record::{Channel, Field, FieldId, fold_email};
use crate::domain::schema::{CustomField, FieldKind, Item, Schema, UnreadableItem, User};
use crate::domain::staleness::SyncedAtFields;
use crate::domain::value;

use coerce::Unusable;
use resolve::{CONTACT, LEAD};
use source::Picked;
use target::{Accepts, Target};

pub use desired::{Desired, Identity, Key, KeyFields, NoIdentity, Wanted, WriteRule};
pub use placeholders::Placeholders;
pub use resolve::{InvalidConstant, LookupFieldError, UnresolvedField, UnresolvedReason};
pub use rules::{Anonymous, EventIds, FreeMail, RecordRules, Rule, Rules, Share, Trigger};

/// How an unusable company id is reported.
const COMPANY_ID: &str = "company_id";
/// How an unusable user id is reported.
const USER_ID: &str = "user_id";

/// The rules, with every field resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    rules: Rules,
    lead: Vec<Target>,
    contact: Vec<Target>,
    users: Vec<User>,
    names: BTreeMap<FieldId, String>,
    pub keys: KeyFields,
    pub synced_at: SyncedAtFields,
    /// Rules whose field does not exist.
    pub unresolved: Vec<UnresolvedField>,
    /// The country of national phone numbers, if Close says it.
    pub country: Option<Country>,
    /// The id of the organization whose fields these are, if Close says it.
    pub organization: Option<String>,
    /// What Close sent in a form that cannot be read.
    pub unreadable: Vec<UnreadableItem>,
    /// Custom fields that Close requires in a new record and that no rule fills, by kind.
    pub missing_required: Vec<(Item, CustomField)>,
}

impl Mapping {
    /// Looks up the custom fields that the rules name.
    ///
    /// # Errors
    /// Every lookup field that cannot be used. The list is never empty.
    pub fn resolve(rules: &Rules, schema: &Schema) -> Result<Self, Vec<LookupFieldError>> {
        let (mut unresolved, mut bad) = (Vec::new(), Vec::new());
        let company = resolve::key_field(&rules.lead, schema, &schema.lead, &LEAD, &mut bad);
        let user = resolve::key_field(&rules.contact, schema, &schema.contact, &CONTACT, &mut bad);
        if !bad.is_empty() {
            return Err(bad);
        }
        let lead = resolve::targets(&rules.lead, schema, &schema.lead, &LEAD, &mut unresolved);
        let contact = resolve::targets(&rules.contact, schema, &schema.contact, &CONTACT, &mut unresolved);
        let synced_at = SyncedAtFields {
            lead: resolve::synced_at_field(&rules.lead, schema, &schema.lead, &lead, &LEAD, &mut unresolved),
            contact: resolve::synced_at_field(
                &rules.contact,
                schema,
                &schema.contact,
                &contact,
                &CONTACT,
                &mut unresolved,
            ),
        };
        let missing_required = [
            (Item::LeadField, &schema.lead, &lead, [&company, &synced_at.lead]),
            (Item::ContactField, &schema.contact, &contact, [&user, &synced_at.contact]),
        ];
        let missing_required = missing_required.into_iter().flat_map(|(kind, fields, targets, own)| {
            let is_filled = move |field: &CustomField| {
                let id = Field::Custom(field.id.clone());
                targets.iter().any(|target| target.field == id) || own.contains(&&Some(field.id.clone()))
            };
            let missing = fields.iter().filter(move |field| field.required && !is_filled(field));
            missing.map(move |field| (kind, field.clone()))
        });
        let missing_required = missing_required.collect();
        let fields = schema.lead.iter().chain(&schema.contact);
        Ok(Self {
            lead,
            contact,
            synced_at,
            keys: KeyFields { company, user },
            users: schema.users.clone(),
            names: fields.map(|field| (field.id.clone(), field.name.clone())).collect(),
            unresolved,
            country: schema.country,
            organization: schema.organization.clone(),
            unreadable: schema.unreadable.clone(),
            missing_required,
            rules: rules.clone(),
        })
    }

    /// Whether Close had this custom field when the mapping was resolved.
    pub fn has_field(&self, id: &FieldId) -> bool {
        self.names.contains_key(id)
    }

    /// Why the event is not for Close, according to the trigger and to its own `integrations`.
    pub fn not_for_close(&self, event: &Event) -> Option<NotForClose> {
        if !self.rules.trigger.holds(event) {
            return Some(NotForClose::Trigger);
        }
        event.excludes_close().then_some(NotForClose::Integrations)
    }

    /// The custom fields that rules fill, with the key of the rule.
    pub fn custom(&self) -> impl Iterator<Item = (String, CustomField)> {
        let of = |targets: &[Target], table: &'static str| {
            let custom = targets.iter().filter_map(|target| match &target.accepts {
                Accepts::Custom(field) => Some(field.clone()),
                Accepts::Line | Accepts::Text | Accepts::Status(_) | Accepts::Nothing => None,
            });
            custom.map(|field| (format!("{table}.{}", field.id), field)).collect::<Vec<_>>()
        };
        of(&self.lead, LEAD.table).into_iter().chain(of(&self.contact, CONTACT.table))
    }

    /// Constants in the rules that their fields do not accept: every event would lose them.
    pub fn invalid_constants(&self) -> Vec<InvalidConstant> {
        let mut invalid_constants = self.invalid_constants_in(&self.lead, "mapping.lead");
        invalid_constants.extend(self.invalid_constants_in(&self.contact, "mapping.contact"));
        // A field that does not exist is reported in `unresolved`.
        invalid_constants.retain(|invalid| invalid.reason != DropReason::UnknownField);
        invalid_constants
    }

    fn invalid_constants_in(&self, targets: &[Target], table: &str) -> Vec<InvalidConstant> {
        let mut invalid_constants = Vec::new();
        for Target { field, accepts, rule } in targets {
            let setting = match field {
                Field::Custom(id) | Field::Add(id) => format!("{table}.custom.{id}"),
                Field::Name | Field::Description | Field::Status | Field::Title => format!("{table}.{field}"),
            };
            for value in rule.source.constants().chain(rule.or_on_create.constants()) {
                if let (_, Some((reason, _))) = accepts.coerce(std::slice::from_ref(value), &self.users) {
                    let choices = accepts.choices(&self.users);
                    invalid_constants.push(InvalidConstant {
                        setting: setting.clone(),
                        value: value.clone(),
                        reason,
                        choices,
                    });
                }
            }
        }
        invalid_constants
    }

    fn target(&self, key: &str) -> Option<&Target> {
        self.lead.iter().chain(&self.contact).find(|target| target.field.to_string() == key)
    }

    /// What the field with this key in Close accepts, if that can be listed.
    pub fn choices(&self, key: &str) -> Vec<String> {
        self.target(key).map(|target| target.accepts.choices(&self.users)).unwrap_or_default()
    }

    pub fn anonymous(&self) -> Anonymous {
        self.rules.anonymous
    }

    /// The name that people see for the field with this key in Close.
    pub fn label(&self, key: &str) -> String {
        let name = key.strip_prefix("custom.").and_then(|id| self.names.get(&FieldId::placeholder(id)));
        match key {
            "status_id" => "status".to_owned(),
            _ => name.cloned().unwrap_or_else(|| key.to_owned()),
        }
    }

    /// A value as people read it: statuses and users by name.
    pub fn shown(&self, key: &str, value: &Value) -> Value {
        let accepts = self.target(key).map(|target| &target.accepts);
        let name = |id: &str| match accepts? {
            Accepts::Status(statuses) => {
                statuses.iter().find(|status| status.id == id).map(|status| &status.label)
            }
            Accepts::Custom(CustomField { kind: FieldKind::User, .. }) => {
                self.users.iter().find(|user| user.id == id).map(|user| &user.name)
            }
            Accepts::Custom(_) | Accepts::Line | Accepts::Text | Accepts::Nothing => None,
        };
        match value {
            Value::String(id) => name(id).map_or_else(|| value.clone(), |name| name.as_str().into()),
            Value::Array(items) => items.iter().map(|item| self.shown(key, item)).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.clone(),
        }
    }

    /// What the event wants written to Close.
    pub fn apply(&self, event: &Event) -> Result<Desired, NoIdentity> {
        let Rules { lead, contact, channels, .. } = &self.rules;
        let mut desired = Desired { synced_at: self.synced_at.clone(), ..Desired::default() };
        desired.dropped.extend(
            event
                .unreadable_times()
                .map(|(key, value)| drop_value(key, (DropReason::UnreadableTime, Some(excerpt(value))))),
        );
        for target in &self.lead {
            let wanted = self.take(target, event, &mut desired.dropped);
            desired.lead.extend(wanted.map(|wanted| (target.field.clone(), wanted)));
        }
        for target in &self.contact {
            let wanted = self.take(target, event, &mut desired.dropped);
            desired.contact.extend(wanted.map(|wanted| (target.field.clone(), wanted)));
        }
        let user_id = contact.id.pick(event);
        for (&channel, rule) in channels {
            let wanted = match channel {
                Channel::Email => {
                    let (found, unusable) = rule.email(event, &user_id);
                    desired.dropped.extend(unusable.map(|unusable| drop_value(channel.list(), unusable)));
                    found
                }
                Channel::Phone | Channel::Url => {
                    let read = if channel == Channel::Phone { coerce::phone } else { coerce::url };
                    let (found, write) = rule.pick(event);
                    usable(found, channel.list(), read, &mut desired.dropped).map(|text| (text, write))
                }
            };
            let wanted = wanted.map(|(text, write)| Wanted { value: text.into(), write });
            desired.channels.extend(wanted.map(|wanted| (channel, wanted)));
        }

        let email = desired.channels.get(&Channel::Email).and_then(|wanted| wanted.value.as_str());
        let email = email.map(fold_email);
        let mut id = |picked, name| usable(picked, name, coerce::id, &mut desired.dropped);
        let (company_id, user_id) = (id(lead.id.pick(event), COMPANY_ID), id(user_id, USER_ID));
        let is_dropped = |name: &str| desired.dropped.iter().any(|dropped| dropped.field == name);
        let (dropped_company_id, dropped_user_id, dropped_email) =
            (is_dropped(COMPANY_ID), is_dropped(USER_ID), is_dropped(Channel::Email.list()));
        let has_placeholder = desired
            .dropped
            .iter()
            .any(|dropped| dropped.field == USER_ID && dropped.reason == DropReason::Placeholder);
        if dropped_company_id && self.keys.company.is_some() {
            desired.lead.values_mut().for_each(|wanted| wanted.write = WriteRule::OnCreate);
        }
        let has_user_id = user_id.is_some();
        desired.identity = Identity {
            company_id: self
                .keys
                .company
                .as_ref()
                .and_then(|field| store(field, company_id, &mut desired.lead)),
            user_id: self.keys.user.as_ref().and_then(|field| store(field, user_id, &mut desired.contact)),
            email,
        };
        if desired.identity.user_id.is_none() && desired.identity.email.is_none() {
            return Err(match () {
                () if has_user_id => NoIdentity::NoUserField,
                () if has_placeholder => NoIdentity::Placeholder,
                () if dropped_user_id => NoIdentity::BadUserId,
                () if dropped_email => NoIdentity::BadEmail,
                () => NoIdentity::Anonymous,
            });
        }
        name_new_leads(&mut desired, &self.rules.free_mail);
        Ok(desired)
    }

    fn take(&self, target: &Target, event: &Event, dropped: &mut Vec<Dropped>) -> Option<Wanted> {
        let (found, write) = target.rule.pick(event);
        let (value, unusable) = match found {
            Picked::Nothing => return None,
            Picked::Object => (None, Some((DropReason::NotAValue, None))),
            Picked::Placeholder(word) => (None, Some((DropReason::Placeholder, Some(word)))),
            Picked::Values(found) => target.accepts.coerce(&found, &self.users),
        };
        dropped.extend(unusable.map(|unusable| drop_value(&target.field.to_string(), unusable)));
        Some(Wanted { value: value?, write })
    }
}

/// The value if it is usable. An unusable one is added to `dropped`; an event without the value adds nothing.
fn usable<T>(
    found: Picked,
    field: &str,
    read: impl FnOnce(&[Value]) -> Result<T, DropReason>,
    dropped: &mut Vec<Dropped>,
) -> Option<T> {
    let unusable = match found {
        Picked::Nothing => return None,
        Picked::Object => (DropReason::NotAValue, None),
        Picked::Placeholder(word) => (DropReason::Placeholder, Some(word)),
        Picked::Values(found) => match read(&found) {
            Ok(value) => return Some(value),
            Err(reason) => (reason, found.first().map(excerpt)),
        },
    };
    dropped.push(drop_value(field, unusable));
    None
}

fn drop_value(field: &str, (reason, value): Unusable) -> Dropped {
    Dropped { field: field.to_owned(), reason, value }
}

/// Stores the id that the record is found by on the record. Always as text: a text field rejects numbers (close-api.md
/// §7).
fn store(field: &FieldId, id: Option<String>, wanted: &mut BTreeMap<Field, Wanted>) -> Option<String> {
    let id = id?;
    let value = Value::String(id.clone());
    wanted.insert(Field::Custom(field.clone()), Wanted { value, write: WriteRule::Always });
    Some(id)
}

/// Names the Lead in case it is created.
fn name_new_leads(desired: &mut Desired, free_mail: &FreeMail) {
    if desired.lead.contains_key(&Field::Name) {
        return;
    }
    let person = desired.contact.get(&Field::Name).map(|wanted| wanted.value.clone());
    let email = desired.channels.get(&Channel::Email).map(|wanted| wanted.value.clone());
    let domain = email.as_ref().and_then(Value::as_str).and_then(value::domain);
    let domain = domain.filter(|domain| !free_mail.has(domain)).map(Value::String);
    if let Some(value) = person.or(domain).or(email) {
        desired.lead.insert(Field::Name, Wanted { value, write: WriteRule::OnCreate });
    }
}
