//! Metrics that belong together and are not known all the time.

use std::sync::{Arc, Mutex};

use prometheus::{Gauge, GaugeVec, IntGaugeVec};

use super::maker::Maker;
use crate::close::Client;

/// Which broker the connection was to last.
#[derive(Clone)]
pub(super) struct BrokerInfo {
    pub(super) info: IntGaugeVec,
    pub(super) last: Arc<Mutex<Option<String>>>,
}

impl BrokerInfo {
    pub(super) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let help = "1, labelled with the version of RabbitMQ, once connected";
        Ok(Self { info: make.gauges("broker_info", help, "version", &[])?, last: Arc::default() })
    }
}

/// What waits on the broker, as far as it tells.
#[derive(Clone)]
pub(super) struct Queues {
    pub(super) backlog: Gauge,
    pub(super) dead: Gauge,
    pub(super) delayed: Gauge,
    pub(super) drain_seconds: Gauge,
}

impl Queues {
    pub(super) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
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
    pub(super) fn forget(&self) {
        let Self { backlog, dead, delayed, drain_seconds } = self;
        for gauge in [backlog, dead, delayed, drain_seconds] {
            gauge.set(f64::NAN);
        }
    }
}

/// Close's rate limits, which are looked up when somebody asks.
#[derive(Clone)]
pub(super) struct RateLimits {
    pub(super) limit: GaugeVec,
    pub(super) remaining: GaugeVec,
    pub(super) reset: GaugeVec,
    pub(super) others: GaugeVec,
    pub(super) close: Arc<Mutex<Option<Client>>>,
}

impl RateLimits {
    pub(super) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
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
