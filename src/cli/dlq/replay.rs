//! `close-sync dlq replay`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cli::dlq::select::{SelectionArgs, remembered_from};
use crate::cli::dlq::terminal::{WAITING, bar};
use crate::cli::failure::{CHECK_FAILED, Failure};
use crate::config::Destination;
use crate::dead_letters::guard::{GuardCounts, Guards};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::{End, Progress, Stage};
use crate::dead_letters::replay::{ReplayRequest, replay as run};
use crate::dead_letters::scan::{Disposition, ScanSummary};
use crate::text::{count, json as safe_json, line};

/// Send dead letters to the work queue again: one first, then the rest.
///
/// Sends the oldest message and waits for its outcome. If it does not fail again, sends the others, a few at a time, so
/// that live messages do not queue behind all of them. Stops when a message fails with a fingerprint that a replayed
/// message failed with before.
///
/// Says first how many events are older than what the worker remembers. These change no field of a record that has changed
/// in Close since, unless the records store the time of their last event.
///
/// A dead letter is deleted only after the work queue has it. Ctrl-C stops the replay. Run the same command again to
/// continue. An interrupted replay may send a message twice, which changes nothing in Close.
///
/// Exits with 1 if messages failed again or the replay was stopped. Exits with 69 if the outcome of some messages is
/// unknown, because no worker answered or the connection was lost. Waits while another replay is under way.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    selection: SelectionArgs,
    /// Count the messages without replaying them.
    #[arg(long)]
    dry_run: bool,
    /// Send at most this many messages at a time. Live messages queue behind them.
    #[arg(long, value_name = "N", default_value_t = ReplayRequest::MAX_IN_FLIGHT, value_parser = clap::value_parser!(u16).range(1..))]
    at_once: u16,
    /// Continue when messages fail with the same fingerprint again. By default, the replay stops.
    #[arg(long)]
    keep_going: bool,
    /// Wait this long for an outcome, for example `30s` or `1h`.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    wait: Duration,
    /// Send all messages at once, without waiting for outcomes.
    #[arg(long, conflicts_with_all = ["at_once", "keep_going", "wait"])]
    no_wait: bool,
    /// Print the result as a JSON object.
    #[arg(long)]
    json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: Result<jiff::SignedDuration, _> = text.parse();
    let duration = span.ok().and_then(|span| Duration::try_from(span).ok());
    duration.ok_or_else(|| "expected a duration like 30s, 10m or 1h".to_owned())
}

pub(super) async fn replay(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let filter = &args.selection.filter;
    let guards = Guards::new(&destination.rules, remembered_from(destination).await?);
    if args.dry_run {
        let (mut groups, mut guarded) = (BTreeMap::new(), GuardCounts::new());
        let count = |letter: &DeadLetter| {
            *groups.entry(letter.fingerprint.clone()).or_default() += 1;
            if let Some(guard) = guards.of(letter) {
                *guarded.entry(guard).or_default() += 1;
            }
            Disposition::Return
        };
        let ScanSummary { found, matched, .. } = filter.scan(destination, count).await?;
        if args.json {
            let summary = json!({"end": "dry_run", "found": found, "matched": matched, "groups": groups, "guards": guarded});
            anstream::println!("{}", safe_json(&serde_json::to_string_pretty(&summary).unwrap_or_default()));
        }
        if matched == 0 {
            return filter.nothing_matches();
        }
        if !args.json {
            let kinds = counts(&groups);
            anstream::println!("would replay {matched} of {found} ({kinds}); run without --dry-run to do it");
            guards.describe(&guarded).iter().for_each(|line| anstream::println!("{line}"));
        }
        return Ok(());
    }
    let request = ReplayRequest {
        selection: filter.selection(&destination.rules),
        max_in_flight: args.at_once.into(),
        keep_going: args.keep_going,
        outcome_timeout: (!args.no_wait).then_some(args.wait),
        guards: Some(guards),
    };
    let (sender, progress) = watch::channel(Progress::default());
    let stop = stop_on_interrupt();
    let shown = tokio::spawn(show(progress, guards));
    let result = run(&destination.amqp, request, sender, &stop).await;
    let _ = shown.await;
    let (progress, end) = result?;
    if args.json {
        let summary = Summary::of(&progress, &end);
        anstream::println!("{}", safe_json(&serde_json::to_string_pretty(&summary).unwrap_or_default()));
    }
    if end == End::Done && progress.matched == 0 {
        return filter.nothing_matches();
    }
    if !args.json {
        print(&progress, args.no_wait);
    }
    conclude(&progress, &end)
}

/// The first Ctrl-C stops sending. A second one ends the process, which loses nothing either.
fn stop_on_interrupt() -> CancellationToken {
    let stop = CancellationToken::new();
    let requested = stop.clone();
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if requested.is_cancelled() {
                std::process::exit(CHECK_FAILED.into());
            }
            requested.cancel();
        }
    });
    stop
}

/// How often to print a line when standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// Shows progress: a bar on a terminal, otherwise a line for each stage and every [`LINE_INTERVAL`].
async fn show(mut progress: watch::Receiver<Progress>, guards: Guards) {
    let bar = bar("{msg} {wide_bar} {pos} of {len}, {per_sec}, {eta} left");
    let (mut before, mut last_line, mut is_described) = (None, Instant::now(), false);
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        if bar.is_hidden() && now.stage == Stage::Sending && last_line.elapsed() > LINE_INTERVAL {
            last_line = Instant::now();
            anstream::eprintln!(
                "{} of {} finished, {} under way",
                now.finished(),
                now.matched,
                now.in_flight
            );
        }
        if !is_described && !now.guards.is_empty() {
            is_described = true;
            for line in guards.describe(&now.guards) {
                bar.suspend(|| anstream::eprintln!("{line}"));
            }
        }
        bar.set_length(now.matched as u64);
        bar.set_position(now.finished() as u64);
        bar.set_message(line(&now.describe()));
        let is_idle = now.stage == Stage::Canary && now.work.is_some_and(|work| work.consumers == 0);
        if before != Some((now.stage.clone(), is_idle)) {
            print_stage(&bar, &now, is_idle);
        }
        before = Some((now.stage, is_idle));
    }
    bar.finish_and_clear();
}

/// `3 created, 1 dead`.
fn counts(counts: &BTreeMap<String, usize>) -> String {
    let all: Vec<_> = counts.iter().map(|(what, number)| format!("{number} {}", line(what))).collect();
    all.join(", ")
}

/// Prints a line if the stage is worth one.
fn print_stage(bar: &ProgressBar, progress: &Progress, is_idle: bool) {
    let line = match progress.stage {
        Stage::Canary if is_idle => {
            "no worker consumes from the work queue; start one, or see `/readyz` for why it is paused"
                .to_owned()
        }
        Stage::Waiting => WAITING.to_owned(),
        Stage::Reconnecting => "lost connection to RabbitMQ, reconnecting".to_owned(),
        Stage::Canary if bar.is_hidden() => {
            format!("sent the first of {}, waiting for its outcome", progress.matched)
        }
        Stage::Canary | Stage::Scanning | Stage::Sending | Stage::Finishing | Stage::Finished(_) => return,
    };
    bar.suspend(|| anstream::eprintln!("{line}"));
}

#[derive(Serialize)]
struct Summary<'a> {
    end: &'static str,
    matched: usize,
    guards: &'a GuardCounts,
    replayed: usize,
    outcomes: &'a BTreeMap<String, usize>,
    under_way: usize,
    missed: usize,
    failed_again: usize,
    failures: &'a BTreeMap<String, usize>,
    last_failure: Option<&'a crate::consumer::outcome_events::DeadLetterSummary>,
}

impl<'a> Summary<'a> {
    fn of(progress: &'a Progress, end: &End) -> Self {
        Self {
            end: match end {
                End::Done => "done",
                End::CanaryFailed => "first_failed",
                End::SameFailure => "failed_alike",
                End::TimedOut => "silent",
                End::Stopped => "stopped",
            },
            matched: progress.matched,
            guards: &progress.guards,
            replayed: progress.sent,
            outcomes: &progress.outcomes,
            under_way: progress.in_flight,
            missed: progress.missed,
            failed_again: progress.failed_again(),
            failures: &progress.failures,
            last_failure: progress.last_failure.as_ref(),
        }
    }
}

fn print(progress: &Progress, no_wait: bool) {
    let mut parts = vec![format!("replayed {}", progress.sent)];
    parts.extend((!progress.outcomes.is_empty()).then(|| counts(&progress.outcomes)));
    parts.extend((progress.in_flight > 0 && !no_wait).then(|| format!("{} under way", progress.in_flight)));
    parts.extend((progress.missed > 0).then(|| format!("{} with unknown outcome", progress.missed)));
    let unsent = progress.matched.saturating_sub(progress.sent);
    parts.extend((unsent > 0).then(|| format!("{unsent} not sent")));
    anstream::println!("{}", parts.join("; "));
}

/// Prints failures and what to do next, and decides on the exit code.
fn conclude(progress: &Progress, end: &End) -> Result<(), Failure> {
    if let Some(failure) = &progress.last_failure {
        let several = progress.failures.len() > 1;
        if several {
            anstream::eprintln!("failed again: {}; the latest:", counts(&progress.failures));
        }
        let lead = if several { "" } else { "failed again: " };
        anstream::eprintln!("{lead}{}, {}", line(&failure.fingerprint), line(&failure.error));
        if let Some(said) = &failure.close_said {
            anstream::eprintln!("Close said: {}", line(said.reveal()));
        }
        anstream::eprintln!("hint: for details, run `close-sync dlq show {}`", failure.id);
    }
    match end {
        End::Done if progress.failed_again() > 0 => Err(Failure::Reported(CHECK_FAILED)),
        End::Done => Ok(()),
        End::CanaryFailed | End::SameFailure | End::Stopped => {
            let hint = if *end == End::SameFailure { " (use --keep-going to continue)" } else { "" };
            anstream::eprintln!("{}{hint}", line(&progress.describe()));
            Err(Failure::Reported(CHECK_FAILED))
        }
        End::TimedOut if progress.only_missed() => Err(Failure::Unavailable(format!(
            "{}. Later failures appear in `close-sync dlq list`",
            line(&progress.describe())
        ))),
        End::TimedOut => {
            let ready = progress.work.map(|work| work.ready).filter(|ready| *ready > 0);
            let waiting = ready.map(|ready| {
                format!(" {} in the work queue.", count(ready, "message waits", "messages wait"))
            });
            Err(Failure::Unavailable(format!(
                "no outcome received for {}. The next worker will process what was sent.{} Check that a worker is \
                 running and ready (`/readyz`). `--wait` sets a longer timeout, `--no-wait` does not wait",
                count((progress.in_flight + progress.missed) as u64, "message", "messages"),
                waiting.unwrap_or_default()
            )))
        }
    }
}
