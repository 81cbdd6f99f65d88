//! The transport of calls to Close. In production this is HTTPS, [`Http`].
//!
//! The trait lets tests run the whole worker against a simulated Close without sockets, in one thread and in virtual
//! time. Thousands of deterministic runs with lost responses and a lagging search index then take seconds.

use futures_util::future::BoxFuture;
use reqwest::header::{self, HeaderMap};
use reqwest::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tracing::Span;
use url::Url;

use crate::close::error::{CloseError, ErrorAnswer, Fault};
use crate::close::rejection::MAX_ERROR_BODY;
use crate::close::settings::Settings;
use crate::text::line;

pub trait Transport: Send + Sync {
    /// Sends a call once. `path` is relative to the base of the API and includes the query. The body is sent as JSON. The
    /// caller may drop the future, but a call that was already sent may still take effect. `max_answer` is the maximum size
    /// of the body of a successful response.
    ///
    /// # Errors
    /// No response, or one that is too large: [`CloseError::Unreachable`] if nothing was sent, [`CloseError::Transient`]
    /// if the call may have been applied. A response with an error status is `Ok`.
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
        max_answer: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>>;
}

/// A response with any status.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Response {
    /// A response without headers.
    #[cfg(test)]
    pub(crate) fn with_status(status: u16, body: impl ToString) -> Self {
        let status = StatusCode::from_u16(status).unwrap();
        Self { status, headers: HeaderMap::new(), body: body.to_string().into_bytes() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The error of an answer whose status is neither 2xx nor 429. `to_write`: the call creates or changes a record.
    pub(crate) fn error(&self, to_write: bool) -> CloseError {
        CloseError::of_answer(&ErrorAnswer {
            status: self.status.as_u16(),
            to_write,
            is_json: self.header("content-type").is_some_and(|kind| kind.contains("json")),
            location: self.header("location"),
            body: &self.body,
        })
    }
}

/// The maximum length of the cause of a failed connection, in characters: it may quote names from a certificate.
const MAX_CAUSE: usize = 500;

pub(crate) struct Http {
    client: reqwest::Client,
    url: Url,
    api_key: SecretString,
}

impl Http {
    pub(crate) fn new(settings: Settings) -> Result<Self, reqwest::Error> {
        // The provider is installed once per process. A second installation fails, which is harmless.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("close-sync/", env!("CARGO_PKG_VERSION")))
            .timeout(settings.timeout)
            // A separate timeout shows that the call was not sent.
            .connect_timeout(settings.timeout / 2)
            // A redirect may lose the body of a POST (close-api.md §1).
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self { client, url: settings.url, api_key: settings.api_key })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        max_answer: usize,
    ) -> Result<Response, CloseError> {
        let url = resolve(&self.url, path).ok_or(CloseError::Transient(Fault::InvalidResponse))?;
        Span::current()
            .record("server.address", url.host_str())
            .record("server.port", url.port_or_known_default().map(i64::from));
        let mut request = self
            .client
            .request(method, url)
            .basic_auth(self.api_key.expose_secret(), Some(""))
            .header(header::ACCEPT, "application/json");
        if let Some(body) = body {
            request = request.json(body);
        }
        let mut response = request.send().await.map_err(|error| fault(&error))?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| fault(&error))? {
            if !status.is_success() && body.len() + chunk.len() > MAX_ERROR_BODY {
                // The status and the start say enough.
                body.extend(chunk.iter().copied().take(MAX_ERROR_BODY - body.len()));
                break;
            }
            if body.len() + chunk.len() > max_answer {
                return Err(CloseError::Transient(Fault::TooLarge));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Response { status, headers, body })
    }
}

/// The URL of a call. `None` if the path leaves the base of the API, which would send the key somewhere else.
fn resolve(base: &Url, path: &str) -> Option<Url> {
    base.join(path).ok().filter(|url| url.as_str().starts_with(base.as_str()))
}

impl Transport for Http {
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
        max_answer: usize,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        Box::pin(self.exchange(method, path, body, max_answer))
    }
}

fn fault(error: &reqwest::Error) -> CloseError {
    if error.is_connect() {
        // The innermost cause is the most specific: connection refused, unknown host, invalid certificate.
        let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
        let cause = causes.last().map_or_else(|| "no connection".to_owned(), ToString::to_string);
        CloseError::Unreachable(line(&cause.chars().take(MAX_CAUSE).collect::<String>()))
    } else if error.is_timeout() {
        CloseError::Transient(Fault::Timeout)
    } else {
        CloseError::Transient(Fault::ConnectionLost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_base_of_the_api() {
        let base = Url::parse("https://api.close.test/api/v1/").unwrap();
        for path in ["me/", "lead/lead_1/", "user/?_limit=100", "lead/%2e%2e%2fme/"] {
            assert!(resolve(&base, path).is_some(), "{path}");
        }
        for path in [
            "../me/",
            "lead/../../x",
            "/me/",
            "//other.test/",
            "https://other.test/",
            "lead/%2e%2e/../../x",
            "\\\\other.test",
        ] {
            assert_eq!(resolve(&base, path), None, "{path}");
        }
    }
}
