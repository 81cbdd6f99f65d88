//! The pages that list dead letters.

use std::sync::Arc;

use axum::Extension;
use axum::extract::Query;
use maud::{Markup, html};
use serde::Deserialize;

use crate::dead_letters::group::Group;
use crate::dead_letters::letter::DeadLetter;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::KEPT_PER_GROUP;
use crate::http::admin::dead_letter_context::{DeadLetterContext, Target, not_found, unavailable};
use crate::http::admin::destination::Destination;
use crate::http::admin::layout::{Column, ErrorPage, ago, alert, remedy, table};
use crate::http::admin::redact::short;
use crate::text::count;

/// The number of dead letters on a page.
const PAGE: usize = 50;

/// The result of an action, after a redirect.
#[derive(Deserialize)]
pub(super) struct ListQuery {
    discarded: Option<u32>,
}

pub(super) async fn list(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<ListQuery>,
) -> Markup {
    let listing = context.cache.listing(Arc::clone(&context.amqp)).await;
    let running = context.cache.job().filter(|job| !job.is_over());
    context.frame("Dead letters", &visitor).around(html! {
        @if let Some(discarded) = query.discarded {
            p .notice.good role="status" { (count(discarded, "dead letter was", "dead letters were")) " discarded." }
        }
        @if let Some(job) = running {
            p .notice.so-so {
                "A replay of " (job.description) " is running. " a href=(context.destination.path("dead/progress")) { "Show progress" }
            }
        }
        @match &listing {
            Err(error) => { (alert(error)) }
            Ok(listing) => {
                @if listing.replaying {
                    p .quiet { "A replay is running. The messages it holds are not listed." }
                }
                @if listing.groups.is_empty() {
                    p .notice.good { "There are no dead letters." }
                } @else {
                    form .row method="get" action=(context.destination.path("dead/message")) {
                        label for="id" { "Id, or the producer's message id" }
                        input #id name="id" required;
                        button .quiet type="submit" { "Open" }
                    }
                    p { (count(listing.found as u64, "dead letter", "dead letters")) ", grouped by error." }
                    @for group in &listing.groups { (card(group, &context.destination)) }
                }
            }
        }
    })
}

fn card(group: &Group, destination: &Destination) -> Markup {
    let target = Target::Group(group.fingerprint.clone());
    html! {
        section .card.group {
            h2 { a href=(target.path(destination, "dead/group")) { (group.fingerprint) } }
            (facts(group))
            div .actions {
                a .button href=(target.path(destination, "dead/group")) { "Open" }
                (target.actions(destination))
            }
        }
    }
}

fn facts(group: &Group) -> Markup {
    html! {
        p .lead {
            strong .big { (group.count) }
            span {
                @if let Some(first) = group.first { "first " (ago(first)) }
                @if let Some(last) = group.last { ", last " (ago(last)) }
                @if group.failed_again > 0 { ", " (group.failed_again) " failed again after a replay" }
            }
        }
        @if let Some(error) = &group.error { p { (short(error)) } }
        (remedy(group.remedy))
    }
}

/// A group and one of its pages.
#[derive(Deserialize)]
pub(super) struct GroupQuery {
    group: String,
    #[serde(default)]
    page: usize,
}

pub(super) async fn group(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(GroupQuery { group, page }): Query<GroupQuery>,
) -> Result<Markup, ErrorPage> {
    let listing = context.cache.listing(Arc::clone(&context.amqp)).await.map_err(unavailable)?;
    let Some((found, letters)) = listing.group(&group) else { return Err(not_found()) };
    let target = Target::Group(group.clone());
    let pages = letters.len().div_ceil(PAGE).max(1);
    let page = page.min(pages - 1);
    let shown = letters.iter().skip(page * PAGE).take(PAGE);
    let link = |page: usize| format!("{}&page={page}", target.path(&context.destination, "dead/group"));
    Ok(context.frame(&group, &visitor).around(html! {
        p { a href=(context.destination.path("dead")) { "All dead letters" } }
        section .card { (facts(found)) div .actions { (target.actions(&context.destination)) } }
        (letters_table(shown, &context.destination))
        @if pages > 1 {
            nav .pages aria-label="Pages of dead letters" {
                @if page > 0 { a href=(link(page - 1)) rel="prev" { "Older" } }
                span { "Page " (page + 1) " of " (pages) }
                @if page + 1 < pages { a href=(link(page + 1)) rel="next" { "Newer" } }
            }
        }
        @if found.count > letters.len() {
            p .hint { "Only the oldest " (KEPT_PER_GROUP) " are listed. " code { "close-sync dlq list --each" } " lists all." }
        }
    }))
}

fn letters_table<'a>(letters: impl Iterator<Item = &'a DeadLetter>, destination: &Destination) -> Markup {
    let columns = [
        Column::Text("Id"),
        Column::Text("Failed"),
        Column::Number("Attempts"),
        Column::Number("Replays"),
        Column::Text("Message id"),
    ];
    let rows = html! {
        @for letter in letters {
            tr {
                th scope="row" {
                    a href=(Target::Id(letter.id.clone()).path(destination, "dead/message")) { code { (letter.id) } }
                    @if letter.edited_at.is_some() { " edited" }
                }
                td { @if let Some(failed) = letter.failed_at { (ago(failed)) } @else { "unknown" } }
                td .number data-label="attempts" { @if let Some(attempts) = letter.attempts { (attempts) } @else { "–" } }
                td .number data-label="replays" { (letter.replays) }
                td data-label="message" { @if let Some(id) = &letter.message_id { code { (id) } } @else { "–" } }
            }
        }
    };
    html! { div .card.letters { (table("Dead letters, oldest first", &columns, rows)) } }
}
