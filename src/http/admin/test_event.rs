//! The page for a test event: a dry run with the worker's own client and rate limit. Nothing is written.

use axum::Extension;
use axum::extract::Form;
use axum::http::StatusCode;
use maud::{Markup, html};
use serde::Deserialize;

use crate::http::admin::auth::Visitor;
use crate::http::admin::destination::Destination;
use crate::http::admin::explanation;
use crate::http::admin::layout::{Frame, Tab, alert, csrf_token};
use crate::http::admin::redact::Visibility;
use crate::sync::ReceivedAt;

#[derive(Deserialize)]
pub(super) struct EventForm {
    event: String,
    /// Present: show values.
    #[serde(default)]
    personal: Option<String>,
}

pub(super) async fn form(destination: Destination, Extension(visitor): Extension<Visitor>) -> Markup {
    page(&destination, &visitor, "", Visibility::Redacted, html! {})
}

pub(super) async fn explain(
    destination: Destination,
    Extension(visitor): Extension<Visitor>,
    Form(form): Form<EventForm>,
) -> (StatusCode, Markup) {
    let visibility = Visibility::requested(form.personal.is_some());
    let action = match visibility {
        Visibility::Redacted => "test event",
        Visibility::Full => "test event with personal data",
    };
    visitor.audit(action, destination.name.as_deref(), None);
    let event = form.event.as_bytes().into();
    let (status, result) =
        match explanation::dry_run(&destination, event, ReceivedAt::now(), visibility).await {
            Ok(explanation) => (StatusCode::OK, explanation),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, alert(&error)),
        };
    let result = html! { section .card aria-label="Result" { h2 { "What would happen now" } (result) } };
    (status, page(&destination, &visitor, &form.event, visibility, result))
}

fn page(
    destination: &Destination,
    visitor: &Visitor,
    event: &str,
    visibility: Visibility,
    result: Markup,
) -> Markup {
    Frame::new("Test an event").visitor(visitor).location(destination, Tab::Test).around(html! {
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
