//! Failed calls to Close, classified by what the caller can do.
//!
//! Close answers JSON. Anything else comes from something in front of it, a proxy or a gateway, and says nothing about
//! the API key, the record or the message, whatever its status.
//!
//! Only a few statuses are about the message: 400 and 422, and 413 for a write, whose size is that of its message. No message
//! makes a URL or a header longer, so 414 and 431 are not among them. A status that is not listed here is transient: it
//! may come from a new version of Close or a changed URL, and must not cost messages.

use serde_json::Value;
use strum::Display;

use crate::close::rejection::{MAX_ERROR_BODY, Rejection};

/// A call to Close that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// 401: the API key is wrong or was revoked.
    #[error("Close does not accept the API key (401)")]
    Unauthorized,
    /// 402: the plan of the organization does not allow the call.
    #[error("the plan of the Close organization does not allow this (402)")]
    PlanLimit,
    /// 403: the user of the API key lacks the permission.
    #[error("the user of the API key may not do this (403)")]
    Forbidden,
    /// 404 in Close's words for a record that was deleted (see `close/deletion.rs`).
    #[error("Close does not have the record (404)")]
    NotFound,
    /// 400 and other rejections. The same call would be rejected again.
    #[error("{0}")]
    Rejected(Rejection),
    /// No connection could be made, so nothing was sent.
    #[error("Close cannot be reached: {0}")]
    Unreachable(String),
    /// A later call may succeed.
    #[error("{0}")]
    Transient(Fault),
}

/// A transient fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// 5xx, 408, 409, 421, 423, 425 or 499.
    #[error("Close answered {0}")]
    Status(u16),
    /// Any other status that Close is not known to use for a message.
    #[error("Close answered with a status that it does not use for these calls ({0}); check `close.api_url`")]
    Unexpected(u16),
    #[error("Close did not answer in time")]
    Timeout,
    /// The connection broke during the call.
    #[error("the connection to Close broke")]
    ConnectionLost,
    /// A successful response whose body is not valid.
    #[error("Close sent a response that could not be parsed")]
    InvalidResponse,
    /// A record is larger than [`crate::close::Endpoint`] allows. Close works, and this record stays large.
    #[error("the Lead or Contact in Close is larger than close-sync reads")]
    TooLarge,
    /// 404 for a record whose deletion the event log does not show. The way to Close may be at fault.
    #[error(
        "Close answers 404 for a record, and its event log does not show that it was deleted; check `close.api_url` and the \
         API key"
    )]
    Vanished,
    /// The same for a record that Close has shown or created a moment ago. It may not be there yet.
    #[error("Close does not have a record that it had a moment ago (404)")]
    NotYet,
    /// Whether a Contact is the person depends on emails that Close leaves out.
    #[error("Close does not show the emails of a Contact that may be the person")]
    ListsUnknown,
    /// The answer does not have the form of Close's.
    #[error("{} answered ({status}, {form}); check {}", answerer(*status), suspects(*status))]
    Foreign { status: u16, form: Form },
    /// A 404 of Close for a URL that it does not have.
    #[error("Close does not have this URL (404); check `close.api_url`")]
    UnknownUrl,
    /// 3xx. Close does not redirect the URLs that close-sync uses.
    #[error("redirected to {} ({status}); `close.api_url` is probably wrong", target(host.as_deref()))]
    Redirected { status: u16, host: Option<String> },
}

/// What may have sent an answer that does not have the form of Close's.
fn answerer(status: u16) -> &'static str {
    match status {
        500..=599 => "a gateway of Close, or something between close-sync and Close,",
        _ => "something between close-sync and Close",
    }
}

fn suspects(status: u16) -> &'static str {
    match status {
        500..=599 => "Close's status page, proxies and gateways",
        _ => "proxies, gateways and `close.api_url`",
    }
}

fn target(host: Option<&str>) -> String {
    host.map_or_else(|| "another path".to_owned(), |host| format!("the host \"{host}\""))
}

/// What the body of an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Display)]
pub enum Form {
    #[strum(serialize = "HTML")]
    Html,
    #[strum(serialize = "JSON")]
    Json,
    #[strum(serialize = "text")]
    Text,
    #[strum(serialize = "empty body")]
    Empty,
}

impl Form {
    /// From the start of the body, because a proxy's content type may be anything.
    pub(crate) fn of(body: &[u8]) -> Self {
        match body.trim_ascii_start().first() {
            None => Self::Empty,
            Some(b'<') => Self::Html,
            Some(b'{' | b'[') => Self::Json,
            Some(_) => Self::Text,
        }
    }
}

impl CloseError {
    /// The error type in traces.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::PlanLimit => "plan_limit",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Rejected(_) => "rejected",
            Self::Unreachable(_) => "unreachable",
            Self::Transient(Fault::Status(_)) => "server_error",
            Self::Transient(Fault::Unexpected(_)) => "unexpected_status",
            Self::Transient(Fault::Timeout) => "timeout",
            Self::Transient(Fault::ConnectionLost) => "connection_lost",
            Self::Transient(Fault::InvalidResponse) => "garbled",
            Self::Transient(Fault::TooLarge) => "too_large",
            Self::Transient(Fault::NotYet) => "not_yet",
            Self::Transient(Fault::Vanished) => "vanished",
            Self::Transient(Fault::ListsUnknown) => "lists_unknown",
            Self::Transient(Fault::Foreign { .. }) => "foreign_answer",
            Self::Transient(Fault::UnknownUrl) => "unknown_url",
            Self::Transient(Fault::Redirected { .. }) => "redirected",
        }
    }

    /// The error of an answer whose status is neither 2xx nor 429.
    pub(crate) fn of_answer(answer: &ErrorAnswer<'_>) -> Self {
        let &ErrorAnswer { status, to_write, is_json, location, body } = answer;
        let form = Form::of(body);
        let foreign = || Self::Transient(Fault::Foreign { status, form });
        match status {
            300..=399 => Self::Transient(Fault::Redirected { status, host: host(location) }),
            404 => match general_text(body) {
                Some(text) if text.contains(NO_SUCH_RECORD) => Self::NotFound,
                Some(text) if text.contains(NO_SUCH_URL) => Self::Transient(Fault::UnknownUrl),
                Some(_) | None => foreign(),
            },
            // Close or a proxy: the same write would be too large again. Look-ups have a bounded size.
            413 if to_write => Self::Rejected(Rejection::read(status, body)),
            // An application that fails may send its framework's page, so this may be Close.
            500 => Self::Transient(Fault::Status(status)),
            // Only a proxy asks for this.
            407 => foreign(),
            _ if !is_from_close(status, form, is_json, body) => foreign(),
            401 => Self::Unauthorized,
            402 => Self::PlanLimit,
            403 => Self::Forbidden,
            400 | 422 => Self::Rejected(Rejection::read(status, body)),
            408 | 409 | 421 | 423 | 425 | 499 | 501..=599 => Self::Transient(Fault::Status(status)),
            _ => Self::Transient(Fault::Unexpected(status)),
        }
    }

    /// Whether a retry may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Transient(_) => true,
            Self::Unauthorized | Self::PlanLimit | Self::Forbidden | Self::NotFound | Self::Rejected(_) => {
                false
            }
        }
    }

    /// Whether other messages may fail in the same way, because Close or the way to it does not work. A record of any size
    /// is what producers and people made of it, so it says nothing about other messages.
    pub fn may_be_an_outage(&self) -> bool {
        self.is_retryable() && !matches!(self, Self::Transient(Fault::TooLarge | Fault::NotYet))
    }

    /// Whether a write may have been applied although the call failed. Close has no idempotency keys, so the record must
    /// be looked up before such a POST is repeated (close-api.md §10). Close's own 503 comes from in front of the application
    /// and counts as not applied, as in Close's own client (close-api.md §2). A 408 or 499 means that a server or a proxy
    /// stopped waiting. A proxy may have passed the call on before it answered. An unexpected status proves nothing.
    pub fn may_have_been_applied(&self) -> bool {
        match self {
            Self::Transient(Fault::Status(status)) => !matches!(status, 409 | 421 | 423 | 425 | 503),
            Self::Transient(
                Fault::Foreign { .. }
                | Fault::Unexpected(_)
                | Fault::Timeout
                | Fault::ConnectionLost
                | Fault::InvalidResponse
                | Fault::TooLarge
                | Fault::Redirected { .. },
            ) => true,
            Self::Unauthorized
            | Self::PlanLimit
            | Self::Forbidden
            | Self::NotFound
            | Self::Rejected(_)
            | Self::Unreachable(_)
            | Self::Transient(Fault::NotYet | Fault::Vanished | Fault::ListsUnknown | Fault::UnknownUrl) => {
                false
            }
        }
    }
}

/// An answer with a status that is neither 2xx nor 429.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorAnswer<'a> {
    pub(crate) status: u16,
    /// The call creates or changes a record.
    pub(crate) to_write: bool,
    /// The content type is JSON.
    pub(crate) is_json: bool,
    /// The target of a redirect.
    pub(crate) location: Option<&'a str>,
    pub(crate) body: &'a [u8],
}

/// Close's words for a record that does not exist (close-api.md §15, 5), in lower case.
const NO_SUCH_RECORD: &str = "matching query does not exist";
/// Close's words for a URL that does not exist, in lower case.
const NO_SUCH_URL: &str = "requested url was not found";

/// Whether an answer has a form in which Close answers with this status (close-api.md §3).
fn is_from_close(status: u16, form: Form, is_json: bool, body: &[u8]) -> bool {
    match form {
        // A body that was cut off is not valid any more.
        Form::Json => {
            body.len() >= MAX_ERROR_BODY
                || serde_json::from_slice::<Value>(body).is_ok_and(|body| body.is_object())
        }
        Form::Empty => is_json,
        // Close's own client expects this.
        Form::Text => status == 403 && body.trim_ascii().eq_ignore_ascii_case(b"forbidden"),
        Form::Html => false,
    }
}

/// The general text of an error, in lower case.
fn general_text(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let text = body.get("error").or_else(|| body.get("errors")?.get(0))?;
    Some(text.as_str()?.to_lowercase())
}

/// The host of a URL, if it has only characters of host names.
fn host(url: Option<&str>) -> Option<String> {
    let url = url::Url::parse(url?).ok()?;
    let is_plain = |host: &&str| {
        host.len() <= 100 && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte))
    };
    url.host_str().filter(is_plain).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MISSING: &str = r#"{"error": "Empty query: Lead matching query does not exist."}"#;
    const URL: &str = r#"{"error": "The requested URL was not found on the server. If you entered…"}"#;
    const HTML: &str = "\n<html><body>Blocked</body></html>";
    const DENIED: &str = r#"{"error": "no"}"#;

    fn read(status: u16, body: &str) -> String {
        let answer =
            ErrorAnswer { status, to_write: true, is_json: false, location: None, body: body.as_bytes() };
        let error = CloseError::of_answer(&answer);
        if let CloseError::Transient(Fault::Foreign { status, form }) = error {
            format!("foreign {status} {form}")
        } else {
            error.label().to_owned()
        }
    }

    #[test]
    fn an_answer_that_is_not_closes_is_transient_whatever_its_status() {
        let cases = [
            (401, DENIED, "unauthorized"),
            (402, DENIED, "plan_limit"),
            (403, DENIED, "forbidden"),
            (403, "Forbidden", "forbidden"),
            (401, HTML, "foreign 401 HTML"),
            (402, HTML, "foreign 402 HTML"),
            (403, HTML, "foreign 403 HTML"),
            (403, "Access denied by policy", "foreign 403 text"),
            (401, "", "foreign 401 empty body"),
            (401, "[]", "foreign 401 JSON"),
            (403, "{", "foreign 403 JSON"),
            (407, DENIED, "foreign 407 JSON"),
            (400, HTML, "foreign 400 HTML"),
            (400, DENIED, "rejected"),
            (422, r#"{"detail": []}"#, "rejected"),
            (418, "teapot", "foreign 418 text"),
            (408, HTML, "foreign 408 HTML"),
            (502, HTML, "foreign 502 HTML"),
            (503, "upstream connect error", "foreign 503 text"),
            (504, "", "foreign 504 empty body"),
            (500, HTML, "server_error"),
            (503, DENIED, "server_error"),
        ];
        for (status, body, expected) in cases {
            assert_eq!(read(status, body), expected, "{status} {body}");
        }
        let cut_off = format!("{{\"error\": \"{}", "x".repeat(MAX_ERROR_BODY));
        assert_eq!(read(400, &cut_off), "rejected");
        let empty = |status| {
            let answer = ErrorAnswer { status, to_write: true, is_json: true, location: None, body: b"" };
            CloseError::of_answer(&answer)
        };
        assert_eq!(empty(401), CloseError::Unauthorized);
        assert_eq!(empty(504), CloseError::Transient(Fault::Status(504)), "as recorded");
        let names = |status| CloseError::Transient(Fault::Foreign { status, form: Form::Html }).to_string();
        assert!(names(503).starts_with("a gateway of Close, or something between"), "{}", names(503));
        assert!(names(403).starts_with("something between"), "{}", names(403));
    }

    #[test]
    fn few_statuses_refuse_a_message_and_any_other_is_transient() {
        let of = |status, to_write, body: &str| {
            let body = body.as_bytes();
            CloseError::of_answer(&ErrorAnswer { status, to_write, is_json: true, location: None, body })
        };
        let is_rejected = |error: &CloseError| matches!(error, CloseError::Rejected(_));
        let about_the_key_or_the_record = [401, 402, 403, 404];
        for status in (400..=599).filter(|status| !about_the_key_or_the_record.contains(status)) {
            for to_write in [true, false] {
                let error = of(status, to_write, DENIED);
                let refuses = matches!(status, 400 | 422) || (status == 413 && to_write);
                assert_eq!(is_rejected(&error), refuses, "{status} {error}");
                assert_eq!(error.is_retryable(), !refuses, "{status} {error}");
            }
        }
        assert!(is_rejected(&of(413, true, HTML)), "the limit of a proxy is about the same size");
        for status in [405, 406, 410, 412, 414, 415, 417, 424, 426, 428, 431, 451] {
            let error = of(status, true, DENIED);
            assert_eq!(error, CloseError::Transient(Fault::Unexpected(status)));
            assert!(error.may_have_been_applied() && error.may_be_an_outage(), "{status}");
        }
    }

    #[test]
    fn a_record_is_gone_only_in_closes_words() {
        let cases = [
            (MISSING, "not_found"),
            (r#"{"errors": ["Empty query: Contact matching query does not exist."]}"#, "not_found"),
            (URL, "unknown_url"),
            (HTML, "foreign 404 HTML"),
            (r#"{"message": "no Route matched with those values"}"#, "foreign 404 JSON"),
            (r#"{"error": {"message": "Not Found"}}"#, "foreign 404 JSON"),
            ("Not Found", "foreign 404 text"),
            ("", "foreign 404 empty body"),
        ];
        for (body, expected) in cases {
            assert_eq!(read(404, body), expected, "{body}");
        }
    }

    #[test]
    fn statuses_that_pass_are_transient_and_some_may_have_been_applied() {
        let cases = [
            (408, true),
            (499, true),
            (500, true),
            (504, true),
            (409, false),
            (421, false),
            (423, false),
            (425, false),
            (503, false),
        ];
        for (status, applied) in cases {
            let body = DENIED.as_bytes();
            let answer = ErrorAnswer { status, to_write: true, is_json: true, location: None, body };
            let error = CloseError::of_answer(&answer);
            assert_eq!(error, CloseError::Transient(Fault::Status(status)));
            assert!(error.is_retryable() && error.may_be_an_outage());
            assert_eq!(error.may_have_been_applied(), applied, "{status}");
        }
        // A mesh answers so, too, when it lost a call that it had passed on.
        let proxy = Fault::Foreign { status: 503, form: Form::Text };
        for fault in [Fault::Timeout, Fault::ConnectionLost, Fault::InvalidResponse, proxy] {
            assert!(CloseError::Transient(fault).may_have_been_applied());
        }
        assert!(!CloseError::Unreachable(String::new()).may_have_been_applied());
        assert!(!CloseError::NotFound.may_have_been_applied());
    }

    #[test]
    fn a_redirect_names_only_a_host() {
        let text = |location| {
            let answer = ErrorAnswer { status: 301, to_write: false, is_json: false, location, body: b"" };
            CloseError::of_answer(&answer).to_string()
        };
        let wrong = "`close.api_url` is probably wrong";
        assert_eq!(
            text(Some("https://user:secret@app.close.test/login?token=t")),
            format!("redirected to the host \"app.close.test\" (301); {wrong}")
        );
        for location in [None, Some("/api/v2/me/"), Some("https://x\u{1b}[2J.test/"), Some("not a url")] {
            let text = text(location);
            assert_eq!(text, format!("redirected to another path (301); {wrong}"), "{location:?}");
        }
    }
}
