//! `close-sync dlq export` and `import`.

use std::io::{ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};

use crate::cli::dlq::{Disposition, Failure, Meant, UNFIT, follow, look};
use crate::cli::read;
use crate::config::Destination;
use crate::dead_letters::import;
use crate::dead_letters::letter::DeadLetter;
use crate::text::count;

#[derive(clap::Args)]
pub(in crate::cli) struct Export {
    #[command(flatten)]
    meant: Meant,
    /// Write to this new file, for the owner's eyes only, instead of standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Put dead letters from a file back into the queue.
///
/// One that is in the queue already stays as it is; one with the same id and another content takes its place. So an
/// import can be repeated, and dead letters can be edited in the file:
/// `jq -c '.body |= (fromjson | (.traits.phone // empty) |= gsub(" "; "") | tojson)' dead.ndjson | close-sync dlq import -`
/// Beware of tools that round numbers, as jq 1.6 does above 2^53: an id becomes another person's. While a replay is under way,
/// it is refused (69).
#[derive(clap::Args)]
pub(in crate::cli) struct Import {
    /// A file that `export` wrote, or `-` for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Bytes for standard output that need no temporary file: a container may have no place for one.
const IN_MEMORY: usize = 64 << 20;

pub(super) async fn export(args: &Export, destination: &Destination) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| {
        let target = args.output.as_ref().map_or("standard output".into(), |file| file.display().to_string());
        Failure::Input(format!("{target} cannot be written: {error}"))
    };
    let mut written = Ok(());
    let mut write = |letter: &DeadLetter, to: &mut dyn Write| {
        if written.is_ok() {
            written = writeln!(to, "{}", letter.to_line());
        }
        Disposition::Return
    };
    let sifted = if let Some(path) = &args.output {
        let mut file = std::io::BufWriter::new(new_file(path).map_err(cannot)?);
        let sifted = args.meant.each(destination, |letter| write(letter, &mut file)).await?;
        written.and_then(|()| file.flush()).map_err(cannot)?;
        sifted
    } else {
        // Whoever reads our output may take their time, a pager say, while nobody else can look at the dead letters.
        let mut spool = tempfile::spooled_tempfile(IN_MEMORY);
        let sifted = args.meant.each(destination, |letter| write(letter, &mut spool)).await?;
        let mut copy =
            || spool.rewind().and_then(|()| std::io::copy(&mut spool, &mut std::io::stdout().lock()));
        match written.and_then(|()| copy()) {
            // Whoever reads it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            copied => _ = copied.map_err(cannot)?,
        }
        sifted
    };
    anstream::eprintln!(
        "exported {} of {}",
        sifted.matched,
        count(sifted.found as u64, "dead letter", "dead letters")
    );
    // Whoever keeps it instead of the queue has to know.
    if sifted.replaying { Err(Failure::Told(UNFIT)) } else { Ok(()) }
}

/// It holds personal data.
fn new_file(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

pub(super) async fn import(args: &Import, destination: &Destination) -> Result<(), Failure> {
    let letters = parse(&read(&args.file).await?)?;
    let bar = look();
    let restored = import::import(&destination.amqp, &letters, &mut follow(&bar)).await;
    bar.finish_and_clear();
    let import::Imported { added, replaced, present } = restored?;
    anstream::println!("imported {added}, replaced {replaced}, {present} were there already");
    Ok(())
}

/// All of them, before the first is put back: a file that is broken somewhere does nothing.
fn parse(bytes: &[u8]) -> Result<Vec<DeadLetter>, Failure> {
    let lines =
        (1..).zip(bytes.split(|&byte| byte == b'\n')).filter(|(_, line)| !line.trim_ascii().is_empty());
    let parse = |(number, line): (usize, &[u8])| {
        let text = std::str::from_utf8(line).map_err(|error| error.to_string());
        text.and_then(DeadLetter::from_line)
            .map_err(|why| Failure::Input(format!("line {number}: {why}; nothing was imported")))
    };
    lines.map(parse).collect()
}
