//! Close does not work: the session ends, nothing is settled, and the next one starts with care.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::harness::{Answer, Entry, Harness, event, failing_searches};
use crate::consumer::End;
use crate::outcome::PauseCause;
use crate::sync::circuit_breaker::HALF_OPEN_PROBES;

#[tokio::test(start_paused = true)]
async fn a_pause_ends_the_session_and_settles_nothing() {
    let harness = Harness::new(|_| {});
    harness.close_answers(|_| Answer::Status(401));
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    session.deliver("2", &event("bob", "globex"));
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Paused(PauseCause::Unauthorized)), "{end:?}");
    assert_eq!((stats.settled, stats.handed_back), (0, 2));
    let settled = |entry: &Entry| matches!(entry, Entry::Published(_) | Entry::Acked(_) | Entry::Rejected(_));
    assert!(!harness.log.entries().iter().any(settled));
}

#[tokio::test(start_paused = true)]
async fn a_half_open_session_tries_a_few_messages_until_one_succeeds() {
    let mut harness = Harness::new(|_| {});
    harness.session.paused_before = Some(PauseCause::Failing);
    harness.session.worker.half_open_breaker();
    let works = Arc::new(AtomicBool::new(false));
    let answers = Arc::clone(&works);
    harness
        .close_answers(move |_| if answers.load(Ordering::Relaxed) { Answer::Works } else { Answer::Never });
    let session = harness.start();
    // Close does not answer: no more than the probes start, however long that takes.
    for n in 0..10 {
        session.deliver(&n.to_string(), &event(&format!("user {n}"), &format!("company {n}")));
    }
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(harness.session.metrics.load().in_flight, HALF_OPEN_PROBES as u64);
    session.shut_down();
    assert!(!session.end().await.1.breaker_closed);

    // The search of the first process never ends.
    let harness = harness.restart();
    harness.session.worker.half_open_breaker();
    works.store(true, Ordering::Relaxed);
    let session = harness.start();
    for n in 0..10 {
        session.deliver(&n.to_string(), &event(&format!("user {n}"), &format!("company {n}")));
    }
    for n in 0..10 {
        harness.log.wait_for_ack(&n.to_string()).await;
    }
    let stats = session.stop().await;
    assert!(stats.breaker_closed && stats.by_close == 10, "{stats:?}");
}

#[tokio::test(start_paused = true)]
async fn a_half_open_session_that_fails_again_ends_after_its_probes() {
    let mut harness = Harness::new(|_| {});
    harness.session.paused_before = Some(PauseCause::Failing);
    harness.session.worker.half_open_breaker();
    harness.close_answers(failing_searches);
    let session = harness.start();
    for n in 0..10 {
        session.deliver(&n.to_string(), &event(&format!("user {n}"), &format!("company {n}")));
    }
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Paused(PauseCause::Failing)), "{end:?}");
    assert!(!stats.breaker_closed);
    assert!(stats.settled < HALF_OPEN_PROBES as u64, "only probes used up an attempt: {stats:?}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_half_open_session_closes_the_breaker() {
    let mut harness = Harness::new(|_| {});
    harness.session.paused_before = Some(PauseCause::Failing);
    let session = harness.start();
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert!(session.stop().await.breaker_closed);
}
