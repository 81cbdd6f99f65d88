//! From an event to the records we want: which value goes where, and who the event is about.
//!
//! [`Rules`] are what the configuration says. Custom fields are named in them by id or by name, and what
//! a field takes depends on its type, so they are resolved against the organization's [`crate::domain::schema::Schema`] to a
//! [`Mapping`] before the first event, and again whenever the schema may have changed. Applying a
//! mapping to an event cannot fail except for want of an identity. A value that cannot be used is left
//! out and reported in [`Desired::dropped`]: one bad optional value must not cost the rest.
//!
//! **Identity.** Ids are compared exactly, after outer blanks; a number is its digits. Emails are
//! compared without outer blanks and case; a plus tag makes another address. A company is found by its
//! id alone, so a `company` that is plain text is a name and no more. An event without user id and
//! email is anonymous: a dead letter, or skipped, as configured. An event whose only identity is an
//! email that is none, or a user id that is a list, is always a dead letter: its producer has a defect.
//! So has one whose company id cannot be used; what it says about the company then goes into new Leads
//! only, as there is no telling whose name that would be.
//!
//! **A field that Close does not have** costs its values, reported as `unknown_field`, and not the
//! sync: someone may delete a field while we run. Only the lookup fields are beyond sparing.
//!
//! **A Lead made for an event without a company name** is called after the person, else after the
//! domain of the email unless that is a free-mail provider's, else after the email, so that nobody
//! finds a list of Leads called "Untitled". An existing Lead is never renamed to that.

pub mod coerce;
mod desired;
mod resolve;
mod rules;
pub mod source;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::domain::dropped::{DropReason, Dropped};
use crate::domain::event::{Event, NotForClose};
use crate::domain::mapping::coerce::Unfit;
use crate::domain::mapping::source::{Picked, Source};
use crate::domain::record::{Channel, Field, FieldId, fold_email};
use crate::domain::schema::{CustomField, FieldKind, Status, User};
use crate::domain::staleness::SyncedAtFields;
use resolve::{CONTACT, LEAD};

pub use desired::{Desired, Identity, Key, KeyFields, NoIdentity, Wanted};
pub use resolve::{BadKey, Misfit, NoField, Unknown};
pub use rules::{Anonymous, FreeMail, RecordRules, Rule, Rules, Trigger, Whom, WriteRule};

/// What an unusable id is reported as.
const COMPANY_ID: &str = "company_id";
const USER_ID: &str = "user_id";

/// The rules, with every field known.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    rules: Rules,
    lead: Vec<Target>,
    contact: Vec<Target>,
    users: Vec<User>,
    names: BTreeMap<FieldId, String>,
    /// Where Close keeps the two ids.
    pub keys: KeyFields,
    /// Where Close keeps the time of the last event.
    pub stamps: SyncedAtFields,
    /// Rules whose field is not there.
    pub unknown: Vec<Unknown>,
}

/// A field with its rule.
#[derive(Clone, Debug, PartialEq)]
struct Target {
    field: Field,
    takes: Takes,
    rule: Rule,
}

/// What a field takes.
#[derive(Clone, Debug, PartialEq)]
enum Takes {
    Line,
    Text,
    Status(Vec<Status>),
    Custom(CustomField),
    /// Close does not have the field.
    Nothing,
}

impl Mapping {
    /// Whether the event is for Close: what the trigger and its own `integrations` say.
    pub fn not_for_close(&self, event: &Event) -> Option<NotForClose> {
        if !self.rules.trigger.holds(event) {
            return Some(NotForClose::Trigger);
        }
        event.excludes_close().then_some(NotForClose::Integrations)
    }

    /// The custom fields that are filled by a rule, with the key of the rule.
    pub fn custom(&self) -> impl Iterator<Item = (String, CustomField)> {
        let of = |targets: &[Target], table: &'static str| {
            let custom = targets.iter().filter_map(|target| match &target.takes {
                Takes::Custom(field) => Some(field.clone()),
                Takes::Line | Takes::Text | Takes::Status(_) | Takes::Nothing => None,
            });
            custom.map(|field| (format!("{table}.{}", field.id), field)).collect::<Vec<_>>()
        };
        of(&self.lead, LEAD.table).into_iter().chain(of(&self.contact, CONTACT.table))
    }

    /// Constants of the rules that their fields do not take: every event would lose them.
    pub fn misfits(&self) -> Vec<Misfit> {
        let of = |targets: &[Target], table: &str| {
            let mut misfits = Vec::new();
            for Target { field, takes, rule } in targets {
                let constants = rule.source.constants().chain(rule.or_on_create.constants());
                for value in constants {
                    let (_, Some((reason, _))) = self.read(takes, std::slice::from_ref(value)) else {
                        continue;
                    };
                    let key = field.to_string().replacen("custom.", "", 1);
                    let table = if matches!(field, Field::Custom(_)) {
                        format!("{table}.custom")
                    } else {
                        table.into()
                    };
                    let setting = format!("{table}.{key}");
                    misfits.push(Misfit {
                        setting,
                        value: value.clone(),
                        reason,
                        choices: takes.choices(&self.users),
                    });
                }
            }
            misfits
        };
        // A field that is not there is told of already.
        let mut misfits = of(&self.lead, "mapping.lead");
        misfits.extend(of(&self.contact, "mapping.contact"));
        misfits.retain(|misfit| misfit.reason != DropReason::UnknownField);
        misfits
    }

    /// What a field takes, given the key Close has for it, if that can be listed.
    pub fn choices(&self, key: &str) -> Vec<String> {
        let targets = self.lead.iter().chain(&self.contact);
        let mut targets = targets.filter(|target| target.field.to_string() == key);
        targets.next().map(|target| target.takes.choices(&self.users)).unwrap_or_default()
    }

    /// What becomes of events that name nobody.
    pub fn anonymous(&self) -> Anonymous {
        self.rules.anonymous
    }

    /// What people call a field, given the key Close has for it: a custom field's name.
    pub fn label(&self, key: &str) -> String {
        let name = key.strip_prefix("custom.").and_then(|id| self.names.get(&FieldId::new(id)));
        match key {
            "status_id" => "status".to_owned(),
            _ => name.cloned().unwrap_or_else(|| key.to_owned()),
        }
    }

    /// A value as people read it, in JSON: statuses and users by name.
    pub fn shown(&self, key: &str, value: &Value) -> Value {
        let targets = self.lead.iter().chain(&self.contact);
        let takes =
            targets.filter(|target| target.field.to_string() == key).map(|target| &target.takes).next();
        let name = |id: &str| match takes? {
            Takes::Status(statuses) => {
                statuses.iter().find(|status| status.id == id).map(|status| &status.label)
            }
            Takes::Custom(CustomField { kind: FieldKind::User, .. }) => {
                self.users.iter().find(|user| user.id == id).map(|user| &user.name)
            }
            Takes::Custom(_) | Takes::Line | Takes::Text | Takes::Nothing => None,
        };
        match value {
            Value::String(id) => name(id).map_or_else(|| value.clone(), |name| name.as_str().into()),
            Value::Array(items) => items.iter().map(|item| self.shown(key, item)).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.clone(),
        }
    }

    /// What the event wants of Close.
    pub fn apply(&self, event: &Event) -> Result<Desired, NoIdentity> {
        let Rules { lead, contact, channels, .. } = &self.rules;
        let mut desired = Desired { stamps: self.stamps.clone(), ..Desired::default() };
        for target in &self.lead {
            let wanted = self.take(target, event, &mut desired.dropped);
            desired.lead.extend(wanted.map(|wanted| (target.field.clone(), wanted)));
        }
        for target in &self.contact {
            let wanted = self.take(target, event, &mut desired.dropped);
            desired.contact.extend(wanted.map(|wanted| (target.field.clone(), wanted)));
        }
        for (&channel, rule) in channels {
            let read = match channel {
                Channel::Email => coerce::email,
                Channel::Phone => coerce::phone,
                Channel::Url => coerce::url,
            };
            let (found, write) = rule.pick(event);
            if let Some(text) = usable(found, channel.list(), read, &mut desired.dropped) {
                desired.channels.insert(channel, Wanted { value: text.into(), write });
            }
        }

        let email = desired.channels.get(&Channel::Email).and_then(|wanted| wanted.value.as_str());
        let email = email.map(fold_email);
        let mut id =
            |source: &Source, name| usable(source.pick(event), name, coerce::id, &mut desired.dropped);
        let (company_id, user_id) = (id(&lead.id, COMPANY_ID), id(&contact.id, USER_ID));
        let lost = |name: &str| desired.dropped.iter().any(|dropped| dropped.field == name);
        let (lost_company_id, lost_user_id, lost_email) =
            (lost(COMPANY_ID), lost(USER_ID), lost(Channel::Email.list()));
        if lost_company_id && self.keys.company.is_some() {
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
                () if lost_user_id => NoIdentity::BadUserId,
                () if lost_email => NoIdentity::BadEmail,
                () => NoIdentity::Anonymous,
            });
        }
        name_new_leads(&mut desired, &self.rules.free_mail);
        Ok(desired)
    }

    fn take(&self, target: &Target, event: &Event, dropped: &mut Vec<Dropped>) -> Option<Wanted> {
        let (found, write) = target.rule.pick(event);
        let (value, unfit) = match found {
            Picked::Nothing => return None,
            Picked::Object => (None, Some((DropReason::NotAValue, None))),
            Picked::Values(found) => self.read(&target.takes, &found),
        };
        dropped.extend(unfit.map(|unfit| left_out(&target.field.to_string(), unfit)));
        Some(Wanted { value: value?, write })
    }

    /// What a field takes of values; of a list, perhaps a part.
    fn read(&self, takes: &Takes, found: &[Value]) -> (Option<Value>, Option<Unfit>) {
        let whole = match takes {
            Takes::Line => coerce::line(found),
            Takes::Text => coerce::long_text(found),
            Takes::Status(statuses) => coerce::status(found, statuses),
            Takes::Nothing => Err(DropReason::UnknownField),
            Takes::Custom(field) => return coerce::custom(found, field, &self.users),
        };
        match whole {
            Ok(value) => (Some(value), None),
            Err(reason) => (None, Some((reason, found.first().cloned()))),
        }
    }
}

impl Takes {
    /// All it takes, if that can be listed.
    fn choices(&self, users: &[User]) -> Vec<String> {
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

/// What can be used of what was found, noting what cannot. `None` also when the event says nothing.
fn usable<T>(
    found: Picked,
    field: &str,
    read: impl FnOnce(&[Value]) -> Result<T, DropReason>,
    dropped: &mut Vec<Dropped>,
) -> Option<T> {
    let unfit = match found {
        Picked::Nothing => return None,
        Picked::Object => (DropReason::NotAValue, None),
        Picked::Values(found) => match read(&found) {
            Ok(value) => return Some(value),
            Err(reason) => (reason, found.into_iter().next()),
        },
    };
    dropped.push(left_out(field, unfit));
    None
}

fn left_out(field: &str, (reason, value): Unfit) -> Dropped {
    Dropped { field: field.to_owned(), reason, value }
}

/// An id the record is found by is also stored on it. Always text: a text field refuses numbers
/// (close-api.md §7).
fn store(field: &FieldId, id: Option<String>, wanted: &mut BTreeMap<Field, Wanted>) -> Option<String> {
    let id = id?;
    let value = Value::String(id.clone());
    wanted.insert(Field::Custom(field.clone()), Wanted { value, write: WriteRule::Always });
    Some(id)
}

/// Gives a Lead that may have to be made a name.
fn name_new_leads(desired: &mut Desired, free_mail: &FreeMail) {
    if desired.lead.contains_key(&Field::Name) {
        return;
    }
    let person = desired.contact.get(&Field::Name).map(|wanted| wanted.value.clone());
    let email = desired.channels.get(&Channel::Email).map(|wanted| wanted.value.clone());
    let domain = email.as_ref().and_then(Value::as_str).and_then(source::domain);
    let domain = domain.filter(|domain| !free_mail.has(domain)).map(Value::String);
    if let Some(value) = person.or(domain).or(email) {
        desired.lead.insert(Field::Name, Wanted { value, write: WriteRule::OnCreate });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use serde_json::json;

    use super::*;
    use crate::domain::mapping::source::Alternative;
    use crate::domain::schema::{FieldRef, Schema};

    fn rule(paths: &[&str]) -> Rule {
        Rule { source: source(paths), write: WriteRule::Always, or_on_create: Source::default() }
    }

    fn source(paths: &[&str]) -> Source {
        Source::new(paths.iter().map(|path| Alternative::parse(path).unwrap()))
    }

    /// The default rules, with a field for the plan.
    pub(crate) fn rules() -> Rules {
        Rules {
            trigger: Trigger::parse("$.type == 'identify' || (!$.type && !$.event)").unwrap(),
            anonymous: Anonymous::default(),
            lead: RecordRules {
                fields: [(Field::Name, rule(&["$.traits.company.name", "$.traits.company"]))].into(),
                custom: [(FieldRef::new("Plan"), rule(&["$.traits.plan"]))].into(),
                key: Some(FieldRef::new("cf_company")),
                id: source(&["$.traits.company.id"]),
                stamp: None,
            },
            contact: RecordRules {
                fields: [
                    (
                        Field::Name,
                        rule(&[
                            "$.traits.name",
                            "{$.traits.firstName} {$.traits.lastName}",
                            "$.traits.lastName",
                        ]),
                    ),
                    (Field::Title, rule(&["$.traits.title"])),
                ]
                .into(),
                custom: BTreeMap::new(),
                key: Some(FieldRef::new("cf_user")),
                id: source(&["$.userId"]),
                stamp: None,
            },
            channels: [
                (Channel::Email, rule(&["$.traits.email"])),
                (Channel::Phone, rule(&["$.traits.phone"])),
                (Channel::Url, rule(&["$.traits.website"])),
            ]
            .into(),
            free_mail: FreeMail(vec!["gmail.com".into(), "yahoo.*".into()]),
        }
    }

    fn field(id: &str, name: &str, kind: FieldKind) -> CustomField {
        CustomField { id: FieldId::new(id), name: name.into(), kind, multiple: false }
    }

    pub(crate) fn schema() -> Schema {
        Schema {
            lead: vec![
                field("cf_company", "Company ID", FieldKind::Text),
                field("cf_plan", "Plan", FieldKind::Text),
                field("cf_seats", "Seats", FieldKind::Number),
                field("cf_lead_at", "Synced at", FieldKind::Datetime),
            ],
            contact: vec![
                field("cf_user", "User ID", FieldKind::Text),
                field("cf_contact_at", "Synced at", FieldKind::Datetime),
            ],
            ..Schema::default()
        }
    }

    pub(crate) fn mapping() -> Mapping {
        Mapping::resolve(&rules(), &schema()).unwrap()
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
        for (email, name) in [
            ("j@Acme.test", "acme.test"),
            ("j@gmail.com", "j@gmail.com"),
            ("j@yahoo.co.uk", "j@yahoo.co.uk"),
            ("j@yahoo-shop.test", "yahoo-shop.test"),
        ] {
            let lead = lead_name(json!({"userId": "u", "traits": {"email": email}}));
            assert_eq!((lead.value, lead.write), (json!(name), WriteRule::OnCreate));
        }
        let text = lead_name(json!({"userId": "u", "traits": {"company": " Acme "}}));
        assert_eq!((text.value, text.write), (json!("Acme"), WriteRule::Always));
        assert!(desired(json!({"userId": "u", "traits": {"company": {"id": 1}}})).dropped.is_empty());
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
            (json!({"userId": "u", "traits": {"company": {"id": 7.0}}}), known(Some("7"), Some("u"), None)),
            (json!({"userId": "", "traits": {"email": "nobody"}}), Err(NoIdentity::BadEmail)),
            (json!({"anonymousId": "a", "traits": {"company": {"id": "c"}}}), Err(NoIdentity::Anonymous)),
        ];
        for (event, expected) in cases {
            assert_eq!(identity(event.clone()), expected, "{event}");
        }
        let mut without_field = rules();
        without_field.contact.key = None;
        let mapping = Mapping::resolve(&without_field, &schema()).unwrap();
        assert_eq!(mapping.apply(&Event { body: json!({"userId": "u"}) }), Err(NoIdentity::NoUserField));
    }

    #[test]
    fn the_trigger_and_the_event_decide_whether_it_is_for_close() {
        let wanted = |trigger: &str, body: Value| {
            let rules = Rules { trigger: Trigger::parse(trigger).unwrap(), ..rules() };
            Mapping::resolve(&rules, &schema()).unwrap().not_for_close(&Event { body })
        };
        let default = "$.type == 'identify' || (!$.type && !$.event)";
        let paying = "$.type == 'track' && $.event == 'Upgraded' && $.traits.plan != 'free'";
        let cases = [
            (default, json!({"type": "identify"}), None),
            (default, json!({"userId": "u"}), None),
            (default, json!({}), None),
            (default, json!({"type": "track"}), Some(NotForClose::Trigger)),
            (default, json!({"event": "Upgraded"}), Some(NotForClose::Trigger)),
            (default, json!({"type": "Identify"}), Some(NotForClose::Trigger)),
            (
                default,
                json!({"type": "identify", "integrations": {"All": false}}),
                Some(NotForClose::Integrations),
            ),
            (paying, json!({"type": "track", "event": "Upgraded", "traits": {"plan": "pro"}}), None),
            (
                paying,
                json!({"type": "track", "event": "Upgraded", "traits": {"plan": "free"}}),
                Some(NotForClose::Trigger),
            ),
        ];
        for (trigger, body, expected) in cases {
            assert_eq!(wanted(trigger, body.clone()), expected, "{trigger}: {body}");
        }
        assert!(
            Trigger::parse("type = identify").unwrap_err().starts_with("`type = identify` is no condition")
        );
    }

    #[test]
    fn lookup_fields_must_serve_and_other_fields_may_be_missing() {
        let bad = |change: fn(&mut Rules, &mut Schema)| {
            let (mut rules, mut schema) = (rules(), schema());
            change(&mut rules, &mut schema);
            match Mapping::resolve(&rules, &schema) {
                Ok(mapping) => {
                    mapping.unknown.into_iter().map(|u| format!("{}: {}", u.setting, u.reason)).collect()
                }
                Err(bad) => bad.iter().map(ToString::to_string).collect::<Vec<_>>(),
            }
            .join("; ")
        };
        assert_eq!(bad(|_, _| ()), "");
        assert_eq!(bad(|rules, _| rules.lead.key = Some(FieldRef::new("Company ID"))), "");
        assert!(
            bad(|_, schema| schema.contact.clear())
                .starts_with("no Contact custom field has the id or name `cf_user`:")
        );
        assert!(
            bad(|_, schema| schema.lead[0].kind = FieldKind::Number)
                .contains("`cf_company` (\"Company ID\") is of type number")
        );
        assert!(
            bad(|rules, _| rules.lead.key = Some(FieldRef::new("Plan")))
                .starts_with("`mapping.lead.custom.Plan` is the lookup field")
        );
        let double = |rules: &mut Rules, schema: &mut Schema| {
            schema.lead.push(field("cf_other", "Company ID", FieldKind::Text));
            rules.lead.key = Some(FieldRef::new("Company ID"));
        };
        assert!(bad(double).starts_with("several Lead custom fields have the name `Company ID`"));
        assert_eq!(
            bad(|_, schema| schema.lead.truncate(1)),
            "mapping.lead.custom.Plan: no custom field has this id or name"
        );

        let mut fewer = schema();
        fewer.lead.truncate(1);
        let event = Event { body: json!({"userId": "u", "traits": {"plan": "pro"}}) };
        let desired = Mapping::resolve(&rules(), &fewer).unwrap().apply(&event).unwrap();
        assert_eq!(
            desired.dropped,
            [Dropped {
                field: "custom.Plan".into(),
                reason: DropReason::UnknownField,
                value: Some(json!("pro")),
            }]
        );
    }

    #[test]
    fn a_bad_value_does_not_cost_the_rest() {
        let desired = desired(json!({"userId": "u", "traits": {
            "email": "Jane <jane@example.test>", "phone": "n/a", "website": "http://", "title": ["CEO"], "plan": {"a": 1}, "company": {"id": {}},
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
                ("company_id", "not_a_value"),
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
        assert_eq!(desired.contact[&Field::Name].value, json!("é".repeat(coerce::MAX_TEXT)));
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
                    text.is_some_and(|text| !text.is_empty() && text.chars().count() <= coerce::MAX_TEXT)
                };
                prop_assert!(fits, "{field}: {wanted:?}");
            }
            for (channel, wanted) in &desired.channels {
                prop_assert!(wanted.value.as_str().is_some_and(|text| !text.is_empty()), "{channel}: {wanted:?}");
            }
        }
    }
}
