//! Close's event log: which records were created in a span of time (close-api.md §11, §15).

use std::time::Duration;

use jiff::Timestamp;
use moka::sync::Cache;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::time::Instant;

use crate::close::deletion;
use crate::close::endpoint::Endpoint;
use crate::close::error::CloseError;
use crate::close::requests::Requests;
use crate::close::wire::{Event, Events};

/// The most pages to read for one question: as many creations as a fast minute has.
const MAX_PAGES: usize = 10;
/// The most records to read by id for one question.
const MAX_READS: usize = 50;
/// Close may add what happens to a record soon after an event to this event, which gets a later `date_updated`.
const MERGED_FOR: Duration = Duration::from_mins(15);

/// How long a record that its event hides is not read again. A question is repeated until it has been answered whole, and
/// others ask about the same time.
const REMEMBERED: Duration = Duration::from_mins(10);
/// How many of them are remembered.
const MAX_REMEMBERED: u64 = 500;

/// Records that their events hide, by id, as they were when they were read.
#[derive(Debug)]
pub(crate) struct Hidden<T: Clone + Send + Sync + 'static>(Cache<String, (Instant, T)>);

impl<T: Clone + Send + Sync + 'static> Default for Hidden<T> {
    fn default() -> Self {
        // Real time only frees memory.
        Self(Cache::builder().max_capacity(MAX_REMEMBERED).time_to_live(REMEMBERED).build())
    }
}

impl<T: Clone + Send + Sync + 'static> Hidden<T> {
    fn get(&self, id: &str) -> Option<T> {
        let (read_at, record) = self.0.get(id)?;
        (read_at.elapsed() < REMEMBERED).then_some(record)
    }
}

/// Records that the log lists.
#[derive(Debug)]
pub(crate) struct Log<T> {
    pub(crate) records: Vec<T>,
    /// These are all.
    pub(crate) complete: bool,
}

/// The records that `endpoint` reads which were created in a span of time and are not deleted. A record whose event does
/// not show it is read by its id.
///
/// Close supports only some combinations of filters, and 50 rows. A cursor replaces the dates, and events are dated by
/// their last change, so the date is compared here as well.
pub(crate) async fn created<T: Clone + Send + Sync>(
    requests: &Requests,
    remembered: &Hidden<T>,
    endpoint: Endpoint,
    (since, until): (Timestamp, Timestamp),
    read: fn(&Value) -> Result<T, CloseError>,
) -> Result<Log<T>, CloseError> {
    let kind = if endpoint == Endpoint::ReadLead { "lead" } else { "contact" };
    let filter = format!("event/?object_type={kind}&action=created&_limit=50");
    let updated_until = until.saturating_add(MERGED_FOR).unwrap_or(Timestamp::MAX);
    let mut path = format!("{filter}&date_updated__gte={since}&date_updated__lte={updated_until}");
    let mut log = Log { records: Vec::new(), complete: false };
    let mut hidden = Vec::new();
    for _ in 0..MAX_PAGES {
        let page: Events = requests.request(Endpoint::Events, &path, None).await?;
        // The order of events is not guaranteed. An event that was changed meanwhile is among newer ones, with an old date.
        let is_older = |event: &Event| event.changed.is_some_and(|changed| changed < since);
        let reaches_back = page.events.iter().all(is_older);
        let is_asked_for = |event: &Event| event.at.is_none_or(|at| (since..=until).contains(&at));
        for Event { object_id, record, .. } in page.events.into_iter().filter(is_asked_for) {
            match record.as_ref().map(read) {
                Some(Ok(record)) => log.records.push(record),
                Some(Err(_)) | None => hidden.push(object_id),
            }
        }
        let Some(cursor) = page.older.filter(|_| !reaches_back) else {
            log.complete = true;
            break;
        };
        path = format!("{filter}&_cursor={}", utf8_percent_encode(&cursor, NON_ALPHANUMERIC));
    }
    log.complete &= hidden.len() <= MAX_READS;
    for id in hidden.into_iter().take(MAX_READS) {
        let Some(id) = id else {
            log.complete = false;
            continue;
        };
        if let Some(record) = remembered.get(&id) {
            log.records.push(record);
            continue;
        }
        match deletion::read_record(requests, endpoint, &id, None, read).await {
            Err(CloseError::NotFound) => {}
            record => {
                let record = record?;
                remembered.0.insert(id, (Instant::now(), record.clone()));
                log.records.push(record);
            }
        }
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::Method;
    use serde_json::json;

    use super::*;
    use crate::close::transport::{Response, Transport};
    use crate::close::wire;
    use crate::domain::record::Lead;

    /// A log with one creation of a Lead each second, which shows 50 of them from a position on. Those from `hidden_from`
    /// on do not show their Lead. Each third Lead is deleted.
    #[derive(Clone)]
    struct FakeLog {
        n_events: usize,
        hidden_from: usize,
        /// The first event was changed just now. Its Lead was created this many seconds ago.
        first_created: i64,
        /// The event at this position names something that is not an id.
        bad_id: usize,
        asked: Arc<Mutex<Vec<String>>>,
        /// Leads that were read by id. The eleventh read fails.
        n_reads: Arc<AtomicUsize>,
    }

    const NEWEST: i64 = 1_800_000_000;

    fn at(seconds_ago: i64) -> Timestamp {
        Timestamp::from_second(NEWEST - seconds_ago).unwrap()
    }

    impl FakeLog {
        /// It shows all Leads.
        fn new(n_events: usize) -> Self {
            let (hidden_from, bad_id) = (usize::MAX, usize::MAX);
            let (asked, n_reads) = (Arc::default(), Arc::default());
            Self { n_events, hidden_from, first_created: 0, bad_id, asked, n_reads }
        }

        fn page(&self, path: &str) -> Value {
            let from = path.split_once("_cursor=").map_or(0, |(_, cursor)| cursor.parse().unwrap());
            let to = self.n_events.min(from + 50);
            let event = |n: usize| {
                let changed = at(i64::try_from(n).unwrap()).to_string();
                let created = if n == 0 { at(self.first_created).to_string() } else { changed.clone() };
                let naive = |date: &str| date.trim_end_matches('Z').to_owned();
                let id = if n == self.bad_id { "../me".to_owned() } else { format!("lead_{n}") };
                let data = if n < self.hidden_from { json!({"id": id}) } else { Value::Null };
                json!({"date_created": naive(&created), "date_updated": naive(&changed), "object_id": id,
                    "data": data})
            };
            let next = (to < self.n_events).then(|| to.to_string());
            json!({"data": (from..to).map(event).collect::<Vec<_>>(), "cursor_next": next})
        }
    }

    impl Transport for FakeLog {
        fn send<'a>(
            &'a self,
            _: Method,
            path: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let lead = path.strip_prefix("lead/").map(|id| id.trim_end_matches('/'));
            let deletion = path.strip_prefix("event/?object_id=").and_then(|path| path.split_once('&'));
            let response = if let Some(id) = lead {
                let n_before = self.n_reads.fetch_add(1, Relaxed);
                match id.strip_prefix("lead_").unwrap().parse::<usize>().unwrap() % 3 {
                    _ if n_before == 10 => (500, json!({})),
                    0 => (404, json!({"error": "Empty query: Lead matching query does not exist."})),
                    _ => (200, json!({"id": id})),
                }
            } else if let Some((id, _)) = deletion {
                (200, json!({"data": [{"object_id": id, "action": "deleted"}]}))
            } else {
                self.asked.lock().unwrap().push(path.to_owned());
                (200, self.page(path))
            };
            std::future::ready(Ok(Response::with_status(response.0, response.1))).boxed()
        }
    }

    /// Asks again after a failure.
    async fn find(log: &FakeLog, from: i64, to: i64) -> Log<Lead> {
        let requests = Requests::new(log.clone(), Duration::from_secs(9), 1.0, |_| {});
        let remembered = Hidden::default();
        let ask = || created(&requests, &remembered, Endpoint::ReadLead, (at(from), at(to)), wire::read_lead);
        match ask().await {
            Ok(found) => found,
            Err(_) => ask().await.unwrap(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_read_back_to_the_time() {
        for (n_events, from, to, n_found, n_pages) in [
            (0, 600, 0, 0, 1),
            (50, 600, 0, 50, 1),
            (50, 600, 20, 30, 1), // those after it may have been changed since
            (51, 600, 0, 51, 2),
            (500, 120, 0, 121, 4),    // the cursor does not know the date
            (2000, 9000, 0, 500, 10), // not the whole log
        ] {
            let log = FakeLog::new(n_events);
            let found = find(&log, from, to).await;
            let asked = log.asked.lock().unwrap();
            assert_eq!((found.records.len(), asked.len()), (n_found, n_pages), "{n_events} {from} {to}");
            assert_eq!(found.complete, n_pages < MAX_PAGES);
            let filter = "event/?object_type=lead&action=created&_limit=50&";
            assert!(asked.iter().all(|path| path.starts_with(filter)), "{asked:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_creation_that_was_changed_meanwhile_does_not_end_the_search() {
        let log = FakeLog { first_created: 700, ..FakeLog::new(100) };
        let found = find(&log, 600, 0).await;
        assert_eq!((found.records.len(), found.complete), (99, true));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_an_id_is_not_read() {
        let log = FakeLog { hidden_from: 4, bad_id: 5, ..FakeLog::new(10) };
        let found = find(&log, 600, 0).await;
        assert_eq!((found.records.len(), found.complete), (7, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_its_event_hides_is_read_once() {
        for (n_events, hidden_from, n_found, complete, n_reads) in [
            (10, 4, 8, true, 6), // 6 and 9 are deleted
            (60, 10, 10 + 34, true, 50 + 1),
            (61, 10, 10 + 34, false, 50 + 1),
        ] {
            let log = FakeLog { hidden_from, ..FakeLog::new(n_events) };
            let found = find(&log, 600, 0).await;
            assert_eq!((found.records.len(), found.complete), (n_found, complete), "{n_events}");
            assert_eq!(log.n_reads.load(Relaxed), n_reads, "{n_events}");
        }
    }
}
