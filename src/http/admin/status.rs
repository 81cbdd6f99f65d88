//! The page with the state and the load of a destination.

use std::time::Duration;

use axum::Extension;
use axum::extract::{self, Query};
use jiff::SignedDuration;
use maud::{Markup, html};

use crate::domain::journal::ChangeKind;
use crate::http::admin::app_state::AppState;
use crate::http::admin::auth::Visitor;
use crate::http::admin::destination::{Destination, HOME};
use crate::http::admin::layout::{
    Column, Frame, RefreshQuery, Tab, ago, counts, refresh_notice, remedy, span, table,
};
use crate::telemetry::metrics::{Load, Metrics};
use crate::telemetry::status::{Readiness, State};

/// The interval of automatic reloads.
const REFRESH: Duration = Duration::from_secs(5);

pub(super) async fn show(
    extract::State(state): extract::State<AppState>,
    destination: Destination,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<RefreshQuery>,
) -> Markup {
    let refresh = query.refresh(REFRESH);
    let metrics = &destination.handle.metrics;
    let backlog = match (
        measured_backlog(&destination),
        destination.handle.status.state(),
        destination.handle.runtime.amqp(),
    ) {
        (None, State::Paused(_), Some(amqp)) => {
            state.dead_letter_cache(&destination).backlog(amqp).await.ok().flatten().map(u64::from)
        }
        (measured, _, _) => measured,
    };
    let frame = Frame::new("Live").visitor(&visitor).location(&destination, Tab::Live).refresh(refresh);
    frame.around(html! {
        (refresh_notice(refresh, &destination.path("")))
        (state_card(&destination.handle.status.readiness()))
        (work_card(metrics.load(), backlog, &destination))
        (rate_limits(metrics))
        (totals(metrics))
    })
}

/// The backlog, while a session measures it.
fn measured_backlog(destination: &Destination) -> Option<u64> {
    match destination.handle.status.state() {
        State::StandingBy | State::Consuming | State::Stopping => destination.handle.metrics.load().backlog,
        State::Connecting(_) | State::Paused(_) | State::Failed => None,
    }
}

fn or_unknown(number: Option<u64>) -> String {
    number.map_or_else(|| "unknown".to_owned(), |number| number.to_string())
}

/// The list of all destinations.
pub(super) fn overview(destinations: &[Destination], visitor: &Visitor, query: &RefreshQuery) -> Markup {
    let refresh = query.refresh(REFRESH);
    let columns = [
        Column::Text("Destination"),
        Column::Text("State"),
        Column::Number("Backlog"),
        Column::Number("Per second"),
    ];
    let rows = html! {
        @for destination in destinations {
            @let load = destination.handle.metrics.load();
            tr {
                th scope="row" { a href=(destination.path("")) { (destination.title()) } }
                td { (badge(&destination.handle.status.readiness())) }
                td .number { (or_unknown(measured_backlog(destination))) }
                td .number { (format!("{:.1}", load.rate)) }
            }
        }
    };
    Frame::new("Destinations").visitor(visitor).refresh(refresh).around(html! {
        (refresh_notice(refresh, HOME))
        @if destinations.is_empty() { p { "No destination is running yet." } } @else {
            (table("Close organizations this process syncs to", &columns, rows))
        }
    })
}

fn badge(readiness: &Readiness) -> Markup {
    let kind = if readiness.ready { "good" } else { "bad" };
    html! {
        span .badge.(kind) { (readiness.state.replace('_', " ")) }
        @if let Some(cause) = readiness.cause { " " code { (cause) } }
    }
}

fn state_card(readiness: &Readiness) -> Markup {
    html! {
        section .card aria-labelledby="state" {
            h2 #state { "State" }
            p { (badge(readiness)) " " span .quiet { "since " (ago(readiness.since)) } }
            @if readiness.state == "standing_by" {
                p .hint { "Connected, no message received yet. Either the queue is empty, or another worker is active." }
            }
            @if let Some(detail) = &readiness.detail { p { (detail) } }
            @if let Some(text) = readiness.remedy { (remedy(text)) }
            @if readiness.journal.is_some_and(|journal| journal != "in_use") {
                p .hint {
                    "Works without a journal: after each start, creations wait for search, and a slow search makes duplicates."
                }
            }
            @for (kind, seconds) in &readiness.search_lag_seconds {
                p .quiet { "Close's search " (lag(kind, *seconds)) }
            }
            @if let Some(alarm) = &readiness.alarm {
                p .notice.bad {
                    "RabbitMQ has an alarm: " (alarm) ". Changes are still written to Close. Creations wait, and \
                     messages for a delay or dead-letter queue are held."
                }
            }
        }
    }
}

fn lag(kind: &str, seconds: f64) -> String {
    let lag = span(SignedDuration::try_from_secs_f64(seconds).unwrap_or_default());
    let what = if kind == ChangeKind::Creation.label() { "new records" } else { "new ids and emails" };
    format!("shows {what} after {lag} or more.")
}

fn work_card(load: Load, backlog: Option<u64>, destination: &Destination) -> Markup {
    let drain = load.drain.and_then(|drain| SignedDuration::try_from(drain).ok()).map(span);
    let items = [
        ("Backlog", or_unknown(backlog)),
        ("Time to drain", drain.unwrap_or_else(|| "unknown".into())),
        ("Settled per second", format!("{:.1}", load.rate)),
        ("In flight", load.in_flight.to_string()),
        ("Waiting", load.waiting.to_string()),
        ("Held for RabbitMQ", load.held.to_string()),
        ("In delay queues", or_unknown(load.delayed)),
    ];
    html! {
        section .card aria-labelledby="load" {
            h2 #load { "Work" }
            dl .tiles {
                @for (name, number) in items { div { dt { (name) } dd { (number) } } }
                div { dt { "Dead letters" } dd { a href=(destination.path("dead")) { (or_unknown(load.dead)) } } }
            }
        }
    }
}

fn rate_limits(metrics: &Metrics) -> Markup {
    let columns = [
        Column::Text("Endpoint"),
        Column::Number("Allowed"),
        Column::Number("Remaining"),
        Column::Number("Reset"),
        Column::Number("Per second"),
    ];
    let limits = metrics.rate_limits();
    let rows = html! {
        @for (endpoint, limit) in &limits {
            tr {
                th scope="row" { (endpoint.label()) }
                td .number { (limit.limit) }
                td .number {
                    meter min="0" max=(limit.limit) low=(limit.limit / 5) value=(limit.remaining) aria-hidden="true" {}
                    " " (limit.remaining)
                }
                td .number { (format!("{:.0} s", limit.reset.as_secs_f64())) }
                td .number { (format!("{:.1}", limit.rate)) }
            }
        }
    };
    html! {
        section .card aria-labelledby="budget" {
            h2 #budget { "Close's rate limits" }
            @if limits.is_empty() { p { "Close has not reported them yet." } } @else {
                (table("Calls by endpoint group", &columns, rows))
                p .hint { "Allowed and remaining: calls per window. Reset: time until the next window. Per second: the sustainable rate." }
            }
        }
    }
}

fn totals(metrics: &Metrics) -> Markup {
    html! {
        section .card aria-labelledby="so-far" {
            h2 #so-far { "Since the start" }
            (counts("Messages by outcome", "No messages settled yet.", &metrics.settled_by_outcome()))
            @let delays = metrics.delays_by_cause();
            @if !delays.is_empty() { (counts("Messages sent to delay queues by cause", "", &delays)) }
            @let dead_letters = metrics.dead_letters_by_reason();
            @if !dead_letters.is_empty() { (counts("Dead letters by reason", "", &dead_letters)) }
        }
    }
}
