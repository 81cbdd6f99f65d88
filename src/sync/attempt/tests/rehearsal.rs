//! A rehearsal decides as the worker would, leaves no trace, and does not wait.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::*;
use crate::close::{Client, Lookup, Records, Response, Transport};
use crate::domain::journal::RecordId;
use crate::domain::record::FieldId;
use crate::sync::id_cache::Change;

/// The outcome of a rehearsal, its decision, and how long it took. Asserts that it writes nothing and leaves no trace.
async fn rehearse(context: &Context, close: &FakeClose, event: &Desired) -> (Outcome, Decision, Duration) {
    let (before, written, start) = (context.memories(), close.written(), Instant::now());
    let rehearsal = context.for_rehearsal();
    let mut attempts = attempts(&rehearsal, close, event);
    let outcome = attempts.retry_in_place().await;
    let (outcome, decision) = attempts.conclude(outcome);
    assert_eq!(context.memories(), before);
    assert_eq!(close.written(), written);
    (outcome, decision, start.elapsed())
}

async fn run(context: &Context, close: &FakeClose, event: &Desired) -> (Outcome, Decision) {
    let mut attempts = attempts(context, close, event);
    let outcome = attempts.retry_in_place().await;
    attempts.conclude(outcome)
}

fn title(context: &Context, second: i64) -> Desired {
    let event = json!({"userId": "u1", "traits": {"title": "CEO", "company": {"id": "acme"}}});
    desired(context, second, event)
}

/// Rehearses each event, then runs it. Returns the outcomes.
async fn rehearse_and_run(context: &Context, close: &FakeClose, events: &[Desired]) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for event in events {
        let (rehearsed, planned, _) = rehearse(context, close, event).await;
        let (outcome, decision) = run(context, close, event).await;
        assert_eq!(rehearsed, outcome);
        assert_eq!((&planned.plan, &planned.look_ups), (&decision.plan, &decision.look_ups));
        outcomes.push(outcome);
    }
    outcomes
}

#[tokio::test(start_paused = true)]
async fn a_rehearsal_decides_as_the_worker_and_leaves_no_trace() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[]).with_search_lag(SEARCH_LAG);
    let events = [jane(&context, 5), title(&context, 6), title(&context, 6), title(&context, 1)];
    let outcomes = rehearse_and_run(&context, &close, &events).await;
    let effects = [Effect::Added, Effect::Updated, Effect::Unchanged, Effect::Unchanged];
    assert_eq!(outcomes, effects.map(Outcome::Synced));
}

#[tokio::test(start_paused = true)]
async fn what_search_shows_to_a_rehearsal_teaches_the_worker_nothing() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let lead = RecordId::Lead(LeadId::new("lead_1"));
    let change = Change { kind: ChangeKind::KeyChange, at: context.now() };
    context.id_cache.changed(&[KeyHash::of(&Key::Company("acme".into()))], &lead, change);
    rehearse(&context, &close, &title(&context, 5)).await;
    assert_eq!(context.lag_guard.shows_up_to(ChangeKind::KeyChange), None);
    run(&context, &close, &title(&context, 5)).await;
    assert!(context.lag_guard.shows_up_to(ChangeKind::KeyChange).is_some());
}

#[tokio::test(start_paused = true)]
async fn records_that_are_gone_leave_no_trace() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    run(&context, &close, &title(&context, 5)).await;
    close.state(|state| {
        state.search_shows = Some((state.records.clone(), Instant::now() + SEARCH_LAG * 10));
        state.records.contacts.clear();
        state.records.leads.clear();
    });
    for _ in 0..3 {
        tokio::time::sleep(SEARCH_LAG).await;
        let (outcome, ..) = rehearse(&context, &close, &title(&context, 6)).await;
        assert_eq!(outcome, Outcome::Synced(Effect::Created));
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_rehearsal_leaves_no_trace() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    run(&context, &close, &title(&context, 5)).await;
    // Close does not show the Lead that it has just shown.
    close.state(|state| state.records.leads.clear());
    let (before, rehearsal) = (context.memories(), context.for_rehearsal());
    let event = title(&context, 6);
    let mut attempts = attempts(&rehearsal, &close, &event);
    let failing = tokio::time::timeout(Duration::from_secs(10), attempts.retry_in_place()).await;
    assert!(failing.is_err() && rehearsal.last_failure().is_some());
    assert_eq!(context.memories(), before);
}

/// Every search finds nothing.
struct EmptySearch;

impl Transport for EmptySearch {
    fn send<'a>(
        &'a self,
        _: reqwest::Method,
        _: &'a str,
        _: Option<&'a Value>,
        _: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        std::future::ready(Ok(Response::with_status(200, json!({"data": []})))).boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_look_up_that_waits_for_a_search_does_not_ride_along_in_a_rehearsal() {
    let mut context = context(&rules());
    context.client = Client::with_transport(EmptySearch, TIMEOUT, 1.0, |_| {});
    let field = FieldId::new("cf_c");
    let lookup = Lookup::Lead { field: field.clone(), company_id: "rider".into() };
    let mut rider = Box::pin(context.client.ride_along(lookup, true));
    assert!((&mut rider).now_or_never().is_none(), "it starts no search");
    context.for_rehearsal().client.find_leads(&field, "acme").await.unwrap();
    assert!((&mut rider).now_or_never().is_none(), "it rode along");
    context.client.find_leads(&field, "acme").await.unwrap();
    assert_eq!(rider.await, Some(Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn a_rehearsal_does_not_wait_for_a_lock() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let records = vec!["lead_1".to_owned(), "cont_1".to_owned()];
    let _guard = context.record_locks.lock(records, Instant::now()).await.unwrap();
    let (outcome, _, took) = rehearse(&context, &close, &title(&context, 5)).await;
    assert_eq!(outcome, Outcome::Synced(Effect::Updated));
    assert!(took < LATENCY * 10, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_rehearsal_says_that_the_worker_would_wait_for_search() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]);
    let event = jane(&context, 5);
    context.lag_guard.forget(ChangeKind::Creation, context.now(), SEARCH_LAG);
    let (outcome, decision, took) = rehearse(&context, &close, &event).await;
    assert_eq!((outcome, decision.awaits_search), (Outcome::Synced(Effect::Created), true));
    assert!(took < LATENCY * 10, "{took:?}");
    tokio::time::sleep(SEARCH_LAG).await;
    let (outcome, decision, _) = rehearse(&context, &close, &event).await;
    assert_eq!((outcome, decision.awaits_search), (Outcome::Synced(Effect::Created), false));
}

#[tokio::test(start_paused = true)]
async fn a_rehearsal_asks_the_event_log_about_a_creation_without_an_answer() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_search_lag(SEARCH_LAG * 100);
    let event = jane(&context, 5);
    let (keys, sent) = (KeyHash::of_all(&event.identity.keys()), context.now());
    context.lag_guard.begin(Uuid::nil(), keys, true, sent);
    let (outcome, decision, took) = rehearse(&context, &close, &event).await;
    assert_eq!((outcome, decision.awaits_search), (Outcome::Synced(Effect::Created), true));
    assert!(took < LATENCY * 10, "{took:?}");
    // It happened.
    let InMemoryRecords { leads, contacts, .. } = InMemoryRecords::read(&[acme()], &[janes_contact()]);
    close.state(|state| {
        state.records = InMemoryRecords::read(&[acme()], &[janes_contact()]);
        let (leads, contacts) = (leads.into_values().collect(), contacts.into_values().collect());
        state.event_log = Created { leads, contacts, complete: true };
    });
    let (outcome, decision, took) = rehearse(&context, &close, &event).await;
    assert_eq!((outcome, decision.awaits_search), (Outcome::Synced(Effect::Updated), false));
    assert!(took < LATENCY * 10, "{took:?}");
}
