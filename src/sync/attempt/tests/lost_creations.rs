//! A creation whose answer is lost: what settles it, and what does not.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_creation_without_an_answer_is_pending_and_not_cached() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    let failure = attempts(&context, &close, &desired).run_once().await.err().unwrap();
    assert_eq!(failure, Failure { stage: Stage::Write, error: timed_out() });
    assert_eq!(pending(&context, &desired).len(), 1);
    // From the end of the call, not from its start.
    assert_eq!(context.lag_guard.pending()[0].1.ends, context.now() + TIMEOUT);
    assert_eq!(context.id_cache.lead("acme"), None);
    assert_eq!(context.record_locks.locked(), [""; 0], "the locks are released");
}

#[tokio::test(start_paused = true)]
async fn a_creation_without_an_answer_is_not_repeated_while_search_lags() {
    let context = context(&rules());
    let lag = SEARCH_LAG.saturating_sub(Duration::from_secs(1));
    let close =
        FakeClose::new(&context, &[], &[]).with_search_lag(lag).with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    let start = Instant::now();
    let outcome = attempts(&context, &close, &desired).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.written(), ["create_lead"]);
    assert_eq!(close.records().leads.len(), 1);
    assert!(start.elapsed() >= lag, "waited only {:?}", start.elapsed());
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_new1")));
    assert_eq!(counter(&context, "duplicates_avoided_total"), 1);
}

/// The event log shows all records, created now.
fn show_in_event_log(context: &Context, close: &FakeClose) {
    let now = context.now().to_string();
    close.state(|state| {
        let InMemoryRecords { leads, contacts, .. } = &mut state.records;
        for lead in leads.values_mut() {
            lead.date_created.clone_from(&now);
        }
        for contact in contacts.values_mut() {
            contact.date_created.clone_from(&now);
        }
        state.event_log.leads = leads.values().cloned().collect();
        state.event_log.contacts = contacts.values().cloned().collect();
    });
}

/// The records that a checkpoint repeats because search does not show them yet.
fn unseen(context: &Context) -> Vec<String> {
    let records = context.checkpoint().filter_map(|entry| {
        let Entry::Keys { record, .. } = entry else { return None };
        Some(String::from(record))
    });
    records.collect::<BTreeSet<_>>().into_iter().collect()
}

#[tokio::test(start_paused = true)]
async fn the_event_log_ends_the_wait_for_a_pending_creation() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[])
        .with_search_lag(SEARCH_LAG)
        .with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    attempts(&context, &close, &desired).run_once().await.err().unwrap();
    show_in_event_log(&context, &close);

    let start = Instant::now();
    let completed = attempts(&context, &close, &desired).run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
    assert!(start.elapsed() < Duration::from_secs(1), "waited {:?}", start.elapsed());
    assert_eq!(
        unseen(&context),
        ["cont_new2", "lead_new1"],
        "search does not show them to the next worker either"
    );
}

/// A failed attempt must not count what it has found as known before.
#[tokio::test(start_paused = true)]
async fn the_next_worker_knows_what_a_failed_attempt_has_found() {
    let context = context(&rules());
    let close = FakeClose::losing_an_answer(&context);
    let email_only = desired(&context, 5, json!({"traits": {"email": "jane@acme.test"}}));
    attempts(&context, &close, &email_only).run_once().await.err().unwrap();
    show_in_event_log(&context, &close);
    close.state(|state| state.read_faults.push_back(timed_out()));

    let jane = jane(&context, 6);
    let mut attempts = attempts(&context, &close, &jane);
    attempts.run_once().await.err().unwrap();
    attempts.run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["create_lead", "update_lead", "update_contact"]);
    assert_eq!(unseen(&context), ["cont_new2", "lead_new1"]);
    assert_eq!(pending(&context, &email_only), [""; 0]);
}

/// A person takes the company id from a Lead while a creation is under way, or makes a Lead. It is as new as the one that is
/// created, and would be adopted.
#[tokio::test(start_paused = true)]
async fn a_lead_without_the_company_does_not_settle_a_pending_creation() {
    for was_known in [true, false] {
        let context = context(&rules());
        let close = FakeClose::losing_an_answer(&context);
        let theirs = |state: &mut State, company| {
            let lead = crate::domain::matching::tests::lead("lead_1", company);
            let contact = crate::domain::matching::tests::contact("cont_1", "lead_1", Some("u1"), None);
            state.records.leads.insert(lead.id.clone(), lead);
            state.records.contacts.insert(contact.id.clone(), contact);
        };
        if was_known {
            context.id_cache.remember_contacts(Key::User("u1".into()), vec![ContactId::new("cont_1")], false);
            close.state(|state| theirs(state, Some("other")));
        }
        let jane = jane(&context, 5);
        attempts(&context, &close, &jane).run_once().await.err().unwrap();
        close.state(|state| {
            theirs(state, None);
            if !was_known {
                let until = state.search_shows.as_ref().unwrap().1;
                let mut shown = state.records.clone();
                shown.leads.retain(|id, _| id.as_str() == "lead_1");
                shown.contacts.retain(|id, _| id.as_str() == "cont_1");
                state.search_shows = Some((shown, until));
            }
        });
        show_in_event_log(&context, &close);

        attempts(&context, &close, &jane).run_once().await.ok().unwrap();
        assert_eq!(close.written()[0], "create_lead");
        assert_eq!(close.lead("lead_1").fields.len(), 0, "not adopted: {was_known}");
    }
}

/// The one that was created is known by its email, and the user id leads to another one.
#[tokio::test(start_paused = true)]
async fn a_contact_that_a_look_up_did_not_read_is_found_in_the_event_log() {
    let context = context(&rules());
    let theirs = json!({"id": "cont_2", "lead_id": "lead_2", "date_created": "2026-01-01",
        "custom.cf_user": "u1", "emails": [{"type": "office", "email": "jane@acme.test"}]});
    let close = FakeClose::new(&context, &[acme(), json!({"id": "lead_2"})], &[janes_contact(), theirs]);
    let nothing = InMemoryRecords::default();
    close.state(|state| state.search_shows = Some((nothing, Instant::now() + LONGEST_SEARCH_LAG)));
    let jane = json!({"userId": "u1", "traits": {"email": "jane@acme.test", "title": "CEO"}});
    let jane = desired(&context, 5, jane);
    let change = Change { kind: ChangeKind::Creation, at: context.now() };
    for (key, id) in jane.identity.person().zip(["cont_1", "cont_2"]) {
        context.id_cache.changed(&[KeyHash::of(&key)], &RecordId::Contact(ContactId::new(id)), change);
    }
    let keys = KeyHash::of_all(&jane.identity.keys());
    context.lag_guard.begin(Uuid::from_u128(1), keys, false, context.now());
    show_in_event_log(&context, &close);
    close.state(|state| state.event_log.complete = true);
    attempts(&context, &close, &jane).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_contact", "update_contact"]);
}

/// Search has shown a younger creation, and would prove that the one without an answer did not happen. It did, and the
/// event log shows it.
async fn search_proves_too_much(context: &Context, close: &FakeClose, event: &Desired) {
    show_in_event_log(context, close);
    tokio::time::sleep(TIMEOUT + 2 * SEARCH_LAG).await;
    context.lag_guard.shown(ChangeKind::Creation, context.now(), Instant::now());
    let keys = KeyHash::of_all(&event.identity.keys());
    assert_eq!(context.lag_guard.gap(&keys, Instant::now(), None), None, "it counts as shown");
}

#[tokio::test(start_paused = true)]
async fn the_event_log_is_asked_before_search_counts() {
    for faults in [0, 3] {
        let context = context(&rules());
        let close = FakeClose::losing_an_answer(&context);
        let jane = jane(&context, 5);
        attempts(&context, &close, &jane).run_once().await.err().unwrap();
        search_proves_too_much(&context, &close, &jane).await;
        close.state(|state| state.event_log_faults.extend(vec![timed_out(); faults]));
        let completed = attempts(&context, &close, &jane).run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
        assert_eq!(close.written(), ["create_lead"], "{faults}");
        assert_eq!(counter(&context, "duplicates_avoided_total"), 1);
    }
}

/// The wait ends when the event log would show the creation.
#[tokio::test(start_paused = true)]
async fn search_alone_counts_when_the_event_log_does_not_answer() {
    let context = context(&rules());
    let close = FakeClose::losing_an_answer(&context);
    let jane = jane(&context, 5);
    attempts(&context, &close, &jane).run_once().await.err().unwrap();
    search_proves_too_much(&context, &close, &jane).await;
    close.state(|state| state.event_log_faults.extend(vec![timed_out(); 100]));
    let began = Instant::now();
    attempts(&context, &close, &jane).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["create_lead", "create_lead"]);
    let (waited, calls) = (began.elapsed(), close.state(|state| state.event_log_calls));
    assert!(waited + 3 * SEARCH_LAG > EVENT_LOG_LAG && calls < 15, "{waited:?}, {calls} calls");
}

#[tokio::test(start_paused = true)]
async fn the_event_log_is_asked_before_a_lead_is_adopted() {
    let context = context(&rules());
    let lead = json!({"id": "lead_2", "date_created": "2026-01-01"});
    let contact = json!({"id": "cont_2", "lead_id": "lead_2", "date_created": "2026-01-01",
        "custom.cf_user": "u2", "emails": []});
    let close = FakeClose::new(&context, &[lead], &[contact])
        .with_search_lag(Duration::from_hours(1))
        .with_fault(WriteFault::After(timed_out()));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    let company = json!({"id": "acme", "name": "Acme"});
    let bob = desired(&context, 6, json!({"userId": "u2", "traits": {"company": company}}));
    search_proves_too_much(&context, &close, &bob).await;
    attempts(&context, &close, &bob).run_once().await.ok().unwrap();
    assert_eq!(close.lead("lead_2").fields.len(), 0, "not adopted");
}

/// The person has Contacts in Leads of other companies. A failed attempt must not ask about them from the beginning.
#[tokio::test(start_paused = true)]
async fn an_attempt_goes_on_where_a_failed_one_stopped_to_ask_the_event_log() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[])
        .with_search_lag(Duration::from_hours(1))
        .with_fault(WriteFault::Before(timed_out()));
    let jane = jane(&context, 5);
    attempts(&context, &close, &jane).run_once().await.err().unwrap();
    let elsewhere = |number: usize| {
        let (lead, contact) = (format!("lead_{number}"), format!("cont_{number}"));
        (
            crate::domain::matching::tests::lead(&lead, Some("other")),
            crate::domain::matching::tests::contact(&contact, &lead, Some("u1"), None),
        )
    };
    close.state(|state| {
        for (lead, contact) in (0..3).map(elsewhere) {
            state.records.leads.insert(lead.id.clone(), lead);
            state.records.contacts.insert(contact.id.clone(), contact);
        }
    });
    show_in_event_log(&context, &close);
    tokio::time::sleep(TIMEOUT + EVENT_LOG_LAG).await;

    // They fail when they look at what the event log has shown.
    let mut attempts = attempts(&context, &close, &jane);
    for _ in 0..3 {
        close.state(|state| state.read_faults.push_back(timed_out()));
        attempts.run_once().await.err().unwrap();
    }
    attempts.run_once().await.ok().unwrap();
    assert_eq!(close.state(|state| state.event_log_calls), 4);
}

/// A search that was sent while this one was under way may have been answered from an older state.
#[tokio::test(start_paused = true)]
async fn a_search_proves_nothing_about_one_that_was_sent_before_its_answer() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    context.lag_guard.forget(ChangeKind::Creation, context.now() - 2 * SEARCH_LAG, Duration::from_hours(1));
    let record = RecordId::Contact(ContactId::new("cont_1"));
    let key = KeyHash::of(&Key::User("u1".into()));
    let change = Change { kind: ChangeKind::Creation, at: context.now() };
    context.id_cache.changed(&[key], &record, change);
    let jane = desired(&context, 5, json!({"userId": "u1", "traits": {"name": "Jane"}}));
    let during = Instant::now() + LATENCY / 2;
    attempts(&context, &close, &jane).run_once().await.ok().unwrap();
    assert_eq!(context.lag_guard.gap(&[key], Instant::now(), None), None, "search has caught up");
    assert!(context.lag_guard.gap(&[key], during, None).is_some());
}

/// Each look-up costs searches.
#[tokio::test(start_paused = true)]
async fn creations_of_others_do_not_repeat_a_look_up() {
    let context = context(&rules());
    let close = FakeClose::losing_an_answer(&context);
    let desired = jane(&context, 5);
    attempts(&context, &close, &desired).run_once().await.err().unwrap();
    let others = async {
        for operation in (10..).map(Uuid::from_u128) {
            let keys = vec![KeyHash::of(&Key::User("other".into()))];
            context.lag_guard.begin(operation, keys, true, context.now());
            context.lag_guard.settle(operation);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let mut attempts = attempts(&context, &close, &desired);
    let both = async { tokio::join!(attempts.run_once(), others) };
    assert!(tokio::time::timeout(Duration::from_mins(1), both).await.is_err(), "it waits for search");
    let looks = counter(&context, "lag_guard_waits_total");
    assert!((2..8).contains(&looks), "{looks} look-ups in a minute");
}

/// Each question costs many calls.
#[tokio::test(start_paused = true)]
async fn an_event_log_that_is_too_long_is_not_asked_again_and_again() {
    let context = context(&rules());
    let close = FakeClose::losing_an_answer(&context);
    let desired = jane(&context, 5);
    attempts(&context, &close, &desired).run_once().await.err().unwrap();
    assert!(!close.state(|state| state.event_log.complete));
    let mut attempts = attempts(&context, &close, &desired);
    let half_an_hour = tokio::time::timeout(Duration::from_mins(30), attempts.run_once()).await;
    assert!(half_an_hour.is_err(), "it waits for search");
    assert_eq!(close.state(|state| state.event_log_calls), 2, "at first, and once it must show");
}

#[tokio::test(start_paused = true)]
async fn a_colleague_who_finds_the_lead_of_a_pending_creation_does_not_settle_it_for_the_person() {
    let context = context(&rules());
    let close = FakeClose::losing_an_answer(&context);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    let InMemoryRecords { leads, contacts, .. } = close.records();
    close.state(|state| {
        state.event_log.leads = leads.into_values().collect();
        state.event_log.contacts = contacts.into_values().collect();
    });

    let company = json!({"id": "acme", "name": "Acme"});
    let colleague = desired(&context, 6, json!({"userId": "u9", "traits": {"company": company}}));
    let completed = attempts(&context, &close, &colleague).run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Added));
    let without_company =
        desired(&context, 7, json!({"userId": "u1", "traits": {"email": "jane@acme.test"}}));
    attempts(&context, &close, &without_company).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["create_lead", "create_contact"]);
    assert_eq!(close.records().leads.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_creation_stays_pending() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Slow(TIMEOUT));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    tokio::time::timeout(Duration::from_secs(1), attempts.run_once()).await.err().unwrap();
    assert_eq!(close.written(), ["create_lead"], "the call was sent");
    let ends = context.lag_guard.pending()[0].1.ends;
    assert!(ends > context.now(), "the call may take effect until it times out");
}

/// The journal may take minutes, so a creation does not begin when it is written down.
#[tokio::test(start_paused = true)]
async fn a_creation_that_is_dropped_after_a_wait_for_the_journal_may_still_happen() {
    struct Slow;
    impl Journal for Slow {
        fn append(&self, _: Vec<Entry>) {}

        fn stored(&self) -> BoxFuture<'_, ()> {
            Box::pin(std::future::ready(()))
        }

        fn read_back(&self) -> BoxFuture<'_, ()> {
            Box::pin(tokio::time::sleep(Duration::from_mins(5)))
        }
    }
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Slow(Duration::from_hours(1)));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    attempts.run.journal = JournalHandle::new(Arc::new(Slow));
    let dropped = tokio::time::timeout(Duration::from_secs(301), attempts.run_once()).await;
    assert!(dropped.is_err() && close.written() == ["create_lead"]);
    assert!(context.lag_guard.pending()[0].1.ends > context.now(), "{:?}", context.lag_guard);
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_close_refused_is_not_pending() {
    let rejected = rejection(&[&["custom.cf_company"]]);
    for error in [rejected, CloseError::Transient(Fault::Status(503)), CloseError::Forbidden] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
        let desired = jane(&context, 5);
        let failure = attempts(&context, &close, &desired).run_once().await.err().unwrap();
        assert_eq!(failure.error, error);
        assert_eq!(pending(&context, &desired), [""; 0], "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_waits_after_a_429_is_not_pending() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Busy);
    close.state(|state| state.budget_wait = Duration::from_secs(10));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    tokio::time::timeout(Duration::from_secs(15), attempts.run_once()).await.err().unwrap();
    assert_eq!(close.written(), ["create_lead"], "the second call waits");
    assert_eq!(pending(&context, &desired), [""; 0]);
}
