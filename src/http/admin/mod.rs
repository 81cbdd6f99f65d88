//! The operator's page: what the worker is doing, its dead letters, and what an event would do, for people with a
//! browser.
//!
//! It is off unless enabled. Everything is rendered here: there is no script, no asset from elsewhere, and pages
//! that show something live ask to be loaded again, unless told not to. What changes or reveals anything is a POST.
//!
//! In reading order: `guard` is who may; `layout` what all pages look like; `mask` keeps personal data out of sight
//! until somebody asks for it, which is audited. The pages are `live`, `trial` for a test event, and for dead letters
//! `dead`, `message` and `progress`, which work at one `workbench`; `plan` tells what an event would do.
//!
//! Every action is one log line with a field `audit`: what was done, who did it, from which address. Such a line has
//! nothing of a message but its id.

mod auth;
mod dead_letter;
mod dead_letter_cache;
mod dead_letters;
mod explanation;
mod layout;
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
use axum::{Extension, Router, middleware};
use secrecy::SecretString;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::registry::{DestinationHandle, Registry};
pub use auth::AUDIT;
use auth::{Guard, Visitor};
use dead_letter_cache::DeadLetterCache;
use layout::{Broken, Wishes};

/// How the page is served.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What operators sign in with. Without, whoever reaches the page may use it.
    pub token: Option<SecretString>,
    /// Host names by which it is reached, in small letters, besides loopback and the bound address.
    pub hosts: Vec<String>,
}

/// What all pages share.
#[derive(Clone)]
struct AppState(Arc<Inner>);

struct Inner {
    board: Registry,
    guard: Guard,
    /// The dead letters by destination.
    workbenches: Mutex<HashMap<String, Arc<DeadLetterCache>>>,
    /// Nothing is begun or goes on after it.
    shutdown: CancellationToken,
    /// What goes on whether or not somebody looks.
    jobs: TaskTracker,
}

/// Where it begins. Everything else is below.
pub const HOME: &str = "/page";

/// The page, for a server bound to this address, until `shutdown`; `jobs` are at an end soon after it.
pub fn router(
    settings: Settings,
    board: Registry,
    bound: IpAddr,
    shutdown: CancellationToken,
    jobs: TaskTracker,
) -> Router {
    let (guard, workbenches) = (Guard::new(settings, bound), Mutex::default());
    let office = AppState(Arc::new(Inner { board, guard, workbenches, shutdown, jobs }));
    let guarded = middleware::from_fn_with_state(office.clone(), auth::guard);
    let pages = Router::new()
        .route("/", get(home))
        .route("/style.css", get(style))
        .route("/sign-in", get(sign_in_form).post(sign_in))
        .route("/sign-out", post(sign_out))
        .route("/{place}", get(status::show))
        .route("/{place}/dead", get(dead_letters::list))
        .route("/{place}/dead/group", get(dead_letters::group))
        .route("/{place}/dead/message", get(dead_letter::show).post(dead_letter::reveal))
        .route("/{place}/dead/replay", get(dead_letters::ask_to_replay).post(dead_letters::replay))
        .route("/{place}/dead/discard", get(dead_letters::ask_to_discard).post(dead_letters::discard))
        .route("/{place}/dead/progress", get(replay_progress::show).post(replay_progress::reveal))
        .route("/{place}/dead/stop", post(replay_progress::stop))
        .route("/{place}/test", get(test_event::form).post(test_event::rehearse))
        .fallback(async || Broken::nowhere())
        // The guard has one, by what the page is for.
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .nest(HOME, pages)
        .layer(guarded)
        .layer(middleware::map_response(layout::headers))
        .with_state(office)
}

/// A destination as the page names it.
struct Place {
    /// Its part of the path.
    segment: String,
    /// Its name, if it has one.
    name: Option<String>,
    seat: DestinationHandle,
}

/// The segment of a destination without a name, which no name can be.
const NAMELESS: &str = "-";

impl Place {
    fn new(name: String, seat: DestinationHandle) -> Self {
        let name = Some(name).filter(|name| !name.is_empty());
        Self { segment: name.clone().unwrap_or_else(|| NAMELESS.to_owned()), name, seat }
    }

    /// The path of one of its pages; empty for the first.
    fn path(&self, page: &str) -> String {
        let slash = if page.is_empty() { "" } else { "/" };
        format!("{HOME}/{}{slash}{page}", self.segment)
    }

    /// What it is called in front of people.
    fn title(&self) -> &str {
        self.name.as_deref().unwrap_or("close-sync")
    }
}

impl AppState {
    fn places(&self) -> Vec<Place> {
        self.0.board.handles().into_iter().map(|(name, seat)| Place::new(name, seat)).collect()
    }

    fn workbench(&self, place: &Place) -> Arc<DeadLetterCache> {
        let mut all = self.0.workbenches.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(place.segment.clone()).or_default())
    }
}

/// Of the path of a page.
#[derive(Deserialize)]
struct Of {
    place: String,
}

impl FromRequestParts<AppState> for Place {
    type Rejection = Broken;

    async fn from_request_parts(parts: &mut Parts, office: &AppState) -> Result<Self, Broken> {
        let Path(Of { place }) =
            Path::from_request_parts(parts, office).await.map_err(|_| Broken::nowhere())?;
        office.places().into_iter().find(|found| found.segment == place).ok_or_else(Broken::nowhere)
    }
}

/// The only destination, or all of them.
async fn home(
    Shared(office): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    Query(wishes): Query<Wishes>,
) -> Response {
    match office.places().as_slice() {
        [place] => Redirect::to(&place.path("")).into_response(),
        places => status::overview(places, &visitor, &wishes).into_response(),
    }
}

async fn style() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/css; charset=utf-8")], include_str!("style.css"))
}

/// What is asked of somebody who wants to sign in.
#[derive(Deserialize)]
struct Credentials {
    token: String,
    who: String,
    /// The page that was asked for.
    #[serde(default)]
    to: String,
}

async fn sign_in_form(Extension(visitor): Extension<Visitor>) -> Response {
    layout::sign_in(&visitor, HOME, None).into_response()
}

async fn sign_in(
    Shared(office): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    Form(Credentials { token, who, to }): Form<Credentials>,
) -> Response {
    // Only to a page of ours, and nothing that could be more than the value of a header.
    let is_ours = (to == HOME || to.starts_with("/page/")) && to.bytes().all(|byte| byte.is_ascii_graphic());
    let to = if is_ours { to } else { HOME.to_owned() };
    match office.0.guard.sign_in(&visitor, &token, &who).await {
        Ok(cookie) => redirect(&headers, &to, cookie),
        Err(why) => (StatusCode::UNAUTHORIZED, layout::sign_in(&visitor, &to, Some(why))).into_response(),
    }
}

async fn sign_out(
    Shared(office): Shared<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
) -> Response {
    redirect(&headers, HOME, office.0.guard.sign_out(&visitor))
}

/// Sends a browser elsewhere, with a cookie.
fn redirect(headers: &HeaderMap, to: &str, mut cookie: String) -> Response {
    // Something in front of us speaks TLS: then the cookie never travels without.
    if headers.get(header::ORIGIN).is_some_and(|origin| origin.as_bytes().starts_with(b"https://")) {
        cookie.push_str("; Secure");
    }
    (StatusCode::SEE_OTHER, [(header::LOCATION, to), (header::SET_COOKIE, &cookie)]).into_response()
}
