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
use crate::http;
use crate::metrics::Metrics;
use crate::outcome::PauseCause;
use crate::preflight::{self, Obstacle};
use crate::retry::Pauses;
use crate::state::{State, Status};
use crate::worker::Worker;

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
    let session = Session {
        settings: Arc::new(config.amqp),
        worker: Worker::new(config.worker, client, metrics.clone()),
        metrics,
        status,
        concurrency: config.concurrency,
        grace: config.grace,
    };
    let result = supervise(&session, &shutdown).await;

    stop_http.cancel();
    // A scraper that keeps its connection open must not hold up the exit.
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    result
}

/// A session that stood this long was a good one, also without messages.
const STABLE: Duration = Duration::from_mins(1);

async fn supervise(session: &Session, shutdown: &CancellationToken) -> Result<Report, RunError> {
    let mut total = Report::default();
    let mut reconnects = Pauses::reconnect();
    let mut probes = Pauses::probe();
    let mut lost = false;
    // Before anything about Close: producers may publish from now on, whatever state Close is in.
    match shutdown.run_until_cancelled(declare(session)).await {
        Some(Err(error @ BrokerError::Conflict { .. })) => {
            return Err(RunError::Configuration(error.to_string()));
        }
        Some(Err(error)) => tracing::warn!(%error, "nothing is declared in RabbitMQ yet"),
        Some(Ok(())) | None => {}
    }
    // Close may make the checks wait; being asked to stop ends them.
    let checked = shutdown.run_until_cancelled(refuse_or_pause(session)).await;
    if let Some(cause) = checked.unwrap_or(Ok(None))? {
        pause(session, cause, &mut probes, shutdown).await;
    }
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
            End::Paused(cause) => pause(session, cause, &mut probes, shutdown).await,
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

async fn declare(session: &Session) -> Result<(), BrokerError> {
    let connection = session.settings.connect("close-sync declare").await?;
    topology::declare(&connection, &session.settings).await?;
    amqp::close(&connection).await;
    Ok(())
}

/// The checks at start. A mistake in the configuration ends the program; what may pass does not.
async fn refuse_or_pause(session: &Session) -> Result<Option<PauseCause>, RunError> {
    let keys = &session.worker.settings().mapping.keys;
    match preflight::all(session.worker.client(), keys).await {
        Ok(ready) => {
            tracing::info!(organization = ready.user.organization, "Close accepts the API key");
            Ok(None)
        }
        Err(obstacles) => {
            let lines: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
            tracing::error!(obstacle = lines.join("; "), "Close cannot be worked with");
            match obstacles.first().and_then(Obstacle::pause_cause) {
                None => Ok(Some(PauseCause::Unreachable)),
                Some(cause @ (PauseCause::Unreachable | PauseCause::PlanLimit)) => Ok(Some(cause)),
                Some(PauseCause::LookupField) => Err(RunError::Configuration(lines.join("\n"))),
                Some(PauseCause::Unauthorized | PauseCause::Forbidden) => {
                    Err(RunError::Configuration(format!(
                        "{}: set `close.api_key` (CLOSE_API_KEY) to a key that is valid in Close",
                        lines.join("\n")
                    )))
                }
            }
        }
    }
}

/// Probes Close until it can be worked with again.
async fn pause(session: &Session, mut cause: PauseCause, probes: &mut Pauses, shutdown: &CancellationToken) {
    let keys = &session.worker.settings().mapping.keys;
    tracing::error!(
        cause = cause.label(),
        "paused: messages stay in the queue until Close can be worked with"
    );
    loop {
        session.status.set(State::Paused(cause));
        session.metrics.paused(Some(cause));
        let wait = probes.next_pause().unwrap_or_default();
        if shutdown.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
            return;
        }
        let probe = shutdown.run_until_cancelled(preflight::run(session.worker.client(), keys)).await;
        match probe {
            None => return,
            Some(Ok(_)) => break,
            Some(Err(obstacle)) => {
                tracing::debug!(%obstacle, "still paused");
                cause = obstacle.pause_cause().unwrap_or(cause);
            }
        }
    }
    session.metrics.paused(None);
    session.status.set(State::Connecting);
    tracing::info!("Close can be worked with again: going on");
}
