//! Words that programs write when they have no value: `undefined`, `null`, `[object Object]`.
//!
//! As an id such a word would make one person of everybody, and as a value it would overwrite a real one. What counts as
//! such a word differs. An id that is `guest` or `0` is nobody's, because analytics services refuse it as well. A company
//! can be called Guest, and a person Null. So ids and values have a list of their own.

use std::collections::BTreeSet;

use crate::domain::mapping::coerce::MAX_ID;
use crate::domain::value::{same_word, trim};

/// A list of such words. They are found with single or double quotes around them, too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placeholders {
    exact: BTreeSet<String>,
    /// In lower case.
    any_case: BTreeSet<String>,
}

impl Placeholders {
    /// Words that are not an id. One in lower case is found in any case, another as it is written: `PostHog` refuses
    /// `Undefined` as well as `undefined`, but `NaN` only, because `nan` can be a name.
    pub fn of_ids(words: impl IntoIterator<Item = String>) -> Self {
        let (any_case, exact) = words.into_iter().partition(|word| word.to_lowercase() == *word);
        Self { exact, any_case }
    }

    /// Words that are not a value. They are found as they are written.
    pub fn of_values(words: impl IntoIterator<Item = String>) -> Self {
        Self { exact: words.into_iter().collect(), any_case: BTreeSet::new() }
    }

    pub(crate) fn has(&self, text: &str) -> bool {
        let text = trim(unquoted(trim(text)));
        // No word is as long, and a long text needs no copy.
        if text.len() > 4 * MAX_ID {
            return false;
        }
        self.exact.contains(text)
            || (!self.any_case.is_empty() && self.any_case.contains(&text.to_lowercase()))
    }

    /// The words without those that a field in Close accepts as a value.
    #[must_use]
    pub(crate) fn without(mut self, accepted: &[String]) -> Self {
        let stays = |word: &String| !accepted.iter().any(|value| same_word(value, word));
        self.exact.retain(stays);
        self.any_case.retain(stays);
        self
    }
}

fn unquoted(text: &str) -> &str {
    let inside = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    inside('"').or_else(|| inside('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_with_quotes_and_in_the_case_of_the_list() {
        let words = || ["undefined", "NaN", "[object Object]"].map(str::to_owned);
        let (ids, values) = (Placeholders::of_ids(words()), Placeholders::of_values(words()));
        for (text, id, value) in [
            ("undefined", true, true),
            (" undefined\u{200b}", true, true),
            ("\"undefined\"", true, true),
            ("'undefined'", true, true),
            ("Undefined", true, false),
            ("NaN", true, true),
            ("nan", false, false),
            ("[object Object]", true, true),
            ("'undefined\"", false, false),
            ("''", false, false),
            ("'", false, false),
            ("undefined undefined", false, false),
            ("undefined-1", false, false),
        ] {
            assert_eq!((ids.has(text), values.has(text)), (id, value), "{text}");
        }
        assert!(!Placeholders::default().has(""));
    }

    #[test]
    fn a_choice_of_the_field_is_a_value() {
        let values = Placeholders::of_values(["None", "null"].map(str::to_owned));
        let left = values.without(&["none ".to_owned(), "Pro".to_owned()]);
        assert!(!left.has("None") && left.has("null"));
    }
}
