//! `close-sync check`.

use std::path::PathBuf;

use serde::Serialize;

use crate::amqp::server_info::ServerInfo;
use crate::amqp::topology::{self, JournalCheck};
use crate::amqp::{self, BrokerError, JournalState, OpenConnection};
use crate::cli::exposure::exposures;
use crate::cli::failure::{CONFIGURATION, Failure, UNAVAILABLE};
use crate::cli::input::read;
use crate::close::Client;
use crate::config::{Config, Destination, Need, Problems};
use crate::domain::event;
use crate::domain::mapping::Share;
use crate::sync::preflight::{self, PreflightError, Ready};
use crate::text::{block, choices, count, json, line, masked_urls};

/// Check the configuration, RabbitMQ, the API key, and the fields that the settings name in Close.
///
/// Prints one finding per line. Changes nothing in RabbitMQ or Close. Exits with 78 if the configuration has an error,
/// and with 69 if RabbitMQ or Close is unavailable. A rule for a custom field that does not exist in Close is an error
/// here. `run` starts without that rule and logs a warning.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print the effective settings as TOML with masked secrets. Checks only the settings.
    #[arg(long)]
    print_config: bool,
    /// Print the findings as a JSON list.
    #[arg(long, conflicts_with = "print_config")]
    json: bool,
    /// Count how many events of this file `mapping.trigger` takes. `-` reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "print_config")]
    events: Option<PathBuf>,
}

impl Args {
    /// Settings can be printed before an API key exists.
    pub(super) fn need(&self) -> Need {
        if self.print_config { Need::Broker } else { Need::All }
    }
}

#[derive(Serialize)]
struct Finding {
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    status: Status,
    subject: String,
    detail: String,
    /// The share of the events of `--events`.
    #[serde(skip_serializing_if = "Option::is_none")]
    trigger: Option<Share>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    /// Works, but the operator should know.
    Note,
    /// Works, but others may read or change what is sent, or no event is synced.
    Warning,
    /// The configuration has an error.
    Wrong,
    /// RabbitMQ or Close cannot be reached.
    #[serde(rename = "unavailable")]
    Unreachable,
    /// RabbitMQ or Close answers, but does not work.
    Unavailable,
}

pub(super) async fn check(args: &Args, config: Result<Config, Problems>) -> Result<(), Failure> {
    if args.print_config {
        anstream::print!("{}", block(&config?.show()));
        return Ok(());
    }
    let findings = match &config {
        Err(problems) => {
            problems.lines().map(|(key, message)| finding(Status::Wrong, key, message)).collect()
        }
        Ok(config) => {
            let events = match &args.events {
                Some(file) => Some(event::split(&read(file).await?)),
                None => None,
            };
            check_all(config, events.as_deref()).await
        }
    };
    if args.json {
        anstream::println!("{}", json(&serde_json::to_string_pretty(&findings).unwrap_or_default()));
    } else {
        findings.iter().for_each(print);
    }
    let has = |status| findings.iter().any(|finding| finding.status == status);
    if has(Status::Wrong) {
        Err(Failure::Reported(CONFIGURATION))
    } else if has(Status::Unreachable) || has(Status::Unavailable) {
        Err(Failure::Reported(UNAVAILABLE))
    } else {
        Ok(())
    }
}

fn finding(status: Status, subject: impl Into<String>, detail: impl Into<String>) -> Finding {
    Finding { destination: None, status, subject: subject.into(), detail: detail.into(), trigger: None }
}

fn print(finding: &Finding) {
    use anstyle::AnsiColor::{Green, Red, Yellow};
    let (color, word) = match finding.status {
        Status::Ok => (Green, "ok"),
        Status::Note => (Yellow, "note"),
        Status::Warning => (Yellow, "warning"),
        Status::Wrong => (Red, "wrong"),
        Status::Unreachable => (Red, "unreachable"),
        Status::Unavailable => (Red, "unavailable"),
    };
    let style = color.on_default();
    let Finding { destination, subject, detail, .. } = finding;
    let prefix = destination.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
    // Errors and names come from RabbitMQ and Close.
    let text = line(&format!("{prefix}{subject}: {detail}"));
    anstream::println!("{style}{word:<8}{style:#}{}{text}", if word.len() < 8 { "" } else { " " });
}

async fn check_all(config: &Config, events: Option<&[Vec<u8>]>) -> Vec<Finding> {
    let mut findings = vec![finding(Status::Ok, "configuration", "every setting is valid")];
    for destination in &config.destinations {
        let share = events.map(|events| trigger(destination.rules.share(events)));
        let own = share.into_iter().chain(check_destination(destination).await);
        findings.extend(own.map(|finding| Finding { destination: destination.name.clone(), ..finding }));
    }
    findings
}

/// The share of sample events that the trigger takes.
fn trigger(share: Share) -> Finding {
    let (status, hint) = if share.is_none() {
        (Status::Warning, "; check the condition against an event with `close-sync plan`")
    } else {
        (Status::Ok, "")
    };
    Finding { trigger: Some(share), ..finding(status, "mapping.trigger", format!("{share}{hint}")) }
}

async fn check_destination(config: &Destination) -> Vec<Finding> {
    let mut findings = check_broker(config).await;
    findings.extend(check_close(config).await);
    findings.extend(
        exposures(config)
            .into_iter()
            .map(|exposure| finding(Status::Warning, exposure.setting(), exposure.to_string())),
    );
    for (setting, key, consequence) in [
        ("close.lead_company_id_field", &config.rules.lead.key, "Leads are not looked up by company"),
        ("close.contact_user_id_field", &config.rules.contact.key, "people are matched by email only"),
    ] {
        if key.is_none() {
            findings.push(finding(Status::Note, setting, format!("not set; {consequence}")));
        }
    }
    findings
}

async fn check_broker(config: &Destination) -> Vec<Finding> {
    let settings = &config.amqp;
    let subject = format!("RabbitMQ at {}", settings.nodes.masked());
    let (broker, depths, journal) = match query_broker(settings).await {
        Ok(found) => found,
        Err(error) => {
            let is_setup = matches!(error, BrokerError::Incomplete(_) | BrokerError::MayNotDeclare(_));
            let is_refused = matches!(error, BrokerError::Refused(_));
            let status = if error.is_lasting() || is_setup || is_refused {
                Status::Wrong
            } else if matches!(error, BrokerError::Unreachable(_)) {
                Status::Unreachable
            } else {
                Status::Unavailable
            };
            return vec![finding(status, subject, error.to_string())];
        }
    };
    let detail = match depths {
        (Some(work), dead) => {
            let dead = dead.map_or(0, |depth| depth.ready);
            format!(
                "queue `{}`: {} ready, {}, {}{}",
                settings.queue,
                count(work.ready, "message", "messages"),
                count(work.consumers, "consumer", "consumers"),
                count(dead, "dead letter", "dead letters"),
                match settings.topology {
                    amqp::TopologyMode::Declare => "",
                    amqp::TopologyMode::Check => "; read and write permissions are checked only by `run`",
                }
            )
        }
        (None, _) => format!("reachable; queue `{}` does not exist yet; `run` declares it", settings.queue),
    };
    vec![
        finding(Status::Ok, subject, detail),
        finding(Status::Ok, broker.to_string(), broker.describe()),
        journal_finding(settings, &journal, depths.0.is_some_and(|work| work.consumers > 0)),
    ]
}

fn journal_finding(settings: &amqp::Settings, journal: &JournalCheck, has_consumers: bool) -> Finding {
    let name = settings.journal_queue();
    let (status, detail) = match journal {
        JournalCheck::Exists(JournalState::Ready) => (Status::Ok, format!("stream `{name}`")),
        JournalCheck::Absent if has_consumers => (
            Status::Warning,
            format!(
                "stream `{name}` does not exist although a worker consumes; if its log has `journal_unusable`, that says \
                 why: see CloseSyncNoJournal in deploy/runbook.md"
            ),
        ),
        JournalCheck::Absent => {
            (Status::Ok, format!("stream `{name}` does not exist yet; `run` declares it"))
        }
        JournalCheck::Differs(detail) => (
            Status::Warning,
            format!(
                "used, but not as configured: {detail}; deploy/docs/ordering.md, \"Journal\", says how to \
                 change it"
            ),
        ),
        JournalCheck::Exists(JournalState::Disabled) => (
            Status::Note,
            "off (`journal.enabled`); creations wait for search after each start, and a slow search leads to \
             duplicates"
                .to_owned(),
        ),
        JournalCheck::Exists(JournalState::Unusable(error)) => {
            (Status::Warning, format!("not used: {error}"))
        }
    };
    finding(status, "journal", detail)
}

/// The depth of a queue, if it exists.
type Depth = Option<topology::Depth>;

/// The broker's version and features, the depths of the work queue and the dead-letter queue, and the journal.
async fn query_broker(
    settings: &amqp::Settings,
) -> Result<(ServerInfo, (Depth, Depth), JournalCheck), BrokerError> {
    let OpenConnection { connection, server: broker, .. } = settings.open("close-sync check").await?;
    match settings.topology {
        amqp::TopologyMode::Declare => topology::compare(&connection, settings).await?,
        amqp::TopologyMode::Check => topology::prepare(&connection, settings).await?,
    }
    let work = topology::depth(&connection, &settings.queue).await?;
    let dead = topology::depth(&connection, &settings.dead_letter_queue()).await?;
    let journal = topology::check_journal(&connection, settings).await?;
    amqp::disconnect(&connection).await;
    Ok((broker, (work, dead), journal))
}

async fn check_close(config: &Destination) -> Vec<Finding> {
    let subject = format!("Close at {}", masked_urls(config.close.url.as_str()));
    let client = match Client::new(config.close.clone(), |_| {}) {
        Ok(client) => client,
        Err(error) => {
            return vec![finding(
                Status::Unavailable,
                subject,
                format!(
                    "cannot set up TLS: {error}; install CA certificates (Debian: package ca-certificates)"
                ),
            )];
        }
    };
    match preflight::run(&client, &config.rules).await {
        Ok(ready) => {
            let detail = format!("accepts the API key of the organization \"{}\"", ready.organization);
            let Ready { mapping, .. } = &ready;
            let keys = [
                ("close.lead_company_id_field", &mapping.keys.company, "text"),
                ("close.contact_user_id_field", &mapping.keys.user, "text"),
                ("close.lead_synced_at_field", &mapping.synced_at.lead, "datetime"),
                ("close.contact_synced_at_field", &mapping.synced_at.contact, "datetime"),
            ];
            let keys = keys.into_iter().filter_map(|(setting, id, kind)| {
                let id = id.as_ref()?;
                let name = mapping.label(&format!("custom.{id}"));
                let detail = format!("custom field \"{name}\" ({id}) is of type {kind}");
                Some(finding(Status::Ok, setting, detail))
            });
            let fields = mapping.custom().map(|(setting, field)| {
                let several = if field.multiple { ", several values" } else { "" };
                let detail = format!(
                    "custom field \"{}\" ({}), {}{several}",
                    field.name,
                    field.id,
                    field.kind.as_str()
                );
                finding(Status::Ok, setting, detail)
            });
            let unresolved = mapping
                .unresolved
                .iter()
                .map(|unresolved| finding(Status::Wrong, &unresolved.setting, unresolved.description()));
            let unreadable = mapping
                .unreadable
                .iter()
                .map(|item| finding(Status::Warning, "Close", format!("ignores the {item}")));
            let missing_required = mapping.missing_required.iter().map(|(kind, field)| {
                let detail = format!(
                    "the {kind} \"{}\" is required, and no rule of the mapping fills it; Close may refuse new records",
                    field.name
                );
                finding(Status::Warning, "Close", detail)
            });
            let invalid_constants = mapping.invalid_constants().into_iter().map(|invalid| {
                let fits = choices("choices", &invalid.choices);
                let detail =
                    format!("{} would be left out: {}{fits}", invalid.value, invalid.reason.description());
                finding(Status::Wrong, invalid.setting, detail)
            });
            std::iter::once(finding(Status::Ok, subject, detail))
                .chain(keys)
                .chain(fields)
                .chain(unresolved)
                .chain(unreadable)
                .chain(missing_required)
                .chain(invalid_constants)
                .collect()
        }
        Err(errors) => {
            let api_key = config.api_key_setting();
            errors.iter().map(|error| preflight_finding(error, &subject, &api_key)).collect()
        }
    }
}

fn preflight_finding(error: &PreflightError, close: &str, api_key: &str) -> Finding {
    use crate::outcome::PauseCause::{Failing, Forbidden, LookupField, PlanLimit, Unauthorized, Unreachable};
    let detail = error.with_remedy(api_key);
    match (error, error.pause_cause()) {
        (PreflightError::Field(key), _) => finding(Status::Wrong, key.setting(), detail),
        (PreflightError::Rule(rule), _) => finding(Status::Wrong, &rule.setting, rule.description()),
        (PreflightError::Close(_), Some(Unauthorized | Forbidden)) => finding(Status::Wrong, close, detail),
        (PreflightError::Close(_), Some(Unreachable)) => finding(Status::Unreachable, close, detail),
        (PreflightError::Close(_), Some(PlanLimit | Failing | LookupField) | None) => {
            finding(Status::Unavailable, close, detail)
        }
    }
}
