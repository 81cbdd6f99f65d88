//! A message is acked once everything about it is safe, and never before.

use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use super::harness::{
    Answer, Confirm, Entry, Harness, Published, acked, calls, event, failing_searches, published,
};
use crate::amqp::BrokerError;
use crate::consumer::End;
use crate::consumer::broker::BrokerEvent;

fn position(log: &[Entry], wanted: impl Fn(&Entry) -> bool) -> usize {
    log.iter().position(wanted).unwrap_or_else(|| panic!("{log:#?}"))
}

fn is_published(entry: &Entry) -> bool {
    matches!(entry, Entry::Published(_))
}

#[tokio::test(start_paused = true)]
async fn a_synced_message_is_acked_and_has_no_successor() {
    let harness = Harness::new(|_| {});
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    let log = harness.log.wait_for_ack("1").await;
    assert!(published(&log).is_empty());
    let stats = session.stop().await;
    assert_eq!((stats.settled, stats.by_close, stats.handed_back), (1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn the_successor_is_confirmed_before_the_ack() {
    for (body, exchange) in
        [(json!("not an event"), "close-sync.dead"), (event("jane", "acme"), "close-sync.retry")]
    {
        let harness = Harness::new(|_| {});
        harness.close_answers(failing_searches);
        let session = harness.start();
        session.deliver("1", &body);
        let log = harness.log.wait_for_ack("1").await;
        assert_eq!(published(&log)[0].exchange, exchange);
        assert!(position(&log, is_published) < position(&log, |entry| *entry == Entry::Acked("1".into())));
        assert_eq!(session.stop().await.settled, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_whose_successor_is_never_confirmed_is_handed_back() {
    let harness = Harness::new(|_| {});
    harness.broker_answers(|_| Confirm::Never);
    let session = harness.start();
    session.deliver("1", &json!("not an event"));
    session.deliver("2", &event("jane", "acme"));
    harness.log.wait_for_ack("2").await;
    let stats = session.stop().await;
    assert_eq!((stats.settled, stats.handed_back), (1, 1));
    assert_eq!(harness.log.entries().last(), Some(&Entry::Closed), "and no ack");
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_the_broker_does_not_take_is_published_until_it_does() {
    let refusals = [
        BrokerError::Unconfirmed("nacked"),
        BrokerError::Unroutable { exchange: "close-sync.dead".into(), key: String::new() },
    ];
    for refusal in refusals {
        let harness = Harness::new(|_| {});
        let mut refused = 0;
        harness.broker_answers(move |_| {
            refused += 1;
            if refused < 20 { Confirm::Error(refusal.clone()) } else { Confirm::Ok }
        });
        let session = harness.start();
        session.deliver("1", &json!("not an event"));
        let log = harness.log.wait_for_ack("1").await;
        assert_eq!(published(&log).len(), 1);
        assert_eq!(session.stop().await.settled, 1);
    }
}

/// The broker refuses this message in any form, and closes the channel for all that are in flight.
fn refuse(harness: &Harness, guilty: &'static str) {
    harness.broker_answers(move |published| {
        if published.message == guilty || !published.quarantined {
            Confirm::Error(BrokerError::Rejected("no".into()))
        } else {
            Confirm::Ok
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_message_whose_successor_ends_the_channel_is_rejected_and_its_neighbours_are_not() {
    // A dead letter and a delayed message.
    for body in [json!("not an event"), event("jane", "acme")] {
        let harness = Harness::new(|_| {});
        harness.close_answers(failing_searches);
        refuse(&harness, "1");
        let is_settled = |id: &str| {
            let log = harness.log.entries();
            log.contains(&Entry::Acked(id.into())) || log.contains(&Entry::Rejected(id.into()))
        };
        let mut sessions = 0;
        while !is_settled("1") || !is_settled("2") {
            sessions += 1;
            let session = harness.start();
            for (id, body) in [("1", &body), ("2", &json!("not an event either"))] {
                if !is_settled(id) {
                    session.deliver(id, body);
                }
            }
            tokio::time::sleep(Duration::from_mins(1)).await;
            session.stop().await;
        }
        // One session for each that was in flight when the channel was closed, and the one that settles the last.
        assert!(sessions <= 3, "{sessions}");
        let log = harness.log.entries();
        assert!(log.contains(&Entry::Rejected("1".into())) && log.contains(&Entry::Acked("2".into())));
        assert!(published(&log).iter().all(|published| published.message == "2" && published.quarantined));

        // An operator replays it. It starts over.
        harness.broker_answers(|_| Confirm::Ok);
        let session = harness.start();
        session.deliver("1", &body);
        let log = harness.log.wait_for_ack("1").await;
        assert!(!published(&log).last().unwrap().quarantined);
        session.stop().await;
    }
}

/// A message that waits in the quarantine is not on the channel that another one ends.
#[tokio::test(start_paused = true)]
async fn a_message_in_the_quarantine_is_not_suspected_again() {
    let harness = Harness::new(|_| {});
    let garbage = json!("not an event");
    harness.broker_answers(|_| Confirm::Error(BrokerError::Rejected("no".into())));
    let session = harness.start();
    session.deliver("innocent", &garbage);
    session.end().await;

    // It waits for its turn while a second message ends the channel.
    harness.broker_answers(|published| match published.message.as_str() {
        "innocent" => Confirm::Never,
        _ => Confirm::Error(BrokerError::Rejected("no".into())),
    });
    let session = harness.start();
    session.deliver("innocent", &garbage);
    tokio::time::sleep(Duration::from_secs(1)).await;
    session.deliver("guilty", &garbage);
    session.end().await;

    harness.broker_answers(|_| Confirm::Ok);
    let session = harness.start();
    session.deliver("innocent", &garbage);
    let log = harness.log.wait_for_ack("innocent").await;
    assert!(published(&log)[0].quarantined);
    session.stop().await;
}

/// What is known against a message matters only for its successor, and ends when it is settled.
#[tokio::test(start_paused = true)]
async fn a_suspected_message_that_needs_no_successor_any_more_is_synced() {
    let harness = Harness::new(|_| {});
    harness.close_answers(failing_searches);
    harness.broker_answers(|_| Confirm::Error(BrokerError::Rejected("no".into())));
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    session.end().await;

    harness.close_answers(|_| Answer::Works);
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    session.stop().await;

    // The record has ended.
    harness.session.worker.search_again();
    harness.close_answers(failing_searches);
    harness.broker_answers(|_| Confirm::Ok);
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    let log = harness.log.wait_for(|log| acked(log).len() == 2).await;
    assert!(!published(&log)[0].quarantined);
    session.stop().await;
}

/// A fault of the broker, or of the way to it, is not the message's.
#[tokio::test(start_paused = true)]
async fn a_missing_exchange_ends_the_session_also_for_a_message_in_the_quarantine() {
    let harness = Harness::new(|_| {});
    for (answer, lost) in [("no", true), ("missing", false), ("", false)] {
        harness.broker_answers(move |_| match answer {
            "no" => Confirm::Error(BrokerError::Rejected("no".into())),
            "missing" => Confirm::Error(BrokerError::Missing("no exchange".into())),
            _ => Confirm::Ok,
        });
        let session = harness.start();
        session.deliver("1", &json!("not an event"));
        if answer.is_empty() {
            let log = harness.log.wait_for_ack("1").await;
            assert!(published(&log)[0].quarantined);
            session.stop().await;
        } else {
            let (end, _) = session.end().await;
            assert_eq!(matches!(end, End::Lost(BrokerError::Rejected(_))), lost, "{end:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_panics_while_it_is_settled_is_rejected() {
    let harness = Harness::new(|_| {});
    harness.broker_answers(|_| Confirm::Panic);
    for _ in 0..2 {
        let session = harness.start();
        session.deliver("1", &json!("not an event"));
        let (end, _) = session.end().await;
        assert!(matches!(end, End::Lost(BrokerError::Lost(_))), "{end:?}");
    }
    let session = harness.start();
    session.deliver("1", &json!("not an event"));
    session.deliver("2", &event("jane", "acme"));
    harness.log.wait_for(|log| log.contains(&Entry::Rejected("1".into()))).await;
    harness.log.wait_for_ack("2").await;
    session.stop().await;
}

/// The loop sees the end of the connection before the publish does.
#[tokio::test(start_paused = true)]
async fn a_message_in_flight_when_the_connection_is_closed_goes_to_the_quarantine() {
    for (lost, quarantined) in [
        (BrokerError::Rejected("frame too large".into()), true),
        (BrokerError::Lost("reset".into()), false),
        (BrokerError::Cancelled, false),
    ] {
        let harness = Harness::new(|_| {});
        harness.broker_answers(|_| Confirm::Never);
        let session = harness.start();
        session.deliver("1", &json!("not an event"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        session.send(BrokerEvent::Lost(lost));
        session.end().await;

        harness.broker_answers(|_| Confirm::Ok);
        let session = harness.start();
        session.deliver("1", &json!("not an event"));
        let log = harness.log.wait_for_ack("1").await;
        assert_eq!(published(&log)[0].quarantined, quarantined);
        session.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_publish_ends_the_session_without_an_ack() {
    let harness = Harness::new(|_| {});
    harness.broker_answers(|_| Confirm::Error(BrokerError::Lost("gone".into())));
    let session = harness.start();
    session.deliver("1", &json!("not an event"));
    let (end, stats) = session.end().await;
    assert!(matches!(end, End::Lost(BrokerError::Lost(_))), "{end:?}");
    assert_eq!((stats.settled, stats.handed_back), (0, 1));
    assert_eq!(harness.log.entries(), [Entry::Closed]);
}

#[tokio::test(start_paused = true)]
async fn a_message_acked_on_a_lost_channel_is_handed_back_and_blocks_those_behind_it() {
    let harness = Harness::new(|settings| settings.merge = false);
    harness.lose_channel();
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    session.deliver("2", &event("jane", "acme"));
    tokio::time::sleep(Duration::from_mins(1)).await;
    let creations = calls(&harness.log.entries()).iter().filter(|call| **call == "POST lead/").count();
    let reads = calls(&harness.log.entries()).iter().filter(|call| call.starts_with("GET")).count();
    assert_eq!((creations, reads), (1, 0), "the second has not started");
    let stats = session.stop().await;
    assert_eq!((stats.settled, stats.handed_back), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn the_largest_number_of_attempts_is_dead_lettered() {
    let harness = Harness::new(|_| {});
    harness.close_answers(failing_searches);
    let session = harness.start();
    let forged = Published {
        exchange: String::new(),
        key: String::new(),
        message: "1".into(),
        attempts: Some(u32::MAX.into()),
        delay_id: Some(Uuid::from_u128(1)),
        quarantined: false,
    };
    session.redeliver(&forged, &event("jane", "acme"));
    let log = harness.log.wait_for_ack("1").await;
    assert_eq!(published(&log)[0].exchange, "close-sync.dead");
    assert_eq!(session.stop().await.settled, 1);
}
