//! Checks every request to the operator's page: host and origin, sign-in, and the CSRF token of forms.

use axum::body::{Body, HttpBody, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::admin::app_state::AppState;
use crate::http::admin::auth::{CSRF_FIELD, Unauthenticated, is_read};
use crate::http::admin::destination::HOME;
use crate::http::admin::layout::ErrorPage;
use crate::http::admin::sign_in::{self, throttled};

/// The size limit for a form without an event.
const FORM_BYTES: usize = 64 * 1024;

/// Runs before every page.
pub(super) async fn require_operator(
    State(state): State<AppState>,
    ConnectInfo(peer): ConnectInfo<std::net::SocketAddr>,
    mut request: Request,
    next: Next,
) -> Response {
    let authenticator = state.authenticator();
    if let Err((status, error)) = authenticator.check_origin(&request) {
        return ErrorPage::new(status, error).into_response();
    }
    let is_public = matches!(request.uri().path(), "/page/style.css" | "/page/sign-in");
    let visitor = match authenticator.authenticate(request.headers(), peer.ip()) {
        Ok(visitor) => visitor,
        Err(Unauthenticated::Throttled(wait)) => return throttled(wait),
        Err(Unauthenticated::SignIn) if is_public => authenticator.anonymous(peer.ip()),
        Err(Unauthenticated::SignIn) => {
            let requested = if is_read(request.method()) { request.uri().path() } else { HOME };
            let form = sign_in::form(&authenticator.anonymous(peer.ip()), requested, None);
            let challenge = [(axum::http::header::WWW_AUTHENTICATE, "Bearer")];
            return (StatusCode::UNAUTHORIZED, challenge, form).into_response();
        }
    };
    if !is_read(request.method()) {
        let (parts, body) = request.into_parts();
        let limit = if parts.uri.path().ends_with("/test") { max_event_form(&state) } else { FORM_BYTES };
        // Reject a declared size above the limit without reading the body.
        let fits = usize::try_from(body.size_hint().lower()).is_ok_and(|size| size <= limit);
        let form = if fits { to_bytes(body, limit).await.ok() } else { None };
        let Some(form) = form else {
            return ErrorPage::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "The form is larger than the size limit for messages.",
            )
            .into_response();
        };
        let csrf_token = url::form_urlencoded::parse(&form).find(|(name, _)| name == CSRF_FIELD);
        if !visitor.may_post(csrf_token.as_ref().map(|(_, token)| &**token)) {
            return ErrorPage::new(
                StatusCode::FORBIDDEN,
                "This form has expired, or another site sent it. Go back, reload the page and submit the form again.",
            ).into_response();
        }
        request = Request::from_parts(parts, Body::from(form));
    }
    request.extensions_mut().insert(visitor);
    next.run(request).await
}

/// The size limit for a form with an event, in bytes. URL encoding can triple the size of an event.
fn max_event_form(state: &AppState) -> usize {
    let workers =
        state.destinations().into_iter().filter_map(|destination| destination.handle.runtime.worker());
    let event = workers.map(|worker| worker.settings().max_message_bytes).max().unwrap_or_default();
    event.saturating_mul(3).saturating_add(FORM_BYTES)
}
