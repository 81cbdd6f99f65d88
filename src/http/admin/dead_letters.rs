//! The pages that list dead letters, and replay or discard them.
//!
//! Every action has a confirmation page. A replay sends one message first, and the others only if that one does not fail
//! again ([`crate::dead_letters::replay`]).

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
use crate::dead_letters::filter::{Filter, Selection};
use crate::dead_letters::group::Group;
use crate::dead_letters::letter::DeadLetter;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::{DeadLetterCache, JobRequest, KEPT};
use crate::http::admin::layout::{ErrorPage, Frame, Tab, ago, csrf_token, prose};
use crate::http::admin::{AppState, Destination};
use crate::text::count;

/// The number of dead letters on a page.
const PAGE: usize = 50;

/// The dead letters a page is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    /// All with this fingerprint.
    Group(String),
    /// The one with this id.
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

    /// The name of the field in a URL or a form.
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

    /// The path of a page about them.
    pub(crate) fn path(&self, destination: &Destination, page: &str) -> String {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair(self.field(), self.value())
            .finish();
        format!("{}?{query}", destination.path(page))
    }

    /// Links to the confirmation pages.
    pub(crate) fn actions(&self, destination: &Destination) -> Markup {
        html! {
            a .button.quiet href=(self.path(destination, "dead/replay")) { "Replay…" }
            a .button.quiet href=(self.path(destination, "dead/discard")) { "Discard…" }
        }
    }
}

/// A running destination and its dead letters.
pub(crate) struct DeadLetterContext {
    pub(crate) destination: Destination,
    pub(crate) cache: Arc<DeadLetterCache>,
    pub(crate) amqp: Arc<Settings>,
}

impl FromRequestParts<AppState> for DeadLetterContext {
    type Rejection = ErrorPage;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ErrorPage> {
        let destination = Destination::from_request_parts(parts, state).await?;
        let Some(amqp) = destination.handle.runtime.amqp() else {
            let why = "This destination is not running. Its live page shows why.";
            return Err(ErrorPage::new(StatusCode::SERVICE_UNAVAILABLE, why));
        };
        let cache = state.dead_letter_cache(&destination);
        Ok(Self { destination, cache, amqp })
    }
}

impl DeadLetterContext {
    pub(crate) fn frame<'a>(&'a self, title: &'a str, visitor: &'a Visitor) -> Frame<'a> {
        Frame { title, visitor: Some(visitor), of: Some((&self.destination, Tab::Dead)), refresh: None }
    }
}

/// The result of an action, after a redirect.
#[derive(Deserialize)]
pub(crate) struct ListQuery {
    discarded: Option<u32>,
}

pub(crate) async fn list(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(done): Query<ListQuery>,
) -> Markup {
    let listing = context.cache.listing(Arc::clone(&context.amqp)).await;
    let running = context.cache.job().filter(|job| !job.is_over());
    context.frame("Dead letters", &visitor).around(html! {
        @if let Some(discarded) = done.discarded {
            p .notice.good role="status" { (count(discarded, "dead letter was", "dead letters were")) " discarded." }
        }
        @if let Some(job) = running {
            p .notice.so-so {
                "A replay of " (job.what) " is running. " a href=(context.destination.path("dead/progress")) { "Show progress" }
            }
        }
        @match &listing {
            Err(why) => { p .notice.bad role="alert" { (why) } }
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
        @if let Some(error) = &group.error { p { (error) } }
        p { strong { "What to do: " } (prose(group.remedy)) }
    }
}

/// A group and one of its pages.
#[derive(Deserialize)]
pub(crate) struct GroupQuery {
    group: String,
    #[serde(default)]
    page: usize,
}

pub(crate) async fn group(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(GroupQuery { group, page }): Query<GroupQuery>,
) -> Result<Markup, ErrorPage> {
    let listing = context.cache.listing(Arc::clone(&context.amqp)).await.map_err(unavailable)?;
    let Some((known, letters)) = listing.group(&group) else { return Err(gone()) };
    let target = Target::Group(group.clone());
    let pages = letters.len().div_ceil(PAGE).max(1);
    let page = page.min(pages - 1);
    let shown = letters.iter().skip(page * PAGE).take(PAGE);
    let link = |page: usize| format!("{}&page={page}", target.path(&context.destination, "dead/group"));
    Ok(context.frame(&group, &visitor).around(html! {
        p { a href=(context.destination.path("dead")) { "All dead letters" } }
        section .card { (facts(known)) div .actions { (target.actions(&context.destination)) } }
        (table(shown, &context.destination))
        @if pages > 1 {
            nav .pages aria-label="Pages of dead letters" {
                @if page > 0 { a href=(link(page - 1)) rel="prev" { "Older" } }
                span { "Page " (page + 1) " of " (pages) }
                @if page + 1 < pages { a href=(link(page + 1)) rel="next" { "Newer" } }
            }
        }
        @if known.count > letters.len() {
            p .hint { "Only the oldest " (KEPT) " are listed. " code { "close-sync dlq list --each" } " lists all." }
        }
    }))
}

fn table<'a>(letters: impl Iterator<Item = &'a DeadLetter>, destination: &Destination) -> Markup {
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
                                a href=(Target::Id(letter.id.clone()).path(destination, "dead/message")) { code { (letter.id) } }
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

/// A form about dead letters, with their number when it was rendered, and the time of the last failure.
#[derive(Debug, Deserialize)]
pub(crate) struct TargetQuery {
    group: Option<String>,
    id: Option<String>,
    #[serde(default)]
    count: usize,
    until: Option<Timestamp>,
    /// The content id of a single dead letter. Several may share an id.
    content: Option<Uuid>,
}

impl TargetQuery {
    fn target(self) -> Result<Target, ErrorPage> {
        match (self.group, self.id) {
            (Some(group), None) => Ok(Target::Group(group)),
            (None, Some(id)) => Ok(Target::Id(id)),
            (Some(_), Some(_)) | (None, None) => Err(ErrorPage::new(
                StatusCode::BAD_REQUEST,
                "The address names no dead letters: either `group` or `id` is needed.",
            )),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Replay,
    Discard,
}

pub(crate) async fn ask_to_replay(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(which): Query<TargetQuery>,
) -> Result<Markup, ErrorPage> {
    ask(&context, &visitor, which, Action::Replay).await
}

pub(crate) async fn ask_to_discard(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(which): Query<TargetQuery>,
) -> Result<Markup, ErrorPage> {
    ask(&context, &visitor, which, Action::Discard).await
}

/// The confirmation page of an action.
async fn ask(
    context: &DeadLetterContext,
    visitor: &Visitor,
    which: TargetQuery,
    action_kind: Action,
) -> Result<Markup, ErrorPage> {
    let (target, number, until, content_id) = match which.target()? {
        Target::Group(fingerprint) => {
            let listing = context.cache.listing(Arc::clone(&context.amqp)).await.map_err(unavailable)?;
            let (group, _) = listing.group(&fingerprint).ok_or_else(gone)?;
            (Target::Group(fingerprint), group.count, group.last, None)
        }
        Target::Id(id) => {
            let found = context.cache.open(Arc::clone(&context.amqp), id).await.map_err(unavailable)?;
            // The request may contain the message id of the producer.
            let letter = found.ok_or_else(gone)?;
            let content_id = letter.content_id();
            (Target::Id(letter.id), 1, None, Some(content_id))
        }
    };
    let back = match &target {
        Target::Group(_) => target.path(&context.destination, "dead/group"),
        Target::Id(_) => target.path(&context.destination, "dead/message"),
    };
    let (title, action, button, danger) = match action_kind {
        Action::Replay => ("Replay?", "dead/replay", "Replay", false),
        Action::Discard => ("Discard?", "dead/discard", "Discard", true),
    };
    Ok(context.frame(title, visitor).around(html! {
        section .card.narrow {
            p { strong { (count(number as u64, "message", "messages")) } ": " (target.describe()) "." }
            @match action_kind {
                Action::Replay => {
                    @if number > 1 {
                        p {
                            "The oldest message is sent to the work queue first. The others follow only if it does not fail \
                             again, a few at a time and behind live messages. The replay stops when one fails with the same \
                             error."
                        }
                    } @else {
                        p { "The message is sent to the work queue. If it fails again, it becomes a new dead letter." }
                    }
                    p .hint { "Values from newer events are not overwritten." }
                }
                Action::Discard => {
                    p {
                        "Deletes " @if number > 1 { "them" } @else { "it" }
                        " from RabbitMQ. This cannot be undone. " code { "close-sync dlq export" } " saves a copy."
                    }
                }
            }
            form .actions method="post" action=(context.destination.path(action)) {
                (csrf_token(visitor))
                input type="hidden" name=(target.field()) value=(target.value());
                input type="hidden" name="count" value=(number);
                @if let Some(id) = content_id { input type="hidden" name="content" value=(id); }
                @if let Some(until) = until { input type="hidden" name="until" value=(until); }
                button .danger[danger] type="submit" { (button) }
                a .button.quiet href=(back) { "Back" }
            }
        }
    }))
}

pub(crate) async fn replay(
    Shared(state): Shared<AppState>,
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Form(which): Form<TargetQuery>,
) -> Result<Redirect, ErrorPage> {
    let target = which.target()?;
    let destination = context.destination.name.clone();
    let request = JobRequest { filter: target.filter(), what: target.value().to_owned(), destination };
    if !context.cache.replay(context.amqp, request, &visitor, &state) {
        let why = "Another replay is running. Wait until it has ended.";
        return Err(ErrorPage::new(StatusCode::CONFLICT, why));
    }
    visitor.audit("replay", context.destination.name.as_deref(), Some(target.value()));
    Ok(Redirect::to(&context.destination.path("dead/progress")))
}

pub(crate) async fn discard(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Form(which): Form<TargetQuery>,
) -> Result<Redirect, ErrorPage> {
    // Leaves out messages that failed after the form was rendered, and another message with the same id.
    let (limit, until, content_id) = (Some(which.count), which.until, which.content);
    let target = which.target()?;
    let which = Selection { filter: Filter { content: content_id, until, ..target.filter() }, limit };
    visitor.audit("discard", context.destination.name.as_deref(), Some(target.value()));
    let done = context.cache.discard(context.amqp, which, visitor, context.destination.name.clone()).await;
    let discarded = done.map_err(unavailable)?;
    Ok(Redirect::to(&format!("{}?discarded={discarded}", context.destination.path("dead"))))
}

/// The dead letters cannot be read.
pub(crate) fn unavailable(why: String) -> ErrorPage {
    ErrorPage::new(StatusCode::SERVICE_UNAVAILABLE, why)
}

/// The dead letter no longer exists.
pub(crate) fn gone() -> ErrorPage {
    let why = "Dead letter not found. It was replayed, edited or discarded in the meantime.";
    ErrorPage::new(StatusCode::NOT_FOUND, why)
}
