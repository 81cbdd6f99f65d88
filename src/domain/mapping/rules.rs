//! The mapping rules as configured: where values come from and when they may be written.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use serde_json::{Map, json};

use crate::domain::encoding::{Payload, TOOL_LIMIT};
use crate::domain::event::Event;
use crate::domain::mapping::coerce;
use crate::domain::mapping::desired::{KeyFields, WriteRule};
use crate::domain::mapping::source::{self, Picked, Source};
use crate::domain::record::{Channel, Field, FieldId, fold_email};
use crate::domain::schema::{CustomField, FieldKind, FieldRef, Schema};

/// How one field is filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub source: Source,
    pub write: WriteRule,
    /// A fallback for a record that is created. It never changes an existing record.
    pub or_on_create: Source,
}

impl Rule {
    /// The values in an event, and when they may be written.
    pub(crate) fn pick(&self, event: &Event) -> (Picked, WriteRule) {
        match self.source.pick(event) {
            Picked::Nothing => (self.or_on_create.pick(event), WriteRule::OnCreate),
            found @ (Picked::Object | Picked::Values(_)) => (found, self.write),
        }
    }
}

/// A condition on the event.
#[derive(Clone, Debug, PartialEq)]
pub struct Trigger(JpQuery);

impl Trigger {
    /// Reads a condition in the notation of JSONPath's filters, `$.type == 'identify'`.
    ///
    /// # Errors
    /// What is wrong with the condition, for the operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        if refers_to_parts(text) {
            return Err(format!("`{text}` refers to a part of the event; write `$` for the event, not `@`"));
        }
        // A filter selects every child of the event for which the condition holds. A condition on the whole event
        // (`$`) therefore selects all children or none.
        source::path(&format!("$[?{text}]")).map(Self).map_err(|_| {
            format!("`{text}` is not a valid condition (try `$.type == 'identify' && $.traits.email`)")
        })
    }

    pub(crate) fn holds(&self, event: &Event) -> bool {
        let empty = event.body.as_object().is_some_and(Map::is_empty);
        // An empty event has no child for the filter to select, so an object with one empty member replaces it.
        let body = if empty { &json!({"": null}) } else { &event.body };
        !source::nodes(&self.0, body).is_empty()
    }
}

/// Whether a condition uses `@` outside a nested filter. There `@` is a child of the event, so `@.type == 'identify'`,
/// an easy mistake, never holds.
fn refers_to_parts(condition: &str) -> bool {
    let (mut depth, mut quote) = (0_usize, None);
    condition.chars().any(|c| {
        match (quote, c) {
            (Some(open), _) => quote = quote.filter(|_| c != open),
            (None, '\'' | '"') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
        c == '@' && quote.is_none() && depth == 0
    })
}

/// What to do with an event that does not identify a person.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Anonymous {
    #[default]
    DeadLetter,
    Skip,
}

/// Domains of free-mail providers, which do not name a company: `gmail.com`, `yahoo.*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeMail(pub Vec<String>);

impl FreeMail {
    pub(crate) fn has(&self, domain: &str) -> bool {
        self.0.iter().any(|known| match known.strip_suffix(".*") {
            Some(provider) => domain.strip_prefix(provider).is_some_and(|rest| rest.starts_with('.')),
            None => domain == known,
        })
    }
}

/// The rules for one kind of record.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordRules {
    /// Fields that every organization has.
    pub fields: BTreeMap<Field, Rule>,
    pub custom: BTreeMap<FieldRef, Rule>,
    /// The custom field that stores the id the record is found by. Without it, records are not looked up by id.
    pub key: Option<FieldRef>,
    /// Where that id comes from.
    pub id: Source,
    /// The custom field that stores the time of the last event applied to the record.
    pub synced_at: Option<FieldRef>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Which events are for Close.
    pub trigger: Trigger,
    pub anonymous: Anonymous,
    /// The id of a Lead is the company id.
    pub lead: RecordRules,
    /// The id of a Contact is the user id.
    pub contact: RecordRules,
    /// Lists of the Contact. People are also found by [`Channel::Email`].
    pub channels: BTreeMap<Channel, Rule>,
    /// Domains that a Lead is never named after.
    pub free_mail: FreeMail,
}

/// The ids in an event, whether or not Close has fields to look them up by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventIds {
    pub user_id: Option<String>,
    pub company_id: Option<String>,
    /// Trimmed and case-folded.
    pub email: Option<String>,
}

impl Rules {
    /// The ids in the event in a body. `None` if it is not an event.
    pub fn event_ids(&self, payload: Payload<'_>) -> Option<EventIds> {
        let body = payload.decode(TOOL_LIMIT).ok()?;
        let event = Event::decode(&*body, body.len()).ok()?;
        let found = |picked| match picked {
            Picked::Values(found) => Some(found),
            Picked::Nothing | Picked::Object => None,
        };
        let id = |source: &Source| found(source.pick(&event)).and_then(|found| coerce::id(&found).ok());
        let email = self.channels.get(&Channel::Email).and_then(|rule| found(rule.pick(&event).0));
        Some(EventIds {
            user_id: id(&self.contact.id),
            company_id: id(&self.lead.id),
            email: email.and_then(|found| coerce::email(&found).ok()).map(|email| fold_email(&email)),
        })
    }

    /// The same rules with the lookup fields named by id, so that they cannot change while the worker runs. A new field
    /// of the same name would hold no ids, and every record would be created again.
    #[must_use]
    pub fn pinned(&self, keys: &KeyFields) -> Self {
        let by_id = |id: &Option<FieldId>| id.as_ref().map(|id| FieldRef::new(id.as_str()));
        let mut rules = self.clone();
        (rules.lead.key, rules.contact.key) = (by_id(&keys.company), by_id(&keys.user));
        rules
    }

    /// Whether a rule fills a custom field of type user.
    pub fn wants_users(&self, schema: &Schema) -> bool {
        let wants = |rules: &RecordRules, fields: &[CustomField]| {
            rules.custom.keys().any(|rule| rule.find(fields).is_ok_and(|field| field.kind == FieldKind::User))
        };
        wants(&self.lead, &schema.lead) || wants(&self.contact, &schema.contact)
    }

    /// Whether the custom fields of Leads and of Contacts are needed.
    pub fn needs(&self) -> (bool, bool) {
        let needs = |rules: &RecordRules| {
            rules.key.is_some() || rules.synced_at.is_some() || !rules.custom.is_empty()
        };
        (needs(&self.lead), needs(&self.contact))
    }
}
