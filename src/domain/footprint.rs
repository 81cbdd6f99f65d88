//! How much memory a JSON text takes as a tree of values, found without building the tree.
//!
//! A byte of JSON can become a hundred bytes of memory: the seven bytes `{"":0},` are an object that takes seven hundred.
//! A path of a mapping that descends (`$..email`) also writes down the path to each value, so long keys around many values
//! cost their product. A text that takes too much is rejected before any of it is built.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The most memory that a text from outside may take as a tree where it is not a message for the worker: an answer of
/// Close, or the body of a dead letter that a tool reads.
pub(crate) const MAX_TREE: usize = 64 << 20;

/// A value, without what it points to.
pub(crate) const VALUE: usize = 32;
/// The smallest allocation of a list has four values.
pub(crate) const LIST: usize = 4 * VALUE;
/// The smallest allocation of an object has room for eleven members.
pub(crate) const OBJECT: usize = 640;
/// A further member of an object, in nodes that are half full, and the allocation of its key.
pub(crate) const MEMBER: usize = 128;
/// Text on the heap takes at least this much.
pub(crate) const TEXT: usize = 24;

/// Whether the tree of this JSON takes at most `limit` bytes, and the paths to all its values together as much.
///
/// # Errors
/// When the text is not valid JSON.
pub(crate) fn fits(json: &[u8], limit: usize) -> Result<bool, serde_json::Error> {
    // A text of n bytes has paths of at most n bytes to fewer than n values, and no byte of it becomes more than 100.
    if json.len().saturating_mul(json.len().max(100)) <= limit {
        return Ok(true);
    }
    let mut meter = Meter { limit, tree: 0, paths: 0 };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    match (Node { meter: &mut meter, path: 0 }).deserialize(&mut deserializer) {
        Err(_) if meter.is_over() => Ok(false),
        counted => counted.and_then(|()| deserializer.end()).map(|()| true),
    }
}

struct Meter {
    limit: usize,
    tree: usize,
    paths: usize,
}

impl Meter {
    fn is_over(&self) -> bool {
        self.tree.max(self.paths) > self.limit
    }

    fn add<E: Error>(&mut self, tree: usize, path: usize) -> Result<(), E> {
        self.tree = self.tree.saturating_add(tree);
        self.paths = self.paths.saturating_add(path);
        if self.is_over() { Err(E::custom("too many values")) } else { Ok(()) }
    }
}

/// One value, behind a path of this length.
struct Node<'a> {
    meter: &'a mut Meter,
    path: usize,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.meter.add(VALUE, self.path)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.visit_unit()
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.visit_unit()
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.visit_unit()
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.visit_unit()
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.meter.add(VALUE + text.len().max(TEXT), self.path)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { meter, path } = self;
        meter.add(VALUE, path)?;
        let mut first = LIST;
        // In a path: `[123456]`.
        while items.next_element_seed(Node { meter: &mut *meter, path: path + 8 })?.is_some() {
            meter.add(std::mem::take(&mut first), 0)?;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let Self { meter, path } = self;
        meter.add(VALUE, path)?;
        let mut member = OBJECT;
        while let Some(key) = members.next_key_seed(KeyLength)? {
            meter.add(std::mem::replace(&mut member, MEMBER) + key, 0)?;
            // In a path: `['key']`.
            members.next_value_seed(Node { meter: &mut *meter, path: path + key + 4 })?;
        }
        Ok(())
    }
}

struct KeyLength;

impl<'de> DeserializeSeed<'de> for KeyLength {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyLength {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<usize, E> {
        Ok(key.len())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_text_that_takes_too_much_memory_does_not_fit() {
        assert!(size_of::<Value>() <= VALUE);
        let list = |item: &str, bytes: usize| {
            format!("[{item}{}]", format!(",{item}").repeat(bytes / (item.len() + 1) - 2))
        };
        let many = |item: &str| list(item, MIB);
        let object = |key: &str, depth: usize, inner: &str| {
            format!("{}{inner}{}", format!(r#"{{"{key}":"#).repeat(depth), "}".repeat(depth))
        };
        let cases = [
            (many("0"), true),
            (many("[]"), true),
            (many("{}"), true),
            (many(r#""""#), true),
            (format!("\"{}\"", "a".repeat(MIB)), true),
            (many(r#"{"":0}"#), false),
            (many("[0]"), false),
            (object("k", 4, &many("0")), true),
            (object(&"k".repeat(MIB / 2), 1, &list("0", MIB / 2)), false),
            (object(&"k".repeat(1000), 100, &list("0", MIB / 2)), false),
        ];
        for (json, expected) in cases {
            let found = fits(json.as_bytes(), 32 * MIB);
            let found = found.unwrap_or_else(|error| panic!("{error}: {}", &json[..60]));
            assert_eq!(found, expected, "{}", &json[..60]);
        }
    }

    #[test]
    fn invalid_json_is_an_error() {
        for json in ["", "{", "[1,]", "{\"a\":1} 2", "[\"\\ud83c\"]", "nul"] {
            let long = format!("{json}{}", " ".repeat(200));
            assert!(fits(long.as_bytes(), 1000).is_err(), "{json}");
        }
    }
}
