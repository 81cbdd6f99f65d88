//! Close returns values in another form than they were sent, or does not keep them: nothing is sent again with every event.

use close_sync_simulator::{Behaviour, ListForm, NumberForm, Settings, TimeForm, UserForm};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify, values};

/// Rules for a field of each type whose values may come back in another form.
const RULES: &str = "{ cf_leadsyncedat = { from = ['$.traits.at'] }, cf_leadsince = { from = ['$.traits.since'] }, \
                     cf_leadseats = { from = ['$.traits.seats'] }, cf_leadowner = { from = ['$.traits.owner'] }, \
                     cf_leadtags = { from = ['$.traits.tags'] } }";

async fn bench(change: impl FnOnce(&mut Behaviour)) -> Bench {
    Bench::with(Settings::fast().with(change)).await.set("MAPPING_LEAD_CUSTOM", RULES)
}

/// Publishes the events one after the other, and returns the number of writes to Close.
async fn writes(bench: &Bench, worker: &Worker, events: &[Value], settled: &mut usize) -> usize {
    let before = bench.writes().len();
    bench.publish(events).await;
    *settled += events.len();
    worker.settled(*settled).await;
    bench.writes().len() - before
}

/// By country: what producers send and what Close stores (close-api.md §15).
const PHONES: [(&str, &[(&str, &str)]); 7] = [
    (
        "US",
        &[
            ("+49 030 123456", "+4930123456"),
            ("+44 07700 900123", "+447700900123"),
            ("+49 (030) 901820", "+4930901820"),
            ("011 44 20 7946 0958", "+442079460958"),
            ("+7 8 800 555 35 35", "+78005553535"),
            ("+54 11 15 1234 5678", "+5491112345678"),
            ("(800) 444-5555", "+18004445555"),
            ("1234", "+1234"),
            ("+1 (650) 618-1234 x 768", "+16506181234x768"),
        ],
    ),
    ("GB", &[("07700 900123", "+447700900123"), ("00 1 800 444 5555", "+18004445555"), ("4412", "+4412")]),
    ("DE", &[("0049 30 123456", "+4930123456"), ("030 123456", "+4930123456")]),
    ("RU", &[("8 800 555 35 35", "+78005553535")]),
    ("MX", &[("01 55 1234 5678", "+52015512345678")]),
    ("AR", &[("011 15 1234 5678", "+5491112345678")]),
    ("JP", &[("010 44 20 7946 0958", "+442079460958")]),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_phone_that_close_rewrites_is_sent_once() {
    for (country, phones) in PHONES {
        let bench = bench(|close| close.set("country", country).unwrap()).await;
        let worker = bench.worker().await;
        let person =
            |n: usize, phone: &str| identify(&format!("u{n}"), json!({"phone": phone, "company": {"id": n}}));
        let events: Vec<Value> = phones.iter().enumerate().map(|(n, (sent, _))| person(n, sent)).collect();
        let mut settled = 0;
        assert_eq!(writes(&bench, &worker, &events, &mut settled).await, phones.len(), "{country}");
        assert_eq!(writes(&bench, &worker, &events, &mut settled).await, 0, "{country}");
        let mut stored: Vec<String> = bench
            .simulator
            .contacts()
            .iter()
            .flat_map(|contact| values(contact, "phones", "phone"))
            .collect();
        let mut expected: Vec<&str> = phones.iter().map(|(_, stored)| *stored).collect();
        stored.sort();
        expected.sort_unstable();
        assert_eq!(stored, expected, "{country}");
        worker.terminate().await;
        // A new worker has learned nothing.
        let bench = bench.set("CLOSE_COUNTRY", country);
        let outcomes = bench.sync(&events).await;
        assert_eq!(outcomes.outcome("unchanged") as usize, phones.len(), "{country}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_worker_recognizes_phones_when_close_names_its_country() {
    let bench = bench(|close| {
        close.set("country", "GB").unwrap();
        close.country_in_me = true;
    })
    .await;
    let events = [
        identify("u1", json!({"phone": "07700 900123"})),
        identify("u2", json!({"phone": "00 1 800 444 5555"})),
    ];
    assert_eq!(bench.sync(&events).await.outcomes(), [("created", 2)].into());
    assert_eq!(bench.sync(&events).await.outcomes(), [("unchanged", 2)].into());
    // The ends of two numbers agree.
    bench.lead(None, json!([{"custom.cf_contactuserid": "u3", "phones": [{"phone": "+17700900123"}]}]));
    let others = [
        identify("u1", json!({"phone": "+1 7700 900123"})),
        identify("u3", json!({"phone": "07700 900123"})),
    ];
    assert_eq!(bench.sync(&others).await.outcomes(), [("updated", 2)].into());
}

/// The only phones in Close.
fn phones(bench: &Bench) -> Vec<String> {
    bench.simulator.contacts().iter().flat_map(|contact| values(contact, "phones", "phone")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_national_phone_is_not_taken_for_a_foreign_one_whatever_is_known_of_the_country() {
    let (foreign, national) = ("+442079460958", "+492079460958");
    for setting in ["", "DE"] {
        let bench = bench(|close| close.set("country", "DE").unwrap()).await;
        let bench = bench.set("WORKER_MERGE", "false").set("CLOSE_COUNTRY", setting);
        bench.lead(None, json!([{"custom.cf_contactuserid": "u1", "phones": [{"phone": foreign}]}]));
        let event = || identify("u1", json!({"phone": "020 7946 0958"}));
        let worker = bench.worker().await;
        let mut settled = 0;
        assert_eq!(writes(&bench, &worker, &vec![event(); 20], &mut settled).await, 1, "{setting}");
        assert_eq!(phones(&bench), [foreign, national], "{setting}");
        worker.terminate().await;
        // A new worker knows the country from the setting. Otherwise one write shows it, for all Contacts.
        bench.lead(None, json!([{"custom.cf_contactuserid": "u2", "phones": [{"phone": "+4930123456"}]}]));
        let worker = bench.worker().await;
        let others = identify("u2", json!({"phone": "030 123456"}));
        let events: Vec<Value> = (0..10).flat_map(|_| [event(), others.clone()]).collect();
        let (first, others) = events.split_at(1);
        let mut settled = 0;
        let written = writes(&bench, &worker, first, &mut settled).await;
        assert_eq!(written, usize::from(setting.is_empty()), "{setting}");
        assert_eq!(writes(&bench, &worker, others, &mut settled).await, 0, "{setting}");
        assert_eq!(worker.events("phone_country_learned"), usize::from(setting.is_empty()), "{setting}");
        worker.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_close_correct_a_wrong_country_in_the_configuration() {
    let bench = bench(|close| close.set("country", "GB").unwrap()).await;
    let bench = bench.set("CLOSE_COUNTRY", "DE").set("CLOSE_SCHEMA_REFRESH", "10s");
    let worker = bench.worker().await;
    let event = |n: usize| identify(&format!("u{n}"), json!({"phone": "07700 900123"}));
    let mut settled = 0;
    assert_eq!(writes(&bench, &worker, &[event(1)], &mut settled).await, 1);
    assert_eq!(worker.events("phone_country_learned"), 1);
    assert_eq!(writes(&bench, &worker, &[event(1), event(1)], &mut settled).await, 0);
    assert_eq!(phones(&bench), ["+447700900123"]);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_in_another_form_is_unchanged() {
    let forms: [fn(&mut Behaviour); 7] = [
        |close| close.times = TimeForm::Zulu,
        |close| close.times = TimeForm::Offset,
        |close| close.times = TimeForm::Naive,
        |close| close.numbers = NumberForm::Text,
        |close| close.users = UserForm::Object,
        |close| close.lists = ListForm::AlwaysList,
        |close| close.lists = ListForm::NeverListOfOne,
    ];
    for (number, form) in forms.into_iter().enumerate() {
        let bench =
            bench(form).await.set("CLOSE_LEAD_SYNCED_AT_FIELD", "").set("CLOSE_CONTACT_SYNCED_AT_FIELD", "");
        let event = identify(
            "u1",
            json!({"at": "2026-01-31T10:00:00+01:00", "since": "2026-01-31", "seats": 5, "owner": "Ada Account",
                "tags": ["red"], "company": {"id": "c1"}}),
        );
        let metrics = bench.sync(std::slice::from_ref(&event)).await;
        assert_eq!(metrics.outcomes(), [("created", 1)].into(), "{number}");
        assert_eq!(metrics.sum("values_not_kept_total"), 0, "{number}");
        // A new worker remembers nothing.
        let metrics = bench.sync(&[event.clone(), event]).await;
        assert_eq!(metrics.outcomes(), [("unchanged", 2)].into(), "{number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_close_does_not_keep_is_counted_and_not_sent_again() {
    let bench = bench(|close| {
        close.lossy_fields = ["title", "phones", "custom.cf_leadseats"].map(str::to_owned).into();
    })
    .await;
    let worker = bench.worker().await;
    let event = |title: &str| {
        identify("u1", json!({"title": title, "phone": "+18004445555", "seats": 5, "company": {"id": "c1"}}))
    };
    let mut settled = 0;
    assert_eq!(writes(&bench, &worker, &[event("CEO")], &mut settled).await, 1);
    assert_eq!(writes(&bench, &worker, &[event("CEO"), event("CEO")], &mut settled).await, 0);
    // It is sent again when the event wants another value.
    assert_eq!(writes(&bench, &worker, &[event("CFO")], &mut settled).await, 1);
    assert_eq!(writes(&bench, &worker, &[event("CFO")], &mut settled).await, 0);
    let metrics = worker.metrics().await;
    assert_eq!(metrics.count("values_not_kept_total{effect=\"lost\"}"), 4);
    assert_eq!(worker.events("value_not_kept"), 3, "once per field");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_odd_member_of_the_schema_stops_the_start_only_if_it_is_configured() {
    let odd = [
        "cf_leadplan.choices",
        "cf_leadnotes.type",
        "cf_contactrole.id",
        "stat_badfit.id",
        "user_adaaccount.id",
    ];
    let bench = bench(|close| close.null_members = odd.map(str::to_owned).into()).await;
    let metrics = bench.sync(&[identify("u1", json!({"seats": 5, "company": {"id": "c1"}}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    let checked = bench.run(&["check", "--json"], b"").await;
    let findings: Value = serde_json::from_slice(&checked.stdout).unwrap();
    let warnings = findings.to_string().matches("ignores the").count();
    assert_eq!((checked.status.code(), warnings), (Some(0), odd.len()), "{findings:#}");

    for (field, rule) in [("cf_leadnotes", "MAPPING_LEAD_CUSTOM"), ("Notes", "MAPPING_LEAD_CUSTOM")] {
        let bench =
            Bench::with(Settings::fast().with(|close| close.null_members = vec!["cf_leadnotes.type".into()]))
                .await
                .set(rule, &format!("{{ {field} = {{ from = ['$.traits.x'] }} }}"));
        let worker = bench.starting_worker();
        assert_eq!(worker.ended().await.code(), Some(78), "{}", worker.log());
        assert!(worker.log().contains(&format!("mapping.lead.custom.{field}")), "{}", worker.log());
    }
    // A lookup field.
    let odd = vec!["cf_leadcompanyid.type".to_owned()];
    let bench = Bench::with(Settings::fast().with(|close| close.null_members = odd)).await;
    let worker = bench.starting_worker();
    assert_eq!(worker.ended().await.code(), Some(78), "{}", worker.log());
    assert!(worker.log().contains("close.lead_company_id_field"), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn add_keeps_what_a_person_added_and_is_refused_for_one_value() {
    let rules = "{ cf_leadtags = { from = ['$.traits.tags'], write = 'add' } }";
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", rules);
    let lead = json!({"name": "A", "custom.cf_leadcompanyid": "c1", "custom.cf_leadtags": ["green"]});
    bench.simulator.add_lead(lead).unwrap();
    let event = |tags: Value| identify("u1", json!({"tags": tags, "company": {"id": "c1"}}));
    bench.sync(&[event(json!(["red", "green"])), event(json!("red")), event(json!(["blue"]))]).await;
    assert_eq!(bench.the_lead()["custom.cf_leadtags"], json!(["green", "red", "blue"]));
    let metrics = bench.sync(&[event(json!(["red", "blue"]))]).await;
    assert_eq!(metrics.outcomes(), [("unchanged", 1)].into());

    let single = "{ cf_leadseats = { from = ['$.traits.seats'], write = 'add' } }";
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", single);
    let worker = bench.starting_worker();
    assert_eq!(worker.ended().await.code(), Some(78), "{}", worker.log());
    assert!(worker.log().contains("mapping.lead.custom.cf_leadseats"), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_id_of_a_custom_object_is_written() {
    let rules = "{ cf_leadcontract = { from = ['$.traits.contract'] } }";
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", rules);
    let event = |id: &str| identify("u1", json!({"contract": id, "company": {"id": "c1"}}));
    bench.sync(&[event("custobj_7oqs6AVtMRNFAZwvsAbtKM"), event("cotype_1")]).await;
    assert_eq!(bench.the_lead()["custom.cf_leadcontract"], "custobj_7oqs6AVtMRNFAZwvsAbtKM");
}
