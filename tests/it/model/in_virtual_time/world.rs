//! What surrounds the workers of one history: the time, Close and the way to it, the broker, and a trace of
//! what happened.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use close_sync::close::{CloseError, Fault, Response, Transport};
use close_sync_simulator::{Lag, Offline, Reply, Settings};
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::broker::{Broker, Channel, Message};
use super::plan::{Completion, End, Plan};

/// How long a worker waits for an answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(3);

/// The key Close lets in.
const KEY: &str = "api_simulator.key";

/// Far in the future: the worker asks the event log by the clock on the wall, and what happens here is to
/// be after that.
const BASE: i64 = 4_102_444_800;

/// One history's world.
pub(super) struct World {
    pub(super) plan: Plan,
    began: Instant,
    close: Mutex<Offline>,
    broker: Mutex<Broker>,
    random: Mutex<fastrand::Rng>,
    trace: Mutex<Vec<String>>,
    /// The newest event whose title or name a record was given, and where an older one came after it.
    told: Mutex<HashMap<String, usize>>,
    /// Messages that are done with.
    settled: Mutex<HashSet<usize>>,
    undone: Mutex<Vec<String>>,
}

impl World {
    pub(super) fn new(plan: Plan, seed: u64) -> Arc<Self> {
        let settings = Settings {
            seed: Uuid::from_u64_pair(0, seed),
            search_lag: Lag::Between(Duration::ZERO, plan.search_lag),
            limits: plan.limits,
            ..Settings::default()
        };
        Arc::new(Self {
            began: Instant::now(),
            close: Mutex::new(Offline::new(settings, Timestamp::from_second(BASE).unwrap())),
            broker: Mutex::new(Broker::new(plan.prefetch)),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            trace: Mutex::default(),
            told: Mutex::default(),
            settled: Mutex::default(),
            undone: Mutex::default(),
            plan,
        })
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// What time it is in Close.
    pub(super) fn now(&self) -> Timestamp {
        let base = Timestamp::from_second(BASE).unwrap();
        base.saturating_add(jiff::SignedDuration::try_from(self.elapsed()).unwrap()).unwrap()
    }

    pub(super) fn broker(&self) -> MutexGuard<'_, Broker> {
        self.broker.lock().unwrap()
    }

    pub(super) fn close(&self) -> MutexGuard<'_, Offline> {
        self.close.lock().unwrap()
    }

    pub(super) fn random<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        draw(&mut self.random.lock().unwrap())
    }

    /// Notes that something happened, now.
    pub(super) fn tell(&self, what: fmt::Arguments<'_>) {
        let line = format!("{:>10.3}  {what}", self.elapsed().as_secs_f64());
        self.trace.lock().unwrap().push(line);
    }

    /// A message is done with: what it told has to stay.
    pub(super) fn settled(&self, number: usize) {
        self.settled.lock().unwrap().insert(number);
    }

    /// Notes which event a change tells about: what a record was given by a newer one is not to be undone.
    fn changed(&self, path: &str, body: &Value) {
        let text = body["title"].as_str().or(body["name"].as_str());
        let Some(number) = text.and_then(|text| text.get(1..)?.parse().ok()) else { return };
        let newest = self.told.lock().unwrap().insert(path.to_owned(), number);
        // One that is not done with will be written again.
        let lasts = |newest: &usize| *newest > number && self.settled.lock().unwrap().contains(newest);
        if let Some(newest) = newest.filter(lasts) {
            self.undone.lock().unwrap().push(format!("{path}: {newest} undone by {number}"));
        }
    }

    /// Where an older event undid what a newer one had told.
    pub(super) fn undone(&self) -> String {
        self.undone.lock().unwrap().join("\n")
    }

    pub(super) fn trace(&self) -> Vec<String> {
        self.trace.lock().unwrap().clone()
    }

    /// A message of ours goes to the broker, or something of the broker's to us.
    pub(super) async fn travel(&self) {
        tokio::time::sleep(Duration::from_millis(self.random(|random| random.u64(1..5)))).await;
    }

    /// Sends an ack, which arrives a little later, after those before it.
    pub(super) fn ack(self: &Arc<Self>, channel: Channel, tag: u64) {
        self.broker().ack_sent(channel, tag);
        let world = Arc::clone(self);
        tokio::spawn(async move {
            world.travel().await;
            if let Some(number) = world.broker().ack_arrives(channel) {
                world.tell(format_args!("broker: {number} is acked"));
            }
        });
    }

    /// Puts a copy into a delay queue. Returns when that is confirmed.
    pub(super) async fn delay(self: &Arc<Self>, message: Message, delay: Duration) {
        self.travel().await;
        self.broker().delay(message.number);
        let world = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            world.broker().returns(message);
        });
        self.travel().await;
    }

    /// Dead-letters a message. Returns when that is confirmed.
    pub(super) async fn dead_letter(&self, number: usize, reason: String) {
        self.travel().await;
        self.broker().dead.push((number, reason));
        self.travel().await;
    }
}

/// The way of one process to Close.
pub(super) struct Line {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
    pub(super) alive: Arc<AtomicBool>,
}

impl Line {
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response, CloseError> {
        if !self.alive.load(Ordering::Relaxed) {
            // What is left of a process that was killed does nothing more.
            return std::future::pending().await;
        }
        let world = &self.world;
        let creates = method == Method::POST && path != "data/search/";
        let fate = world.random(|random| world.plan.fate(random, creates, world.elapsed()));
        let (path_alone, _) = path.split_once('?').unwrap_or((path, ""));
        let written = body.filter(|_| path != "data/search/").map(ToString::to_string).unwrap_or_default();
        let call = format!("process {}: {method} {path_alone} {written}", self.process);
        world.tell(format_args!("{call}"));
        if fate.end == End::Unreachable {
            world.tell(format_args!("{call} does not reach Close"));
            return Err(CloseError::Unreachable("no route".into()));
        }
        let (answer, received) = oneshot::channel();
        let (world, method, path) = (Arc::clone(world), method, path.to_owned());
        tokio::spawn(carry(world, call, (method, path, body.cloned()), fate, answer));
        match tokio::time::timeout(TIMEOUT, received).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(CloseError::Transient(Fault::Timeout)),
        }
    }
}

impl Transport for Line {
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        Box::pin(self.exchange(method, path, body))
    }
}

/// Carries a call to Close, and what comes of it back.
async fn carry(
    world: Arc<World>,
    call: String,
    (method, path, body): (Method, String, Option<Value>),
    fate: Completion,
    answer: oneshot::Sender<Result<Response, CloseError>>,
) {
    tokio::time::sleep(fate.there).await;
    let arrives = fate.arrives && (fate.stubborn || !answer.is_closed());
    let reply = arrives.then(|| {
        let now = world.now();
        if let Some(body) = body.as_ref().filter(|_| method == Method::PUT) {
            world.changed(&path, body);
        }
        world.close().ask(KEY, method.as_str(), &path, body.as_ref(), now)
    });
    let status = reply.as_ref().map(|reply| reply.status);
    world.tell(format_args!("{call} -> {status:?}, {:?}", fate.end));
    if fate.end == End::Silence {
        // The sender gives up first.
        tokio::time::sleep(TIMEOUT * 2).await;
        return drop(answer);
    }
    tokio::time::sleep(fate.back).await;
    let answered = match (fate.end, reply) {
        (End::Answer, Some(reply)) => Ok(read(reply)),
        (End::Status(status), _) => Ok(plain(status)),
        (End::Answer | End::Lost | End::Unreachable | End::Silence, _) => {
            Err(CloseError::Transient(Fault::ConnectionLost))
        }
    };
    // Its sender may be gone.
    let _ = answer.send(answered);
}

fn read(reply: Reply) -> Response {
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

fn plain(status: u16) -> Response {
    let body = b"upstream connect error".to_vec();
    Response { status: StatusCode::from_u16(status).unwrap(), headers: HeaderMap::new(), body }
}
