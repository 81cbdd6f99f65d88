//! `close-sync publish`, and the metrics after a scenario.

use close_sync_simulator::{Effect, Fault, When};
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use serde_json::json;

use crate::support::{Bench, Worker, identify};

#[tokio::test(flavor = "multi_thread")]
async fn events_are_published_in_order_and_invalid_lines_are_reported() {
    let bench = Bench::new().await;
    // The queues exist once a worker has run.
    bench.worker().await.terminate().await;
    let first =
        json!({"type": "identify", "messageId": "m-1", "timestamp": "2026-01-02T03:04:05Z", "userId": "u1"});
    let lines = format!("{first}\n\nnonsense\n{}\n[1]\n", json!({"type": "track"}));
    let output = bench.run(&["publish", "-"], lines.as_bytes()).await;
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "line 3, column 2: not JSON\nline 5: not a JSON object but a list\n\
             published 2 events to `{}`\n2 lines were not published, see above\n",
            bench.exchange
        )
    );

    // A queue with a single active consumer does not allow `basic.get`, so the test reads a copy.
    let channel = bench.channel().await;
    let copy = format!("{}-copy", bench.queue);
    channel
        .queue_declare(copy.as_str().into(), QueueDeclareOptions::default(), FieldTable::default())
        .await
        .unwrap();
    channel
        .queue_bind(
            copy.as_str().into(),
            bench.exchange.as_str().into(),
            "#".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let output = bench.run(&["publish", "--unchecked", "-"], lines.as_bytes()).await;
    assert!(output.status.success());
    let mut bodies = Vec::new();
    let text = |text: &Option<ShortString>| text.as_ref().unwrap().to_string();
    while let Some(message) =
        channel.basic_get(copy.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap()
    {
        let properties = &message.delivery.properties;
        assert_eq!(*properties.delivery_mode(), Some(2));
        assert_eq!(text(properties.content_type()), "application/json");
        assert!(!text(properties.message_id()).is_empty());
        if bodies.is_empty() {
            assert_eq!(
                (text(properties.message_id()), text(properties.kind())),
                ("m-1".into(), "identify".into())
            );
            assert_eq!(*properties.timestamp(), Some(1_767_323_045));
        }
        bodies.push((
            message.delivery.routing_key.to_string(),
            String::from_utf8(message.delivery.data.clone()).unwrap(),
        ));
    }
    let sent = |key: &str, body: &str| (key.to_owned(), body.to_owned());
    assert_eq!(
        bodies,
        [
            sent("identify", &first.to_string()),
            sent("identify", "nonsense"),
            sent("track", "{\"type\":\"track\"}"),
            sent("identify", "[1]"),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_before_the_first_run_reports_the_remedy() {
    let bench = Bench::new().await;
    let event = identify("u1", json!({})).to_string();
    insta::assert_snapshot!(bench.transcript(&["publish", "-"], event.as_bytes()).await);
    insta::assert_snapshot!(bench.transcript(&["publish", "no-such-file"], b"").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_routing_key_can_be_set() {
    let bench = Bench::new().await.set("AMQP_BINDING_KEYS", "[\"emea.#\"]");
    let worker = bench.worker().await;
    let event = identify("u1", json!({})).to_string();
    let publish = async |arguments: &[&str]| {
        let output = bench.run(&[&["publish", "-"], arguments].concat(), event.as_bytes()).await;
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = publish(&[]).await;
    assert!(
        code == Some(69) && stderr.contains("with key `identify`") && stderr.contains("(emea.#)"),
        "{stderr}"
    );
    let (code, stderr) = publish(&["--routing-key", "emea.users"]).await;
    let expected = format!("published 1 event to `{}` with routing key `emea.users`\n", bench.exchange);
    assert_eq!((code, stderr), (Some(0), expected));
    worker.settled(1).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_depths_are_exported_only_while_connected() {
    let bench = Bench::new().await.set("RETRY_DELAYS", "[\"1m\", \"2m\"]").set("RETRY_IN_PLACE", "0s");
    let worker = bench.worker().await;
    bench
        .simulator
        .fault(Fault::new(Effect::Timeout { ms: 1, when: When::BeforeCommit }).on("POST", "/lead/"));
    // One event without identity, one that is retried later, and one that was in the queue for a minute.
    let minute_ago = u64::try_from(jiff::Timestamp::now().as_second() - 60).unwrap();
    let sent = BasicProperties::default().with_timestamp(minute_ago);
    bench.publish(&[json!({}), identify("u1", json!({}))]).await;
    worker.settled(2).await;
    bench.simulator.clear_faults();
    bench.publish_bytes(identify("u2", json!({})).to_string().as_bytes(), sent).await;
    let metrics = worker.settled(3).await;
    let waited = ["bucket{le=\"15\"}", "bucket{le=\"300\"}"]
        .map(|le| metrics.count(&format!("queue_wait_seconds_{le}")));
    assert_eq!(waited, [0, 1], "only messages with a timestamp count: {metrics:?}");

    let depths = ["backlog_messages", "dead_letter_messages", "delayed_messages"];
    let is_exported = async |worker: &Worker| {
        let metrics = worker.metrics().await;
        depths.map(|name| metrics.count(name)) == [0, 1, 1]
    };
    worker.until("exported", is_exported).await;
    bench.simulator.set_api_key("another");
    bench.publish(&[identify("u3", json!({}))]).await;
    worker.until("paused", async |worker| worker.is("paused", Some("unauthorized")).await).await;
    let metrics = worker.metrics().await;
    assert!(depths.iter().all(|name| metrics.get(name).is_nan()), "{metrics:?}");
    worker.terminate().await;
}

/// The series that exist, and the values of those that do not depend on time.
#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_page_after_a_scenario() {
    let bench = Bench::new().await.set("WORKER_MERGE", "false");
    let worker = bench.worker().await;
    let mut event = identify("u1", json!({"email": "j@x.test", "phone": "none", "company": {"id": "c"}}));
    event["timestamp"] = "2026-01-02T03:04:05Z".into();
    bench.publish(&[event.clone(), event, json!({"type": "page"}), json!({})]).await;
    let metrics = worker.settled(4).await;
    let timeless = |name: &&str| {
        let changing = [
            "broker_info",
            "config_info",
            "start_time",
            "_bucket",
            "_sum",
            "in_flight",
            "waiting",
            "backlog",
            "dead_letter_messages",
            "delayed_messages",
            "drain",
            "_remaining",
            "_reset",
        ];
        !changing.iter().any(|part| name.contains(part))
    };
    let lines: Vec<_> = metrics
        .names()
        .filter(timeless)
        .map(|name| format!("{name} {}", metrics.get(name.strip_prefix("close_sync_").unwrap())))
        .collect();
    insta::assert_snapshot!(lines.join("\n"));
    worker.terminate().await;
}
