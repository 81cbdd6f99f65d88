//! What `certify` sees in the answers of Close. Pure: answers in, observations out.

mod forms;
mod written;

use std::collections::BTreeSet;
use std::time::Duration;

pub(super) use forms::{
    ContactsForm, Exact, HeaderForm, LastCursor, ListForm, NotFound, TimeForm, unknown_lists,
};
pub(super) use written::{ErrorTexts, FieldObservation, Kept, Refusal};

use crate::domain::schema::{CustomField, UnreadableItem};

/// What was seen. What was not looked at, or could not be seen, is `None` or empty.
#[derive(Debug, Default)]
pub(super) struct Observations {
    /// What Close sent of the schema in a form that cannot be read.
    pub(super) unreadable: Option<Vec<UnreadableItem>>,
    /// The custom fields that Close requires in a new record and that no rule fills.
    pub(super) missing_required: Option<Vec<CustomField>>,
    /// `GET /me/` names the country of the organization.
    pub(super) country_in_me: Option<bool>,
    /// The id of the new Contact is known.
    pub(super) has_contact: bool,
    pub(super) headers: BTreeSet<HeaderForm>,
    pub(super) times: BTreeSet<TimeForm>,
    pub(super) missing_record: Option<NotFound>,
    pub(super) unknown_url: Option<NotFound>,
    /// The status of a path without its trailing slash.
    pub(super) missing_slash: Option<u16>,
    /// The lists of Contacts in the answer that created a Lead.
    pub(super) created_lists: Option<ContactsForm>,
    /// The lists of Contacts in a Lead that was read.
    pub(super) read_lists: Option<ContactsForm>,
    /// The lists of a Contact that were missing or null, of `emails`, `phones` and `urls`.
    pub(super) unknown_lists: Option<Vec<(&'static str, ListForm)>>,
    /// A list endpoint shows a Lead right after its creation.
    pub(super) list_shows_new: Option<bool>,
    /// Until a created record can be read by its id.
    pub(super) read_created: Option<Delay>,
    /// Until a read shows a change.
    pub(super) read_changed: Option<Delay>,
    /// Until a deleted record can no longer be read.
    pub(super) read_deleted: Option<Delay>,
    /// Until search shows a created record.
    pub(super) search_created: Option<Delay>,
    /// Until search finds a record by the custom field with which it was created.
    pub(super) search_key: Option<Delay>,
    /// Until search finds a record by a changed custom field.
    pub(super) search_changed: Option<Delay>,
    /// Until the event log shows a creation.
    pub(super) event: Option<Delay>,
    /// Whether the events have the record.
    pub(super) event_has_data: Option<bool>,
    /// The data of an event that is more than an hour old.
    pub(super) old_event_has_data: Option<bool>,
    pub(super) exact: Option<Exact>,
    /// Search finds a Contact by its email address in another case.
    pub(super) email_search: Option<bool>,
    /// A descending search with a cursor returns every row.
    pub(super) descending: Option<bool>,
    /// A change of one field left the others as they were.
    pub(super) is_patch: Option<bool>,
    /// Phone numbers as they were sent and as Close kept them.
    pub(super) phones: Vec<(&'static str, Option<String>)>,
    pub(super) bad_phone: Option<Refusal>,
    pub(super) bad_email: Option<Refusal>,
    pub(super) error_texts: Option<ErrorTexts>,
    pub(super) unknown_key_refused: Option<bool>,
    /// A search for a custom field in `_fields` that does not exist is refused.
    pub(super) unknown_selector_refused: Option<bool>,
    pub(super) last_cursor: Option<LastCursor>,
    /// The rows of a search have the fields that were asked for.
    pub(super) rows_have_fields: Option<bool>,
    pub(super) fields: Vec<FieldObservation>,
}

/// How long until something was visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delay {
    /// At the first look, which came after this time. How long it took until then is not known.
    Below(Duration),
    Within(Duration),
    /// Not within this time.
    Longer(Duration),
}
