//! A simulated quorum queue with a single active consumer.
//!
//! It delivers messages in order, up to a window of unacked ones. When a consumer disconnects, its unacked messages
//! return to the head in their order. Messages from delay queues return to the tail. Dead letters are kept.

use std::collections::{BTreeMap, VecDeque};

use lapin::BasicProperties;
use tokio::sync::mpsc;

/// A message. Copies have the same number.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) number: usize,
    /// The exchange it was published to last.
    pub(super) exchange: String,
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
}

impl Message {
    /// A message as a producer publishes it. The message id is the number.
    pub(super) fn new(number: usize, body: Vec<u8>) -> Self {
        let properties = BasicProperties::default().with_message_id(number.to_string().into());
        Self { number, exchange: "identify".into(), body, properties }
    }
}

/// A message that was delivered to a consumer.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) tag: u64,
    pub(super) message: Message,
}

/// The channel of a consumer. Each session has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Channel(u64);

#[derive(Debug)]
struct Consumer {
    channel: Channel,
    deliveries: mpsc::UnboundedSender<Delivery>,
    unacked: BTreeMap<u64, Message>,
    /// Acks in flight, in order.
    acks: VecDeque<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Broker {
    prefetch: usize,
    next: u64,
    ready: VecDeque<Message>,
    /// The first is active, the others are on standby.
    consumers: Vec<Consumer>,
    /// The number of messages in delay queues.
    delayed: usize,
    /// How often each message was published and acked. Both must be equal at the end.
    published: BTreeMap<usize, u32>,
    acked: BTreeMap<usize, u32>,
    /// Dead-lettered messages with their reasons.
    pub(super) dead: Vec<(usize, String)>,
}

impl Broker {
    pub(super) fn new(prefetch: usize) -> Self {
        Self { prefetch, ..Self::default() }
    }

    /// Publishes a new message at the tail.
    pub(super) fn publish(&mut self, message: Message) {
        *self.published.entry(message.number).or_default() += 1;
        self.ready.push_back(message);
        self.dispatch();
    }

    /// Puts a copy into a delay queue.
    pub(super) fn delay(&mut self, number: usize) {
        *self.published.entry(number).or_default() += 1;
        self.delayed += 1;
    }

    /// Returns a message from its delay queue to the tail.
    pub(super) fn return_from_delay(&mut self, message: Message) {
        self.delayed -= 1;
        self.ready.push_back(message);
        self.dispatch();
    }

    /// Adds a consumer. It becomes active when all earlier consumers are gone.
    pub(super) fn subscribe(&mut self) -> (Channel, mpsc::UnboundedReceiver<Delivery>) {
        let (deliveries, received) = mpsc::unbounded_channel();
        let channel = Channel(self.next());
        self.consumers.push(Consumer {
            channel,
            deliveries,
            unacked: BTreeMap::new(),
            acks: VecDeque::new(),
        });
        self.dispatch();
        (channel, received)
    }

    /// The active consumer.
    pub(super) fn active(&self) -> Option<Channel> {
        self.consumers.first().map(|consumer| consumer.channel)
    }

    /// A consumer sends an ack. It arrives later.
    pub(super) fn ack_sent(&mut self, channel: Channel, tag: u64) {
        if let Some(consumer) = self.consumer(channel) {
            consumer.acks.push_back(tag);
        }
    }

    /// The first ack in flight arrives. Returns `None` if there is none or the channel is closed.
    pub(super) fn ack_arrives(&mut self, channel: Channel) -> Option<usize> {
        let consumer = self.consumer(channel)?;
        let tag = consumer.acks.pop_front()?;
        let message = consumer.unacked.remove(&tag).expect("the ack of an unacked delivery");
        *self.acked.entry(message.number).or_default() += 1;
        self.dispatch();
        Some(message.number)
    }

    /// Removes a consumer. Its acks in flight arrive or are lost.
    pub(super) fn unsubscribe(&mut self, channel: Channel, acks_arrive: bool) {
        while acks_arrive && self.ack_arrives(channel).is_some() {}
        let Some(at) = self.consumers.iter().position(|consumer| consumer.channel == channel) else { return };
        let removed = self.consumers.remove(at);
        for (_, message) in removed.unacked.into_iter().rev() {
            self.ready.push_front(message);
        }
        self.dispatch();
    }

    /// Whether a worker has the message, or will get it, and has not acked it. An earlier ack may have been lost.
    pub(super) fn is_open(&self, number: usize) -> bool {
        let is_unacked = |consumer: &Consumer| {
            let mut unacked = consumer.unacked.iter();
            unacked.any(|(tag, message)| message.number == number && !consumer.acks.contains(tag))
        };
        self.ready.iter().any(|message| message.number == number) || self.consumers.iter().any(is_unacked)
    }

    /// Whether all messages are settled.
    pub(super) fn is_empty(&self) -> bool {
        self.delayed == 0
            && self.ready.is_empty()
            && self.consumers.iter().all(|consumer| consumer.unacked.is_empty())
    }

    /// What waits, and for whom.
    pub(super) fn digest(&self) -> Vec<Vec<usize>> {
        let numbers = |consumer: &Consumer| consumer.unacked.values().map(|message| message.number).collect();
        let ready = self.ready.iter().map(|message| message.number).collect();
        std::iter::once(ready).chain(self.consumers.iter().map(numbers)).collect()
    }

    /// Messages that were not acked as often as they were published.
    pub(super) fn unsettled(&self) -> Vec<usize> {
        let missing =
            |(number, times): (&usize, &u32)| (self.acked.get(number) != Some(times)).then_some(*number);
        self.published.iter().filter_map(missing).collect()
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn consumer(&mut self, channel: Channel) -> Option<&mut Consumer> {
        self.consumers.iter_mut().find(|consumer| consumer.channel == channel)
    }

    fn dispatch(&mut self) {
        let Self { prefetch, next, ready, consumers, .. } = self;
        let Some(active) = consumers.first_mut() else { return };
        while active.unacked.len() < *prefetch
            && let Some(message) = ready.pop_front()
        {
            *next += 1;
            active.unacked.insert(*next, message.clone());
            // A failed send is fine: the consumer is about to be unsubscribed.
            let _ = active.deliveries.send(Delivery { tag: *next, message });
        }
    }
}

#[test]
fn unacked_messages_return_in_order_and_go_to_the_next_consumer() {
    let mut broker = Broker::new(2);
    let message = |number| Message::new(number, Vec::new());
    (0..4).for_each(|number| broker.publish(message(number)));
    let (first, mut to_first) = broker.subscribe();
    let (second, mut to_second) = broker.subscribe();
    let numbers = |received: &mut mpsc::UnboundedReceiver<Delivery>| -> Vec<(u64, usize)> {
        std::iter::from_fn(|| received.try_recv().ok())
            .map(|delivery| (delivery.tag, delivery.message.number))
            .collect()
    };
    let received = numbers(&mut to_first);
    assert_eq!(received.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 1]);
    broker.ack_sent(first, received[1].0);
    assert_eq!(broker.ack_arrives(first), Some(1));
    assert_eq!(numbers(&mut to_first).len(), 1);
    assert_eq!([0, 1, 2, 3].map(|number| broker.is_open(number)), [true, false, true, true]);
    broker.ack_sent(first, received[0].0);
    assert!(!broker.is_open(0), "acked");
    broker.unsubscribe(first, false);
    assert!(broker.is_open(0), "the ack was lost");
    assert_eq!(broker.active(), Some(second));
    let received = numbers(&mut to_second);
    assert_eq!(received.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 2]);
    assert_eq!((broker.unsettled(), broker.is_empty()), (vec![0, 2, 3], false));
}
