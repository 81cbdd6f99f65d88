//! Confirmed publishing: persistent, mandatory, with a publisher confirm.
//!
//! [`Publisher::publish_with_timeout`] returns `Ok` only when the broker has stored the message in a queue. After any other result
//! the message may or may not be stored, so the caller keeps the original.
//!
//! **A refused message.** The broker closes the channel when a message is larger than its `max_message_size`, or has
//! properties that it does not accept, without saying which message it was. All publishes that have no confirm yet fail
//! with [`BrokerError::Rejected`]. The consumer finds out which one it was (`consumer/quarantine.rs`).

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};

use crate::amqp::error::BrokerError;

/// How long a confirm may take. During an alarm the broker accepts nothing, and the original is kept.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The broker may have stored the message, or may store it once an alarm clears.
pub const UNANSWERED: BrokerError = BrokerError::Unconfirmed("no answer in time, is an alarm raised?");

/// AMQP's delivery mode for a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

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
}

impl Publisher {
    /// Opens the channel.
    pub async fn new(connection: &Connection) -> Result<Self, BrokerError> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { channel })
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
        let confirm =
            self.channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?;
        Ok(Sent { confirm, exchange: exchange.to_owned(), key: key.to_owned() })
    }
}

/// A message on its way to the broker.
pub struct Sent {
    confirm: PublisherConfirm,
    exchange: String,
    key: String,
}

impl Sent {
    /// Waits until the broker has stored the message.
    pub async fn confirmed(self) -> Result<(), BrokerError> {
        match self.confirm.await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) => {
                Err(BrokerError::Unroutable { exchange: self.exchange, key: self.key })
            }
            Confirmation::Nack(_) => Err(BrokerError::Unconfirmed("a queue refused it, it is full")),
            Confirmation::NotRequested => Err(BrokerError::Unconfirmed("the channel has no confirms")),
        }
    }
}
