//! The model: applies the matching rules to one event after the other and computes the expected records.
//!
//! It is written from the documented rules, not from the worker's code. All switches are on. A value is written
//! if it differs and no newer event has set it. There is no search, there are no ids and no clocks: only a list
//! of Leads and a list of Contacts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::Value;

use super::history::{Event, History};

#[derive(Clone, Debug)]
struct Lead {
    company: Option<String>,
    name: String,
    /// The time of the event that set the name, if one did.
    name_set_at: Option<usize>,
}

#[derive(Clone, Debug, Default)]
struct Contact {
    lead: usize,
    user: Option<String>,
    emails: BTreeSet<String>,
    phones: BTreeSet<String>,
    title: Option<String>,
    /// The time of the event that set the title.
    title_set_at: Option<usize>,
}

/// The expected final records. Contacts are in order of creation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    leads: Vec<Lead>,
    contacts: Vec<Contact>,
}

impl Expected {
    /// The records after a whole history.
    pub(crate) fn of(history: &History) -> Self {
        let mut expected = Self::default();
        for event in history.published() {
            expected.apply(event);
        }
        expected
    }

    pub(crate) fn apply(&mut self, event: &Event) {
        let of_company =
            self.leads.iter().position(|lead| lead.company.is_some() && lead.company == event.company);
        if let Some(lead) = of_company {
            self.update(lead, event);
            return;
        }
        let people = self.find_contacts(event, |_| true);
        if people.is_empty() {
            self.create(event);
        } else if event.company.is_none() {
            for person in people {
                self.update_lead(self.contacts[person].lead, event);
                self.update_contact(person, event);
            }
        } else {
            let leads_of_person = people.iter().map(|person| self.contacts[*person].lead);
            match leads_of_person.into_iter().find(|lead| self.leads[*lead].company.is_none()) {
                Some(lead) => self.update(lead, event),
                None => self.create(event),
            }
        }
    }

    /// Finds the person's Contacts among those that `among` accepts, oldest first: by user id, otherwise by email
    /// address if the Contact does not belong to another user.
    fn find_contacts(&self, event: &Event, among: impl Fn(&Contact) -> bool) -> Vec<usize> {
        let candidates: Vec<usize> =
            (0..self.contacts.len()).filter(|at| among(&self.contacts[*at])).collect();
        let matching = |test: &dyn Fn(&Contact) -> bool| -> Vec<usize> {
            candidates.iter().copied().filter(|at| test(&self.contacts[*at])).take(10).collect()
        };
        let by_user = matching(&|contact| event.user.is_some() && contact.user == event.user);
        if !by_user.is_empty() {
            return by_user;
        }
        let Some(email) = event.email.as_ref().map(|email| email.to_lowercase()) else { return Vec::new() };
        let not_another_user = |contact: &Contact| event.user.is_none() || contact.user.is_none();
        matching(&|contact| contact.emails.contains(&email) && not_another_user(contact))
    }

    /// Updates the Lead, and updates or adds the person in it.
    fn update(&mut self, lead: usize, event: &Event) {
        self.update_lead(lead, event);
        let inside = self.find_contacts(event, |contact| contact.lead == lead);
        if inside.is_empty() {
            self.add_contact(lead, event);
        }
        for person in inside {
            self.update_contact(person, event);
        }
    }

    fn create(&mut self, event: &Event) {
        let name = event.company_name.clone().unwrap_or_else(|| super::DOMAIN.to_owned());
        let name_set_at = event.company_name.as_ref().map(|_| event.at);
        self.leads.push(Lead { company: event.company.clone(), name, name_set_at });
        self.add_contact(self.leads.len() - 1, event);
    }

    fn add_contact(&mut self, lead: usize, event: &Event) {
        self.contacts.push(Contact { lead, ..Contact::default() });
        self.update_contact(self.contacts.len() - 1, event);
    }

    fn update_lead(&mut self, lead: usize, event: &Event) {
        let lead = &mut self.leads[lead];
        event.company.clone_into_some(&mut lead.company);
        if let Some(name) = &event.company_name
            && lead.name_set_at <= Some(event.at)
        {
            (lead.name, lead.name_set_at) = (name.clone(), Some(event.at));
        }
    }

    fn update_contact(&mut self, contact: usize, event: &Event) {
        let contact = &mut self.contacts[contact];
        event.user.clone_into_some(&mut contact.user);
        if event.title.is_some() && contact.title_set_at <= Some(event.at) {
            (contact.title, contact.title_set_at) = (event.title.clone(), Some(event.at));
        }
        contact.emails.extend(event.email.as_ref().map(|email| email.to_lowercase()));
        contact.phones.extend(event.phone.clone());
    }

    /// Compares the expected records with the Leads of the simulator and their Contacts.
    ///
    /// # Errors
    /// All differences.
    pub(crate) fn compare(&self, leads: &[Value]) -> Result<(), String> {
        let mut differences = duplicates(leads, &BTreeSet::new());
        let (expected, actual) = (self.lines(), lines(leads));
        for (line, n_expected) in &expected {
            let n_actual = actual.get(line).copied().unwrap_or_default();
            for _ in n_actual..*n_expected {
                let _ = writeln!(differences, "missing:    {line}");
            }
        }
        for (line, n_actual) in &actual {
            let n_expected = expected.get(line).copied().unwrap_or_default();
            for _ in n_expected..*n_actual {
                let _ = writeln!(differences, "unexpected: {line}");
            }
        }
        if differences.is_empty() { Ok(()) } else { Err(differences) }
    }

    /// One line per Lead with its Contacts, and how many equal Leads there are.
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

/// Overwrites the target if there is a value.
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

/// The same lines for the records of the simulator.
fn lines(leads: &[Value]) -> BTreeMap<String, usize> {
    count(leads.iter().map(|lead| {
        let people = members(lead).map(|contact| {
            let emails = list(contact, "emails", "email").iter().map(|email| email.to_lowercase()).collect();
            person(text(contact, USER), text(contact, "title"), emails, list(contact, "phones", "phone"))
        });
        line(text(lead, COMPANY), text(lead, "name").unwrap_or_default(), people.collect())
    }))
}

/// Lists duplicates that must never exist. A person has taken the user id from the Contacts `without_user`. Then they may
/// all get it again by their email.
pub(crate) fn duplicates(leads: &[Value], without_user: &BTreeSet<String>) -> String {
    let mut differences = String::new();
    let repeated = |values: Vec<String>| -> Vec<String> {
        count(values.into_iter())
            .into_iter()
            .filter(|(_, times)| *times > 1)
            .map(|(value, _)| value)
            .collect()
    };
    let companies = leads.iter().filter_map(|lead| text(lead, COMPANY)).map(str::to_owned);
    for company in repeated(companies.collect()) {
        let _ = writeln!(differences, "several Leads of company {company}");
    }
    for lead in leads {
        let company = text(lead, COMPANY);
        let users = members(lead).filter_map(|contact| text(contact, USER)).map(str::to_owned);
        for user in repeated(users.collect()) {
            let mut of_user = members(lead).filter(|contact| text(contact, USER) == Some(user.as_str()));
            if of_user.all(|contact| text(contact, "id").is_some_and(|id| without_user.contains(id))) {
                continue;
            }
            let _ = writeln!(differences, "several Contacts of {user} in a Lead of {company:?}");
        }
        for contact in members(lead) {
            let emails = list(contact, "emails", "email").iter().map(|email| email.to_lowercase()).collect();
            for value in [repeated(emails), repeated(list(contact, "phones", "phone"))].concat() {
                let _ = writeln!(
                    differences,
                    "{value} twice in a Contact of {:?} in {company:?}",
                    text(contact, USER)
                );
            }
        }
    }
    differences
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
    format!("{} [{}] {}", user.unwrap_or("no user"), title.unwrap_or_default(), lists.trim())
}
