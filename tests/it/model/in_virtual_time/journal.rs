//! The journal on the simulated broker: a log that outlives the processes. The broker deletes the oldest messages, a segment
//! at a time.

use std::collections::VecDeque;
use std::time::Duration;

use close_sync::consumer::broker::{JournalMessage, ReadFrom};
use tokio::sync::watch;
use tokio::time::Instant;

#[derive(Debug)]
pub(super) struct Journal {
    log: watch::Sender<Log>,
    max_age: Duration,
    segment: usize,
}

#[derive(Debug, Default)]
struct Log {
    /// The position of the first message that is kept.
    first: usize,
    messages: VecDeque<(Instant, Vec<u8>)>,
}

impl Journal {
    pub(super) fn new(max_age: Duration, segment: usize) -> Self {
        Self { log: watch::Sender::new(Log::default()), max_age, segment }
    }

    pub(super) fn append(&self, body: Vec<u8>) {
        self.log.send_modify(|log| {
            log.messages.push_back((Instant::now(), body));
            // A segment is deleted when its last message is too old, and never the one that is written.
            let is_old = |log: &Log| {
                let last = log.messages.get(self.segment - 1);
                log.messages.len() > self.segment && last.is_some_and(|(at, _)| at.elapsed() > self.max_age)
            };
            while is_old(log) {
                log.messages.drain(..self.segment);
                log.first += self.segment;
            }
        });
    }

    /// Where a reader begins.
    pub(super) fn position(&self, from: ReadFrom) -> usize {
        let log = self.log.borrow();
        match from {
            ReadFrom::Last => (log.first + log.messages.len()).saturating_sub(1).max(log.first),
            ReadFrom::Position(position) => usize::try_from(position).unwrap().max(log.first),
        }
    }

    /// Waits for the message at a position. Cancel safe.
    pub(super) async fn read(&self, position: Option<usize>) -> JournalMessage {
        let Some(position) = position else { return std::future::pending().await };
        let mut log = self.log.subscribe();
        let log = log.wait_for(|log| log.first + log.messages.len() > position).await.unwrap();
        let position = position.max(log.first);
        let (_, body) = &log.messages[position - log.first];
        JournalMessage { position: position as u64, body: body.clone() }
    }
}
