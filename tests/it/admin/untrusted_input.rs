//! Malicious and broken clients.

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Browser, TOKEN, with_token, without_token};
use crate::support::{TIMEOUT, Worker};

async fn connect(worker: &Worker) -> TcpStream {
    let base = worker.base().await;
    TcpStream::connect(base.strip_prefix("http://").unwrap()).await.unwrap()
}

/// Sends bytes and returns the response up to the end of the connection.
async fn raw(worker: &Worker, bytes: &str) -> String {
    let mut stream = connect(worker).await;
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(TIMEOUT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_above_the_size_limit_is_rejected_without_reading_it() {
    let bench = without_token().await.set("WORKER_MAX_MESSAGE_BYTES", "10000");
    let worker = bench.worker().await;
    let browser = Browser::of(&worker).await;
    // A client that continues to send may find the connection closed before it reads the response.
    let csrf_token = browser.get("/page/-/test").await.csrf_token().to_owned();
    let huge = format!("csrf_token={csrf_token}&event={}", "x".repeat(200_000));
    let request = browser.http.post(format!("{}/page/-/test", browser.base)).body(huge);
    let kind = "application/x-www-form-urlencoded";
    let answer = request.header("content-type", kind).send().await;
    assert!(answer.is_err() || answer.unwrap().status() == StatusCode::PAYLOAD_TOO_LARGE);
    assert!(worker.audited().is_empty());
    // An event within the limit is accepted. URL encoding triples its size.
    let event = format!("{:?}", "\u{1}".repeat(9000)).replace("\\u{1}", "%");
    let page = browser.submit("/page/-/test", "/page/-/test", &[("event", &event)]).await;
    assert_eq!(page.status, StatusCode::OK);
    // A wrong content length, and none.
    let head = "POST /page/-/test HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                content-type: application/x-www-form-urlencoded\r\n";
    let answer = raw(&worker, &format!("{head}content-length: 99999999999\r\n\r\nevent=x")).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let mut stream = connect(&worker).await;
    stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.unwrap();
    // The server may close the connection before everything is sent.
    while stream.write_all(chunk.as_bytes()).await.is_ok() {}
    assert_eq!(browser.get("/page/-").await.status, StatusCode::OK);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_requests_are_rejected() {
    let worker = with_token().await.worker().await;
    let get =
        |path: &str, headers: &str| format!("GET {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
    for (request, status) in [
        (get("/page/-", ""), 421),
        (get("/page/-", "host: localhost\r\nhost: evil.example\r\n"), 421),
        (get("http://evil.example/page/-", "host: localhost\r\n"), 421),
        (get("/page/-", "host: \u{1f600}\r\n"), 421),
        (get("/page/-", "host: localhost\r\n"), 401),
        (get("/page/../metrics", "host: localhost\r\n"), 401),
        (get("/page/%2e%2e/%2e%2e/etc/passwd", "host: localhost\r\n"), 401),
        (get("/page/%0d%0aset-cookie:%20a=b", "host: localhost\r\n"), 401),
        (get("/page/-", "host: localhost\r\nx-folded: a\r\n b\r\n"), 400),
        (get("/page/-", &format!("host: localhost\r\ncookie: {}\r\n", "x".repeat(500_000))), 431),
        (
            format!(
                "DELETE /page/- HTTP/1.1\r\nconnection: close\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
            ),
            405,
        ),
    ] {
        let answer = raw(&worker, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.200}: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("\r\nset-cookie: a=b"), "{answer}");
    }
    worker.terminate().await;
}

/// An event of the default size limit. URL encoding triples its size.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_event_can_be_tested() {
    let worker = without_token().await.unset("WORKER_MAX_MESSAGE_BYTES").worker().await;
    let browser = Browser::of(&worker).await;
    let event = |size: usize| {
        let (head, tail) = (r#"{"type":"identify","extra":""#, r#""}"#);
        format!("{head}{}{tail}", "%".repeat(size - head.len() - tail.len()))
    };
    let mebi = 1 << 20;
    for (size, reason) in [(mebi, "no_identity"), (mebi + 1, "malformed")] {
        let page = browser.submit("/page/-/test", "/page/-/test", &[("event", &event(size))]).await;
        assert_eq!(page.status, StatusCode::OK);
        page.assert_has(&[reason]);
    }
    worker.terminate().await;
}

/// Some clients send only a part of a request, and some do not read the response.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_do_not_delay_others_and_time_out() {
    let worker = without_token().await.worker().await;
    let mut slow = Vec::new();
    for start in ["GET /pa", "POST /page/-/test HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nev"]
    {
        for _ in 0..40 {
            let mut stream = connect(&worker).await;
            stream.write_all(start.as_bytes()).await.unwrap();
            slow.push(stream);
        }
    }
    for _ in 0..10 {
        let mut stream = connect(&worker).await;
        for _ in 0..100 {
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        }
        slow.push(stream);
    }
    let browser = Browser::of(&worker).await;
    for path in ["/metrics", "/healthz", "/readyz", "/page/-"] {
        assert_eq!(browser.get(path).await.status, StatusCode::OK, "{path}");
    }
    // All were answered while the slow clients were still connected. Later these are disconnected.
    let mut answer = Vec::new();
    let open = slow[0].try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
    tokio::time::timeout(TIMEOUT, slow[0].read_to_end(&mut answer)).await.expect("a time-out").unwrap();
    worker.terminate().await;
}

/// Connections beyond the limit are closed at once, because the worker needs file descriptors.
#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_connections_is_limited() {
    let worker = without_token().await.worker().await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(connect(&worker).await);
    }
    // The last connections are closed, the first ones are not.
    let mut answer = [0; 1];
    let last = tokio::time::timeout(TIMEOUT, idle.last_mut().unwrap().read(&mut answer)).await;
    assert!(matches!(last, Ok(Ok(0) | Err(_))), "{last:?}");
    idle[0].write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    assert_eq!(idle[0].read(&mut answer).await.unwrap(), 1);
    drop(idle);
    worker.until("answering", async |worker| worker.page("/healthz").await.is_some()).await;
    worker.terminate().await;
}
