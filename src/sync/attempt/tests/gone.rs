//! A person deletes or merges the Lead of a message between its look-up and its write.

use super::person::Edit;
use super::*;
use crate::close::MOMENT;

/// A Lead of the company.
fn lead(id: &str) -> Value {
    let mut lead = acme();
    lead["id"] = json!(id);
    lead
}

#[tokio::test(start_paused = true)]
async fn a_person_who_merges_one_lead_after_another_costs_no_message() {
    let mut context = context(&rules());
    context.settings.retry.in_place = Duration::from_mins(10);
    let leads = ["lead_1", "lead_2", "lead_3", "lead_4"].map(lead);
    // A Lead that was read a moment ago is not gone yet.
    let wait = MOMENT + Duration::from_secs(5);
    let close = (0..3).fold(FakeClose::new(&context, &leads, &[janes_contact()]), |close, merged| {
        close.with_edit(wait * merged + wait / 2, Edit::MergeLead)
    });
    let close = close.with_budget_wait(wait);
    let desired = jane(&context, 5);
    let outcome = attempts(&context, &close, &desired).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Updated));
    assert_eq!(close.written().iter().filter(|step| **step == "update_lead").count(), 4);
    let contact = close.contact("cont_1");
    assert_eq!(contact.lead_id, Some(LeadId::new("lead_4")));
    assert_eq!(close.lead("lead_4").fields[&Field::Name], json!("Acme"));
}

/// Jane's event. It changes nothing of the Lead, so that the first write is that of her Contact.
fn jane_only(context: &Context) -> Desired {
    let traits = json!({"name": "Jane Doe", "email": "jane@acme.test", "phone": PHONES[0], "title": "CEO",
        "company": {"id": "acme"}});
    desired(context, 5, json!({"userId": "u1", "traits": traits}))
}

/// Reads still show a Lead that a person has merged, and Close does not say why it refuses the Contact.
#[tokio::test(start_paused = true)]
async fn a_contact_refused_without_a_reason_goes_to_the_lead_that_there_is() {
    let context = context(&rules());
    context.id_cache.remember_lead("acme", LeadId::new("lead_1"));
    let close = FakeClose::new(&context, &[lead("lead_1"), lead("lead_2")], &[])
        .with_read_lag(Duration::from_secs(3));
    close.state(|state| {
        state.names_no_field = true;
        state.past.push((Instant::now(), state.records.clone()));
        state.records.leads.remove(&LeadId::new("lead_1"));
    });
    let desired = jane_only(&context);
    let mut attempts = attempts(&context, &close, &desired);
    let outcome = attempts.retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Added));
    let contact = close.records().contacts.into_values().next().unwrap();
    assert_eq!(contact.lead_id, Some(LeadId::new("lead_2")));
    assert_eq!((phones(&contact), &contact.fields[&Field::Title]), (vec![PHONES[0]], &json!("CEO")));
    assert!(attempts.decision.dropped.is_empty(), "the values were not the reason");
}

#[tokio::test(start_paused = true)]
async fn a_contact_refused_without_a_reason_is_rejected_if_its_lead_exists() {
    let context = context(&rules());
    let refusals = 10;
    let close = (0..refusals).fold(FakeClose::new(&context, &[lead("lead_1")], &[]), |close, _| {
        close.with_fault(WriteFault::Before(rejection(&[])))
    });
    let desired = jane_only(&context);
    let failure = attempts(&context, &close, &desired).run_once().await.err().unwrap();
    assert_eq!(failure.error, rejection(&[]));
    assert!(close.written().len() > 1 && close.written().len() < refusals);
    assert!(close.written().iter().all(|step| *step == "create_contact"));
}
