//! Least privilege: the definitions and permissions in `deploy/operating.md` and `deploy/rabbitmq` are sufficient, and
//! allow nothing else.

use close_sync::amqp;
use close_sync::amqp::topology::{Object, bindings, journal_binding, journal_objects, objects};
use close_sync::config::{Config, Need};
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use serde_json::{Map, Value, json};

use crate::support::{Bench, Node, identify};

const OPERATING: &str = include_str!("../../../deploy/operating.md");
const DEFINITIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/rabbitmq/definitions.json");

/// The exchanges, queues and bindings, in RabbitMQ's import format.
fn definitions(settings: &amqp::Settings) -> String {
    let (mut exchanges, mut queues) = (Vec::new(), Vec::new());
    for object in objects(settings).into_iter().chain(journal_objects(settings)) {
        match object {
            Object::Exchange { name, kind } => exchanges.push(json!({
                "name": name, "vhost": "/", "type": kind.label(), "durable": true, "auto_delete": false,
                "internal": false, "arguments": {},
            })),
            Object::Queue { name, arguments } => {
                let arguments: Map<_, _> =
                    arguments.into_iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
                queues.push(json!({
                    "name": name, "vhost": "/", "durable": true, "auto_delete": false, "arguments": arguments,
                }));
            }
        }
    }
    let bindings: Vec<_> = bindings(settings)
        .into_iter()
        .chain([journal_binding(settings)])
        .map(|binding| {
            json!({
                "source": binding.exchange, "vhost": "/", "destination": binding.queue,
                "destination_type": "queue", "routing_key": binding.key, "arguments": {},
            })
        })
        .collect();
    let all = json!({
        "vhosts": [{"name": "/"}], "exchanges": exchanges, "queues": queues, "bindings": bindings,
    });
    serde_json::to_string_pretty(&all).unwrap() + "\n"
}

fn settings(bench: &Bench) -> amqp::Settings {
    Config::load(None, &bench.environment(), Need::Broker).unwrap().single().unwrap().amqp
}

#[test]
fn the_definitions_match_what_a_worker_declares() {
    let defaults = Config::load(None, &[].into(), Need::Broker).unwrap().single().unwrap().amqp;
    let (file, wanted) = (std::fs::read_to_string(DEFINITIONS).unwrap(), definitions(&defaults));
    assert!(file == wanted, "{DEFINITIONS} is outdated; expected:\n{wanted}");
}

/// Runs the commands of the section "Broker permissions", with `secret` as every password.
async fn administer(node: &Node) {
    let (_, section) = OPERATING.split_once("## Broker permissions").unwrap();
    let commands = section.lines().take_while(|line| !line.starts_with("## "));
    let commands: Vec<_> = commands.filter_map(|line| line.strip_prefix("rabbitmqctl ")).collect();
    assert!(commands.len() >= 7, "{commands:?}");
    // The node may be unable to read this folder (`tests/versions`).
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(DEFINITIONS, copy.path()).unwrap();
    for command in commands {
        let (command, _) = command.split_once(" # ").unwrap_or((command, ""));
        let mut words: Vec<_> = command.split_whitespace().map(|word| word.trim_matches('\'')).collect();
        match words[0] {
            "import_definitions" => {
                assert!(DEFINITIONS.ends_with(words[1]), "{command}");
                words[1] = copy.path().to_str().unwrap();
            }
            // On a terminal it prompts for the password.
            "add_user" => words.push("secret"),
            _ => {}
        }
        node.ctl(&words).await;
    }
}

/// A bench whose processes log in as a user of that section.
fn login(bench: Bench, user: &str) -> Bench {
    let url = bench.amqp_url.replace("guest:guest", &format!("{user}:secret"));
    bench.set("AMQP_URL", &url)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_user_has_the_permissions_it_needs_and_no_others() {
    let node = Node::start().await;
    administer(&node).await;
    let bench = || async {
        Bench::on(&node.url, Settings::fast()).await.named("identify", "close-sync").unset("RETRY_DELAYS")
    };

    // The imported objects equal those that `declare` would create: no conflict.
    let setup = login(bench().await, "setup");
    let (code, text) = setup.run_combined(&["check"], "").await;
    assert!(code == Some(0) && text.contains("queue `close-sync`: 0 messages ready"), "{text}");
    // The binding exists, too: published messages arrive.
    let worker = login(bench().await, "worker").set("AMQP_TOPOLOGY", "check");
    assert_eq!(worker.sync(&[identify("u0", json!({}))]).await.outcomes(), [("created", 1)].into());

    // Short delays, so that messages return soon. Their queues are imported, too.
    let short =
        |bench: Bench| bench.set("RETRY_DELAYS", "[\"200ms\", \"400ms\"]").set("RETRY_IN_PLACE", "0s");
    let worker = short(worker);
    let (code, text) = worker.run_combined(&["check"], "").await;
    assert!(
        code == Some(78) && text.contains("missing in RabbitMQ: queue `close-sync.retry.200ms`"),
        "{text}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), definitions(&settings(&worker))).unwrap();
    node.ctl(&["import_definitions", file.path().to_str().unwrap()]).await;

    let unavailable = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
    worker.simulator.fault(Fault::new(unavailable).on("POST", "/lead/").containing("flaky").times(1));
    let running = worker.worker().await;
    let flaky = identify("u2", json!({"company": {"id": "flaky"}}));
    worker.publish(&[identify("u1", json!({})), flaky, json!({"type": "identify"})]).await;
    let metrics = running.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 2), ("delayed", 1), ("dead", 1)].into());
    assert_eq!(metrics.sum("broker_connection_losses_total"), 0, "{}", running.log());

    let operator = login(bench().await, "operator");
    let letters: Value = serde_json::from_str(&operator.output(&["dlq", "list", "--json"]).await).unwrap();
    assert_eq!(letters["groups"][0]["reason"], "no_identity");
    let (code, text) = operator.run_combined(&["dlq", "replay", "--all"], "").await;
    assert!(code == Some(1) && text.contains("the message failed again"), "{text}");
    assert_eq!(running.settled(5).await.outcome("dead"), 2);
    running.terminate().await;

    // No other permissions.
    let event = identify("u3", json!({})).to_string();
    for user in ["worker", "operator"] {
        let (code, text) = login(bench().await, user).run_combined(&["publish", "-"], &event).await;
        assert!(code == Some(69) && text.contains("permission denied by RabbitMQ"), "{user}: {text}");
    }
    let operator = short(operator).set("AMQP_TOPOLOGY", "check");
    let running = operator.starting_worker();
    running.until("refused", async |worker| worker.is("connecting", Some("forbidden")).await).await;
    assert_eq!(running.ready().await.0, 503);
    running.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_permission_to_declare_logs_the_remedy() {
    let node = Node::start().await;
    administer(&node).await;
    let bench = Bench::on(&node.url, Settings::fast()).await.named("identify", "close-sync");
    let bench = login(bench.unset("RETRY_DELAYS"), "worker");
    let remedy = "set `amqp.topology = \"check\"`";
    let (code, text) = bench.run_combined(&["check"], "").await;
    assert!(
        code == Some(78) && text.contains("denies the permission to declare") && text.contains(remedy),
        "{text}"
    );

    let worker = bench.starting_worker();
    worker.until("trying again", async |worker| worker.events("broker_unavailable") >= 2).await;
    let log = worker.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains(r#""level":"WARN""#)).collect();
    let [incident] = warnings.as_slice() else { panic!("expected one warning: {warnings:#?}") };
    assert!(incident.contains("no connection to RabbitMQ, reconnecting"), "{incident}");
    assert!(incident.contains("amqp.topology") && incident.contains("Broker permissions"), "{incident}");

    // The worker continues without a restart once the permissions are granted.
    node.ctl(&[
        "set_permissions",
        "worker",
        "^(identify$|close-sync)",
        "^(identify$|close-sync)",
        "^(identify$|close-sync)",
    ])
    .await;
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    worker.terminate().await;
    // They also suffice to create all objects.
    let other = bench.named("identify", "close-sync-other");
    assert_eq!(other.sync(&[identify("u1", json!({}))]).await.outcomes(), [("created", 1)].into());
}

/// After an upgrade an administrator has imported the definitions, and the user has its old permissions.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_may_not_use_the_journal_works_without_it() {
    let node = Node::start().await;
    administer(&node).await;
    let write = |journal: &str| format!(r"^close-sync\.(retry|dead{journal})$");
    let read = |journal: &str| format!(r"^(identify|close-sync({journal}\.retry\..+)?)$");
    let permissions =
        [(write(""), read("")), (write(""), read(r"\.journal|")), (write("|journal"), read(""))];
    for (number, (write, read)) in permissions.iter().enumerate() {
        node.ctl(&["set_permissions", "worker", "^$", write, read]).await;
        let bench = Bench::on(&node.url, Settings::fast()).await.named("identify", "close-sync");
        let bench = login(bench.unset("RETRY_DELAYS"), "worker").set("AMQP_TOPOLOGY", "check");
        let (code, text) = bench.run_combined(&["check"], "").await;
        assert!(code == Some(0) && text.contains("not used: permission denied by RabbitMQ"), "{text}");
        let worker = bench.worker().await;
        bench.publish(&[identify(&format!("u{number}"), json!({}))]).await;
        let metrics = worker.settled(1).await;
        assert_eq!(metrics.outcomes(), [("created", 1)].into(), "{write} {read}");
        assert_eq!(metrics.sum("broker_connection_losses_total"), 0, "{}", worker.log());
        assert_eq!(
            ["journal_in_use", "journal_trouble"].map(|name| metrics.count(name)),
            [0, 1],
            "{write} {read}"
        );
        assert_eq!(worker.events("journal_unusable"), 1);
        assert_eq!(worker.ready().await.1["journal"], "unusable");
        worker.terminate().await;
    }
}

/// RabbitMQ 3.10 has streams only after an administrator has enabled their feature flag. It closes the connection on
/// which a stream is declared without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_streams_works_without_a_journal() {
    let bench = Bench::new().await;
    if !bench.broker().await.unwrap().version.starts_with("3.10.") {
        // This version always has streams.
        return;
    }
    let flags = "[{rabbit, [{forced_feature_flags_on_init, [quorum_queue, implicit_default_bindings]}]}].";
    let node = Node::with(&["--advanced", flags]).await;
    let bench = Bench::on(&node.url, Settings::fast()).await;
    let journal_finding = async || {
        let check = bench.run(&["check", "--json"], b"").await;
        let findings: Vec<Value> = serde_json::from_slice(&check.stdout).unwrap();
        findings.iter().find(|finding| finding["subject"] == "journal").unwrap()["status"].clone()
    };
    assert_eq!(journal_finding().await, "ok", "a worker declares it");
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    assert_eq!(worker.settled(1).await.outcomes(), [("created", 1)].into());
    assert_eq!(worker.events("journal_unusable"), 1, "{}", worker.log());
    assert_eq!(worker.ready().await.1["journal"], "unusable");
    assert_eq!(journal_finding().await, "warning");
    worker.terminate().await;
}
