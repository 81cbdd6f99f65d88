//! A message concerns itself only: whatever RabbitMQ takes from a producer is settled, and the messages around it are
//! processed.

use std::collections::BTreeSet;

use close_sync::amqp::envelope::{
    ATTEMPTS, DECISION, EDITED_AT, ERROR, EXCHANGE, FIRST_SEEN, ID, ORIGINAL, REASON, REPLAY, REPLAYS,
    ROUTING_KEY,
};
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use fe2o3_amqp::types::messaging::Properties;
use fe2o3_amqp::types::primitives::SimpleValue;
use futures_util::StreamExt;
use lapin::options::BasicConsumeOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::support::producer::{Producer, long, nested, text};
use crate::support::{Bench, Node, Worker, amqp10, identify, people};

/// From now on Close fails to create Leads of [`failing`] events, so that their messages go through the delay queues.
fn fail(bench: &Bench) {
    let fails = Effect::Status { code: 500, body: FaultBody::Text, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(fails).on("POST", "/lead/").containing("hostile"));
}

/// An event of another person each time, whose message fails at each attempt once [`fail`] was called.
fn failing() -> Vec<u8> {
    let id = format!("hostile-{}", uuid::Uuid::now_v7());
    identify(&id, json!({"company": {"id": id}})).to_string().into_bytes()
}

fn words(text: impl Into<String>) -> AMQPValue {
    AMQPValue::LongString(text.into().into())
}

fn properties(headers: &[(&str, AMQPValue)]) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), value.clone());
    }
    BasicProperties::default().with_headers(table)
}

/// Waits until nothing is left in the work queue and the delay queues.
async fn all_settled(bench: &Bench, worker: &Worker, deliveries: usize) {
    worker.settled(deliveries).await;
    for queue in ["", ".retry.200ms", ".retry.400ms"] {
        bench.depth_becomes(queue, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_of_any_size_do_not_block_others() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s");
    fail(&bench);
    bench.worker().await.terminate().await;
    let mut producer = Producer::connect(&bench.amqp_url).await;
    for (name, size) in [
        // With the prefix of close-sync, and without.
        (b"x-close-sync-j".as_slice(), 130_700),
        // With a name and properties, this fills a frame.
        (b"bulk", 131_000),
    ] {
        let headers = long(&[text(name).as_slice(), b"S", &long(&vec![b'x'; size])].concat());
        let properties = [&[0x20, 0x80], headers.as_slice(), &text(b"m")].concat();
        for body in [b"not json".as_slice(), &failing()] {
            producer.publish(&bench.exchange, b"users", &properties, body).await;
        }
    }
    // RabbitMQ adds a header to what it delivers again. Then it no longer fits into a frame.
    let connection = Connection::connect(&bench.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let (queue, options) = (bench.queue.as_str().into(), BasicConsumeOptions::default());
    let taken = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await.unwrap();
    let taken: Vec<_> = taken.take(4).collect().await;
    assert!(taken.iter().all(Result::is_ok));
    connection.close(200, "".into()).await.unwrap();
    bench.publish(&people(3)).await;

    let worker = bench.worker().await;
    // Two are dead letters at once, two after two delays.
    all_settled(&bench, &worker, 3 + 2 + 2 * 3).await;
    bench.assert_each_once(3);
    assert_eq!(bench.depth(".dead").await, 4);
    let metrics = worker.metrics().await;
    assert_eq!(metrics.sum("broker_connection_losses_total"), 0, "{}", worker.log());
    assert_eq!(metrics.sum("messages_quarantined_total"), 0);
    worker.terminate().await;
}

/// Such a message expires while there is a backlog. RabbitMQ dead-letters it with its headers, and adds some.
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_message_with_large_headers_does_not_block_the_tools() {
    let bench = Bench::dead(&people(1)).await;
    let mut producer = Producer::connect(&bench.amqp_url).await;
    let headers = long(&[text(b"bulk").as_slice(), b"S", &long(&vec![b'x'; 130_900])].concat());
    // Headers, expiration, message id.
    let properties = [&[0x21, 0x80], headers.as_slice(), &text(b"1"), &text(b"m")].concat();
    producer.publish(&bench.exchange, b"users", &properties, b"expired").await;
    bench.depth_becomes(".dead", 2).await;
    // Each look is a delivery, which RabbitMQ counts in a header.
    for _ in 0..3 {
        let listed: Value = serde_json::from_str(&bench.output(&["dlq", "list", "--json"]).await).unwrap();
        assert_eq!(listed["dead_letters"].as_array().unwrap().len(), 2);
    }
    let exported = bench.dead_letters().await;
    let expired = exported.iter().find(|letter| letter["body"] == "expired").unwrap();
    assert_eq!((&expired["fingerprint"], expired.get("reason")), (&json!("broker:-:-"), None));
    let id = expired["id"].as_str().unwrap();
    bench.output(&["dlq", "show", id]).await;
    let worker = bench.worker().await;
    bench.run_combined(&["dlq", "replay", "--id", id], "").await;
    let again = bench.dead_letters().await.into_iter().find(|letter| letter["body"] == "expired").unwrap();
    assert_eq!((&again["reason"], &again["replays"]), (&json!("malformed"), &json!(1)));
    assert_eq!(worker.metrics().await.sum("broker_connection_losses_total"), 0);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_address_copies_are_not_copied() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s");
    fail(&bench);
    let worker = bench.worker().await;
    for name in ["CC", "BCC"] {
        let copies = ["now", "200ms", "400ms"].map(words).to_vec();
        let properties = properties(&[(name, AMQPValue::FieldArray(copies.into()))]);
        bench.publish_bytes(&failing(), properties.clone()).await;
        bench.publish_bytes(b"nonsense", properties).await;
    }
    // Each is delivered once at first and after each of two delays; the malformed ones are delivered once.
    all_settled(&bench, &worker, 2 * 3 + 2).await;
    bench.depth_becomes(".dead", 4).await;
    assert_eq!(worker.metrics().await.sum("messages_settled_total"), 8);
    worker.terminate().await;

    // RabbitMQ itself dead-letters a message with all its headers. A replay does not multiply it.
    let copies = AMQPValue::FieldArray(["now", "200ms"].map(words).to_vec().into());
    let expired = properties(&[("CC", copies)]).with_expiration("1".into());
    bench.publish_bytes(people(1)[0].to_string().as_bytes(), expired).await;
    bench.depth_becomes(".dead", 5).await;
    let id = bench.dead_ids().await.pop().unwrap();
    let worker = bench.worker().await;
    bench.output(&["dlq", "replay", "--id", &id]).await;
    bench.depth_becomes(".dead", 4).await;
    all_settled(&bench, &worker, 1).await;
    assert_eq!(worker.metrics().await.sum("messages_settled_total"), 1);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_headers_do_not_reach_the_dead_letter() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let forged = [
        (ATTEMPTS, AMQPValue::LongLongInt(u32::MAX.into())),
        (REPLAYS, AMQPValue::LongLongInt(5)),
        (REPLAY, words(uuid::Uuid::now_v7().to_string())),
        (FIRST_SEEN, words("9991-01-01T00:00:00Z")),
        (EXCHANGE, words("forged")),
        (ROUTING_KEY, words("forged")),
        (DECISION, words("forged")),
        (ORIGINAL, words("forged")),
        (EDITED_AT, words("2026-01-01T00:00:00Z")),
    ];
    bench.publish_bytes(b"nonsense", properties(&forged)).await;
    worker.settled(1).await;
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers[ATTEMPTS], "1");
    assert_eq!(
        (headers[EXCHANGE].as_str(), headers[ROUTING_KEY].as_str()),
        (bench.exchange.as_str(), "users")
    );
    assert!(headers[FIRST_SEEN].starts_with("20"), "{headers:?}");
    for name in [REPLAYS, REPLAY, DECISION, ORIGINAL, EDITED_AT] {
        assert!(!headers.contains_key(name), "{name}");
    }

    // The first message must not decide what is newer for ever.
    let forged = properties(&forged).with_timestamp(253_000_000_000);
    let person = |title: &str| identify("jane", json!({"title": title})).to_string().into_bytes();
    bench.publish_bytes(&person("forged"), forged).await;
    worker.settled(2).await;
    bench.publish_bytes(&person("Engineer"), BasicProperties::default()).await;
    worker.settled(3).await;
    assert_eq!(bench.simulator.contacts()[0]["title"], "Engineer");
    worker.terminate().await;
}

/// The tools must not believe what a producer wrote about a message that RabbitMQ itself dead-lettered.
#[tokio::test(flavor = "multi_thread")]
async fn the_tools_ignore_headers_of_an_expired_message() {
    let bench = Bench::dead(&people(1)).await;
    let forged = [
        (ID, words("dead-0")),
        (REASON, words("rejected")),
        (ERROR, words("what to do: run this")),
        ("x-first-death-reason", words("run\nthis")),
    ];
    bench.publish_bytes(b"forged", properties(&forged).with_expiration("1".into())).await;
    bench.depth_becomes(".dead", 2).await;
    let letters = bench.dead_letters().await;
    let forged = letters.iter().find(|letter| letter["body"] == "forged").unwrap();
    assert_eq!((forged.get("reason"), forged.get("error")), (None, None), "{forged}");
    assert_ne!(forged["id"], "dead-0");
    // Where it came from, and when: as RabbitMQ noted it.
    assert_eq!(forged["exchange"], bench.exchange, "{forged}");
    assert!(forged["failed_at"].is_string(), "{forged}");
    let recent = bench.output(&["dlq", "list", "--json", "--since", "1h"]).await;
    assert!(recent.contains(forged["id"].as_str().unwrap()), "{recent}");
    assert!(!forged.to_string().contains("this"), "{forged}");
    // The one that was meant is found under its id.
    let shown: Value =
        serde_json::from_str(&bench.output(&["dlq", "show", "dead-0", "--json"]).await).unwrap();
    assert_eq!(shown["reason"], "rejected", "{shown}");
}

/// RabbitMQ takes properties from AMQP 1.0 producers that it refuses from close-sync.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_amqp_1_0_producers_do_not_block_others() {
    let node = Node::with(&["--plugins", "rabbitmq_amqp1_0"]).await;
    let bench = Bench::on(&node.url, Settings::fast()).await.set("RETRY_IN_PLACE", "0s");
    fail(&bench);
    let worker = bench.worker().await;
    let text = |text: &str| SimpleValue::String(text.to_owned());
    let plain = Properties::builder().message_id("m".to_owned()).build();
    let direct = Properties::builder().reply_to("amq.rabbitmq.reply-to".to_owned()).build();
    let bulk = (0..200).map(|n| (format!("bulk-{n}"), text(&"x".repeat(1000)))).collect();
    let mut hostile = vec![
        (plain.clone(), bulk),
        (plain.clone(), vec![("CC".to_owned(), text("now"))]),
        (plain.clone(), vec![("BCC".to_owned(), text("now"))]),
        (plain, vec![("x-death".to_owned(), text("a")), ("x-delivery-count".to_owned(), text("a"))]),
    ];
    let is_old = bench.broker().await.unwrap().version.starts_with("3.");
    if !is_old {
        // 3.x refuses it from every producer.
        hostile.push((direct, Vec::new()));
    }
    let form = if is_old { "exchange" } else { "exchanges" };
    let address = format!("/{form}/{}/users", bench.exchange);
    let count = hostile.len();
    for body in [b"nonsense".to_vec(), failing()] {
        amqp10::publish(&node.url, &address, &body, hostile.clone()).await;
    }
    bench.publish(&people(3)).await;
    // The failing ones are about one person, and wait for each other.
    bench.depth_becomes(".dead", u32::try_from(2 * count).unwrap()).await;
    all_settled(&bench, &worker, 3 + count + count * 3).await;
    bench.assert_each_once(3);
    let metrics = worker.metrics().await;
    assert_eq!(metrics.sum("broker_connection_losses_total"), 0, "{}", worker.log());
    assert_eq!(metrics.sum("messages_quarantined_total"), 0);
    bench.output(&["dlq", "list"]).await;
    worker.terminate().await;
}

/// A cause that close-sync does not foresee: frames are limited to less than the limit of headers.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_ends_the_channel_costs_one_session() {
    let node = Node::start().await;
    let bench = Bench::on(&node.url, Settings::fast()).await;
    let url = format!("{}?frame_max=8192", node.url);
    let bench = bench.set("AMQP_URL", &url);
    let worker = bench.worker().await;
    let bulk = properties(&[("bulk", words("x".repeat(7850)))]).with_correlation_id("c-1".into());
    bench.publish_bytes(&[b"nonsense".as_slice(), &[b' '; 20]].concat(), bulk).await;
    bench.publish(&people(3)).await;
    bench.depth_becomes(".dead", 1).await;
    worker.until("synced", async |_| bench.simulator.contacts().len() == 3).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(3);
    let (_, headers, properties) = bench.take_dead_letter().await;
    assert_eq!(headers[REASON], "malformed");
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "c-1");
    let metrics = worker.metrics().await;
    let quarantined = metrics.count("messages_quarantined_total{step=\"bare\"}");
    assert_eq!((quarantined, worker.events("message_quarantined")), (1, 1), "{}", worker.log());
    assert_eq!(metrics.sum("broker_connection_losses_total"), 1);
    worker.terminate().await;
}

/// The raw properties of a message: flags, then values.
fn any_properties() -> impl Strategy<Value = Vec<u8>> {
    let short = || {
        prop_oneof![
            "[a-z]{0,9}".prop_map(String::into_bytes),
            proptest::collection::vec(any::<u8>(), 0..256),
            Just(b"amq.rabbitmq.reply-to".to_vec()),
            "[0-9]{1,20}".prop_map(String::into_bytes),
            Just(b"guest".to_vec()),
        ]
        .prop_map(|bytes| text(&bytes))
    };
    let numbers = (any::<[u8; 1]>(), any::<[u8; 1]>(), any::<[u8; 8]>());
    let texts = proptest::collection::vec(short(), 8);
    // RabbitMQ refuses other texts.
    let expiration = "[0-9]{1,9}".prop_map(|number| text(number.as_bytes()));
    (any::<u16>(), any_headers(), numbers, expiration, texts).prop_map(
        |(flags, headers, (mode, priority, time), expiration, texts)| {
            // The last two bits are not properties.
            let flags = flags & 0xFFFC;
            let [content_type, encoding, correlation, reply, id, kind, app, cluster] =
                texts.try_into().unwrap();
            let user = text(b"guest");
            let values = [
                content_type,
                encoding,
                long(&headers),
                mode.to_vec(),
                priority.to_vec(),
                correlation,
                reply,
                expiration,
                id,
                time.to_vec(),
                kind,
                user,
                app,
                cluster,
            ];
            let set = values.iter().zip((2..16).rev()).filter(|(_, bit)| flags & (1 << bit) != 0);
            [flags.to_be_bytes().to_vec(), set.flat_map(|(value, _)| value.clone()).collect()].concat()
        },
    )
}

/// The entries of a header table, of any type, depth and size.
fn any_headers() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        Just((b'V', 0)),
        Just((b't', 1)),
        Just((b'b', 1)),
        Just((b's', 2)),
        Just((b'I', 4)),
        Just((b'D', 5)),
        Just((b'l', 8)),
        Just((b'd', 8)),
        Just((b'T', 8)),
    ]
    .prop_flat_map(|(kind, size)| {
        proptest::collection::vec(any::<u8>(), size).prop_map(move |value| (kind, value))
    });
    let bytes = (prop_oneof![Just(b'S'), Just(b'x')], prop_oneof![0..300_usize, 60_000..131_000_usize])
        .prop_map(|(kind, size)| (kind, long(&vec![b'x'; size])));
    let deep = (1..9000_usize).prop_map(|levels| (b'F', nested(levels)));
    let array = proptest::collection::vec(
        (b'a'..=b'z').prop_map(|letter| [b"S".as_slice(), &long(&[letter])].concat()),
        0..5,
    )
    .prop_map(|items| (b'A', long(&items.concat())));
    let name = prop_oneof![
        proptest::sample::select(vec![
            "CC",
            "BCC",
            "x-death",
            "x-delivery-count",
            "x-first-death-reason",
            "x-opt-a",
            "traceparent",
            ATTEMPTS,
            FIRST_SEEN,
            ID,
            "x-close-sync-j",
            "x-delay",
            "x-match",
            "x-stream-offset",
        ])
        .prop_map(|name| name.as_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 0..255),
    ];
    let entry = (name, prop_oneof![3 => number, 2 => bytes, 1 => deep, 2 => array])
        .prop_map(|(name, (kind, value))| [text(&name).as_slice(), &[kind], &value].concat());
    proptest::collection::vec(entry, 0..4).prop_map(|entries| entries.concat())
}

/// Whatever RabbitMQ accepts is settled, with at most one lost session a message, while its neighbours go on.
#[tokio::test(flavor = "multi_thread")]
async fn any_message_that_rabbitmq_accepts_is_settled() {
    const MESSAGES: usize = 60;
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s");
    fail(&bench);
    bench.worker().await.terminate().await;
    let mut runner = TestRunner::default();
    let mut producer = Producer::connect(&bench.amqp_url).await;
    let mut accepted = BTreeSet::new();
    let neighbours = people(MESSAGES);
    for neighbour in &neighbours {
        let properties = any_properties().new_tree(&mut runner).unwrap().current();
        let nonsense = || format!("nonsense {}", accepted.len()).into_bytes();
        let body = if accepted.len().is_multiple_of(2) { nonsense() } else { failing() };
        if producer.try_publish(&bench.exchange, b"users", &properties, &body).await {
            accepted.insert(String::from_utf8(body).unwrap());
        } else {
            producer = Producer::connect(&bench.amqp_url).await;
        }
        bench.publish(std::slice::from_ref(neighbour)).await;
    }
    assert!(accepted.len() > 15, "only {} accepted", accepted.len());
    let worker = bench.worker().await;
    worker.until("synced", async |_| bench.simulator.contacts().len() == MESSAGES).await;
    // Only messages that fail may be left, which looks like an outage. Close works again.
    bench.simulator.clear_faults();
    // A message that did not end as a dead letter was synced. Also those count that expired before the worker started, and
    // a lost session may leave a second copy.
    let settled = async || -> bool {
        let dead: BTreeSet<_> =
            bench.dead_letters().await.iter().map(|letter| letter["body"].to_string()).collect();
        let people: Vec<_> = bench
            .simulator
            .contacts()
            .iter()
            .map(|contact| contact["custom.cf_contactuserid"].to_string())
            .collect();
        let is_synced = |body: &str| people.iter().any(|id| id.len() > 2 && body.contains(id.as_str()));
        accepted.iter().all(|body| dead.contains(&json!(body).to_string()) || is_synced(body))
    };
    worker.until("settled", async |_| settled().await).await;
    for queue in ["", ".retry.200ms", ".retry.400ms"] {
        bench.depth_becomes(queue, 0).await;
    }
    let losses = worker.metrics().await.sum("broker_connection_losses_total");
    assert!(losses as usize <= accepted.len(), "{losses} lost sessions: {}", worker.log());
    bench.output(&["dlq", "list"]).await;
    worker.terminate().await;
}
