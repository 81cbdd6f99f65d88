//! The dead letters of one destination, as several pages and several operators work on them.
//!
//! A look takes all dead letters off the queue for a moment, so there is one at a time, and what it found is kept for
//! some seconds: loading a page again is no work. A look goes on when whoever asked has gone, so that no message is in
//! hand for longer than needed. Of each group only the oldest are kept.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use moka::sync::Cache;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::amqp::{BrokerError, Settings, disconnect, topology};
use crate::dead_letters::edit;
use crate::dead_letters::filter::{Filter, Group, Groups, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::progress::Progress;
use crate::dead_letters::replay::{ReplayRequest, replay};
use crate::dead_letters::scan::{Disposition, ScanSummary, find_by_id, scan};
use crate::http::admin::AppState;
use crate::http::admin::auth::Visitor;

/// How long what a look found is good for.
const FRESH: Duration = Duration::from_secs(5);
/// Dead letters of a group that are kept, oldest first.
pub(crate) const KEPT: usize = 1000;
/// Ids in a line of the log.
const IDS_A_LINE: usize = 100;
/// Dead letters that were opened, to be opened again.
const OPENED: u64 = 32;
/// How long a look is waited for: another operator may be at it.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a look found.
#[derive(Default)]
pub(crate) struct Listing {
    /// Dead letters in the queue.
    pub(crate) found: usize,
    /// A replay is under way, and what it has in hand is not among them.
    pub(crate) replaying: bool,
    /// What they have in common, the most frequent first.
    pub(crate) groups: Vec<Group>,
    /// The oldest of each group, without their bodies.
    letters: HashMap<String, Vec<DeadLetter>>,
}

impl Listing {
    async fn look(amqp: &Settings) -> Result<Self, BrokerError> {
        let (mut groups, mut letters) = (Groups::default(), HashMap::<String, Vec<DeadLetter>>::new());
        let keep = |letter: &DeadLetter| {
            groups.add(letter);
            let alike = letters.entry(letter.fingerprint.clone()).or_default();
            alike.push(letter.without_body());
            if alike.len() == 2 * KEPT {
                oldest(alike);
            }
            Disposition::Return
        };
        let ScanSummary { found, replaying, .. } =
            scan(amqp, &Selection::default(), keep, &mut |_| {}).await?;
        letters.values_mut().for_each(oldest);
        Ok(Self { found, replaying, groups: groups.sorted(), letters })
    }

    /// A group, and the oldest of its dead letters.
    pub(crate) fn group(&self, fingerprint: &str) -> Option<(&Group, &[DeadLetter])> {
        let group = self.groups.iter().find(|group| group.fingerprint == fingerprint)?;
        Some((group, self.letters.get(fingerprint).map(Vec::as_slice).unwrap_or_default()))
    }
}

fn oldest(letters: &mut Vec<DeadLetter>) {
    letters.sort_by_key(|letter| letter.failed_at);
    letters.truncate(KEPT);
}

/// What somebody wants to replay.
pub(crate) struct Wish {
    pub(crate) filter: Filter,
    /// The same for people.
    pub(crate) what: String,
    /// The name of the destination, for the log.
    pub(crate) destination: Option<String>,
}

/// A replay that somebody started here.
pub(crate) struct Job {
    /// What is replayed, for people.
    pub(crate) what: String,
    pub(crate) who: Arc<str>,
    pub(crate) since: Timestamp,
    began: Instant,
    ended: OnceLock<Instant>,
    progress: watch::Receiver<Progress>,
    stop: CancellationToken,
    failure: OnceLock<String>,
}

impl Job {
    /// How far it has come.
    pub(crate) fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.progress.has_changed().is_err()
    }

    /// Why it ended, if that was RabbitMQ's doing.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Dead letters with an end a second, as long as it lasted so far.
    pub(crate) fn rate(&self) -> f64 {
        let settled = u32::try_from(self.progress.borrow().ended()).unwrap_or(u32::MAX);
        let lasted = self.ended.get().copied().unwrap_or_else(Instant::now) - self.began;
        f64::from(settled) / lasted.as_secs_f64().max(1.0)
    }

    /// Nothing more is sent.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}

/// A look, and what it found, or why it found nothing.
struct Look<T> {
    began: Instant,
    ended: Instant,
    found: Result<T, String>,
}

/// What was found a moment ago.
struct Kept<T> {
    found: Mutex<Option<Look<T>>>,
    /// What was looked for before is not true any more.
    changed: std::sync::Mutex<Option<Instant>>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { found: Mutex::default(), changed: std::sync::Mutex::default() }
    }
}

impl<T: Clone> Kept<T> {
    /// It, or what `look` finds if that was too long ago. Who comes meanwhile waits for the same look.
    async fn or(&self, look: impl Future<Output = Result<T, BrokerError>>) -> Result<T, String> {
        let mut kept = self.found.lock().await;
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let is_fresh =
            |look: &&Look<T>| look.ended.elapsed() < FRESH && changed.is_none_or(|at| at < look.began);
        if let Some(look) = kept.as_ref().filter(is_fresh) {
            return look.found.clone();
        }
        let began = Instant::now();
        let found = look.await.map_err(|error| error.to_string());
        *kept = Some(Look { began, ended: Instant::now(), found: found.clone() });
        found
    }
}

/// The tools and what lies there.
pub(crate) struct DeadLetterCache {
    listing: Kept<Arc<Listing>>,
    backlog: Kept<Option<u32>>,
    /// Those that were opened a moment ago, or were not there.
    opened: Cache<String, Result<Option<DeadLetter>, String>>,
    /// Ids that the next look is to open.
    wanted: std::sync::Mutex<BTreeSet<String>>,
    /// Whoever has it looks.
    look: Mutex<()>,
    job: std::sync::Mutex<Option<Arc<Job>>>,
}

impl Default for DeadLetterCache {
    fn default() -> Self {
        let opened = Cache::builder().max_capacity(OPENED).time_to_live(FRESH).build();
        Self {
            listing: Kept::default(),
            backlog: Kept::default(),
            opened,
            wanted: std::sync::Mutex::default(),
            look: Mutex::default(),
            job: std::sync::Mutex::default(),
        }
    }
}

impl DeadLetterCache {
    /// What is in the queue, as of some seconds ago at most.
    ///
    /// # Errors
    /// Why that cannot be told, for people.
    pub(crate) async fn listing(self: &Arc<Self>, amqp: Arc<Settings>) -> Result<Arc<Listing>, String> {
        let bench = Arc::clone(self);
        finish(async move {
            let look = async {
                let _alone = bench.look.lock().await;
                Listing::look(&amqp).await.map(Arc::new)
            };
            bench.listing.or(look).await
        })
        .await
    }

    /// Messages in the work queue, as of some seconds ago at most: for when nobody consumes and counts them.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(crate) async fn backlog(self: &Arc<Self>, amqp: Arc<Settings>) -> Result<Option<u32>, String> {
        let bench = Arc::clone(self);
        finish(async move {
            let look = async {
                let connection = amqp.connect("close-sync page").await?;
                let depth = topology::depth(&connection, &amqp.queue).await;
                disconnect(&connection).await;
                Ok(depth?.map(|depth| depth.ready))
            };
            bench.backlog.or(look).await
        })
        .await
    }

    /// One dead letter, whole.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(crate) async fn open(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        id: String,
    ) -> Result<Option<DeadLetter>, String> {
        if let Some(known) = self.opened.get(&id) {
            return known;
        }
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        let bench = Arc::clone(self);
        finish(async move {
            let _alone = bench.look.lock().await;
            // Somebody else's look may have found it meanwhile.
            if let Some(known) = bench.opened.get(&id) {
                return known;
            }
            let wanted = std::mem::take(&mut *bench.wanted.lock().unwrap_or_else(PoisonError::into_inner));
            let ids = wanted.into_iter().chain([id.clone()]).collect();
            let found = find_by_id(&amqp, &ids, &mut |_| {}).await.map_err(|error| error.to_string());
            let of =
                |id: &String| found.as_ref().map(|(found, _)| found.get(id).cloned()).map_err(String::clone);
            for each in &ids {
                bench.opened.insert(each.clone(), of(each));
            }
            of(&id)
        })
        .await
    }

    /// Deletes those meant, and notes in the log which they were. Tells how many.
    ///
    /// # Errors
    /// Those of [`DeadLetterCache::listing`].
    pub(crate) async fn discard(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        which: Selection,
        visitor: Visitor,
        destination: Option<String>,
    ) -> Result<usize, String> {
        let bench = Arc::clone(self);
        finish(async move {
            let mut ids = Vec::new();
            let discard = |letter: &DeadLetter| {
                ids.push(letter.id.clone());
                Disposition::Delete
            };
            let sifted = {
                let _alone = bench.look.lock().await;
                match edit::complete_interrupted(&amqp, &mut |_| {}).await {
                    Ok(()) => scan(&amqp, &which, discard, &mut |_| {}).await,
                    Err(error) => Err(error),
                }
            };
            bench.forget();
            let what = if sifted.is_ok() { "discarded" } else { "perhaps discarded" };
            for ids in ids.chunks(IDS_A_LINE) {
                visitor.audit(what, destination.as_deref(), Some(&ids.join(" ")));
            }
            sifted.map(|sifted| sifted.removed).map_err(|error| error.to_string())
        })
        .await
    }

    /// Begins to replay those meant, until all are or close-sync stops. `false` if a replay is under way already.
    pub(crate) fn replay(
        self: &Arc<Self>,
        amqp: Arc<Settings>,
        Wish { filter, what, destination }: Wish,
        visitor: &Visitor,
        office: &AppState,
    ) -> bool {
        let mut current = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|job| !job.is_over()) {
            return false;
        }
        let order = ReplayRequest::from(Selection::from(filter));
        let (told, progress) = watch::channel(Progress::default());
        let job = Arc::new(Job {
            what,
            who: Arc::clone(&visitor.who),
            since: Timestamp::now(),
            began: Instant::now(),
            ended: OnceLock::new(),
            progress,
            stop: office.0.shutdown.child_token(),
            failure: OnceLock::new(),
        });
        *current = Some(Arc::clone(&job));
        let bench = Arc::clone(self);
        office.0.jobs.spawn(async move {
            // It is not over before everything is told.
            let _until = told.clone();
            match replay(&amqp, order, told, &job.stop).await {
                Ok((progress, _)) => tracing::info!(
                    destination,
                    about = job.what,
                    replayed = progress.sent,
                    failed_again = progress.failed_again(),
                    "the replay begun on the page has ended"
                ),
                Err(error) => {
                    tracing::error!(destination, about = job.what, %error, "the replay begun on the page has failed");
                    let _ = job.failure.set(error.to_string());
                }
            }
            let _ = job.ended.set(Instant::now());
            bench.forget();
        });
        true
    }

    /// The last replay that was begun here.
    pub(crate) fn job(&self) -> Option<Arc<Job>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was found is not true any more.
    fn forget(&self) {
        *self.listing.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.opened.invalidate_all();
    }
}

/// Does it, whether or not whoever asked for it waits.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, String>> + Send + 'static,
) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, tokio::spawn(work)).await {
        Ok(Ok(done)) => done,
        Ok(Err(_)) => Err("A defect of close-sync, which the log tells of.".to_owned()),
        Err(_) => Err(format!(
            "It takes longer than {} s: another operator is at the dead letters, or RabbitMQ is slow. Load the page again.",
            PATIENCE.as_secs()
        )),
    }
}
