//! A cluster of three brokers loses a node while messages are processed.

use close_sync_simulator::{Effect, Fault, Settings};
use serde_json::{Value, json};

use crate::support::{Bench, Node, Worker, identify, people};

/// Asserts that every queue of the worker has a replica on each of the three nodes.
async fn assert_three_replicas(node: &Node, bench: &Bench) {
    let queues = node.ctl(&["list_queues", "name", "members", "--formatter", "json"]).await;
    let queues: Vec<Value> = serde_json::from_str(&queues).unwrap();
    let members = |suffix: &str| {
        let name = format!("{}{suffix}", bench.queue);
        let queue = queues.iter().find(|queue| queue["name"] == name.as_str()).unwrap();
        queue["members"].as_array().unwrap().len()
    };
    assert_eq!(["", ".dead", ".retry.200ms", ".retry.400ms", ".journal"].map(members), [3; 5], "{queues:#?}");
}

/// The index of the node that leads a queue.
async fn leader(nodes: &[Node; 3], queue: &str) -> usize {
    for (index, node) in nodes.iter().enumerate() {
        if node.ctl(&["list_queues", "--local", "name"]).await.lines().any(|name| name == queue) {
            return index;
        }
    }
    panic!("no node has the queue");
}

/// Kills a node while messages are processed, and publishes before and after that. Asserts that no message is lost
/// or duplicated.
async fn process_while_a_node_dies(bench: &Bench, worker: &Worker, victim: &Node) {
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 250 }).on("POST", "/lead/"));
    let people = people(80);
    bench.publish(&people[..50]).await;
    worker.until("working", async |_| bench.simulator.leads().len() > 8).await;
    victim.kill().await;
    assert!(bench.simulator.leads().len() < 50, "the node dies while messages are processed");
    bench.publish(&people[50..]).await;
    worker.until("done", async |_| bench.simulator.leads().len() >= 80).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(80);
    assert_eq!(bench.depth(".dead").await, 0);
}

async fn connection_losses(worker: &Worker) -> u32 {
    worker.metrics().await.sum("broker_connection_losses_total")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_keeps_its_connection_when_another_node_with_the_queue_leader_dies() {
    let nodes = Node::cluster().await;
    let bench = Bench::on(&nodes[0].url, Settings::fast()).await.set("WORKER_CONCURRENCY", "4");
    // Declares the queues, then stops.
    bench.worker().await.terminate().await;
    assert_three_replicas(&nodes[0], &bench).await;
    let leader = leader(&nodes, &bench.queue).await;

    let mut bench = bench.set("AMQP_URL", &nodes[(leader + 1) % 3].url);
    bench.amqp_url.clone_from(&nodes[(leader + 2) % 3].url);
    let worker = bench.worker().await;
    process_while_a_node_dies(&bench, &worker, &nodes[leader]).await;
    assert_eq!(connection_losses(&worker).await, 0, "{}", worker.log());
    worker.terminate().await;
}

/// The node of the worker's connection dies. The worker connects to another node of its list.
#[tokio::test(flavor = "multi_thread")]
async fn the_worker_reconnects_to_another_node_when_its_node_dies() {
    let nodes = Node::cluster().await;
    let urls = nodes.each_ref().map(|node| node.url.as_str()).join(",");
    let mut bench = Bench::on(&nodes[0].url, Settings::fast()).await.set("AMQP_URL", &urls);
    bench = bench.set("WORKER_CONCURRENCY", "4");
    let worker = bench.worker().await;
    let victim = connected_to(&nodes).await;
    bench.amqp_url.clone_from(&nodes[(victim + 1) % 3].url);
    process_while_a_node_dies(&bench, &worker, &nodes[victim]).await;
    assert!(connection_losses(&worker).await > 0);
    worker.terminate().await;
}

/// The index of the node that the worker consumes from.
async fn connected_to(nodes: &[Node; 3]) -> usize {
    let connections = nodes[0].ctl(&["list_connections", "port", "client_properties"]).await;
    let ours = connections.lines().find(|line| line.contains("close-sync consume")).unwrap();
    let port = ours.split_whitespace().next().unwrap();
    nodes.iter().position(|node| node.url.contains(&format!(":{port}/"))).unwrap()
}

/// A simulator whose search shows nothing that the test creates. Only the journal prevents duplicates.
fn blind() -> Settings {
    Settings::fast().with(|close| close.search_lag = "24h".parse().unwrap())
}

/// Starts a worker on a node, and lets it process another event about each of the people, with this title.
async fn update_on(bench: Bench, node: &Node, people: usize, title: &str) -> (Bench, Worker) {
    let bench = bench.set("AMQP_URL", &node.url);
    let worker = bench.worker().await;
    let traits = |n: usize| json!({"company": {"id": format!("c{n}")}, "title": title});
    bench.publish(&(0..people).map(|n| identify(&format!("u{n}"), traits(n))).collect::<Vec<_>>()).await;
    let is_done =
        || bench.simulator.contacts().iter().filter(|contact| contact["title"] == title).count() >= people;
    worker.until("done", async |_| is_done()).await;
    bench.depth_becomes("", 0).await;
    assert_eq!(bench.depth(".dead").await, 0);
    (bench, worker)
}

async fn uses_journal(worker: &Worker) -> bool {
    worker.metrics().await.count("journal_in_use") == 1 && worker.events("journal_unusable") == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_goes_on_without_the_node_that_leads_it() {
    let nodes = Node::cluster().await;
    let bench = Bench::on(&nodes[0].url, blind()).await.set("WORKER_CONCURRENCY", "4");
    bench.worker().await.terminate().await;
    assert_three_replicas(&nodes[0], &bench).await;
    let leader = leader(&nodes, &format!("{}.journal", bench.queue)).await;
    let others = [(leader + 1) % 3, (leader + 2) % 3];

    let mut bench = bench.set("AMQP_URL", &nodes[others[0]].url);
    bench.amqp_url.clone_from(&nodes[others[1]].url);
    let worker = bench.worker().await;
    process_while_a_node_dies(&bench, &worker, &nodes[leader]).await;
    assert!(uses_journal(&worker).await, "{}", worker.log());
    worker.kill().await;

    // Its successors start without that node, and know what it created.
    for (node, title) in others.into_iter().zip(["CTO", "CEO"]) {
        let successor;
        (bench, successor) = update_on(bench, &nodes[node], 80, title).await;
        assert!(uses_journal(&successor).await, "{}", successor.log());
        bench.assert_each_once(80);
        successor.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_is_declared_while_a_node_is_gone_and_used_on_it_later() {
    let nodes = Node::cluster().await;
    nodes[2].kill().await;
    let mut bench = Bench::on(&nodes[0].url, blind()).await;
    for (node, title) in [(0, "CFO"), (1, "CTO"), (2, "CEO")] {
        // On RabbitMQ 3.10 a node that returns may have no replica of the stream for minutes.
        if node == 2 && bench.broker().await.unwrap().version.starts_with("3.10.") {
            break;
        }
        if node == 2 {
            nodes[2].start_again().await;
        }
        let worker;
        (bench, worker) = update_on(bench, &nodes[node], 10, title).await;
        assert!(uses_journal(&worker).await, "{}", worker.log());
        bench.assert_each_once(10);
        worker.kill().await;
    }
}

/// RabbitMQ does not serve a stream on a node without a replica of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_on_a_node_without_a_replica_of_the_journal_works_without_it() {
    let first = Node::start().await;
    let bench = Bench::on(&first.url, Settings::fast()).await;
    if bench.broker().await.unwrap().version.starts_with("3.10.") {
        // For minutes this version ends the connection instead, or says that the stream is stopping.
        return;
    }
    bench.worker().await.terminate().await;
    let second = first.joined().await;
    let (bench, worker) = update_on(bench, &second, 10, "CTO").await;
    assert_eq!(worker.events("journal_unusable"), 1, "{}", worker.log());
    assert_eq!(worker.ready().await.1["journal"], "unusable");
    bench.assert_each_once(10);
    worker.terminate().await;
}
