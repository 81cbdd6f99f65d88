//! What exists on the broker: who makes it, and what a worker says that may not.

use lapin::options::{BasicPublishOptions, QueueDeleteOptions};
use lapin::{BasicProperties, Confirmation};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify};

/// Lines that tell of a lost broker: one for each incident.
fn incidents(worker: &Worker) -> usize {
    worker.logged("reconnecting to RabbitMQ until it works")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_only_looks_waits_until_everything_is_there() {
    let bench = Bench::new().await;
    let only_looks = Bench::new().await.named(&bench.exchange, &bench.queue).set("AMQP_TOPOLOGY", "check");
    insta::assert_snapshot!("nothing_is_there", only_looks.transcript(&["check"], b"").await);
    let published = only_looks.run(&["publish", "-"], identify("u", json!({})).to_string().as_bytes()).await;
    let words = String::from_utf8(published.stderr).unwrap();
    assert!(words.contains("`close-sync check` tells what"), "{words}");

    let waiting = only_looks.starting_worker();
    waiting.until("trying again", async |worker| worker.logged("still no connection") >= 2).await;
    let log = waiting.log();
    assert!(log.contains(&format!("RabbitMQ lacks exchange `{}` (durable, topic)", bench.exchange)), "{log}");
    assert_eq!((incidents(&waiting), waiting.ready().await.0), (1, 503), "{log}");

    let declares = bench.worker().await;
    waiting.until("ready", async |worker| worker.ready().await.0 == 200).await;
    declares.terminate().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    assert_eq!(waiting.settled(1).await.outcomes(), [("created", 1)].into());
    assert_eq!(incidents(&waiting), 1);
    let check = only_looks.transcript(&["check"], b"").await;
    assert!(
        check.contains("queue `QUEUE`: 0 messages ready, 1 consumer, 0 dead letters (whether this user may"),
        "{check}"
    );

    // It never makes anything, also while it works: what goes missing is named, and nothing else is.
    let level = format!("{}.retry.400ms", bench.queue);
    bench.channel().await.queue_delete(level.into(), QueueDeleteOptions::default()).await.unwrap();
    waiting.terminate().await;
    insta::assert_snapshot!("a_queue_is_missing", only_looks.transcript(&["check"], b"").await);
}

/// Publishes with a routing key; whether some queue got it.
async fn is_routed(bench: &Bench, key: &str) -> bool {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let event: Value = identify("u1", json!({}));
    let confirm = bench
        .channel()
        .await
        .basic_publish(
            bench.exchange.as_str().into(),
            key.into(),
            options,
            event.to_string().as_bytes(),
            BasicProperties::default(),
        )
        .await
        .unwrap();
    confirm.await.unwrap() == Confirmation::Ack(None)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_work_queue_gets_what_its_binding_keys_let_through() {
    let bench = Bench::new().await.set("AMQP_BINDING_KEYS", "[\"users.*\", \"identify\"]");
    let worker = bench.worker().await;
    for (key, routed) in [("users.new", true), ("identify", true), ("users", false), ("orders.new", false)] {
        assert_eq!(is_routed(&bench, key).await, routed, "{key}");
    }
    worker.settled(2).await;
    worker.terminate().await;

    // A key that is removed stays bound, as the README says.
    let bench = bench.set("AMQP_BINDING_KEYS", "[\"orders.#\"]");
    let worker = bench.worker().await;
    for (key, routed) in [("users.new", true), ("orders.new", true), ("users", false)] {
        assert_eq!(is_routed(&bench, key).await, routed, "{key}");
    }
    worker.settled(2).await;
    worker.terminate().await;
}
