//! The attempts at one message: decide, lock, execute, record. A failed attempt starts over with the look-up.

mod executor;
mod freshness;
#[cfg(test)]
mod tests;

use std::time::Duration;

use tokio::time::Instant;

use crate::close::{Api, CloseError, CreatedIds, Priority};
use crate::domain::decision::Decision;
use crate::domain::mapping::{Desired, Key};
use crate::domain::matching::{self, ContactMatch, Found, compare, match_lead};
use crate::domain::merge::MergedPlan;
use crate::domain::plan::Plan;
use crate::domain::record::Contact;
use crate::domain::staleness::RecordVersions;
use crate::outcome::{Effect, Failure, Outcome, PauseCause, Stage};
use crate::retry::{self, AfterFailure, Backoff, History};
use crate::sync::context::Context;
use crate::sync::job::RunContext;
use crate::sync::lookups::{Fresh, Lookups, Reads};
use crate::sync::record_locks::RecordGuard;
use crate::sync::resolver::{Decided, Resolver};

use executor::{Executor, Stopped};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Write,
    /// Sends no writes, and does not count: neither in metrics nor in the circuit breaker.
    DryRun,
}

/// The outcome of one attempt.
pub(crate) struct Completed {
    pub(crate) outcome: Outcome,
    /// Of the messages merged into the first, in order.
    pub(crate) merged: Vec<(Outcome, Decision)>,
}

/// The attempts at one message, with those merged into it.
pub(crate) struct Attempts<'a, C> {
    pub(crate) context: &'a Context,
    /// Counts the calls of this message.
    pub(crate) client: C,
    pub(crate) desired: &'a Desired,
    /// Events that are merged into the same write.
    pub(crate) others: Vec<&'a Desired>,
    pub(crate) keys: Vec<Key>,
    pub(crate) run: RunContext,
    pub(crate) mode: Mode,
    /// Of the last attempt.
    pub(crate) decision: Decision,
}

/// What the lag guard remembers while it repeats a look-up.
#[derive(Default)]
struct LagGuard {
    asked_event_log: bool,
    wanted_to_create: bool,
}

impl<C: Api> Attempts<'_, C> {
    /// Repeats attempts until the message is settled or the retries in place are used up.
    pub(crate) async fn retry_in_place(&mut self) -> Outcome {
        let context = self.context;
        let policy = &context.settings.retry;
        let mut backoff = Backoff::in_place(policy);
        let RunContext { attempts, age, .. } = self.run;
        let mut history = History { attempts, age, retried_after_404: false };
        let mut failed_before = false;
        loop {
            let failure = match self.run_once().await {
                Ok(completed) => {
                    if self.writes() {
                        context.record_success();
                    }
                    return completed.outcome;
                }
                Err(failure) => failure,
            };
            context.set_last_failure(&failure);
            // Messages that share a failed search count as one failure, and each message counts once.
            let counts = self.writes() && !self.client.take_duplicate_failure() && !failed_before;
            if failure.error.may_be_an_outage() && counts {
                failed_before = true;
                if context.record_failure() {
                    let unreachable = matches!(failure.error, CloseError::Unreachable(_));
                    let cause = if unreachable { PauseCause::Unreachable } else { PauseCause::Failing };
                    return Outcome::Paused(cause);
                }
            }
            let delay = backoff.next_delay();
            if let Some(cause) = context.systemic_cause(&failure, history, delay.is_none()).await {
                return Outcome::Paused(cause);
            }
            match retry::after_failure(&failure, history, delay, policy) {
                AfterFailure::Settle(outcome) => {
                    if self.writes() && outcome.proves_close_works() {
                        context.record_success();
                    }
                    return outcome;
                }
                AfterFailure::Retry(delay) => {
                    tracing::debug!(stage = failure.stage.label(), error = %failure.error, pause = ?delay, "attempt failed, retrying in place");
                    history.retried_after_404 |= failure.error == CloseError::NotFound;
                    tokio::time::sleep(delay).await;
                    if self.writes() {
                        context.metrics.retried(failure.stage);
                    }
                }
            }
        }
    }

    /// Adds the number of calls, and the summary of the decision to a dead letter.
    pub(crate) fn conclude(self, mut outcome: Outcome) -> (Outcome, Decision) {
        let mut decision = self.decision;
        decision.calls = self.client.calls();
        if let Outcome::Dead(dead) = &mut outcome {
            dead.decision = Some(decision.summary());
        }
        (outcome, decision)
    }

    /// One attempt. Stops at the first failure.
    pub(crate) async fn run_once(&mut self) -> Result<Completed, Failure> {
        let (mut lag_guard, mut effect) = (LagGuard::default(), Effect::Unchanged);
        loop {
            let (mut decided, read_at) = self.decide(&mut lag_guard).await?;
            let Some(_guard) = self.lock(&decided, read_at).await else { continue };
            if self.writes() {
                if lag_guard.wanted_to_create && !decided.merged.creates() {
                    self.context.metrics.duplicate_avoided();
                }
                self.record_intent(&decided.versions, &decided.merged, read_at);
            }
            let executed = self.execute(&mut decided, &mut effect, read_at).await;
            let Some(created) = executed.map_err(|error| Failure { stage: Stage::Write, error })? else {
                continue;
            };
            (self.decision.new_lead, self.decision.new_contact) =
                (created.lead.clone(), created.contact.clone());
            if self.writes() {
                self.record(decided.versions, &decided.merged, &created, read_at);
            }
            return Ok(self.complete(decided.merged, effect));
        }
    }

    fn writes(&self) -> bool {
        self.mode == Mode::Write
    }

    /// Looks up and plans until it is safe to execute the plan. If the plan creates a record, adopts a Lead or changes
    /// all Contacts of a person, search must not have missed a record. Returns when the look-up began.
    async fn decide(&mut self, lag_guard: &mut LagGuard) -> Result<(Decided, Instant), Failure> {
        let Context { settings, id_cache, version_cache, readback_cache, recent, metrics, keys, .. } =
            self.context;
        loop {
            let read_at = Instant::now();
            let pending = id_cache.pending_until(&self.keys).filter(|until| read_at < *until);
            let complete_from =
                pending.max(Some(self.run.search_complete_from)).filter(|from| read_at < *from);
            let mut resolver = Resolver {
                lookups: Lookups {
                    records: &self.client,
                    id_cache,
                    keys,
                    recent,
                    reads: Reads::new(),
                    search_is_complete: complete_from.is_none(),
                    decision: &mut self.decision,
                },
                version_cache,
                readback_cache,
                switches: settings.switches,
                retry_refused: self.run.priority == Priority::Replay,
            };
            let decided = resolver.decide(self.desired, &self.others).await;
            let decided = decided.map_err(|error| Failure { stage: Stage::LookUp, error })?;
            let is_anywhere = matches!(decided.found, Found::Anywhere { .. });
            let needs_proof = decided.found.adopts() || decided.merged.creates() || is_anywhere;
            let Some(complete_from) = complete_from.filter(|_| needs_proof) else {
                return Ok((decided, read_at));
            };
            if self.mode == Mode::Write {
                metrics.lag_guard_waited();
            }
            lag_guard.wanted_to_create |= decided.merged.creates();
            // A creation that happened without an answer is found sooner in the event log. After a start there
            // is no particular creation to look for, and every message would ask.
            let ask = pending.is_some() && !std::mem::replace(&mut lag_guard.asked_event_log, true);
            if ask && self.find_in_event_log().await {
                continue;
            }
            tokio::time::sleep_until(complete_from).await;
        }
    }

    /// Locks the records that the plan changes. `None` if another message has written to one of them: look up again. A
    /// creation locks nothing. Two messages that would create the same record share a key and never run at once.
    async fn lock(&self, decided: &Decided, read_at: Instant) -> Option<RecordGuard> {
        self.context.record_locks.lock(decided.merged.changed(), read_at).await
    }

    /// Executes the steps in order. What was written is recorded after each step, so also when a later one fails. Returns
    /// `None` when a person has changed a record so that it must be looked up again.
    async fn execute(
        &mut self,
        decided: &mut Decided,
        effect: &mut Effect,
        read_at: Instant,
    ) -> Result<Option<CreatedIds>, CloseError> {
        let mut created = CreatedIds::default();
        let records: Vec<Option<String>> =
            decided.merged.steps.iter().map(|step| step.changes().map(str::to_owned)).collect();
        for record in records {
            let mut permit = None;
            // Each turn after the first one plans the record again. There may be nothing left to write.
            while let Some(step) = decided.step(record.as_deref()) {
                if self.mode == Mode::DryRun {
                    *effect = (*effect).min(Effect::of(&step));
                    break;
                }
                let could_undo_edits = record.as_deref().is_some_and(|record| {
                    let mut plans = decided.merged.plans.iter();
                    plans.any(|plan| plan.could_undo_edits(record, &self.context.keys))
                });
                let mut executor = Executor {
                    context: self.context,
                    client: &self.client,
                    desired: self.desired,
                    merges: !self.others.is_empty(),
                    keys: &self.keys,
                    could_undo_edits,
                    decision: &mut self.decision,
                    reads: &mut decided.reads,
                    permit: permit.take(),
                };
                match executor.execute(&step, &decided.found, &mut created).await {
                    Ok(executed) => {
                        *effect = (*effect).min(executed);
                        self.record_step(step.changes(), &decided.merged, &mut decided.versions, read_at);
                        break;
                    }
                    Err(Stopped::Failed(error)) => return Err(error),
                    Err(Stopped::Changed(fresh, held)) => {
                        tracing::debug!(record, "the record was changed in Close, planning it again");
                        if !self.plan_again(decided, fresh, record.as_deref().unwrap_or_default()) {
                            return Ok(None);
                        }
                        permit = Some(held);
                    }
                }
            }
        }
        Ok(Some(created))
    }

    /// Plans a record as it is now. Returns false when it no longer matches as before.
    fn plan_again(&mut self, decided: &mut Decided, fresh: Fresh, record: &str) -> bool {
        let Decided { found, versions, merged, .. } = decided;
        let (person, keys) = (&self.desired.identity, &self.context.keys);
        if !freshness::substitute(found, fresh, person, keys) {
            return false;
        }
        let Context { settings, readback_cache, .. } = self.context;
        let readback = readback_cache.about(found);
        let refused = self.decision.plan.refused_of(record);
        *merged = MergedPlan::plan(self.desired, &self.others, found, settings.switches, versions, &readback);
        merged.leave_out(&refused);
        if let Some(plan) = merged.plans.first() {
            self.decision.plan.replace(record, plan);
        }
        for dropped in self.decision.plan.dropped().collect::<Vec<_>>() {
            if !self.decision.dropped.contains(&dropped) {
                self.decision.dropped.push(dropped);
            }
        }
        true
    }

    /// Each event with its plan.
    fn plans<'p>(&'p self, merged: &'p MergedPlan) -> impl Iterator<Item = (&'p Desired, &'p Plan)> {
        let others = self.others.iter().copied().zip(merged.plans.iter().skip(1));
        std::iter::once((self.desired, &self.decision.plan)).chain(others)
    }

    /// Before the writes: a write whose answer is lost may still happen.
    fn record_intent(&self, versions: &RecordVersions, merged: &MergedPlan, read_at: Instant) {
        let mut intended = versions.clone();
        self.plans(merged).for_each(|(event, plan)| plan.note_versions(&mut intended, event));
        self.context.version_cache.intend(versions, intended, read_at);
    }

    /// After a step that changed the record `changed`. New records are recorded at the end, with their ids.
    fn record_step(
        &self,
        changed: Option<&str>,
        merged: &MergedPlan,
        versions: &mut RecordVersions,
        read_at: Instant,
    ) {
        let is_written = |id: &str| changed == Some(id);
        self.plans(merged).for_each(|(event, plan)| plan.note_versions_of(versions, event, is_written));
        let written = versions.iter().filter(|(id, _)| is_written(id));
        let written = written.map(|(id, version)| (id.clone(), version.clone())).collect();
        self.context.version_cache.remember(written, &CreatedIds::default(), read_at);
    }

    /// After all steps: also what the records held already.
    fn record(
        &self,
        mut versions: RecordVersions,
        merged: &MergedPlan,
        created: &CreatedIds,
        read_at: Instant,
    ) {
        self.plans(merged).for_each(|(event, plan)| plan.note_versions(&mut versions, event));
        self.context.version_cache.remember(versions, created, read_at);
    }

    fn complete(&self, merged: MergedPlan, effect: Effect) -> Completed {
        // A merged write is not repeated without rejected fields, so each event has done what it planned.
        let as_planned = |plan: &Plan| {
            let effect = plan.steps.iter().map(Effect::of).min().unwrap_or(Effect::Unchanged);
            Outcome::of(plan, effect)
        };
        let others = self.others.iter().zip(merged.plans.into_iter().skip(1));
        let others: Vec<Decision> =
            others.map(|(event, plan)| self.decision.for_merged_event(event, plan)).collect();
        if self.writes() {
            std::iter::once(&self.decision).chain(&others).for_each(|each| self.context.report(each));
        }
        let plan = &self.decision.plan;
        let outcome = if others.is_empty() { Outcome::of(plan, effect) } else { as_planned(plan) };
        let merged = others.into_iter().map(|decision| (as_planned(&decision.plan), decision)).collect();
        Completed { outcome, merged }
    }

    /// Looks in the event log for records with these keys that search may not show yet, and caches their ids.
    /// Finding none proves nothing.
    async fn find_in_event_log(&self) -> bool {
        let Context { id_cache, keys, settings, client, .. } = self.context;
        // Twice the lag: clocks differ.
        let ago = 2 * (client.timeout() + settings.search_lag) + Duration::from_mins(1);
        let Ok(since) = jiff::Timestamp::now().checked_sub(ago) else { return false };
        let Ok((leads, contacts)) = self.client.created_since(since).await else { return false };
        let person = &self.desired.identity;
        let lead = person.company_id.as_deref().and_then(|company_id| {
            leads
                .into_iter()
                .find(|lead| match_lead(lead, company_id, keys) == matching::Verdict::SameCompany)
        });
        let is_person = |contact: &Contact| {
            matches!(compare(contact, person, keys), ContactMatch::SameUser | ContactMatch::SameEmail)
        };
        let contact = contacts.into_iter().find(is_person);
        let found = lead.is_some() || contact.is_some();
        let created =
            CreatedIds { lead: lead.map(|lead| lead.id), contact: contact.map(|contact| contact.id) };
        id_cache.remember_created(person, created, false);
        found
    }
}
