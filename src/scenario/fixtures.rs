//! Puts into the simulated Close what a scenario says it holds.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use strum::VariantArray;

use crate::domain::record::Channel;
use crate::scenario::render;
use close_sync_simulator::{CustomField, Lag, Owner, Simulator};

/// A Lead, its custom fields by name.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct LeadSeed {
    name: Option<String>,
    description: Option<String>,
    /// By label.
    status: Option<String>,
    /// When it was made. Those without follow one another in the order of the file.
    created: Option<String>,
    #[serde(default)]
    contacts: Vec<ContactSeed>,
    /// It was deleted just now: search still shows it.
    #[serde(default)]
    deleted: bool,
    /// It was merged into the Lead of this name just now: search still shows it.
    merged_into: Option<String>,
    #[serde(flatten)]
    custom: BTreeMap<String, toml::Value>,
}

/// A Contact of a Lead, its custom fields by name.
#[derive(Clone, Debug, Deserialize)]
struct ContactSeed {
    name: Option<String>,
    title: Option<String>,
    #[serde(default)]
    emails: Vec<String>,
    #[serde(default)]
    phones: Vec<String>,
    #[serde(default)]
    urls: Vec<String>,
    created: Option<String>,
    /// It was deleted just now: search still shows it.
    #[serde(default)]
    deleted: bool,
    #[serde(flatten)]
    custom: BTreeMap<String, toml::Value>,
}

/// Plants records.
pub(super) struct Seed<'a> {
    pub(super) simulator: &'a Simulator,
    pub(super) fields: &'a [CustomField],
}

/// Longer than any scenario.
const NOT_YET_IN_SEARCH: Lag = Lag::Fixed(Duration::from_hours(1));

/// What was planted, and what of it is to go.
pub(crate) struct Planted {
    merged: Vec<(String, String)>,
    deleted: Vec<String>,
    /// By id: what is gone has no name in Close any more.
    names: BTreeMap<String, String>,
}

impl Planted {
    /// Merges and deletes what the scenario says was merged or deleted just now.
    pub(crate) fn bury(&self, simulator: &Simulator) -> Result<(), String> {
        simulator.set_search_lag(NOT_YET_IN_SEARCH);
        for (id, into) in &self.merged {
            simulator.merge(id, into).map_err(|refused| refused.to_string())?;
        }
        for id in &self.deleted {
            simulator.delete(id);
        }
        simulator.set_search_lag(Lag::NONE);
        Ok(())
    }

    /// What a record was called.
    pub(super) fn name(&self, id: &str) -> Option<&String> {
        self.names.get(id)
    }
}

impl Seed<'_> {
    pub(super) fn plant(&self, leads: &[LeadSeed]) -> Result<Planted, String> {
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
        let known = |(id, into): (String, &str)| {
            let into = ids.get(into).ok_or_else(|| format!("no Lead is called \"{into}\" to merge into"))?;
            Ok((id, into.clone()))
        };
        let merged = merged.into_iter().map(known).collect::<Result<_, String>>()?;
        Ok(Planted { merged, deleted, names: render::names(self.simulator) })
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
            let field = field.ok_or_else(|| format!("{} have no field \"{name}\"", kind.plural()))?;
            let value = serde_json::to_value(value).map_err(|error| error.to_string())?;
            body.insert(format!("custom.{}", field.id), value);
        }
        let body = Value::Object(body);
        let made = match kind {
            Kind::Lead => self.simulator.add_lead(body),
            Kind::Contact => self.simulator.add_contact(body),
        };
        let made = made.map_err(|refused| refused.to_string())?;
        made["id"].as_str().map(str::to_owned).ok_or_else(|| "a record has no id".to_owned())
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

impl LeadSeed {
    fn body(&self) -> Map<String, Value> {
        texts([("name", &self.name), ("description", &self.description), ("status", &self.status)])
    }
}

impl ContactSeed {
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
