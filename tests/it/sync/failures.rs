//! Each class of failure (design.md §6): the outcome of the message, without duplicates in Close.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use close_sync::close::{Client, Endpoint};
use close_sync::config::{Config, Need};
use close_sync::consumer::quarantine::Quarantine;
use close_sync::consumer::scheduler::delayed::DelayedMessages;
use close_sync::consumer::{End, Session};
use close_sync::sync::{Dependencies, Worker, preflight};
use close_sync::telemetry::metrics::Metrics;
use close_sync::telemetry::status::Status;
use close_sync_simulator::{Effect, Fault, FaultBody, Limits, Rate, Settings, When};
use lapin::BasicProperties;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{Bench, identify};

fn status(code: u16, when: When) -> Effect {
    Effect::Status { code, body: FaultBody::default(), when }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_succeed_is_dead_lettered_unchanged_with_its_history() {
    let bench = Bench::new().await;
    let long_id = format!(r#"{{"userId":"{}","traits":{{}}}}"#, "u".repeat(256));
    let many_values = format!(r#"{{"userId":"u","traits":{{"title":[{}0]}}}}"#, r#"{"":0},"#.repeat(100_000));
    let bodies: [(&[u8], &str, &str); 6] = [
        (long_id.as_bytes(), "no_identity", "no_identity:map:-"),
        (many_values.as_bytes(), "malformed", "malformed:decode:too_many_values"),
        (b"{\"traits\": \xff", "malformed", "malformed:decode:not_json"),
        (b" [1,  2] ", "malformed", "malformed:decode:not_an_object"),
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
    assert_eq!(metrics.outcomes(), [("dead", 6)].into());
    // They are processed concurrently, so they come in any order.
    let mut taken = Vec::new();
    for _ in bodies {
        taken.push(bench.take_dead_letter().await);
    }
    for (body, reason, fingerprint) in bodies {
        let (_, headers, properties) =
            taken.iter().find(|(taken, ..)| taken == body).expect("the body, byte for byte");
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

/// An error of Close goes into headers of the dead letter, which the broker refuses above a size.
#[tokio::test(flavor = "multi_thread")]
async fn a_huge_error_of_close_becomes_a_dead_letter_with_short_headers() {
    let key = "\u{1b}[2J\r\nx: \u{202e}".repeat(20);
    let fields: serde_json::Map<_, _> =
        (0..2000).map(|number| (format!("{key}{number}"), json!("Invalid URL."))).collect();
    let refusal = json!({"errors": [key.repeat(500)], "field-errors": fields});
    assert!(refusal.to_string().len() > 128 << 10);
    let bench = Bench::new().await;
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing("refused"));
    let worker = bench.worker().await;
    let company = |id: &str| json!({"company": {"id": id}});
    bench.publish(&[identify("u1", company("refused")), identify("u2", company("acme"))]).await;
    let metrics = worker.settled(2).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("dead", 1)].into());
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "rejected");
    for (name, value) in &headers {
        assert!(value.len() <= 4096 && !value.contains(char::is_control), "{name}: {value:?}");
        assert!(!value.contains('\u{202e}'), "{name}: {value:?}");
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_optional_value_is_left_out_and_the_others_are_written() {
    let bench =
        Bench::new().await.set("MAPPING_LEAD_CUSTOM", "{ cf_leadplan = { from = [\"$.traits.plan\"] } }");
    let bench = bench.set("WORKER_MERGE", "false");
    let event = |plan: &str, name: &str| {
        identify("u1", json!({"plan": plan, "name": name, "phone": "n/a", "company": {"id": "acme"}}))
    };
    // A choice that was removed after the worker read the fields.
    let body = json!({"errors": [], "field-errors": {"custom.cf_leadplan": "Not a valid choice."}});
    let refusal = Effect::Status { code: 400, body: FaultBody::Exactly(body), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(refusal).on("POST", "/lead/").times(1));
    let metrics = bench.sync(&[event("pro", "First"), event("gold", "Second")]).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("updated", 1)].into());
    assert_eq!(metrics.count("fields_dropped_total{reason=\"refused_by_close\"}"), 1);
    assert_eq!(metrics.count("fields_dropped_total{reason=\"not_a_choice\"}"), 1);
    assert_eq!(metrics.count("fields_dropped_total{reason=\"invalid_phone\"}"), 2);
    let lead = bench.the_lead();
    assert_eq!((&lead["contacts"][0]["name"], &lead["custom.cf_leadplan"]), (&json!("Second"), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_wait_for_rate_budget_and_a_429_uses_no_attempt() {
    let limits = Limits { lead: Rate::new(5, 1), search: Rate::new(5, 1), ..Limits::unlimited() };
    let bench = Bench::with(Settings { limits, ..Settings::fast() }).await.set("RETRY_IN_PLACE", "0s");
    let events: Vec<_> = (0..12).map(|n| identify(&format!("u{n}"), json!({}))).collect();
    // A hidden limit: Close answers 429 although the headers show budget (close-api.md §2).
    let hidden = Effect::RateLimited { retry_after: 1.0, with_headers: false };
    bench.simulator.fault(Fault::new(hidden).on("POST", "/lead/").times(2));
    let metrics = bench.sync(&events).await;
    assert_eq!(metrics.outcomes(), [("created", 12)].into());
    assert!(metrics.get("gate_wait_seconds_sum{endpoint=\"create_lead\"}") > 1.0);
    let refused = |endpoint| {
        metrics.count(&format!("close_requests_total{{endpoint=\"{endpoint}\",status=\"rate_limited\"}}"))
    };
    assert_eq!((refused("create_lead"), refused("search")), (2, 0), "only the hidden limit struck");
    assert_eq!(bench.simulator.leads().len(), 12);
    let searches = bench.simulator.request_count("POST", "/data/search/");
    assert!(searches < 12, "{searches} searches for 12 look-ups that came together");
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
    // Two delays, then the dead letter. The other message does not wait.
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("delayed", 2), ("dead", 1)].into());
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "exhausted");
    assert_eq!(headers["x-close-sync-attempt"], "3");
    assert_eq!(headers["x-close-sync-routing-key"], "users", "not the routing key of the retry exchange");
    assert_eq!(headers["x-close-sync-error"], "Close answered 500; attempts: 3, in 0 minutes");
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_a_write_does_not_find_is_looked_up_again() {
    for times in [1, 2] {
        let bench = Bench::new().await.set("RETRY_IN_PLACE", "10s");
        bench.lead(None, json!([{"name": "Jane", "custom.cf_contactuserid": "u1"}]));
        let body = json!({"error": "Empty query: Contact matching query does not exist."});
        let gone = Effect::Status { code: 404, body: FaultBody::Exactly(body), when: When::BeforeCommit };
        bench.simulator.fault(Fault::new(gone).on("PUT", "/contact/").times(times));
        let metrics = bench.sync(&[identify("u1", json!({"title": "CEO"}))]).await;
        assert_eq!(metrics.outcomes(), [("updated", 1)].into());
    }
}

/// Search still lists a deleted Contact. The worker does not write to it, and creates the person again.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_contact_in_search_is_not_used() {
    let bench = Bench::with(Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap())).await;
    let lead = bench.lead(None, json!([{"name": "Gone", "custom.cf_contactuserid": "u1"}]));
    assert!(bench.simulator.delete(lead["id"].as_str().unwrap()));
    let metrics = bench.sync(&[identify("u1", json!({"name": "Anew"}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!(bench.the_lead()["name"], "Anew");
}

/// A message is held for a limited time while it waits for rate budget, and the wait uses no attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_wait_for_budget_continues_in_a_delay_queue_and_uses_no_attempt() {
    let bench = Bench::new().await.set("WORKER_HOLD", "1s").set("RETRY_IN_PLACE", "500ms");
    let hidden = Effect::RateLimited { retry_after: 4.0, with_headers: false };
    bench.simulator.fault(Fault::new(hidden).on("POST", "/data/").times(1));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({}))]).await;
    worker.until("created", async |worker| worker.metrics().await.outcome("created") == 1).await;
    let metrics = worker.metrics().await;
    let delayed = metrics.count("messages_delayed_total{cause=\"rate_limited\"}");
    assert!(delayed >= 2 && delayed == metrics.outcome("delayed"), "{}", worker.log());
    assert_eq!(worker.logged("\"attempt\":2"), 0, "{}", worker.log());
    worker.terminate().await;
}

/// A panic in the callback that observes calls. Only the message of that call is dead-lettered.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_dead_letters_one_message_and_the_worker_continues() {
    let bench = Bench::new().await;
    let config = Config::load(None, &bench.environment(), Need::All).unwrap().single().unwrap();
    let metrics = Metrics::new(None).unwrap();
    let panics = AtomicBool::new(true);
    let client = Client::new(config.close, move |call| {
        let hit = call.endpoint == Endpoint::CreateLead && panics.swap(false, Ordering::Relaxed);
        assert!(!hit, "Secretname");
    });
    let client = client.unwrap();
    let mapping = preflight::run(&client, &config.rules).await.unwrap().mapping;
    let session = Session {
        destination: None,
        settings: Arc::new(config.amqp),
        worker: Worker::new(Dependencies {
            settings: config.worker,
            rules: &config.rules,
            mapping,
            client,
            metrics: metrics.clone(),
        }),
        metrics: metrics.clone(),
        status: Status::default(),
        concurrency: 1,
        grace: config.grace,
        quarantine: Quarantine::default(),
        paused_before: None,
    };
    let shutdown = CancellationToken::new();
    let running = tokio::spawn({
        let (session, shutdown) = (session.clone(), shutdown.clone());
        async move { session.run(&mut DelayedMessages::default(), &shutdown).await }
    });
    while session.status.readiness().state != "standing_by" {
        tokio::task::yield_now().await;
    }
    bench.publish(&[identify("u1", json!({})), identify("u2", json!({}))]).await;
    while bench.simulator.contacts().len() < 2 || bench.depth(".dead").await < 1 {
        tokio::task::yield_now().await;
    }
    shutdown.cancel();
    let (end, report) = running.await.unwrap();
    assert!(matches!(end, End::Stopped) && report.settled == 2, "{end:?} {report:?}");
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "internal");
    assert!(
        headers["x-close-sync-error"].contains("panicked at")
            && !headers["x-close-sync-error"].contains("Secret")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_personal_data_in_logs_and_metrics() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "20s").set("WORKER_MERGE", "false");
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
            identify("refused", traits("three")),
        ])
        .await;
    bench
        .publish_bytes(
            b"{\"name\": \"Secretname\", \"email\": \"secret@name.test\"",
            BasicProperties::default(),
        )
        .await;
    // Created; created with a 500 and then found; rejected; malformed.
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("unchanged", 1), ("dead", 2)].into());
    let page = worker.page("/metrics").await.unwrap().1;
    worker.terminate().await;
    for secret in ["Secretname", "secret@name.test", "30555123", "api_simulator"] {
        assert!(!page.contains(secret) && !worker.log().contains(secret), "{secret}:\n{}", worker.log());
    }
}
