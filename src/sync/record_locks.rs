//! Locks on records: no two messages change one record at the same time.
//!
//! Key queues separate messages that share a key, but two messages can mean one Contact by different keys, one by
//! its user id and one by its email. Close replaces a list as a whole, so writing a list that was read before
//! the other write would undo it. A message therefore locks the records of its plan before it writes. If one of
//! them is locked, or was written to since it was read, the message looks up again. No message waits while it
//! holds a lock, so there is no deadlock.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::sync::layered::{Bounds, Layered};

/// Longer than any message takes between reading and writing, waits for rate budget included.
const REMEMBERED: Duration = Duration::from_hours(1);
/// In records. An entry takes about 100 bytes.
const CAPACITY: usize = 50_000;

/// The locks of one worker. Clones share them.
#[derive(Clone, Debug)]
pub struct RecordLocks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    taken: Mutex<HashSet<String>>,
    written: Layered<String, Instant>,
    released: Notify,
}

impl Default for RecordLocks {
    fn default() -> Self {
        Self(Arc::new(Inner {
            taken: Mutex::default(),
            written: Layered::new(Bounds { lifetime: Some(REMEMBERED), ..Bounds::entries(CAPACITY) }),
            released: Notify::new(),
        }))
    }
}

/// Locked records. Dropping it unlocks them and marks them as written to.
#[derive(Debug)]
pub struct RecordGuard {
    locks: RecordLocks,
    records: Vec<String>,
}

impl RecordLocks {
    /// Locks records that were read at `read` or later. Returns `None` when the caller must read again: after
    /// waiting for another message's lock, or when a record was written to since.
    pub async fn lock(&self, records: Vec<String>, read: Instant) -> Option<RecordGuard> {
        let mut released = std::pin::pin!(self.0.released.notified());
        // From here on no release is missed.
        released.as_mut().enable();
        let busy = {
            let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let busy = records.iter().any(|record| taken.contains(record));
            let stale = records.iter().any(|record| self.0.written.get(record).is_some_and(|at| at >= read));
            if !busy && !stale {
                taken.extend(records.iter().cloned());
                return Some(RecordGuard { locks: self.clone(), records });
            }
            busy
        };
        if busy {
            released.await;
        }
        None
    }

    /// The locked records, sorted.
    #[cfg(test)]
    pub fn locked(&self) -> Vec<String> {
        let mut locked: Vec<String> = {
            let taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.iter().cloned().collect()
        };
        locked.sort();
        locked
    }
}

impl Drop for RecordGuard {
    fn drop(&mut self) {
        let inner = &self.locks.0;
        let mut taken = inner.taken.lock().unwrap_or_else(PoisonError::into_inner);
        for record in &self.records {
            inner.written.insert(record.clone(), Instant::now());
            taken.remove(record);
        }
        drop(taken);
        inner.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_is_exclusive_and_the_next_message_must_read_again() {
        let locks = RecordLocks::default();
        let records = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let read = Instant::now();
        let first = locks.lock(records(&["lead_1", "cont_1"]), read).await.unwrap();
        assert!(locks.lock(records(&["cont_2"]), read).await.is_some(), "other records are free");

        let second = tokio::spawn({
            let locks = locks.clone();
            let records = records(&["cont_1", "cont_3"]);
            async move { locks.lock(records, read).await.is_none() }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        assert!(second.await.unwrap(), "what it read is stale");
        assert!(locks.lock(records(&["lead_1"]), read).await.is_none());
        assert!(locks.lock(records(&["cont_1", "cont_3"]), Instant::now()).await.is_some());
    }
}
