//! The query trees of `POST /data/search/`: parses them and matches documents against them.
//!
//! Supports only what close-api.md §6 lists and refuses everything else, so that a client cannot depend on
//! behaviour that Close may not have.

use std::collections::HashSet;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::behaviour::ExactValue;
use crate::ids::parse_timestamp;
use crate::index::{Document, Index, normalized};
use crate::schema::{Kind, Schema};

/// A query tree.
#[derive(Debug)]
pub(crate) enum Query {
    All,
    And(Vec<Query>),
    Or(Vec<Query>),
    Not(Box<Query>),
    ObjectType(String),
    Id(String),
    AnyText(TextMatch),
    Field(Field, Condition),
    Related { this: String, related: String, query: Box<Query> },
}

/// A field of a document, or of a part of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Field {
    Regular { object: String, name: String },
    Custom(String),
}

/// A condition on the value of a field.
#[derive(Debug)]
pub(crate) enum Condition {
    Text(TextMatch),
    OneOf(Vec<Value>),
    Exists,
    Numbers(Vec<(Comparison, f64)>),
    Timestamps(Vec<(Comparison, Timestamp)>),
}

/// A text mode with the text to find.
#[derive(Debug)]
pub(crate) enum TextMatch {
    Exact(String),
    Folded(String),
    Words(Vec<String>),
    Phrase(Vec<String>),
    Prefixes(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Greater,
    AtLeast,
    Less,
    AtMost,
}

/// The parts of records that have their own object type: the record, the type, and the list that holds them.
const PARTS: [(&str, &str, &str); 4] = [
    ("contact", "contact_email", "emails"),
    ("contact", "contact_phone", "phones"),
    ("contact", "contact_url", "urls"),
    ("lead", "address", "addresses"),
];

/// The regular fields of each object type (close-api.md §6).
const REGULAR: [(&str, &[&str]); 6] = [
    (
        "lead",
        &[
            "name",
            "display_name",
            "description",
            "status_id",
            "url",
            "date_created",
            "date_updated",
            "created_by",
            "addresses_count",
            "all_urls_count",
        ],
    ),
    (
        "contact",
        &[
            "name",
            "title",
            "date_created",
            "date_updated",
            "created_by",
            "updated_by",
            "lead_id",
            "emails_count",
            "phones_count",
            "urls_count",
        ],
    ),
    ("contact_email", &["email", "type"]),
    ("contact_phone", &["phone", "type", "country"]),
    ("contact_url", &["url", "type"]),
    ("address", &["label", "address_1", "address_2", "city", "state", "zipcode", "country"]),
];

/// Parses a query tree. The error is the text of the 400.
pub(crate) fn parse(tree: &Value, schema: &Schema, exact: ExactValue) -> Result<Query, String> {
    let parser = Parser { schema, exact };
    parser.query(tree, 0)
}

/// Parses a field of a condition or of a sort order.
pub(crate) fn parse_field(field: &Value, schema: &Schema) -> Result<Field, String> {
    match text(field, "type")? {
        "regular_field" => {
            let (object, name) = (text(field, "object_type")?, text(field, "field_name")?);
            let known = REGULAR.iter().any(|(kind, names)| *kind == object && names.contains(&name));
            if !known {
                return Err(format!("Unknown field '{name}' of object type '{object}'."));
            }
            Ok(Field::Regular { object: object.into(), name: name.into() })
        }
        "custom_field" => {
            let id = text(field, "custom_field_id")?;
            if !schema.fields.iter().any(|field| field.id == id) {
                return Err(format!("Unknown custom field '{id}'."));
            }
            Ok(Field::Custom(format!("custom.{id}")))
        }
        other => Err(format!("Unknown field type '{other}'.")),
    }
}

/// Parses the old query language of `GET /lead/?query=` (close-api.md §4): `key:"value"` and words. All must match.
/// The error is the text of the 400.
pub(crate) fn legacy(text: &str, kind: Kind, schema: &Schema) -> Result<Query, String> {
    let of_contact =
        |query| Query::Related { this: "lead".into(), related: "contact".into(), query: Box::new(query) };
    let mut queries = Vec::new();
    for term in terms(text) {
        let Some((key, value)) = term.split_once(':') else {
            let any = || Query::AnyText(TextMatch::Words(words(&term)));
            queries.push(match kind {
                Kind::Contact => any(),
                Kind::Lead => Query::Or(vec![any(), of_contact(any())]),
            });
            continue;
        };
        let regular = |object: &str, name: &str| Field::Regular { object: object.into(), name: name.into() };
        let condition = Condition::Text(TextMatch::Phrase(words(value)));
        let query = match (key, kind) {
            ("sort", _) => continue,
            ("id", _) => Query::Id(value.into()),
            ("name" | "company", Kind::Lead) => Query::Field(regular("lead", "name"), condition),
            ("name", Kind::Contact) => Query::Field(regular("contact", "name"), condition),
            ("email" | "email_address", _) => {
                let with_email = Query::Related {
                    this: "contact".into(),
                    related: "contact_email".into(),
                    query: Box::new(Query::Field(regular("contact_email", "email"), condition)),
                };
                match kind {
                    Kind::Contact => with_email,
                    Kind::Lead => of_contact(with_email),
                }
            }
            (custom, _) => {
                let name =
                    custom.strip_prefix("custom.").ok_or_else(|| format!("Unknown field '{custom}'."))?;
                let field = schema.field(kind, name).ok_or_else(|| format!("Unknown field '{custom}'."))?;
                Query::Field(Field::Custom(format!("custom.{}", field.id)), condition)
            }
        };
        queries.push(query);
    }
    Ok(Query::And(queries))
}

/// The terms of a query in the old language, without their quotes.
fn terms(text: &str) -> Vec<String> {
    let (mut terms, mut term, mut quoted) = (Vec::new(), String::new(), false);
    for letter in text.chars().chain([' ']) {
        match letter {
            '"' => quoted = !quoted,
            letter if letter.is_whitespace() && !quoted => {
                terms.extend(Some(std::mem::take(&mut term)).filter(|term| !term.is_empty()));
            }
            letter => term.push(letter),
        }
    }
    terms
}

struct Parser<'a> {
    schema: &'a Schema,
    exact: ExactValue,
}

impl Parser<'_> {
    fn query(&self, tree: &Value, depth: usize) -> Result<Query, String> {
        const MAX_DEPTH: usize = 20;
        if depth > MAX_DEPTH {
            return Err("The query is nested too deeply.".into());
        }
        let child = |key: &str| self.query(&tree[key], depth + 1);
        let query = match text(tree, "type")? {
            "match_all" => Query::All,
            "and" => Query::And(self.queries(tree, depth)?),
            "or" => Query::Or(self.queries(tree, depth)?),
            "object_type" => Query::ObjectType(text(tree, "object_type")?.into()),
            "id" => Query::Id(text(tree, "value")?.into()),
            "text" => Query::AnyText(self.text_match(tree)?),
            "field_condition" => {
                Query::Field(parse_field(&tree["field"], self.schema)?, self.condition(&tree["condition"])?)
            }
            "has_related" => {
                let (this, related) = (text(tree, "this_object_type")?, text(tree, "related_object_type")?);
                let known = (this, related) == ("lead", "contact")
                    || PARTS.iter().any(|(owner, part, _)| (this, related) == (*owner, *part));
                if !known {
                    return Err(format!("Object type '{this}' has no related '{related}'."));
                }
                Query::Related {
                    this: this.into(),
                    related: related.into(),
                    query: Box::new(child("related_query")?),
                }
            }
            other => return Err(format!("Unknown query type '{other}'.")),
        };
        let negate = &tree["negate"];
        match negate.as_bool() {
            Some(true) => Ok(Query::Not(Box::new(query))),
            Some(false) => Ok(query),
            None if negate.is_null() => Ok(query),
            None => Err("'negate' must be true or false.".into()),
        }
    }

    fn queries(&self, tree: &Value, depth: usize) -> Result<Vec<Query>, String> {
        let queries = tree["queries"].as_array().ok_or("'queries' must be a list.")?;
        queries.iter().map(|query| self.query(query, depth + 1)).collect()
    }

    fn condition(&self, condition: &Value) -> Result<Condition, String> {
        let list =
            |key: &str| condition[key].as_array().cloned().ok_or_else(|| format!("'{key}' must be a list."));
        match text(condition, "type")? {
            "text" => Ok(Condition::Text(self.text_match(condition)?)),
            "term" => Ok(Condition::OneOf(list("values")?)),
            "reference" => Ok(Condition::OneOf(list("object_ids")?)),
            "boolean" => Ok(Condition::OneOf(vec![condition["value"].clone()])),
            "current_user" => Ok(Condition::OneOf(vec![json!(self.schema.user.id)])),
            "exists" => Ok(Condition::Exists),
            "number_range" => {
                let names = [
                    ("gt", Comparison::Greater),
                    ("gte", Comparison::AtLeast),
                    ("lt", Comparison::Less),
                    ("lte", Comparison::AtMost),
                ];
                let bounds = names.iter().filter(|(name, _)| !condition[*name].is_null());
                let bound = |(name, comparison): &(&str, Comparison)| {
                    let number =
                        condition[*name].as_f64().ok_or_else(|| format!("'{name}' must be a number."))?;
                    Ok::<_, String>((*comparison, number))
                };
                Ok(Condition::Numbers(bounds.map(bound).collect::<Result<_, _>>()?))
            }
            "moment_range" => {
                let names = [
                    ("after", Comparison::Greater),
                    ("on_or_after", Comparison::AtLeast),
                    ("before", Comparison::Less),
                    ("on_or_before", Comparison::AtMost),
                ];
                let bounds = names.iter().filter(|(name, _)| !condition[*name].is_null());
                let bound = |(name, comparison): &(&str, Comparison)| {
                    let value = &condition[*name];
                    let fixed = text(value, "type")? == "fixed_utc";
                    let timestamp = parse_timestamp(text(value, "value")?).filter(|_| fixed);
                    Ok::<_, String>((
                        *comparison,
                        timestamp.ok_or_else(|| format!("'{name}' is not a moment in UTC."))?,
                    ))
                };
                Ok(Condition::Timestamps(bounds.map(bound).collect::<Result<_, _>>()?))
            }
            other => Err(format!("Unknown condition type '{other}'.")),
        }
    }

    fn text_match(&self, node: &Value) -> Result<TextMatch, String> {
        let value = text(node, "value")?;
        match (text(node, "mode")?, self.exact) {
            ("exact_value", ExactValue::Exact) => Ok(TextMatch::Exact(value.to_owned())),
            ("exact_value", ExactValue::FoldsCase) => Ok(TextMatch::Folded(normalized(value))),
            ("full_words", _) => Ok(TextMatch::Words(words(value))),
            ("phrase", _) => Ok(TextMatch::Phrase(words(value))),
            ("beginning_of_words", _) => Ok(TextMatch::Prefixes(words(value))),
            (mode, _) => Err(format!("Unknown text mode '{mode}'.")),
        }
    }
}

fn text<'a>(node: &'a Value, key: &str) -> Result<&'a str, String> {
    node[key].as_str().ok_or_else(|| format!("'{key}' is required and must be a string."))
}

/// Splits a text into lower-cased words of letters and digits, as the index does.
fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect()
}

impl Query {
    /// The ids of all documents that can match, if the index can narrow them down. `matches` decides.
    pub(crate) fn candidates<'a>(&'a self, index: &'a Index) -> Option<HashSet<&'a str>> {
        match self {
            Self::Id(id) => Some(HashSet::from([id.as_str()])),
            Self::And(queries) => {
                queries.iter().filter_map(|query| query.candidates(index)).min_by_key(HashSet::len)
            }
            Self::Or(queries) => {
                let all: Option<Vec<_>> = queries.iter().map(|query| query.candidates(index)).collect();
                all.map(|all| all.into_iter().flatten().collect())
            }
            Self::Field(Field::Custom(key), Condition::Text(test)) => {
                test.exact().map(|needle| index.ids_with(key, needle).collect())
            }
            Self::Related { related, query, .. } => match (related.as_str(), query.as_ref()) {
                ("contact", query) => {
                    let contacts = query.candidates(index)?;
                    let contacts = contacts.into_iter().filter_map(|id| index.get(id));
                    Some(contacts.filter_map(|contact| contact.value["lead_id"].as_str()).collect())
                }
                ("contact_email", Self::Field(Field::Regular { name, .. }, Condition::Text(test)))
                    if name == "email" =>
                {
                    test.exact().map(|needle| index.ids_with("email", needle).collect())
                }
                _ => None,
            },
            Self::All | Self::Not(_) | Self::ObjectType(_) | Self::AnyText(_) | Self::Field(..) => None,
        }
    }

    /// Whether a document matches.
    pub(crate) fn matches(&self, document: &Document, index: &Index) -> bool {
        self.matches_object(document.kind.word(), &document.id, &document.value, index)
    }

    fn matches_object(&self, kind: &str, id: &str, value: &Value, index: &Index) -> bool {
        let matches = |query: &Self| query.matches_object(kind, id, value, index);
        match self {
            Self::All => true,
            Self::And(queries) => queries.iter().all(matches),
            Self::Or(queries) => queries.iter().any(matches),
            Self::Not(query) => !matches(query),
            Self::ObjectType(wanted) => wanted == kind,
            Self::Id(wanted) => wanted == id,
            Self::AnyText(test) => any_text(value, test),
            Self::Field(field, test) => field.value(kind, value).is_some_and(|value| test.matches(&value)),
            Self::Related { this, related, query } if this == kind => {
                if related == Kind::Contact.word() {
                    return index.contacts_of(id).any(|contact| query.matches(contact, index));
                }
                let list = PARTS.iter().find(|(_, part, _)| part == related).map(|(.., list)| *list);
                let parts = list.and_then(|list| value[list].as_array()).into_iter().flatten();
                parts.into_iter().any(|part| query.matches_object(related, "", part, index))
            }
            Self::Related { .. } => false,
        }
    }
}

impl Field {
    /// The value of the field in an object of this kind, unless it is empty.
    pub(crate) fn value(&self, kind: &str, object: &Value) -> Option<Value> {
        let value = match self {
            Self::Custom(key) => object.get(key)?.clone(),
            Self::Regular { object: of, .. } if of != kind => return None,
            Self::Regular { name, .. } => match name.strip_suffix("_count") {
                Some("all_urls") => json!(usize::from(!object["url"].is_null())),
                Some(list) => json!(object[list].as_array().map_or(0, Vec::len)),
                None => object.get(name)?.clone(),
            },
        };
        let empty = value.is_null() || value == "";
        (!empty).then_some(value)
    }
}

impl Condition {
    fn matches(&self, value: &Value) -> bool {
        if let Value::Array(values) = value {
            return values.iter().any(|value| self.matches(value));
        }
        match self {
            Self::Exists => true,
            Self::OneOf(values) => values.contains(value),
            Self::Text(test) => value.as_str().is_some_and(|text| test.matches(text)),
            Self::Numbers(bounds) => value.as_f64().is_some_and(|number| {
                bounds.iter().all(|(comparison, bound)| comparison.holds(&number, bound))
            }),
            Self::Timestamps(bounds) => value.as_str().and_then(parse_timestamp).is_some_and(|timestamp| {
                bounds.iter().all(|(comparison, bound)| comparison.holds(&timestamp, bound))
            }),
        }
    }
}

impl Comparison {
    fn holds<T: PartialOrd>(self, value: &T, bound: &T) -> bool {
        match self {
            Self::Greater => value > bound,
            Self::AtLeast => value >= bound,
            Self::Less => value < bound,
            Self::AtMost => value <= bound,
        }
    }
}

impl TextMatch {
    /// The text to find, if the mode compares whole values.
    fn exact(&self) -> Option<&str> {
        match self {
            Self::Exact(needle) | Self::Folded(needle) => Some(needle),
            Self::Words(_) | Self::Phrase(_) | Self::Prefixes(_) => None,
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(needle) => text == needle,
            // Almost all values are ASCII, and comparing those needs no copy.
            Self::Folded(needle) if text.is_ascii() => text.trim().eq_ignore_ascii_case(needle),
            Self::Folded(needle) => normalized(text) == *needle,
            Self::Words(needles) => {
                let words = words(text);
                !needles.is_empty() && needles.iter().all(|needle| words.contains(needle))
            }
            Self::Phrase(needles) => {
                !needles.is_empty() && words(text).windows(needles.len()).any(|window| window == needles)
            }
            Self::Prefixes(needles) => {
                let words = words(text);
                let begins = |needle: &String| words.iter().any(|word| word.starts_with(needle));
                !needles.is_empty() && needles.iter().all(begins)
            }
        }
    }
}

fn any_text(value: &Value, test: &TextMatch) -> bool {
    match value {
        Value::String(string) => test.matches(string),
        Value::Array(values) => values.iter().any(|value| any_text(value, test)),
        Value::Object(fields) => fields.values().any(|value| any_text(value, test)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
