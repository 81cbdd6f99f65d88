//! Wiring, supervision and shutdown order.
//!
//! [`run`] takes settings and a reason to stop, so that a test stops it the way an operator does. It
//! runs one session after the other: a lost broker is reconnected to with growing, jittered pauses
//! and without end; while Close cannot be worked with there is no session at all, and Close is probed
//! instead, so that messages wait in the queue without being touched (`design.md` P5). After that, the first
//! session begins with a few messages at a time: Close is on trial, and what proves that it works is a message
//! that succeeds.
//!
//! On SIGHUP the configuration is read again. One that is valid, and that Close agrees to, takes over: what is
//! in hand is finished by the old one first. Otherwise the old one stays.

use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, stream};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::session::{End, Report, Session};
use crate::amqp::{self, BrokerError, topology};
use crate::close::Client;
use crate::config::{Config, Problems};
use crate::detours::Detours;
use crate::domain::mapping::{Key, Mapping, Rules};
use crate::http;
use crate::metrics::Metrics;
use crate::outcome::PauseCause;
use crate::preflight::{self, Obstacle};
use crate::retry::Pauses;
use crate::state::{State, Status};
use crate::worker::{Worker, tell_flaws};

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
pub struct Orders {
    /// To stop.
    pub shutdown: CancellationToken,
    /// To read the configuration again, at each item.
    pub reload: BoxStream<'static, ()>,
    /// How that is done.
    pub load: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
}

impl From<CancellationToken> for Orders {
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
pub async fn run(config: Config, orders: impl Into<Orders>) -> Result<Report, RunError> {
    let Orders { shutdown, reload, load } = orders.into();
    let metrics = Metrics::new().context("the metrics are defective")?;
    let status = Status::default();
    let addr = config.http_addr;
    let listener = TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen on {addr}: set `http.addr` (HTTP_ADDR) to a free address"))?;
    let bound = listener.local_addr().unwrap_or(addr);
    tracing::info!(%bound, "serving /metrics, /healthz and /readyz");
    let stop_http = CancellationToken::new();
    let server = tokio::spawn(http::serve(listener, metrics.clone(), status.clone(), stop_http.clone()));

    let result = async {
        // Before anything about Close: producers may publish from now on, whatever state Close is in.
        match shutdown.run_until_cancelled(declare(&config.amqp)).await {
            Some(Err(error @ BrokerError::Conflict { .. })) => {
                return Err(RunError::Configuration(error.to_string()));
            }
            Some(Err(error)) => tracing::warn!(%error, "nothing is declared in RabbitMQ yet"),
            Some(Ok(())) | None => {}
        }
        let destination = Destination {
            client: client(&config, &metrics)?,
            rules: config.rules.clone(),
            status: status.clone(),
            metrics: metrics.clone(),
        };
        let amqp = std::sync::Mutex::new(config.amqp.clone());
        let reloads = reload.filter_map(|()| async { reloaded(&load, &metrics, &amqp).await });
        // Who asked once may ask again; the end of the stream means nothing.
        let mut reloads = std::pin::pin!(reloads.chain(stream::pending()));
        let assembly = tokio::select! {
            mapping = destination.mapping(&shutdown) => match mapping? {
                Some(mapping) => Assembly { client: destination.client, config, mapping },
                None => return Ok(Report::default()),
            },
            // Mended while we wait for Close.
            Some(assembly) = reloads.next() => assembly,
        };
        metrics.paused(None);
        let supervisor = Supervisor::new(status.clone(), metrics.clone());
        supervisor.run(assembly, reloads, &shutdown).await
    };
    let result = result.await;
    metrics.watch(None);

    stop_http.cancel();
    // A scraper that keeps its connection open must not hold up the exit.
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    result
}

fn client(config: &Config, metrics: &Metrics) -> anyhow::Result<Client> {
    let metrics = metrics.clone();
    Client::new(config.close.clone(), move |call| metrics.called(call))
        .context("TLS cannot be set up: are CA certificates installed (Debian: ca-certificates)?")
}

/// A configuration that Close agrees to, with what was made of it.
struct Assembly {
    config: Config,
    client: Client,
    mapping: Mapping,
}

/// How long a new configuration may take to be checked.
const CHECK_TIME: Duration = Duration::from_secs(30);

/// Reads the configuration again. What is wrong with it is told, and `None`: the old one stays in force.
async fn reloaded(
    load: &(dyn Fn() -> Result<Config, Problems> + Send + Sync),
    metrics: &Metrics,
    amqp: &std::sync::Mutex<amqp::Settings>,
) -> Option<Assembly> {
    tracing::info!("reading the configuration again, and asking Close about it");
    let tried = async {
        let config = load()?;
        // What worked before is not asked again: the broker may be away just now.
        let is_new = !amqp.lock().unwrap_or_else(PoisonError::into_inner).is_same(&config.amqp);
        if is_new {
            declare(&config.amqp).await?;
        }
        let client = client(&config, metrics)?;
        let asked = tokio::time::timeout(CHECK_TIME, preflight::run(&client, &config.rules));
        let asked = asked.await.context("Close did not answer in time, or let us wait for rate limits")?;
        let ready = asked.map_err(|obstacles| {
            anyhow::anyhow!(obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        tell_flaws(&ready.mapping);
        Ok::<_, anyhow::Error>(Assembly { config, client, mapping: ready.mapping })
    };
    match tried.await {
        Ok(assembly) => {
            amqp.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&assembly.config.amqp);
            tracing::info!(
                "the configuration was read again and is taken over (`http.addr` and `log.format` at the next start; \
                 variables of the environment still win over the file)"
            );
            Some(assembly)
        }
        Err(error) => {
            tracing::error!(
                problem = format!("{error:#}"),
                "the configuration was read again and cannot be used: the old one stays"
            );
            None
        }
    }
}

/// Looks at the fields in Close from time to time.
async fn refresh(worker: Worker, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if let Err(obstacles) = worker.look_again().await {
            // The next message that meets it pauses consumption; this is no message's business.
            let obstacle = obstacles.first().map(ToString::to_string);
            tracing::warn!(obstacle, "the fields in Close cannot be looked at; the mapping stays as it is");
        }
    }
}

/// A session that stood this long was a good one, also without messages.
const STABLE: Duration = Duration::from_mins(1);

/// One session after the other, and what has to be remembered between them.
struct Supervisor {
    status: Status,
    metrics: Metrics,
    total: Report,
    reconnects: Pauses,
    probes: Pauses,
    /// The broker was lost, and this has been told.
    lost: bool,
}

impl Supervisor {
    fn new(status: Status, metrics: Metrics) -> Self {
        let (reconnects, probes) = (Pauses::reconnect(), Pauses::probe());
        Self { status, metrics, total: Report::default(), reconnects, probes, lost: false }
    }

    /// Works by one configuration after the other.
    async fn run(
        mut self,
        mut assembly: Assembly,
        mut reloads: Pin<&mut (impl Stream<Item = Assembly> + Send)>,
        shutdown: &CancellationToken,
    ) -> Result<Report, RunError> {
        loop {
            let turn = shutdown.child_token();
            let mut working = Box::pin(self.work(assembly, &turn));
            let next = tokio::select! {
                ended = &mut working => { ended?; None }
                next = reloads.next() => {
                    turn.cancel();
                    working.await?;
                    next
                }
            };
            match next {
                Some(next) => assembly = next,
                None => break,
            }
        }
        self.status.set(State::Stopping);
        Ok(self.total)
    }

    /// Works until `turn` is over.
    async fn work(&mut self, assembly: Assembly, turn: &CancellationToken) -> Result<(), RunError> {
        let Assembly { config, client, mapping } = assembly;
        self.metrics.watch(Some(client.clone()));
        let worker = Worker::new(config.worker, &config.rules, mapping, client, self.metrics.clone());
        let refresh = AbortOnDrop(tokio::spawn(refresh(worker.clone(), config.schema_refresh)));
        let mut session = Session {
            settings: Arc::new(config.amqp),
            worker,
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            concurrency: config.concurrency,
            grace: config.grace,
            on_trial: None,
        };
        let mut detours = Detours::default();
        while !turn.is_cancelled() {
            self.session(&mut session, &mut detours, turn).await?;
        }
        drop(refresh);
        Ok(())
    }

    /// One session, and what has to pass before the next.
    async fn session(
        &mut self,
        session: &mut Session,
        detours: &mut Detours<Key>,
        turn: &CancellationToken,
    ) -> Result<(), RunError> {
        let began = Instant::now();
        let (end, report) = session.run(detours, turn).await;
        self.total.settled += report.settled;
        self.total.handed_back += report.handed_back;
        if report.acquitted {
            self.probes.reset();
            session.on_trial = None;
        }
        if report.settled > 0 || began.elapsed() > STABLE {
            // It worked, or stood by, for a while: what comes now is a new incident.
            self.reconnects.reset();
            self.lost = false;
        }
        match end {
            End::Stopped => {}
            End::Paused(cause) => {
                let probe = async || session.worker.look_again().await;
                let again = session.on_trial.is_some();
                let last_failure = session.worker.last_failure();
                let pause = Pause { status: &self.status, metrics: &self.metrics, again, last_failure };
                if let Some((cause, ())) = pause.until(cause, &mut self.probes, probe, turn).await {
                    session.worker.put_close_on_trial();
                    session.on_trial = Some(cause);
                }
            }
            End::Lost(error @ BrokerError::Conflict { .. }) => {
                return Err(RunError::Configuration(error.to_string()));
            }
            End::Lost(error) => {
                self.status.set(State::Connecting);
                let wait = self.reconnects.next_pause().unwrap_or_default();
                // One line per incident, not per try.
                if self.lost {
                    tracing::debug!(%error, ?wait, "still no connection to RabbitMQ");
                } else {
                    tracing::warn!(%error, "reconnecting to RabbitMQ until it works");
                }
                self.lost = true;
                turn.run_until_cancelled(tokio::time::sleep(wait)).await;
            }
        }
        Ok(())
    }
}

/// A task that ends with whoever wanted it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn declare(settings: &amqp::Settings) -> Result<(), BrokerError> {
    let connection = settings.connect("close-sync declare").await?;
    topology::declare(&connection, settings).await?;
    amqp::close(&connection).await;
    Ok(())
}

/// A Close organization that is not known to be in order yet.
struct Destination {
    client: Client,
    rules: Rules,
    status: Status,
    metrics: Metrics,
}

impl Destination {
    /// The checks at start. A mistake in the configuration ends the program; what may pass is waited
    /// for. `None` when asked to stop meanwhile.
    async fn mapping(&self, shutdown: &CancellationToken) -> Result<Option<Mapping>, RunError> {
        // Close may make the checks wait; being asked to stop ends them.
        let check = async || preflight::run(&self.client, &self.rules).await;
        let cause = match shutdown.run_until_cancelled(check()).await {
            None => return Ok(None),
            Some(Ok(ready)) => {
                tracing::info!(organization = ready.organization, "Close accepts the API key");
                tell_flaws(&ready.mapping);
                return Ok(Some(ready.mapping));
            }
            Some(Err(obstacles)) => cause_or_refusal(&obstacles)?,
        };
        let probe = async || {
            let ready = check().await?;
            tell_flaws(&ready.mapping);
            Ok(ready.mapping)
        };
        let pause = Pause { status: &self.status, metrics: &self.metrics, again: false, last_failure: None };
        let found = pause.until(cause, &mut Pauses::probe(), probe, shutdown).await;
        Ok(found.map(|(_, mapping)| mapping))
    }
}

fn cause_or_refusal(obstacles: &[Obstacle]) -> Result<PauseCause, RunError> {
    let lines: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    tracing::error!(obstacle = lines.join("; "), "Close cannot be worked with");
    match obstacles.first().and_then(Obstacle::pause_cause) {
        None => Ok(PauseCause::Unreachable),
        Some(cause @ (PauseCause::Unreachable | PauseCause::Failing | PauseCause::PlanLimit)) => Ok(cause),
        Some(PauseCause::LookupField) => Err(RunError::Configuration(lines.join("\n"))),
        Some(PauseCause::Unauthorized | PauseCause::Forbidden) => Err(RunError::Configuration(format!(
            "{}: set `close.api_key` (CLOSE_API_KEY) to a key that is valid in Close",
            lines.join("\n")
        ))),
    }
}

/// A time without consumption.
struct Pause<'a> {
    status: &'a Status,
    metrics: &'a Metrics,
    /// The last one ended a moment ago, and nothing has succeeded since: the same incident.
    again: bool,
    /// What went wrong last.
    last_failure: Option<String>,
}

impl Pause<'_> {
    /// Probes Close until it can be worked with again. Tells the cause that was last, and what the probe
    /// found; `None` when `turn` was over meanwhile. The metric is left as it is where the probe alone does
    /// not prove that messages succeed.
    async fn until<T>(
        &self,
        mut cause: PauseCause,
        probes: &mut Pauses,
        probe: impl AsyncFn() -> Result<T, Vec<Obstacle>>,
        turn: &CancellationToken,
    ) -> Option<(PauseCause, T)> {
        if self.again {
            tracing::debug!(cause = cause.label(), "paused again");
        } else {
            self.metrics.pause_began(cause);
            self.metrics.no_drain();
            tracing::error!(
                cause = cause.label(),
                last_failure = self.last_failure,
                remedy = cause.remedy(),
                "paused: messages stay in the queue until Close can be worked with"
            );
        }
        // What only a message proves to be gone is not gone because a probe met something else meanwhile.
        let first = cause;
        let found = loop {
            self.status.set(State::Paused(cause));
            self.metrics.paused(Some(cause));
            let wait = probes.next_pause().unwrap_or_default();
            turn.run_until_cancelled(tokio::time::sleep(wait)).await?;
            match turn.run_until_cancelled(probe()).await? {
                Ok(found) => break found,
                Err(obstacles) => {
                    let obstacle = obstacles.first();
                    tracing::debug!(obstacle = obstacle.map(ToString::to_string), "still paused");
                    cause = obstacle.and_then(Obstacle::pause_cause).unwrap_or(cause);
                }
            }
        };
        Some((if first.ends_with_probe() { cause } else { first }, found))
    }
}
