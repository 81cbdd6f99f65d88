//! Reading records: the interface, its results and the look-ups of a search.

use tokio::time::Instant;

use crate::close::error::CloseError;
use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::matching::{ContactMatch, MatchedContacts, compare, match_contacts};
use crate::domain::record::{Channel, Contact, ContactId, FieldId, Lead, LeadId};

/// Reads Leads and Contacts. A trait, so that decisions can also be tested on records in memory.
pub trait Records: Sync {
    /// Leads that may have the company id. The caller compares these candidates again.
    fn find_leads(
        &self,
        field: &FieldId,
        company_id: &str,
    ) -> impl Future<Output = Result<Vec<Lead>, CloseError>> + Send;

    /// Contacts that may be the person. The caller compares these candidates again.
    fn find_contacts(
        &self,
        user: Option<(&FieldId, &str)>,
        email: Option<&str>,
    ) -> impl Future<Output = Result<Hits, CloseError>> + Send;

    /// A Lead, and the person's Contacts in it. Its other Contacts are not kept, and not even read if there are many.
    fn lead(
        &self,
        id: &LeadId,
        person: &Identity,
        keys: &KeyFields,
    ) -> impl Future<Output = Result<LeadWithPerson, CloseError>> + Send;

    /// A Contact.
    fn contact(&self, id: &ContactId) -> impl Future<Output = Result<Contact, CloseError>> + Send;

    /// When the last call was sent, if a call may have to wait before it is sent.
    fn last_sent(&self) -> Option<Instant> {
        None
    }
}

/// A Lead with its Contacts, as Close answered. The specification of 2026 marks the Contacts in a Lead as deprecated and
/// only requires their ids (close-api.md §15, 9).
#[derive(Clone, Debug, PartialEq)]
pub struct LeadWithContacts {
    pub lead: Lead,
    pub contacts: Vec<Contact>,
    /// The Contacts of the Lead that the answer lacks.
    pub missing: Vec<ContactId>,
}

/// A Lead, and what a message keeps of its Contacts.
#[derive(Clone, Debug, PartialEq)]
pub struct LeadWithPerson {
    pub lead: Lead,
    /// The person's Contacts among those in the answer.
    pub people: MatchedContacts,
    /// The Contacts of the Lead that the answer lacks, or has without the lists that matter.
    pub missing: Vec<ContactId>,
    /// The Lead has many Contacts, and the answer none of them: search finds the person's.
    pub unlisted: bool,
}

impl LeadWithPerson {
    /// A Lead that was read without its Contacts.
    pub(crate) fn unlisted(lead: Lead) -> Self {
        Self { lead, people: MatchedContacts::default(), missing: Vec::new(), unlisted: true }
    }
}

impl LeadWithContacts {
    /// How many Contacts the Lead has.
    pub(crate) fn members(&self) -> usize {
        self.contacts.len().saturating_add(self.missing.len())
    }

    /// What a message about this person keeps. A Contact whose answer leaves out what is needed counts as missing.
    pub(crate) fn of_person(self, person: &Identity, keys: &KeyFields) -> LeadWithPerson {
        let Self { lead, contacts, mut missing } = self;
        let is_user = |contact: &Contact| compare(contact, person, keys) == ContactMatch::SameUser;
        let is_known = contacts.iter().any(is_user);
        let is_incomplete = |contact: &Contact| match compare(contact, person, keys) {
            ContactMatch::SameUser | ContactMatch::SameEmail => !contact.unknown_lists.is_empty(),
            ContactMatch::Conflict => false,
            // Without its emails, it may be the person.
            ContactMatch::NoMatch => {
                !is_known && person.email.is_some() && contact.unknown_lists.contains(&Channel::Email)
            }
        };
        let (incomplete, contacts): (Vec<_>, Vec<_>) = contacts.into_iter().partition(is_incomplete);
        missing.extend(incomplete.into_iter().map(|contact| contact.id));
        LeadWithPerson { lead, people: match_contacts(contacts, person, keys), missing, unlisted: false }
    }
}

/// The record in the answer to a write, as Close stored it.
#[derive(Clone, Debug, PartialEq)]
pub enum Written {
    Lead(LeadWithContacts),
    Contact(Contact),
    /// Close applied the changes of a Lead, and its answer was too large to read.
    Unread,
}

/// What to search for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Leads with a company id.
    Lead {
        /// The field that stores it.
        field: FieldId,
        company_id: String,
    },
    /// Contacts with a user id or an email: either is enough.
    Contact {
        /// The field that stores the user id, and the id.
        user: Option<(FieldId, String)>,
        email: Option<String>,
    },
}

/// What a search for Contacts found.
#[derive(Clone, Debug, Default)]
pub struct Hits {
    /// At most one page, oldest first.
    pub contacts: Vec<Contact>,
    /// Whether Close has more than one page.
    pub more: bool,
    /// Those that have a user id and an email that the search was for. By which of them search has found them is not known.
    pub by_both: Vec<ContactId>,
    /// The search was for exactly these keys, and for no other person.
    pub exact: bool,
}
