//! `close-sync test`: unit tests for a mapping.

use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::cli::{Failure, UNFIT};
use crate::config::Layers;
use crate::scenario::{Scenario, Suite, Told, Unplayable};

/// A file of scenarios, as `--help` shows it.
const EXAMPLE: &str = include_str!("test.example.toml");

/// Test a mapping: play events on a fake Close, and compare what comes of them with what should.
///
/// Needs neither RabbitMQ nor a Close account: each scenario gets a fake Close of its own and runs through
/// the very code `run` uses, with the configured mapping and switches. A difference is shown as a diff,
/// and the exit code is 1.
///
/// `expect` is what is decided and done, `records` what Close holds afterwards; one of them is enough.
/// Write neither, and what comes is shown to be copied.
#[derive(clap::Args)]
#[command(after_long_help = format!("A file is TOML:\n\n{EXAMPLE}"))]
pub(super) struct Args {
    /// Files of scenarios.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Only scenarios with this text in their title.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print a JSON object per scenario and line.
    #[arg(long)]
    json: bool,
}

/// One scenario, as it is told.
#[derive(Serialize)]
struct Report<'a> {
    file: String,
    scenario: &'a str,
    passed: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    difference: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expect: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    records: Option<String>,
}

pub(super) async fn test(args: Args, base: Layers) -> Result<(), Failure> {
    // A file that cannot be read is told before any other is played.
    let mut suites = Vec::new();
    for path in &args.files {
        let suite = Suite::load(path);
        suites.push((path, suite.map_err(|error| Failure::Input(format!("{} {error}", path.display())))?));
    }
    let (mut passed, mut failed) = (0, 0);
    for (path, suite) in suites {
        if !args.json {
            anstream::println!("{BOLD}{}{BOLD:#}", path.display());
        }
        let wanted =
            |scenario: &&Scenario| args.only.as_ref().is_none_or(|text| scenario.title.contains(text));
        for scenario in suite.scenarios.iter().filter(wanted) {
            let report = Report::new(path.display().to_string(), scenario, suite.play(scenario, &base).await);
            *(if report.passed { &mut passed } else { &mut failed }) += 1;
            if args.json {
                anstream::println!("{}", serde_json::to_string(&report).unwrap_or_default());
            } else {
                print(&report);
            }
        }
    }
    anstream::eprintln!("{passed} passed, {failed} failed");
    match (passed, failed) {
        (0, 0) => Err(Failure::Input(
            "there is nothing to test: no scenario in the files, or none of this title".into(),
        )),
        (_, 0) => Ok(()),
        (_, _) => Err(Failure::Told(UNFIT)),
    }
}

impl<'a> Report<'a> {
    fn new(file: String, scenario: &'a Scenario, played: Result<Told, Unplayable>) -> Self {
        let mut report = Self {
            file,
            scenario: &scenario.title,
            passed: false,
            difference: String::new(),
            error: None,
            expect: None,
            records: None,
        };
        match played {
            Err(error) => report.error = Some(error.to_string()),
            Ok(told) if scenario.expect.is_none() && scenario.records.is_none() => {
                report.error =
                    Some("nothing is expected: copy what is right into `expect` or `records`".into());
                (report.expect, report.records) = (Some(told.decision), Some(told.records));
            }
            Ok(told) => {
                report.difference = scenario.difference(&told);
                report.passed = report.difference.is_empty();
            }
        }
        report
    }
}

const BOLD: Style = Style::new().bold();

fn print(report: &Report<'_>) {
    let (color, word) = if report.passed { (AnsiColor::Green, "ok  ") } else { (AnsiColor::Red, "FAIL") };
    let color = color.on_default();
    anstream::println!("  {color}{word}{color:#} {}", report.scenario);
    for line in report.error.iter().flat_map(|error| error.lines()) {
        anstream::println!("       {line}");
    }
    for (key, text) in [("expect", &report.expect), ("records", &report.records)] {
        if let Some(text) = text {
            anstream::println!("{key} = '''\n{text}'''");
        }
    }
    for line in report.difference.lines() {
        let color = match line.as_bytes().first() {
            Some(b'-') => AnsiColor::Red.on_default(),
            Some(b'+') => AnsiColor::Green.on_default(),
            _ => Style::new(),
        };
        anstream::println!("       {color}{line}{color:#}");
    }
}
