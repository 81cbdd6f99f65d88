//! Several RabbitMQ nodes in `amqp.url`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::net::TcpListener;

use crate::support::{Bench, Proxy, Worker, identify};

/// A node that accepts connections and closes them at once. Returns its URL and the number of attempts.
async fn broken_node() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://guest:guest@{}/%2f", listener.local_addr().unwrap());
    let attempts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&attempts);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (url, attempts)
}

async fn losses(worker: &Worker) -> u32 {
    worker.metrics().await.sum("broker_connection_losses_total")
}

/// An outage is logged even if it follows the previous one closely. Otherwise the log would end with "connected".
#[tokio::test(flavor = "multi_thread")]
async fn each_outage_is_logged() {
    let bench = Bench::new().await;
    let proxy = Proxy::start(&bench.amqp_url).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    let worker = bench.worker().await;
    for outage in 1..=3 {
        proxy.cut();
        worker.until("lost", async |worker| worker.events("broker_lost") == outage).await;
        worker.until("back", async |worker| worker.events("broker_connected") > outage).await;
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_node_is_skipped_and_the_last_working_node_is_tried_first() {
    let bench = Bench::new().await;
    let (broken, attempts) = broken_node().await;
    let (one, other) = (Proxy::start(&bench.amqp_url).await, Proxy::start(&bench.amqp_url).await);
    let bench = bench.set("AMQP_URL", &format!("{broken}, {}, {}", one.url, other.url));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;
    assert_eq!(attempts.load(Ordering::Relaxed), 1, "declaring, consuming and publishing used the next node");

    // A slow machine may lose a connection more often.
    let back = async |times| {
        worker.until("back", async |worker| worker.events("broker_connected") > times).await;
    };
    // The connection is lost, but the node is available: no other node is tried.
    let before = worker.events("broker_connected");
    one.cut();
    worker.until("disconnected", async |worker| losses(worker).await >= 1).await;
    back(before).await;
    assert_eq!(attempts.load(Ordering::Relaxed), 1);

    // The node stays unavailable: the third one is used.
    let before = worker.events("broker_connected");
    drop(one);
    back(before).await;
    bench.publish(&[identify("u2", json!({}))]).await;
    worker.settled(2).await;
    assert_eq!(attempts.load(Ordering::Relaxed), 1, "the node after the last working one is tried first");
    worker.terminate().await;
}
