//! The forms in which Close, or what stands in front of it, may answer, and what becomes of the messages.

use close_sync_simulator::{
    CustomField, Effect, ErrorShape, ErrorTexts, Fault, FaultBody, FieldKind, LastCursor, Owner, SearchRows,
    When,
};
use serde_json::{Value, json};

use crate::support::{Bench, Metrics, identify};

const RULES: &str = "{ Region = { from = [\"$.traits.region\"] } }";

fn region() -> CustomField {
    CustomField::new("cf_leadregion", "Region", FieldKind::Text, Owner::Lead)
}

fn dropped(metrics: &Metrics, reason: &str) -> u32 {
    metrics.count(&format!("fields_dropped_total{{reason=\"{reason}\"}}"))
}

/// The Lead of a company.
fn lead(bench: &Bench, company: &str) -> Value {
    let leads = bench.simulator.leads();
    leads.into_iter().find(|lead| lead["custom.cf_leadcompanyid"] == company).expect("the company's Lead")
}

/// Close refuses a phone that close-sync takes for one, in every shape. Everything else is written, and the phone is
/// not sent again with the next event of the person.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_value_costs_only_itself_in_every_shape_of_errors() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let shapes = [
        (ErrorShape::Nested, ErrorTexts::Cleancat),
        (ErrorShape::Plain, ErrorTexts::Cleancat),
        (ErrorShape::Dotted, ErrorTexts::Pydantic),
        (ErrorShape::List, ErrorTexts::Cleancat),
        (ErrorShape::General, ErrorTexts::Cleancat),
        (ErrorShape::Detail, ErrorTexts::Pydantic),
    ];
    for (number, (shape, texts)) in (1..).zip(shapes) {
        bench.simulator.behave(|close| (close.error_shape, close.error_texts) = (shape, texts));
        let company = format!("c{number}");
        let event = identify(
            &format!("u{number}"),
            json!({"name": "Jane", "email": format!("u{number}@acme.test"), "title": "CEO",
                "phone": "+999 123456", "company": {"id": company}}),
        );
        bench.publish(std::slice::from_ref(&event)).await;
        worker.settled(2 * number - 1).await;
        let written = lead(&bench, &company);
        let contact = &written["contacts"][0];
        assert_eq!((&contact["title"], &contact["phones"]), (&json!("CEO"), &json!([])), "{shape:?}");
        let writes = bench.writes().len();
        bench.publish(&[event]).await;
        let metrics = worker.settled(2 * number).await;
        assert_eq!(bench.writes().len(), writes, "{shape:?}: nothing is sent again");
        let number = u32::try_from(number).unwrap();
        assert_eq!(metrics.outcomes(), [("created", number), ("unchanged", number)].into(), "{shape:?}");
        assert_eq!(dropped(&metrics, "refused_by_close"), number, "{shape:?}");
        assert_eq!(dropped(&metrics, "refused_before"), number, "{shape:?}");
    }
    worker.terminate().await;
}

/// Close names neither the field nor its text. The message is written without what is optional.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_without_a_field_costs_the_optional_values_only() {
    let bench = Bench::new().await;
    bench.simulator.behave(|close| close.error_shape = ErrorShape::Vague);
    let worker = bench.worker().await;
    let traits = json!({"name": "Jane", "email": "u1@acme.test", "title": "CEO", "phone": "+999 123456",
        "company": {"id": "acme", "name": "Acme"}});
    bench.publish(&[identify("u1", traits.clone())]).await;
    let metrics = worker.settled(1).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    assert_eq!((dropped(&metrics, "refused_by_close"), worker.events("refusal_without_field")), (1, 1));
    let written = bench.the_lead();
    let contact = &written["contacts"][0];
    assert_eq!((&written["name"], &contact["name"]), (&json!("Acme"), &json!("Jane")));
    assert_eq!(contact["title"], "CEO");
    assert_eq!(contact["emails"][0]["email"], "u1@acme.test");
    // With another phone, what was left out is written.
    let mut traits = traits;
    traits["phone"] = json!("+1 800 444 5555");
    bench.publish(&[identify("u1", traits)]).await;
    worker.settled(2).await;
    let contact = &bench.the_lead()["contacts"][0];
    assert_eq!((&contact["title"], &contact["phones"][0]["phone"]), (&json!("CEO"), &json!("+18004445555")));
    worker.terminate().await;
}

/// A mapped field is deleted in Close. No message is lost, in whatever shape Close says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_field_costs_no_message_in_any_shape_of_errors() {
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", RULES);
    bench.simulator.add_field(region()).unwrap();
    let worker = bench.worker().await;
    bench.simulator.remove_field("cf_leadregion");
    let shapes = [
        (ErrorShape::Dotted, ErrorTexts::Cleancat),
        (ErrorShape::List, ErrorTexts::Cleancat),
        (ErrorShape::General, ErrorTexts::Cleancat),
        (ErrorShape::Detail, ErrorTexts::Pydantic),
    ];
    for (number, (shape, texts)) in (1..).zip(shapes) {
        bench.simulator.behave(|close| (close.error_shape, close.error_texts) = (shape, texts));
        let company = format!("c{number}");
        let traits = json!({"title": "CEO", "region": "north", "company": {"id": company}});
        bench.publish(&[identify(&format!("u{number}"), traits)]).await;
        let metrics = worker.settled(number).await;
        assert_eq!(metrics.outcome("created"), u32::try_from(number).unwrap(), "{shape:?}");
        assert_eq!(lead(&bench, &company)["contacts"][0]["title"], "CEO", "{shape:?}");
    }
    worker.terminate().await;
}

/// The field that Leads are found by is deleted in Close. The worker waits for it, and no message pays.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_field_pauses_consumption() {
    let bench = Bench::new().await;
    let key = bench.simulator.fields().into_iter().find(|field| field.id == "cf_leadcompanyid").unwrap();
    let worker = bench.worker().await;
    bench.simulator.remove_field(&key.id);
    bench.publish(&[identify("u1", json!({"company": {"id": "acme"}}))]).await;
    worker.until("paused", async |worker| worker.is("paused", Some("lookup_field")).await).await;
    bench.simulator.add_field(key).unwrap();
    let metrics = worker.settled(1).await;
    assert_eq!((metrics.outcome("created"), bench.depth(".dead").await), (1, 0));
    worker.terminate().await;
}

/// The same for the field that people are found by, when Close names no field. The Lead is known, so no search names the
/// field either.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_field_pauses_consumption_when_close_names_no_field() {
    let bench = Bench::new().await;
    bench.simulator.behave(|close| close.error_shape = ErrorShape::Vague);
    let key = bench.simulator.fields().into_iter().find(|field| field.id == "cf_contactuserid").unwrap();
    let worker = bench.worker().await;
    let event = |user: &str| identify(user, json!({"title": "CEO", "company": {"id": "acme"}}));
    bench.publish(&[event("u1")]).await;
    worker.settled(1).await;
    bench.simulator.remove_field(&key.id);
    bench.publish(&[event("u2")]).await;
    worker.until("paused", async |worker| worker.is("paused", Some("lookup_field")).await).await;
    bench.simulator.add_field(key).unwrap();
    let metrics = worker.settled(2).await;
    assert_eq!((metrics.outcome("added"), metrics.outcome("dead"), bench.depth(".dead").await), (1, 0, 0));
    worker.terminate().await;
}

/// A proxy answers 404 for every Lead that is read, as long as the worker tries. No record counts as gone.
#[tokio::test(flavor = "multi_thread")]
async fn the_404_of_a_proxy_creates_no_second_record() {
    let bench = Bench::new().await.set("RETRY_IN_PLACE", "20s");
    bench.lead(Some("acme"), json!([{"custom.cf_contactuserid": "u1"}]));
    let effect = Effect::Status { code: 404, body: FaultBody::Html, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("GET", "/lead/"));
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({"title": "CEO", "company": {"id": "acme"}}))]).await;
    worker
        .until("tried again", async |_| {
            bench.simulator.request_count("GET", "/lead/") > 3
                || bench.simulator.request_count("POST", "/lead/") > 0
        })
        .await;
    bench.simulator.clear_faults();
    let metrics = worker.settled(1).await;
    assert_eq!(metrics.outcomes(), [("updated", 1)].into());
    assert_eq!(bench.the_lead()["contacts"][0]["title"], "CEO");
    worker.terminate().await;
}

/// A write waits for as long as a 503 asks, and uses no attempt meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn the_retry_after_of_a_503_is_obeyed() {
    let bench = Bench::new().await;
    bench.simulator.behave(|close| close.retry_after = Some(3));
    let effect = Effect::Status { code: 503, body: FaultBody::Html, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").times(1));
    let metrics = bench.sync(&[identify("u1", json!({}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
    let requests = bench.simulator.requests().into_iter();
    let sent: Vec<_> =
        requests.filter(|request| request.method == "POST" && request.path == "/lead/").collect();
    assert_eq!(sent.len(), 2);
    let waited = sent[1].at.duration_since(sent[0].at);
    assert!(waited.as_secs_f64() >= 2.9, "waited only {waited:?}");
}

/// Rows with nothing but their ids, and an empty cursor at the end.
#[tokio::test(flavor = "multi_thread")]
async fn bare_rows_of_a_search_find_the_records() {
    let bench = Bench::new().await;
    bench.simulator.behave(|close| {
        (close.search_rows, close.last_cursor) = (SearchRows::OnlyIds, LastCursor::Empty);
    });
    bench.lead(Some("acme"), json!([{"emails": [{"email": "jane@acme.test"}]}]));
    bench.lead(Some("globex"), json!([]));
    let event = |company: &str| {
        identify(company, json!({"email": format!("jane@{company}.test"), "company": {"id": company}}))
    };
    let metrics = bench.sync(&[event("acme"), event("globex")]).await;
    assert_eq!(metrics.outcomes(), [("added", 1), ("updated", 1)].into());
    assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (2, 2));
}

/// An empty cursor ends the rows, so a shared email needs no second search.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_cursor_costs_no_search() {
    let bench = Bench::new().await;
    bench.simulator.behave(|close| close.last_cursor = LastCursor::Empty);
    bench.lead(None, json!([{"emails": [{"email": "jane@acme.test"}]}]));
    let metrics = bench.sync(&[identify("u1", json!({"email": "jane@acme.test"}))]).await;
    assert_eq!(metrics.outcomes(), [("updated", 1)].into());
    assert_eq!(bench.simulator.request_count("POST", "/data/"), 1);
}
