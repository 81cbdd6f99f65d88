//! List endpoints: filters, paging and selected fields (close-api.md §1, §15 row 17).
//!
//! The lists of leads and contacts read the search index, so they lag behind writes as search does.

use serde_json::{Value, json};

use crate::call::Call;
use crate::query;
use crate::records::Records;
use crate::refusal::{FieldErrors, Refusal};
use crate::schema::Kind;
use crate::search;

/// The recorded maximum of `_limit` and `_skip` for leads. Other resources have others, which were not recorded.
const MAX_LIMIT: usize = 200;
const MAX_SKIP: usize = 35_000;
/// The most ids that were recorded to work in `id__in`.
const MAX_IDS: usize = 100;

/// Leads or contacts, newest first.
pub(crate) fn records(call: &Call, kind: Kind, records: &Records) -> Result<Value, Refusal> {
    let filters: &[&str] = match kind {
        Kind::Lead => &["id__in", "query"],
        Kind::Contact => &["id__in", "query", "lead_id"],
    };
    check_parameters(call, filters)?;
    let mut rows = if records.schema.behaviour.lists_from_index {
        let documents = records.index.documents().filter(|document| document.kind == kind);
        let mut rows: Vec<Value> = documents.map(|document| indexed(records, &document.value)).collect();
        // The index has no order of its own.
        let text = |record: &Value, key: &str| record[key].as_str().map(str::to_owned);
        rows.sort_by_key(|record| (text(record, "date_created"), text(record, "id")));
        rows
    } else {
        records.all(kind)
    };
    rows.reverse();
    if let Some(lead_id) = parameter(call, "lead_id") {
        rows.retain(|contact| contact["lead_id"] == *lead_id);
    }
    if let Some(ids) = parameter(call, "id__in") {
        let ids: Vec<&str> = ids.split(',').collect();
        if ids.len() > MAX_IDS {
            return Err(too_large("id__in", MAX_IDS));
        }
        rows.retain(|record| record["id"].as_str().is_some_and(|id| ids.contains(&id)));
    }
    let Some(text) = parameter(call, "query") else { return page(call, rows) };
    // The query runs on the index, whatever the list reads.
    let query = query::legacy(text, kind, &records.schema).map_err(Refusal::Malformed)?;
    rows.retain(|record| {
        let document = record["id"].as_str().and_then(|id| records.index.get(id));
        document.is_some_and(|document| query.matches(document, &records.index))
    });
    let total = rows.len();
    let mut page = page(call, rows)?;
    page["total_results"] = json!(total);
    Ok(page)
}

/// A record as the index has it; a lead with its contacts.
fn indexed(records: &Records, document: &Value) -> Value {
    let mut record = document.clone();
    if record.get("contact_ids").is_some() {
        let id = record["id"].as_str().unwrap_or_default();
        let contacts: Value = records.index.contacts_of(id).map(|contact| (*contact.value).clone()).collect();
        record["contacts"] = contacts;
    }
    record
}

fn parameter<'a>(call: &'a Call, name: &str) -> Option<&'a String> {
    call.query.iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

/// Refuses unsupported filters. Ignoring one would return every record as a match.
pub(crate) fn check_parameters(call: &Call, filters: &[&str]) -> Result<(), Refusal> {
    const EVERYWHERE: [&str; 3] = ["_limit", "_skip", "_fields"];
    let unknown = |name: &str| !EVERYWHERE.contains(&name) && !filters.contains(&name);
    match call.query.iter().find(|(name, _)| unknown(name)) {
        Some((name, _)) => {
            Err(Refusal::Malformed(format!("The simulator does not know the parameter {name} here.")))
        }
        None => Ok(()),
    }
}

/// The record with only the requested fields.
pub(crate) fn select_fields(call: &Call, record: Value) -> Value {
    match parameter(call, "_fields") {
        Some(names) => Value::Object(search::select(&record, &names.split(',').collect::<Vec<_>>())),
        None => record,
    }
}

/// One page according to `_skip` and `_limit`, in Close's envelope (close-api.md §1).
pub(crate) fn page(call: &Call, mut rows: Vec<Value>) -> Result<Value, Refusal> {
    let number = |name: &str, default: usize| {
        let parse = |text: &String| {
            text.parse().map_err(|_| Refusal::Malformed(format!("Invalid value for {name}: {text}")))
        };
        parameter(call, name).map_or(Ok(default), parse)
    };
    let (skip, limit) = (number("_skip", 0)?, number("_limit", 100)?);
    if limit > MAX_LIMIT {
        return Err(too_large("_limit", MAX_LIMIT));
    }
    if skip > MAX_SKIP {
        return Err(too_large("_skip", MAX_SKIP));
    }
    rows.drain(..skip.min(rows.len()));
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    let rows: Vec<Value> = rows.into_iter().map(|row| select_fields(call, row)).collect();
    Ok(json!({"data": rows, "has_more": has_more}))
}

/// The refusal of a number above its maximum, in the words of pydantic.
pub(crate) fn too_large(field: &str, max: usize) -> Refusal {
    Refusal::Invalid(FieldErrors::one(field, &format!("Input should be less than or equal to {max}")))
}
