//! The confirmation pages of replays and discards, and these actions.
//!
//! A replay sends one message first, and the others only if that one does not fail again
//! ([`crate::dead_letters::replay`]).

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Form, Query};
use axum::http::StatusCode;
use axum::response::Redirect;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Deserialize;
use uuid::Uuid;

use crate::dead_letters::filter::{Filter, Selection};
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::JobRequest;
use crate::http::admin::dead_letter_context::{DeadLetterContext, Target, not_found, unavailable};
use crate::http::admin::layout::{ErrorPage, csrf_token};
use crate::text::count;

/// The dead letters of a form. It contains their number and their last failure at the time it was rendered.
#[derive(Debug, Deserialize)]
pub(super) struct TargetQuery {
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

pub(super) async fn confirm_replay(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<TargetQuery>,
) -> Result<Markup, ErrorPage> {
    confirm(&context, &visitor, query, Action::Replay).await
}

pub(super) async fn confirm_discard(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(query): Query<TargetQuery>,
) -> Result<Markup, ErrorPage> {
    confirm(&context, &visitor, query, Action::Discard).await
}

/// The confirmation page of an action.
async fn confirm(
    context: &DeadLetterContext,
    visitor: &Visitor,
    query: TargetQuery,
    action: Action,
) -> Result<Markup, ErrorPage> {
    let (target, number, until, content_id) = match query.target()? {
        Target::Group(fingerprint) => {
            let listing = context.cache.listing(Arc::clone(&context.amqp)).await.map_err(unavailable)?;
            let (group, _) = listing.group(&fingerprint).ok_or_else(not_found)?;
            (Target::Group(fingerprint), group.count, group.last, None)
        }
        Target::Id(id) => {
            let found = context.cache.open(Arc::clone(&context.amqp), id).await.map_err(unavailable)?;
            // The request may contain the message id of the producer.
            let letter = found.ok_or_else(not_found)?;
            let content_id = letter.content_id();
            (Target::Id(letter.id), 1, None, Some(content_id))
        }
    };
    let back = match &target {
        Target::Group(_) => target.path(&context.destination, "dead/group"),
        Target::Id(_) => target.path(&context.destination, "dead/message"),
    };
    let (title, path, button, danger) = match action {
        Action::Replay => ("Replay?", "dead/replay", "Replay", false),
        Action::Discard => ("Discard?", "dead/discard", "Discard", true),
    };
    Ok(context.frame(title, visitor).around(html! {
        section .card.narrow {
            p { strong { (count(number as u64, "message", "messages")) } ": " (target.describe()) "." }
            @match action {
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
            form .actions method="post" action=(context.destination.path(path)) {
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

pub(super) async fn replay(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Form(form): Form<TargetQuery>,
) -> Result<Redirect, ErrorPage> {
    let target = form.target()?;
    let destination = context.destination.name.clone();
    let request = JobRequest { filter: target.filter(), description: target.value().to_owned(), destination };
    if !context.cache.replay(context.amqp, request, &visitor) {
        let error = "Another replay is running. Wait until it has ended.";
        return Err(ErrorPage::new(StatusCode::CONFLICT, error));
    }
    visitor.audit("replay", context.destination.name.as_deref(), Some(target.value()));
    Ok(Redirect::to(&context.destination.path("dead/progress")))
}

pub(super) async fn discard(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Form(form): Form<TargetQuery>,
) -> Result<Redirect, ErrorPage> {
    // Leaves out messages that failed after the form was rendered, and another message with the same id.
    let (limit, until, content_id) = (Some(form.count), form.until, form.content);
    let target = form.target()?;
    let selection = Selection { filter: Filter { content: content_id, until, ..target.filter() }, limit };
    visitor.audit("discard", context.destination.name.as_deref(), Some(target.value()));
    let destination = context.destination.name.clone();
    let result = context.cache.discard(context.amqp, selection, visitor, destination).await;
    let discarded = result.map_err(unavailable)?;
    Ok(Redirect::to(&format!("{}?discarded={discarded}", context.destination.path("dead"))))
}
