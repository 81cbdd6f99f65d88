//! The records and what may be done to them: pure state, given the time and a seed.
//!
//! The book is the truth; the search index and the event log are told of every change and show it later.

use std::{collections::HashMap, mem, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::custom;
use crate::events::{Event, EventLog};
use crate::ids::{Ids, iso};
use crate::index::{Document, Index};
use crate::schema::{CustomField, FieldKind, Kind, Owner, Schema};
use crate::settings::{Lag, Settings};
use crate::validate::{self, FieldErrors, NOT_A_CHOICE, NOT_TEXT, Object, Patch, REQUIRED, Refusal};

/// Nested contacts are made this much after their lead, and all at once (close-api.md §4).
const CONTACT_DELAY: SignedDuration = SignedDuration::from_millis(5);

/// A lead or a contact.
#[derive(Debug, Clone)]
struct Record {
    kind: Kind,
    id: String,
    /// The order of creation, which dates alone do not tell.
    serial: u64,
    created: Timestamp,
    updated: Timestamp,
    plain: Object,
    custom: Object,
    /// Of a contact.
    lead_id: Option<String>,
    /// Of a lead, in order.
    contact_ids: Vec<String>,
}

/// An organisation's records.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) schema: Schema,
    pub(crate) index: Index,
    pub(crate) events: EventLog,
    pub(crate) search_lag: Lag,
    event_lag: Lag,
    ids: Ids,
    by_id: HashMap<String, Record>,
    n_made: u64,
}

impl Records {
    pub(crate) fn new(settings: &Settings, mut ids: Ids, now: Timestamp) -> Self {
        Self {
            schema: Schema::new(settings, &mut ids, now),
            index: Index::default(),
            events: EventLog::default(),
            search_lag: settings.search_lag,
            event_lag: settings.event_lag,
            ids,
            by_id: HashMap::new(),
            n_made: 0,
        }
    }

    /// Makes a lead and its nested contacts, or neither.
    pub(crate) fn create_lead(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let mut patch = validate::lead(body, &self.schema).map_err(Refusal::Invalid)?;
        let contacts = mem::take(&mut patch.contacts);
        let request = self.ids.make("req");
        let id = self.make(Kind::Lead, patch, now);
        let contacts: Vec<String> = contacts
            .into_iter()
            .map(|contact| {
                self.make(Kind::Contact, Patch { lead_id: Some(id.clone()), ..contact }, now + CONTACT_DELAY)
            })
            .collect();
        self.publish(&id, "created", None, &request, now);
        for contact in contacts {
            self.publish(&contact, "created", None, &request, now);
        }
        self.get(Kind::Lead, &id)
    }

    /// Makes a contact; without a lead it gets a new one of its own name (close-api.md §5).
    pub(crate) fn create_contact(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let mut patch = self.checked_contact(body)?;
        let request = self.ids.make("req");
        if patch.lead_id.is_none() {
            let name = patch.plain.get("name").cloned().unwrap_or_default();
            let plain = Object::from_iter([("name".to_owned(), name)]);
            let lead_id = self.make(Kind::Lead, Patch { plain, ..Patch::default() }, now);
            self.publish(&lead_id, "created", None, &request, now);
            patch.lead_id = Some(lead_id);
        }
        let id = self.make(Kind::Contact, patch, now);
        self.publish(&id, "created", None, &request, now);
        self.publish_lead_of(&id, now);
        self.get(Kind::Contact, &id)
    }

    /// Patches a record.
    pub(crate) fn update(
        &mut self,
        kind: Kind,
        id: &str,
        body: &Object,
        now: Timestamp,
    ) -> Result<Value, Refusal> {
        let before = self.get(kind, id)?;
        let mut patch = match kind {
            Kind::Lead => validate::lead(body, &self.schema).map_err(Refusal::Invalid)?,
            Kind::Contact => {
                if body.get("lead_id").is_some_and(Value::is_null) {
                    return Err(Refusal::Invalid(FieldErrors::one("lead", REQUIRED)));
                }
                self.checked_contact(body)?
            }
        };
        let request = self.ids.make("req");
        let contacts = mem::take(&mut patch.contacts);
        if let Some(lead_id) = patch.lead_id.take() {
            self.move_contact(id, &lead_id, now);
        }
        if let Some(record) = self.by_id.get_mut(id) {
            record.plain.extend(patch.plain);
            patch.custom.apply(&mut record.custom);
            record.updated = now;
        }
        for contact in contacts {
            let patch = Patch { lead_id: Some(id.to_owned()), ..contact };
            let contact = self.make(Kind::Contact, patch, now + CONTACT_DELAY);
            self.publish(&contact, "created", None, &request, now);
        }
        self.publish(id, "updated", Some(&before), &request, now);
        self.get(kind, id)
    }

    /// Deletes a record, a lead with its contacts (close-api.md §4).
    pub(crate) fn delete(&mut self, kind: Kind, id: &str, now: Timestamp) -> Result<(), Refusal> {
        self.find(kind, id)?;
        let request = self.ids.make("req");
        let contacts = self.by_id.get(id).map(|record| record.contact_ids.clone()).unwrap_or_default();
        for contact in contacts {
            self.remove(&contact, &request, now);
        }
        self.remove(id, &request, now);
        Ok(())
    }

    /// Moves the source's contacts to the destination and deletes the source. The destination keeps its own
    /// fields, so an id that only the source carried is lost (close-api.md §9).
    pub(crate) fn merge(&mut self, source: &str, destination: &str, now: Timestamp) -> Result<(), Refusal> {
        let exists = |id| self.find(Kind::Lead, id).is_ok();
        if !exists(source) || !exists(destination) {
            return Err(Refusal::NoMergeSource);
        }
        if source == destination {
            return Err(Refusal::Malformed("Source and destination must be different leads.".into()));
        }
        let request = self.ids.make("req");
        let contacts = self.by_id.get(source).map(|record| record.contact_ids.clone()).unwrap_or_default();
        for contact in &contacts {
            self.move_contact(contact, destination, now);
            self.show(contact, now);
        }
        self.remove(source, &request, now);
        self.show(destination, now);
        let meta = json!({"merge_source_lead_id": source, "merge_destination_lead_id": destination});
        let rest = json!({"meta": meta, "changed_fields": [], "previous_data": {}, "data": {}});
        self.log(Kind::Lead, destination, Some(destination.to_owned()), "merged", rest, &request, now);
        Ok(())
    }

    /// Makes a custom field from a request body (close-api.md §7).
    pub(crate) fn create_field(&mut self, owner: Owner, body: &Object) -> Result<Value, Refusal> {
        let invalid = |field: &str, text: &str| Refusal::Invalid(FieldErrors::one(field, text));
        let name = body.get("name").and_then(Value::as_str).ok_or_else(|| invalid("name", REQUIRED))?;
        let kind = body.get("type").ok_or_else(|| invalid("type", REQUIRED))?;
        let kind: FieldKind =
            serde_json::from_value(kind.clone()).map_err(|_| invalid("type", NOT_A_CHOICE))?;
        let choices: Vec<String> = match body.get("choices") {
            None | Some(Value::Null) => Vec::new(),
            Some(choices) => {
                serde_json::from_value(choices.clone()).map_err(|_| invalid("choices", NOT_TEXT))?
            }
        };
        let mut field = CustomField::new(&self.ids.make("cf"), name, kind, owner);
        field.choices = choices;
        field.accepts_multiple_values = body.get("accepts_multiple_values") == Some(&json!(true));
        let item = self.schema.item(&field);
        self.add_field(field)?;
        Ok(item)
    }

    /// Adds a custom field under an id that is free.
    pub(crate) fn add_field(&mut self, field: CustomField) -> Result<(), Refusal> {
        self.check_field(&field)?;
        if self.schema.fields.iter().any(|other| other.id == field.id) {
            let text = "A Custom Field with this id already exists.";
            return Err(Refusal::Invalid(FieldErrors::one("id", text)));
        }
        self.schema.fields.push(field);
        Ok(())
    }

    /// Replaces the custom field of the same id. Values that it does not take now are gone; the real Close
    /// says no more than that it does not return them (close-api.md §7).
    pub(crate) fn change_field(&mut self, field: CustomField, now: Timestamp) -> Result<(), Refusal> {
        self.check_field(&field)?;
        let id = field.id.clone();
        let mut fields = self.schema.fields.iter_mut();
        *fields.find(|old| old.id == id).ok_or(Refusal::Missing("CustomField"))? = field;
        self.revise_values(&id, now);
        Ok(())
    }

    /// Deletes a custom field with its values (close-api.md §7), and says whether there was one.
    pub(crate) fn remove_field(&mut self, id: &str, now: Timestamp) -> bool {
        let n_before = self.schema.fields.len();
        self.schema.fields.retain(|field| field.id != id);
        self.revise_values(id, now);
        self.schema.fields.len() < n_before
    }

    /// A record in full.
    pub(crate) fn get(&self, kind: Kind, id: &str) -> Result<Value, Refusal> {
        let record = self.find(kind, id)?;
        let mut value = self.flat(record);
        if kind == Kind::Lead {
            let contacts = record.contact_ids.iter().filter_map(|id| self.by_id.get(id));
            value["contacts"] = contacts.map(|contact| self.flat(contact)).collect();
        }
        Ok(value)
    }

    /// The kind and current existence of an id.
    pub(crate) fn kind_of(&self, id: &str) -> Option<Kind> {
        self.by_id.get(id).map(|record| record.kind)
    }

    /// All records of a kind in full, oldest first.
    pub(crate) fn all(&self, kind: Kind) -> Vec<Value> {
        let mut records: Vec<&Record> = self.by_id.values().filter(|record| record.kind == kind).collect();
        records.sort_by_key(|record| (record.created, record.serial));
        records.into_iter().filter_map(|record| self.get(kind, &record.id).ok()).collect()
    }

    /// How many records of a kind there are.
    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.by_id.values().filter(|record| record.kind == kind).count()
    }

    /// A token that nobody has seen before.
    pub(crate) fn token(&mut self) -> String {
        self.ids.make("cursor")
    }

    fn find(&self, kind: Kind, id: &str) -> Result<&Record, Refusal> {
        self.by_id.get(id).filter(|record| record.kind == kind).ok_or(Refusal::Missing(kind.title()))
    }

    fn checked_contact(&self, body: &Object) -> Result<Patch, Refusal> {
        let exists = |id: &str| self.find(Kind::Lead, id).is_ok();
        validate::contact(body, &self.schema, exists).map_err(Refusal::Invalid)
    }

    fn check_field(&self, field: &CustomField) -> Result<(), Refusal> {
        let invalid = |key: &str, text: &str| Err(Refusal::Invalid(FieldErrors::one(key, text)));
        if field.accepts_multiple_values && !field.kind.may_be_multiple() {
            return invalid("accepts_multiple_values", NOT_A_CHOICE);
        }
        if field.kind == FieldKind::Choices && field.choices.is_empty() {
            return invalid("choices", REQUIRED);
        }
        let rivals = |other: &&CustomField| other.owner == field.owner && other.id != field.id;
        if self.schema.fields.iter().filter(rivals).any(|other| other.name == field.name) {
            return invalid("name", "A Custom Field with this name already exists.");
        }
        Ok(())
    }

    /// Makes the values of a custom field what the field, now changed or deleted, takes.
    fn revise_values(&mut self, field_id: &str, now: Timestamp) {
        let mut holders = Vec::new();
        for record in self.by_id.values_mut() {
            let Some(held) = record.custom.remove(field_id) else { continue };
            let field = self.schema.fields_of(record.kind).find(|field| field.id == field_id);
            if let Some(value) = field.and_then(|field| custom::kept(field, &held, &self.schema)) {
                record.custom.insert(field_id.to_owned(), value);
            }
            holders.push(record.id.clone());
        }
        // The lags are drawn in this order.
        holders.sort_unstable();
        for id in holders {
            self.show(&id, now);
        }
    }

    /// Puts a new record into the book, and a contact into its lead.
    fn make(&mut self, kind: Kind, patch: Patch, now: Timestamp) -> String {
        let id = self.ids.make(match kind {
            Kind::Lead => "lead",
            Kind::Contact => "cont",
        });
        let created = patch.date_created.unwrap_or(now);
        let mut record = Record {
            kind,
            id: id.clone(),
            serial: self.n_made,
            created,
            updated: now,
            plain: self.blank(kind),
            custom: Object::new(),
            lead_id: patch.lead_id,
            contact_ids: Vec::new(),
        };
        self.n_made += 1;
        record.plain.extend(patch.plain);
        patch.custom.apply(&mut record.custom);
        if let Some(lead) = record.lead_id.as_ref().and_then(|lead_id| self.by_id.get_mut(lead_id)) {
            lead.contact_ids.push(id.clone());
        }
        self.by_id.insert(id.clone(), record);
        id
    }

    /// The plain fields of a record nothing was said about (close-api.md §4 and §5).
    fn blank(&self, kind: Kind) -> Object {
        let mut blank = Object::new();
        let mut put = |fields: &[&str], value: Value| {
            blank.extend(fields.iter().map(|field| ((*field).to_owned(), value.clone())));
        };
        match kind {
            Kind::Lead => {
                put(&["name", "url"], Value::Null);
                put(&["description"], json!(""));
                put(&["addresses"], json!([]));
                put(&["status_id"], json!(self.schema.statuses.first().map(|status| &status.id)));
            }
            Kind::Contact => {
                put(&["name", "timezone"], Value::Null);
                put(&["title"], json!(""));
                put(&["emails", "phones", "urls"], json!([]));
            }
        }
        blank
    }

    fn move_contact(&mut self, id: &str, to: &str, now: Timestamp) {
        let Some(contact) = self.by_id.get_mut(id) else { return };
        let from = contact.lead_id.replace(to.to_owned());
        if from.as_deref() == Some(to) {
            return;
        }
        if let Some(lead) = from.as_ref().and_then(|from| self.by_id.get_mut(from)) {
            lead.contact_ids.retain(|contact| contact != id);
        }
        if let Some(lead) = self.by_id.get_mut(to) {
            lead.contact_ids.push(id.to_owned());
        }
        for lead in from.iter().map(String::as_str).chain([to]) {
            self.show(lead, now);
        }
    }

    fn remove(&mut self, id: &str, request: &str, now: Timestamp) {
        let Some(record) = self.by_id.remove(id) else { return };
        let lead_id = match record.kind {
            Kind::Lead => Some(id.to_owned()),
            Kind::Contact => record.lead_id.clone(),
        };
        if let Some(lead) = record.lead_id.as_ref().and_then(|lead_id| self.by_id.get_mut(lead_id)) {
            lead.contact_ids.retain(|contact| contact != id);
            let lead_id = lead.id.clone();
            self.show(&lead_id, now);
        }
        self.show(id, now);
        let previous = self.flat(&record);
        let rest = json!({"changed_fields": [], "previous_data": previous, "data": {}, "meta": {}});
        self.log(record.kind, id, lead_id, "deleted", rest, request, now);
    }

    /// Tells index and event log of a record that was made or changed.
    fn publish(
        &mut self,
        id: &str,
        action: &'static str,
        before: Option<&Value>,
        request: &str,
        now: Timestamp,
    ) {
        self.show(id, now);
        let Some(record) = self.by_id.get(id) else { return };
        let data = self.flat(record);
        let kind = record.kind;
        let lead_id = match kind {
            Kind::Lead => Some(id.to_owned()),
            Kind::Contact => record.lead_id.clone(),
        };
        let (previous, changed) = before.map(|before| difference(before, &data)).unwrap_or_default();
        if before.is_some() && changed.is_empty() {
            return;
        }
        let rest = json!({"changed_fields": changed, "previous_data": previous, "data": data, "meta": {}});
        self.log(kind, id, lead_id, action, rest, request, now);
    }

    fn publish_lead_of(&mut self, contact: &str, now: Timestamp) {
        if let Some(lead_id) = self.by_id.get(contact).and_then(|record| record.lead_id.clone()) {
            self.show(&lead_id, now);
        }
    }

    /// Writes a record, or its absence, to the index.
    fn show(&mut self, id: &str, now: Timestamp) {
        let lag = self.search_lag.draw(self.ids.share());
        let document = self.by_id.get(id).map(|record| Document {
            kind: record.kind,
            id: id.to_owned(),
            value: Arc::new(self.flat(record)),
        });
        self.index.write(id, document, now.saturating_add(lag).unwrap_or(now));
    }

    #[expect(clippy::too_many_arguments, reason = "an event is that wide")]
    fn log(
        &mut self,
        kind: Kind,
        id: &str,
        lead_id: Option<String>,
        action: &'static str,
        mut rest: Value,
        request: &str,
        now: Timestamp,
    ) {
        rest["request_id"] = json!(request);
        rest["user_id"] = json!(self.schema.user.id);
        rest["organization_id"] = json!(self.schema.organization_id);
        rest["oauth_client_id"] = Value::Null;
        let lag = self.event_lag.draw(self.ids.share());
        self.events.push(Event {
            id: self.ids.make("ev"),
            object_type: kind.word(),
            object_id: id.to_owned(),
            lead_id,
            action,
            at: now,
            visible: now.saturating_add(lag).unwrap_or(now),
            rest,
        });
    }

    /// A record as the API tells it, but for a lead's contacts.
    fn flat(&self, record: &Record) -> Value {
        let mut value = record.plain.clone();
        let mut put = |key: &str, field: Value| drop(value.insert(key.to_owned(), field));
        put("id", json!(record.id));
        put("organization_id", json!(self.schema.organization_id));
        put("created_by", json!(self.schema.user.id));
        put("updated_by", json!(self.schema.user.id));
        put("created_by_name", json!(self.schema.user.name()));
        put("updated_by_name", json!(self.schema.user.name()));
        put("date_created", json!(iso(record.created)));
        put("date_updated", json!(iso(record.updated)));
        put("integration_links", json!([]));
        put("display_name", json!(display_name(record)));
        for (id, held) in &record.custom {
            put(&format!("custom.{id}"), held.clone());
        }
        match record.kind {
            Kind::Contact => put("lead_id", json!(record.lead_id)),
            Kind::Lead => {
                let status = record.plain.get("status_id").and_then(Value::as_str).unwrap_or_default();
                put("status_label", json!(self.schema.status_label(status)));
                put("html_url", json!(format!("https://app.close.com/lead/{}/", record.id)));
                put("contact_ids", json!(record.contact_ids));
                put("tasks", json!([]));
                put("opportunities", json!([]));
                let named = record.custom.iter().filter_map(|(id, held)| {
                    Some((self.schema.field(Kind::Lead, id)?.name.clone(), held.clone()))
                });
                put("custom", Value::Object(named.collect()));
            }
        }
        Value::Object(value)
    }
}

fn display_name(record: &Record) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let first = |list: &str, key: &str| text(record.plain.get(list).and_then(|list| list[0].get(key)));
    text(record.plain.get("name"))
        .or_else(|| first("emails", "email"))
        .or_else(|| first("phones", "phone_formatted"))
        .unwrap_or_else(|| "Untitled".into())
}

/// The old values of the fields that changed, and their names.
fn difference(before: &Value, after: &Value) -> (Object, Vec<String>) {
    let (Some(old), Some(new)) = (before.as_object(), after.as_object()) else { return Default::default() };
    let telling = |key: &&String| !["date_updated", "contacts", "custom"].contains(&key.as_str());
    let mut changed: Vec<String> = old
        .keys()
        .chain(new.keys())
        .filter(telling)
        .filter(|key| old.get(*key) != new.get(*key))
        .cloned()
        .collect();
    changed.sort();
    changed.dedup();
    let value = |key: &String| (key.clone(), old.get(key).cloned().unwrap_or_default());
    (changed.iter().map(value).collect(), changed)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn book() -> Records {
        Records::new(&Settings::fast(), Ids::new(Uuid::nil()), at(0))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn map(value: Value) -> Object {
        serde_json::from_value(value).unwrap()
    }

    fn lead(book: &mut Records, body: Value) -> String {
        let lead = book.create_lead(&map(body), at(1)).unwrap();
        lead["id"].as_str().unwrap().to_owned()
    }

    fn contact(book: &mut Records, body: Value) -> Value {
        book.create_contact(&map(body), at(2)).unwrap()
    }

    /// All events, newest first, as `object_type.action`.
    fn events(book: &Records) -> Vec<String> {
        let page = book.events.page(&[], at(1000)).unwrap();
        let word = |event: &Value, key: &str| event[key].as_str().unwrap().to_owned();
        let events = page["data"].as_array().unwrap().iter();
        events.map(|event| format!("{}.{}", word(event, "object_type"), word(event, "action"))).collect()
    }

    fn contact_ids(book: &Records, lead: &str) -> Value {
        book.get(Kind::Lead, lead).unwrap()["contact_ids"].clone()
    }

    #[test]
    fn a_contact_without_lead_gets_one_of_its_name() {
        let mut book = book();
        let jane = contact(&mut book, json!({"name": "Jane"}));
        let lead = book.get(Kind::Lead, jane["lead_id"].as_str().unwrap()).unwrap();
        assert_eq!((&lead["name"], &lead["contacts"][0]), (&json!("Jane"), &jane));
        assert_eq!(events(&book), ["contact.created", "lead.created"]);
    }

    #[test]
    fn a_bad_nested_contact_prevents_the_lead() {
        let mut book = book();
        let body = map(json!({"contacts": [{"emails": [{"email": "no"}]}]}));
        assert!(book.create_lead(&body, at(1)).is_err());
        assert!(book.all(Kind::Lead).is_empty() && events(&book).is_empty());
    }

    #[test]
    fn a_contact_moves_between_leads() {
        let mut book = book();
        let (a, b) = (lead(&mut book, json!({"name": "a"})), lead(&mut book, json!({"name": "b"})));
        let jane = contact(&mut book, json!({"lead_id": a}))["id"].as_str().unwrap().to_owned();
        let moved = book.update(Kind::Contact, &jane, &map(json!({"lead_id": b})), at(3)).unwrap();
        assert_eq!(moved["lead_id"], json!(b));
        assert_eq!((contact_ids(&book, &a), contact_ids(&book, &b)), (json!([]), json!([jane])));
        for wrong in [json!("lead_x"), json!(null)] {
            assert!(book.update(Kind::Contact, &jane, &map(json!({"lead_id": wrong})), at(4)).is_err());
        }
    }

    #[test]
    fn arrays_are_replaced_whole_and_the_rest_stays() {
        let mut book = book();
        let body = json!({"name": "Jane", "emails": [{"email": "a@b.test"}], "urls": [{"url": "a.test"}]});
        let id = contact(&mut book, body)["id"].as_str().unwrap().to_owned();
        let changed = map(json!({"emails": [{"email": "c@d.test", "type": "home"}]}));
        let jane = book.update(Kind::Contact, &id, &changed, at(9)).unwrap();
        let home = json!([{"email": "c@d.test", "type": "home", "is_unsubscribed": false}]);
        assert_eq!(jane["emails"], home);
        assert_eq!((&jane["name"], jane["urls"].as_array().unwrap().len()), (&json!("Jane"), 1));
        assert_eq!(jane["date_updated"], "1970-01-01T00:00:09.000000+00:00");
        let event = &book.events.page(&[], at(1000)).unwrap()["data"][0];
        assert_eq!(event["changed_fields"], json!(["emails"]));
        assert_eq!(event["previous_data"]["emails"][0]["email"], "a@b.test");
    }

    #[test]
    fn contacts_in_a_put_of_a_lead_are_added() {
        let mut book = book();
        let id = lead(&mut book, json!({"contacts": [{"name": "Jane"}]}));
        let body = map(json!({"contacts": [{"name": "Jane"}]}));
        let updated = book.update(Kind::Lead, &id, &body, at(2)).unwrap();
        assert_eq!(updated["contacts"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_merge_moves_contacts_and_loses_the_sources_fields() {
        let mut book = book();
        let source = lead(&mut book, json!({"custom.cf_leadcompanyid": "s", "contacts": [{"name": "Jane"}]}));
        let destination = lead(&mut book, json!({"name": "d", "contacts": [{"name": "Joe"}]}));
        let jane = contact_ids(&book, &source)[0].clone();
        book.merge(&source, &destination, at(3)).unwrap();
        assert_eq!(book.get(Kind::Lead, &source), Err(Refusal::Missing("Lead")));
        let merged = book.get(Kind::Lead, &destination).unwrap();
        assert_eq!(merged["contact_ids"][1], jane);
        assert_eq!(merged.get("custom.cf_leadcompanyid"), None);
        let jane = book.get(Kind::Contact, jane.as_str().unwrap()).unwrap();
        assert_eq!(jane["lead_id"], json!(destination));
        assert_eq!(events(&book)[..2], ["lead.merged", "lead.deleted"]);
        assert_eq!(book.merge(&destination, &source, at(4)), Err(Refusal::NoMergeSource));
        assert!(book.merge(&destination, &destination, at(4)).is_err());
    }

    #[test]
    fn deleting_a_lead_deletes_its_contacts() {
        let mut book = book();
        let id = lead(&mut book, json!({"contacts": [{"name": "Jane"}, {"name": "Joe"}]}));
        book.delete(Kind::Lead, &id, at(2)).unwrap();
        assert!(book.all(Kind::Contact).is_empty());
        assert_eq!(events(&book)[..3], ["lead.deleted", "contact.deleted", "contact.deleted"]);
        assert_eq!(book.delete(Kind::Lead, &id, at(3)), Err(Refusal::Missing("Lead")));
    }

    #[test]
    fn importers_may_say_when_a_record_was_made() {
        let mut book = book();
        let new = lead(&mut book, json!({}));
        let old = lead(&mut book, json!({"date_created": "1969-01-01"}));
        let ids: Vec<Value> = book.all(Kind::Lead).iter().map(|lead| lead["id"].clone()).collect();
        assert_eq!(ids, [old, new], "oldest first");
    }

    #[test]
    fn a_changed_field_keeps_the_values_it_takes() {
        let field = |kind, owner| CustomField::new("cf_x", "X", kind, owner);
        let text = field(FieldKind::Text, Owner::Lead);
        let letter = field(FieldKind::Choices, Owner::Lead).choices(["a", "b", "c"]);
        let letters = letter.clone().multiple();
        for (before, held, after, kept) in [
            (&text, json!("x"), CustomField { name: "Y".into(), ..text.clone() }, json!("x")),
            (&text, json!("x"), field(FieldKind::Number, Owner::Lead), json!(null)),
            (&text, json!("2026-01-31"), field(FieldKind::Date, Owner::Lead), json!("2026-01-31")),
            (&text, json!("Ada Account"), field(FieldKind::User, Owner::Lead), json!("user_adaaccount")),
            (&text, json!("x"), field(FieldKind::Text, Owner::Shared), json!("x")),
            (&text, json!("x"), field(FieldKind::Text, Owner::Contact), json!(null)),
            (&letter, json!("c"), letter.clone().choices(["a", "b"]), json!(null)),
            (&letter, json!("a"), letters.clone(), json!(["a"])),
            (&letters, json!(["a", "b", "c"]), letters.clone().choices(["c", "b"]), json!(["b", "c"])),
            (&letters, json!(["b", "c"]), letters.clone().choices(["a"]), json!(null)),
            (&letters, json!(["b", "c"]), letter.clone(), json!("b")),
        ] {
            let settings = Settings { custom_fields: vec![before.clone()], ..Settings::fast() };
            let mut book = Records::new(&settings, Ids::new(Uuid::nil()), at(0));
            let id = lead(&mut book, json!({"custom.cf_x": held}));
            book.change_field(after.clone(), at(2)).unwrap();
            let lead = book.get(Kind::Lead, &id).unwrap();
            assert_eq!(lead["custom.cf_x"], kept, "{held} of {before:?} in {after:?}");
            book.index.catch_up(at(2));
            assert_eq!(book.index.get(&id).unwrap().value["custom.cf_x"], kept);
        }
    }

    #[test]
    fn a_deleted_field_takes_its_values_along() {
        let mut book = book();
        let id = lead(&mut book, json!({"custom.cf_leadseats": 5, "custom.cf_leadplan": "pro"}));
        assert!(book.remove_field("cf_leadseats", at(2)));
        assert!(!book.remove_field("cf_leadseats", at(2)));
        let lead = book.get(Kind::Lead, &id).unwrap();
        assert_eq!((lead.get("custom.cf_leadseats"), &lead["custom"]), (None, &json!({"Plan": "pro"})));
        assert_eq!(lead["date_updated"], lead["date_created"], "it is no change of the lead");
        let seats = map(json!({"custom.cf_leadseats": 6}));
        assert!(book.update(Kind::Lead, &id, &seats, at(3)).is_err());
        book.add_field(CustomField::new("cf_leadseats", "Seats", FieldKind::Number, Owner::Lead)).unwrap();
        let lead = book.get(Kind::Lead, &id).unwrap();
        assert_eq!(lead.get("custom.cf_leadseats"), None, "the new field starts empty");
    }

    #[test]
    fn fields_that_make_no_sense_are_refused() {
        let new = |id: &str, name: &str, kind| CustomField::new(id, name, kind, Owner::Lead);
        let wrong = |key: &str, text: &str| Err(Refusal::Invalid(FieldErrors::one(key, text)));
        for (field, refused) in [
            (
                new("cf_leadseats", "X", FieldKind::Text).multiple(),
                wrong("accepts_multiple_values", NOT_A_CHOICE),
            ),
            (new("cf_leadseats", "X", FieldKind::Choices), wrong("choices", REQUIRED)),
            (
                new("cf_leadseats", "Plan", FieldKind::Number),
                wrong("name", "A Custom Field with this name already exists."),
            ),
        ] {
            assert_eq!(book().add_field(field.clone()), refused, "{field:?}");
            assert_eq!(book().change_field(field, at(1)), refused);
        }
        let known = new("cf_leadplan", "Plan", FieldKind::Text);
        assert_eq!(
            book().add_field(known.clone()),
            wrong("id", "A Custom Field with this id already exists.")
        );
        assert_eq!(book().change_field(known, at(1)), Ok(()));
        let unknown = CustomField { owner: Owner::Contact, ..new("cf_x", "Plan", FieldKind::Text) };
        assert_eq!(book().add_field(unknown.clone()), Ok(()), "another owner may use the name");
        assert_eq!(book().change_field(unknown, at(1)), Err(Refusal::Missing("CustomField")));
    }
}
