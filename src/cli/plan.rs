//! `close-sync plan`. It uses the same code as the worker.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::cli::failure::{CHECK_FAILED, Failure};
use crate::cli::input::read;
use crate::close::Client;
use crate::config::Destination;
use crate::domain::event::{self, Event};
use crate::domain::mapping::Key;
use crate::sync::explain::{self, DEAD, Explanation, Record, WAITS_FOR_SEARCH};
use crate::sync::preflight::{self, PreflightError};
use crate::sync::{Dependencies, ReceivedAt, Worker};
use crate::telemetry::metrics::Metrics;
use crate::text::{choices, count, json, line as one_line};

/// Show what events would change in Close, and why, without writing anything.
///
/// Reads Close with the configured key and mapping and the same code as `run`. Shows for each event what was looked
/// up, the candidate records, the rule that decided, and each field before and after. The output contains personal
/// data.
///
/// Each event is planned against the current state of Close. A note names the earlier events of the file that would
/// change the same records first. Close may still reject a value when it is written.
///
/// A file contains one event, a list of events, or one event per line.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Read events as JSON from this file, or from standard input with `-`.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Print one JSON object per line for each event.
    #[arg(long)]
    json: bool,
    /// Exit with 1 if an event would be dead-lettered.
    #[arg(long)]
    strict: bool,
}

pub(super) async fn plan(args: Args, config: Destination) -> Result<(), Failure> {
    let events = event::split(&read(&args.file).await?);
    let rehearsal = worker(config).await?.rehearsal();

    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    let (mut calls, mut left_out, mut dead) = (0, 0, false);
    let mut earlier = EarlierWrites::default();
    let bar = progress(events.len());
    // One by one, so that the same file gives the same output each time.
    for (number, event) in (1..).zip(&events) {
        let (keys, report) = explain::dry_run(&rehearsal, event.into(), ReceivedAt::now())
            .await
            .map_err(|why| Failure::Unavailable(format!("event {number} {}", one_line(&why.to_string()))))?;
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
            let planned = PlannedEvent { event: number, message_id, report, after };
            if args.json {
                anstream::println!("{}", json(&serde_json::to_string(&planned).unwrap_or_default()));
            } else {
                planned.print();
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
    if args.strict && dead { Err(Failure::Reported(CHECK_FAILED)) } else { Ok(()) }
}

/// A worker without a broker.
pub(super) async fn worker(config: Destination) -> Result<Worker, Failure> {
    let unavailable = |error: &dyn std::fmt::Display| Failure::Unavailable(error.to_string());
    let client = Client::new(config.close, |_| {}).map_err(|error| unavailable(&error))?;
    let metrics = Metrics::new(None).map_err(|error| unavailable(&error))?;
    let ready = preflight::run(&client, &config.rules).await.map_err(|errors| {
        let message = errors.iter().map(|error| one_line(&error.to_string())).collect::<Vec<_>>().join("\n");
        if errors.iter().any(|error| matches!(error, PreflightError::Field(_))) {
            Failure::Configuration(message)
        } else {
            Failure::Unavailable(format!("{message}\nhint: run `close-sync check` for details"))
        }
    })?;
    for unresolved in &ready.mapping.unresolved {
        let note = format!("{}: {}; its values are left out", unresolved.setting, unresolved.reason);
        anstream::eprintln!("note: {}", one_line(&note));
    }
    for invalid in ready.mapping.invalid_constants() {
        let (reason, fits) = (invalid.reason.description(), choices("choices", &invalid.choices));
        let note = format!("{}: {} is left out: {reason}{fits}", invalid.setting, invalid.value);
        anstream::eprintln!("note: {}", one_line(&note));
    }
    Ok(Worker::new(Dependencies {
        settings: config.worker,
        rules: &config.rules,
        mapping: ready.mapping,
        client,
        metrics,
    }))
}

/// Visible only for several events, on a terminal, with standard output redirected.
fn progress(events: usize) -> ProgressBar {
    if events < 2 || std::io::stdout().is_terminal() {
        // The printed events show the progress.
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos} of {len} events, {eta} left");
    let bar = ProgressBar::new(u64::try_from(events).unwrap_or(u64::MAX));
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// The last event for each key that would have written something.
#[derive(Default)]
struct EarlierWrites(HashMap<Key, usize>);

impl EarlierWrites {
    /// Records an event. Returns the earlier events with the same keys that would have written something.
    fn note(&mut self, number: usize, keys: &[Key], writes: bool) -> Vec<usize> {
        let mut conflicts: Vec<usize> = keys.iter().filter_map(|key| self.0.get(key)).copied().collect();
        conflicts.sort_unstable();
        conflicts.dedup();
        if writes {
            self.0.extend(keys.iter().map(|key| (key.clone(), number)));
        }
        conflicts
    }
}

/// The output for one event of a file.
#[derive(Serialize)]
struct PlannedEvent {
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

impl PlannedEvent {
    fn print(&self) {
        let id = self.message_id.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
        print(&format!("event {}{id}", self.event), &self.report);
        for earlier in &self.after {
            line("note", &format!("event {earlier} would change the same records first"));
        }
    }
}

fn line(title: &str, text: &str) {
    anstream::println!("  {DIM}{title:<10}{DIM:#} {}", one_line(text));
}

/// Prints a plan for people, under a title.
pub(super) fn print(title: &str, report: &Explanation) {
    let color = match report.outcome {
        DEAD => AnsiColor::Red,
        "skipped" | "unchanged" => AnsiColor::Yellow,
        _ => AnsiColor::Green,
    };
    let color = color.on_default();
    let reason = report.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    let title = one_line(title);
    anstream::println!("{BOLD}{title}{BOLD:#}: {color}{}{color:#}{reason}", report.outcome);
    if let Some(error) = &report.error {
        line("error", error);
    }
    if report.waits_for.is_some() {
        line("waits", WAITS_FOR_SEARCH);
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
    let text = one_line(&format!("{name}{id}{forbidden}"));
    anstream::println!("  {BOLD}{}{BOLD:#}{text}", record.action);
    for field in &record.fields {
        anstream::println!("    {:<16} {}", one_line(&field.label), one_line(&field.change));
    }
}
