//! Each class of failure (design.md §6): what becomes of the message, and that nothing is doubled.

use std::time::{Duration, Instant};

use close_sync::simulator::{Effect, Fault, FaultBody, Limits, Rate, Settings, When};
use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::support::{Bench, identify};

fn status(code: u16, when: When) -> Effect {
    Effect::Status { code, body: FaultBody::default(), when }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_succeed_is_dead_lettered_untouched_with_its_story() {
    let bench = Bench::new().await;
    let bodies: [(&[u8], &str, &str); 4] = [
        (b"{\"traits\": \xff", "malformed", "malformed:decode:-"),
        (b" [1,  2] ", "malformed", "malformed:decode:-"),
        (b"{\"type\":\"identify\",\"traits\":{\"email\":\"nobody\"}}", "no_identity", "no_identity:map:-"),
        (
            b"{\"userId\":\"u1\",  \"traits\":{\"company\":{\"id\":\"refused\"}}}",
            "rejected",
            "rejected:write:custom.cf_leadcompanyid",
        ),
    ];
    let refusal =
        json!({"errors": [], "field-errors": {"custom.cf_leadcompanyid": "Not a valid choice. refused"}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing("refused"));

    let worker = bench.worker().await;
    for (body, ..) in bodies {
        let properties =
            BasicProperties::default().with_message_id("m-1".into()).with_type("identify".into());
        bench.publish_bytes(body, properties).await;
    }
    let metrics = worker.settled(bodies.len()).await;
    assert_eq!(metrics.outcomes(), [("dead", 4)].into());
    for (body, reason, fingerprint) in bodies {
        let (taken, headers, properties) = bench.take_dead_letter().await;
        assert_eq!(taken, body, "byte for byte");
        assert_eq!(headers["x-close-sync-reason"], reason);
        assert_eq!(headers["x-close-sync-fingerprint"], fingerprint);
        assert_eq!(headers["x-close-sync-exchange"], bench.exchange);
        assert_eq!(headers["x-close-sync-routing-key"], "users");
        assert_eq!(headers["x-close-sync-attempt"], "1");
        for time in ["x-close-sync-first-seen", "x-close-sync-failed-at"] {
            headers[time].parse::<jiff::Timestamp>().unwrap();
        }
        assert!(!headers["x-close-sync-error"].contains("nobody"), "{headers:?}");
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), "m-1");
        assert!(metrics.get(&format!("dead_letters_total{{reason=\"{reason}\"}}")) > 0.0);
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_optional_value_does_not_cost_the_rest() {
    let bench =
        Bench::new().await.set("MAPPING_LEAD_CUSTOM", "{ cf_leadplan = { from = [\"$.traits.plan\"] } }");
    let event = |plan: &str, name: &str| {
        identify("u1", json!({"plan": plan, "name": name, "phone": "n/a", "company": {"id": "acme"}}))
    };
    let metrics = bench.sync(&[event("platinum", "First"), event("gold", "Second")]).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("updated", 1)].into());
    assert_eq!(metrics.count("fields_dropped_total{reason=\"refused_by_close\"}"), 2);
    assert_eq!(metrics.count("fields_dropped_total{reason=\"invalid_phone\"}"), 2);
    let lead = bench.the_lead();
    assert_eq!((&lead["contacts"][0]["name"], &lead["custom.cf_leadplan"]), (&json!("Second"), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_wait_for_the_budget_and_a_429_costs_no_attempt() {
    let limits = Limits { search: Rate::new(4, 1), ..Limits::unlimited() };
    let bench = Bench::with(Settings { limits, ..Settings::fast() }).await.set("RETRY_IN_PLACE", "0s");
    let events: Vec<_> = (0..12).map(|n| identify(&format!("u{n}"), json!({}))).collect();
    // A hidden limit besides: 429 while the headers say that there is budget (close-api.md §2).
    let hidden = Effect::RateLimited { retry_after: 1.0, with_headers: false };
    bench.simulator.fault(Fault::new(hidden).on("POST", "/lead/").times(2));
    let metrics = bench.sync(&events).await;
    assert_eq!(metrics.outcomes(), [("created", 12)].into());
    assert!(metrics.get("gate_wait_seconds_sum{endpoint=\"search\"}") > 1.0);
    let refused = metrics.get("close_requests_total{endpoint=\"search\",status=\"rate_limited\"}");
    assert!(refused <= 12.0, "only the first calls, before anything is known, may be refused: {refused}");
    assert_eq!(bench.simulator.leads().len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_fault_is_retried_in_place() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "20s");
    bench.simulator.fault(Fault::new(status(503, When::BeforeCommit)).on("POST", "/lead/").times(2));
    bench.simulator.fault(Fault::new(status(502, When::BeforeCommit)).on("POST", "/data/").times(1));
    let metrics = bench.sync(&[identify("u1", json!({"name": "Jane"}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!(metrics.count("retries_total{stage=\"write\"}"), 2);
    assert_eq!(metrics.count("retries_total{stage=\"look_up\"}"), 1);
    bench.the_lead();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_longer_fault_goes_through_the_delay_queues_and_then_to_the_dead_letters() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "300ms");
    bench.simulator.fault(Fault::new(status(500, When::BeforeCommit)).on("POST", "/data/").containing("u1"));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({})), identify("u2", json!({}))]).await;
    // Two delays, then the dead letter; the other message is not held up.
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("delayed", 2), ("dead", 1)].into());
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "exhausted");
    assert_eq!(headers["x-close-sync-attempt"], "3");
    assert_eq!(headers["x-close-sync-routing-key"], "users", "not the key of the way back");
    assert_eq!(headers["x-close-sync-error"], "Close answered 500");
    worker.terminate().await;
}

/// The answer to a creation is lost in every way it can be: never are there two.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_doubles_nothing() {
    let lost: [(&str, Effect); 4] = [
        ("connection", Effect::DropConnection { when: When::AfterCommit }),
        ("time-out", Effect::Timeout { ms: 3000, when: When::AfterCommit }),
        ("502", status(502, When::AfterCommit)),
        ("500 before", status(500, When::BeforeCommit)),
    ];
    for (name, effect) in lost {
        let settings = Settings { search_lag: "500ms".parse().unwrap(), ..Settings::fast() };
        let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "1s").set("CLOSE_TIMEOUT", "500ms");
        let bench = bench.set("RETRY_IN_PLACE", "30s");
        bench.lead(Some("there"), json!([]));
        bench.simulator.fault(Fault::new(effect.clone()).on("POST", "/lead/").times(1));
        bench.simulator.fault(Fault::new(effect).on("POST", "/contact/").times(1));
        let events = [
            identify("u1", json!({"company": {"id": "new"}})),
            identify("u2", json!({"company": {"id": "there"}})),
        ];
        bench.sync(&events).await;
        let companies: Vec<_> =
            bench.simulator.leads().iter().map(|lead| lead["custom.cf_leadcompanyid"].clone()).collect();
        assert_eq!(companies, [json!("there"), json!("new")], "{name}");
        assert_eq!(bench.simulator.contacts().len(), 2, "{name}");
    }
}

/// The message whose creation was never answered is given up for now; the next one about the same
/// person must not make the record a second time.
#[tokio::test(flavor = "multi_thread")]
async fn the_doubt_about_a_lost_answer_outlives_its_message() {
    let settings = Settings { search_lag: "1s".parse().unwrap(), ..Settings::fast() };
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "2s").set("RETRY_IN_PLACE", "0s");
    let worker = bench.worker().await;
    // Past the guard of the start.
    bench.publish(&[identify("u0", json!({}))]).await;
    worker.settled(1).await;

    bench.simulator.fault(Fault::new(status(502, When::AfterCommit)).on("POST", "/lead/").times(1));
    bench.publish(&[identify("u1", json!({"title": "One"})), identify("u1", json!({"title": "Two"}))]).await;
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcome("delayed"), 1);
    assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (2, 2), "{}", worker.log());
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_pauses_and_costs_no_message_anything() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.settled(1).await;

    bench.simulator.set_api_key("another");
    bench.publish(&(2..7).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    worker.until("paused", async |worker| worker.ready().await.0 == 503).await;
    worker
        .until("paused for the key", async |worker| {
            worker.ready().await.1 == json!({"ready": false, "state": "paused", "cause": "unauthorized"})
        })
        .await;
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
    worker
        .until("paused", async |worker| {
            worker.ready().await.1 == json!({"ready": false, "state": "paused", "cause": "unreachable"})
        })
        .await;
    bench.depth_becomes("", 1).await;
    assert_eq!((bench.depth(".dead").await, bench.depth(".retry.200ms").await), (0, 0));
    // Even while it is paused it stops at once.
    let asked = Instant::now();
    worker.terminate().await;
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_personal_is_logged_or_counted() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "20s");
    bench.simulator.fault(Fault::new(status(500, When::AfterCommit)).on("PUT", "/contact/"));
    let refusal = json!({"error": "Secretname has an invalid phone +4930555123"});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing("refused"));
    let worker = bench.worker().await;
    let traits = |title: &str| json!({"email": "secret@name.test", "name": "Secretname", "phone": "+4930555123", "title": title});
    bench
        .publish(&[
            identify("u1", traits("one")),
            identify("u1", traits("two")),
            identify("u2", traits("refused")),
        ])
        .await;
    bench
        .publish_bytes(
            b"{\"name\": \"Secretname\", \"email\": \"secret@name.test\"",
            BasicProperties::default(),
        )
        .await;
    // Created; written although Close said 500, and found so; refused; malformed.
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("unchanged", 1), ("dead", 2)].into());
    let page = worker.page("/metrics").await.unwrap().1;
    worker.terminate().await;
    for secret in ["Secretname", "secret@name.test", "30555123", "api_simulator"] {
        assert!(!page.contains(secret) && !worker.log().contains(secret), "{secret}:\n{}", worker.log());
    }
}
