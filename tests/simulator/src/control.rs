//! `/_sim/`: the controls for scripts. API keys, rate limits and faults do not apply to them.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use jiff::Timestamp;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::faults::Fault;
use crate::limits::Group;
use crate::refusal::{Object, Refusal};
use crate::schema::{CustomField, Kind};
use crate::shared::Shared;

pub(crate) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/_sim/", get(summary))
        .route("/_sim/leads", get(leads).post(add_lead))
        .route("/_sim/contacts", get(contacts).post(add_contact))
        .route("/_sim/records/{id}", delete(remove))
        .route("/_sim/requests", get(requests))
        .route("/_sim/faults", get(faults).post(add_fault).delete(clear_faults))
        .route("/_sim/fields", get(fields).post(add_field).put(change_field))
        .route("/_sim/fields/{id}", delete(remove_field))
        .route("/_sim/merge", post(merge))
        .route("/_sim/index", post(index))
        .route("/_sim/settings", get(settings).put(change_settings))
}

type Sim = State<Arc<Shared>>;

/// The status and body for a refused control.
struct ControlError(StatusCode, Value);

impl IntoResponse for ControlError {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<Refusal> for ControlError {
    fn from(refusal: Refusal) -> Self {
        Self(StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::BAD_REQUEST), refusal.body())
    }
}

/// Parses a body and ignores its content type, so that `curl -d` is enough.
fn read<T: DeserializeOwned>(body: &str) -> Result<T, ControlError> {
    serde_json::from_str(body)
        .map_err(|error| ControlError(StatusCode::BAD_REQUEST, json!({"error": error.to_string()})))
}

async fn summary(State(shared): Sim) -> Json<Value> {
    let world = shared.world();
    let mut requests: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    let (mut n_requests, mut n_busy) = (0_u64, 0_u64);
    for request in world.requests.all() {
        let group = Group::of(&request.method, &request.path);
        let status = request.status.map_or_else(|| "unanswered".to_owned(), |status| status.to_string());
        *requests
            .entry(format!("{} {}", group.method, group.segment))
            .or_default()
            .entry(status)
            .or_default() += 1;
        n_requests += 1;
        n_busy += u64::from(request.status == Some(429));
    }
    Json(json!({
        "leads": world.records.count(Kind::Lead),
        "contacts": world.records.count(Kind::Contact),
        "requests": {"total": n_requests, "busy": n_busy, "by_group_and_status": requests},
        "search_lag": world.records.schema.behaviour.search_lag.to_string(),
        "faults": world.faults.remaining(),
    }))
}

async fn leads(State(shared): Sim) -> Json<Vec<Value>> {
    Json(shared.world().records.all(Kind::Lead))
}

async fn contacts(State(shared): Sim) -> Json<Vec<Value>> {
    Json(shared.world().records.all(Kind::Contact))
}

async fn add_lead(State(shared): Sim, body: String) -> Result<Json<Value>, ControlError> {
    let body: Object = read(&body)?;
    Ok(Json(shared.world().add_indexed(Kind::Lead, &body, Timestamp::now())?))
}

async fn add_contact(State(shared): Sim, body: String) -> Result<Json<Value>, ControlError> {
    let body: Object = read(&body)?;
    Ok(Json(shared.world().add_indexed(Kind::Contact, &body, Timestamp::now())?))
}

async fn remove(State(shared): Sim, Path(id): Path<String>) -> StatusCode {
    if shared.world().delete_any(&id, Timestamp::now()) {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::NOT_FOUND
    }
}

async fn requests(State(shared): Sim) -> Json<Vec<Value>> {
    let world = shared.world();
    let requests = world.requests.all().map(|request| {
        let at = request.at.to_string();
        json!({"method": request.method, "path": request.path, "status": request.status, "at": at})
    });
    Json(requests.collect())
}

async fn faults(State(shared): Sim) -> Json<Value> {
    Json(json!(shared.world().faults.remaining()))
}

async fn add_fault(State(shared): Sim, body: String) -> Result<StatusCode, ControlError> {
    let fault: Fault = read(&body)?;
    if let Some(problem) = fault.validate() {
        return Err(ControlError(StatusCode::BAD_REQUEST, json!({"error": problem})));
    }
    shared.world().faults.add(fault);
    Ok(StatusCode::NO_CONTENT)
}

async fn clear_faults(State(shared): Sim) -> StatusCode {
    shared.world().faults.clear();
    StatusCode::NO_CONTENT
}

async fn fields(State(shared): Sim) -> Json<Vec<CustomField>> {
    Json(shared.world().records.schema.fields.clone())
}

async fn add_field(State(shared): Sim, body: String) -> Result<StatusCode, ControlError> {
    let field: CustomField = read(&body)?;
    shared.world().records.add_field(field)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn change_field(State(shared): Sim, body: String) -> Result<StatusCode, ControlError> {
    let field: CustomField = read(&body)?;
    shared.world().records.change_field(field, Timestamp::now())?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_field(State(shared): Sim, Path(id): Path<String>) -> StatusCode {
    let removed = shared.world().records.remove_field(&id, Timestamp::now());
    if removed { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Merge {
    source: String,
    destination: String,
}

async fn merge(State(shared): Sim, body: String) -> Result<StatusCode, ControlError> {
    let Merge { source, destination } = read(&body)?;
    shared.world().records.merge(&source, &destination, Timestamp::now())?;
    Ok(StatusCode::NO_CONTENT)
}

async fn index(State(shared): Sim) -> StatusCode {
    shared.world().records.index.apply_all();
    StatusCode::NO_CONTENT
}

/// Changes the API key (`api_key`) and fields of the behaviour.
async fn change_settings(State(shared): Sim, body: String) -> Result<StatusCode, ControlError> {
    let refused = |text: String| ControlError(StatusCode::BAD_REQUEST, json!({"error": text}));
    let mut changes: Object = read(&body)?;
    let key = match changes.remove("api_key") {
        None => None,
        Some(Value::String(key)) => Some(key),
        Some(_) => return Err(refused("`api_key` must be a text".into())),
    };
    let mut world = shared.world();
    let schema = &mut world.records.schema;
    let mut behaviour = schema.behaviour.clone();
    let keys: Vec<String> = changes.keys().cloned().collect();
    behaviour.change(changes).map_err(refused)?;
    // A field that another list names may have been deleted.
    let unknown = schema.unknown_names(&behaviour);
    if let Some(unknown) = unknown.iter().find(|name| keys.iter().any(|key| key == name.setting)) {
        return Err(refused(unknown.to_string()));
    }
    schema.behaviour = behaviour;
    world.api_key = key.unwrap_or_else(|| world.api_key.clone());
    Ok(StatusCode::NO_CONTENT)
}

/// The behaviour as it is now.
async fn settings(State(shared): Sim) -> Json<Object> {
    Json(shared.world().records.schema.behaviour.fields())
}
