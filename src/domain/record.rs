//! The records that close-sync writes, Leads and Contacts, with their ids and fields.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use serde_json::{Number, Value};
use strum::VariantArray;

use crate::domain::phone::{self, Country};
use crate::domain::time;
use crate::domain::value::{self, trim};
use crate::domain::web_address;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// An id as Close writes it. Ids are opaque and case-sensitive (close-api.md §1). `None` if the text is not
            /// an id: it could lead a call to another path.
            pub fn parse(text: &str) -> Option<Self> {
                is_id($prefix, text).then(|| Self(text.to_owned()))
            }

            /// Stands for a record or a field that Close does not have. It is never sent.
            pub(crate) fn placeholder(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// Short ids for tests.
            #[cfg(test)]
            pub(crate) fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// The id of a Lead, `lead_…`.
    LeadId,
    Some("lead")
);
id!(
    /// The id of a Contact, `cont_…`.
    ContactId,
    Some("cont")
);
id!(
    /// The id of a custom field, `cf_…`. Older fields have other prefixes, such as `lcf_` (close-api.md §1).
    FieldId,
    None
);

/// The longest id that is accepted, without prefix. Those of Close have 22 or 43 characters.
const MAX_ID: usize = 64;

/// Whether a text is an id of Close: a prefix in lower case, this one if it is given, an underscore and base62. Also
/// accepts `_` and `-`, which are as harmless in paths, logs and terminals.
pub fn is_id(prefix: Option<&str>, text: &str) -> bool {
    text.split_once('_').is_some_and(|(kind, rest)| {
        let is_kind =
            !kind.is_empty() && kind.len() <= MAX_ID && kind.bytes().all(|byte| byte.is_ascii_lowercase());
        is_kind
            && prefix.is_none_or(|prefix| prefix == kind)
            && (1..=MAX_ID).contains(&rest.len())
            && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
    })
}

/// A field that holds one value, on a Lead or on a Contact.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Field {
    /// The name of the Lead (a company) or of the Contact (a person).
    Name,
    /// The description of a Lead.
    Description,
    /// The status of a Lead by id. Labels can be changed, ids cannot (close-api.md §8).
    Status,
    /// The job title of a Contact.
    Title,
    Custom(FieldId),
    /// Only in changes: adds values to a custom field with several values, and keeps those that a person adds at the same
    /// time (close-api.md §5).
    Add(FieldId),
}

impl Field {
    /// The key of the field in a record.
    pub fn key(&self) -> String {
        match self {
            Self::Add(id) | Self::Custom(id) => format!("custom.{id}"),
            Self::Name | Self::Description | Self::Status | Self::Title => self.to_string(),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("name"),
            Self::Description => f.write_str("description"),
            Self::Status => f.write_str("status_id"),
            Self::Title => f.write_str("title"),
            Self::Custom(id) => write!(f, "custom.{id}"),
            Self::Add(id) => write!(f, "custom.{id}.add"),
        }
    }
}

/// Values by field. A field that is absent has no value, or is not changed.
pub type Fields = BTreeMap<Field, Value>;

/// Applies changes to the values of a record, as Close does.
pub fn apply_changes(fields: &mut Fields, changes: &Fields) {
    for (field, value) in changes {
        match field {
            Field::Add(id) => {
                let values =
                    fields.entry(Field::Custom(id.clone())).or_insert_with(|| Value::Array(Vec::new()));
                *values = with_added(values, value);
            }
            Field::Name | Field::Description | Field::Status | Field::Title | Field::Custom(_) => {
                fields.insert(field.clone(), value.clone());
            }
        }
    }
}

/// Merges later changes of a record into earlier ones. Later values win.
pub fn merge_changes(earlier: &mut Fields, later: &Fields) {
    for (field, value) in later {
        match field {
            Field::Add(id) => {
                let whole = Field::Custom(id.clone());
                let target = if earlier.contains_key(&whole) { whole } else { field.clone() };
                let values = earlier.entry(target).or_insert_with(|| Value::Array(Vec::new()));
                *values = with_added(values, value);
            }
            Field::Name | Field::Description | Field::Status | Field::Title | Field::Custom(_) => {
                if let Field::Custom(id) = field {
                    earlier.remove(&Field::Add(id.clone()));
                }
                earlier.insert(field.clone(), value.clone());
            }
        }
    }
}

/// The items of a list that another list, or a single value, does not have.
pub fn missing_items(stored: Option<&Value>, wanted: &Value) -> Vec<Value> {
    let stored = stored.map_or(&[][..], items);
    let is_missing = |item: &&Value| !stored.iter().any(|other| same(other, item));
    items(wanted).iter().filter(is_missing).cloned().collect()
}

fn with_added(stored: &Value, added: &Value) -> Value {
    let missing = missing_items(Some(stored), added);
    items(stored).iter().cloned().chain(missing).collect()
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice)
}

/// Whether Close returns a wanted value as another: the same value in another notation (close-api.md §15).
///
/// Close returns times with any offset, a user as an object, one value as a list or a list of one as a value, and numbers
/// as text. The order of a list does not matter, because Close does not document that it keeps it.
pub fn same(stored: &Value, wanted: &Value) -> bool {
    match (stored, wanted) {
        (Value::Array(stored), Value::Array(wanted)) => {
            stored.len() == wanted.len()
                && wanted.iter().all(|item| stored.iter().any(|other| same(other, item)))
        }
        (Value::Array(items), one) => items.len() == 1 && items.iter().all(|item| same(item, one)),
        (one, Value::Array(items)) => items.len() == 1 && items.iter().all(|item| same(one, item)),
        (Value::Object(reference), Value::String(id)) => {
            reference.get("id").and_then(Value::as_str) == Some(id.as_str())
        }
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::String(text), Value::Number(number)) => is_number(text, number),
        (Value::Number(_) | Value::Bool(_), Value::String(text)) => {
            value::text(stored).as_ref() == Some(text)
                || stored.as_number().is_some_and(|number| is_number(text, number))
        }
        (Value::String(stored), Value::String(wanted)) => stored == wanted || same_time(stored, wanted),
        (stored, wanted) => stored == wanted,
    }
}

fn is_number(text: &str, number: &Number) -> bool {
    let read = serde_json::from_str::<Number>(text.trim()).ok();
    read.is_some_and(|read| read == *number || read.as_f64() == number.as_f64())
}

/// Whether a text is a wanted time or day in another notation. Wanted times and days have the notation of
/// [`time::format_timestamp`] and `2026-01-31`; any other text is compared as text.
fn same_time(stored: &str, wanted: &str) -> bool {
    let Some(instant) = time::read_back(stored) else { return false };
    time::format_timestamp(instant) == wanted
        || wanted.parse::<Date>().is_ok_and(|date| {
            date.to_string() == wanted
                && time::format_timestamp(instant) == format!("{wanted}T00:00:00.000000+00:00")
        })
}

/// A list of a Contact. close-sync appends to it and never removes entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, VariantArray)]
pub enum Channel {
    /// `emails`.
    Email,
    /// `phones`.
    Phone,
    /// `urls`.
    Url,
}

impl Channel {
    /// The key of the list in a Contact, `emails`.
    pub fn list(self) -> &'static str {
        match self {
            Self::Email => "emails",
            Self::Phone => "phones",
            Self::Url => "urls",
        }
    }

    /// The key of the value inside an entry of the list, `email`.
    pub fn item(self) -> &'static str {
        match self {
            Self::Email => "email",
            Self::Phone => "phone",
            Self::Url => "url",
        }
    }

    /// The type of an entry that close-sync adds. Close accepts any word; these are common (close-api.md §5).
    pub fn default_kind(self) -> &'static str {
        match self {
            Self::Email | Self::Phone => "office",
            Self::Url => "url",
        }
    }

    /// Whether Close stores one value as the other: the same email address, phone number or URL.
    ///
    /// Close rewrites phone numbers by the country of the organization (`8004445555` becomes `+18004445555`) and completes
    /// URLs, so a value that is read back differs from what was sent (close-api.md §5). Comparing the text would append the
    /// same number with every event.
    pub fn same(self, sent: &str, stored: &str, country: Option<Country>) -> bool {
        match self {
            Self::Email => fold_email(sent) == fold_email(stored),
            Self::Phone => phone::same(sent, stored, country),
            Self::Url => fold_url(sent) == fold_url(stored),
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.list())
    }
}

/// An email address in the form in which addresses are compared: trimmed and case-folded.
pub fn fold_email(email: &str) -> String {
    trim(email).to_lowercase()
}

fn fold_url(text: &str) -> String {
    match web_address::parse(text) {
        Some(url) => format!(
            "{}{}{}{}",
            url.host_str().unwrap_or_default(),
            url.port().map(|port| format!(":{port}")).unwrap_or_default(),
            url.path().trim_end_matches('/'),
            url.query().map(|query| format!("?{query}")).unwrap_or_default(),
        ),
        None => text.trim().to_owned(),
    }
}

/// One entry of a Contact's list: an email, a phone or a URL with its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub value: String,
    /// The `type` in Close: `office`, `mobile`, `url` and so on.
    pub kind: String,
}

/// The lists of a Contact. A channel that is absent is empty, or is not changed.
pub type Lists = BTreeMap<Channel, Vec<Entry>>;

/// A Lead in Close.
#[derive(Clone, Debug, PartialEq)]
pub struct Lead {
    pub id: LeadId,
    /// ISO 8601 in UTC with a fixed number of digits, so it can be sorted as text (close-api.md §1).
    pub date_created: String,
    /// When anybody last changed the Lead, if Close said so.
    pub date_updated: Option<Timestamp>,
    /// Without empty values.
    pub fields: Fields,
}

/// A Contact in Close.
#[derive(Clone, Debug, PartialEq)]
pub struct Contact {
    pub id: ContactId,
    /// The schema of Close allows a Contact without a Lead (close-api.md §5).
    pub lead_id: Option<LeadId>,
    /// See [`Lead::date_created`].
    pub date_created: String,
    /// See [`Lead::date_updated`].
    pub date_updated: Option<Timestamp>,
    /// Without empty values.
    pub fields: Fields,
    /// A list that the answer lacks is absent.
    pub lists: Lists,
    /// Lists that the answer lacks, or that have an entry which cannot be read. They may have other entries and are not
    /// written.
    pub unknown_lists: BTreeSet<Channel>,
}

/// A person may have pasted an id into Close together with invisible characters. It is the same id.
fn custom<'a>(fields: &'a Fields, field: &FieldId) -> Option<&'a str> {
    let value = fields.get(&Field::Custom(field.clone()))?;
    // One value can come back as a list.
    let value = value
        .as_array()
        .map_or(Some(value), |items| if let [one] = &items[..] { Some(one) } else { None })?;
    value.as_str().map(trim).filter(|text| !text.is_empty())
}

impl Lead {
    /// The text in a custom field, as ids are compared.
    pub fn custom(&self, field: &FieldId) -> Option<&str> {
        custom(&self.fields, field)
    }
}

impl Contact {
    /// The text in a custom field, as ids are compared.
    pub fn custom(&self, field: &FieldId) -> Option<&str> {
        custom(&self.fields, field)
    }

    pub fn list(&self, channel: Channel) -> &[Entry] {
        self.lists.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// Whether the list has this value according to [`Channel::same`].
    pub fn has(&self, channel: Channel, value: &str, country: Option<Country>) -> bool {
        self.list(channel).iter().any(|entry| channel.same(value, &entry.value, country))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_ids_of_close_are_ids() {
        let long = format!("lead_{}", "a".repeat(MAX_ID + 1));
        for text in [
            "",
            "lead",
            "lead_",
            "_a",
            "../me",
            "lead_../../me",
            "lead_a/b",
            "lead_a?x=1",
            "lead_a#",
            "lead_%2e%2e",
            "lead_a b",
            "lead_a\n",
            "lead_\u{1b}[2J",
            "lead_é",
            "Lead_a",
            " lead_a",
            "lead_.",
            &long,
        ] {
            assert_eq!(LeadId::parse(text), None, "{text}");
            assert_eq!(FieldId::parse(text), None, "{text}");
        }
        assert!(LeadId::parse("cont_a").is_none() && ContactId::parse("lead_a").is_none());
        for text in ["lead_IIDHIStmFcFQZZP0BRe99V1MCoXWz2PGCm6EDmR9v2O", "lead_7oqs6AVtMRNFAZwvsAbtKM"] {
            assert_eq!(LeadId::parse(text).unwrap().as_str(), text);
        }
        assert!(FieldId::parse("lcf_v6S011I6MqcbVvB2FA5Nk8dr5MkL8sWuCiG8cUleO9c").is_some());
    }

    #[test]
    fn values_in_another_notation_are_the_same() {
        let at = json!("2026-01-31T09:00:00.000000+00:00");
        let user = json!({"id": "user_ada", "name": "Ada"});
        for (stored, wanted, expected) in [
            (json!("2026-01-31T09:00:00Z"), at.clone(), true),
            (json!("2026-01-31T09:00:00+00:00"), at.clone(), true),
            (json!("2026-01-31T10:00:00.000+01:00"), at.clone(), true),
            (json!("2026-01-31T09:00:00"), at.clone(), true),
            (json!("2026-01-31 09:00:00"), at.clone(), true),
            (json!("2026-01-31T09:00:01Z"), at.clone(), false),
            (json!("2026-01-31T10:00:00"), at.clone(), false),
            (json!("soon"), at.clone(), false),
            // Text that happens to be a time is compared as text.
            (json!("2026-01-31T09:00:00Z"), json!("2026-01-31T10:00:00+01:00"), false),
            (json!("2026-01-31T00:00:00Z"), json!("2026-01-31"), true),
            (json!("2026-01-31T00:00:01Z"), json!("2026-01-31"), false),
            (json!("5"), json!(5), true),
            (json!("5.0"), json!(5), true),
            (json!(5), json!("5"), true),
            (json!(5.5), json!("5.5"), true),
            (json!("6"), json!(5), false),
            (json!("five"), json!(5), false),
            (json!(true), json!("true"), true),
            (json!(["a"]), json!("a"), true),
            (json!("a"), json!(["a"]), true),
            (json!(["a", "b"]), json!("a"), false),
            (json!([]), json!("a"), false),
            (json!(["b", "a"]), json!(["a", "b"]), true),
            (json!(["5", user]), json!([5, "user_ada"]), true),
            (user.clone(), json!("user_ada"), true),
            (user.clone(), json!("user_bob"), false),
            (json!({"name": "Ada"}), json!("user_ada"), false),
            (json!("pro"), json!("Pro"), false),
        ] {
            assert_eq!(same(&stored, &wanted), expected, "{stored} ~ {wanted}");
        }
    }

    #[test]
    fn added_values_are_merged_with_what_was_set_or_added() {
        let (whole, add) = (Field::Custom(FieldId::new("cf_1")), Field::Add(FieldId::new("cf_1")));
        let fields = |field: &Field, value: Value| Fields::from([(field.clone(), value)]);
        for (earlier, later, merged) in [
            (fields(&add, json!(["a"])), fields(&add, json!(["b", "a"])), fields(&add, json!(["a", "b"]))),
            (fields(&whole, json!(["a"])), fields(&add, json!(["b"])), fields(&whole, json!(["a", "b"]))),
            (fields(&add, json!(["a"])), fields(&whole, json!(["b"])), fields(&whole, json!(["b"]))),
            (Fields::new(), fields(&add, json!(["b"])), fields(&add, json!(["b"]))),
        ] {
            let mut found = earlier.clone();
            merge_changes(&mut found, &later);
            assert_eq!(found, merged, "{earlier:?} {later:?}");
        }
        assert_eq!((add.key(), add.to_string()), ("custom.cf_1".into(), "custom.cf_1.add".into()));
    }

    #[test]
    fn values_that_close_rewrote_are_the_same() {
        let cases = [
            (Channel::Email, " Jane@Example.TEST", "jane@example.test", true),
            (Channel::Email, "jane+crm@example.test", "jane@example.test", false),
            // The country is unknown.
            (Channel::Phone, "800 444-5555", "+18004445555", false),
            (Channel::Phone, "0301234567", "+49301234567", false),
            (Channel::Phone, "+49 30 1234567", "+49301234567", true),
            (Channel::Phone, "+49301234567", "+19301234567", false),
            (Channel::Phone, "1234", "+441234", false),
            (Channel::Phone, "0049301234567", "+49301234567", false),
            // Their ends agree.
            (Channel::Phone, "030 901820", "+43130901820", false),
            (Channel::Phone, "+1 800 444 5555 ext. 12", "+18004445555x12", true),
            (Channel::Phone, "+1 800 444 5555 ext. 12", "+18004445555", false),
            (Channel::Phone, "4567", "+49301234567", false),
            (Channel::Phone, "8004445555", "8004445556", false),
            (Channel::Phone, "ask reception", "ask reception", true),
            (Channel::Url, "acme.test", "http://acme.test/", true),
            (Channel::Url, "https://ACME.test", "http://acme.test", true),
            (Channel::Url, "acme.test/a", "acme.test/b", false),
            (Channel::Url, "//acme.test/a", "http://acme.test/a", true),
            (Channel::Url, "acme.test/?to=https://x.test", "http://acme.test/?to=https://x.test", true),
            (Channel::Url, "acme.test:8080", "acme.test", false),
        ];
        for (channel, one, other, same) in cases {
            assert_eq!(channel.same(one, other, None), same, "{channel}: {one} ~ {other}");
            assert_eq!(channel.same(other, one, None), same, "{channel}: {other} ~ {one}");
        }
    }
}
