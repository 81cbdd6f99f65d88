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
//! has it too. Before it waits, the guard asks the event log, which knows of a creation at once; only that
//! it knows none proves nothing. In the normal case the guard costs nothing.
//!
//! **The mapping** is resolved against what custom fields there are, and again when that may have
//! changed: from time to time, after a pause, and when Close says that a field does not exist. The
//! lookup fields stay those of the start.
//!
//! **A rehearsal** is a run that sends no writes; everything else is the same code.
//!
//! This module never sees lapin.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::breaker::Breaker;
use crate::claims::Claims;
use crate::close::{Client, CloseError, FieldError, Priority};
use crate::domain::decision::Decision;
use crate::domain::event::{Event, Malformed};
use crate::domain::mapping::{Anonymous, Desired, Key, KeyFields, Mapping, NoIdentity, Rules};
use crate::domain::matching::{self, Found, Likeness, compare, judge_lead};
use crate::domain::plan::{Step, Switches};
use crate::domain::record::{Contact, FieldId};
use crate::known::{Known, Made};
use crate::metrics::Metrics;
use crate::outcome::{DeadLetter, Effect, Failure, Outcome, PauseCause, Reason, Skip, Stage};
use crate::preflight::{self, Obstacle};
use crate::resolve::Resolver;
use crate::retry::{self, History, Pauses, Policy, Verdict};

/// How messages are worked on.
#[derive(Clone, Debug)]
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
    known: Known,
    claims: Claims,
    breaker: std::sync::Mutex<Breaker>,
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
    event_time: Option<jiff::Timestamp>,
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
pub struct Turn {
    /// Attempts made before.
    pub attempts: u32,
    /// Who goes first when rate budget is short.
    pub priority: Priority,
    /// What others created before this may not show up in search yet.
    pub trusted_from: Instant,
}

impl Turn {
    /// The first attempt, with nobody else at work.
    pub fn first() -> Self {
        Self { attempts: 0, priority: Priority::Live, trusted_from: Instant::now() }
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
            known: Known::default(),
            claims: Claims::default(),
            breaker: std::sync::Mutex::default(),
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

    /// Tells whether messages wait that could be worked on if there were more room.
    pub fn backlog(&self, there_is: bool) {
        self.0.client.backlog(there_is);
    }

    /// Consumption goes on after a pause: the first message tells whether it was long enough.
    pub fn put_close_on_trial(&self) {
        self.breaker(Breaker::put_on_trial);
    }

    fn breaker<T>(&self, with: impl FnOnce(&mut Breaker) -> T) -> T {
        with(&mut self.0.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks Close whether it can be worked with, and what fields there are now.
    ///
    /// # Errors
    /// Everything that stands in the way; the mapping then stays as it is.
    pub async fn look_again(&self) -> Result<(), Vec<Obstacle>> {
        let mut resolved = self.0.resolved.lock().await;
        self.resolve(&mut resolved).await
    }

    async fn resolve(&self, resolved: &mut Instant) -> Result<(), Vec<Obstacle>> {
        let mapping = preflight::run(&self.0.client, &self.0.rules).await?.mapping;
        *resolved = Instant::now();
        let mut current = self.0.mapping.write().unwrap_or_else(PoisonError::into_inner);
        if (&mapping.unknown, mapping.misfits()) != (&current.unknown, current.misfits()) {
            tell_flaws(&mapping);
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
    pub fn prepare(&self, body: &[u8]) -> Prepared {
        let event = match Event::decode(body, self.0.settings.max_message_bytes) {
            Ok(event) => event,
            Err(malformed) => return Prepared::Settled(Outcome::Dead(undecodable(&malformed))),
        };
        let mapping = self.mapping();
        if let Some(reason) = mapping.not_for_close(&event) {
            return Prepared::Settled(Outcome::Skipped(Skip::Event(reason)));
        }
        match mapping.apply(&event) {
            Ok(desired) => Prepared::Job(Job { desired, event_time: event.time() }),
            Err(NoIdentity::Anonymous) if mapping.anonymous() == Anonymous::Skip => {
                Prepared::Settled(Outcome::Skipped(Skip::Anonymous))
            }
            Err(no_identity) => Prepared::Settled(Outcome::Dead(DeadLetter {
                reason: Reason::NoIdentity,
                stage: Stage::Map,
                error: no_identity.to_string(),
                field: None,
                decision: None,
            })),
        }
    }

    /// Makes Close agree with a message.
    ///
    /// May be dropped at any moment: what was sent to Close may then still happen, which is why a new
    /// session has to come with a new `trusted_from`.
    pub async fn run(&self, job: &Job, turn: Turn) -> (Outcome, Decision) {
        let hold = self.0.settings.hold;
        let mut sync = self.sync(job, turn, Mode::Write);
        let settled = tokio::time::timeout(hold, sync.retry_in_place()).await;
        let outcome = settled.unwrap_or_else(|_| {
            // A creation may have been cut short: its doubt begins now.
            let Inner { known, client, settings, .. } = &*self.0;
            if known.doubtful_until(&job.keys()).is_some() {
                known.doubt(&job.keys(), Instant::now() + client.timeout() + settings.search_lag);
            }
            let cause = format!("held for {} s, waiting for Close's rate limits", hold.as_secs());
            Outcome::Delayed { level: 0, charged: false, cause }
        });
        if let (Outcome::Synced(_), Some(time)) = (&outcome, job.event_time) {
            self.0.metrics.written(time);
        }
        sync.conclude(outcome)
    }

    /// What [`Worker::run`] would do now, short of what Close would say to it. Writes nothing.
    pub async fn rehearse(&self, job: &Job) -> (Outcome, Decision) {
        let mut sync = self.sync(job, Turn::first(), Mode::Rehearse);
        let outcome = sync.retry_in_place().await;
        sync.conclude(outcome)
    }

    fn sync<'a>(&'a self, job: &'a Job, turn: Turn, mode: Mode) -> Sync<'a> {
        Sync {
            worker: self,
            client: self.0.client.for_message(turn.priority),
            desired: &job.desired,
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
        let obstacles = self.look_again().await.err()?;
        Some(obstacles.first().and_then(Obstacle::pause_cause).unwrap_or(PauseCause::Unreachable))
    }
}

/// Says which rules have no field, and which constants their fields do not take.
pub fn tell_flaws(mapping: &Mapping) {
    for unknown in &mapping.unknown {
        tracing::error!(
            setting = unknown.setting,
            "{}: its values are left out until there is one (create it in Close, or mend the setting)",
            unknown.reason
        );
    }
    for misfit in mapping.misfits() {
        tracing::error!(
            setting = misfit.setting,
            "{} is left out: {} (`close-sync check` lists what fits)",
            misfit.value,
            misfit.reason.words()
        );
    }
}

fn undecodable(malformed: &Malformed) -> DeadLetter {
    DeadLetter {
        reason: Reason::Malformed,
        stage: Stage::Decode,
        error: malformed.to_string(),
        field: None,
        decision: None,
    }
}

/// Whether writes are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Write,
    Rehearse,
}

/// The tries of one message.
struct Sync<'a> {
    worker: &'a Worker,
    /// Counts the calls of this message.
    client: Client,
    desired: &'a Desired,
    keys: Vec<Key>,
    turn: Turn,
    mode: Mode,
    /// Of the last try.
    decision: Decision,
}

impl Sync<'_> {
    /// Tries until it is settled, or patience in place is used up.
    async fn retry_in_place(&mut self) -> Outcome {
        let Inner { settings, metrics, .. } = &*self.worker.0;
        let mut pauses = Pauses::in_place(&settings.retry);
        let mut history = History { attempts: self.turn.attempts, looked_again: false };
        let mut failed_before = false;
        loop {
            let failure = match self.once().await {
                Ok(outcome) => {
                    self.worker.breaker(|breaker| breaker.note(Instant::now(), true));
                    return outcome;
                }
                Err(failure) => failure,
            };
            if failure.error.may_pass()
                && !std::mem::replace(&mut failed_before, true)
                && self.worker.breaker(|breaker| breaker.note(Instant::now(), false))
            {
                return Outcome::Paused(PauseCause::Failing);
            }
            let pause = pauses.next_pause();
            if let Some(cause) = self.worker.systemic(&failure, history, pause.is_none()).await {
                return Outcome::Paused(cause);
            }
            match retry::settle(&failure, history, pause, &settings.retry) {
                Verdict::Settle(outcome) => return outcome,
                Verdict::Again(pause) => {
                    tracing::debug!(stage = failure.stage.label(), error = %failure.error, ?pause, "trying again");
                    metrics.retried(failure.stage);
                    history.looked_again |= failure.error == CloseError::NotFound;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// The outcome with its reasons.
    fn conclude(self, mut outcome: Outcome) -> (Outcome, Decision) {
        let mut decision = self.decision;
        decision.calls = self.client.calls();
        if let Outcome::Dead(dead) = &mut outcome {
            dead.decision = Some(decision.summary());
        }
        (outcome, decision)
    }

    /// Looks up, plans, writes; stops at the first failure.
    async fn once(&mut self) -> Result<Outcome, Failure> {
        let Inner { settings, known, claims, metrics, keys, .. } = &*self.worker.0;
        let desired = self.desired;
        let mut asked_the_log = false;
        let (found, steps, _claim) = loop {
            let asked = Instant::now();
            let mut close = Resolver {
                records: &self.client,
                known,
                keys,
                switches: settings.switches,
                decision: &mut self.decision,
            };
            let look_up = |error| Failure { stage: Stage::LookUp, error };
            let found = close.decide(desired).await.map_err(look_up)?;
            let plan = &self.decision.plan;
            let (steps, changed, creates) = (plan.steps.clone(), plan.changed(), plan.creates());
            let trusted_from = known.doubtful_until(&self.keys).max(Some(self.turn.trusted_from));
            // An adopted Lead was chosen because the company was not found: that needs proof as well.
            let needs_proof = found.adopts() || creates;
            if let Some(trusted_from) = trusted_from.filter(|from| needs_proof && asked < *from) {
                metrics.lag_guard_waited();
                // A creation without an answer that happened is found sooner in the event log.
                if !std::mem::replace(&mut asked_the_log, true) && self.find_in_event_log().await {
                    continue;
                }
                tokio::time::sleep_until(trusted_from.into()).await;
                continue;
            }
            if let Some(claim) = claims.take(changed, asked).await {
                break (found, steps, claim);
            }
        };

        let mut effect = Effect::Unchanged;
        for step in &steps {
            let done = match self.mode {
                Mode::Write => self.write(step, &found).await,
                Mode::Rehearse => Ok(Effect::of(step)),
            };
            effect = effect.min(done.map_err(|error| Failure { stage: Stage::Write, error })?);
        }
        let Decision { dropped, plan, .. } = &self.decision;
        metrics.decided(dropped, &plan.refused, self.decision.conflicts());
        Ok(Outcome::of(plan, effect))
    }

    /// Whether the event log knows records of these keys that were made while search may not show them. They
    /// are remembered. That it knows none proves nothing.
    async fn find_in_event_log(&self) -> bool {
        let Inner { known, keys, settings, client, .. } = &*self.worker.0;
        // Twice the lag, for clocks that differ.
        let ago = 2 * (client.timeout() + settings.search_lag) + Duration::from_mins(1);
        let Ok(since) = jiff::Timestamp::now().checked_sub(ago) else { return false };
        let Ok((leads, contacts)) = self.client.made_since(since).await else { return false };
        let person = &self.desired.identity;
        let lead = person.company_id.as_deref().and_then(|company_id| {
            leads
                .into_iter()
                .find(|lead| judge_lead(lead, company_id, keys) == matching::Verdict::SameCompany)
        });
        let is_person = |contact: &Contact| {
            matches!(compare(contact, person, keys), Likeness::SameUser | Likeness::SameEmail)
        };
        let contact = contacts.into_iter().find(is_person);
        let found = lead.is_some() || contact.is_some();
        let made = Made { lead: lead.map(|lead| lead.id), contact: contact.map(|contact| contact.id) };
        known.learn_made(person, made, false);
        found
    }

    /// Carries out one step. When Close refuses optional values, again without them: each time with fewer,
    /// as Close may tell of one only when another is gone.
    async fn write(&mut self, step: &Step, found: &Found) -> Result<Effect, CloseError> {
        let mut rest = step.clone();
        let mut field_is_gone = false;
        let done = loop {
            if rest.is_empty() {
                break Effect::Unchanged;
            }
            let refused = match self.send(&rest, found).await {
                Err(CloseError::Rejected(refused)) => refused,
                Err(error) => return Err(error),
                Ok(effect) => break effect,
            };
            let paths = refused.fields.iter().map(|field| field.path.as_slice());
            let Some((smaller, spared)) = rest.spare(paths, self.desired, &self.worker.0.keys) else {
                return Err(CloseError::Rejected(refused));
            };
            let dropped = self.decision.plan.refuse(&spared);
            self.decision.dropped.extend(dropped);
            field_is_gone |= refused.fields.iter().any(FieldError::no_such_field);
            rest = smaller;
        };
        if field_is_gone {
            self.worker.miss_field().await;
        }
        Ok(done)
    }

    /// One call, and what it teaches.
    async fn send(&self, step: &Step, found: &Found) -> Result<Effect, CloseError> {
        let Inner { known, settings, .. } = &*self.worker.0;
        let client = &self.client;
        let adopts = found.adopts() && matches!(step, Step::UpdateLead { .. });
        let matters = adopts || step.creates();
        if matters {
            // Before the call: it may be dropped at any moment, and happen all the same.
            known.doubt(&self.keys, Instant::now() + client.timeout() + settings.search_lag);
        }
        let result = match step {
            Step::CreateLead { lead, contact } => client
                .create_lead(lead, contact.as_ref())
                .await
                .map(|(lead, contact)| Made { lead: Some(lead), contact }),
            Step::CreateContact { lead, contact } => {
                client.create_contact(lead, contact).await.map(|id| Made { lead: None, contact: Some(id) })
            }
            Step::UpdateLead { id, changes } => client
                .update_lead(id, changes)
                .await
                .map(|()| Made { lead: adopts.then(|| id.clone()), contact: None }),
            // It may carry the user id or the email from now on, which search does not know yet.
            Step::UpdateContact { id, changes } => client
                .update_contact(id, changes)
                .await
                .map(|()| Made { lead: None, contact: Some(id.clone()) }),
        };
        if matters {
            match &result {
                Err(error) if error.outcome_unknown() => {
                    known.doubt(&self.keys, Instant::now() + settings.search_lag);
                }
                Ok(_) | Err(_) => known.settle_doubt(&self.keys),
            }
        }
        let made = result?;
        tracing::debug!(step = step.label(), ?made, "written");
        known.learn_made(&self.desired.identity, made, self.decision.nobody_else());
        Ok(Effect::of(step))
    }
}
