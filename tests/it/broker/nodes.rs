//! Several nodes of one broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::net::TcpListener;

use crate::support::{Bench, Proxy, identify};

/// A node that takes connections and ends them at once: its address, and how often it was tried.
async fn broken_node() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://guest:guest@{}/%2f", listener.local_addr().unwrap());
    let tried = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tried);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (url, tried)
}

/// An outage is told however soon it follows the last one: the log must not end with "connected".
#[tokio::test(flavor = "multi_thread")]
async fn each_outage_is_told() {
    let bench = Bench::new().await;
    let way = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &way.url);
    let worker = bench.worker().await;
    for times in 1..=3 {
        way.cut();
        worker.until("lost", async |worker| worker.logged("reconnecting to RabbitMQ") == times).await;
        worker.until("back", async |worker| worker.logged("waiting for messages") > times).await;
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_away_is_passed_over_and_the_one_that_worked_is_asked_first() {
    let bench = Bench::new().await;
    let (broken, tried) = broken_node().await;
    let (one, other) = (Proxy::start(&bench.amqp_url).await, Proxy::start(&bench.amqp_url).await);
    let bench = bench.set("AMQP_URL", &format!("{broken}, {}, {}", one.url, other.url));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;
    assert_eq!(tried.load(Ordering::Relaxed), 1, "declaring, consuming and publishing took the next one");

    // A busy machine may lose a connection more.
    let back = async |times| {
        worker.until("back", async |worker| worker.logged("waiting for messages") > times).await;
    };
    // Cut, and there again: nobody else is asked.
    let before = worker.logged("waiting for messages");
    one.cut();
    worker.until("lost", async |worker| worker.logged("reconnecting to RabbitMQ") >= 1).await;
    back(before).await;
    assert_eq!(tried.load(Ordering::Relaxed), 1);

    // Gone for good: the third one is left.
    let before = worker.logged("waiting for messages");
    drop(one);
    back(before).await;
    bench.publish(&[identify("u2", json!({}))]).await;
    worker.settled(2).await;
    assert_eq!(tried.load(Ordering::Relaxed), 1, "what comes after the one that worked is tried first");
    worker.terminate().await;
}
