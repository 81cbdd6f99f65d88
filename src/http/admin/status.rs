//! What a destination is doing right now.

use std::time::Duration;

use axum::Extension;
use axum::extract::{Query, State as Shared};
use jiff::SignedDuration;
use maud::{Markup, html};

use crate::http::admin::auth::Visitor;
use crate::http::admin::layout::{Frame, Tab, Wishes, ago, counts, follow, prose, span};
use crate::http::admin::{AppState, HOME, Place};
use crate::telemetry::metrics::{Load, Metrics};
use crate::telemetry::status::{Readiness, State};

/// How often a page that shows something live is loaded again.
const REFRESH: Duration = Duration::from_secs(5);

pub(crate) async fn show(
    Shared(office): Shared<AppState>,
    place: Place,
    Extension(visitor): Extension<Visitor>,
    Query(wishes): Query<Wishes>,
) -> Markup {
    let refresh = wishes.refresh(REFRESH);
    let frame = Frame { title: "Live", visitor: Some(&visitor), of: Some((&place, Tab::Live)), refresh };
    let metrics = &place.seat.metrics;
    let backlog = match (counted(&place), place.seat.status.state(), place.seat.runtime.amqp()) {
        (None, State::Paused(_), Some(amqp)) => {
            office.workbench(&place).backlog(amqp).await.ok().flatten().map(u64::from)
        }
        (counted, _, _) => counted,
    };
    frame.around(html! {
        (follow(refresh, &place.path("")))
        (state(&place.seat.status.readiness()))
        (load(metrics.load(), backlog, &place))
        (budget(metrics))
        (so_far(metrics))
    })
}

/// The backlog, while there is a session that counts it.
fn counted(place: &Place) -> Option<u64> {
    match place.seat.status.state() {
        State::StandingBy | State::Consuming | State::Stopping => place.seat.metrics.load().backlog,
        State::Connecting(_) | State::Paused(_) | State::Failed => None,
    }
}

fn or_unknown(number: Option<u64>) -> String {
    number.map_or_else(|| "unknown".to_owned(), |number| number.to_string())
}

/// All destinations at a glance.
pub(crate) fn overview(places: &[Place], visitor: &Visitor, wishes: &Wishes) -> Markup {
    let refresh = wishes.refresh(REFRESH);
    let frame = Frame { title: "Destinations", visitor: Some(visitor), of: None, refresh };
    frame.around(html! {
        (follow(refresh, HOME))
        @if places.is_empty() { p { "There is no destination yet." } } @else {
            div .wide {
                table {
                    caption .hidden { "Close organizations this process keeps in step" }
                    thead {
                        tr {
                            th scope="col" { "Destination" }
                            th scope="col" { "State" }
                            th .number scope="col" { "Backlog" }
                            th .number scope="col" { "A second" }
                        }
                    }
                    tbody {
                        @for place in places {
                            @let load = place.seat.metrics.load();
                            tr {
                                th scope="row" { a href=(place.path("")) { (place.title()) } }
                                td { (badge(&place.seat.status.readiness())) }
                                td .number { (or_unknown(counted(place))) }
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

fn state(readiness: &Readiness) -> Markup {
    html! {
        section .card aria-labelledby="state" {
            h2 #state { "State" }
            p { (badge(readiness)) " " span .quiet { "since " (ago(readiness.since)) } }
            @if readiness.state == "standing_by" {
                p .hint { "Connected, and no message came yet: either there is none, or another worker is the active one." }
            }
            @if let Some(detail) = &readiness.detail { p { (detail) } }
            @if let Some(remedy) = readiness.remedy { p { strong { "What to do: " } (prose(remedy)) } }
            @if let Some(alarm) = &readiness.alarm {
                p .notice.bad {
                    "RabbitMQ has an alarm: " (alarm) ". Events are written to Close; what would go to a delay or \
                     dead-letter queue is held."
                }
            }
        }
    }
}

fn load(load: Load, backlog: Option<u64>, place: &Place) -> Markup {
    let drain = load.drain.and_then(|drain| SignedDuration::try_from(drain).ok()).map(span);
    let items = [
        ("Backlog", or_unknown(backlog)),
        ("Time to drain", drain.unwrap_or_else(|| "unknown".into())),
        ("Settled a second", format!("{:.1}", load.rate)),
        ("In flight", load.in_flight.to_string()),
        ("Waiting their turn", load.waiting.to_string()),
        ("Held for RabbitMQ", load.held.to_string()),
        ("In delay queues", or_unknown(load.delayed)),
    ];
    html! {
        section .card aria-labelledby="load" {
            h2 #load { "Work" }
            dl .tiles {
                @for (name, number) in items { div { dt { (name) } dd { (number) } } }
                div { dt { "Dead letters" } dd { a href=(place.path("dead")) { (or_unknown(load.dead)) } } }
            }
        }
    }
}

fn budget(metrics: &Metrics) -> Markup {
    let standings = metrics.rate_limits();
    html! {
        section .card aria-labelledby="budget" {
            h2 #budget { "Close's rate limits" }
            @if standings.is_empty() { p { "Close has not told them yet." } } @else {
                div .wide {
                    table {
                        caption .hidden { "Calls by endpoint group" }
                        thead {
                            tr {
                                th scope="col" { "Endpoint" }
                                th .number scope="col" { "Allowed" }
                                th .number scope="col" { "Left" }
                                th .number scope="col" { "Reset" }
                                th .number scope="col" { "A second" }
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
                p .hint { "Allowed and left: calls in a window. Reset: until it is renewed. A second: what may be made for long." }
            }
        }
    }
}

fn so_far(metrics: &Metrics) -> Markup {
    html! {
        section .card aria-labelledby="so-far" {
            h2 #so-far { "Since the start" }
            (counts("Messages by outcome", "Nothing was settled yet.", &metrics.settled_by_outcome()))
            @let deaths = metrics.dead_letters_by_reason();
            @if !deaths.is_empty() { (counts("Dead letters by reason", "", &deaths)) }
        }
    }
}
