//! How far a replay has come that was begun here, and how it ended.

use std::time::Duration;

use axum::Extension;
use axum::extract::Query;
use axum::response::Redirect;
use jiff::SignedDuration;
use maud::{Markup, html};

use super::Place;
use super::dead::{At, Meant};
use super::guard::Visitor;
use super::layout::{Frame, Wishes, ago, counts, follow, seal, span};
use super::workbench::Job;
use crate::amqp::dead_letters::replay::{End, Progress, Stage};

/// How often it is loaded again.
const REFRESH: Duration = Duration::from_secs(2);

pub(super) async fn show(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(wishes): Query<Wishes>,
) -> Markup {
    let Some(job) = at.bench.job() else {
        return at.frame("Replay", &visitor).around(html! {
            p { "Nothing was replayed from this page since close-sync started." }
        });
    };
    let runs = !job.is_over();
    let refresh = wishes.refresh(REFRESH).filter(|_| runs);
    let frame = Frame { refresh, ..at.frame("Replay", &visitor) };
    frame.around(html! {
        @if runs { (follow(refresh, &at.place.path("dead/progress"))) }
        section .card {
            p { "Of " code { (job.what) } ", begun by " (job.who) " " (ago(job.since)) "." }
            (bar(&job))
            @if runs { (going(&at, &visitor)) } @else { (over(&job, &at.place)) }
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
    let is_steady = matches!(progress.stage, Stage::Going | Stage::Finishing);
    let left = left.and_then(|left| SignedDuration::try_from(left).ok()).filter(|_| is_steady);
    html! {
        p role="status" { strong { (stage(&progress)) } }
        @if progress.matched > 0 {
            progress max=(progress.matched) value=(ended) aria-label="Replayed" {}
        }
        dl .tiles {
            div { dt { "Done" } dd { (ended) " of " (progress.matched) } }
            div { dt { "Under way" } dd { (progress.under_way) } }
            div { dt { "A second" } dd { (format!("{rate:.1}")) } }
            @if let Some(left) = left {
                div { dt { "Time left" } dd { (span(left)) } }
            }
        }
    }
}

fn stage(progress: &Progress) -> String {
    let ahead = progress.ahead.filter(|ahead| *ahead > 0);
    let ahead = ahead.map(|ahead| format!(", {ahead} messages before it")).unwrap_or_default();
    match &progress.stage {
        Stage::Looking => "Looking for them".to_owned(),
        Stage::Waiting => "Another operator is at the dead letters; it goes on afterwards".to_owned(),
        Stage::Canary => format!("The first is under way{ahead}; the others wait for it"),
        Stage::Going => "Replaying".to_owned(),
        Stage::Finishing => "All are sent; the last are under way".to_owned(),
        Stage::Reconnecting => "The connection to RabbitMQ was lost; connecting again".to_owned(),
        Stage::Over(_) => "Ended".to_owned(),
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
fn over(job: &Job, place: &Place) -> Markup {
    let progress = job.progress();
    let rest = progress.matched.saturating_sub(progress.sent);
    let (kind, told) = match (job.failure(), &progress.stage) {
        (Some(failure), _) => ("bad", failure),
        (None, Stage::Over(End::Done)) if progress.matched == 0 => ("so-so", "There was nothing to replay."),
        (None, Stage::Over(End::Done)) if progress.failed_again() == 0 => {
            ("good", "Done: none failed again.")
        }
        (None, Stage::Over(End::Done)) => ("so-so", "Done, and some failed again."),
        (None, Stage::Over(End::CanaryFailed)) => {
            ("bad", "The first one failed again, so nothing else was sent.")
        }
        (None, Stage::Over(End::FailedAlike)) => {
            ("bad", "Stopped, as what went wrong before goes wrong again.")
        }
        (None, Stage::Over(End::Silent)) => (
            "so-so",
            "No worker told what became of them: they were sent, and are worked on when their turn comes.",
        ),
        (None, Stage::Over(End::Stopped)) => ("so-so", "Stopped. Replay them again to go on."),
        (None, _) => ("bad", "It ended by a defect of close-sync, which the log tells of."),
    };
    html! {
        p .notice.(kind) role="status" { (told) }
        @if rest > 0 { p { (rest) " were not sent and are still dead letters." } }
        @if let Some(again) = &progress.again {
            p {
                "Failed again: " a href=(Meant::Id(again.id.to_string()).path(place, "dead/message")) { (again.fingerprint) }
                ", " (again.error)
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

pub(super) async fn stop(at: At, Extension(visitor): Extension<Visitor>) -> Redirect {
    if let Some(job) = at.bench.job() {
        visitor.audit("stop of a replay", at.place.name.as_deref(), Some(&job.what));
        job.stop();
    }
    Redirect::to(&at.place.path("dead/progress"))
}
