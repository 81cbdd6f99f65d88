//! Close rejects writes and names no field.

use super::*;

const WAIT: Duration = Duration::from_secs(3);

/// The fields that Close refused in this attempt.
fn refused(decision: &Decision) -> Vec<&str> {
    let refused = decision.dropped.iter().filter(|dropped| dropped.reason == DropReason::Refused);
    refused.map(|dropped| dropped.field.as_str()).collect()
}

fn vague() -> WriteFault {
    WriteFault::Before(rejection(&[]))
}

#[tokio::test(start_paused = true)]
async fn a_creation_is_repeated_without_lists_then_without_fields() {
    for (refusals, expected) in [(1, &["phones"][..]), (2, &["phones", "custom.cf_plan"])] {
        let context = context(&rules());
        let close =
            (0..refusals).fold(FakeClose::new(&context, &[], &[]), |close, _| close.with_fault(vague()));
        let desired = jane(&context, 5);
        let mut attempts = attempts(&context, &close, &desired);
        let completed = attempts.run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
        assert_eq!(refused(&attempts.decision), expected);
        assert_eq!(close.written().len(), refusals + 1);
        let (lead, contact) = (close.lead("lead_new1"), close.contact("cont_new2"));
        assert_eq!(lead.fields[&Field::Name], json!("Acme"), "a name is needed to recognize the record");
        assert_eq!(lead.custom(&FieldId::new("cf_company")), Some("acme"));
        assert_eq!(lead.custom(&FieldId::new("cf_plan")), (refusals == 1).then_some("pro"));
        assert_eq!(
            (contact.custom(&FieldId::new("cf_user")), contact.list(Channel::Phone).len()),
            (Some("u1"), 0)
        );
        assert!(contact.has(Channel::Email, "jane@acme.test", None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_phone_costs_no_title_of_later_events() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_fault(vague());
    for (second, title) in (1..).zip(["T1", "T2", "T3"]) {
        let traits = json!({"title": title, "phone": PHONES[0], "company": {"id": "acme"}});
        let desired = desired(&context, second, json!({"userId": "u1", "traits": traits}));
        let completed = attempts(&context, &close, &desired).run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Updated), "{title}");
        assert_eq!(close.contact("cont_1").fields[&Field::Title], json!(title));
    }
    assert_eq!(close.written().len(), 4, "the phone is sent once");
}

/// The fields in Close change, so that refused values are tried again, while a message about the record is under way.
#[tokio::test(start_paused = true)]
async fn a_message_in_flight_does_not_bring_back_refusals_that_were_forgotten() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_fault(vague());
    let event = |second, title: &str| {
        let traits = json!({"title": title, "phone": PHONES[0], "company": {"id": "acme"}});
        desired(&context, second, json!({"userId": "u1", "traits": traits}))
    };
    attempts(&context, &close, &event(1, "T1")).run_once().await.ok().unwrap();
    assert!(phones(&close.contact("cont_1")).is_empty());
    let second = event(2, "T2");
    let mut in_flight = attempts(&context, &close, &second);
    let forget = async {
        close.state(|state| state.budget_wait = WAIT);
        tokio::time::sleep(WAIT / 2).await;
        context.version_cache.forget_refusals();
    };
    let (completed, ()) = tokio::join!(in_flight.run_once(), forget);
    completed.ok().unwrap();
    assert!(phones(&close.contact("cont_1")).is_empty(), "it was planned before");
    attempts(&context, &close, &event(3, "T3")).run_once().await.ok().unwrap();
    assert_eq!(phones(&close.contact("cont_1")), [PHONES[0]]);
}

#[tokio::test(start_paused = true)]
async fn an_update_of_which_nothing_remains_is_settled_and_not_sent_again() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_fault(vague());
    let event = json!({"userId": "u1", "traits": {"plan": "pro", "company": {"id": "acme"}}});
    let desired = desired(&context, 5, event);
    let mut first = attempts(&context, &close, &desired);
    let outcome = first.run_once().await.ok().unwrap().outcome;
    assert_eq!(
        (outcome, refused(&first.decision)),
        (Outcome::Synced(Effect::Unchanged), vec!["custom.cf_plan"])
    );
    let mut second = attempts(&context, &close, &desired);
    assert_eq!(second.run_once().await.ok().unwrap().outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!((second.decision.dropped[0].reason, close.written().len()), (DropReason::RefusedBefore, 1));
}
