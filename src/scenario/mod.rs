//! Test files for a mapping: what Close holds, an event, and what has to come of it.
//!
//! A [`Suite`] is one file. Each of its scenarios gets a Close of its own, the [`close_sync_simulator`], and
//! runs through the same [`Worker`] as every message; only the broker is missing. What comes of it is
//! told as text ([`render`]) and compared with the text in the file, so that the difference reads like a
//! review of the change.
//!
//! The project's own matching rules are proven by such files too, `tests/scenarios`; there each scenario
//! also runs on records in memory and, with a real broker, through the whole program.

mod fixtures;
pub mod render;

use std::path::Path;

use serde::Deserialize;
use toml::Table;
use uuid::Uuid;

use crate::close::Client;
use crate::config::{Destination, Layers, Need};
use crate::domain::decision::Decision;
use crate::domain::event;
use crate::domain::schema::FieldRef;
use crate::sync::preflight::{self, Ready};
use crate::sync::{Dependencies, Prepared, ReceivedAt, RunContext, Worker};
use crate::telemetry::metrics::Metrics;
use close_sync_simulator::{CustomField, Owner, Settings, Simulator, User};

use fixtures::{LeadSeed, Planted, Seed};

/// One file of scenarios that share an organization and settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// Settings for all scenarios of the file, laid over the user's own.
    #[serde(default)]
    settings: Table,
    /// Lead statuses of the organization, by label; the first is that of new Leads.
    #[serde(default)]
    statuses: Vec<String>,
    /// Its users.
    #[serde(default, rename = "user")]
    users: Vec<Member>,
    /// Its custom fields. The lookup fields need not be listed.
    #[serde(default, rename = "field")]
    fields: Vec<FieldSeed>,
    /// The scenarios, in order.
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
struct FieldSeed {
    of: Owner,
    name: String,
    /// Made up when it does not matter.
    id: Option<String>,
    #[serde(rename = "type")]
    kind: close_sync_simulator::FieldKind,
    #[serde(default)]
    choices: Vec<String>,
    #[serde(default)]
    multiple: bool,
}

/// What Close holds, what arrives, and what has to come of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows.
    pub title: String,
    /// Settings of this scenario alone.
    #[serde(default)]
    settings: Table,
    /// What Close holds before.
    #[serde(default)]
    leads: Vec<LeadSeed>,
    /// One event as JSON, several as a list or one per line; they arrive in this order.
    pub event: String,
    /// What is decided and done, as [`render::decision`] tells it.
    pub expect: Option<String>,
    /// What Close holds afterwards, as [`render::records`] tells it.
    pub records: Option<String>,
}

/// Why a scenario could not be played.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unplayable {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// It is no TOML, or not of this form.
    #[error("is no file of scenarios: {0}")]
    Form(String),
    /// The settings are not valid together.
    #[error("{0}")]
    Settings(String),
    /// The simulated Close refuses what it is to hold.
    #[error("Close could not hold this: {0}")]
    Seed(String),
    /// The worker could not start on it.
    #[error("{0}")]
    Worker(String),
}

/// What came of a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// What was decided and done.
    pub decision: String,
    /// What Close holds afterwards.
    pub records: String,
}

impl Suite {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Unplayable::Unreadable`] and [`Unplayable::Form`].
    pub fn load(path: &Path) -> Result<Self, Unplayable> {
        let text =
            std::fs::read_to_string(path).map_err(|error| Unplayable::Unreadable(error.to_string()))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, Unplayable> {
        toml::from_str(text).map_err(|error| Unplayable::Form(error.to_string()))
    }

    /// The settings of a scenario, for a Close at this URL.
    pub fn config(
        &self,
        scenario: &Scenario,
        base: &Layers,
        close: &Simulator,
    ) -> Result<Destination, Unplayable> {
        let mut at = Table::new();
        at.insert("api_url".into(), close.url().into());
        at.insert("api_key".into(), Settings::default().api_key.into());
        let close = Table::from_iter([("close".to_owned(), at.into())]);
        let layers = self.layers(scenario, base).over(close);
        read(layers, Need::All)
    }

    /// The settings of a scenario without those below: the file's, with its own over them.
    pub fn settings(&self, scenario: &Scenario) -> Table {
        merged(self.settings.clone(), scenario.settings.clone())
    }

    fn layers(&self, scenario: &Scenario, base: &Layers) -> Layers {
        base.clone().over(self.settings(scenario))
    }

    /// A Close that holds what the scenario says.
    ///
    /// # Errors
    /// [`Unplayable::Seed`], and [`Unplayable::Settings`] when the lookup fields are not told.
    pub async fn stage(&self, scenario: &Scenario, base: &Layers) -> Result<Simulator, Unplayable> {
        let (simulator, planted) = self.plant(scenario, base).await?;
        planted.bury(&simulator).map_err(Unplayable::Seed)?;
        Ok(simulator)
    }

    /// The same, before anything was merged or deleted.
    pub(crate) async fn plant(
        &self,
        scenario: &Scenario,
        base: &Layers,
    ) -> Result<(Simulator, Planted), Unplayable> {
        let seed = |message: String| Unplayable::Seed(message);
        // The key and the URL are not known yet, and the lookup fields need neither.
        let config = read(self.layers(scenario, base), Need::Broker)?;
        let mut fields: Vec<CustomField> = self.fields.iter().map(FieldSeed::field).collect();
        let keys = [
            (&config.rules.lead.key, Owner::Lead, "Company ID"),
            (&config.rules.contact.key, Owner::Contact, "User ID"),
        ];
        for (key, owner, name) in keys {
            let Some(key) = key.as_ref().map(FieldRef::as_str) else { continue };
            if !fields.iter().any(|field| field.id == key || (field.name == key && field.owner == owner)) {
                fields.push(FieldSeed::lookup(key, owner, name).field());
            }
        }
        // The same ids each time: they break the tie of records made at the same moment.
        let mut settings = Settings { custom_fields: Vec::new(), seed: Uuid::nil(), ..Settings::fast() };
        if !self.statuses.is_empty() {
            settings.statuses.clone_from(&self.statuses);
        }
        settings.more_users = self.users.iter().map(Member::user).collect();
        let any = "127.0.0.1:0".parse().map_err(|error: std::net::AddrParseError| seed(error.to_string()))?;
        let simulator = Simulator::start(settings, any).await.map_err(|error| seed(error.to_string()))?;
        for field in &fields {
            simulator
                .add_field(field.clone())
                .map_err(|refused| seed(format!("custom field \"{}\": {refused}", field.name)))?;
        }
        let seeds = Seed { simulator: &simulator, fields: &fields };
        let planted = seeds.plant(&scenario.leads).map_err(seed)?;
        Ok((simulator, planted))
    }

    /// Plays a scenario.
    ///
    /// # Errors
    /// Why it could not be played. That something else came of it than expected is no error.
    pub async fn play(&self, scenario: &Scenario, base: &Layers) -> Result<Told, Unplayable> {
        let (simulator, planted) = self.plant(scenario, base).await?;
        planted.bury(&simulator).map_err(Unplayable::Seed)?;
        let config = self.config(scenario, base, &simulator)?;
        let worker = worker(config).await?;
        let mut decisions = Vec::new();
        for event in event::split(scenario.event.as_bytes()) {
            let (outcome, decision) = match worker.prepare(&event, ReceivedAt::now()) {
                Prepared::Settled(outcome) => (outcome, Decision::default()),
                Prepared::Job(job) => worker.run(&job, RunContext::first()).await,
            };
            let names = render::names(&simulator);
            let name = |id: &str| names.get(id).or_else(|| planted.name(id)).cloned();
            decisions.push(render::decision(&outcome, &decision, &worker.mapping(), name));
        }
        Ok(Told { decision: decisions.join("\n"), records: render::records(&simulator) })
    }
}

fn read(layers: Layers, need: Need) -> Result<Destination, Unplayable> {
    let config = layers.read(need).map_err(|problems| Unplayable::Settings(problems.to_string()))?;
    config.single().map_err(|names| {
        Unplayable::Settings(format!(
            "name one of several destinations with `--destination`: {}",
            names.join(", ")
        ))
    })
}

/// A worker on the simulated Close.
pub(crate) async fn worker(config: Destination) -> Result<Worker, Unplayable> {
    let failed = |error: &dyn std::fmt::Display| Unplayable::Worker(error.to_string());
    let client = Client::new(config.close, |_| {}).map_err(|error| failed(&error))?;
    let metrics = Metrics::new(None).map_err(|error| failed(&error))?;
    let Ready { mapping, .. } = preflight::run(&client, &config.rules).await.map_err(|obstacles| {
        let told: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
        failed(&told.join("\n"))
    })?;
    Ok(Worker::new(Dependencies { settings: config.worker, rules: &config.rules, mapping, client, metrics }))
}

impl Scenario {
    /// Where what came differs from what is expected; empty when it does not.
    pub fn difference(&self, told: &Told) -> String {
        let sides = [
            ("what is done", &self.expect, &told.decision),
            ("what Close holds", &self.records, &told.records),
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
                    .header(&format!("{title}: expected"), &format!("{title}: came"))
                    .to_string();
            }
        }
        text
    }
}

/// One table over another.
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

/// Without blanks at the ends of lines and blank lines at both ends.
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

impl FieldSeed {
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
