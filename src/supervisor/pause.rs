//! The time between two sessions while Close is unavailable.

use tokio_util::sync::CancellationToken;

use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::sync::preflight::PreflightError;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::{State, Status};

/// A pause of consumption.
pub(super) struct Pause<'a> {
    pub(super) status: &'a Status,
    pub(super) metrics: &'a Metrics,
    /// The previous pause just ended and no message has succeeded since: the same incident.
    pub(super) again: bool,
    /// The last error before the pause.
    pub(super) last_failure: Option<String>,
}

impl Pause<'_> {
    /// Probes Close until it recovers. Returns the last cause and the result of the probe, or `None` if `stop` was
    /// cancelled. The metric stays as it is, because a probe alone does not prove that messages succeed.
    pub(super) async fn until<T, F: Future<Output = Result<T, Vec<PreflightError>>>>(
        &self,
        mut cause: PauseCause,
        probes: &mut Backoff,
        probe: impl Fn() -> F,
        stop: &CancellationToken,
    ) -> Option<(PauseCause, T)> {
        if self.again {
            tracing::debug!(
                event = "pause_extended",
                cause = cause.label(),
                "circuit breaker opened again while half-open, pausing"
            );
        } else {
            self.metrics.pause_began(cause);
            tracing::error!(
                event = "pause_began",
                cause = cause.label(),
                last_failure = self.last_failure,
                remedy = cause.remedy(),
                "paused: messages stay in the queue until Close recovers"
            );
        }
        // Some causes end only when a message succeeds. Such a cause stays although a probe found another one.
        let first = cause;
        let result = loop {
            self.status.set(State::Paused(cause), self.last_failure.clone());
            self.metrics.paused(Some(cause));
            let wait = probes.next_delay().unwrap_or_default();
            stop.run_until_cancelled(tokio::time::sleep(wait)).await?;
            match stop.run_until_cancelled(probe()).await? {
                Ok(result) => break result,
                Err(errors) => {
                    let obstacle = errors.first();
                    tracing::debug!(
                        obstacle = obstacle.map(ToString::to_string),
                        "Close still fails, staying paused"
                    );
                    cause = obstacle.and_then(PreflightError::pause_cause).unwrap_or(cause);
                }
            }
        };
        Some((if first.ends_with_probe() { cause } else { first }, result))
    }
}
