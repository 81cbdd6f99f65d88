//! What the worker is doing, for `/readyz` and whoever asks.

use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

use crate::outcome::PauseCause;

/// The state of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No connection to the broker yet, or no more.
    Connecting,
    /// Registered with the queue; no delivery yet. Either there are no messages, or another worker is
    /// the active one: AMQP 0-9-1 does not tell (rabbitmq.md §3.6).
    StandingBy,
    /// Working on messages.
    Consuming,
    /// Not consuming, for a cause.
    Paused(PauseCause),
    /// Asked to stop.
    Stopping,
}

/// The state as `/readyz` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Whether messages are, or would be, worked on.
    pub ready: bool,
    /// The state.
    pub state: &'static str,
    /// Why, when paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
}

impl From<State> for Readiness {
    fn from(state: State) -> Self {
        let (ready, state, cause) = match state {
            State::Connecting => (false, "connecting", None),
            State::StandingBy => (true, "standing_by", None),
            State::Consuming => (true, "consuming", None),
            State::Paused(cause) => (false, "paused", Some(cause.label())),
            State::Stopping => (false, "stopping", None),
        };
        Self { ready, state, cause }
    }
}

/// The state of one worker, to be set and read from anywhere. Clones share it.
#[derive(Clone, Debug)]
pub struct Status(Arc<watch::Sender<State>>);

impl Default for Status {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::Connecting)))
    }
}

impl Status {
    /// Moves on to a state.
    pub fn set(&self, state: State) {
        self.0.send_if_modified(|current| std::mem::replace(current, state) != state);
    }

    /// The state now.
    pub fn get(&self) -> State {
        *self.0.borrow()
    }
}
