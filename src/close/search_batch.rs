//! Look-ups that share a search: `POST /data/search/` is by far the scarcest call (close-api.md §2).
//!
//! The first look-up goes at once. Those that come while a search waits for budget or is under way gather,
//! and go together in the next one: the busier we are, the more share a call. Nobody waits for company while
//! there is no backlog. While there is one, latency is nobody's concern and calls are: searches of one kind
//! then keep a distance at which at most half the budget is spent, unless as many wait as fit one.
//! Leads and Contacts are searched for separately: that one search can return both is not documented
//! (close-api.md §6).

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::Span;

use crate::close::rate_limit::Priority;
use crate::close::{CloseError, Lookup};

/// Most look-ups that share a search: two conditions each, and some rows each must fit one page.
const MOST: usize = 25;

/// What a look-up gets.
pub(crate) type Answer = Result<Rows, Failed>;

/// A search that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) error: CloseError,
    /// Another look-up that shared the search answers for it.
    pub(crate) duplicate: bool,
}

/// Rows of a search.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// The oldest, at most a page of them.
    pub(crate) found: Vec<Value>,
    /// Whether there are more than fit the page.
    pub(crate) more: bool,
    /// Calls made: the first of those who share them pays.
    pub(crate) calls: u32,
}

/// A look-up that waits for its search.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) lookup: Lookup,
    pub(crate) priority: Priority,
    /// In which it is looked up.
    pub(crate) span: Span,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// Look-ups of one kind that wait.
#[derive(Debug, Default)]
pub(crate) struct Batcher {
    pending: Mutex<Pending>,
    /// As many wait as fit one search.
    full: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    waiting: Vec<Waiting>,
    searching: bool,
    last: Option<Instant>,
}

/// The duty to search until nobody waits. It is done when [`BatchRunner::urgency`] says so; a panic lays it down,
/// and who still waits is told by the loss of the other end.
#[derive(Debug)]
pub(crate) struct BatchRunner<'a>(&'a Batcher);

impl Batcher {
    /// Adds a look-up. True when nobody is searching: then the caller has to see that someone does.
    pub(crate) fn add(&self, waiting: Waiting) -> bool {
        self.with(|pending| {
            pending.waiting.push(waiting);
            if pending.waiting.len() >= MOST {
                self.full.notify_one();
            }
            !std::mem::replace(&mut pending.searching, true)
        })
    }

    /// Takes up the duty that [`Batcher::add`] spoke of.
    pub(crate) fn duty(&self) -> BatchRunner<'_> {
        BatchRunner(self)
    }

    fn with<T>(&self, with: impl FnOnce(&mut Pending) -> T) -> T {
        with(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BatchRunner<'_> {
    /// How urgent the most urgent look-up is. `None` when nobody waits any more: the duty is done.
    pub(crate) fn urgency(&self) -> Option<Priority> {
        self.0.with(|pending| {
            pending.waiting.retain(|waiting| !waiting.answer.is_closed());
            let urgency = pending.waiting.iter().map(|waiting| waiting.priority).min();
            // In one breath with the look, or a look-up could be added in between and wait for nobody.
            pending.searching = urgency.is_some();
            urgency
        })
    }

    /// Waits until the last search is `distance` ago, or as many wait as fit one.
    pub(crate) async fn gather(&self, distance: Duration) {
        let is_full = || self.0.with(|pending| pending.waiting.len() >= MOST);
        let Some(last) = self.0.with(|pending| pending.last) else { return };
        let fill = async {
            // It may have been filled, and emptied, long ago.
            while !is_full() {
                self.0.full.notified().await;
            }
        };
        let _ = tokio::time::timeout_at(last + distance, fill).await;
    }

    /// Those who share the next search, the most urgent first.
    pub(crate) fn next(&self) -> Vec<Waiting> {
        self.0.with(|pending| {
            pending.last = Some(Instant::now());
            pending.waiting.retain(|waiting| !waiting.answer.is_closed());
            pending.waiting.sort_by_key(|waiting| waiting.priority);
            let number = pending.waiting.len().min(MOST);
            pending.waiting.drain(..number).collect()
        })
    }
}

impl Drop for BatchRunner<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.with(|pending| *pending = Pending::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::FieldId;

    fn waiting(id: &str, priority: Priority) -> (Waiting, oneshot::Receiver<Answer>) {
        let (answer, receiver) = oneshot::channel();
        let lookup = Lookup::Lead { field: FieldId::new("cf_c"), company_id: id.into() };
        (Waiting { lookup, priority, span: Span::none(), answer }, receiver)
    }

    #[test]
    fn one_searches_and_the_others_join() {
        let joint = Batcher::default();
        let mut receivers = Vec::new();
        let mut add = |id: &str, priority| {
            let (waiting, receiver) = waiting(id, priority);
            receivers.push(receiver);
            joint.add(waiting)
        };
        assert!(add("first", Priority::Live), "the first has to search");
        let duty = joint.duty();
        assert_eq!(duty.urgency(), Some(Priority::Live));
        assert_eq!(duty.next().len(), 1);
        for n in 0..30 {
            assert!(!add(&n.to_string(), Priority::Replay), "others join");
        }
        assert!(!add("live", Priority::Live));
        drop(receivers.remove(1));
        let next = duty.next();
        assert_eq!(next.len(), MOST);
        assert_eq!(next[0].lookup, Lookup::Lead { field: FieldId::new("cf_c"), company_id: "live".into() });
        assert_eq!(duty.next().len(), 5, "one of 31 has given up");
        assert_eq!(duty.urgency(), None);
        let (again, _receiver) = waiting("later", Priority::Live);
        assert!(joint.add(again), "nobody searches any more");
    }
}
