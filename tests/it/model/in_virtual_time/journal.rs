//! The journal on the simulated broker: a log that outlives the processes.

use close_sync::consumer::broker::{JournalMessage, ReadFrom};
use tokio::sync::watch;

#[derive(Debug)]
pub(super) struct Journal(watch::Sender<Vec<Vec<u8>>>);

impl Default for Journal {
    fn default() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }
}

impl Journal {
    pub(super) fn append(&self, body: Vec<u8>) {
        self.0.send_modify(|messages| messages.push(body));
    }

    /// Where a reader begins.
    pub(super) fn position(&self, from: ReadFrom) -> usize {
        match from {
            ReadFrom::Last => self.0.borrow().len().saturating_sub(1),
            ReadFrom::Position(position) => usize::try_from(position).unwrap(),
        }
    }

    /// Waits for the message at a position. Cancel safe.
    pub(super) async fn read(&self, position: Option<usize>) -> JournalMessage {
        let Some(position) = position else { return std::future::pending().await };
        let mut messages = self.0.subscribe();
        let messages = messages.wait_for(|messages| messages.len() > position).await.unwrap();
        JournalMessage { position: position as u64, body: messages[position].clone() }
    }
}
