//! Who may use the page, and from where.
//!
//! - **The host** a request names has to be one of ours: a name somebody else points at this machine (DNS rebinding)
//!   would let their page read ours.
//! - **Other sites** may link here and nothing else, as far as the browser tells (`Sec-Fetch-Site`, `Origin`).
//! - **A POST** carries a secret that only our own pages hold, or the token.
//! - **The token**, where one is set, is taken once, by the form that signs in; after that a cookie stands for it, for
//!   some hours. Scripts send it as `Authorization: Bearer` each time. It is compared in constant time, and who is
//!   wrong waits.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody, to_bytes};
use axum::extract::{ConnectInfo, Request, State as Shared};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::http::admin::layout::{self, Broken};
use crate::http::admin::{AppState, Settings};

/// How long a session lasts at most, and without being used.
const SESSION: Duration = Duration::from_hours(12);
const IDLE: Duration = Duration::from_hours(2);
/// Sessions at the same time; the one used longest ago ends for one more.
const SESSIONS: u64 = 100;
/// How long whoever shows a wrong token waits, one try after the other.
const PENALTY: Duration = Duration::from_secs(1);
/// Addresses whose last tries are remembered.
const ADDRESSES: u64 = 1000;
/// The longest name of an operator, in characters.
const LONGEST_NAME: usize = 60;
/// What a form takes besides an event.
const FORM_BYTES: usize = 64 * 1024;
/// The cookie of a session.
const COOKIE_NAME: &str = "close_sync_page";
/// The target of log lines about what was done here: they are written whatever the filter of the log is.
pub const AUDIT: &str = "close_sync::audit";
/// The field of a form with the secret of our pages.
pub(crate) const SEAL: &str = "seal";

/// Somebody who looks at the page.
#[derive(Clone, Debug)]
pub(crate) struct Visitor {
    /// What the log calls them.
    pub(crate) who: Arc<str>,
    /// What their forms carry.
    pub(crate) seal: Arc<str>,
    from: IpAddr,
    entry: Entry,
}

/// How somebody got in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    /// Through an open door, or not at all.
    Open,
    /// With the token in hand, as a script does.
    Token,
    /// By a session with this id.
    Session(Arc<str>),
}

impl Visitor {
    /// Whether there is something to sign out of.
    pub(crate) fn has_session(&self) -> bool {
        matches!(self.entry, Entry::Session(_))
    }

    /// Notes in the log what they did, to which destination, and about what.
    pub(crate) fn audit(&self, what: &str, destination: Option<&str>, about: Option<&str>) {
        let Self { who, from, .. } = self;
        tracing::info!(target: AUDIT, audit = what, who = %who, %from, destination, about, "an operator acted on the page");
    }
}

/// What a session holds.
#[derive(Clone)]
struct Session {
    who: Arc<str>,
    seal: Arc<str>,
}

/// The doorkeeper.
pub(crate) struct Guard {
    token: Option<SecretString>,
    hosts: Vec<String>,
    bound: IpAddr,
    /// The seal of whoever has no session.
    seal: Arc<str>,
    sessions: Cache<Arc<str>, Session>,
    doors: Cache<IpAddr, Arc<Mutex<()>>>,
}

impl Guard {
    pub(crate) fn new(settings: Settings, bound: IpAddr) -> Self {
        let Settings { token, hosts } = settings;
        Self {
            token,
            hosts,
            bound,
            seal: secret(),
            sessions: Cache::builder()
                .max_capacity(SESSIONS)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(SESSION)
                .time_to_idle(IDLE)
                .build(),
            doors: Cache::builder().max_capacity(ADDRESSES).time_to_idle(SESSION).build(),
        }
    }

    /// Lets somebody in who knows the token, and tells the cookie.
    ///
    /// # Errors
    /// What is wrong, for them.
    pub(crate) async fn sign_in(
        &self,
        visitor: &Visitor,
        token: &str,
        who: &str,
    ) -> Result<String, &'static str> {
        let who = who.trim();
        // It goes into the log.
        if who.is_empty() || who.chars().count() > LONGEST_NAME || who.chars().any(char::is_control) {
            return Err("Tell who you are: a name of at most 60 characters, for the log.");
        }
        if !self.knows_token(token, visitor.from).await {
            return Err("This is not the token (`http.page_token`).");
        }
        let (id, who) = (secret(), Arc::from(who));
        Visitor { who: Arc::clone(&who), ..visitor.clone() }.audit("sign-in", None, None);
        self.end(visitor);
        self.sessions.insert(Arc::clone(&id), Session { who, seal: secret() });
        Ok(cookie(&id, SESSION))
    }

    /// Ends a session, and tells the cookie that takes its place.
    pub(crate) fn sign_out(&self, visitor: &Visitor) -> String {
        visitor.audit("sign-out", None, None);
        self.end(visitor);
        cookie("", Duration::ZERO)
    }

    fn end(&self, visitor: &Visitor) {
        if let Entry::Session(id) = &visitor.entry {
            self.sessions.invalidate(id);
        }
    }

    /// Whether this is the token. Whoever is wrong waits, of one address one after the other; nobody who is right
    /// does, as behind a proxy all have one address.
    async fn knows_token(&self, token: &str, from: IpAddr) -> bool {
        let Some(right) = &self.token else { return false };
        let knows: bool = right.expose_secret().as_bytes().ct_eq(token.trim().as_bytes()).into();
        if !knows {
            self.stranger(from).audit("sign-in refused", None, None);
            let door = self.doors.get_with(from, Arc::default);
            let _turn = door.lock().await;
            tokio::time::sleep(PENALTY).await;
        }
        knows
    }

    /// Who this is, if they may come in.
    async fn recognize(&self, headers: &HeaderMap, from: IpAddr) -> Option<Visitor> {
        if self.token.is_none() {
            return Some(Visitor { who: "local".into(), ..self.stranger(from) });
        }
        if let Some(bearer) = bearer(headers) {
            let knows = self.knows_token(bearer, from).await;
            let entry = Entry::Token;
            return knows.then(|| Visitor { who: "bearer".into(), entry, ..self.stranger(from) });
        }
        let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
        let mut ids = cookies
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().strip_prefix(COOKIE_NAME)?.strip_prefix('='));
        let (id, Session { who, seal }) = ids.find_map(|id| Some((id, self.sessions.get(id)?)))?;
        Some(Visitor { who, seal, from, entry: Entry::Session(id.into()) })
    }

    /// Somebody who has not signed in.
    fn stranger(&self, from: IpAddr) -> Visitor {
        Visitor { who: "nobody".into(), seal: Arc::clone(&self.seal), from, entry: Entry::Open }
    }

    /// Whether the request is meant for us, and no other site is behind it.
    fn trusts(&self, request: &Request) -> Result<(), (StatusCode, &'static str)> {
        const FOREIGN: (StatusCode, &str) =
            (StatusCode::FORBIDDEN, "Another site sent this request. Open the page itself.");
        let headers = request.headers();
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let told = headers.get_all(HOST).into_iter().map(|value| value.to_str().ok()?.parse().ok());
        let hosts: Option<Vec<Authority>> =
            told.chain(request.uri().authority().cloned().map(Some)).collect();
        let hosts = hosts.unwrap_or_default();
        if hosts.is_empty() || !hosts.iter().all(|host| self.is_ours(host.host())) {
            return Err((
                StatusCode::MISDIRECTED_REQUEST,
                "The page is not reached by this name. If it should be, add the name to `http.page_hosts` \
                 (HTTP_PAGE_HOSTS) and restart close-sync.",
            ));
        }
        let reads = is_read(request.method());
        // A link from elsewhere is fine, a picture or a form is not.
        let is_link =
            reads && text("sec-fetch-mode") == Some("navigate") && text("sec-fetch-dest") == Some("document");
        match text("sec-fetch-site") {
            None | Some("same-origin" | "none") => {}
            Some(_) if is_link => {}
            Some(_) => return Err(FOREIGN),
        }
        let is_ours = |origin: &str| {
            let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
            authority
                .and_then(|authority| authority.parse::<Authority>().ok())
                .is_some_and(|of| hosts.contains(&of))
        };
        if !reads && text(ORIGIN.as_str()).is_some_and(|origin| !is_ours(origin)) {
            return Err(FOREIGN);
        }
        Ok(())
    }

    fn is_ours(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        host == "localhost"
            || ip.is_ok_and(|ip| ip.is_loopback() || ip == self.bound)
            || self.hosts.contains(&host)
    }
}

/// Stands in front of every page.
pub(crate) async fn guard(
    Shared(office): Shared<AppState>,
    ConnectInfo(peer): ConnectInfo<std::net::SocketAddr>,
    mut request: Request,
    next: Next,
) -> Response {
    let guard = &office.0.guard;
    if let Err((status, why)) = guard.trusts(&request) {
        return Broken::new(status, why).into_response();
    }
    let is_open = matches!(request.uri().path(), "/page/style.css" | "/page/sign-in");
    let visitor = match guard.recognize(request.headers(), peer.ip()).await {
        Some(visitor) => visitor,
        None if is_open => guard.stranger(peer.ip()),
        None => {
            let asked =
                if is_read(request.method()) { request.uri().path() } else { crate::http::admin::HOME };
            let form = layout::sign_in(&guard.stranger(peer.ip()), asked, None);
            let how = [(axum::http::header::WWW_AUTHENTICATE, "Bearer")];
            return (StatusCode::UNAUTHORIZED, how, form).into_response();
        }
    };
    if !is_read(request.method()) {
        let (parts, body) = request.into_parts();
        let limit = if parts.uri.path().ends_with("/test") { office.largest_event() } else { FORM_BYTES };
        // What says so of itself is not waited for.
        let fits = usize::try_from(body.size_hint().lower()).is_ok_and(|least| least <= limit);
        let form = if fits { to_bytes(body, limit).await.ok() } else { None };
        let Some(form) = form else {
            return Broken::new(StatusCode::PAYLOAD_TOO_LARGE, "This is more than a message may have.")
                .into_response();
        };
        let mut seals = url::form_urlencoded::parse(&form).filter(|(name, _)| name == SEAL);
        let is_sealed =
            seals.next().is_some_and(|(_, seal)| seal.as_bytes().ct_eq(visitor.seal.as_bytes()).into());
        // A cookie comes by itself, a token does not.
        if !is_sealed && visitor.entry != Entry::Token {
            return Broken::new(
                StatusCode::FORBIDDEN,
                "The form is not from this page, or from before a restart or a new sign-in. Go back, load it again, and \
                 send it once more.",
            ).into_response();
        }
        request = Request::from_parts(parts, Body::from(form));
    }
    request.extensions_mut().insert(visitor);
    next.run(request).await
}

impl AppState {
    /// What a form with an event may take, in bytes: the notation of forms makes three of one.
    fn largest_event(&self) -> usize {
        let workers = self.places().into_iter().filter_map(|place| place.seat.runtime.worker());
        let event = workers.map(|worker| worker.settings().max_message_bytes).max().unwrap_or_default();
        event.saturating_mul(3).saturating_add(FORM_BYTES)
    }
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Something nobody can guess: 122 random bits from the system.
fn secret() -> Arc<str> {
    Uuid::new_v4().simple().to_string().into()
}

fn cookie(id: &str, lasts: Duration) -> String {
    let seconds = lasts.as_secs();
    format!(
        "{COOKIE_NAME}={id}; Path={}; Max-Age={seconds}; HttpOnly; SameSite=Strict",
        crate::http::admin::HOME
    )
}
