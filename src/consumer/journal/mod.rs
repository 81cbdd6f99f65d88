//! The journal of a session: a log on the broker that outlives the worker (`design.md` §9).
//!
//! A session follows the log from its beginning on, so that a standby takes over at once. Its first delivery makes it the
//! active one. It then appends a start entry and reads up to that entry ([`takeover`]): now it knows what its predecessors
//! knew. Only then does it start messages. It goes on reading, because a worker that lost the queue may not know it yet.
//! When another session has started, this one has lost the queue, and ends.
//!
//! **Appending** ([`writer`]). What messages append while the broker stores earlier entries becomes one message, so the cost
//! of an entry falls with the load.
//!
//! **Checkpoints.** Now and then the active worker appends all that it remembers. Each message says where the newest
//! complete checkpoint begins, so that a takeover reads little. Other entries go on meanwhile: an entry that a checkpoint
//! misses follows its beginning, and learning one twice does no harm.

mod absence;
mod anchor;
mod takeover;
mod writer;

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::amqp::{BrokerError, Settings};
use crate::consumer::broker::{JournalMessage, Publish, ReadFrom};
use crate::domain::journal::{Anchor, Batch, Entry, OrganizationHash, Unreadable};
use crate::sync::journal::{Journal, JournalHandle};
use crate::sync::{LONGEST_SEARCH_LAG, Worker};

pub(crate) use absence::Absence;
pub(crate) use anchor::anchor;
use takeover::{Known, Next, Takeover};
pub(crate) use writer::Writer;

/// A checkpoint is written when this many bytes follow the last one, or as many as it has if that is more.
const CHECKPOINT_AFTER: usize = 4 << 20;
/// A takeover that reads nothing for this long is given up.
const STUCK_AFTER: Duration = Duration::from_mins(1);
/// Entries of a checkpoint that are appended at once.
const CHECKPOINT_PART: usize = 200;

/// What the loop of the session has to do.
#[derive(Debug)]
pub(crate) enum Instruction {
    Nothing,
    /// Read again, from another position.
    Read(ReadFrom),
    /// Messages may start.
    Ready,
    /// Another session is the active one.
    TakenOver,
}

/// The journal in the loop of a session.
pub(crate) struct SessionJournal {
    session: Uuid,
    organization: Option<OrganizationHash>,
    worker: Worker,
    writer: Arc<Writer>,
    takeover: Takeover,
    /// A checkpoint is written at least this often, so that the broker does not delete the last one by its age.
    max_checkpoint_age: Duration,
    /// Bytes that were read since the last checkpoint began, and since when.
    since_checkpoint: (usize, Instant),
    /// The one that is being written.
    checkpoint: Option<Checkpoint>,
    /// The size of the last one, in bytes.
    checkpoint_size: usize,
    /// The most bytes of entries after which the broker must still have the last checkpoint.
    max_checkpoint_distance: usize,
    /// Ends with the session.
    checkpoint_task: Option<AbortOnDropHandle<()>>,
    unreadable: u64,
    /// The bytes of all messages that were read.
    read: usize,
    /// When the last message was read.
    last_read: Instant,
    /// When the session became the active one.
    active_since: Option<Instant>,
    /// The session before this one had no journal.
    worked_without: bool,
}

/// A checkpoint that is being written.
struct Checkpoint {
    id: Uuid,
    begins: Option<u64>,
}

impl SessionJournal {
    /// A session that reads what the active one appends.
    pub(crate) fn follow(worker: &Worker, session: Uuid, settings: &Settings) -> Self {
        let organization = organization(worker);
        Self {
            session,
            worker: worker.clone(),
            writer: Arc::new(Writer::new(session, organization, worker.clock().clone())),
            organization,
            takeover: Takeover::new(session),
            max_checkpoint_age: settings.journal.max_age / 4,
            since_checkpoint: (0, Instant::now()),
            checkpoint: None,
            checkpoint_size: 0,
            max_checkpoint_distance: usize::try_from(settings.journal.max_bytes / 4).unwrap_or(usize::MAX),
            checkpoint_task: None,
            unreadable: 0,
            read: 0,
            last_read: Instant::now(),
            active_since: None,
            worked_without: false,
        }
    }

    /// The session is the active one: appends the start entry. Failures to append go to `failures`.
    pub(crate) fn take_over(
        &mut self,
        publish: Arc<dyn Publish>,
        settings: &Settings,
        failures: mpsc::UnboundedSender<BrokerError>,
    ) {
        self.writer.append(vec![Entry::Start { at: self.worker.now() }]);
        Arc::clone(&self.writer).spawn(publish, settings.journal_queue(), failures);
        self.writer.flush();
        self.last_read = Instant::now();
        self.active_since = Some(Instant::now());
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active_since.is_some()
    }

    pub(crate) fn handle(&self) -> JournalHandle {
        JournalHandle::new(Arc::clone(&self.writer) as Arc<dyn Journal>)
    }

    /// RabbitMQ has an alarm, or no longer.
    pub(crate) fn set_blocked(&self, is_blocked: bool) {
        self.writer.set_blocked(is_blocked);
    }

    /// What the session before this one did is not in the journal. Others may have been active then, too.
    pub(crate) fn set_worked_without(&mut self, worked_without: bool) {
        self.worked_without = worked_without;
    }

    /// Whether the takeover does not go on. During an alarm it waits for the end of it.
    pub(crate) fn is_stuck(&self) -> bool {
        self.is_active()
            && !self.takeover.is_done()
            && !self.writer.is_blocked()
            && self.last_read.elapsed() >= STUCK_AFTER
    }

    /// A message of the journal arrived.
    pub(crate) fn received(&mut self, message: &JournalMessage) -> Instruction {
        self.last_read = Instant::now();
        self.since_checkpoint.0 = self.since_checkpoint.0.saturating_add(message.body.len());
        if let Some(appended) = self.own(message) {
            self.writer.read_back(appended);
            self.checkpoint_if_due();
            return Instruction::Nothing;
        }
        let mut batch = Batch::decode(&message.body);
        match &mut batch {
            Err(reason) => self.unreadable(reason, message.position),
            Ok(batch) if batch.is_of_other(self.organization) => {
                self.unreadable(&"about another organization in Close", message.position);
                batch.keep_starts();
            }
            Ok(_) => {}
        }
        self.read = self.read.saturating_add(message.body.len());
        if self.takeover.is_done() {
            return match batch {
                Ok(batch) => self.tail(message.position, batch),
                // It may be the start of another session.
                Err(Unreadable::Newer) => Instruction::TakenOver,
                Err(Unreadable::Foreign) => Instruction::Nothing,
            };
        }
        for entry in batch.iter().flat_map(|batch| &batch.entries) {
            match entry {
                Entry::CheckpointBegin { .. } => self.since_checkpoint = (0, Instant::now()),
                Entry::CheckpointEnd { .. } => self.checkpoint_size = self.since_checkpoint.0,
                Entry::Start { .. }
                | Entry::Creating { .. }
                | Entry::Settled { .. }
                | Entry::Keys { .. }
                | Entry::Written { .. }
                | Entry::Forgotten { .. } => {}
            }
        }
        match self.takeover.received(message.position, batch) {
            Next::Read(from) => Instruction::Read(from),
            Next::Learn(entries) => {
                for entry in entries {
                    self.worker.learn(entry);
                }
                Instruction::Nothing
            }
            Next::Done { entries, anchor, known } => {
                for entry in entries {
                    self.worker.learn(entry);
                }
                pass_on(&self.worker, known);
                let took = self.active_since.map(|since| since.elapsed()).unwrap_or_default();
                tracing::info!(
                    event = "journal_read",
                    bytes = self.read,
                    ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                    "read the journal, starting messages"
                );
                self.worker.remembers_from(anchor.remembered_from);
                self.writer.set_anchor(anchor);
                self.writer.read_back(1);
                if self.worked_without {
                    self.worker.forget();
                }
                match known {
                    // This process may know more than a new journal, and the next worker must find a beginning again.
                    Known::SinceBirth(_) | Known::EntriesAreGone { .. } => self.start_checkpoint(),
                    Known::All if self.worked_without => self.start_checkpoint(),
                    Known::All => {}
                }
                self.checkpoint_if_due();
                Instruction::Ready
            }
        }
    }

    /// How many entries were appended up to a message that is the session's own. It knows them, unless it waits for its
    /// checkpoint.
    fn own(&self, message: &JournalMessage) -> Option<u64> {
        let knows_entries = self.takeover.is_done() && self.checkpoint.is_none();
        if knows_entries { Batch::appended_by(self.session, &message.body) } else { None }
    }

    fn tail(&mut self, position: u64, batch: Batch) -> Instruction {
        let Batch { session, appended, entries, .. } = batch;
        if session != self.session {
            for entry in entries {
                if matches!(entry, Entry::Start { .. }) {
                    return Instruction::TakenOver;
                }
                self.worker.learn(entry);
            }
            return Instruction::Nothing;
        }
        self.writer.read_back(appended);
        for entry in entries {
            self.follow_checkpoint(position, &entry);
        }
        self.checkpoint_if_due();
        Instruction::Nothing
    }

    /// Logs the first, and then ever fewer.
    fn unreadable(&mut self, reason: &dyn Display, position: u64) {
        self.unreadable = self.unreadable.saturating_add(1);
        if self.unreadable.is_power_of_two() {
            tracing::warn!(
                event = "journal_entry_unreadable",
                position,
                count = self.unreadable,
                "ignoring messages in the journal: {reason}"
            );
        }
    }

    /// Where the checkpoint that is being written begins is known once it has been read back.
    fn follow_checkpoint(&mut self, position: u64, entry: &Entry) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        if *entry == (Entry::CheckpointBegin { checkpoint: checkpoint.id }) {
            checkpoint.begins = Some(position);
            self.since_checkpoint = (0, Instant::now());
        }
        let ends = matches!(entry, Entry::CheckpointEnd { checkpoint: id, .. } if *id == checkpoint.id);
        if let Some(position) = checkpoint.begins.filter(|_| ends) {
            let remembered_from = self.worker.remembered_from().unwrap_or_else(|| self.worker.now());
            self.writer.set_anchor(Anchor { position, remembered_from });
            self.checkpoint = None;
            self.checkpoint_size = self.since_checkpoint.0;
        }
    }

    fn checkpoint_if_due(&mut self) {
        let (bytes, began) = self.since_checkpoint;
        let is_due = bytes >= next_checkpoint(self.checkpoint_size, self.max_checkpoint_distance)
            || began.elapsed() >= self.max_checkpoint_age;
        if self.checkpoint.is_none() && is_due {
            self.start_checkpoint();
        }
    }

    fn start_checkpoint(&mut self) {
        let id = Uuid::now_v7();
        self.checkpoint = Some(Checkpoint { id, begins: None });
        let (worker, writer) = (self.worker.clone(), Arc::clone(&self.writer));
        let task = tokio::spawn(async move {
            writer.append(vec![Entry::CheckpointBegin { checkpoint: id }]);
            let mut entries = worker.checkpoint();
            loop {
                let part: Vec<Entry> = entries.by_ref().take(CHECKPOINT_PART).collect();
                if part.is_empty() {
                    break;
                }
                writer.append(part);
                // Messages need the journal, too.
                writer.stored().await;
            }
            writer.append(vec![Entry::CheckpointEnd { checkpoint: id }]);
            writer.flush();
        });
        self.checkpoint_task = Some(AbortOnDropHandle::new(task));
    }
}

/// How many bytes after the beginning of a checkpoint of this size the next one begins: not at once, whatever the limit.
fn next_checkpoint(size: usize, max_distance: usize) -> usize {
    let least = size.saturating_add(CHECKPOINT_AFTER);
    size.saturating_mul(2).max(least).min(max_distance.max(least))
}

fn organization(worker: &Worker) -> Option<OrganizationHash> {
    worker.mapping().organization.as_deref().map(OrganizationHash::of)
}

/// Passes on what the journal does not know.
fn pass_on(worker: &Worker, known: Known) {
    match known {
        Known::All => {}
        Known::SinceBirth(age) => {
            let rest = worker.settings().search_lag.saturating_sub(age);
            if !rest.is_zero() {
                worker.forget_changes(rest);
            }
        }
        Known::EntriesAreGone { before } => {
            if worker.forget_changes_before(before) {
                tracing::warn!(
                    event = "journal_incomplete",
                    before = before.to_string(),
                    hours = LONGEST_SEARCH_LAG.as_secs() / 3600,
                    "entries of the journal are gone, or from a newer version; creations wait until search has shown a \
                     younger change, or until this many hours after the last one that is missing"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_follows_a_checkpoint_as_it_has() {
        const MB: usize = 1 << 20;
        let megabytes = |size: usize, max| next_checkpoint(size * MB, max * MB) / MB;
        let sizes = [0, 1, 4, 10, 60];
        assert_eq!(sizes.map(|size| megabytes(size, 256)), [4, 5, 8, 20, 120]);
        assert_eq!(sizes.map(|size| megabytes(size, 16)), [4, 5, 8, 16, 64]);
    }
}
