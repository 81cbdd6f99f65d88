//! Taking dead letters off the queue, deciding on each, and giving back what is to stay.
//!
//! **In their places.** They are consumed, and go back when the channel is closed: so they return in the order they
//! came, however the process ends. `basic.get` would scramble them, and so would giving back more than 32 at a time
//! with `basic.nack` (rabbitmq.md §5.4; measured on 3.10.8). The consumer may take exactly as many as were there at
//! the start and is cancelled after them. Each look counts as a delivery, of which the queue allows a million.
//!
//! **One at a time.** While one operator has taken everything, another would see an empty queue. So whoever looks
//! holds an exclusive queue of a known name meanwhile, which RabbitMQ takes away with the connection: a killed
//! process locks nobody out. A look at 10,000 takes a second, and the others wait for it.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, DeliveryTag, FieldTable};
use lapin::{Acker, Channel, Connection, ErrorKind};
use tokio::time::Instant;

use super::letter::DeadLetter;
use crate::amqp::{BrokerError, LAST_ACKS, Settings, close, in_time, topology};

/// What to do with one dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Give it back.
    Back,
    /// Keep it in hand for what comes next.
    Hold,
    /// Delete it.
    Remove,
}

/// How far a look has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Another operator looks; it is our turn afterwards.
    Waiting,
    /// One of so many was looked at.
    Looked {
        /// Dead letters at the start.
        of: u32,
    },
}

/// Whoever wants to follow it.
pub type Watch<'a> = dyn FnMut(Step) + Send + 'a;

/// An operator's connection to the broker.
pub(super) struct Operator<'a> {
    settings: &'a Settings,
    pub(super) connection: Connection,
}

/// What came of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sifted {
    /// Dead letters looked at.
    pub found: usize,
    /// Those deleted.
    pub removed: usize,
    /// Somebody replays: what they have in hand was not among them.
    pub replaying: bool,
}

/// All dead letters, while nobody else can look at any.
pub(super) struct Hand {
    sifted: Sifted,
    /// Those held, oldest first.
    held: VecDeque<Held>,
    /// Those that go back, in their order.
    back: Vec<DeliveryTag>,
    channel: Channel,
    desk: Option<Channel>,
    desk_name: String,
}

/// One that is held.
pub(super) struct Held {
    pub(super) letter: DeadLetter,
    acker: Acker,
}

/// Their bodies are in memory until they are looked at.
const AT_A_TIME: u16 = 2000;
/// Nothing comes any more: somebody else took the rest, or the queue lost it.
const QUIET: Duration = Duration::from_secs(5);
/// How long another operator is waited for.
const TURN: Duration = Duration::from_mins(2);

/// Looks at all dead letters, and does with each what `decide` says.
///
/// # Errors
/// When the broker is gone: then everything is in its place, but what was deleted.
pub async fn sift(
    settings: &Settings,
    decide: impl FnMut(&DeadLetter) -> Fate + Send,
    watch: &mut Watch<'_>,
) -> Result<Sifted, BrokerError> {
    let operator = Operator::connect(settings, "close-sync dlq").await?;
    let replaying = is_claimed(&operator.connection, &settings.replay()).await?;
    let hand = operator.take(decide, watch).await?;
    let sifted = Sifted { replaying, ..hand.sifted };
    hand.close().await;
    operator.leave().await;
    Ok(sifted)
}

impl<'a> Operator<'a> {
    /// Connects, visible in RabbitMQ's management under `name`.
    pub(super) async fn connect(settings: &'a Settings, name: &str) -> Result<Self, BrokerError> {
        Ok(Self { settings, connection: settings.connect(name).await? })
    }

    /// Takes all dead letters, and deletes those of which `decide` says so.
    pub(super) async fn take(
        &self,
        decide: impl FnMut(&DeadLetter) -> Fate + Send,
        watch: &mut Watch<'_>,
    ) -> Result<Hand, BrokerError> {
        let busy = "another operator has been looking at the dead letters for two minutes: try again later";
        let name = self.settings.desk();
        let desk = claim(&self.connection, &name, TURN, busy, &mut || watch(Step::Waiting)).await?;
        let channel = self.connection.create_channel().await?;
        let mut hand = Hand {
            sifted: Sifted { found: 0, removed: 0, replaying: false },
            held: VecDeque::new(),
            back: Vec::new(),
            channel,
            desk: Some(desk),
            desk_name: name,
        };
        match self.fill(&mut hand, decide, watch).await {
            Ok(()) => Ok(hand),
            Err(error) => {
                hand.close().await;
                Err(error)
            }
        }
    }

    async fn fill(
        &self,
        hand: &mut Hand,
        mut decide: impl FnMut(&DeadLetter) -> Fate + Send,
        watch: &mut Watch<'_>,
    ) -> Result<(), BrokerError> {
        let depth = in_time(topology::depth(&self.connection, &self.settings.dead())).await?;
        let ready = depth.map_or(0, |depth| depth.ready);
        let mut removed = Vec::new();
        while let Some(left) = usize::try_from(ready).unwrap_or(usize::MAX).checked_sub(hand.sifted.found)
            && left > 0
        {
            // So many are on their way to us at a time. They stay this consumer's until they are settled; the next one
            // goes on from there, with a tag that sorts behind: in the order of tags they are given back.
            let credit = u16::try_from(left).unwrap_or(u16::MAX).min(AT_A_TIME);
            let mut took = 0;
            let tag = format!("look-{:09}", hand.sifted.found);
            let (queue, options) = (self.settings.dead(), BasicConsumeOptions::default());
            let mut deliveries = in_time(async {
                hand.channel.basic_qos(credit, BasicQosOptions::default()).await?;
                let none = FieldTable::default();
                Ok(hand.channel.basic_consume(queue.into(), tag.as_str().into(), options, none).await?)
            })
            .await?;
            while took < credit
                && let Ok(delivery) = tokio::time::timeout(QUIET, deliveries.next()).await
            {
                let delivery = delivery.ok_or(BrokerError::Cancelled)??;
                took += 1;
                let letter = DeadLetter::read(&delivery);
                match decide(&letter) {
                    Fate::Back => hand.back.push(delivery.delivery_tag),
                    Fate::Hold => hand.held.push_back(Held { letter, acker: delivery.acker }),
                    Fate::Remove => removed.push(delivery.delivery_tag),
                }
                watch(Step::Looked { of: ready });
            }
            hand.sifted.found += usize::from(took);
            // Before anything is given back: it would come again at once.
            let cancel = hand.channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default());
            in_time(async { Ok(cancel.await?) }).await?;
            if took < credit {
                break;
            }
        }
        for tag in &removed {
            hand.channel.basic_ack(*tag, BasicAckOptions::default()).await?;
        }
        hand.sifted.removed = removed.len();
        hand.held.make_contiguous().sort_by_key(|held| held.letter.failed_at);
        Ok(())
    }

    /// Closes the connection.
    pub(super) async fn leave(&self) {
        close(&self.connection).await;
    }
}

impl Hand {
    /// Takes the oldest of those held.
    pub(super) fn next(&mut self) -> Option<Held> {
        self.held.pop_front()
    }

    /// Deletes those that are held.
    pub(super) async fn remove_held(&mut self) -> Result<(), BrokerError> {
        while let Some(held) = self.next() {
            held.remove().await?;
        }
        Ok(())
    }

    /// Gives back all that is not held, and lets others look: what is held, they do not see. Those given back may
    /// have another order in the queue afterwards.
    pub(super) async fn let_go(&mut self) -> Result<(), BrokerError> {
        for tag in std::mem::take(&mut self.back) {
            let back = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            self.channel.basic_nack(tag, back).await?;
        }
        self.leave_desk().await;
        Ok(())
    }

    /// Gives back all that is left, and lets others look.
    pub(super) async fn close(mut self) {
        tokio::time::sleep(LAST_ACKS).await;
        let _ = self.channel.close(200, "done".into()).await;
        self.leave_desk().await;
    }

    async fn leave_desk(&mut self) {
        let Some(desk) = self.desk.take() else { return };
        // What was given back is there for the next one.
        tokio::time::sleep(LAST_ACKS).await;
        let _ = desk.queue_delete(self.desk_name.as_str().into(), QueueDeleteOptions::default()).await;
        let _ = desk.close(200, "done".into()).await;
    }
}

impl Held {
    /// Takes it off the queue for good.
    pub(super) async fn remove(self) -> Result<(), BrokerError> {
        let removed = self.acker.ack(BasicAckOptions::default()).await?;
        if removed { Ok(()) } else { Err(BrokerError::Lost("the dead letters in hand went back".into())) }
    }
}

/// Declares an exclusive queue that only one connection can have at a time, and waits for it if another has it:
/// RabbitMQ tells nobody when it goes, so it is asked again and again.
pub(super) async fn claim(
    connection: &Connection,
    name: &str,
    patience: Duration,
    busy: &'static str,
    waiting: &mut (dyn FnMut() + Send),
) -> Result<Channel, BrokerError> {
    const AGAIN: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + patience;
    loop {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        // A virtual host may have another kind by default, which cannot be exclusive.
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("classic".into()));
        match channel.queue_declare(name.into(), options, arguments).await {
            Ok(_) => return Ok(channel),
            Err(error) if is_locked(&error) => {
                if Instant::now() > deadline {
                    return Err(BrokerError::Busy(busy));
                }
                waiting();
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(BrokerError::from_lapin(&error, &format!("queue `{name}`"))),
        }
    }
}

/// Whether another connection has such a queue.
pub(super) async fn is_claimed(connection: &Connection, name: &str) -> Result<bool, BrokerError> {
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let looked = channel.queue_declare(name.into(), options, FieldTable::default()).await;
    Ok(looked.is_err_and(|error| is_locked(&error)))
}

/// AMQP's reply code 405, resource locked.
fn is_locked(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 405)
}
