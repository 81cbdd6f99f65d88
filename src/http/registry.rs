//! The destinations of a process, with their metrics, status and runtime.
//!
//! Each destination has its own metrics. Named destinations have the label `destination`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use serde::Serialize;

use crate::amqp;
use crate::sync::Worker;
use crate::telemetry::metrics::{self, Metrics, PageMetrics};
use crate::telemetry::status::{Readiness, Status};

/// All destinations, and the metrics of the operator's page. Clones share them.
#[derive(Clone, Default)]
pub struct Registry {
    destinations: Arc<RwLock<BTreeMap<String, DestinationHandle>>>,
    page: PageMetrics,
}

/// A destination as the HTTP server sees it.
#[derive(Clone)]
pub struct DestinationHandle {
    pub metrics: Metrics,
    pub status: Status,
    pub runtime: DestinationRuntime,
}

/// The settings and the worker of a running destination, for the operator's page. Clones share it.
#[derive(Clone, Default)]
pub struct DestinationRuntime(Arc<RwLock<RuntimeParts>>);

#[derive(Clone, Default)]
struct RuntimeParts {
    amqp: Option<Arc<amqp::Settings>>,
    worker: Option<Worker>,
}

impl DestinationRuntime {
    /// The destination starts with these settings.
    pub fn set_settings(&self, settings: Arc<amqp::Settings>) {
        self.change(|parts| parts.amqp = Some(settings));
    }

    /// The preflight check of Close passed.
    pub fn set_worker(&self, worker: Worker) {
        self.change(|parts| parts.worker = Some(worker));
    }

    /// The destination stopped.
    pub fn clear(&self) {
        self.change(|parts| *parts = RuntimeParts::default());
    }

    /// The settings of the broker, while the destination runs.
    pub fn amqp(&self) -> Option<Arc<amqp::Settings>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).amqp.clone()
    }

    /// The worker, after the preflight check and while the destination runs.
    pub fn worker(&self) -> Option<Worker> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).worker.clone()
    }

    fn change(&self, change: impl FnOnce(&mut RuntimeParts)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The body of `/readyz`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Readyz {
    /// The only destination, without a name.
    One(Readiness),
    /// Destinations by name.
    Each {
        /// Whether all destinations are ready.
        ready: bool,
        destinations: BTreeMap<String, Readiness>,
    },
}

impl Readyz {
    pub fn is_ready(&self) -> bool {
        match self {
            Self::One(Readiness { ready, .. }) | Self::Each { ready, .. } => *ready,
        }
    }
}

/// As one line.
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

/// The key of a destination without a name.
const NAMELESS: &str = "";

impl Registry {
    /// Adds a destination, or returns the handle it already has.
    ///
    /// # Errors
    /// Those of [`Metrics::new`].
    pub fn register(&self, name: Option<&str>) -> prometheus::Result<DestinationHandle> {
        let mut handles = self.destinations.write().unwrap_or_else(PoisonError::into_inner);
        let destination = name.unwrap_or(NAMELESS);
        if let Some(handle) = handles.get(destination) {
            return Ok(handle.clone());
        }
        let handle = DestinationHandle {
            metrics: Metrics::new(name)?,
            status: Status::default(),
            runtime: DestinationRuntime::default(),
        };
        Ok(handles.entry(destination.to_owned()).or_insert(handle).clone())
    }

    /// Removes a destination that was deleted from the configuration.
    pub fn remove(&self, name: Option<&str>) {
        self.destinations.write().unwrap_or_else(PoisonError::into_inner).remove(name.unwrap_or(NAMELESS));
    }

    /// All destinations by name. The key of a destination without a name is empty.
    pub fn handles(&self) -> BTreeMap<String, DestinationHandle> {
        self.destinations.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The metrics page for Prometheus.
    pub fn metrics_page(&self) -> String {
        let handles = self.destinations.read().unwrap_or_else(PoisonError::into_inner);
        metrics::render(handles.values().map(|handle| &handle.metrics), &self.page)
    }

    /// The metrics of the operator's page.
    pub fn page(&self) -> &PageMetrics {
        &self.page
    }

    /// The readiness of all destinations.
    pub fn readiness(&self) -> Readyz {
        let handles = self.destinations.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = handles.get(NAMELESS) {
            return Readyz::One(handle.status.readiness());
        }
        let each = |(name, handle): (&String, &DestinationHandle)| (name.clone(), handle.status.readiness());
        let destinations: BTreeMap<String, Readiness> = handles.iter().map(each).collect();
        // Not ready before the first destination is registered.
        let ready = !destinations.is_empty() && destinations.values().all(|each| each.ready);
        Readyz::Each { ready, destinations }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_all_of_its_destinations_are() {
        let registry = Registry::default();
        assert!(!registry.readiness().is_ready(), "no destination yet");
        for name in ["emea", "apac"] {
            let handle = registry.register(Some(name)).unwrap();
            assert!(!registry.readiness().is_ready());
            handle.status.set(crate::telemetry::status::State::StandingBy, None);
            assert!(registry.readiness().is_ready());
        }
    }
}
