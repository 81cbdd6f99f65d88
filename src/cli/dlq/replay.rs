//! `close-sync dlq replay`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cli::dlq::list::printable;
use crate::cli::dlq::{Disposition, Failure, ScanSummary, UNFIT, Which, bar, nothing};
use crate::config::Destination;
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::{End, Progress, Stage};
use crate::dead_letters::replay::{ReplayRequest, replay as run};
use crate::text::count;

/// Send dead letters through the work queue again: one first, then the rest.
///
/// The oldest one meant is sent by itself. When the worker has told that it did not fail again, the others follow, a
/// few at a time, so that live messages do not stand behind all of them. It stops as soon as one fails in a way that
/// is known already.
///
/// Each is confirmed by the broker before its dead letter is removed. Interrupt it at any time, and run it again to
/// go on: what was not sent is still there. An interruption may send a message twice, which changes nothing in Close.
///
/// Exits with 1 when dead letters failed again or it was stopped, with 69 when it was not told what became of all: no
/// worker answers, or the connection was lost meanwhile. While another replay is under way, it waits.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    which: Which,
    /// Only count what would be replayed.
    #[arg(long)]
    dry_run: bool,
    /// At most so many under way at a time: live messages stand behind them.
    #[arg(long, value_name = "N", default_value_t = ReplayRequest::MAX_IN_FLIGHT, value_parser = clap::value_parser!(u16).range(1..))]
    at_once: u16,
    /// Go on when they fail again.
    #[arg(long)]
    keep_going: bool,
    /// How long to wait for news of a worker.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    wait: Duration,
    /// Send all at once, without waiting for what becomes of the first or of any.
    #[arg(long, conflicts_with_all = ["at_once", "keep_going", "wait"])]
    no_wait: bool,
    /// Print a JSON object with what became of them.
    #[arg(long)]
    json: bool,
}

fn time(text: &str) -> Result<Duration, String> {
    let span: Result<jiff::SignedDuration, _> = text.parse();
    let time = span.ok().and_then(|span| Duration::try_from(span).ok());
    time.ok_or_else(|| "it is a time like 30s, 10m or 1h".to_owned())
}

pub(super) async fn replay(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let meant = &args.which.meant;
    if args.dry_run {
        let mut groups = BTreeMap::new();
        let count = |letter: &DeadLetter| {
            *groups.entry(letter.fingerprint.clone()).or_default() += 1;
            Disposition::Return
        };
        let ScanSummary { found, matched, .. } = meant.each(destination, count).await?;
        if args.json {
            let told = json!({"end": "dry_run", "found": found, "matched": matched, "groups": groups});
            anstream::println!("{}", serde_json::to_string_pretty(&told).unwrap_or_default());
        }
        if matched == 0 {
            return nothing(meant);
        }
        if !args.json {
            let kinds = by_number(&groups);
            anstream::println!("would replay {matched} of {found} ({kinds}); run without --dry-run to do it");
        }
        return Ok(());
    }
    let order = ReplayRequest {
        selection: meant.selection(&destination.rules),
        max_in_flight: args.at_once.into(),
        keep_going: args.keep_going,
        outcome_timeout: (!args.no_wait).then_some(args.wait),
    };
    let (told, progress) = watch::channel(Progress::default());
    let stop = interrupted();
    let shown = tokio::spawn(show(progress));
    let ended = run(&destination.amqp, order, told, &stop).await;
    let _ = shown.await;
    let (progress, end) = ended?;
    if args.json {
        let summary = Summary::of(&progress, &end);
        anstream::println!("{}", serde_json::to_string_pretty(&summary).unwrap_or_default());
    }
    if end == End::Done && progress.matched == 0 {
        return nothing(meant);
    }
    if !args.json {
        print(&progress, args.no_wait);
    }
    conclude(&progress, &end)
}

/// The first interruption stops sending; a second one ends the process, which loses nothing either.
fn interrupted() -> CancellationToken {
    let stop = CancellationToken::new();
    let asked = stop.clone();
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if asked.is_cancelled() {
                std::process::exit(UNFIT.into());
            }
            asked.cancel();
        }
    });
    stop
}

/// Without a terminal, a line that often.
const LINES_APART: Duration = Duration::from_secs(30);

/// Shows how far it has come: a bar on a terminal, otherwise a line for each stage and now and then.
async fn show(mut progress: watch::Receiver<Progress>) {
    let bar = bar("{msg} {wide_bar} {pos} of {len}, {per_sec}, {eta} left");
    let (mut before, mut told) = (None, Instant::now());
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        if bar.is_hidden() && now.stage == Stage::Sending && told.elapsed() > LINES_APART {
            told = Instant::now();
            anstream::eprintln!(
                "{} of {} have an end, {} under way",
                now.finished(),
                now.matched,
                now.in_flight
            );
        }
        bar.set_length(now.matched as u64);
        bar.set_position(now.finished() as u64);
        bar.set_message(now.describe());
        let is_idle = now.stage == Stage::Canary && now.work.is_some_and(|work| work.consumers == 0);
        if before != Some((now.stage.clone(), is_idle)) {
            tell(&bar, &now, is_idle);
        }
        before = Some((now.stage, is_idle));
    }
    bar.finish_and_clear();
}

/// How many there are of each.
fn by_number(counts: &BTreeMap<String, usize>) -> String {
    let all: Vec<_> = counts.iter().map(|(what, number)| format!("{number} {}", printable(what))).collect();
    all.join(", ")
}

/// What is worth a line.
fn tell(bar: &ProgressBar, progress: &Progress, is_idle: bool) {
    let line = match progress.stage {
        Stage::Canary if is_idle => {
            "no worker consumes from the work queue: start one, or see why it is paused (`/readyz`)"
                .to_owned()
        }
        Stage::Waiting => "another operator is at the dead letters; waiting".to_owned(),
        Stage::Reconnecting => "the connection to RabbitMQ was lost; connecting again".to_owned(),
        Stage::Canary if bar.is_hidden() => {
            format!("sent the first of {}, waiting for what becomes of it", progress.matched)
        }
        Stage::Canary | Stage::Scanning | Stage::Sending | Stage::Finishing | Stage::Finished(_) => return,
    };
    bar.suspend(|| anstream::eprintln!("{line}"));
}

#[derive(Serialize)]
struct Summary<'a> {
    end: &'static str,
    matched: usize,
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
    parts.extend((!progress.outcomes.is_empty()).then(|| by_number(&progress.outcomes)));
    parts.extend((progress.in_flight > 0 && !no_wait).then(|| format!("{} under way", progress.in_flight)));
    parts.extend((progress.missed > 0).then(|| format!("{} not heard of", progress.missed)));
    let rest = progress.matched.saturating_sub(progress.sent);
    parts.extend((rest > 0).then(|| format!("{rest} not sent")));
    anstream::println!("{}", parts.join("; "));
}

/// What to do next, and the exit code.
fn conclude(progress: &Progress, end: &End) -> Result<(), Failure> {
    if let Some(again) = &progress.last_failure {
        let several = progress.failures.len() > 1;
        if several {
            anstream::eprintln!("failed again: {}; the last:", by_number(&progress.failures));
        }
        let lead = if several { "" } else { "failed again: " };
        anstream::eprintln!("{lead}{}, {}", printable(&again.fingerprint), printable(&again.error));
        if let Some(said) = &again.close_said {
            anstream::eprintln!("Close said: {}", printable(said.reveal()));
        }
        anstream::eprintln!("hint: `close-sync dlq show {}` tells more", again.id);
    }
    match end {
        End::Done if progress.failed_again() > 0 => Err(Failure::Told(UNFIT)),
        End::Done => Ok(()),
        End::CanaryFailed | End::SameFailure | End::Stopped => {
            let hint = if *end == End::SameFailure { " (--keep-going does not stop)" } else { "" };
            anstream::eprintln!("{}{hint}", progress.describe());
            Err(Failure::Told(UNFIT))
        }
        End::TimedOut if progress.only_missed() => Err(Failure::Unavailable(format!(
            "{}. If one still does, `close-sync dlq list` shows it",
            progress.describe()
        ))),
        End::TimedOut => {
            let ahead = progress.work.map(|work| work.ready).filter(|ahead| *ahead > 0);
            let line = ahead.map(|ahead| {
                format!(" {} in the work queue.", count(ahead, "message waits", "messages wait"))
            });
            Err(Failure::Unavailable(format!(
                "no worker told what became of {}: what was sent is worked on when its turn comes.{} Does a worker run, and \
                 is it ready (`/readyz`)? `--wait` waits longer, `--no-wait` not at all",
                count((progress.in_flight + progress.missed) as u64, "message", "messages"),
                line.unwrap_or_default()
            )))
        }
    }
}
