//! What producers send by mistake must not merge people, overwrite values, or freeze records.

use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::support::{Bench, identify, values};

const USER: &str = "custom.cf_contactuserid";
const COMPANY: &str = "custom.cf_leadcompanyid";

/// The values that the worker has dropped for this reason.
const PLACEHOLDERS: &str = "fields_dropped_total{reason=\"placeholder\"}";
const UNREADABLE: &str = "fields_dropped_total{reason=\"unreadable_time\"}";

#[tokio::test(flavor = "multi_thread")]
async fn people_with_the_user_id_undefined_stay_different_people() {
    let bench = Bench::new().await;
    let person = |id: Value, name: &str| json!({"type": "identify", "userId": id, "traits": {"name": name, "email": format!("{name}@x.test")}});
    let ids =
        [json!("undefined"), json!("null"), json!("'None'"), json!("[object Object]"), json!(true), json!(0)];
    let names = ["ann", "bo", "cy", "di", "ed", "flo"];
    let events: Vec<_> = ids.into_iter().zip(names).map(|(id, name)| person(id, name)).collect();
    let metrics = bench.sync(&events).await;
    assert_eq!(metrics.outcomes(), [("created", 6)].into());
    assert_eq!(metrics.count(PLACEHOLDERS), 6);
    for lead in bench.simulator.leads() {
        let contact = &lead["contacts"][0];
        assert_eq!(
            values(contact, "emails", "email"),
            [format!("{}@x.test", contact["name"].as_str().unwrap())]
        );
        assert_eq!(contact[USER], Value::Null);
    }
    // Without an email nobody is identified.
    let metrics =
        bench.sync(&[json!({"type": "identify", "userId": "undefined", "traits": {"name": "Gus"}})]).await;
    assert_eq!(metrics.outcomes(), [("dead", 1)].into());
    let (_, headers, _) = bench.take_dead_letter().await;
    assert_eq!(headers["x-close-sync-reason"], "no_identity");
    assert_eq!(bench.simulator.leads().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn companies_with_the_id_undefined_stay_different_companies_and_names_stay() {
    let bench = Bench::new().await;
    let metrics = bench
        .sync(&[
            identify(
                "u1",
                json!({"name": "Ann", "title": "CEO", "company": {"id": "undefined", "name": "Acme"}}),
            ),
            identify("u2", json!({"name": "Bo", "company": {"id": "undefined", "name": "Gull"}})),
            identify("u1", json!({"company": {"id": "undefined", "name": "Renamed"}})),
            identify("u1", json!({"firstName": "undefined", "lastName": "undefined", "title": "null"})),
            identify("u2", json!({"company": {"name": "undefined"}})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("created", 2), ("unchanged", 3)].into());
    assert_eq!(metrics.count(PLACEHOLDERS), 6);
    let mut leads = bench.simulator.leads();
    leads.sort_by_key(|lead| lead["name"].to_string());
    let names: Vec<_> = leads.iter().map(|lead| lead["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["Acme", "Gull"]);
    assert!(leads.iter().all(|lead| lead[COMPANY] == Value::Null));
    let ann = &leads[0]["contacts"][0];
    assert_eq!((&ann["name"], &ann["title"]), (&json!("Ann"), &json!("CEO")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_placeholders_is_a_setting_and_can_be_reloaded() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("close-sync.toml");
    std::fs::write(&file, "[mapping]\nplaceholders = [\"nobody\"]\n").unwrap();
    let bench = Bench::new().await.set("CLOSE_SYNC_CONFIG", file.to_str().unwrap());
    let worker = bench.worker().await;
    bench.publish(&[identify("guest", json!({})), identify("NOBODY", json!({}))]).await;
    assert_eq!(worker.settled(2).await.outcomes(), [("created", 1), ("dead", 1)].into());
    assert_eq!(bench.the_lead()["contacts"][0][USER], json!("guest"));

    std::fs::write(&file, "[mapping]\nplaceholders = [\"guest\"]\n").unwrap();
    worker.signal("HUP");
    worker.until("reloaded", async |worker| worker.events("reload_applied") == 1).await;
    bench.publish(&[identify("guest", json!({})), identify("nobody", json!({}))]).await;
    assert_eq!(worker.settled(4).await.outcomes(), [("created", 2), ("dead", 2)].into());
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_of_php_is_an_empty_object() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"name": "Ann", USER: "u1"}]));
    let metrics = bench
        .sync(&[
            json!({"type": "identify", "userId": "u1", "traits": [], "integrations": [], "context": [], "company": []}),
            json!({"type": "identify", "userId": "u1", "traits": {"title": "CEO", "company": []}, "integrations": []}),
            json!({"type": "identify", "userId": "u1", "traits": ["title"]}),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("unchanged", 1), ("updated", 1), ("dead", 1)].into());
    assert_eq!(bench.the_lead()["contacts"][0]["title"], json!("CEO"));
}

#[tokio::test(flavor = "multi_thread")]
async fn invisible_characters_make_no_second_person() {
    let bench = Bench::new().await;
    // A person has pasted the id together with a byte-order mark.
    bench.lead(
        Some("acme"),
        json!([{"name": "Ann", USER: "\u{feff}u1", "emails": [{"email": "ann@x.test"}]}]),
    );
    let metrics = bench
        .sync(&[
            identify("u1", json!({"email": "\u{200b}ann@x.test\u{a0}", "company": {"id": "acme\u{200e}"}})),
            identify("\u{202a}u1\u{202c}", json!({"title": "CEO", "company": {"id": "\u{feff}acme"}})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 2)].into());
    let lead = bench.the_lead();
    assert_eq!(lead["contacts"].as_array().unwrap().len(), 1);
    let ann = &lead["contacts"][0];
    assert_eq!((&ann[USER], &ann["title"]), (&json!("u1"), &json!("CEO")));
    assert_eq!(values(ann, "emails", "email"), ["ann@x.test"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_with_a_zero_time_is_as_new_as_its_next_time() {
    let bench = Bench::new().await;
    let titled = |title: &str, timestamp: Value, sent: Value| {
        let event = json!({"type": "identify", "userId": "u1", "timestamp": timestamp, "sentAt": sent,
            "traits": {"title": title}});
        event.to_string().into_bytes()
    };
    let zero = BasicProperties::default().with_timestamp(0);
    let worker = bench.worker().await;
    let mut settled = 0;
    let mut stale = 0;
    for (title, timestamp, sent, is_stale) in [
        ("first", json!("2026-01-01T00:00:00Z"), Value::Null, false),
        ("second", json!("0001-01-01T00:00:00Z"), json!("2026-01-02T00:00:00.000:Z"), false),
        ("old", json!("1970-01-01T00:00:00Z"), json!("2026-01-01 12:00:00 UTC"), true),
        // No time at all: that of arrival.
        ("third", json!("0001-01-01T00:00:00Z"), json!(0), false),
        ("fourth", json!("10/11/2026"), Value::Null, false),
    ] {
        bench.publish_bytes(&titled(title, timestamp, sent), zero.clone()).await;
        settled += 1;
        stale += u32::from(is_stale);
        let metrics = worker.settled(settled).await;
        assert_eq!(metrics.count("stale_values_total"), stale, "{title}");
        let now = bench.the_lead()["contacts"][0]["title"].clone();
        assert_eq!(now == json!(title), !is_stale, "{title}: {now}");
    }
    assert_eq!(worker.metrics().await.count(UNREADABLE), 1);
    assert_eq!(worker.events("time_unreadable"), 1);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_id_that_is_an_email_finds_the_contact_that_a_person_has_entered() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"name": "Ann Berg", "emails": [{"email": "Ann@x.test"}]}]));
    let metrics = bench
        .sync(&[
            identify("ann@x.test", json!({"title": "CEO"})),
            identify("ann@x.test", json!({"title": "CTO"})),
            identify("u2", json!({"name": "Bo"})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 2), ("created", 1)].into());
    assert_eq!(metrics.sum("fields_dropped_total"), 0, "a user id is no invalid email");
    let leads = bench.simulator.leads();
    assert_eq!((leads.len(), leads[0]["contacts"].as_array().unwrap().len()), (2, 1));
    let ann = &leads[0]["contacts"][0];
    assert_eq!((&ann[USER], &ann["title"]), (&json!("ann@x.test"), &json!("CTO")));
    assert_eq!(values(ann, "emails", "email"), ["Ann@x.test"]);
    assert_eq!(values(&leads[1]["contacts"][0], "emails", "email"), Vec::<String>::new());
}
