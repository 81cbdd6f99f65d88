//! The stream of the journal on a real broker: checkpoints, restarts, a replay.

use close_sync::domain::journal::{Batch, Entry};
use close_sync_simulator::{Fault, Settings};
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Consumer};
use serde_json::{Value, json};

use crate::support::{Bench, TIMEOUT, identify, refusal};

/// A simulator whose search shows nothing that the test creates. Only the journal prevents duplicates.
async fn bench() -> Bench {
    let settings = Settings::fast().with(|close| close.search_lag = "24h".parse().unwrap());
    Bench::with(settings).await.set("RUST_LOG", "info,lapin=off")
}

/// Events about ten people, each at a company of their own.
fn events(title: &str) -> Vec<Value> {
    let traits = |n: usize| json!({"company": {"id": format!("c{n}")}, "title": title});
    (0..10).map(|n| identify(&format!("u{n}"), traits(n))).collect()
}

/// Reads the journal from its first message on.
async fn reader(bench: &Bench) -> Consumer {
    let channel = bench.channel().await;
    channel.basic_qos(100, BasicQosOptions::default()).await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    let name = format!("{}.journal", bench.queue);
    channel.basic_consume(name.into(), "".into(), BasicConsumeOptions::default(), arguments).await.unwrap()
}

/// The next message of close-sync, with its position.
async fn next(reader: &mut Consumer) -> (u64, Batch) {
    loop {
        let message =
            tokio::time::timeout(TIMEOUT, reader.next()).await.expect("a message").unwrap().unwrap();
        message.acker.ack(BasicAckOptions::default()).await.unwrap();
        let headers = message.properties.headers().as_ref().unwrap().inner();
        let position = headers["x-stream-offset"].as_long_long_int().unwrap();
        if let Ok(batch) = Batch::decode(&message.data) {
            return (u64::try_from(position).unwrap(), batch);
        }
    }
}

/// Makes a checkpoint due: it depends on the bytes in the journal.
async fn fill_journal(bench: &Bench) {
    let channel = bench.channel().await;
    let (exchange, options) = (format!("{}.journal", bench.queue), BasicPublishOptions::default());
    for _ in 0..5 {
        let body = vec![b'x'; 1 << 20];
        let properties = BasicProperties::default();
        let confirm = channel.basic_publish(exchange.as_str().into(), "".into(), options, &body, properties);
        assert!(confirm.await.unwrap().await.unwrap().is_ack());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_starts_from_a_checkpoint_knows_what_was_created_before_it() {
    let bench = bench().await;
    let worker = bench.worker().await;
    bench.publish(&events("CFO")).await;
    worker.settled(10).await;
    fill_journal(&bench).await;

    // When the worker appends entries, it looks whether a checkpoint is due, and says where the newest complete one begins.
    let (mut reader, mut began) = (reader(&bench).await, None);
    for number in 1.. {
        bench.publish(&[identify(&format!("other{number}"), json!({}))]).await;
        let (position, batch) = next(&mut reader).await;
        if began.is_some() && batch.anchor.map(|anchor| anchor.position) == began {
            worker.settled(10 + number).await;
            break;
        }
        if batch.entries.iter().any(|entry| matches!(entry, Entry::CheckpointBegin { .. })) {
            began = Some(position);
        }
    }
    worker.kill().await;

    let successor = bench.worker().await;
    bench.publish(&events("CTO")).await;
    assert_eq!(successor.settled(10).await.outcomes(), [("updated", 10)].into(), "{}", successor.log());
    successor.terminate().await;
}

/// Restarts, a dead letter and its replay.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_after_restarts_creates_nothing_again_and_takes_nothing_back() {
    let bench = bench().await.set("RETRY_IN_PLACE", "0s");
    let worker = bench.worker().await;
    bench.publish(&events("CFO")).await;
    worker.settled(10).await;
    let refused = Fault::new(refusal()).on("PUT", "/contact/").times(1);
    bench.simulator.fault(refused);
    bench.publish(&events("CTO")[..1]).await;
    bench.depth_becomes(".dead", 1).await;
    worker.kill().await;

    let second = bench.worker().await;
    bench.publish(&events("CEO")).await;
    assert_eq!(second.settled(10).await.outcomes(), [("updated", 10)].into(), "{}", second.log());
    second.terminate().await;

    let third = bench.worker().await;
    bench.output(&["dlq", "replay", "--all"]).await;
    bench.depth_becomes(".dead", 0).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(10);
    let titles = bench.simulator.contacts();
    assert!(titles.iter().all(|contact| contact["title"] == "CEO"), "{titles:#?}");
    assert_eq!(third.metrics().await.count("journal_in_use"), 1);
    third.terminate().await;
}
