//! Calls to Close whose answers are looked at as they are, for `close-sync certify`.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

use crate::close::error::CloseError;
use crate::close::rate_limit::headers::{self, RateLimit};
use crate::close::rate_limit::{DEFAULT_WAIT, SHORTEST_WAIT};
use crate::close::settings::Settings;
use crate::close::transport::{Http, Response, Transport};

/// The maximum size of an answer. Those of `certify` are small.
const MAX_ANSWER: usize = 4 << 20;
/// Searches closer together than this were answered with 429 (close-api.md §15, 13).
const SEARCH_INTERVAL: Duration = Duration::from_millis(500);
/// The longest wait that a rate limit is obeyed for, for each call.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RawError {
    #[error("{0}")]
    Close(#[from] CloseError),
    /// All calls that were allowed have been made.
    #[error("the limit of calls is used up")]
    OutOfCalls,
    /// Close keeps answering with 429.
    #[error("Close keeps answering with 429")]
    RateLimited,
}

/// Sends one call after another, at most a fixed number and within the rate limits.
pub struct RawClient {
    transport: Box<dyn Transport>,
    /// The calls that may still be made.
    remaining: u32,
    made: u32,
    /// When the last header allows the next call.
    next: Instant,
    next_search: Instant,
}

impl RawClient {
    /// A client that makes at most `calls` calls.
    ///
    /// # Errors
    /// When TLS cannot be set up on this machine.
    pub fn new(settings: Settings, calls: u32) -> Result<Self, reqwest::Error> {
        Ok(Self::with_transport(Http::new(settings)?, calls))
    }

    pub(crate) fn with_transport(transport: impl Transport + 'static, calls: u32) -> Self {
        let now = Instant::now();
        Self { transport: Box::new(transport), remaining: calls, made: 0, next: now, next_search: now }
    }

    /// The calls that were made, including those answered with 429.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// The calls that may still be made.
    pub fn remaining(&self) -> u32 {
        self.remaining
    }

    /// Sends a call and returns the answer, whatever its status is. Only a 429 is waited for and sent again.
    pub async fn call(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response, RawError> {
        let deadline = Instant::now() + LONGEST_WAIT;
        loop {
            let is_search = path.starts_with("data/search/");
            let start = if is_search { self.next.max(self.next_search) } else { self.next };
            if start > deadline {
                return Err(RawError::RateLimited);
            }
            sleep_until(start).await;
            self.remaining = self.remaining.checked_sub(1).ok_or(RawError::OutOfCalls)?;
            self.made += 1;
            self.next_search = if is_search { Instant::now() + SEARCH_INTERVAL } else { self.next_search };
            let response = self.transport.send(method.clone(), path, body, MAX_ANSWER).await?;
            let header = |name: &str| response.headers.get(name).and_then(|value| value.to_str().ok());
            let limit = RateLimit::read(header);
            if response.status != StatusCode::TOO_MANY_REQUESTS {
                // Each endpoint has its own limit, but a short wait for another one does no harm.
                let wait = limit.filter(|limit| limit.remaining == 0).map(|limit| limit.reset);
                self.next = Instant::now() + wait.unwrap_or_default();
                return Ok(response);
            }
            let reset = limit.filter(|limit| limit.remaining == 0).map(|limit| limit.reset);
            let retry_after = || header("retry-after").and_then(headers::seconds);
            let wait = reset.or_else(retry_after).unwrap_or(DEFAULT_WAIT);
            self.next = Instant::now() + wait.max(SHORTEST_WAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::header::{HeaderMap, HeaderValue};

    use super::*;

    /// Answers with these statuses, then with 200, and notes when calls arrived.
    #[derive(Clone, Default)]
    struct Statuses(Arc<Mutex<(Vec<u16>, Vec<Duration>)>>, Option<Instant>);

    impl Transport for Statuses {
        fn send<'a>(
            &'a self,
            _: Method,
            _: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let mut state = self.0.lock().unwrap();
            let status = if state.0.is_empty() { 200 } else { state.0.remove(0) };
            state.1.extend(self.1.map(|start| start.elapsed()));
            let mut headers = HeaderMap::new();
            headers.insert("ratelimit", HeaderValue::from_static("limit=1; remaining=0; reset=3"));
            let status = StatusCode::from_u16(status).unwrap();
            std::future::ready(Ok(Response { status, headers, body: Vec::new() })).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_wait_for_the_rate_limit_and_are_counted() {
        let transport =
            Statuses(Arc::new(Mutex::new((vec![200, 429, 404], Vec::new()))), Some(Instant::now()));
        let mut client = RawClient::with_transport(transport.clone(), 4);
        for expected in [Ok(200), Ok(404), Ok(200), Err(RawError::OutOfCalls)] {
            let answer = client.call(Method::GET, "me/", None).await;
            assert_eq!(answer.map(|response| response.status.as_u16()), expected);
        }
        assert_eq!((client.made(), client.remaining()), (4, 0));
        let times = transport.0.lock().unwrap().1.clone();
        assert_eq!(times, [0, 3, 6, 9].map(Duration::from_secs));
    }

    #[tokio::test(start_paused = true)]
    async fn endless_429_ends() {
        let transport = Statuses(Arc::new(Mutex::new((vec![429; 99], Vec::new()))), None);
        let mut client = RawClient::with_transport(transport, 99);
        let answer = client.call(Method::GET, "me/", None).await;
        assert_eq!(answer.map(|response| response.status), Err(RawError::RateLimited));
        assert!(client.remaining() > 50);
    }
}
