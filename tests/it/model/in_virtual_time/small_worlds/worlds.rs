//! The small worlds: their events and faults.

use super::super::super::DOMAIN;
use super::super::super::history::{Event, History};
use super::super::mutant::Mutant;

/// What happens in a world.
#[derive(Clone, Debug)]
pub(super) struct SmallWorld {
    /// The events, by their places in [`KINDS`].
    pub(super) kinds: Vec<usize>,
    pub(super) faults: Faults,
    pub(super) mutant: Option<Mutant>,
}

/// The faults of a world. Each happens once or not at all, and only one of the first two.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "any of them may be on")]
pub(super) struct Faults {
    /// The active worker is killed.
    pub(super) crash: bool,
    /// The broker gives the queue to the other worker.
    pub(super) supersede: bool,
    pub(super) answer_lost: bool,
    /// The index catches up. Otherwise search shows nothing.
    pub(super) catch_up: bool,
}

const NONE: Faults = Faults { crash: false, supersede: false, answer_lost: false, catch_up: false };
pub(super) const CRASH: Faults = Faults { crash: true, ..NONE };
pub(super) const SUPERSEDED: Faults = Faults { supersede: true, ..NONE };
const LOST: Faults = Faults { answer_lost: true, ..NONE };
const CRASH_AND_LOST: Faults = Faults { crash: true, ..LOST };
/// All faults except a lost queue, after which both workers go on.
pub(super) const MOST: Faults = Faults { catch_up: true, ..CRASH_AND_LOST };
const ALL: Faults = Faults { supersede: true, ..MOST };

/// The kinds of events that worlds are made from. All are about one company or one person.
const KINDS: [(Option<&str>, Option<&str>, Option<&str>); 4] = [
    (Some("u1"), Some("main1"), Some("c1")),
    (Some("u1"), Some("main1"), None),
    (None, Some("main1"), None),
    (Some("u2"), Some("main2"), Some("c1")),
];

impl SmallWorld {
    pub(super) fn history(&self) -> History {
        history(&self.kinds)
    }

    /// The worlds of a run: `None` for the default, "all" or "lost-queue".
    pub(super) fn of(run: Option<&str>) -> Vec<Self> {
        let (one, mut pairs) = (vec![vec![0]], sequences(2, &[0, 1, 2, 3]));
        pairs.retain(|kinds| fewest_neighbours(kinds) == 1 && !is_renamed(kinds));
        match run {
            None => [with(&one, &[MOST, SUPERSEDED]), with(&pairs, &[CRASH, LOST])].concat(),
            Some("all") => {
                let mut triples = sequences(3, &[0, 2, 3]);
                triples.retain(|kinds| fewest_neighbours(kinds) > 0 && !is_renamed(kinds));
                let (of_one, of_two): (Vec<_>, Vec<_>) =
                    triples.into_iter().partition(|kinds| !kinds.contains(&3));
                // Where two share no key, workers do more at a time: half a million steps with a crash.
                let mut in_order = of_two.clone();
                in_order.retain(|kinds| fewest_neighbours(kinds) == 2);
                let of_two = [with(&of_two, &[LOST]), with(&in_order, &[CRASH])].concat();
                // The longest come first: otherwise one core waits for another at the end.
                [with(&of_one, &[CRASH_AND_LOST]), with(&pairs, &[MOST]), of_two].concat()
            }
            Some("lost-queue") => [with(&one, &[ALL]), with(&pairs, &[SUPERSEDED])].concat(),
            Some(other) => {
                panic!(
                    "CLOSE_SYNC_SMALL_WORLDS: unknown value {other:?}; expected \"all\", \"lost-queue\" or unset"
                )
            }
        }
    }
}

fn with(worlds: &[Vec<usize>], faults: &[Faults]) -> Vec<SmallWorld> {
    let with = |kinds: &Vec<usize>, faults| SmallWorld { kinds: kinds.clone(), faults, mutant: None };
    worlds.iter().flat_map(|kinds| faults.iter().map(move |faults| with(kinds, *faults))).collect()
}

/// All sequences of these kinds.
fn sequences(length: usize, kinds: &[usize]) -> Vec<Vec<usize>> {
    let longer = |worlds: Vec<Vec<usize>>| {
        let with = |world: Vec<usize>| kinds.iter().map(move |kind| [&world[..], &[*kind]].concat());
        worlds.into_iter().flat_map(with).collect()
    };
    (0..length).fold(vec![Vec::new()], |worlds, _| longer(worlds))
}

/// Whether swapping the two people gives another world that is explored.
fn is_renamed(kinds: &[usize]) -> bool {
    kinds[0] == 3 && kinds.iter().all(|kind| [0, 3].contains(kind))
}

/// The smallest number of other events that an event shares a key with.
fn fewest_neighbours(kinds: &[usize]) -> usize {
    let events = history(kinds).events;
    let shares = |one: &Event, other: &Event| one.keys().iter().any(|key| other.keys().contains(key));
    let neighbours =
        |one: &Event| events.iter().filter(|other| one.number != other.number && shares(one, other)).count();
    events.iter().map(neighbours).min().unwrap_or_default()
}

fn history(kinds: &[usize]) -> History {
    let event = |(number, kind): (usize, &usize)| {
        let (user, email, company) = KINDS[*kind];
        event(number, user, email, company)
    };
    History { seed: 0, events: kinds.iter().enumerate().map(event).collect() }
}

fn event(number: usize, user: Option<&str>, email: Option<&str>, company: Option<&str>) -> Event {
    let text = |text: &str| text.to_owned();
    Event {
        number,
        at: number,
        user: user.map(text),
        email: email.map(|email| format!("{email}@{DOMAIN}")),
        company: company.map(text),
        company_name: company.map(|_| format!("n{number}")),
        title: Some(format!("t{number}")),
        phone: None,
        twice: false,
    }
}
