//! `close-sync dlq export`.

use std::io::{ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};

use crate::cli::dlq::select::FilterArgs;
use crate::cli::failure::{CHECK_FAILED, Failure};
use crate::config::Destination;
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::Disposition;
use crate::text::{count, json, line};

/// Export dead letters as JSON lines, with everything that an import needs. They stay in the queue.
///
/// The output contains personal data. Exits with 1 during a replay, because the messages of the replay are missing.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// Write to this new file, readable only by its owner. Default: standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Larger output uses a temporary file, which not every container allows.
const MAX_IN_MEMORY: usize = 64 << 20;

pub(super) async fn export(args: &Args, destination: &Destination) -> Result<(), Failure> {
    let cannot_write = |error: std::io::Error| {
        let target =
            args.output.as_ref().map_or("standard output".into(), |file| line(&file.display().to_string()));
        Failure::Input(format!("cannot write {target}: {error}"))
    };
    let mut written = Ok(());
    let mut write = |letter: &DeadLetter, to: &mut dyn Write| {
        if written.is_ok() {
            written = writeln!(to, "{}", json(&letter.to_readable_line()));
        }
        Disposition::Return
    };
    let summary = if let Some(path) = &args.output {
        let mut file = std::io::BufWriter::new(new_file(path).map_err(cannot_write)?);
        let summary = args.filter.scan(destination, |letter| write(letter, &mut file)).await?;
        written.and_then(|()| file.flush()).map_err(cannot_write)?;
        summary
    } else {
        // The reader of standard output may be slow, a pager for example. Meanwhile other commands must not wait.
        let mut spool = tempfile::spooled_tempfile(MAX_IN_MEMORY);
        let summary = args.filter.scan(destination, |letter| write(letter, &mut spool)).await?;
        let mut copy =
            || spool.rewind().and_then(|()| std::io::copy(&mut spool, &mut std::io::stdout().lock()));
        match written.and_then(|()| copy()) {
            // The reader has stopped early, which is not an error.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            copied => _ = copied.map_err(cannot_write)?,
        }
        summary
    };
    anstream::eprintln!(
        "exported {} of {}",
        summary.matched,
        count(summary.found as u64, "dead letter", "dead letters")
    );
    // The export may replace the queue, so the operator must notice that it is incomplete.
    if summary.replaying { Err(Failure::Reported(CHECK_FAILED)) } else { Ok(()) }
}

/// Creates a file that only the owner can read, because it contains personal data.
fn new_file(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}
