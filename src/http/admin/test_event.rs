//! The page for a test event: a dry run with the worker's own client and rate limit. Nothing is written.

use std::time::Duration;

use axum::Extension;
use axum::extract::Form;
use axum::http::StatusCode;
use maud::{Markup, html};
use serde::Deserialize;

use crate::http::admin::auth::Visitor;
use crate::http::admin::layout::{Frame, Tab, csrf_token};
use crate::http::admin::redact::Visibility;
use crate::http::admin::{Destination, explanation};
use crate::sync::{ReceivedAt, Worker, explain};

/// The time-out of a dry run, which may wait for Close's rate limit.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
pub(crate) struct EventForm {
    event: String,
    /// Present: show values.
    #[serde(default)]
    personal: Option<String>,
}

pub(crate) async fn form(destination: Destination, Extension(visitor): Extension<Visitor>) -> Markup {
    page(&destination, &visitor, "", Visibility::Redacted, html! {})
}

pub(crate) async fn rehearse(
    destination: Destination,
    Extension(visitor): Extension<Visitor>,
    Form(form): Form<EventForm>,
) -> (StatusCode, Markup) {
    let visibility = Visibility::requested(form.personal.is_some());
    let what = match visibility {
        Visibility::Redacted => "test event",
        Visibility::Full => "test event with personal data",
    };
    visitor.audit(what, destination.name.as_deref(), None);
    let (status, result) =
        match explain_event(&destination, form.event.as_bytes(), ReceivedAt::now(), visibility).await {
            Ok(told) => (StatusCode::OK, told),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, html! { p .notice.bad role="alert" { (why) } }),
        };
    let result = html! { section .card aria-label="Result" { h2 { "What would happen now" } (result) } };
    (status, page(&destination, &visitor, &form.event, visibility, result))
}

/// Explains what an event would do now.
///
/// # Errors
/// The reason, for the operator.
pub(crate) async fn explain_event(
    destination: &Destination,
    event: &[u8],
    arrival: ReceivedAt,
    visibility: Visibility,
) -> Result<Markup, String> {
    let worker: Worker = destination
        .handle
        .runtime
        .worker()
        .ok_or("The worker has not passed the preflight check of Close yet. The live page shows why.")?;
    let rehearsal = explain::dry_run(&worker, event, arrival);
    let (_, report) = tokio::time::timeout(TIMEOUT, rehearsal)
        .await
        .map_err(|_| {
            format!(
                "The dry run timed out after {} s, waiting for Close's rate limit. Try again later.",
                TIMEOUT.as_secs()
            )
        })?
        .map_err(|why| format!("The event {why}."))?;
    Ok(explanation::report(&report, visibility))
}

fn page(
    destination: &Destination,
    visitor: &Visitor,
    event: &str,
    visibility: Visibility,
    result: Markup,
) -> Markup {
    let frame = Frame {
        title: "Test an event",
        visitor: Some(visitor),
        of: Some((destination, Tab::Test)),
        refresh: None,
    };
    frame.around(html! {
        (result)
        form .card method="post" {
            (csrf_token(visitor))
            label for="event" { "An identify event, as JSON" }
            // The first line break after the tag is not part of the text.
            textarea #event name="event" rows="14" required spellcheck="false" aria-describedby="nothing" {
                "\n" (event)
            }
            p .check {
                input #personal name="personal" type="checkbox" value="yes" checked[visibility == Visibility::Full];
                label for="personal" { "Show values (personal data; the log records this)" }
            }
            p #nothing .hint { "This reads from Close, within the worker's rate limit. It writes nothing." }
            button type="submit" { "Show what would happen" }
        }
    })
}
