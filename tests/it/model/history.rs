//! Random histories of events whose outcome is certain, from a seed.
//!
//! Few people and companies, so that events collide, and values that occur once, so that it shows which
//! event won. Events that share no key (company id, user id, email) have no order between them, so a
//! history must not depend on one. These rules of [`History::generate`] make it so; that they suffice is
//! tested in [`super`], by playing histories in other orders that keys allow:
//!
//! - Only events with the person's *main* address set the title: all of them share that key.
//! - Events with another address, or with the user id alone, come only after one with both the user id and
//!   the main address: until then it is open whether what they find is the same person.
//! - Events without user id name no company. Else they could adopt the person's Lead for one company
//!   while an event with the user id alone adopts it for another.
//! - An event without company id names the Lead only with user id and main address, and only before the
//!   person's first event with a company: later it would name the Leads of companies whose key it does not
//!   have.
//! - What is left to events that meet at one Contact in any order is phones and addresses, which are sets.
//! - Some messages are published again long after, as a dead letter that is replayed: with the time of the
//!   first. What newer events have told about has to stay then.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// How large a history is. The defaults fit all ways of playing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) events: usize,
    /// At most four: with more, more than ten Contacts may have one address, and only ten are updated.
    pub(crate) users: usize,
    /// At most three, likewise.
    pub(crate) companies: usize,
    /// Of a hundred events, how many are published twice.
    pub(crate) twice: u8,
    /// Of a hundred events, how many are earlier ones once more.
    pub(crate) late: u8,
}

impl Default for Shape {
    fn default() -> Self {
        Self { events: 40, users: 4, companies: 3, twice: 10, late: 10 }
    }
}

/// One event. What it says of a person and a company is text that occurs in no other event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its place in the order of publishing, and its message id.
    pub(crate) number: usize,
    /// When it happened: its number, or that of an earlier one that is published once more.
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
    /// What it is about. Events that share a key are applied in their order.
    pub(crate) fn keys(&self) -> Vec<String> {
        let email = self.email.as_ref().map(|email| email.to_lowercase());
        [self.user.clone(), email, self.company.clone()].into_iter().flatten().collect()
    }

    /// The message, as it happened that many seconds after the base as its number says.
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

/// By what an event names its person.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    UserAndMain,
    UserAndOther,
    UserAlone,
    Main,
    Other,
}

/// What events before have said of a user.
#[derive(Clone, Copy, Default)]
struct Past {
    /// There was one with the user id and the main address.
    introduced: bool,
    /// There was one with a company.
    has_company: bool,
}

impl History {
    /// The history of a seed: always the same.
    pub(crate) fn generate(seed: u64, shape: Shape) -> Self {
        assert!((1..=4).contains(&shape.users) && (1..=3).contains(&shape.companies), "{shape:?}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut past = vec![Past::default(); shape.users];
        let mut events: Vec<Event> = Vec::with_capacity(shape.events);
        for number in 0..shape.events {
            if number > 0 && random.u8(..100) < shape.late {
                let earlier = events[random.usize(..number)].clone();
                events.push(Event { number, ..earlier });
            } else {
                let user = random.usize(..shape.users);
                events.push(event(number, user, &mut past[user], shape, &mut random));
            }
        }
        Self { seed, events }
    }

    /// The events as often as they are published.
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

fn event(number: usize, user: usize, past: &mut Past, shape: Shape, random: &mut fastrand::Rng) -> Event {
    let names = match random.u8(..100) {
        0..60 => Names::UserAndMain,
        60..72 => Names::UserAndOther,
        72..82 => Names::UserAlone,
        82..94 => Names::Main,
        _ => Names::Other,
    };
    let names = match names {
        Names::UserAndOther | Names::UserAlone if !past.introduced => Names::UserAndMain,
        Names::UserAndMain | Names::UserAndOther | Names::UserAlone | Names::Main | Names::Other => names,
    };
    let mut chance = |percent| random.u8(..100) < percent;
    let has_user = matches!(names, Names::UserAndMain | Names::UserAndOther | Names::UserAlone);
    let in_company = has_user && chance(60);
    let names_lead = if in_company {
        // One without an address to call the Lead after has to bring a name, as it may have to make it.
        names == Names::UserAlone || chance(40)
    } else {
        names == Names::UserAndMain && !past.has_company && chance(30)
    };
    let titled = matches!(names, Names::UserAndMain | Names::Main) && chance(50);
    let phoned = chance(35);
    let twice = chance(shape.twice);
    let shouted = chance(15);
    past.introduced |= names == Names::UserAndMain;
    past.has_company |= in_company;

    let email = match names {
        Names::UserAndMain | Names::Main => Some(format!("main{}", user + 1)),
        // The last two users share theirs.
        Names::UserAndOther | Names::Other if user > 1 => Some("team".to_owned()),
        Names::UserAndOther | Names::Other => Some(format!("other{}", user + 1)),
        Names::UserAlone => None,
    };
    let email = email.map(|name| if shouted { name.to_uppercase() } else { name });
    Event {
        number,
        at: number,
        user: has_user.then(|| format!("u{}", user + 1)),
        email: email.map(|name| format!("{name}@{}", super::DOMAIN)),
        company: in_company.then(|| format!("c{}", random.usize(..shape.companies) + 1)),
        company_name: names_lead.then(|| format!("n{number}")),
        title: titled.then(|| format!("t{number}")),
        phone: phoned.then(|| format!("+4930{:06}", 100_000 + number)),
        twice,
    }
}
