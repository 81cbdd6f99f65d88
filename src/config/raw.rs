//! The settings as written, typed but not yet checked.
//!
//! Each struct is a table of `defaults.toml` and each field is one of its keys. `layers` merges file and environment into
//! the defaults and refuses values of another type, so a merged table always has this shape. A misspelt setting does
//! not compile, and a unit test in `keys` compares the fields with the defaults.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::{Table, Value};

use crate::domain::switches::Switches;

/// A raw value with its key, under which problems are reported. [`setting!`] creates it.
pub(super) struct Setting<'a, T> {
    pub(super) key: String,
    pub(super) value: &'a T,
}

impl<'a> Setting<'a, String> {
    pub(super) fn text(&self) -> &'a str {
        self.value.trim()
    }
}

/// `setting!(raw, amqp.url)` is the value of the field with its key, `amqp.url`.
/// `setting!(rule => from)` is a field of the table in the setting `rule`, with the key extended.
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

/// The tables of the whole process.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Process {
    pub(super) http: Http,
    pub(super) log: Log,
    pub(super) otel: Otel,
}

/// The tables that each destination can override.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Destination {
    pub(super) amqp: Amqp,
    pub(super) close: Close,
    pub(super) journal: Journal,
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
    pub(super) country: String,
    pub(super) schema_refresh: String,
    pub(super) timeout: String,
    pub(super) rate_limit_share: i64,
    pub(super) search_lag: String,
    pub(super) event_log_lag: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Journal {
    pub(super) enabled: bool,
    pub(super) max_age: String,
    pub(super) max_bytes: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Worker {
    pub(super) concurrency: i64,
    pub(super) max_message_bytes: i64,
    pub(super) hold: String,
    pub(super) recheck: String,
    pub(super) merge: bool,
    pub(super) grace: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Retry {
    pub(super) in_place: String,
    pub(super) delays: Vec<Value>,
    pub(super) max_age: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mapping {
    pub(super) trigger: String,
    pub(super) anonymous: String,
    pub(super) free_mail_domains: Vec<Value>,
    pub(super) placeholders: Vec<Value>,
    pub(super) placeholder_values: Vec<Value>,
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
