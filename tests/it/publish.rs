//! `close-sync publish` and the producer's contract, and the metrics page after it all.

use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use serde_json::json;

use crate::support::{Bench, identify};

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_in_order_with_their_properties_and_bad_lines_are_named() {
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

    // The work queue has a single active consumer, which excludes `basic.get`; so look at a copy.
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
async fn publishing_before_any_worker_says_what_to_do() {
    let bench = Bench::new().await;
    let event = identify("u1", json!({})).to_string();
    insta::assert_snapshot!(bench.transcript(&["publish", "-"], event.as_bytes()).await);
    insta::assert_snapshot!(bench.transcript(&["publish", "no-such-file"], b"").await);
}

/// Which series exist, and what a scenario did to those that do not measure time.
#[tokio::test(flavor = "multi_thread")]
async fn a_routing_key_can_be_chosen() {
    let bench = Bench::new().await.set("AMQP_BINDING_KEYS", "[\"emea.#\"]");
    let worker = bench.worker().await;
    let event = identify("u1", json!({})).to_string();
    let publish = async |arguments: &[&str]| {
        let output = bench.run(&[&["publish", "-"], arguments].concat(), event.as_bytes()).await;
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, words) = publish(&[]).await;
    assert!(
        code == Some(69) && words.contains("for key `identify`") && words.contains("(emea.#)"),
        "{words}"
    );
    let (code, words) = publish(&["--routing-key", "emea.users"]).await;
    let told = format!("published 1 event to `{}` with routing key `emea.users`\n", bench.exchange);
    assert_eq!((code, words), (Some(0), told));
    worker.settled(1).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_page_after_a_scenario() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let mut event = identify("u1", json!({"email": "j@x.test", "phone": "none", "company": {"id": "c"}}));
    event["timestamp"] = "2026-01-02T03:04:05Z".into();
    bench.publish(&[event.clone(), event, json!({"type": "page"}), json!({})]).await;
    let metrics = worker.settled(4).await;
    let timeless = |name: &&str| {
        let changing = [
            "broker_info",
            "_bucket",
            "_sum",
            "in_flight",
            "waiting",
            "backlog",
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
