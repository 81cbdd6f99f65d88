//! Confirmed publishing: persistent, mandatory, with a publisher confirm.
//!
//! [`Publisher::publish_with_timeout`] returns `Ok` only when the broker has stored the message in a queue. After any other result
//! the message may or may not be stored, so the caller keeps the original.
//!
//! **Messages that are in flight together.** A task owns the channel, because lapin does not keep such messages apart:
//!
//! - RabbitMQ returns an unroutable message before it confirms it, and does not say which message it is. lapin hands what
//!   was returned to whichever confirm it processes next, often that of a stored message. The task looks at each confirm
//!   in the order of their arrival (`InFlight`), also at those for which no caller waits any more.
//! - lapin numbers a message before it queues it. Two threads that publish at the same time can get each other's confirm.
//!
//! **A refused message.** The broker closes the channel when a message is larger than its `max_message_size`, or has
//! properties that it does not accept, without saying which message it was. All publishes that have no confirm yet fail
//! with [`BrokerError::Rejected`]. The consumer finds out which one it was (`consumer/quarantine.rs`).

use std::collections::HashMap;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::message::{BasicReturnMessage, Delivery};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::{mpsc, oneshot};

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
    submit: mpsc::UnboundedSender<Submitted>,
}

impl Publisher {
    /// Opens the channel.
    pub async fn new(connection: &Connection) -> Result<Self, BrokerError> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (submit, submitted) = mpsc::unbounded_channel();
        tokio::spawn(publish(channel.clone(), submitted));
        Ok(Self { channel, submit })
    }

    /// Whether the channel is open. The broker closes it after an error.
    pub fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Publishes and waits for the confirm, up to [`PATIENCE`].
    pub async fn publish_with_timeout(&self, message: Outgoing<'_>) -> Result<(), BrokerError> {
        // A time-out does not withdraw the message: it may still be sent once an alarm clears.
        tokio::time::timeout(PATIENCE, self.send(message).confirmed()).await.unwrap_or(Err(UNANSWERED))
    }

    /// Publishes without waiting for the confirm. Messages sent one after the other keep their order.
    pub fn send(&self, message: Outgoing<'_>) -> Sent {
        let Outgoing { exchange, key, body, properties } = message;
        let (answer, answered) = oneshot::channel();
        let properties = properties.with_delivery_mode(PERSISTENT);
        let route = Route { exchange: exchange.to_owned(), key: key.to_owned() };
        // The task ends after the last publisher.
        let _ = self.submit.send(Submitted { route, body: body.to_owned(), properties, answer });
        Sent(answered)
    }
}

/// A message on its way to the broker.
pub struct Sent(oneshot::Receiver<Result<(), BrokerError>>);

impl Sent {
    /// Waits until the broker has stored the message.
    pub async fn confirmed(self) -> Result<(), BrokerError> {
        self.0.await.unwrap_or_else(|_| Err(BrokerError::Lost("the publisher ended".into())))
    }
}

struct Submitted {
    route: Route,
    body: Vec<u8>,
    properties: BasicProperties,
    answer: oneshot::Sender<Result<(), BrokerError>>,
}

#[derive(PartialEq, Eq)]
struct Route {
    exchange: String,
    key: String,
}

/// Publishes in order until the last publisher is dropped, and answers once the broker has.
async fn publish(channel: Channel, mut submitted: mpsc::UnboundedReceiver<Submitted>) {
    let mut in_flight = InFlight::default();
    // Polls in the order in which they were woken, so confirms come out in the order in which lapin processed them.
    let mut confirms = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            Some((number, confirm)) = confirms.next() => match confirm {
                Ok(Confirmation::Ack(returned)) => in_flight.acked(number, returned.map(route)),
                Ok(Confirmation::Nack(returned)) => {
                    let error = BrokerError::Unconfirmed("a queue refused it, it is full");
                    in_flight.failed(number, returned.map(route), error);
                }
                Ok(Confirmation::NotRequested) => {
                    in_flight.failed(number, None, BrokerError::Unconfirmed("the channel has no confirms"));
                }
                Err(error) => in_flight.failed(number, None, BrokerError::from(error)),
            },
            Some(Submitted { route, body, properties, answer }) = submitted.recv() => {
                let (channel, exchange, key) = (&channel, route.exchange.as_str().into(), route.key.as_str().into());
                let number = in_flight.add(route, answer);
                confirms.push(async move {
                    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                    let sent = channel.basic_publish(exchange, key, options, &body, properties).await;
                    (number, match sent {
                        Ok(confirm) => confirm.await,
                        Err(error) => Err(error),
                    })
                });
            }
            else => break,
        }
    }
}

fn route(returned: BasicReturnMessage) -> Route {
    let Delivery { exchange, routing_key, .. } = returned.delivery;
    Route { exchange: exchange.to_string(), key: routing_key.to_string() }
}

/// The messages without a confirm. Pure but for the answers.
///
/// A confirm takes the oldest of the returned messages that no confirm has taken. So when a stored message's confirm
/// takes none, none of them is this message: if it was returned, an earlier confirm took it. When a confirm takes the
/// message of another, its own may still wait there: then its fate is unknown.
#[derive(Default)]
struct InFlight {
    next: u64,
    messages: HashMap<u64, Message>,
}

struct Message {
    route: Route,
    was_returned: bool,
    answer: oneshot::Sender<Result<(), BrokerError>>,
}

impl InFlight {
    fn add(&mut self, route: Route, answer: oneshot::Sender<Result<(), BrokerError>>) -> u64 {
        self.next += 1;
        self.messages.insert(self.next, Message { route, was_returned: false, answer });
        self.next
    }

    /// The broker has acked a message. `returned` is the route of the returned message that came with it.
    fn acked(&mut self, number: u64, returned: Option<Route>) {
        let is_alone = returned.is_none();
        let Some(message) = self.take(number, returned) else { return };
        let result = if message.was_returned {
            let Route { exchange, key } = message.route;
            Err(BrokerError::Unroutable { exchange, key })
        } else if is_alone {
            Ok(())
        } else {
            Err(BrokerError::Unconfirmed("RabbitMQ returned another message at the same time"))
        };
        // The caller may have given up.
        let _ = message.answer.send(result);
    }

    fn failed(&mut self, number: u64, returned: Option<Route>, error: BrokerError) {
        if let Some(message) = self.take(number, returned) {
            let _ = message.answer.send(Err(error));
        }
    }

    /// Messages of one route share its fate, so which of them was returned does not matter.
    fn take(&mut self, number: u64, returned: Option<Route>) -> Option<Message> {
        if let Some(route) = returned {
            let same = self.messages.values_mut().filter(|message| message.route == route);
            same.for_each(|message| message.was_returned = true);
        }
        self.messages.remove(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(key: &str) -> Route {
        Route { exchange: "close-sync.retry".into(), key: key.into() }
    }

    /// Two messages, and a function for their answers.
    struct Two {
        in_flight: InFlight,
        answers: [oneshot::Receiver<Result<(), BrokerError>>; 2],
    }

    const FIRST: u64 = 1;
    const SECOND: u64 = 2;

    impl Two {
        fn new(keys: [&str; 2]) -> Self {
            let mut in_flight = InFlight::default();
            let answers = keys.map(|key| {
                let (answer, answered) = oneshot::channel();
                in_flight.add(route(key), answer);
                answered
            });
            Self { in_flight, answers }
        }

        fn answers(self) -> [Answer; 2] {
            assert!(self.in_flight.messages.is_empty());
            self.answers.map(|mut answer| match answer.try_recv().unwrap() {
                Ok(()) => Answer::Stored,
                Err(BrokerError::Unroutable { .. }) => Answer::Returned,
                Err(BrokerError::Unconfirmed(_)) => Answer::Unknown,
                Err(error) => panic!("{error}"),
            })
        }
    }

    #[derive(Debug, PartialEq)]
    enum Answer {
        Stored,
        Returned,
        Unknown,
    }

    #[test]
    fn a_confirm_without_a_returned_message_means_stored() {
        let mut two = Two::new(["now", "30s"]);
        two.in_flight.acked(SECOND, None);
        two.in_flight.acked(FIRST, None);
        assert_eq!(two.answers(), [Answer::Stored, Answer::Stored]);
    }

    #[test]
    fn a_returned_message_is_not_stored_when_the_confirm_of_another_carries_it() {
        let full = BrokerError::Unconfirmed("full");
        // What the second message's confirm says beside carrying the first, and what the first message's confirm carries.
        for (refused, carried) in [(None, None), (None, Some("30s")), (Some(full), None)] {
            let mut two = Two::new(["now", "30s"]);
            match refused {
                None => two.in_flight.acked(SECOND, Some(route("now"))),
                Some(error) => two.in_flight.failed(SECOND, Some(route("now")), error),
            }
            two.in_flight.acked(FIRST, carried.map(route));
            assert_eq!(two.answers(), [Answer::Returned, Answer::Unknown], "{carried:?}");
        }
    }
}
