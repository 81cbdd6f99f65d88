//! Attempts at one message on records in memory, in virtual time: no network, no broker.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::close::in_memory::InMemoryRecords;
use crate::close::{
    Client, Fault, FieldError, Hits, LeadWithContacts, LeadWithPerson, Priority, Records, Rejection,
    Response, Transport, Written,
};
use crate::domain::dropped::DropReason;
use crate::domain::event::Event;
use crate::domain::mapping::tests::{rules, schema};
use crate::domain::mapping::{Identity, KeyFields, Mapping, Rules};
use crate::domain::matching::Case;
use crate::domain::plan::Step;
use crate::domain::record::{Channel, ContactId, Field, FieldId, Lead, LeadId};
use crate::domain::schema::FieldRef;
use crate::domain::staleness::FieldVersions;
use crate::domain::switches::Switches;
use crate::outcome::DeadLetter;
use crate::retry::Policy;
use crate::sync::context::Dependencies;
use crate::sync::id_cache::Contacts;
use crate::sync::job::Settings;
use crate::sync::record_locks::RecordLocks;
use crate::telemetry::metrics::{self, Metrics};

mod not_kept;
mod people_win;
mod unnamed;

const TIMEOUT: Duration = Duration::from_secs(30);
const SEARCH_LAG: Duration = Duration::from_mins(1);
const LATENCY: Duration = Duration::from_millis(10);

/// Attempts send every call through [`FakeClose`].
struct NoTransport;

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

fn context(rules: &Rules) -> Context {
    let policy = Policy { in_place: Duration::from_secs(30), jitter: 0.0, delays: vec![TIMEOUT] };
    Context::new(Dependencies {
        settings: Settings {
            switches: Switches::default(),
            retry: policy,
            max_message_bytes: 1 << 20,
            search_lag: SEARCH_LAG,
            hold: Duration::from_hours(1),
            merge: true,
        },
        rules,
        mapping: Mapping::resolve(rules, &schema()).unwrap(),
        client: Client::with_transport(NoTransport, TIMEOUT, 1.0, |_| {}),
        metrics: Metrics::new(None).unwrap(),
    })
}

/// What happens to a write.
enum WriteFault {
    /// Close rejects it.
    Before(CloseError),
    /// Close executes it, and the answer is lost.
    After(CloseError),
    /// Close executes it, and answers after this time.
    Slow(Duration),
    /// Close answers with success, and keeps neither the title nor the phones of a Contact.
    Lossy,
    /// 429.
    Busy,
}

/// Close for one message. Clones share everything.
#[derive(Clone, Default)]
struct FakeClose(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    records: InMemoryRecords,
    /// Search shows these records until then.
    search_shows: Option<(InMemoryRecords, Instant)>,
    /// How long a write waits for rate budget.
    budget_wait: Duration,
    /// How long the answer to a read by id is under way.
    answer_delay: Duration,
    /// Reads by id show the records as they were that long ago.
    read_lag: Duration,
    /// The records before each write, and when it happened.
    past: Vec<(Instant, InMemoryRecords)>,
    event_log: (Vec<Lead>, Vec<Contact>),
    /// What a person does in Close, and when.
    edits: VecDeque<(Instant, people_win::Edit)>,
    /// What the person has done.
    edited: Vec<people_win::Edited>,
    /// When each write took effect.
    applied: Vec<(Instant, Step)>,
    /// For the next writes.
    faults: VecDeque<WriteFault>,
    writes: Vec<Step>,
    /// The locked records during each write.
    locked: Vec<Vec<String>>,
    record_locks: Option<RecordLocks>,
}

impl State {
    /// Close refuses a write to a record that is gone.
    fn refusal(&self, step: &Step) -> Option<CloseError> {
        let InMemoryRecords { leads, contacts, .. } = &self.records;
        match step {
            Step::CreateLead { .. } => None,
            Step::CreateContact { lead, .. } => (!leads.contains_key(lead)).then(|| rejection(&[&["lead"]])),
            Step::UpdateLead { id, .. } => (!leads.contains_key(id)).then_some(CloseError::NotFound),
            Step::UpdateContact { id, .. } => (!contacts.contains_key(id)).then_some(CloseError::NotFound),
        }
    }

    fn apply(&mut self, step: &Step) -> Written {
        self.past.push((Instant::now(), self.records.clone()));
        self.applied.push((Instant::now(), step.clone()));
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
    fn new(context: &Context, leads: &[Value], contacts: &[Value]) -> Self {
        let state = State {
            records: InMemoryRecords::read(leads, contacts),
            record_locks: Some(context.record_locks.clone()),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn with_fault(self, fault: WriteFault) -> Self {
        self.state(|state| state.faults.push_back(fault));
        self
    }

    /// Search shows nothing that is written before this time has passed.
    fn with_search_lag(self, lag: Duration) -> Self {
        self.state(|state| state.search_shows = Some((state.records.clone(), Instant::now() + lag)));
        self
    }

    fn with_read_lag(self, lag: Duration) -> Self {
        self.state(|state| state.read_lag = lag);
        self
    }

    /// The records as reads by id show them.
    fn readable(&self) -> InMemoryRecords {
        self.state(|state| {
            let then = |(written, _): &&(Instant, InMemoryRecords)| written.elapsed() < state.read_lag;
            state.past.iter().find(then).map_or(&state.records, |(_, before)| before).clone()
        })
    }

    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap();
        state.let_the_person_work();
        with(&mut state)
    }

    fn records(&self) -> InMemoryRecords {
        self.state(|state| state.records.clone())
    }

    fn searchable(&self) -> InMemoryRecords {
        self.state(|state| match &state.search_shows {
            Some((records, until)) if Instant::now() < *until => records.clone(),
            Some(_) | None => state.records.clone(),
        })
    }

    fn written(&self) -> Vec<&'static str> {
        self.state(|state| state.writes.iter().map(Step::label).collect())
    }

    fn lead(&self, id: &str) -> Lead {
        self.records().leads[&LeadId::new(id)].clone()
    }

    fn contact(&self, id: &str) -> Contact {
        self.records().contacts[&ContactId::new(id)].clone()
    }
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
        let answer = self.readable().lead(id, person, keys).await;
        tokio::time::sleep(self.state(|state| state.answer_delay)).await;
        answer
    }

    async fn contact(&self, id: &ContactId) -> Result<Contact, CloseError> {
        tokio::time::sleep(LATENCY).await;
        let answer = self.readable().contact(id).await;
        tokio::time::sleep(self.state(|state| state.answer_delay)).await;
        answer
    }
}

impl Api for FakeClose {
    type Permit = ();

    async fn acquire(&self, _: &Step) {
        let wait = self.state(|state| state.budget_wait);
        tokio::time::sleep(wait).await;
    }

    async fn write(&self, step: &Step, (): ()) -> Result<Option<Written>, CloseError> {
        let fault = self.state(|state| {
            let locked = state.record_locks.as_ref().map(RecordLocks::locked).unwrap_or_default();
            state.locked.push(locked);
            state.writes.push(step.clone());
            state.faults.pop_front()
        });
        let latency = if let Some(WriteFault::Slow(latency)) = fault { latency } else { LATENCY };
        tokio::time::sleep(latency).await;
        if let Some(error) = self.state(|state| state.refusal(step)) {
            return Err(error);
        }
        match fault {
            Some(WriteFault::Before(error)) => Err(error),
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
            Some(WriteFault::Busy) => Ok(None),
            Some(WriteFault::Slow(_)) | None => Ok(Some(self.state(|state| state.apply(step)))),
        }
    }

    async fn created_since(&self, _: Timestamp) -> Result<(Vec<Lead>, Vec<Contact>), CloseError> {
        tokio::time::sleep(LATENCY).await;
        Ok(self.state(|state| state.event_log.clone()))
    }

    fn calls(&self) -> u32 {
        0
    }

    fn take_duplicate_failure(&self) -> bool {
        false
    }
}

fn attempts<'a>(context: &'a Context, close: &FakeClose, desired: &'a Desired) -> Attempts<'a, FakeClose> {
    Attempts {
        context,
        client: close.clone(),
        desired,
        others: Vec::new(),
        keys: desired.identity.keys(),
        run: RunContext { attempts: 0, priority: Priority::Live, search_complete_from: Instant::now() },
        mode: Mode::Write,
        decision: Decision::default(),
    }
}

/// Maps an event that happened at this second.
fn desired(context: &Context, second: i64, event: Value) -> Desired {
    let mut desired = context.mapping().apply(&Event { body: event }).unwrap();
    desired.at = Some(at(second));
    desired
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000_000 + second).unwrap()
}

/// An event about Jane of Acme.
fn jane(context: &Context, second: i64) -> Desired {
    desired(
        context,
        second,
        json!({"userId": "u1", "traits": {"name": "Jane Doe", "email": "jane@acme.test",
            "phone": "+18004445555", "plan": "pro", "company": {"id": "acme", "name": "Acme"}}}),
    )
}

fn acme() -> Value {
    json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old", "custom.cf_company": "acme"})
}

fn janes_contact() -> Value {
    json!({"id": "cont_1", "lead_id": "lead_1", "date_created": "2026-01-01", "name": "Jane",
        "custom.cf_user": "u1", "emails": [{"type": "office", "email": "jane@acme.test"}]})
}

fn rejection(fields: &[&[&str]]) -> CloseError {
    let field = |path: &&[&str]| FieldError {
        path: path.iter().map(|part| (*part).to_owned()).collect(),
        message: "not valid",
    };
    let fields = fields.iter().map(field).collect();
    CloseError::Rejected(Rejection { status: 400, fields, message: None, response: None })
}

fn timed_out() -> CloseError {
    CloseError::Transient(Fault::Timeout)
}

/// What the version cache holds for a Lead.
fn lead_versions(context: &Context, lead: Lead) -> FieldVersions {
    let id = lead.id.as_str().to_owned();
    let found = Found::InLead { lead, contacts: Vec::new(), adopted: false, elsewhere: false };
    context.version_cache.versions_of(&found, &context.mapping().synced_at)[&id].clone()
}

/// What the version cache holds for a Contact.
fn contact_versions(context: &Context, contact: Contact) -> FieldVersions {
    let id = contact.id.as_str().to_owned();
    let found = Found::Anywhere { people: vec![(contact, None)] };
    context.version_cache.versions_of(&found, &context.mapping().synced_at)[&id].clone()
}

/// The value of a counter.
fn counter(context: &Context, name: &str) -> u64 {
    let text = metrics::render([&context.metrics], &metrics::PageMetrics::default());
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("close_sync_{name} ")));
    line.expect("a counter").parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_created_lead_and_contact_are_cached_with_their_versions() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]);
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let completed = attempts.run_once().await.ok().unwrap();

    assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["create_lead"]);
    let (lead, contact) = (LeadId::new("lead_new1"), ContactId::new("cont_new2"));
    assert_eq!(attempts.decision.new_lead.as_ref(), Some(&lead));
    assert_eq!(attempts.decision.new_contact.as_ref(), Some(&contact));
    assert_eq!(context.id_cache.lead("acme"), Some(lead));
    for key in desired.identity.person() {
        let cached = Contacts { ids: vec![contact.clone()], complete: true };
        assert_eq!(context.id_cache.contacts(&key), cached, "no other Contact has {key:?}");
    }
    assert_eq!(context.id_cache.pending_until(&desired.identity.keys()), None);
    assert_eq!(lead_versions(&context, close.lead("lead_new1")).fields["custom.cf_plan"], at(5));
    assert_eq!(contact_versions(&context, close.contact("cont_new2")).fields["name"], at(5));
}

#[tokio::test(start_paused = true)]
async fn an_older_event_changes_no_field_that_a_newer_one_set() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    let older = desired(
        &context,
        4,
        json!({"userId": "u1", "traits": {"name": "J. Doe", "title": "CEO", "plan": "free",
            "company": {"id": "acme", "name": "Acme Inc"}}}),
    );
    attempts(&context, &close, &older).run_once().await.ok().unwrap();
    let (lead, contact) = (close.lead("lead_1"), close.contact("cont_1"));
    assert_eq!(lead.fields[&Field::Name], json!("Acme"));
    assert_eq!(lead.custom(&FieldId::new("cf_plan")), Some("pro"));
    assert_eq!(contact.fields[&Field::Name], json!("Jane Doe"));
    assert_eq!(contact.fields[&Field::Title], json!("CEO"), "the newer event did not set it");
}

#[tokio::test(start_paused = true)]
async fn all_records_of_the_plan_are_locked_during_each_write() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_lead", "update_contact"]);
    let both = vec!["cont_1".to_owned(), "lead_1".to_owned()];
    assert_eq!(close.state(|state| state.locked.clone()), [both.clone(), both]);
    assert_eq!(context.record_locks.locked(), [""; 0], "the locks are released");
}

#[tokio::test(start_paused = true)]
async fn messages_that_find_one_contact_by_different_keys_do_not_undo_each_other() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let by_user = desired(&context, 1, json!({"userId": "u1", "traits": {"phone": "+18004445555"}}));
    let by_email =
        desired(&context, 2, json!({"traits": {"email": "jane@acme.test", "phone": "+493012345678"}}));
    let (mut first, mut second) =
        (attempts(&context, &close, &by_user), attempts(&context, &close, &by_email));
    let (first, second) = tokio::join!(first.run_once(), second.run_once());
    assert!(first.is_ok() && second.is_ok());
    let contact = close.contact("cont_1");
    let phones: Vec<&str> = contact.list(Channel::Phone).iter().map(|entry| entry.value.as_str()).collect();
    assert_eq!(phones, ["+18004445555", "+493012345678"]);
}

#[tokio::test(start_paused = true)]
async fn a_creation_without_an_answer_is_pending_and_not_cached() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    let failure = attempts(&context, &close, &desired).run_once().await.err().unwrap();
    assert_eq!(failure, Failure { stage: Stage::Write, error: timed_out() });
    // From the end of the call, not from its start.
    let pending = context.id_cache.pending_until(&desired.identity.keys());
    assert_eq!(pending, Some(Instant::now() + SEARCH_LAG));
    assert_eq!(context.id_cache.lead("acme"), None);
    assert_eq!(context.record_locks.locked(), [""; 0], "the locks are released");
}

#[tokio::test(start_paused = true)]
async fn a_creation_without_an_answer_is_not_repeated_while_search_lags() {
    let context = context(&rules());
    let lag = SEARCH_LAG.saturating_sub(Duration::from_secs(1));
    let close =
        FakeClose::new(&context, &[], &[]).with_search_lag(lag).with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    let start = Instant::now();
    let outcome = attempts(&context, &close, &desired).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.written(), ["create_lead"]);
    assert_eq!(close.records().leads.len(), 1);
    assert!(start.elapsed() >= SEARCH_LAG, "waited only {:?}", start.elapsed());
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_new1")));
    assert_eq!(counter(&context, "duplicates_avoided_total"), 1);
}

#[tokio::test(start_paused = true)]
async fn the_event_log_ends_the_wait_for_a_pending_creation() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[])
        .with_search_lag(SEARCH_LAG)
        .with_fault(WriteFault::After(timed_out()));
    let desired = jane(&context, 5);
    attempts(&context, &close, &desired).run_once().await.err().unwrap();
    let InMemoryRecords { leads, contacts, .. } = close.records();
    close.state(|state| {
        state.event_log = (leads.into_values().collect(), contacts.into_values().collect());
    });

    let start = Instant::now();
    let completed = attempts(&context, &close, &desired).run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
    assert!(start.elapsed() < Duration::from_secs(1), "waited {:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_creation_stays_pending() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Slow(TIMEOUT));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    tokio::time::timeout(Duration::from_secs(1), attempts.run_once()).await.err().unwrap();
    assert_eq!(close.written(), ["create_lead"], "the call was sent");
    let pending = context.id_cache.pending_until(&desired.identity.keys()).unwrap();
    assert!(pending > Instant::now() + SEARCH_LAG, "the call may take effect until it times out");
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_close_refused_is_not_pending() {
    let rejected = rejection(&[&["custom.cf_company"]]);
    for error in [rejected, CloseError::Transient(Fault::Status(503)), CloseError::Forbidden] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
        let desired = jane(&context, 5);
        let failure = attempts(&context, &close, &desired).run_once().await.err().unwrap();
        assert_eq!(failure.error, error);
        assert_eq!(context.id_cache.pending_until(&desired.identity.keys()), None, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_rejected_optional_field_is_left_out_of_the_next_write() {
    let context = context(&rules());
    let phone: &[&str] = &["contacts", "0", "phones", "0", "phone"];
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(rejection(&[phone])));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let completed = attempts.run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["create_lead", "create_lead"]);
    let contact = close.contact("cont_new2");
    assert_eq!(contact.list(Channel::Phone).len(), 0);
    assert!(contact.has(Channel::Email, "jane@acme.test", None));
    let dropped: Vec<_> =
        attempts.decision.dropped.iter().map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
    assert_eq!(dropped, [("phones", DropReason::Refused)]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_value_is_not_sent_again_for_the_record() {
    // Whether Close names the field or not.
    for paths in [&[&["phones", "0", "phone"][..]][..], &[]] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_fault(WriteFault::Slow(LATENCY))
            .with_fault(WriteFault::Before(rejection(paths)));
        attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
        assert_eq!(close.written(), ["update_lead", "update_contact", "update_contact"], "{paths:?}");

        let again = jane(&context, 6);
        let mut second = attempts(&context, &close, &again);
        let outcome = second.run_once().await.ok().unwrap().outcome;
        assert_eq!((outcome, close.written().len()), (Outcome::Synced(Effect::Unchanged), 3), "{paths:?}");
        let dropped = |decision: &Decision| -> Vec<_> {
            decision.dropped.iter().map(|dropped| (dropped.field.clone(), dropped.reason)).collect()
        };
        assert_eq!(dropped(&second.decision), [("phones".to_owned(), DropReason::RefusedBefore)]);

        // An operator's replay sends it again.
        let mut replayed = attempts(&context, &close.clone(), &again);
        replayed.run.priority = Priority::Replay;
        close.state(|state| state.faults.push_back(WriteFault::Before(timed_out())));
        assert_eq!(replayed.run_once().await.err().unwrap().error, timed_out(), "{paths:?}");

        // Another value is tried, and the same one when Close may accept it.
        let event = json!({"userId": "u1", "traits": {"phone": "+493012345678", "company": {"id": "acme"}}});
        let other = desired(&context, 7, event);
        attempts(&context, &close, &other).run_once().await.ok().unwrap();
        assert_eq!(close.contact("cont_1").list(Channel::Phone).len(), 1);
        context.version_cache.forget_refusals();
        tokio::time::sleep(LATENCY).await;
        attempts(&context, &close, &again).run_once().await.ok().unwrap();
        assert_eq!(close.contact("cont_1").list(Channel::Phone).len(), 2, "{paths:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_refused_in_a_new_record_is_not_sent_again_for_it() {
    let context = context(&rules());
    let phone: &[&str] = &["contacts", "0", "phones", "0", "phone"];
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(rejection(&[phone])));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    let outcome = attempts(&context, &close, &jane(&context, 6)).run_once().await.ok().unwrap().outcome;
    assert_eq!(outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.written(), ["create_lead", "create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_key_field_fails_the_attempt() {
    let context = context(&rules());
    let error = rejection(&[&["custom.cf_company"]]);
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
    let failure = attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    assert_eq!(failure.error, error);
    assert_eq!(close.written(), ["create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_field_fails_a_merged_write() {
    let context = context(&rules());
    let error = rejection(&[&["contacts", "0", "phones", "0", "phone"]]);
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(error.clone()));
    let (first, second) = (jane(&context, 5), jane(&context, 6));
    let mut attempts = attempts(&context, &close, &first);
    attempts.others = vec![&second];
    let failure = attempts.run_once().await.err().unwrap();
    assert_eq!(failure.error, error);
    assert_eq!(close.written(), ["create_lead"]);
}

#[tokio::test(start_paused = true)]
async fn merged_events_share_one_write_with_the_latest_values() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let event = |second, title| {
        let traits = json!({"title": title, "company": {"id": "acme"}});
        desired(&context, second, json!({"userId": "u1", "traits": traits}))
    };
    let (first, second) = (event(5, "CTO"), event(6, "CEO"));
    let mut attempts = attempts(&context, &close, &first);
    attempts.others = vec![&second];
    let completed = attempts.run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["update_contact"]);
    assert_eq!(close.contact("cont_1").fields[&Field::Title], json!("CEO"));
    let merged: Vec<_> =
        completed.merged.iter().map(|(outcome, decision)| (outcome.clone(), decision.merged)).collect();
    assert_eq!(merged, [(Outcome::Synced(Effect::Updated), true)]);
    assert_eq!(contact_versions(&context, close.contact("cont_1")).fields["title"], at(6));
}

#[tokio::test(start_paused = true)]
async fn a_404_of_a_write_looks_up_again() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[])
        .with_search_lag(SEARCH_LAG)
        .with_fault(WriteFault::Before(CloseError::NotFound));
    context.id_cache.remember_lead("acme", LeadId::new("lead_1"));
    // The Lead is deleted between the look-up and the write; search still shows it.
    let deleted = close.clone();
    let delete = async move {
        tokio::time::sleep(LATENCY + LATENCY / 2).await;
        deleted.state(|state| state.records.leads.clear());
    };
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let (outcome, ()) = tokio::join!(attempts.retry_in_place(), delete);
    assert_eq!(outcome, Outcome::Synced(Effect::Created));
    assert_eq!(close.written(), ["update_lead", "create_lead"]);
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_new1")));
}

#[tokio::test(start_paused = true)]
async fn a_404_of_a_write_to_a_record_that_is_there_is_transient() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(WriteFault::Before(CloseError::NotFound))
        .with_fault(WriteFault::Before(CloseError::NotFound));
    let desired = jane(&context, 5);
    let outcome = attempts(&context, &close, &desired).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Updated));
    assert_eq!(close.written(), ["update_lead", "update_lead", "update_lead", "update_contact"]);
}

/// An event about Jane with a phone number of hers.
fn jane_with_phone(context: &Context, second: i64, phone: &str) -> Desired {
    let traits =
        json!({"email": "jane@acme.test", "phone": phone, "company": {"id": "acme", "name": "Acme"}});
    desired(context, second, json!({"userId": "u1", "traits": traits}))
}

fn phones(contact: &Contact) -> Vec<&str> {
    contact.list(Channel::Phone).iter().map(|entry| entry.value.as_str()).collect()
}

const PHONES: [&str; 4] = ["+18004445551", "+18004445552", "+18004445553", "+18004445554"];

#[tokio::test(start_paused = true)]
async fn stale_reads_create_no_second_record_and_lose_no_entry() {
    for lag in [500, 1000, 5000].map(Duration::from_millis) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[], &[]).with_search_lag(SEARCH_LAG).with_read_lag(lag);
        for (second, phone) in (1..).zip(PHONES) {
            let desired = jane_with_phone(&context, second, phone);
            let outcome = attempts(&context, &close, &desired).retry_in_place().await;
            assert!(matches!(outcome, Outcome::Synced(_)), "{outcome:?}");
        }
        let records = close.records();
        assert_eq!((records.leads.len(), records.contacts.len()), (1, 1), "{lag:?}");
        assert_eq!(phones(&close.contact("cont_new2")), PHONES, "{lag:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_a_person_deletes_is_created_again_after_a_moment() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]);
    attempts(&context, &close, &jane(&context, 5)).run_once().await.ok().unwrap();
    close.state(|state| {
        state.records.leads.clear();
        state.records.contacts.clear();
    });
    let outcome = attempts(&context, &close, &jane(&context, 6)).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Created));
    let lead = close.records().leads.into_keys().next().unwrap();
    assert_eq!(context.id_cache.lead("acme"), Some(lead));
    // The search index still has the Contact; it is read only once more.
    close.state(|state| state.records.contacts.clear());
    let outcome = attempts(&context, &close, &jane(&context, 7)).retry_in_place().await;
    assert_eq!(outcome, Outcome::Synced(Effect::Added));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_succeeded_is_recorded_when_a_later_one_fails() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(WriteFault::Slow(LATENCY))
        .with_fault(WriteFault::Before(CloseError::Transient(Fault::Status(500))));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    assert_eq!(close.written(), ["update_lead", "update_contact"]);
    assert_eq!(lead_versions(&context, close.lead("lead_1")).fields["custom.cf_plan"], at(5));
    let contact = contact_versions(&context, close.contact("cont_1"));
    assert_eq!(contact, FieldVersions::default(), "Close may not have changed the Contact");
}

#[tokio::test(start_paused = true)]
async fn a_change_without_an_answer_is_recognized_by_its_stored_time() {
    let mut rules = rules();
    rules.contact.synced_at = Some(FieldRef::new("cf_contact_at"));
    let context = context(&rules);
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_fault(WriteFault::Slow(LATENCY))
        .with_fault(WriteFault::After(timed_out()));
    attempts(&context, &close, &jane(&context, 5)).run_once().await.err().unwrap();
    let versions = contact_versions(&context, close.contact("cont_1"));
    assert_eq!(versions.fields.get("name"), Some(&at(5)));
    assert_eq!(versions.record, None, "the event did not set all fields");
}

#[tokio::test(start_paused = true)]
async fn an_adopted_lead_is_cached_as_the_companys() {
    let context = context(&rules());
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old"});
    let close = FakeClose::new(&context, &[lead], &[janes_contact()]).with_search_lag(SEARCH_LAG);
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    attempts.run_once().await.ok().unwrap();
    assert_eq!(attempts.decision.case, Some(Case::AdoptedLead));
    assert_eq!(close.lead("lead_1").custom(&FieldId::new("cf_company")), Some("acme"));
    assert_eq!(context.id_cache.lead("acme"), Some(LeadId::new("lead_1")));
}

#[tokio::test(start_paused = true)]
async fn a_created_contact_of_a_shared_email_does_not_make_the_cache_complete() {
    let context = context(&rules());
    let mut other = janes_contact();
    other["custom.cf_user"] = json!("u2");
    let close = FakeClose::new(&context, &[acme()], &[other]);
    let desired = desired(&context, 5, json!({"userId": "u1", "traits": {"email": "jane@acme.test"}}));
    attempts(&context, &close, &desired).run_once().await.ok().unwrap();
    assert_eq!(close.written(), ["create_lead"]);
    let cached = context.id_cache.contacts(&Key::User("u1".into()));
    assert!(!cached.complete, "{cached:?}");
}

#[tokio::test(start_paused = true)]
async fn only_plans_that_need_a_complete_search_wait_for_it() {
    let elapsed = async |leads: &[Value], contacts: &[Value], event: Value| {
        let context = context(&rules());
        let close = FakeClose::new(&context, leads, contacts);
        let desired = desired(&context, 5, event);
        let mut attempts = attempts(&context, &close, &desired);
        let start = Instant::now();
        attempts.run.search_complete_from = start + SEARCH_LAG;
        attempts.run_once().await.ok().unwrap();
        start.elapsed()
    };
    let traits = json!({"title": "CEO", "company": {"id": "acme"}});
    let with_company = || json!({"userId": "u1", "traits": traits});
    let without_company = || json!({"userId": "u1", "traits": {"title": "CEO"}});
    let no_company = json!({"id": "lead_1", "date_created": "2026-01-01"});
    let contacts = &[janes_contact()];
    assert!(elapsed(&[acme()], contacts, with_company()).await < SEARCH_LAG, "an update");
    assert!(elapsed(&[], &[], with_company()).await >= SEARCH_LAG, "a creation");
    assert!(elapsed(&[no_company], contacts, with_company()).await >= SEARCH_LAG, "an adoption");
    assert!(elapsed(&[acme()], contacts, without_company()).await >= SEARCH_LAG, "all Contacts of a person");
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_writes_and_records_nothing() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[acme()], &[]);
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    attempts.mode = Mode::DryRun;
    let completed = attempts.run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Added));
    assert_eq!(close.written(), [""; 0]);
    assert_eq!(lead_versions(&context, close.lead("lead_1")), FieldVersions::default());
    assert_eq!(context.id_cache.contacts(&Key::User("u1".into())), Contacts::default());
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_carries_the_decision() {
    let context = context(&rules());
    let required = FieldError { path: vec!["lead".to_owned()], message: "this field is required" };
    let error = Rejection { status: 400, fields: vec![required], message: None, response: None };
    let close =
        FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Before(CloseError::Rejected(error)));
    let desired = jane(&context, 5);
    let mut attempts = attempts(&context, &close, &desired);
    let outcome = attempts.retry_in_place().await;
    let (outcome, _) = attempts.conclude(outcome);
    let Outcome::Dead(DeadLetter { decision: Some(decision), .. }) = outcome else { panic!("{outcome:?}") };
    assert!(decision.starts_with("nobody_known; steps: create lead"), "{decision}");
}
