//! Personal data out of sight: what a person's values are is shown to whoever asks, and asking is audited.

use serde_json::Value;

/// What stands for a value.
pub(crate) const HIDDEN: &str = "•••";

/// Whether values are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// Only what kind of thing is there.
    Masked,
    /// Everything: somebody asked for it.
    Personal,
}

impl Sight {
    /// What was asked for.
    pub(crate) fn asked(personal: bool) -> Self {
        if personal { Self::Personal } else { Self::Masked }
    }

    /// A text, or what stands for it.
    pub(crate) fn of(self, text: &str) -> &str {
        match self {
            Self::Masked => HIDDEN,
            Self::Personal => text,
        }
    }

    /// The body of a message: as it came if it is no JSON, else easy to read.
    pub(crate) fn body(self, bytes: &[u8]) -> String {
        match (serde_json::from_slice::<Value>(bytes), self) {
            (Ok(mut body), Self::Masked) => {
                hide(&mut body);
                serde_json::to_string_pretty(&body).unwrap_or_default()
            }
            (Ok(body), Self::Personal) => serde_json::to_string_pretty(&body).unwrap_or_default(),
            (Err(_), Self::Masked) => format!("{HIDDEN} (no JSON)"),
            (Err(_), Self::Personal) => String::from_utf8_lossy(bytes).into_owned(),
        }
    }
}

/// Leaves of a value only what its parts are called.
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
    fn of_a_masked_body_only_names_and_shape_are_left() {
        let body =
            json!({"userId": 7, "traits": {"name": "Ada", "vip": true, "tags": ["a", null, {"b": 1.5}]}});
        let bytes = serde_json::to_vec(&body).unwrap();
        let masked: Value = serde_json::from_str(&Sight::Masked.body(&bytes)).unwrap();
        let dots = HIDDEN;
        assert_eq!(
            masked,
            json!({"userId": dots, "traits": {"name": dots, "vip": true, "tags": [dots, null, {"b": dots}]}})
        );
        let shown: Value = serde_json::from_str(&Sight::Personal.body(&bytes)).unwrap();
        assert_eq!(shown, body);
        assert!(!Sight::Masked.body(b"Ada, no JSON").contains("Ada"));
        assert_eq!(Sight::Personal.body(b"\xffAda"), "\u{fffd}Ada");
    }
}
