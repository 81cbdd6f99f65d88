//! The progress and the result of a replay that was started on the page.

use std::time::Duration;

use axum::Extension;
use axum::extract::Query;
use axum::response::Redirect;
use jiff::SignedDuration;
use maud::{Markup, html};

use crate::dead_letters::progress::{End, Progress, Stage};
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::Job;
use crate::http::admin::dead_letter_context::{DeadLetterContext, Target};
use crate::http::admin::destination::Destination;
use crate::http::admin::layout::{RefreshQuery, ago, counts, csrf_token, refresh_notice, sentence, span};
use crate::http::admin::redact::Visibility;

/// The interval of automatic reloads.
const REFRESH: Duration = Duration::from_secs(2);

pub(super) async fn show(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<RefreshQuery>,
) -> Markup {
    page(&context, &visitor, &query, Visibility::Redacted)
}

/// Shows the page with Close's answer.
pub(super) async fn reveal(context: DeadLetterContext, Extension(visitor): Extension<Visitor>) -> Markup {
    visitor.audit(
        "what Close said",
        context.destination.name.as_deref(),
        context.cache.job().map(|job| job.description.clone()).as_deref(),
    );
    page(&context, &visitor, &RefreshQuery::default(), Visibility::Full)
}

fn page(
    context: &DeadLetterContext,
    visitor: &Visitor,
    query: &RefreshQuery,
    visibility: Visibility,
) -> Markup {
    let Some(job) = context.cache.job() else {
        return context.frame("Replay", visitor).around(html! {
            p {
                "No replay was started on this page since close-sync started. A replay stops with close-sync; the messages it \
                 had not sent are still " a href=(context.destination.path("dead")) { "dead letters" } "."
            }
        });
    };
    let is_running = !job.is_over();
    let refresh = query.refresh(REFRESH).filter(|_| is_running);
    context.frame("Replay", visitor).refresh(refresh).around(html! {
        @if is_running { (refresh_notice(refresh, &context.destination.path("dead/progress"))) }
        section .card {
            p { "Replay of " code { (job.description) } ", started by " (job.who) " " (ago(job.since)) "." }
            (bar(&job))
            @if is_running { (stop_form(context, visitor)) } @else { (result(&job, &context.destination, visitor, visibility)) }
        }
        (outcomes(&job.progress()))
    })
}

fn bar(job: &Job) -> Markup {
    let progress = job.progress();
    let finished = progress.finished();
    let rate = job.rate();
    let remaining = u32::try_from(progress.matched.saturating_sub(finished)).unwrap_or(u32::MAX);
    let left = Duration::try_from_secs_f64(f64::from(remaining) / rate).ok().filter(|_| finished > 0);
    // The first message alone does not predict the others.
    let is_steady = matches!(progress.stage, Stage::Sending | Stage::Finishing);
    let left = left.and_then(|left| SignedDuration::try_from(left).ok()).filter(|_| is_steady);
    html! {
        @if !job.is_over() {
            p role="status" {
                strong { (sentence(&progress.describe())) }
                @if progress.stage == Stage::Canary { " The others wait for it." }
            }
        }
        @if progress.matched > 0 {
            progress max=(progress.matched) value=(finished) aria-label="Replayed" {}
        }
        dl .tiles {
            div { dt { "Done" } dd { (finished) " of " (progress.matched) } }
            @if !job.is_over() { div { dt { "In progress" } dd { (progress.in_flight) } } }
            div { dt { "Per second" } dd { (format!("{rate:.1}")) } }
            @if let Some(left) = left {
                div { dt { "Time remaining" } dd { (span(left)) } }
            }
        }
    }
}

fn stop_form(context: &DeadLetterContext, visitor: &Visitor) -> Markup {
    html! {
        form method="post" action=(context.destination.path("dead/stop")) {
            (csrf_token(visitor))
            button .danger type="submit" { "Stop" }
            span .hint { " Messages that were not sent stay dead letters." }
        }
    }
}

/// The result, and what to do next.
fn result(job: &Job, destination: &Destination, visitor: &Visitor, visibility: Visibility) -> Markup {
    let progress = job.progress();
    let rest = progress.matched.saturating_sub(progress.sent);
    let end = if let Stage::Finished(end) = &progress.stage { Some(end) } else { None };
    let summary = match (job.failure(), end) {
        (Some(failure), _) => failure.to_owned(),
        (None, Some(_)) => progress.describe(),
        (None, None) => "the replay failed because of a bug in close-sync; see the log".to_owned(),
    };
    let kind = match end {
        Some(End::Done) if progress.matched > 0 && progress.failed_again() == 0 => "good",
        Some(End::Done | End::TimedOut | End::Stopped) => "so-so",
        Some(End::CanaryFailed | End::SameFailure) | None => "bad",
    };
    html! {
        p .notice.(kind) role="status" { (sentence(&summary)) }
        @if rest > 0 { p { (rest) " messages were not sent and are still dead letters." } }
        @let unknown = progress.in_flight + progress.missed;
        @if unknown > 0 && !(end == Some(&End::TimedOut) && progress.only_missed()) {
            p { "The outcome of " (unknown) " messages is not known yet. A message that fails becomes a new dead letter." }
        }
        @if progress.failures.len() > 1 {
            ul { @for (what, number) in &progress.failures { li { (number) " failed again: " code { (what) } } } }
        }
        @if let Some(again) = &progress.last_failure {
            p {
                "Failed again: " a href=(Target::Id(again.id.to_string()).path(destination, "dead/message")) { (again.fingerprint) }
                ", " (again.error)
            }
            @match (&again.close_said, visibility) {
                (None, _) => {}
                (Some(said), Visibility::Full) => { p { "Close said: " code { (said.reveal()) } } }
                (Some(_), Visibility::Redacted) => {
                    form method="post" action=(destination.path("dead/progress")) {
                        (csrf_token(visitor))
                        button .quiet type="submit" { "Show Close's answer (may contain personal data)" }
                    }
                }
            }
        }
        p { a .button.quiet href=(destination.path("dead")) { "Back to the dead letters" } }
    }
}

fn outcomes(progress: &Progress) -> Markup {
    let all: Vec<(&str, u64)> =
        progress.outcomes.iter().map(|(what, number)| (what.as_str(), *number as u64)).collect();
    html! {
        @if !all.is_empty() { section .card { (counts("Messages by outcome", "", &all)) } }
    }
}

pub(super) async fn stop(context: DeadLetterContext, Extension(visitor): Extension<Visitor>) -> Redirect {
    if let Some(job) = context.cache.job() {
        visitor.audit("stop of a replay", context.destination.name.as_deref(), Some(&job.description));
        job.stop();
    }
    Redirect::to(&context.destination.path("dead/progress"))
}
