//! The first steps with dead letters: list, show, replay, discard.

use std::collections::BTreeSet;

use lapin::BasicProperties;
use lapin::types::FieldTable;
use serde_json::{Value, json};

use crate::support::{Bench, identify};

/// Three dead letters: rejected by Close, without identity, malformed.
async fn three_dead_letters() -> Bench {
    let bench = Bench::new().await;
    bench.refuse("");
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({})), json!({"type": "identify"})]).await;
    let properties = BasicProperties::default().with_message_id("m\u{1b}[31m".into());
    bench.publish_bytes(b"{\"name\": \"\x1b[2J\"", properties).await;
    worker.settled(3).await;
    worker.terminate().await;
    bench.simulator.clear_faults();
    bench
}

async fn listing(bench: &Bench) -> Value {
    serde_json::from_str(&bench.output(&["dlq", "list", "--json"]).await).unwrap()
}

async fn list(bench: &Bench) -> Vec<Value> {
    listing(bench).await["dead_letters"].as_array().unwrap().clone()
}

fn id_of(letters: &[Value], reason: &str) -> String {
    let letter = letters.iter().find(|letter| letter["reason"] == reason).unwrap();
    letter["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn list_and_show_change_nothing() {
    let bench = three_dead_letters().await;
    let first = list(&bench).await;
    let reasons: Vec<_> = first.iter().map(|letter| letter["reason"].as_str().unwrap()).collect();
    assert_eq!(BTreeSet::from_iter(reasons), ["malformed", "no_identity", "rejected"].into());
    for _ in 0..25 {
        assert_eq!(list(&bench).await, first, "same messages, same order");
    }
    let table = bench.output(&["dlq", "list"]).await;
    assert!(table.contains("no_identity:map:-") && table.contains("what to do"), "{table}");

    let shown = bench.output(&["dlq", "show", &id_of(&first, "malformed")]).await;
    assert!(
        shown.contains("{\"name\": \"") && !shown.contains('\u{1b}'),
        "control characters are escaped: {shown}"
    );
    let shown = bench.output(&["dlq", "show", "--json", &id_of(&first, "rejected")]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["body"]["userId"], "u1");
    assert_eq!(shown["error"], "Close rejected the request (400); name: this field is required");
    assert_eq!(
        (&shown["plan"]["outcome"], &shown["plan"]["rule"]),
        (&json!("created"), &json!("nobody_known"))
    );

    let (code, _, words) = bench.run_text(&["dlq", "show", "nothing"], "").await;
    assert!(code == Some(2) && words.contains("dead letter `nothing` not found"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_goes_through_the_work_queue_and_is_counted() {
    let bench = three_dead_letters().await;
    let dry = bench.output(&["dlq", "replay", "--reason", "rejected", "--dry-run"]).await;
    let [would, guard] = dry.lines().collect::<Vec<_>>()[..] else { panic!("{dry}") };
    assert_eq!(would, "would replay 1 of 3 (1 rejected:write:name); run without --dry-run to do it");
    assert!(guard.starts_with("1 from the time of the journal"), "{guard}");
    let worker = bench.worker().await;
    let (code, text, words) = bench.run_text(&["dlq", "replay", "--reason", "rejected"], "").await;
    assert_eq!((code, text.as_str()), (Some(0), "replayed 1; 1 created\n"), "{words}");
    assert_eq!(worker.metrics().await.outcomes(), [("created", 1)].into());
    assert_eq!(bench.the_lead()["contacts"][0]["custom.cf_contactuserid"], "u1");

    // A message that fails again becomes a new dead letter, which counts its replays.
    let (code, text, words) = bench.run_text(&["dlq", "replay", "--all", "--keep-going"], "").await;
    assert_eq!((code, text.as_str()), (Some(1), "replayed 2; 2 dead\n"), "{words}");
    let letters = list(&bench).await;
    assert!(letters.len() == 2 && words.contains(letters[1]["id"].as_str().unwrap()), "{words} {letters:#?}");
    assert!(letters.iter().all(|letter| letter["replays"] == 1 && letter["attempts"] == 1), "{letters:#?}");
    assert!(letters.iter().all(|letter| letter["exchange"] == bench.exchange.as_str()), "{letters:#?}");
    worker.terminate().await;
}

/// The replayed message cannot be routed, so the dead letter stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_unroutable_replay_keeps_the_dead_letter() {
    let bench = three_dead_letters().await;
    let (queue, exchange) = (bench.queue.as_str().into(), format!("{}.retry", bench.queue).into());
    bench.channel().await.queue_unbind(queue, exchange, "now".into(), FieldTable::default()).await.unwrap();
    let before = list(&bench).await;
    for wait in ["--no-wait", "--keep-going"] {
        let (code, _, words) = bench.run_text(&["dlq", "replay", "--all", wait], "").await;
        assert!(code == Some(69) && words.contains("no queue is bound to exchange"), "{words}");
        assert_eq!(list(&bench).await, before, "all of them, in the same order");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn discarding_needs_a_confirmation() {
    let bench = three_dead_letters().await;
    let id = id_of(&list(&bench).await, "malformed");
    let (code, _, words) = bench.run_text(&["dlq", "discard", "--id", &id], "").await;
    assert_eq!(code, Some(2));
    assert!(words.contains("would delete 1 of 3 dead letters for good; add --yes"), "{words}");
    assert_eq!(bench.output(&["dlq", "discard", "--id", &id, "--yes"]).await, "discarded 1, 2 remain\n");
    assert_eq!(list(&bench).await.len(), 2);
    assert_eq!(bench.run_text(&["dlq", "discard", "--yes"], "").await.0, Some(2), "a selection is required");
    assert_eq!(bench.run_text(&["dlq", "replay", "--id", &id], "").await.0, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_worker_there_are_no_dead_letters() {
    let bench = Bench::new().await;
    assert_eq!(bench.output(&["dlq", "list"]).await, "no dead letters\n");
}

/// Without a worker the first message has no outcome, so the others stay in the queue.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_worker_a_replay_times_out_after_the_first_message() {
    let bench = three_dead_letters().await;
    let (code, text, words) = bench.run_text(&["dlq", "replay", "--all", "--wait", "1s"], "").await;
    assert_eq!((code, text.as_str()), (Some(69), "replayed 1; 1 under way; 2 not sent\n"), "{words}");
    assert!(words.contains("no outcome received for 1 message") && words.contains("/readyz"), "{words}");
    // The replay polls the work queue and reports that it has no consumer.
    let waiting = bench.starting(&["dlq", "replay", "--all"]);
    waiting
        .until("reported", async |waiting| waiting.logged("no worker consumes from the work queue") == 1)
        .await;
    waiting.kill().await;
    bench.depth_becomes(".dead", 1).await;
    assert_eq!(bench.depth("").await, 2);
    assert_eq!(bench.output(&["dlq", "replay", "--all", "--no-wait"]).await, "replayed 1\n");
    assert_eq!((bench.depth("").await, list(&bench).await.len()), (3, 0));
}
