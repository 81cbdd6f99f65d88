//! Histories played with real parts: worker processes, RabbitMQ, HTTP to the simulator.
//!
//! `CLOSE_SYNC_MODEL_SEEDS=200 tests/run -- model` plays as many as you like, `CLOSE_SYNC_MODEL_FIRST=17` begins
//! with that seed. A seed always gives the same history and the same plan of what goes wrong; when exactly
//! that strikes depends on the machine.
//!
//! **What RabbitMQ may do.** An ack can be lost with its connection after the next messages of the same
//! person have run. Then these come again all together and in their order, and what was appended first may
//! be appended to a Contact the person got since. So where a message was settled more often than it was
//! published, the model may as well be applied in the order in which messages were settled.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use close_sync_simulator::Settings;
use futures_util::{FutureExt, StreamExt, stream};
use jiff::{SignedDuration, Timestamp};

use super::history::{History, Shape};
use super::oracle::Expected;
use super::plan::Plan;
use super::play::{Play, Played};
use crate::support::{Bench, Node, env, shared_broker};

/// Seeds that are always played.
const SEEDS: u64 = 24;
/// Histories played at once: they mostly wait.
const AT_ONCE: usize = 12;
/// Of so many histories, one has its broker killed: it takes long.
const BROKERS_APART: u64 = 24;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_close_holds_what_the_model_says() {
    let number = |name: &str| env(name).map(|text| text.parse::<u64>().unwrap());
    let first = number("CLOSE_SYNC_MODEL_FIRST").unwrap_or(0);
    let count = number("CLOSE_SYNC_MODEL_SEEDS").unwrap_or(SEEDS);
    let seeds = stream::iter(first..first + count);
    let runs: Vec<Run> = seeds.map(run).buffer_unordered(AT_ONCE).collect().await;

    let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
    for (label, times) in runs.iter().flat_map(|run| &run.faults) {
        *faults.entry(label).or_default() += times;
    }
    let repeated = runs.iter().filter(|run| run.repeated).count();
    let failed: Vec<&str> = runs.iter().filter_map(|run| run.wrong.as_deref()).collect();
    let seeds = format!("{count} seeds from {first}: {} failed", failed.len());
    // Shown also when all is well.
    writeln!(
        std::io::stderr(),
        "model: {seeds}, {repeated} explained by messages that came twice; {faults:?}"
    )
    .unwrap();
    assert!(failed.is_empty(), "{}\n{seeds}", failed.concat());
}

/// What came of a seed.
struct Run {
    faults: BTreeMap<&'static str, usize>,
    repeated: bool,
    wrong: Option<String>,
}

async fn run(seed: u64) -> Run {
    // Of every other history some messages come once more long after. Which values are newer, only the process that
    // applied them knows for certain.
    let (usual, is_late) = (Shape::default(), seed % 2 == 1);
    let history = History::generate(seed, Shape { late: if is_late { usual.late } else { 0 }, ..usual });
    let plan = Plan::generate(&history, seed % BROKERS_APART == BROKERS_APART - 1, is_late);
    // The end of one history is not the end of all.
    let (faults, ended) = match AssertUnwindSafe(perform(&history, &plan)).catch_unwind().await {
        Ok(played) => (played.faults.clone(), judge(&history, &played)),
        Err(panic) => (BTreeMap::new(), Err(words(panic))),
    };
    let repeated = matches!(ended, Ok(Explained::ByRepetition));
    let wrong = ended.err().map(|wrong| format!("\n{history}\n{plan}\n{wrong}\n"));
    Run { faults, repeated, wrong }
}

fn words(panic: Box<dyn Any + Send>) -> String {
    let said = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
    said.unwrap_or_else(|| "it panicked".to_owned())
}

/// How what Close holds came about.
enum Explained {
    /// Each message once, in order.
    InOrder,
    /// Some again later.
    ByRepetition,
}

fn judge(history: &History, played: &Played) -> Result<Explained, String> {
    let Err(wrong) = Expected::of(history).compare(&played.leads) else {
        return if played.trouble.is_empty() {
            Ok(Explained::InOrder)
        } else {
            Err(played.told(&played.trouble))
        };
    };
    let again = played.settled.len() > history.published().count();
    let mut in_this_order = Expected::default();
    for number in &played.settled {
        in_this_order.apply(&history.events[*number]);
    }
    if again && played.trouble.is_empty() && in_this_order.compare(&played.leads).is_ok() {
        return Ok(Explained::ByRepetition);
    }
    Err(played.told(&format!("{}{wrong}", played.trouble)))
}

async fn perform(history: &History, plan: &Plan) -> Played {
    let node = if plan.own_broker { Some(Node::start().await) } else { None };
    let url = node.as_ref().map_or_else(shared_broker, |node| node.url.clone());
    let lag = format!("0s..{}ms", plan.lag.as_millis());
    let seed = uuid::Uuid::from_u64_pair(history.seed, 0);
    let settings = Settings { search_lag: lag.parse().unwrap(), seed, ..Settings::fast() };
    // What was sent may take effect later than its sender waits.
    let guard = plan.lag + Duration::from_millis(1500);
    let bench = Bench::on(&url, settings)
        .await
        .set("CLOSE_LEAD_SYNCED_AT_FIELD", "cf_leadsyncedat")
        .set("CLOSE_CONTACT_SYNCED_AT_FIELD", "cf_contactsyncedat")
        .set("CLOSE_SEARCH_LAG", &format!("{}ms", guard.as_millis()))
        .set("CLOSE_TIMEOUT", &format!("{}ms", super::plan::TIMEOUT.as_millis()))
        .set("WORKER_CONCURRENCY", &plan.concurrency.to_string())
        .set("RETRY_IN_PLACE", if plan.delays { "0s" } else { "60s" })
        .set("RETRY_DELAYS", &format!("{:?}", plan.delay_queues()));
    let base = Timestamp::now().checked_sub(SignedDuration::from_hours(24)).unwrap();
    let mut stage = Play::new(&bench, node.as_ref(), history, plan, base);
    // Its story is worth more than where it ended.
    let ended = AssertUnwindSafe(stage.perform()).catch_unwind().await;
    if let Err(panic) = ended {
        stage.trouble(&format!("it did not come to its end: {}\n", words(panic)));
    }
    stage.story().await
}
