//! Syncs one message: from the bytes of its body to its outcome.
//!
//! [`Worker::prepare`] is pure: it decodes and maps, and settles messages that need no call to Close. [`Worker::run`] looks up,
//! plans and writes. When a step fails, the next attempt starts over with the look-up, so that a write whose
//! outcome is unknown is never repeated blindly.
//!
//! **The lag of search.** Search does not show records that were created a moment ago, and at times lags for hours. What
//! this worker and those before it created is cached ([`id_cache`]); a [`journal`] outlives them. A POST whose answer was
//! lost is a pending creation of its keys: until it is proven whether it happened ([`lag_guard`]), messages with one of
//! the keys create nothing. An event without a company changes all Contacts of a person, so it waits as well.
//!
//! **Reads by id** may be stale, and may leave out Contacts and lists ([`crate::sync::recent_records`]). A write that could
//! undo what a person entered follows a read that is at most a second old (`attempt::freshness`).
//!
//! **Repeats** ([`crate::domain::repeat`]) of what was applied last are settled without a call to Close.
//!
//! **Large Leads.** A Lead with many Contacts is read without them. Search and the id cache show which Contacts may be the
//! person's, and these are read by their ids.
//!
//! **Staleness** ([`crate::domain::staleness`]) skips values that are older than what Close holds. **Merging**
//! ([`crate::domain::merge`]) writes consecutive messages about one person at once.
//!
//! **Read-back** ([`crate::domain::readback`]) learns from Close's answers how it keeps what it is sent, so that a value
//! that comes back as another is not sent again with every event.
//!
//! **The mapping** is resolved against the custom fields in Close, and again when they may have changed:
//! periodically, after a pause, and when Close says that a field does not exist. The lookup fields stay those
//! of the start.
//!
//! **A dry run** ([`Rehearsal`]) is the same code without the writes, on a copy of what the worker knows. It leaves no trace
//! in memory, locks or journal, and waits neither for a lock nor for search.
//!
//! This module does not use lapin.

mod applied_cache;
mod attempt;
pub mod circuit_breaker;
mod context;
pub mod explain;
pub mod id_cache;
mod job;
pub mod journal;
pub mod lag_guard;
mod layered;
mod learn;
mod lookups;
pub mod preflight;
#[cfg(test)]
pub(crate) mod properties;
pub mod readback_cache;
pub mod recent_records;
pub mod record_locks;
mod resolver;
pub mod search_lag;
pub mod version_cache;
mod write_log;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use strum::VariantArray;

use crate::close::stall_guard::StallGuard;
use crate::close::{Client, Clock, Priority};
use crate::domain::decision::Decision;
use crate::domain::encoding::Payload;
use crate::domain::event::{Event, Malformed};
use crate::domain::journal::{ChangeKind, Entry, KeyHash};
use crate::domain::mapping::{Anonymous, Mapping, NoIdentity};
use crate::domain::repeat::Part;
use crate::outcome::{DeadLetter, Effect, Outcome, Reason, Skip, Stage};
use crate::sync::applied_cache::Repeat;
use crate::sync::circuit_breaker::CircuitBreaker;
use crate::sync::preflight::PreflightError;

pub use context::{Dependencies, log_mapping_problems};
pub use job::{Job, Prepared, ReceivedAt, RunContext, Settings};
pub use lag_guard::LONGEST_SEARCH_LAG;

use attempt::{Attempts, GapWait};
use context::Context;
use write_log::Stamp;

/// Syncs messages to one Close organization. Clones share everything.
#[derive(Clone)]
pub struct Worker(Arc<Context>);

impl Worker {
    pub fn new(dependencies: Dependencies<'_>) -> Self {
        Self(Arc::new(Context::new(dependencies)))
    }

    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// The mapping in force.
    pub fn mapping(&self) -> Arc<Mapping> {
        self.0.mapping()
    }

    /// Another worker may have been active. What searches have shown so far may not be all.
    pub fn search_again(&self) {
        self.0.id_cache.search_again();
        self.0.applied_cache.forget_all();
    }

    /// Without a journal, what other workers have done up to now is unknown.
    pub fn forget(&self) {
        self.forget_changes(self.settings().search_lag);
        self.remembers_from(self.now());
    }

    /// What other workers created up to now is unknown. Search shows it, at the latest when `after` has passed.
    pub fn forget_changes(&self, after: Duration) {
        for kind in ChangeKind::VARIANTS {
            self.0.lag_guard.forget(*kind, self.now(), after);
        }
    }

    /// What older events than this have written may be unknown. The time may be by the clock of another worker, which may
    /// be ahead.
    pub fn remembers_from(&self, at: Timestamp) {
        self.0.version_cache.remembers_from(at.min(self.now()));
    }

    /// What events of this time or later have written is known. `None`: it is not known of any that is missing.
    pub fn remembered_from(&self) -> Option<Timestamp> {
        self.0.version_cache.remembered_from()
    }

    /// The same for changes that were written down before a time, which may be by the clock of another worker. Returns whether
    /// search may not show them all.
    pub fn forget_changes_before(&self, at: Timestamp) -> bool {
        // They were sent after that.
        let until = at.min(self.now()).saturating_add(self.0.client.timeout()).unwrap_or(Timestamp::MAX);
        for kind in ChangeKind::VARIANTS {
            self.0.lag_guard.forget_up_to(*kind, until);
        }
        Duration::try_from(self.now().duration_since(until)).unwrap_or_default() < LONGEST_SEARCH_LAG
    }

    pub fn now(&self) -> Timestamp {
        self.0.now()
    }

    /// The time at Close.
    pub fn clock(&self) -> &Clock {
        self.0.client.clock()
    }

    /// Learns what another worker has written to the journal.
    pub fn learn(&self, entry: Entry) {
        self.0.learn(entry);
    }

    /// All that a successor has to know, as entries of the journal.
    pub fn checkpoint(&self) -> impl Iterator<Item = Entry> {
        self.0.checkpoint()
    }

    /// How far search lags, if it is known.
    pub fn search_lag(&self, kind: ChangeKind) -> Option<Duration> {
        self.0.search_lag.current(kind)
    }

    /// How many creations have no answer and search need not show them yet.
    pub fn unanswered_creations(&self) -> usize {
        self.0.lag_guard.unanswered()
    }

    /// Stops calls after the process has stood still.
    pub fn stall_guard(&self) -> &StallGuard {
        self.0.client.stall_guard()
    }

    /// Whether messages wait that could run with more concurrency.
    pub fn set_backlog(&self, waiting: bool) {
        self.0.client.set_backlog(waiting);
    }

    /// Half-opens the circuit breaker when consumption resumes after a pause.
    pub fn half_open_breaker(&self) {
        self.0.breaker(CircuitBreaker::half_open);
    }

    /// Closes the circuit breaker.
    pub fn close_breaker(&self) {
        self.0.breaker(CircuitBreaker::close);
    }

    /// The last failure, without personal data.
    pub fn last_failure(&self) -> Option<String> {
        self.0.last_failure()
    }

    /// Runs the preflight check and resolves the mapping against the current fields in Close.
    ///
    /// # Errors
    /// Every failed check; the mapping then stays as it is.
    pub async fn refresh_mapping(&self) -> Result<(), Vec<PreflightError>> {
        self.0.refresh_mapping().await
    }

    /// Decodes and maps the body of a message. Pure.
    pub fn prepare<'a>(&self, body: impl Into<Payload<'a>>, received_at: ReceivedAt) -> Prepared {
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
                desired.at = Some(received_at.event_time(event.time()));
                desired.is_replay = received_at.is_replay;
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
                response: None,
            })),
        }
    }

    /// Syncs a message, with retries in place.
    ///
    /// May be dropped at any moment. Calls that were sent may still take effect: a creation stays pending ([`lag_guard`]).
    pub async fn run(&self, job: &Job, run: RunContext) -> (Outcome, Decision) {
        let parts = Part::of(&job.desired);
        if let Some(repeated) = self.repeat(job, &parts, &run) {
            self.settle_repeats(&[job], &run).await;
            return repeated;
        }
        self.0.applied_cache.forget(parts.iter());
        let mut attempts = self.attempts(job, &[], run);
        let outcome = attempts.within_hold().await;
        attempts.run.journal.stored().await;
        self.report_freshness(job, &outcome);
        attempts.conclude(outcome)
    }

    /// Settles an event that says what was last applied. Operators replay events because something went wrong, so these are
    /// compared with Close.
    fn repeat(&self, job: &Job, parts: &[Part], run: &RunContext) -> Option<(Outcome, Decision)> {
        let Context { applied_cache, version_cache, write_log, settings, .. } = &*self.0;
        if run.priority == Priority::Replay {
            return None;
        }
        let memories = (version_cache, write_log);
        let Repeat { records, entries } =
            applied_cache.repeat(&job.desired, parts, memories, settings.recheck)?;
        run.journal.append(entries);
        Some((Outcome::Synced(Effect::Unchanged), Decision::repeat(records)))
    }

    async fn settle_repeats(&self, jobs: &[&Job], run: &RunContext) {
        run.journal.stored().await;
        for job in jobs {
            self.0.metrics.repeated();
            self.report_freshness(job, &Outcome::Synced(Effect::Unchanged));
        }
    }

    /// Whether `next`, which directly follows `first`, can share its write.
    pub fn can_merge(&self, first: &Job, next: &Job) -> bool {
        let Settings { merge, switches, .. } = &self.0.settings;
        *merge && next.desired.can_merge_with(&first.desired, *switches)
    }

    /// Syncs several messages with one write; each can be merged with the first. One attempt only: after `None`
    /// the caller runs them one by one.
    ///
    /// May be dropped like [`Worker::run`].
    pub async fn run_merged(&self, jobs: &[&Job], run: RunContext) -> Option<Vec<(Outcome, Decision)>> {
        let (first, others) = jobs.split_first()?;
        let parts: Vec<Vec<Part>> = jobs.iter().map(|job| Part::of(&job.desired)).collect();
        let each = jobs.iter().zip(&parts);
        if let Some(repeated) = each.map(|(job, parts)| self.repeat(job, parts, &run)).collect() {
            self.settle_repeats(jobs, &run).await;
            return Some(repeated);
        }
        self.0.applied_cache.forget(parts.iter().flatten());
        let mut attempts = self.attempts(first, others, run);
        let result = tokio::time::timeout(self.0.settings.hold, attempts.run_once()).await.ok()?;
        attempts.run.journal.stored().await;
        let completed = result
            .inspect_err(
                |failure| tracing::debug!(error = %failure.error, "merged write failed, processing messages one by one"),
            )
            .ok()?;
        self.0.record_success();
        self.0.metrics.merged(others.len());
        let first = attempts.conclude(completed.outcome);
        let outcomes: Vec<_> = std::iter::once(first).chain(completed.merged).collect();
        jobs.iter().zip(&outcomes).for_each(|(job, (outcome, _))| self.report_freshness(job, outcome));
        Some(outcomes)
    }

    /// What the worker knows now, for dry runs.
    pub fn rehearsal(&self) -> Rehearsal {
        Rehearsal(Self(Arc::new(self.0.for_rehearsal())))
    }

    fn report_freshness(&self, job: &Job, outcome: &Outcome) {
        if let (Outcome::Synced(_), Some(time)) = (outcome, job.event_time) {
            self.0.metrics.written(time);
        }
    }

    fn attempts<'a>(&'a self, job: &'a Job, others: &[&'a Job], run: RunContext) -> Attempts<'a, Client> {
        let keys = job.keys();
        Attempts {
            context: &self.0,
            client: self.0.client.for_message(run.priority),
            desired: &job.desired,
            others: others.iter().map(|job| &job.desired).collect(),
            known: self.0.id_cache.known(&KeyHash::of_all(&keys)),
            keys,
            gap_wait: GapWait::default(),
            run,
            stage: Stage::LookUp,
            decision: Decision::default(),
            looked_at: Stamp::default(),
            own_writes: Vec::new(),
        }
    }
}

/// Dry runs on a copy of what a worker knows. They share what they look up.
pub struct Rehearsal(Worker);

impl Rehearsal {
    /// The mapping in force.
    pub fn mapping(&self) -> Arc<Mapping> {
        self.0.mapping()
    }

    /// The same as [`Worker::prepare`].
    pub fn prepare<'a>(&self, body: impl Into<Payload<'a>>, received_at: ReceivedAt) -> Prepared {
        self.0.prepare(body, received_at)
    }

    /// Returns what [`Worker::run`] would do now, except for errors that only a write shows. Writes nothing. Compares each event
    /// with Close, also one that the worker would settle as a repeat.
    pub async fn run(&self, job: &Job) -> (Outcome, Decision) {
        let mut attempts = self.0.attempts(job, &[], RunContext::first());
        let outcome = attempts.retry_in_place().await;
        attempts.conclude(outcome)
    }
}

fn undecodable(malformed: &Malformed) -> DeadLetter {
    DeadLetter {
        reason: Reason::Malformed,
        stage: Stage::Decode,
        error: malformed.to_string(),
        field: Some(malformed.label().to_owned()),
        decision: None,
        response: None,
    }
}
