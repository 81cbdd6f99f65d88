//! The fault table: every fault at every call of every kind of plan. Whatever fails, the message must be settled,
//! and Close must hold the same records as without the fault, or less if Close rejected something.
//!
//! Runs the real worker over HTTP. This test takes the part of the broker: it delivers a delayed or returned message
//! again. In each run Close behaves in another of the ways that were recorded or are plausible. `CLOSE_SYNC_TEST_SEED` sets
//! the first seed of these.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use close_sync::close::Client;
use close_sync::config::{Config, Destination, Need};
use close_sync::domain::mapping::Mapping;
use close_sync::outcome::Outcome;
use close_sync::scenario::render;
use close_sync::sync::{Dependencies, Prepared, ReceivedAt, RunContext, Worker, preflight};
use close_sync::telemetry::metrics::Metrics;
use close_sync_simulator::{Behaviour, Effect, Fault, FaultBody, Settings, Simulator, When};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use crate::support::behaviour;
use crate::support::env;
use crate::support::{identify, refusal};

/// A kind of plan: the records in Close, and the event.
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
            json!({
                "name": "Jane Doe", "email": "jane@acme.test", "title": "CEO", "phone": "+49 (030) 901820",
                "company": company,
            }),
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

/// A fault of one call, with the expected outcome of the message.
struct FaultCase {
    name: String,
    effect: Effect,
    /// If the fault hits a look-up.
    look_up: &'static str,
    /// If the fault hits a write.
    write: &'static str,
}

const SYNCED: &str = "synced";

fn fault_cases() -> Vec<FaultCase> {
    let mut cases = Vec::new();
    let mut case =
        |name: String, effect, look_up, write| cases.push(FaultCase { name, effect, look_up, write });
    for when in [When::BeforeCommit, When::AfterCommit] {
        for code in [500, 502, 503, 504] {
            // Close sends a 503 before it handles the call (close-api.md §2).
            if (code, when) != (503, When::AfterCommit) {
                let effect = Effect::Status { code, body: FaultBody::Empty, when };
                case(format!("{code} {when:?}"), effect, SYNCED, SYNCED);
            }
        }
        case(format!("time-out {when:?}"), Effect::Timeout { ms: 2000, when }, SYNCED, SYNCED);
        case(format!("lost {when:?}"), Effect::DropConnection { when }, SYNCED, SYNCED);
    }
    for with_headers in [true, false] {
        let effect = Effect::RateLimited { retry_after: 0.3, with_headers };
        case(format!("429, headers: {with_headers}"), effect, SYNCED, SYNCED);
    }
    // Statuses that pass. Of some, the request may have been applied.
    for code in [408, 409, 421, 423, 425, 499] {
        let may_be_applied = matches!(code, 408 | 499);
        for when in [When::BeforeCommit, When::AfterCommit] {
            if when == When::BeforeCommit || may_be_applied {
                let effect = Effect::Status { code, body: FaultBody::Json, when };
                case(format!("{code} {when:?}"), effect, SYNCED, SYNCED);
            }
        }
    }
    // Statuses that say nothing about the message.
    for code in [405, 406, 410, 412, 414, 415, 417, 418, 424, 426, 428, 431, 451] {
        for when in [When::BeforeCommit, When::AfterCommit] {
            if when == When::BeforeCommit || matches!(code, 405 | 424) {
                let effect = Effect::Status { code, body: FaultBody::Json, when };
                case(format!("{code} {when:?}"), effect, SYNCED, SYNCED);
            }
        }
    }
    // The answer of a proxy says nothing about the key, the record or the message.
    for code in [400, 401, 402, 403, 404, 405, 502] {
        for when in [When::BeforeCommit, When::AfterCommit] {
            let effect = Effect::Status { code, body: FaultBody::Html, when };
            case(format!("{code} of a proxy, {when:?}"), effect, SYNCED, SYNCED);
        }
    }
    let status = |code, body| Effect::Status { code, body, when: When::BeforeCommit };
    case("unknown URL".into(), status(404, FaultBody::Text), SYNCED, SYNCED);
    case("401".into(), status(401, FaultBody::Json), SYNCED, SYNCED);
    case("402".into(), status(402, FaultBody::Json), SYNCED, SYNCED);
    // The key may do everything else, so the forbidden write is a fault of the message.
    case("403".into(), status(403, FaultBody::Json), SYNCED, "forbidden");
    let gone = json!({"error": "Empty query: Lead matching query does not exist."});
    case("404".into(), status(404, FaultBody::Exactly(gone)), SYNCED, SYNCED);
    case("400".into(), refusal(), "rejected", "rejected");
    let Effect::Status { body, when, .. } = refusal() else { unreachable!("a refusal is a status") };
    case("422".into(), Effect::Status { code: 422, body, when }, "rejected", "rejected");
    // The size of a write is that of its message.
    case("413".into(), status(413, FaultBody::Html), SYNCED, "rejected");
    case("413 of Close".into(), status(413, FaultBody::Json), SYNCED, "rejected");
    case(
        "200 with half a body".into(),
        Effect::Status { code: 200, body: FaultBody::Text, when: When::AfterCommit },
        SYNCED,
        SYNCED,
    );
    cases
}

/// The result of one run.
struct Run {
    outcome: String,
    /// The records in Close afterwards, as text.
    records: String,
    record_count: usize,
    /// The method and the endpoint of each call.
    calls: BTreeSet<(String, String)>,
}

async fn simulator(behaviour: Behaviour) -> Simulator {
    let settings = Settings::fast().with(|close| {
        *close = behaviour;
        close.search_lag = "100ms".parse().unwrap();
    });
    Simulator::start(settings, "127.0.0.1:0".parse().unwrap()).await.unwrap()
}

fn config(close: &Simulator, timeout: &str) -> Destination {
    let environment: HashMap<String, String> = [
        ("CLOSE_API_URL", close.url().as_str()),
        ("CLOSE_API_KEY", "api_simulator.key"),
        ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadcompanyid"),
        ("CLOSE_CONTACT_USER_ID_FIELD", "cf_contactuserid"),
        ("CLOSE_TIMEOUT", timeout),
        ("CLOSE_SEARCH_LAG", "1800ms"),
        ("CLOSE_EVENT_LOG_LAG", "0s"),
        // Longer than a read may be old.
        ("RETRY_IN_PLACE", "20s"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    Config::load(None, &environment, Need::All).unwrap().single().unwrap()
}

/// The mapping, which is the same in all runs. Resolved without a fault, so with a timeout that a busy machine keeps.
async fn resolve_mapping() -> Mapping {
    let close = simulator(Behaviour::default()).await;
    let config = config(&close, "60s");
    let client = Client::new(config.close, |_| {}).unwrap();
    preflight::run(&client, &config.rules).await.unwrap().mapping
}

async fn run(kind: &Kind, mapping: Mapping, behaviour: Behaviour, fault: Option<Fault>) -> Run {
    let close = simulator(behaviour).await;
    for lead in &kind.leads {
        close.add_lead(lead.clone()).unwrap();
    }
    let config = config(&close, "1500ms");
    let worker = Worker::new(Dependencies {
        settings: config.worker,
        rules: &config.rules,
        mapping,
        client: Client::new(config.close, |_| {}).unwrap(),
        metrics: Metrics::new(None).unwrap(),
    });
    if let Some(fault) = fault {
        close.fault(fault.times(1));
    }

    let mut attempts = 0;
    let outcome = loop {
        let Prepared::Job(job) = worker.prepare(kind.event.to_string().as_bytes(), ReceivedAt::now()) else {
            panic!("the event does not need Close")
        };
        let context = RunContext { attempts, ..RunContext::first() };
        match worker.run(&job, context).await.0 {
            Outcome::Synced(_) => break SYNCED.to_owned(),
            Outcome::Dead(dead) => break dead.reason.label().to_owned(),
            Outcome::Skipped(skip) => break format!("skipped {}", skip.label()),
            Outcome::Delayed { cause, .. } => attempts += u32::from(cause.uses_attempt()),
            Outcome::Paused(_) => {
                while worker.refresh_mapping().await.is_err() {}
                worker.half_open_breaker();
            }
        }
        assert!(attempts < 3, "the message is never settled");
    };
    let endpoint = |path: &str| format!("/{}/", path.split('/').nth(1).unwrap());
    let requests = close.requests().into_iter();
    let calls = requests.map(|request| (request.method, endpoint(&request.path))).collect();
    let record_count = close.leads().len() + close.contacts().len();
    Run { outcome, records: render::records(&close), record_count, calls }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_of_a_call_loses_a_message_or_duplicates_a_record() {
    let mapping = resolve_mapping().await;
    let fault_cases: Vec<Arc<FaultCase>> = fault_cases().into_iter().map(Arc::new).collect();
    let mut cases = Vec::new();
    for kind in kinds().into_iter().map(Arc::new) {
        let without_fault = run(&kind, mapping.clone(), Behaviour::default(), None).await;
        let without_fault = Arc::new(without_fault);
        assert_eq!(without_fault.outcome, SYNCED, "{}", kind.name);
        for call in &without_fault.calls {
            let each = |case: &Arc<FaultCase>| {
                (Arc::clone(&kind), Arc::clone(&without_fault), call.clone(), Arc::clone(case))
            };
            cases.extend(fault_cases.iter().map(each));
        }
    }
    assert!(cases.len() > 300, "only {} cases", cases.len());
    let first_seed = env("CLOSE_SYNC_TEST_SEED").map_or(0, |seed| seed.parse().unwrap());
    let runs = stream::iter(cases).zip(stream::iter(first_seed..)).map(|(case, seed)| {
        let (kind, without_fault, call, case) = case;
        let behaviour = behaviour::any(&mut fastrand::Rng::with_seed(seed));
        let mapping = mapping.clone();
        // A task of its own: the setup of a client takes long and must not delay the timers of the other runs.
        tokio::spawn(async move {
            let fault = Fault::new(case.effect.clone()).on(&call.0, &call.1);
            let run = run(&kind, mapping, behaviour.clone(), Some(fault));
            let run = tokio::time::timeout(Duration::from_mins(1), run).await;
            let run = run.unwrap_or_else(|_| {
                panic!("seed {seed} does not end: {call:?} {:?} {behaviour:?}", case.effect)
            });
            let difference = difference(&kind, &without_fault, &call, &case, &run);
            if difference.is_empty() {
                difference
            } else {
                format!("seed {seed}: {difference}{behaviour:?}\n")
            }
        })
    });
    let differences: Vec<String> = runs.buffer_unordered(16).map(Result::unwrap).collect().await;
    assert_eq!(differences.concat(), "");
}

/// How a run with a fault differs from what is expected of it. Empty if it does not.
fn difference(
    kind: &Kind,
    without_fault: &Run,
    (method, path): &(String, String),
    case: &FaultCase,
    run: &Run,
) -> String {
    let is_write = method == "PUT" || (method == "POST" && path != "/data/");
    let expected = match (is_write, path.as_str(), case.look_up) {
        (true, _, _) => case.write,
        // The client repeats a rejected search with another query.
        (false, "/data/", "rejected") if case.name == "400" => SYNCED,
        (false, _, look_up) => look_up,
    };
    let mut text = String::new();
    if run.outcome != expected {
        let _ = write!(text, "{} instead of {expected}; ", run.outcome);
    }
    let is_duplicate = run.record_count > without_fault.record_count;
    if is_duplicate || (run.outcome == SYNCED && run.records != without_fault.records) {
        let _ = write!(text, "Close holds\n{}instead of\n{}", run.records, without_fault.records);
    }
    if text.is_empty() { text } else { format!("{}, {method} {path}, {}: {text}\n", kind.name, case.name) }
}
