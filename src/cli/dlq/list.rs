//! `close-sync dlq list`.

use comfy_table::{ContentArrangement, Table, presets};
use jiff::{Timestamp, Unit};
use serde::Serialize;

use super::{Failure, Fate, Meant};
use crate::amqp::dead_letters::letter::DeadLetter;
use crate::amqp::dead_letters::select::{Group, Groups};
use crate::config::Destination;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    meant: Meant,
    /// Also list each dead letter, oldest first, however many there are; otherwise only a few are.
    #[arg(long)]
    each: bool,
    /// Print a JSON object: counts, groups and each dead letter without its body.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listing {
    /// Dead letters in the queue.
    found: usize,
    groups: Vec<Group>,
    dead_letters: Vec<DeadLetter>,
}

/// More are listed only when asked for.
const A_FEW: usize = 20;

pub(super) async fn list(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let (mut groups, mut letters) = (Groups::default(), Vec::new());
    let keep = |letter: &DeadLetter| {
        groups.add(letter);
        letters.push(letter.without_body());
        Fate::Back
    };
    let sifted = args.meant.each(destination, keep).await?;
    letters.sort_by_key(|letter| letter.failed_at);
    let listing = Listing { found: sifted.found, groups: groups.sorted(), dead_letters: letters };
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&listing).unwrap_or_default());
    } else {
        listing.print(args.each);
    }
    Ok(())
}

impl Listing {
    fn print(&self, each: bool) {
        let Self { found, groups, dead_letters } = self;
        if dead_letters.is_empty() {
            match found {
                0 => anstream::println!("no dead letters"),
                found => anstream::println!("none of {found} dead letters matches"),
            }
            return;
        }
        let now = Timestamp::now();
        if each || dead_letters.len() <= A_FEW {
            let mut table = plain_table();
            table.set_header(["id", "age", "what", "tries", "replays", "error"]);
            for letter in dead_letters {
                table.add_row([
                    printable(&letter.id),
                    age(letter.failed_at, now),
                    printable(&letter.fingerprint),
                    letter.attempts.map_or_else(|| "-".into(), |attempts| attempts.to_string()),
                    letter.replays.to_string(),
                    printable(letter.error.as_deref().unwrap_or("-")),
                ]);
            }
            anstream::println!("{table}\n");
        }
        let mut table = plain_table();
        table.set_header(["count", "what", "first", "last", "again", "what to do"]);
        for group in groups {
            table.add_row([
                group.count.to_string(),
                printable(&group.fingerprint),
                age(group.first, now),
                age(group.last, now),
                group.failed_again.to_string(),
                group.remedy.to_owned(),
            ]);
        }
        anstream::println!("{table}");
        if !each && dead_letters.len() > A_FEW {
            anstream::eprintln!(
                "{} of {found} dead letters; `--each` lists them, `--reason` and others choose",
                dead_letters.len()
            );
        }
    }
}

/// Bytes of strangers must not steer the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

pub(super) fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn age(time: Option<Timestamp>, now: Timestamp) -> String {
    let rounded = time.and_then(|time| now.duration_since(time).round(Unit::Second).ok());
    rounded.map_or_else(|| "-".into(), |span| format!("{span:#}"))
}
