//! `close-sync dlq list`.

use anstyle::Style;
use comfy_table::{ContentArrangement, Table, presets};
use jiff::{Timestamp, Unit};
use serde::Serialize;

use crate::cli::dlq::{Disposition, Failure, Meant};
use crate::config::Destination;
use crate::dead_letters::group::{Group, Groups};
use crate::dead_letters::letter::DeadLetter;

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
    /// What a replay has in hand is not among them.
    replaying: bool,
    groups: Vec<Group>,
    dead_letters: Vec<DeadLetter>,
}

const BOLD: Style = Style::new().bold();
/// More are listed only when asked for.
const A_FEW: usize = 20;

pub(super) async fn list(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let (mut groups, mut letters) = (Groups::default(), Vec::new());
    let keep = |letter: &DeadLetter| {
        groups.add(letter);
        letters.push(letter.without_body());
        Disposition::Return
    };
    let sifted = args.meant.each(destination, keep).await?;
    letters.sort_by_key(|letter| letter.failed_at);
    let listing = Listing {
        found: sifted.found,
        replaying: sifted.replaying,
        groups: groups.sorted(),
        dead_letters: letters,
    };
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&listing).unwrap_or_default());
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
                found => anstream::println!("none of {found} dead letters matches"),
            }
            return;
        }
        let now = Timestamp::now();
        if each || dead_letters.len() <= A_FEW {
            let mut table = plain_table();
            table.set_header(["id", "message id", "age", "tries", "replays", "what"]);
            for letter in dead_letters {
                table.add_row([
                    printable(&letter.id),
                    printable(letter.message_id.as_deref().unwrap_or("-")),
                    age(letter.failed_at, now),
                    letter.attempts.map_or_else(|| "-".into(), |attempts| attempts.to_string()),
                    letter.replays.to_string(),
                    printable(&letter.fingerprint) + if letter.edited_at.is_some() { ", edited" } else { "" },
                ]);
            }
            anstream::println!("{table}\n");
        }
        for group in groups {
            let Group { count, fingerprint, first, last, failed_again, example, error, remedy, .. } = group;
            let times = format!("first {} ago, last {} ago", age(*first, now), age(*last, now));
            let again =
                if *failed_again > 0 { format!(", {failed_again} replayed before") } else { String::new() };
            let (bold, plain) = (BOLD.render(), BOLD.render_reset());
            anstream::println!("{bold}{count}  {}{plain}  {times}{again}", printable(fingerprint));
            if let Some(error) = error {
                anstream::println!("    {}", printable(error));
            }
            anstream::println!("    what to do: {remedy}");
            anstream::println!("    close-sync dlq show {}", printable(example));
        }
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
    text.chars()
        .map(|c| if (c.is_control() && c != '\n') || is_direction(c) { '\u{fffd}' } else { c })
        .collect()
}

/// Turns the text around it.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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
