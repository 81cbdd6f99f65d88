//! The operator's page: the status of the worker, its dead letters, and a dry run of an event, in a browser.
//!
//! The page is off by default. All HTML is rendered here, without scripts and external assets. Pages with live data
//! refresh themselves, unless the operator pauses that. Everything that changes or reveals something is a POST.
//!
//! | file | content |
//! | --- | --- |
//! | `auth`, `middleware` | who may use the page |
//! | `layout` | the frame of all pages, and small parts |
//! | `redact` | hides personal data until an operator asks for it, which is audited |
//! | `status` | the page with the state of a destination |
//! | `test_event`, `explanation` | the dry run of an event |
//! | `dead_letters`, `dead_letter`, `replay_progress` | the pages about dead letters |
//! | `dead_letter_cache` | scans the dead letters for them, and runs replays |
//!
//! Every action writes one log line with a field `audit`: the action, the operator and the address. The line contains
//! nothing of a message except its id.

mod auth;
mod dead_letter;
mod dead_letter_cache;
mod dead_letters;
mod explanation;
mod layout;
mod middleware;
mod redact;
mod replay_progress;
mod status;
mod test_event;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{DefaultBodyLimit, Form, FromRequestParts, Path, Query, State as Shared};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use secrecy::SecretString;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::registry::{DestinationHandle, Registry};
pub use auth::AUDIT;
use auth::{Authenticator, Visitor};
use dead_letter_cache::DeadLetterCache;
use layout::{ErrorPage, RefreshQuery};

#[derive(Clone, Debug)]
pub struct Settings {
    /// The token for sign-in. Without one, everybody who reaches the page may use it.
    pub token: Option<SecretString>,
    /// Allowed host names in lower case, in addition to loopback and the bound address.
    pub hosts: Vec<String>,
}

#[derive(Clone)]
struct AppState(Arc<Inner>);

struct Inner {
    registry: Registry,
    authenticator: Authenticator,
    /// By destination.
    dead_letter_caches: Mutex<HashMap<String, Arc<DeadLetterCache>>>,
    /// Stops replays.
    shutdown: CancellationToken,
    /// Replays that run in the background.
    jobs: TaskTracker,
}

/// The path of the first page. All others are below it.
pub const HOME: &str = "/page";

/// The routes of the page, for a server bound to this address. Background `jobs` end soon after `shutdown`.
pub fn router(
    settings: Settings,
    registry: Registry,
    bound: IpAddr,
    shutdown: CancellationToken,
    jobs: TaskTracker,
) -> Router {
    let (authenticator, dead_letter_caches) = (Authenticator::new(settings, bound), Mutex::default());
    let state = AppState(Arc::new(Inner { registry, authenticator, dead_letter_caches, shutdown, jobs }));
    let guarded = axum::middleware::from_fn_with_state(state.clone(), middleware::require_operator);
    let pages = Router::new()
        .route("/", get(home))
        .route("/style.css", get(style))
        .route("/sign-in", get(sign_in_form).post(sign_in))
        .route("/sign-out", post(sign_out))
        .route("/{destination}", get(status::show))
        .route("/{destination}/dead", get(dead_letters::list))
        .route("/{destination}/dead/group", get(dead_letters::group))
        .route("/{destination}/dead/message", get(dead_letter::show).post(dead_letter::reveal))
        .route("/{destination}/dead/replay", get(dead_letters::ask_to_replay).post(dead_letters::replay))
        .route("/{destination}/dead/discard", get(dead_letters::ask_to_discard).post(dead_letters::discard))
        .route("/{destination}/dead/progress", get(replay_progress::show).post(replay_progress::reveal))
        .route("/{destination}/dead/stop", post(replay_progress::stop))
        .route("/{destination}/test", get(test_event::form).post(test_event::rehearse))
        .fallback(async || ErrorPage::not_found())
        // The middleware has its own limits.
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .nest(HOME, pages)
        .layer(guarded)
        .layer(axum::middleware::map_response(layout::headers))
        .with_state(state)
}

/// A destination with its paths.
struct Destination {
    /// Its segment in paths.
    segment: String,
    name: Option<String>,
    handle: DestinationHandle,
}

/// The segment of a destination without a name. No name has this form.
const NAMELESS: &str = "-";

impl Destination {
    fn new(name: String, handle: DestinationHandle) -> Self {
        let name = Some(name).filter(|name| !name.is_empty());
        Self { segment: name.clone().unwrap_or_else(|| NAMELESS.to_owned()), name, handle }
    }

    /// The path of one of its pages. Its first page is the empty string.
    fn path(&self, page: &str) -> String {
        let slash = if page.is_empty() { "" } else { "/" };
        format!("{HOME}/{}{slash}{page}", self.segment)
    }

    fn title(&self) -> &str {
        self.name.as_deref().unwrap_or("close-sync")
    }
}

impl AppState {
    fn destinations(&self) -> Vec<Destination> {
        self.0.registry.handles().into_iter().map(|(name, handle)| Destination::new(name, handle)).collect()
    }

    fn dead_letter_cache(&self, destination: &Destination) -> Arc<DeadLetterCache> {
        let mut all = self.0.dead_letter_caches.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(destination.segment.clone()).or_default())
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

/// Shows the only destination, or the list of all.
async fn home(
    Shared(state): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<RefreshQuery>,
) -> Response {
    match state.destinations().as_slice() {
        [destination] => Redirect::to(&destination.path("")).into_response(),
        destinations => status::overview(destinations, &visitor, &query).into_response(),
    }
}

async fn style() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/css; charset=utf-8")], include_str!("style.css"))
}

#[derive(Deserialize)]
struct Credentials {
    token: String,
    who: String,
    /// The page to open after the sign-in.
    #[serde(default)]
    to: String,
}

async fn sign_in_form(Extension(visitor): Extension<Visitor>) -> Response {
    layout::sign_in(&visitor, HOME, None).into_response()
}

async fn sign_in(
    Shared(state): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    Form(Credentials { token, who, to }): Form<Credentials>,
) -> Response {
    // Only redirect to a page of this program, and to a valid header value.
    let is_ours = (to == HOME || to.starts_with("/page/")) && to.bytes().all(|byte| byte.is_ascii_graphic());
    let to = if is_ours { to } else { HOME.to_owned() };
    match state.0.authenticator.sign_in(&visitor, &token, &who).await {
        Ok(cookie) => redirect(&headers, &to, cookie),
        Err(why) => (StatusCode::UNAUTHORIZED, layout::sign_in(&visitor, &to, Some(why))).into_response(),
    }
}

async fn sign_out(
    Shared(state): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
) -> Response {
    redirect(&headers, HOME, state.0.authenticator.sign_out(&visitor))
}

/// Redirects the browser, with a cookie.
fn redirect(headers: &HeaderMap, to: &str, mut cookie: String) -> Response {
    // A proxy terminates TLS, so the cookie must never travel without it.
    if headers.get(header::ORIGIN).is_some_and(|origin| origin.as_bytes().starts_with(b"https://")) {
        cookie.push_str("; Secure");
    }
    (StatusCode::SEE_OTHER, [(header::LOCATION, to), (header::SET_COOKIE, &cookie)]).into_response()
}
