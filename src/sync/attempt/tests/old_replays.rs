//! Replays of events that are older than what the worker remembers.

use super::*;

/// Writes by events of this time or later are remembered.
const REMEMBERED_FROM: i64 = 100;

fn context_with_short_memory() -> Context {
    let context = context(&rules());
    context.version_cache.remembers_from(at(REMEMBERED_FROM));
    context
}

/// Jane and her company, as somebody left them at this second.
fn close(context: &Context, changed: i64) -> FakeClose {
    let changed = at(changed).to_string();
    let (mut lead, mut contact) = (acme(), janes_contact());
    contact["title"] = "New".into();
    lead["date_updated"] = changed.as_str().into();
    contact["date_updated"] = changed.as_str().into();
    FakeClose::new(context, &[lead], &[contact])
}

fn replay(context: &Context, second: i64, traits: Value) -> Desired {
    let mut event = json!({"userId": "u1", "traits": traits});
    event["traits"]["company"] = json!({"id": "acme"});
    Desired { is_replay: true, ..desired(context, second, event) }
}

async fn run(context: &Context, close: &FakeClose, event: &Desired) {
    attempts(context, close, event).run_once().await.ok().unwrap();
}

fn title(close: &FakeClose) -> Value {
    close.contact("cont_1").fields[&Field::Title].clone()
}

#[tokio::test(start_paused = true)]
async fn an_old_replay_changes_no_field_of_a_record_that_has_changed_since() {
    for (second, changed, is_replay, is_written) in [
        (5, 50, true, false),
        (5, 50, false, true),
        // The record has not changed since.
        (60, 50, true, true),
        // All later events are remembered, and none set the field.
        (REMEMBERED_FROM, 500, true, true),
        (REMEMBERED_FROM - 1, 500, true, false),
    ] {
        let context = context_with_short_memory();
        let close = close(&context, changed);
        let event = replay(&context, second, json!({"title": "Old", "plan": "pro", "phone": "+18004445555"}));
        run(&context, &close, &Desired { is_replay, ..event }).await;
        let expected = if is_written { "Old" } else { "New" };
        assert_eq!(title(&close), json!(expected), "{second} {changed} {is_replay}");
        assert_eq!(close.lead("lead_1").fields[&Field::Custom(FieldId::new("cf_plan"))], json!("pro"));
        assert_eq!(close.contact("cont_1").list(Channel::Phone).len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stored_time_decides_for_its_record() {
    let mut rules = rules();
    rules.contact.synced_at = Some(FieldRef::new("cf_contact_at"));
    let context = context(&rules);
    context.version_cache.remembers_from(at(REMEMBERED_FROM));
    let close = close(&context, 50);
    close.state(|state| {
        let contact = state.records.contacts.get_mut(&ContactId::new("cont_1")).unwrap();
        let synced_at = Field::Custom(FieldId::new("cf_contact_at"));
        contact.fields.insert(synced_at, time::format_timestamp(at(4)).into());
    });
    run(&context, &close, &replay(&context, 5, json!({"title": "Newer"}))).await;
    assert_eq!(title(&close), json!("Newer"));
}

#[tokio::test(start_paused = true)]
async fn replays_of_one_person_in_order_are_all_written() {
    let context = context_with_short_memory();
    let close = close(&context, 50);
    for (second, traits) in [
        (60, json!({"title": "First"})),
        (61, json!({"title": "Second"})),
        // The record has changed since, by these replays alone.
        (62, json!({"name": "Jane Doe"})),
    ] {
        run(&context, &close, &replay(&context, second, traits)).await;
        tokio::time::sleep(LATENCY).await;
    }
    assert_eq!(title(&close), json!("Second"));
    assert_eq!(close.contact("cont_1").fields[&Field::Name], json!("Jane Doe"));
    run(&context, &close, &replay(&context, 59, json!({"title": "Before"}))).await;
    assert_eq!(title(&close), json!("Second"));
}

/// Jane was New, then Other, then New again. Only the last is not among the replays.
#[tokio::test(start_paused = true)]
async fn an_equal_value_does_not_tell_when_it_was_set() {
    let context = context_with_short_memory();
    let close = close(&context, 50);
    for (second, value) in [(5, "New"), (6, "Other")] {
        run(&context, &close, &replay(&context, second, json!({"title": value}))).await;
        assert_eq!(title(&close), json!("New"));
    }
    let found = contact_versions(&context, close.contact("cont_1"));
    assert!(found.fields.is_empty());
}
