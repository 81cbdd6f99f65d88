//! The searches of `certify`.

use serde_json::{Value, json};

pub(super) fn leads_with(conditions: Vec<Value>) -> Value {
    json!({"type": "and", "queries": [
        {"type": "object_type", "object_type": "lead"}, {"type": "or", "queries": conditions}]})
}

fn text(mode: &str, value: &str) -> Value {
    json!({"type": "text", "mode": mode, "value": value})
}

pub(super) fn by_name(word: &str) -> Value {
    json!({"type": "field_condition",
        "field": {"type": "regular_field", "object_type": "lead", "field_name": "name"},
        "condition": text("full_words", word)})
}

pub(super) fn by_custom(key: &str, mode: &str, value: &str) -> Value {
    let id = key.strip_prefix("custom.").unwrap_or(key);
    json!({"type": "field_condition", "field": {"type": "custom_field", "custom_field_id": id},
        "condition": text(mode, value)})
}

pub(super) fn contact_with_email(email: &str) -> Value {
    let field = json!({"type": "regular_field", "object_type": "contact_email", "field_name": "email"});
    json!({"type": "and", "queries": [
        {"type": "object_type", "object_type": "contact"},
        {"type": "has_related", "this_object_type": "contact", "related_object_type": "contact_email",
            "related_query": {"type": "field_condition", "field": field, "condition": text("exact_value", email)}},
    ]})
}
