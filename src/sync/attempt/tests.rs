//! Attempts at one message on records in memory, in virtual time: no network, no broker.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::close::in_memory::InMemoryRecords;
use crate::close::{
    Client, Created, Fault, FieldError, Hits, LeadWithContacts, LeadWithPerson, Priority, Records, Rejection,
    Response, Transport, Written,
};
use crate::domain::dropped::DropReason;
use crate::domain::event::Event;
use crate::domain::journal::{ChangeKind, Entry};
use crate::domain::mapping::tests::{rules, schema};
use crate::domain::mapping::{Identity, KeyFields, Mapping, Rules, Wanted};
use crate::domain::matching::{Case, compare};
use crate::domain::plan::Step;
use crate::domain::record::{Channel, Contact, ContactId, Field, FieldId, Fields, Lead, LeadId};
use crate::domain::schema::FieldRef;
use crate::domain::staleness::{FieldHash, FieldVersions};
use crate::domain::switches::Switches;
use crate::domain::time;
use crate::outcome::DeadLetter;
use crate::retry::Policy;
use crate::sync::context::Dependencies;
use crate::sync::id_cache::{Change, Contacts};
use crate::sync::job::Settings;
use crate::sync::journal::{Journal, JournalHandle};
use crate::sync::lag_guard::LONGEST_SEARCH_LAG;
use crate::sync::record_locks::RecordLocks;
use crate::telemetry::metrics::{self, Metrics};

mod gone;
mod harness;
mod lost_creations;
mod next_worker;
mod not_kept;
mod nothing_is_lost;
mod old_replays;
mod people_win;
mod person;
mod rehearsal;
mod unnamed;
mod waits;

use harness::*;

#[tokio::test(start_paused = true)]
async fn a_created_lead_and_contact_are_cached_with_their_versions() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]);
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let completed = attempts.run_once().await.ok().unwrap();

    assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["create_lead"]);
    let (lead, contact) = (LeadId::new("lead_new1"), ContactId::new("cont_new2"));
    assert_eq!(attempts.decision.new_lead.as_ref(), Some(&lead));
    assert_eq!(attempts.decision.new_contact.as_ref(), Some(&contact));
    assert_eq!(context.id_cache.lead("acme"), Some(lead));
    for key in desired.identity.person() {
        let cached = Contacts { ids: vec![contact.clone()], complete: true };
        assert_eq!(context.id_cache.contacts(&key), cached, "no other Contact has {key:?}");
    }
    assert_eq!(pending(&context, &desired), [""; 0]);
    assert_eq!(
        lead_versions(&context, close.lead("lead_new1")).fields[&FieldHash::of("custom.cf_plan")],
        at(5)
    );
    assert_eq!(contact_versions(&context, close.contact("cont_new2")).fields[&FieldHash::of("name")], at(5));
}

#[tokio::test(start_paused = true)]
async fn an_older_event_changes_no_field_that_a_newer_one_set() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    let older = desired(
        &context,
        4,
        json!({"userId": "u1", "traits": {"name": "J. Doe", "title": "CEO", "plan": "free",
            "company": {"id": "acme", "name": "Acme Inc"}}}),
    );
    attempts(&context, &close, &older).run_once().await.ok().unwrap();
    let (lead, contact) = (close.lead("lead_1"), close.contact("cont_1"));
    assert_eq!(lead.fields[&Field::Name], json!("Acme"));
    assert_eq!(lead.custom(&FieldId::new("cf_plan")), Some("pro"));
    assert_eq!(contact.fields[&Field::Name], json!("Jane Doe"));
    assert_eq!(contact.fields[&Field::Title], json!("CEO"), "the newer event did not set it");
}

/// Its answer to the creation may lack the Contact (close-api.md §15).
#[tokio::test(start_paused = true)]
async fn an_older_event_changes_no_field_of_a_contact_that_close_did_not_show_at_its_creation() {
    for (company, read_fails) in
        [(json!({"id": "acme", "name": "Acme"}), false), (json!(null), false), (json!(null), true)]
    {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::WithoutContact);
        if read_fails {
            close.state(|state| state.read_faults.push_back(timed_out()));
        }
        let newer = desired(
            &context,
            6,
            json!({"userId": "u1", "traits": {"email": "jane@acme.test", "title": "CEO", "company": company}}),
        );
        let completed = attempts(&context, &close, &newer).run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
        let older = desired(
            &context,
            5,
            json!({"userId": "u1", "traits": {"email": "jane@acme.test", "title": "CTO"}}),
        );
        attempts(&context, &close, &older).run_once().await.ok().unwrap();
        assert_eq!(close.written(), ["create_lead"]);
    }
}

#[tokio::test(start_paused = true)]
async fn all_records_of_the_plan_are_locked_during_each_write() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_lead", "update_contact"]);
    let both = vec!["cont_1".to_owned(), "lead_1".to_owned()];
    assert_eq!(close.state(|state| state.locked.clone()), [both.clone(), both]);
    assert_eq!(context.record_locks.locked(), [""; 0], "the locks are released");
}

#[tokio::test(start_paused = true)]
async fn messages_that_find_one_contact_by_different_keys_do_not_undo_each_other() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let by_user = desired(&context, 1, json!({"userId": "u1", "traits": {"phone": "+18004445555"}}));
    let by_email =
        desired(&context, 2, json!({"traits": {"email": "jane@acme.test", "phone": "+493012345678"}}));
    let (mut first, mut second) =
        (attempts(&context, &close, &by_user), attempts(&context, &close, &by_email));
    let (first, second) = tokio::join!(first.run_once(), second.run_once());
    assert!(first.is_ok() && second.is_ok());
    let contact = close.contact("cont_1");
    let phones: Vec<&str> = contact.list(Channel::Phone).iter().map(|entry| entry.value.as_str()).collect();
    assert_eq!(phones, ["+18004445555", "+493012345678"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_optional_field_is_left_out_of_the_next_write() {
    let context = context(&rules());
    let phone: &[&str] = &["contacts", "0", "phones", "0", "phone"];
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(rejection(&[phone])));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let completed = attempts.run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["create_lead", "create_lead"]);
    let contact = close.contact("cont_new2");
    assert_eq!(contact.list(Channel::Phone).len(), 0);
    assert!(contact.has(Channel::Email, "jane@acme.test", None));
    let dropped: Vec<_> =
        attempts.decision.dropped.iter().map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
    assert_eq!(dropped, [("phones", DropReason::Refused)]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_value_is_not_sent_again_for_the_record() {
    // Whether Close names the field or not.
    for paths in [&[&["phones", "0", "phone"][..]][..], &[]] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_fault(WriteFault::Slow(LATENCY))
            .with_fault(WriteFault::Before(rejection(paths)));
        attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
        assert_eq!(close.written(), ["update_lead", "update_contact", "update_contact"], "{paths:?}");

        let again = jane(&context, 6);
        let mut second = attempts(&context, &close, &again);
        let outcome = second.run_once().await.ok().unwrap().outcome;
        assert_eq!((outcome, close.written().len()), (Outcome::Synced(Effect::Unchanged), 3), "{paths:?}");
        let dropped = |decision: &Decision| -> Vec<_> {
            decision.dropped.iter().map(|dropped| (dropped.field.clone(), dropped.reason)).collect()
        };
        assert_eq!(dropped(&second.decision), [("phones".to_owned(), DropReason::RefusedBefore)]);

        // An operator's replay sends it again.
        let mut replayed = attempts(&context, &close.clone(), &again);
        replayed.run.priority = Priority::Replay;
        close.state(|state| state.faults.push_back(WriteFault::Before(timed_out())));
        assert_eq!(replayed.run_once().await.err().unwrap().error, timed_out(), "{paths:?}");

        // Another value is tried, and the same one when Close may accept it.
        let event = json!({"userId": "u1", "traits": {"phone": "+493012345678", "company": {"id": "acme"}}});
        let other = desired(&context, 7, event);
        attempts(&context, &close, &other).run_once().await.ok().unwrap();
        assert_eq!(close.contact("cont_1").list(Channel::Phone).len(), 1);
        context.version_cache.forget_refusals();
        tokio::time::sleep(LATENCY).await;
        attempts(&context, &close, &again).run_once().await.ok().unwrap();
        assert_eq!(close.contact("cont_1").list(Channel::Phone).len(), 2, "{paths:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_refused_in_a_new_record_is_not_sent_again_for_it() {
    let context = context(&rules());
    let phone: &[&str] = &["contacts", "0", "phones", "0", "phone"];
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(rejection(&[phone])));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    let outcome = attempts(&context, &close, &jane(&context, 6)).run_once().await.ok().unwrap().outcome;
    assert_eq!(outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.written(), ["create_lead", "create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_key_field_fails_the_attempt() {
    let context = context(&rules());
    let error = rejection(&[&["custom.cf_company"]]);
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
    let failure = attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    assert_eq!(failure.error, error);
    assert_eq!(close.written(), ["create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_field_fails_a_merged_write() {
    let context = context(&rules());
    let error = rejection(&[&["contacts", "0", "phones", "0", "phone"]]);
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
    let (first, second) = (jane(&context, 5), jane(&context, 6));
    let mut attempts = attempts(&context, &close, &first);
    attempts.others = vec![&second];
    let failure = attempts.run_once().await.err().unwrap();
    assert_eq!(failure.error, error);
    assert_eq!(close.written(), ["create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn merged_events_share_one_write_with_the_latest_values() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let event = |second, title| {
        let traits = json!({"title": title, "company": {"id": "acme"}});
        desired(&context, second, json!({"userId": "u1", "traits": traits}))
    };
    let (first, second) = (event(5, "CTO"), event(6, "CEO"));
    let mut attempts = attempts(&context, &close, &first);
    attempts.others = vec![&second];
    let completed = attempts.run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_contact"]);
    assert_eq!(close.contact("cont_1").fields[&Field::Title], json!("CEO"));
    let merged: Vec<_> =
        completed.merged.iter().map(|(outcome, decision)| (outcome.clone(), decision.merged)).collect();
    assert_eq!(merged, [(Outcome::Synced(Effect::Updated), true)]);
    assert_eq!(contact_versions(&context, close.contact("cont_1")).fields[&FieldHash::of("title")], at(6));
}

#[tokio::test(start_paused = true)]
async fn a_404_of_a_write_looks_up_again() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[])
        .with_search_lag(SEARCH_LAG)
        .with_fault(WriteFault::Before(CloseError::NotFound));
    context.id_cache.remember_lead("acme", LeadId::new("lead_1"));
    // The Lead is deleted between the look-up and the write; search still shows it.
    let deleted = close.clone();
    let delete = async move {
        tokio::time::sleep(LATENCY + LATENCY / 2).await;
        deleted.state(|state| state.records.leads.clear());
    };
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let (outcome, ()) = tokio::join!(attempts.retry_in_place(), delete);
    assert_eq!(outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["update_lead", "create_lead"]);
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_new1")));
}

#[tokio::test(start_paused = true)]
async fn a_404_of_a_write_to_a_record_that_is_there_is_transient() {
    let context = context(&rules());
    let vanished = || WriteFault::Before(CloseError::Transient(Fault::Vanished));
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(vanished())
        .with_fault(WriteFault::Before(CloseError::NotFound));
    let desired = jane(&context, 5);
    let outcome = attempts(&context, &close, &desired).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Updated));
    assert_eq!(close.written(), ["update_lead", "update_lead", "update_lead", "update_contact"]);
}

/// An event about Jane with a phone number of hers.
fn jane_with_phone(context: &Context, second: i64, phone: &str) -> Desired {
    let traits =
        json!({"email": "jane@acme.test", "phone": phone, "company": {"id": "acme", "name": "Acme"}});
    desired(context, second, json!({"userId": "u1", "traits": traits}))
}

fn phones(contact: &Contact) -> Vec<&str> {
    contact.list(Channel::Phone).iter().map(|entry| entry.value.as_str()).collect()
}

const PHONES: [&str; 4] = ["+18004445551", "+18004445552", "+18004445553", "+18004445554"];

#[tokio::test(start_paused = true)]
async fn stale_reads_create_no_second_record_and_lose_no_entry() {
    for lag in [500, 1000, 5000].map(Duration::from_millis) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[], &[]).with_search_lag(SEARCH_LAG).with_read_lag(lag);
        for (second, phone) in (1..).zip(PHONES) {
            let desired = jane_with_phone(&context, second, phone);
            let outcome = attempts(&context, &close, &desired).retry_in_place().await;
            assert!(matches!(outcome, Outcome::Synced(_)), "{outcome:?}");
        }
        let records = close.records();
        assert_eq!((records.leads.len(), records.contacts.len()), (1, 1), "{lag:?}");
        assert_eq!(phones(&close.contact("cont_new2")), PHONES, "{lag:?}");
    }
}

/// The journal says that a predecessor wrote the Contact, and not what.
#[tokio::test(start_paused = true)]
async fn a_contact_that_got_its_email_before_a_takeover_is_found_although_reads_are_stale() {
    let predecessor = context(&rules());
    let contact = json!({"id": "cont_1", "lead_id": "lead_1", "custom.cf_user": "u1", "emails": [],
        "date_updated": "1970-01-01T00:00:00.5Z"});
    let close = FakeClose::new(&predecessor, &[acme()], &[contact]).with_read_lag(Duration::from_secs(5));
    let gets_email = desired(&predecessor, 1, json!({"userId": "u1", "traits": {"email": "jane@acme.test"}}));
    let outcome = attempts(&predecessor, &close, &gets_email).retry_in_place().await;
    assert_eq!((outcome, close.written()), (Outcome::Synced(Effect::Updated), vec!["update_contact"]));

    let successor = context(&rules());
    successor.recent.written_elsewhere("cont_1", close.contact("cont_1").date_updated);
    let email_alone = desired(&successor, 2, json!({"traits": {"email": "jane@acme.test", "title": "CEO"}}));
    let outcome = attempts(&successor, &close, &email_alone).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Updated));
    assert_eq!(close.written(), ["update_contact", "update_contact"]);
}

/// The read shows the value of the event, which was overwritten since.
#[tokio::test(start_paused = true)]
async fn a_stale_read_after_a_takeover_does_not_make_an_event_a_repeat() {
    let predecessor = context(&rules());
    let contact = json!({"id": "cont_1", "lead_id": "lead_1", "custom.cf_user": "u1", "title": "CTO",
        "emails": [], "date_updated": "1970-01-01T00:00:00.5Z"});
    let close = FakeClose::new(&predecessor, &[acme()], &[contact]).with_read_lag(Duration::from_secs(5));
    let with_title = |context: &Context, second, title: &str| {
        desired(context, second, json!({"userId": "u1", "traits": {"title": title}}))
    };
    let ceo = with_title(&predecessor, 1, "CEO");
    attempts(&predecessor, &close, &ceo).retry_in_place().await;

    let successor = context(&rules());
    successor.recent.written_elsewhere("cont_1", close.contact("cont_1").date_updated);
    let cto = with_title(&successor, 2, "CTO");
    assert_eq!(attempts(&successor, &close, &cto).retry_in_place().await, Outcome::Synced(Effect::Updated));
    assert_eq!(close.contact("cont_1").fields[&Field::Title], json!("CTO"));
}

#[tokio::test(start_paused = true)]
async fn a_record_that_a_person_deletes_is_created_again_after_a_moment() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    close.state(|state| {
        state.records.leads.clear();
        state.records.contacts.clear();
    });
    let outcome = attempts(&context, &close, &jane(&context, 6)).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Created));
    let lead = close.records().leads.into_keys().next().unwrap();
    assert_eq!(context.id_cache.lead("acme"), Some(lead));
    // The search index still has the Contact; it is read only once more.
    close.state(|state| state.records.contacts.clear());
    let outcome = attempts(&context, &close, &jane(&context, 7)).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Added));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_succeeded_is_recorded_when_a_later_one_fails() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(WriteFault::Slow(LATENCY))
        .with_fault(WriteFault::Before(CloseError::Transient(Fault::Status(500))));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    assert_eq!(close.written(), ["update_lead", "update_contact"]);
    assert_eq!(lead_versions(&context, close.lead("lead_1")).fields[&FieldHash::of("custom.cf_plan")], at(5));
    let contact = contact_versions(&context, close.contact("cont_1"));
    assert_eq!(contact, FieldVersions::default(), "Close may not have changed the Contact");
}

#[tokio::test(start_paused = true)]
async fn a_change_without_an_answer_is_recognized_by_its_stored_time() {
    let mut rules = rules();
    rules.contact.synced_at = Some(FieldRef::new("cf_contact_at"));
    let context = context(&rules);
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(WriteFault::Slow(LATENCY))
        .with_fault(WriteFault::After(timed_out()));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    let versions = contact_versions(&context, close.contact("cont_1"));
    assert_eq!(versions.fields.get(&FieldHash::of("name")), Some(&at(5)));
    assert_eq!(versions.record, None, "the event did not set all fields");
}

#[tokio::test(start_paused = true)]
async fn an_adopted_lead_is_cached_as_the_companys() {
    let context = context(&rules());
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old"});
    let close = FakeClose::new(&context, &[lead], &[janes_contact()]).with_search_lag(SEARCH_LAG);
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    attempts.run_once().await.ok().unwrap();
    assert_eq!(attempts.decision.case, Some(Case::AdoptedLead));
    assert_eq!(close.lead("lead_1").custom(&FieldId::new("cf_company")), Some("acme"));
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_1")));
}

#[tokio::test(start_paused = true)]
async fn a_created_contact_of_a_shared_email_does_not_make_the_cache_complete() {
    let context = context(&rules());
    let mut other = janes_contact();
    other["custom.cf_user"] = json!("u2");
    let close = FakeClose::new(&context, &[acme()], &[other]);
    let desired = desired(&context, 5, json!({"userId": "u1", "traits": {"email": "jane@acme.test"}}));
    attempts(&context, &close, &desired).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["create_lead"]);
    let cached = context.id_cache.contacts(&Key::User("u1".into()));
    assert!(!cached.complete, "{cached:?}");
}

#[tokio::test(start_paused = true)]
async fn only_plans_that_need_a_complete_search_wait_for_it() {
    let elapsed = async |leads: &[Value], contacts: &[Value], event: Value| {
        let context = context(&rules());
        let close = FakeClose::new(&context, leads, contacts);
        let desired = desired(&context, 5, event);
        let mut attempts = attempts(&context, &close, &desired);
        let start = Instant::now();
        context.lag_guard.forget(ChangeKind::Creation, context.now(), SEARCH_LAG);
        attempts.run_once().await.ok().unwrap();
        start.elapsed()
    };
    let traits = json!({"title": "CEO", "company": {"id": "acme"}});
    let with_company = || json!({"userId": "u1", "traits": traits});
    let without_company = || json!({"userId": "u1", "traits": {"title": "CEO"}});
    let no_company = json!({"id": "lead_1", "date_created": "2026-01-01"});
    let contacts = &[janes_contact()];
    assert!(elapsed(&[acme()], contacts, with_company()).await < SEARCH_LAG, "an update");
    assert!(elapsed(&[], &[], with_company()).await >= SEARCH_LAG, "a creation");
    assert!(elapsed(&[no_company], contacts, with_company()).await >= SEARCH_LAG, "an adoption");
    assert!(elapsed(&[acme()], contacts, without_company()).await >= SEARCH_LAG, "all Contacts of a person");
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_carries_the_decision() {
    let context = context(&rules());
    let required = FieldError { path: vec!["lead".to_owned()], message: "this field is required" };
    let error = Rejection { status: 400, fields: vec![required], message: None, response: None };
    let close =
        FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(CloseError::Rejected(error)));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let outcome = attempts.retry_in_place().await;
    let (outcome, _) = attempts.conclude(outcome);
    let Outcome::Dead(DeadLetter { decision: Some(decision), .. }) = outcome else { panic!("{outcome:?}") };
    assert!(decision.starts_with("nobody_known; steps: create lead"), "{decision}");
}
