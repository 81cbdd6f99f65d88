//! Measures how far search lags behind, without calls of its own: the condition for one change of ours rides along in the
//! searches for other messages, until a search shows the change. Then the youngest change since rides along.
//!
//! What is shown proves to [`LagGuard`] that search shows older changes too.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use strum::VariantArray;
use tokio::time::Instant;

use crate::close::{Client, Lookup};
use crate::domain::journal::{ChangeKind, RecordId};
use crate::domain::mapping::{Key, KeyFields};
use crate::sync::clock::Clock;
use crate::sync::id_cache::{Change, IdCache};
use crate::sync::lag_guard::LagGuard;

const KINDS: usize = ChangeKind::VARIANTS.len();

/// Clones share the state.
#[derive(Clone)]
pub struct SearchLag {
    state: Arc<Mutex<[Kind; KINDS]>>,
    guard: Arc<LagGuard>,
    id_cache: IdCache,
    clock: Clock,
}

/// The changes of one kind.
#[derive(Debug, Default)]
struct Kind {
    /// The change that rides along.
    watched: Option<Change>,
    /// The youngest change since.
    next: Option<Watched>,
    /// The lag of the last change that search has shown.
    measured: Option<Duration>,
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
        Self { state: Arc::default(), guard, id_cache, clock }
    }

    fn with<T>(&self, kind: ChangeKind, with: impl FnOnce(&mut Kind) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize])
    }

    /// The lag of search for changes of this kind: as last measured, or longer if a change has not been shown for longer.
    /// `None` before the first measurement.
    pub fn current(&self, kind: ChangeKind) -> Option<Duration> {
        let now = (self.clock)();
        self.with(kind, |kind| {
            let waiting = kind
                .watched
                .map(|change| Duration::try_from(now.duration_since(change.at)).unwrap_or_default());
            kind.measured.map(|measured| waiting.map_or(measured, |waiting| waiting.max(measured)))
        })
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
        let Some(lookup) = lookup(&key, keys) else { return };
        let watched = Watched { key, lookup, record, change };
        let is_idle = self.with(change.kind, |kind| {
            kind.next = Some(watched);
            kind.watched.is_none()
        });
        if is_idle {
            let (lag, client) = (self.clone(), client.clone());
            tokio::spawn(async move { while lag.watch_next(&client, change.kind).await {} });
        }
    }

    /// Watches the youngest change until search shows it. False if there is none.
    async fn watch_next(&self, client: &Client, kind: ChangeKind) -> bool {
        let next = self.with(kind, |kind| {
            let next = kind.next.take();
            kind.watched = next.as_ref().map(|next| next.change);
            next
        });
        let Some(Watched { key, lookup, record, change }) = next else { return false };
        loop {
            let Some((searched, ids)) = client.ride_along(lookup.clone()).await else { continue };
            if ids.iter().any(|id| id == record.as_str()) {
                self.id_cache.seen(&key, &record);
                self.shown(change, searched);
                return true;
            }
        }
    }

    /// Search has shown a change for the first time.
    pub(crate) fn shown(&self, change: Change, searched: Instant) {
        let lag = (self.clock)().duration_since(change.at);
        self.with(change.kind, |kind| kind.measured = Duration::try_from(lag).ok());
        self.guard.shown(change.kind, change.at, searched);
    }
}

fn lookup(key: &Key, keys: &KeyFields) -> Option<Lookup> {
    Some(match key {
        Key::Company(id) => Lookup::Lead { field: keys.company.clone()?, company_id: id.clone() },
        Key::User(id) => Lookup::Contact { user: Some((keys.user.clone()?, id.clone())), email: None },
        Key::Email(email) => Lookup::Contact { user: None, email: Some(email.clone()) },
    })
}
