//! People win: a write does not undo what a person entered since the record was read.
//!
//! Close replaces a list as a whole, and has no version that would make a write conditional (close-api.md §15, 19). Between
//! reading and writing, a message may wait for rate budget for seconds or minutes. So the write takes its budget first.
//! Then a record whose edits it could undo is read again, unless it was read within [`FRESH`], and the write follows at
//! once. If a person has changed what the step writes, the record is planned again.
//!
//! An edit within [`FRESH`] before the write can still be lost.

use std::time::Duration;

use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::matching::{Found, compare, match_lead};
use crate::domain::plan::Step;
use crate::domain::record::{Contact, Lead};
use crate::sync::lookups::{Fresh, Read};

/// A record whose read was sent within this time is written without reading it again.
const FRESH: Duration = Duration::from_secs(1);

/// Whether a record may be written as it was read.
pub(super) fn is_fresh(read: Option<&Read>) -> bool {
    read.is_some_and(|read| !read.stale && read.at.elapsed() <= FRESH)
}

/// Whether a step would write the same to the record as it is now.
pub(super) fn is_as_planned(step: &Step, found: &Found, fresh: &Fresh) -> bool {
    let (mut leads, mut contacts) = found.records();
    match (step, fresh) {
        (Step::UpdateLead { id, changes }, Fresh::Lead(fresh)) => {
            leads.find(|lead| lead.id == *id).is_some_and(|planned| {
                changes.keys().all(|key| planned.fields.get(key) == fresh.fields.get(key))
            })
        }
        (Step::UpdateContact { id, changes }, Fresh::Contact(fresh)) => {
            contacts.find(|contact| contact.id == *id).is_some_and(|planned| {
                let has_list = |channel| {
                    planned.list(channel) == fresh.list(channel) && !fresh.unknown_lists.contains(&channel)
                };
                planned.lead_id == fresh.lead_id
                    && changes.lists.keys().all(|channel| has_list(*channel))
                    && changes.fields.keys().all(|key| planned.fields.get(key) == fresh.fields.get(key))
            })
        }
        (
            Step::CreateLead { .. }
            | Step::CreateContact { .. }
            | Step::UpdateLead { .. }
            | Step::UpdateContact { .. },
            Fresh::Lead(_) | Fresh::Contact(_),
        ) => false,
    }
}

/// Puts a record that was read again into what was found. Returns whether it still matches as before; otherwise the
/// message must look up again.
pub(super) fn substitute(found: &mut Found, fresh: Fresh, person: &Identity, keys: &KeyFields) -> bool {
    match fresh {
        Fresh::Lead(fresh) => {
            let verdict =
                |lead: &Lead| person.company_id.as_deref().map(|company| match_lead(lead, company, keys));
            let mut same = true;
            for lead in found.leads_mut().filter(|lead| lead.id == fresh.id) {
                same &= verdict(lead) == verdict(&fresh);
                *lead = fresh.clone();
            }
            same
        }
        Fresh::Contact(fresh) => {
            let likeness = |contact: &Contact| compare(contact, person, keys);
            let mut same = true;
            for contact in found.contacts_mut().filter(|contact| contact.id == fresh.id) {
                same &= likeness(contact) == likeness(&fresh) && contact.lead_id == fresh.lead_id;
                *contact = fresh.clone();
            }
            same
        }
    }
}
