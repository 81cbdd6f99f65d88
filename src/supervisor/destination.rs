//! One destination: checks Close at start, then runs session after session until it is stopped (`sessions`).

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::amqp::{self, BrokerError};
use crate::config::Destination;
use crate::consumer::SessionStats;
use crate::domain::mapping::Mapping;
use crate::http::registry::DestinationHandle;
use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::supervisor::RunError;
use crate::supervisor::pause::Pause;
use crate::supervisor::reload::{Candidate, Reloads, prepare};
use crate::supervisor::sessions::SessionLoop;
use crate::sync::preflight::PreflightError;
use crate::telemetry::status::State;

/// Syncs messages to one Close organization until `shutdown`. Settings from `reloads` replace those in force once they
/// pass the check; `in_force` shows which ones are in use.
pub(super) async fn run(
    in_force: watch::Sender<Destination>,
    reloads: mpsc::UnboundedReceiver<Destination>,
    handle: DestinationHandle,
    shutdown: &CancellationToken,
) -> Result<SessionStats, RunError> {
    let settings = in_force.borrow().clone();
    handle.runtime.set_settings(Arc::new(settings.amqp.clone()));
    let mut sessions = SessionLoop::new(handle.clone());
    // Before the check of Close, so that producers can publish whatever state Close is in.
    match shutdown.run_until_cancelled(declare(&settings.amqp)).await {
        Some(Err(error)) if error.is_lasting() => {
            handle.metrics.set_broker_trouble(Some(error.trouble()));
            return Err(RunError::Configuration(error.to_string()));
        }
        // The first session tries again, after the check of Close. It is the same incident.
        Some(Err(error)) => sessions.log_loss(&error),
        Some(Ok(())) | None => {}
    }
    let candidate = Candidate::new(settings, &handle.metrics)?;
    let mut reloads =
        Reloads { settings: reloads, checking: None, in_force, metrics: handle.metrics.clone() };
    let accepted = tokio::select! {
        mapping = check_close(&candidate, &handle, shutdown) => match mapping? {
            Some(mapping) => candidate.accepted(mapping),
            None => return Ok(SessionStats::default()),
        },
        // New settings may fix what the check at start waits for.
        accepted = reloads.next() => accepted,
    };
    handle.metrics.paused(None);
    Box::pin(sessions.run(accepted, reloads, shutdown)).await
}

async fn declare(settings: &amqp::Settings) -> Result<(), BrokerError> {
    match settings.topology {
        amqp::TopologyMode::Declare => prepare(settings).await,
        // The first session checks that they exist.
        amqp::TopologyMode::Check => Ok(()),
    }
}

/// Checks Close at start. Waits while Close is unavailable; a mistake in the configuration is an error. `None` on
/// shutdown.
async fn check_close(
    candidate: &Candidate,
    handle: &DestinationHandle,
    shutdown: &CancellationToken,
) -> Result<Option<Mapping>, RunError> {
    let DestinationHandle { status, metrics, .. } = handle;
    let detail = "checking Close, as soon as its rate limits allow";
    status.set(State::Connecting(None), Some(detail.to_owned()));
    // Close's rate limits may delay the check; a shutdown ends it.
    let (cause, last_failure) = match shutdown.run_until_cancelled(candidate.check()).await {
        None => return Ok(None),
        Some(Ok(ready)) => {
            tracing::info!(
                event = "close_accepted",
                organization = ready.organization,
                "Close accepts the API key"
            );
            status.set(State::Connecting(None), Some("connecting to RabbitMQ".to_owned()));
            return Ok(Some(ready.mapping));
        }
        Some(Err(errors)) => {
            let cause = pause_or_fail(&errors, &candidate.settings.api_key_setting())?;
            (cause, errors.first().map(ToString::to_string))
        }
    };
    let probe = || async { candidate.check().await.map(|ready| ready.mapping) };
    let pause = Pause { status, metrics, again: false, last_failure };
    let recovered = pause.until(cause, &mut Backoff::probe(), probe, shutdown).await;
    Ok(recovered.map(|(_, mapping)| mapping))
}

/// The pause that failed checks call for, or the error if only a change of the configuration helps.
fn pause_or_fail(errors: &[PreflightError], api_key: &str) -> Result<PauseCause, RunError> {
    let lines: Vec<_> = errors.iter().map(|error| error.with_remedy(api_key)).collect();
    tracing::error!(event = "preflight_failed", obstacle = lines.join("; "), "Close preflight check failed");
    match errors.first().and_then(PreflightError::pause_cause) {
        None => Ok(PauseCause::Unreachable),
        Some(cause @ (PauseCause::Unreachable | PauseCause::Failing | PauseCause::PlanLimit)) => Ok(cause),
        Some(PauseCause::LookupField | PauseCause::Unauthorized | PauseCause::Forbidden) => {
            Err(RunError::Configuration(lines.join("\n")))
        }
    }
}
