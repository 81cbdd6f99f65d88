//! Every rule of matching (design.md §2), through the whole program.

use serde_json::{Value, json};

use crate::support::{Bench, identify, values};

const COMPANY: &str = "custom.cf_leadcompanyid";
const USER: &str = "custom.cf_contactuserid";

fn jane() -> Value {
    identify(
        "u1",
        json!({
            "email": "jane@acme.test", "name": "Jane Doe", "phone": "800 444-5555", "website": "acme.test",
            "title": "CEO", "company": {"id": "acme", "name": "Acme"},
        }),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_person_of_a_new_company_becomes_a_lead_with_a_contact_in_one_call() {
    let bench = Bench::new().await;
    let metrics = bench.sync(&[jane()]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!(bench.writes(), ["POST lead"]);

    let lead = bench.the_lead();
    assert_eq!((&lead["name"], &lead[COMPANY]), (&json!("Acme"), &json!("acme")));
    let contact = &lead["contacts"][0];
    assert_eq!(
        (&contact["name"], &contact["title"], &contact[USER]),
        (&json!("Jane Doe"), &json!("CEO"), &json!("u1"))
    );
    assert_eq!(values(contact, "emails", "email"), ["jane@acme.test"]);
    assert_eq!(values(contact, "phones", "phone"), ["+18004445555"], "Close rewrites it");
    assert_eq!(values(contact, "urls", "url"), ["http://acme.test"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_close_has_are_not_sent_again() {
    let bench = Bench::new().await.set("CLOSE_COUNTRY", "US");
    let metrics = bench.sync(&[jane(), jane(), jane()]).await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("unchanged", 2)].into());
    // Another worker has empty caches and looks everything up.
    let metrics = bench.sync(&[jane()]).await;
    assert_eq!(metrics.outcomes(), [("unchanged", 1)].into());
    assert_eq!(bench.writes(), ["POST lead"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_the_companys_lead_people_are_found_or_added() {
    let bench = Bench::new().await;
    let found = json!([
        {"name": "By user id", USER: "u1", "emails": [{"email": "old@acme.test"}]},
        {"name": "By email", "emails": [{"email": "Kim@Acme.test"}]},
    ]);
    bench.lead(Some("acme"), found);
    // The person exists elsewhere too. Such a duplicate is allowed by default.
    bench.lead(Some("other"), json!([{"name": "Elsewhere", USER: "u3"}]));
    let company = json!({"id": "acme"});
    let metrics = bench
        .sync(&[
            identify("u1", json!({"email": "new@acme.test", "company": company})),
            identify("u2", json!({"email": "kim@acme.test", "company": company})),
            identify("u3", json!({"name": "Added", "company": company})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 2), ("added", 1)].into());

    let leads = bench.simulator.leads();
    let contacts = leads[0]["contacts"].as_array().unwrap();
    assert_eq!(contacts.len(), 3);
    assert_eq!(values(&contacts[0], "emails", "email"), ["old@acme.test", "new@acme.test"], "appended");
    assert_eq!((&contacts[1][USER], &contacts[1]["name"]), (&json!("u2"), &json!("By email")));
    assert_eq!(values(&contacts[1], "emails", "email"), ["Kim@Acme.test"], "the same but for its case");
    assert_eq!(contacts[2]["name"], json!("Added"));
    assert_eq!(leads[1]["contacts"][0]["name"], json!("Elsewhere"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_company_the_person_is_found_anywhere_by_user_id_then_by_email() {
    let bench = Bench::new().await;
    bench.lead(
        None,
        json!([{"name": "One", USER: "u1"}, {"name": "Two", "emails": [{"email": "two@x.test"}]}]),
    );
    let metrics = bench
        .sync(&[
            identify("u1", json!({"title": "CTO", "email": "two@x.test", "company": {"name": "Renamed"}})),
            identify("u2", json!({"email": "TWO@x.test", "title": "CFO"})),
            json!({"type": "identify", "traits": {"email": "three@x.test"}}),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 2), ("created", 1)].into());
    let leads = bench.simulator.leads();
    assert_eq!(leads[0]["name"], json!("Renamed"), "the Lead of the person found is updated");
    let contacts = &leads[0]["contacts"];
    assert_eq!((&contacts[0]["title"], &contacts[1]["title"]), (&json!("CTO"), &json!("CFO")));
    assert_eq!(contacts[1][USER], json!("u2"));
    assert_eq!(
        leads[1]["name"],
        json!("x.test"),
        "a Lead is named after the person, else the email's domain"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lead_without_company_is_adopted_and_one_of_another_company_is_not() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"name": "Free", USER: "u1"}]));
    bench.lead(Some("other"), json!([{"name": "Bound", USER: "u2"}]));
    let company = json!({"id": "acme", "name": "Acme"});
    let metrics = bench
        .sync(&[
            identify("u1", json!({"company": company})),
            identify("u2", json!({"company": {"id": "new"}})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 1), ("created", 1)].into());
    let leads = bench.simulator.leads();
    assert_eq!((&leads[0][COMPANY], &leads[0]["name"]), (&json!("acme"), &json!("Acme")));
    assert_eq!(leads[1][COMPANY], json!("other"));
    assert_eq!((&leads[2][COMPANY], &leads[2]["contacts"][0][USER]), (&json!("new"), &json!("u2")));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_matches_the_ten_oldest_contacts_and_the_oldest_lead_are_updated() {
    let bench = Bench::new().await;
    let made = |n: u32| {
        json!({"name": "Twin", "date_created": format!("2026-01-{n:02}T00:00:00.000000+00:00"),
               "emails": [{"email": "twin@x.test"}]})
    };
    for n in (1..=12).rev() {
        let date = format!("2026-01-{n:02}T00:00:00.000000+00:00");
        bench.simulator.add_lead(json!({"name": "L", "date_created": date, "contacts": [made(n)]})).unwrap();
    }
    for (name, date) in [("Younger", "2026-02-02"), ("Older", "2026-02-01")] {
        let date = format!("{date}T00:00:00.000000+00:00");
        bench.simulator.add_lead(json!({"name": name, "date_created": date, COMPANY: "twice"})).unwrap();
    }
    let metrics = bench
        .sync(&[
            json!({"type": "identify", "traits": {"email": "twin@x.test", "title": "Found"}}),
            identify("u", json!({"company": {"id": "twice"}})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("updated", 1), ("added", 1)].into());
    let contacts = bench.simulator.contacts();
    let mut found: Vec<_> = contacts.iter().filter(|contact| contact["title"] == "Found").collect();
    found.sort_by_key(|contact| contact["date_created"].to_string());
    assert_eq!(found.len(), 10);
    assert!(found.iter().all(|contact| contact["date_created"].as_str().unwrap() < "2026-01-11"));
    let lead = |name: &str| bench.simulator.leads().into_iter().find(|lead| lead["name"] == name).unwrap();
    assert_eq!(lead("Older")["contacts"].as_array().unwrap().len(), 1);
    assert_eq!(lead("Younger")["contacts"].as_array().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_contact_of_another_person_is_left_alone() {
    let bench = Bench::new().await;
    bench.lead(None, json!([{"name": "Someone", USER: "u1", "emails": [{"email": "shared@x.test"}]}]));
    let metrics = bench.sync(&[identify("u2", json!({"email": "shared@x.test", "name": "Other"}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!(metrics.count("contact_conflicts_total"), 1);
    let contacts = bench.simulator.contacts();
    assert_eq!((contacts.len(), &contacts[0]["name"]), (2, &json!("Someone")));
}

/// The switch, the company of the Lead that is there, its Contacts, what is written, what is counted.
type Case<'a> = (&'a str, Option<&'a str>, &'a Value, &'a [&'a str], &'a str);

/// Each switch turned off, in a case where it applies.
#[tokio::test(flavor = "multi_thread")]
async fn switches_skip_steps_with_a_reason() {
    let in_acme = identify("u1", json!({"title": "New", "company": {"id": "acme", "name": "Acme"}}));
    let known = json!([{"name": "Jane", USER: "u1"}]);
    let cases: [Case<'_>; 7] = [
        ("allow_creating_new_leads", None, &json!([]), &[], "creating_leads_is_off"),
        ("allow_creating_new_contacts", None, &json!([]), &["POST lead"], "creating_contacts_is_off"),
        ("allow_creating_new_contacts", Some("acme"), &json!([]), &["PUT lead"], "creating_contacts_is_off"),
        ("allow_updating_existing_leads", Some("acme"), &known, &["PUT contact"], "updating_leads_is_off"),
        ("allow_updating_existing_contacts", Some("acme"), &known, &["PUT lead"], "updating_contacts_is_off"),
        (
            "allow_creating_duplicate_contacts",
            Some("other"),
            &known,
            &["POST lead"],
            "duplicate_contacts_are_off",
        ),
        // Found through the company, but the person is known elsewhere.
        (
            "allow_creating_duplicate_contacts",
            Some("both"),
            &known,
            &["PUT lead"],
            "duplicate_contacts_are_off",
        ),
    ];
    for (switch, company, contacts, writes, counted) in cases {
        let bench = Bench::new().await.set(&format!("SWITCHES_{}", switch.to_uppercase()), "false");
        match company {
            None => {}
            Some("both") => {
                bench.lead(Some("acme"), json!([]));
                bench.lead(Some("other"), contacts.clone());
            }
            Some(id) => drop(bench.lead(Some(id), contacts.clone())),
        }
        let metrics = bench.sync(std::slice::from_ref(&in_acme)).await;
        assert_eq!(bench.writes(), writes, "{switch} {company:?}");
        assert_eq!(metrics.count(&format!("steps_refused_total{{switch=\"{counted}\"}}")), 1, "{switch}");
        assert_eq!(metrics.outcome("skipped") > 0, writes.is_empty(), "{switch} {company:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn write_rules_and_custom_fields_come_from_the_configuration() {
    let bench = Bench::new()
        .await
        .set("MAPPING_CONTACT_TITLE", "{ write = \"if_empty\" }")
        .set("MAPPING_LEAD_NAME", "{ write = \"on_create\" }")
        .set("MAPPING_LEAD_CUSTOM", "{ cf_leadplan = { from = [\"$.traits.plan\"] } }");
    let event = |title: &str, name: &str, plan: &str| {
        identify("u1", json!({"title": title, "plan": plan, "company": {"id": "acme", "name": name}}))
    };
    bench.sync(&[event("First", "Acme", "free"), event("Second", "Renamed", "pro")]).await;
    let lead = bench.the_lead();
    assert_eq!((&lead["name"], &lead["custom.cf_leadplan"]), (&json!("Acme"), &json!("pro")));
    assert_eq!(lead["contacts"][0]["title"], json!("First"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_not_for_close_are_skipped_and_counted() {
    let bench = Bench::new().await;
    let person = |extra: Value| {
        let mut event = jane();
        event.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        event
    };
    let metrics = bench
        .sync(&[
            person(json!({"type": "track"})),
            person(json!({"integrations": {"All": false}})),
            person(json!({"integrations": {"Close": false}})),
            person(json!({"integrations": {"All": false, "Close": true}})),
        ])
        .await;
    assert_eq!(metrics.outcomes(), [("created", 1), ("skipped", 3)].into());
    assert_eq!(metrics.count("messages_skipped_total{reason=\"trigger\"}"), 1);
    assert_eq!(metrics.count("messages_skipped_total{reason=\"integrations\"}"), 2);
}

/// Messages about one person apply in their order, while others run concurrently.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_many_events_about_a_person_wins() {
    let bench = Bench::new().await;
    let events: Vec<_> = (0..60)
        .map(|n| {
            identify(&format!("u{}", n % 3), json!({"name": format!("Name {n}"), "company": {"id": "acme"}}))
        })
        .collect();
    bench.sync(&events).await;
    let lead = bench.the_lead();
    let mut names: Vec<_> =
        lead["contacts"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["Name 57", "Name 58", "Name 59"]);
}

/// Another user id makes them different people, and how many they are makes no event more expensive.
#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_people_with_one_email_costs_no_calls() {
    const PEOPLE: usize = 150;
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let before = bench.simulator.requests().len();
    let person = |number| identify(&format!("u{number}"), json!({"email": "office@acme.test"}));
    bench.publish(&(0..PEOPLE).map(person).collect::<Vec<_>>()).await;
    worker.settled(PEOPLE).await;
    assert_eq!(bench.simulator.contacts().len(), PEOPLE);
    let calls = bench.simulator.requests().len() - before;
    // A search, a creation, and reads of those that others create at the same time. Once, each read all: 77 calls.
    assert!(calls <= 10 * PEOPLE, "{calls} calls for {PEOPLE} people");
    worker.terminate().await;
}
