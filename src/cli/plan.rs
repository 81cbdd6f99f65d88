//! `close-sync plan`: what events would do to Close, and why. The engine is the worker's own.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::cli::{Failure, UNFIT, read};
use crate::close::Client;
use crate::config::Destination;
use crate::domain::event::{self, Event};
use crate::domain::mapping::Key;
use crate::sync::explain::{self, DEAD, Explanation, Record};
use crate::sync::preflight::{self, PreflightError};
use crate::sync::{ReceivedAt, Worker};
use crate::telemetry::metrics::Metrics;
use crate::text::{choices, count};

/// Show what events would do to Close, and why, without writing anything.
///
/// Reads Close with the configured key and mapping, through the very code `run` uses, and tells for
/// each event what was looked up, which records came into question, which rule decided, and each
/// field before and after. The output holds personal data.
///
/// Each event is planned against Close as it is now: what an earlier event of the same file would
/// change first is not taken into account, but pointed out. What Close would refuse is known only
/// as far as its fields tell.
///
/// A file is one event, a list of events, or one event per line.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A file with events as JSON, or `-` for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Print a JSON object per event and line.
    #[arg(long)]
    json: bool,
    /// Exit with 1 if any event would be dead-lettered.
    #[arg(long)]
    strict: bool,
}

pub(super) async fn plan(args: Args, config: Destination) -> Result<(), Failure> {
    let events = event::split(&read(&args.file).await?);
    let worker = worker(config).await?;

    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    let (mut calls, mut left_out, mut dead) = (0, 0, false);
    let mut earlier = Earlier::default();
    let bar = progress(events.len());
    // One after the other, so that the same file tells the same twice.
    for (number, event) in (1..).zip(&events) {
        let (keys, report) = explain::dry_run(&worker, event, ReceivedAt::now())
            .await
            .map_err(|why| Failure::Unavailable(format!("event {number} {why}")))?;
        let message_id =
            Event::decode(event, usize::MAX).ok().and_then(|event| event.message_id().map(str::to_owned));
        let after = earlier.note(number, &keys, report.writes);
        calls += u64::from(report.calls);
        left_out += report.left_out.len() as u64;
        dead |= report.outcome == DEAD;
        match counts.iter_mut().find(|(outcome, _)| *outcome == report.outcome) {
            Some((_, count)) => *count += 1,
            None => counts.push((report.outcome, 1)),
        }
        bar.suspend(|| {
            let numbered = Numbered { event: number, message_id, report, after };
            if args.json {
                anstream::println!("{}", serde_json::to_string(&numbered).unwrap_or_default());
            } else {
                numbered.print();
            }
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let counts: Vec<_> = counts.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
    let mut parts = vec![if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }];
    parts.extend((left_out > 0).then(|| format!("{} left out", count(left_out, "value", "values"))));
    parts.push(format!("{} to Close, nothing was written", count(calls, "call", "calls")));
    anstream::eprintln!("{}: {}", count(events.len() as u64, "event", "events"), parts.join("; "));
    if args.strict && dead { Err(Failure::Told(UNFIT)) } else { Ok(()) }
}

/// A worker without a broker.
pub(super) async fn worker(config: Destination) -> Result<Worker, Failure> {
    let unavailable = |error: &dyn std::fmt::Display| Failure::Unavailable(error.to_string());
    let client = Client::new(config.close, |_| {}).map_err(|error| unavailable(&error))?;
    let metrics = Metrics::new(None).map_err(|error| unavailable(&error))?;
    let ready = preflight::run(&client, &config.rules).await.map_err(|obstacles| {
        let told = obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        if obstacles.iter().any(|obstacle| matches!(obstacle, PreflightError::Field(_))) {
            Failure::Configuration(told)
        } else {
            Failure::Unavailable(format!("{told}\nhint: `close-sync check` tells more"))
        }
    })?;
    for unresolved in &ready.mapping.unresolved {
        anstream::eprintln!("note: {}: {}, its values are left out", unresolved.setting, unresolved.reason);
    }
    for invalid in ready.mapping.invalid_constants() {
        let (reason, fits) = (invalid.reason.description(), choices("choices", &invalid.choices));
        anstream::eprintln!("note: {}: {} is left out, {reason}{fits}", invalid.setting, invalid.value);
    }
    Ok(Worker::new(config.worker, &config.rules, ready.mapping, client, metrics))
}

/// Only on a terminal, and only where there is something to wait for.
fn progress(events: usize) -> ProgressBar {
    if events < 2 || std::io::stdout().is_terminal() {
        // Each event that is printed is progress enough.
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos} of {len} events, {eta} left");
    let bar = ProgressBar::new(u64::try_from(events).unwrap_or(u64::MAX));
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// Events that would have written something, by their keys.
#[derive(Default)]
struct Earlier(HashMap<Key, usize>);

impl Earlier {
    /// The earlier events that this one would meet the work of.
    fn note(&mut self, number: usize, keys: &[Key], writes: bool) -> Vec<usize> {
        let mut met: Vec<usize> = keys.iter().filter_map(|key| self.0.get(key)).copied().collect();
        met.sort_unstable();
        met.dedup();
        if writes {
            self.0.extend(keys.iter().map(|key| (key.clone(), number)));
        }
        met
    }
}

/// One event of a file.
#[derive(Serialize)]
struct Numbered {
    event: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<String>,
    #[serde(flatten)]
    report: Explanation,
    /// Earlier events of the file that would change the same records first.
    after: Vec<usize>,
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

impl Numbered {
    fn print(&self) {
        let id = self.message_id.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
        print(&format!("event {}{id}", self.event), &self.report);
        for earlier in &self.after {
            line("note", &format!("event {earlier} would change the same records first"));
        }
    }
}

fn line(title: &str, text: &str) {
    anstream::println!("  {DIM}{title:<10}{DIM:#} {text}");
}

/// What would become of `what`, for a terminal.
pub(super) fn print(what: &str, report: &Explanation) {
    let color = match report.outcome {
        DEAD => AnsiColor::Red,
        "skipped" | "unchanged" => AnsiColor::Yellow,
        _ => AnsiColor::Green,
    };
    let color = color.on_default();
    let reason = report.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    anstream::println!("{BOLD}{what}{BOLD:#}: {color}{}{color:#}{reason}", report.outcome);
    if let Some(error) = &report.error {
        line("error", error);
    }
    if !report.look_ups.is_empty() {
        line("looked up", &report.look_ups.join("; "));
    }
    for candidate in &report.candidates {
        line("candidate", &format!("{} {}", candidate.id, candidate.in_words));
    }
    if let Some(rule) = report.rule_in_words {
        line("rule", rule);
    }
    for record in &report.records {
        print_record(record);
    }
    for left_out in &report.left_out {
        line("left out", &left_out.in_words);
    }
}

fn print_record(record: &Record) {
    let is_new = record.action.starts_with("create");
    let nameless = if is_new { " without name" } else { "" };
    let name = record.name.as_ref().map_or_else(|| nameless.to_owned(), |name| format!(" \"{name}\""));
    let id = match (record.action, &record.id) {
        (_, None) => String::new(),
        ("create contact", Some(lead)) => format!(" in {lead}"),
        (_, Some(id)) => format!(" {id}"),
    };
    let forbidden = record.forbidden.map(|switch| format!(": not done, {switch}")).unwrap_or_default();
    anstream::println!("  {BOLD}{}{BOLD:#}{name}{id}{forbidden}", record.action);
    for field in &record.fields {
        anstream::println!("    {:<16} {}", field.label, field.change);
    }
}
