//! Workers and brokers that stop, crash and return while messages are processed.

use close_sync_simulator::{Effect, Fault, Settings, When};
use lapin::BasicProperties;
use serde_json::json;

use crate::support::{Bench, Node, Proxy, Worker, identify, people, refusal};

/// The worker is killed after Close created the Lead and before it answered. Search does not list the Lead yet, and the
/// next worker must not create it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_interrupted_by_a_crash_is_neither_lost_nor_duplicated() {
    let settings = Settings::fast().with(|close| close.search_lag = "4s".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "5s");
    let held = Effect::Timeout { ms: 60_000, when: When::AfterCommit };
    bench.simulator.fault(Fault::new(held).on("POST", "/lead/").times(1));
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.until("writing", async |_| bench.simulator.leads().len() == 1).await;
    worker.kill().await;

    let successor = bench.worker().await;
    let metrics = successor.settled(1).await;
    assert_eq!(metrics.outcomes(), [("unchanged", 1)].into());
    bench.assert_each_once(1);
    let guarded = ["lag_guard_waits_total", "duplicates_avoided_total"].map(|name| metrics.count(name));
    assert_eq!(guarded, [1, 1], "{}", successor.log());
    successor.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_messages_in_flight_and_requeues_the_others() {
    let bench = Bench::new().await.set("WORKER_CONCURRENCY", "4");
    // Slow enough that a busy machine still sees some of them waiting.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 1000 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    bench.publish(&people(20)).await;
    let all_received = async |worker: &Worker| {
        let metrics = worker.metrics().await;
        let (running, waiting) = (metrics.count("messages_in_flight"), metrics.count("messages_waiting"));
        running == 4 && waiting >= 4 && running + waiting + metrics.outcome("created") == 20
    };
    worker.until("working", all_received).await;
    worker.terminate().await;

    let leads = bench.simulator.leads().len();
    assert!((4..20).contains(&leads), "{leads}");
    bench.depth_becomes("", u32::try_from(20 - leads).unwrap()).await;
    assert_eq!(
        worker.logged(&format!("\"settled\":{leads},\"handed_back\":{}", 20 - leads)),
        1,
        "{}",
        worker.log()
    );

    bench.simulator.clear_faults();
    let successor = bench.worker().await;
    successor.settled(20 - leads).await;
    bench.assert_each_once(20);
    successor.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stops_at_the_end_of_the_grace_period() {
    let bench = Bench::new().await.set("WORKER_GRACE", "200ms").set("CLOSE_SEARCH_LAG", "1s");
    // A worker that waited for this answer would not end while the test waits for it.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 600_000 }).on("POST", "/lead/").times(1));
    let bench = bench.set("CLOSE_TIMEOUT", "10m");
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.until("working", async |_| bench.writes().len() == 1).await;
    worker.terminate().await;
    assert_eq!(worker.logged("\"grace_s\":0"), 1, "the grace period comes from the setting");
    bench.depth_becomes("", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_when_the_active_worker_dies() {
    let bench = Bench::new().await;
    // Without heartbeats, only the end of the connection shows that the active worker died.
    let url = format!("{}?heartbeat=0", bench.amqp_url);
    let bench = bench.set("AMQP_URL", &url);
    let active = bench.worker().await;
    bench.publish(&people(1)).await;
    active.settled(1).await;
    let standby = bench.worker().await;
    assert!(standby.is("standing_by", None).await);
    bench.publish(&people(3)).await;
    active.settled(4).await;
    assert_eq!(standby.metrics().await.outcomes(), [].into(), "only the active worker processes messages");

    bench.publish(&people(5)[4..]).await;
    active.settled(5).await;
    active.kill().await;
    bench.publish(&people(5)).await;
    standby.until("processing", async |standby| standby.metrics().await.settled() > 0.0).await;
    standby.settled(5).await;
    assert_eq!(standby.ready().await.1["state"], "consuming");
    bench.assert_each_once(5);
    standby.terminate().await;
}

/// Workers are replaced one after the other while they process messages: a new one stands by, then the old one stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_processes_each_message_once() {
    let bench = Bench::new().await.set("WORKER_CONCURRENCY", "8");
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 30 }).on("POST", "/lead/"));
    let mut active = bench.worker().await;
    let (people, mut settled) = (people(200), 0);
    for (generation, people) in (1..).zip(people.chunks(50)) {
        bench.publish(people).await;
        let standby = bench.worker().await;
        active.until("working", async |_| bench.simulator.leads().len() > 50 * (generation - 1) + 10).await;
        active.signal("TERM");
        let before = std::mem::replace(&mut active, standby);
        assert!(before.ended().await.success(), "{}", before.log());
        let log = before.log();
        let last = log.lines().find(|line| line.contains(r#""handed_back":"#)).unwrap();
        let fields: serde_json::Value = serde_json::from_str(last).unwrap();
        settled += u32::try_from(fields["settled"].as_u64().unwrap()).unwrap();
    }
    bench.depth_becomes("", 0).await;
    let rest = async |active: &Worker| active.metrics().await.sum("messages_settled_total");
    active.until("done", async |active| rest(active).await + settled >= 200).await;
    assert_eq!(rest(&active).await + settled, 200, "each message once");
    bench.assert_each_once(200);
    assert_eq!(bench.simulator.request_count("POST", "/lead/"), 200, "each written once");
    active.terminate().await;
}

/// During an alarm RabbitMQ accepts no messages. A message to dead-letter is held, and dead-lettered once after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_dead_letter_is_held_during_an_alarm() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await.set("WORKER_HOLD", "10m");
    // An update without a new key: creations and new keys wait for the journal.
    bench.lead(None, json!([{"name": "Jane", "custom.cf_contactuserid": "u1"}]));
    let event = identify("u1", json!({"title": "CTO"}));
    // RabbitMQ blocks only connections that have published.
    let worker = bench.worker().await;
    bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    worker.settled(1).await;

    let busy = Effect::RateLimited { retry_after: 0.2, with_headers: false };
    bench.simulator.fault(Fault::new(busy).on("POST", "/data/"));
    bench.publish(&[event]).await;
    worker.until("looking up", async |_| bench.simulator.request_count("POST", "/data/") > 0).await;
    node.alarm(true).await;
    bench.simulator.clear_faults();
    bench.simulator.fault(Fault::new(refusal()).on("PUT", "/contact/"));
    worker.until("held", async |worker| worker.metrics().await.count("successors_held") == 1).await;
    worker.until("blocked", async |worker| worker.metrics().await.count("broker_alarm") == 1).await;
    let metrics = worker.metrics().await;
    assert_eq!((metrics.outcome("dead"), worker.events("dead_lettered")), (1, 1), "held");
    let (status, readiness) = worker.ready().await;
    assert_eq!(
        (status, &readiness["state"], &readiness["alarm"]),
        (503, &json!("consuming"), &json!("low on memory"))
    );
    node.alarm(false).await;
    let metrics = worker.settled(2).await;
    assert_eq!((metrics.count("broker_alarm"), metrics.count("successors_held")), (0, 0));
    assert_eq!(worker.events("dead_lettered"), 2);
    bench.depth_becomes(".dead", 2).await;
    assert_eq!(worker.metrics().await.count(r#"broker_connection_losses_total{cause="lost"}"#), 0);
    worker.terminate().await;
}

/// A connection that is blocked by an alarm cannot be closed gracefully. Each session that ends meanwhile has one.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_end_during_an_alarm_leave_no_connections_behind() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await;
    bench.worker().await.terminate().await;
    bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    node.alarm(true).await;
    let worker = bench.starting_worker();
    for sessions in 1.. {
        // It has published a dead letter, and RabbitMQ does not confirm it.
        worker.until("blocked", async |worker| worker.events("alarm_raised") >= sessions).await;
        worker.until("down to two connections", async |worker| worker.threads("lapin-io-loop") == 2).await;
        if sessions == 3 {
            break;
        }
        let connections = node.ctl(&["list_connections", "pid", "client_properties"]).await;
        let consuming = connections.lines().find(|line| line.contains("close-sync consume")).unwrap();
        node.ctl(&["close_connection", consuming.split_whitespace().next().unwrap(), "test"]).await;
    }
    node.alarm(false).await;
    bench.depth_becomes("", 0).await;
    // Unconfirmed dead letters of earlier sessions may arrive now, too.
    assert!(bench.depth(".dead").await >= 1);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restart_loses_and_duplicates_nothing() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await.set("WORKER_CONCURRENCY", "4");
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 100 }).on("POST", "/lead/"));
    bench.publish(&people(60)).await;
    worker.until("working", async |_| bench.simulator.leads().len() > 8).await;

    node.kill().await;
    worker.until("reconnecting", async |worker| worker.is("connecting", Some("unreachable")).await).await;
    let metrics = worker.metrics().await;
    assert_eq!(
        (metrics.count("broker_connected"), metrics.count(r#"broker_trouble{cause="unreachable"}"#)),
        (0, 1)
    );
    assert_eq!(
        worker.page("/healthz").await.unwrap().0,
        200,
        "the worker is alive; a restart would not help"
    );
    node.start_again().await;

    worker.until("done", async |_| bench.simulator.leads().len() >= 60).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(60);
    let metrics = worker.metrics().await;
    assert_eq!(metrics.count(r#"broker_connection_losses_total{cause="lost"}"#), 1);
    assert_eq!(metrics.count(r#"broker_trouble{cause="unreachable"}"#), 0);
    assert_eq!(worker.events("broker_lost"), 1, "one line per incident");
    let version = node.ctl(&["version"]).await;
    assert_eq!(worker.events("broker_version"), 1, "logged once per version");
    assert_eq!(worker.metrics().await.count(&format!("broker_info{{version=\"{version}\"}}")), 1);
    worker.terminate().await;
}

/// Close answers so late that RabbitMQ redelivers the message (rabbitmq.md §3.5). The second attempt finds the record of
/// the first one. Depending on its version, RabbitMQ closes the channel or cancels the consumer.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_past_the_consumer_timeout_is_neither_lost_nor_duplicated() {
    let node = Node::with(&["--advanced", QUICK_CONSUMER_TIMEOUT]).await;
    let bench = Bench::on(&node.url, Settings::fast()).await.set("CLOSE_TIMEOUT", "1m");
    let held = Effect::Timeout { ms: 60_000, when: When::AfterCommit };
    bench.simulator.fault(Fault::new(held).on("POST", "/lead/").times(1));
    let worker = bench.worker().await;
    bench.publish(&people(5)).await;
    let metrics = worker.settled(5).await;
    assert_eq!(metrics.outcomes().get("unchanged"), Some(&1), "{metrics:?}");
    assert_eq!((metrics.outcome("dead"), metrics.outcome("delayed")), (0, 0));
    bench.assert_each_once(5);
    assert_eq!(metrics.sum("broker_connection_losses_total"), 1, "{}", worker.log());
    bench.depth_becomes("", 0).await;
    worker.terminate().await;
}

/// Ten seconds. RabbitMQ before 4.3 checks it only at each channel tick (rabbitmq.md §1.2).
const QUICK_CONSUMER_TIMEOUT: &str =
    "[{rabbit, [{consumer_timeout, 10000}, {channel_tick_interval, 5000}]}].";

/// The session ends although the connection is lost while messages are acked, and the next one begins.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lost_between_acks_is_replaced() {
    let bench = Bench::new().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let worker = bench.worker().await;
    for round in 0..20 {
        // Nothing to write, so acks follow each other closely.
        let people: Vec<_> = (0..150).map(|n| identify(&format!("u{n}"), json!({}))).collect();
        let before = bench.simulator.requests().len();
        bench.publish(&people).await;
        worker.until("working", async |_| bench.simulator.requests().len() > before + 20).await;
        proxy.cut_one(round);
        bench.depth_becomes("", 0).await;
    }
    worker.terminate().await;
}

/// The grace period is longer than the stall guard's limit. The guard must not stop writes while the worker shuts down.
#[tokio::test(flavor = "multi_thread")]
async fn messages_in_flight_are_written_until_the_end_of_the_grace_period() {
    let bench = Bench::new().await;
    let url = format!("{}?heartbeat=1", bench.amqp_url);
    let bench = bench.set("AMQP_URL", &url);
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 4000 }).on("POST", "/data/"));
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.until("looking up", async |_| bench.simulator.request_count("POST", "/data/") == 1).await;
    worker.terminate().await;
    bench.assert_each_once(1);
}
