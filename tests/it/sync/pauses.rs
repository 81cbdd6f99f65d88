//! Faults that a message does not cause pause consumption, and use no attempt of a message (design.md P5).

use std::time::{Duration, Instant};

use close_sync_simulator::{Effect, Fault, FaultBody, Limits, Rate, Settings, When};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify, people};

fn status(code: u16) -> Effect {
    Effect::Status { code, body: FaultBody::default(), when: When::BeforeCommit }
}

async fn paused(worker: &Worker, cause: &str) {
    worker.until(&format!("paused: {cause}"), async |worker| worker.is("paused", Some(cause)).await).await;
}

/// Each fault with the cause of the pause. All messages are synced once the fault is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_that_hits_every_message_uses_no_attempts() {
    let no_fields =
        |code, body: Value| Effect::Status { code, body: FaultBody::Exactly(body), when: When::BeforeCommit };
    let gone = json!({"errors": [], "field-errors": {"custom.cf_leadcompanyid": "The Custom Field \"x\" does not exist."}});
    let anywhere = |effect| vec![Fault::new(effect)];
    let cases: [(&str, Vec<Fault>, &str); 7] = [
        ("plan limit", vec![Fault::new(status(402)).on("POST", "/lead/")], "plan_limit"),
        ("key forbidden", anywhere(status(403)), "forbidden"),
        ("search forbidden", vec![Fault::new(status(403)).on("POST", "/data/")], "forbidden"),
        ("nothing there", anywhere(status(404)), "unreachable"),
        ("down", anywhere(status(503)), "unreachable"),
        (
            "field gone",
            vec![
                Fault::new(no_fields(400, gone)).on("POST", "/lead/"),
                Fault::new(no_fields(200, json!({"fields": []}))).on("GET", "/custom_field_schema/lead/"),
            ],
            "lookup_field",
        ),
        (
            "field retyped",
            vec![
                Fault::new(no_fields(400, json!({"error": "bad query"}))).on("POST", "/data/"),
                Fault::new(no_fields(
                    200,
                    json!({"fields": [{"id": "cf_leadcompanyid", "name": "Company ID", "type": "number"}]}),
                ))
                .on("GET", "/custom_field_schema/lead/"),
            ],
            "lookup_field",
        ),
    ];
    for (name, faults, cause) in cases {
        let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms");
        let worker = bench.worker().await;
        for fault in faults {
            bench.simulator.fault(fault);
        }
        let events = (0..5).map(|n| identify(&format!("u{n}"), json!({"company": {"id": format!("c{n}")}})));
        bench.publish(&events.collect::<Vec<_>>()).await;
        paused(&worker, cause).await;
        assert_eq!(worker.metrics().await.count(&format!("paused{{cause=\"{cause}\"}}")), 1, "{name}");
        bench.simulator.clear_faults();
        let metrics = worker.settled(5).await;
        assert_eq!(metrics.outcomes().get("created"), Some(&5), "{name}: {metrics:?}");
        assert_eq!((metrics.outcome("dead"), metrics.outcome("delayed")), (0, 0), "{name}");
        assert_eq!(bench.simulator.leads().len(), 5, "{name}");
        worker.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_pauses_and_uses_no_attempts() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;

    bench.simulator.set_api_key("another");
    bench.publish(&(2..7).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    paused(&worker, "unauthorized").await;
    assert_eq!(worker.metrics().await.count("paused{cause=\"unauthorized\"}"), 1);
    bench.depth_becomes("", 5).await;
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    assert_eq!(worker.logged("\"ERROR\""), 1, "one error per incident");

    bench.simulator.set_api_key("api_simulator.key");
    let metrics = worker.settled(6).await;
    assert_eq!(metrics.outcome("created"), 6);
    assert_eq!(metrics.count("paused{cause=\"unauthorized\"}"), 0);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_close_pauses_too() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms").set("WORKER_GRACE", "10m");
    let worker = bench.worker().await;
    bench.simulator.stop().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    paused(&worker, "unreachable").await;
    bench.depth_becomes("", 1).await;
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    // A paused worker does not use its grace period, which is longer than this test waits.
    worker.terminate().await;
}

/// The key works, but every creation fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_because_most_messages_fail_uses_no_attempts() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "3s").set("WORKER_CONCURRENCY", "16");
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(status(500)).on("POST", "/lead/"));
    bench.publish(&(0..200).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    paused(&worker, "failing").await;
    worker.until("tried again", async |worker| worker.events("pause_extended") >= 2).await;
    assert_eq!(worker.ready().await.1["cause"], "failing", "also while the breaker is half-open");
    let metrics = worker.metrics().await;
    assert_eq!(
        (metrics.count("paused{cause=\"failing\"}"), metrics.count("pauses_total{cause=\"failing\"}")),
        (1, 1)
    );
    assert_eq!(worker.logged("\"ERROR\""), 1, "one error per incident");
    // Those that were in hand, and then three at a time. How often each is tried before enough others have
    // failed as well is a matter of time: such retries are counted by themselves, after what they are taken from.
    let tried = bench.simulator.request_count("POST", "/lead/");
    let reopened = worker.events("pause_extended");
    let retried = worker.metrics().await.count("retries_total{stage=\"write\"}");
    assert!(tried < 200, "{tried} attempts to create: as many as there are messages");
    let first_tries = tried.saturating_sub(retried as usize);
    assert!(
        first_tries <= 16 + 3 * (reopened + 1),
        "{first_tries} first attempts to create, reopened {reopened} times"
    );

    bench.simulator.clear_faults();
    let done = async |worker: &Worker| {
        let metrics = worker.metrics().await;
        metrics.outcome("created") + metrics.outcome("unchanged") == 200
    };
    worker.until("done", done).await;
    let metrics = worker.metrics().await;
    // A probe that fails alone may use up its retries before other failures open the breaker again.
    assert_eq!(metrics.outcome("dead"), 0);
    assert!(metrics.outcome("delayed") <= 3, "{} delayed", metrics.outcome("delayed"));
    assert_eq!(metrics.count("paused{cause=\"failing\"}"), 0);
    assert_eq!(bench.simulator.leads().len(), 200);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_always_fails_does_not_pause() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "500ms");
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(status(500)).on("POST", "/lead/").containing("poison"));
    let name = |n| if n % 10 == 0 { format!("poison {n}") } else { format!("Person {n}") };
    bench
        .publish(&(0..50).map(|n| identify(&format!("u{n}"), json!({"name": name(n)}))).collect::<Vec<_>>())
        .await;
    // Two delays, each of which is a settled delivery too.
    let metrics = worker.settled(50 + 10).await;
    assert_eq!(metrics.outcomes(), [("created", 45), ("dead", 5), ("delayed", 10)].into());
    assert_eq!(metrics.count("dead_letters_total{reason=\"exhausted\"}"), 5);
    assert_eq!(worker.events("pause_began"), 0);
    worker.terminate().await;
}

/// After a pause, a message that always fails is the first to run.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_always_fails_does_not_hold_up_the_end_of_a_pause() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms");
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(status(500)));
    let name = |n| if n == 0 { "poison".to_owned() } else { format!("Person {n}") };
    bench
        .publish(&(0..20).map(|n| identify(&format!("u{n}"), json!({"name": name(n)}))).collect::<Vec<_>>())
        .await;
    worker.until("paused", async |worker| worker.ready().await.1["state"] == "paused").await;
    bench.simulator.clear_faults();
    bench.simulator.fault(Fault::new(status(500)).on("POST", "/lead/").containing("poison"));
    let metrics = worker.settled(19 + 2 + 1).await;
    assert_eq!((metrics.outcome("created"), metrics.outcome("dead")), (19, 1));
    worker.terminate().await;
}

/// They are first in the queue, and enough to pause consumption. The others are synced all the same.
#[tokio::test(flavor = "multi_thread")]
async fn many_messages_that_always_fail_do_not_block_the_others() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "1s").set("WORKER_CONCURRENCY", "16");
    bench.simulator.fault(Fault::new(status(500)).on("POST", "/lead/").containing("poison"));
    let name = |n| if n < 15 { format!("poison {n}") } else { format!("Person {n}") };
    let worker = bench.worker().await;
    bench
        .publish(&(0..55).map(|n| identify(&format!("u{n}"), json!({"name": name(n)}))).collect::<Vec<_>>())
        .await;
    worker.until("done with the others", async |_| bench.simulator.contacts().len() == 40).await;
    worker.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_failed_search_that_many_share_does_not_pause() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("first", json!({}))]).await;
    worker.settled(1).await;
    // The others wait for the first look-up, so that they share a search, which fails.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 1000 }).on("POST", "/data/").times(1));
    bench.simulator.fault(Fault::new(status(500)).on("POST", "/data/").times(1));
    bench.publish(&(0..16).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    let metrics = worker.settled(17).await;
    assert_eq!(metrics.outcomes(), [("created", 17)].into());
    assert_eq!(worker.events("pause_began"), 0);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_fixed_while_the_start_waits_for_close_is_applied() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("close-sync.toml");
    std::fs::write(&file, "[close]\napi_url = \"http://127.0.0.1:1/api/v1/\"\n").unwrap();
    let bench = Bench::new().await.unset("CLOSE_API_URL").set("CLOSE_SYNC_CONFIG", file.to_str().unwrap());
    let worker = bench.starting_worker();
    paused(&worker, "unreachable").await;
    std::fs::write(&file, format!("[close]\napi_url = \"{}\"\n", bench.simulator.url())).unwrap();
    worker.signal("HUP");
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    assert_eq!(worker.metrics().await.count("paused{cause=\"unreachable\"}"), 0);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_is_applied_on_sighup_and_an_invalid_configuration_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("close-sync.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    write("[close]\napi_key = \"api_simulator.key\"\n");
    let bench = Bench::new().await.unset("CLOSE_API_KEY").set("CLOSE_SYNC_CONFIG", file.to_str().unwrap());
    let broker = format!("[amqp]\nurl = \"{}\"\n", bench.amqp_url);
    let bench = bench.unset("AMQP_URL");
    let write =
        |text: &str| write(&if text.contains("amqp") { text.to_owned() } else { format!("{broker}{text}") });
    write("[close]\napi_key = \"api_simulator.key\"\n");
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;

    worker.signal("HUP");
    worker.until("read", async |worker| worker.events("reload_unchanged") == 1).await;
    assert_eq!(worker.events("broker_connected"), 1, "an unchanged file changes nothing");

    let problems = [
        ("[close]\napi_key = \"api_hunter2.key\"\n", "Close does not accept the API key"),
        ("[close\n", "not valid TOML"),
        ("[worker]\nconcurrency = 0\n", "worker.concurrency"),
        (
            "[close]\napi_key = \"api_simulator.key\"\n[amqp]\nurl = \"amqp://127.0.0.1:1/%2f\"\n",
            "cannot reach RabbitMQ",
        ),
    ];
    for (refused, (text, logged)) in (1..).zip(problems) {
        write(text);
        worker.signal("HUP");
        worker.until("refusing", async |worker| worker.events("reload_rejected") == refused).await;
        assert!(worker.log().contains(logged), "{logged}: {}", worker.log());
    }
    assert_eq!(worker.logged("hunter2"), 0);
    bench.publish(&[identify("u2", json!({}))]).await;
    worker.settled(2).await;

    bench.simulator.set_api_key("api_simulator.second");
    bench.publish(&[identify("u3", json!({}))]).await;
    paused(&worker, "unauthorized").await;
    write("[close]\napi_key = \"api_simulator.second\"\n\n[switches]\nallow_creating_new_leads = false\n");
    worker.signal("HUP");
    let metrics = worker.settled(3).await;
    assert_eq!((metrics.outcome("created"), metrics.outcome("skipped")), (2, 1), "all settings are applied");
    assert_eq!(metrics.count("paused{cause=\"unauthorized\"}"), 0);
    worker.terminate().await;
}

/// The environment names files, and their content changes: the key is replaced while the worker runs, and the old key
/// is revoked.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_a_file_is_replaced_while_the_worker_runs() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        let file = directory.path().join(name);
        std::fs::write(&file, format!("{content}\n")).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let bench = Bench::new().await.set("WORKER_CONCURRENCY", "4");
    let (key, url) = (write("key", "api_simulator.key"), write("url", &bench.amqp_url));
    let bench = bench.unset("CLOSE_API_KEY").set("CLOSE_API_KEY_FILE", &key);
    let bench = bench.unset("AMQP_URL").set("AMQP_URL_FILE", &url);
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 50 }).on("POST", "/lead/"));
    bench.publish(&people(100)).await;
    worker.until("working", async |worker| worker.metrics().await.settled() >= 10.0).await;

    // The file is missing for a moment, as during a replacement. The worker keeps the old key.
    std::fs::remove_file(&key).unwrap();
    worker.signal("HUP");
    worker.until("refusing", async |worker| worker.events("reload_rejected") == 1).await;
    assert!(worker.log().contains("(CLOSE_API_KEY_FILE): No such file"), "{}", worker.log());

    write("key", "api_simulator.second");
    bench.simulator.set_api_key("api_simulator.second");
    worker.signal("HUP");
    worker.until("reloaded", async |worker| worker.events("reload_applied") == 1).await;
    bench.depth_becomes("", 0).await;
    worker.until("done", async |_| bench.simulator.leads().len() == 100).await;
    worker.terminate().await;
    bench.assert_each_once(100);
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    assert_eq!(worker.logged("api_simulator"), 0, "{}", worker.log());
}

/// Close is unreachable for a while, and the queue is long.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_with_a_long_queue_uses_no_attempts_and_causes_no_429s() {
    let limits = Limits { contact: Rate::new(1000, 1), lead: Rate::new(500, 1), ..Limits::unlimited() };
    let bench = Bench::with(Settings { limits, ..Settings::fast() }).await.set("WORKER_RECHECK", "0s");
    let worker = bench.worker().await;
    let person = |n: usize| identify(&format!("u{}", n % 100), json!({"title": format!("T{}", n % 3)}));
    bench.publish(&(0..100).map(person).collect::<Vec<_>>()).await;
    worker.settled(100).await;

    bench.simulator.fault(Fault::new(Effect::DropConnection { when: When::BeforeCommit }));
    bench.publish(&(0..10_000).map(person).collect::<Vec<_>>()).await;
    worker.until("paused", async |worker| worker.ready().await.1["state"] == "paused").await;
    bench.depth_becomes("", 10_000).await;
    bench.simulator.clear_faults();

    let start = Instant::now();
    while worker.metrics().await.settled() < 10_100.0 {
        assert!(start.elapsed() < Duration::from_mins(3), "{}", worker.metrics().await.settled());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let metrics = worker.metrics().await;
    assert_eq!(
        (metrics.outcome("dead"), metrics.outcome("delayed"), metrics.outcome("created")),
        (0, 0, 100)
    );
    let refused: u32 = ["search", "read_contact", "read_lead", "update_contact"]
        .map(|endpoint| {
            metrics.count(&format!("close_requests_total{{endpoint=\"{endpoint}\",status=\"rate_limited\"}}"))
        })
        .iter()
        .sum();
    assert_eq!(refused, 0, "429s");
    assert_eq!(bench.simulator.contacts().len(), 100);
    worker.terminate().await;
}
