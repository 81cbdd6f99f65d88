//! The fault table: each way a call can fail, at each step of each kind of plan. Whatever happens, the message
//! comes to its end, and what Close holds afterwards is what it would have held, or less where it refused.
//!
//! The real worker over real HTTP; what the broker does with a delivery that is handed back or delayed is
//! played here: it comes again.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;

use close_sync::close::{Client, Priority};
use close_sync::config::{Config, Need};
use close_sync::outcome::Outcome;
use close_sync::scenario::render;
use close_sync::sync::{Prepared, ReceivedAt, RunContext, Worker, preflight};
use close_sync::telemetry::metrics::Metrics;
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, Simulator, When};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::identify;

/// A kind of plan: what Close holds, and the event.
struct Kind {
    name: &'static str,
    leads: Vec<Value>,
    event: Value,
}

fn kinds() -> Vec<Kind> {
    const COMPANY: &str = "custom.cf_leadcompanyid";
    const USER: &str = "custom.cf_contactuserid";
    let jane = || json!({"name": "Jane", USER: "u1", "emails": [{"email": "jane@acme.test"}]});
    let acme = |contacts: Value| vec![json!({"name": "Old", COMPANY: "acme", "contacts": contacts})];
    let traits = |company: Value| {
        identify(
            "u1",
            json!({"name": "Jane Doe", "email": "jane@acme.test", "title": "CEO", "company": company}),
        )
    };
    let company = json!({"id": "acme", "name": "Acme"});
    vec![
        Kind { name: "new person", leads: vec![], event: traits(Value::Null) },
        Kind { name: "new company", leads: vec![], event: traits(company.clone()) },
        Kind { name: "added", leads: acme(json!([])), event: traits(company.clone()) },
        Kind { name: "updated", leads: acme(json!([jane()])), event: traits(company.clone()) },
        Kind { name: "person alone", leads: acme(json!([jane()])), event: traits(json!({"name": "Acme"})) },
        Kind {
            name: "adopted",
            leads: vec![json!({"name": "Old", "contacts": [jane()]})],
            event: traits(company),
        },
    ]
}

/// A way to fail once, and what becomes of the message when it strikes a look-up and when it strikes a write.
struct Way {
    name: String,
    effect: Effect,
    look_up: &'static str,
    write: &'static str,
}

const SYNCED: &str = "synced";

fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    let mut way = |name: String, effect, look_up, write| ways.push(Way { name, effect, look_up, write });
    for when in [When::BeforeCommit, When::AfterCommit] {
        for code in [500, 502, 503, 504] {
            // A 503 comes from in front of the application (close-api.md §2).
            if (code, when) != (503, When::AfterCommit) {
                let effect = Effect::Status { code, body: FaultBody::Empty, when };
                way(format!("{code} {when:?}"), effect, SYNCED, SYNCED);
            }
        }
        way(format!("time-out {when:?}"), Effect::Timeout { ms: 2000, when }, SYNCED, SYNCED);
        way(format!("lost {when:?}"), Effect::DropConnection { when }, SYNCED, SYNCED);
    }
    for with_headers in [true, false] {
        let effect = Effect::RateLimited { retry_after: 0.3, with_headers };
        way(format!("429, headers: {with_headers}"), effect, SYNCED, SYNCED);
    }
    let status = |code| Effect::Status { code, body: FaultBody::Html, when: When::BeforeCommit };
    way("401".into(), status(401), SYNCED, SYNCED);
    way("402".into(), status(402), SYNCED, SYNCED);
    // One write that is forbidden while the key may do everything else is the message's own affair.
    way("403".into(), status(403), SYNCED, "forbidden");
    way("404".into(), status(404), SYNCED, SYNCED);
    way("400".into(), status(400), "rejected", "rejected");
    way("413".into(), status(413), "rejected", "rejected");
    way(
        "200 with half a body".into(),
        Effect::Status { code: 200, body: FaultBody::Text, when: When::AfterCommit },
        SYNCED,
        SYNCED,
    );
    ways
}

/// What came of one run.
struct Run {
    end: String,
    told: String,
    records: usize,
    calls: BTreeSet<(String, String)>,
}

async fn play(kind: &Kind, fault: Option<Fault>) -> Run {
    let settings = Settings { search_lag: "100ms".parse().unwrap(), ..Settings::fast() };
    let close = Simulator::start(settings, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    for lead in &kind.leads {
        close.add_lead(lead.clone()).unwrap();
    }
    let environment: HashMap<String, String> = [
        ("CLOSE_API_URL", close.url().as_str()),
        ("CLOSE_API_KEY", "api_simulator.key"),
        ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadcompanyid"),
        ("CLOSE_CONTACT_USER_ID_FIELD", "cf_contactuserid"),
        ("CLOSE_TIMEOUT", "1500ms"),
        ("CLOSE_SEARCH_LAG", "1800ms"),
        ("RETRY_IN_PLACE", "6s"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let config = Config::load(None, &environment, Need::All).unwrap().single().unwrap();
    let client = Client::new(config.close, |_| {}).unwrap();
    let mapping = preflight::run(&client, &config.rules).await.unwrap().mapping;
    let worker = Worker::new(config.worker, &config.rules, mapping, client, Metrics::new(None).unwrap());
    let before = close.requests().len();
    if let Some(fault) = fault {
        close.fault(fault.times(1));
    }

    let mut attempts = 0;
    let end = loop {
        let Prepared::Job(job) = worker.prepare(kind.event.to_string().as_bytes(), ReceivedAt::now()) else {
            panic!("no job")
        };
        let turn = RunContext { attempts, priority: Priority::Live, search_complete_from: Instant::now() };
        match worker.run(&job, turn).await.0 {
            Outcome::Synced(_) => break SYNCED.to_owned(),
            Outcome::Dead(dead) => break dead.reason.label().to_owned(),
            Outcome::Skipped(skip) => break format!("skipped {}", skip.label()),
            Outcome::Delayed { cause, .. } => attempts += u32::from(cause.uses_attempt()),
            Outcome::Paused(_) => {
                while worker.refresh_mapping().await.is_err() {}
                worker.half_open_breaker();
            }
        }
        assert!(attempts < 3, "it is tried for ever");
    };
    let requests = close.requests().into_iter().skip(before);
    let group = |path: &str| format!("/{}/", path.split('/').nth(1).unwrap());
    let calls = requests.map(|request| (request.method, group(&request.path))).collect();
    Run { end, told: render::records(&close), records: close.leads().len() + close.contacts().len(), calls }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_at_any_step_loses_a_message_or_doubles_a_record() {
    let kinds = kinds();
    let ways = ways();
    let mut cases = Vec::new();
    for kind in &kinds {
        let clean = play(kind, None).await;
        assert_eq!(clean.end, SYNCED, "{}", kind.name);
        for call in clean.calls.clone() {
            cases.extend(ways.iter().map(|way| (kind, clean.told.clone(), clean.records, call.clone(), way)));
        }
    }
    assert!(cases.len() > 300, "{} cases", cases.len());
    let played = stream::iter(cases).map(async |(kind, told, records, (method, path), way)| {
        let fault = Fault::new(way.effect.clone()).on(&method, &path);
        let run =
            tokio::time::timeout(Duration::from_secs(30), play(kind, Some(fault))).await.expect("an end");
        let is_write = method == "PUT" || (method == "POST" && path != "/data/");
        let expected = match (is_write, path.as_str(), way.look_up) {
            (true, _, _) => way.write,
            // A search that is refused is asked again in other words.
            (false, "/data/", "rejected") if way.name == "400" => SYNCED,
            (false, _, look_up) => look_up,
        };
        let mut wrong = String::new();
        if run.end != expected {
            let _ = write!(wrong, "{} instead of {expected}; ", run.end);
        }
        if run.records > records || (run.end == SYNCED && run.told != told) {
            let _ = write!(wrong, "Close holds\n{}instead of\n{told}", run.told);
        }
        if wrong.is_empty() {
            wrong
        } else {
            format!("{}, {method} {path}, {}: {wrong}\n", kind.name, way.name)
        }
    });
    let wrong: Vec<String> = played.buffer_unordered(16).collect().await;
    assert_eq!(wrong.concat(), "");
}
