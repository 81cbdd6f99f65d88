//! Wiring, supervision and shutdown order.
//!
//! [`run`] takes settings and a reason to stop, so that a test stops it the way an operator does. It
//! runs one session after the other: a lost broker is reconnected to with growing, jittered pauses
//! and without end; while Close cannot be worked with there is no session at all, and Close is probed
//! instead, so that messages wait in the queue without being touched (`design.md` P5).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::amqp::session::{End, Report, Session};
use crate::amqp::{self, BrokerError, topology};
use crate::close::Client;
use crate::config::Config;
use crate::domain::mapping::{Mapping, Rules};
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

/// Runs the worker until `shutdown`, and tells what it did.
///
/// # Errors
/// When it cannot start: what is wrong with Close's lookup fields or key, with the broker's objects,
/// or with the HTTP address.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<Report, RunError> {
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

    let client = {
        let metrics = metrics.clone();
        Client::new(config.close, move |call| metrics.called(call))
            .context("TLS cannot be set up: are CA certificates installed (Debian: ca-certificates)?")?
    };
    let destination = Destination { client, rules: config.rules, status, metrics };
    let settings = Arc::new(config.amqp);
    let result = async {
        // Before anything about Close: producers may publish from now on, whatever state Close is in.
        match shutdown.run_until_cancelled(declare(&settings)).await {
            Some(Err(error @ BrokerError::Conflict { .. })) => {
                return Err(RunError::Configuration(error.to_string()));
            }
            Some(Err(error)) => tracing::warn!(%error, "nothing is declared in RabbitMQ yet"),
            Some(Ok(())) | None => {}
        }
        let Some(mapping) = destination.mapping(&shutdown).await? else { return Ok(Report::default()) };
        let Destination { client, rules, status, metrics } = destination;
        let worker = Worker::new(config.worker, &rules, mapping, client, metrics.clone());
        let refresh = tokio::spawn(refresh(worker.clone(), config.schema_refresh));
        let session = Session {
            settings,
            worker,
            metrics,
            status,
            concurrency: config.concurrency,
            grace: config.grace,
        };
        let result = supervise(&session, &shutdown).await;
        refresh.abort();
        result
    };
    let result = result.await;

    stop_http.cancel();
    // A scraper that keeps its connection open must not hold up the exit.
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    result
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

async fn supervise(session: &Session, shutdown: &CancellationToken) -> Result<Report, RunError> {
    let mut total = Report::default();
    let mut reconnects = Pauses::reconnect();
    let mut probes = Pauses::probe();
    let mut lost = false;
    while !shutdown.is_cancelled() {
        let began = Instant::now();
        let (end, report) = session.run(shutdown).await;
        total.settled += report.settled;
        total.handed_back += report.handed_back;
        if report.settled > 0 {
            probes.reset();
        }
        if report.settled > 0 || began.elapsed() > STABLE {
            // It worked, or stood by, for a while: what comes now is a new incident.
            reconnects.reset();
            lost = false;
        }
        match end {
            End::Stopped => break,
            End::Paused(cause) => {
                let probe = async || session.worker.look_again().await;
                pause(&session.status, &session.metrics, cause, &mut probes, probe, shutdown).await;
            }
            End::Lost(error @ BrokerError::Conflict { .. }) => {
                return Err(RunError::Configuration(error.to_string()));
            }
            End::Lost(error) => {
                session.status.set(State::Connecting);
                let wait = reconnects.next_pause().unwrap_or_default();
                // One line per incident, not per try.
                if lost {
                    tracing::debug!(%error, ?wait, "still no connection to RabbitMQ");
                } else {
                    tracing::warn!(%error, "reconnecting to RabbitMQ until it works");
                }
                lost = true;
                shutdown.run_until_cancelled(tokio::time::sleep(wait)).await;
            }
        }
    }
    session.status.set(State::Stopping);
    Ok(total)
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
        Ok(pause(&self.status, &self.metrics, cause, &mut Pauses::probe(), probe, shutdown).await)
    }
}

fn cause_or_refusal(obstacles: &[Obstacle]) -> Result<PauseCause, RunError> {
    let lines: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    tracing::error!(obstacle = lines.join("; "), "Close cannot be worked with");
    match obstacles.first().and_then(Obstacle::pause_cause) {
        None => Ok(PauseCause::Unreachable),
        Some(cause @ (PauseCause::Unreachable | PauseCause::PlanLimit)) => Ok(cause),
        Some(PauseCause::LookupField) => Err(RunError::Configuration(lines.join("\n"))),
        Some(PauseCause::Unauthorized | PauseCause::Forbidden) => Err(RunError::Configuration(format!(
            "{}: set `close.api_key` (CLOSE_API_KEY) to a key that is valid in Close",
            lines.join("\n")
        ))),
    }
}

/// Probes Close until it can be worked with again; `None` when asked to stop meanwhile.
async fn pause<T>(
    status: &Status,
    metrics: &Metrics,
    mut cause: PauseCause,
    probes: &mut Pauses,
    probe: impl AsyncFn() -> Result<T, Vec<Obstacle>>,
    shutdown: &CancellationToken,
) -> Option<T> {
    tracing::error!(
        cause = cause.label(),
        "paused: messages stay in the queue until Close can be worked with"
    );
    let found = loop {
        status.set(State::Paused(cause));
        metrics.paused(Some(cause));
        let wait = probes.next_pause().unwrap_or_default();
        shutdown.run_until_cancelled(tokio::time::sleep(wait)).await?;
        match shutdown.run_until_cancelled(probe()).await? {
            Ok(found) => break found,
            Err(obstacles) => {
                let obstacle = obstacles.first();
                tracing::debug!(obstacle = obstacle.map(ToString::to_string), "still paused");
                cause = obstacle.and_then(Obstacle::pause_cause).unwrap_or(cause);
            }
        }
    };
    metrics.paused(None);
    status.set(State::Connecting);
    tracing::info!("Close can be worked with again: going on");
    Some(found)
}
