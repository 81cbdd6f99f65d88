//! Whether a record is gone.
//!
//! A record that is gone is created again. Close answers a read of it with a 404 that says so, but reads of all records have
//! that answer when the route or the key is wrong. The event log tells a deletion from that (close-api.md §11): it has an
//! event for each record that was deleted in the last 30 days, also by a merge, and also for the Contacts of a deleted Lead
//! (close-api.md §4, §9). An id that is older than search lags does not come up.
//!
//! - The event log has the deletion: the record is gone ([`CloseError::NotFound`]). It never comes back, a restored one has
//!   a new id (close-api.md §9). So it is not read again: search may show it for hours to each message.
//! - It does not: the record has only vanished ([`Fault::Vanished`]), and the call is repeated later. Perhaps the event log
//!   lags.
//! - It does not answer: nothing is concluded, and the record has only vanished. The message is not at fault.
//! - The key may not read it, or Close refuses the question: the record is gone if reads by id show another record of its
//!   kind, and still not this one after [`MOMENT`]. Else it has vanished. That is weaker: it does not
//!   tell a deletion from a fault that affects some records only.

use std::time::Duration;

use percent_encoding::utf8_percent_encode;
use serde::Deserialize;
use serde_json::Value;

use crate::close::endpoint::Endpoint;
use crate::close::error::{CloseError, Fault};
use crate::close::requests::Requests;
use crate::close::wire;

/// How long a read by id may not show a record that exists, or still show one that is gone (close-api.md §15, 2).
pub(crate) const MOMENT: Duration = Duration::from_secs(15);
/// Other records to try. Lists lag, so the first ones may be gone, too.
const OTHERS: usize = 5;

const VANISHED: CloseError = CloseError::Transient(Fault::Vanished);

/// Objects of which only some keys matter.
#[derive(Deserialize)]
struct Rows<T> {
    data: Vec<T>,
}

#[derive(Deserialize)]
struct Deletion {
    object_id: Option<String>,
    action: Option<String>,
}

#[derive(Deserialize)]
struct Other {
    id: Option<String>,
}

/// Reads a record, or only these fields of it, of which `keep` takes what is needed.
pub(crate) async fn read_record<T>(
    requests: &Requests,
    endpoint: Endpoint,
    id: &str,
    fields: Option<&str>,
    keep: impl Fn(&Value) -> Result<T, CloseError>,
) -> Result<T, CloseError> {
    if requests.deletions().contains_key(id) {
        return Err(CloseError::NotFound);
    }
    let fields = fields.map(|fields| format!("?_fields={fields}")).unwrap_or_default();
    let path = wire::record_path(endpoint, id) + &fields;
    match requests.read_record(endpoint, &path, keep).await {
        Err(CloseError::NotFound) => Err(missing(requests, endpoint, id).await),
        answer => answer,
    }
}

/// What a 404 for a record means. `endpoint` reads it.
pub(crate) async fn missing(requests: &Requests, endpoint: Endpoint, id: &str) -> CloseError {
    let gone = match was_deleted(requests, id).await {
        Err(CloseError::Forbidden | CloseError::PlanLimit | CloseError::Rejected(_)) => {
            is_gone(requests, endpoint, id).await
        }
        answer => answer,
    };
    match gone {
        Ok(true) => CloseError::NotFound,
        // The key is wrong, or the way to Close is: these have their own consequences.
        Err(error @ (CloseError::Unauthorized | CloseError::Unreachable(_))) => error,
        Ok(false) | Err(_) => VANISHED,
    }
}

/// Whether the event log has the deletion of a record.
async fn was_deleted(requests: &Requests, id: &str) -> Result<bool, CloseError> {
    let object = utf8_percent_encode(id, wire::IN_ID);
    let path = format!("event/?object_id={object}&action=deleted&_limit=1");
    let events: Rows<Deletion> = requests.request(Endpoint::Events, &path, None).await?;
    // What answers in the place of Close may ignore the filters.
    let is_it = |event: &Deletion| {
        event.object_id.as_deref() == Some(id) && event.action.as_deref() == Some("deleted")
    };
    let was_deleted = events.data.iter().any(is_it);
    if was_deleted {
        requests.deletions().insert(id.to_owned(), ());
    }
    Ok(was_deleted)
}

/// Whether a record is still missing after [`MOMENT`], and another one is not.
async fn is_gone(requests: &Requests, endpoint: Endpoint, id: &str) -> Result<bool, CloseError> {
    tokio::time::sleep(MOMENT).await;
    Ok(reads_another(requests, endpoint, id).await? && !exists(requests, endpoint, id).await?)
}

/// Whether another record can be read. An empty list proves nothing: the key may not see any.
async fn reads_another(requests: &Requests, endpoint: Endpoint, id: &str) -> Result<bool, CloseError> {
    let path = format!("{}?_limit={OTHERS}&_fields=id", wire::list_path(endpoint));
    let rows: Rows<Other> = requests.request(endpoint, &path, None).await?;
    for other in rows.data.iter().filter_map(|row| row.id.as_deref()).filter(|other| *other != id) {
        if exists(requests, endpoint, other).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn exists(requests: &Requests, endpoint: Endpoint, id: &str) -> Result<bool, CloseError> {
    // What answers in the place of Close may answer each read with the same record.
    let keep = |record: &Value| Ok(record["id"] == id);
    let path = wire::record_path(endpoint, id) + "?_fields=id";
    match requests.read_record(endpoint, &path, keep).await {
        Err(CloseError::NotFound) => Ok(false),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::Method;
    use serde_json::json;
    use tokio::time::Instant;

    use super::*;
    use crate::close::transport::{Response, Transport};
    use crate::close::{Api, Client, Records};
    use crate::domain::plan::{ContactValues, Step};
    use crate::domain::record::{ContactId, Fields, LeadId};

    type Reply = (u16, Value);
    /// The answer to a read of a Contact, given its id and when the test began.
    type Read = fn(&str, Instant) -> Reply;

    fn not_there() -> Reply {
        (404, json!({"error": "Empty query: Lead matching query does not exist."}))
    }

    fn event(id: &str, action: &str) -> Reply {
        (200, json!({"data": [{"object_id": id, "action": action}]}))
    }

    fn rows(ids: &[&str]) -> Reply {
        (200, json!({"data": ids.iter().map(|id| json!({"id": id})).collect::<Vec<_>>()}))
    }

    /// Answers the event log, lists of Contacts, and reads of Contacts by id. All else is missing.
    #[derive(Clone)]
    struct Script {
        events: Reply,
        list: Reply,
        read: Read,
        started: Instant,
    }

    impl Script {
        fn new(events: Reply) -> Self {
            Self { events, list: not_there(), read: |_, _| not_there(), started: Instant::now() }
        }
    }

    impl Transport for Script {
        fn send<'a>(
            &'a self,
            method: Method,
            path: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let contact = path.strip_prefix("contact/").filter(|_| method == Method::GET);
            let (status, body) = match contact {
                Some(list) if list.starts_with('?') => self.list.clone(),
                Some(id) => (self.read)(id.split('/').next().unwrap(), self.started),
                None if path.starts_with("event/") => self.events.clone(),
                None => not_there(),
            };
            std::future::ready(Ok(Response::with_status(status, body))).boxed()
        }
    }

    fn client(script: Script) -> Client {
        Client::with_transport(script, Duration::from_secs(30), 1.0, |_| {})
    }

    async fn read(script: Script) -> CloseError {
        client(script).contact(&ContactId::new("cont_1")).await.unwrap_err()
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_deletion_in_the_event_log_means_that_a_record_is_gone() {
        for (events, expected) in [
            (event("cont_1", "deleted"), CloseError::NotFound),
            (event("cont_1", "updated"), VANISHED),
            (event("cont_2", "deleted"), VANISHED),
            ((200, json!({"data": []})), VANISHED),
            (not_there(), VANISHED),
            ((500, json!({"error": "no"})), VANISHED),
            ((200, json!({"data": null})), VANISHED),
            ((401, json!({"error": "no"})), CloseError::Unauthorized),
        ] {
            let started = Instant::now();
            assert_eq!(read(Script::new(events.clone())).await, expected, "{events:?}");
            assert!(started.elapsed() < MOMENT);
        }
    }

    /// How many calls two reads of a record take.
    async fn calls(events: Reply) -> u32 {
        let client = client(Script::new(events));
        for _ in 0..2 {
            client.contact(&ContactId::new("cont_1")).await.unwrap_err();
        }
        client.calls()
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_whose_deletion_is_known_is_not_read_again() {
        assert_eq!(calls(event("cont_1", "deleted")).await, 2);
        assert_eq!(calls(event("cont_1", "updated")).await, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_event_log_another_record_must_be_there() {
        let others: Read = |id, _| if id == "cont_1" { not_there() } else { (200, json!({"id": id})) };
        let only_second: Read = |id, _| if id == "cont_3" { (200, json!({"id": id})) } else { not_there() };
        let same: Read = |id, _| if id == "cont_1" { not_there() } else { (200, json!({"id": "cont_9"})) };
        let late: Read = |id, started| {
            let is_there = id != "cont_1" || started.elapsed() >= MOMENT;
            if is_there { (200, json!({"id": id})) } else { not_there() }
        };
        let none: Read = |_, _| not_there();
        let cases: [(Reply, Read, CloseError); 8] = [
            (rows(&["cont_2"]), others, CloseError::NotFound),
            (rows(&["cont_1", "cont_2", "cont_3"]), only_second, CloseError::NotFound),
            (rows(&["cont_2"]), none, VANISHED),
            (rows(&["cont_1"]), others, VANISHED),
            (rows(&[]), none, VANISHED),
            (not_there(), others, VANISHED),
            (rows(&["cont_2"]), same, VANISHED),
            (rows(&["cont_2"]), late, VANISHED),
        ];
        for status in [403, 402, 400] {
            for (list, answer, expected) in cases.clone() {
                let script = Script {
                    list: list.clone(),
                    read: answer,
                    ..Script::new((status, json!({"error": "no"})))
                };
                let started = Instant::now();
                assert_eq!(read(script).await, expected, "{status} {list:?}");
                assert!(started.elapsed() >= MOMENT);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_404_of_a_write_is_checked_too() {
        let (lead, contact) = (LeadId::new("lead_1"), ContactId::new("cont_1"));
        let unknown_url = CloseError::Transient(Fault::UnknownUrl);
        let steps = [
            (Step::UpdateLead { id: lead.clone(), changes: Fields::new() }, Some("lead_1")),
            (Step::UpdateContact { id: contact, changes: ContactValues::default() }, Some("cont_1")),
            (Step::CreateContact { lead, contact: ContactValues::default() }, Some("lead_1")),
            (Step::CreateLead { lead: Fields::new(), contact: None }, None),
        ];
        for (step, record) in steps {
            for is_logged in [true, false] {
                let events = event(record.filter(|_| is_logged).unwrap_or("lead_9"), "deleted");
                let client = client(Script::new(events));
                let permit = client.acquire(&step).await;
                let error = client.write(&step, permit).await.unwrap_err();
                let expected = match record {
                    None => unknown_url.clone(),
                    Some(_) if is_logged => CloseError::NotFound,
                    Some(_) => VANISHED,
                };
                assert_eq!(error, expected, "{step:?}");
            }
        }
    }
}
