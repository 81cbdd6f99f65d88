//! A received message: decoded and mapped, with its keys and its priority.

use std::panic::AssertUnwindSafe;

use jiff::Timestamp;
use tracing::Span;
use uuid::Uuid;

use crate::VERSION;
use crate::amqp::envelope::{Envelope, Route};
use crate::close::Priority;
use crate::consumer::broker::{Delivery, Receipt};
use crate::consumer::context::Context;
use crate::domain::encoding::Payload;
use crate::domain::mapping::Key;
use crate::outcome::{DeadLetter, DelayCause, Outcome, Reason, Stage};
use crate::sync::{Job, Prepared, ReceivedAt, Worker};
use crate::telemetry::panic_hook;

/// A message between its delivery and its settlement.
pub(crate) struct ReceivedMessage {
    pub(crate) body: Vec<u8>,
    pub(crate) redelivered: bool,
    pub(crate) receipt: Box<dyn Receipt>,
    pub(crate) envelope: Envelope,
    pub(crate) prepared: Prepared,
    /// It failed when merged with others, and runs by itself the next time.
    pub(crate) split: bool,
    /// Its span in a trace, from the start of the work on it.
    pub(crate) span: Option<Span>,
}

impl ReceivedMessage {
    /// Decodes and maps a delivery. A panic costs only this message.
    pub(crate) fn prepare(delivery: Delivery, context: &Context) -> Self {
        let Delivery { properties, exchange, routing_key, redelivered, body, receipt } = delivery;
        let is_own = exchange == context.settings.retry_exchange();
        let route = Route { exchange: &exchange, routing_key: &routing_key, is_own };
        let envelope = Envelope::of(properties, route, context.environment.now());
        let received_at = ReceivedAt {
            published: envelope.sent,
            received: envelope.first_seen,
            is_replay: envelope.priority() == Priority::Replay,
        };
        let payload = Payload { bytes: &body, encoding: envelope.content_encoding() };
        let prepare = AssertUnwindSafe(|| context.worker.prepare(payload, received_at));
        let prepared = std::panic::catch_unwind(prepare)
            .unwrap_or_else(|_| Prepared::Settled(Outcome::Dead(panicked(Stage::Map))));
        Self { body, redelivered, receipt, envelope, prepared, split: false, span: None }
    }

    /// It follows an earlier message into the delay queue of this level.
    pub(crate) fn deferred(self, level: usize) -> Self {
        let deferred = Outcome::Delayed { level, cause: DelayCause::BehindEarlier };
        Self { prepared: Prepared::Settled(deferred), ..self }
    }

    /// Messages that share a key run one after the other. None if it needs no call to Close.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.job().map(Job::keys).unwrap_or_default()
    }

    /// Its outcome, if that is known without Close.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        match &self.prepared {
            Prepared::Job(_) => None,
            Prepared::Settled(outcome) => Some(outcome),
        }
    }

    pub(crate) fn job(&self) -> Option<&Job> {
        match &self.prepared {
            Prepared::Job(job) => Some(job),
            Prepared::Settled(_) => None,
        }
    }

    /// When it was published, if that is known and this is its first delivery. A later delivery has also waited for
    /// other things than its turn in the queue.
    pub(crate) fn queued_since(&self) -> Option<Timestamp> {
        let came_before = self.redelivered || self.envelope.priority() != Priority::Live;
        let starts = self.job().is_some() && !self.split;
        self.envelope.sent.filter(|_| starts && !came_before)
    }

    /// A hash of what its producer sent.
    pub(crate) fn content_hash(&self) -> Uuid {
        self.envelope.content_hash(&self.body)
    }

    /// Whether it can be merged with `first`, which it directly follows.
    pub(crate) fn can_merge_with(&self, first: &Self, worker: &Worker) -> bool {
        let jobs = first.job().zip(self.job()).filter(|_| !first.split && !self.split);
        jobs.is_some_and(|(first, next)| worker.can_merge(first, next))
    }
}

/// The dead letter of a message whose work panicked.
pub(crate) fn panicked(stage: Stage) -> DeadLetter {
    let error = format!("close-sync {VERSION} panicked at {}", panic_hook::last_location());
    DeadLetter { reason: Reason::Internal, stage, error, field: None, decision: None, response: None }
}
