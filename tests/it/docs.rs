//! The README says what the program does.

use std::collections::BTreeSet;

use close_sync::config::DEFAULTS;
use close_sync::outcome::Reason;

use crate::support::Bench;

const README: &str = include_str!("../../README.md");

/// What is in backticks at the beginning of a table row.
fn rows() -> impl Iterator<Item = &'static str> {
    README.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_metrics_is_complete() {
    let worker = Bench::new().await.worker().await;
    let page = worker.page("/metrics").await.unwrap().1;
    let help = page.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    for (name, text) in help.clone() {
        let row = README.lines().find(|line| line.starts_with(&format!("| `{name}` "))).unwrap_or_default();
        assert!(row.ends_with(&format!("| {text} |")), "{name}: {text}\n{row}");
    }
    let documented: BTreeSet<_> = rows().filter(|name| name.starts_with("close_sync_")).collect();
    assert_eq!(documented, help.map(|(name, _)| name).collect());
    worker.terminate().await;
}

#[test]
fn the_table_of_settings_is_complete() {
    let defaults: toml::Table = toml::from_str(DEFAULTS).unwrap();
    for (section, keys) in &defaults {
        for key in keys.as_table().unwrap().keys() {
            let full = format!("`{section}.{key}");
            assert!(README.contains(&full), "{full}` is not in the README");
            if section != "mapping" {
                let variable = format!("{section}_{key}").to_uppercase();
                let row =
                    README.lines().find(|line| line.starts_with(&format!("| {full}` | `{variable}` |")));
                assert!(row.is_some(), "no row for {section}.{key} and {variable}");
            }
        }
    }
}

#[test]
fn every_reason_has_its_remedy() {
    let documented: BTreeSet<_> = rows().collect();
    assert!(Reason::ALL.iter().all(|reason| documented.contains(reason.label())));
}
