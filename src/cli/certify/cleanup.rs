//! The records that `certify` made, and their deletion, also after an interruption.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::cli::certify::looks::{Looks, progress};
use crate::cli::certify::observations::NotFound;
use crate::cli::certify::queries::{by_name, leads_with};
use crate::close::{RawClient, RawError, Response};
use crate::domain::record::is_id;

/// Tries for each record, with a pause between them.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// How long to look for a Lead whose creation is in doubt.
const LOOK_UP_WAIT: Duration = Duration::from_secs(30);
/// The most calls of one look-up: the looks of [`LOOK_UP_WAIT`], a search, and a read of each row.
const LOOK_UP_CALLS: u32 = 20;
/// The suffixes of the names of the Leads. The marker and one of them are one word for search.
const SUFFIXES: [&str; 2] = ["a", "b"];

/// The calls that deleting needs: each Lead, and the look-up of one whose creation is in doubt.
pub(super) fn reserve(made: &Made) -> u32 {
    let leads = u32::try_from(made.leads.len()).unwrap_or(u32::MAX).saturating_add(1);
    let look_up = if made.is_in_doubt() { LOOK_UP_CALLS } else { 0 };
    leads.saturating_mul(TRIES).saturating_add(look_up).saturating_add(2)
}

/// The Leads that were made. Their Contacts are deleted with them.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// The name of every record contains it.
    pub(super) marker: String,
    leads: Vec<String>,
    /// A creation was sent, and its answer was not seen yet.
    is_sending: bool,
    /// Some creation may have made a Lead whose id is not known. The answer to a later creation says nothing about it.
    has_doubt: bool,
}

impl Made {
    pub(super) fn new(marker: String) -> Self {
        Self { marker, ..Self::default() }
    }

    /// A creation is about to be sent.
    pub(super) fn sending(&mut self) {
        self.is_sending = true;
    }

    /// The outcome of a creation.
    pub(super) fn sent(&mut self, answer: &Result<Response, RawError>) {
        self.is_sending = false;
        self.has_doubt |= match answer {
            Ok(response) if response.status.is_success() => {
                let record: Value = serde_json::from_slice(&response.body).unwrap_or_default();
                let lead = lead_id(&record["id"]);
                self.leads.extend(lead.clone());
                lead.is_none()
            }
            Err(RawError::Close(error)) => error.may_have_been_applied(),
            // Refused in Close's words, not sent, or answered with 429.
            Ok(_) | Err(RawError::OutOfCalls | RawError::RateLimited) => false,
        };
    }

    fn is_in_doubt(&self) -> bool {
        self.is_sending || self.has_doubt
    }

    pub(super) fn deleted(&mut self, lead: &str) {
        self.leads.retain(|made| made != lead);
    }

    fn is_known(&self, lead: &str) -> bool {
        self.leads.iter().any(|made| made == lead)
    }
}

/// Deletes everything. Returns the ids of what could not be deleted; if a creation stayed in doubt, also the marker.
pub(super) async fn delete_all(client: &mut RawClient, made: &mut Made) -> Vec<String> {
    let mut left = Vec::new();
    if made.is_in_doubt() {
        match look_up(client, made).await {
            Some(lead) => made.leads.push(lead),
            None => left.push(format!("a Lead with \"{}\" in its name, if there is one", made.marker)),
        }
        (made.is_sending, made.has_doubt) = (false, false);
    }
    for lead in std::mem::take(&mut made.leads) {
        if !delete(client, &lead).await {
            left.push(lead);
        }
    }
    left
}

/// Deletes a Lead with its Contacts. Returns whether it is gone.
pub(super) async fn delete(client: &mut RawClient, lead: &str) -> bool {
    let mut is_gone = false;
    for attempt in 0..TRIES {
        if attempt > 0 {
            sleep(PAUSE).await;
        }
        let response = match client.call(Method::DELETE, &format!("lead/{lead}/"), None).await {
            Ok(response) => response,
            Err(RawError::Close(_) | RawError::RateLimited) => continue,
            Err(RawError::OutOfCalls) => return false,
        };
        if response.status.is_success() {
            return true;
        }
        // A record that was just made may not be known everywhere yet, so one 404 proves nothing. A 404 of a proxy has
        // other words, and never proves anything.
        if NotFound::of(response.status.as_u16(), &response.body) == NotFound::Record {
            if is_gone {
                return true;
            }
            is_gone = true;
        }
    }
    is_gone
}

/// Looks for the Lead whose creation is in doubt: in the event log until it is there, and at the end with a search.
/// `None` does not mean that it does not exist.
async fn look_up(client: &mut RawClient, made: &Made) -> Option<String> {
    progress("looking for a Lead whose creation got no answer", LOOK_UP_WAIT);
    let mut looks = Looks::new(Instant::now(), LOOK_UP_WAIT);
    loop {
        if let Some(lead) = in_event_log(client, made).await {
            return Some(lead);
        }
        if !looks.next().await {
            return in_search(client, made).await;
        }
    }
}

/// The event log shows a new Lead before search does.
async fn in_event_log(client: &mut RawClient, made: &Made) -> Option<String> {
    let page = rows(client, Method::GET, "event/?object_type=lead&action=created&_limit=50", None).await;
    page.iter().find_map(|event| unknown(&event["data"], made))
}

async fn in_search(client: &mut RawClient, made: &Made) -> Option<String> {
    let names = SUFFIXES.iter().map(|suffix| by_name(&format!("{}{suffix}", made.marker))).collect();
    let query = json!({"query": leads_with(names), "_limit": 3, "_fields": {"lead": ["id", "name"]}});
    for row in rows(client, Method::POST, "data/search/", Some(&query)).await {
        let Some(lead) = lead_id(&row["id"]).filter(|lead| !made.is_known(lead)) else { continue };
        // The row may have no name, and a Lead of another name must not be deleted.
        let Ok(response) = client.call(Method::GET, &format!("lead/{lead}/"), None).await else { continue };
        let record = serde_json::from_slice(&response.body).unwrap_or_default();
        if response.status.is_success() && unknown(&record, made).as_ref() == Some(&lead) {
            return Some(lead);
        }
    }
    None
}

/// The rows of a list. Without an answer there are none.
async fn rows(client: &mut RawClient, method: Method, path: &str, body: Option<&Value>) -> Vec<Value> {
    let Ok(response) = client.call(method, path, body).await else { return Vec::new() };
    let page: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    page["data"].as_array().filter(|_| response.status.is_success()).cloned().unwrap_or_default()
}

/// The id of a Lead of this run that is not known yet.
fn unknown(lead: &Value, made: &Made) -> Option<String> {
    let is_ours = lead["name"].as_str().is_some_and(|name| name.contains(&made.marker));
    lead_id(&lead["id"]).filter(|id| is_ours && !made.is_known(id))
}

/// The id becomes a part of the path of a deletion.
pub(super) fn lead_id(id: &Value) -> Option<String> {
    id.as_str().filter(|id| is_id(Some("lead"), id)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::close::{CloseError, Fault, Transport};

    type Answer = fn(&str) -> (u16, &'static str);

    /// Answers each path, and notes the calls.
    #[derive(Clone)]
    struct Scripted(Answer, Arc<Mutex<Vec<String>>>);

    impl Transport for Scripted {
        fn send<'a>(
            &'a self,
            method: Method,
            path: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let call = format!("{method} {path}");
            let (status, body) = self.0(&call);
            self.1.lock().unwrap().push(call);
            std::future::ready(Ok(Response::with_status(status, body))).boxed()
        }
    }

    /// What is left behind after a creation that got no answer, and the paths that were deleted.
    async fn left_in_doubt(answer: Answer) -> (Vec<String>, Vec<String>) {
        let transport = Scripted(answer, Arc::default());
        let mut client = RawClient::with_transport(transport.clone(), LOOK_UP_CALLS + TRIES);
        let mut made = Made::new("f00".to_owned());
        made.sending();
        let left = delete_all(&mut client, &mut made).await;
        let calls = transport.1.lock().unwrap().clone();
        let deleted = calls.iter().filter_map(|call| call.strip_prefix("DELETE ")).map(str::to_owned);
        (left, deleted.collect())
    }

    const IN_DOUBT: &str = "a Lead with \"f00\" in its name, if there is one";

    #[tokio::test(start_paused = true)]
    async fn a_creation_that_stays_in_doubt_is_named() {
        let none: [Answer; 5] = [
            |_| (200, r#"{"data": []}"#),
            |_| (403, r#"{"data": [{"data": {"id": "lead_1", "name": "x f00a"}}]}"#),
            |_| (502, "<html>"),
            // Not an id: it would delete something else.
            |_| (200, r#"{"data": [{"data": {"id": "../contact/cont_1", "name": "x f00a"}}]}"#),
            // A search that ignores its conditions shows a Lead of somebody else.
            |call| match call {
                "POST data/search/" => (200, r#"{"data": [{"id": "lead_1"}]}"#),
                "GET lead/lead_1/" => (200, r#"{"id": "lead_1", "name": "Acme"}"#),
                _ => (200, r#"{"data": []}"#),
            },
        ];
        for answer in none {
            assert_eq!(left_in_doubt(answer).await, (vec![IN_DOUBT.to_owned()], vec![]));
        }
    }

    #[test]
    fn the_answer_to_a_later_creation_settles_no_doubt_about_an_earlier_one() {
        let created = Ok(Response::with_status(200, r#"{"id": "lead_1"}"#));
        let refused = Ok(Response::with_status(400, r#"{"error": "no"}"#));
        let lost = Err(RawError::Close(CloseError::Transient(Fault::Timeout)));
        for (first, second, expected) in [
            (&lost, &created, true),
            (&refused, &created, false),
            (&created, &lost, true),
            (&lost, &refused, true),
        ] {
            let mut made = Made::new("f00".to_owned());
            for answer in [first, second] {
                made.sending();
                assert!(made.is_in_doubt());
                made.sent(answer);
            }
            assert_eq!(made.is_in_doubt(), expected, "{first:?} {second:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_search_finds_what_the_event_log_does_not_show() {
        let (left, deleted) = left_in_doubt(|call| match call {
            "POST data/search/" => (200, r#"{"data": [{"id": "lead_1"}]}"#),
            "GET lead/lead_1/" => (200, r#"{"id": "lead_1", "name": "x f00a"}"#),
            "DELETE lead/lead_1/" => (200, "{}"),
            _ => (403, "{}"),
        })
        .await;
        assert_eq!((left, deleted), (vec![], vec!["lead/lead_1/".to_owned()]));
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_404_with_the_words_of_close_means_gone() {
        let cases: [(Answer, bool); 4] = [
            (|_| (404, r#"{"error": "Empty query: Lead matching query does not exist."}"#), true),
            (|_| (404, "<html>"), false),
            (|_| (404, r#"{"error": "The requested URL was not found on the server."}"#), false),
            (|_| (500, "{}"), false),
        ];
        for (answer, expected) in cases {
            let mut client = RawClient::with_transport(Scripted(answer, Arc::default()), 9);
            assert_eq!(delete(&mut client, "lead_1").await, expected);
        }
    }
}
