//! Runs one session after another, with reloaded settings in between.
//!
//! A lost broker is reconnected to with growing, jittered pauses and without end. While Close is unavailable there is no
//! session at all: the destination probes Close, and messages wait in the queue untouched (`design.md` P5). The first
//! session after such a pause starts with reduced concurrency (half-open), until a message succeeds.
//!
//! New settings replace the old ones if they differ and pass the check (`reload`). Messages in progress finish with the
//! old settings first.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::amqp::BrokerError;
use crate::consumer::quarantine::Quarantine;
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::{End, Session, SessionStats};
use crate::http::registry::DestinationHandle;
use crate::outcome::PauseCause;
use crate::retry::Backoff;
use crate::supervisor::RunError;
use crate::supervisor::pause::Pause;
use crate::supervisor::reload::{Accepted, Reloads};
use crate::sync::{Dependencies, Worker};
use crate::telemetry::status::State;

/// A session that lasted this long counts as stable, also without messages.
const STABLE: Duration = Duration::from_mins(1);

/// What outlives a session and its settings.
pub(super) struct SessionLoop {
    handle: DestinationHandle,
    quarantine: Quarantine,
    total: SessionStats,
    reconnects: Backoff,
    probes: Backoff,
    /// The loss of the broker has been logged.
    lost: bool,
}

impl SessionLoop {
    pub(super) fn new(handle: DestinationHandle) -> Self {
        let (reconnects, probes) = (Backoff::reconnect(), Backoff::probe());
        Self {
            handle,
            quarantine: Quarantine::default(),
            total: SessionStats::default(),
            reconnects,
            probes,
            lost: false,
        }
    }

    /// Runs sessions until `shutdown`, each time with the settings that were accepted last.
    pub(super) async fn run(
        mut self,
        mut accepted: Accepted,
        mut reloads: Reloads,
        shutdown: &CancellationToken,
    ) -> Result<SessionStats, RunError> {
        while !shutdown.is_cancelled() {
            // Only now: the settings before were in use until here.
            reloads.in_force.send_replace(accepted.settings.clone());
            let stop = shutdown.child_token();
            let mut sessions = Box::pin(self.run_with(accepted, &stop));
            accepted = tokio::select! {
                ended = &mut sessions => { ended?; break }
                next = reloads.next() => {
                    stop.cancel();
                    sessions.await?;
                    next
                }
            };
        }
        self.handle.status.set(State::Stopping, None);
        Ok(self.total)
    }

    /// Runs sessions with the same settings until `stop`.
    async fn run_with(&mut self, accepted: Accepted, stop: &CancellationToken) -> Result<(), RunError> {
        let (mut session, _refresh) = self.prepare(accepted);
        let mut delayed = DelayedMessages::default();
        while !stop.is_cancelled() {
            let began = Instant::now();
            let (end, stats) = session.run(&mut delayed, stop).await;
            self.record(stats, began.elapsed(), &mut session);
            match end {
                End::Stopped => {}
                End::Paused(cause) => self.pause(cause, &mut session, stop).await,
                End::Lost(error) => self.reconnect(&error, stop).await?,
            }
        }
        Ok(())
    }

    /// What sessions with these settings share. The mapping is refreshed while the second value exists.
    fn prepare(&self, Accepted { settings, client, mapping }: Accepted) -> (Session, AbortOnDrop) {
        let DestinationHandle { metrics, status, runtime } = &self.handle;
        metrics.set_close_client(Some(client.clone()));
        metrics.set_config_hash(&settings.hash);
        let worker = Worker::new(Dependencies {
            settings: settings.worker,
            rules: &settings.rules,
            mapping,
            client,
            metrics: metrics.clone(),
        });
        let amqp = Arc::new(settings.amqp);
        runtime.set_settings(Arc::clone(&amqp));
        runtime.set_worker(worker.clone());
        let refresh = refresh(worker.clone(), settings.schema_refresh);
        let refresh = AbortOnDrop(tokio::spawn(refresh.in_current_span()));
        let session = Session {
            destination: settings.name.map(Into::into),
            settings: amqp,
            worker,
            metrics: metrics.clone(),
            status: status.clone(),
            concurrency: settings.concurrency,
            grace: settings.grace,
            quarantine: self.quarantine.clone(),
            paused_before: None,
        };
        (session, refresh)
    }

    fn record(&mut self, stats: SessionStats, lasted: Duration, session: &mut Session) {
        self.total += stats;
        if stats.breaker_closed {
            self.probes.reset();
            session.paused_before = None;
            // The session logged that it was connected.
            self.lost = false;
        }
        if stats.settled > 0 || lasted > STABLE {
            // The session worked, or was on standby, for a while.
            self.reconnects.reset();
        }
    }

    /// Probes Close until it recovers.
    async fn pause(&mut self, cause: PauseCause, session: &mut Session, stop: &CancellationToken) {
        let probe = || session.worker.refresh_mapping();
        let pause = Pause {
            status: &self.handle.status,
            metrics: &self.handle.metrics,
            again: session.paused_before.is_some(),
            last_failure: session.worker.last_failure(),
        };
        if let Some((cause, ())) = pause.until(cause, &mut self.probes, probe, stop).await {
            session.worker.half_open_breaker();
            session.paused_before = Some(cause);
        }
    }

    /// Waits until the next connection may be tried. An error that waiting cannot fix ends the destination.
    async fn reconnect(&mut self, error: &BrokerError, stop: &CancellationToken) -> Result<(), RunError> {
        let DestinationHandle { metrics, status, .. } = &self.handle;
        metrics.set_broker_trouble(Some(error.trouble()));
        if error.is_lasting() {
            return Err(RunError::Configuration(error.to_string()));
        }
        status.set(State::Connecting(Some(error.trouble())), Some(error.to_string()));
        let wait = self.reconnects.next_delay().unwrap_or_default();
        self.log_loss(error);
        stop.run_until_cancelled(tokio::time::sleep(wait)).await;
        Ok(())
    }

    /// Logs one warning per incident, not per attempt.
    pub(super) fn log_loss(&mut self, error: &BrokerError) {
        if self.lost {
            tracing::debug!(event = "broker_unavailable", %error, "still no connection to RabbitMQ");
        } else {
            tracing::warn!(event = "broker_lost", %error, "no connection to RabbitMQ, reconnecting");
        }
        self.lost = true;
    }
}

/// Refreshes the mapping at regular intervals.
async fn refresh(worker: Worker, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if let Err(errors) = worker.refresh_mapping().await {
            // No pause here: if the problem affects messages, the next one pauses consumption.
            let obstacle = errors.first().map(ToString::to_string);
            tracing::warn!(obstacle, "cannot read the fields in Close; keeping the current mapping");
        }
    }
}

/// Aborts the task when dropped.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
