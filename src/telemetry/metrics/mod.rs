//! The metrics of one destination, and the methods that record them. `groups` lists every metric.
//!
//! Each destination has its own registry, so that several can live in one process. All label values come from
//! closed lists, and every combination exists from the start. Labels never carry message content.

mod groups;
mod page;
mod register;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder};
use strum::{IntoStaticStr, VariantArray, VariantNames as _};
use tokio::time::Instant;

use crate::amqp::{BrokerTrouble, JournalState};
use crate::close::{Call, Client, Endpoint, RateLimitStatus, StatusClass};
use crate::domain::decision::Decision;
use crate::domain::journal::ChangeKind;
use crate::domain::readback::DifferenceEffect;
use crate::outcome::{Outcome, PauseCause, Stage};
use crate::telemetry::throughput::Throughput;
use groups::{Broker, CloseCalls, Decisions, HANDED_BACK, Messages, Pauses, Process, Queues, RateLimits};
pub use page::{PageMetrics, Refusal};
use register::Registrar;

/// Renders the metrics of all destinations and of the operator's page for Prometheus, one family for each name.
pub fn render<'a>(all: impl IntoIterator<Item = &'a Metrics>, page: &PageMetrics) -> String {
    let mut families: BTreeMap<String, MetricFamily> = BTreeMap::new();
    for mut family in all.into_iter().flat_map(Metrics::gather).chain(page.gather()) {
        match families.get_mut(family.name()) {
            None => drop(families.insert(family.name().to_owned(), family)),
            Some(merged) => {
                let metrics = merged.take_metric().into_iter().chain(family.take_metric()).collect();
                merged.set_metric(metrics);
            }
        }
    }
    TextEncoder::new().encode_to_string(&families.into_values().collect::<Vec<_>>()).unwrap_or_default()
}

/// The metrics of one destination. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    messages: Messages,
    decisions: Decisions,
    pauses: Pauses,
    broker: Broker,
    queues: Queues,
    rate_limits: RateLimits,
    calls: CloseCalls,
    process: Process,
    state: Arc<Mutex<State>>,
}

/// How a message left the quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum QuarantineStep {
    /// Its successor was published without the producer's headers.
    Bare,
    /// RabbitMQ dead-lettered it.
    Rejected,
}

impl QuarantineStep {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What the metrics themselves do not hold.
struct State {
    /// The client whose rate limits are shown.
    close: Option<Client>,
    /// The version of the broker of the last connection.
    broker_version: Option<String>,
    throughput: Throughput,
}

impl Metrics {
    /// Registers all metrics. A named destination appears as the label `destination`.
    ///
    /// # Errors
    /// When two metrics have the same name, which a test excludes.
    pub fn new(destination: Option<&str>) -> prometheus::Result<Self> {
        let labels = destination.map(|name| HashMap::from([("destination".to_owned(), name.to_owned())]));
        let registry = Registry::new_custom(Some("close_sync".into()), labels)?;
        let registrar = Registrar(&registry);
        let metrics = Self {
            messages: Messages::new(&registrar)?,
            decisions: Decisions::new(&registrar)?,
            pauses: Pauses::new(&registrar)?,
            broker: Broker::new(&registrar)?,
            queues: Queues::new(&registrar)?,
            rate_limits: RateLimits::new(&registrar)?,
            calls: CloseCalls::new(&registrar)?,
            process: Process::new(&registrar)?,
            registry: registry.clone(),
            state: Arc::new(Mutex::new(State {
                close: None,
                broker_version: None,
                throughput: Throughput::new(Instant::now()),
            })),
        };
        let build = [env!("CARGO_PKG_VERSION"), env!("CLOSE_SYNC_COMMIT")];
        metrics.process.build.with_label_values(&build).set(1);
        metrics.process.started.set(jiff::Timestamp::now().as_second());
        Ok(metrics)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the client whose rate limits are shown from now on.
    pub fn set_close_client(&self, client: Option<Client>) {
        self.state().close = client;
        self.rate_limits.reset();
    }

    /// The rate limits that Close has reported.
    pub fn rate_limits(&self) -> Vec<(Endpoint, RateLimitStatus)> {
        self.state().close.iter().flat_map(Client::rate_limits).collect()
    }

    /// The number of deliveries that are being processed or wait.
    pub fn unsettled(&self) -> u32 {
        u32::try_from(self.messages.in_flight.get() + self.messages.waiting.get()).unwrap_or(0)
    }

    /// The numbers of settled deliveries and of calls by endpoint, since the start.
    pub fn totals(&self) -> (u64, Vec<(Endpoint, u64)>) {
        let calls = |endpoint: &Endpoint| {
            let by_status = StatusClass::VARIANTS.iter().map(|status| {
                self.calls.requests.with_label_values(&[endpoint.label(), status.label()]).get()
            });
            (*endpoint, by_status.sum())
        };
        (self.messages.handling_seconds.get_sample_count(), Endpoint::VARIANTS.iter().map(calls).collect())
    }

    /// A snapshot of the load, for the operator's page.
    pub fn load(&self) -> Load {
        let number = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or_default();
        Load {
            in_flight: number(&self.messages.in_flight),
            waiting: number(&self.messages.waiting),
            held: number(&self.broker.successors_held),
            backlog: whole(self.queues.backlog.get()),
            drain: Duration::try_from_secs_f64(self.queues.drain_seconds.get()).ok(),
            delayed: whole(self.queues.delayed.get()),
            dead: whole(self.queues.dead.get()),
            rate: self.state().throughput.rate(Instant::now()),
        }
    }

    /// The number of deliveries since the start by outcome, without zeros.
    pub fn settled_by_outcome(&self) -> Vec<(&'static str, u64)> {
        nonzero(&self.messages.settled, groups::outcomes())
    }

    /// The number of dead-lettered messages since the start by reason, without zeros.
    pub fn dead_letters_by_reason(&self) -> Vec<(&'static str, u64)> {
        nonzero(&self.messages.dead_letters, groups::reasons())
    }

    /// The number of deliveries since the start that went to a delay queue by cause, without zeros.
    pub fn delays_by_cause(&self) -> Vec<(&'static str, u64)> {
        nonzero(&self.messages.delays, groups::delay_causes())
    }

    pub fn set_backlog(&self, messages: u32, drain: Option<Duration>) {
        self.queues.backlog.set(messages.into());
        self.queues.drain_seconds.set(drain.map_or(f64::NAN, |drain| drain.as_secs_f64()));
    }

    /// Sets the depths of the dead-letter queue and of all delay queues together, as far as RabbitMQ reported them.
    pub fn set_queue_depths(&self, dead: Option<u32>, delayed: Option<u32>) {
        self.queues.dead.set(dead.map_or(f64::NAN, f64::from));
        self.queues.delayed.set(delayed.map_or(f64::NAN, f64::from));
    }

    fn gather(&self) -> Vec<MetricFamily> {
        for (endpoint, status) in self.rate_limits() {
            let label = &[endpoint.label()];
            self.rate_limits.limit.with_label_values(label).set(status.limit.into());
            self.rate_limits.remaining.with_label_values(label).set(status.remaining.into());
            self.rate_limits.reset.with_label_values(label).set(status.reset.as_secs_f64());
            self.rate_limits.others.with_label_values(label).set(status.others);
        }
        self.registry.gather()
    }

    /// A call to Close ended.
    pub fn request_done(&self, call: Call) {
        let endpoint = call.endpoint.label();
        self.calls.requests.with_label_values(&[endpoint, call.status.label()]).inc();
        self.calls.request_seconds.with_label_values(&[endpoint]).observe(call.took.as_secs_f64());
        self.calls.wait_seconds.with_label_values(&[endpoint]).observe(call.waited.as_secs_f64());
    }

    /// A delivery was settled: its successor, if any, is confirmed, and it is acked.
    pub fn settled(&self, outcome: &Outcome, took: Duration) {
        match outcome {
            Outcome::Skipped(skip) => self.messages.skipped.with_label_values(&[skip.label()]).inc(),
            Outcome::Dead(dead) => {
                self.messages.dead_letters.with_label_values(&[dead.reason.label()]).inc();
            }
            Outcome::Delayed { cause, .. } => {
                self.messages.delays.with_label_values(&[cause.label()]).inc();
            }
            Outcome::Synced(_) | Outcome::Paused(_) => {}
        }
        self.messages.settled.with_label_values(&[outcome.label()]).inc();
        self.messages.handling_seconds.observe(took.as_secs_f64());
        self.state().throughput.record(Instant::now());
    }

    /// An outcome event was published. `routed` says whether a queue received it; `None` if the publish failed.
    pub fn outcome_published(&self, routed: Option<bool>) {
        let result = match routed {
            Some(true) => "routed",
            Some(false) => "unrouted",
            None => "lost",
        };
        self.broker.outcome_messages.with_label_values(&[result]).inc();
    }

    /// A replayed message was settled.
    pub fn replayed(&self, outcome: &Outcome) {
        self.messages.replayed.with_label_values(&[outcome.label()]).inc();
    }

    /// Deliveries went back to the queue unsettled.
    pub fn handed_back(&self, deliveries: u64) {
        self.messages.settled.with_label_values(&[HANDED_BACK]).inc_by(deliveries);
    }

    /// The processing of a message that was published at `sent` starts.
    pub fn queue_waited(&self, sent: jiff::Timestamp) {
        self.messages.queue_wait_seconds.observe(since(sent));
    }

    /// Close now agrees with an event of this time.
    pub fn written(&self, time: jiff::Timestamp) {
        self.messages.event_age_seconds.observe(since(time));
    }

    /// An attempt failed and is retried in place.
    pub fn retried(&self, stage: Stage) {
        self.messages.retries.with_label_values(&[stage.label()]).inc();
    }

    /// A message follows an earlier one into a delay queue.
    pub fn yielded(&self) {
        self.messages.yields.inc();
    }

    /// A creation waits for Close's search index.
    pub fn lag_guard_waited(&self) {
        self.decisions.lag_guard_waits.inc();
    }

    /// The search index showed the record after such a wait.
    pub fn duplicate_avoided(&self) {
        self.decisions.duplicates_avoided.inc();
    }

    /// Counts what a finished plan left out.
    pub fn decided(&self, decision: &Decision) {
        for dropped in &decision.dropped {
            self.decisions.fields_dropped.with_label_values(&[dropped.reason.label()]).inc();
        }
        for refusal in &decision.plan.refused {
            self.decisions.steps_refused.with_label_values(&[refusal.label()]).inc();
        }
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        self.decisions.conflicts.inc_by(count(decision.conflicts()));
        self.decisions.stale_values.inc_by(count(decision.plan.stale().count()));
    }

    /// Close accepted a value and returned another.
    pub fn not_kept(&self, effect: DifferenceEffect) {
        self.decisions.values_not_kept.with_label_values(&[effect.label()]).inc();
    }

    /// A message said what was applied before.
    pub fn repeated(&self) {
        self.messages.repeated.inc();
    }

    /// This number of messages was written together with an earlier one.
    pub fn merged(&self, messages: usize) {
        self.messages.merged.inc_by(u64::try_from(messages).unwrap_or(u64::MAX));
    }

    /// An ack came too late: the channel of the delivery was closed.
    pub fn quarantined(&self, step: QuarantineStep) {
        self.messages.quarantined.with_label_values(&[step.label()]).inc();
    }

    pub fn stale_ack(&self) {
        self.messages.stale_acks.inc();
    }

    pub fn set_load(&self, in_flight: usize, waiting: usize) {
        self.messages.in_flight.set(i64::try_from(in_flight).unwrap_or(i64::MAX));
        self.messages.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }

    /// Sets whether the active worker writes a journal. `None` for a standby.
    pub fn set_journal(&self, journal: Option<&JournalState>) {
        self.broker.journal.set(matches!(journal, Some(JournalState::Ready)).into());
        self.broker.journal_trouble.set(matches!(journal, Some(JournalState::Unusable(_))).into());
    }

    pub fn set_unanswered_creations(&self, creations: usize) {
        self.decisions.unanswered_creations.set(i64::try_from(creations).unwrap_or(i64::MAX));
    }

    /// Sets how far Close's search lags for a kind of change.
    /// `None`: unknown.
    pub fn set_search_lag(&self, kind: ChangeKind, lag: Option<Duration>) {
        let seconds = lag.map_or(f64::NAN, |lag| lag.as_secs_f64());
        self.decisions.search_lag.with_label_values(&[kind.label()]).set(seconds);
    }

    /// A pause starts.
    pub fn pause_began(&self, cause: PauseCause) {
        self.pauses.started.with_label_values(&[cause.label()]).inc();
    }

    /// Sets the cause that consumption is paused for now, if any.
    pub fn paused(&self, now: Option<PauseCause>) {
        set_only(&self.pauses.active, &groups::pause_causes(), now.map(PauseCause::label));
    }

    /// Sets whether there is a connection to the broker.
    pub fn connected(&self, up: bool) {
        self.broker.connected.set(up.into());
        if up {
            self.set_broker_trouble(None);
        } else {
            self.queues.reset();
        }
    }

    /// Resets the gauges of a destination that stopped. The cause of a missing connection stays.
    pub fn reset_gauges(&self) {
        self.connected(false);
        self.paused(None);
        self.set_load(0, 0);
        self.set_close_client(None);
    }

    pub fn set_config_hash(&self, hash: &str) {
        self.process.config.reset();
        self.process.config.with_label_values(&[hash]).set(1);
    }

    /// Sets the version of RabbitMQ. Returns whether it changed.
    pub fn set_broker_version(&self, version: &str) -> bool {
        let mut state = self.state();
        if state.broker_version.as_deref() == Some(version) {
            return false;
        }
        self.broker.info.reset();
        self.broker.info.with_label_values(&[version]).set(1);
        state.broker_version = Some(version.to_owned());
        true
    }

    /// The connection to the broker was lost.
    pub fn connection_lost(&self, why: BrokerTrouble) {
        self.broker.losses.with_label_values(&[why.label()]).inc();
    }

    /// Sets why there is no usable connection to the broker, if there is none.
    pub fn set_broker_trouble(&self, now: Option<BrokerTrouble>) {
        set_only(&self.broker.trouble, BrokerTrouble::VARIANTS, now.map(BrokerTrouble::label));
    }

    pub fn set_broker_alarm(&self, raised: bool) {
        self.broker.alarm.set(raised.into());
    }

    /// Counts a successor that the broker does not accept, until the guard is dropped.
    pub fn hold_successor(&self) -> impl Drop + use<> {
        let held = self.broker.successors_held.clone();
        held.inc();
        OnDrop(move || held.dec())
    }
}

/// The load of a destination.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Messages being processed.
    pub in_flight: u64,
    /// Received messages that wait.
    pub waiting: u64,
    /// Messages whose successor RabbitMQ does not accept.
    pub held: u64,
    /// Messages in the work queue, unacked ones included, if RabbitMQ reported it.
    pub backlog: Option<u64>,
    /// The estimated time to drain the backlog.
    pub drain: Option<Duration>,
    /// Messages in the delay queues, if RabbitMQ reported it.
    pub delayed: Option<u64>,
    /// Dead letters, if RabbitMQ reported it.
    pub dead: Option<u64>,
    /// Messages settled per second over the last minute.
    pub rate: f64,
}

/// The count a gauge holds, unless it is NaN.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are small and not negative"
)]
fn whole(number: f64) -> Option<u64> {
    number.is_finite().then_some(number as u64)
}

/// The counters that are not zero.
fn nonzero(
    counters: &IntCounterVec,
    labels: impl IntoIterator<Item = &'static str>,
) -> Vec<(&'static str, u64)> {
    let each = |label| (label, counters.with_label_values(&[label]).get());
    labels.into_iter().map(each).filter(|(_, count)| *count > 0).collect()
}

/// Seconds since a time; zero if it lies in the future.
fn since(time: jiff::Timestamp) -> f64 {
    jiff::Timestamp::now().duration_since(time).as_secs_f64().max(0.0)
}

/// Sets one of the gauges to 1, if any, and the others to 0.
fn set_only(gauges: &IntGaugeVec, labels: &[&str], now: Option<&str>) {
    for label in labels {
        gauges.with_label_values(&[label]).set((Some(*label) == now).into());
    }
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Effect, Skip};

    #[test]
    fn every_series_exists_from_the_start() {
        let metrics = Metrics::new(None).unwrap();
        let series = |page: String| page.lines().filter(|line| !line.starts_with('#')).count();
        let before = series(render([&metrics], &PageMetrics::default()));
        for &effect in Effect::VARIANTS {
            metrics.settled(&Outcome::Synced(effect), Duration::ZERO);
        }
        for skip in Skip::all() {
            metrics.settled(&Outcome::Skipped(skip), Duration::ZERO);
        }
        for &cause in PauseCause::VARIANTS {
            metrics.settled(&Outcome::Paused(cause), Duration::ZERO);
            metrics.paused(Some(cause));
        }
        metrics.settled(
            &Outcome::Delayed { level: 0, cause: crate::outcome::DelayCause::BehindEarlier },
            Duration::ZERO,
        );
        assert_eq!(series(render([&metrics], &PageMetrics::default())), before);
        assert!(
            render([&metrics], &PageMetrics::default())
                .contains("close_sync_messages_settled_total{outcome=\"skipped\"} 8")
        );
    }
}
