//! The leads and contacts, and the operations on them. Pure state: the caller passes the time, and random
//! numbers come from a seed.
//!
//! This is the current state. The search index and the event log receive every change and show it later.

mod custom_fields;
mod past;

use std::{collections::HashMap, mem, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::behaviour::Lag;
use crate::events::{Event, EventLog};
use crate::ids::{Ids, format_timestamp};
use crate::index::{Document, Index};
use crate::readback;
use crate::refusal::{FieldErrors, Object, REQUIRED, Refusal};
use crate::schema::{Kind, Schema};
use crate::settings::Settings;
use crate::validate::{self, Patch};

use past::Past;

/// Nested contacts are created this long after their lead, all at the same time (close-api.md §4).
const CONTACT_DELAY: SignedDuration = SignedDuration::from_millis(5);

/// A lead or a contact.
#[derive(Debug, Clone)]
struct Record {
    kind: Kind,
    id: String,
    /// The order of creation. Dates alone are ambiguous: several records can have the same one.
    serial: u64,
    created: Timestamp,
    updated: Timestamp,
    plain: Object,
    custom: Object,
    /// Contacts only.
    lead_id: Option<String>,
    /// Leads only, in order.
    contact_ids: Vec<String>,
}

/// The records of the organization, with its schema, search index and event log.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) schema: Schema,
    pub(crate) index: Index,
    pub(crate) events: EventLog,
    ids: Ids,
    by_id: HashMap<String, Record>,
    past: Past,
    next_serial: u64,
}

impl Records {
    pub(crate) fn new(settings: &Settings, mut ids: Ids, now: Timestamp) -> Self {
        Self {
            schema: Schema::new(settings, &mut ids, now),
            index: Index::default(),
            events: EventLog::default(),
            ids,
            by_id: HashMap::new(),
            past: Past::default(),
            next_serial: 0,
        }
    }

    /// Creates a lead with its nested contacts, or nothing if any of them is invalid.
    pub(crate) fn create_lead(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let body = &self.kept(body);
        let mut patch = validate::lead(body, &self.schema).map_err(Refusal::Invalid)?;
        let contacts = mem::take(&mut patch.contacts);
        let request = self.ids.make("req");
        let id = self.insert(Kind::Lead, patch, now);
        let contacts: Vec<String> = contacts
            .into_iter()
            .map(|contact| {
                self.insert(
                    Kind::Contact,
                    Patch { lead_id: Some(id.clone()), ..contact },
                    now + CONTACT_DELAY,
                )
            })
            .collect();
        self.record_change(&id, "created", None, &request, now);
        for contact in contacts {
            self.record_change(&contact, "created", None, &request, now);
        }
        self.get(Kind::Lead, &id)
    }

    /// Creates a contact. Without a lead, it gets a new lead, which has no name (close-api.md §15 row 18).
    pub(crate) fn create_contact(&mut self, body: &Object, now: Timestamp) -> Result<Value, Refusal> {
        let body = &self.kept(body);
        let mut patch = self.validate_contact(body)?;
        let request = self.ids.make("req");
        if patch.lead_id.is_none() {
            let lead_id = self.insert(Kind::Lead, Patch::default(), now);
            self.record_change(&lead_id, "created", None, &request, now);
            patch.lead_id = Some(lead_id);
        }
        let id = self.insert(Kind::Contact, patch, now);
        self.record_change(&id, "created", None, &request, now);
        self.reindex_lead_of(&id, now);
        self.get(Kind::Contact, &id)
    }

    /// Updates a record.
    pub(crate) fn update(
        &mut self,
        kind: Kind,
        id: &str,
        body: &Object,
        now: Timestamp,
    ) -> Result<Value, Refusal> {
        let before = self.get(kind, id)?;
        let body = &self.kept(body);
        let mut patch = match kind {
            Kind::Lead => validate::lead(body, &self.schema).map_err(Refusal::Invalid)?,
            Kind::Contact => {
                if body.get("lead_id").is_some_and(Value::is_null) {
                    return Err(Refusal::Invalid(FieldErrors::one("lead", REQUIRED)));
                }
                self.validate_contact(body)?
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
            // The date of a new Contact is a moment ahead.
            record.updated = now.max(record.updated);
        }
        for contact in contacts {
            let patch = Patch { lead_id: Some(id.to_owned()), ..contact };
            let contact = self.insert(Kind::Contact, patch, now + CONTACT_DELAY);
            self.record_change(&contact, "created", None, &request, now);
        }
        self.record_change(id, "updated", Some(&before), &request, now);
        self.get(kind, id)
    }

    /// Deletes a record. Deleting a lead deletes its contacts (close-api.md §4).
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

    /// Moves the contacts of the source to the destination and deletes the source. The destination keeps its
    /// own fields, so an id that only the source had is lost (close-api.md §9).
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
            self.reindex(contact, now);
        }
        self.remove(source, &request, now);
        self.reindex(destination, now);
        let meta = json!({"merge_source_lead_id": source, "merge_destination_lead_id": destination});
        let details = json!({"meta": meta, "changed_fields": [], "previous_data": {}, "data": null});
        self.log_event(
            Kind::Lead,
            destination,
            Some(destination.to_owned()),
            "merged",
            details,
            &request,
            now,
        );
        Ok(())
    }

    /// A record with all its fields; a lead with its contacts.
    pub(crate) fn get(&self, kind: Kind, id: &str) -> Result<Value, Refusal> {
        let record = self.find(kind, id)?;
        let mut value = self.to_json(record);
        if kind == Kind::Lead {
            let contacts = record.contact_ids.iter().filter_map(|id| self.by_id.get(id));
            value["contacts"] = contacts.map(|contact| self.to_json(contact)).collect();
        }
        Ok(value)
    }

    /// A record as a read by id shows it: as it was a while ago, if such reads lag (close-api.md §15 row 2).
    pub(crate) fn read(&mut self, kind: Kind, id: &str, now: Timestamp) -> Result<Value, Refusal> {
        let lag = self.schema.behaviour.read_lag.draw(self.ids.fraction());
        if lag.is_zero() {
            return self.get(kind, id);
        }
        let then = now.saturating_sub(lag).unwrap_or(Timestamp::MIN);
        let is_kind = |state: &Arc<Value>| state.get("contact_ids").is_some() == (kind == Kind::Lead);
        let state = self.past.at(id, then).filter(is_kind).ok_or(Refusal::Missing(kind.title()))?;
        let mut state = (*state).clone();
        if kind == Kind::Lead {
            let ids = state["contact_ids"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let contacts: Vec<Value> =
                ids.filter_map(|id| self.past.at(id, then)).map(|contact| (*contact).clone()).collect();
            state["contacts"] = contacts.into();
        }
        Ok(state)
    }

    /// The kind of the record with this id, if it exists.
    pub(crate) fn kind_of(&self, id: &str) -> Option<Kind> {
        self.by_id.get(id).map(|record| record.kind)
    }

    /// All records of a kind with all their fields, oldest first.
    pub(crate) fn all(&self, kind: Kind) -> Vec<Value> {
        let mut records: Vec<&Record> = self.by_id.values().filter(|record| record.kind == kind).collect();
        records.sort_by_key(|record| (record.created, record.serial));
        records.into_iter().filter_map(|record| self.get(kind, &record.id).ok()).collect()
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.by_id.values().filter(|record| record.kind == kind).count()
    }

    /// A new, unused token for a search cursor.
    pub(crate) fn token(&mut self) -> String {
        self.ids.make("cursor")
    }

    fn find(&self, kind: Kind, id: &str) -> Result<&Record, Refusal> {
        self.by_id.get(id).filter(|record| record.kind == kind).ok_or(Refusal::Missing(kind.title()))
    }

    fn kept(&self, body: &Object) -> Object {
        readback::kept(body, &self.schema.behaviour.lossy_fields)
    }

    fn validate_contact(&self, body: &Object) -> Result<Patch, Refusal> {
        let exists = |id: &str| self.find(Kind::Lead, id).is_ok();
        validate::contact(body, &self.schema, exists).map_err(Refusal::Invalid)
    }

    /// Inserts a new record. A contact is also added to its lead.
    fn insert(&mut self, kind: Kind, patch: Patch, now: Timestamp) -> String {
        let id = self.ids.make(match kind {
            Kind::Lead => "lead",
            Kind::Contact => "cont",
        });
        let created = patch.date_created.unwrap_or(now);
        let mut record = Record {
            kind,
            id: id.clone(),
            serial: self.next_serial,
            created,
            updated: now,
            plain: self.default_fields(kind),
            custom: Object::new(),
            lead_id: patch.lead_id,
            contact_ids: Vec::new(),
        };
        self.next_serial += 1;
        record.plain.extend(patch.plain);
        patch.custom.apply(&mut record.custom);
        if let Some(lead) = record.lead_id.as_ref().and_then(|lead_id| self.by_id.get_mut(lead_id)) {
            lead.contact_ids.push(id.clone());
        }
        self.by_id.insert(id.clone(), record);
        id
    }

    /// The regular fields of a new record before the request body applies (close-api.md §4 and §5).
    fn default_fields(&self, kind: Kind) -> Object {
        let mut blank = Object::new();
        let mut set = |fields: &[&str], value: Value| {
            blank.extend(fields.iter().map(|field| ((*field).to_owned(), value.clone())));
        };
        match kind {
            Kind::Lead => {
                set(&["name", "url"], Value::Null);
                set(&["description"], json!(""));
                set(&["addresses"], json!([]));
                set(&["status_id"], json!(self.schema.statuses.first().map(|status| &status.id)));
            }
            Kind::Contact => {
                set(&["name", "timezone"], Value::Null);
                set(&["title"], json!(""));
                set(&["emails", "phones", "urls"], json!([]));
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
            self.reindex(lead, now);
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
            self.reindex(&lead_id, now);
        }
        self.reindex(id, now);
        let previous = self.to_json(&record);
        let details = json!({"changed_fields": [], "previous_data": previous, "data": null, "meta": {}});
        self.log_event(record.kind, id, lead_id, "deleted", details, request, now);
    }

    /// Writes a created or changed record to the search index and the event log.
    fn record_change(
        &mut self,
        id: &str,
        action: &'static str,
        before: Option<&Value>,
        request: &str,
        now: Timestamp,
    ) {
        self.reindex(id, now);
        let Some(record) = self.by_id.get(id) else { return };
        let data = self.to_json(record);
        let kind = record.kind;
        let lead_id = match kind {
            Kind::Lead => Some(id.to_owned()),
            Kind::Contact => record.lead_id.clone(),
        };
        let (previous, changed) = before.map(|before| difference(before, &data)).unwrap_or_default();
        if before.is_some() && changed.is_empty() {
            return;
        }
        let details = json!({"changed_fields": changed, "previous_data": previous, "data": data, "meta": {}});
        self.log_event(kind, id, lead_id, action, details, request, now);
    }

    fn reindex_lead_of(&mut self, contact: &str, now: Timestamp) {
        if let Some(lead_id) = self.by_id.get(contact).and_then(|record| record.lead_id.clone()) {
            self.reindex(&lead_id, now);
        }
    }

    /// Writes the current state of a record, or its deletion, to the search index.
    fn reindex(&mut self, id: &str, now: Timestamp) {
        let fraction = self.ids.fraction();
        let behaviour = &self.schema.behaviour;
        let general = behaviour.search_lag;
        let lag = |kind: Option<Lag>| kind.unwrap_or(general).draw(fraction);
        let document = self.by_id.get(id).map(|record| Document {
            kind: record.kind,
            id: id.to_owned(),
            value: Arc::new(self.to_json(record)),
        });
        self.past.keep(
            id,
            document.as_ref().map(|document| document.value.clone()),
            now,
            behaviour.read_lag.longest(),
        );
        let visible = |lag: Duration| now.saturating_add(lag).unwrap_or(now);
        match document {
            Some(document) if self.index.is_known(id) => {
                self.index.change(
                    document,
                    visible(lag(None)),
                    visible(lag(behaviour.custom_field_search_lag)),
                );
            }
            Some(document) => self.index.create(document, visible(lag(behaviour.creation_search_lag))),
            None => self.index.delete(id, visible(lag(None))),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an event has that many properties")]
    fn log_event(
        &mut self,
        kind: Kind,
        id: &str,
        lead_id: Option<String>,
        action: &'static str,
        mut details: Value,
        request: &str,
        now: Timestamp,
    ) {
        details["request_id"] = json!(request);
        details["user_id"] = json!(self.schema.user.id);
        details["organization_id"] = json!(self.schema.organization_id);
        details["oauth_client_id"] = Value::Null;
        let lag = self.schema.behaviour.event_lag.draw(self.ids.fraction());
        self.events.push(Event {
            id: self.ids.make("ev"),
            object_type: kind.word(),
            object_id: id.to_owned(),
            lead_id,
            action,
            created: now,
            updated: now,
            visible: now.saturating_add(lag).unwrap_or(now),
            details,
        });
    }

    /// A record as the API returns it, without the contacts of a lead.
    fn to_json(&self, record: &Record) -> Value {
        let mut value = record.plain.clone();
        let mut set = |key: &str, field: Value| drop(value.insert(key.to_owned(), field));
        set("id", json!(record.id));
        set("organization_id", json!(self.schema.organization_id));
        set("created_by", json!(self.schema.user.id));
        set("updated_by", json!(self.schema.user.id));
        set("date_created", json!(format_timestamp(record.created)));
        set("date_updated", json!(format_timestamp(record.updated)));
        set("integration_links", json!([]));
        set("display_name", json!(display_name(record)));
        for (id, value) in &record.custom {
            set(&format!("custom.{id}"), value.clone());
        }
        match record.kind {
            Kind::Contact => set("lead_id", json!(record.lead_id)),
            Kind::Lead => {
                set("created_by_name", json!(self.schema.user.name()));
                set("updated_by_name", json!(self.schema.user.name()));
                let status = record.plain.get("status_id").and_then(Value::as_str).unwrap_or_default();
                set("status_label", json!(self.schema.status_label(status)));
                set("html_url", json!(format!("https://app.close.com/lead/{}/", record.id)));
                set("contact_ids", json!(record.contact_ids));
                set("tasks", json!([]));
                set("opportunities", json!([]));
                let named = record.custom.iter().filter_map(|(id, value)| {
                    Some((self.schema.field(Kind::Lead, id)?.name.clone(), value.clone()))
                });
                set("custom", Value::Object(named.collect()));
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

/// The old values and the names of the fields that changed.
fn difference(before: &Value, after: &Value) -> (Object, Vec<String>) {
    let (Some(old), Some(new)) = (before.as_object(), after.as_object()) else { return Default::default() };
    let counts = |key: &&String| !["date_updated", "contacts", "custom"].contains(&key.as_str());
    let mut changed: Vec<String> = old
        .keys()
        .chain(new.keys())
        .filter(counts)
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
    use crate::behaviour::EventData;

    pub(super) fn records() -> Records {
        Records::new(&Settings::fast(), Ids::new(Uuid::nil()), at(0))
    }

    pub(super) fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    pub(super) fn map(value: Value) -> Object {
        serde_json::from_value(value).unwrap()
    }

    pub(super) fn lead(records: &mut Records, body: Value) -> String {
        let lead = records.create_lead(&map(body), at(1)).unwrap();
        lead["id"].as_str().unwrap().to_owned()
    }

    fn contact(records: &mut Records, body: Value) -> Value {
        records.create_contact(&map(body), at(2)).unwrap()
    }

    /// All events, newest first, as `object_type.action`.
    fn events(records: &Records) -> Vec<String> {
        let page = records.events.page(&[], EventData::Kept, at(1000)).unwrap();
        let word = |event: &Value, key: &str| event[key].as_str().unwrap().to_owned();
        let events = page["data"].as_array().unwrap().iter();
        events.map(|event| format!("{}.{}", word(event, "object_type"), word(event, "action"))).collect()
    }

    fn contact_ids(records: &Records, lead: &str) -> Value {
        records.get(Kind::Lead, lead).unwrap()["contact_ids"].clone()
    }

    #[test]
    fn a_contact_without_lead_gets_one_without_a_name() {
        let mut records = records();
        let jane = contact(&mut records, json!({"name": "Jane"}));
        let lead = records.get(Kind::Lead, jane["lead_id"].as_str().unwrap()).unwrap();
        assert_eq!((&lead["name"], &lead["contacts"][0]), (&json!(null), &jane));
        assert_eq!(events(&records), ["contact.created", "lead.created"]);
    }

    #[test]
    fn a_bad_nested_contact_prevents_the_lead() {
        let mut records = records();
        let body = map(json!({"contacts": [{"emails": [{"email": "no"}]}]}));
        assert!(records.create_lead(&body, at(1)).is_err());
        assert!(records.all(Kind::Lead).is_empty() && events(&records).is_empty());
    }

    #[test]
    fn a_contact_moves_between_leads() {
        let mut records = records();
        let (a, b) = (lead(&mut records, json!({"name": "a"})), lead(&mut records, json!({"name": "b"})));
        let jane = contact(&mut records, json!({"lead_id": a}))["id"].as_str().unwrap().to_owned();
        let moved = records.update(Kind::Contact, &jane, &map(json!({"lead_id": b})), at(3)).unwrap();
        assert_eq!(moved["lead_id"], json!(b));
        assert_eq!((contact_ids(&records, &a), contact_ids(&records, &b)), (json!([]), json!([jane])));
        for wrong in [json!("lead_x"), json!(null)] {
            assert!(records.update(Kind::Contact, &jane, &map(json!({"lead_id": wrong})), at(4)).is_err());
        }
    }

    #[test]
    fn arrays_are_replaced_whole_and_the_rest_stays() {
        let mut records = records();
        let body = json!({"name": "Jane", "emails": [{"email": "a@b.test"}], "urls": [{"url": "a.test"}]});
        let id = contact(&mut records, body)["id"].as_str().unwrap().to_owned();
        let changed = map(json!({"emails": [{"email": "c@d.test", "type": "home"}]}));
        let jane = records.update(Kind::Contact, &id, &changed, at(9)).unwrap();
        let home = json!([{"email": "c@d.test", "type": "home", "is_unsubscribed": false}]);
        assert_eq!(jane["emails"], home);
        assert_eq!((&jane["name"], jane["urls"].as_array().unwrap().len()), (&json!("Jane"), 1));
        assert_eq!(jane["date_updated"], "1970-01-01T00:00:09.000000+00:00");
        let event = &records.events.page(&[], EventData::Kept, at(1000)).unwrap()["data"][0];
        assert_eq!(event["changed_fields"], json!(["emails"]));
        assert_eq!(event["previous_data"]["emails"][0]["email"], "a@b.test");
    }

    #[test]
    fn no_change_is_dated_before_the_creation() {
        let mut records = records();
        let id = lead(&mut records, json!({"contacts": [{"name": "Jane"}]}));
        let jane = contact_ids(&records, &id)[0].as_str().unwrap().to_owned();
        let now = records.get(Kind::Lead, &id).unwrap()["date_created"].as_str().unwrap().parse().unwrap();
        let joe = records.update(Kind::Contact, &jane, &map(json!({"name": "Joe"})), now).unwrap();
        assert_eq!((&joe["name"], &joe["date_updated"]), (&json!("Joe"), &joe["date_created"]));
    }

    #[test]
    fn contacts_in_a_put_of_a_lead_are_added() {
        let mut records = records();
        let id = lead(&mut records, json!({"contacts": [{"name": "Jane"}]}));
        let body = map(json!({"contacts": [{"name": "Jane"}]}));
        let updated = records.update(Kind::Lead, &id, &body, at(2)).unwrap();
        assert_eq!(updated["contacts"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_merge_moves_contacts_and_loses_the_sources_fields() {
        let mut records = records();
        let source =
            lead(&mut records, json!({"custom.cf_leadcompanyid": "s", "contacts": [{"name": "Jane"}]}));
        let destination = lead(&mut records, json!({"name": "d", "contacts": [{"name": "Joe"}]}));
        let jane = contact_ids(&records, &source)[0].clone();
        records.merge(&source, &destination, at(3)).unwrap();
        assert_eq!(records.get(Kind::Lead, &source), Err(Refusal::Missing("Lead")));
        let merged = records.get(Kind::Lead, &destination).unwrap();
        assert_eq!(merged["contact_ids"][1], jane);
        assert_eq!(merged.get("custom.cf_leadcompanyid"), None);
        let jane = records.get(Kind::Contact, jane.as_str().unwrap()).unwrap();
        assert_eq!(jane["lead_id"], json!(destination));
        assert_eq!(events(&records)[..2], ["lead.merged", "lead.deleted"]);
        assert_eq!(records.merge(&destination, &source, at(4)), Err(Refusal::NoMergeSource));
        assert!(records.merge(&destination, &destination, at(4)).is_err());
    }

    #[test]
    fn deleting_a_lead_deletes_its_contacts() {
        let mut records = records();
        let id = lead(&mut records, json!({"contacts": [{"name": "Jane"}, {"name": "Joe"}]}));
        records.delete(Kind::Lead, &id, at(2)).unwrap();
        assert!(records.all(Kind::Contact).is_empty());
        assert_eq!(events(&records)[..3], ["lead.deleted", "contact.deleted", "contact.deleted"]);
        assert_eq!(records.delete(Kind::Lead, &id, at(3)), Err(Refusal::Missing("Lead")));
    }

    #[test]
    fn importers_may_say_when_a_record_was_made() {
        let mut records = records();
        let new = lead(&mut records, json!({}));
        let old = lead(&mut records, json!({"date_created": "1969-01-01"}));
        let ids: Vec<Value> = records.all(Kind::Lead).iter().map(|lead| lead["id"].clone()).collect();
        assert_eq!(ids, [old, new], "oldest first");
    }
}
