//! The metrics of Close's rate limits and of the time to drain the backlog.

use std::time::Instant;

use close_sync_simulator::{HeaderStyle, Limits, Rate, Settings};
use serde_json::json;

use crate::support::{Bench, identify};

#[tokio::test(flavor = "multi_thread")]
async fn the_time_to_drain_the_backlog_is_estimated() {
    let limits = Limits { lead: Rate::new(50, 1), ..Limits::unlimited() };
    // If merged, or settled as repeats, these events would need almost no calls.
    let bench = Bench::with(Settings { limits, ..Settings::fast() }).await;
    let bench = bench.set("WORKER_MERGE", "false").set("WORKER_RECHECK", "0s");
    let worker = bench.worker().await;
    let event =
        |n: usize| identify(&format!("u{}", n % 20), json!({"company": {"id": format!("c{}", n % 20)}}));
    bench.publish(&(0..20).map(event).collect::<Vec<_>>()).await;
    let before = worker.settled(20).await;
    assert_eq!(before.count("rate_limit_calls{endpoint=\"create_lead\"}"), 50);
    assert!(before.get("rate_limit_calls{endpoint=\"update_lead\"}").is_nan(), "Close has not reported it");

    // One read each, and 40 reads a second are ours.
    bench.publish(&(0..600).map(event).collect::<Vec<_>>()).await;
    let mut foreseen = None;
    worker
        .until("foreseeing", async |worker| {
            let metrics = worker.metrics().await;
            let (backlog, drain) = (metrics.get("backlog_messages"), metrics.get("drain_seconds"));
            foreseen = (backlog > 200.0 && drain.is_finite()).then(|| (Instant::now(), drain));
            foreseen.is_some()
        })
        .await;
    let (at, drain) = foreseen.unwrap();
    worker.settled(620).await;
    let took = at.elapsed().as_secs_f64();
    // The backlog was read up to five seconds before.
    assert!((took * 0.7 - 1.0..took * 1.3 + 6.0).contains(&drain), "estimated {drain} s, took {took} s");
    worker.until("done", async |worker| worker.metrics().await.get("backlog_messages") == 0.0).await;
    assert!(worker.metrics().await.get("drain_seconds") == 0.0);
    worker.terminate().await;
}

/// Tight limits, reported in every form and in none. All messages are synced, with few 429s.
#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_rate_limit_headers_is_understood() {
    for (style, most_refused) in [
        (HeaderStyle::Comma, 0),
        (HeaderStyle::Semicolon, 0),
        (HeaderStyle::SemicolonAndTriple, 0),
        (HeaderStyle::UnreadableAndTriple, 0),
        (HeaderStyle::Legacy, 0),
        (HeaderStyle::Proxy, 0),
        (HeaderStyle::Absent, 60),
    ] {
        let limits = Limits { lead: Rate::new(20, 1), contact: Rate::new(20, 1), ..Limits::unlimited() };
        let bench =
            Bench::with(Settings { limits, ..Settings::fast() }.with(|close| close.header_style = style))
                .await;
        let events: Vec<_> = (0..60).map(|n| identify(&format!("u{n}"), json!({}))).collect();
        let metrics = bench.sync(&events).await;
        assert_eq!(metrics.outcomes(), [("created", 60)].into(), "{style:?}");
        let refused = bench.simulator.requests().iter().filter(|request| request.status == Some(429)).count();
        assert!(refused <= most_refused, "{style:?}: {refused} of the calls refused");
    }
}

/// The strict and the loose reading of the search limit, the limit of the key and that of the organization.
#[tokio::test(flavor = "multi_thread")]
async fn no_reading_of_the_limits_is_exceeded() {
    for (search, organization_multiple, name) in [
        (Rate::new(16, 8), 3, "16 in 8 s"),
        (Rate::new(16, 1), 3, "16 in 1 s"),
        (Rate::new(16, 2), 1, "the organization's, shared with another key"),
    ] {
        let other = "api_simulator.other";
        let limits = Limits { search, organization_multiple, ..Limits::unlimited() };
        let settings = Settings { limits, more_api_keys: vec![other.to_owned()], ..Settings::fast() };
        let bench = Bench::with(settings).await;
        // Another key of the organization spends a quarter of what one key may.
        let url = format!("{}data/search/", bench.simulator.url());
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        let pace = std::time::Duration::from_secs(search.window.into()) / 4;
        let others = tokio::spawn(async move {
            let mut tick = tokio::time::interval(pace);
            loop {
                tick.tick().await;
                let _ = client.post(&url).basic_auth(other, Some("")).json(&json!({})).send().await;
            }
        });
        let worker = bench.worker().await;
        for n in 0..60 {
            bench.publish(&[identify(&format!("u{n}"), json!({}))]).await;
        }
        let metrics = worker.settled(60).await;
        others.abort();
        assert_eq!(metrics.outcomes(), [("created", 60)].into(), "{name}");
        let refused = metrics.count("close_requests_total{endpoint=\"search\",status=\"rate_limited\"}");
        assert_eq!(refused, 0, "{name}");
        worker.terminate().await;
    }
}
