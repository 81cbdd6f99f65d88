//! Replaying: dead letters through the work queue again, with proof.
//!
//! **One first.** The oldest dead letter meant is sent by itself, and the worker tells what became of it
//! ([`crate::consumer::outcome_events`]). Only if it did not fail again, the others follow, a few under way at a time: live
//! messages that come meanwhile stand behind a few, not behind thousands. Close's budget goes to live messages first
//! anyway ([`crate::close::Priority`]). As soon as one fails in a way that is known already, it stops: whatever was
//! to be mended is not.
//!
//! **In portions**, those first that failed first. What cannot be sent soon goes back, and is taken anew when there is
//! room: RabbitMQ would take it away (`consumer_timeout`, 30 minutes), and what is in the queue everybody sees. What is
//! in hand when the process is killed goes back, what was sent is in the work queue: replaying again goes on from
//! there.
//!
//! **A lost connection** is made anew. What the worker told meanwhile nobody heard: those that were under way take no
//! places from the others any more (so that live messages may stand behind a few more). Those of them that failed again
//! are found among the dead letters, as a dead letter is there before it is told of; the others are waited for at the
//! end, and it is said of how many nothing was heard. What was not confirmed is sent again, and may be there twice.
//!
//! **One replay at a time**: whoever comes second waits. What fails again meanwhile is a new dead letter, known by
//! the replay it came from, and is left for the next replay. Older values do not overwrite newer ones: that is the
//! worker's stale guard.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, QueueBindOptions};
use lapin::types::FieldTable;
use lapin::{Connection, Consumer};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::publisher::Publisher;
use crate::amqp::topology::{self, NOW, REPLAYED};
use crate::amqp::{BrokerError, Settings, disconnect, envelope, with_timeout};
use crate::consumer::outcome_events::{Again, Replayed};
use crate::dead_letters::edit;
use crate::dead_letters::filter::Selection;
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::{End, Progress, Stage};
use crate::dead_letters::scan::{Batch, DeadLetterQueue, Disposition, HeldLetter, ScanStep, claim};
use crate::outcome::DEAD;
use crate::retry::Backoff;

/// What is to be replayed, and how.
#[derive(Clone, Debug)]
pub struct ReplayRequest {
    /// Which dead letters.
    pub selection: Selection,
    /// So many are under way at most.
    pub max_in_flight: usize,
    /// Whether to go on when they fail again.
    pub keep_going: bool,
    /// How long to wait for news of those under way. `None`: send all at once, and wait for nothing.
    pub outcome_timeout: Option<Duration>,
}

impl ReplayRequest {
    /// Under way at most, unless said otherwise.
    pub const MAX_IN_FLIGHT: u16 = 32;
    /// Patience, unless said otherwise.
    pub const OUTCOME_TIMEOUT: Duration = Duration::from_mins(10);
}

impl From<Selection> for ReplayRequest {
    fn from(selection: Selection) -> Self {
        let max_in_flight = Self::MAX_IN_FLIGHT.into();
        Self { selection, max_in_flight, keep_going: false, outcome_timeout: Some(Self::OUTCOME_TIMEOUT) }
    }
}

/// Dead letters in hand at a time, at most.
const PORTION: usize = 500;
/// Their bytes.
const PORTION_BYTES: usize = 32 << 20;
/// How long they are.
const IN_HAND: Duration = Duration::from_secs(30);
/// How long those under way are waited for after the end.
const LAST_NEWS: Duration = Duration::from_secs(30);
/// How often the work queue is looked at while nothing is heard, and the dead letters while some are missing.
const LOOKS_APART: Duration = Duration::from_secs(2);
/// So often are they looked at, then: others may have dealt with them.
const LOOKS: usize = 4;
/// How long another operator, or another replay, is waited for.
const TURN: Duration = Duration::from_hours(24);
/// How long the broker may be gone.
const RECONNECTING: Duration = Duration::from_mins(5);

/// Replays, and tells how far it has come until `stop`; at last how far that was, and how it ended.
///
/// # Errors
/// When the broker is gone for five minutes, or does not take the messages: what was not confirmed is still, or again,
/// in the dead-letter queue.
pub async fn replay(
    settings: &Settings,
    order: ReplayRequest,
    progress: watch::Sender<Progress>,
    stop: &CancellationToken,
) -> Result<(Progress, End), BrokerError> {
    let mut replay = Replay {
        settings,
        order,
        progress,
        ours: HashSet::new(),
        sent: 0,
        under_way: HashMap::new(),
        known: HashSet::new(),
        proven: false,
        caught_up: false,
        deadline: Instant::now(),
        lost: None,
    };
    let mut pauses = Backoff::reconnect();
    loop {
        let before = replay.sent;
        match replay.session(stop).await {
            Ok(end) => return Ok(replay.over(end)),
            Err(error) => {
                if replay.sent > before {
                    (pauses, replay.lost) = (Backoff::reconnect(), None);
                }
                let since = *replay.lost.get_or_insert_with(Instant::now);
                if !is_gone(&error) || replay.ours.is_empty() || since.elapsed() > RECONNECTING {
                    return Err(error);
                }
                replay.tell(|progress| progress.stage = Stage::Reconnecting);
                let pause = pauses.next_delay().unwrap_or_default();
                if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                    return Ok(replay.over(End::Stopped));
                }
            }
        }
    }
}

/// Whether the broker may be there again in a moment.
fn is_gone(error: &BrokerError) -> bool {
    matches!(error, BrokerError::Lost(_) | BrokerError::Unreachable(_))
}

/// What was heard of one that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// Nothing, not even from RabbitMQ whether it has it: its dead letter stays.
    Unconfirmed,
    /// Nothing yet.
    Nothing,
    /// It failed for now, and comes again then.
    Delayed(Instant),
    /// Nothing, and it may have been told of while there was no connection.
    Missed,
}

impl Heard {
    /// Whether news will come, as far as we know.
    fn is_awaited(self) -> bool {
        match self {
            Self::Nothing | Self::Delayed(_) => true,
            Self::Unconfirmed | Self::Missed => false,
        }
    }
}

struct Replay<'a> {
    settings: &'a Settings,
    order: ReplayRequest,
    progress: watch::Sender<Progress>,
    /// All replays of this run.
    ours: HashSet<Uuid>,
    /// How many of them RabbitMQ has confirmed.
    sent: usize,
    /// Those nothing final was heard of.
    under_way: HashMap<Uuid, Heard>,
    /// Fingerprints of what was sent, and of what failed again.
    known: HashSet<String>,
    /// The others need not wait for the first any more.
    proven: bool,
    /// One has an end that was sent by this connection.
    caught_up: bool,
    /// News is awaited until then.
    deadline: Instant,
    /// Since when there is no connection, or none that is of use.
    lost: Option<Instant>,
}

impl Replay<'_> {
    fn tell(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(|progress| {
            change(progress);
            progress.in_flight = self.awaited();
            progress.missed = self.missed();
            progress.sent = self.sent;
        });
    }

    fn awaited(&self) -> usize {
        self.under_way.values().filter(|heard| heard.is_awaited()).count()
    }

    fn missed(&self) -> usize {
        self.under_way.values().filter(|heard| **heard == Heard::Missed).count()
    }

    /// There is a connection again: from now on, nothing is told that we do not hear.
    fn resume(&mut self) {
        let now = Instant::now();
        for heard in self.under_way.values_mut() {
            match *heard {
                Heard::Nothing => *heard = Heard::Missed,
                Heard::Delayed(due) if due <= now => *heard = Heard::Missed,
                Heard::Delayed(_) | Heard::Unconfirmed | Heard::Missed => {}
            }
        }
        if let Some(patience) = self.order.outcome_timeout.filter(|_| !self.under_way.is_empty()) {
            self.deadline = self.deadline.max(now + patience);
        }
        self.caught_up = false;
    }

    fn over(&self, end: End) -> (Progress, End) {
        self.tell(|progress| progress.stage = Stage::Finished(end.clone()));
        (self.progress.borrow().clone(), end)
    }

    /// With one connection, until the end.
    async fn session(&mut self, stop: &CancellationToken) -> Result<End, BrokerError> {
        let connect = async {
            let operator =
                DeadLetterQueue::connect(self.settings, "close-sync replay").await?.with_patience(TURN);
            // Of its own: an alarm of the broker must not hold up giving back what is in hand.
            let publishing = self.settings.connect("close-sync replay publish").await?;
            let publisher = Publisher::new(&publishing).await?;
            Ok::<_, BrokerError>((operator, publishing, publisher))
        };
        let Some(connected) = stop.run_until_cancelled(connect).await else { return Ok(End::Stopped) };
        let (operator, publishing, publisher) = connected?;
        let mut line = Line { connection: &operator.connection, publisher, news: None };
        let open = async {
            let news = self.mailbox(&operator.connection).await?;
            line.news = self.order.outcome_timeout.is_some().then_some(news);
            Ok::<_, BrokerError>(line)
        };
        let Some(line) = stop.run_until_cancelled(open).await else { return Ok(End::Stopped) };
        let mut line = line?;
        self.resume();
        let end = match self.portions(&operator, &mut line, stop).await {
            Err(error) if is_gone(&error) => self.last_heard(&mut line).ok().flatten().ok_or(error),
            end => end,
        };
        operator.leave().await;
        disconnect(&publishing).await;
        end
    }

    /// Where the worker tells what becomes of the messages. Whoever has it replays.
    async fn mailbox(&self, connection: &Connection) -> Result<Consumer, BrokerError> {
        let name = self.settings.replay_queue();
        let busy = "another replay has been going on for a day";
        let channel = claim(connection, &name, TURN, busy, &mut || {
            self.tell(|progress| progress.stage = Stage::Waiting);
        })
        .await?;
        let (exchange, none) = (self.settings.retry_exchange(), FieldTable::default());
        let queue = name.as_str();
        channel
            .queue_bind(
                queue.into(),
                exchange.as_str().into(),
                REPLAYED.into(),
                QueueBindOptions::default(),
                none,
            )
            .await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        Ok(channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?)
    }

    async fn portions(
        &mut self,
        operator: &DeadLetterQueue<'_>,
        line: &mut Line<'_>,
        stop: &CancellationToken,
    ) -> Result<End, BrokerError> {
        let Some(looked) = stop.run_until_cancelled(self.look(operator)).await else {
            return Ok(End::Stopped);
        };
        let (times, failed) = looked?;
        let mut end = None;
        for told in failed {
            end = end.or(self.note(told));
        }
        let end = match end {
            Some(end) => end,
            None => self.send_all(operator, line, times, stop).await?,
        };
        self.last_news(line, end, stop).await
    }

    /// Sends all those that failed at these `times`. Tells why it sends no more.
    async fn send_all(
        &mut self,
        operator: &DeadLetterQueue<'_>,
        line: &mut Line<'_>,
        mut times: VecDeque<Option<Timestamp>>,
        stop: &CancellationToken,
    ) -> Result<End, BrokerError> {
        loop {
            if let Some(end) = self.canary(line, stop).await? {
                return Ok(end);
            }
            if times.is_empty() {
                return Ok(End::Done);
            }
            if let Some(end) = self.room(line, None, stop).await? {
                return Ok(end);
            }
            // What a look that is cut short has in hand goes back with the connection.
            let Some(hand) = stop.run_until_cancelled(self.take(operator, &mut times)).await else {
                return Ok(End::Stopped);
            };
            let mut hand = hand?;
            let sent = self.portion(&mut hand, &mut times, line, stop).await;
            // Also after an error: what is in hand has its place in the queue.
            hand.close().await;
            if let Some(end) = sent? {
                return Ok(end);
            }
        }
    }

    /// Waits for what becomes of those that are under way when no more are sent.
    async fn last_news(
        &mut self,
        line: &mut Line<'_>,
        mut end: End,
        stop: &CancellationToken,
    ) -> Result<End, BrokerError> {
        self.tell(|progress| progress.stage = Stage::Finishing);
        if end == End::Done {
            self.lost = None;
        }
        let mut hurry = None;
        while self.awaited() + self.missed() > 0 {
            // Those whose news were missed stood in the work queue before one that has an end by now.
            let is_late = self.awaited() == 0 && self.caught_up;
            hurry =
                (is_late || end != End::Done).then(|| hurry.unwrap_or_else(|| Instant::now() + LAST_NEWS));
            let until = hurry.map_or(self.deadline, |until| until.min(self.deadline));
            match self.hear(line, until, stop).await {
                Ok(Some(End::TimedOut)) if end == End::Done => return Ok(End::TimedOut),
                // What fails last is as bad as what fails first.
                Ok(Some(heard)) if end == End::Done => end = heard,
                Ok(Some(End::Done | End::CanaryFailed | End::SameFailure) | None) => {}
                Err(error) if end == End::Done => return Err(error),
                // With another connection it would begin to send again.
                Ok(Some(End::TimedOut | End::Stopped)) | Err(_) => break,
            }
        }
        Ok(end)
    }

    /// When those that are meant failed, the oldest first: in that order they are sent, whatever order the queue has.
    /// And which of those under way failed again while there was no connection.
    async fn look(
        &self,
        operator: &DeadLetterQueue<'_>,
    ) -> Result<(VecDeque<Option<Timestamp>>, Vec<Replayed>), BrokerError> {
        self.tell(|progress| progress.stage = Stage::Scanning);
        edit::finish(operator, &mut self.watch()).await?;
        let left = self.order.selection.limit.map_or(usize::MAX, |limit| limit.saturating_sub(self.sent));
        // Of a session before. A queue that has no leader for a moment counts as empty, and what was in hand when the
        // connection went comes back when RabbitMQ has noticed.
        let expected = self.progress.borrow().matched.saturating_sub(self.sent);
        let (mut failed, mut looks) = (Vec::new(), 0);
        loop {
            let is_meant = |letter: &DeadLetter| {
                failed.extend(told_by(letter).filter(|told| self.under_way.contains_key(&told.replay)));
                self.is_meant(letter)
            };
            let times = operator.oldest(left, is_meant, &mut self.watch()).await?;
            looks += 1;
            if times.len() >= expected || looks == LOOKS {
                self.tell(|progress| progress.matched = self.sent + times.len());
                return Ok((times.into(), failed));
            }
            tokio::time::sleep(LOOKS_APART).await;
        }
    }

    /// Takes the next portion in hand, of those that failed at these `times`.
    async fn take(
        &self,
        operator: &DeadLetterQueue<'_>,
        times: &mut VecDeque<Option<Timestamp>>,
    ) -> Result<Batch, BrokerError> {
        let fits = times.len().min(if self.is_canary() { 1 } else { PORTION });
        let portion: Vec<_> = times.drain(..fits).collect();
        let (mut held, mut bytes) = (0, 0);
        let mut replaced = edit::Replaced::default();
        let decide = |letter: &DeadLetter| {
            replaced.note(letter);
            let next = portion.last().is_some_and(|last| letter.failed_at <= *last);
            let full = held == portion.len() || (held > 0 && bytes > PORTION_BYTES);
            if full || !next || !self.is_meant(letter) {
                return Disposition::Return;
            }
            held += 1;
            bytes += letter.size();
            Disposition::Keep
        };
        let mut hand = operator.take(decide, &mut self.watch()).await?;
        // Edited since this replay began, by a command that was killed: the copy is in our hand, too.
        let removed = hand.remove_those(|letter| replaced.has(letter)).await?;
        self.tell(|progress| progress.matched = progress.matched.saturating_sub(removed));
        if held == 0 {
            // Somebody else was faster.
            self.tell(|progress| progress.matched = progress.matched.saturating_sub(portion.len()));
        } else {
            // Too large for one portion.
            portion.into_iter().skip(held).rev().for_each(|time| times.push_front(time));
        }
        Ok(hand)
    }

    /// What failed again during this run is left for the next one.
    fn is_meant(&self, letter: &DeadLetter) -> bool {
        let ours = letter.replay().is_some_and(|replay| self.ours.contains(&replay));
        !ours && self.order.selection.filter.matches(letter)
    }

    fn watch(&self) -> impl FnMut(ScanStep) + Send {
        let progress = self.progress.clone();
        move |step| {
            if step == ScanStep::Waiting {
                progress.send_modify(|progress| progress.stage = Stage::Waiting);
            }
        }
    }

    /// Whether the next one is the first, which the rest waits for.
    fn is_canary(&self) -> bool {
        self.order.outcome_timeout.is_some() && !self.proven
    }

    /// Waits until another one may be under way, or `until`. `Some` when nothing more is to be sent.
    async fn room(
        &mut self,
        line: &mut Line<'_>,
        until: Option<Instant>,
        stop: &CancellationToken,
    ) -> Result<Option<End>, BrokerError> {
        // What was told while nobody listened.
        if let Some(end) = self.last_heard(line)? {
            return Ok(Some(end));
        }
        while !self.has_room(line) && until.is_none_or(|until| Instant::now() < until) {
            if let Some(end) = self.hear(line, self.deadline, stop).await? {
                return Ok(Some(end));
            }
        }
        Ok(stop.is_cancelled().then_some(End::Stopped))
    }

    fn has_room(&self, line: &Line<'_>) -> bool {
        line.news.is_none() || self.awaited() < self.order.max_in_flight
    }

    /// Sends what is in hand. `Some` when that was the last.
    async fn portion(
        &mut self,
        hand: &mut Batch,
        times: &mut VecDeque<Option<Timestamp>>,
        line: &mut Line<'_>,
        stop: &CancellationToken,
    ) -> Result<Option<End>, BrokerError> {
        let stage = if self.is_canary() { Stage::Canary } else { Stage::Sending };
        self.tell(|progress| progress.stage = stage);
        if !self.is_canary() {
            hand.let_go().await?;
        }
        let until = hand.since + IN_HAND;
        while !hand.is_empty() {
            if let Some(end) = self.room(line, Some(until), stop).await? {
                return Ok(Some(end));
            }
            if Instant::now() > until {
                hand.times().rev().for_each(|time| times.push_front(time));
                return Ok(None);
            }
            if let Some(held) = hand.next() {
                self.send(held, line).await?;
            }
        }
        Ok(None)
    }

    /// Waits for what becomes of the first.
    async fn canary(
        &mut self,
        line: &mut Line<'_>,
        stop: &CancellationToken,
    ) -> Result<Option<End>, BrokerError> {
        while self.is_canary() && self.awaited() > 0 {
            if let Some(end) = self.hear(line, self.deadline, stop).await? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Sends one. What is not confirmed goes back with the rest.
    async fn send(&mut self, held: HeldLetter, line: &Line<'_>) -> Result<(), BrokerError> {
        let replay = Uuid::now_v7();
        let exchange = self.settings.retry_exchange();
        let properties = envelope::for_replay(&held.letter.properties, replay);
        // Before it is: it may arrive without our knowing.
        self.ours.insert(replay);
        if self.order.outcome_timeout.is_some() {
            self.under_way.insert(replay, Heard::Unconfirmed);
        }
        match line.publisher.publish(&exchange, NOW, &held.letter.body, properties).await {
            Err(BrokerError::TooLarge(detail)) => {
                return Err(BrokerError::TooLarge(format!("{detail} (dead letter `{}`)", held.letter.id)));
            }
            published => published?,
        }
        self.sent += 1;
        self.known.insert(held.letter.fingerprint.clone());
        if let Some(patience) = self.order.outcome_timeout {
            self.under_way.insert(replay, Heard::Nothing);
            self.deadline = self.deadline.max(Instant::now() + patience);
        }
        self.tell(|_| {});
        held.remove().await
    }

    /// Waits for news. `Some` when nothing more is to be sent for it.
    async fn hear(
        &mut self,
        line: &mut Line<'_>,
        until: Instant,
        stop: &CancellationToken,
    ) -> Result<Option<End>, BrokerError> {
        let Some(news) = &mut line.news else { return Ok(None) };
        let delivery = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(Some(End::Stopped)),
            delivery = news.next() => delivery.ok_or(BrokerError::Cancelled)??,
            () = tokio::time::sleep_until(until) => return Ok(Some(End::TimedOut)),
            () = tokio::time::sleep(LOOKS_APART) => {
                // Whoever may not look is not told.
                let depth = with_timeout(topology::depth(line.connection, &self.settings.queue)).await.ok().flatten();
                if depth.is_some() {
                    self.lost = None;
                }
                self.tell(|progress| progress.work = depth);
                return Ok(None);
            }
        };
        Ok(self.read(&delivery))
    }

    /// Events that are here already. That the connection is gone is told after them, and only once: where they end the
    /// replay, nothing more has to be known, otherwise it is the caller's to know.
    fn last_heard(&mut self, line: &mut Line<'_>) -> Result<Option<End>, BrokerError> {
        let Some(news) = &mut line.news else { return Ok(None) };
        let mut end = None;
        while let Some(told) = news.next().now_or_never() {
            match told {
                Some(Ok(delivery)) => end = end.or(self.read(&delivery)),
                Some(Err(_)) | None if end.is_some() => break,
                Some(Err(error)) => return Err(error.into()),
                None => return Err(BrokerError::Cancelled),
            }
        }
        Ok(end)
    }

    fn read(&mut self, news: &Delivery) -> Option<End> {
        serde_json::from_slice(&news.data).ok().and_then(|told| self.note(told))
    }

    /// What became of one. `Some` when nothing more is to be sent for it.
    fn note(&mut self, told: Replayed) -> Option<End> {
        let heard = self.under_way.get_mut(&told.replay)?;
        let due = Instant::now() + Duration::from_secs(told.comes_again_s.unwrap_or(0));
        self.deadline = self.deadline.max(due + self.order.outcome_timeout.unwrap_or_default());
        if told.comes_again_s.is_some() {
            *heard = Heard::Delayed(due);
            self.tell(|progress| progress.delayed += 1);
            return None;
        }
        self.caught_up |= *heard == Heard::Nothing;
        self.under_way.remove(&told.replay);
        self.tell(|progress| *progress.outcomes.entry(told.outcome).or_default() += 1);
        let end = told.dead_letter.and_then(|again| self.failed(again));
        self.proven |= end.is_none();
        end
    }

    /// One failed again.
    fn failed(&mut self, again: Again) -> Option<End> {
        let alike = !self.known.insert(again.fingerprint.clone());
        self.tell(|progress| {
            *progress.failures.entry(again.fingerprint.clone()).or_default() += 1;
            progress.last_failure = Some(again);
        });
        match (self.order.keep_going, self.proven) {
            (true, _) => None,
            (false, false) => Some(End::CanaryFailed),
            (false, true) => alike.then_some(End::SameFailure),
        }
    }
}

/// What the worker told when it made this dead letter.
fn told_by(letter: &DeadLetter) -> Option<Replayed> {
    let again = Again {
        id: letter.id.parse().ok()?,
        fingerprint: letter.fingerprint.clone(),
        error: letter.error.clone().unwrap_or_default(),
        close_said: None,
    };
    let (outcome, dead_letter) = (DEAD.to_owned(), Some(again));
    Some(Replayed { replay: letter.replay()?, outcome, dead_letter, comes_again_s: None })
}

/// The ways to the broker and back.
struct Line<'a> {
    connection: &'a Connection,
    publisher: Publisher,
    /// What became of the messages, if that is waited for.
    news: Option<Consumer>,
}
