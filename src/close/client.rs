//! The client: one short method per operation of Close's API.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use moka::sync::Cache;
use serde_json::Value;
use tokio::time::Instant;

use crate::close::answer::Answer;
use crate::close::api::{Api, Created, WritePermit};
use crate::close::clock::Clock;
use crate::close::deletion;
use crate::close::endpoint::{Call, Endpoint};
use crate::close::error::{CloseError, Fault};
use crate::close::event_log;
use crate::close::organization::{self, Listed, Organization};
use crate::close::rate_limit::Priority;
use crate::close::rate_limit::window::RateLimitStatus;
use crate::close::records::{Hits, LeadWithPerson, Lookup, Records, Written};
use crate::close::requests::Requests;
use crate::close::search::Search;
use crate::close::search_batch::Rows;
use crate::close::settings::Settings;
use crate::close::stall_guard::StallGuard;
use crate::close::transport::{Http, Transport};
use crate::close::wire;
use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::plan::Step;
use crate::domain::record::{Contact, ContactId, FieldId, Lead, LeadId};
use crate::domain::schema::{CustomField, Item, User};
use crate::domain::time;
use crate::waits::Waits;

/// More members than any organization has: a list of them that goes on is not Close's.
const MAX_USERS: usize = 100_000;

fn endpoint(step: &Step) -> Endpoint {
    match step {
        Step::CreateLead { .. } => Endpoint::CreateLead,
        Step::CreateContact { .. } => Endpoint::CreateContact,
        Step::UpdateLead { .. } => Endpoint::UpdateLead,
        Step::UpdateContact { .. } => Endpoint::UpdateContact,
    }
}

/// What was read because the event log does not show it.
#[derive(Default)]
struct HiddenRecords {
    leads: event_log::Hidden<Lead>,
    contacts: event_log::Hidden<Contact>,
}

/// A Lead with more Contacts is read without them: each message about a company would read all of its people.
const MANY_CONTACTS: usize = 100;
/// Leads that are remembered to be large.
const MAX_LARGE_LEADS: u64 = 10_000;

/// The Leads that are read without their Contacts.
#[derive(Clone)]
struct LargeLeads {
    threshold: usize,
    ids: Cache<LeadId, ()>,
}

/// A client of one Close organization. Clones share connections, rate limits and searches.
#[derive(Clone)]
pub struct Client {
    requests: Requests,
    search: Arc<Search>,
    hidden: Arc<HiddenRecords>,
    large_leads: LargeLeads,
    /// The last failure was that of a shared search, and another look-up reports it.
    duplicate_failure: Arc<AtomicBool>,
}

impl Client {
    /// A client that reaches Close over HTTPS. It passes every call to `observe`.
    ///
    /// # Errors
    /// When TLS cannot be set up on this machine.
    pub fn new(
        settings: Settings,
        observe: impl Fn(Call) + Send + Sync + 'static,
    ) -> Result<Self, reqwest::Error> {
        let Settings { timeout, share, .. } = settings;
        Ok(Self::with_transport(Http::new(settings)?, timeout, share, observe))
    }

    /// The same over another transport, which must end each call within `timeout`. `share` is [`Settings::share`].
    pub fn with_transport(
        transport: impl Transport + 'static,
        timeout: Duration,
        share: f64,
        observe: impl Fn(Call) + Send + Sync + 'static,
    ) -> Self {
        let requests = Requests::new(transport, timeout, share, observe);
        let large_leads = LargeLeads { threshold: MANY_CONTACTS, ids: Cache::new(MAX_LARGE_LEADS) };
        Self {
            requests,
            search: Arc::default(),
            hidden: Arc::default(),
            large_leads,
            duplicate_failure: Arc::default(),
        }
    }

    /// Reads Leads with more Contacts than this without them.
    #[must_use]
    pub fn with_many_contacts(mut self, many: usize) -> Self {
        self.large_leads.threshold = many;
        self
    }

    /// Tells the time in place of the system. Before the first call.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.requests = self.requests.with_clock(clock);
        self
    }

    /// The time at Close.
    pub fn clock(&self) -> &Clock {
        self.requests.clock()
    }

    /// The timeout of one call.
    pub fn timeout(&self) -> Duration {
        self.requests.timeout()
    }

    /// A client for one message, with its own count of calls, its own waits and this priority.
    #[must_use]
    pub fn for_message(&self, priority: Priority) -> Self {
        let requests = self.requests.for_work(priority, Waits::default());
        Self { requests, duplicate_failure: Arc::default(), ..self.clone() }
    }

    /// A client that shares no search with this one.
    #[must_use]
    pub(crate) fn with_own_searches(&self) -> Self {
        Self { search: Arc::new(self.search.apart()), ..self.clone() }
    }

    /// The rate limits that Close reported.
    pub fn rate_limits(&self) -> impl Iterator<Item = (Endpoint, RateLimitStatus)> {
        let limiters = self.requests.limiters().iter();
        limiters.filter_map(|(endpoint, limiter)| Some((*endpoint, limiter.status()?)))
    }

    /// Blocks writes after the process was suspended.
    pub fn stall_guard(&self) -> &StallGuard {
        self.requests.stall_guard()
    }

    /// Sets whether there is a backlog: then few calls matter more than low latency.
    pub fn set_backlog(&self, backlog: bool) {
        self.search.set_backlog(backlog);
    }

    /// The organization of the API key. Also checks the key.
    pub async fn me(&self) -> Result<Organization, CloseError> {
        let me: organization::Me = self.requests.request(Endpoint::Me, "me/", None).await?;
        Ok(me.into())
    }

    /// All custom fields of Leads, shared ones included.
    pub async fn lead_fields(&self) -> Result<Listed<CustomField>, CloseError> {
        self.schema("custom_field_schema/lead/", Item::LeadField).await
    }

    /// All custom fields of Contacts, shared ones included.
    pub async fn contact_fields(&self) -> Result<Listed<CustomField>, CloseError> {
        self.schema("custom_field_schema/contact/", Item::ContactField).await
    }

    async fn schema(&self, path: &str, of: Item) -> Result<Listed<CustomField>, CloseError> {
        let schema: organization::Schema = self.requests.request(Endpoint::Schema, path, None).await?;
        Ok(schema.custom_fields(of))
    }

    /// The members of the organization.
    pub async fn users(&self) -> Result<Listed<User>, CloseError> {
        let (mut users, mut skip) = (Listed::default(), 0);
        loop {
            let path = format!("user/?_limit={}&_skip={skip}", wire::PAGE);
            let page: organization::Users = self.requests.request(Endpoint::Users, &path, None).await?;
            users.append(page.users());
            skip += page.data.len();
            if skip > MAX_USERS {
                return Err(CloseError::Transient(Fault::InvalidResponse));
            }
            if page.has_more != Some(true) || page.data.is_empty() {
                return Ok(users);
            }
        }
    }

    /// Adds a look-up to the next search that other look-ups need. Returns the ids that it has certainly found by this key, or,
    /// `by_any`, all. `None` when it failed.
    pub(crate) async fn ride_along(&self, lookup: Lookup, by_any: bool) -> Option<Vec<String>> {
        Some(ids(&self.search.ride_along(lookup).await?.ok()?, by_any))
    }

    /// The same in a search of its own, together with those of others.
    pub(crate) async fn look_up(&self, lookup: Lookup, by_any: bool) -> Option<Vec<String>> {
        self.search(lookup).await.ok().map(|rows| ids(&rows, by_any))
    }

    async fn search(&self, lookup: Lookup) -> Result<Rows, CloseError> {
        let rows = self.search.look_up(&self.requests, lookup).await.map_err(|failed| {
            self.duplicate_failure.store(failed.duplicate, Ordering::Relaxed);
            self.requests.add_calls(failed.calls);
            failed.error
        })?;
        self.requests.add_calls(rows.calls);
        Ok(rows)
    }
}

fn ids(rows: &Rows, by_any: bool) -> Vec<String> {
    let ids = rows.found.iter().filter_map(|row| Some(row.get("id")?.as_str()?.to_owned()));
    ids.filter(|id| by_any || !rows.by_both.contains(id)).collect()
}

impl Records for Client {
    async fn find_leads(&self, field: &FieldId, company_id: &str) -> Result<Vec<Lead>, CloseError> {
        let lookup = Lookup::Lead { field: field.clone(), company_id: company_id.to_owned() };
        let rows = self.search(lookup).await?.found;
        wire::read_all(rows.iter().map(Arc::as_ref), wire::read_lead)
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
        let Rows { found, more, by_both, exact, .. } = self.search(lookup).await?;
        let by_both = by_both.iter().filter_map(|id| ContactId::parse(id)).collect();
        let contacts = wire::read_all(found.iter().map(Arc::as_ref), wire::read_contact)?;
        Ok(Hits { contacts, more, by_both, exact })
    }

    async fn lead(
        &self,
        id: &LeadId,
        person: &Identity,
        keys: &KeyFields,
    ) -> Result<LeadWithPerson, CloseError> {
        let requests = &self.requests;
        let listed = |answer: &Value| {
            let lead = wire::read_lead_with_contacts(answer)?;
            if lead.members() > self.large_leads.threshold {
                self.large_leads.ids.insert(id.clone(), ());
            }
            Ok(lead.of_person(person, keys))
        };
        if !self.large_leads.ids.contains_key(id) {
            match deletion::read_record(requests, Endpoint::ReadLead, id.as_str(), None, listed).await {
                Err(CloseError::Transient(Fault::TooLarge)) => self.large_leads.ids.insert(id.clone(), ()),
                answer => return answer,
            }
        }
        let fields = wire::lead_fields(keys);
        let unlisted = |answer: &Value| Ok(LeadWithPerson::unlisted(wire::read_lead(answer)?));
        deletion::read_record(requests, Endpoint::ReadLead, id.as_str(), Some(&fields), unlisted).await
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        let requests = &self.requests;
        deletion::read_record(requests, Endpoint::ReadContact, id.as_str(), None, wire::read_contact).await
    }

    fn last_sent(&self) -> Option<Instant> {
        self.requests.last_sent()
    }
}

impl Api for Client {
    type Permit = WritePermit;

    async fn acquire(&self, step: &Step) -> WritePermit {
        WritePermit::new(self.requests.acquire(endpoint(step)).await)
    }

    async fn write(&self, step: &Step, permit: WritePermit) -> Result<Option<Written>, CloseError> {
        // PUT is a patch: fields and lists that are not sent stay (close-api.md §1). No write is ever repeated here.
        let endpoint = endpoint(step);
        let body = match step {
            Step::CreateLead { lead, contact } => wire::lead_body(lead, contact.as_ref()),
            Step::CreateContact { lead, contact } => wire::contact_body(contact, Some(lead)),
            Step::UpdateLead { changes, .. } => wire::lead_body(changes, None),
            Step::UpdateContact { changes, .. } => wire::contact_body(changes, None),
        };
        let path = match step.changes() {
            Some(id) => wire::record_path(endpoint, id),
            None => wire::list_path(endpoint).to_owned(),
        };
        let Some(acquired) = permit.take() else { return Ok(None) };
        let sent = Instant::now();
        let answer = match self.requests.send_once(acquired, endpoint, &path, &body).await {
            // The answer has all Contacts of the Lead. The status says that Close applied the changes.
            Err(CloseError::Transient(Fault::TooLarge)) if endpoint == Endpoint::UpdateLead => {
                return Ok(Some(Written::Unread));
            }
            Err(CloseError::NotFound) => {
                // Nothing of a new Lead can be missing.
                let Some(id) = step.needs() else { return Err(CloseError::Transient(Fault::UnknownUrl)) };
                let is_contact = matches!(step, Step::UpdateContact { .. });
                let reads = if is_contact { Endpoint::ReadContact } else { Endpoint::ReadLead };
                return Err(deletion::missing(&self.requests, reads, id).await);
            }
            answer => answer?,
        };
        let Some(Answer(answer)) = answer else { return Ok(None) };
        let (written, created) = match step {
            Step::CreateLead { .. } | Step::UpdateLead { .. } => {
                let lead = wire::read_lead_with_contacts(&answer)?;
                let created = time::read_back(&lead.lead.date_created);
                (Written::Lead(lead), created)
            }
            Step::CreateContact { .. } | Step::UpdateContact { .. } => {
                let contact = wire::read_contact(&answer)?;
                let created = time::read_back(&contact.date_created);
                (Written::Contact(contact), created)
            }
        };
        if let Some(created) = created.filter(|_| step.creates()) {
            self.clock().synchronize(created, sent.elapsed());
        }
        Ok(Some(written))
    }

    async fn created_between(&self, since: Timestamp, until: Timestamp) -> Result<Created, CloseError> {
        let (requests, span) = (&self.requests, (since, until));
        let HiddenRecords { leads, contacts } = &*self.hidden;
        let leads = event_log::created(requests, leads, Endpoint::ReadLead, span, wire::read_lead).await?;
        let contacts =
            event_log::created(requests, contacts, Endpoint::ReadContact, span, wire::read_contact).await?;
        Ok(Created {
            complete: leads.complete && contacts.complete,
            leads: leads.records,
            contacts: contacts.records,
        })
    }

    fn calls(&self) -> u32 {
        self.requests.calls()
    }

    fn waits(&self) -> &Waits {
        self.requests.waits()
    }

    fn take_duplicate_failure(&self) -> bool {
        self.duplicate_failure.swap(false, Ordering::Relaxed)
    }
}
