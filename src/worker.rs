//! One message: from the bytes of its body to what has to become of it. The spine of the program.
//!
//! [`Worker::prepare`] is pure: it decodes and maps, and settles at once what needs no Close.
//! [`Worker::run`] looks up, plans and writes, and starts over from the look-up when something
//! failed on the way, so that a try that was cut short is never repeated blindly.
//!
//! **The lag guard.** Search does not list what was created a moment ago. So before a record is
//! created because none was found, the answer must be younger than any creation it could have
//! missed: our own are remembered ([`crate::known`]); for those of a predecessor, and for a POST
//! whose answer was lost, the guard waits until search must have caught up, and looks again. The doubt
//! about a lost answer belongs to the keys, not to the message: the next message about the same person
//! has it too. In the normal case the guard costs nothing.
//!
//! This module never sees lapin.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::claims::Claims;
use crate::close::{Client, CloseError};
use crate::domain::event::{Event, Malformed};
use crate::domain::mapping::{Desired, Dropped, Key, Mapping};
use crate::domain::matching::Found;
use crate::domain::plan::{Step, Switches, plan};
use crate::domain::record::{ContactId, FieldId};
use crate::known::Known;
use crate::metrics::Metrics;
use crate::outcome::{DeadLetter, Effect, Failure, Outcome, PauseCause, Reason, Skip, Stage};
use crate::preflight;
use crate::resolve::{Resolved, Resolver};
use crate::retry::{self, History, Pauses, Policy, Verdict};

/// How messages are worked on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What goes where.
    pub mapping: Mapping,
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
}

/// Works on messages. Clones share everything.
#[derive(Clone)]
pub struct Worker(Arc<Inner>);

struct Inner {
    settings: Settings,
    client: Client,
    known: Known,
    claims: Claims,
    metrics: Metrics,
}

/// A message that needs Close.
#[derive(Clone, Debug)]
pub struct Job {
    /// What it wants.
    desired: Desired,
    /// When it happened at the producer, for the metrics.
    event_time: Option<jiff::Timestamp>,
}

impl Job {
    /// What the message is about. Messages that share a key must run one after the other.
    pub fn keys(&self) -> Vec<Key> {
        self.desired.identity.keys()
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
    /// A worker for one Close organization.
    pub fn new(settings: Settings, client: Client, metrics: Metrics) -> Self {
        Self(Arc::new(Inner {
            settings,
            client,
            known: Known::default(),
            claims: Claims::default(),
            metrics,
        }))
    }

    /// The client it works with, for probes.
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// The settings it works by.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Decodes and maps the body of a message. Pure.
    pub fn prepare(&self, body: &[u8]) -> Prepared {
        let event = match Event::decode(body, self.0.settings.max_message_bytes) {
            Ok(event) => event,
            Err(malformed) => return Prepared::Settled(Outcome::Dead(undecodable(&malformed))),
        };
        if let Some(reason) = event.not_for_close() {
            return Prepared::Settled(Outcome::Skipped(Skip::Event(reason)));
        }
        match self.0.settings.mapping.apply(&event) {
            Ok(desired) => Prepared::Job(Job { desired, event_time: event.time() }),
            Err(no_identity) => Prepared::Settled(Outcome::Dead(DeadLetter {
                reason: Reason::NoIdentity,
                stage: Stage::Map,
                error: no_identity.to_string(),
                field: None,
            })),
        }
    }

    /// Makes Close agree with a message. `attempts` were made before; what others created before
    /// `trusted_from` may not show up in search yet.
    ///
    /// May be dropped at any moment: what was sent to Close may then still happen, which is why a new
    /// session has to come with a new `trusted_from`.
    pub async fn run(&self, job: &Job, attempts: u32, trusted_from: Instant) -> Outcome {
        let hold = self.0.settings.hold;
        let settled = tokio::time::timeout(hold, self.retry_in_place(job, attempts, trusted_from)).await;
        settled.unwrap_or_else(|_| {
            // A creation may have been cut short: its doubt begins now.
            let Inner { known, client, settings, .. } = &*self.0;
            if known.doubtful_until(&job.keys()).is_some() {
                known.doubt(&job.keys(), Instant::now() + client.timeout() + settings.search_lag);
            }
            let cause = format!("held for {} s, waiting for Close's rate limits", hold.as_secs());
            Outcome::Delayed { level: 0, charged: false, cause }
        })
    }

    async fn retry_in_place(&self, job: &Job, attempts: u32, trusted_from: Instant) -> Outcome {
        let policy = &self.0.settings.retry;
        let mut pauses = Pauses::in_place(policy);
        let sync = Sync { worker: self, desired: &job.desired, keys: job.keys(), trusted_from };
        let mut history = History { attempts, looked_again: false };
        loop {
            let failure = match sync.once().await {
                Ok(outcome) => {
                    if let (Outcome::Synced(_), Some(time)) = (&outcome, job.event_time) {
                        self.0.metrics.written(time);
                    }
                    return outcome;
                }
                Err(failure) => failure,
            };
            let pause = pauses.next_pause();
            if let Some(cause) = self.systemic(&failure, history, pause.is_none()).await {
                return Outcome::Paused(cause);
            }
            match retry::settle(&failure, history, pause, policy) {
                Verdict::Settle(outcome) => return outcome,
                Verdict::Again(pause) => {
                    tracing::debug!(stage = failure.stage.label(), error = %failure.error, ?pause, "trying again");
                    self.0.metrics.retried(failure.stage);
                    history.looked_again |= failure.error == CloseError::NotFound;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// A failure may be about this message or about everything. When it could be the latter, ask.
    async fn systemic(&self, failure: &Failure, history: History, last_try: bool) -> Option<PauseCause> {
        let keys = &self.0.settings.mapping.keys;
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
        let obstacle = preflight::run(&self.0.client, keys).await.err()?;
        Some(obstacle.pause_cause().unwrap_or(PauseCause::Unreachable))
    }
}

fn undecodable(malformed: &Malformed) -> DeadLetter {
    DeadLetter { reason: Reason::Malformed, stage: Stage::Decode, error: malformed.to_string(), field: None }
}

/// The tries of one message.
struct Sync<'a> {
    worker: &'a Worker,
    desired: &'a Desired,
    keys: Vec<Key>,
    trusted_from: Instant,
}

impl Sync<'_> {
    /// Looks up, plans, writes; stops at the first failure.
    async fn once(&self) -> Result<Outcome, Failure> {
        let Inner { settings, client, known, claims, metrics } = &*self.worker.0;
        let close = Resolver { client, known, keys: &settings.mapping.keys, switches: &settings.switches };
        let (resolved, plan, _claim) = loop {
            let asked = Instant::now();
            let look_up = |error| Failure { stage: Stage::LookUp, error };
            let resolved = close.resolve(self.desired).await.map_err(look_up)?;
            let plan = plan(self.desired, &resolved.found, settings.switches);
            let trusted_from = known.doubtful_until(&self.keys).max(Some(self.trusted_from));
            // An adopted Lead was chosen because the company was not found: that needs proof as well.
            let needs_proof = resolved.found.adopts() || plan.creates();
            if let Some(trusted_from) = trusted_from.filter(|from| needs_proof && asked < *from) {
                metrics.lag_guard_waited();
                tokio::time::sleep_until(trusted_from.into()).await;
                continue;
            }
            if let Some(claim) = claims.take(plan.records(), asked).await {
                break (resolved, plan, claim);
            }
        };

        let mut effect = Effect::Unchanged;
        let mut dropped: Vec<Dropped> = self.desired.dropped.clone();
        for step in &plan.steps {
            let done = self.write(step, &resolved, &mut dropped).await;
            effect = effect.min(done.map_err(|error| Failure { stage: Stage::Write, error })?);
        }
        metrics.decided(&dropped, &plan.refused, resolved.conflicts);
        for dropped in &dropped {
            tracing::info!(field = dropped.field, reason = dropped.reason.label(), "a value was left out");
        }
        Ok(match plan.refused.first() {
            Some(refusal) if effect == Effect::Unchanged => Outcome::Skipped(Skip::Switch(*refusal)),
            Some(_) | None => Outcome::Synced(effect),
        })
    }

    /// Carries out one step. When Close refuses optional values, once more without them.
    async fn write(
        &self,
        step: &Step,
        resolved: &Resolved,
        dropped: &mut Vec<Dropped>,
    ) -> Result<Effect, CloseError> {
        let refused = match self.send(step, resolved).await {
            Err(CloseError::Rejected(rejection)) => rejection,
            done => return done,
        };
        let keys = &self.worker.0.settings.mapping.keys;
        let mut rest = step.clone();
        let mut spared = Vec::new();
        for field in &refused.fields {
            match rest.without(&field.path, self.desired, keys) {
                Some((smaller, without)) => {
                    rest = smaller;
                    spared.push(without);
                }
                None => return Err(CloseError::Rejected(refused)),
            }
        }
        if spared.is_empty() {
            return Err(CloseError::Rejected(refused));
        }
        let done = if rest.is_empty() { Effect::Unchanged } else { self.send(&rest, resolved).await? };
        dropped.append(&mut spared);
        Ok(done)
    }

    /// One call, and what it teaches.
    async fn send(&self, step: &Step, resolved: &Resolved) -> Result<Effect, CloseError> {
        let Inner { client, known, settings, .. } = &*self.worker.0;
        let person = &self.desired.identity;
        let learn_contact = |id: &ContactId, only: bool| {
            person.person().for_each(|key| known.learn_created(key, id.clone(), only));
        };
        let adopts = resolved.found.adopts() && matches!(step, Step::UpdateLead { .. });
        let matters = adopts || step.creates();
        if matters {
            // Before the call: it may be dropped at any moment, and happen all the same.
            known.doubt(&self.keys, Instant::now() + client.timeout() + settings.search_lag);
        }
        let result = match step {
            Step::CreateLead { lead, contact } => {
                client.create_lead(lead, contact.as_ref()).await.map(|(lead, contact)| {
                    tracing::debug!(lead.id = %lead, "created a Lead");
                    if let Some(company_id) = &person.company_id {
                        known.learn_lead(company_id, lead);
                    }
                    if let Some(contact) = contact {
                        learn_contact(&contact, resolved.found == Found::Nobody && resolved.conflicts == 0);
                    }
                    Effect::Created
                })
            }
            Step::CreateContact { lead, contact } => client.create_contact(lead, contact).await.map(|id| {
                tracing::debug!(lead.id = %lead, contact.id = %id, "added a Contact");
                learn_contact(&id, false);
                Effect::Added
            }),
            Step::UpdateLead { id, changes } => client.update_lead(id, changes).await.map(|()| {
                tracing::debug!(lead.id = %id, "updated a Lead");
                if let Some(company_id) = person.company_id.as_deref().filter(|_| adopts) {
                    known.learn_lead(company_id, id.clone());
                }
                Effect::Updated
            }),
            Step::UpdateContact { id, changes } => client.update_contact(id, changes).await.map(|()| {
                tracing::debug!(contact.id = %id, "updated a Contact");
                Effect::Updated
            }),
        };
        if matters {
            match &result {
                Err(error) if error.outcome_unknown() => {
                    known.doubt(&self.keys, Instant::now() + settings.search_lag);
                }
                Ok(_) | Err(_) => known.settle_doubt(&self.keys),
            }
        }
        result
    }
}
