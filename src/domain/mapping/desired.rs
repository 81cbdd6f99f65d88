//! What an event wants of Close, and who it is about.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::Value;

use crate::domain::dropped::Dropped;
use crate::domain::mapping::WriteRule;
use crate::domain::record::{Channel, Field, FieldId};
use crate::domain::staleness::SyncedAtFields;
use crate::domain::switches::Switches;

/// The custom fields, both of type text, in which Close keeps the ids records are found by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFields {
    /// The Lead field with the company id. Without it, Leads are never looked up by company.
    pub company: Option<FieldId>,
    /// The Contact field with the user id. Without it, people are matched by email only.
    pub user: Option<FieldId>,
}

/// Who an event is about. At least one of user id and email is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The company, when there is a field to find it by.
    pub company_id: Option<String>,
    /// The person, when there is a field to find it by.
    pub user_id: Option<String>,
    /// The person's email, trimmed and case-folded.
    pub email: Option<String>,
}

/// What a record is found by. Messages that share a key must not be worked on at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// A company id.
    Company(String),
    /// A user id.
    User(String),
    /// An email, trimmed and case-folded.
    Email(String),
}

impl Identity {
    /// The key the user id makes.
    pub fn user(&self) -> Option<Key> {
        self.user_id.clone().map(Key::User)
    }

    /// The key the email makes.
    pub fn email(&self) -> Option<Key> {
        self.email.clone().map(Key::Email)
    }

    /// The keys of the person: user id first, as it decides before the email.
    pub fn person(&self) -> impl Iterator<Item = Key> {
        self.user().into_iter().chain(self.email())
    }

    /// All keys.
    pub fn keys(&self) -> Vec<Key> {
        self.company_id.clone().map(Key::Company).into_iter().chain(self.person()).collect()
    }
}

/// A value with the rule that guards it.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// What to write. Text for the fixed fields and for channels.
    pub value: Value,
    /// When.
    pub write: WriteRule,
}

/// What the event says the records should hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// Whom it is about.
    pub identity: Identity,
    /// When it happened. Nothing is too old if that is not known.
    pub at: Option<Timestamp>,
    /// Where records store that.
    pub stamps: SyncedAtFields,
    /// Values for the Lead, the company id among them.
    pub lead: BTreeMap<Field, Wanted>,
    /// Values for the Contact, the user id among them.
    pub contact: BTreeMap<Field, Wanted>,
    /// Entries the Contact's lists should have.
    pub channels: BTreeMap<Channel, Wanted>,
    /// Mapped values that could not be used.
    pub dropped: Vec<Dropped>,
}

impl Desired {
    /// Whether this event comes to the same records as `first`, the one right before it, once that is applied:
    /// then both can be worked on together. So it does if it names the same company and the same user, or
    /// without a user id the same email. Beside a user id the email may be missing, as `first` has then left the
    /// user id on a Contact; only switches can keep it from that.
    pub fn goes_along(&self, first: &Self, switches: Switches) -> bool {
        let (one, other) = (&first.identity, &self.identity);
        let leaves_user_id = switches.allow_creating_new_contacts
            && switches.allow_updating_existing_contacts
            && switches.allow_creating_duplicate_contacts;
        let same_email = one.email == other.email;
        let less = other.user_id.is_some() && other.email.is_none() && leaves_user_id;
        one.company_id == other.company_id && one.user_id == other.user_id && (same_email || less)
    }

    /// The name the Lead is to have.
    pub fn lead_name(&self) -> Option<String> {
        text_of(&self.lead)
    }

    /// The name the Contact is to have.
    pub fn contact_name(&self) -> Option<String> {
        text_of(&self.contact)
    }
}

fn text_of(wanted: &BTreeMap<Field, Wanted>) -> Option<String> {
    wanted.get(&Field::Name).and_then(|wanted| wanted.value.as_str()).map(str::to_owned)
}

/// The event names nobody who could be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// Neither a user id nor an email.
    #[error("the event has neither a user id nor an email")]
    Anonymous,
    /// There is a user id, but no field to look it up by.
    #[error("the event has a user id and no email, and `close.contact_user_id_field` is not set")]
    NoUserField,
    /// There is an email that is none, and no user id.
    #[error("the event has no user id, and its email is not a valid email address")]
    BadEmail,
    /// There is a user id that cannot be used, and no email.
    #[error("the event has no email, and its user id is not text or a whole number")]
    BadUserId,
}
