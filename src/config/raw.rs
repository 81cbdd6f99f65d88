//! The settings as written, typed but not yet checked.
//!
//! Each struct is a table of `defaults.toml` and each field is one of its keys. `Layers` merges file and environment into
//! the defaults and refuses values of another type, so a merged table always has this shape. A misspelt setting does
//! not compile, and a unit test compares the fields with the defaults.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::{Table, Value};

use crate::domain::switches::Switches;

/// A raw value together with its key, which problems are reported under. Made by [`setting!`] only.
pub(super) struct Setting<'a, T> {
    pub(super) key: String,
    pub(super) value: &'a T,
}

impl<'a> Setting<'a, String> {
    pub(super) fn text(&self) -> &'a str {
        self.value.trim()
    }
}

/// `setting!(raw, amqp.url)` is the value of the field and its key, `amqp.url`.
/// `setting!(rule => from)` is a field of the table that a setting holds, with the key extended.
macro_rules! setting {
    ($raw:expr, $first:ident $(. $rest:ident)*) => {
        $crate::config::raw::Setting {
            key: concat!(stringify!($first) $(, ".", stringify!($rest))*).to_owned(),
            value: &$raw.$first $(. $rest)*,
        }
    };
    ($table:expr => $field:ident) => {
        $crate::config::raw::Setting {
            key: format!("{}.{}", $table.key, stringify!($field)),
            value: &$table.value.$field,
        }
    };
}
pub(super) use setting;

/// The tables that concern the whole process.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Process {
    pub(super) http: Http,
    pub(super) log: Log,
    pub(super) otel: Otel,
}

/// The tables that each destination can have for itself.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Destination {
    pub(super) amqp: Amqp,
    pub(super) close: Close,
    pub(super) worker: Worker,
    pub(super) retry: Retry,
    pub(super) switches: Switches,
    pub(super) mapping: Mapping,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Amqp {
    pub(super) url: String,
    pub(super) exchange: String,
    pub(super) queue: String,
    pub(super) binding_keys: Vec<Value>,
    pub(super) topology: String,
    pub(super) outcomes: String,
    pub(super) prefetch: i64,
    pub(super) tls: AmqpTls,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "the fields are named like the settings")]
pub(super) struct AmqpTls {
    pub(super) ca_file: String,
    pub(super) cert_file: String,
    pub(super) key_file: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Close {
    pub(super) api_key: String,
    pub(super) api_url: String,
    pub(super) lead_company_id_field: String,
    pub(super) contact_user_id_field: String,
    pub(super) lead_synced_at_field: String,
    pub(super) contact_synced_at_field: String,
    pub(super) schema_refresh: String,
    pub(super) timeout: String,
    pub(super) rate_limit_share: i64,
    pub(super) search_lag: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Worker {
    pub(super) concurrency: i64,
    pub(super) max_message_bytes: i64,
    pub(super) hold: String,
    pub(super) merge: bool,
    pub(super) grace: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Retry {
    pub(super) in_place: String,
    pub(super) delays: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mapping {
    pub(super) trigger: String,
    pub(super) anonymous: String,
    pub(super) free_mail_domains: Vec<Value>,
    pub(super) company_id: Rule,
    pub(super) user_id: Rule,
    pub(super) lead: MappingLead,
    pub(super) contact: MappingContact,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MappingLead {
    pub(super) name: Rule,
    pub(super) description: Rule,
    pub(super) status_id: Rule,
    /// By custom field; the values are rules if the user wrote rules.
    pub(super) custom: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MappingContact {
    pub(super) name: Rule,
    pub(super) title: Rule,
    pub(super) email: Rule,
    pub(super) phone: Rule,
    pub(super) url: Rule,
    /// By custom field; the values are rules if the user wrote rules.
    pub(super) custom: BTreeMap<String, Value>,
}

/// A mapping rule. The layers merge it without looking at its values, so each may have any type.
#[derive(Deserialize)]
pub(super) struct Rule {
    pub(super) from: Option<Value>,
    pub(super) or_on_create: Option<Value>,
    pub(super) write: Option<Value>,
    pub(super) normalize: Option<Value>,
    pub(super) values: Option<Value>,
    #[serde(flatten)]
    pub(super) unknown: Table,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Http {
    pub(super) addr: String,
    pub(super) page: bool,
    pub(super) page_token: String,
    pub(super) page_hosts: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    pub(super) format: String,
}

/// Nested like the standard variables of OpenTelemetry, `OTEL_EXPORTER_OTLP_ENDPOINT` for example.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Otel {
    pub(super) exporter: OtelExporter,
    pub(super) service: OtelService,
    pub(super) traces: OtelTraces,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OtelExporter {
    pub(super) otlp: Otlp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Otlp {
    pub(super) endpoint: String,
    pub(super) headers: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OtelService {
    pub(super) name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OtelTraces {
    pub(super) sampler: OtelSampler,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OtelSampler {
    pub(super) arg: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULTS;
    use crate::config::layers::parts;

    /// The defaults as `Layers` hands them over.
    fn defaults() -> Table {
        let mut defaults: Table = toml::from_str(DEFAULTS).unwrap();
        defaults.remove("destinations").unwrap();
        defaults
    }

    fn fits(settings: &Table) -> bool {
        let (process, destination) = parts(settings.clone());
        process.try_into::<Process>().is_ok() && destination.try_into::<Destination>().is_ok()
    }

    /// Calls `visit` with each table that is not a rule, and with the path to it.
    fn tables(table: &Table, path: &[String], visit: &mut impl FnMut(&[String], &Table)) {
        visit(path, table);
        for (key, value) in table {
            if let Some(inner) = value.as_table().filter(|inner| !inner.contains_key("from")) {
                tables(inner, &[path, std::slice::from_ref(key)].concat(), visit);
            }
        }
    }

    fn at<'a>(settings: &'a mut Table, path: &[String]) -> &'a mut Table {
        path.iter().fold(settings, |table, key| table[key].as_table_mut().unwrap())
    }

    #[test]
    fn every_key_of_the_defaults_is_a_field_and_every_field_is_a_key_of_the_defaults() {
        let defaults = defaults();
        assert!(fits(&defaults));
        let mut keys = 0;
        tables(&defaults, &[], &mut |path, table| {
            let name = path.join(".");
            for key in table.keys() {
                let mut without = defaults.clone();
                at(&mut without, path).remove(key);
                assert!(!fits(&without), "{name}.{key} is not a field");
                keys += 1;
            }
            // The keys of this table are the user's.
            if !name.ends_with(".custom") {
                let mut more = defaults.clone();
                at(&mut more, path).insert("typo".into(), Value::Boolean(true));
                assert!(!fits(&more), "{name} takes any key");
            }
        });
        assert!(keys > 50, "{keys}");
    }

    #[test]
    fn a_setting_has_the_path_of_its_field_as_key() {
        let (_, destination) = parts(defaults());
        let raw: Destination = destination.try_into().unwrap();
        assert_eq!(setting!(raw, amqp.tls.ca_file).key, "amqp.tls.ca_file");
        let rule = setting!(raw, mapping.lead.name);
        assert_eq!(setting!(rule => from).key, "mapping.lead.name.from");
        assert!(setting!(rule => from).value.as_ref().is_some_and(Value::is_array));
    }
}
