//! Malicious and broken clients.

use reqwest::StatusCode;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Browser, TOKEN, with_token, without_token};
use crate::support::{TIMEOUT, Worker, dead_letters, identify};

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
    // It would use the same connection again, so this is another client.
    let client = Browser::of(&worker).await;
    let csrf_token = client.get("/page/-/test").await.csrf_token().to_owned();
    let huge = format!("csrf_token={csrf_token}&event={}", "x".repeat(200_000));
    let request = client.http.post(format!("{}/page/-/test", client.base)).body(huge);
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

/// Idle connections and slow requests, of one address and of several, make room for new connections.
#[tokio::test(flavor = "multi_thread")]
async fn crowds_of_connections_do_not_keep_out_health_checks_and_metrics() {
    let worker = without_token().await.worker().await;
    let base = worker.base().await;
    let address: std::net::SocketAddr = base.strip_prefix("http://").unwrap().parse().unwrap();
    let slow = "POST /page/-/test HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nev";
    for (start, addresses) in [("", 1), (slow, 1), ("", 4), (slow, 4)] {
        let mut crowd = Vec::new();
        for n in 0..400_u16 {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            let last = u8::try_from(n % addresses).unwrap() + 1;
            socket.bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
            let mut stream = socket.connect(address).await.unwrap();
            stream.write_all(start.as_bytes()).await.unwrap();
            crowd.push(stream);
        }
        let browser = Browser::of(&worker).await;
        for path in ["/healthz", "/readyz", "/metrics", "/page/-"] {
            assert_eq!(browser.get(path).await.status, StatusCode::OK, "{path} {addresses}");
        }
        // The oldest connection made room.
        let mut answer = [0; 1];
        let oldest = tokio::time::timeout(TIMEOUT, crowd[0].read(&mut answer)).await;
        assert!(matches!(oldest, Ok(Ok(0) | Err(_))), "{oldest:?}");
    }
    worker.terminate().await;
}

/// The page of a dead letter is bounded, whatever the dead letter has.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_a_large_dead_letter_is_bounded() {
    use std::fmt::Write as _;

    let bench = without_token().await;
    let mebi = 1 << 20;
    let nested = format!("{}{}0{}", "[".repeat(100), "0,".repeat(mebi / 2 - 200), "]".repeat(100));
    let objects = format!("[{}0]", "{\"\":0},".repeat(mebi / 7 - 10));
    let quotes = "\"".repeat(mebi);
    let event = format!(
        r#"{{"userId":"u1","traits":{{"title":"{}","name":[{}0]}}}}"#,
        "&".repeat(mebi / 2),
        "[],".repeat(mebi / 8)
    );
    let mut headers = lapin::types::FieldTable::default();
    for n in 0..100 {
        headers.insert(
            format!("header-{n}").into(),
            lapin::types::AMQPValue::LongString("\"".repeat(500).into()),
        );
    }
    let properties = lapin::BasicProperties::default().with_headers(headers);
    let bodies = [nested, objects, quotes, event];
    // Without a limit of its own for memory, the worker would end at the largest of them.
    let worker = bench.worker().await;
    for body in &bodies {
        bench.publish_bytes(body.as_bytes(), properties.clone()).await;
    }
    worker.settled(bodies.len()).await;
    let browser = Browser::of(&worker).await;
    let mut sizes = String::new();
    for id in bench.dead_ids().await {
        let path = format!("/page/-/dead/message?id={id}");
        let redacted = browser.get(&path).await;
        let full = browser.submit(&path, "/page/-/dead/message", &[("id", &id), ("ask", "show")]).await;
        for page in [redacted, full] {
            write!(sizes, "{} ", page.text.len()).unwrap();
            assert_eq!(page.status, StatusCode::OK);
            assert!(page.text.len() < 2 << 20, "{sizes}");
        }
    }
    assert!(!sizes.is_empty());
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_on_a_page_take_any_id_as_one_word() {
    let id = "-x'; $(reboot) & \"y\" <z> #";
    let bench = without_token().await;
    bench.worker().await.terminate().await;
    // Names are shown where values are hidden.
    let names: serde_json::Map<_, _> =
        (0..2000).map(|n| (format!("{n}{}", "a".repeat(100)), 1.into())).collect();
    let event = identify("u1", names.into());
    let mut letter: Value = serde_json::from_str(&dead_letters::line(id, 0, &event)).unwrap();
    for n in 0..60 {
        letter["headers"][format!("x-{n}")] = "y".into();
    }
    bench.import(&letter.to_string()).await;
    let worker = bench.worker().await;
    let browser = Browser::of(&worker).await;
    let query: String = url::form_urlencoded::byte_serialize(id.as_bytes()).collect();
    let page = browser.get(&format!("/page/-/dead/message?id={query}")).await.text;
    let commands: Vec<_> = page.split("<code>close-sync ").skip(1).collect();
    assert_eq!(commands.len(), 2, "{page}");
    for command in commands {
        let text = command.split_once("</code>").unwrap().0;
        let text =
            text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&");
        let words = shlex::split(&text).unwrap();
        assert_eq!(words.last().map(String::as_str), Some(id), "{text}");
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let shown = bench.output(&[&words[..2], &["--no-plan"], &words[2..]].concat()).await;
        assert!(shown.contains("x-59"), "{text}: {shown}");
    }
    worker.terminate().await;
    let edited = ["dlq", "edit", "--patch", r#"{"traits": {"title": "Dr"}}"#, "--", id];
    let (_, _, said) = bench.run_text(&edited, "").await;
    // Too large for an edit.
    let command = said.split('`').find_map(|part| part.strip_prefix("close-sync ")).unwrap();
    let words = shlex::split(command).unwrap();
    assert_eq!(words, ["dlq", "export", &format!("--id={id}")], "{said}");
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    assert!(bench.output(&words).await.contains("reboot"));
}
