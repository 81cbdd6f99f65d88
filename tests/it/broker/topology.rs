//! The topology: a worker declares it, or only checks it.

use lapin::options::{BasicPublishOptions, ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::{BasicProperties, Confirmation};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify};

/// Log lines about a lost broker, one per incident.
fn incidents(worker: &Worker) -> usize {
    worker.events("broker_lost")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_only_checks_the_topology_waits_until_it_is_complete() {
    let bench = Bench::new().await;
    let check_only = Bench::new().await.named(&bench.exchange, &bench.queue).set("AMQP_TOPOLOGY", "check");
    insta::assert_snapshot!("empty_broker", check_only.transcript(&["check"], b"").await);
    let published = check_only.run(&["publish", "-"], identify("u", json!({})).to_string().as_bytes()).await;
    let words = String::from_utf8(published.stderr).unwrap();
    assert!(words.contains("`close-sync check` reports what"), "{words}");

    let waiting = check_only.starting_worker();
    waiting.until("reconnecting", async |worker| worker.events("broker_unavailable") >= 2).await;
    let log = waiting.log();
    assert!(
        log.contains(&format!("missing in RabbitMQ: exchange `{}` (durable, topic)", bench.exchange)),
        "{log}"
    );
    assert_eq!((incidents(&waiting), waiting.ready().await.0), (1, 503), "{log}");

    let declares = bench.worker().await;
    waiting.until("ready", async |worker| worker.ready().await.0 == 200).await;
    declares.terminate().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    assert_eq!(waiting.settled(1).await.outcomes(), [("created", 1)].into());
    assert_eq!(incidents(&waiting), 1);
    let check = check_only.transcript(&["check"], b"").await;
    assert!(
        check.contains("queue `QUEUE`: 0 messages ready, 1 consumer, 0 dead letters; read and write"),
        "{check}"
    );

    // Nor does it declare anything while it consumes. It reports what is missing, and processes what it can.
    let level = format!("{}.retry.400ms", bench.queue);
    let channel = bench.channel().await;
    channel.queue_delete(level.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    channel.exchange_delete(bench.exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    waiting.until("reporting", async |worker| worker.is("consuming", Some("missing")).await).await;
    let (status, readiness) = waiting.ready().await;
    let detail = readiness["detail"].as_str().unwrap();
    assert_eq!(status, 503);
    for missing in [format!("exchange `{}` (durable, topic)", bench.exchange), format!("queue `{level}`")] {
        assert!(detail.contains(&missing), "{detail}");
    }
    assert_eq!(waiting.metrics().await.count(r#"broker_trouble{cause="missing"}"#), 1);
    let event = identify("u2", json!({})).to_string();
    let (to, options) = (bench.queue.as_str().into(), BasicPublishOptions::default());
    let confirm = channel.basic_publish("".into(), to, options, event.as_bytes(), BasicProperties::default());
    confirm.await.unwrap().await.unwrap();
    assert_eq!(waiting.settled(2).await.outcomes(), [("created", 2)].into());
    assert!(waiting.is("consuming", Some("missing")).await, "still missing");

    // Another worker declares it.
    bench.worker().await.terminate().await;
    waiting.until("ready", async |worker| worker.ready().await.0 == 200).await;
    assert_eq!(waiting.metrics().await.count(r#"broker_trouble{cause="missing"}"#), 0);
    assert_eq!((waiting.events("topology_incomplete"), incidents(&waiting)), (1, 1));

    channel.queue_delete(level.into(), QueueDeleteOptions::default()).await.unwrap();
    waiting.terminate().await;
    insta::assert_snapshot!("missing_queue", check_only.transcript(&["check"], b"").await);
}

/// Publishes with a routing key and returns whether a queue received the message.
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
async fn binding_keys_decide_which_messages_reach_the_work_queue() {
    let bench = Bench::new().await.set("AMQP_BINDING_KEYS", "[\"users.*\", \"identify\"]");
    let worker = bench.worker().await;
    for (key, routed) in [("users.new", true), ("identify", true), ("users", false), ("orders.new", false)] {
        assert_eq!(is_routed(&bench, key).await, routed, "{key}");
    }
    worker.settled(2).await;
    worker.terminate().await;

    // A removed key stays bound, as the README says.
    let bench = bench.set("AMQP_BINDING_KEYS", "[\"orders.#\"]");
    let worker = bench.worker().await;
    for (key, routed) in [("users.new", true), ("orders.new", true), ("users", false)] {
        assert_eq!(is_routed(&bench, key).await, routed, "{key}");
    }
    worker.settled(2).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_compares_the_size_of_the_journal() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let same = bench.transcript(&["check"], b"").await;
    assert!(same.contains("ok      journal: stream `QUEUE.journal`\n"), "{same}");
    let bench = bench.set("JOURNAL_MAX_BYTES", "123456789");
    let other = bench.transcript(&["check"], b"").await;
    assert!(other.contains("warning journal: used, but not as configured"), "{other}");
    assert!(other.contains("123456789"), "{other}");
    // It was not changed.
    assert_eq!(bench.sync(&[identify("u1", json!({}))]).await.outcomes(), [("created", 1)].into());
}

/// With an administrator who declares everything, a worker goes on without a journal, and so does `check`.
#[tokio::test(flavor = "multi_thread")]
async fn check_warns_of_a_journal_that_is_not_declared() {
    let bench = Bench::new().await.set("JOURNAL_ENABLED", "false");
    bench.worker().await.terminate().await;
    let check_only = Bench::new().await.named(&bench.exchange, &bench.queue).set("AMQP_TOPOLOGY", "check");
    let report = check_only.transcript(&["check"], b"").await;
    assert!(report.contains("warning journal: not used: missing in RabbitMQ: exchange"), "{report}");
    assert!(report.starts_with("exit code 0"), "{report}");
    assert_eq!(check_only.sync(&[identify("u1", json!({}))]).await.outcomes(), [("created", 1)].into());
}
