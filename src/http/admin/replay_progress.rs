//! How far a replay has come that was begun here, and how it ended.

use std::time::Duration;

use axum::Extension;
use axum::extract::Query;
use axum::response::Redirect;
use jiff::SignedDuration;
use maud::{Markup, html};

use crate::dead_letters::progress::{End, Progress, Stage};
use crate::http::admin::Place;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::Job;
use crate::http::admin::dead_letters::{At, Target};
use crate::http::admin::layout::{Frame, Wishes, ago, counts, follow, seal, sentence, span};
use crate::http::admin::redact::Sight;

/// How often it is loaded again.
const REFRESH: Duration = Duration::from_secs(2);

pub(crate) async fn show(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(wishes): Query<Wishes>,
) -> Markup {
    page(&at, &visitor, &wishes, Sight::Masked)
}

/// The same, with what Close said.
pub(crate) async fn reveal(at: At, Extension(visitor): Extension<Visitor>) -> Markup {
    visitor.audit(
        "what Close said",
        at.place.name.as_deref(),
        at.bench.job().map(|job| job.what.clone()).as_deref(),
    );
    page(&at, &visitor, &Wishes::default(), Sight::Personal)
}

fn page(at: &At, visitor: &Visitor, wishes: &Wishes, sight: Sight) -> Markup {
    let Some(job) = at.bench.job() else {
        return at.frame("Replay", visitor).around(html! {
            p {
                "Nothing was replayed from this page since close-sync started. A replay ends when close-sync stops; what was \
                 not sent by then is still among the " a href=(at.place.path("dead")) { "dead letters" } "."
            }
        });
    };
    let runs = !job.is_over();
    let refresh = wishes.refresh(REFRESH).filter(|_| runs);
    let frame = Frame { refresh, ..at.frame("Replay", visitor) };
    frame.around(html! {
        @if runs { (follow(refresh, &at.place.path("dead/progress"))) }
        section .card {
            p { "Of " code { (job.what) } ", begun by " (job.who) " " (ago(job.since)) "." }
            (bar(&job))
            @if runs { (going(at, visitor)) } @else { (over(&job, &at.place, visitor, sight)) }
        }
        (outcomes(&job.progress()))
    })
}

fn bar(job: &Job) -> Markup {
    let progress = job.progress();
    let ended = progress.ended();
    let rate = job.rate();
    let left = u32::try_from(progress.matched.saturating_sub(ended)).unwrap_or(u32::MAX);
    let left = Duration::try_from_secs_f64(f64::from(left) / rate).ok().filter(|_| ended > 0);
    // The first one alone says little about the others.
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
            progress max=(progress.matched) value=(ended) aria-label="Replayed" {}
        }
        dl .tiles {
            div { dt { "Done" } dd { (ended) " of " (progress.matched) } }
            @if !job.is_over() { div { dt { "Under way" } dd { (progress.in_flight) } } }
            div { dt { "A second" } dd { (format!("{rate:.1}")) } }
            @if let Some(left) = left {
                div { dt { "Time left" } dd { (span(left)) } }
            }
        }
    }
}

fn going(at: &At, visitor: &Visitor) -> Markup {
    html! {
        form method="post" action=(at.place.path("dead/stop")) {
            (seal(visitor))
            button .danger type="submit" { "Stop" }
            span .hint { " What was not sent stays where it is." }
        }
    }
}

/// How it ended, and what to do next.
fn over(job: &Job, place: &Place, visitor: &Visitor, sight: Sight) -> Markup {
    let progress = job.progress();
    let rest = progress.matched.saturating_sub(progress.sent);
    let end = if let Stage::Finished(end) = &progress.stage { Some(end) } else { None };
    let told = match (job.failure(), end) {
        (Some(failure), _) => failure.to_owned(),
        (None, Some(_)) => progress.describe(),
        (None, None) => "it ended by a defect of close-sync, which the log tells of".to_owned(),
    };
    let kind = match end {
        Some(End::Done) if progress.matched > 0 && progress.failed_again() == 0 => "good",
        Some(End::Done | End::TimedOut | End::Stopped) => "so-so",
        Some(End::CanaryFailed | End::SameFailure) | None => "bad",
    };
    html! {
        p .notice.(kind) role="status" { (sentence(&told)) }
        @if rest > 0 { p { (rest) " were not sent and are still dead letters." } }
        @let unknown = progress.in_flight + progress.missed;
        @if unknown > 0 && !(end == Some(&End::TimedOut) && progress.only_missed()) {
            p { "Of " (unknown) " it is not known yet what becomes of them; what fails is a new dead letter." }
        }
        @if progress.failures.len() > 1 {
            ul { @for (what, number) in &progress.failures { li { (number) " failed again: " code { (what) } } } }
        }
        @if let Some(again) = &progress.last_failure {
            p {
                "Failed again: " a href=(Target::Id(again.id.to_string()).path(place, "dead/message")) { (again.fingerprint) }
                ", " (again.error)
            }
            @match (&again.close_said, sight) {
                (None, _) => {}
                (Some(said), Sight::Personal) => { p { "Close said: " code { (said.reveal()) } } }
                (Some(_), Sight::Masked) => {
                    form method="post" action=(place.path("dead/progress")) {
                        (seal(visitor))
                        button .quiet type="submit" { "Show what Close said: personal data, perhaps" }
                    }
                }
            }
        }
        p { a .button.quiet href=(place.path("dead")) { "To the dead letters" } }
    }
}

fn outcomes(progress: &Progress) -> Markup {
    let all: Vec<(&str, u64)> =
        progress.outcomes.iter().map(|(what, number)| (what.as_str(), *number as u64)).collect();
    html! {
        @if !all.is_empty() { section .card { (counts("What became of them", "", &all)) } }
    }
}

pub(crate) async fn stop(at: At, Extension(visitor): Extension<Visitor>) -> Redirect {
    if let Some(job) = at.bench.job() {
        visitor.audit("stop of a replay", at.place.name.as_deref(), Some(&job.what));
        job.stop();
    }
    Redirect::to(&at.place.path("dead/progress"))
}
