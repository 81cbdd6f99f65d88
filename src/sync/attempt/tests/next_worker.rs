//! What is known of records that search does not show yet, in this worker and in the next one.

use super::*;

/// A search is not repeated for ten minutes. After that, search is still behind.
#[tokio::test(start_paused = true)]
async fn created_records_are_known_until_search_shows_them_without_a_restart() {
    let context = context(&rules());
    let lag = Duration::from_mins(30);
    let close = FakeClose::new(&context, &[], &[]).with_search_lag(lag);
    attempts(&context, &close, &jane(&context, 1)).run_once().await.ok().unwrap();
    let created = Instant::now();
    for event in 2..5 {
        tokio::time::advance(Duration::from_secs(642)).await;
        let other =
            json!({"userId": format!("u{event}"), "traits": {"company": {"id": "acme", "name": "Acme"}}});
        let (again, other) = (jane(&context, event), desired(&context, event, other));
        let completed = attempts(&context, &close, &again).run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
        let completed = attempts(&context, &close, &other).run_once().await.ok().unwrap();
        assert_eq!(completed.outcome, Outcome::Synced(Effect::Added));
    }
    assert_eq!(close.records().leads.len(), 1);
    assert!(created.elapsed() > lag, "the last ones came after search had caught up");
    assert_eq!(close.written(), ["create_lead", "create_contact", "create_contact", "create_contact"]);
    assert_eq!(counter(&context, "lag_guard_waits_total"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_repeats_what_search_does_not_show_with_one_entry_for_each_record() {
    let predecessor = context(&rules());
    let close = FakeClose::new(&predecessor, &[], &[]).with_search_lag(Duration::from_mins(30));
    let jane = jane(&predecessor, 1);
    attempts(&predecessor, &close, &jane).run_once().await.ok().unwrap();
    let mut n_keys = Vec::new();
    let successor = context(&rules());
    for entry in predecessor.checkpoint() {
        if let Entry::Keys { record, keys, .. } = &entry {
            n_keys.push((record.as_str().to_owned(), keys.len()));
        }
        successor.learn(entry);
    }
    assert_eq!(n_keys, [("lead_new1".to_owned(), 1), ("cont_new2".to_owned(), 2)]);
    for key in KeyHash::of_all(&jane.identity.keys()) {
        let known = predecessor.id_cache.known(&[key]);
        assert_eq!((successor.id_cache.known(&[key]), known.len()), (known, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_repeats_the_oldest_changes_first() {
    let context = context(&rules());
    for (id, second) in [("cont_a", 3), ("lead_b", 1), ("cont_c", 2)] {
        let record = RecordId::try_from(id.to_owned()).unwrap();
        let at = context.now() - jiff::SignedDuration::from_secs(10 - second);
        let keys = vec![KeyHash::of(&Key::User(id.into()))];
        context.learn(Entry::Keys { record, keys, change: ChangeKind::Creation, at });
    }
    let records = context.checkpoint().filter_map(|entry| {
        let Entry::Keys { record, .. } = entry else { return None };
        Some(String::from(record))
    });
    assert_eq!(records.collect::<Vec<_>>(), ["lead_b", "cont_c", "cont_a"]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_clock_was_ahead_does_not_make_later_events_old() {
    let context = context(&rules());
    let year = Duration::from_hours(24 * 365);
    let record = RecordId::Contact(ContactId::new("cont_1"));
    let ahead = context.now() + year;
    let fields = vec![FieldHash::of("title")];
    context.learn(Entry::Written { record, at: ahead, fields, stored: None, updated: None });
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let versions = contact_versions(&context, close.contact("cont_1"));
    assert_eq!(versions.fields[&FieldHash::of("title")], context.now());
}

/// Entries may be damaged, or written by a worker without a clock.
#[tokio::test(start_paused = true)]
async fn entries_of_any_time_are_learnt_and_repeated() {
    let context = context(&rules());
    let keys = vec![KeyHash::of(&Key::User("u1".into()))];
    let record = || RecordId::Contact(ContactId::new("cont_1"));
    let times = [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX];
    for (number, at) in (0..).zip(times) {
        for until in times {
            let (operation, fields) = (Uuid::from_u128(number), vec![FieldHash::of("title")]);
            let (stored, updated) = (Some(until), Some(until));
            for change in [ChangeKind::Creation, ChangeKind::KeyChange] {
                context.learn(Entry::Forgotten { change, at, until });
                context.learn(Entry::Keys { record: record(), keys: keys.clone(), change, at });
            }
            context.learn(Entry::Creating { operation, keys: keys.clone(), lead: true, at });
            context.learn(Entry::Written { record: record(), at, fields, stored, updated });
        }
    }
    let gap = context.lag_guard.gap(&keys, Instant::now(), None).unwrap();
    assert!(gap.clock <= Instant::now() + LONGEST_SEARCH_LAG, "no wait is longer");
    let successor = super::context(&rules());
    context.checkpoint().for_each(|entry| successor.learn(entry));
    let close = FakeClose::new(&successor, &[acme()], &[janes_contact()]);
    let jane = jane(&successor, 5);
    let mut attempts = attempts(&successor, &close, &jane);
    assert!(attempts.run_once().await.is_ok());
}

/// Close gives a Lead its company id, the answer is lost, and reads lag. Another message about the company must not take the old
/// state for the truth.
#[tokio::test(start_paused = true)]
async fn a_stale_read_after_a_lost_answer_does_not_hide_the_lead_of_the_company() {
    let context = context(&rules());
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Acme"});
    let contact = json!({"id": "cont_1", "lead_id": "lead_1", "date_created": "2026-01-01",
                         "emails": [{"type": "office", "email": "jane@acme.test"}]});
    let close = FakeClose::new(&context, &[lead], &[contact])
        .with_search_lag(Duration::from_mins(30))
        .with_read_lag(Duration::from_secs(3))
        .with_fault(WriteFault::After(timed_out()));
    let jane = jane(&context, 1);
    // The first attempt adopts the Lead.
    attempts(&context, &close, &jane).run_once().await.err().unwrap();
    let colleague = json!({"userId": "u2", "traits": {"company": {"id": "acme"}}});
    let colleague = desired(&context, 2, colleague);
    let failure = attempts(&context, &close, &colleague).run_once().await.err().unwrap();
    assert_eq!(failure.error, CloseError::Transient(Fault::NotYet));
    tokio::time::advance(Duration::from_secs(4)).await;
    let completed = attempts(&context, &close, &colleague).run_once().await;
    assert_eq!((completed.is_ok(), close.records().leads.len()), (true, 1), "{:?}", close.written());
}

/// Lets another worker create Jane's records. It has lost the queue, and does not know it yet.
fn create_elsewhere(context: &Context, close: &FakeClose) {
    let theirs = InMemoryRecords::read(&[acme()], &[janes_contact()]);
    close.state(|state| {
        state.records.leads.extend(theirs.leads);
        state.records.contacts.extend(theirs.contacts);
    });
    let (operation, at, keys) = (Uuid::from_u128(1), context.now(), jane(context, 1).identity.keys());
    let learn_keys = |id: &str, keys: &[Key]| {
        let (record, keys) = (RecordId::try_from(id.to_owned()).unwrap(), KeyHash::of_all(keys));
        context.learn(Entry::Keys { record, keys, change: ChangeKind::Creation, at });
    };
    context.learn(Entry::Creating { operation, keys: KeyHash::of_all(&keys), lead: true, at });
    learn_keys("lead_1", &keys[..1]);
    learn_keys("cont_1", &keys[1..]);
    context.learn(Entry::Settled { operation });
}

#[tokio::test(start_paused = true)]
async fn what_another_worker_has_created_since_a_look_up_is_not_created_again() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_search_lag(Duration::from_hours(1));
    close.state(|state| state.budget_wait = Duration::from_secs(1));
    let jane = jane(&context, 1);
    let mut attempts = attempts(&context, &close, &jane);
    let other = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        create_elsewhere(&context, &close);
    };
    let (first, ()) = tokio::join!(attempts.run_once(), other);
    assert_eq!(first.err().unwrap().error, CloseError::Transient(Fault::NotYet));
    assert_eq!((close.written().len(), pending(&context, &jane).len()), (0, 0));
    attempts.run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_lead", "update_contact"]);
}

/// The wait for budget after a 429 may be long.
#[tokio::test(start_paused = true)]
async fn a_lead_is_not_adopted_when_another_worker_has_created_one_meanwhile() {
    for busy in [false, true] {
        let context = context(&rules());
        let lead = json!({"id": "lead_2", "date_created": "2026-01-01"});
        let contact = json!({"id": "cont_2", "lead_id": "lead_2", "date_created": "2026-01-01",
            "custom.cf_user": "u2", "emails": []});
        let close = FakeClose::new(&context, &[lead], &[contact]);
        let mut wait = Duration::from_millis(500);
        if busy {
            close.state(|state| state.faults.push_back(WriteFault::Busy));
            wait += Duration::from_secs(1);
        }
        close.state(|state| state.budget_wait = Duration::from_secs(1));
        let company = json!({"id": "acme", "name": "Acme"});
        let bob = desired(&context, 2, json!({"userId": "u2", "traits": {"company": company}}));
        let mut attempts = attempts(&context, &close, &bob);
        let other = async {
            tokio::time::sleep(wait).await;
            create_elsewhere(&context, &close);
        };
        let (first, ()) = tokio::join!(attempts.run_once(), other);
        assert_eq!(first.err().unwrap().error, CloseError::Transient(Fault::NotYet));
        attempts.run_once().await.ok().unwrap();
        assert_eq!(close.lead("lead_2").fields.len(), 0, "not adopted");
    }
}
