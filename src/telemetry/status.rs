//! What a worker is doing, for `/readyz` and whoever asks.

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use crate::amqp::BrokerTrouble;
use crate::outcome::PauseCause;

/// The state of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No connection to the broker yet, or no more, and why if it was tried.
    Connecting(Option<BrokerTrouble>),
    /// Registered with the queue; no delivery yet. Either there are no messages, or another worker is
    /// the active one: AMQP 0-9-1 does not tell (rabbitmq.md §3.6).
    StandingBy,
    /// Working on messages.
    Consuming,
    /// Not consuming, for a cause.
    Paused(PauseCause),
    /// Asked to stop.
    Stopping,
    /// It cannot work as it is configured; others in the same process go on.
    Failed,
}

/// The state as `/readyz` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Whether messages are, or would be, worked on.
    pub ready: bool,
    /// The state.
    pub state: &'static str,
    /// Why, from a closed list, when not connected or paused, or when something of ours was deleted on the broker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// What an operator can do about it.
    #[serde(skip)]
    pub remedy: Option<&'static str>,
    /// What went wrong last, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// RabbitMQ's reason not to take messages, while it has one: what needs no successor is settled, the rest
    /// is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Since when it is in this state.
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
            f.write_str(", alarm of RabbitMQ")?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
struct Standing {
    state: State,
    detail: Option<String>,
    alarm: Option<String>,
    lack: Option<String>,
    since: Timestamp,
}

/// The state of one worker, to be set and read from anywhere. Clones share it.
#[derive(Clone, Debug)]
pub struct Status(Arc<watch::Sender<Standing>>);

impl Default for Status {
    fn default() -> Self {
        let (state, since) = (State::Connecting(None), Timestamp::now());
        Self(Arc::new(watch::Sender::new(Standing { state, detail: None, alarm: None, lack: None, since })))
    }
}

impl Status {
    /// Moves on to a state, for a reason.
    pub fn set(&self, state: State, detail: Option<String>) {
        self.0.send_modify(|standing| {
            if standing.state != state {
                (standing.state, standing.since) = (state, Timestamp::now());
            }
            standing.detail = detail;
        });
    }

    /// The broker raised an alarm, or cleared it.
    pub fn set_alarm(&self, reason: Option<String>) {
        self.0.send_modify(|standing| standing.alarm = reason);
    }

    /// Whether the broker takes no messages for now, as far as it told.
    pub fn is_alarmed(&self) -> bool {
        self.0.borrow().alarm.is_some()
    }

    /// Something that has to exist on the broker is not there, for people; or all of it is.
    pub fn set_missing(&self, what: Option<String>) {
        self.0.send_modify(|standing| standing.lack = what);
    }

    /// The state now.
    pub fn state(&self) -> State {
        self.0.borrow().state
    }

    /// The state now, as it is told.
    pub fn readiness(&self) -> Readiness {
        let Standing { state, detail, alarm, lack, since } = self.0.borrow().clone();
        let (ready, label, cause) = match state {
            State::Connecting(cause) => (false, "connecting", cause.map(|why| (why.label(), why.remedy()))),
            State::StandingBy => (true, "standing_by", None),
            State::Consuming => (true, "consuming", None),
            State::Paused(cause) => (false, "paused", Some((cause.label(), cause.remedy()))),
            State::Stopping => (false, "stopping", None),
            State::Failed => (false, "failed", None),
        };
        // A pause is the greater trouble.
        let (cause, detail) = match lack {
            Some(lack) if ready => {
                (Some((BrokerTrouble::Missing.label(), BrokerTrouble::Missing.remedy())), Some(lack))
            }
            Some(_) | None => (cause, detail),
        };
        let (cause, remedy) = cause.unzip();
        let ready = ready && cause.is_none() && alarm.is_none();
        Readiness { ready, state: label, cause, remedy, detail, alarm, since }
    }
}
