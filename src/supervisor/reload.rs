//! New settings for a running destination, and how they are checked before they replace the old ones.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};

use crate::amqp::{self, BrokerError, topology};
use crate::close::Client;
use crate::config::Destination;
use crate::domain::mapping::Mapping;
use crate::sync::log_mapping_problems;
use crate::sync::preflight::{self, PreflightError, Ready};
use crate::telemetry::metrics::Metrics;

/// Settings with a client for their Close organization, not yet checked.
pub(super) struct Candidate {
    pub(super) settings: Destination,
    client: Client,
}

impl Candidate {
    pub(super) fn new(settings: Destination, metrics: &Metrics) -> anyhow::Result<Self> {
        let metrics = metrics.clone();
        let client = Client::new(settings.close.clone(), move |call| metrics.request_done(call))
            .context("cannot set up TLS; are CA certificates installed (Debian: ca-certificates)?")?;
        Ok(Self { settings, client })
    }

    /// The preflight check of Close, at start and on reload. Logs what the mapping has to leave out.
    pub(super) async fn check(&self) -> Result<Ready, Vec<PreflightError>> {
        let ready = preflight::run(&self.client, &self.settings.rules).await?.for_start()?;
        log_mapping_problems(&ready.mapping, None);
        Ok(ready)
    }

    pub(super) fn accepted(self, mapping: Mapping) -> Accepted {
        Accepted { settings: self.settings, client: self.client, mapping }
    }
}

/// Settings that passed the preflight check, with the mapping built from them.
pub(super) struct Accepted {
    pub(super) settings: Destination,
    pub(super) client: Client,
    pub(super) mapping: Mapping,
}

/// What a reload does not change.
const NOT_YET: &str = "changes of `http`, `log` and `otel` take effect at the next start; environment variables \
                       override the file";

/// How long the check of new settings may take.
const CHECK_TIME: Duration = Duration::from_secs(30);

/// Receives new settings and checks them.
pub(super) struct Reloads {
    pub(super) settings: mpsc::UnboundedReceiver<Destination>,
    /// The settings being checked. A check that was cancelled starts again.
    pub(super) checking: Option<Destination>,
    /// The settings in force. If the new ones have the same broker settings, the broker's objects are declared already
    /// and not looked at again: the broker may be away at the moment.
    pub(super) in_force: watch::Sender<Destination>,
    pub(super) metrics: Metrics,
}

impl Reloads {
    /// Waits for settings that differ from those in force and pass the check. Logs why others are rejected.
    pub(super) async fn next(&mut self) -> Accepted {
        loop {
            if self.checking.is_none() {
                self.checking = self.settings.recv().await;
            }
            // The supervisor dropped the sender: there will be no reload.
            let Some(settings) = self.checking.clone() else { std::future::pending().await };
            // Compared only now, because the reload before may have been accepted or rejected.
            if settings == *self.in_force.borrow() {
                self.checking = None;
                tracing::info!(event = "reload_unchanged", "configuration reloaded: no changes; {NOT_YET}");
                continue;
            }
            let checked = self.check(settings).await;
            self.checking = None;
            match checked {
                Ok(accepted) => {
                    tracing::info!(
                        event = "reload_applied",
                        "configuration reloaded: new settings applied; {NOT_YET}"
                    );
                    return accepted;
                }
                Err(error) => tracing::error!(
                    event = "reload_rejected",
                    problem = format!("{error:#}"),
                    "configuration reload rejected; keeping the current configuration"
                ),
            }
        }
    }

    async fn check(&self, settings: Destination) -> anyhow::Result<Accepted> {
        let declared = self.in_force.borrow().amqp.clone();
        if !declared.is_same(&settings.amqp) {
            prepare(&settings.amqp).await?;
        }
        let candidate = Candidate::new(settings, &self.metrics)?;
        let checked = tokio::time::timeout(CHECK_TIME, candidate.check()).await;
        let checked =
            checked.context("Close did not answer in time, or its rate limits delayed the check")?;
        let ready = checked.map_err(|errors| {
            anyhow::anyhow!(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        Ok(candidate.accepted(ready.mapping))
    }
}

/// Declares or checks the objects on the broker.
pub(super) async fn prepare(settings: &amqp::Settings) -> Result<(), BrokerError> {
    let connection = settings.connect("close-sync prepare").await?;
    amqp::with_timeout(topology::prepare(&connection, settings)).await?;
    amqp::disconnect(&connection).await;
    Ok(())
}
