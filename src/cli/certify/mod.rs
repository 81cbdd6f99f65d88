//! `close-sync certify`: tries what close-sync assumes about Close in a real organization.
//!
//! `observe` makes a few marked records and notes what it sees in `observations`; `findings` says what that means, without
//! IO; `cleanup` deletes the records; `report` prints.

mod assumption;
mod cleanup;
mod finding;
mod findings;
mod looks;
mod observations;
mod observe;
mod queries;
mod report;
mod script;

use std::io::IsTerminal;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use crate::cli::certify::cleanup::Made;
use crate::cli::certify::findings::{Run, findings};
use crate::cli::certify::observations::Observations;
use crate::cli::certify::observe::{MAX_CALLS, Observer};
use crate::cli::certify::report::{Report, Verdict};
use crate::cli::certify::script::{Owner, Sample, SampleField, Script};
use crate::cli::failure::{CHECK_FAILED, Failure, UNAVAILABLE};
use crate::cli::signals;
use crate::close::{Api, Client, RawClient};
use crate::config::Destination;
use crate::domain::mapping::Mapping;
use crate::domain::schema::{CustomField, FieldKind};
use crate::outcome::PauseCause;
use crate::sync::preflight::{self, PreflightError};
use crate::text::line;

/// Test what close-sync assumes about Close, in a sandbox organization of Close.
///
/// Creates two Leads and a Contact whose names contain "close-sync certify", changes and searches them, and deletes them
/// at the end, also when it is interrupted or fails. Makes at most 100 calls, within the rate limits. Workflows and
/// webhooks of the organization see the records, so use an organization without them.
///
/// Prints a table: what is assumed, what was found, and what it means. Exits with 1 if a setting should change or
/// close-sync does not fit the organization, and prints the line to set. Needs the configuration of the worker, but no
/// RabbitMQ.
///
/// Example: close-sync certify --config close-sync.toml --json > report.json, then close-sync simulate --like report.json
#[derive(clap::Args)]
pub(super) struct Args {
    /// Do not ask before writing. Needed in scripts.
    #[arg(long)]
    yes: bool,
    /// Print the report as a JSON object. `simulate --like` reads it.
    #[arg(long)]
    json: bool,
    /// Wait at most this long until search shows a change, for example `5m`. Default: 1m, or `close.search_lag` if it is
    /// longer. Up to three such waits follow one another.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    max_wait: Option<Duration>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = |_| format!("`{text}` is not a duration; expected for example `30s` or `5m`");
    let parsed: SignedDuration = text.parse().map_err(wrong)?;
    Duration::try_from(parsed).map_err(wrong)
}

const DEFAULT_WAIT: Duration = Duration::from_mins(1);

pub(super) async fn certify(args: Args, config: Destination) -> Result<(), Failure> {
    let unavailable = |error: &dyn std::fmt::Display| Failure::Unavailable(error.to_string());
    let (search_lag, country) = (config.worker.search_lag, config.worker.country);
    let client = Client::new(config.close.clone(), |_| {}).map_err(|error| unavailable(&error))?;
    let max_wait = args.max_wait.unwrap_or(DEFAULT_WAIT.max(search_lag));
    // The client waits as long as Close answers with 429.
    let Ok(ready) = timeout(max_wait, preflight::run(&client, &config.rules)).await else {
        let waited = max_wait.as_secs();
        return Err(Failure::Unavailable(format!(
            "Close did not allow the first calls within {waited} s; it is slow or keeps answering with 429"
        )));
    };
    let ready = ready.map_err(preflight_failed)?;
    confirm(&args, &ready.organization).await?;

    let marker: String = uuid::Uuid::new_v4().simple().to_string().chars().take(12).collect();
    let name = format!("close-sync certify {marker}");
    let stop = signals::interrupt(move || {
        anstream::eprintln!(
            "interrupted; deleting the Leads \"{name}…\". A second signal stops at once and leaves them in Close"
        );
    })?;
    let script = script(&ready.mapping, max_wait);
    let mut observer = Observer {
        client: RawClient::new(config.close, MAX_CALLS.saturating_sub(client.calls()))
            .map_err(|error| unavailable(&error))?,
        made: Made::new(marker),
        seen: Observations {
            unreadable: Some(ready.mapping.unreadable.clone()),
            missing_required: Some(missing_required(&ready.mapping)),
            ..Observations::default()
        },
        script,
        stop,
    };
    let stopped = observer.run().await.err().map(|stop| stop.to_string());
    let left_behind = cleanup::delete_all(&mut observer.client, &mut observer.made).await;
    let calls = client.calls() + observer.client.made();
    let run = Run {
        search_lag,
        country,
        has_company_field: observer.script.company_key.is_some(),
        ended_early: stopped.is_some(),
    };
    let findings = findings(&observer.seen, run);
    let report = Report::new(ready.organization, calls, stopped, findings, left_behind);
    if args.json {
        report.print_json();
    } else {
        report.print_table();
    }
    if let Some(stopped) = &report.stopped {
        anstream::eprintln!("stopped early: {}", line(stopped));
    }
    if !report.left_behind.is_empty() {
        anstream::eprintln!(
            "could not delete: {}; delete them in Close",
            line(&report.left_behind.join(", "))
        );
    }
    match report.verdict {
        Verdict::Incomplete => Err(Failure::Reported(UNAVAILABLE)),
        Verdict::DoesNotFit | Verdict::FitsAfterChange => Err(Failure::Reported(CHECK_FAILED)),
        Verdict::Fits => Ok(()),
    }
}

fn preflight_failed(errors: Vec<PreflightError>) -> Failure {
    let message = errors.iter().map(|error| line(&error.to_string())).collect::<Vec<_>>().join("\n");
    let is_configuration = |error: &PreflightError| {
        let cause = error.pause_cause();
        matches!(error, PreflightError::Field(_) | PreflightError::Rule(_))
            || matches!(cause, Some(PauseCause::Unauthorized | PauseCause::Forbidden))
    };
    if errors.iter().any(is_configuration) {
        Failure::Configuration(message)
    } else {
        Failure::Unavailable(format!("{message}\nhint: run `close-sync check` for details"))
    }
}

async fn confirm(args: &Args, organization: &str) -> Result<(), Failure> {
    let organization = line(organization);
    if args.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Input(format!(
            "this would create and delete records in the organization \"{organization}\"; add --yes to do it"
        )));
    }
    anstream::eprint!(
        "This creates two Leads and a Contact in the organization \"{organization}\" and deletes them again.\n\
         Use a sandbox organization. Continue? [y/N] "
    );
    let mut answer = String::new();
    let read = BufReader::new(tokio::io::stdin()).read_line(&mut answer).await;
    match read {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        Ok(_) | Err(_) => Err(Failure::Input("not confirmed; nothing was written".into())),
    }
}

/// A shared field is required for Leads and for Contacts.
fn missing_required(mapping: &Mapping) -> Vec<CustomField> {
    let mut missing: Vec<CustomField> = Vec::new();
    for (_, field) in &mapping.missing_required {
        if missing.iter().all(|known| known.id != field.id) {
            missing.push(field.clone());
        }
    }
    missing
}

fn script(mapping: &Mapping, max_wait: Duration) -> Script {
    let key = |id: &dyn std::fmt::Display| format!("custom.{id}");
    let keys = [&mapping.keys.company, &mapping.keys.user];
    let [company_key, user_key] = keys.map(|id| id.as_ref().map(|id| key(id)));
    let is_key = |field: &CustomField| keys.contains(&&Some(field.id.clone()));
    let configured = mapping.custom().filter(|(_, field)| !is_key(field));
    let mut fields: Vec<SampleField> = configured
        .map(|(setting, field)| {
            let owner = if setting.starts_with("mapping.contact") { Owner::Contact } else { Owner::Lead };
            SampleField {
                setting,
                owner,
                key: key(&field.id),
                kind: field.kind.as_str().to_owned(),
                sample: sample(&field.kind),
                multiple: field.multiple,
            }
        })
        .collect();
    let synced_at = [
        ("close.lead_synced_at_field", Owner::Lead, &mapping.synced_at.lead),
        ("close.contact_synced_at_field", Owner::Contact, &mapping.synced_at.contact),
    ];
    fields.extend(synced_at.into_iter().filter_map(|(setting, owner, id)| {
        let id = id.as_ref()?;
        Some(SampleField {
            setting: setting.to_owned(),
            owner,
            key: key(id),
            kind: "datetime".to_owned(),
            sample: sample(&FieldKind::Datetime),
            multiple: false,
        })
    }));
    Script { company_key, user_key, fields, max_wait }
}

/// A value that a field of this type accepts.
fn sample(kind: &FieldKind) -> Sample {
    match kind {
        FieldKind::Text | FieldKind::Textarea | FieldKind::Hidden => {
            Sample::Value(json!("close-sync certify"))
        }
        FieldKind::Number => Sample::Value(json!(5)),
        FieldKind::Date => Sample::Value(json!("2026-01-31")),
        FieldKind::Datetime => Sample::Value(json!("2026-01-31T10:00:00.000000+00:00")),
        FieldKind::Choices(choices) => {
            let none = Sample::None("the field has no choices");
            choices.first().map_or(none, |choice| Sample::Value(json!(choice)))
        }
        FieldKind::User => Sample::Me,
        FieldKind::Contact => Sample::Contact,
        FieldKind::CustomObject => Sample::None("not tried: certify makes no custom object to refer to"),
        FieldKind::Other(_) => Sample::None("not tried: close-sync does not know this type"),
    }
}
