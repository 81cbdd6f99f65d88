//! Validates request bodies and turns them into patches, which the records apply without further checks.
//!
//! One pass over the body collects all errors. Any error refuses the whole body (close-api.md §5): one invalid
//! email address of one nested contact prevents the lead. The error texts come from close-api.md §3.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::custom::{self, CustomPatch};
use crate::refusal::{
    FieldErrors, NO_SUCH_OBJECT, NOT_A_CHOICE, NOT_A_DATETIME, NOT_A_PHONE, NOT_TEXT, Object, REQUIRED,
};
use crate::schema::{Kind, Schema};
use crate::{formats, ids};

/// The changes that a valid body asks for.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Patch {
    /// Regular fields, in the form that responses have.
    pub(crate) plain: Object,
    pub(crate) custom: CustomPatch,
    /// The lead of a contact, if the body sets it.
    pub(crate) lead_id: Option<String>,
    /// Contacts to add to a lead.
    pub(crate) contacts: Vec<Patch>,
    /// The date of creation, which importers may set (close-api.md §4).
    pub(crate) date_created: Option<Timestamp>,
}

/// Validates the body of a lead. `contacts` in a PUT adds contacts; it cannot update them. An old script of
/// Close made that mistake (close-api.md §4).
pub(crate) fn lead(body: &Object, schema: &Schema) -> Result<Patch, FieldErrors> {
    let mut validator = Validator::new(body);
    validator.text("name", Some(1000), BlankPolicy::Null);
    validator.text("description", None, BlankPolicy::Keep);
    validator.url();
    validator.status(schema);
    validator.list("addresses", usize::MAX, address);
    validator.date_created();
    validator.custom(Kind::Lead, schema);
    let mut contacts = Vec::new();
    for (index, item) in validator.array("contacts", usize::MAX).unwrap_or_default().iter().enumerate() {
        match object(item).and_then(|nested| contact_fields(nested, schema)) {
            Ok(patch) => contacts.push(Patch { lead_id: None, ..patch }),
            Err(errors) => validator.errors.add_nested("contacts", index, &errors),
        }
    }
    validator.patch.contacts = contacts;
    validator.finish()
}

/// Validates the body of a contact. `exists` returns whether a lead exists.
pub(crate) fn contact(
    body: &Object,
    schema: &Schema,
    exists: impl Fn(&str) -> bool,
) -> Result<Patch, FieldErrors> {
    let mut errors = FieldErrors::default();
    match body.get("lead_id") {
        Some(Value::String(id)) if !exists(id) => errors.add("lead", NO_SUCH_OBJECT),
        Some(Value::String(_) | Value::Null) | None => {}
        Some(_) => errors.add("lead", NOT_TEXT),
    }
    match contact_fields(body, schema) {
        Ok(patch) => errors.into_result(patch),
        Err(found) => {
            errors.fields.extend(found.fields);
            Err(errors)
        }
    }
}

fn contact_fields(body: &Object, schema: &Schema) -> Result<Patch, FieldErrors> {
    const KNOWN: [&str; 7] = ["name", "title", "emails", "phones", "urls", "lead_id", "timezone"];
    let mut validator = Validator::new(body);
    validator.text("name", Some(1000), BlankPolicy::Null);
    validator.text("title", Some(1000), BlankPolicy::Empty);
    validator.text("timezone", None, BlankPolicy::Null);
    validator.list("emails", 100, email_item);
    validator.list("phones", 100, |item| phone_item(item, schema));
    validator.list("urls", 100, url_item);
    validator.date_created();
    validator.custom(Kind::Contact, schema);
    validator.patch.lead_id = body.get("lead_id").and_then(Value::as_str).map(str::to_owned);
    if schema.behaviour.strict_contact_keys {
        let unknown = |key: &&String| !KNOWN.contains(&key.as_str()) && !key.starts_with("custom.");
        for key in body.keys().filter(unknown) {
            validator.errors.add(key, "Extra fields not permitted.");
        }
    }
    validator.finish()
}

/// How to store null and the empty string.
#[derive(Clone, Copy)]
enum BlankPolicy {
    /// Both become null.
    Null,
    /// Both become the empty string.
    Empty,
    /// Each is stored as it is.
    Keep,
}

/// A body under validation: the patch and the errors so far.
struct Validator<'a> {
    body: &'a Object,
    patch: Patch,
    errors: FieldErrors,
}

impl<'a> Validator<'a> {
    fn new(body: &'a Object) -> Self {
        Self { body, patch: Patch::default(), errors: FieldErrors::default() }
    }

    fn finish(self) -> Result<Patch, FieldErrors> {
        self.errors.into_result(self.patch)
    }

    fn text(&mut self, field: &str, max_length: Option<usize>, blank: BlankPolicy) {
        let value = match (self.body.get(field), blank) {
            (None, _) => return,
            (Some(Value::Null), BlankPolicy::Null | BlankPolicy::Keep) => Value::Null,
            (Some(Value::Null), BlankPolicy::Empty) => json!(""),
            (Some(Value::String(text)), BlankPolicy::Null) if text.trim().is_empty() => Value::Null,
            (Some(Value::String(text)), _) => match max_length {
                Some(max_length) if text.chars().count() > max_length => {
                    let error = format!("The value must be no longer than {max_length} characters.");
                    return self.errors.add(field, &error);
                }
                _ => json!(text),
            },
            (Some(_), _) => return self.errors.add(field, NOT_TEXT),
        };
        self.patch.plain.insert(field.to_owned(), value);
    }

    fn url(&mut self) {
        self.text("url", None, BlankPolicy::Null);
        if let Some(Value::String(text)) = self.patch.plain.get("url") {
            match formats::url(text) {
                Some(url) => drop(self.patch.plain.insert("url".into(), url.into())),
                None => self.errors.add("url", "Invalid URL."),
            }
        }
    }

    /// The status, by label or by id. The error for an unknown id names the field `status` too (close-api.md §3).
    fn status(&mut self, schema: &Schema) {
        let named = |key: &str| self.body.get(key).filter(|value| !value.is_null());
        let (label, id) = (named("status"), named("status_id"));
        let (wanted, found) = match (label, id) {
            (None, None) => return,
            (Some(_), Some(_)) => {
                return self.errors.add("status", "Only one of status and status_id may be given.");
            }
            (Some(label), None) => (label, schema.statuses.iter().find(|s| *label == json!(s.label))),
            (None, Some(id)) => (id, schema.statuses.iter().find(|s| *id == json!(s.id))),
        };
        if let Some(status) = found {
            self.patch.plain.insert("status_id".into(), json!(status.id));
        } else {
            let wanted = wanted.as_str().map_or_else(|| wanted.to_string(), str::to_owned);
            self.errors.add("status", &format!("{NOT_A_CHOICE} '{wanted}' is not a known status."));
        }
    }

    /// The items of a list. Null is an empty list (close-api.md §12).
    fn array(&mut self, field: &str, max_length: usize) -> Option<&'a [Value]> {
        let value = self.body.get(field)?;
        let error = match value.as_array() {
            Some(items) if items.len() <= max_length => return Some(items),
            Some(_) => "List is too long.",
            None if value.is_null() => return Some(&[]),
            None => "Value must be of list type.",
        };
        self.errors.add(field, error);
        None
    }

    fn list(
        &mut self,
        field: &str,
        max_length: usize,
        check: impl Fn(&Object) -> Result<Option<Value>, FieldErrors>,
    ) {
        let Some(items) = self.array(field, max_length) else { return };
        let mut good = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match object(item).and_then(&check) {
                Ok(item) => good.extend(item),
                Err(errors) => self.errors.add_nested(field, index, &errors),
            }
        }
        self.patch.plain.insert(field.to_owned(), good.into());
    }

    fn date_created(&mut self) {
        match self.body.get("date_created") {
            None | Some(Value::Null) => {}
            Some(value) => match value.as_str().and_then(ids::parse_timestamp) {
                Some(timestamp) => self.patch.date_created = Some(timestamp),
                None => self.errors.add("date_created", NOT_A_DATETIME),
            },
        }
    }

    fn custom(&mut self, kind: Kind, schema: &Schema) {
        self.patch.custom = custom::read(self.body, kind, schema, &mut self.errors);
    }
}

fn object(item: &Value) -> Result<&Object, FieldErrors> {
    let wrong =
        || FieldErrors { general: vec!["Invalid request: JSON dictionary expected."], fields: Object::new() };
    item.as_object().ok_or_else(wrong)
}

/// The `type` of an email, phone or url. Any text is valid (close-api.md §5).
fn kind_word(item: &Object, default: &str) -> Result<Value, FieldErrors> {
    match item.get("type") {
        None | Some(Value::Null) => Ok(json!(default)),
        Some(Value::String(word)) => Ok(json!(word)),
        Some(_) => Err(FieldErrors::one("type", NOT_TEXT)),
    }
}

fn required_text<'a>(item: &'a Object, field: &str) -> Result<&'a str, FieldErrors> {
    match item.get(field) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text),
        None | Some(Value::Null | Value::String(_)) => Err(FieldErrors::one(field, REQUIRED)),
        Some(_) => Err(FieldErrors::one(field, NOT_TEXT)),
    }
}

fn email_item(item: &Object) -> Result<Option<Value>, FieldErrors> {
    let email = formats::email(required_text(item, "email")?)
        .ok_or_else(|| FieldErrors::one("email", "Invalid email address."))?;
    Ok(Some(json!({"email": email, "type": kind_word(item, "office")?, "is_unsubscribed": false})))
}

/// The schema allows a null phone; such an item is dropped.
fn phone_item(item: &Object, schema: &Schema) -> Result<Option<Value>, FieldErrors> {
    if item.get("phone") == Some(&Value::Null) {
        return Ok(None);
    }
    let phone = formats::phone(required_text(item, "phone")?, schema.behaviour.country)
        .ok_or_else(|| FieldErrors::one("phone", NOT_A_PHONE))?;
    Ok(Some(json!({
        "phone": phone.number,
        "phone_formatted": phone.formatted,
        "country": phone.country,
        "type": kind_word(item, "office")?,
    })))
}

fn url_item(item: &Object) -> Result<Option<Value>, FieldErrors> {
    let url =
        formats::url(required_text(item, "url")?).ok_or_else(|| FieldErrors::one("url", "Invalid URL."))?;
    Ok(Some(json!({"url": url, "type": kind_word(item, "url")?})))
}

/// An address keeps only the keys of Close's schema (close-api.md §4).
fn address(item: &Object) -> Result<Option<Value>, FieldErrors> {
    const KNOWN: [&str; 7] = ["label", "address_1", "address_2", "city", "state", "zipcode", "country"];
    let mut errors = FieldErrors::default();
    let mut kept = Object::new();
    for key in KNOWN {
        match item.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => drop(kept.insert(key.into(), json!(text))),
            Some(_) => errors.add(key, NOT_TEXT),
        }
    }
    errors.into_result(Some(kept.into()))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::ids::Ids;
    use crate::schema::{CustomField, FieldKind, Owner};
    use crate::settings::Settings;

    fn schema() -> Schema {
        let mut settings = Settings::default();
        let field = |id: &str, kind| CustomField::new(id, id, kind, Owner::Lead);
        settings.custom_fields.extend([
            field("cf_date", FieldKind::Date),
            field("cf_when", FieldKind::Datetime),
            field("cf_owner", FieldKind::User),
            field("cf_tags", FieldKind::Choices).choices(["a", "b", "c"]).multiple(),
            field("cf_hidden", FieldKind::Hidden),
            CustomField::new("cf_region", "Region", FieldKind::Text, Owner::Shared),
        ]);
        Schema::new(&settings, &mut Ids::new(Uuid::nil()), Timestamp::UNIX_EPOCH)
    }

    fn map(value: Value) -> Object {
        serde_json::from_value(value).unwrap()
    }

    fn lead_errors(body: Value) -> Value {
        lead(&map(body), &schema()).err().map(|errors| Value::Object(errors.fields)).unwrap_or_default()
    }

    fn contact_errors(body: Value) -> Value {
        let exists = |id: &str| id == "lead_1";
        contact(&map(body), &schema(), exists)
            .err()
            .map(|errors| Value::Object(errors.fields))
            .unwrap_or_default()
    }

    #[test]
    fn invalid_leads() {
        let too_long = "The value must be no longer than 1000 characters.";
        for (body, expected) in [
            (json!({}), json!(null)),
            (json!({"name": null, "url": "", "contacts": null, "unknown": [1]}), json!(null)),
            (json!({"name": 1}), json!({"name": NOT_TEXT})),
            (json!({"name": "é".repeat(1001)}), json!({"name": too_long})),
            (json!({"name": "é".repeat(1000)}), json!(null)),
            (json!({"url": "no url"}), json!({"url": "Invalid URL."})),
            (json!({"status": "Customer"}), json!(null)),
            (
                json!({"status_id": "foo"}),
                json!({"status": "Not a valid choice. 'foo' is not a known status."}),
            ),
            (
                json!({"status": "Customer", "status_id": "x"}),
                json!({"status": "Only one of status and status_id may be given."}),
            ),
            (json!({"date_created": "then"}), json!({"date_created": NOT_A_DATETIME})),
            (json!({"contacts": {}}), json!({"contacts": "Value must be of list type."})),
            (
                json!({"contacts": [{}, 1]}),
                json!({"contacts": {"errors": {"1": {
                    "errors": ["Invalid request: JSON dictionary expected."], "field-errors": {}}}}}),
            ),
            (
                json!({"contacts": [{"custom.LinkedIn": "x"}], "name": 1}),
                json!({"name": NOT_TEXT, "contacts": {"errors": {"0": {"errors": [], "field-errors": {
                    "custom.LinkedIn": "The Custom Field \"LinkedIn\" does not exist."}}}}}),
            ),
            (
                json!({"contacts": [{}, {"emails": [{"email": "a@b.test"}, {"email": "no"}]}]}),
                json!({"contacts": {"errors": {"1": {"errors": [], "field-errors": {
                    "emails": {"errors": {"1": {"errors": [], "field-errors": {
                        "email": "Invalid email address."}}}}}}}}}),
            ),
        ] {
            assert_eq!(lead_errors(body.clone()), expected, "{body}");
        }
    }

    #[test]
    fn invalid_contacts() {
        let nested = |list: &str, field: &str, text: &str| {
            json!({list: {"errors": {"0": {"errors": [],
                "field-errors": {field: text}}}}})
        };
        for (body, expected) in [
            (json!({"lead_id": "lead_1"}), json!(null)),
            (json!({"lead_id": "wibble"}), json!({"lead": NO_SUCH_OBJECT})),
            (json!({"lead_id": 1, "title": 1}), json!({"lead": NOT_TEXT, "title": NOT_TEXT})),
            (json!({"emails": null, "phones": [{"phone": null}], "extra": 1}), json!(null)),
            (json!({"emails": [{}]}), nested("emails", "email", REQUIRED)),
            (json!({"emails": [{"email": ""}]}), nested("emails", "email", REQUIRED)),
            (json!({"emails": [{"email": 1}]}), nested("emails", "email", NOT_TEXT)),
            (json!({"emails": [{"email": "a@b.test", "type": 1}]}), nested("emails", "type", NOT_TEXT)),
            (json!({"phones": [{"phone": "none"}]}), nested("phones", "phone", NOT_A_PHONE)),
            (json!({"urls": [{"url": "no url"}]}), nested("urls", "url", "Invalid URL.")),
            (
                json!({"emails": vec![json!({"email": "a@b.test"}); 101]}),
                json!({"emails": "List is too long."}),
            ),
            (
                json!({"custom.cf_leadcompanyid": "x"}),
                json!({"custom.cf_leadcompanyid": "The Custom Field \"cf_leadcompanyid\" does not exist."}),
            ),
            (json!({"custom.cf_region": "x"}), json!(null)),
        ] {
            assert_eq!(contact_errors(body.clone()), expected, "{body}");
        }
    }

    #[test]
    fn strict_schemas_refuse_unknown_contact_keys() {
        let mut strict = schema();
        strict.behaviour.strict_contact_keys = true;
        let body = map(json!({"name": "x", "custom.cf_region": "x", "id": "x"}));
        let errors = contact(&body, &strict, |_| true).unwrap_err();
        assert_eq!(Value::Object(errors.fields), json!({"id": "Extra fields not permitted."}));
    }

    #[test]
    fn custom_values_by_type() {
        for (field, value, expected) in [
            ("cf_leadcompanyid", json!("x"), Ok(json!("x"))),
            ("Company ID", json!("x"), Ok(json!("x"))),
            ("cf_leadcompanyid", json!(1), Err(NOT_TEXT)),
            ("cf_leadcompanyid", json!(["x"]), Err(NOT_TEXT)),
            ("cf_leadcompanyid", json!({}), Err(NOT_TEXT)),
            ("cf_leadcompanyid", json!(""), Ok(json!(null))),
            ("cf_leadseats", json!(3.5), Ok(json!(3.5))),
            ("cf_leadseats", json!("3"), Err("Value must be of numeric type.")),
            ("cf_leadseats", json!(true), Err("Value must be of numeric type.")),
            ("cf_leadseats", json!(null), Ok(json!(null))),
            ("cf_date", json!("2026-01-31"), Ok(json!("2026-01-31"))),
            ("cf_date", json!("2026-01-31T00:00:00Z"), Err("Could not parse date")),
            ("cf_when", json!("2026-01-31T01:00:00+01:00"), Ok(json!("2026-01-31T00:00:00.000000+00:00"))),
            ("cf_when", json!(1_700_000_000), Err(NOT_TEXT)),
            ("cf_when", json!("soon"), Err(NOT_A_DATETIME)),
            ("cf_leadplan", json!("pro"), Ok(json!("pro"))),
            ("cf_leadplan", json!("Pro"), Err("Not a valid choice. 'Pro' is not one of the choices.")),
            ("cf_leadplan", json!(["pro"]), Err(NOT_TEXT)),
            ("cf_tags", json!(["a", "b"]), Ok(json!(["a", "b"]))),
            ("cf_tags", json!("a"), Ok(json!(["a"]))),
            ("cf_tags", json!([]), Ok(json!(null))),
            ("cf_tags", json!(["a", "z"]), Err("Not a valid choice. 'z' is not one of the choices.")),
            ("cf_owner", json!("Sim Ulator"), Ok(json!("user_simulator"))),
            ("cf_owner", json!("user_simulator"), Ok(json!("user_simulator"))),
            ("cf_owner", json!("Ada Account"), Ok(json!("user_adaaccount"))),
            ("cf_owner", json!("user_adaaccount"), Ok(json!("user_adaaccount"))),
            ("cf_owner", json!("Ada"), Err(NO_SUCH_OBJECT)),
            ("cf_owner", json!("sim ulator"), Err(NO_SUCH_OBJECT)),
            ("cf_hidden", json!("x"), Ok(json!("x"))),
            ("cf_leadplan.add", json!("pro"), Err("This field does not accept multiple values.")),
            ("cf_nothing", json!("x"), Err("The Custom Field \"cf_nothing\" does not exist.")),
            ("cf_contactuserid", json!("x"), Err("The Custom Field \"cf_contactuserid\" does not exist.")),
        ] {
            let key = format!("custom.{field}");
            let found = lead(&map(json!({key.as_str(): value})), &schema()).map(|patch| {
                let mut values = Object::new();
                patch.custom.apply(&mut values);
                values.into_iter().next().map(|(_, value)| value).unwrap_or_default()
            });
            let expected = expected.map_err(|text: &str| FieldErrors::one(&key, text));
            assert_eq!(found, expected, "{field}: {value}");
        }
    }

    #[test]
    fn custom_field_changes_apply_to_the_current_values() {
        for (body, expected) in [
            (json!({}), json!({"cf_tags": ["a"], "cf_leadseats": 1})),
            (json!({"custom.cf_leadseats": null}), json!({"cf_tags": ["a"]})),
            (json!({"custom.cf_tags": ["b"]}), json!({"cf_tags": ["b"], "cf_leadseats": 1})),
            (json!({"custom.cf_tags.add": "b"}), json!({"cf_tags": ["a", "b"], "cf_leadseats": 1})),
            (json!({"custom.cf_tags.add": ["a", "c"]}), json!({"cf_tags": ["a", "c"], "cf_leadseats": 1})),
            (json!({"custom.cf_tags.remove": "a"}), json!({"cf_leadseats": 1})),
            (json!({"custom": {"Plan": "pro"}}), json!({"cf_leadplan": "pro"})),
        ] {
            let mut values = map(json!({"cf_tags": ["a"], "cf_leadseats": 1}));
            lead(&map(body.clone()), &schema()).unwrap().custom.apply(&mut values);
            assert_eq!(Value::Object(values), expected, "{body}");
        }
    }
}
