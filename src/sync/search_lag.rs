//! Measures how far search lags behind, without calls of its own: the condition for one change of ours rides along in the
//! searches for other messages, until a search shows the change. Then the youngest change since rides along.
//!
//! What is shown proves to [`LagGuard`] that search shows older changes too. A person may delete the record meanwhile, so a
//! younger change takes its place after a while, and after a longer while the next time.
//!
//! A worker that lacks proof creates nothing, so it may have nothing new to watch. Then it watches a change that it
//! remembers, from the journal too. And because its messages may look for other kinds of records, it searches for the change
//! itself, once a minute (`need_proof`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use strum::VariantArray;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::close::{Client, Clock, CloseError, Lookup, Priority, Records};
use crate::domain::journal::{ChangeKind, KeyHash, RecordId};
use crate::domain::mapping::{Identity, Key, KeyFields};
use crate::domain::matching::{company_of, user_of};
use crate::domain::record::{Channel, fold_email};
use crate::sync::id_cache::{Change, IdCache};
use crate::sync::lag_guard::LagGuard;

const KINDS: usize = ChangeKind::VARIANTS.len();

/// The first patience with a change that search does not show. The record may be gone. It doubles each time.
const PATIENCE: Duration = Duration::from_mins(10);

/// Between two calls of our own for a proof.
const PROOF_INTERVAL: Duration = Duration::from_mins(1);
/// Remembered changes whose records are read at once. Most records exist, and one is enough.
const REMEMBERED_AT_ONCE: usize = 5;

pub struct SearchLag {
    watcher: Arc<Watcher>,
    /// Aborted when the worker is gone.
    tasks: Mutex<JoinSet<()>>,
}

struct Watcher {
    state: Mutex<[Kind; KINDS]>,
    /// By kind: search for the change that rides along.
    search_now: [Notify; KINDS],
    guard: Arc<LagGuard>,
    id_cache: IdCache,
    clock: Clock,
}

/// The changes of one kind.
#[derive(Debug)]
struct Kind {
    /// A change rides along.
    is_watching: bool,
    /// The youngest change since.
    next: Option<Watched>,
    /// The age of the last change that search has shown, at the last search that did not show it. The first search that
    /// shows it may come much later than it could have.
    measured: Option<Duration>,
    /// The age of the change that rides along, at the last search that did not show it.
    missed: Option<Duration>,
    /// When a change was watched for longer than this, the youngest takes its place.
    patience: Duration,
    /// The remembered changes up to this one were tried.
    tried: Option<(Timestamp, RecordId)>,
    /// When a call of our own for a proof was last made.
    proof_sought: Option<Instant>,
}

impl Kind {
    /// Creations wait for proof. Returns what to do for it, at most once in a while.
    fn seek_proof(&mut self) -> Option<Seek> {
        if self.proof_sought.is_some_and(|at| at.elapsed() < PROOF_INTERVAL) {
            return None;
        }
        self.proof_sought = Some(Instant::now());
        let seek = if self.is_watching { Seek::Search } else { Seek::Remembered };
        self.is_watching = true;
        Some(seek)
    }

    /// A search has shown the change that rides along.
    fn shown(&mut self) {
        let missed = self.missed.take();
        (self.measured, self.patience) = (Some(missed.unwrap_or_default()), PATIENCE);
    }

    /// A search has not shown the change, which is this old and was watched for that long. Whether to give up on it, because
    /// there is a younger one, or another one that `is_remembered`.
    fn missed(&mut self, age: Option<Duration>, watched: Duration, is_remembered: bool) -> bool {
        self.missed = age;
        let gives_up = (self.next.is_some() || is_remembered) && watched > self.patience;
        if gives_up {
            self.patience = self.patience.saturating_mul(2);
        }
        gives_up
    }

    /// The lag, at least.
    fn lag(&self) -> Option<Duration> {
        self.measured.max(self.missed)
    }
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            is_watching: false,
            next: None,
            measured: None,
            missed: None,
            patience: PATIENCE,
            tried: None,
            proof_sought: None,
        }
    }
}

/// How to get a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seek {
    /// Search for the change that rides along.
    Search,
    /// Watch a remembered change.
    Remembered,
}

#[derive(Debug)]
struct Watched {
    key: Key,
    lookup: Lookup,
    record: RecordId,
    change: Change,
    /// It was found in memory, so another one can take its place.
    is_remembered: bool,
}

impl SearchLag {
    pub(crate) fn new(guard: Arc<LagGuard>, id_cache: IdCache, clock: Clock) -> Self {
        let (state, search_now) = (Mutex::default(), Default::default());
        let watcher = Arc::new(Watcher { state, search_now, guard, id_cache, clock });
        Self { watcher, tasks: Mutex::default() }
    }

    /// The lag of search for changes of this kind, at least: the age of the last change at the last search that did not show
    /// it. `None` before the first measurement. Without searches it stays as it is.
    pub fn current(&self, kind: ChangeKind) -> Option<Duration> {
        self.watcher.with(kind, |kind| kind.lag())
    }

    /// A record got a key. Watches until search shows it, unless an earlier change is watched.
    pub(crate) fn watch(
        &self,
        client: &Client,
        keys: &KeyFields,
        key: Key,
        record: RecordId,
        change: Change,
    ) {
        let Some(lookup) = lookup(&key, keys).filter(|_| change.shows_lag(&key)) else { return };
        let is_idle = self.watcher.with(change.kind, |kind| {
            kind.next = Some(Watched { key, lookup, record, change, is_remembered: false });
            !kind.is_watching
        });
        if is_idle {
            let (watcher, client) = (Arc::clone(&self.watcher), client.clone());
            self.spawn(async move { while watcher.watch_next(&client, change.kind).await {} });
        }
    }

    /// Creations wait until search has shown a change of this kind, of `from` or later. Searches for the change that rides
    /// along, or for one in memory.
    pub(crate) fn need_proof(&self, client: &Client, keys: &KeyFields, kind: ChangeKind, from: Timestamp) {
        let watcher = Arc::clone(&self.watcher);
        match watcher.with(kind, Kind::seek_proof) {
            None => {}
            Some(Seek::Search) => watcher.search_now[kind as usize].notify_one(),
            Some(Seek::Remembered) => {
                let (keys, client) = (keys.clone(), client.for_message(Priority::default()));
                self.spawn(async move {
                    let found = watcher.find_remembered(&client, &keys, kind, from).await;
                    if found.is_some() {
                        watcher.search_now[kind as usize].notify_one();
                    }
                    // One of its own, from meanwhile, is younger.
                    watcher.with(kind, |kind| kind.next = kind.next.take().or(found));
                    while watcher.watch_next(&client, kind).await {}
                });
            }
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

impl Watcher {
    fn with<T>(&self, kind: ChangeKind, with: impl FnOnce(&mut Kind) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize])
    }

    fn age(&self, change: Change) -> Option<Duration> {
        Duration::try_from(self.clock.now().duration_since(change.at)).ok()
    }

    /// Watches the youngest change until search shows it. False if there is none.
    async fn watch_next(&self, client: &Client, kind: ChangeKind) -> bool {
        let next = self.with(kind, |kind| {
            let next = kind.next.take();
            kind.is_watching = next.is_some();
            next
        });
        let Some(Watched { key, lookup, record, change, is_remembered }) = next else { return false };
        let began = Instant::now();
        // A new record is in the index with all its keys.
        let by_any = kind == ChangeKind::Creation;
        loop {
            let ids = tokio::select! {
                biased;
                ids = client.ride_along(lookup.clone(), by_any) => ids,
                () = self.search_now[kind as usize].notified() => client.look_up(lookup.clone(), by_any).await,
            };
            let Some(ids) = ids else { continue };
            if ids.iter().any(|id| id == record.as_str()) {
                self.id_cache.seen(&key, &record, true);
                self.guard.shown(kind, change.at, Instant::now());
                self.with(kind, Kind::shown);
                return true;
            }
            if self.with(kind, |kind| kind.missed(self.age(change), began.elapsed(), is_remembered)) {
                return true;
            }
        }
    }

    /// The oldest change of this time or later that search has not shown to this worker: search shows it first. After those
    /// that were tried before, or from the beginning. Memory has only hashes of its keys, so the record says them.
    async fn find_remembered(
        &self,
        client: &Client,
        keys: &KeyFields,
        kind: ChangeKind,
        from: Timestamp,
    ) -> Option<Watched> {
        let tried = self.with(kind, |kind| kind.tried.take());
        let is_new = |change: Change, record: &RecordId| {
            tried.as_ref().is_none_or(|(at, tried)| (change.at, record) > (*at, tried))
        };
        let changes = self.id_cache.unseen().filter(|(change, ..)| change.kind == kind && change.at >= from);
        let changes = changes.filter(|(change, record, _)| is_new(*change, record));
        for (change, record, hashes) in changes.take(REMEMBERED_AT_ONCE) {
            self.with(kind, |kind| kind.tried = Some((change.at, record.clone())));
            // Deleted, or no answer: the next one serves as well.
            let Ok(in_close) = keys_of(client, keys, &record).await else { continue };
            let is_remembered = |key: &Key| hashes.contains(&KeyHash::of(key)) && change.shows_lag(key);
            let watched = in_close.into_iter().find(is_remembered).and_then(|key| {
                let lookup = lookup(&key, keys)?;
                Some(Watched { key, lookup, record, change, is_remembered: true })
            });
            if watched.is_some() {
                return watched;
            }
        }
        None
    }
}

/// The keys that a record has in Close.
async fn keys_of(client: &Client, keys: &KeyFields, record: &RecordId) -> Result<Vec<Key>, CloseError> {
    Ok(match record {
        RecordId::Lead(id) => {
            let lead = client.lead(id, &Identity::default(), keys).await?.lead;
            company_of(&lead, keys).map(|id| Key::Company(id.to_owned())).into_iter().collect()
        }
        RecordId::Contact(id) => {
            let contact = client.contact(id).await?;
            let user = user_of(&contact, keys).map(|id| Key::User(id.to_owned()));
            let emails =
                contact.list(Channel::Email).iter().map(|entry| Key::Email(fold_email(&entry.value)));
            user.into_iter().chain(emails).collect()
        }
    })
}

fn lookup(key: &Key, keys: &KeyFields) -> Option<Lookup> {
    Some(match key {
        Key::Company(id) => Lookup::Lead { field: keys.company.clone()?, company_id: id.clone() },
        Key::User(id) => Lookup::Contact { user: Some((keys.user.clone()?, id.clone())), email: None },
        Key::Email(email) => Lookup::Contact { user: None, email: Some(email.clone()) },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use jiff::Timestamp;
    use reqwest::Method;
    use serde_json::{Value, json};

    use super::*;
    use crate::close::{Response, Transport};
    use crate::domain::matching::tests::keys;
    use crate::domain::record::{ContactId, LeadId};

    /// Close with a Contact of user `old`, and no other one.
    #[derive(Clone, Default)]
    struct Script {
        /// The ids of Contacts that were read.
        reads: Arc<Mutex<Vec<String>>>,
        /// Search shows the Contact.
        shows: Arc<AtomicBool>,
    }

    impl Transport for Script {
        fn send<'a>(
            &'a self,
            _: Method,
            path: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let old = json!({"id": "cont_old", "lead_id": "lead_1", "emails": [], "custom.cf_user": "old"});
            let (status, body) = match path.split(['/', '?']).collect::<Vec<_>>()[..] {
                ["contact", id, ..] => {
                    self.reads.lock().unwrap().push(id.to_owned());
                    let missing = json!({"error": "Empty query: Contact matching query does not exist."});
                    if id == "cont_old" { (200, old) } else { (404, missing) }
                }
                ["event", ref rest @ ..] => {
                    let object = rest.last().and_then(|query| query.split("object_id=").nth(1));
                    let object = object.and_then(|rest| rest.split('&').next());
                    (200, json!({"data": [{"object_id": object, "action": "deleted"}]}))
                }
                _ if self.shows.load(Ordering::Relaxed) => (200, json!({"data": [old]})),
                _ => (200, json!({"data": []})),
            };
            std::future::ready(Ok(Response::with_status(status, body))).boxed()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_may_create_nothing_watches_a_change_that_it_remembers() {
        let clock = Clock::new(|| at(1000));
        let timeout = Duration::from_secs(30);
        let guard = Arc::new(LagGuard::new(Duration::from_secs(20), timeout, clock.clone()));
        let id_cache = IdCache::default();
        let keys = keys();
        // The last one is younger than needed.
        for (second, user) in [(169, "early"), (170, "gone"), (210, "old"), (300, "young")] {
            let id = RecordId::Contact(ContactId::new(format!("cont_{user}")));
            let change = Change { kind: ChangeKind::Creation, at: at(second) };
            id_cache.changed(&[KeyHash::of(&Key::User(user.into()))], &id, change);
        }
        guard.forget_up_to(ChangeKind::Creation, at(150));
        assert_eq!(guard.lacks_proof(), [(ChangeKind::Creation, at(170))]);

        let script = Script::default();
        let client = Client::with_transport(script.clone(), timeout, 1.0, |_| {});
        let lag = SearchLag::new(Arc::clone(&guard), id_cache, clock);
        let need_proof = || lag.need_proof(&client, &keys, ChangeKind::Creation, at(170));
        need_proof();
        need_proof();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(*script.reads.lock().unwrap(), ["cont_gone", "cont_old"]);
        assert_eq!(guard.lacks_proof().len(), 1, "search does not show it yet");

        // No message makes a search that it could ride in.
        script.shows.store(true, Ordering::Relaxed);
        need_proof();
        tokio::time::sleep(PROOF_INTERVAL).await;
        assert_eq!(guard.lacks_proof().len(), 1, "not searched for again so soon");
        need_proof();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(guard.lacks_proof(), []);
        assert_eq!(script.reads.lock().unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn all_remembered_changes_get_their_turn() {
        let clock = Clock::new(|| at(1000));
        let timeout = Duration::from_secs(30);
        let guard = Arc::new(LagGuard::new(Duration::ZERO, timeout, clock.clone()));
        let (id_cache, keys) = (IdCache::default(), keys());
        for number in 0..7 {
            let id = RecordId::Contact(ContactId::new(format!("cont_{number}")));
            let change = Change { kind: ChangeKind::Creation, at: at(200 + number) };
            id_cache.changed(&[KeyHash::of(&Key::User(number.to_string()))], &id, change);
        }
        let script = Script::default();
        let client = Client::with_transport(script.clone(), timeout, 1.0, |_| {});
        let lag = SearchLag::new(guard, id_cache, clock);
        for _ in 0..4 {
            lag.need_proof(&client, &keys, ChangeKind::Creation, at(170));
            tokio::time::sleep(PROOF_INTERVAL).await;
        }
        let all: Vec<String> = (0..7).map(|number| format!("cont_{number}")).collect();
        assert_eq!(*script.reads.lock().unwrap(), all);
    }

    #[test]
    fn the_lag_is_what_searches_have_missed_at_least() {
        let mut kind = Kind::default();
        assert_eq!(kind.lag(), None);
        assert!(!kind.missed(Some(Duration::from_secs(40)), Duration::ZERO, false));
        assert_eq!(kind.lag(), Some(Duration::from_secs(40)), "before it is shown");
        kind.shown();
        assert_eq!(kind.lag(), Some(Duration::from_secs(40)));
        // The next search comes an hour later.
        kind.shown();
        assert_eq!(kind.lag(), Some(Duration::from_secs(0)));
    }

    #[test]
    fn a_change_that_is_never_shown_gives_way_to_a_younger_one_more_and_more_slowly() {
        let mut kind = Kind::default();
        let missed = |kind: &mut Kind, minutes| kind.missed(None, Duration::from_mins(minutes), false);
        assert!(!missed(&mut kind, 11), "no younger one takes its place");
        assert!(kind.missed(None, Duration::from_mins(11), true), "another one can be read");
        kind.patience = PATIENCE;
        let record = RecordId::Lead(LeadId::new("lead_1"));
        let lookup = Lookup::Contact { user: None, email: None };
        let change = Change { kind: ChangeKind::Creation, at: Timestamp::UNIX_EPOCH };
        let key = Key::Company("acme".into());
        kind.next = Some(Watched { key, lookup, record, change, is_remembered: false });
        let gives_up = [9, 11, 11, 21, 39, 41].map(|minutes| missed(&mut kind, minutes));
        assert_eq!(gives_up, [false, true, false, true, false, true]);
        kind.shown();
        assert!(missed(&mut kind, 11), "from the beginning");
    }
}
