//! Order: messages that share a key do not overtake each other, waiting ones are merged, and older values are not
//! written.

use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use serde_json::{Value, json};

use crate::support::{Bench, identify, refusal, values};

fn at(second: u32, user: &str, traits: Value) -> Value {
    let mut event = identify(user, traits);
    event["timestamp"] = json!(format!("2026-01-01T00:00:{second:02}Z"));
    event
}

fn acme(user: &str) -> Value {
    identify(user, json!({"name": user, "company": {"id": "acme", "name": "Acme"}}))
}

fn broken(times: u32) -> Fault {
    Fault::new(Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit })
        .times(times)
}

/// Search shows the new company seconds later, and all fifty messages arrive at once.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_colleagues_of_a_new_company_share_one_lead() {
    let settings = Settings::fast().with(|close| close.search_lag = "10s".parse().unwrap());
    let bench = Bench::with(settings).await;
    let colleagues: Vec<_> = (0..50).map(|n| acme(&format!("u{n}"))).collect();
    let metrics = bench.sync(&colleagues).await;
    assert_eq!(metrics.outcomes(), [("added", 49), ("created", 1)].into());
    assert_eq!(bench.the_lead()["contacts"].as_array().unwrap().len(), 50);
}

/// Each event has other values. The last scalar values count, and no list entry is lost.
#[tokio::test(flavor = "multi_thread")]
async fn one_person_identified_a_hundred_times_is_one_contact() {
    for merge in ["true", "false"] {
        let settings = Settings::fast().with(|close| close.search_lag = "10s".parse().unwrap());
        let bench = Bench::with(settings).await.set("WORKER_MERGE", merge);
        // All of them wait when the first is done.
        bench.simulator.fault(Fault::new(Effect::Latency { ms: 2000 }).on("POST", "/lead/").times(1));
        let events: Vec<_> = (0..100)
            .map(|n| {
                let phone = format!("+49301234{}", 100 + n % 3);
                identify(
                    "u1",
                    json!({"title": format!("Title {n}"), "phone": phone, "company": {"id": "acme", "name": format!("Acme {n}")}}),
                )
            })
            .collect();
        let metrics = bench.sync(&events).await;
        let outcomes = [("created", 1), ("updated", 99)].into();
        assert_eq!(metrics.outcomes(), outcomes, "each has the outcome it would have had by itself");
        let lead = bench.the_lead();
        let contact = &lead["contacts"][0];
        assert_eq!((&lead["name"], &contact["title"]), (&json!("Acme 99"), &json!("Title 99")));
        assert_eq!(values(contact, "phones", "phone"), ["+49301234100", "+49301234101", "+49301234102"]);
        if merge == "true" {
            let merged = metrics.count("messages_merged_total");
            assert!(merged > 20, "{merged} merged");
            let writes = u32::try_from(bench.writes().len()).unwrap();
            assert_eq!(writes, 1 + 2 * (99 - merged), "a Lead and a Contact each time");
        } else {
            assert_eq!((metrics.count("messages_merged_total"), bench.writes().len()), (0, 1 + 2 * 99));
        }
    }
}

/// Close rejects the value of one of three messages. The others are written, and each message has its own outcome.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_failed_merged_write_run_one_by_one() {
    let bench = Bench::new().await;
    bench.lead(Some("acme"), json!([{"custom.cf_contactuserid": "u1"}]));
    let refuses = refusal();
    // The first waits for the search, so that the others are merged. Close rejects their first write.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 500 }).on("POST", "/data/").times(1));
    bench.simulator.fault(Fault::new(refuses).on("PUT", "/contact/").times(2));
    let title = |n: u32| identify("u1", json!({"title": format!("Title {n}"), "company": {"id": "acme"}}));
    let metrics = bench.sync(&[title(0), title(1), title(2), title(3)]).await;
    assert_eq!(metrics.outcomes(), [("dead", 1), ("updated", 3)].into());
    assert_eq!(bench.the_lead()["contacts"][0]["title"], json!("Title 3"));
    assert_eq!(bench.depth(".dead").await, 1);
}

/// The first message waits in delay queues. Messages that share a key with it, or with one that follows it, wait
/// behind it. Other messages do not wait.
#[tokio::test(flavor = "multi_thread")]
async fn messages_that_share_a_key_wait_behind_one_in_a_delay_queue() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "0s").set("RETRY_DELAYS", "[\"1s\", \"2s\"]");
    let worker = bench.worker().await;
    let jane = |n: u32| identify("jane", json!({"email": "jane@x.test", "title": format!("Title {n}")}));
    bench.publish(&[jane(0)]).await;
    worker.settled(1).await;

    bench.simulator.fault(broken(2).on("PUT", "/contact/"));
    let by_email = json!({"type": "identify", "traits": {"email": "jane@x.test", "title": "By email"}});
    let bob = identify("bob", json!({"email": "bob@x.test"}));
    bench.publish(&[jane(1), identify("jane", json!({"phone": "+49301234567"})), by_email, bob]).await;
    // Bob does not wait.
    worker.until("done with Bob", async |worker| worker.metrics().await.outcome("created") == 2).await;
    assert_eq!(bench.simulator.contacts()[0]["title"], json!("Title 0"));
    bench.publish(&[identify("jane", json!({"email": "jane@x.test", "title": "Last"}))]).await;

    worker
        .until("done with Jane", async |worker| {
            let metrics = worker.metrics().await;
            metrics.outcome("updated") + metrics.outcome("unchanged") == 4
        })
        .await;
    let metrics = worker.metrics().await;
    assert!(metrics.count("messages_yielded_total") >= 3, "{}", worker.log());
    assert_eq!(metrics.outcome("dead"), 0);
    let contact = &bench.simulator.contacts()[0];
    assert_eq!(contact["title"], json!("Last"), "{}", worker.log());
    assert_eq!(values(contact, "phones", "phone"), ["+49301234567"]);
    // No value was stale.
    assert_eq!(metrics.count("stale_values_total"), 0);
    worker.terminate().await;
}

/// A dead letter is replayed after newer events were applied, by this worker or by one before a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_dead_letter_does_not_overwrite_newer_values() {
    for restart in [false, true] {
        let bench = Bench::new().await;
        let bench = bench
            .set("CLOSE_CONTACT_SYNCED_AT_FIELD", "Synced at")
            .set("CLOSE_LEAD_SYNCED_AT_FIELD", "cf_leadsyncedat");
        let mut worker = bench.worker().await;
        let company = |name: &str| json!({"id": "acme", "name": name});
        let first = at(1, "u1", json!({"title": "First", "company": company("First")}));
        bench.publish(&[first]).await;
        worker.settled(1).await;

        let refuses = refusal();
        bench.simulator.fault(Fault::new(refuses).on("PUT", "/").times(1));
        let traits =
            json!({"title": "Old", "name": "Only here", "phone": "+49301234567", "company": company("Old")});
        bench.publish(&[at(2, "u1", traits)]).await;
        worker.settled(2).await;
        bench.depth_becomes(".dead", 1).await;
        let new = at(3, "u1", json!({"title": "New", "company": company("New")}));
        bench.publish(&[new]).await;
        worker.settled(3).await;
        if restart {
            worker.terminate().await;
            worker = bench.worker().await;
        }
        let before = worker.metrics().await.settled();

        bench.output(&["dlq", "replay", "--all"]).await;
        worker.until("replayed", async |worker| worker.metrics().await.settled() > before).await;
        let lead = bench.the_lead();
        let contact = &lead["contacts"][0];
        let values_now = (&lead["name"], &contact["title"], &contact["name"]);
        assert_eq!(values_now, (&json!("New"), &json!("New"), &json!("Only here")), "restart: {restart}");
        assert_eq!(values(contact, "phones", "phone"), ["+49301234567"]);
        assert_eq!(worker.metrics().await.count("stale_values_total"), 2);
        assert_eq!(contact["custom.cf_contactsyncedat"], json!("2026-01-01T00:00:03.000000+00:00"));
        worker.terminate().await;
    }
}

/// The worker does not know when the fields were written, because the event is older than its journal. A person may have
/// entered them.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_older_than_the_journal_changes_only_empty_fields() {
    let bench = Bench::new().await;
    let jane = json!([{"name": "Jane", "title": "New", "custom.cf_contactuserid": "u1"}]);
    bench.lead(Some("acme"), jane);
    let worker = bench.worker().await;
    bench.simulator.fault(Fault::new(refusal()).on("PUT", "/").times(1));
    let traits = json!({"title": "Old", "phone": "+49301234567", "company": {"id": "acme"}});
    let recent = identify("u2", json!({"company": {"id": "acme"}}));
    bench.publish(&[at(1, "u1", traits)]).await;
    bench.depth_becomes(".dead", 1).await;
    bench.simulator.fault(Fault::new(refusal()).on("POST", "/contact/").times(1));
    bench.publish(&[recent]).await;
    bench.depth_becomes(".dead", 2).await;

    for arguments in [&["--dry-run"][..], &[]] {
        let arguments = [&["dlq", "replay", "--all", "--json"], arguments].concat();
        let replay: Value = serde_json::from_str(&bench.output(&arguments).await).unwrap();
        assert_eq!(replay["guards"], json!({"last_change": 1, "field_times": 1}));
    }
    let lead = bench.the_lead();
    let contact = &lead["contacts"][0];
    assert_eq!(contact["title"], json!("New"));
    assert_eq!(values(contact, "phones", "phone"), ["+49301234567"]);
    assert_eq!(worker.metrics().await.count("stale_values_total"), 1);
    worker.terminate().await;
}

/// A wrong clock, an event without a time, and equal times from different sources.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_with_a_future_time_does_not_block_later_ones() {
    let bench = Bench::new().await;
    let titled = |title: &str, timestamp: Value| {
        let mut event = identify("u1", json!({"title": title}));
        event["timestamp"] = timestamp;
        event
    };
    let worker = bench.worker().await;
    for (n, (title, timestamp, holds)) in [
        ("From the future", json!("2199-01-01T00:00:00Z"), "From the future"),
        ("Without a time", Value::Null, "Without a time"),
        ("Long ago", json!("2001-01-01T00:00:00Z"), "Without a time"),
    ]
    .into_iter()
    .enumerate()
    {
        bench.publish(&[titled(title, timestamp)]).await;
        worker.settled(n + 1).await;
        assert_eq!(bench.simulator.contacts()[0]["title"], json!(holds));
    }
    worker.terminate().await;
}

/// The Lead is updated, Close rejects the Contact, and the message is dead-lettered. The values of the Lead stay.
#[tokio::test(flavor = "multi_thread")]
async fn the_written_part_of_a_failed_message_is_not_overwritten_by_an_older_one() {
    let bench = Bench::new().await;
    let company = |name: &str| json!({"id": "acme", "name": name});
    let worker = bench.worker().await;
    bench.publish(&[at(1, "u1", json!({"title": "First", "company": company("First")}))]).await;
    worker.settled(1).await;
    let refuses = refusal();
    bench.simulator.fault(Fault::new(refuses).on("PUT", "/contact/").times(1));
    bench.publish(&[at(3, "u1", json!({"title": "New", "company": company("New")}))]).await;
    worker.settled(2).await;
    bench.publish(&[at(2, "u1", json!({"title": "Old", "company": company("Old")}))]).await;
    let metrics = worker.settled(3).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("dead", 1), ("updated", 1)].into());
    let lead = bench.the_lead();
    assert_eq!((&lead["name"], &lead["contacts"][0]["title"]), (&json!("New"), &json!("Old")));
    worker.terminate().await;
}
