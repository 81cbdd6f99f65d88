//! Records being written to: no two messages change one record at the same time.
//!
//! Key queues keep messages apart that share a key, but two messages can mean one Contact by different
//! keys, one by its user id, one by its email. Close replaces a list as a whole, so writing what was
//! read before the other wrote would undo it. A message therefore claims the records of its plan
//! before it writes. When one of them is taken, or was written to since it was read, the message looks
//! again. Nobody waits while holding a claim, so there is no deadlock.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Longer than any message is held between reading and writing, a wait for budget included.
const REMEMBERED: Duration = Duration::from_hours(1);
/// Records written to that are remembered. An entry takes about 100 bytes.
const CAPACITY: u64 = 50_000;

/// The claims of one worker. Clones share them.
#[derive(Clone, Debug)]
pub struct RecordLocks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    taken: Mutex<HashSet<String>>,
    written: Cache<String, Instant>,
    released: Notify,
}

impl Default for RecordLocks {
    fn default() -> Self {
        Self(Arc::new(Inner {
            taken: Mutex::default(),
            written: Cache::builder()
                .max_capacity(CAPACITY)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(REMEMBERED)
                .build(),
            released: Notify::new(),
        }))
    }
}

/// Records claimed. Dropping it releases them, as written to.
#[derive(Debug)]
pub struct RecordGuard {
    claims: RecordLocks,
    records: Vec<String>,
}

impl RecordLocks {
    /// Locks records that were read at `read` or later. `None` after waiting for another message, or
    /// when one has written to them since: then read again.
    pub async fn take(&self, records: Vec<String>, read: Instant) -> Option<RecordGuard> {
        let mut released = std::pin::pin!(self.0.released.notified());
        // From here on no release is missed.
        released.as_mut().enable();
        let busy = {
            let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let busy = records.iter().any(|record| taken.contains(record));
            let stale = records.iter().any(|record| self.0.written.get(record).is_some_and(|at| at >= read));
            if !busy && !stale {
                taken.extend(records.iter().cloned());
                return Some(RecordGuard { claims: self.clone(), records });
            }
            busy
        };
        if busy {
            released.await;
        }
        None
    }
}

impl Drop for RecordGuard {
    fn drop(&mut self) {
        let inner = &self.claims.0;
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
    async fn a_record_is_had_by_one_and_has_to_be_read_again_by_the_next() {
        let claims = RecordLocks::default();
        let records = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let read = Instant::now();
        let first = claims.take(records(&["lead_1", "cont_1"]), read).await.unwrap();
        assert!(claims.take(records(&["cont_2"]), read).await.is_some(), "others are free");

        let second = tokio::spawn({
            let claims = claims.clone();
            let records = records(&["cont_1", "cont_3"]);
            async move { claims.take(records, read).await.is_none() }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        assert!(second.await.unwrap(), "what it read is old");
        assert!(claims.take(records(&["lead_1"]), read).await.is_none());
        assert!(claims.take(records(&["cont_1", "cont_3"]), Instant::now()).await.is_some());
    }
}
