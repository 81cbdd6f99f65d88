//! Starts, reloads and stops the destinations.
//!
//! Each destination runs by itself (`destination`, `sessions`): a problem of one does not affect the others. A
//! destination whose configuration cannot work ends. The process ends with the last of them.
//!
//! SIGHUP reloads the configuration. If the file is valid, each destination receives its part and uses it once Close
//! accepts it. New destinations start, and removed ones stop. A removed and a new destination may be the same
//! organization under another name: the new one starts once the other has stopped. The service manager is notified of
//! all this (`systemd`).

mod destination;
mod pause;
mod reload;
mod sessions;
mod systemd;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::Context;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::config::{Config, Destination, Problems};
use crate::consumer::SessionStats;
use crate::http;
use crate::http::registry::{DestinationHandle, Registry};
use crate::telemetry::status::State;

/// Why [`run`] ended without a shutdown.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration cannot work. Exit code 78.
    #[error("{0}")]
    Configuration(String),
    /// Something that is needed is unavailable. Exit code 69.
    #[error("{0:#}")]
    Unavailable(#[from] anyhow::Error),
}

/// How the running worker is controlled.
pub struct Control {
    /// Requests a shutdown.
    pub shutdown: CancellationToken,
    /// Requests a reload of the configuration with each item.
    pub reload: BoxStream<'static, ()>,
    /// Loads the configuration.
    pub load: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
}

impl From<CancellationToken> for Control {
    /// Without reloads.
    fn from(shutdown: CancellationToken) -> Self {
        let load = || unreachable!("never reloads");
        Self { shutdown, reload: stream::pending().boxed(), load: Box::new(load) }
    }
}

/// Runs the worker until shutdown. Returns the statistics of all sessions.
///
/// # Errors
/// When the HTTP address cannot be bound, or when all destinations failed: Close does not accept the key or the lookup
/// fields, or the broker's objects have other properties.
pub async fn run(config: Config, control: impl Into<Control>) -> Result<SessionStats, RunError> {
    let Control { shutdown, reload, load } = control.into();
    let addr = config.http_addr;
    let listener = TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen on {addr}: set `http.addr` (HTTP_ADDR) to a free address"))?;
    let bound = listener.local_addr().unwrap_or(addr);
    tracing::info!(%bound, "serving /metrics, /healthz and /readyz");
    let registry = Registry::default();
    let stop_http = CancellationToken::new();
    let server = tokio::spawn(http::serve(listener, registry.clone(), config.page, stop_http.clone()));

    let mut stop_requested = Box::pin(shutdown.clone().cancelled_owned().fuse());
    let mut supervisor = Supervisor::new(registry.clone(), shutdown);
    supervisor.apply(config.destinations)?;
    let mut notifier = systemd::SystemdNotifier::new();
    notifier.ready();
    let mut reload = reload.chain(stream::pending());
    let result = loop {
        tokio::select! {
            ended = supervisor.ended() => if let Some(result) = ended { break result },
            () = &mut stop_requested => notifier.stopping(),
            () = notifier.tick() => notifier.alive(&registry.readiness()),
            Some(()) = reload.next() => {
                tracing::info!(event = "reload_started", "reloading the configuration");
                notifier.reloading();
                match load() {
                    Ok(config) => supervisor.apply(config.destinations)?,
                    Err(problems) => tracing::error!(
                        event = "reload_rejected",
                        problem = %problems,
                        "configuration reload rejected; keeping the current configuration"
                    ),
                }
                notifier.ready();
            }
        }
    };

    stop_http.cancel();
    // A scraper that keeps its connection open must not hold up the exit; a replay from the operator's page returns its messages.
    let _ = tokio::time::timeout(Duration::from_secs(3), server).await;
    result
}

/// The destinations that run.
struct Supervisor {
    registry: Registry,
    shutdown: CancellationToken,
    running: HashMap<Id, Running>,
    tasks: JoinSet<Result<SessionStats, RunError>>,
    /// Deferred until a conflicting destination has stopped.
    waiting: Vec<Destination>,
    total: SessionStats,
    /// Destinations that failed, and why.
    failed: BTreeMap<Option<String>, RunError>,
}

struct Running {
    name: Option<String>,
    handle: DestinationHandle,
    reloads: mpsc::UnboundedSender<Destination>,
    in_force: watch::Receiver<Destination>,
    stop: CancellationToken,
}

impl Running {
    fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }
}

impl Supervisor {
    fn new(registry: Registry, shutdown: CancellationToken) -> Self {
        let (running, tasks) = (HashMap::new(), JoinSet::new());
        let (waiting, failed) = (Vec::new(), BTreeMap::new());
        Self { registry, shutdown, running, tasks, waiting, total: SessionStats::default(), failed }
    }

    /// Passes settings to running destinations, starts new ones, and stops removed ones.
    fn apply(&mut self, destinations: Vec<Destination>) -> Result<(), RunError> {
        let is_gone =
            |name: &Option<String>| destinations.iter().all(|destination| destination.name != *name);
        for running in
            self.running.values().filter(|running| is_gone(&running.name) && !running.is_stopping())
        {
            tracing::info!(
                event = "destination_removed",
                destination = running.name,
                "destination removed from the configuration, stopping it"
            );
            running.stop.cancel();
        }
        for (name, _) in self.failed.extract_if(.., |name, _| is_gone(name)) {
            self.registry.remove(name.as_deref());
        }
        // The new settings contain every destination that is still wanted.
        self.waiting.clear();
        for destination in destinations {
            let is_it = |running: &&Running| running.name == destination.name && !running.is_stopping();
            match self.running.values().find(is_it) {
                // If the task has ended, `ended` handles it.
                Some(running) => drop(running.reloads.send(destination)),
                None => self.start_or_wait(destination)?,
            }
        }
        Ok(())
    }

    /// Starts a destination, but not while one that conflicts with it is still stopping: two workers for one
    /// organization would not share caches and rate limits.
    fn start_or_wait(&mut self, destination: Destination) -> Result<(), RunError> {
        let excludes =
            |running: &&Running| running.is_stopping() && running.in_force.borrow().excludes(&destination);
        let Some(first) = self.running.values().find(excludes) else { return self.start(destination) };
        let (name, before) = (&destination.name, &first.name);
        tracing::info!(
            event = "destination_deferred",
            destination = name,
            before,
            "start deferred until the conflicting destination has stopped"
        );
        self.waiting.push(destination);
        Ok(())
    }

    fn start(&mut self, destination: Destination) -> Result<(), RunError> {
        let name = destination.name.clone();
        self.failed.remove(&name);
        let handle = self.registry.register(name.as_deref()).context("the metrics are defective")?;
        let span = name
            .as_deref()
            .map_or_else(tracing::Span::none, |destination| tracing::info_span!("destination", destination));
        let (reloads, reloaded) = mpsc::unbounded_channel();
        let stop = self.shutdown.child_token();
        let (settings, in_force) = watch::channel(destination);
        let (shared, requested) = (handle.clone(), stop.clone());
        let run = async move { Box::pin(destination::run(settings, reloaded, shared, &requested)).await };
        let task = self.tasks.spawn(run.instrument(span));
        self.running.insert(task.id(), Running { name, handle, reloads, in_force, stop });
        Ok(())
    }

    /// Waits until a destination has ended. Returns the result of the process if it was the last one.
    async fn ended(&mut self) -> Option<Result<SessionStats, RunError>> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok((id, result)) => (id, result),
            Err(error) => (error.id(), Err(anyhow::anyhow!("a destination panicked").into())),
        };
        let Running { name, handle, stop, .. } = self.running.remove(&id)?;
        handle.metrics.reset_gauges();
        handle.runtime.clear();
        if let Ok(stats) = &result {
            self.total += *stats;
        }
        match result {
            Err(error) if !stop.is_cancelled() => {
                if !self.tasks.is_empty() {
                    tracing::error!(event = "destination_failed", destination = name, problem = %error, "destination failed; the other destinations keep running");
                }
                handle.status.set(State::Failed, Some(error.to_string()));
                self.failed.insert(name.clone(), error);
            }
            // It was stopped, so its error does not matter.
            Ok(_) | Err(_) => {}
        }
        if !self.shutdown.is_cancelled() {
            for destination in std::mem::take(&mut self.waiting) {
                if let Err(error) = self.start_or_wait(destination) {
                    return Some(Err(error));
                }
            }
        }
        let is_there = |running: &Running| running.name == name;
        if !self.failed.contains_key(&name) && !self.running.values().any(is_there) {
            self.registry.remove(name.as_deref());
        }
        if !self.tasks.is_empty() {
            return None;
        }
        Some(self.end())
    }

    /// The result of the process: its totals after a shutdown, else why every destination failed.
    fn end(&mut self) -> Result<SessionStats, RunError> {
        if self.shutdown.is_cancelled() {
            return Ok(self.total);
        }
        let name_it = |(name, error): (Option<String>, RunError)| match (name, error) {
            (None, error) => error,
            (Some(name), RunError::Configuration(message)) => {
                RunError::Configuration(format!("destination `{name}`: {message}"))
            }
            (Some(name), RunError::Unavailable(error)) => {
                error.context(format!("destination `{name}`")).into()
            }
        };
        let all = std::mem::take(&mut self.failed).into_iter().map(name_it);
        // One that is unavailable makes the exit code 69, so that a service manager restarts the process.
        let both = |a, b| match (a, b) {
            (RunError::Unavailable(a), b) => RunError::Unavailable(anyhow::anyhow!("{a:#}\n{b}")),
            (RunError::Configuration(a), RunError::Unavailable(b)) => {
                RunError::Unavailable(anyhow::anyhow!("{a}\n{b:#}"))
            }
            (RunError::Configuration(a), RunError::Configuration(b)) => {
                RunError::Configuration(format!("{a}\n{b}"))
            }
        };
        all.reduce(both).map_or(Ok(self.total), Err)
    }
}
