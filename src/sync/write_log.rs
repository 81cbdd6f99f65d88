//! Which records this worker has written, and which writes may still take effect.
//!
//! An event that found its values in a record has applied them only if no other event writes the record at the same time: a
//! record that is not changed is not locked. Times do not tell, because two events may have the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::layered::{Bounds, Layered};

/// In records. An entry takes about 200 bytes.
const CAPACITY: usize = 50_000;

/// A moment in the order of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(u64);

#[derive(Clone, Copy, Debug)]
struct Last {
    stamp: Stamp,
    /// It may still take effect, because its answer has not come or was lost.
    is_pending: bool,
}

/// Clones share the entries.
#[derive(Clone, Debug)]
pub(crate) struct WriteLog {
    last: Layered<String, Last>,
    stamps: Arc<AtomicU64>,
    /// The stamp of the last write of another worker.
    elsewhere: Arc<AtomicU64>,
}

impl Default for WriteLog {
    fn default() -> Self {
        let (last, stamps) = (Layered::new(Bounds::entries(CAPACITY)), Arc::new(AtomicU64::new(1)));
        Self { last, stamps, elsewhere: Arc::default() }
    }
}

impl WriteLog {
    /// A stamp that is younger than all writes so far, and older than all later ones.
    pub(crate) fn now(&self) -> Stamp {
        Stamp(self.stamps.fetch_add(1, Ordering::SeqCst))
    }

    /// A write is about to be sent.
    pub(crate) fn begins(&self, record: &str) -> Stamp {
        let stamp = self.now();
        self.last.insert(record.to_owned(), Last { stamp, is_pending: true });
        stamp
    }

    /// The write has taken effect, or never will.
    pub(crate) fn ends(&self, record: &str, stamp: Stamp) {
        self.last.insert(record.to_owned(), Last { stamp, is_pending: false });
    }

    /// Another worker has written the record.
    pub(crate) fn written_elsewhere(&self, record: &str) {
        let stamp = self.now();
        self.elsewhere.fetch_max(stamp.0, Ordering::SeqCst);
        self.ends(record, stamp);
    }

    /// Whether no write of another worker has become known since then.
    pub(crate) fn is_alone_since(&self, since: Stamp) -> bool {
        self.elsewhere.load(Ordering::SeqCst) < since.0
    }

    /// The stamp of the last write of a record. `None` if a write other than `own` began `since` then, or may still take effect.
    /// A record that is not known gets a new stamp, so that it never has an old one again.
    pub(crate) fn unwritten(&self, record: &str, since: Stamp, own: &[Stamp]) -> Option<Stamp> {
        let Some(Last { stamp, is_pending }) = self.last.with(record, |last| *last) else {
            let stamp = self.now();
            self.ends(record, stamp);
            return Some(stamp);
        };
        (!is_pending && (stamp <= since || own.contains(&stamp))).then_some(stamp)
    }

    /// Whether the record was not written since that stamp.
    pub(crate) fn is_last(&self, record: &str, stamp: Stamp) -> bool {
        let is_same = |last: &Last| last.stamp == stamp && !last.is_pending;
        self.last.with(record, is_same).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_of_another_message_is_noticed_until_its_answer_and_after_it() {
        let log = WriteLog::default();
        let before = log.now();
        let stamp = log.unwritten("cont_1", before, &[]).unwrap();
        assert!(log.is_last("cont_1", stamp));
        let own = log.begins("cont_1");
        assert_eq!(log.unwritten("cont_1", log.now(), &[own]), None, "it may still take effect");
        assert!(!log.is_last("cont_1", stamp));
        log.ends("cont_1", own);
        assert_eq!(log.unwritten("cont_1", before, &[]), None, "written meanwhile");
        assert_eq!(log.unwritten("cont_1", before, &[own]), Some(own));
        assert_eq!(log.unwritten("cont_1", log.now(), &[]), Some(own), "written before");
        log.written_elsewhere("cont_1");
        assert!(!log.is_last("cont_1", own));
    }
}
