//! Replays: killed, concurrent, delayed, disconnected, and under live traffic.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::support::dead_letters::{ids, line};
use crate::support::{Bench, Proxy, Worker, identify, people};

/// The latency of Close for a new Lead, so that a replay can be interrupted.
const SLOW: Duration = Duration::from_millis(100);

/// Waits until so many Leads exist.
async fn leads(bench: &Bench, worker: &Worker, count: usize) {
    worker.until("enough leads", async |_| bench.simulator.leads().len() >= count).await;
}

/// Waits until every message is settled.
async fn idle(worker: &Worker) {
    worker.until("idle", async |worker| worker.metrics().await.count("messages_in_flight") == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_exports_see_all_dead_letters() {
    let bench = Bench::dead_people(300).await;
    let looks = (0..6).map(|_| bench.dead_ids());
    for seen in futures_util::future::join_all(looks).await {
        assert!(seen == ids(300), "{seen:?}");
    }
}

/// A killed list keeps the order if one batch takes the whole queue. Otherwise its batch returns behind the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_list_loses_nothing() {
    for (count, fits) in [(1500, true), (6000, false)] {
        let bench = Bench::dead_people(count).await;
        let all = u32::try_from(count).unwrap();
        for _ in 0..2 {
            let listing = bench.starting(&["dlq", "list"]);
            listing.until("listing", async |_| bench.depth(".dead").await < all).await;
            listing.kill().await;
            bench.depth_becomes(".dead", all).await;
        }
        let mut seen = bench.dead_ids().await;
        let mut wanted = ids(count);
        if !fits {
            seen.sort_unstable();
            wanted.sort_unstable();
        }
        assert!(seen == wanted, "{} of {count}, the first {:?}", seen.len(), seen.first());
    }
}

/// A replay that is killed several times continues each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_replay_loses_and_duplicates_nothing() {
    let bench = Bench::dead_people(60).await;
    bench.slow(SLOW);
    let worker = bench.worker().await;
    for reached in [5, 15, 30] {
        let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "4"]);
        leads(&bench, &worker, reached).await;
        replay.kill().await;
        worker.until("in the middle", async |_| bench.depth(".dead").await > 0).await;
    }
    let rest = bench.run_combined(&["dlq", "replay", "--all"], "").await;
    assert_eq!(rest.0, Some(0), "{rest:?}");
    // The replay does not wait for messages that a killed one had sent.
    leads(&bench, &worker, 60).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(60);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// The second replay waits for the first, which is killed. Each dead letter is replayed once.
#[tokio::test(flavor = "multi_thread")]
async fn two_replays_take_turns() {
    let bench = Bench::dead_people(40).await;
    bench.slow(SLOW);
    let worker = bench.worker().await;
    let first = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    let second = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    second.until("waiting", async |second| second.logged("another operator") == 1).await;
    // A waiting replay can be stopped.
    let third = bench.starting(&["dlq", "replay", "--all"]);
    third.until("waiting", async |third| third.logged("another operator") == 1).await;
    third.signal("INT");
    assert_eq!(third.ended().await.code(), Some(1), "{}", third.log());
    assert_eq!(third.logged("run the same replay again to continue"), 1, "{}", third.log());
    // Other operators can list the dead letters meanwhile.
    let (code, words) = bench.run_combined(&["dlq", "list"], "").await;
    assert!(code == Some(0) && words.contains("a replay is under way"), "{words}");
    leads(&bench, &worker, 10).await;
    first.kill().await;
    assert!(second.ended().await.success(), "{}", second.log());
    leads(&bench, &worker, 40).await;
    bench.assert_each_once(40);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Newer live events about the same people arrive during the replay. Their values stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_does_not_overwrite_newer_live_values() {
    let about = |number: usize, year: u32, title: &str| {
        let mut event = people(number + 1).remove(number);
        event["timestamp"] = json!(format!("{year}-01-01T00:00:00Z"));
        event["traits"]["title"] = json!(title);
        event
    };
    let old: Vec<_> = (0..40).map(|number| about(number, 2023, "Old")).collect();
    let bench = Bench::dead(&old).await;
    let worker = bench.worker().await;
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "4"]);
    for number in 0..40 {
        bench.publish(&[about(number, 2025, "New")]).await;
    }
    assert!(replay.ended().await.success(), "{}", replay.log());
    worker.settled(80).await;
    bench.assert_each_once(40);
    let titles: BTreeSet<_> =
        bench.simulator.contacts().iter().map(|contact| contact["title"].to_string()).collect();
    assert_eq!(titles, ["\"New\"".to_owned()].into());
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_stops_at_the_first_repeated_failure() {
    let mut events = people(30);
    for bad in [0, 9, 20] {
        events[bad] = identify(&format!("u{bad}"), json!({"company": {"id": "bad"}}));
    }
    let bench = Bench::dead(&events).await;
    bench.refuse("bad");
    let worker = bench.worker().await;
    // The first message fails, so no others are sent.
    let (code, words) = bench.run_combined(&["dlq", "replay", "--all"], "").await;
    assert!(code == Some(1) && words.starts_with("replayed 1; 1 dead; 29 not sent\n"), "{words}");
    assert!(
        words.contains("rejected:write:name") && words.contains("the first message failed again"),
        "{words}"
    );
    let metrics = worker.metrics().await;
    assert_eq!(metrics.outcomes(), [("dead", 1)].into());
    assert_eq!(metrics.count("messages_replayed_total{outcome=\"dead\"}"), 1);
    assert_eq!(bench.dead_ids().await[..29], ids(30)[1..]);

    // It is the last one now. The ninth of the others fails with the same error.
    let (code, words) = bench.run_combined(&["dlq", "replay", "--all", "--at-once", "1"], "").await;
    assert!(code == Some(1) && words.starts_with("replayed 9; 8 created, 1 dead; 21 not sent\n"), "{words}");
    assert!(words.contains("stopped"), "{words}");
    let output = bench.run(&["dlq", "replay", "--all", "--keep-going", "--json"], b"").await;
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let result = (output.status.code(), &summary["end"], &summary["failed_again"]);
    assert_eq!(result, (Some(1), &json!("done"), &json!(3)), "{summary:#}");
    assert_eq!(summary["outcomes"], json!({"created": 19, "dead": 3}));

    // The cause is fixed.
    bench.simulator.clear_faults();
    let (code, words) = bench.run_combined(&["dlq", "replay", "--reason", "rejected"], "").await;
    assert!(code == Some(0) && words.starts_with("replayed 3; 2 added, 1 created\n"), "{words}");
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Close's answer may contain personal data. The replay shows it, and it is stored nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_close_is_shown_by_the_replay_and_not_stored() {
    let bench = Bench::dead_people(2).await;
    let exchange = format!("{}-outcomes", bench.exchange);
    let bench = bench.set("AMQP_OUTCOMES", &exchange);
    let words = "jane@example.test has no \u{1b}[2J quota left";
    let refusal = json!({"errors": [words], "field-errors": {}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let mut events = bench.outcomes(&exchange).await;
    let (code, words) = bench.run_combined(&["dlq", "replay", "--id", "dead-0"], "").await;
    assert!(code == Some(1) && words.contains("Close said: {\"errors\":[\"jane@example.test"), "{words}");
    assert!(words.contains("the message failed again\n") && !words.contains('\u{1b}'), "{words}");
    let kept = format!("{:?}", bench.dead_letters().await);
    assert!(kept.contains("rejected:write:-") && kept.contains("shows it"), "{kept}");
    let event = events.next().await.unwrap().unwrap();
    let event = String::from_utf8(event.data).unwrap();
    assert!(event.contains("rejected:write:-"), "{event}");
    for text in [kept, event, worker.log(), worker.page("/metrics").await.unwrap().1] {
        assert!(!text.contains("jane"), "{text}");
    }
    worker.terminate().await;
}

/// The dry run and the result count messages by fingerprint.
#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_by_fingerprint() {
    let bench = Bench::dead_people(3).await;
    bench
        .import(
            &line("other", 9, &json!([])).replace("rejected:write:name", "malformed:decode:not_an_object"),
        )
        .await;
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all", "--dry-run"], "").await;
    assert!(
        words.contains("would replay 4 of 4 (1 malformed:decode:not_an_object, 3 rejected:write:name)"),
        "{words}"
    );
    let dry = bench.output(&["dlq", "replay", "--limit", "2", "--all", "--dry-run", "--json"]).await;
    let dry: Value = serde_json::from_str(&dry).unwrap();
    assert_eq!(
        dry,
        json!({"end": "dry_run", "found": 4, "matched": 2, "groups": {"rejected:write:name": 2},
            "guards": {"last_change": 2}})
    );
    let listed = bench.output(&["dlq", "list"]).await;
    assert!(
        listed.contains("3  rejected:write:name  first ") && listed.contains("dlq show dead-2"),
        "{listed}"
    );
    bench.refuse("");
    let worker = bench.worker().await;
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all", "--keep-going"], "").await;
    let failures = "failed again: 1 malformed:decode:not_an_object, 3 rejected:write:name; the latest:";
    assert!(words.contains(failures), "{words}");
    worker.terminate().await;
}

/// The replay waits for a message in a delay queue. After Ctrl-C, another replay continues.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_waits_for_delayed_messages_and_stops_on_ctrl_c() {
    let bench = Bench::dead_people(20).await.set("RETRY_IN_PLACE", "0s");
    let unavailable = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(unavailable).on("POST", "/lead/").times(1));
    bench.slow(SLOW);
    let worker = bench.worker().await;
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    replay.signal("INT");
    assert_eq!(replay.ended().await.code(), Some(1), "{}", replay.log());
    assert_eq!(replay.logged("run the same replay again to continue"), 1, "{}", replay.log());
    assert_eq!(worker.metrics().await.outcome("delayed"), 1);
    let rest = bench.dead_ids().await;
    assert!(rest.len() >= 10 && rest[..] == ids(20)[20 - rest.len()..], "{rest:?}");
    bench.output(&["dlq", "replay", "--all"]).await;
    leads(&bench, &worker, 20).await;
    bench.assert_each_once(20);
    worker.terminate().await;
}

/// Outcomes that were published without a connection are missed. The others are sent, and the result says that outcomes
/// are missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_reconnects_and_reports_missed_outcomes() {
    let bench = Bench::dead_people(30).await;
    bench.slow(3 * SLOW);
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "4", "--wait", "10s"]);
    for reached in [3, 10] {
        leads(&bench, &worker, reached).await;
        proxy.mute(true);
        proxy.cut();
        // Every sent message is settled before the replay has a connection again.
        worker
            .until("idle", async |worker| {
                let settled = worker.metrics().await.sum("messages_settled_total") as usize;
                settled + bench.depth(".dead").await as usize >= 30 && bench.depth("").await == 0
            })
            .await;
        proxy.mute(false);
    }
    assert_eq!(replay.ended().await.code(), Some(69), "{}", replay.log());
    assert!(replay.logged("lost connection to RabbitMQ, reconnecting") >= 2, "{}", replay.log());
    assert_eq!(replay.logged("none of them had failed again after the reconnect"), 1, "{}", replay.log());
    assert_eq!(bench.depth(".dead").await, 0, "all the others were sent");
    bench.assert_each_once(30);
    worker.terminate().await;
}

/// A message leaves its delay queue and is settled while there is no connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_message_that_finished_while_disconnected_does_not_hold_back_others() {
    let bench = Bench::dead_people(3).await.set("RETRY_IN_PLACE", "0s").set("RETRY_DELAYS", "[\"6s\"]");
    let unavailable = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(unavailable).on("POST", "/lead/").containing("\"u1\"").times(1));
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "1", "--wait", "10s"]);
    bench.depth_becomes(".retry.6s", 1).await;
    proxy.mute(true);
    proxy.cut();
    leads(&bench, &worker, 2).await;
    bench.depth_becomes(".dead", 1).await;
    idle(&worker).await;
    proxy.mute(false);
    assert_eq!(replay.ended().await.code(), Some(69), "{}", replay.log());
    assert_eq!(bench.depth(".dead").await, 0, "the last one was sent");
    bench.assert_each_once(3);
    worker.terminate().await;
}

/// The dead letter shows that the message failed again, although its outcome was missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_message_that_fails_while_disconnected_stops_the_replay() {
    let bench = Bench::dead_people(30).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 8000 }).on("POST", "/data/").times(1));
    bench.refuse("");
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all"]);
    bench.depth_becomes(".dead", 29).await;
    worker.until("processing", async |worker| worker.metrics().await.count("messages_in_flight") == 1).await;
    proxy.mute(true);
    proxy.cut();
    bench.depth_becomes(".dead", 30).await;
    idle(&worker).await;
    proxy.mute(false);
    assert_eq!(replay.ended().await.code(), Some(1), "{}", replay.log());
    assert_eq!(replay.logged("the first message failed again"), 1, "{}", replay.log());
    assert_eq!(replay.logged("Close said"), 0, "the answer is only in the missed outcome");
    assert_eq!(worker.metrics().await.outcome("dead"), 1);
    assert_eq!(bench.depth(".dead").await, 30);
    worker.terminate().await;
}

/// Ctrl-C works while RabbitMQ is unavailable, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_reconnects_can_be_stopped() {
    let bench = Bench::dead_people(30).await;
    bench.slow(SLOW);
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    drop(proxy);
    replay
        .until("lost", async |replay| replay.logged("lost connection to RabbitMQ, reconnecting") == 1)
        .await;
    replay.signal("INT");
    assert_eq!(replay.ended().await.code(), Some(1), "{}", replay.log());
    assert_eq!(replay.logged("run the same replay again to continue"), 1, "{}", replay.log());
    worker.terminate().await;
}

/// Whatever their number. RabbitMQ counts how often each was taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_reads_a_dead_letter_a_few_times() {
    let bench = Bench::dead_people(1600).await;
    bench.output(&["dlq", "replay", "--all", "--limit", "1300", "--no-wait"]).await;
    assert_eq!((bench.depth("").await, bench.depth(".dead").await), (1300, 300));
    let (_, headers, _) = bench.take_dead_letter().await;
    // For interrupted edits, to choose the oldest, and with the last batch.
    let count = headers.get("x-delivery-count").map(|count| count.parse::<u32>().unwrap());
    assert!(count.is_some_and(|count| (2..=4).contains(&count)), "{count:?}");
}

/// A list needs little memory. Prints how long it takes.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_dead_letters_are_listed_in_little_memory() {
    const MANY: usize = 10_000;
    let started = Instant::now();
    let bench = Bench::dead_people(MANY).await;
    let imported = started.elapsed();
    let started = Instant::now();
    let listing = bench.starting(&["dlq", "list"]);
    let mut memory = 0;
    while let Some(peak) = listing.peak_memory() {
        memory = memory.max(peak);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(listing.ended().await.success(), "{}", listing.log());
    let listed_in = started.elapsed();
    writeln!(
        std::io::stderr(),
        "{MANY} dead letters: imported in {} ms, listed in {} ms with {} MiB",
        imported.as_millis(),
        listed_in.as_millis(),
        memory / 1024
    )
    .unwrap();
    assert!(memory > 0 && memory < 200 * 1024, "{memory} KiB");
    let listed = bench.output(&["dlq", "list"]).await;
    assert!(listed.contains("10000") && listed.lines().count() < 10, "groups only: {listed}");
    assert_eq!(bench.depth(".dead").await, 10_000);
}
