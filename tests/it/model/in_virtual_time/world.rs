//! The environment of the workers in one run: time, Close and the network to it, the broker, and a trace of all
//! events.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use close_sync::close::{CloseError, Fault, Response, Transport};
use close_sync_simulator::{Offline, Reply, Settings};
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::super::history::{History, people};
use super::broker::{Broker, Channel, Message};
use super::journal::Journal;
use super::person::{self, Person};
use super::plan::{CallOutcome, CallResult, Lagging, Plan, Search};
use super::stepped::Steps;

/// How long a worker waits for a response.
pub(super) const TIMEOUT: Duration = Duration::from_secs(3);

/// The valid API key.
const KEY: &str = "api_simulator.key";

/// The start of virtual time, far from the time of the machine: nothing may depend on that.
const BASE: i64 = 4_102_444_800;

pub(super) struct World {
    pub(super) plan: Plan,
    start: Instant,
    close: Mutex<Offline>,
    broker: Mutex<Broker>,
    random: Mutex<fastrand::Rng>,
    trace: Mutex<Vec<String>>,
    /// By path, the newest event that set the title or name of a record.
    newest_written: Mutex<HashMap<String, usize>>,
    /// The messages of events of a time: one may be delivered late, or again.
    numbers: Mutex<HashMap<usize, Vec<usize>>>,
    /// Settled messages, and how many of `identified` came before.
    settled: Mutex<HashMap<usize, usize>>,
    /// A message that was settled again, and a later one that was settled before that.
    settled_again: Mutex<HashSet<(usize, usize)>>,
    /// The people whose Contacts were created, or got a user id or an email, in order.
    identified: Mutex<Vec<Vec<char>>>,
    /// A message that was settled again, and where in `identified` the people between both times are.
    identified_between: Mutex<Vec<(usize, Range<usize>)>>,
    /// Cases where an older event overwrote a newer one.
    overwritten: Mutex<Vec<String>>,
    person: Mutex<Person>,
    pub(super) journal: Journal,
    /// Creations whose worker does not know what came of them.
    pub(super) unanswered_creations: AtomicU32,
    /// In a small world.
    stepped: Option<Stepped>,
}

/// A world whose steps are chosen, and not drawn. Search shows nothing until it catches up.
#[derive(Default)]
struct Stepped {
    steps: Steps,
    index_caught_up: AtomicBool,
}

impl World {
    pub(super) fn new(plan: Plan, seed: u64) -> Arc<Self> {
        let settings = Settings {
            seed: Uuid::from_u64_pair(0, seed),
            limits: plan.limits,
            more_api_keys: vec![person::KEY.to_owned()],
            ..Settings::default()
        };
        let settings = settings.with(|close| *close = plan.behaviour.clone());
        Arc::new(Self {
            start: Instant::now(),
            close: Mutex::new(Offline::new(settings, Timestamp::from_second(BASE).unwrap())),
            broker: Mutex::new(Broker::new(plan.prefetch)),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            trace: Mutex::default(),
            newest_written: Mutex::default(),
            numbers: Mutex::default(),
            settled: Mutex::default(),
            settled_again: Mutex::default(),
            identified: Mutex::default(),
            identified_between: Mutex::default(),
            overwritten: Mutex::default(),
            person: Mutex::default(),
            journal: plan
                .journal
                .map_or_else(|| Journal::new(Duration::MAX, 1), |it| Journal::new(it.max_age, it.segment)),
            unanswered_creations: AtomicU32::new(0),
            stepped: None,
            plan,
        })
    }

    /// A small world.
    pub(super) fn stepped(plan: Plan) -> Arc<Self> {
        let mut world = Arc::into_inner(Self::new(plan, 0)).expect("the only one");
        world.stepped = Some(Stepped::default());
        Arc::new(world)
    }

    /// The steps to choose from, in a small world.
    pub(super) fn steps(&self) -> Option<&Steps> {
        self.stepped.as_ref().map(|stepped| &stepped.steps)
    }

    /// Whether the index of a small world shows everything.
    pub(super) fn index_caught_up(&self) -> bool {
        self.stepped.as_ref().is_some_and(|stepped| stepped.index_caught_up.load(Ordering::Relaxed))
    }

    pub(super) fn catch_up(&self) {
        if let Some(stepped) = &self.stepped {
            stepped.index_caught_up.store(true, Ordering::Relaxed);
            self.close().index_now();
        }
    }

    /// Close's answer to a call that arrives now.
    pub(super) fn answer(&self, method: &Method, path: &str, body: Option<&Value>) -> Response {
        to_response(self.close().ask(KEY, method.as_str(), path, body, self.now()))
    }

    /// An ack arrives.
    pub(super) fn ack_now(&self, channel: Channel, tag: u64) {
        let mut broker = self.broker();
        broker.ack_sent(channel, tag);
        broker.ack_arrives(channel);
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The virtual time, as the clocks of the workers show it.
    pub(super) fn own_time(&self) -> Timestamp {
        let is_set = self.elapsed() >= self.plan.clock_is_set;
        if is_set { self.now() } else { self.now() - self.plan.close_ahead }
    }

    /// The virtual time, as Close's clock shows it.
    pub(super) fn now(&self) -> Timestamp {
        let base = Timestamp::from_second(BASE).unwrap();
        base.saturating_add(jiff::SignedDuration::try_from(self.elapsed()).unwrap()).unwrap()
    }

    pub(super) fn broker(&self) -> MutexGuard<'_, Broker> {
        self.broker.lock().unwrap()
    }

    /// Close as it behaves now.
    pub(super) fn close(&self) -> MutexGuard<'_, Offline> {
        let mut close = self.close.lock().unwrap();
        let never = Lagging::By(Duration::from_hours(1000));
        let search = match &self.stepped {
            Some(stepped) if !stepped.index_caught_up.load(Ordering::Relaxed) => {
                Search { creations: never, custom_fields: never, rest: never, ..self.plan.search }
            }
            Some(_) | None => self.plan.search,
        };
        close.behave(|behaviour| search.apply(behaviour, self.elapsed()));
        close
    }

    pub(super) fn random<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        draw(&mut self.random.lock().unwrap())
    }

    /// Adds a line to the trace, with the current time.
    pub(super) fn log(&self, what: fmt::Arguments<'_>) {
        let line = format!("{:>10.3}  {what}", self.elapsed().as_secs_f64());
        self.trace.lock().unwrap().push(line);
    }

    /// Marks a message as settled. From now on no older event may overwrite its values.
    pub(super) fn mark_settled(&self, number: usize) {
        let (mut settled, identified) = (self.settled.lock().unwrap(), self.identified.lock().unwrap().len());
        if let Some(first) = settled.get(&number).copied() {
            let later = settled.keys().filter(|other| **other > number).map(|other| (number, *other));
            self.settled_again.lock().unwrap().extend(later);
            self.identified_between.lock().unwrap().push((number, first..identified));
        } else {
            settled.insert(number, identified);
        }
    }

    /// Whether the acks of messages were lost so that one was delivered again after a later one about the same person, or
    /// after a later one had changed who the person's Contacts are.
    pub(super) fn order_is_lost(&self, history: &History) -> bool {
        let people = |number: usize| history.events[number].people();
        let (pairs, identified) = (self.settled_again.lock().unwrap(), self.identified.lock().unwrap());
        let is_about = |one: usize, other: &[char]| people(one).iter().any(|person| other.contains(person));
        pairs.iter().any(|(one, other)| is_about(*one, &people(*other)))
            || self.identified_between.lock().unwrap().iter().any(|(number, between)| {
                identified[between.clone()].iter().any(|people| is_about(*number, people))
            })
    }

    /// Records whose Contact a write creates or gives keys.
    fn record_identity(&self, body: &Value) {
        let contact = body["contacts"].get(0).unwrap_or(body);
        let user = contact["custom.cf_contactuserid"].as_str();
        let emails = contact["emails"].as_array().into_iter().flatten();
        let emails: Vec<&str> = emails.filter_map(|entry| entry["email"].as_str()).collect();
        if user.is_some() || !emails.is_empty() {
            let whose = user.map(|user| people(Some(user), None)).into_iter();
            let whose = whose.chain(emails.into_iter().map(|email| people(None, Some(email))));
            self.identified.lock().unwrap().push(whose.flatten().collect());
        }
    }

    /// A message of an event of this time is published.
    pub(super) fn published(&self, number: usize, at: usize) {
        self.numbers.lock().unwrap().entry(at).or_default().push(number);
    }

    /// Records which event an update comes from, and whether it overwrites a newer, settled one.
    fn record_update(&self, path: &str, body: &Value) {
        let text = body["title"].as_str().or(body["name"].as_str());
        let Some(number) = text.and_then(|text| text.get(1..)?.parse().ok()) else { return };
        let newest = self.newest_written.lock().unwrap().insert(path.to_owned(), number);
        // An unsettled event will be written again.
        let (broker, numbers, settled) =
            (self.broker(), self.numbers.lock().unwrap(), self.settled.lock().unwrap());
        let is_settled = |at: &usize| {
            let mut numbers = numbers.get(at).into_iter().flatten();
            numbers.all(|number| settled.contains_key(number) && !broker.is_open(*number))
        };
        let is_final = |newest: &usize| *newest > number && is_settled(newest);
        if let Some(newest) = newest.filter(is_final) {
            self.overwritten
                .lock()
                .unwrap()
                .push(format!("{path}: event {newest} overwritten by older event {number}"));
        }
    }

    /// After a call about a record, a person may do something to it, while workers are about to write what they have read.
    fn let_person_act(self: &Arc<Self>, record: Option<&str>) {
        if !self.random(|random| random.u8(..100) < self.plan.person_percent) {
            return;
        }
        let soon = self.random(fastrand::Rng::bool);
        let delay = Duration::from_millis(self.random(|random| random.u64(..if soon { 300 } else { 5000 })));
        let (world, record) = (Arc::clone(self), record.map(str::to_owned));
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let mut close = world.close();
            let contacts = close.contacts();
            let is_close_by = |contact: &&Value| {
                record.as_deref().is_none_or(|record| contact["id"] == record || contact["lead_id"] == record)
            };
            let contacts: Vec<&Value> = contacts.iter().filter(is_close_by).collect();
            let time = (world.elapsed(), world.now());
            let edit = world.random(|random| {
                let contact = random.choice(contacts)?;
                world.person().act(&mut close, contact, world.plan.person, random, time)
            });
            if let Some(edit) = edit {
                world.log(format_args!("person: {edit}"));
            }
        });
    }

    pub(super) fn person(&self) -> MutexGuard<'_, Person> {
        self.person.lock().unwrap()
    }

    /// All cases where an older event overwrote a newer one.
    pub(super) fn overwritten(&self) -> String {
        self.overwritten.lock().unwrap().join("\n")
    }

    pub(super) fn trace(&self) -> Vec<String> {
        self.trace.lock().unwrap().clone()
    }

    /// The latency between worker and broker, in one direction.
    pub(super) async fn latency(&self) {
        tokio::time::sleep(Duration::from_millis(self.random(|random| random.u64(1..5)))).await;
    }

    /// Sends an ack. It arrives a little later; acks arrive in order.
    pub(super) fn ack(self: &Arc<Self>, channel: Channel, tag: u64) {
        self.broker().ack_sent(channel, tag);
        let world = Arc::clone(self);
        tokio::spawn(async move {
            world.latency().await;
            if let Some(number) = world.broker().ack_arrives(channel) {
                world.log(format_args!("broker: {number} is acked"));
            }
        });
    }

    /// Puts a copy into a delay queue and waits for the confirm.
    pub(super) async fn delay(self: &Arc<Self>, message: Message, delay: Duration) {
        self.latency().await;
        self.broker().delay(message.number);
        let world = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            world.broker().return_from_delay(message);
        });
        self.latency().await;
    }

    /// Dead-letters a message and waits for the confirm.
    pub(super) async fn dead_letter(&self, number: usize, reason: String) {
        self.latency().await;
        self.broker().dead.push((number, reason));
        self.latency().await;
    }
}

/// The network between one process and Close.
pub(super) struct SimulatedTransport {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
    pub(super) alive: Arc<AtomicBool>,
}

impl SimulatedTransport {
    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response, CloseError> {
        if !self.alive.load(Ordering::Relaxed) {
            // The process was killed, so its remaining tasks must not do anything.
            return std::future::pending().await;
        }
        let world = &self.world;
        if let Some(steps) = world.steps() {
            return steps.call(self.process, &self.alive, (method, path, body)).await;
        }
        let creates = method == Method::POST && path != "data/search/";
        let mut outcome = world.random(|random| world.plan.draw_call(random, creates, world.elapsed()));
        if path.starts_with("event/") && !world.plan.event_log_answers {
            (outcome.takes_effect, outcome.result) = (false, CallResult::Status(500));
        }
        // An answer need not name the Contact. Where the event log is silent, only search then shows it.
        let is_late = outcome.request_latency + outcome.response_latency >= TIMEOUT;
        if creates && (outcome.result != CallResult::Answer || is_late || !world.plan.event_log_answers) {
            world.unanswered_creations.fetch_add(1, Ordering::Relaxed);
        }
        let (path_alone, _) = path.split_once('?').unwrap_or((path, ""));
        let written = body.filter(|_| path != "data/search/").map(ToString::to_string).unwrap_or_default();
        let call = format!("process {}: {method} {path_alone} {written}", self.process);
        world.log(format_args!("{call}"));
        if outcome.result == CallResult::Unreachable {
            world.log(format_args!("{call} does not reach Close"));
            return Err(CloseError::Unreachable("no route".into()));
        }
        let (answer, received) = oneshot::channel();
        let (world, method, path) = (Arc::clone(world), method, path.to_owned());
        tokio::spawn(deliver(world, call, (method, path, body.cloned()), outcome, answer));
        match tokio::time::timeout(TIMEOUT, received).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(CloseError::Transient(Fault::Timeout)),
        }
    }
}

impl Transport for SimulatedTransport {
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
        _: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        Box::pin(self.call(method, path, body))
    }
}

/// Delivers a call to Close, and the response to the client.
async fn deliver(
    world: Arc<World>,
    call: String,
    (method, path, body): (Method, String, Option<Value>),
    outcome: CallOutcome,
    answer: oneshot::Sender<Result<Response, CloseError>>,
) {
    tokio::time::sleep(outcome.request_latency).await;
    let takes_effect = outcome.takes_effect && (outcome.survives_client || !answer.is_closed());
    let reply = takes_effect.then(|| {
        let now = world.now();
        if let Some(body) = &body {
            world.record_identity(body);
        }
        if let Some(body) = body.as_ref().filter(|_| method == Method::PUT) {
            world.record_update(&path, body);
        }
        let mut close = world.close();
        let record = path.split(['/', '?']).nth(1).filter(|record| close.record(record).is_some());
        world.let_person_act(record);
        let changed = record.filter(|_| method == Method::PUT);
        let before = changed.and_then(|record| close.record(record));
        let reply = close.ask(KEY, method.as_str(), &path, body.as_ref(), now);
        if let (200, Some(record), Some(before), Some(body)) = (reply.status, changed, before, &body) {
            let (at, staleness) = (world.elapsed(), world.plan.behaviour.read_lag.longest());
            let unsettled = world.broker().unsettled();
            let mut person = world.person();
            person.replaced(record, before, at);
            person.check(record, body, &unsettled, at, staleness);
        }
        reply
    });
    let status = reply.as_ref().map(|reply| reply.status);
    world.log(format_args!("{call} -> {status:?}, {:?}", outcome.result));
    if outcome.result == CallResult::NoResponse {
        // The client times out first.
        tokio::time::sleep(TIMEOUT * 2).await;
        return drop(answer);
    }
    tokio::time::sleep(outcome.response_latency).await;
    let answered = match (outcome.result, reply) {
        (CallResult::Answer, Some(reply)) => Ok(to_response(reply)),
        (CallResult::Status(status), _) => Ok(error_response(status)),
        (CallResult::Answer | CallResult::Lost | CallResult::Unreachable | CallResult::NoResponse, _) => {
            Err(CloseError::Transient(Fault::ConnectionLost))
        }
    };
    // The client may have given up.
    let _ = answer.send(answered);
}

fn to_response(reply: Reply) -> Response {
    let headers = reply
        .headers
        .into_iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(&value).unwrap()));
    Response {
        status: StatusCode::from_u16(reply.status).unwrap(),
        headers: headers.collect(),
        body: reply.body.into_bytes(),
    }
}

fn error_response(status: u16) -> Response {
    let body = b"<html><body>upstream connect error</body></html>".to_vec();
    Response { status: StatusCode::from_u16(status).unwrap(), headers: HeaderMap::new(), body }
}
