//! Messages about one person or one company never overtake each other, and share a write where they can.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::harness::{Answer, Entry, Harness, acked, event, failing_searches, published};

fn creations(calls: &[Entry]) -> usize {
    calls.iter().filter(|entry| **entry == Entry::Called("POST lead/".into())).count()
}

#[tokio::test(start_paused = true)]
async fn a_message_follows_an_earlier_one_into_a_delay_queue() {
    let harness = Harness::new(|settings| settings.merge = false);
    harness.close_answers(failing_searches);
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    let log = harness.log.wait_for_ack("1").await;
    let first = published(&log)[0].clone();
    assert_eq!((first.key.as_str(), first.attempts), ("30s", Some(1)));

    harness.close_answers(|_| Answer::Works);
    session.deliver("2", &event("bob", "acme"));
    session.deliver("3", &event("eve", "globex"));
    harness.log.wait_for_ack("3").await;
    let log = harness.log.wait_for_ack("2").await;
    let second = published(&log)[1].clone();
    assert_eq!((second.message.as_str(), second.attempts), ("2", Some(0)), "no attempt is counted");
    assert_eq!(creations(&log), 1, "only the one about the other company ran: {log:#?}");

    // They return in the wrong order: the second waits again.
    session.redeliver(&second, &event("bob", "acme"));
    let log = harness.log.wait_for(|log| published(log).len() == 3).await;
    assert_eq!(published(&log)[2].message, "2");
    session.redeliver(&first, &event("jane", "acme"));
    let log = harness.log.wait_for(|log| acked(log).iter().filter(|id| **id == "1").count() == 2).await;
    assert_eq!(published(&log).len(), 3);
    session.redeliver(&second, &event("bob", "acme"));
    let log = harness.log.wait_for(|log| acked(log).last() == Some(&"2")).await;
    assert_eq!((published(&log).len(), &acked(&log)[3..]), (3, ["2", "1", "2"].as_slice()));
    assert_eq!(creations(&log), 2, "the second Contact goes to the Lead of the first");
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn messages_about_one_person_share_a_write() {
    let mut harness = Harness::new(|_| {});
    harness.session.concurrency = 1;
    let session = harness.start();
    for id in ["1", "2", "3"] {
        session.deliver(id, &event("jane", "acme"));
    }
    let log = harness.log.wait_for_ack("3").await;
    assert_eq!((creations(&log), acked(&log)), (1, vec!["1", "2", "3"]));
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_failed_merge_the_messages_run_one_by_one_in_their_order() {
    let mut harness = Harness::new(|_| {});
    // One task at a time. The first keeps it busy while the others arrive.
    harness.session.concurrency = 1;
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    harness.close_answers(move |call| {
        let creates = call.starts_with("POST lead/ ") && call.contains("acme");
        let attempt = if creates { counted.fetch_add(1, Ordering::Relaxed) } else { 0 };
        // The merged write, and after it the first message by itself, which is then dead-lettered.
        if creates && attempt < 2 { Answer::Status(400) } else { Answer::Works }
    });
    let session = harness.start();
    session.deliver("0", &event("eve", "globex"));
    for id in ["1", "2", "3"] {
        session.deliver(id, &event("jane", "acme"));
    }
    let log = harness.log.wait_for_ack("3").await;
    assert_eq!(acked(&log), ["0", "1", "2", "3"]);
    assert_eq!(published(&log).iter().map(|dead| dead.message.as_str()).collect::<Vec<_>>(), ["1"]);
    assert_eq!(attempts.load(Ordering::Relaxed), 3);
    session.stop().await;
}
