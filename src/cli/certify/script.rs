//! What `certify` works with: lookup fields, the fields of the mapping, and sample values.

use std::time::Duration;

use serde_json::{Value, json};

/// A number whose trunk zero and spaces Close removes.
pub(super) const WITH_TRUNK_ZERO: &str = "+44 07700 900123";
pub(super) const WITH_EXTENSION: &str = "+1 800 444 5555 x123";
/// A number without a country. Recorded in accounts of two countries.
pub(super) const NATIONAL: &str = "8004445555";

/// A custom field that the configuration fills.
#[derive(Debug)]
pub(super) struct SampleField {
    /// The setting that names it.
    pub(super) setting: String,
    pub(super) owner: Owner,
    /// `custom.cf_…`.
    pub(super) key: String,
    pub(super) kind: String,
    pub(super) sample: Sample,
    /// The value is a list.
    pub(super) multiple: bool,
}

/// A value to write into a field.
#[derive(Debug)]
pub(super) enum Sample {
    Value(Value),
    /// The user of the API key.
    Me,
    /// The Contact that was made.
    Contact,
    /// No value is known that Close would accept, for this reason.
    None(&'static str),
}

impl SampleField {
    /// The value to write, or why there is none.
    pub(super) fn value(&self, me: Option<&str>, contact: Option<&str>) -> Result<Value, &'static str> {
        let value = match &self.sample {
            Sample::Value(value) => value.clone(),
            Sample::Me => me.ok_or("Close did not name the user of the API key")?.into(),
            Sample::Contact => contact.ok_or("Close did not name the new Contact")?.into(),
            Sample::None(reason) => return Err(reason),
        };
        Ok(if self.multiple { json!([value]) } else { value })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Lead,
    Contact,
}

/// What the script works with.
#[derive(Debug)]
pub(super) struct Script {
    /// The key of the company id of Leads, `custom.cf_…`.
    pub(super) company_key: Option<String>,
    /// The key of the user id of Contacts.
    pub(super) user_key: Option<String>,
    pub(super) fields: Vec<SampleField>,
    /// How long to wait for search and for the event log.
    pub(super) max_wait: Duration,
}
