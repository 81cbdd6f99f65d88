//! Runs histories with real parts: worker processes, RabbitMQ, and HTTP to the simulator.
//!
//! `CLOSE_SYNC_MODEL_SEEDS=200 tests/run -- model::real` runs 200 seeds. `CLOSE_SYNC_MODEL_FIRST=17` sets the first
//! seed. A seed always gives the same history and the same plan of failures. The exact timing of the failures
//! depends on the machine.
//!
//! **Redelivery by RabbitMQ.** A connection can break before an ack arrives, after later messages of the same
//! person have already been applied. RabbitMQ then redelivers all of them in their order. A value of the first
//! message may now be added to a Contact that was created in between. So if a message was settled more often than
//! it was published, the result may also match the model applied in the order of settlement.

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
use super::runner::{RunResult, Runner};
use crate::support::{Bench, Node, env, shared_broker};

/// The default number of seeds.
const SEEDS: u64 = 24;
/// The number of concurrent runs. They mostly wait.
const CONCURRENT_RUNS: usize = 12;
/// One of this many runs has its own broker, which is killed. Such runs take long.
const BROKER_KILL_INTERVAL: u64 = 24;

#[tokio::test(flavor = "multi_thread")]
async fn close_matches_the_model_despite_failures() {
    let number = |name: &str| env(name).map(|text| text.parse::<u64>().unwrap());
    let first = number("CLOSE_SYNC_MODEL_FIRST").unwrap_or(0);
    let count = number("CLOSE_SYNC_MODEL_SEEDS").unwrap_or(SEEDS);
    let seeds = stream::iter(first..first + count);
    let runs: Vec<Run> = seeds.map(run).buffer_unordered(CONCURRENT_RUNS).collect().await;

    let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
    for (label, times) in runs.iter().flat_map(|run| &run.faults) {
        *faults.entry(label).or_default() += times;
    }
    let redelivered = runs.iter().filter(|run| run.redelivered).count();
    let failed: Vec<&str> = runs.iter().filter_map(|run| run.wrong.as_deref()).collect();
    let seeds = format!("{count} seeds from {first}: {} failed", failed.len());
    // Printed also on success.
    writeln!(std::io::stderr(), "model: {seeds}, {redelivered} match only after redelivery; {faults:?}")
        .unwrap();
    assert!(failed.is_empty(), "{}\n{seeds}", failed.concat());
}

/// The result of a seed.
struct Run {
    faults: BTreeMap<&'static str, usize>,
    redelivered: bool,
    wrong: Option<String>,
}

async fn run(seed: u64) -> Run {
    // In every other history, some messages are published again much later. Only the process that applied the newer
    // values knows for certain which are newer.
    let (usual, is_late) = (Shape::default(), seed % 2 == 1);
    let history = History::generate(seed, Shape { late: if is_late { usual.late } else { 0 }, ..usual });
    let plan = Plan::generate(&history, seed % BROKER_KILL_INTERVAL == BROKER_KILL_INTERVAL - 1, is_late);
    // A panic in one run must not end the others.
    let (faults, outcome) = match AssertUnwindSafe(execute(&history, &plan)).catch_unwind().await {
        Ok(result) => (result.faults.clone(), check(&history, &result)),
        Err(panic) => (BTreeMap::new(), Err(panic_text(panic))),
    };
    let redelivered = matches!(outcome, Ok(Explanation::Redelivered));
    let wrong = outcome.err().map(|wrong| format!("\n{history}\n{plan}\n{wrong}\n"));
    Run { faults, redelivered, wrong }
}

fn panic_text(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "panic without a message".to_owned())
}

/// How the final state matches the model.
enum Explanation {
    /// Every event applied once, in order.
    InOrder,
    /// Some events applied again, in the order of settlement.
    Redelivered,
}

fn check(history: &History, result: &RunResult) -> Result<Explanation, String> {
    let Err(wrong) = Expected::of(history).compare(&result.leads) else {
        return if result.problems.is_empty() {
            Ok(Explanation::InOrder)
        } else {
            Err(result.report(&result.problems))
        };
    };
    let is_redelivered = result.settled.len() > history.published().count();
    let mut in_settled_order = Expected::default();
    for number in &result.settled {
        in_settled_order.apply(&history.events[*number]);
    }
    if is_redelivered && result.problems.is_empty() && in_settled_order.compare(&result.leads).is_ok() {
        return Ok(Explanation::Redelivered);
    }
    Err(result.report(&format!("{}{wrong}", result.problems)))
}

async fn execute(history: &History, plan: &Plan) -> RunResult {
    let node = if plan.own_broker { Some(Node::start().await) } else { None };
    let url = node.as_ref().map_or_else(shared_broker, |node| node.url.clone());
    let lag = format!("0s..{}ms", plan.lag.as_millis());
    let seed = uuid::Uuid::from_u64_pair(history.seed, 0);
    let settings =
        Settings { seed, ..Settings::fast() }.with(|close| close.search_lag = lag.parse().unwrap());
    // A request can take effect after its client has given up.
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
    let mut runner = Runner::new(&bench, node.as_ref(), history, plan, base);
    // After a panic the report of the run is still needed.
    let outcome = AssertUnwindSafe(runner.execute()).catch_unwind().await;
    if let Err(panic) = outcome {
        runner.add_problem(&format!("the run panicked: {}\n", panic_text(panic)));
    }
    runner.finish().await
}
