//! The live page.

use close_sync_simulator::{Settings, Simulator};
use reqwest::StatusCode;
use reqwest::header::LOCATION;
use serde_json::json;

use super::{Browser, without_token};
use crate::support::{identify, people};

#[tokio::test(flavor = "multi_thread")]
async fn the_live_page_shows_the_state_and_the_load() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    let browser = Browser::of(&worker).await;
    let home = browser.get("/page").await;
    assert_eq!((home.status, home.header(LOCATION)), (StatusCode::SEE_OTHER, "/page/-"));
    browser.get("/page/-").await.assert_has(&[
        "standing by",
        "No messages settled yet",
        "http-equiv=\"refresh\"",
    ]);
    browser.get("/page/-?still=1").await.assert_lacks(&["http-equiv=\"refresh\""]);
    bench.publish(&people(3)).await;
    bench.publish_bytes(b"no event", lapin::BasicProperties::default()).await;
    worker.settled(4).await;
    let live = browser.get("/page/-").await;
    live.assert_has(&[
        r#"<span class="badge good">consuming</span>"#,
        r#"<th scope="row">created</th><td class="number">3</td>"#,
        r#"<th scope="row">malformed</th><td class="number">1</td>"#,
        r#"<th scope="row">create_lead</th>"#,
        "<dt>Settled per second</dt>",
    ]);
    // A pause shows its cause and the remedy.
    bench.simulator.set_api_key("api_another.key");
    bench.publish(&people(7)[3..]).await;
    worker.until("paused", async |worker| worker.is("paused", Some("unauthorized")).await).await;
    browser.get("/page/-").await.assert_has(&[
        r#"<span class="badge bad">paused</span> <code>unauthorized</code>"#,
        "set <code>close.api_key</code> to a key that is valid in Close",
    ]);
    // The worker does not consume, and the backlog is measured anyway.
    let backlog = "<dt>Backlog</dt><dd>4</dd>";
    worker.until("measured", async |_| browser.get("/page/-").await.text.contains(backlog)).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lag_of_search_is_shown_by_kind() {
    let bench = without_token().await;
    bench.simulator.behave(|close| close.set("search_lag", "1h").unwrap());
    bench.lead(None, json!([{"emails": [{"email": "jane@acme.test", "type": "office"}]}]));
    let worker = bench.worker().await;
    let browser = Browser::of(&worker).await;
    let [creation, key_change] =
        ["creation", "key_change"].map(|kind| format!("search_lag_seconds{{kind=\"{kind}\"}}"));
    let metrics = worker.metrics().await;
    assert!(metrics.get(&creation).is_nan() && metrics.get(&key_change).is_nan(), "not measured yet");

    // A new record, and one that gets a key. Search shows neither to the look-ups after them.
    let jane = identify("jane", json!({"email": "jane@acme.test"}));
    bench.publish(&[vec![jane], people(2)].concat()).await;
    worker.settled(3).await;
    let mut more = 3..;
    worker
        .until("measured", async |worker| {
            let number = more.next().unwrap();
            bench.publish(&people(number)[number - 1..]).await;
            let metrics = worker.metrics().await;
            metrics.get(&creation) > 0.0 && metrics.get(&key_change) > 0.0
        })
        .await;
    let readiness = worker.ready().await.1;
    let shown = |kind: &str| readiness["search_lag_seconds"][kind].as_f64();
    assert!(shown("creation") > Some(0.0) && shown("key_change") > Some(0.0), "{readiness}");
    browser.get("/page/-").await.assert_has(&[
        "Close's search shows new records after ",
        "Close's search shows new ids and emails after ",
    ]);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_destination_has_its_own_page() {
    let apac = Simulator::start(Settings::fast(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let bench = without_token().await.unset("CLOSE_API_KEY").set("DESTINATIONS", "{ emea = {}, apac = {} }");
    let keys = ["EMEA", "APAC"].map(|name| format!("DESTINATIONS_{name}_CLOSE_API_KEY"));
    let bench = bench.set(&keys[0], "api_simulator.key").set(&keys[1], "api_other.key");
    apac.set_api_key("api_other.key");
    let bench = bench.set("DESTINATIONS_APAC_CLOSE_API_URL", &apac.url());
    let worker = bench.worker().await;
    let browser = Browser::of(&worker).await;
    let home = browser.get("/page").await;
    assert_eq!(home.status, StatusCode::OK);
    home.assert_has(&[r#"<a href="/page/apac">apac</a>"#, r#"<a href="/page/emea">emea</a>"#]);
    bench.publish(&people(1)).await;
    worker.until("synced", async |_| apac.contacts().len() == 1).await;
    worker.until("shown", async |_| browser.get("/page/apac").await.text.contains("created")).await;
    browser.get("/page/apac/test").await.assert_has(&[r#"<span class="of">apac</span>"#]);
    for nowhere in
        ["/page/-", "/page/asia", "/page/..", "/page/apac/nothing", "/page/%00", "/page/apac%2ftest"]
    {
        assert_eq!(browser.get(nowhere).await.status, StatusCode::NOT_FOUND, "{nowhere}");
    }
    worker.terminate().await;
}
