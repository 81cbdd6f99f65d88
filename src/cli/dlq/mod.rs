//! `close-sync dlq`: what to do about dead letters, from the first look to the last replay.

mod edit;
mod export;
mod list;
mod replay;
mod show;

use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use strum::VariantArray as _;

use crate::cli::{Failure, INPUT, UNFIT};
use crate::config::{Config, Destination, Problems};
use crate::dead_letters;
use crate::dead_letters::filter::{Filter, IdentityFilter, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::{Disposition, ScanStep, ScanSummary, find_by_id, scan};
use crate::domain::mapping::Rules;
use crate::outcome::Reason;
use crate::text::count;

/// Look at dead letters, mend them, replay or discard them.
///
/// Begin with `list`: it tells what failed, how often and since when, and what to do about it. `show` one of them: it
/// tells what would become of it now. `replay` sends one first, waits for what becomes of it, and then the rest.
///
/// Looking changes nothing: every dead letter goes back to its place, also when the command is killed. While one
/// command looks, others wait for it.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List what failed, the most frequent first, with what to do about it.
    List(list::Args),
    /// Show one dead letter whole, and what would become of it now. Personal data.
    Show(show::Args),
    Replay(replay::Args),
    Edit(edit::Args),
    /// Delete dead letters for good.
    Discard {
        #[command(flatten)]
        which: Which,
        /// Confirm: what is discarded cannot be brought back. Without it, they are counted, and it exits with 2.
        #[arg(long)]
        yes: bool,
    },
    /// Print dead letters with all that is needed to restore them, one per line. They stay in the queue. Personal data.
    ///
    /// Exits with 1 while a replay is under way: what that has in hand is missing.
    Export(export::Export),
    Import(export::Import),
}

fn reasons() -> PossibleValuesParser {
    Reason::VARIANTS.iter().map(|reason| reason.label()).into()
}

/// Which dead letters: those that all of it holds for.
#[derive(clap::Args)]
pub(super) struct Meant {
    /// Only this reason; may be given several times.
    #[arg(long, value_name = "REASON", value_parser = reasons())]
    reason: Vec<String>,
    /// Only those that failed like this: `rejected:write:phones`, or its first parts, `rejected:write`; `broker` for what
    /// RabbitMQ gave up on. May be given several times.
    #[arg(long, value_name = "WHAT")]
    fingerprint: Vec<String>,
    /// Only this id; may be given several times.
    #[arg(long, value_name = "ID")]
    id: Vec<String>,
    /// Only what its producer gave this message id; may be given several times.
    #[arg(long, value_name = "ID")]
    message_id: Vec<String>,
    /// Only events about this user id.
    #[arg(long, value_name = "ID")]
    user_id: Option<String>,
    /// Only events about this company id.
    #[arg(long, value_name = "ID")]
    company_id: Option<String>,
    /// Only events with this email.
    #[arg(long, value_name = "EMAIL")]
    email: Option<String>,
    /// Only what failed since then: a time in UTC (2026-11-24T09:00), the beginning of a day (2026-11-24), or so long ago (2h, 3d).
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    since: Option<Timestamp>,
    /// Only what failed until then.
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    until: Option<Timestamp>,
    /// At most this many of those meant, oldest first.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Which dead letters, said on purpose.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args([
    "all", "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
]))]
pub(super) struct Which {
    #[command(flatten)]
    meant: Meant,
    /// All of them.
    #[arg(long, conflicts_with_all = [
        "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
    ])]
    all: bool,
}

/// A time, or how long ago.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    if let Ok(time) = text.parse().and_then(|time| TimeZone::UTC.to_timestamp(time)) {
        return Ok(time);
    }
    let ago = || -> Result<Timestamp, jiff::Error> {
        let span: jiff::Span = text.parse()?;
        let hours: SignedDuration = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours())?;
        Timestamp::now().checked_sub(hours)
    };
    ago().map_err(|_| {
        "neither a time in UTC (2026-11-24T09:00, 2026-11-24) nor how long ago (30m, 2h, 3d)".to_owned()
    })
}

impl Meant {
    fn selection(&self, rules: &Rules) -> Selection {
        let Self { fingerprint, id, message_id, user_id, company_id, email, since, until, .. } = self;
        let has_identity = [user_id, company_id, email].iter().any(|named| named.is_some());
        let identity = has_identity.then(|| IdentityFilter {
            rules: rules.clone(),
            user_id: user_id.clone(),
            company_id: company_id.clone(),
            email: email.clone(),
        });
        let filter = Filter {
            reasons: Reason::VARIANTS
                .iter()
                .copied()
                .filter(|known| self.reason.iter().any(|is| is == known.label()))
                .collect(),
            fingerprints: fingerprint.clone(),
            group: None,
            ids: id.iter().cloned().collect(),
            message_ids: message_id.iter().cloned().collect(),
            content: None,
            since: *since,
            until: *until,
            identity,
        };
        Selection { filter, limit: self.limit }
    }

    /// Looks at those meant, and does to each what `then` says.
    async fn each(
        &self,
        Destination { amqp, rules, .. }: &Destination,
        then: impl FnMut(&DeadLetter) -> Disposition + Send,
    ) -> Result<ScanSummary, Failure> {
        let bar = look();
        let sifted = scan(amqp, &self.selection(rules), then, &mut follow(&bar)).await;
        bar.finish_and_clear();
        let sifted = sifted?;
        tell_of_replay(sifted.replaying);
        Ok(sifted)
    }
}

fn tell_of_replay(replaying: bool) {
    if replaying {
        anstream::eprintln!("a replay is under way: what it has in hand was not among them");
    }
}

/// The dead letter of this id, or of a message with it.
async fn open(id: &str, Destination { amqp, .. }: &Destination) -> Result<DeadLetter, Failure> {
    let bar = look();
    let found = find_by_id(amqp, &[id.to_owned()].into(), &mut follow(&bar)).await;
    bar.finish_and_clear();
    let (mut found, ScanSummary { replaying, .. }) = found?;
    found.remove(id).ok_or_else(|| {
        let hint = if replaying { ", but for those that the replay under way has in hand" } else { "" };
        Failure::Input(format!("there is no dead letter `{id}`; `close-sync dlq list` names them{hint}"))
    })
}

/// The bar of a look.
fn look() -> ProgressBar {
    bar("{msg}{wide_bar} {pos} of {len}, {eta} left")
}

fn follow(bar: &ProgressBar) -> impl FnMut(ScanStep) + Send {
    let mut told = false;
    move |step| match step {
        ScanStep::Waiting if told => {}
        ScanStep::Waiting => {
            told = true;
            bar.suspend(|| anstream::eprintln!("another operator is looking at the dead letters; waiting"));
        }
        ScanStep::Scanned { at, of } => {
            bar.set_length(of.into());
            bar.set_position(at as u64);
        }
    }
}

/// Hidden by itself when standard error is no terminal.
fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Acting on nothing is worth an exit code where ids were named: most likely one is misspelt.
fn nothing(meant: &Meant) -> Result<(), Failure> {
    anstream::eprintln!("no dead letter matches; `close-sync dlq list` names them");
    if meant.id.is_empty() && meant.message_id.is_empty() { Ok(()) } else { Err(Failure::Told(INPUT)) }
}

/// `whole` is the configuration with all that the worker needs, if there is such.
pub(super) async fn dlq(
    command: Command,
    destination: Destination,
    whole: impl FnOnce() -> Result<Config, Problems>,
) -> Result<(), Failure> {
    match command {
        Command::List(args) => list::list(&args, &destination).await,
        Command::Show(args) => show::show(&args, &destination, whole).await,
        Command::Replay(args) => replay::replay(&args, &destination).await,
        Command::Edit(args) => edit::edit(&args, &destination).await,
        Command::Discard { which, yes } => discard(&which, yes, &destination).await,
        Command::Export(args) => export::export(&args, &destination).await,
        Command::Import(args) => export::import(&args, &destination).await,
    }
}

async fn discard(which: &Which, yes: bool, destination: &Destination) -> Result<(), Failure> {
    let fate = if yes { Disposition::Delete } else { Disposition::Return };
    if yes {
        // What is left over from an edit must not outlive the copy.
        dead_letters::edit::complete_interrupted(&destination.amqp, &mut |_| {}).await?;
    }
    let ScanSummary { found, matched, deleted, .. } = which.meant.each(destination, |_| fate).await?;
    if matched == 0 {
        return nothing(&which.meant);
    }
    if yes {
        anstream::println!("discarded {deleted}, {} remain", found - deleted);
        return Ok(());
    }
    Err(Failure::Input(format!(
        "this would delete {matched} of {} for good; add --yes to do it, `close-sync dlq export` keeps a copy",
        count(found as u64, "dead letter", "dead letters")
    )))
}
