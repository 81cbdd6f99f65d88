//! The messages of a replay that were sent and have no final outcome yet.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

/// What is known about one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// RabbitMQ has not confirmed it, so its dead letter stays in the queue.
    Unconfirmed,
    /// RabbitMQ has it. Its outcome will arrive.
    Awaited,
    /// A transient failure sent it to a delay queue until then.
    Delayed(Instant),
    /// Its outcome may have been published while there was no connection.
    Missed,
}

impl Status {
    fn is_awaited(self) -> bool {
        match self {
            Self::Awaited | Self::Delayed(_) => true,
            Self::Unconfirmed | Self::Missed => false,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct InFlight {
    /// Every replay id of this run, finished or not.
    own: HashSet<Uuid>,
    open: HashMap<Uuid, Status>,
    /// A message that was sent over the current connection has finished.
    pub(super) caught_up: bool,
}

impl InFlight {
    /// Whether this run published a message with this replay id.
    pub(super) fn is_own(&self, replay: Uuid) -> bool {
        self.own.contains(&replay)
    }

    pub(super) fn is_open(&self, replay: Uuid) -> bool {
        self.open.contains_key(&replay)
    }

    pub(super) fn has_published(&self) -> bool {
        !self.own.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Messages whose outcome will arrive. They count against the limit.
    pub(super) fn awaited(&self) -> usize {
        self.open.values().filter(|status| status.is_awaited()).count()
    }

    /// Messages whose outcome may have been missed. They do not count against the limit.
    pub(super) fn missed(&self) -> usize {
        self.open.values().filter(|status| **status == Status::Missed).count()
    }

    /// Registers a message before it is published: RabbitMQ may have it although no confirm arrives.
    pub(super) fn publish(&mut self, replay: Uuid, expects_outcome: bool) {
        self.own.insert(replay);
        if expects_outcome {
            self.open.insert(replay, Status::Unconfirmed);
        }
    }

    pub(super) fn confirm(&mut self, replay: Uuid) {
        if let Some(status) = self.open.get_mut(&replay)
            && *status == Status::Unconfirmed
        {
            *status = Status::Awaited;
        }
    }

    pub(super) fn delay(&mut self, replay: Uuid, due: Instant) {
        if let Some(status) = self.open.get_mut(&replay) {
            *status = Status::Delayed(due);
        }
    }

    pub(super) fn finish(&mut self, replay: Uuid) {
        self.caught_up |= self.open.remove(&replay) == Some(Status::Awaited);
    }

    /// A new connection: outcomes that were published without one are missed.
    pub(super) fn reconnected(&mut self, now: Instant) {
        for status in self.open.values_mut() {
            match *status {
                Status::Awaited => *status = Status::Missed,
                Status::Delayed(due) if due <= now => *status = Status::Missed,
                Status::Delayed(_) | Status::Unconfirmed | Status::Missed => {}
            }
        }
        self.caught_up = false;
    }
}

/// The time by which the next outcome has to arrive. It only ever moves on.
#[derive(Debug)]
pub(super) struct Deadline {
    timeout: Option<Duration>,
    pub(super) at: Instant,
}

impl Deadline {
    pub(super) fn new(timeout: Option<Duration>, now: Instant) -> Self {
        Self { timeout, at: now }
    }

    /// Something is expected to happen at `from`: its outcome has the whole timeout after that.
    pub(super) fn extend(&mut self, from: Instant) {
        self.at = self.at.max(from + self.timeout.unwrap_or_default());
    }
}
