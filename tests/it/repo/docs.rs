//! The README and the operator's handbook say what the program does.

use std::collections::BTreeSet;

use close_sync::config::DEFAULTS;
use close_sync::domain::dropped::DropReason;
use close_sync::domain::matching::Case;
use close_sync::outcome::{PauseCause, Reason};
use close_sync::scenario::Suite;
use strum::VariantArray;

use crate::support::Bench;

const README: &str = include_str!("../../../README.md");
const OPERATING: &str = include_str!("../../../deploy/operating.md");

fn lines() -> impl Iterator<Item = &'static str> {
    README.lines().chain(OPERATING.lines())
}

fn is_documented(text: &str) -> bool {
    lines().any(|line| line.contains(text))
}

/// What is in backticks at the beginning of a table row.
fn rows() -> impl Iterator<Item = &'static str> {
    lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_metrics_is_complete() {
    let worker = Bench::new().await.worker().await;
    let page = worker.page("/metrics").await.unwrap().1;
    let help = page.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let kinds = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    for ((name, text), (_, kind)) in help.clone().zip(kinds) {
        let row = lines().find(|line| line.starts_with(&format!("| `{name}` "))).unwrap_or_default();
        let (told, _) =
            row.split_once(&format!(" | {text} |")).unwrap_or_else(|| panic!("{name}: {text}\n{row}"));
        let labels =
            told.strip_prefix(&format!("| `{name}` | {kind} | ")).unwrap_or_else(|| panic!("{kind}: {row}"));
        let documented: BTreeSet<_> = labels.split('`').skip(1).step_by(2).collect();
        assert_eq!(documented, labels_of(&page, name), "{row}");
    }
    let documented: BTreeSet<_> = rows().filter(|name| name.starts_with("close_sync_")).collect();
    assert_eq!(documented, help.map(|(name, _)| name).collect());
    worker.terminate().await;
}

/// The labels of a metric on the page, `le` of buckets aside.
fn labels_of<'a>(page: &'a str, name: &str) -> BTreeSet<&'a str> {
    let samples = page.lines().filter_map(|line| line.strip_prefix(name));
    let samples = samples.map(|rest| {
        ["_bucket", "_sum", "_count"].iter().fold(rest, |rest, end| rest.trim_start_matches(end))
    });
    let labels = samples.filter_map(|rest| rest.strip_prefix('{')?.split_once('}'));
    let names = labels.flat_map(|(labels, _)| labels.split(',')).filter_map(|label| label.split_once('='));
    names.map(|(name, _)| name).filter(|name| *name != "le").collect()
}

#[test]
fn the_table_of_settings_is_complete() {
    let defaults: toml::Table = toml::from_str(DEFAULTS).unwrap();
    for (section, keys) in &defaults {
        are_in_the_table(section, keys.as_table().unwrap());
    }
}

fn are_in_the_table(section: &str, keys: &toml::Table) {
    assert!(README.contains(&format!("`{section}.")), "{section} is not in the README");
    for (key, value) in keys {
        let full = format!("{section}.{key}");
        assert!(README.contains(&format!("`{full}")), "`{full}` is not in the README");
        match value.as_table() {
            // A rule is one value, and rules are told of together.
            _ if section == "mapping" => {}
            Some(keys) => are_in_the_table(&full, keys),
            None => {
                let variable = full.replace('.', "_").to_uppercase();
                let row = lines().find(|line| line.starts_with(&format!("| `{full}` | `{variable}` |")));
                assert!(row.is_some(), "no row for {full} and {variable}");
            }
        }
    }
}

#[test]
fn every_word_a_decision_is_told_in_is_explained() {
    let labels = Case::VARIANTS
        .iter()
        .map(|case| case.label())
        .chain(DropReason::VARIANTS.iter().map(|reason| reason.label()));
    for label in labels.chain(PauseCause::ALL.map(PauseCause::label)) {
        assert!(is_documented(&format!("`{label}`")), "{label} is not documented");
    }
}

#[test]
fn the_scenarios_are_counted() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let files = std::fs::read_dir(folder).unwrap();
    let number: usize = files.map(|file| Suite::load(&file.unwrap().path()).unwrap().scenarios.len()).sum();
    assert!(README.contains(&format!("{number} more")), "{number} scenarios");
}

#[test]
fn every_reason_has_its_remedy() {
    let documented: BTreeSet<_> = rows().collect();
    assert!(Reason::ALL.iter().all(|reason| documented.contains(reason.label())));
}
