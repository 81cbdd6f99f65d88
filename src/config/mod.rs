//! Settings from three layers: the commented defaults compiled in, a TOML file, the environment.
//!
//! `layers` merges them into one table. `raw` gives that table a typed shape. `process`, `destination` and `mapping`
//! check the values and build the typed settings below. All mistakes are collected and reported at once, each with key,
//! value and remedy (`problems`); values of secret keys are never shown.
//!
//! Each key has one environment variable, its path in capitals joined by `_`. A secret has a second one with the
//! suffix `_FILE`, which names a file with the value.
//!
//! One process can serve several Close organizations: `[destinations.<name>]` holds what differs from the rest of the
//! file, under the same keys, so that one organization needs none of it. It is a table by name and not a list, because
//! the name makes the variables (`DESTINATIONS_EMEA_CLOSE_API_KEY`), labels and queues.
//!
//! This is the only module that reads raw settings or the environment. The modules below own their
//! validated settings and never import this one.

mod destination;
mod layers;
mod mapping;
mod problems;
mod process;
mod raw;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use toml::Table;

use crate::domain::mapping::Rules;
use crate::http::admin;
use crate::telemetry::otel;
use crate::{amqp, close, sync};

pub use layers::{DEFAULTS, Layers, environment};
pub use problems::Problems;

/// The validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// The Close organizations that this process serves, at least one.
    pub destinations: Vec<Destination>,
    /// The address of metrics, health and the operator's page.
    pub http_addr: SocketAddr,
    /// The operator's page, unless it is off.
    pub page: Option<admin::Settings>,
    pub log_format: LogFormat,
    pub traces: otel::Settings,
    effective: Table,
}

/// The settings of one Close organization.
#[derive(Clone, Debug, PartialEq)]
pub struct Destination {
    /// `None` when the configuration has no `destinations`.
    pub name: Option<String>,
    pub amqp: amqp::Settings,
    pub close: close::Settings,
    pub worker: sync::Settings,
    pub rules: Rules,
    /// How often custom fields, statuses and users are read from Close.
    pub schema_refresh: Duration,
    /// How many messages are processed at the same time.
    pub concurrency: usize,
    /// How long messages in progress may take to finish on shutdown.
    pub grace: Duration,
    /// A fingerprint of these settings; secrets and the settings of the process have no part in it.
    pub hash: String,
}

impl Destination {
    /// Whether the two must not run at the same time: they have the same name, the same API key (and so one rate limit
    /// and one order of messages), or broker objects in common.
    pub fn excludes(&self, other: &Self) -> bool {
        self.name == other.name || self.close.is_same_key(&other.close) || self.amqp.overlaps(&other.amqp)
    }

    /// The API key's setting as the operator finds it: "`close.api_key` (`CLOSE_API_KEY`)".
    pub fn api_key_setting(&self) -> String {
        layers::spell(self.name.as_deref(), "close.api_key")
    }
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    Text,
    Json,
}

/// Which settings a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Those of the broker: the API key may be missing.
    Broker,
    All,
}

impl Config {
    /// Reads and checks all settings.
    ///
    /// # Errors
    /// All problems at once.
    pub fn load(
        file: Option<&Path>,
        environment: &HashMap<String, String>,
        need: Need,
    ) -> Result<Self, Problems> {
        Layers::load(file, environment)?.read(need)
    }

    /// The only destination.
    ///
    /// # Errors
    /// The names, when there are several.
    pub fn single(mut self) -> Result<Destination, Vec<String>> {
        match (self.destinations.pop(), self.destinations.is_empty()) {
            (Some(destination), true) => Ok(destination),
            (last, _) => {
                Err(self.destinations.into_iter().chain(last).filter_map(|each| each.name).collect())
            }
        }
    }

    /// The settings in force as TOML, with secrets masked.
    pub fn show(&self) -> String {
        toml::to_string(&self.effective).unwrap_or_default()
    }
}
