//! What all work of one session shares.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::Settings;
use crate::consumer::broker::Publishers;
use crate::consumer::quarantine::{Evidence, Quarantine};
use crate::sync::Worker;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::Status;

/// Shared by the loop and the tasks of a session.
pub(crate) struct Context {
    /// The destination's name, where there are several.
    pub(crate) destination: Option<Arc<str>>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) worker: Worker,
    pub(crate) metrics: Metrics,
    pub(crate) status: Status,
    pub(crate) environment: Arc<dyn Environment>,
    pub(crate) publishers: Publishers,
    pub(crate) quarantine: Quarantine,
    /// What the end of the session says about messages in flight.
    pub(crate) evidence: OnceLock<Evidence>,
    /// Cancelled when the session ends: tasks stop at the next await and hand their messages back.
    pub(crate) stop: CancellationToken,
    /// The last outcome event for producers could not be published.
    pub(crate) outcome_events_fail: AtomicBool,
}

/// The wall clock and random numbers. The model replaces both, so that one seed gives one run.
pub trait Environment: Send + Sync {
    /// The time.
    fn now(&self) -> Timestamp;

    /// A number that cannot be predicted.
    fn draw(&self) -> usize;

    /// An id that no other message has.
    fn id(&self) -> Uuid;
}

/// The clock and the random numbers of the system.
#[derive(Clone, Copy, Debug)]
pub struct System;

impl Environment for System {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn draw(&self) -> usize {
        // The lower half of such an id is random.
        let (_, random) = Uuid::now_v7().as_u64_pair();
        usize::try_from(random >> 8).unwrap_or_default()
    }

    fn id(&self) -> Uuid {
        Uuid::now_v7()
    }
}
