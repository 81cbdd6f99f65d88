//! Deleted queues, refused messages, revoked credentials and silent connections: no message is lost, and the cause is
//! reported.

use std::time::{Duration, Instant};

use close_sync::amqp::envelope::{QUARANTINED, REASON, ROUTING_KEY};
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};

use crate::support::producer::{Producer, long, nested, text};
use crate::support::{Bench, Node, Proxy, TIMEOUT, Worker, people};

/// Waits until the worker has lost its connection for this cause at least once.
async fn lost(worker: &Worker, cause: &str) {
    let name = format!("broker_connection_losses_total{{cause=\"{cause}\"}}");
    worker.until(cause, async |worker| worker.metrics().await.count(&name) >= 1).await;
}

async fn unbind(bench: &Bench, queue: &str, exchange: &str, key: &str) {
    let channel = bench.channel().await;
    channel.queue_unbind(queue.into(), exchange.into(), key.into(), FieldTable::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_declared_again() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.settled(1).await;
    let queue = bench.queue.as_str();
    bench.channel().await.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    lost(&worker, "cancelled").await;
    worker.until("back", async |worker| worker.is("standing_by", None).await).await;
    bench.publish(&people(2)).await;
    worker.settled(3).await;
    bench.assert_each_once(2);
    worker.terminate().await;
}

/// The missing exchange closes the channel while a message is to be published to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_exchange_is_declared_again() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s");
    let worker = bench.worker().await;
    bench
        .channel()
        .await
        .exchange_delete(format!("{}.retry", bench.queue).into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
    let fails = Effect::Status { code: 500, body: FaultBody::Text, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(fails).on("POST", "/lead/").times(1));
    bench.publish(&people(1)).await;
    lost(&worker, "missing").await;
    worker.until("done", async |_| bench.simulator.leads().len() == 1).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(1);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// RabbitMQ does not report a removed binding.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_binding_is_declared_again() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    unbind(&bench, &bench.queue, &bench.exchange, "#").await;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let (channel, body) = (bench.channel().await, people(1)[0].to_string());
    let start = Instant::now();
    loop {
        let sent = channel.basic_publish(
            bench.exchange.as_str().into(),
            "users".into(),
            options,
            body.as_bytes(),
            BasicProperties::default(),
        );
        if sent.await.unwrap().await.unwrap() == lapin::Confirmation::Ack(None) {
            break;
        }
        assert!(start.elapsed() < TIMEOUT);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    worker.settled(1).await;
    worker.terminate().await;
}

/// A dead letter that cannot be routed is held and logged once. Other messages are processed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_held_while_its_dead_letter_cannot_be_routed() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let dead = format!("{}.dead", bench.queue);
    unbind(&bench, &dead, &dead, "").await;
    bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    bench.publish(&people(3)).await;
    worker.until("held", async |worker| worker.metrics().await.count("successors_held") == 1).await;
    assert_eq!(worker.settled(3).await.outcomes(), [("created", 3)].into());
    // The worker declares the binding again.
    worker.settled(4).await;
    bench.depth_becomes(".dead", 1).await;
    bench.depth_becomes("", 0).await;
    let metrics = worker.metrics().await;
    assert_eq!((metrics.count("successors_held"), metrics.sum("broker_connection_losses_total")), (0, 0));
    assert_eq!(worker.events("successor_held"), 1);
    assert_eq!(worker.logged("no queue is bound to exchange"), 1);
    worker.terminate().await;
}

/// A full queue rejects messages with a nack.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_held_while_the_dead_letter_queue_is_full() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await;
    let worker = bench.worker().await;
    let limit = async |messages: u32| {
        let policy = format!(r#"{{"max-length": {messages}, "overflow": "reject-publish"}}"#);
        node.ctl(&["set_policy", "full", r"\.dead$", &policy, "--apply-to", "queues"]).await;
    };
    limit(1).await;
    for n in 1..=6 {
        bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
        // One at a time, because a queue may accept a few messages beyond its limit.
        let is_handled = async |worker: &Worker| {
            let metrics = worker.metrics().await;
            metrics.outcome("dead") + metrics.count("successors_held") == n
        };
        worker.until("handled", is_handled).await;
    }
    let metrics = worker.metrics().await;
    let (accepted, held) = (metrics.outcome("dead"), metrics.count("successors_held"));
    assert!(held > 0);
    bench.publish(&people(1)).await;
    worker.until("synced", async |worker| worker.metrics().await.outcome("created") == 1).await;
    limit(100).await;
    // RabbitMQ 3.10 accepts messages again only when a full queue becomes shorter, not when its limit is raised.
    for _ in 0..accepted {
        bench.take_dead_letter().await;
    }
    worker.settled(7).await;
    bench.depth_becomes(".dead", held).await;
    bench.depth_becomes("", 0).await;
    assert_eq!(worker.metrics().await.sum("broker_connection_losses_total"), 0);
    worker.terminate().await;
}

/// A changed password and a revoked permission. The worker waits until both are restored.
#[tokio::test(flavor = "multi_thread")]
async fn the_worker_waits_for_revoked_credentials() {
    let node = Node::start().await;
    node.ctl(&["add_user", "worker", "first"]).await;
    node.ctl(&["set_permissions", "worker", ".*", ".*", ".*"]).await;
    let url = node.url.replace("guest:guest", "worker:first");
    let bench = Bench::on(&node.url, Settings::fast()).await.set("AMQP_URL", &url);
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.settled(1).await;

    node.ctl(&["change_password", "worker", "second"]).await;
    node.ctl(&["close_all_connections", "credentials were revoked"]).await;
    worker.until("refused", async |worker| worker.is("connecting", Some("refused")).await).await;
    let (status, readiness) = worker.ready().await;
    assert_eq!(status, 503);
    assert!(readiness["detail"].as_str().unwrap().contains("ACCESS_REFUSED"), "{readiness}");
    assert_eq!(worker.metrics().await.count("broker_trouble{cause=\"refused\"}"), 1);
    assert_eq!(worker.page("/healthz").await.unwrap().0, 200);
    bench.publish(&people(2)).await;
    node.ctl(&["change_password", "worker", "first"]).await;
    worker.settled(3).await;
    assert_eq!(worker.events("broker_lost"), 1, "one line per incident");
    assert_eq!(worker.logged("first") + worker.logged("second"), 0, "{}", worker.log());

    node.ctl(&["set_permissions", "worker", ".*", "^$", ".*"]).await;
    bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    worker.until("forbidden", async |worker| worker.is("connecting", Some("forbidden")).await).await;
    assert_eq!(bench.depth(".dead").await, 0);
    node.ctl(&["set_permissions", "worker", ".*", ".*", ".*"]).await;
    bench.depth_becomes(".dead", 1).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(2);
    worker.terminate().await;
}

/// The connections stay open, but nothing arrives, as when a network drops packets. The worker notices it within
/// [`TIMEOUT`], which is less than RabbitMQ's default heartbeat needs.
#[tokio::test(flavor = "multi_thread")]
async fn missing_heartbeats_end_a_silent_connection() {
    let node = Node::start().await;
    let url = format!("{}?heartbeat=2", node.url);
    let bench =
        Bench::on(&node.url, Settings::fast()).await.set("AMQP_URL", &url).set("WORKER_CONCURRENCY", "2");
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 100 }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    bench.publish(&people(40)).await;
    worker.until("working", async |_| bench.simulator.leads().len() > 5).await;
    node.pause().await;
    worker.until("noticed", async |worker| worker.ready().await.1["state"] == "connecting").await;
    node.resume().await;
    worker.until("done", async |_| bench.simulator.leads().len() >= 40).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(40);
    assert!(worker.logged("no heartbeat received") >= 1, "{}", worker.log());
    worker.terminate().await;
}

/// The start of `basic.qos`, which a session sends after it has both connections and before it consumes.
const QOS: [u8; 8] = [0, 0, 0, 11, 0, 60, 0, 10];

/// RabbitMQ is connected but does not answer. Without heartbeats only the time-out ends the session.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_start_without_answer_times_out() {
    let bench = Bench::new().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &format!("{}?heartbeat=0", proxy.url));
    proxy.set_trap(&QOS);
    let worker = bench.starting_worker();
    proxy.sprung().await;
    worker.until("timed out", async |worker| worker.logged("no answer within 30 s") >= 1).await;
    worker.until("back", async |worker| worker.is("standing_by", None).await).await;
    proxy.release();
    bench.publish(&people(1)).await;
    worker.settled(1).await;
    bench.assert_each_once(1);
    worker.terminate().await;
}

/// The publishing connection is lost before the session consumes. Later, only a publish would notice it.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lost_during_session_start_is_noticed() {
    let bench = Bench::new().await;
    // With its objects in place a worker opens two connections.
    bench.worker().await.terminate().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url).set("RUST_LOG", "info,lapin=error");
    proxy.set_trap(&QOS);
    let worker = bench.starting_worker();
    proxy.sprung().await;
    proxy.cut_last();
    worker.until("noticed by lapin", async |worker| worker.logged("report it as broken") >= 1).await;
    proxy.release();
    lost(&worker, "lost").await;
    worker.until("back", async |worker| worker.is("standing_by", None).await).await;
    worker.terminate().await;
}

/// A message that needs no call to Close does not wait for the concurrency limit.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_settled_while_the_concurrency_limit_is_reached() {
    let bench = Bench::new().await.set("WORKER_CONCURRENCY", "1").set("WORKER_MAX_MESSAGE_BYTES", "1000");
    bench.simulator.fault(
        Fault::new(Effect::Timeout { ms: 60_000, when: When::BeforeCommit }).on("POST", "/lead/").times(1),
    );
    let worker = bench.worker().await;
    bench.publish(&people(1)).await;
    worker.until("hanging", async |_| bench.simulator.request_count("POST", "/lead/") == 1).await;
    for _ in 0..50 {
        bench.publish_bytes(&[b'x'; 2000], BasicProperties::default()).await;
    }
    let metrics = worker.settled(50).await;
    assert_eq!((metrics.outcomes(), metrics.count("messages_in_flight")), ([("dead", 50)].into(), 1));
    worker.kill().await;
}

/// Delay queues and dead letters keep the trace, and every log line about the message names it.
#[tokio::test(flavor = "multi_thread")]
async fn delayed_and_dead_lettered_messages_keep_their_trace() {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s").set("RETRY_DELAYS", "[\"200ms\"]");
    let fails = Effect::Status { code: 500, body: FaultBody::Text, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(fails).on("POST", "/lead/"));
    let worker = bench.worker().await;
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(TRACE.into()));
    headers.insert("tracestate".into(), AMQPValue::LongString("vendor=1".into()));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into());
    bench.publish_bytes(people(1)[0].to_string().as_bytes(), properties).await;
    worker.settled(2).await;
    let (_, headers, properties) = bench.take_dead_letter().await;
    assert_eq!((headers["traceparent"].as_str(), headers["tracestate"].as_str()), (TRACE, "vendor=1"));
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "c-1");
    for (event, attempt) in [("message_delayed", 1), ("dead_lettered", 2)] {
        let log = worker.log();
        let mut lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let line = lines.find(|line| line["event"] == event).unwrap();
        let span = &line["span"];
        assert_eq!(span["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736", "{line}");
        assert_eq!(span["parent_span_id"], "00f067aa0ba902b7");
        assert_eq!(
            (&span["message_id"], &span["correlation_id"], &span["attempt"]),
            (&"m-1".into(), &"c-1".into(), &attempt.into())
        );
    }
    worker.terminate().await;
}

/// A message that is larger than the limit of RabbitMQ, which was lowered after it was published. RabbitMQ dead-letters it,
/// and the messages behind it are processed.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_above_the_brokers_size_limit_does_not_block_others() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await;
    bench.worker().await.terminate().await;
    bench.publish_bytes(&vec![b'x'; 3_000_000], BasicProperties::default()).await;
    bench.publish(&people(3)).await;
    node.ctl(&["eval", "application:set_env(rabbit, max_message_size, 2000000)."]).await;
    // Channels read the limit from here.
    node.ctl(&["eval", "persistent_term:put(max_message_size, 2000000)."]).await;
    let worker = bench.worker().await;
    bench.depth_becomes(".dead", 1).await;
    worker.until("synced", async |_| bench.simulator.contacts().len() == 3).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(3);
    // RabbitMQ closes the publishing channel once. The next session rejects the message and goes on.
    let metrics = worker.metrics().await;
    assert_eq!(metrics.count("messages_quarantined_total{step=\"rejected\"}"), 1, "{}", worker.log());
    assert_eq!(metrics.sum("broker_connection_losses_total"), 1);
    assert_eq!(worker.events("message_quarantined"), 1);
    bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    bench.depth_becomes(".dead", 2).await;
    bench.depth_becomes("", 0).await;
    assert_eq!(worker.metrics().await.sum("broker_connection_losses_total"), 1);
    worker.terminate().await;
}

/// The producer's headers almost fill a frame. Together with ours they would not fit, and RabbitMQ would close the
/// connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_headers_as_large_as_a_frame_does_not_block_others() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut headers = FieldTable::default();
    headers.insert("baggage".into(), AMQPValue::LongString("x".repeat(130_800).into()));
    bench.publish_bytes(b"nonsense", BasicProperties::default().with_headers(headers)).await;
    bench.publish(&people(3)).await;
    assert_eq!(worker.settled(4).await.outcomes(), [("created", 3), ("dead", 1)].into());
    let (body, headers, _) = bench.take_dead_letter().await;
    assert_eq!((body.as_slice(), headers[REASON].as_str()), (b"nonsense".as_slice(), "malformed"));
    assert!(!headers.contains_key("baggage"));
    assert_eq!(worker.metrics().await.sum("broker_connection_losses_total"), 0);
    worker.terminate().await;
}

/// lapin cannot parse these messages: without the sanitizer, each would crash the process again after every restart. Only
/// the properties message id and headers are used here.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_lapin_cannot_parse_does_not_block_others() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut producer = Producer::connect(&bench.amqp_url).await;
    let properties = |headers: &[u8], id: &[u8]| [&[0x20, 0x80], headers, &text(id)].concat();
    let latin = long(&[text(b"Gr\xFC\xDFe").as_slice(), b"t\x01"].concat());
    let people = people(4);
    for (n, (headers, key, id)) in [
        (nested(9000), b"users".as_slice(), b"m-0".as_slice()),
        (nested(64), b"users", b"m-1"),
        (latin, b"users", b"m-2"),
        (nested(1), b"us\xE9rs", b"m-\xE9"),
    ]
    .into_iter()
    .enumerate()
    {
        let body = people[n].to_string();
        producer.publish(&bench.exchange, key, &properties(&headers, id), body.as_bytes()).await;
        producer.publish(&bench.exchange, key, &properties(&headers, id), b"nonsense").await;
        bench.publish(&[people[n].clone()]).await;
    }
    worker.settled(12).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(4);
    let mut dead_letters = Vec::new();
    for _ in 0..4 {
        let (body, headers, properties) = bench.take_dead_letter().await;
        assert_eq!((body.as_slice(), headers.contains_key(QUARANTINED)), (b"nonsense".as_slice(), false));
        dead_letters
            .push((properties.message_id().clone().unwrap().to_string(), headers[ROUTING_KEY].clone()));
    }
    dead_letters.sort();
    let expected = [("m-0", "users"), ("m-1", "users"), ("m-2", "users"), ("m-?", "us?rs")];
    assert_eq!(dead_letters, expected.map(|(id, key)| (id.to_owned(), key.to_owned())));
    let events = (worker.events("headers_quarantined"), worker.events("properties_replaced"));
    assert_eq!(events, (2, 6), "{}", worker.log());
    assert_eq!(worker.metrics().await.sum("broker_connection_losses_total"), 0);

    // `dlq` commands can read it among the dead letters, too.
    let (dead, headers) = (format!("{}.dead", bench.queue), properties(&nested(9000), b"m-4"));
    producer.publish(&dead, b"us\xE9rs", &headers, people[0].to_string().as_bytes()).await;
    let listed: serde_json::Value =
        serde_json::from_str(&bench.output(&["dlq", "list", "--json"]).await).unwrap();
    assert_eq!(listed["dead_letters"].as_array().unwrap().len(), 1, "{listed}");
    bench.output(&["dlq", "replay", "--all"]).await;
    worker.settled(13).await;
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}
