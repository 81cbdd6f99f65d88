//! `close-sync test`.

use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::cli::failure::{CHECK_FAILED, Failure};
use crate::config::Layers;
use crate::domain::mapping::Share;
use crate::scenario::{Scenario, ScenarioError, ScenarioResult, Suite};
use crate::text::{block, json, line};

/// A scenario file, shown by `--help`.
const EXAMPLE: &str = include_str!("test.example.toml");

/// Test a mapping: run events against a simulated Close, and compare the result with the expected one.
///
/// Needs neither RabbitMQ nor a Close account. Each scenario gets a simulated Close of its own, and uses the same code
/// as `run` with the configured mapping and switches. Prints a diff and exits with 1 if a result differs.
///
/// `expect` lists the expected decision and writes. `records` lists the records in Close afterwards. A scenario needs
/// one of them. If it has neither, the command prints the actual result, ready to copy.
#[derive(clap::Args)]
#[command(after_long_help = format!("A scenario file in TOML:\n\n{EXAMPLE}"))]
pub(super) struct Args {
    /// Read scenarios from these files.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Run only scenarios with this text in their title.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print one JSON object per line for each scenario.
    #[arg(long)]
    json: bool,
}

/// The output for one scenario.
#[derive(Serialize)]
struct ScenarioOutput<'a> {
    file: String,
    scenario: &'a str,
    passed: bool,
    /// The share of the events that the trigger takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    trigger: Option<Share>,
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
    // An unreadable file is reported before any scenario runs.
    let mut suites = Vec::new();
    for path in &args.files {
        let suite = Suite::load(path);
        suites.push((
            path,
            suite.map_err(|error| {
                Failure::Input(format!("{} {}", line(&path.display().to_string()), block(&error.to_string())))
            })?,
        ));
    }
    let (mut passed, mut failed) = (0, 0);
    for (path, suite) in suites {
        if !args.json {
            anstream::println!("{BOLD}{}{BOLD:#}", line(&path.display().to_string()));
        }
        let wanted =
            |scenario: &&Scenario| args.only.as_ref().is_none_or(|text| scenario.title.contains(text));
        let mut share = Share::default();
        for scenario in suite.scenarios.iter().filter(wanted) {
            let output =
                ScenarioOutput::new(path.display().to_string(), scenario, suite.run(scenario, &base).await);
            share += output.trigger.unwrap_or_default();
            *(if output.passed { &mut passed } else { &mut failed }) += 1;
            if args.json {
                anstream::println!("{}", json(&serde_json::to_string(&output).unwrap_or_default()));
            } else {
                print(&output);
            }
        }
        if !args.json {
            anstream::println!("  the trigger {share}");
        }
        if share.is_none() {
            let file = line(&path.display().to_string());
            anstream::eprintln!("warning: {file}: the trigger {share}; check `mapping.trigger`");
        }
    }
    anstream::eprintln!("{passed} passed, {failed} failed");
    match (passed, failed) {
        (0, 0) => Err(Failure::Input(
            "no scenarios to run: the files contain none, or no title contains the text of `--only`".into(),
        )),
        (_, 0) => Ok(()),
        (_, _) => Err(Failure::Reported(CHECK_FAILED)),
    }
}

impl<'a> ScenarioOutput<'a> {
    fn new(file: String, scenario: &'a Scenario, result: Result<ScenarioResult, ScenarioError>) -> Self {
        let mut output = Self {
            file,
            scenario: &scenario.title,
            passed: false,
            trigger: None,
            difference: String::new(),
            error: None,
            expect: None,
            records: None,
        };
        output.trigger = result.as_ref().ok().map(|result| result.trigger);
        match result {
            Err(error) => output.error = Some(error.to_string()),
            Ok(actual) if scenario.expect.is_none() && scenario.records.is_none() => {
                output.error = Some(
                    "`expect` and `records` are missing; copy the correct result into one of them".into(),
                );
                (output.expect, output.records) = (Some(actual.decision), Some(actual.records));
            }
            Ok(actual) => {
                output.difference = scenario.difference(&actual);
                output.passed = output.difference.is_empty();
            }
        }
        output
    }
}

const BOLD: Style = Style::new().bold();

fn print(output: &ScenarioOutput<'_>) {
    let (color, word) = if output.passed { (AnsiColor::Green, "ok  ") } else { (AnsiColor::Red, "FAIL") };
    let color = color.on_default();
    anstream::println!("  {color}{word}{color:#} {}", line(output.scenario));
    for text in output.error.iter().flat_map(|error| error.lines()) {
        anstream::println!("       {}", line(text));
    }
    for (key, text) in [("expect", &output.expect), ("records", &output.records)] {
        if let Some(text) = text {
            anstream::println!("{key} = '''\n{}'''", block(text));
        }
    }
    for text in output.difference.lines() {
        let color = match text.as_bytes().first() {
            Some(b'-') => AnsiColor::Red.on_default(),
            Some(b'+') => AnsiColor::Green.on_default(),
            _ => Style::new(),
        };
        anstream::println!("       {color}{}{color:#}", line(text));
    }
}
