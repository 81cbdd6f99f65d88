//! A session over a broker and a Close in memory, and a log of what it does to both.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::FieldTable;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::envelope::{ATTEMPTS, DELAY_ID, number, text};
use crate::amqp::nodes::Nodes;
use crate::amqp::publisher::Outgoing;
use crate::amqp::{self, BrokerError, Delay, JournalSettings, JournalState, TopologyMode};
use crate::close::{Client, Clock, CloseError, Response, Transport};
use crate::consumer::broker::{
    Broker, BrokerEvent, Delivery, JournalMessage, Publish, Publishers, ReadFrom, Receipt,
};
use crate::consumer::quarantine::Quarantine;
use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::{End, Session, SessionStats, System};
use crate::domain::journal::{self, Batch};
use crate::domain::mapping::Key;
use crate::domain::mapping::tests::{mapping, rules};
use crate::domain::switches::Switches;
use crate::retry::Policy;
use crate::sync::{self, Dependencies, Worker};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::status::Status;

/// In virtual time. What a test waits for comes long before, or never.
const NEVER: Duration = Duration::from_hours(10);

/// What a session did, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// A call to Close, as `POST lead/`.
    Called(String),
    /// The broker confirmed a message.
    Published(Published),
    Acked(String),
    Rejected(String),
    /// The session closed the channel.
    Closed,
}

/// A message that was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) message: String,
    pub(super) attempts: Option<i64>,
    pub(super) delay_id: Option<Uuid>,
    /// Through the quarantine.
    pub(super) quarantined: bool,
}

/// How Close answers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Works,
    Status(u16),
    /// Not before the test is over.
    Never,
}

/// Searches fail, everything else works.
pub(super) fn failing_searches(call: &str) -> Answer {
    if call.starts_with("POST data/search/ ") { Answer::Status(503) } else { Answer::Works }
}

/// How the broker answers a publish.
#[derive(Clone, Debug)]
pub(super) enum Confirm {
    Ok,
    Error(BrokerError),
    Panic,
    /// Not before the test is over.
    Never,
}

/// A log that tests can wait on. Clones share it.
#[derive(Clone)]
pub(super) struct Log(Arc<watch::Sender<Vec<Entry>>>);

impl Log {
    fn add(&self, entry: Entry) {
        self.0.send_modify(|log| log.push(entry));
    }

    /// The log so far.
    pub(super) fn entries(&self) -> Vec<Entry> {
        self.0.borrow().clone()
    }

    /// Waits until the log satisfies a condition, and returns it.
    pub(super) async fn wait_for(&self, condition: impl FnMut(&Vec<Entry>) -> bool) -> Vec<Entry> {
        let mut log = self.0.subscribe();
        let found = tokio::time::timeout(NEVER, log.wait_for(condition)).await;
        found.unwrap_or_else(|_| panic!("{:#?}", self.entries())).unwrap().clone()
    }

    pub(super) async fn wait_for_ack(&self, message: &str) -> Vec<Entry> {
        self.wait_for(|log| log.contains(&Entry::Acked(message.into()))).await
    }

    /// Waits until this many calls have been made.
    pub(super) async fn wait_for_calls(&self, number: usize) {
        self.wait_for(|log| calls(log).len() >= number).await;
    }
}

fn select<T: ?Sized>(log: &[Entry], part: impl Fn(&Entry) -> Option<&T>) -> Vec<&T> {
    log.iter().filter_map(part).collect()
}

/// The ids of the messages that were acked.
pub(super) fn acked(log: &[Entry]) -> Vec<&str> {
    select(log, |entry| if let Entry::Acked(id) = entry { Some(id.as_str()) } else { None })
}

/// The calls in a log.
pub(super) fn calls(log: &[Entry]) -> Vec<&str> {
    select(log, |entry| if let Entry::Called(call) = entry { Some(call.as_str()) } else { None })
}

/// The published messages in a log.
pub(super) fn published(log: &[Entry]) -> Vec<&Published> {
    select(log, |entry| if let Entry::Published(message) = entry { Some(message) } else { None })
}

type Script<Request, Reply> = Arc<Mutex<Box<dyn FnMut(&Request) -> Reply + Send>>>;

/// A worker for an organization that knows nothing yet, with a clock in virtual time.
fn worker(
    settings: sync::Settings,
    records: &Arc<FakeClose>,
    metrics: &Metrics,
    organization: &str,
) -> Worker {
    let (began, start) = (records.began, records.start);
    let transport = SharedClose(Arc::clone(records));
    let mut mapping = mapping();
    mapping.organization = Some(organization.to_owned());
    Worker::new(Dependencies {
        settings,
        rules: &rules(),
        mapping,
        client: Client::with_transport(transport, Duration::from_hours(2), 1.0, |_| {})
            .with_clock(Clock::new(move || began + start.elapsed())),
        metrics: metrics.clone(),
    })
}

const ORGANIZATION: &str = "orga_1";

/// Everything around a session. Close works and the broker confirms, until a script says otherwise.
pub(super) struct Harness {
    pub(super) log: Log,
    /// How a session starts. Tests change its fields.
    pub(super) session: Session,
    close: Script<str, Answer>,
    records: Arc<FakeClose>,
    settings: sync::Settings,
    confirms: Script<Published, Confirm>,
    /// Acks reach a channel that is gone.
    stale: Arc<AtomicBool>,
    /// Outlives the sessions.
    pub(super) journal: FakeJournal,
}

impl Harness {
    /// With these changes to the worker's settings.
    pub(super) fn new(change: impl FnOnce(&mut sync::Settings)) -> Self {
        let log = Log(Arc::new(watch::Sender::new(Vec::new())));
        let close: Script<str, Answer> = Arc::new(Mutex::new(Box::new(|_| Answer::Works)));
        let records = Arc::new(FakeClose {
            log: log.clone(),
            script: Arc::clone(&close),
            leads: Mutex::default(),
            began: Timestamp::now(),
            start: Instant::now(),
            created: AtomicUsize::new(0),
        });
        let delays = [("30s", 30), ("5m", 300)];
        let mut settings = sync::Settings {
            switches: Switches::default(),
            retry: Policy {
                in_place: Duration::ZERO,
                max_age: Duration::ZERO,
                jitter: 0.0,
                delays: delays.map(|(_, seconds)| Duration::from_secs(seconds)).into(),
            },
            max_message_bytes: 1 << 20,
            search_lag: Duration::ZERO,
            event_log_lag: Duration::ZERO,
            country: None,
            hold: Duration::from_hours(1),
            recheck: Duration::from_hours(24),
            merge: true,
        };
        change(&mut settings);
        let amqp = amqp::Settings {
            nodes: Nodes::parse("amqp://guest:guest@127.0.0.1:1/%2f").unwrap(),
            exchange: "identify".into(),
            queue: "close-sync".into(),
            prefetch: 100,
            delays: delays
                .map(|(name, seconds)| Delay { name: name.into(), duration: Duration::from_secs(seconds) })
                .into(),
            binding_keys: vec!["#".into()],
            topology: TopologyMode::Declare,
            outcomes: None,
            journal: JournalSettings { enabled: true, max_age: Duration::from_hours(48), max_bytes: 1 << 30 },
        };
        let metrics = Metrics::new(None).unwrap();
        let session = Session {
            destination: None,
            settings: Arc::new(amqp),
            worker: worker(settings.clone(), &records, &metrics, ORGANIZATION),
            metrics,
            status: Status::default(),
            concurrency: 10,
            grace: Duration::from_mins(1),
            quarantine: Quarantine::default(),
            paused_before: None,
        };
        let confirms: Script<Published, Confirm> = Arc::new(Mutex::new(Box::new(|_| Confirm::Ok)));
        let journal =
            FakeJournal { state: JournalState::Ready, messages: Arc::new(watch::Sender::new(Vec::new())) };
        Self { log, session, close, records, settings, confirms, stale: Arc::default(), journal }
    }

    /// Another process, with the same Close, journal and log.
    pub(super) fn restart(&self) -> Self {
        self.restart_for(ORGANIZATION)
    }

    /// The same for another organization.
    pub(super) fn restart_for(&self, organization: &str) -> Self {
        let worker = worker(self.settings.clone(), &self.records, &self.session.metrics, organization);
        Self {
            log: self.log.clone(),
            session: Session { worker, status: Status::default(), ..self.session.clone() },
            close: Arc::clone(&self.close),
            records: Arc::clone(&self.records),
            settings: self.settings.clone(),
            confirms: Arc::clone(&self.confirms),
            stale: Arc::default(),
            journal: self.journal.clone(),
        }
    }

    /// Decides how Close answers from now on. The call is passed as `POST lead/`, with its body.
    pub(super) fn close_answers(&self, script: impl FnMut(&str) -> Answer + Send + 'static) {
        *self.close.lock().unwrap() = Box::new(script);
    }

    /// Decides how the broker answers to what is published from now on.
    pub(super) fn broker_answers(&self, script: impl FnMut(&Published) -> Confirm + Send + 'static) {
        *self.confirms.lock().unwrap() = Box::new(script);
    }

    /// From now on acks come too late.
    pub(super) fn lose_channel(&self) {
        self.stale.store(true, Ordering::Relaxed);
    }

    /// Starts a session that knows of no delayed messages.
    pub(super) fn start(&self) -> Running {
        let (events, received) = mpsc::unbounded_channel();
        let channel = Channel {
            log: self.log.clone(),
            confirms: Arc::clone(&self.confirms),
            stale: Arc::clone(&self.stale),
            quarantined: false,
        };
        let broker = FakeBroker {
            channel: channel.clone(),
            events: received,
            receiving: true,
            journal: self.journal.clone(),
            read_next: None,
        };
        let (session, shutdown) = (self.session.clone(), CancellationToken::new());
        let requested = shutdown.clone();
        let task = tokio::spawn(async move {
            let mut delayed = DelayedMessages::<Key>::default();
            session.run_on(broker, Arc::new(System), &mut delayed, &requested).await
        });
        Running { channel, events, shutdown, task }
    }
}

/// A session that runs.
pub(super) struct Running {
    channel: Channel,
    events: mpsc::UnboundedSender<BrokerEvent>,
    shutdown: CancellationToken,
    task: JoinHandle<(End, SessionStats)>,
}

impl Running {
    /// Delivers a message with this id.
    pub(super) fn deliver(&self, id: &str, body: &Value) {
        self.deliver_through("identify", id, body, FieldTable::default());
    }

    /// The same as it comes from a delay queue.
    pub(super) fn redeliver(&self, delayed: &Published, body: &Value) {
        let mut headers = FieldTable::default();
        headers.insert(DELAY_ID.into(), text_value(&delayed.delay_id.unwrap().to_string()));
        headers.insert(ATTEMPTS.into(), lapin::types::AMQPValue::LongLongInt(delayed.attempts.unwrap()));
        self.deliver_through("close-sync.retry", &delayed.message, body, headers);
    }

    fn deliver_through(&self, exchange: &str, id: &str, body: &Value, headers: FieldTable) {
        let receipt = FakeReceipt { channel: self.channel.clone(), message: id.into() };
        self.send(BrokerEvent::Delivery(Box::new(Delivery {
            properties: BasicProperties::default().with_message_id(id.into()).with_headers(headers),
            exchange: exchange.into(),
            routing_key: "users".into(),
            redelivered: false,
            body: body.to_string().into_bytes(),
            receipt: Box::new(receipt),
        })));
    }

    pub(super) fn send(&self, event: BrokerEvent) {
        self.events.send(event).unwrap_or_else(|_| panic!("the session has ended"));
    }

    /// Requests a shutdown.
    pub(super) fn shut_down(&self) {
        self.shutdown.cancel();
    }

    /// Waits until the session has ended.
    pub(super) async fn end(self) -> (End, SessionStats) {
        tokio::time::timeout(NEVER, self.task).await.expect("the session ends").unwrap()
    }

    /// Requests a shutdown and waits until the session has ended.
    pub(super) async fn stop(self) -> SessionStats {
        self.shut_down();
        self.end().await.1
    }
}

fn text_value(text: &str) -> lapin::types::AMQPValue {
    lapin::types::AMQPValue::LongString(text.into())
}

/// An event about a person of a company.
pub(super) fn event(user: &str, company: &str) -> Value {
    json!({"type": "identify", "userId": user,
        "traits": {"name": user, "company": {"id": company, "name": company}}})
}

struct FakeBroker {
    channel: Channel,
    events: mpsc::UnboundedReceiver<BrokerEvent>,
    receiving: bool,
    journal: FakeJournal,
    /// What is read next in the journal.
    read_next: Option<usize>,
}

/// The journal. Clones share it.
#[derive(Clone)]
pub(super) struct FakeJournal {
    pub(super) state: JournalState,
    pub(super) messages: Arc<watch::Sender<Vec<Vec<u8>>>>,
}

impl FakeJournal {
    /// All entries.
    pub(super) fn entries(&self) -> Vec<journal::Entry> {
        let messages = self.messages.borrow().clone();
        messages.iter().flat_map(|body| Batch::decode(body).unwrap().entries).collect()
    }
}

impl Publish for FakeJournal {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        self.messages.send_modify(|messages| messages.push(message.body.to_vec()));
        std::future::ready(Ok(())).boxed()
    }
}

impl Broker for FakeBroker {
    async fn next_event(&mut self) -> BrokerEvent {
        loop {
            let next = self.read_next;
            let mut messages = self.journal.messages.subscribe();
            let journal = async {
                let Some(next) = next else { return std::future::pending().await };
                let messages = messages.wait_for(|messages| messages.len() > next).await.unwrap();
                JournalMessage { position: next as u64, body: messages[next].clone() }
            };
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                message = journal => {
                    self.read_next = next.map(|next| next + 1);
                    Some(BrokerEvent::Journal(message))
                }
            };
            match event {
                Some(BrokerEvent::Delivery(_)) if !self.receiving => {}
                Some(event) => return event,
                None => std::future::pending().await,
            }
        }
    }

    fn journal(&self) -> &JournalState {
        &self.journal.state
    }

    fn read_journal(&mut self, from: ReadFrom) {
        self.read_next = Some(match from {
            ReadFrom::Last => self.journal.messages.borrow().len().saturating_sub(1),
            ReadFrom::Position(position) => usize::try_from(position).unwrap(),
        });
    }

    fn stop_receiving(&mut self) {
        self.receiving = false;
    }

    fn publishers(&self) -> Publishers {
        let publisher = || Arc::new(self.channel.clone()) as Arc<dyn Publish>;
        Publishers {
            successors: publisher(),
            quarantine: Arc::new(Channel { quarantined: true, ..self.channel.clone() }),
            journal: Arc::new(self.journal.clone()),
            replays: publisher(),
            producers: publisher(),
        }
    }

    fn stall_limit(&self) -> Duration {
        Duration::from_secs(20)
    }

    async fn close(self) {
        self.channel.log.add(Entry::Closed);
    }
}

#[derive(Clone)]
struct Channel {
    log: Log,
    confirms: Script<Published, Confirm>,
    stale: Arc<AtomicBool>,
    quarantined: bool,
}

impl Publish for Channel {
    fn publish<'a>(&'a self, message: Outgoing<'a>) -> BoxFuture<'a, Result<(), BrokerError>> {
        let properties = message.properties;
        let published = Published {
            exchange: message.exchange.to_owned(),
            key: message.key.to_owned(),
            message: properties.message_id().as_ref().unwrap().to_string(),
            attempts: number(&properties, ATTEMPTS),
            delay_id: text(&properties, DELAY_ID).and_then(|id| id.parse().ok()),
            quarantined: self.quarantined,
        };
        async move {
            let confirm = self.confirms.lock().unwrap()(&published);
            match confirm {
                Confirm::Ok => {
                    self.log.add(Entry::Published(published));
                    Ok(())
                }
                Confirm::Error(error) => Err(error),
                Confirm::Panic => panic!("on purpose"),
                Confirm::Never => std::future::pending().await,
            }
        }
        .boxed()
    }
}

struct FakeReceipt {
    channel: Channel,
    message: String,
}

impl FakeReceipt {
    fn settle(&self, entry: Entry) -> BoxFuture<'_, Result<bool, BrokerError>> {
        let stale = self.channel.stale.load(Ordering::Relaxed);
        if !stale {
            self.channel.log.add(entry);
        }
        std::future::ready(Ok(!stale)).boxed()
    }
}

impl Receipt for FakeReceipt {
    fn ack(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        self.settle(Entry::Acked(self.message.clone()))
    }

    fn reject(&self) -> BoxFuture<'_, Result<bool, BrokerError>> {
        self.settle(Entry::Rejected(self.message.clone()))
    }
}

/// A Close whose search shows nothing, ever.
struct FakeClose {
    log: Log,
    script: Script<str, Answer>,
    leads: Mutex<BTreeMap<String, Value>>,
    created: AtomicUsize,
    /// The time of day at the start of virtual time.
    began: Timestamp,
    start: Instant,
}

struct SharedClose(Arc<FakeClose>);

impl FakeClose {
    fn answer(&self, method: &Method, path: &str, body: Option<&Value>) -> Value {
        let id = |kind: &str| format!("{kind}_{}", self.created.fetch_add(1, Ordering::Relaxed));
        match (method.as_str(), path) {
            ("GET", "me/") => json!({"organizations": [{"name": "Acme"}]}),
            ("GET", "custom_field_schema/lead/") => {
                json!({"fields": [{"id": "cf_company", "name": "Company ID", "type": "text"}]})
            }
            ("GET", "custom_field_schema/contact/") => {
                json!({"fields": [{"id": "cf_user", "name": "User ID", "type": "text"}]})
            }
            ("GET", path) if path.starts_with("event/") => json!({"data": [], "cursor_next": null}),
            ("POST", "data/search/") => json!({"data": [], "cursor": null}),
            ("POST", "lead/") => {
                let mut lead = body.unwrap().clone();
                lead["id"] = id("lead").into();
                lead["contacts"][0]["id"] = id("cont").into();
                lead["contacts"][0]["lead_id"] = lead["id"].clone();
                lead["contact_ids"] = json!([lead["contacts"][0]["id"]]);
                self.leads
                    .lock()
                    .unwrap()
                    .insert(format!("lead/{}/", lead["id"].as_str().unwrap()), lead.clone());
                lead
            }
            ("GET", path) if path.starts_with("lead/") => self.leads.lock().unwrap()[path].clone(),
            ("GET", path) if path.starts_with("contact/") => {
                let leads = self.leads.lock().unwrap();
                let mut contacts = leads.values().map(|lead| &lead["contacts"][0]);
                let contact = contacts.find(|contact| path.contains(contact["id"].as_str().unwrap()));
                contact.unwrap().clone()
            }
            (_, _) => json!({"id": id("cont")}),
        }
    }
}

impl Transport for SharedClose {
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
        _: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        let call = format!("{method} {path}");
        async move {
            let whole = format!("{call} {}", body.map(ToString::to_string).unwrap_or_default());
            let Self(close) = self;
            close.log.add(Entry::Called(call));
            let answer = close.script.lock().unwrap()(&whole);
            let (status, body) = match answer {
                Answer::Works => (200, close.answer(&method, path, body)),
                // Something that cannot be left out.
                Answer::Status(status) => {
                    (status, json!({"field-errors": {"lead": "This field is required."}}))
                }
                Answer::Never => std::future::pending().await,
            };
            Ok(Response::with_status(status, body))
        }
        .boxed()
    }
}
