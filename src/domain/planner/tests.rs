use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::domain::mapping::tests::desired;
use crate::domain::matching::tests::{contact, keys, lead};
use crate::domain::partial_write::{Remainder, without_rejected};
use crate::domain::readback::{DifferenceEffect, differences};
use crate::domain::record::{Channel, FieldId, LeadId, apply_changes};

fn event() -> Desired {
    desired(json!({"userId": "u", "traits": {
        "email": "jane@example.test", "phone": "+493012345", "name": "Jane", "plan": "pro",
        "company": {"id": "acme", "name": "Acme"},
    }}))
}

type Case = (Found, fn(&mut Switches), &'static [&'static str], &'static [Refusal]);

fn plan_of(found: &Found, off: fn(&mut Switches)) -> (Vec<&'static str>, Vec<Refusal>) {
    let mut switches = Switches::default();
    off(&mut switches);
    let plan = plan(&event(), found, switches, &RecordVersions::new(), &Readback::default());
    let kinds = plan.steps.iter().map(|step| match step {
        Step::CreateLead { contact: Some(_), .. } => "lead+contact",
        Step::CreateLead { contact: None, .. } => "lead",
        Step::CreateContact { .. } => "contact",
        Step::UpdateLead { .. } => "update lead",
        Step::UpdateContact { .. } => "update contact",
    });
    (kinds.collect(), plan.refused)
}

#[test]
fn switches_remove_steps() {
    let in_lead = |contacts: Vec<Contact>, elsewhere| Found::InLead {
        lead: lead("l", Some("acme")),
        contacts,
        adopted: false,
        elsewhere,
    };
    let jane = contact("c", "l", Some("u"), None);
    let cases: Vec<Case> = vec![
        (Found::NoMatch, |_| (), &["lead+contact"], &[]),
        (Found::NoMatch, |s| s.allow_creating_new_leads = false, &[], &[Refusal::CreateLead]),
        (Found::NoMatch, |s| s.allow_creating_new_contacts = false, &["lead"], &[Refusal::CreateContact]),
        (Found::NoMatch, |s| s.allow_creating_duplicate_contacts = false, &["lead+contact"], &[]),
        (Found::OtherCompany, |_| (), &["lead+contact"], &[]),
        (
            Found::OtherCompany,
            |s| s.allow_creating_duplicate_contacts = false,
            &["lead"],
            &[Refusal::DuplicateContact],
        ),
        (in_lead(vec![], false), |_| (), &["update lead", "contact"], &[]),
        (in_lead(vec![], true), |_| (), &["update lead", "contact"], &[]),
        (
            in_lead(vec![], true),
            |s| s.allow_creating_duplicate_contacts = false,
            &["update lead"],
            &[Refusal::DuplicateContact],
        ),
        (
            in_lead(vec![], false),
            |s| s.allow_creating_new_contacts = false,
            &["update lead"],
            &[Refusal::CreateContact],
        ),
        (in_lead(vec![jane.clone()], false), |_| (), &["update lead", "update contact"], &[]),
        (
            in_lead(vec![jane.clone()], false),
            |s| s.allow_updating_existing_leads = false,
            &["update contact"],
            &[Refusal::UpdateLead],
        ),
        (
            in_lead(vec![jane.clone()], false),
            |s| s.allow_updating_existing_contacts = false,
            &["update lead"],
            &[Refusal::UpdateContact],
        ),
        (
            Found::Anywhere {
                people: vec![(jane.clone(), Some(lead("l", None))), (jane, Some(lead("l", None)))],
            },
            |_| (),
            &["update lead", "update contact", "update contact"],
            &[],
        ),
    ];
    for (found, off, steps, refused) in cases {
        assert_eq!(plan_of(&found, off), (steps.to_vec(), refused.to_vec()), "{found:?}");
    }
}

#[test]
fn a_lead_without_a_contact_needs_a_company_id() {
    let nameless = desired(json!({"userId": "u"}));
    let switches = Switches { allow_creating_new_contacts: false, ..Switches::default() };
    let plan = plan(&nameless, &Found::NoMatch, switches, &RecordVersions::new(), &Readback::default());
    assert_eq!((plan.steps.len(), plan.refused.as_slice()), (0, [Refusal::CreateContact].as_slice()));
}

#[test]
fn only_missing_entries_are_appended_to_lists() {
    let mut jane = contact("c", "l", Some("u"), Some("JANE@example.test"));
    jane.lists.insert(Channel::Phone, vec![Entry { value: "+441234".into(), kind: "mobile".into() }]);
    let found = Found::Anywhere { people: vec![(jane, None)] };
    let plan = plan(&event(), &found, Switches::default(), &RecordVersions::new(), &Readback::default());
    let Some(Step::UpdateContact { changes, .. }) = plan.steps.first() else { panic!("{plan:?}") };
    assert!(!changes.lists.contains_key(&Channel::Email));
    let phones: Vec<_> = changes.lists[&Channel::Phone].iter().map(|entry| entry.value.as_str()).collect();
    assert_eq!(phones, ["+441234", "+493012345"]);
}

#[test]
fn add_keeps_what_a_field_has() {
    let tags = FieldId::new("cf_tags");
    let field = Field::Custom(tags.clone());
    let wanted = [(field.clone(), Wanted { value: json!(["red", "blue"]), write: WriteRule::Add })].into();
    let changes = |stored: Option<Value>| {
        let record = stored.map(|stored| Fields::from([(field.clone(), stored)])).unwrap_or_default();
        let (changes, plans) = field_changes(&wanted, Some(&record), |_| true, |_, _, _| None);
        let mut after = record;
        apply_changes(&mut after, &changes);
        (changes.into_iter().collect::<Vec<_>>(), plans[0].verdict, after.remove(&field).unwrap_or_default())
    };
    let add = |values: Value| vec![(Field::Add(tags.clone()), values)];
    let (appended, same) = (FieldVerdict::Appended, FieldVerdict::Same);
    for (stored, expected) in [
        (None, (add(json!(["red", "blue"])), appended, json!(["red", "blue"]))),
        (Some(json!(["green"])), (add(json!(["red", "blue"])), appended, json!(["green", "red", "blue"]))),
        (Some(json!(["red", "green"])), (add(json!(["blue"])), appended, json!(["red", "green", "blue"]))),
        (Some(json!("red")), (add(json!(["blue"])), appended, json!(["red", "blue"]))),
        (Some(json!(["blue", "red", "green"])), (vec![], same, json!(["blue", "red", "green"]))),
    ] {
        assert_eq!(changes(stored.clone()), expected, "{stored:?}");
    }
    // A new record gets the whole list.
    let (created, _) = field_changes(&wanted, None, |_| false, |_, _, _| None);
    assert_eq!(created, Fields::from([(field, json!(["red", "blue"]))]));
}

#[test]
fn what_close_does_not_keep_is_sent_once() {
    let field = Field::Title;
    let sent = Fields::from([(field.clone(), json!("CEO\u{2028}"))]);
    let wanted = [(field.clone(), Wanted { value: json!("CEO\u{2028}"), write: WriteRule::Always })].into();
    for (before, kept) in
        [(None, Some("CEO")), (None, None), (Some("CTO"), Some("CTO")), (Some("CTO"), Some("CEO"))]
    {
        let record =
            |value: Option<&str>| Fields::from_iter(value.map(|value| (field.clone(), json!(value))));
        let differences = differences(&sent, Some(&record(before)), &record(kept));
        let effect = if kept == before { DifferenceEffect::Lost } else { DifferenceEffect::Rewritten };
        assert_eq!((differences.len(), differences[0].effect()), (1, effect), "{before:?} -> {kept:?}");

        let mut readback = Readback::default();
        readback.records.entry("r".into()).or_default().learn(&differences);
        let verdict = |wanted: &BTreeMap<Field, Wanted>, now: Option<&str>| {
            let futile = |field: &str, before: Option<&Value>, value: &Value| {
                readback.futile("r", field, before, value)
            };
            field_changes(wanted, Some(&record(now)), |_| false, futile).1[0].verdict
        };
        let expected = match effect {
            DifferenceEffect::Lost => FieldVerdict::NotKept,
            DifferenceEffect::Rewritten => FieldVerdict::Rewritten,
        };
        assert_eq!(verdict(&wanted, kept), expected, "{before:?} -> {kept:?}");
        assert_eq!(verdict(&wanted, Some("changed by a person")), FieldVerdict::Set);
        let other = [(field.clone(), Wanted { value: json!("CFO"), write: WriteRule::Always })].into();
        assert_eq!(verdict(&other, kept), FieldVerdict::Set, "the event wants another value");
    }
    assert_eq!(differences(&sent, None, &sent), []);
}

fn contact_changes(desired: &Desired, contact: &Contact) -> (ContactValues, Vec<FieldPlan>) {
    let (versions, readback) = (RecordVersions::new(), Readback::default());
    let planner = Planner {
        desired,
        switches: Switches::default(),
        versions: &versions,
        readback: &readback,
        plan: Plan::default(),
    };
    planner.contact_changes(Some(contact))
}

#[test]
fn write_rules_apply_to_fields_and_lists() {
    let current: Fields = [(Field::Title, json!("CEO"))].into();
    let wanted = |field: Field, write| [(field, Wanted { value: json!("new"), write })].into();
    let changed = |field, write| {
        !field_changes(&wanted(field, write), Some(&current), |_| false, |_, _, _| None).0.is_empty()
    };
    assert!(changed(Field::Title, WriteRule::Always));
    assert!(!changed(Field::Title, WriteRule::IfEmpty));
    assert!(!changed(Field::Title, WriteRule::OnCreate));
    assert!(changed(Field::Name, WriteRule::IfEmpty));
    assert!(!changed(Field::Name, WriteRule::OnCreate));

    let grows = |email: Option<&str>, write| {
        let wanted = [(Channel::Email, Wanted { value: json!("n@x.test"), write })].into();
        let desired = Desired { channels: wanted, ..Desired::default() };
        !contact_changes(&desired, &contact("c", "l", None, email)).0.lists.is_empty()
    };
    assert!(grows(Some("o@x.test"), WriteRule::Always));
    assert!(!grows(Some("o@x.test"), WriteRule::IfEmpty));
    assert!(grows(None, WriteRule::IfEmpty));
    assert!(!grows(None, WriteRule::OnCreate));

    let mut full = contact("c", "l", None, None);
    let entry = |n| Entry { value: format!("{n}@x.test"), kind: "office".into() };
    full.lists.insert(Channel::Email, (0..MAX_ENTRIES).map(entry).collect());
    let wanted = [(Channel::Email, Wanted { value: json!("n@x.test"), write: WriteRule::Always })].into();
    let desired = Desired { channels: wanted, ..Desired::default() };
    let (values, fields) = contact_changes(&desired, &full);
    assert!(values.lists.is_empty());
    assert_eq!(fields[0].verdict, FieldVerdict::ListFull);
}

#[test]
fn a_rejected_value_is_removed_unless_it_is_an_identity() {
    let desired = event();
    let create =
        &plan(&desired, &Found::NoMatch, Switches::default(), &RecordVersions::new(), &Readback::default())
            .steps[0];
    let without = |create: &Step, desired: &Desired, paths: &[&str]| {
        let paths: Vec<Vec<String>> =
            paths.iter().map(|path| path.split(' ').map(str::to_owned).collect()).collect();
        let paths = paths.iter().map(Vec::as_slice);
        match without_rejected(create, paths, desired, &keys()) {
            Remainder::Without(_, removed) => {
                Some(removed.into_iter().map(|removed| removed.field).collect::<Vec<_>>().join(" "))
            }
            Remainder::Required | Remainder::Unnamed => None,
        }
    };
    let cases: [(&[&str], _); 11] = [
        (&["contacts 0 phones 0 phone"], Some("phones")),
        (&["phones"], Some("phones")),
        (&["odd", "phones 0"], Some("phones")),
        (&["contacts 0 emails 0 email"], Some("emails")),
        (&["custom.cf_plan"], Some("custom.cf_plan")),
        (&["contacts 0 phones 0 phone", "name", "contacts 0 phones 1 phone"], Some("phones name")),
        (&["name", "contacts 0 name"], Some("name name")),
        (&["name", "custom.cf_company"], None),
        (&["contacts 0 custom.cf_user"], None),
        (&["lead"], None),
        (&[], None),
    ];
    for (paths, removed) in cases {
        assert_eq!(without(create, &desired, paths).as_deref(), removed, "{paths:?}");
    }

    let by_email = self::desired(json!({"traits": {"email": "jane@example.test"}}));
    let create =
        &plan(&by_email, &Found::NoMatch, Switches::default(), &RecordVersions::new(), &Readback::default())
            .steps[0];
    assert_eq!(without(create, &by_email, &["contacts 0 emails"]), None);
}

/// Applies a plan as Close would.
fn apply(plan: &Plan, found: &Found) -> Found {
    let set = |fields: &mut Fields, changes: &Fields| fields.extend(changes.clone());
    let change = |contact: &mut Contact, values: &ContactValues| {
        set(&mut contact.fields, &values.fields);
        contact.lists.extend(values.lists.clone());
    };
    let made = |values: &ContactValues, lead: &str| {
        let mut made = contact("c_new", lead, None, None);
        change(&mut made, values);
        made
    };
    let mut found = found.clone();
    for step in &plan.steps {
        match (step, &mut found) {
            (Step::CreateLead { lead: fields, contact }, _) => {
                let lead = Lead { fields: fields.clone(), ..lead("l_new", None) };
                let contacts = contact.iter().map(|values| made(values, "l_new")).collect();
                found = Found::InLead { lead, contacts, adopted: false, elsewhere: true };
            }
            (Step::CreateContact { contact, .. }, Found::InLead { contacts, .. }) => {
                contacts.push(made(contact, "l"));
            }
            (Step::UpdateLead { changes, .. }, Found::InLead { lead, .. }) => {
                set(&mut lead.fields, changes);
            }
            (Step::UpdateLead { id, changes }, Found::Anywhere { people }) => {
                for lead in
                    people.iter_mut().filter_map(|(_, lead)| lead.as_mut()).filter(|lead| lead.id == *id)
                {
                    set(&mut lead.fields, changes);
                }
            }
            (Step::UpdateContact { id, changes }, Found::InLead { contacts, .. }) => {
                contacts.iter_mut().filter(|c| c.id == *id).for_each(|c| change(c, changes));
            }
            (Step::UpdateContact { id, changes }, Found::Anywhere { people }) => {
                people.iter_mut().filter(|(c, _)| c.id == *id).for_each(|(c, _)| change(c, changes));
            }
            (_, Found::OtherCompany | Found::NoMatch) => panic!("nothing to change"),
            (Step::CreateContact { .. }, Found::Anywhere { .. }) => panic!("no Lead to add to"),
        }
    }
    found
}

fn any_lead() -> impl Strategy<Value = Lead> {
    ("l[12]", proptest::option::of("[ab]"), proptest::option::of("[AB]")).prop_map(|(id, company, name)| {
        let mut lead = lead(&id, company.as_deref());
        lead.fields.extend(name.map(|name| (Field::Name, json!(name))));
        lead
    })
}

fn any_contact() -> impl Strategy<Value = Contact> {
    (
        "c[1-4]",
        proptest::option::of("[uv]"),
        proptest::option::of("[jk]@x\\.test"),
        proptest::option::of("0?[1-3]{3}"),
    )
        .prop_map(|(id, user, email, phone)| {
            let mut contact = contact(&id, "l1", user.as_deref(), email.as_deref());
            let entry = |value| vec![Entry { value, kind: "office".into() }];
            contact.lists.extend(phone.map(|phone| (Channel::Phone, entry(format!("+49{phone}")))));
            contact
        })
}

fn any_found() -> impl Strategy<Value = Found> {
    prop_oneof![
        Just(Found::NoMatch),
        Just(Found::OtherCompany),
        (any_lead(), proptest::collection::vec(any_contact(), 0..3), any::<bool>(), any::<bool>()).prop_map(
            |(lead, contacts, adopted, elsewhere)| Found::InLead { lead, contacts, adopted, elsewhere }
        ),
        proptest::collection::vec((any_contact(), proptest::option::of(any_lead())), 1..4).prop_map(
            |mut people| {
                people.sort_by_key(|(contact, _)| contact.id.clone());
                people.dedup_by_key(|(contact, _)| contact.id.clone());
                let mut seen: BTreeMap<LeadId, Lead> = BTreeMap::new();
                for (_, lead) in &mut people {
                    if let Some(lead) = lead {
                        *lead = seen.entry(lead.id.clone()).or_insert_with(|| lead.clone()).clone();
                    }
                }
                Found::Anywhere { people }
            }
        ),
    ]
}

fn any_event() -> impl Strategy<Value = Value> {
    let traits = (
        proptest::option::of("[JK]@x\\.test"),
        proptest::option::of("[ \\-+]?0?[1-3]{3}"),
        proptest::option::of("[ab]"),
        proptest::option::of("[AB]"),
        proptest::option::of("pro|free"),
    );
    traits.prop_map(|(email, phone, company, name, plan)| {
        json!({"userId": "u", "traits": {
            "email": email, "phone": phone, "plan": plan, "company": {"id": company, "name": name},
        }})
    })
}

proptest! {
    #[test]
    fn planning_again_after_applying_gives_no_steps(
        event in any_event(), found in any_found(), bits in 0u8..32,
    ) {
        let on = |bit: u8| bits & (1 << bit) != 0;
        let switches = Switches {
            allow_creating_new_leads: on(0),
            allow_updating_existing_leads: on(1),
            allow_creating_new_contacts: on(2),
            allow_updating_existing_contacts: on(3),
            allow_creating_duplicate_contacts: on(4),
        };
        let desired = desired(event);
        let first = plan(&desired, &found, switches, &RecordVersions::new(), &Readback::default());
        let after = apply(&first, &found);
        let second = plan(&desired, &after, switches, &RecordVersions::new(), &Readback::default());
        prop_assert!(second.steps.is_empty(), "{first:#?}\n{second:#?}");
    }

    #[test]
    fn existing_entries_are_never_removed_or_reordered(event in any_event(), contact in any_contact()) {
        let lists = contact_changes(&desired(event), &contact).0.lists;
        for (channel, grown) in lists {
            prop_assert!(grown.starts_with(contact.list(channel)));
            prop_assert_eq!(grown.len(), contact.list(channel).len() + 1);
        }
    }
}

#[test]
fn an_adopted_lead_gets_the_company_id() {
    let found = Found::InLead { lead: lead("l", None), contacts: vec![], adopted: true, elsewhere: false };
    let plan = plan(&event(), &found, Switches::default(), &RecordVersions::new(), &Readback::default());
    let Some(Step::UpdateLead { changes, .. }) = plan.steps.first() else { panic!("{plan:?}") };
    assert_eq!(changes[&Field::Custom(FieldId::new("cf_company"))], json!("acme"));
}
