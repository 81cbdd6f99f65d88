//! Confirmed publishing: persistent, mandatory, with a publisher confirm.
//!
//! [`Publisher::publish_with_timeout`] returns `Ok` only when the broker has stored the message in a queue. After any other result
//! the message may or may not be stored, so the caller keeps the original.
//!
//! **Too large.** The broker answers a body above its `max_message_size` with 406 and closes the channel, without
//! saying which message it was. close-sync only publishes on this channel, so a 406 on it has no other common cause. All
//! publishes that have no confirm yet fail with it. The largest of them exceeds the limit for certain, whichever it was
//! that the broker refused: it gets [`BrokerError::TooLarge`]. The others get [`BrokerError::OtherTooLarge`] and can be
//! published again. AMQP also answers with 406 for a wrong `user_id` or `expiration`; successors have neither.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind, PublisherConfirm};

use crate::amqp::error::BrokerError;

/// How long a confirm may take. During an alarm the broker accepts nothing, and the original is kept.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The broker may have stored the message, or may store it once an alarm clears.
pub const UNANSWERED: BrokerError = BrokerError::Unconfirmed("no answer in time, is an alarm raised?");

/// AMQP's delivery mode for a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// The reply code of AMQP 0-9-1 with which the broker refuses a body above its limit.
const PRECONDITION_FAILED: u16 = 406;

/// A message to publish.
#[derive(Clone, Debug)]
pub struct Outgoing<'a> {
    pub exchange: &'a str,
    /// The routing key.
    pub key: &'a str,
    pub body: &'a [u8],
    pub properties: BasicProperties,
}

/// A channel in confirm mode. Clones share it; many publishes may be in flight at once.
#[derive(Clone, Debug)]
pub struct Publisher {
    channel: Channel,
    in_flight: InFlight,
}

impl Publisher {
    /// Opens the channel.
    pub async fn new(connection: &Connection) -> Result<Self, BrokerError> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { channel, in_flight: InFlight::default() })
    }

    /// Whether the channel is open. The broker closes it after an error.
    pub fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Publishes and waits for the confirm, up to [`PATIENCE`].
    pub async fn publish_with_timeout(&self, message: Outgoing<'_>) -> Result<(), BrokerError> {
        let publish = async { self.send(message).await?.confirmed().await };
        // A time-out does not withdraw the message: it may still be sent once an alarm clears.
        tokio::time::timeout(PATIENCE, publish).await.unwrap_or(Err(UNANSWERED))
    }

    /// Publishes without waiting for the confirm. Messages sent one after the other keep their order.
    pub async fn send(&self, message: Outgoing<'_>) -> Result<Sent, BrokerError> {
        let Outgoing { exchange, key, body, properties } = message;
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = properties.with_delivery_mode(PERSISTENT);
        let size = body.len();
        self.in_flight.add(size);
        let sent = self.channel.basic_publish(exchange.into(), key.into(), options, body, properties).await;
        // A body that was not sent must not count as the largest one.
        let confirm = sent.inspect_err(|_| self.in_flight.remove(size))?;
        let (exchange, key) = (exchange.to_owned(), key.to_owned());
        Ok(Sent { confirm, exchange, key, size, in_flight: self.in_flight.clone() })
    }
}

/// A message on its way to the broker.
pub struct Sent {
    confirm: PublisherConfirm,
    exchange: String,
    key: String,
    size: usize,
    in_flight: InFlight,
}

impl Sent {
    /// Waits until the broker has stored the message.
    pub async fn confirmed(self) -> Result<(), BrokerError> {
        let confirmation = match self.confirm.await {
            Ok(confirmation) => confirmation,
            Err(error) if refuses_size(&error) => {
                let bytes = self.size;
                return Err(if self.in_flight.exceeded_by(bytes) {
                    BrokerError::TooLarge(format!("{bytes} bytes, {error}"))
                } else {
                    BrokerError::OtherTooLarge
                });
            }
            Err(error) => return Err(error.into()),
        };
        self.in_flight.remove(self.size);
        match confirmation {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) => {
                Err(BrokerError::Unroutable { exchange: self.exchange, key: self.key })
            }
            Confirmation::Nack(_) => Err(BrokerError::Unconfirmed("a queue refused it, it is full")),
            Confirmation::NotRequested => Err(BrokerError::Unconfirmed("the channel has no confirms")),
        }
    }
}

fn refuses_size(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == PRECONDITION_FAILED)
}

/// The sizes of the bodies on a channel that have no confirm. One that was given up stays: the broker may still refuse
/// it.
#[derive(Clone, Debug, Default)]
struct InFlight(Arc<Mutex<Sizes>>);

#[derive(Debug, Default)]
struct Sizes {
    /// How many bodies there are of each size.
    pending: BTreeMap<usize, usize>,
    /// The largest when the broker closed the channel.
    exceeded_by: Option<usize>,
}

impl InFlight {
    fn add(&self, size: usize) {
        *self.lock().pending.entry(size).or_default() += 1;
    }

    fn remove(&self, size: usize) {
        let mut sizes = self.lock();
        if let Some(count) = sizes.pending.get_mut(&size) {
            *count -= 1;
            if *count == 0 {
                sizes.pending.remove(&size);
            }
        }
    }

    /// Whether a body of this size is the largest that had no confirm when the broker closed the channel.
    fn exceeded_by(&self, size: usize) -> bool {
        let mut sizes = self.lock();
        let largest = sizes.pending.last_key_value().map(|(size, _)| *size);
        *sizes.exceeded_by.get_or_insert(largest.unwrap_or(size)) == size
    }

    fn lock(&self) -> MutexGuard<'_, Sizes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_message_in_flight_is_too_large() {
        let in_flight = InFlight::default();
        for size in [10, 30, 20, 40, 30] {
            in_flight.add(size);
        }
        in_flight.remove(40);
        // A larger one that could not be sent any more.
        in_flight.add(60);
        in_flight.remove(60);
        assert!(!in_flight.exceeded_by(20), "a smaller one may be allowed");
        // Publishes that come after the channel was closed change nothing.
        in_flight.add(50);
        assert!(in_flight.exceeded_by(30) && !in_flight.exceeded_by(50) && !in_flight.exceeded_by(10));
    }

    #[test]
    fn a_confirmed_message_is_no_longer_in_flight() {
        let in_flight = InFlight::default();
        for size in [10, 10, 20] {
            in_flight.add(size);
        }
        in_flight.remove(20);
        in_flight.remove(10);
        assert!(in_flight.exceeded_by(10));
    }
}
