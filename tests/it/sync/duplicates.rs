//! No duplicate Leads or Contacts after lost answers, while search lags, and when another worker takes over.

use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify};

fn status(code: u16, when: When) -> Effect {
    Effect::Status { code, body: FaultBody::default(), when }
}

/// Search does not show what is written during a test.
fn blind() -> Settings {
    Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap())
}

fn in_company(user: &str, company: &str) -> Value {
    identify(user, json!({"company": {"id": company}}))
}

/// Loses the answer to a creation in every way.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_creates_no_duplicate() {
    let lost: [(&str, Effect); 4] = [
        ("connection", Effect::DropConnection { when: When::AfterCommit }),
        ("time-out", Effect::Timeout { ms: 3000, when: When::AfterCommit }),
        ("502", status(502, When::AfterCommit)),
        ("500 before", status(500, When::BeforeCommit)),
    ];
    for (name, effect) in lost {
        let settings = Settings::fast().with(|close| close.search_lag = "500ms".parse().unwrap());
        let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "3s").set("CLOSE_TIMEOUT", "500ms");
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

/// A message whose creation got no answer waits in a delay queue. The next message about the same person must not
/// create the record again.
#[tokio::test(flavor = "multi_thread")]
async fn a_pending_creation_outlives_its_message() {
    let settings = Settings::fast().with(|close| close.search_lag = "1s".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "2s").set("RETRY_IN_PLACE", "0s");
    let worker = bench.worker().await;
    // Wait until the lag guard of the start is over.
    bench.publish(&[identify("u0", json!({}))]).await;
    worker.settled(1).await;

    bench.simulator.fault(Fault::new(status(502, When::AfterCommit)).on("POST", "/lead/").times(1));
    bench.publish(&[identify("u1", json!({"title": "One"})), identify("u1", json!({"title": "Two"}))]).await;
    let metrics = worker.settled(5).await;
    assert_eq!(metrics.outcome("delayed"), 2, "the second follows the first");
    assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (2, 2), "{}", worker.log());
    worker.terminate().await;
}

/// The adoption of the Lead was answered with a 504, and search does not show it. Only the id cache has the Lead.
#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_lead_is_used_although_the_answer_was_lost() {
    let bench = Bench::with(blind()).await.set("RETRY_IN_PLACE", "20s");
    bench.lead(None, json!([{"name": "Jane", "custom.cf_contactuserid": "u1"}]));
    bench.simulator.index_now();
    bench.simulator.fault(Fault::new(status(504, When::AfterCommit)).on("PUT", "/lead/").times(1));
    bench.sync(&[in_company("u1", "acme"), in_company("u2", "acme")]).await;
    let lead = bench.the_lead();
    assert_eq!(lead["custom.cf_leadcompanyid"], "acme");
    assert_eq!(lead["contacts"].as_array().unwrap().len(), 2);
}

/// The standby has been connected for longer than search lags. The active worker creates a record and dies. The lag
/// guard of the standby starts with its first delivery.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_takes_over_creates_no_duplicate() {
    let settings = Settings::fast().with(|close| close.search_lag = "2s".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "3s");
    let active = bench.worker().await;
    let standby = bench.worker().await;
    // The first creation of the active worker waits for search. The standby is connected for longer.
    bench.publish(&[in_company("u0", "first")]).await;
    active.settled(1).await;

    bench.publish(&[in_company("u1", "acme")]).await;
    active.settled(2).await;
    active.kill().await;
    bench.publish(&[in_company("u2", "acme")]).await;
    // The last ack may have been lost. Then it processes that message again.
    standby.until("done", async |standby| standby.metrics().await.outcome("added") == 1).await;
    assert_eq!(bench.simulator.leads().len(), 2);
    standby.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_behind_a_hundred_others_with_the_same_email_is_found() {
    let bench = Bench::new().await;
    let shared =
        |n: u32| json!({"custom.cf_contactuserid": format!("u{n}"), "emails": [{"email": "info@x.test"}]});
    for n in 0..120 {
        bench.lead(None, json!([shared(n)]));
    }
    let metrics = bench.sync(&[identify("u119", json!({"email": "info@x.test", "title": "Found"}))]).await;
    assert_eq!(metrics.outcomes(), [("updated", 1)].into());
    assert_eq!(bench.simulator.contacts().len(), 120);
}

/// An event with only an email is about every Contact that has the email, also those with a user id.
#[tokio::test(flavor = "multi_thread")]
async fn the_cached_contacts_of_an_email_are_complete() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"custom.cf_contactuserid": "u1", "emails": [{"email": "shared@x.test"}]}]));
    let by_email = json!({"type": "identify", "traits": {"email": "shared@x.test", "title": "Both"}});
    bench.sync(&[identify("u2", json!({"email": "shared@x.test"})), by_email]).await;
    let titles: Vec<_> = bench.simulator.contacts().iter().map(|contact| contact["title"].clone()).collect();
    assert_eq!(titles, ["Both", "Both"]);
}

/// Two events find one Contact by different keys, so they are in different key queues. Neither undoes the other.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_events_about_one_contact_lose_no_value() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"custom.cf_contactuserid": "u1", "emails": [{"email": "j@x.test"}]}]));
    // Both read before either of them writes.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 300 }).on("PUT", "/contact/"));
    let by_email = |phone: &str| json!({"type": "identify", "traits": {"email": "j@x.test", "phone": phone}});
    let events = [
        identify("u1", json!({"phone": "+49301111"})),
        by_email("+49302222"),
        identify("u1", json!({"phone": "+49303333"})),
    ];
    bench.sync(&events).await;
    let mut phones = crate::support::values(&bench.simulator.contacts()[0], "phones", "phone");
    phones.sort();
    assert_eq!(phones, ["+49301111", "+49302222", "+49303333"]);
}

/// Search does not show the record for an hour, but the event log does at once: no need to wait for search.
#[tokio::test(flavor = "multi_thread")]
async fn the_event_log_shows_a_creation_whose_answer_was_lost() {
    let bench = Bench::with(blind()).await.set("CLOSE_SEARCH_LAG", "8s").set("RETRY_IN_PLACE", "5s");
    bench.lead(Some("there"), json!([]));
    let worker = bench.worker().await;
    // Wait until the lag guard of the start is over.
    bench.publish(&[identify("u0", json!({}))]).await;
    worker.settled(1).await;

    let lost = Effect::DropConnection { when: When::AfterCommit };
    bench.simulator.fault(Fault::new(lost.clone()).on("POST", "/lead/").times(1));
    bench.simulator.fault(Fault::new(lost).on("POST", "/contact/").times(1));
    bench.publish(&[in_company("u1", "new"), in_company("u2", "there"), in_company("u1", "new")]).await;
    let metrics = worker.settled(4).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("unchanged", 3)].into());
    // A worker that only waited for search would find nothing there, and create each of the two again.
    assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (3, 3));
    worker.terminate().await;
}

/// The leader is frozen right before it creates a Lead; a standby takes over and creates it; the leader wakes up.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_frozen_sends_nothing_when_it_wakes_up() {
    let settings = Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap());
    let bench = Bench::with(settings).await;
    let url = format!("{}?heartbeat=1", bench.amqp_url);
    let bench = bench.set("AMQP_URL", &url);
    let leader = bench.worker().await;
    bench.publish(&[in_company("u0", "first")]).await;
    leader.settled(1).await;
    let standby = bench.worker().await;

    bench.simulator.fault(Fault::new(Effect::Latency { ms: 500 }).on("POST", "/data/").times(1));
    let before = bench.simulator.request_count("POST", "/data/");
    bench.publish(&[in_company("u1", "acme")]).await;
    let looking = async |_: &crate::support::Worker| bench.simulator.request_count("POST", "/data/") > before;
    leader.until("looking up", looking).await;
    leader.signal("STOP");
    let suspended = tokio::time::Instant::now();
    standby.settled(1).await;
    assert_eq!(bench.simulator.leads().len(), 2);

    // The broker waits for three heartbeats at most.
    tokio::time::sleep_until(suspended + Duration::from_secs(3)).await;
    leader.signal("CONT");
    let stalls = "broker_connection_losses_total{cause=\"stood_still\"}";
    leader.until("aware of it", async |leader| leader.metrics().await.count(stalls) == 1).await;
    leader.until("standing by", async |leader| leader.ready().await.1["state"] == "standing_by").await;
    assert_eq!(bench.simulator.leads().len(), 2, "{}", leader.log());
    // The worker works again.
    standby.terminate().await;
    let before = leader.metrics().await.settled();
    bench.publish(&[in_company("u2", "new")]).await;
    leader.until("at work again", async |leader| leader.metrics().await.settled() > before).await;
    assert_eq!(bench.simulator.leads().len(), 3);
    leader.terminate().await;
}

/// With two standbys, the leader is killed while it writes. One standby continues and creates no duplicate.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_standbys_continues_when_the_leader_is_killed() {
    let settings = Settings::fast().with(|close| close.search_lag = "2s".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "3s").set("WORKER_CONCURRENCY", "4");
    let workers = [bench.worker().await, bench.worker().await, bench.worker().await];
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 100 }).on("POST", "/lead/"));
    let events: Vec<_> =
        (0..40).map(|n| in_company(&format!("u{}", n % 20), &format!("c{}", n % 10))).collect();
    bench.publish(&events).await;
    workers[0].until("writing", async |_| bench.simulator.leads().len() >= 3).await;
    workers[0].kill().await;

    // The broker does not count as ready what the leader had, until it notices the kill.
    let has_continued = async |_: &Worker| {
        let settled = [workers[1].metrics().await.settled(), workers[2].metrics().await.settled()];
        settled.iter().any(|settled| *settled > 0.0)
    };
    workers[1].until("continued by one", has_continued).await;
    bench.depth_becomes("", 0).await;
    let mut active = 0;
    for standby in &workers[1..] {
        let idle = async |worker: &Worker| {
            let metrics = worker.metrics().await;
            metrics.count("messages_in_flight") + metrics.count("messages_waiting") == 0
        };
        standby.until("done", idle).await;
        active += u32::from(standby.metrics().await.settled() > 0.0);
    }
    assert_eq!(active, 1);
    let mut companies: Vec<_> =
        bench.simulator.leads().iter().map(|lead| lead["custom.cf_leadcompanyid"].to_string()).collect();
    companies.sort();
    companies.dedup();
    assert_eq!((companies.len(), bench.simulator.leads().len()), (10, 10), "one Lead a company");
    assert_eq!(bench.simulator.contacts().len(), 20, "one Contact a person");
    for standby in &workers[1..] {
        standby.terminate().await;
    }
}

/// The answer to a creation is lost, and the person is then found inside the Lead. The Contact is cached from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_contact_found_inside_a_lead_is_cached() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "20s");
    bench.lead(Some("there"), json!([]));
    let lost = Effect::DropConnection { when: When::AfterCommit };
    bench.simulator.fault(Fault::new(lost).on("POST", "/contact/").times(1));
    let title = identify("u1", json!({"title": "Everywhere"}));
    bench.sync(&[in_company("u1", "new"), in_company("u1", "there"), title]).await;
    let titles: Vec<_> = bench.simulator.contacts().iter().map(|contact| contact["title"].clone()).collect();
    assert_eq!(titles, ["Everywhere", "Everywhere"]);
}

/// The same while search lags. A Contact with the email and without a user id must not get the user id.
#[tokio::test(flavor = "multi_thread")]
async fn no_other_contact_gets_the_user_id_of_a_person_inside_a_lead() {
    let bench = Bench::with(blind()).await.set("RETRY_IN_PLACE", "20s");
    bench.lead(None, json!([{"name": "A form", "emails": [{"email": "j@x.test"}]}]));
    bench.lead(Some("there"), json!([]));
    bench.simulator.index_now();
    let lost = Effect::DropConnection { when: When::AfterCommit };
    bench.simulator.fault(Fault::new(lost).on("POST", "/contact/").times(1));
    let events = [
        identify("u1", json!({"email": "j@x.test", "company": {"id": "there"}})),
        identify("u1", json!({"email": "j@x.test"})),
    ];
    bench.sync(&events).await;
    let users: Vec<_> =
        bench.simulator.contacts().iter().map(|contact| contact["custom.cf_contactuserid"].clone()).collect();
    assert_eq!(users.iter().filter(|user| **user == "u1").count(), 1, "{users:?}");
}

/// Search does not show yet what the predecessor created. An event about the person waits for it too.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_takeover_all_contacts_of_a_person_are_updated() {
    let settings = Settings::fast().with(|close| close.search_lag = "2s".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "3s");
    bench.lead(Some("old"), json!([{"name": "Jane", "custom.cf_contactuserid": "u1"}]));
    bench.lead(Some("there"), json!([]));
    bench.simulator.index_now();
    let active = bench.worker().await;
    bench.publish(&[in_company("u1", "there")]).await;
    active.settled(1).await;
    active.kill().await;
    bench.sync(&[identify("u1", json!({"title": "Everywhere"}))]).await;
    let titles: Vec<_> = bench.simulator.contacts().iter().map(|contact| contact["title"].clone()).collect();
    assert_eq!(titles, ["Everywhere", "Everywhere"]);
}
