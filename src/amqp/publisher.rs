//! Publishing with certainty: persistent, mandatory, confirmed.
//!
//! [`Publisher::publish`] returns `Ok` only when the broker has taken responsibility for the message
//! in a queue. Anything else means "perhaps": the original must be kept.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};

use crate::amqp::BrokerError;

/// How long a confirm may take. During an alarm the broker takes nothing; the original is held then.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// It may have been taken, or will be once an alarm clears.
pub const UNANSWERED: BrokerError = BrokerError::Unconfirmed("no answer in time, is an alarm raised?");

/// AMQP's mark for a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// A channel in confirm mode. Clones share it; many publishes may be under way at once.
#[derive(Clone, Debug)]
pub struct Publisher(Channel);

impl Publisher {
    /// Opens the channel.
    pub async fn new(connection: &Connection) -> Result<Self, BrokerError> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self(channel))
    }

    /// Whether it can be used: the broker closes it for what it refuses.
    pub fn is_open(&self) -> bool {
        self.0.status().connected()
    }

    /// Publishes and waits for the confirm.
    pub async fn publish(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<(), BrokerError> {
        let publish = async { self.send(exchange, key, body, properties).await?.confirmed().await };
        // Giving up does not withdraw it: it may still be sent once an alarm clears.
        tokio::time::timeout(PATIENCE, publish).await.unwrap_or(Err(UNANSWERED))
    }

    /// Publishes without waiting for the confirm: messages sent one after the other keep their order.
    pub async fn send(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<Sent, BrokerError> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = properties.with_delivery_mode(PERSISTENT);
        let confirm = self.0.basic_publish(exchange.into(), key.into(), options, body, properties).await?;
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
    /// Waits until the broker has taken the message.
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
