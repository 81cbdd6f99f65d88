//! One destination: session after session, until it is stopped.
//!
//! A lost broker is reconnected to with growing, jittered pauses and without end. While Close is unavailable there is no
//! session at all: the destination probes Close, and messages wait in the queue untouched (`design.md` P5). The first
//! session after such a pause starts with reduced concurrency (half-open), until a message succeeds.
//!
//! New settings replace the old ones if they differ and pass the check (`reload`). Messages in progress finish with the
//! old settings first.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::amqp::{self, BrokerError};
use crate::config::Destination;
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::{End, Session, SessionStats};
use crate::domain::mapping::{Key, Mapping};
use crate::http::registry::{DestinationHandle, DestinationRuntime};
use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::supervisor::RunError;
use crate::supervisor::pause::Pause;
use crate::supervisor::reload::{Accepted, Candidate, Reloads, prepare};
use crate::sync::preflight::PreflightError;
use crate::sync::{Dependencies, Worker};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::{State, Status};

/// Syncs messages to one Close organization until `shutdown`. Settings from `reloads` replace those in force once they
/// pass the check; `in_force` shows which ones are in use.
pub(super) async fn run(
    in_force: watch::Sender<Destination>,
    reloads: mpsc::UnboundedReceiver<Destination>,
    seat: DestinationHandle,
    shutdown: &CancellationToken,
) -> Result<SessionStats, RunError> {
    let DestinationHandle { metrics, status, runtime: access } = seat;
    let settings = in_force.borrow().clone();
    access.set_settings(Arc::new(settings.amqp.clone()));
    let mut sessions = SessionLoop::new(status.clone(), metrics.clone(), access);
    // Before the check of Close, so that producers can publish whatever state Close is in.
    let declared = async {
        match settings.amqp.topology {
            amqp::TopologyMode::Declare => prepare(&settings.amqp).await,
            // The first session checks that they exist.
            amqp::TopologyMode::Check => Ok(()),
        }
    };
    match shutdown.run_until_cancelled(declared).await {
        Some(Err(error)) if error.is_lasting() => {
            metrics.set_broker_trouble(Some(error.trouble()));
            return Err(RunError::Configuration(error.to_string()));
        }
        // The first session tries again, after the check of Close. It is the same incident.
        Some(Err(error)) => sessions.log_loss(&error),
        Some(Ok(())) | None => {}
    }
    let candidate = Candidate::new(settings, &metrics)?;
    let mut reloads = Reloads { settings: reloads, checking: None, in_force, metrics: metrics.clone() };
    let accepted = tokio::select! {
        mapping = mapping(&candidate, &status, &metrics, shutdown) => match mapping? {
            Some(mapping) => candidate.accepted(mapping),
            None => return Ok(SessionStats::default()),
        },
        // New settings may fix what the check at start waits for.
        accepted = reloads.next() => accepted,
    };
    metrics.paused(None);
    sessions.run(accepted, reloads, shutdown).await
}

/// Checks Close at start. Waits while Close is unavailable; a mistake in the configuration is an error. `None` on
/// shutdown.
async fn mapping(
    candidate: &Candidate,
    status: &Status,
    metrics: &Metrics,
    shutdown: &CancellationToken,
) -> Result<Option<Mapping>, RunError> {
    let detail = "checking Close, as soon as its rate limits allow";
    status.set(State::Connecting(None), Some(detail.to_owned()));
    // Close's rate limits may delay the check; a shutdown ends it.
    let cause = match shutdown.run_until_cancelled(candidate.check()).await {
        None => return Ok(None),
        Some(Ok(ready)) => {
            tracing::info!(organization = ready.organization, "Close accepts the API key");
            return Ok(Some(ready.mapping));
        }
        Some(Err(obstacles)) => cause_or_refusal(&obstacles, &candidate.settings.api_key_setting())?,
    };
    let probe = || async { candidate.check().await.map(|ready| ready.mapping) };
    let pause = Pause { status, metrics, again: false, last_failure: None };
    let found = pause.until(cause, &mut Backoff::probe(), probe, shutdown).await;
    Ok(found.map(|(_, mapping)| mapping))
}

fn cause_or_refusal(obstacles: &[PreflightError], api_key: &str) -> Result<PauseCause, RunError> {
    let lines: Vec<_> = obstacles.iter().map(|obstacle| obstacle.with_remedy(api_key)).collect();
    tracing::error!(obstacle = lines.join("; "), "Close preflight check failed");
    match obstacles.first().and_then(PreflightError::pause_cause) {
        None => Ok(PauseCause::Unreachable),
        Some(cause @ (PauseCause::Unreachable | PauseCause::Failing | PauseCause::PlanLimit)) => Ok(cause),
        Some(PauseCause::LookupField | PauseCause::Unauthorized | PauseCause::Forbidden) => {
            Err(RunError::Configuration(lines.join("\n")))
        }
    }
}

/// A session that lasted this long counts as stable, also without messages.
const STABLE: Duration = Duration::from_mins(1);

/// Runs sessions one after another, and keeps what must outlive them.
struct SessionLoop {
    status: Status,
    metrics: Metrics,
    access: DestinationRuntime,
    total: SessionStats,
    reconnects: Backoff,
    probes: Backoff,
    /// The loss of the broker has been logged.
    lost: bool,
}

impl SessionLoop {
    fn new(status: Status, metrics: Metrics, access: DestinationRuntime) -> Self {
        let (reconnects, probes) = (Backoff::reconnect(), Backoff::probe());
        Self { status, metrics, access, total: SessionStats::default(), reconnects, probes, lost: false }
    }

    /// Runs with one configuration after another.
    async fn run(
        mut self,
        mut accepted: Accepted,
        mut reloads: Reloads,
        shutdown: &CancellationToken,
    ) -> Result<SessionStats, RunError> {
        loop {
            // Only now: the settings before were in use until here.
            reloads.in_force.send_replace(accepted.settings.clone());
            let turn = shutdown.child_token();
            let mut working = Box::pin(self.work(accepted, &turn));
            let next = tokio::select! {
                ended = &mut working => { ended?; None }
                next = reloads.next() => {
                    turn.cancel();
                    working.await?;
                    Some(next)
                }
            };
            match next {
                Some(next) => accepted = next,
                None => break,
            }
        }
        self.status.set(State::Stopping, None);
        Ok(self.total)
    }

    /// Runs sessions with the same settings until `turn` is cancelled.
    async fn work(&mut self, accepted: Accepted, turn: &CancellationToken) -> Result<(), RunError> {
        let Accepted { settings, client, mapping } = accepted;
        self.metrics.set_close_client(Some(client.clone()));
        self.metrics.set_config_hash(&settings.hash);
        let worker = Worker::new(Dependencies {
            settings: settings.worker,
            rules: &settings.rules,
            mapping,
            client,
            metrics: self.metrics.clone(),
        });
        let amqp = Arc::new(settings.amqp);
        self.access.set_settings(Arc::clone(&amqp));
        self.access.set_worker(worker.clone());
        let refresh = refresh(worker.clone(), settings.schema_refresh);
        let refresh = AbortOnDrop(tokio::spawn(refresh.in_current_span()));
        let mut session = Session {
            destination: settings.name.map(Into::into),
            settings: amqp,
            worker,
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            concurrency: settings.concurrency,
            grace: settings.grace,
            paused_before: None,
        };
        let mut detours = DelayedMessages::default();
        while !turn.is_cancelled() {
            self.session(&mut session, &mut detours, turn).await?;
        }
        drop(refresh);
        Ok(())
    }

    /// Logs one warning per incident, not per attempt.
    fn log_loss(&mut self, error: &BrokerError) {
        if self.lost {
            tracing::debug!(%error, "still no connection to RabbitMQ");
        } else {
            tracing::warn!(%error, "reconnecting to RabbitMQ until it works");
        }
        self.lost = true;
    }

    /// Runs one session, then waits until the next one may start.
    async fn session(
        &mut self,
        session: &mut Session,
        detours: &mut DelayedMessages<Key>,
        turn: &CancellationToken,
    ) -> Result<(), RunError> {
        let began = Instant::now();
        let (end, report) = session.run(detours, turn).await;
        self.total += report;
        if report.breaker_closed {
            self.probes.reset();
            session.paused_before = None;
            // The session logged that it was connected.
            self.lost = false;
        }
        if report.settled > 0 || began.elapsed() > STABLE {
            // The session worked, or was on standby, for a while.
            self.reconnects.reset();
        }
        match end {
            End::Stopped => {}
            End::Paused(cause) => {
                let probe = || session.worker.refresh_mapping();
                let again = session.paused_before.is_some();
                let last_failure = session.worker.last_failure();
                let pause = Pause { status: &self.status, metrics: &self.metrics, again, last_failure };
                if let Some((cause, ())) = pause.until(cause, &mut self.probes, probe, turn).await {
                    session.worker.half_open_breaker();
                    session.paused_before = Some(cause);
                }
            }
            End::Lost(error) if error.is_lasting() => {
                self.metrics.set_broker_trouble(Some(error.trouble()));
                return Err(RunError::Configuration(error.to_string()));
            }
            End::Lost(error) => {
                self.status.set(State::Connecting(Some(error.trouble())), Some(error.to_string()));
                self.metrics.set_broker_trouble(Some(error.trouble()));
                let wait = self.reconnects.next_delay().unwrap_or_default();
                self.log_loss(&error);
                turn.run_until_cancelled(tokio::time::sleep(wait)).await;
            }
        }
        Ok(())
    }
}

/// Reads the fields in Close at regular intervals.
async fn refresh(worker: Worker, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if let Err(obstacles) = worker.refresh_mapping().await {
            // No pause here: if the problem affects messages, the next one pauses consumption.
            let obstacle = obstacles.first().map(ToString::to_string);
            tracing::warn!(obstacle, "cannot read the fields in Close; keeping the current mapping");
        }
    }
}

/// Aborts the task when dropped.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
