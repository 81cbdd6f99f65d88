//! Whether many different records vanish in a row, which is no series of deletions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// This many different records of one kind that vanish in a row are not deletions.
pub(super) const MANY: usize = 5;
/// The longest time between the first and the last of them.
pub(super) const IN_A_ROW: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Lead,
    Contact,
}

impl Kind {
    fn of(id: &str) -> Self {
        if id.starts_with("lead_") { Self::Lead } else { Self::Contact }
    }
}

/// Records that answered 404 since one of their kind was last read or changed. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Vanished(Arc<Mutex<ByKind>>);

type ByKind = BTreeMap<Kind, VecDeque<(Instant, String)>>;

impl Vanished {
    /// Close still has records of this kind.
    pub(super) fn forget(&self, kind: Kind) {
        self.lock().remove(&kind);
    }

    /// Counts a record that answered 404. Returns whether many of its kind did so in a row.
    pub(super) fn are_many_with(&self, id: &str, now: Instant) -> bool {
        let mut by_kind = self.lock();
        let vanished = by_kind.entry(Kind::of(id)).or_default();
        vanished.retain(|(at, _)| now < *at + IN_A_ROW);
        // A record counts from the first time, so that a few that are really gone do not count for ever.
        if vanished.len() < MANY && !vanished.iter().any(|(_, known)| known == id) {
            vanished.push_back((now, id.to_owned()));
        }
        vanished.len() >= MANY
    }

    fn lock(&self) -> MutexGuard<'_, ByKind> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
