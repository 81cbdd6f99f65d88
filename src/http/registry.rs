//! What operators see of all destinations of a process: one page of metrics, one answer about readiness.
//!
//! Each destination has metrics of its own, told apart by the label `destination` where destinations have names.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use serde::Serialize;

use crate::amqp;
use crate::sync::Worker;
use crate::telemetry::metrics::{self, Metrics};
use crate::telemetry::status::{Readiness, Status};

/// The destinations. Clones share them.
#[derive(Clone, Default)]
pub struct Registry(Arc<RwLock<BTreeMap<String, DestinationHandle>>>);

/// What one destination shows.
#[derive(Clone)]
pub struct DestinationHandle {
    /// Its numbers.
    pub metrics: Metrics,
    /// Its state.
    pub status: Status,
    /// What it works with.
    pub runtime: DestinationRuntime,
}

/// What a destination works with, for others who want to look through the same eyes. Clones share it.
#[derive(Clone, Default)]
pub struct DestinationRuntime(Arc<RwLock<RuntimeParts>>);

#[derive(Clone, Default)]
struct RuntimeParts {
    amqp: Option<Arc<amqp::Settings>>,
    worker: Option<Worker>,
}

impl DestinationRuntime {
    /// The destination runs, by these settings.
    pub fn set_settings(&self, settings: Arc<amqp::Settings>) {
        self.change(|hands| hands.amqp = Some(settings));
    }

    /// Close lets itself be worked with.
    pub fn set_worker(&self, worker: Worker) {
        self.change(|hands| hands.worker = Some(worker));
    }

    /// The destination does not run any more.
    pub fn clear(&self) {
        self.change(|hands| *hands = RuntimeParts::default());
    }

    /// The broker, while the destination runs.
    pub fn amqp(&self) -> Option<Arc<amqp::Settings>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).amqp.clone()
    }

    /// Who works on messages, once Close was looked at and while the destination runs.
    pub fn worker(&self) -> Option<Worker> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).worker.clone()
    }

    fn change(&self, change: impl FnOnce(&mut RuntimeParts)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What `/readyz` tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Readyz {
    /// Of the only destination.
    One(Readiness),
    /// Of destinations by name.
    Each {
        /// Whether all are.
        ready: bool,
        /// Each by itself.
        destinations: BTreeMap<String, Readiness>,
    },
}

impl Readyz {
    /// Whether messages are, or would be, worked on for everybody.
    pub fn is_ready(&self) -> bool {
        match self {
            Self::One(Readiness { ready, .. }) | Self::Each { ready, .. } => *ready,
        }
    }
}

/// In one line.
impl fmt::Display for Readyz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(readiness) => readiness.fmt(f),
            Self::Each { destinations, .. } => {
                let each = destinations.iter().map(|(name, readiness)| format!("{name} {readiness}"));
                f.write_str(&each.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// The place of a destination without a name.
const NAMELESS: &str = "";

impl Registry {
    /// The place of a destination, the same as before if it had one.
    ///
    /// # Errors
    /// Those of [`Metrics::new`].
    pub fn register(&self, name: Option<&str>) -> prometheus::Result<DestinationHandle> {
        let mut seats = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let place = name.unwrap_or(NAMELESS);
        if let Some(seat) = seats.get(place) {
            return Ok(seat.clone());
        }
        let seat = DestinationHandle {
            metrics: Metrics::new(name)?,
            status: Status::default(),
            runtime: DestinationRuntime::default(),
        };
        Ok(seats.entry(place.to_owned()).or_insert(seat).clone())
    }

    /// A destination is gone for good.
    pub fn remove(&self, name: Option<&str>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name.unwrap_or(NAMELESS));
    }

    /// Everybody who has a place, by name; the name of a destination without one is empty.
    pub fn handles(&self) -> BTreeMap<String, DestinationHandle> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The page Prometheus scrapes.
    pub fn metrics_page(&self) -> String {
        let seats = self.0.read().unwrap_or_else(PoisonError::into_inner);
        metrics::render(seats.values().map(|seat| &seat.metrics))
    }

    /// What every destination is doing.
    pub fn readiness(&self) -> Readyz {
        let seats = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(seat) = seats.get(NAMELESS) {
            return Readyz::One(seat.status.readiness());
        }
        let each = |(name, seat): (&String, &DestinationHandle)| (name.clone(), seat.status.readiness());
        let destinations: BTreeMap<String, Readiness> = seats.iter().map(each).collect();
        // Whoever asks before the first has its seat is too early.
        let ready = !destinations.is_empty() && destinations.values().all(|each| each.ready);
        Readyz::Each { ready, destinations }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_board_is_ready_when_somebody_is_there_and_everybody_ready() {
        let board = Registry::default();
        assert!(!board.readiness().is_ready(), "nobody is there yet");
        for name in ["emea", "apac"] {
            let seat = board.register(Some(name)).unwrap();
            assert!(!board.readiness().is_ready());
            seat.status.set(crate::telemetry::status::State::StandingBy, None);
            assert!(board.readiness().is_ready());
        }
    }
}
