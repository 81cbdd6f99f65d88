//! Dead letters under load, under several hands, and under fire.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::support::dead_letters::{ids, line};
use crate::support::{Bench, Proxy, Worker, identify, people};

/// What Close takes for a new Lead, so that there is something to be in the middle of.
const SLOW: Duration = Duration::from_millis(100);

/// Waits until as many Leads are there.
async fn leads(bench: &Bench, worker: &Worker, count: usize) {
    worker.until("that far", async |_| bench.simulator.leads().len() >= count).await;
}

/// Waits until nothing is in hand: all is settled and told.
async fn idle(worker: &Worker) {
    worker.until("idle", async |worker| worker.metrics().await.count("messages_in_flight") == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_looks_sees_all_of_them_however_many_look_at_once() {
    let bench = Bench::dead_people(300).await;
    let looks = (0..6).map(|_| bench.dead_ids());
    for seen in futures_util::future::join_all(looks).await {
        assert!(seen == ids(300), "{seen:?}");
    }
}

/// All of them are in one hand when they fit in; of more, those in hand come back behind the others.
#[tokio::test(flavor = "multi_thread")]
async fn looking_that_is_killed_leaves_everything_in_its_place() {
    for (count, fit) in [(1500, true), (6000, false)] {
        let bench = Bench::dead_people(count).await;
        let all = u32::try_from(count).unwrap();
        for _ in 0..2 {
            let looking = bench.starting(&["dlq", "list"]);
            looking.until("looking", async |_| bench.depth(".dead").await < all).await;
            looking.kill().await;
            bench.depth_becomes(".dead", all).await;
        }
        let mut seen = bench.dead_ids().await;
        let mut wanted = ids(count);
        if !fit {
            seen.sort_unstable();
            wanted.sort_unstable();
        }
        assert!(seen == wanted, "{} of {count}, the first {:?}", seen.len(), seen.first());
    }
}

/// Killed again and again, it goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_killed_loses_nothing_and_doubles_nobody() {
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
    let bench = Bench::dead_people(40).await;
    bench.slow(SLOW);
    let worker = bench.worker().await;
    let first = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    leads(&bench, &worker, 3).await;
    let second = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    second.until("waiting", async |second| second.logged("another operator") == 1).await;
    // Who does not want to wait is told that nothing was sent.
    let third = bench.starting(&["dlq", "replay", "--all"]);
    third.until("waiting", async |third| third.logged("another operator") == 1).await;
    third.signal("INT");
    assert_eq!(third.ended().await.code(), Some(1), "{}", third.log());
    assert_eq!(third.logged("run the same replay again to continue"), 1, "{}", third.log());
    // Looking goes on meanwhile.
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
async fn it_stops_at_the_first_that_fails_as_before() {
    let mut events = people(30);
    for bad in [0, 9, 20] {
        events[bad] = identify(&format!("u{bad}"), json!({"company": {"id": "bad"}}));
    }
    let bench = Bench::dead(&events).await;
    bench.refuse("bad");
    let worker = bench.worker().await;
    // The first fails: nothing else is sent.
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

    // It is the last now. Of the others the tenth fails as it did before.
    let (code, words) = bench.run_combined(&["dlq", "replay", "--all", "--at-once", "1"], "").await;
    assert!(code == Some(1) && words.starts_with("replayed 9; 8 created, 1 dead; 21 not sent\n"), "{words}");
    assert!(words.contains("stopped"), "{words}");
    let output = bench.run(&["dlq", "replay", "--all", "--keep-going", "--json"], b"").await;
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let told = (output.status.code(), &summary["end"], &summary["failed_again"]);
    assert_eq!(told, (Some(1), &json!("done"), &json!(3)), "{summary:#}");
    assert_eq!(summary["outcomes"], json!({"created": 19, "dead": 3}));

    // Mended.
    bench.simulator.clear_faults();
    let (code, words) = bench.run_combined(&["dlq", "replay", "--reason", "rejected"], "").await;
    assert!(code == Some(0) && words.starts_with("replayed 3; 2 added, 1 created\n"), "{words}");
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Close's own words may quote what is personal. Whoever replays is shown them, and nothing keeps them.
#[tokio::test(flavor = "multi_thread")]
async fn what_close_said_is_shown_to_whoever_replays() {
    let bench = Bench::dead_people(2).await;
    let exchange = format!("{}-outcomes", bench.exchange);
    let bench = bench.set("AMQP_OUTCOMES", &exchange);
    let words = "jane@example.test has no \u{1b}[2J quota left";
    let refusal = json!({"errors": [words], "field-errors": {}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let mut told = bench.outcomes(&exchange).await;
    let (code, words) = bench.run_combined(&["dlq", "replay", "--id", "dead-0"], "").await;
    assert!(code == Some(1) && words.contains("Close said: {\"errors\":[\"jane@example.test"), "{words}");
    assert!(words.contains("the message failed again\n") && !words.contains('\u{1b}'), "{words}");
    let kept = format!("{:?}", bench.dead_letters().await);
    assert!(kept.contains("rejected:write:-") && kept.contains("shows them"), "{kept}");
    let news = told.next().await.unwrap().unwrap();
    let news = String::from_utf8(news.data).unwrap();
    assert!(news.contains("rejected:write:-"), "{news}");
    for text in [kept, news, worker.log(), worker.page("/metrics").await.unwrap().1] {
        assert!(!text.contains("jane"), "{text}");
    }
    worker.terminate().await;
}

/// Of several kinds each is counted, before and after.
#[tokio::test(flavor = "multi_thread")]
async fn kinds_are_counted() {
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
        json!({"end": "dry_run", "found": 4, "matched": 2, "groups": {"rejected:write:name": 2}})
    );
    let listed = bench.output(&["dlq", "list"]).await;
    assert!(
        listed.contains("3  rejected:write:name  first ") && listed.contains("dlq show dead-2"),
        "{listed}"
    );
    bench.refuse("");
    let worker = bench.worker().await;
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all", "--keep-going"], "").await;
    let kinds = "failed again: 1 malformed:decode:not_an_object, 3 rejected:write:name; the last:";
    assert!(words.contains(kinds), "{words}");
    worker.terminate().await;
}

/// What waits in a delay queue is waited for; what is stopped goes on.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_delayed_is_waited_for_and_ctrl_c_stops_in_order() {
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
    let left = bench.dead_ids().await;
    assert!(left.len() >= 10 && left[..] == ids(20)[20 - left.len()..], "{left:?}");
    bench.output(&["dlq", "replay", "--all"]).await;
    leads(&bench, &worker, 20).await;
    bench.assert_each_once(20);
    worker.terminate().await;
}

/// What was told while there was no connection nobody heard: the others are sent all the same, and it does not say
/// that all went well.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_made_anew() {
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
        // All that was sent, also by halves, is done before it has a connection again.
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

/// One that waits in a delay comes out of it while there is no connection: nothing waits for it any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_delayed_and_done_while_the_connection_was_lost_takes_no_place() {
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

/// That it failed again shows among the dead letters when nobody could be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_one_that_fails_while_the_connection_is_lost_holds_the_others() {
    let bench = Bench::dead_people(30).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 8000 }).on("POST", "/data/").times(1));
    bench.refuse("");
    let worker = bench.worker().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let replay = bench.starting(&["dlq", "replay", "--all"]);
    bench.depth_becomes(".dead", 29).await;
    worker.until("at it", async |worker| worker.metrics().await.count("messages_in_flight") == 1).await;
    proxy.mute(true);
    proxy.cut();
    bench.depth_becomes(".dead", 30).await;
    idle(&worker).await;
    proxy.mute(false);
    assert_eq!(replay.ended().await.code(), Some(1), "{}", replay.log());
    assert_eq!(replay.logged("the first message failed again"), 1, "{}", replay.log());
    assert_eq!(replay.logged("Close said"), 0, "that is only told");
    assert_eq!(worker.metrics().await.outcome("dead"), 1);
    assert_eq!(bench.depth(".dead").await, 30);
    worker.terminate().await;
}

/// While RabbitMQ is gone, it can be stopped as well.
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

/// Ten thousand are looked at in seconds, with little memory.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_are_no_burden() {
    const MANY: usize = 10_000;
    let started = Instant::now();
    let bench = Bench::dead_people(MANY).await;
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
