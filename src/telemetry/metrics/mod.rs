//! Every metric, in one place: names, labels, and the methods that record them.
//!
//! A registry for each destination, so that several can live in one process. All label values come from
//! closed enums and every combination exists from the start, so that an alert sees zeros instead of
//! nothing. Labels never carry anything of a message.

mod groups;
mod register;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};
use strum::{VariantArray as _, VariantNames as _};
use tokio::time::Instant;

use crate::amqp::BrokerTrouble;
use crate::close::{Call, Client, Endpoint, RateLimitStatus, StatusClass};
use crate::domain::decision::Decision;
use crate::domain::dropped::DropReason;
use crate::domain::plan::Refusal;
use crate::outcome::{Effect, Outcome, PauseCause, Reason, Skip, Stage};
use crate::telemetry::throughput::Throughput;
use groups::{BrokerInfo, Queues, RateLimits};
use register::Maker;

/// The page Prometheus scrapes: one family for each name, whoever has it.
pub fn page<'a>(all: impl IntoIterator<Item = &'a Metrics>) -> String {
    let mut families: BTreeMap<String, MetricFamily> = BTreeMap::new();
    for mut family in all.into_iter().flat_map(Metrics::gather) {
        match families.get_mut(family.name()) {
            None => drop(families.insert(family.name().to_owned(), family)),
            Some(known) => {
                let metrics = known.take_metric().into_iter().chain(family.take_metric()).collect();
                known.set_metric(metrics);
            }
        }
    }
    TextEncoder::new().encode_to_string(&families.into_values().collect::<Vec<_>>()).unwrap_or_default()
}

/// The metrics of one destination. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    settled: IntCounterVec,
    replayed: IntCounterVec,
    skipped: IntCounterVec,
    dead_letters: IntCounterVec,
    queue_wait_seconds: Histogram,
    handling_seconds: Histogram,
    event_age_seconds: Histogram,
    retries: IntCounterVec,
    lag_guard_waits: IntCounter,
    duplicates_avoided: IntCounter,
    fields_dropped: IntCounterVec,
    steps_refused: IntCounterVec,
    conflicts: IntCounter,
    stale_acks: IntCounter,
    yields: IntCounter,
    merged: IntCounter,
    stale_values: IntCounter,
    in_flight: IntGauge,
    waiting: IntGauge,
    paused: IntGaugeVec,
    pauses: IntCounterVec,
    connected: IntGauge,
    connection_losses: IntCounterVec,
    broker_trouble: IntGaugeVec,
    broker_alarm: IntGauge,
    successors_held: IntGauge,
    outcome_messages: IntCounterVec,
    broker: BrokerInfo,
    config: IntGaugeVec,
    queues: Queues,
    rate_limits: RateLimits,
    close_requests: IntCounterVec,
    close_request_seconds: HistogramVec,
    gate_wait_seconds: HistogramVec,
    pace: Arc<Mutex<Throughput>>,
}

/// What becomes of a delivery besides an effect on Close, when it is acked.
const OTHERWISE_SETTLED: [&str; 3] = ["skipped", "delayed", "dead"];
/// What becomes of one that is not.
const HANDED_BACK: &str = "handed_back";

/// A call to Close takes some 100 ms; the last bucket is the default time-out.
const CALL_BUCKETS: [f64; 9] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// A wait for budget lasts up to a window, seen at 1 to 15 s (close-api.md §2).
const WAIT_BUCKETS: [f64; 8] = [0.001, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
/// A few calls, or retries in place up to the longest hold.
const HANDLING_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0];
/// From "at once" to "after the longest delay queue" and a day of outage.
const AGE_BUCKETS: [f64; 10] = [0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0];

impl Metrics {
    /// All metrics, at zero; with a label for the destination if it has a name.
    ///
    /// # Errors
    /// When two of them have the same name, which a test excludes.
    #[expect(clippy::too_many_lines, reason = "one entry for each metric, and nothing else")]
    pub fn new(destination: Option<&str>) -> prometheus::Result<Self> {
        let labels = destination.map(|name| HashMap::from([("destination".to_owned(), name.to_owned())]));
        let registry = Registry::new_custom(Some("close_sync".into()), labels)?;
        let make = Maker(&registry);
        let settled = [&Effect::ALL.map(Effect::label), OTHERWISE_SETTLED.as_slice()].concat();
        let metrics = Self {
            settled: make.counters(
                "messages_settled_total",
                "Deliveries by what became of them",
                "outcome",
                &[settled.as_slice(), &[HANDED_BACK]].concat(),
            )?,
            replayed: make.counters(
                "messages_replayed_total",
                "Deliveries of replayed messages by what became of them",
                "outcome",
                &settled,
            )?,
            skipped: make.counters(
                "messages_skipped_total",
                "Skipped messages by reason",
                "reason",
                &Skip::all().map(Skip::label).collect::<Vec<_>>(),
            )?,
            dead_letters: make.counters(
                "dead_letters_total",
                "Dead-lettered messages by reason",
                "reason",
                &Reason::ALL.map(Reason::label),
            )?,
            queue_wait_seconds: make.histogram(
                "queue_wait_seconds",
                "From the AMQP timestamp of a message to the work on it, to the second; of those that have one, at their first delivery",
                &AGE_BUCKETS,
            )?,
            handling_seconds: make.histogram(
                "message_handling_seconds",
                "From the start of the work on a message to its end, retries in place included",
                &HANDLING_BUCKETS,
            )?,
            event_age_seconds: make.histogram(
                "event_age_seconds",
                "From the time in the event to the time Close agreed with it",
                &AGE_BUCKETS,
            )?,
            retries: make.counters(
                "retries_total",
                "Retries in place by the stage that failed",
                "stage",
                &[Stage::LookUp.label(), Stage::Write.label()],
            )?,
            lag_guard_waits: make.counter(
                "lag_guard_waits_total",
                "Waits for Close's search to catch up before a record was created",
            )?,
            duplicates_avoided: make.counter(
                "duplicates_avoided_total",
                "Creations given up because search had caught up and showed the record",
            )?,
            fields_dropped: make.counters(
                "fields_dropped_total",
                "Mapped values left out by reason",
                "reason",
                &DropReason::VARIANTS.iter().map(|reason| reason.label()).collect::<Vec<_>>(),
            )?,
            steps_refused: make.counters(
                "steps_refused_total",
                "Writes the switches forbade",
                "switch",
                &Refusal::VARIANTS.iter().map(|refusal| refusal.label()).collect::<Vec<_>>(),
            )?,
            conflicts: make.counter(
                "contact_conflicts_total",
                "Contacts with the event's email left alone because they carry another user id",
            )?,
            stale_acks: make.counter(
                "stale_acks_total",
                "Deliveries settled after their channel was gone: they come again",
            )?,
            yields: make.counter(
                "messages_yielded_total",
                "Messages sent to a delay queue because an earlier one of the same person or company waits there",
            )?,
            merged: make.counter(
                "messages_merged_total",
                "Messages whose values were written together with those of an earlier one of the same person",
            )?,
            stale_values: make.counter(
                "stale_values_total",
                "Values not written because Close holds one of a newer event",
            )?,
            in_flight: make.gauge("messages_in_flight", "Messages being worked on")?,
            waiting: make.gauge(
                "messages_waiting",
                "Messages received that wait for an earlier one of the same person or company, or for a free place",
            )?,
            paused: make.gauges(
                "paused",
                "1 while consumption is paused for this cause",
                "cause",
                &PauseCause::ALL.map(PauseCause::label),
            )?,
            pauses: make.counters(
                "pauses_total",
                "Pauses of consumption by their first cause",
                "cause",
                &PauseCause::ALL.map(PauseCause::label),
            )?,
            connected: make.gauge("broker_connected", "1 while connected to RabbitMQ and consuming or standing by")?,
            broker: BrokerInfo::new(&make)?,
            config: make.gauges(
                "config_info",
                "1, labelled with a hash of the settings in force, secrets and those of the process left out",
                "hash",
                &[],
            )?,
            connection_losses: make.counters(
                "broker_connection_losses_total",
                "Times the connection to RabbitMQ was lost by cause",
                "cause",
                BrokerTrouble::VARIANTS,
            )?,
            broker_trouble: make.gauges(
                "broker_trouble",
                "1 while there is no connection to RabbitMQ for this cause, or one to a broker that lacks something",
                "cause",
                BrokerTrouble::VARIANTS,
            )?,
            broker_alarm: make
                .gauge("broker_alarm", "1 while RabbitMQ takes no messages for want of memory or disk")?,
            outcome_messages: make.counters(
                "outcome_messages_total",
                "Messages about what became of a message by whether somebody gets them",
                "result",
                &["routed", "unrouted", "lost"],
            )?,
            successors_held: make.gauge(
                "successors_held",
                "Messages held because RabbitMQ does not take their successor for a delay or dead-letter queue",
            )?,
            queues: Queues::new(&make)?,
            rate_limits: RateLimits::new(&make)?,
            close_requests: make.requests()?,
            close_request_seconds: make.histograms(
                "close_request_seconds",
                "Duration of calls to Close by endpoint group",
                &CALL_BUCKETS,
            )?,
            gate_wait_seconds: make.histograms(
                "gate_wait_seconds",
                "Waits for rate budget before a call by endpoint group",
                &WAIT_BUCKETS,
            )?,
            registry: registry.clone(),
            pace: Arc::new(Mutex::new(Throughput::new(Instant::now()))),
        };
        make.gauge("start_time_seconds", "When this worker started, in seconds since 1970")?
            .set(jiff::Timestamp::now().as_second());
        make.build_info()?;
        Ok(metrics)
    }

    /// Whose rate limits are told of from now on.
    pub fn set_close_client(&self, client: Option<Client>) {
        *self.rate_limits.close.lock().unwrap_or_else(PoisonError::into_inner) = client;
        for endpoint in Endpoint::VARIANTS {
            let RateLimits { limit, remaining, reset, others, close: _ } = &self.rate_limits;
            for gauge in [limit, remaining, reset, others] {
                gauge.with_label_values(&[endpoint.label()]).set(f64::NAN);
            }
        }
    }

    /// What is left of Close's rate limits, of those it told.
    pub fn rate_limits(&self) -> Vec<(Endpoint, RateLimitStatus)> {
        let close = self.rate_limits.close.lock().unwrap_or_else(PoisonError::into_inner);
        close.iter().flat_map(Client::rate_limits).collect()
    }

    /// Messages in hand: being worked on, or received and waiting.
    pub fn unsettled(&self) -> u32 {
        u32::try_from(self.in_flight.get() + self.waiting.get()).unwrap_or(0)
    }

    /// Deliveries settled and calls made so far.
    pub fn totals(&self) -> (u64, Vec<(Endpoint, u64)>) {
        let calls = |endpoint: &Endpoint| {
            let by_status = StatusClass::VARIANTS.iter().map(|status| {
                self.close_requests.with_label_values(&[endpoint.label(), status.label()]).get()
            });
            (*endpoint, by_status.sum())
        };
        (self.handling_seconds.get_sample_count(), Endpoint::VARIANTS.iter().map(calls).collect())
    }

    /// The load, for people.
    pub fn load(&self) -> Load {
        let number = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or_default();
        Load {
            in_flight: number(&self.in_flight),
            waiting: number(&self.waiting),
            held: number(&self.successors_held),
            backlog: whole(self.queues.backlog.get()),
            drain: Duration::try_from_secs_f64(self.queues.drain_seconds.get()).ok(),
            delayed: whole(self.queues.delayed.get()),
            dead: whole(self.queues.dead.get()),
            rate: self.pace.lock().unwrap_or_else(PoisonError::into_inner).rate(Instant::now()),
        }
    }

    /// What became of deliveries since the start, of what happened at all.
    pub fn settled_by_outcome(&self) -> Vec<(&'static str, u64)> {
        let labels = Effect::ALL.map(Effect::label).into_iter().chain(OTHERWISE_SETTLED).chain([HANDED_BACK]);
        counted(&self.settled, labels)
    }

    /// Messages dead-lettered since the start by reason, of those there were.
    pub fn dead_letters_by_reason(&self) -> Vec<(&'static str, u64)> {
        counted(&self.dead_letters, Reason::ALL.map(Reason::label))
    }

    /// The backlog, and how long it may take.
    pub fn set_backlog(&self, messages: u32, drain: Option<Duration>) {
        self.queues.backlog.set(messages.into());
        self.queues.drain_seconds.set(drain.map_or(f64::NAN, |drain| drain.as_secs_f64()));
    }

    /// Messages in the dead-letter queue, and in all delay queues together, if RabbitMQ tells.
    pub fn set_queue_depths(&self, dead: Option<u32>, delayed: Option<u32>) {
        self.queues.dead.set(dead.map_or(f64::NAN, f64::from));
        self.queues.delayed.set(delayed.map_or(f64::NAN, f64::from));
    }

    fn gather(&self) -> Vec<MetricFamily> {
        for (endpoint, standing) in self.rate_limits() {
            let label = &[endpoint.label()];
            self.rate_limits.limit.with_label_values(label).set(standing.limit.into());
            self.rate_limits.remaining.with_label_values(label).set(standing.remaining.into());
            self.rate_limits.reset.with_label_values(label).set(standing.reset.as_secs_f64());
            self.rate_limits.others.with_label_values(label).set(standing.others);
        }
        self.registry.gather()
    }

    /// A call to Close ended.
    pub fn request_done(&self, call: Call) {
        let endpoint = call.endpoint.label();
        self.close_requests.with_label_values(&[endpoint, call.status.label()]).inc();
        self.close_request_seconds.with_label_values(&[endpoint]).observe(call.took.as_secs_f64());
        self.gate_wait_seconds.with_label_values(&[endpoint]).observe(call.waited.as_secs_f64());
    }

    /// A delivery was settled: its successor, if any, is confirmed, and it is acked.
    pub fn settled(&self, outcome: &Outcome, took: Duration) {
        match outcome {
            Outcome::Skipped(skip) => self.skipped.with_label_values(&[skip.label()]).inc(),
            Outcome::Dead(dead) => self.dead_letters.with_label_values(&[dead.reason.label()]).inc(),
            Outcome::Synced(_) | Outcome::Delayed { .. } | Outcome::Paused(_) => {}
        }
        self.settled.with_label_values(&[outcome.label()]).inc();
        self.handling_seconds.observe(took.as_secs_f64());
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).note(Instant::now());
    }

    /// It was told what became of a message: whether a queue has it, if that is known.
    pub fn outcome_published(&self, routed: Option<bool>) {
        let result = match routed {
            Some(true) => "routed",
            Some(false) => "unrouted",
            None => "lost",
        };
        self.outcome_messages.with_label_values(&[result]).inc();
    }

    /// One that was settled came from a replay.
    pub fn replayed(&self, outcome: &Outcome) {
        self.replayed.with_label_values(&[outcome.label()]).inc();
    }

    /// A delivery went back to the queue unsettled.
    pub fn handed_back(&self, deliveries: u64) {
        self.settled.with_label_values(&[HANDED_BACK]).inc_by(deliveries);
    }

    /// The work on a message begins that was published at `sent`.
    pub fn queue_waited(&self, sent: jiff::Timestamp) {
        self.queue_wait_seconds.observe(since(sent));
    }

    /// Close agrees with an event that happened at `time`.
    pub fn written(&self, time: jiff::Timestamp) {
        self.event_age_seconds.observe(since(time));
    }

    /// A try failed and is repeated in place.
    pub fn retried(&self, stage: Stage) {
        self.retries.with_label_values(&[stage.label()]).inc();
    }

    /// A message follows an earlier one into a delay queue.
    pub fn yielded(&self) {
        self.yields.inc();
    }

    /// A creation waits for search to catch up.
    pub fn lag_guard_waited(&self) {
        self.lag_guard_waits.inc();
    }

    /// It was good that it did: the record is there.
    pub fn duplicate_avoided(&self) {
        self.duplicates_avoided.inc();
    }

    /// What a finished plan left out.
    pub fn decided(&self, decision: &Decision) {
        for dropped in &decision.dropped {
            self.fields_dropped.with_label_values(&[dropped.reason.label()]).inc();
        }
        for refusal in &decision.plan.refused {
            self.steps_refused.with_label_values(&[refusal.label()]).inc();
        }
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        self.conflicts.inc_by(count(decision.conflicts()));
        self.stale_values.inc_by(count(decision.plan.stale().count()));
    }

    /// So many messages were written together with an earlier one.
    pub fn merged(&self, messages: usize) {
        self.merged.inc_by(u64::try_from(messages).unwrap_or(u64::MAX));
    }

    /// An ack came too late: the channel of the delivery was gone.
    pub fn stale_ack(&self) {
        self.stale_acks.inc();
    }

    /// How many messages are being worked on, and how many wait.
    pub fn set_load(&self, in_flight: usize, waiting: usize) {
        self.in_flight.set(i64::try_from(in_flight).unwrap_or(i64::MAX));
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }

    /// A pause begins.
    pub fn pause_began(&self, cause: PauseCause) {
        self.pauses.with_label_values(&[cause.label()]).inc();
    }

    /// Consumption is paused for a cause, or for none.
    pub fn paused(&self, now: Option<PauseCause>) {
        only(&self.paused, &PauseCause::ALL.map(PauseCause::label), now.map(PauseCause::label));
    }

    /// The connection to the broker stands, or does not any more.
    pub fn connected(&self, up: bool) {
        self.connected.set(up.into());
        if up {
            self.set_broker_trouble(None);
        } else {
            self.queues.forget();
        }
    }

    /// Nobody works any more, whatever it was in the middle of. Why there was no connection stays told.
    pub fn reset_gauges(&self) {
        self.connected(false);
        self.paused(None);
        self.set_load(0, 0);
        self.set_close_client(None);
    }

    /// The settings in force from now on, by their hash.
    pub fn set_config_hash(&self, hash: &str) {
        self.config.reset();
        self.config.with_label_values(&[hash]).set(1);
    }

    /// Which version of RabbitMQ the connection is to. Whether that is news.
    pub fn set_broker_version(&self, version: &str) -> bool {
        let mut last = self.broker.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_deref() == Some(version) {
            return false;
        }
        self.broker.info.reset();
        self.broker.info.with_label_values(&[version]).set(1);
        *last = Some(version.to_owned());
        true
    }

    /// The connection to the broker was lost.
    pub fn connection_lost(&self, why: BrokerTrouble) {
        self.connection_losses.with_label_values(&[why.label()]).inc();
    }

    /// Why there is no connection to the broker, if there is none.
    pub fn set_broker_trouble(&self, now: Option<BrokerTrouble>) {
        only(&self.broker_trouble, BrokerTrouble::VARIANTS, now.map(BrokerTrouble::label));
    }

    /// The broker raised an alarm, or cleared it.
    pub fn set_broker_alarm(&self, raised: bool) {
        self.broker_alarm.set(raised.into());
    }

    /// A successor is not taken by the broker; as long as the guard lives.
    pub fn hold_successor(&self) -> impl Drop + use<> {
        let held = self.successors_held.clone();
        held.inc();
        OnDrop(move || held.dec())
    }
}

/// How much there is to do, and how fast it goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Messages being worked on.
    pub in_flight: u64,
    /// Messages received that wait for their turn.
    pub waiting: u64,
    /// Messages whose successor RabbitMQ does not take.
    pub held: u64,
    /// Messages in the work queue, those in hand included, if RabbitMQ tells.
    pub backlog: Option<u64>,
    /// How long they take, as far as that can be told.
    pub drain: Option<Duration>,
    /// Messages in the delay queues, if RabbitMQ tells.
    pub delayed: Option<u64>,
    /// Dead letters, if RabbitMQ tells.
    pub dead: Option<u64>,
    /// Messages settled a second over the last minute.
    pub rate: f64,
}

/// A count, if it is one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are small and not negative"
)]
fn whole(number: f64) -> Option<u64> {
    number.is_finite().then_some(number as u64)
}

/// Counters that are not zero, with their labels.
fn counted(
    counters: &IntCounterVec,
    labels: impl IntoIterator<Item = &'static str>,
) -> Vec<(&'static str, u64)> {
    let each = |label| (label, counters.with_label_values(&[label]).get());
    labels.into_iter().map(each).filter(|(_, count)| *count > 0).collect()
}

/// Seconds since a time; none where the clocks differ.
fn since(time: jiff::Timestamp) -> f64 {
    jiff::Timestamp::now().duration_since(time).as_secs_f64().max(0.0)
}

/// Of several gauges, the one that is 1, if any.
fn only(gauges: &IntGaugeVec, labels: &[&str], now: Option<&str>) {
    for label in labels {
        gauges.with_label_values(&[label]).set((Some(*label) == now).into());
    }
}

/// Does something at its end.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_is_there_from_the_start_and_every_outcome_has_one() {
        let metrics = Metrics::new(None).unwrap();
        let series = |page: String| page.lines().filter(|line| !line.starts_with('#')).count();
        let before = series(page([&metrics]));
        for effect in Effect::ALL {
            metrics.settled(&Outcome::Synced(effect), Duration::ZERO);
        }
        for skip in Skip::all() {
            metrics.settled(&Outcome::Skipped(skip), Duration::ZERO);
        }
        for cause in PauseCause::ALL {
            metrics.settled(&Outcome::Paused(cause), Duration::ZERO);
            metrics.paused(Some(cause));
        }
        metrics.settled(
            &Outcome::Delayed { level: 0, obstacle: crate::outcome::Obstruction::Behind },
            Duration::ZERO,
        );
        assert_eq!(series(page([&metrics])), before);
        assert!(page([&metrics]).contains("close_sync_messages_settled_total{outcome=\"skipped\"} 8"));
    }
}
