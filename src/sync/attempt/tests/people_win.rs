//! What a person enters while a message is under way is kept: one test for each moment.

use super::person::Edit;
use super::*;
use crate::domain::decision::LookUp;
use crate::domain::mapping::WriteRule;

const WAIT: Duration = Duration::from_secs(3);
const THEIR_PHONE: &str = "+18005550000";

pub(super) fn title_if_empty() -> Rules {
    let mut rules = rules();
    rules.contact.fields.get_mut(&Field::Title).unwrap().write = WriteRule::IfEmpty;
    rules
}

/// Jane's event with a phone number and a title.
async fn sync_jane(context: &Context, close: &FakeClose) {
    let traits = json!({"email": "jane@acme.test", "phone": "+18004445555", "title": "CEO",
        "company": {"id": "acme", "name": "Acme"}});
    let desired = desired(context, 5, json!({"userId": "u1", "traits": traits}));
    let outcome = attempts(context, close, &desired).retry_in_place().await;
    assert!(matches!(outcome, Outcome::Synced(_)), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_the_write_waits_is_kept() {
    for after in (1..30).map(|n| n * Duration::from_millis(100)) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_budget_wait(WAIT)
            .with_edit(after, Edit::Add(Channel::Phone, THEIR_PHONE));
        sync_jane(&context, &close).await;
        assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"], "{after:?}");
        assert_eq!(close.written(), ["update_lead", "update_contact"], "{after:?}");
    }
}

/// Close refuses the phone. While the write waits to be sent without it, a person changes the title.
#[tokio::test(start_paused = true)]
async fn a_refused_value_is_not_sent_again_when_a_person_changes_the_record() {
    for (refusal, also) in [(&[&["phones"][..]][..], None), (&[], Some("emails"))] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_budget_wait(WAIT)
            .with_fault(WriteFault::Before(rejection(refusal)))
            .with_edit(WAIT + Duration::from_secs(1), Edit::Set(Field::Title, "Chief"));
        let email = also.map(|_| "other@acme.test");
        let traits =
            json!({"phone": "+18004445555", "email": email, "title": "CEO", "company": {"id": "acme"}});
        let desired = desired(&context, 5, json!({"userId": "u1", "traits": traits}));
        let mut attempts = attempts(&context, &close, &desired);
        let outcome = attempts.retry_in_place().await;
        assert_eq!(outcome, Outcome::Synced(Effect::Updated));
        let contact = close.contact("cont_1");
        assert_eq!((&contact.fields[&Field::Title], phones(&contact)), (&json!("CEO"), vec![]));
        assert_eq!(close.written(), ["update_contact", "update_contact"]);
        let dropped = attempts.decision.dropped.iter();
        let dropped: Vec<_> = dropped.map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
        let refused = also.into_iter().chain(["phones"]).map(|field| (field, DropReason::Refused));
        assert_eq!(dropped, refused.collect::<Vec<_>>(), "each is counted once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_an_answer_is_under_way_is_kept() {
    for after in (1..30).map(|n| n * Duration::from_millis(100)) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_edit(after, Edit::Add(Channel::Phone, THEIR_PHONE));
        close.state(|state| state.answer_delay = WAIT);
        sync_jane(&context, &close).await;
        assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"], "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_close_answers_429_is_kept() {
    let context = context(&rules());
    let event = desired(&context, 5, json!({"userId": "u1", "traits": {"phone": "+18004445555"}}));
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_fault(WriteFault::Busy)
        .with_edit(WAIT + WAIT / 2, Edit::Add(Channel::Phone, THEIR_PHONE));
    attempts(&context, &close, &event).run_once().await.ok().unwrap();
    assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"]);
}

#[tokio::test(start_paused = true)]
async fn a_field_that_a_person_fills_while_the_write_waits_is_kept() {
    let context = context(&title_if_empty());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::Set(Field::Title, "Chair"));
    let event = desired(&context, 5, json!({"userId": "u1", "traits": {"title": "CEO"}}));
    let completed = attempts(&context, &close, &event).run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.contact("cont_1").fields[&Field::Title], json!("Chair"));
    assert_eq!(close.written(), [""; 0], "nothing is left to write");
}

#[tokio::test(start_paused = true)]
async fn ids_that_a_person_sets_while_the_write_waits_are_kept() {
    let company = || Field::Custom(FieldId::new("cf_company"));
    let user = || Field::Custom(FieldId::new("cf_user"));
    let context = context(&rules());
    // The Lead would be adopted, and belongs to another company by then.
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old"});
    let close = FakeClose::new(&context, &[lead], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::SetLead(company(), "globex"));
    sync_jane(&context, &close).await;
    assert_eq!(close.lead("lead_1").custom(&FieldId::new("cf_company")), Some("globex"));

    // The Contact would get the user id, and has another one by then.
    let context = super::context(&rules());
    let mut jane = janes_contact();
    jane["custom.cf_user"] = json!(null);
    let close = FakeClose::new(&context, &[acme()], &[jane])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::Set(user(), "u2"));
    sync_jane(&context, &close).await;
    assert_eq!(close.contact("cont_1").custom(&FieldId::new("cf_user")), Some("u2"));
    assert_eq!(close.records().contacts.len(), 2, "the person of the event has a Contact of their own");
}

#[tokio::test(start_paused = true)]
async fn a_record_is_read_again_only_if_the_write_waited_and_could_undo_edits() {
    let reads = async |wait: Duration, traits: Value| {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_budget_wait(wait);
        let desired = desired(&context, 5, json!({"userId": "u1", "traits": traits}));
        let mut attempts = attempts(&context, &close, &desired);
        attempts.run_once().await.ok().unwrap();
        assert_eq!(close.written(), ["update_contact"]);
        let is_read = |look_up: &&LookUp| **look_up == LookUp::Read("cont_1".into());
        attempts.decision.look_ups.iter().filter(is_read).count()
    };
    assert_eq!(reads(Duration::ZERO, json!({"phone": "+18004445555"})).await, 1, "no wait");
    assert_eq!(reads(WAIT, json!({"title": "CEO"})).await, 1, "the rule says always");
    assert_eq!(reads(WAIT, json!({"phone": "+18004445555"})).await, 2);
}
