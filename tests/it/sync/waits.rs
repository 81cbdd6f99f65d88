//! A message that is held for `worker.hold` goes to a delay queue with what it waited for, until it is too old.

use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use serde_json::json;

use crate::support::{Bench, Metrics, identify};

fn delayed(metrics: &Metrics, cause: &str) -> u32 {
    metrics.count(&format!("messages_delayed_total{{cause=\"{cause}\"}}"))
}

fn status(code: u16, when: When) -> Effect {
    Effect::Status { code, body: FaultBody::default(), when }
}

/// The answer to a creation was lost. Neither search nor the event log shows whether it happened.
async fn in_doubt() -> Bench {
    let settings = Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap());
    let bench = Bench::with(settings).await.set("WORKER_HOLD", "1s").set("RETRY_IN_PLACE", "900ms");
    bench.simulator.fault(Fault::new(status(502, When::AfterCommit)).on("POST", "/lead/").times(1));
    bench.simulator.fault(Fault::new(status(500, When::BeforeCommit)).on("GET", "/event/"));
    bench
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_waits_for_search_goes_to_a_delay_queue_and_uses_no_attempt() {
    let bench = in_doubt().await.set("HTTP_PAGE", "true");
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({"name": "Jane", "company": {"id": "acme"}}))]).await;
    // More often than it has attempts.
    worker.until("delayed", async |worker| delayed(&worker.metrics().await, "search") >= 4).await;
    let (_, page) = worker.page("/page/-").await.unwrap();
    assert!(page.contains(r#"<th scope="row">search</th>"#), "{page}");
    bench.simulator.index_now();
    worker.until("unchanged", async |worker| worker.metrics().await.outcome("unchanged") == 1).await;
    let metrics = worker.metrics().await;
    assert_eq!(metrics.outcome("dead"), 0);
    assert_eq!(delayed(&metrics, "search"), metrics.outcome("delayed"));
    assert_eq!(worker.logged("\"cause\":\"search\""), worker.events("message_delayed"));
    assert_eq!(worker.logged("\"attempt\":2"), 0, "{}", worker.log());
    worker.terminate().await;
    bench.the_lead();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_waits_is_dead_lettered_with_the_cause_when_it_is_too_old() {
    let bench = in_doubt().await.set("RETRY_MAX_AGE", "2s");
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({"name": "Jane", "company": {"id": "acme"}}))]).await;
    worker.until("dead", async |worker| worker.metrics().await.outcome("dead") == 1).await;
    assert!(delayed(&worker.metrics().await, "search") >= 1);
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "exhausted");
    assert_eq!(headers["x-close-sync-stage"], "look_up");
    assert_eq!(headers["x-close-sync-attempt"], "1", "waits use no attempt");
    assert!(headers["x-close-sync-error"].contains("search"), "{headers:?}");
    worker.terminate().await;
    assert_eq!(bench.simulator.leads().len(), 1);
}
