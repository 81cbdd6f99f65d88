//! The page of one dead letter: its origin, its error, its body, and a dry run of a replay.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Form, Query};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::Value;

use crate::dead_letters::group;
use crate::dead_letters::letter::DeadLetter;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_context::{DeadLetterContext, Target, not_found, unavailable};
use crate::http::admin::explanation;
use crate::http::admin::layout::{ErrorPage, ago, alert, csrf_token, moment, remedy};
use crate::http::admin::redact::{Excerpt, Visibility, short};
use crate::outcome::Reason;
use crate::text::argument;

#[derive(Deserialize)]
pub(super) struct MessageQuery {
    id: String,
    /// `plan` for a dry run, `show` for personal data as well.
    #[serde(default)]
    ask: String,
}

/// Shows the redacted page. It does no dry run: following a link must not use up Close's rate limit.
pub(super) async fn show(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Query(MessageQuery { id, .. }): Query<MessageQuery>,
) -> Result<Markup, ErrorPage> {
    let letter = open(&context, id).await?;
    Ok(page(&context, &visitor, &letter, Visibility::Redacted, html! {}))
}

/// Shows what the operator asked for.
pub(super) async fn reveal(
    context: DeadLetterContext,
    Extension(visitor): Extension<Visitor>,
    Form(MessageQuery { id, ask }): Form<MessageQuery>,
) -> Result<Markup, ErrorPage> {
    let visibility = Visibility::requested(ask == "show");
    let action = match visibility {
        Visibility::Redacted => "plan of a dead letter",
        Visibility::Full => "personal data of a dead letter",
    };
    visitor.audit(action, context.destination.name.as_deref(), Some(&id));
    let letter = open(&context, id).await?;
    let plan =
        explanation::dry_run(&context.destination, letter.payload(), letter.received_at(), visibility).await;
    let plan = html! {
        section .card aria-labelledby="plan" {
            h2 #plan { "What a replay would do now" }
            @match plan {
                Ok(plan) => {
                    (plan)
                    @if letter.reason.as_deref() == Some(Reason::Rejected.label()) {
                        p .hint { "Close validates values only when they are written. Replay this message alone first." }
                    }
                }
                Err(error) => { (alert(&error)) }
            }
        }
    };
    Ok(page(&context, &visitor, &letter, visibility, plan))
}

async fn open(context: &DeadLetterContext, id: String) -> Result<DeadLetter, ErrorPage> {
    context
        .cache
        .open(Arc::clone(&context.amqp), id.trim().to_owned())
        .await
        .map_err(unavailable)?
        .ok_or_else(not_found)
}

fn page(
    context: &DeadLetterContext,
    visitor: &Visitor,
    letter: &DeadLetter,
    visibility: Visibility,
    plan: Markup,
) -> Markup {
    let same_error = Target::Group(letter.fingerprint.clone());
    let this = Target::Id(letter.id.clone());
    context.frame("Dead letter", visitor).around(html! {
        p {
            a href=(context.destination.path("dead")) { "All dead letters" } " › "
            a href=(same_error.path(&context.destination, "dead/group")) { (letter.fingerprint) }
        }
        section .card aria-labelledby="what" {
            h2 #what { "Error" }
            @if let Some(error) = &letter.error { p { (short(error)) } }
            (remedy(group::remedy(&letter.fingerprint)))
            div .actions {
                form method="post" action=(context.destination.path("dead/message")) {
                    (csrf_token(visitor))
                    input type="hidden" name="id" value=(letter.id);
                    div .actions {
                        @match visibility {
                            Visibility::Redacted => {
                                button name="ask" value="plan" { "Show what a replay would do" }
                                button .quiet name="ask" value="show" { "Show personal data" }
                            }
                            Visibility::Full => {
                                a .button.quiet href=(this.path(&context.destination, "dead/message")) { "Hide personal data" }
                            }
                        }
                    }
                }
                (this.actions(&context.destination))
            }
        }
        (plan)
        section .card aria-labelledby="body" {
            h2 #body { "Body" }
            @if visibility == Visibility::Redacted { p .hint { "Values are hidden." } }
            (excerpt(&visibility.body(&letter.readable(), MAX_BODY), "body", &letter.id))
            @if let Some(original) = letter.original() {
                h3 #original { "Before it was edited" }
                (excerpt(&visibility.body(&original, MAX_ORIGINAL), "original", &letter.id))
            }
        }
        (facts(letter))
        (producer_headers(letter, visibility))
    })
}

// What a page shows of a dead letter, in bytes before HTML, which has up to six bytes for one. With them a page has less
// than 2 MiB, whatever the dead letter has.
const MAX_BODY: usize = 128 << 10;
const MAX_ORIGINAL: usize = 32 << 10;
const MAX_HEADERS: usize = 50;

/// The beginning of a body.
fn excerpt(excerpt: &Excerpt, label: &str, id: &str) -> Markup {
    html! {
        pre tabindex="0" aria-labelledby=(label) { (excerpt.text) }
        @if excerpt.is_cut {
            p .hint {
                "Only the beginning is shown. " code { "close-sync dlq show --json " (argument(id)) } " shows all of it."
            }
        }
    }
}

fn facts(letter: &DeadLetter) -> Markup {
    let times = [
        ("First received", letter.first_seen),
        ("Dead-lettered", letter.failed_at),
        ("Edited", letter.edited_at),
    ];
    let texts = [
        ("Id", Some(&letter.id)),
        ("Message id", letter.message_id.as_ref()),
        ("Decision", letter.decision.as_ref()),
        ("Exchange", letter.exchange.as_ref()),
        ("Routing key", letter.routing_key.as_ref()),
    ];
    html! {
        section .card aria-labelledby="record" {
            h2 #record { "Record" }
            dl .facts {
                @for (title, text) in texts {
                    @if let Some(text) = text { dt { (title) } dd { code { (short(text)) } } }
                }
                @for (title, time) in times {
                    @if let Some(time) = time { dt { (title) } dd { (ago(time)) " " span .quiet { (moment(time)) } } }
                }
                @if let Some(attempts) = letter.attempts { dt { "Attempts" } dd { (attempts) } }
                dt { "Replays" }
                dd { (letter.replays) }
                dt { "Size" }
                dd { (letter.body.len()) " bytes" }
            }
        }
    }
}

/// The properties and headers the producer sent.
fn producer_headers(letter: &DeadLetter, visibility: Visibility) -> Markup {
    let (properties, headers) = letter.properties_and_headers();
    let shown: Vec<(String, Value)> = properties
        .into_iter()
        .filter(|(name, _)| name != "message_id")
        .chain(headers.into_iter().filter(|(name, _)| !name.starts_with("x-close-sync-")))
        .collect();
    html! {
        @if !shown.is_empty() {
            section .card aria-labelledby="headers" {
                h2 #headers { "Properties and headers of the producer" }
                dl .facts {
                    @for (name, value) in shown.iter().take(MAX_HEADERS) {
                        @let text = value.as_str().map_or_else(|| short(&value.to_string()), short);
                        dt { (name) }
                        dd { code { (visibility.of(&text)) } }
                    }
                }
                @if shown.len() > MAX_HEADERS {
                    p .hint { "Only the first " (MAX_HEADERS) " are shown. " code { "close-sync dlq show " (argument(&letter.id)) } " shows all." }
                }
            }
        }
    }
}
