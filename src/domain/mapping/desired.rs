//! What an event wants written to Close, and who it is about.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::Value;

use crate::domain::dropped::Dropped;
use crate::domain::record::{Channel, Field, FieldId};
use crate::domain::staleness::SyncedAtFields;
use crate::domain::switches::Switches;

/// When a wanted value may be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteRule {
    /// Whenever it differs.
    #[default]
    Always,
    /// Only into a field that is empty in Close.
    IfEmpty,
    /// Only into a record that this event creates.
    OnCreate,
    /// Adds to the values of a field with several values, and keeps what it has.
    Add,
}

/// The custom fields, both of type text, in which Close stores the ids that records are found by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFields {
    /// The Lead field with the company id. Without it, Leads are never looked up by company.
    pub company: Option<FieldId>,
    /// The Contact field with the user id. Without it, people are matched by email only.
    pub user: Option<FieldId>,
}

/// Who an event is about. Has at least a user id or an email.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Only if there is a field to look it up by.
    pub company_id: Option<String>,
    /// Only if there is a field to look it up by.
    pub user_id: Option<String>,
    /// Trimmed and case-folded.
    pub email: Option<String>,
}

/// What a record is found by. Messages that share a key must not run at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    Company(String),
    User(String),
    /// Trimmed and case-folded.
    Email(String),
}

impl Identity {
    pub fn company(&self) -> Option<Key> {
        self.company_id.clone().map(Key::Company)
    }

    pub fn user(&self) -> Option<Key> {
        self.user_id.clone().map(Key::User)
    }

    pub fn email(&self) -> Option<Key> {
        self.email.clone().map(Key::Email)
    }

    /// The keys of the person. The user id comes first because it takes precedence over the email.
    pub fn person(&self) -> impl Iterator<Item = Key> {
        self.user().into_iter().chain(self.email())
    }

    pub fn keys(&self) -> Vec<Key> {
        self.company().into_iter().chain(self.person()).collect()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Text for the fixed fields and for channels.
    pub value: Value,
    pub write: WriteRule,
}

/// The values that the records should have according to the event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    pub identity: Identity,
    /// When the event happened. An event without a time is never stale.
    pub at: Option<Timestamp>,
    /// An operator replays it. It may be much older than what the worker remembers.
    pub is_replay: bool,
    /// The fields in which records store that time.
    pub synced_at: SyncedAtFields,
    /// Values for the Lead, including the company id.
    pub lead: BTreeMap<Field, Wanted>,
    /// Values for the Contact, including the user id.
    pub contact: BTreeMap<Field, Wanted>,
    /// Entries for the Contact's lists.
    pub channels: BTreeMap<Channel, Wanted>,
    /// Mapped values that could not be used.
    pub dropped: Vec<Dropped>,
}

impl Desired {
    /// Whether this event can be written together with `first`, the event right before it. This requires that it matches
    /// the same records as `first` once `first` is applied.
    ///
    /// Both events must name the same company, the same user and the same email. If they have a user id, the email may be
    /// missing in this event: `first` has then stored the user id in a Contact, unless a switch prevents that.
    pub fn can_merge_with(&self, first: &Self, switches: Switches) -> bool {
        let (one, other) = (&first.identity, &self.identity);
        let user_id_is_stored = switches.allow_creating_new_contacts
            && switches.allow_updating_existing_contacts
            && switches.allow_creating_duplicate_contacts;
        let same_email = one.email == other.email;
        let only_user_id = other.user_id.is_some() && other.email.is_none() && user_id_is_stored;
        one.company_id == other.company_id && one.user_id == other.user_id && (same_email || only_user_id)
    }

    pub fn lead_name(&self) -> Option<String> {
        name_in(&self.lead)
    }

    pub fn contact_name(&self) -> Option<String> {
        name_in(&self.contact)
    }
}

fn name_in(wanted: &BTreeMap<Field, Wanted>) -> Option<String> {
    wanted.get(&Field::Name).and_then(|wanted| wanted.value.as_str()).map(str::to_owned)
}

/// Why an event does not identify a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    #[error("the event has neither a user id nor an email")]
    Anonymous,
    /// There is a user id, but no field to look it up by.
    #[error("the event has a user id and no email, and `close.contact_user_id_field` is not set")]
    NoUserField,
    #[error("the event has no user id, and its email is not a valid email address")]
    BadEmail,
    #[error("the event has no email, and its user id is a placeholder (`mapping.placeholders`)")]
    Placeholder,
    #[error("the event has no email, and its user id is not text or a whole number, or is too long")]
    BadUserId,
}
