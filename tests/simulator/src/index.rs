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
    states: HashMap<String, State>,
    pending: BTreeMap<(Timestamp, u64), Vec<Write>>,
    n_writes: u64,
}

/// What search sees of a record. Custom fields have a lag of their own, so they are kept apart (close-api.md §15 row 1).
#[derive(Debug, Default)]
struct State {
    /// The creation is visible.
    exists: bool,
    /// The last visible version of each part, with its number. A slow write must not undo a later, faster one.
    parts: [Option<(u64, Document)>; 2],
    /// The deletion is visible.
    is_deleted: bool,
}

/// A part of a record with its own lag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    CustomFields,
    Rest,
}

impl Part {
    const ALL: [Self; 2] = [Self::CustomFields, Self::Rest];

    fn has(self, key: &str) -> bool {
        (key.starts_with("custom.") || key == "custom") == (self == Self::CustomFields)
    }
}

#[derive(Debug)]
enum Write {
    Creation(Document),
    Change(Part, Document),
    Deletion(String),
}

impl Write {
    fn id(&self) -> &str {
        match self {
            Self::Creation(document) | Self::Change(_, document) => &document.id,
            Self::Deletion(id) => id,
        }
    }
}

impl State {
    fn apply(&mut self, write: Write, number: u64) {
        let mut set = |part: Part, document: &Document| {
            let version = &mut self.parts[part as usize];
            if version.as_ref().is_none_or(|(shown, _)| *shown < number) {
                *version = Some((number, document.clone()));
            }
        };
        match write {
            Write::Creation(document) => {
                for part in Part::ALL {
                    set(part, &document);
                }
                self.exists = true;
            }
            Write::Change(part, document) => set(part, &document),
            Write::Deletion(_) => *self = Self { is_deleted: true, ..Self::default() },
        }
    }

    /// The document that search sees.
    fn document(&self) -> Option<Document> {
        let [Some((custom, with_custom)), Some((rest, with_rest))] = &self.parts else { return None };
        if !self.exists || self.is_deleted {
            return None;
        }
        if custom == rest {
            return Some(with_rest.clone());
        }
        let of = |part: Part, document: &Document| {
            let members = document.value.as_object().cloned().unwrap_or_default();
            members.into_iter().filter(move |(key, _)| part.has(key)).collect::<Vec<_>>()
        };
        let members = of(Part::CustomFields, with_custom).into_iter().chain(of(Part::Rest, with_rest));
        Some(Document { value: Arc::new(Value::Object(members.collect())), ..with_rest.clone() })
    }
}

impl Index {
    /// Whether a creation was queued.
    pub(crate) fn is_known(&self, id: &str) -> bool {
        self.states.contains_key(id)
    }

    /// Queues a creation that becomes visible at `visible`.
    pub(crate) fn create(&mut self, document: Document, visible: Timestamp) {
        self.states.entry(document.id.clone()).or_default();
        let number = self.next();
        self.queue(Write::Creation(document), visible, number);
    }

    /// Queues a change. Custom fields and the rest become visible each at its own time.
    pub(crate) fn change(
        &mut self,
        document: Document,
        visible: Timestamp,
        custom_fields_visible: Timestamp,
    ) {
        let number = self.next();
        self.queue(Write::Change(Part::CustomFields, document.clone()), custom_fields_visible, number);
        self.queue(Write::Change(Part::Rest, document), visible, number);
    }

    /// Queues a deletion.
    pub(crate) fn delete(&mut self, id: &str, visible: Timestamp) {
        let number = self.next();
        self.queue(Write::Deletion(id.to_owned()), visible, number);
    }

    fn next(&mut self) -> u64 {
        self.n_writes += 1;
        self.n_writes
    }

    fn queue(&mut self, write: Write, visible: Timestamp, number: u64) {
        self.pending.entry((visible, number)).or_default().push(write);
    }

    /// Makes all writes visible that are due.
    pub(crate) fn apply_due(&mut self, now: Timestamp) {
        while let Some(entry) = self.pending.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, number), writes) = entry.remove_entry();
            for write in writes {
                self.apply(write, number);
            }
        }
    }

    fn apply(&mut self, write: Write, number: u64) {
        let id = write.id().to_owned();
        let state = self.states.entry(id.clone()).or_default();
        state.apply(write, number);
        let document = state.document();
        if let Some(old) = self.visible.remove(&id) {
            for term in terms(&old.value) {
                if let Entry::Occupied(mut postings) = self.postings.entry(term) {
                    postings.get_mut().remove(&old.id);
                    if postings.get().is_empty() {
                        postings.remove();
                    }
                }
            }
        }
        if let Some(new) = document {
            for term in terms(&new.value) {
                self.postings.entry(term).or_default().insert(new.id.clone());
            }
            self.visible.insert(id, new);
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
        let name = |name: &str| document(json!({"name": name}));
        let change = |index: &mut Index, to: &str, second| index.change(name(to), at(second), at(second));
        index.create(name("1"), at(10));
        change(&mut index, "2", 30); // slow
        change(&mut index, "3", 20); // written later, visible earlier
        let names = [9, 10, 20, 30].map(|second| shown(&mut index, second));
        let shown_name = |name: &str| Some(json!({"name": name}));
        assert_eq!(names, [None, shown_name("1"), shown_name("3"), shown_name("3")]);
        index.delete("lead_1", at(40));
        assert_eq!(shown(&mut index, 39), shown_name("3"));
        assert_eq!(shown(&mut index, 40), None);
        change(&mut index, "4", 50);
        assert_eq!(shown(&mut index, 50), None, "a late write does not bring a deleted record back");
    }

    #[test]
    fn custom_fields_and_the_rest_become_visible_apart() {
        let mut index = Index::default();
        let state = |name: &str, plan: &str| json!({"name": name, "custom.cf_plan": plan});
        index.create(document(state("1", "1")), at(10));
        index.change(document(state("2", "2")), at(20), at(60));
        index.change(document(state("3", "3")), at(30), at(50));
        let states = [10, 20, 30, 50, 60].map(|second| shown(&mut index, second).unwrap());
        assert_eq!(
            states,
            [state("1", "1"), state("2", "1"), state("3", "1"), state("3", "3"), state("3", "3")]
        );
    }

    #[test]
    fn a_change_is_visible_with_the_creation_at_the_earliest() {
        let mut index = Index::default();
        let state = |name: &str| json!({"name": name});
        index.create(document(state("1")), at(60));
        index.change(document(state("2")), at(10), at(10));
        assert_eq!(shown(&mut index, 59), None);
        assert_eq!(shown(&mut index, 60), Some(state("2")));
    }
}
