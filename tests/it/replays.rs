//! Dead letters under load, under several hands, and under fire.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::Output;
use std::time::{Duration, Instant};

use close_sync::simulator::{Effect, Fault, FaultBody, When};
use serde_json::{Value, json};

use crate::support::{Bench, Proxy, Worker, identify, people};

/// A line for `dlq import`: the `number`th dead letter, about this event.
fn line(number: usize, event: &Value) -> String {
    let at = jiff::Timestamp::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + number as u64);
    let line = json!({
        "properties": {"message_id": format!("m{number}")},
        "headers": {
            "x-close-sync-dead-letter-id": format!("dead-{number}"), "x-close-sync-reason": "rejected",
            "x-close-sync-stage": "write", "x-close-sync-fingerprint": "rejected:write:name",
            "x-close-sync-failed-at": at.to_string(), "x-close-sync-first-seen": at.to_string(),
            "x-close-sync-attempt": 1,
        },
        "body": event.to_string(),
    });
    line.to_string()
}

/// A bench whose dead-letter queue holds these events.
async fn dead(events: &[Value]) -> Bench {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    import(&bench, events).await;
    bench
}

async fn import(bench: &Bench, events: &[Value]) {
    let lines: Vec<_> = events.iter().enumerate().map(|(number, event)| line(number, event)).collect();
    let imported = bench.run(&["dlq", "import", "-"], lines.join("\n").as_bytes()).await;
    assert_eq!(
        text(imported),
        (Some(0), format!("imported {}, replaced 0, 0 were there already\n", events.len()))
    );
}

fn text(Output { status, stdout, stderr }: Output) -> (Option<i32>, String) {
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

/// The ids of the dead letters in the order of the queue.
async fn queue(bench: &Bench) -> Vec<String> {
    let lines = bench.output(&["dlq", "export"]).await;
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned();
    lines.lines().map(id).collect()
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("dead-{number}")).collect()
}

/// Waits until as many Leads are there.
async fn leads(bench: &Bench, worker: &Worker, count: usize) {
    worker.until("that far", async |_| bench.simulator.leads().len() >= count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_looks_sees_all_of_them_however_many_look_at_once() {
    let bench = dead(&people(300)).await;
    let looks = (0..6).map(|_| queue(&bench));
    for seen in futures_util::future::join_all(looks).await {
        assert!(seen == ids(300), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_that_is_killed_leaves_everything_in_its_place() {
    let bench = dead(&people(3000)).await;
    for _ in 0..3 {
        let looking = bench.starting(&["dlq", "list"]);
        looking.until("looking", async |_| bench.depth(".dead").await < 3000).await;
        looking.kill().await;
        bench.depth_becomes(".dead", 3000).await;
    }
    assert!(queue(&bench).await == ids(3000));
}

/// Killed again and again, it goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_killed_loses_nothing_and_doubles_nobody() {
    let bench = dead(&people(60)).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 20 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    for reached in [5, 15, 30] {
        let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "4"]);
        leads(&bench, &worker, reached).await;
        replay.kill().await;
    }
    let rest = text(bench.run(&["dlq", "replay", "--all"], b"").await);
    assert_eq!(rest.0, Some(0), "{rest:?}");
    // Those that were under way when it was killed nobody waits for.
    leads(&bench, &worker, 60).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(60);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// The second waits for the first, also when that is killed, and each dead letter is replayed by one of them.
#[tokio::test(flavor = "multi_thread")]
async fn two_replays_take_turns() {
    let bench = dead(&people(40)).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 20 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let first = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    let second = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    second.until("waiting", async |second| second.logged("another operator") == 1).await;
    // Looking goes on meanwhile.
    let (code, words) = text(bench.run(&["dlq", "list"], b"").await);
    assert!(code == Some(0) && words.contains("a replay is under way"), "{words}");
    leads(&bench, &worker, 10).await;
    first.kill().await;
    assert!(second.ended().await.success(), "{}", second.log());
    leads(&bench, &worker, 40).await;
    bench.assert_each_once(40);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Events about the same people come live, newer than those replayed: what they say stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_under_live_traffic_overwrites_nothing_newer() {
    let about = |number: usize, year: u32, title: &str| {
        let mut event = people(number + 1).remove(number);
        event["timestamp"] = json!(format!("{year}-01-01T00:00:00Z"));
        event["traits"]["title"] = json!(title);
        event
    };
    let old: Vec<_> = (0..40).map(|number| about(number, 2023, "Old")).collect();
    let bench = dead(&old).await;
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

/// Close refuses Leads whose event has this in it.
fn refuse(bench: &Bench, containing: &str) {
    let refusal = json!({"errors": [], "field-errors": {"name": "This field is required."}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing(containing));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stops_at_the_first_that_fails_as_before() {
    let mut events = people(30);
    for bad in [0, 9, 20] {
        events[bad] = identify(&format!("u{bad}"), json!({"company": {"id": "bad"}}));
    }
    let bench = dead(&events).await;
    refuse(&bench, "bad");
    let worker = bench.worker().await;
    // The first fails: nothing else is sent.
    let (code, words) = text(bench.run(&["dlq", "replay", "--all"], b"").await);
    assert!(code == Some(1) && words.starts_with("replayed 1; 1 dead; 29 not sent\n"), "{words}");
    assert!(words.contains("rejected:write:name") && words.contains("the first one failed again"), "{words}");
    let metrics = worker.metrics().await;
    assert_eq!(metrics.outcomes(), [("dead", 1)].into());
    assert_eq!(metrics.count("messages_replayed_total{outcome=\"dead\"}"), 1);
    assert_eq!(queue(&bench).await[..29], ids(30)[1..]);

    // It is the last now. Of the others the tenth fails as it did before.
    let (code, words) = text(bench.run(&["dlq", "replay", "--all", "--at-once", "1"], b"").await);
    assert!(code == Some(1) && words.starts_with("replayed 9; 8 created, 1 dead; 21 not sent\n"), "{words}");
    assert!(words.contains("stopped"), "{words}");
    let output = bench.run(&["dlq", "replay", "--all", "--keep-going", "--json"], b"").await;
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let told = (output.status.code(), &summary["end"], &summary["failed_again"]);
    assert_eq!(told, (Some(1), &json!("done"), &json!(3)), "{summary:#}");
    assert_eq!(summary["outcomes"], json!({"created": 19, "dead": 3}));

    // Mended.
    bench.simulator.clear_faults();
    let (code, words) = text(bench.run(&["dlq", "replay", "--reason", "rejected"], b"").await);
    assert!(code == Some(0) && words.starts_with("replayed 3; 2 added, 1 created\n"), "{words}");
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// What waits in a delay queue is waited for; what is stopped goes on.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_delayed_is_waited_for_and_ctrl_c_stops_in_order() {
    let bench = dead(&people(20)).await.set("RETRY_IN_PLACE", "0s");
    let unavailable = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(unavailable).on("POST", "/lead/").times(1));
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 20 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    replay.signal("INT");
    assert_eq!(replay.ended().await.code(), Some(1), "{}", replay.log());
    assert_eq!(replay.logged("the same command goes on"), 1, "{}", replay.log());
    assert_eq!(worker.metrics().await.outcome("delayed"), 1);
    let left = queue(&bench).await;
    assert!(left.len() >= 10 && left[..] == ids(20)[20 - left.len()..], "{left:?}");
    bench.output(&["dlq", "replay", "--all"]).await;
    leads(&bench, &worker, 20).await;
    bench.assert_each_once(20);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_made_anew() {
    let bench = dead(&people(30)).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 20 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "8", "--wait", "5s"]);
    for reached in [5, 12] {
        leads(&bench, &worker, reached).await;
        proxy.cut();
    }
    // What was told while there was no connection nobody heard: then it does not say that all went well.
    let end = replay.ended().await.code();
    assert!(replay.logged("connecting again") >= 1, "{}", replay.log());
    let unheard = replay.logged("no worker told what became of") == 1;
    assert_eq!(end, Some(if unheard { 69 } else { 0 }), "{}", replay.log());
    let rest = text(bench.run(&["dlq", "replay", "--all"], b"").await);
    assert_eq!(rest.0, Some(0), "{rest:?}");
    leads(&bench, &worker, 30).await;
    bench.assert_each_once(30);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Ten thousand are looked at in seconds, with little memory.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_are_no_burden() {
    const MANY: usize = 10_000;
    let started = Instant::now();
    let bench = dead(&people(MANY)).await;
    let imported = started.elapsed();
    let started = Instant::now();
    let looking = bench.starting(&["dlq", "list"]);
    let mut memory = 0;
    while let Some(peak) = looking.peak_memory() {
        memory = memory.max(peak);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(looking.ended().await.success(), "{}", looking.log());
    let looked = started.elapsed();
    writeln!(
        std::io::stderr(),
        "{MANY} dead letters: imported in {} ms, listed in {} ms with {} MiB",
        imported.as_millis(),
        looked.as_millis(),
        memory / 1024
    )
    .unwrap();
    assert!(memory > 0 && memory < 200 * 1024, "{memory} KiB");
    let listed = bench.output(&["dlq", "list"]).await;
    assert!(listed.contains("10000") && listed.lines().count() < 10, "groups only: {listed}");
    assert_eq!(bench.depth(".dead").await, 10_000);
}
