//! `POST /data/search/`: matching, sorting, paging and rows (close-api.md §6). It reads only the lagging index.

use std::{
    cmp::Ordering,
    collections::{HashMap, VecDeque},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::behaviour::{DescendingCursor, ExactValue, LastCursor, SearchRows, UnknownSelector};
use crate::index::{Document, Index};
use crate::lists;
use crate::query::{self, Field};
use crate::refusal::{FieldErrors, Object, Refusal};
use crate::schema::{Kind, Schema};

/// Rows per page: the default, and the maximum a request may ask for. Close does not document the maximum;
/// 200 is the highest value that is known to work.
const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 200;
/// The maximum number of rows over all pages of one search.
const MAX_ROWS: usize = 10_000;
/// How long a cursor is valid.
const CURSOR_TTL: SignedDuration = SignedDuration::from_secs(30);

/// The open cursors: the expiry and the remaining ids of each.
#[derive(Debug, Default)]
pub(crate) struct Cursors {
    open: HashMap<String, (Timestamp, VecDeque<String>)>,
}

/// Answers a search. `token` becomes the cursor if there are more pages.
pub(crate) fn search(
    body: &Object,
    schema: &Schema,
    exact: ExactValue,
    index: &Index,
    cursors: &mut Cursors,
    token: String,
    now: Timestamp,
) -> Result<Value, Refusal> {
    let request = Request::parse(body)?;
    let behaviour = &schema.behaviour;
    if behaviour.unknown_selector == UnknownSelector::Refused {
        check_selectors(request.fields, schema)?;
    }
    cursors.open.retain(|_, (expires, _)| now < *expires);
    let (mut ids, total) = match request.cursor {
        Some(cursor) => {
            let remaining = cursors.open.get(cursor).map(|(_, ids)| ids.clone());
            let gone = || Refusal::Invalid(FieldErrors::one("cursor", "Expired cursor"));
            let ids = remaining.ok_or_else(gone)?;
            let n_remaining = ids.len();
            (ids, n_remaining)
        }
        None => matches(body, schema, exact, index)?,
    };
    ids.truncate(request.results_limit.unwrap_or(MAX_ROWS).min(MAX_ROWS));
    let limited = ids.len();
    let page: Vec<String> = ids.drain(..request.limit.min(ids.len())).collect();
    let first_is_descending = body.get("sort").is_some_and(|sort| sort[0]["direction"] == "desc");
    if first_is_descending && schema.behaviour.descending_cursor == DescendingCursor::LosesRows {
        ids.pop_front();
    }
    let cursor = (!ids.is_empty()).then_some(token);
    if let Some(cursor) = &cursor {
        let expires = now.saturating_add(CURSOR_TTL).unwrap_or(now);
        cursors.open.insert(cursor.clone(), (expires, ids));
    }
    let fields = request.fields.filter(|_| behaviour.search_rows == SearchRows::Fields);
    let rows: Vec<Value> =
        page.iter().filter_map(|id| index.get(id)).map(|document| row(document, fields)).collect();
    let mut answer = json!({"data": rows});
    match (cursor, behaviour.last_cursor) {
        (Some(cursor), _) => answer["cursor"] = json!(cursor),
        (None, LastCursor::Null) => answer["cursor"] = Value::Null,
        (None, LastCursor::Empty) => answer["cursor"] = json!(""),
        (None, LastCursor::Absent) => {}
    }
    if request.include_counts {
        answer["count"] = json!({"limited": limited, "total": total});
    }
    Ok(answer)
}

/// The ids of all matching documents, in order, and their number.
fn matches(
    body: &Object,
    schema: &Schema,
    exact: ExactValue,
    index: &Index,
) -> Result<(VecDeque<String>, usize), Refusal> {
    let tree = body.get("query").ok_or_else(|| Refusal::Malformed("'query' is required.".into()))?;
    let query = query::parse(tree, schema, exact).map_err(Refusal::Malformed)?;
    let order = order(body.get("sort"), schema).map_err(Refusal::Malformed)?;
    let mut found: Vec<&Document> = match query.candidates(index) {
        Some(ids) => ids.into_iter().filter_map(|id| index.get(id)).collect(),
        None => index.documents().collect(),
    };
    found.retain(|document| query.matches(document, index));
    // Ties, and all documents when the request has no order, are sorted by id, which is random.
    found.sort_by(|a, b| compare(a, b, &order).then_with(|| a.id.cmp(&b.id)));
    let total = found.len();
    Ok((found.into_iter().map(|document| document.id.clone()).collect(), total))
}

/// The parameters of a request besides query and order.
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
            return Err(lists::too_large("_limit", MAX_LIMIT));
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

/// Documents without a value come last in both directions.
fn compare(a: &Document, b: &Document, order: &[SortKey]) -> Ordering {
    let value = |document: &Document, key: &SortKey| key.field.value(document.kind.word(), &document.value);
    let by_key = |key: &SortKey| match (value(a, key), value(b, key)) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) => Ordering::Greater,
        (Some(_), None) => Ordering::Less,
        (Some(a), Some(b)) => {
            let ordering = match (a.as_f64(), b.as_f64()) {
                (Some(a), Some(b)) => a.total_cmp(&b),
                // All dates have the same format, so they can be compared as texts.
                _ => a.as_str().unwrap_or_default().cmp(b.as_str().unwrap_or_default()),
            };
            if key.descending { ordering.reverse() } else { ordering }
        }
    };
    order.iter().map(by_key).find(|ordering| ordering.is_ne()).unwrap_or(Ordering::Equal)
}

/// Refuses custom fields that do not exist. The text is not recorded.
fn check_selectors(fields: Option<&Object>, schema: &Schema) -> Result<(), Refusal> {
    let names = fields.into_iter().flatten().flat_map(|(kind, names)| {
        let names = names.as_array().into_iter().flatten().filter_map(Value::as_str);
        names.filter_map(move |name| Some((Kind::parse(kind)?, name.strip_prefix("custom.")?)))
    });
    for (kind, name) in names {
        if schema.field(kind, name).is_none() {
            let text = format!("The Custom Field \"{name}\" does not exist.");
            return Err(Refusal::Invalid(FieldErrors::one("_fields", &text)));
        }
    }
    Ok(())
}

/// A row: type, id, and the requested fields. Unknown field names are left out (close-api.md §1).
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
pub(crate) fn select(record: &Value, names: &[&str]) -> Object {
    let all_custom = names.contains(&"custom");
    let wanted = |key: &str| names.contains(&key) || all_custom && key.starts_with("custom.");
    let fields = record.as_object().into_iter().flatten();
    fields.filter(|(key, _)| wanted(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::ids::Ids;
    use crate::records::Records;
    use crate::settings::Settings;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn map(value: Value) -> Object {
        serde_json::from_value(value).unwrap()
    }

    /// Three leads with different creation dates and one contact each, and an empty lead.
    fn records() -> Records {
        let mut records = Records::new(&Settings::fast(), Ids::new(Uuid::nil()), at(0));
        for (second, body) in [
            (
                1,
                json!({"name": "Acme", "custom.cf_leadcompanyid": "acme-1", "custom.cf_leadseats": 5,
                "custom.cf_leadplan": "pro",
                "contacts": [{"name": "Jane Doe", "emails": [{"email": "Jane@Acme.test"}],
                    "custom.cf_contactuserid": "u-1"}]}),
            ),
            (
                2,
                json!({"name": "Acme North", "custom.cf_leadcompanyid": "ACME-1", "custom.cf_leadseats": 50,
                "contacts": [{"name": "Joe Doe",
                    "emails": [{"email": "joe@acme.test"}, {"email": "joe@home.test"}]}]}),
            ),
            (
                3,
                json!({"name": "Beta", "custom.cf_leadcompanyid": "acme-1-b",
                "contacts": [{"name": "Doe Jane", "phones": [{"phone": "8004445555"}]}]}),
            ),
            (4, json!({})),
        ] {
            records.create_lead(&map(body), at(second)).unwrap();
        }
        records.index.apply_due(at(10));
        records
    }

    fn run(records: &mut Records, cursors: &mut Cursors, body: Value, now: i64) -> Result<Value, Value> {
        let token = records.token();
        let Records { schema, index, .. } = &*records;
        search(&map(body), schema, ExactValue::FoldsCase, index, cursors, token, at(now)).map_err(|refusal| {
            match refusal {
                Refusal::Invalid(errors) => errors.fields.values().next().cloned().unwrap_or_default(),
                Refusal::Missing(_) | Refusal::NoMergeSource | Refusal::Malformed(_) => {
                    refusal.body()["error"].clone()
                }
            }
        })
    }

    /// The names of the records that a query finds, oldest first.
    fn names(kind: &str, condition: Value) -> Vec<String> {
        let queries = vec![json!({"type": "object_type", "object_type": kind}), condition];
        let sort = json!({"type": "regular_field", "object_type": kind, "field_name": "date_created"});
        let body = json!({
            "query": {"type": "and", "queries": queries},
            "_fields": {kind: ["name"]},
            "sort": [{"direction": "asc", "field": sort}],
        });
        let found = run(&mut records(), &mut Cursors::default(), body, 10).unwrap();
        let rows = found["data"].as_array().unwrap().iter();
        rows.map(|row| row["name"].as_str().unwrap_or("-").to_owned()).collect()
    }

    /// Adds a field to an object.
    fn with(mut object: Value, key: &str, value: Value) -> Value {
        object[key] = value;
        object
    }

    fn regular(kind: &str, name: &str, condition: Value) -> Value {
        let field = json!({"type": "regular_field", "object_type": kind, "field_name": name});
        with(json!({"type": "field_condition", "field": field}), "condition", condition)
    }

    fn custom(id: &str, condition: Value) -> Value {
        let field = json!({"type": "custom_field", "custom_field_id": id});
        with(json!({"type": "field_condition", "field": field}), "condition", condition)
    }

    fn text(mode: &str, value: &str) -> Value {
        json!({"type": "text", "mode": mode, "value": value})
    }

    fn related(this: &str, related: &str, query: Value) -> Value {
        let node = json!({"type": "has_related", "this_object_type": this, "related_object_type": related});
        with(node, "related_query", query)
    }

    #[test]
    fn queries_find_the_matching_records() {
        let company = |mode: &str, value: &str| custom("cf_leadcompanyid", text(mode, value));
        let email = |mode: &str, value: &str| {
            related("contact", "contact_email", regular("contact_email", "email", text(mode, value)))
        };
        let negated = |query: Value| with(query, "negate", json!(true));
        let timestamp = |value: &str| json!({"type": "fixed_utc", "value": value});
        for (kind, query, expected) in [
            ("lead", json!({"type": "match_all"}), &["Acme", "Acme North", "Beta", "-"][..]),
            ("lead", company("exact_value", "acme-1"), &["Acme", "Acme North"]),
            ("lead", company("exact_value", " Acme-1 "), &["Acme", "Acme North"]),
            ("lead", company("exact_value", "acme"), &[]),
            ("lead", company("phrase", "acme-1"), &["Acme", "Acme North", "Beta"]),
            ("lead", company("full_words", "1 ACME"), &["Acme", "Acme North", "Beta"]),
            ("lead", company("beginning_of_words", "ac"), &["Acme", "Acme North", "Beta"]),
            ("lead", company("full_words", ""), &[]),
            ("lead", custom("cf_leadcompanyid", json!({"type": "exists"})), &["Acme", "Acme North", "Beta"]),
            ("lead", negated(custom("cf_leadcompanyid", json!({"type": "exists"}))), &["-"]),
            ("lead", custom("cf_leadseats", json!({"type": "number_range", "gt": 5})), &["Acme North"]),
            ("lead", custom("cf_leadseats", json!({"type": "number_range", "gte": 5, "lt": 50})), &["Acme"]),
            ("lead", custom("cf_leadplan", json!({"type": "term", "values": ["pro", "free"]})), &["Acme"]),
            ("contact", custom("cf_contactuserid", text("exact_value", "u-1")), &["Jane Doe"]),
            ("contact", email("exact_value", "jane@acme.test"), &["Jane Doe"]),
            ("contact", email("exact_value", "joe@home.test"), &["Joe Doe"]),
            ("contact", email("full_words", "acme test"), &["Jane Doe", "Joe Doe"]),
            (
                "contact",
                regular("contact", "emails_count", json!({"type": "number_range", "lte": 0})),
                &["Doe Jane"],
            ),
            ("contact", regular("contact", "name", text("phrase", "jane doe")), &["Jane Doe"]),
            ("contact", json!({"type": "text", "mode": "full_words", "value": "18004445555"}), &["Doe Jane"]),
            ("lead", related("lead", "contact", email("exact_value", "JOE@acme.test")), &["Acme North"]),
            (
                "lead",
                related("lead", "contact", regular("contact", "name", text("full_words", "jane"))),
                &["Acme", "Beta"],
            ),
            (
                "lead",
                regular(
                    "lead",
                    "date_created",
                    json!({"type": "moment_range", "on_or_after": timestamp("1970-01-01T00:00:03Z")}),
                ),
                &["Beta", "-"],
            ),
            (
                "lead",
                regular(
                    "lead",
                    "date_created",
                    json!({"type": "moment_range", "before": timestamp("1970-01-01T00:00:02+00:00")}),
                ),
                &["Acme"],
            ),
            (
                "lead",
                json!({"type": "or", "queries": [
                    company("exact_value", "acme-1-b"), custom("cf_leadplan", json!({"type": "exists"}))]}),
                &["Acme", "Beta"],
            ),
            ("contact", company("exact_value", "acme-1"), &[]),
            ("lead", email("exact_value", "jane@acme.test"), &[]),
            ("lead", json!({"type": "or", "queries": []}), &[]),
        ] {
            assert_eq!(names(kind, query.clone()), expected, "{kind} {query}");
        }
    }

    #[test]
    fn unknown_queries_and_invalid_parameters_are_refused() {
        let query = |query: Value| json!({"query": query});
        let all = json!({"type": "match_all"});
        for (body, error) in [
            (json!({}), "'query' is required."),
            (query(json!({"type": "saved_search"})), "Unknown query type 'saved_search'."),
            (query(json!({"queries": []})), "'type' is required and must be a string."),
            (
                query(regular("lead", "nome", text("phrase", "x"))),
                "Unknown field 'nome' of object type 'lead'.",
            ),
            (query(custom("cf_x", text("phrase", "x"))), "Unknown custom field 'cf_x'."),
            (query(custom("cf_leadplan", text("fuzzy", "x"))), "Unknown text mode 'fuzzy'."),
            (query(custom("cf_leadplan", json!({"type": "like"}))), "Unknown condition type 'like'."),
            (
                query(related("lead", "contact_email", all.clone())),
                "Object type 'lead' has no related 'contact_email'.",
            ),
            (json!({"query": all, "_limit": 201}), "Input should be less than or equal to 200"),
            (json!({"query": all, "_limit": "5"}), "Invalid value for '_limit'."),
            (json!({"query": all, "_fields": ["id"]}), "Invalid value for '_fields'."),
            (
                json!({"query": all, "_fields": {"lead": ["id", "custom.cf_gone"]}}),
                "The Custom Field \"cf_gone\" does not exist.",
            ),
            (json!({"query": all, "sort": "name"}), "'sort' must be a list."),
            (
                json!({"query": all, "sort": [{"direction": "asc",
                    "field": {"type": "regular_field", "object_type": "lead", "field_name": "id"}}]}),
                "Unknown field 'id' of object type 'lead'.",
            ),
        ] {
            let found = run(&mut records(), &mut Cursors::default(), body.clone(), 10);
            assert_eq!(found, Err(json!(error)), "{body}");
        }
        let mut query = all;
        for _ in 0..30 {
            query = json!({"type": "and", "queries": [query]});
        }
        assert!(run(&mut records(), &mut Cursors::default(), json!({"query": query}), 10).is_err());
        let unknown = run(
            &mut records(),
            &mut Cursors::default(),
            json!({"query": {"type": "match_all"}, "cursor": "x"}),
            10,
        );
        assert!(unknown.is_err());
    }

    #[test]
    fn exact_value_has_three_interpretations() {
        let records = records();
        for (exact, value, expected) in [
            (ExactValue::FoldsCase, "acme-1", Some(2)),
            (ExactValue::Exact, "acme-1", Some(1)),
            (ExactValue::Exact, "acme-1 ", Some(0)),
            (ExactValue::Refused, "acme-1", None),
        ] {
            let body = map(json!({"query": custom("cf_leadcompanyid", text("exact_value", value))}));
            let found = search(
                &body,
                &records.schema,
                exact,
                &records.index,
                &mut Cursors::default(),
                "c".into(),
                at(10),
            );
            assert_eq!(found.ok().map(|found| found["data"].as_array().unwrap().len()), expected, "{value}");
        }
    }

    #[test]
    fn rows_have_type_id_and_the_requested_fields() {
        let (mut records, mut cursors) = (records(), Cursors::default());
        let mut row = |fields: Value| {
            let query = custom("cf_leadplan", json!({"type": "exists"}));
            let body =
                json!({"query": query, "_fields": fields, "limit": null, "results_limit": null, "sort": []});
            let mut row = run(&mut records, &mut cursors, body, 10).unwrap()["data"][0].take();
            assert!(row["id"].as_str().unwrap().starts_with("lead_"));
            row.as_object_mut().unwrap().remove("id");
            row
        };
        assert_eq!(row(json!(null)), json!({"__object_type": "lead"}));
        assert_eq!(row(json!({"contact": ["name"]})), json!({"__object_type": "lead"}));
        assert_eq!(
            row(json!({"lead": ["id", "name", "custom.cf_leadseats", "nonsense"]})),
            json!({"__object_type": "lead", "name": "Acme", "custom.cf_leadseats": 5})
        );
        assert_eq!(row(json!({"lead": ["custom"]}))["custom.cf_leadcompanyid"], "acme-1");
    }

    #[test]
    fn pages_counts_and_cursors() {
        let (mut records, mut cursors) = (records(), Cursors::default());
        let all = json!({"type": "and", "queries": [{"type": "object_type", "object_type": "lead"}]});
        let mut page = |extra: Value, now: i64| {
            let mut body = map(json!({"query": all, "_limit": 3, "include_counts": true}));
            body.extend(map(extra));
            run(&mut records, &mut cursors, Value::Object(body), now)
        };
        let n_rows = |page: &Value| page["data"].as_array().unwrap().len();
        let first = page(json!({}), 10).unwrap();
        assert_eq!((n_rows(&first), &first["count"]), (3, &json!({"limited": 4, "total": 4})));
        let next = json!({"cursor": first["cursor"]});
        let second = page(next.clone(), 39).unwrap();
        assert_eq!((n_rows(&second), &second["cursor"]), (1, &Value::Null));
        assert!(!first["data"].as_array().unwrap().contains(&second["data"][0]));
        assert!(page(next, 40).is_err(), "a cursor expires after thirty seconds");

        let counted = page(json!({"results_limit": 0}), 40).unwrap();
        assert_eq!((n_rows(&counted), &counted["count"]), (0, &json!({"limited": 0, "total": 4})));
        assert_eq!(n_rows(&page(json!({"results_limit": 2}), 40).unwrap()), 2);
    }

    #[test]
    fn order_puts_documents_without_a_value_last() {
        let order = |direction: &str| {
            let field = json!({"type": "custom_field", "custom_field_id": "cf_leadseats"});
            let body = json!({
                "query": {"type": "object_type", "object_type": "lead"},
                "sort": [{"direction": direction, "field": field}],
                "_fields": {"lead": ["custom.cf_leadseats"]},
            });
            let found = run(&mut records(), &mut Cursors::default(), body, 10).unwrap();
            let rows = found["data"].as_array().unwrap().iter();
            rows.map(|row| row["custom.cf_leadseats"].as_u64()).collect::<Vec<_>>()
        };
        assert_eq!(order("asc"), [Some(5), Some(50), None, None]);
        assert_eq!(order("desc"), [Some(50), Some(5), None, None]);
    }

    #[test]
    fn a_cursor_loses_rows_in_descending_order() {
        let walk = |direction: &str, kept: DescendingCursor| {
            let (mut records, mut cursors) = (records(), Cursors::default());
            records.schema.behaviour.descending_cursor = kept;
            let field = json!({"type": "regular_field", "object_type": "lead", "field_name": "date_created"});
            let mut body = json!({
                "query": {"type": "object_type", "object_type": "lead"},
                "sort": [{"direction": direction, "field": field}],
                "_limit": 2,
            });
            let mut n_rows = 0;
            loop {
                let page = run(&mut records, &mut cursors, body.clone(), 10).unwrap();
                n_rows += page["data"].as_array().unwrap().len();
                body["cursor"] = page["cursor"].clone();
                if body["cursor"].is_null() {
                    return n_rows;
                }
            }
        };
        assert_eq!(walk("asc", DescendingCursor::LosesRows), 4);
        assert_eq!(walk("desc", DescendingCursor::LosesRows), 3);
        assert_eq!(walk("desc", DescendingCursor::Exact), 4);
    }
}
