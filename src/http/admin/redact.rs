//! Hides personal data. An operator can ask for the values, which is audited.

use serde_json::Value;

/// Shown in place of a value.
pub(super) const HIDDEN: &str = "•••";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visibility {
    /// Only names and structure.
    Redacted,
    /// Everything, because the operator asked for it.
    Full,
}

impl Visibility {
    pub(super) fn requested(personal: bool) -> Self {
        if personal { Self::Full } else { Self::Redacted }
    }

    /// The text, or its replacement.
    pub(super) fn of(self, text: &str) -> &str {
        match self {
            Self::Redacted => HIDDEN,
            Self::Full => text,
        }
    }

    /// The body of a message: pretty-printed JSON, or as it is.
    pub(super) fn body(self, bytes: &[u8]) -> String {
        match (serde_json::from_slice::<Value>(bytes), self) {
            (Ok(mut body), Self::Redacted) => {
                hide(&mut body);
                serde_json::to_string_pretty(&body).unwrap_or_default()
            }
            (Ok(body), Self::Full) => serde_json::to_string_pretty(&body).unwrap_or_default(),
            (Err(_), Self::Redacted) => format!("{HIDDEN} (not JSON)"),
            (Err(_), Self::Full) => String::from_utf8_lossy(bytes).into_owned(),
        }
    }
}

/// Replaces all strings and numbers in a value.
fn hide(value: &mut Value) {
    match value {
        Value::String(_) | Value::Number(_) => *value = HIDDEN.into(),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Object(fields) => fields.values_mut().for_each(hide),
        Value::Null | Value::Bool(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_redacted_body_keeps_only_names_and_structure() {
        let body =
            json!({"userId": 7, "traits": {"name": "Ada", "vip": true, "tags": ["a", null, {"b": 1.5}]}});
        let bytes = serde_json::to_vec(&body).unwrap();
        let redacted: Value = serde_json::from_str(&Visibility::Redacted.body(&bytes)).unwrap();
        let dots = HIDDEN;
        assert_eq!(
            redacted,
            json!({"userId": dots, "traits": {"name": dots, "vip": true, "tags": [dots, null, {"b": dots}]}})
        );
        let shown: Value = serde_json::from_str(&Visibility::Full.body(&bytes)).unwrap();
        assert_eq!(shown, body);
        assert!(!Visibility::Redacted.body(b"Ada, not JSON").contains("Ada"));
        assert_eq!(Visibility::Full.body(b"\xffAda"), "\u{fffd}Ada");
    }
}
