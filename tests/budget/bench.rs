//! Measures how many calls to Close a set of events needs, and how the time compares with its lower bound.
//!
//! Runs the real worker on a real broker, against the simulator with Close's strict limits (close-api.md §2: search
//! 16 calls in 8 s). For comparison, a plain client processes one message after the other. Run it with
//! `tests/budget/run`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement ends with a panic if it cannot continue"
)]

mod plot;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use close_sync::config::{Config, Need};
use close_sync_simulator::{Lag, Limits, Settings, Simulator};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use plot::Sample;

const PEOPLE: usize = 1000;
const COMPANIES: usize = 300;
const WINDOW: f64 = 8.0;

/// The relevant endpoint groups: name, method, path, and Close's limit of calls per window.
const GROUPS: [(&str, &str, &str, f64); 6] = [
    ("search", "POST", "/data/search/", 16.0),
    ("read lead", "GET", "/lead/", 240.0),
    ("read contact", "GET", "/contact/", 240.0),
    ("create lead", "POST", "/lead/", 240.0),
    ("create contact", "POST", "/contact/", 240.0),
    ("update", "PUT", "/", 240.0),
];

/// How the worker's metrics begin to name the groups.
const ENDPOINTS: [&str; 6] =
    ["search", "read_lead", "read_contact", "create_lead", "create_contact", "update_"];

/// The settings that avoid duplicates and keep values in order.
const GUARDS_ON: [(&str, &str); 4] = [
    ("CLOSE_SEARCH_LAG", "5s"),
    ("WORKER_MERGE", "true"),
    ("CLOSE_LEAD_SYNCED_AT_FIELD", "cf_leadsyncedat"),
    ("CLOSE_CONTACT_SYNCED_AT_FIELD", "cf_contactsyncedat"),
];
const GUARDS_OFF: [(&str, &str); 4] = [
    ("CLOSE_SEARCH_LAG", "0s"),
    ("WORKER_MERGE", "false"),
    ("CLOSE_LEAD_SYNCED_AT_FIELD", ""),
    ("CLOSE_CONTACT_SYNCED_AT_FIELD", ""),
];

/// A row of the table.
struct Row {
    name: &'static str,
    /// `close.rate_limit_share` in percent.
    share: u32,
    /// The worker has all people in its cache.
    warm: bool,
    /// Another client uses half of the limits.
    shared: bool,
    /// The fraction of the limits that the worker can use at most.
    bound: f64,
    guards: bool,
}

const ROWS: [Row; 5] = [
    Row { name: "warm, share 100 %", share: 100, warm: true, shared: false, bound: 1.0, guards: true },
    Row { name: "warm, share 80 %", share: 80, warm: true, shared: false, bound: 0.8, guards: true },
    Row {
        name: "warm, share 80 %, guards off",
        share: 80,
        warm: true,
        shared: false,
        bound: 0.8,
        guards: false,
    },
    Row { name: "cold start, share 80 %", share: 80, warm: false, shared: false, bound: 0.8, guards: true },
    Row {
        name: "cold, half used by another, 80 %",
        share: 80,
        warm: false,
        shared: true,
        bound: 0.5,
        guards: true,
    },
];

/// The events, and the necessary calls for them in each group.
struct Work {
    events: Vec<Value>,
    needed: [f64; 6],
}

fn person(n: usize, company: usize, title: &str) -> Value {
    json!({"type": "identify", "userId": format!("u{n}"), "traits": {
        "name": format!("Person {n}"), "email": format!("p{n}@c{company}.test"), "title": title,
        "company": {"id": format!("c{company}"), "name": format!("Company {company}")},
    }})
}

/// A mix of events: 60 % unchanged, 25 % changed, 10 % a new person in a known company, 5 % a new company.
fn work(count: usize, warm: bool) -> Work {
    let (mut events, mut needed) = (Vec::new(), [0.0; 6]);
    for n in 0..count {
        let known = n * 7919 % PEOPLE;
        let company = known % COMPANIES;
        // An event that says something new reads its Lead, unless the company is new.
        let is_repeat = warm || n >= PEOPLE;
        let (event, calls): (_, &[usize]) = match n * 37 % 20 {
            0..12 => (person(known, company, "CEO"), if is_repeat { &[] } else { &[1] }),
            12..17 => (person(known, company, &format!("CEO {n}")), &[1, 5]),
            17..19 => (person(PEOPLE + n, company, "CEO"), &[1, 4]),
            _ => (person(PEOPLE + n, COMPANIES + n, "CEO"), &[3]),
        };
        for group in calls {
            needed[*group] += 1.0;
        }
        // Two lookups. Up to 25 lookups share a search.
        if calls == [3] {
            needed[0] += 2.0 / 25.0;
        }
        events.push(event);
    }
    Work { events, needed }
}

/// A simulator that already has the people and companies.
async fn close(limits: Limits) -> Simulator {
    let settings = Settings { limits, ..Settings::default() }
        .with(|close| close.search_lag = Lag::Fixed(Duration::from_secs(2)));
    let simulator = Simulator::start(settings, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    for company in 0..COMPANIES {
        let people = (0..PEOPLE).filter(|n| n % COMPANIES == company);
        let contact = |n: usize| {
            json!({"name": format!("Person {n}"), "title": "CEO", "custom.cf_contactuserid": format!("u{n}"),
                   "emails": [{"email": format!("p{n}@c{company}.test"), "type": "office"}]})
        };
        let lead = json!({
            "name": format!("Company {company}"), "custom.cf_leadcompanyid": format!("c{company}"),
            "contacts": people.map(contact).collect::<Vec<_>>(),
        });
        simulator.add_lead(lead).unwrap();
    }
    simulator
}

/// The result of a run.
struct Figures {
    name: String,
    took: f64,
    bound: f64,
    events: f64,
    calls: [f64; 6],
    busy: f64,
}

impl Figures {
    /// The minimum time for the necessary calls, with this share of each window.
    fn bound(needed: &[f64; 6], share: f64) -> f64 {
        let times = GROUPS.iter().zip(needed).map(|((_, _, _, limit), needed)| {
            // The first window is available at once.
            let allowed = (limit * share).floor();
            ((needed / allowed).ceil() - 1.0).max(0.0) * WINDOW
        });
        times.fold(0.0, f64::max)
    }

    /// The calls by group, and the calls answered with 429, as the simulator counted them.
    fn count(simulator: &Simulator) -> ([f64; 6], f64) {
        let (mut calls, mut busy) = ([0.0; 6], 0.0);
        for request in simulator.requests() {
            busy += f64::from(u8::from(request.status == Some(429)));
            let group = GROUPS
                .iter()
                .position(|(_, method, path, _)| request.method == *method && request.path.starts_with(path));
            if let Some(group) = group {
                calls[group] += 1.0;
            }
        }
        (calls, busy)
    }

    fn print(&self) {
        let all: f64 = self.calls.iter().sum();
        println!(
            "{:<34} {:>7.0} s {:>7.0} s {:>6.2} {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>9.3} %",
            self.name,
            self.took,
            self.bound,
            self.took / self.bound,
            self.calls[0] / self.events,
            (self.calls[1] + self.calls[2]) / self.events,
            (self.calls[3] + self.calls[4] + self.calls[5]) / self.events,
            all / self.events,
            100.0 * self.busy / all,
        );
        let used = GROUPS.iter().zip(self.calls).map(|((name, _, _, limit), calls)| {
            format!("{name} {:.0} %", 100.0 * calls / (limit * (self.took / WINDOW).ceil()))
        });
        println!("{:<34} budget used: {}", "", used.collect::<Vec<_>>().join(", "));
    }
}

/// A worker in this process.
struct Worker {
    http: String,
    stop: CancellationToken,
    thread: std::thread::JoinHandle<()>,
    connection: Connection,
    exchange: String,
}

impl Worker {
    async fn start(amqp: &str, close: &Simulator, queue: &str, row: &Row) -> Self {
        // A free port. No other process here takes ports.
        let http = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let exchange = format!("{queue}-identify");
        let environment: HashMap<String, String> = [
            ("AMQP_URL", amqp),
            ("AMQP_QUEUE", queue),
            ("AMQP_EXCHANGE", &exchange),
            ("CLOSE_API_URL", &close.url()),
            ("CLOSE_API_KEY", "api_simulator.key"),
            ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadcompanyid"),
            ("CLOSE_CONTACT_USER_ID_FIELD", "cf_contactuserid"),
            ("CLOSE_RATE_LIMIT_SHARE", &row.share.to_string()),
            ("HTTP_ADDR", &http),
        ]
        .into_iter()
        .chain(if row.guards { GUARDS_ON } else { GUARDS_OFF })
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
        let config = Config::load(None, &environment, Need::All).unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(close_sync::supervisor::run(config, stopped)).unwrap();
        });
        let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
        let worker = Self { http, stop, thread, connection, exchange };
        while worker.metric("broker_connected", "").await < 1.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        worker
    }

    /// The metrics.
    async fn metrics(&self) -> String {
        let Ok(answer) = reqwest::get(format!("http://{}/metrics", self.http)).await else {
            return String::new();
        };
        answer.text().await.unwrap_or_default()
    }

    async fn metric(&self, prefix: &str, part: &str) -> f64 {
        Self::sum(&self.metrics().await, prefix, part)
    }

    /// The sum of the samples whose lines start with the prefix and contain the part.
    fn sum(page: &str, prefix: &str, part: &str) -> f64 {
        let wanted = format!("close_sync_{prefix}");
        let lines = page
            .lines()
            .filter(|line| line.starts_with(&wanted) && line.contains(part) && !line.contains("handed_back"));
        let values = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        values.filter(|value| !value.is_nan()).sum()
    }

    /// The sum of the samples of a group.
    fn sum_of(page: &str, prefix: &str, group: usize) -> f64 {
        Self::sum(page, prefix, &format!("endpoint=\"{}", ENDPOINTS[group]))
    }

    /// The worker's calls by group, and the calls answered with 429.
    async fn calls(&self) -> ([f64; 6], f64) {
        let page = self.metrics().await;
        let calls = std::array::from_fn(|group| Self::sum_of(&page, "close_requests_total", group));
        (calls, Self::sum(&page, "close_requests_total", "rate_limited"))
    }

    /// What the metrics say about a drain that began at `start`, and ends when `wanted` messages are settled.
    fn sample(page: &str, start: Instant, wanted: f64) -> Sample {
        let sum = |prefix: &str, group: usize| Self::sum_of(page, prefix, group);
        let left = |group: usize| {
            let (left, of) = (sum("rate_limit_remaining_calls", group), sum("rate_limit_calls", group));
            // Before the first answer, nothing is used.
            if of > 0.0 { 100.0 * left / of } else { 100.0 }
        };
        Sample {
            at: start.elapsed().as_secs_f64(),
            backlog: wanted - Self::sum(page, "messages_settled_total", ""),
            calls: std::array::from_fn(|group| sum("close_requests_total", group)),
            budget: std::array::from_fn(left),
        }
    }

    /// Publishes events and waits until all are settled.
    async fn drain(&self, events: &[Value]) -> (Duration, Vec<Sample>) {
        let before = self.metric("messages_settled_total", "").await;
        let start = Instant::now();
        self.publish(events).await;
        #[expect(clippy::cast_precision_loss, reason = "small counts")]
        let wanted = before + events.len() as f64;
        let mut samples = Vec::new();
        loop {
            let sample = Self::sample(&self.metrics().await, start, wanted);
            let is_done = sample.backlog <= 0.0;
            samples.push(sample);
            if is_done {
                return (start.elapsed(), samples);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn publish(&self, events: &[Value]) {
        let channel = self.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        for event in events {
            let body = event.to_string();
            let properties = BasicProperties::default().with_delivery_mode(2);
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(
                    self.exchange.as_str().into(),
                    "bench".into(),
                    options,
                    body.as_bytes(),
                    properties,
                )
                .await
                .unwrap();
        }
        channel.wait_for_confirms().await.unwrap();
        channel.close(200, "done".into()).await.unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::task::spawn_blocking(|| self.thread.join()).await.unwrap().unwrap();
        self.connection.close(200, "bye".into()).await.unwrap();
    }
}

/// Measures the time from the publishing of an event to the first call to Close, while nothing else is waiting.
async fn idle(count: usize, amqp: &str) {
    let close = close(Limits::unlimited()).await;
    let worker = Worker::start(amqp, &close, "idle", &ROWS[0]).await;
    let known: Vec<Value> = (0..PEOPLE).map(|n| person(n, n % COMPANIES, "CEO")).collect();
    worker.drain(&known).await;
    println!("{count} events each, one after the other: milliseconds from publishing to the first call\n");
    println!("{:<16} {:>6} {:>6} {:>6}", "", "p50", "p99", "max");
    let changed = (0..count).map(|n| person(n % PEOPLE, n % PEOPLE % COMPANIES, &format!("CEO {n}")));
    let new = (0..count).map(|n| person(PEOPLE + n, n % COMPANIES, "CEO"));
    for (name, events) in
        [("a known person", changed.collect::<Vec<_>>()), ("a new person", new.collect::<Vec<_>>())]
    {
        let mut times = Vec::with_capacity(count);
        for event in events {
            let published = jiff::Timestamp::now();
            worker.publish(std::slice::from_ref(&event)).await;
            // Reading the metrics would be work for the worker.
            let first = loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                if let Some(first) = close.requests().into_iter().find(|request| request.at >= published) {
                    break first.at;
                }
            };
            times.push(first.duration_since(published).as_secs_f64() * 1000.0);
        }
        times.sort_by(f64::total_cmp);
        let of = |share: usize| times[(count - 1) * share / 100];
        println!("{name:<16} {:>6.1} {:>6.1} {:>6.1}", of(50), of(99), of(100));
    }
    worker.end().await;
}

/// Another client with the same key. It makes half of the allowed calls.
fn other(close: &Simulator) -> tokio::task::JoinHandle<()> {
    let url = close.url();
    tokio::spawn(async move {
        let client = reqwest::Client::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            let call = async |method: reqwest::Method, path: &str, body: Value| {
                let request =
                    client.request(method, format!("{url}{path}")).basic_auth("api_simulator.key", Some(""));
                let _ = request.json(&body).send().await;
            };
            // Invalid calls count like all others.
            call(reqwest::Method::POST, "data/search/", json!({})).await;
            for _ in 0..15 {
                call(reqwest::Method::GET, "lead/lead_none/", Value::Null).await;
                call(reqwest::Method::PUT, "contact/cont_none/", json!({})).await;
            }
        }
    })
}

/// A plain client: two lookups and two writes for each event, one event after the other. After a 429 it sleeps for
/// `Retry-After`.
async fn plain_client(close: &Simulator, events: &[Value]) -> Duration {
    let client = reqwest::Client::new();
    let url = close.url();
    let call = async |method: reqwest::Method, path: &str, body: Value| -> Value {
        loop {
            let request = client.request(method.clone(), format!("{url}{path}"));
            let answer = request.basic_auth("api_simulator.key", Some("")).json(&body).send().await.unwrap();
            if answer.status() != 429 {
                return answer.json().await.unwrap();
            }
            let wait = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            tokio::time::sleep(Duration::from_secs(wait)).await;
        }
    };
    let search = |kind: &str, field: &str, id: &Value| {
        json!({"query": {"type": "and", "queries": [
            {"type": "object_type", "object_type": kind},
            {"type": "field_condition", "field": {"type": "custom_field", "custom_field_id": field},
             "condition": {"type": "text", "mode": "exact_value", "value": id}}]},
            "_fields": {kind: ["id"]}})
    };
    let start = Instant::now();
    for event in events {
        let traits = &event["traits"];
        let lead = call(
            reqwest::Method::POST,
            "data/search/",
            search("lead", "cf_leadcompanyid", &traits["company"]["id"]),
        )
        .await;
        let contact = call(
            reqwest::Method::POST,
            "data/search/",
            search("contact", "cf_contactuserid", &event["userId"]),
        )
        .await;
        let body =
            json!({"name": traits["company"]["name"], "custom.cf_leadcompanyid": traits["company"]["id"]});
        let lead = match lead["data"][0]["id"].as_str() {
            Some(id) => call(reqwest::Method::PUT, &format!("lead/{id}/"), body).await,
            None => call(reqwest::Method::POST, "lead/", body).await,
        };
        let body = json!({"name": traits["name"], "title": traits["title"], "custom.cf_contactuserid": event["userId"],
            "emails": [{"email": traits["email"], "type": "office"}], "lead_id": lead["id"]});
        match contact["data"][0]["id"].as_str() {
            Some(id) => call(reqwest::Method::PUT, &format!("contact/{id}/"), body).await,
            None => call(reqwest::Method::POST, "contact/", body).await,
        };
    }
    start.elapsed()
}

#[tokio::main]
#[expect(clippy::cast_precision_loss, reason = "small counts")]
async fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().collect();
    let count = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(5000);
    let amqp = arguments.iter().find(|argument| argument.starts_with("amqp")).unwrap().clone();
    let only =
        arguments.iter().find_map(|argument| argument.strip_prefix("only=")).unwrap_or_default().to_owned();
    if arguments.iter().any(|argument| argument == "idle") {
        return idle(count, &amqp).await;
    }
    let plot = arguments.iter().find_map(|argument| argument.strip_prefix("plot=")).map(PathBuf::from);
    println!(
        "{count} events, {PEOPLE} people, {COMPANIES} companies; limits of a window of 8 s: search 16, others 240\n"
    );
    println!(
        "{:<34} {:>9} {:>9} {:>6} {:>8} {:>8} {:>8} {:>8} {:>11}",
        "", "time", "bound", "ratio", "search", "reads", "writes", "calls", "429s"
    );
    println!(
        "{:<34} {:>9} {:>9} {:>6} {:>8} {:>8} {:>8} {:>8} {:>11}",
        "", "", "", "", "per event", "", "", "", "of calls"
    );
    for (number, row) in ROWS.iter().enumerate().filter(|(_, row)| row.name.contains(&only)) {
        let work = work(count, row.warm);
        let close = close(Limits::documented()).await;
        let worker = Worker::start(&amqp, &close, &format!("budget-{number}"), row).await;
        if row.warm {
            let people: Vec<Value> = (0..PEOPLE).map(|n| person(n, n % COMPANIES, "CEO")).collect();
            worker.drain(&people).await;
            // Start with a new window.
            tokio::time::sleep(Duration::from_secs_f64(WINDOW)).await;
        }
        let before = worker.calls().await;
        let other = row.shared.then(|| other(&close));
        let (took, samples) = worker.drain(&work.events).await;
        if let Some(other) = other {
            other.abort();
        }
        let after = worker.calls().await;
        // Without this check, giving up messages would look fast.
        for outcome in ["dead", "delayed"] {
            assert!(worker.metric("messages_settled_total", outcome).await < 1.0, "{outcome}");
        }
        let calls = std::array::from_fn(|group| after.0[group] - before.0[group]);
        let busy = after.1 - before.1;
        let bound = Figures::bound(&work.needed, row.bound);
        Figures {
            name: row.name.to_owned(),
            took: took.as_secs_f64(),
            bound,
            events: count as f64,
            calls,
            busy,
        }
        .print();
        worker.end().await;
        if let Some(path) = &plot {
            let title = format!("{count} events, {}", row.name);
            plot::draw(path, &title, GROUPS.map(|(name, ..)| name), &samples).unwrap();
            return;
        }
    }
    if !only.is_empty() {
        return;
    }
    // It is slow, so it processes only a part of the events.
    let work = work(count, false);
    let part = &work.events[..count.min(60)];
    let close = close(Limits::documented()).await;
    let took = plain_client(&close, part).await;
    let (calls, busy) = Figures::count(&close);
    let scale = count as f64 / part.len() as f64;
    Figures {
        name: format!("a plain client (from {} events)", part.len()),
        took: took.as_secs_f64() * scale,
        bound: Figures::bound(&work.needed, 1.0),
        events: count as f64,
        calls: calls.map(|calls| calls * scale),
        busy: busy * scale,
    }
    .print();
}
