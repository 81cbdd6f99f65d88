//! The port between the consumer and a broker: what the loop needs of one, in a few verbs.
//!
//! `connections` implements it with lapin. Unit tests and the model in virtual time implement it with queues
//! in memory, so that they run the same loop. Of lapin's types it uses only the properties of a message, which are plain values.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use lapin::BasicProperties;

use crate::amqp::publisher::Outgoing;
use crate::amqp::{BrokerError, JournalState};

/// A consumer on the work queue, and the channels to publish with.
pub trait Broker: Send {
    /// Waits for the next event. Cancel safe. Not called again after [`BrokerEvent::Lost`].
    fn next_event(&mut self) -> impl Future<Output = BrokerEvent> + Send;

    /// From here on [`Broker::next_event`] returns what happens to the connections, and no deliveries.
    fn stop_receiving(&mut self);

    /// The channels to publish with.
    fn publishers(&self) -> Publishers;

    /// Whether there is a journal.
    fn journal(&self) -> &JournalState;

    /// Reads the journal from here on. Its messages are events from then on. Ends an earlier reading.
    fn read_journal(&mut self, from: ReadFrom);

    /// How long the process may be suspended before the broker gives the queue to another worker.
    fn stall_limit(&self) -> Duration;

    /// Closes the channel and the connections. Deliveries that were not acked return to the queue.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// What happens at the broker.
pub enum BrokerEvent {
    /// A message was delivered.
    Delivery(Box<Delivery>),
    /// A message of the journal was read.
    Journal(JournalMessage),
    /// The journal cannot be read. Its reading has ended.
    JournalFailed(BrokerError),
    /// A connection or the consumer is gone.
    Lost(BrokerError),
    /// The broker raised an alarm for this reason, or cleared it.
    Alarm(Option<String>),
    /// An exchange or a queue is missing, or all of them are there again.
    Missing(Option<BrokerError>),
}

/// A message as the broker delivers it.
pub struct Delivery {
    /// The properties and headers.
    pub properties: BasicProperties,
    /// The exchange it was published to.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// It was delivered before.
    pub redelivered: bool,
    /// The body.
    pub body: Vec<u8>,
    /// Settles it.
    pub receipt: Box<dyn Receipt>,
}

/// Settles a delivery. Returns `Ok(false)` where its channel is gone: the broker delivers the message again.
pub trait Receipt: Send + Sync {
    /// Removes the message from the queue.
    fn ack(&self) -> BoxFuture<'_, Result<bool, BrokerError>>;

    /// Has the broker dead-letter the message.
    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>>;
}

/// Publishes persistent and mandatory messages.
pub trait Publish: Send + Sync {
    /// Returns `Ok` once the broker has confirmed the message.
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>>;
}

/// The channels of a session to publish with. Outcome events have channels of their own: the broker closes a channel
/// for a missing permission or exchange, and successors must go on.
#[derive(Clone)]
pub struct Publishers {
    /// Successors: messages for delay queues and the dead-letter queue.
    pub successors: Arc<dyn Publish>,
    /// Successors that may end their connection, one at a time.
    pub quarantine: Arc<dyn Publish>,
    /// Entries of the journal.
    pub journal: Arc<dyn Publish>,
    /// Outcome events for replays.
    pub replays: Arc<dyn Publish>,
    /// Outcome events for producers.
    pub producers: Arc<dyn Publish>,
}

/// A message of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalMessage {
    /// Its position in the log. The first message has 0.
    pub position: u64,
    pub body: Vec<u8>,
}

/// Where reading begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// Near the last message.
    Last,
    /// The message at this position, or the first one after it.
    Position(u64),
}
