//! Everything the simulator knows, and how it answers a call: pure state, given the time.
//!
//! A call comes in two steps, because a fault may lie between them: `admit` decides whether it gets through,
//! and `serve` lets it take effect.

use std::{collections::VecDeque, time::Duration};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::faults::{self, Effect, FaultBody, Script};
use crate::ids::Ids;
use crate::limits::{Group, Limiter, Standing, Verdict};
use crate::records::Records;
use crate::schema::{Kind, Owner};
use crate::search::{self, Cursors};
use crate::settings::{BusyBody, CreatedLead, HeaderStyle, Lag, MissingSlash, Settings};
use crate::validate::{Object, Refusal};

/// A request as far as the API is concerned.
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
    /// The parameters of a query.
    pub(crate) fn parameters(query: &str) -> Vec<(String, String)> {
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect()
    }
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) payload: Payload,
    pub(crate) headers: Vec<(&'static str, String)>,
}

/// What an answer carries.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Payload {
    Json(Value),
    /// Nothing, called JSON all the same.
    Empty,
    Text(&'static str),
    Html(&'static str),
}

impl Payload {
    /// What it is called, and its text.
    pub(crate) fn written(&self) -> (&'static str, String) {
        match self {
            Self::Json(value) => ("application/json", value.to_string()),
            Self::Empty => ("application/json", String::new()),
            Self::Text(text) => ("text/plain; charset=utf-8", (*text).to_owned()),
            Self::Html(text) => ("text/html; charset=utf-8", (*text).to_owned()),
        }
    }
}

impl Answer {
    fn json(status: u16, body: Value) -> Self {
        Self { status, payload: Payload::Json(body), headers: Vec::new() }
    }

    fn error(status: u16, text: &str) -> Self {
        Self::json(status, json!({"error": text}))
    }

    /// The answer of a scripted fault.
    pub(crate) fn scripted(status: u16, body: FaultBody) -> Self {
        let payload = match body {
            FaultBody::Json => Payload::Json(json!({"error": "A scripted fault."})),
            FaultBody::Exactly(body) => Payload::Json(body),
            FaultBody::Empty => Payload::Empty,
            FaultBody::Text if status == 403 => Payload::Text("Forbidden"),
            FaultBody::Text => Payload::Text("upstream connect error or disconnect/reset before headers"),
            FaultBody::Html => Payload::Html("<html><body><h1>Service unavailable</h1></body></html>"),
        };
        Self { status, payload, headers: Vec::new() }
    }

    /// The same answer with these headers too.
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

/// A request that was made, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The HTTP method.
    pub method: String,
    /// The path below `/api/v1`, such as `/lead/`.
    pub path: String,
    /// The status of the answer; none if it was not, or not yet, answered.
    pub status: Option<u16>,
    /// When it came.
    pub at: Timestamp,
}

/// The last requests, oldest first.
#[derive(Debug, Default)]
pub(crate) struct RequestLog {
    requests: VecDeque<Request>,
    forgotten: u64,
}

impl RequestLog {
    const KEPT: usize = 100_000;

    fn push(&mut self, call: &Call, at: Timestamp) -> u64 {
        if self.requests.len() == Self::KEPT {
            self.requests.pop_front();
            self.forgotten += 1;
        }
        let (method, path) = (call.method.clone(), call.path.clone());
        self.requests.push_back(Request { method, path, status: None, at });
        self.forgotten + self.requests.len() as u64 - 1
    }

    /// Notes the answer to a request by the number `push` gave it.
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

/// What becomes of a call at the door.
#[derive(Debug)]
pub(crate) struct Admission {
    /// Its number in the request log.
    pub(crate) number: u64,
    /// Headers that every answer to it carries.
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) decision: Decision,
}

/// Whether a call gets through.
#[derive(Debug)]
pub(crate) enum Decision {
    /// No: this is the answer.
    Turned(Answer),
    /// Yes, though something may befall it.
    Through(Option<Effect>),
}

/// The simulated organisation with its API.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) book: Records,
    pub(crate) faults: Script,
    pub(crate) requests: RequestLog,
    limiter: Limiter,
    cursors: Cursors,
}

impl World {
    pub(crate) fn new(settings: Settings, ids: Ids, now: Timestamp) -> Self {
        Self {
            book: Records::new(&settings, ids, now),
            settings,
            faults: Script::default(),
            requests: RequestLog::default(),
            limiter: Limiter::default(),
            cursors: Cursors::default(),
        }
    }

    /// Creates a record as a POST would, but visible to search at once.
    pub(crate) fn seed(&mut self, kind: Kind, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let lag = std::mem::replace(&mut self.book.search_lag, Lag::NONE);
        let created = match kind {
            Kind::Lead => self.book.create_lead(body, now),
            Kind::Contact => self.book.create_contact(body, now),
        };
        self.book.search_lag = lag;
        created
    }

    /// Deletes a record of either kind. Returns whether there was one.
    pub(crate) fn delete_any(&mut self, id: &str, now: Timestamp) -> bool {
        let kind = self.book.kind_of(id);
        kind.is_some_and(|kind| self.book.delete(kind, id, now).is_ok())
    }

    /// Spends a token, then checks the key, the form of the request, and the script. Whoever is refused for
    /// any later reason has spent the token (close-api.md §2).
    pub(crate) fn admit(&mut self, call: &Call, now: Timestamp) -> Admission {
        let number = self.requests.push(call, now);
        let known = self.settings.api_key == call.key || self.settings.more_api_keys.contains(&call.key);
        let group = Group::of(&call.method, &call.path);
        let style = self.settings.header_style;
        let standing = match self.limiter.spend(&self.settings.limits, &call.key, known, &group, now) {
            Verdict::Allowed(standing) => standing,
            Verdict::Refused(standing) => {
                let decision = Decision::Turned(self.busy(&standing));
                return Admission { number, headers: standing.headers(style), decision };
            }
        };
        let headers = standing.headers(style);
        if let Some(answer) = self.turned_away(call, known) {
            return Admission { number, headers, decision: Decision::Turned(answer) };
        }
        let body = call.body.as_deref().unwrap_or_default();
        match self.faults.strike(&call.method, &call.path, body) {
            Some(Effect::RateLimited { retry_after, with_headers }) => {
                let hidden =
                    standing.resetting_in(Duration::try_from_secs_f64(retry_after).unwrap_or_default());
                let headers = if with_headers { hidden.headers(style) } else { Vec::new() };
                Admission { number, headers, decision: Decision::Turned(self.busy(&hidden)) }
            }
            effect => Admission { number, headers, decision: Decision::Through(effect) },
        }
    }

    /// The 429 for a bucket that stands so.
    fn busy(&self, standing: &Standing) -> Answer {
        let payload = match self.settings.busy_body {
            BusyBody::Nested => Payload::Json(json!({"error": standing.details(true)})),
            BusyBody::Flat => Payload::Json(standing.details(false)),
            BusyBody::Empty => Payload::Empty,
            BusyBody::Text => Payload::Text("Too Many Requests"),
        };
        let headers = match self.settings.header_style {
            HeaderStyle::Absent => Vec::new(),
            HeaderStyle::Comma | HeaderStyle::Semicolon | HeaderStyle::Legacy | HeaderStyle::Proxy => {
                vec![("retry-after", standing.retry_after())]
            }
        };
        Answer { status: 429, payload, headers }
    }

    fn turned_away(&self, call: &Call, known: bool) -> Option<Answer> {
        if !known {
            return Some(Answer::error(
                401,
                "The server could not verify that you are authorized to access the URL requested.",
            ));
        }
        if !call.path.ends_with('/') {
            return Some(match self.settings.missing_slash {
                MissingSlash::NotFound => not_found(),
                MissingSlash::Redirected => {
                    let location = format!("/api/v1{}/", call.path);
                    Answer { status: 301, payload: Payload::Empty, headers: vec![("location", location)] }
                }
            });
        }
        if call.is_chunked {
            return Some(Answer::error(400, "Chunked Transfer-Encoding is not supported."));
        }
        if call.body.is_none() {
            return Some(Answer::error(413, "The request is too large."));
        }
        None
    }

    /// Lets a call take effect.
    pub(crate) fn serve(&mut self, call: &Call, now: Timestamp) -> Answer {
        self.book.index.catch_up(now);
        let segments: Vec<&str> = call.path.trim_matches('/').split('/').collect();
        match (call.method.as_str(), segments.as_slice()) {
            ("GET", ["me"]) => Ok(fields_of(call, self.book.schema.me())).into(),
            ("GET", ["user"]) => self.users(call).into(),
            ("GET", ["user", id]) => self.book.schema.user_by_id(id).map(|user| fields_of(call, user)).into(),
            ("GET", ["event"]) => self.book.events.page(&call.query, now).into(),
            ("GET", ["status", "lead"]) => Ok(self.book.schema.statuses()).into(),
            ("POST", ["data", "search"]) => self.with_body(call, |world, body| world.search(body, now)),
            ("POST", ["lead", "merge"]) => self.with_body(call, |world, body| world.merge(body, now)),
            (method @ ("GET" | "POST"), ["custom_field", owner]) => self.custom_fields(call, method, owner),
            ("GET", ["custom_field_schema", kind]) => match Kind::parse(kind) {
                Some(kind) => Ok(self.book.schema.custom_field_schema(kind)).into(),
                None => not_found(),
            },
            (method, [kind]) => match Kind::parse(kind) {
                Some(kind) => self.collection(call, method, kind, now),
                None => wrong_place(&segments),
            },
            (method, [kind, id]) => match Kind::parse(kind) {
                Some(kind) => self.record(call, method, kind, id, now),
                None => wrong_place(&segments),
            },
            _ => wrong_place(&segments),
        }
    }

    fn collection(&mut self, call: &Call, method: &str, kind: Kind, now: Timestamp) -> Answer {
        match (method, kind) {
            ("GET", _) => self.list(call, kind).into(),
            ("POST", Kind::Lead) => self.with_body(call, |world, body| {
                let mut lead = world.book.create_lead(body, now)?;
                if let Some(lead) = lead.as_object_mut() {
                    match world.settings.created_lead {
                        CreatedLead::Whole => None,
                        CreatedLead::WithoutContactIds => lead.remove("contact_ids"),
                        CreatedLead::WithoutContacts => lead.remove("contacts"),
                    };
                }
                Ok(fields_of(call, lead))
            }),
            ("POST", Kind::Contact) => {
                self.with_body(call, |world, body| Ok(fields_of(call, world.book.create_contact(body, now)?)))
            }
            _ => wrong_method(),
        }
    }

    fn record(&mut self, call: &Call, method: &str, kind: Kind, id: &str, now: Timestamp) -> Answer {
        match method {
            "GET" => self.book.get(kind, id).map(|record| fields_of(call, record)).into(),
            "PUT" => self
                .with_body(call, |world, body| Ok(fields_of(call, world.book.update(kind, id, body, now)?))),
            "DELETE" => self.book.delete(kind, id, now).map(|()| json!({})).into(),
            _ => wrong_method(),
        }
    }

    fn custom_fields(&mut self, call: &Call, method: &str, owner: &str) -> Answer {
        let owner = match owner {
            "lead" => Owner::Lead,
            "contact" => Owner::Contact,
            "shared" => Owner::Shared,
            _ => return not_found(),
        };
        if method == "POST" {
            return self.with_body(call, |world, body| world.book.create_field(owner, body));
        }
        page(call, self.book.schema.custom_fields(owner)).into()
    }

    fn users(&self, call: &Call) -> Result<Value, Refusal> {
        check_parameters(call, &[])?;
        page(call, self.book.schema.user_list())
    }

    /// A list, newest first.
    fn list(&self, call: &Call, kind: Kind) -> Result<Value, Refusal> {
        let filters: &[&str] = match kind {
            Kind::Lead => &[],
            Kind::Contact => &["lead_id"],
        };
        check_parameters(call, filters)?;
        let mut records = if self.settings.lists_from_index {
            let documents = self.book.index.documents().filter(|document| document.kind == kind);
            let mut records: Vec<Value> = documents.map(|document| (*document.value).clone()).collect();
            records.sort_by_key(|record| record["date_created"].as_str().map(str::to_owned));
            records
        } else {
            self.book.all(kind)
        };
        records.reverse();
        if let Some(lead_id) = parameter(call, "lead_id") {
            records.retain(|contact| contact["lead_id"] == *lead_id);
        }
        page(call, records)
    }

    fn search(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let token = self.book.token();
        let Records { schema, index, .. } = &self.book;
        search::search(body, schema, self.settings.exact_value, index, &mut self.cursors, token, now)
    }

    fn merge(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let id = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or_default();
        self.book.merge(id("source"), id("destination"), now)?;
        Ok(json!({"status": "ok"}))
    }

    /// Hands a call's JSON object on, or refuses the body (close-api.md §3).
    fn with_body(
        &mut self,
        call: &Call,
        then: impl FnOnce(&mut Self, &Object) -> Result<Value, Refusal>,
    ) -> Answer {
        if !call.is_json {
            return Answer::error(415, "The request must have the header 'Content-Type: application/json'.");
        }
        match serde_json::from_str(call.body.as_deref().unwrap_or_default()) {
            Ok(Value::Object(body)) => then(self, &body).into(),
            Ok(_) => Answer::error(400, "JSON data must be a dict."),
            Err(_) => Answer::error(400, "The request contains invalid JSON."),
        }
    }
}

fn not_found() -> Answer {
    Answer::error(404, "The requested URL was not found on the server.")
}

fn wrong_method() -> Answer {
    Answer::error(405, "The method is not allowed for the requested URL.")
}

/// 405 for the places that exist, 404 for the others.
fn wrong_place(segments: &[&str]) -> Answer {
    match segments {
        ["me" | "event" | "user"]
        | ["status", "lead"]
        | ["data", "search"]
        | ["lead", "merge"]
        | ["user" | "custom_field" | "custom_field_schema", _] => wrong_method(),
        _ => not_found(),
    }
}

fn parameter<'a>(call: &'a Call, name: &str) -> Option<&'a String> {
    call.query.iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

/// Refuses unsupported filters rather than ignoring them, lest everything be taken for a match.
fn check_parameters(call: &Call, filters: &[&str]) -> Result<(), Refusal> {
    const EVERYWHERE: [&str; 3] = ["_limit", "_skip", "_fields"];
    let strange = |name: &str| !EVERYWHERE.contains(&name) && !filters.contains(&name);
    match call.query.iter().find(|(name, _)| strange(name)) {
        Some((name, _)) => {
            Err(Refusal::Malformed(format!("The simulator does not know the parameter {name} here.")))
        }
        None => Ok(()),
    }
}

/// The record with nothing but the fields asked for.
fn fields_of(call: &Call, record: Value) -> Value {
    match parameter(call, "_fields") {
        Some(names) => Value::Object(search::select(&record, &names.split(',').collect::<Vec<_>>())),
        None => record,
    }
}

/// One page by `_skip` and `_limit`, in Close's envelope (close-api.md §1).
fn page(call: &Call, mut rows: Vec<Value>) -> Result<Value, Refusal> {
    const MOST: usize = 200;
    let number = |name: &str, default: usize| {
        let parse = |text: &String| {
            text.parse().map_err(|_| Refusal::Malformed(format!("Invalid value for {name}: {text}")))
        };
        parameter(call, name).map_or(Ok(default), parse)
    };
    let (skip, limit) = (number("_skip", 0)?, number("_limit", 100)?);
    if limit > MOST {
        return Err(Refusal::too_many(MOST));
    }
    rows.drain(..skip.min(rows.len()));
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    let rows: Vec<Value> = rows.into_iter().map(|row| fields_of(call, row)).collect();
    Ok(json!({"data": rows, "has_more": has_more}))
}

/// How many of the requests have this method and begin with this path.
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
