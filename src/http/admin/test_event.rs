//! A test event: what it would do, found out with the worker's own eyes and within its budget. Nothing is written.

use std::time::Duration;

use axum::Extension;
use axum::extract::Form;
use axum::http::StatusCode;
use maud::{Markup, html};
use serde::Deserialize;

use crate::http::admin::auth::Visitor;
use crate::http::admin::layout::{Frame, Tab, seal};
use crate::http::admin::redact::Sight;
use crate::http::admin::{Place, explanation};
use crate::sync::{ReceivedAt, Worker, explain};

/// The longest it may take to find out; Close's budget may be short.
const PATIENCE: Duration = Duration::from_secs(30);

/// An event that is to be tried.
#[derive(Deserialize)]
pub(crate) struct Trial {
    event: String,
    /// Whether its values are to be seen.
    #[serde(default)]
    personal: Option<String>,
}

pub(crate) async fn form(place: Place, Extension(visitor): Extension<Visitor>) -> Markup {
    page(&place, &visitor, "", Sight::Masked, html! {})
}

pub(crate) async fn rehearse(
    place: Place,
    Extension(visitor): Extension<Visitor>,
    Form(trial): Form<Trial>,
) -> (StatusCode, Markup) {
    let sight = Sight::asked(trial.personal.is_some());
    let what = match sight {
        Sight::Masked => "test event",
        Sight::Personal => "test event with personal data",
    };
    visitor.audit(what, place.name.as_deref(), None);
    let (status, result) = match outlook(&place, trial.event.as_bytes(), ReceivedAt::now(), sight).await {
        Ok(told) => (StatusCode::OK, told),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, html! { p .notice.bad role="alert" { (why) } }),
    };
    let result = html! { section .card aria-label="Result" { h2 { "What would happen now" } (result) } };
    (status, page(&place, &visitor, &trial.event, sight, result))
}

/// What an event that came like this would do now.
///
/// # Errors
/// Why that cannot be told, for people.
pub(crate) async fn outlook(
    place: &Place,
    event: &[u8],
    arrival: ReceivedAt,
    sight: Sight,
) -> Result<Markup, String> {
    let worker: Worker = place.seat.runtime.worker().ok_or(
        "The worker has not been able to look at Close yet: its live page tells why. Nothing can be said before that.",
    )?;
    let rehearsal = explain::dry_run(&worker, event, arrival);
    let (_, report) = tokio::time::timeout(PATIENCE, rehearsal)
        .await
        .map_err(|_| {
            format!(
                "It was not found out within {} s: Close's rate limits are short. Try again later.",
                PATIENCE.as_secs()
            )
        })?
        .map_err(|why| format!("The event {why}."))?;
    Ok(explanation::report(&report, sight))
}

fn page(place: &Place, visitor: &Visitor, event: &str, sight: Sight, result: Markup) -> Markup {
    let frame =
        Frame { title: "Test an event", visitor: Some(visitor), of: Some((place, Tab::Test)), refresh: None };
    frame.around(html! {
        (result)
        form .card method="post" {
            (seal(visitor))
            label for="event" { "An identify event, as JSON" }
            // The first line break after the tag is not part of the text.
            textarea #event name="event" rows="14" required spellcheck="false" aria-describedby="nothing" {
                "\n" (event)
            }
            p .check {
                input #personal name="personal" type="checkbox" value="yes" checked[sight == Sight::Personal];
                label for="personal" { "Show values: personal data, noted in the log" }
            }
            p #nothing .hint { "Close is asked, with the worker's own budget; nothing is written." }
            button type="submit" { "Show what would happen" }
        }
    })
}
