//! Wiring, reloading and shutdown order.
//!
//! [`run`] takes settings and a reason to stop, so that a test stops it the way an operator does. Each destination
//! runs by itself (`destination`): what is wrong with one concerns no other. One whose configuration cannot work
//! ends, and the program with the last of them.
//!
//! On SIGHUP the configuration is read again. One that is valid is handed to each destination, which takes its part
//! over if that says something new and its Close agrees; new destinations begin, those that are gone stop. One that
//! is gone and one that is new may be the same organization, renamed: the new one waits for the end of the other. The
//! service manager that started the process hears of all this (`service`).

mod destination;
mod pause;
mod reload;
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

/// Why `run` ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration cannot work: exit code 78.
    #[error("{0}")]
    Configuration(String),
    /// Something that is needed is not there: exit code 69.
    #[error("{0:#}")]
    Unavailable(#[from] anyhow::Error),
}

/// How the running worker is controlled.
pub struct Control {
    /// To stop.
    pub shutdown: CancellationToken,
    /// To read the configuration again, at each item.
    pub reload: BoxStream<'static, ()>,
    /// How that is done.
    pub load: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
}

impl From<CancellationToken> for Control {
    /// Only to stop.
    fn from(shutdown: CancellationToken) -> Self {
        let load = || unreachable!("never reloads");
        Self { shutdown, reload: stream::pending().boxed(), load: Box::new(load) }
    }
}

/// Runs the worker until shutdown, and returns what it did.
///
/// # Errors
/// When it cannot start: what is wrong with Close's lookup fields or key, with the broker's objects,
/// or with the HTTP address.
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

    let mut asked_to_stop = Box::pin(shutdown.clone().cancelled_owned().fuse());
    let mut supervisor = Supervisor::new(registry.clone(), shutdown);
    supervisor.take_over(config.destinations)?;
    let mut notifier = systemd::SystemdNotifier::new();
    notifier.ready();
    let mut reload = reload.chain(stream::pending());
    let result = loop {
        tokio::select! {
            ended = supervisor.ended() => if let Some(result) = ended { break result },
            () = &mut asked_to_stop => notifier.stopping(),
            () = notifier.turn() => notifier.alive(&registry.readiness()),
            Some(()) = reload.next() => {
                tracing::info!("reloading the configuration");
                notifier.reloading();
                match load() {
                    Ok(config) => supervisor.take_over(config.destinations)?,
                    Err(problems) => tracing::error!(
                        problem = %problems,
                        "configuration reload rejected; keeping the current configuration"
                    ),
                }
                notifier.ready();
            }
        }
    };

    stop_http.cancel();
    // A scraper that keeps its connection open must not hold up the exit; a replay of the page gives back what it has.
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
    fn stops(&self) -> bool {
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
    fn take_over(&mut self, destinations: Vec<Destination>) -> Result<(), RunError> {
        let is_gone =
            |name: &Option<String>| destinations.iter().all(|destination| destination.name != *name);
        for running in self.running.values().filter(|running| is_gone(&running.name) && !running.stops()) {
            tracing::info!(
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
            let is_it = |running: &&Running| running.name == destination.name && !running.stops();
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
            |running: &&Running| running.stops() && running.in_force.borrow().excludes(&destination);
        let Some(first) = self.running.values().find(excludes) else { return self.start(destination) };
        let (name, before) = (&destination.name, &first.name);
        tracing::info!(
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
        let (its, until) = (handle.clone(), stop.clone());
        let run = async move { Box::pin(destination::run(settings, reloaded, its, &until)).await };
        let task = self.tasks.spawn(run.instrument(span));
        self.running.insert(task.id(), Running { name, handle, reloads, in_force, stop });
        Ok(())
    }

    /// Waits until a destination has ended; `Some` when it was the last.
    async fn ended(&mut self) -> Option<Result<SessionStats, RunError>> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok((id, result)) => (id, result),
            Err(error) => (error.id(), Err(anyhow::anyhow!("a destination panicked").into())),
        };
        let Running { name, handle, stop, .. } = self.running.remove(&id)?;
        handle.metrics.reset_gauges();
        handle.runtime.clear();
        if let Ok(report) = &result {
            self.total += *report;
        }
        match result {
            Err(error) if !stop.is_cancelled() => {
                if !self.tasks.is_empty() {
                    tracing::error!(destination = name, problem = %error, "destination failed; the other destinations keep running");
                }
                handle.status.set(State::Failed, Some(error.to_string()));
                self.failed.insert(name.clone(), error);
            }
            // It was asked to stop, so its error does not matter.
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
        let told = |(name, error): (Option<String>, RunError)| match (name, error) {
            (None, error) => error,
            (Some(name), RunError::Configuration(message)) => {
                RunError::Configuration(format!("destination `{name}`: {message}"))
            }
            (Some(name), RunError::Unavailable(error)) => {
                error.context(format!("destination `{name}`")).into()
            }
        };
        let all = std::mem::take(&mut self.failed).into_iter().map(told);
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
