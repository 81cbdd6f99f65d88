//! Where a value comes from: the settings `from`, `normalize` and `values` of a mapping rule.
//!
//! A source is a list of alternatives. The first one that is present in the event is used:
//!
//! - a JSONPath (RFC 9535), `$.traits.title`, which may select several nodes;
//! - a template, `{$.traits.firstName} {$.traits.lastName}`, which is present when all of its paths are;
//! - a constant.
//!
//! Null, blank text and empty lists count as absent. So does an object, because only its members can be values:
//! `["$.traits.company.name", "$.traits.company"]` takes the name of a company that is sent as plain text, and takes
//! nothing from a company that has only an id. An object is reported as unusable only if the first alternative finds it
//! and the other alternatives find nothing.
//!
//! A [placeholder](Placeholders) counts as absent, too, also inside a template: `{$.traits.firstName}
//! {$.traits.lastName}` is not used if one of them is `undefined`. It is a value if the rule says so, as a key of
//! `values`, or if it is a constant. A placeholder is reported if no alternative has a value.
//!
//! Found text is trimmed, and control characters except line breaks and tabs are removed. Everything else stays as it was
//! sent, including emoji and right-to-left text.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use serde_json::Value;
use strum::{EnumString, IntoStaticStr, VariantArray};

use crate::domain::dropped::excerpt;
use crate::domain::event::Event;
use crate::domain::mapping::coerce::MAX_ITEMS;
use crate::domain::mapping::jsonpath::{nodes, path};
use crate::domain::mapping::placeholders::Placeholders;
use crate::domain::value::{clean, domain, flatten, single_spaces, text, trim};

/// Where a value comes from and how it is normalized.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Source {
    alternatives: Vec<Alternative>,
    normalize: Vec<Normalize>,
    values: BTreeMap<String, Value>,
    placeholders: Placeholders,
}

/// One way to get a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative(Form);

#[derive(Clone, Debug, PartialEq)]
enum Form {
    Path(JpQuery),
    Template(Vec<Piece>),
    Constant(Value),
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Literal(String),
    Path(JpQuery),
}

/// A change that is applied to every text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Normalize {
    /// `ACME` becomes `acme`.
    Lowercase,
    /// `acme` becomes `ACME`.
    Uppercase,
    /// Each run of whitespace becomes one space.
    SingleSpaces,
    /// An email address or URL becomes its domain: `jane@acme.test` becomes `acme.test`.
    Domain,
    /// The items of a list are joined with `, `.
    Join,
}

impl Normalize {
    /// The name in the configuration.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What a source found in an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Picked {
    /// The event has no value.
    Nothing,
    /// An object where a value is needed.
    Object,
    /// Nothing but words for nothing: the first of them.
    Placeholder(Value),
    /// At least one value. None of them is null, blank or an object.
    Values(Vec<Value>),
}

impl Picked {
    /// The first value, also if it is a word for nothing.
    pub(crate) fn first(&self) -> Option<&Value> {
        match self {
            Self::Nothing | Self::Object => None,
            Self::Placeholder(word) => Some(word),
            Self::Values(values) => values.first(),
        }
    }
}

impl Alternative {
    /// Reads a JSONPath or a template.
    ///
    /// # Errors
    /// What is wrong with it, for the author of the mapping.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with('$') {
            return path(text).map(|path| Self(Form::Path(path)));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((literal, tail)) = rest.split_once('{') {
            let Some((inner, tail)) = tail.split_once('}') else {
                return Err(format!("`{text}` has a `{{` without its `}}`"));
            };
            if !literal.is_empty() {
                pieces.push(Piece::Literal(literal.to_owned()));
            }
            pieces.push(Piece::Path(path(inner)?));
            rest = tail;
        }
        if pieces.is_empty() {
            return Err(format!(
                "`{text}` is neither a JSONPath like `$.traits.title` nor a template like `{{$.traits.a}} \
                 {{$.traits.b}}`; a constant is written `{{ value = \"{text}\" }}`"
            ));
        }
        if !rest.is_empty() {
            pieces.push(Piece::Literal(rest.to_owned()));
        }
        Ok(Self(Form::Template(pieces)))
    }

    pub fn constant(value: impl Into<Value>) -> Self {
        Self(Form::Constant(value.into()))
    }

    fn pick(&self, event: &Event, is_placeholder: &impl Fn(&str) -> bool) -> Picked {
        let pieces = match &self.0 {
            Form::Path(path) => return pick(path, event, is_placeholder),
            Form::Constant(value) => return Picked::Values(vec![value.clone()]),
            Form::Template(pieces) => pieces,
        };
        let (mut whole, mut placeholder) = (String::new(), None);
        for piece in pieces {
            match piece {
                Piece::Literal(text) => whole.push_str(text),
                Piece::Path(path) => match pick(path, event, is_placeholder) {
                    Picked::Values(values) => match values.first().and_then(text) {
                        Some(text) => whole.push_str(&text),
                        None => return Picked::Nothing,
                    },
                    Picked::Placeholder(word) => placeholder = placeholder.or(Some(word)),
                    Picked::Nothing | Picked::Object => return Picked::Nothing,
                },
            }
        }
        placeholder.map_or_else(|| Picked::Values(vec![whole.into()]), Picked::Placeholder)
    }
}

/// The most values that a path finds, and the most items of a list: one more than a field can hold, to report that there
/// are more.
const MAX_FOUND: usize = MAX_ITEMS + 1;

fn pick(path: &JpQuery, event: &Event, is_placeholder: &impl Fn(&str) -> bool) -> Picked {
    let (mut values, mut otherwise) = (Vec::new(), Picked::Nothing);
    for node in nodes(path, &event.body) {
        match (present(node, is_placeholder), &otherwise) {
            (Picked::Values(found), _) => values.extend(found),
            (Picked::Object, _) => otherwise = Picked::Object,
            (word @ Picked::Placeholder(_), Picked::Nothing) => otherwise = word,
            (Picked::Placeholder(_) | Picked::Nothing, _) => {}
        }
        if values.len() == MAX_FOUND {
            break;
        }
    }
    if values.is_empty() { otherwise } else { Picked::Values(values) }
}

/// The cleaned value of a node, if it is not absent.
fn present(node: &Value, is_placeholder: &impl Fn(&str) -> bool) -> Picked {
    let one = |value: Value| match text(&value) {
        Some(text) if is_placeholder(&text) => Picked::Placeholder(excerpt(&value)),
        Some(_) | None => Picked::Values(vec![value]),
    };
    match node {
        Value::Null => Picked::Nothing,
        Value::Object(_) => Picked::Object,
        Value::Bool(_) | Value::Number(_) => one(node.clone()),
        Value::String(text) => match clean(text) {
            text if text.is_empty() => Picked::Nothing,
            text => one(text.into()),
        },
        Value::Array(items) => {
            let is_word = |item: &Value| text(item).is_some_and(|text| is_placeholder(&text));
            let is_value = |item: &&Value| !absent(item) && !is_word(item);
            let found: Vec<Value> = items.iter().filter(is_value).take(MAX_FOUND).map(cleaned).collect();
            match items.iter().find(|item| is_word(item)) {
                _ if !found.is_empty() => Picked::Values(vec![found.into()]),
                Some(word) => Picked::Placeholder(excerpt(word)),
                None => Picked::Nothing,
            }
        }
    }
}

fn absent(item: &Value) -> bool {
    item.is_null() || item.as_str().is_some_and(|text| trim(text).is_empty())
}

/// A list or an object inside a list is never a value, so an excerpt of it is enough. A path such as `$..*` finds each
/// list again in every list around it.
fn cleaned(item: &Value) -> Value {
    item.as_str().map_or_else(|| excerpt(item), |text| clean(text).into())
}

impl Source {
    pub fn new(alternatives: impl IntoIterator<Item = Alternative>) -> Self {
        Self { alternatives: alternatives.into_iter().collect(), ..Self::default() }
    }

    /// The same source with normalized texts.
    #[must_use]
    pub fn normalized(mut self, normalize: Vec<Normalize>) -> Self {
        self.normalize = normalize;
        self
    }

    /// The same source with values replaced whose text is a key in `values`.
    #[must_use]
    pub fn translated(mut self, values: BTreeMap<String, Value>) -> Self {
        self.values = values;
        self
    }

    /// The same source with words that are not a value.
    #[must_use]
    pub fn with_placeholders(mut self, placeholders: Placeholders) -> Self {
        self.placeholders = placeholders;
        self
    }

    /// The same source for a field in Close that accepts these values.
    #[must_use]
    pub(crate) fn accepting(mut self, values: &[String]) -> Self {
        self.placeholders = self.placeholders.without(values);
        self
    }

    /// Values that do not depend on the content of the event: constants and replacements.
    pub fn constants(&self) -> impl Iterator<Item = &Value> {
        let constants = self.alternatives.iter().filter_map(|alternative| match &alternative.0 {
            Form::Constant(value) => Some(value),
            Form::Path(_) | Form::Template(_) => None,
        });
        // A constant that is replaced is not a value itself.
        constants
            .filter(|value| text(value).is_none_or(|text| !self.values.contains_key(&text)))
            .chain(self.values.values())
    }

    pub fn pick(&self, event: &Event) -> Picked {
        let mut otherwise = Picked::Nothing;
        for (n, picked) in self.alternatives(event).enumerate() {
            match (picked, &otherwise) {
                (found @ Picked::Values(_), _) => return found,
                (Picked::Object, _) if n == 0 => otherwise = Picked::Object,
                (word @ Picked::Placeholder(_), Picked::Nothing) => otherwise = word,
                (Picked::Object | Picked::Placeholder(_) | Picked::Nothing, _) => {}
            }
        }
        otherwise
    }

    /// What each alternative finds, in order.
    pub(crate) fn alternatives(&self, event: &Event) -> impl Iterator<Item = Picked> {
        let is_placeholder = |text: &str| self.is_placeholder(text);
        self.alternatives.iter().map(move |alternative| match alternative.pick(event, &is_placeholder) {
            Picked::Values(values) => Picked::Values(self.change(values)),
            other @ (Picked::Nothing | Picked::Object | Picked::Placeholder(_)) => other,
        })
    }

    /// Whether a text is a word for nothing. One that the rule replaces by a value is not.
    fn is_placeholder(&self, text: &str) -> bool {
        let is_replaced = || {
            let normalize = |text: String, step: &Normalize| normalized(&text, *step);
            let normalized = self.normalize.iter().fold(text.to_owned(), normalize);
            self.values.contains_key(text) || self.values.contains_key(&normalized)
        };
        self.placeholders.has(text) && !is_replaced()
    }

    fn change(&self, mut values: Vec<Value>) -> Vec<Value> {
        for normalize in &self.normalize {
            if *normalize == Normalize::Join {
                let texts: Vec<_> = flatten(&values).filter_map(text).collect();
                if !texts.is_empty() {
                    values = vec![texts.join(", ").into()];
                }
            } else {
                for value in &mut values {
                    each(value, &|text| normalized(text, *normalize).into());
                }
            }
        }
        if !self.values.is_empty() {
            for value in &mut values {
                translate(value, &self.values);
            }
        }
        values
    }
}

/// Changes a text, or each text in a list.
fn each(value: &mut Value, change: &impl Fn(&str) -> Value) {
    if let Some(items) = value.as_array_mut() {
        for item in items {
            each(item, change);
        }
    } else if let Some(text) = value.as_str() {
        *value = change(text);
    }
}

fn normalized(text: &str, normalize: Normalize) -> String {
    match normalize {
        Normalize::Lowercase => text.to_lowercase(),
        Normalize::Uppercase => text.to_uppercase(),
        Normalize::SingleSpaces => single_spaces(text),
        Normalize::Domain => domain(text).unwrap_or_else(|| text.to_owned()),
        // Joins several values, so it does nothing to a single text.
        Normalize::Join => text.to_owned(),
    }
}

fn translate(value: &mut Value, values: &BTreeMap<String, Value>) {
    if let Some(items) = value.as_array_mut() {
        for item in items {
            translate(item, values);
        }
    } else if let Some(other) = text(value).and_then(|text| values.get(&text)) {
        *value = other.clone();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(alternatives: &[&str]) -> Source {
        Source::new(alternatives.iter().map(|text| Alternative::parse(text).unwrap()))
    }

    fn picked(source: &Source, traits: Value) -> Value {
        match source.pick(&Event { body: json!({"traits": traits}) }) {
            Picked::Nothing => json!("nothing"),
            Picked::Object => json!("an object"),
            Picked::Placeholder(word) => json!({"placeholder": word}),
            Picked::Values(values) => values.into(),
        }
    }

    #[test]
    fn a_word_for_nothing_is_absent() {
        let words = || Placeholders::of_values(["undefined", "None", "0"].map(str::to_owned));
        let name = source(&["$.traits.name", "{$.traits.first} {$.traits.last}", "$.traits.first"])
            .with_placeholders(words());
        let word = |word: Value| json!({"placeholder": word});
        let cases = [
            (json!({"name": "undefined"}), word(json!("undefined"))),
            (json!({"name": "\"undefined\" "}), word(json!("\"undefined\""))),
            (json!({"name": "undefined", "first": "Jane", "last": "Doe"}), json!(["Jane Doe"])),
            (json!({"first": "Jane", "last": "undefined"}), json!(["Jane"])),
            (json!({"first": "undefined", "last": "None"}), word(json!("undefined"))),
            (json!({"first": "undefined"}), word(json!("undefined"))),
            (json!({"name": {}, "first": "undefined"}), json!("an object")),
            (json!({"name": "undefined", "first": {}}), word(json!("undefined"))),
            (json!({"name": ["undefined", "Jane", null, "None"]}), json!([["Jane"]])),
            (json!({"name": [null, "undefined"]}), word(json!("undefined"))),
            (json!({"name": 0}), word(json!(0))),
            (json!({"name": "none"}), json!(["none"])),
            (json!({"name": "undefined behaviour"}), json!(["undefined behaviour"])),
        ];
        for (traits, expected) in cases {
            assert_eq!(picked(&name, traits.clone()), expected, "{traits}");
        }
        let all = source(&["$.traits.tags[*]"]).with_placeholders(words());
        assert_eq!(picked(&all, json!({"tags": ["undefined", "a"]})), json!(["a"]));
        // What the author of the mapping has written is a value.
        let replaced = source(&["$.traits.plan"])
            .normalized(vec![Normalize::Lowercase])
            .translated([("none".to_owned(), json!("Free")), ("undefined".to_owned(), json!("?"))].into())
            .with_placeholders(words());
        assert_eq!(picked(&replaced, json!({"plan": "None"})), json!(["Free"]));
        assert_eq!(picked(&replaced, json!({"plan": "undefined"})), json!(["?"]));
        let constant = Source::new([Alternative::constant("None")]).with_placeholders(words());
        assert_eq!(picked(&constant, json!({})), json!(["None"]));
        let accepting = source(&["$.traits.plan"]).with_placeholders(words()).accepting(&["None".to_owned()]);
        assert_eq!(picked(&accepting, json!({"plan": "None"})), json!(["None"]));
    }

    #[test]
    fn the_first_present_alternative_is_used() {
        let name = source(&[
            "$.traits.name",
            "{$.traits.first} {$.traits.last}",
            "{$.traits.last}, {$.traits.initial}.",
            "$.traits.first",
        ]);
        let cases = [
            (json!({"name": " Jane ", "first": "X"}), json!(["Jane"])),
            (json!({"name": " ", "first": "Jane", "last": "Doe"}), json!(["Jane Doe"])),
            (json!({"name": null, "last": "Doe", "initial": "J"}), json!(["Doe, J."])),
            (json!({"first": "Jane"}), json!(["Jane"])),
            (json!({"last": "Doe"}), json!("nothing")),
            (json!({"name": 7.0}), json!([7.0])),
            (json!({"name": false}), json!([false])),
            (json!({"name": {"first": "Jane"}}), json!("an object")),
            (json!({"name": {"first": "Jane"}, "first": "Jane"}), json!(["Jane"])),
            (json!({"first": {"a": 1}}), json!("nothing")),
            (json!({"name": []}), json!("nothing")),
            (json!({"name": [null, "", {"a": 1}]}), json!([[{"a": 1}]])),
            (json!({"name": "J\u{0}a\u{1b}ne\u{202e}😀"}), json!(["Jane\u{202e}😀"])),
        ];
        for (traits, expected) in cases {
            assert_eq!(picked(&name, traits.clone()), expected, "{traits}");
        }
        assert_eq!(
            picked(&source(&["$.traits.tags[*]"]), json!({"tags": ["a", " ", "b"]})),
            json!(["a", "b"])
        );
    }

    #[test]
    fn values_are_normalized_and_replaced() {
        let constant = Source::new([Alternative::constant("Customer")]);
        assert_eq!(picked(&constant, json!({})), json!(["Customer"]));

        let with = |normalize: Normalize, value: Value| {
            picked(&source(&["$.traits.a"]).normalized(vec![normalize]), json!({"a": value}))
        };
        assert_eq!(with(Normalize::Lowercase, json!("ÉCLAIR")), json!(["éclair"]));
        assert_eq!(with(Normalize::Uppercase, json!(["a", 1])), json!([["A", 1]]));
        assert_eq!(with(Normalize::SingleSpaces, json!("a \n b")), json!(["a b"]));
        assert_eq!(with(Normalize::Domain, json!("Jane@Acme.TEST")), json!(["acme.test"]));
        assert_eq!(with(Normalize::Domain, json!("https://www.acme.test/a@b")), json!(["acme.test"]));
        assert_eq!(with(Normalize::Domain, json!("no domain")), json!(["no domain"]));
        assert_eq!(with(Normalize::Join, json!(["a", 1, true])), json!(["a, 1, true"]));

        let values = [("true".to_owned(), json!("Yes")), ("2".to_owned(), json!("Two"))].into();
        let translated = source(&["$.traits.a"]).translated(values);
        for (value, expected) in [
            (json!(true), json!(["Yes"])),
            (json!(2), json!(["Two"])),
            (json!(["2", 3]), json!([["Two", 3]])),
            (json!(false), json!([false])),
        ] {
            assert_eq!(picked(&translated, json!({"a": value})), expected);
        }
    }

    #[test]
    fn an_invalid_source_is_reported_with_a_remedy() {
        let error = |text: &str| Alternative::parse(text).unwrap_err();
        assert_eq!(error("$.traits["), "`$.traits[` is not a valid JSONPath (try `$.traits.title`)");
        assert_eq!(
            error("{traits.a}"),
            "`traits.a` is not a valid JSONPath (a path starts with `$`: `$.type == 'identify'`)"
        );
        assert_eq!(error("{$.a"), "`{$.a` has a `{` without its `}`");
        assert!(error("Customer").ends_with("a constant is written `{ value = \"Customer\" }`"));
    }
}
