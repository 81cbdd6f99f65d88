//! What a session reads of the journal: from the newest checkpoint up to its own start entry. Pure.
//!
//! Each message says where to begin ([`Anchor`]), but the first ones of a session, written before it knew. The
//! session reads the last message; while that does not say it, one before it. Then it reads from the checkpoint on. A
//! standby follows the journal for days, so it takes over each newer checkpoint that it has read.

use std::collections::HashSet;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::consumer::broker::ReadFrom;
use crate::domain::journal::{Anchor, Batch, Entry, Unreadable};

/// The message to read after one that does not say where the checkpoint is. The steps grow, because many may not say it.
pub(super) fn further_back(position: u64, steps: u32) -> u64 {
    position.saturating_sub(1_u64.checked_shl(steps).unwrap_or(u64::MAX))
}

/// What the journal says about the time before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// All that earlier workers created.
    All,
    /// The journal is this old. Before it there were workers without one, or none.
    SinceBirth(Duration),
    /// Entries that no checkpoint repeats are deleted, or cannot be read. They are older than this, by the clock of a worker.
    EntriesAreGone { before: Timestamp },
}

/// What follows from a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Read again from here.
    Read(ReadFrom),
    Learn(Vec<Entry>),
    /// The own start entry was read.
    Done {
        entries: Vec<Entry>,
        anchor: Anchor,
        known: Known,
    },
}

#[derive(Debug)]
pub(super) struct Takeover {
    session: Uuid,
    phase: Phase,
    /// Creations of which the end has been read. A checkpoint may repeat their beginning.
    settled: HashSet<Uuid>,
    /// The first start entry, by the clock of its worker.
    first_start: Option<Timestamp>,
}

#[derive(Debug)]
enum Phase {
    Locating {
        steps_back: u32,
        /// The position that was asked for. The broker sends the first message from there on that still exists.
        asked: Option<u64>,
    },
    Reading(Reading),
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    /// Where the newest checkpoint begins.
    checkpoint: u64,
    remembered_from: Option<Timestamp>,
    /// The first message that was read, and what it says.
    begins: Option<(u64, Begins)>,
    /// The last message of a newer version.
    newer: Option<u64>,
    /// When the first message was sent that can be read, of those after it.
    readable_since: Option<Timestamp>,
}

/// How reading began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    WithJournal,
    WithCheckpoint,
    /// What came before is gone.
    Later,
}

impl Takeover {
    pub(super) fn new(session: Uuid) -> Self {
        Self {
            session,
            phase: Phase::Locating { steps_back: 0, asked: None },
            settled: HashSet::new(),
            first_start: None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Done)
    }

    /// A message was read.
    pub(super) fn received(&mut self, position: u64, batch: Result<Batch, Unreadable>) -> Next {
        let is_newer = matches!(batch, Err(Unreadable::Newer));
        let batch = batch.ok();
        match &mut self.phase {
            Phase::Locating { steps_back, asked } => {
                let (checkpoint, remembered_from) = match batch.as_ref().and_then(|batch| batch.anchor) {
                    Some(anchor) if anchor.position <= position => {
                        (anchor.position, Some(anchor.remembered_from))
                    }
                    // It is the first one that is left.
                    _ if position == 0 || asked.is_some_and(|asked| position > asked) => (0, None),
                    _ => {
                        let before = further_back(position, *steps_back);
                        *steps_back += 1;
                        *asked = Some(before);
                        return Next::Read(ReadFrom::Position(before));
                    }
                };
                let reading =
                    Reading { checkpoint, remembered_from, begins: None, newer: None, readable_since: None };
                self.phase = Phase::Reading(reading);
                Next::Read(ReadFrom::Position(checkpoint))
            }
            Phase::Reading(reading) => {
                reading.received(position, batch.as_ref(), is_newer);
                let reading = *reading;
                batch.map_or(Next::Learn(Vec::new()), |batch| self.read(batch, reading))
            }
            Phase::Done => Next::Learn(Vec::new()),
        }
    }

    fn read(&mut self, batch: Batch, reading: Reading) -> Next {
        let mut entries = Vec::with_capacity(batch.entries.len());
        for entry in batch.entries {
            match &entry {
                Entry::Start { at } => {
                    let first = *self.first_start.get_or_insert(*at);
                    if batch.session == self.session {
                        self.phase = Phase::Done;
                        self.settled = HashSet::new();
                        let age = Duration::try_from(at.duration_since(first)).unwrap_or_default();
                        let Reading { checkpoint, remembered_from, .. } = reading;
                        let (known, remembered_from) = match reading.begins() {
                            Begins::WithCheckpoint => (Known::All, remembered_from.unwrap_or(*at)),
                            Begins::WithJournal => (Known::SinceBirth(age), remembered_from.unwrap_or(first)),
                            Begins::Later => {
                                let before = reading.readable_since.unwrap_or(*at);
                                (Known::EntriesAreGone { before }, *at)
                            }
                        };
                        let anchor = Anchor { position: checkpoint, remembered_from };
                        return Next::Done { entries, anchor, known };
                    }
                }
                Entry::Settled { operation } => {
                    self.settled.insert(*operation);
                }
                Entry::Creating { operation, .. } if self.settled.contains(operation) => continue,
                // It repeats nothing that ended before.
                Entry::CheckpointBegin { .. } => self.settled.clear(),
                Entry::Creating { .. }
                | Entry::Keys { .. }
                | Entry::Written { .. }
                | Entry::Forgotten { .. }
                | Entry::CheckpointEnd { .. } => {}
            }
            entries.push(entry);
        }
        Next::Learn(entries)
    }
}

impl Reading {
    fn received(&mut self, position: u64, batch: Option<&Batch>, is_newer: bool) {
        let begins = |entry: &Entry| matches!(entry, Entry::CheckpointBegin { .. });
        let (first, _) = *self.begins.get_or_insert_with(|| {
            let is_checkpoint =
                position == self.checkpoint && batch.is_some_and(|batch| batch.entries.iter().any(begins));
            let how = match position {
                0 => Begins::WithJournal,
                _ if is_checkpoint => Begins::WithCheckpoint,
                _ => Begins::Later,
            };
            (position, how)
        });
        if is_newer {
            (self.newer, self.readable_since) = (Some(position), None);
        }
        self.readable_since = self.readable_since.or_else(|| batch?.at);
        let read = first.max(self.checkpoint + 1)..=position;
        if let Some(anchor) = batch.and_then(|batch| batch.anchor)
            && read.contains(&anchor.position)
        {
            self.checkpoint = anchor.position;
            self.remembered_from = Some(anchor.remembered_from);
            self.begins = Some((first, Begins::WithCheckpoint));
        }
    }

    /// What a newer version wrote is as good as gone, until a checkpoint follows.
    fn begins(&self) -> Begins {
        match self.begins {
            Some((_, begins)) if self.newer.is_none_or(|newer| newer < self.checkpoint) => begins,
            Some(_) | None => Begins::Later,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::journal::VERSION;

    const ME: Uuid = Uuid::from_u128(1);
    const BEFORE: Uuid = Uuid::from_u128(2);
    const GONE: Known = Known::EntriesAreGone { before: SENT };
    /// When all messages were sent.
    const SENT: Timestamp = Timestamp::constant(30, 0);
    const OPERATION: Uuid = Uuid::from_u128(7);

    fn batch(session: Uuid, anchor: Option<u64>, entries: Vec<Entry>) -> Batch {
        let anchor = anchor.map(|position| Anchor { position, remembered_from: at(40) });
        Batch { version: VERSION, session, organization: None, anchor, appended: 0, at: Some(SENT), entries }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn anchor(position: u64, second: i64) -> Anchor {
        Anchor { position, remembered_from: at(second) }
    }

    fn start(second: i64) -> Entry {
        Entry::Start { at: at(second) }
    }

    fn creating() -> Entry {
        Entry::Creating { operation: OPERATION, keys: Vec::new(), lead: true, at: Timestamp::UNIX_EPOCH }
    }

    fn settled() -> Entry {
        Entry::Settled { operation: OPERATION }
    }

    fn begin() -> Entry {
        Entry::CheckpointBegin { checkpoint: OPERATION }
    }

    /// Takes over a journal that holds these messages from a position on.
    fn take_over(first: u64, messages: &[Batch]) -> (Vec<Entry>, Anchor, Known, u32) {
        let mut takeover = Takeover::new(ME);
        let (mut from, mut reads, mut learnt) = (ReadFrom::Last, 1, Vec::new());
        'read: loop {
            let position = match from {
                ReadFrom::Last => first + messages.len() as u64 - 1,
                ReadFrom::Position(position) => position.max(first),
            };
            for at in position.. {
                let message = messages.get(usize::try_from(at - first).unwrap()).expect("its start entry");
                match takeover.received(at, Ok(message.clone())) {
                    Next::Read(next) => {
                        (from, reads) = (next, reads + 1);
                        continue 'read;
                    }
                    Next::Learn(entries) => learnt.extend(entries),
                    Next::Done { entries, anchor, known } => {
                        learnt.extend(entries);
                        assert!(takeover.is_done());
                        return (learnt, anchor, known, reads);
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_session_finds_only_its_own_start() {
        let messages = [batch(ME, None, vec![start(100)])];
        assert_eq!(take_over(0, &messages), (vec![], anchor(0, 100), Known::SinceBirth(Duration::ZERO), 2));
    }

    #[test]
    fn without_a_checkpoint_all_is_read() {
        let messages = [
            batch(BEFORE, None, vec![start(100)]),
            batch(BEFORE, Some(0), vec![creating()]),
            batch(ME, None, vec![start(160)]),
        ];
        let known = Known::SinceBirth(Duration::from_mins(1));
        assert_eq!(take_over(0, &messages), (vec![start(100), creating()], anchor(0, 40), known, 3));
    }

    #[test]
    fn reading_begins_with_the_checkpoint_that_a_late_message_names() {
        let messages = [
            batch(BEFORE, Some(0), vec![creating()]),
            batch(BEFORE, Some(0), vec![begin(), creating()]),
            batch(BEFORE, Some(11), vec![settled()]),
            // A session that died at once, and one that starts at the same time.
            batch(Uuid::from_u128(3), None, vec![start(100)]),
            batch(ME, None, vec![start(160)]),
            batch(Uuid::from_u128(4), None, vec![start(161)]),
        ];
        let learnt = vec![begin(), creating(), settled(), start(100)];
        assert_eq!(take_over(10, &messages), (learnt, anchor(11, 40), Known::All, 4));
    }

    #[test]
    fn a_standby_takes_over_the_newer_checkpoints_that_it_has_read() {
        let newer = Anchor { position: 12, remembered_from: at(90) };
        let says = |anchor| Batch { anchor: Some(anchor), ..batch(BEFORE, None, vec![settled()]) };
        for (last, known, expected) in [
            (newer, Known::All, newer),
            // It points to what was deleted before the standby began to read.
            (anchor(9, 90), GONE, anchor(3, 160)),
            (anchor(99, 90), GONE, anchor(3, 160)),
        ] {
            let mut takeover = Takeover::new(ME);
            let before = || Ok(batch(BEFORE, Some(3), vec![creating()]));
            assert_eq!(takeover.received(11, before()), Next::Read(ReadFrom::Position(3)));
            takeover.received(10, before());
            takeover.received(12, Ok(batch(BEFORE, Some(3), vec![begin()])));
            takeover.received(13, Ok(says(last)));
            let Next::Done { anchor, known: is_known, .. } =
                takeover.received(14, Ok(batch(ME, None, vec![start(160)])))
            else {
                panic!("done")
            };
            assert_eq!((anchor, is_known), (expected, known), "{last:?}");
        }
    }

    #[test]
    fn a_checkpoint_after_what_a_newer_version_wrote_says_all() {
        let mut takeover = Takeover::new(ME);
        takeover.received(0, Err(Unreadable::Newer));
        takeover.received(0, Err(Unreadable::Newer));
        takeover.received(1, Ok(batch(BEFORE, None, vec![begin()])));
        takeover.received(2, Ok(batch(BEFORE, Some(1), vec![settled()])));
        let done = takeover.received(3, Ok(batch(ME, None, vec![start(160)])));
        let known = Known::All;
        assert_eq!(done, Next::Done { entries: vec![], anchor: anchor(1, 40), known });
    }

    #[test]
    fn the_steps_back_end_with_the_first_message_that_is_left() {
        let silent = || batch(BEFORE, None, vec![creating()]);
        let messages = [silent(), silent(), silent(), batch(ME, None, vec![start(160)])];
        let learnt = vec![creating(), creating(), creating()];
        assert_eq!(take_over(50, &messages), (learnt, anchor(0, 160), GONE, 5));
    }

    #[test]
    fn the_steps_back_grow() {
        let silent = |n| vec![batch(BEFORE, None, vec![settled()]); n];
        for (n, reads) in [(10, 6), (1000, 12), (10_000, 16)] {
            let messages =
                [vec![batch(BEFORE, Some(0), vec![])], silent(n), vec![batch(ME, None, vec![start(9)])]]
                    .concat();
            assert_eq!(take_over(0, &messages).3, reads, "{n}");
        }
    }

    #[test]
    fn entries_that_the_broker_has_deleted_are_noticed() {
        let messages = [batch(BEFORE, Some(3), vec![creating()]), batch(ME, None, vec![start(160)])];
        assert_eq!(take_over(5, &messages), (vec![creating()], anchor(3, 160), GONE, 3));
    }

    #[test]
    fn a_creation_that_a_checkpoint_repeats_after_its_end_is_not_pending() {
        let messages =
            [batch(BEFORE, Some(5), vec![begin(), settled(), creating()]), batch(ME, None, vec![start(160)])];
        assert_eq!(take_over(5, &messages).0, [begin(), settled()]);
    }

    #[test]
    fn what_is_gone_was_sent_before_what_can_be_read() {
        let sent = |second: Option<i64>, session| Batch {
            at: second.map(at),
            ..batch(session, None, vec![start(160)])
        };
        for (read, before) in [
            (vec![Ok(Some(20)), Ok(Some(25))], 20),
            (vec![Ok(None), Err(Unreadable::Foreign), Ok(Some(25))], 25),
            (vec![Ok(Some(20)), Err(Unreadable::Newer), Ok(Some(25)), Ok(Some(28))], 25),
            (vec![Ok(Some(20)), Err(Unreadable::Newer)], 50),
        ] {
            let mut takeover = Takeover::new(ME);
            takeover.received(9, Ok(Batch { anchor: Some(anchor(3, 40)), ..sent(None, BEFORE) }));
            for (position, batch) in (4..).zip(&read) {
                takeover.received(position, batch.map(|at| sent(at, BEFORE)));
            }
            let Next::Done { known, .. } = takeover.received(9, Ok(sent(Some(50), ME))) else {
                panic!("done")
            };
            assert_eq!(known, Known::EntriesAreGone { before: at(before) }, "{read:?}");
        }
    }

    #[test]
    fn unreadable_messages_are_passed_over() {
        let mut takeover = Takeover::new(ME);
        let foreign = || Err(Unreadable::Foreign);
        assert_eq!(takeover.received(1, foreign()), Next::Read(ReadFrom::Position(0)));
        assert_eq!(takeover.received(0, foreign()), Next::Read(ReadFrom::Position(0)));
        assert_eq!(takeover.received(0, foreign()), Next::Learn(vec![]));
        let mine = batch(ME, None, vec![start(160)]);
        let known = Known::SinceBirth(Duration::ZERO);
        assert_eq!(
            takeover.received(1, Ok(mine)),
            Next::Done { entries: vec![], anchor: anchor(0, 160), known }
        );
    }

    #[test]
    fn what_a_newer_version_wrote_is_as_good_as_gone() {
        let mut takeover = Takeover::new(ME);
        assert_eq!(takeover.received(0, Err(Unreadable::Newer)), Next::Read(ReadFrom::Position(0)));
        assert_eq!(takeover.received(0, Err(Unreadable::Newer)), Next::Learn(vec![]));
        let mine = batch(ME, None, vec![start(160)]);
        let known = GONE;
        let done = Next::Done { entries: vec![], anchor: anchor(0, 160), known };
        assert_eq!(takeover.received(1, Ok(mine)), done);
    }
}
