//! Scripted faults: which requests fail, and how. This only matches requests; `server` applies the effects.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A scripted failure for the requests that match. In JSON:
///
/// ```json
/// {"method": "POST", "path": "/lead/", "times": 1, "effect": {"drop_connection": {"when": "after_commit"}}}
/// ```
///
/// Rate limits and the API key are checked first, so a request with a 401 or 429 does not count. Then the
/// faults are checked in the order in which they were added. The first that is due is applied; the others do
/// not count that request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The HTTP method. Absent: any.
    #[serde(default)]
    pub method: Option<String>,
    /// A prefix of the path below `/api/v1`, such as `/lead/`. Absent: any.
    #[serde(default)]
    pub path: Option<String>,
    /// A text that the request body must contain.
    #[serde(default)]
    pub body: Option<String>,
    /// How many matching requests pass before the first is affected.
    #[serde(default)]
    pub after: u32,
    /// How many are then affected. Absent: all.
    #[serde(default)]
    pub times: Option<u32>,
    /// What happens to the affected requests.
    pub effect: Effect,
}

impl Fault {
    /// An effect on every request. The other methods narrow it down.
    pub fn new(effect: Effect) -> Self {
        Self { method: None, path: None, body: None, after: 0, times: None, effect }
    }

    /// Affects only requests with this method and path prefix.
    #[must_use]
    pub fn on(self, method: &str, path: &str) -> Self {
        Self { method: Some(method.to_owned()), path: Some(path.to_owned()), ..self }
    }

    /// Affects only requests whose body contains this text.
    #[must_use]
    pub fn containing(self, text: &str) -> Self {
        Self { body: Some(text.to_owned()), ..self }
    }

    /// Lets this many matching requests pass first.
    #[must_use]
    pub fn after(self, after: u32) -> Self {
        Self { after, ..self }
    }

    /// Affects at most this many requests.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self { times: Some(times), ..self }
    }

    /// Returns what is invalid about the fault, if anything.
    pub(crate) fn validate(&self) -> Option<String> {
        match self.effect {
            Effect::Status { code, .. } if !(200..=599).contains(&code) => {
                Some(format!("status codes go from 200 to 599: {code}"))
            }
            Effect::RateLimited { retry_after, .. } if Duration::try_from_secs_f64(retry_after).is_err() => {
                Some(format!("not a number of seconds: {retry_after}"))
            }
            Effect::Status { .. }
            | Effect::Timeout { .. }
            | Effect::DropConnection { .. }
            | Effect::RateLimited { .. }
            | Effect::Latency { .. }
            | Effect::Edit { .. } => None,
        }
    }

    fn matches(&self, method: &str, path: &str, body: &str) -> bool {
        self.method.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method))
            && self.path.as_ref().is_none_or(|wanted| starts(path, wanted))
            && self.body.as_ref().is_none_or(|wanted| body.contains(wanted))
    }
}

/// Whether a path below `/api/v1` starts with a prefix. The prefix may include `/api/v1`.
pub(crate) fn starts(path: &str, prefix: &str) -> bool {
    let prefix = prefix.strip_prefix("/api/v1").unwrap_or(prefix);
    path.trim_start_matches('/').starts_with(prefix.trim_start_matches('/'))
}

/// What a fault does to a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Effect {
    /// Answers with this status instead of the real one.
    Status {
        /// The status code, 200 to 599.
        code: u16,
        /// The response body.
        #[serde(default)]
        body: FaultBody,
        /// Whether the request takes effect.
        #[serde(default)]
        when: When,
    },
    /// Keeps the connection open for this long, then closes it without a response.
    Timeout {
        /// Milliseconds.
        ms: u64,
        /// Whether the request takes effect. If so, it does at once.
        #[serde(default)]
        when: When,
    },
    /// Closes the connection without a response.
    DropConnection {
        /// Whether the request takes effect.
        #[serde(default)]
        when: When,
    },
    /// A 429 of a hidden limit, which earlier headers did not show (close-api.md §2).
    RateLimited {
        /// Seconds.
        retry_after: f64,
        /// Whether rate limit headers accompany `Retry-After`. With [`crate::HeaderStyle::Absent`] neither is
        /// sent.
        with_headers: bool,
    },
    /// Delays the request, which then takes effect as usual, even if the client has disconnected.
    Latency {
        /// Milliseconds.
        ms: u64,
    },
    /// Somebody else changes a record right before the request takes effect. It uses no rate limit and is not in the log of
    /// requests. The request then takes effect as usual.
    Edit {
        /// `PUT`, `POST` or `DELETE`.
        method: String,
        /// The path below `/api/v1`, such as `/contact/cont_1/`.
        path: String,
        /// The body of a `PUT` or `POST`.
        #[serde(default)]
        body: Value,
    },
}

/// Whether a failed request takes effect nevertheless.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// It does not take effect.
    #[default]
    BeforeCommit,
    /// It takes effect, but the client does not see that.
    AfterCommit,
}

/// The response body of a scripted status (close-api.md §3).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultBody {
    /// `{"error": "…"}`.
    #[default]
    Json,
    /// An empty body with a JSON content type, as recorded with a 504.
    Empty,
    /// Plain text.
    Text,
    /// The HTML page of a proxy.
    Html,
    /// Exactly this JSON: `{"exactly": {"errors": [], "field-errors": {…}}}`.
    Exactly(Value),
    /// This text with the content type of JSON, for answers that are huge or not JSON: `{"raw": "[[[["}`.
    Raw(String),
}

/// The faults that were added, in order.
#[derive(Debug, Default)]
pub(crate) struct FaultScript {
    faults: Vec<ScriptedFault>,
}

#[derive(Debug)]
struct ScriptedFault {
    fault: Fault,
    seen: u32,
    applied: u32,
}

impl ScriptedFault {
    fn is_exhausted(&self) -> bool {
        self.fault.times.is_some_and(|times| self.applied >= times)
    }
}

impl FaultScript {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.faults.push(ScriptedFault { fault, seen: 0, applied: 0 });
    }

    pub(crate) fn clear(&mut self) {
        self.faults.clear();
    }

    /// The faults that can still affect a request.
    pub(crate) fn remaining(&self) -> Vec<&Fault> {
        self.faults
            .iter()
            .filter(|scripted| !scripted.is_exhausted())
            .map(|scripted| &scripted.fault)
            .collect()
    }

    /// The effect on this request, if any. Counts the request.
    pub(crate) fn next_effect(&mut self, method: &str, path: &str, body: &str) -> Option<Effect> {
        self.faults.retain(|scripted| !scripted.is_exhausted());
        for scripted in self.faults.iter_mut().filter(|scripted| scripted.fault.matches(method, path, body)) {
            scripted.seen = scripted.seen.saturating_add(1);
            if scripted.seen > scripted.fault.after {
                scripted.applied += 1;
                return Some(scripted.fault.effect.clone());
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn latency(ms: u64) -> Fault {
        Fault::new(Effect::Latency { ms })
    }

    #[test]
    fn faults_match_on_method_path_and_body() {
        let lead = latency(1).on("POST", "/lead/");
        for (fault, method, path, body, expected) in [
            (latency(1), "GET", "/me/", "", true),
            (lead.clone(), "POST", "/lead/", "", true),
            (lead.clone(), "POST", "/lead/merge/", "", true),
            (lead.clone(), "PUT", "/lead/lead_1/", "", false),
            (lead.clone(), "POST", "/contact/", "", false),
            (latency(1).on("post", "/api/v1/lead/"), "POST", "/lead/", "", true),
            (lead.clone().containing("acme"), "POST", "/lead/", r#"{"name":"acme"}"#, true),
            (lead.containing("acme"), "POST", "/lead/", r#"{"name":"other"}"#, false),
        ] {
            assert_eq!(fault.matches(method, path, body), expected, "{fault:?} {method} {path} {body}");
        }
    }

    #[test]
    fn faults_apply_in_order_and_respect_after_and_times() {
        let mut script = FaultScript::default();
        script.add(latency(1).on("POST", "/lead/").after(1).times(2));
        script.add(latency(2).on("POST", "/").times(1));
        let mut effects = Vec::new();
        for _ in 0..5 {
            effects.push(script.next_effect("POST", "/lead/", ""));
        }
        let latency = |ms| Some(Effect::Latency { ms });
        assert_eq!(effects, [latency(2), latency(1), latency(1), None, None]);
        assert!(script.remaining().is_empty());
    }

    #[test]
    fn a_fault_without_times_never_ends_until_cleared() {
        let mut script = FaultScript::default();
        script.add(latency(1));
        assert!((0..100).all(|_| script.next_effect("GET", "/me/", "").is_some()));
        assert_eq!(script.remaining().len(), 1);
        script.clear();
        assert_eq!(script.next_effect("GET", "/me/", ""), None);
    }

    #[test]
    fn faults_are_parsed_strictly_from_json() {
        let read = |value| serde_json::from_value::<Fault>(value).map_err(|error| error.to_string());
        assert_eq!(
            read(json!({"method": "POST", "path": "/lead/", "times": 1,
                "effect": {"status": {"code": 504, "body": "empty", "when": "after_commit"}}})),
            Ok(Fault::new(Effect::Status { code: 504, body: FaultBody::Empty, when: When::AfterCommit })
                .on("POST", "/lead/")
                .times(1))
        );
        assert_eq!(
            read(json!({"effect": {"drop_connection": {}}})),
            Ok(Fault::new(Effect::DropConnection { when: When::BeforeCommit }))
        );
        assert!(read(json!({"effect": {"latency": {"ms": 1}}, "tiems": 3})).is_err());
        assert!(read(json!({"effect": {"latency": {"ms": 1, "sec": 3}}})).is_err());
        assert!(read(json!({"effect": {"explode": {}}})).is_err());
        assert!(read(json!({"times": 3})).is_err());
    }

    #[test]
    fn invalid_faults_are_reported() {
        let status =
            |code| Fault::new(Effect::Status { code, body: FaultBody::Json, when: When::BeforeCommit });
        assert_eq!(status(99).validate().as_deref(), Some("status codes go from 200 to 599: 99"));
        assert_eq!(status(503).validate(), None);
        let limited = Effect::RateLimited { retry_after: -1.0, with_headers: true };
        assert!(Fault::new(limited).validate().is_some());
    }
}
