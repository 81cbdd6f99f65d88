//! Watches the queues of a session: measures their depths, and declares again what was deleted.
//!
//! Without the exchange or a binding no message arrives, and no error would show it. If the worker may not declare what
//! is missing, it reports that and continues: a new session would wait for all objects, and so would messages that need
//! none of them. A message for a queue that is gone is held. Without the work queue the session ends by itself.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use lapin::Connection;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::amqp::{BrokerError, Settings, topology};
use crate::close::Endpoint;
use crate::telemetry::backlog_eta::BacklogEta;
use crate::telemetry::metrics::Metrics;

/// How often the queues are measured.
const MEASURE_EVERY: Duration = Duration::from_secs(5);
/// How often everything is declared again, which changes nothing where nothing is missing, or only checked.
const DECLARE_EVERY: Duration = Duration::from_secs(15);

/// Yields what is missing each time that changes; `None` when nothing is.
pub(crate) fn watch(
    connection: Arc<Connection>,
    settings: Arc<Settings>,
    metrics: Metrics,
) -> impl Stream<Item = Option<BrokerError>> + Send {
    stream::unfold(Monitor::new(connection, settings, metrics), |mut monitor| async {
        Some((monitor.next_change().await, monitor))
    })
}

struct Monitor {
    connection: Arc<Connection>,
    settings: Arc<Settings>,
    metrics: Metrics,
    tick: Interval,
    /// When everything was declared last.
    declared: Instant,
    missing: Vec<String>,
    eta: BacklogEta,
    last: Sample,
}

/// What a measurement starts from.
struct Sample {
    at: Instant,
    settled: u64,
    calls: Vec<(Endpoint, u64)>,
    /// Messages waited for this worker.
    backlogged: bool,
}

impl Monitor {
    fn new(connection: Arc<Connection>, settings: Arc<Settings>, metrics: Metrics) -> Self {
        let mut tick = tokio::time::interval(MEASURE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let last = Sample::take(&metrics, false);
        let (declared, missing, eta) = (Instant::now(), Vec::new(), BacklogEta::default());
        Self { connection, settings, metrics, tick, declared, missing, eta, last }
    }

    async fn next_change(&mut self) -> Option<BrokerError> {
        loop {
            self.tick.tick().await;
            if self.declared.elapsed() > DECLARE_EVERY && self.declare().await {
                return (!self.missing.is_empty()).then(|| BrokerError::Incomplete(self.missing.clone()));
            }
            self.measure().await;
        }
    }

    /// Declares or checks everything. Returns whether something else is missing than before.
    async fn declare(&mut self) -> bool {
        self.declared = Instant::now();
        let missing = match topology::prepare(&self.connection, &self.settings).await {
            Ok(()) => Vec::new(),
            Err(BrokerError::Incomplete(missing)) => missing,
            // Every other failure is met again by the next session, and reported then.
            Err(_) => return false,
        };
        let changed = missing != self.missing;
        self.missing = missing;
        changed
    }

    async fn measure(&mut self) {
        let topology::Depths { work, dead, delayed } =
            topology::depths(&self.connection, &self.settings).await;
        self.metrics.set_queue_depths(dead, delayed);
        let Some(ready) = work else { return };
        let unsettled = self.metrics.unsettled();
        // The backlog of a standby belongs to the active worker.
        let sample = Sample::take(&self.metrics, ready > 0 && unsettled > 0);
        let calls = self.last.calls.iter().zip(&sample.calls);
        let calls = calls.map(|((endpoint, before), (_, now))| (*endpoint, now - before));
        let settled = sample.settled - self.last.settled;
        let backlogged = self.last.backlogged && sample.backlogged;
        self.eta.record(self.last.at.elapsed(), settled, calls, backlogged);
        let backlog = ready.saturating_add(unsettled);
        self.metrics.set_backlog(backlog, self.eta.estimate(backlog, self.metrics.rate_limits()));
        self.last = sample;
    }
}

impl Sample {
    fn take(metrics: &Metrics, backlogged: bool) -> Self {
        let (settled, calls) = metrics.totals();
        Self { at: Instant::now(), settled, calls, backlogged }
    }
}
