//! Executes one step of a plan: sends the write, and again without the optional fields that Close rejects.
//!
//! **A new Contact whose Lead is gone** is refused, and Close need not name the Lead as the reason. Reads may lag, and still
//! show the Lead. So when Close refuses a new Contact in its last form and names nothing of it, the Lead is read again
//! once it is certain that a read shows whether it existed: after [`MOMENT`]. Waiting once costs Close one call. Retries
//! until then would send every form again, each time.

use jiff::Timestamp;
use uuid::Uuid;

use crate::close::{
    Api, CloseError, CreatedIds, Fault, FieldError, LeadWithPerson, MOMENT, Rejection, Written,
};
use crate::domain::decision::{Decision, LookUp};
use crate::domain::journal::{ChangeKind, Entry, KeyHash, RecordId};
use crate::domain::mapping::{Desired, Identity, Key};
use crate::domain::matching::{Found, compare};
use crate::domain::partial_write::{self, Remainder};
use crate::domain::plan::{FieldVerdict, RejectedField, Step};
use crate::domain::readback::{self, Difference};
use crate::domain::record::{Channel, ContactId, Field, LeadId};
use crate::outcome::{Effect, PauseCause};
use crate::sync::attempt::freshness;
use crate::sync::context::Context;
use crate::sync::id_cache::Change;
use crate::sync::journal::{self, JournalHandle};
use crate::sync::lookups::{Fresh, Lookups, MAX_MISSING, Reads};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::write_log::Stamp;
use crate::telemetry::metrics::Metrics;
use crate::waits::WaitCause;

pub(super) struct Executor<'a, C: Api> {
    pub(super) context: &'a Context,
    pub(super) client: &'a C,
    pub(super) desired: &'a Desired,
    /// Several events share the write. When Close rejects a field of it, they are retried one by one.
    pub(super) merges: bool,
    pub(super) keys: &'a [Key],
    pub(super) journal: &'a JournalHandle,
    /// The step could undo what a person entered ([`crate::domain::plan::Plan::could_undo_edits`]).
    pub(super) could_undo_edits: bool,
    pub(super) decision: &'a mut Decision,
    /// How the records were last read.
    pub(super) reads: &'a mut Reads,
    pub(super) own_writes: &'a mut Vec<Stamp>,
    /// Before the look-up that led to the plan.
    pub(super) looked_at: Stamp,
    /// The budget for the first write, if it is held already.
    pub(super) permit: Option<C::Permit>,
}

/// Why a step was not executed.
pub(super) enum Stopped<P> {
    Failed(CloseError),
    /// A person has changed the record since it was planned. The budget for the write is still held.
    Changed(Fresh, P),
    /// A Lead was created, and Close does not show its Contact.
    NotShown(Option<LeadId>),
}

/// Another look-up shows more.
const NOT_YET: CloseError = CloseError::Transient(Fault::NotYet);

/// A creation that is not sent yet. Dropped, it will not happen.
struct Unsent<'e, 'a, C: Api> {
    executor: &'e Executor<'a, C>,
    operation: Option<Uuid>,
}

impl<C: Api> Drop for Unsent<'_, '_, C> {
    fn drop(&mut self) {
        self.operation.into_iter().for_each(|operation| self.executor.settle(operation));
    }
}

impl<P> From<CloseError> for Stopped<P> {
    fn from(error: CloseError) -> Self {
        Self::Failed(error)
    }
}

impl<C: Api> Executor<'_, C> {
    /// Executes a step. When Close rejects optional fields, repeats it without them, each time with fewer: Close
    /// may name one only after another is gone.
    pub(super) async fn execute(
        &mut self,
        step: &Step,
        found: &Found,
        created: &mut CreatedIds,
    ) -> Result<Effect, Stopped<C::Permit>> {
        let mut remaining = step.clone();
        let mut field_is_missing = false;
        let effect = loop {
            if remaining.is_only_time(&self.desired.synced_at) {
                break Effect::Unchanged;
            }
            let rejection = match self.send(&remaining, found).await {
                Err(Stopped::Failed(CloseError::Rejected(rejection))) if !self.merges => rejection,
                Err(stopped) => return Err(stopped),
                Ok(ids) => {
                    if step.creates() {
                        *created = ids;
                    }
                    break Effect::of(step);
                }
            };
            field_is_missing |= rejection.field_is_missing();
            let (smaller, rejected, verdict) = self.without_rejected(&remaining, &rejection).await?;
            let dropped = self.decision.plan.refuse(&rejected, verdict);
            self.decision.dropped.extend(dropped);
            remaining = smaller;
        };
        if field_is_missing {
            self.refresh_stale_mapping().await;
        }
        Ok(effect)
    }

    /// The step without what Close rejected. If Close named no field of it, without custom fields that were deleted in Close,
    /// else without lists, then without fields, then without names. An update of which nothing remains is not sent.
    async fn without_rejected(
        &mut self,
        step: &Step,
        rejection: &Rejection,
    ) -> Result<(Step, Vec<RejectedField>, FieldVerdict), CloseError> {
        let (context, desired) = (self.context, self.desired);
        let rejected_for_good = || Err(CloseError::Rejected(rejection.clone()));
        let without = |paths: &[Vec<String>]| {
            let paths = paths.iter().map(Vec::as_slice);
            partial_write::without_rejected(step, paths, desired, &context.keys)
        };
        let named: Vec<Vec<String>> = rejection.fields.iter().map(|field| field.path.clone()).collect();
        match without(&named) {
            Remainder::Without(smaller, rejected) => return Ok((smaller, rejected, FieldVerdict::Refused)),
            Remainder::Required => return rejected_for_good(),
            Remainder::Unnamed => {
                let is_about_values = matches!(rejection.status, 400 | 422)
                    && !rejection.fields.iter().any(FieldError::is_about_something_absent);
                if !is_about_values {
                    return rejected_for_good();
                }
            }
        }
        if self.refresh_stale_mapping().await == Some(PauseCause::LookupField) {
            return rejected_for_good();
        }
        let mapping = context.mapping();
        match without(&partial_write::unknown_fields(step, |id| mapping.has_field(id))) {
            Remainder::Without(smaller, rejected) => Ok((smaller, rejected, FieldVerdict::Refused)),
            Remainder::Required => rejected_for_good(),
            Remainder::Unnamed => {
                let Some((smaller, rejected)) = partial_write::without_optional(step, desired, &context.keys)
                else {
                    self.lead_exists(step).await?;
                    return rejected_for_good();
                };
                tracing::warn!(
                    event = "refusal_without_field",
                    step = step.label(),
                    error = %rejection,
                    left_out = rejected.len(),
                    "Close rejected a write without naming a field, leaving out optional values"
                );
                Ok((smaller, rejected, FieldVerdict::RefusedTogether))
            }
        }
    }

    /// Fails if the Lead of a new Contact may have been gone when Close refused the Contact.
    async fn lead_exists(&mut self, step: &Step) -> Result<(), CloseError> {
        let Step::CreateContact { lead, .. } = step else { return Ok(()) };
        tokio::time::sleep(MOMENT).await;
        let answer = self.client.lead(lead, &self.desired.identity, &self.context.keys).await;
        self.decision.look_ups.push(LookUp::Read(lead.to_string()));
        answer.map(drop)
    }

    async fn refresh_stale_mapping(&self) -> Option<PauseCause> {
        let _waiting = self.client.waits().share(self.context.client.waits());
        self.context.refresh_stale_mapping().await
    }

    /// Sends one write and caches the ids it returns. A creation is pending from before the call, because the
    /// call may be dropped at any moment and still happen.
    async fn send(&mut self, step: &Step, found: &Found) -> Result<CreatedIds, Stopped<C::Permit>> {
        let Context { id_cache, recent, write_log, .. } = self.context;
        let (new_keys, mut keys_are_written) = (self.new_keys(step, found), false);
        let (result, operation, sent) = loop {
            // The wait for budget comes first, so that the write follows its reads at once.
            let permit = match self.permit.take() {
                Some(permit) => permit,
                None => self.client.acquire(step).await,
            };
            let operation = if step.creates() {
                Some(self.announce_creation(step).await?)
            } else {
                if let Some((record, keys)) = &new_keys
                    && !std::mem::replace(&mut keys_are_written, true)
                {
                    self.announce_keys(record, keys).await;
                }
                None
            };
            if let Some(fresh) = self.changed(step, found).await? {
                return Err(Stopped::Changed(fresh, permit));
            }
            if new_keys.is_some() {
                self.look_up_is_current()?;
            }
            let sent = self.context.now();
            self.gives_keys(step, found, sent);
            let writing = step.changes().map(|id| (id, write_log.begins(id)));
            self.own_writes.extend(writing.map(|(_, stamp)| stamp));
            let answer = self.client.write(step, permit).await;
            if let Some((id, stamp)) = writing
                && !answer.as_ref().is_err_and(CloseError::may_have_been_applied)
            {
                write_log.ends(id, stamp);
            }
            match answer {
                Ok(Some(written)) => break (Ok(written), operation, sent),
                // A 429: nothing has happened, and the wait for budget may be long.
                Ok(None) => operation.into_iter().for_each(|operation| self.settle(operation)),
                Err(error) => break (Err(error), operation, sent),
            }
        };
        let written = match result {
            Ok(written) => written,
            Err(error) => {
                self.failed(operation, &error);
                if error.may_have_been_applied() {
                    self.gives_keys(step, found, sent);
                }
                return Err(match step.needs() {
                    // The read of the Lead may have been stale. The next one shows whether it is gone.
                    Some(_) if refuses_lead(step, &error) => NOT_YET,
                    Some(id) => recent.or_not_yet(error, id),
                    None => error,
                }
                .into());
            }
        };
        recent.written(step, &written);
        learn(self.context, step, found, &written);
        let mut ids = CreatedIds::of(step, &written);
        let is_hidden = matches!(step, Step::CreateLead { contact: Some(_), .. }) && ids.contact.is_none();
        let mut look_up_again = false;
        if let Some(lead) = ids.lead.as_ref().filter(|_| is_hidden) {
            let contact = self.new_contact(lead).await;
            // A Lead without its Contact gets another one, but only if its company leads to it.
            let has_company = self.desired.identity.company_id.is_some();
            look_up_again = contact.as_ref().map_or(true, |contact| contact.is_none() && has_company);
            ids.contact = contact.ok().flatten();
        }
        if let Some(operation) = operation {
            self.created(operation, step, &ids, sent);
        } else if let Some((record, keys)) = new_keys {
            self.watch(keys, record, Change { kind: ChangeKind::KeyChange, at: sent });
        }
        if adopts(step, found)
            && let Step::UpdateLead { id, .. } = step
        {
            ids.lead = Some(id.clone());
        }
        tracing::debug!(step = step.label(), made = ?ids, "wrote to Close");
        id_cache.remember_created(&self.desired.identity, ids.clone(), self.decision.is_new_person());
        if look_up_again { Err(Stopped::NotShown(ids.lead)) } else { Ok(ids) }
    }

    /// The Contact of a new Lead, where Close's answer did not show it.
    async fn new_contact(&self, lead: &LeadId) -> Result<Option<ContactId>, CloseError> {
        let (person, keys) = (&self.desired.identity, &self.context.keys);
        let LeadWithPerson { people, missing, .. } = self.client.lead(lead, person, keys).await?;
        if let Some(contact) = people.contacts.into_iter().next() {
            return Ok(Some(contact.id));
        }
        for id in missing.into_iter().take(MAX_MISSING) {
            let contact = self.client.contact(&id).await?;
            if compare(&contact, person, keys).is_person() {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Close is about to give a record keys, or may just have done so: reads may not show them for a moment from now on.
    fn gives_keys(&self, step: &Step, found: &Found, at: Timestamp) {
        if let Some((record, keys)) = self.new_keys(step, found) {
            let change = Change { kind: ChangeKind::KeyChange, at };
            self.context.id_cache.changed(&KeyHash::of_all(&keys), &record, change);
        }
    }

    /// Writes down the keys that a record gets, before they are sent.
    async fn announce_keys(&self, record: &RecordId, keys: &[Key]) {
        let change = Change { kind: ChangeKind::KeyChange, at: self.context.now() };
        let keys = KeyHash::of_all(keys);
        self.context.id_cache.changed(&keys, record, change);
        self.write_down(journal::keys(record.clone(), keys, change)).await;
    }

    /// Writes down a creation before it is sent. From then on it is pending.
    async fn announce_creation(&self, step: &Step) -> Result<Uuid, CloseError> {
        let lag_guard = &self.context.lag_guard;
        let (operation, keys, at) = (Uuid::now_v7(), KeyHash::of_all(self.keys), self.context.now());
        let lead = matches!(step, Step::CreateLead { .. });
        lag_guard.begin(operation, keys.clone(), lead, at);
        let mut unsent = Unsent { executor: self, operation: Some(operation) };
        self.write_down(Entry::Creating { operation, keys: keys.clone(), lead, at }).await;
        unsent.operation = None;
        // The journal may have taken minutes.
        lag_guard.extend(operation);
        let another_was_first = lag_guard.pending_with(&keys).iter().any(|(other, _)| *other != operation);
        let is_current = if another_was_first { Err(NOT_YET) } else { self.look_up_is_current() };
        if is_current.is_err() {
            self.settle(operation);
        }
        is_current.map(|()| operation)
    }

    /// Fails if another worker, which lost the queue and did not know it, has written something since the look-up began.
    fn look_up_is_current(&self) -> Result<(), CloseError> {
        if self.context.write_log.is_alone_since(self.looked_at) { Ok(()) } else { Err(NOT_YET) }
    }

    /// Waits until the journal has the entry, and what others wrote before it is known.
    async fn write_down(&self, entry: Entry) {
        self.journal.append(vec![entry]);
        self.client.waits().during(WaitCause::Journal, self.journal.read_back()).await;
    }

    /// The record that a step gives keys to, if it exists already.
    fn new_keys(&self, step: &Step, found: &Found) -> Option<(RecordId, Vec<Key>)> {
        let Identity { company_id, user_id, email } = &self.desired.identity;
        match step {
            Step::UpdateLead { id, .. } if adopts(step, found) => {
                Some((RecordId::Lead(id.clone()), vec![Key::Company(company_id.clone()?)]))
            }
            Step::UpdateContact { id, changes } => {
                let user_field = self.context.keys.user.clone().map(Field::Custom);
                let user = user_field.filter(|field| changes.fields.contains_key(field));
                let user = user.and(user_id.clone()).map(Key::User);
                let email = changes.lists.get(&Channel::Email).and(email.clone()).map(Key::Email);
                let keys: Vec<Key> = user.into_iter().chain(email).collect();
                (!keys.is_empty()).then(|| (RecordId::Contact(id.clone()), keys))
            }
            Step::UpdateLead { .. } | Step::CreateLead { .. } | Step::CreateContact { .. } => None,
        }
    }

    /// Close answered a creation.
    fn created(&self, operation: Uuid, step: &Step, ids: &CreatedIds, sent: Timestamp) {
        let Context { id_cache, lag_guard, .. } = self.context;
        let person = &self.desired.identity;
        let change = Change { kind: ChangeKind::Creation, at: sent };
        let lead = ids.lead.clone().map(RecordId::Lead).zip(person.company_id.clone().map(Key::Company));
        let lead = lead.map(|(lead, company)| (lead, vec![company]));
        let contact =
            ids.contact.clone().map(|id| (RecordId::Contact(id), person.person().collect::<Vec<_>>()));
        let mut entries = Vec::new();
        for (record, new_keys) in lead.into_iter().chain(contact) {
            let hashes = KeyHash::of_all(&new_keys);
            id_cache.changed(&hashes, &record, change);
            self.watch(new_keys, record.clone(), change);
            entries.push(journal::keys(record, hashes, change));
        }
        // Close did not say which Contact it created, so only search can find it.
        if matches!(step, Step::CreateLead { contact: Some(_), .. }) && ids.contact.is_none() {
            person.person().for_each(|key| id_cache.search_again_for(&key));
            if let Some(company) = person.company_id.clone().filter(|_| ids.lead.is_some()) {
                lag_guard.settle_for(operation, &[KeyHash::of(&Key::Company(company))]);
            }
        } else {
            lag_guard.settle(operation);
            entries.push(Entry::Settled { operation });
        }
        self.journal.append(entries);
    }

    /// Measures the lag of search by a record that got these keys.
    fn watch(&self, new_keys: Vec<Key>, record: RecordId, change: Change) {
        let Context { client, keys, search_lag, .. } = self.context;
        if let Some(key) = new_keys.into_iter().next() {
            search_lag.watch(client, keys, key, record, change);
        }
    }

    fn failed(&self, operation: Option<Uuid>, error: &CloseError) {
        let Some(operation) = operation else { return };
        if !error.may_have_been_applied() {
            self.settle(operation);
            return;
        }
        self.context.lag_guard.extend(operation);
    }

    fn settle(&self, operation: Uuid) {
        self.context.lag_guard.settle(operation);
        self.journal.append(vec![Entry::Settled { operation }]);
    }

    /// Reads a record again whose edits the step could undo. Returns the record if a person has changed what the step writes.
    async fn changed(&mut self, step: &Step, found: &Found) -> Result<Option<Fresh>, CloseError> {
        let Some(id) = step.changes() else { return Ok(None) };
        if !self.could_undo_edits || freshness::is_fresh(self.reads.get(id)) {
            return Ok(None);
        }
        let Context { id_cache, lag_guard, recent, keys, .. } = self.context;
        let mut lookups = Lookups {
            records: self.client,
            id_cache,
            lag_guard,
            keys,
            recent,
            reads: std::mem::take(self.reads),
            search_is_complete: false,
            decision: &mut *self.decision,
        };
        let fresh = lookups.read_again(step, &self.desired.identity).await;
        *self.reads = lookups.reads;
        Ok(fresh?.filter(|fresh| !freshness::is_as_planned(step, found, fresh)))
    }
}

/// Whether a step gives a Lead its company id.
fn adopts(step: &Step, found: &Found) -> bool {
    found.adopts() && matches!(step, Step::UpdateLead { .. })
}

/// Whether Close refuses a new Contact because of its Lead.
fn refuses_lead(step: &Step, error: &CloseError) -> bool {
    let (Step::CreateContact { .. }, CloseError::Rejected(rejection)) = (step, error) else { return false };
    let is_lead =
        |field: &FieldError| matches!(field.path.first().map(String::as_str), Some("lead" | "lead_id"));
    rejection.fields.iter().any(is_lead)
}

/// Compares Close's answer to a write with what was sent.
fn learn(context: &Context, step: &Step, found: &Found, written: &Written) {
    let Context { readback_cache, metrics, .. } = context;
    let (leads, contacts) = found.records();
    let (sent, kept) = match (step, written) {
        (Step::CreateLead { contact, .. }, Written::Lead(answer)) => {
            (contact.as_ref(), answer.contacts.first())
        }
        (
            Step::CreateContact { contact, .. } | Step::UpdateContact { changes: contact, .. },
            Written::Contact(answer),
        ) => (Some(contact), Some(answer)),
        (Step::UpdateLead { .. }, _) | (_, Written::Lead(_) | Written::Contact(_) | Written::Unread) => {
            (None, None)
        }
    };
    if let (
        Step::CreateLead { lead: sent, .. } | Step::UpdateLead { changes: sent, .. },
        Written::Lead(answer),
    ) = (step, written)
    {
        let kept = &answer.lead;
        let before = leads.into_iter().find(|lead| lead.id == kept.id);
        let differences = readback::differences(sent, before.map(|lead| &lead.fields), &kept.fields);
        report(readback_cache, metrics, kept.id.as_str(), &differences);
    }
    if let Some((sent, kept)) = sent.zip(kept) {
        let before = contacts.into_iter().find(|contact| contact.id == kept.id);
        let mut lists = sent.lists.clone();
        // An entry that cannot be read is not one that Close lost.
        lists.retain(|channel, _| !kept.unknown_lists.contains(channel));
        let known = readback_cache.country();
        let phones = before.map_or(&[][..], |contact| contact.list(Channel::Phone));
        if let Some(country) = readback::country_of(phones, &lists, &kept.lists, known)
            && readback_cache.set_country(country)
        {
            tracing::info!(
                event = "phone_country_learned",
                %country,
                "learned the country of national phone numbers; with close.country it is known from the start"
            );
        }
        let mut differences =
            readback::differences(&sent.fields, before.map(|contact| &contact.fields), &kept.fields);
        differences.extend(readback::list_differences(&lists, &kept.lists, readback_cache.country()));
        report(readback_cache, metrics, kept.id.as_str(), &differences);
    }
}

/// Counts the values that Close did not keep, and logs each field once.
fn report(cache: &ReadbackCache, metrics: &Metrics, record: &str, differences: &[Difference]) {
    cache.learn(record, differences);
    for difference in differences {
        let Difference { field, .. } = difference;
        let effect = difference.effect();
        metrics.not_kept(effect);
        if cache.is_first_of(field) {
            tracing::warn!(
                event = "value_not_kept",
                field,
                effect = effect.label(),
                "Close returned another value than it was sent; it is not sent again for six hours"
            );
        }
    }
}
