//! Authentication for the operator's page, and protection against requests from other sites.
//!
//! - **Host.** The host of a request has to be in the allow list. Otherwise a foreign name that resolves to this machine
//!   (DNS rebinding) would let another site read the page.
//! - **Origin.** Other sites may link to the page and nothing else, according to `Sec-Fetch-Site` and `Origin`.
//! - **CSRF token.** Every POST carries a secret that only the page's own forms contain, or the bearer token.
//! - **Token.** If a token is configured, the sign-in form exchanges it for a session cookie. Scripts send it as
//!   `Authorization: Bearer` with each request. It is compared in constant time. `throttle` limits guesses. An open
//!   session is not affected by the guesses of others behind the same address.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode};
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::http::admin::destination::HOME;
use crate::http::admin::throttle::{RefusalLog, Throttle, network};
use crate::telemetry::metrics::{PageMetrics, Refusal};

/// The lifetime of a session.
const SESSION_LIFETIME: Duration = Duration::from_hours(12);
/// The lifetime of a session that is not used.
const SESSION_IDLE_LIFETIME: Duration = Duration::from_hours(2);
/// The limit of concurrent sessions. One more ends the least recently used one.
const MAX_SESSIONS: u64 = 100;
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
        tracing::info!(target: AUDIT, audit = what, who = &**who, %from, destination, about, "action on the operator's page");
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
    throttle: Mutex<Throttle>,
    refusals: Mutex<RefusalLog>,
    metrics: PageMetrics,
}

/// Why a request was not authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unauthenticated {
    /// It has no credentials, or wrong ones.
    SignIn,
    /// It guesses too often. It may guess again after this time.
    Throttled(Duration),
}

/// Why a sign-in was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Name,
    Token,
    Throttled(Duration),
}

impl Authenticator {
    pub(super) fn new(settings: Settings, bound: IpAddr, metrics: PageMetrics) -> Self {
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
            throttle: Mutex::new(Throttle::new(Instant::now())),
            refusals: Mutex::default(),
            metrics,
        }
    }

    /// Starts a session and returns its cookie.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn sign_in(&self, visitor: &Visitor, token: &str, who: &str) -> Result<String, Refused> {
        let who = who.trim();
        // The name goes into the log.
        if who.is_empty() || who.chars().count() > MAX_NAME_LENGTH || who.chars().any(is_invisible) {
            return Err(Refused::Name);
        }
        self.check_token(token, visitor.from)?;
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

    /// Checks a token. A guess of a throttled address is not compared.
    fn check_token(&self, token: &str, from: IpAddr) -> Result<(), Refused> {
        let Some(expected) = &self.token else { return Err(Refused::Token) };
        let now = Instant::now();
        let refused = {
            // Locked for the whole guess, so that guesses at the same time do not get around the limit.
            let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
            match throttle.admit(from, now) {
                Err(wait) => Refused::Throttled(wait),
                Ok(()) if expected.expose_secret().as_bytes().ct_eq(token.trim().as_bytes()).into() => {
                    return Ok(());
                }
                Ok(()) => {
                    throttle.guessed_wrong(from, now);
                    Refused::Token
                }
            }
        };
        self.metrics.refused(match refused {
            Refused::Throttled(_) => Refusal::Throttled,
            Refused::Token | Refused::Name => Refusal::WrongToken,
        });
        let log_now = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).add(from);
        if log_now {
            log_refusals(Some(from), 1);
        }
        Err(refused)
    }

    /// Logs the refused guesses that have no log line yet.
    pub(super) fn log_refusals(&self) {
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).drain();
        for (from, guesses) in refusals {
            log_refusals(from, guesses);
        }
    }

    /// Authenticates a request.
    ///
    /// # Errors
    /// Why it is not authenticated.
    pub(super) fn authenticate(&self, headers: &HeaderMap, from: IpAddr) -> Result<Visitor, Unauthenticated> {
        if self.token.is_none() {
            return Ok(Visitor { who: "local".into(), ..self.anonymous(from) });
        }
        if let Some(bearer) = bearer(headers) {
            let authentication = Authentication::BearerToken;
            return match self.check_token(bearer, from) {
                Ok(()) => Ok(Visitor { who: "bearer".into(), authentication, ..self.anonymous(from) }),
                Err(Refused::Throttled(wait)) => Err(Unauthenticated::Throttled(wait)),
                Err(Refused::Token | Refused::Name) => Err(Unauthenticated::SignIn),
            };
        }
        let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
        let mut ids = cookies
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().strip_prefix(COOKIE_NAME)?.strip_prefix('='));
        let found = ids.find_map(|id| Some((id, self.sessions.get(id)?)));
        let (id, Session { who, csrf_token }) = found.ok_or(Unauthenticated::SignIn)?;
        Ok(Visitor { who, csrf_token, from, authentication: Authentication::Session(id.into()) })
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

/// Logs refused guesses of one address, or of all further ones.
fn log_refusals(from: Option<IpAddr>, guesses: u64) {
    let from = from.map_or_else(|| "other addresses".to_owned(), |from| network(from).to_string());
    tracing::info!(target: AUDIT, audit = "sign-in refused", who = "nobody", from, guesses, "action on the operator's page");
}

/// Whether a character could make a name in the log look like another one.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{AD}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}')
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
