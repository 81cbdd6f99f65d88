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

/// What the worker is told while it runs.
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
        let load = || unreachable!("nobody asks for it");
        Self { shutdown, reload: stream::pending().boxed(), load: Box::new(load) }
    }
}

/// Runs the worker until it is told to stop, and tells what it did.
///
/// # Errors
/// When it cannot start: what is wrong with Close's lookup fields or key, with the broker's objects,
/// or with the HTTP address.
pub async fn run(config: Config, orders: impl Into<Control>) -> Result<SessionStats, RunError> {
    let Control { shutdown, reload, load } = orders.into();
    let addr = config.http_addr;
    let listener = TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen on {addr}: set `http.addr` (HTTP_ADDR) to a free address"))?;
    let bound = listener.local_addr().unwrap_or(addr);
    tracing::info!(%bound, "serving /metrics, /healthz and /readyz");
    let board = Registry::default();
    let stop_http = CancellationToken::new();
    let server = tokio::spawn(http::serve(listener, board.clone(), config.page, stop_http.clone()));

    let mut asked_to_stop = Box::pin(shutdown.clone().cancelled_owned().fuse());
    let mut fleet = Supervisor::new(board.clone(), shutdown);
    fleet.take_over(config.destinations)?;
    let mut manager = systemd::SystemdNotifier::new();
    manager.ready();
    let mut reload = reload.chain(stream::pending());
    let result = loop {
        tokio::select! {
            ended = fleet.ended() => if let Some(result) = ended { break result },
            () = &mut asked_to_stop => manager.stopping(),
            () = manager.turn() => manager.alive(&board.readiness()),
            Some(()) = reload.next() => {
                tracing::info!("reading the configuration again, and asking RabbitMQ and Close about it");
                manager.reloading();
                match load() {
                    Ok(config) => fleet.take_over(config.destinations)?,
                    Err(problems) => tracing::error!(
                        problem = %problems,
                        "the configuration was read again and cannot be used: the old one stays"
                    ),
                }
                manager.ready();
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
    board: Registry,
    shutdown: CancellationToken,
    running: HashMap<Id, Running>,
    tasks: JoinSet<Result<SessionStats, RunError>>,
    /// Those that are wanted, but not at once with one that stops.
    waiting: Vec<Destination>,
    total: SessionStats,
    /// Why destinations ended without being asked to.
    failed: BTreeMap<Option<String>, RunError>,
}

struct Running {
    name: Option<String>,
    seat: DestinationHandle,
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
    fn new(board: Registry, shutdown: CancellationToken) -> Self {
        let (running, tasks) = (HashMap::new(), JoinSet::new());
        let (waiting, failed) = (Vec::new(), BTreeMap::new());
        Self { board, shutdown, running, tasks, waiting, total: SessionStats::default(), failed }
    }

    /// Hands settings to the destinations that run, starts those that do not, and stops those that are gone.
    fn take_over(&mut self, destinations: Vec<Destination>) -> Result<(), RunError> {
        let is_gone =
            |name: &Option<String>| destinations.iter().all(|destination| destination.name != *name);
        for running in self.running.values().filter(|running| is_gone(&running.name) && !running.stops()) {
            tracing::info!(destination = running.name, "is no destination any more: it stops");
            running.stop.cancel();
        }
        for (name, _) in self.failed.extract_if(.., |name, _| is_gone(name)) {
            self.board.remove(name.as_deref());
        }
        // Those that are still wanted are among the new ones.
        self.waiting.clear();
        for destination in destinations {
            let is_it = |running: &&Running| running.name == destination.name && !running.stops();
            match self.running.values().find(is_it) {
                // The end of a task that does not listen any more is noticed elsewhere.
                Some(running) => drop(running.reloads.send(destination)),
                None => self.start_or_wait(destination)?,
            }
        }
        Ok(())
    }

    /// Starts a destination, once those have ended that stop and have something in common with it: two memories and
    /// two budgets of one organization would know nothing of each other.
    fn start_or_wait(&mut self, destination: Destination) -> Result<(), RunError> {
        let excludes =
            |running: &&Running| running.stops() && running.in_force.borrow().excludes(&destination);
        let Some(first) = self.running.values().find(excludes) else { return self.start(destination) };
        let (name, before) = (&destination.name, &first.name);
        tracing::info!(destination = name, before, "waits until that one has finished what is in hand");
        self.waiting.push(destination);
        Ok(())
    }

    fn start(&mut self, destination: Destination) -> Result<(), RunError> {
        let name = destination.name.clone();
        self.failed.remove(&name);
        let seat = self.board.register(name.as_deref()).context("the metrics are defective")?;
        let span = name
            .as_deref()
            .map_or_else(tracing::Span::none, |destination| tracing::info_span!("destination", destination));
        let (reloads, reloaded) = mpsc::unbounded_channel();
        let stop = self.shutdown.child_token();
        let (settings, in_force) = watch::channel(destination);
        let (its, until) = (seat.clone(), stop.clone());
        let run = async move { Box::pin(destination::run(settings, reloaded, its, &until)).await };
        let task = self.tasks.spawn(run.instrument(span));
        self.running.insert(task.id(), Running { name, seat, reloads, in_force, stop });
        Ok(())
    }

    /// Waits until a destination has ended; `Some` when it was the last.
    async fn ended(&mut self) -> Option<Result<SessionStats, RunError>> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok((id, result)) => (id, result),
            Err(error) => (error.id(), Err(anyhow::anyhow!("a destination panicked").into())),
        };
        let Running { name, seat, stop, .. } = self.running.remove(&id)?;
        seat.metrics.reset_gauges();
        seat.runtime.clear();
        if let Ok(report) = &result {
            self.total += *report;
        }
        match result {
            Err(error) if !stop.is_cancelled() => {
                if !self.tasks.is_empty() {
                    tracing::error!(destination = name, problem = %error, "cannot work: the other destinations go on");
                }
                seat.status.set(State::Failed, Some(error.to_string()));
                self.failed.insert(name.clone(), error);
            }
            // It was asked to stop, whatever became of it.
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
            self.board.remove(name.as_deref());
        }
        if !self.tasks.is_empty() {
            return None;
        }
        Some(self.end())
    }

    /// What the program ends with: what it did if it was asked to stop, else why nothing is left to do.
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
        // Whoever starts it again should know if that helps.
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
