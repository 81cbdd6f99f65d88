//! The search index: what the book held a while ago. Writes become visible one by one, each at its own time,
//! and those in between are what every client of Close has to live with (close-api.md §6).

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use jiff::Timestamp;
use serde_json::Value;

use super::schema::Kind;

/// A record as it was when it was written.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) value: Arc<Value>,
}

/// The documents search sees, and those it will see.
#[derive(Debug, Default)]
pub(super) struct Index {
    shown: HashMap<String, Document>,
    /// The last write each id shows, so that a slow write does not undo a quick one made after it.
    versions: HashMap<String, u64>,
    coming: BTreeMap<(Timestamp, u64), Write>,
    written: u64,
}

#[derive(Debug)]
struct Write {
    id: String,
    document: Option<Document>,
}

impl Index {
    /// Takes a document, or that there is none any more, to show it from a certain moment on.
    pub(super) fn write(&mut self, id: &str, document: Option<Document>, visible: Timestamp) {
        self.written += 1;
        self.coming.insert((visible, self.written), Write { id: id.to_owned(), document });
    }

    /// Shows everything that is due.
    pub(super) fn catch_up(&mut self, now: Timestamp) {
        while let Some(entry) = self.coming.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, version), write) = entry.remove_entry();
            if self.versions.get(&write.id).is_some_and(|shown| *shown > version) {
                continue;
            }
            self.versions.insert(write.id.clone(), version);
            match write.document {
                Some(document) => self.shown.insert(write.id, document),
                None => self.shown.remove(&write.id),
            };
        }
    }

    /// Shows everything at once.
    pub(super) fn catch_up_fully(&mut self) {
        self.catch_up(Timestamp::MAX);
    }

    pub(super) fn documents(&self) -> impl Iterator<Item = &Document> {
        self.shown.values()
    }

    pub(super) fn get(&self, id: &str) -> Option<&Document> {
        self.shown.get(id)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn document(value: Value) -> Option<Document> {
        Some(Document { kind: Kind::Lead, id: "lead_1".into(), value: Arc::new(value) })
    }

    fn shown(index: &mut Index, second: i64) -> Option<Value> {
        index.catch_up(at(second));
        index.get("lead_1").map(|document| (*document.value).clone())
    }

    #[test]
    fn writes_show_when_they_are_due_and_never_go_back() {
        let mut index = Index::default();
        index.write("lead_1", document(json!(1)), at(10));
        index.write("lead_1", document(json!(2)), at(30)); // slow
        index.write("lead_1", document(json!(3)), at(20)); // made later, shown earlier
        assert_eq!(shown(&mut index, 9), None);
        assert_eq!(shown(&mut index, 10), Some(json!(1)));
        assert_eq!(shown(&mut index, 20), Some(json!(3)));
        assert_eq!(shown(&mut index, 30), Some(json!(3)));
        index.write("lead_1", None, at(40));
        assert_eq!(shown(&mut index, 39), Some(json!(3)));
        assert_eq!(shown(&mut index, 40), None);
    }
}
