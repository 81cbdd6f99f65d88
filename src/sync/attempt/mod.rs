//! The attempts at one message: decide, lock, execute, record. A failed attempt starts over with the look-up.

mod executor;
mod freshness;
mod gap;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use tokio::time::Instant;

use crate::close::{Api, CloseError, CreatedIds, Priority};
use crate::domain::decision::Decision;
use crate::domain::journal::{self, KeyHash, RecordId};
use crate::domain::mapping::{Desired, Key};
use crate::domain::matching::Found;
use crate::domain::merge::MergedPlan;
use crate::domain::plan::{NEW_CONTACT, NEW_LEAD, Plan, Step};
use crate::domain::staleness::{FieldVersions, RecordVersions};
use crate::outcome::{Effect, Failure, Held, Outcome, PauseCause, Stage};
use crate::retry::{self, AfterFailure, Backoff, History};
use crate::sync::applied_cache::AppliedEvent;
use crate::sync::context::{Context, Mode};
use crate::sync::job::RunContext;
use crate::sync::lookups::{Fresh, Lookups, Reads};
use crate::sync::record_locks::RecordGuard;
use crate::sync::resolver::{Decided, Resolver};
use crate::sync::write_log::Stamp;
use crate::waits::WaitCause;

use executor::{Executor, Stopped};
pub(crate) use gap::GapWait;

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
    /// The ids of the records that were known by these keys before the first attempt.
    pub(crate) known: HashSet<String>,
    pub(crate) gap_wait: GapWait,
    pub(crate) run: RunContext,
    /// Of the last attempt.
    pub(crate) stage: Stage,
    /// Of the last attempt.
    pub(crate) decision: Decision,
    /// Before the last look-up began.
    pub(crate) looked_at: Stamp,
    /// The writes of this message.
    pub(crate) own_writes: Vec<Stamp>,
}

impl<C: Api> Attempts<'_, C> {
    /// Repeats attempts for as long as a delivery may be held. Then the longest wait is the cause of a delay.
    pub(crate) async fn within_hold(&mut self) -> Outcome {
        let hold = self.context.settings.hold;
        if let Ok(outcome) = tokio::time::timeout(hold, self.retry_in_place()).await {
            return outcome;
        }
        let (cause, waited) = self.client.waits().longest();
        let policy = &self.context.settings.retry;
        retry::after_hold(Held { cause, waited, held: hold }, self.stage, self.run.age, policy)
    }

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
            let systemic_cause = {
                let _waiting = self.client.waits().share(context.client.waits());
                context.systemic_cause(&failure, history, delay.is_none()).await
            };
            if let Some(cause) = systemic_cause {
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
                    self.client.waits().during(WaitCause::Backoff, tokio::time::sleep(delay)).await;
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
        let mut effect = Effect::Unchanged;
        loop {
            self.stage = Stage::LookUp;
            let (mut decided, read_at) = self.decide().await?;
            self.stage = Stage::Write;
            let Some(_guard) = self.lock(&decided, read_at).await else { continue };
            if self.writes() {
                if self.gap_wait.wanted_to_create && !decided.merged.creates() {
                    self.context.metrics.duplicate_avoided();
                }
                self.record_intent(&decided.versions, &decided.merged, read_at);
            }
            let executed = self.execute(&mut decided, &mut effect, read_at).await;
            let Some(created) = executed.map_err(|error| Failure { stage: Stage::Write, error })? else {
                continue;
            };
            let created_before = self.decision.new_lead.take();
            (self.decision.new_lead, self.decision.new_contact) =
                (created.lead.clone().or(created_before), created.contact.clone());
            if self.writes() {
                let written =
                    decided.merged.steps.iter().filter_map(Step::changes).map(str::to_owned).collect();
                let versions = decided.versions;
                self.record(versions.clone(), &decided.merged, &created, read_at);
                self.remember_applied(&decided.reads, read_at);
                self.journal_versions(&versions, &decided.merged, &created, |id| {
                    !HashSet::<String>::contains(&written, id)
                });
            }
            return Ok(self.complete(decided.merged, effect));
        }
    }

    fn writes(&self) -> bool {
        self.context.mode == Mode::Write
    }

    /// Looks up and plans until it is safe to execute the plan. If the plan creates a record, adopts a Lead or changes
    /// all Contacts of a person, search must not have missed a record. Returns when the look-up began.
    async fn decide(&mut self) -> Result<(Decided, Instant), Failure> {
        let Context {
            settings,
            id_cache,
            lag_guard,
            version_cache,
            readback_cache,
            recent,
            metrics,
            keys,
            ..
        } = self.context;
        let hashes = KeyHash::of_all(&self.keys);
        loop {
            let read_at = Instant::now();
            self.looked_at = self.context.write_log.now();
            self.gap_wait.looks_up();
            self.context.forget_evicted();
            let pending = lag_guard.pending_with(&hashes);
            let gap = lag_guard.gap(&hashes, read_at, None);
            let mut resolver = Resolver {
                lookups: Lookups {
                    records: &self.client,
                    id_cache,
                    lag_guard,
                    keys,
                    recent,
                    reads: Reads::new(),
                    search_is_complete: gap.is_none(),
                    decision: &mut self.decision,
                },
                version_cache,
                readback_cache,
                switches: settings.switches,
                retry_refused: self.run.priority == Priority::Replay,
            };
            let decided = resolver.decide(self.desired, &self.others).await;
            let decided = decided.map_err(|error| Failure { stage: Stage::LookUp, error })?;
            self.gap_wait.has_looked_up(&decided.reads, &self.decision);
            self.settle_found(&pending, &decided.found);
            let is_anywhere = matches!(decided.found, Found::Anywhere { .. });
            let creates = decided.merged.creates();
            let needs_proof = decided.found.adopts() || creates || is_anywhere;
            let gap = lag_guard.gap(&hashes, read_at, None).filter(|_| needs_proof);
            let Some(gap) = gap else {
                if creates || decided.found.adopts() {
                    let unsettled = lag_guard.pending_with(&hashes);
                    if self.event_log_disagrees(&unsettled, &decided.found).await {
                        continue;
                    }
                    // Search would have shown what they created.
                    self.settle_all(&unsettled, &decided.found);
                }
                return Ok((decided, read_at));
            };
            if self.writes() {
                metrics.lag_guard_waited();
            }
            self.gap_wait.wanted_to_create |= creates;
            // Search has caught up meanwhile. One of the searches of this look-up may have come before that.
            if lag_guard.gap(&hashes, Instant::now(), None).is_none() {
                continue;
            }
            if !self.close_gap(&gap, &pending, &decided.found).await {
                self.decision.awaits_search = true;
                return Ok((decided, read_at));
            }
        }
    }

    /// Locks the records that the plan changes. `None` if another message has written to one of them: look up again. A
    /// creation locks nothing. Two messages that would create the same record share a key and never run at once.
    async fn lock(&self, decided: &Decided, read_at: Instant) -> Option<RecordGuard> {
        let lock = self.context.record_locks.lock(decided.merged.changed(), read_at);
        self.client.waits().during(WaitCause::RecordLock, lock).await
    }

    /// Executes the steps in order. What was written is recorded after each step, so also when a later one fails. Returns
    /// `None` when the records must be looked up again, because a person has changed one or Close did not show a new one.
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
                if !self.writes() {
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
                    journal: &self.run.journal,
                    could_undo_edits,
                    decision: &mut self.decision,
                    reads: &mut decided.reads,
                    own_writes: &mut self.own_writes,
                    looked_at: self.looked_at,
                    permit: permit.take(),
                };
                match executor.execute(&step, &decided.found, &mut created).await {
                    Ok(executed) => {
                        *effect = (*effect).min(executed);
                        self.record_step(step.changes(), &decided.merged, &mut decided.versions, read_at);
                        break;
                    }
                    Err(Stopped::NotShown(lead)) => {
                        // A look-up finds the Contact. Then the times of its fields are kept.
                        *effect = (*effect).min(Effect::of(&step));
                        self.decision.new_lead = lead;
                        return Ok(None);
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
        for (id, version) in versions.iter_mut().filter(|(id, _)| is_written(id)) {
            let shown = self.context.recent.updated(id);
            version.unremembered.iter_mut().zip(shown).for_each(|(hidden, shown)| hidden.shown = shown);
        }
        let written = versions.iter().filter(|(id, _)| is_written(id));
        let written = written.map(|(id, version)| (id.clone(), version.clone())).collect();
        self.context.version_cache.remember(written, &CreatedIds::default(), read_at);
        self.journal_versions(versions, merged, &CreatedIds::default(), is_written);
    }

    /// Writes down the times of the events that set fields.
    fn journal_versions(
        &self,
        known: &RecordVersions,
        merged: &MergedPlan,
        created: &CreatedIds,
        which: impl Fn(&str) -> bool,
    ) {
        let unremembered = |known: &FieldVersions| FieldVersions {
            unremembered: known.unremembered,
            ..FieldVersions::default()
        };
        let mut versions: RecordVersions =
            known.iter().map(|(id, known)| (id.clone(), unremembered(known))).collect();
        self.plans(merged).for_each(|(event, plan)| plan.note_versions_of(&mut versions, event, &which));
        let entries = versions.into_iter().filter_map(|(id, FieldVersions { fields, stored, .. })| {
            let record = match id.as_str() {
                NEW_LEAD => RecordId::Lead(created.lead.clone()?),
                NEW_CONTACT => RecordId::Contact(created.contact.clone()?),
                _ => RecordId::try_from(id).ok()?,
            };
            let updated = self.context.recent.updated(record.as_str());
            Some(journal::written(record, fields, stored, updated))
        });
        self.run.journal.append(entries.flatten().collect());
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

    /// An event is remembered as applied if no read of its records was old.
    fn remember_applied(&self, reads: &Reads, checked: Instant) {
        let Context { applied_cache, write_log, readback_cache, .. } = self.context;
        let is_stale = reads.values().any(|read| read.stale);
        if is_stale || !self.others.is_empty() || self.run.priority == Priority::Replay {
            return;
        }
        let Self { desired, decision, looked_at, own_writes, .. } = self;
        let (since, own) = (*looked_at, own_writes.as_slice());
        let applied = AppliedEvent { event: desired, decision, since, own, checked };
        applied_cache.remember(&applied, write_log, readback_cache);
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
}
