//! `close-sync check`: one finding per line.

use serde::Serialize;

use crate::amqp::server_info::ServerInfo;
use crate::amqp::{self, BrokerError, OpenConnection, topology};
use crate::cli::{CONFIGURATION, Failure, UNAVAILABLE};
use crate::close::Client;
use crate::config::{Config, Destination, Need, Problems};
use crate::sync::preflight::{self, PreflightError, Ready};
use crate::text::{choices, count};

/// Check the configuration, RabbitMQ, the API key, the lookup fields and what the mapping names in Close.
///
/// Each finding is a line. Nothing is changed, neither in RabbitMQ nor in Close. Exits with 78 when
/// the configuration cannot work, with 69 when RabbitMQ or Close is not there.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print the settings in force as TOML, secrets masked, and check nothing but them.
    #[arg(long)]
    print_config: bool,
    /// Print the findings as a JSON list.
    #[arg(long, conflicts_with = "print_config")]
    json: bool,
}

impl Args {
    /// Settings can be printed before there is a key.
    pub(super) fn need(&self) -> Need {
        if self.print_config { Need::Broker } else { Need::All }
    }
}

#[derive(Serialize)]
struct Finding {
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    status: Verdict,
    subject: String,
    detail: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// Works, but someone should know.
    Note,
    /// The configuration cannot work.
    Wrong,
    /// Something is not there.
    Unavailable,
}

pub(super) async fn check(args: &Args, config: Result<Config, Problems>) -> Result<(), Failure> {
    if args.print_config {
        anstream::print!("{}", config?.show());
        return Ok(());
    }
    let findings = match &config {
        Err(problems) => {
            problems.lines().map(|(key, message)| finding(Verdict::Wrong, key, message)).collect()
        }
        Ok(config) => look(config).await,
    };
    if args.json {
        let json = serde_json::to_string_pretty(&findings).unwrap_or_default();
        anstream::println!("{json}");
    } else {
        findings.iter().for_each(print);
    }
    let has = |verdict| findings.iter().any(|finding| finding.status == verdict);
    if has(Verdict::Wrong) {
        Err(Failure::Told(CONFIGURATION))
    } else if has(Verdict::Unavailable) {
        Err(Failure::Told(UNAVAILABLE))
    } else {
        Ok(())
    }
}

fn finding(status: Verdict, subject: impl Into<String>, detail: impl Into<String>) -> Finding {
    Finding { destination: None, status, subject: subject.into(), detail: detail.into() }
}

fn print(finding: &Finding) {
    use anstyle::AnsiColor::{Green, Red, Yellow};
    let (color, word) = match finding.status {
        Verdict::Ok => (Green, "ok"),
        Verdict::Note => (Yellow, "note"),
        Verdict::Wrong => (Red, "wrong"),
        Verdict::Unavailable => (Red, "missing"),
    };
    let style = color.on_default();
    let Finding { destination, subject, detail, status: _ } = finding;
    let whose = destination.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
    anstream::println!("{style}{word:<8}{style:#}{whose}{subject}: {detail}");
}

async fn look(config: &Config) -> Vec<Finding> {
    let mut findings = vec![finding(Verdict::Ok, "configuration", "every setting is valid")];
    for destination in &config.destinations {
        let found = look_at(destination).await.into_iter();
        findings.extend(found.map(|finding| Finding { destination: destination.name.clone(), ..finding }));
    }
    findings
}

async fn look_at(config: &Destination) -> Vec<Finding> {
    let mut findings = broker(config).await;
    findings.extend(close(config).await);
    for (setting, key, without) in [
        ("close.lead_company_id_field", &config.rules.lead.key, "Leads are never looked up by company"),
        ("close.contact_user_id_field", &config.rules.contact.key, "people are matched by email only"),
    ] {
        if key.is_none() {
            findings.push(finding(Verdict::Note, setting, format!("is not set: {without}")));
        }
    }
    findings
}

async fn broker(config: &Destination) -> Vec<Finding> {
    let settings = &config.amqp;
    let subject = format!("RabbitMQ at {}", settings.nodes.masked());
    let (broker, depths) = match meet(settings).await {
        Ok(found) => found,
        Err(error) => {
            let is_setup = matches!(error, BrokerError::Incomplete(_) | BrokerError::MayNotDeclare(_));
            let is_refused = matches!(error, BrokerError::Refused(_));
            let verdict = if error.is_lasting() || is_setup || is_refused {
                Verdict::Wrong
            } else {
                Verdict::Unavailable
            };
            return vec![finding(verdict, subject, error.to_string())];
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
                    amqp::TopologyMode::Check => " (whether this user may read and write them, `run` tells)",
                }
            )
        }
        (None, _) => format!("reachable; queue `{}` does not exist yet, `run` declares it", settings.queue),
    };
    vec![finding(Verdict::Ok, subject, detail), finding(Verdict::Ok, broker.to_string(), broker.describe())]
}

/// How full a queue is that exists.
type Depth = Option<topology::Depth>;

/// Who the broker is, and how full the work queue and the dead-letter queue are.
async fn meet(settings: &amqp::Settings) -> Result<(ServerInfo, (Depth, Depth)), BrokerError> {
    let OpenConnection { connection, server: broker, .. } = settings.open("close-sync check").await?;
    match settings.topology {
        amqp::TopologyMode::Declare => topology::compare(&connection, settings).await?,
        amqp::TopologyMode::Check => topology::prepare(&connection, settings).await?,
    }
    let work = topology::depth(&connection, &settings.queue).await?;
    let dead = topology::depth(&connection, &settings.dead_letter_queue()).await?;
    amqp::disconnect(&connection).await;
    Ok((broker, (work, dead)))
}

async fn close(config: &Destination) -> Vec<Finding> {
    let subject = format!("Close at {}", config.close.url);
    let client = match Client::new(config.close.clone(), |_| {}) {
        Ok(client) => client,
        Err(error) => {
            return vec![finding(
                Verdict::Unavailable,
                subject,
                format!(
                    "TLS cannot be set up, are CA certificates installed (Debian: ca-certificates)? {error}"
                ),
            )];
        }
    };
    match preflight::run(&client, &config.rules).await {
        Ok(ready) => {
            let detail = format!("accepts the API key, of the organization \"{}\"", ready.organization);
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
                Some(finding(Verdict::Ok, setting, detail))
            });
            let fields = mapping.custom().map(|(setting, field)| {
                let several = if field.multiple { ", several values" } else { "" };
                let detail = format!(
                    "custom field \"{}\" ({}), {}{several}",
                    field.name,
                    field.id,
                    field.kind.as_str()
                );
                finding(Verdict::Ok, setting, detail)
            });
            let unresolved = mapping
                .unresolved
                .iter()
                .map(|unresolved| finding(Verdict::Wrong, &unresolved.setting, unresolved.description()));
            let invalid_constants = mapping.invalid_constants().into_iter().map(|invalid| {
                let fits = choices("choices", &invalid.choices);
                let detail =
                    format!("{} would be left out: {}{fits}", invalid.value, invalid.reason.description());
                finding(Verdict::Wrong, invalid.setting, detail)
            });
            std::iter::once(finding(Verdict::Ok, subject, detail))
                .chain(keys)
                .chain(fields)
                .chain(unresolved)
                .chain(invalid_constants)
                .collect()
        }
        Err(obstacles) => {
            let api_key = config.api_key_setting();
            obstacles.iter().map(|obstacle| of_obstacle(obstacle, &subject, &api_key)).collect()
        }
    }
}

fn of_obstacle(obstacle: &PreflightError, close: &str, api_key: &str) -> Finding {
    use crate::outcome::PauseCause::{Failing, Forbidden, LookupField, PlanLimit, Unauthorized, Unreachable};
    let detail = obstacle.with_remedy(api_key);
    match (obstacle, obstacle.pause_cause()) {
        (PreflightError::Field(key), _) => finding(Verdict::Wrong, key.setting(), detail),
        (PreflightError::Close(_), Some(Unauthorized | Forbidden)) => finding(Verdict::Wrong, close, detail),
        (PreflightError::Close(_), Some(PlanLimit | Unreachable | Failing | LookupField) | None) => {
            finding(Verdict::Unavailable, close, detail)
        }
    }
}
