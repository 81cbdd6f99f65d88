use proptest::prelude::*;

use serde_json::json;
use strum::VariantArray;

use super::*;
use crate::domain::mapping::source::{Alternative, Normalize, Source};
use crate::domain::schema::{FieldRef, FieldRefError, Item, Problem, Schema, UnreadableItem};

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
            synced_at: None,
        },
        contact: RecordRules {
            fields: [
                (
                    Field::Name,
                    rule(&["$.traits.name", "{$.traits.firstName} {$.traits.lastName}", "$.traits.lastName"]),
                ),
                (Field::Title, rule(&["$.traits.title"])),
            ]
            .into(),
            custom: BTreeMap::new(),
            key: Some(FieldRef::new("cf_user")),
            id: source(&["$.userId"]),
            synced_at: None,
        },
        channels: [
            (Channel::Email, rule(&["$.traits.email", "$.userId"])),
            (Channel::Phone, rule(&["$.traits.phone"])),
            (Channel::Url, rule(&["$.traits.website"])),
        ]
        .into(),
        free_mail: FreeMail(vec!["gmail.com".into(), "yahoo.*".into()]),
    }
    .with_placeholders(
        &Placeholders::of_ids(["undefined", "null", "true", "0", "guest"].map(str::to_owned)),
        &Placeholders::of_values(["undefined", "null"].map(str::to_owned)),
    )
}

fn field(id: &str, name: &str, kind: FieldKind) -> CustomField {
    CustomField { id: FieldId::new(id), name: name.into(), kind, multiple: false, required: false }
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
    assert_eq!(person(json!({"name": "", "firstName": "Jane", "lastName": "Doe"})), Some(json!("Jane Doe")));
    assert_eq!(person(json!({"lastName": "Doe"})), Some(json!("Doe")));
    assert_eq!(person(json!({"name": {"first": "Jane"}})), None);

    let company = lead_name(json!({"userId": "u", "traits": {"name": "Jane", "company": {"name": "Acme"}}}));
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
fn an_event_must_identify_a_person() {
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
        (json!({"traits": {"email": " Jane@Example.TEST "}}), known(None, None, Some("jane@example.test"))),
        (json!({"userId": "u", "traits": {"company": {"id": 7}}}), known(Some("7"), Some("u"), None)),
        (json!({"userId": "u", "traits": {"company": "Acme"}}), known(None, Some("u"), None)),
        (json!({"userId": "u", "traits": {"company": {"id": 7.0}}}), known(Some("7"), Some("u"), None)),
        (json!({"userId": "", "traits": {"email": "invalid"}}), Err(NoIdentity::BadEmail)),
        (json!({"anonymousId": "a", "traits": {"company": {"id": "c"}}}), Err(NoIdentity::Anonymous)),
    ];
    for (event, expected) in cases {
        assert_eq!(identity(event.clone()), expected, "{event}");
    }
    for (event, expected) in [
        (json!({"userId": "undefined"}), Err(NoIdentity::Placeholder)),
        (json!({"userId": true}), Err(NoIdentity::Placeholder)),
        (json!({"userId": "'guest'"}), Err(NoIdentity::Placeholder)),
        (json!({"userId": 0, "traits": {"email": "undefined"}}), Err(NoIdentity::Placeholder)),
        (json!({"userId": "guest", "traits": {"email": "j@x.test"}}), known(None, None, Some("j@x.test"))),
        (json!({"userId": "u", "traits": {"company": {"id": "null"}}}), known(None, Some("u"), None)),
        (json!({"userId": "J@x.test"}), known(None, Some("J@x.test"), Some("j@x.test"))),
        (json!({"userId": "j@"}), known(None, Some("j@"), None)),
        (
            json!({"userId": "j@x.test", "traits": {"email": "k@x.test"}}),
            known(None, Some("j@x.test"), Some("k@x.test")),
        ),
        (
            json!({"userId": "\u{feff}u\u{200b}", "traits": {"company": {"id": "c\u{a0}"}}}),
            known(Some("c"), Some("u"), None),
        ),
    ] {
        assert_eq!(identity(event.clone()), expected, "{event}");
    }
    let mut without_field = rules();
    without_field.contact.key = None;
    let mapping = Mapping::resolve(&without_field, &schema()).unwrap();
    assert_eq!(mapping.apply(&Event { body: json!({"userId": "u"}) }), Err(NoIdentity::NoUserField));
}

#[test]
fn the_trigger_and_integrations_decide_whether_an_event_is_for_close() {
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
        Trigger::parse("type = identify")
            .unwrap_err()
            .starts_with("`type = identify` is not a valid condition")
    );
}

#[test]
fn lookup_fields_are_required_and_other_fields_are_not() {
    let bad = |change: fn(&mut Rules, &mut Schema)| {
        let (mut rules, mut schema) = (rules(), schema());
        change(&mut rules, &mut schema);
        match Mapping::resolve(&rules, &schema) {
            Ok(mapping) => {
                mapping.unresolved.into_iter().map(|u| format!("{}: {}", u.setting, u.reason)).collect()
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
fn an_unusable_value_is_left_out_and_the_rest_is_kept() {
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
fn an_id_that_is_too_long_identifies_nobody() {
    let id = "u".repeat(coerce::MAX_ID + 1);
    let dropped = |desired: &Desired| -> Vec<_> {
        desired.dropped.iter().map(|dropped| (dropped.field.clone(), dropped.reason.label())).collect()
    };
    let by_email = desired(json!({"userId": id, "traits": {"email": "j@x.test", "company": {"id": id}}}));
    assert_eq!((by_email.identity.user_id.as_ref(), by_email.identity.company_id.as_ref()), (None, None));
    assert_eq!(by_email.identity.email.as_deref(), Some("j@x.test"));
    assert_eq!(
        dropped(&by_email),
        [("company_id".to_owned(), "too_long"), ("user_id".to_owned(), "too_long")]
    );
    let anonymous = Event { body: json!({"userId": id, "traits": {}}) };
    let mapping = Mapping::resolve(&rules(), &schema()).unwrap();
    assert_eq!(mapping.apply(&anonymous), Err(NoIdentity::BadUserId));
}

#[test]
fn only_an_email_of_the_trait_or_of_another_rule_is_an_invalid_one() {
    let dropped = |traits: Value, user: &str| {
        let desired = desired(json!({"userId": user, "traits": traits}));
        let email = desired.channels.get(&Channel::Email).map(|email| email.value.clone());
        let reasons: Vec<_> = desired.dropped.iter().map(|dropped| dropped.reason.label()).collect();
        (email, reasons)
    };
    let jane = || Some(json!("j@x.test"));
    let cases = [
        (json!({}), "u", None, vec![]),
        (json!({"email": "no"}), "u", None, vec!["invalid_email"]),
        (json!({"email": "undefined"}), "u", None, vec!["placeholder"]),
        (json!({"email": {"work": "a"}}), "u", None, vec!["not_a_value"]),
        (json!({}), "j@x.test", jane(), vec![]),
        (json!({"email": "no"}), "j@x.test", jane(), vec!["invalid_email"]),
        (json!({"email": "undefined"}), "j@x.test", jane(), vec![]),
    ];
    for (traits, user, email, reasons) in cases {
        assert_eq!(dropped(traits.clone(), user), (email, reasons), "{traits} {user}");
    }
    // A second rule for an email is not a user id.
    let mut rules = rules();
    rules.channels.insert(Channel::Email, rule(&["$.traits.email", "$.traits.work"]));
    let mapping = Mapping::resolve(&rules, &schema()).unwrap();
    let event = Event { body: json!({"traits": {"work": "no"}}) };
    assert_eq!(mapping.apply(&event), Err(NoIdentity::BadEmail));
}

#[test]
fn ids_are_stored_as_text_and_long_names_are_cut() {
    let desired = desired(json!({"userId": 5, "traits": {"name": "é".repeat(2000), "company": {"id": 9}}}));
    assert_eq!(desired.contact[&Field::Custom(FieldId::new("cf_user"))].value, json!("5"));
    assert_eq!(desired.lead[&Field::Custom(FieldId::new("cf_company"))].value, json!("9"));
    assert_eq!(desired.contact[&Field::Name].value, json!("é".repeat(coerce::MAX_TEXT)));
}

/// JSON of limited depth.
/// A message of 1 MiB whose values are all as long as they can be, and of the kind that costs most.
#[test]
fn every_mapped_field_can_be_at_its_maximum() {
    const BODY: usize = 1 << 20;
    let normalized = |steps: &[Normalize]| {
        Source::new(["$.traits.website", "$.traits.phone"].map(|path| Alternative::parse(path).unwrap()))
            .normalized(steps.to_vec())
    };
    let mut rules = rules();
    rules.lead.id = normalized(&[Normalize::Domain]);
    rules
        .lead
        .fields
        .insert(Field::Description, Rule { source: normalized(Normalize::VARIANTS), ..rule(&[]) });
    let mapping = Mapping::resolve(&rules, &schema()).unwrap();
    let pieces = [
        "http:",
        "https://",
        "http:\\\\",
        "7",
        "(0)",
        "+",
        "@",
        "a@",
        "\u{200b}",
        "\u{feff}a",
        "[",
        "{",
        "-",
        "T:",
        "\u{130}",
    ];
    for piece in pieces {
        let text = |bytes: usize| format!("{}.", piece.repeat(bytes / piece.len()));
        let event = |bytes: usize| {
            let long = || json!(text(bytes));
            json!({
                "userId": "u1", "timestamp": long(), "receivedAt": long(), "sentAt": long(), "messageId": long(),
                "traits": {
                    "name": long(), "firstName": long(), "lastName": long(), "title": long(), "email": long(),
                    "phone": long(), "website": long(), "plan": long(), "company": {"id": long(), "name": long()},
                },
            })
        };
        let body = event(BODY / 2 / 14).to_string();
        let event = Event::decode(body.as_bytes(), BODY).unwrap();
        assert!(body.len() > BODY / 3 && event.time().is_none(), "{piece}: {}", body.len());
        let kept = format!("{:?}", mapping.apply(&event).unwrap()).len();
        assert!(kept < BODY, "{piece}: {kept}");
        assert!(rules.event_ids(body.as_bytes().into()).is_some(), "{piece}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
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
    /// Every event gives values of the types that Close accepts.
    #[test]
    fn any_event_maps_to_values_that_close_accepts(
        user in any_json(), email in any_json(), phone in any_json(), website in any_json(),
        name in any_json(), company in any_json(), plan in any_json(),
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

#[test]
fn a_rule_that_can_never_be_applied_stops_the_start() {
    let odd = |schema: &mut Schema, name: &str| {
        let name = Some(name.to_owned());
        schema.lead.retain(|field| Some(&field.name) != name.as_ref());
        let item = Item::LeadField;
        schema.unreadable.push(UnreadableItem { item, id: None, name, problem: Problem::Type });
    };
    let resolve = |change: &dyn Fn(&mut Rules, &mut Schema)| {
        let (mut rules, mut schema) = (rules(), schema());
        change(&mut rules, &mut schema);
        Mapping::resolve(&rules, &schema).map(|mapping| {
            let stops = mapping.unresolved.iter().filter(|unresolved| unresolved.stops_start());
            stops.map(|unresolved| (unresolved.setting.clone(), unresolved.reason)).collect::<Vec<_>>()
        })
    };
    let named = |reference: &str| FieldRef::new(reference);
    let unreadable = UnresolvedReason::Reference(FieldRefError::Unreadable(Problem::Type));
    let add = |write| {
        move |rules: &mut Rules, schema: &mut Schema| {
            schema.lead.push(CustomField { multiple: true, ..field("cf_tags", "Tags", FieldKind::Text) });
            let rule = rules.lead.custom.values().next().unwrap().clone();
            rules.lead.custom = [("cf_tags", write), ("cf_seats", write)]
                .map(|(name, write)| (FieldRef::new(name), Rule { write, ..rule.clone() }))
                .into();
        }
    };
    // A field that no rule names.
    assert_eq!(resolve(&|_, schema| odd(schema, "Other")), Ok(vec![]));
    // A field that a rule names.
    let plan = |rules: &mut Rules, schema: &mut Schema| {
        let rule = rules.lead.custom.values().next().unwrap().clone();
        rules.lead.custom = [(named("Plan"), rule)].into();
        odd(schema, "Plan");
    };
    assert_eq!(resolve(&plan), Ok(vec![("mapping.lead.custom.Plan".into(), unreadable)]));
    let synced_at = |rules: &mut Rules, schema: &mut Schema| {
        rules.lead.synced_at = Some(named("Synced at"));
        odd(schema, "Synced at");
    };
    assert_eq!(resolve(&synced_at), Ok(vec![("close.lead_synced_at_field".into(), unreadable)]));
    let key = |rules: &mut Rules, schema: &mut Schema| {
        rules.lead.key = Some(named("Company ID"));
        odd(schema, "Company ID");
    };
    let errors = resolve(&key).unwrap_err();
    assert!(
        matches!(&errors[..], [LookupFieldError::Unreadable { problem: Problem::Type, .. }]),
        "{errors:?}"
    );
    // `add` needs several values.
    let single = vec![("mapping.lead.custom.cf_seats".into(), UnresolvedReason::SingleValue)];
    assert_eq!(resolve(&add(WriteRule::Add)), Ok(single));
    assert_eq!(resolve(&add(WriteRule::IfEmpty)), Ok(vec![]));
}
