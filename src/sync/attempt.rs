//! The tries of one message: look up, plan, write, and start over from the look-up when something failed.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use crate::close::{Client, CloseError, FieldError};
use crate::domain::decision::Decision;
use crate::domain::mapping::{Desired, Key};
use crate::domain::matching::{self, Found, Likeness, compare, judge_lead};
use crate::domain::partial_write;
use crate::domain::plan::{Plan, Step};
use crate::domain::record::Contact;
use crate::outcome::{Effect, Failure, Outcome, PauseCause, Stage};
use crate::retry::{self, Backoff, History, Verdict};
use crate::sync::id_cache::CreatedIds;
use crate::sync::resolver::{Decided, Resolver};
use crate::sync::{Inner, RunContext, Worker};

/// Whether writes are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Write,
    Rehearse,
}

/// What became of a message, and of those that went along.
pub(crate) struct Done {
    pub(crate) outcome: Outcome,
    pub(crate) others: Vec<(Outcome, Decision)>,
}

/// The tries of one message.
pub(crate) struct Attempts<'a> {
    pub(crate) worker: &'a Worker,
    /// Counts the calls of this message.
    pub(crate) client: Client,
    pub(crate) desired: &'a Desired,
    /// Those that are worked on together with it.
    pub(crate) others: Vec<&'a Desired>,
    pub(crate) keys: Vec<Key>,
    pub(crate) turn: RunContext,
    pub(crate) mode: Mode,
    /// Of the last try.
    pub(crate) decision: Decision,
}

impl Attempts<'_> {
    /// Attempts until it is settled, or patience in place is used up.
    pub(crate) async fn retry_in_place(&mut self) -> Outcome {
        let Inner { settings, metrics, .. } = &*self.worker.0;
        let mut pauses = Backoff::in_place(&settings.retry);
        let mut history = History { attempts: self.turn.attempts, looked_again: false };
        let mut failed_before = false;
        // A rehearsal says nothing about the work: it is not counted, speaks for nobody and pauses nothing.
        let works = self.mode == Mode::Write;
        loop {
            let failure = match self.once().await {
                Ok(done) => {
                    if works {
                        self.worker.answered();
                    }
                    return done.outcome;
                }
                Err(failure) => failure,
            };
            let told = format!("{}: {}", failure.stage.label(), failure.error);
            *self.worker.0.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
            let votes = works && !self.client.take_duplicate_failure() && !failed_before;
            if failure.error.is_retryable() && votes {
                failed_before = true;
                if self.worker.breaker(|breaker| breaker.note(Instant::now(), false)) {
                    let is_gone = matches!(failure.error, CloseError::Unreachable(_));
                    return Outcome::Paused(if is_gone {
                        PauseCause::Unreachable
                    } else {
                        PauseCause::Failing
                    });
                }
            }
            let pause = pauses.next_delay();
            if let Some(cause) = self.worker.systemic(&failure, history, pause.is_none()).await {
                return Outcome::Paused(cause);
            }
            match retry::settle(&failure, history, pause, &settings.retry) {
                Verdict::Settle(outcome) => {
                    if works && outcome.proves_close() {
                        self.worker.answered();
                    }
                    return outcome;
                }
                Verdict::Retry(pause) => {
                    tracing::debug!(stage = failure.stage.label(), error = %failure.error, ?pause, "trying again");
                    history.looked_again |= failure.error == CloseError::NotFound;
                    tokio::time::sleep(pause).await;
                    if works {
                        metrics.retried(failure.stage);
                    }
                }
            }
        }
    }

    /// The outcome with its reasons.
    pub(crate) fn conclude(self, mut outcome: Outcome) -> (Outcome, Decision) {
        let mut decision = self.decision;
        decision.calls = self.client.calls();
        if let Outcome::Dead(dead) = &mut outcome {
            dead.decision = Some(decision.summary());
        }
        (outcome, decision)
    }

    /// Looks up, plans, writes; stops at the first failure.
    pub(crate) async fn once(&mut self) -> Result<Done, Failure> {
        let Inner { settings, known, applied, claims, metrics, keys, .. } = &*self.worker.0;
        let desired = self.desired;
        let (mut asked_the_log, mut would_create) = (false, false);
        let (Decided { found, mut ages, together }, _claim) = loop {
            let asked = Instant::now();
            let doubt = known.doubtful_until(&self.keys).filter(|until| asked < *until);
            let search_complete_from =
                doubt.max(Some(self.turn.search_complete_from)).filter(|from| asked < *from);
            let mut close = Resolver {
                records: &self.client,
                known,
                applied,
                keys,
                trusted: search_complete_from.is_none(),
                switches: settings.switches,
                decision: &mut self.decision,
            };
            let look_up = |error| Failure { stage: Stage::LookUp, error };
            let decided = close.decide(desired, &self.others).await.map_err(look_up)?;
            // An adopted Lead was chosen because the company was not found: that needs proof as well. And where
            // all Contacts of a person are changed, none may be missing.
            let is_anywhere = matches!(decided.found, Found::Anywhere { .. });
            let needs_proof = decided.found.adopts() || decided.together.creates() || is_anywhere;
            if let Some(search_complete_from) = search_complete_from.filter(|_| needs_proof) {
                if self.mode == Mode::Write {
                    metrics.lag_guard_waited();
                }
                would_create |= decided.together.creates();
                // A creation without an answer that happened is found sooner in the event log.
                // After a start there is nothing to look for in particular, and many would ask.
                let ask = doubt.is_some() && !std::mem::replace(&mut asked_the_log, true);
                if ask && self.find_in_event_log().await {
                    continue;
                }
                tokio::time::sleep_until(search_complete_from).await;
                continue;
            }
            if let Some(claim) = claims.take(decided.together.changed(), asked).await {
                if self.mode == Mode::Write && would_create && !decided.together.creates() {
                    metrics.duplicate_avoided();
                }
                break (decided, claim);
            }
        };

        if self.mode == Mode::Write {
            let mut intended = ages.clone();
            let events = std::iter::once(&desired).chain(&self.others).zip(&together.plans);
            events.for_each(|(event, plan)| plan.note_versions(&mut intended, event));
            applied.intend(&ages, intended);
        }
        let (mut effect, mut made) = (Effect::Unchanged, CreatedIds::default());
        for step in &together.steps {
            let done = match self.mode {
                Mode::Write => self.write(step, &found, &mut made).await,
                Mode::Rehearse => Ok(Effect::of(step)),
            };
            effect = effect.min(done.map_err(|error| Failure { stage: Stage::Write, error })?);
            if self.mode == Mode::Write {
                // What is written is told, also if a later step fails.
                let written = |id: &str| step.changes() == Some(id);
                self.decision.plan.note_versions_of(&mut ages, desired, written);
                let others = self.others.iter().zip(together.plans.iter().skip(1));
                others.for_each(|(event, plan)| plan.note_versions_of(&mut ages, event, written));
                let its = ages.iter().filter(|(id, _)| written(id));
                applied.remember(
                    its.map(|(id, age)| (id.clone(), age.clone())).collect(),
                    &CreatedIds::default(),
                );
            }
        }
        (self.decision.new_lead, self.decision.new_contact) = (made.lead.clone(), made.contact.clone());
        let others = self.others.iter().zip(together.plans.into_iter().skip(1));
        let others: Vec<Decision> =
            others.map(|(event, plan)| self.decision.of_another(event, plan)).collect();
        if self.mode == Mode::Write {
            self.decision.plan.note_versions(&mut ages, desired);
            let noted = others.iter().zip(&self.others);
            noted.for_each(|(decision, event)| decision.plan.note_versions(&mut ages, event));
            applied.remember(ages, &made);
            for decision in std::iter::once(&self.decision).chain(&others) {
                metrics.decided(decision);
            }
        }
        // Of several, each has done what it planned: nothing was refused.
        let as_planned = |plan: &Plan| {
            let effect = plan.steps.iter().map(Effect::of).min().unwrap_or(Effect::Unchanged);
            Outcome::of(plan, effect)
        };
        let plan = &self.decision.plan;
        let outcome = if others.is_empty() { Outcome::of(plan, effect) } else { as_planned(plan) };
        let others = others.into_iter().map(|decision| (as_planned(&decision.plan), decision));
        Ok(Done { outcome, others: others.collect() })
    }

    /// Whether the event log knows records of these keys that were made while search may not show them. They
    /// are remembered. That it knows none proves nothing.
    async fn find_in_event_log(&self) -> bool {
        let Inner { known, keys, settings, client, .. } = &*self.worker.0;
        // Twice the lag, for clocks that differ.
        let ago = 2 * (client.timeout() + settings.search_lag) + Duration::from_mins(1);
        let Ok(since) = jiff::Timestamp::now().checked_sub(ago) else { return false };
        let Ok((leads, contacts)) = self.client.created_since(since).await else { return false };
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
        let made = CreatedIds { lead: lead.map(|lead| lead.id), contact: contact.map(|contact| contact.id) };
        known.learn_made(person, made, false);
        found
    }

    /// Carries out one step. When Close refuses optional values, again without them: each time with fewer,
    /// as Close may tell of one only when another is gone.
    async fn write(
        &mut self,
        step: &Step,
        found: &Found,
        made: &mut CreatedIds,
    ) -> Result<Effect, CloseError> {
        let mut rest = step.clone();
        let mut field_is_gone = false;
        let done = loop {
            if rest.is_empty() {
                break Effect::Unchanged;
            }
            let refused = match self.send(&rest, found).await {
                // Whose value it was, their own tries tell.
                Err(CloseError::Rejected(refused)) if self.others.is_empty() => refused,
                Err(error) => return Err(error),
                Ok(written) => {
                    if step.creates() {
                        *made = written;
                    }
                    break Effect::of(step);
                }
            };
            let paths = refused.fields.iter().map(|field| field.path.as_slice());
            let Some((smaller, spared)) =
                partial_write::without_rejected(&rest, paths, self.desired, &self.worker.0.keys)
            else {
                return Err(CloseError::Rejected(refused));
            };
            let dropped = self.decision.plan.refuse(&spared);
            self.decision.dropped.extend(dropped);
            field_is_gone |= refused.fields.iter().any(FieldError::field_is_missing);
            rest = smaller;
        };
        if field_is_gone {
            self.worker.miss_field().await;
        }
        Ok(done)
    }

    /// One call, and what it teaches.
    async fn send(&self, step: &Step, found: &Found) -> Result<CreatedIds, CloseError> {
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
                .map(|(lead, contact)| CreatedIds { lead: Some(lead), contact }),
            Step::CreateContact { lead, contact } => client
                .create_contact(lead, contact)
                .await
                .map(|id| CreatedIds { lead: None, contact: Some(id) }),
            Step::UpdateLead { id, changes } => client
                .update_lead(id, changes)
                .await
                .map(|()| CreatedIds { lead: adopts.then(|| id.clone()), contact: None }),
            // It may carry the user id or the email from now on, which search does not know yet.
            Step::UpdateContact { id, changes } => client
                .update_contact(id, changes)
                .await
                .map(|()| CreatedIds { lead: None, contact: Some(id.clone()) }),
        };
        if matters {
            match &result {
                Err(error) if error.may_have_been_applied() => {
                    known.doubt(&self.keys, Instant::now() + settings.search_lag);
                }
                Ok(_) | Err(_) => known.settle_doubt(&self.keys),
            }
        }
        let made = result?;
        tracing::debug!(step = step.label(), ?made, "written");
        known.learn_made(&self.desired.identity, made.clone(), self.decision.nobody_else());
        Ok(made)
    }
}
