//! The HTTP side of the API: parses a request into a `Call`, applies faults, and writes the `Answer`.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::Response,
    routing::any,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;

use crate::call::{Answer, Call};
use crate::connection::ConnectionCutter;
use crate::control;
use crate::faults::{Effect, When};
use crate::shared::Shared;
use crate::world::{Admission, Decision};

const BASE: &str = "/api/v1";
/// For queries that are too long for a URL (close-api.md §1).
const METHOD_OVERRIDE: HeaderName = HeaderName::from_static("x-http-method-override");

/// Routes `/_sim/` to the controls and everything else to the API.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    control::router().fallback(any(api)).with_state(shared)
}

async fn api(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(cutter): ConnectInfo<ConnectionCutter>,
    request: Request,
) -> Response {
    let max_body_bytes = shared.world().max_body_bytes;
    let call = Arc::new(read(request, max_body_bytes).await);
    let Admission { number, headers, decision } = shared.world().admit(&call, Timestamp::now());
    let answer = match decision {
        Decision::Rejected(answer) => Some(answer),
        Decision::Accepted(effect) => serve(&shared, &call, effect).await,
    };
    if let Some(answer) = answer {
        shared.world().requests.answered(number, answer.status);
        write(answer.with(headers))
    } else {
        // The connection is cut first, so this response is never sent.
        cutter.cut();
        Response::new(Body::empty())
    }
}

/// Executes a call with the effect of a fault. Returns `None` if the connection must be cut.
async fn serve(shared: &Arc<Shared>, call: &Arc<Call>, effect: Option<Effect>) -> Option<Answer> {
    let serve = || shared.world().serve(call, Timestamp::now());
    let take_effect = |when: When| match when {
        When::BeforeCommit => {}
        When::AfterCommit => drop(serve()),
    };
    match effect {
        // `admit` has already answered hidden limits and made edits.
        None | Some(Effect::RateLimited { .. } | Effect::Edit { .. }) => Some(serve()),
        Some(Effect::Latency { ms }) => {
            // A separate task: this one is dropped when the client hangs up.
            let (shared, call) = (Arc::clone(shared), Arc::clone(call));
            let late = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                shared.world().serve(&call, Timestamp::now())
            });
            late.await.ok()
        }
        Some(Effect::Status { code, body, when }) => {
            take_effect(when);
            Some(shared.world().scripted(code, body))
        }
        Some(Effect::DropConnection { when }) => {
            take_effect(when);
            None
        }
        Some(Effect::Timeout { ms, when }) => {
            take_effect(when);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            None
        }
    }
}

async fn read(request: Request, max_body_bytes: usize) -> Call {
    let (parts, body) = request.into_parts();
    let header = |name: &HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let path = parts.uri.path();
    let call = Call {
        method: parts.method.as_str().to_owned(),
        // A path outside the API stays whole, so it gets a 404.
        path: path.strip_prefix(BASE).unwrap_or(path).to_owned(),
        query: Call::parameters(parts.uri.query().unwrap_or_default()),
        key: header(&header::AUTHORIZATION).and_then(basic_user).unwrap_or_default(),
        is_json: header(&header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json")),
        is_chunked: parts.headers.contains_key(header::TRANSFER_ENCODING),
        body: to_bytes(body, max_body_bytes)
            .await
            .ok()
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    };
    match header(&METHOD_OVERRIDE) {
        Some(method) if method.eq_ignore_ascii_case("GET") => call.overridden(),
        Some(_) | None => call,
    }
}

fn write(answer: Answer) -> Response {
    let (kind, body) = answer.payload.encode();
    let mut response = Response::new(Body::from(body));
    let status = StatusCode::from_u16(answer.status).ok().filter(|status| !status.is_informational());
    *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    for (name, value) in answer.headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    response
}

/// The user name of an `Authorization: Basic` header whose password is empty (close-api.md §1).
fn basic_user(header: &str) -> Option<String> {
    let (scheme, credentials) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = BASE64_STANDARD.decode(credentials.trim()).ok()?;
    String::from_utf8(decoded).ok()?.strip_suffix(':').map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_the_user_name_of_basic_with_no_password() {
        for (header, key) in [
            ("Basic YXBpX3NpbXVsYXRvci5rZXk6", Some("api_simulator.key")),
            ("basic YTo=", Some("a")),
            ("Basic YTpi", None), // a password
            ("Basic YQ==", None), // no colon
            ("Basic !!!!", None),
            ("Bearer YTo=", None),
            ("YTo=", None),
        ] {
            assert_eq!(basic_user(header).as_deref(), key, "{header}");
        }
    }
}
