//! One message: from the bytes of its body to what has to become of it. The spine of the program.
//!
//! [`Worker::prepare`] is pure: it decodes and maps, and settles at once what needs no Close.
//! [`Worker::run`] looks up, plans and writes, and starts over from the look-up when something
//! failed on the way, so that a try that was cut short is never repeated blindly.
//!
//! **The lag guard.** Search does not list what was created a moment ago. So before a record is
//! created because none was found, the answer must be younger than any creation it could have
//! missed: our own are remembered ([`crate::sync::id_cache`]); for those of a predecessor, and for a POST
//! whose answer was lost, the guard waits until search must have caught up, and looks again. The doubt
//! about a lost answer belongs to the keys, not to the message: the next message about the same person
//! has it too. An event without company means all of a person's Contacts, so it waits as well before it believes
//! to know them. About such a doubt the guard asks the event log, which knows of a creation at once; only that
//! it knows none proves nothing. In the normal case the guard costs nothing.
//!
//! **The stale guard** ([`crate::domain::staleness`]) leaves out what is older than what Close holds; **merging**
//! ([`crate::domain::merge`]) writes in one go what several messages about one person want.
//!
//! **The mapping** is resolved against what custom fields there are, and again when that may have
//! changed: from time to time, after a pause, and when Close says that a field does not exist. The
//! lookup fields stay those of the start.
//!
//! **A rehearsal** is a run that sends no writes; everything else is the same code.
//!
//! This module never sees lapin.

mod attempt;
pub mod circuit_breaker;
pub mod explain;
pub mod id_cache;
pub mod preflight;
#[cfg(test)]
mod properties;
pub mod record_locks;
mod resolver;
pub mod version_cache;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::close::stall_guard::StallGuard;
use crate::close::{Client, CloseError, Priority};
use crate::domain::decision::Decision;
use crate::domain::event::{Event, Malformed};
use crate::domain::mapping::{Anonymous, Desired, Key, KeyFields, Mapping, NoIdentity, Rules};
use crate::domain::record::FieldId;
use crate::domain::switches::Switches;
use crate::outcome::{DeadLetter, DelayCause, Failure, Outcome, PauseCause, Reason, Skip, Stage};
use crate::retry::{History, Policy};
use crate::sync::circuit_breaker::CircuitBreaker;
use crate::sync::id_cache::IdCache;
use crate::sync::preflight::PreflightError;
use crate::sync::record_locks::RecordLocks;
use crate::sync::version_cache::VersionCache;
use crate::telemetry::metrics::Metrics;

use attempt::{Attempts, Mode};

/// How messages are worked on.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What may be done.
    pub switches: Switches,
    /// How failures are retried.
    pub retry: Policy,
    /// Larger messages are refused, in bytes.
    pub max_message_bytes: usize,
    /// The longest a write may take to show up in search, calls still under way included.
    pub search_lag: Duration,
    /// The longest a delivery is held, waiting for budget included.
    pub hold: Duration,
    /// Whether messages about one person that wait in line are written in one go.
    pub merge: bool,
}

/// Works on messages. Clones share everything.
#[derive(Clone)]
pub struct Worker(Arc<Inner>);

struct Inner {
    settings: Settings,
    client: Client,
    rules: Rules,
    keys: KeyFields,
    mapping: RwLock<Arc<Mapping>>,
    /// When the mapping was resolved.
    resolved: Mutex<Instant>,
    known: IdCache,
    applied: VersionCache,
    claims: RecordLocks,
    breaker: std::sync::Mutex<CircuitBreaker>,
    last_failure: std::sync::Mutex<Option<String>>,
    metrics: Metrics,
}

/// A mapping resolved a moment ago is not resolved again because Close refuses a field.
const FRESH: Duration = Duration::from_secs(10);

/// A message that needs Close.
#[derive(Clone, Debug)]
pub struct Job {
    /// What it wants.
    desired: Desired,
    /// When it happened at the producer, for the metrics.
    event_time: Option<Timestamp>,
}

impl Job {
    /// What the message is about. Messages that share a key must run one after the other.
    pub fn keys(&self) -> Vec<Key> {
        self.desired.identity.keys()
    }

    /// What it wants.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }
}

/// The circumstances in which a message is worked on.
#[derive(Clone, Copy, Debug)]
pub struct RunContext {
    /// Attempts made before.
    pub attempts: u32,
    /// Who goes first when rate budget is short.
    pub priority: Priority,
    /// What others created before this may not show up in search yet.
    pub search_complete_from: Instant,
}

impl RunContext {
    /// The first attempt, with nobody else at work.
    pub fn first() -> Self {
        Self { attempts: 0, priority: Priority::Live, search_complete_from: Instant::now() }
    }
}

/// When a message came, for want of a better time of its event.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedAt {
    /// When it was published, if its properties say so.
    pub published: Option<Timestamp>,
    /// When it was received for the first time. No event is later than that, whatever it says.
    pub received: Timestamp,
}

impl ReceivedAt {
    /// A message that comes now.
    pub fn now() -> Self {
        Self { published: None, received: Timestamp::now() }
    }
}

/// What a message needs.
#[derive(Clone, Debug)]
pub enum Prepared {
    /// Close.
    Job(Job),
    /// Nothing more.
    Settled(Outcome),
}

impl Worker {
    /// A worker for one Close organization. `mapping` is what the rules were resolved to.
    pub fn new(
        settings: Settings,
        rules: &Rules,
        mapping: Mapping,
        client: Client,
        metrics: Metrics,
    ) -> Self {
        Self(Arc::new(Inner {
            settings,
            client,
            rules: rules.pinned(&mapping.keys),
            keys: mapping.keys.clone(),
            mapping: RwLock::new(Arc::new(mapping)),
            resolved: Mutex::new(Instant::now()),
            known: IdCache::default(),
            applied: VersionCache::default(),
            claims: RecordLocks::default(),
            breaker: std::sync::Mutex::default(),
            last_failure: std::sync::Mutex::default(),
            metrics,
        }))
    }

    /// The settings it works by.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// The mapping in force.
    pub fn mapping(&self) -> Arc<Mapping> {
        self.0.mapping.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first message of a session has come. Another worker may have been at work since the last one: what
    /// is remembered need not be all there is.
    pub fn forget_records(&self) {
        self.0.known.forget_records();
    }

    /// Whether the process has stood still: then nothing is sent any more.
    pub fn stall_guard(&self) -> &StallGuard {
        self.0.client.stall_guard()
    }

    /// Tells whether messages wait that could be worked on if there were more room.
    pub fn set_backlog(&self, waiting: bool) {
        self.0.client.set_backlog(waiting);
    }

    /// Consumption goes on after a pause: the first message tells whether it was long enough.
    pub fn half_open_breaker(&self) {
        self.breaker(CircuitBreaker::half_open);
    }

    /// What went wrong last, without anything of the message.
    pub fn last_failure(&self) -> Option<String> {
        self.0.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nothing is known against Close any more.
    pub fn close_breaker(&self) {
        self.breaker(CircuitBreaker::acquit);
    }

    /// Close did its part for a message.
    fn answered(&self) {
        self.breaker(|breaker| breaker.note(Instant::now(), true));
    }

    fn breaker<T>(&self, with: impl FnOnce(&mut CircuitBreaker) -> T) -> T {
        with(&mut self.0.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks Close whether it can be worked with, and what fields there are now.
    ///
    /// # Errors
    /// Everything that stands in the way; the mapping then stays as it is.
    pub async fn refresh_mapping(&self) -> Result<(), Vec<PreflightError>> {
        let mut resolved = self.0.resolved.lock().await;
        self.resolve(&mut resolved).await
    }

    async fn resolve(&self, resolved: &mut Instant) -> Result<(), Vec<PreflightError>> {
        let mapping = preflight::run(&self.0.client, &self.0.rules).await?.mapping;
        *resolved = Instant::now();
        let mut current = self.0.mapping.write().unwrap_or_else(PoisonError::into_inner);
        if (&mapping.unknown, mapping.misfits()) != (&current.unknown, current.misfits()) {
            log_mapping_problems(&mapping);
        }
        if mapping != **current {
            tracing::info!("the fields in Close have changed; the mapping follows");
            *current = Arc::new(mapping);
        }
        Ok(())
    }

    /// Close says that a field does not exist.
    async fn miss_field(&self) {
        let mut resolved = self.0.resolved.lock().await;
        if resolved.elapsed() > FRESH
            && let Err(obstacles) = self.resolve(&mut resolved).await
        {
            let obstacle = obstacles.first().map(ToString::to_string);
            tracing::warn!(obstacle, "the fields in Close cannot be looked at");
        }
    }

    /// Decodes and maps the body of a message. Pure.
    pub fn prepare(&self, body: &[u8], arrival: ReceivedAt) -> Prepared {
        let event = match Event::decode(body, self.0.settings.max_message_bytes) {
            Ok(event) => event,
            Err(malformed) => return Prepared::Settled(Outcome::Dead(undecodable(&malformed))),
        };
        let mapping = self.mapping();
        if let Some(reason) = mapping.not_for_close(&event) {
            return Prepared::Settled(Outcome::Skipped(Skip::Event(reason)));
        }
        match mapping.apply(&event) {
            Ok(mut desired) => {
                let at = event.time().or(arrival.published).unwrap_or(arrival.received);
                desired.at = Some(at.min(arrival.received));
                Prepared::Job(Job { desired, event_time: event.time() })
            }
            Err(NoIdentity::Anonymous) if mapping.anonymous() == Anonymous::Skip => {
                Prepared::Settled(Outcome::Skipped(Skip::Anonymous))
            }
            Err(no_identity) => Prepared::Settled(Outcome::Dead(DeadLetter {
                reason: Reason::NoIdentity,
                stage: Stage::Map,
                error: no_identity.to_string(),
                field: None,
                decision: None,
                said: None,
            })),
        }
    }

    /// Makes Close agree with a message.
    ///
    /// May be dropped at any moment: what was sent to Close may then still happen, which is why a new
    /// session has to come with a new `search_complete_from`.
    pub async fn run(&self, job: &Job, turn: RunContext) -> (Outcome, Decision) {
        let mut tries = self.tries(job, &[], turn, Mode::Write);
        let hold = self.0.settings.hold;
        let settled = tokio::time::timeout(hold, tries.retry_in_place()).await;
        let outcome = settled.unwrap_or_else(|_| {
            self.cut_short(job);
            Outcome::Delayed { level: 0, cause: DelayCause::RateLimited(hold) }
        });
        if let Outcome::Synced(_) = outcome {
            self.written(job);
        }
        tries.conclude(outcome)
    }

    /// Whether `next`, which comes right behind `first`, may be worked on with it.
    pub fn can_merge(&self, first: &Job, next: &Job) -> bool {
        let Settings { merge, switches, .. } = &self.0.settings;
        *merge && next.desired.goes_along(&first.desired, *switches)
    }

    /// Makes Close agree with several messages at once, each of which goes along with the first. Tried once:
    /// `None` when anything stood in the way; then they have to be run one after the other.
    ///
    /// May be dropped like [`Worker::run`].
    pub async fn run_merged(&self, jobs: &[&Job], turn: RunContext) -> Option<Vec<(Outcome, Decision)>> {
        let (first, others) = jobs.split_first()?;
        let mut tries = self.tries(first, others, turn, Mode::Write);
        let Ok(ended) = tokio::time::timeout(self.0.settings.hold, tries.once()).await else {
            self.cut_short(first);
            return None;
        };
        let done = ended
            .inspect_err(
                |failure| tracing::debug!(error = %failure.error, "failed together, going on one by one"),
            )
            .ok()?;
        self.answered();
        self.0.metrics.merged(others.len());
        let outcomes: Vec<_> = std::iter::once(tries.conclude(done.outcome)).chain(done.others).collect();
        for (job, (outcome, _)) in jobs.iter().zip(&outcomes) {
            if let Outcome::Synced(_) = outcome {
                self.written(job);
            }
        }
        Some(outcomes)
    }

    /// A creation may have been dropped under way: its doubt begins now.
    fn cut_short(&self, job: &Job) {
        let Inner { known, client, settings, .. } = &*self.0;
        if known.doubtful_until(&job.keys()).is_some() {
            known.doubt(&job.keys(), Instant::now() + client.timeout() + settings.search_lag);
        }
    }

    fn written(&self, job: &Job) {
        if let Some(time) = job.event_time {
            self.0.metrics.written(time);
        }
    }

    /// What [`Worker::run`] would do now, short of what Close would say to it. Writes nothing.
    pub async fn dry_run(&self, job: &Job) -> (Outcome, Decision) {
        let mut tries = self.tries(job, &[], RunContext::first(), Mode::Rehearse);
        let outcome = tries.retry_in_place().await;
        tries.conclude(outcome)
    }

    fn tries<'a>(&'a self, job: &'a Job, others: &[&'a Job], turn: RunContext, mode: Mode) -> Attempts<'a> {
        Attempts {
            worker: self,
            client: self.0.client.for_message(turn.priority),
            desired: &job.desired,
            others: others.iter().map(|job| &job.desired).collect(),
            keys: job.keys(),
            turn,
            mode,
            decision: Decision::default(),
        }
    }

    /// A failure may be about this message or about everything. When it could be the latter, ask.
    async fn systemic(&self, failure: &Failure, history: History, last_try: bool) -> Option<PauseCause> {
        let keys = &self.0.keys;
        let about_keys = |path: &[String]| {
            let last = path.last().and_then(|name| name.strip_prefix("custom."));
            last.is_some()
                && [&keys.company, &keys.user].iter().any(|key| key.as_ref().map(FieldId::as_str) == last)
        };
        let suspicious = match &failure.error {
            CloseError::Forbidden => true,
            CloseError::Rejected(rejection) => {
                failure.stage == Stage::LookUp || rejection.fields.iter().any(|field| about_keys(&field.path))
            }
            // Before a message pays for it.
            CloseError::NotFound => history.looked_again,
            CloseError::Transient(_) => last_try,
            CloseError::Unauthorized | CloseError::PlanLimit | CloseError::Unreachable(_) => false,
        };
        if !suspicious {
            return None;
        }
        // An answer that says neither is no reason to give the message up.
        let obstacles = self.refresh_mapping().await.err()?;
        Some(obstacles.first().and_then(PreflightError::pause_cause).unwrap_or(PauseCause::Unreachable))
    }
}

/// Says which rules have no field, and which constants their fields do not take.
pub fn log_mapping_problems(mapping: &Mapping) {
    for unknown in &mapping.unknown {
        tracing::error!(setting = unknown.setting, "{}", unknown.description());
    }
    for misfit in mapping.misfits() {
        tracing::error!(
            setting = misfit.setting,
            "{} is left out: {} (`close-sync check` lists what fits)",
            misfit.value,
            misfit.reason.description()
        );
    }
}

fn undecodable(malformed: &Malformed) -> DeadLetter {
    DeadLetter {
        reason: Reason::Malformed,
        stage: Stage::Decode,
        error: malformed.to_string(),
        field: Some(malformed.label().to_owned()),
        decision: None,
        said: None,
    }
}
