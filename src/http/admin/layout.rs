//! The frame of all pages, their HTTP headers, and small parts.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::{SignedDuration, Timestamp};
use maud::{DOCTYPE, Markup, html};
use serde::Deserialize;

use crate::http::admin::auth::{CSRF_FIELD, Visitor};
use crate::http::admin::destination::{Destination, HOME};

/// Allows only this site's style sheet, no frames, and no forms to other sites. The referrer policy is `same-origin`:
/// with `no-referrer` browsers send `Origin: null` with this site's forms.
const HEADERS: [(HeaderName, HeaderValue); 8] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("same-origin")),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    (
        HeaderName::from_static("permissions-policy"),
        HeaderValue::from_static("camera=(), geolocation=(), microphone=()"),
    ),
];

/// Adds the security headers.
pub(super) async fn headers(mut response: Response) -> Response {
    response.headers_mut().extend(HEADERS);
    response
}

/// A page of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tab {
    Live,
    Dead,
    Test,
}

impl Tab {
    const ALL: [Self; 3] = [Self::Live, Self::Dead, Self::Test];

    fn title(self) -> &'static str {
        match self {
            Self::Live => "Live",
            Self::Dead => "Dead letters",
            Self::Test => "Test an event",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Live => "",
            Self::Dead => "dead",
            Self::Test => "test",
        }
    }
}

/// The frame around the content of a page.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    title: &'a str,
    visitor: Option<&'a Visitor>,
    location: Option<(&'a Destination, Tab)>,
    /// The interval of automatic reloads.
    refresh: Option<Duration>,
}

impl<'a> Frame<'a> {
    pub(super) fn new(title: &'a str) -> Self {
        Self { title, visitor: None, location: None, refresh: None }
    }

    pub(super) fn visitor(self, visitor: &'a Visitor) -> Self {
        Self { visitor: Some(visitor), ..self }
    }

    pub(super) fn location(self, destination: &'a Destination, tab: Tab) -> Self {
        Self { location: Some((destination, tab)), ..self }
    }

    pub(super) fn refresh(self, refresh: Option<Duration>) -> Self {
        Self { refresh, ..self }
    }

    pub(super) fn around(&self, content: Markup) -> Markup {
        let name = self.location.map_or("close-sync", |(destination, _)| destination.title());
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    @if let Some(refresh) = self.refresh {
                        meta http-equiv="refresh" content=(refresh.as_secs());
                    }
                    title { (self.title) " · " (name) }
                    link rel="stylesheet" href="/page/style.css";
                }
                body {
                    a .skip href="#content" { "Skip to content" }
                    header {
                        p .brand { a href=(HOME) { "close-sync" } }
                        @if let Some((destination, tab)) = self.location { (navigation(destination, tab)) }
                        @if let Some(visitor) = self.visitor.filter(|visitor| visitor.has_session()) {
                            form .who method="post" action="/page/sign-out" {
                                (csrf_token(visitor))
                                span { (visitor.who) }
                                button .quiet type="submit" { "Sign out" }
                            }
                        }
                    }
                    main #content tabindex="-1" {
                        h1 {
                            (self.title)
                            @if let Some(name) = self.location.and_then(|(destination, _)| destination.name.as_deref()) {
                                " " span .of { (name) }
                            }
                        }
                        (content)
                    }
                }
            }
        }
    }
}

fn navigation(destination: &Destination, current: Tab) -> Markup {
    html! {
        nav aria-label="Pages" {
            ul {
                @for tab in Tab::ALL {
                    li {
                        a href=(destination.path(tab.path())) aria-current=[(tab == current).then_some("page")] {
                            (tab.title())
                        }
                    }
                }
            }
        }
    }
}

/// The hidden field with the CSRF token.
pub(super) fn csrf_token(visitor: &Visitor) -> Markup {
    html! { input type="hidden" name=(CSRF_FIELD) value=(visitor.csrf_token); }
}

/// A page with an error message.
#[derive(Debug)]
pub(super) struct ErrorPage {
    status: StatusCode,
    error: Cow<'static, str>,
}

impl ErrorPage {
    pub(super) fn new(status: StatusCode, error: impl Into<Cow<'static, str>>) -> Self {
        Self { status, error: error.into() }
    }

    pub(super) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "Page or destination not found.")
    }
}

impl IntoResponse for ErrorPage {
    fn into_response(self) -> Response {
        let page = Frame::new("Error").around(html! {
            (alert(&self.error))
            p { a href=(HOME) { "Back to the start page" } }
        });
        (self.status, page).into_response()
    }
}

/// `2 min 5 s ago`, with the exact time as a tooltip.
pub(super) fn ago(time: Timestamp) -> Markup {
    let since = Timestamp::now().duration_since(time);
    html! { time datetime=(time) title=(moment(time)) { (span(since)) " ago" } }
}

pub(super) fn moment(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// Renders text between backticks as code.
pub(super) fn prose(text: &str) -> Markup {
    html! {
        @for (index, part) in text.split('`').enumerate() {
            @if index % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// Starts with a capital letter and ends with a full stop.
pub(super) fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", letters.as_str())
}

/// A duration in its two largest units.
pub(super) fn span(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (1.., _, _) => format!("{days} d {} h", hours % 24),
        (_, 1.., _) => format!("{hours} h {} min", minutes % 60),
        (_, _, 1..) => format!("{minutes} min {} s", seconds % 60),
        _ => format!("{seconds} s"),
    }
}

/// The query of pages with live data.
#[derive(Default, Deserialize)]
pub(super) struct RefreshQuery {
    /// Present: no automatic reloads.
    still: Option<String>,
}

impl RefreshQuery {
    /// The interval of reloads, for a page that normally reloads every `every`.
    pub(super) fn refresh(&self, every: Duration) -> Option<Duration> {
        self.still.is_none().then_some(every)
    }
}

/// Says how often the page refreshes, with a link to pause or resume that.
pub(super) fn refresh_notice(refresh: Option<Duration>, path: &str) -> Markup {
    html! {
        p .quiet {
            @match refresh {
                Some(every) => {
                    "Refreshes every " (every.as_secs()) " s. " a href={ (path) "?still=1" } { "Pause" }
                }
                None => { "Automatic refresh is paused. " a href=(path) { "Resume" } }
            }
        }
    }
}

/// An error message. Text between backticks is code.
pub(super) fn alert(error: &str) -> Markup {
    html! { p .notice.bad role="alert" { (prose(error)) } }
}

/// What the operator can do.
pub(super) fn remedy(text: &str) -> Markup {
    html! { p { strong { "What to do: " } (prose(text)) } }
}

/// The heading of a column.
#[derive(Clone, Copy)]
pub(super) enum Column {
    Text(&'static str),
    Number(&'static str),
}

/// A table. Screen readers read its caption.
pub(super) fn table(caption: &str, columns: &[Column], rows: Markup) -> Markup {
    html! {
        div .wide {
            table {
                caption .hidden { (caption) }
                thead {
                    tr {
                        @for column in columns {
                            @match column {
                                Column::Text(name) => { th scope="col" { (name) } }
                                Column::Number(name) => { th .number scope="col" { (name) } }
                            }
                        }
                    }
                }
                tbody { (rows) }
            }
        }
    }
}

/// A table of counts, or the text `none` if it is empty.
pub(super) fn counts(title: &str, none: &str, counts: &[(&str, u64)]) -> Markup {
    html! {
        @if counts.is_empty() { p { (none) } } @else {
            table .counts {
                caption { (title) }
                tbody {
                    @for (label, count) in counts {
                        tr { th scope="row" { (label.replace('_', " ")) } td .number { (count) } }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_shown_in_its_two_largest_units() {
        let cases = [
            (-5, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (3599, "59 min 59 s"),
            (3600 + 119, "1 h 1 min"),
            (86400 * 3 + 7200, "3 d 2 h"),
        ];
        for (seconds, shown) in cases {
            assert_eq!(span(SignedDuration::from_secs(seconds)), shown);
        }
    }

    #[test]
    fn only_text_between_backticks_is_code() {
        let page = prose("set `close.api_key` to <b>").into_string();
        assert_eq!(page, "set <code>close.api_key</code> to &lt;b&gt;");
    }
}
