//! Hides personal data. An operator can ask for the values, which is audited.

use std::io::{self, Write};

use serde_json::Value;

use crate::domain::footprint::{self, MAX_TREE};

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

    /// The beginning of a message's body, at most `limit` bytes: pretty-printed JSON, or as it is.
    pub(super) fn body(self, bytes: &[u8], limit: usize) -> Excerpt {
        if !footprint::fits(bytes, MAX_TREE).unwrap_or(true) {
            return self.raw(bytes, "too many values", limit);
        }
        match (serde_json::from_slice::<Value>(bytes), self) {
            (Ok(mut body), Self::Redacted) => {
                hide(&mut body);
                pretty(&body, limit)
            }
            (Ok(body), Self::Full) => pretty(&body, limit),
            (Err(_), _) => self.raw(bytes, "not JSON", limit),
        }
    }

    fn raw(self, bytes: &[u8], why: &str, limit: usize) -> Excerpt {
        match self {
            Self::Redacted => Excerpt { text: format!("{HIDDEN} ({why})"), is_cut: false },
            Self::Full => {
                let mut text = Bounded { bytes: Vec::new(), limit };
                let is_cut = text.write_all(bytes).is_err();
                text.into_excerpt(is_cut)
            }
        }
    }
}

/// The beginning of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Excerpt {
    pub(super) text: String,
    pub(super) is_cut: bool,
}

/// The beginning of a short text, such as a header.
pub(super) fn short(text: &str) -> String {
    const MAX_BYTES: usize = 1024;
    let end = text.floor_char_boundary(MAX_BYTES);
    if end == text.len() { text.to_owned() } else { format!("{}…", &text[..end]) }
}

/// Indentation can multiply the size of a body by more than a hundred, so writing stops at the limit.
fn pretty(body: &Value, limit: usize) -> Excerpt {
    let mut text = Bounded { bytes: Vec::new(), limit };
    let is_cut = serde_json::to_writer_pretty(&mut text, body).is_err();
    text.into_excerpt(is_cut)
}

/// Takes bytes up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl Bounded {
    fn into_excerpt(self, is_cut: bool) -> Excerpt {
        Excerpt { text: String::from_utf8_lossy(&self.bytes).into_owned(), is_cut }
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.limit - self.bytes.len();
        let taken = bytes.len().min(room);
        self.bytes.extend_from_slice(&bytes[..taken]);
        // Zero is the end for `write_all`.
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
        let redacted: Value = serde_json::from_str(&Visibility::Redacted.body(&bytes, 4096).text).unwrap();
        let dots = HIDDEN;
        assert_eq!(
            redacted,
            json!({"userId": dots, "traits": {"name": dots, "vip": true, "tags": [dots, null, {"b": dots}]}})
        );
        let shown: Value = serde_json::from_str(&Visibility::Full.body(&bytes, 4096).text).unwrap();
        assert_eq!(shown, body);
        assert!(!Visibility::Redacted.body(b"Ada, not JSON", 99).text.contains("Ada"));
        assert_eq!(Visibility::Full.body(b"\xffAda", 99).text, "\u{fffd}Ada");
    }

    #[test]
    fn a_body_is_cut_at_the_limit() {
        let nested = [vec![b'['; 100], b"0,".repeat(20_000), b"0".to_vec(), vec![b']'; 100]].concat();
        for visibility in [Visibility::Redacted, Visibility::Full] {
            let excerpt = visibility.body(&nested, 1000);
            assert_eq!((excerpt.text.len(), excerpt.is_cut), (1000, true));
        }
        let text = "é".repeat(600);
        assert!(Visibility::Full.body(text.as_bytes(), 999).is_cut);
        assert!(!Visibility::Full.body(text.as_bytes(), 1200).is_cut);
        assert_eq!(short(&text), format!("{}…", "é".repeat(512)));
        let many = format!("[{}0]", "{\"\":0},".repeat(150_000));
        assert!(Visibility::Redacted.body(many.as_bytes(), 1000).text.contains("too many values"));
    }
}
