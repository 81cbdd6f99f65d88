//! Compares close-sync with a sequential model on random histories of events.
//!
//! The property: whatever fails on the way, Close finally holds the same as if every event had been applied once,
//! one after the other.
//!
//! - [`history`] generates the events from a seed. [`oracle`] is the model: it computes the expected records.
//! - [`real`] runs a history with worker processes, RabbitMQ and HTTP. [`plan`] draws the failures of such a run
//!   and [`runner`] executes it.
//! - [`in_virtual_time`] runs a history in one process, without a broker and without waiting.

pub(crate) mod history;
mod in_virtual_time;
pub(crate) mod oracle;
mod plan;
mod real;
mod runner;

use history::{Event, History, Shape};
use oracle::Expected;

/// The domain of all email addresses. A Lead without a company name is named after it.
pub(crate) const DOMAIN: &str = "people.test";

/// The same events in a random order, in which events that share a key keep their order.
fn shuffled(history: &History, random: &mut fastrand::Rng) -> Vec<Event> {
    let mut remaining = history.events.clone();
    let mut order = Vec::with_capacity(remaining.len());
    while !remaining.is_empty() {
        let movable = |at: &usize| {
            let keys = remaining[*at].keys();
            remaining[..*at].iter().all(|earlier| earlier.keys().iter().all(|key| !keys.contains(key)))
        };
        let movable: Vec<usize> = (0..remaining.len()).filter(movable).collect();
        order.push(remaining.remove(movable[random.usize(..movable.len())]));
    }
    order
}

#[test]
fn a_seed_always_gives_the_same_history() {
    let make = |seed| History::generate(seed, Shape::default());
    assert_eq!(make(7), make(7));
    assert_ne!(make(7).events, make(8).events);
    assert_eq!(make(7).events.len(), Shape::default().events);
}

/// Otherwise a difference from the model would not prove a bug.
#[test]
fn the_outcome_does_not_depend_on_the_order_of_unrelated_events() {
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
            assert_eq!(expected.lines(), other.lines(), "{history}\napplied in this order: {order:#?}");
        }
    }
}

#[test]
fn differences_are_reported() {
    use serde_json::json;

    let history = History::generate(1, Shape { events: 1, ..Shape::default() });
    let expected = Expected::of(&history);
    let lead = json!({"name": "n", "custom.cf_leadcompanyid": "c9", "contacts": [
        {"custom.cf_contactuserid": "u1", "emails": [{"email": "A@x"}, {"email": "a@x"}]},
        {"custom.cf_contactuserid": "u1"},
    ]});
    let report = expected.compare(&[lead.clone(), lead]).unwrap_err();
    for part in
        ["several Leads of company c9", "several Contacts of u1", "a@x twice", "missing:", "unexpected:"]
    {
        assert!(report.contains(part), "{part:?} in\n{report}");
    }
}
