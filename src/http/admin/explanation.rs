//! Dry runs of events, rendered like `close-sync plan` prints them.

use std::time::Duration;

use maud::{Markup, html};

use crate::domain::encoding::Payload;
use crate::http::admin::destination::Destination;
use crate::http::admin::layout::{Column, table};
use crate::http::admin::redact::Visibility;
use crate::sync::ReceivedAt;
use crate::sync::explain::{self, DEAD, Explanation, LeftOut, Record, WAITS_FOR_SEARCH};

/// The time-out of a dry run, which may wait for Close's rate limit.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The largest explanation that is shown, in bytes of HTML.
const MAX_BYTES: usize = 384 << 10;

/// Explains what an event would do now, with values only if visible.
///
/// # Errors
/// The reason, for the operator.
pub(super) async fn dry_run(
    destination: &Destination,
    event: Payload<'_>,
    received_at: ReceivedAt,
    visibility: Visibility,
) -> Result<Markup, String> {
    let worker = destination
        .handle
        .runtime
        .worker()
        .ok_or("The worker has not passed the preflight check of Close yet. The live page shows why.")?;
    let rehearsal = worker.rehearsal();
    let dry_run = explain::dry_run(&rehearsal, event, received_at);
    let (_, explanation) = tokio::time::timeout(TIMEOUT, dry_run)
        .await
        .map_err(|_| {
            format!(
                "The dry run timed out after {} s, waiting for Close's rate limit. Try again later.",
                TIMEOUT.as_secs()
            )
        })?
        .map_err(|error| format!("The event {error}."))?;
    let rendered = render(&explanation, visibility);
    Ok(if rendered.0.len() <= MAX_BYTES {
        rendered
    } else {
        html! { p { "Too large to show. Use " code { "close-sync plan" } "." } }
    })
}

fn render(explanation: &Explanation, visibility: Visibility) -> Markup {
    let kind = match explanation.outcome {
        DEAD => "bad",
        "skipped" | "unchanged" => "so-so",
        _ => "good",
    };
    html! {
        p {
            span .badge.(kind) { (explanation.outcome) }
            @if let Some(reason) = explanation.reason { " " code { (reason) } }
        }
        @if let Some(error) = &explanation.error { p { (error) } }
        @for record in &explanation.records { (render_record(record, visibility)) }
        @if !explanation.left_out.is_empty() {
            h3 { "Left out" }
            ul { @for left_out in &explanation.left_out { li { (render_left_out(left_out, visibility)) } } }
        }
        dl .facts {
            @if let Some(rule) = explanation.rule_in_words { dt { "Rule" } dd { (rule) } }
            @if explanation.waits_for.is_some() { dt { "Waits" } dd { (WAITS_FOR_SEARCH) } }
            @if !explanation.look_ups.is_empty() {
                dt { "Looked up" }
                dd { (explanation.look_ups.join("; ")) }
            }
            @for candidate in &explanation.candidates {
                dt { "Candidate" }
                dd { code { (candidate.id) } " " (candidate.in_words) }
            }
            dt { "Calls to Close" }
            dd { (explanation.calls) "; nothing was written" }
        }
    }
}

fn render_record(record: &Record, visibility: Visibility) -> Markup {
    let columns = [Column::Text("Field"), Column::Text("Result")];
    let rows = html! {
        @for field in &record.fields {
            tr {
                th scope="row" { (field.label) }
                td {
                    @match visibility {
                        Visibility::Redacted => { code { (field.verdict) } }
                        Visibility::Full => { (field.change) }
                    }
                }
            }
        }
    };
    html! {
        section .record {
            h3 {
                (record.action)
                @if let Some(name) = &record.name { " " q { (visibility.of(name)) } }
                @if let Some(id) = &record.id { " " code { (id) } }
            }
            @if let Some(switch) = record.forbidden { p { "Not written: the switch " code { (switch) } " is off." } }
            @if !record.fields.is_empty() { (table("Fields of the record", &columns, rows)) }
        }
    }
}

fn render_left_out(left_out: &LeftOut, visibility: Visibility) -> Markup {
    html! {
        @match visibility {
            Visibility::Redacted => { (left_out.field) ": " code { (left_out.reason) } }
            Visibility::Full => { (left_out.in_words) }
        }
    }
}
