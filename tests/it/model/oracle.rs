//! What has to come of a history: the rules of matching, applied to one event after the other.
//!
//! Written from the rules and not from the code of the worker, with all switches on and every value written
//! whenever it differs and no newer event has told another. No search, no ids, no clocks: a list of Leads and a list of Contacts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::Value;

use super::history::{Event, History};

#[derive(Clone, Debug)]
struct Lead {
    company: Option<String>,
    name: String,
    /// When the event was that told the name, if one did.
    named: Option<usize>,
}

/// A person in a Lead.
#[derive(Clone, Debug, Default)]
struct Contact {
    lead: usize,
    user: Option<String>,
    emails: BTreeSet<String>,
    phones: BTreeSet<String>,
    title: Option<String>,
    titled: Option<usize>,
}

/// What Close has to hold in the end. Contacts are in the order in which they were made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    leads: Vec<Lead>,
    contacts: Vec<Contact>,
}

impl Expected {
    /// What comes of a whole history.
    pub(crate) fn of(history: &History) -> Self {
        let mut expected = Self::default();
        for event in history.published() {
            expected.apply(event);
        }
        expected
    }

    /// Applies one event.
    pub(crate) fn apply(&mut self, event: &Event) {
        let of_company =
            self.leads.iter().position(|lead| lead.company.is_some() && lead.company == event.company);
        if let Some(lead) = of_company {
            self.write_into(lead, event);
            return;
        }
        let people = self.people(event, |_| true);
        if people.is_empty() {
            self.create(event);
        } else if event.company.is_none() {
            for person in people {
                self.write_lead(self.contacts[person].lead, event);
                self.write_contact(person, event);
            }
        } else {
            let homes = people.iter().map(|person| self.contacts[*person].lead);
            match homes.into_iter().find(|lead| self.leads[*lead].company.is_none()) {
                Some(adopted) => self.write_into(adopted, event),
                None => self.create(event),
            }
        }
    }

    /// The person's Contacts among some: those with the user id, else those with the address who are nobody
    /// else, oldest first.
    fn people(&self, event: &Event, among: impl Fn(&Contact) -> bool) -> Vec<usize> {
        let candidates: Vec<usize> =
            (0..self.contacts.len()).filter(|at| among(&self.contacts[*at])).collect();
        let those = |test: &dyn Fn(&Contact) -> bool| -> Vec<usize> {
            candidates.iter().copied().filter(|at| test(&self.contacts[*at])).take(10).collect()
        };
        let by_user = those(&|contact| event.user.is_some() && contact.user == event.user);
        if !by_user.is_empty() {
            return by_user;
        }
        let Some(email) = event.email.as_ref().map(|email| email.to_lowercase()) else { return Vec::new() };
        let is_free = |contact: &Contact| event.user.is_none() || contact.user.is_none();
        those(&|contact| contact.emails.contains(&email) && is_free(contact))
    }

    /// The Lead is the company's, and the person belongs into it.
    fn write_into(&mut self, lead: usize, event: &Event) {
        self.write_lead(lead, event);
        let inside = self.people(event, |contact| contact.lead == lead);
        if inside.is_empty() {
            self.add(lead, event);
        }
        for person in inside {
            self.write_contact(person, event);
        }
    }

    fn create(&mut self, event: &Event) {
        let name = event.company_name.clone().unwrap_or_else(|| super::DOMAIN.to_owned());
        let named = event.company_name.as_ref().map(|_| event.at);
        self.leads.push(Lead { company: event.company.clone(), name, named });
        self.add(self.leads.len() - 1, event);
    }

    fn add(&mut self, lead: usize, event: &Event) {
        self.contacts.push(Contact { lead, ..Contact::default() });
        self.write_contact(self.contacts.len() - 1, event);
    }

    fn write_lead(&mut self, lead: usize, event: &Event) {
        let lead = &mut self.leads[lead];
        event.company.clone_into_some(&mut lead.company);
        if let Some(name) = &event.company_name
            && lead.named <= Some(event.at)
        {
            (lead.name, lead.named) = (name.clone(), Some(event.at));
        }
    }

    fn write_contact(&mut self, contact: usize, event: &Event) {
        let contact = &mut self.contacts[contact];
        event.user.clone_into_some(&mut contact.user);
        if event.title.is_some() && contact.titled <= Some(event.at) {
            (contact.title, contact.titled) = (event.title.clone(), Some(event.at));
        }
        contact.emails.extend(event.email.as_ref().map(|email| email.to_lowercase()));
        contact.phones.extend(event.phone.clone());
    }

    /// Compares with the Leads of the simulator, their Contacts inside them.
    ///
    /// # Errors
    /// Everything that differs.
    pub(crate) fn compare(&self, leads: &[Value]) -> Result<(), String> {
        let mut wrong = doubles(leads);
        let (expected, held) = (self.lines(), lines(leads));
        for (line, wanted) in &expected {
            let there = held.get(line).copied().unwrap_or_default();
            for _ in there..*wanted {
                let _ = writeln!(wrong, "missing:    {line}");
            }
        }
        for (line, there) in &held {
            let wanted = expected.get(line).copied().unwrap_or_default();
            for _ in wanted..*there {
                let _ = writeln!(wrong, "unexpected: {line}");
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// A line for each Lead with its Contacts, and how often there is one like it.
    pub(crate) fn lines(&self) -> BTreeMap<String, usize> {
        let lead = |(at, lead): (usize, &Lead)| {
            let inside = self.contacts.iter().filter(|contact| contact.lead == at);
            let people = inside.map(|contact| {
                let set = |values: &BTreeSet<String>| values.iter().cloned().collect();
                person(
                    contact.user.as_deref(),
                    contact.title.as_deref(),
                    set(&contact.emails),
                    set(&contact.phones),
                )
            });
            line(lead.company.as_deref(), &lead.name, people.collect())
        };
        count(self.leads.iter().enumerate().map(lead))
    }
}

/// Sets a value that an event may have.
trait CloneIntoSome {
    fn clone_into_some(&self, target: &mut Self);
}

impl CloneIntoSome for Option<String> {
    fn clone_into_some(&self, target: &mut Self) {
        if self.is_some() {
            target.clone_from(self);
        }
    }
}

/// The same for what the simulator holds.
fn lines(leads: &[Value]) -> BTreeMap<String, usize> {
    count(leads.iter().map(|lead| {
        let people = members(lead).map(|contact| {
            let emails = list(contact, "emails", "email").iter().map(|email| email.to_lowercase()).collect();
            person(text(contact, USER), text(contact, "title"), emails, list(contact, "phones", "phone"))
        });
        line(text(lead, COMPANY), text(lead, "name").unwrap_or_default(), people.collect())
    }))
}

/// What there must never be two of.
pub(crate) fn doubles(leads: &[Value]) -> String {
    let mut wrong = String::new();
    let twice = |values: Vec<String>| -> Vec<String> {
        count(values.into_iter())
            .into_iter()
            .filter(|(_, times)| *times > 1)
            .map(|(value, _)| value)
            .collect()
    };
    let companies = leads.iter().filter_map(|lead| text(lead, COMPANY)).map(str::to_owned);
    for company in twice(companies.collect()) {
        let _ = writeln!(wrong, "several Leads of company {company}");
    }
    for lead in leads {
        let company = text(lead, COMPANY);
        let users = members(lead).filter_map(|contact| text(contact, USER)).map(str::to_owned);
        for user in twice(users.collect()) {
            let _ = writeln!(wrong, "several Contacts of {user} in a Lead of {company:?}");
        }
        for contact in members(lead) {
            let emails = list(contact, "emails", "email").iter().map(|email| email.to_lowercase()).collect();
            for value in [twice(emails), twice(list(contact, "phones", "phone"))].concat() {
                let _ =
                    writeln!(wrong, "{value} twice in a Contact of {:?} in {company:?}", text(contact, USER));
            }
        }
    }
    wrong
}

const COMPANY: &str = "custom.cf_leadcompanyid";
const USER: &str = "custom.cf_contactuserid";

fn members(lead: &Value) -> impl Iterator<Item = &Value> {
    lead["contacts"].as_array().into_iter().flatten()
}

fn text<'a>(record: &'a Value, field: &str) -> Option<&'a str> {
    record[field].as_str().filter(|text| !text.is_empty())
}

fn list(contact: &Value, list: &str, item: &str) -> Vec<String> {
    let entries = contact[list].as_array().into_iter().flatten();
    entries.filter_map(|entry| entry[item].as_str()).map(str::to_owned).collect()
}

fn count(values: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    values.fold(BTreeMap::new(), |mut counts, value| {
        *counts.entry(value).or_default() += 1;
        counts
    })
}

fn line(company: Option<&str>, name: &str, mut people: Vec<String>) -> String {
    people.sort();
    format!("Lead of {} \"{name}\": {}", company.unwrap_or("no company"), people.join("; "))
}

fn person(
    user: Option<&str>,
    title: Option<&str>,
    mut emails: Vec<String>,
    mut phones: Vec<String>,
) -> String {
    emails.sort();
    phones.sort();
    let lists = [emails.join(" "), phones.join(" ")].join(" ");
    format!("{} [{}] {}", user.unwrap_or("nobody"), title.unwrap_or_default(), lists.trim())
}
