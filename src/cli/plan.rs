//! `close-sync plan`: what events would do to Close, and why. The engine is the worker's own.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use tokio::io::AsyncReadExt;

use super::{Failure, UNFIT, count, there_are};
use crate::close::Client;
use crate::config::Destination;
use crate::domain::decision::{self, Decision, LookUp};
use crate::domain::event::{self, Event};
use crate::domain::mapping::{Key, Mapping};
use crate::domain::matching::Case;
use crate::domain::plan::{RecordPlan, RecordRef, Refusal};
use crate::domain::record::LeadId;
use crate::domain::values::{DropReason, Dropped};
use crate::metrics::Metrics;
use crate::outcome::Outcome;
use crate::preflight::{self, Obstacle};
use crate::worker::{Arrival, Prepared, Worker};

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
    let events = read(&args.file).await?;
    let worker = worker(config).await?;
    let mapping = worker.mapping();

    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    let (mut calls, mut left_out, mut dead) = (0, 0, false);
    let mut earlier = Earlier::default();
    let bar = progress(events.len());
    // One after the other, so that the same file tells the same twice.
    for (number, event) in (1..).zip(&events) {
        let (keys, outcome, decision) = rehearse(&worker, event).await;
        let mut report = Report::new(number, &outcome, &decision, &mapping)?;
        report.message_id =
            Event::decode(event, usize::MAX).ok().and_then(|event| event.message_id().map(str::to_owned));
        report.after = earlier.note(number, &keys, &decision);
        calls += u64::from(report.calls);
        left_out += report.left_out.len() as u64;
        dead |= report.outcome == DEAD;
        match counts.iter_mut().find(|(outcome, _)| *outcome == report.outcome) {
            Some((_, count)) => *count += 1,
            None => counts.push((report.outcome, 1)),
        }
        bar.suspend(|| {
            if args.json {
                anstream::println!("{}", serde_json::to_string(&report).unwrap_or_default());
            } else {
                print(&report);
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

/// The bytes of each event.
async fn read(file: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let unreadable = |error| Failure::Input(format!("{} cannot be read: {error}", file.display()));
    let mut bytes = Vec::new();
    if file.as_os_str() == "-" {
        tokio::io::stdin().read_to_end(&mut bytes).await.map_err(unreadable)?;
    } else {
        bytes = tokio::fs::read(file).await.map_err(unreadable)?;
    }
    Ok(event::split(&bytes))
}

/// A worker without a broker.
async fn worker(config: Destination) -> Result<Worker, Failure> {
    let unavailable = |error: &dyn std::fmt::Display| Failure::Unavailable(error.to_string());
    let client = Client::new(config.close, |_| {}).map_err(|error| unavailable(&error))?;
    let metrics = Metrics::new(None).map_err(|error| unavailable(&error))?;
    let ready = preflight::run(&client, &config.rules).await.map_err(|obstacles| {
        let told = obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        if obstacles.iter().any(|obstacle| matches!(obstacle, Obstacle::Field(_))) {
            Failure::Configuration(told)
        } else {
            Failure::Unavailable(format!("{told}\nhint: `close-sync check` tells more"))
        }
    })?;
    for unknown in &ready.mapping.unknown {
        anstream::eprintln!("note: {}: {}, its values are left out", unknown.setting, unknown.reason);
    }
    for misfit in ready.mapping.misfits() {
        let (reason, fits) = (misfit.reason.words(), there_are(&misfit.choices));
        anstream::eprintln!("note: {}: {} is left out, {reason}{fits}", misfit.setting, misfit.value);
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

async fn rehearse(worker: &Worker, event: &[u8]) -> (Vec<Key>, Outcome, Decision) {
    match worker.prepare(event, Arrival::now()) {
        Prepared::Settled(outcome) => (Vec::new(), outcome, Decision::default()),
        Prepared::Job(job) => {
            let (outcome, decision) = worker.rehearse(&job).await;
            (job.keys(), outcome, decision)
        }
    }
}

/// Events that would have written something, by their keys.
#[derive(Default)]
struct Earlier(HashMap<Key, usize>);

impl Earlier {
    /// The earlier events that this one would meet the work of.
    fn note(&mut self, number: usize, keys: &[Key], decision: &Decision) -> Vec<usize> {
        let mut met: Vec<usize> = keys.iter().filter_map(|key| self.0.get(key)).copied().collect();
        met.sort_unstable();
        met.dedup();
        if !decision.plan.steps.is_empty() {
            self.0.extend(keys.iter().map(|key| (key.clone(), number)));
        }
        met
    }
}

const DEAD: &str = "dead-lettered";

/// One event, as it is told.
#[derive(Serialize)]
struct Report<'a> {
    event: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<String>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'static str>,
    #[serde(skip)]
    rule_in_words: Option<&'static str>,
    look_ups: Vec<String>,
    candidates: Vec<Candidate<'a>>,
    records: Vec<Record<'a>>,
    left_out: Vec<LeftOut<'a>>,
    calls: u32,
    /// Earlier events of the file that would change the same records first.
    after: Vec<usize>,
}

#[derive(Serialize)]
struct Candidate<'a> {
    id: &'a str,
    verdict: &'static str,
    #[serde(skip)]
    in_words: &'static str,
}

#[derive(Serialize)]
struct LeftOut<'a> {
    field: &'a str,
    reason: &'static str,
    value: Option<&'a Value>,
    #[serde(skip)]
    in_words: String,
}

#[derive(Serialize)]
struct Record<'a> {
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forbidden: Option<&'static str>,
    fields: Vec<Field<'a>>,
}

#[derive(Serialize)]
struct Field<'a> {
    #[serde(rename = "field")]
    key: &'a str,
    #[serde(skip)]
    label: String,
    before: Option<&'a Value>,
    event: &'a Value,
    verdict: &'static str,
    #[serde(skip)]
    change: String,
}

impl<'a> Report<'a> {
    fn new(
        number: usize,
        outcome: &Outcome,
        decision: &'a Decision,
        mapping: &Mapping,
    ) -> Result<Self, Failure> {
        let (outcome, reason, error) = match outcome {
            Outcome::Synced(effect) => (effect.label(), None, None),
            Outcome::Skipped(skip) => ("skipped", Some(skip.label()), None),
            Outcome::Dead(dead) => (DEAD, Some(dead.reason.label()), Some(dead.error.clone())),
            Outcome::Delayed { obstacle, .. } => {
                return Err(Failure::Unavailable(format!("event {number} could not be planned: {obstacle}")));
            }
            Outcome::Paused(cause) => {
                return Err(Failure::Unavailable(format!(
                    "event {number} could not be planned, Close cannot be worked with: {}\n\
                     hint: `close-sync check` tells more",
                    cause.label()
                )));
            }
        };
        let candidate = |candidate: &'a decision::Candidate| Candidate {
            id: &candidate.id,
            verdict: candidate.verdict.label(),
            in_words: candidate.verdict.words(),
        };
        Ok(Self {
            event: number,
            message_id: None,
            outcome,
            reason,
            error,
            rule: decision.case.map(Case::label),
            rule_in_words: decision.case.map(Case::words),
            look_ups: decision.look_ups.iter().map(LookUp::words).collect(),
            candidates: decision.candidates.iter().map(candidate).collect(),
            records: decision.plan.records.iter().map(|record| Record::new(record, mapping)).collect(),
            left_out: decision.dropped.iter().map(|dropped| LeftOut::new(dropped, mapping)).collect(),
            calls: decision.calls,
            after: Vec::new(),
        })
    }
}

impl<'a> LeftOut<'a> {
    fn new(dropped: &'a Dropped, mapping: &Mapping) -> Self {
        let Dropped { field, reason, value } = dropped;
        let shown = value.as_ref().map_or_else(|| "an object".to_owned(), Value::to_string);
        let label = mapping.label(field);
        let of = if label == *field { String::new() } else { format!(" ({field})") };
        let fits = match reason {
            DropReason::NotAChoice | DropReason::NoSuchUser => there_are(&mapping.choices(field)),
            DropReason::NotAValue => match value {
                Some(Value::Array(_)) => " (`normalize = [\"join\"]` makes a list one text)".to_owned(),
                _ => String::new(),
            },
            DropReason::InvalidEmail
            | DropReason::InvalidPhone
            | DropReason::InvalidUrl
            | DropReason::NotANumber
            | DropReason::NotADate
            | DropReason::NotAnId
            | DropReason::UnknownField
            | DropReason::ListFull
            | DropReason::Refused => String::new(),
        };
        let in_words = format!("{label}{of}: {shown}, {}{fits}", reason.words());
        Self { field, reason: reason.label(), value: value.as_ref(), in_words }
    }
}

impl<'a> Record<'a> {
    fn new(record: &'a RecordPlan, mapping: &Mapping) -> Self {
        let writes = record.written().next().is_some();
        let (action, id) = match &record.record {
            RecordRef::NewLead => ("create lead", None),
            RecordRef::NewContact(lead) => ("create contact", lead.as_ref().map(LeadId::as_str)),
            RecordRef::Lead(id) => (if writes { "update lead" } else { "lead" }, Some(id.as_str())),
            RecordRef::Contact(id) => (if writes { "update contact" } else { "contact" }, Some(id.as_str())),
        };
        Self {
            action,
            id,
            name: record.name.as_deref(),
            forbidden: record.refused.map(Refusal::label),
            fields: record
                .fields
                .iter()
                .map(|field| Field {
                    key: &field.field,
                    label: mapping.label(&field.field),
                    before: field.before.as_ref(),
                    event: &field.wanted,
                    verdict: field.verdict.label(),
                    change: decision::change(field, mapping),
                })
                .collect(),
        }
    }
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

fn print(report: &Report<'_>) {
    let color = match report.outcome {
        DEAD => AnsiColor::Red,
        "skipped" | "unchanged" => AnsiColor::Yellow,
        _ => AnsiColor::Green,
    };
    let color = color.on_default();
    let reason = report.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    let id = report.message_id.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
    anstream::println!(
        "{BOLD}event {}{id}{BOLD:#}: {color}{}{color:#}{reason}",
        report.event,
        report.outcome
    );
    let line = |title: &str, text: &str| anstream::println!("  {DIM}{title:<10}{DIM:#} {text}");
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
    for earlier in &report.after {
        line("note", &format!("event {earlier} would change the same records first"));
    }
}

fn print_record(record: &Record<'_>) {
    let is_new = record.action.starts_with("create");
    let nameless = if is_new { " without name" } else { "" };
    let name = record.name.map_or_else(|| nameless.to_owned(), |name| format!(" \"{name}\""));
    let id = match (record.action, record.id) {
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
