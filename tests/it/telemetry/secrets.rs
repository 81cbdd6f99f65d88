//! Secrets and personal data stay out of the log, whatever `RUST_LOG` says.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use lapin::BasicProperties;
use serde_json::json;

use crate::support::{Bench, Node, identify};

const PASSWORD: &str = "hunter2-of-the-broker";
const API_KEY: &str = "api_simulator.key";
/// In bodies: an email, a name, and bytes that are not JSON.
const PERSONAL: [&str; 3] = ["ada.lovelace@private.test", "Ada Lovelace-Byron", "grace.hopper@private.test"];

/// The forms in which a program may print a text by mistake.
fn forms(text: &str) -> Vec<String> {
    let bytes = text.as_bytes();
    let list =
        |separator: &str, show: fn(&u8) -> String| bytes.iter().map(show).collect::<Vec<_>>().join(separator);
    vec![
        text.to_owned(),
        list(", ", ToString::to_string),
        list(",", ToString::to_string),
        list("", |byte| format!("{byte:02x}")),
        list(", ", |byte| format!("{byte:02x}")),
        list(" ", |byte| format!("{byte:02x}")),
        STANDARD.encode(text).trim_end_matches('=').to_owned(),
        STANDARD.encode(format!("{text}:")).trim_end_matches('=').to_owned(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_level_of_the_log_shows_secrets_or_bodies() {
    let node = Node::start().await;
    node.ctl(&["add_user", "syncer", PASSWORD]).await;
    node.ctl(&["set_permissions", "syncer", ".*", ".*", ".*"]).await;
    let url = node.url.replace("guest:guest", &format!("syncer:{PASSWORD}"));
    for format in ["json", "text"] {
        let bench = Bench::on(&node.url, Settings::fast()).await;
        let bench = bench
            .set("AMQP_URL", &url)
            .set("LOG_FORMAT", format)
            .set("RUST_LOG", "trace,lapin=trace,hyper=trace,[x]=trace");
        let unauthorized = Effect::Status { code: 401, body: FaultBody::default(), when: When::BeforeCommit };
        bench.simulator.fault(Fault::new(unauthorized).on("POST", "/lead/").times(1));
        bench.refuse("grace");

        let worker = bench.starting_worker();
        worker.until("connected", async |worker| worker.logged("broker_connected") > 0).await;
        let [email, name, other] = PERSONAL;
        // Synced after a 401, which pauses the worker; rejected by Close; not JSON.
        bench.publish(&[identify("u1", json!({"email": email, "name": name}))]).await;
        worker.until("paused", async |worker| worker.logged("pause_began") > 0).await;
        bench.publish(&[identify("u2", json!({"email": other}))]).await;
        bench.publish_bytes(format!("{email} is not JSON").as_bytes(), BasicProperties::default()).await;
        bench.depth_becomes(".dead", 2).await;
        worker.until("synced", async |_| bench.simulator.contacts().len() == 1).await;
        worker.terminate().await;

        let log = worker.log();
        assert_eq!(worker.logged("log_level_limited"), 1, "{format}: once");
        assert!(worker.logged("DEBUG") > 0 && worker.logged("pause_began") > 0, "{format}: our own lines");
        assert!(worker.logged("dead_lettered") == 2, "{format}");
        let basic = STANDARD.encode(format!("{API_KEY}:"));
        let secrets = [PASSWORD, API_KEY, &basic].into_iter().chain(PERSONAL);
        for secret in secrets {
            for form in forms(secret) {
                let found = log.lines().find(|line| line.contains(&form));
                assert_eq!(found, None, "{format}: {secret} as {form}");
            }
        }
    }
}
