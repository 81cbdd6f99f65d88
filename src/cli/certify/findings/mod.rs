//! What the observations mean: each assumption about Close, what was found, and what follows. Pure.

mod answers;
mod lags;
mod searches;
#[cfg(test)]
mod tests;
mod values;

use std::time::Duration;

use strum::VariantArray;

use crate::cli::certify::assumption::Assumption;
use crate::cli::certify::finding::{Finding, Found};
use crate::cli::certify::observations::{Delay, Exact, Observations, Refusal};
use crate::domain::phone::Country;

/// What findings are compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) search_lag: Duration,
    pub(super) country: Option<Country>,
    /// `close.lead_company_id_field` is set.
    pub(super) has_company_field: bool,
    pub(super) ended_early: bool,
}

/// One finding for each assumption, and one for each configured field.
pub(super) fn findings(seen: &Observations, run: Run) -> Vec<Finding> {
    let of = |assumption: &Assumption| -> Vec<Finding> {
        if *assumption == Assumption::FieldReadBack {
            return seen.fields.iter().map(values::field).collect();
        }
        let unknown = || Found::unknown(not_seen(*assumption, seen, run));
        vec![found(*assumption, seen, run).unwrap_or_else(unknown).of(*assumption, None)]
    };
    Assumption::VARIANTS.iter().flat_map(of).collect()
}

fn found(assumption: Assumption, seen: &Observations, run: Run) -> Option<Found> {
    match assumption {
        Assumption::Schema => seen.unreadable.as_deref().map(answers::schema),
        Assumption::RequiredFields => seen.missing_required.as_deref().map(answers::required_fields),
        Assumption::MissingRecord => seen.missing_record.map(answers::missing_record),
        Assumption::UnknownUrl => seen.unknown_url.map(answers::unknown_url),
        Assumption::MissingSlash => seen.missing_slash.map(answers::missing_slash),
        Assumption::RateLimitHeader => answers::headers(seen),
        Assumption::TimeNotation => answers::times(seen),
        Assumption::CreatedLead => seen.created_lists.map(answers::created_lists),
        Assumption::LeadContacts => seen.read_lists.map(answers::read_lists),
        Assumption::ContactLists => seen.unknown_lists.as_deref().map(answers::contact_lists),
        Assumption::ListEndpoint => answers::list_endpoint(seen),
        Assumption::ReadCreated => seen.read_created.map(|delay| lags::read(delay, "the new record")),
        Assumption::ReadChanged => seen.read_changed.map(lags::read_changed),
        Assumption::ReadDeleted => seen.read_deleted.map(|delay| lags::read(delay, "the deletion")),
        Assumption::SearchCreated => seen
            .search_created
            .map(|delay| lags::search(delay, run.search_lag, &["search_lag", "creation_search_lag"])),
        Assumption::SearchKey => seen.search_key.map(|delay| lags::search(delay, run.search_lag, &[])),
        Assumption::SearchChanged => {
            seen.search_changed.map(|delay| lags::search(delay, run.search_lag, &["custom_field_search_lag"]))
        }
        Assumption::EventLog => seen.event.map(lags::event_log),
        Assumption::EventData => answers::event_data(seen),
        Assumption::ExactSearch => seen.exact.map(searches::exact),
        Assumption::EmailSearch => seen.email_search.map(searches::email_search),
        Assumption::DescendingCursor => seen.descending.map(searches::descending),
        Assumption::LastCursor => seen.last_cursor.map(searches::last_cursor),
        Assumption::SearchRows => seen.rows_have_fields.map(searches::search_rows),
        Assumption::UnknownSelector => seen.unknown_selector_refused.map(searches::unknown_selector),
        Assumption::PutIsPatch => seen.is_patch.map(answers::put_is_patch),
        Assumption::PhoneRewriting => values::phone_rewriting(seen),
        Assumption::PhoneCountry => values::phone_country(seen, run.country),
        Assumption::CountryInMe => seen.country_in_me.map(values::country_in_me),
        Assumption::BadPhone => seen.bad_phone.map(|form| values::refusal(form, "phone")),
        Assumption::BadEmail => seen.bad_email.map(values::bad_email),
        Assumption::ErrorTexts => seen.error_texts.map(answers::error_texts),
        Assumption::UnknownKey => seen.unknown_key_refused.map(answers::unknown_key),
        // A finding for each field.
        Assumption::FieldReadBack => None,
    }
}

/// Why something was not seen, and what shows it.
fn not_seen(assumption: Assumption, seen: &Observations, run: Run) -> &'static str {
    const AGAIN: &str = "run certify again to see it";
    const LATER: &str = "search was too late; use a longer --max-wait to see it";
    const NO_CONTACT: &str = "Close did not name the new Contact";
    let is_late = |delay| matches!(delay, Some(Delay::Longer(_)));
    match assumption {
        _ if run.ended_early => AGAIN,
        Assumption::SearchKey | Assumption::SearchChanged | Assumption::ExactSearch
            if !run.has_company_field =>
        {
            "needs close.lead_company_id_field"
        }
        Assumption::ExactSearch if is_late(seen.search_changed) => LATER,
        Assumption::EmailSearch if seen.exact == Some(Exact::Refused) => "Close refuses `exact_value`",
        Assumption::EmailSearch | Assumption::DescendingCursor | Assumption::SearchRows
            if is_late(seen.search_created) =>
        {
            LATER
        }
        Assumption::EmailSearch | Assumption::DescendingCursor | Assumption::UnknownSelector => {
            "Close refuses the search for another reason"
        }
        Assumption::EventData => "the event log did not show the new Lead",
        Assumption::LeadContacts => "reads did not show the new Lead",
        Assumption::ListEndpoint => "Close refuses the list",
        Assumption::LastCursor => "the page was not the last one",
        Assumption::ContactLists
        | Assumption::PhoneRewriting
        | Assumption::PhoneCountry
        | Assumption::BadPhone
        | Assumption::BadEmail
        | Assumption::UnknownKey
            if !seen.has_contact =>
        {
            NO_CONTACT
        }
        Assumption::ContactLists => "reads did not show the new Contact",
        Assumption::PhoneRewriting | Assumption::PhoneCountry => "Close does not show phones",
        Assumption::ErrorTexts => match seen.bad_email {
            Some(Refusal::Kept | Refusal::LeftOut) => "Close does not refuse the email address",
            Some(_) => "the refusal has other words; dead letters may not name the reason",
            None => NO_CONTACT,
        },
        Assumption::Schema
        | Assumption::RequiredFields
        | Assumption::MissingRecord
        | Assumption::UnknownUrl
        | Assumption::MissingSlash
        | Assumption::RateLimitHeader
        | Assumption::TimeNotation
        | Assumption::CreatedLead
        | Assumption::ReadCreated
        | Assumption::ReadChanged
        | Assumption::ReadDeleted
        | Assumption::SearchCreated
        | Assumption::SearchKey
        | Assumption::SearchChanged
        | Assumption::EventLog
        | Assumption::ExactSearch
        | Assumption::SearchRows
        | Assumption::PutIsPatch
        | Assumption::CountryInMe
        | Assumption::BadPhone
        | Assumption::BadEmail
        | Assumption::UnknownKey
        | Assumption::FieldReadBack => AGAIN,
    }
}
