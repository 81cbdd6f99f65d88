//! What producers and Close send does not fill the memory of the worker. `tests/memory` measures single messages.

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use serde_json::json;

use crate::support::producer::{Producer, long, text};
use crate::support::{Bench, identify, people};

const MIB: usize = 1 << 20;

/// The most that a worker takes with ten events of 1 MiB, in KiB. One without any takes about 60 MiB.
const MAX_PEAK_OF_EVENTS: u64 = 160 * 1024;

/// The most that a worker takes while it reads a huge answer, in KiB.
const MAX_PEAK_OF_ANSWERS: u64 = 256 * 1024;

fn list(item: &str, bytes: usize) -> String {
    format!("[{item}{}]", format!(",{item}").repeat(bytes / (item.len() + 1) - 1))
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_large_events_of_any_shape_take_a_few_times_their_bytes() {
    let silent = || Fault::new(Effect::Timeout { ms: 600_000, when: When::BeforeCommit });
    let items = [r#"{"":0}"#, "[]", "{}", "0", "[0]", "null", "\"a\"", "[[[[[[]]]]]]"];
    for item in items {
        let bench = Bench::new().await.set("CLOSE_TIMEOUT", "3m").set("RUST_LOG", "info,lapin=off");
        let worker = bench.worker().await;
        // The lookups of all messages that are not dead letters hang.
        bench.simulator.fault(silent());
        for number in 0..10 {
            let value = list(item, MIB - 1024);
            let body = format!(
                r#"{{"type":"identify","userId":"u{number}","traits":{{"title":{value},"email":"a{number}@x.test"}}}}"#
            );
            bench.publish_bytes(body.as_bytes(), lapin::BasicProperties::default()).await;
        }
        worker
            .until("working on all", async |worker| {
                let metrics = worker.metrics().await;
                metrics.settled() + metrics.get("messages_in_flight") >= 10.0
            })
            .await;
        let peak = worker.peak_memory().unwrap();
        assert!(peak < MAX_PEAK_OF_EVENTS, "{item}: {peak} KiB");
        worker.kill().await;
    }
}

/// Of each message, the headers have 130,000 values of one byte, in one list, in tables, or in both.
#[tokio::test(flavor = "multi_thread")]
async fn headers_of_many_small_values_take_a_few_times_their_bytes() {
    let item = |kind: u8| move |value: &[u8]| [&[kind], value].concat();
    let lists = [
        item(b'A')(&long(&b"V".repeat(130_000))),
        item(b'A')(&long(&item(b'F')(&long(&[])).repeat(26_000))),
        item(b'F')(&long(
            &(0..26_000_u16).flat_map(|n| [&[2], &n.to_be_bytes()[..], b"V"].concat()).collect::<Vec<_>>(),
        )),
    ];
    for list in lists {
        let bench = Bench::new().await.set("CLOSE_TIMEOUT", "3m").set("RUST_LOG", "info,lapin=off");
        let worker = bench.worker().await;
        bench.simulator.fault(Fault::new(Effect::Timeout { ms: 600_000, when: When::BeforeCommit }));
        let mut producer = Producer::connect(&bench.amqp_url).await;
        let properties = [&[0x20, 0x00], long(&[text(b"many"), list].concat()).as_slice()].concat();
        for event in people(150) {
            producer.publish(&bench.exchange, b"users", &properties, event.to_string().as_bytes()).await;
        }
        worker
            .until("working on all", async |worker| {
                let metrics = worker.metrics().await;
                metrics.get("messages_in_flight") + metrics.get("messages_waiting") >= 150.0
            })
            .await;
        let peak = worker.peak_memory().unwrap();
        assert!(peak < MAX_PEAK_OF_EVENTS, "{peak} KiB");
        worker.kill().await;
    }
}

/// Producers make Leads large. That must not look like an outage of Close, which would pause all messages.
#[tokio::test(flavor = "multi_thread")]
async fn leads_that_are_too_large_do_not_pause_consumption() {
    let bench = Bench::new().await.set("RUST_LOG", "info,lapin=off");
    let companies: Vec<_> = (0..15).map(|number| format!("c{number}")).collect();
    for company in &companies {
        bench.lead(Some(company), json!([]));
    }
    let huge = Effect::Status {
        code: 200,
        body: FaultBody::Raw(format!(r#"{{"id":{}}}"#, "0".repeat(17 * MIB))),
        when: When::BeforeCommit,
    };
    bench.simulator.fault(Fault::new(huge).on("GET", "/lead/"));
    let worker = bench.worker().await;
    let events: Vec<_> =
        companies.iter().map(|company| identify(company, json!({"company": {"id": company}}))).collect();
    bench.publish(&events).await;
    bench.depth_becomes(".dead", 15).await;
    let metrics = worker.metrics().await;
    assert_eq!(metrics.sum("pauses_total"), 0, "{}", worker.log());
    bench.publish(&[identify("jane", json!({"company": {"id": "other"}}))]).await;
    worker.until("synced", async |_| bench.simulator.contacts().len() == 1).await;
    assert!(bench.dead_letters().await.iter().all(|letter| letter["reason"] == "exhausted"));
    worker.terminate().await;
}

/// The worker handles up to 64 messages at once. None of them reads the Contacts of the Lead, which are 15 MB.
#[tokio::test(flavor = "multi_thread")]
async fn messages_about_a_lead_of_ten_thousand_people_take_little_memory_and_few_calls() {
    const PEOPLE: usize = 10_000;
    const EVENTS: usize = 100;
    let bench = Bench::new().await.set("RUST_LOG", "info,lapin=off").set("WORKER_MERGE", "false");
    let member = |number: usize| {
        json!({
            "name": "n".repeat(1000), "custom.cf_contactuserid": format!("m{number}"),
            "emails": [{"email": format!("m{number}@acme.test"), "type": "office"}],
        })
    };
    bench.lead(Some("acme"), (0..PEOPLE).map(member).collect());
    let worker = bench.worker().await;
    let calls = bench.simulator.requests().len();
    let event = |user: String| {
        let email = format!("{user}@acme.test");
        identify(&user, json!({"email": email, "title": "CEO", "company": {"id": "acme"}}))
    };
    let events = (0..EVENTS).flat_map(|number| [event(format!("u{number}")), event(format!("m{number}"))]);
    bench.publish(&events.collect::<Vec<_>>()).await;
    worker.settled(2 * EVENTS).await;
    let contacts = bench.simulator.contacts();
    let titled = contacts.iter().filter(|contact| contact["title"] == "CEO").count();
    assert_eq!((contacts.len(), titled), (PEOPLE + EVENTS, 2 * EVENTS));
    let calls = bench.simulator.requests().len() - calls;
    assert!(calls <= 4 * 2 * EVENTS, "{calls} calls");
    let peak = worker.peak_memory().unwrap();
    assert!(peak < MAX_PEAK_OF_ANSWERS, "{peak} KiB");
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_answer_of_close_takes_little_memory_and_is_tried_again() {
    let answers = [
        // Above the limit of the endpoint.
        format!(r#"{{"data":{}}}"#, list(r#"{"id":"lead_a","custom.cf_leadcompanyid":"acme"}"#, 32 * MIB)),
        // Below it, with many values.
        format!(r#"{{"data":{}}}"#, list(r#"{"id":0}"#, 8 * MIB - 1024)),
        format!(r#"{{"data":[{{"id":"a","custom.cf_leadcompanyid":{}}}]}}"#, list("[0]", 8 * MIB - 1024)),
        // More rows than asked for.
        format!(r#"{{"data":{}}}"#, list("{}", MIB)),
    ];
    for answer in answers {
        let start: String = answer.chars().take(60).collect();
        let bench = Bench::new().await.set("RUST_LOG", "info,lapin=off").set("RETRY_IN_PLACE", "10s");
        let worker = bench.worker().await;
        let huge = Effect::Status { code: 200, body: FaultBody::Raw(answer), when: When::BeforeCommit };
        bench.simulator.fault(Fault::new(huge).on("POST", "/data/search/").times(3));
        let events: Vec<_> = (0..25)
            .map(|number| identify(&format!("u{number}"), json!({"name": "Ada", "company": {"id": "acme"}})))
            .collect();
        bench.publish(&events).await;
        // A slow machine may have used up its time in place, and delay some.
        worker
            .until("synced", async |worker| {
                let metrics = worker.metrics().await;
                let outcomes = metrics.outcomes();
                let ended = outcomes.iter().filter(|(label, _)| **label != "delayed");
                ended.map(|(_, count)| *count).sum::<u32>() >= 25
            })
            .await;
        let metrics = worker.metrics().await;
        let peak = worker.peak_memory().unwrap();
        assert!(peak < MAX_PEAK_OF_ANSWERS, "{start}: {peak} KiB");
        assert_eq!(metrics.outcomes().get("dead"), None, "{start}");
        assert_eq!(bench.simulator.leads().len(), 1, "{start}");
        worker.kill().await;
    }
}
