//! Which of the records Close found are meant (`design.md` §2, rules 1-5).
//!
//! Search is a hint: it analyses text, lags behind writes and may list what is gone (close-api.md
//! §6). Everything that comes back is compared again here, ids exactly, emails case-folded, before
//! it is believed. Each candidate gets a [`Verdict`], so that a choice can be explained.
//!
//! **Corners, decided.**
//!
//! - The user id decides before the email: Contacts that carry the event's user id are the person, and
//!   a Contact that has only the email is then left alone. The email is appended to the former, though
//!   it stays with the latter too: which of them is wrong, only people can tell.
//! - A Contact with the email and another user id is somebody else's, even if it is the only one:
//!   shared addresses (`info@`) are common, and overwriting a person is worse than a second Contact.
//!   Without a user id in the event, the email alone decides and any Contact that has it is meant.
//! - Several Contacts are all updated, at most ten, oldest first. Several Leads with one company id:
//!   the oldest. Dates may be equal and Close leaves their order open, so ids break the tie
//!   (close-api.md §12, 13).
//! - An event with an email and no user id means everybody who has the email, also people who have user
//!   ids of their own: nothing says which of them, and leaving all alone would make one more.
//! - A second or later address of a Contact counts like its first.
use strum::{IntoStaticStr, VariantArray};

use crate::domain::mapping::{Identity, KeyFields};
use crate::domain::record::{Channel, Contact, ContactId, Lead};

/// At most this many Contacts are updated for one event (`design.md` §2, rule 4).
pub const MAX_CONTACTS: usize = 10;

/// How a Contact relates to the person an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// Carries the same user id.
    SameUser,
    /// Has the email and no user id that says otherwise.
    SameEmail,
    /// Has the email but another person's user id: someone else's record, never touched.
    Conflict,
    /// Neither.
    Stranger,
}

/// What was made of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Verdict {
    /// The Lead carries the company id.
    SameCompany,
    /// The Lead carries the company id, but an older one does too.
    YoungerLead,
    /// The Lead carries another company id.
    OtherCompany,
    /// The Lead carries no company id.
    NoCompany,
    /// The Contact carries the user id.
    SameUser,
    /// The Contact has the email.
    SameEmail,
    /// The Contact has the email, but others carry the user id, which decides.
    UserIdDecides,
    /// The Contact has the email and another user id: it is somebody else's.
    SomebodyElse,
    /// The Contact has neither the user id nor the email: search is only a hint.
    NotThePerson,
    /// The Contact is the person, but ten older ones are too.
    TooMany,
    /// It was deleted or merged away since search saw it.
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
            Self::SomebodyElse => "has the email but another user id: a different person, left alone",
            Self::NotThePerson => "has neither the user id nor the email",
            Self::TooMany => "is the person too, but only the ten oldest Contacts are updated",
            Self::Gone => "was deleted or merged",
        }
    }
}

/// Compares a Contact with the person an event is about.
pub fn compare(contact: &Contact, person: &Identity, keys: &KeyFields) -> Likeness {
    let theirs = keys.user.as_ref().and_then(|field| contact.custom(field));
    if theirs.is_some() && theirs == person.user_id.as_deref() {
        return Likeness::SameUser;
    }
    let same_email = person.email.as_ref().is_some_and(|email| contact.has(Channel::Email, email));
    match (same_email, theirs, &person.user_id) {
        (false, ..) => Likeness::Stranger,
        (true, Some(_), Some(_)) => Likeness::Conflict,
        (true, ..) => Likeness::SameEmail,
    }
}

/// The Contacts that are the person.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct People {
    /// Oldest first, at most [`MAX_CONTACTS`].
    pub contacts: Vec<Contact>,
    /// What was made of each candidate, oldest first.
    pub verdicts: Vec<(ContactId, Verdict)>,
}

/// Picks the person's Contacts: those with the user id, else those with the email.
pub fn pick_people(mut candidates: Vec<Contact>, person: &Identity, keys: &KeyFields) -> People {
    candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
    candidates.dedup_by(|a, b| a.id == b.id);
    let likeness = |contact: &Contact| compare(contact, person, keys);
    let by_user = candidates.iter().any(|contact| likeness(contact) == Likeness::SameUser);
    let mut people = People::default();
    for contact in candidates {
        let verdict = match likeness(&contact) {
            Likeness::SameEmail if by_user => Verdict::UserIdDecides,
            Likeness::Conflict => Verdict::SomebodyElse,
            Likeness::Stranger => Verdict::NotThePerson,
            Likeness::SameUser | Likeness::SameEmail if people.contacts.len() == MAX_CONTACTS => {
                Verdict::TooMany
            }
            Likeness::SameUser => Verdict::SameUser,
            Likeness::SameEmail => Verdict::SameEmail,
        };
        people.verdicts.push((contact.id.clone(), verdict));
        if matches!(verdict, Verdict::SameUser | Verdict::SameEmail) {
            people.contacts.push(contact);
        }
    }
    people
}

/// How a Lead relates to a company.
pub fn judge_lead(lead: &Lead, company_id: &str, keys: &KeyFields) -> Verdict {
    match keys.company.as_ref().and_then(|field| lead.custom(field)) {
        Some(id) if id == company_id => Verdict::SameCompany,
        Some(_) => Verdict::OtherCompany,
        None => Verdict::NoCompany,
    }
}

/// The Leads that carry exactly this company id, oldest first: the first one is the company's.
pub fn company_leads(mut candidates: Vec<Lead>, company_id: &str, keys: &KeyFields) -> Vec<Lead> {
    candidates.retain(|lead| judge_lead(lead, company_id, keys) == Verdict::SameCompany);
    candidates.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
    candidates
}

/// What Close has for an event, in terms of the rules.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// A Lead that is, or becomes, the company's.
    InLead {
        /// The Lead.
        lead: Lead,
        /// The person's Contacts inside it.
        contacts: Vec<Contact>,
        /// The Lead had no company id and is adopted (rule 3).
        adopted: bool,
        /// The person also exists under another Lead. Only looked up when the switch for duplicate
        /// Contacts is off and `contacts` is empty; otherwise it changes nothing.
        elsewhere: bool,
    },
    /// The person, wherever they are; the event says nothing about the company.
    Anywhere {
        /// Each Contact with its Lead; the Lead is left out when the event has nothing for it.
        people: Vec<(Contact, Option<Lead>)>,
    },
    /// The person exists, but only under Leads of other companies.
    OtherCompany,
    /// Neither the company nor the person exists.
    Nobody,
}

/// Which of the rules decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Case {
    /// The company has a Lead and the person is in it.
    #[strum(serialize = "person_in_company_lead")]
    PersonInLead,
    /// The company has a Lead, and the person is not in it.
    #[strum(serialize = "new_in_company_lead")]
    NewInLead,
    /// The company has none, but the person is under a Lead without company: it becomes the company's.
    #[strum(serialize = "lead_adopted")]
    AdoptedLead,
    /// The person is known under Leads of other companies only.
    #[strum(serialize = "person_of_other_company")]
    OtherCompany,
    /// The event names no company, and the person is known.
    KnownPerson,
    /// Neither the company nor the person is known.
    #[strum(serialize = "nobody_known")]
    Nobody,
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
                "the event has no company id to look up, and the person is known: their Contacts and Leads are updated"
            }
            Self::Nobody => "neither the company nor the person is known: a Lead with a Contact is created",
        }
    }
}

impl Found {
    /// Which of the rules decided.
    pub fn case(&self) -> Case {
        match self {
            Self::InLead { adopted: true, .. } => Case::AdoptedLead,
            Self::InLead { contacts, .. } if contacts.is_empty() => Case::NewInLead,
            Self::InLead { .. } => Case::PersonInLead,
            Self::Anywhere { .. } => Case::KnownPerson,
            Self::OtherCompany => Case::OtherCompany,
            Self::Nobody => Case::Nobody,
        }
    }

    /// The Leads and Contacts there are.
    pub fn records(&self) -> (impl Iterator<Item = &Lead>, impl Iterator<Item = &Contact>) {
        let (lead, contacts, people) = match self {
            Self::InLead { lead, contacts, .. } => (Some(lead), contacts.as_slice(), &[][..]),
            Self::Anywhere { people } => (None, &[][..], people.as_slice()),
            Self::OtherCompany | Self::Nobody => (None, &[][..], &[][..]),
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
            Self::OtherCompany | Self::Nobody => (None, None),
        };
        inside.into_iter().chain(anywhere.into_iter().flatten())
    }

    pub(crate) fn contacts_mut(&mut self) -> impl Iterator<Item = &mut Contact> {
        let (inside, anywhere) = match self {
            Self::InLead { contacts, .. } => (Some(contacts.iter_mut()), None),
            Self::Anywhere { people } => (None, Some(people.iter_mut().map(|(contact, _)| contact))),
            Self::OtherCompany | Self::Nobody => (None, None),
        };
        inside.into_iter().flatten().chain(anywhere.into_iter().flatten())
    }

    /// Whether a Lead is about to be given a company id because no Lead was found by it.
    pub fn adopts(&self) -> bool {
        matches!(self, Self::InLead { adopted: true, .. })
    }
}

/// Which Lead becomes the company's, or turns out to be it, of those a person was found under, their
/// oldest Contact's first; none was found by company id (rule 3, last two cases).
///
/// One is adopted, however many the person is under: adopting two would give one company two Leads. A
/// Lead that already carries the id (search had not caught up) comes first. `None`: all are other
/// companies', and a new Lead has to be made.
pub fn adopt<'a>(
    leads: impl Iterator<Item = &'a Lead> + Clone,
    company_id: &str,
    keys: &KeyFields,
) -> Option<usize> {
    let first = |wanted: Verdict| leads.clone().position(|lead| judge_lead(lead, company_id, keys) == wanted);
    first(Verdict::SameCompany).or_else(|| first(Verdict::NoCompany))
}

#[cfg(test)]
pub(crate) mod tests {
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
            fields: user.map(|id| (Field::Custom(FieldId::new("cf_user")), json!(id))).into_iter().collect(),
            lists: email.map(|email| (Channel::Email, vec![entry(email)])).into_iter().collect(),
        }
    }

    fn person(user: Option<&str>, email: Option<&str>) -> Identity {
        Identity { company_id: None, user_id: user.map(Into::into), email: email.map(Into::into) }
    }

    #[test]
    fn a_contact_is_the_person_by_user_id_then_by_email() {
        use Likeness::{Conflict, SameEmail, SameUser, Stranger};
        let jane = Some("jane@example.test");
        let cases = [
            (contact("c", "l", Some("u"), None), person(Some("u"), jane), SameUser),
            (contact("c", "l", Some("U"), None), person(Some("u"), None), Stranger),
            (contact("c", "l", None, Some("JANE@example.test ")), person(Some("u"), jane), SameEmail),
            (contact("c", "l", Some("other"), jane), person(Some("u"), jane), Conflict),
            (contact("c", "l", Some("other"), jane), person(None, jane), SameEmail),
            (contact("c", "l", None, Some("jane@example.test.other")), person(None, jane), Stranger),
            (contact("c", "l", None, None), person(None, None), Stranger),
        ];
        for (contact, person, likeness) in cases {
            assert_eq!(compare(&contact, &person, &keys()), likeness, "{contact:?} {person:?}");
        }
        let no_field = KeyFields { user: None, ..keys() };
        assert_eq!(
            compare(&contact("c", "l", Some("u"), None), &person(Some("u"), None), &no_field),
            Stranger
        );
    }

    #[test]
    fn the_oldest_lead_with_exactly_the_id_wins() {
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
    fn one_lead_is_adopted_and_others_companies_are_left_alone() {
        let home = |leads: &[Lead]| adopt(leads.iter(), "acme", &keys()).map(|at| leads[at].id.to_string());
        let cases = [
            (vec![lead("l1", Some("x"))], None),
            (vec![lead("l1", Some("x")), lead("l2", None), lead("l3", None)], Some("l2")),
            (vec![lead("l1", None), lead("l2", Some("acme"))], Some("l2")),
            (vec![], None),
        ];
        for (leads, expected) in cases {
            assert_eq!(home(&leads).as_deref(), expected, "{leads:?}");
        }
    }

    proptest! {
        #[test]
        fn the_choice_does_not_depend_on_the_order_of_the_answer(
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
            let picked = pick_people(all, &who, &keys());
            prop_assert_eq!(&picked, &pick_people(shuffled, &who, &keys()));
            prop_assert!(picked.contacts.len() <= MAX_CONTACTS);
            prop_assert!(picked.contacts.is_sorted_by_key(|c| (c.date_created.clone(), c.id.clone())));
        }
    }
}
