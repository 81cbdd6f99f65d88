//! A message that needs Close, and the context of a run.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::close::Priority;
use crate::domain::mapping::{Desired, Key};
use crate::domain::phone::Country;
use crate::domain::switches::Switches;
use crate::outcome::Outcome;
use crate::retry::Policy;

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub switches: Switches,
    pub retry: Policy,
    /// Larger messages are dead-lettered, in bytes.
    pub max_message_bytes: usize,
    /// The longest a write may take to appear in search, calls in progress included.
    pub search_lag: Duration,
    /// The longest a delivery is held, including waits for rate budget.
    pub hold: Duration,
    /// The country by which Close reads national phone numbers, if the configuration names it.
    pub country: Option<Country>,
    /// Whether consecutive messages about one person are merged into one write.
    pub merge: bool,
}

/// A message that needs Close.
#[derive(Clone, Debug)]
pub struct Job {
    pub(super) desired: Desired,
    /// When the event happened at the producer, for the metrics.
    pub(super) event_time: Option<Timestamp>,
}

impl Job {
    /// The ids and emails the message is about. Messages that share a key must run one after the other.
    pub fn keys(&self) -> Vec<Key> {
        self.desired.identity.keys()
    }

    pub fn desired(&self) -> &Desired {
        &self.desired
    }
}

#[derive(Clone, Copy, Debug)]
pub struct RunContext {
    /// Attempts made before.
    pub attempts: u32,
    /// The time since the message was first received.
    pub age: Duration,
    /// Which messages get rate budget first.
    pub priority: Priority,
    /// Before this time, search may miss records that other workers created.
    pub search_complete_from: Instant,
}

impl RunContext {
    /// The first attempt, with no other worker running.
    pub fn first() -> Self {
        Self {
            attempts: 0,
            age: Duration::ZERO,
            priority: Priority::Live,
            search_complete_from: Instant::now(),
        }
    }
}

/// When a message was received. Replaces the time of an event that has none.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedAt {
    /// The timestamp in the message's properties.
    pub published: Option<Timestamp>,
    /// When the message was first received. An event that claims a later time gets this time.
    pub received: Timestamp,
}

impl ReceivedAt {
    pub fn now() -> Self {
        Self { published: None, received: Timestamp::now() }
    }
}

#[derive(Clone, Debug)]
pub enum Prepared {
    /// The message needs Close.
    Job(Job),
    /// The message is settled without Close.
    Settled(Outcome),
}
