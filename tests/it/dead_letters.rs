//! Operating dead letters with the program itself.

use std::collections::BTreeSet;

use close_sync::simulator::{Effect, Fault, FaultBody, When};
use lapin::BasicProperties;
use lapin::types::FieldTable;
use serde_json::{Value, json};

use crate::support::{Bench, identify};

/// Three dead letters: refused by Close, without identity, malformed.
async fn three() -> Bench {
    let bench = Bench::new().await;
    let refusal = json!({"errors": [], "field-errors": {"name": "This field is required."}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/"));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({})), json!({"type": "identify"})]).await;
    let properties = BasicProperties::default().with_message_id("m\u{1b}[31m".into());
    bench.publish_bytes(b"{\"name\": \"\x1b[2J\"", properties).await;
    worker.settled(3).await;
    worker.terminate().await;
    bench.simulator.clear_faults();
    bench
}

async fn list(bench: &Bench) -> Vec<Value> {
    serde_json::from_str(&bench.output(&["dlq", "list", "--json"]).await).unwrap()
}

fn ids(letters: &[Value], reason: &str) -> String {
    let letter = letters.iter().find(|letter| letter["reason"] == reason).unwrap();
    letter["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_changes_nothing() {
    let bench = three().await;
    let first = list(&bench).await;
    let mut reasons: Vec<_> = first.iter().map(|letter| letter["reason"].as_str().unwrap()).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["malformed", "no_identity", "rejected"]);
    for _ in 0..25 {
        assert_eq!(list(&bench).await, first, "same messages, same order");
    }
    let table = bench.output(&["dlq", "list"]).await;
    assert!(table.contains("no_identity:map:-") && table.contains("what to do"), "{table}");
    let one = bench.output(&["dlq", "list", "--reason", "malformed", "--limit", "1", "--json"]).await;
    let one: Vec<Value> = serde_json::from_str(&one).unwrap();
    assert_eq!((one.len(), &one[0]["reason"]), (1, &json!("malformed")));

    let shown = bench.output(&["dlq", "show", &ids(&first, "malformed")]).await;
    assert!(
        shown.contains("{\"name\": \"") && !shown.contains('\u{1b}'),
        "the terminal is not steered: {shown}"
    );
    let shown = bench.output(&["dlq", "show", "--json", &ids(&first, "rejected")]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["body"]["userId"], "u1");
    assert_eq!(shown["error"], "Close refused the request (400); name: this field is required");

    let missing = bench.run(&["dlq", "show", "nothing"], b"").await;
    assert_eq!(missing.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_goes_through_the_work_queue_and_counts() {
    let bench = three().await;
    let dry = bench.output(&["dlq", "replay", "--reason", "rejected", "--dry-run"]).await;
    assert_eq!(dry, "would replay 1 of 3; run without --dry-run to do it\n");
    assert_eq!(bench.output(&["dlq", "replay", "--reason", "rejected"]).await, "replayed 1, 2 remain\n");
    bench.depth_becomes("", 1).await;
    let worker = bench.worker().await;
    let metrics = worker.settled(1).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!(bench.the_lead()["contacts"][0]["custom.cf_contactuserid"], "u1");

    // What fails again is a new dead letter with the count of replays.
    assert_eq!(bench.output(&["dlq", "replay", "--all"]).await, "replayed 2, 0 remain\n");
    worker.settled(3).await;
    bench.depth_becomes(".dead", 2).await;
    let letters = list(&bench).await;
    assert!(letters.iter().all(|letter| letter["replays"] == 1 && letter["attempts"] == 1), "{letters:#?}");
    assert!(letters.iter().all(|letter| letter["exchange"] == bench.exchange.as_str()), "{letters:#?}");
    worker.terminate().await;
}

/// No queue takes the replay: its dead letter stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_leads_nowhere_keeps_the_dead_letter() {
    let bench = three().await;
    let (queue, exchange) = (bench.queue.as_str().into(), format!("{}.retry", bench.queue).into());
    bench.channel().await.queue_unbind(queue, exchange, "now".into(), FieldTable::default()).await.unwrap();
    let known =
        async || list(&bench).await.iter().map(|letter| letter["id"].to_string()).collect::<BTreeSet<_>>();
    let before = known().await;
    let replay = bench.run(&["dlq", "replay", "--all"], b"").await;
    let words = String::from_utf8(replay.stderr).unwrap();
    assert!(replay.status.code() == Some(69) && words.contains("no queue is bound to exchange"), "{words}");
    assert_eq!(known().await, before);
    assert_eq!(before.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn discarding_needs_a_confirmation() {
    let bench = three().await;
    let id = ids(&list(&bench).await, "malformed");
    let refused = bench.run(&["dlq", "discard", "--id", &id], b"").await;
    assert_eq!(refused.status.code(), Some(2));
    let words = String::from_utf8(refused.stderr).unwrap();
    assert!(words.contains("would delete 1 of 3 dead letters for good; add --yes"), "{words}");
    assert_eq!(bench.output(&["dlq", "discard", "--id", &id, "--yes"]).await, "discarded 1, 2 remain\n");
    assert_eq!(list(&bench).await.len(), 2);
    assert_eq!(bench.run(&["dlq", "discard", "--yes"], b"").await.status.code(), Some(2), "say which");
    let nothing = bench.run(&["dlq", "replay", "--id", &id], b"").await;
    assert_eq!(nothing.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_worker_so_far_there_are_no_dead_letters() {
    let bench = Bench::new().await;
    assert_eq!(bench.output(&["dlq", "list"]).await, "no dead letters\n");
}
