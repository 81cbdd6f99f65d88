//! Executes one step of a plan: sends the write, and again without the optional fields that Close rejects.

use tokio::time::Instant;

use crate::close::{Api, CloseError, CreatedIds, FieldError, Rejection, Written};
use crate::domain::decision::Decision;
use crate::domain::mapping::{Desired, Key};
use crate::domain::matching::Found;
use crate::domain::partial_write::{self, Remainder};
use crate::domain::plan::{FieldVerdict, RejectedField, Step};
use crate::domain::readback::{self, Difference};
use crate::outcome::Effect;
use crate::sync::context::Context;
use crate::sync::readback_cache::ReadbackCache;
use crate::telemetry::metrics::Metrics;

pub(super) struct Executor<'a, C> {
    pub(super) context: &'a Context,
    pub(super) client: &'a C,
    pub(super) desired: &'a Desired,
    /// Several events share the write. When Close rejects a field of it, they are retried one by one.
    pub(super) merges: bool,
    pub(super) keys: &'a [Key],
    pub(super) decision: &'a mut Decision,
}

impl<C: Api> Executor<'_, C> {
    /// Executes a step. When Close rejects optional fields, repeats it without them, each time with fewer: Close
    /// may name one only after another is gone.
    pub(super) async fn execute(
        &mut self,
        step: &Step,
        found: &Found,
        created: &mut CreatedIds,
    ) -> Result<Effect, CloseError> {
        let mut remaining = step.clone();
        let mut field_is_missing = false;
        let effect = loop {
            if remaining.is_only_time(&self.desired.synced_at) {
                break Effect::Unchanged;
            }
            let rejection = match self.send(&remaining, found).await {
                Err(CloseError::Rejected(rejection)) if !self.merges => rejection,
                Err(error) => return Err(error),
                Ok(ids) => {
                    if step.creates() {
                        *created = ids;
                    }
                    break Effect::of(step);
                }
            };
            field_is_missing |= rejection.field_is_missing();
            let Some((smaller, rejected, verdict)) = self.without_rejected(&remaining, &rejection).await
            else {
                return Err(CloseError::Rejected(rejection));
            };
            let dropped = self.decision.plan.refuse(&rejected, verdict);
            self.decision.dropped.extend(dropped);
            remaining = smaller;
        };
        if field_is_missing {
            self.context.refresh_stale_mapping().await;
        }
        Ok(effect)
    }

    /// The step without what Close rejected. If Close named no field of it, without custom fields that were deleted in Close,
    /// else without everything optional.
    async fn without_rejected(
        &self,
        step: &Step,
        rejection: &Rejection,
    ) -> Option<(Step, Vec<RejectedField>, FieldVerdict)> {
        let (context, desired) = (self.context, self.desired);
        let without = |paths: &[Vec<String>]| {
            let paths = paths.iter().map(Vec::as_slice);
            partial_write::without_rejected(step, paths, desired, &context.keys)
        };
        let named: Vec<Vec<String>> = rejection.fields.iter().map(|field| field.path.clone()).collect();
        match without(&named) {
            Remainder::Without(smaller, rejected) => return Some((smaller, rejected, FieldVerdict::Refused)),
            Remainder::Required => return None,
            Remainder::Unnamed => {
                let is_about_values = matches!(rejection.status, 400 | 422)
                    && !rejection.fields.iter().any(FieldError::is_about_something_absent);
                if !is_about_values {
                    return None;
                }
            }
        }
        context.refresh_stale_mapping().await;
        let mapping = context.mapping();
        match without(&partial_write::unknown_fields(step, |id| mapping.has_field(id))) {
            Remainder::Without(smaller, rejected) => Some((smaller, rejected, FieldVerdict::Refused)),
            Remainder::Required => None,
            Remainder::Unnamed => {
                let smaller = [true, false].into_iter().find_map(|keep_names| {
                    partial_write::without_optional(step, desired, &context.keys, keep_names)
                });
                let (smaller, rejected) = smaller?;
                tracing::warn!(
                    event = "refusal_without_field",
                    step = step.label(),
                    error = %rejection,
                    left_out = rejected.len(),
                    "Close rejected a write without naming a field, repeating it without optional values"
                );
                Some((smaller, rejected, FieldVerdict::RefusedTogether))
            }
        }
    }

    /// Sends one write and caches the ids it returns. A creation is pending from before the call, because the
    /// call may be dropped at any moment and still happen.
    async fn send(&self, step: &Step, found: &Found) -> Result<CreatedIds, CloseError> {
        let Context { id_cache, recent, settings, client, .. } = self.context;
        let adopts = found.adopts() && matches!(step, Step::UpdateLead { .. });
        let gives_keys = adopts || step.creates();
        if gives_keys {
            id_cache.add_pending_creation(self.keys, Instant::now() + client.timeout() + settings.search_lag);
        }
        let result = self.client.write(step).await;
        if gives_keys {
            match &result {
                Err(error) if error.may_have_been_applied() => {
                    id_cache.add_pending_creation(self.keys, Instant::now() + settings.search_lag);
                }
                Ok(_) | Err(_) => id_cache.complete_creation(self.keys),
            }
        }
        let written = result.map_err(|error| match step.changes() {
            // It was read just now.
            Some(id) if error == CloseError::NotFound => recent.not_found(id),
            Some(_) | None => error,
        })?;
        recent.written(step, &written);
        learn(self.context, step, found, &written);
        let mut ids = CreatedIds::of(step, &written);
        if adopts && let Step::UpdateLead { id, .. } = step {
            ids.lead = Some(id.clone());
        }
        tracing::debug!(step = step.label(), made = ?ids, "wrote to Close");
        id_cache.remember_created(&self.desired.identity, ids.clone(), self.decision.is_new_person());
        Ok(ids)
    }
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
        if let Some(country) = readback::country_of(&sent.lists, &kept.lists)
            && readback_cache.set_country(country)
        {
            tracing::info!(event = "phone_country_learned", %country, "learned the country of national phone numbers");
        }
        let before = contacts.into_iter().find(|contact| contact.id == kept.id);
        let mut differences =
            readback::differences(&sent.fields, before.map(|contact| &contact.fields), &kept.fields);
        differences.extend(readback::list_differences(&sent.lists, &kept.lists, readback_cache.country()));
        report(readback_cache, metrics, kept.id.as_str(), &differences);
    }
}

/// Counts the values that Close did not keep, and logs each field once.
fn report(cache: &ReadbackCache, metrics: &Metrics, record: &str, differences: &[Difference]) {
    cache.learn(record, differences);
    for Difference { field, effect, .. } in differences {
        metrics.not_kept(*effect);
        if cache.is_first_of(field) {
            tracing::warn!(
                event = "value_not_kept",
                field,
                effect = effect.label(),
                "Close returned another value than it was sent; it is not sent again"
            );
        }
    }
}
