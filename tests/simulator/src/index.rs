//! The search index: what the records held a while ago. Writes become visible one by one, each at its own
//! time. Every client of Close has to cope with the states in between (close-api.md §6).

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    sync::Arc,
};

use jiff::Timestamp;
use serde_json::Value;

use crate::schema::Kind;

/// A record as it was when it was written.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) value: Arc<Value>,
}

/// The documents that search sees now, and the writes it will see later.
#[derive(Debug, Default)]
pub(crate) struct Index {
    visible: HashMap<String, Document>,
    /// An inverted index: the ids of the visible documents by field and normalized value. Without it, a search
    /// for many ids at once would read every document.
    postings: HashMap<String, HashSet<String>>,
    /// The number of the last visible write of each id. A slow write must not undo a later, faster one.
    versions: HashMap<String, u64>,
    pending: BTreeMap<(Timestamp, u64), Write>,
    n_writes: u64,
}

#[derive(Debug)]
struct Write {
    id: String,
    document: Option<Document>,
}

impl Index {
    /// Queues a write, or a deletion (`None`), that becomes visible at `visible_at`.
    pub(crate) fn write(&mut self, id: &str, document: Option<Document>, visible_at: Timestamp) {
        self.n_writes += 1;
        self.pending.insert((visible_at, self.n_writes), Write { id: id.to_owned(), document });
    }

    /// Makes all writes visible that are due.
    pub(crate) fn apply_due(&mut self, now: Timestamp) {
        while let Some(entry) = self.pending.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, version), write) = entry.remove_entry();
            if self.versions.get(&write.id).is_some_and(|shown| *shown > version) {
                continue;
            }
            self.versions.insert(write.id.clone(), version);
            if let Some(old) = self.visible.remove(&write.id) {
                for term in terms(&old.value) {
                    if let Entry::Occupied(mut postings) = self.postings.entry(term) {
                        postings.get_mut().remove(&old.id);
                        if postings.get().is_empty() {
                            postings.remove();
                        }
                    }
                }
            }
            if let Some(new) = write.document {
                for term in terms(&new.value) {
                    self.postings.entry(term).or_default().insert(new.id.clone());
                }
                self.visible.insert(write.id, new);
            }
        }
    }

    /// Makes all pending writes visible.
    pub(crate) fn apply_all(&mut self) {
        self.apply_due(Timestamp::MAX);
    }

    pub(crate) fn documents(&self) -> impl Iterator<Item = &Document> {
        self.visible.values()
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Document> {
        self.visible.get(id)
    }

    /// The ids of the documents with this value in this field, ignoring case and surrounding whitespace.
    /// Indexed fields are `email`, `lead_id`, and custom fields by their key.
    pub(crate) fn ids_with(&self, field: &str, value: &str) -> impl Iterator<Item = &str> {
        self.postings.get(&term(field, value)).into_iter().flatten().map(String::as_str)
    }

    /// The visible contacts of a lead.
    pub(crate) fn contacts_of(&self, lead_id: &str) -> impl Iterator<Item = &Document> {
        let contacts = self.ids_with("lead_id", lead_id).filter_map(|id| self.get(id));
        contacts.filter(move |contact| contact.value["lead_id"] == *lead_id)
    }
}

/// The text without the differences that `exact_value` ignores: case and surrounding whitespace.
pub(crate) fn normalized(text: &str) -> String {
    text.trim().to_lowercase()
}

fn term(field: &str, value: &str) -> String {
    format!("{field}\0{}", normalized(value))
}

/// The keys of the inverted index for a document.
fn terms(document: &Value) -> Vec<String> {
    let mut terms = Vec::new();
    for (key, value) in document.as_object().into_iter().flatten() {
        if key == "lead_id" || key.starts_with("custom.") {
            let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            terms.extend(values.iter().filter_map(Value::as_str).map(|value| term(key, value)));
        }
    }
    let emails = document["emails"].as_array().into_iter().flatten();
    terms.extend(emails.filter_map(|item| item["email"].as_str()).map(|email| term("email", email)));
    terms
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn document(value: Value) -> Document {
        Document { kind: Kind::Lead, id: "lead_1".into(), value: Arc::new(value) }
    }

    fn shown(index: &mut Index, second: i64) -> Option<Value> {
        index.apply_due(at(second));
        index.get("lead_1").map(|document| (*document.value).clone())
    }

    #[test]
    fn writes_become_visible_when_due_and_never_go_back() {
        let mut index = Index::default();
        index.write("lead_1", Some(document(json!(1))), at(10));
        index.write("lead_1", Some(document(json!(2))), at(30)); // slow
        index.write("lead_1", Some(document(json!(3))), at(20)); // written later, visible earlier
        assert_eq!(shown(&mut index, 9), None);
        assert_eq!(shown(&mut index, 10), Some(json!(1)));
        assert_eq!(shown(&mut index, 20), Some(json!(3)));
        assert_eq!(shown(&mut index, 30), Some(json!(3)));
        index.write("lead_1", None, at(40));
        assert_eq!(shown(&mut index, 39), Some(json!(3)));
        assert_eq!(shown(&mut index, 40), None);
    }
}
