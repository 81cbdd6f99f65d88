//! One dead letter whole: where it comes from, what was decided, its body, and what would become of it now.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Form, Query};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::Value;

use crate::dead_letters::filter::remedy;
use crate::dead_letters::letter::DeadLetter;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letters::{At, Target, gone, unavailable};
use crate::http::admin::layout::{Broken, ago, moment, prose, seal};
use crate::http::admin::redact::Sight;
use crate::http::admin::test_event;
use crate::outcome::Reason;

#[derive(Deserialize)]
pub(crate) struct Opening {
    id: String,
    /// What is asked for: `plan`, or `show` for personal data as well.
    #[serde(default)]
    ask: String,
}

/// What can be seen without asking for it. It is not rehearsed: whoever follows a link must not spend Close's budget.
pub(crate) async fn show(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Query(Opening { id, .. }): Query<Opening>,
) -> Result<Markup, Broken> {
    let letter = open(&at, id).await?;
    Ok(page(&at, &visitor, &letter, Sight::Masked, html! {}))
}

/// What was asked for.
pub(crate) async fn reveal(
    at: At,
    Extension(visitor): Extension<Visitor>,
    Form(Opening { id, ask }): Form<Opening>,
) -> Result<Markup, Broken> {
    let sight = Sight::asked(ask == "show");
    let what = match sight {
        Sight::Masked => "plan of a dead letter",
        Sight::Personal => "personal data of a dead letter",
    };
    visitor.audit(what, at.place.name.as_deref(), Some(&id));
    let letter = open(&at, id).await?;
    let plan = test_event::outlook(&at.place, &letter.body, letter.arrival(), sight).await;
    let plan = html! {
        section .card aria-labelledby="plan" {
            h2 #plan { "What a replay would do now" }
            @match plan {
                Ok(plan) => {
                    (plan)
                    @if letter.reason.as_deref() == Some(Reason::Rejected.label()) {
                        p .hint { "What Close refuses is only found out by sending it: replay this one alone first." }
                    }
                }
                Err(why) => { p .notice.bad role="alert" { (why) } }
            }
        }
    };
    Ok(page(&at, &visitor, &letter, sight, plan))
}

async fn open(at: &At, id: String) -> Result<DeadLetter, Broken> {
    at.bench.open(Arc::clone(&at.amqp), id.trim().to_owned()).await.map_err(unavailable)?.ok_or_else(gone)
}

fn page(at: &At, visitor: &Visitor, letter: &DeadLetter, sight: Sight, plan: Markup) -> Markup {
    let group = Target::Group(letter.fingerprint.clone());
    let this = Target::Id(letter.id.clone());
    at.frame("Dead letter", visitor).around(html! {
        p {
            a href=(at.place.path("dead")) { "All dead letters" } " › "
            a href=(group.path(&at.place, "dead/group")) { (letter.fingerprint) }
        }
        section .card aria-labelledby="what" {
            h2 #what { "What happened" }
            @if let Some(error) = &letter.error { p { (error) } }
            p { strong { "What to do: " } (prose(remedy(&letter.fingerprint))) }
            div .actions {
                form method="post" action=(at.place.path("dead/message")) {
                    (seal(visitor))
                    input type="hidden" name="id" value=(letter.id);
                    div .actions {
                        @match sight {
                            Sight::Masked => {
                                button name="ask" value="plan" { "See what it would do" }
                                button .quiet name="ask" value="show" { "Show personal data" }
                            }
                            Sight::Personal => {
                                a .button.quiet href=(this.path(&at.place, "dead/message")) { "Hide personal data" }
                            }
                        }
                    }
                }
                (this.actions(&at.place))
            }
        }
        (plan)
        section .card aria-labelledby="body" {
            h2 #body { "Body" }
            @if sight == Sight::Masked { p .hint { "Values are hidden." } }
            pre tabindex="0" aria-labelledby="body" { (sight.body(&letter.body)) }
            @if let Some(original) = letter.original() {
                h3 { "Before it was edited" }
                pre tabindex="0" { (sight.body(&original)) }
            }
        }
        (facts(letter))
        (carried(letter, sight))
    })
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
                    @if let Some(text) = text { dt { (title) } dd { code { (text) } } }
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

/// What its producer sent along.
fn carried(letter: &DeadLetter, sight: Sight) -> Markup {
    let (properties, headers) = letter.carried();
    let theirs: Vec<(String, Value)> = properties
        .into_iter()
        .filter(|(name, _)| name != "message_id")
        .chain(headers.into_iter().filter(|(name, _)| !name.starts_with("x-close-sync-")))
        .collect();
    html! {
        @if !theirs.is_empty() {
            section .card aria-labelledby="headers" {
                h2 #headers { "Properties and headers of the producer" }
                dl .facts {
                    @for (name, value) in theirs {
                        @let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        dt { (name) }
                        dd { code { (sight.of(&text)) } }
                    }
                }
            }
        }
    }
}
