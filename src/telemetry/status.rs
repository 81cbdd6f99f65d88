//! The state of a worker, for `/readyz`, the operator's page and systemd.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use crate::amqp::BrokerTrouble;
use crate::domain::journal::ChangeKind;
use crate::outcome::PauseCause;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not connected to the broker. After a failed attempt, with the cause.
    Connecting(Option<BrokerTrouble>),
    /// Registered with the queue, without a delivery so far. Either the queue is empty, or another worker is active;
    /// AMQP 0-9-1 does not say which (rabbitmq.md §3.6).
    StandingBy,
    Consuming,
    /// Consumption is paused for this cause.
    Paused(PauseCause),
    /// Shutting down.
    Stopping,
    /// The configuration does not work. Other destinations in the process keep running.
    Failed,
}

/// The state as `/readyz` reports it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Readiness {
    /// Whether messages are processed when they arrive.
    pub ready: bool,
    pub state: &'static str,
    /// Why the worker is not connected or paused, or that an exchange or queue is missing. From a closed list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// What an operator can do.
    #[serde(skip)]
    pub remedy: Option<&'static str>,
    /// The last error, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The reason of RabbitMQ's alarm, if it has one. Messages that need no successor are settled, the others are
    /// held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Whether the active worker writes a journal: `in_use`, `disabled` or `unusable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub journal: Option<&'static str>,
    /// How far Close's search lags, by the kind of change, where it was measured.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub search_lag_seconds: BTreeMap<&'static str, f64>,
    /// When the worker entered this state.
    pub since: Timestamp,
}

/// The state and its cause, without details.
impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.state)?;
        if let Some(cause) = self.cause {
            write!(f, " ({cause})")?;
        }
        if self.alarm.is_some() {
            f.write_str(", RabbitMQ alarm")?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
struct Current {
    state: State,
    detail: Option<String>,
    alarm: Option<String>,
    missing: Option<String>,
    journal: Option<&'static str>,
    search_lag_seconds: BTreeMap<&'static str, f64>,
    since: Timestamp,
}

/// Holds the state of one worker. Clones share it.
#[derive(Clone, Debug)]
pub struct Status(Arc<watch::Sender<Current>>);

impl Default for Status {
    fn default() -> Self {
        let (state, since) = (State::Connecting(None), Timestamp::now());
        Self(Arc::new(watch::Sender::new(Current {
            state,
            detail: None,
            alarm: None,
            missing: None,
            journal: None,
            search_lag_seconds: BTreeMap::new(),
            since,
        })))
    }
}

impl Status {
    /// Sets the state, with the error that led to it.
    pub fn set(&self, state: State, detail: Option<String>) {
        self.0.send_modify(|current| {
            if current.state != state {
                (current.state, current.since) = (state, Timestamp::now());
            }
            current.detail = detail;
        });
    }

    /// Sets the broker's alarm, or clears it.
    pub fn set_alarm(&self, reason: Option<String>) {
        self.0.send_modify(|current| current.alarm = reason);
    }

    /// Whether the broker has an alarm and accepts no messages.
    pub fn is_alarmed(&self) -> bool {
        self.0.borrow().alarm.is_some()
    }

    /// Sets which exchanges or queues are missing on the broker, if any.
    pub fn set_missing(&self, what: Option<String>) {
        self.0.send_modify(|current| current.missing = what);
    }

    /// Sets whether the active worker writes a journal.
    pub fn set_journal(&self, journal: &'static str) {
        self.0.send_modify(|current| current.journal = Some(journal));
    }

    pub fn journal(&self) -> Option<&'static str> {
        self.0.borrow().journal
    }

    /// Sets how far Close's search lags for a kind of change, if that is known.
    pub fn set_search_lag(&self, kind: ChangeKind, lag: Option<Duration>) {
        // No task waits for a change of it.
        self.0.send_if_modified(|current| {
            match lag {
                Some(lag) => current.search_lag_seconds.insert(kind.label(), lag.as_secs_f64()),
                None => current.search_lag_seconds.remove(kind.label()),
            };
            false
        });
    }

    pub fn state(&self) -> State {
        self.0.borrow().state
    }

    pub fn readiness(&self) -> Readiness {
        let Current { state, detail, alarm, missing, journal, search_lag_seconds, since } =
            self.0.borrow().clone();
        let (ready, label, cause) = match state {
            State::Connecting(cause) => (false, "connecting", cause.map(|why| (why.label(), why.remedy()))),
            State::StandingBy => (true, "standing_by", None),
            State::Consuming => (true, "consuming", None),
            State::Paused(cause) => (false, "paused", Some((cause.label(), cause.remedy()))),
            State::Stopping => (false, "stopping", None),
            State::Failed => (false, "failed", None),
        };
        // A pause is reported before missing objects.
        let (cause, detail) = match missing {
            Some(missing) if ready => {
                (Some((BrokerTrouble::Missing.label(), BrokerTrouble::Missing.remedy())), Some(missing))
            }
            Some(_) | None => (cause, detail),
        };
        let (cause, remedy) = cause.unzip();
        let ready = ready && cause.is_none() && alarm.is_none();
        Readiness { ready, state: label, cause, remedy, detail, alarm, journal, search_lag_seconds, since }
    }
}
