//! How a session starts and how it ends.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::harness::{Answer, Entry, Harness, Running, calls, event};
use crate::amqp::{BrokerError, JournalState};
use crate::close::stall_guard::StallGuard;
use crate::consumer::End;
use crate::consumer::broker::BrokerEvent;

#[tokio::test(start_paused = true)]
async fn a_shutdown_finishes_messages_in_progress_and_hands_back_the_rest() {
    let mut harness = Harness::new(|settings| settings.retry.in_place = Duration::from_secs(30));
    harness.session.concurrency = 1;
    let mut failed = false;
    harness.close_answers(move |_| {
        if std::mem::replace(&mut failed, true) { Answer::Works } else { Answer::Status(503) }
    });
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    session.deliver("2", &event("bob", "globex"));
    harness.log.wait_for_calls(1).await;
    session.shut_down();
    session.deliver("3", &event("eve", "initech"));
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Stopped));
    assert_eq!((stats.settled, stats.handed_back), (1, 1), "the third was never received");
    let log = harness.log.entries();
    assert_eq!(log[log.len() - 2..], [Entry::Acked("1".into()), Entry::Closed]);
}

/// A session that processes a message while Close does not answer.
async fn busy_session() -> (Harness, Running) {
    let harness = Harness::new(|_| {});
    harness.close_answers(|_| Answer::Never);
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_calls(1).await;
    (harness, session)
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_no_longer_than_the_grace_period() {
    let (harness, session) = busy_session().await;
    let began = Instant::now();
    let stats = session.stop().await;
    assert_eq!((stats.settled, stats.handed_back), (0, 1));
    assert_eq!(began.elapsed(), harness.session.grace);
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_ends_the_work_at_once() {
    let (_harness, session) = busy_session().await;
    let began = Instant::now();
    session.send(BrokerEvent::Lost(BrokerError::Cancelled));
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Lost(BrokerError::Cancelled)), "{end:?}");
    assert_eq!((stats.handed_back, began.elapsed()), (1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_writes_nothing_more() {
    let harness = Harness::new(|_| {});
    let session = harness.start();
    // Longer than the broker waits for heartbeats.
    harness.session.worker.stall_guard().arm(Duration::from_secs(20));
    tokio::task::yield_now().await;
    tokio::time::advance(Duration::from_mins(2)).await;
    session.deliver("1", &event("jane", "acme"));
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Lost(BrokerError::StoodStill(_))), "{end:?}");
    assert_eq!(stats.settled, 0);
    assert!(!calls(&harness.log.entries()).contains(&"POST lead/"));
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_after_a_suspension_counts_as_a_suspension() {
    let (harness, session) = busy_session().await;
    harness.session.worker.stall_guard().arm(Duration::ZERO);
    // The next heartbeat of the loop is still to come.
    tokio::time::advance(StallGuard::heartbeat_interval(Duration::from_secs(20)) / 4).await;
    session.send(BrokerEvent::Lost(BrokerError::Cancelled));
    let (end, _) = session.end().await;
    assert!(matches!(end, End::Lost(BrokerError::StoodStill(_))), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_session_forgets_the_records_that_another_worker_may_have_changed() {
    let harness = Harness::new(|_| {});
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    session.deliver("2", &event("jane", "acme"));
    let log = harness.log.wait_for_ack("2").await;
    let searches = |log: &[Entry]| calls(log).iter().filter(|call| call.contains("search")).count();
    let before = searches(&log);
    session.stop().await;

    // It stood by, and another worker was active.
    let session = harness.start();
    session.deliver("3", &event("jane", "acme"));
    let log = harness.log.wait_for_ack("3").await;
    assert!(searches(&log) > before, "the ids of the session before are not used: {log:#?}");
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_journal_nothing_is_created_until_search_shows_what_a_predecessor_created() {
    let lag = Duration::from_mins(1);
    let mut harness = Harness::new(|settings| settings.search_lag = lag);
    harness.journal.state = JournalState::Disabled;
    let session = harness.start();
    // The lag counts from the first delivery: until then another worker may have been active.
    tokio::time::sleep(lag * 10).await;
    session.deliver("1", &event("jane", "acme"));
    let began = Instant::now();
    let log = harness.log.wait_for(|log| calls(log).contains(&"POST lead/")).await;
    assert!(began.elapsed() >= lag);
    let searches = calls(&log).iter().filter(|call| call.contains("search")).count();
    assert!(searches >= 2, "it looks again afterwards: {log:#?}");
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_message_that_needs_no_close_is_settled_while_all_tasks_are_busy() {
    let mut harness = Harness::new(|_| {});
    harness.session.concurrency = 1;
    harness.close_answers(|_| Answer::Never);
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_calls(1).await;
    session.deliver("2", &event("bob", "globex"));
    session.deliver("3", &json!("not an event"));
    let log = harness.log.wait_for_ack("3").await;
    assert_eq!(calls(&log).len(), 1);
    session.send(BrokerEvent::Lost(BrokerError::Cancelled));
    assert_eq!(session.end().await.1.handed_back, 2);
}
