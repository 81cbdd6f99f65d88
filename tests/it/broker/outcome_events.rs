//! Outcome events for producers (`amqp.outcomes`).

use futures_util::StreamExt;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Consumer, ExchangeKind};
use serde_json::{Value, json};

use crate::repo::contract::Schema;
use crate::support::{Bench, identify, people};

const LOST: &str = "outcome_messages_total{result=\"lost\"}";

/// The next event: its routing key, correlation id, and body without the time.
async fn next(deliveries: &mut Consumer) -> (String, Option<String>, Value) {
    let delivery = deliveries.next().await.unwrap().unwrap();
    let mut body: Value = serde_json::from_slice(&delivery.data).unwrap();
    let schema = Schema::of(include_str!("../../../deploy/schema/outcome.json"));
    assert!(schema.fits(&body), "{body}");
    assert!(body["at"].take().is_string());
    let correlation_id = delivery.properties.correlation_id().as_ref().map(ToString::to_string);
    (delivery.routing_key.to_string(), correlation_id, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_message_has_one_outcome_event() {
    let bench = Bench::new().await;
    let exchange = format!("{}-outcomes", bench.exchange);
    let bench = bench.set("AMQP_OUTCOMES", &exchange);
    let worker = bench.worker().await;
    let mut all = bench.outcomes(&exchange).await;
    let mut dead = bench.outcomes_like(&exchange, "dead.#").await;

    let event = identify("u1", json!({"company": {"id": "c1"}, "title": "Dr"}));
    for (id, event) in [
        ("m-1", event.clone()),
        ("m-2", event.clone()),
        ("m-3", json!({"type": "track"})),
        ("m-4", json!({"type": "identify"})),
    ] {
        let properties =
            BasicProperties::default().with_message_id(id.into()).with_correlation_id("order-7".into());
        bench.publish_bytes(event.to_string().as_bytes(), properties).await;
        worker.settled(id[2..].parse().unwrap()).await;
    }
    let lead = bench.the_lead();
    let (lead, contact) = (&lead["id"], &lead["contacts"][0]["id"]);
    for (id, key, outcome, detail, records) in [
        ("m-1", "synced.created", "synced", "created", true),
        ("m-2", "synced.unchanged", "synced", "unchanged", true),
        ("m-3", "skipped.trigger", "skipped", "trigger", false),
        ("m-4", "dead.no_identity", "dead", "no_identity", false),
    ] {
        let (routed, correlation_id, mut body) = next(&mut all).await;
        assert_eq!((routed.as_str(), correlation_id.as_deref()), (key, Some("order-7")));
        let letter = body.as_object_mut().unwrap().remove("dead_letter");
        assert_eq!(letter.is_some(), outcome == "dead");
        let (leads, contacts) = if records { (vec![lead], vec![contact]) } else { (vec![], vec![]) };
        let expected = json!({
            "outcome": outcome, "detail": detail, "message_id": id, "correlation_id": "order-7",
            "leads": leads, "contacts": contacts, "at": null,
        });
        assert_eq!(body, expected);
    }
    let (_, _, event) = next(&mut dead).await;
    let listed: Value = serde_json::from_str(&bench.output(&["dlq", "list", "--json"]).await).unwrap();
    assert_eq!(event["dead_letter"]["id"], listed["dead_letters"][0]["id"]);
    assert_eq!(event["dead_letter"]["fingerprint"], "no_identity:map:-");
    assert_eq!(worker.metrics().await.count("outcome_messages_total{result=\"routed\"}"), 4);
    worker.terminate().await;

    // With `topology = "check"`, the exchange has to exist.
    bench
        .channel()
        .await
        .exchange_delete(exchange.clone().into(), ExchangeDeleteOptions::default())
        .await
        .unwrap();
    let checked = bench.set("AMQP_TOPOLOGY", "check");
    let missing = checked.run(&["check"], b"").await;
    let words = String::from_utf8(missing.stdout).unwrap();
    assert!(
        missing.status.code() == Some(78) && words.contains(&format!("exchange `{exchange}`")),
        "{words}"
    );
}

/// No queue is bound to the exchange. The worker continues and counts the events.
#[tokio::test(flavor = "multi_thread")]
async fn unrouted_outcome_events_are_dropped_and_counted() {
    let bench = Bench::new().await;
    let exchange = format!("{}-outcomes", bench.exchange);
    let bench = bench.set("AMQP_OUTCOMES", &exchange);
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    let unrouted = "outcome_messages_total{result=\"unrouted\"}";
    worker.until("counted", async |worker| worker.metrics().await.count(unrouted) == 1).await;
    worker.terminate().await;
    let refused = bench.set("AMQP_OUTCOMES", "amq.topic").run(&["check"], b"").await;
    assert_eq!(refused.status.code(), Some(78));
}

/// Without the exchange the events are lost, and nothing else. They are published again once it exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_outcome_exchange_does_not_delay_messages() {
    let bench = Bench::new().await;
    let exchange = format!("{}-outcomes", bench.exchange);
    let bench = bench.set("AMQP_OUTCOMES", &exchange);
    bench.worker().await.terminate().await;
    let bench = bench.set("AMQP_TOPOLOGY", "check");
    let worker = bench.worker().await;
    let channel = bench.channel().await;
    channel.exchange_delete(exchange.clone().into(), ExchangeDeleteOptions::default()).await.unwrap();
    let mut events = people(20);
    events.extend(vec![json!({"type": "identify"}); 20]);
    bench.publish(&events).await;
    let metrics = worker.settled(40).await;
    assert_eq!(metrics.outcomes(), [("created", 20), ("dead", 20)].into());
    worker.until("lost", async |worker| worker.metrics().await.count(LOST) == 40).await;
    assert_eq!(bench.depth(".dead").await, 20, "each once");
    bench.assert_each_once(20);
    assert_eq!(worker.events("outcome_events_failing"), 1, "{}", worker.log());
    assert_eq!(worker.events("broker_connected"), 1, "{}", worker.log());

    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare(exchange.clone().into(), ExchangeKind::Topic, durable, FieldTable::default())
        .await
        .unwrap();
    let mut all = bench.outcomes(&exchange).await;
    // The worker opens a channel at most once a second.
    worker
        .until("published again", async |worker| {
            bench.publish(&[json!({"type": "track"})]).await;
            worker.events("outcome_events_recovered") == 1
        })
        .await;
    assert_eq!(next(&mut all).await.0, "skipped.trigger");
    worker.terminate().await;
}
