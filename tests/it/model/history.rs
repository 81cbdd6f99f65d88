//! Generates random histories of events from a seed. Every history has exactly one correct outcome.
//!
//! There are few people and companies, so that events collide. Every value occurs only once, so that the result
//! shows which event won. close-sync does not order events that share no key (company id, user id, email), so the
//! outcome must not depend on their order. The rules of [`History::generate`] ensure that. A test in [`super`]
//! checks it: it applies histories in other permitted orders. The rules are:
//!
//! - Only events with the person's *main* address set the title. They all share that key.
//! - Events with another address, or with only the user id, come after an event with both the user id and the main
//!   address. Before that, the Contact they find may be another person.
//! - Events without user id have no company. Otherwise they could adopt the person's Lead for one company while an
//!   event with only the user id adopts it for another.
//! - An event without company id sets the Lead's name only if it has user id and main address, and only before the
//!   person's first event with a company. Later it would rename Leads of companies whose key it does not have.
//! - Events that update the same Contact in any order add only phones and addresses, which are sets.
//! - Some messages are published again much later, like a replayed dead letter, with the time of the first. They
//!   must not overwrite the values of newer events.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// The size of a history. The defaults suit all tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) events: usize,
    /// At most 4. With more, over ten Contacts could share an address, and only ten are updated.
    pub(crate) users: usize,
    /// At most 3, for the same reason.
    pub(crate) companies: usize,
    /// The percentage of events that are published twice in a row.
    pub(crate) twice: u8,
    /// The percentage of events that repeat an earlier event.
    pub(crate) late: u8,
}

impl Default for Shape {
    fn default() -> Self {
        Self { events: 40, users: 4, companies: 3, twice: 10, late: 10 }
    }
}

/// One event. Its title, phone and company name occur in no other event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// The position in the order of publishing; also the message id.
    pub(crate) number: usize,
    /// When it happened: its number, or the number of the earlier event that it repeats.
    pub(crate) at: usize,
    pub(crate) user: Option<String>,
    pub(crate) email: Option<String>,
    pub(crate) company: Option<String>,
    pub(crate) company_name: Option<String>,
    pub(crate) title: Option<String>,
    pub(crate) phone: Option<String>,
    /// Whether it is published twice in a row.
    pub(crate) twice: bool,
}

impl Event {
    /// The keys. Events that share a key are applied in order.
    pub(crate) fn keys(&self) -> Vec<String> {
        let email = self.email.as_ref().map(|email| email.to_lowercase());
        [self.user.clone(), email, self.company.clone()].into_iter().flatten().collect()
    }

    /// The users that it may be about.
    pub(crate) fn people(&self) -> Vec<char> {
        people(self.user.as_deref(), self.email.as_deref())
    }

    /// The message. Its timestamp is `at` seconds after `base`.
    pub(crate) fn message(&self, base: Timestamp) -> Value {
        let seconds = SignedDuration::from_secs(i64::try_from(self.at).unwrap());
        let mut traits = json!({"email": self.email, "title": self.title, "phone": self.phone});
        if self.company.is_some() || self.company_name.is_some() {
            traits["company"] = json!({"id": self.company, "name": self.company_name});
        }
        traits.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        json!({
            "type": "identify",
            "messageId": self.number.to_string(),
            "timestamp": base.saturating_add(seconds).unwrap().to_string(),
            "userId": self.user,
            "traits": traits,
        })
    }
}

/// The users that a user id, or else an email, may belong to.
pub(crate) fn people(user: Option<&str>, email: Option<&str>) -> Vec<char> {
    let name = email.and_then(|email| email.split('@').next());
    let of = |text: &str| text.chars().last().filter(char::is_ascii_digit);
    match user.or(name).and_then(of) {
        Some(user) => vec![user],
        None => vec!['3', '4'],
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>3}", self.number)?;
        if self.at != self.number {
            write!(f, "  (late, of {})", self.at)?;
        }
        let parts = [
            ("", &self.user),
            ("", &self.email),
            ("in ", &self.company),
            ("name=", &self.company_name),
            ("title=", &self.title),
            ("phone=", &self.phone),
        ];
        for (label, value) in parts {
            if let Some(value) = value {
                write!(f, "  {label}{value}")?;
            }
        }
        if self.twice { f.write_str("  (twice)") } else { Ok(()) }
    }
}

/// Events in the order in which they are published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct History {
    pub(crate) seed: u64,
    pub(crate) events: Vec<Event>,
}

/// How an event identifies its person.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Identifiers {
    UserAndMainEmail,
    UserAndOtherEmail,
    UserOnly,
    MainEmail,
    OtherEmail,
}

/// What earlier events contained about a user.
#[derive(Clone, Copy, Default)]
struct UserState {
    /// There was an event with the user id and the main address.
    introduced: bool,
    /// There was an event with a company.
    has_company: bool,
}

impl History {
    /// Generates the history of a seed. The result is always the same.
    pub(crate) fn generate(seed: u64, shape: Shape) -> Self {
        assert!((1..=4).contains(&shape.users) && (1..=3).contains(&shape.companies), "{shape:?}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut state = vec![UserState::default(); shape.users];
        let mut events: Vec<Event> = Vec::with_capacity(shape.events);
        for number in 0..shape.events {
            if number > 0 && random.u8(..100) < shape.late {
                let earlier = events[random.usize(..number)].clone();
                events.push(Event { number, ..earlier });
            } else {
                let user = random.usize(..shape.users);
                events.push(event(number, user, &mut state[user], shape, &mut random));
            }
        }
        Self { seed, events }
    }

    /// The events, each as often as it is published.
    pub(crate) fn published(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().flat_map(|event| std::iter::repeat_n(event, 1 + usize::from(event.twice)))
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "history of seed {}:", self.seed)?;
        self.events.iter().try_for_each(|event| writeln!(f, "{event}"))
    }
}

fn event(
    number: usize,
    user: usize,
    state: &mut UserState,
    shape: Shape,
    random: &mut fastrand::Rng,
) -> Event {
    let identifiers = match random.u8(..100) {
        0..60 => Identifiers::UserAndMainEmail,
        60..72 => Identifiers::UserAndOtherEmail,
        72..82 => Identifiers::UserOnly,
        82..94 => Identifiers::MainEmail,
        _ => Identifiers::OtherEmail,
    };
    let identifiers = match identifiers {
        Identifiers::UserAndOtherEmail | Identifiers::UserOnly if !state.introduced => {
            Identifiers::UserAndMainEmail
        }
        Identifiers::UserAndMainEmail
        | Identifiers::UserAndOtherEmail
        | Identifiers::UserOnly
        | Identifiers::MainEmail
        | Identifiers::OtherEmail => identifiers,
    };
    let mut with_probability = |percent| random.u8(..100) < percent;
    let has_user = matches!(
        identifiers,
        Identifiers::UserAndMainEmail | Identifiers::UserAndOtherEmail | Identifiers::UserOnly
    );
    let in_company = has_user && with_probability(60);
    let has_company_name = if in_company {
        // The event may create the Lead. Without an address to derive a name from, it needs a company name.
        identifiers == Identifiers::UserOnly || with_probability(40)
    } else {
        identifiers == Identifiers::UserAndMainEmail && !state.has_company && with_probability(30)
    };
    let has_title =
        matches!(identifiers, Identifiers::UserAndMainEmail | Identifiers::MainEmail) && with_probability(50);
    let has_phone = with_probability(35);
    let twice = with_probability(shape.twice);
    let uppercase = with_probability(15);
    state.introduced |= identifiers == Identifiers::UserAndMainEmail;
    state.has_company |= in_company;

    let email = match identifiers {
        Identifiers::UserAndMainEmail | Identifiers::MainEmail => Some(format!("main{}", user + 1)),
        // The last two users share their other address.
        Identifiers::UserAndOtherEmail | Identifiers::OtherEmail if user > 1 => Some("team".to_owned()),
        Identifiers::UserAndOtherEmail | Identifiers::OtherEmail => Some(format!("other{}", user + 1)),
        Identifiers::UserOnly => None,
    };
    let email = email.map(|name| if uppercase { name.to_uppercase() } else { name });
    Event {
        number,
        at: number,
        user: has_user.then(|| format!("u{}", user + 1)),
        email: email.map(|name| format!("{name}@{}", super::DOMAIN)),
        company: in_company.then(|| format!("c{}", random.usize(..shape.companies) + 1)),
        company_name: has_company_name.then(|| format!("n{number}")),
        title: has_title.then(|| format!("t{number}")),
        phone: has_phone.then(|| format!("+4930{:06}", 100_000 + number)),
        twice,
    }
}
