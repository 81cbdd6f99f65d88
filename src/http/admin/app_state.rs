//! The state that all pages share.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::admin::auth::{Authenticator, Settings};
use crate::http::admin::dead_letter_cache::DeadLetterCache;
use crate::http::admin::destination::Destination;
use crate::http::admin::layout::ErrorPage;
use crate::http::registry::Registry;

#[derive(Clone)]
pub(super) struct AppState(Arc<Shared>);

struct Shared {
    registry: Registry,
    authenticator: Authenticator,
    /// By segment of the destination.
    dead_letter_caches: Mutex<HashMap<String, Arc<DeadLetterCache>>>,
    /// Stops replays.
    shutdown: CancellationToken,
    /// Replays that run in the background.
    jobs: TaskTracker,
}

impl AppState {
    pub(super) fn new(
        settings: Settings,
        registry: Registry,
        bound: IpAddr,
        shutdown: CancellationToken,
        jobs: TaskTracker,
    ) -> Self {
        let (authenticator, dead_letter_caches) =
            (Authenticator::new(settings, bound, registry.page().clone()), Mutex::default());
        let state = Self(Arc::new(Shared { registry, authenticator, dead_letter_caches, shutdown, jobs }));
        state.0.jobs.spawn(log_refusals(Arc::downgrade(&state.0), state.0.shutdown.clone()));
        state
    }

    pub(super) fn authenticator(&self) -> &Authenticator {
        &self.0.authenticator
    }

    pub(super) fn destinations(&self) -> Vec<Destination> {
        self.0.registry.handles().into_iter().map(|(name, handle)| Destination::new(name, handle)).collect()
    }

    pub(super) fn dead_letter_cache(&self, destination: &Destination) -> Arc<DeadLetterCache> {
        let mut caches = self.0.dead_letter_caches.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(DeadLetterCache::new(self.0.shutdown.clone(), self.0.jobs.clone()));
        Arc::clone(caches.entry(destination.segment.clone()).or_insert_with(new))
    }
}

/// Logs refused guesses of the token, one line for each address and minute, and the rest at the end.
async fn log_refusals(state: Weak<Shared>, shutdown: CancellationToken) {
    const MINUTE: Duration = Duration::from_mins(1);
    loop {
        let ends = shutdown.run_until_cancelled(tokio::time::sleep(MINUTE)).await.is_none();
        let Some(state) = state.upgrade() else { return };
        state.authenticator.log_refusals();
        if ends {
            return;
        }
    }
}

#[derive(Deserialize)]
struct PathParameters {
    destination: String,
}

impl FromRequestParts<AppState> for Destination {
    type Rejection = ErrorPage;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ErrorPage> {
        let Path(PathParameters { destination }) =
            Path::from_request_parts(parts, state).await.map_err(|_| ErrorPage::not_found())?;
        state
            .destinations()
            .into_iter()
            .find(|found| found.segment == destination)
            .ok_or_else(ErrorPage::not_found)
    }
}
