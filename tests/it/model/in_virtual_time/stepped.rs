//! The network as a list of steps that have not happened yet. The exploration of a small world decides which comes next.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use close_sync::close::{CloseError, Fault, Response};
use close_sync::domain::journal::{Batch, Entry};
use reqwest::Method;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::broker::Channel;
use super::world::{TIMEOUT, World};

/// Something that is on its way from a worker.
pub(super) struct Step {
    pub(super) process: usize,
    alive: Arc<AtomicBool>,
    sent: Instant,
    /// The same for the same step of another schedule.
    pub(super) label: String,
    action: Action,
}

enum Action {
    Call(Method, String, Option<Value>, oneshot::Sender<Result<Response, CloseError>>),
    /// To the journal.
    Append(Vec<u8>, oneshot::Sender<()>),
    Ack(Channel, u64),
}

/// What becomes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// It arrives, and so does the answer.
    Whole,
    /// It takes effect, and the answer is lost.
    AnswerLost,
    /// The connection is lost. It may still take effect.
    Late,
}

/// What its worker is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It goes on when the step happens.
    Awaited,
    /// Nobody waits for it. It may happen or not.
    Orphan,
    /// Nobody waits for it, and it changes nothing, or too much: an update that arrives late overwrites later ones, and
    /// no client can prevent that.
    Void,
}

/// The steps that may happen.
#[derive(Default)]
pub(super) struct Steps {
    steps: Mutex<Vec<Step>>,
    /// What each operation of the journal creates.
    creations: Mutex<HashMap<Uuid, String>>,
}

impl Steps {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.steps.lock().unwrap()
    }

    fn push(&self, process: usize, alive: &Arc<AtomicBool>, action: Action) {
        let label = format!("{process}: {}", self.label(&action));
        let (alive, sent) = (Arc::clone(alive), Instant::now());
        self.lock().push(Step { process, alive, sent, label, action });
    }

    fn label(&self, action: &Action) -> String {
        match action {
            Action::Call(method, path, body, _) => {
                // The event log is asked for a time.
                let path = path.split_once("date_updated").map_or(path.as_str(), |(path, _)| path);
                format!("{method} {path} {}", body.as_ref().unwrap_or(&Value::Null))
            }
            Action::Append(body, _) => {
                let entries = Batch::decode(body).expect("a message of the journal").entries;
                let entries: Vec<_> = entries.iter().map(|entry| self.entry_label(entry)).collect();
                format!("append {entries:?}")
            }
            Action::Ack(_, tag) => format!("ack {tag}"),
        }
    }

    /// An entry without times and operations.
    fn entry_label(&self, entry: &Entry) -> String {
        let mut creations = self.creations.lock().unwrap();
        match entry {
            Entry::Start { .. } => "start".to_owned(),
            Entry::Creating { operation, keys, lead, .. } => {
                let what = format!("{keys:?} {lead}");
                let label = format!("creating {what}");
                let before = creations.values().filter(|creation| creation.starts_with(&what)).count();
                creations.entry(*operation).or_insert(format!("{what} {before}"));
                label
            }
            Entry::Settled { operation } => format!("settled {:?}", creations.get(operation)),
            Entry::Keys { record, keys, change, .. } => format!("keys {record:?} {keys:?} {change:?}"),
            Entry::Written { record, at, fields, .. } => format!("written {record:?} {at} {fields:?}"),
            Entry::Forgotten { change, .. } => format!("forgotten {change:?}"),
            Entry::CheckpointBegin { .. } | Entry::CheckpointEnd { .. } => "checkpoint".to_owned(),
        }
    }

    pub(super) async fn call(
        &self,
        process: usize,
        alive: &Arc<AtomicBool>,
        (method, path, body): (Method, &str, Option<&Value>),
    ) -> Result<Response, CloseError> {
        let (answer, answered) = oneshot::channel();
        self.push(process, alive, Action::Call(method, path.to_owned(), body.cloned(), answer));
        match tokio::time::timeout(TIMEOUT, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(CloseError::Transient(Fault::Timeout)),
        }
    }

    pub(super) async fn append(&self, process: usize, alive: &Arc<AtomicBool>, body: Vec<u8>) {
        let (stored, is_stored) = oneshot::channel();
        self.push(process, alive, Action::Append(body, stored));
        if is_stored.await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(super) fn ack(&self, process: usize, alive: &Arc<AtomicBool>, channel: Channel, tag: u64) {
        self.push(process, alive, Action::Ack(channel, tag));
    }
}

fn is_search(path: &str) -> bool {
    path == "data/search/"
}

impl Step {
    pub(super) fn kind(&self) -> Kind {
        let is_alive = self.alive.load(Ordering::Relaxed);
        match &self.action {
            Action::Call(.., answer) if is_alive && !answer.is_closed() => Kind::Awaited,
            Action::Call(..) if self.creates() && self.sent.elapsed() <= TIMEOUT => Kind::Orphan,
            Action::Append(_, stored) if is_alive && !stored.is_closed() => Kind::Awaited,
            Action::Append(..) if self.sent.elapsed() <= TIMEOUT => Kind::Orphan,
            Action::Ack(..) if is_alive => Kind::Awaited,
            Action::Call(..) | Action::Append(..) | Action::Ack(..) => Kind::Void,
        }
    }

    pub(super) fn is_search(&self) -> bool {
        matches!(&self.action, Action::Call(_, path, ..) if is_search(path))
    }

    fn creates(&self) -> bool {
        matches!(&self.action, Action::Call(Method::POST, path, ..) if !is_search(path))
    }

    /// How its answer may be lost. A creation has no [`Way::AnswerLost`]: [`Way::Late`], followed by its effect, is the same.
    pub(super) fn losses(&self) -> &'static [Way] {
        match (self.is_write(), self.creates()) {
            (true, true) => &[Way::Late],
            (true, false) => &[Way::AnswerLost, Way::Late],
            (false, _) => &[],
        }
    }

    /// How long it has been on its way.
    pub(super) fn age(&self) -> Duration {
        self.sent.elapsed()
    }

    pub(super) fn is_write(&self) -> bool {
        matches!(&self.action, Action::Call(method, path, ..) if method != Method::GET && !is_search(path))
    }

    pub(super) fn is_append(&self) -> bool {
        matches!(&self.action, Action::Append(..))
    }

    /// Whether it is the start of a session.
    pub(super) fn starts(&self) -> bool {
        self.has_entry(|entry| matches!(entry, Entry::Start { .. }))
    }

    /// Whether a creation waits for it.
    pub(super) fn announces(&self) -> bool {
        self.has_entry(|entry| matches!(entry, Entry::Creating { .. }))
    }

    fn has_entry(&self, is_it: impl Fn(&Entry) -> bool) -> bool {
        let Action::Append(body, _) = &self.action else { return false };
        Batch::decode(body).is_ok_and(|batch| batch.entries.iter().any(is_it))
    }

    pub(super) fn is_ack(&self) -> bool {
        matches!(&self.action, Action::Ack(..))
    }

    /// Lets it happen. Returns what its worker learns, without times. A step on its way to a [`Way::Late`] effect stays.
    pub(super) fn happen(self, way: Way, world: &World) -> u64 {
        let mut learnt = DefaultHasher::new();
        (&self.label, way).hash(&mut learnt);
        let Self { process, alive, sent, label, action } = self;
        match action {
            Action::Call(method, path, body, answer) => {
                let lost = || Err(CloseError::Transient(Fault::ConnectionLost));
                let reply = match way {
                    Way::Whole => {
                        let response = world.answer(&method, &path, body.as_ref());
                        let mut content = serde_json::from_slice(&response.body).unwrap_or_default();
                        without_times(&mut content);
                        (response.status, content.to_string()).hash(&mut learnt);
                        Ok(response)
                    }
                    Way::AnswerLost => {
                        world.answer(&method, &path, body.as_ref());
                        lost()
                    }
                    Way::Late => lost(),
                };
                let _ = answer.send(reply);
                if way == Way::Late {
                    let (answer, _) = oneshot::channel();
                    let action = Action::Call(method, path, body, answer);
                    world.steps().expect("a network of steps").lock().push(Self {
                        process,
                        alive,
                        sent,
                        label,
                        action,
                    });
                }
            }
            Action::Append(body, stored) => {
                world.journal.append(body);
                let _ = stored.send(());
            }
            Action::Ack(channel, tag) => world.ack_now(channel, tag),
        }
        learnt.finish()
    }
}

/// What Close holds, without times.
pub(super) fn records(world: &World) -> String {
    let mut leads = world.close().leads();
    leads.iter_mut().for_each(without_times);
    Value::from(leads).to_string()
}

fn without_times(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|key, _| !key.starts_with("date_"));
            members.values_mut().for_each(without_times);
        }
        Value::Array(items) => items.iter_mut().for_each(without_times),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
