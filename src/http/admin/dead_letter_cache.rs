//! Scans the dead letters of one destination for the pages, caches the results, and runs replays.
//!
//! A scan takes all dead letters off the queue for a moment. So only one scan runs at a time, and its result is cached
//! for some seconds. A scan finishes even if the browser has disconnected, so that no message stays unacked for longer
//! than needed. Of each group only the oldest letters are kept.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use moka::sync::Cache;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::amqp::{BrokerError, Settings, disconnect, topology};
use crate::dead_letters::edit;
use crate::dead_letters::filter::{Filter, Selection};
use crate::dead_letters::group::{Group, Groups};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::Progress;
use crate::dead_letters::replay::{ReplayRequest, replay};
use crate::dead_letters::scan::{Disposition, ScanSummary, find_by_id, scan};
use crate::http::admin::auth::Visitor;

/// How long a result is cached.
const TTL: Duration = Duration::from_secs(5);
/// The number of dead letters kept per group, oldest first.
pub(super) const KEPT_PER_GROUP: usize = 1000;
/// The number of ids in a log line.
const IDS_PER_LOG_LINE: usize = 100;
/// The number of opened dead letters that are cached.
const MAX_OPENED: u64 = 32;
/// The time-out for a scan. Another operator may hold the lock.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The result of a scan.
#[derive(Default)]
pub(super) struct Listing {
    pub(super) found: usize,
    /// A replay is running. The messages it holds are not counted.
    pub(super) replaying: bool,
    /// The most frequent first.
    pub(super) groups: Vec<Group>,
    /// The oldest letters of each group by fingerprint, without bodies.
    letters: HashMap<String, Vec<DeadLetter>>,
}

impl Listing {
    async fn scan(amqp: &Settings) -> Result<Self, BrokerError> {
        let (mut groups, mut letters) = (Groups::default(), HashMap::<String, Vec<DeadLetter>>::new());
        let keep = |letter: &DeadLetter| {
            groups.add(letter);
            let group = letters.entry(letter.fingerprint.clone()).or_default();
            group.push(letter.without_body());
            if group.len() == 2 * KEPT_PER_GROUP {
                keep_oldest(group);
            }
            Disposition::Return
        };
        let ScanSummary { found, replaying, .. } =
            scan(amqp, &Selection::default(), keep, &mut |_| {}).await?;
        letters.values_mut().for_each(keep_oldest);
        Ok(Self { found, replaying, groups: groups.sorted(), letters })
    }

    /// A group and its oldest dead letters.
    pub(super) fn group(&self, fingerprint: &str) -> Option<(&Group, &[DeadLetter])> {
        let group = self.groups.iter().find(|group| group.fingerprint == fingerprint)?;
        Some((group, self.letters.get(fingerprint).map(Vec::as_slice).unwrap_or_default()))
    }
}

fn keep_oldest(letters: &mut Vec<DeadLetter>) {
    letters.sort_by_key(|letter| letter.failed_at);
    letters.truncate(KEPT_PER_GROUP);
}

pub(super) struct JobRequest {
    pub(super) filter: Filter,
    /// What is replayed, for people and the log.
    pub(super) description: String,
    /// The name of the destination, for the log.
    pub(super) destination: Option<String>,
}

/// A replay that was started on the page.
pub(super) struct Job {
    /// [`JobRequest::description`].
    pub(super) description: String,
    pub(super) who: Arc<str>,
    pub(super) since: Timestamp,
    began: Instant,
    ended: OnceLock<Instant>,
    progress: watch::Receiver<Progress>,
    stop: CancellationToken,
    failure: OnceLock<String>,
}

impl Job {
    pub(super) fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    pub(super) fn is_over(&self) -> bool {
        self.progress.has_changed().is_err()
    }

    /// The error that ended the replay.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Finished messages per second.
    pub(super) fn rate(&self) -> f64 {
        let finished = u32::try_from(self.progress.borrow().finished()).unwrap_or(u32::MAX);
        let duration = self.ended.get().copied().unwrap_or_else(Instant::now) - self.began;
        f64::from(finished) / duration.as_secs_f64().max(1.0)
    }

    /// Sends no more messages.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }
}

/// The result of a load, with its times.
struct Loaded<T> {
    began: Instant,
    ended: Instant,
    result: Result<T, String>,
}

/// A value that is loaded again after a few seconds.
struct Cached<T> {
    loaded: Mutex<Option<Loaded<T>>>,
    /// Results of loads that started before this time are stale.
    changed: std::sync::Mutex<Option<Instant>>,
}

impl<T> Default for Cached<T> {
    fn default() -> Self {
        Self { loaded: Mutex::default(), changed: std::sync::Mutex::default() }
    }
}

impl<T: Clone> Cached<T> {
    /// Returns the cached value, or loads it. Concurrent callers share one load.
    async fn get_or_load(&self, load: impl Future<Output = Result<T, BrokerError>>) -> Result<T, String> {
        let mut cached = self.loaded.lock().await;
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let is_fresh = |loaded: &&Loaded<T>| {
            loaded.ended.elapsed() < TTL && changed.is_none_or(|changed| changed < loaded.began)
        };
        if let Some(loaded) = cached.as_ref().filter(is_fresh) {
            return loaded.result.clone();
        }
        let began = Instant::now();
        let result = load.await.map_err(|error| error.to_string());
        *cached = Some(Loaded { began, ended: Instant::now(), result: result.clone() });
        result
    }
}

pub(super) struct DeadLetterCache {
    listing: Cached<Arc<Listing>>,
    backlog: Cached<Option<u32>>,
    /// Recently opened dead letters, and ids that do not exist.
    opened: Cache<String, Result<Option<DeadLetter>, String>>,
    /// Ids for the next scan.
    wanted: std::sync::Mutex<BTreeSet<String>>,
    /// Held during a scan.
    scan_lock: Mutex<()>,
    job: std::sync::Mutex<Option<Arc<Job>>>,
    /// Stops replays.
    shutdown: CancellationToken,
    /// Replays that run in the background.
    jobs: TaskTracker,
}

impl DeadLetterCache {
    pub(super) fn new(shutdown: CancellationToken, jobs: TaskTracker) -> Self {
        let opened = Cache::builder().max_capacity(MAX_OPENED).time_to_live(TTL).build();
        Self {
            listing: Cached::default(),
            backlog: Cached::default(),
            opened,
            wanted: std::sync::Mutex::default(),
            scan_lock: Mutex::default(),
            job: std::sync::Mutex::default(),
            shutdown,
            jobs,
        }
    }

    /// The dead letters, at most some seconds old.
    ///
    /// # Errors
    /// The reason, for the operator.
    pub(super) async fn listing(self: &Arc<Self>, amqp: Arc<Settings>) -> Result<Arc<Listing>, String> {
        let cache = Arc::clone(self);
        run_detached(async move {
            let load = async {
                let _alone = cache.scan_lock.lock().await;
                Listing::scan(&amqp).await.map(Arc::new)
            };
            cache.listing.get_or_load(load).await
        })
        .await
    }

    /// The number of messages in the work queue, at most some seconds old. For a paused worker, which does not measure it.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(super) async fn backlog(self: &Arc<Self>, amqp: Arc<Settings>) -> Result<Option<u32>, String> {
        let cache = Arc::clone(self);
        run_detached(async move {
            let load = async {
                let connection = amqp.connect("close-sync page").await?;
                let depth = topology::depth(&connection, &amqp.queue).await;
                disconnect(&connection).await;
                Ok(depth?.map(|depth| depth.ready))
            };
            cache.backlog.get_or_load(load).await
        })
        .await
    }

    /// A dead letter with its body.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(super) async fn open(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        id: String,
    ) -> Result<Option<DeadLetter>, String> {
        if let Some(cached) = self.opened.get(&id) {
            return cached;
        }
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        let cache = Arc::clone(self);
        run_detached(async move {
            let _alone = cache.scan_lock.lock().await;
            // Another scan may have found it in the meantime.
            if let Some(cached) = cache.opened.get(&id) {
                return cached;
            }
            let wanted = std::mem::take(&mut *cache.wanted.lock().unwrap_or_else(PoisonError::into_inner));
            let ids = wanted.into_iter().chain([id.clone()]).collect();
            let found = find_by_id(&amqp, &ids, &mut |_| {}).await.map_err(|error| error.to_string());
            let result_of =
                |id: &String| found.as_ref().map(|(found, _)| found.get(id).cloned()).map_err(String::clone);
            for each in &ids {
                cache.opened.insert(each.clone(), result_of(each));
            }
            result_of(&id)
        })
        .await
    }

    /// Deletes the selected dead letters and logs their ids. Returns their number.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(super) async fn discard(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        selection: Selection,
        visitor: Visitor,
        destination: Option<String>,
    ) -> Result<usize, String> {
        let cache = Arc::clone(self);
        run_detached(async move {
            let mut ids = Vec::new();
            let discard = |letter: &DeadLetter| {
                ids.push(letter.id.clone());
                Disposition::Delete
            };
            let scanned = {
                let _alone = cache.scan_lock.lock().await;
                match edit::complete_interrupted(&amqp, &mut |_| {}).await {
                    Ok(()) => scan(&amqp, &selection, discard, &mut |_| {}).await,
                    Err(error) => Err(error),
                }
            };
            cache.invalidate();
            let action = if scanned.is_ok() { "discarded" } else { "perhaps discarded" };
            for ids in ids.chunks(IDS_PER_LOG_LINE) {
                visitor.audit(action, destination.as_deref(), Some(&ids.join(" ")));
            }
            scanned.map(|summary| summary.deleted).map_err(|error| error.to_string())
        })
        .await
    }

    /// Starts a replay. Returns `false` if another one is running.
    pub(super) fn replay(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        JobRequest { filter, description, destination }: JobRequest,
        visitor: &Visitor,
    ) -> bool {
        let mut current = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|job| !job.is_over()) {
            return false;
        }
        let request = ReplayRequest::from(Selection::from(filter));
        let (sender, progress) = watch::channel(Progress::default());
        let job = Arc::new(Job {
            description,
            who: Arc::clone(&visitor.who),
            since: Timestamp::now(),
            began: Instant::now(),
            ended: OnceLock::new(),
            progress,
            stop: self.shutdown.child_token(),
            failure: OnceLock::new(),
        });
        *current = Some(Arc::clone(&job));
        let cache = Arc::clone(self);
        self.jobs.spawn(async move {
            // The job is over once all senders are dropped, after the last update.
            let _sender = sender.clone();
            match replay(&amqp, request, sender, &job.stop).await {
                Ok((progress, _)) => tracing::info!(
                    event = "replay_ended",
                    destination,
                    about = job.description,
                    replayed = progress.sent,
                    failed_again = progress.failed_again(),
                    "replay started on the operator's page ended"
                ),
                Err(error) => {
                    tracing::error!(event = "replay_failed", destination, about = job.description, %error, "replay started on the operator's page failed");
                    let _ = job.failure.set(error.to_string());
                }
            }
            let _ = job.ended.set(Instant::now());
            cache.invalidate();
        });
        true
    }

    /// The last replay that was started on the page.
    pub(super) fn job(&self) -> Option<Arc<Job>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Discards the cached results.
    fn invalidate(&self) {
        *self.listing.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.opened.invalidate_all();
    }
}

/// Runs a task to its end, even if the caller stops waiting.
async fn run_detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, String>> + Send + 'static,
) -> Result<T, String> {
    match tokio::time::timeout(TIMEOUT, tokio::spawn(work)).await {
        Ok(Ok(done)) => done,
        Ok(Err(_)) => Err("A bug in close-sync; see the log.".to_owned()),
        Err(_) => Err(format!(
            "Reading the dead letters takes longer than {} s. Another operator may be using them, or RabbitMQ is slow. Reload the page.",
            TIMEOUT.as_secs()
        )),
    }
}
