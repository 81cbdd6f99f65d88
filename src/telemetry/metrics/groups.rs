//! Every metric: name, help and labels, in groups.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
use strum::{VariantArray, VariantNames as _};

use crate::amqp::BrokerTrouble;
use crate::close::{Endpoint, StatusClass};
use crate::domain::dropped::DropReason;
use crate::domain::journal::ChangeKind;
use crate::domain::plan::Refusal;
use crate::domain::readback::DifferenceEffect;
use crate::outcome::{DelayCause, Effect, PauseCause, Reason, Skip, Stage};
use crate::telemetry::metrics::QuarantineStep;
use crate::telemetry::metrics::register::{Label, Registrar, label, metrics};

/// The outcomes of an acked delivery, besides its effects on Close.
const NO_EFFECT: [&str; 3] = ["skipped", "delayed", "dead"];
/// The outcome of a delivery that was not acked.
pub(crate) const HANDED_BACK: &str = "handed_back";

/// A call to Close takes about 100 ms; the last bucket is the default time-out.
const CALL_BUCKETS: [f64; 9] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// A wait for budget lasts up to one window, observed at 1 to 15 s (close-api.md §2).
const WAIT_BUCKETS: [f64; 8] = [0.001, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
/// From a few calls to retries in place for as long as a message may be held.
const HANDLING_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0];
/// From an immediate delivery to the longest delay queue and a day of outage.
const AGE_BUCKETS: [f64; 10] = [0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0];

/// The outcomes of an acked delivery.
fn acked() -> impl Iterator<Item = &'static str> {
    Effect::VARIANTS.iter().map(|effect| effect.label()).chain(NO_EFFECT)
}

/// The outcomes of a delivery.
pub(crate) fn outcomes() -> impl Iterator<Item = &'static str> {
    acked().chain([HANDED_BACK])
}

/// The reasons to dead-letter a message.
pub(crate) fn reasons() -> impl Iterator<Item = &'static str> {
    Reason::VARIANTS.iter().map(|reason| reason.label())
}

/// The causes of a delay.
pub(crate) fn delay_causes() -> impl Iterator<Item = &'static str> {
    DelayCause::labels()
}

/// The causes of a pause.
pub(crate) fn pause_causes() -> Vec<&'static str> {
    PauseCause::VARIANTS.iter().map(|cause| cause.label()).collect()
}

fn endpoint() -> Label {
    label("endpoint", Endpoint::VARIANTS.iter().map(|endpoint| endpoint.label()))
}

fn status() -> Label {
    label("status", StatusClass::VARIANTS.iter().map(|status| status.label()))
}

fn difference_effect() -> Label {
    label("effect", DifferenceEffect::VARIANTS.iter().map(|effect| effect.label()))
}

fn drop_reason() -> Label {
    label("reason", DropReason::VARIANTS.iter().map(|reason| reason.label()))
}

fn change_kind() -> Label {
    label("kind", ChangeKind::VARIANTS.iter().map(|kind| kind.label()))
}

fn broker_cause() -> Label {
    label("cause", BrokerTrouble::VARIANTS.iter().copied())
}

metrics! {
    /// Messages, from delivery to ack.
    Messages {
        settled: IntCounterVec = counters("messages_settled_total", "Deliveries by outcome", &[label("outcome", outcomes())]);
        replayed: IntCounterVec = counters("messages_replayed_total", "Deliveries of replayed messages by outcome", &[label("outcome", acked())]);
        skipped: IntCounterVec = counters("messages_skipped_total", "Skipped messages by reason", &[label("reason", Skip::all().map(Skip::label))]);
        delays: IntCounterVec = counters("messages_delayed_total", "Messages sent to a delay queue by cause", &[label("cause", delay_causes())]);
        dead_letters: IntCounterVec = counters("dead_letters_total", "Dead-lettered messages by reason", &[label("reason", reasons())]);
        retries: IntCounterVec = counters("retries_total", "Retries in place by the stage that failed", &[label("stage", [Stage::LookUp.label(), Stage::Write.label()])]);
        yields: IntCounter = counter("messages_yielded_total", "Messages sent to a delay queue because an earlier message of the same person or company waits there");
        repeated: IntCounter = counter("messages_repeated_total", "Messages that said what was applied before, so that Close was not asked");
        merged: IntCounter = counter("messages_merged_total", "Messages written together with an earlier message of the same person");
        quarantined: IntCounterVec = counters("messages_quarantined_total", "Messages that RabbitMQ did not let close-sync publish again: published without the producer's headers (bare), or rejected to the dead-letter queue", &[label("step", QuarantineStep::VARIANTS.iter().map(|step| step.label()))]);
        stale_acks: IntCounter = counter("stale_acks_total", "Deliveries settled after their channel had closed; RabbitMQ delivers them again");
        in_flight: IntGauge = gauge("messages_in_flight", "Messages being processed");
        waiting: IntGauge = gauge("messages_waiting", "Received messages that wait for an earlier message of the same person or company, or for a free slot");
        queue_wait_seconds: Histogram = histogram("queue_wait_seconds", "Time from the AMQP timestamp of a message (whole seconds) to the start of its processing, for first deliveries with a timestamp", &AGE_BUCKETS);
        handling_seconds: Histogram = histogram("message_handling_seconds", "Time to process a message, retries in place included", &HANDLING_BUCKETS);
        event_age_seconds: Histogram = histogram("event_age_seconds", "Time from the timestamp in an event until Close agrees with it", &AGE_BUCKETS);
    }

    /// What was decided about single records and fields.
    Decisions {
        lag_guard_waits: IntCounter = counter("lag_guard_waits_total", "Look-ups after which a message waited for Close's search before it created a record");
        unanswered_creations: IntGauge = gauge("unanswered_creations", "Creations whose answer was lost; messages about the same records wait until it is known whether they happened");
        search_lag: GaugeVec = unknowns("search_lag_seconds", "How far Close's search lags behind changes of ours at least, by the kind of change: the age of the last change at the last search that did not show it. NaN until it is measured", &[change_kind()]);
        duplicates_avoided: IntCounter = counter("duplicates_avoided_total", "Creations that were cancelled because the search index caught up and showed the record");
        fields_dropped: IntCounterVec = counters("fields_dropped_total", "Mapped values that were dropped, by reason", &[drop_reason()]);
        steps_refused: IntCounterVec = counters("steps_refused_total", "Writes that a switch forbids", &[label("switch", Refusal::VARIANTS.iter().map(|refusal| refusal.label()))]);
        conflicts: IntCounter = counter("contact_conflicts_total", "Contacts with the event's email that were not changed because they have a different user id");
        values_not_kept: IntCounterVec = counters("values_not_kept_total", "Values that Close accepted and returned as others, by effect", &[difference_effect()]);
        stale_values: IntCounter = counter("stale_values_total", "Values that were not written because Close holds a value of a newer event");
    }

    /// Pauses of consumption.
    Pauses {
        active: IntGaugeVec = gauges("paused", "1 while consumption is paused for this cause", &[label("cause", pause_causes())]);
        started: IntCounterVec = counters("pauses_total", "Pauses of consumption by their first cause", &[label("cause", pause_causes())]);
    }

    /// The connection to RabbitMQ.
    Broker {
        connected: IntGauge = gauge("broker_connected", "1 while connected to RabbitMQ and consuming or standing by");
        info: IntGaugeVec = gauges("broker_info", "1, labelled with the version of RabbitMQ; absent before the first connection", &[label("version", [])]);
        losses: IntCounterVec = counters("broker_connection_losses_total", "Lost connections to RabbitMQ by cause", &[broker_cause()]);
        trouble: IntGaugeVec = gauges("broker_trouble", "1 while this cause prevents a connection to RabbitMQ, or while RabbitMQ lacks an exchange or queue", &[broker_cause()]);
        journal: IntGauge = gauge("journal_in_use", "1 while the active worker writes a journal");
        journal_trouble: IntGauge = gauge("journal_trouble", "1 while the active worker works without the journal that the settings ask for");
        alarm: IntGauge = gauge("broker_alarm", "1 while RabbitMQ accepts no messages because of a memory or disk alarm");
        successors_held: IntGauge = gauge("successors_held", "Messages held because RabbitMQ does not accept their successor for a delay or dead-letter queue");
        outcome_messages: IntCounterVec = counters("outcome_messages_total", "Published outcome events: routed to a queue, unrouted, or lost", &[label("result", ["routed", "unrouted", "lost"])]);
    }

    /// The depths of the queues. NaN while there is no connection.
    Queues {
        backlog: Gauge = unknown("backlog_messages", "Messages in the work queue, unacked ones included; NaN until RabbitMQ reports it");
        dead: Gauge = unknown("dead_letter_messages", "Messages in the dead-letter queue; NaN until RabbitMQ reports it");
        delayed: Gauge = unknown("delayed_messages", "Messages in the delay queues; NaN until RabbitMQ reports it");
        drain_seconds: Gauge = unknown("drain_seconds", "Estimated time until the backlog is processed; NaN while there is no estimate");
    }

    /// Close's rate limits. NaN until Close reports them; updated at each scrape.
    RateLimits {
        limit: GaugeVec = unknowns("rate_limit_calls", "Calls Close allows in a window, by endpoint group; NaN until Close reports it", &[endpoint()]);
        remaining: GaugeVec = unknowns("rate_limit_remaining_calls", "Calls remaining in the window of Close's rate limit; NaN until Close reports it", &[endpoint()]);
        reset: GaugeVec = unknowns("rate_limit_reset_seconds", "Time until the window of Close's rate limit resets; NaN until Close reports it", &[endpoint()]);
        others: GaugeVec = unknowns("rate_limit_others_calls", "Estimated calls of other clients in a window; NaN until Close reports its limits", &[endpoint()]);
    }

    /// Calls to Close.
    CloseCalls {
        requests: IntCounterVec = counters("close_requests_total", "Calls to Close by endpoint group and status", &[endpoint(), status()]);
        request_seconds: HistogramVec = histograms("close_request_seconds", "Duration of calls to Close by endpoint group", &CALL_BUCKETS, &[endpoint()]);
        wait_seconds: HistogramVec = histograms("gate_wait_seconds", "Time a call waits for the rate limit, by endpoint group", &WAIT_BUCKETS, &[endpoint()]);
    }

    /// This process and its configuration.
    Process {
        config: IntGaugeVec = gauges("config_info", "1, labelled with a hash of the current settings without secrets and process-wide settings", &[label("hash", [])]);
        build: IntGaugeVec = gauges("build_info", "1, labelled with the version and the commit of this build", &[label("version", [env!("CARGO_PKG_VERSION")]), label("commit", [env!("CLOSE_SYNC_COMMIT")])]);
        started: IntGauge = gauge("start_time_seconds", "When this worker started, in seconds since 1970");
    }
}

impl Queues {
    /// Sets the depths to NaN: without a connection they would grow stale.
    pub(crate) fn reset(&self) {
        let Self { backlog, dead, delayed, drain_seconds } = self;
        for gauge in [backlog, dead, delayed, drain_seconds] {
            gauge.set(f64::NAN);
        }
    }
}

impl RateLimits {
    /// Sets the limits to NaN, before the client changes.
    pub(crate) fn reset(&self) {
        let Self { limit, remaining, reset, others } = self;
        for gauge in [limit, remaining, reset, others] {
            for endpoint in Endpoint::VARIANTS {
                gauge.with_label_values(&[endpoint.label()]).set(f64::NAN);
            }
        }
    }
}
