//! What `simulate --set help` says about each field.

use strum::VariantNames as _;

use crate::behaviour::{
    ContactLists, Country, CreatedLead, DescendingCursor, ErrorShape, ErrorTexts, EventData, ExactValue,
    HeaderStyle, Lag, LastCursor, LeadContacts, MissingRecord, MissingSlash, RateLimitBody, SearchRows,
    UnknownSelector, UnknownUrl,
};
use crate::readback::{ListForm, NumberForm, TimeForm, UserForm};

/// A field of the behaviour, for help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Knob {
    pub name: &'static str,
    pub meaning: String,
    /// The values, or their form.
    pub forms: String,
}

impl Knob {
    pub(super) fn new(name: &'static str, doc: &str, forms: String) -> Self {
        Self { name, meaning: meaning(doc), forms }
    }
}

/// The text of a doc comment without its sources, such as `(close-api.md §2)`.
fn meaning(doc: &str) -> String {
    let mut text = doc.trim().to_owned();
    while let Some((before, rest)) = text.split_once(" (close-api.md") {
        let Some((_, after)) = rest.split_once(')') else { break };
        text = format!("{before}{after}");
    }
    text
}

/// The form of the values of a type.
pub(super) trait Forms {
    fn forms() -> String;
}

impl Forms for bool {
    fn forms() -> String {
        "true, false".into()
    }
}

impl Forms for u32 {
    fn forms() -> String {
        "a whole number".into()
    }
}

impl Forms for Vec<String> {
    fn forms() -> String {
        r#"a list, such as ["title"]"#.into()
    }
}

impl Forms for Lag {
    fn forms() -> String {
        "a duration, such as 2s or 1s..10s".into()
    }
}

impl Forms for Country {
    fn forms() -> String {
        "two letters, such as GB".into()
    }
}

impl<T: Forms> Forms for Option<T> {
    fn forms() -> String {
        format!("{}; null", T::forms())
    }
}

macro_rules! forms_of_enums {
    ($($kind:ident),+ $(,)?) => {
        $(impl Forms for $kind {
            fn forms() -> String {
                $kind::VARIANTS.join(", ")
            }
        })+
    };
}

forms_of_enums!(
    ContactLists,
    CreatedLead,
    DescendingCursor,
    ErrorShape,
    ErrorTexts,
    EventData,
    ExactValue,
    HeaderStyle,
    LastCursor,
    LeadContacts,
    ListForm,
    MissingRecord,
    MissingSlash,
    NumberForm,
    RateLimitBody,
    SearchRows,
    TimeForm,
    UnknownSelector,
    UnknownUrl,
    UserForm,
);

/// What to say about an unknown name: a similar one, and all.
pub(crate) fn known<'a>(unknown: &str, known: impl Iterator<Item = &'a String>) -> String {
    let known: Vec<&str> = known.map(String::as_str).collect();
    let similarity = |name: &str| strsim::jaro_winkler(unknown, name);
    let nearest = known.iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)));
    let hint = nearest.filter(|name| similarity(name) >= SIMILAR);
    let hint = hint.map_or_else(String::new, |name| format!("did you mean `{name}`? "));
    format!("{hint}known: {}", known.join(", "))
}

/// A typo or two. Less is another word.
const SIMILAR: f64 = 0.85;

#[cfg(test)]
mod tests {
    use crate::behaviour::Behaviour;

    #[test]
    fn every_field_has_a_meaning_values_and_its_default() {
        let (knobs, fields) = (Behaviour::knobs(), Behaviour::default().fields());
        assert_eq!(knobs.len(), fields.len());
        for knob in knobs {
            assert!(fields.contains_key(knob.name), "{}", knob.name);
            assert!(knob.meaning.ends_with('.') && !knob.meaning.contains("close-api"), "{knob:?}");
            assert!(!knob.forms.is_empty(), "{knob:?}");
            // What help says can be set.
            let mut behaviour = Behaviour::default();
            for value in knob.forms.split(", ").filter(|value| !value.contains(' ')) {
                behaviour.set(knob.name, value).unwrap_or_else(|error| panic!("{}: {error}", knob.name));
            }
        }
    }
}
