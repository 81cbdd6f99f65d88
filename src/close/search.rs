//! Searching: one call for all look-ups that wait at the same time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tracing::{Instrument, Span};

use crate::close::Lookup;
use crate::close::client::{Client, Entered};
use crate::close::endpoint::Endpoint;
use crate::close::error::{CloseError, Fault};
use crate::close::search_batch::{Answer, Batcher, Failed, Rows, Waiting};
use crate::close::wire::{self, TextMode};
use crate::telemetry::otel;

/// Rows, oldest first, and whether there are more.
type Page = (Vec<Value>, bool);

impl Client {
    /// Looks records up, together with whoever does so at the same time.
    pub(crate) async fn look_up(&self, lookup: Lookup) -> Result<Page, CloseError> {
        let (answer, received) = oneshot::channel();
        let joint = self.joint(&lookup);
        let kind = lookup.clone();
        if joint.add(Waiting { lookup, priority: self.priority, span: otel::current(), answer }) {
            // Of its own: whoever began the search may give up, and others have joined it.
            let client = self.clone();
            tokio::spawn(async move { client.search_for_all(&kind).await });
        }
        // Nobody answers when the search panicked.
        let answer = received.await.map_err(|_| CloseError::Transient(Fault::ConnectionLost))?;
        let rows = answer.map_err(|failed| {
            self.duplicate_failure.store(failed.duplicate, Ordering::Relaxed);
            failed.error
        })?;
        self.calls.fetch_add(rows.calls, Ordering::Relaxed);
        Ok((rows.found, rows.more))
    }

    /// How far apart searches of one kind are: of two kinds that each keep it, half the budget is spent.
    fn distance(&self) -> Duration {
        let standing = self.inner.gates[&Endpoint::Search].standing();
        match standing.filter(|_| self.inner.backlog.load(Ordering::Relaxed)) {
            Some(standing) => Duration::from_secs_f64(4.0 / standing.rate.max(0.5)),
            None => Duration::ZERO,
        }
    }

    fn joint(&self, lookup: &Lookup) -> &Batcher {
        match lookup {
            Lookup::Lead { .. } => &self.inner.leads,
            Lookup::Contact { .. } => &self.inner.contacts,
        }
    }

    /// Searches until nobody waits for this kind of look-up.
    async fn search_for_all(&self, kind: &Lookup) {
        let duty = self.joint(kind).duty();
        while let Some(priority) = duty.urgency() {
            let client = self.for_message(priority);
            duty.gather(self.distance()).await;
            // Who comes while we wait for budget joins.
            let permit = client.enter(Endpoint::Search).await;
            let waiting = duty.next();
            let span = share_span(&waiting);
            let (lookups, answers): (Vec<_>, Vec<_>) =
                waiting.into_iter().map(|waiting| (waiting.lookup, waiting.answer)).unzip();
            if lookups.is_empty() {
                // All have given up while we waited.
                permit.0.give_back();
            } else {
                let search = async {
                    let page = client.search(&lookups, Some(permit)).await;
                    client.share(&lookups, page).await
                };
                let found = search.instrument(span).await;
                let calls = client.calls();
                for (number, (answer, mut found)) in (0..).zip(answers.into_iter().zip(found)) {
                    match &mut found {
                        Ok(rows) => rows.calls = if number == 0 { calls } else { 0 },
                        // As many answer for a failure as there were calls that failed.
                        Err(failed) => failed.duplicate = number >= calls,
                    }
                    // Who has given up meanwhile needs none.
                    let _ = answer.send(found);
                }
            }
        }
    }

    /// Gives each look-up its part of an answer. When together they found more than a page, or something about
    /// one of them made the search fail, each half searches again, and so on; unless both halves fail for what
    /// looks like a fault of Close.
    async fn share(&self, lookups: &[Lookup], answer: Result<Page, CloseError>) -> Vec<Answer> {
        let is_fault = |answer: &Result<Page, CloseError>| matches!(answer, Err(CloseError::Transient(_)));
        let apart = match &answer {
            Ok((_, more)) => *more,
            Err(error) => matches!(error, CloseError::Rejected(_) | CloseError::Transient(_)),
        };
        if apart && lookups.len() > 1 {
            let (one, other) = lookups.split_at(lookups.len() / 2);
            let (of_one, of_other) = (self.search(one, None).await, self.search(other, None).await);
            if !(is_fault(&of_one) && is_fault(&of_other)) {
                let mut answers = Box::pin(self.share(one, of_one)).await;
                answers.extend(Box::pin(self.share(other, of_other)).await);
                return answers;
            }
        }
        let alone = lookups.len() == 1;
        let mine = |lookup: &Lookup| {
            let (rows, more) = answer.clone().map_err(|error| Failed { error, duplicate: false })?;
            let found = rows.into_iter().filter(|row| alone || wire::may_mean(lookup, row)).collect();
            Ok(Rows { found, more, calls: 0 })
        };
        lookups.iter().map(mine).collect()
    }

    /// One page, oldest first, and whether there are more.
    async fn search(&self, lookups: &[Lookup], mut permit: Option<Entered>) -> Result<Page, CloseError> {
        let mut ask = async |mode| {
            let body = wire::search_body(lookups, mode);
            let page: wire::SearchPage =
                self.request_with(permit.take(), Endpoint::Search, "data/search/", Some(body)).await?;
            Ok((page.data, page.cursor.is_some()))
        };
        if self.inner.phrase_only.load(Ordering::Relaxed) {
            return ask(TextMode::Phrase).await;
        }
        match ask(TextMode::ExactValue).await {
            Err(CloseError::Rejected(rejection)) if rejection.status == 400 => {
                let rows = ask(TextMode::Phrase).await?;
                self.inner.phrase_only.store(true, Ordering::Relaxed);
                Ok(rows)
            }
            answer => answer,
        }
    }
}

/// The span that calls for several are told of in: that of the first, who also pays for them. The others link to it.
fn share_span(waiting: &[Waiting]) -> Span {
    let first = waiting.first().map_or_else(Span::none, |first| first.span.clone());
    for other in waiting.iter().skip(1) {
        other.span.follows_from(&first);
    }
    first
}
