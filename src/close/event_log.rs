//! Close's event log: which records were created since a time (close-api.md §11, §15).

use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::close::endpoint::Endpoint;
use crate::close::error::CloseError;
use crate::close::requests::Requests;
use crate::close::wire::Events;

/// The most pages to read for one question: as many creations as a fast minute has.
const MAX_PAGES: usize = 10;

/// Records that the log lists.
#[derive(Debug)]
pub(crate) struct Log {
    /// Newest first.
    pub(crate) records: Vec<Value>,
    /// These are all.
    pub(crate) complete: bool,
}

/// The records of a kind that were created since a time.
///
/// Close supports only some combinations of filters, and 50 rows. A cursor replaces the date, so the date is compared
/// here as well.
pub(crate) async fn created(requests: &Requests, kind: &str, since: Timestamp) -> Result<Log, CloseError> {
    let filter = format!("event/?object_type={kind}&action=created&_limit=50");
    let mut path = format!("{filter}&date_updated__gte={since}");
    let mut log = Log { records: Vec::new(), complete: true };
    for _ in 0..MAX_PAGES {
        let page: Events = requests.request(Endpoint::Events, &path, None).await?;
        log.records.extend(page.records);
        log.complete &= !page.lacks_records;
        let reaches_back = page.oldest.is_none_or(|oldest| oldest < since);
        let Some(cursor) = page.older.filter(|_| !reaches_back) else { return Ok(log) };
        path = format!("{filter}&_cursor={}", utf8_percent_encode(&cursor, NON_ALPHANUMERIC));
    }
    Ok(Log { complete: false, ..log })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::Method;
    use serde_json::json;

    use super::*;
    use crate::close::transport::{Response, Transport};

    /// A log with one event a second, which shows 50 of them from a position on.
    #[derive(Clone)]
    struct Log {
        n_events: usize,
        asked: Arc<Mutex<Vec<String>>>,
    }

    impl Transport for Log {
        fn send<'a>(
            &'a self,
            _: Method,
            path: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            self.asked.lock().unwrap().push(path.to_owned());
            let from = path.split_once("_cursor=").map_or(0, |(_, cursor)| cursor.parse().unwrap());
            let to = self.n_events.min(from + 50);
            let event = |n: usize| {
                let at = Timestamp::from_second(1_800_000_000 - i64::try_from(n).unwrap()).unwrap();
                json!({"date_created": at.to_string().trim_end_matches('Z'), "data": {"id": format!("lead_{n}")}})
            };
            let next = (to < self.n_events).then(|| to.to_string());
            let page = json!({"data": (from..to).map(event).collect::<Vec<_>>(), "cursor_next": next});
            std::future::ready(Ok(Response::with_status(200, page))).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_read_back_to_the_time() {
        for (n_events, seconds, n_found, n_pages) in [
            (0, 600, 0, 1),
            (50, 600, 50, 1),
            (51, 600, 51, 2),
            (500, 120, 150, 3),    // the cursor does not know the date
            (2000, 9000, 500, 10), // not the whole log
        ] {
            let log = Log { n_events, asked: Arc::default() };
            let requests = Requests::new(log.clone(), Duration::from_secs(9), 1.0, |_| {});
            let since = Timestamp::from_second(1_800_000_000 - seconds).unwrap();
            let found = created(&requests, "lead", since).await.unwrap();
            let asked = log.asked.lock().unwrap();
            assert_eq!((found.records.len(), asked.len()), (n_found, n_pages), "{n_events} {seconds}");
            assert_eq!(found.complete, n_pages < MAX_PAGES);
            let filter = "event/?object_type=lead&action=created&_limit=50&";
            assert!(asked.iter().all(|path| path.starts_with(filter)), "{asked:?}");
        }
    }
}
