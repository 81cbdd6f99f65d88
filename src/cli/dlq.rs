//! `close-sync dlq`: look at dead letters, replay or discard them.

use std::collections::BTreeMap;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::{Timestamp, Unit};

use super::{Failure, INPUT};
use crate::amqp::Settings;
use crate::amqp::dead_letters::{DeadLetter, Verb, Walked, walk};
use crate::outcome::Reason;

/// Look at dead letters, replay or discard them.
///
/// Looking changes nothing: every message goes back to its place. While one command looks, another
/// does not see the same messages.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List dead letters, oldest first, and count them by what went wrong.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Print a JSON list, without bodies.
        #[arg(long)]
        json: bool,
    },
    /// Show one dead letter whole, with its body: personal data.
    Show {
        /// The id, as `list` prints it.
        id: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters through the work queue again.
    ///
    /// A replay is confirmed by the broker before its dead letter is removed: an interruption may
    /// duplicate a message, which changes nothing in Close, but loses none.
    Replay {
        #[command(flatten)]
        which: Which,
        /// Only count what would be replayed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete dead letters for good.
    Discard {
        #[command(flatten)]
        which: Which,
        /// Confirm: what is discarded cannot be brought back. Without it, only count.
        #[arg(long)]
        yes: bool,
    },
}

/// Which dead letters.
#[derive(clap::Args)]
pub(super) struct Filter {
    /// Only this reason; may be given several times.
    #[arg(long, value_name = "REASON", value_parser = Reason::ALL.map(Reason::label))]
    reason: Vec<String>,
    /// Only this id; may be given several times.
    #[arg(long, value_name = "ID")]
    id: Vec<String>,
    /// At most this many, oldest first.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Which dead letters, said on purpose.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["all", "reason", "id"]))]
pub(super) struct Which {
    #[command(flatten)]
    filter: Filter,
    /// All of them.
    #[arg(long, conflicts_with_all = ["reason", "id"])]
    all: bool,
}

impl Filter {
    fn matches(&self, letter: &DeadLetter) -> bool {
        let reason = letter.reason.as_deref().unwrap_or_default();
        (self.reason.is_empty() || self.reason.iter().any(|wanted| wanted == reason))
            && (self.id.is_empty() || self.id.contains(&letter.id))
    }

    /// Asks `matching` about those meant; the others are kept.
    fn decide(&self, mut matching: impl FnMut(&DeadLetter) -> Verb) -> impl FnMut(&DeadLetter) -> Verb {
        let mut left = self.limit.unwrap_or(usize::MAX);
        move |letter| {
            if left == 0 {
                return Verb::Stop;
            }
            if !self.matches(letter) {
                return Verb::Keep;
            }
            left -= 1;
            matching(letter)
        }
    }
}

pub(super) async fn dlq(command: Command, settings: Settings) -> Result<(), Failure> {
    match command {
        Command::List { filter, json } => {
            let mut letters = Vec::new();
            let decide = filter.decide(|letter| {
                letters.push(DeadLetter { body: Vec::new(), ..letter.clone() });
                Verb::Keep
            });
            let walked = each(&settings, decide).await?;
            if json {
                anstream::println!("{}", serde_json::to_string_pretty(&letters).unwrap_or_default());
            } else {
                list(&letters, walked.found);
            }
            Ok(())
        }
        Command::Show { id, json } => {
            let mut found = None;
            each(&settings, |letter| {
                if letter.id != id {
                    return Verb::Keep;
                }
                found = Some(letter.clone());
                Verb::Stop
            })
            .await?;
            match found {
                Some(letter) => {
                    show(&letter, json);
                    Ok(())
                }
                None => Err(Failure::Input(format!(
                    "there is no dead letter `{id}`; `close-sync dlq list` names them"
                ))),
            }
        }
        Command::Replay { which, dry_run } => {
            let verb = if dry_run { Verb::Keep } else { Verb::Replay };
            let (matched, walked) = act(&settings, &which.filter, verb).await?;
            if dry_run {
                anstream::println!(
                    "would replay {matched} of {}; run without --dry-run to do it",
                    walked.remaining()
                );
            } else {
                anstream::println!("replayed {}, {} remain", walked.replayed, walked.remaining());
            }
            nothing_if(matched == 0)
        }
        Command::Discard { which, yes } => {
            let verb = if yes { Verb::Discard } else { Verb::Keep };
            let (matched, walked) = act(&settings, &which.filter, verb).await?;
            if yes {
                anstream::println!("discarded {}, {} remain", walked.discarded, walked.remaining());
                return nothing_if(matched == 0);
            }
            Err(Failure::Input(format!(
                "this would delete {matched} of {} dead letters for good; add --yes to do it",
                walked.remaining()
            )))
        }
    }
}

/// Acting on nothing is worth an exit code: a script has most likely misspelt an id.
fn nothing_if(nothing: bool) -> Result<(), Failure> {
    if nothing {
        anstream::eprintln!("no dead letter matches; `close-sync dlq list` names them");
        return Err(Failure::Told(INPUT));
    }
    Ok(())
}

async fn act(settings: &Settings, filter: &Filter, verb: Verb) -> Result<(usize, Walked), Failure> {
    let mut matched = 0;
    let decide = filter.decide(|_| {
        matched += 1;
        verb
    });
    let walked = each(settings, decide).await?;
    Ok((matched, walked))
}

/// Walks the queue with a progress bar on terminals.
async fn each(settings: &Settings, decide: impl FnMut(&DeadLetter) -> Verb) -> Result<Walked, Failure> {
    let style = ProgressStyle::with_template("{wide_bar} {pos} of {len}, {eta} left");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let walked = walk(settings, decide, |total| {
        bar.set_length(total.into());
        bar.inc(1);
    })
    .await;
    bar.finish_and_clear();
    Ok(walked?)
}

fn list(letters: &[DeadLetter], found: usize) {
    if letters.is_empty() {
        match found {
            0 => anstream::println!("no dead letters"),
            found => anstream::println!("none of {found} dead letters matches"),
        }
        return;
    }
    let now = Timestamp::now();
    let mut table = plain_table();
    table.set_header(["id", "age", "what", "tries", "replays", "error"]);
    let mut groups: BTreeMap<&str, (usize, Option<Timestamp>)> = BTreeMap::new();
    for letter in letters {
        let fingerprint = letter.fingerprint.as_deref().unwrap_or("by the broker");
        let group = groups.entry(fingerprint).or_default();
        group.0 += 1;
        group.1 = group.1.max(letter.failed_at);
        table.add_row([
            printable(&letter.id),
            age(letter.failed_at, now),
            printable(fingerprint),
            letter.attempts.map_or_else(|| "-".into(), |attempts| attempts.to_string()),
            letter.replays.to_string(),
            printable(letter.error.as_deref().unwrap_or("-")),
        ]);
    }
    anstream::println!("{table}\n");

    let mut table = plain_table();
    table.set_header(["count", "what", "last", "what to do"]);
    for (fingerprint, (count, last)) in groups {
        let reason =
            Reason::ALL.into_iter().find(|reason| fingerprint.split(':').next() == Some(reason.label()));
        let remedy = reason.map_or("look at the headers with `dlq show`", Reason::remedy);
        table.add_row([count.to_string(), printable(fingerprint), age(last, now), remedy.to_owned()]);
    }
    anstream::println!("{table}");
}

fn show(letter: &DeadLetter, json: bool) {
    let body: Option<serde_json::Value> = serde_json::from_slice(&letter.body).ok();
    let text = String::from_utf8_lossy(&letter.body);
    let mut whole = serde_json::to_value(letter).unwrap_or_default();
    if json {
        whole["body"] = body.unwrap_or_else(|| text.into());
        anstream::println!("{}", serde_json::to_string_pretty(&whole).unwrap_or_default());
        return;
    }
    let mut table = plain_table();
    for (name, value) in whole.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let value = value.as_str().map_or_else(|| value.to_string(), printable);
        table.add_row([name.clone(), value]);
    }
    let reason = Reason::ALL.into_iter().find(|reason| Some(reason.label()) == letter.reason.as_deref());
    if let Some(reason) = reason {
        table.add_row(["what to do", reason.remedy()]);
    }
    let body =
        body.and_then(|body| serde_json::to_string_pretty(&body).ok()).unwrap_or_else(|| text.into_owned());
    anstream::println!("{table}\n\n{}", printable(&body));
}

/// Bytes of strangers must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn age(time: Option<Timestamp>, now: Timestamp) -> String {
    let rounded = time.and_then(|time| now.duration_since(time).round(Unit::Second).ok());
    rounded.map_or_else(|| "-".into(), |span| format!("{span:#}"))
}
