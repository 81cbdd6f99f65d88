//! Faults that are not a message's: consumption pauses, and no message pays for it (design.md P5).

use std::time::{Duration, Instant};

use close_sync::simulator::{Effect, Fault, FaultBody, When};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify};

fn status(code: u16) -> Effect {
    Effect::Status { code, body: FaultBody::Text, when: When::BeforeCommit }
}

async fn paused(worker: &Worker, cause: &str) {
    let expected = json!({"ready": false, "state": "paused", "cause": cause});
    worker.until(&format!("paused: {cause}"), async |worker| worker.ready().await.1 == expected).await;
}

/// What Close does to every message, why that pauses, and that all messages are synced once it stops.
#[tokio::test(flavor = "multi_thread")]
async fn trouble_that_hits_every_message_costs_none_anything() {
    let no_fields =
        |code, body: Value| Effect::Status { code, body: FaultBody::Exactly(body), when: When::BeforeCommit };
    let gone = json!({"errors": [], "field-errors": {"custom.cf_leadcompanyid": "The Custom Field \"x\" does not exist."}});
    let anywhere = |effect| vec![Fault::new(effect)];
    let cases: [(&str, Vec<Fault>, &str); 7] = [
        ("plan limit", vec![Fault::new(status(402)).on("POST", "/lead/")], "plan_limit"),
        ("key forbidden", anywhere(status(403)), "forbidden"),
        ("search forbidden", vec![Fault::new(status(403)).on("POST", "/data/")], "forbidden"),
        ("nothing there", anywhere(status(404)), "unreachable"),
        ("down", anywhere(status(503)), "unreachable"),
        (
            "field gone",
            vec![
                Fault::new(no_fields(400, gone)).on("POST", "/lead/"),
                Fault::new(no_fields(200, json!({"fields": []}))).on("GET", "/custom_field_schema/lead/"),
            ],
            "lookup_field",
        ),
        (
            "field retyped",
            vec![
                Fault::new(no_fields(400, json!({"error": "bad query"}))).on("POST", "/data/"),
                Fault::new(no_fields(
                    200,
                    json!({"fields": [{"id": "cf_leadcompanyid", "name": "Company ID", "type": "number"}]}),
                ))
                .on("GET", "/custom_field_schema/lead/"),
            ],
            "lookup_field",
        ),
    ];
    for (name, faults, cause) in cases {
        let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms");
        let worker = bench.worker().await;
        for fault in faults {
            bench.simulator.fault(fault);
        }
        let events = (0..5).map(|n| identify(&format!("u{n}"), json!({"company": {"id": format!("c{n}")}})));
        bench.publish(&events.collect::<Vec<_>>()).await;
        paused(&worker, cause).await;
        assert_eq!(worker.metrics().await.count(&format!("paused{{cause=\"{cause}\"}}")), 1, "{name}");
        bench.simulator.clear_faults();
        let metrics = worker.settled(5).await;
        assert_eq!(metrics.outcomes().get("created"), Some(&5), "{name}: {metrics:?}");
        assert_eq!((metrics.outcome("dead"), metrics.outcome("delayed")), (0, 0), "{name}");
        assert_eq!(bench.simulator.leads().len(), 5, "{name}");
        worker.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_pauses_and_costs_no_message_anything() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;

    bench.simulator.set_api_key("another");
    bench.publish(&(2..7).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    paused(&worker, "unauthorized").await;
    assert_eq!(worker.metrics().await.count("paused{cause=\"unauthorized\"}"), 1);
    bench.depth_becomes("", 5).await;
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    assert_eq!(worker.logged("\"ERROR\""), 1, "one signal per incident");

    bench.simulator.set_api_key("api_simulator.key");
    let metrics = worker.settled(6).await;
    assert_eq!(metrics.outcome("created"), 6);
    assert_eq!(metrics.count("paused{cause=\"unauthorized\"}"), 0);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_close_pauses_too() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms");
    let worker = bench.worker().await;
    bench.simulator.stop().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    paused(&worker, "unreachable").await;
    bench.depth_becomes("", 1).await;
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    // Even while it is paused it stops at once.
    let asked = Instant::now();
    worker.terminate().await;
    assert!(asked.elapsed() < Duration::from_secs(5));
}
