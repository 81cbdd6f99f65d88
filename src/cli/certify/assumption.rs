//! What close-sync assumes about Close.

use serde::Serialize;
use strum::{IntoStaticStr, VariantArray};

/// What close-sync assumes about Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, IntoStaticStr, VariantArray)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(super) enum Assumption {
    Schema,
    RequiredFields,
    MissingRecord,
    UnknownUrl,
    MissingSlash,
    RateLimitHeader,
    TimeNotation,
    CreatedLead,
    LeadContacts,
    ContactLists,
    ListEndpoint,
    ReadCreated,
    ReadChanged,
    ReadDeleted,
    SearchCreated,
    SearchKey,
    SearchChanged,
    EventLog,
    EventData,
    ExactSearch,
    EmailSearch,
    DescendingCursor,
    LastCursor,
    SearchRows,
    UnknownSelector,
    PutIsPatch,
    PhoneRewriting,
    PhoneCountry,
    CountryInMe,
    BadPhone,
    BadEmail,
    ErrorTexts,
    UnknownKey,
    FieldReadBack,
}

impl Assumption {
    pub(super) fn assumed(self) -> &'static str {
        match self {
            Self::Schema => "custom fields, statuses and users are complete",
            Self::RequiredFields => "the mapping fills every required custom field",
            Self::MissingRecord => "a 404 for a missing record says that it does not exist",
            Self::UnknownUrl => "a 404 for an unknown URL says so",
            Self::MissingSlash => "a path without its last slash is refused or redirected",
            Self::RateLimitHeader => "every answer has a readable rate limit header",
            Self::TimeNotation => "times are in UTC",
            Self::CreatedLead => "the answer to a creation has the Contacts of the Lead, or their ids",
            Self::LeadContacts => "a Lead has all its Contacts, or their ids",
            Self::ContactLists => "a Contact has its emails, phones and URLs",
            Self::ListEndpoint => "lists may lag behind writes; close-sync does not read them",
            Self::ReadCreated => "a created record can be read by its id at once",
            Self::ReadChanged => "a read by id shows a change at once",
            Self::ReadDeleted => "a deleted record answers 404 at once",
            Self::SearchCreated => "search shows a new record within close.search_lag",
            Self::SearchKey => "search finds a new record by its custom field within close.search_lag",
            Self::SearchChanged => "search finds a changed custom field within close.search_lag",
            Self::EventLog => "the event log shows a creation at once",
            Self::EventData => "events have the data of the record",
            Self::ExactSearch => "`exact_value` compares whole values",
            Self::EmailSearch => "search finds an email address in any case",
            Self::DescendingCursor => "a descending cursor may lose rows; close-sync sorts ascending",
            Self::LastCursor => "the last page of a search has no cursor",
            Self::SearchRows => "the rows of a search have the fields that were asked for",
            Self::UnknownSelector => "a search for a deleted custom field is refused",
            Self::PutIsPatch => "a PUT leaves the fields alone that it does not name",
            Self::PhoneRewriting => "phones are rewritten to international form",
            Self::PhoneCountry => "a phone without a country gets that of the organization",
            Self::CountryInMe => "`GET /me/` may name the country of the organization",
            Self::BadPhone => "an invalid phone is refused, and the answer names it",
            Self::BadEmail => "an invalid email address is refused, and the answer names it",
            Self::ErrorTexts => "refusals have the words of Close's own validator, or of pydantic",
            Self::UnknownKey => "an unknown key may be refused; close-sync sends none",
            Self::FieldReadBack => "a value comes back as it was sent, or in another notation",
        }
    }
}
