//! A message that needs Close, and the context of a run.

use std::time::Duration;

use jiff::Timestamp;

use crate::close::Priority;
use crate::domain::mapping::{Desired, Key};
use crate::domain::phone::Country;
use crate::domain::switches::Switches;
use crate::outcome::Outcome;
use crate::retry::Policy;
use crate::sync::journal::JournalHandle;

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub switches: Switches,
    pub retry: Policy,
    /// Larger messages are dead-lettered, in bytes.
    pub max_message_bytes: usize,
    /// How long a write usually takes to appear in search. Search shows changes in order, up to this time.
    pub search_lag: Duration,
    /// How long a creation may take to appear in the event log. What is missing after that did not happen.
    pub event_log_lag: Duration,
    /// The longest a delivery is held, all waits included.
    pub hold: Duration,
    /// How long an event that repeats what was applied is not compared with Close.
    pub recheck: Duration,
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

#[derive(Clone)]
pub struct RunContext {
    /// Attempts made before.
    pub attempts: u32,
    /// The time since the message was first received.
    pub age: Duration,
    /// Which messages get rate budget first.
    pub priority: Priority,
    /// Where creations and writes are written down.
    pub journal: JournalHandle,
}

impl RunContext {
    /// The first attempt, without a journal.
    pub fn first() -> Self {
        Self { attempts: 0, age: Duration::ZERO, priority: Priority::Live, journal: JournalHandle::default() }
    }
}

/// When a message was received. Replaces the time of an event that has none.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedAt {
    /// The timestamp in the message's properties.
    pub published: Option<Timestamp>,
    /// When the message was first received. An event that claims a later time gets this time.
    pub received: Timestamp,
    /// An operator replays it.
    pub is_replay: bool,
}

impl ReceivedAt {
    pub fn now() -> Self {
        Self { published: None, received: Timestamp::now(), is_replay: false }
    }

    /// The time of an event that says this time.
    pub fn event_time(&self, said: Option<Timestamp>) -> Timestamp {
        said.or(self.published).unwrap_or(self.received).min(self.received)
    }
}

#[derive(Clone, Debug)]
pub enum Prepared {
    /// The message needs Close.
    Job(Job),
    /// The message is settled without Close.
    Settled(Outcome),
}
