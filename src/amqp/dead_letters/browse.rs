//! Taking dead letters off the queue, deciding on each, and giving back what is to stay.
//!
//! They are consumed, not fetched one by one: what a consumer holds goes back to its place when the process is
//! killed, what `basic.get` holds is scrambled then (rabbitmq.md §5.4). The consumer may take exactly as many as
//! were there at the start and is cancelled before the first is given back; they return in the order they came.
//! Each look counts as a delivery, of which the queue allows a million.
//!
//! **One at a time.** While one operator has taken everything, another would see an empty queue. So whoever looks
//! holds an exclusive queue of a known name meanwhile, which RabbitMQ takes away with the connection: a killed
//! process locks nobody out. A look at 10,000 takes seconds, and the others wait for it.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Acker, Channel, Connection, ErrorKind};
use tokio::time::Instant;

use super::letter::DeadLetter;
use crate::amqp::{BrokerError, LAST_ACKS, Settings, close, topology};

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
pub struct Operator<'a> {
    settings: &'a Settings,
    pub(super) connection: Connection,
}

/// What came of a look.
pub struct Sifted {
    /// Dead letters looked at.
    pub found: usize,
    /// Those deleted.
    pub removed: usize,
    /// Those in hand.
    pub(super) hand: Hand,
}

/// Dead letters in hand, oldest first: nobody else sees them.
pub(super) struct Hand {
    channel: Channel,
    held: VecDeque<Held>,
}

/// One of them.
pub(super) struct Held {
    pub(super) letter: DeadLetter,
    acker: Acker,
}

/// Nothing comes any more: somebody else took the rest, or the queue lost it.
const QUIET: Duration = Duration::from_secs(5);
/// How long another operator is waited for.
const TURN: Duration = Duration::from_mins(2);

/// Looks at all dead letters and does with each what `decide` says. Afterwards all that is to stay is back in its
/// place; what was to be held is as well.
///
/// # Errors
/// When the broker is gone: then everything is back, but what was deleted.
pub async fn sift(
    settings: &Settings,
    decide: impl FnMut(&DeadLetter) -> Fate + Send,
    watch: &mut Watch<'_>,
) -> Result<Sifted, BrokerError> {
    let operator = Operator::connect(settings, "close-sync dlq").await?;
    let mut sifted = operator.sift(decide, watch).await?;
    sifted.hand.give_back().await?;
    operator.leave().await;
    Ok(sifted)
}

impl<'a> Operator<'a> {
    /// Connects, visible in RabbitMQ's management under `name`.
    pub(super) async fn connect(settings: &'a Settings, name: &str) -> Result<Self, BrokerError> {
        Ok(Self { settings, connection: settings.connect(name).await? })
    }

    /// Looks at all dead letters and does with each what `decide` says.
    pub(super) async fn sift(
        &self,
        decide: impl FnMut(&DeadLetter) -> Fate + Send,
        watch: &mut Watch<'_>,
    ) -> Result<Sifted, BrokerError> {
        let busy = "another operator has been looking at the dead letters for two minutes: try again later";
        let name = self.settings.desk();
        let desk = claim(&self.connection, &name, TURN, busy, &mut || watch(Step::Waiting)).await?;
        let sifted = self.sift_alone(decide, watch).await;
        // What was given back is there for the next one.
        tokio::time::sleep(LAST_ACKS).await;
        let _ = desk.queue_delete(name.into(), QueueDeleteOptions::default()).await;
        let _ = desk.close(200, "done".into()).await;
        sifted
    }

    async fn sift_alone(
        &self,
        mut decide: impl FnMut(&DeadLetter) -> Fate + Send,
        watch: &mut Watch<'_>,
    ) -> Result<Sifted, BrokerError> {
        let channel = self.connection.create_channel().await?;
        let ready =
            topology::depth(&self.connection, &self.settings.dead()).await?.map_or(0, |depth| depth.ready);
        let (mut fates, mut held) = (Vec::new(), Vec::new());
        while let Some(left) = usize::try_from(ready).unwrap_or(usize::MAX).checked_sub(fates.len())
            && left > 0
        {
            // A consumer takes 65,535 at most, and has them until they are settled: the next one goes on from there.
            let credit = u16::try_from(left).unwrap_or(u16::MAX);
            let mut took = 0;
            channel.basic_qos(credit, BasicQosOptions::default()).await?;
            let (tag, options) = (format!("look-{}", fates.len()), BasicConsumeOptions::default());
            let mut deliveries = channel
                .basic_consume(
                    self.settings.dead().into(),
                    tag.as_str().into(),
                    options,
                    FieldTable::default(),
                )
                .await?;
            while took < credit
                && let Ok(delivery) = tokio::time::timeout(QUIET, deliveries.next()).await
            {
                let delivery = delivery.ok_or(BrokerError::Cancelled)??;
                took += 1;
                let letter = DeadLetter::read(&delivery);
                let fate = decide(&letter);
                fates.push((delivery.delivery_tag, fate));
                if fate == Fate::Hold {
                    held.push(Held { letter, acker: delivery.acker });
                }
                watch(Step::Looked { of: ready });
            }
            // Before anything is given back: it would come again at once.
            channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default()).await?;
            if took < credit {
                break;
            }
        }
        let removed = settle(&channel, &fates).await?;
        // The queue's order is that of the last time they were dead-lettered, unless somebody was killed.
        held.sort_by_key(|held| held.letter.failed_at);
        Ok(Sifted { found: fates.len(), removed, hand: Hand { channel, held: held.into() } })
    }

    /// Closes the connection, once what was given back has arrived.
    pub(super) async fn leave(&self) {
        close(&self.connection).await;
    }
}

/// Gives back and deletes. Tells how many were deleted.
async fn settle(channel: &Channel, fates: &[(u64, Fate)]) -> Result<usize, BrokerError> {
    let back = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
    if let Some((last, _)) = fates.last()
        && fates.iter().all(|(_, fate)| *fate == Fate::Back)
    {
        channel.basic_nack(*last, BasicNackOptions { multiple: true, ..back }).await?;
        return Ok(0);
    }
    let mut removed = 0;
    for (tag, fate) in fates {
        match fate {
            Fate::Back => channel.basic_nack(*tag, back).await?,
            Fate::Remove => {
                channel.basic_ack(*tag, BasicAckOptions::default()).await?;
                removed += 1;
            }
            Fate::Hold => {}
        }
    }
    Ok(removed)
}

impl Hand {
    /// Takes the oldest.
    pub(super) fn next(&mut self) -> Option<Held> {
        self.held.pop_front()
    }

    /// Puts one back among the others.
    pub(super) fn put_back(&mut self, held: Held) {
        self.held.push_front(held);
    }

    /// Gives back all that is left.
    pub(super) async fn give_back(&mut self) -> Result<(), BrokerError> {
        let any = !self.held.is_empty();
        while let Some(Held { acker, .. }) = self.held.pop_front() {
            acker.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
        }
        if any {
            tokio::time::sleep(LAST_ACKS).await;
        }
        let _ = self.channel.close(200, "done".into()).await;
        Ok(())
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

/// AMQP's reply code 405, resource locked.
fn is_locked(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 405)
}
