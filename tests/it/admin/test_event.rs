//! The dry run of a test event.

use reqwest::StatusCode;
use serde_json::json;

use super::{Browser, without_token};
use crate::support::identify;

#[tokio::test(flavor = "multi_thread")]
async fn a_test_event_is_explained_and_nothing_is_written() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({"email": "ada@example.test", "company": {"id": "c1"}}))]).await;
    worker.settled(1).await;
    let before = bench.writes();
    let browser = Browser::of(&worker).await;
    let event = identify(
        "u1",
        json!({"name": "<script>alert(1)</script>", "title": "Ada's \"title\"", "company": {"id": "c1"}}),
    );
    let test = async |fields: &[(&str, &str)]| {
        let page = browser.submit("/page/-/test", "/page/-/test", fields).await;
        assert_eq!(page.status, StatusCode::OK, "{page:#?}");
        page
    };
    // Redacted: field names and results.
    let event = event.to_string();
    let redacted = test(&[("event", &event)]).await;
    redacted.assert_has(&["update contact", "<th scope=\"row\">title</th><td><code>set</code></td>", "•••"]);
    let (result, form) = redacted.text.split_once("<textarea").unwrap();
    assert!(!result.contains("alert") && !result.contains("Ada"), "{result}");
    assert!(form.contains("&lt;script&gt;alert(1)"), "the event stays in the form: {form}");
    redacted.assert_lacks(&["<script"]);
    // Values are shown on request.
    let whole = test(&[("event", &event), ("personal", "yes")]).await;
    whole.assert_has(&["&lt;script&gt;alert(1)&lt;/script&gt;"]);
    whole.assert_lacks(&["<script"]);
    test(&[("event", "not an event")]).await.assert_has(&["dead-lettered", "malformed"]);
    // Nothing was written or counted.
    assert_eq!(bench.writes(), before);
    assert_eq!(worker.metrics().await.settled().to_string(), "1");
    let audited = worker.audited();
    assert_eq!(
        audited.iter().map(|[what, who, _]| (what.as_str(), who.as_str())).collect::<Vec<_>>(),
        [("test event", "local"), ("test event with personal data", "local"), ("test event", "local")]
    );
    assert!(!worker.log().contains("alert(1)"));
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_close_the_page_shows_an_error() {
    let bench = without_token().await.set("CLOSE_API_URL", "http://127.0.0.1:1/api/v1/");
    let worker = bench.starting_worker();
    worker.until("paused", async |worker| worker.is("paused", Some("unreachable")).await).await;
    let browser = Browser::of(&worker).await;
    let page = browser.submit("/page/-/test", "/page/-/test", &[("event", "{}")]).await;
    assert_eq!(page.status, StatusCode::SERVICE_UNAVAILABLE);
    page.assert_has(&["has not passed the preflight check of Close yet"]);
    worker.terminate().await;
}
