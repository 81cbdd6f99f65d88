//! One call to Close: wait for the rate limiter, send, read the answer.
//!
//! Calls are not retried here, with one exception. A 429 means that nothing happened, so the call waits for the rate
//! limiter and is sent again. A caller may drop a pending call; what was already sent may still take effect.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use moka::sync::Cache;
use reqwest::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;
use strum::VariantArray;
use tokio::time::Instant;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::close::answer::Answer;
use crate::close::clock::Clock;
use crate::close::endpoint::{Call, Endpoint, StatusClass};
use crate::close::error::{CloseError, Fault, Form};
use crate::close::rate_limit::headers::{self, RateLimit};
use crate::close::rate_limit::{self, Permit, Priority, RateLimiter};
use crate::close::stall_guard::StallGuard;
use crate::close::transport::{Response, Transport};
use crate::spans::{self, SPANS};
use crate::waits::{WaitCause, Waits};

/// A permit for one call, and how long acquiring it took.
pub(crate) type Acquired = (Permit, Duration);

type Observer = Box<dyn Fn(Call) + Send + Sync>;

/// Sends calls to one organization. Clones share connections, rate limits, the count of calls and the time of the last one.
#[derive(Clone)]
pub(crate) struct Requests {
    shared: Arc<Shared>,
    calls: Arc<AtomicU32>,
    last_sent: Arc<Mutex<Option<Instant>>>,
    priority: Priority,
    /// What the calls wait for.
    waits: Waits,
    clock: Clock,
}

struct Shared {
    transport: Box<dyn Transport>,
    timeout: Duration,
    limiters: HashMap<Endpoint, RateLimiter>,
    /// Consecutive calls answered with 429.
    refused_in_a_row: HashMap<Endpoint, AtomicU32>,
    observe: Observer,
    stall_guard: StallGuard,
    deletions: Cache<String, ()>,
}

/// Consecutive calls answered with 429 before a warning is logged.
const MANY_REFUSALS: u32 = 5;

/// How many deletions are remembered.
const MAX_DELETIONS: u64 = 10_000;

impl Requests {
    pub(crate) fn new(
        transport: impl Transport + 'static,
        timeout: Duration,
        share: f64,
        observe: impl Fn(Call) + Send + Sync + 'static,
    ) -> Self {
        let endpoints = || Endpoint::VARIANTS.iter().copied();
        let shared = Shared {
            transport: Box::new(transport),
            timeout,
            limiters: endpoints().map(|endpoint| (endpoint, RateLimiter::new(share))).collect(),
            refused_in_a_row: endpoints().map(|endpoint| (endpoint, AtomicU32::new(0))).collect(),
            observe: Box::new(observe),
            stall_guard: StallGuard::default(),
            deletions: Cache::new(MAX_DELETIONS),
        };
        Self {
            shared: Arc::new(shared),
            calls: Arc::default(),
            last_sent: Arc::default(),
            priority: Priority::default(),
            waits: Waits::default(),
            clock: Clock::system(),
        }
    }

    pub(crate) fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The same with a new count of calls, this priority, and a place to note waits.
    pub(crate) fn for_work(&self, priority: Priority, waits: Waits) -> Self {
        let (shared, clock) = (self.shared.clone(), self.clock.clone());
        Self { shared, calls: Arc::default(), last_sent: Arc::default(), priority, waits, clock }
    }

    pub(crate) fn waits(&self) -> &Waits {
        &self.waits
    }

    pub(crate) fn priority(&self) -> Priority {
        self.priority
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    pub(crate) fn limiters(&self) -> &HashMap<Endpoint, RateLimiter> {
        &self.shared.limiters
    }

    pub(crate) fn stall_guard(&self) -> &StallGuard {
        &self.shared.stall_guard
    }

    /// The records whose deletion the event log has shown.
    pub(crate) fn deletions(&self) -> &Cache<String, ()> {
        &self.shared.deletions
    }

    /// Calls made, including those answered with 429.
    pub(crate) fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    /// When the last call was sent, after its wait for the rate limiter.
    pub(crate) fn last_sent(&self) -> Option<Instant> {
        *self.last_sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds calls made on behalf of this caller.
    pub(crate) fn add_calls(&self, calls: u32) {
        self.calls.fetch_add(calls, Ordering::Relaxed);
    }

    pub(crate) async fn request<T: DeserializeOwned>(
        &self,
        endpoint: Endpoint,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, CloseError> {
        self.request_with(None, endpoint, path, body).await
    }

    /// The same with a permit acquired earlier.
    pub(crate) async fn request_with<T: DeserializeOwned>(
        &self,
        acquired: Option<Acquired>,
        endpoint: Endpoint,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, CloseError> {
        let answer = self.receive(acquired, endpoint, path, body, endpoint.max_answer()).await?;
        parse(&answer)
    }

    /// Reads a record of which `keep` takes what is needed. A 404 proves nothing yet ([`crate::close::deletion`]).
    pub(crate) async fn read_record<T>(
        &self,
        endpoint: Endpoint,
        path: &str,
        keep: impl Fn(&Value) -> Result<T, CloseError>,
    ) -> Result<T, CloseError> {
        let Answer(record) = parse(&self.receive(None, endpoint, path, None, endpoint.max_answer()).await?)?;
        keep(&record)
    }

    /// Sends a call until the answer is not a 429, and returns the body.
    async fn receive(
        &self,
        mut acquired: Option<Acquired>,
        endpoint: Endpoint,
        path: &str,
        body: Option<Value>,
        max_answer: usize,
    ) -> Result<Vec<u8>, CloseError> {
        loop {
            let permit = match acquired.take() {
                Some(acquired) => acquired,
                None => self.acquire(endpoint).await,
            };
            if let Some(answer) = self.send(permit, endpoint, path, body.as_ref(), max_answer).await? {
                return Ok(answer);
            }
        }
    }

    /// Sends a call once. Returns `None` after a 429: nothing has happened, and the next permit may take long.
    pub(crate) async fn send_once<T: DeserializeOwned>(
        &self,
        acquired: Acquired,
        endpoint: Endpoint,
        path: &str,
        body: &Value,
    ) -> Result<Option<T>, CloseError> {
        let answer = self.send(acquired, endpoint, path, Some(body), endpoint.max_answer()).await?;
        answer.map(|answer| parse(&answer)).transpose()
    }

    /// Waits for the rate limiter.
    pub(crate) async fn acquire(&self, endpoint: Endpoint) -> Acquired {
        let acquire = self.shared.limiters[&endpoint].acquire(self.priority);
        self.waits.during(WaitCause::RateLimited, acquire).await
    }

    /// Sends once. Returns `None` after a 429: the rate limiter then blocks for as long as Close asked.
    async fn send(
        &self,
        (mut permit, waited): Acquired,
        endpoint: Endpoint,
        path: &str,
        body: Option<&Value>,
        max_answer: usize,
    ) -> Result<Option<Vec<u8>>, CloseError> {
        if endpoint.writes() && !self.shared.stall_guard.allows_writes() {
            // The worker ends the session and drops this future.
            std::future::pending::<()>().await;
        }
        permit.send();
        self.calls.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        *self.last_sent.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
        let span = span(endpoint, waited);
        let sent = self.shared.transport.send(endpoint.method(), path, body, max_answer);
        let result = self.waits.during(WaitCause::SlowClose, sent.instrument(span.clone())).await;
        record_result(&span, &result);
        let too_large = CloseError::Transient(Fault::TooLarge);
        let status = match &result {
            Ok(answer) => StatusClass::of(answer.status),
            // Only the body of a success is limited.
            Err(error) if *error == too_large => StatusClass::Ok,
            Err(_) => StatusClass::NoAnswer,
        };
        (self.shared.observe)(Call { endpoint, status, took: started.elapsed(), waited });

        let answer = result.map_err(|error| {
            // Only the size of a record is up to others.
            let is_invalid = error == too_large && !endpoint.answers_with_record();
            if is_invalid { CloseError::Transient(Fault::InvalidResponse) } else { error }
        })?;
        let header = |name: &str| answer.header(name);
        let limit = RateLimit::read(header);
        permit.answered(limit);
        if answer.status != StatusCode::TOO_MANY_REQUESTS
            && self.shared.refused_in_a_row[&endpoint].swap(0, Ordering::Relaxed) >= MANY_REFUSALS
        {
            tracing::info!(endpoint = endpoint.label(), "Close no longer answers with 429");
        }
        match answer.status.as_u16() {
            200..=299 => Ok(Some(answer.body)),
            429 => {
                let reset = limit.filter(|limit| limit.remaining == 0).map(|limit| limit.reset);
                let retry_after = || headers::retry_after(header);
                let wait = reset.or_else(retry_after).unwrap_or(rate_limit::DEFAULT_WAIT);
                // Close may round less than a second down to 0.
                permit.refused(wait.max(rate_limit::SHORTEST_WAIT), reset.is_some());
                let in_a_row = &self.shared.refused_in_a_row[&endpoint];
                if in_a_row.fetch_add(1, Ordering::Relaxed) + 1 == MANY_REFUSALS {
                    tracing::warn!(endpoint = endpoint.label(), "Close keeps answering with 429, throttling");
                }
                Ok(None)
            }
            status => {
                if status == 503
                    && let Some(wait) = headers::retry_after(header)
                {
                    // The call is over, and the next ones of this group wait.
                    permit.refused(wait.min(rate_limit::LONGEST_UNAVAILABLE), true);
                }
                Err(answer.error(endpoint.writes()))
            }
        }
    }
}

fn parse<T: DeserializeOwned>(answer: &[u8]) -> Result<T, CloseError> {
    serde_json::from_slice(answer).map_err(|_| match Form::of(answer) {
        Form::Json | Form::Empty => CloseError::Transient(Fault::InvalidResponse),
        form @ (Form::Html | Form::Text) => CloseError::Transient(Fault::Foreign { status: 200, form }),
    })
}

/// The span of a call, by OpenTelemetry's conventions for HTTP. The transport adds the server. The path is left out
/// because it may contain personal data.
fn span(endpoint: Endpoint, waited: Duration) -> Span {
    let (method, template) = (endpoint.method(), endpoint.template());
    tracing::info_span!(
        target: SPANS,
        "call",
        "otel.name" = format!("{method} {template}"),
        "otel.kind" = "client",
        "http.request.method" = method.as_str(),
        "url.template" = template,
        "server.address" = Empty,
        "server.port" = Empty,
        "http.response.status_code" = Empty,
        "close_sync.gate_wait_seconds" = waited.as_secs_f64(),
        "error.type" = Empty,
        "otel.status_description" = Empty,
    )
}

/// Records in the span how the call ended.
fn record_result(span: &Span, result: &Result<Response, CloseError>) {
    match result {
        Ok(answer) => {
            span.record("http.response.status_code", i64::from(answer.status.as_u16()));
            if answer.status.is_client_error() || answer.status.is_server_error() {
                spans::fail(span, answer.status.as_str(), "");
            }
        }
        Err(error) => spans::fail(span, error.label(), ""),
    }
}
