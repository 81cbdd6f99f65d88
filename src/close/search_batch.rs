//! Batching of look-ups: `POST /data/search/` is by far the scarcest call (close-api.md §2).
//!
//! The first look-up is sent at once. Look-ups that arrive while a search waits for budget or is under way are collected
//! and share the next search, so the load decides how many share a call. Without a backlog no look-up waits for others.
//! With a backlog, saving calls matters more than latency: searches of one kind then keep an interval at which at most
//! half the budget is spent, unless a batch is full. Leads and Contacts are searched for separately, because it is not
//! documented that one search can return both (close-api.md §6).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::Span;

use crate::close::error::CloseError;
use crate::close::rate_limit::Priority;
use crate::close::records::Lookup;
use crate::waits::{WaitCause, Waits};

/// The most look-ups in one search: each has two conditions, and the rows of all must fit one page.
const MAX_BATCH: usize = 25;

pub(crate) type SearchResult = Result<Rows, Failed>;

/// A search that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) error: CloseError,
    /// Another look-up of the same search reports the failure.
    pub(crate) duplicate: bool,
    /// As in [`Rows`].
    pub(crate) calls: u32,
}

/// Rows of a search.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// At most one page, oldest first. Several look-ups may share a row.
    pub(crate) found: Vec<Arc<Value>>,
    /// Whether Close has more than one page.
    pub(crate) more: bool,
    /// Those that have a user id and an email that the search was for.
    pub(crate) by_both: Vec<String>,
    /// The search was for this look-up alone, in a mode that finds only exact matches.
    pub(crate) exact: bool,
    /// Calls made. They are counted for the first look-up of the batch.
    pub(crate) calls: u32,
}

/// A look-up that waits for its search.
#[derive(Debug)]
pub(crate) struct PendingLookup {
    pub(crate) lookup: Lookup,
    pub(crate) priority: Priority,
    /// The span of the caller.
    pub(crate) span: Span,
    pub(crate) answer: oneshot::Sender<SearchResult>,
}

/// Collects look-ups of one kind.
#[derive(Debug, Default)]
pub(crate) struct Batcher {
    state: Mutex<State>,
    /// Notified when a batch is full.
    full: Notify,
    /// What the searches wait for.
    waits: Waits,
}

#[derive(Debug, Default)]
struct State {
    pending: Vec<PendingLookup>,
    /// They join the next search, and start none.
    riders: Vec<PendingLookup>,
    is_running: bool,
    last_search: Option<Instant>,
}

/// Runs searches until no look-up is pending, that is until [`BatchRunner::highest_priority`] returns `None`. A panic
/// drops the pending look-ups, and their callers notice that the sender is gone.
#[derive(Debug)]
pub(crate) struct BatchRunner<'a>(&'a Batcher);

impl Batcher {
    /// Adds a look-up. Returns true if no runner is active: the caller must then start one.
    pub(crate) fn add(&self, lookup: PendingLookup) -> bool {
        self.with(|state| {
            state.pending.push(lookup);
            if state.pending.len() >= MAX_BATCH {
                self.full.notify_one();
            }
            !std::mem::replace(&mut state.is_running, true)
        })
    }

    /// Adds a look-up that joins the next search. It starts none.
    pub(crate) fn ride_along(&self, lookup: PendingLookup) {
        self.with(|state| state.riders.push(lookup));
    }

    pub(crate) fn waits(&self) -> &Waits {
        &self.waits
    }

    /// The runner to start when [`Batcher::add`] returned true.
    pub(crate) fn runner(&self) -> BatchRunner<'_> {
        BatchRunner(self)
    }

    fn with<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BatchRunner<'_> {
    /// The highest priority of the pending look-ups. `None` when none is pending: the runner is then done.
    pub(crate) fn highest_priority(&self) -> Option<Priority> {
        self.0.with(|state| {
            state.pending.retain(|pending| !pending.answer.is_closed());
            let priority = state.pending.iter().map(|pending| pending.priority).min();
            // Under the same lock, or a look-up added in between would wait forever.
            state.is_running = priority.is_some();
            priority
        })
    }

    /// Waits until `interval` has passed since the last search, or a batch is full.
    pub(crate) async fn wait(&self, interval: Duration) {
        let is_full = || self.0.with(|state| state.pending.len() >= MAX_BATCH);
        let Some(last) = self.0.with(|state| state.last_search) else { return };
        let full = async {
            // The notification may be an old one.
            while !is_full() {
                self.0.full.notified().await;
            }
        };
        let next = tokio::time::timeout_at(last + interval, full);
        let _ = self.0.waits.during(WaitCause::Search, next).await;
    }

    /// Takes the look-ups for the next search, highest priority first.
    pub(crate) fn next(&self) -> Vec<PendingLookup> {
        self.0.with(|state| {
            state.last_search = Some(Instant::now());
            state.pending.retain(|pending| !pending.answer.is_closed());
            state.pending.sort_by_key(|pending| pending.priority);
            state.riders.retain(|rider| !rider.answer.is_closed());
            // Others may wait for what a rider shows.
            let seats = usize::from(!state.riders.is_empty());
            let number = state.pending.len().min(MAX_BATCH - seats);
            let mut next: Vec<PendingLookup> = state.pending.drain(..number).collect();
            if number > 0 {
                let riders = state.riders.len().min(MAX_BATCH - number);
                next.extend(state.riders.drain(..riders));
            }
            next
        })
    }
}

impl Drop for BatchRunner<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.with(|state| *state = State::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::FieldId;

    fn lookup(id: &str, priority: Priority) -> (PendingLookup, oneshot::Receiver<SearchResult>) {
        let (answer, receiver) = oneshot::channel();
        let lookup = Lookup::Lead { field: FieldId::new("cf_c"), company_id: id.into() };
        (PendingLookup { lookup, priority, span: Span::none(), answer }, receiver)
    }

    #[tokio::test(start_paused = true)]
    async fn the_interval_between_searches_is_a_wait_for_search() {
        let batcher = Batcher::default();
        let runner = batcher.runner();
        runner.next();
        runner.wait(Duration::from_secs(2)).await;
        assert_eq!(batcher.waits().longest(), (WaitCause::Search, Duration::from_secs(2)));
    }

    #[test]
    fn look_ups_added_during_a_search_share_the_next_one() {
        let batcher = Batcher::default();
        let mut receivers = Vec::new();
        let mut add = |id: &str, priority| {
            let (pending, receiver) = lookup(id, priority);
            receivers.push(receiver);
            batcher.add(pending)
        };
        assert!(add("first", Priority::Live), "the first starts a runner");
        let runner = batcher.runner();
        assert_eq!(runner.highest_priority(), Some(Priority::Live));
        assert_eq!(runner.next().len(), 1);
        for n in 0..30 {
            assert!(!add(&n.to_string(), Priority::Replay), "a runner is active");
        }
        assert!(!add("live", Priority::Live));
        drop(receivers.remove(1));
        let next = runner.next();
        assert_eq!(next.len(), MAX_BATCH);
        assert_eq!(next[0].lookup, Lookup::Lead { field: FieldId::new("cf_c"), company_id: "live".into() });
        assert_eq!(runner.next().len(), 5, "one of 31 gave up");
        assert_eq!(runner.highest_priority(), None);
        let (again, _receiver) = lookup("later", Priority::Live);
        assert!(batcher.add(again), "the runner is done");
    }

    #[test]
    fn a_full_batch_leaves_a_seat_for_a_rider_that_waits() {
        let (batcher, mut receivers) = (Batcher::default(), Vec::new());
        let mut look_up = |id: String| {
            let (pending, receiver) = lookup(&id, Priority::Live);
            receivers.push(receiver);
            pending
        };
        for n in 0..2 * MAX_BATCH {
            batcher.add(look_up(n.to_string()));
        }
        batcher.ride_along(look_up("rider".into()));
        let (gone, receiver) = lookup("gone", Priority::Live);
        batcher.ride_along(gone);
        drop(receiver);
        let runner = batcher.runner();
        let next = runner.next();
        let rider = Lookup::Lead { field: FieldId::new("cf_c"), company_id: "rider".into() };
        assert_eq!((next.len(), &next[MAX_BATCH - 1].lookup), (MAX_BATCH, &rider));
        assert_eq!(runner.next().len(), MAX_BATCH, "no other one rides along");
    }
}
