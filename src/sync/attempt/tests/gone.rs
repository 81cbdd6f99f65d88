//! A person deletes or merges the Lead of a message between its look-up and its write.

use super::person::Edit;
use super::*;
use crate::sync::recent_records::MOMENT;

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
