//! The operator's page: the status of the worker, its dead letters, and a dry run of an event, in a browser.
//!
//! The page is off by default. All HTML is rendered here, without scripts and external assets. Pages with live data
//! refresh themselves, unless the operator pauses that. Everything that changes or reveals something is a POST.
//!
//! A file uses only files below it in this table:
//!
//! | file | content |
//! | --- | --- |
//! | `status` | the page with the state of a destination |
//! | `test_event` | the dry run of an event |
//! | `dead_letters`, `confirmation`, `dead_letter`, `replay_progress` | the pages about dead letters |
//! | `dead_letter_context` | what these four share |
//! | `explanation` | renders a dry run |
//! | `middleware`, `sign_in` | check every request, sign operators in |
//! | `app_state` | the state of all pages |
//! | `dead_letter_cache` | scans the dead letters for the pages, and runs replays |
//! | `layout` | the frame of all pages, and small parts |
//! | `redact` | hides personal data until an operator asks for it, which is audited |
//! | `auth` | sessions, and protection against other sites |
//! | `throttle` | limits guesses of the token |
//! | `destination` | a destination and the paths of its pages |
//!
//! Every action writes one log line with a field `audit`: the action, the operator and the address. The line contains
//! nothing of a message except its id.

mod app_state;
mod auth;
mod confirmation;
mod dead_letter;
mod dead_letter_cache;
mod dead_letter_context;
mod dead_letters;
mod destination;
mod explanation;
mod layout;
mod middleware;
mod redact;
mod replay_progress;
mod sign_in;
mod status;
mod test_event;
mod throttle;

use std::net::IpAddr;

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::registry::Registry;
use app_state::AppState;
use auth::Visitor;
pub use auth::{AUDIT, Settings};
pub use destination::HOME;
use layout::{ErrorPage, RefreshQuery};
pub(in crate::http) use throttle::network;

/// The routes of the page, for a server bound to this address. Background `jobs` end soon after `shutdown`.
pub fn router(
    settings: Settings,
    registry: Registry,
    bound: IpAddr,
    shutdown: CancellationToken,
    jobs: TaskTracker,
) -> Router {
    let state = AppState::new(settings, registry, bound, shutdown, jobs);
    let guarded = axum::middleware::from_fn_with_state(state.clone(), middleware::require_operator);
    let pages = Router::new()
        .route("/", get(home))
        .route("/style.css", get(style))
        .route("/sign-in", get(sign_in::show).post(sign_in::sign_in))
        .route("/sign-out", post(sign_in::sign_out))
        .route("/{destination}", get(status::show))
        .route("/{destination}/dead", get(dead_letters::list))
        .route("/{destination}/dead/group", get(dead_letters::group))
        .route("/{destination}/dead/message", get(dead_letter::show).post(dead_letter::reveal))
        .route("/{destination}/dead/replay", get(confirmation::confirm_replay).post(confirmation::replay))
        .route("/{destination}/dead/discard", get(confirmation::confirm_discard).post(confirmation::discard))
        .route("/{destination}/dead/progress", get(replay_progress::show).post(replay_progress::reveal))
        .route("/{destination}/dead/stop", post(replay_progress::stop))
        .route("/{destination}/test", get(test_event::form).post(test_event::explain))
        .fallback(async || ErrorPage::not_found())
        // The middleware has its own limits.
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .nest(HOME, pages)
        .layer(guarded)
        .layer(axum::middleware::map_response(layout::headers))
        .with_state(state)
}

/// Shows the only destination, or the list of all.
async fn home(
    State(state): State<AppState>,
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
