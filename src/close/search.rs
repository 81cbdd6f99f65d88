//! Searching: look-ups that are pending at the same time share one call.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{Instrument, Span};

use crate::close::deletion;
use crate::close::endpoint::Endpoint;
use crate::close::error::{CloseError, Fault};
use crate::close::rate_limit::Priority;
use crate::close::records::Lookup;
use crate::close::requests::{Acquired, Requests};
use crate::close::search_batch::{Batcher, Failed, PendingLookup, Rows, SearchResult};
use crate::close::wire::{self, TextMode};
use crate::spans;

/// Rows, oldest first.
struct Page {
    rows: Vec<Arc<Value>>,
    more: bool,
    mode: TextMode,
}

/// `exact_value` is tried again after this time: the rejection may have been about something else.
const PHRASE_FOR: Duration = Duration::from_mins(10);

/// The searches of one organization.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// More messages are waiting than are being processed.
    backlog: AtomicBool,
    leads: Batcher,
    contacts: Batcher,
    /// Close rejected `exact_value`, which is not documented: search by phrase until then.
    phrase_until: Mutex<Option<Instant>>,
}

impl Search {
    /// Searches that no look-up of these shares.
    pub(crate) fn apart(&self) -> Self {
        let phrase_until = *self.phrase_until.lock().unwrap_or_else(PoisonError::into_inner);
        Self { phrase_until: Mutex::new(phrase_until), ..Self::default() }
    }

    pub(crate) fn set_backlog(&self, backlog: bool) {
        self.backlog.store(backlog, Ordering::Relaxed);
    }

    /// Looks records up, in one search with other look-ups that are pending.
    pub(crate) async fn look_up(self: &Arc<Self>, requests: &Requests, lookup: Lookup) -> SearchResult {
        let (answer, received) = oneshot::channel();
        let kind = lookup.clone();
        let pending = PendingLookup { lookup, priority: requests.priority(), span: spans::current(), answer };
        let batcher = self.batcher(&kind);
        let _waiting = requests.waits().share(batcher.waits());
        if batcher.add(pending) {
            // In a task of its own: this caller may give up while others wait for the same search.
            let (search, requests, kind) = (self.clone(), requests.clone(), kind.clone());
            tokio::spawn(async move { search.run_batches(&requests, &kind).await });
        }
        // The sender is dropped without an answer when the search panics.
        let lost =
            |_| Failed { error: CloseError::Transient(Fault::ConnectionLost), duplicate: false, calls: 0 };
        received.await.map_err(lost)?
    }

    /// Adds a look-up to the next search, and starts none. `None` when that search panicked.
    pub(crate) async fn ride_along(&self, lookup: Lookup) -> Option<SearchResult> {
        let (answer, received) = oneshot::channel();
        let batcher = self.batcher(&lookup);
        batcher.ride_along(PendingLookup { lookup, priority: Priority::Replay, span: Span::none(), answer });
        received.await.ok()
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
        let batcher = self.batcher(kind);
        let runner = batcher.runner();
        while let Some(priority) = runner.highest_priority() {
            let requests = requests.for_work(priority, batcher.waits().clone());
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
                    let counted = if number == 0 { calls } else { 0 };
                    match &mut result {
                        Ok(rows) => rows.calls = counted,
                        Err(failed) => {
                            failed.calls = counted;
                            // As many look-ups report the failure as calls failed.
                            failed.duplicate = number >= calls;
                        }
                    }
                    // A caller that gave up needs no answer.
                    let _ = answer.send(result);
                }
            }
        }
    }

    /// The part of a page for each look-up. If the page was too small, or does not show which look-up a row belongs to, or
    /// one look-up may have made the search fail, each half is searched again, and so on. If both halves fail with a transient error, Close has a problem and the
    /// failure stands for all.
    async fn distribute(
        &self,
        requests: &Requests,
        lookups: &[Lookup],
        page: Result<Page, CloseError>,
    ) -> Vec<SearchResult> {
        let is_transient = |page: &Result<Page, CloseError>| matches!(page, Err(CloseError::Transient(_)));
        let split = match &page {
            Ok(Page { rows, more, .. }) => {
                let is_unclear =
                    |row: &Arc<Value>| lookups.iter().any(|lookup| wire::is_unclear(lookup, row));
                *more || rows.iter().any(is_unclear)
            }
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
            Ok(Page { rows, more, mode }) => {
                let found = rows.iter().filter(|row| alone || wire::may_match(lookup, row));
                let found: Vec<Arc<Value>> = found.cloned().collect();
                let by_both = found.iter().filter(|row| wire::has_both(lookups, row));
                let by_both = by_both.filter_map(|row| row["id"].as_str().map(str::to_owned)).collect();
                let exact = alone && matches!(mode, TextMode::ExactValue);
                Ok(Rows { found, more: *more, by_both, exact, calls: 0 })
            }
            Err(error) => Err(Failed { error: error.clone(), duplicate: false, calls: 0 }),
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
            requests.request_with(permit.take(), Endpoint::Search, "data/search/", Some(body)).await
        };
        let phrase_until = || self.phrase_until.lock().unwrap_or_else(PoisonError::into_inner);
        let is_phrase_only = phrase_until().is_some_and(|until| Instant::now() < until);
        let (page, mode): (wire::SearchPage, _) = if is_phrase_only {
            (ask(TextMode::Phrase).await?, TextMode::Phrase)
        } else {
            match ask(TextMode::ExactValue).await {
                Err(CloseError::Rejected(rejection)) if rejection.may_be_about_the_query() => {
                    let page = ask(TextMode::Phrase).await?;
                    *phrase_until() = Some(Instant::now() + PHRASE_FOR);
                    (page, TextMode::Phrase)
                }
                answer => (answer?, TextMode::ExactValue),
            }
        };
        let mut rows = Vec::with_capacity(page.data.len());
        for row in page.data {
            let Some((endpoint, id)) = wire::incomplete(lookups, &row) else {
                rows.push(Arc::new(row));
                continue;
            };
            let fields = wire::row_fields(lookups, endpoint);
            let read = |record: &Value| Ok(wire::row_of(record));
            match deletion::read_record(requests, endpoint, id, fields.as_deref(), read).await {
                Ok(row) => rows.push(Arc::new(row)),
                // Search still lists a deleted record.
                Err(CloseError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Page { rows, more: page.more, mode })
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::Method;
    use serde_json::json;

    use super::*;
    use crate::close::transport::{Response, Transport};
    use crate::close::{Api, Client, Records};
    use crate::domain::record::FieldId;
    use crate::waits::WaitCause;

    type Answer = fn(path: &str, mode: &str) -> (u16, Value);

    /// Answers calls, and notes their paths, for a search with its mode.
    #[derive(Clone)]
    struct Script(Answer, Arc<Mutex<Vec<String>>>);

    impl Transport for Script {
        fn send<'a>(
            &'a self,
            _: Method,
            path: &'a str,
            body: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let text = body.map(Value::to_string).unwrap_or_default();
            let modes = ["exact_value", "phrase"].into_iter();
            let mode = modes.filter(|mode| text.contains(mode)).collect::<String>();
            self.1.lock().unwrap().push(format!("{path} {mode}").trim().to_owned());
            let (status, body) = (self.0)(path, &mode);
            async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(Response::with_status(status, body))
            }
            .boxed()
        }
    }

    fn client(answer: Answer) -> (Client, impl Fn() -> Vec<String>) {
        let calls = Arc::<Mutex<Vec<String>>>::default();
        let script = Script(answer, Arc::clone(&calls));
        let client = Client::with_transport(script, Duration::from_secs(30), 1.0, |_| {});
        (client, move || std::mem::take(&mut *calls.lock().unwrap()))
    }

    fn field() -> FieldId {
        FieldId::new("cf_c")
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_exact_value_is_tried_again_after_a_while() {
        let (client, calls) = client(|_, mode| match mode {
            "exact_value" => (400, json!({"error": "Unknown text mode 'exact_value'."})),
            _ => (200, json!({"data": []})),
        });
        let field = field();
        for _ in 0..2 {
            client.find_leads(&field, "acme").await.unwrap();
        }
        let search = "data/search/";
        assert_eq!(
            calls(),
            [format!("{search} exact_value"), format!("{search} phrase"), format!("{search} phrase")]
        );
        tokio::time::sleep(PHRASE_FOR).await;
        client.find_leads(&field, "acme").await.unwrap();
        assert_eq!(calls(), [format!("{search} exact_value"), format!("{search} phrase")]);
    }

    #[tokio::test(start_paused = true)]
    async fn own_searches_are_not_shared() {
        let (client, _) = client(|_, _| (200, json!({"data": []})));
        let field = field();
        let lookup = Lookup::Lead { field: field.clone(), company_id: "rider".into() };
        let mut rider = Box::pin(client.ride_along(lookup, true));
        assert!((&mut rider).now_or_never().is_none(), "it starts no search");
        client.with_own_searches().find_leads(&field, "acme").await.unwrap();
        assert!((&mut rider).now_or_never().is_none(), "it rode along");
        client.find_leads(&field, "acme").await.unwrap();
        assert_eq!(rider.await, Some(Vec::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_search_for_a_field_that_is_gone_is_not_repeated_in_other_words() {
        let (client, calls) = client(|_, _| (400, json!({"error": "Unknown custom field 'cf_c'."})));
        let error = client.find_leads(&field(), "acme").await.unwrap_err();
        assert!(matches!(error, CloseError::Rejected(rejection) if rejection.field_is_missing()));
        assert_eq!((calls().len(), client.calls()), (1, 1), "a failed search counts");
    }

    #[tokio::test(start_paused = true)]
    async fn a_row_that_never_shows_its_emails_belongs_to_the_look_up_that_finds_it_alone() {
        let (client, calls) = client(|path, _| {
            let row = json!({"id": "cont_1", "lead_id": "lead_1", "emails": null});
            (200, if path == "data/search/" { json!({"data": [row]}) } else { row })
        });
        let find = async |email: &str| {
            let hits = client.find_contacts(None, Some(email)).await.unwrap();
            (hits.contacts.len(), hits.exact)
        };
        assert_eq!(tokio::join!(find("a@x.test"), find("b@x.test")), ((1, true), (1, true)));
        let searches = calls().iter().filter(|call| call.starts_with("data/search/")).count();
        assert_eq!(searches, 3, "both, and then each alone");
    }

    /// The index may lag for one of the keys, and the row shows both.
    #[tokio::test(start_paused = true)]
    async fn a_row_that_two_kinds_of_keys_find_is_not_certainly_found_by_one() {
        let (client, _) = client(|_, _| {
            let emails = json!([{"email": "a@x.test", "type": "office"}]);
            let row = json!({"id": "cont_1", "lead_id": "lead_1", "emails": emails, "custom.cf_c": "u1"});
            (200, json!({"data": [row]}))
        });
        let field = field();
        let find = async |user: Option<&str>, email: Option<&str>| {
            let hits = client.find_contacts(user.map(|user| (&field, user)), email).await.unwrap();
            (hits.contacts.len(), hits.by_both.len())
        };
        assert_eq!(find(Some("u1"), None).await, (1, 0));
        assert_eq!(find(None, Some("a@x.test")).await, (1, 0));
        assert_eq!(find(Some("u1"), Some("a@x.test")).await, (1, 1));
        assert_eq!(tokio::join!(find(Some("u1"), None), find(None, Some("a@x.test"))), ((1, 1), (1, 1)));
        assert_eq!(tokio::join!(find(Some("u1"), None), find(Some("u2"), None)), ((1, 0), (0, 0)));
    }

    /// A row that cannot be read is not left out: the person would be created again.
    #[tokio::test(start_paused = true)]
    async fn a_search_fails_when_a_row_with_only_an_id_vanishes_without_a_deletion() {
        let (client, _) = client(|path, _| match path {
            "data/search/" => (200, json!({"data": [{"id": "lead_a"}]})),
            path if path.starts_with("event/") => (200, json!({"data": []})),
            _ => (404, json!({"error": "Empty query: Lead matching query does not exist."})),
        });
        let error = client.find_leads(&field(), "acme").await.unwrap_err();
        assert_eq!(error, CloseError::Transient(Fault::Vanished));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_up_that_gives_up_has_noted_what_its_shared_search_waited_for() {
        let (limited, _) = client(|_, _| (429, json!({})));
        let limited = limited.for_message(Priority::Live);
        let field = field();
        let find = limited.find_leads(&field, "acme");
        assert!(tokio::time::timeout(Duration::from_mins(1), find).await.is_err());
        let (cause, waited) = limited.waits().longest();
        assert_eq!(cause, WaitCause::RateLimited);
        assert!(waited > Duration::from_secs(50) && waited < Duration::from_mins(1), "{waited:?}");

        // The second look-up waits for the search of the first.
        let (client, _) = client(|_, _| (200, json!({"data": []})));
        let (first, second) = (client.for_message(Priority::Live), client.for_message(Priority::Live));
        let (one, two) = tokio::join!(first.find_leads(&field, "acme"), second.find_leads(&field, "globex"));
        assert!(one.is_ok() && two.is_ok());
        let answer = Duration::from_millis(10);
        assert_eq!(first.waits().longest(), (WaitCause::SlowClose, answer));
        let (cause, waited) = second.waits().longest();
        assert!(cause == WaitCause::SlowClose && waited >= answer, "{cause:?} {waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn rows_with_only_an_id_are_read() {
        let (client, calls) = client(|path, _| match path {
            "data/search/" => (
                200,
                json!({"data": [{"id": "lead_a"}, {"id": "lead_b"}, {"id": "lead_gone"}], "cursor": ""}),
            ),
            "lead/lead_a/?_fields=id,date_created,custom.cf_c" => {
                (200, json!({"id": "lead_a", "custom.cf_c": "acme"}))
            }
            "lead/lead_b/?_fields=id,date_created,custom.cf_c" => {
                (200, json!({"id": "lead_b", "custom.cf_c": "globex"}))
            }
            path if path.starts_with("event/") => {
                (200, json!({"data": [{"object_id": "lead_gone", "action": "deleted"}]}))
            }
            _ => (404, json!({"error": "Empty query: Lead matching query does not exist."})),
        });
        // Both look-ups share one search.
        let field = field();
        let find = async |company: &str| -> Vec<String> {
            let leads = client.find_leads(&field, company).await.unwrap();
            leads.into_iter().map(|lead| lead.id.to_string()).collect()
        };
        let (acme, globex) = tokio::join!(find("acme"), find("globex"));
        assert_eq!((acme, globex), (vec!["lead_a".to_owned()], vec!["lead_b".to_owned()]));
        assert_eq!(
            calls(),
            [
                "data/search/ exact_value",
                "lead/lead_a/?_fields=id,date_created,custom.cf_c",
                "lead/lead_b/?_fields=id,date_created,custom.cf_c",
                "lead/lead_gone/?_fields=id,date_created,custom.cf_c",
                "event/?object_id=lead_gone&action=deleted&_limit=1"
            ]
        );
    }
}
