//! Matching: which records in Close an event is about (`design.md` §2, rules 1-5).
//!
//! The result of a search is only a hint. Search analyses text, lags behind writes and may list deleted records
//! (close-api.md §6). So every candidate is compared again here: ids exactly, emails without case. Each candidate gets a
//! [`Verdict`] that explains the choice.
//!
//! **Special cases.**
//!
//! - The user id takes precedence over the email. If a Contact has the user id of the event, Contacts that have only the
//!   email are left alone. The email is then appended to the Contacts with the user id, although it remains in the other
//!   Contacts too: only a person can decide which of them is wrong.
//! - A Contact that has the email and another user id is a different person, even if no other Contact matches. Shared
//!   addresses (`info@`) are common, and overwriting a person is worse than a second Contact.
//! - Without a user id in the event, every Contact with the email matches, also Contacts that have different user ids.
//!   The event does not say which of them it means, and matching none of them would create one more.
//! - If several Contacts match, all are updated, oldest first and at most ten. If several Leads have the company id, the
//!   oldest one is used. Dates may be equal and Close leaves their order open, so the id decides then (close-api.md §12,
//!   13).
//! - All email addresses of a Contact count equally.
//! - Emails that Close does not show are unknown, not absent (close-api.md §15, 9). Search by exactly this email then decides.
//!   If the search is inexact and finds such a Contact, the attempt fails rather than create a second Contact.
use strum::{IntoStaticStr, VariantArray};

use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::record::{Channel, Contact, ContactId, Lead};

/// The maximum number of Contacts to update for one event (`design.md` §2, rule 4).
pub const MAX_CONTACTS: usize = 10;

/// How a Contact compares with the person that an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContactMatch {
    /// Has the user id.
    SameUser,
    /// Has the email, and no other user id.
    SameEmail,
    /// Has the email but another user id: a different person, never changed.
    Conflict,
    /// Has neither the user id nor the email.
    NoMatch,
}

impl ContactMatch {
    pub fn is_person(self) -> bool {
        matches!(self, Self::SameUser | Self::SameEmail)
    }
}

/// Whether a candidate matches, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Verdict {
    /// The Lead has the company id.
    SameCompany,
    /// The Lead has the company id, but an older Lead has it too.
    YoungerLead,
    /// The Lead has another company id.
    OtherCompany,
    /// The Lead has no company id.
    NoCompany,
    /// The Contact has the user id.
    SameUser,
    /// The Contact has the email.
    SameEmail,
    /// The Contact has the email, but another Contact has the user id, which takes precedence.
    UserIdDecides,
    /// The Contact has the email but another user id.
    #[strum(serialize = "somebody_else")]
    DifferentPerson,
    /// The Contact has neither the user id nor the email. Search is only a hint.
    #[strum(serialize = "not_the_person")]
    NoMatch,
    /// Close does not show the emails of the Contact, and no user id decides.
    EmailsUnknown,
    /// The Contact matches, but ten older Contacts match too.
    TooMany,
    /// The record was deleted or merged, and search still lists it.
    Gone,
}

impl Verdict {
    /// The label in logs and in JSON.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::SameCompany => "has the company id",
            Self::YoungerLead => "has the company id, but an older Lead has it too",
            Self::OtherCompany => "has another company id",
            Self::NoCompany => "has no company id",
            Self::SameUser => "has the user id",
            Self::SameEmail => "has the email",
            Self::UserIdDecides => {
                "has the email, but another Contact has the user id, which takes precedence"
            }
            Self::DifferentPerson => "has the email but another user id: a different person, left alone",
            Self::NoMatch => "has neither the user id nor the email",
            Self::EmailsUnknown => "may have the email: Close does not show its emails",
            Self::TooMany => "matches too, but only the ten oldest Contacts are updated",
            Self::Gone => "was deleted or merged",
        }
    }
}

/// The company id that a Lead has.
pub(crate) fn company_of<'l>(lead: &'l Lead, keys: &KeyFields) -> Option<&'l str> {
    keys.company.as_ref().and_then(|field| lead.custom(field))
}

/// The user id that a Contact has.
pub(crate) fn user_of<'c>(contact: &'c Contact, keys: &KeyFields) -> Option<&'c str> {
    keys.user.as_ref().and_then(|field| contact.custom(field))
}

pub fn compare(contact: &Contact, person: &Identity, keys: &KeyFields) -> ContactMatch {
    let theirs = user_of(contact, keys);
    if theirs.is_some() && theirs == person.user_id.as_deref() {
        return ContactMatch::SameUser;
    }
    let same_email = person.email.as_ref().is_some_and(|email| contact.has(Channel::Email, email, None));
    match (same_email, theirs, &person.user_id) {
        (false, ..) => ContactMatch::NoMatch,
        (true, Some(_), Some(_)) => ContactMatch::Conflict,
        (true, ..) => ContactMatch::SameEmail,
    }
}

/// Whether a Contact may be the person although it does not match: Close does not show its emails, and no user id decides.
pub fn may_be(contact: &Contact, person: &Identity, keys: &KeyFields) -> bool {
    let theirs = user_of(contact, keys);
    let shows_emails =
        contact.lists.contains_key(&Channel::Email) || !contact.unknown_lists.contains(&Channel::Email);
    person.email.is_some() && !shows_emails && (theirs.is_none() || person.user_id.is_none())
}

/// The Contacts of a person.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MatchedContacts {
    /// Oldest first, at most [`MAX_CONTACTS`].
    pub contacts: Vec<Contact>,
    /// The verdict on each candidate, oldest first.
    pub verdicts: Vec<(ContactId, Verdict)>,
}

impl MatchedContacts {
    /// Whether one of these Contacts may be the person.
    pub fn are_uncertain_about(&self, ids: &[ContactId]) -> bool {
        self.verdicts.iter().any(|(id, verdict)| *verdict == Verdict::EmailsUnknown && ids.contains(id))
    }

    /// Whether another Contact may be the person.
    pub fn are_uncertain(&self) -> bool {
        self.verdicts.iter().any(|(_, verdict)| *verdict == Verdict::EmailsUnknown)
    }
}

/// Selects the Contacts of a person: those with the user id, else those with the email.
pub fn match_contacts(mut candidates: Vec<Contact>, person: &Identity, keys: &KeyFields) -> MatchedContacts {
    candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
    candidates.dedup_by(|a, b| a.id == b.id);
    let compared = |contact: &Contact| compare(contact, person, keys);
    let by_user = candidates.iter().any(|contact| compared(contact) == ContactMatch::SameUser);
    let mut matched = MatchedContacts::default();
    for contact in candidates {
        let verdict = match compared(&contact) {
            ContactMatch::SameEmail if by_user => Verdict::UserIdDecides,
            ContactMatch::Conflict => Verdict::DifferentPerson,
            ContactMatch::NoMatch if may_be(&contact, person, keys) => Verdict::EmailsUnknown,
            ContactMatch::NoMatch => Verdict::NoMatch,
            ContactMatch::SameUser | ContactMatch::SameEmail if matched.contacts.len() == MAX_CONTACTS => {
                Verdict::TooMany
            }
            ContactMatch::SameUser => Verdict::SameUser,
            ContactMatch::SameEmail => Verdict::SameEmail,
        };
        matched.verdicts.push((contact.id.clone(), verdict));
        if matches!(verdict, Verdict::SameUser | Verdict::SameEmail) {
            matched.contacts.push(contact);
        }
    }
    matched
}

/// Compares a Lead with a company.
pub fn match_lead(lead: &Lead, company_id: &str, keys: &KeyFields) -> Verdict {
    match company_of(lead, keys) {
        Some(id) if id == company_id => Verdict::SameCompany,
        Some(_) => Verdict::OtherCompany,
        None => Verdict::NoCompany,
    }
}

/// The Leads that have exactly this company id, oldest first. The first one is the Lead of the company.
pub fn company_leads(mut candidates: Vec<Lead>, company_id: &str, keys: &KeyFields) -> Vec<Lead> {
    candidates.retain(|lead| match_lead(lead, company_id, keys) == Verdict::SameCompany);
    candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
    candidates
}

/// The records in Close that match an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// The Lead of the company exists, or an existing Lead is adopted for it.
    InLead {
        lead: Lead,
        /// The Contacts of the person in this Lead.
        contacts: Vec<Contact>,
        /// The Lead had no company id and gets it now (rule 3).
        adopted: bool,
        /// The person also has a Contact in another Lead. Only looked up when `allow_creating_duplicate_contacts` is off
        /// and `contacts` is empty. Otherwise it makes no difference.
        elsewhere: bool,
    },
    /// The person exists, and the event names no company.
    Anywhere {
        /// Each Contact with its Lead. The Lead is `None` when the event has no values for it.
        people: Vec<(Contact, Option<Lead>)>,
    },
    /// The person exists, but only in Leads of other companies.
    OtherCompany,
    /// Neither the company nor the person exists.
    NoMatch,
}

/// Which rule applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Case {
    /// The company has a Lead and the person is in it.
    #[strum(serialize = "person_in_company_lead")]
    PersonInLead,
    /// The company has a Lead, and the person is not in it.
    #[strum(serialize = "new_in_company_lead")]
    NewInLead,
    /// The company has no Lead, but the person is in a Lead without company id. That Lead gets the company id.
    #[strum(serialize = "lead_adopted")]
    AdoptedLead,
    /// The company has no Lead, and the person is only in Leads of other companies.
    #[strum(serialize = "person_of_other_company")]
    OtherCompany,
    /// The event names no company, and the person exists.
    KnownPerson,
    /// Neither the company nor the person exists.
    #[strum(serialize = "nobody_known")]
    NoMatch,
}

impl Case {
    /// The label in logs and in JSON.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::PersonInLead => "the company has a Lead and the person is in it: both are updated",
            Self::NewInLead => "the company has a Lead but the person is not in it: a Contact is added",
            Self::AdoptedLead => {
                "no Lead has the company id, but the person is in a Lead without one: that Lead gets the company id"
            }
            Self::OtherCompany => {
                "no Lead has the company id, and the person is only in Leads of other companies: a Lead with a Contact is created"
            }
            Self::KnownPerson => {
                "the event has no company id to look up, and the person exists: their Contacts and Leads are updated"
            }
            Self::NoMatch => "neither the company nor the person exists: a Lead with a Contact is created",
        }
    }
}

impl Found {
    /// Which rule applied.
    pub fn case(&self) -> Case {
        match self {
            Self::InLead { adopted: true, .. } => Case::AdoptedLead,
            Self::InLead { contacts, .. } if contacts.is_empty() => Case::NewInLead,
            Self::InLead { .. } => Case::PersonInLead,
            Self::Anywhere { .. } => Case::KnownPerson,
            Self::OtherCompany => Case::OtherCompany,
            Self::NoMatch => Case::NoMatch,
        }
    }

    /// The existing Leads and Contacts.
    pub fn records(&self) -> (impl Iterator<Item = &Lead>, impl Iterator<Item = &Contact>) {
        let (lead, contacts, people) = match self {
            Self::InLead { lead, contacts, .. } => (Some(lead), contacts.as_slice(), &[][..]),
            Self::Anywhere { people } => (None, &[][..], people.as_slice()),
            Self::OtherCompany | Self::NoMatch => (None, &[][..], &[][..]),
        };
        let leads = lead.into_iter().chain(people.iter().filter_map(|(_, lead)| lead.as_ref()));
        (leads, contacts.iter().chain(people.iter().map(|(contact, _)| contact)))
    }

    pub(crate) fn leads_mut(&mut self) -> impl Iterator<Item = &mut Lead> {
        let (inside, anywhere) = match self {
            Self::InLead { lead, .. } => (Some(lead), None),
            Self::Anywhere { people } => {
                (None, Some(people.iter_mut().filter_map(|(_, lead)| lead.as_mut())))
            }
            Self::OtherCompany | Self::NoMatch => (None, None),
        };
        inside.into_iter().chain(anywhere.into_iter().flatten())
    }

    pub(crate) fn contacts_mut(&mut self) -> impl Iterator<Item = &mut Contact> {
        let (inside, anywhere) = match self {
            Self::InLead { contacts, .. } => (Some(contacts.iter_mut()), None),
            Self::Anywhere { people } => (None, Some(people.iter_mut().map(|(contact, _)| contact))),
            Self::OtherCompany | Self::NoMatch => (None, None),
        };
        inside.into_iter().flatten().chain(anywhere.into_iter().flatten())
    }

    /// Whether a Lead is adopted: it gets the company id because no Lead has it.
    pub fn adopts(&self) -> bool {
        matches!(self, Self::InLead { adopted: true, .. })
    }
}

/// Selects the Lead to adopt when a search by company id found none (rule 3, last two cases). `leads` are those of the
/// Contacts of the person, oldest Contact first.
///
/// At most one Lead is adopted, or the company would have two. A Lead that already has the company id comes first: search
/// had not indexed it yet. Returns `None` if all Leads belong to other companies. A new Lead is then needed.
pub fn adopt<'a>(
    leads: impl Iterator<Item = &'a Lead> + Clone,
    company_id: &str,
    keys: &KeyFields,
) -> Option<usize> {
    let first = |wanted: Verdict| leads.clone().position(|lead| match_lead(lead, company_id, keys) == wanted);
    first(Verdict::SameCompany).or_else(|| first(Verdict::NoCompany))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::record::{ContactId, Entry, Field, FieldId, LeadId};

    pub(crate) fn keys() -> KeyFields {
        KeyFields { company: Some(FieldId::new("cf_company")), user: Some(FieldId::new("cf_user")) }
    }

    pub(crate) fn lead(id: &str, company: Option<&str>) -> Lead {
        Lead {
            id: LeadId::new(id),
            date_created: "2026-01-01".into(),
            date_updated: None,
            fields: company
                .map(|id| (Field::Custom(FieldId::new("cf_company")), json!(id)))
                .into_iter()
                .collect(),
        }
    }

    pub(crate) fn contact(id: &str, lead: &str, user: Option<&str>, email: Option<&str>) -> Contact {
        let entry = |email: &str| Entry { value: email.into(), kind: "office".into() };
        Contact {
            id: ContactId::new(id),
            lead_id: Some(LeadId::new(lead)),
            date_created: "2026-01-01".into(),
            date_updated: None,
            fields: user.map(|id| (Field::Custom(FieldId::new("cf_user")), json!(id))).into_iter().collect(),
            lists: email.map(|email| (Channel::Email, vec![entry(email)])).into_iter().collect(),
            unknown_lists: BTreeSet::new(),
        }
    }

    fn person(user: Option<&str>, email: Option<&str>) -> Identity {
        Identity { company_id: None, user_id: user.map(Into::into), email: email.map(Into::into) }
    }

    #[test]
    fn contacts_match_by_user_id_then_by_email() {
        use ContactMatch::{Conflict, NoMatch, SameEmail, SameUser};
        let jane = Some("jane@example.test");
        let cases = [
            (contact("c", "l", Some("u"), None), person(Some("u"), jane), SameUser),
            (contact("c", "l", Some("U"), None), person(Some("u"), None), NoMatch),
            (contact("c", "l", None, Some("JANE@example.test ")), person(Some("u"), jane), SameEmail),
            (contact("c", "l", Some("other"), jane), person(Some("u"), jane), Conflict),
            (contact("c", "l", Some("other"), jane), person(None, jane), SameEmail),
            (contact("c", "l", None, Some("jane@example.test.other")), person(None, jane), NoMatch),
            (contact("c", "l", None, None), person(None, None), NoMatch),
        ];
        for (contact, person, expected) in cases {
            assert_eq!(compare(&contact, &person, &keys()), expected, "{contact:?} {person:?}");
        }
        let no_field = KeyFields { user: None, ..keys() };
        assert_eq!(
            compare(&contact("c", "l", Some("u"), None), &person(Some("u"), None), &no_field),
            NoMatch
        );
    }

    #[test]
    fn the_oldest_lead_with_exactly_the_company_id_is_used() {
        let dated = |id, company, date: &str| Lead { date_created: date.into(), ..lead(id, company) };
        let candidates = vec![
            dated("lead_c", Some("a"), "2026-01-02"),
            dated("lead_b", Some("a"), "2026-01-01"),
            dated("lead_a", Some("a"), "2026-01-01"),
            dated("lead_0", Some("A"), "2020-01-01"),
            dated("lead_1", Some("a-1"), "2020-01-01"),
        ];
        let leads = company_leads(candidates.clone(), "a", &keys());
        assert_eq!(
            leads.iter().map(|lead| lead.id.as_str()).collect::<Vec<_>>(),
            ["lead_a", "lead_b", "lead_c"]
        );
        assert_eq!(company_leads(candidates.clone(), "b", &keys()), []);
        assert_eq!(company_leads(candidates, "a", &KeyFields::default()), []);
    }

    #[test]
    fn one_lead_is_adopted_and_leads_of_other_companies_are_left_alone() {
        let adopted =
            |leads: &[Lead]| adopt(leads.iter(), "acme", &keys()).map(|at| leads[at].id.to_string());
        let cases = [
            (vec![lead("l1", Some("x"))], None),
            (vec![lead("l1", Some("x")), lead("l2", None), lead("l3", None)], Some("l2")),
            (vec![lead("l1", None), lead("l2", Some("acme"))], Some("l2")),
            (vec![], None),
        ];
        for (leads, expected) in cases {
            assert_eq!(adopted(&leads).as_deref(), expected, "{leads:?}");
        }
    }

    proptest! {
        #[test]
        fn the_choice_does_not_depend_on_the_order_of_the_candidates(
            days in proptest::collection::vec((0u8..4, 0u8..3), 0..30),
            seed in any::<u64>(),
        ) {
            let all: Vec<_> = days.iter().enumerate().map(|(n, (day, who))| Contact {
                date_created: format!("2026-01-0{day}"),
                ..contact(&format!("c{n:02}"), "l", ["u", "v", ""].get(usize::from(*who)).copied().filter(|u| !u.is_empty()), Some("j@x.test"))
            }).collect();
            let mut shuffled = all.clone();
            let mut state = seed;
            for i in (1..shuffled.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                shuffled.swap(i, usize::try_from(state >> 33).unwrap() % (i + 1));
            }
            let who = person(Some("u"), Some("j@x.test"));
            let picked = match_contacts(all, &who, &keys());
            prop_assert_eq!(&picked, &match_contacts(shuffled, &who, &keys()));
            prop_assert!(picked.contacts.len() <= MAX_CONTACTS);
            prop_assert!(picked.contacts.is_sorted_by_key(|c| (c.date_created.clone(), c.id.clone())));
        }
    }
}
