//! Scans: take dead letters off the queue, decide on each, and return the others.
//!
//! **Order is kept.** The dead letters are consumed and return to the queue when the channel is closed, in the order in
//! which they came. `basic.get` would mix the order, and so would returning more than 32 at a time with `basic.nack`
//! (rabbitmq.md §5.4; measured on 3.10.8). The consumer takes exactly as many messages as the queue held at the start,
//! and is cancelled after them. Each scan counts as a delivery, of which the queue allows a million.
//!
//! This holds however the process ends, as long as one batch takes the whole queue (5000). When a scan of a longer queue
//! is killed, only the first of them are in the batch, and RabbitMQ puts what returns behind what returned before
//! (measured on 3.10.8). No command depends on the order of the queue: limits and replays go by the time of failure.
//!
//! **A scan that ends early** takes no more than it must, unless hardly any is selected. RabbitMQ puts what returns behind what
//! returned before, and a scan of the whole queue has returned everything once. So a replay, which takes its batches from the
//! front, passes each dead letter once where the queue has the order of the failures.
//!
//! **One scan at a time.** While one operator has the whole batch, another would see an empty queue. A scan therefore
//! holds a lock: an exclusive queue with a fixed name. RabbitMQ deletes it with the connection, so a killed process
//! never locks others out. A scan of 10,000 dead letters takes a second.

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

/// What a scan does with one dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    Return,
    /// Leave it in the batch for the caller.
    Keep,
    Delete,
    /// Return it, and take no more.
    Stop,
}

/// Progress of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanStep {
    /// Another operator holds the lock.
    Waiting,
    Scanned {
        /// Dead letters seen so far.
        at: usize,
        /// Dead letters at the start.
        of: u32,
    },
}

/// Called with each step of a scan.
pub type Observer<'a> = dyn FnMut(ScanStep) + Send + 'a;

/// The dead-letter queue, over an operator's connection.
pub(crate) struct DeadLetterQueue<'a> {
    settings: &'a Settings,
    pub(crate) connection: Connection,
    lock_timeout: Duration,
}

/// The result of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanSummary {
    /// Dead letters in the queue.
    pub found: usize,
    pub matched: usize,
    pub deleted: usize,
    /// A replay is running, so its batch was not scanned.
    pub replaying: bool,
}

/// The dead letters of one scan. Closing it returns what was not deleted.
pub(crate) struct Batch {
    found: usize,
    deleted: usize,
    /// A replay is running, so its batch is not in this one.
    pub(crate) replaying: bool,
    /// Kept for the caller, oldest first.
    kept: VecDeque<HeldLetter>,
    /// To return, in the order of the queue.
    to_return: Vec<DeliveryTag>,
    channel: Channel,
    /// The dead-letter queue.
    queue: String,
    /// The channel that holds the lock.
    lock: Channel,
    lock_name: String,
    is_locked: bool,
}

pub(crate) struct HeldLetter {
    pub(crate) letter: DeadLetter,
    acker: Acker,
}

/// Where less than one of so many is selected, more are taken than are missing.
const RARE: usize = 20;
/// Most deliveries in the buffer. Their bodies are in memory, here and in RabbitMQ.
const PREFETCH: u16 = 5000;
/// After this time without a delivery the rest is gone: another client took it, or the queue lost it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// RabbitMQ returns dead letters some time after it has closed the channel. Another client may take some of them at once.
const RETURNED_WITHIN: Duration = Duration::from_secs(10);
const RETURNED_POLL: Duration = Duration::from_millis(20);
/// How long to wait for other operators.
const LOCK_TIMEOUT: Duration = Duration::from_mins(2);

/// Scans all dead letters and calls `decide` for each that `selection` contains.
///
/// # Errors
/// When the broker is gone. Every dead letter is then in its place. Deleted ones may be there again.
pub async fn scan(
    settings: &Settings,
    selection: &Selection,
    decide: impl FnMut(&DeadLetter) -> Disposition + Send,
    observer: &mut Observer<'_>,
) -> Result<ScanSummary, BrokerError> {
    let queue = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let (batch, matched) = queue.take_selected(selection, decide, observer).await?;
    let summary =
        ScanSummary { found: batch.found, matched, deleted: batch.deleted, replaying: batch.replaying };
    batch.close().await;
    queue.leave().await;
    Ok(summary)
}

/// Finds dead letters by their id or by the message id of their producer, and returns them by the id that was asked
/// for. Of several with one id, the last that failed is returned.
///
/// # Errors
/// Those of [`scan`].
pub async fn find_by_id(
    settings: &Settings,
    ids: &BTreeSet<String>,
    observer: &mut Observer<'_>,
) -> Result<(BTreeMap<String, DeadLetter>, ScanSummary), BrokerError> {
    let mut found: BTreeMap<String, DeadLetter> = BTreeMap::new();
    let decide = |letter: &DeadLetter| {
        let names = [Some(&letter.id), letter.message_id.as_ref()].into_iter().flatten();
        for name in names.filter(|name| ids.contains(*name)) {
            let rank = |letter: &DeadLetter| (letter.id == *name, letter.failed_at, letter.edited_at);
            if found.get(name).is_none_or(|other| rank(other) <= rank(letter)) {
                found.insert(name.clone(), letter.clone());
            }
        }
        Disposition::Return
    };
    let summary = scan(settings, &Selection::default(), decide, observer).await?;
    Ok((found, summary))
}

impl<'a> DeadLetterQueue<'a> {
    /// Connects, visible in RabbitMQ's management under `name`.
    pub(crate) async fn connect(settings: &'a Settings, name: &str) -> Result<Self, BrokerError> {
        Ok(Self { settings, connection: settings.connect(name).await?, lock_timeout: LOCK_TIMEOUT })
    }

    pub(crate) fn with_lock_timeout(self, lock_timeout: Duration) -> Self {
        Self { lock_timeout, ..self }
    }

    /// Takes all dead letters and deletes those for which `decide` says so.
    pub(crate) async fn take(
        &self,
        decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        observer: &mut Observer<'_>,
    ) -> Result<Batch, BrokerError> {
        self.take_at_most(usize::MAX, decide, observer).await
    }

    /// The same, until so many are kept.
    pub(crate) async fn take_at_most(
        &self,
        kept: usize,
        decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        observer: &mut Observer<'_>,
    ) -> Result<Batch, BrokerError> {
        let busy = "another operator has held the dead letters for too long; try again later";
        let name = self.settings.scan_lock_queue();
        let mut waited = false;
        let mut wait = || {
            waited = true;
            observer(ScanStep::Waiting);
        };
        let lock = acquire_lock(&self.connection, &name, self.lock_timeout, busy, &mut wait).await?;
        if waited {
            // The batch of the previous operator may return a moment after its lock is free.
            tokio::time::sleep(ACK_FLUSH_TIME).await;
        }
        // Checked under the lock: no replay can take a batch now.
        let replaying = is_locked_by_other(&self.connection, &self.settings.replay_queue()).await?;
        let channel = self.connection.create_channel().await?;
        let mut batch = Batch {
            found: 0,
            deleted: 0,
            replaying,
            kept: VecDeque::new(),
            to_return: Vec::new(),
            channel,
            queue: self.settings.dead_letter_queue(),
            lock,
            lock_name: name,
            is_locked: true,
        };
        match self.fill(&mut batch, kept, decide, observer).await {
            Ok(()) => Ok(batch),
            Err(error) => {
                batch.close().await;
                Err(error)
            }
        }
    }

    async fn fill(
        &self,
        batch: &mut Batch,
        most: usize,
        mut decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        observer: &mut Observer<'_>,
    ) -> Result<(), BrokerError> {
        let depth =
            with_timeout(topology::depth(&self.connection, &self.settings.dead_letter_queue())).await?;
        let ready = depth.map_or(0, |depth| depth.ready);
        let mut deleted = Vec::new();
        let mut is_over = most == 0;
        while !is_over
            && let Some(left) = usize::try_from(ready).unwrap_or(usize::MAX).checked_sub(batch.found)
            && left > 0
        {
            // One consumer takes at most so many, and keeps them until they are settled. The next consumer continues
            // with a tag that sorts behind it: RabbitMQ returns messages in the order of consumer tags.
            let missing = most.saturating_sub(batch.kept.len());
            let wanted = at_once(missing, most, batch.found).min(left);
            let credit = u16::try_from(wanted).unwrap_or(u16::MAX).min(PREFETCH);
            let mut taken = 0;
            let tag = format!("look-{:09}", batch.found);
            let (queue, options) = (self.settings.dead_letter_queue(), BasicConsumeOptions::default());
            let mut deliveries = with_timeout(async {
                batch.channel.basic_qos(credit, BasicQosOptions::default()).await?;
                let none = FieldTable::default();
                Ok(batch.channel.basic_consume(queue.into(), tag.as_str().into(), options, none).await?)
            })
            .await?;
            while taken < credit
                && let Ok(delivery) = tokio::time::timeout(IDLE_TIMEOUT, deliveries.next()).await
            {
                let delivery = delivery.ok_or(BrokerError::Cancelled)??;
                taken += 1;
                let tag = delivery.delivery_tag;
                batch.found += 1;
                if is_over {
                    batch.to_return.push(tag);
                    continue;
                }
                let letter = DeadLetter::from_delivery(&delivery);
                match decide(&letter) {
                    Disposition::Return => batch.to_return.push(tag),
                    Disposition::Stop => {
                        is_over = true;
                        batch.to_return.push(tag);
                    }
                    Disposition::Keep => batch.kept.push_back(HeldLetter { letter, acker: delivery.acker }),
                    Disposition::Delete => deleted.push(tag),
                }
                is_over |= batch.kept.len() >= most;
                observer(ScanStep::Scanned { at: batch.found, of: ready });
            }
            // Before anything is returned: RabbitMQ would deliver it again at once.
            let cancel = batch.channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default());
            with_timeout(async { Ok(cancel.await?) }).await?;
            if taken < credit {
                break;
            }
        }
        batch.deleted = deleted.len();
        for tag in deleted {
            batch.channel.basic_ack(tag, BasicAckOptions::default()).await?;
        }
        batch.flush_acks().await?;
        batch.kept.make_contiguous().sort_by_key(|held| held.letter.failed_at);
        Ok(())
    }

    /// Takes all dead letters and calls `decide` for each that `selection` contains. Also returns their number.
    pub(crate) async fn take_selected(
        &self,
        selection: &Selection,
        mut decide: impl FnMut(&DeadLetter) -> Disposition + Send,
        observer: &mut Observer<'_>,
    ) -> Result<(Batch, usize), BrokerError> {
        let is_selected = |letter: &DeadLetter| selection.filter.matches(letter);
        let (most, newest) = match selection.limit {
            None => (usize::MAX, Some(Timestamp::MAX)),
            Some(limit) => {
                let oldest = self.oldest(limit, |letter| is_selected(letter).then_some(()), observer).await?;
                (oldest.len(), oldest.last().and_then(|(failed_at, ())| *failed_at))
            }
        };
        let mut matched = 0;
        let decide = |letter: &DeadLetter| {
            if matched == most || letter.failed_at > newest || !is_selected(letter) {
                return Disposition::Return;
            }
            matched += 1;
            decide(letter)
        };
        let batch = self.take(decide, observer).await?;
        Ok((batch, matched))
    }

    /// What `pick` returns for the dead letters that it picks, with their times of failure, oldest first and at most `limit`.
    pub(crate) async fn oldest<T: Send>(
        &self,
        limit: usize,
        mut pick: impl FnMut(&DeadLetter) -> Option<T> + Send,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<(Option<Timestamp>, T)>, BrokerError> {
        let mut picked = Vec::new();
        let collect = |letter: &DeadLetter| {
            picked.extend(pick(letter).map(|value| (letter.failed_at, value)));
            Disposition::Return
        };
        self.take(collect, observer).await?.close().await;
        picked.sort_by_key(|(failed_at, _)| *failed_at);
        picked.truncate(limit);
        Ok(picked)
    }

    pub(crate) async fn leave(&self) {
        disconnect(&self.connection).await;
    }
}

impl Batch {
    /// The times of failure of the kept dead letters, oldest first.
    pub(crate) fn failed_at(&self) -> impl Iterator<Item = Option<Timestamp>> {
        self.kept.iter().map(|held| held.letter.failed_at)
    }

    /// Removes the oldest kept dead letter from the batch.
    pub(crate) fn next(&mut self) -> Option<HeldLetter> {
        self.kept.pop_front()
    }

    /// Deletes some of the kept dead letters and returns how many.
    pub(crate) async fn delete_those(
        &mut self,
        matches: impl Fn(&DeadLetter) -> bool,
    ) -> Result<usize, BrokerError> {
        let (deleted, kept): (VecDeque<HeldLetter>, VecDeque<HeldLetter>) =
            std::mem::take(&mut self.kept).into_iter().partition(|held| matches(&held.letter));
        self.kept = kept;
        let number = deleted.len();
        for held in deleted {
            held.delete().await?;
        }
        self.flush_acks().await?;
        Ok(number)
    }

    /// Waits until RabbitMQ has processed all acks. An ack has no answer, so this sends a request behind them that has one.
    async fn flush_acks(&self) -> Result<(), BrokerError> {
        with_timeout(async { Ok(self.channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?) }).await
    }

    /// Returns all that is not kept and releases the lock. Other operators do not see what is kept. The order of what is
    /// returned may change.
    pub(crate) async fn return_others(&mut self) -> Result<(), BrokerError> {
        let (returned, before) = (std::mem::take(&mut self.to_return), self.ready().await);
        let number = returned.len();
        for tag in returned {
            let requeue = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            self.channel.basic_nack(tag, requeue).await?;
        }
        self.wait_until_ready(before, number).await;
        self.release_lock().await;
        Ok(())
    }

    /// Returns everything that was not deleted and releases the lock.
    pub(crate) async fn close(mut self) {
        tokio::time::sleep(ACK_FLUSH_TIME).await;
        let before = self.ready().await;
        let _ = self.channel.close(200, "done".into()).await;
        self.wait_until_ready(before, self.to_return.len() + self.kept.len()).await;
        self.release_lock().await;
        let _ = self.lock.close(200, "done".into()).await;
    }

    /// The number of dead letters that are ready for delivery.
    async fn ready(&self) -> Option<usize> {
        let depth = topology::depth_on(&self.lock, &self.queue).await.ok()??;
        usize::try_from(depth.ready).ok()
    }

    /// Waits until the queue shows what was returned to what was there before: the next one must find it.
    async fn wait_until_ready(&self, before: Option<usize>, returned: usize) {
        let deadline = Instant::now() + RETURNED_WITHIN;
        let all = before.unwrap_or_default().saturating_add(returned);
        while self.ready().await.is_some_and(|ready| ready < all) && Instant::now() < deadline {
            tokio::time::sleep(RETURNED_POLL).await;
        }
    }

    async fn release_lock(&mut self) {
        if std::mem::take(&mut self.is_locked) {
            let (name, options) = (self.lock_name.as_str().into(), QueueDeleteOptions::default());
            let _ = self.lock.queue_delete(name, options).await;
        }
    }
}

impl HeldLetter {
    pub(crate) async fn delete(self) -> Result<(), BrokerError> {
        let is_acked = self.acker.ack(BasicAckOptions::default()).await?;
        if is_acked {
            Ok(())
        } else {
            Err(BrokerError::Lost("the batch of dead letters went back to the queue".into()))
        }
    }
}

/// How many dead letters to take at once. `missing` of `most` are not kept yet, after `found` were looked at.
///
/// What is taken in vain returns behind the rest. Where hardly one is selected, that matters less than the time to take each
/// alone.
fn at_once(missing: usize, most: usize, found: usize) -> usize {
    let is_rare = found > most.saturating_mul(RARE);
    if is_rare { missing.max(found) } else { missing }
}

/// Acquires a lock: an exclusive queue, which only one connection can have. RabbitMQ does not report when another
/// connection releases it, so this polls.
pub(crate) async fn acquire_lock(
    connection: &Connection,
    name: &str,
    timeout: Duration,
    busy: &'static str,
    waiting: &mut (dyn FnMut() + Send),
) -> Result<Channel, BrokerError> {
    const POLL_INTERVAL: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + timeout;
    loop {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        // The default queue type of a virtual host may be one that cannot be exclusive.
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("classic".into()));
        match channel.queue_declare(name.into(), options, arguments).await {
            Ok(_) => return Ok(channel),
            Err(error) if is_locked(&error) => {
                if Instant::now() > deadline {
                    return Err(BrokerError::Busy(busy));
                }
                waiting();
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            Err(error) => return Err(BrokerError::from_lapin(&error, &format!("queue `{name}`"))),
        }
    }
}

/// Whether another connection holds this lock.
async fn is_locked_by_other(connection: &Connection, name: &str) -> Result<bool, BrokerError> {
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(name.into(), options, FieldTable::default()).await {
        Ok(_) => {
            let _ = channel.close(200, "looked".into()).await;
            Ok(false)
        }
        Err(error) if is_locked(&error) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// AMQP reply code 404, not found.
fn is_missing(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 404)
}

/// AMQP reply code 405, resource locked.
fn is_locked(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 405)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a scan takes dead letters until it has so many of those that it wants, each `every`th one, and how many it
    /// takes that are behind the last of them.
    fn scan(every: usize, most: usize) -> (usize, usize) {
        let (mut times, mut found) = (0, 0);
        while found / every < most {
            found += at_once(most - found / every, most, found);
            times += 1;
        }
        (times, found - every * most)
    }

    #[test]
    fn a_scan_takes_exactly_what_it_wants_or_finds_rare_ones_soon() {
        for (every, most) in [(1, 500), (2, 500), (3, 500), (10, 500), (20, 500), (1, 1), (10, 1)] {
            let (times, in_vain) = scan(every, most);
            assert!(times < 150 && in_vain == 0, "{every} {most}: {times}, {in_vain}");
        }
        for (every, most) in [(100, 500), (14_000, 1), (100_000, 1), (1000, 10)] {
            let (times, in_vain) = scan(every, most);
            assert!(times < 150 && in_vain < every * most, "{every} {most}: {times}, {in_vain}");
        }
    }
}
