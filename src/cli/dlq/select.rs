//! Arguments that select dead letters, and how a command reads the selected ones.

use clap::builder::PossibleValuesParser;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use strum::VariantArray as _;

use crate::amqp::BrokerError;
use crate::cli::dlq::terminal::{observer, report_running_replay, scan_bar};
use crate::cli::failure::{Failure, USAGE};
use crate::config::Destination;
use crate::consumer::journal::anchor;
use crate::dead_letters::filter::{Filter, IdentityFilter, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::{Disposition, ScanSummary, find_by_id, scan};
use crate::domain::mapping::Rules;
use crate::outcome::Reason;
use crate::text::line;

/// Filters. A dead letter is selected if it matches all of them; without filters, all dead letters are.
#[derive(clap::Args)]
pub(super) struct FilterArgs {
    /// Select dead letters with this reason. Can be repeated.
    #[arg(long, value_name = "REASON", value_parser = reasons())]
    reason: Vec<String>,
    /// Select dead letters with this fingerprint (`rejected:write:phones`) or with one that starts with it
    /// (`rejected:write`). `broker` selects messages that RabbitMQ dead-lettered itself. Can be repeated.
    #[arg(long, value_name = "FINGERPRINT")]
    fingerprint: Vec<String>,
    /// Select the dead letter with this id. Can be repeated.
    #[arg(long, value_name = "ID")]
    id: Vec<String>,
    /// Select dead letters with this message id of the producer. Can be repeated.
    #[arg(long, value_name = "ID")]
    message_id: Vec<String>,
    /// Select events with this user id.
    #[arg(long, value_name = "ID")]
    user_id: Option<String>,
    /// Select events with this company id.
    #[arg(long, value_name = "ID")]
    company_id: Option<String>,
    /// Select events with this email.
    #[arg(long, value_name = "EMAIL")]
    email: Option<String>,
    /// Select messages that failed at this time or later: a time in UTC (2026-11-24T09:00), the start of a day
    /// (2026-11-24), or a duration before now (2h, 3d).
    #[arg(long, value_name = "WHEN", value_parser = time)]
    since: Option<Timestamp>,
    /// Select messages that failed at this time or earlier, in the form of --since.
    #[arg(long, value_name = "WHEN", value_parser = time)]
    until: Option<Timestamp>,
    /// Select at most this many, oldest first.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// The same for commands that change dead letters: these need at least one filter or `--all`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("selection").required(true).multiple(true).args([
    "all", "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
]))]
pub(super) struct SelectionArgs {
    #[command(flatten)]
    pub(super) filter: FilterArgs,
    /// Select all dead letters.
    #[arg(long, conflicts_with_all = [
        "reason", "fingerprint", "id", "message_id", "user_id", "company_id", "email", "since", "until",
    ])]
    all: bool,
}

fn reasons() -> PossibleValuesParser {
    Reason::VARIANTS.iter().map(|reason| reason.label()).into()
}

/// Parses a time, or a duration before now.
fn time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    if let Ok(time) = text.parse().and_then(|time| TimeZone::UTC.to_timestamp(time)) {
        return Ok(time);
    }
    let before_now = || -> Result<Timestamp, jiff::Error> {
        let span: jiff::Span = text.parse()?;
        let duration: SignedDuration = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours())?;
        Timestamp::now().checked_sub(duration)
    };
    before_now().map_err(|_| {
        "expected a time in UTC (2026-11-24T09:00, 2026-11-24) or a duration before now (30m, 2h, 3d)"
            .to_owned()
    })
}

impl FilterArgs {
    pub(super) fn selection(&self, rules: &Rules) -> Selection {
        let Self { fingerprint, id, message_id, user_id, company_id, email, since, until, .. } = self;
        let has_identity = [user_id, company_id, email].iter().any(|given| given.is_some());
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
                .filter(|reason| self.reason.iter().any(|label| label == reason.label()))
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

    /// Scans the queue. `decide` is called with each selected dead letter.
    pub(super) async fn scan(
        &self,
        Destination { amqp, rules, .. }: &Destination,
        decide: impl FnMut(&DeadLetter) -> Disposition + Send,
    ) -> Result<ScanSummary, Failure> {
        let bar = scan_bar();
        let summary = scan(amqp, &self.selection(rules), decide, &mut observer(&bar)).await;
        bar.finish_and_clear();
        let summary = summary?;
        report_running_replay(summary.replaying);
        Ok(summary)
    }

    /// Reports that no dead letter matches. A missing id fails, because it is most likely misspelt.
    pub(super) fn nothing_matches(&self) -> Result<(), Failure> {
        anstream::eprintln!("no dead letter matches; list them with `close-sync dlq list`");
        if self.id.is_empty() && self.message_id.is_empty() { Ok(()) } else { Err(Failure::Reported(USAGE)) }
    }
}

/// What events of this time or later have written is in the worker's journal. `None` if there is none, or this user may
/// not read it.
pub(super) async fn remembered_from(destination: &Destination) -> Result<Option<Timestamp>, Failure> {
    match anchor(&destination.amqp).await {
        Ok(anchor) => Ok(anchor.map(|anchor| anchor.remembered_from)),
        Err(error @ BrokerError::Forbidden(_)) => {
            anstream::eprintln!("warning: cannot tell how far the journal reaches: {error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The dead letter with this id, or with this message id of the producer.
pub(super) async fn find(id: &str, Destination { amqp, .. }: &Destination) -> Result<DeadLetter, Failure> {
    let bar = scan_bar();
    let found = find_by_id(amqp, &[id.to_owned()].into(), &mut observer(&bar)).await;
    bar.finish_and_clear();
    let (mut found, ScanSummary { replaying, .. }) = found?;
    found.remove(id).ok_or_else(|| {
        let note = if replaying { " (a replay is under way; its messages are not included)" } else { "" };
        Failure::Input(format!(
            "dead letter `{}` not found{note}; list dead letters with `close-sync dlq list`",
            line(id)
        ))
    })
}
