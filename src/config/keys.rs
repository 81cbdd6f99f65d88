//! The keys of settings: their names, their environment variables, and which ones are special.
//!
//! A key is the path of a field of `raw`. [`key!`] checks the path at compile time.

use toml::{Table, Value};

/// The defaults, which are also the reference manual.
pub const DEFAULTS: &str = include_str!("defaults.toml");

/// `key!(Destination: amqp.url)` is `"amqp.url"`. It does not compile if `raw::Destination` has no such field.
macro_rules! key {
    ($root:ident: $first:ident $(. $rest:ident)*) => {{
        const _: fn(&$crate::config::raw::$root) = |raw| {
            let _ = &raw.$first $(. $rest)*;
        };
        concat!(stringify!($first) $(, ".", stringify!($rest))*)
    }};
}
pub(super) use key;

/// Keys whose values are never shown. They can be read from files.
pub(super) const SECRETS: [&str; 4] = [
    key!(Destination: close.api_key),
    key!(Destination: amqp.url),
    key!(Process: http.page_token),
    key!(Process: otel.exporter.otlp.headers),
];
/// Keys of URLs, which are shown without their secrets.
pub(super) const URLS: [&str; 3] = [
    key!(Destination: amqp.url),
    key!(Destination: close.api_url),
    key!(Process: otel.exporter.otlp.endpoint),
];
/// Tables whose keys the user chooses.
pub(super) const OPEN_TABLES: [&str; 3] =
    [key!(Destination: mapping.lead.custom), key!(Destination: mapping.contact.custom), DESTINATIONS];
/// Tables of the whole process. A destination cannot have its own.
const PROCESS_TABLES: [&str; 4] =
    [key!(Process: http), key!(Process: log), key!(Process: otel), DESTINATIONS];
/// The table of destinations, by name.
pub(super) const DESTINATIONS: &str = "destinations";

/// The environment variable of a key.
pub(super) fn variable(key: &str) -> String {
    key.replace('.', "_").to_uppercase()
}

/// The key of a setting of one destination.
pub(super) fn within(name: &str, key: &str) -> String {
    format!("{DESTINATIONS}.{name}.{key}")
}

/// A key with its variable, as operators know it: "`close.api_key` (`CLOSE_API_KEY`)".
pub(super) fn with_variable(destination: Option<&str>, key: &str) -> String {
    let key = destination.map_or_else(|| key.to_owned(), |name| within(name, key));
    format!("`{key}` ({})", variable(&key))
}

/// Splits the key of a setting of one destination into the destination's name and the key.
pub(super) fn split(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(DESTINATIONS)?.strip_prefix('.')?.split_once('.')
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Splits merged settings into the tables of the process and those of a destination.
pub(super) fn split_process(settings: Table) -> (Table, Table) {
    settings.into_iter().partition(|(key, _)| PROCESS_TABLES.contains(&key.as_str()))
}

/// Whether the value has one variable: everything but a table, a mapping rule, or a table with the user's own keys.
pub(super) fn is_leaf(path: &str, value: &Value) -> bool {
    value.as_table().is_none_or(|table| OPEN_TABLES.contains(&path) || is_rule(table))
}

pub(super) fn is_rule(table: &Table) -> bool {
    table.contains_key("from")
}

pub(super) fn leaf<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        None => table.get(path),
        Some((first, rest)) => leaf(table.get(first)?.as_table()?, rest),
    }
}

pub(super) fn leaf_mut<'a>(table: &'a mut Table, path: &str) -> Option<&'a mut Value> {
    match path.split_once('.') {
        None => table.get_mut(path),
        Some((first, rest)) => leaf_mut(table.get_mut(first)?.as_table_mut()?, rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::raw::{Destination, Process, setting};

    /// The defaults without the tables of destinations.
    fn defaults() -> Table {
        let mut defaults: Table = toml::from_str(DEFAULTS).unwrap();
        defaults.remove("destinations").unwrap();
        defaults
    }

    fn fits(settings: &Table) -> bool {
        let (process, destination) = split_process(settings.clone());
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
            let mut more = defaults.clone();
            at(&mut more, path).insert("typo".into(), Value::Boolean(true));
            assert_eq!(fits(&more), OPEN_TABLES.contains(&name.as_str()), "{name} with an unknown key");
        });
        assert!(keys > 50, "{keys}");
    }

    #[test]
    fn every_secret_is_text_and_every_process_table_is_a_table_of_the_defaults() {
        let defaults: Table = toml::from_str(DEFAULTS).unwrap();
        for key in SECRETS.iter().chain(&URLS) {
            assert!(leaf(&defaults, key).is_some_and(Value::is_str), "{key}");
        }
        for key in PROCESS_TABLES {
            assert!(leaf(&defaults, key).is_some_and(Value::is_table), "{key}");
        }
    }

    #[test]
    fn a_setting_has_the_path_of_its_field_as_key() {
        let (_, destination) = split_process(defaults());
        let raw: Destination = destination.try_into().unwrap();
        assert_eq!(setting!(raw, amqp.tls.ca_file).key, "amqp.tls.ca_file");
        let rule = setting!(raw, mapping.lead.name);
        assert_eq!(setting!(rule => from).key, "mapping.lead.name.from");
        assert!(setting!(rule => from).value.as_ref().is_some_and(Value::is_array));
    }
}
