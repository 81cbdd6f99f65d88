//! The client: one private `request`, one short method per operation.
//!
//! Every call passes the [`RateLimiter`] of its endpoint group, and every answer is told to it. Calls are
//! never repeated here, with one exception: a 429 means that nothing happened, so the call waits for
//! the window it was told and goes again. Whoever awaits a call may drop it; what was sent may still
//! happen.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use strum::VariantArray;
use tokio::time::Instant;
use tracing::field::Empty;
use tracing::{Instrument, Span};
use url::Url;

use crate::close::endpoint::{Call, Endpoint, StatusClass};
use crate::close::error::{CloseError, Fault, Rejection};
use crate::close::rate_limit::headers::{self, RateLimit};
use crate::close::rate_limit::window::RateLimitStatus;
use crate::close::rate_limit::{self, Permit, Priority, RateLimiter};
use crate::close::search_batch::Batcher;
use crate::close::stall_guard::StallGuard;
use crate::close::transport::{Http, Response, Transport};
use crate::close::wire::{self, Members};
use crate::close::{Hits, Lookup, Organization, Records};
use crate::domain::plan::ContactValues;
use crate::domain::record::{Contact, ContactId, FieldId, Fields, Lead, LeadId};
use crate::domain::schema::{CustomField, User};
use crate::telemetry::otel::{self, SPANS};

/// How to reach Close.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The base of the API, ending in a slash: `https://api.close.com/api/v1/`.
    pub url: Url,
    /// The API key.
    pub api_key: SecretString,
    /// How long one call may take.
    pub timeout: Duration,
    /// The part of Close's rate limits that is spent, above 0 and at most 1; the rest is for others.
    pub share: f64,
}

impl Settings {
    /// Whether both have the same key, and so the same organization. Without a key there is none.
    pub fn is_same_key(&self, other: &Self) -> bool {
        let [key, others] = [self, other].map(|settings| settings.api_key.expose_secret());
        !key.is_empty() && self.url == other.url && key == others
    }
}

impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        let told = |Self { url, api_key, timeout, share }: &Self| {
            (url.clone(), api_key.expose_secret().to_owned(), *timeout, *share)
        };
        told(self) == told(other)
    }
}

/// Budget for one call, and how long was waited for it.
pub(crate) type Entered = (Permit, Duration);

type Observer = Box<dyn Fn(Call) + Send + Sync>;

/// A client of one Close organization. Clones share connections, gates and budget.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
    pub(crate) calls: Arc<AtomicU32>,
    pub(crate) priority: Priority,
    /// The last failure was that of a search others shared, and one of them answers for it.
    pub(crate) duplicate_failure: Arc<AtomicBool>,
}

pub(crate) struct Inner {
    transport: Box<dyn Transport>,
    timeout: Duration,
    pub(crate) gates: HashMap<Endpoint, RateLimiter>,
    /// Calls answered with 429 since the last that was not.
    refused_in_a_row: HashMap<Endpoint, AtomicU32>,
    observe: Observer,
    stall_guard: StallGuard,
    /// More messages wait than are worked on.
    pub(crate) backlog: AtomicBool,
    /// Look-ups of Leads that wait, and of Contacts.
    pub(crate) leads: Batcher,
    pub(crate) contacts: Batcher,
    /// Close does not know `exact_value` (it is not documented): search by phrase from now on.
    pub(crate) phrase_only: AtomicBool,
}

/// So many calls answered with 429 in a row are worth a line.
const MANY_REFUSALS: u32 = 5;

impl Client {
    /// Makes a client that reaches Close over HTTPS. `observe` is told of every call.
    ///
    /// # Errors
    /// When the TLS set-up of the machine is unusable.
    pub fn new(
        settings: Settings,
        observe: impl Fn(Call) + Send + Sync + 'static,
    ) -> Result<Self, reqwest::Error> {
        let Settings { timeout, share, .. } = settings;
        Ok(Self::with_transport(Http::new(settings)?, timeout, share, observe))
    }

    /// The same over another transport, which ends each call after `timeout` at the latest. `share` is that
    /// of the [`Settings`].
    pub fn with_transport(
        transport: impl Transport + 'static,
        timeout: Duration,
        share: f64,
        observe: impl Fn(Call) + Send + Sync + 'static,
    ) -> Self {
        let gate = |endpoint| (endpoint, RateLimiter::new(share));
        let gates = Endpoint::VARIANTS.iter().copied().map(gate).collect();
        let inner = Inner {
            transport: Box::new(transport),
            timeout,
            gates,
            refused_in_a_row: Endpoint::VARIANTS
                .iter()
                .map(|endpoint| (*endpoint, AtomicU32::new(0)))
                .collect(),
            observe: Box::new(observe),
            stall_guard: StallGuard::default(),
            backlog: AtomicBool::new(false),
            leads: Batcher::default(),
            contacts: Batcher::default(),
            phrase_only: AtomicBool::new(false),
        };
        let (calls, priority, duplicate_failure) = (Arc::default(), Priority::default(), Arc::default());
        Self { inner: Arc::new(inner), calls, priority, duplicate_failure }
    }

    /// How long one call may take.
    pub fn timeout(&self) -> Duration {
        self.inner.timeout
    }

    /// The same client for one message: it counts its calls anew, and they go with this priority.
    #[must_use]
    pub fn for_message(&self, priority: Priority) -> Self {
        Self { inner: self.inner.clone(), calls: Arc::default(), priority, duplicate_failure: Arc::default() }
    }

    /// Whether the last failure is somebody else's to answer for: a search was shared, and one failed call is
    /// not to look like many.
    pub fn take_duplicate_failure(&self) -> bool {
        self.duplicate_failure.swap(false, Ordering::Relaxed)
    }

    /// What is left of Close's rate limits, of those it told.
    pub fn rate_limits(&self) -> impl Iterator<Item = (Endpoint, RateLimitStatus)> {
        self.inner.gates.iter().filter_map(|(endpoint, gate)| Some((*endpoint, gate.standing()?)))
    }

    /// Its gaps keep changes from being sent.
    pub fn stall_guard(&self) -> &StallGuard {
        &self.inner.stall_guard
    }

    /// Tells whether there is a backlog: then fewer calls matter more than quick ones.
    pub fn set_backlog(&self, there_is: bool) {
        self.inner.backlog.store(there_is, Ordering::Relaxed);
    }

    /// Calls made, those answered with 429 included.
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Whose key this is; also the credential check.
    pub async fn me(&self) -> Result<Organization, CloseError> {
        let me: wire::Me = self.request(Endpoint::Me, "me/", None).await?;
        Ok(me.into())
    }

    /// All custom fields of Leads, shared ones included.
    pub async fn lead_fields(&self) -> Result<Vec<CustomField>, CloseError> {
        self.schema("custom_field_schema/lead/").await
    }

    /// All custom fields of Contacts, shared ones included.
    pub async fn contact_fields(&self) -> Result<Vec<CustomField>, CloseError> {
        self.schema("custom_field_schema/contact/").await
    }

    async fn schema(&self, path: &str) -> Result<Vec<CustomField>, CloseError> {
        let schema: wire::Schema = self.request(Endpoint::Schema, path, None).await?;
        Ok(schema.fields.into_iter().map(CustomField::from).collect())
    }

    /// The members of the organization.
    pub async fn users(&self) -> Result<Vec<User>, CloseError> {
        let mut users = Vec::new();
        loop {
            let path = format!("user/?_limit={}&_skip={}", wire::PAGE, users.len());
            let page: wire::Users = self.request(Endpoint::Users, &path, None).await?;
            let (more, empty) = (page.has_more, page.data.is_empty());
            users.extend(page.data.into_iter().map(User::from));
            if !more || empty {
                return Ok(users);
            }
        }
    }

    /// The Leads and Contacts made last, as the event log tells: it knows of them before search does
    /// (close-api.md §11). At most a page of each; whoever is not among them may exist all the same.
    pub async fn created_since(
        &self,
        since: jiff::Timestamp,
    ) -> Result<(Vec<Lead>, Vec<Contact>), CloseError> {
        let page = async |kind: &str| {
            let path =
                format!("event/?object_type={kind}&action=created&date_updated__gte={since}&_limit=50");
            let page: wire::Events = self.request(Endpoint::Events, &path, None).await?;
            Ok(page.data.into_iter().map(|event| event.data).collect::<Vec<_>>())
        };
        let (leads, contacts) = (page("lead").await?, page("contact").await?);
        Ok((
            leads.iter().filter_map(wire::read_lead).collect(),
            contacts.iter().filter_map(wire::read_contact).collect(),
        ))
    }

    /// Reads a record. That it is gone makes another one be created, so it is asked twice: a gateway that
    /// has lost its way answers 404 too.
    async fn read(&self, endpoint: Endpoint, path: &str) -> Result<Value, CloseError> {
        match self.request(endpoint, path, None).await {
            Err(CloseError::NotFound) => self.request(endpoint, path, None).await,
            answer => answer,
        }
    }

    /// Creates a Lead and its Contact in one call. Never repeat it blindly.
    pub async fn create_lead(
        &self,
        lead: &Fields,
        contact: Option<&ContactValues>,
    ) -> Result<(LeadId, Option<ContactId>), CloseError> {
        let body = wire::lead_body(lead, contact);
        let answer: Value = self.request(Endpoint::CreateLead, "lead/", Some(body)).await?;
        let lead = wire::read_lead(&answer).ok_or(CloseError::Transient(Fault::Garbled))?;
        Ok((lead.id, wire::first_member(&answer)))
    }

    /// Creates a Contact in a Lead. Never repeat it blindly.
    pub async fn create_contact(
        &self,
        lead: &LeadId,
        contact: &ContactValues,
    ) -> Result<ContactId, CloseError> {
        let body = wire::contact_body(contact, Some(lead));
        let answer: Value = self.request(Endpoint::CreateContact, "contact/", Some(body)).await?;
        let contact = wire::read_contact(&answer).ok_or(CloseError::Transient(Fault::Garbled))?;
        Ok(contact.id)
    }

    /// Changes fields of a Lead; the others stay (PUT is a patch, close-api.md §1).
    pub async fn update_lead(&self, id: &LeadId, changes: &Fields) -> Result<(), CloseError> {
        let body = wire::lead_body(changes, None);
        self.request::<Value>(Endpoint::UpdateLead, &format!("lead/{id}/"), Some(body)).await.map(drop)
    }

    /// Changes fields and whole lists of a Contact; the others stay.
    pub async fn update_contact(&self, id: &ContactId, changes: &ContactValues) -> Result<(), CloseError> {
        let body = wire::contact_body(changes, None);
        self.request::<Value>(Endpoint::UpdateContact, &format!("contact/{id}/"), Some(body)).await.map(drop)
    }

    async fn request<T: DeserializeOwned>(
        &self,
        endpoint: Endpoint,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, CloseError> {
        self.request_with(None, endpoint, path, body).await
    }

    /// The same, with budget that was waited for already.
    pub(crate) async fn request_with<T: DeserializeOwned>(
        &self,
        mut entered: Option<Entered>,
        endpoint: Endpoint,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, CloseError> {
        loop {
            let permit = match entered.take() {
                Some(entered) => entered,
                None => self.enter(endpoint).await,
            };
            if let Some(answer) = self.send(permit, endpoint, path, body.as_ref()).await? {
                return serde_json::from_slice(&answer).map_err(|_| CloseError::Transient(Fault::Garbled));
            }
        }
    }

    /// Waits for budget.
    pub(crate) async fn enter(&self, endpoint: Endpoint) -> Entered {
        self.inner.gates[&endpoint].enter(self.priority).await
    }

    /// Sends once. `None` after a 429: the gate is closed for as long as Close said.
    async fn send(
        &self,
        (mut permit, waited): Entered,
        endpoint: Endpoint,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Option<Vec<u8>>, CloseError> {
        if endpoint.writes() && !self.inner.stall_guard.allows_writes() {
            // The session ends for it, and drops this.
            std::future::pending::<()>().await;
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        let span = span(endpoint, waited);
        let result = self.inner.transport.send(endpoint.method(), path, body).instrument(span.clone()).await;
        conclude(&span, &result);
        let status = result.as_ref().map_or(StatusClass::NoAnswer, |answer| StatusClass::of(answer.status));
        (self.inner.observe)(Call { endpoint, status, took: started.elapsed(), waited });

        let answer = result?;
        let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
        let limit = RateLimit::read(header);
        permit.answered(limit);
        if answer.status != StatusCode::TOO_MANY_REQUESTS
            && self.inner.refused_in_a_row[&endpoint].swap(0, Ordering::Relaxed) >= MANY_REFUSALS
        {
            tracing::info!(endpoint = endpoint.label(), "Close takes calls again");
        }
        match answer.status.as_u16() {
            200..=299 => Ok(Some(answer.body)),
            401 => Err(CloseError::Unauthorized),
            402 => Err(CloseError::PlanLimit),
            403 => Err(CloseError::Forbidden),
            404 => Err(CloseError::NotFound),
            429 => {
                let told = limit.filter(|limit| limit.remaining == 0).map(|limit| limit.reset);
                let retry_after = || header("retry-after").and_then(headers::seconds);
                let wait = told.or_else(retry_after).unwrap_or(rate_limit::DEFAULT_WAIT);
                // Whole seconds may be rounded down to none.
                permit.refused(wait.max(rate_limit::SHORTEST_WAIT), told.is_some());
                let in_a_row = &self.inner.refused_in_a_row[&endpoint];
                if in_a_row.fetch_add(1, Ordering::Relaxed) + 1 == MANY_REFUSALS {
                    tracing::warn!(endpoint = endpoint.label(), "Close answers call after call with 429");
                }
                Ok(None)
            }
            status @ 500..=599 => Err(CloseError::Transient(Fault::Status(status))),
            status => Err(CloseError::Rejected(Rejection::read(status, &answer.body))),
        }
    }
}

/// The span of a call in a trace, by OpenTelemetry's conventions for HTTP. The transport adds whom it calls. Without the
/// path: what was looked for may be in it.
fn span(endpoint: Endpoint, waited: Duration) -> Span {
    let (method, template) = (endpoint.method(), endpoint.template());
    tracing::info_span!(
        target: SPANS,
        "call",
        "otel.name" = format!("{method} {template}"),
        "otel.kind" = "client",
        "http.request.method" = method.as_str(),
        "url.template" = template,
        "server.address" = Empty,
        "server.port" = Empty,
        "http.response.status_code" = Empty,
        "close_sync.gate_wait_seconds" = waited.as_secs_f64(),
        "error.type" = Empty,
        "otel.status_description" = Empty,
    )
}

/// Tells how it ended.
fn conclude(span: &Span, result: &Result<Response, CloseError>) {
    match result {
        Ok(answer) => {
            span.record("http.response.status_code", i64::from(answer.status.as_u16()));
            if answer.status.is_client_error() || answer.status.is_server_error() {
                otel::fail(span, answer.status.as_str(), "");
            }
        }
        Err(error) => otel::fail(span, error.label(), ""),
    }
}

impl Records for Client {
    async fn find_leads(&self, field: &FieldId, company_id: &str) -> Result<Vec<Lead>, CloseError> {
        let lookup = Lookup::Lead { field: field.clone(), company_id: company_id.to_owned() };
        let (rows, _) = self.look_up(lookup).await?;
        Ok(rows.iter().filter_map(wire::read_lead).collect())
    }

    async fn find_contacts(
        &self,
        user: Option<(&FieldId, &str)>,
        email: Option<&str>,
    ) -> Result<Hits, CloseError> {
        let lookup = Lookup::Contact {
            user: user.map(|(field, id)| (field.clone(), id.to_owned())),
            email: email.map(str::to_owned),
        };
        let (rows, more) = self.look_up(lookup).await?;
        Ok(Hits { contacts: rows.iter().filter_map(wire::read_contact).collect(), more })
    }

    async fn lead(&self, id: &LeadId) -> Result<(Lead, Vec<Contact>), CloseError> {
        let answer = self.read(Endpoint::ReadLead, &format!("lead/{id}/")).await?;
        let lead = wire::read_lead(&answer).ok_or(CloseError::Transient(Fault::Garbled))?;
        let contacts = match wire::read_members(&answer) {
            Members::Whole(contacts) => contacts,
            Members::Ids(ids) => {
                let mut contacts = Vec::with_capacity(ids.len());
                for id in ids {
                    contacts.push(self.contact(&id).await?);
                }
                contacts
            }
        };
        Ok((lead, contacts))
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        let answer = self.read(Endpoint::ReadContact, &format!("contact/{id}/")).await?;
        wire::read_contact(&answer).ok_or(CloseError::Transient(Fault::Garbled))
    }
}
