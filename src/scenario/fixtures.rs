//! Creates the records of a scenario in the simulated Close.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use strum::VariantArray;

use crate::domain::record::Channel;
use crate::scenario::render;
use close_sync_simulator::{CustomField, Lag, Owner, Simulator};

/// A Lead, with its custom fields by name.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct LeadFixture {
    name: Option<String>,
    description: Option<String>,
    /// By label.
    status: Option<String>,
    /// When the Lead was created. Without it, records are created one second apart, in the order of the file.
    created: Option<String>,
    #[serde(default)]
    contacts: Vec<ContactFixture>,
    /// Deleted a moment ago: search still shows the record.
    #[serde(default)]
    deleted: bool,
    /// Merged a moment ago into the Lead with this name: search still shows the record.
    merged_into: Option<String>,
    #[serde(flatten)]
    custom: BTreeMap<String, toml::Value>,
}

/// A Contact of a Lead, with its custom fields by name.
#[derive(Clone, Debug, Deserialize)]
struct ContactFixture {
    name: Option<String>,
    title: Option<String>,
    #[serde(default)]
    emails: Vec<String>,
    #[serde(default)]
    phones: Vec<String>,
    #[serde(default)]
    urls: Vec<String>,
    created: Option<String>,
    /// Deleted a moment ago: search still shows the record.
    #[serde(default)]
    deleted: bool,
    #[serde(flatten)]
    custom: BTreeMap<String, toml::Value>,
}

pub(super) struct Fixtures<'a> {
    pub(super) simulator: &'a Simulator,
    pub(super) fields: &'a [CustomField],
}

/// Longer than any scenario takes.
const NOT_YET_IN_SEARCH: Lag = Lag::Fixed(Duration::from_hours(1));

/// The records that were created, and those that are to be merged or deleted.
pub(crate) struct CreatedRecords {
    /// Ids of Leads, each with the id of the Lead to merge it into.
    merged: Vec<(String, String)>,
    deleted: Vec<String>,
    /// By id. A record that was merged or deleted has no name in Close.
    names: BTreeMap<String, String>,
}

impl CreatedRecords {
    /// Merges and deletes records. Search still shows them.
    pub(crate) fn merge_and_delete(&self, simulator: &Simulator) -> Result<(), String> {
        simulator.set_search_lag(NOT_YET_IN_SEARCH);
        for (id, into) in &self.merged {
            simulator.merge(id, into).map_err(|error| error.to_string())?;
        }
        for id in &self.deleted {
            simulator.delete(id);
        }
        simulator.set_search_lag(Lag::NONE);
        Ok(())
    }

    /// The name that a record had at first.
    pub(super) fn name(&self, id: &str) -> Option<&String> {
        self.names.get(id)
    }
}

impl Fixtures<'_> {
    pub(super) fn create(&self, leads: &[LeadFixture]) -> Result<CreatedRecords, String> {
        let mut ids = BTreeMap::new();
        let (mut deleted, mut merged) = (Vec::new(), Vec::new());
        let mut serial = 0;
        for lead in leads {
            let id =
                self.record(Kind::Lead, None, lead.body(), &lead.custom, lead.created.as_ref(), &mut serial)?;
            for contact in &lead.contacts {
                let created = contact.created.as_ref();
                let contact_id = self.record(
                    Kind::Contact,
                    Some(&id),
                    contact.body(),
                    &contact.custom,
                    created,
                    &mut serial,
                )?;
                deleted.extend(contact.deleted.then_some(contact_id));
            }
            deleted.extend(lead.deleted.then(|| id.clone()));
            merged.extend(lead.merged_into.as_deref().map(|into| (id.clone(), into)));
            ids.insert(lead.name.as_deref().unwrap_or_default(), id);
        }
        let resolve = |(id, into): (String, &str)| {
            let into = ids.get(into).ok_or_else(|| format!("merged_into: unknown Lead \"{into}\""))?;
            Ok((id, into.clone()))
        };
        let merged = merged.into_iter().map(resolve).collect::<Result<_, String>>()?;
        Ok(CreatedRecords { merged, deleted, names: render::names(self.simulator) })
    }

    fn record(
        &self,
        kind: Kind,
        lead: Option<&str>,
        mut body: Map<String, Value>,
        custom: &BTreeMap<String, toml::Value>,
        created: Option<&String>,
        serial: &mut usize,
    ) -> Result<String, String> {
        *serial += 1;
        let created = created
            .cloned()
            .unwrap_or_else(|| format!("2026-01-01T00:{:02}:{:02}Z", *serial / 60, *serial % 60));
        body.insert("date_created".into(), created.into());
        body.extend(lead.map(|id| ("lead_id".to_owned(), id.into())));
        for (name, value) in custom {
            let field = self.fields.iter().find(|field| field.name == *name && kind.has(field.owner));
            let field = field.ok_or_else(|| format!("unknown field \"{name}\" of {}", kind.plural()))?;
            let value = serde_json::to_value(value).map_err(|error| error.to_string())?;
            body.insert(format!("custom.{}", field.id), value);
        }
        let body = Value::Object(body);
        let record = match kind {
            Kind::Lead => self.simulator.add_lead(body),
            Kind::Contact => self.simulator.add_contact(body),
        };
        let record = record.map_err(|error| error.to_string())?;
        record["id"].as_str().map(str::to_owned).ok_or_else(|| "a record has no id".to_owned())
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Lead,
    Contact,
}

impl Kind {
    fn has(self, owner: Owner) -> bool {
        match (self, owner) {
            (_, Owner::Shared) | (Self::Lead, Owner::Lead) | (Self::Contact, Owner::Contact) => true,
            (Self::Lead, Owner::Contact) | (Self::Contact, Owner::Lead) => false,
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Lead => "Leads",
            Self::Contact => "Contacts",
        }
    }
}

impl LeadFixture {
    fn body(&self) -> Map<String, Value> {
        texts([("name", &self.name), ("description", &self.description), ("status", &self.status)])
    }
}

impl ContactFixture {
    fn body(&self) -> Map<String, Value> {
        let mut body = texts([("name", &self.name), ("title", &self.title)]);
        for &channel in Channel::VARIANTS {
            let list = match channel {
                Channel::Email => &self.emails,
                Channel::Phone => &self.phones,
                Channel::Url => &self.urls,
            };
            let entry = |value: &String| json!({channel.item(): value, "type": channel.default_kind()});
            body.insert(channel.list().into(), list.iter().map(entry).collect());
        }
        body
    }
}

fn texts<const N: usize>(texts: [(&str, &Option<String>); N]) -> Map<String, Value> {
    let text = |(key, text): (&str, &Option<String>)| Some((key.to_owned(), text.clone()?.into()));
    texts.into_iter().filter_map(text).collect()
}
