//! Runs the scenarios of `tests/scenarios` as `close-sync test` does, and through the whole program: published to the
//! exchange, consumed by a worker process and written to Close.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;

use close_sync::config::Layers;
use close_sync::domain::event;
use close_sync::scenario::{Scenario, Suite, render};
use futures_util::{StreamExt, stream};

use crate::support::{Bench, shared_broker};

/// Workers at the same time. Enough to keep two cores busy.
const AT_ONCE: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn every_scenario_has_the_expected_result_in_the_whole_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let suites: Vec<Suite> = files.map(|file| Suite::load(&file).unwrap()).collect();
    let scenarios = suites.iter().flat_map(|suite| suite.scenarios.iter().map(move |one| (suite, one)));
    let played = stream::iter(scenarios).map(|(suite, scenario)| play(suite, scenario));
    let wrong: Vec<String> = played.buffer_unordered(AT_ONCE).collect().await;
    assert!(wrong.len() >= 80, "{} scenarios", wrong.len());
    assert_eq!(wrong.concat(), "");
}

/// The difference from the expected result.
async fn play(suite: &Suite, scenario: &Scenario) -> String {
    let base = Layers::load(None, &HashMap::new()).unwrap();
    let played = suite.run(scenario, &base).await.unwrap();

    let simulator = suite.start_close(scenario, &base).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("close-sync.toml");
    std::fs::write(&file, suite.settings(scenario).to_string()).unwrap();
    let bench = Bench::around(simulator, &shared_broker())
        .unset("CLOSE_LEAD_COMPANY_ID_FIELD")
        .unset("CLOSE_CONTACT_USER_ID_FIELD")
        .set("CLOSE_SYNC_CONFIG", file.to_str().unwrap());
    let worker = bench.worker().await;
    let mut metrics = worker.metrics().await;
    // One after the other, so that the order of new records is fixed.
    for (number, event) in event::split(scenario.event.as_bytes()).into_iter().enumerate() {
        bench.publish_bytes(&event, lapin::BasicProperties::default()).await;
        metrics = worker.settled(number + 1).await;
    }
    worker.kill().await;

    let mut wrong = scenario.difference(&played);
    let (ours, theirs) = (render::records(&bench.simulator), played.records);
    if ours != theirs {
        let _ = write!(wrong, "Close holds, by the whole program:\n{ours}by the scenario alone:\n{theirs}");
    }
    let (ours, theirs) = (metrics.outcomes(), outcomes(&played.decision));
    if ours != theirs {
        let _ = writeln!(wrong, "outcomes of the whole program: {ours:?}, of the scenario alone: {theirs:?}");
    }
    if wrong.is_empty() { wrong } else { format!("{}\n{wrong}\n", scenario.title) }
}

/// The number of messages per outcome, by the label of the metric.
fn outcomes(decisions: &str) -> BTreeMap<&str, u32> {
    let mut outcomes = BTreeMap::new();
    for decision in decisions.split("\n\n") {
        let word = decision.trim_start().split([':', ' ', '\n']).next().unwrap();
        *outcomes.entry(if word == "dead-lettered" { "dead" } else { word }).or_default() += 1;
    }
    outcomes
}

/// The example file in `--help` works when copied from a narrow terminal.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_file_in_the_help_works() {
    let bench = Bench::new().await.set("COLUMNS", "80");
    let help = bench.output(&["test", "--help"]).await;
    let (_, file) = help.split_once("A scenario file in TOML:\n\n").unwrap();
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(copy.path(), file).unwrap();
    let played = bench.output(&["test", copy.path().to_str().unwrap()]).await;
    assert!(played.contains("An upgrade is written to the Lead"), "{played}");
}
