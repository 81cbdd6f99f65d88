//! Measures how far search lags behind, without calls of its own: the condition for one change of ours rides along in the
//! searches for other messages, until a search shows the change. Then the youngest change since rides along.
//!
//! What is shown proves to [`LagGuard`] that search shows older changes too. A person may delete the record meanwhile, so a
//! younger change takes its place after a while, and after a longer while the next time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use strum::VariantArray;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::close::{Client, Lookup};
use crate::domain::journal::{ChangeKind, RecordId};
use crate::domain::mapping::{Key, KeyFields};
use crate::sync::clock::Clock;
use crate::sync::id_cache::{Change, IdCache};
use crate::sync::lag_guard::LagGuard;

const KINDS: usize = ChangeKind::VARIANTS.len();

/// The first patience with a change that search does not show. The record may be gone. It doubles each time.
const PATIENCE: Duration = Duration::from_mins(10);

pub struct SearchLag {
    watcher: Arc<Watcher>,
    /// Aborted when the worker is gone.
    tasks: Mutex<JoinSet<()>>,
}

struct Watcher {
    state: Mutex<[Kind; KINDS]>,
    guard: Arc<LagGuard>,
    id_cache: IdCache,
    clock: Clock,
}

/// The changes of one kind.
#[derive(Debug)]
struct Kind {
    /// A change rides along.
    is_watching: bool,
    /// The youngest change since.
    next: Option<Watched>,
    /// The age of the last change that search has shown, at the last search that did not show it. The first search that
    /// shows it may come much later than it could have.
    measured: Option<Duration>,
    /// The age of the change that rides along, at the last search that did not show it.
    missed: Option<Duration>,
    /// When a change is older than this, the youngest takes its place.
    patience: Duration,
}

impl Kind {
    /// A search has shown the change that rides along.
    fn shown(&mut self) {
        let missed = self.missed.take();
        (self.measured, self.patience) = (Some(missed.unwrap_or_default()), PATIENCE);
    }

    /// A search has not shown the change, which is this old. Whether to give up on it.
    fn missed(&mut self, age: Option<Duration>) -> bool {
        self.missed = age;
        let gives_up = self.next.is_some() && age.is_some_and(|age| age > self.patience);
        if gives_up {
            self.patience = self.patience.saturating_mul(2);
        }
        gives_up
    }

    /// The lag, at least.
    fn lag(&self) -> Option<Duration> {
        self.measured.max(self.missed)
    }
}

impl Default for Kind {
    fn default() -> Self {
        Self { is_watching: false, next: None, measured: None, missed: None, patience: PATIENCE }
    }
}

#[derive(Debug)]
struct Watched {
    key: Key,
    lookup: Lookup,
    record: RecordId,
    change: Change,
}

impl SearchLag {
    pub(crate) fn new(guard: Arc<LagGuard>, id_cache: IdCache, clock: Clock) -> Self {
        let watcher = Arc::new(Watcher { state: Mutex::default(), guard, id_cache, clock });
        Self { watcher, tasks: Mutex::default() }
    }

    /// The lag of search for changes of this kind, at least: the age of the last change at the last search that did not show
    /// it. `None` before the first measurement. Without searches it stays as it is.
    pub fn current(&self, kind: ChangeKind) -> Option<Duration> {
        self.watcher.with(kind, |kind| kind.lag())
    }

    /// A record got a key. Watches until search shows it, unless an earlier change is watched.
    pub(crate) fn watch(
        &self,
        client: &Client,
        keys: &KeyFields,
        key: Key,
        record: RecordId,
        change: Change,
    ) {
        let Some(lookup) = lookup(&key, keys).filter(|_| change.shows_lag(&key)) else { return };
        let watched = Watched { key, lookup, record, change };
        let is_idle = self.watcher.with(change.kind, |kind| {
            kind.next = Some(watched);
            !kind.is_watching
        });
        if is_idle {
            let (state, client) = (Arc::clone(&self.watcher), client.clone());
            let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            while tasks.try_join_next().is_some() {}
            tasks.spawn(async move { while state.watch_next(&client, change.kind).await {} });
        }
    }
}

impl Watcher {
    fn with<T>(&self, kind: ChangeKind, with: impl FnOnce(&mut Kind) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize])
    }

    fn age(&self, change: Change) -> Option<Duration> {
        Duration::try_from((self.clock)().duration_since(change.at)).ok()
    }

    /// Watches the youngest change until search shows it. False if there is none.
    async fn watch_next(&self, client: &Client, kind: ChangeKind) -> bool {
        let next = self.with(kind, |kind| {
            let next = kind.next.take();
            kind.is_watching = next.is_some();
            next
        });
        let Some(Watched { key, lookup, record, change }) = next else { return false };
        loop {
            let Some(ids) = client.ride_along(lookup.clone()).await else { continue };
            if ids.iter().any(|id| id == record.as_str()) {
                self.id_cache.seen(&key, &record);
                self.guard.shown(kind, change.at, Instant::now());
                self.with(kind, Kind::shown);
                return true;
            }
            if self.with(kind, |kind| kind.missed(self.age(change))) {
                return true;
            }
        }
    }
}

fn lookup(key: &Key, keys: &KeyFields) -> Option<Lookup> {
    Some(match key {
        Key::Company(id) => Lookup::Lead { field: keys.company.clone()?, company_id: id.clone() },
        Key::User(id) => Lookup::Contact { user: Some((keys.user.clone()?, id.clone())), email: None },
        Key::Email(email) => Lookup::Contact { user: None, email: Some(email.clone()) },
    })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::domain::record::LeadId;

    #[test]
    fn the_lag_is_what_searches_have_missed_at_least() {
        let mut kind = Kind::default();
        assert_eq!(kind.lag(), None);
        assert!(!kind.missed(Some(Duration::from_secs(40))));
        assert_eq!(kind.lag(), Some(Duration::from_secs(40)), "before it is shown");
        kind.shown();
        assert_eq!(kind.lag(), Some(Duration::from_secs(40)));
        // The next search comes an hour later.
        kind.shown();
        assert_eq!(kind.lag(), Some(Duration::from_secs(0)));
    }

    #[test]
    fn a_change_that_is_never_shown_gives_way_to_a_younger_one_more_and_more_slowly() {
        let mut kind = Kind::default();
        let age = |minutes| Some(Duration::from_mins(minutes));
        assert!(!kind.missed(age(11)), "no younger one takes its place");
        let record = RecordId::Lead(LeadId::new("lead_1"));
        let lookup = Lookup::Contact { user: None, email: None };
        let change = Change { kind: ChangeKind::Creation, at: Timestamp::UNIX_EPOCH };
        kind.next = Some(Watched { key: Key::Company("acme".into()), lookup, record, change });
        let gives_up = [9, 11, 11, 21, 39, 41].map(|minutes| kind.missed(age(minutes)));
        assert_eq!(gives_up, [false, true, false, true, false, true]);
        kind.shown();
        assert!(kind.missed(age(11)), "from the beginning");
    }
}
