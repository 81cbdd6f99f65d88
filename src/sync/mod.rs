//! Syncs one message: from the bytes of its body to its outcome.
//!
//! [`Worker::prepare`] is pure: it decodes and maps, and settles messages that need no call to Close. [`Worker::run`] looks up,
//! plans and writes. When a step fails, the next attempt starts over with the look-up, so that a write whose
//! outcome is unknown is never repeated blindly.
//!
//! **The lag guard.** Search does not show records that were created a moment ago. Before a record is created
//! because none was found, the search must be recent enough to show every earlier creation. Our own creations
//! are cached ([`crate::sync::id_cache`]). For those of a previous worker, and for a POST whose answer was lost,
//! the guard waits until search must have caught up, and looks again. A lost answer is a pending creation of the
//! keys, not of the message, so it also delays the next message about the same person. An event without a
//! company changes all Contacts of a person, so it waits as well. For a pending creation the guard first reads the
//! event log, which shows a creation at once; not finding it there proves nothing.
//!
//! **Reads by id** may be stale, and may leave out Contacts and lists ([`crate::sync::recent_records`]). A write that could
//! undo what a person entered follows a read that is at most a second old (`attempt::freshness`).
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
//! **A dry run** sends no writes; everything else is the same code.
//!
//! This module does not use lapin.

mod attempt;
pub mod circuit_breaker;
mod context;
pub mod explain;
pub mod id_cache;
mod job;
mod lookups;
pub mod preflight;
#[cfg(test)]
pub(crate) mod properties;
pub mod readback_cache;
pub mod recent_records;
pub mod record_locks;
mod resolver;
pub mod version_cache;

use std::sync::Arc;

use tokio::time::Instant;

use crate::close::Client;
use crate::close::stall_guard::StallGuard;
use crate::domain::decision::Decision;
use crate::domain::encoding::Payload;
use crate::domain::event::{Event, Malformed};
use crate::domain::mapping::{Anonymous, Mapping, NoIdentity};
use crate::outcome::{DeadLetter, DelayCause, Outcome, Reason, Skip, Stage};
use crate::sync::circuit_breaker::CircuitBreaker;
use crate::sync::preflight::PreflightError;

pub use context::{Dependencies, log_mapping_problems};
pub use job::{Job, Prepared, ReceivedAt, RunContext, Settings};

use attempt::{Attempts, Mode};
use context::Context;

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

    /// Clears the cached ids when a session receives its first message: another worker may have been active since.
    pub fn forget_records(&self) {
        self.0.id_cache.forget_records();
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
                let at = event.time().or(received_at.published).unwrap_or(received_at.received);
                desired.at = Some(at.min(received_at.received));
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
    /// May be dropped at any moment. Calls that were sent may still take effect, so a new session needs a new
    /// `search_complete_from`.
    pub async fn run(&self, job: &Job, run: RunContext) -> (Outcome, Decision) {
        let mut attempts = self.attempts(job, &[], run, Mode::Write);
        let hold = self.0.settings.hold;
        let settled = tokio::time::timeout(hold, attempts.retry_in_place()).await;
        let outcome = settled.unwrap_or_else(|_| {
            self.extend_pending_creation(job);
            Outcome::Delayed { level: 0, cause: DelayCause::RateLimited(hold) }
        });
        self.report_freshness(job, &outcome);
        attempts.conclude(outcome)
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
        let mut attempts = self.attempts(first, others, run, Mode::Write);
        let Ok(result) = tokio::time::timeout(self.0.settings.hold, attempts.run_once()).await else {
            self.extend_pending_creation(first);
            return None;
        };
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

    /// Returns what [`Worker::run`] would do now, except for errors that only a write shows. Writes nothing.
    pub async fn dry_run(&self, job: &Job) -> (Outcome, Decision) {
        let mut attempts = self.attempts(job, &[], RunContext::first(), Mode::DryRun);
        let outcome = attempts.retry_in_place().await;
        attempts.conclude(outcome)
    }

    /// A creation that was dropped while it was sent may still happen: its time to appear in search starts now.
    fn extend_pending_creation(&self, job: &Job) {
        let Context { id_cache, client, settings, .. } = &*self.0;
        if id_cache.pending_until(&job.keys()).is_some() {
            let until = Instant::now() + client.timeout() + settings.search_lag;
            id_cache.add_pending_creation(&job.keys(), until);
        }
    }

    fn report_freshness(&self, job: &Job, outcome: &Outcome) {
        if let (Outcome::Synced(_), Some(time)) = (outcome, job.event_time) {
            self.0.metrics.written(time);
        }
    }

    fn attempts<'a>(
        &'a self,
        job: &'a Job,
        others: &[&'a Job],
        run: RunContext,
        mode: Mode,
    ) -> Attempts<'a, Client> {
        Attempts {
            context: &self.0,
            client: self.0.client.for_message(run.priority),
            desired: &job.desired,
            others: others.iter().map(|job| &job.desired).collect(),
            keys: job.keys(),
            run,
            mode,
            decision: Decision::default(),
        }
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
