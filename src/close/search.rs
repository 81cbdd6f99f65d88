//! Searching: look-ups that are pending at the same time share one call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tracing::{Instrument, Span};

use crate::close::endpoint::Endpoint;
use crate::close::error::{CloseError, Fault};
use crate::close::records::Lookup;
use crate::close::requests::{Acquired, Requests};
use crate::close::search_batch::{Batcher, Failed, PendingLookup, Rows, SearchResult};
use crate::close::wire::{self, TextMode};
use crate::spans;

/// Rows, oldest first, and whether there are more.
type Page = (Vec<Arc<Value>>, bool);

/// The searches of one organization.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// More messages are waiting than are being processed.
    backlog: AtomicBool,
    leads: Batcher,
    contacts: Batcher,
    /// Close rejected `exact_value`, which is not documented: search by phrase from now on.
    phrase_only: AtomicBool,
}

impl Search {
    pub(crate) fn set_backlog(&self, backlog: bool) {
        self.backlog.store(backlog, Ordering::Relaxed);
    }

    /// Looks records up, in one search with other look-ups that are pending.
    pub(crate) async fn look_up(self: &Arc<Self>, requests: &Requests, lookup: Lookup) -> SearchResult {
        let (answer, received) = oneshot::channel();
        let kind = lookup.clone();
        let pending = PendingLookup { lookup, priority: requests.priority(), span: spans::current(), answer };
        if self.batcher(&kind).add(pending) {
            // In a task of its own: this caller may give up while others wait for the same search.
            let (search, requests) = (self.clone(), requests.clone());
            tokio::spawn(async move { search.run_batches(&requests, &kind).await });
        }
        // The sender is dropped without an answer when the search panics.
        let lost = |_| Failed { error: CloseError::Transient(Fault::ConnectionLost), duplicate: false };
        received.await.map_err(lost)?
    }

    /// The interval between searches of one kind. With two kinds, half the budget is spent.
    fn interval(&self, requests: &Requests) -> Duration {
        let status = requests.limiters()[&Endpoint::Search].status();
        match status.filter(|_| self.backlog.load(Ordering::Relaxed)) {
            Some(status) => Duration::from_secs_f64(4.0 / status.rate.max(0.5)),
            None => Duration::ZERO,
        }
    }

    fn batcher(&self, lookup: &Lookup) -> &Batcher {
        match lookup {
            Lookup::Lead { .. } => &self.leads,
            Lookup::Contact { .. } => &self.contacts,
        }
    }

    /// Runs searches until no look-up of this kind is pending.
    async fn run_batches(&self, requests: &Requests, kind: &Lookup) {
        let runner = self.batcher(kind).runner();
        while let Some(priority) = runner.highest_priority() {
            let requests = requests.with_priority(priority);
            runner.wait(self.interval(&requests)).await;
            // Look-ups that arrive while this waits for the rate limiter join the batch.
            let permit = requests.acquire(Endpoint::Search).await;
            let pending = runner.next();
            let span = shared_span(&pending);
            let (lookups, answers): (Vec<_>, Vec<_>) =
                pending.into_iter().map(|pending| (pending.lookup, pending.answer)).unzip();
            if lookups.is_empty() {
                // All callers gave up in the meantime.
                permit.0.give_back();
            } else {
                let search = async {
                    let page = self.search(&requests, &lookups, Some(permit)).await;
                    self.distribute(&requests, &lookups, page).await
                };
                let results = search.instrument(span).await;
                let calls = requests.calls();
                for (number, (answer, mut result)) in (0..).zip(answers.into_iter().zip(results)) {
                    match &mut result {
                        Ok(rows) => rows.calls = if number == 0 { calls } else { 0 },
                        // As many look-ups report the failure as calls failed.
                        Err(failed) => failed.duplicate = number >= calls,
                    }
                    // A caller that gave up needs no answer.
                    let _ = answer.send(result);
                }
            }
        }
    }

    /// The part of a page for each look-up. If the page was too small, or one look-up may have made the search fail,
    /// each half is searched again, and so on. If both halves fail with a transient error, Close has a problem and the
    /// failure stands for all.
    async fn distribute(
        &self,
        requests: &Requests,
        lookups: &[Lookup],
        page: Result<Page, CloseError>,
    ) -> Vec<SearchResult> {
        let is_transient = |page: &Result<Page, CloseError>| matches!(page, Err(CloseError::Transient(_)));
        let split = match &page {
            Ok((_, more)) => *more,
            Err(error) => matches!(error, CloseError::Rejected(_) | CloseError::Transient(_)),
        };
        if split && lookups.len() > 1 {
            let (one, other) = lookups.split_at(lookups.len() / 2);
            let first = self.search(requests, one, None).await;
            let second = self.search(requests, other, None).await;
            if !(is_transient(&first) && is_transient(&second)) {
                let mut results = Box::pin(self.distribute(requests, one, first)).await;
                results.extend(Box::pin(self.distribute(requests, other, second)).await);
                return results;
            }
        }
        let alone = lookups.len() == 1;
        let part = |lookup: &Lookup| match &page {
            Ok((rows, more)) => {
                let found =
                    rows.iter().filter(|row| alone || wire::may_match(lookup, row)).cloned().collect();
                Ok(Rows { found, more: *more, calls: 0 })
            }
            Err(error) => Err(Failed { error: error.clone(), duplicate: false }),
        };
        lookups.iter().map(part).collect()
    }

    async fn search(
        &self,
        requests: &Requests,
        lookups: &[Lookup],
        mut permit: Option<Acquired>,
    ) -> Result<Page, CloseError> {
        let mut ask = async |mode| {
            let body = wire::search_body(lookups, mode);
            let page: wire::SearchPage =
                requests.request_with(permit.take(), Endpoint::Search, "data/search/", Some(body)).await?;
            Ok((page.data.into_iter().map(Arc::new).collect(), page.more))
        };
        if self.phrase_only.load(Ordering::Relaxed) {
            return ask(TextMode::Phrase).await;
        }
        match ask(TextMode::ExactValue).await {
            Err(CloseError::Rejected(rejection)) if rejection.status == 400 => {
                let rows = ask(TextMode::Phrase).await?;
                self.phrase_only.store(true, Ordering::Relaxed);
                Ok(rows)
            }
            answer => answer,
        }
    }
}

/// The span for the calls of a shared search: that of the first look-up, which the calls are also counted for. The
/// other spans link to it.
fn shared_span(pending: &[PendingLookup]) -> Span {
    let first = pending.first().map_or_else(Span::none, |first| first.span.clone());
    for other in pending.iter().skip(1) {
        other.span.follows_from(&first);
    }
    first
}
