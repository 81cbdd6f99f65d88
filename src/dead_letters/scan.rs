//! Taking dead letters off the queue, deciding on each, and giving back what is to stay.
//!
//! **In their places.** They are consumed, and go back when the channel is closed: so they return in the order they
//! came. `basic.get` would scramble them, and so would giving back more than 32 at a time with `basic.nack`
//! (rabbitmq.md §5.4; measured on 3.10.8). The consumer may take exactly as many as were there at the start and is
//! cancelled after them. Each look counts as a delivery, of which the queue allows a million.
//!
//! That is so however the process ends, as long as all of them fit into one hand (5000). A look at more that
//! is killed has only the first of them in hand, and RabbitMQ puts what returns behind what returned before (measured
//! on 3.10.8). Nothing goes by the order of the queue: whatever is limited or replayed goes by the time of failure.
//!
//! **One at a time.** While one operator has taken everything, another would see an empty queue. So whoever looks
//! holds an exclusive queue of a known name meanwhile, which RabbitMQ takes away with the connection: a killed
//! process locks nobody out. A look at 10,000 takes a second, and the others wait for it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, DeliveryTag, FieldTable};
use lapin::{Acker, Channel, Connection, ErrorKind};
use tokio::time::Instant;

use crate::amqp::{ACK_FLUSH_TIME, BrokerError, Settings, disconnect, topology, with_timeout};
use crate::dead_letters::filter::Selection;
use crate::dead_letters::letter::DeadLetter;

/// What to do with one dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Give it back.
    Return,
    /// Keep it in hand for what comes next.
    Keep,
    /// Delete it.
    Delete,
}

/// How far a look has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanStep {
    /// Another operator looks; it is our turn afterwards.
    Waiting,
    /// So many were looked at.
    Scanned {
        /// Dead letters so far.
        at: usize,
        /// Dead letters at the start.
        of: u32,
    },
}

/// Whoever wants to follow it.
pub type Observer<'a> = dyn FnMut(ScanStep) + Send + 'a;

/// An operator's connection to the broker.
pub(crate) struct DeadLetterQueue<'a> {
    settings: &'a Settings,
    pub(crate) connection: Connection,
    /// How long another one is waited for.
    patience: Duration,
}

/// What came of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanSummary {
    /// Dead letters in the queue.
    pub found: usize,
    /// Those meant.
    pub matched: usize,
    /// Those of them that were deleted.
    pub removed: usize,
    /// Somebody replays: what they have in hand was not among them.
    pub replaying: bool,
}

/// All dead letters, while nobody else can look at any.
pub(crate) struct Batch {
    /// How many they are.
    found: usize,
    /// How many were deleted as it was decided.
    removed: usize,
    /// Somebody else replays: what they have in hand is not among them.
    pub(crate) replaying: bool,
    /// Since when it has them all.
    pub(crate) since: Instant,
    /// Those held, oldest first.
    held: VecDeque<HeldLetter>,
    /// Those that go back, in their order.
    back: Vec<DeliveryTag>,
    channel: Channel,
    desk: Option<Channel>,
    desk_name: String,
}

/// One that is held.
pub(crate) struct HeldLetter {
    pub(crate) letter: DeadLetter,
    acker: Acker,
}

/// Their bodies are in memory until they are looked at: RabbitMQ's, and ours.
const AT_A_TIME: u16 = 5000;
/// Nothing comes any more: somebody else took the rest, or the queue lost it.
const QUIET: Duration = Duration::from_secs(5);
/// How long another operator is waited for.
const TURN: Duration = Duration::from_mins(2);

/// Looks at all dead letters, and does with each of those meant what `decide` says.
///
/// # Errors
/// When the broker is gone: then everything is in its place, but what was deleted, of which some may be there again.
pub async fn scan(
    settings: &Settings,
    which: &Selection,
    decide: impl FnMut(&DeadLetter) -> Disposition + Send,
    watch: &mut Observer<'_>,
) -> Result<ScanSummary, BrokerError> {
    let operator = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let (hand, matched) = operator.pick(which, decide, watch).await?;
    let sifted = ScanSummary { found: hand.found, matched, removed: hand.removed, replaying: hand.replaying };
    hand.close().await;
    operator.leave().await;
    Ok(sifted)
}

/// Looks for dead letters by their ids or those that producers gave the messages, of which the last one that failed
/// counts. Tells them by what they were looked for, and what it saw.
///
/// # Errors
/// Those of [`sift`].
pub async fn find_by_id(
    settings: &Settings,
    ids: &BTreeSet<String>,
    watch: &mut Observer<'_>,
) -> Result<(BTreeMap<String, DeadLetter>, ScanSummary), BrokerError> {
    let mut found: BTreeMap<String, DeadLetter> = BTreeMap::new();
    let seek = |letter: &DeadLetter| {
        let names = [Some(&letter.id), letter.message_id.as_ref()].into_iter().flatten();
        for name in names.filter(|name| ids.contains(*name)) {
            let rank = |letter: &DeadLetter| (letter.id == *name, letter.failed_at, letter.edited_at);
            if found.get(name).is_none_or(|other| rank(other) <= rank(letter)) {
                found.insert(name.clone(), letter.clone());
            }
        }
        Disposition::Return
    };
    let sifted = scan(settings, &Selection::default(), seek, watch).await?;
    Ok((found, sifted))
}

impl<'a> DeadLetterQueue<'a> {
    /// Connects, visible in RabbitMQ's management under `name`.
    pub(crate) async fn connect(settings: &'a Settings, name: &str) -> Result<Self, BrokerError> {
        Ok(Self { settings, connection: settings.connect(name).await?, patience: TURN })
    }

    /// Waits for others for so long.
    pub(crate) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Takes all dead letters, and deletes those of which `decide` says so.
    pub(crate) async fn take(
        &self,
        decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        watch: &mut Observer<'_>,
    ) -> Result<Batch, BrokerError> {
        let busy = "another operator has been at the dead letters for too long: try again later";
        let name = self.settings.scan_lock_queue();
        let mut waited = false;
        let mut wait = || {
            waited = true;
            watch(ScanStep::Waiting);
        };
        let desk = claim(&self.connection, &name, self.patience, busy, &mut wait).await?;
        if waited {
            // What the one before had in hand may come back a moment after its place is free.
            tokio::time::sleep(ACK_FLUSH_TIME).await;
        }
        // Asked while nobody can begin to take any.
        let replaying = is_claimed(&self.connection, &self.settings.replay_queue()).await?;
        let channel = self.connection.create_channel().await?;
        let mut hand = Batch {
            found: 0,
            removed: 0,
            replaying,
            since: Instant::now(),
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
        hand: &mut Batch,
        mut decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        watch: &mut Observer<'_>,
    ) -> Result<(), BrokerError> {
        let depth =
            with_timeout(topology::depth(&self.connection, &self.settings.dead_letter_queue())).await?;
        let ready = depth.map_or(0, |depth| depth.ready);
        let mut removed = Vec::new();
        while let Some(left) = usize::try_from(ready).unwrap_or(usize::MAX).checked_sub(hand.found)
            && left > 0
        {
            // So many are on their way to us at a time. They stay this consumer's until they are settled; the next one
            // goes on from there, with a tag that sorts behind: in the order of tags they are given back.
            let credit = u16::try_from(left).unwrap_or(u16::MAX).min(AT_A_TIME);
            let mut took = 0;
            let tag = format!("look-{:09}", hand.found);
            let (queue, options) = (self.settings.dead_letter_queue(), BasicConsumeOptions::default());
            let mut deliveries = with_timeout(async {
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
                let tag = delivery.delivery_tag;
                match decide(&letter) {
                    Disposition::Return => hand.back.push(tag),
                    Disposition::Keep => hand.held.push_back(HeldLetter { letter, acker: delivery.acker }),
                    Disposition::Delete => removed.push(tag),
                }
                hand.found += 1;
                watch(ScanStep::Scanned { at: hand.found, of: ready });
            }
            // Before anything is given back: it would come again at once.
            let cancel = hand.channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default());
            with_timeout(async { Ok(cancel.await?) }).await?;
            if took < credit {
                break;
            }
        }
        hand.since = Instant::now();
        hand.removed = removed.len();
        for tag in removed {
            hand.channel.basic_ack(tag, BasicAckOptions::default()).await?;
        }
        hand.confirm().await?;
        hand.held.make_contiguous().sort_by_key(|held| held.letter.failed_at);
        Ok(())
    }

    /// Takes all dead letters, and does with those meant what `decide` says. Tells how many they are.
    pub(crate) async fn pick(
        &self,
        which: &Selection,
        mut decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        watch: &mut Observer<'_>,
    ) -> Result<(Batch, usize), BrokerError> {
        let is_meant = |letter: &DeadLetter| which.filter.matches(letter);
        let (most, newest) = match which.limit {
            None => (usize::MAX, Some(Timestamp::MAX)),
            Some(limit) => {
                let oldest = self.oldest(limit, is_meant, watch).await?;
                (oldest.len(), oldest.last().copied().flatten())
            }
        };
        let mut matched = 0;
        let among = |letter: &DeadLetter| {
            if matched == most || letter.failed_at > newest || !is_meant(letter) {
                return Disposition::Return;
            }
            matched += 1;
            decide(letter)
        };
        let hand = self.take(among, watch).await?;
        Ok((hand, matched))
    }

    /// When those meant failed, at most so many of them and the oldest first.
    pub(crate) async fn oldest(
        &self,
        limit: usize,
        mut is_meant: impl FnMut(&DeadLetter) -> bool + Send,
        watch: &mut Observer<'_>,
    ) -> Result<Vec<Option<Timestamp>>, BrokerError> {
        let mut times = Vec::new();
        let note = |letter: &DeadLetter| {
            times.extend(is_meant(letter).then_some(letter.failed_at));
            Disposition::Return
        };
        self.take(note, watch).await?.close().await;
        times.sort_unstable();
        times.truncate(limit);
        Ok(times)
    }

    /// Closes the connection.
    pub(crate) async fn leave(&self) {
        disconnect(&self.connection).await;
    }
}

impl Batch {
    /// Whether none is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// When those held failed, the oldest first.
    pub(crate) fn times(&self) -> impl DoubleEndedIterator<Item = Option<Timestamp>> {
        self.held.iter().map(|held| held.letter.failed_at)
    }

    /// Takes the oldest of those held.
    pub(crate) fn next(&mut self) -> Option<HeldLetter> {
        self.held.pop_front()
    }

    /// Deletes some of those that are held, and tells how many.
    pub(crate) async fn remove_those(
        &mut self,
        which: impl Fn(&DeadLetter) -> bool,
    ) -> Result<usize, BrokerError> {
        let (gone, kept): (VecDeque<HeldLetter>, VecDeque<HeldLetter>) =
            std::mem::take(&mut self.held).into_iter().partition(|held| which(&held.letter));
        self.held = kept;
        let number = gone.len();
        for held in gone {
            held.remove().await?;
        }
        self.confirm().await?;
        Ok(number)
    }

    /// Waits until RabbitMQ has been told of all that was deleted: an ack has no answer, so it is asked something that
    /// has one and stands behind them.
    async fn confirm(&self) -> Result<(), BrokerError> {
        with_timeout(async { Ok(self.channel.basic_qos(AT_A_TIME, BasicQosOptions::default()).await?) }).await
    }

    /// Gives back all that is not held, and lets others look: what is held, they do not see. Those given back may
    /// have another order in the queue afterwards.
    pub(crate) async fn let_go(&mut self) -> Result<(), BrokerError> {
        for tag in std::mem::take(&mut self.back) {
            let back = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            self.channel.basic_nack(tag, back).await?;
        }
        self.leave_desk().await;
        Ok(())
    }

    /// Gives back all that is left, and lets others look.
    pub(crate) async fn close(mut self) {
        tokio::time::sleep(ACK_FLUSH_TIME).await;
        let _ = self.channel.close(200, "done".into()).await;
        self.leave_desk().await;
    }

    async fn leave_desk(&mut self) {
        let Some(desk) = self.desk.take() else { return };
        // What was given back is there for the next one.
        tokio::time::sleep(ACK_FLUSH_TIME).await;
        let _ = desk.queue_delete(self.desk_name.as_str().into(), QueueDeleteOptions::default()).await;
        let _ = desk.close(200, "done".into()).await;
    }
}

impl HeldLetter {
    /// Takes it off the queue for good.
    pub(crate) async fn remove(self) -> Result<(), BrokerError> {
        let removed = self.acker.ack(BasicAckOptions::default()).await?;
        if removed { Ok(()) } else { Err(BrokerError::Lost("the dead letters in hand went back".into())) }
    }
}

/// Declares an exclusive queue that only one connection can have at a time, and waits for it if another has it:
/// RabbitMQ tells nobody when it goes, so it is asked again and again.
pub(crate) async fn claim(
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
async fn is_claimed(connection: &Connection, name: &str) -> Result<bool, BrokerError> {
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(name.into(), options, FieldTable::default()).await {
        Ok(_) => {
            // Ours.
            let _ = channel.close(200, "looked".into()).await;
            Ok(false)
        }
        Err(error) if is_locked(&error) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// AMQP's reply code 404, not found.
fn is_missing(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 404)
}

/// AMQP's reply code 405, resource locked.
fn is_locked(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 405)
}
