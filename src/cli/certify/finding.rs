//! A finding: an assumption, what was found, and what follows.

use serde::Serialize;
use serde_json::{Map, Value};
use strum::IntoStaticStr;

use crate::cli::certify::assumption::Assumption;

/// What follows from a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, IntoStaticStr)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    AsAssumed,
    /// Differs from the assumption, and close-sync copes with it.
    Handled,
    /// A setting should change.
    ChangeSetting,
    /// close-sync relies on the assumption, and it does not hold.
    NotSupported,
    /// Could not be seen.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Finding {
    pub(super) assumption: Assumption,
    /// The setting that the finding is about, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) subject: Option<String>,
    pub(super) status: Status,
    pub(super) assumed: &'static str,
    pub(super) found: String,
    pub(super) meaning: String,
    /// The line of the configuration that should change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) setting: Option<String>,
    /// The settings of the simulator that behave like this.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) behaviour: Map<String, Value>,
}

/// The parts of a finding that depend on the observation.
pub(super) struct Found {
    pub(super) status: Status,
    /// What was found.
    pub(super) text: String,
    pub(super) meaning: String,
    pub(super) setting: Option<String>,
    pub(super) behaviour: Map<String, Value>,
}

impl Found {
    pub(super) fn new(status: Status, found: impl Into<String>, meaning: impl Into<String>) -> Self {
        let (text, meaning) = (found.into(), meaning.into());
        Self { status, text, meaning, setting: None, behaviour: Map::new() }
    }

    pub(super) fn unknown(reason: &'static str) -> Self {
        Self::new(Status::Unknown, "not seen", reason)
    }

    /// The simulator behaves like this with `key` set to `value`.
    pub(super) fn like(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.behaviour.insert(key.to_owned(), value.into());
        self
    }

    pub(super) fn of(self, assumption: Assumption, subject: Option<String>) -> Finding {
        let Self { status, text: found, meaning, setting, behaviour } = self;
        let assumed = assumption.assumed();
        Finding { assumption, subject, status, assumed, found, meaning, setting, behaviour }
    }
}
