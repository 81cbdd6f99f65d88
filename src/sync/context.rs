//! What all messages of one Close organization share: settings, caches, the mapping in force and the circuit breaker.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::close::{Client, Clock, CloseError};
use crate::domain::decision::Decision;
use crate::domain::dropped::{DropReason, Dropped};
use crate::domain::mapping::{KeyFields, Mapping, Rules};
use crate::domain::record::FieldId;
use crate::outcome::{Failure, PauseCause, Stage};
use crate::retry::History;
use crate::sync::applied_cache::AppliedCache;
use crate::sync::circuit_breaker::CircuitBreaker;
use crate::sync::id_cache::IdCache;
use crate::sync::job::Settings;
use crate::sync::lag_guard::LagGuard;
use crate::sync::preflight::{self, PreflightError};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::recent_records::RecentRecords;
use crate::sync::record_locks::RecordLocks;
use crate::sync::search_lag::SearchLag;
use crate::sync::version_cache::VersionCache;
use crate::sync::write_log::WriteLog;
use crate::telemetry::metrics::Metrics;

/// A mapping that is younger than this is not refreshed when Close rejects a field.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// The shortest time between two log lines about the same mistake of producers.
const MIN_LOG_INTERVAL: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Write,
    /// Sends no writes, waits for no other message, and does not count: neither in metrics nor in the circuit breaker.
    DryRun,
}

pub(crate) struct Context {
    pub(crate) mode: Mode,
    pub(crate) settings: Settings,
    pub(crate) client: Client,
    pub(crate) keys: KeyFields,
    pub(crate) id_cache: IdCache,
    pub(crate) lag_guard: Arc<LagGuard>,
    pub(crate) search_lag: SearchLag,
    pub(crate) version_cache: VersionCache,
    pub(crate) applied_cache: AppliedCache,
    pub(crate) readback_cache: ReadbackCache,
    pub(crate) record_locks: RecordLocks,
    pub(crate) write_log: WriteLog,
    pub(crate) recent: RecentRecords,
    pub(crate) metrics: Metrics,
    clock: Clock,
    rules: Rules,
    mapping: RwLock<Arc<Mapping>>,
    /// When the mapping was last refreshed. Held during a refresh, so that there is one at a time.
    refreshed_at: tokio::sync::Mutex<Instant>,
    breaker: Mutex<CircuitBreaker>,
    last_failure: Mutex<Option<String>>,
    /// When an unreadable time was last logged.
    unreadable_time_logged: Mutex<Option<Instant>>,
}

/// What a [`crate::sync::Worker`] is made from.
pub struct Dependencies<'a> {
    pub settings: Settings,
    pub rules: &'a Rules,
    /// The result of resolving `rules`.
    pub mapping: Mapping,
    pub client: Client,
    pub metrics: Metrics,
}

impl Context {
    pub(crate) fn new(dependencies: Dependencies<'_>) -> Self {
        let Dependencies { settings, rules, mapping, client, metrics } = dependencies;
        let clock = client.clock().clone();
        let readback_cache = ReadbackCache::default();
        readback_cache.start_with(settings.country.or(mapping.country));
        let lag_guard = LagGuard::new(settings.search_lag, client.timeout(), clock.clone());
        let (id_cache, lag_guard) = (IdCache::default(), Arc::new(lag_guard));
        Self {
            mode: Mode::Write,
            search_lag: SearchLag::new(Arc::clone(&lag_guard), id_cache.clone(), clock.clone()),
            client,
            keys: mapping.keys.clone(),
            id_cache,
            lag_guard,
            clock,
            version_cache: VersionCache::default(),
            applied_cache: AppliedCache::default(),
            readback_cache,
            record_locks: RecordLocks::default(),
            write_log: WriteLog::default(),
            recent: RecentRecords::default(),
            metrics,
            rules: rules.pinned(&mapping.keys),
            mapping: RwLock::new(Arc::new(mapping)),
            refreshed_at: tokio::sync::Mutex::new(Instant::now()),
            breaker: Mutex::default(),
            last_failure: Mutex::default(),
            unreadable_time_logged: Mutex::default(),
            settings,
        }
    }

    /// A context for dry runs. It knows what this one knows, and what it learns stays in it. The client is the same, so that
    /// all calls keep to the rate limits.
    pub(crate) fn for_rehearsal(&self) -> Self {
        let (id_cache, lag_guard) = (self.id_cache.for_rehearsal(), Arc::new(self.lag_guard.for_rehearsal()));
        let refreshed_at = self.refreshed_at.try_lock().map_or_else(|_| Instant::now(), |at| *at);
        Self {
            mode: Mode::DryRun,
            settings: self.settings.clone(),
            // The change by which the worker measures the lag of search must not ride along in its searches.
            client: self.client.with_own_searches(),
            keys: self.keys.clone(),
            search_lag: SearchLag::new(Arc::clone(&lag_guard), id_cache.clone(), self.clock.clone()),
            id_cache,
            lag_guard,
            version_cache: self.version_cache.for_rehearsal(),
            // It is never asked: a rehearsal looks at the records.
            applied_cache: AppliedCache::default(),
            readback_cache: self.readback_cache.for_rehearsal(),
            record_locks: RecordLocks::default(),
            write_log: WriteLog::default(),
            recent: self.recent.for_rehearsal(),
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
            rules: self.rules.clone(),
            mapping: RwLock::new(self.mapping()),
            refreshed_at: tokio::sync::Mutex::new(refreshed_at),
            breaker: Mutex::default(),
            last_failure: Mutex::default(),
            unreadable_time_logged: Mutex::default(),
        }
    }

    /// All that a rehearsal must leave as it is.
    #[cfg(test)]
    pub(crate) fn memories(&self) -> Vec<String> {
        vec![
            format!("{:?}", self.id_cache),
            format!("{:?}", self.lag_guard),
            format!("{:?}", self.version_cache),
            format!("{:?}", self.applied_cache),
            format!("{:?}", self.readback_cache),
            format!("{:?}", self.record_locks),
            format!("{:?}", self.write_log),
            format!("{:?}", self.recent),
            format!("{:?}", self.breaker),
            format!("{:?}", self.last_failure),
            format!("{:?}", self.mapping()),
        ]
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub(crate) fn mapping(&self) -> Arc<Mapping> {
        self.mapping.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn last_failure(&self) -> Option<String> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_last_failure(&self, failure: &Failure) {
        let failure = format!("{}: {}", failure.stage.label(), failure.error);
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    /// Counts what a finished plan left out. A producer with unreadable times has them in every message, so the log gets
    /// one line a minute.
    pub(crate) fn report(&self, decision: &Decision) {
        self.metrics.decided(decision);
        let unreadable = |dropped: &&Dropped| dropped.reason == DropReason::UnreadableTime;
        let Some(dropped) = decision.dropped.iter().find(unreadable) else { return };
        let mut logged = self.unreadable_time_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() >= MIN_LOG_INTERVAL) {
            *logged = Some(Instant::now());
            let field = dropped.field.as_str();
            tracing::warn!(
                event = "time_unreadable",
                field,
                "cannot read the time of an event, using another one"
            );
        }
    }

    pub(crate) fn record_success(&self) {
        self.breaker(|breaker| breaker.record_success(Instant::now()));
    }

    /// Whether the circuit breaker opens.
    pub(crate) fn record_failure(&self) -> bool {
        self.breaker(|breaker| breaker.record_failure(Instant::now()))
    }

    pub(crate) fn breaker<T>(&self, with: impl FnOnce(&mut CircuitBreaker) -> T) -> T {
        with(&mut self.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs the preflight check and resolves the mapping against the current fields in Close. On failure the
    /// mapping stays as it is.
    pub(crate) async fn refresh_mapping(&self) -> Result<(), Vec<PreflightError>> {
        let mut refreshed_at = self.refreshed_at.lock().await;
        self.refresh(&mut refreshed_at).await
    }

    /// After Close has said that a field does not exist, or has rejected a write without naming a field. Returns the cause
    /// of the pause that the fields in Close lead to.
    pub(crate) async fn refresh_stale_mapping(&self) -> Option<PauseCause> {
        let errors = self.refresh_if_stale().await.err()?;
        let obstacle = errors.first().map(ToString::to_string);
        tracing::warn!(obstacle, "cannot read the fields in Close; keeping the current mapping");
        errors.first()?.pause_cause()
    }

    async fn refresh_if_stale(&self) -> Result<(), Vec<PreflightError>> {
        let mut refreshed_at = self.refreshed_at.lock().await;
        if refreshed_at.elapsed() > MIN_REFRESH_INTERVAL {
            self.refresh(&mut refreshed_at).await
        } else {
            Ok(())
        }
    }

    async fn refresh(&self, refreshed_at: &mut Instant) -> Result<(), Vec<PreflightError>> {
        let mapping = preflight::run(&self.client, &self.rules).await?.mapping;
        self.readback_cache.start_with(mapping.country);
        *refreshed_at = Instant::now();
        let mut current = self.mapping.write().unwrap_or_else(PoisonError::into_inner);
        if self.mode == Mode::DryRun {
            *current = Arc::new(mapping);
            return Ok(());
        }
        if (&mapping.unresolved, &mapping.unreadable, mapping.invalid_constants())
            != (&current.unresolved, &current.unreadable, current.invalid_constants())
        {
            log_mapping_problems(&mapping, Some(&current));
        }
        if mapping != **current {
            tracing::info!(event = "mapping_updated", "fields in Close have changed, mapping updated");
            self.version_cache.forget_refusals();
            self.applied_cache.forget_all();
            self.readback_cache.forget_not_kept();
            *current = Arc::new(mapping);
        }
        Ok(())
    }

    /// Some failures may concern every message, not only this one. When that is possible, runs the preflight check.
    pub(crate) async fn systemic_cause(
        &self,
        failure: &Failure,
        history: History,
        is_last_attempt: bool,
    ) -> Option<PauseCause> {
        let is_key_field = |path: &[String]| {
            let last = path.last().and_then(|name| name.strip_prefix("custom."));
            let keys = [&self.keys.company, &self.keys.user];
            last.is_some() && keys.iter().any(|key| key.as_ref().map(FieldId::as_str) == last)
        };
        // A look-up names only the fields that the settings name, so this is not the message's fault, also when the list
        // of fields still shows them.
        if let CloseError::Rejected(rejection) = &failure.error
            && failure.stage == Stage::LookUp
            && (rejection.field_is_missing() || rejection.is_about_selected_fields())
        {
            let errors = self.refresh_mapping().await.err();
            let cause = errors.and_then(|errors| errors.first()?.pause_cause());
            return Some(cause.unwrap_or(PauseCause::LookupField));
        }
        let may_be_systemic = match &failure.error {
            CloseError::Forbidden => true,
            CloseError::Rejected(rejection) => {
                failure.stage == Stage::LookUp
                    || rejection.field_is_missing()
                    // It may be about a lookup field, which every write has.
                    || rejection.fields.is_empty()
                    || rejection.fields.iter().any(|field| is_key_field(&field.path))
            }
            // Check before it costs the message an attempt.
            CloseError::NotFound => history.retried_after_404 && is_last_attempt,
            CloseError::Transient(_) => is_last_attempt,
            CloseError::Unauthorized | CloseError::PlanLimit | CloseError::Unreachable(_) => false,
        };
        if !may_be_systemic {
            return None;
        }
        // A check that fails without a definite cause does not prove that the message is at fault.
        let errors = self.refresh_mapping().await.err()?;
        Some(errors.first().and_then(PreflightError::pause_cause).unwrap_or(PauseCause::Unreachable))
    }
}

/// Logs rules without a field in Close, and constants that their fields do not accept. Those of the mapping `before` were
/// logged already.
pub fn log_mapping_problems(mapping: &Mapping, before: Option<&Mapping>) {
    let is_new = |item: &&_| before.is_none_or(|before| !before.unreadable.contains(item));
    for item in mapping.unreadable.iter().filter(is_new) {
        tracing::warn!(event = "schema_item_unreadable", "ignoring the {item}");
    }
    let is_new = |unresolved: &&_| before.is_none_or(|before| !before.unresolved.contains(unresolved));
    for unresolved in mapping.unresolved.iter().filter(is_new) {
        tracing::error!(
            event = "field_unresolved",
            setting = unresolved.setting,
            "{}",
            unresolved.description()
        );
    }
    let logged = before.map(Mapping::invalid_constants).unwrap_or_default();
    for invalid in mapping.invalid_constants().iter().filter(|invalid| !logged.contains(invalid)) {
        tracing::error!(
            setting = invalid.setting,
            "ignoring the constant {}: {} (`close-sync check` lists the accepted values)",
            invalid.value,
            invalid.reason.description()
        );
    }
}
