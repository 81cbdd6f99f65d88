//! `POST /data/search/`: matching, order, pages and rows (close-api.md §6). It sees only the lagged index.

use std::{
    cmp::Ordering,
    collections::{HashMap, VecDeque},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    index::{Document, Index},
    query::{self, ContactsOf, Field},
    schema::{Kind, Schema},
    settings::ExactValue,
    validate::{Object, Refusal},
};

/// Rows per page if the request does not say, and the most it may say. The maximum is not published; 200 is
/// the highest that was seen to work.
const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 200;
/// The most rows one walk from cursor to cursor gives.
const MAX_WALK: usize = 10_000;
/// How long a cursor is good for.
const CURSOR_LIFE: SignedDuration = SignedDuration::from_secs(30);

/// Walks under way: what remains of each, by cursor.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    open: HashMap<String, (Timestamp, VecDeque<String>)>,
}

/// Answers a search. `token` becomes the cursor if there is more to come.
pub(super) fn search(
    body: &Object,
    schema: &Schema,
    exact: ExactValue,
    index: &Index,
    cursors: &mut Cursors,
    token: String,
    now: Timestamp,
) -> Result<Value, Refusal> {
    let request = Request::parse(body)?;
    cursors.open.retain(|_, (expires, _)| now < *expires);
    let (mut ids, total) = match request.cursor {
        Some(cursor) => {
            let walk = cursors.open.get(cursor).map(|(_, ids)| ids.clone());
            let gone = || Refusal::Malformed("The cursor is invalid or has expired.".into());
            let ids = walk.ok_or_else(gone)?;
            let n_left = ids.len();
            (ids, n_left)
        }
        None => matches(body, schema, exact, index)?,
    };
    ids.truncate(request.results_limit.unwrap_or(MAX_WALK).min(MAX_WALK));
    let limited = ids.len();
    let page: Vec<String> = ids.drain(..request.limit.min(ids.len())).collect();
    let cursor = (!ids.is_empty()).then_some(token);
    if let Some(cursor) = &cursor {
        let expires = now.saturating_add(CURSOR_LIFE).unwrap_or(now);
        cursors.open.insert(cursor.clone(), (expires, ids));
    }
    let rows: Vec<Value> =
        page.iter().filter_map(|id| index.get(id)).map(|document| row(document, request.fields)).collect();
    let mut answer = json!({"data": rows, "cursor": cursor});
    if request.include_counts {
        answer["count"] = json!({"limited": limited, "total": total});
    }
    Ok(answer)
}

/// The ids of all documents that match, in order, and their number.
fn matches(
    body: &Object,
    schema: &Schema,
    exact: ExactValue,
    index: &Index,
) -> Result<(VecDeque<String>, usize), Refusal> {
    let tree = body.get("query").ok_or_else(|| Refusal::Malformed("'query' is required.".into()))?;
    let query = query::parse(tree, schema, exact).map_err(Refusal::Malformed)?;
    let order = order(body.get("sort"), schema).map_err(Refusal::Malformed)?;
    let contacts_of = if query.steps_to_contacts() { contacts_of(index) } else { ContactsOf::new() };
    let mut found: Vec<&Document> =
        index.documents().filter(|document| query.accepts(document, &contacts_of)).collect();
    // Ties, and everything when no order is asked for, come in the order of the ids: by chance.
    found.sort_by(|a, b| compare(a, b, &order).then_with(|| a.id.cmp(&b.id)));
    let total = found.len();
    Ok((found.into_iter().map(|document| document.id.clone()).collect(), total))
}

fn contacts_of(index: &Index) -> ContactsOf<'_> {
    let mut contacts_of = ContactsOf::new();
    for document in index.documents().filter(|document| document.kind == Kind::Contact) {
        if let Some(lead_id) = document.value["lead_id"].as_str() {
            contacts_of.entry(lead_id).or_default().push(document);
        }
    }
    contacts_of
}

/// The parts of a request besides the query.
struct Request<'a> {
    limit: usize,
    results_limit: Option<usize>,
    cursor: Option<&'a str>,
    fields: Option<&'a Object>,
    include_counts: bool,
}

impl<'a> Request<'a> {
    fn parse(body: &'a Object) -> Result<Self, Refusal> {
        let given = |key: &str| body.get(key).filter(|value| !value.is_null());
        let malformed = |key: &str| Refusal::Malformed(format!("Invalid value for '{key}'."));
        let number = |key: &str| {
            let parse = |value: &Value| {
                value.as_u64().and_then(|number| usize::try_from(number).ok()).ok_or_else(|| malformed(key))
            };
            given(key).map(parse).transpose()
        };
        let limit = number("_limit")?.unwrap_or(DEFAULT_LIMIT);
        if limit > MAX_LIMIT {
            return Err(Refusal::Malformed(format!("_limit must be less than or equal to {MAX_LIMIT}.")));
        }
        if limit == 0 {
            return Err(malformed("_limit"));
        }
        let cursor = given("cursor").map(|cursor| cursor.as_str().ok_or_else(|| malformed("cursor")));
        let fields = given("_fields").map(|fields| fields.as_object().ok_or_else(|| malformed("_fields")));
        Ok(Self {
            limit,
            results_limit: number("results_limit")?,
            cursor: cursor.transpose()?,
            fields: fields.transpose()?,
            include_counts: given("include_counts") == Some(&Value::Bool(true)),
        })
    }
}

struct SortKey {
    field: Field,
    descending: bool,
}

fn order(sort: Option<&Value>, schema: &Schema) -> Result<Vec<SortKey>, String> {
    match sort {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(keys)) => keys.iter().map(|key| sort_key(key, schema)).collect(),
        Some(_) => Err("'sort' must be a list.".into()),
    }
}

fn sort_key(key: &Value, schema: &Schema) -> Result<SortKey, String> {
    let descending = match key["direction"].as_str() {
        Some("asc") => false,
        Some("desc") => true,
        _ => return Err("'direction' must be asc or desc.".into()),
    };
    let field = query::parse_field(&key["field"], schema)?;
    match &field {
        Field::Regular { object, .. } if Kind::parse(object).is_none() => {
            Err(format!("Fields of '{object}' are not sortable."))
        }
        Field::Regular { .. } | Field::Custom(_) => Ok(SortKey { field, descending }),
    }
}

/// Documents without a value come last, whatever the direction.
fn compare(a: &Document, b: &Document, order: &[SortKey]) -> Ordering {
    let value = |document: &Document, key: &SortKey| key.field.value(document.kind.word(), &document.value);
    let by_key = |key: &SortKey| match (value(a, key), value(b, key)) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) => Ordering::Greater,
        (Some(_), None) => Ordering::Less,
        (Some(a), Some(b)) => {
            let ordering = match (a.as_f64(), b.as_f64()) {
                (Some(a), Some(b)) => a.total_cmp(&b),
                // Dates have one form, so they compare as texts.
                _ => a.as_str().unwrap_or_default().cmp(b.as_str().unwrap_or_default()),
            };
            if key.descending { ordering.reverse() } else { ordering }
        }
    };
    order.iter().map(by_key).find(|ordering| ordering.is_ne()).unwrap_or(Ordering::Equal)
}

/// A row: type and id, and the fields asked for. Names it does not know it leaves out (close-api.md §1).
fn row(document: &Document, fields: Option<&Object>) -> Value {
    let kind = document.kind.word();
    let wanted = fields.and_then(|fields| fields.get(kind)).and_then(Value::as_array);
    let names: Vec<&str> = wanted.into_iter().flatten().filter_map(Value::as_str).collect();
    let mut row = if names.is_empty() { Object::new() } else { select(&document.value, &names) };
    row.insert("__object_type".into(), json!(kind));
    row.insert("id".into(), json!(document.id));
    Value::Object(row)
}

/// The named fields of a record; `custom` names all custom fields (close-api.md §1).
pub(super) fn select(record: &Value, names: &[&str]) -> Object {
    let all_custom = names.contains(&"custom");
    let wanted = |key: &str| names.contains(&key) || all_custom && key.starts_with("custom.");
    let fields = record.as_object().into_iter().flatten();
    fields.filter(|(key, _)| wanted(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}
