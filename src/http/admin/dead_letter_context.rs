//! What the pages about dead letters share: their destination, which dead letters they are about, and errors.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use maud::{Markup, html};
use serde::Deserialize;

use crate::amqp::Settings;
use crate::dead_letters::filter::Filter;
use crate::http::admin::app_state::AppState;
use crate::http::admin::auth::Visitor;
use crate::http::admin::dead_letter_cache::DeadLetterCache;
use crate::http::admin::destination::Destination;
use crate::http::admin::layout::{ErrorPage, Frame, Tab};

/// The dead letters a page is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Target {
    /// All with this fingerprint.
    Group(String),
    /// The one with this id.
    Id(String),
}

impl Target {
    pub(super) fn filter(&self) -> Filter {
        match self {
            Self::Group(fingerprint) => Filter { group: Some(fingerprint.clone()), ..Filter::default() },
            Self::Id(id) => Filter { ids: [id.clone()].into(), ..Filter::default() },
        }
    }

    pub(super) fn value(&self) -> &str {
        match self {
            Self::Group(value) | Self::Id(value) => value,
        }
    }

    /// The name of the field in a URL or a form.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::Group(_) => "group",
            Self::Id(_) => "id",
        }
    }

    pub(super) fn describe(&self) -> Markup {
        match self {
            Self::Group(fingerprint) => html! { "the dead letters " code { (fingerprint) } },
            Self::Id(id) => html! { "the dead letter " code { (id) } },
        }
    }

    /// The path of a page about them.
    pub(super) fn path(&self, destination: &Destination, page: &str) -> String {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair(self.field(), self.value())
            .finish();
        format!("{}?{query}", destination.path(page))
    }

    /// Links to the confirmation pages.
    pub(super) fn actions(&self, destination: &Destination) -> Markup {
        html! {
            a .button.quiet href=(self.path(destination, "dead/replay")) { "Replay…" }
            a .button.quiet href=(self.path(destination, "dead/discard")) { "Discard…" }
        }
    }
}

/// A running destination and its dead letters.
pub(super) struct DeadLetterContext {
    pub(super) destination: Destination,
    pub(super) cache: Arc<DeadLetterCache>,
    pub(super) amqp: Arc<Settings>,
}

impl FromRequestParts<AppState> for DeadLetterContext {
    type Rejection = ErrorPage;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ErrorPage> {
        let destination = Destination::from_request_parts(parts, state).await?;
        let Some(amqp) = destination.handle.runtime.amqp() else {
            let error = "This destination is not running. Its live page shows why.";
            return Err(ErrorPage::new(StatusCode::SERVICE_UNAVAILABLE, error));
        };
        let cache = state.dead_letter_cache(&destination);
        Ok(Self { destination, cache, amqp })
    }
}

impl DeadLetterContext {
    pub(super) fn frame<'a>(&'a self, title: &'a str, visitor: &'a Visitor) -> Frame<'a> {
        Frame::new(title).visitor(visitor).location(&self.destination, Tab::Dead)
    }
}

/// The dead letters cannot be read.
pub(super) fn unavailable(error: String) -> ErrorPage {
    ErrorPage::new(StatusCode::SERVICE_UNAVAILABLE, error)
}

/// The dead letter does not exist, or not any more.
pub(super) fn not_found() -> ErrorPage {
    let error = "Dead letter not found. It was replayed, edited or discarded in the meantime.";
    ErrorPage::new(StatusCode::NOT_FOUND, error)
}
