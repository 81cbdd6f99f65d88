//! Scenarios: test files for a mapping. A scenario lists records in Close, an event, and the expected result.
//!
//! A [`Suite`] is one file. Each scenario runs against its own [`close_sync_simulator`], through the same [`Worker`] as
//! every message, without a broker. The result is rendered as text ([`render`]) and compared with the text in the file,
//! so that a failure shows a diff.
//!
//! The matching rules of this project are tested with such files too, in `tests/scenarios`. Those scenarios also run on
//! records in memory and, with a broker, through the whole program.

mod fixtures;
pub mod render;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde::Deserialize;
use toml::Table;
use uuid::Uuid;

use crate::close::Client;
use crate::config::{Destination, Layers, Need};
use crate::domain::decision::Decision;
use crate::domain::event;
use crate::domain::mapping::Share;
use crate::domain::schema::FieldRef;
use crate::sync::preflight::{self, Ready};
use crate::sync::{Dependencies, Prepared, ReceivedAt, RunContext, Worker};
use crate::telemetry::metrics::Metrics;
use close_sync_simulator::{CustomField, Owner, Settings, Simulator, User};

use fixtures::{CreatedRecords, Fixtures, LeadFixture};

/// One file of scenarios that share an organization and settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// Settings for all scenarios of the file, which override those of the user.
    #[serde(default)]
    settings: Table,
    /// Labels of the Lead statuses. New Leads get the first.
    #[serde(default)]
    statuses: Vec<String>,
    #[serde(default, rename = "user")]
    users: Vec<Member>,
    /// Custom fields. The lookup fields may be left out.
    #[serde(default, rename = "field")]
    fields: Vec<FieldFixture>,
    #[serde(default, rename = "scenario")]
    pub scenarios: Vec<Scenario>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Member {
    name: String,
    email: String,
}

/// A custom field of the organization.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FieldFixture {
    of: Owner,
    name: String,
    /// Derived from the name if missing.
    id: Option<String>,
    #[serde(rename = "type")]
    kind: close_sync_simulator::FieldKind,
    #[serde(default)]
    choices: Vec<String>,
    #[serde(default)]
    multiple: bool,
}

/// Records in Close, events, and the expected result.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub title: String,
    /// Settings for this scenario only.
    #[serde(default)]
    settings: Table,
    /// The records in Close before the events.
    #[serde(default)]
    leads: Vec<LeadFixture>,
    /// One event as JSON, or several in order, as a list or one per line.
    pub event: String,
    /// The expected decisions, as [`render::decision`] renders them.
    pub expect: Option<String>,
    /// The expected records afterwards, as [`render::records`] renders them.
    pub records: Option<String>,
}

/// Why a scenario could not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScenarioError {
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// The file is not TOML, or does not have the form of a [`Suite`].
    #[error("not a valid scenario file: {0}")]
    Form(String),
    /// The settings are not valid.
    #[error("{0}")]
    Settings(String),
    /// The simulated Close rejects a record, a field or a status.
    #[error("cannot create the records of the scenario: {0}")]
    Fixture(String),
    /// The worker cannot start.
    #[error("{0}")]
    Worker(String),
}

/// The result of a scenario, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScenarioResult {
    /// The decisions about the events.
    pub decision: String,
    /// The records in Close afterwards.
    pub records: String,
    /// The share of its events that the trigger takes.
    pub trigger: Share,
}

impl Suite {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ScenarioError::Unreadable`] and [`ScenarioError::Form`].
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let text =
            std::fs::read_to_string(path).map_err(|error| ScenarioError::Unreadable(error.to_string()))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, ScenarioError> {
        toml::from_str(text).map_err(|error| ScenarioError::Form(error.to_string()))
    }

    /// The configuration of a scenario for this simulated Close.
    pub fn config(
        &self,
        scenario: &Scenario,
        base: &Layers,
        close: &Simulator,
    ) -> Result<Destination, ScenarioError> {
        let mut at = Table::new();
        at.insert("api_url".into(), close.url().into());
        at.insert("api_key".into(), Settings::default().api_key.into());
        let close = Table::from_iter([("close".to_owned(), at.into())]);
        let layers = self.layers(scenario, base).over(close);
        read(layers, Need::All)
    }

    /// The settings of the file, overridden by those of the scenario.
    pub fn settings(&self, scenario: &Scenario) -> Table {
        merged(self.settings.clone(), scenario.settings.clone())
    }

    /// A scenario is about what an event does, so each one is compared with Close.
    fn layers(&self, scenario: &Scenario, base: &Layers) -> Layers {
        let recheck = Table::from_iter([("recheck".to_owned(), "0s".into())]);
        let worker = Table::from_iter([("worker".to_owned(), recheck.into())]);
        base.clone().over(worker).over(self.settings(scenario))
    }

    /// Starts a simulated Close with the records of the scenario.
    ///
    /// # Errors
    /// [`ScenarioError::Fixture`], and [`ScenarioError::Settings`] if the settings are not valid.
    pub async fn start_close(&self, scenario: &Scenario, base: &Layers) -> Result<Simulator, ScenarioError> {
        let (simulator, created) = self.create_records(scenario, base).await?;
        created.merge_and_delete(&simulator).map_err(ScenarioError::Fixture)?;
        Ok(simulator)
    }

    /// Like [`Self::start_close`], without the merges and deletions.
    pub(crate) async fn create_records(
        &self,
        scenario: &Scenario,
        base: &Layers,
    ) -> Result<(Simulator, CreatedRecords), ScenarioError> {
        let failed = |message: String| ScenarioError::Fixture(message);
        // There is no URL yet. The lookup fields do not need one.
        let config = read(self.layers(scenario, base), Need::Broker)?;
        let mut fields: Vec<CustomField> = self.fields.iter().map(FieldFixture::field).collect();
        let keys = [
            (&config.rules.lead.key, Owner::Lead, "Company ID"),
            (&config.rules.contact.key, Owner::Contact, "User ID"),
        ];
        for (key, owner, name) in keys {
            let Some(key) = key.as_ref().map(FieldRef::as_str) else { continue };
            if !fields.iter().any(|field| field.id == key || (field.name == key && field.owner == owner)) {
                fields.push(FieldFixture::lookup(key, owner, name).field());
            }
        }
        // With the same ids each time: they order records that were created at the same time.
        let mut settings = Settings { custom_fields: Vec::new(), seed: Uuid::nil(), ..Settings::fast() };
        if !self.statuses.is_empty() {
            settings.statuses.clone_from(&self.statuses);
        }
        // A worker that has run for a while knows the country, so the one of the scenario does.
        settings.behaviour.country_in_me = true;
        if let Some(country) = config.worker.country {
            settings.behaviour.set("country", &country.to_string()).map_err(failed)?;
        }
        settings.more_users = self.users.iter().map(Member::user).collect();
        let any =
            "127.0.0.1:0".parse().map_err(|error: std::net::AddrParseError| failed(error.to_string()))?;
        let simulator = Simulator::start(settings, any).await.map_err(|error| failed(error.to_string()))?;
        for field in &fields {
            simulator
                .add_field(field.clone())
                .map_err(|error| failed(format!("custom field \"{}\": {error}", field.name)))?;
        }
        let fixtures = Fixtures { simulator: &simulator, fields: &fields };
        let created = fixtures.create(&scenario.leads).map_err(failed)?;
        Ok((simulator, created))
    }

    /// Runs a scenario.
    ///
    /// # Errors
    /// When the scenario cannot run. An unexpected result is not an error.
    pub async fn run(&self, scenario: &Scenario, base: &Layers) -> Result<ScenarioResult, ScenarioError> {
        let (simulator, created) = self.create_records(scenario, base).await?;
        created.merge_and_delete(&simulator).map_err(ScenarioError::Fixture)?;
        let config = self.config(scenario, base, &simulator)?;
        let events = event::split(scenario.event.as_bytes());
        let trigger = config.rules.share(&events);
        let worker = worker(config).await?;
        let mut decisions = Vec::new();
        for event in events {
            let (outcome, decision) = match worker.prepare(&event, ReceivedAt::now()) {
                Prepared::Settled(outcome) => (outcome, Decision::default()),
                Prepared::Job(job) => worker.run(&job, RunContext::first()).await,
            };
            let names = render::names(&simulator);
            let name = |id: &str| names.get(id).or_else(|| created.name(id)).cloned();
            decisions.push(render::decision(&outcome, &decision, &worker.mapping(), name));
        }
        Ok(ScenarioResult { decision: decisions.join("\n"), records: render::records(&simulator), trigger })
    }
}

fn read(layers: Layers, need: Need) -> Result<Destination, ScenarioError> {
    let config = layers.read(need).map_err(|problems| ScenarioError::Settings(problems.to_string()))?;
    config.single().map_err(|names| {
        ScenarioError::Settings(format!(
            "name one of several destinations with `--destination`: {}",
            names.join(", ")
        ))
    })
}

/// Starts a worker for the simulated Close.
pub(crate) async fn worker(config: Destination) -> Result<Worker, ScenarioError> {
    let failed = |error: &dyn std::fmt::Display| ScenarioError::Worker(error.to_string());
    let client = Client::new(config.close, |_| {}).map_err(|error| failed(&error))?;
    let metrics = Metrics::new(None).map_err(|error| failed(&error))?;
    let Ready { mapping, .. } = preflight::run(&client, &config.rules).await.map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        failed(&lines.join("\n"))
    })?;
    Ok(Worker::new(Dependencies { settings: config.worker, rules: &config.rules, mapping, client, metrics }))
}

impl Scenario {
    /// The diff between the expected and the actual result. Empty if they are the same.
    pub fn difference(&self, result: &ScenarioResult) -> String {
        let sides = [
            ("decisions", &self.expect, &result.decision),
            ("records in Close", &self.records, &result.records),
        ];
        let mut text = String::new();
        for (title, expected, actual) in sides {
            let Some(expected) = expected else { continue };
            let (expected, actual) = (tidy(expected), tidy(actual));
            if expected != actual {
                let diff = similar::TextDiff::from_lines(&expected, &actual);
                text += &diff
                    .unified_diff()
                    .context_radius(20)
                    .header(&format!("{title}: expected"), &format!("{title}: actual"))
                    .to_string();
            }
        }
        text
    }
}

/// Merges tables. Values of `above` win.
fn merged(mut below: Table, above: Table) -> Table {
    for (key, value) in above {
        let value = match (below.remove(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merged(below, above).into(),
            (_, value) => value,
        };
        below.insert(key, value);
    }
    below
}

/// Trims the ends of lines, and blank lines at both ends.
fn tidy(text: &str) -> String {
    let lines: Vec<&str> = text.trim_matches('\n').lines().map(str::trim_end).collect();
    lines.join("\n").trim_end().to_owned() + "\n"
}

impl Member {
    fn user(&self) -> User {
        let (first, last) = self.name.split_once(' ').unwrap_or((&self.name, ""));
        User::new(&format!("user_{}", slug(&self.name)), first, last, &self.email)
    }
}

impl FieldFixture {
    fn lookup(key: &str, of: Owner, name: &str) -> Self {
        let is_id = key.starts_with("cf_");
        let name = if is_id { name } else { key }.to_owned();
        let id = is_id.then(|| key.to_owned());
        let kind = close_sync_simulator::FieldKind::Text;
        Self { of, name, id, kind, choices: Vec::new(), multiple: false }
    }

    fn field(&self) -> CustomField {
        let owner = match self.of {
            Owner::Lead => "lead",
            Owner::Contact => "contact",
            Owner::Shared => "shared",
        };
        CustomField {
            id: self.id.clone().unwrap_or_else(|| format!("cf_{owner}{}", slug(&self.name))),
            name: self.name.clone(),
            kind: self.kind,
            choices: self.choices.clone(),
            accepts_multiple_values: self.multiple,
            owner: self.of,
        }
    }
}

/// The letters and digits of a name, in lower case.
fn slug(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase()
}
