//! Dead letters: what failed, how often and since when; one of them whole; replaying and discarding.
//!
//! Nothing is done without a page in between that says what would be. A replay sends one first and the rest only
//! when that did not fail again ([`crate::dead_letters::replay`]).

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Form, FromRequestParts, Query, State as Shared};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Redirect;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Deserialize;
use uuid::Uuid;

use crate::amqp::Settings;
use crate::dead_letters::filter::{Filter, Group, Selection};
use crate::dead_letters::letter::DeadLetter;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::{DeadLetterCache, KEPT, Wish};
use crate::http::admin::layout::{Broken, Frame, Tab, ago, prose, seal};
use crate::http::admin::{AppState, Place};
use crate::text::count;

/// Dead letters on a page.
const PAGE: usize = 50;

/// Which dead letters a page is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    /// All that failed alike, by their fingerprint.
    Group(String),
    /// One, by its id.
    Id(String),
}

impl Target {
    fn filter(&self) -> Filter {
        match self {
            Self::Group(fingerprint) => Filter { group: Some(fingerprint.clone()), ..Filter::default() },
            Self::Id(id) => Filter { ids: [id.clone()].into(), ..Filter::default() },
        }
    }

    fn value(&self) -> &str {
        match self {
            Self::Group(value) | Self::Id(value) => value,
        }
    }

    /// As a part of an address or a form.
    fn field(&self) -> &'static str {
        match self {
            Self::Group(_) => "group",
            Self::Id(_) => "id",
        }
    }

    fn describe(&self) -> Markup {
        match self {
            Self::Group(fingerprint) => html! { "the dead letters " code { (fingerprint) } },
            Self::Id(id) => html! { "the dead letter " code { (id) } },
        }
    }

    /// The address of a page about them.
    pub(crate) fn path(&self, place: &Place, page: &str) -> String {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair(self.field(), self.value())
            .finish();
        format!("{}?{query}", place.path(page))
    }

    /// The pages that ask whether to go on.
    pub(crate) fn actions(&self, place: &Place) -> Markup {
        html! {
            a .button.quiet href=(self.path(place, "dead/replay")) { "Replay…" }
            a .button.quiet href=(self.path(place, "dead/discard")) { "Discard…" }
        }
    }
}

/// A destination's dead letters, and how to get at them.
pub(crate) struct At {
    pub(crate) place: Place,
    pub(crate) bench: Arc<DeadLetterCache>,
    pub(crate) amqp: Arc<Settings>,
}

impl FromRequestParts<AppState> for At {
    type Rejection = Broken;

    async fn from_request_parts(parts: &mut Parts, office: &AppState) -> Result<Self, Broken> {
        let place = Place::from_request_parts(parts, office).await?;
        let Some(amqp) = place.seat.runtime.amqp() else {
            let why = "This destination does not run: its live page tells why.";
            return Err(Broken::new(StatusCode::SERVICE_UNAVAILABLE, why));
        };
        let bench = office.workbench(&place);
        Ok(Self { place, bench, amqp })
    }
}

impl At {
    pub(crate) fn frame<'a>(&'a self, title: &'a str, visitor: &'a Visitor) -> Frame<'a> {
        Frame { title, visitor: Some(visitor), of: Some((&self.place, Tab::Dead)), refresh: None }
    }
}

/// What was just done.
#[derive(Deserialize)]
pub(crate) struct Done {
    discarded: Option<u32>,
}

pub(crate) async fn list(at: At, Extension(visitor): Extension<Visitor>, Query(done): Query<Done>) -> Markup {
    let listing = at.bench.listing(Arc::clone(&at.amqp)).await;
    let running = at.bench.job().filter(|job| !job.is_over());
    at.frame("Dead letters", &visitor).around(html! {
        @if let Some(discarded) = done.discarded {
            p .notice.good role="status" { (count(discarded, "dead letter was", "dead letters were")) " discarded." }
        }
        @if let Some(job) = running {
            p .notice.so-so {
                "A replay of " (job.what) " is under way. " a href=(at.place.path("dead/progress")) { "Follow it" }
            }
        }
        @match &listing {
            Err(why) => { p .notice.bad role="alert" { (why) } }
            Ok(listing) => {
                @if listing.replaying {
                    p .quiet { "A replay is under way: what it has in hand is not among them." }
                }
                @if listing.groups.is_empty() {
                    p .notice.good { "There are no dead letters." }
                } @else {
                    form .row method="get" action=(at.place.path("dead/message")) {
                        label for="id" { "Id, or the producer's message id" }
                        input #id name="id" required;
                        button .quiet type="submit" { "Open" }
                    }
                    p { (count(listing.found as u64, "dead letter", "dead letters")) ", sorted by what they have in common." }
                    @for group in &listing.groups { (card(group, &at.place)) }
                }
            }
        }
    })
}

fn card(group: &Group, place: &Place) -> Markup {
    let target = Target::Group(group.fingerprint.clone());
    html! {
        section .card.group {
            h2 { a href=(target.path(place, "dead/group")) { (group.fingerprint) } }
            (facts(group))
            div .actions {
                a .button href=(target.path(place, "dead/group")) { "Open" }
                (target.actions(place))
            }
        }
    }
}

/// What is known of a group.
fn facts(group: &Group) -> Markup {
    html! {
        p .lead {
            strong .big { (group.count) }
            span {
                @if let Some(first) = group.first { "first " (ago(first)) }
                @if let Some(last) = group.last { ", last " (ago(last)) }
                @if group.failed_again > 0 { ", " (group.failed_again) " of them failed again after a replay" }
            }
        }
        @if let Some(error) = &group.error { p { (error) } }
        p { strong { "What to do: " } (prose(group.remedy)) }
    }
}

/// A group, and which of its pages.
#[derive(Deserialize)]
pub(crate) struct Asked {
    group: String,
    #[serde(default)]
    page: usize,
}

pub(crate) async fn group(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(Asked { group, page }): Query<Asked>,
) -> Result<Markup, Broken> {
    let listing = at.bench.listing(Arc::clone(&at.amqp)).await.map_err(unavailable)?;
    let Some((known, letters)) = listing.group(&group) else { return Err(gone()) };
    let target = Target::Group(group.clone());
    let pages = letters.len().div_ceil(PAGE).max(1);
    let page = page.min(pages - 1);
    let shown = letters.iter().skip(page * PAGE).take(PAGE);
    let link = |page: usize| format!("{}&page={page}", target.path(&at.place, "dead/group"));
    Ok(at.frame(&group, &visitor).around(html! {
        p { a href=(at.place.path("dead")) { "All dead letters" } }
        section .card { (facts(known)) div .actions { (target.actions(&at.place)) } }
        (table(shown, &at.place))
        @if pages > 1 {
            nav .pages aria-label="Pages of dead letters" {
                @if page > 0 { a href=(link(page - 1)) rel="prev" { "Older" } }
                span { "Page " (page + 1) " of " (pages) }
                @if page + 1 < pages { a href=(link(page + 1)) rel="next" { "Newer" } }
            }
        }
        @if known.count > letters.len() {
            p .hint { "The oldest " (KEPT) " are listed; " code { "close-sync dlq list --each" } " lists all." }
        }
    }))
}

fn table<'a>(letters: impl Iterator<Item = &'a DeadLetter>, place: &Place) -> Markup {
    html! {
        div .card.wide {
            table .letters {
                caption .hidden { "Dead letters, oldest first" }
                thead {
                    tr {
                        th scope="col" { "Id" }
                        th scope="col" { "Failed" }
                        th .number scope="col" { "Attempts" }
                        th .number scope="col" { "Replays" }
                        th scope="col" { "Message id" }
                    }
                }
                tbody {
                    @for letter in letters {
                        tr {
                            th scope="row" {
                                a href=(Target::Id(letter.id.clone()).path(place, "dead/message")) { code { (letter.id) } }
                                @if letter.edited_at.is_some() { " edited" }
                            }
                            td { @if let Some(failed) = letter.failed_at { (ago(failed)) } @else { "unknown" } }
                            td .number data-label="tries" { @if let Some(attempts) = letter.attempts { (attempts) } @else { "–" } }
                            td .number data-label="replays" { (letter.replays) }
                            td data-label="message" { @if let Some(id) = &letter.message_id { code { (id) } } @else { "–" } }
                        }
                    }
                }
            }
        }
    }
}

/// A form about some dead letters, with how many they were when it was made, and when the last had failed.
#[derive(Debug, Deserialize)]
pub(crate) struct Wanted {
    group: Option<String>,
    id: Option<String>,
    #[serde(default)]
    count: usize,
    until: Option<Timestamp>,
    /// Of one, what it is exactly: others may have its id.
    content: Option<Uuid>,
}

impl Wanted {
    fn target(self) -> Result<Target, Broken> {
        match (self.group, self.id) {
            (Some(group), None) => Ok(Target::Group(group)),
            (None, Some(id)) => Ok(Target::Id(id)),
            (Some(_), Some(_)) | (None, None) => {
                Err(Broken::new(StatusCode::BAD_REQUEST, "Which dead letters? This address names none."))
            }
        }
    }
}

/// What can be done to dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Replay,
    Discard,
}

pub(crate) async fn ask_to_replay(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(which): Query<Wanted>,
) -> Result<Markup, Broken> {
    ask(&at, &visitor, which, Verb::Replay).await
}

pub(crate) async fn ask_to_discard(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(which): Query<Wanted>,
) -> Result<Markup, Broken> {
    ask(&at, &visitor, which, Verb::Discard).await
}

/// The page between a wish and its fulfilment.
async fn ask(at: &At, visitor: &Visitor, which: Wanted, verb: Verb) -> Result<Markup, Broken> {
    let (target, number, until, content) = match which.target()? {
        Target::Group(fingerprint) => {
            let listing = at.bench.listing(Arc::clone(&at.amqp)).await.map_err(unavailable)?;
            let (group, _) = listing.group(&fingerprint).ok_or_else(gone)?;
            (Target::Group(fingerprint), group.count, group.last, None)
        }
        Target::Id(id) => {
            let found = at.bench.open(Arc::clone(&at.amqp), id).await.map_err(unavailable)?;
            // It may have been named by the id of its producer.
            let letter = found.ok_or_else(gone)?;
            let content = letter.content();
            (Target::Id(letter.id), 1, None, Some(content))
        }
    };
    let back = match &target {
        Target::Group(_) => target.path(&at.place, "dead/group"),
        Target::Id(_) => target.path(&at.place, "dead/message"),
    };
    let (title, action, button, danger) = match verb {
        Verb::Replay => ("Replay?", "dead/replay", "Replay", false),
        Verb::Discard => ("Discard?", "dead/discard", "Discard for good", true),
    };
    Ok(at.frame(title, visitor).around(html! {
        section .card.narrow {
            p { strong { (count(number as u64, "message", "messages")) } ": " (target.describe()) "." }
            @match verb {
                Verb::Replay => {
                    @if number > 1 {
                        p {
                            "The oldest is sent through the work queue first. Only if it does not fail again, the others \
                             follow, a few at a time behind live messages. It stops when one fails as before."
                        }
                    } @else {
                        p { "It is sent through the work queue once more. If it fails again, it is a new dead letter." }
                    }
                    p .hint { "What newer events have told about meanwhile stays as it is." }
                }
                Verb::Discard => {
                    p {
                        @if number > 1 { "They are" } @else { "It is" }
                        " deleted from RabbitMQ, and cannot be brought back. " code { "close-sync dlq export" }
                        " keeps a copy."
                    }
                }
            }
            form .actions method="post" action=(at.place.path(action)) {
                (seal(visitor))
                input type="hidden" name=(target.field()) value=(target.value());
                input type="hidden" name="count" value=(number);
                @if let Some(content) = content { input type="hidden" name="content" value=(content); }
                @if let Some(until) = until { input type="hidden" name="until" value=(until); }
                button .danger[danger] type="submit" { (button) }
                a .button.quiet href=(back) { "Back" }
            }
        }
    }))
}

pub(crate) async fn replay(
    Shared(office): Shared<AppState>,
    at: At,
    Extension(visitor): Extension<Visitor>,
    Form(which): Form<Wanted>,
) -> Result<Redirect, Broken> {
    let target = which.target()?;
    let destination = at.place.name.clone();
    let wish = Wish { filter: target.filter(), what: target.value().to_owned(), destination };
    if !at.bench.replay(at.amqp, wish, &visitor, &office) {
        let why = "A replay is under way already; one can be begun when it has ended.";
        return Err(Broken::new(StatusCode::CONFLICT, why));
    }
    visitor.audit("replay", at.place.name.as_deref(), Some(target.value()));
    Ok(Redirect::to(&at.place.path("dead/progress")))
}

pub(crate) async fn discard(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Form(which): Form<Wanted>,
) -> Result<Redirect, Broken> {
    // Those that came since were not agreed to, as far as they have a time; nor was another one of the same id.
    let (limit, until, content) = (Some(which.count), which.until, which.content);
    let target = which.target()?;
    let which = Selection { filter: Filter { content, until, ..target.filter() }, limit };
    visitor.audit("discard", at.place.name.as_deref(), Some(target.value()));
    let done = at.bench.discard(at.amqp, which, visitor, at.place.name.clone()).await;
    let discarded = done.map_err(unavailable)?;
    Ok(Redirect::to(&format!("{}?discarded={discarded}", at.place.path("dead"))))
}

/// RabbitMQ does not let itself be looked at.
pub(crate) fn unavailable(why: String) -> Broken {
    Broken::new(StatusCode::SERVICE_UNAVAILABLE, why)
}

/// They were there a moment ago.
pub(crate) fn gone() -> Broken {
    let why = "There is no such dead letter any more: it was replayed, edited or discarded meanwhile.";
    Broken::new(StatusCode::NOT_FOUND, why)
}
