//! How a call travels to Close and its answer back.
//!
//! In production that is HTTPS, [`Http`]. It is a seam so that the whole worker, with its gates, its
//! doubts and its retries, can be tried against a simulated Close without sockets: in one thread and in
//! virtual time, where thousands of histories with lost answers and late searches take seconds and come
//! out the same each time. What is behind the seam decides nothing; it carries.

use futures_util::future::BoxFuture;
use reqwest::header::{self, HeaderMap};
use reqwest::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tracing::Span;
use url::Url;

use crate::close::error::{CloseError, Fault};
use crate::close::settings::Settings;

/// Carries calls to Close.
pub trait Transport: Send + Sync {
    /// Sends a call once. `path` is below the base of the API and has its query; a body is sent as JSON.
    /// The caller may drop the future; what was sent may still take effect.
    ///
    /// # Errors
    /// No answer came: [`CloseError::Unreachable`] when nothing was sent, [`CloseError::Transient`] when it
    /// may have happened. An answer of any status is none.
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
    ) -> BoxFuture<'a, Result<Response, CloseError>>;
}

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Response {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its whole body.
    pub body: Vec<u8>,
}

/// Bodies larger than this are not read to the end; a Lead with hundreds of Contacts stays below.
const MAX_ANSWER: usize = 32 << 20;

/// Close over HTTPS.
pub(crate) struct Http {
    client: reqwest::Client,
    url: Url,
    api_key: SecretString,
}

impl Http {
    pub(crate) fn new(settings: Settings) -> Result<Self, reqwest::Error> {
        // One TLS stack for the process; a second installation is refused and harmless.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("close-sync/", env!("CARGO_PKG_VERSION")))
            .timeout(settings.timeout)
            // Of its own, so that a call that was never sent is known as such.
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
    ) -> Result<Response, CloseError> {
        let url = self.url.join(path).map_err(|_| CloseError::NotFound)?;
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
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(CloseError::Transient(Fault::Garbled));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Response { status, headers, body })
    }
}

impl Transport for Http {
    fn send<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: Option<&'a Value>,
    ) -> BoxFuture<'a, Result<Response, CloseError>> {
        Box::pin(self.exchange(method, path, body))
    }
}

fn fault(error: &reqwest::Error) -> CloseError {
    if error.is_connect() {
        // The innermost cause says most: refused, no such host, a bad certificate.
        let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
        CloseError::Unreachable(causes.last().map_or_else(|| "no connection".to_owned(), ToString::to_string))
    } else if error.is_timeout() {
        CloseError::Transient(Fault::Timeout)
    } else {
        CloseError::Transient(Fault::ConnectionLost)
    }
}
