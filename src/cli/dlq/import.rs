//! `close-sync dlq import`.

use std::path::PathBuf;

use crate::cli::dlq::terminal::{observer, scan_bar};
use crate::cli::failure::Failure;
use crate::cli::input::read;
use crate::config::Destination;
use crate::dead_letters::import::{self, Imported};
use crate::dead_letters::letter::DeadLetter;
use crate::text::line;

/// Put exported dead letters back into the queue.
///
/// Skips dead letters that are already in the queue, and replaces those with the same id and different content. An
/// import can therefore be repeated, and can apply edits made to the file. For example:
///
/// `jq -c '.body |= (fromjson | (.traits.phone // empty) |= gsub(" "; "") | tojson)' dead.ndjson | close-sync dlq import -`
///
/// Some tools round numbers, such as jq 1.6 above 2^53. A rounded id belongs to another person.
///
/// During a replay, the command imports nothing and exits with 69.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Read dead letters from this file, written by `export`, or from standard input with `-`.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) async fn import(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let letters = parse(&read(&args.file).await?)?;
    let bar = scan_bar();
    let imported = import::import(&destination.amqp, &letters, &mut observer(&bar)).await;
    bar.finish_and_clear();
    let Imported { added, replaced, present } = imported?;
    anstream::println!("imported {added}, replaced {replaced}, {present} already present");
    Ok(())
}

/// Parses all lines before the first is imported, so that a damaged file changes nothing.
fn parse(bytes: &[u8]) -> Result<Vec<DeadLetter>, Failure> {
    let lines =
        (1..).zip(bytes.split(|&byte| byte == b'\n')).filter(|(_, line)| !line.trim_ascii().is_empty());
    let parse = |(number, bytes): (usize, &[u8])| {
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string());
        text.and_then(DeadLetter::from_line)
            .map_err(|why| Failure::Input(format!("line {number}: {}; nothing was imported", line(&why))))
    };
    lines.map(parse).collect()
}
