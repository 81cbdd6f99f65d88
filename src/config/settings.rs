//! The validated settings.

use std::net::SocketAddr;
use std::time::Duration;

use toml::Table;

use crate::config::keys::{key, with_variable};
use crate::domain::mapping::Rules;
use crate::http::admin;
use crate::telemetry::otel;
use crate::{amqp, close, sync};

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
    pub(super) effective: Table,
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
    /// A fingerprint of these settings, without secrets and without the settings of the process.
    pub hash: String,
}

impl Destination {
    /// Whether the two must not run at the same time: they have the same name, the same API key (and so one rate limit
    /// and one order of messages), or broker objects in common.
    pub fn excludes(&self, other: &Self) -> bool {
        self.name == other.name || self.close.is_same_key(&other.close) || self.amqp.overlaps(&other.amqp)
    }

    /// The key and variable of the API key: "`close.api_key` (`CLOSE_API_KEY`)".
    pub fn api_key_setting(&self) -> String {
        with_variable(self.name.as_deref(), key!(Destination: close.api_key))
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
    /// The API key may be missing.
    Broker,
    All,
}

impl Config {
    /// The only destination.
    ///
    /// # Errors
    /// Returns the names if there are several.
    pub fn single(mut self) -> Result<Destination, Vec<String>> {
        match (self.destinations.pop(), self.destinations.is_empty()) {
            (Some(destination), true) => Ok(destination),
            (last, _) => {
                Err(self.destinations.into_iter().chain(last).filter_map(|each| each.name).collect())
            }
        }
    }

    /// The effective settings as TOML with masked secrets.
    pub fn show(&self) -> String {
        toml::to_string(&self.effective).unwrap_or_default()
    }
}
