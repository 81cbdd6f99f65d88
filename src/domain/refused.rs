//! Values that Close refused for a record, so that they are not sent again with every event about it.
//!
//! Close names the refused field, or it names none. In the second case all values that could be left out were, and one
//! of them is bad. They are remembered as a group: as soon as one of them has another value, all are tried again.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

/// The most groups of one record. The oldest is forgotten, and costs one call more.
const MAX_GROUPS: usize = 16;

/// Digests of groups of fields with their values. Most groups have one field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedValues(VecDeque<u64>);

impl RefusedValues {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn insert<'a>(&mut self, group: impl IntoIterator<Item = (&'a str, &'a Value)>) {
        if let Some(digest) = digest(group) {
            self.push(digest);
        }
    }

    pub fn contains<'a>(&self, group: impl IntoIterator<Item = (&'a str, &'a Value)>) -> bool {
        !self.is_empty() && digest(group).is_some_and(|digest| self.0.contains(&digest))
    }

    /// Adds those of another memory of the same record.
    pub fn extend(&mut self, other: Self) {
        other.0.into_iter().for_each(|digest| self.push(digest));
    }

    fn push(&mut self, digest: u64) {
        if !self.0.contains(&digest) {
            self.0.push_back(digest);
        }
        while self.0.len() > MAX_GROUPS {
            self.0.pop_front();
        }
    }
}

/// `None` for an empty group.
fn digest<'a>(group: impl IntoIterator<Item = (&'a str, &'a Value)>) -> Option<u64> {
    let mut group: Vec<_> = group.into_iter().map(|(field, value)| (field, value.to_string())).collect();
    group.sort();
    let mut hasher = DefaultHasher::new();
    group.hash(&mut hasher);
    (!group.is_empty()).then(|| hasher.finish())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_group_is_known_with_all_its_values_only() {
        let (bad, odd, good) = (json!("bad"), json!(["odd"]), json!("good"));
        let mut refused = RefusedValues::default();
        assert!(!refused.contains([("phones", &bad)]) && !refused.contains([]));
        refused.insert([("phones", &bad)]);
        refused.insert([("title", &odd), ("custom.cf_1", &bad)]);
        assert!(refused.contains([("phones", &bad)]));
        assert!(!refused.contains([("phones", &good)]) && !refused.contains([("title", &odd)]));
        assert!(refused.contains([("custom.cf_1", &bad), ("title", &odd)]), "in any order");
        assert!(!refused.contains([("custom.cf_1", &good), ("title", &odd)]));
    }

    #[test]
    fn the_memory_is_bounded_and_forgets_the_oldest() {
        let mut refused = RefusedValues::default();
        let values: Vec<Value> = (0..100).map(Value::from).collect();
        for value in &values {
            refused.insert([("phones", value)]);
        }
        let known = values.iter().filter(|value| refused.contains([("phones", *value)])).count();
        assert_eq!((known, refused.contains([("phones", &values[99])])), (MAX_GROUPS, true));
        let mut other = RefusedValues::default();
        other.insert([("title", &values[0])]);
        refused.extend(other);
        assert!(refused.contains([("title", &values[0])]) && refused.0.len() == MAX_GROUPS);
    }
}
