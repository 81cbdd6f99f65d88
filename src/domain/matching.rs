//! Which of the records Close found are meant (`design.md` §2, rules 1-5).
//!
//! Search is a hint: it analyses text, lags behind writes and may list what is gone (close-api.md
//! §6). Everything that comes back is compared again here, ids exactly, emails case-folded, before
//! it is believed.

use super::mapping::{Identity, KeyFields};
use super::record::{Channel, Contact, Lead};

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
    /// Contacts with the email that belong to another user id.
    pub conflicts: usize,
}

/// Picks the person's Contacts: those with the user id, else those with the email.
pub fn pick_people(candidates: Vec<Contact>, person: &Identity, keys: &KeyFields) -> People {
    let (mut by_user, mut by_email, mut conflicts) = (Vec::new(), Vec::new(), 0);
    for contact in candidates {
        match compare(&contact, person, keys) {
            Likeness::SameUser => by_user.push(contact),
            Likeness::SameEmail => by_email.push(contact),
            Likeness::Conflict => conflicts += 1,
            Likeness::Stranger => {}
        }
    }
    let mut contacts = if by_user.is_empty() { by_email } else { by_user };
    contacts.sort_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)));
    contacts.dedup_by(|a, b| a.id == b.id);
    contacts.truncate(MAX_CONTACTS);
    People { contacts, conflicts }
}

/// Picks the company's Lead: exactly this id, and the oldest when there are several. Equal dates
/// are possible and Close leaves their order open (close-api.md §12, 13), so ids decide.
pub fn pick_lead(candidates: Vec<Lead>, company_id: &str, keys: &KeyFields) -> Option<Lead> {
    let field = keys.company.as_ref()?;
    candidates
        .into_iter()
        .filter(|lead| lead.custom(field) == Some(company_id))
        .min_by(|a, b| (&a.date_created, &a.id).cmp(&(&b.date_created, &b.id)))
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

impl Found {
    /// Whether a Lead is about to be given a company id because no Lead was found by it.
    pub fn adopts(&self) -> bool {
        matches!(self, Self::InLead { adopted: true, .. })
    }
}

/// Decides between adopting a Lead and making a new one (rule 3, last two cases): the person was
/// found under `people`'s Leads, oldest Contact first, and no Lead was found by company id.
///
/// Exactly one Lead is adopted, however many the person is under: adopting two would give one
/// company two Leads. A Lead that already carries the id (search had not caught up) comes first.
pub fn adopt(people: Vec<(Contact, Option<Lead>)>, company_id: &str, keys: &KeyFields) -> Found {
    let company = |lead: &Lead| keys.company.as_ref().and_then(|field| lead.custom(field)).map(str::to_owned);
    let leads = || people.iter().filter_map(|(_, lead)| lead.as_ref());
    let chosen = leads()
        .find(|lead| company(lead).as_deref() == Some(company_id))
        .or_else(|| leads().find(|lead| company(lead).is_none()))
        .cloned();
    match chosen {
        None => Found::OtherCompany,
        Some(lead) => Found::InLead {
            adopted: company(&lead).is_none(),
            contacts: people
                .into_iter()
                .map(|(contact, _)| contact)
                .filter(|contact| contact.lead_id.as_ref() == Some(&lead.id))
                .collect(),
            elsewhere: false,
            lead,
        },
    }
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
        assert_eq!(pick_lead(candidates.clone(), "a", &keys()).unwrap().id.as_str(), "lead_a");
        assert_eq!(pick_lead(candidates.clone(), "b", &keys()), None);
        assert_eq!(pick_lead(candidates, "a", &KeyFields::default()), None);
    }

    #[test]
    fn one_lead_is_adopted_and_others_companies_are_left_alone() {
        let under = |contact_id: &str, id: &str, company: Option<&str>| {
            (contact(contact_id, id, Some("u"), None), Some(lead(id, company)))
        };
        let home = |people| match adopt(people, "acme", &keys()) {
            Found::InLead { lead, contacts, adopted, .. } => {
                Some((lead.id.to_string(), contacts.len(), adopted))
            }
            Found::OtherCompany => None,
            Found::Anywhere { .. } | Found::Nobody => unreachable!(),
        };
        assert_eq!(home(vec![under("c1", "l1", Some("x"))]), None);
        assert_eq!(
            home(vec![under("c1", "l1", None), under("c2", "l2", None)]),
            Some(("l1".into(), 1, true))
        );
        assert_eq!(
            home(vec![
                under("c1", "l1", None),
                under("c2", "l2", Some("acme")),
                under("c3", "l2", Some("acme"))
            ]),
            Some(("l2".into(), 2, false))
        );
        assert_eq!(home(vec![(contact("c1", "l1", None, None), None)]), None);
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
