//! A cluster of brokers that loses a node in the middle of the work.

use close_sync_simulator::{Effect, Fault, Settings};
use serde_json::Value;

use crate::support::{Bench, Node, Worker, people};

/// The queues a worker has declared have a copy on each of the three nodes.
async fn assert_three_copies(node: &Node, bench: &Bench) {
    let queues = node.ctl(&["list_queues", "name", "members", "--formatter", "json"]).await;
    let queues: Vec<Value> = serde_json::from_str(&queues).unwrap();
    let members = |suffix: &str| {
        let name = format!("{}{suffix}", bench.queue);
        let queue = queues.iter().find(|queue| queue["name"] == name.as_str()).unwrap();
        queue["members"].as_array().unwrap().len()
    };
    assert_eq!(["", ".dead", ".retry.200ms", ".retry.400ms"].map(members), [3; 4], "{queues:#?}");
}

/// Which node has the leader of the work queue.
async fn leader(nodes: &[Node; 3], bench: &Bench) -> usize {
    for (index, node) in nodes.iter().enumerate() {
        if node.ctl(&["list_queues", "--local", "name"]).await.lines().any(|name| name == bench.queue) {
            return index;
        }
    }
    panic!("no node has the queue");
}

/// Publishes before and after a node is killed in the middle of the work; nothing is lost, nothing doubled.
async fn work_while_one_dies(bench: &Bench, worker: &Worker, victim: &Node) {
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 250 }).on("POST", "/lead/"));
    let people = people(80);
    bench.publish(&people[..50]).await;
    worker.until("working", async |_| bench.simulator.leads().len() > 8).await;
    victim.kill().await;
    assert!(bench.simulator.leads().len() < 50, "it dies in the middle of the work");
    bench.publish(&people[50..]).await;
    worker.until("done", async |_| bench.simulator.leads().len() >= 80).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(80);
    assert_eq!(bench.depth(".dead").await, 0);
}

async fn losses(worker: &Worker) -> u32 {
    worker.metrics().await.sum("broker_connection_losses_total")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_node_that_leads_the_queue_is_not_noticed() {
    let nodes = Node::cluster().await;
    let bench = Bench::on(&nodes[0].url, Settings::fast()).await.set("WORKER_CONCURRENCY", "4");
    // Declares, and leaves.
    bench.worker().await.terminate().await;
    assert_three_copies(&nodes[0], &bench).await;
    let leader = leader(&nodes, &bench).await;

    let mut bench = bench.set("AMQP_URL", &nodes[(leader + 1) % 3].url);
    bench.amqp_url.clone_from(&nodes[(leader + 2) % 3].url);
    let worker = bench.worker().await;
    work_while_one_dies(&bench, &worker, &nodes[leader]).await;
    assert_eq!(losses(&worker).await, 0, "{}", worker.log());
    worker.terminate().await;
}

/// The node the worker is connected to dies, and with it the leader of the queue: the worker goes on with
/// another node of its list.
#[tokio::test(flavor = "multi_thread")]
async fn when_its_node_dies_the_worker_goes_on_with_another() {
    let nodes = Node::cluster().await;
    let urls = nodes.each_ref().map(|node| node.url.as_str()).join(",");
    let mut bench = Bench::on(&nodes[0].url, Settings::fast()).await.set("AMQP_URL", &urls);
    bench = bench.set("WORKER_CONCURRENCY", "4");
    let worker = bench.worker().await;
    let victim = connected_to(&nodes).await;
    bench.amqp_url.clone_from(&nodes[(victim + 1) % 3].url);
    work_while_one_dies(&bench, &worker, &nodes[victim]).await;
    assert!(losses(&worker).await > 0);
    worker.terminate().await;
}

/// Which node the worker consumes from.
async fn connected_to(nodes: &[Node; 3]) -> usize {
    let connections = nodes[0].ctl(&["list_connections", "port", "client_properties"]).await;
    let ours = connections.lines().find(|line| line.contains("close-sync consume")).unwrap();
    let port = ours.split_whitespace().next().unwrap();
    nodes.iter().position(|node| node.url.contains(&format!(":{port}/"))).unwrap()
}
