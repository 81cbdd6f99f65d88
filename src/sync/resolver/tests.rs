//! The resolver's order of look-ups, on records in memory.

use futures_util::FutureExt;
use serde_json::{Value, json};

use crate::close::in_memory::InMemoryRecords;
use crate::close::{CloseError, CreatedIds, Fault, Written};
use crate::domain::decision::{Decision, LookUp};
use crate::domain::dropped::DropReason;
use crate::domain::event::Event;
use crate::domain::mapping::Key;
use crate::domain::mapping::tests::mapping;
use crate::domain::matching::{Case, MAX_CONTACTS, Verdict};
use crate::domain::plan::Step;
use crate::domain::record::{Channel, ContactId, Field, FieldId, LeadId};
use crate::domain::switches::Switches;
use crate::sync::id_cache::{Contacts, IdCache};
use crate::sync::properties::Caches;

fn lead(id: &str, date_created: &str, company_id: Option<&str>) -> Value {
    json!({"id": id, "date_created": date_created, "name": id, "custom.cf_company": company_id})
}

fn contact(id: &str, lead_id: &str, user_id: Option<&str>) -> Value {
    json!({"id": id, "lead_id": lead_id, "date_created": "2026-01-01", "custom.cf_user": user_id,
        "emails": [{"type": "office", "email": "jane@acme.test"}]})
}

fn jane_of_acme() -> Value {
    json!({"email": "jane@acme.test", "company": {"id": "acme"}})
}

/// Decides about Jane of Acme.
fn decide(records: &InMemoryRecords, id_cache: &IdCache) -> Decision {
    decide_traits(records, id_cache, jane_of_acme(), Switches::default())
}

/// Decides about Jane alone.
fn decide_person(records: &InMemoryRecords, id_cache: &IdCache) -> Decision {
    let traits = json!({"email": "jane@acme.test", "title": "CEO"});
    decide_traits(records, id_cache, traits, Switches::default())
}

fn decide_traits(
    records: &InMemoryRecords,
    id_cache: &IdCache,
    traits: Value,
    switches: Switches,
) -> Decision {
    let body = json!({"type": "identify", "userId": "u1", "traits": traits});
    try_decide(records, id_cache, body, switches).unwrap()
}

fn try_decide(
    records: &InMemoryRecords,
    id_cache: &IdCache,
    body: Value,
    switches: Switches,
) -> Result<Decision, CloseError> {
    let mapping = mapping();
    let desired = mapping.apply(&Event { body }).unwrap();
    let mut decision = Decision::default();
    let caches = Caches { id_cache: id_cache.clone(), ..Caches::default() };
    let mut resolver = caches.resolver(records, &mapping, switches, &mut decision);
    resolver.decide(&desired, &[]).now_or_never().unwrap()?;
    Ok(decision)
}

fn verdict(decision: &Decision, id: &str) -> Option<Verdict> {
    decision.candidates.iter().find(|candidate| candidate.id == id).map(|candidate| candidate.verdict)
}

/// The labels and records of the steps.
fn steps(decision: &Decision) -> Vec<(&'static str, Option<&str>)> {
    decision.plan.steps.iter().map(|step| (step.label(), step.changes())).collect()
}

fn user() -> Key {
    Key::User("u1".into())
}

#[test]
fn a_cached_lead_that_is_gone_is_forgotten_and_searched_again() {
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[]);
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_gone"));
    let decision = decide(&records, &id_cache);
    assert_eq!(verdict(&decision, "lead_gone"), Some(Verdict::Gone));
    assert_eq!(verdict(&decision, "lead_1"), Some(Verdict::SameCompany));
    assert_eq!(id_cache.lead("acme"), Some(LeadId::new("lead_1")));
}

#[test]
fn the_older_of_two_leads_is_the_companys() {
    let leads = [lead("lead_new", "2026-02-01", Some("acme")), lead("lead_old", "2026-01-01", Some("acme"))];
    let decision = decide(&InMemoryRecords::read(&leads, &[]), &IdCache::default());
    assert_eq!(verdict(&decision, "lead_old"), Some(Verdict::SameCompany));
    assert_eq!(verdict(&decision, "lead_new"), Some(Verdict::YoungerLead));
}

#[test]
fn the_persons_lead_without_a_company_id_is_adopted() {
    let leads = [lead("lead_1", "2026-01-01", None)];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_1", Some("u1"))]);
    assert_eq!(decide(&records, &IdCache::default()).case, Some(Case::AdoptedLead));
}

#[test]
fn a_contact_with_the_email_and_another_user_id_is_left_alone() {
    let leads = [lead("lead_1", "2026-01-01", None)];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_1", Some("u2"))]);
    let decision = decide(&records, &IdCache::default());
    assert_eq!(decision.case, Some(Case::NoMatch));
    assert_eq!(verdict(&decision, "cont_1"), Some(Verdict::DifferentPerson));
}

#[test]
fn a_cached_lead_saves_the_search() {
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[]);
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_1"));
    let decision = decide(&records, &id_cache);
    assert_eq!(decision.look_ups, [LookUp::CachedLead, LookUp::Read("lead_1".into())]);
}

#[test]
fn a_cached_lead_that_is_gone_leaves_the_cache() {
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_gone"));
    let decision = decide(&InMemoryRecords::default(), &id_cache);
    assert_eq!(decision.case, Some(Case::NoMatch));
    assert_eq!(id_cache.lead("acme"), None);
}

#[test]
fn a_cached_lead_that_has_another_company_id_by_now_is_not_used() {
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("other"))], &[]);
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_1"));
    let decision = decide(&records, &id_cache);
    assert_eq!(verdict(&decision, "lead_1"), Some(Verdict::OtherCompany));
    assert_eq!((decision.case, id_cache.lead("acme")), (Some(Case::NoMatch), None));
}

#[test]
fn a_search_hit_whose_company_id_differs_in_case_is_not_used() {
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("ACME"))], &[]);
    let decision = decide(&records, &IdCache::default());
    assert_eq!(verdict(&decision, "lead_1"), Some(Verdict::OtherCompany));
    assert_eq!(decision.case, Some(Case::NoMatch));
}

#[test]
fn only_a_complete_cache_saves_the_search_for_contacts() {
    let records = InMemoryRecords::read(
        &[lead("lead_1", "2026-01-01", None)],
        &[contact("cont_1", "lead_1", Some("u1")), contact("cont_2", "lead_1", Some("u1"))],
    );
    for (complete, contacts) in [(true, 1), (false, 2)] {
        let id_cache = IdCache::default();
        id_cache.remember_contacts(user(), vec![ContactId::new("cont_1")], complete);
        let decision = decide_person(&records, &id_cache);
        let searched = decision.look_ups.iter().any(|it| matches!(it, LookUp::SearchedContacts(_)));
        assert_eq!((searched, steps(&decision).len()), (!complete, contacts));
    }
}

#[test]
fn a_cached_contact_that_search_does_not_show_yet_is_found() {
    let mut records = InMemoryRecords::default().with_frozen_search();
    let InMemoryRecords { leads, contacts, .. } = InMemoryRecords::read(
        &[lead("lead_1", "2026-01-01", None)],
        &[contact("cont_1", "lead_1", Some("u1"))],
    );
    (records.leads, records.contacts) = (leads, contacts);
    let id_cache = IdCache::default();
    id_cache.remember_contacts(user(), vec![ContactId::new("cont_1")], false);
    let decision = decide_person(&records, &id_cache);
    assert_eq!(steps(&decision), [("update_contact", Some("cont_1"))]);
}

/// The switches forbid to write the user id, so the Contact has only the email. Its entry under the email has left the cache.
#[test]
fn a_contact_that_is_cached_under_the_user_id_and_has_only_the_email_is_found() {
    let records = InMemoryRecords::read(
        &[lead("lead_1", "2026-01-01", None)],
        &[
            contact("cont_1", "lead_1", None),
            contact("cont_2", "lead_1", None),
            contact("cont_3", "lead_1", Some("u2")),
        ],
    );
    let cached = |key: Key, ids: &[&str]| (key, ids.iter().map(|id| ContactId::new(*id)).collect::<Vec<_>>());
    let email = || Key::Email("jane@acme.test".into());
    for (entries, is_shown, found) in [
        (vec![cached(user(), &["cont_1"])], false, vec!["cont_1"]),
        (vec![cached(user(), &["cont_1"]), cached(email(), &["cont_2"])], false, vec!["cont_1", "cont_2"]),
        (
            vec![cached(user(), &["cont_1", "cont_3"]), cached(email(), &["cont_1"])],
            true,
            vec!["cont_1", "cont_2"],
        ),
    ] {
        let mut records = records.clone();
        if !is_shown {
            let InMemoryRecords { leads, contacts, .. } = records;
            records = InMemoryRecords::default().with_frozen_search();
            (records.leads, records.contacts) = (leads, contacts);
        }
        let id_cache = IdCache::default();
        for (key, ids) in entries {
            id_cache.remember_contacts(key, ids, false);
        }
        let decision = decide_person(&records, &id_cache);
        let updated: Vec<_> = steps(&decision).into_iter().filter_map(|(_, id)| id).collect();
        assert_eq!(updated, found);
        assert_eq!(verdict(&decision, "cont_1"), Some(Verdict::SameEmail));
        let mut reads: Vec<_> = decision
            .look_ups
            .iter()
            .filter_map(|it| if let LookUp::Read(id) = it { Some(id) } else { None })
            .collect();
        let all = reads.len();
        reads.sort();
        reads.dedup();
        assert_eq!(reads.len(), all, "{:?}", decision.look_ups);
    }
}

#[test]
fn a_cached_contact_that_was_merged_away_is_forgotten_and_searched_again() {
    let records = InMemoryRecords::read(
        &[lead("lead_1", "2026-01-01", None)],
        &[contact("cont_1", "lead_1", Some("u1"))],
    );
    let id_cache = IdCache::default();
    id_cache.remember_contacts(user(), vec![ContactId::new("cont_gone")], true);
    let decision = decide_person(&records, &id_cache);
    assert_eq!(verdict(&decision, "cont_gone"), Some(Verdict::Gone));
    assert_eq!(steps(&decision), [("update_contact", Some("cont_1"))]);
    let cached = Contacts { ids: vec![ContactId::new("cont_1")], complete: true };
    assert_eq!(id_cache.contacts(&user()), cached);
}

#[test]
fn a_cached_contact_is_updated_in_the_lead_it_was_moved_to() {
    let leads = [lead("lead_1", "2026-01-01", None), lead("lead_2", "2026-01-02", Some("acme"))];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_2", Some("u1"))]);
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_1"));
    id_cache.remember_contacts(user(), vec![ContactId::new("cont_1")], true);
    let decision = decide(&records, &id_cache);
    assert_eq!(decision.case, Some(Case::PersonInLead));
    assert_eq!(id_cache.lead("acme"), Some(LeadId::new("lead_2")));
}

#[test]
fn the_user_id_decides_before_the_email() {
    let people = [contact("cont_email", "lead_1", None), contact("cont_user", "lead_1", Some("u1"))];
    for (company_id, traits) in
        [(Some("acme"), jane_of_acme()), (None, json!({"email": "jane@acme.test", "title": "CEO"}))]
    {
        let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", company_id)], &people);
        let mut traits = traits;
        traits["title"] = json!("CEO");
        let decision = decide_traits(&records, &IdCache::default(), traits, Switches::default());
        assert_eq!(verdict(&decision, "cont_email"), Some(Verdict::UserIdDecides), "{company_id:?}");
        let contacts: Vec<_> =
            steps(&decision).into_iter().filter(|step| step.0 == "update_contact").collect();
        assert_eq!(contacts, [("update_contact", Some("cont_user"))], "{company_id:?}");
    }
}

#[test]
fn of_many_contacts_the_ten_oldest_are_updated() {
    let all = MAX_CONTACTS + 2;
    // The oldest are last in the list.
    let contacts: Vec<Value> = (0..all)
        .map(|number| {
            let mut contact = contact(&format!("cont_{number:02}"), "lead_1", Some("u1"));
            contact["date_created"] = json!(format!("2026-01-{:02}", all - number));
            contact
        })
        .collect();
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", None)], &contacts);
    let decision = decide_person(&records, &IdCache::default());
    let updated: Vec<_> = steps(&decision).into_iter().filter_map(|(_, id)| id).collect();
    assert_eq!(updated.len(), MAX_CONTACTS);
    assert!(!updated.contains(&"cont_00") && !updated.contains(&"cont_01"), "{updated:?}");
    assert_eq!(verdict(&decision, "cont_00"), Some(Verdict::TooMany));
}

#[test]
fn a_person_behind_a_shared_email_is_found_by_the_user_id() {
    let mut contacts: Vec<Value> =
        (0..101).map(|number| contact(&format!("cont_{number:03}"), "lead_1", Some("other"))).collect();
    contacts.push(contact("cont_999", "lead_1", Some("u1")));
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", None)], &contacts);
    let decision = decide_person(&records, &IdCache::default());
    assert_eq!(steps(&decision), [("update_contact", Some("cont_999"))]);
}

#[test]
fn a_person_under_another_companys_lead_gets_a_new_lead() {
    let records = InMemoryRecords::read(
        &[lead("lead_1", "2026-01-01", Some("other"))],
        &[contact("cont_1", "lead_1", Some("u1"))],
    );
    let decision = decide(&records, &IdCache::default());
    assert_eq!(decision.case, Some(Case::OtherCompany));
    assert!(matches!(decision.plan.steps[..], [Step::CreateLead { contact: Some(_), .. }]));
}

#[test]
fn a_contact_elsewhere_matters_only_if_duplicates_are_forbidden() {
    let leads = [lead("lead_1", "2026-01-01", Some("acme")), lead("lead_2", "2026-01-01", Some("other"))];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_2", Some("u1"))]);
    for (allow, steps_expected) in [(true, vec![("create_contact", None)]), (false, vec![])] {
        let switches = Switches { allow_creating_duplicate_contacts: allow, ..Switches::default() };
        let decision = decide_traits(&records, &IdCache::default(), jane_of_acme(), switches);
        let steps: Vec<_> = steps(&decision).into_iter().filter(|step| step.0 != "update_lead").collect();
        assert_eq!(steps, steps_expected);
    }
}

/// Jane's Contact with a phone number, and another one.
fn jane_and_bob() -> InMemoryRecords {
    let mut bob = contact("cont_0", "lead_1", Some("u0"));
    bob["emails"] = json!([{"type": "office", "email": "bob@acme.test"}]);
    let mut jane = contact("cont_1", "lead_1", None);
    jane["phones"] = json!([{"type": "office", "phone": "+18004445555"}]);
    InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[bob, jane])
}

fn decide_phone(records: &InMemoryRecords) -> Decision {
    let traits = json!({"email": "jane@acme.test", "phone": "+18004445556", "company": {"id": "acme"}});
    decide_traits(records, &IdCache::default(), traits, Switches::default())
}

/// The phone numbers that the step for Jane's Contact writes.
fn written_phones(decision: &Decision) -> Vec<&str> {
    let mut lists = None;
    for step in &decision.plan.steps {
        if let Step::UpdateContact { id, changes } = step
            && id.as_str() == "cont_1"
        {
            lists = changes.lists.get(&Channel::Phone);
        }
    }
    lists.into_iter().flatten().map(|entry| entry.value.as_str()).collect()
}

#[test]
fn contacts_that_a_lead_lists_only_by_id_are_read() {
    let ids = ["cont_0", "cont_1"].map(ContactId::new);
    for hidden in [&ids[1..], &ids[..]] {
        let mut records = jane_and_bob();
        records.hidden = hidden.iter().cloned().collect();
        let decision = decide_phone(&records);
        assert_eq!(decision.case, Some(Case::PersonInLead), "{hidden:?}");
        assert_eq!(written_phones(&decision), ["+18004445555", "+18004445556"], "{hidden:?}");
        // The person is not in the Lead only because another Contact is gone.
        records.contacts.remove(&ids[0]);
        assert_eq!(decide_phone(&records).case, Some(Case::PersonInLead), "{hidden:?}");
    }
}

#[test]
fn a_list_that_a_lead_does_not_show_is_read_with_the_contact() {
    for shown_user in [None, Some("u1")] {
        let mut records = jane_and_bob();
        let jane = ContactId::new("cont_1");
        if let Some(user) = shown_user {
            let key = Field::Custom(FieldId::new("cf_user"));
            records.contacts.get_mut(&jane).unwrap().fields.insert(key, json!(user));
        }
        records.bare_in_lead = [jane].into_iter().collect();
        let decision = decide_phone(&records);
        assert_eq!(decision.case, Some(Case::PersonInLead), "{shown_user:?}");
        assert_eq!(written_phones(&decision), ["+18004445555", "+18004445556"], "{shown_user:?}");
    }
}

#[test]
fn a_list_that_close_never_shows_is_not_written() {
    let mut records = jane_and_bob();
    let jane = ContactId::new("cont_1");
    let key = Field::Custom(FieldId::new("cf_user"));
    records.contacts.get_mut(&jane).unwrap().fields.insert(key, json!("u1"));
    records.bare = [jane].into_iter().collect();
    let decision = decide_phone(&records);
    assert_eq!(decision.case, Some(Case::PersonInLead));
    assert_eq!(written_phones(&decision), [""; 0]);
    let dropped: Vec<_> =
        decision.dropped.iter().map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
    assert_eq!(dropped, [("emails", DropReason::ListUnknown), ("phones", DropReason::ListUnknown)]);
}

#[test]
fn a_contact_that_a_lead_lists_and_nobody_shows_matters_only_if_it_may_be_the_person() {
    let case = |user: &str, id_cache: &IdCache| {
        let contact = contact("cont_1", "lead_1", Some(user));
        let mut records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[contact]);
        records.hidden = records.contacts.keys().cloned().collect();
        records.vanished.clone_from(&records.hidden);
        let event = json!({"type": "identify", "userId": "u1", "traits": {"company": {"id": "acme"}}});
        try_decide(&records, id_cache, event, Switches::default()).map(|decision| decision.case)
    };
    let vanished = Err(CloseError::Transient(Fault::Vanished));
    assert_eq!(case("u2", &IdCache::default()), Ok(Some(Case::NewInLead)), "search shows somebody else");
    assert_eq!(case("u1", &IdCache::default()), vanished, "search shows the person");
    let id_cache = IdCache::default();
    id_cache.remember_contacts(user(), vec![ContactId::new("cont_1")], false);
    assert_eq!(case("u2", &id_cache), vanished, "the worker knows it");
}

/// What an event without a user id decides on records whose lists Close never shows.
fn decide_bare(
    contacts: &[Value],
    inexact: bool,
    id_cache: &IdCache,
    traits: Value,
) -> Result<Option<Case>, Fault> {
    let mut records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], contacts);
    (records.bare, records.inexact) = (records.contacts.keys().cloned().collect(), inexact);
    let body = json!({"type": "identify", "traits": traits});
    match try_decide(&records, id_cache, body, Switches::default()) {
        Ok(decision) => Ok(decision.case),
        Err(CloseError::Transient(fault)) => Err(fault),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_contact_whose_emails_close_never_shows_is_the_person_if_search_or_the_cache_says_so() {
    let alone = || json!({"email": "jane@acme.test"});
    for user in [None, Some("u1")] {
        let jane = &[contact("cont_1", "lead_1", user)];
        for (traits, case) in [(alone(), Case::KnownPerson), (jane_of_acme(), Case::PersonInLead)] {
            let empty = IdCache::default();
            assert_eq!(decide_bare(jane, false, &empty, traits.clone()), Ok(Some(case)), "{traits}");
            let id_cache = IdCache::default();
            let email = Key::Email("jane@acme.test".into());
            id_cache.remember_contacts(email, vec![ContactId::new("cont_1")], true);
            assert_eq!(decide_bare(jane, true, &id_cache, traits.clone()), Ok(Some(case)), "{traits}");
            let empty = IdCache::default();
            let found = decide_bare(jane, true, &empty, traits);
            assert_eq!(found, Err(Fault::ListsUnknown), "it may be found under another email");
        }
    }
}

#[test]
fn a_new_person_is_created_beside_one_whose_emails_close_never_shows() {
    let mut bob = contact("cont_0", "lead_1", None);
    bob["emails"] = json!([{"email": "bob@acme.test"}]);
    for inexact in [false, true] {
        let found = decide_bare(&[bob.clone()], inexact, &IdCache::default(), jane_of_acme());
        assert_eq!(found, Ok(Some(Case::NewInLead)), "search does not find Bob by Jane's email");
    }
    // Two different user ids are two people.
    bob["custom.cf_user"] = json!("u0");
    let mut records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[bob]);
    records.bare = records.contacts.keys().cloned().collect();
    assert_eq!(decide(&records, &IdCache::default()).case, Some(Case::NewInLead));
}

#[test]
fn an_email_that_cannot_be_read_does_not_hide_the_others() {
    let mut jane = contact("cont_1", "lead_1", None);
    jane["emails"] = json!([{"email": "jane@acme.test"}, {"email": null}]);
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", None)], &[jane]);
    let decision = decide_person(&records, &IdCache::default());
    assert_eq!(decision.case, Some(Case::KnownPerson));
}

#[test]
fn of_many_contacts_that_a_lead_lists_only_by_id_only_the_person_is_read() {
    let others = (0..100).map(|n| contact(&format!("cont_other{n}"), "lead_1", Some(&format!("other{n}"))));
    let others = others.map(|mut other| {
        other["emails"] = json!([]);
        other
    });
    let contacts: Vec<Value> = others.chain([contact("cont_1", "lead_1", Some("u1"))]).collect();
    let mut records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &contacts);
    records.hidden = records.contacts.keys().cloned().collect();
    let decision = decide_phone(&records);
    assert_eq!(decision.case, Some(Case::PersonInLead));
    let read = decision.look_ups.iter().filter(|look_up| matches!(look_up, LookUp::Read(_))).count();
    assert_eq!(read, 2, "the Lead and the Contact");
    // The Leads of a person whose event names no company are read for their own values.
    let traits = json!({"email": "jane@acme.test", "plan": "pro"});
    let decision = decide_traits(&records, &IdCache::default(), traits, Switches::default());
    let read = decision.look_ups.iter().filter(|look_up| matches!(look_up, LookUp::Read(_))).count();
    assert_eq!((decision.case, read), (Some(Case::KnownPerson), 2));
}

/// The ids of the records that were read.
fn reads(decision: &Decision) -> Vec<&str> {
    let look_ups = decision.look_ups.iter();
    look_ups.filter_map(|one| if let LookUp::Read(id) = one { Some(id.as_str()) } else { None }).collect()
}

fn with_shared_email(user_id: Option<&str>) -> Value {
    json!({"type": "identify", "userId": user_id, "traits": {"email": "jane@acme.test", "name": "Jane"}})
}

/// A Contact that was read is not read again for each new person with the same email. That would be quadratic.
#[test]
fn people_who_share_an_email_are_read_once() {
    for is_frozen in [false, true] {
        let mut records = InMemoryRecords::default();
        if is_frozen {
            records = records.with_frozen_search();
        }
        let id_cache = IdCache::default();
        for number in 0..30 {
            let body = with_shared_email(Some(&format!("u{number}")));
            let identity = mapping().apply(&Event { body: body.clone() }).unwrap().identity;
            let decision = try_decide(&records, &id_cache, body, Switches::default()).unwrap();
            assert_eq!(steps(&decision), [("create_lead", None)], "{number}");
            assert!(reads(&decision).len() <= 1, "{number}: {:?}", decision.look_ups);
            let Written::Lead(new) = records.apply(&decision.plan.steps[0]) else { panic!("no Lead") };
            let created = CreatedIds { lead: Some(new.lead.id), contact: Some(new.contacts[0].id.clone()) };
            id_cache.remember_created(&identity, created, false);
        }
    }
}

#[test]
fn a_person_with_a_shared_email_who_loses_the_user_id_is_found_by_the_email() {
    let leads = [lead("lead_1", "2026-01-01", None)];
    let id_cache = IdCache::default();
    for (theirs, case) in [(Some("u2"), Case::NoMatch), (None, Case::KnownPerson)] {
        let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_1", theirs)]);
        assert_eq!(decide_person(&records, &id_cache).case, Some(case));
    }
}
