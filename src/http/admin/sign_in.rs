//! The sign-in page.

use std::time::Duration;

use axum::Extension;
use axum::extract::{Form, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use serde::Deserialize;

use crate::http::admin::app_state::AppState;
use crate::http::admin::auth::{Refused, Visitor};
use crate::http::admin::destination::HOME;
use crate::http::admin::layout::{ErrorPage, Frame, alert, csrf_token};

#[derive(Deserialize)]
pub(super) struct Credentials {
    token: String,
    who: String,
    /// The page to open after the sign-in.
    #[serde(default)]
    to: String,
}

pub(super) async fn show(Extension(visitor): Extension<Visitor>) -> Markup {
    form(&visitor, HOME, None)
}

pub(super) async fn sign_in(
    State(state): State<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    Form(Credentials { token, who, to }): Form<Credentials>,
) -> Response {
    // Only redirect to a page of this program, and to a valid header value.
    let is_ours = (to == HOME || to.starts_with("/page/")) && to.bytes().all(|byte| byte.is_ascii_graphic());
    let to = if is_ours { to } else { HOME.to_owned() };
    let error = match state.authenticator().sign_in(&visitor, &token, &who) {
        Ok(cookie) => return redirect(&headers, &to, cookie),
        Err(Refused::Throttled(wait)) => return throttled(wait),
        Err(Refused::Name) => "Enter your name for the log, at most 60 visible characters.",
        Err(Refused::Token) => "Wrong token. Enter the value of `http.page_token`.",
    };
    (StatusCode::UNAUTHORIZED, form(&visitor, &to, Some(error))).into_response()
}

/// The response to a guess that was not compared.
pub(super) fn throttled(wait: Duration) -> Response {
    let seconds = wait.as_secs().saturating_add(1);
    let error = format!(
        "Too many wrong tokens from this address, or from all addresses. Try again in {seconds} s, or open the page \
         through a tunnel to the machine of the worker."
    );
    let page = ErrorPage::new(StatusCode::TOO_MANY_REQUESTS, error);
    ([(header::RETRY_AFTER, seconds.to_string())], page).into_response()
}

pub(super) async fn sign_out(
    State(state): State<AppState>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
) -> Response {
    redirect(&headers, HOME, state.authenticator().sign_out(&visitor))
}

/// The form. A successful sign-in opens the page `to`.
pub(super) fn form(visitor: &Visitor, to: &str, error: Option<&str>) -> Markup {
    Frame::new("Sign in").around(html! {
        @if let Some(error) = error { (alert(error)) }
        form .card.narrow method="post" action="/page/sign-in" {
            (csrf_token(visitor))
            input type="hidden" name="to" value=(to);
            label for="who" { "Your name" }
            input #who name="who" autocomplete="username" required maxlength="60" aria-describedby="why";
            p #why .hint { "The log records your actions under this name." }
            label for="token" { "Token" }
            input #token name="token" type="password" autocomplete="current-password" required;
            p .hint { "The value of the setting " code { "http.page_token" } "." }
            button type="submit" { "Sign in" }
        }
    })
}

/// Redirects the browser, with a cookie.
fn redirect(headers: &HeaderMap, to: &str, mut cookie: String) -> Response {
    // A proxy terminates TLS, so the cookie must never travel without it.
    if headers.get(header::ORIGIN).is_some_and(|origin| origin.as_bytes().starts_with(b"https://")) {
        cookie.push_str("; Secure");
    }
    (StatusCode::SEE_OTHER, [(header::LOCATION, to), (header::SET_COOKIE, &cookie)]).into_response()
}
