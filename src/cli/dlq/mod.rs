//! `close-sync dlq`: one file per command.

mod discard;
mod edit;
mod export;
mod import;
mod list;
mod replay;
mod select;
mod show;
mod terminal;

use crate::cli::failure::Failure;
use crate::config::Destination;

/// List, show, replay, edit, discard, export and import dead letters.
///
/// Start with `list`: it shows what failed, how often, since when, and the remedy. `show` prints one dead letter and
/// what a replay would do now. `replay` sends one message, waits for its outcome, and then sends the rest.
///
/// Reading changes nothing: every dead letter stays in the queue, even if the command is killed. While one command
/// reads the queue, other commands wait.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    List(list::Args),
    Show(show::Args),
    Replay(replay::Args),
    Edit(edit::Args),
    Discard(discard::Args),
    Export(export::Args),
    Import(import::Args),
}

/// `load` reads the settings again, with those that only `show` needs.
pub(super) async fn dlq(
    command: Command,
    destination: Destination,
    load: impl FnOnce() -> Result<Destination, Failure>,
) -> Result<(), Failure> {
    match command {
        Command::List(args) => list::list(&args, &destination).await,
        Command::Show(args) => show::show(&args, &destination, load).await,
        Command::Replay(args) => replay::replay(&args, &destination).await,
        Command::Edit(args) => edit::edit(&args, &destination).await,
        Command::Discard(args) => discard::discard(&args, &destination).await,
        Command::Export(args) => export::export(&args, &destination).await,
        Command::Import(args) => import::import(&args, &destination).await,
    }
}
