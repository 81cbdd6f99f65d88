//! The frame of all pages, their HTTP headers, and small parts.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::{SignedDuration, Timestamp};
use maud::{DOCTYPE, Markup, html};
use serde::Deserialize;

use crate::http::admin::auth::{CSRF_FIELD, Visitor};
use crate::http::admin::{Destination, HOME};

/// Only the own style sheet, no frames, no forms to other sites. The referrer policy is `same-origin`, because with
/// `no-referrer` browsers send `Origin: null` with the own forms.
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
pub(crate) async fn headers(mut response: Response) -> Response {
    response.headers_mut().extend(HEADERS);
    response
}

/// A page of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tab {
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
pub(crate) struct Frame<'a> {
    pub(crate) title: &'a str,
    pub(crate) visitor: Option<&'a Visitor>,
    /// The destination and the current tab.
    pub(crate) of: Option<(&'a Destination, Tab)>,
    /// The interval of automatic reloads.
    pub(crate) refresh: Option<Duration>,
}

impl Frame<'_> {
    pub(crate) fn around(&self, content: Markup) -> Markup {
        let name = self.of.map_or("close-sync", |(destination, _)| destination.title());
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
                        @if let Some((destination, tab)) = self.of { (navigation(destination, tab)) }
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
                            @if let Some(name) = self.of.and_then(|(destination, _)| destination.name.as_deref()) {
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
pub(crate) fn csrf_token(visitor: &Visitor) -> Markup {
    html! { input type="hidden" name=(CSRF_FIELD) value=(visitor.csrf_token); }
}

/// The sign-in form. A successful sign-in opens the page `to`.
pub(crate) fn sign_in(visitor: &Visitor, to: &str, wrong: Option<&str>) -> Markup {
    let frame = Frame { title: "Sign in", visitor: None, of: None, refresh: None };
    frame.around(html! {
        @if let Some(wrong) = wrong { p .notice.bad role="alert" { (prose(wrong)) } }
        form .card.narrow method="post" action="/page/sign-in" {
            (csrf_token(visitor))
            input type="hidden" name="to" value=(to);
            label for="who" { "Your name" }
            input #who name="who" autocomplete="username" required maxlength="60" aria-describedby="why";
            p #why .hint { "The log records your actions under this name." }
            label for="token" { "Token" }
            input #token name="token" type="password" autocomplete="current-password" required;
            p .hint { "The value of the setting " code { "http.page_token" } "." }
            button type="submit" { "Sign in" }
        }
    })
}

/// A page with an error message.
#[derive(Debug)]
pub(crate) struct ErrorPage {
    status: StatusCode,
    why: Cow<'static, str>,
}

impl ErrorPage {
    pub(crate) fn new(status: StatusCode, why: impl Into<Cow<'static, str>>) -> Self {
        Self { status, why: why.into() }
    }

    pub(crate) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "Page or destination not found.")
    }
}

impl IntoResponse for ErrorPage {
    fn into_response(self) -> Response {
        let frame = Frame { title: "Error", visitor: None, of: None, refresh: None };
        let page = frame.around(html! {
            p .notice.bad role="alert" { (prose(&self.why)) }
            p { a href=(HOME) { "Back to the start page" } }
        });
        (self.status, page).into_response()
    }
}

/// `2 min 5 s ago`, with the exact time as a tooltip.
pub(crate) fn ago(time: Timestamp) -> Markup {
    let since = Timestamp::now().duration_since(time);
    html! { time datetime=(time) title=(moment(time)) { (span(since)) " ago" } }
}

pub(crate) fn moment(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// Renders text between backticks as code.
pub(crate) fn prose(text: &str) -> Markup {
    html! {
        @for (destination, part) in text.split('`').enumerate() {
            @if destination % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// Starts with a capital letter and ends with a full stop.
pub(crate) fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", letters.as_str())
}

/// A duration in its two largest units.
pub(crate) fn span(duration: SignedDuration) -> String {
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
pub(crate) struct RefreshQuery {
    /// Present: no automatic reloads.
    still: Option<String>,
}

impl RefreshQuery {
    /// The interval of reloads, for a page that normally reloads every `every`.
    pub(crate) fn refresh(&self, every: Duration) -> Option<Duration> {
        self.still.is_none().then_some(every)
    }
}

/// Says how often the page refreshes, with a link to pause or resume that.
pub(crate) fn refresh_notice(refresh: Option<Duration>, path: &str) -> Markup {
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

/// A table of counts, or the text `none` if it is empty.
pub(crate) fn counts(title: &str, none: &str, counts: &[(&str, u64)]) -> Markup {
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
