//! `close-sync dlq discard`.

use crate::cli::dlq::select::SelectionArgs;
use crate::cli::failure::Failure;
use crate::config::Destination;
use crate::dead_letters::edit;
use crate::dead_letters::scan::{Disposition, ScanSummary};
use crate::text::count;

/// Delete dead letters permanently.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    selection: SelectionArgs,
    /// Confirm the deletion, which cannot be undone. Without this flag, the command only counts and exits with 2.
    #[arg(long)]
    yes: bool,
}

pub(super) async fn discard(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let filter = &args.selection.filter;
    let disposition = if args.yes { Disposition::Delete } else { Disposition::Return };
    if args.yes {
        // Otherwise the outdated version of an edited dead letter would remain after the new one is deleted.
        edit::complete_interrupted(&destination.amqp, &mut |_| {}).await?;
    }
    let ScanSummary { found, matched, deleted, .. } = filter.scan(destination, |_| disposition).await?;
    if matched == 0 {
        return filter.nothing_matches();
    }
    if args.yes {
        anstream::println!("discarded {deleted}, {} remain", found - deleted);
        return Ok(());
    }
    Err(Failure::Input(format!(
        "this would delete {matched} of {} for good; add --yes to delete them, or keep a copy first with \
         `close-sync dlq export`",
        count(found as u64, "dead letter", "dead letters")
    )))
}
