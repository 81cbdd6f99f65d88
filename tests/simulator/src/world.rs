//! The whole state of the simulator, and how it answers a call. Pure state: the caller passes the time.
//!
//! A call has two steps, because a fault may happen between them: `admit` decides whether it is accepted, and
//! `serve` executes it.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::behaviour::{Behaviour, CreatedLead, HeaderStyle, Lag, MissingSlash, RateLimitBody};
use crate::call::{Answer, Call, Payload, RequestLog};
use crate::faults::{Effect, FaultBody, FaultScript};
use crate::forms;
use crate::ids::Ids;
use crate::limits::{BucketState, Group, Limiter, Limits, Verdict};
use crate::lists::{self, select_fields};
use crate::omissions;
use crate::readback;
use crate::records::Records;
use crate::refusal::{Object, Refusal};
use crate::schema::{Kind, Owner};
use crate::search::{self, Cursors};
use crate::settings::Settings;

/// The result of admitting a call.
#[derive(Debug)]
pub(crate) struct Admission {
    /// The number of the call in the request log.
    pub(crate) number: u64,
    /// Headers for every answer to the call.
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) decision: Decision,
}

/// Whether a call is accepted.
#[derive(Debug)]
pub(crate) enum Decision {
    /// The call is rejected with this answer.
    Rejected(Answer),
    /// The call may be executed, possibly with the effect of a fault.
    Accepted(Option<Effect>),
}

/// The simulated organization with its API.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) api_key: String,
    more_api_keys: Vec<String>,
    pub(crate) limits: Limits,
    pub(crate) max_body_bytes: usize,
    pub(crate) records: Records,
    pub(crate) faults: FaultScript,
    pub(crate) requests: RequestLog,
    limiter: Limiter,
    cursors: Cursors,
}

impl World {
    pub(crate) fn new(settings: Settings, ids: Ids, now: Timestamp) -> Self {
        Self {
            records: Records::new(&settings, ids, now),
            api_key: settings.api_key,
            more_api_keys: settings.more_api_keys,
            limits: settings.limits,
            max_body_bytes: settings.max_body_bytes,
            faults: FaultScript::default(),
            requests: RequestLog::default(),
            limiter: Limiter::default(),
            cursors: Cursors::default(),
        }
    }

    fn behaviour(&self) -> &Behaviour {
        &self.records.schema.behaviour
    }

    /// Creates a record as a POST does, but visible to search at once.
    pub(crate) fn add_indexed(
        &mut self,
        kind: Kind,
        body: &Object,
        now: Timestamp,
    ) -> Result<Value, Refusal> {
        let behaviour = &mut self.records.schema.behaviour;
        let lag = std::mem::replace(&mut behaviour.search_lag, Lag::NONE);
        let creation_lag = std::mem::take(&mut behaviour.creation_search_lag);
        let created = match kind {
            Kind::Lead => self.records.create_lead(body, now),
            Kind::Contact => self.records.create_contact(body, now),
        };
        let behaviour = &mut self.records.schema.behaviour;
        (behaviour.search_lag, behaviour.creation_search_lag) = (lag, creation_lag);
        created
    }

    /// Deletes a record of either kind. Returns whether it existed.
    pub(crate) fn delete_any(&mut self, id: &str, now: Timestamp) -> bool {
        let kind = self.records.kind_of(id);
        kind.is_some_and(|kind| self.records.delete(kind, id, now).is_ok())
    }

    /// Takes a rate limit token, then checks the key, the format of the request, and the scripted faults. A
    /// request that is refused later has still used its token (close-api.md §2).
    pub(crate) fn admit(&mut self, call: &Call, now: Timestamp) -> Admission {
        let number = self.requests.push(call, now);
        let known = self.api_key == call.key || self.more_api_keys.contains(&call.key);
        let group = Group::of(&call.method, &call.path);
        let style = self.behaviour().header_style;
        let bucket = match self.limiter.acquire(&self.limits, &call.key, known, &group, now) {
            Verdict::Allowed(bucket) => bucket,
            Verdict::Refused(bucket) => {
                let decision = Decision::Rejected(self.too_many_requests(&bucket));
                return Admission { number, headers: bucket.headers(style), decision };
            }
        };
        let headers = bucket.headers(style);
        if let Some(answer) = self.reject(call, known) {
            return Admission { number, headers, decision: Decision::Rejected(answer) };
        }
        let body = call.body.as_deref().unwrap_or_default();
        match self.faults.next_effect(&call.method, &call.path, body) {
            Some(Effect::RateLimited { retry_after, with_headers }) => {
                let hidden = bucket.with_reset(Duration::try_from_secs_f64(retry_after).unwrap_or_default());
                let headers = if with_headers { hidden.headers(style) } else { Vec::new() };
                Admission { number, headers, decision: Decision::Rejected(self.too_many_requests(&hidden)) }
            }
            Some(Effect::Edit { method, path, body }) => {
                let body = Some(body.to_string());
                self.execute(&Call { method, path, is_json: true, body, ..Call::default() }, now);
                Admission { number, headers, decision: Decision::Accepted(None) }
            }
            effect => Admission { number, headers, decision: Decision::Accepted(effect) },
        }
    }

    /// The 429 for a bucket in this state.
    fn too_many_requests(&self, bucket: &BucketState) -> Answer {
        let payload = match self.behaviour().rate_limit_body {
            RateLimitBody::Nested => Payload::Json(json!({"error": bucket.details(true)})),
            RateLimitBody::Flat => Payload::Json(bucket.details(false)),
            RateLimitBody::Empty => Payload::Empty,
            RateLimitBody::Text => Payload::Text("Too Many Requests"),
        };
        let headers = match self.behaviour().header_style {
            HeaderStyle::Absent => Vec::new(),
            HeaderStyle::Comma
            | HeaderStyle::Semicolon
            | HeaderStyle::SemicolonAndTriple
            | HeaderStyle::UnreadableAndTriple
            | HeaderStyle::Legacy
            | HeaderStyle::Proxy => vec![("retry-after", bucket.retry_after())],
        };
        Answer { status: 429, payload, headers }
    }

    fn reject(&self, call: &Call, known: bool) -> Option<Answer> {
        if !known {
            return Some(Answer::error(
                401,
                "The server could not verify that you are authorized to access the URL requested.",
            ));
        }
        if !call.path.ends_with('/') {
            return Some(match self.behaviour().missing_slash {
                MissingSlash::NotFound => forms::of(not_found(), self.behaviour()),
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

    /// The answer of a scripted fault.
    pub(crate) fn scripted(&self, status: u16, body: FaultBody) -> Answer {
        let wait = self.behaviour().retry_after.filter(|_| status == 503);
        let headers = wait.map(|wait| ("retry-after", wait.to_string()));
        Answer::scripted(status, body).with(headers.into_iter().collect())
    }

    /// Executes a call.
    pub(crate) fn serve(&mut self, call: &Call, now: Timestamp) -> Answer {
        let mut answer = self.execute(call, now);
        if let Answer { status: 200, payload: Payload::Json(value), .. } = &mut answer {
            readback::rewrite(value, &self.records.schema);
        }
        forms::of(answer, self.behaviour())
    }

    fn execute(&mut self, call: &Call, now: Timestamp) -> Answer {
        self.records.index.apply_due(now);
        let segments: Vec<&str> = call.path.trim_matches('/').split('/').collect();
        match (call.method.as_str(), segments.as_slice()) {
            ("GET", ["me"]) => Ok(select_fields(call, self.records.schema.me())).into(),
            ("GET", ["user"]) => self.users(call).into(),
            ("GET", ["user", id]) => {
                self.records.schema.user_by_id(id).map(|user| select_fields(call, user)).into()
            }
            ("GET", ["event"]) => {
                self.records.events.page(&call.query, self.behaviour().event_data, now).into()
            }
            ("GET", ["status", "lead"]) => Ok(self.records.schema.statuses()).into(),
            ("POST", ["data", "search"]) => self.with_body(call, |world, body| world.search(body, now)),
            ("POST", ["lead", "merge"]) => self.with_body(call, |world, body| world.merge(body, now)),
            (method @ ("GET" | "POST"), ["custom_field", owner]) => self.custom_fields(call, method, owner),
            ("GET", ["custom_field_schema", kind]) => match Kind::parse(kind) {
                Some(kind) => Ok(self.records.schema.custom_field_schema(kind)).into(),
                None => not_found(),
            },
            (method, [kind]) => match Kind::parse(kind) {
                Some(kind) => self.collection(call, method, kind, now),
                None => unknown_route(&segments),
            },
            (method, [kind, id]) => match Kind::parse(kind) {
                Some(kind) => self.record(call, method, kind, id, now),
                None => unknown_route(&segments),
            },
            _ => unknown_route(&segments),
        }
    }

    fn collection(&mut self, call: &Call, method: &str, kind: Kind, now: Timestamp) -> Answer {
        match (method, kind) {
            ("GET", _) => lists::records(call, kind, &self.records).into(),
            ("POST", Kind::Lead) => self.with_body(call, |world, body| {
                let mut lead = world.records.create_lead(body, now)?;
                if let Some(lead) = lead.as_object_mut() {
                    match world.behaviour().created_lead {
                        CreatedLead::Whole => None,
                        CreatedLead::WithoutContactIds => lead.remove("contact_ids"),
                        CreatedLead::WithoutContacts => lead.remove("contacts"),
                    };
                }
                Ok(select_fields(call, world.shown(lead)))
            }),
            ("POST", Kind::Contact) => self.with_body(call, |world, body| {
                let contact = world.records.create_contact(body, now)?;
                Ok(select_fields(call, world.shown(contact)))
            }),
            _ => method_not_allowed(),
        }
    }

    fn record(&mut self, call: &Call, method: &str, kind: Kind, id: &str, now: Timestamp) -> Answer {
        match method {
            "GET" => {
                let record = self.records.read(kind, id, now);
                record.map(|record| select_fields(call, self.shown(record))).into()
            }
            "PUT" => self.with_body(call, |world, body| {
                let record = world.records.update(kind, id, body, now)?;
                Ok(select_fields(call, world.shown(record)))
            }),
            "DELETE" => self.records.delete(kind, id, now).map(|()| json!({})).into(),
            _ => method_not_allowed(),
        }
    }

    /// A record with the contacts and lists that answers have.
    fn shown(&self, mut record: Value) -> Value {
        omissions::apply(&mut record, self.behaviour());
        record
    }

    fn custom_fields(&mut self, call: &Call, method: &str, owner: &str) -> Answer {
        let owner = match owner {
            "lead" => Owner::Lead,
            "contact" => Owner::Contact,
            "shared" => Owner::Shared,
            _ => return not_found(),
        };
        if method == "POST" {
            return self.with_body(call, |world, body| world.records.create_field(owner, body));
        }
        lists::page(call, self.records.schema.custom_fields(owner)).into()
    }

    fn users(&self, call: &Call) -> Result<Value, Refusal> {
        lists::check_parameters(call, &[])?;
        lists::page(call, self.records.schema.user_list())
    }

    fn search(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let token = self.records.token();
        let Records { schema, index, .. } = &self.records;
        search::search(body, schema, schema.behaviour.exact_value, index, &mut self.cursors, token, now)
    }

    fn merge(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let id = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or_default();
        self.records.merge(id("source"), id("destination"), now)?;
        Ok(json!({"status": "ok"}))
    }

    /// Parses the body of a call as a JSON object and calls `then`, or refuses the body (close-api.md §3).
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

fn method_not_allowed() -> Answer {
    Answer::error(405, "The method is not allowed for the requested URL.")
}

/// 405 for paths that exist with another method, 404 for all others.
fn unknown_route(segments: &[&str]) -> Answer {
    match segments {
        ["me" | "event" | "user"]
        | ["status", "lead"]
        | ["data", "search"]
        | ["lead", "merge"]
        | ["user" | "custom_field" | "custom_field_schema", _] => method_not_allowed(),
        _ => not_found(),
    }
}
