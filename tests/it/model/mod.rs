//! Random histories against a sequential model: whatever happens on the way, Close holds in the end what it
//! would hold had each event been applied after the other, once.
//!
//! [`history`] and [`oracle`] are pure, whoever plays a history. [`plan`] is what goes wrong when [`real`] plays
//! it with real parts; [`play`] is one such performance. [`in_virtual_time`] plays with the worker alone.

pub(crate) mod history;
mod in_virtual_time;
pub(crate) mod oracle;
mod plan;
mod play;
mod real;

use history::{Event, History, Shape};
use oracle::Expected;

/// The domain of all addresses, after which Leads are called that nobody named.
pub(crate) const DOMAIN: &str = "people.test";

/// The same events in another order, such that those which share a key keep theirs.
fn shuffled(history: &History, random: &mut fastrand::Rng) -> Vec<Event> {
    let mut left = history.events.clone();
    let mut order = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let free = |at: &usize| {
            let keys = left[*at].keys();
            left[..*at].iter().all(|earlier| earlier.keys().iter().all(|key| !keys.contains(key)))
        };
        let free: Vec<usize> = (0..left.len()).filter(free).collect();
        order.push(left.remove(free[random.usize(..free.len())]));
    }
    order
}

#[test]
fn a_seed_makes_one_history() {
    let make = |seed| History::generate(seed, Shape::default());
    assert_eq!(make(7), make(7));
    assert_ne!(make(7).events, make(8).events);
    assert_eq!(make(7).events.len(), Shape::default().events);
}

/// Else a difference from the model would prove nothing.
#[test]
fn the_outcome_of_a_history_does_not_depend_on_what_keys_leave_open() {
    for seed in 0..100 {
        let history = History::generate(seed, Shape::default());
        let expected = Expected::of(&history);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..8 {
            let order = shuffled(&history, &mut random);
            let mut other = Expected::default();
            for event in &order {
                other.apply(event);
            }
            assert_eq!(expected.lines(), other.lines(), "{history}\nin the order {order:#?}");
        }
    }
}

#[test]
fn differences_are_told() {
    use serde_json::json;

    let history = History::generate(1, Shape { events: 1, ..Shape::default() });
    let expected = Expected::of(&history);
    let lead = json!({"name": "n", "custom.cf_leadcompanyid": "c9", "contacts": [
        {"custom.cf_contactuserid": "u1", "emails": [{"email": "A@x"}, {"email": "a@x"}]},
        {"custom.cf_contactuserid": "u1"},
    ]});
    let told = expected.compare(&[lead.clone(), lead]).unwrap_err();
    for part in
        ["several Leads of company c9", "several Contacts of u1", "a@x twice", "missing:", "unexpected:"]
    {
        assert!(told.contains(part), "{part:?} in\n{told}");
    }
}
