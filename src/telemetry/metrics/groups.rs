//! Metrics that belong together and are not known all the time.

use std::sync::{Arc, Mutex};

use prometheus::{Gauge, GaugeVec, IntGaugeVec};

use crate::close::Client;
use crate::telemetry::metrics::register::Maker;

/// Which broker the connection was to last.
#[derive(Clone)]
pub(crate) struct BrokerInfo {
    pub(crate) info: IntGaugeVec,
    pub(crate) last: Arc<Mutex<Option<String>>>,
}

impl BrokerInfo {
    pub(crate) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let help = "1, labelled with the version of RabbitMQ, once connected";
        Ok(Self { info: make.gauges("broker_info", help, "version", &[])?, last: Arc::default() })
    }
}

/// What waits on the broker, as far as it tells.
#[derive(Clone)]
pub(crate) struct Queues {
    pub(crate) backlog: Gauge,
    pub(crate) dead: Gauge,
    pub(crate) delayed: Gauge,
    pub(crate) drain_seconds: Gauge,
}

impl Queues {
    pub(crate) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            backlog: make.unknown(
                "backlog_messages",
                "Messages in the work queue, those in hand included; NaN until RabbitMQ has told",
            )?,
            dead: make.unknown(
                "dead_letter_messages",
                "Messages in the dead-letter queue; NaN until RabbitMQ has told",
            )?,
            delayed: make
                .unknown("delayed_messages", "Messages in the delay queues; NaN until RabbitMQ has told")?,
            drain_seconds: make.unknown(
                "drain_seconds",
                "Estimated time until the backlog is worked off; NaN while there is nothing to estimate it from",
            )?,
        })
    }

    /// Nobody looks at them any more, and what was seen last grows wrong.
    pub(crate) fn forget(&self) {
        let Self { backlog, dead, delayed, drain_seconds } = self;
        for gauge in [backlog, dead, delayed, drain_seconds] {
            gauge.set(f64::NAN);
        }
    }
}

/// Close's rate limits, which are looked up when somebody asks.
#[derive(Clone)]
pub(crate) struct RateLimits {
    pub(crate) limit: GaugeVec,
    pub(crate) remaining: GaugeVec,
    pub(crate) reset: GaugeVec,
    pub(crate) others: GaugeVec,
    pub(crate) close: Arc<Mutex<Option<Client>>>,
}

impl RateLimits {
    pub(crate) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            limit: make.unknowns(
                "rate_limit_calls",
                "Calls Close allows in a window by endpoint group; NaN until it has told",
            )?,
            remaining: make.unknowns(
                "rate_limit_remaining_calls",
                "Calls left in the window of Close's rate limit; NaN until it has told",
            )?,
            reset: make.unknowns(
                "rate_limit_reset_seconds",
                "Time until the window of Close's rate limit is renewed; NaN until it has told",
            )?,
            others: make.unknowns(
                "rate_limit_others_calls",
                "Calls others make in a window, as far as noticed; NaN until Close has told",
            )?,
            close: Arc::default(),
        })
    }
}
