//! Several Close organizations in one process.

use close_sync_simulator::{Effect, Fault, Settings, Simulator};
use lapin::BasicProperties;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Bench, Worker, identify};

/// Two simulated organizations, and a configuration file in a folder.
struct Two {
    bench: Bench,
    emea: Simulator,
    apac: Simulator,
    folder: TempDir,
}

impl Two {
    async fn new() -> Self {
        let start = || Simulator::start(Settings::fast(), "127.0.0.1:0".parse().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("close-sync.toml");
        let bench =
            Bench::new().await.unset("CLOSE_API_KEY").set("CLOSE_SYNC_CONFIG", file.to_str().unwrap());
        Self { bench, emea: start().await.unwrap(), apac: start().await.unwrap(), folder }
    }

    fn write(&self, tables: &[String]) {
        std::fs::write(self.folder.path().join("close-sync.toml"), tables.join("\n")).unwrap();
    }
}

/// The table of a destination that syncs the events of its region.
fn table(name: &str, close: &Simulator, key: &str) -> String {
    let url = close.url();
    format!(
        "[destinations.{name}]\nclose = {{ api_url = '{url}', api_key = '{key}' }}\n\
         mapping.trigger = \"$.traits.region == '{name}'\""
    )
}

const KEY: &str = "api_simulator.key";

fn person(user: &str, region: &str) -> Value {
    identify(user, json!({"region": region, "company": {"id": "acme"}}))
}

async fn state(worker: &Worker, destination: &str) -> Value {
    worker.ready().await.1["destinations"][destination]["state"].clone()
}

/// The series of `config_info`, which contains a hash of the settings in effect.
async fn config_hash(worker: &Worker, destination: &str) -> Option<String> {
    let destination = format!("destination=\"{destination}\"");
    let metrics = worker.metrics().await;
    metrics
        .names()
        .find(|name| name.contains("config_info") && name.contains(&destination))
        .map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn destinations_sync_and_reload_independently() {
    let two = Two::new().await;
    two.write(&[table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)]);
    let worker = two.bench.worker().await;
    two.bench.publish(&[person("u1", "emea"), person("u2", "apac"), person("u3", "apac")]).await;
    // Every event reaches both queues.
    let metrics = worker.settled(6).await;
    let created = |name: &str| metrics.outcome_of("created", name);
    assert_eq!((created("emea"), created("apac")), (1, 1));
    assert_eq!((two.emea.contacts().len(), two.apac.contacts().len()), (1, 2));
    for name in ["emea", "apac"] {
        assert_eq!(worker.ready().await.1["destinations"][name]["journal"], "in_use");
        two.bench.try_depth(&format!("-{name}.journal")).await.expect("a journal of its own");
    }
    let log = worker.log();
    let synced = log.lines().find(|line| line.contains(r#""outcome":"created""#)).unwrap();
    assert!(synced.contains(r#""destination":""#), "{synced}");

    // A problem of one destination does not affect the other.
    two.emea.set_api_key("api_another.key");
    two.bench.publish(&[person("u5", "emea"), person("u4", "apac")]).await;
    worker.until("paused", async |worker| state(worker, "emea").await == "paused").await;
    worker.until("synced", async |_| two.apac.contacts().len() == 3).await;
    let (status, report) = worker.ready().await;
    assert_eq!(
        (status, &report["ready"], &report["destinations"]["apac"]["state"]),
        (503, &json!(false), &json!("consuming"))
    );
    assert_eq!(report["destinations"]["emea"]["cause"], "unauthorized");
    let metrics = worker.metrics().await;
    assert_eq!(metrics.count("paused{cause=\"unauthorized\",destination=\"emea\"}"), 1);
    assert_eq!(metrics.count("paused{cause=\"unauthorized\",destination=\"apac\"}"), 0);
    let check = two.bench.run(&["check"], b"").await;
    let found = String::from_utf8(check.stdout).unwrap();
    let remedy = "set `destinations.emea.close.api_key` (DESTINATIONS_EMEA_CLOSE_API_KEY) to a key";
    assert!(check.status.code() == Some(78) && found.contains(remedy), "{found}");

    // Reload: one gets the right key, one is removed, one is added.
    two.write(&[table("emea", &two.emea, "api_another.key"), table("latam", &two.apac, KEY)]);
    worker.signal("HUP");
    worker
        .until("reloaded", async |worker| {
            let each =
                (state(worker, "emea").await, state(worker, "latam").await, state(worker, "apac").await);
            each == ("consuming".into(), "standing_by".into(), Value::Null)
        })
        .await;
    assert_eq!(worker.ready().await.0, 200);
    assert!(worker.metrics().await.names().all(|name| !name.contains("destination=\"apac\"")));
    two.bench.publish(&[person("u7", "latam"), person("u6", "apac")]).await;
    worker.until("synced", async |_| two.apac.contacts().len() == 4).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_restarts_only_changed_destinations() {
    let two = Two::new().await;
    let emea = table("emea", &two.emea, KEY);
    two.write(&[emea.clone(), table("apac", &two.apac, KEY)]);
    let worker = two.bench.worker().await;
    two.bench.publish(&[person("u1", "emea"), person("u2", "apac")]).await;
    worker.settled(4).await;
    let searches = || [&two.emea, &two.apac].map(|close| close.request_count("POST", "/data/"));
    // How many log lines of a destination contain a text.
    let logged = |event: &str, name: &str| {
        let (event, of) = (format!("\"event\":\"{event}\""), format!("\"destination\":\"{name}\""));
        worker.log().lines().filter(|line| line.contains(&event) && line.contains(&of)).count()
    };

    let (emea_hash, apac_hash) = (config_hash(&worker, "emea").await, config_hash(&worker, "apac").await);

    // emea has a message in progress, which a restart would have to finish first.
    two.emea.fault(Fault::new(Effect::Latency { ms: 3000 }).on("POST", "/lead/").times(1));
    let other_company = identify("u3", json!({"region": "emea", "company": {"id": "another"}}));
    two.bench.publish(&[other_company]).await;
    worker.until("writing", async |_| two.emea.request_count("POST", "/lead/") == 2).await;
    let [emea_before, apac_before] = searches();
    two.write(&[emea.clone(), table("apac", &two.apac, KEY) + "\nworker.concurrency = 8"]);
    worker.signal("HUP");
    let is_reloaded = async |worker: &Worker| {
        let hash = config_hash(worker, "apac").await;
        hash.is_some() && hash != apac_hash
    };
    worker.until("reloaded", is_reloaded).await;
    assert_eq!(config_hash(&worker, "emea").await, emea_hash);
    assert_eq!(state(&worker, "emea").await, "consuming");
    // emea keeps its cache. apac has lost it.
    two.bench.publish(&[person("u1", "emea"), person("u2", "apac")]).await;
    worker.settled(10).await;
    let [emea_after, apac_after] = searches();
    assert!(emea_after == emea_before && apac_after > apac_before, "{}", worker.log());

    // A rejected configuration is tried at each reload, until the file has the current settings again.
    two.write(&[table("emea", &two.emea, "api_wrong.key"), table("apac", &two.apac, KEY)]);
    for times in 1..3 {
        worker.signal("HUP");
        worker.until("refused", async |_| logged("reload_rejected", "emea") == times).await;
    }
    two.write(&[emea, table("apac", &two.apac, KEY)]);
    worker.signal("HUP");
    worker.until("read", async |_| logged("reload_unchanged", "emea") == 2).await;
    two.bench.publish(&[person("u1", "emea")]).await;
    worker.settled(12).await;
    assert_eq!(searches()[0], emea_before, "still the same session");
    worker.terminate().await;
}

/// The destination is removed and added again while it still finishes a message.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_added_again_while_it_stops_runs_once() {
    let two = Two::new().await;
    let both = [table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)];
    two.write(&both);
    two.emea.fault(Fault::new(Effect::Latency { ms: 3000 }).on("POST", "/lead/"));
    let worker = two.bench.worker().await;
    two.bench.publish(&[person("u1", "emea")]).await;
    worker.until("writing", async |_| two.emea.request_count("POST", "/lead/") == 1).await;
    two.write(&both[1..]);
    worker.signal("HUP");
    worker.until("stopping", async |worker| state(worker, "emea").await == "stopping").await;
    two.write(&both);
    for times in 2..5 {
        worker.signal("HUP");
        worker.until("read", async |worker| worker.events("reload_started") == times).await;
    }
    worker.until("done", async |worker| worker.metrics().await.outcome_of("created", "emea") == 1).await;
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    let checked = two.bench.output(&["check"]).await;
    assert_eq!(checked.matches("0 messages ready, 1 consumer, 0 dead letters").count(), 2, "{checked}");
    two.bench.publish(&[person("u2", "emea")]).await;
    worker.until("done", async |worker| worker.metrics().await.outcome_of("added", "emea") == 1).await;
    assert_eq!(two.emea.contacts().len(), 2);
    worker.terminate().await;
}

/// Two at once would have two caches and two rate limiters for one organization.
#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_destination_starts_after_the_old_one_has_stopped() {
    let two = Two::new().await;
    let (emea, apac) = (table("emea", &two.emea, KEY), table("apac", &two.apac, KEY));
    two.write(&[emea.clone(), apac.clone()]);
    two.emea.fault(Fault::new(Effect::Latency { ms: 3000 }).on("POST", "/lead/").times(1));
    let worker = two.bench.worker().await;
    two.bench.publish(&[person("u1", "emea")]).await;
    worker.until("writing", async |_| two.emea.request_count("POST", "/lead/") == 1).await;
    let europe = emea.replace("[destinations.emea]", "[destinations.europe]");
    two.write(&[europe, apac]);
    worker.signal("HUP");
    worker.until("started", async |worker| state(worker, "europe").await == "standing_by").await;

    let log = worker.log();
    let line = |text: &str, name: &str| {
        let of = format!("\"destination\":\"{name}\"");
        log.lines().position(|line| line.contains(text) && line.contains(&of)).unwrap()
    };
    let lines = [
        line(r#""event":"destination_deferred""#, "europe"),
        line(r#""outcome":"created""#, "emea"),
        line(r#""event":"close_accepted""#, "europe"),
    ];
    assert!(lines.is_sorted(), "{lines:?} {log}");
    assert_eq!(worker.ready().await.0, 200);
    assert_eq!(state(&worker, "emea").await, Value::Null);
    two.bench.publish(&[person("u2", "emea")]).await;
    worker.until("synced", async |_| two.emea.contacts().len() == 2).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_on_a_queue_require_a_destination() {
    let two = Two::new().await;
    two.write(&[table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)]);
    let worker = two.bench.worker().await;
    two.bench.publish_bytes(b"nonsense", BasicProperties::default()).await;
    worker.settled(2).await;
    let refused = two.bench.run(&["dlq", "list"], b"").await;
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert!(
        refused.status.code() == Some(2) && stderr.contains("`--destination`; configured: apac, emea"),
        "{stderr}"
    );
    two.bench.output(&["dlq", "discard", "--all", "--yes", "--destination", "emea"]).await;
    for (name, remaining) in [("emea", 0), ("apac", 1)] {
        let listed = two.bench.output(&["--destination", name, "dlq", "list", "--json"]).await;
        assert_eq!(serde_json::from_str::<Value>(&listed).unwrap()["found"], remaining);
    }
    let checked = two.bench.output(&["check"]).await;
    for line in ["emea: RabbitMQ at", "emea: Close at", "apac: RabbitMQ at", "apac: Close at"] {
        assert!(checked.contains(line), "{line}: {checked}");
    }
    let unknown = two.bench.run(&["run", "--destination", "emae"], b"").await;
    let stderr = String::from_utf8(unknown.stderr).unwrap();
    assert!(unknown.status.code() == Some(2) && stderr.contains("configured: apac, emea"), "{stderr}");
    worker.terminate().await;
}

/// Its queue is replaced by one of another type. The metrics show the conflict, and no values from before.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_destination_leaves_no_stale_metrics() {
    let two = Two::new().await;
    two.write(&[table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)]);
    let worker = two.bench.worker().await;
    let queue = format!("{}-emea", two.bench.queue);
    worker.until("consuming", async |_| two.bench.try_depth("-emea").await.is_ok()).await;
    // The worker may declare the queue again first.
    worker
        .until("replaced", async |_| {
            let channel = two.bench.try_channel().await.unwrap();
            let name = queue.as_str();
            channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.unwrap();
            let other =
                channel.queue_declare(name.into(), QueueDeclareOptions::default(), FieldTable::default());
            other.await.is_ok()
        })
        .await;
    worker.until("failed", async |worker| state(worker, "emea").await == "failed").await;
    let metrics = worker.metrics().await;
    for (name, value) in [
        ("broker_connected{destination=\"emea\"}", 0),
        ("broker_connected{destination=\"apac\"}", 1),
        ("broker_trouble{cause=\"conflict\",destination=\"emea\"}", 1),
        ("broker_trouble{cause=\"cancelled\",destination=\"emea\"}", 0),
    ] {
        assert_eq!(metrics.count(name), value, "{name}");
    }
    assert!(metrics.get("backlog_messages{destination=\"emea\"}").is_nan());
    worker.terminate().await;
}

/// While rate limits delay the preflight check, `/readyz` shows what the destination waits for.
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limited_preflight_check_is_reported() {
    let two = Two::new().await;
    two.write(&[table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)]);
    let limited = Effect::RateLimited { retry_after: 600.0, with_headers: true };
    two.emea.fault(Fault::new(limited).on("GET", "/me/"));
    let worker = two.bench.starting_worker();
    worker.until("ready", async |worker| state(worker, "apac").await == "standing_by").await;
    let report = worker.ready().await.1["destinations"]["emea"].clone();
    assert_eq!(report["state"], "connecting");
    assert!(report["detail"].to_string().contains("as soon as its rate limits allow"), "{report}");
    worker.terminate().await;
}

/// A failed destination stops alone. The program exits when the last one has failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_destination_does_not_stop_the_others() {
    let two = Two::new().await;
    two.write(&[table("emea", &two.emea, "api_wrong.key"), table("apac", &two.apac, KEY)]);
    let worker = two.bench.starting_worker();
    worker.until("failed", async |worker| state(worker, "emea").await == "failed").await;
    two.bench.publish(&[person("u1", "apac")]).await;
    worker.settled(1).await;
    assert_eq!(two.apac.contacts().len(), 1);
    let (status, report) = worker.ready().await;
    assert!(
        status == 503 && report["destinations"]["emea"]["detail"].to_string().contains("API key"),
        "{report}"
    );
    // A removed destination no longer counts for readiness.
    two.write(&[table("apac", &two.apac, KEY)]);
    worker.signal("HUP");
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    assert!(worker.metrics().await.names().all(|name| !name.contains("destination=\"emea\"")));
    // Added again, first with the wrong key, then with the right one.
    two.write(&[table("emea", &two.emea, "api_wrong.key"), table("apac", &two.apac, KEY)]);
    worker.signal("HUP");
    worker.until("failed", async |worker| state(worker, "emea").await == "failed").await;
    two.write(&[table("emea", &two.emea, KEY), table("apac", &two.apac, KEY)]);
    worker.signal("HUP");
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    worker.terminate().await;

    two.write(&[table("emea", &two.emea, "api_wrong.key"), table("apac", &two.apac, "api_wrong.key")]);
    let worker = two.bench.starting_worker();
    assert_eq!(worker.ended().await.code(), Some(78));
    worker.until("error logged", async |worker| worker.logged("error:") == 1).await;
    let log = worker.log();
    for name in ["apac", "emea"] {
        assert!(log.contains(&format!("destination `{name}`: Close does not accept the API key")), "{log}");
    }
}
