//! The operator's page: what the worker is doing, and what an event would do, for people with a browser.
//!
//! It is off unless enabled. Everything is rendered here: there is no script, no asset from elsewhere, and pages
//! that show something live ask to be loaded again, unless told not to. What changes or reveals anything is a POST.
//!
//! In reading order: `guard` is who may; `layout` what all pages look like; `mask` keeps personal data out of sight
//! until somebody asks for it, which is audited; `live`, `trial` and `plan` are the pages.
//!
//! Every action is one log line with a field `audit`: what was done, who did it, from which address. Such a line has
//! nothing of a message but its id.

mod guard;
mod layout;
mod live;
mod mask;
mod plan;
mod trial;

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Form, FromRequestParts, Path, State as Shared};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Extension, Router, middleware};
use secrecy::SecretString;
use serde::Deserialize;

use crate::board::{Board, Seat};
use guard::{Guard, Visitor};

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
struct Office(Arc<Inner>);

struct Inner {
    board: Board,
    guard: Guard,
}

/// Where it begins. Everything else is below.
const HOME: &str = "/page";

/// The page, for a server bound to this address.
pub fn router(settings: Settings, board: Board, bound: IpAddr) -> Router {
    let office = Office(Arc::new(Inner { board, guard: Guard::new(settings, bound) }));
    let guarded = middleware::from_fn_with_state(office.clone(), guard::guard);
    let pages = Router::new()
        .route("/", get(home))
        .route("/style.css", get(style))
        .route("/sign-in", get(sign_in_form).post(sign_in))
        .route("/sign-out", post(sign_out))
        .route("/{place}", get(live::show))
        .route("/{place}/test", get(trial::form).post(trial::rehearse))
        .fallback(async || Nowhere);
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
    seat: Seat,
}

/// The segment of a destination without a name, which no name can be.
const NAMELESS: &str = "-";

impl Place {
    fn new(name: String, seat: Seat) -> Self {
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

impl Office {
    fn places(&self) -> Vec<Place> {
        self.0.board.seats().into_iter().map(|(name, seat)| Place::new(name, seat)).collect()
    }
}

/// Of the path of a page.
#[derive(Deserialize)]
struct Of {
    place: String,
}

impl FromRequestParts<Office> for Place {
    type Rejection = Nowhere;

    async fn from_request_parts(parts: &mut Parts, office: &Office) -> Result<Self, Nowhere> {
        let Path(Of { place }) = Path::from_request_parts(parts, office).await.map_err(|_| Nowhere)?;
        office.places().into_iter().find(|found| found.segment == place).ok_or(Nowhere)
    }
}

/// There is no such page, or no such destination.
struct Nowhere;

impl IntoResponse for Nowhere {
    fn into_response(self) -> Response {
        layout::error(StatusCode::NOT_FOUND, "There is no such page, or no such destination.")
    }
}

/// The only destination, or all of them.
async fn home(Shared(office): Shared<Office>, Extension(visitor): Extension<Visitor>) -> Response {
    match office.places().as_slice() {
        [place] => Redirect::to(&place.path("")).into_response(),
        places => live::overview(places, &visitor).into_response(),
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
    Shared(office): Shared<Office>,
    Extension(visitor): Extension<Visitor>,
    Form(Credentials { token, who, to }): Form<Credentials>,
) -> Response {
    // Only to a page of ours, and nothing that could be more than the value of a header.
    let is_ours = (to == HOME || to.starts_with("/page/")) && to.bytes().all(|byte| byte.is_ascii_graphic());
    let to = if is_ours { to } else { HOME.to_owned() };
    match office.0.guard.sign_in(&visitor, &token, &who).await {
        Ok(cookie) => redirect(&to, &cookie),
        Err(why) => (StatusCode::UNAUTHORIZED, layout::sign_in(&visitor, &to, Some(why))).into_response(),
    }
}

async fn sign_out(Shared(office): Shared<Office>, Extension(visitor): Extension<Visitor>) -> Response {
    redirect(HOME, &office.0.guard.sign_out(&visitor))
}

/// Sends a browser elsewhere, with a cookie.
fn redirect(to: &str, cookie: &str) -> Response {
    (StatusCode::SEE_OTHER, [(header::LOCATION, to), (header::SET_COOKIE, cookie)]).into_response()
}
