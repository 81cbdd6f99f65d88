//! The scenarios in `tests/scenarios`, on records in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;
use crate::close::in_memory::InMemoryRecords;
use crate::outcome::{Effect, Outcome};
use crate::sync::properties::{Caches, apply, decide, is_repeat};

fn scenario_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test]
async fn every_scenario_has_the_expected_result() {
    let base = Layers::load(None, &HashMap::new()).unwrap();
    let (mut number, mut wrong) = (0, Vec::new());
    for file in scenario_files() {
        let suite = Suite::load(&file).unwrap();
        for scenario in &suite.scenarios {
            number += 1;
            let difference = in_memory(&suite, scenario, &base).await;
            if !difference.is_empty() {
                wrong.push(format!("{}: {}\n{difference}", file.display(), scenario.title));
            }
        }
    }
    assert!(number >= 80, "{number} scenarios");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The diff between the expected result of a scenario and that on records in memory.
async fn in_memory(suite: &Suite, scenario: &Scenario, base: &Layers) -> String {
    let (simulator, created) = suite.create_records(scenario, base).await.unwrap();
    let records = || InMemoryRecords::read(&simulator.leads(), &simulator.contacts());
    let before = records();
    created.merge_and_delete(&simulator).unwrap();
    let mut records = records().after(&before);

    let config = suite.config(scenario, base, &simulator).unwrap();
    let (switches, country) = (config.worker.switches, config.worker.country);
    let recheck = config.worker.recheck;
    records.country = country;
    let worker = worker(config).await.unwrap();
    let (mapping, caches) = (worker.mapping(), Caches::default());
    if let Some(country) = country {
        caches.readback_cache.set_country(country);
    }
    let mut decisions = Vec::new();
    for event in event::split(scenario.event.as_bytes()) {
        let (outcome, decision) = match worker.prepare(&event, ReceivedAt::now()) {
            Prepared::Settled(outcome) => (outcome, Decision::default()),
            Prepared::Job(job) if recheck > Duration::ZERO && is_repeat(&caches, job.desired()) => {
                (Outcome::Synced(Effect::Unchanged), Decision { repeats: true, ..Decision::default() })
            }
            Prepared::Job(job) => {
                let desired = job.desired();
                let decided = decide(&records, &caches, &mapping, switches, &[desired]).unwrap();
                apply(&mut records, &caches, &[desired], &decided);
                let again = decide(&records, &caches, &mapping, switches, &[desired]).unwrap();
                assert_eq!(again.1.merged.steps, [], "{}: twice", scenario.title);
                let decision = decided.0;
                let effect = decision.plan.steps.iter().map(Effect::of).min();
                (Outcome::of(&decision.plan, effect.unwrap_or(Effect::Unchanged)), decision)
            }
        };
        decisions.push(render::decision(&outcome, &decision, &mapping, |id| records.name(id)));
    }
    // The test with the simulator compares the records.
    let result =
        ScenarioResult { decision: decisions.join("\n"), records: String::new(), trigger: Share::default() };
    let mut scenario = scenario.clone();
    scenario.records = None;
    scenario.difference(&result)
}
