//! Records that Close shows late, in part, or no longer; and people who edit them at the same time.

use std::collections::BTreeSet;

use close_sync_simulator::{Behaviour, ContactLists, Effect, Fault, FaultBody, LeadContacts, Settings, When};
use serde_json::{Value, json};

use crate::support::{Bench, Metrics, Worker, identify, values};

const PHONES: [&str; 4] = ["+18004445551", "+18004445552", "+18004445553", "+18004445554"];

/// Events of one person, each with another phone number.
fn events() -> Vec<Value> {
    let event = |phone: &&str| {
        identify("u1", json!({"email": "jane@acme.test", "phone": phone, "company": {"id": "acme"}}))
    };
    PHONES.iter().map(event).collect()
}

async fn bench(change: impl FnOnce(&mut Behaviour)) -> Bench {
    Bench::with(Settings::fast().with(change)).await.set("RETRY_IN_PLACE", "60s").set("WORKER_MERGE", "false")
}

fn phones(contact: &Value) -> Vec<&str> {
    contact["phones"].as_array().unwrap().iter().map(|entry| entry["phone"].as_str().unwrap()).collect()
}

/// The only Contact, which is in the only Lead.
fn the_contact(bench: &Bench) -> Value {
    let lead = bench.the_lead();
    assert_eq!(
        (bench.simulator.contacts().len(), lead["contacts"].as_array().unwrap().len()),
        (1, 1),
        "{lead}"
    );
    bench.simulator.contacts().remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_reads_make_no_duplicate_and_undo_nothing() {
    for (read_lag, search_lag) in [("1s", "0s"), ("1s", "1h"), ("0s..2s", "0s")] {
        let bench = bench(|close| {
            close.read_lag = read_lag.parse().unwrap();
            close.search_lag = search_lag.parse().unwrap();
        });
        let bench = bench.await;
        bench.sync(&events()).await;
        assert_eq!(phones(&the_contact(&bench)), PHONES, "{read_lag} {search_lag}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contacts_and_lists_that_a_lead_leaves_out_are_read() {
    for (contacts, lists) in [
        (LeadContacts::WithoutNewest, ContactLists::Whole),
        (LeadContacts::Empty, ContactLists::Whole),
        (LeadContacts::Absent, ContactLists::Whole),
        (LeadContacts::Whole, ContactLists::NullInLeads),
        (LeadContacts::Whole, ContactLists::MissingInLeads),
    ] {
        let bench = bench(|close| (close.lead_contacts, close.contact_lists) = (contacts, lists)).await;
        bench.sync(&events()).await;
        assert_eq!(phones(&the_contact(&bench)), PHONES, "{contacts:?} {lists:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_close_never_shows_is_not_written() {
    for lists in [ContactLists::Null, ContactLists::Missing] {
        let bench = bench(|close| close.contact_lists = lists).await;
        let jane = json!({"custom.cf_contactuserid": "u1", "phones": [{"phone": "+18005550000"}]});
        bench.lead(Some("acme"), json!([jane]));
        bench.sync(&events()).await;
        assert_eq!(phones(&the_contact(&bench)), ["+18005550000"], "{lists:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_whose_emails_close_never_shows_is_not_created_again() {
    for lists in [ContactLists::Null, ContactLists::Missing] {
        for company in [json!(null), json!({"id": "acme"})] {
            let bench = bench(|close| close.contact_lists = lists).await;
            let event = |title: &str| json!({"type": "identify", "traits": {"email": "jane@acme.test", "title": title, "company": company}});
            bench.sync(&["CTO", "CEO", "COO"].map(event)).await;
            the_contact(&bench);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_people_are_created_beside_a_person_whose_emails_close_never_shows() {
    for lists in [ContactLists::Null, ContactLists::Missing] {
        let bench = bench(|close| close.contact_lists = lists).await;
        bench.lead(Some("acme"), json!([{"name": "Bob", "emails": [{"email": "bob@acme.test"}]}]));
        let event = |name: &str, email: &str| json!({"type": "identify", "traits": {"email": email, "name": name, "company": {"id": "acme"}}});
        let events = [
            event("Jane", "jane@acme.test"),
            event("Joe", "joe@acme.test"),
            event("Robert", "bob@acme.test"),
            event("Jane", "jane@acme.test"),
        ];
        let metrics = bench.sync(&events).await;
        assert_eq!(metrics.outcomes(), [("added", 2), ("unchanged", 1), ("updated", 1)].into(), "{lists:?}");
        let contacts = bench.simulator.contacts();
        let seen: Vec<_> = contacts
            .iter()
            .map(|one| (one["name"].as_str().unwrap(), values(one, "emails", "email")))
            .collect();
        let expected = [("Robert", "bob@acme.test"), ("Jane", "jane@acme.test"), ("Joe", "joe@acme.test")];
        assert_eq!(seen, expected.map(|(name, email)| (name, vec![email.to_owned()])), "{lists:?}");
    }
}

/// A person adds a phone number after the worker has read the Contact. The write is answered with a 429 and waits, so the
/// worker reads again before the next try.
#[tokio::test(flavor = "multi_thread")]
async fn a_phone_that_a_person_adds_while_the_write_waits_is_kept() {
    let bench = bench(|_| {}).await;
    bench.lead(Some("acme"), json!([{"custom.cf_contactuserid": "u1"}]));
    let path = format!("/contact/{}/", bench.simulator.contacts()[0]["id"].as_str().unwrap());
    let edit = |body| Effect::Edit { method: "PUT".into(), path: path.clone(), body };
    let busy = Effect::RateLimited { retry_after: 2.0, with_headers: true };
    bench
        .simulator
        .fault(Fault::new(edit(json!({"phones": [{"phone": "+18005550000"}]}))).on("PUT", "/lead/").times(1));
    bench.simulator.fault(Fault::new(busy).on("PUT", &path).times(1));
    let event =
        identify("u1", json!({"name": "J", "phone": PHONES[0], "company": {"id": "acme", "name": "Acme"}}));
    bench.sync(&[event]).await;
    assert_eq!(phones(&the_contact(&bench)), ["+18005550000", PHONES[0]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_a_person_deletes_a_moment_later_is_created_again() {
    let bench = bench(|close| close.search_lag = "1h".parse().unwrap()).await;
    let worker = bench.worker().await;
    bench.publish(&events()[..1]).await;
    worker.settled(1).await;
    let deleted = bench.the_lead()["id"].as_str().unwrap().to_owned();
    assert!(bench.simulator.delete(&deleted));
    bench.publish(&events()[1..2]).await;
    worker.settled(2).await;
    assert_eq!(phones(&the_contact(&bench)), [PHONES[1]]);
    assert_ne!(bench.the_lead()["id"], deleted);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Reads of all Leads are answered with 404 in Close's words: the route or the key is wrong.
fn wrong_route() -> Fault {
    let gone = FaultBody::Exactly(json!({"error": "Empty query: Lead matching query does not exist."}));
    Fault::new(Effect::Status { code: 404, body: gone, when: When::BeforeCommit }).on("GET", "/lead/")
}

/// Events about people in the Leads of this many companies.
fn of_companies(count: usize) -> Vec<Value> {
    (0..count).map(|n| identify(&format!("u{n}"), json!({"company": {"id": format!("c{n}")}}))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_route_creates_nothing() {
    // With a memory of the records and without one, with many messages and with too few for the circuit breaker.
    for (knows, count) in [(true, 40), (false, 40), (false, 3)] {
        let bench = Bench::new().await.set("WORKER_CONCURRENCY", "16").set("WORKER_RECHECK", "0s");
        for n in 0..count {
            bench.lead(Some(&format!("c{n}")), json!([{"custom.cf_contactuserid": format!("u{n}")}]));
        }
        let worker = bench.worker().await;
        let events = of_companies(count);
        let mut settled = 0;
        if knows {
            bench.publish(&events).await;
            settled += count;
            worker.settled(settled).await;
        }
        bench.simulator.fault(wrong_route());
        bench.publish(&events).await;
        let until = |worker: &Worker, metrics: &Metrics| {
            if count > 3 {
                worker.events("pause_began") > 0
            } else {
                metrics.sum("messages_delayed_total") > 6
            }
        };
        worker.until("held back", async |worker| until(worker, &worker.metrics().await)).await;
        bench.simulator.clear_faults();
        worker
            .until("done", async |worker| {
                // A message that was handed back at the pause may be settled twice.
                worker.metrics().await.outcome("unchanged") >= u32::try_from(settled + count).unwrap()
            })
            .await;
        assert_eq!(worker.events("pause_began") > 0, count > 3, "{knows} {count}");
        worker.terminate().await;
        assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (count, count));
        assert_eq!((bench.writes().len(), bench.depth(".dead").await), (0, 0), "{knows} {count}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_a_person_deletes_in_a_burst_pause_nobody() {
    const COUNT: usize = 20;
    let bench = bench(|close| close.search_lag = "1h".parse().unwrap()).await.set("WORKER_RECHECK", "0s");
    for n in 0..COUNT {
        bench.lead(Some(&format!("c{n}")), json!([{"custom.cf_contactuserid": format!("u{n}")}]));
    }
    let worker = bench.worker().await;
    bench.publish(&of_companies(COUNT)).await;
    worker.settled(COUNT).await;
    let ids = || -> BTreeSet<String> {
        bench.simulator.leads().iter().map(|lead| lead["id"].as_str().unwrap().to_owned()).collect()
    };
    let deleted = ids();
    assert!(deleted.iter().all(|id| bench.simulator.delete(id)));
    bench.publish(&of_companies(COUNT)).await;
    let metrics = worker.settled(2 * COUNT).await;
    assert_eq!(metrics.outcomes(), [("created", 20), ("unchanged", 20)].into());
    assert_eq!((metrics.sum("pauses_total"), metrics.sum("messages_delayed_total")), (0, 0));
    assert!(ids().is_disjoint(&deleted) && ids().len() == COUNT);
    worker.terminate().await;
}

/// A person deletes the Lead after the first event. Returns once the second one is settled.
async fn delete_between_events(bench: &Bench, lead: &Value) -> (Worker, Metrics) {
    let worker = bench.worker().await;
    bench.publish(&events()[..1]).await;
    worker.settled(1).await;
    assert!(bench.simulator.delete(lead["id"].as_str().unwrap()));
    bench.publish(&events()[1..2]).await;
    let metrics = worker.settled(2).await;
    (worker, metrics)
}

/// The event log shows the deletion late.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_is_believed_when_the_event_log_shows_it() {
    let bench = bench(|close| close.event_lag = "3s".parse().unwrap()).await;
    let lead = bench.lead(Some("acme"), json!([]));
    let (worker, _) = delete_between_events(&bench, &lead).await;
    assert_eq!(phones(&the_contact(&bench)), [PHONES[1]]);
    assert_ne!(bench.the_lead()["id"], lead["id"]);
    worker.terminate().await;
}

/// The key may not read the event log.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_event_log_a_deletion_is_believed_when_other_records_are_there() {
    let bench = bench(|_| {}).await;
    let refused = FaultBody::Exactly(json!({"error": "You do not have permission to do this."}));
    let refused = Effect::Status { code: 403, body: refused, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(refused).on("GET", "/event/"));
    let other = bench.lead(Some("other"), json!([{"name": "Other"}]));
    let lead = bench.lead(Some("acme"), json!([]));
    let (worker, metrics) = delete_between_events(&bench, &lead).await;
    assert_eq!(metrics.sum("pauses_total"), 0);
    let leads: Vec<Value> = bench.simulator.leads().iter().map(|lead| lead["id"].clone()).collect();
    assert_eq!((leads.len(), leads.contains(&other["id"]), leads.contains(&lead["id"])), (2, true, false));
    worker.terminate().await;
}
