//! `close-sync dlq list`.

use anstyle::Style;
use comfy_table::{ContentArrangement, Table, presets};
use jiff::{Timestamp, Unit};
use serde::Serialize;

use crate::cli::dlq::select::FilterArgs;
use crate::cli::failure::Failure;
use crate::config::Destination;
use crate::dead_letters::group::{Group, Groups};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::Disposition;
use crate::text::{argument, json, line};

/// List what failed, grouped by fingerprint, the most frequent first, with the remedy.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// List each dead letter, oldest first. This is the default for at most 20 dead letters.
    #[arg(long)]
    each: bool,
    /// Print a JSON object with counts, groups, and each dead letter without its body.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listing {
    /// Dead letters in the queue.
    found: usize,
    /// A replay is under way. Its messages are not included.
    replaying: bool,
    groups: Vec<Group>,
    dead_letters: Vec<DeadLetter>,
}

const BOLD: Style = Style::new().bold();
/// With more dead letters, `list` shows each one only with `--each`.
const MAX_LISTED: usize = 20;

pub(super) async fn list(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let (mut groups, mut letters) = (Groups::default(), Vec::new());
    let keep = |letter: &DeadLetter| {
        groups.add(letter);
        letters.push(letter.without_body());
        Disposition::Return
    };
    let summary = args.filter.scan(destination, keep).await?;
    letters.sort_by_key(|letter| letter.failed_at);
    let listing = Listing {
        found: summary.found,
        replaying: summary.replaying,
        groups: groups.sorted(),
        dead_letters: letters,
    };
    if args.json {
        anstream::println!("{}", json(&serde_json::to_string_pretty(&listing).unwrap_or_default()));
    } else {
        listing.print(args.each);
    }
    Ok(())
}

impl Listing {
    fn print(&self, each: bool) {
        let Self { found, groups, dead_letters, .. } = self;
        if dead_letters.is_empty() {
            match found {
                0 => anstream::println!("no dead letters"),
                found => anstream::println!("none of {found} dead letters match"),
            }
            return;
        }
        let now = Timestamp::now();
        if each || dead_letters.len() <= MAX_LISTED {
            let mut table = plain_table();
            table.set_header(["id", "message id", "age", "attempts", "replays", "fingerprint"]);
            for letter in dead_letters {
                table.add_row([
                    line(&letter.id),
                    line(letter.message_id.as_deref().unwrap_or("-")),
                    age(letter.failed_at, now),
                    letter.attempts.map_or_else(|| "-".into(), |attempts| attempts.to_string()),
                    letter.replays.to_string(),
                    line(&letter.fingerprint) + if letter.edited_at.is_some() { ", edited" } else { "" },
                ]);
            }
            anstream::println!("{table}\n");
        }
        for group in groups {
            let Group { count, fingerprint, first, last, failed_again, example, error, remedy, .. } = group;
            let times = format!("first {}, last {}", ago(*first, now), ago(*last, now));
            let again =
                if *failed_again > 0 { format!(", {failed_again} replayed before") } else { String::new() };
            let (bold, plain) = (BOLD.render(), BOLD.render_reset());
            anstream::println!("{bold}{count}  {}{plain}  {times}{again}", line(fingerprint));
            if let Some(error) = error {
                anstream::println!("    {}", line(error));
            }
            anstream::println!("    what to do: {remedy}");
            anstream::println!("    close-sync dlq show {}", argument(example));
        }
        if !each && dead_letters.len() > MAX_LISTED {
            anstream::eprintln!(
                "{} of {found} dead letters; use `--each` to list them, and `--reason` or other filters to select",
                dead_letters.len()
            );
        }
    }
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn age(time: Option<Timestamp>, now: Timestamp) -> String {
    let Some(time) = time else { return "-".into() };
    if time > now {
        // The clock of the machine that set it was wrong, or it is forged.
        return time.to_string();
    }
    now.duration_since(time).round(Unit::Second).map_or_else(|_| "-".into(), |span| format!("{span:#}"))
}

fn ago(time: Option<Timestamp>, now: Timestamp) -> String {
    match time {
        None => "at an unknown time".into(),
        Some(future) if future > now => format!("at {future} (in the future)"),
        past => format!("{} ago", age(past, now)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_in_the_future_is_shown_as_a_time() {
        let now: Timestamp = "2026-11-24T09:00:00Z".parse().unwrap();
        let shown = |text: &str| {
            let time = text.parse().ok();
            (age(time, now), ago(time, now))
        };
        assert_eq!(shown("2026-11-24T08:59:58.4Z"), ("2s".into(), "2s ago".into()));
        assert_eq!(shown("2026-11-24T09:00:00Z"), ("0s".into(), "0s ago".into()));
        let future = "9991-01-01T00:00:00Z";
        assert_eq!(shown(future), (future.into(), format!("at {future} (in the future)")));
        assert_eq!(shown(""), ("-".into(), "at an unknown time".into()));
    }
}
