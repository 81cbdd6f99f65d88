//! The script of `certify`: makes a few marked records, tries each assumption, and notes what it sees.

mod genuine;
mod searches;
mod values;

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::cli::certify::cleanup::{self, Made};
use crate::cli::certify::looks::Looks;
use crate::cli::certify::observations::{
    ContactsForm, HeaderForm, NotFound, Observations, TimeForm, unknown_lists,
};
use crate::cli::certify::script::{Script, WITH_TRUNK_ZERO};
use crate::close::{CloseError, RawClient, RawError, Response};
use crate::domain::record::is_id;

/// The most calls, including those that delete the records.
pub(super) const MAX_CALLS: u32 = 100;
/// How long a read by id may stay stale before it counts as lasting.
const READ_WAIT: Duration = Duration::from_secs(10);
/// The pause before a call that failed is repeated.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The lists of a Contact.
const LISTS: [&str; 3] = ["emails", "phones", "urls"];

/// Why the script ended early. What was seen until then stands.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error("{0}")]
    Call(#[from] RawError),
    #[error("Close answered {status} to {what}")]
    Refused { what: &'static str, status: u16 },
    #[error("interrupted")]
    Interrupted,
}

/// Runs the script. After an interruption or a failure, `seen` and `made` hold what happened until then.
pub(super) struct Observer {
    pub(super) client: RawClient,
    pub(super) made: Made,
    pub(super) seen: Observations,
    pub(super) script: Script,
    /// Cancelled by an interruption.
    pub(super) stop: CancellationToken,
}

/// The Lead with a company id and a Contact, and the one with only a name.
struct Leads {
    keyed: String,
    contact: Option<String>,
    named: String,
    /// When Close answered the last creation.
    created: Instant,
}

impl Observer {
    /// Stops at the next await when it is interrupted, but finishes a creation that is under way: without its answer, the
    /// id of the Lead would not be known.
    pub(super) async fn run(&mut self) -> Result<(), Stop> {
        let stop = self.stop.clone();
        interruptible(&stop, self.not_found()).await?;
        let leads = self.create().await?;
        interruptible(&stop, self.look(&leads)).await
    }

    /// All steps after the creation.
    async fn look(&mut self, leads: &Leads) -> Result<(), Stop> {
        self.read_created(leads).await?;
        self.lags_of_creation(leads).await?;
        self.old_events().await?;
        self.unknown_selector().await?;
        self.change(leads).await?;
        self.exactness(leads).await?;
        self.descending(leads).await?;
        self.fields(leads).await?;
        if let Some(contact) = &leads.contact {
            self.phones(contact).await?;
            self.refusals(contact).await?;
        }
        self.deletion(leads).await
    }

    /// A call that leaves enough of them to delete what was made. An answer that is not Close's, and one that says nothing
    /// about the request, is an error and no observation.
    async fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Response, RawError> {
        let missing = self.seen.missing_record;
        self.call_judged(method, path, body, |response| genuine::fault(path, response, missing)).await
    }

    async fn call_judged(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        fault: impl Fn(&Response) -> Option<CloseError>,
    ) -> Result<Response, RawError> {
        let is_repeatable = method != Method::POST || path.starts_with("data/search/");
        let mut is_first = true;
        loop {
            if self.client.remaining() <= cleanup::reserve(&self.made) {
                return Err(RawError::OutOfCalls);
            }
            let answer = self.client.call(method.clone(), path, body).await;
            let answer = answer.and_then(|response| match fault(&response) {
                Some(error) => Err(RawError::Close(error)),
                None => Ok(response),
            });
            match answer {
                Ok(response) => {
                    self.seen.headers.insert(HeaderForm::of(&response.headers));
                    return Ok(response);
                }
                Err(RawError::Close(error)) if is_first && is_repeatable && error.is_retryable() => {
                    is_first = false;
                    sleep(RETRY_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Calls what does not exist. Any answer with one of these statuses is an observation.
    async fn probe(&mut self, path: &str, statuses: &[u16]) -> Result<Response, RawError> {
        let fault = |response: &Response| {
            if statuses.contains(&response.status.as_u16()) {
                return None;
            }
            genuine::fault(path, response, None)
        };
        self.call_judged(Method::GET, path, None, fault).await
    }

    async fn get(&mut self, path: &str) -> Result<Response, RawError> {
        self.call(Method::GET, path, None).await
    }

    async fn put(&mut self, path: &str, body: &Value) -> Result<Response, RawError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    /// The rows of a search, or its status.
    async fn search(&mut self, query: Value, more: Value) -> Result<Result<Value, u16>, Stop> {
        let fields = json!({"lead": ["id", "name"], "contact": ["id", "name"]});
        let mut body = json!({"query": query, "_limit": 50, "_fields": fields});
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        let response = self.call(Method::POST, "data/search/", Some(&body)).await?;
        Ok(if response.status.is_success() { Ok(json_of(&response)) } else { Err(response.status.as_u16()) })
    }

    async fn not_found(&mut self) -> Result<(), Stop> {
        let id = format!("lead_{}", self.made.marker);
        let response = self.probe(&format!("lead/{id}/"), &[404]).await?;
        self.seen.missing_record = Some(NotFound::of(response.status.as_u16(), &response.body));
        let response = self.probe("close_sync_certify/", &[404]).await?;
        self.seen.unknown_url = Some(NotFound::of(response.status.as_u16(), &response.body));
        let response = self.probe("me", &[301, 302, 307, 308, 404, 405]).await?;
        self.seen.missing_slash = Some(response.status.as_u16());
        Ok(())
    }

    async fn create(&mut self) -> Result<Leads, Stop> {
        let marker = self.made.marker.clone();
        let mut contact = json!({
            "name": format!("Certify {marker}"),
            "emails": [{"email": email(&marker), "type": "office"}],
            "phones": [{"phone": WITH_TRUNK_ZERO, "type": "office"}],
            "urls": [{"url": format!("https://example.com/{marker}"), "type": "url"}],
        });
        if let Some(key) = &self.script.user_key {
            contact[key] = json!(format!("{marker}-user"));
        }
        let mut lead = json!({"name": name(&marker, "a"), "description": marker, "contacts": [contact]});
        if let Some(key) = &self.script.company_key {
            lead[key] = json!(format!("{marker}-1"));
        }
        let mut response = self.create_lead(&lead).await?;
        if response.status.as_u16() == 400 {
            // Some number or URL may not suit this organization. The rest can still be tried.
            for list in ["phones", "urls"] {
                lead["contacts"][0][list] = json!([]);
            }
            response = self.create_lead(&lead).await?;
        }
        let keyed = json_of(&response);
        let Some(id) = cleanup::lead_id(&keyed["id"]).filter(|_| response.status.is_success()) else {
            return Err(refused("the creation of a Lead", &response));
        };
        self.seen.created_lists = Some(ContactsForm::of(&keyed));
        self.times(&keyed);
        let sent = &lead["contacts"][0]["phones"];
        if sent.as_array().is_some_and(|phones| !phones.is_empty()) {
            let kept = keyed.pointer("/contacts/0/phones/0/phone").and_then(Value::as_str).map(str::to_owned);
            if keyed.pointer("/contacts/0/phones").is_some_and(Value::is_array) {
                self.seen.phones.push((WITH_TRUNK_ZERO, kept));
            }
        }
        let contact = keyed.pointer("/contact_ids/0").or_else(|| keyed.pointer("/contacts/0/id"));
        let contact = contact.and_then(Value::as_str).filter(|id| is_id(Some("cont"), id)).map(str::to_owned);
        let response = self.create_lead(&json!({"name": name(&marker, "b")})).await?;
        let named = cleanup::lead_id(&json_of(&response)["id"]);
        let Some(named) = named.filter(|_| response.status.is_success()) else {
            return Err(refused("the creation of a Lead", &response));
        };
        self.seen.has_contact = contact.is_some();
        Ok(Leads { keyed: id, contact, named, created: Instant::now() })
    }

    /// Is not interrupted while the creation is under way, so that the id of the Lead is known.
    async fn create_lead(&mut self, body: &Value) -> Result<Response, Stop> {
        if self.stop.is_cancelled() {
            return Err(Stop::Interrupted);
        }
        self.made.sending();
        let answer = self.call(Method::POST, "lead/", Some(body)).await;
        self.made.sent(&answer);
        Ok(answer?)
    }

    fn times(&mut self, record: &Value) {
        let times = ["date_created", "date_updated"].into_iter().filter_map(|key| record.get(key)?.as_str());
        self.seen.times.extend(times.map(TimeForm::of));
    }

    /// Reads the Lead by its id until it is there.
    async fn read_created(&mut self, leads: &Leads) -> Result<(), Stop> {
        let path = format!("lead/?id__in={}&_fields=id", leads.keyed);
        let response = self.get(&path).await?;
        if response.status.is_success() {
            let rows = json_of(&response);
            self.seen.list_shows_new = Some(rows["data"].as_array().is_some_and(|rows| !rows.is_empty()));
        }
        let mut looks = Looks::new(leads.created, READ_WAIT);
        loop {
            let response = self.get(&format!("lead/{}/", leads.keyed)).await?;
            let lead = json_of(&response);
            if response.status.is_success() {
                self.times(&lead);
                self.seen.read_created = Some(looks.seen());
                self.seen.read_lists = Some(ContactsForm::of(&lead));
                break;
            }
            if !looks.next().await {
                self.seen.read_created = Some(looks.longer());
                break;
            }
        }
        let Some(contact) = &leads.contact else { return Ok(()) };
        let response = self.get(&format!("contact/{contact}/")).await?;
        if response.status.is_success() {
            let contact = json_of(&response);
            self.seen.unknown_lists = Some(unknown_lists(&contact, &LISTS));
            if self.seen.phones.is_empty() && contact["phones"].is_array() {
                let kept = contact.pointer("/phones/0/phone").and_then(Value::as_str).map(str::to_owned);
                self.seen.phones.push((WITH_TRUNK_ZERO, kept));
            }
        }
        Ok(())
    }

    /// Looks whether an event of more than an hour ago still has its data.
    async fn old_events(&mut self) -> Result<(), Stop> {
        let before = jiff::Timestamp::now() - Duration::from_mins(65);
        let path = format!("event/?object_type=lead&action=created&date_updated__lt={before:.0}&_limit=1");
        let response = self.get(&path).await?;
        let page = json_of(&response);
        self.seen.old_event_has_data = page.pointer("/data/0/data").map(Value::is_object);
        Ok(())
    }

    /// Whether a change of one field left the others alone, and how long reads show the old value.
    async fn read_changed(
        &mut self,
        path: &str,
        key: &str,
        new: &str,
        answer: &Response,
    ) -> Result<(), Stop> {
        if !answer.status.is_success() {
            return Err(refused("the change of a Lead", answer));
        }
        let lead = json_of(answer);
        let marker = &self.made.marker;
        let has_name = lead["name"].as_str().is_some_and(|name| name.contains(marker));
        let has_description = lead["description"].as_str().is_some_and(|text| text.contains(marker));
        let lost_contacts = lead["contact_ids"].as_array().is_some_and(Vec::is_empty);
        self.seen.is_patch = Some(has_name && has_description && !lost_contacts);
        let mut looks = Looks::new(Instant::now(), READ_WAIT);
        loop {
            let response = self.get(path).await?;
            if json_of(&response).get(key).and_then(Value::as_str) == Some(new) {
                self.seen.read_changed = Some(looks.seen());
                return Ok(());
            }
            if !looks.next().await {
                self.seen.read_changed = Some(looks.longer());
                return Ok(());
            }
        }
    }

    async fn deletion(&mut self, leads: &Leads) -> Result<(), Stop> {
        if !cleanup::delete(&mut self.client, &leads.named).await {
            return Ok(());
        }
        let deleted = Instant::now();
        self.made.deleted(&leads.named);
        let mut looks = Looks::new(deleted, READ_WAIT);
        loop {
            let response = self.get(&format!("lead/{}/", leads.named)).await?;
            if response.status.as_u16() == 404 {
                self.seen.read_deleted = Some(looks.seen());
                return Ok(());
            }
            if !looks.next().await {
                self.seen.read_deleted = Some(looks.longer());
                return Ok(());
            }
        }
    }
}

/// Runs a step until it ends or the run is interrupted.
async fn interruptible(
    stop: &CancellationToken,
    work: impl Future<Output = Result<(), Stop>>,
) -> Result<(), Stop> {
    tokio::select! {
        result = work => result,
        () = stop.cancelled() => Err(Stop::Interrupted),
    }
}

fn name(marker: &str, suffix: &str) -> String {
    format!("close-sync certify {marker}{suffix}")
}

fn email(marker: &str) -> String {
    format!("certify-{marker}@example.com")
}

fn refused(what: &'static str, response: &Response) -> Stop {
    Stop::Refused { what, status: response.status.as_u16() }
}

fn json_of(response: &Response) -> Value {
    serde_json::from_slice(&response.body).unwrap_or_default()
}

fn ids(page: &Value) -> Vec<String> {
    let rows = page["data"].as_array().into_iter().flatten();
    rows.filter_map(|row| row["id"].as_str()).map(str::to_owned).collect()
}
