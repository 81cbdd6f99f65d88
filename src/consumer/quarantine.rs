//! The quarantine: settles a message that RabbitMQ does not let close-sync publish again.
//!
//! A message whose successor ends the channel or the connection would return to the queue and do the same to the next
//! session, for ever, and all other messages would wait. Several things can cause this: properties that RabbitMQ takes
//! from one protocol and refuses from another, a limit that was lowered, a defect of either side. So the cause does not
//! matter here. What counts is that a message was in flight when RabbitMQ ended the channel:
//!
//! 1. Its successor is published like any other. RabbitMQ ends the channel, and the session ends with it.
//! 2. At the next delivery the successor is published bare ([`Envelope::bare`]), alone on a connection of its own. If
//!    RabbitMQ accepts it, the message is settled. Messages that were in flight with the one at fault end here.
//! 3. If RabbitMQ ends that connection too, the message is rejected: the work queue's dead-letter exchange takes it,
//!    with everything its producer sent and without the reason.
//!
//! A panic while a message is settled counts like a refusal.
//!
//! A connection that only breaks is no evidence against a message. One that breaks again and again with the same message
//! in flight is.
//!
//! The records last from session to session, and end with the process. With a standby, each process needs one delivery
//! to learn.
//!
//! [`Envelope::bare`]: crate::amqp::envelope::Envelope::bare

use moka::sync::Cache;
use uuid::Uuid;

use crate::amqp::BrokerError;

/// The limit of messages with a record. Beyond it the oldest are forgotten and start over.
const CAPACITY: u64 = 10_000;
/// The points from which on a message is published bare.
const BARE_FROM: u32 = 5;
/// The points from which on it is rejected.
const REJECT_FROM: u32 = 10;

/// What is known against messages, by the hash of their content. Clones share it.
#[derive(Clone, Debug)]
pub struct Quarantine(Cache<Uuid, u32>);

/// How to publish the successor of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    Normal,
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
}

impl Evidence {
    /// `None` if the error is no evidence against a message.
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
            | BrokerError::Unroutable { .. }
            | BrokerError::Unconfirmed(_) => None,
        }
    }

    fn points(self) -> u32 {
        match self {
            Self::Refused => 5,
            Self::Broke => 1,
        }
    }
}

impl Default for Quarantine {
    fn default() -> Self {
        Self(Cache::new(CAPACITY))
    }
}

impl Quarantine {
    pub(crate) fn treatment(&self, message: Uuid) -> Treatment {
        match self.0.get(&message).unwrap_or_default() {
            0..BARE_FROM => Treatment::Normal,
            BARE_FROM..REJECT_FROM => Treatment::Bare,
            REJECT_FROM.. => Treatment::Reject,
        }
    }

    /// Records evidence against a message whose successor was in flight.
    pub(crate) fn suspect(&self, message: Uuid, evidence: Evidence) {
        let add = |known: Option<moka::Entry<Uuid, u32>>| {
            known.map_or(0, moka::Entry::into_value).saturating_add(evidence.points())
        };
        self.0.entry(message).and_upsert_with(add);
    }

    /// The message is settled.
    pub(crate) fn forget(&self, message: Uuid) {
        self.0.invalidate(&message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_message_is_published_bare_and_then_rejected() {
        let (quarantine, message) = (Quarantine::default(), Uuid::from_u128(1));
        assert_eq!(quarantine.treatment(message), Treatment::Normal);
        quarantine.suspect(message, Evidence::Refused);
        assert_eq!(quarantine.treatment(message), Treatment::Bare);
        quarantine.suspect(message, Evidence::Refused);
        assert_eq!(quarantine.treatment(message), Treatment::Reject);
        assert_eq!(quarantine.treatment(Uuid::from_u128(2)), Treatment::Normal, "its neighbour");
        quarantine.forget(message);
        assert_eq!(quarantine.treatment(message), Treatment::Normal);
    }

    #[test]
    fn a_connection_has_to_break_several_times_with_a_message_in_flight() {
        let (quarantine, message) = (Quarantine::default(), Uuid::from_u128(1));
        for (times, treatment) in [(4, Treatment::Normal), (5, Treatment::Bare), (1, Treatment::Reject)] {
            for _ in 0..times {
                quarantine.suspect(message, Evidence::Broke);
            }
            assert_eq!(quarantine.treatment(message), treatment);
        }
    }
}
