//! `close-sync plan`: explains each event and writes nothing.

use serde_json::{Value, json};

use crate::support::{Bench, identify};

const USER: &str = "custom.cf_contactuserid";

fn lines(events: &[Value]) -> Vec<u8> {
    events.iter().flat_map(|event| [event.to_string(), "\n".to_owned()]).collect::<String>().into_bytes()
}

/// Replaces the ids in a transcript by numbers, in the order of their first occurrence.
fn without_ids(transcript: &str) -> String {
    let mut ids: Vec<String> = Vec::new();
    let mut text = transcript.to_owned();
    for word in transcript.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        let is_id =
            ["lead_", "cont_", "stat_"].iter().any(|prefix| word.starts_with(prefix) && word.len() > 20);
        if is_id && !ids.iter().any(|other| other == word) {
            ids.push(word.to_owned());
            text = text.replace(word, &format!("{}{}", word.get(..5).unwrap(), ids.len()));
        }
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_explains_each_event_and_writes_nothing() {
    let bench = Bench::new()
        .await
        .set("MAPPING_LEAD_NAME", "{ write = \"on_create\" }")
        .set(
            "MAPPING_LEAD_CUSTOM",
            "{ Plan = { from = [\"$.traits.plan\"] }, Region = { from = [\"$.traits.region\"] } }",
        )
        .set("SWITCHES_ALLOW_CREATING_NEW_CONTACTS", "false");
    bench.lead(
        Some("acme"),
        json!([
            {"name": "Jane", USER: "u1", "emails": [{"email": "jane@acme.test"}]},
            {"name": "Info", "emails": [{"email": "info@acme.test"}]},
        ]),
    );
    bench.lead(None, json!([{"name": "Other", USER: "u9", "emails": [{"email": "shared@x.test"}]}]));
    let writes = bench.writes().len();
    let company = json!({"id": "acme", "name": "Acme"});
    let events = lines(&[
        identify(
            "u1",
            json!({"email": "j@acme.test", "name": "Jane Doe", "plan": "PRO", "region": "EU", "company": company}),
        ),
        identify("u1", json!({"name": "Jane Doe", "phone": "n/a", "company": company})),
        identify("u2", json!({"email": "bob@acme.test", "company": company})),
        json!({"userId": "u3", "traits": {"email": "shared@x.test"}}),
        json!({"type": "track", "messageId": "m-5"}),
        json!({"type": "identify", "anonymousId": "a"}),
        json!({"type": "identify", "traits": {"email": "nobody"}}),
        json!([]),
    ]);
    insta::assert_snapshot!(
        "a_plan_for_people",
        without_ids(&bench.transcript(&["plan", "-"], &events).await)
    );
    let json = bench.transcript(&["plan", "-", "--json", "--strict"], &events).await;
    insta::assert_snapshot!("a_plan_for_scripts", without_ids(&json));
    assert_eq!(bench.writes().len(), writes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_contain_one_event_a_list_or_lines() {
    let bench = Bench::new().await;
    let event = identify("u1", json!({"email": "jane@acme.test"}));
    let forms = [
        serde_json::to_vec_pretty(&event).unwrap(),
        serde_json::to_vec_pretty(&json!([event])).unwrap(),
        lines(std::slice::from_ref(&event)),
    ];
    let mut plans = Vec::new();
    for form in forms {
        plans.push(String::from_utf8(bench.run(&["plan", "-", "--json"], &form).await.stdout).unwrap());
    }
    assert!(plans.iter().all(|plan| *plan == plans[0] && plan.lines().count() == 1), "{plans:#?}");
    assert!(plans[0].contains("\"outcome\":\"created\""), "{}", plans[0]);

    let ok = bench.run(&["plan", "-", "--strict"], &lines(&[event])).await;
    assert_eq!(ok.status.code(), Some(0));
    insta::assert_snapshot!("no_such_file", bench.transcript(&["plan", "nowhere.json"], b"").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_fails_without_access_to_close() {
    let bench = Bench::new().await.set("CLOSE_API_KEY", "api_wrong.key");
    insta::assert_snapshot!("a_plan_without_a_key", bench.transcript(&["plan", "-"], b"{}").await);
    let bench = Bench::new().await.set("CLOSE_LEAD_COMPANY_ID_FIELD", "Seats");
    insta::assert_snapshot!("a_plan_without_a_field", bench.transcript(&["plan", "-"], b"{}").await);
}
