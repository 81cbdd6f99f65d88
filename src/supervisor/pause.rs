//! The time between two sessions in which Close cannot be worked with.

use tokio_util::sync::CancellationToken;

use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::sync::preflight::PreflightError;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::{State, Status};

/// A time without consumption.
pub(super) struct Pause<'a> {
    pub(super) status: &'a Status,
    pub(super) metrics: &'a Metrics,
    /// The last one ended a moment ago, and nothing has succeeded since: the same incident.
    pub(super) again: bool,
    /// What went wrong last.
    pub(super) last_failure: Option<String>,
}

impl Pause<'_> {
    /// Probes Close until it can be worked with again. Tells the cause that was last, and what the probe
    /// found; `None` when `turn` was over meanwhile. The metric is left as it is where the probe alone does
    /// not prove that messages succeed.
    pub(super) async fn until<T, F: Future<Output = Result<T, Vec<PreflightError>>>>(
        &self,
        mut cause: PauseCause,
        probes: &mut Backoff,
        probe: impl Fn() -> F,
        turn: &CancellationToken,
    ) -> Option<(PauseCause, T)> {
        if self.again {
            tracing::debug!(cause = cause.label(), "paused again");
        } else {
            self.metrics.pause_began(cause);
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
            self.status.set(State::Paused(cause), self.last_failure.clone());
            self.metrics.paused(Some(cause));
            let wait = probes.next_delay().unwrap_or_default();
            turn.run_until_cancelled(tokio::time::sleep(wait)).await?;
            match turn.run_until_cancelled(probe()).await? {
                Ok(found) => break found,
                Err(obstacles) => {
                    let obstacle = obstacles.first();
                    tracing::debug!(obstacle = obstacle.map(ToString::to_string), "still paused");
                    cause = obstacle.and_then(PreflightError::pause_cause).unwrap_or(cause);
                }
            }
        };
        Some((if first.ends_with_probe() { cause } else { first }, found))
    }
}
