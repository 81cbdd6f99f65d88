//! API calls and answers, independent of HTTP, and the log of requests.

use std::collections::VecDeque;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::faults::{self, FaultBody};
use crate::refusal::Refusal;

/// The parts of an HTTP request that matter to the API.
#[derive(Debug, Default)]
pub(crate) struct Call {
    pub(crate) method: String,
    /// The path below `/api/v1`.
    pub(crate) path: String,
    pub(crate) query: Vec<(String, String)>,
    /// The user name of HTTP Basic.
    pub(crate) key: String,
    pub(crate) is_json: bool,
    pub(crate) is_chunked: bool,
    /// The body, unless it was too large to read.
    pub(crate) body: Option<String>,
}

impl Call {
    /// The GET that a POST with a method override stands for: its parameters are in `_params` of the body. A POST with
    /// another body stays as it is.
    pub(crate) fn overridden(self) -> Self {
        let body: Value = serde_json::from_str(self.body.as_deref().unwrap_or_default()).unwrap_or_default();
        let Some(parameters) = body["_params"].as_object().filter(|_| self.method == "POST") else {
            return self;
        };
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let joined = |value: &Value| match value.as_array() {
            Some(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
            None => text(value),
        };
        let query = parameters.iter().map(|(name, value)| (name.clone(), joined(value))).collect();
        Self { method: "GET".into(), query, is_json: false, body: Some(String::new()), ..self }
    }

    /// Parses a query string.
    pub(crate) fn parameters(query: &str) -> Vec<(String, String)> {
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) payload: Payload,
    pub(crate) headers: Vec<(&'static str, String)>,
}

/// The body of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Payload {
    Json(Value),
    /// An empty body with the content type of JSON.
    Empty,
    Raw(String),
    Text(&'static str),
    Html(&'static str),
}

impl Payload {
    /// The content type and the text.
    pub(crate) fn encode(&self) -> (&'static str, String) {
        match self {
            Self::Json(value) => ("application/json", value.to_string()),
            Self::Empty => ("application/json", String::new()),
            Self::Raw(text) => ("application/json", text.clone()),
            Self::Text(text) => ("text/plain; charset=utf-8", (*text).to_owned()),
            Self::Html(text) => ("text/html; charset=utf-8", (*text).to_owned()),
        }
    }
}

impl Answer {
    pub(crate) fn json(status: u16, body: Value) -> Self {
        Self { status, payload: Payload::Json(body), headers: Vec::new() }
    }

    pub(crate) fn error(status: u16, text: &str) -> Self {
        Self::json(status, json!({"error": text}))
    }

    /// The answer of a scripted fault.
    pub(crate) fn scripted(status: u16, body: FaultBody) -> Self {
        let payload = match body {
            FaultBody::Json => Payload::Json(json!({"error": "A scripted fault."})),
            FaultBody::Exactly(body) => Payload::Json(body),
            FaultBody::Empty => Payload::Empty,
            FaultBody::Raw(text) => Payload::Raw(text),
            FaultBody::Text if status == 403 => Payload::Text("Forbidden"),
            FaultBody::Text => Payload::Text("upstream connect error or disconnect/reset before headers"),
            FaultBody::Html => Payload::Html("<html><body><h1>Service unavailable</h1></body></html>"),
        };
        Self { status, payload, headers: Vec::new() }
    }

    /// Adds headers.
    pub(crate) fn with(mut self, headers: Vec<(&'static str, String)>) -> Self {
        self.headers.extend(headers);
        self
    }
}

impl From<Result<Value, Refusal>> for Answer {
    fn from(result: Result<Value, Refusal>) -> Self {
        match result {
            Ok(value) => Self::json(200, value),
            Err(refusal) => Self::json(refusal.status(), refusal.body()),
        }
    }
}

/// A logged request, answered or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The HTTP method.
    pub method: String,
    /// The path below `/api/v1`, such as `/lead/`.
    pub path: String,
    /// The status of the answer. None if there was no answer, or not yet.
    pub status: Option<u16>,
    /// When the request arrived.
    pub at: Timestamp,
}

/// The most recent requests, oldest first.
#[derive(Debug, Default)]
pub(crate) struct RequestLog {
    requests: VecDeque<Request>,
    forgotten: u64,
}

impl RequestLog {
    const KEPT: usize = 100_000;

    pub(crate) fn push(&mut self, call: &Call, at: Timestamp) -> u64 {
        if self.requests.len() == Self::KEPT {
            self.requests.pop_front();
            self.forgotten += 1;
        }
        let (method, path) = (call.method.clone(), call.path.clone());
        self.requests.push_back(Request { method, path, status: None, at });
        self.forgotten + self.requests.len() as u64 - 1
    }

    /// Records the status of the answer. `number` comes from `push`.
    pub(crate) fn answered(&mut self, number: u64, status: u16) {
        let index = number.checked_sub(self.forgotten).and_then(|index| usize::try_from(index).ok());
        if let Some(request) = index.and_then(|index| self.requests.get_mut(index)) {
            request.status = Some(status);
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter()
    }
}

/// The number of requests with this method and path prefix.
pub(crate) fn count<'a>(
    requests: impl Iterator<Item = &'a Request>,
    method: &str,
    path_prefix: &str,
) -> usize {
    requests
        .filter(|request| {
            request.method.eq_ignore_ascii_case(method) && faults::starts(&request.path, path_prefix)
        })
        .count()
}
