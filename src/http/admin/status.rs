//! The page with the state and the load of a destination.

use std::time::Duration;

use axum::Extension;
use axum::extract::{Query, State as Shared};
use jiff::SignedDuration;
use maud::{Markup, html};

use crate::http::admin::auth::Visitor;
use crate::http::admin::layout::{Frame, RefreshQuery, Tab, ago, counts, prose, refresh_notice, span};
use crate::http::admin::{AppState, Destination, HOME};
use crate::telemetry::metrics::{Load, Metrics};
use crate::telemetry::status::{Readiness, State};

/// The interval of automatic reloads.
const REFRESH: Duration = Duration::from_secs(5);

pub(crate) async fn show(
    Shared(state): Shared<AppState>,
    destination: Destination,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<RefreshQuery>,
) -> Markup {
    let refresh = query.refresh(REFRESH);
    let frame =
        Frame { title: "Live", visitor: Some(&visitor), of: Some((&destination, Tab::Live)), refresh };
    let metrics = &destination.handle.metrics;
    let backlog =
        match (counted(&destination), destination.handle.status.state(), destination.handle.runtime.amqp()) {
            (None, State::Paused(_), Some(amqp)) => {
                state.dead_letter_cache(&destination).backlog(amqp).await.ok().flatten().map(u64::from)
            }
            (counted, _, _) => counted,
        };
    frame.around(html! {
        (refresh_notice(refresh, &destination.path("")))
        (state_card(&destination.handle.status.readiness()))
        (load(metrics.load(), backlog, &destination))
        (budget(metrics))
        (so_far(metrics))
    })
}

/// The backlog, while a session measures it.
fn counted(destination: &Destination) -> Option<u64> {
    match destination.handle.status.state() {
        State::StandingBy | State::Consuming | State::Stopping => destination.handle.metrics.load().backlog,
        State::Connecting(_) | State::Paused(_) | State::Failed => None,
    }
}

fn or_unknown(number: Option<u64>) -> String {
    number.map_or_else(|| "unknown".to_owned(), |number| number.to_string())
}

/// The list of all destinations.
pub(crate) fn overview(destinations: &[Destination], visitor: &Visitor, query: &RefreshQuery) -> Markup {
    let refresh = query.refresh(REFRESH);
    let frame = Frame { title: "Destinations", visitor: Some(visitor), of: None, refresh };
    frame.around(html! {
        (refresh_notice(refresh, HOME))
        @if destinations.is_empty() { p { "No destination is running yet." } } @else {
            div .wide {
                table {
                    caption .hidden { "Close organizations this process syncs to" }
                    thead {
                        tr {
                            th scope="col" { "Destination" }
                            th scope="col" { "State" }
                            th .number scope="col" { "Backlog" }
                            th .number scope="col" { "Per second" }
                        }
                    }
                    tbody {
                        @for destination in destinations {
                            @let load = destination.handle.metrics.load();
                            tr {
                                th scope="row" { a href=(destination.path("")) { (destination.title()) } }
                                td { (badge(&destination.handle.status.readiness())) }
                                td .number { (or_unknown(counted(destination))) }
                                td .number { (format!("{:.1}", load.rate)) }
                            }
                        }
                    }
                }
            }
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
            @if let Some(remedy) = readiness.remedy { p { strong { "What to do: " } (prose(remedy)) } }
            @if let Some(alarm) = &readiness.alarm {
                p .notice.bad {
                    "RabbitMQ has an alarm: " (alarm) ". Events are still written to Close. Messages for a delay or \
                     dead-letter queue are held."
                }
            }
        }
    }
}

fn load(load: Load, backlog: Option<u64>, destination: &Destination) -> Markup {
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

fn budget(metrics: &Metrics) -> Markup {
    let standings = metrics.rate_limits();
    html! {
        section .card aria-labelledby="budget" {
            h2 #budget { "Close's rate limits" }
            @if standings.is_empty() { p { "Close has not reported them yet." } } @else {
                div .wide {
                    table {
                        caption .hidden { "Calls by endpoint group" }
                        thead {
                            tr {
                                th scope="col" { "Endpoint" }
                                th .number scope="col" { "Allowed" }
                                th .number scope="col" { "Remaining" }
                                th .number scope="col" { "Reset" }
                                th .number scope="col" { "Per second" }
                            }
                        }
                        tbody {
                            @for (endpoint, standing) in standings {
                                tr {
                                    th scope="row" { (endpoint.label()) }
                                    td .number { (standing.limit) }
                                    td .number {
                                        meter min="0" max=(standing.limit) low=(standing.limit / 5) value=(standing.remaining)
                                            aria-hidden="true" {}
                                        " " (standing.remaining)
                                    }
                                    td .number { (format!("{:.0} s", standing.reset.as_secs_f64())) }
                                    td .number { (format!("{:.1}", standing.rate)) }
                                }
                            }
                        }
                    }
                }
                p .hint { "Allowed and remaining: calls per window. Reset: time until the next window. Per second: the sustainable rate." }
            }
        }
    }
}

fn so_far(metrics: &Metrics) -> Markup {
    html! {
        section .card aria-labelledby="so-far" {
            h2 #so-far { "Since the start" }
            (counts("Messages by outcome", "No messages settled yet.", &metrics.settled_by_outcome()))
            @let deaths = metrics.dead_letters_by_reason();
            @if !deaths.is_empty() { (counts("Dead letters by reason", "", &deaths)) }
        }
    }
}
