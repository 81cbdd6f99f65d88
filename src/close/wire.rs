//! Converting records to and from the JSON of Close. Only `close` uses it.

use std::collections::{BTreeSet, HashSet};

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use strum::VariantArray;

use crate::close::answer::Answer;
use crate::close::endpoint::Endpoint;
use crate::close::error::{CloseError, Fault};
use crate::close::records::{LeadWithContacts, Lookup};
use crate::domain::mapping::KeyFields;
use crate::domain::plan::ContactValues;
use crate::domain::record::{
    Channel, Contact, ContactId, Entry, Field, FieldId, Fields, Lead, LeadId, Lists, fold_email, is_id,
};
use crate::domain::value::same_word;

/// The values of a record. Custom fields have keys `custom.cf_…` at the same level.
fn fields(object: &Value, plain: &[Field]) -> Fields {
    let plain =
        plain.iter().filter_map(|field| Some((field.clone(), object.get(field.to_string())?.clone())));
    let custom = object.as_object().into_iter().flatten().filter_map(|(key, value)| {
        Some((Field::Custom(FieldId::parse(key.strip_prefix("custom.")?)?), value.clone()))
    });
    // Null and "" both mean "no value" (close-api.md §4, §12).
    plain.chain(custom).filter(|(_, value)| !value.is_null() && value != "").collect()
}

/// What stays as it is in an id within a URL.
pub(crate) const IN_ID: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_').remove(b'-');

/// The path of one record. Ids are checked where answers are read; whatever an id contains, it stays one segment.
pub(crate) fn record_path(endpoint: Endpoint, id: &str) -> String {
    format!("{}{}/", list_path(endpoint), utf8_percent_encode(id, IN_ID))
}

/// The fields of a Lead without its Contacts. The field with the company id is named as well: all depends on it.
pub(crate) fn lead_fields(keys: &KeyFields) -> String {
    let company = keys.company.as_ref().map(|field| format!(",custom.{field}")).unwrap_or_default();
    format!("id,name,description,status_id,date_created,date_updated,custom{company}")
}

/// The fields of a Lead that [`row_of`] keeps for these look-ups. A Contact is read as a whole.
pub(crate) fn row_fields(lookups: &[Lookup], endpoint: Endpoint) -> Option<String> {
    let companies = lookups.iter().filter_map(|lookup| match lookup {
        Lookup::Lead { field, .. } => Some(format!(",custom.{field}")),
        Lookup::Contact { .. } => None,
    });
    let mut companies: Vec<String> = companies.collect();
    companies.dedup();
    (endpoint == Endpoint::ReadLead).then(|| format!("id,date_created{}", companies.concat()))
}

/// The path of the list of the records that an endpoint is about.
pub(crate) fn list_path(endpoint: Endpoint) -> &'static str {
    endpoint.template().trim_start_matches('/').trim_end_matches("{id}/")
}

fn text(object: &Value, key: &str) -> Option<String> {
    object.get(key).and_then(Value::as_str).map(str::to_owned)
}

/// An id that Close does not write: a proxy answers in its place, or the answer is forged.
const NOT_AN_ID: CloseError = CloseError::Transient(Fault::InvalidResponse);

/// The id with this key.
fn id<T>(object: &Value, key: &str, parse: fn(&str) -> Option<T>) -> Result<T, CloseError> {
    object.get(key).and_then(Value::as_str).and_then(parse).ok_or(NOT_AN_ID)
}

/// The records of a list. Objects without an id are skipped; one with an invalid id fails.
pub(crate) fn read_all<'a, T>(
    objects: impl IntoIterator<Item = &'a Value>,
    read: fn(&Value) -> Result<T, CloseError>,
) -> Result<Vec<T>, CloseError> {
    objects.into_iter().filter(|object| object.get("id").is_some_and(|id| !id.is_null())).map(read).collect()
}

/// Close writes times in UTC, in several notations. One without an offset is in UTC too (close-api.md §15, 10).
fn time(object: &Value, key: &str) -> Option<Timestamp> {
    let text = object.get(key)?.as_str()?;
    let naive = || TimeZone::UTC.to_timestamp(text.parse::<DateTime>().ok()?).ok();
    text.parse().ok().or_else(naive)
}

pub(crate) fn read_lead(object: &Value) -> Result<Lead, CloseError> {
    Ok(Lead {
        id: id(object, "id", LeadId::parse)?,
        date_created: text(object, "date_created").unwrap_or_default(),
        date_updated: time(object, "date_updated"),
        fields: fields(object, &[Field::Name, Field::Description, Field::Status]),
    })
}

pub(crate) fn read_contact(object: &Value) -> Result<Contact, CloseError> {
    let items = |channel: Channel| object.get(channel.list())?.as_array();
    let entry = |channel: Channel, item: &Value| {
        Some(Entry {
            value: text(item, channel.item())?,
            kind: text(item, "type").unwrap_or_else(|| channel.default_kind().to_owned()),
        })
    };
    let has_lead = object.get("lead_id").is_some_and(|id| !id.is_null());
    let (mut lists, mut unknown_lists) = (Lists::new(), BTreeSet::new());
    for &channel in Channel::VARIANTS {
        let Some(items) = items(channel) else {
            unknown_lists.insert(channel);
            continue;
        };
        let entries: Vec<Entry> = items.iter().filter_map(|item| entry(channel, item)).collect();
        // Writing the list without an entry that cannot be read would delete it. The others still tell who the person is.
        if entries.len() < items.len() {
            unknown_lists.insert(channel);
        }
        lists.insert(channel, entries);
    }
    Ok(Contact {
        id: id(object, "id", ContactId::parse)?,
        lead_id: has_lead.then(|| id(object, "lead_id", LeadId::parse)).transpose()?,
        date_created: text(object, "date_created").unwrap_or_default(),
        date_updated: time(object, "date_updated"),
        fields: fields(object, &[Field::Name, Field::Title]),
        lists,
        unknown_lists,
    })
}

pub(crate) fn read_lead_with_contacts(lead: &Value) -> Result<LeadWithContacts, CloseError> {
    let list = |key: &str| lead.get(key).and_then(Value::as_array).into_iter().flatten();
    let contacts = read_all(list("contacts"), read_contact)?;
    let id = |value: &Value| value.as_str().and_then(ContactId::parse).ok_or(NOT_AN_ID);
    let mut missing = list("contact_ids").map(id).collect::<Result<Vec<_>, _>>()?;
    let known: HashSet<&ContactId> = contacts.iter().map(|contact| &contact.id).collect();
    missing.retain(|id| !known.contains(id));
    Ok(LeadWithContacts { lead: read_lead(lead)?, contacts, missing })
}

pub(crate) fn lead_body(fields: &Fields, contact: Option<&ContactValues>) -> Value {
    let mut body = field_body(fields);
    if let Some(contact) = contact {
        body.insert("contacts".into(), json!([contact_body(contact, None)]));
    }
    body.into()
}

pub(crate) fn contact_body(contact: &ContactValues, lead: Option<&LeadId>) -> Value {
    let mut body = field_body(&contact.fields);
    body.extend(list_body(&contact.lists));
    if let Some(lead) = lead {
        body.insert("lead_id".into(), lead.as_str().into());
    }
    body.into()
}

fn field_body(fields: &Fields) -> Map<String, Value> {
    fields.iter().map(|(field, value)| (field.to_string(), value.clone())).collect()
}

/// Only the keys in the schema of Close, which may reject others (close-api.md §5).
fn list_body(lists: &Lists) -> Map<String, Value> {
    let entry = |channel: Channel, entry: &Entry| json!({channel.item(): entry.value, "type": entry.kind});
    let list =
        |channel: Channel, entries: &[Entry]| entries.iter().map(|item| entry(channel, item)).collect();
    lists.iter().map(|(&channel, entries)| (channel.list().to_owned(), list(channel, entries))).collect()
}

/// The mode in which search compares text.
#[derive(Clone, Copy)]
pub(crate) enum TextMode {
    /// Undocumented, but Close's own app uses it (close-api.md §6).
    ExactValue,
    /// Documented. It also finds inexact matches, which the caller removes.
    Phrase,
}

impl TextMode {
    fn as_str(self) -> &'static str {
        match self {
            Self::ExactValue => "exact_value",
            Self::Phrase => "phrase",
        }
    }
}

/// The page size of a search. The maximum is probably 200; 100 is safe (close-api.md §12, 12).
pub(crate) const PAGE: usize = 100;

/// The body of a search for the records of all look-ups, oldest first. The look-ups must be of the same kind.
pub(crate) fn search_body(lookups: &[Lookup], mode: TextMode) -> Value {
    let text = |value: &str| json!({"type": "text", "mode": mode.as_str(), "value": value});
    let custom = |field: &FieldId, value: &str| {
        json!({
            "type": "field_condition",
            "field": {"type": "custom_field", "custom_field_id": field.as_str()},
            "condition": text(value),
        })
    };
    let with_email = |email: &str| {
        json!({
            "type": "has_related",
            "this_object_type": "contact",
            "related_object_type": "contact_email",
            "related_query": {
                "type": "field_condition",
                "field": {"type": "regular_field", "object_type": "contact_email", "field_name": "email"},
                "condition": text(&fold_email(email)),
            },
        })
    };
    let (mut conditions, mut keys) = (Vec::new(), BTreeSet::new());
    let mut kind = "lead";
    for lookup in lookups {
        match lookup {
            Lookup::Lead { field, company_id } => {
                conditions.push(custom(field, company_id));
                keys.insert(format!("custom.{field}"));
            }
            Lookup::Contact { user, email } => {
                kind = "contact";
                conditions.extend(user.as_ref().map(|(field, id)| custom(field, id)));
                conditions.extend(email.as_deref().map(with_email));
                keys.extend(user.as_ref().map(|(field, _)| format!("custom.{field}")));
            }
        }
    }
    let plain: &[&str] =
        if kind == "lead" { &["id", "date_created"] } else { &["id", "lead_id", "date_created", "emails"] };
    let wanted: Vec<String> = plain.iter().map(|key| (*key).to_owned()).chain(keys).collect();
    json!({
        "query": {"type": "and", "queries": [
            {"type": "object_type", "object_type": kind},
            {"type": "or", "queries": conditions},
        ]},
        "_fields": {kind: wanted},
        "sort": [{"direction": "asc", "field": {
            "type": "regular_field", "object_type": kind, "field_name": "date_created",
        }}],
        "_limit": PAGE,
    })
}

/// Whether the row has a custom field with this id. Compares inexactly, as search does.
fn has_id(row: &Value, field: &FieldId, id: &str) -> bool {
    row[format!("custom.{field}")].as_str().is_some_and(|stored| same_word(stored, id))
}

/// Whether only the emails of a row would tell whether it belongs to this look-up, and the row does not show them.
pub(crate) fn is_unclear(lookup: &Lookup, row: &Value) -> bool {
    match lookup {
        Lookup::Lead { .. } => false,
        Lookup::Contact { user, email } => {
            let has_user = user.as_ref().is_some_and(|(field, _)| !row[format!("custom.{field}")].is_null());
            email.is_some() && !has_user && !row["emails"].is_array()
        }
    }
}

/// Whether a row of a shared search may belong to this look-up. Compares inexactly, as search does; the caller compares
/// again.
pub(crate) fn may_match(lookup: &Lookup, row: &Value) -> bool {
    match lookup {
        Lookup::Lead { field, company_id } => has_id(row, field, company_id),
        Lookup::Contact { .. } => is_unclear(lookup, row) || has_user(lookup, row) || has_email(lookup, row),
    }
}

fn has_user(lookup: &Lookup, row: &Value) -> bool {
    matches!(lookup, Lookup::Contact { user: Some((field, id)), .. } if has_id(row, field, id))
}

fn has_email(lookup: &Lookup, row: &Value) -> bool {
    let emails = row["emails"].as_array().into_iter().flatten().filter_map(|entry| entry["email"].as_str());
    matches!(lookup, Lookup::Contact { email: Some(email), .. }
        if emails.into_iter().any(|stored| same_word(stored, email)))
}

/// Whether a row has a user id and an email that the search is for. Search may have found it by one of them alone: the index
/// lags, and the row shows the record as it is now.
pub(crate) fn has_both(lookups: &[Lookup], row: &Value) -> bool {
    lookups.iter().any(|lookup| has_user(lookup, row)) && lookups.iter().any(|lookup| has_email(lookup, row))
}

/// The endpoint and the id of the record of a row without the keys by which a look-up finds it. Only the record shows which
/// look-up found the row.
pub(crate) fn incomplete<'a>(lookups: &[Lookup], row: &'a Value) -> Option<(Endpoint, &'a str)> {
    let has = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
    let is_complete = lookups.iter().any(|lookup| match lookup {
        Lookup::Lead { field, .. } => has(&format!("custom.{field}")),
        Lookup::Contact { user, .. } => {
            has("emails") || user.as_ref().is_some_and(|(field, id)| has_id(row, field, id))
        }
    });
    let (endpoint, prefix) = match lookups.first()? {
        Lookup::Lead { .. } => (Endpoint::ReadLead, "lead"),
        Lookup::Contact { .. } => (Endpoint::ReadContact, "cont"),
    };
    let id = row.get("id")?.as_str().filter(|id| is_id(Some(prefix), id))?;
    (!is_complete).then_some((endpoint, id))
}

/// The row of a search for this record.
pub(crate) fn row_of(record: &Value) -> Value {
    let is_kept =
        |key: &str| ["id", "lead_id", "date_created", "emails"].contains(&key) || key.starts_with("custom.");
    let members = record.as_object().into_iter().flatten();
    members.filter(|(key, _)| is_kept(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

#[derive(Deserialize)]
#[serde(try_from = "Answer")]
pub(crate) struct SearchPage {
    pub(crate) data: Vec<Value>,
    pub(crate) more: bool,
}

impl TryFrom<Answer> for SearchPage {
    type Error = &'static str;

    fn try_from(Answer(mut page): Answer) -> Result<Self, Self::Error> {
        let Some(Value::Array(data)) = page.get_mut("data").map(Value::take) else { return Err("no rows") };
        if data.len() > PAGE {
            return Err("more rows than asked for");
        }
        let cursor = page.get("cursor").and_then(Value::as_str);
        Ok(Self { data, more: cursor.is_some_and(|cursor| !cursor.trim().is_empty()) })
    }
}

/// A page of the event log, newest first.
#[derive(Deserialize)]
#[serde(try_from = "Answer")]
pub(crate) struct Events {
    pub(crate) events: Vec<Event>,
    /// The cursor of the next, older page.
    pub(crate) older: Option<String>,
}

pub(crate) struct Event {
    /// The id of the record that it is about, if it is one.
    pub(crate) object_id: Option<String>,
    pub(crate) at: Option<Timestamp>,
    /// When it was last changed.
    pub(crate) changed: Option<Timestamp>,
    /// Users without admin rights do not see that of an event older than an hour (close-api.md §15, 15).
    pub(crate) record: Option<Value>,
}

impl TryFrom<Answer> for Events {
    type Error = &'static str;

    fn try_from(Answer(mut page): Answer) -> Result<Self, Self::Error> {
        let Some(Value::Array(events)) = page.get_mut("data").map(Value::take) else {
            return Err("no events");
        };
        let event = |mut event: Value| Event {
            object_id: text(&event, "object_id").filter(|id| is_id(None, id)),
            at: time(&event, "date_created"),
            changed: time(&event, "date_updated").or_else(|| time(&event, "date_created")),
            record: event.get_mut("data").map(Value::take).filter(Value::is_object),
        };
        Ok(Self {
            events: events.into_iter().map(event).collect(),
            older: text(&page, "cursor_next").filter(|cursor| !cursor.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_is_written_without_the_values_that_close_computes() {
        let object = json!({
            "id": "cont_1", "lead_id": "lead_1", "name": "Jane", "title": "", "date_created": "d",
            "emails": [{"email": "j@x.test", "type": "home", "is_unsubscribed": false}],
            "phones": [{"phone": "+49301", "type": "mobile", "phone_formatted": "+49 30 1", "country": "DE"}],
            "urls": [], "custom.cf_1": "u", "display_name": "Jane",
        });
        let contact = read_contact(&object).unwrap();
        let values = ContactValues { fields: contact.fields, lists: contact.lists };
        assert_eq!(
            contact_body(&values, None),
            json!({
                "name": "Jane", "custom.cf_1": "u", "urls": [],
                "emails": [{"email": "j@x.test", "type": "home"}],
                "phones": [{"phone": "+49301", "type": "mobile"}],
            })
        );
    }

    #[test]
    fn a_row_with_only_its_id_is_incomplete() {
        let lead =
            |company: &str| Lookup::Lead { field: FieldId::new("cf_c"), company_id: company.to_owned() };
        let user = Some((FieldId::new("cf_u"), "u1".to_owned()));
        let contact = Lookup::Contact { user, email: Some("a@x.test".to_owned()) };
        let path = |lookups: &[Lookup], row: Value| {
            incomplete(lookups, &row).map(|(endpoint, id)| record_path(endpoint, id))
        };
        assert_eq!(path(&[lead("a"), lead("b")], json!({"id": "lead_1"})).as_deref(), Some("lead/lead_1/"));
        assert_eq!(path(&[lead("a")], json!({"id": "lead_1", "custom.cf_c": "b"})), None);
        let contacts = std::slice::from_ref(&contact);
        let only_id = json!({"id": "cont_1", "lead_id": "lead_1", "emails": null});
        assert_eq!(path(contacts, only_id).as_deref(), Some("contact/cont_1/"));
        assert_eq!(path(contacts, json!({"id": "cont_1", "emails": []})), None);
        assert_eq!(path(contacts, json!({"id": "cont_1", "custom.cf_u": "u1"})), None);
        assert_eq!(path(contacts, json!({"id": "../me"})), None);
        let record = json!({"id": "lead_1", "custom.cf_c": "a", "contacts": [{}], "name": "Acme"});
        assert_eq!(row_of(&record), json!({"id": "lead_1", "custom.cf_c": "a"}));
    }

    #[test]
    fn a_page_of_a_search_has_a_list_of_at_most_as_many_rows_as_asked_for() {
        let page =
            |json: Value| serde_json::from_value::<SearchPage>(json).map(|page| (page.data.len(), page.more));
        assert_eq!(page(json!({"data": [{"id": "a"}], "cursor": "c"})).unwrap(), (1, true));
        for cursor in [json!(""), json!(" "), json!(null), json!({})] {
            assert_eq!(
                page(json!({"data": [{"id": "a"}], "cursor": cursor})).unwrap(),
                (1, false),
                "{cursor}"
            );
        }
        assert_eq!(page(json!({"data": vec![json!({}); PAGE], "cursor": null})).unwrap(), (PAGE, false));
        for json in
            [json!({"data": vec![json!({}); PAGE + 1]}), json!({}), json!([]), json!("data"), json!(null)]
        {
            assert!(page(json.clone()).is_err(), "{json}");
            let events = serde_json::from_value::<Events>(json.clone());
            assert_eq!(events.is_ok(), json.get("data").is_some(), "{json}");
        }
    }

    #[test]
    fn contacts_that_a_lead_lacks_are_missing() {
        let read = |mut lead: Value| {
            lead["id"] = json!("lead_1");
            let LeadWithContacts { contacts, missing, .. } = read_lead_with_contacts(&lead).unwrap();
            let ids =
                |ids: Vec<&ContactId>| ids.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            (ids(contacts.iter().map(|contact| &contact.id).collect()), ids(missing.iter().collect()))
        };
        let parts = |contacts: &str, missing: &str| (contacts.to_owned(), missing.to_owned());
        let c = || json!([{"id": "cont_c"}]);
        assert_eq!(read(json!({"contacts": c(), "contact_ids": ["cont_c"]})), parts("cont_c", ""));
        assert_eq!(read(json!({"contacts": c()})), parts("cont_c", ""));
        assert_eq!(
            read(json!({"contacts": c(), "contact_ids": ["cont_b", "cont_c"]})),
            parts("cont_c", "cont_b")
        );
        for contacts in [json!([]), json!(null)] {
            assert_eq!(read(json!({"contacts": contacts, "contact_ids": ["cont_c"]})), parts("", "cont_c"));
        }
        assert_eq!(read(json!({"contact_ids": ["cont_c"]})), parts("", "cont_c"));
        assert_eq!(read(json!({})), parts("", ""));
    }

    #[test]
    fn a_list_that_cannot_be_read_is_unknown_and_its_readable_entries_are_kept() {
        let read = |emails: Value| {
            let contact = json!({"id": "cont_1", "emails": emails, "phones": [], "urls": []});
            let Contact { mut lists, unknown_lists, .. } = read_contact(&contact).unwrap();
            (unknown_lists.into_iter().collect::<Vec<_>>(), lists.remove(&Channel::Email))
        };
        let kept = |emails: &[&str]| {
            let entry = |email: &&str| Entry { value: (*email).to_owned(), kind: "office".into() };
            Some(emails.iter().map(entry).collect::<Vec<_>>())
        };
        let unknown = vec![Channel::Email];
        for (emails, expected) in [
            (json!([{"email": "a@x.test"}]), (vec![], kept(&["a@x.test"]))),
            (json!([{"email": "a@x.test"}, {}]), (unknown.clone(), kept(&["a@x.test"]))),
            (json!([{"email": null}, {"email": "a@x.test"}]), (unknown.clone(), kept(&["a@x.test"]))),
            (json!([{"email": null}]), (unknown.clone(), kept(&[]))),
            (json!(null), (unknown.clone(), None)),
            (json!({}), (unknown.clone(), None)),
        ] {
            assert_eq!(read(emails.clone()), expected, "{emails}");
        }
        let contact = read_contact(&json!({"id": "cont_1"})).unwrap();
        assert_eq!(contact.unknown_lists.len(), Channel::VARIANTS.len());
    }

    #[test]
    fn times_are_read_in_the_notations_of_close() {
        let read = |text: &str| time(&json!({"at": text}), "at").map(|at| at.to_string());
        for text in [
            "2026-01-02T03:04:05.600000+00:00",
            "2026-01-02T03:04:05.6Z",
            "2026-01-02T04:04:05.6+01:00",
            "2026-01-02T03:04:05.600000",
        ] {
            assert_eq!(read(text).as_deref(), Some("2026-01-02T03:04:05.6Z"), "{text}");
        }
        assert_eq!(read("yesterday"), None);
    }

    #[test]
    fn an_answer_with_an_invalid_id_is_not_an_answer_of_close() {
        let bad = "../contact/cont_x";
        for object in [json!({"id": bad}), json!({"id": 5}), json!({"id": "lead_a/../b"}), json!({})] {
            assert!(read_lead(&object).is_err() && read_contact(&object).is_err(), "{object}");
        }
        assert!(read_contact(&json!({"id": "cont_a", "lead_id": bad})).is_err());
        assert_eq!(read_contact(&json!({"id": "cont_a", "lead_id": null})).unwrap().lead_id, None);
        assert!(read_all(&[json!({"id": "lead_a"}), json!({"id": bad})], read_lead).is_err());
        assert_eq!(read_all(&[json!({"id": "lead_a"}), json!({})], read_lead).unwrap().len(), 1);
        for contacts in [json!({"contact_ids": ["cont_a", bad]}), json!({"contacts": [{"id": 5}]})] {
            let mut lead = contacts;
            lead["id"] = json!("lead_a");
            assert!(read_lead_with_contacts(&lead).is_err(), "{lead}");
        }
        // A key that is not an id cannot be that of a configured field.
        let lead = read_lead(&json!({"id": "lead_a", "custom.../x": 1, "custom.cf_1": 2})).unwrap();
        assert_eq!(lead.fields.len(), 1);
    }
}
