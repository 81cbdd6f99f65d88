//! Authentication for the operator's page, and protection against requests from other sites.
//!
//! - **Host.** The host of a request has to be in the allow list. Otherwise a foreign name that resolves to this machine
//!   (DNS rebinding) would let another site read the page.
//! - **Origin.** Other sites may link to the page and nothing else, according to `Sec-Fetch-Site` and `Origin`.
//! - **CSRF token.** Every POST carries a secret that only the page's own forms contain, or the bearer token.
//! - **Token.** If a token is configured, the sign-in form exchanges it for a session cookie. Scripts send it as
//!   `Authorization: Bearer` with each request. It is compared in constant time, and a wrong token costs a delay.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode};
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::http::admin::destination::HOME;

/// The lifetime of a session.
const SESSION_LIFETIME: Duration = Duration::from_hours(12);
/// The lifetime of a session that is not used.
const SESSION_IDLE_LIFETIME: Duration = Duration::from_hours(2);
/// The limit of concurrent sessions. One more ends the least recently used one.
const MAX_SESSIONS: u64 = 100;
/// The delay after a wrong token. Attempts from one address are delayed one after the other.
const WRONG_TOKEN_DELAY: Duration = Duration::from_secs(1);
/// The limit of addresses whose failed attempts are tracked.
const MAX_DELAYED_ADDRESSES: u64 = 1000;
/// In characters.
const MAX_NAME_LENGTH: usize = 60;
/// The cookie of a session.
const COOKIE_NAME: &str = "close_sync_page";
/// The target of audit log lines. The log filter does not suppress them.
pub const AUDIT: &str = "close_sync::audit";
/// The form field with the CSRF token.
pub(super) const CSRF_FIELD: &str = "csrf_token";

#[derive(Clone, Debug)]
pub struct Settings {
    /// The token for sign-in. Without one, everybody who reaches the page may use it.
    pub token: Option<SecretString>,
    /// Allowed host names in lower case, in addition to loopback and the bound address.
    pub hosts: Vec<String>,
}

/// The sender of a request.
#[derive(Clone, Debug)]
pub(super) struct Visitor {
    /// The name for the log.
    pub(super) who: Arc<str>,
    /// The CSRF token of their forms.
    pub(super) csrf_token: Arc<str>,
    from: IpAddr,
    authentication: Authentication,
}

/// How the visitor was authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Authentication {
    /// Not authenticated, or the page needs no token.
    None,
    BearerToken,
    /// The id of the session.
    Session(Arc<str>),
}

impl Visitor {
    /// Whether this form token is the visitor's. A request with the bearer token needs none: a browser sends a cookie by
    /// itself, but never that header.
    pub(super) fn may_post(&self, csrf_token: Option<&str>) -> bool {
        let is_valid = |token: &str| token.as_bytes().ct_eq(self.csrf_token.as_bytes()).into();
        self.authentication == Authentication::BearerToken || csrf_token.is_some_and(is_valid)
    }

    pub(super) fn has_session(&self) -> bool {
        matches!(self.authentication, Authentication::Session(_))
    }

    /// Logs an action of the visitor.
    pub(super) fn audit(&self, what: &str, destination: Option<&str>, about: Option<&str>) {
        let Self { who, from, .. } = self;
        tracing::info!(target: AUDIT, audit = what, who = %who, %from, destination, about, "action on the operator's page");
    }
}

#[derive(Clone)]
struct Session {
    who: Arc<str>,
    csrf_token: Arc<str>,
}

/// Authenticates requests.
pub(super) struct Authenticator {
    token: Option<SecretString>,
    hosts: Vec<String>,
    bound: IpAddr,
    /// The CSRF token of visitors without a session.
    csrf_token: Arc<str>,
    sessions: Cache<Arc<str>, Session>,
    /// Delays the attempts from each address one after the other.
    delays: Cache<IpAddr, Arc<Mutex<()>>>,
}

impl Authenticator {
    pub(super) fn new(settings: Settings, bound: IpAddr) -> Self {
        let Settings { token, hosts } = settings;
        Self {
            token,
            hosts,
            bound,
            csrf_token: secret(),
            sessions: Cache::builder()
                .max_capacity(MAX_SESSIONS)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(SESSION_LIFETIME)
                .time_to_idle(SESSION_IDLE_LIFETIME)
                .build(),
            delays: Cache::builder()
                .max_capacity(MAX_DELAYED_ADDRESSES)
                .time_to_idle(SESSION_LIFETIME)
                .build(),
        }
    }

    /// Starts a session and returns its cookie.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub(super) async fn sign_in(
        &self,
        visitor: &Visitor,
        token: &str,
        who: &str,
    ) -> Result<String, &'static str> {
        let who = who.trim();
        // The name goes into the log.
        if who.is_empty() || who.chars().count() > MAX_NAME_LENGTH || who.chars().any(char::is_control) {
            return Err("Enter your name for the log, at most 60 characters.");
        }
        if !self.check_token(token, visitor.from).await {
            return Err("Wrong token. Enter the value of `http.page_token`.");
        }
        let (id, who) = (secret(), Arc::from(who));
        Visitor { who: Arc::clone(&who), ..visitor.clone() }.audit("sign-in", None, None);
        self.end(visitor);
        self.sessions.insert(Arc::clone(&id), Session { who, csrf_token: secret() });
        Ok(cookie(&id, SESSION_LIFETIME))
    }

    /// Ends the session and returns a cookie that deletes its cookie.
    pub(super) fn sign_out(&self, visitor: &Visitor) -> String {
        visitor.audit("sign-out", None, None);
        self.end(visitor);
        cookie("", Duration::ZERO)
    }

    fn end(&self, visitor: &Visitor) {
        if let Authentication::Session(id) = &visitor.authentication {
            self.sessions.invalidate(id);
        }
    }

    /// Whether the token is right. Only a wrong token is delayed: behind a proxy all operators share one address.
    async fn check_token(&self, token: &str, from: IpAddr) -> bool {
        let Some(expected) = &self.token else { return false };
        let is_valid: bool = expected.expose_secret().as_bytes().ct_eq(token.trim().as_bytes()).into();
        if !is_valid {
            self.anonymous(from).audit("sign-in refused", None, None);
            let delay = self.delays.get_with(from, Arc::default);
            let _alone = delay.lock().await;
            tokio::time::sleep(WRONG_TOKEN_DELAY).await;
        }
        is_valid
    }

    /// Authenticates a request. `None` if it has to sign in.
    pub(super) async fn authenticate(&self, headers: &HeaderMap, from: IpAddr) -> Option<Visitor> {
        if self.token.is_none() {
            return Some(Visitor { who: "local".into(), ..self.anonymous(from) });
        }
        if let Some(bearer) = bearer(headers) {
            let is_valid = self.check_token(bearer, from).await;
            let authentication = Authentication::BearerToken;
            return is_valid.then(|| Visitor {
                who: "bearer".into(),
                authentication,
                ..self.anonymous(from)
            });
        }
        let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
        let mut ids = cookies
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().strip_prefix(COOKIE_NAME)?.strip_prefix('='));
        let (id, Session { who, csrf_token }) = ids.find_map(|id| Some((id, self.sessions.get(id)?)))?;
        Some(Visitor { who, csrf_token, from, authentication: Authentication::Session(id.into()) })
    }

    /// A visitor who has not signed in.
    pub(super) fn anonymous(&self, from: IpAddr) -> Visitor {
        Visitor {
            who: "nobody".into(),
            csrf_token: Arc::clone(&self.csrf_token),
            from,
            authentication: Authentication::None,
        }
    }

    /// Checks the host, and that no other site caused the request.
    pub(super) fn check_origin(&self, request: &Request) -> Result<(), (StatusCode, &'static str)> {
        const OTHER_SITE: (StatusCode, &str) =
            (StatusCode::FORBIDDEN, "Another site sent this request. Open the page directly.");
        let headers = request.headers();
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let in_headers = headers.get_all(HOST).into_iter().map(|value| value.to_str().ok()?.parse().ok());
        let hosts: Option<Vec<Authority>> =
            in_headers.chain(request.uri().authority().cloned().map(Some)).collect();
        let hosts = hosts.unwrap_or_default();
        if hosts.is_empty() || !hosts.iter().all(|host| self.is_allowed_host(host.host())) {
            return Err((
                StatusCode::MISDIRECTED_REQUEST,
                "This host name is not allowed. To allow it, add it to `http.page_hosts` (HTTP_PAGE_HOSTS) and restart \
                 close-sync.",
            ));
        }
        let is_read = is_read(request.method());
        // Another site may link here, but not embed the page or submit a form.
        let is_link = is_read
            && text("sec-fetch-mode") == Some("navigate")
            && text("sec-fetch-dest") == Some("document");
        match text("sec-fetch-site") {
            None | Some("same-origin" | "none") => {}
            Some(_) if is_link => {}
            Some(_) => return Err(OTHER_SITE),
        }
        let is_own = |origin: &str| {
            let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
            authority
                .and_then(|authority| authority.parse::<Authority>().ok())
                .is_some_and(|of| hosts.contains(&of))
        };
        if !is_read && text(ORIGIN.as_str()).is_some_and(|origin| !is_own(origin)) {
            return Err(OTHER_SITE);
        }
        Ok(())
    }

    fn is_allowed_host(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        host == "localhost"
            || ip.is_ok_and(|ip| ip.is_loopback() || ip == self.bound)
            || self.hosts.contains(&host)
    }
}

pub(super) fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// A secret of 122 random bits.
fn secret() -> Arc<str> {
    Uuid::new_v4().simple().to_string().into()
}

fn cookie(id: &str, max_age: Duration) -> String {
    let seconds = max_age.as_secs();
    format!("{COOKIE_NAME}={id}; Path={HOME}; Max-Age={seconds}; HttpOnly; SameSite=Strict")
}
