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
//! Found text is trimmed, and control characters except line breaks and tabs are removed. Everything else stays as it was
//! sent, including emoji and right-to-left text.

use std::collections::BTreeMap;

use jsonpath_rust::parser::model::JpQuery;
use jsonpath_rust::parser::parse_json_path;
use jsonpath_rust::query::{QueryRef, js_path_process};
use serde_json::Value;
use strum::{EnumString, IntoStaticStr, VariantArray};

use crate::domain::dropped::excerpt;
use crate::domain::event::Event;
use crate::domain::mapping::coerce::MAX_ITEMS;
use crate::domain::value::{clean, domain, flatten, single_spaces, text};

/// Where a value comes from and how it is normalized.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Source {
    alternatives: Vec<Alternative>,
    normalize: Vec<Normalize>,
    values: BTreeMap<String, Value>,
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
    /// At least one value. None of them is null, blank or an object.
    Values(Vec<Value>),
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

    fn pick(&self, event: &Event) -> Picked {
        match &self.0 {
            Form::Path(path) => pick(path, event),
            Form::Constant(value) => Picked::Values(vec![value.clone()]),
            Form::Template(pieces) => {
                let piece = |piece: &Piece| match piece {
                    Piece::Literal(text) => Some(text.clone()),
                    Piece::Path(path) => match pick(path, event) {
                        Picked::Values(values) => text(values.first()?),
                        Picked::Nothing | Picked::Object => None,
                    },
                };
                let whole: Option<String> = pieces.iter().map(piece).collect();
                whole.map_or(Picked::Nothing, |whole| Picked::Values(vec![whole.into()]))
            }
        }
    }
}

pub(crate) fn path(text: &str) -> Result<JpQuery, String> {
    parse_json_path(text).map_err(|_| format!("`{text}` is not a valid JSONPath (try `$.traits.title`)"))
}

/// The nodes a path selects.
pub(crate) fn nodes<'a>(path: &JpQuery, body: &'a Value) -> Vec<&'a Value> {
    js_path_process(path, body)
        .map(|found| found.into_iter().map(QueryRef::val).collect())
        .unwrap_or_default()
}

/// The most values that a path finds, and the most items of a list: one more than a field can hold, to report that there
/// are more.
const MAX_FOUND: usize = MAX_ITEMS + 1;

fn pick(path: &JpQuery, event: &Event) -> Picked {
    let found = nodes(path, &event.body);
    let values: Vec<Value> = found.iter().filter_map(|value| present(value)).take(MAX_FOUND).collect();
    if !values.is_empty() {
        Picked::Values(values)
    } else if found.iter().any(|value| value.is_object()) {
        Picked::Object
    } else {
        Picked::Nothing
    }
}

/// The cleaned value, if it is not absent.
fn present(value: &Value) -> Option<Value> {
    match value {
        Value::Null | Value::Object(_) => None,
        Value::Bool(_) | Value::Number(_) => Some(value.clone()),
        Value::String(text) => Some(clean(text)).filter(|text| !text.is_empty()).map(Value::String),
        Value::Array(items) => {
            let items: Vec<Value> =
                items.iter().filter(|item| !absent(item)).take(MAX_FOUND).map(cleaned).collect();
            (!items.is_empty()).then_some(Value::Array(items))
        }
    }
}

fn absent(item: &Value) -> bool {
    item.is_null() || item.as_str().is_some_and(|text| clean(text).is_empty())
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
        let mut unusable = false;
        for (n, alternative) in self.alternatives.iter().enumerate() {
            match alternative.pick(event) {
                Picked::Values(values) => return Picked::Values(self.change(values)),
                Picked::Object => unusable |= n == 0,
                Picked::Nothing => {}
            }
        }
        if unusable { Picked::Object } else { Picked::Nothing }
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
            Picked::Values(values) => values.into(),
        }
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
        assert_eq!(error("{traits.a}"), "`traits.a` is not a valid JSONPath (try `$.traits.title`)");
        assert_eq!(error("{$.a"), "`{$.a` has a `{` without its `}`");
        assert!(error("Customer").ends_with("a constant is written `{ value = \"Customer\" }`"));
    }
}
