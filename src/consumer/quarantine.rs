//! The quarantine: settles a message that RabbitMQ does not let close-sync publish again.
//!
//! A message whose successor ends the channel or the connection would return to the queue and do the same to the next
//! session, for ever, and all other messages would wait. Several things can cause this: properties that RabbitMQ takes
//! from one protocol and refuses from another, a limit that was lowered, a defect of either side. So the cause does not
//! matter here. What counts is that a message was in flight when RabbitMQ ended the channel:
//!
//! 1. Its successor is published like any other. RabbitMQ ends the channel, and the session ends with it.
//! 2. At the next delivery the successor is published alone, on a connection of its own. Messages that were in flight with
//!    the one at fault are settled here, with all their headers. If RabbitMQ ends that connection too, the successor is
//!    published bare ([`Envelope::bare`]).
//! 3. If RabbitMQ still ends the connection, the message is rejected: the work queue's dead-letter exchange takes it, with
//!    everything its producer sent and without the reason.
//!
//! One broken connection does not count against a message. Several do, if the same message was in flight each time. An
//! error of RabbitMQ itself, such as a queue that has crashed, counts like a broken connection.
//!
//! A message whose settlement panics ends the session, too. After two panics it is rejected.
//!
//! The records last from session to session, and end with the process or once the message is settled. With a standby,
//! each process needs one delivery to learn.
//!
//! [`Envelope::bare`]: crate::amqp::envelope::Envelope::bare

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use uuid::Uuid;

use crate::amqp::BrokerError;

/// The limit of messages with a record. Beyond it the oldest are forgotten and start over.
const CAPACITY: u64 = 10_000;
/// A message returns at once unless consumption pauses.
const LIFETIME: Duration = Duration::from_hours(1);
/// The points for a refusal. A message with so many is published alone.
const REFUSAL: u32 = 5;
/// The points from which on it is published bare.
const BARE_FROM: u32 = 2 * REFUSAL;
/// The points from which on it is rejected.
const REJECT_FROM: u32 = 3 * REFUSAL;
/// The panics from which on it is rejected.
const MAX_PANICS: u32 = 2;

/// What is known against messages, by a hash of what their producers sent. Clones share it.
#[derive(Clone, Debug)]
pub struct Quarantine {
    records: Cache<Uuid, Record>,
    /// Whether there ever was a record: hashing messages is expensive, and almost never needed.
    used: Arc<AtomicBool>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    points: u32,
    panics: u32,
}

/// How to publish the successor of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    Normal,
    Alone,
    Bare,
    Reject,
}

/// What happened while a successor was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// RabbitMQ ended the channel or the connection because of what was sent.
    Refused,
    /// The connection broke.
    Broke,
    /// Settling the message panicked.
    Panicked,
}

impl Evidence {
    /// `None` if the error does not count against a message.
    pub(crate) fn of(error: &BrokerError) -> Option<Self> {
        match error {
            BrokerError::Rejected(_) => Some(Self::Refused),
            BrokerError::Lost(_) => Some(Self::Broke),
            BrokerError::Unreachable(_)
            | BrokerError::Tls(_)
            | BrokerError::Refused(_)
            | BrokerError::TooOld(_)
            | BrokerError::Conflict { .. }
            | BrokerError::Missing(_)
            | BrokerError::Incomplete(_)
            | BrokerError::Busy(_)
            | BrokerError::Forbidden(_)
            | BrokerError::MayNotDeclare(_)
            | BrokerError::StoodStill(_)
            | BrokerError::Cancelled
            | BrokerError::TakenOver
            | BrokerError::Unroutable { .. }
            | BrokerError::Unconfirmed(_) => None,
        }
    }
}

impl Default for Quarantine {
    fn default() -> Self {
        let records = Cache::builder()
            .max_capacity(CAPACITY)
            .eviction_policy(EvictionPolicy::lru())
            .time_to_live(LIFETIME)
            .build();
        Self { records, used: Arc::default() }
    }
}

impl Quarantine {
    /// How to publish the successor of this message.
    pub(crate) fn treatment(&self, message: impl Fn() -> Uuid) -> Treatment {
        match self.record(message).points {
            0..REFUSAL => Treatment::Normal,
            REFUSAL..BARE_FROM => Treatment::Alone,
            BARE_FROM..REJECT_FROM => Treatment::Bare,
            REJECT_FROM.. => Treatment::Reject,
        }
    }

    /// Whether settling this message has panicked too often.
    pub(crate) fn panics(&self, message: impl Fn() -> Uuid) -> bool {
        self.record(message).panics >= MAX_PANICS
    }

    /// Records evidence against a message.
    pub(crate) fn suspect(&self, message: impl Fn() -> Uuid, evidence: Evidence) {
        self.used.store(true, Ordering::Relaxed);
        self.records.entry(message()).and_upsert_with(|known| {
            let Record { points, panics } = known.map_or_else(Record::default, moka::Entry::into_value);
            match evidence {
                Evidence::Refused => Record { points: points.saturating_add(REFUSAL), panics },
                Evidence::Broke => Record { points: points.saturating_add(1), panics },
                Evidence::Panicked => Record { points, panics: panics.saturating_add(1) },
            }
        });
    }

    /// The message is settled.
    pub(crate) fn forget(&self, message: impl Fn() -> Uuid) {
        if self.used.load(Ordering::Relaxed) {
            self.records.invalidate(&message());
        }
    }

    fn record(&self, message: impl Fn() -> Uuid) -> Record {
        if !self.used.load(Ordering::Relaxed) {
            return Record::default();
        }
        self.records.get(&message()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: u128) -> impl Fn() -> Uuid + Copy {
        move || Uuid::from_u128(number)
    }

    #[test]
    fn a_refused_message_is_published_alone_then_bare_and_then_rejected() {
        let (quarantine, guilty) = (Quarantine::default(), message(1));
        assert_eq!(quarantine.treatment(guilty), Treatment::Normal);
        for treatment in [Treatment::Alone, Treatment::Bare, Treatment::Reject] {
            quarantine.suspect(guilty, Evidence::Refused);
            assert_eq!(quarantine.treatment(guilty), treatment);
        }
        assert_eq!(quarantine.treatment(message(2)), Treatment::Normal, "its neighbour");
        quarantine.forget(guilty);
        assert_eq!(quarantine.treatment(guilty), Treatment::Normal);
    }

    #[test]
    fn a_connection_has_to_break_several_times_with_a_message_in_flight() {
        let quarantine = Quarantine::default();
        for (times, treatment) in
            [(4, Treatment::Normal), (1, Treatment::Alone), (5, Treatment::Bare), (5, Treatment::Reject)]
        {
            for _ in 0..times {
                quarantine.suspect(message(1), Evidence::Broke);
            }
            assert_eq!(quarantine.treatment(message(1)), treatment);
        }
    }

    #[test]
    fn two_panics_are_too_many() {
        let quarantine = Quarantine::default();
        quarantine.suspect(message(1), Evidence::Panicked);
        assert!(!quarantine.panics(message(1)));
        quarantine.suspect(message(1), Evidence::Panicked);
        assert!(quarantine.panics(message(1)) && quarantine.treatment(message(1)) == Treatment::Normal);
    }
}
