//! Custom fields in request bodies: finds the field of a key, checks the value, applies the change.

use serde_json::{Value, json};

use crate::ids;
use crate::refusal::{FieldErrors, NO_SUCH_OBJECT, NOT_A_CHOICE, NOT_A_DATETIME, NOT_TEXT, Object};
use crate::schema::{CustomField, FieldKind, Kind, Schema};

/// The changes to a record's custom fields.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct CustomPatch {
    /// Whether the change clears all other fields. The `custom` object does (close-api.md §4).
    replaces: bool,
    changes: Vec<(String, Change)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Change {
    Clear,
    Set(Value),
    Add(Vec<Value>),
    Remove(Vec<Value>),
}

impl CustomPatch {
    /// Applies the changes to `values`, which are keyed by field id.
    pub(crate) fn apply(&self, values: &mut Object) {
        if self.replaces {
            values.clear();
        }
        for (id, change) in &self.changes {
            let current = || values.get(id).and_then(Value::as_array).cloned().unwrap_or_default();
            let new = match change {
                Change::Clear => Value::Null,
                Change::Set(value) => value.clone(),
                Change::Add(added) => {
                    let mut list = current();
                    list.extend(
                        added.iter().filter(|value| !list.contains(value)).cloned().collect::<Vec<_>>(),
                    );
                    list.into()
                }
                Change::Remove(removed) => {
                    let mut list = current();
                    list.retain(|value| !removed.contains(value));
                    list.into()
                }
            };
            let empty = new.is_null() || new.as_array().is_some_and(Vec::is_empty);
            if empty {
                values.remove(id);
            } else {
                values.insert(id.clone(), new);
            }
        }
    }
}

/// Reads the custom fields of a body. Each error has the full key of the request (close-api.md §3).
pub(crate) fn read(body: &Object, kind: Kind, schema: &Schema, errors: &mut FieldErrors) -> CustomPatch {
    let mut patch = CustomPatch::default();
    match body.get("custom") {
        None | Some(Value::Null) => {}
        Some(Value::Object(fields)) => {
            patch.replaces = true;
            for (name, value) in fields {
                patch.read(&format!("custom.{name}"), name, value, kind, schema, errors);
            }
        }
        Some(_) => errors.add("custom", "Invalid request: JSON dictionary expected."),
    }
    for (key, value) in body {
        if let Some(name) = key.strip_prefix("custom.") {
            patch.read(key, name, value, kind, schema, errors);
        }
    }
    patch
}

impl CustomPatch {
    fn read(
        &mut self,
        key: &str,
        name: &str,
        value: &Value,
        kind: Kind,
        schema: &Schema,
        errors: &mut FieldErrors,
    ) {
        match parse_change(name, value, kind, schema) {
            Ok(change) => self.changes.push(change),
            Err(text) => errors.add(key, &text),
        }
    }
}

fn parse_change(name: &str, value: &Value, kind: Kind, schema: &Schema) -> Result<(String, Change), String> {
    type Operation = fn(Vec<Value>) -> Change;
    let operations: [(&str, Operation); 2] = [(".add", Change::Add), (".remove", Change::Remove)];
    for (suffix, operation) in operations {
        let Some(field) = name.strip_suffix(suffix).and_then(|name| schema.field(kind, name)) else {
            continue;
        };
        if !field.accepts_multiple_values {
            return Err("This field does not accept multiple values.".into());
        }
        return Ok((field.id.clone(), operation(parse_list(field, value, schema)?)));
    }
    let Some(field) = schema.field(kind, name) else {
        return Err(format!("The Custom Field \"{name}\" does not exist."));
    };
    let change = if value.is_null() || value == "" {
        Change::Clear
    } else if field.accepts_multiple_values {
        Change::Set(parse_list(field, value, schema)?.into())
    } else {
        Change::Set(parse_value(field, value, schema)?)
    };
    Ok((field.id.clone(), change))
}

fn parse_list(field: &CustomField, value: &Value, schema: &Schema) -> Result<Vec<Value>, String> {
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    items.iter().map(|item| parse_value(field, item, schema)).collect()
}

/// The values that are still valid after the field was changed.
pub(crate) fn still_valid(field: &CustomField, value: &Value, schema: &Schema) -> Option<Value> {
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let mut valid = items.iter().filter_map(|item| parse_value(field, item, schema).ok());
    if field.accepts_multiple_values {
        let valid: Vec<Value> = valid.collect();
        (!valid.is_empty()).then(|| valid.into())
    } else {
        valid.next()
    }
}

/// Returns the value in the form that responses have, or why the field refuses it.
fn parse_value(field: &CustomField, value: &Value, schema: &Schema) -> Result<Value, String> {
    if field.kind == FieldKind::Number {
        return if value.is_number() {
            Ok(value.clone())
        } else {
            Err("Value must be of numeric type.".into())
        };
    }
    let text = value.as_str().ok_or(NOT_TEXT)?;
    match field.kind {
        FieldKind::Text | FieldKind::Textarea | FieldKind::Hidden | FieldKind::Number => Ok(json!(text)),
        FieldKind::Date => match text.parse::<jiff::civil::Date>() {
            Ok(date) if date.to_string() == text => Ok(json!(text)),
            Ok(_) | Err(_) => Err("Could not parse date".into()),
        },
        FieldKind::Datetime => {
            let timestamp = ids::parse_timestamp(text).ok_or(NOT_A_DATETIME)?;
            Ok(json!(ids::format_timestamp(timestamp)))
        }
        FieldKind::Choices if field.choices.iter().any(|choice| choice == text) => Ok(json!(text)),
        FieldKind::Choices => Err(format!("{NOT_A_CHOICE} '{text}' is not one of the choices.")),
        FieldKind::User => {
            let user = schema.users().find(|user| text == user.id || text == user.name());
            Ok(json!(user.ok_or(NO_SUCH_OBJECT)?.id))
        }
        FieldKind::Contact if text.starts_with("cont_") => Ok(json!(text)),
        FieldKind::CustomObject if text.starts_with("custobj_") => Ok(json!(text)),
        FieldKind::Contact | FieldKind::CustomObject => Err(NO_SUCH_OBJECT.into()),
    }
}
