//! Something other than Close answers the calls, and there are too few messages for the circuit breaker. No message pays for
//! it (design.md P5).

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use serde_json::json;

use crate::support::{Bench, Metrics, identify};

/// The page of a proxy, for the writes of new Leads.
fn blocked() -> Fault {
    let effect = Effect::Status { code: 403, body: FaultBody::Html, when: When::BeforeCommit };
    Fault::new(effect).on("POST", "/lead/")
}

fn delayed(metrics: &Metrics, cause: &str) -> u32 {
    metrics.count(&format!("messages_delayed_total{{cause=\"{cause}\"}}"))
}

/// A proxy blocks all writes for longer than all attempts take.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_in_the_way_costs_no_message_however_long_it_lasts() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s").set("HTTP_PAGE", "true");
    bench.simulator.fault(blocked());
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({})), identify("u2", json!({}))]).await;
    // Each has three attempts, so without them both would be dead letters by now.
    worker.until("delayed", async |worker| delayed(&worker.metrics().await, "not_close") >= 7).await;
    bench.simulator.clear_faults();
    worker.until("created", async |worker| worker.metrics().await.outcome("created") == 2).await;
    let metrics = worker.metrics().await;
    assert_eq!((metrics.outcome("dead"), delayed(&metrics, "failed")), (0, 0));
    assert!(worker.events("message_delayed") >= 7);
    let (_, page) = worker.page("/page/-").await.unwrap();
    assert!(page.contains(r#"<th scope="row">not close</th>"#), "{page}");
    assert_eq!(worker.logged("\"cause\":\"not_close\""), worker.events("message_delayed"));
    worker.terminate().await;
    assert_eq!((bench.simulator.leads().len(), bench.depth(".dead").await), (2, 0));
}

/// A firewall blocks the text of one producer. The messages of others go on, and this one ends with its reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_a_firewall_blocks_ends_after_its_age_and_stops_no_other() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s").set("RETRY_MAX_AGE", "1s");
    bench.simulator.fault(blocked().containing("drop table"));
    let worker = bench.worker().await;
    let name = |n: usize| if n == 0 { "drop table".to_owned() } else { format!("Person {n}") };
    let events = (0..30).map(|n| identify(&format!("u{n}"), json!({"name": name(n)})));
    bench.publish(&events.collect::<Vec<_>>()).await;
    worker.until("dead", async |worker| worker.metrics().await.outcome("dead") == 1).await;
    let metrics = worker.metrics().await;
    assert_eq!((metrics.outcome("created"), worker.events("pause_began")), (29, 0));
    assert!(delayed(&metrics, "not_close") >= 1);
    assert_eq!(delayed(&metrics, "failed"), 2, "past its age it uses its attempts");
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "exhausted");
    assert_eq!(headers["x-close-sync-attempt"], "3");
    assert!(headers["x-close-sync-error"].contains("(403, HTML)"), "{headers:?}");
    worker.terminate().await;
}
