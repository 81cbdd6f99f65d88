//! The mapping rules as configured: where values come from and when they may be written.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use serde_json::{Map, json};

use crate::domain::dropped::{DropReason, excerpt};
use crate::domain::encoding::Payload;
use crate::domain::event::Event;
use crate::domain::mapping::coerce::{self, Unusable};
use crate::domain::mapping::desired::{KeyFields, WriteRule};
use crate::domain::mapping::jsonpath;
use crate::domain::mapping::placeholders::Placeholders;
use crate::domain::mapping::source::{Picked, Source};
use crate::domain::record::{Channel, Field, FieldId, fold_email};
use crate::domain::schema::{CustomField, FieldKind, FieldRef, Schema};
use crate::text::count;

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
        let found = self.source.pick(event);
        match &found {
            Picked::Nothing => (self.or_on_create.pick(event), WriteRule::OnCreate),
            Picked::Placeholder(_) => match self.or_on_create.pick(event) {
                Picked::Nothing => (found, self.write),
                other @ (Picked::Object | Picked::Placeholder(_) | Picked::Values(_)) => {
                    (other, WriteRule::OnCreate)
                }
            },
            Picked::Object | Picked::Values(_) => (found, self.write),
        }
    }

    /// The first email address among the alternatives, and what is wrong with the one before it. `user` is the user id,
    /// which many producers make an email address: by default it is the last alternative. A user id of another form is no
    /// invalid email address.
    pub(crate) fn email(
        &self,
        event: &Event,
        user: &Picked,
    ) -> (Option<(String, WriteRule)>, Option<Unusable>) {
        let from = self.source.alternatives(event).map(|picked| (picked, self.write));
        let on_create = self.or_on_create.alternatives(event).map(|picked| (picked, WriteRule::OnCreate));
        let mut unusable = None;
        for (n, (picked, write)) in from.chain(on_create).enumerate() {
            let wrong = match &picked {
                Picked::Nothing => continue,
                Picked::Object => (DropReason::NotAValue, None),
                Picked::Placeholder(word) => (DropReason::Placeholder, Some(word.clone())),
                Picked::Values(found) => match coerce::email(found) {
                    // A placeholder is absent, so it is not reported beside a value.
                    Ok(address) => {
                        let unusable = unusable.filter(|(reason, _)| *reason != DropReason::Placeholder);
                        return (Some((address, write)), unusable);
                    }
                    Err(reason) => (reason, found.first().map(excerpt)),
                },
            };
            let is_user_id = picked.first().is_some() && picked.first() == user.first();
            let is_reported = n == 0 || !(is_user_id || picked == Picked::Object);
            unusable = unusable.or_else(|| is_reported.then_some(wrong));
        }
        (None, unusable)
    }

    fn with_placeholders(&mut self, words: &Placeholders) {
        for source in [&mut self.source, &mut self.or_on_create] {
            *source = std::mem::take(source).with_placeholders(words.clone());
        }
    }

    /// The same rule for a field in Close that accepts these values.
    #[must_use]
    pub(crate) fn accepting(mut self, values: &[String]) -> Self {
        self.source = self.source.accepting(values);
        self.or_on_create = self.or_on_create.accepting(values);
        self
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
        jsonpath::condition(text).map(Self)
    }

    pub(crate) fn holds(&self, event: &Event) -> bool {
        let empty = event.body.as_object().is_some_and(Map::is_empty);
        // An empty event has no child for the filter to select, so an object with one empty member replaces it.
        let body = if empty { &json!({"": null}) } else { &event.body };
        !jsonpath::nodes(&self.0, body).is_empty()
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

/// The share of events that a trigger takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Share {
    pub events: usize,
    /// Events that the trigger takes.
    pub taken: usize,
    /// Bodies that are not events.
    #[serde(skip_serializing_if = "is_zero")]
    pub malformed: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Share {
    /// Whether there is something, and the trigger takes nothing.
    pub fn is_none(self) -> bool {
        self.events + self.malformed > 0 && self.taken == 0
    }
}

impl std::ops::AddAssign for Share {
    fn add_assign(&mut self, other: Self) {
        self.events += other.events;
        self.taken += other.taken;
        self.malformed += other.malformed;
    }
}

/// `takes 3 of 4 events`.
impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { events, taken, malformed } = self;
        write!(f, "takes {taken} of {}", count(*events as u64, "event", "events"))?;
        if *malformed > 0 { write!(f, "; {malformed} more cannot be decoded") } else { Ok(()) }
    }
}

impl Rules {
    /// The same rules with the words that are not an id, and those that are not a value.
    #[must_use]
    pub fn with_placeholders(mut self, ids: &Placeholders, values: &Placeholders) -> Self {
        for rules in [&mut self.lead, &mut self.contact] {
            rules.id = std::mem::take(&mut rules.id).with_placeholders(ids.clone());
            let fields = rules.fields.values_mut().chain(rules.custom.values_mut());
            fields.for_each(|rule| rule.with_placeholders(values));
        }
        self.channels.values_mut().for_each(|rule| rule.with_placeholders(values));
        self
    }

    /// The ids in the event in a body. `None` if it is not an event.
    pub fn event_ids(&self, payload: Payload<'_>) -> Option<EventIds> {
        let event = Event::read(payload).ok()?;
        let id = |picked: &Picked| match picked {
            Picked::Values(found) => coerce::id(found).ok(),
            Picked::Nothing | Picked::Object | Picked::Placeholder(_) => None,
        };
        let user = self.contact.id.pick(&event);
        let email = self.channels.get(&Channel::Email).and_then(|rule| rule.email(&event, &user).0);
        Some(EventIds {
            user_id: id(&user),
            company_id: id(&self.lead.id.pick(&event)),
            email: email.map(|(email, _)| fold_email(&email)),
        })
    }

    /// How many of these events the trigger takes.
    pub fn share(&self, bodies: &[Vec<u8>]) -> Share {
        let mut share = Share::default();
        for body in bodies {
            match Event::read(body) {
                Ok(event) => {
                    share.events += 1;
                    share.taken += usize::from(self.trigger.holds(&event));
                }
                Err(_) => share.malformed += 1,
            }
        }
        share
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
