//! What the configuration says: where values come from, and when they may be written.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use serde_json::{Map, json};

use crate::domain::event::Event;
use crate::domain::mapping::coerce;
use crate::domain::mapping::source::{self, Picked, Source};
use crate::domain::record::{Channel, Field, fold_email};
use crate::domain::schema::FieldRef;

/// When a wanted value may be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteRule {
    /// Whenever it differs.
    #[default]
    Always,
    /// Only where Close has nothing yet.
    IfEmpty,
    /// Only into a record that this event creates.
    OnCreate,
}

/// How one field is filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Where the value comes from.
    pub source: Source,
    /// When it may be written.
    pub write: WriteRule,
    /// Where else it comes from for a record that has to be made: better than nothing, and no reason to
    /// change what a record has.
    pub or_on_create: Source,
}

impl Rule {
    /// What it finds in an event, and when that may be written.
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
    /// What is wrong with it, in words for the person who wrote it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if speaks_of_parts(text) {
            return Err(format!("`{text}` speaks of a part of the event: write `$` for the event, not `@`"));
        }
        // A filter needs something to filter: it selects every part of an event for which it holds, so
        // all of them or none when it speaks of the event as a whole.
        source::path(&format!("$[?{text}]"))
            .map(Self)
            .map_err(|_| format!("`{text}` is no condition (try `$.type == 'identify' && $.traits.email`)"))
    }

    pub(crate) fn holds(&self, event: &Event) -> bool {
        let empty = event.body.as_object().is_some_and(Map::is_empty);
        // An empty event has no part for the filter to select; this one says as little.
        let body = if empty { &json!({"": null}) } else { &event.body };
        !source::nodes(&self.0, body).is_empty()
    }
}

/// Whether a condition says `@` outside of the brackets of a filter within it, where `@` is a part of the
/// event and not the event: `@.type == 'identify'` is easily written and never holds.
fn speaks_of_parts(condition: &str) -> bool {
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

/// What becomes of an event that names nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Anonymous {
    /// It is dead-lettered.
    #[default]
    DeadLetter,
    /// It is skipped and counted.
    Skip,
}

/// Domains that say nothing about a company, `gmail.com` or `yahoo.*`.
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

/// What the configuration says about one kind of record.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordRules {
    /// The fields every organization has.
    pub fields: BTreeMap<Field, Rule>,
    /// Custom fields.
    pub custom: BTreeMap<FieldRef, Rule>,
    /// The custom field that stores the id the record is found by. Without it, it is not found by id.
    pub key: Option<FieldRef>,
    /// Where that id comes from.
    pub id: Source,
    /// The custom field that stores when the last event was that was applied to the record.
    pub stamp: Option<FieldRef>,
}

/// Whom an event is about, whether or not Close is asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whom {
    /// The person's id.
    pub user_id: Option<String>,
    /// The company's id.
    pub company_id: Option<String>,
    /// The person's email, folded for comparison.
    pub email: Option<String>,
}

impl Rules {
    /// Whom the event in `body` is about; `None` if it is none.
    pub fn whom(&self, body: &[u8]) -> Option<Whom> {
        let event = Event::decode(body, usize::MAX).ok()?;
        let found = |picked| match picked {
            Picked::Values(found) => Some(found),
            Picked::Nothing | Picked::Object => None,
        };
        let id = |source: &Source| found(source.pick(&event)).and_then(|found| coerce::id(&found).ok());
        let email = self.channels.get(&Channel::Email).and_then(|rule| found(rule.pick(&event).0));
        Some(Whom {
            user_id: id(&self.contact.id),
            company_id: id(&self.lead.id),
            email: email.and_then(|found| coerce::email(&found).ok()).map(|email| fold_email(&email)),
        })
    }
}

/// What the configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Which events are for Close.
    pub trigger: Trigger,
    /// What becomes of those that name nobody.
    pub anonymous: Anonymous,
    /// Leads; their id is the company id.
    pub lead: RecordRules,
    /// Contacts; their id is the user id.
    pub contact: RecordRules,
    /// Lists of the Contact. [`Channel::Email`] is also how people are found.
    pub channels: BTreeMap<Channel, Rule>,
    /// Domains no Lead is called after.
    pub free_mail: FreeMail,
}
