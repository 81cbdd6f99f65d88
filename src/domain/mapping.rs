//! From an event to the records we want: which value goes where, and who the event is about.
//!
//! The rules come from the configuration and are checked once, at start; applying them to an event
//! cannot fail except for want of an identity. A value that cannot be used (an object where text is
//! needed, an address that is none) is left out and reported in [`Desired::dropped`]: one bad
//! optional value must not cost the rest of the event.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use jsonpath_rust::parser::parse_json_path;
use jsonpath_rust::query::{QueryRef, js_path_process};
use serde_json::Value;

use super::event::Event;
use super::record::{Channel, Field, FieldId, fold_email};

/// Longest name and title Close takes, in characters (close-api.md §5).
const MAX_TEXT: usize = 1000;
/// Longest email address Close takes, in characters (close-api.md §3).
const MAX_EMAIL: usize = 254;

/// Where a value comes from: the first alternative that yields one wins.
#[derive(Clone, Debug, PartialEq)]
pub struct Source(Vec<Vec<JpQuery>>);

impl Source {
    /// Builds a source from alternatives. An alternative is one JSONPath (RFC 9535), or several
    /// whose texts are joined with a blank.
    ///
    /// # Errors
    /// The path that does not parse, with the parser's reason.
    pub fn new<'a>(alternatives: impl IntoIterator<Item = Vec<&'a str>>) -> Result<Self, String> {
        let parse = |path: &str| {
            parse_json_path(path).map_err(|_| format!("`{path}` is no JSONPath (try `$.traits.title`)"))
        };
        alternatives
            .into_iter()
            .map(|paths| paths.into_iter().map(parse).collect::<Result<Vec<_>, _>>())
            .collect::<Result<Vec<_>, _>>()
            .map(Self)
    }

    /// The value for this event. Null and blank text count as absent.
    fn pick(&self, event: &Event) -> Option<Value> {
        self.0.iter().find_map(|paths| match paths.as_slice() {
            [path] => first(path, event).cloned(),
            parts => {
                let texts: Vec<_> = parts.iter().filter_map(|part| text(first(part, event)?)).collect();
                (!texts.is_empty()).then(|| Value::String(texts.join(" ")))
            }
        })
    }
}

fn first<'a>(path: &JpQuery, event: &'a Event) -> Option<&'a Value> {
    let found = js_path_process(path, &event.body).ok()?;
    found.into_iter().map(QueryRef::val).find(|value| match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => true,
    })
}

/// A value as trimmed text; lists and objects have none.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

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
}

/// The whole mapping.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// Fields of the Lead.
    pub lead: BTreeMap<Field, Rule>,
    /// Fields of the Contact.
    pub contact: BTreeMap<Field, Rule>,
    /// Lists of the Contact. [`Channel::Email`] is also how people are found.
    pub channels: BTreeMap<Channel, Rule>,
    /// Where the company id comes from.
    pub company_id: Source,
    /// Where the user id comes from.
    pub user_id: Source,
    /// Where Close keeps the two ids.
    pub keys: KeyFields,
}

/// The custom fields, both of type text, in which Close keeps the ids records are found by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFields {
    /// The Lead field with the company id. Without it, Leads are never looked up by company.
    pub company: Option<FieldId>,
    /// The Contact field with the user id. Without it, people are matched by email only.
    pub user: Option<FieldId>,
}

/// Who an event is about. At least one of user id and email is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The company, when there is a field to find it by.
    pub company_id: Option<String>,
    /// The person, when there is a field to find it by.
    pub user_id: Option<String>,
    /// The person's email, trimmed and case-folded.
    pub email: Option<String>,
}

/// What a record is found by. Messages that share a key must not be worked on at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// A company id.
    Company(String),
    /// A user id.
    User(String),
    /// An email, trimmed and case-folded.
    Email(String),
}

impl Identity {
    /// The keys of the person: user id first, as it decides before the email.
    pub fn person(&self) -> impl Iterator<Item = Key> {
        let user = self.user_id.clone().map(Key::User);
        user.into_iter().chain(self.email.clone().map(Key::Email))
    }

    /// All keys.
    pub fn keys(&self) -> Vec<Key> {
        self.company_id.clone().map(Key::Company).into_iter().chain(self.person()).collect()
    }
}

/// A value with the rule that guards it.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// What to write. Text for the fixed fields and for channels.
    pub value: Value,
    /// When.
    pub write: WriteRule,
}

/// What the event says the records should hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// Whom it is about.
    pub identity: Identity,
    /// Values for the Lead, the company id among them.
    pub lead: BTreeMap<Field, Wanted>,
    /// Values for the Contact, the user id among them.
    pub contact: BTreeMap<Field, Wanted>,
    /// Entries the Contact's lists should have.
    pub channels: BTreeMap<Channel, Wanted>,
    /// Mapped values that could not be used.
    pub dropped: Vec<Dropped>,
}

/// A mapped value that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The field of Close it was meant for, `custom.cf_…`.
    pub field: String,
    /// Why.
    pub reason: DropReason,
}

/// Why a value was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// A list or object where one value is needed.
    NotAValue,
    /// No email address.
    InvalidEmail,
    /// A phone without a digit.
    InvalidPhone,
    /// Nothing a URL can be made of.
    InvalidUrl,
    /// Close refused it.
    Refused,
}

impl DropReason {
    /// All reasons, for metrics.
    pub const ALL: [Self; 5] =
        [Self::NotAValue, Self::InvalidEmail, Self::InvalidPhone, Self::InvalidUrl, Self::Refused];

    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotAValue => "not_a_value",
            Self::InvalidEmail => "invalid_email",
            Self::InvalidPhone => "invalid_phone",
            Self::InvalidUrl => "invalid_url",
            Self::Refused => "refused_by_close",
        }
    }
}

/// The event names nobody: no user id with a field to store it, and no usable email.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event has neither a user id that can be looked up nor a usable email")]
pub struct NoIdentity;

impl Mapping {
    /// What the event wants of Close.
    pub fn apply(&self, event: &Event) -> Result<Desired, NoIdentity> {
        let mut desired = Desired::default();
        for (field, rule) in &self.lead {
            take(&mut desired.lead, &mut desired.dropped, field, rule, event);
        }
        for (field, rule) in &self.contact {
            take(&mut desired.contact, &mut desired.dropped, field, rule, event);
        }
        for (&channel, rule) in &self.channels {
            let Some(value) = rule.source.pick(event) else { continue };
            match channel_value(channel, &value) {
                Ok(text) => {
                    desired.channels.insert(channel, Wanted { value: text.into(), write: rule.write });
                }
                Err(reason) => desired.dropped.push(Dropped { field: channel.to_string(), reason }),
            }
        }

        desired.identity = Identity {
            company_id: key(&self.company_id, self.keys.company.as_ref(), event, &mut desired.lead),
            user_id: key(&self.user_id, self.keys.user.as_ref(), event, &mut desired.contact),
            email: desired
                .channels
                .get(&Channel::Email)
                .and_then(|wanted| wanted.value.as_str())
                .map(fold_email),
        };
        if desired.identity.user_id.is_none() && desired.identity.email.is_none() {
            return Err(NoIdentity);
        }
        name_new_leads(&mut desired);
        Ok(desired)
    }
}

/// Maps one field, or notes why it cannot be.
fn take(
    wanted: &mut BTreeMap<Field, Wanted>,
    dropped: &mut Vec<Dropped>,
    field: &Field,
    rule: &Rule,
    event: &Event,
) {
    let Some(value) = rule.source.pick(event) else { return };
    let value = match field {
        Field::Custom(_) => custom_value(value),
        Field::Name | Field::Description | Field::Status | Field::Title => {
            text(&value).map(|text| Value::String(text.chars().take(MAX_TEXT).collect()))
        }
    };
    match value {
        Some(value) => {
            wanted.insert(field.clone(), Wanted { value, write: rule.write });
        }
        None => dropped.push(Dropped { field: field.to_string(), reason: DropReason::NotAValue }),
    }
}

/// Custom fields take any JSON but objects (close-api.md §5).
fn custom_value(value: Value) -> Option<Value> {
    match value {
        Value::String(text) => Some(Value::String(text.trim().to_owned())),
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => None,
        Value::Object(_) | Value::Null => None,
        Value::Bool(_) | Value::Number(_) | Value::Array(_) => Some(value),
    }
}

/// An address, number or page as it is sent.
fn channel_value(channel: Channel, value: &Value) -> Result<String, DropReason> {
    let value = text(value).ok_or(DropReason::NotAValue)?;
    match channel {
        Channel::Email => {
            let plausible = value.chars().count() <= MAX_EMAIL && is_address(&value);
            plausible.then_some(value).ok_or(DropReason::InvalidEmail)
        }
        Channel::Phone => {
            value.contains(|c: char| c.is_ascii_digit()).then_some(value).ok_or(DropReason::InvalidPhone)
        }
        // Close would add the scheme itself, but its schema asks for a URI (close-api.md §5).
        Channel::Url => {
            let whole = if value.contains("://") { value } else { format!("http://{value}") };
            match url::Url::parse(&whole) {
                Ok(url) if url.has_host() => Ok(whole),
                Ok(_) | Err(_) => Err(DropReason::InvalidUrl),
            }
        }
    }
}

/// An address alone, as Close takes it: without a name in front.
fn is_address(text: &str) -> bool {
    let options = email_address::Options::default().without_display_text().without_domain_literal();
    email_address::EmailAddress::parse_with_options(text, options).is_ok()
}

/// An id the record is found by, which is also stored on it. Always text: a text field refuses
/// numbers (close-api.md §7).
fn key(
    source: &Source,
    field: Option<&FieldId>,
    event: &Event,
    wanted: &mut BTreeMap<Field, Wanted>,
) -> Option<String> {
    let field = field?;
    let id = text(&source.pick(event)?)?;
    let value = Value::String(id.clone());
    wanted.insert(Field::Custom(field.clone()), Wanted { value, write: WriteRule::Always });
    Some(id)
}

/// A Lead made for an event without a company name is called after the person, else the email, so
/// that nobody finds a list of Leads called "Untitled". An existing Lead is never renamed to that.
fn name_new_leads(desired: &mut Desired) {
    if desired.lead.contains_key(&Field::Name) {
        return;
    }
    let person = desired.contact.get(&Field::Name).or(desired.channels.get(&Channel::Email));
    if let Some(person) = person {
        let name = Wanted { value: person.value.clone(), write: WriteRule::OnCreate };
        desired.lead.insert(Field::Name, name);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn rule(paths: &[&[&str]]) -> Rule {
        Rule {
            source: Source::new(paths.iter().map(|path| path.to_vec())).unwrap(),
            write: WriteRule::Always,
        }
    }

    /// The default mapping, with a company field and a user field.
    pub(crate) fn mapping() -> Mapping {
        let plan = Field::Custom(FieldId::new("cf_plan"));
        Mapping {
            lead: [(Field::Name, rule(&[&["$.traits.company.name"]])), (plan, rule(&[&["$.traits.plan"]]))]
                .into(),
            contact: [
                (Field::Name, rule(&[&["$.traits.name"], &["$.traits.firstName", "$.traits.lastName"]])),
                (Field::Title, rule(&[&["$.traits.title"]])),
            ]
            .into(),
            channels: [
                (Channel::Email, rule(&[&["$.traits.email"]])),
                (Channel::Phone, rule(&[&["$.traits.phone"]])),
                (Channel::Url, rule(&[&["$.traits.website"]])),
            ]
            .into(),
            company_id: rule(&[&["$.traits.company.id"]]).source,
            user_id: rule(&[&["$.userId"]]).source,
            keys: KeyFields {
                company: Some(FieldId::new("cf_company")),
                user: Some(FieldId::new("cf_user")),
            },
        }
    }

    pub(crate) fn desired(event: Value) -> Desired {
        mapping().apply(&Event { body: event }).unwrap()
    }

    fn lead_name(event: Value) -> Wanted {
        desired(event).lead[&Field::Name].clone()
    }

    #[test]
    fn names_have_fallbacks() {
        let person = |traits: Value| {
            desired(json!({"userId": "u", "traits": traits}))
                .contact
                .get(&Field::Name)
                .map(|name| name.value.clone())
        };
        assert_eq!(person(json!({"name": " Jane Doe ", "firstName": "X"})), Some(json!("Jane Doe")));
        assert_eq!(
            person(json!({"name": "", "firstName": "Jane", "lastName": "Doe"})),
            Some(json!("Jane Doe"))
        );
        assert_eq!(person(json!({"lastName": "Doe"})), Some(json!("Doe")));
        assert_eq!(person(json!({"name": {"first": "Jane"}})), None);

        let company =
            lead_name(json!({"userId": "u", "traits": {"name": "Jane", "company": {"name": "Acme"}}}));
        assert_eq!((company.value, company.write), (json!("Acme"), WriteRule::Always));
        let jane = lead_name(json!({"userId": "u", "traits": {"name": "Jane", "email": "j@example.test"}}));
        assert_eq!((jane.value, jane.write), (json!("Jane"), WriteRule::OnCreate));
        let email = lead_name(json!({"userId": "u", "traits": {"email": "j@example.test"}}));
        assert_eq!(email.value, json!("j@example.test"));
    }

    #[test]
    fn an_event_must_name_someone() {
        let identity = |event: Value| mapping().apply(&Event { body: event }).map(|desired| desired.identity);
        let known = |company: Option<&str>, user: Option<&str>, email: Option<&str>| {
            Ok(Identity {
                company_id: company.map(Into::into),
                user_id: user.map(Into::into),
                email: email.map(Into::into),
            })
        };
        let cases = [
            (json!({"userId": 42}), known(None, Some("42"), None)),
            (json!({"userId": " u "}), known(None, Some("u"), None)),
            (
                json!({"traits": {"email": " Jane@Example.TEST "}}),
                known(None, None, Some("jane@example.test")),
            ),
            (json!({"userId": "u", "traits": {"company": {"id": 7}}}), known(Some("7"), Some("u"), None)),
            (json!({"userId": "u", "traits": {"company": "Acme"}}), known(None, Some("u"), None)),
            (json!({"userId": "", "traits": {"email": "nobody"}}), Err(NoIdentity)),
            (json!({"anonymousId": "a", "traits": {"company": {"id": "c"}}}), Err(NoIdentity)),
        ];
        for (event, expected) in cases {
            assert_eq!(identity(event.clone()), expected, "{event}");
        }
        let mut without_field = mapping();
        without_field.keys.user = None;
        assert_eq!(without_field.apply(&Event { body: json!({"userId": "u"}) }), Err(NoIdentity));
    }

    #[test]
    fn a_bad_value_does_not_cost_the_rest() {
        let desired = desired(json!({"userId": "u", "traits": {
            "email": "Jane <jane@example.test>", "phone": "n/a", "website": "http://", "title": ["CEO"], "plan": {"a": 1},
            "name": "Jane",
        }}));
        let dropped: Vec<_> =
            desired.dropped.iter().map(|dropped| (dropped.field.as_str(), dropped.reason.label())).collect();
        assert_eq!(
            dropped,
            [
                ("custom.cf_plan", "not_a_value"),
                ("title", "not_a_value"),
                ("emails", "invalid_email"),
                ("phones", "invalid_phone"),
                ("urls", "invalid_url"),
            ]
        );
        assert_eq!(desired.contact[&Field::Name].value, json!("Jane"));
    }

    #[test]
    fn ids_are_stored_as_text_and_long_names_are_cut() {
        let desired =
            desired(json!({"userId": 5, "traits": {"name": "é".repeat(2000), "company": {"id": 9}}}));
        assert_eq!(desired.contact[&Field::Custom(FieldId::new("cf_user"))].value, json!("5"));
        assert_eq!(desired.lead[&Field::Custom(FieldId::new("cf_company"))].value, json!("9"));
        assert_eq!(desired.contact[&Field::Name].value, json!("é".repeat(MAX_TEXT)));
    }

    /// Any JSON of little depth.
    fn some_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            "[a-z]{1,5}@[a-z]{1,5}\\.test".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::btree_map("[a-z]{1,4}|id|name", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Whatever producers send, what we want of Close has the shape Close asks for.
        #[test]
        fn any_event_maps_to_values_close_can_take(
            user in some_json(), email in some_json(), phone in some_json(), website in some_json(),
            name in some_json(), company in some_json(), plan in some_json(),
        ) {
            let event = json!({"userId": user, "traits": {
                "email": email, "phone": phone, "website": website, "name": name, "title": name,
                "company": company, "plan": plan,
            }});
            let Ok(desired) = mapping().apply(&Event { body: event }) else { return Ok(()) };
            prop_assert!(desired.identity.user_id.is_some() || desired.identity.email.is_some());
            for (field, wanted) in desired.lead.iter().chain(&desired.contact) {
                let text = wanted.value.as_str();
                let fits = if field.to_string() == "custom.cf_plan" {
                    !wanted.value.is_object() && !wanted.value.is_null()
                } else {
                    text.is_some_and(|text| !text.is_empty() && text.chars().count() <= MAX_TEXT)
                };
                prop_assert!(fits, "{field}: {wanted:?}");
            }
            for (channel, wanted) in &desired.channels {
                prop_assert!(wanted.value.as_str().is_some_and(|text| !text.is_empty()), "{channel}: {wanted:?}");
            }
        }
    }

    #[test]
    fn a_wrong_path_is_named() {
        let error = Source::new([vec!["$.traits["]]).unwrap_err();
        assert_eq!(error, "`$.traits[` is no JSONPath (try `$.traits.title`)");
    }
}
