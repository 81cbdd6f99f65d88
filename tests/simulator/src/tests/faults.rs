//! Rate limits and scripted faults.

use super::*;

#[tokio::test]
async fn rate_limits_are_enforced_and_sent_as_headers() {
    let limits = Limits { search: Rate::new(2, 60), others: Rate::new(1, 60), ..Limits::documented() };
    let (simulator, client) = start(Settings { limits, ..Settings::fast() }).await;
    let search = json!({"query": {"type": "match_all"}});
    let first = client.post("data/search/", search.clone()).await;
    assert!(first.header("ratelimit").unwrap().starts_with("limit=2; remaining=1; reset="));
    let broken = client.post("data/search/", json!({})).await;
    assert_eq!(broken.status, 400, "an invalid request takes a token too");
    let refused = client.post("data/search/", search).await;
    assert_eq!(refused.status, 429);
    assert!(refused.header("ratelimit").unwrap().starts_with("limit=2; remaining=0; reset="));
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&retry_after));
    assert_eq!(refused.json()["error"]["rate_limit_type"], "key");

    let wrong = Client { key: "wrong".into(), ..Client::new(&simulator) };
    assert_eq!(wrong.get("me/").await.status, 401);
    assert_eq!(wrong.get("me/").await.status, 429, "a 401 takes a token too");
    assert_eq!(client.get("me/").await.status, 200, "each key has its own bucket");
    assert_eq!(simulator.request_count("POST", "data/search/"), 3);
    let statuses: Vec<_> = simulator.requests().into_iter().map(|request| request.status).collect();
    assert_eq!(statuses, [200, 400, 429, 401, 429, 200].map(Some));
}

#[tokio::test]
async fn responses_are_lost_before_or_after_the_write() {
    let (simulator, client) = start(Settings::fast()).await;
    for (effect, written) in [
        (Effect::DropConnection { when: When::BeforeCommit }, 0),
        (Effect::DropConnection { when: When::AfterCommit }, 1),
        (Effect::Timeout { ms: 50, when: When::BeforeCommit }, 1),
        (Effect::Timeout { ms: 50, when: When::AfterCommit }, 2),
    ] {
        simulator.fault(Fault::new(effect.clone()).on("POST", "/lead/").times(1));
        let lost = Client::send(client.request(Method::POST, "lead/").json(&company("a"))).await;
        assert!(lost.is_err(), "{effect:?}");
        assert_eq!(simulator.leads().len(), written, "{effect:?}");
        assert_eq!(client.get("me/").await.status, 200, "the next connection works");
    }
    let statuses: Vec<_> = simulator.requests().into_iter().map(|request| request.status).collect();
    assert_eq!(statuses, [None, Some(200), None, Some(200), None, Some(200), None, Some(200)]);
}

#[tokio::test]
async fn a_dropped_connection_sends_no_byte() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (simulator, _) = start(Settings::fast()).await;
    simulator.fault(Fault::new(Effect::DropConnection { when: When::AfterCommit }));
    let mut stream = tokio::net::TcpStream::connect(simulator.addr()).await.unwrap();
    let request =
        "GET /api/v1/me/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YXBpX3NpbXVsYXRvci5rZXk6\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    assert!(ended.is_ok() && answer.is_empty(), "{ended:?} {answer:?}");
}

#[tokio::test]
async fn scripted_statuses_and_hidden_limits() {
    let (simulator, client) = start(Settings::fast()).await;
    let status =
        |code, body, when| Fault::new(Effect::Status { code, body, when }).on("POST", "/lead/").times(1);
    simulator.fault(status(504, FaultBody::Empty, When::AfterCommit));
    simulator.fault(status(502, FaultBody::Html, When::BeforeCommit));
    simulator.fault(status(403, FaultBody::Text, When::BeforeCommit));
    for (code, text, kind, written) in [
        (504, "", "application/json", 1),
        (502, "<html>", "text/html; charset=utf-8", 1),
        (403, "Forbidden", "text/plain; charset=utf-8", 1),
    ] {
        let reply = client.post("lead/", company("a")).await;
        assert_eq!(reply.status, code);
        assert!(reply.text.starts_with(text), "{}", reply.text);
        assert_eq!(reply.header("content-type"), Some(kind));
        assert_eq!(simulator.leads().len(), written);
    }
    let limited = |with_headers| Fault::new(Effect::RateLimited { retry_after: 1.5, with_headers }).times(1);
    simulator.fault(limited(true));
    simulator.fault(limited(false));
    let with_headers = client.get("me/").await;
    assert_eq!((with_headers.status.as_u16(), with_headers.header("retry-after")), (429, Some("2")));
    assert_eq!(with_headers.header("ratelimit"), Some("limit=1000000; remaining=999999; reset=1.500000"));
    let without_headers = client.get("me/").await;
    assert_eq!((without_headers.status.as_u16(), without_headers.header("retry-after")), (429, Some("2")));
    assert_eq!(without_headers.header("ratelimit"), None);

    simulator.fault(Fault::new(Effect::Latency { ms: 100 }).times(1));
    let before = Instant::now();
    assert_eq!(client.get("me/").await.status, 200);
    assert!(before.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn a_delayed_write_happens_after_its_client_disconnected() {
    let (simulator, client) = start(Settings::fast()).await;
    simulator.fault(Fault::new(Effect::Latency { ms: 200 }).on("POST", "/lead/"));
    let request =
        client.request(Method::POST, "lead/").json(&company("a")).timeout(Duration::from_millis(50));
    assert!(Client::send(request).await.is_err_and(|error| error.is_timeout()));
    assert!(simulator.leads().is_empty());
    while simulator.leads().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn rate_limit_headers_have_the_chosen_form() {
    for (header_style, rate_limit_body, header, body) in [
        (HeaderStyle::Semicolon, RateLimitBody::Flat, Some("ratelimit"), "{\"message\""),
        (HeaderStyle::Legacy, RateLimitBody::Text, Some("x-rate-limit-reset"), "Too Many Requests"),
        (HeaderStyle::Proxy, RateLimitBody::Empty, Some("ratelimit-remaining"), ""),
        (HeaderStyle::Absent, RateLimitBody::Nested, None, "{\"error\""),
    ] {
        let settings = Settings::fast().with(|close| {
            (close.header_style, close.rate_limit_body) = (header_style, rate_limit_body);
        });
        let (simulator, client) = start(settings).await;
        simulator.set_limits(Limits { others: Rate::new(0, 8), ..Limits::unlimited() });
        let reply = client.get("me/").await;
        assert_eq!(reply.status, 429);
        assert!(reply.text.starts_with(body), "{}", reply.text);
        assert_eq!(reply.header("retry-after").is_some(), header.is_some());
        let n_headers = reply.headers.keys().filter(|name| name.as_str().contains("rate")).count();
        assert_eq!(n_headers > 0, header.is_some());
        assert!(header.is_none_or(|header| reply.header(header).is_some()), "{header_style:?}");
    }
}
