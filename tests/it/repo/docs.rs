//! The tables in the README and its pages agree with the program.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use close_sync::config::DEFAULTS;
use close_sync::domain::dropped::DropReason;
use close_sync::domain::matching::Case;
use close_sync::outcome::{PauseCause, Reason};
use close_sync::scenario::Suite;
use strum::VariantArray;

use crate::repo::pages::Page;
use crate::support::Bench;

/// All pages as one text.
fn documentation() -> String {
    let texts: Vec<_> = Page::all().into_iter().map(|page| page.text).collect();
    texts.join("\n")
}

/// The text in backticks at the beginning of each table row.
fn first_cells(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_metrics_is_complete() {
    let documentation = Page::of("deploy/operating.md").text;
    let worker = Bench::new().await.worker().await;
    let page = worker.page("/metrics").await.unwrap().1;
    let help = page.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let kinds = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    for ((name, text), (_, kind)) in help.clone().zip(kinds) {
        let row =
            documentation.lines().find(|line| line.starts_with(&format!("| `{name}` "))).unwrap_or_default();
        let (beginning, _) =
            row.split_once(&format!(" | {text} |")).unwrap_or_else(|| panic!("{name}: {text}\n{row}"));
        let labels = beginning
            .strip_prefix(&format!("| `{name}` | {kind} | "))
            .unwrap_or_else(|| panic!("{kind}: {row}"));
        let documented: BTreeSet<_> = labels.split('`').skip(1).step_by(2).collect();
        assert_eq!(documented, labels_of(&page, name), "{row}");
    }
    let documented: BTreeSet<_> =
        first_cells(&documentation).filter(|name| name.starts_with("close_sync_")).collect();
    assert_eq!(documented, help.map(|(name, _)| name).collect());
    worker.terminate().await;
}

#[test]
fn the_table_of_log_events_is_complete() {
    let page = Page::of("deploy/operating.md").text;
    let (_, section) = page.split_once("## Log events").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let documented: BTreeSet<_> = first_cells(section).map(str::to_owned).collect();
    let mut logged = BTreeSet::new();
    for file in rust_files(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))) {
        let code = std::fs::read_to_string(file).unwrap();
        let names = code.split("event = \"").skip(1).filter_map(|rest| rest.split_once('"'));
        logged.extend(names.map(|(name, _)| name.to_owned()));
    }
    assert_eq!(documented, logged);
}

pub(super) fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The labels of a metric on the page, without `le` of buckets.
fn labels_of<'a>(page: &'a str, name: &str) -> BTreeSet<&'a str> {
    let samples = page.lines().filter_map(|line| line.strip_prefix(name));
    let samples = samples.map(|rest| {
        ["_bucket", "_sum", "_count"].iter().fold(rest, |rest, end| rest.trim_start_matches(end))
    });
    let labels = samples.filter_map(|rest| rest.strip_prefix('{')?.split_once('}'));
    let names = labels.flat_map(|(labels, _)| labels.split(',')).filter_map(|label| label.split_once('='));
    names.map(|(name, _)| name).filter(|name| *name != "le").collect()
}

/// The default in the notation of the table.
fn default_column(value: &toml::Value) -> String {
    let list = |items: &[toml::Value]| {
        let items: Vec<_> = items.iter().map(|item| format!("`{}`", item.as_str().unwrap())).collect();
        if items.is_empty() { "none".to_owned() } else { items.join(", ") }
    };
    match value {
        toml::Value::String(text) if text.is_empty() => "none".to_owned(),
        toml::Value::String(text) => format!("`{}`", text.replace('|', "\\|")),
        toml::Value::Array(items) if items.is_empty() => "none".to_owned(),
        toml::Value::Array(_) => format!("`{value}`"),
        // A mapping rule, or a table of them.
        toml::Value::Table(rule) => {
            rule.get("from").map_or_else(|| list(&[]), |from| list(from.as_array().unwrap()))
        }
        toml::Value::Integer(_)
        | toml::Value::Float(_)
        | toml::Value::Boolean(_)
        | toml::Value::Datetime(_) => {
            value.as_float().map_or_else(|| value.to_string(), |number| number.to_string())
        }
    }
}

/// Adds `| key | variable | default |` of each setting to `rows`.
fn add_rows(table: &toml::Table, path: &str, rows: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let key = format!("{path}{key}");
        match value.as_table() {
            Some(inner) if !key.ends_with(".custom") && !inner.contains_key("from") => {
                add_rows(inner, &format!("{key}."), rows);
            }
            _ => {
                let default = match key.as_str() {
                    "close.api_key" => "required".to_owned(),
                    "mapping.placeholders" => format!("{} words", value.as_array().unwrap().len()),
                    "mapping.free_mail_domains" => format!("{} domains", value.as_array().unwrap().len()),
                    _ => default_column(value),
                };
                let variable = key.replace('.', "_").to_uppercase();
                rows.push((key.clone(), format!("| `{key}` | `{variable}` | {default} | ")));
            }
        }
    }
}

/// To add a setting: insert the beginning of the row that the failure prints, and describe the setting after it.
#[test]
fn the_table_of_settings_agrees_with_the_defaults() {
    let page = Page::of("deploy/docs/settings.md").text;
    let mut expected = Vec::new();
    add_rows(&toml::from_str(DEFAULTS).unwrap(), "", &mut expected);
    let missing: Vec<_> = expected.iter().filter(|(_, row)| !page.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "missing or different in deploy/docs/settings.md: {missing:#?}");
    let documented = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let documented: BTreeSet<_> = documented.filter(|key| *key != "destinations.<name>.…").collect();
    assert_eq!(documented, expected.iter().map(|(key, _)| key.as_str()).collect());
}

#[test]
fn the_readme_names_ten_settings_that_exist() {
    let settings = Page::of("deploy/docs/settings.md").text;
    let readme = Page::of("README.md").text;
    let is_variable = |cell: &str| cell.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let rows = readme.lines().filter(|line| line.starts_with("| `"));
    let named: Vec<_> = rows.filter(|row| row.split('`').nth(3).is_some_and(is_variable)).collect();
    assert_eq!(named.len(), 10, "{named:#?}");
    for row in named {
        let beginning: Vec<_> = row.split('`').take(4).collect();
        let beginning = beginning.join("`");
        assert!(settings.contains(&format!("{beginning}`")), "{row}");
    }
}

#[test]
fn every_label_of_a_decision_is_documented() {
    let documentation = documentation();
    let labels = Case::VARIANTS
        .iter()
        .map(|case| case.label())
        .chain(DropReason::VARIANTS.iter().map(|reason| reason.label()));
    for label in labels.chain(PauseCause::VARIANTS.iter().map(|cause| cause.label())) {
        assert!(documentation.contains(&format!("`{label}`")), "{label} is not documented");
    }
}

#[test]
fn the_number_of_scenarios_is_current() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let files = std::fs::read_dir(folder).unwrap();
    let number: usize = files.map(|file| Suite::load(&file.unwrap().path()).unwrap().scenarios.len()).sum();
    assert!(documentation().contains(&format!("{number} more")), "{number} scenarios");
}

#[test]
fn every_test_that_the_security_page_names_exists() {
    let page = Page::of("deploy/docs/security.md").text;
    let (_, attacks) = page.split_once("## Attacks").unwrap();
    let rows = attacks.lines().filter(|line| line.starts_with("| ")).skip(2);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code = ["src", "tests"].map(|folder| rust_files(&root.join(folder))).concat();
    let code: String = code.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let mut count = 0;
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        let names: Vec<_> = cells.last().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(cells.len() == 3 && !names.is_empty(), "no test: {row}");
        for name in names {
            assert!(code.contains(&format!("fn {name}(")), "no test `{name}`: {row}");
            count += 1;
        }
    }
    assert!(count > 10, "{count}");
}

#[test]
fn every_reason_of_a_dead_letter_is_documented() {
    let page = Page::of("deploy/operating.md").text;
    let documented: BTreeSet<_> = first_cells(&page).collect();
    assert!(Reason::VARIANTS.iter().all(|reason| documented.contains(reason.label())));
}
