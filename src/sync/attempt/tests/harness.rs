//! Close in memory, with faults, and the parts of an attempt.

use super::*;
use crate::close::Clock;
use crate::sync::write_log::Stamp;
use crate::waits::Waits;

pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const SEARCH_LAG: Duration = Duration::from_mins(1);
pub(super) const EVENT_LOG_LAG: Duration = Duration::from_mins(6);
pub(super) const LATENCY: Duration = Duration::from_millis(10);

/// Attempts send every call through [`FakeClose`].
pub(super) struct NoTransport;

impl Transport for NoTransport {
    fn send<'a>(
        &'a self,
        method: reqwest::Method,
        path: &'a str,
        _: Option<&'a Value>,
        _: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        panic!("unexpected call: {method} {path}")
    }
}

/// A clock in virtual time.
pub(super) fn clock() -> Clock {
    let (began, start) = (Timestamp::now(), Instant::now());
    Clock::new(move || began + start.elapsed())
}

pub(super) fn context(rules: &Rules) -> Context {
    let policy = Policy {
        in_place: Duration::from_secs(30),
        jitter: 0.0,
        delays: vec![TIMEOUT],
        max_age: Duration::from_hours(1),
    };
    Context::new(Dependencies {
        settings: Settings {
            switches: Switches::default(),
            retry: policy,
            max_message_bytes: 1 << 20,
            search_lag: SEARCH_LAG,
            event_log_lag: EVENT_LOG_LAG,
            country: None,
            hold: Duration::from_hours(1),
            recheck: Duration::from_hours(24),
            merge: true,
        },
        rules,
        mapping: Mapping::resolve(rules, &schema()).unwrap(),
        client: Client::with_transport(NoTransport, TIMEOUT, 1.0, |_| {}).with_clock(clock()),
        metrics: Metrics::new(None).unwrap(),
    })
}

/// What happens to a write.
pub(super) enum WriteFault {
    /// Close rejects it.
    Before(CloseError),
    /// Close executes it, and the answer is lost.
    After(CloseError),
    /// Close executes it, and answers after this time.
    Slow(Duration),
    /// Close answers with success, and keeps neither the title nor the phones of a Contact.
    Lossy,
    /// Close answers with a new Lead without its Contact.
    WithoutContact,
    /// Close rejects the phones of a Contact.
    BadPhones,
    /// 429.
    Busy,
}

/// Close for one message. Clones share everything.
#[derive(Clone, Default)]
pub(super) struct FakeClose(Arc<Mutex<State>>, Waits);

#[derive(Default)]
pub(super) struct State {
    pub(super) records: InMemoryRecords,
    /// Search shows these records until then.
    pub(super) search_shows: Option<(InMemoryRecords, Instant)>,
    /// How long a write waits for rate budget.
    pub(super) budget_wait: Duration,
    /// How long the answer to a read by id is under way.
    pub(super) answer_delay: Duration,
    /// For the next reads of a Lead.
    pub(super) read_faults: VecDeque<CloseError>,
    /// Reads by id show the records as they were that long ago.
    pub(super) read_lag: Duration,
    /// Close does not say which field it refuses.
    pub(super) names_no_field: bool,
    /// The records before each change, and when it happened.
    pub(super) past: Vec<(Instant, InMemoryRecords)>,
    pub(super) event_log: Created,
    pub(super) event_log_calls: usize,
    /// For the next questions to the event log.
    pub(super) event_log_faults: VecDeque<CloseError>,
    /// What a person does in Close, when, and to which Contact.
    pub(super) edits: VecDeque<(Instant, usize, person::Edit)>,
    pub(super) applied: Vec<Applied>,
    /// For the next writes.
    pub(super) faults: VecDeque<WriteFault>,
    pub(super) writes: Vec<Step>,
    /// The locked records during each write.
    pub(super) locked: Vec<Vec<String>>,
    pub(super) record_locks: Option<RecordLocks>,
}

/// A write that took effect.
pub(super) struct Applied {
    pub(super) at: Instant,
    pub(super) step: Step,
    /// The place of the records before it in the past.
    pub(super) state: usize,
}

impl State {
    /// Close refuses a write to a record that is gone.
    pub(super) fn refusal(&self, step: &Step) -> Option<CloseError> {
        let InMemoryRecords { leads, contacts, .. } = &self.records;
        match step {
            Step::CreateLead { .. } => None,
            Step::CreateContact { lead, .. } => {
                let named: &[&[&str]] = if self.names_no_field { &[] } else { &[&["lead"]] };
                (!leads.contains_key(lead)).then(|| rejection(named))
            }
            Step::UpdateLead { id, .. } => (!leads.contains_key(id)).then_some(CloseError::NotFound),
            Step::UpdateContact { id, .. } => (!contacts.contains_key(id)).then_some(CloseError::NotFound),
        }
    }

    pub(super) fn apply(&mut self, step: &Step) -> Written {
        self.past.push((Instant::now(), self.records.clone()));
        let state = self.past.len() - 1;
        self.applied.push(Applied { at: Instant::now(), step: step.clone(), state });
        let now = Some(at(1000 * i64::try_from(self.past.len()).unwrap()));
        let mut written = self.records.apply(step);
        match &mut written {
            Written::Lead(LeadWithContacts { lead, contacts, .. }) => {
                lead.date_updated = now;
                self.records.leads.insert(lead.id.clone(), lead.clone());
                for contact in contacts.iter_mut().filter(|_| step.creates()) {
                    contact.date_updated = now;
                    self.records.contacts.insert(contact.id.clone(), contact.clone());
                }
            }
            Written::Contact(contact) => {
                contact.date_updated = now;
                self.records.contacts.insert(contact.id.clone(), contact.clone());
            }
            Written::Unread => {}
        }
        written
    }
}

impl FakeClose {
    pub(super) fn new(context: &Context, leads: &[Value], contacts: &[Value]) -> Self {
        let state = State {
            records: InMemoryRecords::read(leads, contacts),
            record_locks: Some(context.record_locks.clone()),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)), Waits::default())
    }

    pub(super) fn with_fault(self, fault: WriteFault) -> Self {
        self.state(|state| state.faults.push_back(fault));
        self
    }

    /// Search shows nothing that is written before this time has passed.
    pub(super) fn with_search_lag(self, lag: Duration) -> Self {
        self.state(|state| state.search_shows = Some((state.records.clone(), Instant::now() + lag)));
        self
    }

    pub(super) fn with_read_lag(self, lag: Duration) -> Self {
        self.state(|state| state.read_lag = lag);
        self
    }

    /// The records as reads by id show them.
    pub(super) fn readable(&self) -> InMemoryRecords {
        self.state(|state| {
            let then = |(written, _): &&(Instant, InMemoryRecords)| written.elapsed() < state.read_lag;
            state.past.iter().find(then).map_or(&state.records, |(_, before)| before).clone()
        })
    }

    /// The error for a record that a read by id does not show, although it exists.
    fn missing(error: CloseError, exists: bool) -> CloseError {
        let is_unproven = error == CloseError::NotFound && exists;
        if is_unproven { CloseError::Transient(Fault::Vanished) } else { error }
    }

    /// Creates the first record and loses the answer. Search lags for an hour.
    pub(super) fn losing_an_answer(context: &Context) -> Self {
        let close = Self::new(context, &[], &[]).with_search_lag(Duration::from_hours(1));
        close.with_fault(WriteFault::After(timed_out()))
    }

    pub(super) fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap();
        state.let_the_person_work();
        with(&mut state)
    }

    pub(super) fn records(&self) -> InMemoryRecords {
        self.state(|state| state.records.clone())
    }

    pub(super) fn searchable(&self) -> InMemoryRecords {
        self.state(|state| match &state.search_shows {
            Some((records, until)) if Instant::now() < *until => records.clone(),
            Some(_) | None => state.records.clone(),
        })
    }

    pub(super) fn written(&self) -> Vec<&'static str> {
        self.state(|state| state.writes.iter().map(Step::label).collect())
    }

    pub(super) fn lead(&self, id: &str) -> Lead {
        self.records().leads[&LeadId::new(id)].clone()
    }

    pub(super) fn contact(&self, id: &str) -> Contact {
        self.records().contacts[&ContactId::new(id)].clone()
    }
}

fn has_phones(step: &Step) -> bool {
    matches!(step, Step::UpdateContact { changes, .. } if changes.lists.contains_key(&Channel::Phone))
}

impl Records for FakeClose {
    async fn find_leads(&self, field: &FieldId, company_id: &str) -> Result<Vec<Lead>, CloseError> {
        tokio::time::sleep(LATENCY).await;
        self.searchable().find_leads(field, company_id).await
    }

    async fn find_contacts(
        &self,
        user: Option<(&FieldId, &str)>,
        email: Option<&str>,
    ) -> Result<Hits, CloseError> {
        tokio::time::sleep(LATENCY).await;
        self.searchable().find_contacts(user, email).await
    }

    async fn lead(
        &self,
        id: &LeadId,
        person: &Identity,
        keys: &KeyFields,
    ) -> Result<LeadWithPerson, CloseError> {
        tokio::time::sleep(LATENCY).await;
        if let Some(error) = self.state(|state| state.read_faults.pop_front()) {
            return Err(error);
        }
        let answer = self.readable().lead(id, person, keys).await;
        let answer = answer.map_err(|error| Self::missing(error, self.records().leads.contains_key(id)));
        tokio::time::sleep(self.state(|state| state.answer_delay)).await;
        answer
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        tokio::time::sleep(LATENCY).await;
        let answer = self.readable().contact(id).await;
        let answer = answer.map_err(|error| Self::missing(error, self.records().contacts.contains_key(id)));
        tokio::time::sleep(self.state(|state| state.answer_delay)).await;
        answer
    }
}

impl Api for FakeClose {
    type Permit = ();

    async fn acquire(&self, _: &Step) {
        let wait = self.state(|state| state.budget_wait);
        self.waits().during(WaitCause::RateLimited, tokio::time::sleep(wait)).await;
    }

    async fn write(&self, step: &Step, (): ()) -> Result<Option<Written>, CloseError> {
        let fault = self.state(|state| {
            let locked = state.record_locks.as_ref().map(RecordLocks::locked).unwrap_or_default();
            state.locked.push(locked);
            state.writes.push(step.clone());
            state.faults.pop_front()
        });
        let latency = if let Some(WriteFault::Slow(latency)) = fault { latency } else { LATENCY };
        self.waits().during(WaitCause::SlowClose, tokio::time::sleep(latency)).await;
        if let Some(error) = self.state(|state| state.refusal(step)) {
            return Err(error);
        }
        match fault {
            Some(WriteFault::Before(error)) => Err(error),
            Some(WriteFault::BadPhones) if has_phones(step) => Err(rejection(&[&["phones"]])),
            Some(WriteFault::After(error)) => {
                self.state(|state| state.apply(step));
                Err(error)
            }
            Some(WriteFault::Lossy) => {
                let mut kept = step.clone();
                if let Step::UpdateContact { changes, .. } = &mut kept {
                    changes.fields.remove(&Field::Title);
                    changes.lists.insert(Channel::Phone, Vec::new());
                }
                Ok(Some(self.state(|state| state.apply(&kept))))
            }
            Some(WriteFault::WithoutContact) => {
                let mut written = self.state(|state| state.apply(step));
                if let Written::Lead(lead) = &mut written {
                    lead.contacts.clear();
                }
                Ok(Some(written))
            }
            Some(WriteFault::Busy) => Ok(None),
            Some(WriteFault::BadPhones | WriteFault::Slow(_)) | None => {
                Ok(Some(self.state(|state| state.apply(step))))
            }
        }
    }

    async fn created_between(&self, _: Timestamp, _: Timestamp) -> Result<Created, CloseError> {
        tokio::time::sleep(LATENCY).await;
        self.state(|state| {
            state.event_log_calls += 1;
            state.event_log_faults.pop_front().map_or_else(|| Ok(state.event_log.clone()), Err)
        })
    }

    fn calls(&self) -> u32 {
        0
    }

    fn waits(&self) -> &Waits {
        &self.1
    }

    fn take_duplicate_failure(&self) -> bool {
        false
    }
}

pub(super) fn attempts<'a>(
    context: &'a Context,
    close: &FakeClose,
    desired: &'a Desired,
) -> Attempts<'a, FakeClose> {
    let keys = desired.identity.keys();
    Attempts {
        context,
        client: FakeClose(Arc::clone(&close.0), Waits::default()),
        desired,
        others: Vec::new(),
        known: context.id_cache.known(&KeyHash::of_all(&keys)),
        keys,
        gap_wait: GapWait::default(),
        run: RunContext::first(),
        stage: Stage::LookUp,
        decision: Decision::default(),
        looked_at: Stamp::default(),
        own_writes: Vec::new(),
    }
}

/// The creations without an answer that share a key with an event.
pub(super) fn pending(context: &Context, desired: &Desired) -> Vec<String> {
    let keys = KeyHash::of_all(&desired.identity.keys());
    context.lag_guard.pending_with(&keys).into_iter().map(|(operation, _)| operation.to_string()).collect()
}

/// Maps an event that happened at this second.
pub(super) fn desired(context: &Context, second: i64, event: Value) -> Desired {
    let mut desired = context.mapping().apply(&Event { body: event }).unwrap();
    desired.at = Some(at(second));
    desired
}

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000_000 + second).unwrap()
}

/// An event about Jane of Acme.
pub(super) fn jane(context: &Context, second: i64) -> Desired {
    desired(
        context,
        second,
        json!({"userId": "u1", "traits": {"name": "Jane Doe", "email": "jane@acme.test",
            "phone": "+18004445555", "plan": "pro", "company": {"id": "acme", "name": "Acme"}}}),
    )
}

pub(super) fn acme() -> Value {
    json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old", "custom.cf_company": "acme"})
}

pub(super) fn janes_contact() -> Value {
    json!({"id": "cont_1", "lead_id": "lead_1", "date_created": "2026-01-01", "name": "Jane",
        "custom.cf_user": "u1", "emails": [{"type": "office", "email": "jane@acme.test"}]})
}

pub(super) fn rejection(fields: &[&[&str]]) -> CloseError {
    let field = |path: &&[&str]| FieldError {
        path: path.iter().map(|part| (*part).to_owned()).collect(),
        message: "not valid",
    };
    let fields = fields.iter().map(field).collect();
    CloseError::Rejected(Rejection { status: 400, fields, message: None, response: None })
}

pub(super) fn timed_out() -> CloseError {
    CloseError::Transient(Fault::Timeout)
}

/// What the version cache holds for a Lead.
pub(super) fn lead_versions(context: &Context, lead: Lead) -> FieldVersions {
    let id = lead.id.as_str().to_owned();
    let found = Found::InLead { lead, contacts: Vec::new(), adopted: false, elsewhere: false };
    context.version_cache.versions_of(&found, &context.mapping().synced_at)[&id].clone()
}

/// What the version cache holds for a Contact.
pub(super) fn contact_versions(context: &Context, contact: Contact) -> FieldVersions {
    let id = contact.id.as_str().to_owned();
    let found = Found::Anywhere { people: vec![(contact, None)] };
    context.version_cache.versions_of(&found, &context.mapping().synced_at)[&id].clone()
}

/// The value of a counter.
pub(super) fn counter(context: &Context, name: &str) -> u64 {
    let text = metrics::render([&context.metrics], &metrics::PageMetrics::default());
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("close_sync_{name} ")));
    line.expect("a counter").parse().unwrap()
}
